"""Does anything grow that should not: a worker, Redis and the metrics under clients that always bring something new."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
import msgspec
import redis

from balancer.store import keys
from benchmarks.growth import crowd
from benchmarks.growth.connected import BLOCKS_AT_REST, Totals, settled
from benchmarks.growth.figures import Part, Plot, Point, Table, Verdict, slope
from benchmarks.growth.processes import Upstream, Worker, a_document, publish, rss_bytes
from tests import servers

_WIDTH = 16
_STEPS = 5
_SAMPLE_S = 0.5
_AFFINITY_S = 3600
_QUIET_S = 2.0
_KEPT_S = 0.2
_PAGE = 1_000
_SHOWN = 5
_BY_CHANCE = "balancer_degraded_picks_total"
"""Has a series for a rule once Redis was late for it, as it may be on a busy machine."""
_MOST_BLOCKS = 0.05
"""That a request may leave behind: one object in twenty requests."""
_MOST_RSS_BYTES, _RSS_AT_REST = 64, 2 * 2**20
"""The same of bytes, and how much they vary at rest."""
_PINNED, _PLAIN = "m1", "m0"

Do = Callable[[crowd.Client, int], Awaitable[int]]
"""One request of a client, by its number; the status."""


class Kind(msgspec.Struct, frozen=True, kw_only=True):
    """Requests that bring something new each time."""

    name: str
    share: int
    """Of a hundred requests."""
    status: int
    """That each gets; 0: the client leaves before."""
    do: Do
    warm_up: int = 200
    """So many fill what is bounded; they are no part of the growth."""


def _asks(make: Callable[[int], bytes]) -> Do:
    async def do(client: crowd.Client, number: int) -> int:
        return (await client.ask(make(number)))[0]

    return do


async def _leaves(client: crowd.Client, number: int) -> int:
    """A client that leaves in the middle of a stream, or before anything has come."""
    answer = client.send(crowd.request("/v1/chat/completions", crowd.chat(_PLAIN, holds=True)))
    if number % 2:
        await answer.begun
    else:
        await asyncio.sleep(0)
    client.leave()
    return 0


def _session(number: int) -> bytes:
    return b'{"model":"%b","user":"u%d","messages":[{"role":"user","content":"hi"}]}' % (_PINNED.encode(), number)


_CHAT = "/v1/chat/completions"
KINDS = (
    Kind(name="unknown models", share=20, status=404, do=_asks(lambda i: crowd.request(_CHAT, crowd.chat(f"no-{i}")))),
    Kind(name="unknown paths", share=10, status=404, do=_asks(lambda i: crowd.request(f"/v2/{i}", b"{}"))),
    Kind(name="bodies that are none", share=10, status=400, do=_asks(lambda i: crowd.request(_CHAT, b"{%d" % i))),
    Kind(
        name="request ids",
        share=20,
        status=200,
        do=_asks(lambda i: crowd.request(_CHAT, crowd.chat(_PLAIN), x_request_id=f"request-{i}")),
    ),
    # A worker remembers ten thousand sessions.
    Kind(name="sessions", share=20, status=200, do=_asks(lambda i: crowd.request(_CHAT, _session(i))), warm_up=10_500),
    Kind(
        name="responses",
        share=15,
        status=200,
        do=_asks(lambda _: crowd.request("/v1/responses", b'{"model":"m0","input":"hi"}')),
    ),
    Kind(name="clients that leave", share=5, status=0, do=_leaves),
)


PLAIN = next(kind for kind in KINDS if kind.name == "request ids")


class Grown(msgspec.Struct, frozen=True, kw_only=True):
    """What each request of a kind left behind in the worker."""

    requests: int
    blocks: float
    rss_bytes: float


async def _drive(port: int, kind: Kind, first: int, count: int, done: Callable[[], None]) -> None:
    """Makes requests of a kind, with numbers that none had before."""
    free: list[crowd.Client] = []

    async def one(number: int) -> None:
        client = free.pop() if free else await crowd.connected(port)
        status = await kind.do(client, first + number)
        assert status == kind.status, f"{kind.name}: {status}"
        done()
        if kind.status:
            free.append(client)

    await crowd.in_turns(count, _WIDTH, one)
    for client in free:
        client.leave()


async def _grown(worker: Worker, kind: Kind, count: int, done: Callable[[], None]) -> Grown:
    await _drive(worker.port, kind, 0, kind.warm_up, done)
    blocks: list[Point] = []
    rss: list[Point] = []
    for step in range(_STEPS + 1):
        if step:
            made = count * (step - 1) // _STEPS
            more = count * step // _STEPS - made
            await _drive(worker.port, kind, kind.warm_up + made, more, done)
        await asyncio.sleep(5 * _KEPT_S)  # Connections that clients have closed are closed here too.
        await _drive(worker.port, PLAIN, -1, 1, done)  # Whatever was settled before is forgotten by now.
        size = await worker.size()
        at = float(count * step // _STEPS)
        blocks.append((at, size.blocks))
        rss.append((at, size.rss_bytes))
    # The first step still fills what the warm-up did not.
    return Grown(requests=count, blocks=slope(blocks[1:]), rss_bytes=slope(rss[1:]))


class Keys(msgspec.Struct, frozen=True, kw_only=True):
    """The keys in Redis by kind, and those that should expire and do not."""

    kinds: dict[str, int]
    lasting: int


def _keys(url: str) -> Keys:
    kinds: Counter[str] = Counter()
    lasting = 0
    with redis.Redis.from_url(url) as client:
        cursor: Any = None
        while cursor != 0:
            found: Any
            cursor, found = client.scan(cursor or 0, count=_PAGE)
            pipe = client.pipeline(transaction=False)
            for key in found:
                pipe.pttl(key)
            for key, ttl in zip(found, pipe.execute(), strict=True):
                name = key.decode()
                is_permanent = name.startswith(keys.PERMANENT)
                kinds["registry" if is_permanent else name.split("}:")[1].partition(":")[0]] += 1
                lasting += ttl == -1 and not is_permanent
    return Keys(kinds=dict(sorted(kinds.items())), lasting=lasting)


async def _series(port: int) -> frozenset[str]:
    """The series of the metrics, by name and labels."""
    async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{port}/metrics") as answer:
        lines = (await answer.text()).splitlines()
    return frozenset(line.rpartition(" ")[0] for line in lines if not line.startswith(("#", _BY_CHANCE)))


async def measure(*, is_quick: bool) -> list[Part]:
    """All of it, on a server of its own."""
    total = 12_000 if is_quick else 200_000
    samples: list[Point] = []
    bounds: list[tuple[str, int]] = []
    made = 0

    def done() -> None:
        nonlocal made
        made += 1

    with servers.running("valkey-9") as url:
        async with Upstream.running() as upstream:
            raw = a_document(upstream.url, rules=2)
            raw["rules"][1]["session_affinity"] = _AFFINITY_S
            await publish(url, raw)
            async with Worker.running(url, kept_s=_KEPT_S) as worker:
                for kind in KINDS:
                    await _drive(worker.port, kind, -100, 50, done)
                # What is counted by service has a series for each by now.
                before, series = _keys(url), await _series(worker.port)

                async def sample() -> None:
                    while True:
                        samples.append((float(made), rss_bytes(worker.pid) / 2**20))
                        await asyncio.sleep(_SAMPLE_S)

                sampling = asyncio.create_task(sample())
                grown: dict[str, Grown] = {}
                for kind in KINDS:
                    bounds.append((kind.name, made))
                    grown[kind.name] = await _grown(worker, kind, total * kind.share // 100, done)
                sampling.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await sampling
                counted = await settled(url, pools=1)
                await asyncio.sleep(_QUIET_S)
                after, series_after = _keys(url), await _series(worker.port)
                seen = sum(await upstream.books())
    return [_told(grown, samples, bounds, (before, after), (series, series_after), counted, seen, made)]


def _told(
    grown: dict[str, Grown],
    samples: list[Point],
    bounds: list[tuple[str, int]],
    stored: tuple[Keys, Keys],
    series: tuple[frozenset[str], frozenset[str]],
    counted: Totals,
    seen: int,
    made: int,
) -> Part:
    before, after = stored
    bounded = {"pin", "response"}
    """For as long as an operator, or the vendors, keep them."""
    others = [sum(n for kind, n in each.kinds.items() if kind not in bounded) for each in stored]
    curves: dict[str, list[Point]] = {}
    for (name, start), (_, end) in zip(bounds, [*bounds[1:], ("", made + 1)], strict=True):
        curves[name] = [(x, y) for x, y in samples if start <= x < end]
    new = sorted(series[1] - series[0])
    of_blocks = {name: each.blocks - BLOCKS_AT_REST / each.requests for name, each in grown.items()}
    of_rss = {name: each.rss_bytes - _RSS_AT_REST / each.requests for name, each in grown.items()}
    worst, worst_rss = max(of_blocks, key=of_blocks.__getitem__), max(of_rss, key=of_rss.__getitem__)
    return Part(
        title="What should not grow",
        text=f"{made} requests through one worker, each with something that no request had before. Blocks are the "
        "memory that Python has given out, garbage collected; RSS has the allocator's own moods in it.",
        tables=(
            Table(
                columns=("requests with ever new", "requests", "blocks left by one", "bytes of RSS by one"),
                rows=tuple(
                    (name, str(each.requests), f"{each.blocks:.3f}", f"{each.rss_bytes:.0f}")
                    for name, each in grown.items()
                ),
            ),
            Table(
                columns=("keys in Redis", "before", "after"),
                rows=tuple((kind, str(before.kinds.get(kind, 0)), str(count)) for kind, count in after.kinds.items()),
            ),
        ),
        plots=(Plot(name="leaks", x="requests", y="RSS of the worker, MiB", curves=curves, is_log=False),),
        verdicts=(
            Verdict(
                claim=f"blocks of memory that a request leaves behind ({worst}), beyond what varies at rest",
                figure=max(0, of_blocks[worst]),
                bound=_MOST_BLOCKS,
            ),
            Verdict(
                claim=f"RSS that a request leaves behind ({worst_rss}), beyond what varies at rest",
                figure=max(0, of_rss[worst_rss]),
                bound=_MOST_RSS_BYTES,
                unit="bytes",
            ),
            Verdict(claim="keys without expiry beside the registry's", figure=after.lasting, bound=0),
            Verdict(claim="keys more, beside pins and responses", figure=others[1] - others[0], bound=0),
            Verdict(claim="series of metrics more", figure=len(new), bound=0),
            Verdict(
                claim="attempts in flight or lost at the end, by Redis",
                figure=counted.in_flight + counted.lost,
                bound=0,
            ),
            Verdict(
                claim="attempts that the upstream saw and Redis did not count",
                figure=max(0, seen - counted.requests),
                bound=0,
            ),
        ),
        notes=tuple(f"a new series: `{name}`" for name in new[:_SHOWN]),
    )
