"""Whole answers: Anthropic's read, and those of other services written as Anthropic's."""

from __future__ import annotations

from typing import assert_never

import msgspec

from balancer import lenient
from balancer.errors import UpstreamAnswerError
from balancer.translation import marks
from balancer.translation.answer import Answer, Echo, Said
from balancer.translation.conversation import Call, Refusal, Target, Text, Thinking
from balancer.translation.messages.citing import Location, location
from balancer.translation.messages.ending import NULL, STOPS, counts, reason, usage
from balancer.translation.messages.ids import NewIds
from balancer.translation.messages.turns import arguments


class Failure(msgspec.Struct, frozen=True):
    """What an error says."""

    type: str | None = None
    message: str | None = None


class StopDetails(msgspec.Struct, frozen=True):
    """Why the model refuses."""

    explanation: str | None = None


class Block(msgspec.Struct, frozen=True):
    """A block of an answer, of any type."""

    type: str = ""
    text: str | None = None
    citations: list[Location] | None = None
    thinking: str | None = None
    signature: str | None = None
    data: str | None = None
    id: str | None = None
    name: str | None = None
    input: msgspec.Raw = NULL

    def arguments(self) -> str:
        """The input of a call, as JSON."""
        return "{}" if self.input == NULL else bytes(self.input).decode("utf-8", "replace")


class _Message(msgspec.Struct, frozen=True):
    id: str | None = None
    model: str | None = None
    content: list[msgspec.Raw] | None = None
    stop_reason: str | None = None
    stop_sequence: str | None = None
    stop_details: msgspec.Raw = NULL
    usage: msgspec.Raw = NULL
    error: Failure | None = None


_message = msgspec.json.Decoder(_Message)
_block = msgspec.json.Decoder(Block)
_details = msgspec.json.Decoder(StopDetails | None)
_encoder = msgspec.json.Encoder()


def read_answer(body: bytes, target: Target) -> Answer:
    """What the model said. Blocks of tools that Anthropic itself runs are left out.

    Raises UpstreamAnswerError for what is no message.
    """
    try:
        message = lenient.decode(_message, body)
    except lenient.UNREADABLE as exc:
        raise UpstreamAnswerError("the upstream's answer is no message of Anthropic's API") from exc
    if message.content is None:
        kind = message.error.type if message.error else None
        told = f": it is an error of the type {kind[:64]!r}" if kind else ""
        raise UpstreamAnswerError(f"the upstream's answer is no message of Anthropic's API{told}")
    parts = [part for raw in message.content if (part := _said(raw, target.vendor)) is not None]
    explanation = explained(message.stop_details)
    if explanation:
        parts.append(Refusal(text=explanation))
    return Answer(
        id=message.id or "",
        model=message.model or "",
        parts=tuple(parts),
        stop=STOPS.get(message.stop_reason or "", "end"),
        stop_sequence=message.stop_sequence or "",
        usage=counts(message.usage),
    )


def explained(details: msgspec.Raw) -> str:
    """Why the model refuses, empty when nothing says so."""
    try:
        found = lenient.decode(_details, details)
    except lenient.UNREADABLE:
        return ""
    return (found.explanation or "") if found else ""


def _said(raw: msgspec.Raw, vendor: str) -> Said | None:
    try:
        block = lenient.decode(_block, raw)
    except lenient.UNREADABLE:
        return None
    match block.type:
        case "text":
            citations = tuple(found for item in block.citations or () if (found := item.citation()) is not None)
            return Text(text=block.text or "", citations=citations)
        case "thinking":
            return Thinking(text=block.thinking or "", signature=block.signature or "", vendor=vendor)
        case "redacted_thinking":
            return Thinking(signature=block.data or "", vendor=vendor, is_redacted=True)
        case "tool_use":
            return Call(id=block.id or "", name=block.name or "", arguments=block.arguments())
        case _:
            return None


def write_answer(answer: Answer, echo: Echo) -> bytes:
    """The answer as a message."""
    ids = NewIds(echo.id)
    blocks = [block for part in answer.parts if (block := _written(part, ids)) is not None]
    calls = any(isinstance(part, Call) for part in answer.parts)
    refuses = any(isinstance(part, Refusal) for part in answer.parts)
    return _encoder.encode(
        {
            "id": answer.id or f"msg_{echo.id}",
            "type": "message",
            "role": "assistant",
            "model": echo.model,
            "content": blocks,
            "stop_reason": reason(answer.stop, calls=calls, refuses=refuses),
            "stop_sequence": answer.stop_sequence or None,
            "usage": usage(answer.usage),
        }
    )


def _written(part: Said, ids: NewIds) -> dict[str, object] | None:
    match part:
        case Text():
            if not part.text:
                return None
            block: dict[str, object] = {"type": "text", "text": part.text}
            locations = [found for citation in part.citations if (found := location(citation)) is not None]
            if locations:
                block["citations"] = locations
            return block
        case Thinking():
            if not part.text and not part.signature:
                return None
            sealed = marks.sealed(part.vendor, part.signature)
            if part.is_redacted:
                return {"type": "redacted_thinking", "data": sealed}
            return {"type": "thinking", "thinking": part.text, "signature": sealed}
        case Call():
            return {"type": "tool_use", "id": ids.of(part.id), "name": part.name, "input": arguments(part.arguments)}
        case Refusal():
            return {"type": "text", "text": part.text} if part.text else None
    assert_never(part)
