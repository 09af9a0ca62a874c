"""Redis itself: commands for rare use, and one pipelined connection for the hot ones.

redis-py connects (URL forms, TLS, ACL users, handshake); from then on a `Link` joins the commands of a loop tick in one
write, and hands out the replies in order as they are read (`wire`). Awaiting a redis-py client for each command costs
many times as much CPU, and its default retries would run a script twice when one reply is lost. Where the master is,
`topology` knows; what a refusal means, `refusals`.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import random
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any
from urllib.parse import urlsplit

import redis.asyncio
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import MaxConnectionsError, NoScriptError, RedisError, ResponseError

from balancer import log
from balancer.errors import ConfigurationError, StoreUnavailableError
from balancer.store.refusals import RefusedError, Then, describe, refusal
from balancer.store.scripts import Script
from balancer.store.topology import Topology, hang_up, new_client, new_connection
from balancer.store.wire import Wire, pack

Reply = list[Any]
OnReply = Callable[[Any], None]
"""Gets a command's reply: what Redis says, or a ResponseError, or a StoreUnavailableError."""

AGAIN_S = 0.02
"""After this long a command that was not executed is asked again."""
_TRYING_S = 1.0
_MOST_CLIENTS = 64
_MOST_AT_ONCE = 12
_CHECK_S = 5.0
_STALE_S = 0.25
"""What sentinels said longer ago than this is asked again once the connection to their master stands."""
_RECHECK_S = 1.0
_LONGEST_PAUSE_S = 1.0
_OLDEST = {"redis": (6, 2), "valkey": (7, 2)}


def client(url: str, timeout_s: float = 5.0) -> redis.asyncio.Redis:
    """A client of one server, for tests and the demo: never retries, a bounded pool."""
    return new_client(url, timeout_s)


@contextlib.contextmanager
def translated(doing: str) -> Any:
    """redis-py's exceptions as ours, without addresses or credentials in the message."""
    try:
        yield
    except RedisError as exc:
        message = f"{doing}: {describe(exc)}"
        refused = refusal(exc)
        raise (
            RefusedError(message, refused.then, refused.moved_to) if refused else StoreUnavailableError(message)
        ) from exc
    except OSError as exc:
        raise StoreUnavailableError(f"{doing}: {describe(exc)}") from exc


async def check_server(url: str) -> None:
    """Looks at every master that may be written to.

    Raises ConfigurationError when one is too old, may evict keys, is no master, or hides what must be known from the
    user; StoreUnavailableError when one is away.
    """
    topology = Topology(url)
    with translated("checking Redis"):
        masters = await topology.masters()
    for master in masters:
        connection = new_client(master, topology.connect_timeout_s)
        try:
            with translated("checking Redis"):
                async with asyncio.timeout(_CHECK_S):
                    info: dict[str, Any] = await connection.info()
        except RefusedError as exc:
            if exc.then is Then.UNKNOWN:
                raise ConfigurationError(f"{exc.message}; docs/redis.md has all that it needs") from exc
            raise
        except StoreUnavailableError as exc:
            if "HELLO" in exc.message:  # With which a client asks for the protocol, since Redis 6.0.
                oldest = " or ".join(f"{kind} {'.'.join(map(str, version))}" for kind, version in _OLDEST.items())
                raise ConfigurationError(f"this Redis is too old: {oldest} or newer is needed") from exc
            raise
        finally:
            await connection.aclose()
        _check_info(info, topology)


def _check_info(info: dict[str, Any], topology: Topology) -> None:
    kind = "valkey" if "valkey_version" in info else "redis"
    version = str(info.get("valkey_version") or info.get("redis_version") or "0")
    parts = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if parts < _OLDEST[kind]:
        oldest = ".".join(map(str, _OLDEST[kind]))
        raise ConfigurationError(f"{kind} {version} is too old: {kind} {oldest} or newer is needed")
    mode = info.get("redis_mode") or info.get("server_mode") or "standalone"
    if topology.kind == "standalone" and mode in ("cluster", "sentinel"):
        raise ConfigurationError(f"BALANCER_REDIS: this is a {mode} node; name it as redis+{mode}://")
    if info.get("role", "master") != "master":
        if topology.kind != "standalone":
            raise StoreUnavailableError("checking Redis: a failover is under way, try again")
        raise ConfigurationError("BALANCER_REDIS: this Redis is a read-only replica; name its master")
    policy = info.get("maxmemory_policy", "noeviction")
    if policy != "noeviction":
        raise ConfigurationError(
            f"Redis may evict keys (maxmemory-policy {policy}), and counters would vanish: "
            "set maxmemory-policy noeviction on the server"
        )


