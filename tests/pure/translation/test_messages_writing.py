"""Conversations, written as requests to Anthropic; each is checked with the types of Anthropic's SDK."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from balancer.domain import Struct
from balancer.translation.conversation import (
    NO_SCHEMA,
    Call,
    Choice,
    Citation,
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
    Written,
)
from balancer.translation.messages.reading import read_request
from balancer.translation.messages.turns import GO_ON, OPENING
from balancer.translation.messages.writing import write_request
from tests.pure.translation.anthropic_sdk import request_of

NEW = "claude-opus-4-8"
OLD = "claude-sonnet-4-5-20250929"
HI = Turn(role="user", parts=(Text(text="Hi"),))
F = Tool(name="f", at="tools[0].function")
G = Tool(name="g", at="tools[1].function")
CALLED = Turn(role="assistant", parts=(Call(id="a", name="f", arguments="{}"),))
RESULTS = Turn(role="user", parts=(Result(call_id="a", content=(Text(text="r"),)),))
THOUGHT = Thinking(text="t", signature="s", vendor="anthropic", at="messages[1].reasoning_details[0]")


def a_turn(role: Role, *parts: Part) -> Turn:
    """A turn of these parts."""
    return Turn(role=role, parts=parts)


def write(model: str = NEW, **fields: Any) -> Written:
    """What is written for a conversation with these fields beside a greeting."""
    conversation = Conversation(**({"model": "m", "turns": (HI,)} | fields))
    return write_request(conversation, Target(model=model, vendor="anthropic"))


def written(model: str = NEW, **fields: Any) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The same request, checked and decoded, and what was left out of it."""
    found = write(model, **fields)
    return request_of(found.body), found.left_out


def messages(*turns: Turn, model: str = NEW, **fields: Any) -> list[dict[str, Any]]:
    """The messages of these turns."""
    found: list[dict[str, Any]] = written(model, turns=turns, **fields)[0]["messages"]
    return found


def test_the_least_request() -> None:
    assert written() == (
        {
            "model": NEW,
            "max_tokens": 32000,
            "messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
        },
        (),
    )


@pytest.mark.parametrize(
    ("model", "most"),
    [
        ("claude-3-haiku-20240307", 4096),
        ("claude-3-opus-latest", 4096),
        ("claude-3-5-sonnet-20241022", 8192),
        ("claude-3-7-sonnet-20250219", 32000),
        ("claude-opus-4-20250514", 32000),
        ("us.anthropic.claude-sonnet-4-20250514-v1:0", 32000),
        ("claude-haiku-5-5", 32000),
        ("kimi-k2", 32000),
    ],
)
def test_a_limit_is_told_where_the_client_tells_none(model: str, most: int) -> None:
    assert written(model)[0]["max_tokens"] == most
    assert written(model, max_tokens=7)[0]["max_tokens"] == 7


