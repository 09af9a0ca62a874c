"""Processes of the bench: pinned to a core, with all their descendants counted, put to sleep, and ended."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

CONTESTANT_CORE, OTHERS_CORE = 0, 1
_PATIENCE_S = 10.0


@functools.cache
def cores() -> list[int]:
    """The cores that we may use, the contestants' first. Raises RuntimeError with fewer than two."""
    found = sorted(os.sched_getaffinity(0))
    if len(found) < 2:
        raise RuntimeError("the bench needs two cores: one for the contestant, one for all that is around it")
    return found


def leave_the_contestant_alone() -> None:
    """We ourselves run where all runs that is around a contestant. Raises RuntimeError with fewer than two cores."""
    os.sched_setaffinity(0, {cores()[OTHERS_CORE]})


@contextlib.contextmanager
def on_core(index: int) -> Iterator[None]:
    """What is started meanwhile runs on that core and, as its children inherit it, on no other."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {cores()[index]})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


class Process:
    """A program that was started, and all that it started in turn."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self._process = process
        self.log = log

    @property
    def has_ended(self) -> bool:
        """True once the program itself is gone."""
        return self._process.poll() is not None

    @property
    def pid(self) -> int:
        """The program's own id."""
        return self._process.pid

    def pids(self) -> list[int]:
        """The program and its descendants that are alive."""
        found = [] if self.has_ended else [self._process.pid]
        for pid in found:  # grows while it is read
            with contextlib.suppress(OSError):
                for task in Path(f"/proc/{pid}/task").iterdir():
                    found += [int(child) for child in (task / "children").read_text("ascii").split()]
        return found

    def cpu_s(self) -> float:
        """CPU that all of them have used so far. Threads that have ended are not in it."""
        return sum(map(_cpu_s, self.pids()))

    def memory_mib(self) -> float:
        """Memory of all of them; what several share counts once."""
        return sum(map(_proportional_kib, self.pids())) / 1024

    def freeze(self) -> None:
        """Stops all of them until `thaw`."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Lets them go on."""
        self._signal(signal.SIGCONT)

    def rest(self, limit_s: float) -> None:
        """Returns when it has nothing to do any more, or after that time: slow ones still serve who has gone."""
        ends = time.monotonic() + limit_s
        before = self.cpu_s()
        while time.monotonic() < ends:
            time.sleep(0.2)
            now = self.cpu_s()
            if now - before < 0.02:
                return
            before = now

    def end(self) -> None:
        """Kills all of them."""
        self._signal(signal.SIGKILL)
        self._process.wait(_PATIENCE_S)

    def tail(self) -> str:
        """The last lines that it wrote."""
        return self.log.read_bytes()[-1500:].decode("utf-8", "replace")

    def _signal(self, number: int) -> None:
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


def start(
    command: Sequence[str], core: int, folder: Path, name: str, variables: Mapping[str, str] | None = None
) -> Process:
    """Starts a program on a core; what it says goes to `<name>.log` in the folder."""
    log = folder / f"{name}.log"
    clean = {key: value for key, value in os.environ.items() if not key.startswith("BALANCER_")}
    with log.open("wb") as output, on_core(core):
        process = subprocess.Popen(
            list(command),
            cwd=folder,
            env=clean | dict(variables or {}),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for us alone; we end them
        )
    return Process(process, log)


def is_listening(port: int) -> bool:
    """True if someone accepts connections on that port of this machine."""
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


def wait_until_listening(process: Process, port: int, patience_s: float = _PATIENCE_S) -> None:
    """Returns when the port can be connected to. Raises RuntimeError with what the program said if it never can."""
    ends = time.monotonic() + patience_s
    while not is_listening(port):
        if process.has_ended or time.monotonic() > ends:
            raise RuntimeError(f"{process.log.stem} does not listen on its port:\n{process.tail()}")
        time.sleep(0.05)


def _cpu_s(pid: int) -> float:
    # Nanoseconds for every thread; `stat` of the whole process counts in hundredths of a second.
    total_ns = 0
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            total_ns += int((task / "schedstat").read_text("ascii").split()[0])
    return total_ns / 1e9


def _proportional_kib(pid: int) -> int:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text("ascii").splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1])
    return 0
