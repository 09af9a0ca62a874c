"""docs/metrics.md: every series, out of the table in `balancer/metrics.py`."""

from __future__ import annotations

from balancer.exposition import Family
from balancer.metrics import BUCKETS, FAMILIES, LABELS, OVERHEAD_BUCKETS, SHORT_BUCKETS, SOURCES
from docs.build import ROOT

_INTRODUCTION = """\
# Metrics

Made by `make docs` from the table in `balancer/metrics.py`; do not edit.

`GET /metrics` on the data port, or with `--metrics-port` there alone. Any worker speaks for all workers of its
supervisor, a *pod* below: have Prometheus scrape each pod once. A scrape waits for Redis no longer than a selection
does (`BALANCER_REDIS_DEADLINE_MS`). What is not known then is absent, not 0.

Labels come from the configuration or are words of ours, never from clients: what clients make up adds no series. None
of ours is called `namespace`, `pod` or `job`: those are Prometheus' own.

## How they add up

| from | meaning | over pods |
|---|---|---|
"""

_ADDING = """
A worker that dies or drains takes its states with it; what it has counted stays, and its successor goes on from
there. Killed with -9 it loses what it counted in its last 100 ms. Counters begin at 0 with the supervisor. Gauges of
the fleet are the same in every pod, but for the moment of the scrape: adding them up counts them as often as there
are pods.

```promql
sum by (rule, outcome) (rate(balancer_requests_total[5m]))              # counted: add up
sum(balancer_ready_workers)                                             # a state: add up, where the table says so
max by (pool, service) (balancer_window_tokens)                         # of the fleet: the greatest
histogram_quantile(0.95, sum by (service, le) (rate(balancer_time_to_first_token_seconds_bucket[5m])))
```

Counters of a pool (`stale_picks`, `leases_expired`, `settle_batches_lost`, `epoch_bumps`, `invariant_violations`)
begin at 0 when a worker opens the pool, so that `increase()` sees the first rise; other counters appear with their
first event.

## Labels

| label | meaning |
|---|---|
"""

_FORMATS = """
## Formats and exemplars

The classic text format is the default. Who asks for OpenMetrics, as Prometheus does, gets it
(`Accept: application/openmetrics-text; version=1.0.0`), with exemplars on

{exemplars}

`decision` is the decision's id, as in `x-balancer-decision` and `GET /api/v1/decisions/{{decision}}`. `trace_id` stands
beside it for requests that are traced, unless it has no room there. Of the requests that a worker answers in the same
100 ms the slowest leaves one; each bucket, and each series of the counter, shows the latest of any worker of the pod.
Picks without Redis leave none, for they have no decision. Prometheus keeps exemplars with
`--enable-feature=exemplar-storage`.

## Buckets

| of | seconds |
|---|---|
| whole requests, attempts, first tokens | {buckets} |
| selections | {short} |
| our own overhead, with the wait in a rule's queue | {overhead} |
"""

_COST = """
## What a scrape costs

`python -m benchmarks.scrape` measures it: every service was picked by every worker, with limits, a price, three
outcomes, and exemplars in most buckets. The CPU is that of the worker which answers, on a machine with two cores; its
requests wait meanwhile for a *hold* at most, however much there is to tell. Of Redis it reads each pool's two hashes
and its leases.

"""


def _row(family: Family) -> str:
    labels = ", ".join(f"`{label}`" for label in family.labels)
    name = f"`{family.name}`{' ◆' if family.has_exemplars else ''}"
    cells = (name, family.type, labels, family.help, family.unit, family.source, f"`{family.across}`")
    return f"| {' | '.join(cells)} |"


def _seconds(buckets: tuple[float, ...]) -> str:
    return ", ".join(f"{bucket:g}" for bucket in buckets)


def files() -> dict[str, str]:
    """The page."""
    across = {"counted": "`sum`", "worker": "as the table says", "fleet": "`max`", "configuration": "`max`"}
    sources = "".join(f"| {source} | {meaning} | {across[source]} |\n" for source, meaning in SOURCES.items())
    labels = "".join(f"| `{label}` | {meaning} |\n" for label, meaning in LABELS.items())
    exemplars = "\n".join(f"- `{family.name}`" for family in FAMILIES if family.has_exemplars)
    text = _INTRODUCTION + sources + _ADDING + labels
    text += _FORMATS.format(
        exemplars=exemplars,
        buckets=_seconds(BUCKETS),
        short=_seconds(SHORT_BUCKETS),
        overhead=_seconds(OVERHEAD_BUCKETS),
    )
    text += _COST + (ROOT / "benchmarks" / "results" / "scrape.md").read_text(encoding="utf-8")
    text += "\n## All series\n\n◆ has exemplars.\n\n"
    text += "| series | type | labels | meaning | unit | from | over pods |\n|---|---|---|---|---|---|---|\n"
    text += "\n".join(map(_row, FAMILIES)) + "\n"
    return {"docs/metrics.md": text}
