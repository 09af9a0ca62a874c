"""Streams of Anthropic's: read into steps, and written from the steps of other services."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest

from balancer import sse
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
from balancer.translation.conversation import Citation, Conversation, Target
from balancer.translation.messages.streams import StreamReader, StreamWriter
from tests.pure.translation.anthropic_sdk import events_of, message_of

TARGET = Target(model="claude-opus-4-6", vendor="anthropic")
ECHO = Echo(conversation=Conversation(model="gpt"), model="gpt", id="a1b2", created=1, vendor="openai/p1")
END: tuple[Step, ...] = (Stopped(stop="end"), Counted(usage=Counts(input=10, output=5)), Ended())


def an_event(data: object, name: str = "") -> sse.Event:
    """An event as the parser gives it."""
    raw = data if isinstance(data, bytes) else msgspec.json.encode(data)
    return sse.Event(raw=b"data: " + raw + b"\n\n", name=name, data=raw)


def read(*events: dict[str, Any]) -> list[Step]:
    """What a reader makes of the events of a message that has begun."""
    reader = StreamReader(TARGET)
    assert reader.read(an_event(started())) == [Started(id="msg_1", model="claude", usage=Counts())]
    return [step for event in events for step in reader.read(an_event(event))]


def started(**usage: int) -> dict[str, Any]:
    """The event that begins a message."""
    return {"type": "message_start", "message": {"id": "msg_1", "model": "claude", "content": [], "usage": usage}}


def block(index: int, **fields: object) -> dict[str, Any]:
    """The event that begins a block."""
    return {"type": "content_block_start", "index": index, "content_block": fields}


def delta(index: int, **fields: object) -> dict[str, Any]:
    """An event that goes on with a block."""
    return {"type": "content_block_delta", "index": index, "delta": fields}


def stop(index: int) -> dict[str, Any]:
    """The event that ends a block."""
    return {"type": "content_block_stop", "index": index}


def ended(reason: str, **usage: int) -> list[dict[str, Any]]:
    """The events that end a message."""
    return [{"type": "message_delta", "delta": {"stop_reason": reason}, "usage": usage}, {"type": "message_stop"}]


def write(*steps: Step, echo: Echo = ECHO) -> bytes:
    """The stream of the steps, each written by itself."""
    writer = StreamWriter(echo)
    return b"".join(writer.write([step]) for step in (Started(id="msg_9"), *steps))


def contents(*steps: Step) -> list[dict[str, Any]]:
    """The blocks that the SDK finds in the stream of the steps."""
    return [content.model_dump(exclude_none=True) for content in message_of(write(*steps, *END)).content]


def an_input(number: int) -> str:
    """The arguments of a call, told by a number from the others'."""
    return f'{{"n":{number}}}'


# -- reading -----------------------------------------------------------------------------------------------------------


def test_a_whole_stream_is_read_into_steps() -> None:
    events = [
        started(input_tokens=3, cache_read_input_tokens=4, cache_creation_input_tokens=5, output_tokens=1),
        block(0, type="thinking", thinking="", signature=""),
        {"type": "ping"},
        delta(0, type="thinking_delta", thinking="hm"),
        delta(0, type="signature_delta", signature="sig"),
        stop(0),
        block(1, type="redacted_thinking", data="enc"),
        stop(1),
        block(2, type="text", text=""),
        delta(2, type="text_delta", text="Hi"),
        stop(2),
        block(3, type="tool_use", id="toolu_1", name="f", input={}),
        delta(3, type="input_json_delta", partial_json=""),
        delta(3, type="input_json_delta", partial_json='{"a":'),
        delta(3, type="input_json_delta", partial_json="1}"),
        stop(3),
        block(4, type="text", text=""),
        delta(4, type="text_delta", text="more"),
        delta(4, type="text_delta", text=" still"),
        stop(4),
        *ended("tool_use", output_tokens=20),
    ]
    reader = StreamReader(TARGET)
    assert [step for event in events for step in reader.read(an_event(event))] == [
        Started(id="msg_1", model="claude", usage=Counts(input=12, output=1, cached=4, cache_creation=5)),
        Pinged(),
        ThinkingDelta(text="hm"),
        Signed(signature="sig", vendor="anthropic"),
        Signed(signature="enc", vendor="anthropic", is_redacted=True),
        TextDelta(text="Hi"),
        CallBegan(index=0, id="toolu_1", name="f"),
        CallDelta(index=0, arguments='{"a":'),
        CallDelta(index=0, arguments="1}"),
        TextDelta(text="more", begins=True),
        TextDelta(text=" still"),
        Stopped(stop="tool"),
        Counted(usage=Counts(input=12, output=20, cached=4, cache_creation=5)),
        Ended(),
    ]


