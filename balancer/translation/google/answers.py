"""A whole answer of Google's."""

from __future__ import annotations

import msgspec

from balancer import lenient
from balancer.errors import UpstreamAnswerError
from balancer.translation.answer import Answer, Said
from balancer.translation.conversation import Call, Refusal, Target, Text, Thinking
from balancer.translation.google import shapes
from balancer.translation.google.citing import citations_of, place_in
from balancer.translation.google.ending import excuse, reason_of, stop_of


def read_answer(body: bytes, target: Target) -> Answer:
    """The answer. Raises UpstreamAnswerError for what is none."""
    try:
        read = shapes.read_body(body)
    except lenient.UNREADABLE as exc:
        raise UpstreamAnswerError("the upstream's answer is not one of generateContent") from exc
    candidate = read.candidates[0] if read.candidates else None
    reason = reason_of(read, candidate)
    if read.error is not None or (candidate is None and not reason):
        raise UpstreamAnswerError("the upstream's answer has no candidate, and no reason why")
    parts = _parts(read, body, candidate, target) if candidate is not None else []
    has_calls = any(isinstance(part, Call) for part in parts)
    has_said = has_calls or any(isinstance(part, Text) for part in parts)
    excuse_ = excuse(reason, (candidate and candidate.finish_message) or "", has_said=has_said) if reason else ""
    if excuse_:
        parts.append(Refusal(text=excuse_))
    return Answer(
        id=read.response_id or "",
        model=read.model_version or "",
        parts=tuple(parts),
        stop="refused" if excuse_ else stop_of(reason, has_calls=has_calls),
        usage=shapes.counts(read.usage_metadata) if read.usage_metadata is not shapes.NULL else None,
    )


def _parts(read: shapes.Body, data: bytes, candidate: shapes.Candidate, target: Target) -> list[Said]:
    parts: list[Said] = []
    seed, calls = shapes.seed_of(read, data), 0
    for part in (candidate.content and candidate.content.parts) or ():
        signature, text = part.thought_signature or "", part.text or ""
        if part.thought:
            _think(parts, text, signature, target.vendor)
            continue
        if signature:
            _think(parts, "", signature, target.vendor)
        call = part.function_call
        if not text and call is not None and call.name:
            parts.append(Call(id=shapes.call_id(call, seed, calls), name=call.name, arguments=shapes.arguments(call)))
            calls += 1
        elif text or part.text is None:
            _tell(parts, text or shapes.shown(part))
    citations = citations_of(candidate, place_in("".join(part.text for part in parts if isinstance(part, Text))))
    if citations:
        at = next((i for i in reversed(range(len(parts))) if isinstance(parts[i], Text)), None)
        if at is not None:
            parts[at] = msgspec.structs.replace(parts[at], citations=tuple(citations))
    return parts


def _think(parts: list[Said], text: str, signature: str, vendor: str) -> None:
    """More of a thought, or the signature of the one before."""
    last = parts[-1] if parts else None
    if isinstance(last, Thinking) and not last.signature:
        parts[-1] = msgspec.structs.replace(last, text=last.text + text, signature=signature)
    else:
        parts.append(Thinking(text=text, signature=signature, vendor=vendor))


def _tell(parts: list[Said], text: str) -> None:
    last = parts[-1] if parts else None
    if isinstance(last, Text):
        parts[-1] = msgspec.structs.replace(last, text=last.text + text)
    elif text:
        parts.append(Text(text=text))
