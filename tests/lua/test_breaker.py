"""When a breaker opens, for how long, and how one request at a time finds out whether it may close."""

from __future__ import annotations

from typing import Any

import pytest

from balancer.domain import Outcome
from balancer.store.views import BreakerView
from tests.lua.builders import LEASE_MS, NOW_MS, A, B, C, Fleet, a_provider, a_rule, a_service, an_entry
from tests.lua.stories import (
    CANCELLED,
    FAILED,
    RATE_LIMITED,
    REJECTED,
    SUCCESS,
    abandon,
    ask,
    breaker,
    broken,
    chosen,
    end,
    live,
    pinned,
    place,
    standing,
)

OPEN_MS = 10_000
LONGEST_MS = OPEN_MS * 6 // 5
"""The first time, with the most jitter."""
CLOSED = BreakerView()


def providers(**numbers: int) -> list[Any]:
    """Breakers of all three providers: three failures in a row open one, unless told otherwise."""
    return [a_provider(uuid, **({"failures": 3, "open_ms": OPEN_MS} | numbers)) for uuid in "abc"]


def is_open(fleet: Fleet, service: str = A) -> bool:
    return breaker(fleet, service).state == 1


def half_open(fleet: Fleet, *services: str, times: int = 1) -> None:
    """Breaks the services down, one failing probe after another, and waits until they are half-open."""
    for service in services or (A,):
        live(fleet, "fff", service)
        assert is_open(fleet, service)
    fleet.pass_ms(LONGEST_MS)
    for _ in range(times - 1):
        for service in services or (A,):
            assert chosen(fleet) == (service, "probe")
            end(fleet, service, FAILED)
        fleet.pass_ms(8 * LONGEST_MS)


# -- opening -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("history", "opens"),
    [
        ("ff", False),
        ("fff", True),
        ("ffs", False),
        ("ffsff", False),
        ("ffsfff", True),
        ("fou", True),
        ("uuu", True),
        ("ooo", True),
        ("rrrrr", False),
        ("ccccc", False),
        ("lllll", False),
        ("frfcf", True),
        ("flfrflc", True),
    ],
)
def test_three_failures_in_a_row_open_a_breaker_whatever_else_lies_between(
    fleet: Fleet, history: str, opens: bool
) -> None:
    fleet.fence(a_rule(services=[A], providers=providers()))
    live(fleet, history)
    assert is_open(fleet) == opens
    assert chosen(fleet) == (A, "exhausted" if opens else "streak")


def test_lost_and_abandoned_attempts_are_no_failures_and_no_successes(fleet: Fleet) -> None:
    fleet.fence(a_rule(services=[A], providers=providers()))
    live(fleet, "ff")
    fleet.ask(20)
    abandon(fleet)
    fleet.pass_ms(LEASE_MS)
    assert fleet.reap()[2] == 19
    assert breaker(fleet).consecutive == 2
    live(fleet, "f")
    assert is_open(fleet)


def test_failures_in_a_row_count_over_any_time(fleet: Fleet) -> None:
    fleet.fence(a_rule(services=[A], providers=providers(window_ms=1000)))
    for _ in range(3):
        assert not is_open(fleet)
        fleet.pass_ms(3_600_000)
        live(fleet, "f")
    assert is_open(fleet)


@pytest.mark.parametrize(
    ("history", "opens"),
    [
        ("fff", False),
        ("ssff", True),
        ("ssfs", False),
        ("sssff", False),
        ("sssfff", True),
        ("fffsf", True),
        ("sfsfs", True),
        ("frcf", False),
        ("frcfss", False),
        ("frcfssff", True),
    ],
)
def test_half_of_at_least_four_that_failed_open_a_breaker_in_any_order(fleet: Fleet, history: str, opens: bool) -> None:
    """A success that fills up the minimum opens nothing; the next failure does."""
    fleet.fence(a_rule(services=[A], providers=providers(failures=0, ratio_permille=500, min_requests=4)))
    live(fleet, history)
    assert is_open(fleet) == opens


def test_the_share_is_compared_exactly(fleet: Fleet) -> None:
    fleet.fence(a_rule(services=[A], providers=providers(failures=0, ratio_permille=334, min_requests=3)))
    live(fleet, "ssf")
    assert not is_open(fleet), "333 of a thousand"
    live(fleet, "f")
    assert is_open(fleet)