def test_a_call_without_deltas_has_what_it_was_begun_with() -> None:
    """Some compatible services send the whole input with the block's start; a tool that takes nothing gets no delta."""
    steps = read(
        block(0, type="tool_use", id="a", name="f", input={"x": 1}),
        stop(0),
        block(1, type="tool_use", id="b", name="g", input={}),
        delta(1, type="input_json_delta", partial_json=""),
        stop(1),
    )
    assert steps == [
        CallBegan(index=0, id="a", name="f"),
        CallDelta(index=0, arguments='{"x":1}'),
        CallBegan(index=1, id="b", name="g"),
        CallDelta(index=1, arguments="{}"),
    ]


def test_calls_are_counted_apart_from_other_blocks_and_may_interleave() -> None:
    steps = read(
        block(0, type="text", text="x"),
        block(1, type="tool_use", id="a", name="f"),
        block(2, type="tool_use", id="b", name="g"),
        delta(2, type="input_json_delta", partial_json="{}"),
        delta(1, type="input_json_delta", partial_json="{}"),
    )
    assert steps == [
        TextDelta(text="x"),
        CallBegan(index=0, id="a", name="f"),
        CallBegan(index=1, id="b", name="g"),
        CallDelta(index=1, arguments="{}"),
        CallDelta(index=0, arguments="{}"),
    ]


def test_blocks_of_tools_that_anthropic_runs_are_skipped_with_all_of_their_deltas() -> None:
    steps = read(
        block(0, type="server_tool_use", id="srv", name="web_search", input={}),
        delta(0, type="input_json_delta", partial_json='{"query":"x"}'),
        stop(0),
        block(1, type="web_search_tool_result", tool_use_id="srv", content=[{"type": "web_search_result"}]),
        stop(1),
        block(2, type="container_upload", file_id="f"),
        delta(2, type="text_delta", text="no"),
        stop(2),
        block(3, type="text", text=""),
        delta(3, type="citations_delta", citation=WEB),
        delta(3, type="text_delta", text="found"),
    )
    assert steps == [
        TextDelta(citations=(Citation(url="https://a.example", title="A", quote="q"),)),
        TextDelta(text="found"),
    ]


WEB = {
    "type": "web_search_result_location",
    "url": "https://a.example",
    "title": "A",
    "cited_text": "q",
    "encrypted_index": "e",
}


@pytest.mark.parametrize(
    ("location", "citation"),
    [
        (WEB, Citation(url="https://a.example", title="A", quote="q")),
        (
            {"type": "search_result_location", "source": "https://s.example", "title": "S", "cited_text": "q"},
            Citation(url="https://s.example", title="S", quote="q"),
        ),
        (
            {"type": "char_location", "document_index": 0, "document_title": "D", "cited_text": "q"},
            Citation(document=0, title="D", quote="q"),
        ),
        ({"type": "page_location", "document_index": 2, "cited_text": "q"}, Citation(document=2, quote="q")),
        ({"type": "something_new"}, None),
    ],
)
def test_citations_are_read(location: dict[str, Any], citation: Citation | None) -> None:
    steps = read(block(0, type="text", text=""), delta(0, type="citations_delta", citation=location))
    assert steps == ([] if citation is None else [TextDelta(citations=(citation,))])


@pytest.mark.parametrize(
    ("reason", "stop"),
    [
        ("end_turn", "end"),
        ("max_tokens", "length"),
        ("tool_use", "tool"),
        ("refusal", "refused"),
        ("pause_turn", "paused"),
        ("model_context_window_exceeded", "context_length"),
        ("compaction", "end"),
        ("something_new", "end"),
    ],
)
def test_reasons_to_stop_are_read(reason: str, stop: Stop) -> None:
    assert read(*ended(reason)) == [Stopped(stop=stop), Counted(usage=Counts()), Ended()]


