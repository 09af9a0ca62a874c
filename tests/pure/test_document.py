"""The configuration document: what each door refuses, mends or reads alike, and what is written of it again."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from balancer.document import diff, digest, is_tingly_box, masked, parse, read, select_view, write
from balancer.domain import (
    BreakerSettings,
    Configuration,
    Health,
    Limits,
    OAuthDetail,
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
from balancer.tactics import Hybrid, Random, RoundRobin, TokenBased
from tests.builders import a_configuration, a_document, a_provider, a_rule, a_service

URL = "https://upstream.invalid/v1"


def strict(raw: Any) -> Configuration:
    """What the strict door makes of a document without a fault."""
    return read(raw, door="strict").configuration


def faults(raw: Any) -> list[str]:
    """The faults that the strict door finds."""
    with pytest.raises(ConfigurationError) as caught:
        read(raw, door="strict")
    assert all(fault in str(caught.value) for fault in caught.value.faults)
    return list(caught.value.faults)


def lenient(raw: Any) -> tuple[Configuration, list[str]]:
    """What the lenient door makes of a document, and its warnings."""
    reading = read(raw, door="lenient")
    return reading.configuration, list(reading.warnings)


def paths(lines: Sequence[str]) -> list[str]:
    """The path of each fault or warning, in order of the alphabet."""
    return sorted(line.partition(": ")[0] for line in lines)


def services(*rows: dict[str, Any]) -> dict[str, Any]:
    """A rule's services of provider `a`."""
    return {"services": [{"provider": "a"} | row for row in rows]}


def entries(*ops: dict[str, Any]) -> dict[str, Any]:
    """A rule's smart routing with one entry of these ops."""
    return {"smart_routing": [{"ops": list(ops), "services": [{"provider": "a", "model": "m"}]}]}


def tactic(type_: Any, **params: Any) -> dict[str, Any]:
    """A rule's tactic."""
    return {"lb_tactic": {"type": type_, "params": params}}


# -- both doors --------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["strict", "lenient"])
def door(request: pytest.FixtureRequest) -> Any:
    return request.param


def test_all_but_the_obvious_is_optional(door: Any) -> None:
    reading = read(a_document(), door=door)

    assert reading.configuration == Configuration(
        providers=(
            Provider(
                uuid="a",
                name="a",
                api_base=URL,
                api_style="openai",
                auth_type="api_key",
                enabled=True,
                timeout=1800,
                timeouts=Timeouts(connect_s=10, headers_s=120, first_byte_s=120, idle_s=120),
                stream_usage=True,
            ),
        ),
        rules=(
            Rule(
                uuid="openai/chat",
                scenario="openai",
                request_model="chat",
                active=True,
                pool="default",
                lb_tactic=RoundRobin(request_threshold=10, reserve="input", reserve_cap=200_000),
                services=(Service(provider="a", model="m", weight=1, active=True, time_window=300),),
                current_service_index=None,
                on_exhausted="try",
                strict_settle=False,
            ),
        ),
    )
    assert reading.warnings == ()


@pytest.mark.parametrize("raw", [None, {}, {"providers": None, "rules": [], "scenarios": None, "keys": []}])
def test_an_empty_document_is_an_empty_configuration(door: Any, raw: Any) -> None:
    assert read(raw, door=door).configuration == Configuration()


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ({}, RoundRobin()),
        ({"lb_tactic": None}, RoundRobin()),
        ({"lb_tactic": {}}, RoundRobin()),
        ({"lb_tactic": {"type": "hybrid"}}, Hybrid(request_threshold=10, token_threshold=10_000)),
        ({"lb_tactic": {"type": "hybrid", "params": None}}, Hybrid(request_threshold=10, token_threshold=10_000)),
        ({"lb_tactic": {"params": {"request_threshold": 4}}}, RoundRobin(request_threshold=4)),
        (tactic("ROUND_ROBIN", request_threshold=2), RoundRobin(request_threshold=2)),
        (tactic("Token_Based", token_threshold=2), TokenBased(token_threshold=2)),
        (tactic("hybrid", request_threshold=2), Hybrid(request_threshold=2, token_threshold=10_000)),
        (tactic("hybrid", token_threshold=2), Hybrid(request_threshold=10, token_threshold=2)),
        (tactic("hybrid", request_threshold=0, token_threshold=-1), Hybrid()),
        (tactic("hybrid", request_threshold=None, token_threshold=None), Hybrid()),
        (tactic("hybrid", request_threshold=2**60), Hybrid(request_threshold=2**60)),
        (tactic("hybrid", reserve="full", reserve_cap=5), Hybrid(reserve="full", reserve_cap=5)),
        (tactic("rAnDoM"), Random()),
        (tactic(0), RoundRobin()),
        (tactic(1), TokenBased()),
        (tactic(2), Hybrid()),
        (tactic(3), Random()),
    ],
)
def test_a_tactic_is_read_from_its_name_or_number_and_whatever_parameters_it_has(
    door: Any, rule: dict[str, Any], expected: Tactic
) -> None:
    reading = read(a_document(rule=rule), door=door)

    assert reading.configuration.rules[0].lb_tactic == expected
    assert reading.warnings == ()


@pytest.mark.parametrize(("time_window", "means"), [(1, 1), (0, 300), (-1, 300), (None, 300), (600, 600)])
def test_a_window_of_no_length_is_five_minutes(door: Any, time_window: int | None, means: int) -> None:
    configuration = read(a_document(service={"time_window": time_window}), door=door).configuration

    assert configuration.rules[0].services[0].time_window == means


def test_fields_that_are_null_take_their_defaults(door: Any) -> None:
    bare = read(a_document(), door=door)
    nulls = a_document(
        provider=dict.fromkeys(set(Provider.__struct_fields__) - {"name", "api_base"}),
        rule=dict.fromkeys(set(Rule.__struct_fields__) - {"request_model", "services"}),
        service=dict.fromkeys(set(Service.__struct_fields__) - {"provider", "model"}),
    )

    assert read(nulls, door=door) == bare


def test_a_rule_whose_services_are_all_inactive_is_valid(door: Any) -> None:
    reading = read(a_document(service={"active": False}), door=door)

    assert [service.active for service in reading.configuration.rules[0].services] == [False]
    assert reading.warnings == ()


def test_uuids_default_to_the_name_and_to_scenario_and_model(door: Any) -> None:
    configuration = read(a_document(rule={"scenario": "claude_code"}), door=door).configuration

    assert (configuration.providers[0].uuid, configuration.rules[0].uuid) == ("a", "claude_code/chat")


@pytest.mark.parametrize("name", ["the one", "u-1"])
def test_a_service_has_one_id_however_its_rule_names_the_provider(door: Any, name: str) -> None:
    raw = a_document(provider={"name": "the one", "uuid": "u-1"}, service={"provider": name, "model": "llama3:8b"})

    assert read(raw, door=door).configuration.rules[0].services[0].id == "u-1:llama3:8b"


@pytest.mark.parametrize(
    ("first", "second", "warned"),
    [
        ({}, {}, ["rules[1]"]),
        ({"active": False}, {}, []),
        ({}, {"active": False}, []),
        ({"scenario": "anthropic"}, {}, []),
        ({"request_model": "other"}, {}, []),
    ],
)
def test_of_two_active_rules_for_the_same_requests_the_first_wins_and_a_warning_says_so(
    door: Any, first: dict[str, Any], second: dict[str, Any], warned: list[str]
) -> None:
    rules = [{"request_model": "chat", "uuid": "1"} | first, {"request_model": "chat", "uuid": "2"} | second]
    reading = read({"rules": rules}, door=door)

    assert [rule.uuid for rule in reading.configuration.rules] == ["1", "2"]
    assert paths(reading.warnings) == warned
    assert all("rules[0]" in warning for warning in reading.warnings)


