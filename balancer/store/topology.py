"""Where the master of a key is: a single server, what the sentinels say, or the node of a Cluster that has the slot.

`BALANCER_REDIS` names one of

    redis://[user:password@]host[:port][/db]                      one server; rediss:// with TLS
    unix:///path/to/socket                                        one server
    redis+sentinel://[user:password@]host[:port],…/service[/db]   sentinels, by default on port 26379
    redis+cluster://[user:password@]host[:port],…                 some nodes of a Cluster; the others are found

and rediss+sentinel://, rediss+cluster:// with TLS to every node. `sentinel_username` and `sentinel_password` are for
the sentinels themselves; all other parameters (`?protocol=2&ssl_ca_certs=…`) are what redis-py reads from a URL.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterable
from typing import Any, Literal, cast
from urllib.parse import parse_qsl, quote, unquote, urlencode

import msgspec
import redis.asyncio
from redis.asyncio.connection import AbstractConnection, ConnectionPool, RedisSSLContext, SSLConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.crc import key_slot
from redis.exceptions import RedisError
from redis.maint_notifications import MaintNotificationsConfig

from balancer import log
from balancer.errors import ConfigurationError, StoreUnavailableError
from balancer.store.refusals import describe

_SCHEMES = ("redis", "rediss", "redis+sentinel", "rediss+sentinel", "redis+cluster", "rediss+cluster")
_FORMS = {
    "": "redis://[user:password@]host[:port][/db], rediss:// for TLS",
    "unix": "unix:///path/to/socket",
    "sentinel": "redis+sentinel://[user:password@]host[:port],host[:port]/service[/db], rediss+sentinel:// for TLS",
    "cluster": "redis+cluster://[user:password@]host[:port],host[:port], rediss+cluster:// for TLS",
}
_PARAMETERS = ("db", "username", "password", "protocol", "client_name", "socket_keepalive")
_SENTINEL_PARAMETERS = ("sentinel_username", "sentinel_password")
_ASKING_INTERVAL_S = 0.1
_NODE_TIMEOUT_S = 0.5


class Node(msgspec.Struct, frozen=True):
    """A server's host, without brackets, and port."""

    host: str
    port: int


def new_connection(
    url: str, timeout_s: float | None, connect_timeout_s: float, tls: RedisSSLContext | None = None
) -> AbstractConnection:
    """A connection of redis-py's, not connected yet, that never retries."""
    pool = ConnectionPool.from_url(url, **options(timeout_s, connect_timeout_s))
    # Made here and not taken from the pool: the pool would keep it, and check it on every use.
    connection = cast("AbstractConnection", pool.make_connection())  # type: ignore[no-untyped-call]
    if tls is not None and isinstance(connection, SSLConnection):
        connection.ssl_context = tls
    return connection


async def hang_up(connection: AbstractConnection) -> None:
    """Closes a connection at once, without the farewell of TLS, which a stopped server would never answer."""
    if connection._writer is not None:
        connection._writer.transport.abort()
    with contextlib.suppress(RedisError, OSError):
        await connection.disconnect(nowait=True)


def new_client(url: str, connect_timeout_s: float) -> redis.asyncio.Redis:
    """A client for rare commands: never retries, a bounded pool."""
    # redis-py's own timeout for replies waits by `asyncio.wait_for`, which on Python 3.11 may swallow a cancellation:
    # whoever asks sets the limit.
    return redis.asyncio.Redis.from_url(url, max_connections=16, **options(None, connect_timeout_s))


def options(timeout_s: float | None, connect_timeout_s: float) -> dict[str, Any]:
    """What all our connections have in common."""
    return {
        "retry": Retry(NoBackoff(), 0),
        "socket_timeout": timeout_s,
        "socket_connect_timeout": connect_timeout_s,
        "client_name": "balancer",
        # CLIENT SETINFO, which old servers do not know and limited users may not send.
        "driver_info": None,
        # Costs a round trip at each connect, and its pushes would arrive among our replies.
        "maint_notifications_config": MaintNotificationsConfig(enabled=False),
    }