class Commands:
    """Rare commands, each on the master of its key, over a bounded client per address.

    A command is repeated only when Redis says that it was not executed, and for a second at most.
    """

    def __init__(self, topology: Topology, timeout_s: float = 5.0) -> None:
        self._topology = topology
        self._timeout_s = timeout_s
        self._clients: dict[str, redis.asyncio.Redis] = {}
        # Fewer than a client has connections, one of which is the feed's: beyond that redis-py would refuse.
        self._places = asyncio.Semaphore(_MOST_AT_ONCE)

    async def run(self, key: str, *command: str | int | bytes, replica_ms: int = 0) -> Any:
        """The reply of the master of `key`, as redis-py reads it. Raises RedisError, OSError, StoreUnavailableError.

        With `replica_ms` it is waited for so long that a replica has what was written; in vain where there is none.
        """
        trying_until = time.monotonic() + _TRYING_S
        while True:
            url, node = await self._client(key)
            try:
                async with asyncio.timeout(self._timeout_s), self._places:
                    return await _executed(node, command, replica_ms)
            except (RedisError, OSError) as exc:
                refused = refusal(exc)
                if refused is None and not isinstance(exc, ResponseError | MaxConnectionsError):
                    await self._drop(url)
                if refused is None or refused.then not in (Then.MOVE, Then.AGAIN) or time.monotonic() > trying_until:
                    raise
                self._learn(refused, url)
            await asyncio.sleep(AGAIN_S)

    @contextlib.asynccontextmanager
    async def listening(self, key: str, channel: str) -> AsyncIterator[AsyncIterator[Any]]:
        """The messages of a channel, heard at the master of `key` until that is lost."""
        url, node = await self._client(key)
        try:
            async with node.pubsub() as feed:
                await feed.subscribe(channel)
                yield feed.listen()
        except (RedisError, OSError):
            await self._drop(url)
            raise

    async def aclose(self) -> None:
        """Disconnects."""
        clients, self._clients = self._clients, {}
        for node in clients.values():
            await node.aclose()

    async def _client(self, key: str) -> tuple[str, redis.asyncio.Redis]:
        url = await self._topology.locate(key)
        node = self._clients.get(url)
        if node is None:
            node = self._clients[url] = new_client(url, self._topology.connect_timeout_s)
            if len(self._clients) > _MOST_CLIENTS:
                await self._clients.pop(next(iter(self._clients))).aclose()
        return url, node

    def _learn(self, refused: RefusedError, url: str) -> None:
        if refused.moved_to:
            slot, host, port = refused.moved_to
            self._topology.moved(slot, host or urlsplit(url).hostname or "", port)
        elif refused.then is Then.MOVE:
            self._topology.forget()

    async def _drop(self, url: str) -> None:
        """Forgets an address that does not answer: it may be gone for good."""
        self._topology.forget()
        if node := self._clients.pop(url, None):
            await node.aclose()


async def _executed(node: redis.asyncio.Redis, command: tuple[str | int | bytes, ...], replica_ms: int) -> Any:
    """The reply to a command. What a connection has written is waited for on that connection only."""
    # redis-py has no types for these.
    if not replica_ms:
        return await node.execute_command(*command)  # type: ignore[no-untyped-call]
    pipeline = node.pipeline(transaction=False)
    pipeline.execute_command(*command)
    pipeline.execute_command("WAIT", 1, replica_ms)
    reply, _ = await pipeline.execute(raise_on_error=False)
    if isinstance(reply, Exception):
        raise reply
    return reply


