"""The report: tables in Markdown, and what a reader must know to judge them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from benchmarks.bench import features, figures, ours, plots
from benchmarks.bench.about import header
from benchmarks.bench.contestants import Missing
from benchmarks.bench.figures import Figures
from benchmarks.bench.measuring import AGENT, SMALL, SMALL_1, SMALL_256, STREAM, Phase
from benchmarks.bench.run import Found, Part
from benchmarks.bench.tables import NOTHING, number, table
from benchmarks.bench.targets import OURS, Target


def targets_table(listed: Sequence[Target]) -> str:
    """What was wanted, what was measured, and the verdict."""

    def bound(target: Target, value: float | None) -> str:
        if value is None:
            return NOTHING
        return f"{'≥' if target.is_least else '≤'} {value:g} {target.unit}"

    def measured(target: Target) -> str:
        return f"{number(target.measured, 2)} {target.unit}" if target.measured is not None else NOTHING

    rows = [[each.what, bound(each, each.must), bound(each, each.aim), measured(each), each.verdict] for each in listed]
    return table(["target", "must", "aim", "measured", "verdict"], rows)


Column = tuple[str, Callable[[str], str]]


def short_table(found: Figures, missing: Sequence[Missing]) -> str:
    """The few columns that say most."""

    def value(phase: Phase, of: figures.Value, digits: int = 0) -> Callable[[str], str]:
        return lambda name: number(found.median(name, phase, of), digits)

    columns: list[Column] = [
        ("req/s", value(SMALL, figures.per_s)),
        ("CPU µs/req", value(SMALL, figures.cpu_us)),
        ("CPU µs/stream", value(STREAM, figures.cpu_us)),
        ("first byte added ms", lambda name: number(found.added(name, "direct", STREAM, figures.ttfb_ms), 1)),
        ("p99 ms, c256", value(SMALL_256, figures.p99_ms)),
        ("RSS MiB", value(SMALL_256, figures.memory_mib)),
    ]
    return _table_of(found, columns, missing)


def contestants_table(found: Figures, missing: Sequence[Missing]) -> str:
    """All contestants, answers in one piece; what could not be had stands in it with the reason."""

    def value(phase: Phase, of: figures.Value, digits: int = 0) -> Callable[[str], str]:
        return lambda name: number(found.median(name, phase, of), digits)

    def ratio(other: str, phase: Phase, of: figures.Value) -> Callable[[str], str]:
        return lambda name: number(found.ratio(name, other, phase, of), 2)

    def times(phase: Phase) -> Callable[[str], str]:
        def shown(name: str) -> str:
            pair = (found.median(name, phase, each) for each in (figures.p50_ms, figures.p99_ms))
            return " / ".join(number(each) for each in pair)

        return shown

    columns: list[Column] = [
        ("req/s, c32", value(SMALL, figures.per_s)),
        ("× aiohttp", ratio("aiohttp", SMALL, figures.per_s)),
        ("CPU µs/req", value(SMALL, figures.cpu_us)),
        ("× nginx", ratio("nginx", SMALL, figures.cpu_us)),
        ("p50 / p99 ms, c1", times(SMALL_1)),
        ("c32", times(SMALL)),
        ("c256", times(SMALL_256)),
        ("req/s, c256", value(SMALL_256, figures.per_s)),
        ("44 KB: req/s", value(AGENT, figures.per_s)),
        ("44 KB: CPU µs", value(AGENT, figures.cpu_us)),
        ("RSS MiB", value(SMALL_256, figures.memory_mib)),
        ("core busy", value(SMALL, lambda row: row.cores, 2)),
        ("wrong", lambda name: str(found.wrong(name))),
    ]
    return _table_of(found, columns, missing)


def streams_table(found: Figures, missing: Sequence[Missing]) -> str:
    """All contestants, streams."""

    def value(of: figures.Value, digits: int) -> Callable[[str], str]:
        return lambda name: number(found.median(name, STREAM, of), digits)

    columns: list[Column] = [
        ("streams/s, c32", value(figures.per_s, 0)),
        ("CPU µs/stream", value(figures.cpu_us, 0)),
        ("× nginx", lambda name: number(found.ratio(name, "nginx", STREAM, figures.cpu_us), 2)),
        ("first byte ms", value(figures.ttfb_ms, 2)),
        ("added", lambda name: number(found.added(name, "direct", STREAM, figures.ttfb_ms), 2)),
        ("whole stream p50 ms", value(figures.p50_ms, 1)),
        ("p99 ms", value(figures.p99_ms, 1)),
    ]
    return _table_of(found, columns, missing)


def redis_table(found: Figures) -> str:
    """What Redis does for a request of ours."""
    rows = []
    for phase in (SMALL_1, SMALL, SMALL_256, AGENT, STREAM):
        calls = found.median(OURS, phase, lambda row: row.scripts_per_request)
        own = found.median(OURS, phase, figures.redis_us)
        rows.append([phase.name, number(own), number(found.median(OURS, phase, figures.scripts_us)), number(calls, 2)])
    return table(["load", "CPU µs a request", "of it in scripts", "scripts a request"], rows)


def _table_of(found: Figures, columns: Sequence[Column], missing: Sequence[Missing]) -> str:
    rows = [[name, *(cell(name) for _, cell in columns)] for name in found.contestants]
    rows += [[each.name, "not measured", *[NOTHING] * (len(columns) - 1)] for each in missing]
    return table(["contestant", *(head for head, _ in columns)], rows)


# -- the whole ---------------------------------------------------------------------------------------------------------


def document(found: Found) -> str:
    """The report in Markdown."""
    texts = ["# How fast we are\n\nWritten by `make bench`; how it measures stands at the end.", header(found.about)]
    if found.contestants:
        texts += ["## Targets", targets_table(found.targets())]
        texts += _contestants_part(found.contestants)
    if found.features:
        texts += ["## What each feature costs", _FEATURES_NOTE, features.cost_table(found.features.figures)]
    if found.loops:
        texts += ["## Loops", features.loops_table(found.loops.figures)]
    if found.workers:
        texts += ["## Two workers", _WORKERS_NOTE, features.workers_table(found.workers.figures)]
    texts += ["## What could not be measured, and what went wrong", *_notes(found)]
    texts += ["## How it is measured", _METHOD]
    return "\n\n".join(texts) + "\n"


def readme_part(found: Found) -> str:
    """The tables that the README shows."""
    assert found.contestants, "there is nothing to show without the contestants"
    beside = found.contestants
    texts = [targets_table(found.targets()), short_table(beside.figures, beside.missing)]
    when = f"Measured {found.about.date} at commit {found.about.commit} on {found.about.machine}; {found.about.plan}."
    return "\n\n".join([when, *texts]) + "\n"


_FEATURES_NOTE = """\
Ours alone, each variant beside its base in the same round. `off` has no breaker, limits, reservation, record, decision
headers or audit; every request still is one selection and one settle."""
_WORKERS_NOTE = """\
Both workers share one core, so this shows what a second worker adds to a request's CPU, and not how throughput scales:
for that, two cores are too few."""
_METHOD = """\
One contestant at a time runs on core 0; all others are stopped (SIGSTOP). Accounts, Redis and load run on core 1. A
round measures every contestant, each round begins with another one; the tables show medians over rounds, and ratios
are taken within a round first. The accounts answer at once with 750 bytes, or stream 51 events 1 ms apart, the last
one with the usage; an answer counts if it is whole, has status 200 and reports usage. CPU is that of the contestant
with all its processes and threads, over all its right answers. Where a contestant is faster than the load (direct,
nginx), read its CPU and not its requests a second; streams are bound by the accounts' pace to some 620 a second. p99
of a second or two of load is that of few thousand requests, and moves from run to run by half."""


def _contestants_part(part: Part) -> list[str]:
    found = part.figures
    texts = ["## Beside others", contestants_table(found, part.missing), streams_table(found, part.missing)]
    if OURS in found.contestants:
        switches = "\n".join(f"- {line}" for line in ours.switches(ours.ALL))
        seen = "\n".join(f"- {line}" for line in part.evidence)
        texts += ["Ours ran with:", switches, "Seen in Redis while it served:", seen]
        texts += ["### Redis", "What it does for a request of ours, by its own CPU.", redis_table(found)]
    return texts


def _notes(found: Found) -> list[str]:
    lines = []
    for part in found.parts().values():
        lines += [f"- {each.name}: not measured: {' '.join(each.reason.split())}" for each in part.missing]
        for name in part.figures.contestants:
            if wrong := part.figures.wrong(name):
                complaint = part.figures.complaint(name)[:160].replace("|", " ")
                lines.append(f"- {name}: {wrong} answers were not right, one of them: {complaint or 'it never came'}")
            if silent := part.figures.silent(name):
                lines.append(f"- {name}: no right answer in the time there was, in some round of: {', '.join(silent)}")
    return ["\n".join(lines) or "Nothing."]


def write(folder: Path, found: Found) -> None:
    """Writes bench.md, bench.json with the raw rows, and the plots as far as they can be drawn."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = plots.draw(folder, found)
    links = "\n".join(f"![{path.stem}]({path.name})" for path in drawn)
    (folder / "bench.md").write_text(document(found) + (f"\n{links}\n" if links else ""), encoding="utf-8")
    (folder / "bench.json").write_bytes(_json(found))


def _json(found: Found) -> bytes:
    head = msgspec.json.encode({"about": found.about}).decode().removesuffix("}")
    parts = []
    for name, part in found.parts().items():
        rows = ",\n    ".join(msgspec.json.encode(row).decode() for row in part.rows)
        rest = msgspec.json.encode({"missing": part.missing, "evidence": part.evidence}).decode().removesuffix("}")
        parts.append(f'"{name}": {rest}, "rows": [\n    {rows}\n  ]}}')
    return (head + ",\n  " + ",\n  ".join(parts) + "\n}\n").encode()


def read(path: Path) -> Found:
    """What `write` has written into bench.json."""
    return msgspec.json.decode(path.read_bytes(), type=Found)
