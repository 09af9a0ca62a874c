"""Streams of chat completion chunks, read and written."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types.chat import ChatCompletionChunk

from balancer.sse import Event, Parser
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
    Stopped,
    TextDelta,
    ThinkingDelta,
)
from balancer.translation.chat.inputs import Unwrapping, bare, wrapped
from balancer.translation.chat.streams import StreamReader, StreamWriter
from balancer.translation.conversation import Citation, Conversation, Reasoning, Target, Tool
from tests.pure.translation.chat_shapes import events, sdk_chunks

TARGET = Target(model="m", vendor="openai/x")
STARTED = Started(id="chatcmpl-1", model="m-1")


def chunk(delta: object = None, reason: object = None, **fields: object) -> dict[str, object]:
    choice = {"index": 0, "delta": {} if delta is None else delta, "finish_reason": reason}
    return {"id": "chatcmpl-1", "object": "chat.completion.chunk", "model": "m-1", "choices": [choice], **fields}


def call(index: object = 0, id_: object = None, name: object = None, arguments: object = None) -> dict[str, object]:
    """A piece of a call in a chunk, as most servers cut it."""
    function = {"name": name, "arguments": arguments}
    piece = {"index": index, "id": id_, "function": {key: each for key, each in function.items() if each is not None}}
    return chunk({"tool_calls": [{key: each for key, each in piece.items() if each is not None}]})


def heard(*data: object) -> list[Step]:
    reader = StreamReader(TARGET)
    steps = [step for event in events(*data) for step in reader.read(event)]
    return steps + reader.finish()


def told(steps: Iterable[Step], **fields: Any) -> list[dict[str, Any]]:
    writer = StreamWriter(echo(**fields))
    return sdk_chunks(b"".join(writer.write([step]) for step in steps))


def echo(**fields: Any) -> Echo:
    return Echo(conversation=Conversation(model="m", stream=True, **fields), model="seen", id="abc", created=7)


# -- from upstreams ----------------------------------------------------------------------------------------------------


def test_a_stream_of_openai_is_read() -> None:
    steps = heard(
        chunk({"role": "assistant", "content": "", "refusal": None}, usage=None),
        chunk({"content": "Hel"}),
        chunk({"content": "lo"}),
        call(0, "a", "f", ""),
        call(1, "b", "g", ""),
        call(0, arguments='{"x"'),
        call(1, arguments="{}"),
        call(0, arguments=":1}"),
        chunk({}, "tool_calls"),
        {
            "id": "chatcmpl-1",
            "choices": [],
            "usage": {
                "prompt_tokens": 20,
                "completion_tokens": 7,
                "prompt_tokens_details": {"cached_tokens": 8},
                "completion_tokens_details": {"reasoning_tokens": 3},
            },
        },
        "[DONE]",
    )
    assert steps == [
        STARTED,
        TextDelta(text="Hel"),
        TextDelta(text="lo"),
        CallBegan(index=0, id="a", name="f"),
        CallBegan(index=1, id="b", name="g"),
        CallDelta(index=0, arguments='{"x"'),
        CallDelta(index=1, arguments="{}"),
        CallDelta(index=0, arguments=":1}"),
        Stopped(stop="tool"),
        Counted(usage=Counts(input=20, output=7, cached=8, reasoning=3)),
        Ended(),
    ]


CALLED: list[Step] = [CallBegan(index=0, id="a", name="f"), CallDelta(index=0, arguments="{}")]
CALLS: list[Step] = [*CALLED, CallBegan(index=1, id="b", name="g"), CallDelta(index=1, arguments="[]")]
SAID: list[tuple[str, list[object], list[Step]]] = [
    ("null deltas", [chunk({"role": None, "content": None, "tool_calls": None, "reasoning_content": None})], []),
    ("no delta", [{"id": "chatcmpl-1", "model": "m-1", "choices": [{"index": 0}]}], []),
    ("a null delta", [{"id": "chatcmpl-1", "model": "m-1", "choices": [{"index": 0, "delta": None}]}], []),
    ("a message for a delta", [{**chunk(), "choices": [{"message": {"content": "x"}}]}], [TextDelta(text="x")]),
    ("thoughts of DeepSeek", [chunk({"content": None, "reasoning_content": "hm"})], [ThinkingDelta(text="hm")]),
    ("thoughts of later vLLM", [chunk({"reasoning": "hm"})], [ThinkingDelta(text="hm")]),
    (
        "thoughts of Mistral",
        [chunk({"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}]})],
        [ThinkingDelta(text="hm")],
    ),
    (
        "thoughts of OpenRouter",
        [
            chunk({"reasoning": "h", "reasoning_details": [{"type": "reasoning.text", "text": "h", "index": 0}]}),
            chunk({"reasoning_details": [{"type": "reasoning.text", "signature": "s", "format": "a", "index": 0}]}),
            chunk({"reasoning_details": [{"type": "reasoning.text", "text": "i", "index": 1}]}),
            chunk({"reasoning_details": [{"type": "reasoning.encrypted", "data": "e", "id": "r", "index": 2}]}),
        ],
        [
            ThinkingDelta(text="h"),
            Signed(signature='["reasoning.text","a","","s"]', vendor="openai/x"),
            ThinkingDelta(text="i", begins=True),
            Signed(signature='["reasoning.encrypted","","r","e"]', vendor="openai/x", is_redacted=True),
        ],
    ),
    ("a refusal", [chunk({"refusal": "No."})], [RefusalDelta(text="No.")]),
    (
        "citations",
        [chunk({"annotations": [{"type": "url_citation", "url_citation": {"url": "https://x", "title": "X"}}]})],
        [TextDelta(citations=(Citation(url="https://x", title="X"),))],
    ),
    ("a whole call in a chunk", [call(0, "a", "f", "{}")], CALLED),
    ("arguments as an object", [call(0, "a", "f", {})], CALLED),
    ("calls without an index", [call(None, "a", "f", "{}"), call(None, "b", "g", "[]")], CALLS),
    (
        "pieces without an index",
        [call(None, "a", "f"), call(None, arguments="{"), call(None, "a", "f", "}"), call(None, "b", "g", "[]")],
        [
            CallBegan(index=0, id="a", name="f"),
            CallDelta(index=0, arguments="{"),
            CallDelta(index=0, arguments="}"),
            *CALLS[2:],
        ],
    ),
    ("all calls at index 0", [call(0, "a", "f", "{}"), call(0, "b", "g", "[]")], CALLS),
    ("calls from index 1", [call(1, "a", "f", "{}"), call(2, "b", "g", "[]")], CALLS),
    ("id and name with every piece", [call(0, "a", "f"), call(0, "a", "f", "{}")], CALLED),
    ("empty id and name with later pieces", [call(0, "a", "f"), call(0, "", "", "{}")], CALLED),
    ("a name that comes late", [call(0, "a"), call(0, None, None, "{}"), call(0, None, "f")], CALLED),
    ("an index as a float", [call(0.0, "a", "f"), call(0.0, None, None, "{}")], CALLED),
    (
        "a custom call",
        [
            chunk({"tool_calls": [{"index": 0, "id": "a", "type": "custom", "custom": {"name": "g", "input": ""}}]}),
            chunk({"tool_calls": [{"index": 0, "custom": {"input": "run"}}]}),
        ],
        [CallBegan(index=0, id="a", name="g", kind="custom"), CallDelta(index=0, arguments="run")],
    ),
    (
        "odd fields beside a text",
        [chunk({"content": "x", "tool_calls": 5, "reasoning_content": {}, "annotations": "y"}, 7, usage=[])],
        [TextDelta(text="x")],
    ),
    ("a lone surrogate", [json.dumps(chunk({"content": "@"})).replace("@", "\\ud83d")], [TextDelta(text="\ufffd")]),
    (
        "usage with every chunk",
        [chunk(usage={"prompt_tokens": 1}), chunk(usage={"prompt_tokens": 1})],
        [Counted(usage=Counts(input=1))],
    ),
    (
        "usage of Moonshot",
        [{**chunk(), "choices": [{"delta": {}, "usage": {"prompt_tokens": 1}}]}],
        [Counted(usage=Counts(input=1))],
    ),
    ("a chunk of nothing known", [{"id": "chatcmpl-1", "model": "m-1", "x_groq": {}}, {}], []),
]


@pytest.mark.parametrize(("data", "steps"), [case[1:] for case in SAID], ids=[case[0] for case in SAID])
def test_what_servers_say_is_read(data: list[object], steps: list[Step]) -> None:
    assert heard(*data, "[DONE]") == [STARTED, *steps, Ended()]


def test_azures_first_chunk_is_no_start() -> None:
    first = {"id": "", "model": "", "choices": [], "prompt_filter_results": [{"prompt_index": 0}]}
    later = {**chunk(), "choices": [{"index": 0, "finish_reason": None, "content_filter_results": {}}]}
    steps = heard(first, chunk({"role": "assistant", "content": ""}), chunk({"content": "x"}), later, "[DONE]")
    assert steps == [STARTED, TextDelta(text="x"), Ended()]


STOPS: list[tuple[list[object], list[Step]]] = [
    ([chunk({"content": "x"}, "stop")], [TextDelta(text="x"), Stopped(stop="end")]),
    ([chunk({}, "length")], [Stopped(stop="length")]),
    ([chunk({}, "content_filter")], [Stopped(stop="filtered")]),
    ([chunk({}, ""), chunk({}, "null"), chunk({}, "stop"), chunk({}, "stop")], [Stopped(stop="end")]),
    ([chunk({}, "abort")], [Stopped(stop="end")]),
    ([call(0, "a", "f", "{}"), chunk({}, "stop")], [*CALLED, Stopped(stop="tool")]),
    ([chunk({"refusal": "No."}), chunk({}, "stop")], [RefusalDelta(text="No."), Stopped(stop="refused")]),
    (
        [chunk({}, "stop", usage={"prompt_tokens": 1})],
        [Counted(usage=Counts(input=1)), Stopped(stop="end")],
    ),
]


@pytest.mark.parametrize(("data", "steps"), STOPS, ids=lambda case: str(case)[:80])
@pytest.mark.parametrize("end", [[], ["[DONE]"], [" [DONE] ", chunk({"content": "late"})]], ids=["cut", "done", "late"])
def test_why_the_model_ended(data: list[object], steps: list[Step], end: list[object]) -> None:
    assert heard(*data, *end) == [STARTED, *steps, Ended()]


def test_a_stream_that_is_cut_does_not_end() -> None:
    assert heard(chunk({"content": "x"})) == [STARTED, TextDelta(text="x")]
    assert heard() == []


BROKEN: list[tuple[object, Broke]] = [
    (
        {"error": {"message": "Overloaded", "code": "overloaded", "type": "server_error"}},
        Broke(message="Overloaded", code="overloaded"),
    ),
    (
        {"error": {"message": "Slow down", "code": 429}, "choices": [{"delta": {}, "finish_reason": "error"}]},
        Broke(message="Slow down", status=429),
    ),
    ({"error": "Gone"}, Broke(message="Gone")),
    ({"object": "error", "message": "Bad", "code": 400}, Broke(message="Bad", status=400)),
    ("{", Broke(message="the upstream sent a chunk that is no JSON object", code="upstream_bad_answer")),
    ("[1]", Broke(message="the upstream sent a chunk that is no JSON object", code="upstream_bad_answer")),
    (
        chunk({}, "error"),
        Broke(message="the upstream ended its answer with an error", code="upstream_bad_answer"),
    ),
]


@pytest.mark.parametrize(("data", "broke"), BROKEN, ids=str)
def test_an_upstream_that_breaks_off_says_nothing_more(data: object, broke: Broke) -> None:
    assert heard(chunk({"content": "x"}), data, chunk({}, "stop"), "[DONE]") == [STARTED, TextDelta(text="x"), broke]


def test_comments_are_signs_of_life_and_events_without_data_are_nothing() -> None:
    reader = StreamReader(TARGET)
    assert reader.read(Event(b": OPENROUTER PROCESSING\n\n", "", b"")) == [Pinged()]
    assert reader.read(Event(b"event: x\n\n", "x", b"")) == []


def test_an_event_named_error_is_one() -> None:
    event = Event(b"", "error", b'{"message":"Gone"}')
    assert StreamReader(TARGET).read(event) == [Broke(message="Gone")]


def test_an_event_too_long_to_hold_breaks_the_stream() -> None:
    reader = StreamReader(TARGET)
    (step,) = reader.read(Event(b"data: " + b"x" * 2_000_000, "", b""))
    assert step == Broke(message="the upstream sent a chunk that is too long", code="upstream_bad_answer")


def test_made_ids_are_kept_for_the_whole_call() -> None:
    steps = heard(call(0, None, "f", "{"), call(0, "late", None, "}"), call(1, None, "f", "{}"), "[DONE]")
    first, second = (step.id for step in steps if isinstance(step, CallBegan))
    assert first != second
    assert first.startswith("call_")
    assert [step.index for step in steps if isinstance(step, CallDelta)] == [0, 0, 1]


# -- to clients --------------------------------------------------------------------------------------------------------


def deltas(chunks: list[dict[str, Any]]) -> list[Any]:
    return [each["choices"][0]["delta"] for each in chunks if each["choices"]]


def test_a_whole_stream_is_written() -> None:
    chunks = told(
        [
            Started(id="msg_1", model="claude"),
            ThinkingDelta(text="h"),
            ThinkingDelta(text="m"),
            Signed(signature="s", vendor="anthropic"),
            Signed(signature="e", vendor="anthropic", is_redacted=True),
            TextDelta(text="Hi"),
            RefusalDelta(text="No."),
            CallBegan(index=0, id="a", name="f"),
            CallBegan(index=1, id="b", name="g"),
            CallDelta(index=0, arguments='{"x":'),
            CallDelta(index=0, arguments="1}"),
            Stopped(stop="tool"),
            Counted(usage=Counts(input=5, output=2)),
            Ended(),
        ]
    )
    head = {"id": "msg_1", "object": "chat.completion.chunk", "created": 7, "model": "seen"}
    assert all(each.items() >= head.items() for each in chunks)
    assert deltas(chunks) == [
        {"role": "assistant", "content": ""},
        {"reasoning_content": "h", "reasoning_details": [{"type": "reasoning.text", "text": "h", "index": 0}]},
        {"reasoning_content": "m", "reasoning_details": [{"type": "reasoning.text", "text": "m", "index": 0}]},
        {
            "reasoning_details": [
                {
                    "type": "reasoning.text",
                    "text": "",
                    "signature": "balancer:anthropic:s",
                    "format": "anthropic",
                    "index": 0,
                }
            ]
        },
        {
            "reasoning_details": [
                {"type": "reasoning.encrypted", "data": "balancer:anthropic:e", "format": "anthropic", "index": 1}
            ]
        },
        {"content": "Hi"},
        {"refusal": "No."},
        {"tool_calls": [{"index": 0, "id": "a", "type": "function", "function": {"name": "f", "arguments": ""}}]},
        {"tool_calls": [{"index": 1, "id": "b", "type": "function", "function": {"name": "g", "arguments": ""}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"x":'}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": "1}"}}]},
        {"tool_calls": [{"index": 1, "function": {"arguments": "{}"}}]},
        {},
    ]
    reasons = [each["choices"][0]["finish_reason"] for each in chunks if each["choices"]]
    assert reasons == [None] * 12 + ["tool_calls"]
    assert [each["usage"] for each in chunks[:-1]] == [None] * 13
    assert chunks[-1] == {
        **head,
        "choices": [],
        "usage": {
            "prompt_tokens": 5,
            "completion_tokens": 2,
            "total_tokens": 7,
            "prompt_tokens_details": {"cached_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": 0},
        },
    }


def test_the_sdk_makes_an_answer_of_a_stream() -> None:
    steps: list[Step] = [
        Started(id="msg_1"),
        ThinkingDelta(text="h"),
        ThinkingDelta(text="m"),
        Signed(signature="s", vendor="anthropic"),
        Signed(signature="e", vendor="anthropic", is_redacted=True),
        TextDelta(text="a", citations=(Citation(url="https://x", title="X"),)),
        TextDelta(text="b", citations=(Citation(url="https://y", title="Y"),), begins=True),
        *CALLS,
        Stopped(stop="tool"),
        Counted(usage=Counts(input=5, output=2)),
        Ended(),
    ]
    state: ChatCompletionStreamState[None] = ChatCompletionStreamState()
    for each in told(steps):
        state.handle_chunk(ChatCompletionChunk.model_validate(each))
    completion = state.get_final_completion().model_dump(mode="json")
    (choice,) = completion["choices"]
    message = choice["message"]
    assert (message["content"], message["reasoning_content"], choice["finish_reason"]) == ("ab", "hm", "tool_calls")
    assert [each["function"]["arguments"] for each in message["tool_calls"]] == ["{}", "[]"]
    assert [each["url_citation"]["start_index"] for each in message["annotations"]] == [0, 1]
    first, second = message["reasoning_details"]
    assert (first["text"], first["signature"], first["format"]) == ("hm", "balancer:anthropic:s", "anthropic")
    assert (second["type"], second["data"]) == ("reasoning.encrypted", "balancer:anthropic:e")
    assert completion["usage"]["total_tokens"] == 7


def test_usage_is_told_only_to_who_asked() -> None:
    chunks = told([STARTED, Counted(usage=Counts(input=5)), Stopped(stop="end"), Ended()], wants_usage=False)
    assert len(chunks) == 2
    assert not any("usage" in each for each in chunks)


def test_an_empty_stream_is_a_stream() -> None:
    chunks = told([Ended()])
    assert chunks[0]["id"] == "chatcmpl-abc"
    assert [each["choices"][0]["finish_reason"] for each in chunks if each["choices"]] == [None, "stop"]
    called = told([STARTED, *CALLED, Ended()])
    assert called[-2]["choices"][0]["finish_reason"] == "tool_calls"


def test_a_ping_is_a_comment() -> None:
    writer = StreamWriter(echo())
    assert writer.write([Pinged()]) == b": ping\n\n"
    assert writer.write([Counted(usage=Counts())]) == writer.write([]) == b""


def test_citations_are_told_in_characters_of_the_whole_text() -> None:
    chunks = told(
        [
            STARTED,
            TextDelta(text="See ", begins=True),
            TextDelta(text="here", begins=True),
            TextDelta(citations=(Citation(url="https://x", title="X"), Citation(document=0))),
            TextDelta(text="!", begins=True, citations=(Citation(url="https://y", start=0, end=1),)),
            Ended(),
        ]
    )
    found = [note["url_citation"] for delta in deltas(chunks) for note in delta.get("annotations", [])]
    assert found == [
        {"url": "https://x", "title": "X", "start_index": 4, "end_index": 8},
        {"url": "https://y", "title": "", "start_index": 8, "end_index": 9},
    ]


def test_thoughts_that_the_client_will_not_have_keep_their_signature_only() -> None:
    steps: list[Step] = [STARTED, ThinkingDelta(text="hm"), Signed(signature="s", vendor="anthropic"), Ended()]
    found = deltas(told(steps, reasoning=Reasoning(is_shown=False)))
    assert [sorted(delta) for delta in found] == [["content", "role"], ["reasoning_details"], []]


def test_a_new_thought_has_the_next_index() -> None:
    steps: list[Step] = [
        STARTED,
        ThinkingDelta(text="a"),
        ThinkingDelta(text="b", begins=True),
        TextDelta(text="x"),
        ThinkingDelta(text="c"),
        Signed(signature="s", vendor="v"),
        Signed(signature="alone", vendor="v"),
        Ended(),
    ]
    found = [each["index"] for delta in deltas(told(steps)) for each in delta.get("reasoning_details", [])]
    assert found == [0, 1, 2, 2, 3]


def test_a_custom_call_that_was_made_of_a_function_is_bare_again() -> None:
    arguments = '{"input": "say \\"x\\" \\ud83d\\ude00"}'
    steps: list[Step] = [STARTED, CallBegan(index=0, id="a", name="g")]
    steps += [CallDelta(index=0, arguments=piece) for piece in arguments]
    found = deltas(_unjudged([*steps, Stopped(stop="tool"), Ended()], tools=(Tool(name="g", kind="custom"),)))
    pieces = [each for delta in found for each in delta.get("tool_calls", [])]
    assert pieces[0] == {"index": 0, "id": "a", "type": "custom", "custom": {"name": "g", "input": ""}}
    assert "".join(each["custom"]["input"] for each in pieces) == 'say "x" 😀'


def _unjudged(steps: list[Step], **fields: Any) -> list[dict[str, Any]]:
    """The SDK has no type for pieces of custom calls, though OpenAI streams them."""
    data = [event.data for event in Parser().feed(StreamWriter(echo(**fields)).write(steps))]
    return [json.loads(each) for each in data[:-1]]


def test_a_stream_written_and_read_is_the_same() -> None:
    steps: list[Step] = [
        Started(id="chatcmpl-1", model="seen"),
        TextDelta(text='He said "é😀"\n\u2028'),
        CallBegan(index=0, id="a", name="f"),
        CallDelta(index=0, arguments="{}"),
        Stopped(stop="tool"),
        Counted(usage=Counts(input=5, output=2, cached=1, cache_creation=1, reasoning=1)),
        Ended(),
    ]
    reader = StreamReader(TARGET)
    stream = StreamWriter(echo()).write(steps)
    assert [step for event in Parser().feed(stream) for step in reader.read(event)] == steps


@pytest.mark.parametrize("size", [1, 7, 64, 1000])
def test_a_stream_may_be_cut_anywhere(size: int) -> None:
    stream = b"".join(bytes(event.raw) for event in events(chunk({"content": "Hé"}), call(0, "a", "f", "{}"), "[DONE]"))
    parser, reader = Parser(), StreamReader(TARGET)
    steps: list[Step] = []
    for at in range(0, len(stream), size):
        for event in parser.feed(stream[at : at + size]):
            steps += reader.read(event)
    assert steps == [STARTED, TextDelta(text="Hé"), *CALLED, Ended()]


def _json_values() -> st.SearchStrategy[Any]:
    scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
    names = st.sampled_from(
        ("id", "model", "choices", "delta", "message", "content", "tool_calls", "index", "function", "custom", "name",
         "arguments", "usage", "prompt_tokens", "finish_reason", "reasoning_details", "text", "type", "annotations")
    )  # fmt: skip
    return st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=5))


@given(st.lists(_json_values(), max_size=4))
def test_no_chunk_is_too_odd_to_read(values: list[Any]) -> None:
    steps = heard(*(json.dumps(value) for value in values))
    StreamWriter(echo()).write([step for step in steps if not isinstance(step, Broke)])


# -- inputs of custom tools --------------------------------------------------------------------------------------------


@given(st.text(), st.integers(1, 9), st.booleans())
def test_an_input_comes_out_of_arguments_cut_anywhere(text: str, size: int, is_ascii: bool) -> None:
    arguments = json.dumps({"input": text}, ensure_ascii=is_ascii)
    pieces = [arguments[at : at + size] for at in range(0, len(arguments), size)]
    unwrapping = Unwrapping()
    assert "".join([unwrapping.feed(piece) for piece in pieces]) + unwrapping.finish() == text
    assert bare(arguments) == bare(wrapped(text)) == text


@pytest.mark.parametrize(
    "arguments", ['{"patch": "x"}', '{"input": 5}', '{"input', "run", "{}", '{"input":["a"]}', "", '"x"']
)
def test_other_arguments_come_out_as_they_are(arguments: str) -> None:
    unwrapping = Unwrapping()
    assert "".join([unwrapping.feed(piece) for piece in arguments]) + unwrapping.finish() == arguments
    assert bare(arguments) == arguments


def test_an_input_is_told_as_soon_as_it_is_whole() -> None:
    unwrapping = Unwrapping()
    pieces = ['{"inp', 'ut":"a', "b\\", "nc\\ud8", "3d", "\\ude", "00", 'd"', "}"]
    assert [unwrapping.feed(piece) for piece in pieces] == ["", "a", "b", "\nc", "", "", "😀", "d", ""]


def test_halves_of_pairs_do_not_break_an_input() -> None:
    unwrapping = Unwrapping()
    fed = [unwrapping.feed(piece) for piece in ('{"input":"\\ud83d', "x\\ud83d", '\\n\\udc00"}')]
    assert "".join(fed) == "\ufffdx\ufffd\n\ufffd"
