"""Whole chat completions, read and written."""

from __future__ import annotations

import json
from typing import Any

import pytest

from balancer.errors import UpstreamAnswerError
from balancer.translation.answer import Answer, Counts, Echo, Said, Stop
from balancer.translation.chat.answers import read_answer, write_answer
from balancer.translation.chat.reading import read_request
from balancer.translation.chat.writing import write_request
from balancer.translation.conversation import (
    Call,
    Citation,
    Conversation,
    Reasoning,
    Refusal,
    Target,
    Text,
    Thinking,
    Tool,
    Turn,
)
from tests.pure.translation.chat_shapes import sdk_answer

TARGET = Target(model="m", vendor="openai/x")


def echo(**fields: Any) -> Echo:
    return Echo(conversation=Conversation(model="m", **fields), model="seen", id="abc", created=7)


def message(**fields: object) -> tuple[Said, ...]:
    return answer({"message": {"role": "assistant", "content": None, **fields}}).parts


def answer(choice: dict[str, object], **fields: object) -> Answer:
    body = {"id": "chatcmpl-1", "object": "chat.completion", "model": "m-1", "choices": [choice], **fields}
    return read_answer(json.dumps(body).encode(), TARGET)


def test_an_answer_of_openai_is_read() -> None:
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"x":1}'}}
    custom = {"id": "b", "type": "custom", "custom": {"name": "g", "input": "run"}}
    assert answer(
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hi", "refusal": None, "tool_calls": [call, custom]},
            "logprobs": None,
            "finish_reason": "tool_calls",
        },
        usage={
            "prompt_tokens": 20,
            "completion_tokens": 7,
            "total_tokens": 27,
            "prompt_tokens_details": {"cached_tokens": 8, "cache_write_tokens": 4},
            "completion_tokens_details": {"reasoning_tokens": 3},
        },
    ) == Answer(
        id="chatcmpl-1",
        model="m-1",
        parts=(
            Text(text="Hi"),
            Call(id="a", name="f", arguments='{"x":1}'),
            Call(id="b", name="g", arguments="run", kind="custom"),
        ),
        stop="tool",
        usage=Counts(input=20, output=7, cached=8, cache_creation=4, reasoning=3),
    )


MESSAGES: list[tuple[dict[str, object], tuple[Said, ...]]] = [
    ({"content": ""}, ()),
    ({"refusal": "No."}, (Refusal(text="No."),)),
    (
        {"content": "x", "reasoning_content": "hm"},
        (Thinking(text="hm", vendor="openai/x"), Text(text="x")),
    ),
    ({"reasoning": "hm"}, (Thinking(text="hm", vendor="openai/x"),)),
    (
        {
            "content": [
                {"type": "thinking", "thinking": "hm", "text": "no"},
                {"type": "text", "text": "x"},
            ]
        },
        (Thinking(text="hm", vendor="openai/x"), Text(text="x")),
    ),
    (
        {"reasoning": "hm", "reasoning_details": [{"type": "reasoning.summary", "summary": "hm", "index": 0}]},
        (Thinking(text="hm", vendor="openai/x"),),
    ),
    (
        {
            "content": "x",
            "annotations": [
                {
                    "type": "url_citation",
                    "url_citation": {"url": "https://x", "title": "X", "start_index": 0, "end_index": 1},
                }
            ],
        },
        (Text(text="x", citations=(Citation(url="https://x", title="X", start=0, end=1),)),),
    ),
    (
        {"tool_calls": [{"id": "a", "function": {"name": "f", "arguments": {"x": 1}}}]},
        (Call(id="a", name="f", arguments='{"x":1}'),),
    ),
    ({"tool_calls": [{"id": "a", "function": {"name": "f"}}]}, (Call(id="a", name="f", arguments="{}"),)),
    (
        {"content": "x", "tool_calls": [5, {"id": "a", "function": {"name": "f", "arguments": "{}"}}]},
        (
            Text(text="x"),
            Call(id="a", name="f", arguments="{}"),
        ),
    ),
    ({"content": "x", "tool_calls": "odd", "annotations": 5, "refusal": []}, (Text(text="x"),)),
]


@pytest.mark.parametrize(("fields", "parts"), MESSAGES, ids=lambda case: str(case)[:60])
def test_what_others_say_is_read(fields: dict[str, object], parts: tuple[Said, ...]) -> None:
    assert message(**fields) == parts


def test_a_deprecated_call_is_a_call() -> None:
    (call,) = message(function_call={"name": "f", "arguments": '{"x":1}'})
    assert isinstance(call, Call)
    assert (call.name, call.arguments, call.kind) == ("f", '{"x":1}', "function")


