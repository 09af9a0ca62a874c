"""Every series that we export, and what a worker counts. Labels come from configuration, never from clients.

`FAMILIES` says all of each: what is exported, in either format, and `docs/metrics.md` are made from it. What a worker
counts lies in cells that all workers of one supervisor share (`cells`): a worker that takes the place of a dead one
goes on counting in its slot. What a request counts gets there within 100 ms: so far may a scrape of another worker be
behind, and so much does a worker lose that is killed. What the fleet shares (windows, cursors, holdings) is read from
Redis at the scrape (`gauges`), so that every worker of every pod tells the same.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, Protocol

from balancer import __version__
from balancer.cells import BEATS_AT, Exemplar, Slot
from balancer.domain import Outcome, Pick, Rule, Usage
from balancer.errors import REASONS
from balancer.exposition import Family, Lines, Scrape, Source
from balancer.steps import Steps, finished
from balancer.tally import Counts, Level, Times
from balancer.translation.apis import ClientApi, ServiceApi

BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
"""Of what an upstream has a part in: from an answer out of a cache to the longest that one thinks."""
SHORT_BUCKETS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
"""Of what is between us and Redis, whose deadline is 250 ms."""
OVERHEAD_BUCKETS = (*SHORT_BUCKETS, 2.5, 5.0, 10.0, 30.0)
"""Of a selection and what is around it; at the limits a request may wait in its rule's queue for longer."""
FLUSH_S = 0.1
"""So long after it was counted the other workers know of it."""
Passing = tuple[str, str, str, str, str]
"""Scenario, pool, rule, service and the reason of the pick."""
Passed = tuple[Passing, int, int, bool, float, float, float, float, Pick, str]
"""A request that went as usual: its labels, tokens of input and output, whether the pick was a switch, and seconds: of
the selection, until it was sent on, of the attempt, and of all; the pick, and the id of its trace, empty for none."""

SOURCES: Mapping[Source, str] = {
    "counted": "counted by each worker, and added up over the workers of a pod",
    "worker": "the state of each living worker, put together over the workers of a pod",
    "fleet": "read from Redis at the scrape: the same from every worker of every pod",
    "configuration": "follows from the configuration that stands: the same from every worker of every pod",
}
LABELS: Mapping[str, str] = {
    "scenario": "`openai`, `anthropic`, `claude_code`, `opencode`; empty for a path that is none of ours",
    "rule": "the rule's uuid; empty where none was found",
    "pool": "the rule's pool",
    "service": "`<provider uuid>:<model>`; of limits also `<provider uuid>:*`, all services of a provider in the pool",
    "outcome": "how it ended: `success`, `rate_limited`, `unauthorized`, `overloaded`, `failed`, `rejected`, "
    "`cancelled`, `abandoned`, `lost`",
    "reason": "of a pick or switch: what the tactic or the rest of the selection says of it; of a refusal: "
    + ", ".join(f"`{reason}`" for reason in REASONS),
    "kind": "of tokens and prices: `input`, `output`, `cached`, `cache_creation`, `reasoning`; of limits: `rpm`, "
    "`tpm`, `in_flight`",
    "entry": "the smart-routing entry's `uuid`, or the digest of its ops; empty for none",
    "window": "its length in seconds",
    "client": "the API that the client speaks: `chat`, `messages`, `responses`",
    "upstream": "the API that the service speaks: `chat`, `messages`, `google`",
    "version": "of the program",
}


def _counter(name: str, labels: str, help_: str, unit: str, *, has_exemplars: bool = False) -> Family:
    return Family(
        name=f"balancer_{name}",
        type="counter",
        labels=tuple(labels.split()),
        help=help_,
        unit=unit,
        source="counted",
        across="sum",
        has_exemplars=has_exemplars,
    )


def _durations(
    name: str, labels: str, help_: str, buckets: tuple[float, ...], *, has_exemplars: bool = False
) -> Family:
    return Family(
        name=f"balancer_{name}_seconds",
        type="histogram",
        labels=tuple(labels.split()),
        help=help_,
        unit="seconds",
        source="counted",
        across="sum",
        buckets=buckets,
        has_exemplars=has_exemplars,
    )


def _gauge(
    name: str,
    labels: str,
    help_: str,
    unit: str,
    source: Source,
    across: Literal["sum", "min", "max"] = "max",
    *,
    needs_beat: bool = False,
) -> Family:
    return Family(
        name=f"balancer_{name}",
        type="gauge",
        labels=tuple(labels.split()),
        help=help_,
        unit=unit,
        source=source,
        across=across,
        needs_beat=needs_beat,
    )


