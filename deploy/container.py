"""Runs the command of an image as a container runtime would, in the image's unpacked root: for `make verify-deploy`.

Namespaces of its own for mounts and processes, the root read-only, /tmp and /var/lib/balancer writable and empty, the
image's environment, command and user. The network is the machine's. Needs root and util-linux.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

WRITABLE = ("tmp", "var/lib/balancer")
_END_S = 30.0


class Image(msgspec.Struct, frozen=True, kw_only=True, rename="pascal"):
    """What an image says of its container: the part of its configuration that is used here."""

    user: str
    env: tuple[str, ...]
    entrypoint: tuple[str, ...]
    cmd: tuple[str, ...]
    working_dir: str
    stop_signal: str
    healthcheck: HealthCheck

    @property
    def environment(self) -> dict[str, str]:
        """Its variables."""
        return dict(entry.split("=", 1) for entry in self.env)


class HealthCheck(msgspec.Struct, frozen=True, kw_only=True, rename="pascal"):
    """How its health is asked."""

    test: tuple[str, ...]


class Container:
    """The running first process of an image, as seen from outside."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self._process = process
        self._log = log

    @property
    def pid(self) -> int:
        """Its number on the machine; inside it is 1. Waits for it to be there."""
        parent, deadline = self._process.pid, time.monotonic() + _END_S
        while not (children := Path(f"/proc/{parent}/task/{parent}/children").read_text(encoding="ascii").split()):
            assert self._process.poll() is None, f"it has not started: {self.text()}"
            assert time.monotonic() < deadline, f"it does not start: {self.text()}"
            time.sleep(0.01)
        return int(children[0])

    def text(self) -> str:
        """What it has said."""
        return self._log.read_text(encoding="utf-8", errors="replace")

    def mounted_read_only(self) -> bool:
        """True if its root can be written by nobody."""
        mounts = Path(f"/proc/{self.pid}/mountinfo").read_text(encoding="utf-8").splitlines()
        return any(fields[4] == "/" and "ro" in fields[5].split(",") for fields in map(str.split, mounts))

    def ids(self) -> tuple[int, int]:
        """Its user and group."""
        found = os.stat(f"/proc/{self.pid}")
        return found.st_uid, found.st_gid

    def zombies(self) -> list[str]:
        """Dead processes that nobody has asked about, among its own."""
        pid, dead = self.pid, []
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split():
            with contextlib.suppress(FileNotFoundError):
                status = Path(f"/proc/{child}/stat").read_text(encoding="ascii")
                dead += [status] if status.rpartition(")")[2].split()[0] == "Z" else []
        return dead

    def signal(self, name: str) -> None:
        """Sends it a signal by name."""
        os.kill(self.pid, signal.Signals[name])

    def ended(self) -> int:
        """Its exit status, once it has ended."""
        return self._process.wait(_END_S)


def command(image: Image, root: Path, line: tuple[str, ...], variables: dict[str, str], scratch: Path) -> list[str]:
    """The command line that runs `line` in the image's root."""
    jail = scratch / "jail"
    jail.mkdir(exist_ok=True)
    (root / "dev").mkdir(exist_ok=True)
    user, _, group = image.user.partition(":")
    environment = image.environment | variables
    steps = [
        ["mount", "--bind", str(root), str(jail)],
        ["mount", "-o", "remount,bind,ro", str(jail)],
        ["mount", "-t", "tmpfs", "none", str(jail / "dev")],
    ]
    for device in ("null", "urandom"):
        steps += [["touch", str(jail / "dev" / device)], ["mount", "--bind", f"/dev/{device}", f"{jail}/dev/{device}"]]
    for folder in WRITABLE:
        options = f"uid={user},gid={group},mode=0700"
        steps.append(["mount", "-t", "tmpfs", "-o", options, "none", str(jail / folder)])
    inside = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc=/proc", f"--root={jail}"]
    inside += [f"--wd={image.working_dir}", f"--setuid={user}", f"--setgid={group}", *line]
    steps.append(["exec", "env", "-i", *(f"{name}={value}" for name, value in environment.items()), *inside])
    return ["unshare", "--mount", "sh", "-e", "-c", "\n".join(map(shlex.join, steps))]


@contextlib.contextmanager
def running(image: Image, root: Path, variables: dict[str, str], scratch: Path) -> Iterator[Container]:
    """The image's own command, running; killed at the end if it still does."""
    log = scratch / "container.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command(image, root, (*image.entrypoint, *image.cmd), variables, scratch),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    try:
        yield Container(process, log)
    finally:
        process.kill()
        process.wait()
