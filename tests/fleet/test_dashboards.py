"""The dashboards over a fleet that lives: a real Prometheus scrapes real workers, and is asked what Grafana would ask.

The fleet is calm, then has every fault, then is mended (`watched`); all panels are asked for the whole of it. A panel
that shows traffic shows some in the calm; one that is `calm` shows nothing then, and something in the faults.
"""

from __future__ import annotations

import asyncio
import math
import shutil
import statistics
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from grafana.boards import DASHBOARDS
from grafana.boards.store import OFTEN
from grafana.panels import Panel
from tests import dashboards
from tests.dashboards import Asked, filled
from tests.fleet.watched import NAMESPACE, Pace, Phase, watched
from tests.prometheus import Series

pytestmark = pytest.mark.needs("apt:prometheus")

READ = dashboards.read()
ASKED = list(dashboards.asked(READ))
INTERVALS = {"__rate_interval": "3s", "__range": "20s", "__interval": "500ms"}
STEP_S = 0.5


class Seen(msgspec.Struct, kw_only=True):
    """All that Prometheus said, by the name of the query; of the variables, by dashboard and name."""

    phases: dict[str, Phase]
    answers: dict[str, list[Series]]
    of_one_fleet: dict[str, list[Series]]
    marks: dict[str, list[Series]]
    choices: dict[str, list[str]]
    exemplars: list[dict[str, Any]]

    def during(self, where: str, *phases: str, one_fleet: bool = True) -> dict[str, list[float]]:
        """A query's numbers within the phases, by the values of its series' labels."""
        answers = self.of_one_fleet if one_fleet else self.answers
        found: dict[str, list[float]] = {}
        for series in answers[where]:
            name = " ".join(
                value for label, value in sorted(series.labels.items()) if label not in ("namespace", "__name__")
            )
            found[name] = [
                value
                for at, value in series.points
                if not math.isnan(value) and any(self.phases[p].start <= at <= self.phases[p].end for p in phases)
            ]
        return found

    def most(self, where: str, *phases: str, one_fleet: bool = False) -> float:
        """The greatest of those numbers, 0 if there are none."""
        return max(
            (n for numbers in self.during(where, *phases, one_fleet=one_fleet).values() for n in numbers), default=0
        )

    def last(self, where: str) -> dict[str, float]:
        """The newest of each series of the fleet."""
        return {name: numbers[-1] for name, numbers in self.during(where, "mended").items() if numbers}


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seen]:
    """The whole of it, lived through once."""
    # Sockets have short paths.
    folder = tmp_path_factory.mktemp("w")
    with asyncio.Runner() as runner:
        yield runner.run(_live(folder))
    shutil.rmtree(folder)


async def _live(folder: Path) -> Seen:
    async with watched(folder, Pace()) as fleet:
        await fleet.live()
        server, end = fleet.prometheus, time.time()
        start = min(phase.start for phase in fleet.phases)
        answers: dict[str, list[Series]] = {}
        of_one_fleet: dict[str, list[Series]] = {}
        for one in ASKED:
            for kept, namespace in ((answers, ".*"), (of_one_fleet, NAMESPACE)):
                expr = filled(one.expr, INTERVALS | {"namespace": namespace})
                kept[one.where] = await server.query_range(expr, start, end, STEP_S)
        marks = {}
        for annotation in READ["balancer-overview"]["annotations"]["list"]:
            expr = filled(annotation["expr"], {"namespace": NAMESPACE}).replace("[2m]", "[3s]")
            marks[annotation["name"]] = await server.query_range(expr, start, end, STEP_S)
        choices = {}
        for uid, dashboard in READ.items():
            for variable in dashboard["templating"]["list"][1:]:
                selector, label = dashboards.label_query(variable)
                choices[f"{uid} {variable['name']}"] = await server.label_values(label, filled(selector))
        (latency,) = (one for one in ASKED if one.where == "balancer-services / First token, p95 / A")
        exemplars = await server.exemplars(filled(latency.expr, INTERVALS), start, end)
        return Seen(
            phases={phase.name: phase for phase in fleet.phases},
            answers=answers,
            of_one_fleet=of_one_fleet,
            marks=marks,
            choices=choices,
            exemplars=exemplars,
        )


