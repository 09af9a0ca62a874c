"""Every series: its name, its labels, what it counts, and how workers' counters add up."""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import msgspec
import prometheus_client.values
import pytest
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.parser import text_string_to_metric_families

from balancer import __version__
from balancer.domain import Configuration, Outcome, Pick, Usage
from balancer.metrics import Metrics, PoolGauges, ServiceGauges, pool_gauges
from balancer.steps import finished
from balancer.store import keys
from balancer.store.views import PartitionView, PoolView, ServiceView, WindowView
from balancer.tally import Times
from tests.builders import a_configuration, a_rule

Sample = tuple[str, tuple[tuple[str, str], ...]]

SERIES = {
    "balancer_requests_total": {"scenario", "rule", "outcome"},
    "balancer_attempts_total": {"pool", "rule", "service", "outcome"},
    "balancer_picks_total": {"pool", "rule", "service", "reason"},
    "balancer_switches_total": {"pool", "rule", "reason"},
    "balancer_pinned_switches_saved_total": {"pool", "rule"},
    "balancer_degraded_picks_total": {"pool", "rule"},
    "balancer_tokens_total": {"pool", "rule", "service", "kind"},
    "balancer_request_duration_seconds": {"scenario"},
    "balancer_upstream_duration_seconds": {"service"},
    "balancer_time_to_first_token_seconds": {"service"},
    "balancer_overhead_seconds": set(),
    "balancer_select_seconds": {"pool"},
    "balancer_in_flight_requests": {"pool", "service"},
    "balancer_reserved_tokens": {"pool", "service"},
    "balancer_window_requests": {"pool", "service", "window"},
    "balancer_window_tokens": {"pool", "service", "window"},
    "balancer_breaker_state": {"pool", "service"},
    "balancer_cooldown_seconds": {"pool", "service"},
    "balancer_current_service_index": {"pool", "rule"},
    "balancer_store_up": {"pool"},
    "balancer_stale_picks_total": {"pool"},
    "balancer_leases_expired_total": {"pool"},
    "balancer_settle_batches_lost_total": {"pool"},
    "balancer_invariant_violations_total": {"pool"},
    "balancer_outbox_entries": {"pool"},
    "balancer_epoch_bumps_total": {"pool"},
    "balancer_config_revision": set(),
    "balancer_build_info": {"version"},
}
FLEET = (
    "balancer_in_flight_requests",
    "balancer_reserved_tokens",
    "balancer_window_requests",
    "balancer_window_tokens",
    "balancer_breaker_state",
    "balancer_cooldown_seconds",
    "balancer_current_service_index",
)


def families(exposition: bytes) -> Iterable[Metric]:
    """What Prometheus would read, without the times at which the library made its own series."""
    found = text_string_to_metric_families(exposition.decode())
    return (family for family in found if not family.name.endswith("_created"))


