"""What dashboards are made of, and the JSON that Grafana reads (11 and later).

A panel is a title, a sentence on what to look for, and queries; the functions here give it the look of its kind. Where
it stands follows from the order of the panels and their widths: a row of the grid is 24 wide.
"""

from __future__ import annotations

import string
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

SCHEMA_VERSION = 41
"""The last that Grafana 11 and 12 share the fields of; later ones migrate it."""
GRID = 24
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
TAG = "balancer"
"""All dashboards have it, and link to those that have it."""

GREEN, YELLOW, ORANGE, RED, BLUE, PURPLE, GREY = "green", "yellow", "orange", "red", "blue", "purple", "#808080"
NEVER_GOOD = ((None, GREEN), (1e-9, RED))
"""Thresholds of what should be zero."""

Json = dict[str, Any]
Steps = Sequence[tuple[float | None, str]]
"""From which value on which colour; the first has no value."""


class Query(msgspec.Struct, frozen=True, kw_only=True):
    """A question in PromQL and the name of its series.

    `at_once` asks for one instant and not for a range of time; exemplars are asked for where histograms are. `calm`:
    see `Panel`; here for one query of several.
    """

    expr: str
    legend: str = ""
    at_once: bool = False
    format: str = "time_series"
    calm: float | None = None

    def json(self, letter: str) -> Json:
        """As Grafana has it."""
        has_exemplars = "_bucket" in self.expr and not self.at_once
        return {
            "datasource": DATASOURCE,
            "editorMode": "code",
            "exemplar": has_exemplars,
            "expr": self.expr,
            "format": self.format,
            "instant": self.at_once,
            "legendFormat": self.legend or "__auto",
            "range": not self.at_once,
            "refId": letter,
        }


class Panel(msgspec.Struct, frozen=True, kw_only=True):
    """A panel; `options`, `defaults`, `custom` and `overrides` as Grafana's panel of that type has them.

    `calm`: without a fault nothing it shows is above that, and with one something is; None for what shows traffic. A
    test holds every panel to it. `unmoved`: why no test makes it show anything.
    """

    type: str
    title: str
    description: str
    queries: tuple[Query, ...]
    options: Json
    defaults: Json
    custom: Json = {}
    overrides: tuple[Json, ...] = ()
    transformations: tuple[Json, ...] = ()
    links: tuple[Json, ...] = ()
    width: int = 8
    height: int = 8
    calm: float | None = None
    unmoved: str = ""

    def json(self, number: int, x: int, y: int) -> Json:
        """As Grafana has it, at that place."""
        letters = string.ascii_uppercase
        return {
            "id": number,
            "type": self.type,
            "title": self.title,
            "description": self.description,
            "datasource": DATASOURCE,
            "gridPos": {"h": self.height, "w": self.width, "x": x, "y": y},
            "targets": [query.json(letter) for letter, query in zip(letters, self.queries, strict=False)],
            "fieldConfig": {"defaults": {**self.defaults, "custom": self.custom}, "overrides": list(self.overrides)},
            "options": self.options,
            "transformations": list(self.transformations),
            "links": list(self.links),
        }


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """A headline, and the panels below it."""

    title: str
    panels: tuple[Panel, ...]


class Variable(msgspec.Struct, frozen=True, kw_only=True):
    """A choice at the top of a dashboard: one, several or all values of a label. `is_first`: at first the first one."""

    name: str
    label: str
    description: str
    query: str
    is_first: bool = False

    def json(self) -> Json:
        """As Grafana has it. All means any value, and none."""
        everything: Json = {"selected": True, "text": ["All"], "value": ["$__all"]}
        return {
            "type": "query",
            "name": self.name,
            "label": self.label,
            "description": self.description,
            "datasource": DATASOURCE,
            "definition": self.query,
            "query": {"qryType": 1, "query": self.query, "refId": "PrometheusVariableQueryEditor-VariableQuery"},
            "includeAll": True,
            "allValue": ".*",
            "multi": True,
            "refresh": 2,
            "sort": 1,
            "hide": 0,
            "regex": "",
            "options": [],
            "current": {} if self.is_first else everything,
        }


