"""A whole answer as a response object."""

from __future__ import annotations

import msgspec

from balancer.translation.answer import Answer, Echo
from balancer.translation.chat import inputs
from balancer.translation.chat.answers import custom_tools
from balancer.translation.conversation import Call, Refusal, Text, Thinking
from balancer.translation.responses import objects, seals
from balancer.translation.responses.kept import Kept, kept_of
from balancer.translation.responses.objects import (
    CustomCall,
    FunctionCall,
    Item,
    Message,
    OutputRefusal,
    OutputText,
    ReasoningItem,
    Status,
    Summary,
)


def write_answer(answer: Answer, echo: Echo) -> bytes:
    """The response object. Texts that stand side by side are one message; each thought is an item."""
    kept = kept_of(echo.conversation)
    has_refusal = any(isinstance(part, Refusal) for part in answer.parts)
    status, reason = objects.ending(answer.stop, has_refusal)
    return objects.response(
        echo,
        kept,
        answer.id,
        answer.model,
        status=status,
        reason=reason,
        output=_items(answer, echo, kept, status),
        usage=answer.usage,
    )


def _items(answer: Answer, echo: Echo, kept: Kept, status: Status) -> list[Item]:
    customs = custom_tools(echo.conversation)
    items: list[Item] = []
    content: list[OutputText | OutputRefusal] = []
    for part in answer.parts:
        match part:
            case Text() if part.text or part.citations:
                annotations = objects.annotated(part.citations, len(part.text))
                content.append(OutputText(text=part.text, annotations=annotations))
            case Refusal() if part.text:
                content.append(OutputRefusal(refusal=part.text))
            case Text() | Refusal():
                continue
            case Thinking():
                _close(content, items, echo)
                items += _thought(part, echo, kept, len(items))
            case Call():
                _close(content, items, echo)
                items.append(_call(part, echo, kept, customs, len(items)))
    _close(content, items, echo)
    if items and not isinstance(items[-1], ReasoningItem):
        items[-1] = msgspec.structs.replace(items[-1], status=status)
    return items


def _close(content: list[OutputText | OutputRefusal], items: list[Item], echo: Echo) -> None:
    if content:
        message_id = objects.item_id(Message, echo, len(items))
        items.append(Message(id=message_id, status="completed", content=tuple(content)))
        content.clear()


def _thought(part: Thinking, echo: Echo, kept: Kept, index: int) -> list[Item]:
    sealed = ""
    if kept.is_sealed and part.vendor:
        sealed = seals.sealed(part.vendor, part.signature, is_redacted=part.is_redacted)
    if not (part.text or (sealed and part.signature)):
        return []
    return [
        ReasoningItem(
            id=objects.item_id(ReasoningItem, echo, index),
            summary=(Summary(text=part.text),) if part.text else (),
            encrypted_content=sealed or msgspec.UNSET,
        )
    ]


def _call(call: Call, echo: Echo, kept: Kept, customs: frozenset[str], index: int) -> Item:
    namespace, name = kept.namespaces.get(call.name, (msgspec.UNSET, call.name))
    if call.kind == "custom" or call.name in customs:
        return CustomCall(
            id=objects.item_id(CustomCall, echo, index),
            status="completed",
            call_id=call.id,
            name=name,
            input=call.arguments if call.kind == "custom" else inputs.bare(call.arguments),
            namespace=namespace,
        )
    return FunctionCall(
        id=objects.item_id(FunctionCall, echo, index),
        status="completed",
        call_id=call.id,
        name=name,
        arguments=call.arguments or "{}",
        namespace=namespace,
    )
