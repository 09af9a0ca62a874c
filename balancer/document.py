"""The configuration document: what people write becomes the domain's structs, through one of three doors.

*strict* refuses what is wrong, every fault with its path. *lenient* (for tingly-box documents) mends what it can, each
mend a warning. *stored* reads what we wrote ourselves, possibly by a newer version: unknown fields are dropped.
"""

from __future__ import annotations

import datetime
import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar, get_args
from urllib.parse import urlsplit

import msgspec
import yaml

from balancer.domain import (
    TACTIC_NAMES,
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
    is_valid_tactic,
    tactic_from_map,
    tactic_to_map,
)
from balancer.errors import ConfigurationError

Door = Literal["strict", "lenient", "stored"]

NOT_YET = "not supported yet"
_POOL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_LONGEST_NAME = 256
_MOST_WEIGHT = 1_000_000
_MOST_SERVICES = 1000
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


# -- files -------------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """Safe YAML in which a key may not be written twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping, refused when a key repeats."""
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                raise yaml.MarkedYAMLError(None, None, f"the key {key!r} is written twice", key_node.start_mark)
            if isinstance(key, str):
                seen.add(key)
        return super().construct_mapping(node, deep)


def parse(text: str, name: str = "document") -> Any:
    """What YAML or JSON text holds; dates become strings. Raises ConfigurationError."""
    try:
        return _plain(yaml.load(text, Loader=_Loader))  # noqa: S506 - a SafeLoader that is stricter still
    except yaml.MarkedYAMLError as exc:
        where = f"{name}, line {exc.problem_mark.line + 1}" if exc.problem_mark else name
        raise ConfigurationError(f"{where}: {exc.problem}") from exc
    except yaml.YAMLError as exc:
        raise ConfigurationError(f"{name} is no valid YAML: {exc}") from exc


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k) if not isinstance(k, str) else k: _plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, datetime.datetime):
        return value.isoformat().replace("+00:00", "Z")
    if isinstance(value, datetime.date):
        return value.isoformat()
    return value


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
    """The value at hand cannot be used; its fault is noted."""


