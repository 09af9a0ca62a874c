"""The C programs of the bench, the upstream accounts and the load, and how they are built."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from pathlib import Path

_FOLDER = Path(__file__).resolve().parent
_FLAGS = ("-O2", "-Wall")


def source(name: str) -> Path:
    """The source of that program."""
    return _FOLDER / f"{name}.c"


def build(name: str, folder: Path) -> Path:
    """The compiled program, made anew when its source has changed. Raises RuntimeError without gcc."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        raise RuntimeError("the bench compiles two small C programs: install gcc (Debian: apt-get install gcc)")
    digest = hashlib.sha256(source(name).read_bytes()).hexdigest()[:12]
    program = folder / f"{name}-{digest}"
    if not program.exists():
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run([compiler, *_FLAGS, "-o", str(program), str(source(name))], check=True)
    return program
