"""Counters in Redis, changed by hand."""

from __future__ import annotations

import re

from balancer.stored import HOT, NEW_SERVICE, TOTALS


def field(service: str, name: str) -> str:
    """The field of the services' hash that has this counter of a service."""
    return f"{'totals' if name in TOTALS else 'service'}:{service}"


def with_added(text: bytes | None, name: str, by: int) -> str:
    """The field's text with that much more in the counter, of a new service where there is none."""
    names = TOTALS if name in TOTALS else HOT
    numbers = list(re.finditer(r"-?\d+", old := text.decode() if text else NEW_SERVICE))
    found = numbers[names.index(name)]
    return f"{old[: found.start()]}{int(found[0]) + by}{old[found.end() :]}"