class _Reader:
    def __init__(self, door: Door) -> None:
        self._door = door
        self.faults: list[str] = []
        self.warnings: list[str] = []

    # -- notes ---------------------------------------------------------------------------------------------------------

    def _fault(self, path: str, message: str) -> None:
        self.faults.append(f"{path}: {message}")

    def _mend(self, path: str, message: str, mended: str) -> bool:
        """Notes what is wrong: a fault, or where it is mended a warning. True if it is to be mended."""
        if self._door == "strict":
            self._fault(path, message)
            return False
        if self._door == "lenient":
            self.warnings.append(f"{path}: {message}; {mended}")
        return True

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
        """The struct of a table whose fields are plain; `known` ones are given. Every field's fault is noted."""
        values: dict[str, Any] = {}
        fields = {field.name: field for field in msgspec.structs.fields(kind)}
        for name in table:
            if name not in fields:
                hint = "" if self._door != "strict" else f" (known: {', '.join(sorted(fields))})"
                self._mend(_join(path, name), f"unknown field{hint}", "dropped")
        is_whole = True
        for name, field in fields.items():
            if name in known:
                values[name] = known[name]
            elif name in table and not (table[name] is None and field.default is not msgspec.NODEFAULT):
                try:
                    values[name] = msgspec.convert(table[name], field.type)
                except msgspec.ValidationError as exc:
                    self._fault(_join(path, name), str(exc).replace(" - at `$", " - at `"))
                    is_whole = False
            elif field.required:
                self._fault(_join(path, name), "missing")
                is_whole = False
        if not is_whole:
            raise _SkippedError
        return kind(**values)

    def _part(self, kind: type[_STRUCT], table: dict[str, Any], name: str, path: str) -> _STRUCT:
        """The struct of a nested table, its defaults when it is absent."""
        raw = table.get(name)
        return self._struct(kind, self._table(raw, _join(path, name)) if raw is not None else {}, _join(path, name))

    def _name(self, value: str, path: str, forbidden: str) -> None:
        if not value:
            self._fault(path, "must not be empty")
        elif len(value) > _LONGEST_NAME:
            self._fault(path, f"longer than {_LONGEST_NAME} characters")
        elif _CONTROL.search(value) or any(c in value for c in forbidden):
            self._fault(path, f"must not hold control characters or any of {' '.join(forbidden)}")

    def _not_yet(self, is_asked: bool, path: str, why: str = "") -> bool:
        """Notes a field whose work is not done yet. True when it must take its default."""
        return is_asked and self._mend(path, NOT_YET + (f": {why}" if why else ""), "left out")

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
        for name in table.keys() - known:
            self._mend(name, f"unknown field (known: {', '.join(sorted(known))})", "dropped")
        self._not_yet(bool(table.get("keys")), "keys")
        providers = self._providers(table.get("providers"))
        uuids = {p.uuid: p.uuid for p in providers} | {p.name: p.uuid for p in providers}
        rules = self._rules(table.get("rules"), uuids)
        scenarios = []
        for path, item in self._items(table.get("scenarios"), "scenarios"):
            try:
                scenarios.append(self._scenario(item, path))
            except _SkippedError:
                continue
        for name, count in Counter(s.scenario for s in scenarios).items():
            if count > 1:
                self._fault("scenarios", f"{name} is there {count} times")
        return Configuration(
            providers=tuple(providers),
            rules=tuple(rules),
            scenarios=tuple(scenarios),
            pools=tuple(self._pools(table.get("pools"))),
        )

    def _pools(self, raw: Any) -> list[PoolSettings]:
        pools = []
        for path, table in self._items(raw, "pools"):
            try:
                pool = self._struct(PoolSettings, table, path)
            except _SkippedError:
                continue
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
        for name in ("separate", "smart"):
            if self._not_yet(getattr(flags, name), _join(path, f"flags.{name}")):
                flags = msgspec.structs.replace(flags, **{name: False})
        table = dict(table)
        if self._not_yet(bool(table.get("extensions")), _join(path, "extensions")):
            del table["extensions"]
        return self._struct(ScenarioConfig, table, path, flags=flags)

    # -- providers -----------------------------------------------------------------------------------------------------

    def _providers(self, raw: Any) -> list[Provider]:
        providers = []
        taken: dict[str, str] = {}
        for path, table in self._items(raw, "providers"):
            try:
                provider = self._provider(table, path)
            except _SkippedError:
                continue
            for field, name in {"name": provider.name, "uuid": provider.uuid}.items():
                if taken.setdefault(name, path) != path:
                    self._fault(
                        _join(path, field), f"{name!r} is taken by {taken[name]}: names and uuids are unique together"
                    )
            providers.append(provider)
        return providers

    def _provider(self, table: dict[str, Any], path: str) -> Provider:
        table = dict(table)
        name = table.get("name") or table.get("uuid")
        if isinstance(name, str):
            table["name"] = name
            table["uuid"] = table.get("uuid") or name
        if table.get("auth_type") == "":
            del table["auth_type"]
        if table.get("api_style") == "":
            del table["api_style"]
        if table.get("api_style") == "google":
            self._fault(_join(path, "api_style"), f"google is {NOT_YET}")
            raise _SkippedError
        if table.get("timeout") == 0:
            del table["timeout"]
        given_breaker = self._not_yet(bool(table.get("breaker")), _join(path, "breaker"))
        if given_breaker or not table.get("breaker"):
            table.pop("breaker", None)
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
        if self._not_yet(provider.limits != Limits(), _join(path, "limits")):
            provider = msgspec.structs.replace(provider, limits=Limits())
        if self._not_yet(provider.price != Price(), _join(path, "price")):
            provider = msgspec.structs.replace(provider, price=Price())
        if self._not_yet(bool(provider.health.interval_s), _join(path, "health")):
            provider = msgspec.structs.replace(provider, health=Health())
        oauth = provider.oauth_detail
        why = "access tokens are used as given until then; leave it out"
        if oauth and self._not_yet(bool(oauth.refresh_token), _join(path, "oauth_detail.refresh_token"), why):
            oauth = msgspec.structs.replace(oauth, refresh_token="")
            provider = msgspec.structs.replace(provider, oauth_detail=oauth)
        return provider

    def _check_provider(self, provider: Provider, path: str) -> None:
        self._name(provider.name, _join(path, "name"), "{}")
        self._name(provider.uuid, _join(path, "uuid"), ":{}")
        base = urlsplit(provider.api_base)
        if base.scheme not in ("http", "https") or not base.hostname:
            self._fault(_join(path, "api_base"), "expected an http:// or https:// URL with a host")
        elif base.username or base.query or base.fragment:
            self._fault(_join(path, "api_base"), "must hold no credentials, query or fragment")
        proxy = provider.proxy_url
        is_opaque = proxy.startswith(("sealed:", "${"))
        if proxy and not is_opaque and urlsplit(proxy).scheme not in ("http", "https", "socks5", "socks5h"):
            self._fault(_join(path, "proxy_url"), "expected an http, https or socks5 URL, or nothing")
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
        oauth = provider.oauth_detail
        if oauth and oauth.expires_at:
            try:
                datetime.datetime.fromisoformat(oauth.expires_at)
            except ValueError:
                self._mend(_join(path, "oauth_detail.expires_at"), "expected an RFC 3339 date", "never expires")

    # -- rules ---------------------------------------------------------------------------------------------------------

    def _rules(self, raw: Any, providers: Mapping[str, str]) -> list[Rule]:
        rules = []
        places: dict[str, str] = {}
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
        table["scenario"] = scenario = table.get("scenario") or "openai"
        if self._door == "lenient" and scenario not in get_args(ScenarioName):
            self.warnings.append(f"{path}.scenario: {scenario!r} is unknown; the rule is left out")
            raise _SkippedError
        if not table.get("uuid") and isinstance(table.get("request_model"), str):
            table["uuid"] = f"{scenario}/{table['request_model']}"
        for name in ("retry",):
            if not table.get(name) or self._not_yet(True, _join(path, name)):
                table.pop(name, None)
        if self._not_yet(table.get("on_store_loss") == "local", _join(path, "on_store_loss"), "today it is closed"):
            del table["on_store_loss"]
        if self._not_yet(table.get("on_exhausted") == "refuse", _join(path, "on_exhausted")):
            del table["on_exhausted"]
        for name in ("session_affinity", "session_header", "queue_timeout_ms", "fallback", "smart_enabled"):
            if self._not_yet(bool(table.get(name)), _join(path, name)):
                del table[name]
        tactic = self.tactic(table.get("lb_tactic"), _join(path, "lb_tactic"))
        services = self._services(table.get("services"), _join(path, "services"), providers)
        routes = self._routes(table.get("smart_routing"), _join(path, "smart_routing"), providers)
        retry = self._part(Retry, table, "retry", path)
        index = self._index(table, path, len(services))
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
        return rule

    def _index(self, table: dict[str, Any], path: str, services: int) -> int | None:
        raw = table.get("current_service_index")
        if raw is None:
            return None
        if not isinstance(raw, int) or isinstance(raw, bool):
            self._fault(_join(path, "current_service_index"), f"expected a whole number, not {_kind(raw)}")
            return None
        if 0 <= raw < services or (raw == 0 and services == 0):
            return raw
        message = f"{raw} is no index of {services} services"
        if self._mend(_join(path, "current_service_index"), message, "taken modulo") and services:
            return raw % services
        return None

    def tactic(self, raw: Any, path: str = "") -> Tactic:
        """The tactic of a rule."""
        if raw is None:
            return tactic_from_map(TACTIC_NAMES[0])
        table = self._table(raw, path)
        for name in table.keys() - {"type", "params"}:
            self._mend(_join(path, name), "unknown field (known: params, type)", "dropped")
        kind = table.get("type")
        if kind is None or kind == "":
            kind = TACTIC_NAMES[0]
        if not is_valid_tactic(kind):
            if not self._mend(
                _join(path, "type"), f"unknown tactic {kind!r} (known: {', '.join(TACTIC_NAMES)})", "round_robin"
            ):
                raise _SkippedError
            kind = TACTIC_NAMES[0]
        raw_params = table.get("params")
        params = self._table(raw_params, _join(path, "params")) if raw_params is not None else {}
        try:
            tactic = tactic_from_map(kind, params)
        except msgspec.ValidationError as exc:
            self._fault(_join(path, "params"), str(exc))
            raise _SkippedError from exc
        known = set(tactic.__struct_fields__)
        for name in params.keys() - known:
            # tingly-box writes all thresholds for every tactic.
            is_other = name in ("request_threshold", "token_threshold")
            if not is_other or self._door == "strict":
                text = f"{type(tactic).__name__} has no such parameter (known: {', '.join(sorted(known))})"
                self._mend(_join(path, f"params.{name}"), text, "dropped")
        return tactic

    def _services(self, raw: Any, path: str, providers: Mapping[str, str]) -> tuple[Service, ...]:
        services: list[Service] = []
        ids: dict[str, str] = {}
        for place, table in self._items(raw, path):
            try:
                service = self._service(table, place, providers)
            except _SkippedError:
                continue
            if ids.setdefault(service.id, place) != place:
                if not self._mend(place, f"{service.id} is already {ids[service.id]}", "dropped"):
                    continue
                continue
            services.append(service)
        if len(services) > _MOST_SERVICES:
            self._fault(path, f"more than {_MOST_SERVICES} services")
        return tuple(services)

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
        if self._not_yet(bool(service.tier), _join(path, "tier")):
            service = msgspec.structs.replace(service, tier=0)
        if self._not_yet(service.limits != Limits(), _join(path, "limits")):
            service = msgspec.structs.replace(service, limits=Limits())
        return service

    def _routes(self, raw: Any, path: str, providers: Mapping[str, str]) -> tuple[SmartRoute, ...]:
        routes = []
        for place, table in self._items(raw, path):
            try:
                ops = tuple(
                    self._struct(SmartOp, op, op_path)
                    for op_path, op in self._items(table.get("ops"), _join(place, "ops"))
                )
                services = self._services(table.get("services"), _join(place, "services"), providers)
                route = self._struct(SmartRoute, table, place, ops=ops, services=services)
            except _SkippedError:
                continue
            if route.uuid:
                self._name(route.uuid, _join(place, "uuid"), "{}|")
            routes.append(route)
        return tuple(routes)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _kind(value: Any) -> str:
    names = {dict: "a mapping", list: "a list", str: "text", bool: "true or false", type(None): "nothing"}
    return names.get(type(value), "a number")


