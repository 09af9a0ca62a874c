"""Workers that lose Redis: killed, stopped, cut off or slow. They go on alone, nobody waits, and nothing is lost."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from balancer import audit, stored
from balancer.domain import Configuration, Limits, Outcome, Pick, Usage
from balancer.errors import NoServiceError, RateLimitedError, StoreUnavailableError
from balancer.store import keys
from balancer.store.balance import Balance
from balancer.store.pool import Asked, PoolClient
from balancer.store.settlement import Batch
from balancer.tactics import RoundRobin
from tests.faults import FaultProxy
from tests.store.conftest import eventually
from tests.store.test_balance import Start, are_ready, history, is_away, pick, settled, started, the_rule
from tests.store.test_registry import a_configuration, a_door, a_rule, a_service, edited
from tests.topologies import Server

DEADLINE_MS = 200


@pytest.fixture
async def start(url: str) -> AsyncIterator[Start]:
    start = Start(url)
    yield start
    await start.close()


@pytest.fixture
async def proxy(url: str, tmp_path: Path) -> AsyncIterator[FaultProxy]:
    async with FaultProxy(url, tmp_path / "p.sock").running() as proxy:
        yield proxy


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """A server that keeps what it has when it is killed."""
    server = Server("valkey-9", tmp_path / "data", "--appendonly", "yes", "--appendfsync", "always", "--save", "")
    try:
        yield server
    finally:
        server.end()


class Account:
    """The picks of a test and what they used, as an upstream would have counted it."""

    def __init__(self) -> None:
        self.attempts: Counter[str] = Counter()
        self.tokens: Counter[str] = Counter()
        self.local = 0

    def settle(self, worker: Balance, picked: Pick) -> None:
        """The attempt succeeds; each uses something else."""
        tokens = 1 + 7 * self.attempts.total()
        worker.settle(picked, Outcome.SUCCESS, Usage(input=tokens))
        self.attempts[picked.service] += 1
        self.tokens[picked.service] += tokens
        self.local += picked.is_local

    async def serve(self, worker: Balance, **options: Any) -> Pick:
        picked = await pick(worker, **options)
        self.settle(worker, picked)
        return picked

    async def holds(self, worker: Balance) -> None:
        """Redis has every attempt once and every token, and holds nothing."""
        assert await settled(worker)
        view = await worker.view("default")
        services = {id_: s for id_, s in view.services.items() if s.requests}
        assert {id_: s.requests for id_, s in services.items()} == dict(self.attempts)
        assert {id_: s.input for id_, s in services.items()} == dict(self.tokens)
        assert [s.in_flight for s in services.values()] == [0] * len(services)


async def is_back(worker: Balance) -> bool:
    return all(worker.pools_up().values())


async def until_back(worker: Balance) -> None:
    await eventually(lambda: is_back(worker))


async def until_away(worker: Balance) -> None:
    await eventually(lambda: is_away(worker))


def messages(caplog: pytest.LogCaptureFixture, *of: str) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.getMessage() in of]


# -- cut off -----------------------------------------------------------------------------------------------------------


async def test_a_worker_that_is_cut_off_goes_on_alone_and_redis_cursor_stands_when_it_is_back(
    url: str, start: Start, control: Any, caplog: pytest.LogCaptureFixture
) -> None:
    rule = a_rule(services=("a:m", "b:m", "c:m"), lb_tactic=RoundRobin(request_threshold=4))
    (other,) = await started(start, a_configuration(rule))
    account = Account()
    with a_door(url) as door:
        worker = await start(door.url)
        before = [await account.serve(worker) for _ in range(6)]
        await door.shut(control)
        await until_away(worker)
        alone = [await account.serve(worker) for _ in range(7)]
        assert [p.service for p in before + alone] == [("a:m", "b:m", "c:m")[i // 4 % 3] for i in range(13)]
        assert all(p.is_local and (p.seq, p.epoch, p.position) == (0, 0, 0) for p in alone)
        assert [p.streak for p in alone[:4]] == [3, 4, 1, 2]
        assert worker.is_ready
        told: Any = worker.readiness()
        assert (told["pools"], told["away_since"].keys()) == ({"default": "away: local"}, {"default"})
        await until_back(other)
        theirs = await account.serve(other)
        assert (theirs.service, theirs.is_local) == ("b:m", False)
        door.open()
        await until_back(worker)
        back = await account.serve(worker)
        assert (back.service, back.streak, back.is_local) == ("b:m", 4, False)
        await account.holds(worker)
        assert account.local == 7
        assert messages(caplog, "picking without Redis", "Redis picks again") == [
            "picking without Redis",
            "Redis picks again",
        ]
        await worker.close(timeout_s=1)
    verdict = audit.check(await history(control))
    assert (verdict.violations, verdict.picks, verdict.settles) == ([], 8, 15)


async def test_what_was_in_flight_at_the_loss_and_at_the_return_is_settled_once(
    url: str, start: Start, control: Any
) -> None:
    await started(start, a_configuration(a_rule()))
    account = Account()
    with a_door(url) as door:
        worker = await start(door.url)
        first = [await pick(worker, reserved=5) for _ in range(3)]
        await door.shut(control)
        await until_away(worker)
        second = [await pick(worker, reserved=5) for _ in range(3)]
        account.settle(worker, first[0])
        account.settle(worker, second[0])
        door.open()
        await until_back(worker)
        third = [await pick(worker, reserved=5)]
        for picked in (*first[1:], *second[1:], *third):
            account.settle(worker, picked)
        await account.holds(worker)
        await worker.close(timeout_s=1)


async def test_a_rule_may_rather_be_closed_and_picks_that_any_worker_settles_always_are(
    url: str, start: Start, control: Any
) -> None:
    await started(start, a_configuration(a_rule("open"), a_rule("closed", on_store_loss="closed")))
    with a_door(url) as door:
        worker = await start(door.url)
        await door.shut(control)
        await until_away(worker)
        assert (await pick(worker, the_rule(worker, "open"))).is_local
        with pytest.raises(StoreUnavailableError, match="away"):
            await pick(worker, the_rule(worker, "closed"))
        with pytest.raises(StoreUnavailableError, match="away"):
            await worker.pick_held(the_rule(worker, "open"), reserved=0, hold_ms=60_000)
        await worker.close(timeout_s=1)


async def test_a_pool_of_closed_rules_alone_is_not_ready_without_redis(url: str, start: Start, control: Any) -> None:
    rules = (a_rule("x", on_store_loss="closed"), a_rule("y", active=False))
    await started(start, a_configuration(*rules))
    with a_door(url) as door:
        worker = await start(door.url)
        await door.shut(control)
        await until_away(worker)
        told: Any = worker.readiness()
        assert (worker.is_ready, told["pools"]) == (False, {"default": "away: closed"})
        await worker.close(timeout_s=1)


async def test_sessions_and_single_services_work_alone(url: str, start: Start, control: Any) -> None:
    rule = a_rule(services=("a:m", "b:m"), lb_tactic=RoundRobin(request_threshold=1), session_affinity=60)
    await started(start, a_configuration(rule))
    with a_door(url) as door:
        worker = await start(door.url)
        of = {session: (await pick(worker, session=session)).service for session in ("x", "y")}
        assert set(of.values()) == {"a:m", "b:m"}
        await door.shut(control)
        await until_away(worker)
        for session in ("x", "y", "x"):
            picked = await pick(worker, session=session)
            assert (picked.service, picked.reason, picked.is_local) == (of[session], "pinned", True)
        assert (await pick(worker, only="b:m")).service == "b:m"
        with pytest.raises(NoServiceError, match="c:m"):
            await pick(worker, only="c:m")
        await worker.close(timeout_s=1)


async def test_a_worker_that_never_picked_goes_on_from_what_the_others_did(
    url: str, start: Start, control: Any
) -> None:
    (other,) = await started(start, a_configuration(a_rule(lb_tactic=RoundRobin(request_threshold=4))))
    for _ in range(6):
        await pick(other)
    with a_door(url) as door:
        worker = await start(door.url)

        async def has_a_picture() -> bool:
            return worker._pool("default").local.has_picture

        await eventually(has_a_picture)
        await door.shut(control)
        await until_away(worker)
        assert [(p.service, p.streak) for p in [await pick(worker) for _ in range(3)]] == [
            ("b:m", 3),
            ("b:m", 4),
            ("c:m", 1),
        ]
        await worker.close(timeout_s=1)


async def test_a_service_that_fails_is_left_alone_without_redis_too(url: str, start: Start, control: Any) -> None:
    await started(start, a_configuration(a_rule(services=("a:m", "b:m"))))
    with a_door(url) as door:
        worker = await start(door.url)
        await door.shut(control)
        await until_away(worker)
        for _ in range(3):
            picked = await pick(worker)
            assert picked.service == "a:m"
            worker.settle(picked, Outcome.FAILED, None)
        assert (await pick(worker)).service == "b:m"
        await worker.close(timeout_s=1)


async def test_one_of_two_workers_uses_half_of_a_limit(url: str, start: Start, control: Any) -> None:
    service = a_service("a:m", limits=Limits(rpm=7))
    await started(start, a_configuration(a_rule(services=(service,))), lease_s=1.0)
    with a_door(url) as door:
        worker = await start(door.url, lease_s=1.0)

        async def sees_the_other() -> bool:
            return worker._pool("default").local.workers == 2

        await eventually(sees_the_other)
        await door.shut(control)
        await until_away(worker)
        assert [(await pick(worker)).is_local for _ in range(3)] == [True] * 3
        with pytest.raises(RateLimitedError, match="at its limit"):
            await pick(worker)
        await worker.close(timeout_s=1)


async def test_a_worker_that_knows_the_configuration_goes_on_without_a_pool_that_never_was_there(
    url: str, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the master of its slot in a Cluster is gone while the registry's is not."""
    await started(start, a_configuration(a_rule()))
    monkeypatch.setattr("balancer.store.connection.Link._connect", refusing)
    worker = await start(redis_deadline_ms=50)
    assert worker.is_ready
    began = time.perf_counter()
    assert [(await pick(worker)).is_local for _ in range(100)] == [True] * 100
    assert time.perf_counter() - began < 2, "each of them has waited"


