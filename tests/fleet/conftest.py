"""Fleets as users run them: `balancer serve` as processes, over fake accounts, on a real store."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
import redis
import redis.asyncio
import yaml

from balancer.cli.accounts import FakeAccount
from balancer.store import keys
from balancer.store.views import PoolView, read_pool
from tests import servers
from tests.store.conftest import eventually
from tests.store.test_embedded import is_gone

pytest.register_assert_rewrite("tests.fleet.pairs")

LEASE_S = 3.0
START_S = 20.0
END_S = 20.0
TAIL_BYTES = 6000
STYLES = ("openai", "anthropic")
PATHS = {"openai": "/v1/chat/completions", "anthropic": "/v1/messages"}
LAST_WORDS = {"openai": "[DONE]", "anthropic": "message_stop"}

Books = dict[str, tuple[int, int, int]]


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    """The URL of a real server."""
    with servers.running("valkey-9") as url:
        yield url


@pytest.fixture
def store_url(server: str) -> str:
    """The same, emptied."""
    with redis.Redis.from_url(server) as client:
        client.flushall()
    return server


@pytest.fixture
def environment() -> Iterator[dict[str, str]]:
    """A process environment without settings of ours, in which nothing of the user's is found or written."""
    folder = tempfile.mkdtemp(prefix="b-")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("BALANCER_")}
    yield inherited | {
        "XDG_RUNTIME_DIR": folder,
        "XDG_DATA_HOME": folder,
        # The workers' metrics are files that stay open until their end.
        "PYTHONWARNINGS": "error,ignore::ResourceWarning",
        "BALANCER_LEASE_S": str(LEASE_S),
        "BALANCER_ADMIN_TOKEN": "admin-of-the-fleet",
    }
    shutil.rmtree(folder)


@pytest.fixture
async def accounts() -> AsyncIterator[list[FakeAccount]]:
    """Two accounts that keep their own books."""
    async with FakeAccount("anna", "key-of-anna-0123") as anna, FakeAccount("boris", "key-of-boris-0123") as boris:
        yield [anna, boris]


def a_document(accounts: list[FakeAccount], threshold: int = 3) -> dict[str, Any]:
    """Rule `chat` for OpenAI clients and `claude` for Anthropic's, each over all accounts."""
    providers = [
        {
            "name": f"{account.name}-{style}",
            "api_base": account.url,
            "api_style": style,
            "token": f"${{{account.name}}}",
        }
        for account in accounts
        for style in STYLES
    ]
    rules = [
        {
            "uuid": uuid,
            "scenario": style,
            "request_model": uuid,
            "lb_tactic": {"type": "round_robin", "params": {"request_threshold": threshold}},
            "services": [{"provider": f"{account.name}-{style}", "model": f"{style}-m"} for account in accounts],
        }
        for uuid, style in (("chat", "openai"), ("claude", "anthropic"))
    ]
    return {"providers": providers, "rules": rules}


def with_upstream(document: dict[str, Any], url: str) -> dict[str, Any]:
    """The document and a rule `held` over one scripted upstream."""
    provider = {"name": "held", "api_base": url, "no_key_required": True}
    rule = {"uuid": "held", "request_model": "held", "services": [{"provider": "held", "model": "up-model"}]}
    return {"providers": [*document["providers"], provider], "rules": [*document["rules"], rule]}


def theirs(accounts: list[FakeAccount]) -> Books:
    """Requests, input and output of every service, by the accounts' own books."""
    return {
        f"{account.name}-{style}:{style}-m": (count.requests, count.input, count.output)
        for account in accounts
        for style in STYLES
        if (count := account.ledger.models.get(f"{style}-m"))
    }


def ours(view: PoolView) -> Books:
    """The same by the fleet's counters, for the services over accounts."""
    return {
        name: (state.requests, state.input, state.output)
        for name, state in view.services.items()
        if not name.startswith("held:") and state.requests
    }


async def pool_view(url: str) -> PoolView:
    """The pool as Redis has it."""
    async with redis.asyncio.Redis.from_url(url) as client:
        partitions: Any = await client.hgetall(keys.partitions("default"))
        services: Any = await client.hgetall(keys.services("default"))
    return read_pool("default", partitions, services, now_ms=0)


async def idle_view(url: str, timeout_s: float = 10.0) -> PoolView:
    """The pool once nothing is in flight or reserved."""

    async def is_idle() -> bool:
        services = (await pool_view(url)).services
        return not any(state.in_flight or state.reserved for state in services.values())

    await eventually(is_idle, timeout_s)
    return await pool_view(url)


class Asker:
    """A client on one connection of its own, and the worker that serves it."""

    def __init__(self, session: aiohttp.ClientSession, url: str, pid: int, worker: str) -> None:
        self.session = session
        self.url = url
        self.pid = pid
        self.worker = worker

    def post(self, model: str, text: str = "hello", *, style: str = "openai", stream: bool = False) -> Any:
        """A request to a rule."""
        body = {"model": model, "max_tokens": 40, "stream": stream, "messages": [{"role": "user", "content": text}]}
        return self.session.post(self.url + PATHS[style], json=body)

    async def is_whole(self, model: str, text: str = "hello", *, style: str = "openai", stream: bool = False) -> bool:
        """Asks; True when the answer came to its proper end."""
        async with self.post(model, text, style=style, stream=stream) as response:
            body = await response.text()
            return response.status == 200 and (not stream or LAST_WORDS[style] in body)

    async def get(self, path: str) -> tuple[int, str]:
        """Status and text of a GET."""
        async with self.session.get(self.url + path) as response:
            return response.status, await response.text()


