"""Request and answer bodies: what we read of them, and the few edits, every other byte left as it came."""

from __future__ import annotations

import re
from typing import Any

import msgspec

from balancer.errors import RequestError

_RUN_BYTES = 512
_TOKENS_PER_RUN = 1000
_BYTES_PER_TOKEN = 4

_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|[{}\[\],:]', re.DOTALL)
_SCALAR_END = re.compile(rb"[\s,}\]]")


class _StreamOptions(msgspec.Struct):
    include_usage: Any = None


class Peek(msgspec.Struct):
    """The fields of a request that we read; all others pass unseen."""

    model: str
    stream: bool = False
    stream_options: _StreamOptions | None = None
    max_tokens: Any = None
    max_completion_tokens: Any = None
    max_output_tokens: Any = None
    previous_response_id: Any = None

    @property
    def asks_for_usage(self) -> bool:
        """True when the client wants the usage chunk of an OpenAI stream."""
        return self.stream_options is not None and self.stream_options.include_usage is True

    @property
    def most_output(self) -> int:
        """The most tokens that the client lets the model write, 0 when it does not say."""
        for value in (self.max_completion_tokens, self.max_output_tokens, self.max_tokens):
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
        return 0


class _Raw(msgspec.Struct):
    """The same fields of any type, so that a wrong one can be named."""

    model: Any = msgspec.UNSET
    stream: Any = None


_peek = msgspec.json.Decoder(Peek)
_raw = msgspec.json.Decoder(_Raw)


def peek(body: bytes) -> Peek:
    """What we read of a JSON request. Raises RequestError, which never quotes the body."""
    try:
        request = _peek.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise _explain(body) from exc
    if not request.model:
        raise RequestError("`model` must not be empty", param="model")
    return request


def _explain(body: bytes) -> RequestError:
    try:
        request = _raw.decode(body)
    except msgspec.ValidationError:
        return RequestError("the request's body must be a JSON object")
    except msgspec.DecodeError as exc:
        return RequestError(f"the request's body is no valid JSON: {exc}")
    except UnicodeDecodeError:
        return RequestError("the request's body is no valid UTF-8")
    if request.model is msgspec.UNSET:
        return RequestError("`model` is missing", param="model")
    if not isinstance(request.model, str):
        return RequestError("`model` must be a string", param="model")
    if not isinstance(request.stream, bool | None):
        return RequestError("`stream` must be true or false", param="stream")
    if request.stream is None:
        return RequestError("`stream` must be true or false, not null", param="stream")
    return RequestError("`stream_options` must be an object", param="stream_options")