class WrappedClient(Commands):
    """Commands over one client that somebody else made, and closes."""

    def __init__(self, only: redis.asyncio.Redis) -> None:
        self._only = only

    async def run(self, key: str, *command: str | int | bytes, replica_ms: int = 0) -> Any:
        """The client's reply."""
        return await _executed(self._only, command, replica_ms)

    async def aclose(self) -> None:
        """Leaves the client as it is."""

    async def _client(self, key: str) -> tuple[str, redis.asyncio.Redis]:
        return "", self._only

    async def _drop(self, url: str) -> None:
        pass


class Link:
    """One connection to the master of a key, kept up by `run`; commands are pipelined, replies come back in order.

    `on_up` is called when the connection stands, before anything else is sent on it; `on_down` when it is lost, after
    every command without a reply has failed with StoreUnavailableError. What Redis refuses fails with RefusedError;
    when the refusal says that the master is elsewhere, the link goes there: while it does, it `is_moving`, and
    `on_down` follows only if it does not arrive.
    """

    def __init__(
        self,
        topology: Topology,
        key: str,
        deadline_ms: int,
        on_up: Callable[[], None],
        on_down: Callable[[], None],
        name: str,
    ) -> None:
        self._topology = topology
        self._key = key
        self._deadline_s = deadline_ms / 1000
        self._on_up = on_up
        self._on_down = on_down
        self._name = name
        self._connection: AbstractConnection | None = None
        self._wire: Wire | None = None
        self._buffer: list[bytes] = []
        self._waiting: deque[tuple[OnReply, float]] = deque()
        self._loaded: set[str] = set()
        self._url = ""
        self._failure = "not connected yet"
        self._refusal = ""
        self._leaving: RefusedError | None = None
        self._is_moving = False
        self._is_proven = False
        self._is_late = False
        self._away_since = time.monotonic()

    @property
    def is_connected(self) -> bool:
        """True while a connection stands that may be written to, answering or not."""
        return self._wire is not None and self._leaving is None

    @property
    def is_moving(self) -> bool:
        """True from a refusal that sends us elsewhere until we are there, or cannot be."""
        return self._is_moving

    @property
    def is_up(self) -> bool:
        """True when connected, and no command waits beyond the deadline.

        Once somebody has waited in vain, it is not before a command is answered in time: of a server that is merely
        slow every request would wait in vain.
        """
        if self._wire is None or self._leaving is not None or self._is_late:
            return False
        waiting = self._waiting
        return not waiting or time.monotonic() - waiting[0][1] < self._deadline_s

    @property
    def is_idle(self) -> bool:
        """True when no command waits for its reply."""
        return not self._waiting

    @property
    def away_s(self) -> float:
        """How long the link has been down, 0 while it is up."""
        if self.is_up:
            return 0
        since = self._away_since
        if self.is_connected and not self._is_late:
            since = self._waiting[0][1]
        return time.monotonic() - since

    @property
    def failure(self) -> str:
        """Why the link is down, or what Redis refuses, for people."""
        if not self.is_connected:
            return self._failure
        return self._refusal or "Redis does not answer in time"

    def post(self, command: tuple[str | int | bytes, ...], on_reply: OnReply) -> None:
        """Queues a command for the next `flush`; `on_reply` is called as soon as the reply is read, never before."""
        if self._leaving is not None or self._is_moving:
            asyncio.get_running_loop().call_soon(on_reply, RefusedError(self.failure, Then.MOVE))
        elif self._wire is None:
            failed = StoreUnavailableError(f"Redis is away: {self._failure}")
            asyncio.get_running_loop().call_soon(on_reply, failed)
        else:
            self._buffer.append(pack(command))
            self._waiting.append((on_reply, time.monotonic()))

    def post_call(self, script: Script, command: tuple[str | int | bytes, ...], on_reply: OnReply) -> None:
        """Queues a script call: by its source the first time on this connection, then by its digest."""
        if script.sha in self._loaded:
            self.post(("EVALSHA", script.sha, *command), on_reply)
        else:
            self._loaded.add(script.sha)
            self.post(("EVAL", script.source, *command), on_reply)

    def send(self, *command: str | int | bytes) -> asyncio.Future[Any]:
        """Queues a command; its reply, or ResponseError, or StoreUnavailableError."""
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.post(command, functools.partial(_resolve, future))
        return future

    def call(self, script: Script, command: tuple[str | int | bytes, ...]) -> asyncio.Future[Any]:
        """Queues a script call; its reply, or ResponseError, or StoreUnavailableError."""
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.post_call(script, command, functools.partial(_resolve, future))
        return future

    def forget(self, script: Script) -> None:
        """Makes the next call send the source again: the server has said NOSCRIPT."""
        self._loaded.discard(script.sha)

    def late(self) -> None:
        """Somebody has waited in vain: the link is not up before a command is answered in time again."""
        if not self._is_late:
            self._is_late, self._away_since = True, time.monotonic() - self._deadline_s

    def flush(self) -> None:
        """Writes what is queued to the socket, at once."""
        if self._buffer:
            if self._wire is not None:
                self._wire.write(b"".join(self._buffer))
            self._buffer.clear()

    async def run(self) -> None:
        """Keeps the connection up until cancelled. Pauses between attempts grow to a second, with jitter."""
        pause_s = 0.0
        try:
            while True:
                self._is_proven = False
                try:
                    await self._keep(await self._connect())
                except RefusedError as exc:
                    self._learn(exc)
                    await self._disconnect(exc.message, is_moving=self._leaving is exc and self._is_moving)
                except (RedisError, StoreUnavailableError, OSError, EOFError) as exc:
                    self._topology.forget()
                    await self._disconnect(describe(exc))
                except Exception as exc:  # noqa: BLE001 - a task's root: without it the pool would be away for ever.
                    log.error("the link to the store broke", exc=exc, link=self._name)
                    await self._disconnect(f"a fault of ours ({type(exc).__name__})")
                # A node that connects and then refuses everything is no reason to hurry.
                if self._is_proven:
                    pause_s = 0.0
                if pause_s:
                    await asyncio.sleep(pause_s * random.uniform(0.5, 1))
                pause_s = min(_LONGEST_PAUSE_S, pause_s * 2 or 0.02)
        finally:
            await self._disconnect("")

    async def _connect(self) -> Wire:
        url = await self._topology.locate(self._key)
        connect_s = self._topology.connect_timeout_s
        self._connection = connection = new_connection(url, None, connect_s, self._topology.tls)
        # Also for the handshake: a stopped server's kernel still accepts connections.
        async with asyncio.timeout(connect_s):
            await connection.connect()  # type: ignore[no-untyped-call]
            await self._greet(connection)
        await self._topology.recheck(_STALE_S)
        if not await self._is_place(url):
            raise RefusedError("the master has changed meanwhile: a failover is under way", Then.MOVE)
        self._url = url
        self._wire = wire = Wire(connection, self._on_reply)
        self._loaded.clear()
        self._leaving, self._is_moving, self._is_late, self._refusal = None, False, False, ""
        log.info("connected to the store", link=self._name)
        self._on_up()
        self.flush()
        return wire

    async def _greet(self, connection: AbstractConnection) -> None:
        """Raises when the server loads its data, wants a password, or is not the master that we were told of."""
        try:
            await connection.send_command("PING")
            await connection.read_response()
            if self._topology.kind != "standalone":
                await connection.send_command("ROLE")
                role, *_ = await connection.read_response()
                if role != b"master":
                    raise RefusedError("the master is a replica now: a failover is under way", Then.MOVE)
        except RedisError as exc:
            if refused := refusal(exc):
                raise refused from exc
            raise

    async def _keep(self, wire: Wire) -> None:
        """Watches the connection until it is lost; raises why."""
        guard = asyncio.create_task(self._guard(self._url))
        try:
            await wire.lost
        finally:
            guard.cancel()

    def _on_reply(self, reply: Any) -> None:
        if isinstance(reply, RedisError):
            # Not a loss of the connection if the server said it, whatever class redis-py gives it.
            reply = refusal(reply) or reply
            if not isinstance(reply, ResponseError | RefusedError):
                raise reply
        on_reply, sent_at = self._waiting.popleft()
        reply = self._noted(reply)
        if self._is_late and time.monotonic() - sent_at < self._deadline_s and not isinstance(reply, RefusedError):
            self._is_late = False
        on_reply(reply)
        # Once we leave, nothing new is sent, and what was sent is still answered.
        if self._leaving is not None and not self._waiting and self._wire:
            self._wire.give_up(self._leaving)

    def _noted(self, reply: Any) -> Any:
        """The reply, once what it says about the server is kept: it works, it refuses, the master is elsewhere."""
        if not isinstance(reply, RefusedError):
            if not isinstance(reply, ResponseError):
                self._is_proven, self._refusal = True, ""
            return reply
        if reply.moved_to and self._topology.kind == "standalone":
            reply = RefusedError("this is a node of a Cluster: name it as redis+cluster://", Then.MOVE)
        if reply.message != self._refusal:
            log.warning("the store refuses", link=self._name, reason=reply.message)
        self._refusal = reply.message
        if reply.then is Then.MOVE and self._leaving is None:
            self._leaving, self._failure = reply, reply.message
            # Whoever is refused again after a move waits no longer: the way there is not known yet.
            self._is_moving = self._is_proven
        return reply

    def _learn(self, refused: RefusedError) -> None:
        if refused.moved_to:
            slot, host, port = refused.moved_to
            self._topology.moved(slot, host or getattr(self._connection, "host", ""), port)
        else:
            self._topology.forget()

    async def _guard(self, url: str) -> None:
        """Breaks a connection that is silent for too long with commands waiting, or that leads to no master any more.

        The first may be half-open. Of the second the sentinels know, not the server itself. A link that was late is
        asked whether it still is.
        """
        patience_s = self._topology.patience_s
        while True:
            await asyncio.sleep(patience_s / 5)
            if self._is_late and self._leaving is None and not self._waiting:
                self.post(("PING",), _ignore)
                self.flush()
            await self._topology.recheck(_RECHECK_S)
            is_silent = bool(self._waiting) and time.monotonic() - self._waiting[0][1] > patience_s
            if (is_silent or not await self._is_place(url)) and self._wire:
                self._wire.abort()

    async def _is_place(self, url: str) -> bool:
        """True unless the sentinels name another master now."""
        if self._topology.kind != "sentinel":
            return True
        try:
            return await self._topology.locate(self._key) == url
        except StoreUnavailableError:
            return True  # Nobody knows better.

    async def _disconnect(self, failure: str, *, is_moving: bool = False) -> None:
        was_up = self._wire is not None or self._is_moving
        if was_up and not self._is_late:
            self._away_since = time.monotonic()
        self._failure = failure
        wire, self._wire = self._wire, None
        if wire is not None:
            wire.release()
        self._leaving, self._is_moving = None, is_moving
        connection, self._connection = self._connection, None
        waiting, self._waiting = self._waiting, deque()
        self._buffer.clear()
        loop = asyncio.get_running_loop()
        for on_reply, _ in waiting:
            loop.call_soon(on_reply, StoreUnavailableError(f"Redis is away: {failure}"))
        if connection is not None:
            await hang_up(connection)
        if was_up and failure and not is_moving:
            log.warning("lost the store", link=self._name, reason=failure)
            self._on_down()


def _resolve(future: asyncio.Future[Any], reply: Any) -> None:
    """Gives a reply to whoever waits for it, if anybody still does."""
    if future.done():
        return
    if isinstance(reply, ResponseError | StoreUnavailableError):
        future.set_exception(reply)
    else:
        future.set_result(reply)


def _ignore(reply: Any) -> None:
    """Takes the reply that nobody waits for."""


def is_noscript(exc: BaseException | None) -> bool:
    """True when the server does not know the script's digest; nothing was run."""
    return isinstance(exc, NoScriptError)