# -- writing -----------------------------------------------------------------------------------------------------------


def write(configuration: Configuration) -> dict[str, Any]:
    """The document of a configuration, defaults left out."""
    table: dict[str, Any] = msgspec.to_builtins(configuration)
    for rule, written in zip(configuration.rules, table.get("rules", []), strict=True):
        written["lb_tactic"] = tactic_to_map(rule.lb_tactic)
    return table


def masked(configuration: Configuration) -> Configuration:
    """The configuration with literal and sealed credentials masked; references show where they come from."""

    def mask(value: str) -> str:
        return value if not value or value.startswith("${") else "***"

    def masked_table(values: dict[str, str]) -> dict[str, str]:
        return {name: mask(value) if value.startswith("sealed:") else value for name, value in values.items()}

    providers = []
    for provider in configuration.providers:
        detail = provider.oauth_detail
        if detail is not None:
            detail = msgspec.structs.replace(
                detail, access_token=mask(detail.access_token), refresh_token=mask(detail.refresh_token)
            )
        providers.append(
            msgspec.structs.replace(
                provider,
                token=mask(provider.token),
                oauth_detail=detail,
                headers=masked_table(provider.headers),
                query=masked_table(provider.query),
                proxy_url=mask(provider.proxy_url)
                if "@" in provider.proxy_url or provider.proxy_url.startswith("sealed:")
                else provider.proxy_url,
            )
        )
    return msgspec.structs.replace(configuration, providers=tuple(providers))


