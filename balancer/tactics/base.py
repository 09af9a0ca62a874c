"""What every tactic is made of: what it sees, what it answers, and the list in which it is entered.

A tactic is one module beside this one (it is found by being there): a frozen struct, whose tag is its name and whose
whole numbers are its parameters, and one function, entered with `chooses`. Its twin is `lua/include/tactic/<name>.lua`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import msgspec

from balancer.domain import Candidate, Tactic

DEFAULT_REQUEST_THRESHOLD = 10
DEFAULT_TOKEN_THRESHOLD = 10_000
DRAW_RANGE = 2**32

_T = TypeVar("_T", bound=Tactic)


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """A tactic's answer: the service's id, the streak that follows, why, and what it remembers (None: as before)."""

    service: str
    streak: int
    reason: str
    memory: str | None = None


class View(msgspec.Struct, frozen=True, kw_only=True):
    """What a tactic sees: cursor, streak, its own memory, and the candidates, at least one, in the rule's order.

    `order` has the ids of all services of the rule, candidates or not. `draw` is a whole number in [0, 2^32).
    """

    cursor: str
    streak: int
    memory: str
    order: Sequence[str]
    candidates: Sequence[Candidate]
    draw: int

    @property
    def current(self) -> Candidate | None:
        """The cursor's service, None when it is no candidate."""
        return next((candidate for candidate in self.candidates if candidate.service == self.cursor), None)

    def after_cursor(self) -> list[Candidate]:
        """The candidates from the one after the cursor on, cyclically in the rule's order; the cursor is the last."""
        place = list(self.order).index(self.cursor)
        by_id = {candidate.service: candidate for candidate in self.candidates}
        turned = (*self.order[place + 1 :], *self.order[: place + 1])
        return [by_id[service] for service in turned if service in by_id]

    def choice(self, candidate: Candidate, reason: str, memory: str | None = None) -> Choice:
        """That candidate, its streak going on where it is the cursor, else begun."""
        streak = self.streak + 1 if candidate.service == self.cursor else 1
        return Choice(service=candidate.service, streak=streak, reason=reason, memory=memory)


CHOOSERS: dict[type[Tactic], Callable[[Any, View], Choice]] = {}
"""The function of each tactic."""


def chooses(tactic: type[_T]) -> Callable[[Callable[[_T, View], Choice]], Callable[[_T, View], Choice]]:
    """Enters a function as the one that chooses for a tactic."""

    def enter(function: Callable[[_T, View], Choice]) -> Callable[[_T, View], Choice]:
        CHOOSERS[tactic] = function
        return function

    return enter
