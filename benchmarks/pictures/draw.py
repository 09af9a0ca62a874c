"""Panels drawn by matplotlib from their JSON: lines and areas, state timelines, bars, large numbers."""

from __future__ import annotations

import io
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import msgspec

mpl.use("agg")

import matplotlib.pyplot as plt
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator
from PIL import Image

from benchmarks.pictures.told import PICTURES, Told
from tests import dashboards
from tests.dashboards import Json
from tests.prometheus import Series

WIDTH, HEAD, FOOT, GAP, TITLE, DPI = 12.0, 0.5, 0.55, 0.1, 0.33, 100
"""Of a picture, its headline, its last lines, what is between panels, and their titles: in inches."""
BACK, PAPER, GRID, TEXT, FAINT = "#111217", "#181b1f", "#2c3235", "#d8d9da", "#9a9da1"
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
CLASSIC = (
    *("#73bf69", "#fade2a", "#8ab8ff", "#ff9830", "#f2495c", "#5794f2", "#b877d9", "#705da0", "#37872d", "#fade9a"),
    *("#447ebc", "#c15c17", "#890f02", "#0a437c", "#6d1f62", "#b7dbab", "#f4d598", "#70dbed", "#f9ba8f", "#f29191"),
)

Answers = Sequence[tuple[Json, Sequence[Series]]]
"""A panel's queries, each with its answer."""


class Box(msgspec.Struct, frozen=True, kw_only=True):
    """A place on the picture, in inches from its upper left corner."""

    left: float
    top: float
    width: float
    height: float


