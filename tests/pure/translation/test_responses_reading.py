"""Requests of the responses API as conversations."""

from __future__ import annotations

import base64
import json
import random
from typing import Any

import msgspec
import pytest

from balancer.errors import RequestError
from balancer.translation.conversation import (
    NO_SCHEMA,
    Call,
    Choice,
    Conversation,
    Format,
    Media,
    Part,
    Reasoning,
    Refusal,
    Result,
    Text,
    Thinking,
    Tool,
    Turn,
    UntranslatableError,
)
from balancer.translation.responses.reading import read_request
from tests.pure.translation.responses_requests import CODEX, OPENCODE

F = {"type": "function", "name": "f", "parameters": {"type": "object"}}
CALL = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}


def read(**members: Any) -> Conversation:
    return read_request(json.dumps({"model": "m", "input": "hello", **members}).encode())


def raw(value: object) -> msgspec.Raw:
    return msgspec.Raw(msgspec.json.encode(value))


def test_a_string_is_what_the_user_says() -> None:
    conversation = read()
    assert conversation.model == "m"
    assert conversation.turns == (Turn(role="user", parts=(Text(text="hello", at="input"),), at="input"),)
    assert conversation.hints == ()
    assert not conversation.stream


def test_a_request_of_codex_is_read_whole() -> None:
    conversation = read_request(json.dumps(CODEX).encode())
    assert [text.at for text in conversation.system] == ["instructions", "input[0].content[0]"]
    assert [(turn.role, turn.at) for turn in conversation.turns] == [
        ("user", "input[1]"),
        ("user", "input[2]"),
        ("assistant", "input[3]"),
        ("user", "input[7]"),
    ]
    assert conversation.turns[2].parts == (
        Thinking(text="**Looking**\n\nI should look.", signature="EqQBCg==", vendor="anthropic", at="input[3]"),
        Text(text="I look.", at="input[4].content[0]"),
        Call(id="toolu_1", name="exec_command", arguments='{"cmd":"ls"}', at="input[5]"),
        Call(
            id="toolu_2",
            name="apply_patch",
            arguments="*** Begin Patch\n*** End Patch\n",
            kind="custom",
            at="input[6]",
        ),
    )
    assert conversation.turns[3].parts == (
        Result(
            call_id="toolu_1",
            content=(Text(text="Chunk ID: 1\nOutput:\nREADME.md\n", at="input[7].output"),),
            at="input[7]",
        ),
        Result(call_id="toolu_2", content=(Text(text="Success.", at="input[8].output"),), at="input[8]"),
    )
    assert [(tool.name, tool.kind, tool.at) for tool in conversation.tools] == [
        ("exec_command", "function", "tools[0]"),
        ("update_plan", "function", "tools[1]"),
        ("apply_patch", "custom", "tools[2]"),
        ("view_image", "function", "tools[3]"),
        ("mcp__github__search_issues", "function", "tools[4].tools[0]"),
    ]
    assert conversation.tools[0].schema == raw(CODEX["tools"][0]["parameters"])
    assert conversation.tools[2].grammar == raw(CODEX["tools"][2]["format"])
    assert conversation.tools[4].description == "Tools in the mcp__github namespace.\n\nSearches issues."
    assert conversation.choice is None
    assert conversation.is_parallel is False
    assert conversation.reasoning == Reasoning(effort="high", is_shown=True, at="reasoning.effort")
    assert conversation.stream
    assert conversation.hints == ("client_metadata", "input[].phase", "prompt_cache_key")


def test_a_request_of_opencode_is_read_whole() -> None:
    conversation = read_request(json.dumps(OPENCODE).encode())
    assert conversation.system == (Text(text="You are OpenCode.", at="input[0].content"),)
    assert [turn.role for turn in conversation.turns] == ["user", "user", "assistant", "user", "user"]
    assert conversation.turns[1].parts == (
        Media(kind="image", media_type="image/png", data="iVBORw0KGgo=", at="input[2].content[0]"),
    )
    assert conversation.turns[2].parts[0] == Thinking(signature="CiQB", vendor="google", at="input[3]")
    assert conversation.max_tokens == 32000
    assert conversation.field("max_tokens") == "max_output_tokens"
    assert conversation.hints == ("prompt_cache_key", "text.verbosity")