# -- turns -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "role", "block"),
    [
        (Text(text="a", cache="5m"), "user", {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}),
        (
            Text(text="a", cache="1h"),
            "user",
            {"type": "text", "text": "a", "cache_control": {"type": "ephemeral", "ttl": "1h"}},
        ),
        (Refusal(text="No."), "assistant", {"type": "text", "text": "No."}),
        (
            Media(kind="image", media_type="image/jpg", data="/9j/AA=="),
            "user",
            {"type": "image", "source": {"type": "base64", "media_type": "image/jpeg", "data": "/9j/AA=="}},
        ),
        (
            Media(kind="image", data="iVBORw0KGgoAAA=="),
            "user",
            {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgoAAA=="}},
        ),
        (
            Media(kind="image", url="https://a.example/i", cache="5m"),
            "user",
            {
                "type": "image",
                "source": {"type": "url", "url": "https://a.example/i"},
                "cache_control": {"type": "ephemeral"},
            },
        ),
        (
            Media(kind="document", data="AA==", title="T", context="C", wants_citations=True),
            "user",
            {
                "type": "document",
                "source": {"type": "base64", "media_type": "application/pdf", "data": "AA=="},
                "title": "T",
                "context": "C",
                "citations": {"enabled": True},
            },
        ),
        (
            Media(kind="document", media_type="text/csv; charset=utf-8", data="YSxi"),
            "user",
            {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "a,b"}},
        ),
        (
            Media(kind="document", text="words"),
            "user",
            {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "words"}},
        ),
        (
            Media(kind="document", url="https://a.example/d"),
            "user",
            {"type": "document", "source": {"type": "url", "url": "https://a.example/d"}},
        ),
        (
            Call(id="call_1", name="f", arguments='{"a": 1.0}', cache="5m"),
            "assistant",
            {
                "type": "tool_use",
                "id": "call_1",
                "name": "f",
                "input": {"a": 1.0},
                "cache_control": {"type": "ephemeral"},
            },
        ),
        (
            Call(id="call_1", name="f", arguments=" "),
            "assistant",
            {"type": "tool_use", "id": "call_1", "name": "f", "input": {}},
        ),
        (
            Call(id="call_1", name="f", arguments='{"a":'),
            "assistant",
            {"type": "tool_use", "id": "call_1", "name": "f", "input": {"input": '{"a":'}},
        ),
        (
            Call(id="call_1", name="f", arguments='{"a":1}', kind="custom"),
            "assistant",
            {"type": "tool_use", "id": "call_1", "name": "f", "input": {"input": '{"a":1}'}},
        ),
        (
            Call(id="fc.1:2", name="f", arguments="{}"),
            "assistant",
            {"type": "tool_use", "id": "toolu_fc1f33f919590821790fc388", "name": "f", "input": {}},
        ),
        (
            Result(call_id="a", content=(Text(text=" "), Text(text="r")), is_error=True, cache="5m"),
            "user",
            {
                "type": "tool_result",
                "tool_use_id": "a",
                "content": [{"type": "text", "text": "r"}],
                "is_error": True,
                "cache_control": {"type": "ephemeral"},
            },
        ),
        (Result(call_id="a"), "user", {"type": "tool_result", "tool_use_id": "a"}),
        (
            Result(call_id="a", is_error=True),
            "user",
            {
                "type": "tool_result",
                "tool_use_id": "a",
                "content": [{"type": "text", "text": "Error"}],
                "is_error": True,
            },
        ),
        (
            Result(call_id="a", content=(Media(kind="image", media_type="image/gif", data="R0lGOD=="),)),
            "user",
            {
                "type": "tool_result",
                "tool_use_id": "a",
                "content": [
                    {"type": "image", "source": {"type": "base64", "media_type": "image/gif", "data": "R0lGOD=="}}
                ],
            },
        ),
    ],
)
def test_parts_are_written(part: Part, role: Role, block: dict[str, Any]) -> None:
    found = messages(HI, a_turn(role, part), a_turn("assistant", Text(text="z")), HI)
    assert block in [block for message in found for block in message["content"]]


def test_a_call_and_its_result_get_the_same_new_id() -> None:
    _, called, results = messages(
        HI, a_turn("assistant", Call(id="x" * 65, name="f")), a_turn("user", Result(call_id="x" * 65))
    )
    assert called["content"][0]["id"] == results["content"][0]["tool_use_id"]
    assert called["content"][0]["id"].startswith("toolu_")


def test_an_id_that_comes_again_is_another_one() -> None:
    """Some services count their calls anew in each answer, and Anthropic refuses an id that was there before."""
    loop = (a_turn("assistant", Call(id="c0", name="f"), Call(id="c0", name="g")),)
    results = (Result(call_id="c0", content=(Text(text="f"),)), Result(call_id="c0", content=(Text(text="g"),)))
    turns = (HI, *loop, a_turn("user", *results), *loop, a_turn("user", results[0]), *loop, a_turn("user", *results))
    found = messages(*turns)
    calls = [[block["id"] for block in message["content"]] for message in found if message["role"] == "assistant"]
    gave = [
        [block["tool_use_id"] for block in message["content"]] for message in found[1:] if message["role"] == "user"
    ]
    assert calls[0][0] == "c0"
    assert len({id_ for ids in calls for id_ in ids}) == 6
    assert gave == [calls[0], calls[1][:1], calls[2]]
    assert messages(*turns[:3])[:3] == found[:3], "what was written once is written so again: it is in a cache"


@pytest.mark.parametrize(
    "part",
    [
        Media(kind="audio", media_type="audio/wav", data="AA==", at="messages[1].content[0]"),
        Media(kind="image", media_type="image/svg+xml", data="AA==", at="messages[1].content[0]"),
        Media(kind="image", data="????", at="messages[1].content[0]"),
        Media(kind="image", url="gs://bucket/i", at="messages[1].content[0]"),
        Media(kind="document", media_type="application/msword", data="AA==", at="messages[1].content[0]"),
        Media(kind="document", media_type="text/plain", data="!", at="messages[1].content[0]"),
        Media(kind="document", media_type="text/plain", data="/w==", at="messages[1].content[0]"),
        Result(
            call_id="a",
            content=(Media(kind="audio", data="AA==", at="messages[1].content[0]"),),
            at="messages[1]",
        ),
    ],
)
def test_what_no_block_holds_is_refused_by_the_client_s_path(part: Part) -> None:
    with pytest.raises(UntranslatableError) as refused:
        write(turns=(HI, a_turn("user", part)))
    assert refused.value.param == "messages[1].content[0]"