class Topology:
    """The servers behind one URL. Raises ConfigurationError when that is malformed.

    Asking is shared and paced: however many links lose their master at once, one question goes out.
    """

    kind: Literal["standalone", "sentinel", "cluster"]

    def __init__(self, url: str) -> None:
        scheme, separator, rest = url.partition("://")
        transport, _, form = scheme.partition("+")
        if scheme == "unix":
            form = "unix"
        elif not separator or scheme not in _SCHEMES:
            raise ConfigurationError(f"BALANCER_REDIS: expected one of {'; '.join(_FORMS.values())}")
        self.kind = "sentinel" if form == "sentinel" else "cluster" if form == "cluster" else "standalone"
        self._expected = _FORMS[form]
        self._transport = transport
        self.tls: RedisSSLContext | None = None
        """Read once: loading the certificates of the system blocks for tens of milliseconds, at each connect."""
        self._is_stale = True
        self._asked_at = self._answered_at = self._known_at = float("-inf")
        self._failure = ""
        self._lock = asyncio.Lock()
        self._service = ""
        self._master: Node | None = None
        self._ranges: list[tuple[int, int, Node]] = []
        self._moved: dict[int, Node] = {}
        if self.kind == "standalone":
            self._start: tuple[Node, ...] = ()
            self._url = self._read_standalone(url, rest, form == "unix")
        else:
            self._start = self._read_several(rest)
            self._url = self._url_of(self._start[0])
        self._check(self._url)
        self._nodes = dict.fromkeys(self._start)

    # -- reading the URL -----------------------------------------------------------------------------------------------

    def _fault(self, what: str) -> ConfigurationError:
        # No part of the URL: a password with a `/` or `:` in it may be taken for any part.
        return ConfigurationError(
            f"BALANCER_REDIS: {what}; expected {self._expected}, with special characters of a password "
            "percent-encoded (%40 for @, %2F for /, %23 for #)"
        )

    def _read_standalone(self, url: str, rest: str, is_unix: bool) -> str:
        place, _, query = rest.partition("?")
        self._read_query(query)
        if "#" in rest:
            raise self._fault("a # stands in it")
        if is_unix:
            if not place.rpartition("@")[2].startswith("/"):
                raise self._fault("the path is missing")
            return url
        hosts, _, path = place.partition("/")
        _, _, host = hosts.rpartition("@")
        if "," in host:
            raise self._fault("it names several hosts")
        if host:
            self._node(host, 6379)
        self._database(path)
        return url

    def _read_several(self, rest: str) -> tuple[Node, ...]:
        if "#" in rest:
            raise self._fault("a # stands in it")
        place, _, query = rest.partition("?")
        hosts, _, path = place.partition("/")
        userinfo, at, hosts = hosts.rpartition("@")
        parameters = self._read_query(query)
        self._userinfo = userinfo + at
        own = [(name, value) for name, value in parameters if name not in _SENTINEL_PARAMETERS]
        self._query = urlencode(own)
        if self.kind == "sentinel":
            service, _, path = path.partition("/")
            self._service = unquote(service)
            if not self._service:
                raise self._fault("the name of the service is missing")
            given = dict(parameters)
            user, password = (quote(given.get(name, ""), safe="") for name in _SENTINEL_PARAMETERS)
            self._sentinel_userinfo = f"{user}:{password}@" if user or password else ""
            not_theirs = ("db", "username", "password")
            self._sentinel_query = urlencode([(name, value) for name, value in own if name not in not_theirs])
        elif path.strip("/") not in ("", "0") or dict(parameters).get("db", "0") != "0":
            raise self._fault("a Cluster has database 0 only")
        self._db = self._database(path)
        return tuple(self._node(host, 26379 if self.kind == "sentinel" else 6379) for host in hosts.split(","))

    def _read_query(self, query: str) -> list[tuple[str, str]]:
        parameters = parse_qsl(query, keep_blank_values=True)
        known = _PARAMETERS + (_SENTINEL_PARAMETERS if self.kind == "sentinel" else ())
        for name, _ in parameters:
            if name.startswith("ssl_") and self._transport != "rediss":
                raise self._fault("ssl_… parameters need rediss")
            if name not in known and not name.startswith("ssl_"):
                raise self._fault(f"unknown parameter; known are {', '.join(known)} and ssl_…")
        return parameters

    def _node(self, text: str, default_port: int) -> Node:
        if text.startswith("["):
            host, bracket, port = text[1:].partition("]")
            is_whole = bool(bracket) and (not port or port.startswith(":"))
            port = port.removeprefix(":")
        else:
            host, _, port = text.partition(":")
            is_whole = True
        if not is_whole or not host or not set(host).isdisjoint(" @[]/"):
            raise self._fault("a host is missing or malformed")
        if port and not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
            raise self._fault("a port is no number from 1 to 65535")
        return Node(unquote(host), int(port or default_port))

    def _database(self, path: str) -> str:
        path = path.strip("/")
        if path and not (path.isascii() and path.isdigit()):
            raise self._fault("the database is no number")
        return path

    def _check(self, url: str) -> None:
        """Lets redis-py read the URL, and Python the certificates, before anything depends on them."""
        try:
            connection = new_connection(url, 1, 1)
            if isinstance(connection, SSLConnection):
                connection.ssl_context.get()
                self.tls = connection.ssl_context
        except TypeError as exc:
            raise self._fault("an ssl_… parameter is not known") from exc
        except (ValueError, RedisError) as exc:
            raise self._fault("a parameter's value is not understood") from exc
        except OSError as exc:
            reason = exc.strerror or str(exc)
            raise ConfigurationError(f"BALANCER_REDIS: the files of ssl_… parameters: {reason}") from exc

    def _url_of(self, node: Node) -> str:
        return _url(self._transport, self._userinfo, node, self._db, self._query)

    # -- where ---------------------------------------------------------------------------------------------------------

    @property
    def nodes(self) -> tuple[Node, ...]:
        """The sentinels, or the nodes of the Cluster, that are asked; none for a single server."""
        return tuple(self._nodes)

    @property
    def patience_s(self) -> float:
        """How long a connection may be silent with commands waiting before it is given up."""
        # Only where there may be another master by now.
        return 2.0 if self.kind == "standalone" else 1.5

    @property
    def connect_timeout_s(self) -> float:
        """How long connecting and the handshake may take."""
        return 2.0 if self.kind == "standalone" else 1.0

    async def locate(self, key: str) -> str:
        """The redis://, rediss:// or unix:// URL, with credentials, of the master that has the key now.

        Raises StoreUnavailableError when nobody knows.
        """
        if self.kind == "standalone":
            return self._url
        await self._know()
        if self.kind == "sentinel":
            assert self._master is not None
            return self._url_of(self._master)
        slot = key_slot(key.encode())
        node = self._moved.get(slot) or next((n for first, last, n in self._ranges if first <= slot <= last), None)
        if node is None:
            self.forget()
            raise StoreUnavailableError("no node of the Cluster serves the slot of this pool")
        return self._url_of(node)

    async def masters(self) -> list[str]:
        """The URLs of all masters, as they are now. Raises StoreUnavailableError."""
        if self.kind == "standalone":
            return [self._url]
        self.forget()
        await self._know()
        nodes = [self._master] if self._master else [node for _, _, node in self._ranges]
        return [self._url_of(node) for node in dict.fromkeys(nodes)]

    async def recheck(self, max_age_s: float) -> None:
        """Asks the sentinels again if their last answer is older; leaves all as it is when none answers.

        A master that hung and comes back believes for seconds that it still is one. In a Cluster it finds out by
        itself, before it answers anybody.
        """
        if self.kind != "sentinel" or time.monotonic() - self._answered_at < max_age_s:
            return
        async with self._lock:
            if time.monotonic() - self._answered_at < max_age_s:
                return
            self._asked_at = time.monotonic()
            try:
                await self._ask()
            except StoreUnavailableError as exc:
                log.debug("the sentinels are away", reason=exc.message)
            finally:
                self._answered_at = time.monotonic()

    def forget(self) -> None:
        """Makes the next `locate` ask again."""
        self._is_stale = True

    def moved(self, slot: int, host: str, port: int) -> None:
        """Takes a node's word for where a slot is now; the rest of the map stands."""
        self._moved[slot] = Node(host, port)

    async def _know(self) -> None:
        # While the first answer is on its way there is none to go by; later on, the last one serves until then.
        if not self._is_stale and (self._master or self._ranges):
            return
        came_at = time.monotonic()
        async with self._lock:
            if self._known_at >= came_at:
                # Somebody else asked while we waited, and the answer, good or bad, is ours too.
                if self._failure:
                    raise StoreUnavailableError(self._failure)
                return
            pause_s = self._asked_at + _ASKING_INTERVAL_S - time.monotonic()
            if pause_s > 0:
                await asyncio.sleep(pause_s)
            self._asked_at = time.monotonic()
            self._is_stale = False
            try:
                await self._ask()
                self._failure = ""
            except StoreUnavailableError as exc:
                self._is_stale = True
                self._failure = exc.message
                raise
            except BaseException:
                self._is_stale = True
                raise
            finally:
                self._known_at = self._answered_at = time.monotonic()

    async def _ask(self) -> None:
        """Asks the nodes in turn until one knows."""
        reason = ""
        for node in list(self._nodes):
            # To the end: a node that is cut off from the others, and whose map is old, is not asked twice in a row.
            self._nodes[node] = self._nodes.pop(node)
            try:
                reason = await (self._ask_sentinel(node) if self.kind == "sentinel" else self._ask_member(node))
            except (RedisError, OSError) as exc:
                reason = describe(exc)
            if not reason:
                return
        if self.kind == "sentinel" and ("NOAUTH" in reason or "WRONGPASS" in reason):
            reason += " (for sentinels: sentinel_username, sentinel_password)"
        who = "sentinel" if self.kind == "sentinel" else "node of the Cluster"
        raise StoreUnavailableError(f"no {who} of {len(self._nodes)} knows the master: {reason}")

    async def _ask_sentinel(self, node: Node) -> str:
        """Learns the master; the reason if the sentinel does not know it."""
        url = _url(self._transport, self._sentinel_userinfo, node, "", self._sentinel_query)
        reply = await _reply_of(url, self.tls, "SENTINEL", "GET-MASTER-ADDR-BY-NAME", self._service)
        if not reply:
            return f"the sentinels have no service {self._service}"
        self._master = Node(reply[0].decode(), int(reply[1]))
        return ""

    async def _ask_member(self, node: Node) -> str:
        """Learns the map of slots and all nodes; the reason if the node knows none."""
        reply = await _reply_of(self._url_of(node), self.tls, "CLUSTER", "SLOTS")
        ranges = []
        nodes: dict[Node, None] = {}
        for first, last, *members in reply:
            known = [member for entry in members if (member := _member(entry, node.host))]
            nodes.update(dict.fromkeys(known))
            if known and _member(members[0], node.host) == known[0]:
                ranges.append((int(first), int(last), known[0]))
        if not ranges:
            return "it has no slots yet"
        self._ranges = ranges
        self._moved.clear()
        # Known ones keep their turn.
        kept = [known for known in self._nodes if known in nodes or known in self._start]
        self._nodes = dict.fromkeys([*kept[:-1], *(n for n in nodes if n not in self._nodes), *kept[-1:]])
        return ""


