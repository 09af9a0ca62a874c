"""What happens, and what is said, when nothing can serve: tried all the same or refused, why, and for how long."""

from __future__ import annotations

from typing import Any

import pytest

from balancer.domain import Outcome
from tests.lua.builders import ABC, A, B, C, Fleet, a_provider, a_rule, a_selection, a_service, an_entry
from tests.lua.stories import FAILED, RATE_LIMITED, ask, breaker, chosen, end, live, pinned, standing

BREAKERS = [a_provider(uuid, failures=1, open_ms=10_000, successes=1) for uuid in "abc"]
OPEN, COOL, LIMIT, OFF, FINE = "open", "cool", "limit", "off", "fine"


def a_rule_with(*states: str, refuses: bool, revision: int = 1, **more: Any) -> Any:
    """A, B and so on, which `bring_about` brings into these states."""
    services = [
        a_service(service, active=state != OFF, in_flight=-1 if state == LIMIT else 0)
        for service, state in zip(ABC, states, strict=False)
    ]
    return a_rule(services=services, refuses=refuses, providers=BREAKERS, revision=revision, **more)


def bring_about(fleet: Fleet, *states: str) -> None:
    """Breakers open for 10 to 12 s, cooldowns of 7, 8 and 9 s."""
    for place, (service, state) in enumerate(zip(ABC, states, strict=False)):
        if state == OPEN:
            fleet.settle(an_entry(0, service, FAILED))
        elif state == COOL:
            fleet.settle(an_entry(0, service, RATE_LIMITED, cooldown_ms=7_000 + 1_000 * place))


@pytest.mark.parametrize(
    ("states", "picked"),
    [
        ((OPEN, OPEN, OPEN), A),
        ((COOL, COOL, COOL), A),
        ((LIMIT, COOL, OPEN), B),
        ((LIMIT, OPEN, COOL), B),
        ((OFF, LIMIT, OPEN), C),
        ((OFF, OFF, COOL), C),
    ],
)
def test_a_rule_that_tries_gets_the_tactics_choice_among_those_within_limits(
    fleet: Fleet, states: tuple[str, ...], picked: str
) -> None:
    fleet.fence(a_rule_with(*states, refuses=False))
    bring_about(fleet, *states)
    assert [ask(fleet) for _ in range(3)] == [(picked, "exhausted", 0, 0)] * 3
    assert standing(fleet) == ("", 0)


@pytest.mark.parametrize(
    ("states", "answer"),
    [
        ((COOL, COOL, COOL), ("none", "cooling", 7_000)),
        ((LIMIT, COOL, COOL), ("none", "cooling", 8_000)),
        ((OFF, LIMIT, COOL), ("none", "cooling", 9_000)),
        ((LIMIT, LIMIT, LIMIT), ("none", "limited", 1_000)),
        ((LIMIT, OFF, LIMIT), ("none", "limited", 1_000)),
        ((OFF, OFF, OFF), ("none", "inactive", 0)),
    ],
)
@pytest.mark.parametrize("seconds", [0, 1])
def test_a_rule_that_refuses_says_why_and_how_long(
    fleet: Fleet, states: tuple[str, ...], answer: tuple[Any, ...], seconds: int
) -> None:
    fleet.fence(a_rule_with(*states, refuses=True))
    bring_about(fleet, *states)
    fleet.pass_ms(seconds * 1_000)
    word, cause, wait_ms = answer
    assert ask(fleet) == (word, cause, wait_ms - seconds * 1_000 if cause == "cooling" else wait_ms)


@pytest.mark.parametrize("states", [(OPEN, OPEN, OPEN), (OPEN, COOL, COOL), (COOL, LIMIT, OPEN), (OFF, COOL, OPEN)])
def test_a_breaker_among_them_is_told_before_cooldowns(fleet: Fleet, states: tuple[str, ...]) -> None:
    fleet.fence(a_rule_with(*states, refuses=True))
    bring_about(fleet, *states)
    untils = [breaker(fleet, s).until_ms for s, state in zip(ABC, states, strict=True) if state == OPEN]
    assert ask(fleet) == ("none", "broken", min(untils) - fleet.now_ms)


