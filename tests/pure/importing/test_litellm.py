"""LiteLLM's configurations: what becomes of its published examples' shapes, and that nothing is lost in silence."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from balancer import document
from balancer.errors import ConfigurationError
from balancer.importing import Imported, litellm

EXAMPLES = {path.stem: path for path in sorted((Path(__file__).parent / "litellm").glob("*.yaml"))}
NEEDS_A_HAND = {"redis_cache": ("providers[0].api_base",)}
SECRETS = (
    *("sk-first", "sk-second", "73gliteral", "9kjliteral", "a-fake-key", "another-fake-key", "my-fake-key", "fake-key"),
    *("a-master-key", "a-redis-password", "a-header-token"),
)
Path_ = tuple[str | int, ...]


def example(name: str) -> Any:
    return document.parse(EXAMPLES[name].read_text(encoding="utf-8"), name)


def faults(imported: Imported) -> tuple[str, ...]:
    """Where the strict door finds a fault in what an import made."""
    try:
        document.read(imported.document, door="strict")
    except ConfigurationError as exc:
        return tuple(fault.partition(": ")[0] for fault in exc.faults)
    return ()


def model(name: str = "chat", *, info: dict[str, Any] | None = None, **params: Any) -> dict[str, Any]:
    """An entry of a model list."""
    row = {"model_name": name, "litellm_params": {"model": "gpt-4o", "api_key": "os.environ/KEY"} | params}
    return row | ({"model_info": info} if info else {})


def of(*models: dict[str, Any], **sections: Any) -> Imported:
    """The import of a configuration with these models."""
    return litellm({"model_list": list(models)} | sections)


def warned(imported: Imported, path: str) -> str:
    """What the warnings of a path say."""
    return " / ".join(line.partition(": ")[2] for line in imported.warnings if line.partition(": ")[0] == path)


# -- the published examples --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_published_example_passes_check_or_is_told_what_to_add(name: str) -> None:
    imported = litellm(example(name))

    assert faults(imported) == NEEDS_A_HAND.get(name, ())
    assert all(": " in line for line in imported.warnings)


@pytest.mark.parametrize("name", EXAMPLES)
def test_no_literal_secret_of_an_example_is_written_or_told(name: str) -> None:
    imported = litellm(example(name))

    everything = msgspec.json.encode(imported.document).decode() + "\n".join(imported.warnings)
    assert [secret for secret in SECRETS if f'"{secret}"' in everything or f" {secret} " in everything] == []


def leaves(value: Any, path: Path_ = ()) -> Iterator[Path_]:
    """The paths of all that holds nothing more."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    inner = list(items)
    if not inner:
        yield path
    for key, item in inner:
        yield from leaves(item, (*path, key))