def test_a_stop_sequence_and_thinking_tokens_are_read() -> None:
    event = {
        "type": "message_delta",
        "delta": {"stop_reason": "stop_sequence", "stop_sequence": "END"},
        "usage": {"output_tokens": 9, "input_tokens": 2, "output_tokens_details": {"thinking_tokens": 4}},
    }
    assert read(event) == [
        Stopped(stop="stop_sequence", stop_sequence="END"),
        Counted(usage=Counts(input=2, output=9, reasoning=4)),
    ]


def test_why_a_model_refuses_is_a_refusal() -> None:
    details = {"type": "refusal", "category": "bio", "explanation": "No."}
    event = {"type": "message_delta", "delta": {"stop_reason": "refusal", "stop_details": details}}
    assert read(event) == [RefusalDelta(text="No."), Stopped(stop="refused")]


@pytest.mark.parametrize(
    ("kind", "status"), [("overloaded_error", 529), ("rate_limit_error", 429), ("api_error", 500), ("new_error", 0)]
)
def test_an_error_in_the_stream_breaks_it(kind: str, status: int) -> None:
    event = {"type": "error", "error": {"type": kind, "message": "Overloaded"}}
    assert read(event) == [Broke(message="Overloaded", code=kind, status=status)]


def test_an_error_without_words_breaks_it_too() -> None:
    (step,) = read({"type": "error", "error": None})
    assert isinstance(step, Broke)
    assert step.code == "api_error"


@pytest.mark.parametrize("data", [b"{", b"nonsense", b'{"type":"ping"', b"\xff", b'{"delta":' * 100_000])
def test_what_is_no_json_breaks_the_stream(data: bytes) -> None:
    (step,) = StreamReader(TARGET).read(an_event(data))
    assert isinstance(step, Broke)
    assert step.code == "upstream_bad_answer"
    assert data.decode("latin1") not in step.message


@pytest.mark.parametrize(
    "event",
    [
        {},
        [],
        1,
        None,
        {"type": None},
        {"type": 7},
        {"type": "something_new", "index": 0},
        {"type": "content_block_delta"},
        {"type": "content_block_delta", "index": "0", "delta": {"type": "text_delta", "text": "x"}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": 5}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "new_delta", "text": "x"}},
        {"type": "content_block_delta", "index": 9, "delta": {"type": "input_json_delta", "partial_json": "x"}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "citations_delta"}},
        {"type": "content_block_start", "index": 0},
        {"type": "content_block_start", "index": 0, "content_block": {}},
        {"type": "content_block_stop"},
        {"type": "message_delta"},
        {"type": "message_delta", "delta": {"stop_reason": None}},
    ],
)
def test_odd_and_unknown_events_are_skipped(event: object) -> None:
    assert read(*([event] if isinstance(event, dict) else [])) == []
    reader = StreamReader(TARGET)
    assert reader.read(an_event(event)) == []
    assert reader.read(an_event(started())) == [Started(id="msg_1", model="claude", usage=Counts())]
    assert read(delta(0, type="text_delta", text="x")) == [TextDelta(text="x")]


def test_a_start_with_an_odd_usage_is_a_start() -> None:
    odd = {"type": "message_start", "message": {"id": "m", "usage": {"input_tokens": "many"}}}
    assert StreamReader(TARGET).read(an_event(odd)) == [Started(id="m")]
    assert StreamReader(TARGET).read(an_event({"type": "message_start"})) == [Started()]


def test_an_answer_starts_once_whatever_the_upstream_does() -> None:
    reader = StreamReader(TARGET)
    assert reader.read(an_event(delta(0, type="text_delta", text="x"))) == [Started(), TextDelta(text="x")]
    assert reader.read(an_event(started())) == []


def test_nothing_comes_behind_an_end_or_a_break() -> None:
    for last in ({"type": "message_stop"}, {"type": "error"}):
        reader = StreamReader(TARGET)
        assert reader.read(an_event(last)) != []
        assert reader.read(an_event(delta(0, type="text_delta", text="x"))) == []
        assert reader.finish() == []


