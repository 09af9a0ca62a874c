"""tingly-box's configurations, of every shape that it has written, become strict documents that mean the same."""

from __future__ import annotations

import base64
from typing import Any

import msgspec
import pytest

from balancer import document
from balancer.domain import Configuration
from balancer.errors import ConfigurationError
from balancer.importing import parse_export, tingly
from balancer.tactics import Hybrid, RoundRobin

URL = "https://upstream.invalid/v1"


def a_provider(name: str = "one", **more: Any) -> dict[str, Any]:
    """A provider as internal/typ/type.go writes it."""
    return {
        "uuid": f"{name}-uuid",
        "name": name,
        "api_base": URL,
        "api_style": "openai",
        "token": "",
        "no_key_required": False,
        "enabled": True,
        "proxy_url": "",
        "timeout": 1800,
        "last_updated": "2025-12-22T16:12:41+08:00",
        "auth_type": "",
    } | more


def a_rule(*services: tuple[str, str], **more: Any) -> dict[str, Any]:
    """A rule as internal/typ/type.go writes it."""
    return {
        "uuid": "r-1",
        "scenario": "openai",
        "request_model": "chat",
        "response_model": "",
        "description": "",
        "services": [
            {"provider": provider, "model": model, "weight": 1, "active": True, "time_window": 300}
            for provider, model in services or [("one-uuid", "m"), ("two-uuid", "m")]
        ],
        "lb_tactic": {"type": "hybrid", "params": {"request_threshold": 20, "token_threshold": 9000}},
        "active": True,
        "smart_enabled": False,
    } | more


def a_config(**more: Any) -> dict[str, Any]:
    """The `config.json` of internal/server/config."""
    return {
        "rules": [a_rule()],
        "default_request_id": 0,
        "user_token": "a-user-token",
        "model_token": "a-model-token",
        "encrypt_providers": False,
        "scenarios": [{"scenario": "claude_code", "flags": {"unified": True, "separate": False, "smart": False}}],
        "gui": {"debug": False, "port": 0, "verbose": False},
        "providers_v2": [a_provider("one"), a_provider("two", api_base="https://other.invalid/v1")],
        "jwt_secret": "a-jwt-secret",
        "default_max_tokens": 8192,
        "verbose": False,
    } | more


def imported(raw: Any) -> tuple[Configuration, list[str]]:
    """What the strict door makes of an import's document, and the paths that were warned of."""
    result = tingly(raw)
    return document.read(result.document, door="strict").configuration, [w.partition(": ")[0] for w in result.warnings]


def test_the_document_means_what_the_lenient_door_reads() -> None:
    configuration, told = imported(a_config())

    assert configuration == document.read(a_config(), door="lenient").configuration
    assert configuration.rules[0].lb_tactic == Hybrid(request_threshold=20, token_threshold=9000)
    assert {"user_token", "model_token", "jwt_secret", "gui", "default_max_tokens"} <= set(told)


def test_no_token_of_the_file_is_written_or_told() -> None:
    raw = a_config(
        providers_v2=[
            a_provider("one", token="sk-literal", proxy_url="http://user:proxy-secret@proxy.invalid:3128"),
            a_provider(
                "two",
                auth_type="oauth",
                oauth_detail={"access_token": "oauth-literal", "refresh_token": "refresh-literal"},
                headers={"Authorization": "header-literal"},
            ),
        ]
    )

    result = tingly(raw)

    everything = msgspec.json.encode(result.document).decode() + "\n".join(result.warnings)
    secrets = ("sk-literal", "proxy-secret", "oauth-literal", "refresh-literal", "header-literal", "a-user-token")
    assert [secret for secret in secrets if secret in everything] == []
    assert [provider.get("token") for provider in result.document["providers"]] == ["${ONE_KEY}", None]
    assert result.document["providers"][1]["oauth_detail"] == {"access_token": "${TWO_ACCESS_TOKEN}"}


def test_a_login_that_can_be_renewed_keeps_both_its_tokens_by_name() -> None:
    detail = {"access_token": "oauth-literal", "refresh_token": "refresh-literal", "provider_type": "claude_code"}
    result = tingly(a_config(providers_v2=[a_provider("two", auth_type="oauth", oauth_detail=detail)]))
    everything = msgspec.json.encode(result.document).decode() + "\n".join(result.warnings)
    assert [secret for secret in ("oauth-literal", "refresh-literal") if secret in everything] == []
    assert result.document["providers"][0]["oauth_detail"] == {
        "access_token": "${TWO_ACCESS_TOKEN}",
        "refresh_token": "${TWO_REFRESH_TOKEN}",
        "provider_type": "claude_code",
    }