def test_made_ids_differ_by_call_and_answer() -> None:
    calls = [{"function": {"name": "f", "arguments": "{}"}}] * 2
    ids = [part.id for part in message(tool_calls=calls) if isinstance(part, Call)]
    assert len(set(ids)) == 2
    assert all(each.startswith("call_") and len(each) == 29 for each in ids)
    bare = {"choices": [{"message": {"content": "other", "tool_calls": calls}}]}
    others = [part.id for part in read_answer(json.dumps(bare).encode(), TARGET).parts if isinstance(part, Call)]
    assert not set(ids) & set(others)


STOPS: list[tuple[dict[str, object], Stop]] = [
    ({"finish_reason": "stop"}, "end"),
    ({"finish_reason": "length"}, "length"),
    ({"finish_reason": "tool_calls"}, "tool"),
    ({"finish_reason": "function_call"}, "tool"),
    ({"finish_reason": "content_filter"}, "filtered"),
    ({"finish_reason": "model_length"}, "context_length"),
    ({"finish_reason": "insufficient_system_resource"}, "length"),
    ({"finish_reason": "eos"}, "end"),
    ({"finish_reason": ""}, "end"),
    ({"finish_reason": None}, "end"),
    ({}, "end"),
    ({"finish_reason": "stop", "message": {"refusal": "No."}}, "refused"),
    ({"finish_reason": "length", "message": {"refusal": "No"}}, "length"),
    ({"finish_reason": "stop", "message": {"tool_calls": [{"function": {"name": "f"}}]}}, "tool"),
]


@pytest.mark.parametrize(("choice", "stop"), STOPS, ids=str)
def test_why_the_model_ended(choice: dict[str, object], stop: Stop) -> None:
    assert answer({"message": {"content": "x"}, **choice}).stop == stop


USAGES: list[tuple[dict[str, object], Counts]] = [
    ({"prompt_tokens": 5, "completion_tokens": 2}, Counts(input=5, output=2)),
    ({"prompt_tokens": 5, "prompt_cache_hit_tokens": 3}, Counts(input=5, cached=3)),
    ({"prompt_tokens": 5.0, "cached_tokens": 3}, Counts(input=5, cached=3)),
    ({"prompt_tokens": -5, "completion_tokens": None, "prompt_tokens_details": "odd"}, Counts()),
    ({"prompt_tokens": "5", "completion_tokens": 2}, Counts(output=2)),
    ({"prompt_tokens": 1e300, "completion_tokens": 2}, Counts(output=2)),
]


@pytest.mark.parametrize(("usage", "counts"), USAGES, ids=str)
def test_tokens(usage: dict[str, object], counts: Counts) -> None:
    assert answer({"message": {"content": "x"}}, usage=usage).usage == counts
    assert answer({"message": {"content": "x"}, "usage": usage}).usage == counts


NO_ANSWERS: list[tuple[bytes, int]] = [
    (b"", 502),
    (b"<html>", 502),
    (b"[]", 502),
    (b"{}", 502),
    (b'{"choices":[]}', 502),
    (b'{"choices":[{}]}', 502),
    (b'{"error":{"message":"secret","code":429}}', 429),
    (b'{"error":"secret"}', 502),
    (b'{"object":"error","message":"secret","code":400}', 400),
]


@pytest.mark.parametrize(("body", "status"), NO_ANSWERS, ids=str)
def test_what_is_no_answer_is_told(body: bytes, status: int) -> None:
    with pytest.raises(UpstreamAnswerError) as caught:
        read_answer(body, TARGET)
    assert (caught.value.status, "secret" in caught.value.message) == (status, False)


def test_a_lone_surrogate_is_read() -> None:
    body = rb'{"choices":[{"message":{"content":"cut \ud83d"}}]}'
    assert read_answer(body, TARGET).parts == (Text(text="cut \ufffd"),)


# -- to clients --------------------------------------------------------------------------------------------------------


