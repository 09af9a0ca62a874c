"""Limits, breakers, cooldowns, tiers, pins and retries as stories, each told to the scripts and to the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from balancer.domain import Outcome
from balancer.reference import Pool
from tests.lua.builders import (
    DEADLINE_MS,
    LEASE_MS,
    A,
    B,
    C,
    Fleet,
    a_provider,
    a_rule,
    a_selection,
    a_service,
    an_abandoned,
    an_entry,
)
from tests.lua.pool import LuaPool

FAILED, LIMITED, SUCCESS = Outcome.FAILED, Outcome.RATE_LIMITED, Outcome.SUCCESS
OPEN_MS = 10_000
SESSION: dict[str, Any] = {"session": "s", "affinity_ms": 60_000}
BREAKERS = [a_provider(p, failures=2, open_ms=OPEN_MS, successes=2) for p in "abc"]


@pytest.fixture(params=["scripts", "reference"])
def fleet(request: pytest.FixtureRequest, new_pool: Callable[..., LuaPool]) -> Fleet:
    return Fleet(new_pool() if request.param == "scripts" else Pool())


def ask(fleet: Fleet, **selection: Any) -> list[Any]:
    """One answer, without its place in the history: service, reason, streak and is_switch, or why there is none."""
    (answer,) = fleet.ask(**selection)
    return [answer[1], answer[2], answer[6], answer[7]] if answer[0] == "pick" else answer


def settle(fleet: Fleet, service: str, outcome: Outcome = SUCCESS, **entry: Any) -> None:
    """The end of the last attempt that was picked."""
    fleet.settle(an_entry(fleet.numbers["w1"], service, outcome, **entry))


def try_out(fleet: Fleet, service: str, *outcomes: Outcome, **entry: Any) -> None:
    """Attempts at a service, asked for by itself, each ended so."""
    for outcome in outcomes:
        assert ask(fleet, only=service)[0] == service
        settle(fleet, service, outcome, **entry)


def break_down(fleet: Fleet, *services: str) -> None:
    """Opens the breakers of services, which all have the same numbers."""
    for service in services:
        try_out(fleet, service, FAILED, FAILED)


def until_half_open(fleet: Fleet) -> None:
    """As long as a breaker is open the first time, at most."""
    fleet.pass_ms(OPEN_MS * 6 // 5)


# -- limits ------------------------------------------------------------------------------------------------------------


def test_requests_a_minute_are_never_more_than_the_limit(fleet: Fleet) -> None:
    fleet.fence(a_rule(services=[a_service(A, rpm=3)]))
    assert fleet.picks(5) == "aaa--"
    assert ask(fleet) == ["none", "limited", 65_000]
    fleet.pass_ms(64_999)
    assert ask(fleet) == ["none", "limited", 1]
    fleet.pass_ms(1)
    assert fleet.picks(5) == "aaa--"


def test_a_service_at_its_limit_is_no_candidate_and_its_streak_is_taken_up_by_the_next(fleet: Fleet) -> None:
    fleet.fence(a_rule(services=[a_service(A, rpm=3), B], requests=9))
    assert fleet.picks(14) == "aaabbbbbbbbbbb"


def test_tokens_in_flight_and_used_are_held_against_tokens_a_minute(fleet: Fleet) -> None:
    fleet.fence(a_rule(services=[a_service(A, tpm=100)]))
    assert ask(fleet, reserved=60)[0] == A
    assert ask(fleet, reserved=50) == ["none", "limited", 1000]
    settle(fleet, A, input=0)
    assert ask(fleet, reserved=40)[0] == A
    fleet.settle(an_entry(1, A, input=10, output=20))
    assert ask(fleet, reserved=40) == ["none", "limited", 65_000]
    assert ask(fleet, reserved=101) == ["none", "limited", -1]
    assert ask(fleet, reserved=30)[0] == A


def test_tokens_that_were_used_over_a_minute_ago_are_counted_in_none(fleet: Fleet) -> None:
    fleet.fence(a_rule(services=[a_service(A, tpm=100)]))
    fleet.ask(2, reserved=10)
    fleet.settle(an_entry(1, A, input=50, age_ms=60_000), an_entry(2, A, input=30, age_ms=59_999))
    assert ask(fleet, reserved=71)[1] == "limited"
    assert ask(fleet, reserved=70)[0] == A


def test_requests_in_flight_are_given_back_by_every_ending(fleet: Fleet) -> None:
    fleet.fence(a_rule(services=[a_service(A, in_flight=2)]))
    assert fleet.picks(3) == "aa-"
    fleet.settle(an_entry(1, A, FAILED))
    fleet.settle(an_abandoned(2))
    assert fleet.picks(3) == "aa-"
    fleet.pass_ms(LEASE_MS)
    fleet.reap()
    assert fleet.picks(3) == "aa-"


def test_what_a_lost_attempt_had_reserved_counts_in_the_minute(fleet: Fleet) -> None:
    fleet.fence(a_rule(services=[a_service(A, tpm=100)]))
    fleet.ask(reserved=60, deadline_ms=1000)
    fleet.pass_ms(1000)
    fleet.reap()
    assert ask(fleet, reserved=41) == ["none", "limited", 64_000]
    assert ask(fleet, reserved=40)[0] == A


def test_the_limits_of_a_provider_hold_for_all_its_services_in_all_rules(fleet: Fleet) -> None:
    provider = a_provider("p", rpm=4, in_flight=3)
    fleet.fence(a_rule(services=["p:one"], providers=[provider]))
    fleet.fence(a_rule(services=["p:two"], rule="other"))
    assert fleet.picks(2) + fleet.picks(2, rule="other") == "ppp-"
    fleet.settle(an_entry(1, "p:one"))
    assert fleet.picks(2, rule="other") == "p-"
    assert ask(fleet) == ["none", "limited", 65_000]


def test_the_latest_revision_says_what_the_limits_of_a_provider_are(fleet: Fleet) -> None:
    fleet.fence(a_rule(services=["p:m"], providers=[a_provider("p", rpm=2)], revision=5))
    fleet.fence(a_rule(services=["p:m"], providers=[a_provider("p")], rule="other", revision=4))
    assert fleet.picks(3, revision=5) == "pp-"
    fleet.fence(a_rule(services=["p:m"], providers=[a_provider("p", rpm=3)], rule="other", revision=5))
    assert fleet.picks(3, revision=5) == "p--"


def test_the_wait_is_the_least_of_the_services_that_have_an_end(fleet: Fleet) -> None:
    services = [a_service(A, rpm=1), a_service(B, tpm=5), a_service(C, in_flight=1)]
    fleet.fence(a_rule(services=services))
    assert fleet.picks(2, reserved=9) == "ac"
    assert ask(fleet, reserved=9) == ["none", "limited", 1000]
    fleet.fence(a_rule(services=services[:2], revision=2))
    assert ask(fleet, reserved=9, revision=2) == ["none", "limited", 65_000]


def test_below_zero_nothing_is_let_through(fleet: Fleet) -> None:
    fleet.fence(a_rule(services=[a_service(A, rpm=-1), a_service(B, in_flight=-1)]))
    assert ask(fleet) == ["none", "limited", 1000]


# -- cooldowns ---------------------------------------------------------------------------------------------------------


def test_a_service_that_asked_to_be_left_alone_is_no_candidate_for_so_long(fleet: Fleet) -> None:
    fleet.fence(a_rule(services=[A, B], requests=9))
    ask(fleet)
    settle(fleet, A, LIMITED, cooldown_ms=5000)
    assert ask(fleet) == [B, "next", 1, 1]
    fleet.pass_ms(4999)
    assert ask(fleet) == [B, "streak", 2, 0]
    try_out(fleet, B, LIMITED, cooldown_ms=9000)
    fleet.pass_ms(1)
    assert ask(fleet) == [A, "next", 1, 1]


def test_the_longest_cooldown_counts_from_when_it_was_asked_for(fleet: Fleet) -> None:
    fleet.fence(a_rule(services=[A], refuses=True))
    fleet.ask(3)
    fleet.settle(
        an_entry(1, A, LIMITED, cooldown_ms=9000, age_ms=4000),
        an_entry(2, A, LIMITED, cooldown_ms=3000),
        an_entry(3, A, LIMITED, cooldown_ms=0),
    )
    assert ask(fleet) == ["none", "cooling", 5000]


def test_when_all_are_kept_back_the_tactic_chooses_among_them_all_the_same(fleet: Fleet) -> None:
    fleet.fence(a_rule(services=[A, B], requests=1))
    ask(fleet)
    fleet.settle(an_entry(1, A, LIMITED, cooldown_ms=5000), an_entry(0, B, LIMITED, cooldown_ms=9000))
    assert [ask(fleet) for _ in range(2)] == [[B, "exhausted", 1, 0]] * 2
    fleet.pass_ms(5000)
    assert ask(fleet) == [A, "next", 1, 0]


def test_limits_hold_when_all_others_are_kept_back_too(fleet: Fleet) -> None:
    fleet.fence(a_rule(services=[a_service(A, rpm=1), B]))
    ask(fleet)
    fleet.settle(an_entry(0, B, LIMITED, cooldown_ms=5000))
    assert ask(fleet) == [B, "exhausted", 1, 0]
    fleet.fence(a_rule(services=[a_service(A, rpm=1)], revision=2))
    assert ask(fleet, revision=2)[:2] == ["none", "limited"]


# -- breakers and probes -----------------------------------------------------------------------------------------------


def test_an_open_breaker_keeps_a_service_back_and_then_lets_one_probe_through(fleet: Fleet) -> None:
    fleet.fence(a_rule(services=[A, B], requests=99, providers=BREAKERS))
    break_down(fleet, A)
    assert fleet.picks(3) == "bbb"
    until_half_open(fleet)
    assert ask(fleet) == [A, "probe", 3, 0]
    assert [ask(fleet) for _ in range(2)] == [[B, "streak", 4, 0], [B, "streak", 5, 0]]


def test_enough_probes_in_turn_close_a_breaker(fleet: Fleet) -> None:
    fleet.fence(a_rule(services=[A, B], requests=99, providers=BREAKERS, cursor=B))
    break_down(fleet, A)
    until_half_open(fleet)
    for _ in range(2):
        assert ask(fleet)[:2] == [A, "probe"]
        settle(fleet, A)
    assert ask(fleet) == [B, "streak", 1, 0]
    assert ask(fleet, only=A) == [A, "pinned", 1, 0]


def test_a_probe_that_fails_opens_the_breaker_for_longer(fleet: Fleet) -> None:
    fleet.fence(a_rule(services=[A, B], providers=BREAKERS, cursor=B))
    break_down(fleet, A)
    until_half_open(fleet)
    assert ask(fleet)[:2] == [A, "probe"]
    settle(fleet, A, FAILED)
    until_half_open(fleet)
    assert ask(fleet)[0] == B
    until_half_open(fleet)
    assert ask(fleet)[:2] == [A, "probe"]


@pytest.mark.parametrize("ending", ["cancelled", "abandoned", "lost"])
def test_a_probe_that_tells_nothing_lets_the_next_one_through(fleet: Fleet, ending: str) -> None:
    fleet.fence(a_rule(services=[A, B], providers=BREAKERS, cursor=B))
    break_down(fleet, A)
    until_half_open(fleet)
    assert ask(fleet, deadline_ms=1000)[:2] == [A, "probe"]
    assert ask(fleet)[0] == B
    if ending == "lost":
        fleet.pass_ms(1000)
        assert fleet.reap()[2] == 1
    else:
        fleet.settle(an_entry(3, A if ending == "cancelled" else "", Outcome(ending)))
    assert ask(fleet)[:2] == [A, "probe"]


def test_a_late_end_of_a_lost_probe_has_no_say(fleet: Fleet) -> None:
    fleet.fence(a_rule(services=[A, B], providers=BREAKERS, cursor=B))
    break_down(fleet, A)
    until_half_open(fleet)
    assert ask(fleet, deadline_ms=1000)[:2] == [A, "probe"]
    fleet.pass_ms(1000)
    fleet.reap()
    fleet.settle(an_entry(3, A), an_entry(0, A, FAILED))
    assert ask(fleet)[:2] == [A, "probe"]


def test_a_probe_is_within_limits_and_no_cooldown(fleet: Fleet) -> None:
    fleet.fence(a_rule(services=[a_service(A, rpm=3), B], providers=BREAKERS, cursor=B))
    break_down(fleet, A)
    fleet.settle(an_entry(0, A, LIMITED, cooldown_ms=OPEN_MS * 2))
    until_half_open(fleet)
    assert ask(fleet)[0] == B
    until_half_open(fleet)
    assert ask(fleet)[:2] == [A, "probe"]
    settle(fleet, A)
    assert ask(fleet)[0] == B, "its three requests a minute are made"


def test_refused_when_breakers_keep_all_back_until_the_first_is_half_open(fleet: Fleet) -> None:
    fleet.fence(a_rule(services=[A, B, C], providers=BREAKERS, refuses=True))
    break_down(fleet, A, B)
    fleet.settle(an_entry(0, C, LIMITED, cooldown_ms=500))
    word, why, wait = ask(fleet)
    assert (word, why) == ("none", "broken")
    assert OPEN_MS <= wait <= OPEN_MS * 6 // 5
    fleet.pass_ms(500)
    assert ask(fleet)[0] == C
    fleet.settle(an_entry(0, C, LIMITED, cooldown_ms=60_000))
    until_half_open(fleet)
    assert [ask(fleet)[1] for _ in range(2)] == ["probe", "probe"]
    assert ask(fleet) == ["none", "broken", 1000]


def test_a_breaker_that_lost_its_numbers_keeps_nothing_back(fleet: Fleet) -> None:
    fleet.fence(a_rule(services=[A, B], requests=9, providers=BREAKERS))
    break_down(fleet, A)
    fleet.fence(a_rule(services=[A, B], requests=9, providers=[a_provider("a")], revision=2))
    assert ask(fleet, revision=2)[0] == A


def test_health_checks_open_and_close_breakers(fleet: Fleet) -> None:
    fleet.fence(a_rule(services=[A, B], requests=99, providers=BREAKERS, cursor=A))

    def check(*, is_alive: bool) -> Any:
        return fleet.pool.health(fleet.now_ms, [A, "unknown:m"], is_alive)

    assert check(is_alive=False) == ["noted", 2, 1, 3, 0]
    assert ask(fleet)[0] == A
    check(is_alive=False)
    assert ask(fleet)[0] == B
    check(is_alive=True)
    until_half_open(fleet)
    check(is_alive=True)
    check(is_alive=True)
    assert ask(fleet) == [B, "streak", 2, 0]
    assert ask(fleet, only=A)[1] == "pinned"


# -- tiers -------------------------------------------------------------------------------------------------------------

TIERED = [a_service(A, tier=0), a_service(B, tier=1), a_service(C, tier=1)]


def test_a_tier_serves_while_one_of_it_can_and_the_next_one_is_held_for_a_minute(fleet: Fleet) -> None:
    fleet.fence(a_rule(services=TIERED, requests=1))
    assert fleet.picks(3) == "aaa"
    settle(fleet, A, LIMITED, cooldown_ms=1000)
    assert fleet.picks(4) == "bcbc"
    fleet.pass_ms(59_999)
    assert fleet.picks(2) == "bc", "it has come back, and has to wait"
    fleet.pass_ms(1)
    assert fleet.picks(3) == "aaa"


def test_a_tier_that_is_held_is_left_when_none_of_it_can_serve(fleet: Fleet) -> None:
    fleet.fence(a_rule(services=TIERED, requests=1))
    ask(fleet)
    settle(fleet, A, LIMITED, cooldown_ms=1000)
    assert fleet.picks(2) == "bc"
    fleet.settle(an_entry(0, B, LIMITED, cooldown_ms=9000), an_entry(0, C, LIMITED, cooldown_ms=9000))
    fleet.pass_ms(1000)
    assert fleet.picks(2) == "aa"


def test_a_retry_goes_down_a_tier_and_moves_none(fleet: Fleet) -> None:
    fleet.fence(a_rule(services=TIERED))
    assert ask(fleet) == [A, "streak", 1, 0]
    assert ask(fleet, excluded=[A]) == [B, "retry", 1, 0]
    assert ask(fleet) == [A, "streak", 2, 0]


def test_exhausted_tries_the_first_tier(fleet: Fleet) -> None:
    fleet.fence(a_rule(services=[a_service(B, tier=1), a_service(A, tier=0)]))
    fleet.settle(an_entry(0, A, LIMITED, cooldown_ms=1000), an_entry(0, B, LIMITED, cooldown_ms=1000))
    assert ask(fleet) == [A, "exhausted", 0, 0]


def test_a_tier_below_the_one_that_serves_gets_no_probe(fleet: Fleet) -> None:
    fleet.fence(a_rule(services=TIERED, requests=99, providers=BREAKERS))
    break_down(fleet, B)
    until_half_open(fleet)
    assert ask(fleet)[:2] == [A, "streak"]
    settle(fleet, A, LIMITED, cooldown_ms=1000)
    assert ask(fleet)[0] == C
    assert ask(fleet)[:2] == [B, "probe"]


@pytest.mark.parametrize(
    ("services", "picked"),
    [
        (TIERED, "b"),
        ([a_service(A, tier=0, rpm=9, cost=7), *TIERED[1:]], "b"),
        ([a_service(A, tier=0, weight=2), *TIERED[1:]], "a"),
        ([TIERED[1], TIERED[0], TIERED[2]], "a"),
    ],
    ids=["the same", "other limits", "another weight", "another order"],
)
def test_an_edit_keeps_the_tier_that_serves_unless_tiers_weights_or_order_change(
    fleet: Fleet, services: list[Any], picked: str
) -> None:
    fleet.fence(a_rule(services=TIERED, requests=9))
    ask(fleet)
    settle(fleet, A, LIMITED, cooldown_ms=1000)
    assert fleet.picks(1) == "b"
    fleet.pass_ms(1000)
    fleet.fence(a_rule(services=services, requests=9, revision=2))
    assert fleet.picks(1, revision=2) == picked


def test_an_edit_keeps_whose_turn_it_is_unless_the_weights_change(fleet: Fleet) -> None:
    services = [a_service(A, weight=5), a_service(B), a_service(C)]
    fleet.fence(a_rule("weighted_round_robin", services))
    assert fleet.picks(3) == "aab"
    fleet.fence(a_rule("weighted_round_robin", services, revision=2))
    assert fleet.picks(4, revision=2) == "acaa"
    fleet.fence(a_rule("weighted_round_robin", services, revision=3))
    assert fleet.picks(2, revision=3) == "aa"
    fleet.fence(a_rule("weighted_round_robin", [*services[:2], a_service(C, weight=2)], revision=4))
    assert fleet.picks(8, revision=4) == "acaabaca"


# -- sessions ----------------------------------------------------------------------------------------------------------


def test_a_session_stays_where_it_is_and_moves_neither_cursor_nor_streak(fleet: Fleet) -> None:
    fleet.fence(a_rule(services=[A, B], requests=1))
    assert ask(fleet, **SESSION) == [A, "streak", 1, 0]
    assert ask(fleet) == [B, "next", 1, 1]
    assert [ask(fleet, **SESSION) for _ in range(2)] == [[A, "pinned", 1, 1]] * 2
    assert ask(fleet) == [A, "next", 1, 1]
    assert ask(fleet, **SESSION) == [A, "pinned", 1, 0]


def test_a_pin_ends_when_its_session_is_quiet_for_so_long(fleet: Fleet) -> None:
    fleet.fence(a_rule(services=[A, B], requests=1))
    ask(fleet, **SESSION)
    ask(fleet)
    for _ in range(3):
        fleet.pass_ms(59_999)
        assert ask(fleet, **SESSION)[:2] == [A, "pinned"]
    fleet.pass_ms(60_000)
    ask(fleet)
    assert ask(fleet, **SESSION) == [B, "next", 1, 1]


@pytest.mark.parametrize("why", ["cooling", "limited"])
def test_a_session_whose_service_is_away_for_a_moment_returns_to_it(fleet: Fleet, why: str) -> None:
    fleet.fence(a_rule(services=[a_service(A, in_flight=1), B], requests=99))
    assert ask(fleet, **SESSION)[0] == A
    if why == "cooling":
        settle(fleet, A, LIMITED, cooldown_ms=5000)
    assert ask(fleet, **SESSION)[:2] == [B, "next"]
    fleet.pass_ms(5000)
    fleet.settle(an_entry(1, A))
    assert ask(fleet, **SESSION)[:2] == [A, "pinned"]


@pytest.mark.parametrize("why", ["broken", "inactive", "gone"])
def test_a_session_whose_service_is_away_for_long_is_pinned_anew(fleet: Fleet, why: str) -> None:
    fleet.fence(a_rule(services=[A, B], requests=99, providers=BREAKERS))
    assert ask(fleet, **SESSION)[0] == A
    if why == "broken":
        break_down(fleet, A)
    else:
        others = [a_service(B)] if why == "gone" else [a_service(A, active=False), a_service(B)]
        fleet.fence(a_rule(services=others, requests=99, revision=2))
    revision = 1 if why == "broken" else 2
    assert ask(fleet, revision=revision, **SESSION)[0] == B
    fleet.fence(a_rule(services=[A, B], requests=99, providers=[a_provider("a")], revision=3))
    assert ask(fleet, revision=3, **SESSION)[:2] == [B, "pinned"]


def test_neither_a_probe_nor_a_retry_nor_an_exhausted_pick_pins_a_session(fleet: Fleet) -> None:
    fleet.fence(a_rule(services=[A, B], requests=99, providers=BREAKERS, cursor=B))
    break_down(fleet, A)
    until_half_open(fleet)
    assert ask(fleet, **SESSION)[:2] == [A, "probe"]
    assert ask(fleet, excluded=[A], **SESSION)[:2] == [B, "retry"]
    fleet.settle(an_entry(0, B, LIMITED, cooldown_ms=1000))
    assert ask(fleet, **SESSION)[1] == "exhausted"
    fleet.pass_ms(1000)
    assert ask(fleet, **SESSION)[:2] == [B, "streak"]
    assert ask(fleet, **SESSION)[:2] == [B, "pinned"]


def test_sessions_of_one_call_see_each_others_pins(fleet: Fleet) -> None:
    fleet.fence(a_rule(services=[A, B], requests=1))
    other = SESSION | {"session": "t"}
    selections = [a_selection(i, **options) for i, options in enumerate([SESSION, other, SESSION, other], start=1)]
    answers = fleet.select(*selections)[:-1]
    assert [(answer[1], answer[2]) for answer in answers] == [
        (A, "streak"),
        (B, "next"),
        (A, "pinned"),
        (B, "pinned"),
    ]


# -- only --------------------------------------------------------------------------------------------------------------


def test_only_that_service_is_picked_and_nothing_moves(fleet: Fleet) -> None:
    fleet.fence(a_rule(services=[A, B], requests=9))
    ask(fleet)
    assert ask(fleet, only=B, **SESSION) == [B, "pinned", 1, 0]
    assert ask(fleet) == [A, "streak", 2, 0]
    assert ask(fleet, **SESSION) == [A, "streak", 3, 0], "it pinned no session"


@pytest.mark.parametrize(
    ("only", "refuses", "answer"),
    [
        ("x:m", False, ["none", "inactive", 0]),
        (C, False, ["none", "inactive", 0]),
        (B, False, [B, "exhausted", 0, 0]),
        (B, True, ["none", "cooling", 1000]),
        ("d:m", False, ["none", "limited", 1000]),
    ],
    ids=["unknown", "inactive", "cooling", "cooling, refuses", "limited"],
)
def test_only_that_service_or_none(fleet: Fleet, only: str, refuses: bool, answer: list[Any]) -> None:
    services = [a_service(A), a_service(B), a_service(C, active=False), a_service("d:m", rpm=-1)]
    fleet.fence(a_rule(services=services, refuses=refuses))
    fleet.settle(an_entry(0, B, LIMITED, cooldown_ms=1000))
    assert ask(fleet, only=only) == answer


def test_another_attempt_at_the_only_service_there_is_none(fleet: Fleet) -> None:
    fleet.fence(a_rule(services=[A, B]))
    assert ask(fleet, only=A, excluded=[B]) == ["none", "tried", 0]


# -- the retry budget --------------------------------------------------------------------------------------------------


def test_a_rule_retries_a_share_of_its_requests_once_its_savings_are_spent(fleet: Fleet) -> None:
    fleet.fence(a_rule(services=[A, B], retry_permille=250))
    assert fleet.picks(101, excluded=[A]) == "b" * 100 + "-"
    assert ask(fleet, excluded=[A]) == ["none", "budget", 0]
    fleet.ask(3)
    assert ask(fleet, excluded=[A]) == ["none", "budget", 0]
    fleet.ask(1)
    assert fleet.picks(2, excluded=[A]) == "b-"


def test_savings_end_at_a_hundred_retries(fleet: Fleet) -> None:
    fleet.fence(a_rule(services=[A, B], retry_permille=1000))
    fleet.ask(50)
    assert fleet.picks(101, excluded=[A]) == "b" * 100 + "-"


def test_a_rule_that_may_not_retry_never_does(fleet: Fleet) -> None:
    fleet.fence(a_rule(services=[A, B], retry_permille=0))
    fleet.ask(50)
    assert ask(fleet, excluded=[A]) == ["none", "budget", 0]
    fleet.fence(a_rule(services=[A, B], retry_permille=500, revision=2))
    assert ask(fleet, excluded=[A], revision=2) == ["none", "budget", 0]
    fleet.ask(2, revision=2)
    assert ask(fleet, excluded=[A], revision=2)[:2] == [B, "retry"]


def test_a_retry_that_finds_nobody_costs_nothing(fleet: Fleet) -> None:
    fleet.fence(a_rule(services=[A, B], retry_permille=1))
    assert [ask(fleet, excluded=[A, B]) for _ in range(150)][-1] == ["none", "tried", 0]
    assert ask(fleet, excluded=[A])[1] == "retry"


@pytest.mark.parametrize("refuses", [False, True])
def test_a_retry_tries_nobody_that_is_kept_back(fleet: Fleet, refuses: bool) -> None:
    fleet.fence(a_rule(services=[A, B], refuses=refuses))
    fleet.settle(an_entry(0, B, LIMITED, cooldown_ms=1000))
    assert ask(fleet, excluded=[A]) == ["none", "tried", 0]
    fleet.fence(a_rule(services=[A, a_service(B, rpm=-1)], revision=2))
    assert ask(fleet, excluded=[A], revision=2) == ["none", "limited", 1000]


# -- latency -----------------------------------------------------------------------------------------------------------


def latency(fleet: Fleet) -> tuple[int, int]:
    """What is known of how long A takes: to the first token, and for each."""
    state: Any = fleet.pool.service(A) if isinstance(fleet.pool, Pool) else fleet.service(A)
    return state.first_token, state.per_token


def test_a_longer_time_counts_at_once_and_a_shorter_one_little_by_little(fleet: Fleet) -> None:
    def take(first_token_us: int, stream_us: int, *, output: int = 10, outcome: Outcome = SUCCESS) -> tuple[int, int]:
        times = {"first_token_us": first_token_us, "stream_us": stream_us}
        fleet.settle(an_entry(0, A, outcome, output=output, **times))
        return latency(fleet)

    assert take(1000, 50) == (1000, 5)
    fleet.pass_ms(10_000)
    assert take(500, 999) == (750, 99)
    assert take(100, 0) == (750, 99), "no time has passed since the last"
    fleet.pass_ms(30_000)
    assert take(0, 590) == (750, 69)
    assert take(9000, 0, outcome=FAILED) == (750, 69)
    assert take(800, 700, output=0) == (800, 69)
    fleet.pass_ms(DEADLINE_MS)
    fleet.settle(an_entry(0, A, first_token_us=1, age_ms=1))
    assert latency(fleet) == (800, 69)