def test_half_a_pair_of_surrogates_is_replaced() -> None:
    raw = rb'{"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"a\ud83d"}}'
    assert StreamReader(TARGET).read(an_event(raw)) == [Started(), TextDelta(text="a�")]


def test_an_event_without_data_says_nothing_but_for_a_comment() -> None:
    assert StreamReader(TARGET).read(sse.Event(raw=b"event: ping\n\n", name="ping", data=b"")) == []
    assert StreamReader(TARGET).read(sse.Event(raw=b": alive\n\n", name="", data=b"")) == [Pinged()]


def test_an_event_that_the_parser_did_not_hold_breaks_the_stream() -> None:
    parser, reader = sse.Parser(limit_bytes=2_000_000), StreamReader(TARGET)
    big = b"event: content_block_delta\ndata: {" + b" " * 3_000_000
    (step,) = [step for event in parser.feed(big) for step in reader.read(event)]
    assert isinstance(step, Broke)
    assert step.code == "upstream_bad_answer"


def test_a_type_may_stand_in_the_event_s_name_alone() -> None:
    assert StreamReader(TARGET).read(an_event({}, name="ping")) == [Pinged()]


def test_the_end_of_the_connection_ends_an_answer_that_told_why_it_stopped() -> None:
    reader = StreamReader(TARGET)
    reader.read(an_event({"type": "message_delta", "delta": {"stop_reason": "end_turn"}}))
    assert reader.finish() == [Ended()]
    assert reader.finish() == []


def test_a_stream_that_was_cut_does_not_end() -> None:
    reader = StreamReader(TARGET)
    reader.read(an_event(started()))
    reader.read(an_event(delta(0, type="text_delta", text="x")))
    assert reader.finish() == []


def test_the_end_is_told_once() -> None:
    reader = StreamReader(TARGET)
    steps = [step for event in ended("end_turn") for step in reader.read(an_event(event))]
    assert steps[-1] == Ended()
    assert reader.finish() == []


# -- writing -----------------------------------------------------------------------------------------------------------


def test_a_whole_stream_is_what_the_sdk_accumulates() -> None:
    message = message_of(
        write(
            ThinkingDelta(text="h"),
            ThinkingDelta(text="m"),
            Signed(signature="s", vendor="google"),
            TextDelta(text="Hi"),
            Pinged(),
            TextDelta(text=" there"),
            CallBegan(index=0, id="call_x1", name="f"),
            CallDelta(index=0, arguments='{"a":'),
            CallDelta(index=0, arguments='"b"}'),
            Stopped(stop="tool"),
            Counted(usage=Counts(input=10, output=5, cached=3, cache_creation=2, reasoning=1)),
            Ended(),
        )
    )
    assert message.to_dict(exclude_none=True) == {
        "id": "msg_9",
        "type": "message",
        "role": "assistant",
        "model": "gpt",
        "content": [
            {"type": "thinking", "thinking": "hm", "signature": "balancer:google:s"},
            {"type": "text", "text": "Hi there"},
            {"type": "tool_use", "id": "call_x1", "name": "f", "input": {"a": "b"}},
        ],
        "stop_reason": "tool_use",
        "usage": {
            "input_tokens": 5,
            "cache_creation_input_tokens": 2,
            "cache_read_input_tokens": 3,
            "output_tokens": 5,
            "output_tokens_details": {"thinking_tokens": 1},
        },
    }


def test_an_answer_without_an_id_gets_one_of_ours() -> None:
    writer = StreamWriter(ECHO)
    assert message_of(writer.write([Started(), *END])).id == "msg_a1b2"


def test_the_start_tells_the_usage_that_is_known_by_then() -> None:
    writer = StreamWriter(ECHO)
    (event,) = events_of(writer.write([Started(usage=Counts(input=7, cached=2))]))
    assert event["message"]["usage"]["input_tokens"] == 5
    assert event["message"]["stop_reason"] is None


