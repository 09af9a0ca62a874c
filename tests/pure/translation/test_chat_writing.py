"""A conversation as a chat completions request."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from balancer.translation.chat import models, schemas
from balancer.translation.chat.reading import read_request
from balancer.translation.chat.writing import write_request
from balancer.translation.conversation import (
    Call,
    Choice,
    Conversation,
    Effort,
    Format,
    Media,
    Part,
    Reasoning,
    Refusal,
    Result,
    Role,
    Target,
    Text,
    Thinking,
    Tool,
    Turn,
    UntranslatableError,
)
from tests.pure.translation.chat_shapes import sdk_request

OWN = Target(model="gpt-5.2", vendor="openai/main")
OTHER = Target(model="qwen3-32b", vendor="openai/local")
CLOSED = msgspec.Raw(b'{"type":"object","additionalProperties":false}')
HELLO = Turn(role="user", parts=(Text(text="Hello"),))
GRAMMAR = {"type": "grammar", "grammar": {"definition": "start: WORD", "syntax": "lark"}}


def turn(role: Role, *parts: Part) -> Turn:
    return Turn(role=role, parts=parts)


def written(conversation: Conversation, target: Target = OTHER) -> dict[str, Any]:
    body: dict[str, Any] = json.loads(write_request(conversation, target).body)
    return body


def messages_of(*turns: Turn, target: Target = OTHER) -> list[dict[str, Any]]:
    body = write_request(Conversation(model="m", turns=turns), target).body
    messages: list[dict[str, Any]] = json.loads(body)["messages"]
    return messages


def left_out(conversation: Conversation, target: Target = OTHER) -> tuple[str, ...]:
    return write_request(conversation, target).left_out


WHOLE = Conversation(
    model="gpt-5.2",
    system=(Text(text="Be brief."),),
    turns=(
        HELLO,
        turn(
            "assistant",
            Text(text="Let me look."),
            Call(id="a", name="f", arguments='{"x":1}'),
            Call(id="b", name="g", arguments="run", kind="custom"),
        ),
        turn("user", Result(call_id="a", content=(Text(text="sun"),)), Result(call_id="b", content=(Text(text="ok"),))),
        turn(
            "user",
            Text(text="And these?"),
            Media(kind="image", media_type="image/png", data="AAAA", detail="low"),
            Media(kind="image", url="https://x/y.png"),
            Media(kind="document", media_type="application/pdf", data="BBBB", title="a.pdf"),
            Media(kind="audio", media_type="audio/wav", data="CCCC"),
        ),
        turn("assistant", Refusal(text="No.")),
        turn("system", Text(text="Now in German.")),
        HELLO,
    ),
    tools=(
        Tool(name="f", description="Looks.", schema=CLOSED, is_strict=True),
        Tool(name="g", kind="custom", grammar=msgspec.Raw(json.dumps(GRAMMAR).encode())),
    ),
    choice=Choice(mode="named", name="g"),
    is_parallel=False,
    max_tokens=100,
    temperature=0.5,
    top_p=0.9,
    seed=3,
    presence_penalty=0.5,
    frequency_penalty=-0.5,
    stop=("END", "STOP"),
    format=Format(schema=CLOSED, name="n", description="d"),
    user="u",
    stream=True,
    fields={"max_tokens": "max_completion_tokens"},
)


def without_places(value: Any) -> Any:
    """Where things stand is the client's matter."""
    if isinstance(value, dict):
        return {key: without_places(each) for key, each in value.items() if key != "at"}
    return [without_places(each) for each in value] if isinstance(value, list) else value


def plain(conversation: Conversation) -> Any:
    return without_places(msgspec.json.decode(msgspec.json.encode(conversation)))


def test_what_is_written_is_what_the_sdk_sends_and_is_read_again() -> None:
    body = write_request(WHOLE, OWN).body
    sdk_request(body)
    assert plain(read_request(body)) == plain(WHOLE)


