"""A client's chat completions request as a conversation."""

from __future__ import annotations

import base64
import json
from typing import Any

import msgspec
import pytest

from balancer.errors import RequestError
from balancer.translation.chat.reading import read_request
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

HELLO = [{"role": "user", "content": "Hello"}]
PDF = base64.b64encode(b"%PDF-1.7").decode()
F = {"type": "function", "function": {"name": "f"}}


def request(**fields: object) -> Conversation:
    return read_request(json.dumps({"model": "gpt-5", "messages": HELLO, **fields}).encode())


def said(*messages: object) -> Conversation:
    return request(messages=messages)


def parts_of(content: object) -> tuple[Part, ...]:
    (turn,) = said({"role": "user", "content": content}).turns
    return turn.parts


def answered(**fields: object) -> tuple[Part, ...]:
    return said(*HELLO, {"role": "assistant", **fields}).turns[1].parts


def raw(conversation: Conversation) -> Any:
    """The schemas compare by their bytes."""
    return msgspec.json.decode(msgspec.json.encode(conversation))


def test_a_whole_conversation_is_read() -> None:
    conversation = request(
        messages=[
            {"role": "developer", "content": "Be brief."},
            {"role": "system", "content": [{"type": "text", "text": "And kind."}]},
            {"role": "user", "content": "Weather?"},
            {
                "role": "assistant",
                "content": "Let me look.",
                "tool_calls": [
                    {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"x":1}'}},
                    {"id": "b", "type": "custom", "custom": {"name": "g", "input": "run"}},
                ],
            },
            {"role": "tool", "tool_call_id": "a", "content": "sun"},
            {"role": "tool", "tool_call_id": "b", "content": [{"type": "text", "text": "rain"}]},
            {"role": "system", "content": "Now in German."},
            {"role": "user", "content": "So?"},
        ],
        tools=[
            {
                "type": "function",
                "function": {"name": "f", "description": "Looks.", "parameters": {"type": "object"}, "strict": True},
            },
            {"type": "custom", "custom": {"name": "g", "description": "Runs.", "format": {"type": "text"}}},
        ],
        stream=True,
        stream_options={"include_usage": True},
    )
    assert raw(conversation) == raw(
        Conversation(
            model="gpt-5",
            system=(
                Text(text="Be brief.", at="messages[0].content"),
                Text(text="And kind.", at="messages[1].content[0]"),
            ),
            turns=(
                Turn(role="user", parts=(Text(text="Weather?", at="messages[2].content"),), at="messages[2]"),
                Turn(
                    role="assistant",
                    parts=(
                        Text(text="Let me look.", at="messages[3].content"),
                        Call(id="a", name="f", arguments='{"x":1}', at="messages[3].tool_calls[0]"),
                        Call(id="b", name="g", arguments="run", kind="custom", at="messages[3].tool_calls[1]"),
                    ),
                    at="messages[3]",
                ),
                Turn(
                    role="user",
                    parts=(
                        Result(call_id="a", content=(Text(text="sun", at="messages[4].content"),), at="messages[4]"),
                        Result(
                            call_id="b", content=(Text(text="rain", at="messages[5].content[0]"),), at="messages[5]"
                        ),
                    ),
                    at="messages[4]",
                ),
                Turn(role="system", parts=(Text(text="Now in German.", at="messages[6].content"),), at="messages[6]"),
                Turn(role="user", parts=(Text(text="So?", at="messages[7].content"),), at="messages[7]"),
            ),
            tools=(
                Tool(
                    name="f",
                    description="Looks.",
                    schema=msgspec.Raw(b'{"type": "object"}'),
                    is_strict=True,
                    at="tools[0]",
                ),
                Tool(name="g", description="Runs.", kind="custom", at="tools[1]"),
            ),
            stream=True,
        )
    )


