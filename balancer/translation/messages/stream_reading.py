"""A stream of Anthropic's, read event by event."""

from __future__ import annotations

import msgspec

from balancer import lenient, sse
from balancer.translation.answer import (
    Broke,
    CallBegan,
    CallDelta,
    Counted,
    Counts,
    Ended,
    Pinged,
    RefusalDelta,
    Signed,
    Started,
    Step,
    Stopped,
    TextDelta,
    ThinkingDelta,
)
from balancer.translation.conversation import Target
from balancer.translation.messages.answers import Block, Failure, explained
from balancer.translation.messages.citing import Location
from balancer.translation.messages.ending import NULL, STOPS, counts

_STATUSES = {
    "invalid_request_error": 400,
    "authentication_error": 401,
    "billing_error": 402,
    "permission_error": 403,
    "not_found_error": 404,
    "request_too_large": 413,
    "rate_limit_error": 429,
    "api_error": 500,
    "timeout_error": 504,
    "overloaded_error": 529,
}


_LONGEST_BYTES = 1024 * 1024
"""No event without data is as long, but for one that the parser did not hold."""


class _Message(msgspec.Struct, frozen=True):
    id: str | None = None
    model: str | None = None
    usage: msgspec.Raw = NULL


class _Delta(msgspec.Struct, frozen=True):
    type: str | None = None
    text: str | None = None
    partial_json: str | None = None
    thinking: str | None = None
    signature: str | None = None
    citation: Location | None = None
    stop_reason: str | None = None
    stop_sequence: str | None = None
    stop_details: msgspec.Raw = NULL


class _Event(msgspec.Struct, frozen=True):
    type: str = ""
    index: int = -1
    delta: _Delta | None = None
    content_block: Block | None = None
    message: _Message | None = None
    usage: msgspec.Raw = NULL
    error: Failure | None = None


_event = msgspec.json.Decoder(_Event)


class _Call:
    """A call that is being told: what it was begun with counts where nothing follows."""

    __slots__ = ("begun_with", "index", "is_told")

    def __init__(self, index: int, begun_with: str) -> None:
        self.index = index
        self.begun_with = begun_with
        self.is_told = False


