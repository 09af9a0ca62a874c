"""The breaker, one transition at a time."""

from __future__ import annotations

from typing import Any

import pytest

from balancer.breaker import Breaker
from balancer.domain import Entry, Outcome, ProviderDefinition

NOW = 1_800_000_000_000
OPEN_MS = 10_000
SUCCESS, FAILED, CANCELLED = Outcome.SUCCESS, Outcome.FAILED, Outcome.CANCELLED


def settings(**more: int) -> ProviderDefinition:
    """Three in a row, or half of four within a minute; for ten seconds; two probes close it."""
    options = {"failures": 3, "ratio_permille": 500, "min_requests": 4, "open_ms": OPEN_MS, "successes": 2} | more
    return ProviderDefinition(id="a", **options)


NONE = settings(failures=0, ratio_permille=0)


def settled(
    breaker: Breaker,
    *outcomes: Outcome,
    now: int = NOW,
    position: int = 1000,
    probe: int = 0,
    age_ms: int = 0,
    by: ProviderDefinition | None = None,
) -> Breaker:
    """The breaker after these outcomes."""
    for outcome in outcomes:
        entry = Entry(number=1, service="a:m", outcome=outcome, age_ms=age_ms)
        breaker.settle(by or settings(), entry, now, position, probe)
    return breaker


def an_open(**more: Any) -> Breaker:
    return Breaker(**({"state": 1, "opens": 1, "until": NOW} | more))


# -- closed ------------------------------------------------------------------------------------------------------------


def test_so_many_failures_in_a_row_open_it() -> None:
    assert settled(Breaker(), FAILED, FAILED).state == 0
    assert settled(Breaker(), FAILED, FAILED, FAILED) == an_open(until=NOW + OPEN_MS)


def test_a_success_ends_a_row() -> None:
    by = settings(ratio_permille=0)
    assert settled(Breaker(), FAILED, FAILED, SUCCESS, FAILED, FAILED, by=by).state == 0


@pytest.mark.parametrize("outcome", [Outcome.UNAUTHORIZED, Outcome.OVERLOADED, Outcome.FAILED])
def test_these_outcomes_speak_against_a_service(outcome: Outcome) -> None:
    assert settled(Breaker(), outcome, outcome, outcome).state == 1


@pytest.mark.parametrize("outcome", [Outcome.RATE_LIMITED, Outcome.REJECTED, Outcome.CANCELLED, Outcome.LOST])
def test_these_outcomes_say_nothing_of_a_service(outcome: Outcome) -> None:
    assert settled(Breaker(), *[outcome] * 9) == Breaker()


def test_a_share_of_failures_opens_it_once_there_are_enough_requests() -> None:
    by = settings(failures=0)
    assert settled(Breaker(), FAILED, FAILED, SUCCESS, by=by).state == 0
    assert settled(Breaker(), SUCCESS, FAILED, SUCCESS, FAILED, by=by).state == 1
    assert settled(Breaker(), SUCCESS, SUCCESS, SUCCESS, FAILED, by=by).state == 0


def test_a_share_counts_within_its_window_and_a_row_for_ever() -> None:
    breaker = settled(Breaker(), FAILED, SUCCESS, FAILED, now=NOW)
    settled(breaker, FAILED, now=NOW + 60_000)
    assert (breaker.state, breaker.start, breaker.requests, breaker.failed) == (0, NOW + 60_000, 1, 1)
    assert settled(breaker, FAILED, now=NOW + 60_000).state == 1


def test_a_window_in_the_future_begins_now() -> None:
    breaker = settled(Breaker(), SUCCESS, now=NOW + 1)
    assert settled(breaker, SUCCESS, now=NOW) == Breaker(start=NOW, requests=1)


def test_what_ended_some_time_ago_tells_nothing_new() -> None:
    assert settled(Breaker(), FAILED, FAILED, FAILED, age_ms=1) == Breaker()


# -- open --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("opens", "times"), [(0, 1), (1, 2), (2, 4), (3, 8), (4, 8), (900, 8)])
def test_it_opens_twice_as_long_each_time_up_to_eight_times(opens: int, times: int) -> None:
    breaker = Breaker(opens=opens, consecutive=2)
    assert settled(breaker, FAILED) == an_open(opens=opens + 1, until=NOW + times * OPEN_MS)