@pytest.mark.parametrize("target", [OWN, OTHER])
def test_nothing_but_what_the_sdk_knows_is_written(target: Target) -> None:
    for choice in (None, Choice(), Choice(mode="any"), Choice(mode="none"), Choice(mode="named", name="f")):
        sdk_request(write_request(msgspec.structs.replace(WHOLE, choice=choice, stream=False), target).body)


def test_a_plain_request_has_no_more_than_it_needs() -> None:
    assert written(Conversation(model="m", turns=(HELLO,))) == {
        "model": "qwen3-32b",
        "messages": [{"role": "user", "content": "Hello"}],
    }


def test_a_stream_always_ends_with_its_usage_unless_the_provider_refuses() -> None:
    conversation = Conversation(model="m", turns=(HELLO,), stream=True, wants_usage=False)
    assert written(conversation)["stream_options"] == {"include_usage": True}
    refusing = json.loads(write_request(conversation, OTHER, asks_usage=False).body)
    assert (refusing["stream"], "stream_options" in refusing) == (True, False)


# -- models ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("gpt-5", "max_completion_tokens"),
        ("gpt-5-mini-2025-08-07", "max_completion_tokens"),
        ("gpt-5.6", "max_completion_tokens"),
        ("gpt-6-astra", "max_completion_tokens"),
        ("gpt-12", "max_completion_tokens"),
        ("openai/gpt-5", "max_completion_tokens"),
        ("ft:gpt-4o-mini:acme::x", "max_completion_tokens"),
        ("gpt-4o", "max_completion_tokens"),
        ("gpt-4.1-mini", "max_completion_tokens"),
        ("chatgpt-4o-latest", "max_completion_tokens"),
        ("o1", "max_completion_tokens"),
        ("o3-mini", "max_completion_tokens"),
        ("o4-mini-2025-04-16", "max_completion_tokens"),
        ("gpt-4-turbo", "max_tokens"),
        ("gpt-3.5-turbo", "max_tokens"),
        ("gpt-oss-120b", "max_tokens"),
        ("openai/gpt-oss-20b", "max_tokens"),
        ("deepseek-chat", "max_tokens"),
        ("llama3:8b", "max_tokens"),
        ("o1nly", "max_tokens"),
    ],
)
def test_the_limit_has_the_name_that_the_model_knows(model: str, name: str) -> None:
    body = written(Conversation(model="m", turns=(HELLO,), max_tokens=7), Target(model=model, vendor="openai/x"))
    assert {key: body.get(key) for key in ("max_tokens", "max_completion_tokens") if key in body} == {name: 7}


EFFORTS: list[tuple[str, Reasoning, Effort | None]] = [
    ("gpt-5", Reasoning(effort="minimal"), "minimal"),
    ("gpt-5", Reasoning(effort="none"), None),
    ("gpt-5", Reasoning(effort="xhigh"), "high"),
    ("gpt-5.1", Reasoning(effort="none"), "none"),
    ("gpt-5.1", Reasoning(effort="minimal"), "low"),
    ("gpt-5.1-codex-max", Reasoning(effort="max"), "xhigh"),
    ("gpt-5.2", Reasoning(effort="max"), "xhigh"),
    ("gpt-5.6", Reasoning(effort="max"), "max"),
    ("gpt-6-astra", Reasoning(effort="max"), "max"),
    ("o3", Reasoning(effort="minimal"), "low"),
    ("gpt-4o", Reasoning(effort="high"), None),
    ("gpt-5-chat-latest", Reasoning(effort="high"), None),
    ("qwen3-32b", Reasoning(effort="max"), "high"),
    ("deepseek-v4-pro", Reasoning(effort="medium"), "high"),
    ("deepseek-v4-pro", Reasoning(effort="xhigh"), "max"),
    ("kimi-k2.6", Reasoning(effort="xhigh"), "high"),
    ("qwen3-32b", Reasoning(effort="none"), None),
    ("gpt-5.2", Reasoning(budget_tokens=1024), "low"),
    ("gpt-5.2", Reasoning(budget_tokens=2049), "medium"),
    ("gpt-5.2", Reasoning(budget_tokens=16384), "high"),
    ("gpt-5.2", Reasoning(budget_tokens=31999), "xhigh"),
    ("gpt-6", Reasoning(budget_tokens=50000), "max"),
    ("gpt-6", Reasoning(is_adaptive=True), None),
    ("gpt-6", Reasoning(is_adaptive=True, effort="medium"), "medium"),
    ("gpt-6", Reasoning(is_shown=True), None),
]