def code_of(one: Asked) -> tuple[Panel, float | None]:
    """The code that the panel was made of, and above what the query is when it is not calm."""
    (found,) = (
        panel
        for dashboard in DASHBOARDS
        if dashboard.uid == one.dashboard
        for panel in dashboard.panels
        if panel.title == one.panel["title"]
    )
    query = found.queries[ord(one.target["refId"]) - ord("A")]
    return found, found.calm if query.calm is None else query.calm


def test_what_shows_traffic_shows_some_while_all_is_calm(seen: Seen) -> None:
    shown = {one.where: seen.most(one.where, "calm") for one in ASKED if code_of(one)[1] is None}
    assert len(shown) > 50
    assert [where for where, most in shown.items() if not most > 0] == []


def test_what_shows_faults_shows_none_before_there_are_any_and_then_some(seen: Seen) -> None:
    found = [(one.where, *code_of(one)) for one in ASKED]
    faults = [(where, panel, calm) for where, panel, calm in found if calm is not None]
    assert len(faults) > 20
    assert {where: most for where, _, calm in faults if (most := seen.most(where, "calm")) > calm} == {}
    unmoved = [where for where, _, calm in faults if not seen.most(where, "faults", "mended") > calm]
    assert unmoved == [where for where, panel, _ in faults if panel.unmoved]
    assert all(seen.during(where, "faults") for where in unmoved)