FAMILIES: tuple[Family, ...] = (
    # What clients ask for.
    _counter("requests_total", "scenario rule outcome", "Requests answered.", "requests"),
    _counter("refused_total", "scenario reason", "Requests refused before a service was picked.", "requests"),
    _durations("request_duration", "scenario", "Whole requests.", BUCKETS, has_exemplars=True),
    _gauge("open_requests", "", "Requests being answered.", "requests", "worker", "sum"),
    _durations("overhead", "", "From the request's last byte to sending it on.", OVERHEAD_BUCKETS),
    # What is picked, and how that goes.
    _counter("picks_total", "pool rule service reason", "Services picked.", "picks"),
    _counter("switches_total", "pool rule reason", "Moves of a rule's cursor.", "switches"),
    _counter(
        "routed_total",
        "pool rule entry",
        "Requests of rules with smart routing, by the entry that they belong to; empty for none.",
        "requests",
    ),
    _counter(
        "pinned_switches_saved_total",
        "pool rule",
        "Picks that a pin kept on another service than the cursor's.",
        "picks",
    ),
    _counter("degraded_picks_total", "pool rule", "Services picked without Redis.", "picks"),
    _counter("stale_picks_total", "pool", "Selections made under an outdated revision, and made again.", "picks"),
    _counter("attempts_total", "pool rule service outcome", "Attempts settled.", "attempts", has_exemplars=True),
    _counter(
        "translated_total",
        "pool rule client upstream",
        "Attempts at services that speak another API than their client.",
        "attempts",
    ),
    _counter("retries_total", "pool rule", "Second and later attempts of a request.", "attempts"),
    _durations("upstream_duration", "service", "Whole attempts.", BUCKETS, has_exemplars=True),
    _durations(
        "time_to_first_token",
        "service",
        "From sending to the first content token.",
        BUCKETS,
        has_exemplars=True,
    ),
    _counter("tokens_total", "pool rule service kind", "Tokens that upstreams reported.", "tokens"),
    # Rules and services, as the fleet shares them.
    _gauge("current_service_index", "pool rule", "The cursor's place among the rule's services.", "index", "fleet"),
    _gauge("streak", "pool rule", "Consecutive picks on the rule's current service.", "picks", "fleet"),
    _gauge(
        "request_threshold",
        "pool rule",
        "Requests at which the rule's tactic switches, if it has such a threshold.",
        "requests",
        "configuration",
    ),
    _gauge(
        "token_threshold",
        "pool rule",
        "Window tokens at which the rule's tactic switches, if it has such a threshold.",
        "tokens",
        "configuration",
    ),
    _gauge(
        "expected_share",
        "pool rule service",
        "Share of the rule's picks that the service gets in the long run, where that follows from the configuration.",
        "ratio",
        "configuration",
    ),
    _gauge("in_flight_requests", "pool service", "Attempts in flight.", "attempts", "fleet"),
    _gauge("reserved_tokens", "pool service", "Tokens held by attempts in flight.", "tokens", "fleet"),
    _gauge("window_requests", "pool service window", "Picks in the window.", "picks", "fleet"),
    _gauge("window_tokens", "pool service window", "Settled tokens in the window.", "tokens", "fleet"),
    _gauge("limit", "pool service kind", "The limit, where one is set.", "requests or tokens", "configuration"),
    _gauge(
        "limit_used",
        "pool service kind",
        "What is held against the limit: of the last minute, tokens with those reserved; or what is in flight.",
        "requests or tokens",
        "fleet",
    ),
    _gauge("breaker_state", "pool service", "0 closed, 1 half-open, 2 open.", "state", "fleet"),
    _gauge("cooldown_seconds", "pool service", "How much longer the service is left alone.", "seconds", "fleet"),
    _gauge(
        "token_price", "service kind", "Price of a million tokens, where one is set.", "of a currency", "configuration"
    ),
    # Redis, and what becomes of us without it.
    _gauge("store_up", "pool", "1 while the pool's Redis answers every worker of the pod.", "state", "worker", "min"),
    _durations("select", "pool", "Waiting for a selection.", SHORT_BUCKETS),
    _gauge("outbox_entries", "pool", "Settled attempts that Redis has not acknowledged.", "attempts", "worker", "sum"),
    _gauge(
        "outbox_age_seconds", "pool", "Age of the oldest settle that Redis has not acknowledged.", "seconds", "worker"
    ),
    _gauge("epoch", "pool", "The pool's epoch: how often a failover has lost writes, and 1.", "epoch", "fleet"),
    _counter("epoch_bumps_total", "pool", "Failovers that lost writes.", "failovers"),
    _counter("leases_expired_total", "pool", "Attempts lost with their worker.", "attempts"),
    _counter("settle_batches_lost_total", "pool", "Settled batches no longer held.", "batches"),
    _counter("invariant_violations_total", "pool", "What the audit of a pool found wrong.", "violations"),
    # Workers.
    _gauge("workers", "", "Living workers of the pod.", "workers", "worker", "sum"),
    _gauge(
        "ready_workers",
        "",
        "Living workers of the pod that can pick, and do not drain.",
        "workers",
        "worker",
        "sum",
        needs_beat=True,
    ),
    _gauge("live_workers", "pool", "Workers of the fleet with a lease on the pool.", "workers", "fleet"),
    _gauge("config_revision", "", "The oldest revision that a worker stands on.", "revision", "worker", "min"),
    _gauge("build_info", "version", "Always 1.", "1", "worker"),
)
BY_NAME: Mapping[str, Family] = {family.name: family for family in FAMILIES}


