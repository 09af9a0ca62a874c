"""Small builders: a valid thing by default, and what a test is about as keywords."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from balancer.domain import Configuration, Provider, Rule, Service
from balancer.tactics import RoundRobin


def a_provider(uuid: str = "a", **more: Any) -> Provider:
    """An OpenAI-style account that no network reaches."""
    options: dict[str, Any] = {"name": uuid, "api_base": "https://upstream.invalid/v1"} | more
    return Provider(uuid=uuid, **options)


def a_service(id_: str = "a:m", **more: Any) -> Service:
    """A service by its id."""
    provider, _, model = id_.partition(":")
    return Service(provider=provider, model=model, **more)


def a_rule(uuid: str = "chat", services: Sequence[str | Service] = ("a:m", "b:m"), **more: Any) -> Rule:
    """A rule with these services, ids or structs."""
    options: dict[str, Any] = {"request_model": uuid, "lb_tactic": RoundRobin()} | more
    made = tuple(a_service(service) if isinstance(service, str) else service for service in services)
    return Rule(uuid=uuid, services=made, **options)


def a_configuration(*rules: Rule, **more: Any) -> Configuration:
    """These rules, and the providers that they name."""
    providers = dict.fromkeys(service.provider for rule in rules for service in rule.services)
    options: dict[str, Any] = {"providers": tuple(map(a_provider, providers))} | more
    return Configuration(rules=rules, **options)


def a_document(
    *,
    provider: dict[str, Any] | None = None,
    rule: dict[str, Any] | None = None,
    service: dict[str, Any] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """What a file holds: provider `a`, and a rule `chat` with the service `a:m`; each part takes more fields."""
    first = {"provider": "a", "model": "m"} | (service or {})
    return {
        "providers": [{"name": "a", "api_base": "https://upstream.invalid/v1"} | (provider or {})],
        "rules": [{"request_model": "chat", "services": [first]} | (rule or {})],
    } | more
