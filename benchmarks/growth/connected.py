"""A worker's memory against what is connected to it: idle clients, and streams that stay open."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any

import msgspec
import redis

from balancer.store import keys
from balancer.store.views import read_pool
from benchmarks.growth import crowd
from benchmarks.growth.figures import Part, Plot, Point, Table, Verdict, quantile, slope
from benchmarks.growth.files import raise_open_files
from benchmarks.growth.inside import Size
from benchmarks.growth.processes import Upstream, Worker, a_document, flush, publish
from benchmarks.growth.upstream import DRIP_S, INPUT, OUTPUT
from tests import servers

_Rows = tuple[tuple[str, ...], ...]
_KIB, _MIB = 1024, 2**20
_SPARE_FILES = 500
_WIDTH = 50
_PAUSE_S = 0.005
"""Between small requests."""
_TRACED_STREAMS = 300
_SHOWN = 15
_KEPT_S = 25.0
"""A connection to an upstream is idle for less than that before it is closed."""
BLOCKS_AT_REST = 1500
"""So much the memory of a worker at rest varies: caches, timers, connections that are still kept."""
_SETTLED_KEPT_S = 0.2
_PATIENCE_MS = 10_000
"""What a worker picks alone, because the machine is busy, Redis would not see in flight."""
_LEAST_BYTES = 64
"""What a stream has less of is not shown."""


class Sizes(msgspec.Struct, frozen=True, kw_only=True):
    """How much is measured; `small` requests have their time taken."""

    connections: tuple[int, ...]
    streams: tuple[int, ...]
    small: int


FULL = Sizes(connections=(0, 1_000, 2_000, 4_000), streams=(0, 1_000, 2_000, 4_000, 8_000), small=500)
QUICK = Sizes(connections=(0, 200, 400), streams=(0, 500, 1_000), small=100)


class Totals(msgspec.Struct, frozen=True, kw_only=True):
    """What the services of some pools have counted, all together."""

    requests: int
    input: int
    output: int
    in_flight: int = 0
    reserved: int = 0
    lost: int = 0
    abandoned: int = 0


def totals(url: str, pools: int = 1) -> Totals:
    """What Redis has counted."""
    names = Totals.__struct_fields__
    sums = dict.fromkeys(names, 0)
    with redis.Redis.from_url(url) as client:
        for i in range(pools):
            pool = f"pool-{i}"
            partitions: Any = client.hgetall(keys.partitions(pool))
            services: Any = client.hgetall(keys.services(pool))
            for service in read_pool(pool, partitions, services, 0).services.values():
                for name in names:
                    sums[name] += getattr(service, name)
    return Totals(**sums)


async def settled(url: str, pools: int = 1) -> Totals:
    """The totals once nothing is in flight any more, or after some seconds."""
    until = time.monotonic() + 20
    while (found := totals(url, pools)).in_flight and time.monotonic() < until:  # noqa: ASYNC110 - another process
        await asyncio.sleep(0.2)
    return found


async def by_connections(url: str, sizes: Sizes) -> Part:
    """A worker with few and many idle connections of clients, each of which has asked once."""
    flush(url)
    points: list[Point] = []
    async with Upstream.running() as upstream:
        await publish(url, a_document(upstream.url))
        async with Worker.running(url) as worker:
            await _warm_up(worker.port)
            clients: list[crowd.Client] = []
            for wanted in sizes.connections:

                async def open_one(_: int) -> None:
                    client = await crowd.connected(worker.port)
                    status, _body = await client.ask(crowd.request("/v1/chat/completions", crowd.chat("m0")))
                    assert status == 200
                    clients.append(client)

                await crowd.in_turns(wanted - len(clients), _WIDTH, open_one)
                points.append((float(wanted), (await worker.size()).rss_bytes))
            for client in clients:
                client.leave()
    return Part(
        title="Idle connections of clients",
        text="Kept alive behind one answered request each.",
        tables=(
            Table(columns=("connections", "RSS, MiB"), rows=tuple((f"{x:.0f}", f"{y / _MIB:.1f}") for x, y in points)),
        ),
        verdicts=(
            Verdict(
                claim="a worker's memory for an idle connection", figure=slope(points) / _KIB, bound=16, unit="KiB"
            ),
        ),
    )


class _Streams(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured of streams that stay open."""

    opened: int
    points: list[Point]
    """Streams, and bytes of RSS."""
    alone_ms: list[float]
    crowded_ms: list[float]
    """Small requests, without the streams and beside all of them."""
    busy_share: float
    open_in_redis: int
    proper: int
    seen: int
    """By the upstream, small requests and streams."""
    counted: Totals
    before: Size
    after: Size
    """The worker at rest."""


