"""Every series: its name, its labels, what it counts, and how workers' counters add up."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterable
from pathlib import Path

import msgspec
import pytest
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as text_string_to_open_families
from prometheus_client.parser import text_string_to_metric_families

from balancer import __version__
from balancer.cells import Slot
from balancer.domain import Outcome, Pick, Usage
from balancer.exposition import Family, Scrape
from balancer.metrics import FAMILIES, LABELS, Metrics
from balancer.steps import finished
from balancer.tally import Times
from tests.builders import a_rule

Sample = tuple[str, tuple[tuple[str, str], ...]]

SERIES = {
    "balancer_requests_total": {"scenario", "rule", "outcome"},
    "balancer_refused_total": {"scenario", "reason"},
    "balancer_attempts_total": {"pool", "rule", "service", "outcome"},
    "balancer_retries_total": {"pool", "rule"},
    "balancer_translated_total": {"pool", "rule", "client", "upstream"},
    "balancer_routed_total": {"pool", "rule", "entry"},
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
    "balancer_open_requests": set(),
    "balancer_stale_picks_total": {"pool"},
    "balancer_leases_expired_total": {"pool"},
    "balancer_settle_batches_lost_total": {"pool"},
    "balancer_invariant_violations_total": {"pool"},
    "balancer_outbox_entries": {"pool"},
    "balancer_outbox_age_seconds": {"pool"},
    "balancer_store_up": {"pool"},
    "balancer_epoch_bumps_total": {"pool"},
    "balancer_config_revision": set(),
    "balancer_ready_workers": set(),
    "balancer_workers": set(),
    "balancer_build_info": {"version"},
}
FLEET = {
    "balancer_in_flight_requests": {"pool", "service"},
    "balancer_reserved_tokens": {"pool", "service"},
    "balancer_window_requests": {"pool", "service", "window"},
    "balancer_window_tokens": {"pool", "service", "window"},
    "balancer_breaker_state": {"pool", "service"},
    "balancer_cooldown_seconds": {"pool", "service"},
    "balancer_limit_used": {"pool", "service", "kind"},
    "balancer_current_service_index": {"pool", "rule"},
    "balancer_streak": {"pool", "rule"},
    "balancer_epoch": {"pool"},
    "balancer_live_workers": {"pool"},
}
CONFIGURED = {
    "balancer_request_threshold": {"pool", "rule"},
    "balancer_token_threshold": {"pool", "rule"},
    "balancer_expected_share": {"pool", "rule", "service"},
    "balancer_limit": {"pool", "service", "kind"},
    "balancer_token_price": {"service", "kind"},
}


def families(exposition: bytes) -> Iterable[Metric]:
    """What Prometheus would read."""
    return text_string_to_metric_families(exposition.decode())


def samples(exposition: bytes) -> dict[Sample, float]:
    """Every value by its name and labels."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families(exposition)
        for sample in family.samples
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


def an_exercised() -> Metrics:
    """One that has counted something of each."""
    metrics = Metrics()
    metrics.request("openai", "chat", Outcome.SUCCESS, 1, a_pick())
    metrics.refused("openai", "unknown_model")
    metrics.picked(a_pick(is_switch=True, is_saved=True, is_local=True))
    metrics.retried(a_pick())
    metrics.translated(a_pick(), "chat", "messages")
    metrics.routed(a_rule())
    metrics.settled(a_pick(), Outcome.SUCCESS, Usage(input=1), 1)
    metrics.knows("default")
    metrics.first_token_s(a_pick(), 1)
    metrics.select_s("default", 0.001)
    metrics.overhead_s(0.001)
    for level in (metrics.outbox, metrics.outbox_age, metrics.store_up):
        level.set(1, "default")
    metrics.revision.set(1)
    metrics.ready.set(1)
    return metrics


def test_every_series_has_the_name_and_labels_of_the_contract() -> None:
    found = {}
    for family in families(an_exercised().exposition()):
        if family.samples:
            name = f"{family.name}_total" if family.type == "counter" else family.name
            found[name] = {label for each in family.samples for label in each.labels} - {"le"}

    assert found == SERIES
    assert {family.name: set(family.labels) for family in FAMILIES} == SERIES | FLEET | CONFIGURED


