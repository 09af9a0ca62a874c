"""The HTTP front, on aiohttp: its requests and responses as ours."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, Mapping

from aiohttp import web

from balancer.dialects import Dialect, Headers
from balancer.domain import Outcome
from balancer.errors import BalancerError, BodyTooLargeError, ExpectationError, RequestError
from balancer.gateway.front_server import Answer, is_spoken
from balancer.gateway.lane import SLOW_S, Handle
from balancer.gateway.lane_stream import address_of
from balancer.gateway.messages import ClientGoneError, ClientRequest
from balancer.gateway.request_ids import request_id_of
from balancer.gateway.telling import send_error
from balancer.gateway.witness import Watch

_AUTHORITY = re.compile(r"^https?://[^/]*", re.IGNORECASE)
_HOST = re.compile(r"(?:[A-Za-z0-9!$&'()*+,;=._~%-]*|\[[0-9A-Fa-f:.]+\])(?::[0-9]*)?")
"""RFC 3986 §3.2.2 and 3.2.3, a `,` included: a list of hosts is seen by two hosts being there."""
_CLOSE = ("Connection", "close")


class AiohttpStream:
    """The way back through an aiohttp response."""

    def __init__(self, request: web.BaseRequest, extra: Headers) -> None:
        self._request = request
        self._extra = extra
        self._ends_at: float | None = None
        self.response: web.StreamResponse | None = None
        self.body_bytes = 0

    @property
    def is_started(self) -> bool:
        """True once the answer's headers are on their way."""
        return self.response is not None

    @property
    def client(self) -> str:
        """The client's address, empty when it is not known."""
        return address_of(self._request.transport)

    @property
    def status(self) -> int:
        """The answer's status, 0 before it is started."""
        return self.response.status if self.response is not None else 0

    def give_until(self, time: float) -> None:
        """Breaks the connection where something written waits beyond a time of the loop's."""
        self._ends_at = time

    async def start(self, status: int, headers: Headers, length: int | None) -> None:
        """Sends status and headers, framed by length or in chunks."""
        response = web.StreamResponse(status=status)
        for name, value in (*headers, *self._extra):
            response.headers.add(name, value)
        if length is not None:
            response.content_length = length
        elif status not in (204, 304):
            if self._request.version >= (1, 1):
                response.enable_chunked_encoding()
            else:
                # Whatever the client asked for: only the connection's end can tell the body's.
                response.force_close()
        if _CLOSE in self._extra:
            # RFC 9112 §9.6: who says so serves nothing more on the connection; the header alone closes nothing here.
            response.force_close()
        self.response = response
        try:
            await response.prepare(self._request)
        except (ConnectionError, RuntimeError) as exc:
            raise ClientGoneError from exc

    async def write(self, chunk: bytes) -> None:
        """Sends a part of the body, nothing to who asked by HEAD; waits while the client's buffer is full."""
        assert self.response is not None, "started first"
        if self._request.method == "HEAD":
            return
        await self._within_time(self.response.write(chunk))
        self.body_bytes += len(chunk)

    def write_now(self, chunk: bytes, framed: bytes = b"", /) -> bool:
        """False: aiohttp writes in coroutines only."""
        return False

    async def end(self, last: bytes = b"", /) -> None:
        """Ends the body properly, behind a last part of it."""
        assert self.response is not None, "started first"
        if last:
            await self.write(last)
        await self._within_time(self.response.write_eof())

    async def send(self, status: int, headers: Headers, body: bytes) -> None:
        """Sends a whole answer."""
        await self.start(status, headers, len(body))
        await self.write(body)
        await self.end()

    async def _within_time(self, written: Awaitable[None]) -> None:
        try:
            async with asyncio.timeout_at(self._ends_at):
                await written
        except TimeoutError:
            self.abort()
            raise ClientGoneError from None
        except ConnectionError as exc:
            raise ClientGoneError from exc

    def abort(self) -> None:
        """Breaks the connection."""
        if self._request.transport is not None:
            self._request.transport.abort()


