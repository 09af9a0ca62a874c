"""The vocabulary's own helpers: expiry, credentials, current services, tactics from maps, ids."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from balancer.domain import (
    Configuration,
    OAuthDetail,
    Pick,
    Rule,
    ScenarioConfig,
    ScenarioFlags,
    SmartOp,
    SmartRoute,
    Tactic,
)
from balancer.tactics import (
    Hybrid,
    Random,
    RoundRobin,
    TokenBased,
    is_valid_tactic,
    tactic_from_map,
    tactic_name,
    tactic_to_map,
)
from tests.builders import a_configuration, a_provider, a_rule, a_service

NOW = datetime(2026, 6, 1, 12, 0, tzinfo=UTC)
MARGIN = timedelta(minutes=5)
INSTANT = timedelta(microseconds=1)


# -- providers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("left", "is_expired"),
    [
        (timedelta(days=1), False),
        (MARGIN + INSTANT, False),
        (MARGIN - INSTANT, True),
        (timedelta(0), True),
        (-timedelta(days=400), True),
    ],
)
def test_an_access_token_counts_as_expired_five_minutes_early(left: timedelta, is_expired: bool) -> None:
    detail = OAuthDetail(access_token="t", expires_at=(NOW + left).isoformat())

    assert detail.is_expired(NOW) is is_expired
    assert a_provider(auth_type="oauth", oauth_detail=detail).is_oauth_expired(NOW) is is_expired


@pytest.mark.parametrize(
    ("expires_at", "is_expired"),
    [
        ("2026-06-01T12:05:01Z", False),
        ("2026-06-01T12:04:59Z", True),
        ("2026-06-01T12:04:59.5Z", True),
        ("2026-06-01T14:05:01+02:00", False),
        ("2026-06-01T14:04:59+02:00", True),
        ("2026-06-01T10:05:01-02:00", False),
        ("2026-06-01T12:05:01", False),
        ("2026-06-01T12:04:59", True),
        ("", False),
        ("soon", False),
    ],
)
def test_an_expiry_is_read_in_any_zone_and_an_unreadable_one_never_comes(expires_at: str, is_expired: bool) -> None:
    assert OAuthDetail(expires_at=expires_at).is_expired(NOW) is is_expired


def test_without_a_time_given_expiry_is_judged_now() -> None:
    now = datetime.now(UTC)

    assert OAuthDetail(expires_at=(now + MARGIN - INSTANT).isoformat()).is_expired()
    assert not OAuthDetail(expires_at=(now + timedelta(days=1)).isoformat()).is_expired()


@pytest.mark.parametrize(
    "more",
    [
        {"auth_type": "api_key", "oauth_detail": OAuthDetail(expires_at="2000-01-01T00:00:00Z")},
        {"auth_type": "oauth"},
        {"auth_type": "oauth", "oauth_detail": OAuthDetail(access_token="t")},
    ],
)
def test_only_an_oauth_provider_with_an_expiry_can_expire(more: dict[str, Any]) -> None:
    assert not a_provider(**more).is_oauth_expired(NOW)


@pytest.mark.parametrize(
    ("more", "sent"),
    [
        ({"token": "key"}, "key"),
        ({}, ""),
        ({"token": "key", "oauth_detail": OAuthDetail(access_token="t")}, "key"),
        ({"token": "key", "auth_type": "oauth", "oauth_detail": OAuthDetail(access_token="t")}, "t"),
        ({"token": "key", "auth_type": "oauth"}, ""),
    ],
)
def test_the_credential_is_the_one_of_the_auth_type(more: dict[str, Any], sent: str) -> None:
    assert a_provider(**more).access_token == sent


# -- rules -------------------------------------------------------------------------------------------------------------

A, B, C = (a_service(f"{name}:m") for name in "abc")


def inactive(service: Any) -> Any:
    return msgspec.structs.replace(service, active=False)


def test_active_services_keep_their_order() -> None:
    assert a_rule(services=(A, inactive(B), C)).active_services() == (A, C)
    assert a_rule(services=(inactive(A),)).active_services() == ()
    assert a_rule(services=()).active_services() == ()


@pytest.mark.parametrize(
    ("rule", "cursor", "current"),
    [
        (a_rule(services=(A, B, C)), "b:m", B),
        (a_rule(services=(A, B, C)), "", A),
        (a_rule(services=(A, B, C)), "gone:m", A),
        (a_rule(services=(inactive(A), B, C)), "", B),
        (a_rule(services=(inactive(A), B, C)), "a:m", B),
        (a_rule(services=(A, B, C), current_service_index=2), "", C),
        (a_rule(services=(A, B, C), current_service_index=4), "", B),
        (a_rule(services=(A, inactive(B), C), current_service_index=2), "", C),
        (a_rule(services=(A, inactive(B), C), current_service_index=1), "", A),
        (a_rule(services=(A, B, C), current_service_index=2), "b:m", B),
        (a_rule(services=(inactive(A),), current_service_index=0), "", None),
        (a_rule(services=(), current_service_index=0), "", None),
        (a_rule(services=()), "a:m", None),
    ],
)
def test_the_current_service_is_the_cursors_else_the_configured_else_the_first_active(
    rule: Rule, cursor: str, current: Any
) -> None:
    assert rule.current_service(cursor) == current
    assert rule.default_provider(cursor) == (current.provider if current else "")
    assert rule.default_model(cursor) == (current.model if current else "")


@pytest.mark.parametrize(("cursor", "index"), [("a:m", 0), ("b:m", 1), ("c:m", 2), ("", 0), ("gone:m", 0)])
def test_the_index_is_the_cursors_place_among_all_services_active_or_not(cursor: str, index: int) -> None:
    """Where the active ones alone were counted, an inactive service made the index mean another one."""
    assert a_rule(services=(inactive(A), B, C)).current_service_index_of(cursor) == index


def test_a_service_is_named_by_provider_and_model_and_the_model_may_hold_colons() -> None:
    assert a_service("a:llama3:8b").id == "a:llama3:8b"
    assert a_service("a:org/model").id == "a:org/model"


def test_a_smart_entry_is_named_by_its_uuid_else_by_its_ops_alone() -> None:
    ops = (SmartOp(position="token", operation="ge", value="1"),)
    bare = SmartRoute(ops=ops)

    assert SmartRoute(uuid="u", ops=ops).entry == "u"
    assert bare.entry == SmartRoute(ops=ops, description="other", services=(A,)).entry
    assert bare.entry != SmartRoute(ops=(SmartOp(position="token", operation="ge", value="2"),)).entry


def test_a_decision_is_named_by_pool_epoch_and_position() -> None:
    pick = Pick(
        pool="eu.1",
        rule="chat",
        partition="chat",
        revision=4,
        number=5,
        service="a:m",
        reason="next",
        seq=6,
        epoch=2,
        position=9,
        streak=1,
        is_switch=True,
        reserved=0,
    )

    assert pick.decision == "eu.1.2.9"


def test_providers_and_rules_are_found_by_uuid() -> None:
    configuration = a_configuration(a_rule("one", ("a:m",)), a_rule("two", ("b:m",)))

    assert configuration.rule("two") == a_rule("two", ("b:m",))
    assert configuration.provider("b") == a_provider("b")
    assert configuration.rule("a") is None
    assert configuration.provider("one") is None
    assert Configuration().rule("one") is None


# -- scenarios ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "effective"),
    [
        (ScenarioFlags(), ScenarioFlags(unified=True)),
        (ScenarioFlags(unified=True), ScenarioFlags(unified=True)),
        (ScenarioFlags(separate=True), ScenarioFlags(separate=True)),
        (ScenarioFlags(smart=True), ScenarioFlags(smart=True)),
        (ScenarioFlags(separate=True, smart=True), ScenarioFlags(separate=True, smart=True)),
    ],
)
def test_a_scenario_without_flags_is_unified(flags: ScenarioFlags, effective: ScenarioFlags) -> None:
    assert ScenarioConfig(scenario="claude_code", flags=flags).effective_flags() == effective


# -- tactics -----------------------------------------------------------------------------------------------------------

NAMES = ("round_robin", "token_based", "hybrid", "random")
DEFAULTS: tuple[Tactic, ...] = (
    RoundRobin(request_threshold=10),
    TokenBased(token_threshold=10_000),
    Hybrid(request_threshold=10, token_threshold=10_000),
    Random(),
)


@pytest.mark.parametrize(("number", "name"), list(enumerate(NAMES)))
def test_a_tactic_is_named_in_any_letter_case_or_by_its_legacy_number(number: int, name: str) -> None:
    spellings: tuple[Any, ...] = (name, name.upper(), name.title(), number)

    assert all(is_valid_tactic(spelling) for spelling in spellings)
    assert {tactic_from_map(spelling) for spelling in spellings} == {DEFAULTS[number]}
    assert tactic_name(DEFAULTS[number]) == name


@pytest.mark.parametrize("name", ["", "roundrobin", "round_robin ", "round-robin", -1, 4, True, False, 1.0, None, [0]])
def test_anything_else_is_no_tactic(name: object) -> None:
    assert not is_valid_tactic(name)


@pytest.mark.parametrize("name", ["", "best", -1, 4])
def test_an_unknown_tactic_is_round_robin(name: str | int) -> None:
    assert tactic_from_map(name, {"request_threshold": 3}) == RoundRobin(request_threshold=3)


@pytest.mark.parametrize("params", [None, {}, {"request_threshold": None}, {"request_threshold": 0, "other": 1}])
@pytest.mark.parametrize("tactic", DEFAULTS)
def test_parameters_that_are_absent_take_their_defaults(params: dict[str, Any] | None, tactic: Tactic) -> None:
    assert tactic_from_map(tactic_name(tactic), params) == tactic


@pytest.mark.parametrize("value", [1, 10, 2**53, 2**60, 7.0])
def test_a_positive_threshold_stands(value: Any) -> None:
    params = {"request_threshold": value, "token_threshold": value}

    assert tactic_from_map("hybrid", params) == Hybrid(request_threshold=int(value), token_threshold=int(value))


@pytest.mark.parametrize("value", [0, -1, -(2**60), 0.0, -3.0])
def test_a_threshold_below_one_takes_its_default(value: Any) -> None:
    params = {"request_threshold": value, "token_threshold": value}

    assert [tactic_from_map(name, params) for name in NAMES] == list(DEFAULTS)


@pytest.mark.parametrize("value", ["5", True, 1.5, [1]])
def test_a_threshold_that_is_no_whole_number_is_refused(value: Any) -> None:
    with pytest.raises(msgspec.ValidationError, match="request_threshold"):
        tactic_from_map("hybrid", {"request_threshold": value})


def test_a_tactics_map_always_tells_its_thresholds() -> None:
    assert [tactic_to_map(tactic) for tactic in DEFAULTS] == [
        {"type": "round_robin", "params": {"request_threshold": 10}},
        {"type": "token_based", "params": {"token_threshold": 10_000}},
        {"type": "hybrid", "params": {"request_threshold": 10, "token_threshold": 10_000}},
        {"type": "random", "params": {}},
    ]


thresholds = st.integers(1, 2**60)
common: dict[str, Any] = {"reserve": st.sampled_from(("none", "input", "full")), "reserve_cap": st.integers(1, 10**9)}
tactics: st.SearchStrategy[Tactic] = st.one_of(
    st.builds(RoundRobin, request_threshold=thresholds, **common),
    st.builds(TokenBased, token_threshold=thresholds, **common),
    st.builds(Hybrid, request_threshold=thresholds, token_threshold=thresholds, **common),
    st.builds(Random, **common),
)


@given(tactics)
def test_a_tactic_is_made_again_from_its_map(tactic: Tactic) -> None:
    written = tactic_to_map(tactic)

    assert tactic_from_map(written["type"], written["params"]) == tactic
