"""/api/v1/explain: a dry run of matching and smart routing for a request. Nothing is picked, sent or kept."""

from __future__ import annotations

from datetime import UTC, datetime

import msgspec

from balancer.admin.routing import Call, Route
from balancer.domain import ScenarioName
from balancer.explanation import explain, rule_of
from balancer.store.balance import Balance


class ExplainRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A request as a client would send it, and the rule, or else the scenario, that it is for."""

    request: msgspec.Raw
    rule: str = ""
    scenario: ScenarioName = "openai"


class Explain:
    """The route /api/v1/explain."""

    def __init__(self, balance: Balance) -> None:
        self._balance = balance

    def routes(self) -> list[Route]:
        """It alone."""
        return [Route(method="POST", path="/api/v1/explain", handler=self.explain, takes=ExplainRequest)]

    async def explain(self, call: Call) -> object:
        """The entry that a request matches, its services, and how each entry was considered."""
        wanted = call.read(ExplainRequest)
        body = bytes(wanted.request)
        configuration = self._balance.directory.configuration
        rule = rule_of(configuration, body, uuid=wanted.rule, scenario=wanted.scenario)
        return explain(configuration, rule, body, datetime.now(UTC), self._balance.seen(rule.pool))
