"""Rules and counters as they stand, read from Redis for every request; clearing them, and changing a tactic.

The routes and shapes are tingly-box's. Reading never advances anything: no cursor, no streak, no window.
"""

from __future__ import annotations

from typing import Any

import msgspec

from balancer import document
from balancer.admin import shapes
from balancer.admin.resources import published
from balancer.admin.routing import DRY_RUN, Call, Handler, Route
from balancer.admin.stats import Stats, added_up, stats_of
from balancer.document import editing
from balancer.document.editing import Edited
from balancer.domain import DEFAULT_TIME_WINDOW_S, Configuration, Rule, Service
from balancer.errors import ConfigurationError, NotFoundError, RequestError
from balancer.roles import Role
from balancer.store import keys
from balancer.store.balance import Balance
from balancer.store.credentials import Sealer
from balancer.store.views import PartitionView, PoolView, RuleView
from balancer.tactics import TACTIC_NAMES, is_valid_tactic, tactic_name

_PREFIX = "/api/v1/load-balancer"


class TacticChange(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What PUT …/tactic takes; `tactic` is a name or one of the legacy numbers."""

    tactic: str | int
    params: dict[str, Any] | None = None


class Live:
    """The routes under /api/v1/load-balancer."""

    def __init__(self, balance: Balance, sealer: Sealer | None) -> None:
        self._balance = balance
        self._sealer = sealer

    def routes(self) -> list[Route]:
        """All of them."""
        rule = f"{_PREFIX}/rules/{{rule}}"
        service = f"{rule}/services/{{service}}"
        table: tuple[tuple[str, str, Handler, Role, type, type | None], ...] = (
            ("GET", rule, self.rule, "viewer", shapes.LiveRule, None),
            ("GET", f"{rule}/summary", self.summary, "viewer", shapes.SummaryAnswer, None),
            ("PUT", f"{rule}/tactic", self.change_tactic, "operator", shapes.TacticChanged, TacticChange),
            ("GET", f"{rule}/stats", self.rule_stats, "viewer", shapes.RuleStats, None),
            ("POST", f"{rule}/stats/clear", self.clear_rule, "operator", shapes.Cleared, None),
            ("GET", f"{rule}/current-service", self.current_service, "viewer", shapes.CurrentService, None),
            ("GET", f"{service}/stats", self.service_stats, "viewer", shapes.ServiceStats, None),
            ("POST", f"{service}/stats/clear", self.clear_service, "operator", shapes.Cleared, None),
            ("GET", f"{_PREFIX}/stats", self.stats, "viewer", shapes.AllStats, None),
            ("POST", f"{_PREFIX}/stats/clear", self.clear_all, "operator", shapes.Cleared, None),
        )
        return [
            Route(
                method=method,
                path=path,
                handler=handler,
                role=role,
                gives=gives,
                takes=takes,
                query=(DRY_RUN,) if role == "operator" else (),
            )
            for method, path, handler, role, gives, takes in table
        ]

    # -- rules ---------------------------------------------------------------------------------------------------------

    async def rule(self, call: Call) -> object:
        """A rule as in the configuration, with its live cursor."""
        rule = self._rule(call)
        view = await self._balance.view(rule.pool)
        written = document.write(Configuration(rules=(rule,)))["rules"][0]
        return {"rule": written | {"current_service_index": rule.current_service_index_of(view.cursor(rule.uuid))}}

    async def summary(self, call: Call) -> object:
        """A rule in short, and what its services have used."""
        rule = self._rule(call)
        view = await self._balance.view(rule.pool)
        partition = view.partitions.get(keys.partition(rule.uuid), PartitionView())
        state = view.rules.get(rule.uuid, RuleView())
        return {
            "summary": {
                "uuid": rule.uuid,
                "pool": rule.pool,
                "request_model": rule.request_model,
                "response_model": rule.response_model,
                "tactic": tactic_name(rule.lb_tactic),
                "current_service_index": rule.current_service_index_of(partition.cursor),
                "active": rule.active,
                "is_legacy": False,
                "streak": partition.streak,
                "seq": state.seq,
                "revision": state.revision,
                "services": [_summary(view, service) for service in rule.services],
                "smart_routing": [
                    {
                        "entry": variant.entry,
                        "description": route.description,
                        "current_service": view.cursor(rule.uuid, variant.entry),
                        "streak": view.streak(rule.uuid, variant.entry) or 0,
                        "services": [_summary(view, service) for service in variant.services],
                    }
                    for variant, route in zip(rule.variants()[1:], rule.smart_routing, strict=False)
                ],
            }
        }

    async def change_tactic(self, call: Call) -> object:
        """Publishes a rule's other tactic as a new revision. The cursor stays, a new streak begins."""
        uuid = self._rule(call).uuid
        change = call.read(TacticChange)
        if not is_valid_tactic(change.tactic):
            known = ", ".join(TACTIC_NAMES)
            raise RequestError(f"Unsupported tactic: {change.tactic!r} (supported: {known})", param="tactic")
        try:
            tactic = document.read_tactic({"type": change.tactic, "params": change.params})
        except ConfigurationError as exc:
            raise RequestError("; ".join(exc.faults), param="params") from exc

        def edit(configuration: Configuration) -> Edited:
            rule = configuration.rule(uuid)
            if rule is None:
                raise NotFoundError("Rule not found")
            call.check(editing.etag(rule), is_required=False)
            if rule.lb_tactic == tactic:
                return Edited(before=configuration, after=configuration)
            # An index in the configuration would move the cursor once more: it was meant for an earlier edit.
            edited = msgspec.structs.replace(rule, lb_tactic=tactic, current_service_index=None)
            rules = tuple(edited if other.uuid == uuid else other for other in configuration.rules)
            before = editing.without_index(configuration, "rule", uuid)
            return Edited(before=before, after=msgspec.structs.replace(configuration, rules=rules))

        edition = await published(self._balance, call, edit, f"change the tactic of rule {uuid}", self._sealer)
        answer = {
            "message": "Tactic updated successfully",
            "tactic": tactic_name(tactic),
            "revision": edition.revision,
        }
        if call.is_dry:
            return answer | {
                "message": "Tactic would be updated",
                "dry_run": True,
                "changes": edition.differences,
            }
        return answer

    async def current_service(self, call: Call) -> object:
        """The service that the cursor stands on, or that would be the first one."""
        rule = self._rule(call)
        view = await self._balance.view(rule.pool)
        service = self._usable(rule).current_service(view.cursor(rule.uuid))
        if service is None:
            raise NotFoundError("No available service")
        return {
            "rule_id": rule.uuid,
            "rule_name": rule.request_model,
            "service": {
                "provider": service.provider,
                "model": service.model,
                "weight": service.weight,
                "active": service.active,
                "time_window": service.time_window,
            },
            "service_id": service.id,
            "tactic": tactic_name(rule.lb_tactic),
            "stats": stats_of(view, service.id, service.time_window),
        }

    # -- counters ------------------------------------------------------------------------------------------------------

    async def rule_stats(self, call: Call) -> object:
        """The counters of a rule's services. They are shared by all rules of its pool."""
        rule = self._rule(call)
        view = await self._balance.view(rule.pool)
        stats = {service.id: stats_of(view, service.id, service.time_window) for service in rule.all_services()}
        return {"rule_id": rule.uuid, "rule_name": rule.request_model, "stats": stats}

    async def service_stats(self, call: Call) -> object:
        """The counters of one service of a rule."""
        rule, service = self._service(call)
        view = await self._balance.view(rule.pool)
        stats = stats_of(view, service.id, service.time_window)
        return {"rule_id": rule.uuid, "service_id": service.id, "stats": stats}

    async def stats(self, call: Call) -> object:
        """The counters of every service: in each pool, for pools never mix, and added up over the pools.

        The window is the one that the pool's first rule with the service gives it; where no rule has it any more, the
        first that it has.
        """
        pools: dict[str, dict[str, Stats]] = {}
        for view in await self._views():
            lengths = self._lengths(view)
            pools[view.pool] = {name: stats_of(view, name, lengths[name]) for name in sorted(lengths)}
        names = sorted({name for stats in pools.values() for name in stats})
        total = {name: added_up([stats[name] for stats in pools.values() if name in stats]) for name in names}
        return {"stats": total, "pools": pools}

    async def clear_rule(self, call: Call) -> object:
        """Clears the counters of a rule's services, for all rules of its pool."""
        rule = self._rule(call)
        services = [service.id for service in rule.all_services()]
        return await self._clear(call, {rule.pool: services}, "for all services in rule")

    async def clear_service(self, call: Call) -> object:
        """Clears the counters of one service, for all rules of its pool."""
        rule, service = self._service(call)
        return await self._clear(call, {rule.pool: [service.id]}, "for service")

    async def clear_all(self, call: Call) -> object:
        """Clears the counters of all services in all pools."""
        return await self._clear(call, {view.pool: sorted(self._lengths(view)) for view in await self._views()}, "")

    async def _clear(self, call: Call, services: dict[str, list[str]], whose: str) -> object:
        """Clears them, by their pools. It is noted before it is done: nothing is done that stands in no log."""
        changes = [f"~ pool {pool}: counters of {name} -> 0" for pool, names in services.items() for name in names]
        did = f"Statistics cleared {whose}" if whose else "All statistics cleared"
        if call.is_dry:
            return {"message": did.replace("cleared", "would be cleared"), "dry_run": True, "changes": changes}
        await self._balance.changes.note(call.deed("clear statistics"), changes)
        for pool, names in services.items():
            await self._balance.clear(pool, names)
        return {"message": did}

    # -- looking up ----------------------------------------------------------------------------------------------------

    def _rule(self, call: Call) -> Rule:
        rule = self._balance.directory.by_uuid.get(call.path["rule"])
        if rule is None:
            raise NotFoundError("Rule not found")
        return rule

    def _service(self, call: Call) -> tuple[Rule, Service]:
        rule = self._rule(call)
        service = next((service for service in rule.all_services() if service.id == call.path["service"]), None)
        if service is None:
            raise NotFoundError("Service not found in rule")
        return rule, service

    def _usable(self, rule: Rule) -> Rule:
        """The rule with those services switched off whose provider is."""
        directory = self._balance.directory
        services = []
        for service in rule.services:
            provider = directory.provider(service.provider)
            is_usable = service.active and provider is not None and provider.enabled
            services.append(msgspec.structs.replace(service, active=is_usable))
        return msgspec.structs.replace(rule, services=tuple(services))

    async def _views(self) -> list[PoolView]:
        """All pools. One that is away fails them all: sums without it would be wrong."""
        return [await self._balance.view(name) for name in self._balance.directory.configuration.pool_names()]

    def _lengths(self, view: PoolView) -> dict[str, int]:
        """The services that a pool has or had, each with the length of the window to tell of."""
        lengths: dict[str, int] = {}
        for rule in self._balance.directory.configuration.rules:
            if rule.pool == view.pool:
                for service in rule.all_services():
                    lengths.setdefault(service.id, service.time_window)
        for name, state in view.services.items():
            lengths.setdefault(name, next((w.length_s for w in state.windows), DEFAULT_TIME_WINDOW_S))
        return lengths


def _summary(view: PoolView, service: Service) -> dict[str, object]:
    stats = stats_of(view, service.id, service.time_window)
    return {
        "service_id": service.id,
        "provider": service.provider,
        "model": service.model,
        "weight": service.weight,
        "active": service.active,
        "time_window": service.time_window,
        "stats": {
            "request_count": stats.request_count,
            "window_request_count": stats.window_request_count,
            "window_tokens": stats.window_tokens_consumed,
            "window_input_tokens": stats.window_input_tokens,
            "window_output_tokens": stats.window_output_tokens,
            "last_used": stats.last_used,
        },
    }