@pytest.mark.parametrize(("model", "reasoning", "effort"), EFFORTS, ids=str)
def test_effort_is_the_nearest_that_the_model_knows(model: str, reasoning: Reasoning, effort: Effort | None) -> None:
    assert models.effort(reasoning, models.family(model).efforts) == effort


def test_effort_that_goes_nowhere_is_named() -> None:
    for_other = Conversation(model="m", turns=(HELLO,), reasoning=Reasoning(effort="none", at="thinking"))
    assert left_out(for_other) == ("thinking",)
    adaptive = Conversation(model="m", turns=(HELLO,), reasoning=Reasoning(is_adaptive=True, at="thinking"))
    assert left_out(adaptive) == ()


SAMPLING: list[tuple[str, Reasoning | None, tuple[str, ...]]] = [
    ("gpt-5", None, ("temperature", "top_p", "top_k")),
    ("o3", None, ("temperature", "top_p", "top_k")),
    ("gpt-5.2", Reasoning(effort="low"), ("temperature", "top_p", "top_k")),
    ("gpt-5.2", Reasoning(effort="none"), ("top_k",)),
    ("gpt-5.2", None, ("top_k",)),
    ("gpt-4o", None, ("top_k",)),
    ("qwen3-32b", Reasoning(effort="low"), ()),
    ("kimi-k2.6", None, ("temperature", "top_p")),
    ("kimi-k2-0905-preview", None, ()),
]


@pytest.mark.parametrize(("model", "reasoning", "missing"), SAMPLING, ids=str)
def test_sampling_that_a_model_refuses_is_left_out_and_named(
    model: str, reasoning: Reasoning | None, missing: tuple[str, ...]
) -> None:
    conversation = Conversation(
        model="m", turns=(HELLO,), temperature=0.5, top_p=0.9, top_k=40, reasoning=reasoning, hints=("store",)
    )
    found = write_request(conversation, Target(model=model, vendor="openai/x"))
    body = json.loads(found.body)
    assert found.left_out == ("store", *missing)
    assert {name for name in ("temperature", "top_p", "top_k") if name in body} == {
        "temperature",
        "top_p",
        "top_k",
    } - set(missing)


def test_what_a_model_takes_by_default_is_not_missed() -> None:
    conversation = Conversation(model="m", turns=(HELLO,), temperature=1, top_p=1, presence_penalty=0)
    assert left_out(conversation, Target(model="o3", vendor="openai/x")) == ()


@pytest.mark.parametrize("model", ["deepseek-v4-pro", "moonshotai/kimi-k2.6", "glm-5"])
def test_thinking_is_switched_off_where_there_is_a_switch(model: str) -> None:
    conversation = Conversation(model="m", turns=(HELLO,), reasoning=Reasoning(effort="none", at="thinking"))
    found = write_request(conversation, Target(model=model, vendor="openai/x"))
    assert (json.loads(found.body)["thinking"], found.left_out) == ({"type": "disabled"}, ())


@pytest.mark.parametrize(("model", "is_off"), [("deepseek-v4-pro", True), ("kimi-k2.6", True), ("qwen3-32b", False)])
def test_a_forced_tool_goes_before_thinking_where_both_are_refused(model: str, is_off: bool) -> None:
    conversation = Conversation(
        model="m",
        turns=(HELLO,),
        tools=(Tool(name="f"),),
        choice=Choice(mode="any"),
        reasoning=Reasoning(effort="high"),
    )
    found = write_request(conversation, Target(model=model, vendor="openai/x"))
    body = json.loads(found.body)
    assert (body["tool_choice"], "thinking" in body, "reasoning_effort" in body) == ("required", is_off, not is_off)
    assert found.left_out == (("reasoning_effort",) if is_off else ())
    free = msgspec.structs.replace(conversation, choice=Choice())
    assert "thinking" not in written(free, Target(model=model, vendor="openai/x"))