class Annotation(msgspec.Struct, frozen=True, kw_only=True):
    """A mark over every graph at the times when an expression is above zero."""

    name: str
    expr: str
    text: str
    colour: str

    def json(self) -> Json:
        """As Grafana has it."""
        return {
            "name": self.name,
            "datasource": DATASOURCE,
            "enable": True,
            "hide": False,
            "iconColor": self.colour,
            # Grafana 11 reads these two, 12 the target.
            "expr": self.expr,
            "step": "60s",
            "target": {**Query(expr=self.expr).json("Anno"), "interval": "60s"},
            "titleFormat": self.name,
            "textFormat": self.text,
            "tagKeys": "namespace,pool",
            "useValueForTime": False,
        }


class Dashboard(msgspec.Struct, frozen=True, kw_only=True):
    """A dashboard; `uid` is its address for ever."""

    uid: str
    title: str
    description: str
    variables: tuple[Variable, ...]
    annotations: tuple[Annotation, ...]
    rows: tuple[Row, ...]

    @property
    def panels(self) -> tuple[Panel, ...]:
        """The panels of all rows."""
        return tuple(panel for row in self.rows for panel in row.panels)

    def json(self) -> Json:
        """As Grafana has it."""
        datasource = {
            "type": "datasource",
            "name": "datasource",
            "label": "Data source",
            "description": "The Prometheus that scrapes the workers.",
            "query": "prometheus",
            "current": {},
            "options": [],
            "includeAll": False,
            "multi": False,
            "refresh": 1,
            "regex": "",
            "hide": 0,
        }
        others = {
            "type": "dashboards",
            "title": "Balancer",
            "tags": [TAG],
            "asDropdown": False,
            "includeVars": True,
            "keepTime": True,
            "targetBlank": False,
            "icon": "external link",
            "tooltip": "",
            "url": "",
        }
        return {
            "uid": self.uid,
            "title": self.title,
            "description": self.description,
            "tags": [TAG],
            "schemaVersion": SCHEMA_VERSION,
            "version": 1,
            "editable": True,
            "graphTooltip": 1,
            "time": {"from": "now-1h", "to": "now"},
            "timepicker": {},
            "timezone": "browser",
            "refresh": "30s",
            "links": [others],
            "annotations": {"list": [annotation.json() for annotation in self.annotations]},
            "templating": {"list": [datasource, *(variable.json() for variable in self.variables)]},
            "panels": list(self._placed()),
        }

    def _placed(self) -> Iterator[Json]:
        number, y = 0, 0
        for row in self.rows:
            number += 1
            yield {
                "id": number,
                "type": "row",
                "title": row.title,
                "collapsed": False,
                "gridPos": {"h": 1, "w": GRID, "x": 0, "y": y},
                "panels": [],
            }
            x, y, height = 0, y + 1, 0
            for panel in row.panels:
                number += 1
                if x + panel.width > GRID:
                    x, y, height = 0, y + height, 0
                yield panel.json(number, x, y)
                x, height = x + panel.width, max(height, panel.height)
            y += height


# -- kinds of panels ---------------------------------------------------------------------------------------------------