@pytest.mark.parametrize(
    ("item", "part"),
    [
        pytest.param(
            {"role": "user", "content": "a"},
            Text(text="a", at="input[0].content"),
            id="easy message",
        ),
        pytest.param(
            {
                "type": "message",
                "role": "user",
                "status": "completed",
                "id": "msg_1",
                "content": [{"type": "input_text", "text": "a", "prompt_cache_breakpoint": {"mode": "explicit"}}],
            },
            Text(text="a", cache="5m", at="input[0].content[0]"),
            id="cache breakpoint",
        ),
        pytest.param(
            {
                "role": "user",
                "content": [{"type": "input_text", "text": "a", "prompt_cache_breakpoint": {"ttl": "30m"}}],
            },
            Text(text="a", cache="1h", at="input[0].content[0]"),
            id="cache breakpoint of half an hour",
        ),
        pytest.param(
            {"role": "user", "content": [{"type": "input_image", "image_url": "https://h/i.png", "detail": "low"}]},
            Media(kind="image", url="https://h/i.png", detail="low", at="input[0].content[0]"),
            id="image by URL",
        ),
        pytest.param(
            {
                "role": "user",
                "content": [
                    {"type": "input_file", "filename": "a.pdf", "file_data": "data:application/pdf;base64,JVBE"}
                ],
            },
            Media(kind="document", media_type="application/pdf", data="JVBE", title="a.pdf", at="input[0].content[0]"),
            id="file",
        ),
        pytest.param(
            {"role": "user", "content": [{"type": "input_file", "filename": "a.pdf", "file_data": "JVBE"}]},
            Media(kind="document", media_type="application/pdf", data="JVBE", title="a.pdf", at="input[0].content[0]"),
            id="file in bare base64",
        ),
        pytest.param(
            {
                "role": "user",
                "content": [
                    {
                        "type": "input_file",
                        "filename": "a.md",
                        "file_data": base64.b64encode("# ä".encode()).decode(),
                    }
                ],
            },
            Media(kind="document", media_type="text/markdown", text="# ä", title="a.md", at="input[0].content[0]"),
            id="file of plain text",
        ),
        pytest.param(
            {"role": "user", "content": [{"type": "input_file", "file_url": "https://h/a.pdf"}]},
            Media(kind="document", url="https://h/a.pdf", at="input[0].content[0]"),
            id="file by URL",
        ),
        pytest.param(
            {"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "UklG", "format": "wav"}}]},
            Media(kind="audio", media_type="audio/wav", data="UklG", at="input[0].content[0]"),
            id="sound",
        ),
        pytest.param(
            {"type": "message", "role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
            Refusal(text="no", at="input[0].content[0]"),
            id="refusal",
        ),
        pytest.param(
            {"role": "assistant", "content": [{"type": "output_text", "text": "a", "annotations": []}]},
            Text(text="a", at="input[0].content[0]"),
            id="what the model said",
        ),
        pytest.param(
            {**CALL, "id": "fc_1", "status": "completed", "caller": {"type": "direct"}},
            Call(id="c", name="f", arguments="{}", at="input[0]"),
            id="call",
        ),
        pytest.param(
            {**CALL, "namespace": "n"},
            Call(id="c", name="n__f", arguments="{}", at="input[0]"),
            id="call in a namespace",
        ),
        pytest.param(
            {**CALL, "name": "functions.f:0"},
            Call(id="c", name="functions_f_0", arguments="{}", at="input[0]"),
            id="call of a tool that the model made up",
        ),
        pytest.param(
            {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "gAAA"},
            Thinking(signature="gAAA", vendor="openai", is_redacted=True, at="input[0]"),
            id="OpenAI's reasoning",
        ),
        pytest.param(
            {"type": "reasoning", "summary": [], "encrypted_content": "balancer:anthropic:redacted:Eo"},
            Thinking(signature="Eo", vendor="anthropic", is_redacted=True, at="input[0]"),
            id="redacted reasoning",
        ),
        pytest.param(
            {"type": "reasoning", "summary": [], "encrypted_content": "balancer:anthropic:Eo"},
            Thinking(signature="Eo", vendor="anthropic", at="input[0]"),
            id="reasoning that was not shown",
        ),
        pytest.param(
            {
                "type": "reasoning",
                "summary": [{"type": "summary_text", "text": "a"}],
                "encrypted_content": "balancer:openai/deepseek:",
            },
            Thinking(text="a", vendor="openai/deepseek", at="input[0]"),
            id="unsigned reasoning",
        ),
        pytest.param(
            {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "a"}]},
            Thinking(text="a", at="input[0]"),
            id="reasoning of an open model",
        ),
    ],
)
def test_an_item_is_read_as_a_part(item: dict[str, Any], part: Part) -> None:
    assert read(input=[item]).turns[0].parts == (part,)


