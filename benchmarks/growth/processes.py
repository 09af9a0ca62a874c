"""The processes of a measurement, each ended with its block; and the configurations that they serve."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import redis

from balancer import document
from balancer.store.connection import Commands
from balancer.store.publishing import publish_file
from balancer.store.registry import Registry
from balancer.store.topology import Topology
from benchmarks.growth.inside import Since, Size

_START_S = 120.0
_ANSWER_S = 300.0
_END_S = 60.0
_LINE_BYTES = 2**24
_T = TypeVar("_T")


class Child:
    """A process that answers each line on its stdin with one."""

    def __init__(self, process: asyncio.subprocess.Process, greeting: str) -> None:
        self.process = process
        self.greeting = greeting

    async def ask(self, line: str) -> bytes:
        """What it answers to a line."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{line}\n".encode())
        async with asyncio.timeout(_ANSWER_S):
            answer = await self.process.stdout.readline()
        assert answer, "the process has ended"
        return answer

    @staticmethod
    @contextlib.asynccontextmanager
    async def running(module: str, *arguments: str, variables: dict[str, str] | None = None) -> AsyncIterator[Child]:
        """One that runs until the block ends."""
        clean = {key: value for key, value in os.environ.items() if not key.startswith("BALANCER_")}
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", module, *arguments),
            env=clean | (variables or {}),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=_LINE_BYTES,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            async with asyncio.timeout(_START_S):
                greeting = (await process.stdout.readline()).decode().strip()
            assert greeting, f"{module} did not start"
            yield Child(process, greeting)
        finally:
            process.stdin.close()
            try:
                async with asyncio.timeout(_END_S):
                    await process.wait()
            finally:
                if process.returncode is None:
                    process.kill()
                    await process.wait()


class Upstream:
    """The upstream's process."""

    def __init__(self, child: Child) -> None:
        self._child = child
        self.url = child.greeting

    async def books(self, line: str = "books") -> tuple[int, int]:
        """How many requests and streams it has seen."""
        requests, streams = (await self._child.ask(line)).split()
        return int(requests), int(streams)

    async def finish(self) -> tuple[int, int]:
        """The same, once all streams are ended."""
        return await self.books("finish")

    @staticmethod
    @contextlib.asynccontextmanager
    async def running() -> AsyncIterator[Upstream]:
        """One that runs until the block ends."""
        async with Child.running("benchmarks.growth.upstream") as child:
            yield Upstream(child)


class Worker:
    """A worker's process that tells what is in it."""

    def __init__(self, child: Child) -> None:
        self._child = child
        self.port = int(child.greeting)
        self.pid = child.process.pid

    async def size(self) -> Size:
        """What it is made of, at rest."""
        return msgspec.json.decode(await self._child.ask("size"), type=Size)

    async def mark(self) -> None:
        """From here on `since` counts."""
        await self._child.ask("mark")

    async def since(self) -> Since:
        """What has come since the mark."""
        return msgspec.json.decode(await self._child.ask("since"), type=Since)

    async def count(self) -> None:
        """Counts lines from here on."""
        await self._child.ask("count")

    async def counted(self) -> dict[str, int]:
        """How often each line ran for requests."""
        return msgspec.json.decode(await self._child.ask("counted"), type=dict[str, int])

    @staticmethod
    @contextlib.asynccontextmanager
    async def running(
        url: str, *, frames: int = 0, kept_s: float | None = None, redis_deadline_ms: int = 250
    ) -> AsyncIterator[Worker]:
        """One that runs until the block ends; with frames, its memory is traced that deep."""
        kept = () if kept_s is None else (str(kept_s),)
        variables = {
            "BALANCER_UPSTREAM_CONNECTIONS": "100000",
            "BALANCER_AUDIT_INTERVAL_S": "0",
            "BALANCER_REDIS_DEADLINE_MS": str(redis_deadline_ms),
        }
        if frames:
            variables["PYTHONTRACEMALLOC"] = str(frames)
        async with Child.running("benchmarks.growth.inside", url, *kept, variables=variables) as child:
            yield Worker(child)


def a_document(
    upstream: str, *, rules: int = 1, services: int = 2, pools: int = 1, affinity_s: int = 0, threshold: int = 10
) -> dict[str, Any]:
    """So many rules `m0`, `m1`… over so many services each of ten providers, in pools by turns.

    The threshold is the first rule's.
    """
    return {
        "providers": [
            {"name": f"p{i}", "api_base": upstream, "no_key_required": True, "timeouts": {"idle_s": 600}}
            for i in range(10)
        ],
        "rules": [
            {
                "uuid": f"m{i}",
                "request_model": f"m{i}",
                "pool": f"pool-{i % pools}",
                "lb_tactic": {"type": "round_robin", "params": {"request_threshold": 10 if i else threshold}},
                "session_affinity": affinity_s,
                "services": [{"provider": f"p{s % 10}", "model": f"m{i}-{s}"} for s in range(services)],
            }
            for i in range(rules)
        ],
    }


async def publish(url: str, raw: dict[str, Any]) -> int:
    """Publishes a document; its revision."""
    commands = Commands(Topology(url), timeout_s=60)
    try:
        configuration = document.read(raw, door="strict").configuration
        return (await publish_file(Registry(commands), configuration, None, force=True)).revision
    finally:
        await commands.aclose()


def flush(url: str) -> None:
    """Empties Redis."""
    with redis.Redis.from_url(url) as client:
        client.flushall()


def rss_bytes(pid: int) -> int:
    """What a process has in memory."""
    return int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def cpu_s(pid: int) -> float:
    """What a process has used of CPU."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
