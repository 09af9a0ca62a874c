"""What providers and rules of a document say of each other: shares of limits, and rules that stand in for others."""

from __future__ import annotations

from typing import Any

import pytest

from balancer.document import read
from balancer.domain import Configuration, Limits
from balancer.errors import ConfigurationError

URL = "https://upstream.invalid/v1"


def a_rule(uuid: str, **more: Any) -> dict[str, Any]:
    """A rule over provider `a`."""
    return {"uuid": uuid, "request_model": uuid, "services": [{"provider": "a", "model": "m"}]} | more


def a_document(*rules: dict[str, Any], **limits: Any) -> dict[str, Any]:
    """Provider `a` with these limits, and rules."""
    return {"providers": [{"name": "a", "api_base": URL, "limits": limits}], "rules": list(rules)}


def in_pools(*pools: str) -> list[dict[str, Any]]:
    """A rule in each pool."""
    return [a_rule(pool, pool=pool) for pool in pools]


def strict(raw: Any) -> Configuration:
    """What the strict door makes of it, without a warning."""
    reading = read(raw, door="strict")
    assert reading.warnings == ()
    return reading.configuration


def faults(raw: Any) -> dict[str, str]:
    """What the strict door refuses, by path."""
    with pytest.raises(ConfigurationError) as caught:
        read(raw, door="strict")
    return {path: message for path, _, message in (fault.partition(": ") for fault in caught.value.faults)}


def mended(raw: Any) -> tuple[Configuration, list[str]]:
    """What the lenient door makes of it, and the paths of its warnings."""
    reading = read(raw, door="lenient")
    return reading.configuration, [warning.partition(": ")[0] for warning in reading.warnings]


# -- shares ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pools", "limits"),
    [
        (["default", "default"], {"rpm": 10}),
        (["default"], {"rpm": 10, "split": {"default": 1}}),
        (["eu", "us"], {"rpm": 10, "split": {"eu": 0.9, "us": 0.1}}),
        (["eu", "us"], {"rpm": 100, "split": {"eu": 0.01, "us": 0.29}}),
        (["eu", "us", "asia"], {"rpm": 10, "split": {"eu": 1 / 3, "us": 1 / 3, "asia": 1 / 3}}),
        (
            ["w", "x", "y", "z"],
            {"rpm": 10, "split": {"w": 0.2, "x": 0.4, "y": 0.3, "z": 0.1}},
        ),  # In floats > 1.
        (["eu"], {"rpm": 10, "split": {"eu": 0.5, "later": 0.5}}),
        (["eu", "us"], {}),
    ],
)
def test_limits_that_every_pool_has_a_share_of_are_taken(pools: list[str], limits: dict[str, Any]) -> None:
    configuration = strict(a_document(*(a_rule(f"{i}", pool=pool) for i, pool in enumerate(pools)), **limits))

    assert configuration.providers[0].limits == Limits(**limits)


@pytest.mark.parametrize(
    ("limits", "path", "words"),
    [
        ({"rpm": 10}, "", "must say split: {eu: …, us: …}"),
        ({"in_flight": 1}, "", "must say split"),
        ({"rpm": 10, "split": {"eu": 1}}, ".split.us", "missing"),
        ({"rpm": 10, "split": {"eu": 0.5, "us": 0}}, ".split.us", "more than 0"),
        ({"rpm": 10, "split": {"eu": 0.5, "us": -0.5}}, ".split.us", "more than 0"),
        ({"rpm": 10, "split": {"eu": 0.5, "us": float("nan")}}, ".split.us", "more than 0"),
        ({"rpm": 10, "split": {"eu": 0.5, "us": 0.6}}, ".split", "add up to 1.1"),
        ({"rpm": 10, "split": {"eu": 0.5, "us": 0.09}}, ".split.us", "leaves none of rpm: 10"),
        ({"rpm": 100, "in_flight": 9, "split": {"eu": 0.5, "us": 0.11}}, ".split.us", "leaves none of in_flight: 9"),
    ],
)
def test_limits_that_cannot_be_shared_are_refused_or_left_out(limits: dict[str, Any], path: str, words: str) -> None:
    """Whole in each of two pools they would be twice what the account grants."""
    raw = a_document(*in_pools("eu", "us"), **limits)

    (where,) = faults(raw)
    assert where == f"providers[0].limits{path}"
    assert words in faults(raw)[where]
    configuration, warnings = mended(raw)
    assert (configuration.providers[0].limits, warnings) == (Limits(), [where])


def test_a_share_that_is_wrong_leaves_a_single_pool_the_whole() -> None:
    raw = a_document(a_rule("x"), rpm=10, split={"default": 2})

    assert mended(raw)[0].providers[0].limits == Limits(rpm=10)


@pytest.mark.parametrize("pool", ["", "-a", "a/b", "{a}"])
def test_a_share_is_a_pool_s(pool: str) -> None:
    raw = a_document(a_rule("x"), rpm=10, split={"default": 0.5, pool: 0.5})

    assert list(faults(raw)) == [f"providers[0].limits.split.{pool}"]
    assert mended(raw)[0].providers[0].limits == Limits(rpm=10, split={"default": 0.5})


def test_rules_that_are_not_active_reach_no_provider() -> None:
    raw = a_document(a_rule("eu", pool="eu"), a_rule("us", pool="us", active=False), rpm=10)

    assert strict(raw).providers[0].limits == Limits(rpm=10)


