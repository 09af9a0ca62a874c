"""One pool over a real server: a tick in one write, lost connections, lost replies, lost workers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import pytest

from balancer.domain import (
    Entry,
    Outcome,
    PartitionDefinition,
    ProviderDefinition,
    RuleDefinition,
    Selection,
    ServiceDefinition,
    Usage,
    WindowsDefinition,
)
from balancer.errors import StoreUnavailableError
from balancer.store import keys
from balancer.store.pool import CALLS_AT_ONCE, Asked, PoolClient, PoolEvents
from balancer.store.settlement import Batch
from balancer.store.topology import Topology
from tests.store.conftest import eventually

SERVICES = ("a:m", "b:m")


def a_definition(
    revision: int = 1, request_threshold: int = 1, providers: tuple[ProviderDefinition, ...] = ()
) -> RuleDefinition:
    return RuleDefinition(
        rule="chat",
        revision=revision,
        partitions=(
            PartitionDefinition(
                id=keys.partition("chat"),
                tactic="round_robin",
                params={"request_threshold": request_threshold},
                cursor="",
                services=tuple(ServiceDefinition(id=s, active=1, window=300, weight=1) for s in SERVICES),
            ),
        ),
        windows=tuple(WindowsDefinition(id=s, lengths=(300,)) for s in SERVICES),
        providers=providers,
    )


def a_selection(number: int, revision: int = 1, reserved: int = 5, **more: Any) -> Selection:
    return Selection(
        number=number,
        rule="chat",
        partition=keys.partition("chat"),
        revision=revision,
        reserved=reserved,
        deadline_ms=60_000,
        **more,
    )


def an_entry(number: int, service: str, tokens: int = 10) -> Entry:
    return Entry(number=number, service=service, outcome=Outcome.SUCCESS, usage=Usage(input=tokens))


@pytest.fixture
async def join(url: str) -> AsyncIterator[Callable[..., Any]]:
    """Makes pool clients, each a worker; closes them afterwards."""
    clients: list[PoolClient] = []

    async def make(worker: str, *, deadline_ms: int = 2000, lease_ms: int = 30_000, **more: Any) -> PoolClient:
        options: dict[str, Any] = {"scripts_dir": "", "events": PoolEvents()} | more
        pool = PoolClient(Topology(url), "default", worker, deadline_ms=deadline_ms, lease_ms=lease_ms, **options)
        pool.start()
        clients.append(pool)
        await pool.wait_until_up(5)
        return pool

    yield make
    for pool in clients:
        await pool.close(timeout_s=0.5)


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Of each call of tick, how many entries it settles and how many selections it asks for."""
    noted: list[tuple[int, int]] = []
    send = PoolClient._send

    def noting(self: PoolClient, batch: Batch | None, asked: Sequence[Asked]) -> None:
        noted.append((batch.count if batch else 0, len(asked)))
        send(self, batch, asked)

    monkeypatch.setattr(PoolClient, "_send", noting)
    return noted


async def turn() -> None:
    """Lets the loop turn, and with it all that was scheduled before."""
    await asyncio.sleep(0)
    await asyncio.sleep(0)


async def test_settles_and_selections_of_one_tick_are_one_call(join: Any, sent: list[tuple[int, int]]) -> None:
    pool: PoolClient = await join("w")
    await pool.raise_fence([a_definition()])
    service = (await pool.select(a_selection(1)))[1]
    sent.clear()
    asked = [asyncio.create_task(pool.select(a_selection(number))) for number in range(2, 42)]
    asyncio.get_running_loop().call_soon(pool.settle, an_entry(1, service))
    await asyncio.gather(*asked)
    assert await pool.acknowledged(5)
    assert sum(entries for entries, _ in sent) == 1
    assert sum(selections for _, selections in sent) == 40
    # The first goes out at once, unless the pool's own commands are under way just then; all others follow together.
    assert len(sent) <= 2


async def test_selections_of_later_ticks_wait_for_the_answer_that_is_under_way(
    join: Any, control: Any, sent: list[tuple[int, int]]
) -> None:
    pool: PoolClient = await join("w")
    await pool.raise_fence([a_definition()])
    await control.client_pause(100)
    asked = []
    for number in range(1, 11):
        asked.append(asyncio.create_task(pool.select(a_selection(number))))
        await turn()
    answers = await asyncio.gather(*asked)
    assert [answer[3] for answer in answers] == list(range(1, 11)), "in the order of asking"
    assert sent == [*[(0, 1)] * CALLS_AT_ONCE, (0, 10 - CALLS_AT_ONCE)]