def digest(configuration: Configuration) -> str:
    """What names a configuration: SHA-256 of its document, keys in order."""
    return hashlib.sha256(msgspec.json.encode(write(configuration), order="deterministic")).hexdigest()


def select_view(configuration: Configuration, rule: Rule) -> bytes:
    """All that a rule's select reads, in one form: when it differs, the rule has a new revision."""
    enabled = {provider.uuid for provider in configuration.providers if provider.enabled}
    services = [
        (s.id, s.weight, s.time_window, s.active and s.provider in enabled, s.tier, s.limits) for s in rule.services
    ]
    view = (rule.uuid, rule.pool, rule.active, tactic_to_map(rule.lb_tactic), rule.current_service_index, services)
    return msgspec.json.encode(view, order="deterministic")


# -- differences -------------------------------------------------------------------------------------------------------

_SECRET_PATHS = ("token", "oauth_detail.access_token", "oauth_detail.refresh_token", "proxy_url")


def diff(old: Configuration, new: Configuration) -> list[str]:
    """What differs, a line each: `+ rule x`, `- provider y`, `~ rule z: field old -> new`, without credentials."""
    before, after = write(old), write(new)
    lines = []
    for kind, key in (("provider", "uuid"), ("rule", "uuid"), ("scenario", "scenario"), ("pool", "name")):
        olds = {item[key]: item for item in before.get(f"{kind}s", [])}
        news = {item[key]: item for item in after.get(f"{kind}s", [])}
        lines += [f"- {kind} {name}" for name in olds if name not in news]
        lines += [f"+ {kind} {name}" for name in news if name not in olds]
        for name in news.keys() & olds.keys():
            changes = _changes(olds[name], news[name])
            lines += [f"~ {kind} {name}: {change}" for change in sorted(changes)]
        if list(olds) != list(news) and sorted(olds) == sorted(news):
            lines.append(f"~ {kind}s: another order")
    return lines


def _changes(old: Any, new: Any, path: str = "") -> list[str]:
    if old == new:
        return []
    if isinstance(old, dict) and isinstance(new, dict):
        names = [*old, *(name for name in new if name not in old)]
        return [line for name in names for line in _changes(old.get(name), new.get(name), _join(path, name))]
    if path in _SECRET_PATHS or path.startswith(("headers.", "query.")):
        return [f"{path} changed"]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = enumerate(zip(old, new, strict=True))
        return [line for i, (a, b) in pairs for line in _changes(a, b, f"{path}[{i}]")]
    return [f"{path} {_shown(old)} -> {_shown(new)}"]


def _shown(value: Any) -> str:
    return "(default)" if value is None else msgspec.json.encode(value).decode()