def test_every_series_says_what_it_is_and_each_is_there_before_it_has_a_value() -> None:
    told = list(families(Metrics().exposition()))
    assert all(family.documentation for family in told)
    names = [f"{family.name}_total" if family.type == "counter" else family.name for family in told]
    assert names == [family.name for family in FAMILIES]
    assert {label for family in FAMILIES for label in family.labels} == LABELS.keys()


def test_a_pick_is_counted_and_a_switch_only_when_it_is_one() -> None:
    metrics = Metrics()

    metrics.picked(a_pick("a:m"))
    metrics.picked(a_pick("a:m"))
    metrics.picked(a_pick("b:m", is_switch=True, reason="next"))

    picks, switches = "balancer_picks_total", "balancer_switches_total"
    assert named(samples(metrics.exposition()), picks, switches) == {
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
    assert named(samples(metrics.exposition()), attempts, tokens) == {
        sample(attempts, outcome="success", **place): 2,
        sample(attempts, outcome="failed", **place): 1,
        sample(tokens, kind="input", **place): 6,
        sample(tokens, kind="output", **place): 7,
        sample(tokens, kind="cached", **place): 11,
        sample(tokens, kind="cache_creation", **place): 13,
        sample(tokens, kind="reasoning", **place): 17,
    }


def test_the_version_is_told() -> None:
    values = samples(Metrics().exposition())

    assert named(values, "balancer_build_info") == {sample("balancer_build_info", version=__version__): 1}


def test_two_scrapes_at_once_and_series_that_are_new_meanwhile_do_not_mix() -> None:
    metrics = Metrics()
    for i in range(100):
        metrics.refused("openai", str(i))
    first = metrics.exposing([])
    for _ in range(5):
        next(first)
    for i in range(200):
        metrics.refused("openai", str(i))
        metrics.overhead_s(0.5)
    second = samples(metrics.exposition())
    assert len(named(second, "balancer_refused_total")) == 200
    assert set(named(samples(finished(first)), "balancer_refused_total").values()) == {1}


# -- tallies -----------------------------------------------------------------------------------------------------------


def theirs(bounds: tuple[float, ...], observed: Iterable[tuple[str, float]]) -> dict[Sample, float]:
    """What Prometheus' own library makes of durations of services."""
    registry = CollectorRegistry()
    histogram = Histogram("times", "One by one.", ["service"], buckets=bounds, registry=registry)
    for service, seconds in observed:
        histogram.labels(service).observe(seconds)
    found = samples(generate_latest(registry))
    return {key: value for key, value in found.items() if not key[0].endswith("_created")}


def ours(bounds: tuple[float, ...], slot: Slot) -> dict[Sample, float]:
    """What a slot says of them."""
    family = Family(
        name="times",
        type="histogram",
        labels=("service",),
        help="One by one.",
        unit="seconds",
        source="counted",
        across="sum",
        buckets=bounds,
    )
    return samples(finished(Scrape([family], slot, None).written([], is_open=False)))


def test_durations_are_counted_as_the_library_would() -> None:
    bounds, slot = (0.1, 0.5, 2.0), Slot()
    tally = Times(slot, "times", bounds)
    durations = (0, 0.1, 0.10001, 0.3, 0.5, 1, 2.0, 2.1, 600)
    for rounds in range(1, 3):
        for seconds in durations:
            tally.observe(("a:m",), seconds)
        tally.flush()
        tally.flush()
        expected = theirs(bounds, [("a:m", seconds) for seconds in durations * rounds])
        assert ours(bounds, slot) == {key: pytest.approx(value) for key, value in expected.items()}


@pytest.mark.parametrize("seed", range(20))
def test_many_durations_at_once_are_counted_as_one_by_one(seed: int) -> None:
    rng, bounds, slot = random.Random(seed), (0.1, 0.5, 2.0), Slot()
    some = [*bounds, 0.0, 3.0, *(rng.choice([rng.random(), rng.expovariate(1)]) for _ in range(50))]
    tally, observed = Times(slot, "times", bounds), []
    for _ in range(5):
        place, seconds = rng.choice("ab"), rng.choices(some, k=rng.choice([1, 2, 40]))
        tally.observe_all((place,), tuple(seconds))
        observed += [(place, one) for one in seconds]
        if rng.random() < 0.3:
            tally.flush()
    tally.flush()
    assert ours(bounds, slot) == {key: pytest.approx(value) for key, value in theirs(bounds, observed).items()}


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
                pick,
                "",
            ),
            usage,
        )
        in_steps.select_s(pick.pool, select_s)
        in_steps.picked(pick)
        in_steps.overhead_s(overhead_s)
        in_steps.settled(pick, Outcome.SUCCESS, usage, attempt_s)
        in_steps.request(scenario, pick.rule, Outcome.SUCCESS, all_s)
    assert samples(at_once.exposition()) == {
        key: pytest.approx(value) for key, value in samples(in_steps.exposition()).items()
    }


