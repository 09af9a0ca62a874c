"""Which rules can serve a request: those with services that are switched on, and which of these speak another API."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Literal, Protocol, get_args

from balancer import log
from balancer.bodies import Peek
from balancer.domain import DEFAULT_TIMEOUT_S, AgentMarkers, Configuration, Provider, Rule, Service
from balancer.facts import Facts, Services
from balancer.gateway.opening import opening_s
from balancer.routing import Router
from balancer.store.calls import needs_estimate
from balancer.translation.apis import ClientApi, is_native
from balancer.translation.marks import PREFIX_BYTES

SELECT_S = 30.0
"""More than a selection takes beside the time in its queue: Redis has its deadline, and so has a new configuration."""


_DEADLINE_MARGIN_S = 30.0
"""Beyond the provider's timeout: when it has passed, the attempt cannot be alive any more."""


_MARKABLE: tuple[ClientApi, ...] = ("messages", "responses")
"""Their vendors refuse a signature that is not their own."""


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

    @property
    def configuration(self) -> Configuration:
        """All of it."""


def usable(directory: Directory, rule: Rule) -> list[Service]:
    """The services that may serve at all: active, of an enabled provider."""
    return [
        service
        for service in rule.active_services()
        if (provider := directory.provider(service.provider)) and provider.enabled
    ]


def foreign(directory: Directory, services: Iterable[Service], api: ClientApi) -> list[Service]:
    """Those of the services that do not take requests of a client's API as they are."""
    return [
        service
        for service in services
        if (provider := directory.provider(service.provider)) and not is_native(api, provider)
    ]


def mixed(directory: Directory, scenario: str) -> frozenset[ClientApi]:
    """The APIs of clients whose conversations may hold marks: some service of the scenario's rules is foreign to them.

    What that has answered may stand in a conversation which goes on with any other rule.
    """
    named = {s.provider for rule in directory.rules(scenario) for s in rule.all_services() if s.active}
    providers = [p for uuid in named if (p := directory.provider(uuid)) and p.enabled]
    return frozenset(api for api in _MARKABLE if any(not is_native(api, provider) for provider in providers))


def deadline_ms(left_s: float) -> int:
    """The time after which an attempt counts as lost, of which so much may be left."""
    return round((max(left_s, 0) + _DEADLINE_MARGIN_S) * 1000)


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


Apart = Literal[0, 1, 2]
"""How a rule's services take a client's requests: as they are, but for marks in them that are no vendor's, or some of
them not without translation."""
NATIVE: Apart = 0
MARKED: Apart = 1
FOREIGN: Apart = 2


