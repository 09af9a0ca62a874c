"""What a relay tells of the attempt whose answer passes through it."""

from __future__ import annotations

from typing import Protocol

from balancer.details import Details
from balancer.domain import Outcome, Usage


class Accounting(Protocol):
    """The attempt that is being relayed."""

    usage: Usage | None
    is_stream: bool
    details: Details | None
    """Listens to what the answer says of itself, where somebody wants to know."""

    def settle(self, outcome: Outcome, cooldown_ms: int = 0) -> None:
        """Settles the attempt; only the first call counts."""

    async def settle_before_last_byte(self, outcome: Outcome, cooldown_ms: int = 0) -> None:
        """Settles, and returns when the rest may be sent."""

    def saw_token(self) -> None:
        """Notes the first content token."""


class Uncounted:
    """Stands in for the attempt where nothing is counted."""

    usage: Usage | None = None
    is_stream = False
    details: Details | None = None

    def settle(self, outcome: Outcome, cooldown_ms: int = 0) -> None:
        """Nothing to settle."""

    async def settle_before_last_byte(self, outcome: Outcome, cooldown_ms: int = 0) -> None:
        """Nothing to settle."""

    def saw_token(self) -> None:
        """Nothing to note."""