def test_images_of_the_assistant_are_refused() -> None:
    image = Media(kind="image", url="https://a.example/i", at="messages[1].content[0]")
    with pytest.raises(UntranslatableError) as refused:
        write(turns=(HI, a_turn("assistant", image), HI))
    assert refused.value.param == "messages[1].content[0]"


@pytest.mark.parametrize("name", ["", "a.b", "a b", "a" * 129, "ä"])
def test_names_of_tools_that_anthropic_refuses_are_refused(name: str) -> None:
    called = a_turn("assistant", Call(id="a", name=name, at="messages[1].tool_calls[0]"))
    for fields, path in (
        ({"tools": (Tool(name=name, at="tools[0]"),)}, "tools[0]"),
        ({"turns": (HI, called)}, "messages[1].tool_calls[0]"),
    ):
        with pytest.raises(UntranslatableError) as refused:
            write(**fields)
        assert refused.value.param == path


def test_neighbours_of_one_role_are_one_message_with_results_first() -> None:
    found = messages(
        HI,
        a_turn("assistant", Text(text="x"), Call(id="a", name="f")),
        a_turn("assistant", Call(id="b", name="f")),
        a_turn("system", Text(text="s")),
        a_turn("user", Text(text="by the way")),
        a_turn("user", Result(call_id="a")),
        a_turn("user", Result(call_id="b"), Text(text="end")),
    )
    assert [(message["role"], [block["type"] for block in message["content"]]) for message in found] == [
        ("user", ["text"]),
        ("assistant", ["text", "tool_use", "tool_use"]),
        ("user", ["tool_result", "tool_result", "text", "text", "text"]),
    ]
    assert [block.get("text") for block in found[2]["content"][2:]] == ["<system>\ns\n</system>", "by the way", "end"]


def test_a_system_turn_in_the_middle_is_told_by_the_user() -> None:
    found = messages(
        HI, a_turn("assistant", Text(text="x")), a_turn("system", Text(text="a"), Text(text="b", cache="5m"))
    )
    assert found[-1] == {
        "role": "user",
        "content": [
            {"type": "text", "text": "<system>\na\nb\n</system>", "cache_control": {"type": "ephemeral"}},
        ],
    }


