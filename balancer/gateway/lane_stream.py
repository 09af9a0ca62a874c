"""The way back of the lane: an answer's head and bytes, written to the client's transport at once."""

from __future__ import annotations

import asyncio
import time
from email.utils import formatdate
from http import HTTPStatus
from typing import Protocol

from balancer.dialects import Headers
from balancer.gateway.messages import ClientGoneError

_REASONS = {status.value: status.phrase for status in HTTPStatus}
# RFC 9110 §6.4.1: answers without a body.
_BODILESS = frozenset([*range(100, 200), 204, 304])
# Framing is ours to say, and what serves here is nobody's business.
_OURS = frozenset(["content-length", "transfer-encoding", "server"])
_LAST_BYTES = 32 * 1024
"""So much fits into a client's transport that holds nothing, along with a head."""
# All but these may stand in a header (RFC 9110 §5.5).
CONTROLS = bytes([*range(9), *range(10, 32), 127])

_dated = 0
_date = ""


class Line(Protocol):
    """The client's connection, as an answer needs it."""

    transport: asyncio.Transport | None
    """None once the connection is lost."""
    is_held_up: bool
    """True while the client's buffer is full."""

    async def drained(self) -> None:
        """Returns when the client's buffer has room, or the connection is lost."""


class LaneStream:
    """One answer on a connection that stays usable if the answer was whole."""

    __slots__ = (
        "_ends_at",
        "_head",
        "_is_chunked",
        "_is_last",
        "_is_open",
        "_left",
        "_line",
        "_loop",
        "_request_id",
        "body_bytes",
        "is_ended",
        "is_started",
        "status",
    )

    def __init__(self, line: Line, loop: asyncio.AbstractEventLoop, request_id: str, *, is_last: bool) -> None:
        """`is_last`: the connection is to be closed behind this answer, and the client told so."""
        self._line = line
        self._loop = loop
        self._request_id = request_id
        self._is_last = is_last
        self._ends_at: float | None = None
        self._head = b""
        self._is_chunked = False
        self._left = 0
        self._is_open = False  # Started, and not ended: what is written then is this answer's.
        self.is_started = False
        self.is_ended = False
        self.status = 0
        self.body_bytes = 0

    @property
    def client(self) -> str:
        """The client's address, empty when it has left."""
        return address_of(self._line.transport)

    @property
    def is_last(self) -> bool:
        """True if no other answer may follow on the connection."""
        return self._is_last or not self.is_ended

    def give_until(self, time: float) -> None:
        """Breaks the connection where something written waits beyond a time of the loop's."""
        self._ends_at = time

    async def start(self, status: int, headers: Headers, length: int | None) -> None:
        """Keeps status and headers for the first part of the body; the loop's next turn sends them without one."""
        if self.is_started:
            raise RuntimeError("an answer starts once")
        self._transport()
        has_body = status not in _BODILESS
        self._is_chunked = has_body and length is None
        self._left = length or 0 if has_body else 0
        self._head = answer_head(status, headers, length, self._request_id, is_last=self._is_last)
        self.is_started = self._is_open = True
        self.status = status
        if self._is_chunked:
            self._loop.call_soon(self._flush)

    def begin(self, head: bytes) -> None:
        """Keeps a whole head for the first part of a body in chunks, which follows at once."""
        self._is_chunked = self.is_started = self._is_open = True
        self._head = head
        self.status = 200
        self._loop.call_soon(self._flush)

    async def write(self, chunk: bytes) -> None:
        """Sends a part of the body; waits while the client's buffer is full."""
        while not self.write_now(chunk):
            self._transport()
            await self._drained()

    def write_now(self, chunk: bytes, framed: bytes = b"", /) -> bool:
        """Sends a part of the body at once; False where the client's buffer is full, or the client gone.

        `framed` is the part in chunks already, and sent as it is if this body goes in chunks.
        """
        if not self._is_open:
            raise RuntimeError("a part of a body is written between the answer's start and its end")
        line = self._line
        transport = line.transport
        if line.is_held_up or transport is None or transport.is_closing():
            return False
        if self._is_chunked:
            self.body_bytes += len(chunk)
            if framed and not self._head:
                transport.write(framed)
            elif chunk:
                transport.write(b"%b%x\r\n%b\r\n" % (self._head, len(chunk), chunk))
                self._head = b""
            return True
        # Never more than was announced: it would be taken for the next answer.
        if len(chunk) > self._left:
            chunk = chunk[: self._left]
        if chunk:
            self._left -= len(chunk)
            self.body_bytes += len(chunk)
            transport.write(self._head + chunk if self._head else chunk)
            self._head = b""
        return True

    async def end(self, last: bytes = b"", /) -> None:
        """Ends the body, behind a last part of it; one that is shorter than announced ends the connection with it."""
        if last and (not self._is_chunked or self._line.is_held_up):
            await self.write(last)
            last = b""
        transport = self._transport()
        if not self._is_open:
            raise RuntimeError("an answer ends once, after its start")
        self._is_open = False
        if self._left:
            self.abort()
            return
        data = self._head
        self._head = b""
        if self._is_chunked:
            data += b"%x\r\n%b\r\n0\r\n\r\n" % (len(last), last) if last else b"0\r\n\r\n"
            self.body_bytes += len(last)
        if data:
            transport.write(data)
        self.is_ended = True
        if self._line.is_held_up:
            await self._drained()

    def end_now(self, last: bytes = b"", /) -> bool:
        """Ends a body in chunks at once; False, with nothing sent, where the client might have to be waited for."""
        line = self._line
        transport = line.transport
        if len(last) > _LAST_BYTES or transport is None or transport.is_closing() or transport.get_write_buffer_size():
            return False
        self._is_open = False
        self.body_bytes += len(last)
        head, self._head = self._head, b""
        transport.write(b"%b%x\r\n%b\r\n0\r\n\r\n" % (head, len(last), last) if last else head + b"0\r\n\r\n")
        self.is_ended = True
        return True

    async def send(self, status: int, headers: Headers, body: bytes) -> None:
        """Sends a whole answer, its head and its body in one write."""
        await self.start(status, headers, len(body))
        if not self.write_now(body):
            await self.write(body)
        await self.end()

    def abort(self) -> None:
        """Breaks the connection; behind the answer's end it is another answer's."""
        if not self.is_ended and self._line.transport is not None:
            self._line.transport.abort()

    async def _drained(self) -> None:
        try:
            async with asyncio.timeout_at(self._ends_at):
                await self._line.drained()
        except TimeoutError:
            if self._line.transport is not None:
                self._line.transport.abort()
            raise ClientGoneError from None

    def _flush(self) -> None:
        transport = self._line.transport
        if self._head and not self.is_ended and transport is not None and not transport.is_closing():
            transport.write(self._head)
            self._head = b""

    def _transport(self) -> asyncio.Transport:
        transport = self._line.transport
        if transport is None or transport.is_closing():
            raise ClientGoneError
        return transport


