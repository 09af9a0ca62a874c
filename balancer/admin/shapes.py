"""The answers of the admin API as types, for its description. What Redis tells (events, explanations) is an object."""

from __future__ import annotations

from typing import Any

import msgspec

from balancer.admin.stats import Stats
from balancer.domain import Provider, Rule, ScenarioConfig, Service


class Fault(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that is wrong, and where: `services[0].weight` in what was sent, `rules[x].services[0]` in another."""

    path: str
    message: str


class Problem(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What every error answers; `faults` is there where a document was refused, and has all of them."""

    error: str
    faults: tuple[Fault, ...] = ()


class Alive(msgspec.Struct, frozen=True, kw_only=True):
    """The process is alive."""

    status: str


class Written(msgspec.Struct, frozen=True, kw_only=True):
    """What a write changed, a line each as `balancer diff` tells it, or with `dry_run` would change.

    `revision` is the one that stands: the new one, or where nothing changed the one before.
    """

    revision: int
    dry_run: bool
    changes: tuple[str, ...]
    warnings: tuple[str, ...] = ()


class Page(msgspec.Struct, frozen=True, kw_only=True):
    """A part of a list in its order. Pages fit each other while `revision` is the same. `etags` are by name."""

    total: int
    offset: int
    limit: int
    revision: int
    etags: dict[str, str]


class Providers(Page, frozen=True, kw_only=True):
    """Providers, their credentials masked."""

    providers: tuple[Provider, ...]


class Rules(Page, frozen=True, kw_only=True):
    """Rules."""

    rules: tuple[Rule, ...]


class Scenarios(Page, frozen=True, kw_only=True):
    """Scenarios that have settings of their own."""

    scenarios: tuple[ScenarioConfig, ...]


class ChangeEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One entry of the log of changes."""

    id: str
    at: str
    who: str
    via: str
    action: str
    revision: int | None
    differences: tuple[str, ...]
    left_out: int


class Changes(msgspec.Struct, frozen=True, kw_only=True):
    """Changes, the newest first. `next` is `before` of the next page, null at the end."""

    changes: tuple[ChangeEntry, ...]
    next: str | None


# -- tingly-box's shapes -----------------------------------------------------------------------------------------------


class LiveRule(msgspec.Struct, frozen=True, kw_only=True):
    """A rule; its `current_service_index` is where the cursor stands."""

    rule: Rule


class SummaryAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """A rule in short, with its services' counters."""

    summary: dict[str, Any]


class TacticChanged(msgspec.Struct, frozen=True, kw_only=True):
    """The tactic that is set; of a dry run, with what would change."""

    message: str
    tactic: str
    revision: int
    dry_run: bool = False
    changes: tuple[str, ...] = ()


class CurrentService(msgspec.Struct, frozen=True, kw_only=True):
    """Where the cursor stands."""

    rule_id: str
    rule_name: str
    service: Service
    service_id: str
    tactic: str
    stats: Stats


class RuleStats(msgspec.Struct, frozen=True, kw_only=True):
    """The counters of a rule's services, by id."""

    rule_id: str
    rule_name: str
    stats: dict[str, Stats]


class ServiceStats(msgspec.Struct, frozen=True, kw_only=True):
    """The counters of one service."""

    rule_id: str
    service_id: str
    stats: Stats


class AllStats(msgspec.Struct, frozen=True, kw_only=True):
    """The counters of all services: added up, and in each pool."""

    stats: dict[str, Stats]
    pools: dict[str, dict[str, Stats]]


class Cleared(msgspec.Struct, frozen=True, kw_only=True):
    """Counters were set to zero, or with `dry_run` would be."""

    message: str
    dry_run: bool = False
    changes: tuple[str, ...] = ()


class Picked(msgspec.Struct, frozen=True, kw_only=True):
    """A pick, and the hold that settles it."""

    decision: str
    rule: str
    service: str
    provider: str
    model: str
    api_base: str
    api_style: str
    reason: str
    seq: int
    streak: int
    switched: bool
    hold: str


class Settled(msgspec.Struct, frozen=True, kw_only=True):
    """An attempt is settled; `repeated` where it was before."""

    settled: bool
    repeated: bool = False


class DecisionPage(msgspec.Struct, frozen=True, kw_only=True):
    """Picks, the newest first."""

    decisions: tuple[dict[str, Any], ...]
    recording: dict[str, str]
    events_looked_at: int
    is_cut: bool


class DecisionAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """One pick, and how it ended."""

    decision: dict[str, Any]
