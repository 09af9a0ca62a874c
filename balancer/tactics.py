"""The tactics in pure Python: the reference that the scripts are held to, and the simulator.

A tactic looks at the cursor, the streak and the candidates (in the rule's order) and says which candidate is picked.
The twins in Lua are `lua/include/tactic/*.lua`; a new tactic is one include there, one function here, and its struct.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import assert_never

import msgspec

from balancer.domain import Candidate, Hybrid, Random, RoundRobin, Tactic, TokenBased

DRAW_RANGE = 2**32


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """A tactic's answer: the service's id, the streak that follows, and why."""

    service: str
    streak: int
    reason: str


def choose(
    tactic: Tactic, *, cursor: str, streak: int, order: Sequence[str], candidates: Sequence[Candidate], draw: int
) -> Choice | None:
    """The tactic's choice, or None without a candidate.

    `order` has the ids of all services of the rule, candidates or not: round_robin goes on after a cursor that is no
    candidate. `draw` is a whole number in [0, 2^32). Without a cursor the first candidate is the current one, streak 0.
    """
    if not candidates:
        return None
    if not cursor or cursor not in order:
        cursor, streak = candidates[0].service, 0
    current = next((candidate for candidate in candidates if candidate.service == cursor), None)
    match tactic:
        case RoundRobin():
            return _round_robin(tactic, current, streak, cursor, order, candidates)
        case TokenBased():
            return _token_based(tactic, current, streak, cursor, candidates)
        case Hybrid():
            return _hybrid(tactic, current, streak, cursor, candidates)
        case Random():
            return _random(candidates, draw)
        case _:
            assert_never(tactic)


def _round_robin(
    tactic: RoundRobin,
    current: Candidate | None,
    streak: int,
    cursor: str,
    order: Sequence[str],
    candidates: Sequence[Candidate],
) -> Choice:
    if current and streak < tactic.request_threshold:
        return Choice(service=cursor, streak=streak + 1, reason="streak")
    place = list(order).index(cursor)
    allowed = {candidate.service for candidate in candidates}
    following = next(service for service in (*order[place + 1 :], *order[: place + 1]) if service in allowed)
    return Choice(service=following, streak=1, reason="next")


def _token_based(
    tactic: TokenBased, current: Candidate | None, streak: int, cursor: str, candidates: Sequence[Candidate]
) -> Choice:
    if current and current.tokens < tactic.token_threshold:
        return Choice(service=cursor, streak=streak + 1, reason="threshold")
    least = min(candidates, key=lambda candidate: candidate.tokens)
    return Choice(service=least.service, streak=streak + 1 if least.service == cursor else 1, reason="least")


def _hybrid(
    tactic: Hybrid, current: Candidate | None, streak: int, cursor: str, candidates: Sequence[Candidate]
) -> Choice:
    if current and current.requests < tactic.request_threshold and current.tokens < tactic.token_threshold:
        return Choice(service=cursor, streak=streak + 1, reason="threshold")
    least = min(candidates, key=lambda candidate: candidate.requests * 10 + candidate.tokens)
    return Choice(service=least.service, streak=streak + 1 if least.service == cursor else 1, reason="least")


def _random(candidates: Sequence[Candidate], draw: int) -> Choice:
    weights = [max(candidate.weight, 0) for candidate in candidates]
    total = sum(weights)
    # The product is taken in doubles on both sides, so that large weights round alike in Lua and here.
    if total == 0:
        index = int(float(draw) * len(candidates) / DRAW_RANGE)
        return Choice(service=candidates[index].service, streak=0, reason="draw")
    left = int(float(draw) * total / DRAW_RANGE)
    for candidate, weight in zip(candidates, weights, strict=True):
        left -= weight
        if left < 0:
            return Choice(service=candidate.service, streak=0, reason="draw")
    raise AssertionError("a draw below 2^32 always falls on a candidate")
