"""What Google's answers look like: a whole one, and each chunk of a stream, are of one shape."""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec

from balancer import lenient
from balancer.translation.answer import Counts

NULL = msgspec.Raw(b"null")
_NO_ARGUMENTS = "{}"


class FunctionCall(msgspec.Struct, frozen=True):
    """The model calls a tool."""

    id: str | None = None
    name: str | None = None
    args: msgspec.Raw = NULL


class Blob(msgspec.Struct, frozen=True, rename="camel"):
    """Base64 of an image, or of another medium."""

    mime_type: str | None = None
    data: str | None = None


class Code(msgspec.Struct, frozen=True):
    """What the model let Google run."""

    language: str | None = None
    code: str | None = None


class Run(msgspec.Struct, frozen=True):
    """What came of that."""

    output: str | None = None


class Part(msgspec.Struct, frozen=True, rename="camel"):
    """One of its fields is there, and a signature may be, which belongs to the thoughts before."""

    text: str | None = None
    thought: bool | None = None
    thought_signature: str | None = None
    function_call: FunctionCall | None = None
    inline_data: Blob | None = None
    executable_code: Code | None = None
    code_execution_result: Run | None = None


class Content(msgspec.Struct, frozen=True):
    """What the model says."""

    parts: list[Part] | None = None


class Candidate(msgspec.Struct, frozen=True, rename="camel"):
    """One answer; one is asked for."""

    content: Content | None = None
    finish_reason: str | None = None
    finish_message: str | None = None
    grounding_metadata: msgspec.Raw = NULL
    citation_metadata: msgspec.Raw = NULL


class Feedback(msgspec.Struct, frozen=True, rename="camel"):
    """Why a prompt was not answered."""

    block_reason: str | None = None
    block_reason_message: str | None = None


class Error(msgspec.Struct, frozen=True):
    """google.rpc.Status."""

    code: Any = None
    message: Any = None
    status: Any = None


class Body(msgspec.Struct, frozen=True, rename="camel"):
    """An answer, or a chunk of one."""

    candidates: list[Candidate] | None = None
    prompt_feedback: Feedback | None = None
    usage_metadata: msgspec.Raw = NULL
    response_id: str | None = None
    model_version: str | None = None
    error: Error | None = None


class _Usage(msgspec.Struct, frozen=True, rename="camel"):
    prompt_token_count: int | None = None
    candidates_token_count: int | None = None
    thoughts_token_count: int | None = None
    tool_use_prompt_token_count: int | None = None
    cached_content_token_count: int | None = None


_body = msgspec.json.Decoder(Body)
_bodies = msgspec.json.Decoder(list[Body])
_any = msgspec.json.Decoder()
_usage = msgspec.json.Decoder(_Usage)


def read_body(data: bytes) -> Body:
    """What the bytes hold; an error may come as a list of one. Raises lenient.UNREADABLE for what is no JSON."""
    try:
        return _body.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError):
        try:
            if data.lstrip().startswith(b"["):
                bodies = lenient.decode(_bodies, data)
                return bodies[0] if bodies else Body()
            return lenient.decode(_body, data)
        except msgspec.ValidationError:
            return _salvaged(data)


def _salvaged(data: bytes) -> Body:
    """What of a body is of the kind that it should be, where some of it is not."""
    fields = _fitting(lenient.decode(_any, data), Body)
    candidates = [_fitting(item, Candidate) for item in _items(fields.get("candidates"))]
    for candidate in candidates[:1]:
        content = candidate.get("content")
        parts = _items(content.get("parts")) if isinstance(content, dict) else []
        kept = [found for part in parts if (found := _converted(_fitting(part, Part), Part)) is not None]
        candidate["content"] = {"parts": kept}
    fields["candidates"] = candidates[:1]
    body: Body = msgspec.convert(fields, Body)
    return body


def _fitting(table: object, kind: type[msgspec.Struct]) -> dict[str, Any]:
    """The fields of a table that a struct can have; what is nested in it stays for whoever looks there."""
    if not isinstance(table, dict):
        return {}
    kept: dict[str, Any] = {}
    for field in msgspec.structs.fields(kind):
        value = table.get(field.encode_name)
        if field.encode_name in ("candidates", "content"):
            kept[field.encode_name] = value
        elif field.encode_name == "functionCall":
            if isinstance(value, dict):
                kept[field.encode_name] = _fitting(value, FunctionCall)
        elif field.type is msgspec.Raw:
            if value is not None:
                kept[field.encode_name] = msgspec.Raw(msgspec.json.encode(value))
        elif value is not None and (found := _converted(value, field.type)) is not None:
            kept[field.encode_name] = found
    return kept


def _converted(value: object, kind: Any) -> Any:
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError:
        return None


def _items(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def counts(table: msgspec.Raw) -> Counts | None:
    """The tokens of a `usageMetadata`, None where they cannot be read.

    What is cached is part of the prompt; the results of Google's own tools are read too, and thoughts are written.
    """
    try:
        usage = _usage.decode(table)
    except lenient.UNREADABLE:
        return None
    thoughts = usage.thoughts_token_count or 0
    return Counts(
        input=max(0, (usage.prompt_token_count or 0) + (usage.tool_use_prompt_token_count or 0)),
        output=max(0, (usage.candidates_token_count or 0) + thoughts),
        cached=max(0, usage.cached_content_token_count or 0),
        reasoning=max(0, thoughts),
    )


def call_id(call: FunctionCall, seed: str, index: int) -> str:
    """The call's id, or one that no other call of any answer has: older models give none."""
    return call.id or f"call_{hashlib.sha256(f'{seed}:{index}'.encode()).hexdigest()[:24]}"


def seed_of(body: Body, data: bytes) -> str:
    """What tells one answer from all others."""
    return body.response_id or hashlib.sha256(data).hexdigest()


def arguments(call: FunctionCall) -> str:
    """What a tool is called with, as JSON text."""
    text = bytes(call.args).decode("utf-8", "replace")
    return _NO_ARGUMENTS if text == "null" else text


def shown(part: Part) -> str:
    """A part that is neither text nor a call, as text: an image as one of Markdown's, code and its output as blocks."""
    blob, code, run = part.inline_data, part.executable_code, part.code_execution_result
    if blob is not None and blob.data:
        is_image = (blob.mime_type or "").startswith("image/")
        return f"{'!' if is_image else ''}[{blob.mime_type or 'data'}](data:{blob.mime_type or ''};base64,{blob.data})"
    if code is not None and code.code:
        return f"\n```{(code.language or '').lower()}\n{code.code.rstrip()}\n```\n"
    if run is not None and run.output:
        return f"\n```\n{run.output.rstrip()}\n```\n"
    return ""
