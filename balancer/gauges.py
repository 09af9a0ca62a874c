"""The gauges that every worker of the fleet tells alike: out of pictures of the pools, and of the configuration.

Services and rules that are not configured have none: state outlives the configuration that made it, and its names
must not stay. What nobody knows is absent, not 0.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, Protocol

import msgspec

from balancer.domain import Configuration, Price, ProviderDefinition, Rule, RuleDefinition, ServiceDefinition
from balancer.exposition import escaped
from balancer.steps import Steps

_BREAKER_STATES = ("closed", "half_open", "open")
_KINDS = ("rpm", "tpm", "in_flight")
_EVEN = ("round_robin",)
_BY_WEIGHT = ("random", "weighted_round_robin")
_THRESHOLDS = ("request_threshold", "token_threshold")

Gauges = dict[str, list[str]]
"""Of families by name, the lines of their samples."""


class _Window(Protocol):
    @property
    def length_s(self) -> int: ...
    def counts(self, now_ms: int) -> tuple[int, int]: ...


class _Minute(Protocol):
    def counts(self, now_ms: int) -> tuple[int, int]: ...


class _Measured(Protocol):
    @property
    def minute(self) -> _Minute: ...
    @property
    def in_flight(self) -> int: ...
    @property
    def reserved(self) -> int: ...


class _Service(_Measured, Protocol):
    @property
    def windows(self) -> Sequence[_Window]: ...


class _Pool(Protocol):
    @property
    def pool(self) -> str: ...
    @property
    def now_ms(self) -> int: ...
    @property
    def epoch(self) -> int: ...
    @property
    def services(self) -> Mapping[str, _Service]: ...
    @property
    def providers(self) -> Mapping[str, _Measured]: ...
    def cursor(self, rule: str) -> str: ...
    def streak(self, rule: str) -> int | None: ...
    def breaker_state(self, service: str) -> Literal["closed", "half_open", "open"]: ...
    def cooldown_ms(self, service: str) -> int: ...


class Limited(msgspec.Struct, frozen=True, kw_only=True):
    """A service with limits in a pool, or all of a provider's there: what of them is set, by kind."""

    pool: str
    id: str
    is_provider: bool
    limits: tuple[tuple[str, int], ...]


class Configured(msgspec.Struct, frozen=True, kw_only=True):
    """What follows from a configuration alone; it stays the same until there is another one."""

    lines: Gauges
    limited: Mapping[str, Sequence[Limited]]
    """By pool."""


def _line(name: str, labels: str, value: float) -> str:
    return f"balancer_{name}{{{labels}}} {float(value)}\n"


# -- the configuration's -----------------------------------------------------------------------------------------------


def configured(configuration: Configuration, define: Callable[[Rule], RuleDefinition]) -> Steps[Configured]:
    """What follows from the configuration; `define` says what of a rule its pool is told."""
    lines: defaultdict[str, list[str]] = defaultdict(list)
    limits: dict[tuple[str, str, bool], dict[str, int]] = {}
    prices = {provider.uuid: provider.price for provider in configuration.providers}
    priced: set[str] = set()
    for rule in configuration.rules:
        definition = define(rule)
        labels = f'pool="{escaped(rule.pool)}",rule="{escaped(rule.uuid)}"'
        partition, *entries = definition.partitions or (None,)
        if partition is None:
            continue
        for name in _THRESHOLDS:
            if name in partition.params:
                lines[name].append(_line(name, labels, partition.params[name]))
        # What share of the requests belongs to an entry, nothing says.
        shares = () if entries else expected_shares(rule, partition.tactic, partition.services)
        for id_, share in shares:
            lines["expected_share"].append(_line("expected_share", f'{labels},service="{escaped(id_)}"', share))
        if rule.active:
            for service in (service for part in definition.partitions for service in part.services):
                _tighten(limits.setdefault((rule.pool, service.id, False), {}), service)
            for provider in definition.providers:
                _tighten(limits.setdefault((rule.pool, provider.id, True), {}), provider)
        for offered in rule.all_services():
            if offered.id not in priced and offered.provider in prices:
                priced.add(offered.id)
                lines["token_price"] += _prices(offered.id, prices[offered.provider])
        yield
    limited: defaultdict[str, list[Limited]] = defaultdict(list)
    for (pool, id_, is_provider), kinds in limits.items():
        if not kinds:
            continue
        one = Limited(pool=pool, id=id_, is_provider=is_provider, limits=tuple(kinds.items()))
        limited[pool].append(one)
        for kind, limit in one.limits:
            lines["limit"].append(_line("limit", _limit_labels(one, kind), limit))
        yield
    return Configured(lines={f"balancer_{name}": found for name, found in lines.items()}, limited=limited)