def test_credentials_are_kept_as_they_are_written(door: Any) -> None:
    token = "${file:/run/secrets/x}"

    assert read(a_document(provider={"token": token}), door=door).configuration.providers[0].token == token


# -- the strict door ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "path", "words"),
    [
        ([], "document", "expected a mapping"),
        ("rules", "document", "expected a mapping"),
        ({"rules": {}}, "rules", "expected a list"),
        ({"rules": ["chat"]}, "rules[0]", "expected a mapping"),
        # Unknown fields, at every depth.
        (a_document(ruels=[]), "ruels", "unknown field"),
        (a_document(provider={"tokne": "x"}), "providers[0].tokne", "unknown field"),
        (a_document(provider={"timeouts": {"idle": 1}}), "providers[0].timeouts.idle", "unknown field"),
        (a_document(provider={"limits": {"rps": 0}}), "providers[0].limits.rps", "unknown field"),
        (a_document(rule={"tactic": {}}), "rules[0].tactic", "unknown field"),
        (a_document(rule={"lb_tactic": {"param": {}}}), "rules[0].lb_tactic.param", "unknown field"),
        (a_document(rule=tactic("hybrid", ratio=1)), "rules[0].lb_tactic.params.ratio", "no such parameter"),
        (
            a_document(rule=tactic("random", request_threshold=1)),
            "rules[0].lb_tactic.params.request_threshold",
            "no such parameter",
        ),
        (a_document(service={"wieght": 1}), "rules[0].services[0].wieght", "unknown field"),
        (
            a_document(scenarios=[{"scenario": "openai", "flags": {"split": True}}]),
            "scenarios[0].flags.split",
            "unknown field",
        ),
        (
            a_document(rule=entries({"position": "token", "operation": "ge", "value": "1", "valeu": "1"})),
            "rules[0].smart_routing[0].ops[0].valeu",
            "unknown field",
        ),
        # Values of the wrong type or range.
        (a_document(provider={"timeout": -1}), "providers[0].timeout", "more than 0"),
        (a_document(provider={"timeouts": {"idle_s": 0}}), "providers[0].timeouts.idle_s", "more than 0"),
        (a_document(provider={"api_base": "upstream.invalid"}), "providers[0].api_base", "http"),
        (a_document(provider={"api_base": "ftp://upstream.invalid"}), "providers[0].api_base", "http"),
        (a_document(provider={"api_base": "https://u:p@upstream.invalid"}), "providers[0].api_base", "credentials"),
        (a_document(provider={"proxy_url": "ftp://proxy.invalid"}), "providers[0].proxy_url", "socks5"),
        (a_document(provider={"auth_type": "oauth"}), "providers[0].oauth_detail", "missing"),
        (
            a_document(provider={"oauth_detail": {"access_token": "t", "expires_at": "soon"}}),
            "providers[0].oauth_detail.expires_at",
            "RFC 3339",
        ),
        (a_document(provider={"headers": {"a b": "x"}}), "providers[0].headers", "no valid header"),
        (a_document(provider={"headers": {"a": "x\r\ny: z"}}), "providers[0].headers", "no valid header"),
        (
            a_document(rule=tactic("round_robin", request_threshold="7")),
            "rules[0].lb_tactic.params.request_threshold",
            "int",
        ),
        (a_document(rule={"services": [{"model": "m"}]}), "rules[0].services[0].provider", "missing"),
        (a_document(rule={"services": [{"provider": "a"}]}), "rules[0].services[0].model", "missing"),
        (a_document(rule={"scenario": "codex"}), "rules[0].scenario", "codex"),
        (a_document(scenarios=[{"scenario": "codex"}]), "scenarios[0].scenario", "codex"),
        (a_document(scenarios=[{"scenario": "openai"}] * 2), "scenarios", "2 times"),
        (a_document(rule={"request_model": ""}), "rules[0].request_model", "empty"),
        (a_document(rule={"current_service_index": 1}), "rules[0].current_service_index", "1 services"),
        (a_document(rule={"current_service_index": -1}), "rules[0].current_service_index", "-1"),
        (a_document(rule={"current_service_index": True}), "rules[0].current_service_index", "whole number"),
        # What the contract names.
        (a_document(rule=tactic("best")), "rules[0].lb_tactic.type", "unknown tactic 'best'"),
        (a_document(rule=tactic(4)), "rules[0].lb_tactic.type", "unknown tactic 4"),
        (a_document(service={"provider": "b"}), "rules[0].services[0].provider", "no provider 'b'"),
        (a_document(service={"weight": -1}), "rules[0].services[0].weight", "negative"),
        (a_document(rule=services({"model": "m"}, {"model": "m"})), "rules[0].services[1]", "a:m"),
    ],
)
def test_what_is_wrong_is_refused_with_its_path(raw: Any, path: str, words: str) -> None:
    (fault,) = faults(raw)

    assert fault.startswith(f"{path}: ")
    assert words in fault


RANGES: list[tuple[str, str, list[Any], list[Any]]] = [
    *(("provider", f"limits.{name}", [0, 1, 2**53], [-1, 2**53 + 1]) for name in ("rpm", "tpm", "in_flight")),
    *(("service", f"limits.{name}", [0, 1, 2**53], [-1, 2**53 + 1]) for name in ("rpm", "tpm", "in_flight")),
    ("provider", "breaker.failures", [0, 1], [-1]),
    ("provider", "breaker.ratio", [0, 0.001, 1], [-0.1, 0.0004, 1.1]),
    ("provider", "breaker.min_requests", [1], [0, -1]),
    ("provider", "breaker.window_s", [0.001, 3600], [0, 0.0009, 3601, -1]),
    ("provider", "breaker.open_s", [0.001, 3600], [0, 0.0009, 3601, -1]),
    ("provider", "breaker.successes", [1, 100], [0, 101]),
    *(("provider", f"price.{name}", [0, 0.01, 1e6], [-0.01, 1e6 + 1]) for name in ("input", "output", "cached")),
    ("service", "tier", [0, 9], [-1, 10]),
    ("rule", "session_affinity", [0, 30 * 86400], [-1, 30 * 86400 + 1]),
    ("rule", "queue_timeout_ms", [0, 600_000], [-1, 600_001]),
    ("rule", "retry.attempts", [1, 10], [0, 11]),
    ("rule", "retry.budget_ratio", [0, 0.001, 1], [-0.1, 0.0004, 1.1]),
    ("rule", "retry.backoff_ms", [0, 10_000], [-1, 10_001]),
]
ROOTS = {"provider": "providers[0]", "rule": "rules[0]", "service": "rules[0].services[0]"}


def a_part(field: str, value: Any) -> dict[str, Any]:
    """The field, which may be one of a nested table, with that value."""
    outer, _, inner = field.partition(".")
    return {outer: {inner: value} if inner else value}


@pytest.mark.parametrize(("place", "field", "good"), [(p, f, value) for p, f, good, _ in RANGES for value in good])
def test_numbers_at_the_ends_of_their_range_are_taken(door: Any, place: str, field: str, good: Any) -> None:
    reading = read(a_document(**{place: a_part(field, good)}), door=door)
    value: Any = {
        "provider": lambda c: c.providers[0],
        "rule": lambda c: c.rules[0],
        "service": lambda c: c.rules[0].services[0],
    }[place](reading.configuration)
    for name in field.split("."):
        value = getattr(value, name)

    assert (value, reading.warnings) == (good, ())


