"""Every series that we export. Labels come from configuration, never from clients.

Counters live in files that all workers of one supervisor share, one set for each worker's slot: a worker that takes the
place of a dead one goes on counting in its files. What a request counts gets there within 100 ms (`tally`): so far may
a scrape of another worker be behind, and so much does a worker lose that is killed. What the fleet shares (windows,
cursors, holdings) is read from Redis at the scrape, so that every worker tells the same.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import msgspec
import prometheus_client.values
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from balancer import __version__
from balancer.domain import Configuration, Outcome, Pick, Rule, Usage
from balancer.steps import Steps, finished
from balancer.tally import Counts, Times

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
SHORT_BUCKETS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
FLUSH_S = 0.1
"""So long after it was counted the other workers know of it."""
Passing = tuple[str, str, str, str, str]
"""Scenario, pool, rule, service and the reason of the pick."""
Passed = tuple[Passing, int, int, bool, float, float, float, float]
"""A request that went as usual: its labels, tokens of input and output, whether the pick was a switch, and seconds: of
the selection, until it was sent on, of the attempt, and of all."""

_BREAKER_STATES = ("closed", "half_open", "open")


class _Window(Protocol):
    @property
    def length_s(self) -> int: ...
    def counts(self, now_ms: int) -> tuple[int, int]: ...


class ServiceGauges(msgspec.Struct, frozen=True, kw_only=True):
    """What a pool knows of a service at the scrape; windows as (seconds, requests, tokens).

    `breaker` is 0 for closed, 1 for half-open, 2 for open.
    """

    in_flight: int
    reserved: int
    breaker: int = 0
    cooldown_s: float = 0
    windows: tuple[tuple[int, int, int], ...]


class PoolGauges(msgspec.Struct, frozen=True, kw_only=True):
    """A pool at the scrape: its services by id, and the current service's index of each rule."""

    pool: str
    services: Mapping[str, ServiceGauges]
    cursors: Mapping[str, int]


