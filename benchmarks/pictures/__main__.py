"""Pictures of the dashboards for the README: no screenshots, but their own queries, asked of a real Prometheus.

The fleet of the dashboards' test (`tests/fleet/watched.py`) lives for some three minutes: calm, every fault, mended.
What its panels show is drawn by matplotlib from the dashboards' JSON into docs/pictures. `--keep FILE` writes down what
Prometheus said, `--from FILE` draws that again.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import tempfile
import time
from pathlib import Path

import msgspec

from benchmarks.pictures.told import Told
from tests import dashboards
from tests.dashboards import ROOT, filled
from tests.fleet.watched import NAMESPACE, Pace, watched
from tests.prometheus import Series

FOLDER = ROOT / "docs" / "pictures"
PACE = Pace(calm_s=75, fault_s=12, after_s=35, streak=30, window_s=30, window_tokens=15000, cooldown_s=5)
STEP_S = 0.5
INTERVALS = {"namespace": NAMESPACE, "__rate_interval": "5s", "__interval": "500ms"}


async def lived() -> Told:
    """What Prometheus says after the fleet has lived."""
    with tempfile.TemporaryDirectory(prefix="b-") as name:
        async with watched(Path(name), PACE) as fleet:
            print("the fleet runs; it lives for some three minutes")
            began = time.time()
            await fleet.live()
            end = time.time()
            (calm,) = (phase for phase in fleet.phases if phase.name == "calm")
            values = {**INTERVALS, "__range": f"{round(calm.end - began)}s"}
            server, read = fleet.prometheus, dashboards.read()

            async def over(expr: str) -> list[Series]:
                return _numbers(await server.query_range(expr, began, end, STEP_S))

            answers = {}
            for one in dashboards.asked(read):
                expr = filled(one.expr, values)
                # What is asked at once is asked where the calm ends: the faults would hide what is meant to be seen.
                at_once = one.target["instant"]
                answers[one.where] = _numbers(await server.query(expr, calm.end)) if at_once else await over(expr)
            marks = {
                mark["name"]: await over(filled(mark["expr"], values).replace("[2m]", "[1s]"))
                for mark in read["balancer-overview"]["annotations"]["list"]
            }
            return Told(start=began, end=end, phases=fleet.phases, answers=answers, marks=marks)


def _numbers(found: list[Series]) -> list[Series]:
    """Without the times at which there was none."""
    kept = [tuple((at, value) for at, value in series.points if not math.isnan(value)) for series in found]
    return [Series(labels=series.labels, points=points) for series, points in zip(found, kept, strict=True) if points]


def main() -> None:
    """Lives, asks, draws."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", type=Path, help="write down what Prometheus said")
    parser.add_argument("--from", dest="kept", type=Path, help="draw what was kept")
    options = parser.parse_args()
    told = msgspec.json.decode(options.kept.read_bytes(), type=Told) if options.kept else asyncio.run(lived())
    if options.keep:
        options.keep.write_bytes(msgspec.json.encode(told))
    from benchmarks.pictures import draw

    for name, size in draw.all_of(dashboards.read(), told, FOLDER):
        print(f"{name}: {size // 1000} kB")


if __name__ == "__main__":
    main()