@pytest.mark.parametrize(("place", "field", "bad"), [(p, f, value) for p, f, _, bad in RANGES for value in bad])
def test_a_number_outside_its_range_is_refused_or_takes_its_default(place: str, field: str, bad: Any) -> None:
    raw = a_document(**{place: a_part(field, bad)})
    path = f"{ROOTS[place]}.{field}"

    (fault,) = faults(raw)
    assert fault.startswith(f"{path}: expected ")
    assert str(bad) in fault
    configuration, warnings = lenient(raw)
    assert configuration == strict(a_document())
    assert paths(warnings) == [path]


@pytest.mark.parametrize(
    ("place", "part", "path"),
    [
        ("provider", {"health": {"path": "health", "interval_s": 5}}, "providers[0].health.path"),
        ("provider", {"health": {"path": "/a b", "interval_s": 5}}, "providers[0].health.path"),
        ("provider", {"health": {"path": "/a#b"}}, "providers[0].health.path"),
        ("provider", {"health": {"path": "/ä"}}, "providers[0].health.path"),
        ("provider", {"health": {"interval_s": 5}}, "providers[0].health.path"),
        ("service", {"limits": {"split": {"default": 1}}}, "rules[0].services[0].limits.split"),
        ("rule", {"session_header": "no header"}, "rules[0].session_header"),
        ("rule", {"session_header": "x:"}, "rules[0].session_header"),
    ],
)
def test_what_makes_no_sense_is_refused_or_left_out(place: str, part: dict[str, Any], path: str) -> None:
    raw = a_document(**{place: part})

    assert paths(faults(raw)) == [path]
    assert (lenient(raw)[0], paths(lenient(raw)[1])) == (strict(a_document()), [path])


@pytest.mark.parametrize(("affinity", "warned"), [(0, ["rules[0].session_header"]), (60, [])])
def test_a_session_header_that_nobody_looks_at_gets_a_warning(door: Any, affinity: int, warned: list[str]) -> None:
    reading = read(a_document(rule={"session_header": "x-session", "session_affinity": affinity}), door=door)

    assert reading.configuration.rules[0].session_header == "x-session"
    assert paths(reading.warnings) == warned


def test_a_health_probe_of_less_than_a_second_is_refused_or_off() -> None:
    raw = a_document(provider={"health": {"path": "/health", "interval_s": 0.5}})

    assert paths(faults(raw)) == ["providers[0].health.interval_s"]
    assert lenient(raw)[0].providers[0].health.interval_s == 0


@pytest.mark.parametrize("part", ["limits", "breaker", "price", "health", "timeouts"])
def test_a_part_of_the_wrong_kind_is_one_fault(part: str) -> None:
    """Its provider was once skipped whole, and every service of it called one of no provider."""
    assert paths(faults(a_document(provider={part: "much"}))) == [f"providers[0].{part}"]


@pytest.mark.parametrize("field", ["api_base", "proxy_url"])
def test_a_url_that_cannot_be_taken_apart_is_a_fault_like_any_other(field: str) -> None:
    assert paths(faults(a_document(provider={field: "http://[half"}, rules=[]))) == [f"providers[0].{field}"]


@pytest.mark.parametrize("seconds", [float("nan"), float("inf")])
def test_a_time_that_json_cannot_tell_is_refused(seconds: float) -> None:
    """YAML has `.nan` and `.inf`; in the stored document they would be null."""
    assert paths(faults(a_document(provider={"timeout": seconds}, rules=[]))) == ["providers[0].timeout"]
    assert paths(faults(a_document(provider={"timeouts": {"idle_s": seconds}}, rules=[]))) == [
        "providers[0].timeouts.idle_s"
    ]


def test_one_service_under_two_names_of_its_provider_is_there_twice() -> None:
    two = [{"provider": name, "model": "m"} for name in ("the one", "u-1")]

    assert paths(faults(a_document(provider={"name": "the one", "uuid": "u-1"}, rule={"services": two}))) == [
        "rules[0].services[1]"
    ]


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ({"name": "a"}, {"name": "a"}, ["providers[1].name", "providers[1].uuid"]),
        ({"name": "a", "uuid": "1"}, {"name": "a", "uuid": "2"}, ["providers[1].name"]),
        ({"name": "a", "uuid": "1"}, {"name": "b", "uuid": "1"}, ["providers[1].uuid"]),
        ({"name": "a", "uuid": "1"}, {"name": "1", "uuid": "2"}, ["providers[1].name"]),
        ({"name": "a", "uuid": "1"}, {"name": "b", "uuid": "a"}, ["providers[1].uuid"]),
    ],
)
def test_names_and_uuids_of_providers_are_unique_together(
    first: dict[str, Any], second: dict[str, Any], expected: list[str]
) -> None:
    assert paths(faults({"providers": [{"api_base": URL} | first, {"api_base": URL} | second]})) == expected


def test_rules_do_not_share_a_uuid() -> None:
    rules = [{"uuid": "1", "request_model": "x"}, {"uuid": "1", "request_model": "y"}]

    assert paths(faults({"rules": rules})) == ["rules[1].uuid"]


@pytest.mark.parametrize("pool", ["", "-a", ".a", "_a", "a/b", "a b", "a\n", "{a}", "ä", "a" * 65])
def test_a_pool_with_another_name_than_the_allowed_is_refused(pool: str) -> None:
    assert paths(faults(a_document(rule={"pool": pool}))) == ["rules[0].pool"]


@pytest.mark.parametrize("pool", ["a", "0", "A.b-c_9", "a" * 64])
def test_a_pool_has_letters_digits_dots_dashes_and_underscores(pool: str) -> None:
    assert strict(a_document(rule={"pool": pool})).rules[0].pool == pool


@pytest.mark.parametrize("sign", [":", "{", "}"])
def test_a_provider_uuid_holds_no_colon_and_no_brace(sign: str) -> None:
    raw = a_document(provider={"name": "a", "uuid": f"u{sign}1"})

    assert paths(faults(raw)) == ["providers[0].uuid"]


@pytest.mark.parametrize("sign", ["{", "}"])
def test_rule_uuids_and_models_hold_no_brace(sign: str) -> None:
    assert paths(faults(a_document(rule={"uuid": f"u{sign}"}))) == ["rules[0].uuid"]
    assert paths(faults(a_document(rule={"uuid": "u", "request_model": f"m{sign}"}))) == ["rules[0].request_model"]
    assert paths(faults(a_document(rule={"response_model": f"m{sign}"}))) == ["rules[0].response_model"]
    assert paths(faults(a_document(service={"model": f"m{sign}"}))) == ["rules[0].services[0].model"]


@pytest.mark.parametrize("model", ["llama3:8b", "org/model", "a b", "modèle"])
def test_a_model_may_hold_colons_and_slashes(model: str) -> None:
    configuration = strict(a_document(rule={"request_model": model}, service={"model": model}))

    assert configuration.rules[0].uuid == f"openai/{model}"
    assert configuration.rules[0].services[0].id == f"a:{model}"


