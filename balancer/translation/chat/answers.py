"""Whole chat completions: an upstream's into an Answer, and an Answer into a client's."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from balancer import lenient
from balancer.errors import UpstreamAnswerError
from balancer.translation import marks
from balancer.translation.answer import Answer, Counts, Echo, Said
from balancer.translation.chat import shapes
from balancer.translation.chat.inputs import bare
from balancer.translation.conversation import (
    Call,
    Citation,
    Conversation,
    Refusal,
    Target,
    Text,
    Thinking,
)

_PREFIX = "chatcmpl-"


def read_answer(body: bytes, target: Target) -> Answer:
    """What the upstream answered. Raises UpstreamAnswerError for what is no chat completion."""
    try:
        answer = shapes.read_body(body)
    except lenient.UNREADABLE as exc:
        raise UpstreamAnswerError("the upstream's answer is no JSON object") from exc
    failure = shapes.failure_of(answer)
    if failure is not None:
        raise UpstreamAnswerError(
            f"the upstream answered with an error in place of a completion ({failure.code or 'no code'})",
            status=failure.status or 502,
        )
    said = next((each for each in answer.choices or () if each.message or each.delta), None)
    message = (said.message or said.delta) if said is not None else None
    if said is None or message is None:
        raise UpstreamAnswerError("the upstream's answer has no choice with a message")
    parts = _parts(message, answer.id or shapes.seed_of(body), target.vendor)
    usage = answer.usage or said.usage
    return Answer(
        id=answer.id or "",
        model=answer.model or "",
        parts=tuple(parts),
        stop=shapes.stop_of(
            said.finish_reason or "stop",
            has_calls=any(isinstance(part, Call) for part in parts),
            has_refusal=any(isinstance(part, Refusal) for part in parts),
        ),
        usage=shapes.counts_of(usage) if usage is not None else None,
    )


def _parts(message: shapes.Message, seed: str, vendor: str) -> list[Said]:
    parts: list[Said] = list(_thoughts(message, vendor))
    content = message.content or ""
    text = shapes.text_of(content)
    citations = shapes.citations_of(message.annotations or [])
    if text or citations:
        parts.append(Text(text=text, citations=citations))
    if message.refusal:
        parts.append(Refusal(text=message.refusal))
    parts += _calls(message, seed)
    return parts


def _thoughts(message: shapes.Message, vendor: str) -> Iterable[Thinking]:
    details = message.reasoning_details or []
    plain = message.reasoning_content or message.reasoning or shapes.thought_of(message.content or "")
    if plain and not any(detail.text or detail.summary for detail in details):
        yield Thinking(text=plain, vendor=vendor)
    for detail in details:
        text = detail.text or detail.summary or ""
        has_more = bool(detail.data or detail.signature)
        if text or has_more:
            yield Thinking(
                text=text,
                signature=shapes.packed(detail) if has_more else "",
                vendor=vendor,
                is_redacted=bool(detail.data) and not detail.signature,
            )


def _calls(message: shapes.Message, seed: str) -> Iterable[Call]:
    calls = message.tool_calls or []
    if not calls and message.function_call is not None:
        calls = [shapes.ToolCall(function=message.function_call)]
    for index, call in enumerate(calls):
        call_id = call.id or shapes.made_id(seed, index)
        if call.custom is not None and call.custom.name:
            yield Call(id=call_id, name=call.custom.name, arguments=call.custom.input or "", kind="custom")
        elif call.function is not None and call.function.name:
            yield Call(id=call_id, name=call.function.name, arguments=shapes.arguments_of(call.function) or "{}")


# -- to clients --------------------------------------------------------------------------------------------------------


def write_answer(answer: Answer, echo: Echo) -> bytes:
    """The answer as a chat completion."""
    body: dict[str, Any] = {
        "id": id_of(answer.id, echo),
        "object": "chat.completion",
        "created": echo.created,
        "model": echo.model or answer.model,
        "choices": [
            {
                "index": 0,
                "message": _message(answer.parts, echo.conversation),
                "logprobs": None,
                "finish_reason": shapes.FINISHES[answer.stop],
            }
        ],
    }
    if answer.usage is not None:
        body["usage"] = usage_of(answer.usage)
    return msgspec.json.encode(body)


def _message(parts: Iterable[Said], conversation: Conversation) -> dict[str, Any]:
    custom = custom_tools(conversation)
    is_shown = shows_thoughts(conversation)
    content = refusal = thought = ""
    has_text = False
    details: list[dict[str, Any]] = []
    notes: list[dict[str, Any]] = []
    calls: list[dict[str, Any]] = []
    for part in parts:
        match part:
            case Text():
                has_text = True
                notes += url_citations(part.citations, len(content), len(content) + len(part.text))
                content += part.text
            case Thinking():
                text = part.text if is_shown else ""
                thought += text
                if text or part.signature:
                    details.append(detail_of(text, part.signature, part.vendor, part.is_redacted, len(details)))
            case Refusal():
                refusal += part.text
            case Call():
                calls.append(_call(part, custom))
    message: dict[str, Any] = {
        "role": "assistant",
        "content": content if has_text else None,
        "refusal": refusal or None,
    }
    if thought:
        message["reasoning_content"] = thought
    if details:
        message["reasoning_details"] = details
    if notes:
        message["annotations"] = notes
    if calls:
        message["tool_calls"] = calls
    return message


def _call(call: Call, custom: frozenset[str]) -> dict[str, Any]:
    if call.kind == "custom" or call.name in custom:
        text = call.arguments if call.kind == "custom" else bare(call.arguments)
        return {"id": call.id, "type": "custom", "custom": {"name": call.name, "input": text}}
    return {
        "id": call.id,
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments or "{}"},
    }


def id_of(given: str, echo: Echo) -> str:
    """The answer's id: the upstream's, or one of ours."""
    return given or _PREFIX + echo.id


def custom_tools(conversation: Conversation) -> frozenset[str]:
    """The names of the client's custom tools: calls of them go back bare, however the upstream makes them."""
    return frozenset(tool.name for tool in conversation.tools if tool.kind == "custom")


