"""Configurations as documents again: to store, to show, to compare. What equals its default is left out."""

from __future__ import annotations

import hashlib
import re
from typing import Any

import msgspec

from balancer.document.fields import MASK, fields_of
from balancer.domain import Configuration, Provider, Rule, Tactic, is_secret_name
from balancer.tactics import tactic_to_map

_SECRET_PATHS = ("token", "oauth_detail.access_token", "oauth_detail.refresh_token", "proxy_url")
_OPEN_PATHS = re.compile(r"(?:headers|query|oauth_detail\.extra_fields)\.")


def write(configuration: Configuration) -> dict[str, Any]:
    """The document of a configuration, defaults left out."""
    table: dict[str, Any] = _written(configuration)
    return table


def _written(value: Any) -> Any:
    match value:
        case Tactic():
            return tactic_to_map(value)
        case msgspec.Struct():
            # msgspec's own omit_defaults takes an equal value that is another object for no default.
            return {
                field.name: _written(getattr(value, field.name))
                for field in fields_of(type(value)).values()
                if field.required or getattr(value, field.name) != _default(field)
            }
        case tuple() | list():
            return [_written(item) for item in value]
        case dict():
            return {key: _written(item) for key, item in value.items()}
        case _:
            return value


def _default(field: msgspec.structs.FieldInfo) -> Any:
    return field.default if field.default_factory is msgspec.NODEFAULT else field.default_factory()


def masked(configuration: Configuration) -> Configuration:
    """The configuration with literal and sealed credentials masked; references show where they come from."""
    providers = []
    for provider in configuration.providers:
        detail = provider.oauth_detail
        if detail is not None:
            detail = msgspec.structs.replace(
                detail,
                access_token=_mask(detail.access_token),
                refresh_token=_mask(detail.refresh_token),
                extra_fields=_masked_table(detail.extra_fields),
            )
        has_password = "@" in provider.proxy_url or provider.proxy_url.startswith("sealed:")
        providers.append(
            msgspec.structs.replace(
                provider,
                token=_mask(provider.token),
                oauth_detail=detail,
                headers=_masked_table(provider.headers),
                query=_masked_table(provider.query),
                proxy_url=_mask(provider.proxy_url) if has_password else provider.proxy_url,
            )
        )
    return msgspec.structs.replace(configuration, providers=tuple(providers))


def _mask(value: str) -> str:
    return value if not value or value.startswith("${") else MASK


def _masked_table(values: dict[str, Any]) -> dict[str, Any]:
    """The table with what is sealed, or by its name a secret, masked."""
    return {
        name: (_mask(value) if isinstance(value, str) else MASK)
        if is_secret_name(name) or (isinstance(value, str) and value.startswith("sealed:"))
        else value
        for name, value in values.items()
    }


def digest(configuration: Configuration) -> str:
    """What names a configuration: SHA-256 of its document, keys in order."""
    return hashlib.sha256(msgspec.json.encode(write(configuration), order="deterministic")).hexdigest()


def select_view(configuration: Configuration, rule: Rule) -> bytes:
    """All that a rule's select reads, in one form: when it differs, the rule has a new revision."""
    services = [(s.id, s.weight, s.time_window, s.active, s.tier, s.limits) for s in rule.services]
    named = {service.provider for service in rule.services}
    providers = [_provider_view(p, rule.pool) for p in configuration.providers if p.uuid in named]
    view = (
        (rule.uuid, rule.pool, rule.active, tactic_to_map(rule.lb_tactic), rule.current_service_index),
        (rule.on_exhausted, rule.retry.budget_ratio if rule.retry.attempts > 1 else 0),
        services,
        sorted(providers),
    )
    return msgspec.json.encode(view, order="deterministic")


def _provider_view(provider: Provider, pool: str) -> tuple[Any, ...]:
    limits, price = provider.limits, provider.price
    share = limits.split.get(pool)
    return (
        provider.uuid,
        provider.enabled,
        (limits.rpm, limits.tpm, limits.in_flight, bool(limits.split), 0 if share is None else share),
        msgspec.structs.astuple(provider.breaker),
        (price.input, price.output),
    )


# -- differences -------------------------------------------------------------------------------------------------------


def diff(old: Configuration, new: Configuration) -> list[str]:
    """What differs, a line each: `+ rule x`, `- provider y`, `~ rule z: field old -> new`, without credentials."""
    before, after = write(old), write(new)
    lines = []
    for kind, key in (("provider", "uuid"), ("rule", "uuid"), ("scenario", "scenario"), ("pool", "name")):
        olds = {item[key]: item for item in before.get(f"{kind}s", [])}
        news = {item[key]: item for item in after.get(f"{kind}s", [])}
        lines += [f"- {kind} {name}" for name in olds if name not in news]
        lines += [f"+ {kind} {name}" for name in news if name not in olds]
        for name, item in news.items():
            lines += [f"~ {kind} {name}: {change}" for change in sorted(_changes(olds.get(name, item), item))]
        if list(olds) != list(news) and sorted(olds) == sorted(news):
            lines.append(f"~ {kind}s: another order")
    return lines


def _changes(old: Any, new: Any, path: str = "") -> list[str]:
    if old == new:
        return []
    if isinstance(old, dict | None) and isinstance(new, dict | None):
        before, after = old or {}, new or {}
        names = [*before, *(name for name in after if name not in before)]
        if names:
            deeper = f"{path}." if path else ""
            return [line for name in names for line in _changes(before.get(name), after.get(name), deeper + name)]
    if path in _SECRET_PATHS or _OPEN_PATHS.match(path):
        return [f"{path} changed"]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = enumerate(zip(old, new, strict=True))
        return [line for i, (a, b) in pairs for line in _changes(a, b, f"{path}[{i}]")]
    return [f"{path} {_shown(old)} -> {_shown(new)}"]


def _shown(value: Any) -> str:
    return "(default)" if value is None else msgspec.json.encode(value).decode()
