"""Which services a request would be picked among, and why: a dry run of matching and smart routing. Nothing is picked.

Tells names and numbers of a request, and never a word of its prompt.
"""

from __future__ import annotations

from datetime import datetime

import msgspec

from balancer import bodies
from balancer.domain import AgentMarkers, Configuration, Rule
from balancer.errors import NotFoundError, UnknownModelError
from balancer.facts import AbsentError, Facts, Services
from balancer.routing import Considered, Router


class ExplainedEntry(msgspec.Struct, frozen=True, kw_only=True):
    """A smart-routing entry that was looked at, and each of its ops as far as they were asked."""

    index: int
    entry: str
    description: str
    matches: bool
    ops: list[dict[str, object]]


class Explanation(msgspec.Struct, frozen=True, kw_only=True):
    """What becomes of a request: its rule, the entry that it matches ("" for none), and the services of that.

    `estimated_tokens` is the fact that the ops of `token` ask for; None where the request cannot be read.
    """

    rule: str
    pool: str
    model: str
    entry: str
    description: str
    services: list[str]
    estimated_tokens: int | None
    considered: list[ExplainedEntry]
    note: str


def rule_of(configuration: Configuration, body: bytes, *, uuid: str = "", scenario: str = "openai") -> Rule:
    """The rule named, or the one that a request matches. Raises NotFoundError, UnknownModelError, RequestError."""
    if uuid:
        rule = configuration.rule(uuid)
        if rule is None:
            raise NotFoundError(f"there is no rule with uuid {uuid!r}")
        return rule
    model = bodies.peek(body).model
    for rule in configuration.rules:
        if rule.active and (rule.scenario, rule.request_model) == (scenario, model):
            return rule
    if (rule := configuration.catch_all(scenario)) is not None:
        return rule
    raise UnknownModelError(f"no active rule of scenario {scenario} has the request's model", param="model")


def explain(
    configuration: Configuration, rule: Rule, body: bytes, now: datetime, services: Services | None = None
) -> Explanation:
    """What becomes of a request under a rule. Raises RequestError for a body that no request has."""
    peek = bodies.peek(body)
    scenario = configuration.scenario(rule.scenario)
    facts = Facts(peek, now, services, scenario.agent_markers if scenario else AgentMarkers())
    is_asked = rule.smart_enabled and bool(rule.smart_routing)
    matched = Router(rule.smart_routing if is_asked else ()).match(facts)
    serving = rule if matched.index is None else rule.routed(matched.index)
    if not rule.smart_routing:
        note = "the rule has no smart routing"
    elif not rule.smart_enabled:
        note = "smart_enabled is false: no entry is asked"
    else:
        note = "" if matched.index is not None else "no entry matches: the rule's own services serve"
    return Explanation(
        rule=rule.uuid,
        pool=rule.pool,
        model=peek.model,
        entry=serving.entry,
        description="" if matched.index is None else rule.smart_routing[matched.index].description,
        services=[service.id for service in serving.active_services()],
        estimated_tokens=_tokens(facts),
        considered=[_explained(rule, considered) for considered in matched.considered],
        note=note,
    )


def _tokens(facts: Facts) -> int | None:
    try:
        return facts.tokens
    except AbsentError:
        return None


def _explained(rule: Rule, considered: Considered) -> ExplainedEntry:
    route = rule.smart_routing[considered.index]
    ops: list[dict[str, object]] = [
        {"op": tried.op, "value": op.value, "holds": tried.holds, "found": tried.found}
        for tried, op in zip(considered.ops, route.ops, strict=False)
    ]
    return ExplainedEntry(
        index=considered.index,
        entry=considered.entry,
        description=route.description,
        matches=considered.matches,
        ops=ops,
    )