async def _reply_of(url: str, tls: RedisSSLContext | None, *command: str) -> Any:
    """A node's reply to one command, on a connection of its own. Raises RedisError or OSError, soon."""
    connection = new_connection(url, _NODE_TIMEOUT_S, _NODE_TIMEOUT_S, tls)
    try:
        async with asyncio.timeout(_NODE_TIMEOUT_S):
            await connection.connect()  # type: ignore[no-untyped-call]
            await connection.send_command(*command)
            return await connection.read_response()
    finally:
        await hang_up(connection)


def _member(entry: Any, asked: str) -> Node | None:
    """A node in the reply of CLUSTER SLOTS; None when it has no address that we could use."""
    host, port, *more = entry
    # A node that does not know its own address, or is told to keep it, means the one that it was asked under.
    name = host.decode() if host else asked
    if name == "?":  # Host names are preferred here, and this one has none: the address is among the rest.
        pairs: Iterable[Any] = more[1].items() if len(more) > 1 and isinstance(more[1], dict) else ()
        if len(more) > 1 and not isinstance(more[1], dict):
            pairs = zip(more[1][::2], more[1][1::2], strict=False)
        name = dict(pairs).get(b"ip", b"").decode()
    return Node(name, int(port)) if name and int(port) else None


def _url(scheme: str, userinfo: str, node: Node, db: str, query: str) -> str:
    host = f"[{node.host}]" if ":" in node.host else quote(node.host, safe="")
    return f"{scheme}://{userinfo}{host}:{node.port}" + (f"/{db}" if db else "") + (f"?{query}" if query else "")
