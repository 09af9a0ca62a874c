"""Answers and streams of Google's."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from balancer.errors import UpstreamAnswerError
from balancer.sse import Event
from balancer.translation.answer import (
    Answer,
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
    Stop,
    Stopped,
    TextDelta,
    ThinkingDelta,
)
from balancer.translation.conversation import Call, Citation, Refusal, Target, Text, Thinking
from balancer.translation.folding import Folder
from balancer.translation.google.answers import read_answer
from balancer.translation.google.streams import StreamReader

TARGET = Target(model="gemini-3-pro", vendor="google")
USAGE = {
    "promptTokenCount": 20,
    "candidatesTokenCount": 4,
    "thoughtsTokenCount": 3,
    "toolUsePromptTokenCount": 5,
    "cachedContentTokenCount": 8,
    "totalTokenCount": 32,
}
COUNTS = Counts(input=25, output=7, cached=8, reasoning=3)


def chunk(*parts: dict[str, Any], finish: str = "", **rest: Any) -> dict[str, Any]:
    candidate: dict[str, Any] = {"index": 0}
    if parts:
        candidate["content"] = {"role": "model", "parts": list(parts)}
    if finish:
        candidate["finishReason"] = finish
    return {"candidates": [candidate | rest.pop("candidate", {})], **rest}


def event(data: object) -> Event:
    return Event(b"", "", data if isinstance(data, bytes) else json.dumps(data).encode())


def steps(*chunks: object) -> list[Step]:
    reader = StreamReader(TARGET)
    return [step for data in chunks for step in reader.read(event(data))] + reader.finish()


def folded(*chunks: object) -> Answer:
    folder = Folder()
    folder.take(steps(*chunks))
    assert folder.is_over
    return folder.answer()


def answered(*parts: dict[str, Any], finish: str = "STOP", **rest: Any) -> Answer:
    return read_answer(json.dumps(chunk(*parts, finish=finish, **rest)).encode(), TARGET)


# -- whole answers, and the same in a stream ---------------------------------------------------------------------------

THOUGHT = {"text": "hm", "thought": True}
CALLS = (
    {"functionCall": {"id": "g1", "name": "weather", "args": {"city": "Bonn"}}, "thoughtSignature": "UzE="},
    {"functionCall": {"id": "g2", "name": "now"}},
)


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        (({"text": "a"}, {"text": "b"}), (Text(text="ab"),)),
        ((THOUGHT, {"text": "a"}), (Thinking(text="hm", vendor="google"), Text(text="a"))),
        (
            (THOUGHT, {"text": "a", "thoughtSignature": "UzE="}),
            (Thinking(text="hm", signature="UzE=", vendor="google"), Text(text="a")),
        ),
        (
            ({"text": "a"}, {"text": "", "thoughtSignature": "UzE="}),
            (Text(text="a"),),
        ),
        (
            ({"text": "a"}, {"text": "b", "thoughtSignature": "UzE="}, CALLS[1]),
            (Text(text="ab"), Call(id="g2", name="now", arguments="{}")),
        ),
        (
            (THOUGHT, *CALLS),
            (
                Thinking(text="hm", signature="0:UzE=", vendor="google"),
                Call(id="g1", name="weather", arguments='{"city": "Bonn"}'),
                Call(id="g2", name="now", arguments="{}"),
            ),
        ),
        (
            ({"inlineData": {"mimeType": "image/png", "data": "AA=="}},),
            (Text(text="![image/png](data:image/png;base64,AA==)"),),
        ),
        (
            (
                {"executableCode": {"language": "PYTHON", "code": "print(1)"}},
                {"codeExecutionResult": {"outcome": "OUTCOME_OK", "output": "1\n"}},
            ),
            (Text(text="\n```python\nprint(1)\n```\n\n```\n1\n```\n"),),
        ),
        (({"unheardOf": {"x": 1}}, {"text": "a"}), (Text(text="a"),)),
    ],
)
def test_parts_are_read_alike_at_once_and_in_a_stream(parts: tuple[dict[str, Any], ...], said: tuple[Any, ...]) -> None:
    assert answered(*parts).parts == said
    # In steps a thought that nobody signed does not tell whose it is.
    told = tuple(Thinking(text=part.text) if part == Thinking(text="hm", vendor="google") else part for part in said)
    assert folded(chunk(*parts, finish="STOP")).parts == told
    assert folded(*(chunk(part) for part in parts), chunk(finish="STOP")).parts == told


def test_an_answer_tells_its_id_model_and_usage() -> None:
    answer = answered({"text": "a"}, responseId="r1", modelVersion="gemini-3-pro-001", usageMetadata=USAGE)

    assert answer == Answer(id="r1", model="gemini-3-pro-001", parts=(Text(text="a"),), stop="end", usage=COUNTS)


@pytest.mark.parametrize(
    ("reason", "stop"),
    [
        ("STOP", "end"),
        ("MAX_TOKENS", "length"),
        ("SAFETY", "filtered"),
        ("RECITATION", "filtered"),
        ("MODEL_ARMOR", "filtered"),
        ("OTHER", "end"),
        ("NEVER_HEARD_OF", "end"),
    ],
)
def test_a_reason_to_finish_is_a_stop(reason: str, stop: Stop) -> None:
    assert answered({"text": "a"}, finish=reason).stop == stop
    assert folded(chunk({"text": "a"}, finish=reason)).stop == stop


@pytest.mark.parametrize(("reason", "stop"), [("STOP", "tool"), ("MAX_TOKENS", "length")])
def test_who_calls_a_tool_waits_for_it(reason: str, stop: Stop) -> None:
    assert answered(*CALLS, finish=reason).stop == stop
    assert folded(chunk(*CALLS), chunk(finish=reason)).stop == stop


def test_an_answer_with_nothing_said_tells_why() -> None:
    """A call that the model could not spell looked like the end of an agent's task."""
    failed = chunk(finish="MALFORMED_FUNCTION_CALL", candidate={"finishMessage": "Malformed: f("})
    told = "The model ended its answer with MALFORMED_FUNCTION_CALL: Malformed: f("

    for answer in (read_answer(json.dumps(failed).encode(), TARGET), folded(failed)):
        assert (answer.parts, answer.stop) == ((Refusal(text=told),), "refused")


