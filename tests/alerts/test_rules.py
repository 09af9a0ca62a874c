"""The alerts: each fires when it should, and not when it nearly should; and each asks for what there is."""

from __future__ import annotations

import functools
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml

from balancer import errors
from balancer.domain import Candidate, Outcome
from balancer.metrics import BY_NAME, FAMILIES, REFRESH_OUTCOMES
from balancer.tactics.base import CHOOSERS, View

ROOT = Path(__file__).resolve().parents[2]
RULES = ROOT / "grafana" / "alerts" / "balancer.yaml"
RUNBOOKS = ROOT / "docs" / "alerts.md"
CASES = sorted(Path(__file__).parent.glob("*.yaml"))
OF_PROMETHEUS = frozenset({"namespace", "pod", "job", "instance", "le"})
SEVERITIES = frozenset({"critical", "warning", "info"})
EXPECTED_SHARE_TACTICS = ("round_robin", "random", "weighted_round_robin")

Rule = dict[str, Any]


@functools.cache
def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return content


GROUPS: list[dict[str, Any]] = read(RULES)["groups"]
ALL: list[Rule] = [rule for group in GROUPS for rule in group["rules"]]
ALERTS: dict[str, Rule] = {rule["alert"]: rule for rule in ALL if "alert" in rule}
RECORDED: dict[str, Rule] = {rule["record"]: rule for rule in ALL if "record" in rule}


