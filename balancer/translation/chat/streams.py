"""Streams of chat completion chunks: an upstream's into steps, and steps into a client's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from balancer import lenient
from balancer.sse import Event
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
from balancer.translation.chat import answers, shapes
from balancer.translation.chat.inputs import Unwrapping
from balancer.translation.conversation import Target, ToolKind

_DONE = b"[DONE]"
_ENDLESS_BYTES = 1024 * 1024
_NO_REASON = ("", "null")

BAD_ANSWER = "upstream_bad_answer"


class _Call:
    """A call whose pieces come in; it has begun when its name is known."""

    __slots__ = ("held", "id", "index", "kind", "name")

    def __init__(self, index: int) -> None:
        self.index = index
        self.id = ""
        self.name = ""
        self.kind: ToolKind = "function"
        self.held = ""


class StreamReader:
    """Reads an upstream's chunks, event by event."""

    def __init__(self, target: Target) -> None:
        self._vendor = target.vendor
        self._has_started = False
        self._is_over = False
        self._stop: Stop | None = None
        self._has_refused = False
        self._counts: Counts | None = None
        self._seed = ""
        self._calls: list[_Call] = []
        self._by_index: dict[int, _Call] = {}
        self._detail: float | None = None

    def read(self, event: Event) -> list[Step]:
        """What the event tells. After the end, or an error, nothing is told any more."""
        data = event.data
        if self._is_over:
            return []
        if not data:
            return self._silence(event)
        if len(data) < 16 and data.strip() == _DONE:
            return self._end()
        try:
            body = shapes.read_body(data)
        except lenient.UNREADABLE:
            return self._broke(Broke(message="the upstream sent a chunk that is no JSON object", code=BAD_ANSWER))
        failure = shapes.failure_of(body)
        if failure is not None:
            return self._broke(Broke(message=failure.message, code=failure.code, status=failure.status))
        choices = body.choices
        if event.name == "error" and not choices:
            message = body.message if isinstance(body.message, str) else "the upstream tells of an error without a word"
            return self._broke(Broke(message=message))
        steps: list[Step] = []
        if not self._has_started and (choices or body.id):
            # Azure's first chunk tells of its filters, and has neither.
            self._start(body, data, steps)
        usage = body.usage
        if choices:
            # One answer was asked for; a second would be somebody else's mistake.
            choice = choices[0]
            said = choice.delta or choice.message
            if said is not None:
                self._say(said, steps)
            if choice.finish_reason and choice.finish_reason not in _NO_REASON and self._stop is None:
                if choice.finish_reason == "error":
                    steps += self._broke(Broke(message="the upstream ended its answer with an error", code=BAD_ANSWER))
                    return steps
                self._stop = shapes.stop_of(
                    choice.finish_reason,
                    has_calls=any(call.name for call in self._calls),
                    has_refusal=self._has_refused,
                )
                self._count(usage or choice.usage, steps)
                steps.append(Stopped(stop=self._stop))
                return steps
            usage = usage or choice.usage
        if usage is not None:
            self._count(usage, steps)
        return steps

    def finish(self) -> list[Step]:
        """The end, for upstreams that send no [DONE]: proper if they told why they stopped."""
        return [] if self._is_over or self._stop is None else self._end()

    def _silence(self, event: Event) -> list[Step]:
        raw = event.raw
        if raw.startswith(b":"):
            return [Pinged()]
        if raw.startswith(b"data") and len(raw) > _ENDLESS_BYTES:
            return self._broke(Broke(message="the upstream sent a chunk that is too long", code=BAD_ANSWER))
        return []

    def _start(self, body: shapes.Body, data: bytes, steps: list[Step]) -> None:
        self._has_started = True
        self._seed = body.id or shapes.seed_of(data)
        steps.append(Started(id=body.id or "", model=body.model or ""))

    def _end(self) -> list[Step]:
        self._is_over = True
        return [Ended()] if self._has_started else [Started(), Ended()]

    def _broke(self, step: Broke) -> list[Step]:
        self._is_over = True
        return [step]

    def _count(self, usage: shapes.Usage | None, steps: list[Step]) -> None:
        if usage is None:
            return
        counts = shapes.counts_of(usage)
        if counts != self._counts:
            self._counts = counts
            steps.append(Counted(usage=counts))

    def _say(self, said: shapes.Message, steps: list[Step]) -> None:
        content = said.content
        details = said.reasoning_details
        thought = said.reasoning_content or said.reasoning
        if details:
            self._detail_steps(details, thought or "", steps)
        elif thought:
            steps.append(ThinkingDelta(text=thought))
        if content:
            if isinstance(content, str):
                steps.append(TextDelta(text=content))
            else:
                self._pieces(content, steps)
        if said.annotations:
            citations = shapes.citations_of(said.annotations)
            if citations:
                steps.append(TextDelta(citations=citations))
        if said.refusal:
            self._has_refused = True
            steps.append(RefusalDelta(text=said.refusal))
        if said.tool_calls:
            for piece in said.tool_calls:
                self._call(piece, steps)
        elif said.function_call is not None:
            self._call(shapes.ToolCall(index=0, function=said.function_call), steps)

    def _pieces(self, content: list[shapes.Piece], steps: list[Step]) -> None:
        thought = shapes.thought_of(content)
        if thought:
            steps.append(ThinkingDelta(text=thought))
        text = shapes.text_of(content)
        if text:
            steps.append(TextDelta(text=text))

    def _detail_steps(self, details: list[shapes.Detail], thought: str, steps: list[Step]) -> None:
        """Details tell what `reasoning` tells too, and more: its text counts only where they have none."""
        if thought and not any(detail.text or detail.summary for detail in details):
            steps.append(ThinkingDelta(text=thought))
        for detail in details:
            text = detail.text or detail.summary
            if text:
                begins = self._detail is not None and detail.index is not None and detail.index != self._detail
                steps.append(ThinkingDelta(text=text, begins=begins))
                self._detail = detail.index
            if detail.data or detail.signature:
                is_redacted = not detail.signature
                steps.append(Signed(signature=shapes.packed(detail), vendor=self._vendor, is_redacted=is_redacted))

    # -- calls ---------------------------------------------------------------------------------------------------------

    def _call(self, piece: shapes.ToolCall, steps: list[Step]) -> None:
        function, custom = piece.function, piece.custom
        if custom is not None:
            name, arguments = custom.name, custom.input or ""
        elif function is not None:
            name, arguments = function.name, shapes.arguments_of(function)
        else:
            name, arguments = None, ""
        call = self._call_of(piece, name)
        if call.name:
            if arguments:
                steps.append(CallDelta(index=call.index, arguments=arguments))
            return
        call.held += arguments
        call.id = call.id or piece.id or ""
        if name:
            call.name = name
            call.kind = "function" if custom is None else "custom"
            call.id = call.id or shapes.made_id(self._seed, call.index)
            steps.append(CallBegan(index=call.index, id=call.id, name=name, kind=call.kind))
            if call.held:
                steps.append(CallDelta(index=call.index, arguments=call.held))
                call.held = ""

    def _call_of(self, piece: shapes.ToolCall, name: str | None) -> _Call:
        """The call that the piece belongs to.

        By the book its index tells. Some servers give all calls the index 0, each with an id and a name of its own, or
        give none at all; then what has a name begins a call, and what has none goes on with the last.
        """
        index = shapes.place_of(piece.index)
        if index < 0:
            known = next((call for call in self._calls if piece.id and call.id == piece.id), None)
            if known is None and not name and self._calls:
                known = self._calls[-1]
        else:
            known = self._by_index.get(index)
        if known is not None:
            is_other = bool(name and known.name and piece.id and piece.id != known.id)
            if not is_other:
                return known
        call = _Call(len(self._calls))
        self._calls.append(call)
        if index >= 0:
            self._by_index[index] = call
        return call


