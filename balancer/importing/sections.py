"""The rest of LiteLLM's file: what becomes a setting of ours, and what has no counterpart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from balancer.importing.notes import Notes
from balancer.importing.values import as_number, as_table, referenced

_NOT_OURS = "not our business"
_CALLBACKS = "callbacks are not called: there are metrics, traces and an access log"
_ROUTER = frozenset(
    {
        *("routing_strategy", "num_retries", "retry_after", "allowed_fails", "cooldown_time", "disable_cooldowns"),
        *("timeout", "fallbacks", "default_fallbacks", "context_window_fallbacks", "model_group_alias"),
        *("default_max_parallel_requests", "optional_pre_call_checks", "deployment_affinity_ttl_seconds"),
        *("redis_host", "redis_port", "redis_password", "redis_url", "redis_db"),
    }
)
_BOTH = _ROUTER | {"request_timeout"}
_REASONS: dict[str, str] = {
    "drop_params": "requests are passed on as they are: a parameter that the upstream does not know is its to refuse",
    "modify_params": "requests are passed on as they are",
    "stream_timeout": "timeouts hold for streams and whole answers alike: see the provider's timeouts: {first_byte_s}",
    "enable_pre_call_checks": "limits always hold; prompts are not measured against a context window beforehand: "
    "on_context_overflow follows the upstream's refusal",
    "enable_tag_filtering": "requests are not routed by tags",
    "content_policy_fallbacks": "a refusal of content is the client's answer",
    "allowed_fails_policy": "a breaker counts failures of all kinds alike; see docs/failures.md",
    "retry_policy": "outcomes say what is tried again; see docs/failures.md",
    "model_group_retry_policy": "outcomes say what is tried again; see docs/failures.md",
    "provider_budget_config": "budgets are not there yet",
    "max_budget": "budgets are not there yet",
    "budget_duration": "budgets are not there yet",
    "cache": f"answers are not cached: {_NOT_OURS}",
    "cache_responses": f"answers are not cached: {_NOT_OURS}",
    "callbacks": _CALLBACKS,
    "success_callback": _CALLBACKS,
    "failure_callback": _CALLBACKS,
    "service_callbacks": _CALLBACKS,
    "json_logs": "logs are JSON lines already",
    "telemetry": "nothing is sent anywhere",
    "set_verbose": "the setting BALANCER_LOG_LEVEL=debug",
    "include_cost_in_streaming_usage": "answers are passed on as they are",
    "database_url": "there is no database: Redis keeps everything. Models, keys and teams kept there are not imported",
    "store_model_in_db": "models kept in LiteLLM's database are not in this file, and are not imported",
    "custom_auth": "clients present a token of BALANCER_CLIENT_TOKENS",
    "max_parallel_requests": "limits: {in_flight} of a provider or service are what there is",
    "global_max_parallel_requests": "limits: {in_flight} of a provider or service are what there is",
    "background_health_checks": "the provider's health: {path, interval_s} asks for a path, not for a completion",
    "health_check_interval": "the provider's health: {path, interval_s} asks for a path, not for a completion",
    "pass_through_endpoints": "other paths are not passed through",
    "alerting": "alerts are Prometheus'",
    "max_request_size_mb": "the setting BALANCER_MAX_BODY_BYTES",
    "host": "the setting BALANCER_HOST",
    "port": "the setting BALANCER_PORT",
}
_SECTIONS: dict[str, str] = {
    "guardrails": f"guardrails are {_NOT_OURS}",
    "prompts": f"prompts are {_NOT_OURS}",
    "mcp_servers": f"MCP servers are {_NOT_OURS}",
    "mcp_tools": f"MCP servers are {_NOT_OURS}",
    "vector_store_registry": f"vector stores are {_NOT_OURS}",
    "search_tools": f"search tools are {_NOT_OURS}",
    "files_settings": f"files are {_NOT_OURS}",
    "finetune_settings": f"fine-tuning is {_NOT_OURS}",
    "assistant_settings": f"assistants are {_NOT_OURS}",
    "callback_settings": _CALLBACKS,
    "include": "import each of these files by itself, or join them first",
}


def tell_sections(raw: Mapping[str, Any], notes: Notes) -> None:
    """Warns of everything beside `model_list` that neither rules nor providers carry."""
    for section in ("router_settings", "litellm_settings", "general_settings"):
        read = {"router_settings": _ROUTER, "litellm_settings": _BOTH}.get(section, frozenset({"master_key"}))
        for name in as_table(raw.get(section)):
            if name not in read and name != "cache_params":
                notes.warn(f"{section}.{name}", _REASONS.get(name, "has no counterpart"))
    _tell_redis(raw, notes)
    if as_table(raw.get("general_settings")).get("master_key") is not None:
        notes.warn(
            "general_settings.master_key",
            "is a setting here: give workers BALANCER_CLIENT_TOKENS, what clients present, and BALANCER_ADMIN_TOKEN, "
            "another one for the admin API; there are no keys of teams and users yet",
        )
    for name in as_table(raw.get("environment_variables")):
        notes.warn(f"environment_variables.{name}", "set it where workers run, if something here refers to it")
    known = {"model_list", "router_settings", "litellm_settings", "general_settings", "environment_variables"}
    for name in raw:
        if name not in known and name != "credential_list":
            notes.warn(str(name), _SECTIONS.get(str(name), "has no counterpart"))


def _tell_redis(raw: Mapping[str, Any], notes: Notes) -> None:
    """Says which setting names the Redis that LiteLLM used; a password is not repeated."""
    router, settings = as_table(raw.get("router_settings")), as_table(raw.get("litellm_settings"))
    cache = as_table(settings.get("cache_params"))
    if router.get("redis_url") is not None:
        notes.warn("router_settings.redis_url", "is a setting here: BALANCER_REDIS, a URL of this form too")
    for path, table, prefix in (
        ("router_settings", router, "redis_"),
        ("litellm_settings", settings, "redis_"),
        ("litellm_settings.cache_params", cache, ""),
    ):
        host = referenced(table.get(f"{prefix}host"))
        if host:
            port = referenced(table.get(f"{prefix}port") or 6379)
            password = ":PASSWORD@" if table.get(f"{prefix}password") else ""
            number = as_number(table.get(f"{prefix}db"))
            url = f"redis://{password}{host}:{port}" + (f"/{number:.0f}" if number else "")
            notes.warn(
                f"{path}.{prefix}host",
                f"is a setting here: BALANCER_REDIS={url}, a database of its own that evicts nothing",
            )
    for name in cache:
        if name not in ("host", "port", "password", "db"):
            notes.warn(f"litellm_settings.cache_params.{name}", f"answers are not cached: {_NOT_OURS}")
