"""Redis itself: clients for rare commands, and one pipelined connection for the hot ones.

redis-py connects (URL forms, TLS, ACL users, handshake) and parses; a `Link` joins the commands of a loop tick in one
write and resolves the replies in order. Awaiting a redis-py client for each command costs three times as much CPU, and
its default retries would run a script twice when one reply is lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import time
from collections import deque
from collections.abc import Callable
from typing import Any, cast
from urllib.parse import urlsplit

import redis.asyncio
from redis.asyncio.connection import AbstractConnection, ConnectionPool
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import NoScriptError, RedisError, ResponseError

from balancer import log
from balancer.errors import ConfigurationError, StoreUnavailableError
from balancer.store.scripts import Script

Reply = list[Any]

_STALL_LIMIT_S = 2.0
_LONGEST_PAUSE_S = 1.0
_OLDEST = {"redis": (6, 2), "valkey": (7, 2)}


def check_url(url: str) -> None:
    """Refuses what is no URL of a Redis server that we can use, naming what is expected."""
    scheme = urlsplit(url).scheme
    if scheme in ("redis+sentinel", "redis+cluster"):
        raise ConfigurationError(
            f"BALANCER_REDIS: {scheme}:// is not supported yet; use redis://, rediss:// or unix://"
        )
    if scheme not in ("redis", "rediss", "unix"):
        raise ConfigurationError("BALANCER_REDIS: expected a redis://, rediss:// or unix:// URL")
    try:
        ConnectionPool.from_url(url)
    except ValueError as exc:
        raise ConfigurationError(f"BALANCER_REDIS: {exc}") from exc


def client(url: str, timeout_s: float = 5.0) -> redis.asyncio.Redis:
    """A client for rare commands: never retries, a bounded pool."""
    check_url(url)
    return redis.asyncio.Redis.from_url(
        url,
        retry=Retry(NoBackoff(), 0),
        socket_timeout=timeout_s,
        socket_connect_timeout=timeout_s,
        max_connections=16,
        client_name="balancer",
    )


@contextlib.contextmanager
def translated(doing: str) -> Any:
    """redis-py's exceptions as ours, without addresses or credentials in the message."""
    try:
        yield
    except RedisError as exc:
        raise StoreUnavailableError(f"{doing}: {describe(exc)}") from exc
    except OSError as exc:
        raise StoreUnavailableError(f"{doing}: {type(exc).__name__}") from exc


def describe(exc: BaseException) -> str:
    """What a server refused, or the kind of failure; never an address."""
    return str(exc) if isinstance(exc, ResponseError) else f"Redis does not answer ({type(exc).__name__})"


async def check_server(url: str) -> None:
    """Raises ConfigurationError when the server is too old or may evict keys, StoreUnavailableError when it is away."""
    connection = client(url)
    try:
        with translated("checking Redis"):
            info: dict[str, Any] = await connection.info()
    finally:
        await connection.aclose()
    kind = "valkey" if "valkey_version" in info else "redis"
    version = str(info.get("valkey_version") or info.get("redis_version") or "0")
    parts = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if parts < _OLDEST[kind]:
        oldest = ".".join(map(str, _OLDEST[kind]))
        raise ConfigurationError(f"{kind} {version} is too old: {kind} {oldest} or newer is needed")
    policy = info.get("maxmemory_policy", "noeviction")
    if policy != "noeviction":
        raise ConfigurationError(
            f"Redis may evict keys (maxmemory-policy {policy}), and counters would vanish: "
            "set maxmemory-policy noeviction on the server"
        )


