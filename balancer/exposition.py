"""What Prometheus reads: the numbers of all slots put together, in the classic text format or as OpenMetrics.

prometheus_client writes both formats. Thousands of services are hundreds of thousands of lines; everything here is done
in steps, a few rows each.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import msgspec
from prometheus_client import exposition as classic
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector
from prometheus_client.samples import Exemplar, Sample

from balancer.cells import BEATS_AT, Records, Row, Seen, Slot, slots_in
from balancer.steps import Steps

CLASSIC_TYPE = classic.CONTENT_TYPE_PLAIN_0_0_4
OPEN_TYPE = openmetrics.CONTENT_TYPE_LATEST
_OPEN_VERSIONS = ("", "0.0.1", "1.0.0")
_ROWS_A_STEP = 16
_SAMPLES_A_STEP = 100
_END = b"# EOF\n"
_BEAT_S = 10.0
"""A worker that has given no sign of life for so long answers nobody."""

Source = Literal["counted", "worker", "fleet", "configuration"]
Exemplars = Mapping[int, tuple[float, Records, int]]
"""By place in the sum: when, and which of some slot's records."""
Lines = Mapping[str, Sequence[str]]
"""Of families by name: their samples, each a line that ends. Gauges look alike in both formats."""


class Family(msgspec.Struct, frozen=True, kw_only=True):
    """A series as it is exported. `across` is how it adds up: over the workers of a pod, and over pods.

    A state that `needs_beat` is that of a worker which has given a sign of life in the last seconds.
    """

    name: str
    type: Literal["counter", "gauge", "histogram"]
    labels: tuple[str, ...]
    help: str
    unit: str
    source: Source
    across: Literal["sum", "min", "max"]
    buckets: tuple[float, ...] = ()
    has_exemplars: bool = False
    needs_beat: bool = False

    @property
    def width(self) -> int:
        """How many cells a row of it has: those of a histogram count each bucket, what is above them, and the sum."""
        return len(self.buckets) + 2 if self.type == "histogram" else 1

    @property
    def exemplars(self) -> int:
        """How many of them have exemplars."""
        return max(1, self.width - 1) if self.has_exemplars else 0

    def metric(self, samples: Sequence[Sample] = ()) -> Metric:
        """The family with these samples, as prometheus_client writes it."""
        name = self.name.removesuffix("_total") if self.type == "counter" else self.name
        metric = Metric(name, self.help, self.type, self.unit if name.endswith(f"_{self.unit}") else "")
        metric.samples = list(samples)
        return metric


def escaped(label: str) -> str:
    """A label's value as it stands between quotes."""
    return label.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


def is_open_wanted(accepts: Sequence[str]) -> bool:
    """True when the values of Accept ask for OpenMetrics, and rather for that than for plain text."""
    best: dict[bool, float] = {}
    for item in ",".join(accepts).split(","):
        kind, *parameters = (part.strip().lower() for part in item.split(";"))
        given = dict(parameter.partition("=")[::2] for parameter in parameters)
        is_open = kind == "application/openmetrics-text"
        if is_open and given.get("version", "").strip('"') not in _OPEN_VERSIONS:
            continue
        if not is_open and kind not in ("text/plain", "text/*"):
            continue
        try:
            quality = float(given.get("q", "1"))
        except ValueError:
            continue
        best[is_open] = max(best.get(is_open, 0.0), quality)
    return best.get(True, 0.0) > 0 and best[True] >= best.get(False, 0.0)


class _Place(msgspec.Struct, frozen=True, gc=False):
    """Where a row of a slot is, and where in the sum; its first exemplar there; and how it adds up."""

    begin: int
    to: int
    width: int
    record: int
    exemplars: int
    combine: Callable[[float, float], float] | None
    """None for what is counted, and stays when its worker is gone."""
    needs_beat: bool


class _Known(msgspec.Struct):
    """A slot, and the places of its rows so far."""

    seen: Seen
    places: list[_Place]


