"""A whole answer as the steps of a stream, and a stream's steps as a whole answer.

Some upstreams answer with JSON where a stream was asked for, and the other way round.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from balancer.translation.answer import (
    Answer,
    CallBegan,
    CallDelta,
    Counted,
    Counts,
    Ended,
    RefusalDelta,
    Said,
    Signed,
    Started,
    Step,
    Stop,
    Stopped,
    TextDelta,
    ThinkingDelta,
)
from balancer.translation.conversation import Call, Citation, Refusal, Text, Thinking, ToolKind


def steps_of(answer: Answer) -> Iterator[Step]:
    """The steps in which a stream would have brought the answer."""
    yield Started(id=answer.id, model=answer.model, usage=answer.usage)
    calls = 0
    for part in answer.parts:
        match part:
            case Text():
                yield TextDelta(text=part.text, citations=part.citations, begins=True)
            case Thinking():
                if part.text and not part.is_redacted:
                    yield ThinkingDelta(text=part.text, begins=True)
                if part.signature or part.is_redacted:
                    yield Signed(signature=part.signature, vendor=part.vendor, is_redacted=part.is_redacted)
            case Refusal():
                yield RefusalDelta(text=part.text)
            case Call():
                yield CallBegan(index=calls, id=part.id, name=part.name, kind=part.kind)
                yield CallDelta(index=calls, arguments=part.arguments)
                calls += 1
    if answer.usage is not None:
        yield Counted(usage=answer.usage)
    yield Stopped(stop=answer.stop, stop_sequence=answer.stop_sequence)
    yield Ended()


class _Open:
    """A part of which more may come."""

    def __init__(self, part: Said) -> None:
        self.part = part
        self.texts: list[str] = []
        self.citations: list[Citation] = []

    def whole(self) -> Said:
        part, text = self.part, "".join(self.texts)
        match part:
            case Text():
                return Text(text=text, citations=tuple(self.citations))
            case Thinking():
                return Thinking(text=text, signature=part.signature, vendor=part.vendor, is_redacted=part.is_redacted)
            case Refusal():
                return Refusal(text=text)
            case Call():
                return Call(id=part.id, name=part.name, arguments=text, kind=part.kind)


class Folder:
    """Makes one answer of a stream's steps. `is_over` once its last has come."""

    def __init__(self) -> None:
        self.is_over = False
        self._id = self._model = self._stop_sequence = ""
        self._usage: Counts | None = None
        self._stop: Stop = "end"
        self._parts: list[_Open] = []
        self._calls: dict[int, _Open] = {}

    def take(self, steps: Iterable[Step]) -> None:
        """Adds what the steps bring."""
        for step in steps:
            match step:
                case Started():
                    self._id, self._model, self._usage = step.id, step.model, step.usage
                case TextDelta():
                    part = self._last(Text, begins=step.begins)
                    part.texts.append(step.text)
                    part.citations += step.citations
                case ThinkingDelta():
                    self._last(Thinking, begins=step.begins).texts.append(step.text)
                case Signed():
                    self._sign(step)
                case RefusalDelta():
                    self._last(Refusal).texts.append(step.text)
                case CallBegan():
                    self._calls[step.index] = self._begin(_call(step.id, step.name, step.kind))
                case CallDelta() if step.index in self._calls:
                    self._calls[step.index].texts.append(step.arguments)
                case Counted():
                    self._usage = step.usage
                case Stopped():
                    self._stop, self._stop_sequence = step.stop, step.stop_sequence
                case Ended():
                    self.is_over = True
                case _:
                    pass  # Signs of life; what broke is not folded.

    def answer(self) -> Answer:
        """The answer so far."""
        return Answer(
            id=self._id,
            model=self._model,
            parts=tuple(part.whole() for part in self._parts),
            stop=self._stop,
            stop_sequence=self._stop_sequence,
            usage=self._usage,
        )

    def _begin(self, part: Said) -> _Open:
        self._parts.append(_Open(part))
        return self._parts[-1]

    def _last(self, kind: type[Text | Thinking | Refusal], *, begins: bool = False) -> _Open:
        """The open part of that kind at the end, or a new one."""
        if self._parts and not begins:
            last = self._parts[-1]
            if isinstance(last.part, kind) and not (isinstance(last.part, Thinking) and last.part.signature):
                return last
        return self._begin(kind(text=""))

    def _sign(self, step: Signed) -> None:
        signed = Thinking(signature=step.signature, vendor=step.vendor, is_redacted=step.is_redacted)
        last = self._parts[-1] if self._parts else None
        if not step.is_redacted and last is not None and last.part == Thinking():
            last.part = signed
        else:
            self._begin(signed)


def _call(id_: str, name: str, kind: ToolKind) -> Call:
    return Call(id=id_, name=name, kind=kind)
