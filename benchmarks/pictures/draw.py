"""Panels drawn by matplotlib from their JSON: lines and areas, state timelines, bars, large numbers."""

from __future__ import annotations

import io
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("agg")

import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, MaxNLocator
from PIL import Image

from benchmarks.pictures.told import Told
from tests import dashboards
from tests.dashboards import Json
from tests.prometheus import Series

WIDTH, DPI = 12.0, 100
BACK, PAPER, GRID, TEXT, FAINT = "#111217", "#181b1f", "#2c3235", "#d8d9da", "#8e9297"
COLOURS = {
    "green": "#73bf69",
    "yellow": "#fade2a",
    "orange": "#ff9830",
    "red": "#f2495c",
    "blue": "#5794f2",
    "purple": "#b877d9",
    "dark-orange": "#fa6400",
    "dark-red": "#c4162a",
    "light-blue": "#8ab8ff",
    "light-orange": "#ffb357",
    "light-purple": "#ca95e5",
    "light-green": "#96d98d",
    "text": TEXT,
}
CLASSIC = ("#73bf69", "#fade2a", "#5794f2", "#ff9830", "#f2495c", "#b877d9", "#8ab8ff", "#ffb357", "#96d98d", "#ca95e5")
_PIECES = {"timeseries": 1.0, "state-timeline": 1.0, "barchart": 1.0, "stat": 0.55}

PICTURES: Mapping[str, tuple[str, Sequence[Sequence[str]]]] = {
    "overview": (
        "balancer-overview",
        (
            (
                "Requests",
                "First token, p95",
                "Tokens",
                "Open requests",
                "Ready workers",
                "Store",
                "Services left alone",
            ),
            ("Requests by rule", "Requests by outcome"),
            ("First token", "What we add", "Workers"),
        ),
    ),
    "switching": (
        "balancer-rules",
        (("Current service",), ("Streak", "Share of the picks"), ("Picks by service", "Picks by reason")),
    ),
    "services": (
        "balancer-services",
        (("Tokens in the window", "Attempts by outcome"), ("Breaker",), ("Cooldown", "In flight", "First token, p95")),
    ),
    "store": (
        "balancer-store",
        (("Store by pod", "Degraded picks"), ("Outbox", "Age of the outbox", "Workers"), ("Select", "Epoch")),
    ),
    "clients": (
        "balancer-clients",
        (("By outcome", "Refused"), ("Limits used", "Retries by rule"), ("Tokens by rule", "Cost an hour by service")),
    ),
}
"""Which panels of which dashboard are on a picture, line by line."""


