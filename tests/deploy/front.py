"""nginx with the configuration of deploy/nginx.conf, before workers on this machine."""

from __future__ import annotations

import asyncio
import contextlib
import re
import signal
import sys
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from tests.needs import program
from tests.topologies import free_ports

CONFIGURATION = Path(__file__).resolve().parent.parent.parent / "deploy" / "nginx.conf"
SERVER = re.compile(r"^( +server )[\d.]+:8080( .*)$", re.MULTILINE)
_PATIENCE_S = 15.0


def configuration(folder: Path, port: int, workers: Sequence[int], *, tries_another: bool = True) -> str:
    """The file as it stands, with ports and folders of this machine.

    `tries_another` False: like most of what stands before a cluster, it lets a refused connection be the client's.
    """
    text = CONFIGURATION.read_text(encoding="utf-8").replace("/tmp/", f"{folder}/")  # noqa: S108  it is its folder
    text = text.replace("worker_rlimit_nofile 65536;", "")  # Not for everybody to raise.
    text, count = re.subn(r"listen 8080\b", f"listen 127.0.0.1:{port}", text)
    assert count == 1
    line = SERVER.search(text)
    assert line
    # As many as there are workers, with the parameters that the file's have.
    servers = "\n".join(f"{line[1]}127.0.0.1:{worker}{line[2]}" for worker in workers)
    first, *others = SERVER.finditer(text)
    text = text[: first.start()] + servers + text[(others or [first])[-1].end() :]
    if not tries_another:
        text = text.replace("proxy_next_upstream error timeout;", "proxy_next_upstream off;")
        text = text.replace("max_fails=1", "max_fails=0")
    return text


class Nginx:
    """A running nginx, whose upstreams can be replaced."""

    def __init__(self, folder: Path, *, tries_another: bool = True) -> None:
        self.folder = folder
        (self.port,) = free_ports(1)
        self._tries_another = tries_another
        self._process: asyncio.subprocess.Process | None = None

    @property
    def url(self) -> str:
        """Where clients reach it."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        """What it has complained about."""
        return (self.folder / "nginx.log").read_text(encoding="utf-8")

    def _write(self, workers: Sequence[int]) -> Path:
        file = self.folder / "nginx.conf"
        text = configuration(self.folder, self.port, workers, tries_another=self._tries_another)
        file.write_text(text, encoding="utf-8")
        return file

    async def uses(self, workers: Sequence[int]) -> None:
        """Returns when requests go to these ports, and to no others. What is open goes on."""
        assert self._process is not None
        before = self._workers()
        self._write(workers)
        self._process.send_signal(signal.SIGHUP)
        deadline = time.monotonic() + _PATIENCE_S
        # The new generation is there, and the old one takes nothing new: it has closed its copies of the socket.
        while not (self._workers() - before) or self._accepting(before):
            assert time.monotonic() < deadline, f"nginx does not take its configuration:\n{self.log}"
            await asyncio.sleep(0.01)

    def _workers(self) -> set[int]:
        assert self._process is not None
        pid = self._process.pid
        return {int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()}

    def _accepting(self, pids: set[int]) -> list[int]:
        """Those that do not say that they are shutting down."""
        found = []
        for pid in pids:
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                title = Path(f"/proc/{pid}/cmdline").read_bytes()
                found += [] if b"shutting down" in title or not title else [pid]
        return found

    @contextlib.asynccontextmanager
    async def running(self, workers: Sequence[int]) -> AsyncIterator[Nginx]:
        """Runs it before these ports."""
        nginx = program("apt:nginx")
        assert nginx
        file = self._write(workers)
        with (self.folder / "nginx.log").open("wb") as log:
            self._process = await asyncio.create_subprocess_exec(
                *(nginx, "-p", str(self.folder), "-c", str(file), "-g", "daemon off;"),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        try:
            deadline = time.monotonic() + _PATIENCE_S
            while True:
                with contextlib.suppress(ConnectionError):
                    _, writer = await asyncio.open_connection("127.0.0.1", self.port)
                    writer.close()
                    await writer.wait_closed()
                    break
                assert self._process.returncode is None, self.log
                assert time.monotonic() < deadline, self.log
                await asyncio.sleep(0.02)
            yield self
        finally:
            if self._process.returncode is None:
                self._process.terminate()
            await self._process.wait()
            sys.stderr.write(self.log[-4000:])  # Shown when the test has failed.
