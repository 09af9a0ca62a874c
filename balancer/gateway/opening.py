"""An answer's opening: as much of it as tells whether it is one, read before the client is sent anything.

As long as nothing was sent, another service can still be tried.
"""

from __future__ import annotations

import asyncio
import contextlib
import re

from balancer.dialects import Headers
from balancer.domain import ApiStyle, Outcome, Timeouts
from balancer.encoding import DecodeError, Decoder, decoded
from balancer.errors import UpstreamAnswerError, UpstreamError
from balancer.failures import Verdict, classify, classify_error_event
from balancer.gateway.messages import Take, UpstreamResponse
from balancer.sse import Event, Parser
from balancer.usage import StreamUsage

ERROR_LIMIT_BYTES = 1024 * 1024
_ERROR_LIMIT_S = 5.0
"""An error that drips in must not hold up the next service's chance."""
_FIRST_EVENT_LIMIT_BYTES = 64 * 1024
_COMMENTS_S = 10.0
"""Comments are held back for no longer: they keep connections alive that somebody between here and the client ends."""
READ_AHEAD_S = _ERROR_LIMIT_S + _COMMENTS_S
"""No opening is read for longer than that beside the time in which nothing comes."""
_EVENT_BEGINNINGS = (b"data:", b"event:", b"id:", b": ", b":\n")
"""Some servers send a stream under another content type: JSON cannot begin so."""
_PLAIN_EVENT = re.compile(rb"\n\r?\n")
_ERROR_WORDS = re.compile(rb"error|failed")
_ERROR_BODY = re.compile(rb'\s*+\{\s*+"error"\s*+:\s*+[{"]')