class Front:
    """Turns aiohttp requests into ours, and lets a handler answer them."""

    def __init__(
        self,
        handle: Handle,
        dialect_of: Callable[[str], Dialect],
        max_body_bytes: int,
        is_draining: Callable[[], bool],
        own: Mapping[str, Answer],
        refused: Callable[[ClientRequest, BalancerError, float], str] = lambda request, error, began: "",
        watch: Watch | None = None,
    ) -> None:
        """`own`: what answers by itself to GET, by path.

        `refused` counts what the handler never hears of, and gives its scenario; `watch` tells of it.
        """
        self._handle = handle
        self._dialect_of = dialect_of
        self._max_body_bytes = max_body_bytes
        self._is_draining = is_draining
        self._own = own
        self._refused = refused
        self._watch = watch

    async def answer(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answers one request. The handler is cancelled when the client goes away."""
        began = time.monotonic()
        path, _, query = request.raw_path.partition("?")
        if not path.startswith("/"):
            # Absolute form (RFC 9112 §3.2.2): a client that takes us for its proxy still means us.
            path = _AUTHORITY.sub("", path)
        fault = _fault(request)
        own = self._own.get(path) if fault is None else None
        if own is not None and request.method in ("GET", "HEAD"):
            return await own(request)
        headers = tuple(
            (name.decode("latin-1"), value.decode("utf-8", "surrogateescape")) for name, value in request.raw_headers
        )
        request_id = request_id_of(request.headers.get("x-request-id", ""))
        extra: Headers = (("x-request-id", request_id),)
        if self._is_draining():
            extra = (*extra, _CLOSE)
        stream = AiohttpStream(request, extra)
        message = ClientRequest(
            method=request.method, path=path, query=query, headers=headers, body=b"", request_id=request_id
        )
        try:
            if fault is not None:
                raise fault
            body = await self._body(request)
        except BalancerError as exc:
            # The rest of the body is still coming: the connection cannot be used again.
            stream = AiohttpStream(request, (("x-request-id", request_id), _CLOSE))
            if self._watch is not None:
                message.witness = self._watch.begin(message, stream.client, began)
            await send_error(self._dialect_of(path), exc, message, stream)
            scenario = self._refused(message, exc, began)
            if message.witness is not None:
                message.witness.ended(scenario, "", Outcome.REJECTED, stream)
        except ClientGoneError:
            stream.abort()
        else:
            message = ClientRequest(
                method=request.method, path=path, query=query, headers=headers, body=body, request_id=request_id
            )
            await self._handle(message, stream)
        if stream.response is None:
            # Nobody is there to be answered; aiohttp wants an answer all the same.
            return web.Response(status=499)
        return stream.response

    async def _body(self, request: web.BaseRequest) -> bytes:
        length = request.content_length
        too_large = f"the body is longer than {self._max_body_bytes} bytes (BALANCER_MAX_BODY_BYTES)"
        if length is not None and length > self._max_body_bytes:
            raise BodyTooLargeError(too_large)
        chunks, held = [], 0
        expectations = request.headers.getall("Expect", []) if request.version >= (1, 1) else []
        if expectations and [value.lower() for value in expectations] != ["100-continue"]:
            raise ExpectationError("of expectations only 100-continue is met")
        try:
            if expectations:
                await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                request.writer.output_size = 0  # The answer has not begun.
            while chunk := await _part(request):
                chunks.append(chunk)
                held += len(chunk)
                if held > self._max_body_bytes:
                    raise BodyTooLargeError(too_large)
        except (web.RequestPayloadError, ConnectionError) as exc:
            raise RequestError("the request's body broke off") from exc
        return b"".join(chunks)


async def _part(request: web.BaseRequest) -> bytes:
    """The next part of a body, b"" at its end. Raises ClientGoneError if none comes for as long as the lane waits."""
    try:
        async with asyncio.timeout(SLOW_S):
            return await request.content.readany()
    except TimeoutError as exc:
        raise ClientGoneError from exc


def _fault(request: web.BaseRequest) -> RequestError | None:
    """What is wrong with a head that aiohttp lets pass, and that another server on the way may read differently."""
    if not is_spoken(request):
        return RequestError("HTTP/1.1 and HTTP/1.0 are spoken here")
    codings = request.headers.getall("Transfer-Encoding", [])
    # RFC 9112 §6.1: in HTTP/1.0 the framing is faulty. What is not the plain word is framed by what others take it for.
    if codings and (request.version < (1, 1) or [coding.lower() for coding in codings] != ["chunked"]):
        return RequestError("of transfer codings only chunked is read, once, and in HTTP/1.1")
    if not _HOST.fullmatch(request.headers.get("Host", "")):
        return RequestError("the Host header is no host (RFC 9112 §3.2)")
    return None