def address_of(transport: asyncio.BaseTransport | None) -> str:
    """Who is at the other end of a connection, empty where that has no address, or is gone."""
    peer = transport.get_extra_info("peername") if transport is not None else None
    return str(peer[0]) if isinstance(peer, tuple) and peer else ""


def answer_head(status: int, headers: Headers, length: int | None, request_id: str, *, is_last: bool) -> bytes:
    """An answer's head; the body is framed by its length, or in chunks when that is not known.

    Raises ValueError for a control character, which could begin another header, or another answer.
    """
    names = {name.lower() for name, _ in headers}
    if not names.isdisjoint(_OURS):
        headers = tuple((name, value) for name, value in headers if name.lower() not in _OURS)
    lines = [f"HTTP/1.1 {status} {_REASONS.get(status, '')}"]
    lines += [f"{name}: {value}" for name, value in headers]
    lines.append(f"x-request-id: {request_id}")
    if status not in _BODILESS:
        lines.append("Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}")
        if length != 0 and "content-type" not in names:
            lines.append("Content-Type: application/octet-stream")
    if "date" not in names:
        lines.append(f"Date: {date()}")
    if is_last and "connection" not in names:
        lines.append("Connection: close")
    lines.append("\r\n")
    head = "\r\n".join(lines).encode("utf-8", "ignore")
    # Two for each line end that we wrote.
    if len(head) - len(head.translate(None, CONTROLS)) != 2 * len(lines):
        raise ValueError("a control character in a header of the answer")
    return head


def date() -> str:
    """The date of this second, as headers give it (RFC 9110 §5.6.7)."""
    global _dated, _date
    now = int(time.time())
    if now != _dated:
        _dated, _date = now, formatdate(now, usegmt=True)
    return _date