async def refusing(_: Any) -> None:
    raise StoreUnavailableError("refused")


# -- killed, stopped, slow ---------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def published(server: Server, configuration: Configuration) -> AsyncIterator[Start]:
    """Starts workers on a server of the test's own, with that configuration."""
    start = Start(f"redis://{server.address}")
    await start.publish(configuration)
    try:
        yield start
    finally:
        await start.close()


async def test_a_killed_server_that_returns_has_everything_to_the_token(server: Server, tmp_path: Path) -> None:
    rule = a_rule(services=("a:m", "b:m"), lb_tactic=RoundRobin(request_threshold=3))
    account = Account()
    async with published(server, a_configuration(rule)) as start:
        folder = tmp_path / "outbox"
        worker = await start(outbox_dir=str(folder))
        await eventually(lambda: are_ready(worker))
        for _ in range(4):
            await account.serve(worker)
        assert await settled(worker)
        server.kill()
        await until_away(worker)
        for _ in range(2000):
            await account.serve(worker)
        assert account.local == 2000

        async def is_on_disk() -> bool:
            return any(path.stat().st_size > 20_000 for path in folder.rglob("*") if path.is_file())

        await eventually(is_on_disk)
        assert server.start()
        await until_back(worker)
        back = await account.serve(worker)
        assert (back.service, back.streak) == ("b:m", 2)
        await account.holds(worker)


