"""A stream's steps as the events of a response."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from balancer.translation.answer import (
    Broke,
    CallBegan,
    CallDelta,
    Counted,
    Counts,
    Echo,
    Ended,
    Pinged,
    RefusalDelta,
    Signed,
    Started,
    Step,
    Stop,
    Stopped,
    TextDelta,
    ThinkingDelta,
)
from balancer.translation.chat.answers import custom_tools
from balancer.translation.chat.inputs import Unwrapping
from balancer.translation.responses import objects, seals
from balancer.translation.responses.events import Events, OpenCall, OpenItem, OpenMessage, OpenReasoning
from balancer.translation.responses.kept import kept_of
from balancer.translation.responses.objects import CustomCall, FunctionCall, Message, ReasoningItem, Status

_PING = b": ping\n\n"


class StreamWriter:
    """Writes a client's events. An item is closed when the next begins; calls, which may interleave, at the end."""

    def __init__(self, echo: Echo) -> None:
        self._echo = echo
        self._kept = kept_of(echo.conversation)
        self._customs = custom_tools(echo.conversation)
        self._events = Events()
        self._started: Started | None = None
        self._items: list[OpenItem] = []
        self._message: OpenMessage | None = None
        self._reasoning: OpenReasoning | None = None
        self._calls: dict[int, OpenCall] = {}
        self._usage: Counts | None = None
        self._stop: Stop = "end"
        self._has_refusal = False
        self._begins = False

    def write(self, steps: Sequence[Step]) -> bytes:
        """The events that tell these steps."""
        return b"".join([self._written(step) for step in steps])

    def _written(self, step: Step) -> bytes:
        match step:
            case TextDelta():
                return self._text(step)
            case ThinkingDelta():
                return self._thinking(step)
            case CallDelta():
                call = self._calls.get(step.index)
                return b"" if call is None else call.more(step.arguments)
            case CallBegan():
                return self._began(step)
            case Signed():
                return self._signed(step)
            case RefusalDelta():
                return self._refusal(step)
            case Started():
                return self._start(step)
            case Counted():
                self._usage = step.usage
                return b""
            case Stopped():
                self._stop = step.stop
                return b""
            case Pinged():
                return _PING if self._started is not None else b""
            case Ended():
                return self._ended()
            case Broke():  # The gateway tells errors.
                return b""

    def _start(self, step: Started) -> bytes:
        if self._started is not None:
            return b""
        self._started = step
        self._usage = step.usage
        response = b'"response":' + objects.response(self._echo, self._kept, step.id, step.model)
        return self._events.event(b"response.created", response) + self._events.event(b"response.in_progress", response)

    def _text(self, step: TextDelta) -> bytes:
        if not (step.text or step.citations):
            self._begins |= step.begins
            return b""
        message = self._message
        if message is not None and not (step.begins or step.citations or self._begins):
            return message.text(step.text, (), False)  # The common case.
        begins, self._begins = step.begins or self._begins, False
        written, message = self._in_message()
        return written + message.text(step.text, step.citations, begins)

    def _refusal(self, step: RefusalDelta) -> bytes:
        if not step.text:
            return b""
        self._has_refusal = True
        written, message = self._in_message()
        return written + message.refusal(step.text)

    def _in_message(self) -> tuple[bytes, OpenMessage]:
        if self._message is not None:
            return b"", self._message
        written = self._close()
        index = len(self._items)
        item = Message(id=objects.item_id(Message, self._echo, index), status="in_progress")
        self._message = OpenMessage(self._events, index, item)
        self._items.append(self._message)
        return written + self._message.opened(), self._message

    def _thinking(self, step: ThinkingDelta) -> bytes:
        written = self._close() if step.begins else b""
        if not step.text:
            return written
        if self._reasoning is None:
            written += self._close()
            self._reasoning = self._new_reasoning(has_summary=True)
            written += self._reasoning.opened()
        return written + self._reasoning.more(step.text)

    def _signed(self, step: Signed) -> bytes:
        written = self._close() if step.is_redacted or self._reasoning is None else b""
        sealed = ""
        if self._kept.is_sealed:
            sealed = seals.sealed(step.vendor, step.signature, is_redacted=step.is_redacted)
        if self._reasoning is None:
            if not (sealed and step.signature):
                return written
            self._reasoning = self._new_reasoning(has_summary=False)
            written += self._reasoning.opened()
        self._reasoning.sealed = sealed
        return written + self._close()

    def _new_reasoning(self, *, has_summary: bool) -> OpenReasoning:
        index = len(self._items)
        item = ReasoningItem(id=objects.item_id(ReasoningItem, self._echo, index))
        reasoning = OpenReasoning(self._events, index, item, has_summary=has_summary)
        self._items.append(reasoning)
        return reasoning

    def _began(self, step: CallBegan) -> bytes:
        written = self._close()
        index = len(self._items)
        namespace, name = self._kept.namespaces.get(step.name, (msgspec.UNSET, step.name))
        kind = CustomCall if step.kind == "custom" or step.name in self._customs else FunctionCall
        item = kind(
            id=objects.item_id(kind, self._echo, index),
            status="in_progress",
            call_id=step.id,
            name=name,
            namespace=namespace,
        )
        unwrapping = Unwrapping() if kind is CustomCall and step.kind == "function" else None
        call = OpenCall(self._events, index, item, unwrapping)
        self._calls[step.index] = call
        self._items.append(call)
        return written + call.opened()

    def _close(self) -> bytes:
        """Finishes the message, or the thought, that is open."""
        started = b"" if self._started is not None else self._start(Started())
        if self._message is not None:
            closing: OpenItem = self._message
        elif self._reasoning is not None:
            closing = self._reasoning
        else:
            return started
        self._message = self._reasoning = None
        self._begins = False
        return started + closing.closed("completed")

    def _ended(self) -> bytes:
        written = b"" if self._started is not None else self._start(Started())
        assert self._started is not None
        status, reason = objects.ending(self._stop, self._has_refusal)
        is_open: list[OpenItem] = sorted(self._calls.values(), key=lambda call: call.index)
        is_open += [item for item in (self._message, self._reasoning) if item is not None]
        for item in is_open:
            of_item: Status = status if item is self._items[-1] else "completed"
            written += item.closed(of_item)
        response = objects.response(
            self._echo,
            self._kept,
            self._started.id,
            self._started.model,
            status=status,
            reason=reason,
            output=[item.item for item in self._items],
            usage=self._usage,
        )
        return written + self._events.event(b"response." + status.encode(), b'"response":' + response)