async def test_what_a_worker_counts_the_others_know_a_moment_later(tmp_path: Path) -> None:
    counting, other = Metrics(tmp_path, slot=3), Metrics(tmp_path, slot=4)
    total = sample("balancer_attempts_total", pool="default", rule="chat", service="a:m", outcome="success")

    def told() -> float | None:
        return samples(other.exposition()).get(total)

    for count in (2, 4):
        for _ in range(2):
            counting.settled(a_pick(), Outcome.SUCCESS, None)
        assert told() == (count - 2 or None)
        async with asyncio.timeout(10):
            while told() != count:  # noqa: ASYNC110  it is a file that is looked at
                await asyncio.sleep(0.01)
    counting.settled(a_pick(), Outcome.SUCCESS, None)
    counting.close()
    assert told() == 5
    other.close()


# -- exemplars ---------------------------------------------------------------------------------------------------------


def exemplars(metrics: Metrics, name: str) -> dict[str, tuple[str, str, float]]:
    """Of a series the decision, the trace and the value of each exemplar, by its bucket, empty for a counter."""
    read: Iterable[Metric] = text_string_to_open_families(  # type: ignore[no-untyped-call]
        metrics.exposition(is_open=True).decode()
    )
    return {
        sample.labels.get("le", ""): (
            sample.exemplar.labels["decision"],
            sample.exemplar.labels.get("trace_id", ""),
            sample.exemplar.value,
        )
        for family in read
        for sample in family.samples
        if sample.exemplar and sample.name.startswith(name)
    }


def a_pick_at(position: int, **more: bool) -> Pick:
    return msgspec.structs.replace(a_pick(), position=position, **more)


def test_an_exemplar_has_the_decision_and_its_trace_if_it_has_one() -> None:
    metrics = Metrics()
    metrics.settled(a_pick_at(1), Outcome.SUCCESS, None, 0.3)
    metrics.settled(a_pick_at(2), Outcome.SUCCESS, None, 0.7, "f" * 32)
    assert exemplars(metrics, "balancer_upstream_duration_seconds") == {
        "0.5": ("default.1.1", "", 0.3),
        "1.0": ("default.1.2", "f" * 32, 0.7),
    }
    assert exemplars(metrics, "balancer_attempts_total") == {"": ("default.1.2", "f" * 32, 1)}


def test_of_requests_that_went_as_usual_at_the_same_moment_the_slowest_is_one() -> None:
    metrics = Metrics()
    labels = ("openai", "default", "chat", "a:m", "streak")
    for position, seconds in ((1, 0.3), (2, 0.45), (3, 0.4)):
        metrics.passed.append((labels, 1, 1, False, 0.001, 0.001, seconds, seconds + 1, a_pick_at(position), ""))
    assert exemplars(metrics, "balancer_upstream_duration_seconds") == {"0.5": ("default.1.2", "", 0.45)}
    assert exemplars(metrics, "balancer_request_duration_seconds") == {"2.5": ("default.1.2", "", 1.45)}


def test_a_pick_without_redis_is_no_exemplar() -> None:
    metrics, pick = Metrics(), a_pick_at(0, is_local=True)
    metrics.settled(pick, Outcome.SUCCESS, None, 0.3)
    metrics.first_token_s(pick, 0.3)
    metrics.request("openai", "chat", Outcome.SUCCESS, 0.3, pick)
    assert exemplars(metrics, "balancer_") == {}


def test_of_the_exemplars_of_several_workers_the_latest_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workers = [Metrics(tmp_path, slot) for slot in range(3)]
    for position, worker in ((1, workers[1]), (3, workers[0]), (2, workers[2])):
        monkeypatch.setattr("balancer.metrics.time.time", lambda at=position: 1_000.0 + at)
        worker.settled(a_pick_at(position), Outcome.SUCCESS, None, 0.3)
        worker.flush()
    for worker in workers:
        assert exemplars(worker, "balancer_upstream") == {"0.5": ("default.1.3", "", 0.3)}
    for worker in workers:
        worker.close()


