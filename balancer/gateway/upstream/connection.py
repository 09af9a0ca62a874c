"""One connection to an upstream: a request's bytes out, an answer's bytes in, one answer at a time.

llhttp (httptools) reads the answers, and refuses what two readers could read differently: bare line ends, folded
headers, a length beside chunks or a second length. What it leaves to its caller is checked here: versions, codings, how
long a head may be, and bytes that belong to no answer.
"""

from __future__ import annotations

import asyncio
import math
import select
import ssl
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import httptools

from balancer.gateway.upstream.chunks import data_of
from balancer.gateway.upstream.whole import MOST_HEADERS, read_whole
from balancer.polling import DirectSocket, direct_socket

if TYPE_CHECKING:
    from balancer.gateway.upstream.answer import Answer

_HEAD_BYTES = 64 * 1024
"""The longest head; as much may stand between two parts of a body in chunks, and behind the last."""
_PART_BYTES = 256 * 1024
_LARGE_BYTES = 2**20
"""A body beyond this goes out in parts, so that one large prompt neither doubles memory nor holds up the loop."""


class Connection(asyncio.BufferedProtocol):
    """A connection. It tells `first` when its first answer ends, `freed` when it can be asked, `lost` when it is gone.

    `buffer` is what the loop reads into. All connections of a loop may share one: what was read is copied out of it
    before the loop reads again. A new buffer for each read, which is what asyncio.Protocol does, costs as much CPU as
    all of the rest.
    """

    __slots__ = (
        "_answer",
        "_buffer",
        "_direct",
        "_due_at",
        "_fault",
        "_fed",
        "_first",
        "_freed",
        "_has_head",
        "_head_only",
        "_headers",
        "_is_at_chunk",
        "_is_between_chunks",
        "_is_broken",
        "_is_chunked",
        "_is_complete",
        "_is_fresh",
        "_is_held_back",
        "_is_paused",
        "_keeps_alive",
        "_length",
        "_loop",
        "_lost",
        "_parser",
        "_parts",
        "_poll",
        "_rest",
        "_timer",
        "_timer_at",
        "idle_since",
        "transport",
    )

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        buffer: memoryview,
        *,
        first: Callable[[Connection], None],
        freed: Callable[[Connection], None],
        lost: Callable[[Connection], None],
    ) -> None:
        self.transport: asyncio.Transport | None = None
        self.idle_since = math.inf
        self._loop = loop
        self._buffer = buffer
        self._first: Callable[[Connection], None] | None = first
        self._freed = freed
        self._lost = lost
        self._answer: Answer | None = None
        self._is_broken = False
        self._rest: memoryview | None = None
        self._is_paused = False
        self._is_held_back = False
        self._poll: select.poll | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = self._due_at = math.inf
        self._parser = httptools.HttpResponseParser(self)
        self._direct: DirectSocket | None = None
        self._headers: list[tuple[str, str]] = []
        self._parts: list[bytes] = []
        self._expect(head_only=False)

    def _expect(self, *, head_only: bool) -> None:
        """An answer is to come; `_is_fresh` until something of it has been read."""
        self._head_only = head_only
        self._is_fresh = True
        self._fed = 0
        self._has_head = self._is_complete = self._is_chunked = self._keeps_alive = False
        self._is_at_chunk = self._is_between_chunks = False
        self._length: int | None = None
        self._fault = ""

    # -- life ----------------------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """It can be written to; again when TLS was started on it."""
        self._leave_to_loop()
        self.transport = cast("asyncio.Transport", transport)  # uvloop's is one by its methods only.
        self._direct = direct_socket(self.transport, self.data_received)

    @property
    def is_usable(self) -> bool:
        """True as long as nothing has ended it, as far as the loop has seen."""
        return not self._is_broken and self.transport is not None and not self.transport.is_closing()

    def fail(self, what: str) -> None:
        """Ends it, and the answer that is under way, with which `what` is wrong."""
        answer, self._answer = self._answer, None
        if answer is not None:
            answer.fail(what)
        self.drop()

    def drop(self) -> None:
        """Ends it; nobody waits for an answer on it any more."""
        self._is_broken = True
        self._leave_to_loop()
        self._answer = self._rest = None
        if self.transport is not None:
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """It is gone."""
        self._is_broken = True
        self._leave_to_loop()
        self._rest = None
        if self._timer is not None:
            self._timer.cancel()
        answer, self._answer = self._answer, None
        if answer is not None:
            answer.fail()
        self._lost(self)
        self.transport = None
        del self._parser  # It holds our methods.

    # -- time ----------------------------------------------------------------------------------------------------------

    def arm(self, at: float) -> None:
        """Ends what is waited for at that time of the loop's, unless it is armed anew before.

        One timer serves all waits. It goes off at the earliest of their ends, and looks whether that still counts.
        """
        self._due_at = at
        if at < self._timer_at:
            if self._timer is not None:
                self._timer.cancel()
            self._timer_at = at
            self._timer = self._loop.call_at(at, self._on_timer)

    def _on_timer(self) -> None:
        self._timer, self._timer_at = None, math.inf
        answer = self._answer
        due_at = self._due_at if answer is None else max(self._due_at, answer.due_at)
        if self._loop.time() < due_at:
            self.arm(due_at)
            return
        if answer is None:
            if self.idle_since != math.inf:
                self.drop()
        elif answer.is_awaited:
            self._answer = None
            answer.late()
            self.drop()

    # -- requests ------------------------------------------------------------------------------------------------------

    def ask(self, answer: Answer, head: bytes, body: bytes, *, head_only: bool) -> bool:
        """Sends a request, whose answer is filled; False when nothing of it has been sent, nor can be."""
        transport = self.transport
        if transport is None or self._is_broken or (self.idle_since != math.inf and self._has_news(transport)):
            return False
        self.idle_since = math.inf
        self._answer = answer
        if not self._is_fresh or head_only != self._head_only:
            self._expect(head_only=head_only)
        if len(body) <= _LARGE_BYTES:
            if self._direct is None or not self._direct.write(head, body):
                transport.write(head + body)
        else:
            self._rest = memoryview(body)
            transport.write(head)
        if transport.is_closing():
            # asyncio hands what is written to the kernel at once, and the kernel has refused it.
            self._answer = self._rest = None
            return False
        answer.attach(self)
        if self._rest is not None and not self._is_paused:
            self.resume_writing()
        return True

    def _has_news(self, transport: asyncio.Transport) -> bool:
        """True when something has come that the loop has not seen yet: its end, or a second answer.

        Half a microsecond, for a request less that goes out on a connection that has ended, and no answer less that is
        given to somebody else.
        """
        poll = self._poll
        if poll is None:
            poll = self._poll = select.poll()
            poll.register(transport.get_extra_info("socket").fileno(), select.POLLIN)
        return bool(poll.poll(0))

    def pause_writing(self) -> None:
        """The upstream takes no more for now."""
        self._is_paused = True

    def resume_writing(self) -> None:
        """The rest of the request goes on."""
        self._is_paused = False
        while (rest := self._rest) is not None and not self._is_paused and self.transport is not None:
            part, rest = rest[:_PART_BYTES], rest[_PART_BYTES:]
            self._rest = rest or None
            self.transport.write(part)

    # -- answers -------------------------------------------------------------------------------------------------------

    def pause(self) -> None:
        """Reads no more for now."""
        if self.transport is not None and not self._is_held_back and not self.transport.is_closing():
            self._is_held_back = True
            self.transport.pause_reading()

    def resume(self) -> None:
        """Reads on."""
        if self.transport is not None and self._is_held_back:
            self._is_held_back = False
            if not self.transport.is_closing():
                self.transport.resume_reading()

    def _leave_to_loop(self) -> None:
        if self._direct is not None:
            self._direct.leave()
            self._direct = None

    def get_buffer(self, sizehint: int) -> memoryview:
        """What is received comes here."""
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        """Reads what was received, and hands what it holds of a body on as one chunk."""
        part = self._buffer[:nbytes]
        if self._is_between_chunks:
            self.data_received(bytes(part))
        else:
            self._read(part)

    def data_received(self, data: bytes) -> None:
        """The same where the loop brings the bytes along."""
        if self._is_between_chunks and self._answer is not None:
            part = data_of(data)
            if part is not None:
                # Behind whole chunks the parser would stand where it stands.
                self._answer.receive(part, data)
                return
        self._read(data)

    def _read(self, data: bytes | memoryview) -> None:
        answer = self._answer
        if answer is None:
            self.drop()  # Nobody has asked: a late 408, or a second answer.
            return
        if not self._fed and not self._has_head and not self._head_only:
            whole = read_whole(bytes(data))
            if whole is not None:
                self._answer = None
                answer.complete(*whole)
                self._keeps_alive = True
                self._give_back()
                answer.tell()
                return
        self._is_fresh = False
        self._fed += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._fault = "switched protocols, which it was not asked for"
        except httptools.HttpParserError as exc:
            if self._is_complete:
                self._keeps_alive = False
            else:
                self._fault = f"sent what is no HTTP: {exc}"
        self._is_between_chunks = self._is_at_chunk and data[-2:] == b"\r\n"
        parts = self._parts
        if parts:
            self._fed = 0
            chunk = parts[0] if len(parts) == 1 else b"".join(parts)
            parts.clear()
            answer.receive(chunk)
            if self._answer is not answer:
                return  # Who took it has ended it.
        if self._fault:
            self.fail(self._fault)
        elif self._is_complete:
            self._finish(answer)
        elif self._fed > _HEAD_BYTES:
            self.fail("sent a head that is too long")
        elif answer.on_news is not None:
            answer.on_news()

    def eof_received(self) -> None:
        """The end of an answer that does not say where it ends."""
        answer = self._answer
        if answer is None or not self._has_head or self._is_chunked or self._length is not None:
            return
        self._keeps_alive = False
        if _was_said(self.transport):
            self._finish(answer)

    def _finish(self, answer: Answer) -> None:
        self._answer = None
        answer.end()
        self._give_back()

    def _give_back(self) -> None:
        if self._is_held_back:
            self.resume()
        if self._first is not None:
            self._first(self)
            self._first = None
        if self._keeps_alive and self._rest is None and self.is_usable:
            if self._head_only:
                self._parser = httptools.HttpResponseParser(self)  # The old one waits for a body.
            self._freed(self)
        else:
            self.drop()

    # -- the parser's calls --------------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        """An answer begins; what begins behind the end of one is nobody's."""
        if self._is_complete:
            self._keeps_alive = False

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header, or a trailer, which is dropped."""
        known, kind = _known.get(name) or _learned(name)
        if self._has_head:
            if kind == _CONNECTION:
                self._keeps_alive = False  # llhttp obeys it, and would take no other answer.
            return
        if kind == _LENGTH:
            self._length = int(value)
        elif kind == _CODING:
            if self._is_chunked or value.strip(b" \t").lower() != b"chunked":
                self._fault = "sent a Transfer-Encoding other than chunked"
            self._is_chunked = True
        self._headers.append((known, value.rstrip(b" \t").decode("utf-8", "surrogateescape")))

    def on_headers_complete(self) -> None:
        """The head is whole."""
        if self._has_head:
            return  # That of a second answer.
        headers, self._headers = self._headers, []
        parser = self._parser
        status = parser.get_status_code()
        if status < 200:
            self._length, self._is_chunked = None, False
            if status == 101 or status < 100:
                self._fault = f"answered with status {status}, which is no answer"
            return
        self._has_head = True
        version = parser.get_http_version()
        # RFC 9112 §6.1: of chunks in HTTP/1.0 nobody knows whether somebody between has understood them.
        self._keeps_alive = parser.should_keep_alive() and not (self._is_chunked and version == "1.0")
        if version not in ("1.1", "1.0"):
            self._fault = f"answered with HTTP/{version}"
        elif len(headers) > MOST_HEADERS or (
            self._fed > _HEAD_BYTES and sum(len(name) + len(value) + 4 for name, value in headers) > _HEAD_BYTES
        ):
            self._fault = "sent a head that is too long"
        self._fed = 0
        if self._head_only or status in (204, 304):
            self._length, self._is_chunked, self._is_complete = 0, False, True
        self._is_at_chunk = self._is_chunked
        answer = self._answer
        if answer is not None and not self._fault:
            answer.begin(status, tuple(headers), self._length)

    def on_body(self, part: bytes) -> None:
        """A part of the body."""
        if self._is_complete:
            self._keeps_alive = False
        elif not self._fault:
            self._parts.append(part)

    def on_chunk_header(self) -> None:
        """A chunk's size is known."""
        self._is_at_chunk = False

    def on_chunk_complete(self) -> None:
        """A chunk is whole: the next one's size is to come, unless this was the last."""
        self._is_at_chunk = True

    def on_message_complete(self) -> None:
        """The answer is whole; one of 1xx is none yet."""
        if self._has_head:
            self._is_complete = True


class BroughtConnection(Connection, asyncio.Protocol):
    """The same for a loop that brings what it has read along cheaper than it reads into a buffer: uvloop."""

    __slots__ = ()


_LENGTH, _CODING, _CONNECTION = 1, 2, 3
_KINDS = {
    "content-length": _LENGTH,
    "transfer-encoding": _CODING,
    "connection": _CONNECTION,
    "proxy-connection": _CONNECTION,
}
_KNOWN = 1024
_known: dict[bytes, tuple[str, int]] = {}
"""Names of headers as they are spelt, and what they mean to us; they recur."""


def _learned(name: bytes) -> tuple[str, int]:
    text = name.decode("ascii")
    known = (text, _KINDS.get(text.lower(), 0))
    if len(_known) < _KNOWN:
        _known[name] = known
    return known


def _was_said(transport: asyncio.Transport | None) -> bool:
    """True for an end that the upstream has said, and not somebody between (RFC 9112 §9.8).

    The loops tell of a connection's end alike whether or not TLS was ended before. A read knows the difference.
    """
    tls: ssl.SSLObject | None = transport.get_extra_info("ssl_object") if transport is not None else None
    try:
        return tls is None or not tls.read(1)
    except ssl.SSLError:
        return False
