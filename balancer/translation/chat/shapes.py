"""What chat completions upstreams answer, whole and in chunks, as structs: every field may be absent or null.

One Message serves `message` and `delta`. Vendors' own fields stand beside OpenAI's: `reasoning_content` (DeepSeek,
vLLM, Moonshot), `reasoning` and `reasoning_details` (OpenRouter), content in parts with `thinking` (Mistral), usage
inside of a choice (Moonshot), tokens of a cache under names of their own (DeepSeek, Moonshot).
"""

from __future__ import annotations

import hashlib
from typing import Any, TypeVar

import msgspec

from balancer import lenient
from balancer.translation.answer import Counts, Stop
from balancer.translation.chat.salvage import fitting
from balancer.translation.conversation import Citation

T = TypeVar("T", bound=msgspec.Struct)

Number = int | float | None
Tokens = dict[str, Any]


class Piece(msgspec.Struct, gc=False):
    """A part of content that is a list."""

    type: str | None = None
    text: str | None = None
    thinking: Any = None


class Detail(msgspec.Struct, gc=False):
    """An entry of OpenRouter's `reasoning_details`: text, a summary, or what is encrypted."""

    type: str | None = None
    text: str | None = None
    summary: str | None = None
    data: str | None = None
    signature: str | None = None
    format: str | None = None
    id: str | None = None
    index: Number = None


class Function(msgspec.Struct, gc=False):
    """What is called; some servers give the arguments as an object."""

    name: str | None = None
    arguments: str | dict[str, Any] | None = None


class Custom(msgspec.Struct, gc=False):
    """Which custom tool is called, with what."""

    name: str | None = None
    input: str | None = None


class ToolCall(msgspec.Struct, gc=False):
    """A call, or a piece of one."""

    index: Number = None
    id: str | None = None
    function: Function | None = None
    custom: Custom | None = None


class UrlCitation(msgspec.Struct, gc=False):
    """A page of the web, and the characters that go back to it."""

    url: str | None = None
    title: str | None = None
    content: str | None = None
    start_index: Number = None
    end_index: Number = None


class Annotation(msgspec.Struct, gc=False):
    """What stands beside a text; we read citations of the web."""

    type: str | None = None
    url_citation: UrlCitation | None = None


class Message(msgspec.Struct):
    """What the model says, or a piece of that."""

    content: str | list[Piece] | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    reasoning_details: list[Detail] | None = None
    refusal: str | None = None
    tool_calls: list[ToolCall] | None = None
    function_call: Function | None = None
    annotations: list[Annotation] | None = None


class PromptDetails(msgspec.Struct, gc=False):
    """Of the tokens of the prompt."""

    cached_tokens: Number = None
    cache_write_tokens: Number = None


class CompletionDetails(msgspec.Struct, gc=False):
    """Of the tokens of the completion."""

    reasoning_tokens: Number = None


class Usage(msgspec.Struct, gc=False):
    """Tokens; those of the prompt include what a cache had."""

    prompt_tokens: Number = None
    completion_tokens: Number = None
    prompt_tokens_details: PromptDetails | None = None
    completion_tokens_details: CompletionDetails | None = None
    prompt_cache_hit_tokens: Number = None
    cached_tokens: Number = None


class Choice(msgspec.Struct):
    """One answer of those asked for, which is one."""

    index: Number = None
    delta: Message | None = None
    message: Message | None = None
    finish_reason: str | None = None
    usage: Usage | None = None


class Body(msgspec.Struct):
    """An answer, or a chunk of one; or an error, told with a 200."""

    id: str | None = None
    model: str | None = None
    object: str | None = None
    choices: list[Choice] | None = None
    usage: Usage | None = None
    error: Any = None
    message: Any = None
    code: Any = None


_body = msgspec.json.Decoder(Body)
_anything = msgspec.json.Decoder()


def read_body(data: bytes) -> Body:
    """The answer or the chunk; what does not fit in it is left out. Raises lenient.UNREADABLE for no JSON object."""
    try:
        return _body.decode(data)
    except lenient.UNREADABLE:
        value = lenient.decode(_anything, data)
        if not isinstance(value, dict):
            raise
        return fitting(Body, value)


class Failure(msgspec.Struct):
    """What an upstream says went wrong."""

    message: str
    code: str
    status: int


def failure_of(body: Body) -> Failure | None:
    """The error that stands where an answer should; None where there is none.

    OpenAI nests it, vLLM and SGLang put it on top (`object: error`), some give a bare text.
    """
    error = body.error
    if error is None or error is False or error == "" or error == {}:
        if body.object != "error":
            return None
        error = {"message": body.message, "code": body.code}
    if not isinstance(error, dict):
        return Failure(str(error), "", 0)
    code = error.get("code")
    status = next((found for found in map(_status, (code, error.get("status"), body.code)) if found), 0)
    name = code if isinstance(code, str) else error.get("type")
    message = error.get("message")
    return Failure(
        message if isinstance(message, str) and message else "the upstream tells of an error without a word",
        name if isinstance(name, str) else "",
        status,
    )


