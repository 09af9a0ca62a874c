"""Server-sent events, fed as they come and given back whole (WHATWG HTML §9.2)."""

from __future__ import annotations

import re

import msgspec

# Atomic, or else the two halves of one CRLF would count as two line ends.
_EVENT_END = re.compile(rb"(?>\r\n|\n|\r)(?>\r\n|\n|\r)")
_LINE_END = re.compile(rb"\r\n|\n|\r")
_DATA = re.compile(rb"(?:\xef\xbb\xbf)?data(?:: ?|(?=[\r\n]|$))")
_BOM = b"\xef\xbb\xbf"
DEFAULT_LIMIT_BYTES = 8 * 1024 * 1024


class Event(msgspec.Struct, frozen=True):
    """One event: its bytes as they came, blank line included, its name (empty for none), and its joined data lines."""

    raw: bytes | bytearray
    name: str
    data: bytes


class Parser:
    """Feeds on chunks cut anywhere. The raw bytes of all events and the tail are the bytes that were fed.

    An unfinished event beyond the limit is not held: its bytes come back as events that have raw bytes only, up to its
    end, and parsing goes on behind it.
    """

    def __init__(self, limit_bytes: int = DEFAULT_LIMIT_BYTES) -> None:
        self._limit = limit_bytes
        self._buffer = bytearray()
        self._searched = 0
        self._is_first = True
        self._is_skipping = False

    @property
    def tail(self) -> bytes:
        """The bytes of the event that is not finished yet."""
        return bytes(self._buffer)

    @property
    def tail_bytes(self) -> int:
        """How many they are."""
        return len(self._buffer)

    @property
    def is_between_events(self) -> bool:
        """True when no event is unfinished: what comes next begins one."""
        return not self._buffer and not self._is_skipping

    def tail_has(self, word: bytes, *, among: int) -> bool:
        """True when a word ends among the last bytes of the unfinished event."""
        return self._buffer.find(word, max(0, len(self._buffer) - among - len(word) + 1)) >= 0

    def feed(self, chunk: bytes) -> list[Event]:
        """The events that this chunk finishes."""
        is_plain = chunk.endswith(b"\n\n") and chunk.find(b"\n\n\n") < 0 and chunk.find(b"\r") < 0
        if is_plain and self.is_between_events:  # The common case.
            parts = chunk.split(b"\n\n")
            parts.pop()
            return [self._event(part + b"\n\n") for part in parts]
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
        if self._is_skipping or len(self._buffer) > self._limit:
            self._is_skipping = True
            raw = self._take_unparsed()
            if raw:
                events.append(Event(raw, "", b""))
        self._searched = len(self._buffer)
        return events

    def finish(self) -> Event | None:
        """What stands behind the last blank line, as an event, None when nothing does. Nothing is held any more.

        By the book it is none; but servers that end in it mean it.
        """
        tail = bytes(self._buffer)
        self._buffer.clear()
        self._searched = 0
        return self._event(tail) if tail else None

    def _take_unparsed(self) -> bytearray:
        """The unfinished event's bytes, uncopied, but for the last line ends: they may belong to the event's end."""
        raw = self._buffer
        last = raw[-3:]
        kept = last[len(last.rstrip(b"\r\n")) :]
        del raw[len(raw) - len(kept) :]
        self._buffer = kept
        return raw

    def _event(self, raw: bytes) -> Event:
        if self._is_skipping:
            self._is_skipping = False
            return Event(raw, "", b"")
        if raw.startswith(b"data: ") and raw.find(b"\n") == len(raw) - 2 and raw.find(b"\r") < 0:
            self._is_first = False
            return Event(raw, "", raw[6:-2])
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


def with_data(event: Event, data: bytes) -> bytes:
    """The event's bytes with other data of as many lines; all its other lines stay where and as they are."""
    lines = iter(data.split(b"\n"))
    parts = []
    for line in bytes(event.raw).splitlines(keepends=True):
        prefix = _DATA.match(line)
        parts.append(prefix[0] + next(lines) + line[len(line.rstrip(b"\r\n")) :] if prefix else line)
    return b"".join(parts)