def test_texts_that_show_nothing_are_left_out_with_turns_that_hold_nothing_else() -> None:
    found = messages(
        HI,
        a_turn("assistant", Text(text=" \n")),
        a_turn("user", Text(text=""), Text(text="x")),
        a_turn("system", Text(text="")),
    )
    assert found == [{"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "text", "text": "x"}]}]
    assert "system" not in written(system=(Text(text=" "),))[0]


@pytest.mark.parametrize("turns", [(), (a_turn("user", Text(text="")),), (a_turn("system", Text(text=" ")),)])
def test_a_conversation_in_which_nobody_spoke_is_begun_by_the_user(turns: tuple[Turn, ...]) -> None:
    request, _ = written(turns=turns, system=(Text(text="s"),))
    assert request["messages"] == [{"role": "user", "content": [{"type": "text", "text": OPENING}]}]


def test_a_conversation_that_the_assistant_begins_is_begun_by_the_user() -> None:
    found = messages(a_turn("assistant", Text(text="x")), HI)
    assert found[0] == {"role": "user", "content": [{"type": "text", "text": OPENING}]}
    assert [message["role"] for message in found] == ["user", "assistant", "user"]


def test_models_that_go_on_with_the_assistant_s_last_words_get_them_and_others_are_asked_to() -> None:
    turns = (HI, a_turn("assistant", THOUGHT, Text(text="Once upon \n")))
    assert messages(*turns, model=OLD)[-1] == {
        "role": "assistant",
        "content": [{"type": "text", "text": "Once upon"}],
    }
    for model, reasoning in ((NEW, None), (OLD, Reasoning(effort="low"))):
        assert messages(*turns, model=model, reasoning=reasoning)[-1] == {
            "role": "user",
            "content": [{"type": "text", "text": GO_ON}],
        }


# -- thoughts ----------------------------------------------------------------------------------------------------------


def test_only_thoughts_that_anthropic_signed_go_back() -> None:
    others = [
        Thinking(text="t", signature="s", vendor="google", at="a"),
        Thinking(text="t", at="b"),
        Thinking(text="t", vendor="anthropic", at="c"),
        Thinking(signature="e", vendor="openai/p", is_redacted=True, at="d"),
    ]
    own = [THOUGHT, Thinking(signature="e", vendor="anthropic", is_redacted=True)]
    request, left_out = written(turns=(HI, a_turn("assistant", *others, *own, Text(text="x")), HI))
    assert request["messages"][1]["content"] == [
        {"type": "thinking", "thinking": "t", "signature": "s"},
        {"type": "redacted_thinking", "data": "e"},
        {"type": "text", "text": "x"},
    ]
    assert left_out == ("a", "b", "c", "d")


def test_compatible_services_get_their_unsigned_thoughts_back() -> None:
    thought = Thinking(text="t", vendor="anthropic")
    found = messages(HI, a_turn("assistant", thought, Text(text="x")), HI, model="deepseek-reasoner")
    assert found[1]["content"][0] == {"type": "thinking", "thinking": "t", "signature": ""}


def test_thoughts_with_nothing_behind_them_are_left_out() -> None:
    found = messages(HI, a_turn("assistant", THOUGHT), HI, a_turn("assistant", Text(text="x"), THOUGHT), HI)
    assert [[block["type"] for block in message["content"]] for message in found] == [
        ["text", "text"],
        ["text"],
        ["text"],
    ]


DROPS = {"prefix_mismatch_behavior": "drop_block"}


@pytest.mark.parametrize(
    ("model", "reasoning", "thinking"),
    [
        ("claude-opus-5-5", None, {"type": "adaptive", "block_binding": DROPS}),
        ("claude-fable-5-1", Reasoning(effort="none"), {"type": "adaptive", "block_binding": DROPS}),
        (
            "claude-haiku-5-5",
            Reasoning(effort="low"),
            {"type": "adaptive", "display": "summarized", "block_binding": DROPS},
        ),
        ("claude-opus-5", None, None),
        (NEW, None, None),
        (OLD, None, None),
    ],
)
def test_thoughts_that_do_not_fit_any_more_are_dropped_where_they_are_bound_to_what_was_before_them(
    model: str, reasoning: Reasoning | None, thinking: object
) -> None:
    """A chat client joins two texts of an answer into one; the newest models refuse the thoughts behind them."""
    turns = (HI, a_turn("assistant", THOUGHT, Text(text="x")), HI)
    found = write(model, turns=turns, reasoning=reasoning)
    request = msgspec.json.decode(found.body)
    assert request.get("thinking") == thinking
    assert found.betas == (("thinking-binding-controls-2026-08-01",) if thinking else ())
    assert write(model, reasoning=reasoning).betas == ()


def test_a_model_that_binds_its_thoughts_gets_none_where_it_is_not_to_think() -> None:
    turns = (HI, a_turn("assistant", THOUGHT, Text(text="x")), HI)
    request, left_out = written("claude-sonnet-5-5", turns=turns, reasoning=Reasoning(effort="none"))
    assert request["thinking"] == {"type": "between_tools"}
    assert request["messages"][1]["content"] == [{"type": "text", "text": "x"}]
    assert left_out == (THOUGHT.at,)


ADAPTIVE = {"type": "adaptive", "display": "summarized"}


class Case(Struct, frozen=True, kw_only=True):
    """What is written for how much a model is to think."""

    thinking: object = None
    effort: str | None = None
    max_tokens: int = 4000
    left_out: tuple[str, ...] = ()


@pytest.mark.parametrize(
    ("model", "reasoning", "case"),
    [
        (NEW, None, Case()),
        (NEW, Reasoning(effort="minimal"), Case(thinking=ADAPTIVE, effort="low")),
        (NEW, Reasoning(effort="xhigh"), Case(thinking=ADAPTIVE, effort="xhigh")),
        (
            NEW,
            Reasoning(effort="max", is_shown=False),
            Case(thinking={"type": "adaptive", "display": "omitted"}, effort="max"),
        ),
        (NEW, Reasoning(budget_tokens=8000, is_shown=True), Case(thinking=ADAPTIVE, effort="medium")),
        (NEW, Reasoning(budget_tokens=8193), Case(thinking=ADAPTIVE, effort="high")),
        (NEW, Reasoning(budget_tokens=90000), Case(thinking=ADAPTIVE, effort="max")),
        (NEW, Reasoning(is_adaptive=True), Case(thinking=ADAPTIVE)),
        (NEW, Reasoning(is_shown=True), Case(thinking=ADAPTIVE)),
        ("claude-opus-4-6", Reasoning(effort="xhigh"), Case(thinking=ADAPTIVE, effort="max")),
        ("claude-mythos-preview", Reasoning(effort="high"), Case(thinking=ADAPTIVE, effort="high")),
        ("claude-next", Reasoning(effort="high"), Case(thinking=ADAPTIVE, effort="high")),
        # Off.
        (NEW, Reasoning(effort="none"), Case()),
        (OLD, Reasoning(effort="none"), Case()),
        ("claude-opus-5", Reasoning(effort="none"), Case(thinking={"type": "disabled"})),
        ("claude-haiku-5-5", Reasoning(effort="none"), Case(thinking={"type": "disabled"})),
        ("claude-sonnet-5-5", Reasoning(effort="none"), Case(thinking={"type": "between_tools"})),
        ("claude-opus-5-5", Reasoning(effort="none"), Case(effort="low", left_out=("reasoning_effort",))),
        ("claude-fable-5", Reasoning(effort="none"), Case(effort="low", left_out=("reasoning_effort",))),
        ("claude-mythos-preview", Reasoning(effort="none"), Case(effort="low", left_out=("reasoning_effort",))),
        ("glm-4.6", Reasoning(effort="none"), Case(thinking={"type": "disabled"})),
        # By a budget.
        (OLD, Reasoning(effort="low"), Case(thinking={"type": "enabled", "budget_tokens": 2048})),
        (
            OLD,
            Reasoning(effort="high"),
            Case(thinking={"type": "enabled", "budget_tokens": 16384}, max_tokens=20384, left_out=("max_tokens",)),
        ),
        (
            OLD,
            Reasoning(effort="max"),
            Case(thinking={"type": "enabled", "budget_tokens": 48000}, max_tokens=52000, left_out=("max_tokens",)),
        ),
        (
            OLD,
            Reasoning(budget_tokens=63000),
            Case(thinking={"type": "enabled", "budget_tokens": 62976}, max_tokens=64000, left_out=("max_tokens",)),
        ),
        (OLD, Reasoning(budget_tokens=100), Case(thinking={"type": "enabled", "budget_tokens": 1024})),
        (
            OLD,
            Reasoning(effort="low", is_shown=False),
            Case(thinking={"type": "enabled", "budget_tokens": 2048, "display": "omitted"}),
        ),
        (OLD, Reasoning(is_shown=True), Case()),
        (
            "claude-opus-4-1-20250805",
            Reasoning(effort="xhigh"),
            Case(thinking={"type": "enabled", "budget_tokens": 24000}, max_tokens=28000, left_out=("max_tokens",)),
        ),
        (
            "kimi-k2-thinking",
            Reasoning(is_adaptive=True),
            Case(thinking={"type": "enabled", "budget_tokens": 8192}, max_tokens=12192, left_out=("max_tokens",)),
        ),
        ("claude-3-5-haiku-20241022", Reasoning(effort="low"), Case(left_out=("reasoning_effort",))),
        ("claude-3-5-haiku-20241022", Reasoning(effort="none"), Case()),
    ],
)
def test_how_much_to_think_is_written(model: str, reasoning: Reasoning | None, case: Case) -> None:
    request, left_out = written(model, reasoning=reasoning, max_tokens=4000)
    assert (
        Case(
            thinking=request.get("thinking"),
            effort=request.get("output_config", {}).get("effort"),
            max_tokens=request["max_tokens"],
            left_out=left_out,
        )
        == case
    )


@pytest.mark.parametrize("effort", ["minimal", "low", "medium", "high", "xhigh", "max"])
@pytest.mark.parametrize("most", [None, 1, 1024, 5000, 40000, 64000])
@pytest.mark.parametrize("model", [OLD, "claude-opus-4-1-20250805", "claude-3-7-sonnet-20250219", "glm-4.6"])
def test_a_budget_is_always_smaller_than_the_limit(model: str, most: int | None, effort: Effort) -> None:
    request, _ = written(model, reasoning=Reasoning(effort=effort), max_tokens=most)
    assert 1024 <= request["thinking"]["budget_tokens"] < request["max_tokens"]
    assert request["max_tokens"] >= (most or 0)


def test_a_budget_comes_on_top_of_what_the_client_does_not_tell() -> None:
    request, left_out = written(OLD, reasoning=Reasoning(effort="low"))
    assert (request["max_tokens"], left_out) == (34048, ())


@pytest.mark.parametrize(
    ("model", "turns", "thinks"),
    [
        (OLD, (HI, CALLED, RESULTS), False),
        (OLD, (HI, a_turn("assistant", THOUGHT, *CALLED.parts), RESULTS), True),
        (OLD, (HI, CALLED, RESULTS, a_turn("assistant", Text(text="x")), HI), True),
        (NEW, (HI, CALLED, RESULTS), True),
    ],
)
def test_a_model_with_a_budget_does_not_think_where_its_calls_lost_their_thoughts(
    model: str, turns: tuple[Turn, ...], thinks: bool
) -> None:
    """Anthropic refuses results whose calls come without thoughts, when thinking is on by a budget."""
    request, left_out = written(model, turns=turns, tools=(F,), reasoning=Reasoning(effort="low"))
    assert ("thinking" in request) is thinks
    assert left_out == (() if thinks else ("reasoning_effort",))


def test_a_model_with_a_budget_does_not_think_where_a_call_is_forced() -> None:
    request, left_out = written(OLD, tools=(F,), choice=Choice(mode="any"), reasoning=Reasoning(effort="low"))
    assert ("thinking" in request, left_out) == (False, ("reasoning_effort",))


# -- sampling ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "asked", "sent", "left_out"),
    [
        ("claude-opus-4-6", {"temperature": 0.5, "top_k": 5}, {"temperature": 0.5, "top_k": 5}, ()),
        ("claude-opus-4-6", {"temperature": 1.7}, {"temperature": 1.0}, ("temperature",)),
        (OLD, {"temperature": 0.5, "top_p": 0.9}, {"temperature": 0.5}, ("top_p",)),
        (OLD, {"temperature": 0.5, "top_p": 1.0}, {"temperature": 0.5}, ()),
        (OLD, {"top_p": 0.9}, {"top_p": 0.9}, ()),
        (
            "claude-3-5-sonnet-20241022",
            {"temperature": 0.5, "top_p": 0.9},
            {"temperature": 0.5, "top_p": 0.9},
            (),
        ),
        (NEW, {"temperature": 0.5, "top_p": 0.9, "top_k": 5}, {}, ("temperature", "top_p", "top_k")),
        (NEW, {"temperature": 1.0, "top_p": 1.0}, {}, ()),
        (NEW, {"temperature": 2.0}, {}, ("temperature",)),
        ("glm-4.6", {"temperature": 0.5, "top_p": 0.9}, {"temperature": 0.5, "top_p": 0.9}, ()),
        (
            OLD,
            {"temperature": 0.5, "top_p": 0.9, "top_k": 5, "reasoning": Reasoning(effort="low")},
            {},
            ("temperature", "top_p", "top_k"),
        ),
        (
            OLD,
            {"temperature": 1.0, "top_p": 0.97, "reasoning": Reasoning(effort="low")},
            {"temperature": 1.0},
            ("top_p",),
        ),
        (OLD, {"top_p": 0.97, "reasoning": Reasoning(effort="low")}, {"top_p": 0.97}, ()),
        (OLD, {"seed": 5}, {}, ("seed",)),
        (OLD, {"presence_penalty": 0, "frequency_penalty": 0.0}, {}, ()),
        (OLD, {"stop": ("x", "y")}, {"stop_sequences": ["x", "y"]}, ()),
        (OLD, {"user": "u"}, {"metadata": {"user_id": "u"}}, ()),
        (OLD, {"user": "u" * 257}, {}, ("user",)),
        (OLD, {"stream": True}, {"stream": True}, ()),
        (OLD, {"hints": ("store", "logit_bias")}, {}, ("store", "logit_bias")),
    ],
)
def test_other_fields_are_written(
    model: str, asked: dict[str, Any], sent: dict[str, Any], left_out: tuple[str, ...]
) -> None:
    request, found = written(model, **asked)
    rest = {name: value for name, value in request.items() if name not in _ALWAYS}
    assert (rest, found) == (sent, left_out)


_ALWAYS = ("model", "max_tokens", "messages", "thinking")


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"frequency_penalty": -0.5, "fields": {"frequency_penalty": "fp"}}, "fp"),
        ({"stop": ("x", "\n")}, "stop"),
    ],
)
def test_what_anthropic_cannot_do_is_refused_by_the_client_s_path(fields: dict[str, Any], path: str) -> None:
    with pytest.raises(UntranslatableError) as refused:
        write(**fields)
    assert refused.value.param == path


