"""Runs the chaos: `python -m benchmarks.chaos [--store NAME …] [--soak MINUTES] [--seed N] [--json FILE]`.

0 only if every bar is met on every store.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from pathlib import Path

import msgspec

from balancer import log
from benchmarks.chaos import report, stores
from benchmarks.chaos.run import Options, Run

_RATE, _SOAK_RATE = 60.0, 25.0
_SOAK_EVERY_S = 15.0


async def main(options: argparse.Namespace) -> int:
    """Runs it on every store; 0 if all is as it should be."""
    log.configure("error")
    reports = []
    for kind in options.store[:1] if options.soak else options.store:
        chosen = Options(
            seed=options.seed,
            per_s=options.rate or (_SOAK_RATE if options.soak else _RATE),
            calm_s=options.calm,
            overlap_s=options.overlap,
            lasts_s=options.lasts,
            pause_s=options.pause,
            every_s=_SOAK_EVERY_S if options.soak else options.every,
            has_sequence=not options.overlap_only,
            rest_s=options.rest,
            soak_s=options.soak * 60,
            logs=options.logs,
        )
        reports.append(await Run(kind, chosen).run())
        report.show(reports[-1])
    if options.json:
        _write(Path(options.json), reports)
    requests = sum(each.requests for each in reports)
    errors = sum(count for each in reports for count in each.errors.values())
    orphans = sum(len(each.without_cause) for each in reports)
    is_right = all(each.is_right for each in reports)
    print(f"{requests} requests, {errors} errors with a cause, {orphans} without: {'STANDS' if is_right else 'FALLS'}")
    return 0 if is_right else 1


def _write(path: Path, reports: list[report.Report]) -> None:
    path.write_bytes(msgspec.json.format(msgspec.json.encode(reports)) + b"\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", nargs="+", choices=stores.KINDS, default=list(stores.KINDS))
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(3), "big"))
    parser.add_argument("--rate", type=float, default=0.0, help="requests a second")
    parser.add_argument("--calm", type=float, default=30.0, help="seconds before the first fault")
    parser.add_argument("--lasts", type=float, default=4.0, help="seconds that a fault lasts, about")
    parser.add_argument("--pause", type=float, default=4.0, help="seconds between faults that come by themselves")
    parser.add_argument("--overlap-only", action="store_true", help="no faults one after the other")
    parser.add_argument("--overlap", type=float, default=120.0, help="seconds of faults that overlap")
    parser.add_argument("--every", type=float, default=4.0, help="seconds from one overlapping fault to the next")
    parser.add_argument("--rest", type=float, default=35.0, help="seconds until workers at rest are measured")
    parser.add_argument("--soak", type=float, default=0.0, help="minutes of overlapping faults instead of all that")
    parser.add_argument("--logs", default="", help="folder in which the fleets' logs are kept")
    parser.add_argument("--json", default="", help="file for the reports")
    sys.exit(asyncio.run(main(parser.parse_args())))