def all_of(read: Mapping[str, Json], told: Told, folder: Path) -> Iterator[tuple[str, int]]:
    """Draws every picture into the folder; each one's name and bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    plt.rcParams.update(
        {
            "font.size": 9,
            "text.color": TEXT,
            "axes.edgecolor": GRID,
            "axes.facecolor": PAPER,
            "figure.facecolor": BACK,
            "xtick.color": FAINT,
            "ytick.color": FAINT,
            "grid.color": GRID,
        }
    )
    for name, (uid, rows) in PICTURES.items():
        panels = {panel["title"]: panel for panel in dashboards.panels(read[uid])}
        data = _picture(uid, read[uid]["title"], [[panels[title] for title in row] for row in rows], told)
        file = folder / f"{name}.png"
        file.write_bytes(data)
        yield file.name, len(data)


def _picture(uid: str, title: str, rows: Sequence[Sequence[Json]], told: Told) -> bytes:
    widths = [(WIDTH - GAP) / len(row) - GAP for row in rows]
    looks = [
        [_look(panel, _answers(uid, panel, told), width) for panel in row]
        for row, width in zip(rows, widths, strict=True)
    ]
    heights = [max(look.height for look in row) for row in looks]
    whole = HEAD + sum(heights) + GAP * len(rows) + FOOT
    figure = plt.figure(figsize=(WIDTH, whole), dpi=DPI)
    figure.text(0.2 / WIDTH, 1 - 0.3 / whole, title, fontsize=14, weight="bold", va="center")
    top = HEAD
    for row, width, height in zip(looks, widths, heights, strict=True):
        for number, look in enumerate(row):
            box = Box(left=GAP + number * (width + GAP), top=top, width=width, height=height)
            left, bottom, *sides = _sides(box, whole)
            card = Rectangle((left, bottom), *sides, facecolor=PAPER, edgecolor=GRID, linewidth=0.8, zorder=-1)
            figure.add_artist(card)
            look.paint(figure.add_axes(_sides(_inner(box, look), whole)), told)
        top += height + GAP
    faults = "     ".join(f"{number}  {phase.name}" for number, phase in enumerate(told.faults, 1))
    figure.text(0.2 / WIDTH, 0.42 / whole, faults, fontsize=9, va="center")
    note = (
        "Blue lines: the configuration changed; red: a failover lost writes. Drawn by matplotlib from the dashboard's "
        "own queries, as a real Prometheus answered them; not a screenshot of Grafana."
    )
    figure.text(0.2 / WIDTH, 0.18 / whole, note, fontsize=8, color=FAINT, va="center")
    buffer = io.BytesIO()
    figure.savefig(buffer, metadata={"Software": None})
    plt.close(figure)
    # A palette is enough for flat colours, and a third of the bytes.
    image = Image.open(buffer).convert("RGB").quantize(128, dither=Image.Dither.NONE)
    small = io.BytesIO()
    image.save(small, "png", optimize=True)
    return small.getvalue()


def _answers(uid: str, panel: Json, told: Told) -> Answers:
    return [(target, told.answers[f"{uid} / {panel['title']} / {target['refId']}"]) for target in panel["targets"]]


# -- panels ------------------------------------------------------------------------------------------------------------


class Look(msgspec.Struct, frozen=True, kw_only=True):
    """How high a panel is, how much of it is left free beside its axes, in inches; and what draws on these."""

    height: float
    left: float
    right: float
    below: float
    paint: Callable[[Any, Told], None]


def _look(panel: Json, answers: Answers, width: float) -> Look:
    """Of a panel of that width."""
    match panel["type"]:
        case "timeseries":
            names = [name for name, _ in _shown(answers)]
            entry = 0.057 * max(map(len, names), default=1) + 0.38
            columns = min(max(1, int((width - 0.85) / entry)), max(1, len(names)))
            lines = math.ceil(len(names) / columns)
            return Look(
                height=2.3 + 0.14 * max(0, lines - 1),
                left=0.65,
                right=0.2,
                below=0.36 + 0.14 * lines,
                paint=lambda axes, told: _lines(axes, panel, answers, told, columns),
            )
        case "state-timeline":
            names = [_name(target, series) for target, all_ in answers for series in all_]
            return Look(
                height=0.75 + 0.24 * len(names),
                left=0.068 * max(map(len, names), default=1) + 0.25,
                right=0.2,
                below=0.3,
                paint=lambda axes, told: _timeline(axes, panel, answers, told),
            )
        case "barchart":
            places = {series.labels[panel["options"]["xField"]] for _, all_ in answers for series in all_}
            return Look(
                height=0.7 + 0.26 * len(places),
                left=0.062 * max(map(len, places), default=1) + 0.2,
                right=0.15,
                below=0.25,
                paint=lambda axes, _: _bars(axes, panel, answers),
            )
        case _:
            return Look(
                height=1.0,
                left=0.01,
                right=0.01,
                below=0.01,
                paint=lambda axes, told: _stat(axes, panel, answers, told),
            )


def _lines(axes: Any, panel: Json, answers: Answers, told: Told, columns: int) -> None:
    custom = panel["fieldConfig"]["defaults"]["custom"]
    fixed, dashed = _overrides(panel)
    palette = itertools.cycle(CLASSIC)
    found, times = _shown(answers), _times(told)
    colours = [fixed.get(name) or next(palette) for name, _ in found]
    if custom["stacking"]["mode"] == "normal":
        heights = [[0 if math.isnan(value) else value for value in _on(times, series)] for _, series in found]
        names = [name for name, _ in found]
        axes.stackplot(times, heights, labels=names, colors=colours, alpha=0.8, linewidth=0, zorder=2)
    else:
        for (name, series), colour in zip(found, colours, strict=True):
            is_dashed = bool(dashed and re.search(dashed, name))
            style = (0, (5, 4)) if is_dashed else "-"
            axes.plot(times, _on(times, series), label=name, color=colour, linewidth=1.3, linestyle=style)
    if custom["thresholdsStyle"]["mode"] == "dashed":
        for step in panel["fieldConfig"]["defaults"]["thresholds"]["steps"][1:]:
            axes.axhline(step["value"], color=_colour(step["color"]), linewidth=1, linestyle=(0, (5, 4)))
    axes.margins(y=0)
    axes.autoscale_view()
    axes.set_ylim(0, 1.15 * max(axes.get_ylim()[1], 1e-6) if found else 1)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _text(value, panel)))
    axes.grid(visible=True, linewidth=0.6)
    axes.set_axisbelow(True)
    _in_time(axes, panel, told)
    if found:
        axes.legend(
            loc="upper left",
            bbox_to_anchor=(-0.01, -0.23 / _inches(axes)[1]),
            ncols=columns,
            fontsize=7.5,
            frameon=False,
            labelcolor=FAINT,
            handlelength=1.1,
            handletextpad=0.4,
            columnspacing=1.0,
            labelspacing=0.25,
            borderpad=0,
            borderaxespad=0,
        )


def _timeline(axes: Any, panel: Json, answers: Answers, told: Told) -> None:
    (mapping,) = panel["fieldConfig"]["defaults"]["mappings"]
    states = {int(value): (state["text"], _colour(state["color"])) for value, state in mapping["options"].items()}
    found = [(_name(target, series), series) for target, all_ in answers for series in all_]
    found.sort(key=lambda one: one[0], reverse=True)
    times, second = _times(told), _inches(axes)[0] / (told.end - told.start)
    for row, (_, series) in enumerate(found):
        at = 0
        for value, run in itertools.groupby(_on(times, series), key=lambda v: None if math.isnan(v) else int(v)):
            start, at = at, at + len(list(run))
            if value is None:
                continue
            text, colour = states.get(value, (str(value), FAINT))
            length = times[min(at, len(times) - 1)] - times[start]
            axes.broken_barh([(times[start], length)], (row - 0.4, 0.8), facecolors=colour, alpha=0.85)
            if length * second > 0.07 * len(text) + 0.08:
                axes.text(times[start] + 0.05 / second, row, text, fontsize=7.5, color="#000000", va="center")
    axes.set_yticks(range(len(found)), [name for name, _ in found])
    axes.set_ylim(-0.6, len(found) - 0.4)
    _in_time(axes, panel, told)


def _bars(axes: Any, panel: Json, answers: Answers) -> None:
    by = panel["options"]["xField"]
    values = {target["legendFormat"]: {series.labels[by]: series.last for series in all_} for target, all_ in answers}
    places = sorted({place for one in values.values() for place in one}, reverse=True)
    height = 0.8 / len(values)
    for number, (name, numbers) in enumerate(values.items()):
        offsets = [place + 0.4 - height * (number + 0.5) for place in range(len(places))]
        lengths = [numbers.get(place, 0) for place in places]
        bars = axes.barh(offsets, lengths, height * 0.92, label=name, color=CLASSIC[number], alpha=0.8)
        told = [_text(numbers[place], panel, exact=True) if place in numbers else "" for place in places]
        axes.bar_label(bars, told, padding=3, fontsize=7)
    axes.set_yticks(range(len(places)), places)
    axes.set_ylim(-0.6, len(places) - 0.4)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _text(value, panel)))
    axes.margins(x=0.12)
    axes.grid(visible=True, axis="x", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=7.5, length=0)
    axes.set_title(panel["title"], loc="left", fontsize=10, color=TEXT)
    place = {"loc": "lower right", "bbox_to_anchor": (1, 1), "ncols": len(values)}
    axes.legend(**place, fontsize=7.5, frameon=False, labelcolor=FAINT, handlelength=1.1)


def _stat(axes: Any, panel: Json, answers: Answers, told: Told) -> None:
    defaults = panel["fieldConfig"]["defaults"]
    ((_, series), *_) = answers
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
    axes.set_axis_off()
    middle = {"transform": axes.transAxes, "ha": "center", "va": "center", "weight": "bold"}
    axes.text(0.5, 0.62, text, fontsize=17, color=colour, **middle)
    axes.set_title(f" {panel['title']}", loc="left", fontsize=8.5, color=TEXT)


# -- parts -------------------------------------------------------------------------------------------------------------


def _inner(box: Box, look: Look) -> Box:
    """Where in a panel, below its title, the axes are."""
    return Box(
        left=box.left + look.left,
        top=box.top + TITLE,
        width=box.width - look.left - look.right,
        height=box.height - TITLE - look.below,
    )


def _sides(box: Box, whole: float) -> tuple[float, float, float, float]:
    """As parts of a figure of that height: left, bottom, width, height."""
    return box.left / WIDTH, 1 - (box.top + box.height) / whole, box.width / WIDTH, box.height / whole


def _in_time(axes: Any, panel: Json, told: Told) -> None:
    """The axis of time, the title, what happened when."""
    axes.set_xlim(told.start, told.end)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda at, _: _clock(at - told.start)))
    axes.set_xticks([told.start + second for second in range(0, int(told.end - told.start), 30)])
    axes.tick_params(labelsize=7.5, length=0)
    axes.set_title(panel["title"], loc="left", fontsize=10, color=TEXT)
    is_inside = panel["type"] == "timeseries"  # There is room above lines, and none above bands.
    where = {"transform": axes.get_xaxis_transform(), "ha": "center", "va": "top" if is_inside else "bottom"}
    for number, phase in enumerate(told.faults, 1):
        tint = 0.06 if number % 2 else 0.03
        axes.axvspan(phase.start, phase.end, color="#ffffff", alpha=tint, linewidth=0, zorder=0)
        axes.text(
            (phase.start + phase.end) / 2, 0.98 if is_inside else 1.01, str(number), fontsize=7.5, color=FAINT, **where
        )
    for name, series in told.marks.items():
        colour = COLOURS["red" if "Epoch" in name else "blue"]
        # The first of those that stand beside each other.
        found = sorted({at for one in series for at, _ in one.points})
        for before, at in itertools.pairwise([-math.inf, *found]):
            if at - before > 3:
                axes.axvline(at, color=colour, linewidth=0.9, alpha=0.8, zorder=1)


def _inches(axes: Any) -> tuple[float, float]:
    """How wide and high the axes are."""
    box = axes.get_position()
    width, height = axes.figure.get_size_inches()
    return box.width * width, box.height * height


def _clock(seconds: float) -> str:
    return f"{round(seconds) // 60}:{round(seconds) % 60:02}"


def _shown(answers: Answers) -> list[tuple[str, Series]]:
    """The series of all queries by name, but for those that are zero all the time, if others are not."""
    found = [(_name(target, series), series) for target, all_ in answers for series in all_]
    moving = [one for one in found if any(one[1].values)]
    return sorted(moving or found, key=lambda one: one[0])


def _times(told: Told) -> list[float]:
    return [told.start + half / 2 for half in range(int(2 * (told.end - told.start)) + 1)]


def _on(times: Sequence[float], series: Series) -> list[float]:
    """The values at those times; not a number where there is none."""
    known = {round(2 * (at - times[0])): value for at, value in series.points}
    return [known.get(round(2 * (at - times[0])), math.nan) for at in times]


def _name(target: Json, series: Series) -> str:
    if target["legendFormat"] == "__auto":
        return " ".join(value for label, value in series.labels.items() if label != "__name__") or "value"
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
    if abs(value) >= 1000:
        shown = f"{value / 1000:.3g} k"
    else:
        shown = f"{value:.3g}" if decimals is None else f"{value:.{decimals}f}"
    return shown + {"reqps": " /s", "ops": " /s", "cps": " /s"}.get(unit, "")