def expected_shares(rule: Rule, tactic: str, services: Sequence[ServiceDefinition]) -> Iterable[tuple[str, float]]:
    """The share of a rule's picks that each of its usable services gets in the long run; none where that is open.

    It is of a fleet in which no service fails: those of the lowest tier serve. Sessions that are pinned to services
    move the shares by how much they ask for.
    """
    usable = [service for service in services if service.active]
    if not rule.active or rule.session_affinity or tactic not in (*_EVEN, *_BY_WEIGHT) or not usable:
        return ()
    lowest = min(service.tier for service in usable)
    weights = [0 if service.tier > lowest else 1 if tactic in _EVEN else max(service.weight, 0) for service in usable]
    if not any(weights):
        weights = [int(service.tier == lowest) for service in usable]
    whole = sum(weights)
    return [(service.id, weight / whole) for service, weight in zip(usable, weights, strict=True)]


def _tighten(kinds: dict[str, int], limited: ServiceDefinition | ProviderDefinition) -> None:
    """Two rules may give a service other limits: the tighter one is met first. Below zero nothing is let through."""
    for kind, limit in (("rpm", limited.rpm), ("tpm", limited.tpm), ("in_flight", limited.in_flight)):
        if limit:
            kinds[kind] = min(kinds.get(kind, max(limit, 0)), max(limit, 0))


def _limit_labels(limited: Limited, kind: str) -> str:
    id_ = f"{limited.id}:*" if limited.is_provider else limited.id
    return f'pool="{escaped(limited.pool)}",service="{escaped(id_)}",kind="{kind}"'


def _prices(service: str, price: Price) -> Iterable[str]:
    for kind, amount in (("input", price.input), ("output", price.output), ("cached", price.cached)):
        if amount:
            yield _line("token_price", f'service="{escaped(service)}",kind="{kind}"', amount)


# -- the pools' --------------------------------------------------------------------------------------------------------


def pooled(
    views: Sequence[_Pool], live_workers: Mapping[str, int], configuration: Configuration, known: Configured
) -> Steps[Gauges]:
    """What pictures of pools tell, for the rules and services that are configured in them."""
    rules: defaultdict[str, list[Rule]] = defaultdict(list)
    for rule in configuration.rules:
        rules[rule.pool].append(rule)
    yield
    lines: defaultdict[str, list[str]] = defaultdict(list)
    for view in views:
        of_pool = f'pool="{escaped(view.pool)}"'
        if view.pool in rules:
            lines["epoch"].append(_line("epoch", of_pool, view.epoch))
        yield from _services(view, rules.get(view.pool, ()), of_pool, lines)
        yield from _limits(view, known.limited.get(view.pool, ()), lines)
    for pool, count in live_workers.items():
        if pool in rules:
            lines["live_workers"].append(_line("live_workers", f'pool="{escaped(pool)}"', count))
    return {f"balancer_{name}": found for name, found in lines.items()}


def _services(view: _Pool, rules: Sequence[Rule], of_pool: str, lines: defaultdict[str, list[str]]) -> Steps[None]:
    told: set[str] = set()
    for rule in rules:
        for service in rule.all_services():
            state = view.services.get(service.id)
            if state is None or service.id in told:
                continue
            told.add(service.id)
            labels = f'{of_pool},service="{escaped(service.id)}"'
            breaker = _BREAKER_STATES.index(view.breaker_state(service.id))
            lines["in_flight_requests"].append(_line("in_flight_requests", labels, state.in_flight))
            lines["reserved_tokens"].append(_line("reserved_tokens", labels, state.reserved))
            lines["breaker_state"].append(_line("breaker_state", labels, breaker))
            lines["cooldown_seconds"].append(_line("cooldown_seconds", labels, view.cooldown_ms(service.id) / 1000))
            for window in state.windows:
                requests, tokens = window.counts(view.now_ms)
                of_window = f'{labels},window="{window.length_s}"'
                lines["window_requests"].append(_line("window_requests", of_window, requests))
                lines["window_tokens"].append(_line("window_tokens", of_window, tokens))
            yield
        labels = f'{of_pool},rule="{escaped(rule.uuid)}"'
        index = rule.current_service_index_of(view.cursor(rule.uuid))
        lines["current_service_index"].append(_line("current_service_index", labels, index))
        streak = view.streak(rule.uuid)
        if streak is not None:
            lines["streak"].append(_line("streak", labels, streak))
        yield


def _limits(view: _Pool, limited: Sequence[Limited], lines: defaultdict[str, list[str]]) -> Steps[None]:
    for one in limited:
        measured: _Measured | None = (view.providers if one.is_provider else view.services).get(one.id)
        requests, tokens = measured.minute.counts(view.now_ms) if measured else (0, 0)
        used = {
            "rpm": requests,
            "tpm": tokens + (measured.reserved if measured else 0),
            "in_flight": measured.in_flight if measured else 0,
        }
        for kind, _ in one.limits:
            lines["limit_used"].append(_line("limit_used", _limit_labels(one, kind), used[kind]))
        yield
