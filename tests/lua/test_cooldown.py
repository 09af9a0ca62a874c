"""A service that asked to be left alone is left alone, for exactly so long."""

from __future__ import annotations

from typing import Any

import pytest

from balancer.domain import Outcome
from balancer.reference import Pool
from tests.lua.builders import LEASE_MS, NOW_MS, A, B, C, Fleet, a_rule, a_service, an_entry
from tests.lua.stories import FAILED, RATE_LIMITED, ask, chosen, end, pinned, standing

COOL_MS = 7_000


def cool(fleet: Fleet, *services: str, for_ms: int = COOL_MS) -> None:
    fleet.settle(*(an_entry(0, service, RATE_LIMITED, cooldown_ms=for_ms) for service in services))


def until_ms(fleet: Fleet, service: str = A) -> int:
    """When a service's cooldown ends, after NOW_MS; below zero when it never had one."""
    state = fleet.pool.service(service) if isinstance(fleet.pool, Pool) else fleet.service(service)
    return state.cooldown - NOW_MS


@pytest.mark.parametrize("tactic", ["round_robin", "token_based", "hybrid", "random", "least_in_flight", "cost"])
def test_no_tactic_picks_what_cools(fleet: Fleet, tactic: str) -> None:
    fleet.fence(a_rule(tactic, [A, B, C], requests=1, tokens=1))
    cool(fleet, A, C)
    fleet.pass_ms(COOL_MS - 1)
    assert {answer[1] for answer in fleet.ask(10)} == {B}
    fleet.settle(*(an_entry(number, B, input=9) for number in range(1, 11)))
    fleet.pass_ms(1)
    assert "a" in fleet.picks(3)


@pytest.mark.parametrize("outcome", [o for o in Outcome if o not in (Outcome.ABANDONED, Outcome.LOST)])
def test_any_ending_may_ask_for_it_and_none_has_it_without_asking(fleet: Fleet, outcome: Outcome) -> None:
    fleet.fence(a_rule(services=[A, B]))
    fleet.ask(2)
    fleet.settle(an_entry(1, A, outcome))
    assert until_ms(fleet) <= 0
    fleet.settle(an_entry(2, A, outcome, cooldown_ms=COOL_MS))
    assert until_ms(fleet) == COOL_MS


@pytest.mark.parametrize(
    ("first", "second", "end_ms"),
    [
        ((5_000, 0), (9_000, 0), 9_000),
        ((9_000, 0), (5_000, 0), 9_000),
        ((9_000, 0), (9_000, 1), 9_000),
        ((3_000, 0), (9_000, 4_000), 5_000),
        ((1_000, 5_000), (2_000, 2_000), 0),
    ],
)
def test_of_several_the_last_to_end_counts_from_when_each_was_asked_for(
    fleet: Fleet, first: tuple[int, int], second: tuple[int, int], end_ms: int
) -> None:
    fleet.fence(a_rule(services=[A, B]))
    for cooldown_ms, age_ms in (first, second):
        fleet.settle(an_entry(0, A, RATE_LIMITED, cooldown_ms=cooldown_ms, age_ms=age_ms))
    assert until_ms(fleet) == end_ms
    assert fleet.picks(1) == ("b" if end_ms > 0 else "a")


def test_all_rules_of_the_pool_leave_it_alone(fleet: Fleet) -> None:
    fleet.fence(a_rule(services=[A, B]), a_rule("random", [A, B], rule="dice"))
    fleet.ask()
    end(fleet, A, RATE_LIMITED, cooldown_ms=COOL_MS)
    assert {answer[1] for rule in ("chat", "dice") for answer in fleet.ask(4, rule=rule)} == {B}


def test_the_cursor_moves_on_and_does_not_come_back_before_its_turn(fleet: Fleet) -> None:
    fleet.fence(a_rule(requests=3))
    assert fleet.picks(2) == "aa"
    end(fleet, A, RATE_LIMITED, cooldown_ms=COOL_MS)
    assert ask(fleet) == (B, "next", 1, 1)
    fleet.pass_ms(COOL_MS)
    assert fleet.picks(6) == "bbccca"


def test_a_retry_goes_past_what_cools(fleet: Fleet) -> None:
    fleet.fence(a_rule())
    cool(fleet, B)
    assert chosen(fleet, excluded=[A]) == (C, "retry")
    assert chosen(fleet, excluded=[A, C]) == ("none", "tried")


@pytest.mark.parametrize(("refuses", "answer"), [(False, (A, "exhausted")), (True, ("none", "cooling"))])
def test_a_request_for_what_cools_alone_is_tried_or_refused_as_its_rule_says(
    fleet: Fleet, refuses: bool, answer: tuple[str, str]
) -> None:
    fleet.fence(a_rule(refuses=refuses))
    cool(fleet, A)
    assert chosen(fleet, only=A) == answer


def test_a_session_comes_back_to_a_service_that_cooled(fleet: Fleet) -> None:
    session: dict[str, Any] = {"session": "s", "affinity_ms": 600_000}
    fleet.fence(a_rule(requests=1))
    assert chosen(fleet, **session)[0] == A
    cool(fleet, A)
    assert [chosen(fleet, **session)[0] for _ in range(3)] == [B, C, B]
    assert pinned(fleet) == A
    fleet.pass_ms(COOL_MS)
    assert chosen(fleet, **session) == (A, "pinned")


def test_a_late_end_of_a_lost_attempt_still_says_so(fleet: Fleet) -> None:
    fleet.fence(a_rule())
    fleet.ask(worker="dead")
    fleet.pass_ms(LEASE_MS)
    fleet.reap("dead")
    end(fleet, A, RATE_LIMITED, worker="dead", cooldown_ms=COOL_MS)
    assert until_ms(fleet) == LEASE_MS + COOL_MS


def test_an_attempt_that_was_given_up_asks_for_nothing(fleet: Fleet) -> None:
    fleet.fence(a_rule())
    fleet.ask()
    fleet.settle(an_entry(1, "", Outcome.ABANDONED, cooldown_ms=COOL_MS))
    assert fleet.picks(1) == "a"


def test_a_cooldown_outlives_edits_and_cleared_counters(fleet: Fleet) -> None:
    fleet.fence(a_rule())
    cool(fleet, A)
    fleet.pool.clear(fleet.now_ms, [A])
    fleet.fence(a_rule(services=[A, B], revision=2))
    assert until_ms(fleet) == COOL_MS
    assert fleet.picks(1, revision=2) == "b"


def test_with_everything_cooling_the_turns_are_tried_on_without_moving(fleet: Fleet) -> None:
    fleet.fence(a_rule(requests=2, cursor=B))
    fleet.ask()
    cool(fleet, A, B, C)
    assert [ask(fleet) for _ in range(4)] == [(B, "exhausted", 1, 0)] * 4
    assert standing(fleet) == (B, 1)
    fleet.pass_ms(COOL_MS)
    assert ask(fleet) == (B, "streak", 2, 0)


def test_limits_and_cooldown_together(fleet: Fleet) -> None:
    """What is at its limit is not tried; what cools is, for want of others."""
    fleet.fence(a_rule(services=[a_service(A, in_flight=1), B]))
    assert fleet.picks(1) == "a"
    cool(fleet, B)
    assert chosen(fleet) == (B, "exhausted")
    fleet.settle(an_entry(1, A, FAILED))
    assert chosen(fleet)[0] == A
