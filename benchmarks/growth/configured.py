"""A worker's memory and time against what it knows of: rules and pools, as `balancer serve` has them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import socket
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import redis

from balancer.store import keys
from benchmarks.chaos.processes import Serve
from benchmarks.growth.figures import Part, Plot, Table, Verdict, slope
from benchmarks.growth.processes import a_document, cpu_s, flush, publish, rss_bytes
from tests import servers

_KIB, _MIB = 1024, 2**20
_NOWHERE = "http://127.0.0.1:9"
_MOST_PUBLISHING_S = 90.0
_SCRAPES = 3


class Sizes(msgspec.Struct, frozen=True, kw_only=True):
    """How much is measured."""

    rules: tuple[int, ...]
    pools: tuple[int, ...]
    idle_s: float
    applies: int


FULL = Sizes(rules=(10, 100, 1_000, 10_000), pools=(1, 10, 100), idle_s=15.0, applies=3)
QUICK = Sizes(rules=(10, 200, 1_000), pools=(1, 10), idle_s=3.0, applies=1)


class Start(msgspec.Struct, frozen=True, kw_only=True):
    """A worker of `serve` at rest."""

    serves_s: float
    cpu_s: float
    rss_bytes: int
    fds: int
    idle_permille: float
    """Of a core, while nobody asks for anything."""


class Scrape(msgspec.Struct, frozen=True, kw_only=True):
    """One reading of `/metrics`."""

    cpu_s: float
    stall_ms: float
    """The longest that anybody waited for the worker meanwhile."""
    text_bytes: int


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """One rule was changed with `apply`."""

    apply_cpu_s: float
    taken_s: float
    """From the end of `apply` until the worker stands on it, 0 if it was there before."""
    worker_cpu_s: float
    stall_ms: float
    """The longest that anybody waited for the worker meanwhile."""
    rss_bytes: int


@contextlib.asynccontextmanager
async def _serving(url: str, folder: Path) -> AsyncIterator[tuple[Serve, float]]:
    """A `serve` of one worker until the block ends, and after how many seconds it served."""
    began = time.perf_counter()
    variables = {"BALANCER_ADMIN_PORT": "0", "BALANCER_DATA_DIR": str(folder)}
    serve = await Serve.start(folder / "serve.log", ["--redis", url, "--port", "0", "--workers", "1"], variables)
    try:
        yield serve, time.perf_counter() - began
    finally:
        await serve.stop()


async def _at_rest(serve: Serve, serves_s: float, idle_s: float) -> Start:
    (pid,) = serve.workers()
    if hasattr(os, "sched_setaffinity"):  # Others may have the core on which it was started.
        os.sched_setaffinity(pid, os.sched_getaffinity(0))
    started_cpu_s = cpu_s(pid)
    await asyncio.sleep(2)
    before, since = cpu_s(pid), time.perf_counter()
    await asyncio.sleep(idle_s)
    return Start(
        serves_s=serves_s,
        cpu_s=started_cpu_s,
        rss_bytes=rss_bytes(pid),
        fds=len(os.listdir(f"/proc/{pid}/fd")),
        idle_permille=1000 * (cpu_s(pid) - before) / (time.perf_counter() - since),
    )


async def _change(serve: Serve, url: str, folder: Path, raw: dict[str, Any]) -> Change:
    """Applies a document as an operator does."""
    file = folder / "changed.json"
    file.write_text(json.dumps(raw), encoding="utf-8")
    (pid,) = serve.workers()
    before = cpu_s(pid)
    async with aiohttp.ClientSession(base_url=f"http://127.0.0.1:{serve.port}") as session:

        async def revision() -> int:
            async with session.get("/readyz") as answer:
                return int((await answer.json())["revision"])

        old = await revision()
        is_done = threading.Event()
        knocking = asyncio.create_task(asyncio.to_thread(_knock, serve.port, is_done))
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "balancer", "apply", str(file), "--redis", url),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
        )
        assert await process.wait() == 0, "apply has failed"
        done = time.perf_counter()
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        while await revision() == old:  # noqa: ASYNC110 - another process is waited for
            await asyncio.sleep(0.02)
        taken_s = time.perf_counter() - done
        await asyncio.sleep(1)
        is_done.set()
        stall_s = await knocking
    return Change(
        apply_cpu_s=after.ru_utime + after.ru_stime - used.ru_utime - used.ru_stime,
        taken_s=taken_s,
        worker_cpu_s=cpu_s(pid) - before,
        stall_ms=stall_s * 1000,
        rss_bytes=rss_bytes(pid),
    )


async def _scrape(serve: Serve) -> Scrape:
    """What Prometheus asks for, now and then."""
    (pid,) = serve.workers()
    before = cpu_s(pid)
    is_done = threading.Event()
    knocking = asyncio.create_task(asyncio.to_thread(_knock, serve.port, is_done))
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"http://127.0.0.1:{serve.port}/metrics") as answer,
    ):
        text = await answer.read()
    is_done.set()
    return Scrape(stall_ms=await knocking * 1000, cpu_s=cpu_s(pid) - before, text_bytes=len(text))


def _whole(scrapes: list[Scrape]) -> Scrape:
    """The best of those that tell all: on a busy machine Redis may answer too late for one."""
    longest = max(scrape.text_bytes for scrape in scrapes)
    return min((s for s in scrapes if s.text_bytes > longest / 2), key=lambda scrape: scrape.stall_ms)


def _knock(port: int, is_done: threading.Event) -> float:
    """The longest that an answer to `/healthz` took until told to end."""
    longest_s = 0.0
    with socket.create_connection(("127.0.0.1", port)) as connection:
        while not is_done.wait(0.005):
            began = time.perf_counter()
            connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: b\r\n\r\n")
            connection.recv(2**16)
            longest_s = max(longest_s, time.perf_counter() - began)
    return longest_s


async def by_rules(url: str, sizes: Sizes) -> Part:
    """A worker that knows few and many rules; its start, its rest, and a change of one rule."""
    starts, changes, snapshots = dict[int, Start](), dict[int, list[Change]](), dict[int, int]()
    scrapes = dict[int, Scrape]()
    published, notes = dict[int, float](), list[str]()
    for rules in sizes.rules:
        if expected_s := _expected_s(published, rules):
            notes.append(f"Not measured: {rules} rules, whose publication would take some {expected_s:.0f} s of CPU.")
            continue
        flush(url)
        began_s = time.process_time()
        revision = await publish(url, a_document(_NOWHERE, rules=rules))
        published[rules] = time.process_time() - began_s
        with redis.Redis.from_url(url) as client:
            snapshots[rules] = client.strlen(keys.snapshot(revision))
        with tempfile.TemporaryDirectory(prefix="growth-") as name:
            folder = Path(name)
            async with _serving(url, folder) as (serve, serves_s):
                starts[rules] = await _at_rest(serve, serves_s, sizes.idle_s)
                scrapes[rules] = _whole([await _scrape(serve) for _ in range(_SCRAPES)])
                changes[rules] = [
                    await _change(serve, url, folder, a_document(_NOWHERE, rules=rules, threshold=11 + i))
                    for i in range(sizes.applies)
                ]
    of_rss = [(float(rules), start.rss_bytes) for rules, start in starts.items()]
    most = max(starts)
    few = max(rules for rules in starts if rules < most)
    return Part(
        title="A worker's rules",
        text="One worker of `balancer serve`. A change is one rule of them all, by `balancer apply`; a stall is the "
        "longest that `/healthz` took meanwhile. Times are what the machine gave; CPU seconds are exact.",
        tables=(
            Table(
                columns=(
                    "rules",
                    "publishing all, CPU s",
                    "serves after, s",
                    "CPU of that, s",
                    "RSS, MiB",
                    "‰ of a core at rest",
                    "a scrape, CPU s",
                    "its stall, ms",
                    "apply, CPU s",
                    "worker's CPU for it, s",
                    "stall, ms",
                    "RSS after, MiB",
                    "snapshot in Redis, KiB",
                ),
                rows=tuple(
                    (
                        str(rules),
                        f"{published[rules]:.2f}",
                        f"{starts[rules].serves_s:.2f}",
                        f"{starts[rules].cpu_s:.2f}",
                        f"{starts[rules].rss_bytes / _MIB:.1f}",
                        f"{starts[rules].idle_permille:.1f}",
                        f"{scrapes[rules].cpu_s:.2f}",
                        f"{scrapes[rules].stall_ms:.0f}",
                        f"{changes[rules][0].apply_cpu_s:.2f}",
                        f"{changes[rules][0].worker_cpu_s:.2f}",
                        f"{max(change.stall_ms for change in changes[rules]):.0f}",
                        f"{changes[rules][-1].rss_bytes / _MIB:.1f}",
                        f"{snapshots[rules] / _KIB:.0f}",
                    )
                    for rules in starts
                ),
            ),
        ),
        plots=(
            Plot(
                name="worker-rules",
                x="rules",
                y="MiB, and ms",
                curves={
                    "RSS of a worker, MiB": [(rules, rss / _MIB) for rules, rss in of_rss],
                    "stall while one rule changes, ms": [
                        (float(rules), max(change.stall_ms for change in changes[rules])) for rules in starts
                    ],
                    "CPU of its start, ms": [(float(rules), starts[rules].cpu_s * 1000) for rules in starts],
                },
            ),
        ),
        verdicts=(
            Verdict(
                claim=f"publishing a rule of {most} costs what it does of {few}",
                figure=(published[most] / most) / (published[few] / few),
                bound=1.5,
            ),
            Verdict(claim="a worker's memory for a rule", figure=slope(of_rss) / _KIB, bound=12, unit="KiB"),
            Verdict(
                claim=f"{most} rules: a worker's CPU until it serves", figure=starts[most].cpu_s, bound=5, unit="s"
            ),
            Verdict(
                claim=f"{most} rules: a change of one holds the worker up for",
                figure=max(change.stall_ms for change in changes[most]),
                bound=250,
                unit="ms",
            ),
            Verdict(
                claim=f"{most} rules: a scrape holds the worker up for",
                figure=scrapes[most].stall_ms,
                bound=100,
                unit="ms",
            ),
            Verdict(
                claim=f"{most} rules: a worker at rest uses of a core",
                figure=starts[most].idle_permille,
                bound=20,
                unit="‰",
            ),
            Verdict(
                claim=f"{most} rules: memory after {sizes.applies} changes, of what it was",
                figure=changes[most][-1].rss_bytes / starts[most].rss_bytes,
                bound=1.5,
            ),
        ),
        notes=(
            f"Redis keeps the last 200 snapshots: {200 * snapshots[most] / _MIB:.0f} MiB with {most} rules.",
            *notes,
        ),
    )


def _expected_s(published: dict[int, float], rules: int) -> float:
    """The CPU that publishing so many rules would take where that is too much, else 0: at worst it is quadratic."""
    if not published:
        return 0.0
    known = max(published)
    expected_s = published[known] * (rules / known) ** 2
    return expected_s if expected_s > _MOST_PUBLISHING_S else 0.0


async def by_pools(url: str, sizes: Sizes) -> Part:
    """A worker with few and many pools."""
    starts = dict[int, Start]()
    for pools in sizes.pools:
        flush(url)
        await publish(url, a_document(_NOWHERE, rules=pools, pools=pools))
        with tempfile.TemporaryDirectory(prefix="growth-") as name:
            async with _serving(url, Path(name)) as (serve, serves_s):
                starts[pools] = await _at_rest(serve, serves_s, sizes.idle_s)
    of_rss = [(float(pools), starts[pools].rss_bytes) for pools in sizes.pools]
    of_idle = [(float(pools), starts[pools].idle_permille) for pools in sizes.pools]
    of_fds = [(float(pools), starts[pools].fds) for pools in sizes.pools]
    return Part(
        title="A worker's pools",
        text="One worker of `balancer serve`, one rule a pool, one Redis; nobody asks for anything.",
        tables=(
            Table(
                columns=("pools", "serves after, s", "RSS, MiB", "open files", "‰ of a core at rest"),
                rows=tuple(
                    (
                        str(pools),
                        f"{start.serves_s:.2f}",
                        f"{start.rss_bytes / _MIB:.1f}",
                        str(start.fds),
                        f"{start.idle_permille:.1f}",
                    )
                    for pools, start in starts.items()
                ),
            ),
        ),
        verdicts=(
            Verdict(claim="a worker's memory for a pool", figure=slope(of_rss) / _KIB, bound=400, unit="KiB"),
            Verdict(claim="a worker's open files for a pool", figure=slope(of_fds), bound=1.1),
            Verdict(claim="a worker's rest costs, for each pool", figure=slope(of_idle), bound=1.0, unit="‰ of a core"),
        ),
    )


async def measure(*, is_quick: bool) -> list[Part]:
    """All of it, on a server of its own."""
    sizes = QUICK if is_quick else FULL
    with servers.running("valkey-9") as url:
        return [await by_rules(url, sizes), await by_pools(url, sizes)]