def test_the_wait_for_a_breaker_is_until_it_lets_a_probe_through(fleet: Fleet) -> None:
    fleet.fence(a_rule_with(OPEN, OPEN, refuses=True))
    bring_about(fleet, OPEN, OPEN)
    word, cause, wait_ms = ask(fleet)
    assert (word, cause) == ("none", "broken")
    fleet.pass_ms(wait_ms - 1)
    assert ask(fleet) == ("none", "broken", 1)
    fleet.pass_ms(1)
    assert ask(fleet)[1] == "probe"


def test_while_the_probe_is_out_the_next_is_told_to_come_back_in_a_second(fleet: Fleet) -> None:
    fleet.fence(a_rule_with(OPEN, refuses=True))
    bring_about(fleet, OPEN)
    fleet.pass_ms(12_000)
    assert chosen(fleet) == (A, "probe")
    assert [ask(fleet) for _ in range(3)] == [("none", "broken", 1_000)] * 3
    end(fleet, A, FAILED)
    fleet.numbers["w1"] -= 3
    end(fleet, A)
    assert ask(fleet)[0] == A


def test_a_wait_for_cooldowns_is_a_true_one(fleet: Fleet) -> None:
    fleet.fence(a_rule_with(COOL, COOL, refuses=True))
    bring_about(fleet, COOL, COOL)
    *_, wait_ms = ask(fleet)
    fleet.pass_ms(wait_ms - 1)
    assert ask(fleet) == ("none", "cooling", 1)
    fleet.pass_ms(1)
    assert ask(fleet)[0] == A


@pytest.mark.parametrize("refuses", [False, True])
def test_limits_are_never_exceeded_for_want_of_others(fleet: Fleet, refuses: bool) -> None:
    services = [a_service(A, rpm=2), a_service(B, in_flight=1)]
    fleet.fence(a_rule(services=services, requests=1, refuses=refuses))
    assert fleet.picks(3) == "aba"
    assert ask(fleet) == ("none", "limited", 1_000)
    fleet.settle(an_entry(2, B, RATE_LIMITED, cooldown_ms=500))
    expected = ("none", "cooling", 500) if refuses else (B, "exhausted", 1, 0)
    assert ask(fleet) == expected


@pytest.mark.parametrize("refuses", [False, True])
def test_one_that_is_both_at_its_limit_and_broken_is_limited(fleet: Fleet, refuses: bool) -> None:
    fleet.fence(a_rule(services=[a_service(A, in_flight=1)], refuses=refuses, providers=BREAKERS))
    assert fleet.picks(1) == "a"
    fleet.settle(an_entry(0, A, FAILED))
    assert ask(fleet) == ("none", "limited", 1_000)


def test_both_broken_and_cooling_is_broken(fleet: Fleet) -> None:
    fleet.fence(a_rule(services=[A], refuses=True, providers=BREAKERS))
    fleet.settle(an_entry(0, A, FAILED, cooldown_ms=60_000))
    word, cause, wait_ms = ask(fleet)
    assert (word, cause) == ("none", "broken")
    assert 10_000 <= wait_ms < 12_000


@pytest.mark.parametrize(
    "tactic", ["random", "token_based", "hybrid", "least_in_flight", "weighted_round_robin", "latency", "cost"]
)
def test_exhausted_picks_leave_cursor_and_streak_whatever_the_tactic(fleet: Fleet, tactic: str) -> None:
    fleet.fence(a_rule(tactic, [a_service(s, weight=w) for s, w in ((A, 1), (B, 2), (C, 3))]))
    fleet.ask()
    stood = standing(fleet)
    fleet.settle(*(an_entry(0, service, RATE_LIMITED, cooldown_ms=10) for service in ABC))
    answers = fleet.ask(7)
    assert {(answer[2], answer[6], answer[7]) for answer in answers} == {("exhausted", stood[1], 0)}
    assert standing(fleet) == stood


def test_an_exhausted_pick_does_not_take_a_weighted_turn(fleet: Fleet) -> None:
    fleet.fence(a_rule("weighted_round_robin", [a_service(A, weight=2), B]))
    assert fleet.picks(1) == "a"
    fleet.settle(*(an_entry(0, service, RATE_LIMITED, cooldown_ms=10) for service in (A, B)))
    assert [chosen(fleet) for _ in range(4)] == [(B, "exhausted")] * 4
    fleet.pass_ms(10)
    assert fleet.picks(5) == "baaba"


