"""Smart routing: what each condition asks of a request, which entry matches, and what its trace tells."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from balancer.bodies import peek
from balancer.domain import Service, SmartOp, SmartRoute
from balancer.errors import RequestError
from balancer.facts import Facts
from balancer.routing import OPERATIONS, Matched, Router, condition, fault_of

NOON = datetime(2026, 7, 1, 12, 0, tzinfo=UTC)
USED = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "Bash", "arguments": '{"c":"ls"}'}}]}
RESULT = {"role": "tool", "content": "a.txt"}
CUSTOM = {"role": "assistant", "tool_calls": [{"type": "custom", "custom": {"name": "sh", "input": "ls -l"}}]}
SCREENSHOT = {"type": "computer_call_output", "output": {"type": "computer_screenshot", "image_url": "data:"}}
HI = {"content": "hi"}
IMAGE = {"type": "image_url", "image_url": {"url": "data:"}}


def op(text: str, value: str = "") -> SmartOp:
    """The op `position.operation`."""
    position, _, operation = text.rpartition(".")
    return SmartOp(position=position, operation=operation, value=value)


def facts(now: datetime = NOON, **body: Any) -> Facts:
    return Facts(peek(json.dumps({"model": "gpt-5"} | body).encode()), now)


def user(*contents: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content} for content in contents]}


def match(one: Facts, *entries: list[SmartOp]) -> Matched:
    services = (Service(provider="a", model="m"),)
    return Router([SmartRoute(uuid=f"e{i}", ops=tuple(ops), services=services) for i, ops in enumerate(entries)]).match(
        one
    )


def holds(one: SmartOp, asked: Facts) -> bool:
    return match(asked, [one]).index == 0


@pytest.mark.parametrize(
    ("name", "value", "body", "expected"),
    [
        ("model.contains", "pt-", {}, True),
        ("model.contains", "GPT", {}, False),
        ("model.equals", "gpt-5", {}, True),
        ("model.equals", "gpt", {}, False),
        ("model.glob", "gpt-*", {}, True),
        ("model.glob", "gpt", {}, False),
        ("model.glob", "gpt-?", {}, True),
        ("model.glob", "{claude,gpt}-[0-9]", {}, True),
        ("model.glob", "gpt-[!5]", {}, False),
        ("model.glob", "gpt.5", {}, False),
        ("thinking.enabled", "", {"thinking": {"type": "enabled", "budget_tokens": 9}}, True),
        ("thinking.enabled", "true", {"thinking": {"type": "adaptive"}}, True),
        ("thinking.enabled", "", {"thinking": {"type": "disabled"}}, False),
        ("thinking.disabled", "", {"thinking": {"type": "disabled"}}, True),
        ("thinking.disabled", "", {}, True),
        ("thinking.enabled", "", {"reasoning_effort": "high"}, True),
        ("thinking.enabled", "", {"reasoning_effort": "none"}, False),
        ("thinking.enabled", "", {"reasoning": {"effort": "low"}}, True),
        ("system.any_contains", "secret", {"system": "a secret plan"}, True),
        ("system.any_contains", "secret", {"system": [{"type": "text", "text": "a secret"}]}, True),
        ("system.any_contains", "secret", {"instructions": "a secret"}, True),
        ("system.any_contains", "secret", {"messages": [{"role": "developer", "content": "a secret"}]}, True),
        ("system.any_contains", "secret", user("a secret"), False),
        ("system.regex", r"\bplan\b", {"system": "the plan"}, True),
        ("system.regex", "^second$", {"messages": [{"role": "system", "content": "first"}]}, False),
        ("user.any_contains", "one", user("one", "two"), True),
        ("user.contains", "one", user("one", "two"), False),
        ("user.contains", "two", user("one", "two"), True),
        (
            "user.contains",
            "one",
            {"messages": [*user("one")["messages"], {"role": "assistant", "content": "x"}]},
            False,
        ),
        ("user.regex", "(?i)REFACTOR", user("please refactor"), True),
        ("user.glob", "please*", user("please\nrefactor"), True),
        ("user.contains", "hi", {"input": "hi there"}, True),
        ("user.contains", "hi", {"input": [{"role": "user", "content": [{"type": "input_text", "text": "hi"}]}]}, True),
        ("user.type", "image", user([{"type": "text", "text": "see"}, IMAGE]), True),
        ("user.type", "image", user([IMAGE], "and now?"), False),
        ("user.type", "text", user("plain"), True),
        ("user.type", "document", user([{"type": "document", "source": {}}]), True),
        ("user.type", "tool_result", {"messages": [USED, RESULT]}, True),
        ("tool_use.is", "Bash", {"messages": [USED, RESULT]}, True),
        ("tool_use.is", "Bas", {"messages": [USED, RESULT]}, False),
        ("tool_use.contains", "ls", {"messages": [USED, RESULT]}, True),
        ("tool_use.equals", "Bash", {"messages": [USED, RESULT, *user("go on")["messages"]]}, False),
        ("tool_use.is", "Bash", {"messages": [USED, RESULT, {"role": "assistant", "content": "done"}]}, False),
        (
            "tool_use.is",
            "run",
            {"input": [{"type": "function_call", "name": "run"}, {"type": "function_call_output"}]},
            True,
        ),
        ("token.ge", "25", user("x" * 100), True),
        ("token.gt", "25", user("x" * 100), False),
        ("token.le", "25", user("x" * 100), True),
        ("token.lt", "25", user("x" * 100), False),
        ("token.ge", "25", {"messages": [{"role": "tool", "content": "x" * 100}]}, True),
        ("token.ge", "25", user([{"type": "image_url", "image_url": {"url": "x" * 1000}}]), False),
        ("context_system.contains", "plan", {"system": "the plan"}, True),
        ("context_user.contains", "one", user("one", "two"), True),
        ("latest_user.contains", "one", user("one", "two"), False),
        ("agent.claude_code.equals", "main", {"system": "You are Claude Code"}, True),
        ("agent.claude_code.equals", "subagent", {"system": "You are an agent for tests"}, True),
        ("agent.claude_code.equals", "subagent", {"system": "You are Claude Code. You are an agent"}, False),
        ("agent.claude_code.equals", "compact", user("write a summary of the conversation"), True),
    ],
)
def test_a_condition_asks_what_its_name_says(name: str, value: str, body: dict[str, Any], expected: bool) -> None:
    assert holds(op(name, value), facts(**body)) is expected


def test_a_tool_use_of_anthropic_is_seen_when_its_result_is_brought() -> None:
    messages = [
        {"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "Read", "input": {"path": "/x"}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": [{"type": "text"}]}]},
    ]
    assert holds(op("tool_use.is", "Read"), facts(messages=messages))
    assert holds(op("tool_use.contains", "/x"), facts(messages=messages))


@pytest.mark.parametrize(
    ("start", "end", "zone", "outside", "expected"),
    [
        ("11:00", "12:00", "UTC", False, False),
        ("12:00", "12:01", "UTC", False, True),
        ("22:00", "13:00", "UTC", False, True),
        ("13:00", "06:00", "UTC", False, False),
        ("13:59", "14:01", "Europe/Berlin", False, True),
        ("13:59", "14:01", "Europe/Berlin", True, False),
    ],
)
def test_a_time_range_is_of_a_zones_clock(start: str, end: str, zone: str, outside: bool, expected: bool) -> None:
    value = json.dumps({"start": start, "end": end, "timezone": zone, "outside": outside})
    assert holds(op("time.time_range", value), facts()) is expected


@pytest.mark.parametrize(
    ("name", "value", "field", "words"),
    [
        ("nowhere.is", "x", "position", "unknown position"),
        ("token.about", "x", "operation", "known: ge, gt, le, lt"),
        ("token.ge", "many", "value", "whole number"),
        ("token.ge", "-1", "value", "whole number"),
        ("token.ge", "٣", "value", "whole number"),
        ("system.regex", "(?=x)", "value", "RE2"),
        ("system.regex", "", "value", "expected a pattern"),
        ("system.regex", "x" * 5000, "value", "at most"),
        ("system.regex", "(x{1000}){1000}", "value", "RE2"),
        ("model.glob", "[a", "value", "no `]`"),
        ("model.glob", "{a", "value", "no `}`"),
        ("model.contains", "", "value", "some text"),
        ("user.type", "video", "value", "expected one of text, image"),
        ("thinking.enabled", "false", "value", "`true` or nothing"),
        ("agent.claude_code.equals", "boss", "value", "main, subagent, compact"),
        ("time.time_range", "{}", "value", "start"),
        ("time.time_range", '{"start":"1:00","end":"02:00","timezone":"UTC"}', "value", "`start`"),
        ("time.time_range", '{"start":"01:00","end":"01:00","timezone":"UTC"}', "value", "differ"),
        ("time.time_range", '{"start":"01:00","end":"02:00","timezone":"../etc"}', "value", "no time zone"),
        ("service_ttft.max_le", "5", "operation", "avg_le, avg_ge"),
        ("service_capacity.util_ge", "x", "value", "whole number"),
    ],
)
def test_an_op_that_cannot_be_asked_is_told_by_its_field(name: str, value: str, field: str, words: str) -> None:
    fault = fault_of(op(name, value))
    assert fault is not None
    assert fault[0] == field
    assert words in fault[1]


def test_the_first_entry_of_which_every_op_holds_wins() -> None:
    both = [op("model.contains", "gpt"), op("token.ge", "10")]
    assert match(facts(**user("x" * 40)), both, [op("model.contains", "gpt")]).index == 0
    assert match(facts(**user("x")), both, [op("model.contains", "gpt")]).index == 1
    assert match(facts(**user("x")), both).index is None


def test_the_trace_tells_why_an_entry_failed_and_no_word_of_the_prompt() -> None:
    asked = facts(**user("my secret prompt"), system="a secret system")
    matched = match(
        asked,
        [op("model.contains", "gpt"), op("token.ge", "1000"), op("user.contains", "x")],
        [op("user.any_contains", "prompt"), op("system.regex", "secret")],
    )
    assert matched.reason == (
        "e0 fails: model.contains (gpt-5), token.ge (7); "
        "e1 matches: user.any_contains (16 characters), system.regex (15 characters)"
    )


@pytest.mark.parametrize(
    ("name", "value", "body"),
    [
        ("user.contains", "hi", {"input": [SCREENSHOT, {"role": "user", "content": "hi"}]}),
        ("token.ge", "25", {"input": [SCREENSHOT, {"role": "user", "content": "x" * 100}]}),
        ("user.any_contains", "hi", {"input": [{"type": "tool_search_call", "arguments": {}}, {"role": "user", **HI}]}),
        ("user.contains", "hi", {"messages": [{"role": "user", "type": None, "name": None, **HI}]}),
        ("user.type", "text", user([{"type": None}, {"type": "text", "text": "hi"}])),
        ("tool_use.contains", "ls -l", {"messages": [CUSTOM, RESULT]}),
        ("token.ge", "25", {"messages": [{"tool_calls": [{"custom": {"name": "sh", "input": "x" * 100}}]}]}),
        ("tool_use.contains", '"q":1', {"input": [{"type": "function_call", "arguments": {"q": 1}}]}),
    ],
)
def test_what_is_of_a_tools_own_shape_hides_no_other_fact(name: str, value: str, body: dict[str, Any]) -> None:
    """A screenshot among a response's items, which is no text and no list of parts, made every fact absent."""
    assert holds(op(name, value), facts(**body))