def test_what_is_left_out_has_the_client_s_name() -> None:
    assert written(temperature=0.3, fields={"temperature": "heat"})[1] == ("heat",)


# -- tools and forms ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("choice", "is_parallel", "sent", "names"),
    [
        (None, None, None, "fg"),
        (None, True, None, "fg"),
        (None, False, {"type": "auto", "disable_parallel_tool_use": True}, "fg"),
        (Choice(mode="none"), False, {"type": "none"}, "fg"),
        (Choice(mode="any"), None, {"type": "any"}, "fg"),
        (Choice(mode="named", name="g"), False, {"type": "tool", "name": "g", "disable_parallel_tool_use": True}, "fg"),
        (Choice(mode="any", among=("g",)), None, {"type": "any"}, "g"),
    ],
)
def test_choices_of_tools_are_written(
    choice: Choice | None, is_parallel: bool | None, sent: object, names: str
) -> None:
    request, _ = written(tools=(F, G), choice=choice, is_parallel=is_parallel)
    assert request.get("tool_choice") == sent
    assert [tool["name"] for tool in request["tools"]] == list(names)


@pytest.mark.parametrize(
    ("model", "can"),
    [
        ("claude-opus-5-5", False),
        ("claude-fable-5-1", False),
        ("claude-mythos-5-2", False),
        ("claude-opus-5", True),
        ("claude-fable-5", True),
        ("claude-sonnet-5-5", True),
        ("claude-next", True),
        ("glm-4.6", True),
    ],
)
def test_models_that_cannot_be_told_to_call_a_tool_are_not(model: str, can: bool) -> None:
    assert written(model, tools=(F,), choice=Choice(mode="auto"))[0]["tool_choice"] == {"type": "auto"}
    if can:
        assert written(model, tools=(F,), choice=Choice(mode="any"))[0]["tool_choice"] == {"type": "any"}
        return
    with pytest.raises(UntranslatableError) as refused:
        write(model, tools=(F,), choice=Choice(mode="named", name="f"))
    assert refused.value.param == "tool_choice"