def test_all_faults_of_a_document_are_told_at_once() -> None:
    raw = {
        "providers": [
            {"name": "a", "api_base": "nowhere", "timeout": 0.5, "bogus": 1},
            {"name": "b", "api_base": URL, "timeouts": {"idle_s": -1, "bogus": 1}},
        ],
        "rules": [
            {
                "request_model": "x",
                "pool": "?",
                "bogus": 1,
                "services": [{"provider": "c", "model": "{", "weight": -1}],
            },
            {"request_model": "y", "services": [{"provider": "a", "model": "m", "weight": "2", "bogus": 1}]},
        ],
        "scenarios": [{"scenario": "codex"}],
        "bogus": 1,
    }

    assert paths(faults(raw)) == sorted(
        [
            "providers[0].api_base",
            "providers[0].bogus",
            "providers[1].timeouts.idle_s",
            "providers[1].timeouts.bogus",
            "rules[0].pool",
            "rules[0].bogus",
            "rules[0].services[0].provider",
            "rules[0].services[0].model",
            "rules[0].services[0].weight",
            "rules[1].services[0].weight",
            "rules[1].services[0].bogus",
            "scenarios[0].scenario",
            "bogus",
        ]
    )


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (
            a_document(rule={"pool": "?"} | tactic("best"), service={"weight": -1}),
            ["rules[0].lb_tactic.type", "rules[0].pool", "rules[0].services[0].weight"],
        ),
        (
            a_document(rule={"description": 1, "pool": "?"}),
            ["rules[0].description", "rules[0].pool"],
        ),
        (
            a_document(provider={"timeout": "long", "api_base": "nowhere"}, rules=[]),
            ["providers[0].api_base", "providers[0].timeout"],
        ),
        (
            a_document(provider={"timeouts": {"idle_s": "long"}, "api_base": "nowhere"}, rules=[]),
            ["providers[0].api_base", "providers[0].timeouts.idle_s"],
        ),
        (
            a_document(provider={"api_style": "gemini", "bogus": 1}, rules=[]),
            ["providers[0].api_style", "providers[0].bogus"],
        ),
        (
            a_document(service={"weight": "2", "model": "{"}),
            ["rules[0].services[0].model", "rules[0].services[0].weight"],
        ),
    ],
    ids=["a tactic", "a field of a rule", "a field of a provider", "a part of a provider", "a style", "a service"],
)
def test_one_fault_does_not_hide_the_others_beside_it(raw: Any, expected: list[str]) -> None:
    """What could not be read was once skipped whole, and its other faults came one run of `check` after the other."""
    assert paths(faults(raw)) == expected


def test_both_thresholds_of_a_tactic_are_faulted() -> None:
    lines = faults(a_document(rule=tactic("hybrid", request_threshold="x", token_threshold="y")))

    assert [name for name in ("request_threshold", "token_threshold") if name in "\n".join(lines)] == [
        "request_threshold",
        "token_threshold",
    ]


@pytest.mark.parametrize("provider", [{"timeout": "long"}, {"api_style": "gemini"}])
def test_a_provider_with_a_fault_is_not_also_called_absent(provider: dict[str, Any]) -> None:
    assert [line for line in faults(a_document(provider=provider)) if "no provider" in line] == []


def test_faults_never_show_a_credential() -> None:
    raw = a_document(
        provider={
            "token": ["SECRET"],
            "api_base": "https://u:SECRET@upstream.invalid",
            "proxy_url": "ftp://u:SECRET@proxy.invalid",
            "headers": {"authorization": "SECRET\n"},
            "oauth_detail": {"access_token": 7, "refresh_token": "SECRET"},
        }
    )

    assert "SECRET" not in "\n".join(faults(raw))


# -- what is not supported yet -----------------------------------------------------------------------------------------

NOT_YET: list[tuple[str, dict[str, Any], str]] = [
    ("provider", {"oauth_detail": {"refresh_token": "r"}}, "providers[0].oauth_detail.refresh_token"),
    ("keys", {"name": "ci", "hash": "sha256:0"}, "keys"),
]
REST: dict[str, dict[str, Any]] = {
    "providers[0].oauth_detail.refresh_token": {"provider": {"oauth_detail": {}}},
}
"""What stays of the document when the field is left out."""


def with_part(place: str, part: dict[str, Any]) -> dict[str, Any]:
    parts: dict[str, Any] = {place: part if place in ("provider", "rule", "service") else [part]}
    return a_document(**parts)


@pytest.mark.parametrize(("place", "part", "path"), NOT_YET)
def test_a_field_without_its_work_is_refused_by_the_strict_door(place: str, part: dict[str, Any], path: str) -> None:
    (fault,) = faults(with_part(place, part))

    assert fault.startswith(f"{path}: ")
    assert "not supported yet" in fault


@pytest.mark.parametrize(("place", "part", "path"), NOT_YET)
def test_a_field_without_its_work_is_left_out_by_the_lenient_door(place: str, part: dict[str, Any], path: str) -> None:
    configuration, warnings = lenient(with_part(place, part))

    assert configuration == strict(a_document(**REST.get(path, {})))
    assert paths(warnings) == [path]
    assert "not supported yet" in warnings[0]


@pytest.mark.parametrize("read", [strict, lambda raw: lenient(raw)[0]], ids=["strict", "lenient"])
def test_a_google_provider_is_read_by_both_doors(read: Callable[[Any], Configuration]) -> None:
    raw = a_document(rule=services({"provider": "g", "model": "gemini"}, {"model": "m"}))
    raw["providers"].append({"name": "g", "api_base": URL, "api_style": "google", "responses": False})

    configuration = read(raw)

    assert [(service.id, service.active) for service in configuration.rules[0].services] == [
        ("g:gemini", True),
        ("a:m", True),
    ]
    assert (configuration.providers[1].api_style, configuration.providers[1].responses) == ("google", False)


@pytest.mark.parametrize(
    ("base", "words"),
    [
        ("https://generativelanguage.googleapis.com/v1beta/openai/", "api_style: openai"),
        ("https://eu-aiplatform.googleapis.com", "/publishers/google"),
    ],
)
def test_a_base_of_googles_that_speaks_something_else_is_told(base: str, words: str) -> None:
    (fault,) = faults(a_document(provider={"api_style": "google", "api_base": base}))

    assert fault.startswith("providers[0].api_base: ")
    assert words in fault


@pytest.mark.parametrize(
    ("place", "part"),
    [
        ("provider", {"limits": {"rpm": 0, "tpm": 0, "in_flight": 0}, "breaker": {}, "price": {"input": 0}}),
        ("provider", {"health": {"path": "", "interval_s": 0}}),
        ("service", {"tier": 0, "limits": {}}),
        ("rule", {"session_affinity": 0, "session_header": "", "on_store_loss": "local", "on_exhausted": "try"}),
        ("rule", {"queue_timeout_ms": 0, "retry": {}, "fallback": [], "smart_enabled": False}),
    ],
)
def test_what_is_switched_off_in_words_is_as_if_it_were_not_there(place: str, part: dict[str, Any]) -> None:
    reading = read(with_part(place, part), door="strict")

    assert reading == read(a_document(), door="strict")


# -- the lenient door --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("type_", ["best", "", 4, -1, True, 1.5, ["random"]])
def test_an_unknown_tactic_is_round_robin(type_: Any) -> None:
    configuration, warnings = lenient(a_document(rule=tactic(type_, request_threshold=3)))

    assert configuration.rules[0].lb_tactic == RoundRobin(request_threshold=3)
    assert paths(warnings) == (["rules[0].lb_tactic.type"] if type_ != "" else [])


@pytest.mark.parametrize(
    ("index", "means", "is_warned"), [(0, 0, False), (1, 1, False), (2, 0, True), (5, 1, True), (-1, 1, True)]
)
def test_an_index_outside_is_taken_modulo_the_services(index: int, means: int, is_warned: bool) -> None:
    rule = services({"model": "x"}, {"model": "y", "active": False}) | {"current_service_index": index}

    configuration, warnings = lenient(a_document(rule=rule))

    assert configuration.rules[0].current_service_index == means
    assert paths(warnings) == (["rules[0].current_service_index"] if is_warned else [])


