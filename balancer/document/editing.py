"""One provider, rule or scenario put into a configuration, or taken out of it, by the strict door.

What stood before and would be refused today (a lenient reading has let it in) hinders no edit of something else: only
faults that the edit brings are its own.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import msgspec

from balancer.document.fields import MASK
from balancer.document.reading import faults_of, read
from balancer.document.writing import masked, write
from balancer.domain import Configuration, Provider, Rule, ScenarioConfig
from balancer.errors import ConfigurationError

Kind = Literal["provider", "rule", "scenario"]
Resource = Provider | Rule | ScenarioConfig
KEYS: dict[Kind, str] = {"provider": "uuid", "rule": "uuid", "scenario": "scenario"}
"""The field that names a resource of each kind."""
_INDEXED = re.compile(r"\b(provider|rule|scenario)s\[(\d+)\]")
_OPEN_TABLES = ("headers", "query")


class Edited(msgspec.Struct, frozen=True, kw_only=True):
    """A configuration before and after an edit.

    `before` is what stood, less the `current_service_index` of the rule edited: it was meant for an earlier edit, and
    one given again moves the cursor again.
    """

    before: Configuration
    after: Configuration
    warnings: tuple[str, ...] = ()


Edit = Callable[[Configuration], Edited]


def resources(configuration: Configuration, kind: Kind) -> tuple[Resource, ...]:
    """All of a kind, in order."""
    found: tuple[Resource, ...] = getattr(configuration, f"{kind}s")
    return found


def name_of(resource: Resource) -> str:
    """Its uuid, or the name of the scenario."""
    return resource.scenario if isinstance(resource, ScenarioConfig) else resource.uuid


def names(configuration: Configuration) -> frozenset[str]:
    """All that is in it, as `rule x`, `provider y`, `scenario z`."""
    return frozenset(f"{kind} {name_of(r)}" for kind in KEYS for r in resources(configuration, kind))


def find(configuration: Configuration, kind: Kind, name: str) -> Resource | None:
    """The resource of that name."""
    return next((r for r in resources(configuration, kind) if name_of(r) == name), None)


def shown(resource: Resource) -> dict[str, Any]:
    """A resource as it is put: credentials masked, and without `current_service_index`, which is a command."""
    return _written(_sole(masked(_alone(resource))))


def etag(resource: Resource) -> str:
    """What tells a resource from any other state of itself: a digest with its quotes (RFC 9110 §8.8.3)."""
    text = msgspec.json.encode(_written(resource), order="deterministic")
    return f'"{hashlib.sha256(text).hexdigest()[:32]}"'


def without_index(configuration: Configuration, kind: Kind, name: str) -> Configuration:
    """The configuration, of whose rule of that name no `current_service_index` is known."""
    if kind != "rule":
        return configuration
    rules = tuple(
        msgspec.structs.replace(rule, current_service_index=None) if rule.uuid == name else rule
        for rule in configuration.rules
    )
    return msgspec.structs.replace(configuration, rules=rules)


def put(configuration: Configuration, kind: Kind, name: str, raw: Mapping[str, Any]) -> Edited:
    """The configuration with this resource, in its place if there is one of that name, else behind the others.

    A mask where a credential is, as `shown` has it, leaves that as it stands. Raises ConfigurationError with every
    fault; the paths of faults in the resource begin in it, others with what they are in, by its name.
    """
    standing = find(configuration, kind, name)
    table = _named(kind, name, raw)
    if isinstance(standing, Provider):
        table = _unmasked(table, standing)
    before = without_index(configuration, kind, name)
    document = write(before)
    items = document.setdefault(f"{kind}s", [])
    place = next((i for i, item in enumerate(items) if item[KEYS[kind]] == name), len(items))
    items[place : place + 1] = [table]
    after, warnings = _checked(before, document, f"{kind}s[{place}]")
    return Edited(before=before, after=after, warnings=warnings)


def remove(configuration: Configuration, kind: Kind, name: str) -> Edited:
    """The configuration without a resource. Raises ConfigurationError where others need it."""
    document = write(configuration)
    document[f"{kind}s"] = [item for item in document.get(f"{kind}s", []) if item[KEYS[kind]] != name]
    after, warnings = _checked(configuration, document)
    return Edited(before=configuration, after=after, warnings=warnings)


def merged(file: Configuration, standing: Configuration, additions: Sequence[str]) -> Configuration:
    """A file's configuration, with what of the standing one was added beside files and is not in it.

    Raises ConfigurationError where that does not fit the file.
    """
    known = names(file)
    changes: dict[str, Any] = {}
    for kind in KEYS:
        kept = [r for r in resources(standing, kind) if (n := f"{kind} {name_of(r)}") in additions and n not in known]
        if kept:
            changes[f"{kind}s"] = (*resources(file, kind), *kept)
    if not changes:
        return file
    try:
        return _checked(file, write(msgspec.structs.replace(file, **changes)))[0]
    except ConfigurationError as exc:
        raise ConfigurationError(
            "what was made over the admin API does not fit this file: write it into the file, delete it, or `--prune`",
            exc.faults,
        ) from exc


def beyond(before: Resource, after: Resource) -> list[str]:
    """Which fields an edit changes that are no operator's: all but what switches and weighs. Empty for none."""
    old, new = _operable(before), _operable(after)
    return sorted(name for name in {*old, *new} if old.get(name) != new.get(name))