async def test_a_stopped_server_makes_the_first_requests_wait_for_the_deadline_and_nobody_after_them(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    account = Account()
    async with published(server, a_configuration(a_rule(lb_tactic=RoundRobin(request_threshold=5)))) as start:
        worker = await start(redis_deadline_ms=DEADLINE_MS)
        await eventually(lambda: are_ready(worker))
        for _ in range(3):
            await account.serve(worker)
        server.stop()
        began = time.monotonic()
        first = await asyncio.gather(*(account.serve(worker) for _ in range(20)))
        waited_ms = (time.monotonic() - began) * 1000
        assert all(p.is_local for p in first)
        assert min(p.number for p in first) > 23, "names that Redis may have heard are used again"
        assert waited_ms >= DEADLINE_MS / 2
        asked: list[int] = []
        send = PoolClient._send

        def counted(self: PoolClient, batch: Batch | None, some: Sequence[Asked]) -> None:
            asked.append(len(some))
            send(self, batch, some)

        with monkeypatch.context() as patch:
            patch.setattr(PoolClient, "_send", counted)
            for _ in range(500):
                assert (await account.serve(worker)).is_local
        assert sum(asked) == 0
        server.resume()
        await until_back(worker)

        async def redis_picks() -> bool:
            return not (await account.serve(worker)).is_local

        await eventually(redis_picks)
        await account.holds(worker)
        view = await worker.view("default")
        assert sum(s.abandoned for s in view.services.values()) in range(21)


async def test_a_slow_redis_is_left_alone_until_it_answers_in_time(start: Start, proxy: FaultProxy) -> None:
    await started(start, a_configuration(a_rule()))
    worker = await start(proxy.url, redis_deadline_ms=DEADLINE_MS)
    await eventually(lambda: are_ready(worker))
    account = Account()
    await account.serve(worker)
    proxy.delays(DEADLINE_MS / 1000 * 0.75)  # Each way.
    waits, open_ = 0, []
    until = time.monotonic() + 2
    while time.monotonic() < until:
        began = time.monotonic()
        open_.append(await pick(worker))
        waits += time.monotonic() - began > DEADLINE_MS / 2000
        await asyncio.sleep(0.01)
    assert all(p.is_local for p in open_)
    assert waits == 1
    proxy.passes()
    await until_back(worker)
    for picked in open_:
        account.settle(worker, picked)
    assert not (await account.serve(worker)).is_local
    await account.holds(worker)
    await worker.close(timeout_s=1)


@pytest.mark.parametrize("fault", ["blackholes", "loses_replies", "refuses"])
async def test_whatever_becomes_of_the_way_to_redis_every_attempt_is_settled_once(
    start: Start, proxy: FaultProxy, control: Any, fault: str
) -> None:
    await started(start, a_configuration(a_rule(lb_tactic=RoundRobin(request_threshold=3))))
    worker = await start(proxy.url, redis_deadline_ms=100)
    await eventually(lambda: are_ready(worker))
    account = Account()
    for _ in range(4):
        await account.serve(worker)
    getattr(proxy, fault)()
    for _ in range(10):
        await asyncio.gather(*(account.serve(worker) for _ in range(5)))
        await asyncio.sleep(0.02)
    assert account.local > 40
    proxy.resets()
    proxy.passes()
    await until_back(worker)

    async def redis_picks() -> bool:
        return not (await account.serve(worker)).is_local

    await eventually(redis_picks)
    await account.holds(worker)
    await worker.close(timeout_s=1)
    assert audit.check(await history(control)).violations == []


async def test_nothing_is_logged_for_a_request_while_redis_is_away(
    url: str, start: Start, control: Any, caplog: pytest.LogCaptureFixture
) -> None:
    await started(start, a_configuration(a_rule()))
    with a_door(url) as door:
        worker = await start(door.url)
        await door.shut(control)
        await until_away(worker)
        await pick(worker)
        before = len(caplog.records)
        account = Account()
        for _ in range(300):
            await account.serve(worker)
        assert len(caplog.records) - before < 3
        await worker.close(timeout_s=1)


async def test_trouble_with_the_registry_is_no_loss_of_the_pool(
    start: Start, control: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (worker,) = await started(start, a_configuration(a_rule()))
    await pick(worker)
    await control.delete(keys.partitions("default"))

    async def fails() -> None:
        raise StoreUnavailableError("the registry does not answer")

    monkeypatch.setattr(worker._follower, "refresh", fails)
    with pytest.raises(StoreUnavailableError, match="registry"):
        await pick(worker)


# -- starting without Redis --------------------------------------------------------------------------------------------


async def test_a_worker_that_starts_without_redis_goes_on_with_what_was_kept(
    start: Start, proxy: FaultProxy, tmp_path: Path, control: Any
) -> None:
    configuration = a_configuration(a_rule(lb_tactic=RoundRobin(request_threshold=2)))
    folder = tmp_path / "outbox"
    (first,) = await started(start, configuration, outbox_dir=str(folder))
    kept = folder / "configuration.json"
    assert kept.stat().st_mode & 0o777 == 0o600
    await first.close(timeout_s=1)
    proxy.refuses()
    second = await start(proxy.url, redis_deadline_ms=DEADLINE_MS, outbox_dir=str(folder))
    assert second.is_ready
    picks = [await pick(second) for _ in range(5)]
    assert [p.is_local for p in picks] == [True] * 5
    assert [p.service for p in picks] == ["a:m", "a:m", "b:m", "b:m", "c:m"]
    for one in picks:
        second.settle(one, Outcome.SUCCESS, Usage(input=3, output=4))
    proxy.passes()
    await eventually(lambda: is_up(second))
    assert await second.registry.current() is not None
    async with asyncio.timeout(10):
        while any(second.outbox_entries().values()):  # noqa: ASYNC110  Redis empties it
            await asyncio.sleep(0.01)
    fields = await control.hgetall(keys.services("default"))
    totals = [stored.totals(v.decode()) for k, v in fields.items() if k.startswith(b"totals:")]
    assert (sum(t["requests"] for t in totals), sum(t["input"] for t in totals)) == (5, 15)


async def test_a_newer_configuration_replaces_what_was_kept(start: Start, tmp_path: Path, proxy: FaultProxy) -> None:
    folder = tmp_path / "outbox"
    configuration = a_configuration(a_rule())
    (first,) = await started(start, configuration, outbox_dir=str(folder))
    edited_one = edited(configuration, "chat", request_model="other")
    await first.registry.publish(edited_one, await first.registry.current())
    await first.refresh()
    proxy.refuses()
    second = await start(proxy.url, redis_deadline_ms=DEADLINE_MS, outbox_dir=str(folder))
    assert second.directory.rule("openai", "other") is not None


@pytest.mark.parametrize("text", [b"", b"{}", b"[]", b'{"revision": "x"}'])
async def test_a_kept_configuration_that_cannot_be_read_is_none(
    start: Start, proxy: FaultProxy, tmp_path: Path, text: bytes
) -> None:
    folder = tmp_path / "outbox"
    folder.mkdir()
    (folder / "configuration.json").write_bytes(text)
    proxy.refuses()
    worker = await start(proxy.url, redis_deadline_ms=DEADLINE_MS, outbox_dir=str(folder))
    assert not worker.is_ready


async def is_up(worker: Balance) -> bool:
    return all(worker.pools_up().values()) and bool(worker.pools_up())
