"""Numbers and tables in Markdown."""

from __future__ import annotations

from collections.abc import Sequence

NOTHING = "–"


def number(value: float | None, digits: int = 1) -> str:
    """The number with so many decimals and thin thousands; a dash for none."""
    if value is None:
        return NOTHING
    return f"{value:,.{digits}f}".replace(",", " ")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first are numbers, and stand to the right."""
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
