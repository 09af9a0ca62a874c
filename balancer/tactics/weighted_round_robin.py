"""weighted_round_robin: exact shares, evenly mixed."""

from __future__ import annotations

from balancer.domain import Tactic
from balancer.tactics.base import Choice, View, chooses


class WeightedRoundRobin(Tactic, frozen=True, kw_only=True, tag="weighted_round_robin"):
    """Take turns by weight: of as many picks as all weights together, each service gets its own weight's."""


@chooses(WeightedRoundRobin)
def weighted_round_robin(_: WeightedRoundRobin, view: View) -> Choice:
    """The candidate that is furthest behind its share, the first on ties.

    The memory is how far each service of the rule is behind, in its order. All weights zero means equal shares.
    """
    behind = [int(word) for word in view.memory.split()]
    if len(behind) != len(view.order):
        behind = [0] * len(view.order)
    weights = {candidate.service: max(candidate.weight, 0) for candidate in view.candidates}
    if not any(weights.values()):
        weights = dict.fromkeys(weights, 1)
    places = {service: place for place, service in enumerate(view.order)}
    for service, weight in weights.items():
        behind[places[service]] += weight
    chosen = max(view.candidates, key=lambda candidate: behind[places[candidate.service]])
    behind[places[chosen.service]] -= sum(weights.values())
    return view.choice(chosen, "turn", memory=" ".join(map(str, behind)))