def test_results_may_be_parts() -> None:
    output = [
        {"type": "input_text", "text": "see"},
        {"type": "input_image", "image_url": "data:image/png;base64,iVBO", "detail": "high"},
    ]
    conversation = read(input=[CALL, {"type": "function_call_output", "call_id": "c", "output": output}])
    assert conversation.turns[1].parts == (
        Result(
            call_id="c",
            content=(
                Text(text="see", at="input[1].output[0]"),
                Media(kind="image", media_type="image/png", data="iVBO", detail="high", at="input[1].output[1]"),
            ),
            at="input[1]",
        ),
    )


def test_a_system_message_behind_the_first_turn_stays_where_it_is() -> None:
    conversation = read(
        instructions="a",
        input=[
            {"role": "system", "content": "b"},
            {"role": "user", "content": "c"},
            {"role": "developer", "content": "d"},
        ],
    )
    assert [text.text for text in conversation.system] == ["a", "b"]
    assert conversation.turns[1] == Turn(role="system", parts=(Text(text="d", at="input[2].content"),), at="input[2]")


def test_parallel_calls_with_their_results_between_them_keep_their_order() -> None:
    other = {**CALL, "call_id": "d"}
    result = {"type": "function_call_output", "call_id": "c", "output": "1"}
    conversation = read(input=[CALL, result, other, {**result, "call_id": "d"}])
    assert [(turn.role, len(turn.parts)) for turn in conversation.turns] == [
        ("assistant", 1),
        ("user", 1),
        ("assistant", 1),
        ("user", 1),
    ]


def test_tools_may_stand_in_the_input() -> None:
    conversation = read(
        input=[{"type": "additional_tools", "role": "developer", "tools": [F]}, {"role": "user", "content": "a"}]
    )
    assert conversation.tools == (Tool(name="f", schema=raw({"type": "object"}), at="input[0].tools[0]"),)


@pytest.mark.parametrize(
    ("tool", "expected"),
    [
        ({"type": "function", "name": "f"}, Tool(name="f", schema=NO_SCHEMA, at="tools[0]")),
        (
            {"type": "function", "name": "f", "parameters": {}, "strict": None, "description": None},
            Tool(name="f", schema=NO_SCHEMA, at="tools[0]"),
        ),
        (
            {**F, "strict": True, "description": "d", "defer_loading": False, "allowed_callers": ["direct"]},
            Tool(name="f", description="d", schema=raw({"type": "object"}), is_strict=True, at="tools[0]"),
        ),
        ({"type": "custom", "name": "c", "format": {"type": "text"}}, Tool(name="c", kind="custom", at="tools[0]")),
    ],
)
def test_a_tool_is_read(tool: dict[str, Any], expected: Tool) -> None:
    assert read(tools=[tool]).tools == (expected,)


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ("auto", None),
        ("none", Choice(mode="none")),
        ("required", Choice(mode="any")),
        ({"type": "function", "name": "f"}, Choice(mode="named", name="f")),
        ({"type": "custom", "name": "c"}, Choice(mode="named", name="c")),
        (
            {"type": "allowed_tools", "mode": "required", "tools": [{"type": "custom", "name": "c"}]},
            Choice(mode="any", among=("c",)),
        ),
        (
            {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "f"}]},
            Choice(mode="auto", among=("f",)),
        ),
    ],
)
def test_a_choice_is_read(choice: object, expected: Choice | None) -> None:
    assert read(tools=[F, {"type": "custom", "name": "c"}], tool_choice=choice).choice == expected