def test_a_choice_among_no_tools_is_none() -> None:
    request, _ = written(choice=Choice(mode="auto"), is_parallel=False)
    assert "tool_choice" not in request
    assert "tools" not in request


@pytest.mark.parametrize(
    ("tool", "sent"),
    [
        (F, {"name": "f", "input_schema": {"type": "object", "properties": {}}}),
        (
            Tool(name="f", description="d", schema=msgspec.Raw(b'{"properties":{}}'), cache="1h"),
            {
                "name": "f",
                "description": "d",
                "input_schema": {"type": "object", "properties": {}},
                "cache_control": {"type": "ephemeral", "ttl": "1h"},
            },
        ),
        (
            Tool(name="f", description="d", kind="custom", grammar=msgspec.Raw(b'{"syntax":"lark"}')),
            {
                "name": "f",
                "description": 'd\n\nThe input must be of this grammar: {"syntax":"lark"}',
                "input_schema": {"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"]},
            },
        ),
    ],
)
def test_tools_are_written(tool: Tool, sent: dict[str, Any]) -> None:
    assert written(tools=(tool,))[0]["tools"] == [sent]


def test_old_models_hold_no_call_to_its_schema() -> None:
    request, left_out = written("claude-sonnet-4-20250514", tools=(Tool(name="f", is_strict=True, at="tools[0]"),))
    assert ("strict" in request["tools"][0], left_out) == (False, ("tools[0].strict",))