class Fleet:
    """A running `balancer serve`, and its log."""

    def __init__(self, process: asyncio.subprocess.Process, log: Path, workers: int) -> None:
        self.process = process
        self.log = log
        self.count = workers
        self.url = ""

    # -- its log -------------------------------------------------------------------------------------------------------

    def text(self) -> str:
        """All that it wrote to stderr."""
        return self.log.read_text(encoding="utf-8")

    def entries(self, event: str = "") -> list[dict[str, Any]]:
        """The entries of its log, all or those of an event."""
        found = []
        for line in self.text().splitlines():
            with contextlib.suppress(msgspec.DecodeError):
                entry = msgspec.json.decode(line)
                if not event or entry["event"] == event:
                    found.append(entry)
        return found

    async def logged(self, event: str, count: int = 1, timeout_s: float = START_S) -> list[dict[str, Any]]:
        """The entries of an event, once there are that many."""

        async def is_logged() -> bool:
            return len(self.entries(event)) >= count or self.process.returncode is not None

        await eventually(is_logged, timeout_s)
        found = self.entries(event)
        assert len(found) >= count, f"ended with {self.process.returncode} before {event!r}"
        return found

    # -- its workers ---------------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def asker(self) -> AsyncIterator[Asker]:
        """A client on a new connection, which any worker may have accepted."""
        connector = aiohttp.TCPConnector(limit=1)
        timeout = aiohttp.ClientTimeout(total=60)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
            async with session.get(f"{self.url}/readyz") as response:
                state = await response.json()
            yield Asker(session, self.url, state["pid"], state["worker"])

    async def workers(self) -> dict[int, str]:
        """The ids of all workers by process, once every slot has one that is ready."""
        found: dict[int, str] = {}
        deadline = time.monotonic() + START_S
        while len(found) < self.count:
            assert time.monotonic() < deadline, f"only {found} of {self.count} workers answer"
            async with aiohttp.ClientSession() as session, session.get(f"{self.url}/readyz") as response:
                state = await response.json()
                if state["ready"]:
                    found[state["pid"]] = state["worker"]
        return found

    @contextlib.asynccontextmanager
    async def askers(self, each: int = 1) -> AsyncIterator[dict[int, list[Asker]]]:
        """So many clients of every worker, by its process."""
        async with contextlib.AsyncExitStack() as stack:
            found: dict[int, list[Asker]] = {pid: [] for pid in await self.workers()}
            for _ in range(200):
                asker = await stack.enter_async_context(self.asker())
                if len(found[asker.pid]) < each:
                    found[asker.pid].append(asker)
                if all(len(some) == each for some in found.values()):
                    break
            yield found

    def pids(self) -> set[int]:
        """Every process that wrote into the log: the supervisor, and workers dead or alive."""
        return {entry["pid"] for entry in self.entries()} | {self.process.pid}

    # -- its end -------------------------------------------------------------------------------------------------------

    async def ended(self) -> int:
        """Its exit status, once it has ended and no process of it is left."""
        async with asyncio.timeout(END_S):
            status = await self.process.wait()
        await everyone_is_gone(self.pids())
        return status

    async def stopped(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Sends the signal to the supervisor; its exit status."""
        if self.process.returncode is None:
            self.process.send_signal(number)
        return await self.ended()


async def everyone_is_gone(pids: set[int]) -> None:
    """Returns when none of the processes lives."""

    async def are_gone() -> bool:
        return all(is_gone(pid) for pid in pids)

    await eventually(are_gone, END_S)


Start = Callable[..., Awaitable[Fleet]]


@pytest.fixture
async def start(environment: dict[str, str], tmp_path: Path) -> AsyncIterator[Start]:
    """Starts fleets and waits until they serve. At the end all are stopped, and their logs are shown if a test failed.

    A fleet's log must be JSON lines without a traceback, whatever the test did to it.
    """
    fleets: list[Fleet] = []
    numbers = itertools.count()

    async def started(
        *arguments: str,
        document: dict[str, Any] | None = None,
        workers: int = 2,
        port: int = 0,
        variables: dict[str, str] | None = None,
        command: tuple[str, ...] = (sys.executable, "-m", "balancer"),
    ) -> Fleet:
        number = next(numbers)
        line = [*command, "serve", "--workers", str(workers), "--port", str(port), *arguments]
        if document is not None:
            file = tmp_path / f"balancer-{number}.yaml"
            file.write_text(yaml.safe_dump(document), encoding="utf-8")
            line += ["--config", str(file)]
        tokens = {"anna": "key-of-anna-0123", "boris": "key-of-boris-0123"}
        log = tmp_path / f"serve-{number}.log"
        with log.open("wb") as stderr:
            process = await asyncio.create_subprocess_exec(
                *line,
                env=environment | tokens | (variables or {}),
                cwd=tmp_path,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=stderr,
            )
        fleet = Fleet(process, log, workers)
        fleets.append(fleet)
        fleet.url = (await fleet.logged("serving"))[0]["url"]
        return fleet

    yield started
    try:
        for fleet in fleets:
            await fleet.stopped()
    finally:
        for fleet in fleets:
            # Shown by pytest, as what the teardown captured, when the test has failed.
            sys.stderr.write(f"--- the end of {fleet.log.name}\n{fleet.text()[-TAIL_BYTES:]}\n")
            for pid in fleet.pids():
                if not is_gone(pid):
                    os.kill(pid, signal.SIGKILL)
    for fleet in fleets:
        lines = fleet.text().splitlines()
        assert [line for line in lines if not line.startswith("{") or '"traceback"' in line] == []


async def run_command(
    *arguments: str, environment: dict[str, str], cwd: Path | None = None, timeout_s: float = START_S
) -> tuple[int, str, str]:
    """Status, stdout and stderr of a `balancer` command."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "balancer", *arguments),
        env=environment,
        cwd=cwd,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(timeout_s):
            out, err = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()
