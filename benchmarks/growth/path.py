"""What of a request's path in the worker depends on how much is configured: each line that runs more often, counted.

Lines are counted, not seconds: what is linear shows at once and always, on a busy machine too.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterable, Mapping

import aiohttp
import msgspec
import redis

from benchmarks.growth import crowd
from benchmarks.growth.figures import Part, Plot, Table, Verdict
from benchmarks.growth.processes import Upstream, Worker, a_document, publish
from tests import servers

_COUNTED = 20
_TIMED_WIDTH = 8
_LEAST_SHARE = 0.1
"""A line is linear when it runs at least once more for every ten things more."""
_PATIENCE_S = 60.0
_ID = re.compile(rb'"id":"(resp_[^"]+)"')


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """What is configured."""

    rules: int = 10
    services: int = 2
    pools: int = 1


BASE = Case()
FULL = (Case(rules=1_000), Case(rules=10_000), Case(services=20), Case(services=200), Case(rules=100, pools=100))
QUICK = (Case(rules=500), Case(services=100), Case(rules=20, pools=20))
_GROWN: tuple[tuple[str, Callable[[Case], int]], ...] = (
    ("services", lambda case: case.services),
    ("pools", lambda case: case.pools),
    ("rules", lambda case: case.rules),
)
"""What a case has more of than the base, the first that differs."""


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """One case: CPU for a request of each kind, and how often each line ran for it."""

    cpu_us: dict[str, float]
    lines: dict[str, dict[str, float]]


class Linear(msgspec.Struct, frozen=True, kw_only=True):
    """A function with lines that run more often the more there is of something; how many for each more of it."""

    place: str
    """`file:function`."""
    lines: tuple[int, ...]
    of: str
    kinds: tuple[str, ...]
    share: float


def linear(few: Mapping[str, float], many: Mapping[str, float], more: int) -> dict[str, float]:
    """The lines whose count rises with what there is more of, and how often they run for each of it."""
    shares = {line: (count - few.get(line, 0.0)) / more for line, count in many.items()}
    return {line: share for line, share in shares.items() if share >= _LEAST_SHARE}


def kinds(response_id: str) -> dict[str, Callable[[int], bytes]]:
    """The kinds of requests that are looked at."""
    chat = crowd.request("/v1/chat/completions", crowd.chat("m0"))
    goes_on = f'{{"model":"m0","input":"hi","previous_response_id":"{response_id}"}}'.encode()
    return {
        "chat": lambda _: chat,
        "unknown model": lambda i: crowd.request("/v1/chat/completions", crowd.chat(f"nobody-{i}")),
        "response": lambda _: crowd.request("/v1/responses", b'{"model":"m0","input":"hi"}'),
        "goes on from a response": lambda _: crowd.request("/v1/responses", goes_on),
    }


async def look(url: str, upstream: str, worker: Worker, case: Case, timed: int) -> Seen:
    """Serves that case, and looks at requests of each kind."""
    revision = await publish(url, a_document(upstream, rules=case.rules, services=case.services, pools=case.pools))
    await _stands_on(worker.port, revision)
    client = await crowd.connected(worker.port)
    _, body = await client.ask(crowd.request("/v1/responses", b'{"model":"m0","input":"hi"}'))
    found = _ID.search(body)
    assert found, body
    cpu_us: dict[str, float] = {}
    lines: dict[str, dict[str, float]] = {}
    for kind, make in kinds(found[1].decode()).items():
        await crowd.asked(worker.port, map(make, range(timed // 4)), _TIMED_WIDTH)
        before = await worker.size()
        await crowd.asked(worker.port, map(make, range(timed)), _TIMED_WIDTH)
        cpu_us[kind] = ((await worker.size()).cpu_s - before.cpu_s) / timed * 1e6
        await client.ask(make(0))
        await worker.count()
        for i in range(_COUNTED):
            await client.ask(make(i))
        lines[kind] = {line: count / _COUNTED for line, count in (await worker.counted()).items()}
        assert lines[kind], "no line was counted: requests are no longer handled by Handlers.handle"
    client.leave()
    return Seen(cpu_us=cpu_us, lines=lines)


async def _stands_on(port: int, revision: int) -> None:
    async with asyncio.timeout(_PATIENCE_S), aiohttp.ClientSession() as session:
        while True:
            async with session.get(f"http://127.0.0.1:{port}/readyz") as answer:
                detail = await answer.json()
                if detail["revision"] >= revision and answer.status == 200:
                    return
            await asyncio.sleep(0.05)


def compared(base: Seen, seen: Mapping[Case, Seen]) -> list[Linear]:
    """The functions with linear lines, of every kind of request together."""
    found: dict[tuple[str, str], dict[str, dict[int, float]]] = {}
    for case, each in seen.items():
        name, count = next((name, count) for name, count in _GROWN if count(case) != count(BASE))
        for kind, lines in each.lines.items():
            for line, share in linear(base.lines[kind], lines, count(case) - count(BASE)).items():
                place, _, number = line.rpartition(":")
                found.setdefault((place, name), {}).setdefault(kind, {})[int(number)] = share
    return [
        Linear(
            place=place,
            lines=tuple(sorted({line for shares in by_kind.values() for line in shares})),
            of=of,
            kinds=tuple(by_kind),
            share=max(sum(shares.values()) for shares in by_kind.values()),
        )
        for (place, of), by_kind in sorted(found.items(), key=lambda each: (each[0][1], each[0][0]))
        # With more pools come more rules.
        if of != "pools" or (place, "rules") not in found
    ]


def _told(case: Case) -> str:
    pools = f", {case.pools} pools" if case.pools > 1 else ""
    return f"{case.rules} rules of {case.services} services{pools}"


def _rows(linears: Iterable[Linear]) -> tuple[tuple[str, ...], ...]:
    return tuple(
        (f"`{each.place}`", ", ".join(map(str, each.lines)), each.of, ", ".join(each.kinds), f"{each.share:.1f}")
        for each in linears
    )


async def measure(*, is_quick: bool) -> list[Part]:
    """All of it, on a server of its own."""
    timed = 200 if is_quick else 1_000
    seen: dict[Case, Seen] = {}
    with servers.running("valkey-9") as url:
        async with Upstream.running() as upstream:
            for case in (BASE, *(QUICK if is_quick else FULL)):
                with redis.Redis.from_url(url) as client:
                    client.flushall()
                async with Worker.running(url) as worker:
                    seen[case] = await look(url, upstream.url, worker, case, timed)
    base = seen.pop(BASE)
    linears = compared(base, seen)
    names = tuple(base.cpu_us)
    rows = tuple(
        (_told(case), *(f"{each.cpu_us[kind]:.0f}" for kind in names)) for case, each in {BASE: base, **seen}.items()
    )
    of_chat = [each for each in linears if "chat" in each.kinds]
    return [
        Part(
            title="A request's path in the worker",
            text="Microseconds of a worker's CPU for one request of each kind; and the functions with lines that run "
            "more often for one request when there is more of something, with how many runs come with each more of it.",
            tables=(
                Table(columns=("configured", *names), rows=rows),
                Table(
                    columns=("function", "lines", "linear in", "requests", "lines run for each"), rows=_rows(linears)
                ),
            ),
            verdicts=(
                Verdict(
                    claim="functions of a chat's path that are linear in rules or pools",
                    figure=len([each for each in of_chat if each.of != "services"]),
                    bound=0,
                ),
                Verdict(
                    claim="functions of a chat's path that are linear in the rule's services",
                    figure=len([each for each in of_chat if each.of == "services"]),
                    bound=0,
                ),
                Verdict(
                    claim="functions of any path that are linear in rules",
                    figure=len([each for each in linears if each.of == "rules"]),
                    bound=0,
                ),
            ),
            plots=(
                Plot(
                    name="path",
                    x="rules, or services of the rule",
                    y="µs of a worker's CPU for a request",
                    curves={
                        f"{kind}, {name}": [
                            (float(count(case)), each.cpu_us[kind])
                            for case, each in {BASE: base, **seen}.items()
                            if case.pools == 1 and (case is BASE or count(case) != count(BASE))
                        ]
                        for kind in names
                        for name, count in _GROWN
                        if name != "pools"
                    },
                ),
            ),
        )
    ]