def _operable(resource: Resource) -> dict[str, Any]:
    """The resource as written, without what operators may change."""
    table = _written(resource)
    if isinstance(resource, Provider):
        table.pop("enabled", None)
    if isinstance(resource, Rule):
        for name in ("active", "lb_tactic"):
            table.pop(name, None)
        for services in (table.get("services", []), *(e.get("services", []) for e in table.get("smart_routing", []))):
            for service in services:
                service.pop("weight", None)
                service.pop("active", None)
    return table


# -- details -----------------------------------------------------------------------------------------------------------


def _alone(resource: Resource) -> Configuration:
    match resource:
        case Provider():
            return Configuration(providers=(resource,))
        case Rule():
            return Configuration(rules=(resource,))
        case ScenarioConfig():
            return Configuration(scenarios=(resource,))


def _sole(configuration: Configuration) -> Resource:
    found: tuple[Resource, ...] = (*configuration.providers, *configuration.rules, *configuration.scenarios)
    return found[0]


def _written(resource: Resource) -> dict[str, Any]:
    ((table,),) = write(_alone(resource)).values()
    table.pop("current_service_index", None)
    written: dict[str, Any] = table
    return written


def _named(kind: Kind, name: str, raw: Mapping[str, Any]) -> dict[str, Any]:
    """The table with the name that its path gives it."""
    table = dict(raw)
    key = KEYS[kind]
    if table.get(key) in (None, ""):
        table[key] = name
    if table[key] != name:
        raise ConfigurationError(f"the {kind} is refused", (f"{key}: expected {name!r}, as in the path, or nothing",))
    return table


def _checked(before: Configuration, document: dict[str, Any], place: str = "") -> tuple[Configuration, tuple[str, ...]]:
    """The configuration of the document, and warnings that are new. Raises ConfigurationError for faults that are."""
    configuration, faults, warnings = faults_of(document)
    if not faults and not warnings:
        return configuration, ()
    old = write(before)
    known_faults, known_warnings = (set(_by_name(lines, old)) for lines in faults_of(old)[1:])
    own = tuple(line for line in faults if place and _is_in(line, place))
    others = [line for line in faults if line not in own]
    new = [line for line in _by_name(others, document) if line not in known_faults]
    if own or new:
        inner = (line[len(place) :].removeprefix(".").removeprefix(": ") for line in own)
        told = (*_by_name(inner, document), *new)
        raise ConfigurationError(f"{len(told)} fault{'s' if len(told) > 1 else ''}", told)
    fresh = tuple(line for line in _by_name(warnings, document) if line not in known_warnings)
    # What is refused, but stood before, stands as it did.
    return read(document, door="stored").configuration if faults else configuration, fresh


def _is_in(line: str, place: str) -> bool:
    return line.startswith(place) and line[len(place) :][:1] in (".", ":", "[")


def _by_name(lines: Iterable[str], document: Mapping[str, Any]) -> Iterator[str]:
    """The lines with `rules[name]` for `rules[3]`: places move, names stay."""

    def named(match: re.Match[str]) -> str:
        kind: Any = match[1]
        items = document.get(f"{kind}s") or []
        item = items[int(match[2])] if int(match[2]) < len(items) else None
        name = item.get(KEYS[kind]) if isinstance(item, dict) else None
        return f"{kind}s[{name}]" if isinstance(name, str) else match[0]

    for line in lines:
        yield _INDEXED.sub(named, line)


def _unmasked(table: Mapping[str, Any], standing: Provider) -> dict[str, Any]:
    """The table with the standing credentials where it has masks. One that stands nowhere stays a mask."""
    unmasked = dict(table)
    for name in ("token", "proxy_url"):
        if table.get(name) == MASK:
            unmasked[name] = getattr(standing, name) or MASK
    for name in _OPEN_TABLES:
        if isinstance(table.get(name), dict):
            unmasked[name] = _restored(table[name], getattr(standing, name))
    detail, known = table.get("oauth_detail"), standing.oauth_detail
    if isinstance(detail, dict) and known is not None:
        tokens = {name: getattr(known, name) for name in ("access_token", "refresh_token")}
        restored = _restored(detail, tokens)
        if isinstance(detail.get("extra_fields"), dict):
            restored["extra_fields"] = _restored(detail["extra_fields"], known.extra_fields)
        unmasked["oauth_detail"] = restored
    return unmasked


def _restored(table: Mapping[str, Any], standing: Mapping[str, Any]) -> dict[str, Any]:
    return {name: standing.get(name) or MASK if value == MASK else value for name, value in table.items()}
