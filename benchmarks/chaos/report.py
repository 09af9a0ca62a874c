"""What a run has shown, for people and as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import msgspec

from benchmarks.chaos.books import Balance


class Latency(msgspec.Struct, frozen=True, kw_only=True):
    """Milliseconds to the first byte of an answer, of so many requests."""

    requests: int
    p50_ms: float
    p99_ms: float


class Growth(msgspec.Struct, frozen=True, kw_only=True):
    """A fleet's workers at rest, before and after: the greatest of each."""

    rss_mib: tuple[float, float]
    fds: tuple[int, int]


class Bar(msgspec.Struct, frozen=True, kw_only=True):
    """Something that must hold."""

    name: str
    holds: bool
    detail: str


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """One run on one store."""

    store: str
    seed: int
    seconds: float
    behind: str
    requests: int
    ends: dict[str, int]
    errors: dict[str, int]
    without_cause: list[str]
    faults: dict[str, int]
    latency: dict[str, Latency]
    growth: Growth
    slope_mib_per_h: float | None
    balance: Balance
    violations: list[str]
    needless: list[str]
    """Answers without the store, which was there."""
    bars: list[Bar]

    @property
    def is_right(self) -> bool:
        """True when every bar is met."""
        return all(bar.holds for bar in self.bars)


def latency(milliseconds: Sequence[float]) -> Latency:
    """The quantiles of some measurements."""
    ordered = sorted(milliseconds) or [0.0]

    def quantile(share: float) -> float:
        return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 1)

    return Latency(requests=len(milliseconds), p50_ms=quantile(0.5), p99_ms=quantile(0.99))


def show(report: Report) -> None:
    """Prints it."""
    print(
        f"{report.store}: {report.requests} requests in {report.seconds:.0f} s, {report.behind}, seed {report.seed}\n"
        f"  faults: {_counts(report.faults)}\n"
        f"  ends: {_counts(report.ends)}\n"
        f"  errors by cause: {_counts(report.errors) or 'none'}; without a cause: {len(report.without_cause)}"
    )
    for text in report.without_cause[:20]:
        print(f"    NO CAUSE: {text}")
    print(f"  {'ms to the first byte':32}{'requests':>10}{'p50':>9}{'p99':>9}")
    for name, row in report.latency.items():
        print(f"    {name:30}{row.requests:>10}{row.p50_ms:>9}{row.p99_ms:>9}")
    growth = report.growth
    print(
        f"  workers at rest: {growth.rss_mib[0]:.1f} MiB and {growth.fds[0]} files before, "
        f"{growth.rss_mib[1]:.1f} MiB and {growth.fds[1]} after"
        + (f"; slope {report.slope_mib_per_h:+.2f} MiB/h" if report.slope_mib_per_h is not None else "")
    )
    print(f"  {'service':32}{'seen':>8}{'settled':>9}{'lost':>6}{'their tokens':>14}{'ours':>12}")
    for service, count in sorted(report.balance.rows.items()):
        print(f"    {service:30}{count.seen:>8}{count.settled:>9}{count.lost:>6}{count.theirs:>14}{count.ours:>12}")
    for bar in report.bars:
        print(f"  {'holds' if bar.holds else 'MISSED'}: {bar.name} ({bar.detail})")
    for fault in (*report.balance.faults[:20], *report.violations[:5], *report.needless[:5]):
        print(f"    WRONG: {fault}")
    print(f"  {'right' if report.is_right else 'WRONG'}", flush=True)


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())


def counted(names: Sequence[str]) -> dict[str, int]:
    """How often each name occurs, by name."""
    return dict(sorted(Counter(names).items()))