@pytest.mark.parametrize(("passed_ms", "opens"), [(59_999, True), (60_000, False), (-1, False), (0, True)])
def test_a_share_is_of_one_window(fleet: Fleet, passed_ms: int, opens: bool) -> None:
    """Also when the server's clock has been set back to before it."""
    fleet.fence(a_rule(services=[A], providers=providers(failures=0, ratio_permille=500, min_requests=4)))
    live(fleet, "fff")
    fleet.pass_ms(passed_ms)
    live(fleet, "f")
    assert is_open(fleet) == opens


def test_a_window_of_a_breaker_starts_with_the_first_that_counts(fleet: Fleet) -> None:
    fleet.fence(a_rule(services=[A], providers=providers(failures=9, window_ms=60_000)))
    live(fleet, "r")
    fleet.pass_ms(7)
    live(fleet, "s")
    fleet.pass_ms(59_999)
    live(fleet, "f")
    assert breaker(fleet) == BreakerView(start_ms=NOW_MS + 7, requests=2, failed=1, consecutive=1)
    fleet.pass_ms(1)
    live(fleet, "f")
    assert breaker(fleet) == BreakerView(start_ms=NOW_MS + 60_007, requests=1, failed=1, consecutive=2)


@pytest.mark.parametrize("age_ms", [1, 60_000])
def test_entries_that_waited_neither_open_nor_calm_a_breaker(fleet: Fleet, age_ms: int) -> None:
    fleet.fence(a_rule(services=[A], providers=providers()))
    live(fleet, "ff")
    for outcome in (FAILED, SUCCESS, FAILED):
        fleet.ask(only=A)
        end(fleet, A, outcome, age_ms=age_ms)
    assert breaker(fleet).consecutive == 2
    live(fleet, "f")
    assert is_open(fleet)


def test_usage_of_attempts_that_hold_nothing_counts_for_the_breaker_too(fleet: Fleet) -> None:
    fleet.fence(a_rule(services=[A], providers=providers()))
    fleet.settle(*(an_entry(0, A, FAILED) for _ in range(3)))
    assert is_open(fleet)


@pytest.mark.parametrize("numbers", [{"failures": 0}, {"failures": 0, "min_requests": 1}])
def test_a_breaker_that_is_switched_off_never_opens(fleet: Fleet, numbers: dict[str, int]) -> None:
    fleet.fence(a_rule(services=[A], providers=providers(**numbers)))
    live(fleet, "f" * 100)
    assert breaker(fleet) == CLOSED
    assert ask(fleet)[1] in ("streak", "next")


def test_without_a_definition_of_its_provider_a_service_has_no_breaker(fleet: Fleet) -> None:
    fleet.fence(a_rule(services=[A]))
    live(fleet, "f" * 100)
    assert breaker(fleet) == CLOSED


def test_each_service_of_a_provider_has_a_breaker_of_its_own_and_all_rules_see_it(fleet: Fleet) -> None:
    one, two = "a:one", "a:two"
    fleet.fence(a_rule(services=[one, two], requests=1, providers=providers()))
    fleet.fence(a_rule(services=[one, two], rule="other", requests=1))
    live(fleet, "fff", one)
    assert (is_open(fleet, one), is_open(fleet, two)) == (True, False)
    for rule in ("chat", "other"):
        assert {answer[1] for answer in fleet.ask(4, rule=rule)} == {two}


def test_attempts_that_were_out_when_a_breaker_opened_change_nothing(fleet: Fleet) -> None:
    fleet.fence(a_rule(services=[A], providers=providers()))
    fleet.ask(9)
    fleet.settle(*(an_entry(number, A, FAILED) for number in (1, 2, 3)))
    opened = breaker(fleet)
    assert opened.state == 1
    fleet.pass_ms(5)
    fleet.settle(*(an_entry(number, A, FAILED) for number in (4, 5, 6)), *(an_entry(n, A) for n in (7, 8, 9)))
    assert breaker(fleet) == opened


# -- for how long ------------------------------------------------------------------------------------------------------