class Link:
    """One connection that is kept up by `run`; commands are pipelined, replies come back in order.

    `on_up` is called when the connection stands, before anything else is sent on it; `on_down` when it is lost, after
    every command without a reply has failed with StoreUnavailableError.
    """

    def __init__(
        self, url: str, deadline_ms: int, on_up: Callable[[], None], on_down: Callable[[], None], name: str
    ) -> None:
        check_url(url)
        self._pool = ConnectionPool.from_url(
            url, retry=Retry(NoBackoff(), 0), socket_timeout=None, socket_connect_timeout=5, client_name="balancer"
        )
        self._deadline_s = deadline_ms / 1000
        self._on_up = on_up
        self._on_down = on_down
        self._name = name
        self._connection: AbstractConnection | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._buffer: list[bytes] = []
        self._waiting: deque[tuple[asyncio.Future[Any], float]] = deque()
        self._loaded: set[str] = set()
        self._failure = "not connected yet"

    @property
    def is_connected(self) -> bool:
        """True while a connection stands, answering or not."""
        return self._writer is not None

    @property
    def is_up(self) -> bool:
        """True when connected, and no command has waited for its reply beyond the deadline."""
        if self._writer is None:
            return False
        return not self._waiting or time.monotonic() - self._waiting[0][1] < self._deadline_s

    @property
    def failure(self) -> str:
        """Why the link is down, for people."""
        return self._failure if self._writer is None else "Redis does not answer in time"

    def send(self, *command: str | int | bytes) -> asyncio.Future[Any]:
        """Queues a command for the next `flush`; its reply, or ResponseError, or StoreUnavailableError."""
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        if self._connection is None or self._writer is None:
            future.set_exception(StoreUnavailableError(f"Redis is away: {self.failure}"))
            return future
        self._buffer.extend(self._connection.pack_command(*command))
        self._waiting.append((future, time.monotonic()))
        return future

    def call(self, script: Script, command: tuple[str | int, ...]) -> asyncio.Future[Any]:
        """Queues a script call: by its source the first time on this connection, then by its digest."""
        if script.sha in self._loaded:
            return self.send("EVALSHA", script.sha, *command)
        self._loaded.add(script.sha)
        return self.send("EVAL", script.source, *command)

    def forget(self, script: Script) -> None:
        """Makes the next call send the source again: the server has said NOSCRIPT."""
        self._loaded.discard(script.sha)

    def flush(self) -> None:
        """Writes what is queued to the socket, at once."""
        if self._buffer and self._writer is not None:
            self._writer.write(b"".join(self._buffer))
        self._buffer.clear()

    async def run(self) -> None:
        """Keeps the connection up until cancelled. Pauses between attempts grow to a second, with jitter."""
        pause_s = 0.0
        try:
            while True:
                try:
                    await self._connect()
                    pause_s = 0.0
                    await self._read_replies()
                except (RedisError, OSError, EOFError) as exc:
                    await self._disconnect(describe(exc))
                if pause_s:
                    await asyncio.sleep(pause_s * random.uniform(0.5, 1))
                pause_s = min(_LONGEST_PAUSE_S, pause_s * 2 or 0.02)
        finally:
            await self._disconnect("")

    async def _connect(self) -> None:
        # Made here and not taken from the pool: the pool would keep it, and check it on every use.
        connection = cast("AbstractConnection", self._pool.make_connection())  # type: ignore[no-untyped-call]
        self._connection = connection
        await connection.connect()  # type: ignore[no-untyped-call]
        # The writer is redis-py's own: its public way to write awaits, and would not write within this loop tick.
        self._writer = connection._writer
        self._loaded.clear()
        log.info("connected to the store", link=self._name)
        self._on_up()
        self.flush()

    async def _read_replies(self) -> None:
        assert self._connection is not None
        guard = asyncio.create_task(self._guard())
        try:
            while True:
                reply: Any
                try:
                    reply = await self._connection.read_response(disable_decoding=True, timeout=math.inf)
                except ResponseError as exc:
                    reply = exc
                future, _ = self._waiting.popleft()
                if future.done():
                    continue
                if isinstance(reply, ResponseError):
                    future.set_exception(reply)
                else:
                    future.set_result(reply)
        finally:
            guard.cancel()

    async def _guard(self) -> None:
        """Breaks a connection that has been silent for too long with commands waiting: it may be half-open."""
        while True:
            await asyncio.sleep(0.5)
            if self._waiting and time.monotonic() - self._waiting[0][1] > _STALL_LIMIT_S and self._writer:
                self._writer.transport.abort()

    async def _disconnect(self, failure: str) -> None:
        was_up = self._writer is not None
        self._failure = failure
        self._writer = None
        connection, self._connection = self._connection, None
        waiting, self._waiting = self._waiting, deque()
        self._buffer.clear()
        for future, _ in waiting:
            if not future.done():
                future.set_exception(StoreUnavailableError(f"Redis is away: {failure}"))
        if connection is not None:
            with contextlib.suppress(RedisError, OSError):
                await connection.disconnect(nowait=True)
        if was_up and failure:
            log.warning("lost the store", link=self._name, reason=failure)
            self._on_down()


def is_noscript(exc: BaseException | None) -> bool:
    """True when the server does not know the script's digest; nothing was run."""
    return isinstance(exc, NoScriptError)