def estimate_tokens(body: bytes) -> int:
    """Prompt tokens that a request will cost, from one scan of its bytes: good for a reservation, not for a bill.

    A quarter of the bytes; a long run without spaces (base64 of an image or a file, 512 bytes or more) counts 1 000.
    """
    length, runs = len(body), 0
    if _may_hold_run(body):
        for part in body.split(b'"'):
            if len(part) >= _RUN_BYTES and b" " not in part and b"\\" not in part and part.isascii():
                length -= len(part)
                runs += 1
    return max(1, length // _BYTES_PER_TOKEN + runs * _TOKENS_PER_RUN)


def _may_hold_run(body: bytes) -> bool:
    """False when every half-run block has a space: a run would cover one of them wholly."""
    half = _RUN_BYTES // 2
    return any(b" " not in body[at : at + half] for at in range(0, len(body) - half + 1, half))


# -- edits -------------------------------------------------------------------------------------------------------------


def values_at(body: bytes, path: tuple[str, ...]) -> list[tuple[int, int]]:
    """Where the values under a path of keys stand in a valid JSON body, as (start, end).

    A key that is repeated counts each time. Keys may be spelt with escapes. Costs some 25 ns a byte.
    """
    found: list[tuple[int, int]] = []
    keys: list[str | None] = []  # The key whose value each open container is, None within an array.
    containers: list[bytes] = []
    key: str | None = None
    expects_key = False
    at = 0
    length = len(body)
    while at < length:
        match = _TOKEN.search(body, at)
        if match is None:
            break
        token = match[0]
        at = match.end()
        first = token[:1]
        if first == b'"' and expects_key:
            key = msgspec.json.decode(token) if b"\\" in token else token[1:-1].decode()
            expects_key = False
        elif token == b":":
            inner = tuple(keys[1:]) if containers == [b"{"] * len(containers) else None
            if inner is not None and (*inner, key) == path:
                found.append(_value_at(body, at))
        elif first == b"{" or first == b"[":
            keys.append(key if containers else "")
            containers.append(first)
            key = None
            expects_key = first == b"{"
        elif first == b"}" or first == b"]":
            containers.pop()
            keys.pop()
        elif token == b",":
            expects_key = bool(containers) and containers[-1] == b"{"
    return found


def _value_at(body: bytes, at: int) -> tuple[int, int]:
    """The value that begins at or after a place."""
    while body[at : at + 1].isspace():
        at += 1
    first = body[at : at + 1]
    if first in (b"{", b"["):
        depth = 0
        for match in _TOKEN.finditer(body, at):
            depth += {b"{": 1, b"[": 1, b"}": -1, b"]": -1}.get(match[0], 0)
            if depth == 0:
                return at, match.end()
    if first == b'"':
        string = _TOKEN.match(body, at)
        assert string is not None, "the body is valid JSON"
        return at, string.end()
    end = _SCALAR_END.search(body, at)
    return at, end.start() if end else len(body)


def replace_string(body: bytes, path: tuple[str, ...], new: str) -> bytes:
    """The body with the string under a path of keys replaced; values of other types there are left alone."""
    value = msgspec.json.encode(new)
    places = [(start, end) for start, end in values_at(body, path) if body[start : start + 1] == b'"']
    for start, end in reversed(places):
        body = b"%b%b%b" % (body[:start], value, body[end:])
    return body


_MODEL_KEY = re.compile(rb'"model"\s*:\s*')


def replace_model(body: bytes, new: str) -> bytes:
    """The body with its top-level `model` replaced."""
    keys = [m.end() for m in _MODEL_KEY.finditer(body) if body[m.start() - 1] in b"{, \t\r\n"]
    # Within a string its quotes would be escaped, so what was found are keys. A single one is the one that `peek` has
    # read, unless that is spelt with escapes; several may lie at any depth.
    if len(keys) == 1 and b"\\u00" not in body:
        start, end = _value_at(body, keys[0])
        return b"%b%b%b" % (body[:start], msgspec.json.encode(new), body[end:])
    return replace_string(body, ("model",), new)


def ask_for_usage(body: bytes) -> bytes:
    """An OpenAI request whose stream will end with its usage: stream_options.include_usage is true."""
    flags = values_at(body, ("stream_options", "include_usage"))
    if flags:
        for start, end in reversed(flags):
            body = b"%btrue%b" % (body[:start], body[end:])
        return body
    options = [(start, end) for start, end in values_at(body, ("stream_options",))]
    for start, end in reversed(options):
        old = body[start:end]
        if old == b"null":
            body = b'%b{"include_usage":true}%b' % (body[:start], body[end:])
        else:
            comma = b"" if old[1:-1].strip() == b"" else b","
            body = b'%b{"include_usage":true%b%b' % (body[:start], comma, body[start + 1 :])
    if options:
        return body
    start = body.index(b"{") + 1
    comma = b"" if body[start:].lstrip()[:1] == b"}" else b","
    return b'%b"stream_options":{"include_usage":true}%b%b' % (body[:start], comma, body[start:])


# -- forms -------------------------------------------------------------------------------------------------------------

_BOUNDARY = re.compile(r';\s*boundary=(?:"([^"]+)"|([^\s;]+))', re.IGNORECASE)
_NAME = re.compile(rb'(?i)content-disposition:[^\r\n]*[;\s]name=(?:"([^"\r\n]*)"|([^\s;"]+))')


def form_value(body: bytes, content_type: str, name: str) -> tuple[int, int] | None:
    """Where the content of a named part stands in a multipart/form-data body (RFC 7578), as (start, end)."""
    match = _BOUNDARY.search(content_type)
    if match is None:
        return None
    delimiter = b"--" + (match[1] or match[2]).encode("latin-1", "replace")
    at = 0 if body.startswith(delimiter) else body.find(b"\r\n" + delimiter) + 2
    while at >= 2 or body.startswith(delimiter, at):
        head = body.find(b"\r\n\r\n", at)
        end = body.find(b"\r\n" + delimiter, at + len(delimiter) - 2)
        if head < 0 or end < 0:
            return None
        found = _NAME.search(body, at, head + 2)
        if found and (found[1] or found[2] or b"") == name.encode():
            return (head + 4, end) if head + 4 <= end else (end, end)
        at = end + 2
    return None


def peek_form(body: bytes, content_type: str) -> Peek:
    """What we read of a form: its model. Raises RequestError when it has none."""
    place = form_value(body, content_type, "model")
    model = body[place[0] : place[1]].decode("utf-8", "replace").strip() if place else ""
    if not model:
        raise RequestError("the form has no `model`", param="model")
    stream = form_value(body, content_type, "stream")
    return Peek(model=model, stream=bool(stream) and body[slice(*stream)].strip() == b"true" if stream else False)


def replace_form_model(body: bytes, content_type: str, new: str) -> bytes:
    """The form with its model replaced."""
    place = form_value(body, content_type, "model")
    return body if place is None else body[: place[0]] + new.encode() + body[place[1] :]