class Opening:
    """An answer whose first bytes were read ahead; who reads it gets them all. A verdict says that it is an error.

    What was read ahead of it outlives the connection.
    """

    def __init__(self, response: UpstreamResponse) -> None:
        self._response = response
        self._ahead: list[bytes] = []
        self._is_closed = False
        self.status = response.status
        self.headers = response.headers
        self.length = response.length
        self.content_type, self.coding = described(self.headers)
        self.is_stream = False
        self.is_cut = False
        """True for an error of which only a part has come; that can be read, but is no body."""
        self.is_empty = False
        """True when it ended without having told anything."""
        self.verdict: Verdict | None = None

    async def look(self, style: ApiStyle, now_ms: int) -> None:
        """Reads ahead until it is clear what the answer is. Raises UpstreamError when it breaks off, or is none."""
        if self.status >= 400:
            body = await self._error_ahead()
            self.verdict = classify(style, self.status, self.headers, self._decoded(body), now_ms)
            return
        if not 200 <= self.status < 300:
            # An SDK would follow a redirect, with its credential and the prompt, to where the upstream points.
            raise UpstreamAnswerError(f"the upstream answered with status {self.status}, which is no answer")
        chunk = await self._next_ahead()
        self.is_stream = self.content_type.startswith("text/event-stream") or chunk.startswith(_EVENT_BEGINNINGS)
        if self.is_stream:
            event = await self._first_event(chunk)
            usage = StreamUsage()
            if event is not None:
                usage.see(event)
            if event is not None and usage.is_error:
                self.verdict = classify_error_event(style, event.data)
        elif not chunk:
            self.is_empty = self.status != 204
        elif says_error(self._beginning(chunk)):
            body, is_whole = await self._read_ahead(ERROR_LIMIT_BYTES)
            verdict = classify(style, self.status, self.headers, self._decoded(body), now_ms)
            if is_whole and verdict.outcome is not Outcome.SUCCESS:
                self.verdict = verdict

    # -- as a response -------------------------------------------------------------------------------------------------

    def whole(self) -> bytes | None:
        """The body, if all of it was there at once and nothing was read ahead."""
        return None if self._ahead or self._is_closed else self._response.whole()

    @property
    def is_at_end(self) -> bool:
        """True when it is known already that nothing more comes."""
        return not self._ahead and (self._is_closed or self._response.is_at_end)

    async def read(self) -> bytes:
        """The next bytes: those that were read ahead, and then the rest."""
        if self._ahead:
            return self._ahead.pop(0)
        return b"" if self._is_closed else await self._response.read()

    async def pump(self, take: Take) -> bytes:
        """Gives the chunks to `take` as they come; the first that is not taken, b"" at the end."""
        while self._ahead:
            chunk = self._ahead.pop(0)
            if not take(chunk):
                return chunk
        return b"" if self._is_closed else await self._response.pump(take)

    async def close(self) -> None:
        """Gives the connection back; what was read ahead can still be read."""
        self._is_closed = True
        await self._response.close()

    # -- reading ahead -------------------------------------------------------------------------------------------------

    async def _next_ahead(self) -> bytes:
        chunk = await self._response.read()
        if chunk:
            self._ahead.append(chunk)
        return chunk

    async def _read_ahead(self, limit_bytes: int) -> tuple[bytes, bool]:
        """The body, and True when that is all of it: reading ends beyond the limit."""
        held, is_whole = sum(map(len, self._ahead)), False
        while held <= limit_bytes and not is_whole:
            chunk = await self._next_ahead()
            held += len(chunk)
            is_whole = not chunk
        return b"".join(self._ahead), is_whole

    async def _error_ahead(self) -> bytes:
        """The body of an error, or as much of it as comes: its status and headers tell most.

        A 429 whose body never ended was once a failure that cooled nothing, and opened breakers.
        """
        self.is_cut = True
        with contextlib.suppress(UpstreamError, TimeoutError):
            async with asyncio.timeout(_ERROR_LIMIT_S):
                await self._read_ahead(ERROR_LIMIT_BYTES)
                self.is_cut = False
        if self.is_cut:
            await self.close()
        return b"".join(self._ahead)

    def _beginning(self, chunk: bytes) -> bytes:
        """What the body begins with, decoded as far as one step goes."""
        if not self.coding:
            return chunk
        try:
            return next(iter(Decoder(self.coding).feed(chunk)), b"")
        except DecodeError:
            return b""

    def _decoded(self, body: bytes) -> bytes:
        try:
            return decoded(body, self.coding, ERROR_LIMIT_BYTES)
        except DecodeError:
            return b""

    async def _first_event(self, chunk: bytes) -> Event | None:
        """The stream's first event with data, None when it is no error for certain, has none, or cannot be read.

        Half an event is of no use to a client yet, so that waiting for the rest costs it nothing. Comments stand before
        errors too (OpenRouter sends them while it looks for somebody to serve).
        """
        coding = self.coding
        if not coding and begins_well(chunk):
            return None  # The common case.
        now = asyncio.get_running_loop().time
        until = now() + _COMMENTS_S
        parser, held = Parser(), 0
        try:
            decoder = Decoder(coding)
            while chunk:
                for part in decoder.feed(chunk):
                    if event := next((event for event in parser.feed(part) if event.data), None):
                        return event
                held += len(chunk)
                if held > _FIRST_EVENT_LIMIT_BYTES or now() > until:
                    return None
                chunk = await self._next_ahead()
        except DecodeError:
            return None
        event = parser.finish()
        self.is_empty = event is None or not event.data
        return event


def begins_well(chunk: bytes) -> bool:
    """True for a stream's first chunk that holds an event which is no error for certain."""
    return not chunk.startswith(b":") and bool(_PLAIN_EVENT.search(chunk)) and not _ERROR_WORDS.search(chunk)


def opening_s(timeouts: Timeouts) -> float:
    """More than an answer's opening takes: its limits, one after the other, and what is read ahead of a stream."""
    return timeouts.headers_s + timeouts.first_byte_s + timeouts.idle_s + READ_AHEAD_S


def says_error(body: bytes) -> bool:
    """True for JSON that begins like an error's, whatever the status says."""
    if body.startswith(b'{"') and not body.startswith(b'{"error"'):
        return False
    return _ERROR_BODY.match(body) is not None


def described(headers: Headers) -> tuple[str, str]:
    """The first Content-Type, in lower case, and the first Content-Encoding; empty when absent."""
    kind = coding = ""
    for name, value in reversed(headers):
        if len(name) == 12 and name.lower() == "content-type":
            kind = value.lower()
        elif len(name) == 16 and name.lower() == "content-encoding":
            coding = value
    return kind, coding