@pytest.mark.parametrize(("model", "blank"), [("deepseek-v4-pro", ""), ("kimi-k2.6", " "), ("qwen3-32b", None)])
def test_calls_that_another_vendor_thought_of_have_a_blank_thought(model: str, blank: str | None) -> None:
    """DeepSeek and Moonshot refused conversations that had begun elsewhere."""
    turns = (HELLO, turn("assistant", FOREIGN, CALL), turn("user", RESULT), turn("assistant", Text(text="Done.")))
    messages = messages_of(*turns, HELLO, target=Target(model=model, vendor="openai/x"))
    assert [message.get("reasoning_content") for message in messages] == [None, blank, None, None, None]


@pytest.mark.parametrize("model", ["o3", "gpt-5", "gpt-5-mini", "gpt-5.2"])
def test_models_of_openais_that_reason_are_told_no_stops(model: str) -> None:
    """They answer 400 for the field, and without it the answer would be another."""
    conversation = Conversation(
        model="m",
        turns=(HELLO,),
        stop=("END",),
        reasoning=Reasoning(effort="low"),
        fields={"stop": "stop_sequences"},
    )
    with pytest.raises(UntranslatableError) as caught:
        write_request(conversation, Target(model=model, vendor="openai/main"))
    assert caught.value.param == "stop_sequences"
    assert written(conversation)["stop"] == ["END"]


def test_more_stops_than_openai_takes_are_refused() -> None:
    conversation = Conversation(
        model="m", turns=(HELLO,), stop=("1", "2", "3", "4", "5"), fields={"stop": "stop_sequences"}
    )
    assert len(written(conversation)["stop"]) == 5
    with pytest.raises(UntranslatableError) as caught:
        write_request(conversation, OWN)
    assert caught.value.param == "stop_sequences"


def test_a_user_goes_to_openai_only_and_a_long_one_as_a_digest() -> None:
    conversation = Conversation(model="m", turns=(HELLO,), user="u" * 150, fields={"user": "metadata.user_id"})
    assert len(written(conversation, OWN)["user"]) == 64
    assert "user" not in written(conversation)
    assert left_out(conversation) == ("metadata.user_id",)


# -- turns -------------------------------------------------------------------------------------------------------------


def test_system_texts_are_one_message() -> None:
    conversation = Conversation(model="m", system=(Text(text="a"), Text(text=""), Text(text="b")), turns=(HELLO,))
    assert written(conversation)["messages"][0] == {"role": "system", "content": "a\n\nb"}


def test_texts_of_a_turn_are_one_string_and_beside_media_parts() -> None:
    image = Media(kind="image", url="https://x/y.png")
    assert messages_of(turn("user", Text(text="a"), Text(text="b"))) == [{"role": "user", "content": "a\n\nb"}]
    assert messages_of(turn("user", Text(text="a"), Text(text=""), image)) == [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "a"},
                {"type": "image_url", "image_url": {"url": "https://x/y.png"}},
            ],
        }
    ]


def test_a_text_document_is_text() -> None:
    document = Media(kind="document", text="Body.", title="a.txt", context="Of May.")
    assert messages_of(turn("user", document, Text(text="Sum up.")))[0]["content"] == (
        "a.txt\nOf May.\nBody.\n\nSum up."
    )


