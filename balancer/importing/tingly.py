"""tingly-box: its `config.json`, old and new, and what its rule export writes, line by line.

Shapes are those of tingly-box up to November 2026 (github.com/tingly-dev/tingly-box, internal/typ/type.go and
internal/dataexport). What the lenient door of `document` mends it mends here too; the result passes the strict one.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from typing import Any

import msgspec

from balancer import document
from balancer.domain import Configuration, OAuthDetail, Provider, is_secret_name
from balancer.errors import ConfigurationError
from balancer.importing.notes import Imported, Notes, Secrets
from balancer.importing.values import as_list, as_table, variables

_HINTS = {
    "model_token": "is a setting here: give workers BALANCER_CLIENT_TOKENS, what clients present",
    "user_token": "is a setting here: give workers BALANCER_ADMIN_TOKEN, for the admin API",
    "server_port": "the setting BALANCER_PORT",
    "verbose": "the setting BALANCER_LOG_LEVEL=debug",
}
_BASE64_PREFIX = "TGB64:"


def parse_export(text: str) -> dict[str, Any] | None:
    """The document of an export, JSON lines or `TGB64:…` around them; None for text that is none.

    Raises ConfigurationError for an export that is cut.
    """
    text = text.strip()
    if text.startswith(_BASE64_PREFIX):
        try:
            text = base64.b64decode(text.rpartition(":")[2], validate=True).decode()
        except (binascii.Error, UnicodeDecodeError) as exc:
            raise ConfigurationError("the export after TGB64: is no base64 of text") from exc
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines or '"type"' not in lines[0]:
        return None
    raw: dict[str, Any] = {"providers": [], "rules": []}
    for number, line in enumerate(lines, 1):
        try:
            item = msgspec.json.decode(line)
        except msgspec.DecodeError as exc:
            if number == 1:
                return None
            raise ConfigurationError(f"line {number} of the export is no JSON: {exc}") from exc
        kind = as_table(item).pop("type", "") if isinstance(item, dict) else ""
        if isinstance(item, dict) and kind in ("provider", "rule"):
            raw[f"{kind}s"].append({name: value for name, value in item.items() if name != "type"})
        elif number == 1 and kind != "metadata":
            return None
    return raw


def tingly(raw: Any, *, is_literal: bool = False) -> Imported:
    """The document of a tingly-box configuration. With `is_literal`, credentials stay in it as they are.

    Raises ConfigurationError with every fault that cannot be mended.
    """
    if not isinstance(raw, Mapping):
        raise ConfigurationError("this is no tingly-box configuration: expected a mapping")
    notes = Notes()
    reading = document.read(_modern(dict(raw), notes), door="lenient")
    for warning in reading.warnings:
        path, _, message = warning.partition(": ")
        notes.warn(path, _HINTS.get(path, message))
    configuration = _with_references(_without_strays(reading.configuration, notes), notes, is_literal=is_literal)
    return Imported(document=document.write(configuration), warnings=notes.lines())


def _modern(raw: dict[str, Any], notes: Notes) -> dict[str, Any]:
    """The document with what older and newer versions wrote in other places where the lenient door looks for it."""
    providers = raw.get("providers")
    if isinstance(providers, Mapping):
        # Version 1 kept providers by name.
        raw["providers"] = [{"name": name} | as_table(value) for name, value in providers.items()]
    places = {"providers": as_list(raw.get("providers")), "providers_v2": as_list(raw.get("providers_v2"))}
    for field, items in places.items():
        for i, item in enumerate(items):
            if isinstance(item, dict):
                items[i] = _modern_provider(dict(item), f"{field}[{i}]", notes)
        if field in raw:
            raw[field] = items
    if raw.get("rules") and not any(places.values()):
        notes.warn(
            "providers_v2",
            "there are rules and no providers: newer versions keep them in a database, not in config.json; import what "
            "tingly-box exports instead",
        )
    rules = as_list(raw.get("rules"))
    for i, rule in enumerate(rules):
        if isinstance(rule, dict):
            rules[i] = _modern_rule(dict(rule), f"rules[{i}]", notes)
    raw["rules"] = rules
    return raw


def _modern_provider(item: dict[str, Any], path: str, notes: Notes) -> dict[str, Any]:
    """A provider with a base, of those that version 3 may have beside it."""
    for style in ("openai", "anthropic"):
        base = item.pop(f"api_base_{style}", "")
        if not base:
            continue
        if not item.get("api_base"):
            item |= {"api_base": base, "api_style": style}
        elif base != item["api_base"]:
            notes.warn(
                f"{path}.api_base_{style}",
                f"a provider has one dialect: add another with api_base {base}, api_style {style}, and its services",
            )
    agent = item.pop("user_agent", "")
    if agent:
        item["headers"] = as_table(item.get("headers")) | {"User-Agent": agent}
    return item


def _modern_rule(rule: dict[str, Any], path: str, notes: Notes) -> dict[str, Any]:
    """A rule whose tactic stands where newer versions write it."""
    old, params = rule.pop("tactic", None), rule.pop("tactic_params", None)
    if old not in (None, "") and not rule.get("lb_tactic"):
        rule["lb_tactic"] = {"type": old, "params": params}
    elif old not in (None, ""):
        notes.warn(f"{path}.tactic", "lb_tactic stands beside it, and counts")
    return rule


def _without_strays(configuration: Configuration, notes: Notes) -> Configuration:
    """The configuration without services that have no provider: they never served, and our files refuse them."""
    known = {provider.uuid for provider in configuration.providers}
    rules = []
    for rule in configuration.rules:
        kept = tuple(service for service in rule.services if service.provider in known)
        routes = tuple(
            msgspec.structs.replace(route, services=tuple(s for s in route.services if s.provider in known))
            for route in rule.smart_routing
        )
        for service in rule.services:
            if service.provider not in known:
                notes.warn(f"rule {rule.uuid}", f"{service.id} has no provider and never served; left out")
        index = rule.current_service_index
        if index is not None and kept != rule.services:
            current = rule.services[index] if index < len(rule.services) else None
            index = kept.index(current) if current in kept else None
        rules.append(msgspec.structs.replace(rule, services=kept, smart_routing=routes, current_service_index=index))
    return msgspec.structs.replace(configuration, rules=tuple(rules))


def _with_references(configuration: Configuration, notes: Notes, *, is_literal: bool) -> Configuration:
    """The configuration with the name of a variable in the stead of each literal credential."""
    secrets = Secrets(notes, is_literal=is_literal, taken=variables(document.write(configuration)))
    providers = tuple(_referring(provider, secrets) for provider in configuration.providers)
    return msgspec.structs.replace(configuration, providers=providers)


def _referring(provider: Provider, secrets: Secrets) -> Provider:
    place = f"provider {provider.name}"

    def named(values: Mapping[str, Any], where: str) -> dict[str, Any]:
        return {
            name: secrets.reference(value, f"{provider.name} {name}", f"{place}: {where}.{name}")
            if is_secret_name(name) and isinstance(value, str)
            else value
            for name, value in values.items()
        }

    detail = provider.oauth_detail
    if detail is not None:
        detail = OAuthDetail(
            access_token=secrets.reference(
                detail.access_token, f"{provider.name} access token", f"{place}: oauth_detail.access_token"
            ),
            refresh_token=secrets.reference(
                detail.refresh_token, f"{provider.name} refresh token", f"{place}: oauth_detail.refresh_token"
            ),
            expires_at=detail.expires_at,
            provider_type=detail.provider_type,
            user_id=detail.user_id,
            extra_fields=named(detail.extra_fields, "oauth_detail.extra_fields"),
        )
    proxy = provider.proxy_url
    if "@" in proxy:
        proxy = secrets.reference(proxy, f"{provider.name} proxy", f"{place}: proxy_url")
    return msgspec.structs.replace(
        provider,
        token=secrets.reference(provider.token, f"{provider.name} key", f"{place}: token"),
        oauth_detail=detail,
        proxy_url=proxy,
        headers=named(provider.headers, "headers"),
        query=named(provider.query, "query"),
    )