def lines(
    title: str,
    description: str,
    *queries: Query,
    unit: str = "short",
    stacked: bool = False,
    thresholds: Steps = (),
    dashed: str = "",
    colours: Mapping[str, str] | None = None,
    most: float | None = None,
    **more: Any,
) -> Panel:
    """Series over time. `thresholds` are drawn as lines; series whose names match `dashed` are what others are held to.

    `stacked` adds up, as areas.
    """
    overrides = [_fixed(name, colour) for name, colour in (colours or {}).items()]
    if dashed:
        look = {"custom.lineStyle": {"fill": "dash", "dash": [8, 8]}, "custom.fillOpacity": 0, "custom.lineWidth": 2}
        overrides.append(_override({"id": "byRegexp", "options": dashed}, look))
    return Panel(
        type="timeseries",
        title=title,
        description=description,
        queries=queries,
        options={
            "legend": {"showLegend": True, "displayMode": "list", "placement": "bottom", "calcs": []},
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
        defaults={
            "unit": unit,
            "min": 0,
            **({} if most is None else {"max": most}),
            "color": {"mode": "palette-classic"},
            "thresholds": _thresholds(thresholds or ((None, GREEN),)),
            "mappings": [],
        },
        custom={
            "drawStyle": "line",
            "lineInterpolation": "linear",
            "lineWidth": 1,
            "fillOpacity": 60 if stacked else 8,
            "showPoints": "never",
            "spanNulls": False,
            "stacking": {"mode": "normal" if stacked else "none", "group": "A"},
            "thresholdsStyle": {"mode": "dashed" if thresholds else "off"},
        },
        overrides=tuple(overrides),
        **more,
    )


def stat(
    title: str,
    description: str,
    *queries: Query,
    unit: str = "short",
    thresholds: Steps = ((None, BLUE),),
    values: Mapping[int, tuple[str, str]] | None = None,
    decimals: int | None = None,
    **more: Any,
) -> Panel:
    """The newest value, large, over a small graph of how it came about. `values` gives numbers a word and a colour."""
    has_graph = not any(query.at_once for query in queries)
    return Panel(
        **{"width": 3, "height": 4} | more,
        type="stat",
        title=title,
        description=description,
        queries=queries,
        options={
            "colorMode": "value",
            "graphMode": "area" if has_graph else "none",
            "justifyMode": "auto",
            "orientation": "auto",
            "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
            "textMode": "auto",
            "wideLayout": True,
        },
        defaults={
            "unit": unit,
            **({} if decimals is None else {"decimals": decimals}),
            "color": {"mode": "thresholds"},
            "thresholds": _thresholds(thresholds),
            "mappings": _mappings(values or {}),
        },
    )


def timeline(
    title: str, description: str, *queries: Query, values: Mapping[int, tuple[str, str]], **more: Any
) -> Panel:
    """A band for each series, whose colour and word say in which state it was."""
    return Panel(
        type="state-timeline",
        title=title,
        description=description,
        queries=queries,
        options={
            "mergeValues": True,
            "showValue": "auto",
            "alignValue": "left",
            "rowHeight": 0.9,
            "legend": {"showLegend": False, "displayMode": "list", "placement": "bottom"},
            "tooltip": {"mode": "single", "sort": "none"},
        },
        defaults={
            "color": {"mode": "thresholds"},
            "thresholds": _thresholds(((None, GREY),)),
            "mappings": _mappings(values),
        },
        custom={"fillOpacity": 80, "lineWidth": 0, "spanNulls": False},
        **more,
    )


def heat(title: str, description: str, query: Query, **more: Any) -> Panel:
    """How often which duration was, over time: the darker the more often."""
    return Panel(
        type="heatmap",
        title=title,
        description=description,
        queries=(msgspec.structs.replace(query, format="heatmap", legend="{{le}}"),),
        options={
            "calculate": False,
            "cellGap": 1,
            "color": {"mode": "scheme", "scheme": "Oranges", "fill": "dark-orange", "exponent": 0.5, "steps": 64},
            "exemplars": {"color": "rgba(255,0,255,0.7)"},
            "filterValues": {"le": 1e-9},
            "legend": {"show": True},
            "rowsFrame": {"layout": "auto"},
            "tooltip": {"mode": "single", "yHistogram": False, "showColorScale": False},
            "yAxis": {"axisPlacement": "left", "reverse": False, "unit": "s"},
        },
        defaults={},
        custom={"hideFrom": {"legend": False, "tooltip": False, "viz": False}},
        **more,
    )


def bars(title: str, description: str, *queries: Query, by: str, unit: str = "short", **more: Any) -> Panel:
    """A group of bars for each value of the label `by`, one bar for each query, now; its legend is the bar's name."""
    names = {f"Value #{letter}": query.legend for letter, query in zip(string.ascii_uppercase, queries, strict=False)}
    return Panel(
        type="barchart",
        title=title,
        description=description,
        queries=tuple(msgspec.structs.replace(query, at_once=True, format="table") for query in queries),
        options={
            "xField": by,
            "orientation": "horizontal",
            "showValue": "auto",
            "stacking": "none",
            "groupWidth": 0.7,
            "barWidth": 0.9,
            "barRadius": 0,
            "fullHighlight": False,
            "xTickLabelRotation": 0,
            "xTickLabelSpacing": 0,
            "legend": {"showLegend": True, "displayMode": "list", "placement": "bottom", "calcs": []},
            "tooltip": {"mode": "multi", "sort": "none"},
        },
        defaults={
            "unit": unit,
            "min": 0,
            "color": {"mode": "palette-classic"},
            "thresholds": _thresholds(((None, GREEN),)),
            "mappings": [],
        },
        custom={"fillOpacity": 80, "lineWidth": 1, "thresholdsStyle": {"mode": "off"}},
        transformations=_merged(names, [by, *names.values()]),
        **more,
    )


class Column(msgspec.Struct, frozen=True, kw_only=True):
    """A column of a table: one query's values; `colours` from which value on."""

    title: str
    expr: str
    unit: str = "short"
    decimals: int | None = None
    colours: Steps = ()
    values: Mapping[int, tuple[str, str]] = {}
    calm: float | None = None


def table(
    title: str,
    description: str,
    *columns: Column,
    labels: Mapping[str, str],
    links: Mapping[str, str] | None = None,
    **more: Any,
) -> Panel:
    """A line for each set of labels, now. `labels` gives each its heading, `links` where a click on it leads."""
    names = {f"Value #{letter}": column.title for letter, column in zip(string.ascii_uppercase, columns, strict=False)}
    overrides = []
    for column in columns:
        look: Json = {"unit": column.unit}
        if column.decimals is not None:
            look["decimals"] = column.decimals
        if column.values:
            look["mappings"] = _mappings(column.values)
        if column.colours or column.values:
            look["thresholds"] = _thresholds(column.colours or ((None, "text"),))
            look["custom.cellOptions"] = {"type": "color-text"}
        overrides.append(_override({"id": "byName", "options": column.title}, look))
    for label, url in (links or {}).items():
        look = {"links": [{"title": f"Look at this {label}", "url": url, "targetBlank": False}]}
        overrides.append(_override({"id": "byName", "options": labels[label]}, look))
    return Panel(
        type="table",
        title=title,
        description=description,
        queries=tuple(Query(expr=column.expr, at_once=True, format="table", calm=column.calm) for column in columns),
        options={
            "cellHeight": "sm",
            "showHeader": True,
            "footer": {"show": False, "reducer": ["sum"], "countRows": False, "fields": ""},
            "sortBy": [],
        },
        defaults={"color": {"mode": "thresholds"}, "thresholds": _thresholds(((None, "text"),)), "mappings": []},
        custom={"align": "auto", "cellOptions": {"type": "auto"}, "filterable": True, "inspect": False},
        overrides=tuple(overrides),
        transformations=_merged({**labels, **names}, [*labels.values(), *names.values()]),
        **more,
    )


def _merged(names: Mapping[str, str], order: Sequence[str]) -> tuple[Json, ...]:
    """Joins the answers of all queries, shows what has a name under it, in that order."""
    return (
        {"id": "merge", "options": {}},
        {
            "id": "organize",
            "options": {"excludeByName": {"Time": True}, "indexByName": {}, "renameByName": dict(names)},
        },
        {"id": "filterFieldsByName", "options": {"include": {"names": list(order)}}},
    )


def _thresholds(steps: Steps) -> Json:
    return {"mode": "absolute", "steps": [{"value": value, "color": colour} for value, colour in steps]}


def _mappings(values: Mapping[int, tuple[str, str]]) -> list[Json]:
    options = {
        str(value): {"text": text, "color": colour, "index": index}
        for index, (value, (text, colour)) in enumerate(values.items())
    }
    return [{"type": "value", "options": options}] if options else []


def _override(matcher: Json, properties: Json) -> Json:
    return {"matcher": matcher, "properties": [{"id": name, "value": value} for name, value in properties.items()]}


def _fixed(name: str, colour: str) -> Json:
    return _override({"id": "byName", "options": name}, {"color": {"mode": "fixed", "fixedColor": colour}})
