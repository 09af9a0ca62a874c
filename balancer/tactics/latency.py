"""latency: the faster one of two."""

from __future__ import annotations

from balancer.domain import Tactic
from balancer.tactics.base import Choice, View, chooses


class Latency(Tactic, frozen=True, kw_only=True, tag="latency"):
    """Draw two candidates and take the one that should answer sooner, `expected_output` tokens long."""

    expected_output: int = 200


@chooses(Latency)
def latency(tactic: Latency, view: View) -> Choice:
    """The sooner of two candidates drawn, by what they took lately and how many requests they have; one is itself.

    Two and not all: a fleet that always took the fastest would drown it.
    """
    candidates, count = view.candidates, len(view.candidates)
    if count == 1:
        return Choice(service=candidates[0].service, streak=0, reason="fastest")
    first = view.draw // 65536 * count // 65536
    second = view.draw % 65536 * (count - 1) // 65536
    second += second >= first
    scores = {
        place: (candidates[place].first_token + candidates[place].per_token * tactic.expected_output)
        * (candidates[place].in_flight + 1)
        for place in (first, second)
    }
    return Choice(service=candidates[min(scores, key=lambda place: scores[place])].service, streak=0, reason="fastest")
