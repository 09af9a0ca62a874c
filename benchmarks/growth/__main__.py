"""Measures how costs grow: `python -m benchmarks.growth [--quick] [--only NAME …] [--into FOLDER]`.

Writes `growth.md` and its plots into the folder, and prints every bound; 0 only if all of them hold. GROWTH_QUICK=1 in
the environment is `--quick`: three minutes instead of a quarter of an hour, and smaller numbers.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from balancer import log
from benchmarks.growth import configured, connected, leaks, path, plots, scripts
from benchmarks.growth.figures import Part, report

QUESTIONS: dict[str, Callable[[bool], list[Part]]] = {
    "scripts": lambda is_quick: scripts.measure(is_quick=is_quick),
    "configured": lambda is_quick: asyncio.run(configured.measure(is_quick=is_quick)),
    "connected": lambda is_quick: asyncio.run(connected.measure(is_quick=is_quick)),
    "path": lambda is_quick: asyncio.run(path.measure(is_quick=is_quick)),
    "leaks": lambda is_quick: asyncio.run(leaks.measure(is_quick=is_quick)),
}
RESULTS = Path(__file__).resolve().parent.parent / "results"


def main(options: argparse.Namespace) -> int:
    """Asks every question; 0 if all bounds hold."""
    log.configure("error")
    # Raised wherever we are, so that every process that we have started is ended first.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    began = time.monotonic()
    parts: list[Part] = []
    for name in options.only:
        since = time.monotonic()
        found = QUESTIONS[name](options.quick)
        parts += found
        print(f"{name}: {time.monotonic() - since:.0f} s", flush=True)
        for verdict in (verdict for part in found for verdict in part.verdicts):
            claim, figure, bound, _ = verdict.row()
            print(f"  {'ok  ' if verdict.holds else 'OVER'} {claim}: {figure} (bound {bound})", flush=True)
    folder = Path(options.into)
    folder.mkdir(parents=True, exist_ok=True)
    pictures = plots.draw([plot for part in parts for plot in part.plots], folder)
    size = "quick" if options.quick else "full"
    heading = (
        f"`make growth`, {size} run of {time.monotonic() - began:.0f} s; Python {platform.python_version()} on "
        f"{os.cpu_count()} cores that others may have used too."
    )
    (folder / "growth.md").write_text(report(parts, heading, pictures), encoding="utf-8")
    over = sum(not verdict.holds for part in parts for verdict in part.verdicts)
    print(f"{sum(len(part.verdicts) for part in parts)} bounds, {over} not held: {'GROWS' if over else 'HOLDS'}")
    return 1 if over else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", default=os.environ.get("GROWTH_QUICK", "") not in ("", "0"))
    parser.add_argument("--only", nargs="+", choices=tuple(QUESTIONS), default=list(QUESTIONS))
    parser.add_argument("--into", default=str(RESULTS), help="folder for the report and its plots")
    sys.exit(main(parser.parse_args()))
