"""The dashboards as files: what Grafana needs of them, and that they are about the metrics there are."""

from __future__ import annotations

import itertools
import re
from typing import Any

import promql_parser
import pytest
import yaml

from balancer.metrics import FAMILIES
from benchmarks.pictures.told import PICTURES
from grafana import build
from grafana.boards import DASHBOARDS
from grafana.panels import GRID
from tests import dashboards
from tests.dashboards import ROOT

READ = dashboards.read()
ASKED = list(dashboards.asked(READ))
KNOWN = {family.name: family for family in FAMILIES}
OWN_WAY = {
    "balancer-overviewVersions",  # counts pods
    "balancer-overviewConfiguration revision",  # the newest, where each pod tells its oldest
    "balancer-overviewPods behind",  # compares pods
}
PROVISIONING = ROOT / "grafana" / "provisioning"


def every(value: Any, key: str) -> list[Any]:
    """All values under that key, however deep."""
    if isinstance(value, dict):
        here = [value[key]] if key in value else []
        return here + [found for one in value.values() for found in every(one, key)]
    return [found for one in value for found in every(one, key)] if isinstance(value, list) else []


def test_no_other_file_lies_among_them() -> None:
    assert sorted(build.files()) == sorted(f"{build.FOLDER}/{file.name}" for file in dashboards.FOLDER.iterdir())


@pytest.mark.parametrize("uid", READ)
def test_panels_have_ids_of_their_own_and_a_place_of_their_own(uid: str) -> None:
    found = READ[uid]["panels"]
    numbers = [panel["id"] for panel in found]
    assert len(set(numbers)) == len(numbers)
    cells: dict[tuple[int, int], str] = {}
    for panel in found:
        place = panel["gridPos"]
        assert 0 <= place["x"] < place["x"] + place["w"] <= GRID
        for cell in itertools.product(
            range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"])
        ):
            assert cells.setdefault(cell, panel["title"]) == panel["title"]
    titles = [panel["title"] for panel in dashboards.panels(READ[uid])]
    assert len(set(titles)) == len(titles)


@pytest.mark.parametrize("uid", READ)
def test_every_datasource_is_the_variable(uid: str) -> None:
    found = every(READ[uid], "datasource")
    assert len(found) > 10
    assert [one for one in found if one != {"type": "prometheus", "uid": "${datasource}"}] == []
    (variable,) = (one for one in READ[uid]["templating"]["list"] if one["name"] == "datasource")
    assert (variable["type"], variable["query"]) == ("datasource", "prometheus")


@pytest.mark.parametrize("uid", READ)
def test_every_panel_says_what_to_look_for_and_in_which_unit(uid: str) -> None:
    for panel in dashboards.panels(READ[uid]):
        assert len(panel["description"]) > 25, panel["title"]
        assert panel["description"].endswith("."), panel["title"]
        units = [*every(panel, "unit"), *(one for one in every(panel, "id") if one == "unit")]
        assert units or panel["type"] == "state-timeline", panel["title"]
        for target in panel["targets"]:
            assert target["expr"].count("\n") == 0
            if panel["type"] in ("timeseries", "state-timeline") and len(panel["targets"]) > 1:
                assert target["legendFormat"] != "__auto", panel["title"]


@pytest.mark.parametrize("uid", READ)
def test_variables_offer_several_and_all_and_are_the_ones_that_are_used(uid: str) -> None:
    dashboard = READ[uid]
    names = [variable["name"] for variable in dashboard["templating"]["list"]]
    for variable in dashboard["templating"]["list"][1:]:
        assert (variable["multi"], variable["includeAll"], variable["allValue"]) == (True, True, ".*")
        earlier = re.findall(r"\$(\w+)", variable["query"]["query"])
        assert set(earlier) <= set(names[: names.index(variable["name"])])
    expressions = [target["expr"] for target in every(dashboard["panels"], "targets") for target in target]
    used = {name for expr in expressions for name in re.findall(r"\$([a-z]\w*)", expr)}
    assert used == set(names) - {"datasource"}
    assert {"namespace", "pool"} <= used


