"""What a measurement shows: a table, a curve, and verdicts against bounds; and the report of them all."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

Point = tuple[float, float]


class Table(msgspec.Struct, frozen=True, kw_only=True):
    """Rows for people; the first cell names the row."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        """The table in Markdown, numbers to the right."""
        lines = [
            "| " + " | ".join(self.columns) + " |",
            "|" + "|".join(["---", *["--:"] * (len(self.columns) - 1)]) + "|",
            *("| " + " | ".join(row) + " |" for row in self.rows),
        ]
        return "\n".join(lines)


class Plot(msgspec.Struct, frozen=True, kw_only=True):
    """Curves over one axis, by name. A curve may have gaps between its points, no order is assumed."""

    name: str
    """Of the picture's file."""
    x: str
    y: str
    curves: dict[str, list[Point]]
    is_log: bool = True
    """Both axes are logarithmic."""


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """A figure held against its bound."""

    claim: str
    figure: float
    bound: float
    unit: str = ""

    @property
    def holds(self) -> bool:
        """True when the figure is not beyond the bound."""
        return self.figure <= self.bound

    def row(self) -> tuple[str, str, str, str]:
        """As cells of a table."""
        return self.claim, f"{self.figure:.4g} {self.unit}".strip(), f"{self.bound:.4g}", "yes" if self.holds else "NO"


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """One question, and what was found."""

    title: str
    text: str
    tables: tuple[Table, ...] = ()
    plots: tuple[Plot, ...] = ()
    verdicts: tuple[Verdict, ...] = ()
    notes: tuple[str, ...] = ()


def slope(points: Sequence[Point]) -> float:
    """How much y rises for each x, by least squares; 0 where there is only one x."""
    count = len(points)
    if not count:
        return 0.0
    mean_x = sum(x for x, _ in points) / count
    mean_y = sum(y for _, y in points) / count
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else 0.0


def growth(points: Sequence[Point]) -> float:
    """How many times as much the greatest x costs as the least one."""
    ordered = sorted(points)
    return ordered[-1][1] / ordered[0][1] if ordered[0][1] else float("inf")


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which that share lies, 0 without any."""
    ordered = sorted(values) or [0.0]
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def report(parts: Sequence[Part], heading: str, pictures: Sequence[str]) -> str:
    """All of it in Markdown; `pictures` are the names of the plots that were drawn, as SVG files beside the report."""
    verdicts = [verdict for part in parts for verdict in part.verdicts]
    failed = sum(not verdict.holds for verdict in verdicts)
    overview = Table(columns=("claim", "measured", "bound", "holds"), rows=tuple(v.row() for v in verdicts))
    lines = [
        "# How costs grow",
        "",
        heading,
        "",
        f"{len(verdicts) - failed} of {len(verdicts)} bounds hold.",
        "",
        overview.markdown(),
    ]
    for part in parts:
        lines += ["", f"## {part.title}", "", part.text]
        for table in part.tables:
            lines += ["", table.markdown()]
        for plot in part.plots:
            if plot.name in pictures:
                lines += ["", f"![{plot.y} against {plot.x}](growth-{plot.name}.svg)"]
        if part.notes:
            lines += ["", *(f"- {note}" for note in part.notes)]
    return "\n".join(lines) + "\n"
