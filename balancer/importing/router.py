"""LiteLLM's `router_settings` and `litellm_settings`, which may say the same things; the router's win."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from balancer.importing.notes import Notes
from balancer.importing.values import as_list, as_number, as_table, plain

_MOST_ATTEMPTS = 10
_MOST_OPEN_S = 3600
_PATIENCE_S = 120
_MINUTE_S = 60

# usage-based-routing asks for the deployment with the fewest tokens of the minute, for every request anew.
_TACTICS: dict[str, dict[str, Any]] = {
    "simple-shuffle": {"type": "random"},
    "least-busy": {"type": "least_in_flight"},
    "usage-based-routing": {"type": "token_based", "params": {"token_threshold": 1}},
    "usage-based-routing-v2": {"type": "token_based", "params": {"token_threshold": 1}},
    "latency-based-routing": {"type": "latency"},
    "cost-based-routing": {"type": "cost"},
}


class Link(msgspec.Struct, frozen=True, kw_only=True):
    """A model name (`*`: any) and one that stands in for it."""

    source: str
    target: str
    path: str


class Router:
    """What the router's settings mean for every rule and provider."""

    def __init__(self, raw: Mapping[str, Any], notes: Notes) -> None:
        self._notes = notes
        self._sections = {name: as_table(raw.get(name)) for name in ("router_settings", "litellm_settings")}
        self.tactic = self._tactic()
        self.time_window = _MINUTE_S if self.tactic["type"] == "token_based" else 0
        self.retry = self._retry()
        self.breaker = self._breaker()
        self.timeout = self._number("timeout") or self._number("request_timeout")
        self.in_flight = int(self._number("default_max_parallel_requests") or 0)
        self.session_affinity = self._affinity()
        self.aliases = self._aliases()

    def _find(self, name: str) -> tuple[str, Any]:
        """Where the setting stands and its value; an empty path where it does not."""
        for section, table in self._sections.items():
            if table.get(name) is not None:
                return f"{section}.{name}", table[name]
        return "", None

    def _number(self, name: str) -> float | None:
        """A setting's number that is more than zero; anything else is none, and told."""
        path, value = self._find(name)
        if not path:
            return None
        number = as_number(value)
        if number is None or number < 0:
            self._notes.warn(path, "is no number; left out")
            return None
        return number

    def _tactic(self) -> dict[str, Any]:
        path, name = self._find("routing_strategy")
        tactic = _TACTICS.get(str(name)) if path else _TACTICS["simple-shuffle"]
        if tactic is None:
            self._notes.warn(path, f"{name} has no counterpart; random is taken, as simple-shuffle would be")
            tactic = _TACTICS["simple-shuffle"]
        if tactic["type"] == "cost":
            self._notes.warn(path, "cost compares the prices in this file alone: a provider without `price` is free")
        return tactic

    def _retry(self) -> dict[str, Any]:
        retry: dict[str, Any] = {}
        retries = self._number("num_retries")
        if retries is not None:
            attempts = int(retries) + 1
            if attempts > _MOST_ATTEMPTS:
                path, _ = self._find("num_retries")
                self._notes.warn(path, f"{int(retries)} retries are {attempts} attempts; {_MOST_ATTEMPTS} are the most")
            retry["attempts"] = min(attempts, _MOST_ATTEMPTS)
        after = self._number("retry_after")
        if after:
            retry["backoff_ms"] = int(min(after * 1000, 10_000))
        return retry

    def _breaker(self) -> dict[str, Any]:
        breaker: dict[str, Any] = {}
        cooldown = self._number("cooldown_time")
        path, is_off = self._find("disable_cooldowns")
        if is_off is True or cooldown == 0:
            where = path or self._find("cooldown_time")[0]
            self._notes.warn(where, "breakers never open; an account that answers 429 is still left alone for a while")
            return {"failures": 0, "ratio": 0}
        fails = self._number("allowed_fails")
        if fails is not None:
            path, _ = self._find("allowed_fails")
            breaker["failures"] = int(fails) + 1
            self._notes.warn(
                path,
                f"counts failures of a minute; here a breaker opens after {int(fails) + 1} in a row, or at its ratio",
            )
        if cooldown:
            path, _ = self._find("cooldown_time")
            breaker["open_s"] = plain(min(cooldown, _MOST_OPEN_S))
            self._notes.warn(
                path,
                "is how long a breaker stays open at first; then one probe of the fleet goes through, and each that "
                "fails doubles the time, up to eightfold",
            )
        return breaker

    def _affinity(self) -> int:
        path, checks = self._find("optional_pre_call_checks")
        kept = 0
        for i, check in enumerate(as_list(checks)):
            where = f"{path}[{i}]"
            if check == "session_affinity":
                kept = int(self._number("deployment_affinity_ttl_seconds") or 3600)
            elif check == "responses_api_deployment_check":
                continue  # Responses by id always go to the service that gave them.
            elif check in ("prompt_caching", "deployment_affinity", "encrypted_content_affinity"):
                self._notes.warn(
                    where, f"{check} has no counterpart; a rule's session_affinity keeps sessions in place"
                )
            else:
                self._notes.warn(where, f"{check} has no counterpart")
        return kept

    def _aliases(self) -> dict[str, tuple[str, str]]:
        """Each alias with the model meant, and its path."""
        path, value = self._find("model_group_alias")
        aliases = {}
        for alias, meant in as_table(value).items():
            where = f"{path}.{alias}"
            target = meant if isinstance(meant, str) else as_table(meant).get("model")
            if as_table(meant).get("hidden"):
                self._notes.warn(where, "no rule is hidden: /v1/models lists the alias")
            if isinstance(target, str):
                aliases[alias] = (target, where)
            else:
                self._notes.warn(where, "names no model; left out")
        return aliases

    def timeouts(self, timeout: float) -> dict[str, Any]:
        """A provider's fields for LiteLLM's timeout: an answer in one piece may take it all until its first byte."""
        fields: dict[str, Any] = {"timeout": plain(timeout)}
        if timeout > _PATIENCE_S:
            fields["timeouts"] = {"headers_s": plain(timeout), "first_byte_s": plain(timeout)}
        return fields

    def links(self, kind: str) -> Iterator[Link]:
        """What `fallbacks` or `context_window_fallbacks` say, the defaults (`*`) last."""
        path, value = self._find(kind)
        defaults = []
        for i, item in enumerate(as_list(value)):
            for source, targets in as_table(item).items():
                for target in as_list(targets):
                    where = f"{path}[{i}].{source}"
                    if not isinstance(target, str):
                        self._notes.warn(where, "a fallback with parameters of its own is not supported; left out")
                        continue
                    link = Link(source=source, target=target, path=where)
                    if source == "*":
                        defaults.append(link)
                    else:
                        yield link
        yield from defaults
        if kind == "fallbacks":
            path, value = self._find("default_fallbacks")
            yield from (
                Link(source="*", target=target, path=path) for target in as_list(value) if isinstance(target, str)
            )