def samples(exposition: bytes) -> dict[Sample, float]:
    """Every value by its name and labels."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families(exposition)
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


def named(values: dict[Sample, float], *names: str) -> dict[Sample, float]:
    """Those of some names."""
    return {sample: value for sample, value in values.items() if sample[0] in names}


def sample(name: str, **labels: str) -> Sample:
    return name, tuple(sorted(labels.items()))


def a_pick(service: str = "a:m", *, is_switch: bool = False, reason: str = "streak", **more: bool) -> Pick:
    return Pick(
        pool="default",
        rule="chat",
        partition="chat",
        revision=1,
        number=1,
        service=service,
        reason=reason,
        seq=1,
        epoch=1,
        position=1,
        streak=1,
        is_switch=is_switch,
        reserved=0,
        **more,
    )


def a_pool(pool: str = "default") -> PoolGauges:
    return PoolGauges(
        pool=pool,
        services={
            "a:m": ServiceGauges(in_flight=2, reserved=70, breaker=2, cooldown_s=1.5, windows=((5, 1, 10), (300, 3, 0)))
        },
        cursors={"chat": 1},
    )


def test_every_series_has_the_name_and_labels_of_the_contract() -> None:
    metrics = Metrics()
    metrics.request("openai", "chat", Outcome.SUCCESS, 1)
    metrics.picked(a_pick(is_switch=True, is_saved=True, is_local=True))
    metrics.settled(a_pick(), Outcome.SUCCESS, Usage(input=1), 1)
    for counter in (
        metrics.stale_picks,
        metrics.leases_expired,
        metrics.batches_lost,
        metrics.epoch_bumps,
        metrics.violations,
    ):
        counter.labels("default").inc()
    metrics.first_token_s("a:m", 1)
    metrics.select_s("default", 0.001)
    metrics.overhead_s(0.001)
    metrics.outbox.labels("default").set(1)

    found = {}
    for family in families(metrics.exposition([a_pool()], {"default": True})):
        name = f"{family.name}_total" if family.type == "counter" else family.name
        found[name] = {label for each in family.samples for label in each.labels} - {"le"}

    assert found == SERIES


def test_every_series_says_what_it_is() -> None:
    assert all(family.documentation for family in families(Metrics().exposition([], {})))


def test_a_pick_is_counted_and_a_switch_only_when_it_is_one() -> None:
    metrics = Metrics()

    metrics.picked(a_pick("a:m"))
    metrics.picked(a_pick("a:m"))
    metrics.picked(a_pick("b:m", is_switch=True, reason="next"))

    picks, switches = "balancer_picks_total", "balancer_switches_total"
    assert named(samples(metrics.exposition([], {})), picks, switches) == {
        sample(picks, pool="default", rule="chat", service="a:m", reason="streak"): 2,
        sample(picks, pool="default", rule="chat", service="b:m", reason="next"): 1,
        sample(switches, pool="default", rule="chat", reason="next"): 1,
    }


def test_a_settled_attempt_counts_its_outcome_and_each_kind_of_token() -> None:
    metrics = Metrics()

    metrics.settled(a_pick(), Outcome.SUCCESS, Usage(input=5, output=7, cached=11, cache_creation=13, reasoning=17))
    metrics.settled(a_pick(), Outcome.SUCCESS, Usage(input=1))
    metrics.settled(a_pick(), Outcome.FAILED, None)

    attempts, tokens = "balancer_attempts_total", "balancer_tokens_total"
    place = {"pool": "default", "rule": "chat", "service": "a:m"}
    assert named(samples(metrics.exposition([], {})), attempts, tokens) == {
        sample(attempts, outcome="success", **place): 2,
        sample(attempts, outcome="failed", **place): 1,
        sample(tokens, kind="input", **place): 6,
        sample(tokens, kind="output", **place): 7,
        sample(tokens, kind="cached", **place): 11,
        sample(tokens, kind="cache_creation", **place): 13,
        sample(tokens, kind="reasoning", **place): 17,
    }


def test_the_version_is_told() -> None:
    values = samples(Metrics().exposition([], {}))

    assert named(values, "balancer_build_info") == {sample("balancer_build_info", version=__version__): 1}


# -- the fleet's gauges ------------------------------------------------------------------------------------------------


def test_the_fleets_gauges_are_those_of_the_pools_given() -> None:
    values = samples(Metrics().exposition([a_pool()], {"default": True, "eu": False}))

    place = {"pool": "default", "service": "a:m"}
    assert named(values, *FLEET, "balancer_store_up") == {
        sample("balancer_in_flight_requests", **place): 2,
        sample("balancer_reserved_tokens", **place): 70,
        sample("balancer_window_requests", window="5", **place): 1,
        sample("balancer_window_tokens", window="5", **place): 10,
        sample("balancer_window_requests", window="300", **place): 3,
        sample("balancer_window_tokens", window="300", **place): 0,
        sample("balancer_breaker_state", **place): 2,
        sample("balancer_cooldown_seconds", **place): 1.5,
        sample("balancer_current_service_index", pool="default", rule="chat"): 1,
        sample("balancer_store_up", pool="default"): 1,
        sample("balancer_store_up", pool="eu"): 0,
    }


def test_a_pool_that_nobody_knows_of_has_no_gauges_rather_than_zeros() -> None:
    values = samples(Metrics().exposition([a_pool("eu")], {"eu": True, "default": False}))

    assert {dict(labels)["pool"] for _, labels in named(values, *FLEET)} == {"eu"}
    assert named(samples(Metrics().exposition([], {})), *FLEET, "balancer_store_up") == {}


def test_a_scrape_leaves_nothing_behind_for_the_next() -> None:
    metrics = Metrics()
    metrics.exposition([a_pool()], {"default": True})

    assert named(samples(metrics.exposition([], {})), *FLEET, "balancer_store_up") == {}


def a_view(**more: object) -> PoolView:
    options: dict[str, object] = {"services": {}, "partitions": {}} | more
    return PoolView(pool="default", now_ms=1_000_000, epoch=1, position=9, rules={}, **options)  # type: ignore[arg-type]


def a_window(length_s: int, age_ms: int) -> WindowView:
    return WindowView(length_s=length_s, start_ms=1_000_000 - age_ms, requests=3, tokens=40)


def test_gauges_come_from_the_pools_picture_and_an_ended_window_shows_zeros() -> None:
    windows = (a_window(5, age_ms=4999), a_window(6, age_ms=6000))
    view = a_view(
        services={"a:m": ServiceView(in_flight=1, reserved=9, windows=windows)},
        partitions={keys.partition("chat"): PartitionView(tactic="round_robin", cursor="b:m", streak=2)},
    )

    assert finished(pool_gauges([view], a_configuration(a_rule("chat", ("a:m", "b:m"))))) == [
        PoolGauges(
            pool="default",
            services={"a:m": ServiceGauges(in_flight=1, reserved=9, windows=((5, 3, 40), (6, 0, 0)))},
            cursors={"chat": 1},
        )
    ]


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

    assert finished(pool_gauges([view], configuration)) == [PoolGauges(pool="default", services={}, cursors={})]


def test_a_scrape_of_many_services_is_written_in_steps() -> None:
    """Ten thousand rules held every request of the worker up for a second, at each scrape."""
    services = [f"a:m{i}" for i in range(500)]
    view = a_view(services=dict.fromkeys(services, ServiceView(windows=(a_window(300, age_ms=1),))))
    configuration = a_configuration(*(a_rule(f"r{i}", (service,)) for i, service in enumerate(services)))
    gathering = pool_gauges([view], configuration)
    assert sum(1 for _ in gathering) > len(services)
    gauges = finished(pool_gauges([view], configuration))
    assert sum(1 for _ in Metrics().exposing(gauges, {})) > 2 * len(services)
    values = samples(Metrics().exposition(gauges, {}))
    assert len(named(values, "balancer_window_tokens")) == len(services)


def test_labels_are_escaped_as_the_library_would() -> None:
    awkward = 'a:"m"\\n\n{}'
    pool = PoolGauges(
        pool="default", services={awkward: ServiceGauges(in_flight=1, reserved=0, windows=())}, cursors={awkward: 2}
    )
    values = samples(Metrics().exposition([pool], {}))
    assert named(values, "balancer_in_flight_requests", "balancer_current_service_index") == {
        sample("balancer_in_flight_requests", pool="default", service=awkward): 1,
        sample("balancer_current_service_index", pool="default", rule=awkward): 2,
    }


# -- tallies -----------------------------------------------------------------------------------------------------------


def test_durations_are_counted_as_the_library_would(tmp_path: Path) -> None:
    bounds, place = (0.1, 0.5, 2.0), ("a:m",)
    registry = CollectorRegistry()
    theirs = Histogram("theirs", "One by one.", ["service"], buckets=bounds, registry=registry)
    tally = Times(Histogram("ours", "All at once.", ["service"], buckets=bounds, registry=registry), bounds)
    durations = (0, 0.1, 0.10001, 0.3, 0.5, 1, 2.0, 2.1, 600)

    for rounds in range(1, 3):
        for seconds in durations:
            theirs.labels(*place).observe(seconds)
            tally.observe(place, seconds)
        tally.flush()
        tally.flush()

        values = samples(generate_latest(registry))
        assert values[sample("ours_count", service="a:m")] == rounds * len(durations)
        ours = {(name.removeprefix("ours"), labels): v for (name, labels), v in values.items() if name[:4] == "ours"}
        assert ours == {
            (name.removeprefix("theirs"), labels): pytest.approx(value)
            for (name, labels), value in values.items()
            if name.startswith("theirs")
        }


@pytest.mark.parametrize("seed", range(20))
def test_many_durations_at_once_are_counted_as_one_by_one(seed: int) -> None:
    rng, bounds = random.Random(seed), (0.1, 0.5, 2.0)
    some = [*bounds, 0.0, 3.0, -1.0, *(rng.choice([rng.random(), rng.expovariate(1)]) for _ in range(50))]
    registries = CollectorRegistry(), CollectorRegistry()
    one_by_one, at_once = (
        Times(Histogram("times", "Some.", ["service"], buckets=bounds, registry=registry), bounds)
        for registry in registries
    )
    for _ in range(5):
        place, seconds = (rng.choice("ab"),), rng.choices(some, k=rng.choice([0, 1, 2, 40]))
        at_once.observe_all(place, tuple(seconds))
        for one in seconds:
            one_by_one.observe(place, one)
        if rng.random() < 0.3:
            one_by_one.flush()
            at_once.flush()
    one_by_one.flush()
    at_once.flush()
    theirs, ours = (samples(generate_latest(registry)) for registry in registries)
    assert {key: value for key, value in ours.items() if value} == {
        key: pytest.approx(value) for key, value in theirs.items() if value
    }


def test_a_request_that_went_as_usual_is_counted_as_in_single_steps(tmp_path: Path) -> None:
    rng, at_once, in_steps = random.Random(1), Metrics(), Metrics()
    for _ in range(300):
        pick = msgspec.structs.replace(
            a_pick(rng.choice(["a:m", "b:m"]), is_switch=rng.random() < 0.3, reason=rng.choice(["streak", "switch"])),
            pool=rng.choice(["default", "eu"]),
            rule=rng.choice(["chat", "other"]),
        )
        tokens = {kind: rng.choice([0, rng.randrange(1000)]) for kind in ("input", "output", "cached", "reasoning")}
        usage = rng.choice([None, Usage(), Usage(**tokens), Usage(**tokens, cache_creation=7)])
        scenario, select_s, overhead_s, attempt_s, all_s = (
            rng.choice(["openai", "anthropic"]),
            *(rng.expovariate(1) for _ in range(4)),
        )
        at_once.answered(
            (
                (scenario, pick.pool, pick.rule, pick.service, pick.reason),
                usage.input if usage is not None else 0,
                usage.output if usage is not None else 0,
                pick.is_switch,
                select_s,
                overhead_s,
                attempt_s,
                all_s,
            ),
            usage,
        )
        in_steps.select_s(pick.pool, select_s)
        in_steps.picked(pick)
        in_steps.overhead_s(overhead_s)
        in_steps.settled(pick, Outcome.SUCCESS, usage, attempt_s)
        in_steps.request(scenario, pick.rule, Outcome.SUCCESS, all_s)
    assert samples(at_once.exposition([], {})) == {
        key: pytest.approx(value) for key, value in samples(in_steps.exposition([], {})).items()
    }


async def test_what_a_worker_counts_the_others_know_a_moment_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    monkeypatch.setattr(prometheus_client.values, "ValueClass", prometheus_client.values.ValueClass)
    metrics = Metrics(tmp_path, slot=3)
    total = sample("balancer_attempts_total", pool="default", rule="chat", service="a:m", outcome="success")

    def told() -> float | None:
        registry = CollectorRegistry()
        MultiProcessCollector(registry, str(tmp_path))  # type: ignore[no-untyped-call]
        return samples(generate_latest(registry)).get(total)

    for count in (2, 4):
        for _ in range(2):
            metrics.settled(a_pick(), Outcome.SUCCESS, None)
        assert told() == (count - 2 or None)
        async with asyncio.timeout(10):
            while told() != count:  # noqa: ASYNC110  it is a file that is looked at
                await asyncio.sleep(0.01)
    metrics.settled(a_pick(), Outcome.SUCCESS, None)
    metrics.flush()
    assert told() == 5


# -- several workers ---------------------------------------------------------------------------------------------------

WORKER = """
import sys
from pathlib import Path
from balancer.domain import Outcome
from balancer.metrics import Metrics
folder, slot, stale, observed, outbox, revision = sys.argv[1], *map(int, sys.argv[2:])
metrics = Metrics(Path(folder), slot)
metrics.stale_picks.labels("default").inc(stale)
for _ in range(observed):
    metrics.overhead_s(0.0002)