@pytest.mark.parametrize(("position", "more"), [(1000, 0), (1, 1838), (7, 866), (999, 162)])
def test_its_position_lengthens_it_by_a_fifth_at_most(position: int, more: int) -> None:
    breaker = settled(Breaker(consecutive=2), FAILED, position=position)
    assert breaker.until == NOW + OPEN_MS + more


def test_while_it_is_open_the_end_of_an_earlier_attempt_changes_nothing() -> None:
    for probe in (0, 7):
        assert settled(an_open(probe=8), SUCCESS, FAILED, CANCELLED, probe=probe) == an_open(probe=8)


def test_it_wants_one_probe_once_its_time_has_come() -> None:
    assert an_open().wants_probe(NOW)
    assert not an_open(until=NOW + 1).wants_probe(NOW)
    assert not an_open(probe=7).wants_probe(NOW)
    assert not Breaker().wants_probe(NOW)


# -- half open ---------------------------------------------------------------------------------------------------------


def test_enough_probes_that_go_well_close_it_and_nothing_is_remembered() -> None:
    breaker = settled(an_open(probe=7, opens=4), SUCCESS, probe=7)
    assert breaker == an_open(opens=4, successes=1)
    breaker.probe = 9
    assert settled(breaker, SUCCESS, probe=9) == Breaker()


def test_a_probe_that_fails_opens_it_again_for_longer() -> None:
    breaker = settled(an_open(probe=7, successes=1), FAILED, probe=7)
    assert breaker == an_open(opens=2, until=NOW + 2 * OPEN_MS)


@pytest.mark.parametrize(("outcome", "age_ms"), [(CANCELLED, 0), (Outcome.RATE_LIMITED, 0), (SUCCESS, 1), (FAILED, 1)])
def test_a_probe_that_says_nothing_gives_its_place_back(outcome: Outcome, age_ms: int) -> None:
    assert settled(an_open(probe=7, successes=1), outcome, probe=7, age_ms=age_ms) == an_open(successes=1)


def test_only_the_current_probe_gives_its_place_back() -> None:
    breaker = an_open(probe=7)
    breaker.forget_probe(6)
    breaker.forget_probe(0)
    assert breaker == an_open(probe=7)
    breaker.forget_probe(7)
    assert breaker == an_open()


# -- health checks -----------------------------------------------------------------------------------------------------


def checked(breaker: Breaker, *alive: bool, by: ProviderDefinition | None = None) -> Breaker:
    """The breaker after health checks that found this."""
    for is_alive in alive:
        breaker.check(by or settings(), NOW, 1000, is_alive=is_alive)
    return breaker


def test_so_many_dead_answers_open_it_too_and_a_good_one_does_not_end_the_row() -> None:
    assert checked(Breaker(), False, True, False) == Breaker(consecutive=2)
    assert checked(Breaker(), False, False, False) == an_open(until=NOW + OPEN_MS)


def test_a_health_check_is_as_good_as_a_probe() -> None:
    assert checked(an_open(opens=3), True) == an_open(opens=3, successes=1)
    assert checked(an_open(opens=3), True, True) == Breaker()
    assert checked(an_open(), False) == an_open(opens=2, until=NOW + 2 * OPEN_MS)


def test_a_health_check_leaves_an_open_breaker_and_one_with_a_probe_out_alone() -> None:
    for breaker in (an_open(until=NOW + 1), an_open(probe=7)):
        before = str(breaker)
        assert str(checked(breaker, True, False)) == before


# -- none at all -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", [None, NONE])
def test_without_numbers_nothing_opens_it_and_what_was_open_is_forgotten(by: ProviderDefinition | None) -> None:
    def told(outcome: Outcome, *, probe: int = 0) -> Breaker:
        breaker = an_open(probe=7)
        breaker.settle(by, Entry(number=1, service="a:m", outcome=outcome), NOW, 1000, probe)
        return breaker

    assert not an_open().is_open(by)
    assert told(SUCCESS) == told(FAILED) == Breaker()
    assert told(CANCELLED) == an_open(probe=7)
    assert told(CANCELLED, probe=7) == an_open()
    breaker = an_open()
    breaker.check(by, NOW, 1000, is_alive=False)
    assert breaker == an_open()


def test_a_breaker_that_never_saw_anything_is_no_text() -> None:
    assert str(Breaker()) == ""
    assert str(an_open(probe=7)) == f"1 0 0 0 0 1 0 {NOW} 7"
