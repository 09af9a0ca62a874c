"""Requests, answers and the two sides they travel between, free of any HTTP library."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import msgspec

from balancer.dialects import Headers
from balancer.domain import Timeouts
from balancer.gateway.witness import Answered, Witness


class Take(Protocol):
    """Takes a part of a body at once, in the callback that received it."""

    def __call__(self, chunk: bytes, framed: bytes = b"", /) -> bool:
        """False, with nothing done, where it cannot.

        `framed`: the same in chunks of HTTP, if it came so, and spelt so plainly that all read it alike.
        """


class ClientGoneError(Exception):
    """The client is no longer there: an ordinary ending, nobody is left to be told."""


class ClientRequest:
    """A request as it came: its target in parts, undecoded, its headers in order, its whole body."""

    __slots__ = ("_first", "body", "headers", "method", "path", "query", "request_id", "witness")

    def __init__(
        self,
        *,
        method: str,
        path: str,
        query: str,
        headers: Headers,
        body: bytes,
        request_id: str,
        first: dict[str, str] | None = None,
    ) -> None:
        """`first`: the first value of each header by its name in lower case, where the caller knows them already."""
        self.method = method
        self.path = path
        self.query = query
        self.headers = headers
        self.body = body
        self.request_id = request_id
        self._first = first
        self.witness: Witness | None = None
        """Who tells of it; None where nobody does."""

    @property
    def facts(self) -> dict[str, str]:
        """What every line of the log about it says."""
        trace_id = self.witness.trace_id if self.witness is not None else ""
        return {"request": self.request_id, "trace": trace_id} if trace_id else {"request": self.request_id}

    def header(self, name: str) -> str:
        """The first value of a header (its name in lower case), empty when it is absent."""
        return self.first.get(name, "")

    @property
    def first(self) -> Mapping[str, str]:
        """The first value of each header, by its name in lower case."""
        if self._first is None:
            self._first = {key.lower(): value for key, value in reversed(self.headers)}
        return self._first

    def joined(self, name: str) -> str:
        """All values of a header as one list (RFC 9110 §5.3), empty when it is absent."""
        return ", ".join(value for key, value in self.headers if key.lower() == name)


class ClientStream(Protocol):
    """The way back to the client. Every method may raise ClientGoneError."""

    @property
    def is_started(self) -> bool:
        """True once the answer's headers are on their way."""

    def give_until(self, time: float) -> None:
        """Breaks the connection, with ClientGoneError, where something written waits beyond a time of the loop's."""

    async def start(self, status: int, headers: Headers, length: int | None) -> None:
        """Sends status and headers; `length` is the body's, None when it is not known yet."""

    async def write(self, chunk: bytes) -> None:
        """Sends a part of the body, waiting while the client is slow."""

    def write_now(self, chunk: bytes, framed: bytes = b"", /) -> bool:
        """Sends a part of the body at once; False, with nothing sent, where `write` would wait, or fail.

        `framed`: the same as plain chunks of HTTP, which may be sent instead where the body goes in chunks.
        """

    async def end(self, last: bytes = b"", /) -> None:
        """Ends the body properly, behind a last part of it."""

    async def send(self, status: int, headers: Headers, body: bytes) -> None:
        """Sends an answer that is there as a whole: `start`, `write` and `end` in one."""

    def abort(self) -> None:
        """Breaks the connection, so that nobody takes what was sent for the whole."""


class WayBack(ClientStream, Answered, Protocol):
    """The same, as whoever tells of the request looks at it."""

    @property
    def client(self) -> str:
        """The client's address, empty when it is not known (any more)."""


class UpstreamRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What is sent upstream, and how long its parts may take. `proxy_url` is empty for a direct connection.

    `headers` may be the same object for many requests; those of this one alone are `more`.
    """

    provider: str
    method: str
    url: str
    headers: Headers
    more: Headers = ()
    body: bytes
    proxy_url: str
    timeouts: Timeouts
    timeout_s: float


class UpstreamResponse(Protocol):
    """An answer whose headers have come."""

    @property
    def status(self) -> int:
        """Its status."""

    @property
    def headers(self) -> Headers:
        """Its headers in order."""

    @property
    def length(self) -> int | None:
        """Its body's length if it says so."""

    @property
    def is_at_end(self) -> bool:
        """True when it is known already that nothing more comes: `read` has b"" at once."""

    def whole(self) -> bytes | None:
        """The body, if all of it has come and nothing was read yet; it can still be read."""

    async def read(self) -> bytes:
        """The next bytes as they came, b"" at the end. Raises UpstreamError when it breaks off or takes too long."""

    async def pump(self, take: Take) -> bytes:
        """Gives the chunks to `take` as they come, without a turn of the loop between; the first that is not taken.

        b"" at the end. Raises UpstreamError as `read` does.
        """

    async def close(self) -> None:
        """Gives the connection back if the answer was read to its end, else ends it."""


class BegunResponse(UpstreamResponse, Protocol):
    """An answer that was watched as it came, and is now read."""

    def begun(self) -> None:
        """Hands over to who reads. Raises UpstreamError where the answer has not even headers."""


class Upstream(Protocol):
    """Sends requests to upstreams."""

    async def send(self, request: UpstreamRequest) -> UpstreamResponse:
        """The answer, as soon as its headers are there. Raises UpstreamError."""

    async def close(self) -> None:
        """Closes all connections."""