def test_literals_are_kept_where_that_is_wanted() -> None:
    raw = a_config(providers_v2=[a_provider("one", token="sk-literal"), a_provider("two")])

    result = tingly(raw, is_literal=True)

    kept = document.read(result.document, door="strict").configuration
    assert kept == document.read(raw, door="lenient").configuration


def test_providers_of_the_first_version_stand_by_name() -> None:
    first = {"api_base": URL, "api_style": "openai", "token": "", "enabled": True}

    configuration, _ = imported(
        {
            "user_token": "u",
            "providers": {"one": first},
            "rules": [
                a_rule(("one", "m"), tactic="round_robin", tactic_params={"request_threshold": 3}, lb_tactic=None)
            ],
        }
    )

    assert [(provider.name, provider.api_base) for provider in configuration.providers] == [("one", URL)]
    assert configuration.rules[0].lb_tactic == RoundRobin(request_threshold=3)


def test_a_service_without_its_provider_is_left_out_and_the_index_follows() -> None:
    services = [("gone-uuid", "m"), ("one-uuid", "m"), ("two-uuid", "m")]

    configuration, told = imported(a_config(rules=[a_rule(*services, current_service_index=2)]))

    (rule,) = configuration.rules
    assert [service.id for service in rule.services] == ["one-uuid:m", "two-uuid:m"]
    assert rule.current_service_index == 1
    assert "rule r-1" in told


def test_what_newer_versions_add_is_carried_or_told() -> None:
    raw = a_config(
        providers_v2=[
            a_provider("one", user_agent="an-agent/1", api_base_anthropic="https://upstream.invalid"),
            a_provider("two", api_base="", api_base_anthropic="https://two.invalid", source="user"),
        ],
        rules=[a_rule(("one-uuid", "m"), flags={"cursor_compat": True}), a_rule(uuid="r-2", scenario="codex")],
    )

    configuration, told = imported(raw)

    one, two = configuration.providers
    assert one.headers == {"User-Agent": "an-agent/1"}
    assert (two.api_base, two.api_style) == ("https://two.invalid", "anthropic")
    assert [rule.uuid for rule in configuration.rules] == ["r-1"]
    assert {"providers_v2[0].api_base_anthropic", "rules[0].flags", "rules[1].scenario"} <= set(told)


def test_rules_without_any_provider_say_where_the_providers_are() -> None:
    result = tingly(a_config(providers_v2=None))

    assert any("import what tingly-box exports" in warning for warning in result.warnings)


def lines() -> str:
    """What internal/dataexport writes."""
    items = [
        {"type": "metadata", "version": "1.0", "exported_at": "2026-01-01T00:00:00Z"},
        {"type": "rule"} | a_rule(("one-uuid", "m")),
        {"type": "provider"} | a_provider("one"),
    ]
    return "\n".join(msgspec.json.encode(item).decode() for item in items) + "\n"


@pytest.mark.parametrize("text", [lines(), f"TGB64:1.0:{base64.b64encode(lines().encode()).decode()}\n"])
def test_an_export_is_read_line_by_line(text: str) -> None:
    raw = parse_export(text)

    assert raw is not None
    configuration, _ = imported(raw)
    assert [provider.name for provider in configuration.providers] == ["one"]
    assert [rule.request_model for rule in configuration.rules] == ["chat"]


@pytest.mark.parametrize("text", ["", "{}", "rules: []\n", '{"rules": [{"type": 1}]}', '{\n  "type": "x"\n}'])
def test_what_is_no_export_is_left_to_the_other_reader(text: str) -> None:
    assert parse_export(text) is None


@pytest.mark.parametrize("text", ["TGB64:1.0:***", lines() + '{"type": "rule", "uu'])
def test_an_export_that_is_cut_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError):
        parse_export(text)


@pytest.mark.parametrize("raw", [None, [], "text"])
def test_what_is_no_mapping_is_refused(raw: Any) -> None:
    with pytest.raises(ConfigurationError, match="no tingly-box configuration"):
        tingly(raw)
