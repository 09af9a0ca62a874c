"""cost: the cheapest."""

from __future__ import annotations

from balancer.domain import Tactic
from balancer.tactics.base import Choice, View, chooses


class Cost(Tactic, frozen=True, kw_only=True, tag="cost"):
    """Take the cheapest candidate."""


@chooses(Cost)
def cost(_: Cost, view: View) -> Choice:
    """The candidate of the least cost; on ties the one with the fewest window tokens, then the first."""
    return view.choice(min(view.candidates, key=lambda candidate: (candidate.cost, candidate.tokens)), "cheapest")