@pytest.mark.parametrize(
    ("other", "warned"),
    [
        ({"limits": {"rpm": 6}}, ["rules[1]"]),
        ({}, ["rules[1]"]),
        ({"limits": {"rpm": 5}}, []),
        ({"model": "other"}, []),
    ],
)
def test_limits_of_a_service_that_differ_between_rules_of_a_pool_get_a_warning(
    other: dict[str, Any], warned: list[str]
) -> None:
    first, second = ({"provider": "a", "model": "m"} | more for more in ({"limits": {"rpm": 5}}, other))
    for more, expected in (({}, warned), ({"pool": "eu"}, []), ({"active": False}, [])):
        raw = a_document(a_rule("x", services=[first]), a_rule("y", services=[second], **more))

        assert mended(raw)[1] == expected
        assert len(read(raw, door="strict").warnings) == len(expected)


# -- rules that stand in -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["fallback", "on_context_overflow"])
@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("openai", "openai"),
        ("openai", "opencode"),
        ("opencode", "openai"),
        ("opencode", "anthropic"),
        ("anthropic", "claude_code"),
        ("claude_code", "anthropic"),
    ],
)
def test_a_rule_may_stand_in_for_another_that_serves_the_same_clients(field: str, one: str, other: str) -> None:
    value: Any = ["other"] if field == "fallback" else "other"
    raw = a_document(a_rule("one", scenario=one, **{field: value}), a_rule("other", scenario=other))

    assert getattr(strict(raw).rules[0], field) == (("other",) if field == "fallback" else "other")


def test_a_rule_is_named_by_its_default_uuid_too() -> None:
    rules = [{"request_model": "one", "fallback": ["openai/two"]}, {"request_model": "two"}]

    assert strict({"rules": rules}).rules[0].fallback == ("openai/two",)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gone", "there is no rule with uuid 'gone'"),
        ("chat", "did you mean 'other'?"),
        ("one", "itself"),
        ("claude", "scenario anthropic"),
    ],
)
def test_a_rule_that_cannot_stand_in_is_refused_or_dropped(name: str, words: str) -> None:
    def document(**one: Any) -> dict[str, Any]:
        rules = [a_rule("one", **one), a_rule("other", request_model="chat"), a_rule("claude", scenario="anthropic")]
        return a_document(*rules)

    listed, single = document(fallback=["other", name]), document(on_context_overflow=name)

    for raw, path in ((listed, "rules[0].fallback[1]"), (single, "rules[0].on_context_overflow")):
        assert list(faults(raw)) == [path]
        assert words in faults(raw)[path]
    configuration, warnings = mended(listed)
    assert (configuration.rules[0].fallback, warnings) == (("other",), ["rules[0].fallback[1]"])
    configuration, warnings = mended(single)
    assert (configuration.rules[0].on_context_overflow, warnings) == ("", ["rules[0].on_context_overflow"])


def test_a_rule_named_twice_stands_in_once() -> None:
    raw = a_document(a_rule("one", fallback=["other", "other"]), a_rule("other"))

    assert faults(raw) == {"rules[0].fallback[1]": "'other' is named twice"}
    assert mended(raw)[0].rules[0].fallback == ("other",)


def test_rules_that_lead_back_are_refused_with_the_way() -> None:
    raw = a_document(a_rule("a", fallback=["x", "b"]), a_rule("x"), a_rule("b", fallback=["c"]), a_rule("c"))
    strict(raw)
    raw["rules"][3]["fallback"] = ["x", "a"]

    assert faults(raw) == {"rules[3].fallback[1]": "leads back: c → a → b → c; leave one of these out"}
    assert [rule.fallback for rule in mended(raw)[0].rules] == [("x", "b"), (), ("c",), ("x",)]


def test_long_prompts_that_lead_back_are_refused_and_a_way_back_on_failure_is_not() -> None:
    """Where the small model fails, the large one serves; and where a prompt is too long for the small one, too."""
    strict(a_document(a_rule("small", on_context_overflow="large"), a_rule("large", fallback=["small"])))

    raw = a_document(a_rule("small", on_context_overflow="large"), a_rule("large", on_context_overflow="small"))
    assert list(faults(raw)) == ["rules[1].on_context_overflow"]


def test_a_chain_may_be_long() -> None:
    rules = [a_rule(str(i), fallback=[str(i + 1)]) for i in range(1500)]

    strict(a_document(*rules, a_rule("1500")))
    assert len(faults(a_document(*rules, a_rule("1500", fallback=["0"])))) == 1


@pytest.mark.parametrize(("is_active", "warned"), [(True, ["rules[0].fallback[0]"]), (False, [])])
def test_a_rule_that_is_not_active_and_stands_in_gets_a_warning(is_active: bool, warned: list[str]) -> None:
    raw = a_document(a_rule("one", fallback=["off"], active=is_active), a_rule("off", active=False))

    configuration, warnings = mended(raw)

    assert (configuration.rules[0].fallback, warnings) == (("off",), warned)


def test_what_was_stored_is_not_looked_at_again() -> None:
    """A newer version may allow more."""
    raw = a_document(a_rule("one", fallback=["gone"]), *in_pools("eu", "us"), rpm=10)

    reading = read(raw, door="stored")

    assert reading.configuration.rules[0].fallback == ("gone",)
    assert reading.configuration.providers[0].limits == Limits(rpm=10)
    assert reading.warnings == ()
