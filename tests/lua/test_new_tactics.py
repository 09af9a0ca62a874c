"""Tactics that look at what is in flight, at weights in turn, at how fast a service answers, and at what it costs."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest

from balancer.reference import Pool
from tests.lua.builders import ABC, A, B, C, D, Fleet, a_rule, a_service, an_abandoned, an_entry
from tests.lua.stories import FAILED, RATE_LIMITED, ask, chosen, standing

FIRST, LAST = 0, 2**32 - 1


# -- least_in_flight ---------------------------------------------------------------------------------------------------


def test_least_in_flight_spreads_evenly_and_settles_make_room(fleet: Fleet) -> None:
    fleet.fence(a_rule("least_in_flight", cursor=C))
    assert fleet.picks(6) == "abcabc"
    fleet.settle(an_entry(2, B), an_entry(5, B))
    assert fleet.picks(4) == "bbca"


@pytest.mark.parametrize("seed", range(4))
def test_least_in_flight_never_picks_one_that_has_more_than_another(fleet: Fleet, seed: int) -> None:
    rand = random.Random(seed)
    fleet.fence(a_rule("least_in_flight", [A, B, C, D]))
    out: dict[int, str] = {}
    cursor, streak = "", 0
    for _ in range(250):
        counts = {service: list(out.values()).count(service) for service in (A, B, C, D)}
        service, reason, told_streak, _ = ask(fleet, deadline_ms=10**9)
        assert counts[service] == min(counts.values())
        streak = streak + 1 if service == cursor else 1
        assert (reason, standing(fleet)) == ("least", (service, streak))
        assert told_streak == streak
        cursor, out[fleet.numbers["w1"]] = service, service
        for number in rand.sample(sorted(out), rand.choice((0, 1, 1, 2)) if len(out) > 2 else 0):
            fleet.settle(an_entry(number, out.pop(number), rand.choice((FAILED, RATE_LIMITED))))


@pytest.mark.parametrize(("cursor", "picked"), [(A, B), (B, C), (C, A)])
def test_least_in_flight_takes_the_next_after_the_cursor_on_ties(fleet: Fleet, cursor: str, picked: str) -> None:
    fleet.fence(a_rule("least_in_flight", cursor=cursor))
    assert ask(fleet) == (picked, "least", 1, 1)


def test_least_in_flight_stays_when_all_others_have_more(fleet: Fleet) -> None:
    fleet.fence(a_rule("least_in_flight", [A, B]), a_rule(services=[A], rule="other"))
    fleet.ask(9, rule="other")
    assert [ask(fleet)[:3] for _ in range(3)] == [(B, "least", streak) for streak in (1, 2, 3)]


def test_least_in_flight_counts_what_other_rules_and_workers_have_out(fleet: Fleet) -> None:
    fleet.fence(a_rule("least_in_flight"), a_rule(services=[B, A], rule="other", requests=2))
    assert fleet.picks(4, rule="other", worker="w9") == "bbaa"
    assert fleet.picks(5) == "ccabc"


# -- weighted_round_robin ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "cycle"),
    [
        ((1, 1, 1), "abc"),
        ((5, 1, 1), "aabacaa"),
        ((2, 1, 0), "aba"),
        ((0, 0, 0), "abc"),
        ((0, 3, 0), "b"),
        ((4, 3, 2), "abcabacba"),
    ],
)
def test_weighted_turns_come_smoothly_and_again(fleet: Fleet, weights: tuple[int, ...], cycle: str) -> None:
    """`aabacaa` for 5, 1, 1 is nginx's own example of smooth weighted round robin."""
    fleet.fence(a_rule("weighted_round_robin", [a_service(s, weight=w) for s, w in zip(ABC, weights, strict=True)]))
    assert fleet.picks(3 * len(cycle)) == 3 * cycle