def test_a_whole_answer_that_names_no_reason_has_ended_all_the_same() -> None:
    answer = answered(*CALLS, finish="")

    assert ([type(part) for part in answer.parts], answer.stop) == ([Thinking, Call, Call], "tool")


def test_a_blocked_prompt_is_filtered() -> None:
    blocked = {"promptFeedback": {"blockReason": "PROHIBITED_CONTENT"}, "usageMetadata": {"promptTokenCount": 3}}

    for answer in (read_answer(json.dumps(blocked).encode(), TARGET), folded(blocked)):
        assert (answer.parts, answer.stop, answer.usage) == ((), "filtered", Counts(input=3))


@pytest.mark.parametrize(
    "body", [b"", b"x", b"[]", b"{}", b'{"candidates":[]}', b'{"candidates":7}', b'{"error":{"code":500}}']
)
def test_what_is_no_answer_is_told(body: bytes) -> None:
    with pytest.raises(UpstreamAnswerError):
        read_answer(body, TARGET)


def test_a_call_without_an_id_gets_one_that_no_other_call_has() -> None:
    part = {"functionCall": {"name": "f", "args": {}}}
    ids = [
        call.id
        for answer in (
            answered(part, part, responseId="r1"),
            answered(part, responseId="r2"),
            answered(part, usageMetadata=USAGE),
        )
        for call in answer.parts
        if isinstance(call, Call)
    ]

    assert len(set(ids)) == len(ids) == 4
    assert all(id_.startswith("call_") and len(id_) == 29 for id_ in ids)
    [began] = [step for step in steps(chunk(part, responseId="r1")) if isinstance(step, CallBegan)]
    assert began.id == ids[0]


# -- citations ---------------------------------------------------------------------------------------------------------


def test_what_a_text_goes_back_to_is_told_once_in_characters() -> None:
    grounding = {
        "groundingChunks": [{"web": {"uri": "https://a.test", "title": "A"}}, {"retrievedContext": {}}],
        "groundingSupports": [
            {"segment": {"startIndex": 4, "endIndex": 6, "text": "ab"}, "groundingChunkIndices": [0, 1, 9]}
        ],
    }
    recited = {"citationSources": [{"uri": "https://b.test", "endIndex": 99}]}
    candidate = {"groundingMetadata": grounding, "citationMetadata": recited}
    citations = (
        Citation(url="https://a.test", title="A", quote="ab", start=2, end=4),
        Citation(url="https://b.test"),
    )

    assert answered({"text": "ßßab"}, candidate=candidate).parts == (Text(text="ßßab", citations=citations),)
    plain = steps(chunk({"text": "xxxx"}), chunk({"text": "ab"}, candidate=candidate), chunk(candidate=candidate))
    assert [step.citations for step in plain if isinstance(step, TextDelta) and step.citations] == [
        (msgspec.structs.replace(citations[0], start=4, end=6), citations[1])
    ]


def test_a_stream_knows_no_places_behind_other_letters_than_ascii() -> None:
    recited = {"citations": [{"uri": "https://b.test", "startIndex": 1, "endIndex": 2}]}

    [cited] = steps(chunk({"text": "ßab"}, candidate={"citationMetadata": recited}))[2:]
    assert cited == TextDelta(citations=(Citation(url="https://b.test"),))


# -- streams -----------------------------------------------------------------------------------------------------------


