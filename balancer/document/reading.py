"""A document becomes the domain's structs, through one of three doors.

*strict* refuses what is wrong, every fault with its path. *lenient* (for tingly-box documents) mends what it can, each
mend a warning. *stored* reads what we wrote ourselves, possibly by a newer version: unknown fields are dropped.
"""

from __future__ import annotations

import datetime
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar, get_args
from urllib.parse import SplitResult, urlsplit

import msgspec

from balancer import oauth
from balancer.document import links, ranges
from balancer.document.fields import MASK, fields_of
from balancer.domain import (
    AgentMarkers,
    BreakerSettings,
    Configuration,
    Health,
    Limits,
    OAuthDetail,
    PoolSettings,
    Price,
    Provider,
    Retry,
    Rule,
    ScenarioConfig,
    ScenarioFlags,
    ScenarioName,
    Service,
    SmartOp,
    SmartRoute,
    Tactic,
    Timeouts,
)
from balancer.errors import ConfigurationError
from balancer.routing import fault_of
from balancer.tactics import TACTIC_NAMES, TACTICS, is_valid_tactic, parameters, tactic_from_map

Door = Literal["strict", "lenient", "stored"]

NOT_YET = "not supported yet"
_POOL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_NO_PATH = re.compile(r"[^\x21-\x7e]|#")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_LONGEST_NAME = 256
_NOTHING = (None, "")
"""What may stand for a field that is absent; no other value that is false may."""
_MOST_WEIGHT = 1_000_000
_MOST_SERVICES = 1000
_MOST_ROUTES = 100
_MOST_EVENTS = 100_000_000
_LONGEST_WINDOW_S = 366 * 24 * 3600
_TINGLY_KEYS = frozenset(
    (
        "user_token",
        "model_token",
        "jwt_secret",
        "encrypt_providers",
        "server_port",
        "default_request_id",
        "providers_v2",
    )
)
_STRUCT = TypeVar("_STRUCT", bound=msgspec.Struct)


class Reading(msgspec.Struct, frozen=True, kw_only=True):
    """What a document says, and what was mended or is worth a look."""

    configuration: Configuration
    warnings: tuple[str, ...] = ()


def is_tingly_box(raw: Any) -> bool:
    """True for a document with keys that only tingly-box writes."""
    return isinstance(raw, Mapping) and not _TINGLY_KEYS.isdisjoint(raw)


# -- reading -----------------------------------------------------------------------------------------------------------


def read(raw: Any, *, door: Door) -> Reading:
    """The configuration of a document. Raises ConfigurationError with every fault that the door does not mend."""
    reader = _Reader(door)
    configuration = reader.configuration(raw)
    if reader.faults:
        count = len(reader.faults)
        raise ConfigurationError(f"{count} fault{'s' if count > 1 else ''} in the configuration", tuple(reader.faults))
    return Reading(configuration=configuration, warnings=tuple(reader.warnings))


def faults_of(raw: Any) -> tuple[Configuration, list[str], list[str]]:
    """What the strict door makes of a document, what it refuses there, and what it warns of.

    The configuration is of use where nothing is refused.
    """
    reader = _Reader("strict")
    configuration = reader.configuration(raw)
    return configuration, reader.faults, reader.warnings


def read_tactic(raw: Any) -> Tactic:
    """The tactic of `{type, params}`, by the strict door. Raises ConfigurationError with every fault."""
    reader = _Reader("strict")
    try:
        tactic = reader.tactic(raw)
    except _SkippedError:
        tactic = None
    if reader.faults or tactic is None:
        raise ConfigurationError("the tactic is refused", tuple(reader.faults))
    return tactic


class _SkippedError(Exception):
    """The value at hand is not even of the right kind; its fault is noted."""


