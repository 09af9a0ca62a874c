"""What an attempt used, as the vendor reports it: from JSON answers and from streams, OpenAI's and Anthropic's shapes.

Nothing here raises: a malformed body or event, and odd numbers (null, negative, text), count as not reported.
"""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, TypeVar

import msgspec

from balancer import lenient
from balancer.domain import Usage
from balancer.encoding import DecodeError, Decoder
from balancer.sse import Event

T = TypeVar("T")

WHOLE_LIMIT_BYTES = 4 * 1024 * 1024
TAIL_BYTES = 64 * 1024
_LONG_BYTES = 2048
_END_BYTES = 1024
_BACKSLASH = ord("\\")
_MOST = 2**48
_BOM = b"\xef\xbb\xbf"


_NULL = msgspec.Raw(b"null")
_COUNTS = (
    "prompt_tokens",
    "completion_tokens",
    "input_tokens",
    "output_tokens",
    "cache_read_input_tokens",
    "cache_creation_input_tokens",
)
_DETAILS = (
    "prompt_tokens_details",
    "completion_tokens_details",
    "input_tokens_details",
    "output_tokens_details",
)
_USAGE_KEY = re.compile(r'"usage"\s*+:\s*+(?=\{)')
_MAY_MATTER = re.compile(rb'"(?:usage|message_stop|error|response\.(?:completed|incomplete|failed))"')


class _Body(msgspec.Struct):
    usage: Any = None


class _Chunk(msgspec.Struct):
    """The fields of an event that matter, in any dialect. Raw: a `message` is text in some, an object in others."""

    type: Any = ""
    usage: msgspec.Raw = _NULL
    message: msgspec.Raw = _NULL
    response: msgspec.Raw = _NULL
    error: msgspec.Raw = _NULL


_Count = Annotated[int, msgspec.Meta(ge=0, lt=_MOST)]


class _Details(msgspec.Struct, frozen=True, gc=False):
    cached_tokens: _Count | None = None
    reasoning_tokens: _Count | None = None
    thinking_tokens: _Count | None = None


class _Counts(msgspec.Struct, frozen=True, gc=False):
    """A vendor's table in which nothing is odd, as nearly all are."""

    prompt_tokens: _Count | None = None
    completion_tokens: _Count | None = None
    input_tokens: _Count | None = None
    output_tokens: _Count | None = None
    cache_read_input_tokens: _Count | None = None
    cache_creation_input_tokens: _Count | None = None
    prompt_tokens_details: _Details | None = None
    completion_tokens_details: _Details | None = None
    input_tokens_details: _Details | None = None
    output_tokens_details: _Details | None = None

    def read(self) -> Usage | None:
        """The same as `read` makes of the table."""
        input_, output = self.prompt_tokens, self.completion_tokens
        if input_ is None:
            input_ = self.input_tokens
        if output is None:
            output = self.output_tokens
        if input_ is None and output is None:
            return None
        was_read = self.prompt_tokens_details or self.input_tokens_details
        was_written = self.completion_tokens_details or self.output_tokens_details
        return Usage(
            input=input_ or 0,
            output=output or 0,
            cached=self.cache_read_input_tokens or (was_read and was_read.cached_tokens) or 0,
            cache_creation=self.cache_creation_input_tokens or 0,
            reasoning=(was_written and (was_written.reasoning_tokens or was_written.thinking_tokens)) or 0,
        )


class _Usual(msgspec.Struct, frozen=True, gc=False):
    usage: _Counts | None = None


_counts = msgspec.json.Decoder(_Counts)
_usual = msgspec.json.Decoder(_Usual)
_body = msgspec.json.Decoder(_Body)
_chunk = msgspec.json.Decoder(_Chunk)
_any = msgspec.json.Decoder()


def _decoded(decoder: msgspec.json.Decoder[T], data: bytes | bytearray | msgspec.Raw) -> T | None:
    """What the bytes hold, None when they are malformed, of another shape, or nested beyond reason."""
    try:
        return lenient.decode(decoder, data)
    except lenient.UNREADABLE:
        return None


