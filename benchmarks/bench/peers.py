"""Installs the programs that we are compared with: `python -m benchmarks.bench.peers [NAME…]`, or `make bench-peers`.

Each has an environment of its own below BENCH_PEERS (by default in the user's cache), with the versions named here.
What cannot be had is said at the end, and stands in the bench's tables as not measured. nginx is not installed by us:
it comes from the system.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.bench.contestants import nginx_program
from benchmarks.bench.site import peers_folder

_LITELLM = ("litellm[proxy]==1.108.7",)
_ROUTERS = ("vllm-router==0.1.17", "sglang-router==0.3.2")
CLIENTS = (
    *("aiosonic==1.3.3", "curl-cffi==0.17.0", "foghttp==0.4.1", "httpcore==1.0.9", "httpx==0.28.1", "httpx2==2.16.2"),
    *("impit==0.15.1", "niquests==3.21.2", "primp==2.0.1", "pyqwest==0.12.0", "pyreqwest==0.15.1", "redc==0.2.4"),
    *("ry==0.0.105", "urllib3-future==2.25.904", "uvloop==0.23.0", "wreq==0.13.0"),
)
_PORTKEY = "@portkey-ai/gateway@1.15.2"
_PORTKEY_OVERRIDE = ("@hono/node-server", "1.13.8")
"""With the newest that Portkey's range allows, 1.19.19, every stream ends in a 500 (`TypeError: immutable`)."""
_INSTALL_S = 1200


def venv(name: str, packages: Sequence[str]) -> None:
    """Makes an environment with those packages. Raises subprocess.CalledProcessError when that cannot be."""
    folder = peers_folder() / name
    python = folder / "bin" / "python"
    # Without pip inside: Debian's python3 cannot put it there, and ours fills other environments too.
    _run([sys.executable, "-m", "venv", "--without-pip", str(folder)])
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check", "--quiet"]
    _run([*pip, "install", *packages])


def litellm() -> None:
    """LiteLLM's proxy."""
    venv("venv-litellm", _LITELLM)


def routers() -> None:
    """The routers of vLLM and SGLang, each as far as there is a wheel."""
    faults = []
    for package in _ROUTERS:
        try:
            venv("venv-routers", [package])
        except subprocess.CalledProcessError:
            faults.append(package)
    if faults:
        raise RuntimeError(f"pip cannot install {', '.join(faults)}")


def clients() -> None:
    """The HTTP client libraries of `benchmarks.clients`."""
    venv("venv-clients", ["--only-binary=:all:", *CLIENTS])


def portkey() -> None:
    """Portkey's gateway."""
    npm = shutil.which("npm")
    if npm is None:
        raise RuntimeError("needs node and npm")
    folder = peers_folder() / "npm"
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "package.json").exists():
        _run([npm, "init", "--yes"], folder)
    name, version = _PORTKEY_OVERRIDE
    _run([npm, "pkg", "set", f"overrides.{name}={version}"], folder)
    _run([npm, "install", "--no-audit", "--no-fund", _PORTKEY], folder)


def nginx() -> None:
    """Looks for nginx."""
    if nginx_program() is None:
        raise RuntimeError("not installed; it comes from the system (Debian: apt-get install nginx-light)")


PEERS: dict[str, Callable[[], None]] = {
    "nginx": nginx,
    "litellm": litellm,
    "portkey": portkey,
    "routers": routers,
    "clients": clients,
}


def _run(command: Sequence[str], folder: Path | None = None) -> None:
    subprocess.run(list(command), cwd=folder, check=True, stdout=subprocess.DEVNULL, timeout=_INSTALL_S)


def main(names: Sequence[str]) -> int:
    """Installs those; 0 if all could be had."""
    peers_folder().mkdir(parents=True, exist_ok=True)
    print(f"peers: {peers_folder()}")
    faults = 0
    for name in names or tuple(PEERS):
        try:
            PEERS[name]()
        except (RuntimeError, OSError, subprocess.SubprocessError) as exc:
            faults += 1
            print(f"{name}: cannot be had here: {exc}")
        else:
            print(f"{name}: there")
    return 1 if faults else 0


if __name__ == "__main__":
    if unknown := [name for name in sys.argv[1:] if name not in PEERS]:
        sys.exit(f"unknown: {', '.join(unknown)}; there are {', '.join(PEERS)}")
    sys.exit(main(sys.argv[1:]))
