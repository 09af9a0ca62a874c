"""Request and answer bodies: what we read of them, and the few edits, every other byte left as it came."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar

import msgspec

from balancer import lenient
from balancer.errors import RequestError

_RUN_BYTES = 512
_TOKENS_PER_RUN = 1000
# Possessive, and greedy from the far end of a run's length: it goes from space to space in the longest steps.
_SPACED = re.compile(rb"(?s:.{0,%d} )*+" % (_RUN_BYTES - 1))
_BYTES_PER_TOKEN = 4
_UTF8_STEP_BYTES = 1024 * 1024

# Possessive: a string of megabytes costs no backtracking state. A string with a colon behind it is a key. Strings hold
# no escaped quotes: see `_masked`.
_TOKEN = re.compile(rb'("[^"]*+")(\s*+:)?+|[{}\[\]]')
_SCALAR = re.compile(rb"[^\s,}\]]++")
_EMPTY_OBJECT = re.compile(rb"\{\s*+\}")
_MODEL = re.compile(rb'"model"\s*+:\s*+("(?:[^"\\]|\\.)*+")')
# A member of an object up to its value, with what stands before it.
_MEMBER = re.compile(rb'\s*+[{,]\s*+"([^"\\]*+)"\s*+:\s*+')
_SHORT = re.compile(rb'"(?:[^"\\]|\\.){0,256}+"|[^\s,"{}\[\]]++')
# An ASCII letter or underscore that is spelt as an escape, as in "mode\u006c".
_ESCAPED_LETTER = re.compile(rb"\\u00[4-7]")
_LONG_BYTES = 4096
"""From here on to step over members is faster than to look at each byte."""
_MEMBERS = 32
"""So many are stepped over on the way to the model."""
_QUOTE, _OPEN_OBJECT = b'"{'
_OPEN = b"{["

_utf8_decoder = codecs.getincrementaldecoder("utf-8")


class _StreamOptions(msgspec.Struct):
    include_usage: Any = None


class _Metadata(msgspec.Struct):
    user_id: str = ""


_NULL = msgspec.Raw(b"null")

if TYPE_CHECKING:
    _Model = str
else:
    _Model = object
    """What the decoder gives to `_heard`, each time that a request names its model."""


class Peek(msgspec.Struct):
    """The fields of a request that we read; all others pass unseen.

    Those that are raw are read when somebody asks, and of any type: a wrong one is the upstream's to refuse.
    """

    names_one_model: ClassVar[bool] = False
    """True when it is known that no second `model` stands in the body, however that is spelt."""

    model: _Model
    stream: bool | None = False
    stream_options: _StreamOptions | msgspec.UnsetType | None = msgspec.UNSET
    max_tokens: Any = None
    max_completion_tokens: Any = None
    max_output_tokens: Any = None
    previous_response_id: Any = None
    raw_metadata: msgspec.Raw = msgspec.field(default=_NULL, name="metadata")
    raw_prompt_cache_key: msgspec.Raw = msgspec.field(default=_NULL, name="prompt_cache_key")
    raw_user: msgspec.Raw = msgspec.field(default=_NULL, name="user")
    raw_store: msgspec.Raw = msgspec.field(default=_NULL, name="store")
    raw_messages: msgspec.Raw = msgspec.field(default=_NULL, name="messages")
    raw_input: msgspec.Raw = msgspec.field(default=_NULL, name="input")
    raw_system: msgspec.Raw = msgspec.field(default=_NULL, name="system")
    raw_tools: msgspec.Raw = msgspec.field(default=_NULL, name="tools")
    raw_instructions: msgspec.Raw = msgspec.field(default=_NULL, name="instructions")
    raw_thinking: msgspec.Raw = msgspec.field(default=_NULL, name="thinking")
    raw_reasoning: msgspec.Raw = msgspec.field(default=_NULL, name="reasoning")
    raw_reasoning_effort: msgspec.Raw = msgspec.field(default=_NULL, name="reasoning_effort")

    @property
    def asks_for_usage(self) -> bool:
        """True when the client wants the usage chunk of an OpenAI stream."""
        options = self.stream_options
        return isinstance(options, _StreamOptions) and options.include_usage is True

    @property
    def most_output(self) -> int:
        """The most tokens that the client lets the model write, 0 when it does not say."""
        for value in (self.max_completion_tokens, self.max_output_tokens, self.max_tokens):
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
        return 0

    @property
    def user_id(self) -> str:
        """Anthropic's `metadata.user_id`, empty when there is none."""
        try:
            return lenient.decode(_metadata, self.raw_metadata).user_id
        except lenient.UNREADABLE:
            return ""

    @property
    def prompt_cache_key(self) -> str:
        """OpenAI's key for requests that share a prompt's beginning, empty when there is none."""
        return _read_text(self.raw_prompt_cache_key)

    @property
    def user(self) -> str:
        """OpenAI's name for the end user, empty when there is none."""
        return _read_text(self.raw_user)

    @property
    def store(self) -> bool:
        """True unless the client asks that its answer is not kept; by default Responses are."""
        return bytes(self.raw_store).strip() != b"false"


