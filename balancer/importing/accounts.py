"""Deployments of `model_list`: which account serves one, as a provider of ours, and within which limits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import parse_qsl, urlsplit, urlunsplit

import msgspec

from balancer.domain import is_secret_name
from balancer.importing.notes import Notes, Secrets, plain_name
from balancer.importing.router import Router
from balancer.importing.values import as_list, as_number, as_table, plain, referenced
from balancer.importing.vendors import FOREIGN, ROUTES, VENDORS, Vendor, vendor_of

_NO_KEYS = frozenset({"", "none", "empty", "null", "no-key", "not-needed"})
_MILLION = 1_000_000

# What we read of `litellm_params`; the rest is told. Limits stand at several places.
_READ = frozenset(
    {
        *("model", "custom_llm_provider", "api_base", "base_url", "api_key", "azure_ad_token", "api_version"),
        *("organization", "extra_headers", "headers", "custom_user_agent", "timeout", "litellm_credential_name"),
        *("rpm", "tpm", "weight", "order", "max_parallel_requests"),
    }
)
_COSTS = {
    "input_cost_per_token": "input",
    "output_cost_per_token": "output",
    "cache_read_input_token_cost": "cached",
}
_REASONS = {
    "stream_timeout": "timeouts hold for streams and whole answers alike: see the provider's timeouts: {first_byte_s}",
    "max_retries": "how often a request is tried is said by its rule: retry: {attempts}",
    "num_retries": "how often a request is tried is said by its rule: retry: {attempts}",
    "tags": "requests are not routed by tags",
    "max_budget": "budgets are not there yet",
    "budget_duration": "budgets are not there yet",
    "mock_response": "every request goes to its upstream",
    "mock_timeout": "every request goes to its upstream",
    "drop_params": "requests are passed on as they are: a parameter that the upstream does not know is its to refuse",
    "additional_drop_params": "requests are passed on as they are",
    "cooldown_time": "is said by the provider: breaker: {open_s}",
}
_GENERATION = frozenset(
    {
        *(
            "temperature",
            "max_tokens",
            "max_completion_tokens",
            "top_p",
            "top_k",
            "seed",
            "stop",
            "n",
            "user",
            "logit_bias",
        ),
        *("frequency_penalty", "presence_penalty", "response_format", "reasoning_effort", "thinking", "tools"),
        *("tool_choice", "extra_body", "dimensions", "encoding_format", "metadata", "roles", "bos_token", "eos_token"),
        *("initial_prompt_value", "final_prompt_value"),
    }
)


class Deployment(msgspec.Struct, frozen=True, kw_only=True):
    """One deployment: the provider (by name) and model that serve it, and what its group says of it.

    `weighed_by` has what the configuration gives of weight, rpm and tpm.
    """

    path: str
    provider: str
    model: str
    is_anthropic: bool
    weighed_by: dict[str, float]
    order: float | None
    limits: dict[str, int]


class Accounts:
    """The providers that the deployments met so far need; the same account under the same terms is one provider."""

    def __init__(self, raw: Mapping[str, Any], router: Router, notes: Notes, secrets: Secrets) -> None:
        self._router = router
        self._notes = notes
        self._secrets = secrets
        self._environment = {name: str(value) for name, value in as_table(raw.get("environment_variables")).items()}
        self._credentials = {
            str(as_table(item).get("credential_name")): as_table(as_table(item).get("credential_values"))
            for item in as_list(raw.get("credential_list"))
        }
        self._made: dict[bytes, str] = {}
        self._providers: dict[str, dict[str, Any]] = {}

    def providers(self) -> list[dict[str, Any]]:
        """All of them, in the order in which they were met."""
        return list(self._providers.values())

    def deployments(self, row: dict[str, Any], path: str) -> Iterator[Deployment]:
        """The deployments of an entry of `model_list`: one for each organization; none if it cannot be served."""
        where = f"{path}.litellm_params"
        params = as_table(row.get("litellm_params"))
        if params.get("litellm_credential_name") is not None:
            credential = str(params["litellm_credential_name"])
            if credential not in self._credentials:
                self._notes.warn(f"{where}.litellm_credential_name", f"there is no credential {credential!r}; left out")
            params = self._credentials.get(credential, {}) | params
        model = referenced(params.get("model"))
        prefix, name = vendor_of(model, referenced(params.get("custom_llm_provider")))
        vendor = self._vendor(prefix, model, params, path)
        if vendor is None:
            return
        for route in ROUTES:
            if name.startswith(route):
                name = name.removeprefix(route)
                self._notes.warn(
                    f"{where}.model", f"{route} is no part of a model: clients choose the API by their path"
                )
        if not name or "*" in name:
            what = "wildcards are not supported yet" if name else "names no model or deployment"
            self._notes.warn(path, f"{model!r} {what}; left out")
            return
        self._tell(row, params, path)
        organizations = as_list(params.get("organization")) or [None]
        for organization in organizations:
            provider = self._provider(prefix, vendor, params, row, organization, where)
            yield Deployment(
                path=path,
                provider=provider,
                model=name,
                is_anthropic=vendor.api_style == "anthropic",
                weighed_by=self._numbers(params, ("weight", "rpm", "tpm"), where),
                order=self._numbers(params, ("order",), where).get("order"),
                limits=self._limits(row, params, path),
            )

    def _vendor(self, prefix: str, model: str, params: Mapping[str, Any], path: str) -> Vendor | None:
        """Who serves the model; None, with a warning, for whom we cannot speak to."""
        vendor = VENDORS.get(prefix)
        if vendor is not None:
            return vendor
        if prefix in FOREIGN:
            self._notes.warn(path, f"{prefix} has another API or kind of credential; {model!r} is left out")
            return None
        if not (params.get("api_base") or params.get("base_url")):
            self._notes.warn(path, f"who serves {model!r} is not known, and there is no api_base; left out")
            return None
        self._notes.warn(
            f"{path}.litellm_params.model",
            f"{prefix!r} is not known here: its api_base is taken to speak OpenAI's API, and the rest for the model",
        )
        return Vendor()

    # -- what stands beside --------------------------------------------------------------------------------------------

    def _tell(self, row: Mapping[str, Any], params: Mapping[str, Any], path: str) -> None:
        """Warns of every field that is not carried over."""
        for name in row:
            if name not in ("model_name", "litellm_params", "model_info", "rpm", "tpm"):
                self._notes.warn(f"{path}.{name}", "has no counterpart")
        for name in params:
            if name in _READ or name in _COSTS:
                continue
            reason = _REASONS.get(name, "has no counterpart")
            if name in _GENERATION:
                reason = "requests are passed on as they are: clients must send it themselves"
            self._notes.warn(f"{path}.litellm_params.{name}", reason)
        for name in as_table(row.get("model_info")):
            if name not in _COSTS and name not in ("rpm", "tpm"):
                self._notes.warn(f"{path}.model_info.{name}", "has no counterpart")

    def _numbers(self, table: Mapping[str, Any], names: tuple[str, ...], path: str) -> dict[str, float]:
        """Those of the names that are there and are numbers, none below zero."""
        found = {}
        for name in names:
            if table.get(name) is None:
                continue
            number = as_number(table[name])
            if number is None or number < 0:
                self._notes.warn(f"{path}.{name}", "is no number that we can take over; left out")
            else:
                found[name] = number
        return found

    def _limits(self, row: Mapping[str, Any], params: Mapping[str, Any], path: str) -> dict[str, int]:
        places = (("model_info", as_table(row.get("model_info"))), ("", row), ("litellm_params", params))
        found: dict[str, float] = {}
        for place, table in places:
            found |= self._numbers(table, ("rpm", "tpm"), f"{path}.{place}" if place else path)
        at_once = self._numbers(params, ("max_parallel_requests",), f"{path}.litellm_params")
        in_flight = at_once.get("max_parallel_requests", self._router.in_flight)
        if found:
            self._notes.warn(
                "model_list",
                "rpm and tpm become limits that the fleet never exceeds; LiteLLM's simple-shuffle only weighs by them",
            )
        return {name: int(found.get(name, 0)) for name in ("rpm", "tpm")} | {"in_flight": int(in_flight)}

    # -- providers -----------------------------------------------------------------------------------------------------

    def _provider(
        self,
        prefix: str,
        vendor: Vendor,
        params: Mapping[str, Any],
        row: Mapping[str, Any],
        organization: Any,
        path: str,
    ) -> str:
        """The name of the provider of a deployment, which is made if there is none like it yet."""
        base, query = self._base(vendor, params, path)
        if params.get("api_version") is not None:
            if vendor.is_azure:
                query["api-version"] = referenced(params["api_version"])
            else:
                self._notes.warn(f"{path}.api_version", "is Azure's alone; left out")
        if vendor.remark:
            self._notes.warn(f"{path}.model", vendor.remark)
        table: dict[str, Any] = {"api_base": base, "api_style": vendor.api_style}
        if vendor.is_azure:
            table["provider_type"] = "azure"
        if not vendor.responses:
            table["responses"] = False
        table |= self._timeouts(params, path) | self._price(row, params, path)
        if self._router.breaker:
            table["breaker"] = self._router.breaker
        headers = self._headers(params, organization)
        secret, kind = self._credential(vendor, params)
        # What a provider is known by has its literal secrets in it; they are named only once it has a name itself.
        identity = msgspec.json.encode([table, headers, query, secret, kind], order="deterministic")
        if identity in self._made:
            return self._made[identity]
        name = self._name(prefix, vendor, base)
        self._made[identity] = name
        made = {"name": name} | table
        made |= self._sealed(name, secret, kind, path)
        for field, values in (("headers", headers), ("query", query)):
            if values:
                made[field] = {
                    key: self._secrets.reference(value, f"{name} {key}", f"{path}: {key}")
                    if is_secret_name(key)
                    else value
                    for key, value in values.items()
                }
        self._providers[name] = made
        return name

    def _base(self, vendor: Vendor, params: Mapping[str, Any], path: str) -> tuple[str, dict[str, str]]:
        """Where the upstream is, and the parameters that stood in its URL."""
        field = "api_base" if params.get("api_base") else "base_url"
        base = referenced(params.get(field)) or vendor.api_base
        if base.startswith("${"):
            name = base[2:].partition("}")[0]
            if name not in self._environment:
                self._notes.warn(
                    f"{path}.{field}", f"a URL takes no reference: write what {name} holds in place of {base}"
                )
                return base, {}
            base = self._environment[name]
        if not base:
            self._notes.warn(f"{path}.api_base", "missing: write the upstream's URL")
        try:
            parts = urlsplit(base)
        except ValueError:
            return base, {}
        root = parts.path.rstrip("/")
        if vendor.is_azure:
            root = root.partition("/openai/deployments")[0]
        elif root.endswith(("/chat/completions", "/messages")):
            root = root.removesuffix("/chat/completions").removesuffix("/messages")
        return urlunsplit((parts.scheme, parts.netloc, root, "", "")), dict(parse_qsl(parts.query))

    def _timeouts(self, params: Mapping[str, Any], path: str) -> dict[str, Any]:
        own = self._numbers(params, ("timeout",), path).get("timeout")
        timeout = own or self._router.timeout
        return self._router.timeouts(timeout) if timeout else {}

    def _price(self, row: Mapping[str, Any], params: Mapping[str, Any], path: str) -> dict[str, Any]:
        costs = self._numbers(as_table(row.get("model_info")), tuple(_COSTS), f"{path}: model_info")
        costs |= self._numbers(params, tuple(_COSTS), path)
        price = {_COSTS[name]: plain(round(cost * _MILLION, 9)) for name, cost in costs.items() if cost}
        return {"price": price} if price else {}

    def _headers(self, params: Mapping[str, Any], organization: Any) -> dict[str, str]:
        headers = {
            str(name): referenced(value)
            for field in ("headers", "extra_headers")
            for name, value in as_table(params.get(field)).items()
        }
        if params.get("custom_user_agent"):
            headers["User-Agent"] = referenced(params["custom_user_agent"])
        if organization is not None:
            headers["OpenAI-Organization"] = referenced(organization)
        return headers

    def _credential(self, vendor: Vendor, params: Mapping[str, Any]) -> tuple[str, str]:
        """The credential and what it is: `key`, `access_token`, or `none` where nobody asks for one."""
        if params.get("azure_ad_token"):
            return referenced(params["azure_ad_token"]), "access_token"
        key = params.get("api_key")
        if key is None and vendor.variable:
            return f"${{{vendor.variable}}}", "key"
        if key is None or str(key).lower() in _NO_KEYS:
            return "", "none"
        return referenced(key), "key"

    def _sealed(self, name: str, secret: str, kind: str, path: str) -> dict[str, Any]:
        """The fields of a provider's credential."""
        match kind:
            case "none":
                return {"no_key_required": True}
            case "access_token":
                where = f"{path}.azure_ad_token"
                token = self._secrets.reference(secret, f"{name} token", where)
                self._notes.warn(where, "is used as given: access tokens are not renewed yet")
                return {"auth_type": "oauth", "oauth_detail": {"access_token": token}}
            case _:
                return {"token": self._secrets.reference(secret, f"{name} key", f"{path}.api_key")}

    def _name(self, prefix: str, vendor: Vendor, base: str) -> str:
        """A name that is still free: the prefix, with the host where that is not the vendor's own."""
        host = base.partition("://")[2].partition("/")[0]
        own = not vendor.api_base or base.rstrip("/") != vendor.api_base.rstrip("/")
        label = host.partition(":")[0].split(".")[0] if not host.replace(".", "").replace(":", "").isdigit() else host
        name = first = plain_name("-".join(filter(None, [prefix or "openai", label if own else ""])))
        count = 1
        while name in self._providers:
            count += 1
            name = f"{first}-{count}"
        return name
