"""What a worker's own part of a request costs on its way to Redis and back: microseconds of the worker's CPU.

`python -m benchmarks.store` prints a table: select, settle and the metrics of both, through `Balance` as the express
way calls it, with so many requests at a time and rules without more, with limits and with session pins; beside it how
many calls of the script a request took. A real Valkey answers, on another core where there is one. The figures are the
process' own CPU time, system time included, the least of some rounds; Redis' part is not in them. `--profile KIND`
prints where one kind of rule spends it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import cProfile
import functools
import os
import pstats
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import redis

from balancer.config import load
from balancer.domain import Configuration, Limits, Outcome, Provider, Rule, Service, Usage
from balancer.metrics import Metrics
from balancer.store import connection
from balancer.store.balance import Balance, BalanceEvents
from balancer.store.pool import Asked
from balancer.store.registry import Registry
from balancer.tactics import RoundRobin
from tests import servers

_CONCURRENCIES = (1, 4, 32, 256)
_LIMITS = Limits(rpm=1_000_000_000, tpm=1_000_000_000_000, in_flight=1_000_000)
_SESSIONS = 1000
_USAGE = Usage(input=100, output=20)


def _rule(uuid: str, limits: Limits, affinity_s: int = 0) -> Rule:
    return Rule(
        uuid=uuid,
        request_model=uuid,
        lb_tactic=RoundRobin(),
        services=tuple(Service(provider=provider, model="m", limits=limits) for provider in "abc"),
        session_affinity=affinity_s,
    )


_RULES = {
    "plain": _rule("plain", Limits()),
    "limits": _rule("limits", _LIMITS),
    "session": _rule("session", Limits(), affinity_s=3600),
}


class Load:
    """Requests of one kind, so many at a time."""

    def __init__(self, balance: Balance, metrics: Metrics, kind: str) -> None:
        self._balance = balance
        self._metrics = metrics
        self._rule = balance.directory.by_uuid[kind]
        self._sessions = [f"session-{i}" for i in range(_SESSIONS)] if kind == "session" else [""]
        self._left = self._running = 0
        self._over: asyncio.Future[None]

    async def run(self, requests: int, concurrency: int) -> float:
        """Microseconds of this process' CPU for one of so many requests."""
        loop = asyncio.get_running_loop()
        self._left, self._running, self._over = requests, concurrency, loop.create_future()
        began = time.process_time()
        for client in range(concurrency):
            loop.call_soon(self._begin, client)
        await self._over
        return (time.process_time() - began) / requests * 1e6

    def _begin(self, client: int) -> None:
        if not self._left:
            self._running -= 1
            if not self._running:
                self._over.set_result(None)
            return
        self._left -= 1
        asked = self._balance.begin(
            self._rule,
            reserved=100,
            deadline_ms=60_000,
            session=self._sessions[client % len(self._sessions)],
            on_answer=functools.partial(self._answered, client),
        )
        assert asked, "Redis is away"

    def _answered(self, client: int, asked: Asked) -> None:
        balance, metrics = self._balance, self._metrics
        pick = balance.finish(self._rule, asked)
        assert pick, asked.answer
        metrics.picked(pick)
        balance.settle(pick, Outcome.SUCCESS, _USAGE, stream_us=1000)
        metrics.settled(pick, Outcome.SUCCESS, _USAGE, 0.001)
        balance.when_flushed(pick.pool, functools.partial(self._begin, client))


def _profile(load: Load, requests: int, concurrency: int) -> Any:
    profile = cProfile.Profile()

    async def run() -> None:
        profile.enable()
        await load.run(requests, concurrency)
        profile.disable()
        pstats.Stats(profile, stream=sys.stdout).sort_stats("tottime").print_stats(40)

    return run()


@contextlib.contextmanager
def _apart(url: str) -> Iterator[None]:
    """Puts this process on one core and the server on another, where there are two."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else []
    if len(cores) < 2:
        yield
        return
    with redis.Redis.from_url(url) as client:
        info: Any = client.info("server")
    os.sched_setaffinity(int(info["process_id"]), cores[1:])
    os.sched_setaffinity(0, cores[:1])
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def _calls(url: str) -> int:
    """How often the server has run a script by its digest."""
    with redis.Redis.from_url(url) as client:
        stats: Any = client.info("commandstats")
    return int(stats.get("cmdstat_evalsha", {}).get("calls", 0))


async def _measure(url: str, folder: Path, options: argparse.Namespace) -> None:
    client = connection.client(url)
    providers = tuple(Provider(uuid=name, name=name, api_base="http://127.0.0.1") for name in "abc")
    await Registry(client).publish(Configuration(providers=providers, rules=tuple(_RULES.values())), None)
    await client.aclose()
    metrics = Metrics(folder)  # As a worker under a supervisor counts.
    balance = Balance(url, load({"redis_deadline_ms": 5000}, {}), BalanceEvents(selected=metrics.select_s))
    await balance.start()
    try:
        if options.profile:
            for concurrency in options.concurrency:
                await _profile(Load(balance, metrics, options.profile), options.requests, concurrency)
            return
        print("| rule | at a time | µs CPU a request | calls of scripts a request |\n|---|--:|--:|--:|")
        for kind in _RULES:
            for concurrency in options.concurrency:
                load_ = Load(balance, metrics, kind)
                await load_.run(options.requests // 4, concurrency)
                calls = _calls(url)
                figures = [await load_.run(options.requests, concurrency) for _ in range(options.rounds)]
                calls = _calls(url) - calls
                a_request = calls / options.rounds / options.requests
                print(f"| {kind} | {concurrency} | {min(figures):.1f} | {a_request:.2f} |", flush=True)
    finally:
        await balance.close()


def main() -> None:
    """Prints the table, or a profile."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=8000, help="a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--concurrency", type=int, nargs="+", default=_CONCURRENCIES)
    parser.add_argument("--profile", choices=tuple(_RULES), default="")
    options = parser.parse_args()
    with servers.running("valkey-9") as url, tempfile.TemporaryDirectory() as folder, _apart(url):
        asyncio.run(_measure(url, Path(folder), options))


if __name__ == "__main__":
    main()