@pytest.mark.parametrize("one", ASKED, ids=lambda one: one.where)
def test_a_query_is_promql_and_adds_up_as_its_metrics_do(one: dashboards.Asked) -> None:
    """Several pods tell the same gauges of the fleet, and each its own counters."""
    expr = dashboards.filled(one.expr)
    promql_parser.parse(expr)
    assert "[$__interval]" not in one.expr
    for name in dashboards.metrics(expr):
        family = KNOWN[name]
        for found in re.finditer(rf"(?:(\w+)(?: by \(([^()]*)\))? ?\()(?:(\w+)\()?{name}(_bucket)?\b", expr):
            outer, by, inner, is_bucket = found.groups()
            if outer == "group":
                continue  # What there is, and not how much of it.
            if family.source == "counted":
                assert (outer, inner) in {("sum", "rate"), ("sum", "increase")}, found[0]
                assert not is_bucket or by.endswith("le"), found[0]
            elif "pod" not in (by or "").split(", ") and one.dashboard + one.panel["title"] not in OWN_WAY:
                assert outer == family.across, found[0]
        assert len(re.findall(rf"(?:\w+(?: by \([^()]*\))? ?\()(?:\w+\()?{name}(?:_bucket)?\b", expr)) == len(
            re.findall(rf"\b{name}(?:_bucket)?\b", expr)
        ), f"{name} is not aggregated in {expr}"
    has_exemplars = "_bucket" in one.expr and not one.target["instant"]
    assert one.target["exemplar"] is has_exemplars


@pytest.mark.parametrize("uid", READ)
def test_marks_are_asked_for_in_the_way_of_every_grafana(uid: str) -> None:
    marks = READ[uid]["annotations"]["list"]
    assert [mark["name"] for mark in marks] == ["Epoch raised", "Configuration changed"]
    for mark in marks:
        promql_parser.parse(dashboards.filled(mark["expr"]))
        assert (mark["target"]["expr"], mark["target"]["interval"]) == (mark["expr"], mark["step"])


def test_every_metric_has_a_panel() -> None:
    """And no panel asks for a metric that is not there: a name that is not known fails the test above."""
    shown = {name for one in ASKED for name in dashboards.metrics(one.expr)}
    assert shown == set(KNOWN)


def test_links_and_provisioning_lead_to_what_is_there() -> None:
    urls = [url for url in every(list(READ.values()), "url") if url]
    assert len(urls) > 5
    for url in urls:
        uid, _, rest = url.removeprefix("/d/").partition("?")
        names = {variable["name"] for variable in READ[uid]["templating"]["list"]}
        asked = set(re.findall(r"\$\{(\w+):queryparam\}", rest)) | set(re.findall(r"var-(\w+)=", rest))
        assert asked <= names, url
    for dashboard in READ.values():
        assert [link["tags"] for link in dashboard["links"]] == [["balancer"]]
        assert dashboard["tags"] == ["balancer"]
    (source,) = yaml.safe_load((PROVISIONING / "datasources" / "prometheus.yaml").read_text())["datasources"]
    (provider,) = yaml.safe_load((PROVISIONING / "dashboards" / "balancer.yaml").read_text())["providers"]
    assert (source["type"], source["access"], provider["type"]) == ("prometheus", "proxy", "file")


def test_what_never_moves_in_a_test_has_a_reason_and_is_rare() -> None:
    found = [panel for dashboard in DASHBOARDS for panel in dashboard.panels if panel.unmoved]
    assert len(found) <= 2


def test_pictures_are_of_panels_that_there_are_small_and_shown() -> None:
    page = (ROOT / "docs" / "observability.md").read_text(encoding="utf-8")
    for name, (uid, rows) in PICTURES.items():
        assert {title for row in rows for title in row} <= {panel["title"] for panel in dashboards.panels(READ[uid])}
        file = ROOT / "docs" / "pictures" / f"{name}.png"
        assert file.stat().st_size < 150_000
        assert f"(pictures/{file.name})" in page
