"""docs/metrics.md: every series, out of the table in `balancer/metrics.py`."""

from __future__ import annotations

from balancer.exposition import Family
from balancer.metrics import BUCKETS, FAMILIES, LABELS, SHORT_BUCKETS, SOURCES

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

The classic text format is the default. Who asks for OpenMetrics (`Accept: application/openmetrics-text;
version=1.0.0`), as Prometheus does, gets it. There, buckets of {exemplars} have
exemplars: `decision` is the
decision's id, as in `x-balancer-decision` and `GET /api/v1/decisions/{{decision}}`; `trace_id` stands beside it for
requests that are traced (unless both exceed the format's 128 characters: then the decision stays). Of the requests
that a worker answers in the same 100 ms, the slowest leaves one, of each series the latest is shown; picks without
Redis leave none, for they have no decision. All workers of a pod share them. Prometheus keeps exemplars with
`--enable-feature=exemplar-storage`.

## Buckets

- Whole requests, attempts and first tokens: {buckets} s.
- Selections and our own overhead: {short} s.
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
    exemplars = ", ".join(f"`{family.name}`" for family in FAMILIES if family.has_exemplars)
    text = _INTRODUCTION + sources + _ADDING + labels
    text += _FORMATS.format(exemplars=exemplars, buckets=_seconds(BUCKETS), short=_seconds(SHORT_BUCKETS))
    text += "\n## All series\n\n◆ has exemplars.\n\n"
    text += "| series | type | labels | meaning | unit | from | over pods |\n|---|---|---|---|---|---|---|\n"
    text += "\n".join(map(_row, FAMILIES)) + "\n"
    return {"docs/metrics.md": text}
