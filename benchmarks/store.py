"""What a worker's own part of a request costs on its way to Redis and back: microseconds of the worker's CPU.

`python -m benchmarks.store` prints a table: select, settle and the metrics of both, through `Balance`, with so many
requests at a time and rules without more, with limits and with session pins; beside it how many selections went into
a call of the script. A real Valkey answers, on another core where there is one. The figures are the process' own CPU
time, system time included, the least of some rounds; Redis' part is not in them. `--profile KIND` prints where one kind
of rule spends it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import cProfile
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
from balancer.store.registry import Registry
from balancer.tactics import RoundRobin
from tests import servers

_CONCURRENCIES = (1, 4, 32, 256)
_LIMITS = Limits(rpm=1_000_000_000, tpm=1_000_000_000_000, in_flight=1_000_000)
_SESSIONS = 1000


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
        self._left = 0

    async def run(self, requests: int, concurrency: int) -> float:
        """Microseconds of this process' CPU for one of so many requests."""
        self._left = requests
        began = time.process_time()
        await asyncio.gather(*(self._client(i) for i in range(concurrency)))
        return (time.process_time() - began) / requests * 1e6

    async def _client(self, number: int) -> None:
        balance, metrics, usage = self._balance, self._metrics, Usage(input=100, output=20)
        session = self._sessions[number % len(self._sessions)]
        while self._left > 0:
            self._left -= 1
            pick, _ = await balance.select(self._rule, reserved=100, deadline_ms=60_000, session=session)
            metrics.picked(pick)
            balance.settle(pick, Outcome.SUCCESS, usage, stream_us=1000)
            metrics.settled(pick, Outcome.SUCCESS, usage, 0.001)
            await balance.flushed(pick.pool)


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
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(folder)  # As a worker under a supervisor counts.
    metrics = Metrics(folder)
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
