"""Every series that we export. Labels come from configuration, never from clients.

Counters live in files that all workers of one supervisor share, one set for each worker's slot: a worker that takes the
place of a dead one goes on counting in its files. What the fleet shares (windows, cursors, holdings) is read from
Redis at the scrape, so that every worker tells the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import msgspec
import prometheus_client.values
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from balancer import __version__
from balancer.domain import Configuration, Outcome, Pick, Usage

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
SHORT_BUCKETS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
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

        def counter(name: str, help_: str, *labels: str) -> Counter:
            return Counter(f"balancer_{name}", help_, labels, registry=registry)

        def histogram(name: str, help_: str, buckets: Sequence[float], *labels: str) -> Histogram:
            return Histogram(f"balancer_{name}", help_, labels, buckets=buckets, registry=registry)

        def gauge(name: str, help_: str, mode: Any, *labels: str) -> Gauge:
            return Gauge(f"balancer_{name}", help_, labels, registry=registry, multiprocess_mode=mode)

        self.requests = counter("requests_total", "Requests answered.", "scenario", "rule", "outcome")
        self.attempts = counter("attempts_total", "Attempts settled.", "pool", "rule", "service", "outcome")
        self.picks = counter("picks_total", "Services picked.", "pool", "rule", "service", "reason")
        self.switches = counter("switches_total", "Moves of a rule's cursor.", "pool", "rule", "reason")
        self.tokens = counter("tokens_total", "Tokens that upstreams reported.", "pool", "rule", "service", "kind")
        self.saved_switches = counter(
            "pinned_switches_saved_total", "Picks that a pin kept on another service than the cursor's.", "pool", "rule"
        )
        self.degraded_picks = counter("degraded_picks_total", "Services picked without Redis.", "pool", "rule")
        self.stale_picks = counter("stale_picks_total", "Selections made under an outdated revision.", "pool")
        self.leases_expired = counter("leases_expired_total", "Attempts lost with their worker.", "pool")
        self.batches_lost = counter("settle_batches_lost_total", "Settled batches no longer held.", "pool")
        self.epoch_bumps = counter("epoch_bumps_total", "Failovers that lost writes.", "pool")
        self.violations = counter("invariant_violations_total", "What the audit of a pool found wrong.", "pool")
        self.request_duration = histogram("request_duration_seconds", "Whole requests.", BUCKETS, "scenario")
        self.upstream_duration = histogram("upstream_duration_seconds", "Whole attempts.", BUCKETS, "service")
        self.first_token = histogram(
            "time_to_first_token_seconds", "From sending to the first content token.", BUCKETS, "service"
        )
        self.overhead = histogram("overhead_seconds", "From the request's last byte to sending it on.", SHORT_BUCKETS)
        self.select = histogram("select_seconds", "Waiting for a selection.", SHORT_BUCKETS, "pool")
        self.outbox = gauge("outbox_entries", "Settled attempts that Redis has not acknowledged.", "sum", "pool")
        self.revision = gauge("config_revision", "The oldest revision that a worker stands on.", "min")
        self.build = gauge("build_info", "Always 1.", "max", "version")
        self.build.labels(__version__).set(1)

    def picked(self, pick: Pick) -> None:
        """Counts a pick, and the switch if it was one, or if a pin saved it; and whether Redis was there."""
        self.picks.labels(pick.pool, pick.rule, pick.service, pick.reason).inc()
        if pick.is_switch:
            self.switches.labels(pick.pool, pick.rule, pick.reason).inc()
        if pick.is_saved:
            self.saved_switches.labels(pick.pool, pick.rule).inc()
        if pick.is_local:
            self.degraded_picks.labels(pick.pool, pick.rule).inc()

    def settled(self, pick: _Settled, outcome: Outcome, usage: Usage | None) -> None:
        """Counts the end of an attempt and its tokens."""
        self.attempts.labels(pick.pool, pick.rule, pick.service, outcome.value).inc()
        if usage is not None:
            for kind, tokens in msgspec.structs.asdict(usage).items():
                if tokens:
                    self.tokens.labels(pick.pool, pick.rule, pick.service, kind).inc(tokens)

    def exposition(self, pools: Iterable[PoolGauges], stores_up: Mapping[str, bool]) -> bytes:
        """The text that Prometheus reads: every worker's counters, and the gauges given."""
        registry = self._registry
        if self._folder is not None:
            registry = CollectorRegistry()
            MultiProcessCollector(registry, str(self._folder))  # type: ignore[no-untyped-call]
        text: bytes = generate_latest(registry)
        at_scrape = CollectorRegistry()
        at_scrape.register(_Fleet(tuple(pools), stores_up))
        return text + generate_latest(at_scrape)


class _Fleet(Collector):
    """The gauges that are the same from every worker."""

    def __init__(self, pools: Sequence[PoolGauges], stores_up: Mapping[str, bool]) -> None:
        self._pools = pools
        self._stores_up = stores_up

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """One family after the other."""

        def family(name: str, help_: str, *labels: str) -> GaugeMetricFamily:
            return GaugeMetricFamily(f"balancer_{name}", help_, labels=labels)

        in_flight = family("in_flight_requests", "Attempts in flight.", "pool", "service")
        reserved = family("reserved_tokens", "Tokens held by attempts in flight.", "pool", "service")
        requests = family("window_requests", "Picks in the window.", "pool", "service", "window")
        tokens = family("window_tokens", "Settled tokens in the window.", "pool", "service", "window")
        breaker = family("breaker_state", "0 closed, 1 half-open, 2 open.", "pool", "service")
        cooldown = family("cooldown_seconds", "How much longer the service is left alone.", "pool", "service")
        cursor = family("current_service_index", "The cursor's place among the rule's services.", "pool", "rule")
        store_up = family("store_up", "1 while the pool's Redis answers this worker.", "pool")
        for pool in self._pools:
            for service, state in pool.services.items():
                in_flight.add_metric([pool.pool, service], state.in_flight)
                reserved.add_metric([pool.pool, service], state.reserved)
                breaker.add_metric([pool.pool, service], state.breaker)
                cooldown.add_metric([pool.pool, service], state.cooldown_s)
                for seconds, window_requests, window_tokens in state.windows:
                    requests.add_metric([pool.pool, service, str(seconds)], window_requests)
                    tokens.add_metric([pool.pool, service, str(seconds)], window_tokens)
            for rule, index in pool.cursors.items():
                cursor.add_metric([pool.pool, rule], index)
        for name, is_up in self._stores_up.items():
            store_up.add_metric([name], int(is_up))
        yield from (in_flight, reserved, requests, tokens, breaker, cooldown, cursor, store_up)


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


def pool_gauges(view: _Pool, configuration: Configuration) -> PoolGauges:
    """The gauges of a pool's picture, for the rules and services that are configured in it."""
    rules = [rule for rule in configuration.rules if rule.pool == view.pool]
    configured = {service.id for rule in rules for service in rule.services}
    return PoolGauges(
        pool=view.pool,
        services={
            name: ServiceGauges(
                in_flight=state.in_flight,
                reserved=state.reserved,
                breaker=_BREAKER_STATES.index(view.breaker_state(name)),
                cooldown_s=view.cooldown_ms(name) / 1000,
                windows=tuple((w.length_s, *w.counts(view.now_ms)) for w in state.windows),
            )
            for name, state in view.services.items()
            if name in configured
        },
        cursors={rule.uuid: rule.current_service_index_of(view.cursor(rule.uuid)) for rule in rules},
    )