class Metrics:
    """The series of one worker. With a folder, they are shared with the other workers through its files."""

    def __init__(self, folder: Path | None = None, slot: int = 0) -> None:
        self._folder = folder
        if folder is not None:
            # The library would name the files after the process; a slot outlives its processes.
            values = prometheus_client.values
            values.ValueClass = values.MultiProcessValue(lambda: slot)  # type: ignore[no-untyped-call]
        self._registry = registry = CollectorRegistry()

        self.passed: list[Passed] = []
        """The usual requests since the last flush."""
        self._tallies: list[Counts | Times] = []
        self._is_flushing = False

        def counter(name: str, help_: str, *labels: str) -> Counter:
            return Counter(f"balancer_{name}", help_, labels, registry=registry)

        def counts(name: str, help_: str, *labels: str) -> Counts:
            tally = Counts(counter(name, help_, *labels))
            self._tallies.append(tally)
            return tally

        def times(name: str, help_: str, buckets: tuple[float, ...], *labels: str) -> Times:
            histogram = Histogram(f"balancer_{name}", help_, labels, buckets=buckets, registry=registry)
            tally = Times(histogram, buckets)
            self._tallies.append(tally)
            return tally

        def gauge(name: str, help_: str, mode: Any, *labels: str) -> Gauge:
            return Gauge(f"balancer_{name}", help_, labels, registry=registry, multiprocess_mode=mode)

        self.requests = counts("requests_total", "Requests answered.", "scenario", "rule", "outcome")
        self.attempts = counts("attempts_total", "Attempts settled.", "pool", "rule", "service", "outcome")
        self.picks = counts("picks_total", "Services picked.", "pool", "rule", "service", "reason")
        self.switches = counts("switches_total", "Moves of a rule's cursor.", "pool", "rule", "reason")
        self.tokens = counts("tokens_total", "Tokens that upstreams reported.", "pool", "rule", "service", "kind")
        self.saved_switches = counts(
            "pinned_switches_saved_total", "Picks that a pin kept on another service than the cursor's.", "pool", "rule"
        )
        self.degraded_picks = counts("degraded_picks_total", "Services picked without Redis.", "pool", "rule")
        self.stale_picks = counter("stale_picks_total", "Selections made under an outdated revision.", "pool")
        self.leases_expired = counter("leases_expired_total", "Attempts lost with their worker.", "pool")
        self.batches_lost = counter("settle_batches_lost_total", "Settled batches no longer held.", "pool")
        self.epoch_bumps = counter("epoch_bumps_total", "Failovers that lost writes.", "pool")
        self.violations = counter("invariant_violations_total", "What the audit of a pool found wrong.", "pool")
        self._request_duration = times("request_duration_seconds", "Whole requests.", BUCKETS, "scenario")
        self._upstream_duration = times("upstream_duration_seconds", "Whole attempts.", BUCKETS, "service")
        self._first_token = times(
            "time_to_first_token_seconds", "From sending to the first content token.", BUCKETS, "service"
        )
        self._overhead = times("overhead_seconds", "From the request's last byte to sending it on.", SHORT_BUCKETS)
        self._select = times("select_seconds", "Waiting for a selection.", SHORT_BUCKETS, "pool")
        self.outbox = gauge("outbox_entries", "Settled attempts that Redis has not acknowledged.", "sum", "pool")
        self.revision = gauge("config_revision", "The oldest revision that a worker stands on.", "min")
        self.build = gauge("build_info", "Always 1.", "max", "version")
        self.build.labels(__version__).set(1)

    # -- what a request counts: a lookup and an addition each ----------------------------------------------------------

    def request(self, scenario: str, rule: str, outcome: Outcome, duration_s: float) -> None:
        """Counts an answered request."""
        self.requests.pending[scenario, rule, outcome._value_] += 1
        self._request_duration.observe((scenario,), duration_s)
        self._flush_soon()

    def overhead_s(self, seconds: float) -> None:
        """Counts the time from a request's last byte to sending it on."""
        self._overhead.observe((), seconds)
        self._flush_soon()

    def select_s(self, pool: str, seconds: float) -> None:
        """Counts the time that a selection was waited for."""
        self._select.observe((pool,), seconds)
        self._flush_soon()

    def first_token_s(self, service: str, seconds: float) -> None:
        """Counts the time from sending to the first content token."""
        self._first_token.observe((service,), seconds)
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

    def saved_switch(self, pick: Pick) -> None:
        """Counts a switch that a pin saved."""
        self.saved_switches.pending[pick.pool, pick.rule] += 1
        self._flush_soon()

    def settled(self, pick: _Settled, outcome: Outcome, usage: Usage | None, duration_s: float | None = None) -> None:
        """Counts the end of an attempt, its tokens, and how long it took where that is known."""
        pool, rule, service = pick.pool, pick.rule, pick.service
        self.attempts.pending[pool, rule, service, outcome._value_] += 1
        if usage is not None:
            tokens = self.tokens.pending
            if usage.input:
                tokens[pool, rule, service, "input"] += usage.input
            if usage.output:
                tokens[pool, rule, service, "output"] += usage.output
            self._count_rarer(pool, rule, service, usage)
        if duration_s is not None:
            self._upstream_duration.observe((service,), duration_s)
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
            _, inputs, outputs, switches, select_s, overhead_s, attempt_s, request_s = zip(*ones, strict=True)
            count = len(ones)
            self.picks.pending[pool, rule, service, reason] += count
            if switched := sum(switches):
                self.switches.pending[pool, rule, reason] += switched
            self.attempts.pending[pool, rule, service, Outcome.SUCCESS.value] += count
            self.requests.pending[scenario, rule, Outcome.SUCCESS.value] += count
            if input_ := sum(inputs):
                self.tokens.pending[pool, rule, service, "input"] += input_
            if output := sum(outputs):
                self.tokens.pending[pool, rule, service, "output"] += output
            self._select.observe_all((pool,), select_s)
            self._overhead.observe_all((), overhead_s)
            self._upstream_duration.observe_all((service,), attempt_s)
            self._request_duration.observe_all((scenario,), request_s)

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
        """Lets all workers know what this one has counted."""
        self._is_flushing = False
        if self.passed:
            self._count_passed()
        for tally in self._tallies:
            tally.flush()

    # -- the scrape ----------------------------------------------------------------------------------------------------

    def exposition(self, pools: Iterable[PoolGauges], stores_up: Mapping[str, bool]) -> bytes:
        """The text that Prometheus reads: every worker's counters, and the gauges given."""
        return finished(self.exposing(pools, stores_up))

    def exposing(self, pools: Iterable[PoolGauges], stores_up: Mapping[str, bool]) -> Steps[bytes]:
        """As `exposition`, in steps."""
        self.flush()
        registry: Collector = self._registry
        if self._folder is not None:
            registry = CollectorRegistry()
            MultiProcessCollector(registry, str(self._folder))  # type: ignore[no-untyped-call]
        text = bytearray()
        for family in registry.collect():
            text += generate_latest(_Only(family))
            yield
        for lines in (yield from _gauge_lines(pools, stores_up)):
            text += "".join(lines).encode()
            yield
        return bytes(text)


class _Only(Collector):
    """One family."""

    def __init__(self, family: Metric) -> None:
        self._family = family

    def collect(self) -> Iterator[Metric]:
        yield self._family


