"""The upstream client: a connection for a request, its own origin's, and the answer on it."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable

import msgspec

from balancer.errors import UpstreamError, UpstreamTimeoutError
from balancer.gateway.messages import UpstreamRequest, UpstreamResponse
from balancer.gateway.upstream.answer import Answer, answer_to
from balancer.gateway.upstream.connection import BroughtConnection, Connection
from balancer.gateway.upstream.dialing import Dialer
from balancer.gateway.upstream.pool import Pool
from balancer.gateway.upstream.request import Heads, Origin, Targets, head_of
from balancer.gateway.upstream.socks import SocksUpstream
from balancer.gateway.upstream.tls import client_context
from balancer.gateway.upstream.tunnel import ProxyRefusedError

_BUFFER_BYTES = 64 * 1024
_CLOSING = "the gateway is closing its connections to upstreams"
_CUT_OFF = "was cut off: the gateway is closing its connections"


class Prepared(msgspec.Struct, frozen=True, kw_only=True):
    """What many requests have in common: where they go, and how their head begins. `request` has no body."""

    request: UpstreamRequest
    origin: Origin
    head: bytes


class UpstreamClient:
    """Sends requests, each on a connection of its origin's pool."""

    def __init__(self, connections: int, ca_file: str = "") -> None:
        self._limit = connections
        self._tls = client_context(ca_file)
        self._dialer = Dialer(self._tls)
        self._targets = Targets()
        self._heads = Heads()
        self._buffer = memoryview(bytearray(_BUFFER_BYTES))
        self._pools: dict[Origin, Pool] = {}
        self._connections: set[Connection] = set()
        self._emptied: asyncio.Future[None] | None = None
        self._is_closed = False
        self._socks = SocksUpstream(connections, self._tls)

    async def send(self, request: UpstreamRequest) -> UpstreamResponse:
        """The answer, as soon as its headers are there. Redirects are not followed."""
        if request.proxy_url.startswith("socks"):
            return await self._socks.send(request)
        target = self._targets.of(request.url, request.proxy_url)
        head = self._heads.of(request, target)
        pool = self._pools.get(target.origin) or self._new_pool(target.origin)
        answer = answer_to(request, pool.loop, pool.loop.time())
        connection, is_new = pool.take(), False
        if connection is None:
            connection, is_new = await self._another(pool, target.origin, answer, request)
        while not connection.ask(answer, head, request.body, head_only=request.method == "HEAD"):
            # Nothing was sent: an idle connection has ended unseen.
            connection.drop()
            if is_new:
                raise UpstreamError(f"{request.provider} broke off before it answered", was_sent=False)
            pool = self._pools.get(target.origin) or self._new_pool(target.origin)
            connection = pool.take()
            if connection is None:
                connection, is_new = await self._another(pool, target.origin, answer, request, again=True)
        await answer.opened(connection)
        return answer

    def prepared(self, request: UpstreamRequest) -> Prepared | None:
        """What requests that differ in `more` and the body alone have in common; None for one that only `send` sends.

        Raises UpstreamError for one that cannot be sent.
        """
        if request.proxy_url.startswith("socks"):
            return None
        target = self._targets.of(request.url, request.proxy_url)
        return Prepared(request=request, origin=target.origin, head=head_of(request, target, request.headers))

    def begin(
        self, prepared: Prepared, lines: bytes, body: bytes, began_at: float, on_news: Callable[[], None]
    ) -> Answer | None:
        """Sends a request on an idle connection; `on_news` is called when something of its answer is there.

        None, with nothing sent, where no idle connection is left. `lines` are the last of its head, the empty one
        included. The time for the whole request counts from `began_at`, of the loop's clock.
        """
        pool = self._pools.get(prepared.origin)
        if pool is None:
            return None
        answer = answer_to(prepared.request, pool.loop, began_at)
        while (connection := pool.take()) is not None:
            if connection.ask(answer, prepared.head + lines, body, head_only=False):
                answer.on_news = on_news
                connection.arm(answer.first_at)
                return answer
            connection.drop()  # It has ended unseen.
        return None

    async def close(self) -> None:
        """Closes all connections."""
        self._is_closed = True
        self._dialer.close()
        for pool in self._pools.values():
            pool.close(_CLOSING)
        for connection in tuple(self._connections):
            connection.fail(_CUT_OFF)
        if self._connections:
            self._emptied = asyncio.get_running_loop().create_future()
            await self._emptied
        await self._socks.close()

    def _new_pool(self, origin: Origin) -> Pool:
        def emptied(pool: Pool) -> None:
            if self._pools.get(origin) is pool:
                del self._pools[origin]

        pool = self._pools[origin] = Pool(asyncio.get_running_loop(), self._limit, emptied)
        return pool

    async def _another(
        self, pool: Pool, origin: Origin, answer: Answer, request: UpstreamRequest, *, again: bool = False
    ) -> tuple[Connection, bool]:
        """A connection, and whether it is new: a place to open one has come free, or one that others had."""
        if not pool.reserve():
            try:
                async with asyncio.timeout(answer.left_s):
                    connection = await pool.turn(again=again)
            except TimeoutError:
                raise answer.unanswered() from None
            if connection is not None:
                return connection, False
        try:
            return await self._dialled(pool, origin, answer, request), True
        except BaseException:
            pool.leave()
            raise

    async def _dialled(self, pool: Pool, origin: Origin, answer: Answer, request: UpstreamRequest) -> Connection:
        loop = pool.loop
        is_plain = origin.scheme == "http" and not origin.proxy_url.startswith("https")
        kind = BroughtConnection if is_plain and not isinstance(loop, asyncio.SelectorEventLoop) else Connection

        def new() -> Connection:
            return kind(loop, self._buffer, first=self._tls.remember, freed=pool.free, lost=lost)

        def lost(connection: Connection) -> None:
            if connection not in self._connections:
                return  # It was never used; who made it gives its place back.
            self._connections.discard(connection)
            pool.lose(connection)
            if self._emptied is not None and not self._connections and not self._emptied.done():
                self._emptied.set_result(None)

        left_s, connect_s = answer.left_s, request.timeouts.connect_s
        try:
            async with asyncio.timeout(min(left_s, connect_s)) as limit:
                connection = await self._dialer.dial(origin, new)
        except (OSError, UnicodeError) as exc:  # The latter for a name that no name service would take.
            if not limit.expired():
                raise UpstreamError(f"{request.provider} cannot be reached{_why(exc)}", was_sent=False) from exc
            if left_s < connect_s:
                raise answer.unanswered() from None
            raise UpstreamTimeoutError(
                f"{request.provider} could not be reached in time (connect_s)", was_sent=False
            ) from exc
        if self._is_closed:
            connection.drop()
            raise UpstreamError(_CLOSING, was_sent=False)
        if not connection.is_usable:
            raise UpstreamError(f"{request.provider} broke off before it answered", was_sent=False)
        self._connections.add(connection)
        return connection


def _why(error: Exception) -> str:
    """What an operator can mend; addresses stay here, as the client is told it too."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return ": its certificate is not trusted (BALANCER_UPSTREAM_CA_FILE)"
    return f": {error}" if isinstance(error, ProxyRefusedError) else ""