def test_each_opening_in_a_row_is_twice_as_long_up_to_eight_times_and_up_to_a_fifth_longer(fleet: Fleet) -> None:
    fleet.fence(a_rule(services=[A], providers=providers()))
    live(fleet, "fff")
    jitters = set()
    for opens, times in enumerate((1, 2, 4, 8, 8, 8, 8), start=1):
        opened = breaker(fleet)
        open_ms = opened.until_ms - fleet.now_ms
        assert OPEN_MS * times <= open_ms < OPEN_MS * times * 6 // 5
        assert opened == BreakerView(state=1, opens=opens, until_ms=opened.until_ms)
        jitters.add(open_ms - OPEN_MS * times)
        fleet.pass_ms(open_ms - 1)
        assert chosen(fleet) == (A, "exhausted")
        fleet.pass_ms(1)
        assert chosen(fleet) == (A, "probe")
        end(fleet, A, FAILED)
    assert len(jitters) == 7, "so that not all try again at once"


def test_the_jitter_follows_from_the_position(fleet: Fleet) -> None:
    fleet.fence(a_rule(services=[A], providers=providers()))
    live(fleet, "rrrfff")
    position = place(fleet)
    jitter_ms = OPEN_MS * (position * 7919 % 1000) // 5000
    assert breaker(fleet).until_ms == NOW_MS + OPEN_MS + jitter_ms


def test_a_breaker_that_closed_opens_for_the_shortest_time_again(fleet: Fleet) -> None:
    fleet.fence(a_rule(services=[A], providers=providers(successes=1)))
    half_open(fleet, times=4)
    assert chosen(fleet) == (A, "probe")
    end(fleet, A)
    assert breaker(fleet) == CLOSED
    live(fleet, "fff")
    assert breaker(fleet).opens == 1
    assert OPEN_MS <= breaker(fleet).until_ms - fleet.now_ms < LONGEST_MS


# -- probes ------------------------------------------------------------------------------------------------------------


def test_one_call_of_many_selections_gets_one_probe(fleet: Fleet) -> None:
    fleet.fence(a_rule(services=[A, B], providers=providers()))
    half_open(fleet)
    answers = fleet.ask(64)
    assert [(answer[1], answer[2]) for answer in answers if answer[2] == "probe"] == [(A, "probe")]
    assert {answer[1] for answer in answers if answer[2] != "probe"} == {B}


def test_many_workers_get_one_probe_among_them_for_as_long_as_it_is_out(fleet: Fleet) -> None:
    fleet.fence(a_rule(services=[A, B], providers=providers()))
    half_open(fleet)
    reasons = [answer[2] for number in range(20) for answer in fleet.ask(3, worker=f"p{number}")]
    assert reasons.count("probe") == 1
    fleet.pass_ms(LEASE_MS - 1)
    assert "probe" not in [answer[2] for answer in fleet.ask(20)]


def test_every_rule_of_the_pool_shares_the_one_probe(fleet: Fleet) -> None:
    names = ("chat", "second", "third")
    fleet.fence(*(a_rule(services=[A, B], rule=name, providers=providers()) for name in names))
    half_open(fleet)
    assert [chosen(fleet, rule=name)[1] == "probe" for name in reversed(names)] == [True, False, False]


def test_breakers_that_are_half_open_are_tried_in_the_rules_order(fleet: Fleet) -> None:
    fleet.fence(a_rule(services=[C, A, B], providers=providers()))
    half_open(fleet, A, C)
    assert [chosen(fleet) for _ in range(3)] == [(C, "probe"), (A, "probe"), (B, "streak")]


def test_a_probe_takes_a_seq_and_a_place(fleet: Fleet) -> None:
    fleet.fence(a_rule(services=[A, B], providers=providers()))
    half_open(fleet)
    before, (probe,), (after,) = place(fleet), fleet.ask(), fleet.ask()
    assert (probe[2], after[2]) == ("probe", "streak")
    assert (probe[5], after[5], after[3]) == (before + 1, before + 2, probe[3] + 1)


