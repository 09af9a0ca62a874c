"""Reserved tokens: a burst of requests in flight cannot pile up on one service beyond a bound that is known.

A service is picked only while its settled and reserved tokens are below the threshold. So at its last pick they are
below it, that pick adds its own, and each of those in flight may use more than it had reserved:

    tokens < threshold + one request + the sum, over those in flight, of what each uses beyond its reservation
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from typing import Any

import msgspec
import pytest

from balancer.domain import (
    Entry,
    Outcome,
    PartitionDefinition,
    RuleDefinition,
    Selection,
    ServiceDefinition,
    Usage,
    WindowsDefinition,
)
from balancer.store import keys
from balancer.store.pool import PoolClient, PoolEvents
from balancer.store.topology import Topology

THRESHOLD = 20_000
IN_FLIGHT = 500
SERVICES = tuple(f"p{i}:m" for i in range(12))


class Request(msgspec.Struct, frozen=True):
    """What a request will use, and how much its client lets it write."""

    input: int
    output: int
    max_output: int

    def reserved(self, reserve: str) -> int:
        """The tokens that it holds while it is in flight."""
        return {"none": 0, "input": self.input, "full": self.input + self.max_output}[reserve]


def requests() -> list[Request]:
    rand = random.Random(11)
    return [Request(rand.randint(50, 600), rand.randint(1, 150), 150) for _ in range(IN_FLIGHT)]


async def tokens_by_service(url: str, reserve: str) -> Counter[str]:
    """What each service used when all requests were in flight at once."""
    pool = PoolClient(
        Topology(url), "default", "w", deadline_ms=5000, lease_ms=60_000, scripts_dir="", events=PoolEvents()
    )
    pool.start()
    try:
        await pool.wait_until_up(5)
        await pool.raise_fence([a_definition()])

        async def pick(number: int, request: Request) -> Any:
            selection = Selection(
                number=number,
                rule="r",
                partition=keys.partition("r"),
                revision=1,
                reserved=request.reserved(reserve),
                deadline_ms=60_000,
            )
            return await pool.select(selection)

        burst = requests()
        answers = await asyncio.gather(*(pick(number, request) for number, request in enumerate(burst, start=1)))
        used: Counter[str] = Counter()
        for number, (request, answer) in enumerate(zip(burst, answers, strict=True), start=1):
            used[answer[1]] += request.input + request.output
            usage = Usage(input=request.input, output=request.output)
            pool.settle(Entry(number=number, service=answer[1], outcome=Outcome.SUCCESS, usage=usage))
        assert await pool.acknowledged(10)
        view = await pool.view()
        counted = {name: state.windows[0].tokens for name, state in view.services.items() if state.windows[0].tokens}
        assert counted == dict(used)
        assert sum(state.reserved for state in view.services.values()) == 0
        return used
    finally:
        await pool.close(timeout_s=1)


def a_definition() -> RuleDefinition:
    partition = PartitionDefinition(
        id=keys.partition("r"),
        tactic="token_based",
        params={"token_threshold": THRESHOLD},
        cursor="",
        services=tuple(ServiceDefinition(id=s, active=1, window=300, weight=1) for s in SERVICES),
    )
    windows = tuple(WindowsDefinition(id=s, lengths=(300,)) for s in SERVICES)
    return RuleDefinition(rule="r", revision=1, partitions=(partition,), windows=windows)


@pytest.mark.parametrize("reserve", ["input", "full"])
async def test_five_hundred_requests_at_once_stay_within_the_bound(url: str, reserve: str) -> None:
    burst = requests()
    one = max(request.reserved(reserve) for request in burst)
    # At most so many are in flight on one service; each may use so much more than it had reserved.
    at_once = THRESHOLD // min(request.reserved(reserve) for request in burst) + 1
    beyond = sorted((max(0, r.input + r.output - r.reserved(reserve)) for r in burst), reverse=True)
    used = await tokens_by_service(url, reserve)
    assert max(used.values()) < THRESHOLD + one + sum(beyond[:at_once])
    if reserve == "full":
        assert max(used.values()) < THRESHOLD + one
    assert len(used) >= sum(used.values()) // (THRESHOLD + one + sum(beyond[:at_once]))


async def test_without_reservations_the_same_burst_lands_on_one_service(url: str) -> None:
    used = await tokens_by_service(url, "none")
    assert list(used) == ["p0:m"]
    assert used["p0:m"] > 8 * THRESHOLD