def test_each_step_is_told_at_once() -> None:
    """Nothing is held back but what stands behind a call that is not whole."""
    writer = StreamWriter(ECHO)
    writer.write([Started()])
    for step in (
        TextDelta(text="a"),
        ThinkingDelta(text="b"),
        CallBegan(index=0, id="x1", name="f"),
        CallDelta(index=0, arguments="{}"),
        CallBegan(index=1, id="x2", name="g"),
        CallDelta(index=1, arguments="{}"),
    ):
        assert writer.write([step]) != b"", step
    assert writer.write([Counted(usage=Counts())]) == b""


CALLS = (
    CallBegan(index=0, id="a", name="f"),
    CallBegan(index=1, id="b", name="g"),
    CallBegan(index=2, id="c", name="h"),
)


@pytest.mark.parametrize(
    "steps",
    [
        pytest.param(
            (*(step for i, call in enumerate(CALLS) for step in (call, CallDelta(index=i, arguments=an_input(i)))),),
            id="one behind the other",
        ),
        pytest.param(
            (*CALLS, *(CallDelta(index=i, arguments=an_input(i)) for i in (0, 1, 2))),
            id="all announced first",
        ),
        pytest.param(
            (*CALLS, *(CallDelta(index=i, arguments=an_input(i)) for i in (2, 1, 0))),
            id="backwards",
        ),
        pytest.param(
            (
                *CALLS,
                *(
                    CallDelta(index=i, arguments=piece % i if "%" in piece else piece)
                    for piece in ('{"n"', ":%d", "}", " ")
                    for i in (1, 0, 2)
                ),
            ),
            id="in turns",
        ),
        pytest.param(
            (
                CALLS[0],
                CallDelta(index=0, arguments='{"n":0'),
                CALLS[1],
                CallDelta(index=1, arguments='{"n":1}'),
                CALLS[2],
                CallDelta(index=0, arguments="}"),
                CallDelta(index=2, arguments='{"n":2}'),
            ),
            id="one within another",
        ),
    ],
)
def test_calls_that_interleave_come_one_behind_the_other(steps: Sequence[Step]) -> None:
    assert contents(*steps) == [
        {"type": "tool_use", "id": "abc"[i], "name": "fgh"[i], "input": {"n": i}} for i in range(3)
    ]


@pytest.mark.parametrize("seed", range(200))
def test_whatever_interleaves_the_client_gets_whole_blocks_in_the_order_in_which_they_began(seed: int) -> None:
    draw = random.Random(seed)
    calls = [{"n": i, "s": draw.choice(["", "}", '"}', "x{", "ä\\"])} for i in range(draw.randrange(1, 5))]
    rest = [msgspec.json.encode(arguments).decode() for arguments in calls]
    begun: list[int] = []
    expected: list[dict[str, Any]] = []
    steps: list[Step] = []
    while any(rest) or len(begun) < len(calls):
        running = [i for i in begun if rest[i]]
        match draw.choice(["begin", "argue", "argue", "argue", "say"]):
            case "begin" if len(begun) < len(calls):
                index = len(begun)
                begun.append(index)
                steps.append(CallBegan(index=index, id=f"id{index}x", name="f"))
                expected.append({"type": "tool_use", "id": f"id{index}x", "name": "f", "input": calls[index]})
            case "argue" if running:
                index = draw.choice(running)
                cut = draw.randrange(1, len(rest[index]) + 1)
                steps.append(CallDelta(index=index, arguments=rest[index][:cut]))
                rest[index] = rest[index][cut:]
            case "say":
                steps.append(TextDelta(text="x"))
                if expected and expected[-1]["type"] == "text":
                    expected[-1]["text"] += "x"
                else:
                    expected.append({"type": "text", "text": "x"})
            case _:
                pass
    assert contents(*steps) == expected


def test_the_next_call_is_told_as_soon_as_the_one_before_it_is_whole() -> None:
    writer = StreamWriter(ECHO)
    writer.write([Started(), CALLS[0], CALLS[1], CallDelta(index=1, arguments='{"n"'), CALLS[2]])
    assert b"content_block_start" not in writer.write([CallDelta(index=0, arguments='{"n":')])
    told = events_of(writer.write([CallDelta(index=0, arguments="0}")]), opened=0)
    assert [event["type"] for event in told] == [
        "content_block_delta",
        "content_block_stop",
        "content_block_start",
        "content_block_delta",
    ]
    assert told[-1]["delta"]["partial_json"] == '{"n"'


