"""The tactics, against the contract's rules one by one, and against a single process that rotates by itself."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balancer.domain import Candidate, Tactic
from balancer.tactics import Choice, Hybrid, Random, RoundRobin, TokenBased, choose

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


@pytest.mark.parametrize("tactic", [RoundRobin(), TokenBased(), Hybrid(), Random()])
def test_without_a_candidate_there_is_no_choice(tactic: Tactic) -> None:
    assert chosen(tactic, "", 0, []) is None
    assert chosen(tactic, "a", 3, [], order="ab") is None


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
