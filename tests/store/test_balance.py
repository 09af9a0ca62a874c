"""Workers over one server: one choice for all, fenced, followed, settled; and what they say when Redis is away."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
import pytest

from balancer import audit
from balancer.config import load
from balancer.domain import Configuration, Outcome, Pick, PoolSettings, Rule, RuleDefinition, Usage
from balancer.errors import NoServiceError, StoreUnavailableError
from balancer.store import keys
from balancer.store.balance import Balance, BalanceEvents
from balancer.store.connection import Commands
from balancer.store.prober import Probe
from balancer.store.registry import Registry
from balancer.store.topology import Topology
from balancer.tactics import RoundRobin, TokenBased
from tests.store.conftest import eventually
from tests.store.test_registry import (
    NEVER_S,
    DyingClient,
    a_configuration,
    a_door,
    a_provider,
    a_rule,
    a_service,
    edited,
)


def recorded(configuration: Configuration) -> Configuration:
    """The configuration with every event of its pools recorded."""
    pools = tuple(
        PoolSettings(name=name, record="full", record_events=1_000_000) for name in configuration.pool_names()
    )
    return msgspec.structs.replace(configuration, pools=pools)


class Start:
    """Starts workers on one server, and closes them."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._balances: list[Balance] = []

    async def __call__(
        self, at: str = "", events: BalanceEvents | None = None, probe: Probe | None = None, **settings: Any
    ) -> Balance:
        values: dict[str, Any] = {"redis_deadline_ms": 5000} | settings
        balance = Balance(at or self._url, load(values, {}), events)
        self._balances.append(balance)
        await balance.start(probe)
        return balance

    async def publish(self, configuration: Configuration) -> None:
        """Publishes the first configuration, as `apply` would."""
        commands = Commands(Topology(self._url))
        await Registry(commands).publish(recorded(configuration), None)
        await commands.aclose()

    async def close(self) -> None:
        closing = [asyncio.wait_for(balance.close(timeout_s=1), 10) for balance in self._balances]
        assert [end for end in await asyncio.gather(*closing, return_exceptions=True) if end] == []


@pytest.fixture
async def start(url: str) -> AsyncIterator[Start]:
    start = Start(url)
    yield start
    await start.close()


async def started(start: Start, configuration: Configuration, count: int = 1, **settings: Any) -> list[Balance]:
    """Workers that begin with this configuration, and whose pools answer."""
    await start.publish(configuration)
    workers = [await start(**settings) for _ in range(count)]
    await eventually(lambda: are_ready(*workers))
    return workers


async def are_ready(*balances: Balance) -> bool:
    return all(b.is_ready and b.pools_up().keys() >= b.directory.pools for b in balances)


def the_rule(balance: Balance, uuid: str = "chat") -> Rule:
    return balance.directory.by_uuid[uuid]


async def pick(balance: Balance, rule: Rule | None = None, **options: Any) -> Pick:
    values: dict[str, Any] = {"reserved": 0, "deadline_ms": 60_000} | options
    picked, _ = await balance.select(rule or the_rule(balance), **values)
    return picked


async def history(control: Any, pool: str = "default") -> list[dict[str, str]]:
    events = await control.xrange(keys.decisions(pool))
    return [{name.decode(): value.decode() for name, value in fields.items()} for _, fields in events]


# -- one choice for all ------------------------------------------------------------------------------------------------


