"""Answers as the responses API gives them; the official SDK's own types are what they have to be."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai.types.responses import Response

from balancer.translation.answer import Answer, Counts, Echo, Stop
from balancer.translation.conversation import Conversation, Text, Thinking
from balancer.translation.responses.answers import write_answer
from balancer.translation.responses.reading import read_request
from tests.pure.translation.responses_answers import ANSWERS, COUNTS, TOOLS, echo
from tests.pure.translation.responses_requests import CODEX, OPENCODE


def written(answer: Answer, given: Echo) -> dict[str, Any]:
    body = write_answer(answer, given)
    Response.model_validate_json(body)
    response = json.loads(body)
    assert isinstance(response, dict)
    return response


def test_an_answer_is_a_response() -> None:
    assert written(ANSWERS["text"], echo(instructions="be", temperature=0.5, metadata={"a": "b"})) == {
        "id": "msg_01",
        "object": "response",
        "created_at": 1_760_000_000,
        "status": "completed",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "model": "shown",
        "output": [
            {
                "type": "message",
                "id": "msg_0a1b2c_0",
                "status": "completed",
                "role": "assistant",
                "content": [{"type": "output_text", "text": "Hello, wörld 🌍", "annotations": [], "logprobs": []}],
            }
        ],
        "previous_response_id": None,
        "store": False,
        "usage": {
            "input_tokens": 100,
            "input_tokens_details": {"cached_tokens": 60, "cache_write_tokens": 10},
            "output_tokens": 20,
            "output_tokens_details": {"reasoning_tokens": 5},
            "total_tokens": 120,
        },
        "instructions": "be",
        "max_output_tokens": None,
        "max_tool_calls": None,
        "metadata": {"a": "b"},
        "parallel_tool_calls": True,
        "prompt_cache_key": None,
        "reasoning": {"effort": None, "summary": None},
        "safety_identifier": None,
        "temperature": 0.5,
        "text": {"format": {"type": "text"}, "verbosity": "medium"},
        "tool_choice": "auto",
        "tools": TOOLS,
        "top_p": None,
        "truncation": "disabled",
        "user": None,
    }


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)
@pytest.mark.parametrize(
    "request_body", [CODEX, OPENCODE, {"model": "m", "input": "a"}], ids=["codex", "opencode", "a"]
)
def test_every_answer_is_of_the_type_of_the_sdk(answer: Answer, request_body: dict[str, Any]) -> None:
    conversation = read_request(json.dumps(request_body).encode())
    body = write_answer(answer, Echo(conversation=conversation, model="m", id="1", created=1))
    Response.model_validate_json(body)


def test_thoughts_are_sealed_items_of_their_own() -> None:
    output = written(ANSWERS["thoughts"], echo())["output"]
    assert [(item["type"], item["id"]) for item in output] == [
        ("reasoning", "rs_0a1b2c_0"),
        ("reasoning", "rs_0a1b2c_1"),
        ("reasoning", "rs_0a1b2c_2"),
        ("reasoning", "rs_0a1b2c_3"),
        ("message", "msg_0a1b2c_4"),
        ("reasoning", "rs_0a1b2c_5"),
        ("function_call", "fc_0a1b2c_6"),
    ]
    assert [(item["summary"], item.get("encrypted_content")) for item in output[:4]] == [
        ([{"type": "summary_text", "text": "First."}], "balancer:anthropic:Eq1"),
        ([], "balancer:anthropic:redacted:Eq2"),
        ([], "balancer:google:Cg3"),
        ([{"type": "summary_text", "text": "Second."}], None),
    ]


def test_signatures_go_only_to_who_keeps_them() -> None:
    output = written(ANSWERS["thoughts"], echo(store=None))["output"]
    assert [item["type"] for item in output] == ["reasoning", "reasoning", "message", "reasoning", "function_call"]
    assert not any("encrypted_content" in item for item in output)
    included = written(ANSWERS["thoughts"], echo(store=None, include=["reasoning.encrypted_content"]))["output"]
    assert included == written(ANSWERS["thoughts"], echo())["output"]


def test_what_the_model_thought_comes_back_as_it_was() -> None:
    thoughts = (
        Thinking(text="First.", signature="Eq1", vendor="anthropic"),
        Thinking(signature="Eq2", vendor="anthropic", is_redacted=True),
        Thinking(signature="Eq3", vendor="anthropic"),
        Thinking(signature="Cg4", vendor="google"),
        Thinking(text="Second.", signature="Cg5", vendor="google"),
        Thinking(text="Third.", vendor="openai/deepseek"),
        Thinking(text="Fourth."),
    )
    output = written(Answer(parts=(*thoughts, Text(text="a"))), echo())["output"]
    conversation = read_request(json.dumps({"model": "m", "input": output}).encode())
    parts = conversation.turns[0].parts
    assert parts[:-1] == tuple(
        Thinking(
            text=thought.text,
            signature=thought.signature,
            vendor=thought.vendor,
            is_redacted=thought.is_redacted,
            at=f"input[{index}]",
        )
        for index, thought in enumerate(thoughts)
    )
    assert parts[-1] == Text(text="a", at=f"input[{len(thoughts)}].content[0]")


def test_an_answer_can_be_the_input_of_the_next_request() -> None:
    output = written(ANSWERS["calls"], echo())["output"]
    results = [
        {"type": item["type"] + "_output", "call_id": item["call_id"], "output": "ok"}
        for item in output
        if "call_id" in item
    ]
    conversation = read_request(json.dumps({"model": "m", "input": output + results, "tools": TOOLS}).encode())
    assert [turn.role for turn in conversation.turns] == ["assistant", "user"]
    assert [getattr(part, "name", "") for part in conversation.turns[0].parts] == [
        "",
        "f",
        "apply_patch",
        "mcp__github__search",
        "apply_patch",
        "mcp__github__note",
        "",
    ]


def test_calls_are_of_the_kind_and_the_namespace_of_their_tools() -> None:
    output = written(ANSWERS["calls"], echo())["output"]
    assert output[1:-1] == [
        {
            "type": "function_call",
            "id": "fc_0a1b2c_1",
            "status": "completed",
            "call_id": "toolu_1",
            "name": "f",
            "arguments": "{}",
        },
        {
            "type": "custom_tool_call",
            "id": "ctc_0a1b2c_2",
            "status": "completed",
            "call_id": "toolu_2",
            "name": "apply_patch",
            "input": '*** "Begin"\n\\ é 🌍\n',
        },
        {
            "type": "function_call",
            "id": "fc_0a1b2c_3",
            "status": "completed",
            "call_id": "toolu_3",
            "name": "search",
            "arguments": '{"q":"x"}',
            "namespace": "mcp__github",
        },
        {
            "type": "custom_tool_call",
            "id": "ctc_0a1b2c_4",
            "status": "completed",
            "call_id": "call_4",
            "name": "apply_patch",
            "input": "bare\n",
        },
        {
            "type": "custom_tool_call",
            "id": "ctc_0a1b2c_5",
            "status": "completed",
            "call_id": "toolu_5",
            "name": "note",
            "input": "n",
            "namespace": "mcp__github",
        },
    ]


def test_citations_are_annotations_of_the_text_that_cites() -> None:
    (message,) = written(ANSWERS["texts"], echo())["output"]
    assert [part["annotations"] for part in message["content"]] == [
        [],
        [
            {"type": "url_citation", "start_index": 0, "end_index": 4, "url": "https://h/a", "title": "A"},
            {"type": "url_citation", "start_index": 0, "end_index": 3, "url": "https://h/b", "title": ""},
            {"type": "file_citation", "file_id": "", "filename": "paper.pdf", "index": 1},
        ],
    ]


@pytest.mark.parametrize(
    ("stop", "status", "reason"),
    [
        ("end", "completed", None),
        ("tool", "completed", None),
        ("stop_sequence", "completed", None),
        ("paused", "completed", None),
        ("length", "incomplete", "max_output_tokens"),
        ("context_length", "incomplete", "max_output_tokens"),
        ("filtered", "incomplete", "content_filter"),
        ("refused", "incomplete", "content_filter"),
    ],
)
def test_why_the_model_ended_is_told(stop: Stop, status: str, reason: str | None) -> None:
    response = written(Answer(parts=(Text(text="a"), Text(text="b")), stop=stop), echo())
    assert response["status"] == status
    assert response["incomplete_details"] == ({"reason": reason} if reason else None)
    assert response["output"][0]["status"] == status


def test_a_refusal_in_words_is_a_whole_answer() -> None:
    response = written(ANSWERS["refused in words"], echo())
    assert response["status"] == "completed"
    assert response["output"][0]["content"][1] == {"type": "refusal", "refusal": "cannot."}


@pytest.mark.parametrize(
    ("members", "name", "value"),
    [
        ({"reasoning": {"effort": "low", "summary": "none"}}, "reasoning", {"effort": "low", "summary": None}),
        ({"text": {"format": None, "verbosity": "low"}}, "text", {"format": {"type": "text"}, "verbosity": "low"}),
        ({"tool_choice": "required"}, "tool_choice", "required"),
        ({"tools": []}, "tools", []),
        ({"parallel_tool_calls": False}, "parallel_tool_calls", False),
        ({"max_output_tokens": 5}, "max_output_tokens", 5),
        ({"store": True}, "store", False),
    ],
)
def test_the_request_is_repeated(members: dict[str, Any], name: str, value: object) -> None:
    assert written(ANSWERS["text"], echo(**members))[name] == value


def test_an_answer_without_an_id_gets_ours() -> None:
    response = written(Answer(model="m2", usage=Counts()), echo())
    assert response["id"] == "resp_0a1b2c"
    assert response["usage"]["total_tokens"] == 0


def test_the_upstreams_model_is_shown_where_the_rule_names_none() -> None:
    given = echo()
    shown = Echo(conversation=given.conversation, model="", id="1", created=1)
    assert written(Answer(model="m2"), shown)["model"] == "m2"


def test_a_conversation_of_another_reader_is_enough() -> None:
    given = Echo(conversation=Conversation(model="m"), model="m", id="1", created=1)
    assert written(Answer(parts=(Text(text="a"),), usage=COUNTS), given)["tools"] == []
