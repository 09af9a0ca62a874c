"""Picks for programs that send the request themselves, and how they settle them: over any worker, exactly once."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import msgspec

from balancer.admin import shapes
from balancer.admin.routing import Call, Route
from balancer.domain import Outcome, Rule, Usage
from balancer.errors import NoServiceError, NotFoundError, RequestError
from balancer.metrics import Metrics
from balancer.store import holds
from balancer.store.balance import Balance
from balancer.store.calls import needs_estimate

_MOST = 2**52
_Tokens = Annotated[int, msgspec.Meta(ge=0, le=_MOST)]
_Seconds = Annotated[float, msgspec.Meta(ge=0, le=86_400)]
_Name = Annotated[str, msgspec.Meta(max_length=4096)]


class PickRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A rule by its uuid, or by scenario and model; what is held, for how long; services that were tried before.

    A `session` is pinned as the rule says; `only` is the id of the one service that will do.
    """

    rule: str = ""
    scenario: str = ""
    model: str = ""
    reserved: _Tokens = 0
    hold_s: Annotated[float, msgspec.Meta(ge=1, le=86_400)] = 300
    excluded: Annotated[tuple[str, ...], msgspec.Meta(max_length=1000)] = ()
    session: _Name = ""
    only: _Name = ""


class UsageReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Tokens as the vendor reported them."""

    input: _Tokens = 0
    output: _Tokens = 0
    cached: _Tokens = 0
    cache_creation: _Tokens = 0
    reasoning: _Tokens = 0


class SettleRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the attempt ended; `abandoned` means that it was never sent.

    `cooldown_s`: so long the upstream asks to be left alone. `first_token_s` passed until the first token of a stream,
    `stream_s` from there to its end, or for an answer in one piece the whole time; 0 is not known.
    """

    hold: str
    outcome: Literal[
        "success", "rate_limited", "unauthorized", "overloaded", "failed", "rejected", "cancelled", "abandoned"
    ]
    usage: UsageReport = UsageReport()
    cooldown_s: _Seconds = 0
    first_token_s: _Seconds = 0
    stream_s: _Seconds = 0


class Picks:
    """The routes /api/v1/pick and /settle."""

    def __init__(self, balance: Balance, metrics: Metrics) -> None:
        self._balance = balance
        self._metrics = metrics

    def routes(self) -> list[Route]:
        """Both."""
        return [
            Route(
                method="POST",
                path="/api/v1/pick",
                handler=self.pick,
                role="operator",
                takes=PickRequest,
                gives=shapes.Picked,
            ),
            Route(
                method="POST",
                path="/api/v1/settle",
                handler=self.settle,
                role="operator",
                takes=SettleRequest,
                gives=shapes.Settled,
            ),
        ]

    async def pick(self, call: Call) -> object:
        """A service, and the hold that settles the attempt on it."""
        wanted = call.read(PickRequest)
        rule = self._rule(wanted)
        is_held = rule.lb_tactic.reserve != "none" or needs_estimate(rule, self._balance.directory.provider)
        pick, hold = await self._balance.pick_held(
            rule,
            reserved=min(wanted.reserved, rule.lb_tactic.reserve_cap) if is_held else 0,
            hold_ms=math.ceil(wanted.hold_s * 1000),
            excluded=wanted.excluded,
            session=wanted.session,
            only=wanted.only,
        )
        self._metrics.picked(pick)
        uuid, _, model = pick.service.partition(":")
        provider = self._balance.directory.provider(uuid)
        if provider is None:
            await self._settle(hold, SettleRequest(hold="", outcome="abandoned"))
            raise NoServiceError(f"the provider of service {pick.service} is gone")
        return {
            "decision": pick.decision,
            "rule": pick.rule,
            "service": pick.service,
            "provider": provider.name,
            "model": model,
            "api_base": provider.api_base,
            "api_style": provider.api_style,
            "reason": pick.reason,
            "seq": pick.seq,
            "streak": pick.streak,
            "switched": pick.is_switch,
            "hold": hold.token(),
        }

    async def settle(self, call: Call) -> object:
        """Settles an attempt. `repeated` is there when it was settled before, and nothing was changed."""
        report = call.read(SettleRequest)
        hold = holds.read(report.hold)
        is_first = await self._settle(hold, report)
        return {"settled": True} if is_first else {"settled": True, "repeated": True}

    async def _settle(self, hold: holds.Hold, report: SettleRequest) -> bool:
        outcome, usage = Outcome(report.outcome), Usage(**msgspec.structs.asdict(report.usage))
        is_first = await self._balance.settle_held(
            hold,
            outcome,
            usage,
            cooldown_ms=math.ceil(report.cooldown_s * 1000),
            first_token_us=round(report.first_token_s * 1_000_000),
            stream_us=round(report.stream_s * 1_000_000),
        )
        rule = self._balance.directory.by_uuid.get(hold.rule)
        # The hold came from outside: only what is configured becomes a label.
        if is_first and rule and any(service.id == hold.service for service in rule.all_services()):
            self._metrics.settled(hold, outcome, usage)
        return is_first

    def _rule(self, wanted: PickRequest) -> Rule:
        if bool(wanted.rule) == bool(wanted.model) or (wanted.rule and wanted.scenario):
            raise RequestError(
                "expected either `rule`, or `model` with its `scenario` (openai if absent)", param="rule"
            )
        directory = self._balance.directory
        if wanted.rule:
            rule = directory.by_uuid.get(wanted.rule)
        else:
            rule = directory.rule(wanted.scenario or "openai", wanted.model)
        if rule is None:
            raise NotFoundError("Rule not found")
        return rule