async def test_selections_ride_along_with_a_settle_whatever_is_under_way(
    join: Any, control: Any, sent: list[tuple[int, int]]
) -> None:
    pool: PoolClient = await join("w")
    await pool.raise_fence([a_definition()])
    service = (await pool.select(a_selection(1)))[1]
    sent.clear()
    await control.client_pause(100)
    asked = []
    waiting = 2 + CALLS_AT_ONCE
    for number in range(2, waiting + 1):
        asked.append(asyncio.create_task(pool.select(a_selection(number))))
        await turn()
    pool.settle(an_entry(1, service))
    asked.append(asyncio.create_task(pool.select(a_selection(waiting + 1))))
    assert [answer[3] for answer in await asyncio.gather(*asked)] == list(range(2, waiting + 2))
    assert await pool.acknowledged(5)
    assert sent == [*[(0, 1)] * CALLS_AT_ONCE, (1, 1), (0, 1)]


async def test_a_selection_that_was_never_sent_is_not_given_up_in_redis(join: Any, control: Any) -> None:
    """There is nothing to be given back: Redis has never heard of its name."""
    pool: PoolClient = await join("w", deadline_ms=100)
    await pool.raise_fence([a_definition()])
    await control.client_pause(400)
    last = CALLS_AT_ONCE + 1
    asked = []
    for number in range(1, last + 1):
        asked.append(asyncio.create_task(pool.select(a_selection(number))))
        await turn()
    # Past all deadlines at once: the first that is given up would take with it what still waits then.
    time.sleep(0.15)  # noqa: ASYNC251
    for waits in asked:
        with pytest.raises(StoreUnavailableError):
            await waits
    assert await pool.acknowledged(10)
    assert await control.hget(keys.holdings("default", "w"), str(last)) is None
    assert sum(service.abandoned for service in (await pool.view()).services.values()) == CALLS_AT_ONCE


