"""Measures client libraries: `python -m benchmarks.clients`, or `make bench-clients`.

`[--only NAME,…] [--loop LOOP] [--rounds N] [--seconds S] [--results FOLDER]`

Each sends requests, 32 at a time, from a process of its own on the contestants' core to the bench's accounts on the
other; CPU is that process's, threads of a Rust runtime included. The libraries are taken from the peers' folder
(`make bench-peers`), ours and aiohttp from the environment that runs this.
"""

from __future__ import annotations

import argparse
import signal
import statistics
import subprocess
import sys
from pathlib import Path

import msgspec

from benchmarks.bench import about, peers, site
from benchmarks.bench.processes import CONTESTANT_CORE, on_core
from benchmarks.bench.site import ROOT, Site, peers_folder
from benchmarks.bench.tables import number, table
from benchmarks.clients.adapters import ADAPTERS

_METHOD = """\
Each library sends from a process of its own, 32 requests at a time, to an account that answers at once or streams 51
events 1 ms apart. CPU is that of the process with all its threads. `in parts`: in how many pieces a stream is handed
over; some give each chunk of the transfer coding, others what a read has brought."""
_OWN = ("ours", "aiohttp")
_PATIENCE_S = 60.0


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One library in one round."""

    small_us: float
    small_per_s: float
    stream_us: float
    streams_per_s: float
    parts: float
    memory_mib: float


def python_of(name: str) -> Path:
    """The interpreter that has the library."""
    return Path(sys.executable) if name in _OWN else peers_folder() / "venv-clients" / "bin" / "python"


def measure(place: Site, name: str, loop: str, seconds: float) -> Row | str:
    """A row, or why there is none."""
    python = python_of(name)
    if not python.exists():
        return "not installed: make bench-peers"
    url = f"{place.upstreams[0]}/v1/chat/completions"
    files = [str(place.bodies["small"]), str(place.bodies["small_stream"])]
    command = [str(python), "-m", "benchmarks.clients.worker", loop, name, url, *files, str(seconds)]
    with on_core(CONTESTANT_CORE):
        process = subprocess.Popen(
            command, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
    try:
        out, err = process.communicate(timeout=_PATIENCE_S + 2 * seconds)
    except subprocess.TimeoutExpired:
        return "did not end in time"
    finally:
        process.kill()
        process.wait()
    if process.returncode:
        return (err.decode("utf-8", "replace").strip().splitlines() or ["ended without a word"])[-1]
    return msgspec.json.decode(out.splitlines()[-1], type=Row)


def report(rows: dict[str, list[Row]], faults: dict[str, str]) -> str:
    """The table, cheapest request first, and who is not in it."""

    def median(name: str, field: str) -> float:
        return float(statistics.median(getattr(row, field) for row in rows[name]))

    def beside(name: str, field: str) -> str:
        pairs = zip(rows[name], rows.get("aiohttp", []), strict=False)
        ratios = [getattr(own, field) / getattr(other, field) for own, other in pairs]
        return number(statistics.median(ratios), 2) if ratios else "–"

    lines = [
        [
            name,
            number(median(name, "small_us"), 0),
            beside(name, "small_us"),
            number(median(name, "stream_us"), 0),
            beside(name, "stream_us"),
            number(median(name, "parts"), 0),
            number(median(name, "memory_mib"), 0),
        ]
        for name in sorted(rows, key=lambda name: median(name, "small_us"))
    ]
    lines += [[name, "not measured", *["–"] * 5] for name in faults if name not in rows]
    head = ["client", "CPU µs/request", "× aiohttp", "CPU µs/stream of 51 events", "× aiohttp", "in parts", "RSS MiB"]
    notes = [f"- {name}: {fault}" for name, fault in faults.items()]
    return "\n".join([table(head, lines), *([""] if notes else []), *notes])


def main(options: argparse.Namespace) -> int:
    """Measures and reports."""
    rows: dict[str, list[Row]] = {}
    faults: dict[str, str] = {}
    names = [name for name in options.only.split(",") if name] or list(ADAPTERS)
    with site.opened() as place:
        for round_ in range(options.rounds):
            first = round_ % len(names)
            for name in names[first:] + names[:first]:
                if name in faults:
                    continue
                found = measure(place, name, options.loop, options.seconds)
                if isinstance(found, Row):
                    rows.setdefault(name, []).append(found)
                else:
                    faults[name] = found
            print(f"round {round_ + 1} of {options.rounds} is done", file=sys.stderr, flush=True)
    plan = f"{options.rounds} rounds, {options.seconds:g} s for requests and as long for streams, on {options.loop}"
    versions = about.installed("venv-clients", (each.partition("==")[0] for each in peers.CLIENTS))
    info = about.of_this_run("benchmarks.clients", sys.argv[1:], plan, versions)
    text = "\n\n".join(["# HTTP client libraries", about.header(info), report(rows, faults), _METHOD])
    print(text)
    folder = Path(options.results) if options.results else None if options.only else site.RESULTS
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "clients.md").write_text(text + "\n", encoding="utf-8")
        (folder / "clients.json").write_bytes(msgspec.json.format(msgspec.json.encode(rows)) + b"\n")
    return 0


def _end(number_: int, frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help=", ".join(ADAPTERS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1.5)
    parser.add_argument("--loop", choices=("asyncio", "uvloop"), default="asyncio", help="that the clients run on")
    parser.add_argument("--results", default="", help="folder for the table and the rows")
    signal.signal(signal.SIGTERM, _end)
    try:
        sys.exit(main(parser.parse_args()))
    except KeyboardInterrupt:
        sys.exit("stopped")