def _status(value: object) -> int:
    return value if isinstance(value, int) and 400 <= value <= 599 else 0


STOPS: dict[str, Stop] = {
    "stop": "end",
    "length": "length",
    "tool_calls": "tool",
    "function_call": "tool",
    "content_filter": "filtered",
    # Mistral's, for a full context window.
    "model_length": "context_length",
    # DeepSeek's, for an answer that its servers had to cut.
    "insufficient_system_resource": "length",
}
FINISHES: dict[Stop, str] = {
    "end": "stop",
    "length": "length",
    "tool": "tool_calls",
    "stop_sequence": "stop",
    "filtered": "content_filter",
    "refused": "content_filter",
    "paused": "stop",
    "context_length": "length",
}


def stop_of(reason: str, *, has_calls: bool, has_refusal: bool) -> Stop:
    """Why the model ended.

    `stop` beside calls is OpenAI's word where one was forced, and that of many servers for any call; beside a refusal
    it is one.
    """
    stop = STOPS.get(reason, "end")
    if stop == "end" and has_calls:
        return "tool"
    if stop == "end" and has_refusal:
        return "refused"
    return stop


def counts_of(usage: Usage) -> Counts:
    """The tokens."""
    prompt = usage.prompt_tokens_details
    completion = usage.completion_tokens_details
    return Counts(
        input=_count(usage.prompt_tokens),
        output=_count(usage.completion_tokens),
        cached=_count(prompt.cached_tokens if prompt else None)
        or _count(usage.prompt_cache_hit_tokens)
        or _count(usage.cached_tokens),
        cache_creation=_count(prompt.cache_write_tokens if prompt else None),
        reasoning=_count(completion.reasoning_tokens if completion else None),
    )


def _count(value: Number) -> int:
    return int(value) if value is not None and 0 < value < 2**53 else 0


def citations_of(annotations: list[Annotation]) -> tuple[Citation, ...]:
    """The pages of the web."""
    return tuple(
        Citation(
            url=found.url,
            title=found.title or "",
            quote=found.content or "",
            start=place_of(found.start_index),
            end=place_of(found.end_index),
        )
        for found in (each.url_citation for each in annotations)
        if found is not None and found.url
    )


def place_of(value: Number) -> int:
    """An index, -1 where there is none."""
    return int(value) if value is not None and 0 <= value < 2**53 else -1


def arguments_of(function: Function) -> str:
    """The arguments as JSON text."""
    arguments = function.arguments
    if isinstance(arguments, dict):
        return msgspec.json.encode(arguments).decode()
    return arguments or ""


def made_id(seed: str, index: int) -> str:
    """An id for a call that came without one."""
    return "call_" + hashlib.sha256(f"{seed}:{index}".encode()).hexdigest()[:24]


def seed_of(data: bytes) -> str:
    """What ids are made of where the answer has none itself."""
    return hashlib.sha256(data).hexdigest()


def text_of(content: str | list[Piece]) -> str:
    """The text of content in parts."""
    if isinstance(content, str):
        return content
    return "".join(piece.text or "" for piece in content if piece.thinking is None)


def thought_of(content: str | list[Piece]) -> str:
    """What was thought, of content in parts: Mistral gives it as parts of text again."""
    if isinstance(content, str):
        return ""
    return "".join(_thought(piece.thinking) for piece in content)


def _thought(thinking: object) -> str:
    match thinking:
        case str():
            return thinking
        case list():
            texts = (part.get("text") for part in thinking if isinstance(part, dict))
            return "".join(text for text in texts if isinstance(text, str))
        case _:
            return ""


# -- reasoning_details -------------------------------------------------------------------------------------------------


def packed(detail: Detail) -> str:
    """A detail without its text, in the place of a signature: `format` and `id` have to come back with it."""
    return msgspec.json.encode(
        [detail.type or "", detail.format or "", detail.id or "", detail.signature or detail.data or ""]
    ).decode()


_packed = msgspec.json.Decoder(tuple[str, str, str, str])


def unpacked(signature: str, text: str, index: int) -> dict[str, object] | None:
    """The detail again; None if the signature is none of ours."""
    try:
        kind, form, name, signed = _packed.decode(signature.encode("utf-8", "replace"))
    except lenient.UNREADABLE:
        return None
    detail: dict[str, object] = {"type": kind}
    if kind == "reasoning.encrypted":
        detail["data"] = signed
    else:
        detail["text"] = text
        detail["signature"] = signed
    if form:
        detail["format"] = form
    if name:
        detail["id"] = name
    detail["index"] = index
    return detail