def test_a_probe_moves_neither_cursor_nor_streak(fleet: Fleet) -> None:
    fleet.fence(a_rule(services=[A, B, C], requests=9, cursor=B, providers=providers()))
    fleet.ask(2)
    half_open(fleet)
    assert ask(fleet) == (A, "probe", 2, 0)
    assert standing(fleet) == (B, 2)
    assert ask(fleet) == (B, "streak", 3, 0)


def test_three_probes_that_go_well_in_turn_close_a_breaker(fleet: Fleet) -> None:
    fleet.fence(a_rule(services=[A, B], providers=providers()))
    half_open(fleet)
    for successes in (1, 2, 3):
        assert chosen(fleet) == (A, "probe")
        assert chosen(fleet)[0] == B, "one at a time"
        fleet.settle(an_entry(fleet.numbers["w1"] - 1, A))
        if successes < 3:
            assert (breaker(fleet).successes, breaker(fleet).probe) == (successes, 0)
    assert breaker(fleet) == CLOSED
    assert {answer[1] for answer in fleet.ask(4)} == {A, B}


def test_a_probe_that_fails_opens_the_breaker_again_and_forgets_those_that_went_well(fleet: Fleet) -> None:
    fleet.fence(a_rule(services=[A, B], providers=providers()))
    half_open(fleet)
    for outcome in (SUCCESS, SUCCESS, FAILED):
        assert chosen(fleet) == (A, "probe")
        end(fleet, A, outcome)
    opened = breaker(fleet)
    assert (opened.state, opened.opens, opened.successes, opened.probe) == (1, 2, 0, 0)
    assert chosen(fleet)[0] == B
    fleet.pass_ms(2 * LONGEST_MS)
    for _ in range(3):
        assert is_open(fleet)
        assert chosen(fleet) == (A, "probe")
        end(fleet, A)
    assert breaker(fleet) == CLOSED


@pytest.mark.parametrize("outcome", [REJECTED, CANCELLED, RATE_LIMITED])
def test_a_probe_that_says_nothing_of_the_service_lets_the_next_one_through(fleet: Fleet, outcome: Outcome) -> None:
    fleet.fence(a_rule(services=[A, B], providers=providers()))
    half_open(fleet)
    assert chosen(fleet) == (A, "probe")
    end(fleet, A)
    for _ in range(5):
        assert chosen(fleet) == (A, "probe")
        end(fleet, A, outcome)
    assert (breaker(fleet).successes, breaker(fleet).opens) == (1, 1)
    for _ in range(2):
        assert chosen(fleet) == (A, "probe")
        end(fleet, A)
    assert breaker(fleet) == CLOSED


def test_a_probe_that_was_given_up_is_given_back(fleet: Fleet) -> None:
    fleet.fence(a_rule(services=[A, B], providers=providers()))
    half_open(fleet)
    assert chosen(fleet, worker="w7") == (A, "probe")
    assert chosen(fleet)[0] == B
    abandon(fleet, worker="w7")
    assert chosen(fleet) == (A, "probe")


@pytest.mark.parametrize(("passed_ms", "deadline_ms"), [(LEASE_MS, 10**9), (500, 500)])
def test_a_probe_whose_worker_is_gone_or_deadline_past_is_given_back_by_the_reap(
    fleet: Fleet, passed_ms: int, deadline_ms: int
) -> None:
    fleet.fence(a_rule(services=[A, B], providers=providers()))
    half_open(fleet)
    assert chosen(fleet, worker="dead", deadline_ms=deadline_ms) == (A, "probe")
    fleet.pass_ms(passed_ms)
    assert chosen(fleet)[0] == B
    fleet.reap("dead")
    assert (breaker(fleet).opens, breaker(fleet).successes) == (1, 0), "lost says nothing of the service"
    assert chosen(fleet) == (A, "probe")


@pytest.mark.parametrize("outcome", [SUCCESS, FAILED])
def test_a_probe_that_ends_after_it_was_given_back_does_not_end_the_next_one(fleet: Fleet, outcome: Outcome) -> None:
    fleet.fence(a_rule(services=[A, B], providers=providers(successes=1)))
    half_open(fleet)
    assert chosen(fleet, worker="slow") == (A, "probe")
    fleet.pass_ms(LEASE_MS)
    fleet.reap("slow")
    assert chosen(fleet) == (A, "probe")
    probing = breaker(fleet)
    end(fleet, A, outcome, worker="slow")
    assert breaker(fleet) == probing
    assert chosen(fleet, worker="w3")[0] == B


