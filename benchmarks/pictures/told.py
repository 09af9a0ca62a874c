"""What Prometheus said of a fleet's life, and which of it is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from tests.fleet.watched import Phase
from tests.prometheus import Series

PICTURES: Mapping[str, tuple[str, Sequence[Sequence[str]]]] = {
    "overview": (
        "balancer-overview",
        (
            (
                "Requests",
                "First token, p95",
                "Tokens",
                "Open requests",
                "Ready workers",
                "Store",
                "Services left alone",
            ),
            ("Requests by rule", "Requests by outcome"),
            ("First token", "What we add", "Workers"),
        ),
    ),
    "switching": (
        "balancer-rules",
        (("Current service",), ("Streak", "Share of the picks"), ("Switches", "Picks by reason")),
    ),
    "services": (
        "balancer-services",
        (("Tokens in the window", "Attempts by outcome"), ("Breaker",), ("Cooldown", "Failing attempts")),
    ),
    "store": (
        "balancer-store",
        (
            ("Store by pod", "Select"),
            ("Degraded picks", "Outbox", "Age of the outbox"),
            ("Epoch", "Stale picks", "Workers"),
        ),
    ),
    "clients": (
        "balancer-clients",
        (("By outcome", "Refused"), ("Limits used", "Retries by rule"), ("Tokens by rule", "Cost an hour by service")),
    ),
}
"""Which panels of which dashboard are on a picture, line by line."""


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