# -- to clients --------------------------------------------------------------------------------------------------------

_encode = msgspec.json.encode
_PING = b": ping\n\n"
_END = b"data: [DONE]\n\n"


class StreamWriter:
    """Writes a client's chunks. Each step is a chunk of its own, of the shape that OpenAI gives it."""

    def __init__(self, echo: Echo) -> None:
        conversation = echo.conversation
        self._echo = echo
        self._wants_usage = conversation.wants_usage
        self._is_shown = answers.shows_thoughts(conversation)
        self._custom = answers.custom_tools(conversation)
        self._head = b""
        self._tail = (
            b',"finish_reason":null}],"usage":null}\n\n' if self._wants_usage else b',"finish_reason":null}]}\n\n'
        )
        self._usage: Counts | None = None
        self._has_stopped = False
        self._thought = -1
        self._is_thinking = False
        self._said = 0
        self._part = 0
        self._notes: list[dict[str, Any]] = []
        self._kinds: dict[int, ToolKind] = {}
        self._silent: set[int] = set()
        self._inputs: dict[int, Unwrapping] = {}

    def write(self, steps: Sequence[Step]) -> bytes:
        """The bytes that tell these steps."""
        return b"".join([self._written(step) for step in steps])

    def _written(self, step: Step) -> bytes:
        match step:
            case TextDelta():
                return self._text(step)
            case ThinkingDelta():
                return self._thinking(step)
            case CallDelta():
                return self._arguments(step)
            case CallBegan():
                return self._began(step)
            case Signed():
                return self._signed(step)
            case RefusalDelta():
                self._is_thinking = False
                return self._delta(b'{"refusal":%b}' % _encode(step.text)) if step.text else b""
            case Started():
                return self._started(step)
            case Counted():
                self._usage = step.usage
                return b""
            case Stopped():
                return self._stopped(step.stop)
            case Pinged():
                return _PING
            case Ended():
                return self._ended()
            case Broke():  # The gateway tells errors.
                return b""

    def _started(self, step: Started) -> bytes:
        echo = self._echo
        self._usage = step.usage or self._usage
        self._head = (
            b'data: {"id":%b,"object":"chat.completion.chunk","created":%d,"model":%b,"choices":[{"index":0,"delta":'
            % (_encode(answers.id_of(step.id, echo)), echo.created, _encode(echo.model or step.model))
        )
        return self._delta(b'{"role":"assistant","content":""}')

    def _delta(self, delta: bytes) -> bytes:
        return b"".join((self._head, delta, self._tail))

    def _text(self, step: TextDelta) -> bytes:
        self._is_thinking = False
        if step.begins:
            self._part = self._said
        self._said += len(step.text)
        if step.citations:
            self._notes += answers.url_citations(step.citations, self._part, self._said)
        return self._delta(b'{"content":%b}' % _encode(step.text)) if step.text else b""

    def _thinking(self, step: ThinkingDelta) -> bytes:
        if step.begins or not self._is_thinking:
            self._thought += 1
            self._is_thinking = True
        if not step.text or not self._is_shown:
            return b""
        text = _encode(step.text)
        return self._delta(
            b'{"reasoning_content":%b,"reasoning_details":[{"type":"reasoning.text","text":%b,"index":%d}]}'
            % (text, text, self._thought)
        )

    def _signed(self, step: Signed) -> bytes:
        if step.is_redacted or not self._is_thinking:
            self._thought += 1
        self._is_thinking = False
        detail = answers.detail_of("", step.signature, step.vendor, step.is_redacted, self._thought)
        return self._delta(_encode({"reasoning_details": [detail]}))

    def _began(self, step: CallBegan) -> bytes:
        self._is_thinking = False
        kind = step.kind
        if step.name in self._custom and kind == "function":
            kind = "custom"
            self._inputs[step.index] = Unwrapping()
        self._kinds[step.index] = kind
        if kind == "function":
            self._silent.add(step.index)
        what = b'"custom":{"name":%b,"input":""}' if kind == "custom" else b'"function":{"name":%b,"arguments":""}'
        return self._delta(
            b'{"tool_calls":[{"index":%d,"id":%b,"type":"%b",%b}]}'
            % (step.index, _encode(step.id), kind.encode(), what % _encode(step.name))
        )

    def _arguments(self, step: CallDelta) -> bytes:
        arguments = step.arguments
        unwrapping = self._inputs.get(step.index)
        if unwrapping is not None:
            arguments = unwrapping.feed(arguments)
        return self._call_piece(step.index, arguments) if arguments else b""

    def _call_piece(self, index: int, text: str) -> bytes:
        self._silent.discard(index)
        if self._kinds.get(index) == "custom":
            return self._delta(b'{"tool_calls":[{"index":%d,"custom":{"input":%b}}]}' % (index, _encode(text)))
        return self._delta(b'{"tool_calls":[{"index":%d,"function":{"arguments":%b}}]}' % (index, _encode(text)))

    def _stopped(self, stop: Stop) -> bytes:
        self._has_stopped = True
        # No arguments at all are no JSON; clients parse them.
        written = [self._call_piece(index, "{}") for index in sorted(self._silent)]
        for index, unwrapping in self._inputs.items():
            rest = unwrapping.finish()
            if rest:
                written.append(self._call_piece(index, rest))
        if self._notes:
            # All at once, as OpenAI tells them: its SDK cannot add to a list whose entries have no index.
            written.append(self._delta(_encode({"annotations": self._notes})))
        reason = b"{}%b" % self._tail.replace(b"null", b'"%b"' % shapes.FINISHES[stop].encode(), 1)
        return b"".join((*written, self._head, reason))

    def _ended(self) -> bytes:
        written = b"" if self._head else self._started(Started())
        if not self._has_stopped:
            written += self._stopped("tool" if self._kinds else "end")
        if self._wants_usage:
            usage = msgspec.json.encode(answers.usage_of(self._usage or Counts()))
            head = self._head.partition(b'"choices":')[0]
            written += b'%b"choices":[],"usage":%b}\n\n' % (head, usage)
        return written + _END
