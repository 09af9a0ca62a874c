"""round_robin: a streak on each service in turn."""

from __future__ import annotations

from balancer.domain import Tactic
from balancer.tactics.base import DEFAULT_REQUEST_THRESHOLD, Choice, View, chooses


class RoundRobin(Tactic, frozen=True, kw_only=True, tag="round_robin"):
    """Stay for `request_threshold` consecutive picks, then take the next candidate."""

    request_threshold: int = DEFAULT_REQUEST_THRESHOLD


@chooses(RoundRobin)
def round_robin(tactic: RoundRobin, view: View) -> Choice:
    """The cursor up to its threshold, then the next candidate, with streak 1 even if that is the same again."""
    if view.current and view.streak < tactic.request_threshold:
        return view.choice(view.current, "streak")
    return Choice(service=view.after_cursor()[0].service, streak=1, reason="next")
