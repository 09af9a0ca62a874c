"""Answers for clients of the responses API, and the steps in which a stream would bring them."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

from balancer.translation.answer import (
    Answer,
    CallBegan,
    CallDelta,
    Counted,
    Counts,
    Echo,
    Ended,
    RefusalDelta,
    Said,
    Signed,
    Started,
    Step,
    Stopped,
    TextDelta,
    ThinkingDelta,
)
from balancer.translation.conversation import Call, Citation, Refusal, Text, Thinking
from balancer.translation.responses.reading import read_request

COUNTS = Counts(input=100, output=20, cached=60, cache_creation=10, reasoning=5)

TOOLS = [
    {"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": False},
    {
        "type": "custom",
        "name": "apply_patch",
        "format": {"type": "grammar", "syntax": "lark", "definition": "start: A"},
    },
    {
        "type": "namespace",
        "name": "mcp__github",
        "description": "d",
        "tools": [{"type": "function", "name": "search"}, {"type": "custom", "name": "note"}],
    },
]


def echo(**members: Any) -> Echo:
    """Of a request that has these members, and wants what the model thinks sealed."""
    request = {"model": "asked", "input": "hello", "tools": TOOLS, "store": False, **members}
    return Echo(
        conversation=read_request(json.dumps(request).encode()), model="shown", id="0a1b2c", created=1_760_000_000
    )


ANSWERS: dict[str, Answer] = {
    "text": Answer(id="msg_01", model="claude", parts=(Text(text="Hello, wörld 🌍"),), usage=COUNTS),
    "nothing": Answer(usage=COUNTS),
    "unknown usage": Answer(parts=(Text(text="a"),)),
    "texts": Answer(
        parts=(
            Text(text="One. "),
            Text(
                text="Two.",
                citations=(
                    Citation(url="https://h/a", title="A", quote="q"),
                    Citation(url="https://h/b", title="", start=0, end=3),
                    Citation(title="paper.pdf", document=1),
                ),
            ),
        ),
        usage=COUNTS,
    ),
    "thoughts": Answer(
        parts=(
            Thinking(text="First.", signature="Eq1", vendor="anthropic"),
            Thinking(signature="Eq2", vendor="anthropic", is_redacted=True),
            Thinking(signature="Cg3", vendor="google"),
            Thinking(text="Second."),
            Text(text="a"),
            Thinking(text="Third.", signature="Eq4", vendor="anthropic"),
            Call(id="toolu_1", name="f", arguments='{"a": 1}'),
        ),
        stop="tool",
        usage=COUNTS,
    ),
    "calls": Answer(
        parts=(
            Text(text="I call."),
            Call(id="toolu_1", name="f", arguments=""),
            Call(id="toolu_2", name="apply_patch", arguments=json.dumps({"input": '*** "Begin"\n\\ é 🌍\n'})),
            Call(id="toolu_3", name="mcp__github__search", arguments='{"q":"x"}'),
            Call(id="call_4", name="apply_patch", arguments="bare\n", kind="custom"),
            Call(id="toolu_5", name="mcp__github__note", arguments='{"input":"n"}'),
            Text(text="That was it."),
        ),
        stop="tool",
        usage=COUNTS,
    ),
    "cut text": Answer(parts=(Thinking(text="a"), Text(text="b")), stop="length", usage=COUNTS),
    "cut call": Answer(parts=(Text(text="a"), Call(id="c", name="f", arguments='{"a')), stop="length", usage=COUNTS),
    "cut thought": Answer(parts=(Thinking(text="a"),), stop="context_length", usage=COUNTS),
    "filtered": Answer(parts=(), stop="filtered", usage=COUNTS),
    "refused": Answer(parts=(Text(text="I "),), stop="refused", usage=COUNTS),
    "refused in words": Answer(parts=(Text(text="I "), Refusal(text="cannot.")), stop="refused", usage=COUNTS),
    "stopped": Answer(parts=(Text(text="a"),), stop="stop_sequence", stop_sequence="b", usage=COUNTS),
}


def steps_of(answer: Answer, draw: random.Random) -> Iterator[Step]:
    """The steps of a stream that brings this answer, its texts cut anywhere."""
    yield Started(id=answer.id, model=answer.model)
    if answer.usage is not None and draw.random() < 0.5:
        yield Counted(usage=Counts(input=1))
    calls = 0
    for part in answer.parts:
        yield from _steps_of(part, calls, draw)
        calls += isinstance(part, Call)
    ending: list[Step] = [Stopped(stop=answer.stop, stop_sequence=answer.stop_sequence)]
    if answer.usage is not None:
        ending.insert(draw.randrange(2), Counted(usage=answer.usage))
    yield from ending
    yield Ended()


def _steps_of(part: Said, index: int, draw: random.Random) -> Iterator[Step]:
    match part:
        case Text():
            for number, piece in enumerate(_cut(part.text, draw)):
                yield TextDelta(text=piece, begins=number == 0)
            for citation in part.citations:
                yield TextDelta(citations=(citation,))
        case Thinking():
            for number, piece in enumerate(_cut(part.text, draw)):
                yield ThinkingDelta(text=piece, begins=number == 0)
            if part.signature:
                yield Signed(signature=part.signature, vendor=part.vendor, is_redacted=part.is_redacted)
        case Refusal():
            for piece in _cut(part.text, draw):
                yield RefusalDelta(text=piece)
        case Call():
            yield CallBegan(index=index, id=part.id, name=part.name, kind=part.kind)
            for piece in _cut(part.arguments, draw):
                yield CallDelta(index=index, arguments=piece)


def _cut(text: str, draw: random.Random) -> list[str]:
    if not text:
        return []
    cuts = sorted(draw.randrange(len(text) + 1) for _ in range(draw.randrange(4)))
    return [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
