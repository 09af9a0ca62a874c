"""The processes of the run: accounts, two fleets, the balancer before them; on which core each runs, and its size."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgspec

from benchmarks.chaos.account import Attempt, Storm, read_books
from tests.topologies import free_ports

CLIENTS_CORE, SERVERS_CORE = 0, 1
_START_S = 30.0
_END_S = 60.0
_HAPROXY = """
global
  maxconn 4096
defaults
  mode tcp
  timeout connect 2s
  timeout client 120s
  timeout server 120s
  option redispatch
frontend clients
  bind 127.0.0.1:{port}
  default_backend fleets
backend fleets
  balance roundrobin
  {check}
  default-server check inter 200ms fall 2 rise 1
"""


@contextlib.contextmanager
def on_core(core: int) -> Iterator[None]:
    """What is started meanwhile runs on that core, where there is one."""
    if not hasattr(os, "sched_setaffinity") or len(before := os.sched_getaffinity(0)) < 2:
        yield
        return
    os.sched_setaffinity(0, {sorted(before)[core]})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


class AccountProcess:
    """A fake account in a process of its own."""

    def __init__(self, name: str, books: Path, process: asyncio.subprocess.Process, url: str) -> None:
        self.name = name
        self.url = url
        self._books = books
        self._process = process

    async def storm(self, storm: Storm) -> None:
        """Returns once every further request is befallen by it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{storm}\n".encode())
        async with asyncio.timeout(_START_S):
            assert await self._process.stdout.readline() == b"ok\n", f"the account {self.name} has ended"

    def attempts(self) -> list[Attempt]:
        """Its books."""
        return read_books(self._books)

    @staticmethod
    @contextlib.asynccontextmanager
    async def running(name: str, folder: Path) -> AsyncIterator[AccountProcess]:
        """One that runs until the block ends."""
        books = folder / f"{name}.books"
        books.touch()
        with on_core(CLIENTS_CORE):
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "benchmarks.chaos.account", name, str(books)),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
            )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            async with asyncio.timeout(_START_S):
                url = (await process.stdout.readline()).decode().strip()
            assert url, f"the account {name} did not start"
            yield AccountProcess(name, books, process, url)
        finally:
            process.stdin.close()
            await process.wait()


class Size(msgspec.Struct, frozen=True, kw_only=True):
    """Memory and open files of a process."""

    rss_bytes: int
    fds: int


def size_of(pid: int) -> Size | None:
    """The size of a process, None if it has ended."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
        fds = len(os.listdir(f"/proc/{pid}/fd"))
    except (FileNotFoundError, ProcessLookupError):
        return None
    return Size(rss_bytes=pages * os.sysconf("SC_PAGE_SIZE"), fds=fds)


class Serve:
    """A `balancer serve`: its supervisor, its workers, its log."""

    def __init__(self, process: asyncio.subprocess.Process, log: Path) -> None:
        self.process = process
        self.log = log
        self.port = 0

    def workers(self) -> list[int]:
        """The processes that serve at the moment."""
        try:
            pid = self.process.pid
            return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text("ascii").split()]
        except (FileNotFoundError, ProcessLookupError):
            return []

    def entries(self, event: str) -> list[dict[str, object]]:
        """The entries of its log about an event."""
        found = []
        for line in self.log.read_bytes().splitlines():
            with contextlib.suppress(msgspec.DecodeError):
                entry = msgspec.json.decode(line)
                if entry.get("event") == event:
                    found.append(entry)
        return found

    async def started(self) -> None:
        """Returns when it serves."""
        deadline = time.monotonic() + _START_S
        while time.monotonic() < deadline and self.process.returncode is None:
            if found := self.entries("serving"):
                self.port = int(str(found[0]["url"]).rpartition(":")[2])
                return
            await asyncio.sleep(0.05)
        tail = self.log.read_bytes()[-2000:].decode("utf-8", "replace")
        raise AssertionError(f"a fleet did not start:\n{tail}")

    async def stop(self) -> int:
        """Asks it to drain; its exit status."""
        if self.process.returncode is None:
            self.process.terminate()
        try:
            async with asyncio.timeout(_END_S):
                return await self.process.wait()
        finally:
            if self.process.returncode is None:
                self.process.kill()
                await self.process.wait()

    @staticmethod
    async def start(log: Path, arguments: list[str], variables: dict[str, str]) -> Serve:
        """Starts one, and returns when it serves."""
        clean = {key: value for key, value in os.environ.items() if not key.startswith("BALANCER_")}
        with log.open("ab") as stderr, on_core(SERVERS_CORE):
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "balancer", "serve", *arguments),
                env=clean | variables,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=stderr,
                start_new_session=True,
            )
        serve = Serve(process, log)
        try:
            await serve.started()
        except BaseException:
            await serve.stop()
            raise
        return serve


def haproxy_program() -> str | None:
    """Path of haproxy, None where it is not installed."""
    return shutil.which("haproxy") or shutil.which("haproxy", path="/usr/sbin")


@contextlib.asynccontextmanager
async def haproxy(folder: Path, ports: list[int], *, asks_readiness: bool) -> AsyncIterator[int]:
    """The port of an L4 balancer before those ports; it looks every 200 ms whether each may be given connections.

    `asks_readiness`: by `/readyz`; else whether it can be connected to.
    """
    program = haproxy_program()
    assert program, "haproxy is not installed"
    (port,) = free_ports(1)
    check = "option httpchk GET /readyz\n  http-check expect status 200" if asks_readiness else "option tcp-check"
    lines = [f"  server fleet{i} 127.0.0.1:{each}" for i, each in enumerate(ports)]
    file = folder / "haproxy.cfg"
    file.write_text(_HAPROXY.format(port=port, check=check) + "\n".join(lines) + "\n", encoding="utf-8")
    with (folder / "haproxy.log").open("wb") as log, on_core(SERVERS_CORE):
        process = await asyncio.create_subprocess_exec(
            *(program, "-db", "-f", str(file)), stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log
        )
    try:
        deadline = time.monotonic() + _START_S
        while True:
            assert process.returncode is None, (folder / "haproxy.log").read_text(encoding="utf-8")
            assert time.monotonic() < deadline, "haproxy does not answer"
            with contextlib.suppress(ConnectionError):
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.close()
                await writer.wait_closed()
                break
            await asyncio.sleep(0.02)
        yield port
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
