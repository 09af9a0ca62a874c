"""random: a draw."""

from __future__ import annotations

from balancer.domain import Tactic
from balancer.tactics.base import DRAW_RANGE, Choice, View, chooses


class Random(Tactic, frozen=True, kw_only=True, tag="random"):
    """Draw by weight."""


@chooses(Random)
def random(_: Random, view: View) -> Choice:
    """The candidate on whose share of the weights the draw falls; all zero means equal shares."""
    candidates = view.candidates
    weights = [max(candidate.weight, 0) for candidate in candidates]
    total = sum(weights)
    # The product is taken in doubles on both sides, so that large weights round alike in Lua and here.
    if total == 0:
        index = int(float(view.draw) * len(candidates) / DRAW_RANGE)
        return Choice(service=candidates[index].service, streak=0, reason="draw")
    left = int(float(view.draw) * total / DRAW_RANGE)
    for candidate, weight in zip(candidates, weights, strict=True):
        left -= weight
        if left < 0:
            return Choice(service=candidate.service, streak=0, reason="draw")
    raise AssertionError("a draw below 2^32 always falls on a candidate")