def written(path: Path_) -> str:
    """A path as warnings write it."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".")


def changed(raw: Any, path: Path_) -> Any:
    """A copy in which the value there is another one of its kind."""
    root = copy.deepcopy(raw)
    at = root
    for part in path[:-1]:
        at = at[part]
    old = at[path[-1]]
    match old:
        case bool():
            new: Any = not old
        case int() | float():
            new = -old - 1
        case str() if old.startswith("os.environ/"):
            new = f"{old}_OTHER"
        case str():
            new = f"{old}x"
        case list() | dict():
            new = {"other": 1}
        case _:
            new = "other"
    at[path[-1]] = new
    return root


@pytest.mark.parametrize("name", EXAMPLES)
def test_nothing_of_an_example_is_dropped_silently(name: str) -> None:
    """Whatever value is another one, either the result is, or a warning names the value or what it stands in."""
    raw = example(name)
    imported = litellm(raw)
    told = [line.partition(": ")[0] for line in imported.warnings]

    silent = []
    for path in leaves(raw):
        places = {written(path[:length]) for length in range(1, len(path) + 1)}
        if places.isdisjoint(told) and litellm(changed(raw, path)) == imported:
            silent.append(written(path))

    # The file's own remarks on a credential, and the parts of a Redis that one warning puts together.
    assert [path for path in silent if "credential_info" not in path and "redis_" not in path] == []


# -- deployments and accounts ------------------------------------------------------------------------------------------


def test_a_group_is_a_rule_and_each_account_a_provider() -> None:
    imported = litellm(example("documented"))

    providers = {provider["name"]: provider for provider in imported.document["providers"]}
    rules = {rule["request_model"]: rule for rule in imported.document["rules"]}
    assert providers["azure-shared"] == {
        "name": "azure-shared",
        "api_base": "https://shared.openai.azure.invalid",
        "api_style": "openai",
        "provider_type": "azure",
        "token": "${AZURE_API_KEY}",
        "query": {"api-version": "2023-05-15"},
    }
    assert [p["headers"] for p in providers.values() if "headers" in p] == [
        {"x-group": "blue", "OpenAI-Organization": "org-1"},
        {"x-group": "blue", "OpenAI-Organization": "org-2"},
    ]
    assert rules["chat"] == {
        "scenario": "openai",
        "request_model": "chat",
        "lb_tactic": {"type": "random"},
        "services": [
            {"provider": "azure-eu", "model": "gpt-4o-eu", "limits": {"rpm": 6}},
            {"provider": "azure-ca", "model": "gpt-4o-ca", "weight": 2, "limits": {"rpm": 12}},
        ],
    }
    assert providers["azure-eu-2"]["oauth_detail"] == {"access_token": "${AD_TOKEN}"}
    assert rules["vllm"]["services"][0]["model"] == "facebook/opt-125m"
    assert providers["openai-0.0.0.0-4000"]["no_key_required"] is True
    assert "hugging" not in rules


@pytest.mark.parametrize(
    ("asked", "base", "style", "model_asked"),
    [
        ("gpt-5", "https://api.openai.com/v1", "openai", "gpt-5"),
        ("openai/responses/gpt-5", "https://api.openai.com/v1", "openai", "gpt-5"),
        ("claude-opus-4", "https://api.anthropic.com", "anthropic", "claude-opus-4"),
        ("anthropic/claude-opus-4", "https://api.anthropic.com", "anthropic", "claude-opus-4"),
        ("groq/llama3-8b", "https://api.groq.com/openai/v1", "openai", "llama3-8b"),
        ("openrouter/org/model", "https://openrouter.ai/api/v1", "openai", "org/model"),
    ],
)
def test_a_prefix_says_where_a_model_is_served(asked: str, base: str, style: str, model_asked: str) -> None:
    imported = of(model(model=asked))

    (provider,), (rule,) = imported.document["providers"], imported.document["rules"]
    assert (provider["api_base"], provider["api_style"]) == (base, style)
    assert (rule["scenario"], rule["services"][0]["model"]) == (style, model_asked)


def test_gemini_is_asked_through_its_own_api() -> None:
    imported = of(model(model="gemini/gemini-3-pro"))

    (provider,), (rule,) = imported.document["providers"], imported.document["rules"]
    assert (provider["api_base"], provider["api_style"]) == ("https://generativelanguage.googleapis.com", "google")
    assert (provider["token"], rule["scenario"]) == ("${KEY}", "openai")
    assert rule["services"] == [{"provider": provider["name"], "model": "gemini-3-pro"}]


@pytest.mark.parametrize(("asked", "responses"), [("openai/gpt-5", True), ("mistral/large", False)])
def test_a_vendor_without_the_responses_api_is_told_to_have_none(asked: str, responses: bool) -> None:
    (provider,) = of(model(model=asked)).document["providers"]

    assert provider.get("responses", True) is responses


@pytest.mark.parametrize(
    "base",
    [
        "https://a.openai.azure.invalid/openai/deployments/d/chat/completions?api-version=2024-06-01",
        "https://a.openai.azure.invalid/?api-version=2024-06-01",
    ],
)
def test_an_azure_url_keeps_its_host_and_version(base: str) -> None:
    (provider,) = of(model(model="azure/d", api_base=base)).document["providers"]

    assert (provider["api_base"], provider["query"]) == (
        "https://a.openai.azure.invalid",
        {"api-version": "2024-06-01"},
    )


def test_the_same_account_is_one_provider_and_other_terms_another_one() -> None:
    imported = of(
        model("one"),
        model("two", model="gpt-4.1"),
        model("slow", timeout=900),
        model("dear", info={"input_cost_per_token": 0.00001}),
    )

    assert [
        (provider["name"], provider.get("timeout"), provider.get("timeouts"), provider.get("price"))
        for provider in imported.document["providers"]
    ] == [
        ("openai", None, None, None),
        ("openai-2", 900, {"headers_s": 900, "first_byte_s": 900}, None),
        ("openai-3", None, None, {"input": 10}),
    ]


def test_a_literal_key_becomes_a_variable_that_means_nothing_else() -> None:
    imported = of(
        model("one", api_key="sk-1"), model("two", api_key="sk-2"), model("three", api_key="os.environ/OPENAI_KEY")
    )

    assert [p["token"] for p in imported.document["providers"]] == [
        "${OPENAI_KEY_2}",
        "${OPENAI_2_KEY}",
        "${OPENAI_KEY}",
    ]
    assert "set OPENAI_KEY_2" in warned(imported, "model_list[0].litellm_params.api_key")


def test_literals_are_kept_where_that_is_wanted() -> None:
    imported = litellm({"model_list": [model(api_key="sk-1")]}, is_literal=True)

    assert (imported.document["providers"][0]["token"], imported.warnings) == ("sk-1", ())


# -- groups ------------------------------------------------------------------------------------------------------------


def test_weights_order_limits_and_failures_are_carried_over() -> None:
    rule = litellm(example("balanced")).document["rules"][0]

    assert rule == {
        "scenario": "openai",
        "request_model": "chat",
        "lb_tactic": {"type": "random"},
        "services": [
            {"provider": "azure-ca", "model": "small-ca", "weight": 9, "limits": {"in_flight": 50}},
            {"provider": "azure-fr", "model": "large", "tier": 1, "limits": {"in_flight": 10}},
            {"provider": "openai", "model": "gpt-4o", "weight": 0, "tier": 2, "limits": {"in_flight": 50}},
        ],
        "retry": {"attempts": 3, "backoff_ms": 1000},
        "session_affinity": 3600,
        "fallback": ["openai/mixed"],
        "on_context_overflow": "openai/large",
    }


@pytest.mark.parametrize(
    ("first", "second", "weights"),
    [
        ({}, {}, [1, 1]),
        ({"rpm": 6}, {"rpm": 1440}, [1, 240]),
        ({"tpm": 20_000}, {"tpm": 30_000}, [2, 3]),
        ({"weight": 0.25, "rpm": 1}, {"weight": 0.5, "rpm": 9}, [1, 2]),
        ({"rpm": 10}, {}, [1, 0]),
        ({}, {"rpm": 10}, [1, 1]),
        ({"weight": 3_000_000}, {"weight": 1}, [1_000_000, 1]),
    ],
)
def test_a_shuffle_weighs_by_what_its_first_deployment_has(
    first: dict[str, Any], second: dict[str, Any], weights: list[int]
) -> None:
    (rule,) = of(model(**first), model(model="gpt-4.1", **second)).document["rules"]

    assert [service.get("weight", 1) for service in rule["services"]] == weights


@pytest.mark.parametrize(
    ("strategy", "tactic"),
    [
        ("simple-shuffle", "random"),
        ("least-busy", "least_in_flight"),
        ("usage-based-routing", "token_based"),
        ("usage-based-routing-v2", "token_based"),
        ("latency-based-routing", "latency"),
        ("cost-based-routing", "cost"),
        ("a-plugin", "random"),
    ],
)
def test_a_strategy_becomes_its_tactic(strategy: str, tactic: str) -> None:
    imported = of(model(), router_settings={"routing_strategy": strategy})

    assert imported.document["rules"][0]["lb_tactic"]["type"] == tactic
    assert ("no counterpart" in warned(imported, "router_settings.routing_strategy")) == (strategy == "a-plugin")
    assert faults(imported) == ()


def test_deployments_that_are_one_service_are_merged() -> None:
    imported = of(model(rpm=10, tpm=5), model(rpm=20))

    assert imported.document["rules"][0]["services"] == [
        {"provider": "openai", "model": "gpt-4o", "weight": 3, "limits": {"rpm": 30}}
    ]
    assert "once more" in warned(imported, "model_list[1]")


def test_models_of_anthropic_are_rules_of_their_own_dialect_and_that_is_told() -> None:
    imported = litellm(example("balanced"))

    mixed = [rule for rule in imported.document["rules"] if rule["request_model"] == "mixed"]
    assert [(rule["scenario"], [s["provider"] for s in rule["services"]]) for rule in mixed] == [
        ("openai", ["openai"]),
        ("anthropic", ["anthropic"]),
    ]
    assert "no translation yet" in warned(imported, "model_list[4].model_name")
    assert "neither stands in for the other" in warned(imported, "model_list[4].model_name")


# -- what models say of each other -------------------------------------------------------------------------------------


def test_fallbacks_in_a_circle_are_cut_where_they_would_lead_back() -> None:
    imported = litellm(example("circles"))

    assert {rule["request_model"]: rule.get("fallback") for rule in imported.document["rules"]} == {
        "first": ["openai/second", "openai/third"],
        "second": ["openai/third"],
        "third": None,
    }
    assert "would lead back" in warned(imported, "router_settings.fallbacks[1].second")


def test_defaults_stand_in_where_a_model_names_none() -> None:
    imported = of(
        model("one"),
        model("two"),
        model("three"),
        litellm_settings={"fallbacks": [{"one": ["two"]}], "default_fallbacks": ["three"]},
    )

    fallbacks = [rule.get("fallback") for rule in imported.document["rules"]]
    assert fallbacks == [["openai/two"], ["openai/three"], None]
    assert faults(imported) == ()


def test_a_fallback_to_the_other_dialect_is_left_out_and_told() -> None:
    imported = of(
        model("one"), model("claude", model="anthropic/claude"), router_settings={"fallbacks": [{"one": ["claude"]}]}
    )

    assert "fallback" not in imported.document["rules"][0]
    assert "neither stands in for the other" in warned(imported, "router_settings.fallbacks[0].one")


def test_the_routers_settings_win_over_the_modules() -> None:
    imported = of(model(), router_settings={"num_retries": 1}, litellm_settings={"num_retries": 5})

    assert imported.document["rules"][0]["retry"] == {"attempts": 2}


def test_an_alias_is_a_rule_with_the_same_services() -> None:
    rules = {rule["request_model"]: rule for rule in litellm(example("balanced")).document["rules"]}

    assert rules["gpt-4"] == rules["chat"] | {"request_model": "gpt-4"}


WEIRD: tuple[Any, ...] = (
    None,
    -1,
    1.5,
    True,
    "",
    "x",
    "a{b}c",
    "http://[bad",
    "\n",
    10**30,
    [],
    {},
    ["a", {"b": 1}],
    {"a": {"b": [1]}},
)


def nodes(value: Any, path: Path_ = ()) -> Iterator[Path_]:
    """The paths of all that a value holds."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from nodes(item, (*path, key))