def test_a_whole_answer_is_written() -> None:
    given = Answer(
        id="msg_1",
        model="claude",
        parts=(
            Thinking(text="hm", signature="sig", vendor="anthropic"),
            Thinking(signature="enc", vendor="anthropic", is_redacted=True),
            Text(text="See "),
            Text(
                text="here",
                citations=(
                    Citation(url="https://x", title="X", start=1, end=3),
                    Citation(url="https://y"),
                    Citation(document=0, title="a.pdf"),
                ),
            ),
            Call(id="a", name="f", arguments=""),
            Call(id="b", name="g", arguments='{"input":"run \\"x\\""}'),
            Call(id="c", name="g", arguments="run", kind="custom"),
        ),
        stop="tool",
        usage=Counts(input=20, output=7, cached=8, cache_creation=4, reasoning=3),
    )
    tools = (Tool(name="f"), Tool(name="g", kind="custom"))
    assert sdk_answer(write_answer(given, echo(tools=tools))) == {
        "id": "msg_1",
        "object": "chat.completion",
        "created": 7,
        "model": "seen",
        "choices": [
            {
                "index": 0,
                "message": {
                    "role": "assistant",
                    "content": "See here",
                    "refusal": None,
                    "reasoning_content": "hm",
                    "reasoning_details": [
                        {
                            "type": "reasoning.text",
                            "text": "hm",
                            "signature": "balancer:anthropic:sig",
                            "format": "anthropic",
                            "index": 0,
                        },
                        {
                            "type": "reasoning.encrypted",
                            "data": "balancer:anthropic:enc",
                            "format": "anthropic",
                            "index": 1,
                        },
                    ],
                    "annotations": [
                        {
                            "type": "url_citation",
                            "url_citation": {"url": "https://x", "title": "X", "start_index": 5, "end_index": 7},
                        },
                        {
                            "type": "url_citation",
                            "url_citation": {"url": "https://y", "title": "", "start_index": 4, "end_index": 8},
                        },
                    ],
                    "tool_calls": [
                        {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}},
                        {"id": "b", "type": "custom", "custom": {"name": "g", "input": 'run "x"'}},
                        {"id": "c", "type": "custom", "custom": {"name": "g", "input": "run"}},
                    ],
                },
                "logprobs": None,
                "finish_reason": "tool_calls",
            }
        ],
        "usage": {
            "prompt_tokens": 20,
            "completion_tokens": 7,
            "total_tokens": 27,
            "prompt_tokens_details": {"cached_tokens": 8, "cache_write_tokens": 4},
            "completion_tokens_details": {"reasoning_tokens": 3},
        },
    }


@pytest.mark.parametrize(
    ("stop", "reason"),
    [
        ("end", "stop"),
        ("length", "length"),
        ("tool", "tool_calls"),
        ("stop_sequence", "stop"),
        ("filtered", "content_filter"),
        ("refused", "content_filter"),
        ("paused", "stop"),
        ("context_length", "length"),
    ],
)
def test_a_stop_is_told_in_openais_words(stop: Stop, reason: str) -> None:
    told = sdk_answer(write_answer(Answer(stop=stop), echo()))
    assert (told["id"], told["choices"][0]["finish_reason"]) == ("chatcmpl-abc", reason)
    assert told["choices"][0]["message"] == {"role": "assistant", "content": None, "refusal": None}


def test_thoughts_that_the_client_will_not_have_keep_their_signature_only() -> None:
    given = Answer(
        parts=(Thinking(text="hm", signature="sig", vendor="anthropic"), Thinking(text="so"), Text(text="x"))
    )
    told = sdk_answer(write_answer(given, echo(reasoning=Reasoning(is_shown=False))))["choices"][0]["message"]
    assert "reasoning_content" not in told
    assert [(each["text"], each["signature"]) for each in told["reasoning_details"]] == [("", "balancer:anthropic:sig")]


def test_thoughts_come_back_to_who_thought_them() -> None:
    """OpenRouter's come with a format and an id, which have to come back beside the signature."""
    detail = {"type": "reasoning.text", "text": "hm", "signature": "s", "format": "anthropic-claude-v1", "id": "r1"}
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    found = answer({"message": {"reasoning": "hm", "reasoning_details": [detail | {"index": 0}], "tool_calls": [call]}})
    told = json.loads(write_answer(found, echo()))["choices"][0]["message"]
    asked = {"model": "m", "messages": [{"role": "user", "content": "x"}, told]}
    again = read_request(json.dumps(asked).encode())
    written = json.loads(write_request(again, TARGET).body)["messages"][1]
    assert written["reasoning_details"] == [detail | {"index": 0}]
    elsewhere = write_request(again, Target(model="m", vendor="openai/other"))
    assert "reasoning_details" not in json.loads(elsewhere.body)["messages"][1]
    assert elsewhere.left_out == ("messages[1].reasoning_details[0]",)


def test_plain_thoughts_come_back_to_who_thought_them() -> None:
    found = Answer(parts=(Thinking(text="hm", vendor="openai/x"), Call(id="a", name="f", arguments="{}")))
    told = json.loads(write_answer(found, echo()))["choices"][0]["message"]
    again = read_request(json.dumps({"model": "m", "messages": [{"role": "user", "content": "x"}, told]}).encode())
    assert json.loads(write_request(again, TARGET).body)["messages"][1]["reasoning_content"] == "hm"


def test_an_answer_written_and_read_is_the_same() -> None:
    given = Answer(
        id="chatcmpl-1",
        model="seen",
        parts=(Text(text="Hi"), Call(id="a", name="f", arguments='{"x":1}')),
        stop="tool",
        usage=Counts(input=3, output=2, cached=1, reasoning=1),
    )
    assert read_answer(write_answer(given, echo()), TARGET) == given


def test_an_empty_assistant_turn_is_a_message_all_the_same() -> None:
    conversation = Conversation(
        model="m", turns=(Turn(role="user", parts=(Text(text="x"),)), Turn(role="assistant", parts=()))
    )
    assert json.loads(write_request(conversation, TARGET).body)["messages"][1] == {"role": "assistant", "content": ""}