def test_a_namespace_is_told_once() -> None:
    inner = [{"type": "function", "name": name, "description": name} for name in "ab"]
    tools = read(tools=[{"type": "namespace", "name": "n", "description": "N.", "tools": inner}]).tools
    assert [(tool.name, tool.description) for tool in tools] == [("n__a", "N.\n\na"), ("n__b", "b")]


def test_a_long_name_in_a_namespace_is_shortened_and_still_itself() -> None:
    namespace, name = "mcp__a_server_with_a_long_name", "and_a_tool_with_a_name_that_is_longer_still"
    tool = {"type": "namespace", "name": namespace, "description": "d", "tools": [{"type": "function", "name": name}]}
    conversation = read(
        tools=[tool],
        tool_choice={"type": "function", "name": name, "namespace": namespace},
        input=[{**CALL, "name": name, "namespace": namespace}],
    )
    short = conversation.tools[0].name
    assert len(short) == 64
    assert short.startswith("mcp__a_server_with_a_long_name__and_a_tool")
    assert conversation.choice == Choice(mode="named", name=short)
    assert conversation.turns[0].parts == (Call(id="c", name=short, arguments="{}", at="input[0]"),)


def test_no_tools_leave_nothing_to_choose() -> None:
    assert read(tools=[], tool_choice="none").choice is None
    assert read(tool_choice="auto").choice is None


SCHEMA = {"type": "object", "properties": {}, "additionalProperties": False}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ({"format": {"type": "text"}}, None),
        ({"format": None, "verbosity": None}, None),
        ({"format": {"type": "json_object"}}, Format(is_strict=False, at="text.format")),
        (
            {"format": {"type": "json_schema", "name": "n", "schema": SCHEMA, "strict": True, "description": "d"}},
            Format(schema=raw(SCHEMA), name="n", description="d", at="text.format"),
        ),
        (
            {"format": {"type": "json_schema", "name": "n", "schema": SCHEMA}},
            Format(schema=raw(SCHEMA), name="n", is_strict=False, at="text.format"),
        ),
    ],
)
def test_a_format_is_read(text: object, expected: Format | None) -> None:
    assert read(text=text).format == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, None),
        ({"effort": None, "summary": None}, None),
        ({"effort": "none"}, Reasoning(effort="none", at="reasoning.effort")),
        ({"effort": "xhigh", "summary": "detailed"}, Reasoning(effort="xhigh", is_shown=True, at="reasoning.effort")),
        ({"summary": "auto"}, Reasoning(is_shown=True, at="reasoning")),
        ({"effort": "low", "generate_summary": "none"}, Reasoning(effort="low", is_shown=False, at="reasoning.effort")),
    ],
)
def test_reasoning_is_read(given: object, expected: Reasoning | None) -> None:
    assert read(reasoning=given).reasoning == expected


def test_who_asks_is_carried() -> None:
    conversation = read(user="u", safety_identifier="s")
    assert (conversation.user, conversation.field("user")) == ("s", "safety_identifier")
    assert read(user="u").field("user") == "user"


@pytest.mark.parametrize(
    "members",
    [
        {"background": False, "conversation": None, "prompt": None, "previous_response_id": None},
        {
            "top_logprobs": 0,
            "truncation": "disabled",
            "include": [],
            "tools": None,
            "metadata": {},
            "service_tier": "auto",
        },
        {"temperature": None, "text": {}, "context_management": [], "unheard_of": None, "also_unheard_of": []},
        {"text": {"verbosity": "medium"}, "reasoning": {"mode": "standard", "context": "auto"}, "stream": False},
    ],
)
def test_what_asks_for_nothing_is_neither_refused_nor_named(members: dict[str, Any]) -> None:
    conversation = read(**members)
    assert conversation.hints == ()
    assert conversation.temperature is None