@pytest.mark.parametrize("name", ["messages", "input", "system", "instructions"])
@pytest.mark.parametrize("value", [5, {"a": 1}, [[]], [5], "x", [{"role": 5}], [{"content": [{"text": []}]}], None])
def test_what_cannot_be_read_is_absent_and_never_an_error(name: str, value: Any) -> None:
    asked = facts(**{name: value})
    for position, operations in OPERATIONS.items():
        for operation in operations:
            value_of = {"time_range": '{"start":"01:00","end":"02:00","timezone":"UTC"}', "equals": "main"}
            text = value_of.get(operation, "image" if operation == "type" else "1")
            one = SmartOp(position=position, operation=operation, value="" if position == "thinking" else text)
            match(asked, [one])


def test_a_trace_of_a_name_without_end_ends() -> None:
    (considered,) = match(facts(model="m" * 100_000), [op("model.equals", "x")]).considered
    assert considered.ops[0].found == "m" * 200


def test_an_absent_fact_says_why_in_the_trace() -> None:
    matched = match(facts(messages=[{"content": 5}]), [op("user.contains", "x")])
    assert matched.considered[0].ops[0].found == "absent: `messages` has a shape that is not known"


def test_an_op_of_a_newer_version_never_holds_and_takes_no_worker_down() -> None:
    matched = match(facts(), [op("future.op", "x")], [op("model.equals", "gpt-5")])
    assert matched.index == 1
    assert "absent: unknown position 'future'" in matched.reason