def test_exhausted_picks_take_turns_by_what_they_use_where_the_tactic_does(fleet: Fleet) -> None:
    fleet.fence(a_rule("least_in_flight"))
    fleet.settle(*(an_entry(0, service, RATE_LIMITED, cooldown_ms=10) for service in ABC))
    picked = [answer[1] for answer in fleet.ask(6)]
    assert sorted(picked) == sorted([*ABC, *ABC])


def test_exhausted_sessions_are_not_pinned_and_a_pin_that_waits_is_kept(fleet: Fleet) -> None:
    session: dict[str, Any] = {"session": "s", "affinity_ms": 3_600_000}
    fleet.fence(a_rule(services=[A, B], requests=1, providers=BREAKERS))
    assert chosen(fleet, **session)[0] == A
    fleet.settle(an_entry(0, A, RATE_LIMITED, cooldown_ms=99), an_entry(0, B, RATE_LIMITED, cooldown_ms=99))
    assert [chosen(fleet, **session)[1] for _ in range(2)] == ["exhausted"] * 2
    assert pinned(fleet) == A
    live(fleet, "f")
    assert chosen(fleet, **session)[1] == "exhausted"
    assert pinned(fleet) == "", "for a breaker it is dropped at once"


@pytest.mark.parametrize("refuses", [False, True])
def test_retries_are_never_exhausted(fleet: Fleet, refuses: bool) -> None:
    fleet.fence(a_rule(services=[A, B], refuses=refuses, providers=BREAKERS))
    fleet.settle(an_entry(0, B, RATE_LIMITED, cooldown_ms=99))
    assert ask(fleet, excluded=[A]) == ("none", "tried", 0)
    fleet.settle(an_entry(0, B, FAILED))
    fleet.pass_ms(99)
    assert ask(fleet, excluded=[A]) == ("none", "tried", 0)


@pytest.mark.parametrize(
    ("state", "answer"),
    [(OPEN, "broken"), (COOL, "cooling"), (LIMIT, "limited"), (OFF, "inactive")],
)
def test_one_service_only_is_refused_for_its_own_reason_though_others_could(
    fleet: Fleet, state: str, answer: str
) -> None:
    fleet.fence(a_rule_with(state, FINE, FINE, refuses=True))
    bring_about(fleet, state)
    word, cause, wait_ms = ask(fleet, only=A)
    assert (word, cause, wait_ms > 0) == ("none", answer, state != OFF)
    assert fleet.picks(1) == "b"


def test_a_rule_without_services_is_inactive(fleet: Fleet) -> None:
    fleet.fence(a_rule(services=[]))
    assert [ask(fleet, **more) for more in ({}, {"only": A}, {"excluded": [A]})] == [("none", "inactive", 0)] * 3


def test_what_is_refused_takes_no_seq_no_place_and_holds_nothing(fleet: Fleet) -> None:
    fleet.fence(a_rule_with(COOL, COOL, refuses=True))
    bring_about(fleet, COOL, COOL)
    before = fleet.select(a_selection(90, revision=9))[-1]
    assert {answer[1] for answer in fleet.ask(30, reserved=5)} == {"cooling"}
    assert fleet.select(a_selection(91, revision=9))[-1] == before
    fleet.pass_ms(7_000)
    (answer,) = fleet.ask()
    assert answer[3] == 1


@pytest.mark.parametrize("outcome", [Outcome.SUCCESS, Outcome.FAILED])
def test_an_exhausted_pick_ends_like_any_other(fleet: Fleet, outcome: Outcome) -> None:
    fleet.fence(a_rule(services=[a_service(A, in_flight=1)]))
    fleet.settle(an_entry(0, A, RATE_LIMITED, cooldown_ms=10))
    assert [chosen(fleet)[1] for _ in range(2)] == ["exhausted", "limited"]
    fleet.settle(an_entry(1, A, outcome))
    assert chosen(fleet) == (A, "exhausted")
