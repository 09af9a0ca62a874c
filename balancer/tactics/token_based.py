"""token_based: stay until so many tokens are used."""

from __future__ import annotations

from balancer.domain import Tactic
from balancer.tactics.base import DEFAULT_TOKEN_THRESHOLD, Choice, View, chooses


class TokenBased(Tactic, frozen=True, kw_only=True, tag="token_based"):
    """Stay below `token_threshold` window tokens, then take the candidate with the fewest."""

    token_threshold: int = DEFAULT_TOKEN_THRESHOLD


@chooses(TokenBased)
def token_based(tactic: TokenBased, view: View) -> Choice:
    """The cursor below its threshold, else the candidate with the fewest tokens, the first on ties."""
    if view.current and view.current.tokens < tactic.token_threshold:
        return view.choice(view.current, "threshold")
    return view.choice(min(view.candidates, key=lambda candidate: candidate.tokens), "least")