def test_prometheus_own_tool_finds_nothing_wrong_with_any_query(tmp_path: Path) -> None:
    rules = [{"record": f"dashboard:query{i}", "expr": filled(one.expr)} for i, one in enumerate(ASKED)]
    file = tmp_path / "rules.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "all", "rules": rules}]}), encoding="utf-8")
    done = subprocess.run(["promtool", "check", "rules", str(file)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"SUCCESS: {len(rules)} rules found" in done.stdout


def test_the_choices_at_the_top_are_those_of_the_fleet(seen: Seen) -> None:
    by_name = {choice.partition(" ")[2]: values for choice, values in seen.choices.items()}
    assert by_name["namespace"] == [NAMESPACE, "trial"]
    assert by_name["pool"] == ["batch", "default"]
    assert by_name["rule"] == ["claude-opus-5", "embeddings", "gpt-5", "gpt-5-mini", "reviews", "summaries", "turns"]
    assert {"anna-openai:gpt-5", "dora:summaries"} <= set(by_name["service"])
    assert {"openai", "anthropic"} <= set(by_name["scenario"])


def test_marks_are_where_the_epoch_rose_and_the_configuration_changed(seen: Seen) -> None:
    def times(name: str) -> list[float]:
        return [at for series in seen.marks[name] for at, _ in series.points]

    away = seen.phases["the store is away"]
    raised = times("Epoch raised")
    assert raised
    assert all(away.start < at < away.end + 6 for at in raised)
    changed, when = times("Configuration changed"), seen.phases["the configuration changes"]
    assert [at for at in changed if when.start < at < when.end + 3]
    assert [at for at in changed if at < when.start] == []


def test_latency_panels_have_exemplars_that_name_decisions(seen: Seen) -> None:
    decisions = {exemplar["labels"]["decision"] for exemplar in seen.exemplars}
    assert len(decisions) > 3
    assert all(decision.split(".")[0] in ("default", "batch") for decision in decisions)


# -- what the panels say is so -----------------------------------------------------------------------------------------


def test_gauges_of_the_fleet_are_not_counted_once_for_each_pod(seen: Seen) -> None:
    fleet = "balancer-overview / Workers / "
    assert seen.during(f"{fleet}A", "calm")[""][-1] == 4
    assert seen.during(f"{fleet}B", "calm")[""][-1] == 4
    assert {name: numbers[-1] for name, numbers in seen.during(f"{fleet}C", "calm").items()} == {
        "batch": 4,
        "default": 4,
    }
    assert max(seen.during("balancer-rules / Streak / A", "calm")["default gpt-5"]) <= Pace().streak


def test_shares_are_what_the_configuration_promises_while_all_is_calm(seen: Seen) -> None:
    promised = {"anna-openai": 0.5, "boris-openai": 0.3, "chen-openai": 0.2}
    picked, expected = (seen.during(f"balancer-rules / Share of the picks / {letter}", "calm") for letter in "AB")
    for name, share in promised.items():
        (key,) = (key for key in picked if f"{name}:embeddings" in key)
        assert expected[key][-1] == pytest.approx(share)
        assert picked[key][-1] == pytest.approx(share, abs=0.05)
    assert len([key for key in expected if "gpt-5" in key.split()]) == 3


def test_a_slow_service_is_seen_to_be_slow(seen: Seen) -> None:
    first = seen.during("balancer-services / First token, p95 / A", "calm")
    assert statistics.median(first["anna-openai:gpt-5"]) < statistics.median(first["chen-openai:gpt-5"])


def test_a_failing_account_opens_its_breakers_and_one_at_its_limits_cools(seen: Seen) -> None:
    breaker = seen.during("balancer-services / Breaker / A", "an account fails", "another is at its limits")
    assert max(breaker["default anna-openai:gpt-5"]) == 2
    assert max(breaker["default chen-openai:gpt-5"]) == 0
    cooling = seen.during("balancer-services / Cooldown / A", "another is at its limits")
    assert 0 < max(cooling["default boris-openai:gpt-5"]) <= 1
    assert max(cooling["default anna-openai:gpt-5"]) == 0
    assert seen.last("balancer-services / Breaker / A")["default anna-openai:gpt-5"] == 0
    assert seen.last("balancer-services / Cooldown / A")["default boris-openai:gpt-5"] == 0
    outcomes = {
        name
        for name, numbers in seen.during("balancer-services / Attempts by outcome / A", "faults").items()
        if any(numbers)
    }
    assert {"success", "overloaded", "rate_limited"} <= outcomes


def test_limits_are_reached_and_refusals_say_why(seen: Seen) -> None:
    used = seen.during("balancer-clients / Limits used / A", "clients ask for too much")
    assert max(used["in_flight default dora:*"]) == 1
    assert all(max(numbers) <= 1 for numbers in used.values())
    refused = seen.during("balancer-clients / Refused / A", "faults")
    reasons = {name for name, numbers in refused.items() if any(numbers)}
    assert {"unauthorized", "unknown_model", "limited", "store_lost", "exhausted"} <= reasons


def test_the_store_s_absence_is_seen_and_all_is_mended_after_it(seen: Seen) -> None:
    store, picks = "balancer-store / Store / A", "balancer-store / Degraded picks / A"
    assert seen.during(store, "calm")[""][-1] == 1
    assert min(seen.during(store, "the store is away")[""]) == 0
    assert seen.last(store)[""] == 1
    assert max(seen.during(picks, "the store is away")[""]) > 0.5
    assert seen.last(picks)[""] == 0
    assert seen.most("balancer-store / Age of the outbox / A", "the store is away") > 1.5
    assert max(seen.last("balancer-store / Outbox / A").values()) <= OFTEN
    epoch = "balancer-store / Epoch / A"
    assert {name: numbers[-1] for name, numbers in seen.during(epoch, "calm").items()} == {"batch": 1, "default": 1}
    assert seen.last(epoch) == {"batch": 2, "default": 2}
    assert seen.last("balancer-store / Failovers with a loss / A")[""] == 2


def test_a_killed_worker_is_replaced_and_what_it_held_is_lost(seen: Seen) -> None:
    lost = seen.during("balancer-store / Attempts lost, by pool / A", "faults", "mended")
    assert max(number for numbers in lost.values() for number in numbers) > 0
    alive = seen.during("balancer-store / Workers / A", "faults", "mended")[""]
    assert alive[-1] == 4


def test_revisions_rise_together(seen: Seen) -> None:
    revision = "balancer-store / Configuration revision / A"
    before = seen.during(revision, "calm")
    after = seen.last(revision)
    assert len(after) == 2
    assert len(set(after.values())) == 1
    assert all(after[pod] >= numbers[-1] + 10 for pod, numbers in before.items())
