"""The vocabulary: providers, services, rules, scenarios, and what a request leaves behind.

Every struct is frozen and says what the configuration says (the JSON names are those of tingly-box configurations).
How a document becomes these structs, and what is refused on the way, is `document`.
"""

from __future__ import annotations

import enum
import hashlib
import re
from datetime import UTC, datetime, timedelta
from typing import Any, ClassVar, Literal

import msgspec

DEFAULT_RESERVE_CAP = 200_000
DEFAULT_TIME_WINDOW_S = 300
DEFAULT_TIMEOUT_S = 1800
DEFAULT_POOL = "default"
DEFAULT_RECORD_EVENTS = 100_000
OAUTH_EXPIRY_MARGIN = timedelta(minutes=5)

ApiStyle = Literal["openai", "anthropic", "google"]
AuthType = Literal["api_key", "oauth"]
ScenarioName = Literal["openai", "anthropic", "claude_code", "opencode"]
Reserve = Literal["none", "input", "full"]
Record = Literal["off", "sampled", "full"]


_SECRET_NAME = re.compile(r"(?i)auth|cookie|key|token|secret|password|credential|signature")


def is_secret_name(name: str) -> bool:
    """True for the name of a header, parameter or field whose value is a credential."""
    return bool(_SECRET_NAME.search(name))


