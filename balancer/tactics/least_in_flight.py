"""least_in_flight: whoever is least busy."""

from __future__ import annotations

from balancer.domain import Tactic
from balancer.tactics.base import Choice, View, chooses


class LeastInFlight(Tactic, frozen=True, kw_only=True, tag="least_in_flight"):
    """Take the candidate with the fewest requests in flight."""


@chooses(LeastInFlight)
def least_in_flight(_: LeastInFlight, view: View) -> Choice:
    """The candidate with the fewest requests in flight; on ties the first after the cursor."""
    return view.choice(min(view.after_cursor(), key=lambda candidate: candidate.in_flight), "least")
