"""What is counted many times a request: kept in plain Python, and brought into the cells that are shared now and then.

For a request it is a lookup and an addition. `flush` does the rest for all of a tenth of a second at once.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Mapping, Sequence

from balancer.cells import Exemplar, Row, Slot

Labels = tuple[str, ...]


class Counts:
    """A counter. What is `pending`, by label values, nobody else knows yet."""

    def __init__(self, slot: Slot, family: str, *, has_exemplars: bool = False) -> None:
        self._slot = slot
        self._family = family
        self._exemplars = int(has_exemplars)
        self._rows: dict[Labels, Row] = {}
        self.pending: defaultdict[Labels, int] = defaultdict(int)
        self._examples: dict[Labels, Exemplar] = {}

    def _row(self, labels: Labels) -> Row:
        row = self._rows.get(labels)
        if row is None:
            row = self._rows[labels] = Row(self._family, labels, 1, self._exemplars)
        return row

    def exemplify(self, labels: Labels, exemplar: Exemplar) -> None:
        """Keeps one that was counted, in place of the one before."""
        self._examples[labels] = exemplar

    def flush(self) -> None:
        """Brings what is pending into the cells."""
        slot = self._slot
        if self.pending:
            pending = self.pending.copy()
            self.pending.clear()
            for labels, count in pending.items():
                place = slot.place(self._row(labels))
                slot.numbers[place] += count
        if self._examples:
            examples, self._examples = self._examples, {}
            for labels, exemplar in examples.items():
                slot.exemplify(self._row(labels), 0, exemplar)

    def totals(self) -> Mapping[Labels, float]:
        """All that was counted in this slot, by label values."""
        self.flush()
        return {row.labels: self._slot.numbers[place] for row, place in self._slot.rows if row.family == self._family}


class Times:
    """A histogram of durations."""

    def __init__(self, slot: Slot, family: str, bounds_s: tuple[float, ...], *, has_exemplars: bool = False) -> None:
        self._slot = slot
        self._family = family
        self._bounds_s = bounds_s
        # A count for each bucket, one for what is above them all, and the sum.
        self._width = len(bounds_s) + 2
        self._exemplars = len(bounds_s) + 1 if has_exemplars else 0
        self._rows: dict[Labels, Row] = {}
        self._pending: dict[Labels, list[float]] = {}
        self._examples: dict[tuple[Labels, int], Exemplar] = {}

    def _row(self, labels: Labels) -> Row:
        row = self._rows.get(labels)
        if row is None:
            row = self._rows[labels] = Row(self._family, labels, self._width, self._exemplars)
        return row

    def observe(self, labels: Labels, seconds: float) -> None:
        """Counts a duration."""
        pending = self._pending.get(labels)
        if pending is None:
            pending = self._pending[labels] = [0.0] * self._width
        pending[bisect_left(self._bounds_s, seconds)] += 1
        pending[-1] += seconds

    def observe_all(self, labels: Labels, seconds: Sequence[float]) -> None:
        """Counts many durations of the same labels: for each it costs little more than sorting it in."""
        pending = self._pending.get(labels)
        if pending is None:
            pending = self._pending[labels] = [0.0] * self._width
        ordered, begin = sorted(seconds), 0
        for i, bound_s in enumerate(self._bounds_s):
            end = bisect_right(ordered, bound_s, begin)
            pending[i] += end - begin
            begin = end
        pending[-2] += len(ordered) - begin
        pending[-1] += sum(ordered)

    def exemplify(self, labels: Labels, exemplar: Exemplar) -> None:
        """Keeps the duration in its bucket, unless a longer one of the same moment is there."""
        key = labels, bisect_left(self._bounds_s, exemplar.value)
        held = self._examples.get(key)
        if held is None or held.value < exemplar.value:
            self._examples[key] = exemplar

    def flush(self) -> None:
        """Brings what is pending into the cells."""
        slot = self._slot
        if self._pending:
            pending, self._pending = self._pending, {}
            for labels, numbers in pending.items():
                place = slot.place(self._row(labels))
                cells = slot.numbers
                for i, number in enumerate(numbers, place):
                    if number:
                        cells[i] += number
        if self._examples:
            examples, self._examples = self._examples, {}
            for (labels, bucket), exemplar in examples.items():
                slot.exemplify(self._row(labels), bucket, exemplar)


class Level:
    """A gauge of this worker."""

    def __init__(self, slot: Slot, family: str) -> None:
        self._slot = slot
        self._family = family

    def set(self, value: float, *labels: str) -> None:
        """Sets it, for all to see."""
        place = self._slot.place(Row(self._family, labels))
        self._slot.numbers[place] = value