class Struct(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Base of all structs.

    `kw_only` is not inherited, so each says it again, and `frozen` beside it for the type checker.
    """


# -- providers ---------------------------------------------------------------------------------------------------------


class OAuthDetail(Struct, frozen=True, kw_only=True):
    """OAuth credentials of a provider; `expires_at` is RFC 3339, empty when it does not expire."""

    access_token: str = ""
    refresh_token: str = ""
    expires_at: str = ""
    provider_type: str = ""
    user_id: str = ""
    extra_fields: dict[str, Any] = {}

    def is_expired(self, now: datetime | None = None) -> bool:
        """True when less than five minutes are left; never when `expires_at` is empty or no RFC 3339 date."""
        try:
            expires_at = datetime.fromisoformat(self.expires_at)
        except ValueError:
            return False
        if expires_at.tzinfo is None:
            expires_at = expires_at.replace(tzinfo=UTC)
        return (now or datetime.now(UTC)) + OAUTH_EXPIRY_MARGIN > expires_at


class Timeouts(Struct, frozen=True, kw_only=True):
    """Limits in seconds on parts of an attempt: to connect, to the headers, to the first byte, between bytes."""

    connect_s: float = 10
    headers_s: float = 120
    first_byte_s: float = 120
    idle_s: float = 120


class Limits(Struct, frozen=True, kw_only=True):
    """Requests and tokens a minute, and requests in flight; 0 is none.

    `split` gives each pool its share (0 to 1) of a provider's limits: they are counted in the pool of the rule.
    """

    rpm: int = 0
    tpm: int = 0
    in_flight: int = 0
    split: dict[str, float] = {}


class BreakerSettings(Struct, frozen=True, kw_only=True):
    """When a service's breaker opens and closes again.

    It opens after `failures` in a row (0: never for that), or when of `min_requests` or more within `window_s` the
    share `ratio` (0: never for that) has failed; for `open_s`, twice as long each time it opens again, at most eight
    times. `successes` probes in a row close it.
    """

    failures: int = 3
    ratio: float = 0.5
    min_requests: int = 20
    window_s: float = 60
    open_s: float = 30
    successes: int = 3


class Price(Struct, frozen=True, kw_only=True):
    """Prices per million tokens."""

    input: float = 0
    output: float = 0
    cached: float = 0


class Health(Struct, frozen=True, kw_only=True):
    """The active probe: a path, and how often in seconds; 0 is off."""

    path: str = ""
    interval_s: float = 0


class Provider(Struct, frozen=True, kw_only=True):
    """An account that serves models, and how to reach it.

    `stream_usage` false: it refuses `stream_options`. `responses` false: it has no /v1/responses.
    """

    uuid: str
    name: str
    api_base: str
    api_style: ApiStyle = "openai"
    provider_type: Literal["", "azure"] = ""
    auth_type: AuthType = "api_key"
    token: str = ""
    oauth_detail: OAuthDetail | None = None
    no_key_required: bool = False
    enabled: bool = True
    proxy_url: str = ""
    timeout: float = DEFAULT_TIMEOUT_S
    timeouts: Timeouts = Timeouts()
    headers: dict[str, str] = {}
    query: dict[str, str] = {}
    stream_usage: bool = True
    responses: bool = True
    limits: Limits = Limits()
    breaker: BreakerSettings = BreakerSettings()
    price: Price = Price()
    health: Health = Health()
    tags: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    last_updated: str = ""

    @property
    def access_token(self) -> str:
        """The credential to send: the key, or with `auth_type: oauth` the access token; empty when there is none."""
        if self.auth_type == "oauth":
            return self.oauth_detail.access_token if self.oauth_detail else ""
        return self.token

    def is_oauth_expired(self, now: datetime | None = None) -> bool:
        """True when the provider uses OAuth and its access token ends within five minutes."""
        return self.auth_type == "oauth" and self.oauth_detail is not None and self.oauth_detail.is_expired(now)


# -- tactics -----------------------------------------------------------------------------------------------------------


class Tactic(Struct, frozen=True, kw_only=True, tag_field="type"):
    """What all tactics share: how many tokens a request in flight holds on its service. The rest is `tactics`."""

    reserve: Reserve = "input"
    reserve_cap: int = DEFAULT_RESERVE_CAP


# -- rules -------------------------------------------------------------------------------------------------------------


class Service(Struct, frozen=True, kw_only=True):
    """A provider (by uuid) and a model; `weight` counts for random, `time_window` is in seconds."""

    provider: str
    model: str
    weight: int = 1
    active: bool = True
    time_window: int = DEFAULT_TIME_WINDOW_S
    tier: int = 0
    limits: Limits = Limits()

    @property
    def id(self) -> str:
        """`<provider uuid>:<model>`."""
        return f"{self.provider}:{self.model}"


class SmartOp(Struct, frozen=True, kw_only=True):
    """One condition of smart routing."""

    position: str
    operation: str
    value: str = ""
    meta: dict[str, Any] = {}


class SmartRoute(Struct, frozen=True, kw_only=True):
    """Services that serve instead of the rule's own when all `ops` hold."""

    uuid: str = ""
    description: str = ""
    ops: tuple[SmartOp, ...] = ()
    services: tuple[Service, ...] = ()

    @property
    def entry(self) -> str:
        """What names the entry's state: its uuid, else a digest of its ops."""
        return self.uuid or hashlib.sha256(msgspec.json.encode(self.ops)).hexdigest()[:16]


class Retry(Struct, frozen=True, kw_only=True):
    """Attempts for one request, the share of requests that may be retried, and the pause before a retry."""

    attempts: int = 3
    budget_ratio: float = 0.2
    backoff_ms: int = 50


class Rule(Struct, frozen=True, kw_only=True):
    """Maps the model that clients ask for, in a scenario, to services, and says how one is picked."""

    uuid: str
    scenario: ScenarioName = "openai"
    request_model: str
    response_model: str = ""
    description: str = ""
    active: bool = True
    pool: str = DEFAULT_POOL
    lb_tactic: Tactic
    services: tuple[Service, ...] = ()
    current_service_index: int | None = None
    smart_enabled: bool = False
    smart_routing: tuple[SmartRoute, ...] = ()
    session_affinity: int = 0
    session_header: str = ""
    on_store_loss: Literal["local", "closed"] = "local"
    on_exhausted: Literal["try", "refuse"] = "try"
    queue_timeout_ms: int = 0
    retry: Retry = Retry()
    fallback: tuple[str, ...] = ()
    on_context_overflow: str = ""
    strict_settle: bool = False

    entry: ClassVar[str] = ""
    """Names the smart-routing entry whose services stand in for the rule's own; empty for none."""

    def routed(self, index: int) -> RoutedRule:
        """The rule as it serves the requests that belong to its smart-routing entry at that index."""
        route = self.smart_routing[index]
        fields = {name: getattr(self, name) for name in Rule.__struct_fields__}
        fields |= {"services": route.services, "current_service_index": None}
        return RoutedRule(**fields, entry=route.entry)

    def variants(self) -> tuple[Rule, ...]:
        """The rule as it serves requests that belong to no entry, then as for each entry, where those count."""
        return (self, *(self.routed(i) for i in range(len(self.smart_routing) if self.smart_enabled else 0)))

    def variant(self, entry: str) -> Rule:
        """The rule as it serves the requests of an entry; as all others where there is none of that name (any more)."""
        return next((rule for rule in self.variants() if rule.entry == entry), self) if entry else self

    def all_services(self) -> tuple[Service, ...]:
        """The rule's own services, then those that only its smart-routing entries have, when these count."""
        entries = self.smart_routing if self.smart_enabled else ()
        found: dict[str, Service] = {}
        for service in (*self.services, *(service for route in entries for service in route.services)):
            found.setdefault(service.id, service)
        return tuple(found.values())

    def active_services(self) -> tuple[Service, ...]:
        """The services that are switched on, in order. Whether their provider is enabled is not asked here."""
        return tuple(service for service in self.services if service.active)

    def current_service(self, cursor: str = "") -> Service | None:
        """The service the cursor (a service id) stands on; the first active one if it stands on none; None without one.

        Without a cursor, the configured `current_service_index` counts, modulo the number of services.
        """
        active = self.active_services()
        if not cursor and self.current_service_index is not None and self.services:
            cursor = self.services[self.current_service_index % len(self.services)].id
        return next((service for service in active if service.id == cursor), active[0] if active else None)

    def current_service_index_of(self, cursor: str) -> int:
        """The cursor's position among all services of the rule, 0 if it has none."""
        return next((i for i, service in enumerate(self.services) if service.id == cursor), 0)

    def default_provider(self, cursor: str = "") -> str:
        """The provider uuid of the current service, empty without one."""
        service = self.current_service(cursor)
        return service.provider if service else ""

    def default_model(self, cursor: str = "") -> str:
        """The model of the current service, empty without one."""
        service = self.current_service(cursor)
        return service.model if service else ""


class RoutedRule(Rule, frozen=True, kw_only=True):
    """A rule with a matched smart-routing entry: its services are the entry's, its state is the entry's own."""

    entry: str  # type: ignore[misc]


# -- scenarios, client keys, the whole ---------------------------------------------------------------------------------


class AgentMarkers(Struct, frozen=True, kw_only=True):
    """Words in the prompts of Claude Code (its command line as of 2026-05) that only one kind of request has."""

    compact_marker: str = "summary of the conversation"
    main_preamble: str = "You are Claude Code"
    subagent_marker: str = "You are an agent"


class ScenarioFlags(Struct, frozen=True, kw_only=True):
    """How a scenario's models are configured.

    `unified`: its only rule serves every model. `separate`: each rule serves the model that it names, and nothing else
    is served. `smart`: the smart routing of its rules counts, whatever their `smart_enabled`.
    """

    unified: bool = False
    separate: bool = False
    smart: bool = False


class ScenarioConfig(Struct, frozen=True, kw_only=True):
    """Settings of one scenario."""

    scenario: ScenarioName
    flags: ScenarioFlags = ScenarioFlags()
    extensions: dict[str, Any] = {}

    @property
    def default_model(self) -> str:
        """The model that stands for all that no rule of the scenario names; empty for none."""
        return str(self.extensions.get("default_model", ""))

    @property
    def agent_markers(self) -> AgentMarkers:
        """By which words an agent's kinds of requests are told apart."""
        return AgentMarkers(**{n: v for n, v in self.extensions.items() if n in AgentMarkers.__struct_fields__})

    def effective_flags(self) -> ScenarioFlags:
        """The flags as set; unified when none is."""
        if self.flags.unified or self.flags.separate or self.flags.smart:
            return self.flags
        return ScenarioFlags(unified=True)


class PoolSettings(Struct, frozen=True, kw_only=True):
    """How a pool's events are recorded: not at all, one position in 17, or all; and how many are kept, about."""

    name: str
    record: Record = "off"
    record_events: int = DEFAULT_RECORD_EVENTS


class Configuration(Struct, frozen=True, kw_only=True):
    """All that a fleet shares: providers and rules in order, scenarios, pools that are not as by default."""

    providers: tuple[Provider, ...] = ()
    rules: tuple[Rule, ...] = ()
    scenarios: tuple[ScenarioConfig, ...] = ()
    pools: tuple[PoolSettings, ...] = ()

    def pool(self, name: str) -> PoolSettings:
        """The settings of the pool of that name."""
        return next((pool for pool in self.pools if pool.name == name), PoolSettings(name=name))

    def pool_names(self) -> tuple[str, ...]:
        """The names of all pools, those of rules first."""
        return tuple(dict.fromkeys((*(rule.pool for rule in self.rules), *(pool.name for pool in self.pools))))

    def provider(self, uuid: str) -> Provider | None:
        """The provider of that uuid."""
        return next((provider for provider in self.providers if provider.uuid == uuid), None)

    def rule(self, uuid: str) -> Rule | None:
        """The rule of that uuid."""
        return next((rule for rule in self.rules if rule.uuid == uuid), None)

    def scenario(self, name: str) -> ScenarioConfig | None:
        """The settings of a scenario that has some of its own."""
        return next((scenario for scenario in self.scenarios if scenario.scenario == name), None)

    def catch_all(self, name: str) -> Rule | None:
        """The active rule that serves the models which no rule of a scenario names; None where they are unknown.

        That is what its `default_model` says, or where its settings are unified its only rule.
        """
        scenario = self.scenario(name)
        if scenario is None:
            return None
        rules = [rule for rule in self.rules if rule.active and rule.scenario == name]
        if scenario.default_model:
            return next((rule for rule in rules if rule.request_model == scenario.default_model), None)
        return rules[0] if len(rules) == 1 and scenario.effective_flags().unified else None


# -- what a request leaves ---------------------------------------------------------------------------------------------
# Structs without `gc` hold nothing that could lead back to them: thousands are kept, and need not be gone through.
# What is `array_like` is kept packed, and needs no names of fields there.


class Usage(Struct, frozen=True, kw_only=True, gc=False, array_like=True):
    """Tokens as the vendor reports them: Anthropic's input excludes cache reads, OpenAI's includes them."""

    input: int = 0
    output: int = 0
    cached: int = 0
    cache_creation: int = 0
    reasoning: int = 0


class Outcome(enum.StrEnum):
    """How an attempt ended."""

    SUCCESS = "success"
    RATE_LIMITED = "rate_limited"
    UNAUTHORIZED = "unauthorized"
    OVERLOADED = "overloaded"
    FAILED = "failed"
    REJECTED = "rejected"
    CANCELLED = "cancelled"
    ABANDONED = "abandoned"
    LOST = "lost"


class Candidate(Struct, frozen=True, kw_only=True):
    """A service as a tactic sees it: what its window counts (reserved tokens included), and what is known of it.

    `first_token` and `per_token` are how long it takes, in µs; `cost` is its price.
    """

    service: str
    weight: int = 1
    requests: int = 0
    tokens: int = 0
    in_flight: int = 0
    cost: int = 0
    first_token: int = 0
    per_token: int = 0


class Pick(Struct, frozen=True, kw_only=True, gc=False):
    """One selection's answer.

    `number` names it within its worker; (epoch, position) is its place in the pool's history.
    """

    pool: str
    rule: str
    partition: str
    revision: int
    number: int
    service: str
    reason: str
    seq: int
    epoch: int
    position: int
    streak: int
    is_switch: bool
    reserved: int
    is_saved: bool = False
    """A pin has kept the session on a service that is not the cursor's."""
    is_local: bool = False
    """Made by this worker alone, without Redis: `seq`, `epoch` and `position` are 0."""

    @property
    def entry(self) -> str:
        """The smart-routing entry whose services it was made among, empty for none."""
        return self.partition[: -len(self.rule) - 1]

    @property
    def decision(self) -> str:
        """The decision's id: pool, epoch and position."""
        return f"{self.pool}.{self.epoch}.{self.position}"


# -- what the scripts are asked ----------------------------------------------------------------------------------------


class Selection(Struct, frozen=True, kw_only=True, gc=False, array_like=True):
    """One pick asked for: its name within the worker, the partition and the revision it is meant under.

    `draw` in [0, 2^32) brings the randomness, `reserved` tokens are held until the settle, `deadline_ms` from now on
    the attempt counts as lost; `excluded` services were tried before, `barred` ones cannot serve this request.
    `session` (a digest, empty for none) is pinned for `affinity_ms` to the service that it gets; `only` (a service id,
    empty for any) leaves no choice. The script reads them in this order.
    """

    number: int
    revision: int
    draw: int = 0
    reserved: int = 0
    deadline_ms: int
    affinity_ms: int = 0
    rule: str
    partition: str
    only: str = ""
    excluded: tuple[str, ...] = ()
    session: str = ""
    barred: tuple[str, ...] = ()


class Entry(Struct, frozen=True, kw_only=True, gc=False, array_like=True):
    """One settled attempt: which pick, on which service (empty for an abandoned name), and what it used.

    `cooldown_ms` is how long the service asks to be left alone. `first_token_us` passed before the first content token
    of a stream (0: not known), `stream_us` from there to the end, or for an answer in one piece the whole time. The
    script reads them in this order.
    """

    number: int
    service: str
    outcome: Outcome
    age_ms: int = 0
    usage: Usage = Usage()
    cooldown_ms: int = 0
    first_token_us: int = 0
    stream_us: int = 0


class ServiceDefinition(Struct, frozen=True, kw_only=True, omit_defaults=False):
    """A service of a partition as select reads it: `active` is 1 if it may serve at all, `window` in seconds.

    `rpm`, `tpm` and `in_flight` are its limits: 0 is none, below zero nothing is let through. `cost` is its price.
    """

    id: str
    active: int
    window: int
    weight: int
    tier: int = 0
    rpm: int = 0
    tpm: int = 0
    in_flight: int = 0
    cost: int = 0


class PartitionDefinition(Struct, frozen=True, kw_only=True, omit_defaults=False):
    """A partition as select reads it; `params` are its tactic's own numbers.

    A `cursor` given is set if `is_edit` is 1, or nothing is known of the partition. `refuses` is 1 when no service is
    tried that a cooldown or a breaker keeps back.
    """

    id: str
    tactic: str
    params: dict[str, int] = {}
    cursor: str = ""
    is_edit: int = 1
    refuses: int = 0
    services: tuple[ServiceDefinition, ...]


class WindowsDefinition(Struct, frozen=True, kw_only=True, omit_defaults=False):
    """All window lengths, in seconds, that a service has in the pool."""

    id: str
    lengths: tuple[int, ...]


class ProviderDefinition(Struct, frozen=True, kw_only=True, omit_defaults=False):
    """A provider's limits in the pool (0: none, below zero: nothing is let through) and its services' breaker numbers.

    `ratio_permille` is `BreakerSettings.ratio` in thousandths.
    """

    id: str
    rpm: int = 0
    tpm: int = 0
    in_flight: int = 0
    failures: int = 3
    ratio_permille: int = 500
    min_requests: int = 20
    window_ms: int = 60_000
    open_ms: int = 30_000
    successes: int = 3


class RuleDefinition(Struct, frozen=True, kw_only=True, omit_defaults=False):
    """What raising a rule's fence writes into its pool; no partitions is a tombstone.

    `retry_permille` is the share of requests, in thousandths, that may be retried.
    """

    rule: str
    revision: int
    retry_permille: int = 200
    partitions: tuple[PartitionDefinition, ...] = ()
    windows: tuple[WindowsDefinition, ...] = ()
    providers: tuple[ProviderDefinition, ...] = ()
