"""Whole answers of Anthropic's: read, and written from those of other services; Anthropic's SDK takes them."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from anthropic.types import Message

from balancer.errors import UpstreamAnswerError
from balancer.translation.answer import Answer, Counts, Echo, Said, Stop
from balancer.translation.conversation import Call, Citation, Conversation, Refusal, Target, Text, Thinking
from balancer.translation.messages.answers import read_answer, write_answer

TARGET = Target(model="claude", vendor="anthropic")
ECHO = Echo(conversation=Conversation(model="gpt"), model="gpt", id="a1b2", created=1)


def read(**fields: object) -> Answer:
    """An answer with these fields beside an empty content, read."""
    return read_answer(msgspec.json.encode({"type": "message", "content": []} | fields), TARGET)


def written(answer: Answer) -> dict[str, Any]:
    """An answer, written, taken by the SDK, and decoded."""
    body = write_answer(answer, ECHO)
    Message.model_validate_json(body)
    found: dict[str, Any] = msgspec.json.decode(body)
    return found


def test_an_answer_is_read() -> None:
    content = [
        {"type": "thinking", "thinking": "t", "signature": "s"},
        {"type": "redacted_thinking", "data": "e"},
        {
            "type": "text",
            "text": "a",
            "citations": [
                {"type": "web_search_result_location", "url": "https://a.example", "cited_text": "q"},
                {"type": "new_location"},
            ],
        },
        {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {}},
        {"type": "web_search_tool_result", "tool_use_id": "s", "content": []},
        {"type": "tool_use", "id": "toolu_1", "name": "f", "input": {"a": 1.0}},
        {"type": "tool_use", "id": "toolu_2", "name": "g"},
        {"type": "something_new", "text": 5},
        {"type": "text", "text": 5},
        7,
    ]
    usage = {"input_tokens": 1, "cache_read_input_tokens": 2, "cache_creation_input_tokens": 3, "output_tokens": 4}
    assert read(
        id="msg_1", model="claude", content=content, stop_reason="stop_sequence", stop_sequence="X", usage=usage
    ) == Answer(
        id="msg_1",
        model="claude",
        parts=(
            Thinking(text="t", signature="s", vendor="anthropic"),
            Thinking(signature="e", vendor="anthropic", is_redacted=True),
            Text(text="a", citations=(Citation(url="https://a.example", quote="q"),)),
            Call(id="toolu_1", name="f", arguments='{"a":1.0}'),
            Call(id="toolu_2", name="g", arguments="{}"),
        ),
        stop="stop_sequence",
        stop_sequence="X",
        usage=Counts(input=6, output=4, cached=2, cache_creation=3),
    )


def test_what_an_answer_leaves_out_is_nothing() -> None:
    assert read() == Answer()
    assert read(usage={"input_tokens": "many"}, stop_reason="something_new", stop_details=7) == Answer()


def test_why_a_model_refuses_is_a_refusal() -> None:
    answer = read(stop_reason="refusal", stop_details={"type": "refusal", "explanation": "No."})
    assert (answer.stop, answer.parts) == ("refused", (Refusal(text="No."),))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>",
        b"[]",
        b"{}",
        b'{"content":null}',
        b'{"content":"text"}',
        b'{"type":"error","error":{"type":"overloaded_error","message":"of the user"}}',
        b'{"content":[],"id":7}',
        b"\xff",
    ],
)
def test_what_is_no_answer_is_an_error_of_the_upstream(body: bytes) -> None:
    with pytest.raises(UpstreamAnswerError) as refused:
        read_answer(body, TARGET)
    assert refused.value.status == 502
    assert "of the user" not in refused.value.message


def test_an_answer_is_written() -> None:
    answer = Answer(
        id="chatcmpl-1",
        model="gpt-5",
        parts=(
            Thinking(text="t", signature="s", vendor="google"),
            Thinking(text="u", vendor="openai/p1"),
            Thinking(signature="e", vendor="openai/p1", is_redacted=True),
            Text(text="a", citations=(Citation(url="https://a.example", title="A", quote="q"), Citation(document=0))),
            Text(text=""),
            Thinking(vendor="google"),
            Call(id="call_x1", name="f", arguments='{"a":1}'),
        ),
        stop="tool",
        usage=Counts(input=10, output=5, cached=4, reasoning=2),
    )
    assert written(answer) == {
        "id": "chatcmpl-1",
        "type": "message",
        "role": "assistant",
        "model": "gpt",
        "content": [
            {"type": "thinking", "thinking": "t", "signature": "balancer:google:s"},
            {"type": "thinking", "thinking": "u", "signature": "balancer:openai/p1:"},
            {"type": "redacted_thinking", "data": "balancer:openai/p1:e"},
            {
                "type": "text",
                "text": "a",
                "citations": [
                    {
                        "type": "web_search_result_location",
                        "url": "https://a.example",
                        "title": "A",
                        "cited_text": "q",
                        "encrypted_index": "",
                    }
                ],
            },
            {"type": "tool_use", "id": "call_x1", "name": "f", "input": {"a": 1}},
        ],
        "stop_reason": "tool_use",
        "stop_sequence": None,
        "usage": {
            "input_tokens": 6,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 4,
            "output_tokens": 5,
            "output_tokens_details": {"thinking_tokens": 2},
        },
    }


@pytest.mark.parametrize(
    ("arguments", "given"),
    [
        ("", {}),
        ("{}", {}),
        (' {"a": null} ', {"a": None}),
        ('{"a":', {"input": '{"a":'}),
        ("[1]", {"input": "[1]"}),
        ("words", {"input": "words"}),
        (r'{"a":"\ud83d"}', {"a": "\ufffd"}),
        (r'{"a":"\u00e9"}', {"a": "é"}),
    ],
)
def test_a_call_s_input_is_always_an_object(arguments: str, given: dict[str, Any]) -> None:
    (block,) = written(Answer(parts=(Call(id="a", name="f", arguments=arguments),)))["content"]
    assert block["input"] == given


@pytest.mark.parametrize(
    ("stop", "part", "reason"),
    [
        ("end", Text(text="a"), "end_turn"),
        ("end", Call(id="a", name="f"), "tool_use"),
        ("end", Refusal(text="No."), "refusal"),
        ("tool", Text(text="a"), "end_turn"),
        ("length", Call(id="a", name="f"), "max_tokens"),
        ("filtered", Text(text="a"), "refusal"),
        ("refused", Refusal(text="No."), "refusal"),
        ("paused", Text(text="a"), "pause_turn"),
        ("context_length", Text(text="a"), "model_context_window_exceeded"),
    ],
)
def test_reasons_to_stop_are_written(stop: Stop, part: Said, reason: str) -> None:
    assert written(Answer(parts=(part,), stop=stop))["stop_reason"] == reason


def test_an_answer_that_says_nothing_is_a_message_still() -> None:
    found = written(Answer())
    assert (found["id"], found["content"], found["stop_reason"]) == ("msg_a1b2", [], "end_turn")
    assert found["usage"]["input_tokens"] == 0


def test_what_is_written_is_read_as_it_was() -> None:
    answer = Answer(
        id="m",
        model="gpt",
        parts=(Text(text="a"), Call(id="x", name="f", arguments='{"a": [1]}'), Text(text="b")),
        stop="tool",
        usage=Counts(input=9, output=8, cached=7, cache_creation=1, reasoning=6),
    )
    assert read_answer(write_answer(answer, ECHO), TARGET) == answer
