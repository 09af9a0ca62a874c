"""Where a worker's time goes: `python -m benchmarks.profile [--seconds S] [--variant all|off] [--results FOLDER]`.

Under small requests and under streams, 32 at a time, a worker with everything on is sampled by py-spy, native frames
included. For each load a file for speedscope.app is written, the files and functions with the most samples are printed,
and what Redis did for a request, command by command.
"""

from __future__ import annotations

import argparse
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import redis

from benchmarks.bench import contestants, features, ours, processes, site
from benchmarks.bench.contestants import Contestant, Missing
from benchmarks.bench.measuring import SMALL, STREAM, Load, Phase, run_load
from benchmarks.bench.processes import CONTESTANT_CORE, OTHERS_CORE, Process
from benchmarks.bench.site import Site
from benchmarks.bench.tables import number, table

_RATE = 400
_START_S = 30.0
_SETTLE_S = 0.5
_SHOWN = 15
_ASLEEP = "PyThread_acquire_lock_timed"
"""A thread that waits for a lock, as those of a pool do for work: native sampling takes it for busy."""
_FRAME = re.compile(r"(.*) \(([^()]*?)(?::(\d+))?\)")

Stack = tuple[str, ...]


class Samples(msgspec.Struct, frozen=True, kw_only=True):
    """Stacks, outermost frame first, and how often each was seen."""

    stacks: dict[Stack, int]

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self.stacks.values())

    def by_file(self) -> Counter[str]:
        """Samples by the file of the innermost frame."""
        found: Counter[str] = Counter()
        for stack, count in self.stacks.items():
            found[file_of(stack[-1])] += count
        return found

    def by_function(self) -> Counter[str]:
        """Samples by the innermost function."""
        found: Counter[str] = Counter()
        for stack, count in self.stacks.items():
            found[without_line(stack[-1])] += count
        return found

    def inclusive(self) -> Counter[str]:
        """Samples in which a function is anywhere on the stack."""
        found: Counter[str] = Counter()
        for stack, count in self.stacks.items():
            for frame in {without_line(frame) for frame in stack}:
                found[frame] += count
        return found


def read_samples(text: str) -> Samples:
    """The samples of py-spy's raw format, `outer (file:line);inner (file:line) count` a line, but threads asleep."""
    stacks: dict[Stack, int] = {}
    for line in text.splitlines():
        frames, _, count = line.rpartition(" ")
        if _ASLEEP in frames:
            continue
        stack = tuple(frames.split(";"))
        stacks[stack] = stacks.get(stack, 0) + int(count)
    return Samples(stacks=stacks)


def file_of(frame: str) -> str:
    """The file of a frame, the frame itself if it has none."""
    found = _FRAME.fullmatch(frame)
    return found[2] if found else frame


def without_line(frame: str) -> str:
    """The frame without its line: two lines of a function are one function."""
    found = _FRAME.fullmatch(frame)
    return f"{found[1]} ({found[2]})" if found else frame


def speedscope(samples: Samples, name: str) -> bytes:
    """The samples as a file for speedscope.app (speedscope.app/file-format-schema.json)."""
    frames = list(dict.fromkeys(frame for stack in samples.stacks for frame in stack))
    index = {frame: i for i, frame in enumerate(frames)}
    profile = {
        "type": "sampled",
        "name": name,
        "unit": "none",
        "startValue": 0,
        "endValue": samples.total,
        "samples": [[index[frame] for frame in stack] for stack in samples.stacks],
        "weights": list(samples.stacks.values()),
    }
    return msgspec.json.encode(
        {
            "$schema": "https://www.speedscope.app/file-format-schema.json",
            "name": name,
            "shared": {"frames": [{"name": frame} for frame in frames]},
            "profiles": [profile],
        }
    )


def profiler() -> str:
    """Path of py-spy. Raises RuntimeError where it is not installed."""
    beside = Path(sys.executable).parent / "py-spy"
    found = str(beside) if beside.exists() else shutil.which("py-spy")
    if not found:
        raise RuntimeError("py-spy is not installed: make profile installs it")
    return found


def sample(place: Site, pid: int, seconds: float) -> Samples:
    """What a process does for so long. Raises RuntimeError when it may not be looked at."""
    raw = place.folder / "samples.txt"
    command = [profiler(), "record", "--pid", str(pid), "--duration", str(int(seconds)), "--rate", str(_RATE)]
    command += ["--native", "--format", "raw", "--output", str(raw)]
    with processes.on_core(OTHERS_CORE):
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 60, check=False)
    if done.returncode or not raw.exists():
        raise RuntimeError(
            f"py-spy failed; it may need root or kernel.yama.ptrace_scope=0: {done.stderr.strip()[-300:]}"
        )
    return read_samples(raw.read_text(encoding="utf-8", errors="replace"))