def all_of(read: Mapping[str, Json], told: Told, folder: Path) -> Iterator[tuple[str, int]]:
    """Draws every picture into the folder; each one's name and bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    plt.rcParams.update(
        {
            "font.size": 9,
            "text.color": TEXT,
            "axes.edgecolor": GRID,
            "axes.facecolor": PAPER,
            "axes.labelcolor": TEXT,
            "figure.facecolor": BACK,
            "xtick.color": FAINT,
            "ytick.color": FAINT,
            "grid.color": GRID,
        }
    )
    for name, (uid, rows) in PICTURES.items():
        panels = {panel["title"]: panel for panel in dashboards.panels(read[uid])}
        data = _picture(read[uid]["title"], [[panels[title] for title in row] for row in rows], uid, told)
        file = folder / f"{name}.png"
        file.write_bytes(data)
        yield file.name, len(data)


def _picture(title: str, rows: Sequence[Sequence[Json]], uid: str, told: Told) -> bytes:
    heights = [_height(row, uid, told) for row in rows]
    figure = plt.figure(figsize=(WIDTH, sum(heights) + 0.95), dpi=DPI, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.06)
    head, *lines = figure.subfigures(len(rows) + 2, 1, height_ratios=[0.4, *heights, 0.5], squeeze=False)[:, 0]
    head.text(0.012, 0.5, title, fontsize=14, weight="bold", va="center")
    for row, line in zip(rows, lines[:-1], strict=True):
        for panel, axes in zip(row, line.subplots(1, len(row), squeeze=False)[0], strict=True):
            answers = [
                (target, told.answers[f"{uid} / {panel['title']} / {target['refId']}"]) for target in panel["targets"]
            ]
            _DRAWN[panel["type"]](axes, panel, answers, told)
    faults = "   ".join(f"{number} {phase.name}" for number, phase in enumerate(told.faults, 1))
    lines[-1].text(0.012, 0.7, faults, fontsize=9, color=TEXT, va="center")
    lines[-1].text(
        0.012,
        0.25,
        "Drawn by matplotlib from the dashboard's own queries, as a real Prometheus answered them; not a screenshot.",
        fontsize=8,
        color=FAINT,
        va="center",
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, metadata={"Software": None})
    plt.close(figure)
    # A palette is enough for flat colours, and a third of the bytes.
    image = Image.open(buffer).convert("RGB").quantize(128, dither=Image.Dither.NONE)
    small = io.BytesIO()
    image.save(small, "png", optimize=True)
    return small.getvalue()


def _height(row: Sequence[Json], uid: str, told: Told) -> float:
    """In inches: a timeline needs room for its bands."""
    kinds = {panel["type"] for panel in row}
    if kinds == {"stat"}:
        return 0.95
    if kinds == {"state-timeline"}:
        return 0.6 + 0.27 * len(told.answers[f"{uid} / {row[0]['title']} / A"])
    return 2.5


# -- panels ------------------------------------------------------------------------------------------------------------


def _lines(axes: Any, panel: Json, answers: Sequence[tuple[Json, Sequence[Series]]], told: Told) -> None:
    custom = panel["fieldConfig"]["defaults"]["custom"]
    fixed, dashed = _overrides(panel)
    palette = itertools.cycle(CLASSIC)
    found = sorted(
        ((_name(target, series), series) for target, all_ in answers for series in all_ if any(series.values)),
        key=lambda one: one[0],
    )
    times = _times(told)
    if custom["stacking"]["mode"] == "normal":
        colours = [fixed.get(name) or next(palette) for name, _ in found]
        heights = [[value if not math.isnan(value) else 0 for value in _on(times, s)] for _, s in found]
        axes.stackplot(times, heights, labels=[name for name, _ in found], colors=colours, alpha=0.75, linewidth=0)
    else:
        for name, series in found:
            is_dashed = bool(dashed and re.search(dashed, name))
            axes.plot(
                times,
                _on(times, series),
                label=name,
                color=fixed.get(name) or next(palette),
                linewidth=1.4,
                linestyle=(0, (5, 4)) if is_dashed else "-",
            )
    if custom["thresholdsStyle"]["mode"] == "dashed":
        for step in panel["fieldConfig"]["defaults"]["thresholds"]["steps"][1:]:
            axes.axhline(step["value"], color=_colour(step["color"]), linewidth=1, linestyle=(0, (5, 4)))
    axes.set_ylim(bottom=0)
    if axes.get_ylim()[1] <= 0 or not found:
        axes.set_ylim(0, 1)
    axes.margins(y=0.08)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _text(value, panel)))
    axes.grid(visible=True, linewidth=0.6)
    _in_time(axes, panel, told)
    if found:
        names = [name for name, _ in found]
        columns = max(
            1,
            min(
                len(names),
                int(
                    62 * axes.get_subplotspec().get_position(axes.figure).width / (max(map(len, names)) * 0.62 + 2) * 2
                ),
            ),
        )
        axes.legend(
            loc="upper center",
            bbox_to_anchor=(0.5, -0.11),
            ncols=columns,
            fontsize=7.5,
            frameon=False,
            labelcolor=FAINT,
            handlelength=1.1,
            columnspacing=1.2,
            borderpad=0,
        )


def _timeline(axes: Any, panel: Json, answers: Sequence[tuple[Json, Sequence[Series]]], told: Told) -> None:
    (mapping,) = panel["fieldConfig"]["defaults"]["mappings"]
    states = {int(value): (state["text"], _colour(state["color"])) for value, state in mapping["options"].items()}
    found = sorted(
        ((_name(target, series), series) for target, all_ in answers for series in all_), key=lambda one: one[0]
    )
    times = _times(told)
    for row, (_, series) in enumerate(reversed(found)):
        values = _on(times, series)
        at = 0
        for value, run in itertools.groupby(values, key=lambda v: None if math.isnan(v) else int(v)):
            length = len(list(run))
            start, at = at, at + length
            if value is None:
                continue
            text, colour = states.get(value, (str(value), FAINT))
            end = times[at] if at < len(times) else times[-1]
            axes.broken_barh([(times[start], end - times[start])], (row - 0.4, 0.8), facecolors=colour, alpha=0.85)
            if end - times[start] > 0.016 * (told.end - told.start) * len(text):
                axes.text(times[start] + 0.6, row, text, fontsize=7.5, color="#000000", va="center", clip_on=True)
    axes.set_yticks(range(len(found)), [name for name, _ in reversed(found)], fontsize=8, color=TEXT)
    axes.set_ylim(-0.6, len(found) - 0.4)
    _in_time(axes, panel, told)


def _bars(axes: Any, panel: Json, answers: Sequence[tuple[Json, Sequence[Series]]], told: Told) -> None:
    by = panel["options"]["xField"]
    values = {target["legendFormat"]: {series.labels[by]: series.last for series in all_} for target, all_ in answers}
    places = sorted({place for one in values.values() for place in one}, reverse=True)
    height = 0.8 / len(values)
    for number, (name, numbers) in enumerate(values.items()):
        offsets = [place + 0.4 - height * (number + 0.5) for place in range(len(places))]
        drawn = axes.barh(
            offsets,
            [numbers.get(place, 0) for place in places],
            height * 0.9,
            label=name,
            color=CLASSIC[number],
            alpha=0.8,
        )
        axes.bar_label(
            drawn,
            [_text(numbers[p], panel, exact=True) if p in numbers else "" for p in places],
            padding=3,
            fontsize=7.5,
        )
    axes.set_yticks(range(len(places)), [place.replace("  ", "\n") for place in places], fontsize=7.5, color=TEXT)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _text(value, panel)))
    axes.margins(x=0.15)
    axes.grid(visible=True, axis="x", linewidth=0.6)
    axes.set_title(panel["title"], loc="left", fontsize=10, color=TEXT)
    axes.legend(loc="lower right", fontsize=7.5, frameon=False, labelcolor=FAINT)


def _stat(axes: Any, panel: Json, answers: Sequence[tuple[Json, Sequence[Series]]], told: Told) -> None:
    defaults = panel["fieldConfig"]["defaults"]
    series = answers[0][1]
    value = series[0].last if series else math.nan
    colour = COLOURS["blue"]
    for step in defaults["thresholds"]["steps"]:
        if step["value"] is None or value >= step["value"]:
            colour = _colour(step["color"])
    text = _text(value, panel, exact=True)
    for mapping in defaults["mappings"]:
        if state := mapping["options"].get(f"{value:g}"):
            text, colour = state["text"], _colour(state["color"])
    times = _times(told)
    if series:
        numbers = _on(times, series[0])
        axes.fill_between(times, numbers, color=colour, alpha=0.25, linewidth=0)
        axes.set_ylim(0, 2.4 * max([number for number in numbers if not math.isnan(number)] or [1]) or 1)
    axes.set_xlim(told.start, told.end)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.text(
        0.5, 0.62, text, transform=axes.transAxes, fontsize=17, color=colour, ha="center", va="center", weight="bold"
    )
    axes.set_title(panel["title"], loc="left", fontsize=8.5, color=TEXT)


_DRAWN = {"timeseries": _lines, "state-timeline": _timeline, "barchart": _bars, "stat": _stat}


# -- parts -------------------------------------------------------------------------------------------------------------


def _in_time(axes: Any, panel: Json, told: Told) -> None:
    axes.set_xlim(told.start, told.end)
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda at, _: f"{int(at - told.start) // 60}:{int(at - told.start) % 60:02}")
    )
    axes.set_xticks([told.start + second for second in range(0, int(told.end - told.start), 30)])
    axes.tick_params(labelsize=7.5, length=0)
    axes.set_title(panel["title"], loc="left", fontsize=10, color=TEXT)
    for number, phase in enumerate(told.faults, 1):
        axes.axvspan(
            phase.start, phase.end, color="#ffffff", alpha=0.05 if number % 2 else 0.025, linewidth=0, zorder=0
        )
        axes.text(
            (phase.start + max(phase.end, phase.start + 3)) / 2,
            1.01,
            str(number),
            transform=axes.get_xaxis_transform(),
            fontsize=7.5,
            color=FAINT,
            ha="center",
            va="bottom",
        )
    for name, series in told.marks.items():
        colour = COLOURS["red" if "Epoch" in name else "blue"]
        for at in sorted({at for one in series for at, _ in one.points}):
            axes.axvline(at, color=colour, linewidth=0.7, alpha=0.35, zorder=0)


def _times(told: Told) -> list[float]:
    return [told.start + half / 2 for half in range(int(2 * (told.end - told.start)) + 1)]


def _on(times: Sequence[float], series: Series) -> list[float]:
    """The values at those times; not a number where there is none."""
    known = {round(2 * at): value for at, value in series.points}
    return [known.get(round(2 * at), math.nan) for at in times]


def _name(target: Json, series: Series) -> str:
    if target["legendFormat"] == "__auto":
        return " ".join(value for label, value in series.labels.items() if label != "__name__")
    return re.sub(r"{{(\w+)}}", lambda label: series.labels.get(label[1], ""), target["legendFormat"])


def _overrides(panel: Json) -> tuple[dict[str, str], str]:
    """Colours by name, and the pattern of names that are dashed."""
    fixed, dashed = {}, ""
    for override in panel["fieldConfig"]["overrides"]:
        properties = {one["id"]: one["value"] for one in override["properties"]}
        if "color" in properties:
            fixed[override["matcher"]["options"]] = _colour(properties["color"]["fixedColor"])
        if "custom.lineStyle" in properties:
            dashed = override["matcher"]["options"].strip("/")
    return fixed, dashed


def _colour(name: str) -> str:
    return COLOURS.get(name, name)


def _text(value: float, panel: Json, *, exact: bool = False) -> str:
    """A number with its unit, in short."""
    unit, decimals = panel["fieldConfig"]["defaults"]["unit"], panel["fieldConfig"]["defaults"].get("decimals")
    if math.isnan(value):
        return "no data"
    if unit == "percentunit":
        return f"{100 * value:.{1 if exact else 0}f} %"
    if unit == "s":
        return f"{value:g} s" if value == 0 or value >= 1 else f"{1000 * value:.3g} ms"
    shown = (
        f"{value / 1000:.3g} k"
        if abs(value) >= 1000
        else f"{value:.{decimals}f}"
        if decimals is not None
        else f"{value:.3g}"
    )
    return shown + {"reqps": " /s", "ops": " /s", "cps": " /s"}.get(unit, "")