class _Sole(Peek):
    names_one_model: ClassVar[bool] = True


def _read_text(raw: msgspec.Raw) -> str:
    try:
        return lenient.decode(_string, raw)
    except lenient.UNREADABLE:
        return ""


class _Raw(msgspec.Struct):
    """The same fields of any type, so that a wrong one can be named."""

    model: Any = msgspec.UNSET
    stream: Any = None
    stream_options: Any = None


_named: list[str] = []
"""The models that the request names which is being decoded. That is one step, which nothing else comes between."""


def _heard(_: object, model: object) -> str:
    if not isinstance(model, str):
        raise TypeError("`model` must be a string")
    _named.append(model)
    return model


_peek = msgspec.json.Decoder(_Sole, dec_hook=_heard)
_raw = msgspec.json.Decoder(_Raw)
_metadata = msgspec.json.Decoder(_Metadata)
_string = msgspec.json.Decoder(str)
_any = msgspec.json.Decoder()


def peek(body: bytes) -> Peek:
    """What we read of a JSON request. Raises RequestError, which never quotes the body."""
    try:
        _check_utf8(body)
        _named.clear()
        request: Peek = lenient.decode(_peek, body)
    except lenient.UNREADABLE as exc:
        raise _explain(body, exc) from exc
    if len(_named) != 1:
        request = Peek(**msgspec.structs.asdict(request))
    if lenient.REPLACEMENT in request.model:
        raise RequestError("`model` is no text", param="model")
    if not request.model:
        raise RequestError("`model` must not be empty", param="model")
    return request


def _check_utf8(body: bytes) -> None:
    """Raises UnicodeDecodeError. msgspec looks only at the strings that it decodes, and skips most of a request."""
    if body.isascii():
        return
    decoder = _utf8_decoder()
    for at in range(0, len(body), _UTF8_STEP_BYTES):
        decoder.decode(body[at : at + _UTF8_STEP_BYTES])
    decoder.decode(b"", final=True)


def _explain(body: bytes, exc: Exception) -> RequestError:
    match exc:
        case UnicodeDecodeError():
            return RequestError("the request's body is no valid UTF-8")
        case RecursionError():
            return RequestError("the request's body is nested too deeply")
        case msgspec.ValidationError():
            return _explain_types(body)
        case _:
            return RequestError(f"the request's body is no valid JSON: {exc}")


def _explain_types(body: bytes) -> RequestError:
    """Which field has the wrong type; behind it the body may be malformed as well."""
    try:
        request = lenient.decode(_raw, body)
    except msgspec.ValidationError:
        if body.lstrip()[:1] == b"{":
            return RequestError("a number in the request's body is out of range")
        return RequestError("the request's body must be a JSON object")
    except (msgspec.DecodeError, RecursionError) as exc:
        return _explain(body, exc)
    if request.model is msgspec.UNSET:
        return RequestError("`model` is missing", param="model")
    if not isinstance(request.model, str):
        return RequestError("`model` must be a string", param="model")
    if not isinstance(request.stream, bool | None):
        return RequestError("`stream` must be true or false", param="stream")
    if not isinstance(request.stream_options, dict | None):
        return RequestError("`stream_options` must be an object", param="stream_options")
    return RequestError("a number in the request's body is out of range")


