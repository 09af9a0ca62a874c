"""The tactics, against the contract's rules one by one, and against a single process that rotates by itself."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balancer.domain import Candidate, Tactic
from balancer.tactics import (
    TACTIC_NAMES,
    TACTICS,
    Choice,
    Hybrid,
    Random,
    RoundRobin,
    TokenBased,
    choose,
    tactic_from_map,
    tactic_name,
    tactic_of,
    tactic_params,
)
from balancer.tactics.cost import Cost
from balancer.tactics.latency import Latency
from balancer.tactics.least_in_flight import LeastInFlight
from balancer.tactics.weighted_round_robin import WeightedRoundRobin

LAST_DRAW = 2**32 - 1


def cands(*rows: str) -> list[Candidate]:
    """Candidates, each `name requests tokens`; counts that are left out are 0."""
    made = []
    for row in rows:
        name, *counts = row.split()
        requests, tokens = (*map(int, counts), 0, 0)[:2]
        made.append(Candidate(service=name, requests=requests, tokens=tokens))
    return made


def weighted(**weights: int) -> list[Candidate]:
    return [Candidate(service=name, weight=weight) for name, weight in weights.items()]


def chosen(
    tactic: Tactic, cursor: str, streak: int, candidates: Sequence[Candidate], order: str = "", draw: int = 0
) -> Choice | None:
    """The choice in a rule whose services are `order`, by default the candidates alone."""
    ids = list(order) or [candidate.service for candidate in candidates]
    return choose(tactic, cursor=cursor, streak=streak, order=ids, candidates=candidates, draw=draw)


def choice(service: str, streak: int, reason: str) -> Choice:
    return Choice(service=service, streak=streak, reason=reason)


@pytest.mark.parametrize("kind", TACTICS)
def test_without_a_candidate_there_is_no_choice(kind: type[Tactic]) -> None:
    assert chosen(kind(), "", 0, []) is None
    assert chosen(kind(), "a", 3, [], order="ab") is None


def test_every_tactic_has_a_name_and_the_first_four_are_those_of_the_legacy_numbers() -> None:
    assert TACTIC_NAMES[:4] == ("round_robin", "token_based", "hybrid", "random")
    assert sorted(TACTIC_NAMES[4:]) == ["cost", "latency", "least_in_flight", "weighted_round_robin"]
    assert [tactic_name(kind()) for kind in TACTICS] == list(TACTIC_NAMES)


@pytest.mark.parametrize("kind", TACTICS)
def test_a_tactic_is_made_again_from_the_numbers_that_a_definition_carries(kind: type[Tactic]) -> None:
    assert tactic_of(tactic_name(kind()), tactic_params(kind())) == kind()
    assert tactic_of("best", tactic_params(kind())) is None


def test_a_definition_carries_a_tactics_own_numbers_up_to_the_highest_that_lua_has() -> None:
    tactic = tactic_from_map("hybrid", {"request_threshold": 3, "token_threshold": 2**60, "reserve_cap": 5})
    assert tactic_params(tactic) == {"request_threshold": 3, "token_threshold": 2**53}
    assert tactic_params(Latency()) == {"expected_output": 200}
    assert tactic_params(Random()) == {}


# -- round_robin -------------------------------------------------------------------------------------------------------

ABC = cands("a", "b", "c")


@pytest.mark.parametrize(
    ("cursor", "streak", "candidates", "expected"),
    [
        # It stays below the threshold, and moves on when that is reached exactly, or passed by a lower one.
        ("a", 0, ABC, choice("a", 1, "streak")),
        ("a", 1, ABC, choice("a", 2, "streak")),
        ("a", 2, ABC, choice("a", 3, "streak")),
        ("a", 3, ABC, choice("b", 1, "next")),
        ("a", 9, ABC, choice("b", 1, "next")),
        # The order is cyclic.
        ("c", 3, ABC, choice("a", 1, "next")),
        # Over what is no candidate.
        ("a", 3, cands("a", "c"), choice("c", 1, "next")),
        ("b", 3, cands("a", "b"), choice("a", 1, "next")),
        # The next one is the same again: a new streak all the same.
        ("b", 3, cands("b"), choice("b", 1, "next")),
        # A cursor that is no candidate is left at once, whatever its streak, for the next after its own place.
        ("b", 1, cands("a", "c"), choice("c", 1, "next")),
        ("c", 1, cands("a", "b"), choice("a", 1, "next")),
        ("b", 0, cands("a"), choice("a", 1, "next")),
        # No cursor, or one that left the rule: the first candidate is current, with streak 0.
        ("", 7, ABC, choice("a", 1, "streak")),
        ("", 0, cands("b", "c"), choice("b", 1, "streak")),
        ("gone", 2, ABC, choice("a", 1, "streak")),
    ],
)
def test_round_robin_moves_on_after_its_streak(
    cursor: str, streak: int, candidates: Sequence[Candidate], expected: Choice
) -> None:
    assert chosen(RoundRobin(request_threshold=3), cursor, streak, candidates, order="abc") == expected


def test_round_robin_with_a_threshold_of_one_alternates() -> None:
    picks, cursor, streak = "", "", 0
    for _ in range(7):
        answer = chosen(RoundRobin(request_threshold=1), cursor, streak, ABC)
        assert answer is not None
        cursor, streak = answer.service, answer.streak
        picks += cursor

    assert picks == "abcabca"


def test_an_inactive_service_does_not_make_round_robin_alternate() -> None:
    """An index kept over all services but read modulo the active ones once changed the service on every request."""
    picks, cursor, streak = "", "", 0
    for _ in range(9):
        answer = chosen(RoundRobin(request_threshold=3), cursor, streak, cands("b", "c"), order="abc")
        assert answer is not None
        cursor, streak = answer.service, answer.streak
        picks += cursor

    assert picks == "bbbcccbbb"


# -- token_based and hybrid --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cursor", "streak", "candidates", "expected"),
    [
        ("a", 4, cands("a 99 99", "b", "c"), choice("a", 5, "threshold")),
        ("a", 4, cands("a 0 100", "b 0 7", "c 0 6"), choice("c", 1, "least")),
        ("a", 4, cands("a 0 101", "b 0 7", "c 0 7"), choice("b", 1, "least")),
        ("c", 4, cands("a 0 7", "b 0 7", "c 0 100"), choice("a", 1, "least")),
        # Requests are not looked at.
        ("a", 4, cands("a 0 100", "b 50 6", "c 0 7"), choice("b", 1, "least")),
        # All have reached it: the fewest still, the first on ties; the same again goes on with its streak.
        ("b", 4, cands("a 0 900", "b 0 100", "c 0 100"), choice("b", 5, "least")),
        ("c", 4, cands("a 0 900", "b 0 100", "c 0 100"), choice("b", 1, "least")),
        # A cursor that is no candidate is left, below the threshold too.
        ("b", 4, cands("a 0 9", "c 0 8"), choice("c", 1, "least")),
        # No cursor, or one that left the rule: the first candidate is current, and stays or goes as any.
        ("", 4, cands("a 0 99", "b", "c"), choice("a", 1, "threshold")),
        ("gone", 4, cands("b 0 99", "c"), choice("b", 1, "threshold")),
        ("", 4, cands("a 0 100", "b", "c"), choice("b", 1, "least")),
    ],
)
def test_token_based_leaves_at_its_threshold_for_the_fewest_tokens(
    cursor: str, streak: int, candidates: Sequence[Candidate], expected: Choice
) -> None:
    assert chosen(TokenBased(token_threshold=100), cursor, streak, candidates, order="abc") == expected


@pytest.mark.parametrize(
    ("cursor", "streak", "candidates", "expected"),
    [
        ("a", 4, cands("a 9 99", "b", "c"), choice("a", 5, "threshold")),
        ("a", 4, cands("a 10 0", "b 1 0", "c"), choice("c", 1, "least")),
        ("a", 4, cands("a 0 100", "b 1 0", "c"), choice("c", 1, "least")),
        ("a", 4, cands("a 11 101", "b", "c"), choice("b", 1, "least")),
        # Least is requests × 10 + tokens.
        ("a", 4, cands("a 10 0", "b 2 0", "c 0 19"), choice("c", 1, "least")),
        ("a", 4, cands("a 10 0", "b 2 0", "c 0 21"), choice("b", 1, "least")),
        ("a", 4, cands("a 10 0", "b 2 0", "c 1 10"), choice("b", 1, "least")),
        ("c", 4, cands("a 0 20", "b 2 0", "c 10 0"), choice("a", 1, "least")),
        # All have reached it.
        ("b", 4, cands("a 10 1", "b 10 0", "c 0 100"), choice("b", 5, "least")),
        ("c", 4, cands("a 10 1", "b 10 0", "c 0 100"), choice("b", 1, "least")),
        ("b", 4, cands("a 1 0", "c 0 9"), choice("c", 1, "least")),
        ("", 4, cands("a 9 99", "b", "c"), choice("a", 1, "threshold")),
        ("gone", 4, cands("b 9 99", "c"), choice("b", 1, "threshold")),
        ("", 4, cands("a 10 0", "b", "c"), choice("b", 1, "least")),
    ],
)
def test_hybrid_leaves_at_either_threshold_for_the_least_used(
    cursor: str, streak: int, candidates: Sequence[Candidate], expected: Choice
) -> None:
    tactic = Hybrid(request_threshold=10, token_threshold=100)

    assert chosen(tactic, cursor, streak, candidates, order="abc") == expected


@pytest.mark.parametrize("threshold", [2**53 + 1, 2**60, 2**70])
def test_a_threshold_above_what_can_be_counted_is_never_reached(threshold: int) -> None:
    full = [Candidate(service="a", requests=2**53, tokens=2**53), Candidate(service="b")]

    assert chosen(RoundRobin(request_threshold=threshold), "a", 2**53, full) == choice("a", 2**53 + 1, "streak")
    assert chosen(TokenBased(token_threshold=threshold), "a", 1, full) == choice("a", 2, "threshold")
    assert chosen(Hybrid(request_threshold=threshold, token_threshold=threshold), "a", 1, full) == choice(
        "a", 2, "threshold"
    )


# -- random ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("candidates", "draw", "service"),
    [
        (weighted(a=1, b=1), 0, "a"),
        (weighted(a=1, b=1), 2**31 - 1, "a"),
        (weighted(a=1, b=1), 2**31, "b"),
        (weighted(a=1, b=1), LAST_DRAW, "b"),
        (weighted(a=3, b=1), 3 * 2**30 - 1, "a"),
        (weighted(a=3, b=1), 3 * 2**30, "b"),
        # Weight 0, or less than that, is never drawn beside a positive one, at neither edge.
        (weighted(a=0, b=1, c=0), 0, "b"),
        (weighted(a=0, b=1, c=0), LAST_DRAW, "b"),
        (weighted(a=-5, b=2, c=-1), 0, "b"),
        (weighted(a=-5, b=2, c=-1), LAST_DRAW, "b"),
        # All zero means uniform.
        (weighted(a=0, b=0), 0, "a"),
        (weighted(a=0, b=0), 2**31 - 1, "a"),
        (weighted(a=0, b=-3), 2**31, "b"),
        (weighted(a=0, b=0, c=0), LAST_DRAW, "c"),
        (weighted(a=7), LAST_DRAW, "a"),
        # The largest weights that a configuration may give.
        (weighted(a=10**6, b=10**6), LAST_DRAW, "b"),
    ],
)
def test_random_draws_by_weight(candidates: Sequence[Candidate], draw: int, service: str) -> None:
    assert chosen(Random(), "", 0, candidates, draw=draw) == choice(service, 0, "draw")


@pytest.mark.parametrize(("cursor", "streak"), [("", 0), ("b", 9), ("gone", 2)])
def test_random_does_not_look_at_the_cursor_and_leaves_streak_zero(cursor: str, streak: int) -> None:
    assert chosen(Random(), cursor, streak, weighted(a=1, b=1), draw=0) == choice("a", 0, "draw")


@given(
    weights=st.lists(st.integers(-3, 10**6), min_size=1, max_size=20),
    draw=st.one_of(st.integers(0, LAST_DRAW), st.sampled_from((0, LAST_DRAW))),
)
def test_every_draw_falls_on_the_service_whose_share_it_lies_in(weights: list[int], draw: int) -> None:
    candidates = [Candidate(service=str(i), weight=weight) for i, weight in enumerate(weights)]
    positive = [max(weight, 0) for weight in weights]
    shares = positive if any(positive) else [1] * len(weights)
    point, edge, expected = Fraction(draw, 2**32) * sum(shares), 0, ""
    for i, share in enumerate(shares):
        edge += share
        if point < edge:
            expected = str(i)
            break

    assert chosen(Random(), "", 0, candidates, draw=draw) == choice(expected, 0, "draw")


def test_over_many_draws_each_service_gets_its_share() -> None:
    draws = [i * 2**32 // 1000 for i in range(1000)]
    candidates = weighted(a=1, b=0, c=3)

    counts = Counter(answer.service for draw in draws if (answer := chosen(Random(), "", 0, candidates, draw=draw)))

    assert counts == {"a": 250, "c": 750}


# -- least_in_flight and cost ------------------------------------------------------------------------------------------


def busy(**in_flight: int) -> list[Candidate]:
    return [Candidate(service=name, in_flight=count) for name, count in in_flight.items()]


@pytest.mark.parametrize(
    ("cursor", "candidates", "expected"),
    [
        ("a", busy(a=2, b=1, c=3), choice("b", 1, "least")),
        ("b", busy(a=2, b=1, c=3), choice("b", 5, "least")),
        # On ties the first after the cursor, cyclically, and the cursor itself as the last.
        ("a", busy(a=0, b=0, c=0), choice("b", 1, "least")),
        ("b", busy(a=0, b=0, c=0), choice("c", 1, "least")),
        ("c", busy(a=0, b=0, c=0), choice("a", 1, "least")),
        ("b", busy(a=0, b=0, c=1), choice("a", 1, "least")),
        ("b", busy(a=1, b=0), choice("b", 5, "least")),
        # Without a cursor the first candidate is the current one.
        ("", busy(a=0, b=0, c=0), choice("b", 1, "least")),
        ("gone", busy(a=0, b=1, c=1), choice("a", 1, "least")),
        # A cursor that is no candidate still has its place.
        ("b", busy(a=0, c=0), choice("c", 1, "least")),
    ],
)
def test_least_in_flight_takes_the_least_busy(cursor: str, candidates: Sequence[Candidate], expected: Choice) -> None:
    assert chosen(LeastInFlight(), cursor, 4, candidates, order="abc") == expected


def test_idle_services_are_taken_in_turn_by_least_in_flight() -> None:
    picks, cursor = "", ""
    for _ in range(6):
        answer = chosen(LeastInFlight(), cursor, 1, busy(a=0, b=0, c=0))
        assert answer is not None
        cursor = answer.service
        picks += cursor

    assert picks == "bcabca"


def priced(*rows: tuple[str, int, int]) -> list[Candidate]:
    return [Candidate(service=name, cost=cost, tokens=tokens) for name, cost, tokens in rows]


@pytest.mark.parametrize(
    ("candidates", "expected"),
    [
        (priced(("a", 9, 0), ("b", 8, 99), ("c", 8, 100)), choice("b", 1, "cheapest")),
        (priced(("a", 9, 0), ("b", 8, 99), ("c", 8, 98)), choice("c", 5, "cheapest")),
        (priced(("a", 0, 7), ("b", 0, 7), ("c", 0, 7)), choice("a", 1, "cheapest")),
    ],
)
def test_cost_takes_the_cheapest_then_the_fewest_tokens_then_the_first(
    candidates: Sequence[Candidate], expected: Choice
) -> None:
    assert chosen(Cost(), "c", 4, candidates, order="abc") == expected


# -- weighted_round_robin ----------------------------------------------------------------------------------------------


def turns(count: int, memory: str = "", order: str = "", **weights: int) -> tuple[str, str]:
    """So many picks in a row, and what is remembered after them."""
    picks, cursor = "", ""
    for _ in range(count):
        answer = choose(
            WeightedRoundRobin(),
            cursor=cursor,
            streak=0,
            order=list(order or weights),
            candidates=weighted(**weights),
            draw=0,
            memory=memory,
        )
        assert answer is not None
        assert answer.memory is not None
        cursor, memory = answer.service, answer.memory
        picks += cursor
    return picks, memory


def test_turns_by_weight_are_mixed_evenly_and_start_again_after_each_round() -> None:
    assert turns(7, a=5, b=1, c=1) == ("aabacaa", "0 0 0")
    assert turns(14, a=5, b=1, c=1) == ("aabacaa" * 2, "0 0 0")
    assert turns(3, a=5, b=1, c=1) == ("aab", "1 -4 3")


def test_turns_without_any_weight_are_equal() -> None:
    assert turns(6, a=0, b=0, c=-3) == ("abcabc", "0 0 0")


def test_who_has_no_weight_has_no_turn_beside_others() -> None:
    assert turns(5, a=0, b=2, c=0) == ("bbbbb", "0 0 0")


def test_who_is_no_candidate_keeps_its_place() -> None:
    assert turns(1, memory="1 -4 3", order="abc", a=5, b=1) == ("a", "0 -3 3")


@pytest.mark.parametrize("memory", ["", "5 5", "1 2 3 4"])
def test_a_memory_of_other_services_is_forgotten(memory: str) -> None:
    assert turns(1, memory=memory, a=1, b=1, c=1) == ("a", "-2 1 1")


@given(st.lists(st.integers(0, 20), min_size=1, max_size=8), st.integers(1, 3))
def test_in_whole_rounds_each_service_has_exactly_its_share(weights: list[int], rounds: int) -> None:
    names: dict[str, Any] = dict(zip("abcdefgh", weights, strict=False))
    shares = names if any(weights) else dict.fromkeys(names, 1)
    picks, memory = turns(rounds * sum(shares.values()), **names)

    assert Counter(picks) == Counter({name: rounds * share for name, share in shares.items() if share})
    assert set(memory.split()) == {"0"}


@given(st.lists(st.integers(1, 9), min_size=2, max_size=6), st.integers(1, 60))
def test_at_no_time_is_a_service_a_whole_pick_ahead_of_its_share(weights: list[int], count: int) -> None:
    names: dict[str, Any] = dict(zip("abcdef", weights, strict=False))
    picks, _ = turns(count, **names)

    for name, weight in names.items():
        assert picks.count(name) - Fraction(count * weight, sum(weights)) < 1


# -- latency -----------------------------------------------------------------------------------------------------------


def timed(*rows: tuple[str, int, int, int]) -> list[Candidate]:
    """Candidates: name, µs to the first token, µs for each token, and requests in flight."""
    return [
        Candidate(service=name, first_token=first, per_token=per, in_flight=in_flight)
        for name, first, per, in_flight in rows
    ]


def pair(first: int, second: int, count: int) -> int:
    """A draw of these two places among so many; the second is counted without the first."""
    high, low = -(-first * 65536 // count), -(-second * 65536 // (count - 1))
    return high * 65536 + low


SPEEDS = timed(("a", 900, 0, 0), ("b", 500, 2, 0), ("c", 100, 0, 9), ("d", 0, 0, 0))


@pytest.mark.parametrize(
    ("first", "second", "service"),
    [
        (0, 0, "a"),  # 900 µs against 500 + 2 × 200: a tie, and the first of the pair.
        (1, 0, "b"),  # The same two, the other way round.
        (0, 1, "a"),
        (2, 0, "a"),
        (1, 1, "b"),
        (3, 2, "d"),
        (2, 2, "d"),
    ],
)
def test_latency_takes_the_sooner_of_two(first: int, second: int, service: str) -> None:
    """Not measured yet is soonest: it is tried. Ten requests at 100 µs each are later than one at 900."""
    assert chosen(Latency(), "c", 4, SPEEDS, draw=pair(first, second, 4)) == choice(service, 0, "fastest")


def test_latency_weighs_tokens_by_how_long_answers_are_expected_to_be() -> None:
    candidates = timed(("a", 900, 1, 0), ("b", 100, 3, 0))
    for draw in (0, LAST_DRAW):
        assert chosen(Latency(expected_output=399), "", 0, candidates, draw=draw) == choice("b", 0, "fastest")
        assert chosen(Latency(expected_output=401), "", 0, candidates, draw=draw) == choice("a", 0, "fastest")


def test_latency_with_one_candidate_takes_that_one() -> None:
    assert chosen(Latency(), "b", 4, timed(("a", 5, 5, 5)), order="ab", draw=LAST_DRAW) == choice("a", 0, "fastest")


@given(st.integers(2, 9), st.integers(0, LAST_DRAW))
def test_latency_never_takes_the_slowest_of_all(count: int, draw: int) -> None:
    """Two different ones are compared, whatever the draw."""
    candidates = timed(*((str(i), 1 + (i == 3 % count), 0, 0) for i in range(count)))
    answer = chosen(Latency(), "", 0, candidates, draw=draw)

    assert answer is not None
    assert answer.service != str(3 % count)


def test_over_all_draws_latency_compares_every_pair_alike() -> None:
    """Of four, the fastest is in half of all pairs; the second fastest wins a third, the third a sixth."""
    candidates = timed(("a", 4, 0, 0), ("b", 3, 0, 0), ("c", 2, 0, 0), ("d", 1, 0, 0))
    draws = [pair(i, j, 4) for i in range(4) for j in range(3)]
    answers = [chosen(Latency(), "", 0, candidates, draw=draw) for draw in draws]

    assert Counter(answer.service for answer in answers if answer) == {"d": 6, "c": 4, "b": 2}


# -- one process -------------------------------------------------------------------------------------------------------


class Process:
    """A balancer in one process: an index into its services, a count of requests in a row, and what each has used.

    With every service active and one request at a time, the fleet must choose as this does.
    """

    def __init__(self, services: int) -> None:
        self.index = 0
        self.in_a_row = 0
        self.requests = [0] * services
        self.tokens = [0] * services

    def serve(self, tactic: Tactic, used: int) -> int:
        """Which service takes the request; its `used` tokens are counted when it is done."""
        match tactic:
            case RoundRobin():
                if self.in_a_row == tactic.request_threshold:
                    self.index = (self.index + 1) % len(self.requests)
                    self.in_a_row = 0
                self.in_a_row += 1
            case TokenBased():
                if self.tokens[self.index] >= tactic.token_threshold:
                    self.index = self.tokens.index(min(self.tokens))
            case Hybrid():
                is_full = self.requests[self.index] >= tactic.request_threshold
                if is_full or self.tokens[self.index] >= tactic.token_threshold:
                    scores = [10 * r + t for r, t in zip(self.requests, self.tokens, strict=True)]
                    self.index = scores.index(min(scores))
            case _:
                raise AssertionError("other tactics are compared elsewhere")
        self.requests[self.index] += 1
        self.tokens[self.index] += used
        return self.index


threshold = st.integers(1, 40)


@given(
    tactic=st.one_of(
        st.builds(RoundRobin, request_threshold=threshold),
        st.builds(TokenBased, token_threshold=threshold),
        st.builds(Hybrid, request_threshold=threshold, token_threshold=threshold),
    ),
    services=st.integers(1, 5),
    seed=st.integers(0, 2**32),
)
def test_one_request_at_a_time_is_served_as_by_a_single_process(tactic: Tactic, services: int, seed: int) -> None:
    process, usage = Process(services), random.Random(seed)
    cursor, streak = "", 0
    for _ in range(60):
        counted = zip(process.requests, process.tokens, strict=True)
        candidates = [Candidate(service=str(i), requests=r, tokens=t) for i, (r, t) in enumerate(counted)]
        answer = chosen(tactic, cursor, streak, candidates)
        assert answer is not None
        cursor, streak = answer.service, answer.streak

        assert cursor == str(process.serve(tactic, usage.choice((0, 1, 5, 30))))
