"""The gauges that every worker tells alike: out of pictures of pools, and of the configuration."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from balancer.domain import (
    Configuration,
    Limits,
    Price,
    Provider,
    Rule,
    RuleDefinition,
    Service,
    SmartOp,
    SmartRoute,
)
from balancer.gauges import Configured, Gauges, configured, expected_shares, pooled
from balancer.metrics import Metrics
from balancer.steps import finished
from balancer.store import keys
from balancer.store.calls import Definer
from balancer.store.views import MinuteView, PartitionView, PoolView, ProviderView, ServiceView, WindowView
from balancer.tactics import tactic_from_map
from tests.builders import a_configuration, a_rule
from tests.pure.test_metrics import FLEET, Sample, named, sample, samples

_NOW_MS = 1_000_000


def a_view(pool: str = "default", **more: Any) -> PoolView:
    options: dict[str, Any] = {"services": {}, "partitions": {}} | more
    return PoolView(pool=pool, now_ms=_NOW_MS, epoch=3, position=9, rules={}, **options)


def a_window(length_s: int, age_ms: int) -> WindowView:
    return WindowView(length_s=length_s, start_ms=_NOW_MS - age_ms, requests=3, tokens=40)


def known_of(configuration: Configuration) -> Configured:
    """What the configuration alone tells."""
    definer = Definer(configuration)

    def define(rule: Rule) -> RuleDefinition:
        return definer.definition(rule, 1)

    return finished(configured(configuration, define))


def told(*gauges: Gauges) -> dict[Sample, float]:
    """What of the fleet a scrape says."""
    names = {name for lines in gauges for name in lines}
    return named(samples(Metrics().exposition(*gauges)), *names)


def told_of(view: PoolView, configuration: Configuration, workers: int = 1) -> dict[Sample, float]:
    """The pool's part of that."""
    return told(finished(pooled([view], {view.pool: workers}, configuration, known_of(configuration))))


# -- pools -------------------------------------------------------------------------------------------------------------


def test_gauges_come_from_the_pools_picture_and_an_ended_window_shows_zeros() -> None:
    windows = (a_window(5, age_ms=4999), a_window(6, age_ms=6000))
    state = ServiceView(in_flight=1, reserved=9, windows=windows, cooldown=_NOW_MS + 1500)
    view = a_view(
        services={"a:m": state},
        partitions={keys.partition("chat"): PartitionView(tactic="round_robin", cursor="b:m", streak=2)},
    )

    place = {"pool": "default", "service": "a:m"}
    assert told_of(view, a_configuration(a_rule("chat", ("a:m", "b:m"))), workers=4) == {
        sample("balancer_in_flight_requests", **place): 1,
        sample("balancer_reserved_tokens", **place): 9,
        sample("balancer_window_requests", window="5", **place): 3,
        sample("balancer_window_tokens", window="5", **place): 40,
        sample("balancer_window_requests", window="6", **place): 0,
        sample("balancer_window_tokens", window="6", **place): 0,
        sample("balancer_breaker_state", **place): 0,
        sample("balancer_cooldown_seconds", **place): 1.5,
        sample("balancer_current_service_index", pool="default", rule="chat"): 1,
        sample("balancer_streak", pool="default", rule="chat"): 2,
        sample("balancer_epoch", pool="default"): 3,
        sample("balancer_live_workers", pool="default"): 4,
    }


@pytest.mark.parametrize(
    "configuration",
    [
        Configuration(),
        a_configuration(a_rule("chat", ("gone:m",), pool="eu")),
    ],
)
def test_what_is_not_configured_in_the_pool_has_no_labels(configuration: Configuration) -> None:
    """State outlives the configuration that made it; its names must not stay in the metrics."""
    view = a_view(
        services={"gone:m": ServiceView(in_flight=1)},
        partitions={keys.partition("chat"): PartitionView(cursor="gone:m")},
    )

    assert told_of(view, configuration) == {}


def test_a_pool_that_nobody_knows_of_has_no_gauges_rather_than_zeros() -> None:
    configuration = a_configuration(a_rule("chat", ("a:m",)), a_rule("eu", ("a:m",), pool="eu"))
    known = known_of(configuration)
    view = a_view("eu", services={"a:m": ServiceView()})
    gauges = finished(pooled([view], {"eu": 1}, configuration, known))

    values = samples(Metrics().exposition(known.lines, gauges))

    assert {dict(labels)["pool"] for _, labels in named(values, *FLEET)} == {"eu"}
    assert named(samples(Metrics().exposition(known.lines)), *FLEET) == {}