@pytest.mark.parametrize("name", ["balanced", "documented"])
def test_whatever_stands_somewhere_an_import_ends_in_a_document_or_a_refusal(name: str) -> None:
    """A name that was a list ended in a traceback."""
    raw = example(name)
    for path in nodes(raw):
        for value in WEIRD:
            odd = copy.deepcopy(raw)
            at = odd
            for part in path[:-1]:
                at = at[part]
            at[path[-1]] = value
            try:
                imported = litellm(odd)
            except ConfigurationError:
                continue
            faults(imported)


# -- what is none ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("raw", [None, [], "text", {}, {"model_list": None}, {"providers": [], "rules": []}])
def test_what_has_no_model_list_is_refused(raw: Any) -> None:
    with pytest.raises(ConfigurationError, match="no LiteLLM configuration"):
        litellm(raw)


@pytest.mark.parametrize(
    "row",
    [
        None,
        "text",
        {},
        {"model_name": "x"},
        {"model_name": "x", "litellm_params": []},
        {"model_name": "x", "litellm_params": {"model": None}},
        {"model_name": 7, "litellm_params": {"model": "gpt-4o"}},
        {"model_name": "x", "litellm_params": {"model": "openai/"}},
        {"model_name": "x", "litellm_params": {"model": "nobody/knows"}},
    ],
)
def test_a_row_that_names_no_model_is_left_out_and_told(row: Any) -> None:
    imported = litellm({"model_list": [row, model()]})

    assert len(imported.document["rules"]) == 1
    assert any(line.startswith("model_list[0]") for line in imported.warnings)


@pytest.mark.parametrize("value", [-1, "many", [], {}, True])
def test_a_number_that_is_none_is_told(value: Any) -> None:
    imported = of(model(rpm=value), router_settings={"num_retries": value})

    assert faults(imported) == ()
    assert "left out" in warned(imported, "model_list[0].litellm_params.rpm")
    assert "left out" in warned(imported, "router_settings.num_retries")


def test_examples_are_read_as_yaml_reads_them() -> None:
    """Our parser leaves dates as text, where YAML's own makes dates of them: azure's api_version is one."""
    assert yaml.safe_load(EXAMPLES["documented"].read_text(encoding="utf-8"))["model_list"]
    assert litellm(example("queue")).document["providers"][1]["query"] == {"api-version": "2023-07-01-preview"}