def estimate_tokens(body: bytes) -> int:
    """Prompt tokens that a request will cost, from one scan of its bytes: good for a reservation, not for a bill.

    A quarter of the bytes; a long run without spaces (base64 of an image or a file, 512 bytes or more) counts 1 000.
    """
    length, runs = len(body), 0
    if length >= _RUN_BYTES and _may_hold_run(body):
        for part in body.split(b'"'):
            if len(part) >= _RUN_BYTES and b" " not in part and b"\\" not in part and part.isascii():
                length -= len(part)
                runs += 1
    return max(1, length // _BYTES_PER_TOKEN + runs * _TOKENS_PER_RUN)


def _may_hold_run(body: bytes) -> bool:
    """False when no two spaces are as far apart as a run is long, in one step of C code."""
    spaced = _SPACED.match(body)
    assert spaced is not None, "nothing matches too"
    return len(body) - spaced.end() >= _RUN_BYTES


# -- edits -------------------------------------------------------------------------------------------------------------


def values_at(body: bytes, path: tuple[str, ...]) -> list[tuple[int, int]]:
    """Where the values under a path of keys stand in a valid JSON body, as (start, end).

    A key that is repeated counts each time, and may be spelt with escapes. Costs some 4 ns a byte of long strings.
    """
    masked = _masked(body)
    found: list[tuple[int, int]] = []
    depth = on_path = 0  # How many containers are open, and how many of them, from the outermost, are on the path.
    leads_on = False  # The last key at the path's end so far is its next step.
    for token in _TOKEN.finditer(masked):
        first = masked[token.start()]
        if first == _QUOTE:
            if depth == on_path and depth and token.end(2) >= 0:
                leads_on = _spells(body[token.start() : token.end(1)], path[depth - 1])
                if leads_on and depth == len(path):
                    found.append(_value_at(masked, token.end()))
        elif first in _OPEN:
            if first == _OPEN_OBJECT and depth == on_path < len(path) and (leads_on or depth == 0):
                on_path += 1
            depth += 1
        else:
            if depth == on_path:
                on_path -= 1
            depth -= 1
    return found


def _masked(body: bytes) -> bytes:
    """The same JSON for who looks for its structure: of the same length, with no escaped quotes in its strings."""
    if b"\\" not in body:
        return body
    return body.replace(b"\\\\", b"..").replace(b'\\"', b"..")


def _spells(token: bytes, key: str) -> bool:
    if b"\\" in token:
        return bool(lenient.decode(_any, token) == key)
    return token[1:-1] == key.encode()


def _value_at(body: bytes, at: int) -> tuple[int, int]:
    """The value that begins at or after a place of a masked body, as (start, end)."""
    scalar = _SCALAR.search(body, at)
    assert scalar is not None, "a key has a value"
    start = scalar.start()
    if body[start] == _QUOTE:
        return start, body.index(b'"', start + 1) + 1
    if body[start] not in _OPEN:
        return start, scalar.end()
    depth = 0
    for token in _TOKEN.finditer(body, start):
        first = body[token.start()]
        if first != _QUOTE:
            depth += 1 if first in _OPEN else -1
        if depth == 0:
            return start, token.end()
    raise AssertionError("the body is valid JSON")


def _edited(body: bytes, edits: Iterable[tuple[int, int, bytes]]) -> bytes:
    """The body with each (start, end) replaced; the edits are in order."""
    parts, at = [], 0
    for start, end, new in edits:
        parts += [body[at:start], new]
        at = end
    return b"".join((*parts, body[at:]))


def replace_string(body: bytes, path: tuple[str, ...], new: str) -> bytes:
    """The body with the string under a path of keys replaced; values of other types there are left alone."""
    value = msgspec.json.encode(new)
    places = values_at(body, path)
    return _edited(body, [(start, end, value) for start, end in places if body[start] == _QUOTE])


def replace_model(body: bytes, new: str, peeked: Peek) -> bytes:
    """The body with its top-level `model` replaced, which was read as `peeked`.

    A body in which nothing stands but the new name already is given back as it is. One that names several models is
    edited in any case: upstreams do not agree with us, or each other, on which of them counts.
    """
    if peeked.names_one_model and new == peeked.model:
        return body
    is_long = len(body) >= _LONG_BYTES
    place = _place_of_model(body, peeked) if is_long and peeked.names_one_model else None
    place = place or _place_of_only_model(body)
    if place is None:
        return replace_string(body, ("model",), new)
    if new == peeked.model:
        return body
    start, end = place
    rest = memoryview(body)[end:] if is_long else body[end:]  # The view saves a copy, and costs as much as a short one.
    return b"".join((body[:start], msgspec.json.encode(new), rest))


def _place_of_model(body: bytes, peeked: Peek) -> tuple[int, int] | None:
    """Where the value of the only top-level `model` stands, behind members that are short or were read; else None."""
    member = _MEMBER.match(body)
    if member is not None and member[1] != b"model":
        member = _member_model(body, member, peeked)
    value = _SHORT.match(body, member.end()) if member is not None else None
    return value.span() if value is not None else None


def _member_model(body: bytes, member: re.Match[bytes], peeked: Peek) -> re.Match[bytes] | None:
    long = {
        b"messages": peeked.raw_messages,
        b"input": peeked.raw_input,
        b"system": peeked.raw_system,
        b"tools": peeked.raw_tools,
    }
    for _ in range(_MEMBERS):
        at = member.end()
        raw = long.get(member[1])
        if raw is None:
            short = _SHORT.match(body, at)
            if short is None:
                return None
            at = short.end()
        else:
            value = bytes(raw)
            if not body.startswith(value, at):
                return None  # The key is there twice, and the other one was read.
            at += len(value)
        following = _MEMBER.match(body, at)
        if following is None or following[1] == b"model":
            return following
        member = following
    return None


def _place_of_only_model(body: bytes) -> tuple[int, int] | None:
    """Where the value of `model` stands in a body that names it, None if there may be more of them."""
    # Where these bytes stand only once and no letter is escaped, they are that key.
    at = body.rfind(b'"model"')  # From the end: that is the faster search by far.
    if at < 0 or body.rfind(b'"model"', 0, at) >= 0 or may_spell_letters(body):
        return None
    model = _MODEL.match(body, at)
    assert model is not None, "the model is a string"
    return model.span(1)


def ask_for_usage(body: bytes, peeked: Peek) -> bytes:
    """An OpenAI request, read as `peeked`, whose stream will end with its usage: include_usage is true."""
    places = values_at(body, ("stream_options",)) if peeked.stream_options is not msgspec.UNSET else []
    if places:
        return _edited(body, [(start, end, _with_usage(body[start:end])) for start, end in places])
    return _with_member(body, b'"stream_options":{"include_usage":true}')


def may_spell_letters(body: bytes) -> bool:
    """False when no key can be spelt with escaped letters. The first look is the fast one."""
    return body.rfind(b"\\u00") >= 0 and _ESCAPED_LETTER.search(body) is not None


def _with_usage(options: bytes) -> bytes:
    if not options.startswith(b"{"):
        return b'{"include_usage":true}'
    flags = values_at(options, ("include_usage",))
    if flags:
        return _edited(options, [(start, end, b"true") for start, end in flags])
    return _with_member(options, b'"include_usage":true')


def _with_member(body: bytes, member: bytes) -> bytes:
    """The JSON object with a member more, at its front."""
    start = body.index(b"{")
    comma = b"" if _EMPTY_OBJECT.match(body, start) else b","
    return b"".join((body[: start + 1], member, comma, memoryview(body)[start + 1 :]))


# -- ids of answers ----------------------------------------------------------------------------------------------------

_RESPONSE_HEAD = re.compile(rb'\s*+\{\s*+"id"\s*+:\s*+"([^"\\]++)"\s*+,\s*+"object"\s*+:\s*+"response"\s*+[,}]')


class _Answer(msgspec.Struct):
    id: Any = None
    object: Any = None


class _AnswerEvent(msgspec.Struct):
    type: Any = None
    response: msgspec.Raw = _NULL


_answer = msgspec.json.Decoder(_Answer)
_answer_event = msgspec.json.Decoder(_AnswerEvent)


def response_id_of_json(body: bytes) -> str:
    """The id of an answer of the Responses API, empty when the body is none.

    The first bytes are enough where the id stands at the front, as OpenAI writes it.
    """
    head = _RESPONSE_HEAD.match(body)
    if head:
        return head[1].decode("utf-8", "replace")
    try:
        answer = lenient.decode(_answer, body)
    except lenient.UNREADABLE:
        return ""
    return _text(answer.id) if answer.object == "response" else ""


def response_id_of_event(data: bytes) -> str:
    """The id of the answer that an event of the Responses API speaks of, empty when it names none.

    `response.created` is the first that does; each that tells of the whole answer does.
    """
    if b'"response"' not in data:
        return ""
    try:
        event = lenient.decode(_answer_event, data)
        if not _text(event.type).startswith("response."):
            return ""
        return _text(lenient.decode(_answer, event.response).id)
    except lenient.UNREADABLE:
        return ""


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


# -- forms -------------------------------------------------------------------------------------------------------------

_BOUNDARY = re.compile(r';\s*boundary=(?:"([^"]+)"|([^\s;]+))', re.IGNORECASE)
_DISPOSITION = re.compile(rb"^content-disposition:[ \t]*form-data([^\r\n]*)", re.IGNORECASE | re.MULTILINE)
# Read one after the other, so that a file name which holds `; name=` is no name.
_PARAMETER = re.compile(rb';\s*([^\s=;"]+)\s*=\s*(?:"((?:[^"\\]|\\.)*+)"|([^\s;"]*))')


def form_values(body: bytes, content_type: str, name: str) -> list[tuple[int, int]]:
    """Where the contents of the parts of a name stand in a multipart/form-data body (RFC 7578), as (start, end)."""
    match = _BOUNDARY.search(content_type)
    if match is None:
        raise RequestError("the form's Content-Type has no boundary")
    delimiter = b"\r\n--" + (match[1] or match[2]).encode("utf-8", "surrogateescape")
    found: list[tuple[int, int]] = []
    # The first delimiter may stand at the very front, without the line end that belongs to all others.
    at = len(delimiter) - 2 if body.startswith(delimiter[2:]) else _after(body, delimiter, 0)
    while at >= 0:
        head = body.find(b"\r\n\r\n", at)
        # An empty part's line end may be the one that ends its header.
        end = body.find(delimiter, head + 2)
        if head < 0 or end < 0:
            break
        if _part_name(body[at : head + 2]) == name.encode():
            found.append((head + 4, end))
        at = end + len(delimiter)
    return found


def _after(body: bytes, delimiter: bytes, at: int) -> int:
    """The place behind the next delimiter, -1 if there is none."""
    found = body.find(delimiter, at)
    return found + len(delimiter) if found >= 0 else -1


def _part_name(header: bytes) -> bytes | None:
    disposition = _DISPOSITION.search(header)
    for key, quoted, plain in _PARAMETER.findall(disposition[1]) if disposition else ():
        if key.lower() == b"name":
            return bytes(quoted or plain)
    return None


def peek_form(body: bytes, content_type: str) -> Peek:
    """What we read of a form: its model, and whether it asks for a stream. Raises RequestError without one model."""
    places = form_values(body, content_type, "model")
    if len(places) > 1:
        raise RequestError("the form has more than one `model`", param="model")
    model = body[slice(*places[0])].decode("utf-8", "replace").strip() if places else ""
    if not model:
        raise RequestError("the form has no `model`", param="model")
    streams = form_values(body, content_type, "stream")
    return Peek(model=model, stream=any(body[slice(*place)].strip().lower() == b"true" for place in streams))


def replace_form_model(body: bytes, content_type: str, new: str) -> bytes:
    """The form with its model replaced."""
    places = form_values(body, content_type, "model")
    return _edited(body, [(start, end, new.encode()) for start, end in places])