def test_a_scrape_leaves_nothing_behind_for_the_next() -> None:
    metrics, configuration = Metrics(), a_configuration(a_rule("chat", ("a:m",)))
    view = a_view(services={"a:m": ServiceView()})
    metrics.exposition(finished(pooled([view], {"default": 1}, configuration, known_of(configuration))))

    assert named(samples(metrics.exposition()), *FLEET) == {}


def test_a_scrape_of_many_services_is_written_in_steps() -> None:
    """Ten thousand rules held every request of the worker up for a second, at each scrape."""
    services = [f"a:m{i}" for i in range(500)]
    view = a_view(services=dict.fromkeys(services, ServiceView(windows=(a_window(300, age_ms=1),))))
    configuration = a_configuration(*(a_rule(f"r{i}", (service,)) for i, service in enumerate(services)))
    known = known_of(configuration)
    assert sum(1 for _ in pooled([view], {}, configuration, known)) > len(services)
    definer = Definer(configuration)
    assert sum(1 for _ in configured(configuration, lambda rule: definer.definition(rule, 1))) >= len(services)
    gauges = finished(pooled([view], {}, configuration, known))
    assert len(named(told(gauges), "balancer_window_tokens")) == len(services)


def test_labels_are_escaped_as_the_library_would() -> None:
    awkward = 'a:"m"\\n\n[]'
    rule = a_rule("chat", (awkward,))
    view = a_view(services={awkward: ServiceView(in_flight=1)})
    values = told_of(view, a_configuration(rule))
    assert named(values, "balancer_in_flight_requests") == {
        sample("balancer_in_flight_requests", pool="default", service=awkward): 1
    }


# -- limits and prices -------------------------------------------------------------------------------------------------


def a_limited() -> Configuration:
    """Two services of one provider, which has limits, in two pools; one has limits of its own."""
    services = (
        Service(provider="a", model="m", limits=Limits(rpm=60, in_flight=3)),
        Service(provider="a", model="n"),
    )
    rule = msgspec.structs.replace(a_rule("chat"), services=services)
    tighter = (Service(provider="a", model="m", limits=Limits(rpm=50)),)
    provider = Provider(
        uuid="a",
        name="a",
        api_base="http://127.0.0.1",
        limits=Limits(tpm=1000, split={"default": 0.25, "eu": 0.75}),
        price=Price(input=2.5, output=10),
    )
    return Configuration(
        providers=(provider,),
        rules=(
            rule,
            msgspec.structs.replace(rule, uuid="more", services=tighter),
            msgspec.structs.replace(rule, uuid="eu", pool="eu", services=services[1:]),
        ),
    )


def test_limits_and_prices_are_those_that_are_set() -> None:
    def limit(service: str, kind: str, pool: str = "default") -> Sample:
        return sample("balancer_limit", pool=pool, service=service, kind=kind)

    def price(service: str, kind: str) -> Sample:
        return sample("balancer_token_price", service=service, kind=kind)

    assert named(told(known_of(a_limited()).lines), "balancer_limit", "balancer_token_price") == {
        limit("a:m", "rpm"): 50,
        limit("a:m", "in_flight"): 3,
        limit("a:*", "tpm"): 250,
        limit("a:*", "tpm", "eu"): 750,
        price("a:m", "input"): 2.5,
        price("a:m", "output"): 10,
        price("a:n", "input"): 2.5,
        price("a:n", "output"): 10,
    }


def test_what_is_held_against_a_limit_is_the_minute_with_the_reserved_tokens_or_what_is_in_flight() -> None:
    bucket = _NOW_MS // 5000
    view = a_view(
        services={"a:m": ServiceView(in_flight=2, minute=MinuteView(buckets=((bucket, 7, 70), (bucket - 13, 9, 90))))},
        providers={"a": ProviderView(in_flight=5, reserved=30, minute=MinuteView(buckets=((bucket, 8, 80),)))},
    )

    def used(service: str, kind: str) -> Sample:
        return sample("balancer_limit_used", pool="default", service=service, kind=kind)

    assert named(told_of(view, a_limited()), "balancer_limit_used") == {
        used("a:m", "rpm"): 7,
        used("a:m", "in_flight"): 2,
        used("a:*", "tpm"): 110,
    }