def promtool(*arguments: str | Path) -> None:
    done = subprocess.run(["promtool", *arguments], check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


# -- what Prometheus says ----------------------------------------------------------------------------------------------


@pytest.mark.needs("apt:prometheus")
def test_prometheus_accepts_every_rule() -> None:
    promtool("check", "rules", "--lint=all", "--lint-fatal", RULES)


@pytest.mark.needs("apt:prometheus")
@pytest.mark.parametrize("cases", CASES, ids=lambda path: path.stem)
def test_alerts_fire_when_they_should_and_not_when_they_nearly_should(cases: Path, tmp_path: Path) -> None:
    """With the groups alone that the cases are about: promtool works out every rule of a file at every step."""
    content = dict(read(cases))
    wanted = {check["alertname"] for case in content["tests"] for check in case["alert_rule_test"]}
    groups = [group for group in GROUPS if wanted & {rule.get("alert") for rule in group["rules"]}]
    (tmp_path / "groups.yaml").write_text(yaml.safe_dump({"groups": groups}, width=10_000), encoding="utf-8")
    content["rule_files"] = ["groups.yaml"]
    (tmp_path / cases.name).write_text(yaml.safe_dump(content, width=10_000), encoding="utf-8")
    promtool("test", "rules", tmp_path / cases.name)


# -- what holds of every alert -----------------------------------------------------------------------------------------


def cases_of(alert: str) -> tuple[list[str], list[str]]:
    """The names of the cases in which it fires, and of those in which it never does."""
    fires, quiet = [], []
    for path in CASES:
        for case in read(path)["tests"]:
            outcomes = [bool(check["exp_alerts"]) for check in case["alert_rule_test"] if check["alertname"] == alert]
            if any(outcomes):
                fires.append(case["name"])
            elif outcomes:
                quiet.append(case["name"])
    return fires, quiet


@pytest.mark.parametrize("alert", ALERTS)
def test_every_alert_has_a_case_that_fires_and_a_near_miss(alert: str) -> None:
    fires, quiet = cases_of(alert)
    assert fires
    assert quiet


def test_cases_are_of_alerts_that_there_are() -> None:
    checks = [check for path in CASES for case in read(path)["tests"] for check in case["alert_rule_test"]]
    assert {check["alertname"] for check in checks} == set(ALERTS)


def anchor(heading: str) -> str:
    """What a heading's link is, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def runbooks() -> dict[str, str]:
    """The chapters about alerts, by the alert."""
    chapters = re.split(r"^### ", RUNBOOKS.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    return {heading.strip(): text for heading, _, text in (chapter.partition("\n") for chapter in chapters)}


@pytest.mark.parametrize("alert", ALERTS)
def test_every_alert_says_how_bad_it_is_and_what_to_do(alert: str) -> None:
    rule = ALERTS[alert]
    assert rule["labels"]["severity"] in SEVERITIES
    assert set(rule["annotations"]) == {"summary", "description", "runbook_url"}
    assert rule["annotations"]["runbook_url"] == f"docs/alerts.md#{anchor(alert)}"
    assert "$labels.namespace" in rule["annotations"]["summary"]
    chapter = runbooks()[alert]
    for question in ("**Means.**", "**Clients notice.**", "**Look.**", "**Do.**", "**Resolves**"):
        assert question in chapter, f"the runbook of {alert} has no {question}"
    assert f"*{rule['labels']['severity']}*" in chapter


def test_every_runbook_is_of_an_alert_in_their_order() -> None:
    assert list(runbooks()) == list(ALERTS)


# -- what the expressions ask for --------------------------------------------------------------------------------------


def selectors(expression: Any) -> Iterator[promql_parser.VectorSelector]:
    """Every selector in an expression."""
    found: list[promql_parser.VectorSelector] = []

    def visit(node: promql_parser.Expr) -> None:
        if isinstance(node, promql_parser.VectorSelector):
            found.append(node)

    promql_parser.walk(expression, visit)
    yield from found


def labels_of(name: str) -> frozenset[str]:
    """The labels that series of that name may have. Raises KeyError for a name that nobody exports."""
    if name in ("up", "scrape_duration_seconds"):
        return OF_PROMETHEUS
    if name in RECORDED:
        return frozenset(re.findall(r"\w+", " ".join(re.findall(r"by \(([^)]*)\)", RECORDED[name]["expr"]))))
    family = BY_NAME.get(re.sub(r"_(bucket|sum|count)$", "", name)) or BY_NAME[name]
    return OF_PROMETHEUS | set(family.labels)


def questions() -> list[tuple[str, str]]:
    """Every expression, with where it stands: the rules', and the runbooks'."""
    asked = [(rule.get("alert") or rule["record"], rule["expr"]) for rule in ALL]
    blocks = re.findall(r"```promql\n(.*?)```", RUNBOOKS.read_text(encoding="utf-8"), re.DOTALL)
    return asked + [("docs/alerts.md", line.partition("#")[0]) for block in blocks for line in block.splitlines()]


@pytest.mark.parametrize(("where", "expression"), questions())
def test_every_expression_asks_for_series_and_labels_that_there_are(where: str, expression: str) -> None:
    for selector in selectors(promql_parser.parse(expression)):
        assert selector.name
        labels = labels_of(selector.name)
        for matcher in selector.matchers.matchers:
            assert matcher.name in labels, f"{selector.name} has no label {matcher.name}"
            words = matcher.value.split("|")
            if matcher.name == "outcome":
                is_refresh = selector.name == "balancer_oauth_refreshes_total"
                known = REFRESH_OUTCOMES if is_refresh else [outcome.value for outcome in Outcome]
                assert set(words) <= set(known)
            if matcher.name == "reason" and selector.name == "balancer_refused_total":
                assert set(words) <= refusals()


def refusals() -> set[str]:
    """The words with which requests are refused."""
    return {
        *(kind.reason for kind in vars(errors).values() if isinstance(kind, type) and hasattr(kind, "reason")),
        *(errors.NoServiceError("", cause=cause).reason for cause in ("inactive", "limited", "broken")),
    }


SHARED = frozenset(family.name for family in FAMILIES if family.source in ("fleet", "configuration"))


@pytest.mark.parametrize(("where", "expression"), questions())
def test_what_every_pod_tells_alike_is_never_added_up(where: str, expression: str) -> None:
    """The greatest of all pods (or a minimum over time) must be taken before anything is summed, counted, averaged."""

    def visit(node: promql_parser.Expr) -> None:
        if isinstance(node, promql_parser.AggregateExpr) and str(node.op) in ("sum", "avg", "count"):
            assert not (SHARED & set(unreduced(node.expr))), f"{node.prettify()} counts pods"

    promql_parser.walk(promql_parser.parse(expression), visit)


def unreduced(expression: promql_parser.Expr) -> Iterator[str]:
    """The names of the series in it that were not aggregated before."""
    found: list[str] = []
    inside: list[promql_parser.Expr] = []

    def enter(node: promql_parser.Expr) -> None:
        if isinstance(node, promql_parser.AggregateExpr):
            inside.append(node)
        elif isinstance(node, promql_parser.VectorSelector) and not inside and node.name:
            found.append(node.name)

    def leave(node: promql_parser.Expr) -> None:
        if isinstance(node, promql_parser.AggregateExpr):
            inside.pop()

    promql_parser.walk(expression, enter, leave)
    yield from found


def test_picks_of_a_tactic_have_the_reasons_that_the_imbalance_is_reckoned_from() -> None:
    """Were a tactic to call its picks otherwise, the alert would look at none of them."""
    reasons = set()
    for tactic, choose in CHOOSERS.items():
        if tactic.__struct_config__.tag not in EXPECTED_SHARE_TACTICS:
            continue
        cursor, streak, memory = "a", 0, ""
        for _ in range(30):
            candidates = [Candidate(service="a"), Candidate(service="b")]
            view = View(cursor=cursor, streak=streak, memory=memory, order=("a", "b"), candidates=candidates, draw=7)
            choice = choose(tactic(), view)
            cursor, streak, memory = choice.service, choice.streak, choice.memory or memory
            reasons.add(choice.reason)
    (selector,) = selectors(promql_parser.parse(RECORDED["balancer:tactic_picks:increase30m"]["expr"]))
    (matcher,) = selector.matchers.matchers
    assert set(matcher.value.split("|")) == reasons