def test_a_stream_is_read_chunk_by_chunk() -> None:
    assert steps(
        chunk(
            {"text": "hm", "thought": True}, responseId="r1", modelVersion="g", usageMetadata={"promptTokenCount": 9}
        ),
        chunk({"text": "a"}, responseId="r1", usageMetadata={"promptTokenCount": 9}),
        chunk(*CALLS),
        chunk({"text": ""}, finish="STOP", usageMetadata=USAGE),
    ) == [
        Started(id="r1", model="g", usage=Counts(input=9)),
        ThinkingDelta(text="hm"),
        TextDelta(text="a"),
        Signed(signature="0:UzE=", vendor="google"),
        CallBegan(index=0, id="g1", name="weather"),
        CallDelta(index=0, arguments='{"city": "Bonn"}'),
        CallBegan(index=1, id="g2", name="now"),
        CallDelta(index=1, arguments="{}"),
        Counted(usage=COUNTS),
        Stopped(stop="tool"),
        Ended(),
    ]


def test_a_reason_in_every_chunk_does_not_end_a_stream() -> None:
    """Some models tell STOP from the first chunk on."""
    answer = folded(chunk({"text": "a"}, finish="STOP"), chunk({"text": "b"}, finish="STOP", usageMetadata=USAGE))

    assert answer == Answer(parts=(Text(text="ab"),), stop="end", usage=COUNTS)


def test_a_stream_without_a_reason_was_cut() -> None:
    assert steps(chunk({"text": "a"})) == [Started(), TextDelta(text="a")]
    assert steps() == []


def test_a_stream_may_end_as_openais_do() -> None:
    assert steps(chunk({"text": "a"}, finish="STOP"), b"[DONE]")[2:] == [Stopped(stop="end"), Ended()]


@pytest.mark.parametrize("wrap", [lambda error: error, lambda error: [error]])
def test_an_error_in_a_stream_breaks_it(wrap: Any) -> None:
    error = {"error": {"code": 503, "status": "UNAVAILABLE", "message": "The model is overloaded."}}

    assert steps(chunk({"text": "a"}), wrap(error), chunk({"text": "b"}, finish="STOP")) == [
        Started(),
        TextDelta(text="a"),
        Broke(message="The model is overloaded.", code="UNAVAILABLE", status=503),
    ]


ODD = (
    b'{"candidates":[{"content":{"parts":[{"text":"a"},{"text":7},{"functionCall":{"id":7,"name":"f","args":{"a":1}}}]},'
    b'"finishMessage":{}}],"responseId":"r"}'
)


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"no json", [Broke(message="the upstream sent a chunk that is no JSON", code="upstream_bad_answer")]),
        (b'{"candidates": 7}', [Started()]),
        (
            ODD,
            [
                Started(id="r"),
                TextDelta(text="a"),
                CallBegan(index=0, id=f"call_{hashlib.sha256(b'r:0').hexdigest()[:24]}", name="f"),
                CallDelta(index=0, arguments='{"a":1}'),
            ],
        ),
        (b'{"candidates":[{"content":{"parts":[{"text":"\\ud83d"}]}}]}', [Started(), TextDelta(text="\ufffd")]),
        (b'{"candidates":[{"finishReason":null,"content":{"role":"model"}}]}', [Started()]),
        (b'{"usageMetadata":{"promptTokenCount":"x"}}', [Started()]),
        (b'{"candidates":[{"content":{"parts":[{"functionCall":{"args":{}}}]}}]}', [Started()]),
    ],
)
def test_an_odd_chunk_is_skipped_and_a_broken_one_told(data: bytes, told: list[Step]) -> None:
    assert StreamReader(TARGET).read(event(data)) == told


def test_a_comment_is_a_sign_of_life_and_what_the_parser_dropped_an_end() -> None:
    reader = StreamReader(TARGET)

    assert reader.read(Event(b": ping\n\n", "", b"")) == [Pinged()]
    assert reader.read(Event(b"event: x\n\n", "x", b"")) == []
    [broke] = reader.read(Event(b"d" * 2**21, "", b""))
    assert isinstance(broke, Broke)
    assert reader.finish() == []


def test_a_refusal_of_a_stream_stands_before_its_end() -> None:
    told = steps(chunk(finish="UNEXPECTED_TOOL_CALL"))

    assert [type(step) for step in told] == [Started, RefusalDelta, Stopped, Ended]


@given(
    st.lists(
        st.binary()
        | st.recursive(
            st.none() | st.text(max_size=3) | st.integers(),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(
                    st.sampled_from(
                        ("candidates", "content", "parts", "text", "error", "functionCall", "usageMetadata")
                    ),
                    inner,
                    max_size=3,
                )
            ),
            max_leaves=12,
        ).map(lambda value: json.dumps(value).encode()),
        max_size=3,
    )
)
def test_no_event_raises(datas: list[bytes]) -> None:
    reader = StreamReader(TARGET)
    told = [step for data in datas for step in reader.read(event(data))] + reader.finish()

    assert [step for step in told if isinstance(step, Started)] in ([], [told[0]] if told else [])
