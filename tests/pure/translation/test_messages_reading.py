"""Clients' messages requests, read into conversations."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from balancer.errors import RequestError
from balancer.translation.conversation import (
    NO_SCHEMA,
    Call,
    Choice,
    Citation,
    Conversation,
    Format,
    Media,
    Part,
    Reasoning,
    Result,
    Target,
    Text,
    Thinking,
    Tool,
    Turn,
    UntranslatableError,
)
from balancer.translation.messages.reading import read_count_tokens, read_request
from balancer.translation.messages.writing import write_request
from tests.pure.translation.anthropic_sdk import request_of

HELLO = [{"role": "user", "content": "Hi"}]
CACHE = {"type": "ephemeral"}


def read(**fields: object) -> Conversation:
    """The conversation of a request with these fields beside the least that there must be."""
    return read_request(msgspec.json.encode({"model": "m", "max_tokens": 100, "messages": HELLO} | fields))


def part(block: dict[str, Any]) -> Part:
    """The only block of the only message as a part."""
    ((found,),) = (turn.parts for turn in read(messages=[{"role": "user", "content": [block]}]).turns)
    return found


def test_the_least_request() -> None:
    assert read() == Conversation(
        model="m",
        max_tokens=100,
        turns=(Turn(role="user", parts=(Text(text="Hi", at="messages[0].content"),), at="messages[0]"),),
        fields=read().fields,
    )


def test_what_asks_for_nothing_is_no_trouble() -> None:
    assert read(
        system=None, tools=[], tool_choice=None, thinking=None, output_config={}, metadata={}, mcp_servers=[],
        container=None, stop_sequences=[], stream=False, something_new=None, something_else=[], context_management=None,
    ) == read()  # fmt: skip


AT = "messages[0].content[0]"


@pytest.mark.parametrize(
    ("block", "found"),
    [
        ({"type": "text", "text": "a", "cache_control": CACHE}, Text(text="a", cache="5m", at=AT)),
        (
            {"type": "text", "text": "a", "cache_control": CACHE | {"ttl": "1h", "scope": "global"}, "citations": None},
            Text(text="a", cache="1h", at=AT),
        ),
        (
            {
                "type": "text",
                "text": "a",
                "citations": [
                    {
                        "type": "web_search_result_location",
                        "url": "https://a.example",
                        "title": "A",
                        "cited_text": "q",
                        "encrypted_index": "e",
                    },
                    {"type": "char_location", "document_index": 1, "document_title": "D", "cited_text": "r"},
                    {"type": "new_location"},
                ],
            },
            Text(
                text="a",
                citations=(
                    Citation(url="https://a.example", title="A", quote="q"),
                    Citation(document=1, title="D", quote="r"),
                ),
                at=AT,
            ),
        ),
        (
            {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AA=="}},
            Media(kind="image", media_type="image/png", data="AA==", at=AT),
        ),
        (
            {"type": "image", "source": {"type": "url", "url": "https://a.example/i"}, "cache_control": CACHE},
            Media(kind="image", url="https://a.example/i", cache="5m", at=AT),
        ),
        (
            {
                "type": "document",
                "source": {"type": "base64", "media_type": "application/pdf", "data": "AA=="},
                "title": "T",
                "context": "C",
                "citations": {"enabled": True},
            },
            Media(
                kind="document",
                media_type="application/pdf",
                data="AA==",
                title="T",
                context="C",
                wants_citations=True,
                at=AT,
            ),
        ),
        (
            {"type": "document", "source": {"type": "url", "url": "https://a.example/d"}, "citations": None},
            Media(kind="document", media_type="application/pdf", url="https://a.example/d", at=AT),
        ),
        (
            {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "words"}},
            Media(kind="document", media_type="text/plain", text="words", at=AT),
        ),
        (
            {"type": "document", "source": {"type": "content", "content": [{"type": "text", "text": "a"}] * 2}},
            Media(kind="document", media_type="text/plain", text="a\n\na", at=AT),
        ),
        (
            {
                "type": "search_result",
                "source": "https://a.example",
                "title": "T",
                "content": [{"type": "text", "text": "a"}],
                "citations": {"enabled": False},
            },
            Media(kind="document", media_type="text/plain", text="a", title="T", context="https://a.example", at=AT),
        ),
        (
            {"type": "thinking", "thinking": "t", "signature": "s"},
            Thinking(text="t", signature="s", vendor="anthropic", at=AT),
        ),
        (
            {"type": "thinking", "thinking": "t", "signature": "balancer:openai/p1:s:t"},
            Thinking(text="t", signature="s:t", vendor="openai/p1", at=AT),
        ),
        (
            {"type": "thinking", "thinking": "t", "signature": "balancer:openai/p1:"},
            Thinking(text="t", vendor="openai/p1", at=AT),
        ),
        ({"type": "thinking", "thinking": "t", "signature": ""}, Thinking(text="t", at=AT)),
        (
            {"type": "redacted_thinking", "data": "enc"},
            Thinking(signature="enc", vendor="anthropic", is_redacted=True, at=AT),
        ),
        (
            {"type": "redacted_thinking", "data": "balancer:google:enc"},
            Thinking(signature="enc", vendor="google", is_redacted=True, at=AT),
        ),
        (
            {"type": "tool_use", "id": "toolu_1", "name": "f", "input": {"a": 1}, "caller": {"type": "direct"}},
            Call(id="toolu_1", name="f", arguments='{"a":1}', at=AT),
        ),
        (
            {"type": "tool_use", "id": "toolu_1", "name": "f", "input": None, "toolset_name": None},
            Call(id="toolu_1", name="f", arguments="{}", at=AT),
        ),
        (
            {"type": "tool_result", "tool_use_id": "toolu_1", "content": "done", "cache_control": CACHE},
            Result(call_id="toolu_1", content=(Text(text="done", at=f"{AT}.content"),), cache="5m", at=AT),
        ),
        ({"type": "tool_result", "tool_use_id": "toolu_1"}, Result(call_id="toolu_1", at=AT)),
        (
            {
                "type": "tool_result",
                "tool_use_id": "toolu_1",
                "is_error": True,
                "content": [
                    {"type": "text", "text": "a"},
                    {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AA=="}},
                    {"type": "tool_reference", "tool_name": "Edit"},
                    {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "d"}},
                    {"type": "search_result", "source": "s", "title": "T", "content": []},
                ],
            },
            Result(
                call_id="toolu_1",
                is_error=True,
                content=(
                    Text(text="a", at=f"{AT}.content[0]"),
                    Media(kind="image", media_type="image/png", data="AA==", at=f"{AT}.content[1]"),
                    Text(text="Tool Edit is loaded.", at=f"{AT}.content[2]"),
                    Media(kind="document", media_type="text/plain", text="d", at=f"{AT}.content[3]"),
                    Media(kind="document", media_type="text/plain", title="T", context="s", at=f"{AT}.content[4]"),
                ),
                at=AT,
            ),
        ),
    ],
)
def test_blocks_are_read(block: dict[str, Any], found: Part) -> None:
    assert part(block) == found


def test_the_bytes_of_a_call_s_input_stay() -> None:
    """Numbers and spaces are not rewritten: a cache of prompts would miss for less."""
    body = (
        b'{"model":"m","max_tokens":1,"messages":[{"role":"assistant","content":'
        b'[{"type":"tool_use","id":"a","name":"f","input":{"n": 1.0, "big": 12345678901234567890123}}]}]}'
    )
    ((call,),) = (turn.parts for turn in read_request(body).turns)
    assert isinstance(call, Call)
    assert call.arguments == '{"n": 1.0, "big": 12345678901234567890123}'


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"something_new": 1}, "something_new"),
        ({"mcp_servers": [{"url": "https://a.example"}]}, "mcp_servers"),
        ({"container": "c"}, "container"),
        ({"inference_geo": "eu"}, "inference_geo"),
        ({"thread": {"type": "create"}}, "thread"),
        ({"compaction": {"type": "x"}}, "compaction"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"thinking": {"type": "new"}}, "thinking.type"),
        ({"thinking": {"type": "adaptive", "new": 1}}, "thinking.new"),
        ({"output_config": {"effort": "new"}}, "output_config.effort"),
        ({"output_config": {"new": 1}}, "output_config.new"),
        ({"output_config": {"format": {"type": "grammar"}}}, "output_config.format.type"),
        ({"tool_choice": {"type": "new"}}, "tool_choice.type"),
        ({"system": [{"type": "image"}]}, "system[0]"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": "a", "new": 1}]}, "messages[0].new"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "new": 1}]}]}, f"{AT}.new"),
        ({"messages": [{"role": "system", "content": [{"type": "tool_addition"}]}]}, AT),
        *(
            ({"messages": [{"role": "user", "content": [block]}]}, path)
            for block, path in (
                ({"type": "video"}, AT),
                ({"type": "server_tool_use", "id": "s", "name": "web_search", "input": {}}, AT),
                ({"type": "web_search_tool_result", "tool_use_id": "s", "content": []}, AT),
                ({"type": "compaction", "content": "s"}, AT),
                ({"type": "image", "source": {"type": "file", "file_id": "f"}}, f"{AT}.source"),
                ({"type": "document", "source": {"type": "file", "file_id": "f"}}, f"{AT}.source"),
                (
                    {"type": "document", "source": {"type": "content", "content": [{"type": "image"}]}},
                    f"{AT}.source.content[0]",
                ),
                (
                    {"type": "tool_use", "id": "a", "name": "f", "input": {}, "caller": {"type": "code_execution"}},
                    f"{AT}.caller",
                ),
                (
                    {"type": "tool_use", "id": "a", "name": "f", "input": {}, "toolset_name": "browser"},
                    f"{AT}.toolset_name",
                ),
                (
                    {"type": "tool_result", "tool_use_id": "a", "content": [{"type": "browser_state"}]},
                    f"{AT}.content[0]",
                ),
            )
        ),
        *(
            ({"tools": [{"type": kind, "name": "x"}]}, "tools[0]")
            for kind in ("web_search_20250305", "bash_20250124", "text_editor_20250728", "memory_20250818", "new")
        ),
        ({"tools": [{"name": "f", "input_schema": {}, "new": 1}]}, "tools[0].new"),
        ({"tools": [{"name": "f", "allowed_callers": ["code_execution_20260120"]}]}, "tools[0].allowed_callers"),
    ],
)
def test_what_only_anthropic_does_is_refused_by_its_path(fields: dict[str, Any], path: str) -> None:
    with pytest.raises(UntranslatableError) as refused:
        read(**fields)
    assert refused.value.param == path
    assert f"`{path}`" in refused.value.message


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"messages": None}, "messages"),
        ({"messages": "Hi"}, "messages"),
        ({"messages": ["Hi"]}, "messages[0]"),
        ({"messages": [{"content": "Hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, f"{AT}.text"),
        ({"messages": [{"role": "user", "content": [{"text": "a"}]}]}, f"{AT}.type"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, f"{AT}.source"),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_use", "id": "a", "name": "f", "input": 1}]}]},
            f"{AT}.input",
        ),
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": "100"}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"system": 1}, "system"),
        ({"tools": [{"input_schema": {}}]}, "tools[0].name"),
        ({"tools": [{"name": "f", "input_schema": "x"}]}, "tools[0].input_schema"),
        ({"stop_sequences": ["a", 1]}, "stop_sequences[1]"),
        ({"thinking": {"type": "enabled"}}, "thinking.budget_tokens"),
        ({"temperature": "hot"}, "temperature"),
        ({"stream": "yes"}, "stream"),
    ],
)
def test_malformed_requests_are_told_where(fields: dict[str, Any], path: str) -> None:
    with pytest.raises(RequestError) as refused:
        read(**fields)
    assert not isinstance(refused.value, UntranslatableError)
    assert refused.value.param == path
    assert f"`{path}`" in refused.value.message


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"x"', b"null", b"\xff{}"])
def test_a_body_that_is_no_object_is_refused(body: bytes) -> None:
    with pytest.raises(RequestError):
        read_request(body)


@pytest.mark.parametrize(
    ("fields", "hints"),
    [
        ({"service_tier": "auto", "speed": "fast", "betas": ["b"]}, ("betas", "service_tier", "speed")),
        ({"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}}, ("context_management",)),
        ({"cache_control": CACHE}, ("cache_control",)),
        ({"metadata": {"user_id": "u", "team": "t"}}, ("metadata.team",)),
        ({"output_config": {"task_budget": {"type": "tokens", "total": 5}}}, ("output_config.task_budget",)),
        (
            {"tools": [{"name": name, "eager_input_streaming": True, "defer_loading": True} for name in "fg"]},
            ("tools[].eager_input_streaming", "tools[].defer_loading"),
        ),
        ({"tools": [{"name": "f", "eager_input_streaming": False, "defer_loading": False}]}, ()),
        (
            {"tools": [{"name": "f", "allowed_callers": ["direct", "code_execution_20260120"]}]},
            ("tools[].allowed_callers",),
        ),
        ({"tools": [{"type": "tool_search_tool_regex_20251119", "name": "tool_search_tool_regex"}]}, ("tools[0]",)),
        (
            {
                "messages": [
                    {
                        "role": "assistant",
                        "content": [
                            {"type": "server_tool_use", "id": "s", "name": "tool_search_tool_regex", "input": {}},
                            {"type": "tool_search_tool_result", "tool_use_id": "s", "content": {"type": "x"}},
                            {"type": "fallback", "from": {}, "to": {}},
                            {"type": "text", "text": "a"},
                        ],
                    }
                ]
            },
            ("messages[0].content[0]", "messages[0].content[1]", "messages[0].content[2]"),
        ),
        (
            {"messages": [{"role": "system", "content": "a", "output_config": {"effort": "low"}}]},
            ("messages[0].output_config",),
        ),
        ({"thinking": {"type": "disabled"}, "output_config": {"effort": "low"}}, ("output_config.effort",)),
        (
            {"thinking": {"type": "enabled", "budget_tokens": 2000}, "output_config": {"effort": "low"}},
            ("thinking.budget_tokens",),
        ),
    ],
)
def test_what_the_answer_does_not_depend_on_is_a_hint(fields: dict[str, Any], hints: tuple[str, ...]) -> None:
    assert read(**fields).hints == hints


def test_the_bookkeeping_that_claude_code_begins_its_system_text_with_is_a_hint() -> None:
    """It differs with each request: no other service would find anything of the prompt in its cache."""
    texts = ["x-anthropic-billing-header: cc_version=2.1.37.0d9; cc_entrypoint=cli; cch=fa690;", "You are Claude Code."]
    conversation = read(system=[{"type": "text", "text": text} for text in texts])
    assert conversation.system == (Text(text=texts[1], at="system[1]"),)
    assert conversation.hints == ("system[0]",)


def test_a_system_text_may_be_a_string() -> None:
    assert read(system="Be brief.").system == (Text(text="Be brief.", at="system"),)


@pytest.mark.parametrize(
    ("thinking", "output_config", "reasoning"),
    [
        (None, None, None),
        (None, {"effort": "xhigh"}, Reasoning(effort="xhigh", at="output_config.effort")),
        ({"type": "enabled", "budget_tokens": 5000}, None, Reasoning(budget_tokens=5000, at="thinking")),
        (
            {"type": "enabled", "budget_tokens": 5000, "display": "omitted"},
            {"effort": "medium"},
            Reasoning(effort="medium", is_shown=False, at="output_config.effort"),
        ),
        (
            {"type": "adaptive", "display": "summarized"},
            None,
            Reasoning(is_adaptive=True, is_shown=True, at="thinking"),
        ),
        ({"type": "adaptive"}, {"effort": "max"}, Reasoning(effort="max", is_adaptive=True, at="output_config.effort")),
        ({"type": "disabled"}, None, Reasoning(effort="none", at="thinking")),
        ({"type": "between_tools"}, None, Reasoning(effort="none", at="thinking")),
    ],
)
def test_how_much_to_think_is_read(thinking: object, output_config: object, reasoning: Reasoning | None) -> None:
    assert read(thinking=thinking, output_config=output_config).reasoning == reasoning


@pytest.mark.parametrize(
    ("tool_choice", "choice", "is_parallel"),
    [
        ({"type": "auto"}, Choice(mode="auto"), None),
        ({"type": "any", "disable_parallel_tool_use": True}, Choice(mode="any"), False),
        ({"type": "tool", "name": "f", "disable_parallel_tool_use": False}, Choice(mode="named", name="f"), None),
        ({"type": "none"}, Choice(mode="none"), None),
    ],
)
def test_choices_of_tools_are_read(tool_choice: object, choice: Choice, is_parallel: bool | None) -> None:
    conversation = read(tool_choice=tool_choice)
    assert (conversation.choice, conversation.is_parallel) == (choice, is_parallel)


@pytest.mark.parametrize("name", ["output_config", "output_format"])
def test_an_answer_s_form_is_read_in_its_new_place_and_its_old(name: str) -> None:
    asked = {"type": "json_schema", "schema": {"type": "object"}}
    fields = {"output_config": {"format": asked}} if name == "output_config" else {"output_format": asked}
    at = "output_config.format" if name == "output_config" else "output_format"
    assert read(**fields).format == Format(schema=msgspec.Raw(b'{"type":"object"}'), at=at)


def test_tools_are_read() -> None:
    tools = [
        {
            "type": "custom",
            "name": "f",
            "description": "does f",
            "input_schema": {"type": "object", "properties": {"a": {"type": "integer"}}},
            "strict": True,
            "cache_control": CACHE,
            "input_examples": [{"a": 1}, {"a": 2}],
        },
        {"name": "g"},
    ]
    assert read(tools=tools).tools == (
        Tool(
            name="f",
            description='does f\n\nExamples of its input:\n{"a":1}\n{"a":2}',
            schema=msgspec.Raw(b'{"type":"object","properties":{"a":{"type":"integer"}}}'),
            is_strict=True,
            cache="5m",
            at="tools[0]",
        ),
        Tool(name="g", schema=NO_SCHEMA, at="tools[1]"),
    )


def test_a_system_message_in_the_middle_is_a_turn_of_its_own() -> None:
    messages = [
        {"role": "user", "content": "a"},
        {"role": "system", "content": "for this turn", "clear_at": "next_user_message"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
        {"role": "system", "content": [{"type": "text", "text": "now"}], "clear_at": "next_user_message"},
        {"role": "system", "content": "for good", "clear_at": "never"},
        {"role": "system", "output_config": {"effort": "low"}},
    ]
    turns = read(messages=messages).turns
    assert [(turn.role, turn.at) for turn in turns] == [
        ("user", "messages[0]"),
        ("assistant", "messages[2]"),
        ("user", "messages[3]"),
        ("system", "messages[4]"),
        ("system", "messages[5]"),
    ]


def test_all_that_is_carried_has_the_client_s_names() -> None:
    conversation = read(
        temperature=0.5, top_p=0.9, top_k=4, stop_sequences=["x"], stream=True, metadata={"user_id": "u"}
    )  # fmt: skip
    assert (conversation.temperature, conversation.top_p, conversation.top_k) == (0.5, 0.9, 4)
    assert (conversation.stop, conversation.stream, conversation.user) == (("x",), True, "u")
    assert [conversation.field(name) for name in ("stop", "user", "top_p")] == [
        "stop_sequences",
        "metadata.user_id",
        "top_p",
    ]


def test_tokens_are_counted_without_a_limit() -> None:
    body = msgspec.json.encode({"model": "m", "messages": HELLO, "tools": [{"name": "f"}]})
    conversation = read_count_tokens(body)
    assert conversation.max_tokens is None
    assert [tool.name for tool in conversation.tools] == ["f"]
    with pytest.raises(RequestError) as refused:
        read_request(body)
    assert refused.value.param == "max_tokens"


def test_half_a_pair_of_surrogates_is_replaced() -> None:
    body = rb'{"model":"m","max_tokens":1,"messages":[{"role":"user","content":"a\ud83d"}]}'
    assert read_request(body).turns[0].parts == (Text(text="a�", at="messages[0].content"),)


def test_no_message_quotes_the_prompt() -> None:
    secret = "the-client's-own-words"
    for block in ({"type": "text", "text": [secret]}, {"type": "tool_use", "id": "a", "name": "f", "input": secret}):
        with pytest.raises(RequestError) as refused:
            part(block)
        assert secret not in refused.value.message


# -- Claude Code -------------------------------------------------------------------------------------------------------

REMINDER = "<system-reminder>\nThe task tools haven't been used recently.\n</system-reminder>"
TOOLS = (
    *("Agent", "Bash", "Edit", "Glob", "Grep", "NotebookEdit", "Read", "Skill", "Task", "TaskOutput", "TodoWrite"),
    *("ToolSearch", "WebFetch", "WebSearch", "Write", "mcp__github__create_issue", "mcp__ide__getDiagnostics"),
)
PICTURE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AA=="}}


def of_claude_code(**fields: object) -> bytes:
    """A turn in the middle of a session, as Claude Code 2.1 sends it."""
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "properties": {"path": {"type": "string"}},
        "required": ["path"],
        "additionalProperties": False,
    }
    hour = {"type": "ephemeral", "ttl": "1h"}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": REMINDER}, {"type": "text", "text": "Look at it."}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "", "signature": "EqQB"},
                {"type": "text", "text": "I will."},
                {
                    "type": "tool_use",
                    "id": "toolu_1",
                    "name": "Read",
                    "input": {"path": "a.png"},
                    "caller": {"type": "direct"},
                },
                {"type": "tool_use", "id": "toolu_2", "name": "Bash", "input": {"command": "false"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {
                    "type": "tool_result",
                    "tool_use_id": "toolu_1",
                    "content": [PICTURE],
                },
                {
                    "type": "tool_result",
                    "tool_use_id": "toolu_2",
                    "content": "Exit code 1",
                    "is_error": True,
                    "cache_control": hour,
                },
                {"type": "text", "text": REMINDER},
            ],
        },
        {"role": "system", "content": "You are in plan mode."},
    ]
    request = {
        "model": "claude-opus-4-8",
        "messages": messages,
        "system": [
            {
                "type": "text",
                "text": "x-anthropic-billing-header: cc_version=2.1.177.01c; cc_entrypoint=cli; cch=36ee5;",
            },
            {"type": "text", "text": "You are Claude Code.", "cache_control": hour | {"scope": "global"}},
            {"type": "text", "text": "Rules.", "cache_control": hour},
        ],
        "tools": [
            {
                "name": name,
                "description": f"Use {name}.",
                "input_schema": schema,
                "eager_input_streaming": True,
                **({"defer_loading": True} if name.startswith("mcp__") else {}),
                **({"strict": True} if name == "Bash" else {}),
            }
            for name in TOOLS
        ],
        "metadata": {"user_id": '{"device_id":"d","account_uuid":"","session_id":"s"}'},
        "max_tokens": 64000,
        "thinking": {"type": "adaptive"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "output_config": {"effort": "high"},
        "stream": True,
    }
    return msgspec.json.encode(request | fields)


def test_a_turn_of_claude_code_is_read_with_nothing_lost_but_bookkeeping() -> None:
    conversation = read_request(of_claude_code())
    assert [text.text for text in conversation.system] == ["You are Claude Code.", "Rules."]
    assert [turn.role for turn in conversation.turns] == ["user", "assistant", "user", "system"]
    assert [type(part).__name__ for turn in conversation.turns for part in turn.parts] == [
        "Text", "Text", "Thinking", "Text", "Call", "Call", "Result", "Result", "Text", "Text",
    ]  # fmt: skip
    assert [tool.name for tool in conversation.tools] == list(TOOLS)
    assert [tool.name for tool in conversation.tools if tool.is_strict] == ["Bash"]
    assert conversation.reasoning == Reasoning(effort="high", is_adaptive=True, at="output_config.effort")
    assert conversation.hints == (
        "context_management",
        "system[0]",
        "tools[].eager_input_streaming",
        "tools[].defer_loading",
    )


def test_a_warm_up_and_a_count_of_claude_code_are_read() -> None:
    warm_up = read_request(of_claude_code(max_tokens=1, messages=[{"role": "user", "content": "quota"}]))
    assert warm_up.max_tokens == 1
    body = msgspec.json.decode(of_claude_code())
    for name in ("max_tokens", "stream", "metadata"):
        del body[name]
    assert len(read_count_tokens(msgspec.json.encode(body)).tools) == len(TOOLS)


def test_claude_code_may_look_for_tools_and_choose_one() -> None:
    conversation = read_request(
        of_claude_code(tool_choice={"type": "tool", "name": "Read"}, temperature=1, stop_sequences=["</block>"])
    )
    assert conversation.choice == Choice(mode="named", name="Read")
    assert conversation.stop == ("</block>",)


@pytest.mark.parametrize("model", ["claude-opus-4-8", "claude-sonnet-4-5", "kimi-k2"])
def test_a_turn_of_claude_code_can_be_written_for_every_service_of_its_own_api(model: str) -> None:
    request_of(write_request(read_request(of_claude_code()), Target(model=model, vendor="anthropic")).body)