@pytest.mark.parametrize("id_", ["", "call_0", "0", "functions.f:0", "x" * 65])
def test_an_id_that_anthropic_would_refuse_or_that_may_come_again_is_another_one(id_: str) -> None:
    """A client may go on with Anthropic itself, which refuses an id that was there before."""
    steps = (
        CallBegan(index=0, id=id_, name="f"),
        CallDelta(index=0, arguments="{}"),
        CallBegan(index=1, id=id_, name="f"),
    )
    ids = [block["id"] for block in contents(*steps)]
    assert len(set(ids)) == 2
    assert all(re.fullmatch("toolu_[0-9a-f]{24}", found) for found in ids)


def test_other_ids_stay_unless_they_come_twice() -> None:
    ids = ["call_00_Xk2", "chatcmpl-tool-1f", "toolu_01D7", "Ab3dE6gH9", "fc_1f2e", "Ab3dE6gH9"]
    found = [block["id"] for block in contents(*(CallBegan(index=i, id=id_, name="f") for i, id_ in enumerate(ids)))]
    assert found[:-1] == ids[:-1]
    assert found[-1].startswith("toolu_")


def test_a_brace_within_a_string_does_not_make_a_call_whole() -> None:
    assert contents(
        CALLS[0],
        CALLS[1],
        CallDelta(index=0, arguments='{"n":"}'),
        CallDelta(index=1, arguments="{}"),
        CallDelta(index=0, arguments='"}'),
    ) == [
        {"type": "tool_use", "id": "a", "name": "f", "input": {"n": "}"}},
        {"type": "tool_use", "id": "b", "name": "g", "input": {}},
    ]


def test_text_behind_an_unfinished_call_waits_for_it() -> None:
    assert contents(
        CALLS[0],
        CallDelta(index=0, arguments='{"n":'),
        TextDelta(text="x"),
        CallDelta(index=0, arguments="1}"),
        TextDelta(text="y"),
    ) == [
        {"type": "tool_use", "id": "a", "name": "f", "input": {"n": 1}},
        {"type": "text", "text": "xy"},
    ]


def test_a_call_that_takes_nothing_has_an_empty_input() -> None:
    assert contents(CALLS[0], CALLS[1]) == [
        {"type": "tool_use", "id": "a", "name": "f", "input": {}},
        {"type": "tool_use", "id": "b", "name": "g", "input": {}},
    ]


def test_arguments_of_a_call_that_nobody_began_are_nothing() -> None:
    assert contents(CallDelta(index=4, arguments="{}"), TextDelta(text="a")) == [{"type": "text", "text": "a"}]


def test_thoughts_are_sealed_for_the_vendor_that_gave_them() -> None:
    """A signature with no thought before it gets a block of its own; an unsigned thought is its service's."""
    assert contents(
        ThinkingDelta(text="a"),
        ThinkingDelta(text="b", begins=True),
        Signed(signature="s1", vendor="google"),
        Signed(signature="s2", vendor="google"),
        ThinkingDelta(text="c"),
        Signed(signature="enc", vendor="google", is_redacted=True),
        TextDelta(text="x"),
        Signed(signature="s3", vendor="google"),
        TextDelta(text="y"),
    ) == [
        {"type": "thinking", "thinking": "a", "signature": "balancer:openai/p1:"},
        {"type": "thinking", "thinking": "b", "signature": "balancer:google:s1"},
        {"type": "thinking", "thinking": "", "signature": "balancer:google:s2"},
        {"type": "thinking", "thinking": "c", "signature": "balancer:openai/p1:"},
        {"type": "redacted_thinking", "data": "balancer:google:enc"},
        {"type": "text", "text": "x"},
        {"type": "thinking", "thinking": "", "signature": "balancer:google:s3"},
        {"type": "text", "text": "y"},
    ]


def test_an_empty_signature_of_no_thought_is_nothing() -> None:
    assert contents(Signed(signature="", vendor="google"), TextDelta(text="x")) == [{"type": "text", "text": "x"}]
    assert contents(ThinkingDelta(text="t"), Signed(signature="", vendor="google")) == [
        {"type": "thinking", "thinking": "t", "signature": "balancer:google:"}
    ]


