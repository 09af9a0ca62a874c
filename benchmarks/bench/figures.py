"""Medians over rounds, and ratios to others that were measured in the same round."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable

from benchmarks.bench.measuring import Phase, Row

Value = Callable[[Row], float]


def per_s(row: Row) -> float:
    """Requests a second."""
    return row.load.per_s


def cpu_us(row: Row) -> float:
    """CPU for a request in µs."""
    return row.cpu_us


def redis_us(row: Row) -> float:
    """CPU of Redis for a request in µs."""
    return row.redis_us


def scripts_us(row: Row) -> float:
    """What scripts used for a request in µs, as Redis counts it."""
    return row.scripts_us


def p50_ms(row: Row) -> float:
    """Median time of a request."""
    return row.load.p50_ms


def p99_ms(row: Row) -> float:
    """Time that one request in a hundred exceeds."""
    return row.load.p99_ms


def ttfb_ms(row: Row) -> float:
    """Median time until a body's first byte."""
    return row.load.ttfb_p50_ms


def memory_mib(row: Row) -> float:
    """Memory."""
    return row.memory_mib


class Figures:
    """Rows by contestant, phase and round. Rows in which nothing was right are no figures."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.rows = list(rows)
        self._by_place = {(row.contestant, row.phase, row.round): row for row in self.rows if row.load.all_right}

    @property
    def contestants(self) -> list[str]:
        """Their names, in the order in which they first were measured."""
        return list(dict.fromkeys(row.contestant for row in self.rows))

    @property
    def rounds(self) -> int:
        """How many there were."""
        return len({row.round for row in self.rows})

    def median(self, contestant: str, phase: Phase, value: Value) -> float | None:
        """The median over the rounds, None if there is none."""
        return _median(value(row) for row in self._rows(contestant, phase).values())

    def ratio(self, contestant: str, other: str, phase: Phase, value: Value) -> float | None:
        """How many times as much as the other in the same round; the median over the rounds both were measured in."""
        return self.ratio_of_phases((contestant, phase), (other, phase), value)

    def ratio_of_phases(self, one: tuple[str, Phase], other: tuple[str, Phase], value: Value) -> float | None:
        """The same for two contestants in two phases."""
        others = self._rows(*other)
        pairs = [(value(row), value(others[round_])) for round_, row in self._rows(*one).items() if round_ in others]
        return _median(mine / theirs for mine, theirs in pairs if theirs)

    def added(self, contestant: str, other: str, phase: Phase, value: Value) -> float | None:
        """How much more than the other in the same round; the median over the rounds."""
        others = self._rows(other, phase)
        mine = self._rows(contestant, phase)
        return _median(value(row) - value(others[round_]) for round_, row in mine.items() if round_ in others)

    def wrong(self, contestant: str) -> int:
        """Answers that were not right, over all rounds and phases."""
        return sum(row.load.wrong for row in self.rows if row.contestant == contestant)

    def silent(self, contestant: str) -> list[str]:
        """The phases in which, in some round, no answer was right."""
        own = (row for row in self.rows if row.contestant == contestant and not row.load.all_right)
        return list(dict.fromkeys(row.phase for row in own))

    def complaint(self, contestant: str) -> str:
        """The first of those answers, as far as it was kept."""
        found = (row.load.complaint for row in self.rows if row.contestant == contestant and row.load.complaint)
        return next(found, "")

    def _rows(self, contestant: str, phase: Phase) -> dict[int, Row]:
        wanted = (contestant, phase.name)
        return {place[2]: row for place, row in self._by_place.items() if place[:2] == wanted}


def _median(values: Iterable[float]) -> float | None:
    listed = list(values)
    return statistics.median(listed) if listed else None