@pytest.mark.parametrize(
    ("members", "hint"),
    [
        ({"store": True}, "store"),
        ({"metadata": {"a": "b"}}, "metadata"),
        ({"service_tier": "flex"}, "service_tier"),
        ({"user": "u", "safety_identifier": "s"}, "user"),
        ({"prompt_cache_retention": "24h"}, "prompt_cache_retention"),
        ({"prompt_cache_options": {"mode": "explicit", "ttl": "30m"}}, "prompt_cache_options"),
        ({"context_management": [{"type": "compaction", "compact_threshold": 1}]}, "context_management"),
        ({"stream_options": {"include_obfuscation": False}}, "stream_options"),
        ({"max_tool_calls": 3}, "max_tool_calls"),
        ({"include": ["web_search_call.action.sources"]}, "include"),
        ({"text": {"verbosity": "high"}}, "text.verbosity"),
        ({"reasoning": {"context": "all_turns"}}, "reasoning.context"),
        ({"tools": [{**F, "output_schema": {"type": "object"}}]}, "tools[].output_schema"),
        (
            {
                "input": [
                    {"role": "user", "content": "a"},
                    {"type": "web_search_call", "id": "ws_1", "status": "completed"},
                ]
            },
            "input[1]",
        ),
        (
            {"input": [{**CALL, "internal_chat_message_metadata_passthrough": {"turn_id": "t"}}]},
            "input[].internal_chat_message_metadata_passthrough",
        ),
    ],
)
def test_what_does_not_change_the_answer_is_named(members: dict[str, Any], hint: str) -> None:
    assert read(**members).hints == (hint,)


@pytest.mark.parametrize(
    ("members", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"background": True}, "background"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"moderation": {"model": "omni"}}, "moderation"),
        ({"truncation": "auto"}, "truncation"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"include": ["message.output_text.logprobs"]}, "include[0]"),
        ({"unheard_of": 1}, "unheard_of"),
        ({"unheard_of": False}, "unheard_of"),
        ({"bad name": 1}, "body"),
        ({"reasoning": {"effort": "more"}}, "reasoning.effort"),
        ({"reasoning": {"mode": "pro"}}, "reasoning.mode"),
        ({"reasoning": {"depth": 1}}, "reasoning.depth"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"prompt_cache_options": {"prewarm": True}}, "prompt_cache_options.prewarm"),
        ({"tools": [{"type": "web_search", "external_web_access": False}]}, "tools[0]"),
        ({"tools": [F, {"type": "code_interpreter", "container": {"type": "auto"}}]}, "tools[1]"),
        ({"tools": [{"type": "local_shell"}]}, "tools[0]"),
        ({"tools": [{"type": "namespace", "name": "n", "tools": [{"type": "mcp"}]}]}, "tools[0].tools[0]"),
        ({"tools": [{**F, "defer_loading": True}]}, "tools[0].defer_loading"),
        ({"tools": [{**F, "allowed_callers": ["programmatic"]}]}, "tools[0].allowed_callers"),
        ({"tools": [{**F, "colour": "red"}]}, "tools[0].colour"),
        ({"tools": [F], "tool_choice": {"type": "web_search_preview"}}, "tool_choice"),
        ({"tools": [F], "tool_choice": "sometimes"}, "tool_choice"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0]"),
        ({"input": [{"id": "msg_1"}]}, "input[0]"),
        ({"input": [{"type": "compaction", "encrypted_content": "gAAA"}]}, "input[0]"),
        ({"input": [{"type": "local_shell_call", "call_id": "c", "status": "completed"}]}, "input[0]"),
        ({"input": [{"type": "computer_call", "id": "cu_1"}]}, "input[0]"),
        ({"input": [{"type": "mcp_call", "id": "mcp_1"}]}, "input[0]"),
        ({"input": [{"role": "user", "content": [{"type": "input_video"}]}]}, "input[0].content[0]"),
        ({"input": [{"role": "user", "content": [{"type": "output_text", "text": "a"}]}]}, "input[0].content[0]"),
        ({"input": [{"role": "critic", "content": "a"}]}, "input[0].role"),
        ({"input": [{"role": "user", "content": "a", "mood": "bad"}]}, "input[0].mood"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "file-1"}]}]},
            "input[0].content[0].file_id",
        ),
        (
            {"input": [{"role": "developer", "content": [{"type": "input_image", "image_url": "https://h/i"}]}]},
            "input[0].content[0]",
        ),
        ({"input": [{**CALL, "async": True}]}, "input[0].async"),
        ({"input": [{**CALL, "caller": {"type": "program", "caller_id": "p"}}]}, "input[0].caller"),
    ],
)
def test_what_no_service_can_do_is_refused_by_its_path(members: dict[str, Any], param: str) -> None:
    with pytest.raises(UntranslatableError) as caught:
        read(**members)
    assert caught.value.param == param
    assert caught.value.status == 400
    assert f"`{param}`" in caught.value.message