class Scrape:
    """Adds up what the slots say, and writes it. It remembers where everything is from one scrape to the next."""

    def __init__(self, families: Sequence[Family], slot: Slot, folder: Path | None) -> None:
        self._families = families
        self._by_name = {family.name: family for family in families}
        self._slot = slot
        self._folder = folder
        self._known: dict[int, _Known] = {}
        self._own: list[_Place] = []
        self._to: dict[Row, int] = {}
        self._rows: dict[str, list[tuple[dict[str, str], int]]] = {family.name: [] for family in families}
        """Of each family the rows: labels, and the place in the sum."""
        self._size = 0

    def written(self, gauges: Sequence[Lines], *, is_open: bool) -> Steps[bytes]:
        """The whole text, in steps; `gauges` are the lines of families that no slot has."""
        sums, exemplars = yield from self._added_up(with_exemplars=is_open)
        write = openmetrics.generate_latest if is_open else classic.generate_latest
        text = bytearray()
        for family in self._families:
            text += _without_end(write(_Only(family.metric())))
            rows = [(labels, place) for labels, place in self._rows[family.name] if place < len(sums)]
            at_once = max(1, _SAMPLES_A_STEP // family.width)
            for i in range(0, len(rows), at_once):
                samples = [s for row in rows[i : i + at_once] for s in _samples(family, *row, sums, exemplars)]
                text += _without_head(_without_end(write(_Only(family.metric(samples)))))
                yield
            for lines in gauges:
                text += "".join(lines.get(family.name, ())).encode()
            yield
        if is_open:
            text += _END
        return bytes(text)

    def _added_up(self, *, with_exemplars: bool) -> Steps[tuple[list[float], Exemplars]]:
        """The numbers of all slots in one, in the slots' order: a sum of doubles must not depend on who adds."""
        looks = list(self._looks())
        sums = [math.nan] * self._size
        exemplars: dict[int, tuple[float, Records, int]] = {}
        for known, numbers, is_alive in looks:
            places = self._own if known is None else known.places
            is_beating = is_alive and time.monotonic() - numbers[BEATS_AT] < _BEAT_S
            yield
            for i, place in enumerate(list(places)):
                begin, to, combine = place.begin, place.to, place.combine
                if begin + place.width > len(numbers) or to >= len(sums):
                    continue
                if combine is None:
                    is_first = math.isnan(sums[to])
                    for j in range(place.width):
                        sums[to + j] = numbers[begin + j] if is_first else sums[to + j] + numbers[begin + j]
                elif (is_beating if place.needs_beat else is_alive) and not math.isnan(numbers[begin]):
                    sums[to] = numbers[begin] if math.isnan(sums[to]) else combine(sums[to], numbers[begin])
                if not i % _ROWS_A_STEP:
                    yield
            if with_exemplars:
                found = Records(bytes(self._slot.exemplars)) if known is None else known.seen.exemplars()
                yield
                count = len(found)
                for i, place in enumerate(list(places)):
                    to = place.to
                    for record in range(place.record, min(place.record + place.exemplars, count)):
                        time_s = found.time_s(record)
                        if time_s and (to not in exemplars or exemplars[to][0] < time_s):
                            exemplars[to] = time_s, found, record
                        to += 1
                    if not i % _ROWS_A_STEP:
                        yield
        return sums, exemplars

    def _looks(self) -> Iterator[tuple[_Known | None, Sequence[float], bool]]:
        """Each slot, None for one in memory, with its numbers, and whether its worker lives."""
        if self._folder is None:
            self._learn(self._own, self._slot.rows, self._slot.records)
            yield None, list(self._slot.numbers), True
            return
        for number in slots_in(self._folder):
            known = self._known.get(number)
            if known is None:
                known = self._known[number] = _Known(Seen(self._folder, number), [])
            numbers, is_alive = known.seen.look()
            self._learn(known.places, known.seen.rows, known.seen.records)
            yield known, numbers, is_alive

    def _learn(self, places: list[_Place], rows: Sequence[tuple[Row, int]], records: Sequence[int]) -> None:
        """Notes where the rows are that are new since the last time."""
        for i in range(len(places), len(rows)):
            row, begin = rows[i]
            family = self._by_name.get(row.family)
            if family is None or (family.width, len(family.labels)) != (row.width, len(row.labels)):
                # Of another version of the program, which was replaced under the same supervisor.
                places.append(_Place(begin, 0, 0, 0, 0, None, False))
                continue
            to = self._to.get(row)
            if to is None:
                to = self._to[row] = self._size
                self._size += row.width
                self._rows[family.name].append((dict(zip(family.labels, row.labels, strict=True)), to))
            combine = _COMBINE[family.across] if family.type == "gauge" else None
            places.append(_Place(begin, to, row.width, records[i], row.exemplars, combine, family.needs_beat))


def _add(first: float, second: float) -> float:
    return first + second


_COMBINE: Mapping[str, Callable[[float, float], float]] = {"sum": _add, "min": min, "max": max}


class _Only(Collector):
    """One family."""

    def __init__(self, metric: Metric) -> None:
        self._metric = metric

    def collect(self) -> Iterator[Metric]:
        yield self._metric


def _samples(
    family: Family, labels: dict[str, str], place: int, sums: Sequence[float], exemplars: Exemplars
) -> Iterator[Sample]:
    """The samples of a row; none of a state that nobody has any more."""
    if math.isnan(sums[place]):
        return
    if family.type != "histogram":
        yield Sample(family.name, labels, sums[place], None, _exemplar(exemplars, place))
        return
    count = 0.0
    for i, bound in enumerate((*map(str, family.buckets), "+Inf"), place):
        count += sums[i]
        yield Sample(f"{family.name}_bucket", labels | {"le": bound}, count, None, _exemplar(exemplars, i))
    yield Sample(f"{family.name}_count", labels, count)
    yield Sample(f"{family.name}_sum", labels, sums[place + family.width - 1])


def _exemplar(exemplars: Exemplars, place: int) -> Exemplar | None:
    found = exemplars.get(place) if exemplars else None
    return Exemplar(*found[1].told(found[2])) if found is not None else None


def _without_head(text: bytes) -> bytes:
    """The samples without the lines before them, of which each family has one set."""
    at = 0
    while text.startswith(b"#", at):
        at = text.index(b"\n", at) + 1
    return text[at:]


def _without_end(text: bytes) -> bytes:
    return text.removesuffix(_END)