@pytest.mark.parametrize("outcome", [SUCCESS, FAILED])
def test_a_probe_whose_end_was_long_in_coming_is_given_back_and_says_nothing(fleet: Fleet, outcome: Outcome) -> None:
    fleet.fence(a_rule(services=[A, B], providers=providers(successes=1)))
    half_open(fleet)
    half = breaker(fleet)
    assert chosen(fleet) == (A, "probe")
    end(fleet, A, outcome, age_ms=1)
    assert breaker(fleet) == half
    assert chosen(fleet) == (A, "probe")


def test_other_attempts_do_not_end_a_probe_that_is_out(fleet: Fleet) -> None:
    fleet.fence(a_rule(services=[A], providers=providers(successes=1)))
    half_open(fleet)
    assert chosen(fleet, worker="prober") == (A, "probe")
    probing = breaker(fleet)
    for outcome in (SUCCESS, FAILED, CANCELLED):
        assert chosen(fleet) == (A, "exhausted")
        end(fleet, A, outcome)
        assert breaker(fleet) == probing
    end(fleet, A, worker="prober")
    assert breaker(fleet) == CLOSED


def test_a_request_for_one_service_only_is_no_probe(fleet: Fleet) -> None:
    fleet.fence(a_rule(services=[A, B], providers=providers(successes=1)))
    half_open(fleet)
    half = breaker(fleet)
    assert chosen(fleet, only=A) == (A, "exhausted")
    end(fleet, A)
    assert breaker(fleet) == half
    assert chosen(fleet, only=B) == (B, "pinned"), "and goes past a probe that somebody else may make"
    assert chosen(fleet) == (A, "probe")


def test_a_session_that_has_its_service_is_sent_to_no_probe(fleet: Fleet) -> None:
    session: dict[str, Any] = {"session": "s", "affinity_ms": 3_600_000}
    fleet.fence(a_rule(services=[A, B], cursor=B, providers=providers()))
    assert chosen(fleet, **session)[0] == B
    half_open(fleet)
    assert [chosen(fleet, **session) for _ in range(3)] == [(B, "pinned")] * 3
    assert chosen(fleet) == (A, "probe")
    assert pinned(fleet) == B


def test_a_retry_is_no_probe_and_tries_no_service_with_an_open_breaker(fleet: Fleet) -> None:
    fleet.fence(a_rule(services=[A, B, C], providers=providers()))
    half_open(fleet)
    assert [chosen(fleet, excluded=[B]) for _ in range(3)] == [(C, "retry")] * 3
    assert chosen(fleet, excluded=[B, C]) == ("none", "tried")
    assert chosen(fleet) == (A, "probe")


def test_an_exhausted_pick_is_no_probe(fleet: Fleet) -> None:
    fleet.fence(a_rule(services=[A], providers=providers(successes=1)))
    live(fleet, "fff")
    opened = breaker(fleet)
    assert chosen(fleet) == (A, "exhausted")
    fleet.pass_ms(LONGEST_MS)
    end(fleet, A)
    assert breaker(fleet) == opened


def test_nothing_that_is_inactive_cooling_or_at_its_limit_is_tried(fleet: Fleet) -> None:
    limited = a_service(A, in_flight=1)
    fleet.fence(a_rule(services=[limited, B], providers=providers()))
    half_open(fleet)
    fleet.ask(only=A)
    assert chosen(fleet)[0] == B
    fleet.settle(an_entry(fleet.numbers["w1"] - 1, A, RATE_LIMITED, cooldown_ms=400))
    assert chosen(fleet)[0] == B
    fleet.pass_ms(399)
    assert chosen(fleet)[0] == B
    fleet.fence(a_rule(services=[a_service(A, active=False), B], revision=2))
    fleet.pass_ms(1)
    assert chosen(fleet, revision=2)[0] == B
    fleet.fence(a_rule(services=[limited, B], revision=3))
    assert chosen(fleet, revision=3) == (A, "probe")