def test_texts_begin_where_they_are_told_to() -> None:
    assert contents(
        TextDelta(text="a"),
        TextDelta(text="b"),
        TextDelta(begins=True),
        TextDelta(text="c"),
        TextDelta(text="d", begins=True),
    ) == [{"type": "text", "text": text} for text in ("ab", "c", "d")]


def test_pages_of_the_web_are_cited_and_other_places_are_not() -> None:
    assert contents(
        TextDelta(text="a", citations=(Citation(url="https://a.example", quote="q"), Citation(document=0))),
        TextDelta(citations=(Citation(url="https://b.example", title="B"),)),
    ) == [
        {
            "type": "text",
            "text": "a",
            "citations": [
                {
                    "type": "web_search_result_location",
                    "url": "https://a.example",
                    "cited_text": "q",
                    "encrypted_index": "",
                },
                {
                    "type": "web_search_result_location",
                    "url": "https://b.example",
                    "title": "B",
                    "cited_text": "",
                    "encrypted_index": "",
                },
            ],
        }
    ]


def test_a_refusal_is_text_and_the_reason() -> None:
    message = message_of(write(RefusalDelta(text="I "), RefusalDelta(text="won't."), *END))
    assert message.stop_reason == "refusal"
    assert [content.model_dump(exclude_none=True) for content in message.content] == [
        {"type": "text", "text": "I won't."}
    ]


@pytest.mark.parametrize(
    ("stop", "calls", "reason"),
    [
        ("end", False, "end_turn"),
        ("end", True, "tool_use"),
        ("tool", True, "tool_use"),
        ("tool", False, "end_turn"),
        ("length", True, "max_tokens"),
        ("filtered", False, "refusal"),
        ("refused", False, "refusal"),
        ("paused", False, "pause_turn"),
        ("context_length", False, "model_context_window_exceeded"),
        ("stop_sequence", False, "stop_sequence"),
    ],
)
def test_reasons_to_stop_are_written(stop: Stop, calls: bool, reason: str) -> None:
    steps = [CALLS[0]] if calls else [TextDelta(text="a")]
    message = message_of(write(*steps, Stopped(stop=stop, stop_sequence="X"), Ended()))
    assert message.stop_reason == reason
    assert message.stop_sequence == "X"


def test_an_answer_that_says_nothing_is_a_message_still() -> None:
    assert message_of(write(*END)).content == []
    assert message_of(StreamWriter(ECHO).write([Ended()])).stop_reason == "end_turn"


def test_an_end_is_told_once_and_a_break_not_at_all() -> None:
    writer = StreamWriter(ECHO)
    writer.write([Started(), *END])
    assert writer.write([Ended()]) == b""
    assert writer.write([Broke(message="x")]) == b""


def test_text_is_any_text() -> None:
    said = 'quote " back \\ line \n percent %d nul \x00 emoji 😀 \u2028'
    assert contents(TextDelta(text=said)) == [{"type": "text", "text": said}]


def test_what_is_written_is_read_as_it_was() -> None:
    steps: list[Step] = [
        ThinkingDelta(text="hm"),
        Signed(signature="balancer:google:s", vendor="anthropic"),
        TextDelta(text="a"),
        TextDelta(text="b", begins=True),
        CallBegan(index=0, id="x1", name="f"),
        CallDelta(index=0, arguments='{"a":1}'),
        CallBegan(index=1, id="x2", name="g"),
        CallDelta(index=1, arguments="{}"),
        Stopped(stop="tool"),
        Counted(usage=Counts(input=10, output=5, cached=4)),
        Ended(),
    ]
    writer, reader, parser = StreamWriter(ECHO), StreamReader(TARGET), sse.Parser()
    sent = [Signed(signature="s", vendor="google") if isinstance(step, Signed) else step for step in steps]
    stream = writer.write([Started(id="m"), *sent])
    told = [step for event in parser.feed(stream) for step in reader.read(event)]
    assert told == [Started(id="m", model="gpt", usage=Counts()), *steps]