def test_results_come_first_and_their_images_right_behind() -> None:
    image = Media(kind="image", media_type="image/png", data="AAAA")
    assert messages_of(
        turn(
            "user",
            Text(text="Look."),
            Result(call_id="a", content=(Text(text="x"), Text(text="y"), image)),
            Result(call_id="b", content=(image,)),
            Result(call_id="c", content=(Text(text="broken"),), is_error=True),
            Result(call_id="d"),
        )
    ) == [
        {"role": "tool", "tool_call_id": "a", "content": "x\ny"},
        {"role": "tool", "tool_call_id": "b", "content": "(The next message has it.)"},
        {"role": "tool", "tool_call_id": "c", "content": "Error: broken"},
        {"role": "tool", "tool_call_id": "d", "content": ""},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "From the result of a:"},
                {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
                {"type": "text", "text": "From the result of b:"},
                {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
                {"type": "text", "text": "Look."},
            ],
        },
    ]


def test_a_long_id_is_the_same_for_call_and_result() -> None:
    long = "toolu_" + "x" * 50
    call, result = messages_of(
        turn("assistant", Call(id=long, name="f")), turn("user", Result(call_id=long, content=(Text(text="1"),)))
    )
    assert call["tool_calls"][0]["id"] == result["tool_call_id"]
    assert len(result["tool_call_id"]) <= 40
    assert call["tool_calls"][0]["function"]["arguments"] == "{}"


MINE = Thinking(text="hm", vendor="openai/local", at="mine")
FOREIGN = Thinking(text="hm", signature="sig", vendor="anthropic", at="foreign")
CALL = Call(id="a", name="f", arguments="{}")
RESULT = Result(call_id="a", content=(Text(text="1"),))


def test_thoughts_go_back_to_their_vendor_where_calls_are_and_since_the_user_spoke() -> None:
    conversation = Conversation(
        model="m",
        turns=(
            HELLO,
            turn("assistant", MINE, CALL),
            turn("user", RESULT),
            turn("assistant", MINE, Text(text="Done.")),
            HELLO,
            turn("assistant", MINE, Text(text="Wait.")),
        ),
    )
    found = write_request(conversation, OTHER)
    thoughts = [message.get("reasoning_content") for message in json.loads(found.body)["messages"]]
    assert thoughts == [None, "hm", None, None, None, "hm"]
    assert found.left_out == ("mine",)


def test_thoughts_of_others_are_left_out_and_named() -> None:
    conversation = Conversation(
        model="m", turns=(HELLO, turn("assistant", FOREIGN, CALL), turn("user", RESULT), turn("assistant", FOREIGN))
    )
    found = write_request(conversation, OTHER)
    assert json.loads(found.body)["messages"][1:] == [
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
        },
        {"role": "tool", "tool_call_id": "a", "content": "1"},
    ]
    assert found.left_out == ("foreign",)


@pytest.mark.parametrize(
    ("part", "path"),
    [
        (Media(kind="audio", media_type="audio/ogg", data="AAAA", at="here"), "here"),
        (Media(kind="audio", url="https://x/y.mp3", at="here"), "here"),
        (Media(kind="document", url="https://x/y.pdf", at="here"), "here"),
        (Media(kind="document", text="x", wants_citations=True, at="here"), "here.citations"),
        (Call(id="a", name="f", at="here"), "here"),
    ],
    ids=str,
)
def test_a_part_that_cannot_be_told_is_refused(part: Part, path: str) -> None:
    with pytest.raises(UntranslatableError) as caught:
        messages_of(turn("user", part))
    assert caught.value.param == path


def test_marks_for_a_cache_are_named() -> None:
    conversation = Conversation(
        model="m",
        system=(Text(text="s", cache="5m", at="system[0]"),),
        turns=(turn("user", Result(call_id="a", cache="1h", at="messages[0].content[0]")),),
        tools=(Tool(name="f", cache="5m", at="tools[0]"),),
    )
    assert left_out(conversation) == (
        "system[0].cache_control",
        "messages[0].content[0].cache_control",
        "tools[0].cache_control",
    )


# -- tools -------------------------------------------------------------------------------------------------------------


TOOLS = (Tool(name="f"), Tool(name="g"), Tool(name="h"))


