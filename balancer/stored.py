"""The texts in which a pool keeps its state in Redis, taken apart. `lua/README.md` says what is where."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

NEW_PLACE = "1 0 0"
NEW_RECORD = "off 0 -1"
NEW_SERVICE = "0 0 0 0 0 0 0|||"
NEW_METER = "0 0|"
NEW_RULE = "0 0 0 -1"
NEW_PARTITION = "0 -1 0\n\n\n"

HOT = ("in_flight", "reserved", "picks", "cooldown", "first_token", "per_token", "measured")
"""What picks change of a service, and what they read beside it."""
TOTALS = (
    "requests",
    "failures",
    "input",
    "output",
    "cached",
    "cache_creation",
    "reasoning",
    "lost",
    "lost_tokens",
    "abandoned",
    "last_used",
    "cleared",
)
"""What only the ends of attempts change."""
_RULE = ("revision", "seq", "retry_permille", "budget")
_STATE = ("streak", "tier", "hold")

Row = tuple[int, ...]


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """A service (without its totals) or a provider's meter: its counters by name, and its texts as rows of numbers."""

    counters: dict[str, int]
    windows: tuple[Row, ...] = ()
    minute: tuple[Row, ...] = ()
    breaker: Row = ()


class Partition(msgspec.Struct, frozen=True, kw_only=True):
    """What picks change of a partition."""

    streak: int
    tier: int
    hold: int
    cursor: str
    memory: str


def place(fields: Mapping[str, str]) -> tuple[int, int]:
    """Epoch and position, from the fields of the services' hash."""
    epoch, position, _ = _numbers(fields.get("place", NEW_PLACE))
    return epoch, position


def record(fields: Mapping[str, str]) -> str:
    """How events are recorded, from the fields of the services' hash."""
    return fields.get("record", NEW_RECORD).partition(" ")[0]


def service(text: str) -> Measured:
    """A service from `in_flight reserved picks cooldown first_token per_token measured|windows|minute|breaker`."""
    counters, windows, minute, breaker = text.split("|")
    return Measured(
        counters=dict(zip(HOT, _numbers(counters), strict=True)),
        windows=rows(windows),
        minute=_steps(minute),
        breaker=_numbers(breaker),
    )


def meter(text: str) -> Measured:
    """A provider's meter from `in_flight reserved|minute`."""
    counters, minute = text.split("|")
    return Measured(counters=dict(zip(HOT[:2], _numbers(counters), strict=True)), minute=_steps(minute))


def totals(text: str) -> dict[str, int]:
    """A service's totals by name."""
    return dict(zip(TOTALS, _numbers(text), strict=True))


def rule(text: str) -> dict[str, int]:
    """A rule's `revision seq retry_permille budget` by name; the budget is -1 as long as it was never used."""
    return dict(zip(_RULE, _numbers(text), strict=True))


def tactic(text: str) -> tuple[str, int, str]:
    """A partition's tactic, whether it refuses, and its parameters, from `tactic top refuses params`."""
    name, _, refuses, params = text.split(" ", 3)
    return name, int(refuses), params


def partition(text: str) -> Partition:
    """A partition from a line of `streak tier hold`, its cursor, the cursor's line, and what its tactic remembers."""
    numbers, cursor, _, memory = text.split("\n", 3)
    return Partition(**dict(zip(_STATE, _numbers(numbers), strict=True)), cursor=cursor, memory=memory)


def rows(text: str) -> tuple[Row, ...]:
    """Rows of numbers joined by blanks, from rows joined by `;`."""
    return tuple(_numbers(row) for row in text.split(";") if row)


def _steps(text: str) -> tuple[Row, ...]:
    """A minute's `step requests tokens`, the oldest first, from its sums, its last step and the steps before that."""
    if not text:
        return ()
    head, _, older = text.partition(";")
    return (*rows(older), _numbers(head)[2:])


def _numbers(text: str) -> Row:
    return tuple(map(int, text.split()))
