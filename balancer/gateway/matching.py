"""Which rules can serve a request: those with services that are switched on, all of a style that the client speaks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

from balancer.domain import ApiStyle, Provider, Rule, Service


class Directory(Protocol):
    """The configuration that stands."""

    @property
    def by_uuid(self) -> Mapping[str, Rule]:
        """All rules, active or not."""

    def rule(self, scenario: str, model: str) -> Rule | None:
        """The active rule of that scenario and model."""

    def rules(self, scenario: str) -> tuple[Rule, ...]:
        """The active rules of a scenario."""

    def provider(self, uuid: str) -> Provider | None:
        """The provider of that uuid."""


def usable(directory: Directory, rule: Rule) -> list[Service]:
    """The services that may serve at all: active, of an enabled provider."""
    return [
        service
        for service in rule.active_services()
        if (provider := directory.provider(service.provider)) and provider.enabled
    ]


def foreign(directory: Directory, rule: Rule, style: ApiStyle) -> list[Service]:
    """Those of the usable services that do not speak the client's dialect."""
    return [
        service
        for service in usable(directory, rule)
        if (provider := directory.provider(service.provider)) and provider.api_style != style
    ]


def serving(directory: Directory, uuid: str, style: ApiStyle) -> Rule | None:
    """The rule of that uuid, if it can stand in for another: None when it is gone, off, empty, or of another style."""
    rule = directory.by_uuid.get(uuid)
    if rule is None or not rule.active or not usable(directory, rule) or foreign(directory, rule, style):
        return None
    return rule


def standing_in(rule: Rule, find: Callable[[str], Rule | None]) -> Iterator[Rule]:
    """The rule, then those that may serve its requests in its stead, over any number of links, each once."""
    waiting, seen = [rule], {rule.uuid}
    while waiting:
        at = waiting.pop(0)
        yield at
        for uuid in (*at.fallback, at.on_context_overflow):
            if uuid not in seen and (other := find(uuid)):
                seen.add(uuid)
                waiting.append(other)
