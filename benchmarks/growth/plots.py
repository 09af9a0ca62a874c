"""Draws the curves, where matplotlib is installed (the extra `bench`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from benchmarks.growth.figures import Plot


def draw(plots: Sequence[Plot], folder: Path) -> list[str]:
    """The names of the plots that now lie in the folder as `growth-NAME.svg`; none without matplotlib."""
    try:
        import matplotlib as mpl
    except ImportError:
        print("not drawn: the plots (matplotlib is missing; `pip install -e .[bench]`)")
        return []
    mpl.use("svg")
    # The same figures give the same file.
    mpl.rcParams["svg.hashsalt"] = "growth"
    import matplotlib.pyplot as plt

    for plot in plots:
        figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
        axes.set_prop_cycle(color=mpl.colormaps["tab20" if len(plot.curves) > 10 else "tab10"].colors)
        for name, points in plot.curves.items():
            ordered = sorted(points)
            mark = "o" if len(ordered) < 20 else ""
            axes.plot([x for x, _ in ordered], [y for _, y in ordered], marker=mark, label=name, linewidth=1.2)
        if plot.is_log:
            axes.set_xscale("log")
            axes.set_yscale("log")
            values = [y for points in plot.curves.values() for _, y in points if y > 0] or [1.0]
            # Whole decades: what is flat looks flat.
            axes.set_ylim(10 ** math.floor(math.log10(min(values))), 10 ** math.ceil(math.log10(max(values)) + 0.01))
        else:
            axes.set_ylim(bottom=0)
        axes.set_xlabel(plot.x)
        axes.set_ylabel(plot.y)
        axes.grid(visible=True, alpha=0.3)
        if len(plot.curves) > 1:
            axes.legend(fontsize="small")
        figure.savefig(folder / f"growth-{plot.name}.svg", metadata={"Date": None})
        plt.close(figure)
    return [plot.name for plot in plots]