def _gauge_lines(pools: Iterable[PoolGauges], stores_up: Mapping[str, bool]) -> Steps[list[list[str]]]:
    """The gauges that are the same from every worker: the lines of each family, in Prometheus' text format.

    A pool of thousands of services has hundreds of thousands of them, of which the library would make structs first.
    """

    def family(name: str, help_: str) -> list[str]:
        return [f"# HELP balancer_{name} {help_}\n# TYPE balancer_{name} gauge\n"]

    in_flight = family("in_flight_requests", "Attempts in flight.")
    reserved = family("reserved_tokens", "Tokens held by attempts in flight.")
    requests = family("window_requests", "Picks in the window.")
    tokens = family("window_tokens", "Settled tokens in the window.")
    breaker = family("breaker_state", "0 closed, 1 half-open, 2 open.")
    cooldown = family("cooldown_seconds", "How much longer the service is left alone.")
    cursor = family("current_service_index", "The cursor's place among the rule's services.")
    store_up = family("store_up", "1 while the pool's Redis answers this worker.")
    for pool in pools:
        of_pool = f'{{pool="{_escaped(pool.pool)}"'
        for service, state in pool.services.items():
            labels = f'{of_pool},service="{_escaped(service)}"'
            in_flight.append(f"balancer_in_flight_requests{labels}}} {float(state.in_flight)}\n")
            reserved.append(f"balancer_reserved_tokens{labels}}} {float(state.reserved)}\n")
            breaker.append(f"balancer_breaker_state{labels}}} {float(state.breaker)}\n")
            cooldown.append(f"balancer_cooldown_seconds{labels}}} {float(state.cooldown_s)}\n")
            for seconds, window_requests, window_tokens in state.windows:
                requests.append(f'balancer_window_requests{labels},window="{seconds}"}} {float(window_requests)}\n')
                tokens.append(f'balancer_window_tokens{labels},window="{seconds}"}} {float(window_tokens)}\n')
            yield
        for rule, index in pool.cursors.items():
            cursor.append(f'balancer_current_service_index{of_pool},rule="{_escaped(rule)}"}} {float(index)}\n')
            yield
    for name, is_up in stores_up.items():
        store_up.append(f'balancer_store_up{{pool="{_escaped(name)}"}} {float(is_up)}\n')
    return [in_flight, reserved, requests, tokens, breaker, cooldown, cursor, store_up]


def _escaped(label: str) -> str:
    return label.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


class _Settled(Protocol):
    @property
    def pool(self) -> str: ...
    @property
    def rule(self) -> str: ...
    @property
    def service(self) -> str: ...


class _Service(Protocol):
    @property
    def in_flight(self) -> int: ...
    @property
    def reserved(self) -> int: ...
    @property
    def windows(self) -> Sequence[_Window]: ...


class _Pool(Protocol):
    @property
    def pool(self) -> str: ...
    @property
    def now_ms(self) -> int: ...
    @property
    def services(self) -> Mapping[str, _Service]: ...
    def cursor(self, rule: str) -> str: ...
    def breaker_state(self, service: str) -> Literal["closed", "half_open", "open"]: ...
    def cooldown_ms(self, service: str) -> int: ...


def pool_gauges(views: Sequence[_Pool], configuration: Configuration) -> Steps[list[PoolGauges]]:
    """The gauges of pools' pictures, for the rules and services that are configured in them; in steps."""
    rules: defaultdict[str, list[Rule]] = defaultdict(list)
    for rule in configuration.rules:
        rules[rule.pool].append(rule)
    yield
    gauges: dict[str, PoolGauges] = {}
    for view in views:
        gauges[view.pool] = yield from _gauges_of(view, rules[view.pool])
    return list(gauges.values())


def _gauges_of(view: _Pool, rules: Sequence[Rule]) -> Steps[PoolGauges]:
    services: dict[str, ServiceGauges] = {}
    cursors: dict[str, int] = {}
    for rule in rules:
        for service in rule.services:
            state = view.services.get(service.id)
            if state is not None and service.id not in services:
                services[service.id] = ServiceGauges(
                    in_flight=state.in_flight,
                    reserved=state.reserved,
                    breaker=_BREAKER_STATES.index(view.breaker_state(service.id)),
                    cooldown_s=view.cooldown_ms(service.id) / 1000,
                    windows=tuple((w.length_s, *w.counts(view.now_ms)) for w in state.windows),
                )
        cursors[rule.uuid] = rule.current_service_index_of(view.cursor(rule.uuid))
        yield
    return PoolGauges(pool=view.pool, services=services, cursors=cursors)