def read(table: object) -> Usage | None:
    """The usage in a vendor's table, None when it is none or has neither input nor output.

    OpenAI chat, completions, embeddings: prompt_tokens, completion_tokens. Responses and Anthropic: input_tokens,
    output_tokens. Details: cached_tokens, reasoning_tokens, thinking_tokens; Anthropic's cache_read_ and
    cache_creation_input_tokens.
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
        reasoning=_first(written_details, "reasoning_tokens", "thinking_tokens") or 0,
    )


def _read_usual(table: msgspec.Raw) -> Usage | None:
    """The same in one step, None too for a table in which something is odd."""
    try:
        return _counts.decode(table).read()
    except lenient.UNREADABLE:
        return None


def _first(table: dict[str, Any], *names: str) -> int | None:
    return next((table[name] for name in names if _is_count(table.get(name))), None)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MOST


def _details(table: dict[str, Any], *names: str) -> dict[str, Any]:
    return next((table[name] for name in names if isinstance(table.get(name), dict)), {})


def usage_of(body: bytes | bytearray) -> Usage | None:
    """The usage that a whole JSON answer reports, if any. Of a long answer mostly its end alone is read."""
    try:
        return _usage_in(body) if len(body) < _LONG_BYTES else _usage_at_end(body)
    except lenient.UNREADABLE:
        return None


def _usage_in(body: bytes | bytearray) -> Usage | None:
    """What a JSON object reports. Raises UNREADABLE."""
    try:
        usage = _usual.decode(body).usage
    except lenient.UNREADABLE:
        return read(lenient.decode(_body, body.removeprefix(_BOM)).usage)
    return usage.read() if usage is not None else None


def _usage_at_end(body: bytes | bytearray) -> Usage | None:
    at = body.rfind(b'"usage"', -_END_BYTES)
    # This begins a string, as no backslash stands before it. That it is a key of the outermost object is proven by what
    # follows, if that ends with the object.
    if at > 0 and body[at - 1] != _BACKSLASH:
        try:
            return _usage_in(b"{" + body[at:])
        except lenient.UNREADABLE:
            pass  # It is a key of something else.
    return _usage_in(body)


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
            for part in self._decoder.feed(chunk):
                self._hold(part)
        except DecodeError:
            self._decoder = None

    def _hold(self, part: bytes) -> None:
        self._held += part
        if len(self._held) > WHOLE_LIMIT_BYTES:
            self._is_whole = False
            del self._held[:-TAIL_BYTES]

    def finish(self) -> Usage | None:
        """The usage that the answer reports, if any."""
        if self._is_whole:
            return usage_of(self._held)
        return read(_last_usage(self._held[-TAIL_BYTES:].decode("utf-8", "replace")))


def _last_usage(tail: str) -> object:
    """The object after the last `"usage":` of a long body's end, None without one."""
    starts = [key.end() for key in _USAGE_KEY.finditer(tail)]
    try:
        return json.JSONDecoder().raw_decode(tail, starts[-1])[0] if starts else None
    except (ValueError, RecursionError):
        return None


def _may_matter(data: bytes) -> bool:
    # Most events have none of these, which are found to be absent in a fraction of the time that the pattern takes.
    rfind = data.rfind
    return (
        rfind(b'"usage"') >= 0 or rfind(b'"error"') >= 0 or rfind(b'"message_stop"') >= 0 or rfind(b'"response.') >= 0
    ) and _MAY_MATTER.search(data) is not None


class StreamUsage:
    """Listens to the events of a stream, any dialect; `usage` is the last reported so far.

    `is_complete` once its last event was seen ([DONE], message_stop, response.completed and its like, an error);
    `has_content` once the first content token was.
    """

    def __init__(self) -> None:
        self._table: dict[str, Any] = {}
        self._first: msgspec.Raw | None = None
        self.usage: Usage | None = None
        self.is_complete = False
        self.is_error = False
        self.has_content = False

    def see(self, event: Event) -> None:
        """Hears one event. Only events that may matter are decoded."""
        data = event.data
        if data.strip() == b"[DONE]":
            self.is_complete = True
            return
        if event.name == "error":
            self.is_complete = self.is_error = True
        if not self.has_content and (b'"delta"' in data or b'"text"' in data):
            self.has_content = _has_content(data)
        chunk = _decoded(_chunk, data) if _may_matter(data) else None
        if chunk is None:
            return
        if chunk.usage is not _NULL:
            self._report(chunk.usage)
        for holder in (chunk.message, chunk.response):
            if holder is not _NULL and (body := _decoded(_body, holder)):
                self._add(body.usage)
        match chunk.type:
            case "message_stop" | "response.completed" | "response.incomplete":
                self.is_complete = True
            case "error" | "response.failed":
                self.is_complete = self.is_error = True
            case _ if bytes(chunk.error) != b"null":
                self.is_complete = self.is_error = True
            case _:
                pass

    def _report(self, usage: msgspec.Raw) -> None:
        """Takes over a table, most often the only one of its stream."""
        if self.usage is None and not self._table:
            self.usage = _read_usual(usage)
            if self.usage is not None:
                self._first = usage
                return
        self._add(_decoded(_any, usage))

    def _add(self, table: object) -> None:
        """Takes over what a table reports; what it leaves out, or spells oddly, stays as it was.

        Anthropic's message_delta is cumulative and partial; of OpenAI's the last counts.
        """
        if not isinstance(table, dict):
            return
        first, self._first = self._first, None
        if first is not None:
            self._add(_decoded(_any, first))
        for name in _COUNTS:
            if _is_count(table.get(name)):
                self._table[name] = table[name]
        for name in _DETAILS:
            if isinstance(table.get(name), dict):
                self._table[name] = table[name]
        self.usage = read(self._table)


class _Delta(msgspec.Struct):
    content: Any = None
    reasoning_content: Any = None
    reasoning: Any = None
    refusal: Any = None
    tool_calls: Any = None
    function_call: Any = None
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
    chunk = _decoded(_content, data)
    if chunk is None:
        return False
    if isinstance(chunk.delta, str):
        return bool(chunk.delta)
    if chunk.delta is not None and any(msgspec.structs.astuple(chunk.delta)):
        return True
    for choice in chunk.choices:
        delta = choice.delta
        if choice.text or (delta is not None and (delta.content or any(msgspec.structs.astuple(delta)))):
            return True
    return False
