"""What an attempt used, as the vendor reports it: from JSON answers and from streams, OpenAI's and Anthropic's shapes.

Nothing here raises: a malformed body or event, and odd numbers (null, negative, text), count as not reported.
"""

from __future__ import annotations

from typing import Any

import msgspec

from balancer.domain import Usage
from balancer.encoding import DecodeError, Decoder
from balancer.sse import Event

WHOLE_LIMIT_BYTES = 4 * 1024 * 1024
TAIL_BYTES = 64 * 1024
_MOST = 2**48


class _Body(msgspec.Struct):
    usage: Any = None


class _Message(msgspec.Struct):
    usage: dict[str, Any] | None = None


class _Chunk(msgspec.Struct):
    """The fields of an event that matter, in any dialect."""

    type: Any = ""
    usage: dict[str, Any] | None = None
    message: _Message | None = None
    response: _Message | None = None
    error: Any = None


_body = msgspec.json.Decoder(_Body)
_chunk = msgspec.json.Decoder(_Chunk)
_table = msgspec.json.Decoder(dict[str, Any])


def read(table: dict[str, Any] | None) -> Usage | None:
    """The usage in a vendor's table, None when it has neither input nor output.

    OpenAI chat, completions, embeddings: prompt_tokens, completion_tokens. Responses and Anthropic: input_tokens,
    output_tokens. Details: cached_tokens, reasoning_tokens; Anthropic's cache_read_ and cache_creation_input_tokens.
    """
    if not isinstance(table, dict):
        return None
    input_ = _first(table, "prompt_tokens", "input_tokens")
    output = _first(table, "completion_tokens", "output_tokens")
    if input_ is None and output is None:
        return None
    read_details = _details(table, "prompt_tokens_details", "input_tokens_details")
    written_details = _details(table, "completion_tokens_details", "output_tokens_details")
    return Usage(
        input=input_ or 0,
        output=output or 0,
        cached=_first(table, "cache_read_input_tokens") or _first(read_details, "cached_tokens") or 0,
        cache_creation=_first(table, "cache_creation_input_tokens") or 0,
        reasoning=_first(written_details, "reasoning_tokens") or 0,
    )


def _first(table: dict[str, Any], *names: str) -> int | None:
    for name in names:
        value = table.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MOST:
            return value
    return None


def _details(table: dict[str, Any], *names: str) -> dict[str, Any]:
    return next((table[name] for name in names if isinstance(table.get(name), dict)), {})


class UsageTap:
    """Listens to the chunks of a JSON answer; holds at most 4 MiB of it, beyond that the last 64 KiB."""

    def __init__(self, encoding: str = "") -> None:
        self._held = bytearray()
        self._is_whole = True
        self._decoder: Decoder | None
        try:
            self._decoder = Decoder(encoding)
        except DecodeError:
            self._decoder = None

    def feed(self, chunk: bytes) -> None:
        """Hears a chunk as it came, still encoded."""
        if self._decoder is None:
            return
        try:
            self._held += self._decoder.feed(chunk)
        except DecodeError:
            self._decoder = None
            return
        if len(self._held) > WHOLE_LIMIT_BYTES:
            self._is_whole = False
            del self._held[:-TAIL_BYTES]

    def finish(self) -> Usage | None:
        """The usage that the answer reports, if any."""
        try:
            if self._is_whole:
                return read(_body.decode(self._held).usage)
            return read(_last_usage(bytes(self._held)))
        except msgspec.DecodeError:
            return None


def _last_usage(tail: bytes) -> dict[str, Any] | None:
    """The object after the last `"usage":` of a long body's end: braces are balanced, for usage holds no strings."""
    start = tail.find(b"{", tail.rfind(b'"usage"'))
    depth = 0
    for at in range(start, len(tail)) if start >= 0 and b'"usage"' in tail else ():
        depth += {0x7B: 1, 0x7D: -1}.get(tail[at], 0)
        if depth == 0:
            return _table.decode(tail[start : at + 1])
    return None


class StreamUsage:
    """Listens to the events of a stream, any dialect.

    `is_complete` once its last event was seen ([DONE], message_stop, response.completed and its like, an error);
    `has_content` once the first content token was.
    """

    def __init__(self) -> None:
        self._table: dict[str, Any] = {}
        self.is_complete = False
        self.is_error = False
        self.has_content = False

    @property
    def usage(self) -> Usage | None:
        """The last usage reported so far."""
        return read(self._table)

    def see(self, event: Event) -> None:
        """Hears one event. Only events that may matter are decoded."""
        data = event.data
        if data == b"[DONE]":
            self.is_complete = True
            return
        if not self.has_content and (b'"delta"' in data or b'"text"' in data):
            self.has_content = _has_content(data)
        may_matter = b'"usage"' in data or b'"message_stop"' in data or b'"error"' in data or b'"response.' in data
        if not may_matter:
            return
        try:
            chunk = _chunk.decode(data)
        except msgspec.DecodeError:
            return
        for table in (chunk.usage, chunk.message and chunk.message.usage, chunk.response and chunk.response.usage):
            # Anthropic's message_delta is cumulative: what it says replaces, what it leaves out stays.
            if table:
                self._table |= {name: value for name, value in table.items() if value is not None}
        match chunk.type:
            case "message_stop" | "response.completed" | "response.incomplete":
                self.is_complete = True
            case "error" | "response.failed":
                self.is_complete = self.is_error = True
            case _ if chunk.error is not None:
                self.is_complete = self.is_error = True
            case _:
                pass


class _Delta(msgspec.Struct):
    content: Any = None
    reasoning_content: Any = None
    tool_calls: Any = None
    text: Any = None
    thinking: Any = None
    partial_json: Any = None


class _Choice(msgspec.Struct):
    delta: _Delta | None = None
    text: Any = None


class _Content(msgspec.Struct):
    choices: list[_Choice] = []
    delta: _Delta | str | None = None


_content = msgspec.json.Decoder(_Content)


def _has_content(data: bytes) -> bool:
    """True when the event carries a token: text, reasoning, or a piece of a tool call."""
    try:
        chunk = _content.decode(data)
    except msgspec.DecodeError:
        return False
    if isinstance(chunk.delta, str):
        return bool(chunk.delta)
    deltas = [chunk.delta, *(choice.delta for choice in chunk.choices)]
    return any(choice.text for choice in chunk.choices) or any(
        any(msgspec.structs.astuple(delta)) for delta in deltas if delta
    )