def test_an_index_into_no_services_is_none() -> None:
    configuration, warnings = lenient(a_document(rule={"services": [], "current_service_index": 3}))

    assert configuration.rules[0].current_service_index in (None, 0)
    assert paths(warnings) == ["rules[0].current_service_index"]


def test_an_index_means_the_service_that_it_meant_in_the_document() -> None:
    """A service that is there twice is dropped; the index was once counted in what was left."""
    rule = services({"model": "x"}, {"model": "x"}, {"model": "y"}) | {"current_service_index": 2}

    configuration, _ = lenient(a_document(rule=rule))
    current = configuration.rules[0].current_service()

    assert current is not None
    assert current.model == "y"


def test_a_service_without_its_provider_is_inactive_and_keeps_its_place() -> None:
    rule = services({"provider": "gone:{", "model": "x"}, {"model": "y"}) | {"current_service_index": 1}

    configuration, warnings = lenient(a_document(rule=rule))

    assert [(service.model, service.active) for service in configuration.rules[0].services] == [
        ("x", False),
        ("y", True),
    ]
    assert configuration.rules[0].current_service_index == 1
    assert paths(warnings) == ["rules[0].services[0].provider"]


def test_unknown_fields_are_dropped_each_with_a_warning() -> None:
    raw = a_document(
        provider={"x": 1, "timeouts": {"x": 1}},
        rule={"x": 1, "lb_tactic": {"x": 1, "params": {"x": 1}}},
        service={"x": 1},
        scenarios=[{"scenario": "openai", "x": 1, "flags": {"x": 1}}],
        x=1,
    )

    configuration, warnings = lenient(raw)

    assert configuration == strict(a_document(scenarios=[{"scenario": "openai"}]))
    assert paths(warnings) == sorted(
        [
            "x",
            "providers[0].x",
            "providers[0].timeouts.x",
            "rules[0].x",
            "rules[0].lb_tactic.x",
            "rules[0].lb_tactic.params.x",
            "rules[0].services[0].x",
            "scenarios[0].x",
            "scenarios[0].flags.x",
        ]
    )


def test_a_negative_weight_and_a_service_there_twice_are_mended() -> None:
    configuration, warnings = lenient(a_document(rule=services({"model": "m", "weight": -2}, {"model": "m"})))

    assert [(service.id, service.weight) for service in configuration.rules[0].services] == [("a:m", 0)]
    assert paths(warnings) == ["rules[0].services[0].weight", "rules[0].services[1]"]


def test_a_rule_or_settings_of_an_unknown_scenario_are_left_out() -> None:
    raw = a_document(rule={"scenario": "codex"}, scenarios=[{"scenario": "codex"}])

    configuration, warnings = lenient(raw)

    assert (configuration.rules, configuration.scenarios) == ((), ())
    assert paths(warnings) == ["rules[0].scenario", "scenarios[0].scenario"]


@pytest.mark.parametrize(
    ("raw", "path"),
    [
        (a_document(rules=[{"services": []}]), "rules[0].request_model"),
        (a_document(provider={"api_base": "nowhere"}), "providers[0].api_base"),
        (a_document(service={"weight": "heavy"}), "rules[0].services[0].weight"),
        (a_document(rule={"lb_tactic": "random"}), "rules[0].lb_tactic"),
    ],
)
def test_what_cannot_be_mended_is_refused_by_the_lenient_door_too(raw: Any, path: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        lenient(raw)

    assert path in paths(caught.value.faults)


TINGLY_BOX: dict[str, Any] = {
    "user_token": "u",
    "model_token": "m",
    "jwt_secret": "j",
    "encrypt_providers": False,
    "server_port": 12580,
    "providers_v2": [
        {
            "uuid": "p-1",
            "name": "one",
            "api_base": URL,
            "api_style": "openai",
            "token": "k",
            "enabled": True,
            "proxy_url": "",
            "timeout": 1800,
            "auth_type": "api_key",
        },
    ],
    "rules": [
        {
            "uuid": "r-1",
            "scenario": "openai",
            "request_model": "chat",
            "response_model": "",
            "services": [
                {"provider": "p-1", "model": "m", "weight": 1, "active": True, "time_window": 300},
                {"provider": "p-2", "model": "m", "weight": 1, "active": True, "time_window": 300},
            ],
            "current_service_index": 0,
            "lb_tactic": {"type": "token_based", "params": {"request_threshold": 9, "token_threshold": 7}},
            "active": True,
        }
    ],
}


def test_a_tingly_box_document_is_known_by_its_shape_and_read_with_warnings() -> None:
    configuration, warnings = lenient(TINGLY_BOX)

    assert is_tingly_box(TINGLY_BOX)
    assert configuration.providers == (Provider(uuid="p-1", name="one", api_base=URL, token="k"),)
    assert configuration.rules == (
        Rule(
            uuid="r-1",
            request_model="chat",
            lb_tactic=TokenBased(token_threshold=7),
            services=(Service(provider="p-1", model="m"), Service(provider="p-2", model="m", active=False)),
            current_service_index=0,
        ),
    )
    assert paths(warnings) == sorted(
        [
            "user_token",
            "model_token",
            "jwt_secret",
            "encrypt_providers",
            "server_port",
            "rules[0].services[1].provider",
        ]
    )


@pytest.mark.parametrize("raw", [a_document(), {}, {"rules": []}, None, [], "user_token", [{"user_token": "u"}]])
def test_what_people_write_for_us_is_no_tingly_box_document(raw: Any) -> None:
    assert not is_tingly_box(raw)


# -- text --------------------------------------------------------------------------------------------------------------


def test_dates_of_yaml_are_read_as_text() -> None:
    text = """
    providers:
      - name: a
        api_base: https://upstream.invalid
        auth_type: oauth
        last_updated: 2026-11-24
        oauth_detail: {access_token: t, expires_at: 2026-12-01T00:00:00Z}
    """

    provider = strict(parse(text)).providers[0]

    assert provider.last_updated == "2026-11-24"
    assert provider.oauth_detail == OAuthDetail(access_token="t", expires_at="2026-12-01T00:00:00Z")
    assert not provider.is_oauth_expired(datetime.datetime(2026, 11, 30, 23, 54, tzinfo=datetime.UTC))
    assert provider.is_oauth_expired(datetime.datetime(2026, 11, 30, 23, 56, tzinfo=datetime.UTC))


@pytest.mark.parametrize(
    ("text", "line", "key"),
    [
        ("rules: []\nproviders: []\nrules: []\n", 3, "rules"),
        ("providers:\n  - name: a\n    token: x\n    token: y\n", 4, "token"),
        ('{"rules": [{"request_model": "x",\n"request_model": "y"}]}', 2, "request_model"),
    ],
)
def test_a_key_written_twice_is_refused_with_its_line(text: str, line: int, key: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"balancer\.yaml, line {line}: .*'{key}' is written twice"):
        parse(text, "balancer.yaml")


@pytest.mark.parametrize(
    "text",
    [
        "rules: [",
        "rules:\n\t- x",
        "a: 1\n---\nb: 2",
        "a: !!python/object:os.system x",
        "a: \x07",
        "? [a]\n: b",
        "a: &a [*a]",
        "[" * 1500,
    ],
    ids=["open", "tab", "two", "object", "control", "list as key", "holds itself", "deep"],
)
def test_text_that_is_no_document_is_refused_by_name(text: str) -> None:
    with pytest.raises(ConfigurationError, match=r"balancer\.yaml"):
        parse(text, "balancer.yaml")


@pytest.mark.parametrize(
    "text",
    [
        "a: &x {b: 1}\nc: {<<: *x, d: 2}\n",
        "a: &x\n  b: 1\nc:\n  <<: *x\n  d: 2\n",
    ],
)
def test_parts_of_yaml_may_be_merged(text: str) -> None:
    assert parse(text) == {"a": {"b": 1}, "c": {"b": 1, "d": 2}}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"a": "2026-12-01", "b": [1, 1.5, true, null, "no"]}', {"a": "2026-12-01", "b": [1, 1.5, True, None, "no"]}),
        ('{\n\t"a": [\n\t\t1\n\t]\n}\n', {"a": [1]}),
        ('{"a": "\\ud83d\\ude00 \\/ \\u00e9"}', {"a": "😀 / é"}),
        ('{"a": 1e3}', {"a": 1000.0}),
        ('{"a": "\x7f\\n"}', {"a": "\x7f\n"}),
        ('{"' + "k" * 1100 + '": 1}', {"k" * 1100: 1}),
    ],
    ids=["plain", "tabs", "escapes", "exponent", "delete", "long key"],
)
def test_json_is_read_as_json(text: str, value: object) -> None:
    assert parse(text) == value


