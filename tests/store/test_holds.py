"""Picks over the API at the store: they stand between no two workers, and cost no one who is reaped."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from balancer.domain import Entry, Outcome
from balancer.store import holds, keys
from balancer.store.pool import PoolClient, PoolEvents
from balancer.store.topology import Topology
from tests.store.conftest import eventually
from tests.store.test_pool import a_definition, a_selection

Join = Callable[..., Any]


@pytest.fixture
async def join(url: str) -> AsyncIterator[Join]:
    """Makes pool clients, each a worker; closes them afterwards."""
    clients: list[PoolClient] = []

    async def make(worker: str, lease_ms: int = 30_000) -> PoolClient:
        pool = PoolClient(
            Topology(url), "default", worker, deadline_ms=2000, lease_ms=lease_ms, scripts_dir="", events=PoolEvents()
        )
        pool.start()
        clients.append(pool)
        await pool.wait_until_up(5)
        return pool

    yield make
    for pool in clients:
        await pool.close(timeout_s=0.5)


async def test_a_hold_stands_between_no_two_workers_of_the_ring(join: Join, control: Any) -> None:
    """`aa` looks after the worker that follows it. A hold sorts between them, and looks after nobody."""
    late: PoolClient = await join("b1")
    await late.raise_fence([a_definition()])
    await late.close(timeout_s=1)
    one: PoolClient = await join("aa", lease_ms=1000)
    assert (await one.select_held(holds.new_worker(), a_selection(1)))[0] == "pick"
    # An attempt of b1, whose lease goes on, that is past its deadline.
    await control.hset(keys.holdings("default", "b1"), "1", "h 5 1000 0 0 b:m")
    await control.expire(keys.holdings("default", "b1"), 60)
    await control.hset(keys.services("default"), "service:b:m", "1 5 0 0 0 0 0|||")

    async def is_reaped() -> bool:
        return (await one.view()).services["b:m"].lost == 1

    await eventually(is_reaped)
    assert (await one.view()).services["a:m"].in_flight == 1


async def test_what_was_reaped_is_not_looked_at_again(join: Join, control: Any) -> None:
    one: PoolClient = await join("aa", lease_ms=1000)
    await one.raise_fence([a_definition()])
    await control.zadd(keys.leases("default"), {f"{keys.HOLD_PREFIX}{n:016x}": -1_000_000 for n in range(100)})
    before = (await control.info("commandstats"))["cmdstat_zrangebyscore"]["calls"]

    async def has_looked() -> bool:
        return bool((await control.info("commandstats"))["cmdstat_zrangebyscore"]["calls"] > before + 2)

    await eventually(has_looked)
    assert await one.command("ZRANGEBYSCORE", keys.leases("default"), 0, "+inf") == [b"aa"]


async def test_a_cancelled_pick_gives_back_what_it_held(join: Join, control: Any) -> None:
    """Its caller has gone; the script runs all the same."""
    one: PoolClient = await join("aa")
    await one.raise_fence([a_definition()])
    await control.client_pause(200)
    asking = asyncio.create_task(one.select_held(holds.new_worker(), a_selection(1)))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking

    async def is_given_back() -> bool:
        return (await one.view()).services["a:m"].abandoned == 1

    await eventually(is_given_back)
    state = (await one.view()).services["a:m"]
    assert (state.picks, state.in_flight, state.reserved, state.requests) == (1, 0, 0, 0)


async def test_a_server_that_forgot_its_scripts_settles_a_hold(join: Join, control: Any) -> None:
    one: PoolClient = await join("aa")
    await one.raise_fence([a_definition()])
    worker = holds.new_worker()
    service = (await one.select_held(worker, a_selection(1)))[1]
    await control.script_flush()
    entry = Entry(number=1, service=service, outcome=Outcome.SUCCESS)
    assert [await one.settle_held(worker, entry, 60_000) for _ in range(2)] == [True, False]
    assert (await one.view()).services[service].requests == 1


async def test_clearing_many_services_takes_a_position_for_each(join: Join) -> None:
    one: PoolClient = await join("aa")
    await one.raise_fence([a_definition()])
    before = one.seen
    await one.clear([f"s{n}:m" for n in range(450)])
    assert one.seen == (before[0], before[1] + 450)


def test_a_hold_is_read_as_it_was_written() -> None:
    hold = holds.Hold(pool="p", worker=holds.new_worker(), rule="ü/x:y", service="a:m", until_ms=1)
    assert holds.read(hold.token()) == hold
    assert holds.read(hold.token()).token().isascii()