class Metrics:
    """What one worker counts. With a folder, that is shared with the other workers through its files."""

    def __init__(self, folder: Path | None = None, slot: int = 0) -> None:
        """Raises ConfigurationError when another worker has that slot of the folder."""
        self._slot = Slot(folder, slot)
        self._scrape = Scrape(FAMILIES, self._slot, folder)
        self.open_requests: Callable[[], int] = lambda: 0
        """How many requests are being answered."""
        self.passed: list[Passed] = []
        """The usual requests since the last flush."""
        self._tallies: list[Counts | Times] = []
        self._is_flushing = False

        # A dead worker's state is none of ours: not known, until it is set.
        for row, place in self._slot.rows:
            family = BY_NAME.get(row.family)
            if family is None or family.type == "gauge":
                self._slot.numbers[place] = math.nan

        self.requests = self._counts("balancer_requests_total")
        self.refusals = self._counts("balancer_refused_total")
        self.attempts = self._counts("balancer_attempts_total")
        self.retries = self._counts("balancer_retries_total")
        self.translations = self._counts("balancer_translated_total")
        self.picks = self._counts("balancer_picks_total")
        self.switches = self._counts("balancer_switches_total")
        self.routings = self._counts("balancer_routed_total")
        self.tokens = self._counts("balancer_tokens_total")
        self.saved_switches = self._counts("balancer_pinned_switches_saved_total")
        self.degraded_picks = self._counts("balancer_degraded_picks_total")
        self.stale_picks = self._counts("balancer_stale_picks_total")
        self.leases_expired = self._counts("balancer_leases_expired_total")
        self.batches_lost = self._counts("balancer_settle_batches_lost_total")
        self.epoch_bumps = self._counts("balancer_epoch_bumps_total")
        self.violations = self._counts("balancer_invariant_violations_total")
        self._request_duration = self._times("balancer_request_duration_seconds")
        self._upstream_duration = self._times("balancer_upstream_duration_seconds")
        self._first_token = self._times("balancer_time_to_first_token_seconds")
        self._overhead = self._times("balancer_overhead_seconds")
        self._select = self._times("balancer_select_seconds")
        self.outbox = Level(self._slot, "balancer_outbox_entries")
        self.outbox_age = Level(self._slot, "balancer_outbox_age_seconds")
        self.store_up = Level(self._slot, "balancer_store_up")
        self.revision = Level(self._slot, "balancer_config_revision")
        self.ready = Level(self._slot, "balancer_ready_workers")
        self._open = Level(self._slot, "balancer_open_requests")
        Level(self._slot, "balancer_workers").set(1)
        Level(self._slot, "balancer_build_info").set(1, __version__)
        self._known_pools: set[str] = set()
        self.flush()

    def _counts(self, name: str) -> Counts:
        tally = Counts(self._slot, name, has_exemplars=BY_NAME[name].has_exemplars)
        self._tallies.append(tally)
        return tally

    def _times(self, name: str) -> Times:
        family = BY_NAME[name]
        tally = Times(self._slot, name, family.buckets, has_exemplars=family.has_exemplars)
        self._tallies.append(tally)
        return tally

    # -- what a request counts: a lookup and an addition each ----------------------------------------------------------

    def request(
        self,
        scenario: str,
        rule: str,
        outcome: Outcome,
        duration_s: float,
        pick: Pick | None = None,
        trace_id: str = "",
    ) -> None:
        """Counts an answered request; `pick` was its last, None where there was none."""
        self.requests.pending[scenario, rule, outcome._value_] += 1
        self._request_duration.observe((scenario,), duration_s)
        if pick is not None and not pick.is_local:
            self._request_duration.exemplify((scenario,), _exemplar(duration_s, pick, trace_id))
        self._flush_soon()

    def refused(self, scenario: str, reason: str) -> None:
        """Counts a request that was refused before a service was picked."""
        self.refusals.pending[scenario, reason] += 1
        self._flush_soon()

    def overhead_s(self, seconds: float) -> None:
        """Counts the time from a request's last byte to sending it on."""
        self._overhead.observe((), seconds)
        self._flush_soon()

    def select_s(self, pool: str, seconds: float) -> None:
        """Counts the time that a selection was waited for."""
        self._select.observe((pool,), seconds)
        self._flush_soon()

    def first_token_s(self, pick: Pick, seconds: float, trace_id: str = "") -> None:
        """Counts the time from sending to the first content token."""
        service = (pick.service,)
        self._first_token.observe(service, seconds)
        if not pick.is_local:
            self._first_token.exemplify(service, _exemplar(seconds, pick, trace_id))
        self._flush_soon()

    def picked(self, pick: Pick) -> None:
        """Counts a pick, and the switch if it was one, or if a pin saved it; and whether Redis was there."""
        pool, rule, reason = pick.pool, pick.rule, pick.reason
        self.picks.pending[pool, rule, pick.service, reason] += 1
        if pick.is_switch:
            self.switches.pending[pool, rule, reason] += 1
        if pick.is_saved:
            self.saved_switch(pick)
        if pick.is_local:
            self.degraded_picks.pending[pool, rule] += 1
        self._flush_soon()

    def routed(self, rule: Rule) -> None:
        """Counts a request of a rule with smart routing, which is given as it serves the request."""
        self.routings.pending[rule.pool, rule.uuid, rule.entry] += 1
        self._flush_soon()

    def saved_switch(self, pick: Pick) -> None:
        """Counts a switch that a pin saved."""
        self.saved_switches.pending[pick.pool, pick.rule] += 1
        self._flush_soon()

    def retried(self, pick: Pick) -> None:
        """Counts a second or later attempt."""
        self.retries.pending[pick.pool, pick.rule] += 1
        self._flush_soon()

    def translated(self, pick: Pick, client: ClientApi, upstream: ServiceApi) -> None:
        """Counts an attempt at a service that speaks another API than its client."""
        self.translations.pending[pick.pool, pick.rule, client, upstream] += 1
        self._flush_soon()

    def settled(
        self,
        pick: _Settled,
        outcome: Outcome,
        usage: Usage | None,
        duration_s: float | None = None,
        trace_id: str = "",
    ) -> None:
        """Counts the end of an attempt, its tokens, and how long it took where that is known."""
        pool, rule, service = pick.pool, pick.rule, pick.service
        labels = pool, rule, service, outcome._value_
        self.attempts.pending[labels] += 1
        if usage is not None:
            tokens = self.tokens.pending
            if usage.input:
                tokens[pool, rule, service, "input"] += usage.input
            if usage.output:
                tokens[pool, rule, service, "output"] += usage.output
            self._count_rarer(pool, rule, service, usage)
        if duration_s is not None:
            self._upstream_duration.observe((service,), duration_s)
        if isinstance(pick, Pick) and not pick.is_local and duration_s is not None:
            self._upstream_duration.exemplify((service,), _exemplar(duration_s, pick, trace_id))
            self.attempts.exemplify(labels, _exemplar(1, pick, trace_id))
        self._flush_soon()

    def _count_rarer(self, pool: str, rule: str, service: str, usage: Usage) -> None:
        tokens = self.tokens.pending
        if usage.cached:
            tokens[pool, rule, service, "cached"] += usage.cached
        if usage.cache_creation:
            tokens[pool, rule, service, "cache_creation"] += usage.cache_creation
        if usage.reasoning:
            tokens[pool, rule, service, "reasoning"] += usage.reasoning

    def answered(self, passed: Passed, usage: Usage | None) -> None:
        """Counts all of a request that was picked for, settled and answered as usual, some time soon."""
        self.passed.append(passed)
        if usage is not None and (usage.cached or usage.cache_creation or usage.reasoning):
            (_, pool, rule, service, _), *_ = passed
            self._count_rarer(pool, rule, service, usage)
        if not self._is_flushing:
            self._flush_soon()

    def _count_passed(self) -> None:
        passed, self.passed = self.passed, []
        groups: defaultdict[Passing, list[Passed]] = defaultdict(list)
        for one in passed:
            groups[one[0]].append(one)
        for (scenario, pool, rule, service, reason), ones in groups.items():
            _, inputs, outputs, switches, select_s, overhead_s, attempt_s, request_s, picks, traces = zip(
                *ones, strict=True
            )
            count = len(ones)
            self.picks.pending[pool, rule, service, reason] += count
            if switched := sum(switches):
                self.switches.pending[pool, rule, reason] += switched
            attempts = pool, rule, service, Outcome.SUCCESS._value_
            self.attempts.pending[attempts] += count
            self.requests.pending[scenario, rule, Outcome.SUCCESS._value_] += count
            if input_ := sum(inputs):
                self.tokens.pending[pool, rule, service, "input"] += input_
            if output := sum(outputs):
                self.tokens.pending[pool, rule, service, "output"] += output
            self._select.observe_all((pool,), select_s)
            self._overhead.observe_all((), overhead_s)
            self._upstream_duration.observe_all((service,), attempt_s)
            self._request_duration.observe_all((scenario,), request_s)
            # Of all that passed at the same moment, the slowest: it is whom one would want to look at.
            slowest = attempt_s.index(max(attempt_s))
            pick, trace_id = picks[slowest], traces[slowest]
            self._upstream_duration.exemplify((service,), _exemplar(attempt_s[slowest], pick, trace_id))
            self.attempts.exemplify(attempts, _exemplar(1, pick, trace_id))
            slowest = request_s.index(max(request_s))
            exemplar = _exemplar(request_s[slowest], picks[slowest], traces[slowest])
            self._request_duration.exemplify((scenario,), exemplar)

    # -- what happens to a pool ----------------------------------------------------------------------------------------

    def count(self, counts: Counts, pool: str, by: int = 1) -> None:
        """Adds to a counter of a pool."""
        counts.pending[pool,] += by
        self._flush_soon()

    def knows(self, pool: str) -> None:
        """Lets the counters of a pool begin at 0: a rise from nothing to 1 is none to Prometheus."""
        if pool in self._known_pools:
            return
        self._known_pools.add(pool)
        for counts in (self.stale_picks, self.leases_expired, self.batches_lost, self.epoch_bumps, self.violations):
            counts.pending[pool,] += 0

    # -- the other workers ---------------------------------------------------------------------------------------------

    def _flush_soon(self) -> None:
        if self._is_flushing:
            return
        try:
            asyncio.get_running_loop().call_later(FLUSH_S, self.flush)
        except RuntimeError:
            self.flush()
        else:
            self._is_flushing = True

    def flush(self) -> None:
        """Lets all workers know what this one has counted, and that it lives."""
        self._is_flushing = False
        if self._slot.is_closed:
            return
        if self.passed:
            self._count_passed()
        for tally in self._tallies:
            tally.flush()
        self._open.set(self.open_requests())
        self._slot.numbers[BEATS_AT] = time.monotonic()

    def close(self) -> None:
        """Leaves the slot: what was counted stays, what this worker was is gone."""
        self.flush()
        self._slot.close()

    # -- the scrape ----------------------------------------------------------------------------------------------------

    def exposition(self, *gauges: Lines, is_open: bool = False) -> bytes:
        """The text that Prometheus reads: what every worker counts, and the gauges given."""
        return finished(self.exposing(gauges, is_open=is_open))

    def exposing(self, gauges: Sequence[Lines], *, is_open: bool = False) -> Steps[bytes]:
        """As `exposition`, in steps. `is_open`: OpenMetrics with exemplars, not the classic format."""
        self.flush()
        return self._scrape.written(gauges, is_open=is_open)


def _exemplar(value: float, pick: Pick, trace_id: str) -> Exemplar:
    return Exemplar(value, time.time(), pick.decision, trace_id)


class _Settled(Protocol):
    @property
    def pool(self) -> str: ...
    @property
    def rule(self) -> str: ...
    @property
    def service(self) -> str: ...
