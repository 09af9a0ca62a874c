"""The dashboards as they are checked in, read the way Grafana reads them: panels, queries, variables filled in."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "grafana" / "dashboards"
ALL = {"datasource": "prometheus", **dict.fromkeys(("namespace", "pool", "rule", "service", "scenario"), ".*")}
"""What the variables stand for when all is chosen."""
INTERVALS = {"__rate_interval": "10s", "__range": "60s", "__interval": "1s"}
_VARIABLE = re.compile(r"\$(?:\{(\w+)(?::\w+)?\}|(\w+))")
_METRIC = re.compile(r"\bbalancer_[a-z_]+")

Json = dict[str, Any]


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """A query of a panel, and whose it is."""

    dashboard: str
    panel: Json
    target: Json

    @property
    def where(self) -> str:
        """Names it in a failure."""
        return f"{self.dashboard} / {self.panel['title']} / {self.target['refId']}"

    @property
    def expr(self) -> str:
        """In PromQL, as it is written."""
        return str(self.target["expr"])


def read() -> dict[str, Json]:
    """Every dashboard by its uid."""
    found = [msgspec.json.decode(file.read_bytes(), type=Json) for file in sorted(FOLDER.glob("*.json"))]
    return {dashboard["uid"]: dashboard for dashboard in found}


def panels(dashboard: Json) -> list[Json]:
    """Its panels, without the headlines of rows."""
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def asked(dashboards: Mapping[str, Json]) -> Iterator[Asked]:
    """Every query of every panel."""
    for uid, dashboard in dashboards.items():
        for panel in panels(dashboard):
            for target in panel["targets"]:
                yield Asked(dashboard=uid, panel=panel, target=target)


def label_query(variable: Json) -> tuple[str, str]:
    """The selector and the label of a variable's `label_values(selector, label)`."""
    found = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"]["query"])
    assert found, variable["query"]
    return found[1], found[2]


def filled(text: str, values: Mapping[str, str] | None = None) -> str:
    """The text with its variables filled in, as Grafana does it; one that has no value is an error."""
    known = {**ALL, **INTERVALS, **(values or {})}
    return _VARIABLE.sub(lambda found: known[found[1] or found[2]], text)


def metrics(expr: str) -> set[str]:
    """The metrics that an expression is about; a histogram's or counter's parts under its own name."""
    return {re.sub(r"_(bucket|count|sum)$", "", name) for name in _METRIC.findall(expr)}
