"""LiteLLM's `config.yaml`: model groups become rules, deployments services, their accounts providers.

Field names and meanings are those of docs.litellm.ai/docs/proxy/configs, …/config_settings and …/load_balancing
(November 2026).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from balancer.errors import ConfigurationError
from balancer.importing.accounts import Accounts, Deployment
from balancer.importing.notes import Imported, Notes, Secrets
from balancer.importing.router import Router
from balancer.importing.sections import tell_sections
from balancer.importing.values import as_table, variables, whole_weights

_WEIGHED_BY = ("weight", "rpm", "tpm")
_MOST_TIERS = 10
_SCENARIO = "openai"
_OF_ANTHROPIC = (
    "is served to clients of OpenAI's API; those that ask for it with Anthropic's (POST /v1/messages) need the base "
    "URL http://HOST/openai, for the rule is one of scenario openai"
)


class _Group(msgspec.Struct, kw_only=True):
    """The deployments of one model name, of whatever dialect."""

    name: str
    deployments: list[Deployment] = []

    @property
    def uuid(self) -> str:
        """The uuid that a rule has if it names none."""
        return f"{_SCENARIO}/{self.name}"


def litellm(raw: Any, *, is_literal: bool = False) -> Imported:
    """The document of a LiteLLM configuration. With `is_literal`, credentials stay in it as they are.

    Raises ConfigurationError for what is none.
    """
    if not isinstance(raw, Mapping) or not isinstance(raw.get("model_list"), list):
        raise ConfigurationError("this is no LiteLLM configuration: it has no model_list")
    notes = Notes()
    router = Router(raw, notes)
    accounts = Accounts(raw, router, notes, Secrets(notes, is_literal=is_literal, taken=variables(raw)))
    groups = _groups(raw["model_list"], accounts, notes)
    rules = {group.uuid: _rule(group, router, notes) for group in groups}
    aliases = _aliases(router, groups, rules, notes)
    _link(router, groups, aliases, rules, notes)
    tell_sections(raw, notes)
    document = {"providers": accounts.providers(), "rules": list(rules.values())}
    return Imported(document=document, warnings=notes.lines())


# -- model groups ------------------------------------------------------------------------------------------------------


def _groups(models: Sequence[Any], accounts: Accounts, notes: Notes) -> list[_Group]:
    """The groups in the order in which their first deployments stand."""
    groups: dict[str, _Group] = {}
    for i, row in enumerate(models):
        path = f"model_list[{i}]"
        table = as_table(row)
        name = table.get("model_name")
        if not isinstance(name, str) or not name:
            notes.warn(path, "has no model_name; left out")
            continue
        if "*" in name:
            notes.warn(
                path, f"{name!r} is a wildcard, which is not supported yet: write a rule for each model; left out"
            )
            continue
        for deployment in accounts.deployments(table, path):
            group = groups.setdefault(name, _Group(name=name))
            if deployment.is_anthropic and not any(other.is_anthropic for other in group.deployments):
                notes.warn(f"{path}.model_name", f"{name} {_OF_ANTHROPIC}")
            group.deployments.append(deployment)
    return list(groups.values())


def _rule(group: _Group, router: Router, notes: Notes) -> dict[str, Any]:
    """The rule of a group."""
    services: dict[str, dict[str, Any]] = {}
    weights = _weights(group, router, notes)
    for deployment, weight, tier in zip(group.deployments, weights, _tiers(group, notes), strict=True):
        id_ = f"{deployment.provider}:{deployment.model}"
        if id_ in services:
            _merge(services[id_], deployment, weight)
            notes.warn(deployment.path, f"is {id_} once more: one service, with the weights and limits of both")
            continue
        service: dict[str, Any] = {"provider": deployment.provider, "model": deployment.model}
        if weight != 1:
            service["weight"] = weight
        if router.time_window:
            service["time_window"] = router.time_window
        if tier:
            service["tier"] = tier
        if any(deployment.limits.values()):
            service["limits"] = {name: value for name, value in deployment.limits.items() if value}
        services[id_] = service
    rule: dict[str, Any] = {
        "scenario": _SCENARIO,
        "request_model": group.name,
        "lb_tactic": router.tactic,
        "services": list(services.values()),
    }
    if router.retry:
        rule["retry"] = dict(router.retry)
    if router.session_affinity:
        rule["session_affinity"] = router.session_affinity
    return rule


def _merge(service: dict[str, Any], deployment: Deployment, weight: int) -> None:
    """Adds a deployment that is the same service; a limit that only one of them has is none for both together."""
    service["weight"] = service.get("weight", 1) + weight
    limits = service.pop("limits", {})
    summed = {name: limits[name] + value for name, value in deployment.limits.items() if value and limits.get(name)}
    if summed:
        service["limits"] = summed


def _weights(group: _Group, router: Router, notes: Notes) -> list[int]:
    """What LiteLLM's shuffle weighs by: the first of weight, rpm and tpm that the first deployment has."""
    uniform = [1] * len(group.deployments)
    if router.tactic["type"] != "random":
        for deployment in group.deployments:
            if "weight" in deployment.weighed_by:
                notes.warn(
                    f"{deployment.path}.litellm_params.weight", f"{router.tactic['type']} does not look at weights"
                )
        return uniform
    for name in _WEIGHED_BY:
        if name in group.deployments[0].weighed_by:
            values = [deployment.weighed_by.get(name, 0) for deployment in group.deployments]
            for deployment, value in zip(group.deployments, values, strict=True):
                if not value:
                    notes.warn(
                        f"{deployment.path}.litellm_params", f"has no {name}, as others have: weight 0, as in LiteLLM"
                    )
            return whole_weights(values)
    return uniform


