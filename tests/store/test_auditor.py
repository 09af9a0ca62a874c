"""The background audit of a pool: one auditor in the fleet, who finds what is wrong and says so."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
import pytest

from balancer import stored
from balancer.domain import PoolSettings, Record
from balancer.store import history, keys
from balancer.store.auditor import Auditor
from balancer.store.pool import PoolClient, PoolEvents
from balancer.store.topology import Topology
from tests import stored as by_hand
from tests.store.conftest import eventually
from tests.store.test_pool import a_definition, a_selection, an_entry

Join = Callable[[str], Any]


@pytest.fixture
async def join(url: str) -> AsyncIterator[Join]:
    """Makes pool clients, each a worker; closes them afterwards."""
    clients: list[PoolClient] = []

    async def make(worker: str) -> PoolClient:
        pool = PoolClient(
            Topology(url), "default", worker, deadline_ms=2000, lease_ms=30_000, scripts_dir="", events=PoolEvents()
        )
        pool.start()
        clients.append(pool)
        await pool.wait_until_up(5)
        return pool

    yield make
    for pool in clients:
        await pool.close(timeout_s=0.5)


def an_auditor(pool: PoolClient, found: list[int] | None = None, interval_s: float = 60) -> Auditor:
    report = found if found is not None else []
    return Auditor(pool.command, "default", pool.worker, interval_s, lambda _, count: report.append(count))


async def work(pool: PoolClient, numbers: range) -> None:
    for number in numbers:
        answer = await pool.select(a_selection(number))
        pool.settle(an_entry(number, answer[1]))
    assert await pool.acknowledged(5)


async def a_recorded_pool(join: Join, record: Record) -> PoolClient:
    pool: PoolClient = await join("w")
    await pool.raise_fence([a_definition()], PoolSettings(name="default", record=record))
    return pool


@pytest.mark.parametrize("record", ["off", "sampled", "full"])
async def test_a_pool_that_is_right_has_no_violation(join: Join, record: Record) -> None:
    pool = await a_recorded_pool(join, record)
    auditor = an_auditor(pool)
    for start in (1, 101, 201):
        await work(pool, range(start, start + 100))
        assert await auditor.audit() == 0


def a_checkpoint(services: int, record: Record) -> str:
    """The state of a pool with so many services, as the script tells it."""
    fields = ["place", stored.NEW_PLACE, "record", f"{record} 0 1"]
    for i in range(services):
        fields += [f"service:a:m{i}", stored.NEW_SERVICE]
    return msgspec.json.encode({"services": fields, "partitions": {}, "leases": {}, "holdings": {}}).decode()


@pytest.mark.parametrize(("record", "passes"), [("off", 3), ("full", 8)])
async def test_the_loop_turns_while_many_services_are_audited(
    record: Record, passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten thousand rules held every request of the auditor's worker up for most of a second."""
    monkeypatch.setattr("balancer.store.slices.SLICE_S", 0.0)  # A slice is a step, however fast the machine.
    monkeypatch.setattr("balancer.store.auditor._PAUSE_S", 0.0)
    services = 1000
    state = a_checkpoint(services, record)
    told = {"event": "checkpoint", "epoch": "1", "position": "0", "now_ms": "1", "state": state}
    page = [[f"1-{i}".encode(), told] for i in range(2)]

    async def send(*command: str | int) -> Any:
        match command[0]:
            case "EVAL":
                return [b"checkpoint", 1, 0, 1, state.encode()]
            case "XRANGE":
                return page if command[2] == history.FIRST else []
            case _:
                return []

    turns = 0

    async def turning() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    watching = asyncio.create_task(turning())
    assert await Auditor(send, "default", "w", 60, lambda *_: None).audit() == 0
    watching.cancel()
    assert turns == pytest.approx(passes * services, abs=100), "read, and checked twice; so is an event, and compared"


async def add_by_hand(control: Any, name: str, by: int) -> None:
    key, field = keys.services("default"), by_hand.field("a:m", name)
    await control.hset(key, field, by_hand.with_added(await control.hget(key, field), name, by))


async def test_a_counter_that_was_changed_by_hand_is_found_and_told_once(join: Join, control: Any) -> None:
    pool = await a_recorded_pool(join, "full")
    found: list[int] = []
    auditor = an_auditor(pool, found)
    await work(pool, range(1, 20))
    assert await auditor.audit() == 0
    await add_by_hand(control, "input", 1)
    assert await auditor.audit() == 1
    assert await auditor.audit() == 0
    assert found == [1]


@pytest.mark.parametrize("record", ["off", "sampled", "full"])
async def test_holdings_that_do_not_add_up_are_found_in_every_mode(join: Join, control: Any, record: Record) -> None:
    pool = await a_recorded_pool(join, record)
    await pool.select(a_selection(1))
    await add_by_hand(control, "in_flight", 2)
    assert await an_auditor(pool).audit() > 0


async def test_a_record_that_is_trimmed_faster_than_it_is_read_is_no_violation(join: Join, control: Any) -> None:
    pool = await a_recorded_pool(join, "full")
    auditor = an_auditor(pool)
    await work(pool, range(1, 50))
    assert await auditor.audit() == 0
    await work(pool, range(50, 150))
    await control.xtrim(keys.decisions("default"), maxlen=20, approximate=False)
    assert await auditor.audit() == 0
    await work(pool, range(150, 200))
    assert await auditor.audit() == 0


async def test_one_worker_at_a_time_audits_and_another_takes_over(join: Join, control: Any) -> None:
    one, two = await join("w1"), await join("w2")
    await one.raise_fence([a_definition()], PoolSettings(name="default", record="full"))
    await work(one, range(1, 5))
    tasks = {pool.worker: asyncio.create_task(an_auditor(pool, interval_s=0.05).run()) for pool in (one, two)}

    async def has(worker: str) -> bool:
        return bool(await control.get(keys.auditor("default")) == worker.encode())

    async def has_one() -> bool:
        return await has("w1") or await has("w2")

    await eventually(has_one)
    first = (await control.get(keys.auditor("default"))).decode()
    tasks[first].cancel()
    other = "w2" if first == "w1" else "w1"

    async def has_other() -> bool:
        return await has(other)

    await eventually(has_other)
    tasks[other].cancel()
    await asyncio.gather(*tasks.values(), return_exceptions=True)


async def test_pages_follow_each_other_and_say_when_something_was_trimmed(join: Join, control: Any) -> None:
    pool = await a_recorded_pool(join, "full")
    await work(pool, range(1, 21))
    all_pages = [page async for page in history.pages(pool.command, "default", history.FIRST, 7)]
    assert [len(page.events) for page in all_pages[:-1]] == [7] * (len(all_pages) - 1)
    assert all(page.follows for page in all_pages)
    positions = [int(event["position"]) for page in all_pages for event in page.events if event["event"] != "record"]
    assert positions == list(range(1, 42))
    await control.xtrim(keys.decisions("default"), maxlen=5, approximate=False)
    rest = [page async for page in history.pages(pool.command, "default", all_pages[0].last, 100)]
    assert [page.follows for page in rest] == [False]
