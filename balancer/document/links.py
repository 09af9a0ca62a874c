"""What providers and rules say of each other: the pools' shares of limits, and rules that stand in for others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction

import msgspec

from balancer.domain import Limits, Provider, Rule

Mend = Callable[[str, str, str], bool]
"""Takes a path, what is wrong there and how it is mended; True if it is to be mended."""

_LIMITS = ("rpm", "tpm", "in_flight")
# opencode speaks either dialect, by the model that it is told to use.
_FAMILIES = ({"openai", "opencode"}, {"anthropic", "claude_code", "opencode"})
_TOLERANCE = 1e-9


# -- shares ------------------------------------------------------------------------------------------------------------


def with_shares(
    providers: Sequence[Provider], rules: Sequence[Rule], places: Mapping[str, str], mend: Mend
) -> Iterator[Provider]:
    """The providers, whose limits can be counted in every pool that reaches them.

    `places` has the path of each provider, by uuid. Limits are counted in the pool of the rule: several pools share
    them by `split`.
    """
    pools: dict[str, list[str]] = {}
    for rule in rules:
        for service in rule.all_services() if rule.active else ():
            reached = pools.setdefault(service.provider, [])
            if rule.pool not in reached:
                reached.append(rule.pool)
    for provider in providers:
        reached = pools.get(provider.uuid, [])
        limits = provider.limits
        # Whole in each of several pools, the limits would be exceeded.
        mended = Limits() if len(reached) > 1 else msgspec.structs.replace(limits, split={})
        how = "the limits are left out" if len(reached) > 1 else "the split is left out"
        for where, message in list(_limits_faults(limits, reached)):
            if mend(f"{places[provider.uuid]}.limits{where}", message, how):
                limits = mended
        yield msgspec.structs.replace(provider, limits=limits)


def _limits_faults(limits: Limits, reached: Sequence[str]) -> Iterator[tuple[str, str]]:
    """What is wrong with limits that rules of these pools reach: where, below the limits, and a word on it."""
    split = limits.split
    if not split and len(reached) > 1 and limits != Limits():
        shares = ", ".join(f"{pool}: …" for pool in reached)
        yield "", f"rules of {len(reached)} pools reach the provider: must say split: {{{shares}}}"
    for pool, share in split.items():
        if not 0 < share <= 1:
            yield f".split.{pool}", "a share is more than 0, and 1 at most"
        elif names := [name for name in _LIMITS if 0 < getattr(limits, name) * Fraction(str(share)) < 1]:
            yield f".split.{pool}", f"leaves none of {names[0]}: {getattr(limits, names[0])}; raise one of the two"
    total = sum(split.values())
    if total > 1 + _TOLERANCE:
        yield ".split", f"the shares add up to {total:.6g}, more than 1"
    for pool in reached:
        if split and pool not in split:
            yield f".split.{pool}", "missing: a rule of this pool reaches the provider"


# -- rules that stand in -----------------------------------------------------------------------------------------------


def with_links(
    rules: Sequence[Rule], places: Mapping[str, str], mend: Mend, warn: Callable[[str, str], None]
) -> Iterator[Rule]:
    """The rules, whose `fallback` and `on_context_overflow` name others that can stand in and never lead back.

    `places` has the path of each rule, by uuid.
    """
    by_uuid = {rule.uuid: rule for rule in rules}
    falls: dict[str, list[str]] = {}
    overflows: dict[str, list[str]] = {}

    def is_good(rule: Rule, name: str, path: str, links: dict[str, list[str]]) -> bool:
        message = _link_fault(rule, name, by_uuid, links)
        if message:
            mend(path, message, "dropped")
            return False
        links.setdefault(rule.uuid, []).append(name)
        if rule.active and not by_uuid[name].active:
            warn(path, f"rule {name} is not active, and stands in for nothing")
        return True

    for rule in rules:
        path = places[rule.uuid]
        fallback = tuple(
            name for i, name in enumerate(rule.fallback) if is_good(rule, name, f"{path}.fallback[{i}]", falls)
        )
        overflow = rule.on_context_overflow
        if overflow and not is_good(rule, overflow, f"{path}.on_context_overflow", overflows):
            overflow = ""
        yield msgspec.structs.replace(rule, fallback=fallback, on_context_overflow=overflow)


def _link_fault(rule: Rule, name: str, by_uuid: Mapping[str, Rule], links: Mapping[str, Sequence[str]]) -> str:
    """What is wrong with a link of a rule to that name, given the links already taken; empty if nothing is."""
    other = by_uuid.get(name)
    if other is None:
        meant = next((r.uuid for r in by_uuid.values() if r.request_model == name), "")
        return f"there is no rule with uuid {name!r}" + (f"; did you mean {meant!r}?" if meant else "")
    if name == rule.uuid:
        return "a rule cannot stand in for itself"
    if name in links.get(rule.uuid, ()):
        return f"{name!r} is named twice"
    if not any({rule.scenario, other.scenario} <= family for family in _FAMILIES):
        return f"rule {name!r} is of scenario {other.scenario}, which {rule.scenario} clients cannot be served by"
    way = _way(links, name, rule.uuid)
    return f"leads back: {' → '.join((rule.uuid, *way))}; leave one of these out" if way else ""


def _way(links: Mapping[str, Sequence[str]], start: str, end: str) -> tuple[str, ...]:
    """A way along the links, both ends included; empty if there is none."""
    came_from = {start: ""}
    open_ends = [start]
    while open_ends:
        at = open_ends.pop()
        if at == end:
            way = [at]
            while came_from[way[-1]]:
                way.append(came_from[way[-1]])
            return tuple(reversed(way))
        for following in links.get(at, ()):
            if following not in came_from:
                came_from[following] = at
                open_ends.append(following)
    return ()


# -- limits that differ ------------------------------------------------------------------------------------------------


def differing_limits(rules: Sequence[Rule], places: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Services to which two active rules of a pool give different limits: where, and a word on it."""
    seen: dict[tuple[str, str], tuple[Limits, str]] = {}
    for rule in rules:
        for service in rule.all_services() if rule.active else ():
            place = places[rule.uuid]
            limits, first = seen.setdefault((rule.pool, service.id), (service.limits, place))
            if limits != service.limits and first != place:
                yield (
                    place,
                    (f"{first} gives {service.id} other limits; both count the same requests, each against its own"),
                )