class Known:
    """Services of which this much is known."""

    def __init__(self, first_token: dict[str, int], used: dict[str, int]) -> None:
        self.first, self.used = first_token, used

    def first_token_ms(self, service: Service) -> int | None:
        return self.first.get(service.id)

    def used_percent(self, service: Service) -> int | None:
        return self.used.get(service.id)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("service_ttft.avg_le", "100", True),
        ("service_ttft.avg_le", "99", False),
        ("service_ttft.avg_ge", "200", True),
        ("service_ttft.avg_ge", "201", False),
        ("service_capacity.util_ge", "60", True),
        ("service_capacity.util_gt", "60", False),
        ("service_capacity.util_le", "60", True),
        ("service_capacity.util_lt", "60", False),
    ],
)
def test_conditions_on_services_ask_what_is_known_of_the_entrys_own(name: str, value: str, expected: bool) -> None:
    services = tuple(Service(provider="a", model=model) for model in ("x", "y", "new"))
    router = Router([SmartRoute(ops=(op(name, value),), services=services)])
    known = Known({"a:x": 100, "a:y": 300, "other:z": 1}, {"a:x": 20, "a:y": 100})
    asked = Facts(peek(b'{"model":"m"}'), NOON, known)
    assert (router.match(asked).index == 0) is expected
    assert router.match(Facts(peek(b'{"model":"m"}'), NOON, Known({}, {}))).index == 0
    assert router.match(Facts(peek(b'{"model":"m"}'), NOON)).index == 0