FIELDS: list[tuple[dict[str, object], dict[str, object]]] = [
    ({"max_tokens": 5}, {"max_tokens": 5}),
    ({"max_completion_tokens": 5}, {"max_tokens": 5, "fields": {"max_tokens": "max_completion_tokens"}}),
    ({"temperature": 1.5, "top_p": 0.5, "top_k": 40}, {"temperature": 1.5, "top_p": 0.5, "top_k": 40}),
    ({"top_k": -1}, {"top_k": None}),
    ({"seed": 7, "presence_penalty": -1, "frequency_penalty": 2}, {"seed": 7, "presence_penalty": -1.0}),
    ({"stop": "END"}, {"stop": ("END",)}),
    ({"stop": ["a", "b"]}, {"stop": ("a", "b")}),
    ({"stop": None}, {"stop": ()}),
    ({"parallel_tool_calls": False}, {"is_parallel": False}),
    ({"user": "u"}, {"user": "u"}),
    ({"safety_identifier": "s", "user": "u"}, {"user": "s", "fields": {"user": "safety_identifier"}}),
    ({"stream": True}, {"stream": True, "wants_usage": False}),
    ({"stream_options": {"include_usage": False}}, {"stream": False, "wants_usage": True}),
    ({"stream": True, "stream_options": {"include_obfuscation": False}}, {"wants_usage": False}),
    ({}, {"stream": False, "wants_usage": True, "choice": None, "reasoning": None, "format": None}),
    ({"tool_choice": "auto"}, {"choice": Choice()}),
    ({"tool_choice": "none"}, {"choice": Choice(mode="none")}),
    ({"tool_choice": "required"}, {"choice": Choice(mode="any")}),
    ({"tool_choice": {"type": "required"}}, {"choice": Choice(mode="any")}),
    ({"tool_choice": F}, {"choice": Choice(mode="named", name="f")}),
    ({"tool_choice": {"type": "custom", "custom": {"name": "g"}}}, {"choice": Choice(mode="named", name="g")}),
    (
        {"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [F]}}},
        {"choice": Choice(mode="any", among=("f",))},
    ),
    ({"response_format": {"type": "text"}}, {"format": None}),
    ({"response_format": {"type": "json_object"}}, {"format": Format(is_strict=False)}),
    ({"reasoning_effort": "xhigh"}, {"reasoning": Reasoning(effort="xhigh")}),
    (
        {"reasoning": {"max_tokens": 2000, "exclude": True}},
        {"reasoning": Reasoning(budget_tokens=2000, is_shown=False, at="reasoning")},
    ),
    ({"reasoning": {"enabled": True}}, {"reasoning": Reasoning(effort="medium", at="reasoning")}),
    ({"reasoning": {"enabled": False, "effort": "low"}}, {"reasoning": Reasoning(effort="none", at="reasoning")}),
    ({"include_reasoning": True}, {"reasoning": Reasoning(is_shown=True, at="include_reasoning")}),
    (
        {"thinking": {"type": "enabled", "budget_tokens": 3000}},
        {"reasoning": Reasoning(budget_tokens=3000, at="thinking")},
    ),
    ({"thinking": {"type": "disabled"}}, {"reasoning": Reasoning(effort="none", at="thinking")}),
    ({"thinking": {"type": "adaptive"}}, {"reasoning": Reasoning(is_adaptive=True, at="thinking")}),
    (
        {"thinking": {"type": "enabled"}, "reasoning_effort": "high"},
        {"reasoning": Reasoning(effort="high", at="reasoning_effort")},
    ),
    (
        {"metadata": {"a": "b"}, "store": True, "service_tier": "flex", "verbosity": "low", "prompt_cache_key": "k"},
        {"hints": ("metadata", "prompt_cache_key", "service_tier", "store", "verbosity")},
    ),
    ({"metadata": {}, "store": False, "service_tier": None}, {"hints": ()}),
]


@pytest.mark.parametrize(("fields", "read"), FIELDS, ids=lambda case: json.dumps(case, default=repr))
def test_a_field_is_read(fields: dict[str, object], read: dict[str, object]) -> None:
    conversation = request(**fields)
    assert {name: getattr(conversation, name) for name in read} == read


NOTHING: list[dict[str, object]] = [
    {"n": 1},
    {"logprobs": False, "top_logprobs": 0},
    {"logit_bias": {}},
    {"modalities": ["text"]},
    {"functions": [], "function_call": "none"},
    {"audio": None, "prediction": None, "web_search_options": None, "moderation": None},
    {"repetition_penalty": 1.0, "min_p": 0},
    {"plugins": [], "unknown": None, "another": {}},
]


@pytest.mark.parametrize("fields", NOTHING, ids=json.dumps)
def test_what_asks_for_nothing_is_no_fault(fields: dict[str, object]) -> None:
    assert request(**fields) == request()


REFUSED: list[tuple[dict[str, object], str]] = [
    ({"n": 2}, "n"),
    ({"logprobs": True}, "logprobs"),
    ({"logit_bias": {"5": 1}}, "logit_bias"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"audio": {"voice": "alloy", "format": "mp3"}}, "audio"),
    ({"prediction": {"type": "content", "content": "x"}}, "prediction"),
    ({"web_search_options": {}}, "web_search_options"),
    ({"moderation": {"model": "m"}}, "moderation"),
    ({"functions": [{"name": "f"}]}, "functions"),
    ({"function_call": {"name": "f"}}, "function_call"),
    ({"min_p": 0.1}, "min_p"),
    ({"guided_json": {"type": "object"}}, "guided_json"),
    ({"stream_options": {"other": 1}}, "stream_options.other"),
    ({"tools": [{"type": "web_search"}]}, "tools[0]"),
    ({"tools": [{"type": "function", "function": {"name": "f", "defer": True}}]}, "tools[0].function.defer"),
    ({"tools": [F | {"extra": 1}]}, "tools[0].extra"),
    (
        {"tools": [{"type": "custom", "custom": {"name": "g", "format": {"type": "xml"}}}]},
        "tools[0].custom.format.type",
    ),
    ({"tool_choice": {"type": "mcp"}}, "tool_choice.type"),
    ({"response_format": {"type": "grammar"}}, "response_format.type"),
    ({"thinking": {"type": "deep"}}, "thinking.type"),
    ({"messages": [{"role": "function", "name": "f", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": "x", "extra": 1}]}, "messages[0].extra"),
    ({"messages": [{"role": "user", "content": [{"type": "video_url"}]}]}, "messages[0].content[0]"),
    ({"messages": [{"role": "user", "content": [{"type": "refusal", "refusal": "x"}]}]}, "messages[0].content[0]"),
    (
        {"messages": [{"role": "user", "content": [{"type": "file", "file": {"file_id": "file-1"}}]}]},
        "messages[0].content[0].file.file_id",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png,x"}}]}]},
        "messages[0].content[0].image_url.url",
    ),
    (
        {"messages": [{"role": "system", "content": [{"type": "image_url", "image_url": {"url": "https://x/y"}}]}]},
        "messages[0].content[0]",
    ),
    (
        {"messages": [{"role": "assistant", "content": "x", "function_call": {"name": "f", "arguments": ""}}]},
        "messages[0].function_call",
    ),
    ({"messages": [{"role": "assistant", "content": None, "audio": {"id": "a"}}]}, "messages[0].audio"),
]


@pytest.mark.parametrize(("fields", "path"), REFUSED, ids=json.dumps)
def test_what_cannot_be_carried_is_refused_by_its_path(fields: dict[str, object], path: str) -> None:
    with pytest.raises(UntranslatableError) as caught:
        request(**fields)
    assert (caught.value.param, caught.value.status) == (path, 400)
    assert caught.value.message.startswith(f"{path}: ")


MALFORMED: list[tuple[dict[str, object], str]] = [
    ({"messages": None}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": {}}, "messages"),
    ({"messages": ["x"]}, "messages[0]"),
    ({"messages": [{"content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
    ({"messages": [{"role": "assistant", "tool_calls": [{"id": "a"}]}]}, "messages[0].tool_calls[0].function"),
    ({"model": None}, "model"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": "5"}, "max_tokens"),
    ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
    ({"temperature": 3}, "temperature"),
    ({"stop": [1]}, "stop[0]"),
    ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
    ({"tools": [F, F]}, "tools[1]"),
    ({"tool_choice": "some"}, "tool_choice"),
    ({"reasoning_effort": "huge"}, "reasoning_effort"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
]


@pytest.mark.parametrize(("fields", "path"), MALFORMED, ids=json.dumps)
def test_what_is_malformed_is_told_with_its_path(fields: dict[str, object], path: str) -> None:
    with pytest.raises(RequestError) as caught:
        request(**fields)
    assert not isinstance(caught.value, UntranslatableError)
    assert (caught.value.param, caught.value.code) == (path, "invalid_request")
    assert path in caught.value.message


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b'{"model":"m","messages":[{"role":"user","content":"\xff"}]}'])
def test_what_is_no_json_object_is_told(body: bytes) -> None:
    with pytest.raises(RequestError):
        read_request(body)


def test_a_lone_surrogate_is_read() -> None:
    body = rb'{"model":"m","messages":[{"role":"user","content":"cut \ud83d"}]}'
    assert read_request(body).turns[0].parts == (Text(text="cut \ufffd", at="messages[0].content"),)


AT = "messages[0].content[0]"
PARTS: list[tuple[dict[str, object], Part]] = [
    ({"type": "text", "text": "x"}, Text(text="x", at=AT)),
    (
        {"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}},
        Text(text="x", cache="5m", at=AT),
    ),
    (
        {"type": "text", "text": "x", "cache_control": {"type": "ephemeral", "ttl": "1h"}},
        Text(text="x", cache="1h", at=AT),
    ),
    (
        {"type": "text", "text": "x", "prompt_cache_breakpoint": {"mode": "explicit", "ttl": "12h"}},
        Text(text="x", cache="1h", at=AT),
    ),
    (
        {"type": "image_url", "image_url": {"url": "https://x/y.png", "detail": "low"}},
        Media(kind="image", url="https://x/y.png", detail="low", at=AT),
    ),
    (
        {"type": "image_url", "image_url": {"url": "data:image/jpeg;base64,AAAA"}},
        Media(kind="image", media_type="image/jpeg", data="AAAA", at=AT),
    ),
    (
        {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "mp3"}},
        Media(kind="audio", media_type="audio/mp3", data="AAAA", at=AT),
    ),
    (
        {"type": "file", "file": {"filename": "a.pdf", "file_data": f"data:application/pdf;base64,{PDF}"}},
        Media(kind="document", media_type="application/pdf", data=PDF, title="a.pdf", at=AT),
    ),
    (
        {"type": "file", "file": {"file_data": PDF}},
        Media(kind="document", media_type="application/pdf", data=PDF, at=AT),
    ),
    (
        {"type": "file", "file": {"filename": "a.txt", "file_data": base64.b64encode("né".encode()).decode()}},
        Media(kind="document", media_type="text/plain", text="né", title="a.txt", at=AT),
    ),
    (
        {"type": "file", "file": {"filename": "a.pdf", "file_data": "https://x/a.pdf"}},
        Media(kind="document", url="https://x/a.pdf", title="a.pdf", at=AT),
    ),
]


@pytest.mark.parametrize(("part", "read"), PARTS, ids=lambda case: str(case)[:60])
def test_a_part_is_read(part: dict[str, object], read: Part) -> None:
    assert parts_of([part]) == (read,)


def test_a_mark_of_a_message_is_its_last_parts() -> None:
    conversation = said({"role": "user", "content": "x", "cache_control": {"type": "ephemeral"}})
    assert conversation.turns[0].parts == (Text(text="x", cache="5m", at="messages[0].content"),)


def test_a_result_has_its_parts_mark() -> None:
    part = {"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}
    (turn,) = said({"role": "tool", "tool_call_id": "a", "content": [part]}).turns
    assert turn.parts == (Result(call_id="a", content=(Text(text="x", at=AT),), cache="5m", at="messages[0]"),)


def test_one_name_of_a_user_is_bookkeeping_and_several_tell_who_speaks() -> None:
    alone = said({"role": "user", "name": "ann", "content": "Hi"})
    assert (alone.hints, alone.turns[0].parts) == (
        ("messages[0].name",),
        (Text(text="Hi", at="messages[0].content"),),
    )
    crowd = said({"role": "user", "name": "ann", "content": "Hi"}, {"role": "user", "name": "bob", "content": "Ho"})
    texts = [part.text for turn in crowd.turns for part in turn.parts if isinstance(part, Text)]
    assert (crowd.hints, texts) == ((), ["ann: Hi", "bob: Ho"])


ANSWERED: list[tuple[dict[str, object], tuple[Part, ...]]] = [
    ({"content": ""}, ()),
    ({"content": None, "refusal": "No."}, (Refusal(text="No.", at="messages[1].refusal"),)),
    (
        {"content": [{"type": "refusal", "refusal": "No."}]},
        (Refusal(text="No.", at="messages[1].content[0]"),),
    ),
    (
        {"content": "x", "reasoning_content": "hm"},
        (
            Thinking(text="hm", at="messages[1].reasoning_content"),
            Text(text="x", at="messages[1].content"),
        ),
    ),
    (
        {
            "reasoning_content": "hm",
            "reasoning_details": [
                {
                    "type": "reasoning.text",
                    "text": "hm",
                    "signature": "balancer:anthropic:sig",
                    "format": "anthropic",
                    "index": 0,
                },
                {"type": "reasoning.encrypted", "data": "balancer:google:enc", "format": "google", "index": 1},
            ],
        },
        (
            Thinking(text="hm", signature="sig", vendor="anthropic", at="messages[1].reasoning_details[0]"),
            Thinking(signature="enc", vendor="google", is_redacted=True, at="messages[1].reasoning_details[1]"),
        ),
    ),
    (  # As clients keep them that put the entries of a stream side by side.
        {
            "reasoning_details": [
                {"type": "reasoning.text", "text": "h", "index": 0},
                {"type": "reasoning.text", "text": "m", "index": 0},
                {"type": "reasoning.text", "text": "", "signature": "balancer:anthropic:s", "format": "x", "index": 0},
            ],
        },
        (Thinking(text="hm", signature="s", vendor="anthropic", at="messages[1].reasoning_details[0]"),),
    ),
    (  # And those that keep only the text of one field, and the signature of the other.
        {
            "reasoning_content": "hm",
            "reasoning_details": [{"type": "reasoning.text", "signature": "balancer:anthropic:s", "index": 0}],
        },
        (Thinking(text="hm", signature="s", vendor="anthropic", at="messages[1].reasoning_details[0]"),),
    ),
    (  # A call without arguments, and the index of a stream.
        {"tool_calls": [{"index": 0, "id": "a", "function": {"name": "f", "arguments": ""}}]},
        (Call(id="a", name="f", arguments="{}", at="messages[1].tool_calls[0]"),),
    ),
]


@pytest.mark.parametrize(("message", "parts"), ANSWERED, ids=lambda case: str(case)[:60])
def test_an_answer_comes_back(message: dict[str, object], parts: tuple[Part, ...]) -> None:
    assert answered(**message) == parts


def test_what_a_vendor_put_into_its_answer_is_no_fault_when_it_comes_back() -> None:
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}, "extra_content": {"x": 1}}
    message = {"role": "assistant", "content": "x", "annotations": [{"type": "y"}], "vendor": 1, "tool_calls": [call]}
    conversation = said(*HELLO, {**message, "function_call": None, "audio": None})
    assert conversation.hints == (
        "messages[1].tool_calls[0].extra_content",
        "messages[1].annotations",
        "messages[1].vendor",
    )


def test_a_schema_stays_as_it_stands() -> None:
    body = (
        b'{"model":"m","messages":[{"role":"user","content":"x"}],'
        b'"tools":[{"type":"function","function":{"name":"f","parameters":{"b": 1.0,"a":[] }}},'
        b'{"type":"function","function":{"name":"g","parameters":{}}}],'
        b'"response_format":{"type":"json_schema","json_schema":{"name":"n","schema":{"z" : 1},"strict":true}}}'
    )
    conversation = read_request(body)
    assert [bytes(tool.schema) for tool in conversation.tools] == [b'{"b": 1.0,"a":[] }', bytes(NO_SCHEMA)]
    form = conversation.format
    assert form is not None
    assert form.schema is not None
    assert (bytes(form.schema), form.name, form.is_strict) == (b'{"z" : 1}', "n", True)
