"""What Prometheus said of a fleet's life: all that is drawn."""

from __future__ import annotations

import msgspec

from tests.fleet.watched import Phase
from tests.prometheus import Series


class Told(msgspec.Struct, frozen=True, kw_only=True):
    """The answers to the panels' queries by their names, the marks in all graphs, and what happened when."""

    start: float
    end: float
    phases: list[Phase]
    answers: dict[str, list[Series]]
    marks: dict[str, list[Series]]

    @property
    def faults(self) -> list[Phase]:
        """What happened, in order."""
        whole = ("calm", "faults", "mended", "after the snapshot")
        return sorted((p for p in self.phases if p.name not in whole), key=lambda phase: phase.start)