def test_a_regex_takes_time_linear_in_the_text() -> None:
    """With an engine that backtracks this test would not end."""
    assert not holds(op("user.regex", "(a*)*(a|a)*b"), facts(**user("a" * 200_000)))


def test_facts_are_read_once_and_only_those_that_are_asked_for() -> None:
    asked = facts(**user("hello"))
    match(
        asked,
        [op("model.equals", "other")],
        [op("time.time_range", '{"start":"01:00","end":"02:00","timezone":"UTC"}')],
    )
    assert "_conversation" not in vars(asked)
    match(asked, [op("user.contains", "x"), op("token.ge", "1")])
    read = vars(asked)["_conversation"]
    match(asked, [op("user.any_contains", "hello")])
    assert vars(asked)["_conversation"] is read


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(("role", "content", "type", "text", "name", "tool_calls", "output")), inner)
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(
    body=st.dictionaries(
        st.sampled_from(("messages", "input", "system", "instructions", "thinking", "reasoning", "tools")), VALUES
    )
)
def test_no_body_makes_matching_fail(body: dict[str, Any]) -> None:
    every = [op("tool_use.contains", "x"), op("user.regex", "x"), op("system.glob", "x"), op("token.lt", "0")]
    try:
        asked = facts(**body)
    except RequestError:
        return
    match(asked, *([one] for one in every), [op("thinking.enabled")], [op("user.type", "image")])


def test_every_operation_can_be_made() -> None:
    assert set(OPERATIONS) >= {"model", "thinking", "system", "user", "tool_use", "token", "time"}
    assert condition(op("model.equals", "x"))(facts()) == (False, "gpt-5")
