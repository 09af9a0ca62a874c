"""What is counted many times a request: kept in plain Python, and handed to the metrics library now and then.

Among several workers the library writes every single increment into a file that they share, behind a lock, after it has
looked at each label and asked for the process' id: some 3 µs, ten times a request. Here it is a lookup and an addition.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable, Sequence

from prometheus_client import Counter, Histogram
from prometheus_client.metrics_core import Metric

Labels = tuple[str, ...]


class Counts:
    """A counter. What is `pending`, by label values, the library does not know yet."""

    def __init__(self, counter: Counter) -> None:
        self._counter = counter
        self.pending: defaultdict[Labels, int] = defaultdict(int)

    def flush(self) -> None:
        """Hands over what is pending."""
        pending = self.pending.copy()
        self.pending.clear()
        for labels, count in pending.items():
            self._counter.labels(*labels).inc(count)

    def collect(self) -> Iterable[Metric]:
        """The family with all that was counted."""
        self.flush()
        return self._counter.collect()


class Times:
    """A histogram of durations."""

    def __init__(self, histogram: Histogram, bounds_s: tuple[float, ...]) -> None:
        self._histogram = histogram
        self._bounds_s = bounds_s
        self._pending: dict[Labels, list[float]] = {}

    def observe(self, labels: Labels, seconds: float) -> None:
        """Counts a duration."""
        pending = self._pending.get(labels)
        if pending is None:
            # A count for each bucket, one for what is above them all, and the sum.
            pending = self._pending[labels] = [0.0] * (len(self._bounds_s) + 2)
        pending[bisect_left(self._bounds_s, seconds)] += 1
        pending[-1] += seconds

    def observe_all(self, labels: Labels, seconds: Sequence[float]) -> None:
        """Counts many durations of the same labels: for each it costs little more than sorting it in."""
        pending = self._pending.get(labels)
        if pending is None:
            pending = self._pending[labels] = [0.0] * (len(self._bounds_s) + 2)
        ordered, begin = sorted(seconds), 0
        for i, bound_s in enumerate(self._bounds_s):
            end = bisect_right(ordered, bound_s, begin)
            pending[i] += end - begin
            begin = end
        pending[-2] += len(ordered) - begin
        pending[-1] += sum(ordered)

    def flush(self) -> None:
        """Hands over what is pending."""
        pending, self._pending = self._pending, {}
        for labels, (*counts, sum_s) in pending.items():
            child = self._histogram.labels(*labels) if labels else self._histogram
            # The library's own way takes durations one by one.
            child._sum.inc(sum_s)
            for bucket, count in zip(child._buckets, counts, strict=True):
                if count:
                    bucket.inc(count)