class Plan:
    """What a rule's requests have in common as long as the configuration stands, found out once."""

    __slots__ = (
        "apart",
        "deadline_ms",
        "entries",
        "foreign",
        "is_usual",
        "longest_s",
        "markers",
        "needs_estimate",
        "patience_s",
        "router",
        "rule",
        "shortest_s",
        "timeouts_s",
        "usable",
    )

    def __init__(self, directory: Directory, rule: Rule, marked: Container[ClientApi] = ()) -> None:
        """`marked`: the APIs of clients whose conversations may hold marks (see `translation.marks`)."""
        self.rule = rule
        is_asked = rule.smart_enabled and bool(rule.smart_routing) and not rule.entry
        self.router = Router(rule.smart_routing) if is_asked else None
        """What tells which of the rule's entries a request belongs to; None where that is not asked."""
        self.entries = rule.variants()[1:] if self.router else ()
        scenario = directory.configuration.scenario(rule.scenario) if self.router else None
        self.markers = scenario.agent_markers if scenario else AgentMarkers()
        self.usable = usable(directory, rule)
        """The services that may serve at all."""
        self.foreign: dict[ClientApi, list[Service]] = {
            api: foreign(directory, self.usable, api) for api in get_args(ClientApi)
        }
        """Those of them that do not speak an API of clients."""
        self.apart: dict[ClientApi, Apart] = {
            api: FOREIGN if services else MARKED if api in marked else NATIVE for api, services in self.foreign.items()
        }
        providers = {service.provider: directory.provider(service.provider) for service in rule.services}
        self.timeouts_s = {uuid: p.timeout if p else DEFAULT_TIMEOUT_S for uuid, p in providers.items()}
        """What each provider gives to a whole request."""
        self.longest_s = max(self.timeouts_s.values(), default=DEFAULT_TIMEOUT_S)
        self.shortest_s = min(self.timeouts_s.values(), default=DEFAULT_TIMEOUT_S)
        self.needs_estimate = rule.lb_tactic.reserve != "none" or needs_estimate(rule, directory.provider)
        """True when a request holds tokens while it is in flight; a limit of tokens always wants to know them."""
        openings = [opening_s(p.timeouts) for s in self.usable if (p := directory.provider(s.provider))]
        self.patience_s = SELECT_S + rule.queue_timeout_ms / 1000 + max(openings, default=0.0)
        """More than passes until the first byte: who waits so long needs no limit of its own."""
        self.deadline_ms = deadline_ms(self.longest_s)
        """After which an attempt counts as lost that was picked for when the request came."""
        self.is_usual = bool(self.usable) and not rule.response_model and not rule.strict_settle
        """True when an answer may pass as it is, and be sent when its settle is."""

    def is_apart(self, api: ClientApi, body: bytes) -> bool:
        """True when a request cannot go to each of the services as it is."""
        apart = self.apart[api]
        return apart == FOREIGN or (apart == MARKED and PREFIX_BYTES in body)


class Plans:
    """The plans of the configuration that stands."""

    def __init__(self, snapshot: Callable[[], Directory], seen: Callable[[str], Services] | None = None) -> None:
        """`seen` gives what is known of a pool's services."""
        self._snapshot = snapshot
        self._seen = seen
        self._directory: Directory | None = None
        self._plans: dict[str | tuple[str, str], Plan] = {}
        self._mixed: dict[str, frozenset[ClientApi]] = {}
        self._matching: dict[tuple[str, str], Plan] = {}

    def matching(self, scenario: str, model: str) -> Plan | None:
        """The plan of a scenario's rule for a model, None without one. Raises as `of`."""
        directory = self._snapshot()
        if directory is self._directory:
            plan = self._matching.get((scenario, model))
            if plan is not None:
                return plan
        rule = directory.rule(scenario, model)
        if rule is None:
            return None
        plan = self.of(rule)
        if rule.request_model == model:  # What else clients ask for has no end.
            self._matching[scenario, model] = plan
        return plan

    def of(self, rule: Rule) -> Plan:
        """The rule's plan. Raises StoreUnavailableError before the first configuration is known."""
        directory = self._snapshot()
        if directory is not self._directory:
            self._directory, self._plans, self._matching, self._mixed = directory, {}, {}, {}
        name = (rule.uuid, rule.entry) if rule.entry else rule.uuid
        plan = self._plans.get(name)
        if plan is None or plan.rule is not rule:
            if rule.scenario not in self._mixed:
                self._mixed[rule.scenario] = mixed(directory, rule.scenario)
            plan = self._plans[name] = Plan(directory, rule, self._mixed[rule.scenario])
        return plan

    def routed(self, plan: Plan, peek: Peek, *, request_id: str) -> Plan:
        """The plan for the entry that a request belongs to: the given one where there is none. Raises as `of`."""
        if plan.router is None:
            return plan
        services = self._seen(plan.rule.pool) if self._seen else None
        matched = plan.router.match(Facts(peek, datetime.now(UTC), services, plan.markers))
        if log.is_debugging():
            log.debug("smart routing", request=request_id, rule=plan.rule.uuid, reason=matched.reason)
        return plan if matched.index is None else self.of(plan.entries[matched.index])
