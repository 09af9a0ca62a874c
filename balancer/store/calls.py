"""How selections, entries and rules become script arguments, and replies become structs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction

import msgspec

from balancer.domain import (
    Configuration,
    Entry,
    Limits,
    PartitionDefinition,
    PoolSettings,
    Provider,
    ProviderDefinition,
    Rule,
    RuleDefinition,
    Selection,
    Service,
    ServiceDefinition,
    WindowsDefinition,
)
from balancer.store import keys
from balancer.tactics import tactic_name, tactic_params

_pack = msgspec.msgpack.Encoder().encode


def call_argument(
    *,
    lease_ms: int,
    now_ms: int = 0,
    seen: tuple[int, int] = (0, 0),
    batch: int = 0,
    skips: bool = False,
    entries: Sequence[Entry] = (),
    selections: Sequence[Selection] = (),
) -> bytes:
    """All that tick is told by its worker: the place that it has seen, a batch (0: none) of entries, selections."""
    return _pack((now_ms, *seen, lease_ms, batch, skips, entries, selections))


def pin_keys(pool: str, selections: Iterable[Selection]) -> list[str]:
    """The keys that tick takes beside the pool's own: a pin for each selection with an affinity, in their order."""
    return [keys.pin(pool, selection.session) for selection in selections if selection.affinity_ms]


def older(entry: Entry, ms: int) -> Entry:
    """The entry as it is after it has waited so long."""
    return msgspec.structs.replace(entry, age_ms=entry.age_ms + ms) if ms else entry


def fence_arguments(settings: PoolSettings, revision: int) -> dict[str, str | int]:
    """How a pool's events are recorded as of a revision, as fence takes it."""
    return {"record": settings.record, "keep": settings.record_events, "revision": revision}


class Definer:
    """Defines the rules of one configuration; what concerns all of them is found out once."""

    def __init__(self, configuration: Configuration) -> None:
        self._providers = {provider.uuid: provider for provider in configuration.providers}
        self._lengths: dict[str, dict[str, set[int]]] = {}
        for rule in configuration.rules:
            if rule.active:
                lengths = self._lengths.setdefault(rule.pool, {})
                for service in rule.all_services():
                    lengths.setdefault(service.id, set()).add(service.time_window)

    def definition(self, rule: Rule, revision: int, *, is_edited: bool = True) -> RuleDefinition:
        """What raising the fence of a rule writes into its pool; only its edit sets the cursor that it configures."""
        return _definition(rule, revision, self._providers, self._lengths.get(rule.pool, {}), is_edited=is_edited)


def _definition(
    rule: Rule,
    revision: int,
    providers: Mapping[str, Provider],
    lengths: Mapping[str, set[int]],
    *,
    is_edited: bool,
) -> RuleDefinition:
    cursor = ""
    if rule.current_service_index is not None and rule.services:
        cursor = rule.services[rule.current_service_index % len(rule.services)].id

    def partition(entry: str, services: Iterable[Service], cursor: str = "") -> PartitionDefinition:
        return PartitionDefinition(
            id=keys.partition(rule.uuid, entry),
            tactic=tactic_name(rule.lb_tactic),
            params=tactic_params(rule.lb_tactic),
            cursor=cursor,
            is_edit=int(is_edited),
            refuses=int(rule.on_exhausted == "refuse"),
            services=tuple(_service(service, providers.get(service.provider)) for service in services),
        )

    entries = rule.smart_routing if rule.smart_enabled else ()
    reached = rule.all_services()
    windows = tuple(
        WindowsDefinition(id=service.id, lengths=tuple(sorted(lengths.get(service.id, {service.time_window}))))
        for service in reached
    )
    named = dict.fromkeys(service.provider for service in reached)
    return RuleDefinition(
        rule=rule.uuid,
        revision=revision,
        retry_permille=round(rule.retry.budget_ratio * 1000) if rule.retry.attempts > 1 else 0,
        partitions=(
            partition("", rule.services, cursor),
            *(partition(route.entry, route.services) for route in entries),
        ),
        windows=windows,
        providers=tuple(_provider(providers[uuid], rule.pool) for uuid in named if uuid in providers),
    )


def needs_estimate(rule: Rule, provider_of: Callable[[str], Provider | None]) -> bool:
    """True when tokens a minute are limited, so that a request must hold its estimate though its tactic holds none."""
    if any(service.limits.tpm for service in rule.services):
        return True
    providers = map(provider_of, dict.fromkeys(service.provider for service in rule.services))
    return any(provider.limits.tpm for provider in providers if provider)


def _service(service: Service, provider: Provider | None) -> ServiceDefinition:
    price = provider.price if provider else None
    return ServiceDefinition(
        id=service.id,
        active=int(service.active and provider is not None and provider.enabled),
        window=service.time_window,
        weight=max(service.weight, 0),
        tier=service.tier,
        rpm=service.limits.rpm,
        tpm=service.limits.tpm,
        in_flight=service.limits.in_flight,
        cost=round(1000 * (price.input * 3 + price.output)) if price else 0,
    )


def _provider(provider: Provider, pool: str) -> ProviderDefinition:
    limits, breaker = provider.limits, provider.breaker
    return ProviderDefinition(
        id=provider.uuid,
        rpm=share_of(limits.rpm, limits, pool),
        tpm=share_of(limits.tpm, limits, pool),
        in_flight=share_of(limits.in_flight, limits, pool),
        failures=breaker.failures,
        ratio_permille=round(breaker.ratio * 1000),
        min_requests=breaker.min_requests,
        window_ms=round(breaker.window_s * 1000),
        open_ms=round(breaker.open_s * 1000),
        successes=breaker.successes,
    )


def share_of(limit: int, limits: Limits, pool: str) -> int:
    """The pool's part of a limit, rounded down: -1, which lets nothing through, where that leaves none of it."""
    if not limit or not limits.split:
        return limit
    # In fractions of what is written: 0.29 of 100 is 29, not 28.999….
    return math.floor(limit * Fraction(str(limits.split.get(pool, 0)))) or -1
