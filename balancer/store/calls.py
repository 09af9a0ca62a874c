"""How selections, entries and rules become script arguments, and replies become structs."""

from __future__ import annotations

from collections.abc import Iterable

from balancer.domain import (
    Configuration,
    Entry,
    PartitionDefinition,
    PoolSettings,
    Rule,
    RuleDefinition,
    Selection,
    ServiceDefinition,
    WindowsDefinition,
)
from balancer.store import keys
from balancer.tactics import tactic_name, tactic_params


def selection_arguments(selection: Selection) -> tuple[str | int, ...]:
    """The group of arguments that select takes for one selection."""
    return (
        selection.number,
        selection.rule,
        selection.partition,
        selection.revision,
        selection.draw,
        selection.reserved,
        selection.deadline_ms,
        len(selection.excluded),
        *selection.excluded,
    )


def entry_arguments(entry: Entry, extra_age_ms: int = 0) -> tuple[str | int, ...]:
    """The group of arguments that settle takes for one entry, which has waited `extra_age_ms` since it was made."""
    usage = entry.usage
    return (
        entry.number,
        entry.service,
        entry.outcome.value,
        entry.age_ms + extra_age_ms,
        usage.input,
        usage.output,
        usage.cached,
        usage.cache_creation,
        usage.reasoning,
    )


def fence_arguments(settings: PoolSettings, revision: int) -> dict[str, str | int]:
    """How a pool's events are recorded as of a revision, as fence takes it."""
    return {"record": settings.record, "keep": settings.record_events, "revision": revision}


def rule_definition(
    configuration: Configuration, rule: Rule, revision: int, *, is_edited: bool = True
) -> RuleDefinition:
    """What raising the fence of a rule writes into its pool; a configured cursor is set only by an edit of the rule."""
    enabled = {provider.uuid for provider in configuration.providers if provider.enabled}
    cursor = ""
    if rule.current_service_index is not None and rule.services:
        cursor = rule.services[rule.current_service_index % len(rule.services)].id
    partition = PartitionDefinition(
        id=keys.partition(rule.uuid),
        tactic=tactic_name(rule.lb_tactic),
        params=tactic_params(rule.lb_tactic),
        cursor=cursor,
        is_edit=int(is_edited),
        services=tuple(
            ServiceDefinition(
                id=service.id,
                active=int(service.active and service.provider in enabled),
                window=service.time_window,
                weight=max(service.weight, 0),
            )
            for service in rule.services
        ),
    )
    lengths = _window_lengths(configuration.rules, rule.pool)
    windows = tuple(
        WindowsDefinition(id=service.id, lengths=tuple(sorted(lengths.get(service.id, {service.time_window}))))
        for service in rule.services
    )
    return RuleDefinition(rule=rule.uuid, revision=revision, partitions=(partition,), windows=windows)


def _window_lengths(rules: Iterable[Rule], pool: str) -> dict[str, set[int]]:
    """The distinct time_windows that the pool's active rules give each service."""
    lengths: dict[str, set[int]] = {}
    for rule in rules:
        if rule.pool == pool and rule.active:
            for service in rule.services:
                lengths.setdefault(service.id, set()).add(service.time_window)
    return lengths