# -- writing -----------------------------------------------------------------------------------------------------------

names = st.text(st.characters(exclude_characters=":{}", exclude_categories=("Cc", "Cs")), min_size=1, max_size=8)
texts = st.text(st.characters(exclude_categories=("Cc", "Cs")), max_size=8)
header_maps = st.dictionaries(st.from_regex(r"[a-z][a-z-]{0,6}", fullmatch=True), texts, max_size=2)
wholes = st.integers(1, 2**53)
tactics: st.SearchStrategy[Tactic] = st.one_of(
    st.builds(RoundRobin, request_threshold=wholes, reserve=st.sampled_from(("none", "input", "full"))),
    st.builds(TokenBased, token_threshold=wholes, reserve_cap=wholes),
    st.builds(Hybrid, request_threshold=wholes, token_threshold=wholes),
    st.builds(Random),
)
details = st.builds(
    OAuthDetail,
    access_token=texts,
    expires_at=st.sampled_from(("", "2026-12-01T00:00:00Z")),
    provider_type=texts,
    user_id=texts,
    extra_fields=st.dictionaries(texts, st.one_of(texts, st.booleans(), st.lists(texts, max_size=2)), max_size=2),
)
rates = st.one_of(st.just(0), st.integers(4, 2**53))
limits = st.builds(Limits, rpm=rates, tpm=rates, in_flight=rates)
fractions = st.sampled_from((0.0, 0.001, 0.29, 1.0))
prices = st.builds(Price, input=fractions, output=fractions, cached=fractions)
retries = st.builds(Retry, attempts=st.integers(1, 10), budget_ratio=fractions, backoff_ms=st.integers(0, 10_000))
breakers = st.builds(
    BreakerSettings,
    failures=st.integers(0, 9),
    ratio=fractions,
    min_requests=st.integers(1, 9),
    window_s=st.floats(0.001, 3600),
    open_s=st.floats(0.001, 3600),
    successes=st.integers(1, 100),
)


@st.composite
def configurations(draw: st.DrawFn) -> Configuration:
    """Any configuration that the strict door lets in."""
    providers = []
    for name in draw(st.lists(names, unique=True, max_size=3)):
        detail = draw(st.one_of(st.none(), details))
        providers.append(
            Provider(
                uuid=name,
                name=name,
                api_base=draw(st.sampled_from((URL, "http://127.0.0.1:1/x"))),
                api_style=draw(st.sampled_from(("openai", "anthropic", "google"))),
                auth_type=draw(st.sampled_from(("api_key", "oauth") if detail else ("api_key",))),
                token=draw(texts),
                oauth_detail=detail,
                enabled=draw(st.booleans()),
                timeout=draw(st.sampled_from((0.5, 1800.5))),
                timeouts=draw(st.sampled_from((Timeouts(), Timeouts(idle_s=0.5)))),
                headers=draw(header_maps),
                query=draw(header_maps),
                stream_usage=draw(st.booleans()),
                responses=draw(st.booleans()),
                breaker=draw(breakers),
                price=draw(prices),
                health=draw(st.sampled_from((Health(), Health(path="/health?a=b", interval_s=1.5)))),
                tags=tuple(draw(st.lists(texts, max_size=2))),
                models=tuple(draw(st.lists(texts, max_size=2))),
            )
        )
    tier = draw(st.integers(0, 9))
    service_limits = draw(limits)
    pairs = st.tuples(st.sampled_from([p.uuid for p in providers] or [""]), names)

    def a_list_of_services() -> tuple[Service, ...]:
        drawn = draw(st.lists(pairs, unique=True, max_size=3)) if providers else []
        return tuple(
            Service(
                provider=provider,
                model=model,
                weight=draw(st.integers(0, 10**6)),
                active=draw(st.booleans()),
                time_window=draw(st.integers(1, 10**6)),
                tier=tier,
                limits=service_limits,
            )
            for provider, model in drawn
        )

    rules: list[Rule] = []
    for name in draw(st.lists(names, unique=True, max_size=3)):
        offered = a_list_of_services()
        words = st.text(min_size=1, max_size=5).filter(lambda text: text.isprintable())
        ops = st.one_of(
            st.builds(
                SmartOp, position=st.just("user"), operation=st.sampled_from(("contains", "any_contains")), value=words
            ),
            st.builds(SmartOp, position=st.just("token"), operation=st.just("ge"), value=st.integers(0, 9).map(str)),
        )
        scenario: ScenarioName = draw(st.sampled_from(("openai", "anthropic", "claude_code", "opencode")))
        # Only rules that stand before it: so nothing leads back.
        others = [rule.uuid for rule in rules if rule.active and rule.scenario == scenario]
        routes = tuple(
            SmartRoute(uuid=draw(st.sampled_from(("", "u"))), ops=(draw(ops),), services=served)
            for _ in range(draw(st.integers(0, 1)))
            if (served := a_list_of_services())
        )
        rules.append(
            Rule(
                uuid=name,
                scenario=scenario,
                request_model=name,
                response_model=draw(st.sampled_from(("", "other"))),
                description=draw(texts),
                active=draw(st.booleans()),
                pool=draw(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,5}", fullmatch=True)),
                lb_tactic=draw(tactics),
                services=offered,
                current_service_index=draw(st.sampled_from((None, *range(len(offered))))),
                smart_enabled=bool(routes) and draw(st.booleans()),
                smart_routing=routes,
                session_affinity=(affinity := draw(st.integers(0, 30 * 86400))),
                session_header=draw(st.sampled_from(("", "x-session") if affinity else ("",))),
                on_exhausted=draw(st.sampled_from(("try", "refuse"))),
                queue_timeout_ms=draw(st.integers(0, 600_000)),
                retry=draw(retries),
                fallback=tuple(draw(st.permutations(others))),
                on_context_overflow=draw(st.sampled_from(("", *others))),
                strict_settle=draw(st.booleans()),
            )
        )
    pools = sorted({rule.pool for rule in rules})
    split = {pool: 1 / len(pools) for pool in pools} if len(pools) > 1 else {}
    providers = [
        msgspec.structs.replace(p, limits=msgspec.structs.replace(draw(limits), split=split)) for p in providers
    ]
    scenarios: list[ScenarioName] = draw(st.lists(st.sampled_from(("openai", "anthropic")), unique=True))
    flags = st.sampled_from((ScenarioFlags(), ScenarioFlags(unified=True)))
    return Configuration(
        providers=tuple(providers),
        rules=tuple(rules),
        scenarios=tuple(ScenarioConfig(scenario=name, flags=draw(flags)) for name in scenarios),
    )


