"""Server-sent events, fed as they come and given back whole (WHATWG HTML §9.2)."""

from __future__ import annotations

import re

import msgspec

# Atomic, or else the two halves of one CRLF would count as two line ends.
_EVENT_END = re.compile(rb"(?>\r\n|\n|\r)(?>\r\n|\n|\r)")
_LINE_END = re.compile(rb"\r\n|\n|\r")
_BOM = b"\xef\xbb\xbf"
DEFAULT_LIMIT_BYTES = 8 * 1024 * 1024


class Event(msgspec.Struct, frozen=True):
    """One event: its bytes as they came, blank line included, its name (empty for none), and its joined data lines."""

    raw: bytes
    name: str
    data: bytes


class Parser:
    """Feeds on chunks cut anywhere. The raw bytes of all events and the tail are the bytes that were fed.

    An unfinished event beyond the limit is given up: from then on `is_overflowed` is true, nothing is parsed or held,
    and what is fed comes back as events that have raw bytes only.
    """

    def __init__(self, limit_bytes: int = DEFAULT_LIMIT_BYTES) -> None:
        self._limit = limit_bytes
        self._buffer = bytearray()
        self._searched = 0
        self._is_first = True
        self.is_overflowed = False

    @property
    def tail(self) -> bytes:
        """The bytes of the event that is not finished yet."""
        return bytes(self._buffer)

    def feed(self, chunk: bytes) -> list[Event]:
        """The events that this chunk finishes."""
        if self.is_overflowed:
            return [_unparsed(chunk)] if chunk else []
        self._buffer += chunk
        events = []
        start = 0
        while True:
            # The end may straddle the last chunk's edge: three bytes back is enough for any pair of line ends.
            match = _EVENT_END.search(self._buffer, max(start, self._searched - 3))
            # A CR at the very end may be half of a CRLF that is still to come.
            if match is None or (match.end() == len(self._buffer) and self._buffer[-1:] == b"\r"):
                break
            events.append(self._event(bytes(self._buffer[start : match.end()])))
            start = match.end()
        del self._buffer[:start]
        self._searched = len(self._buffer)
        if len(self._buffer) > self._limit:
            self.is_overflowed = True
            events.append(_unparsed(self.take_tail()))
        return events

    def take_tail(self) -> bytes:
        """The unfinished bytes, which are forgotten here."""
        tail = bytes(self._buffer)
        self._buffer.clear()
        self._searched = 0
        return tail

    def _event(self, raw: bytes) -> Event:
        text = raw
        if self._is_first:
            self._is_first = False
            text = text.removeprefix(_BOM)
        name = b""
        data: list[bytes] = []
        for line in _LINE_END.split(text):
            field, _, value = line.partition(b":")
            value = value.removeprefix(b" ")
            if field == b"data":
                data.append(value)
            elif field == b"event":
                name = value
        return Event(raw, name.decode("utf-8", "replace"), b"\n".join(data))


def _unparsed(raw: bytes) -> Event:
    return Event(raw, "", b"")
