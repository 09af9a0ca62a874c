"""Bars for those who would rather look: CPU by contestant, and by feature. Drawn only where matplotlib is installed."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.bench import features, figures
from benchmarks.bench.measuring import SMALL, STREAM
from benchmarks.bench.run import Found

_OURS, _OTHERS = "#1f6f54", "#9aa5ab"


def draw(folder: Path, found: Found) -> list[Path]:
    """The files drawn, none without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        print("no plots: matplotlib is not installed (`make bench` installs it)")
        return []
    drawn = []
    if found.contestants:
        beside = found.contestants.figures
        for name, title, phase, value in (
            ("bench-requests", "requests a second, 32 connections", SMALL, figures.per_s),
            ("bench-cpu", "CPU for a request, µs", SMALL, figures.cpu_us),
            ("bench-streams", "CPU for a stream of 51 events, µs", STREAM, figures.cpu_us),
        ):
            bars = [(each, beside.median(each, phase, value)) for each in beside.contestants if each != "direct"]
            drawn.append(_bars(folder / f"{name}.svg", title, bars, is_logarithmic=True))
    if found.features:
        alone = found.features.figures
        names = [variant.name for variant in features.VARIANTS if variant.name in alone.contestants]
        bars = [(name, alone.median(name, SMALL, figures.cpu_us)) for name in names]
        title = "CPU for a request by feature, µs"
        drawn.append(_bars(folder / "bench-features.svg", title, bars, is_logarithmic=False))
    return drawn


def _bars(path: Path, title: str, bars: Sequence[tuple[str, float | None]], *, is_logarithmic: bool) -> Path:
    matplotlib: Any = importlib.import_module("matplotlib")
    matplotlib.use("svg")
    # The same rows give the same file, byte for byte.
    matplotlib.rcParams.update({"svg.hashsalt": "bench", "font.size": 9})
    pyplot: Any = importlib.import_module("matplotlib.pyplot")
    known = [(name, value) for name, value in bars if value]
    names = [name for name, _ in known]
    figure, axes = pyplot.subplots(figsize=(7, 0.6 + 0.32 * len(known)), layout="constrained")
    colours = [_OURS if name.startswith("ours") or not is_logarithmic else _OTHERS for name in names]
    drawn = axes.barh(names, [value for _, value in known], color=colours)
    axes.bar_label(drawn, labels=[f"{value:,.0f}" for _, value in known], padding=3)
    axes.invert_yaxis()
    axes.set_title(title, loc="left")
    if is_logarithmic:
        axes.set_xscale("log")
    axes.margins(x=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return path