def test_a_schema_that_is_no_object_is_refused() -> None:
    with pytest.raises(UntranslatableError) as refused:
        write(tools=(Tool(name="f", schema=msgspec.Raw(b"[1]"), at="tools[0]"),))
    assert refused.value.param == "tools[0]"


def a_schema(**limits: object) -> msgspec.Raw:
    """A schema of an object with a number in these limits."""
    properties = {"n": {"type": "integer"} | limits}
    return msgspec.Raw(msgspec.json.encode({"type": "object", "properties": properties, "additionalProperties": False}))


def test_an_answer_of_a_schema_is_asked_for() -> None:
    request, left_out = written(OLD, format=Format(schema=a_schema(), name="n"))
    assert request["output_config"] == {"format": {"type": "json_schema", "schema": msgspec.json.decode(a_schema())}}
    assert left_out == ()


def test_limits_that_anthropic_does_not_know_are_told_in_the_description() -> None:
    request, left_out = written(format=Format(schema=a_schema(minimum=0)))
    (number,) = request["output_config"]["format"]["schema"]["properties"].values()
    assert number == {"type": "integer", "description": "{minimum: 0}"}
    assert left_out == ("response_format.schema",)


def test_a_tool_with_such_limits_is_not_strict() -> None:
    for schema, is_strict in ((a_schema(), True), (a_schema(maximum=5), False), (NO_SCHEMA, False)):
        request, left_out = written(tools=(Tool(name="f", schema=schema, is_strict=True, at="tools[0]"),))
        assert request["tools"][0]["input_schema"] == msgspec.json.decode(schema)
        assert request["tools"][0].get("strict", False) is is_strict
        assert left_out == (() if is_strict else ("tools[0].strict",))