async def test_three_workers_at_once_pick_as_one_process_would(start: Start, control: Any) -> None:
    workers = await started(start, a_configuration(a_rule(lb_tactic=RoundRobin(request_threshold=4))), 3)
    picks = await asyncio.gather(*(pick(worker) for _ in range(40) for worker in workers))
    picks.sort(key=lambda p: p.position)
    assert [p.service for p in picks] == [("a:m", "b:m", "c:m")[i // 4 % 3] for i in range(120)]
    assert [p.seq for p in picks] == list(range(1, 121))
    verdict = audit.check(await history(control))
    assert (verdict.violations, verdict.picks) == ([], 120)


async def test_a_settle_is_written_at_once_where_nothing_else_is_under_way(start: Start) -> None:
    (balance,) = await started(start, a_configuration(a_rule(lb_tactic=RoundRobin())))
    first, second, third = await asyncio.gather(*(pick(balance) for _ in range(3)))
    balance.settle(first, Outcome.SUCCESS, None)

    def is_flushed() -> bool:
        return balance._pool("default").is_flushed

    assert not is_flushed()  # Others may end in this turn of the loop, too.
    await balance.flushed("default")
    assert is_flushed()
    balance.settle(second, Outcome.SUCCESS, None)
    assert not is_flushed()
    await balance.settled(second)
    balance.settle(third, Outcome.SUCCESS, None)
    assert is_flushed()
    await balance.settled(third)
    assert balance.outbox_entries() == {"default": 0}


async def test_while_rules_are_edited_no_worker_picks_what_the_revision_at_that_position_does_not_offer(
    start: Start, control: Any
) -> None:
    edits = 30
    draw = random.Random(7)

    def an_edition() -> Configuration:
        """Some of six services, in some order, now and then with a provider disabled."""
        services = [a_service(f"{p}:m") for p in draw.sample("abcdef", draw.randint(1, 5))]
        enabled = {p: p == services[0].provider or draw.random() < 0.8 for p in "abcdef"}
        return a_configuration(
            a_rule(services=services, lb_tactic=RoundRobin(request_threshold=draw.randint(1, 3))),
            a_rule("still", ("a:m", "b:m"), active=True),
            providers=tuple(a_provider(p, enabled=enabled[p]) for p in "abcdef"),
        )

    workers = await started(start, an_edition(), 3)
    is_over = False

    async def ask(worker: Balance) -> int:
        count = 0
        while not is_over:
            try:
                picked = await pick(worker, reserved=draw.randint(0, 9))
            except StoreUnavailableError:
                continue  # On a slow machine the rule may change five times within one selection.
            worker.settle(picked, Outcome.SUCCESS, Usage(input=3))
            count += 1
        return count

    asking = [asyncio.create_task(ask(worker)) for worker in workers for _ in range(2)]
    for _ in range(edits):
        await asyncio.sleep(0.005)
        current = await workers[0].registry.current()
        await workers[0].registry.publish(recorded(an_edition()), current)
    is_over = True
    picks = sum(await asyncio.gather(*asking))
    for worker in workers:
        await eventually(lambda worker=worker: is_settled(worker))  # type: ignore[misc]

    events = await history(control)
    verdict = audit.check(events)
    assert verdict.violations == []
    assert verdict.picks == picks
    assert verdict.settles >= picks
    assert offences(events) == []
    assert len({e["revision"] for e in events if e["event"] == "pick"}) > edits / 4


async def is_settled(balance: Balance) -> bool:
    return not sum(balance.outbox_entries().values())


def offences(events: list[dict[str, str]]) -> list[dict[str, str]]:
    """Picks of a service that the last fence of their rule does not offer, or under another revision than its."""
    stands: dict[str, RuleDefinition] = {}
    found = []
    for event in sorted(events, key=lambda e: (int(e["epoch"]), int(e["position"]))):
        if event["event"] == "fence":
            stands[event["rule"]] = msgspec.json.decode(event["definition"], type=RuleDefinition)
        elif event["event"] == "pick":
            rule = stands[event["rule"]]
            offered = {s.id for part in rule.partitions for s in part.services if s.active}
            if event["service"] not in offered or int(event["revision"]) != rule.revision:
                found.append(event)
    return found


async def test_a_tick_costs_one_select_and_one_settle_at_most(start: Start, control: Any) -> None:
    (worker,) = await started(start, a_configuration(a_rule()))

    async def calls() -> int:
        stats = await control.info("commandstats")
        return sum(stats.get(f"cmdstat_{name}", {"calls": 0})["calls"] for name in ("eval", "evalsha"))

    costs = []
    for _ in range(5):
        first = await asyncio.gather(*(pick(worker) for _ in range(60)))
        assert await settled(worker)
        before = await calls()
        for picked in first:
            worker.settle(picked, Outcome.SUCCESS, None)
        second = await asyncio.gather(*(pick(worker) for _ in range(60)))
        assert await settled(worker)
        costs.append(await calls() - before)
        for picked in second:
            worker.settle(picked, Outcome.SUCCESS, None)
    assert sorted(costs)[2] == 2, "a lease renewed meanwhile may add to one of them"


async def settled(worker: Balance) -> bool:
    await eventually(lambda: is_settled(worker))
    return True


# -- edits are followed ------------------------------------------------------------------------------------------------


async def test_an_edit_that_a_worker_has_not_heard_of_is_followed_at_its_next_pick(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("balancer.store.registry.POLL_S", NEVER_S)
    before = a_configuration(a_rule(services=("a:m",)), providers=(a_provider("a"), a_provider("b")))
    stale: list[str] = []
    (editor,) = await started(start, before)
    worker = await start(events=BalanceEvents(stale=stale.append))
    await pick(worker)
    monkeypatch.setattr(keys, "FEED", "elsewhere")
    await editor.registry.publish(edited(before, "chat", services=(a_service("b:m"),)), editor.directory.snapshot)
    assert worker.directory.revision == 1
    picked, rule = await worker.select(the_rule(worker), reserved=0, deadline_ms=60_000)
    assert (picked.service, picked.revision) == ("b:m", 2)
    assert [service.id for service in rule.services] == ["b:m"]
    assert (worker.directory.revision, stale) == (2, ["default"])


async def test_an_edit_of_another_rule_makes_no_pick_stale(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("balancer.store.registry.POLL_S", NEVER_S)
    before = a_configuration(a_rule(), a_rule("other"))
    stale: list[str] = []
    (editor,) = await started(start, before)
    worker = await start(events=BalanceEvents(stale=stale.append))
    await pick(worker)
    monkeypatch.setattr(keys, "FEED", "elsewhere")
    await editor.registry.publish(edited(before, "other", active=False), editor.directory.snapshot)
    assert (await pick(worker)).revision == 1
    assert (worker.directory.revision, stale) == (1, [])


async def test_a_rule_moved_to_another_pool_is_picked_there_at_once(start: Start) -> None:
    before = a_configuration(a_rule())
    (worker,) = await started(start, before)
    old = the_rule(worker)
    await worker.registry.publish(edited(before, "chat", pool="other"), worker.directory.snapshot)
    picked, rule = await worker.select(old, reserved=0, deadline_ms=60_000)
    assert (picked.pool, picked.seq, picked.revision, rule.pool) == ("other", 1, 2, "other")
    worker.settle(picked, Outcome.SUCCESS, Usage(input=4))
    assert await settled(worker)
    views = {view.pool: view for view in await worker.views()}
    assert views["other"].services["a:m"].input == 4
    assert views["default"].partitions == {}


async def test_all_selections_that_meet_the_fence_of_a_dead_publisher_are_served(url: str, start: Start) -> None:
    before = a_configuration(a_rule(services=("a:m",)), providers=(a_provider("a"), a_provider("b")))
    workers = await started(start, before, 2)
    dying: Any = DyingClient.from_url(url)
    dying.scripts_left = 2
    with pytest.raises(StoreUnavailableError):
        await Registry(dying).publish(
            edited(before, "chat", services=(a_service("b:m"),)), workers[0].directory.snapshot
        )
    await dying.aclose()
    picks = await asyncio.gather(*(pick(worker) for worker in workers for _ in range(50)))
    assert {(p.service, p.revision) for p in picks} == {("b:m", 2)}
    assert (await workers[0].registry.head()).pending == 0


# -- a store that forgot -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lost", ["everything", "the pool"])
async def test_a_pool_that_lost_its_rules_gets_them_from_a_worker_that_knows_the_snapshot(
    start: Start, control: Any, lost: str
) -> None:
    workers = await started(start, a_configuration(a_rule(lb_tactic=RoundRobin(request_threshold=2))), 2)
    before = [await pick(workers[0]) for _ in range(3)]
    if lost == "everything":
        await control.flushall()
    else:
        await control.delete(keys.partitions("default"), keys.services("default"))
    picks = [await pick(worker) for _ in range(2) for worker in workers]
    assert [p.service for p in picks] == ["a:m", "a:m", "b:m", "b:m"]
    assert [p.seq for p in picks] == [1, 2, 3, 4]
    assert {p.epoch for p in picks} == {before[-1].epoch + 1}
    assert picks[0].position > before[-1].position


# -- no service --------------------------------------------------------------------------------------------------------

NO_SERVICE: dict[str, Callable[[Configuration], Configuration]] = {
    "all services off": lambda c: edited(c, "chat", services=tuple(a_service(f"{p}:m", active=False) for p in "ab")),
    "no services": lambda c: edited(c, "chat", services=()),
    "its only provider off": lambda c: edited(edited(c, "chat", services=(a_service("a:m"),)), "a", enabled=False),
    "the rule off": lambda c: edited(c, "chat", active=False),
    "the rule deleted": lambda c: msgspec.structs.replace(c, rules=c.rules[1:]),
}


@pytest.mark.parametrize("edit", NO_SERVICE)
async def test_a_rule_that_can_serve_no_more_says_so(start: Start, edit: str) -> None:
    before = a_configuration(a_rule(), a_rule("other"))
    (worker,) = await started(start, before)
    rule = the_rule(worker)
    await pick(worker, rule)
    await worker.registry.publish(NO_SERVICE[edit](before), worker.directory.snapshot)
    with pytest.raises(NoServiceError, match="chat"):
        await pick(worker, rule)
    assert (await pick(worker, the_rule(worker, "other"))).seq == 1


async def test_a_retry_that_has_tried_every_service_says_so(start: Start) -> None:
    (worker,) = await started(start, a_configuration(a_rule()))
    with pytest.raises(NoServiceError):
        await pick(worker, excluded=("a:m", "b:m", "c:m"))
    assert (await pick(worker, excluded=("a:m", "b:m"))).service == "c:m"


async def test_a_retry_leaves_the_cursor_that_a_worker_remembers(start: Start) -> None:
    (worker,) = await started(start, a_configuration(a_rule()))
    assert worker.cursor(the_rule(worker)) == ""
    assert (await pick(worker)).service == "a:m"
    assert (await pick(worker, excluded=("a:m",))).service != "a:m"
    assert worker.cursor(the_rule(worker)) == "a:m"


# -- pools and settles -------------------------------------------------------------------------------------------------


async def test_pools_never_mix_their_counters(start: Start) -> None:
    rules = (a_rule("x", ("a:m",)), a_rule("y", ("a:m",), pool="eu"), a_rule("z", ("a:m",), pool="us"))
    workers = await started(start, a_configuration(*rules), 2)
    for count, uuid in ((1, "x"), (2, "y"), (3, "z")):
        for worker in workers:
            for _ in range(count):
                picked = await pick(worker, the_rule(worker, uuid), reserved=7)
                assert picked.pool == {"x": "default", "y": "eu", "z": "us"}[uuid]
                worker.settle(picked, Outcome.SUCCESS, Usage(input=10, output=1))
            await pick(worker, the_rule(worker, uuid), reserved=7)
    for worker in workers:
        assert await settled(worker)
    found = {view.pool: view.services["a:m"] for view in await workers[0].views()}
    assert {pool: (s.picks, s.requests, s.input, s.output, s.in_flight, s.reserved) for pool, s in found.items()} == {
        "default": (4, 2, 20, 2, 2, 14),
        "eu": (6, 4, 40, 4, 2, 14),
        "us": (8, 6, 60, 6, 2, 14),
    }


async def test_rules_of_one_pool_share_the_counters_of_a_service(start: Start) -> None:
    (worker,) = await started(start, a_configuration(a_rule("x", ("a:m",)), a_rule("y", ("a:m",))))
    for uuid in ("x", "y"):
        worker.settle(await pick(worker, the_rule(worker, uuid)), Outcome.SUCCESS, Usage(input=5))
    assert await settled(worker)
    (view,) = await worker.views()
    assert (view.services["a:m"].requests, view.services["a:m"].input) == (2, 10)
    assert {uuid: rule.seq for uuid, rule in view.rules.items()} == {"x": 1, "y": 1}


async def test_what_is_strictly_settled_counts_in_the_next_pick_of_every_worker(start: Start) -> None:
    tactic = TokenBased(token_threshold=1)
    workers = await started(start, a_configuration(a_rule(services=("a:m", "b:m"), lb_tactic=tactic)), 2)
    services = []
    for turn in range(30):
        worker = workers[turn % 2]
        picked = await pick(worker)
        services.append(picked.service)
        worker.settle(picked, Outcome.SUCCESS, Usage(input=10))
        await worker.settled(picked)
    assert services == ["a:m", "b:m"] * 15


async def test_a_strict_settle_waits_no_longer_than_the_deadline(start: Start, control: Any) -> None:
    (worker,) = await started(start, a_configuration(a_rule()), redis_deadline_ms=300)
    picked = await pick(worker)
    await control.client_pause(1500)
    worker.settle(picked, Outcome.SUCCESS, Usage(input=10))
    began = asyncio.get_running_loop().time()
    await worker.settled(picked)
    assert 0.2 < asyncio.get_running_loop().time() - began < 1.2
    assert worker.outbox_entries() == {"default": 1}
    assert await settled(worker)


async def test_worker_ids_are_new_for_every_start(start: Start, control: Any) -> None:
    (first,) = await started(start, a_configuration(a_rule()))
    others = [await start() for _ in range(4)]
    await asyncio.gather(*map(pick, (first, *others)))
    ids = {balance.worker for balance in (first, *others)}
    assert len(ids) == 5
    assert {worker.decode() for worker in await control.zrange(keys.leases("default"), 0, -1)} == ids


# -- without Redis -----------------------------------------------------------------------------------------------------


async def test_while_redis_is_away_selections_of_a_closed_rule_fail_at_once_and_settles_are_kept(
    url: str, start: Start, control: Any
) -> None:
    (first,) = await started(start, a_configuration(a_rule(on_store_loss="closed")))
    with a_door(url) as door:
        worker = await start(door.url)
        picked = await pick(worker)
        await door.shut(control)
        await eventually(lambda: is_away(worker))
        began = asyncio.get_running_loop().time()
        worker.settle(picked, Outcome.SUCCESS, Usage(input=10))
        for _ in range(20):
            with pytest.raises(StoreUnavailableError, match="away"):
                await pick(worker)
        assert asyncio.get_running_loop().time() - began < 1
        assert (worker.is_ready, worker.pools_up(), worker.outbox_entries()) == (
            False,
            {"default": False},
            {"default": 1},
        )
        told: Any = worker.readiness()
        assert (told["pools"], told["away_since"].keys()) == ({"default": "away: closed"}, {"default"})
        door.open()
        await eventually(lambda: are_ready(worker))
        assert await settled(worker)
        assert (await pick(worker)).seq == 2
        await worker.close(timeout_s=1)
    (view,) = await first.views()
    assert view.services["a:m"].input == 10


async def is_away(balance: Balance) -> bool:
    return not any(balance.pools_up().values())


async def test_a_worker_that_starts_without_redis_is_not_ready_until_it_is_there(
    url: str, start: Start, control: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("balancer.store.registry.POLL_S", 0.05)
    await started(start, a_configuration(a_rule()))
    with a_door(url) as door:
        await door.shut(control)
        worker = await start(door.url)
        assert not worker.is_ready
        with pytest.raises(StoreUnavailableError):
            worker.snapshot()
        door.open()
        await eventually(lambda: is_ready(worker))
        assert (await pick(worker)).service == "a:m"
        await worker.close(timeout_s=1)


async def is_ready(balance: Balance) -> bool:
    return balance.is_ready


async def test_a_worker_that_says_it_is_ready_can_pick(start: Start) -> None:
    worker = await start()
    assert not worker.is_ready
    with pytest.raises(StoreUnavailableError, match="no configuration has been published yet"):
        worker.snapshot()
    await start.publish(a_configuration(a_rule()))
    await eventually(lambda: is_ready(worker))
    assert (await pick(worker)).seq == 1


async def test_a_worker_closes_at_whatever_moment_it_is_told_to(url: str, start: Start) -> None:
    await started(start, a_configuration(a_rule()))
    for turns in range(0, 60, 3):
        worker = Balance(url, load({"redis_deadline_ms": 5000}, {}))
        await worker.start()
        for _ in range(turns):
            await asyncio.sleep(0)
        async with asyncio.timeout(10):
            await worker.close(timeout_s=0)
