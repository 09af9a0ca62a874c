"""hybrid: stay until so many requests or tokens are used."""

from __future__ import annotations

from balancer.domain import Tactic
from balancer.tactics.base import DEFAULT_REQUEST_THRESHOLD, DEFAULT_TOKEN_THRESHOLD, Choice, View, chooses


class Hybrid(Tactic, frozen=True, kw_only=True, tag="hybrid"):
    """Stay below both thresholds of the window, then take the candidate with the least requests × 10 + tokens."""

    request_threshold: int = DEFAULT_REQUEST_THRESHOLD
    token_threshold: int = DEFAULT_TOKEN_THRESHOLD


@chooses(Hybrid)
def hybrid(tactic: Hybrid, view: View) -> Choice:
    """The cursor below both thresholds, else the least used candidate, the first on ties."""
    current = view.current
    if current and current.requests < tactic.request_threshold and current.tokens < tactic.token_threshold:
        return view.choice(current, "threshold")
    return view.choice(min(view.candidates, key=lambda candidate: candidate.requests * 10 + candidate.tokens), "least")
