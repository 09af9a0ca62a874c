"""Measures us beside others: `python -m benchmarks.bench [--only NAME,…] [--rounds N] [--seconds S] [--phases WORD,…]`.

All of it takes 20 minutes; BENCH_QUICK=1, or --quick, takes 3.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType

from benchmarks.bench import contestants, measuring, ours, processes, report, rounds, site
from benchmarks.bench.contestants import Contestant
from benchmarks.bench.figures import Figures
from benchmarks.bench.measuring import PHASES, PHASES_BY_WORD, STREAM, Row
from benchmarks.bench.rounds import Plan
from benchmarks.bench.targets import OURS, targets

_ROUNDS, _SECONDS = 3, 1.6
_QUICK_ROUNDS, _QUICK_SECONDS = 1, 1.0


def say(line: str) -> None:
    """Progress, beside the report."""
    print(line, file=sys.stderr, flush=True)


def main(options: argparse.Namespace) -> int:
    """Measures and reports; 0 unless nothing of ours could be measured."""
    processes.cores()
    plan = Plan(
        rounds=options.rounds or (_QUICK_ROUNDS if options.quick else _ROUNDS),
        seconds=options.seconds or (_QUICK_SECONDS if options.quick else _SECONDS),
        phases=tuple(PHASES_BY_WORD[word] for word in options.phases) if options.phases else PHASES,
    )
    with site.opened() as place, rounds.field(place, say) as field:
        rows, evidence = _measure(place, field, options.only or list(contestants.ALL), plan)
        missing = field.missing
    found = Figures(rows)
    print("\n".join(["", *(f"- {line}" for line in (*ours.switches(ours.ALL), *evidence)), ""]))
    print(report.contestants_table(found, missing) + "\n")
    print(report.streams_table(found, missing) + "\n")
    if OURS in found.contestants:
        print(report.redis_table(found) + "\n")
        print(report.targets_table(targets(found)) + "\n")
    for each in missing:
        print(f"- not measured: {each.name}: {each.reason}")
    for name in found.contestants:
        if found.wrong(name):
            print(f"- {name}: {found.wrong(name)} answers were wrong; one said: {found.complaint(name)[:200]}")
    if options.json:
        rounds.write_rows(Path(options.json), rows)
    return 0 if OURS in found.contestants or OURS not in (options.only or [OURS]) else 1


def _measure(place: site.Site, field: rounds.Field, names: list[str], plan: Plan) -> tuple[list[Row], list[str]]:
    evidence: list[str] = []

    def check(contestant: Contestant) -> None:
        def serve() -> None:
            measuring.run_load(place, contestant, STREAM, 1.0)

        evidence.extend(ours.check(contestant.redis_url, ours.ALL, serve))

    for name in names:
        field.add(contestants.ALL[name](place), check if name == OURS else None)
    return list(field.run(plan)), evidence


def _end(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _words(known: Iterable[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        words = [word for word in text.split(",") if word]
        if unknown := [word for word in words if word not in known]:
            raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; there are {', '.join(known)}")
        return words

    return parse


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", type=_words(contestants.ALL), help=", ".join(contestants.ALL))
    parser.add_argument("--phases", type=_words(PHASES_BY_WORD), help=", ".join(PHASES_BY_WORD))
    parser.add_argument("--rounds", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=0.0, help="of each phase, after its warm-up")
    parser.add_argument("--quick", action="store_true", default=bool(os.environ.get("BENCH_QUICK")))
    parser.add_argument("--json", default="", help="file for the rows")
    signal.signal(signal.SIGTERM, _end)
    try:
        sys.exit(main(parser.parse_args()))
    except KeyboardInterrupt:
        sys.exit("stopped")