def commands(url: str) -> dict[str, tuple[int, float]]:
    """Calls of each command that Redis has had, and their µs."""
    with redis.Redis.from_url(url) as client:
        stats: dict[str, dict[str, Any]] = client.info("commandstats")
    return {name.removeprefix("cmdstat_"): (int(row["calls"]), float(row["usec"])) for name, row in stats.items()}


def commands_table(before: dict[str, tuple[int, float]], after: dict[str, tuple[int, float]], requests: int) -> str:
    """What Redis did for a request between the two."""
    rows = []
    for name, (calls, us) in sorted(after.items(), key=lambda item: -item[1][1]):
        calls_before, us_before = before.get(name, (0, 0.0))
        if calls > calls_before:
            cells = ((calls - calls_before) / requests, (us - us_before) / (calls - calls_before))
            rows.append([name, number(cells[0], 3), number(cells[1]), number((us - us_before) / requests, 2)])
    return table(["command", "calls a request", "µs a call", "µs a request"], rows)


def profile(place: Site, contestant: Contestant, worker: int, phase: Phase, seconds: float) -> tuple[str, Samples]:
    """Samples a worker under one load; what there is to tell of it, and the samples."""
    loads: list[Load] = []
    loading = threading.Thread(target=lambda: loads.append(run_load(place, contestant, phase, seconds + 2)))
    before, cpu_before_s = commands(contestant.redis_url), place.redis.cpu_s()
    loading.start()
    time.sleep(_SETTLE_S)
    try:
        samples = sample(place, worker, seconds)
    finally:
        loading.join()
    requests = max(1, loads[0].all_right)
    redis_us = (place.redis.cpu_s() - cpu_before_s) * 1e6 / requests
    texts = [
        f"## {phase.name}: {samples.total} samples, {requests} requests",
        _shares("Files, by what runs in them", samples.by_file(), samples.total),
        _shares("Functions, by what runs in them", samples.by_function(), samples.total),
        _shares("Functions, with all they call", samples.inclusive(), samples.total, shown=2 * _SHOWN),
        f"Redis used {redis_us:.1f} µs of CPU a request. By command (wall-clock µs, as it counts them):",
        commands_table(before, commands(contestant.redis_url), requests),
    ]
    return "\n\n".join(texts), samples


def _shares(title: str, counts: Counter[str], total: int, shown: int = _SHOWN) -> str:
    lines = [f"{count / total:6.1%}  {name}" for name, count in counts.most_common(shown)]
    return "\n".join([f"{title}:", "", "```", *lines, "```"])


def worker_of(process: Process) -> int:
    """The worker that a `balancer serve` has started."""
    own = [pid for pid in process.pids() if b"balancer.cli.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    if not own:
        raise RuntimeError(f"no worker runs:\n{process.tail()}")
    return own[0]


def main(options: argparse.Namespace) -> int:
    """Profiles both loads."""
    processes.leave_the_contestant_alone()
    profiler()
    variant = ours.ALL if options.variant == "all" else features.OFF
    with site.opened() as place:
        contestant = contestants.of_ours(place, variant, name="ours")
        assert not isinstance(contestant, Missing), contestant.reason
        process = processes.start(contestant.command, CONTESTANT_CORE, place.folder, "ours", contestant.variables)
        try:
            processes.wait_until_listening(process, contestant.port, _START_S)
            run_load(place, contestant, SMALL, 1.0)
            folder = Path(options.results) if options.results else site.RESULTS
            folder.mkdir(parents=True, exist_ok=True)
            for name, phase in (("small", SMALL), ("stream", STREAM)):
                text, samples = profile(place, contestant, worker_of(process), phase, options.seconds)
                file = folder / f"profile-{name}.speedscope.json"
                file.write_bytes(speedscope(samples, f"{phase.name}, {variant.name}"))
                print(f"{text}\n\nFor speedscope.app: {file}\n", flush=True)
        finally:
            process.end()
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--variant", choices=("all", "off"), default="all", help="everything on, or off")
    parser.add_argument("--results", default="", help="folder for the files")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit("stopped"))
    try:
        sys.exit(main(parser.parse_args()))
    except KeyboardInterrupt:
        sys.exit("stopped")
    except RuntimeError as exc:
        sys.exit(str(exc))