@pytest.mark.parametrize(
    ("members", "param"),
    [
        ({"model": None}, "model"),
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": [], "instructions": "be"}, "input"),
        ({"input": 5}, "input"),
        ({"input": ["a"]}, "input[0]"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{"type": 5}]}, "input[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input[0].content[0].text"),
        ({"input": [{"type": "function_call_output", "call_id": "c", "output": "a"}]}, "input[0].call_id"),
        ({"input": [CALL, {"type": "function_call_output", "output": "a"}]}, "input[1].call_id"),
        ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "input[0].content[0]"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "data:image/png,x"}]}]},
            "input[0].content[0].image_url",
        ),
        ({"instructions": ["a"]}, "instructions"),
        ({"max_output_tokens": -1}, "max_output_tokens"),
        ({"max_output_tokens": True}, "max_output_tokens"),
        ({"max_output_tokens": 1.5}, "max_output_tokens"),
        ({"temperature": "hot"}, "temperature"),
        ({"stream": "yes"}, "stream"),
        ({"metadata": "a"}, "metadata"),
        ({"tools": {}}, "tools"),
        ({"tools": ["f"]}, "tools[0]"),
        ({"tools": [F, F]}, "tools[1].name"),
        ({"tools": [{"type": "function", "name": "no good"}]}, "tools[0].name"),
        ({"tools": [{**F, "parameters": "x"}]}, "tools[0].parameters"),
        ({"input": [{**CALL, "namespace": "no good"}]}, "input[0].name"),
        ({"tools": [F], "tool_choice": {"type": "function", "name": "g"}}, "tool_choice.name"),
        ({"tools": [F], "tool_choice": {"type": "allowed_tools", "tools": []}}, "tool_choice.tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"text": {"format": {"type": "json_schema", "name": "n"}}}, "text.format.schema"),
    ],
)
def test_what_is_malformed_is_refused_by_its_path(members: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        read(**members)
    assert not isinstance(caught.value, UntranslatableError)
    assert caught.value.param == param
    assert f"`{param}`" in caught.value.message


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b'{"model":', b'"a"', b"\xff", b"[" * 100_000])
def test_what_is_no_object_is_refused(body: bytes) -> None:
    with pytest.raises(RequestError) as caught:
        read_request(body)
    assert caught.value.status == 400


def test_half_an_emoji_is_no_reason_to_refuse() -> None:
    conversation = read_request(rb'{"model":"m","input":"a\ud83d"}')
    assert conversation.turns[0].parts == (Text(text="a\ufffd", at="input"),)


def test_refusals_do_not_tell_what_was_said() -> None:
    with pytest.raises(UntranslatableError) as caught:
        read(input=[{"type": "a secret, in the wrong place", "text": "another"}])
    assert "secret" not in caught.value.message


def test_whatever_stands_anywhere_is_read_or_refused_by_its_path() -> None:
    draw = random.Random(7)
    refusals = [refusal for request in (CODEX, OPENCODE) for _ in range(500) if (refusal := refused(request, draw))]
    assert len(refusals) > 200
    assert all(f"`{refusal.param}`" in refusal.message for refusal in refusals)


def refused(request: dict[str, Any], draw: random.Random) -> RequestError | None:
    body = json.loads(json.dumps(request))
    spoil(body, draw)
    try:
        read_request(json.dumps(body).encode())
    except RequestError as error:
        return error
    return None


def spoil(value: Any, draw: random.Random) -> None:
    """Puts something else into one place of it."""
    members = [*value] if isinstance(value, dict) else [*range(len(value))]
    place = draw.choice([*members, "more"] if isinstance(value, dict) else members)
    inner = value[place] if place in members else None
    if isinstance(inner, dict | list) and inner and draw.random() < 0.8:
        spoil(inner, draw)
    else:
        other: list[Any] = [None, True, False, 0, -1, 1.5, "", "a", "none", [], {}, [[]], [None], ["a"], {"type": "a"}]
        value[place] = draw.choice(other)
