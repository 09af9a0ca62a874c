"""What the scripts are asked: definitions of rules, and the arguments of selections and entries."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from balancer.domain import (
    BreakerSettings,
    Entry,
    Limits,
    Outcome,
    Price,
    ProviderDefinition,
    Retry,
    Rule,
    Selection,
    ServiceDefinition,
    Usage,
)
from balancer.store import keys
from balancer.store.calls import Definer, call_argument, needs_estimate, older, pin_keys
from balancer.tactics import RoundRobin, TokenBased
from tests.builders import a_configuration, a_provider, a_rule, a_service


def definition(rule: Rule, **provider: Any) -> Any:
    return Definer(a_configuration(rule, providers=(a_provider("a", **provider),))).definition(rule, 1)


SELECTION = Selection(
    number=7,
    rule="r",
    partition="|r",
    revision=3,
    draw=9,
    reserved=11,
    deadline_ms=500,
    session="d" * 32,
    affinity_ms=60_000,
    only="a:m",
    excluded=("b:m", "c:m"),
    barred=("d:m",),
)
ENTRY = Entry(
    number=7,
    service="a:m",
    outcome=Outcome.RATE_LIMITED,
    age_ms=5,
    usage=Usage(input=1, output=2, cached=3, cache_creation=4, reasoning=5),
    cooldown_ms=1000,
    first_token_us=20,
    stream_us=30,
)


def test_a_call_is_its_numbers_its_entries_and_its_selections_in_the_order_of_the_script() -> None:
    call = call_argument(
        lease_ms=30_000, now_ms=1, seen=(2, 3), batch=4, skips=True, entries=(ENTRY,), selections=(SELECTION,)
    )
    assert msgspec.msgpack.decode(call) == [
        *(1, 2, 3, 30_000, 4, True),
        [[7, "a:m", "rate_limited", 5, [1, 2, 3, 4, 5], 1000, 20, 30]],
        [[7, 3, 9, 11, 500, 60_000, "r", "|r", "a:m", ["b:m", "c:m"], "d" * 32, ["d:m"]]],
    ]


def test_an_entry_grows_older_while_it_waits() -> None:
    assert older(ENTRY, 10) == msgspec.structs.replace(ENTRY, age_ms=15)


def test_there_is_a_pin_for_each_selection_with_an_affinity_in_their_order() -> None:
    def a_selection(number: int, session: str, affinity_ms: int) -> Selection:
        return Selection(
            number=number,
            rule="r",
            partition="|r",
            revision=1,
            deadline_ms=1,
            session=session,
            affinity_ms=affinity_ms,
        )

    selections = [a_selection(1, "x", 5), a_selection(2, "", 0), a_selection(3, "y", 5), a_selection(4, "x", 5)]
    assert pin_keys("eu", selections) == [keys.pin("eu", name) for name in ("x", "y", "x")]


def test_a_service_is_defined_with_its_tier_its_limits_and_its_providers_price() -> None:
    service = a_service("a:m", weight=3, time_window=60, tier=2, limits=Limits(rpm=5, tpm=700, in_flight=2))
    made = definition(a_rule(services=(service,)), price=Price(input=1.25, output=10))
    assert made.partitions[0].services == (
        ServiceDefinition(
            id="a:m", active=1, window=60, weight=3, tier=2, rpm=5, tpm=700, in_flight=2, cost=round(1000 * 13.75)
        ),
    )


def test_a_provider_is_defined_once_with_the_numbers_of_its_breaker() -> None:
    breaker = BreakerSettings(failures=4, ratio=0.333, min_requests=9, window_s=1.5, open_s=0.25, successes=2)
    made = definition(a_rule(services=("a:m", "a:n", "gone:m")), breaker=breaker)
    assert made.providers == (
        ProviderDefinition(
            id="a", failures=4, ratio_permille=333, min_requests=9, window_ms=1500, open_ms=250, successes=2
        ),
    )


@pytest.mark.parametrize(
    ("split", "rpm"),
    [
        ({}, 100),
        ({"default": 0.5, "eu": 0.5}, 50),
        ({"default": 0.29, "eu": 0.71}, 29),
        ({"default": 1 / 3}, 33),
        ({"default": 1}, 100),
        ({"default": 0.001}, -1),
        ({"eu": 1.0}, -1),
    ],
)
def test_a_pools_share_of_a_limit_is_rounded_down_and_nothing_passes_where_none_is_left(
    split: dict[str, float], rpm: int
) -> None:
    """0.29 of 100 was once 28: in binary fractions it is a little less than 29."""
    (provider,) = definition(a_rule(services=("a:m",)), limits=Limits(rpm=100, split=split)).providers
    assert (provider.rpm, provider.tpm, provider.in_flight) == (rpm, 0, 0)


@pytest.mark.parametrize(
    ("retry", "permille"),
    [(Retry(), 200), (Retry(budget_ratio=0.0625), 62), (Retry(attempts=1), 0), (Retry(budget_ratio=0), 0)],
)
def test_a_rule_tells_the_share_of_requests_that_may_be_tried_again(retry: Retry, permille: int) -> None:
    assert definition(a_rule(services=("a:m",), retry=retry)).retry_permille == permille


def test_a_partition_tells_its_tactics_own_numbers_and_whether_it_refuses() -> None:
    (tries,) = definition(a_rule(lb_tactic=RoundRobin(request_threshold=3, reserve="full"))).partitions
    (refuses,) = definition(a_rule(lb_tactic=TokenBased(token_threshold=2**60), on_exhausted="refuse")).partitions
    assert (tries.params, tries.refuses) == ({"request_threshold": 3}, 0)
    assert (refuses.params, refuses.refuses) == ({"token_threshold": 2**53}, 1)


@pytest.mark.parametrize(
    ("of_service", "of_provider", "is_needed"),
    [
        (Limits(), Limits(), False),
        (Limits(rpm=1, in_flight=1), Limits(rpm=1, in_flight=1), False),
        (Limits(tpm=1), Limits(), True),
        (Limits(), Limits(tpm=1), True),
    ],
)
def test_an_estimate_is_needed_where_tokens_a_minute_are_limited(
    of_service: Limits, of_provider: Limits, is_needed: bool
) -> None:
    rule = a_rule(services=("a:m", a_service("b:m", limits=of_service)))
    providers = {"a": a_provider("a", limits=of_provider)}
    assert needs_estimate(rule, providers.get) == is_needed


def test_what_clients_name_stands_in_no_key() -> None:
    secret = "sk-session 42\n\udcff}"
    session = keys.session("|chat", secret)
    found = {keys.pin("p", session), keys.response("p", secret)}
    assert all(key.startswith("balancer:{p}:") and "42" not in key for key in found)
    assert session != keys.session("|other", secret)
    assert len(session) == 32


def test_a_session_of_one_partition_is_none_of_another_whatever_they_are_called() -> None:
    assert keys.session("|a", "b") != keys.session("|ab", "")