def _tiers(group: _Group, notes: Notes) -> list[int]:
    """`order` as tiers from 0 on; deployments without one serve last where others have one."""
    orders = sorted({deployment.order for deployment in group.deployments if deployment.order is not None})
    if not orders:
        return [0] * len(group.deployments)
    tiers = []
    for deployment in group.deployments:
        if deployment.order is None:
            notes.warn(f"{deployment.path}.litellm_params", "has no order, as others have: it serves after them all")
        tier = len(orders) if deployment.order is None else orders.index(deployment.order)
        if tier >= _MOST_TIERS:
            notes.warn(
                f"{deployment.path}.litellm_params.order", f"there are {_MOST_TIERS} tiers: it serves in the last"
            )
        tiers.append(min(tier, _MOST_TIERS - 1))
    return tiers


# -- what groups say of each other -------------------------------------------------------------------------------------


def _aliases(
    router: Router, groups: Sequence[_Group], rules: dict[str, dict[str, Any]], notes: Notes
) -> dict[str, list[str]]:
    """Enters a rule for each alias, with the services of the group meant; the aliases' rules by the group's uuid."""
    entered: dict[str, list[str]] = {}
    for alias, (target, path) in router.aliases.items():
        meant = [group for group in groups if group.name == target]
        if not meant:
            notes.warn(path, f"there is no model {target!r} left; the alias is left out")
        for group in meant:
            uuid = f"{_SCENARIO}/{alias}"
            if uuid in rules:
                notes.warn(path, f"{alias!r} is a model of its own too; the alias is left out")
                continue
            rules[uuid] = rules[group.uuid] | {"request_model": alias}
            entered.setdefault(group.uuid, []).append(uuid)
    return entered


def _link(
    router: Router,
    groups: Sequence[_Group],
    aliases: Mapping[str, Sequence[str]],
    rules: Mapping[str, dict[str, Any]],
    notes: Notes,
) -> None:
    """Writes `fallback` and `on_context_overflow` into the rules."""
    for kind, field in (("fallbacks", "fallback"), ("context_window_fallbacks", "on_context_overflow")):
        links: dict[str, list[str]] = {}
        for link in router.links(kind):
            sources = [group for group in groups if link.source in (group.name, "*")]
            if not sources and link.source in router.aliases:
                notes.warn(
                    link.path, f"{link.source!r} is an alias: what its model falls back to holds for it; left out"
                )
            elif not sources:
                notes.warn(link.path, f"there is no model {link.source!r} left to fall back from; left out")
            target = router.aliases.get(link.target, (link.target, ""))[0]
            for source in sources:
                if link.source == "*" and any(other.source == source.name for other in router.links(kind)):
                    continue
                _add(links, source, target, link.path, groups, notes, is_default=link.source == "*")
        for uuid, targets in links.items():
            for end in (uuid, *aliases.get(uuid, ())):
                if field == "fallback":
                    rules[end][field] = targets
                else:
                    rules[end][field] = targets[0]
            if field != "fallback" and len(targets) > 1:
                notes.warn(
                    kind, f"{uuid}: one rule stands in for prompts that are too long, {targets[0]}; the others do not"
                )


def _add(
    links: dict[str, list[str]],
    source: _Group,
    target: str,
    path: str,
    groups: Sequence[_Group],
    notes: Notes,
    *,
    is_default: bool,
) -> None:
    """Adds a link to the group of that name, if it can stand in; a warning says why not."""
    uuid = f"{_SCENARIO}/{target}"
    if not any(group.name == target for group in groups):
        notes.warn(path, f"there is no model {target!r} left; left out")
    elif uuid == source.uuid:
        if not is_default:
            notes.warn(path, "a rule cannot stand in for itself; left out")
    elif uuid in links.get(source.uuid, ()):
        notes.warn(path, f"{target} is named twice; once is enough")
    elif source.uuid in _reached(links, uuid):
        notes.warn(
            path,
            f"{source.name} → {target} would lead back: rules that stand in for others form no circle; left out",
        )
    else:
        links.setdefault(source.uuid, []).append(uuid)


def _reached(links: Mapping[str, Sequence[str]], start: str) -> set[str]:
    """All rules that the links lead to from one."""
    return set(_walk(links, start, set()))


def _walk(links: Mapping[str, Sequence[str]], start: str, seen: set[str]) -> Iterator[str]:
    for uuid in links.get(start, ()):
        if uuid not in seen:
            seen.add(uuid)
            yield uuid
            yield from _walk(links, uuid, seen)
