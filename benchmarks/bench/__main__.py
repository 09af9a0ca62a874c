"""Measures us beside others, and each feature of ours: `python -m benchmarks.bench`, or `make bench`.

`[--parts PART,…] [--only CONTESTANT,…] [--phases WORD,…] [--rounds N] [--seconds S] [--results FOLDER]`

All of it takes some 20 minutes; with BENCH_QUICK=1, or --quick, 4. A run of all parts and contestants is written to
benchmarks/results; others are printed, unless `--results` names a folder.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType

from benchmarks.bench import about, contestants, features, processes, report, run, site
from benchmarks.bench.measuring import PHASES, PHASES_BY_WORD
from benchmarks.bench.rounds import Plan
from benchmarks.bench.targets import OURS

PARTS = ("contestants", "features", "loops", "workers")
_FULL = Plan(rounds=3, seconds=1.6, phases=PHASES)
_FEATURE_ROUNDS, _FEATURE_SECONDS = 5, 1.2
_QUICK = Plan(rounds=1, seconds=0.6, phases=PHASES)


def say(line: str) -> None:
    """Progress, beside the report."""
    print(line, file=sys.stderr, flush=True)


def main(options: argparse.Namespace) -> int:
    """Measures and reports; 0 unless nothing of ours could be measured."""
    if options.readme:
        print(report.readme_part(report.read(Path(options.results or site.RESULTS) / "bench.json")))
        return 0
    processes.leave_the_contestant_alone()
    usual = _QUICK if options.quick else _FULL
    plan = Plan(
        rounds=options.rounds or usual.rounds,
        seconds=options.seconds or usual.seconds,
        phases=tuple(PHASES_BY_WORD[word] for word in options.phases) if options.phases else PHASES,
    )
    found = run.Found(about=about.of_this_run("benchmarks.bench", sys.argv[1:], plan.told, about.of_peers()))
    parts = options.parts or (("contestants",) if options.only else PARTS)
    with site.opened() as place:
        if "contestants" in parts:
            found.contestants = run.beside_others(place, options.only or list(contestants.ALL), plan, say)
        if "features" in parts:
            found.features = run.by_feature(place, _features_plan(options, plan), say)
        if "loops" in parts:
            found.loops = run.by_loop(place, plan, say)
        if "workers" in parts:
            found.workers = run.by_workers(place, plan, say)
    print(report.document(found))
    is_whole = tuple(parts) == PARTS and not options.only and not options.phases
    folder = Path(options.results) if options.results else site.RESULTS if is_whole else None
    if folder:
        report.write(folder, found)
        say(f"written: {folder}")
    measured = found.contestants.figures.contestants if found.contestants else [OURS]
    return 0 if OURS in measured or OURS not in (options.only or [OURS]) else 1


def _features_plan(options: argparse.Namespace, plan: Plan) -> Plan:
    """Differences between variants are small: more rounds, unless it has to be quick."""
    if options.quick:
        return run.with_phases(plan, features.PHASES[:1])
    rounds = options.rounds or _FEATURE_ROUNDS
    return Plan(rounds=rounds, seconds=min(plan.seconds, _FEATURE_SECONDS), phases=features.PHASES)


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=_words(PARTS), help=", ".join(PARTS))
    parser.add_argument("--only", type=_words(contestants.ALL), help=", ".join(contestants.ALL))
    parser.add_argument("--phases", type=_words(PHASES_BY_WORD), help=", ".join(PHASES_BY_WORD))
    parser.add_argument("--rounds", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=0.0, help="of each phase, after its warm-up")
    parser.add_argument("--quick", action="store_true", default=bool(os.environ.get("BENCH_QUICK")))
    parser.add_argument(
        "--readme", action="store_true", help="print the README's part from the results, measure nothing"
    )
    parser.add_argument("--results", default="", help="folder for the report, the rows and the plots")
    signal.signal(signal.SIGTERM, _end)
    try:
        sys.exit(main(parser.parse_args()))
    except KeyboardInterrupt:
        sys.exit("stopped")
    except RuntimeError as exc:
        sys.exit(str(exc))