def test_only_some_tools_may_be_called() -> None:
    conversation = Conversation(model="m", turns=(HELLO,), tools=TOOLS, choice=Choice(mode="any", among=("f", "h")))
    own, other = written(conversation, OWN), written(conversation)
    assert own["tool_choice"] == {
        "type": "allowed_tools",
        "allowed_tools": {
            "mode": "required",
            "tools": [{"type": "function", "function": {"name": name}} for name in ("f", "h")],
        },
    }
    assert len(own["tools"]) == 3
    assert other["tool_choice"] == "required"
    assert [tool["function"]["name"] for tool in other["tools"]] == ["f", "h"]


def test_a_choice_without_tools_is_not_told() -> None:
    body = written(Conversation(model="m", turns=(HELLO,), choice=Choice(mode="none"), is_parallel=False))
    assert set(body) == {"model", "messages"}


@pytest.mark.parametrize(
    "grammar", [GRAMMAR, {"type": "grammar", "definition": "start: WORD", "syntax": "lark"}], ids=["nested", "flat"]
)
def test_a_custom_tool_is_a_function_for_models_that_know_no_other(grammar: dict[str, Any]) -> None:
    conversation = Conversation(
        model="m",
        turns=(HELLO, turn("assistant", Call(id="a", name="g", arguments='say "x"', kind="custom"))),
        tools=(Tool(name="g", description="Runs.", kind="custom", grammar=msgspec.Raw(json.dumps(grammar).encode())),),
        choice=Choice(mode="named", name="g"),
    )
    own, other = written(conversation, OWN), written(conversation)
    assert own["tools"] == [{"type": "custom", "custom": {"name": "g", "description": "Runs.", "format": GRAMMAR}}]
    assert own["tool_choice"] == {"type": "custom", "custom": {"name": "g"}}
    assert own["messages"][1]["tool_calls"][0]["custom"] == {"name": "g", "input": 'say "x"'}
    assert other["tools"] == [
        {
            "type": "function",
            "function": {
                "name": "g",
                "description": "Runs.\n\n`input` must follow this grammar (lark):\n\nstart: WORD",
                "parameters": {
                    "type": "object",
                    "properties": {"input": {"type": "string"}},
                    "required": ["input"],
                    "additionalProperties": False,
                },
            },
        }
    ]
    assert other["tool_choice"] == {"type": "function", "function": {"name": "g"}}
    assert json.loads(other["messages"][1]["tool_calls"][0]["function"]["arguments"]) == {"input": 'say "x"'}


def test_formats() -> None:
    plain_json = Conversation(model="m", turns=(HELLO,), format=Format())
    assert written(plain_json)["response_format"] == {"type": "json_object"}
    nameless = Conversation(model="m", turns=(HELLO,), format=Format(schema=msgspec.Raw(b"{}"), is_strict=False))
    assert written(nameless)["response_format"] == {
        "type": "json_schema",
        "json_schema": {"name": "answer", "schema": {}},
    }


@pytest.mark.parametrize(
    ("schema", "is_strict"),
    [
        ({"type": "object", "properties": {}, "additionalProperties": False}, True),
        ({"type": "object", "properties": {"a": {}}, "required": ["a"], "additionalProperties": False}, True),
        ({"type": "object", "properties": {"a": {}}, "additionalProperties": False}, False),
        ({"type": "object"}, False),
        ({"$defs": {"a": {"type": "object"}}}, False),
        ({"anyOf": [{"items": {"type": "object"}}]}, False),
        ({"type": "object", "properties": 0, "required": 0, "anyOf": 0, "additionalProperties": False}, True),
        (True, True),
    ],
)
def test_strict_is_asked_only_for_schemas_that_openai_takes_so(schema: object, is_strict: bool) -> None:
    """Anthropic's clients may leave members optional, which OpenAI answered with a 400."""
    assert schemas.is_strict(msgspec.Raw(msgspec.json.encode(schema))) == is_strict