def test_a_tier_that_serves_is_not_left_for_a_probe_of_a_lower_one(fleet: Fleet) -> None:
    tiers = [a_service(C, tier=1), a_service(A), a_service(B)]
    fleet.fence(a_rule(services=tiers, providers=providers()))
    half_open(fleet, C, B)
    assert chosen(fleet) == (B, "probe")
    assert {answer[1] for answer in fleet.ask(8)} == {A}
    live(fleet, "fff")
    assert "probe" not in [answer[2] for answer in fleet.ask(8)], "the tier goes down with a choice of the tactic only"


# -- the list, edits ---------------------------------------------------------------------------------------------------


def test_the_list_of_open_breakers_is_kept_in_order_until_they_close(fleet: Fleet) -> None:
    fleet.fence(a_rule(services=[C, B, A], providers=providers(successes=1)))
    assert broken(fleet) == ""
    for service in (B, C, A):
        live(fleet, "fff", service)
    untils = {service: breaker(fleet, service).until_ms for service in (A, B, C)}
    assert broken(fleet) == "".join(f"{untils[service]} {service}\n" for service in (A, B, C))
    fleet.pass_ms(LONGEST_MS)
    assert [chosen(fleet) for _ in range(2)] == [(C, "probe"), (B, "probe")]
    end(fleet, B)
    assert broken(fleet) == f"{untils[A]} {A}\n{untils[C]} {C}\n"
    fleet.settle(an_entry(fleet.numbers["w1"] - 1, C, FAILED))
    assert broken(fleet) == f"{untils[A]} {A}\n{breaker(fleet, C).until_ms} {C}\n"


def test_edited_numbers_count_from_the_next_ending_on(fleet: Fleet) -> None:
    fleet.fence(a_rule(services=[A], providers=providers(failures=5)))
    live(fleet, "ffff")
    fleet.fence(a_rule(services=[A], revision=2, providers=providers(failures=2, open_ms=70)))
    assert not is_open(fleet)
    live(fleet, "f", revision=2)
    assert is_open(fleet)
    assert 70 <= breaker(fleet).until_ms - fleet.now_ms <= 84


def test_of_two_rules_the_one_edited_last_says_what_a_providers_numbers_are(fleet: Fleet) -> None:
    fleet.fence(a_rule(services=[A], revision=5, providers=providers(failures=2)))
    fleet.fence(a_rule(services=[A], rule="other", revision=4, providers=providers(failures=1)))
    live(fleet, "f", revision=5)
    assert not is_open(fleet)
    fleet.fence(a_rule(services=[A], rule="other", revision=5, providers=providers(failures=7)))
    live(fleet, "ffff", revision=5)
    assert not is_open(fleet)


def test_a_breaker_that_is_switched_off_lets_through_and_forgets_with_the_next_ending(fleet: Fleet) -> None:
    fleet.fence(a_rule(services=[A, B], providers=providers()))
    half_open(fleet)
    fleet.fence(a_rule(services=[A, B], revision=2, providers=providers(failures=0)))
    picked = fleet.ask(8, revision=2)
    assert {answer[1] for answer in picked} == {A, B}
    assert "probe" not in [answer[2] for answer in picked]
    live(fleet, "r", revision=2)
    assert is_open(fleet), "it says nothing, so nothing is changed"
    live(fleet, "s", revision=2)
    assert (breaker(fleet), broken(fleet)) == (CLOSED, "")


def test_fewer_successes_are_enough_after_an_edit(fleet: Fleet) -> None:
    fleet.fence(a_rule(services=[A, B], providers=providers(successes=9)))
    half_open(fleet)
    for _ in range(3):
        assert chosen(fleet) == (A, "probe")
        end(fleet, A)
    fleet.fence(a_rule(services=[A, B], revision=2, providers=providers(successes=2)))
    assert is_open(fleet)
    assert chosen(fleet, revision=2) == (A, "probe")
    end(fleet, A)
    assert breaker(fleet) == CLOSED


def test_what_a_service_used_may_be_cleared_and_its_breaker_stays_open(fleet: Fleet) -> None:
    fleet.fence(a_rule(services=[A, B], providers=providers()))
    live(fleet, "fff")
    opened = breaker(fleet)
    fleet.pool.clear(fleet.now_ms, [A])
    assert (breaker(fleet), opened.state) == (opened, 1)