def shuffled(value: Any) -> Any:
    """The same with every mapping's keys the other way round."""
    if isinstance(value, dict):
        return {key: shuffled(value[key]) for key in reversed(value)}
    return [shuffled(item) for item in value] if isinstance(value, list | tuple) else value


def as_file(configuration: Configuration) -> Any:
    """What is written, by way of JSON: lists instead of tuples."""
    return msgspec.json.decode(msgspec.json.encode(write(configuration)))


@settings(max_examples=40)
@given(configuration=configurations(), through=st.sampled_from(("strict", "lenient", "stored")))
def test_what_is_written_is_read_again_through_every_door(configuration: Configuration, through: Any) -> None:
    reading = read(as_file(configuration), door=through)

    assert (reading.configuration, reading.warnings) == (configuration, ())


@settings(max_examples=40)
@given(configurations())
def test_what_is_written_as_yaml_is_read_again(configuration: Configuration) -> None:
    text = yaml.safe_dump(as_file(configuration), sort_keys=False, allow_unicode=True)

    assert strict(parse(text)) == configuration


@settings(max_examples=40)
@given(configurations())
def test_the_order_of_keys_changes_no_digest_and_is_no_difference(configuration: Configuration) -> None:
    one, other = strict(as_file(configuration)), strict(shuffled(as_file(configuration)))

    assert digest(one) == digest(other)
    assert diff(one, other) == []


def edits(configuration: Configuration) -> Iterator[Configuration]:
    """The configuration with one thing changed; where that is not there, unchanged."""
    changes: dict[str, list[Any]] = {
        "providers": [
            {"token": "changed"},
            {"headers": {"changed": "x"}},
            {"tags": ("changed",)},
            {"enabled": False},
            {"timeout": 7.5},
            {"oauth_detail": None},
            {"limits": Limits(rpm=7, split={"default": 0.5})},
            {"breaker": BreakerSettings(open_s=7.5)},
            {"price": Price(input=7.5)},
            {"health": Health(path="/changed", interval_s=7.5)},
        ],
        "rules": [
            {"description": "changed"},
            {"active": False},
            {"lb_tactic": RoundRobin(request_threshold=2**52 + 1)},
            {"services": ()},
            {"current_service_index": None},
            {"smart_routing": ()},
            {"strict_settle": True},
            {"session_affinity": 7},
            {"session_header": "x-changed"},
            {"on_exhausted": "refuse"},
            {"queue_timeout_ms": 7},
            {"retry": Retry(attempts=7)},
            {"fallback": ()},
            {"fallback": ("changed", "other")},
            {"on_context_overflow": "changed"},
        ],
        "scenarios": [{"flags": ScenarioFlags(unified=True)}, {"flags": ScenarioFlags()}],
    }
    for name, variants in changes.items():
        items = getattr(configuration, name)
        for new in (items[1:], items[:-1], items[::-1]):
            yield msgspec.structs.replace(configuration, **{name: new})
        for change in variants if items else ():
            new = (msgspec.structs.replace(items[0], **change), *items[1:])
            yield msgspec.structs.replace(configuration, **{name: new})


@settings(max_examples=40)
@given(configurations())
def test_two_configurations_have_one_digest_exactly_when_nothing_differs(one: Configuration) -> None:
    for other in edits(one):
        is_same = one == other

        assert (digest(one) == digest(other), diff(one, other) == [], diff(other, one) == []) == (is_same,) * 3


@pytest.mark.parametrize(
    ("place", "part"),
    [
        ("provider", {"uuid": "a", "enabled": True, "headers": {}, "tags": [], "oauth_detail": None, "token": ""}),
        ("provider", {"timeout": 1800}),
        ("provider", {"timeouts": {"connect_s": 10, "headers_s": 120, "first_byte_s": 120, "idle_s": 120}}),
        ("provider", {"limits": {"rpm": 0}}),
        ("provider", {"price": {"input": 0, "output": 0, "cached": 0}}),
        ("provider", {"health": {"path": "", "interval_s": 0}}),
        ("rule", {"uuid": "openai/chat", "scenario": "openai", "active": True, "pool": "default", "fallback": []}),
        ("rule", {"lb_tactic": {"type": "round_robin", "params": {"request_threshold": 10, "reserve": "input"}}}),
        ("service", {"weight": 1, "active": True, "time_window": 300, "tier": 0, "limits": {}}),
    ],
)
def test_a_default_that_is_written_out_is_no_difference(place: str, part: dict[str, Any]) -> None:
    """Equal to what stands, nothing happens: no new revision for a file that says the same in more words."""
    short, long = strict(a_document()), strict(with_part(place, part))

    assert diff(short, long) == []
    assert digest(short) == digest(long)


def test_a_configuration_built_from_structs_has_the_digest_of_the_same_file() -> None:
    built = a_configuration(a_rule("chat", ("a:m",)))
    loaded = strict(as_file(built))

    assert loaded == built
    assert diff(built, loaded) == []
    assert digest(built) == digest(loaded)


def test_what_a_newer_version_stored_is_read_without_what_is_unknown_here() -> None:
    raw = a_document(provider={"new": 1}, rule={"new": 1}, service={"new": 1}, new=1)

    assert read(raw, door="stored") == read(a_document(), door="stored")


# -- differences -------------------------------------------------------------------------------------------------------


def test_differences_name_what_came_what_went_and_what_changed() -> None:
    old = a_configuration(a_rule("kept", ("a:m",)), a_rule("gone", ("a:m",)), a_rule("tuned", ("a:m",)))
    new = a_configuration(
        a_rule("kept", ("a:m",)),
        a_rule("tuned", ("a:m",), lb_tactic=RoundRobin(request_threshold=7), description="x"),
        a_rule("new", ("b:m",)),
    )

    assert diff(old, new) == [
        "+ provider b",
        "- rule gone",
        "+ rule new",
        '~ rule tuned: description (default) -> "x"',
        "~ rule tuned: lb_tactic.params.request_threshold 10 -> 7",
    ]


def test_differences_come_in_the_order_of_the_document() -> None:
    names_ = [f"rule {i}" for i in range(20)]
    old, new = (a_configuration(*(a_rule(name, description=text) for name in names_)) for text in ("x", "y"))

    assert diff(old, new) == [f'~ rule {name}: description "x" -> "y"' for name in names_]


def test_another_order_of_rules_is_a_difference() -> None:
    """The first of two rules with the same scenario and model wins."""
    one, two = a_rule("one"), a_rule("two")

    assert diff(a_configuration(one, two), a_configuration(two, one)) == ["~ rules: another order"]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({}, {"token": "SECRET-1"}),
        ({"token": "SECRET-1"}, {"token": "SECRET-2"}),
        ({"token": "SECRET-1"}, {}),
        ({"token": "${KEY}"}, {"token": "SECRET-1"}),
        ({}, {"proxy_url": "http://u:SECRET-1@p.invalid"}),
        ({"proxy_url": "http://u:SECRET-1@p.invalid"}, {"proxy_url": "http://u:SECRET-2@p.invalid"}),
        ({}, {"oauth_detail": OAuthDetail(access_token="SECRET-1", refresh_token="SECRET-2")}),
        ({"oauth_detail": OAuthDetail()}, {"oauth_detail": OAuthDetail(access_token="SECRET-1")}),
        ({"oauth_detail": OAuthDetail(access_token="SECRET-1")}, {}),
        (
            {"oauth_detail": OAuthDetail(extra_fields={"client_secret": "SECRET-1"})},
            {"oauth_detail": OAuthDetail(extra_fields={"client_secret": "SECRET-2"})},
        ),
        ({}, {"headers": {"x-api-key": "SECRET-1"}}),
        ({"headers": {"x-api-key": "SECRET-1"}}, {"headers": {"x-api-key": "SECRET-2"}}),
        ({"headers": {"x-api-key": "SECRET-1"}}, {}),
        ({}, {"query": {"key": "SECRET-1"}}),
        ({"query": {"key": "SECRET-1"}}, {"query": {"key": "SECRET-2"}}),
        ({"query": {"key": "SECRET-1"}}, {"query": {}}),
    ],
)
def test_differences_never_show_a_credential(old: dict[str, Any], new: dict[str, Any]) -> None:
    one, other = (Configuration(providers=(a_provider(**more),)) for more in (old, new))

    lines = diff(one, other)

    assert lines
    assert all(line.startswith("~ provider a: ") for line in lines)
    assert "SECRET" not in "\n".join(lines)


