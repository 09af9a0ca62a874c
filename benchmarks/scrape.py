"""What a scrape of the metrics costs the worker that answers it, and how long requests wait for it at most.

`python -m benchmarks.scrape` prints a table, and with `--write` puts it into `benchmarks/results/scrape.md`, from where
`make docs` takes it. So many services are configured, with limits and prices, in rules of five; each has been picked
and settled, in Redis and by every worker of the supervisor, with durations all over the buckets and exemplars. A real
Valkey answers. The CPU is the worker's own, system time included, the median of some scrapes; the longest hold is the
longest time in any of them in which its loop turned to nothing else.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import itertools
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
from aiohttp.test_utils import make_mocked_request

from balancer.config import load
from balancer.domain import Configuration, Limits, Outcome, Pick, Price, Provider, Rule, Service, Usage
from balancer.gateway.app import Gateway
from balancer.metrics import Metrics
from balancer.store import connection
from balancer.store.registry import Registry
from balancer.tactics import RoundRobin
from tests import servers

RESULT = Path(__file__).parent / "results" / "scrape.md"
_SERVICES_A_RULE = 5
_SCRAPES = 15
_OUTCOMES = (Outcome.SUCCESS, Outcome.FAILED, Outcome.RATE_LIMITED)
_OPEN = "application/openmetrics-text;version=1.0.0"


class Cost(msgspec.Struct, frozen=True, kw_only=True):
    """What scrapes took."""

    lines: int
    text_bytes: int
    cpu_ms: float
    hold_ms: float


def _configuration(services: int) -> Configuration:
    rules = []
    for begin in range(0, services, _SERVICES_A_RULE):
        numbers = range(begin, min(begin + _SERVICES_A_RULE, services))
        offered = tuple(Service(provider=f"account-{i}", model="gpt-5", limits=Limits(rpm=1_000_000)) for i in numbers)
        uuid = f"rule-{begin}"
        tactic = RoundRobin(request_threshold=1)
        rules.append(Rule(uuid=uuid, request_model=uuid, lb_tactic=tactic, services=offered))
    providers = tuple(
        Provider(uuid=f"account-{i}", name=f"account-{i}", api_base="http://127.0.0.1", price=Price(input=1, output=4))
        for i in range(services)
    )
    return Configuration(providers=providers, rules=tuple(rules))


async def _picks(gateway: Gateway) -> list[Pick]:
    """A pick of each service, settled."""
    picks = []
    for rule in gateway.balance.directory.configuration.rules:
        for _ in rule.services:
            pick, _ = await gateway.balance.select(rule, reserved=100, deadline_ms=60_000)
            gateway.balance.settle(pick, Outcome.SUCCESS, Usage(input=100, output=50))
            picks.append(pick)
    return picks


def _count(metrics: Metrics, picks: list[Pick], rng: random.Random) -> None:
    for pick in picks:
        metrics.select_s(pick.pool, 0.001)
        metrics.overhead_s(0.0005)
        for reason in ("streak", "next"):
            metrics.picked(msgspec.structs.replace(pick, reason=reason, is_switch=True))
        for outcome in _OUTCOMES:
            for _ in range(10):
                seconds = rng.lognormvariate(0.5, 2)
                metrics.settled(pick, outcome, Usage(input=100, output=50, cached=10), seconds)
                metrics.first_token_s(pick, seconds / 2)
                metrics.request("openai", pick.rule, outcome, seconds, pick)
    metrics.flush()


async def _cost(gateway: Gateway, accept: str) -> Cost:
    request = make_mocked_request("GET", "/metrics", headers={"Accept": accept} if accept else {})
    spent, longest, body = [], 0.0, b""
    for _ in range(_SCRAPES):
        gc.collect()
        began = time.process_time()
        response = await gateway._metrics(request)
        spent.append(time.process_time() - began)
        assert isinstance(response.body, bytes), "it is whole"
        body = response.body
    for _ in range(3):
        longest = max(longest, await _longest_hold(gateway, request))
    return Cost(
        lines=body.count(b"\n"),
        text_bytes=len(body),
        cpu_ms=statistics.median(spent) * 1000,
        hold_ms=longest * 1000,
    )


async def _longest_hold(gateway: Gateway, request: object) -> float:
    """How long the loop turned to nothing else, of this process' CPU: others on the machine do not count."""
    scraping = asyncio.create_task(gateway._metrics(request))  # type: ignore[arg-type]
    longest = 0.0
    while not scraping.done():
        began = time.process_time()
        await asyncio.sleep(0)
        longest = max(longest, time.process_time() - began)
    return longest


async def _measure(url: str, services: int, workers: int) -> Iterator[tuple[str, Cost]]:
    client = connection.client(url)
    await client.flushall()
    await Registry(client).publish(_configuration(services), None)
    await client.aclose()
    with tempfile.TemporaryDirectory(prefix="scrape-") as folder:
        others = [Metrics(Path(folder), slot) for slot in range(1, workers)]
        gateway = Gateway(load({"redis": url, "redis_deadline_ms": 5000}, {}), url, None, metrics_folder=Path(folder))
        await gateway.balance.start()
        try:
            picks, rng = await _picks(gateway), random.Random(1)
            for metrics in (gateway.metrics, *others):
                _count(metrics, picks, rng)
            gc.freeze()
            costs = [(name, await _cost(gateway, accept)) for name, accept in (("classic", ""), ("OpenMetrics", _OPEN))]
        finally:
            await gateway.balance.close()
            for metrics in (gateway.metrics, *others):
                metrics.close()
    return iter(costs)


async def _rows(options: argparse.Namespace) -> list[str]:
    rows = [
        "| services | workers | format | lines | KiB | CPU, ms | longest hold, ms |",
        "|--:|--:|---|--:|--:|--:|--:|",
    ]
    with contextlib.ExitStack() as stack:
        url = stack.enter_context(servers.running("valkey-9"))
        for services, workers in itertools.product(options.services, options.workers):
            for name, cost in await _measure(url, services, workers):
                rows.append(
                    f"| {services} | {workers} | {name} | {cost.lines} | {cost.text_bytes / 1024:.0f} "
                    f"| {cost.cpu_ms:.1f} | {cost.hold_ms:.1f} |"
                )
    return rows


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--services", type=int, nargs="+", default=[2, 200])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--write", action="store_true", help=f"also to {RESULT.name}")
    options = parser.parse_args()
    rows = asyncio.run(_rows(options))
    print("\n".join(rows))
    if options.write:
        RESULT.write_text("\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