# -- tactics -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tactic", "params", "expected"),
    [
        ("round_robin", {"request_threshold": 7}, {"request_threshold": 7}),
        ("token_based", {"token_threshold": 900}, {"token_threshold": 900}),
        ("hybrid", {}, {"request_threshold": 10, "token_threshold": 10_000}),
        ("random", {}, {}),
    ],
)
def test_a_tactic_tells_the_thresholds_that_it_has(
    tactic: str, params: dict[str, int], expected: dict[str, int]
) -> None:
    rule = msgspec.structs.replace(a_rule("chat", ("a:m",)), lb_tactic=tactic_from_map(tactic, params))
    names = ("balancer_request_threshold", "balancer_token_threshold")
    assert named(told(known_of(a_configuration(rule)).lines), *names) == {
        sample(f"balancer_{name}", pool="default", rule="chat"): value for name, value in expected.items()
    }


def a_share(tactic: str, *services: Service, **more: Any) -> dict[str, float]:
    """The shares of services of enabled providers `a` and `b`, and of `off`, which is not."""
    rule = Rule(
        uuid="chat", request_model="m", lb_tactic=tactic_from_map(tactic), services=services, session_affinity=0, **more
    )
    providers = [
        Provider(uuid=name, name=name, api_base="http://127.0.0.1", enabled=name != "off") for name in ("a", "b", "off")
    ]
    (partition,) = Definer(Configuration(providers=tuple(providers), rules=(rule,))).definition(rule, 1).partitions
    return dict(expected_shares(rule, partition.tactic, partition.services))


def a_service(provider: str = "a", weight: int = 1, tier: int = 0, *, active: bool = True) -> Service:
    return Service(provider=provider, model="m", weight=weight, tier=tier, active=active)


def test_the_share_that_follows_from_the_configuration_is_expected() -> None:
    first, second = a_service("a", weight=3), a_service("b")
    assert a_share("round_robin", first, second) == {"a:m": 0.5, "b:m": 0.5}
    assert a_share("random", first, second) == {"a:m": 0.75, "b:m": 0.25}
    assert a_share("weighted_round_robin", first, second) == {"a:m": 0.75, "b:m": 0.25}


def test_without_weights_shares_are_equal_and_only_the_lowest_tier_is_expected_to_serve() -> None:
    assert a_share("random", a_service("a", weight=0), a_service("b", weight=0)) == {"a:m": 0.5, "b:m": 0.5}
    assert a_share("round_robin", a_service("a", tier=2), a_service("b", tier=1)) == {"a:m": 0, "b:m": 1}


def test_what_cannot_serve_is_not_expected_to() -> None:
    assert a_share("round_robin", a_service("a"), a_service("b", active=False), a_service("off")) == {"a:m": 1}
    assert a_share("round_robin", a_service("a"), active=False) == {}
    assert a_share("round_robin") == {}


def test_where_a_share_follows_from_what_is_used_none_is_expected() -> None:
    for tactic in ("token_based", "hybrid", "least_in_flight", "latency", "cost"):
        assert a_share(tactic, a_service("a"), a_service("b")) == {}
    pinned = msgspec.structs.replace(a_rule("chat", ("a:m",)), session_affinity=60)
    assert "balancer_expected_share" not in known_of(a_configuration(pinned)).lines


def test_of_a_rule_with_entries_no_share_is_expected_and_limits_of_their_services_are_told() -> None:
    """Which part of its requests belongs to an entry, the configuration does not say."""
    only = msgspec.structs.replace(a_service("b"), limits=Limits(rpm=7))
    route = SmartRoute(uuid="long", ops=(SmartOp(position="token", operation="ge", value="9"),), services=(only,))
    rule = msgspec.structs.replace(a_rule("chat", ("a:m",)), smart_routing=(route,))

    assert "balancer_expected_share" in known_of(a_configuration(rule)).lines
    told = known_of(a_configuration(msgspec.structs.replace(rule, smart_enabled=True))).lines
    assert "balancer_expected_share" not in told
    assert told["balancer_limit"] == ['balancer_limit{pool="default",service="b:m",kind="rpm"} 7.0\n']