# -- masking -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more",
    [
        {"token": "SECRET"},
        {"token": "sealed:v1:SECRET"},
        {"oauth_detail": OAuthDetail(access_token="SECRET", refresh_token="SECRET")},
        {"oauth_detail": OAuthDetail(extra_fields={"client_secret": "SECRET"})},
        {"proxy_url": "http://u:SECRET@p.invalid"},
        {"proxy_url": "sealed:v1:SECRET"},
        {"headers": {"authorization": "sealed:v1:SECRET"}},
        {"headers": {"authorization": "Bearer SECRET"}},
        {"query": {"key": "sealed:v1:SECRET"}},
        {"query": {"key": "SECRET"}},
    ],
)
def test_masked_never_shows_a_credential(more: dict[str, Any]) -> None:
    shown = masked(Configuration(providers=(a_provider(**more),)))

    assert b"SECRET" not in msgspec.json.encode(write(shown))


def test_masking_shows_where_references_point_and_touches_nothing_else() -> None:
    rule = a_rule("chat", ("a:m",))
    more: dict[str, Any] = {
        "token": "${file:/run/secrets/a}",
        "oauth_detail": OAuthDetail(access_token="${A}", user_id="u", expires_at="2026-12-01T00:00:00Z"),
        "proxy_url": "http://p.invalid:1",
        "headers": {"x-team": "eu"},
        "tags": ("eu",),
    }
    configuration = a_configuration(rule, providers=(a_provider(**more), a_provider("b")))

    assert masked(configuration) == configuration


# -- what select reads -------------------------------------------------------------------------------------------------

RULE = a_rule("chat", ("a:m", "b:m"))
OTHER = a_rule("other", ("c:m",))


def view(rule: Rule = RULE, *others: Rule, **provider: Any) -> bytes:
    """What the rule's select reads, with its first provider changed."""
    providers = (a_provider("a", **provider), a_provider("b"), a_provider("c"))
    return select_view(Configuration(providers=providers, rules=(rule, *others)), rule)


def changed(**changes: Any) -> Rule:
    return msgspec.structs.replace(RULE, **changes)


@pytest.mark.parametrize(
    "other",
    [
        view(changed(pool="eu")),
        view(changed(active=False)),
        view(changed(lb_tactic=RoundRobin(request_threshold=11))),
        view(changed(lb_tactic=Random())),
        view(changed(current_service_index=0)),
        view(changed(current_service_index=1)),
        view(changed(services=RULE.services[:1])),
        view(changed(services=RULE.services[::-1])),
        view(changed(services=(*RULE.services, a_service("c:m")))),
        view(changed(services=(a_service("a:m", active=False), a_service("b:m")))),
        view(changed(services=(a_service("a:m", weight=2), a_service("b:m")))),
        view(changed(services=(a_service("a:m", time_window=301), a_service("b:m")))),
        view(changed(services=(a_service("a:m", tier=1), a_service("b:m")))),
        view(changed(services=(a_service("a:m", limits=Limits(rpm=1)), a_service("b:m")))),
        view(changed(services=(a_service("a:m", limits=Limits(tpm=1)), a_service("b:m")))),
        view(changed(services=(a_service("a:m", limits=Limits(in_flight=1)), a_service("b:m")))),
        view(changed(on_exhausted="refuse")),
        view(changed(retry=Retry(budget_ratio=0.3))),
        view(changed(retry=Retry(budget_ratio=0))),
        view(changed(retry=Retry(attempts=1))),
        view(enabled=False),
        view(limits=Limits(rpm=1)),
        view(limits=Limits(tpm=1)),
        view(limits=Limits(in_flight=1)),
        view(breaker=BreakerSettings(failures=4)),
        view(breaker=BreakerSettings(ratio=0.4)),
        view(breaker=BreakerSettings(min_requests=4)),
        view(breaker=BreakerSettings(window_s=4)),
        view(breaker=BreakerSettings(open_s=4)),
        view(breaker=BreakerSettings(successes=4)),
        view(price=Price(input=1)),
        view(price=Price(output=1)),
    ],
)
def test_what_select_reads_changes_with_the_rule_its_services_and_their_providers(other: bytes) -> None:
    assert other != view()


@pytest.mark.parametrize(
    "same",
    [
        view(changed(description="x")),
        view(changed(response_model="x")),
        view(token="other", headers={"x": "y"}, timeout=5.0, tags=("eu",), name="renamed"),
        view(timeouts=Timeouts(idle_s=5), health=Health(path="/health", interval_s=5), price=Price(cached=1)),
        view(changed(session_affinity=60, session_header="x-session")),
        view(changed(queue_timeout_ms=5)),
        view(changed(retry=Retry(attempts=4, backoff_ms=5))),
        view(changed(fallback=("other",))),
        view(changed(on_context_overflow="other")),
        view(changed(on_store_loss="local")),
        view(changed(on_store_loss="closed")),
        view(changed(strict_settle=True)),
        view(RULE, OTHER),
        view(RULE, msgspec.structs.replace(OTHER, active=False)),
    ],
)
def test_what_select_reads_does_not_change_with_what_it_never_looks_at(same: bytes) -> None:
    """A rule whose value for select is the same keeps its revision."""
    assert same == view()


def with_limits(split: dict[str, float]) -> bytes:
    return view(limits=Limits(rpm=100, split=split))


def test_what_select_reads_of_a_split_is_the_share_of_the_rule_s_own_pool() -> None:
    assert with_limits({"default": 0.5}) != with_limits({})
    assert with_limits({"default": 0.5}) != with_limits({"default": 0.4})
    assert with_limits({"default": 0.5}) != with_limits({"eu": 0.5})
    assert with_limits({"default": 0.5, "eu": 0.5}) == with_limits({"eu": 0.4, "default": 0.5})


def test_what_a_rule_s_select_reads_changes_with_each_of_its_providers() -> None:
    for uuid in ("a", "b"):
        others = [a_provider(each) for each in ("a", "b", "c") if each != uuid]
        providers = (*others, a_provider(uuid, breaker=BreakerSettings(failures=9)))
        assert select_view(Configuration(providers=providers, rules=(RULE,)), RULE) != view()


def test_the_order_of_providers_is_nothing_that_select_reads() -> None:
    providers = tuple(a_provider(uuid) for uuid in ("c", "b", "a"))

    assert select_view(Configuration(providers=providers, rules=(RULE,)), RULE) == view()


def test_a_provider_that_the_rule_does_not_use_changes_nothing_that_its_select_reads() -> None:
    unused = (a_provider("a"), a_provider("b"), a_provider("c", enabled=False))

    assert select_view(Configuration(providers=unused, rules=(RULE,)), RULE) == view()