metrics.outbox.labels("default").set(outbox)
metrics.revision.set(revision)
sys.stdout.buffer.write(metrics.exposition([], {"default": True}))
"""


def run_worker(
    folder: Path, slot: int, *, stale: int, observed: int, outbox: int, revision: int
) -> dict[Sample, float]:
    """What a worker process of that slot tells after it has counted, and then ends."""
    arguments = map(str, (folder, slot, stale, observed, outbox, revision))
    # Without `-W error`: the library leaves the files of its process open to the end.
    done = subprocess.run(
        [sys.executable, "-c", WORKER, *arguments],
        env=os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(folder)},
        cwd=Path(__file__).parents[2],
        check=True,
        capture_output=True,
        timeout=60,
    )
    assert done.stderr == b""
    return samples(done.stdout)


def test_any_worker_tells_the_sum_of_all_and_a_successor_goes_on_counting_in_its_slot(tmp_path: Path) -> None:
    run_worker(tmp_path, 0, stale=2, observed=1, outbox=50, revision=3)
    run_worker(tmp_path, 1, stale=3, observed=1, outbox=6, revision=7)

    values = run_worker(tmp_path, 0, stale=4, observed=2, outbox=1, revision=8)

    told = named(
        values,
        "balancer_stale_picks_total",
        "balancer_overhead_seconds_count",
        "balancer_outbox_entries",
        "balancer_config_revision",
        "balancer_build_info",
        "balancer_store_up",
    )
    assert told == {
        sample("balancer_stale_picks_total", pool="default"): 9,
        sample("balancer_overhead_seconds_count"): 4,
        # A gauge of a worker that is gone is the successor's now; revisions are as old as the oldest worker's.
        sample("balancer_outbox_entries", pool="default"): 7,
        sample("balancer_config_revision"): 7,
        sample("balancer_build_info", version=__version__): 1,
        sample("balancer_store_up", pool="default"): 1,
    }
    assert {file.name.rpartition("_")[2] for file in tmp_path.iterdir()} == {"0.db", "1.db"}