# -- several workers ---------------------------------------------------------------------------------------------------


def counted_by(folder: Path, slot: int, *, stale: int, observed: int, outbox: int, revision: int) -> Metrics:
    """A worker of that slot, which has counted."""
    metrics = Metrics(folder, slot)
    metrics.count(metrics.stale_picks, "default", stale)
    for _ in range(observed):
        metrics.overhead_s(0.0002)
    metrics.outbox.set(outbox, "default")
    metrics.store_up.set(True, "default")
    metrics.revision.set(revision)
    metrics.ready.set(True)
    metrics.open_requests = lambda: outbox
    metrics.flush()
    return metrics


def test_any_worker_tells_the_sum_of_all_and_a_successor_goes_on_counting_in_its_slot(tmp_path: Path) -> None:
    first = counted_by(tmp_path, 0, stale=2, observed=1, outbox=50, revision=3)
    second = counted_by(tmp_path, 1, stale=3, observed=1, outbox=6, revision=7)
    first.close()
    third = counted_by(tmp_path, 0, stale=4, observed=2, outbox=1, revision=8)

    for teller in (second, third):
        told = named(
            samples(teller.exposition()),
            "balancer_stale_picks_total",
            "balancer_overhead_seconds_count",
            "balancer_outbox_entries",
            "balancer_config_revision",
            "balancer_build_info",
            "balancer_store_up",
            "balancer_workers",
        )
        assert told == {
            sample("balancer_stale_picks_total", pool="default"): 9,
            sample("balancer_overhead_seconds_count"): 4,
            # A gauge of a worker that is gone is the successor's now; revisions are as old as the oldest worker's.
            sample("balancer_outbox_entries", pool="default"): 7,
            sample("balancer_config_revision"): 7,
            sample("balancer_build_info", version=__version__): 1,
            sample("balancer_store_up", pool="default"): 1,
            sample("balancer_workers"): 2,
        }
    second.close()
    third.close()


def test_what_a_dead_worker_was_is_gone_and_what_it_has_counted_stays(tmp_path: Path) -> None:
    living = counted_by(tmp_path, 0, stale=2, observed=0, outbox=5, revision=7)
    counted_by(tmp_path, 1, stale=3, observed=0, outbox=6, revision=3).close()

    values = samples(living.exposition())
    assert named(values, "balancer_stale_picks_total").popitem()[1] == 5
    assert named(values, *STATES) == {
        sample("balancer_outbox_entries", pool="default"): 5,
        sample("balancer_open_requests"): 5,
        sample("balancer_ready_workers"): 1,
        sample("balancer_workers"): 1,
        sample("balancer_config_revision"): 7,
    }
    living.close()


def test_a_successor_has_none_of_the_state_of_who_was_in_its_slot(tmp_path: Path) -> None:
    """Its pool may be gone, and nobody would ever set that again."""
    counted_by(tmp_path, 0, stale=2, observed=0, outbox=5, revision=7).close()
    successor = Metrics(tmp_path, 0)
    assert named(samples(successor.exposition()), *STATES) == {
        sample("balancer_open_requests"): 0,
        sample("balancer_workers"): 1,
    }
    successor.close()


def test_a_worker_without_a_sign_of_life_is_not_ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped, it is alive, and holds its slot; but it answers nobody."""
    stopped = counted_by(tmp_path, 0, stale=0, observed=0, outbox=1, revision=1)
    seconds = time.monotonic()
    monkeypatch.setattr("balancer.metrics.time.monotonic", lambda: seconds + 11)
    living = counted_by(tmp_path, 1, stale=0, observed=0, outbox=1, revision=1)
    assert named(samples(living.exposition()), "balancer_ready_workers", "balancer_workers") == {
        sample("balancer_ready_workers"): 1,
        sample("balancer_workers"): 2,
    }
    stopped.close()
    living.close()


STATES = (
    "balancer_outbox_entries",
    "balancer_open_requests",
    "balancer_ready_workers",
    "balancer_workers",
    "balancer_config_revision",
)