async def test_who_is_told_of_a_fault_while_asking_hears_of_no_pick_and_holds_none(
    join: Any, control: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The selection was queued all the same, and answered: its request went on in two ways."""
    pool: PoolClient = await join("w")
    await pool.raise_fence([a_definition()])
    told: list[Asked] = []
    with monkeypatch.context() as patch:

        def breaks(_: PoolClient) -> None:
            raise RuntimeError("a fault of ours")

        patch.setattr(PoolClient, "_flush_soon", breaks)
        with pytest.raises(RuntimeError, match="a fault of ours"):
            pool.ask(a_selection(1), told.append)
    assert (await pool.select(a_selection(2)))[0] == "pick"
    assert await pool.acknowledged(10)
    assert told == []
    held = await control.hgetall(keys.holdings("default", "w"))
    assert [number for number, text in held.items() if text.startswith(b"h ")] == [b"2"]


async def test_sessions_of_one_call_stay_where_they_were_and_the_others_go_on(join: Any, control: Any) -> None:
    one, two = await join("w1"), await join("w2")
    await one.raise_fence([a_definition()])

    def a_pinned(number: int, name: str) -> Selection:
        return a_selection(number, session=name, affinity_ms=60_000)

    first = await asyncio.gather(one.select(a_pinned(1, "x")), one.select(a_selection(2)), one.select(a_pinned(3, "y")))
    assert [answer[1:3] for answer in first] == [["a:m", "streak"], ["b:m", "next"], ["a:m", "next"]]
    again = await asyncio.gather(two.select(a_pinned(1, "y")), two.select(a_selection(2)), two.select(a_pinned(3, "x")))
    assert [answer[1:3] for answer in again] == [["a:m", "pinned"], ["b:m", "next"], ["a:m", "pinned"]]
    assert [answer[7] for answer in again] == [0, 1, 1]
    held = await one.select_held("api-0123456789abcdef", a_pinned(1, "x"))
    assert held[1:3] == ["a:m", "pinned"]
    assert await control.get(keys.pin("default", "x")) == b"a:m"


async def test_a_string_that_is_put_is_there_for_the_next_command_of_any_worker(join: Any, control: Any) -> None:
    """However long that takes Redis: it reads the sockets of two workers in any order, and one was read too early."""
    one, two = await join("w1"), await join("w2")
    key = keys.response("default", "resp_1")
    await control.execute_command("CLIENT PAUSE", 100, "WRITE")
    await one.put(key, "chat\na:m", 60_000)
    assert await two.command("GET", key) == b"chat\na:m"
    assert await one.command("GET", key) == b"chat\na:m"
    assert await two.command("GET", keys.response("default", "resp_2")) is None
    assert 50_000 < await control.pttl(key) <= 60_000


async def test_putting_a_string_takes_no_longer_than_the_deadline(join: Any, control: Any) -> None:
    pool = await join("w", deadline_ms=100)
    await control.execute_command("CLIENT PAUSE", 400, "WRITE")
    with pytest.raises(StoreUnavailableError, match="did not answer in time"):
        await pool.put(keys.response("default", "resp_1"), "chat\na:m", 60_000)
    await control.execute_command("CLIENT UNPAUSE")


async def test_signs_of_life_and_death_are_noted_on_breakers(join: Any) -> None:
    pool: PoolClient = await join("w")
    provider = ProviderDefinition(id="a", failures=2, ratio_permille=0, open_ms=60_000)
    await pool.raise_fence([a_definition(providers=(provider,))])
    place = pool.seen
    for _ in range(2):
        await pool.health(["a:m"], False)
    assert pool.seen == (place[0], place[1] + 2)
    view = await pool.view()
    assert (view.breaker_state("a:m"), view.breaker_state("b:m")) == ("open", "closed")
    answers = [await pool.select(a_selection(number)) for number in range(1, 4)]
    assert {answer[1] for answer in answers} == {"b:m"}


async def test_two_workers_at_once_alternate_as_one_process_would(join: Any) -> None:
    one, two = await join("w1"), await join("w2")
    await one.raise_fence([a_definition(request_threshold=3)])
    asked = [pool.select(a_selection(n)) for n in range(1, 101) for pool in (one, two)]
    answers = sorted((await asyncio.gather(*asked)), key=lambda answer: answer[5])
    assert [answer[1] for answer in answers] == [SERVICES[i // 3 % 2] for i in range(200)]
    assert [answer[3] for answer in answers] == list(range(1, 201))


async def test_a_settle_releases_what_was_held_and_counts_its_tokens(join: Any) -> None:
    pool: PoolClient = await join("w")
    await pool.raise_fence([a_definition()])
    answer = await pool.select(a_selection(1))
    held = (await pool.view()).services[answer[1]]
    assert (held.in_flight, held.reserved, held.requests) == (1, 5, 0)
    pool.settle(an_entry(1, answer[1], tokens=42))
    assert await pool.acknowledged(5)
    after = (await pool.view()).services[answer[1]]
    assert (after.in_flight, after.reserved, after.requests, after.input) == (0, 0, 1, 42)


async def test_a_server_that_forgot_its_scripts_is_given_them_again(join: Any, control: Any) -> None:
    pool: PoolClient = await join("w")
    await pool.raise_fence([a_definition()])
    await pool.select(a_selection(1))
    pool.settle(an_entry(1, "a:m"))
    assert await pool.acknowledged(5)
    await control.script_flush()
    answers = await asyncio.gather(*(pool.select(a_selection(n)) for n in (2, 3)))
    pool.settle(an_entry(2, answers[0][1]))
    assert await pool.acknowledged(5)
    view = await pool.view()
    assert sum(service.picks for service in view.services.values()) == 3
    assert sum(service.requests for service in view.services.values()) == 2


async def test_settles_made_while_redis_is_away_arrive_once_it_is_back(join: Any, control: Any) -> None:
    pool: PoolClient = await join("w")
    await pool.raise_fence([a_definition()])
    for number in range(1, 6):
        await pool.select(a_selection(number))
    for number in range(1, 6):
        pool.settle(an_entry(number, SERVICES[(number - 1) % 2]))
        await control.client_kill_filter(_type="normal", skipme=True)
    assert await pool.acknowledged(10)
    view = await pool.view()
    assert sum(service.input for service in view.services.values()) == 50
    assert sum(service.in_flight for service in view.services.values()) == 0


async def test_a_selection_beyond_the_deadline_is_given_up_and_gives_back_what_it_picked(
    join: Any, control: Any
) -> None:
    pool: PoolClient = await join("w", deadline_ms=100)
    await pool.raise_fence([a_definition()])
    await control.client_pause(400)
    with pytest.raises(StoreUnavailableError, match="in time"):
        await pool.select(a_selection(1))
    with pytest.raises(StoreUnavailableError):
        await pool.select(a_selection(2))
    assert await pool.acknowledged(10)
    view = await pool.view()
    assert [(s.in_flight, s.reserved, s.requests, s.abandoned) for s in view.services.values() if s.picks] == [
        (0, 0, 0, 1)
    ]


async def test_while_redis_is_known_to_be_slow_no_selection_waits(join: Any, control: Any) -> None:
    pool: PoolClient = await join("w", deadline_ms=100)
    await pool.raise_fence([a_definition()])
    await control.client_pause(600)
    with pytest.raises(StoreUnavailableError, match="in time"):
        await pool.select(a_selection(1))
    started = asyncio.get_running_loop().time()
    for number in range(2, 50):
        with pytest.raises(StoreUnavailableError, match="away"):
            await pool.select(a_selection(number))
    assert asyncio.get_running_loop().time() - started < 0.1


async def test_an_abandoned_name_that_arrives_late_is_refused(join: Any) -> None:
    pool: PoolClient = await join("w")
    await pool.raise_fence([a_definition()])
    pool.settle(Entry(number=7, service="", outcome=Outcome.ABANDONED))
    assert await pool.acknowledged(5)
    assert await pool.select(a_selection(7)) == ["abandoned"]


async def test_attempts_of_a_dead_worker_are_counted_as_lost_by_another(join: Any) -> None:
    lost: list[int] = []
    events = PoolEvents(lease_expired=lambda _, count: lost.append(count))
    dead: PoolClient = await join("dead", lease_ms=1000)
    await dead.raise_fence([a_definition()])
    answer = await dead.select(a_selection(1, reserved=70))
    await dead.close(timeout_s=0)
    alive: PoolClient = await join("alive", lease_ms=1000, events=events)

    async def is_reaped() -> bool:
        return (await alive.view()).services[answer[1]].lost == 1

    await eventually(is_reaped)
    state = (await alive.view()).services[answer[1]]
    assert (state.requests, state.lost_tokens, state.in_flight, state.reserved, state.input) == (1, 70, 0, 0, 0)
    assert lost == [1]


async def test_a_worker_that_was_only_late_is_counted_once_with_its_own_tokens(join: Any, control: Any) -> None:
    late: PoolClient = await join("late")
    await late.raise_fence([a_definition()])
    answer = await late.select(a_selection(1, reserved=70))
    await control.zadd(keys.leases("default"), {"late": 1})
    other: PoolClient = await join("other")

    async def is_reaped() -> bool:
        return (await other.view()).services[answer[1]].lost == 1

    await eventually(is_reaped)
    late.settle(an_entry(1, answer[1], tokens=33))
    assert await late.acknowledged(5)
    state = (await other.view()).services[answer[1]]
    assert (state.requests, state.lost, state.lost_tokens, state.input) == (1, 0, 0, 33)
    assert state.windows[0].tokens == 33


async def test_an_outdated_revision_is_told_and_an_unknown_one_asks_for_its_definition(join: Any) -> None:
    pool: PoolClient = await join("w")
    assert await pool.select(a_selection(1)) == ["define", 0]
    await pool.raise_fence([a_definition(revision=4)])
    assert await pool.select(a_selection(2, revision=3)) == ["stale", 4]
    assert await pool.select(a_selection(3, revision=5)) == ["define", 4]
    assert (await pool.select(a_selection(4, revision=4)))[0] == "pick"


async def test_a_flushed_server_starts_a_new_epoch_and_numbers_go_on(join: Any, control: Any) -> None:
    bumps: list[int] = []
    pool: PoolClient = await join("w", events=PoolEvents(epoch_bumped=lambda _, lost: bumps.append(lost)))
    await pool.raise_fence([a_definition()])
    for number in range(1, 4):
        await pool.select(a_selection(number))
    epoch, position = pool.seen
    await control.flushall()
    assert await pool.select(a_selection(4)) == ["define", 0]
    await pool.raise_fence([a_definition()])
    answer = await pool.select(a_selection(5))
    assert answer[4] == epoch + 1
    assert answer[5] == position + 3
    assert bumps == [position]