def test_a_schema_that_allows_anything_is_told_in_words() -> None:
    schema = msgspec.Raw(b'{"type":"object"}')
    request, left_out = written(format=Format(schema=schema, is_strict=False))
    assert request["system"][0]["text"].endswith('nothing else:\n{"type":"object"}')
    assert left_out == ()


@pytest.mark.parametrize("model", ["claude-sonnet-4-20250514", "glm-4.6"])
def test_models_without_schemas_are_told_it(model: str) -> None:
    schema = msgspec.Raw(b'{"type":"object"}')
    request, left_out = written(model, system=(Text(text="s"),), format=Format(schema=schema))
    assert request["system"][0]["text"] == "s"
    assert request["system"][1]["text"].endswith('nothing else:\n{"type":"object"}')
    assert "output_config" not in request
    assert left_out == ("response_format.strict",)
    assert written(model, format=Format(schema=schema, is_strict=False))[1] == ()


def test_any_object_is_asked_for_in_words() -> None:
    assert written(format=Format())[0]["system"] == [
        {"type": "text", "text": "Answer with one JSON object and nothing else."}
    ]


def test_citations_of_earlier_answers_and_details_of_images_are_left_out_by_name() -> None:
    cited = Text(text="x", citations=(Citation(url="https://a.example"),), at="messages[1].content")
    image = Media(kind="image", url="https://a.example/i", detail="low", at="messages[2].content[0]")
    _, left_out = written(turns=(HI, a_turn("assistant", cited), a_turn("user", image)))
    assert left_out == ("messages[1].content.citations", "messages[2].content[0].detail")


# -- there and back ----------------------------------------------------------------------------------------------------


def test_what_is_written_is_read_as_it_was() -> None:
    body = msgspec.json.encode(
        {
            "model": NEW,
            "max_tokens": 500,
            "system": [{"type": "text", "text": "s", "cache_control": {"type": "ephemeral", "ttl": "1h"}}],
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "a"}]},
                {
                    "role": "assistant",
                    "content": [
                        {"type": "thinking", "thinking": "t", "signature": "s"},
                        {"type": "redacted_thinking", "data": "e"},
                        {"type": "text", "text": "b"},
                        {"type": "tool_use", "id": "toolu_1", "name": "f", "input": {"a": [1, 2.5]}},
                        {"type": "tool_use", "id": "toolu_2", "name": "f", "input": {}},
                    ],
                },
                {
                    "role": "user",
                    "content": [
                        {"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "r"}]},
                        {
                            "type": "tool_result",
                            "tool_use_id": "toolu_2",
                            "is_error": True,
                            "content": [
                                {
                                    "type": "image",
                                    "source": {"type": "base64", "media_type": "image/png", "data": "AA=="},
                                }
                            ],
                            "cache_control": {"type": "ephemeral"},
                        },
                        {
                            "type": "document",
                            "source": {"type": "base64", "media_type": "application/pdf", "data": "AA=="},
                            "title": "T",
                            "context": "C",
                            "citations": {"enabled": True},
                        },
                    ],
                },
            ],
            "tools": [
                {
                    "name": "f",
                    "description": "d",
                    "input_schema": {"type": "object", "properties": {}, "additionalProperties": False},
                    "strict": True,
                    "cache_control": {"type": "ephemeral"},
                }
            ],
            "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
            "thinking": {"type": "adaptive", "display": "summarized"},
            "output_config": {
                "effort": "high",
                "format": {
                    "type": "json_schema",
                    "schema": {"type": "object", "properties": {}, "additionalProperties": False},
                },
            },
            "stop_sequences": ["x"],
            "metadata": {"user_id": "u"},
            "stream": True,
        }
    )
    conversation = read_request(body)
    again = write_request(conversation, Target(model=NEW, vendor="anthropic"))
    assert again.left_out == ()
    assert request_of(again.body) == msgspec.json.decode(body)
    assert read_request(again.body) == conversation
    assert conversation.tools[0].schema != NO_SCHEMA