@pytest.mark.parametrize("weights", [(1, 2, 3, 4), (7, 1, 1, 1), (13, 11, 5, 2), (100, 1, 50, 25)])
def test_weighted_shares_are_exact_over_thousands_of_picks_and_never_far_off(
    fleet: Fleet, weights: tuple[int, ...]
) -> None:
    services = [a_service(s, weight=w) for s, w in zip((A, B, C, D), weights, strict=True)]
    fleet.fence(a_rule("weighted_round_robin", services))
    total = sum(weights)
    count = total * (3_000 // total)
    picked = fleet.picks(count, deadline_ms=10**9)
    assert [picked.count(letter) for letter in "abcd"] == [count // total * weight for weight in weights]
    for length in range(1, 3 * total):
        for letter, weight in zip("abcd", weights, strict=True):
            assert abs(picked[:length].count(letter) - length * weight / total) < 2


def test_weighted_shares_are_exact_while_candidates_come_and_go(fleet: Fleet) -> None:
    """Each time one is away, the others share what is left by their weights; none has lost its turn afterwards."""
    weights = dict(zip((A, B, C, D), (1, 2, 3, 6), strict=True))
    fleet.fence(a_rule("weighted_round_robin", [a_service(s, weight=w) for s, w in weights.items()]))
    rand, given = random.Random(7), dict.fromkeys(weights, 0)
    expected = dict.fromkeys(weights, 0.0)
    for _ in range(60):
        away = rand.sample(sorted(weights), rand.choice((0, 1, 1, 2)))
        fleet.settle(*(an_entry(0, service, RATE_LIMITED, cooldown_ms=1_000) for service in away))
        total = sum(weight for service, weight in weights.items() if service not in away)
        answers = fleet.ask(60, deadline_ms=10**9)
        for service, weight in weights.items():
            share = 0 if service in away else 60 * weight / total
            expected[service] += share
            got = sum(answer[1] == service for answer in answers)
            given[service] += got
            assert abs(got - share) < 4
        fleet.pass_ms(1_000)
    assert sum(given.values()) == 3_600
    assert all(abs(given[service] - expected[service]) < 4 for service in weights), "nothing adds up over time"


def test_a_weighted_turn_tells_streaks_and_switches(fleet: Fleet) -> None:
    fleet.fence(a_rule("weighted_round_robin", [a_service(A, weight=3), B]))
    assert [ask(fleet) for _ in range(5)] == [
        (A, "turn", 1, 0),
        (A, "turn", 2, 0),
        (B, "turn", 1, 1),
        (A, "turn", 1, 1),
        (A, "turn", 2, 0),
    ]


def test_weighted_turns_go_on_over_workers_calls_and_edits_that_leave_the_services(fleet: Fleet) -> None:
    services = [a_service(A, weight=5), a_service(B), a_service(C)]
    fleet.fence(a_rule("weighted_round_robin", services))
    assert "".join(fleet.picks(1, worker=f"w{number}") for number in range(3)) == "aab"
    fleet.fence(a_rule("weighted_round_robin", services, revision=2, refuses=True, retry_permille=5))
    assert fleet.picks(4, revision=2) == "acaa"


@pytest.mark.parametrize(
    "services",
    [
        [a_service(A, weight=5), a_service(B, weight=2), C],
        [a_service(A, weight=5), B],
        [B, a_service(A, weight=5), C],
    ],
)
def test_weighted_turns_start_anew_with_other_services_weights_or_order(fleet: Fleet, services: Sequence[Any]) -> None:
    fleet.fence(a_rule("weighted_round_robin", [a_service(A, weight=5), B, C]))
    fleet.ask(3)
    fleet.fence(a_rule("weighted_round_robin", services, revision=2))
    fleet.fence(a_rule("weighted_round_robin", services, rule="new"))
    assert fleet.picks(14, revision=2) == fleet.picks(14, rule="new")


def test_neither_pins_nor_one_service_only_take_a_weighted_turn(fleet: Fleet) -> None:
    session: dict[str, Any] = {"session": "s", "affinity_ms": 9_000}
    fleet.fence(a_rule("weighted_round_robin", [a_service(A, weight=5), B, C]))
    picked = fleet.picks(1, **session)
    for _ in range(6):
        assert chosen(fleet, **session) == (A, "pinned")
        assert chosen(fleet, only=C) == (C, "pinned")
        picked += fleet.picks(1)
    assert picked == "aabacaa"


# -- latency -----------------------------------------------------------------------------------------------------------


def measure(fleet: Fleet, service: str, first_ms: int, *, token_us: int = 0, output: int = 100) -> None:
    """A success of the service that took so long."""
    fleet.settle(an_entry(0, service, first_token_us=first_ms * 1_000, stream_us=token_us * output, output=output))


def latency(fleet: Fleet, service: str = A) -> tuple[int, int]:
    """What is known: time to the first token and per token, in µs."""
    state = fleet.pool.service(service) if isinstance(fleet.pool, Pool) else fleet.service(service)
    return state.first_token, state.per_token


def test_of_two_services_the_faster_is_picked_whatever_the_draw(fleet: Fleet) -> None:
    fleet.fence(a_rule("latency", [A, B]))
    measure(fleet, A, 300)
    measure(fleet, B, 299)
    for draw in (FIRST, 2**16, 2**31, LAST):
        assert ask(fleet, draw=draw)[:3] == (B, "fastest", 0)
        fleet.settle(an_entry(fleet.numbers["w1"], B, FAILED))


def test_more_in_flight_make_a_fast_service_slower_than_a_slow_one(fleet: Fleet) -> None:
    fleet.fence(a_rule("latency", [A, B]))
    measure(fleet, A, 100)
    measure(fleet, B, 350)
    assert [fleet.picks(1, draw=draw) for draw in (FIRST, LAST, FIRST, LAST, FIRST)] == ["a", "a", "a", "b", "a"]


def test_a_service_that_was_never_measured_is_tried(fleet: Fleet) -> None:
    fleet.fence(a_rule("latency", [A, B]))
    measure(fleet, A, 1)
    assert fleet.picks(5, draw=LAST) == "bbbbb"


@pytest.mark.parametrize(("expected_output", "picked"), [(1, "a"), (499, "a"), (501, "b"), (5_000, "b")])
def test_how_long_an_answer_is_expected_to_be_weighs_the_start_against_the_rest(
    fleet: Fleet, expected_output: int, picked: str
) -> None:
    fleet.fence(a_rule("latency", [A, B], params={"expected_output": expected_output}))
    measure(fleet, A, 100, token_us=3_000)
    measure(fleet, B, 1_100, token_us=1_000)
    assert fleet.picks(1) == picked


def test_two_hundred_tokens_are_expected_unless_told_otherwise(fleet: Fleet) -> None:
    fleet.fence(a_rule("latency", [A, B]))
    measure(fleet, A, 100, token_us=3_000)
    measure(fleet, B, 500, token_us=1_001)
    assert fleet.picks(1) == "a", "700 ms to 700.2 ms"


@pytest.mark.parametrize("count", [3, 4, 7])
def test_two_different_ones_are_drawn_each_pair_as_often(fleet: Fleet, count: int) -> None:
    """Over all pairs once in either order, the fastest wins each that it is in, and the slowest none."""
    services = [f"{chr(97 + place)}:m" for place in range(count)]
    fleet.fence(a_rule("latency", services))
    for place, service in enumerate(services):
        measure(fleet, service, 1_000 * (place + 1))
    picked = ""
    for i in range(count):
        for j in range(count - 1):
            high, low = (2 * i + 1) * 2**15 // count, (2 * j + 1) * 2**15 // (count - 1)
            picked += fleet.picks(1, draw=high * 2**16 + low)
            fleet.settle(an_abandoned(fleet.numbers["w1"]))
    assert [picked.count(service[0]) for service in services] == [2 * (count - 1 - place) for place in range(count)]


def test_a_longer_sample_counts_at_once_and_shorter_ones_bring_it_down_with_time(fleet: Fleet) -> None:
    fleet.fence(a_rule("latency", [A]))
    measure(fleet, A, 100, token_us=50)
    measure(fleet, A, 900, token_us=20)
    assert latency(fleet) == (900_000, 50), "no time has passed"
    fleet.pass_ms(10_000)
    measure(fleet, A, 100, token_us=20)
    assert latency(fleet) == (500_000, 35), "half of the way in ten seconds"
    fleet.pass_ms(30_000)
    measure(fleet, A, 100, token_us=40)
    assert latency(fleet) == (200_000, 40)
    measure(fleet, A, 201)
    assert latency(fleet)[0] == 201_000


def test_after_a_long_silence_a_sample_is_nearly_all_there_is(fleet: Fleet) -> None:
    fleet.fence(a_rule("latency", [A]))
    measure(fleet, A, 1_000)
    fleet.pass_ms(10**10)
    measure(fleet, A, 10)
    assert 10_000 < latency(fleet)[0] < 30_000


@pytest.mark.parametrize(
    "entry",
    [
        an_entry(0, A, FAILED, first_token_us=9, stream_us=900, output=10),
        an_entry(0, A, age_ms=1, first_token_us=9, stream_us=900, output=10),
        an_entry(0, A, stream_us=900),
        an_entry(0, A, output=900),
    ],
)
def test_only_what_succeeded_just_now_and_was_measured_is_a_sample(fleet: Fleet, entry: Any) -> None:
    fleet.fence(a_rule("latency", [A]))
    measure(fleet, A, 100, token_us=50)
    fleet.pass_ms(10_000)
    fleet.settle(entry)
    assert latency(fleet) == (100_000, 50)
    measure(fleet, A, 50)
    assert latency(fleet)[0] == 75_000, "and it was not as if it had been measured then"


def test_a_sample_of_one_kind_leaves_the_other(fleet: Fleet) -> None:
    fleet.fence(a_rule("latency", [A]))
    measure(fleet, A, 100)
    fleet.settle(an_entry(0, A, stream_us=1_000, output=3))
    assert latency(fleet) == (100_000, 333)


def test_a_clock_that_is_set_back_forgets_no_latency(fleet: Fleet) -> None:
    fleet.fence(a_rule("latency", [A]))
    measure(fleet, A, 100)
    fleet.pass_ms(-60_000)
    measure(fleet, A, 10)
    assert latency(fleet)[0] == 100_000


def test_a_single_candidate_is_the_fastest(fleet: Fleet) -> None:
    fleet.fence(a_rule("latency", [A, B]))
    fleet.settle(an_entry(0, A, RATE_LIMITED, cooldown_ms=9))
    assert {ask(fleet, draw=draw)[0] for draw in (FIRST, 2**31, LAST)} == {B}


# -- cost --------------------------------------------------------------------------------------------------------------


def test_the_cheapest_that_can_serve_is_picked(fleet: Fleet) -> None:
    fleet.fence(a_rule("cost", [a_service(A, cost=30), a_service(B, cost=10), a_service(C, cost=20)]))
    assert [ask(fleet) for _ in range(2)] == [(B, "cheapest", 1, 0), (B, "cheapest", 2, 0)]
    fleet.settle(an_entry(0, B, RATE_LIMITED, cooldown_ms=1_000))
    assert ask(fleet) == (C, "cheapest", 1, 1)
    fleet.pass_ms(1_000)
    assert ask(fleet) == (B, "cheapest", 1, 1)


def test_of_equal_prices_the_one_that_has_used_least_is_picked_and_then_the_first(fleet: Fleet) -> None:
    fleet.fence(a_rule("cost", [a_service(A, cost=9), a_service(B, cost=5), a_service(C, cost=5)]))
    assert fleet.picks(2) == "bb"
    fleet.settle(an_entry(1, B, input=10), an_entry(2, B))
    assert fleet.picks(1, reserved=11) == "c"
    assert fleet.picks(1) == "b", "reserved tokens count too"


def test_without_prices_the_first_is_as_cheap_as_any(fleet: Fleet) -> None:
    fleet.fence(a_rule("cost"))
    assert fleet.picks(4) == "aaaa"


def test_a_new_price_counts_at_once(fleet: Fleet) -> None:
    fleet.fence(a_rule("cost", [a_service(A, cost=1), a_service(B, cost=2)]))
    assert fleet.picks(1) == "a"
    fleet.fence(a_rule("cost", [a_service(A, cost=3), a_service(B, cost=2)], revision=2))
    assert ask(fleet, revision=2) == (B, "cheapest", 1, 1)
