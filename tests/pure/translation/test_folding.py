"""A whole answer and the steps of a stream say the same."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from balancer.translation.answer import (
    Answer,
    CallBegan,
    CallDelta,
    Counted,
    Counts,
    Ended,
    Pinged,
    Said,
    Signed,
    Started,
    Stopped,
    TextDelta,
    ThinkingDelta,
)
from balancer.translation.conversation import Call, Citation, Refusal, Text, Thinking
from balancer.translation.folding import Folder, steps_of

texts = st.text(max_size=8)
signed = st.builds(Thinking, text=texts.filter(bool), signature=texts.filter(bool), vendor=st.just("v"))
parts: st.SearchStrategy[Said] = st.one_of(
    st.builds(Text, text=texts, citations=st.lists(st.builds(Citation, url=texts), max_size=2).map(tuple)),
    signed,
    st.builds(Thinking, text=texts.filter(bool)),
    st.builds(Thinking, signature=texts, vendor=st.just("v"), is_redacted=st.just(True)),
    st.builds(Call, id=texts, name=texts, arguments=texts, kind=st.sampled_from(("function", "custom"))),
)
answers = st.builds(
    Answer,
    id=texts,
    model=texts,
    parts=st.lists(parts, max_size=5).map(tuple),
    stop=st.sampled_from(("end", "length", "tool", "filtered")),
    stop_sequence=texts,
    usage=st.none() | st.builds(Counts, input=st.integers(0, 9), output=st.integers(0, 9)),
)


def folded(*steps: Any) -> Answer:
    """The answer that the steps, one after the other, are."""
    folder = Folder()
    for step in steps:
        folder.take([step])
    return folder.answer()


@given(answers)
def test_the_steps_of_an_answer_fold_into_it(answer: Answer) -> None:
    assert folded(*steps_of(answer)) == answer


def test_pieces_of_a_part_are_one_part() -> None:
    answer = folded(
        Started(id="a", model="m", usage=Counts(input=1)),
        ThinkingDelta(text="h", begins=True),
        ThinkingDelta(text="m"),
        Signed(signature="s", vendor="v"),
        Pinged(),
        TextDelta(text="o", begins=True),
        TextDelta(text="ne"),
        TextDelta(text="two", begins=True),
        CallBegan(index=0, id="c0", name="f"),
        CallBegan(index=1, id="c1", name="g"),
        CallDelta(index=1, arguments="{}"),
        CallDelta(index=0, arguments="[]"),
        CallDelta(index=7, arguments="of none"),
        Stopped(stop="tool"),
        Counted(usage=Counts(input=1, output=2)),
        Ended(),
    )
    assert answer == Answer(
        id="a",
        model="m",
        parts=(
            Thinking(text="hm", signature="s", vendor="v"),
            Text(text="one"),
            Text(text="two"),
            Call(id="c0", name="f", arguments="[]"),
            Call(id="c1", name="g", arguments="{}"),
        ),
        stop="tool",
        usage=Counts(input=1, output=2),
    )


def test_a_thought_behind_a_signed_one_is_another() -> None:
    answer = folded(ThinkingDelta(text="a"), Signed(signature="s", vendor="v"), ThinkingDelta(text="b"))
    assert answer.parts == (Thinking(text="a", signature="s", vendor="v"), Thinking(text="b"))


def test_a_signature_alone_is_a_thought_of_its_own() -> None:
    answer = folded(TextDelta(text="a"), Signed(signature="s", vendor="v"))
    assert answer.parts == (Text(text="a"), Thinking(signature="s", vendor="v"))


def test_a_refusal_is_kept_apart_from_the_text() -> None:
    answer = Answer(parts=(Text(text="well"), Refusal(text="no")))
    assert folded(*steps_of(answer)).parts == answer.parts