async def _stream(url: str, sizes: Sizes) -> _Streams:
    most = min(sizes.streams[-1], (raise_open_files() - _SPARE_FILES) // 2)
    steps = [step for step in sizes.streams if step < most] + [most]
    small = crowd.request("/v1/chat/completions", crowd.chat("m0"))
    points: list[Point] = []
    clients: list[crowd.Client] = []
    answers: list[crowd.Answer] = []
    async with Upstream.running() as upstream:
        await publish(url, a_document(upstream.url))
        async with Worker.running(url, kept_s=_SETTLED_KEPT_S, redis_deadline_ms=_PATIENCE_MS) as worker:

            async def open_one(_: int) -> None:
                client = await crowd.connected(worker.port)
                answer = client.send(crowd.request("/v1/chat/completions", crowd.chat("m0", holds=True)))
                assert await answer.begun == 200
                clients.append(client)
                answers.append(answer)

            await _warm_up(worker.port)
            alone_ms = await crowd.latencies_ms(worker.port, small, sizes.small, _PAUSE_S)
            before = await worker.size()
            for wanted in steps:
                await crowd.in_turns(wanted - len(answers), _WIDTH, open_one)
                await asyncio.sleep(1)
                points.append((float(wanted), (await worker.size()).rss_bytes))
            used_s, since = (await worker.size()).cpu_s, time.perf_counter()
            crowded_ms = await crowd.latencies_ms(worker.port, small, sizes.small, _PAUSE_S)
            busy_share = ((await worker.size()).cpu_s - used_s) / (time.perf_counter() - since)
            open_in_redis = totals(url).in_flight
            seen = sum(await upstream.finish())
            ends = await asyncio.gather(*(answer.ended for answer in answers), return_exceptions=True)
            for client in clients:
                client.leave()
            counted = await settled(url)
            await _at_rest(worker, before.fds)
            await _ask_once(worker.port)  # Whatever was settled before is forgotten with this.
            after = await worker.size()
    return _Streams(
        opened=len(answers),
        points=points,
        alone_ms=alone_ms,
        crowded_ms=crowded_ms,
        busy_share=busy_share,
        open_in_redis=open_in_redis,
        proper=sum(isinstance(end, bytes) and b"[DONE]" in end for end in ends),
        seen=seen,
        counted=counted,
        before=before,
        after=after,
    )


async def by_streams(url: str, sizes: Sizes) -> Part:
    """A worker with few and many streams that stay open."""
    flush(url)
    found = await _stream(url, sizes)
    types, files, lines, traced_bytes = await _composition(url)
    most, points, counted = found.opened, found.points, found.counted
    right = Totals(requests=found.seen, input=found.seen * INPUT, output=found.seen * OUTPUT)
    wrong = sum(getattr(counted, name) != getattr(right, name) for name in Totals.__struct_fields__)
    each = slope(points) / _KIB
    more_bytes, more_blocks = found.after.rss_bytes - found.before.rss_bytes, found.after.blocks - found.before.blocks
    return Part(
        title="Streams that stay open",
        text=f"Each gets an event every {DRIP_S:g} s. RSS is that of one worker, {each:.1f} KiB a stream; of that "
        f"Python itself gave out {traced_bytes / _KIB:.1f} KiB. At {most} streams it uses {found.busy_share:.0%} of a "
        f"core, the small requests beside them included. Ended, the streams leave {more_bytes / _MIB:.1f} MiB of RSS, "
        f"and {more_blocks} blocks of memory in use.",
        tables=(
            Table(columns=("streams", "RSS, MiB"), rows=tuple((f"{x:.0f}", f"{y / _MIB:.1f}") for x, y in points)),
            Table(
                columns=("small requests", "p50, ms", "p99, ms"),
                rows=tuple(
                    (name, f"{quantile(values, 0.5):.1f}", f"{quantile(values, 0.99):.1f}")
                    for name, values in (("alone", found.alone_ms), (f"beside {most} streams", found.crowded_ms))
                ),
            ),
            Table(columns=("of one stream, by file", "bytes", "blocks"), rows=files),
            Table(columns=("of one stream, by line", "bytes", "blocks"), rows=lines),
            Table(columns=("of one stream, by type", "objects"), rows=types),
        ),
        plots=(
            Plot(
                name="streams",
                x="streams open",
                y="RSS of one worker, MiB",
                curves={"RSS": [(x, y / _MIB) for x, y in points]},
                is_log=False,
            ),
        ),
        verdicts=(
            Verdict(claim="a worker's memory for an open stream", figure=each, bound=64, unit="KiB"),
            Verdict(claim=f"of {most} streams, not ended properly", figure=most - found.proper, bound=0),
            Verdict(
                claim=f"of {most} open streams, not in flight by Redis",
                figure=most - found.open_in_redis,
                bound=0,
            ),
            Verdict(claim="totals in Redis that differ from the upstream's books", figure=wrong, bound=0),
            Verdict(
                claim=f"p99 of small requests beside {most} streams, less that without",
                figure=quantile(found.crowded_ms, 0.99) - quantile(found.alone_ms, 0.99),
                bound=50,
                unit="ms",
            ),
            Verdict(
                claim="blocks of memory that an ended stream leaves behind, beyond what varies at rest",
                figure=max(0, more_blocks - BLOCKS_AT_REST) / most,
                bound=1.0,
            ),
        ),
    )


async def _composition(url: str) -> tuple[_Rows, _Rows, _Rows, float]:
    """What lies in an open stream: objects by type, memory by the file and the line that asked for it, and the sum."""
    flush(url)
    async with Upstream.running() as upstream:
        await publish(url, a_document(upstream.url))
        async with Worker.running(url, frames=1) as worker:
            await _warm_up(worker.port)
            clients: list[crowd.Client] = []

            async def open_one(_: int) -> None:
                client = await crowd.connected(worker.port)
                await client.send(crowd.request("/v1/chat/completions", crowd.chat("m0", holds=True))).begun
                clients.append(client)

            await crowd.in_turns(_TRACED_STREAMS, 10, open_one)  # So that caches and pools are filled.
            await worker.mark()
            await crowd.in_turns(_TRACED_STREAMS, 10, open_one)
            await asyncio.sleep(0.5)
            since = await worker.since()
            for client in clients:
                client.leave()
    types = tuple((name, f"{count / _TRACED_STREAMS:.1f}") for name, count in list(since.types.items())[:_SHOWN])
    by_file: dict[str, tuple[int, int]] = {}
    for place, (size, count) in since.lines.items():
        file = place.partition(":")[0]
        known = by_file.get(file, (0, 0))
        by_file[file] = known[0] + size, known[1] + count
    return types, _dearest(by_file), _dearest(since.lines), since.traced_bytes / _TRACED_STREAMS


def _dearest(places: Mapping[str, tuple[int, int]]) -> _Rows:
    """What a stream has of the most memory, with bytes and blocks."""
    ordered = sorted(places.items(), key=lambda each: -each[1][0])
    return tuple(
        (place, f"{size / _TRACED_STREAMS:.0f}", f"{count / _TRACED_STREAMS:.1f}")
        for place, (size, count) in ordered[:_SHOWN]
        if size / _TRACED_STREAMS >= _LEAST_BYTES
    )


async def _at_rest(worker: Worker, files: int) -> None:
    """Returns once the connections that the worker keeps are closed, or after the time that it keeps them."""
    until = time.monotonic() + _KEPT_S
    while (await worker.size()).fds > files and time.monotonic() < until:  # noqa: ASYNC110 - another process
        await asyncio.sleep(1)


async def _ask_once(port: int) -> None:
    raw = crowd.request("/v1/chat/completions", crowd.chat("m0"))
    assert await crowd.asked(port, [raw], 1) == {200: 1}


async def _warm_up(port: int) -> None:
    raw = crowd.request("/v1/chat/completions", crowd.chat("m0"))
    statuses = await crowd.asked(port, (raw for _ in range(500)), 20)
    assert statuses == {200: 500}, f"the worker does not serve: {statuses}"


async def measure(*, is_quick: bool) -> list[Part]:
    """All of it, on a server of its own."""
    sizes = QUICK if is_quick else FULL
    with servers.running("valkey-9") as url:
        return [await by_connections(url, sizes), await by_streams(url, sizes)]