def shows_thoughts(conversation: Conversation) -> bool:
    """False when the client said that it will not have them: it gets what is signed, and no text."""
    return conversation.reasoning is None or conversation.reasoning.is_shown is not False


def detail_of(text: str, signature: str, vendor: str, is_redacted: bool, index: int) -> dict[str, Any]:
    """An entry of `reasoning_details`; its signature is sealed: whose it is comes back with it."""
    if is_redacted:
        return {
            "type": "reasoning.encrypted",
            "data": marks.sealed(vendor, signature),
            "format": vendor,
            "index": index,
        }
    return {
        "type": "reasoning.text",
        "text": text,
        "signature": marks.sealed(vendor, signature),
        "format": vendor,
        "index": index,
    }


def url_citations(citations: Iterable[Citation], begin: int, end: int) -> list[dict[str, Any]]:
    """Citations of the web, in characters of the whole content; their part of it is from `begin` to `end`.

    Citations of documents are left out: the API has no word for them.
    """
    return [
        {
            "type": "url_citation",
            "url_citation": {
                "url": each.url,
                "title": each.title,
                "start_index": begin + each.start if each.start >= 0 else begin,
                "end_index": begin + each.end if each.end >= 0 else end,
            },
        }
        for each in citations
        if each.url
    ]


def usage_of(counts: Counts) -> dict[str, Any]:
    """The tokens as OpenAI tells them."""
    prompt = {"cached_tokens": counts.cached}
    if counts.cache_creation:
        prompt["cache_write_tokens"] = counts.cache_creation
    return {
        "prompt_tokens": counts.input,
        "completion_tokens": counts.output,
        "total_tokens": counts.input + counts.output,
        "prompt_tokens_details": prompt,
        "completion_tokens_details": {"reasoning_tokens": counts.reasoning},
    }