class _Reader:
    def __init__(self, door: Door) -> None:
        self._door = door
        self.faults: list[str] = []
        self._faulty: set[str] = set()
        self._bases: Counter[str] = Counter()
        self.warnings: list[str] = []
        self._provider_places: dict[str, str] = {}
        self._rule_places: dict[str, str] = {}

    # -- notes ---------------------------------------------------------------------------------------------------------

    def _fault(self, path: str, message: str) -> None:
        """Notes a fault; of several in one place the first."""
        if path not in self._faulty:
            self._faulty.add(path)
            self.faults.append(f"{path}: {message}")

    def _mend(self, path: str, message: str, mended: str) -> bool:
        """Notes what is wrong: a fault, or where it is mended a warning. True if it is to be mended."""
        if self._door == "strict":
            self._fault(path, message)
            return False
        if self._door == "lenient":
            self.warnings.append(f"{path}: {message}; {mended}")
        return True

    def _warn(self, path: str, message: str) -> None:
        if self._door != "stored":
            self.warnings.append(f"{path}: {message}")

    # -- generic parts -------------------------------------------------------------------------------------------------

    def _table(self, raw: Any, path: str) -> dict[str, Any]:
        if not isinstance(raw, Mapping):
            self._fault(path, f"expected a mapping, not {_kind(raw)}")
            raise _SkippedError
        return dict(raw)

    def _list(self, raw: Any, path: str) -> list[Any]:
        if raw is None:
            return []
        if not isinstance(raw, list):
            self._fault(path, f"expected a list, not {_kind(raw)}")
            return []
        return raw

    def _items(self, raw: Any, path: str) -> Iterable[tuple[str, dict[str, Any]]]:
        for i, item in enumerate(self._list(raw, path)):
            try:
                yield f"{path}[{i}]", self._table(item, f"{path}[{i}]")
            except _SkippedError:
                continue

    def _struct(self, kind: type[_STRUCT], table: dict[str, Any], path: str, **known: Any) -> _STRUCT:
        """The struct of a table whose fields are plain; `known` ones are given. Every field's fault is noted.

        A field with a fault has its default, or nothing: what is beside it is looked at all the same.
        """
        values: dict[str, Any] = {}
        fields = fields_of(kind)
        for name in table:
            if name not in fields:
                hint = "" if self._door != "strict" else f" (known: {', '.join(sorted(fields))})"
                self._mend(_join(path, name), f"unknown field{hint}", "dropped")
        for name, field in fields.items():
            if name in known:
                values[name] = known[name]
            elif name in table and (table[name] is not None or field.required):
                try:
                    values[name] = value = msgspec.convert(table[name], field.type)
                except msgspec.ValidationError as exc:
                    self._fault(_join(path, name), str(exc).replace(" - at `$", " - at `"))
                else:
                    if isinstance(value, float) and not math.isfinite(value):
                        self._fault(_join(path, name), f"expected a finite number, not {value}")
            elif field.required:
                self._fault(_join(path, name), "missing")
            if field.required and name not in values:
                values[name] = get_args(field.type)[0] if get_args(field.type) else ""
        return self._within(kind(**values), path)

    def _within(self, struct: _STRUCT, path: str) -> _STRUCT:
        """The struct with its numbers in their ranges."""
        for name, allowed in list(ranges.outside(struct)):
            default = fields_of(type(struct))[name].default
            message = f"expected {allowed}, not {getattr(struct, name)}"
            if self._mend(_join(path, name), message, f"{default} is taken"):
                struct = msgspec.structs.replace(struct, **{name: default})
        return struct

    def _part(self, kind: type[_STRUCT], table: dict[str, Any], name: str, path: str) -> _STRUCT:
        """The struct of a nested table, its defaults when it is absent."""
        raw = table.get(name)
        try:
            part = self._table(raw, _join(path, name)) if raw is not None else {}
        except _SkippedError:
            part = {}
        return self._struct(kind, part, _join(path, name))

    def _name(self, value: str, path: str, forbidden: str) -> None:
        if not value:
            self._fault(path, "must not be empty")
        elif len(value) > _LONGEST_NAME:
            self._fault(path, f"longer than {_LONGEST_NAME} characters")
        elif _CONTROL.search(value) or any(c in value for c in forbidden):
            self._fault(path, f"must not hold control characters or any of {' '.join(forbidden)}")

    def _not_yet(self, is_asked: bool, path: str) -> bool:
        """Notes a field whose work is not done yet. True when it must take its default."""
        return is_asked and self._mend(path, NOT_YET, "left out")

    # -- the document --------------------------------------------------------------------------------------------------

    def configuration(self, raw: Any) -> Configuration:
        """The whole."""
        if raw is None:
            raw = {}
        try:
            table = self._table(raw, "document")
        except _SkippedError:
            return Configuration()
        known = {"providers", "rules", "scenarios", "pools", "keys"}
        if self._door == "lenient" and isinstance(table.get("providers_v2"), list):
            table["providers"] = [*self._list(table.get("providers"), "providers"), *table.pop("providers_v2")]
        for name in [name for name in table if name not in known]:
            self._mend(name, f"unknown field (known: {', '.join(sorted(known))})", "dropped")
        self._not_yet(bool(table.get("keys")), "keys")
        providers = self._providers(table.get("providers"))
        uuids = {p.uuid: p.uuid for p in providers} | {p.name: p.uuid for p in providers}
        rules = self._rules(table.get("rules"), uuids)
        providers, rules = self._linked(providers, rules)
        scenarios = []
        for path, item in self._items(table.get("scenarios"), "scenarios"):
            if not self._is_unknown_scenario(item.get("scenario"), path, "the settings are"):
                scenarios.append(self._scenario(item, path))
        for name, count in Counter(s.scenario for s in scenarios).items():
            if count > 1:
                self._fault("scenarios", f"{name} is there {count} times")
        return Configuration(
            providers=tuple(providers),
            rules=tuple(self._with_scenarios(rules, scenarios)),
            scenarios=tuple(scenarios),
            pools=tuple(self._pools(table.get("pools"))),
        )

    def _linked(self, providers: list[Provider], rules: list[Rule]) -> tuple[list[Provider], list[Rule]]:
        """What they say of each other, looked at; of those that share a uuid, which is a fault, the first stands."""
        if self._door == "stored":
            return providers, rules
        places = self._rule_places
        for path, message in links.differing_limits(rules, places):
            self._warn(path, message)
        return (
            list(links.with_shares(providers, rules, self._provider_places, self._mend)),
            list(links.with_links(rules, places, self._mend, self._warn)),
        )

    def _is_unknown_scenario(self, scenario: Any, path: str, what: str) -> bool:
        """True for one that the lenient door leaves out, with a warning."""
        is_unknown = self._door == "lenient" and scenario not in get_args(ScenarioName)
        if is_unknown:
            self.warnings.append(f"{path}.scenario: {scenario!r} is unknown; {what} left out")
        return is_unknown

    def _pools(self, raw: Any) -> list[PoolSettings]:
        pools = []
        for path, table in self._items(raw, "pools"):
            pool = self._struct(PoolSettings, table, path)
            if not _POOL.fullmatch(pool.name):
                self._fault(_join(path, "name"), f"expected {_POOL.pattern}")
            if not 1 <= pool.record_events <= _MOST_EVENTS:
                self._fault(_join(path, "record_events"), f"expected 1 to {_MOST_EVENTS}")
            pools.append(pool)
        for name, count in Counter(pool.name for pool in pools).items():
            if count > 1:
                self._fault("pools", f"{name} is there {count} times")
        return pools

    def _scenario(self, table: dict[str, Any], path: str) -> ScenarioConfig:
        flags = self._part(ScenarioFlags, table, "flags", path)
        table = dict(table)
        extensions = table.get("extensions")
        if isinstance(extensions, dict):
            table["extensions"] = {
                name: value
                for name, value in extensions.items()
                if self._is_good_extension(name, value, _join(path, f"extensions.{name}"))
            }
        return self._struct(ScenarioConfig, table, path, flags=flags)

    def _is_good_extension(self, name: str, value: Any, path: str) -> bool:
        known = ("default_model", *AgentMarkers.__struct_fields__)
        if name not in known:
            return self._door == "stored" or not self._mend(path, f"unknown (known: {', '.join(known)})", "dropped")
        return (isinstance(value, str) and bool(value)) or not self._mend(path, "expected some text", "dropped")

    def _with_scenarios(self, rules: list[Rule], scenarios: Sequence[ScenarioConfig]) -> list[Rule]:
        """The rules, of which those of smart scenarios are smart; default models are looked at."""
        for i, scenario in enumerate(scenarios):
            models = {rule.request_model for rule in rules if rule.active and rule.scenario == scenario.scenario}
            if scenario.default_model and scenario.default_model not in models and self._door != "stored":
                path = f"scenarios[{i}].extensions.default_model"
                self._mend(path, f"no active rule of scenario {scenario.scenario} has this request_model", "unused")
        smart = {scenario.scenario for scenario in scenarios if scenario.flags.smart}
        return [
            msgspec.structs.replace(rule, smart_enabled=True)
            if rule.scenario in smart and rule.smart_routing and not rule.smart_enabled
            else rule
            for rule in rules
        ]

    # -- providers -----------------------------------------------------------------------------------------------------

    def _providers(self, raw: Any) -> list[Provider]:
        providers = []
        taken: dict[str, str] = {}
        logins: dict[str, str] = {}
        for path, table in self._items(raw, "providers"):
            try:
                provider = self._provider(table, path)
            except _SkippedError:
                continue
            for field, name in {"name": provider.name, "uuid": provider.uuid}.items():
                if name and taken.setdefault(name, path) != path:
                    self._fault(
                        _join(path, field), f"{name!r} is taken by {taken[name]}: names and uuids are unique together"
                    )
            token = provider.oauth_detail.refresh_token if oauth.is_renewed(provider) and provider.oauth_detail else ""
            if token and self._door != "stored" and logins.setdefault(token, path) != path:
                where = _join(path, "oauth_detail.refresh_token")
                self._fault(where, f"that of {logins[token]} too: each would use it up for the other; log in once more")
            self._provider_places.setdefault(provider.uuid, path)
            providers.append(provider)
        return providers

    def _provider(self, table: dict[str, Any], path: str) -> Provider:
        table = dict(table)
        name = table.get("uuid") if table.get("name") in _NOTHING else table.get("name")
        if isinstance(name, str):
            table["name"] = name
            table["uuid"] = name if table.get("uuid") in _NOTHING else table["uuid"]
        if table.get("auth_type") == "":
            del table["auth_type"]
        if table.get("api_style") == "":
            del table["api_style"]
        if table.get("timeout") == 0 and table["timeout"] is not False:
            del table["timeout"]
        detail = table.get("oauth_detail")
        parts: dict[str, Any] = {
            "timeouts": self._part(Timeouts, table, "timeouts", path),
            "limits": self._part(Limits, table, "limits", path),
            "breaker": self._part(BreakerSettings, table, "breaker", path),
            "price": self._part(Price, table, "price", path),
            "health": self._part(Health, table, "health", path),
            "oauth_detail": self._part(OAuthDetail, table, "oauth_detail", path) if detail is not None else None,
        }
        provider = self._struct(Provider, table, path, **parts)
        self._check_provider(provider, path)
        if not self._is_good_health(provider.health, _join(path, "health")):
            provider = msgspec.structs.replace(provider, health=Health())
        for pool in [pool for pool in provider.limits.split if not _POOL.fullmatch(pool)]:
            if self._mend(_join(path, f"limits.split.{pool}"), f"no pool's name: expected {_POOL.pattern}", "dropped"):
                split = {name: share for name, share in provider.limits.split.items() if name != pool}
                limits = msgspec.structs.replace(provider.limits, split=split)
                provider = msgspec.structs.replace(provider, limits=limits)
        detail = provider.oauth_detail
        if detail is not None and not self._is_good_renewal(detail, _join(path, "oauth_detail")):
            fields = {name: value for name, value in detail.extra_fields.items() if name != "grant"}
            detail = msgspec.structs.replace(detail, refresh_token="", extra_fields=fields)
            provider = msgspec.structs.replace(provider, oauth_detail=detail)
        return provider

    def _is_good_renewal(self, detail: OAuthDetail, path: str) -> bool:
        """False where the access token is used as given, since nobody could renew it."""
        faults = list(oauth.faults_of(detail)) if self._door != "stored" else []
        mended = [
            self._mend(_join(path, f"extra_fields.{name}"), message, "the access token is used as given")
            for name, message in faults
        ]
        return not any(mended)

    def _check_provider(self, provider: Provider, path: str) -> None:
        self._name(provider.name, _join(path, "name"), "{}")
        self._name(provider.uuid, _join(path, "uuid"), ":{}")
        for field in _masked_fields(provider):
            self._fault(
                _join(path, field), f"{MASK} stands for a credential that was not shown: write it, or a reference"
            )
        base = _split(provider.api_base)
        if base is None or base.scheme not in ("http", "https") or not base.hostname:
            self._fault(_join(path, "api_base"), "expected an http:// or https:// URL with a host")
        elif base.username or base.query or base.fragment:
            self._fault(_join(path, "api_base"), "must hold no credentials, query or fragment")
        elif provider.api_style == "google":
            self._check_google(base, _join(path, "api_base"))
        proxy = provider.proxy_url
        if proxy and not proxy.startswith(("sealed:", "${")):
            parts = _split(proxy)
            if parts is None or parts.scheme not in ("http", "https", "socks5", "socks5h") or not parts.hostname:
                self._fault(_join(path, "proxy_url"), "expected an http, https or socks5 URL with a host, or nothing")
        if provider.timeout <= 0:
            self._fault(_join(path, "timeout"), "expected more than 0 seconds")
        for name, value in msgspec.structs.asdict(provider.timeouts).items():
            if value <= 0:
                self._fault(_join(path, f"timeouts.{name}"), "expected more than 0 seconds")
        for name, value in provider.headers.items():
            if not _HEADER_NAME.fullmatch(name) or _CONTROL.search(value):
                self._fault(_join(path, "headers"), f"{name!r} is no valid header")
        if provider.auth_type == "oauth" and provider.oauth_detail is None:
            self._fault(_join(path, "oauth_detail"), "missing: auth_type is oauth")
        detail = provider.oauth_detail
        if detail and detail.expires_at:
            try:
                datetime.datetime.fromisoformat(detail.expires_at)
            except ValueError:
                self._mend(_join(path, "oauth_detail.expires_at"), "expected an RFC 3339 date", "never expires")

    def _check_google(self, base: SplitResult, path: str) -> None:
        """Notes bases that belong to Google and not to the API that the style means."""
        if base.path.rstrip("/").endswith("/openai"):
            self._fault(path, "is where Google speaks OpenAI's API: leave /openai out, or write api_style: openai")
        elif (base.hostname or "").endswith("aiplatform.googleapis.com") and "/v1" not in base.path:
            self._fault(path, "expected /v1/projects/PROJECT/locations/LOCATION/publishers/google behind the host")

    def _is_good_health(self, health: Health, path: str) -> bool:
        if health.path and (not health.path.startswith("/") or _NO_PATH.search(health.path)):
            return not self._mend(_join(path, "path"), "expected a path on the provider's host, like /health", "off")
        if health.interval_s and not health.path:
            return not self._mend(_join(path, "path"), "missing: interval_s asks for a probe", "off")
        return True

    # -- rules ---------------------------------------------------------------------------------------------------------

    def _rules(self, raw: Any, providers: Mapping[str, str]) -> list[Rule]:
        rules = []
        places = self._rule_places
        matched: dict[tuple[str, str], str] = {}
        for path, table in self._items(raw, "rules"):
            try:
                rule = self._rule(table, path, providers)
            except _SkippedError:
                continue
            if places.setdefault(rule.uuid, path) != path:
                self._fault(_join(path, "uuid"), f"{rule.uuid!r} is taken by {places[rule.uuid]}")
            if rule.active and self._door != "stored":
                key = (rule.scenario, rule.request_model)
                if matched.setdefault(key, path) != path:
                    self.warnings.append(f"{path}: {matched[key]} has the same scenario and request_model, and wins")
            rules.append(rule)
        return rules

    def _rule(self, table: dict[str, Any], path: str, providers: Mapping[str, str]) -> Rule:
        table = dict(table)
        scenario = "openai" if table.get("scenario") in _NOTHING else table["scenario"]
        table["scenario"] = scenario
        if self._is_unknown_scenario(scenario, path, "the rule is"):
            raise _SkippedError
        if table.get("uuid") in _NOTHING and isinstance(table.get("request_model"), str):
            table["uuid"] = self._default_uuid(f"{scenario}/{table['request_model']}")
        tactic = self.tactic(table.get("lb_tactic"), _join(path, "lb_tactic"))
        services, places = self._services(table.get("services"), _join(path, "services"), providers)
        routes = self._routes(table.get("smart_routing"), _join(path, "smart_routing"), providers)
        retry = self._part(Retry, table, "retry", path)
        index = self._index(table, path, places)
        rule = self._struct(
            Rule,
            table,
            path,
            lb_tactic=tactic,
            services=services,
            smart_routing=routes,
            retry=retry,
            current_service_index=index,
        )
        self._name(rule.uuid, _join(path, "uuid"), "{}")
        self._name(rule.request_model, _join(path, "request_model"), "{}")
        if rule.response_model:
            self._name(rule.response_model, _join(path, "response_model"), "{}")
        if not _POOL.fullmatch(rule.pool):
            self._fault(_join(path, "pool"), f"expected {_POOL.pattern}")
        if (
            rule.session_header
            and not _HEADER_NAME.fullmatch(rule.session_header)
            and self._mend(_join(path, "session_header"), "expected the name of a header", "left out")
        ):
            rule = msgspec.structs.replace(rule, session_header="")
        if rule.smart_enabled and not rule.smart_routing:
            self._warn(_join(path, "smart_enabled"), "there is no entry in smart_routing to match")
        if rule.session_header and not rule.session_affinity:
            self._warn(_join(path, "session_header"), "not looked at: session_affinity is 0")
        return rule

    def _default_uuid(self, base: str) -> str:
        """The uuid of a rule that has none of its own: further rules of the same model are numbered."""
        self._bases[base] += 1
        return base if self._bases[base] == 1 else f"{base}#{self._bases[base]}"

    def _index(self, table: dict[str, Any], path: str, places: list[int]) -> int | None:
        """The configured index, counted in the services that were kept; `places` are those of the document's."""
        raw = table.get("current_service_index")
        if raw is None:
            return None
        if not isinstance(raw, int) or isinstance(raw, bool):
            self._fault(_join(path, "current_service_index"), f"expected a whole number, not {_kind(raw)}")
            return None
        if 0 <= raw < len(places):
            return places[raw]
        if raw == 0:
            return raw
        message = f"{raw} is no index of {len(places)} services"
        if self._mend(_join(path, "current_service_index"), message, "taken modulo") and places:
            return places[raw % len(places)]
        return None

    def tactic(self, raw: Any, path: str = "") -> Tactic:
        """The tactic of a rule."""
        if raw is None:
            return tactic_from_map(TACTIC_NAMES[0])
        try:
            table = self._table(raw, path)
        except _SkippedError:
            return tactic_from_map(TACTIC_NAMES[0])
        for name in [name for name in table if name not in ("type", "params")]:
            self._mend(_join(path, name), "unknown field (known: params, type)", "dropped")
        kind = table.get("type")
        if kind is None or kind == "":
            kind = TACTIC_NAMES[0]
        if not is_valid_tactic(kind):
            message = f"unknown tactic {kind!r} (known: {', '.join(TACTIC_NAMES)})"
            self._mend(_join(path, "type"), message, "round_robin")
            kind = TACTIC_NAMES[0]
        return tactic_from_map(kind, self._params(kind, table.get("params"), _join(path, "params")))

    def _params(self, kind: str | int, raw: Any, path: str) -> dict[str, Any]:
        """The parameters that the tactic can use."""
        if raw is None:
            return {}
        try:
            params = self._table(raw, path)
        except _SkippedError:
            return {}
        tactic = TACTICS[kind if isinstance(kind, int) else TACTIC_NAMES.index(kind.lower())]
        known = parameters(tactic)
        for name in [name for name in params if name not in known]:
            # tingly-box writes all thresholds for every tactic.
            is_other = name in ("request_threshold", "token_threshold")
            if not is_other or self._door == "strict":
                text = f"{tactic.__name__} has no such parameter (known: {', '.join(sorted(known))})"
                self._mend(_join(path, name), text, "dropped")
        good = {}
        for name, value in params.items():
            if name in known and value is not None:
                try:
                    msgspec.convert(
                        int(value) if isinstance(value, float) and value.is_integer() else value, known[name]
                    )
                except msgspec.ValidationError as exc:
                    self._fault(_join(path, name), str(exc))
                else:
                    good[name] = value
        return good

    def _services(self, raw: Any, path: str, providers: Mapping[str, str]) -> tuple[tuple[Service, ...], list[int]]:
        """The services, and for each of the document's its place among them: one that is there twice is dropped."""
        services: list[Service] = []
        at: dict[str, tuple[int, str]] = {}
        places = []
        for place, table in self._items(raw, path):
            service = self._service(table, place, providers)
            if service.id in at:
                self._mend(place, f"{service.id} is already {at[service.id][1]}", "dropped")
            else:
                at[service.id] = (len(services), place)
                services.append(service)
            places.append(at[service.id][0])
        if len(services) > _MOST_SERVICES:
            self._fault(path, f"more than {_MOST_SERVICES} services")
        return tuple(services), places

    def _service(self, table: dict[str, Any], path: str, providers: Mapping[str, str]) -> Service:
        table = dict(table)
        if self._door == "lenient":
            table.setdefault("active", True)
        window = table.get("time_window")
        if isinstance(window, int) and not isinstance(window, bool) and window <= 0:
            del table["time_window"]
        service = self._struct(Service, table, path, limits=self._part(Limits, table, "limits", path))
        self._name(service.model, _join(path, "model"), "{}")
        uuid = providers.get(service.provider)
        if uuid is not None:
            service = msgspec.structs.replace(service, provider=uuid)
        elif self._door != "stored" and self._mend(
            _join(path, "provider"), f"there is no provider {service.provider!r}", "the service is inactive"
        ):
            name = re.sub(r"[:{}]", "_", service.provider)
            service = msgspec.structs.replace(service, provider=name, active=False)
        if service.weight < 0:
            if self._mend(_join(path, "weight"), "must not be negative", "taken as 0"):
                service = msgspec.structs.replace(service, weight=0)
        elif service.weight > _MOST_WEIGHT:
            self._fault(_join(path, "weight"), f"more than {_MOST_WEIGHT}")
        if service.time_window > _LONGEST_WINDOW_S:
            self._fault(_join(path, "time_window"), f"more than {_LONGEST_WINDOW_S} seconds")
        limits = service.limits
        message = "only a provider's limits are split: a service's are counted in the pool of its rule"
        if limits.split and self._mend(_join(path, "limits.split"), message, "dropped"):
            service = msgspec.structs.replace(service, limits=msgspec.structs.replace(limits, split={}))
        return service

    def _routes(self, raw: Any, path: str, providers: Mapping[str, str]) -> tuple[SmartRoute, ...]:
        routes: list[SmartRoute] = []
        taken: dict[str, str] = {}
        for place, table in self._items(raw, path):
            ops = tuple(self._op(op, op_path) for op_path, op in self._items(table.get("ops"), _join(place, "ops")))
            services, _ = self._services(table.get("services"), _join(place, "services"), providers)
            route = self._struct(SmartRoute, table, place, ops=ops, services=services)
            if route.uuid:
                self._name(route.uuid, _join(place, "uuid"), "{}|")
            if self._is_good_route(route, place, taken):
                routes.append(route)
        if len(routes) > _MOST_ROUTES:
            self._fault(path, f"more than {_MOST_ROUTES} entries")
        return tuple(routes)

    def _op(self, table: dict[str, Any], path: str) -> SmartOp:
        value = table.get("value")
        if isinstance(value, bool | int):
            table = {**table, "value": str(value).lower()}
        elif isinstance(value, dict):
            table = {**table, "value": json.dumps(value)}
        return self._struct(SmartOp, table, path)

    def _is_good_route(self, route: SmartRoute, path: str, taken: dict[str, str]) -> bool:
        """False for an entry that is left out."""
        faults = [(_join(path, f"ops[{i}].{f[0]}"), f[1]) for i, op in enumerate(route.ops) if (f := fault_of(op))]
        if not route.ops:
            faults.append((_join(path, "ops"), "expected an op: without one every request would match"))
        if not route.services:
            faults.append((_join(path, "services"), "expected a service for the requests that match"))
        if taken.setdefault(route.entry, path) != path:
            faults.append((path, f"has the same ops as {taken[route.entry]}, which is looked at before it"))
        for where, message in faults if self._door != "stored" else ():
            if self._mend(where, message, "the entry is left out"):
                return False
        return True


def _masked_fields(provider: Provider) -> Iterable[str]:
    """The fields of a provider that hold a mask where a credential should be, as `balancer get` shows it."""
    detail = provider.oauth_detail
    values: dict[str, Any] = {"token": provider.token, "proxy_url": provider.proxy_url}
    if detail is not None:
        values |= {"oauth_detail.access_token": detail.access_token}
        values |= {"oauth_detail.refresh_token": detail.refresh_token}
        values |= {f"oauth_detail.extra_fields.{name}": value for name, value in detail.extra_fields.items()}
    values |= {f"headers.{name}": value for name, value in provider.headers.items()}
    values |= {f"query.{name}": value for name, value in provider.query.items()}
    return [field for field, value in values.items() if value == MASK]


def _split(url: str) -> SplitResult | None:
    """The URL's parts, None for one that cannot be taken apart."""
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 - looked at for its error
    except ValueError:
        return None
    return parts


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _kind(value: Any) -> str:
    names = {dict: "a mapping", list: "a list", str: "text", bool: "true or false", type(None): "nothing"}
    return names.get(type(value), "a number")
