"""An answer as its reader sees it: what has come and was not read yet, and who waits for more.

It outlives its connection: that goes back to its pool as soon as the answer's last byte has come.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from time import monotonic
from typing import TYPE_CHECKING

import msgspec

from balancer.dialects import Headers
from balancer.errors import UpstreamError, UpstreamTimeoutError
from balancer.gateway.messages import Take, UpstreamRequest

if TYPE_CHECKING:
    from balancer.gateway.upstream.connection import Connection

_HELD_BYTES = 256 * 1024
"""What waits unread beyond this holds the upstream back."""


class Answer(msgspec.Struct, eq=False):
    """An UpstreamResponse; its connection fills it. `answer_to` makes it."""

    _request: UpstreamRequest
    _loop: asyncio.AbstractEventLoop
    _deadline: float
    first_at: float
    """When its headers must be there, of the loop's clock."""
    status: int = 0
    headers: Headers = ()
    length: int | None = None
    on_news: Callable[[], None] | None = None
    """Called, in place of a reader who waits, when something has come, or no more will come."""
    is_over: bool = False
    """True when all of it has come."""
    _connection: Connection | None = None
    _chunks: list[bytes] = []
    _held: int = 0
    _has_begun: bool = False
    _heard_at: float = 0.0
    _error: UpstreamError | None = None
    _take: Take | None = None
    _waiter: asyncio.Future[bytes] | None = None

    # -- who reads -----------------------------------------------------------------------------------------------------

    @property
    def left_s(self) -> float:
        """Seconds until its headers must be there."""
        return self.first_at - self._loop.time()

    @property
    def is_awaited(self) -> bool:
        """True while somebody waits for what comes next."""
        return self._waiter is not None or self.on_news is not None

    async def opened(self, connection: Connection) -> None:
        """Waits for the headers. Raises UpstreamError, and leaves no connection behind when it is cancelled."""
        connection.arm(self.first_at)
        if not self.status and self._error is None:
            await self._more()
        if self._error is not None and not self.status:
            raise self._error

    def expect_more(self) -> None:
        """Limits the wait for the rest of the body."""
        self._arm()

    def watch(self, take: Take) -> None:
        """Gives the chunks to `take` as they come; of the first that is not taken, and is held, there is news."""
        self._take = take
        if self._connection is not None:
            self._arm()

    def leave(self) -> None:
        """Tells of nothing more that comes: a reader will ask."""
        self.on_news = self._take = None

    def begun(self) -> None:
        """Hands over to a reader. Raises UpstreamError where the answer has not even headers."""
        self.leave()
        if self._error is not None and not self.status:
            raise self._error

    @property
    def is_at_end(self) -> bool:
        """True when all of it has come and was read."""
        return self.is_over and not self._chunks and self._error is None

    @property
    def has_failed(self) -> bool:
        """True when it will not come to its end."""
        return self._error is not None

    @property
    def held_bytes(self) -> int:
        """How much of its body has come and was not read."""
        return self._held

    @property
    def beginning(self) -> bytes:
        """The first of what has come of its body and was not read."""
        return self._chunks[0] if self._chunks else b""

    def held(self) -> bytes:
        """All of it that has come and was not read; it can still be read."""
        chunks = self._chunks
        if len(chunks) > 1:
            chunks[:] = [b"".join(chunks)]
        return chunks[0] if chunks else b""

    def skip(self) -> None:
        """Counts what is held as read."""
        if self._chunks:
            self._taken()

    def whole(self) -> bytes | None:
        """The body, if all of it has come and nothing was read yet; it can still be read."""
        chunks = self._chunks
        if not self.is_over or not chunks:
            return None
        if len(chunks) > 1:
            chunks[:] = [b"".join(chunks)]
        return chunks[0] if self.length is None or len(chunks[0]) == self.length else None

    async def read(self) -> bytes:
        """The next bytes as they came, b"" at the end."""
        while not self._chunks:
            if self._error is not None:
                raise self._error
            if self.is_over:
                return b""
            self._arm()
            await self._more()
        return self._taken()

    async def pump(self, take: Take) -> bytes:
        """Gives the chunks to `take` as they come; the first that is not taken, b"" at the end."""
        if self._chunks:
            chunk = self._taken()
            if not take(chunk):
                return chunk
        if self._error is None and not self.is_over:
            self._take = take
            self._arm()
            if chunk := await self._more():
                return chunk
        if self._error is not None:
            raise self._error
        return b""

    async def close(self) -> None:
        """Ends the connection unless the answer came to its end."""
        self.abandon("was closed before its end")

    def abandon(self, reason: str) -> None:
        """Ends the connection, if there still is one; whoever reads on is told so."""
        connection, self._connection = self._connection, None
        if connection is not None:
            self._error = UpstreamError(f"the answer of {self._request.provider} {reason}")
            connection.drop()
            self._wake()

    def _taken(self) -> bytes:
        chunks = self._chunks
        chunk = chunks[0] if len(chunks) == 1 else b"".join(chunks)
        chunks.clear()
        if self._held > _HELD_BYTES and self._connection is not None:
            self._connection.resume()
        self._held = 0
        return chunk

    def _arm(self) -> None:
        """Limits the wait for what comes next."""
        connection = self._connection
        assert connection is not None, "an answer without a connection is over, or has failed"
        timeouts = self._request.timeouts
        limit_s = timeouts.idle_s if self._has_begun else timeouts.first_byte_s
        connection.arm(min(self._loop.time() + limit_s, self._deadline))

    async def _more(self) -> bytes:
        """Waits until something has come; with a `take`, the chunk that it refused."""
        waiter: asyncio.Future[bytes] = self._loop.create_future()
        self._waiter = waiter
        try:
            return await waiter
        except BaseException:
            self.abandon("was cancelled")
            raise
        finally:
            self._waiter = self._take = None

    # -- the connection ------------------------------------------------------------------------------------------------

    def attach(self, connection: Connection) -> None:
        """The connection that was sent the request."""
        self._connection = connection

    def begin(self, status: int, headers: Headers, length: int | None) -> None:
        """Its headers have come."""
        self.status, self.headers, self.length = status, headers, length
        self._wake()

    def complete(self, headers: Headers, body: bytes) -> None:
        """All of it has come at once: with status 200, and with a body unless that is empty."""
        self.status, self.headers, self.length = 200, headers, len(body)
        if body:
            self._chunks.append(body)
            self._held = self.length
        self.is_over = True
        self._connection = None

    def tell(self) -> None:
        """Lets whoever waits know what has come."""
        if self.on_news is not None:
            self.on_news()
        else:
            self._wake()

    @property
    def due_at(self) -> float:
        """When what comes next must be there, since something was taken last."""
        return min(self._heard_at + self._request.timeouts.idle_s, self._deadline)

    def receive(self, chunk: bytes, framed: bytes = b"") -> None:
        """A part of its body has come; `framed`: the same with its framing, where that is plain."""
        take = self._take
        if take is None:
            self._has_begun = True
            self._chunks.append(chunk)
            self._held += len(chunk)
            if self._held > _HELD_BYTES and self._connection is not None:
                self._connection.pause()
            self._wake()
            return
        waiter = self._waiter
        try:
            if take(chunk, framed):
                if self._has_begun:
                    self._heard_at = monotonic()  # The timer looks at it when it goes off.
                else:
                    self._has_begun = True
                    if self._connection is not None:
                        self._arm()
                return
        except Exception as exc:  # It is raised where `pump` is awaited, if it is.
            self._take = None
            if waiter is None:
                raise
            if not waiter.done():
                waiter.set_exception(exc)
            return
        self._has_begun = True
        self._take = None
        if waiter is not None:
            self._wake(chunk)
            return
        self._chunks.append(chunk)
        self._held += len(chunk)
        if self.on_news is not None:
            self.on_news()

    def end(self) -> None:
        """All of it has come; the connection is somebody else's from now on."""
        self.is_over = True
        self._connection = None
        self.tell()

    def fail(self, what: str = "") -> None:
        """It will not come to its end; `what` is wrong with it, unless it just broke off."""
        self._connection = None
        what = what or ("broke off its answer" if self.status else "broke off before it answered")
        self._error = UpstreamError(f"{self._request.provider} {what}")
        self._wake()

    def late(self) -> None:
        """Nothing came before the limit."""
        self._connection = None
        if self.status:
            limit = "idle_s" if self._has_begun else "first_byte_s"
            if self._loop.time() >= self._deadline:
                limit = "timeout"
            self._error = UpstreamTimeoutError(f"{self._request.provider} was silent for too long ({limit})")
        else:
            self._error = self.unanswered()
        self._wake()

    def unanswered(self) -> UpstreamTimeoutError:
        """The error when its headers are not there in time."""
        limit = "headers_s" if self.first_at < self._deadline else "timeout"
        return UpstreamTimeoutError(f"{self._request.provider} did not answer in time ({limit})")

    def _wake(self, chunk: bytes = b"") -> None:
        if self.on_news is not None:
            if self._error is not None:
                self.on_news()
            return
        self._take = None
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(chunk)


def answer_to(request: UpstreamRequest, loop: asyncio.AbstractEventLoop, sent_at: float) -> Answer:
    """The answer to a request, of which nothing has come yet; its limits count from that time of the loop's."""
    timeout_s, headers_s = request.timeout_s, request.timeouts.headers_s
    return Answer(request, loop, sent_at + timeout_s, sent_at + (headers_s if headers_s < timeout_s else timeout_s))