class StreamReader:
    """Steps from events. Blocks of tools that Anthropic itself runs are skipped, as is what nobody knows yet."""

    def __init__(self, target: Target) -> None:
        self._vendor = target.vendor
        self._calls = 0
        self._call_at: dict[int, _Call] = {}
        self._skipped: set[int] = set()
        self._texts = 0
        self._begins_text = False
        self._thoughts = 0
        self._begins_thinking = False
        self._usage: Counts | None = None
        self._has_started = False
        self._has_stopped = False
        self._is_over = False

    def read(self, event: sse.Event) -> list[Step]:
        """What an event says; never raises."""
        if self._is_over:
            return []
        if not event.data:
            return self._silence(event)
        try:
            told = _event.decode(event.data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            mended = self._mended(event.data)
            if isinstance(mended, list):
                return mended
            told = mended
        steps = self._steps(told, event.name)
        if self._has_started or not steps or isinstance(steps[0], Pinged | Broke):
            return steps
        self._has_started = True
        return steps if isinstance(steps[0], Started) else [Started(), *steps]

    def finish(self) -> list[Step]:
        """Ended, when the answer was whole and that was not told yet; nothing when it was cut off."""
        return self._ended() if self._has_stopped and not self._is_over else []

    def _steps(self, told: _Event, name: str) -> list[Step]:
        match told.type or name:
            case "content_block_delta":
                return self._delta(told)
            case "content_block_start":
                return self._block(told)
            case "content_block_stop":
                return self._block_ended(told.index)
            case "message_start":
                return self._message(told)
            case "message_delta":
                return self._stopped(told)
            case "message_stop":
                return self._ended()
            case "ping":
                return [Pinged()]
            case "error":
                return self._broke(told.error)
            case _:
                return []

    def _silence(self, event: sse.Event) -> list[Step]:
        """A comment is a sign of life. An event beyond the parser's limit has lost its data, and the answer with it."""
        if event.raw.startswith(b":"):
            return [Pinged()]
        return self._unreadable("is too long") if len(event.raw) > _LONGEST_BYTES else []

    def _unreadable(self, why: str) -> list[Step]:
        self._is_over = True
        return [Broke(message=f"the upstream sent an event that {why}", code="upstream_bad_answer")]

    def _mended(self, data: bytes) -> _Event | list[Step]:
        try:
            return lenient.decode(_event, data)
        except msgspec.ValidationError:
            return []
        except lenient.UNREADABLE:
            return self._unreadable("is no JSON")

    def _ended(self) -> list[Step]:
        self._is_over = True
        return [Ended()]

    def _delta(self, event: _Event) -> list[Step]:
        delta = event.delta
        if delta is None or event.index in self._skipped:
            return []
        match delta.type:
            case "text_delta":
                begins, self._begins_text = self._begins_text, False
                return [TextDelta(text=delta.text or "", begins=begins)]
            case "input_json_delta":
                call = self._call_at.get(event.index)
                if call is None or not delta.partial_json:
                    return []
                call.is_told = True
                return [CallDelta(index=call.index, arguments=delta.partial_json)]
            case "thinking_delta":
                begins, self._begins_thinking = self._begins_thinking, False
                return [ThinkingDelta(text=delta.thinking or "", begins=begins)]
            case "signature_delta":
                return [Signed(signature=delta.signature or "", vendor=self._vendor)]
            case "citations_delta":
                citation = delta.citation.citation() if delta.citation else None
                begins, self._begins_text = self._begins_text, False
                return [] if citation is None else [TextDelta(citations=(citation,), begins=begins)]
            case _:
                return []

    def _block(self, event: _Event) -> list[Step]:
        block = event.content_block
        if block is None:
            return []
        match block.type:
            case "text":
                self._begins_text = self._texts > 0
                self._texts += 1
                if not block.text:
                    return []
                begins, self._begins_text = self._begins_text, False
                return [TextDelta(text=block.text, begins=begins)]
            case "thinking":
                self._begins_thinking = self._thoughts > 0
                self._thoughts += 1
                if not block.thinking:
                    return []
                begins, self._begins_thinking = self._begins_thinking, False
                return [ThinkingDelta(text=block.thinking, begins=begins)]
            case "redacted_thinking":
                return [Signed(signature=block.data or "", vendor=self._vendor, is_redacted=True)]
            case "tool_use":
                call = self._call_at[event.index] = _Call(self._calls, block.arguments())
                self._calls += 1
                return [CallBegan(index=call.index, id=block.id or "", name=block.name or "")]
            case _:
                self._skipped.add(event.index)
                return []

    def _block_ended(self, index: int) -> list[Step]:
        call = self._call_at.pop(index, None)
        if call is None or call.is_told:
            return []
        return [CallDelta(index=call.index, arguments=call.begun_with)]

    def _message(self, event: _Event) -> list[Step]:
        if self._has_started:
            return []
        message = event.message or _Message()
        self._usage = counts(message.usage)
        return [Started(id=message.id or "", model=message.model or "", usage=self._usage)]

    def _stopped(self, event: _Event) -> list[Step]:
        steps: list[Step] = []
        delta = event.delta
        if delta is not None and delta.stop_reason:
            self._has_stopped = True
            explanation = explained(delta.stop_details)
            if explanation:
                steps.append(RefusalDelta(text=explanation))
            stop = STOPS.get(delta.stop_reason, "end")
            steps.append(Stopped(stop=stop, stop_sequence=delta.stop_sequence or ""))
        usage = counts(event.usage, self._usage)
        if usage is not None and usage is not self._usage:
            self._usage = usage
            steps.append(Counted(usage=usage))
        return steps

    def _broke(self, error: Failure | None) -> list[Step]:
        self._is_over = True
        code = (error.type if error else None) or "api_error"
        message = (error.message if error else None) or "the upstream broke off without saying why"
        return [Broke(message=message, code=code, status=_STATUSES.get(code, 0))]
