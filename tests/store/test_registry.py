"""The registry on real servers: publishing, fences, dead publishers, followers."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
import redis
import redis.asyncio

from balancer import stored
from balancer.domain import (
    BreakerSettings,
    Configuration,
    Health,
    Limits,
    Price,
    Provider,
    Retry,
    Rule,
    Selection,
    Service,
)
from balancer.errors import ConflictError, StoreUnavailableError
from balancer.store import connection, keys
from balancer.store.calls import Definer
from balancer.store.pool import PoolClient, PoolEvents
from balancer.store.registry import KEPT_DIGESTS, KEPT_SNAPSHOTS, Follower, Head, Registry, Snapshot
from balancer.store.topology import Topology
from balancer.tactics import Hybrid, RoundRobin
from tests.store.conftest import eventually

NEVER_S = 3600.0


def a_provider(uuid: str, **more: Any) -> Provider:
    return Provider(uuid=uuid, name=uuid, api_base="https://upstream.invalid/v1", **more)


def a_service(id_: str, **more: Any) -> Service:
    provider, _, model = id_.partition(":")
    return Service(provider=provider, model=model, **more)


def a_rule(uuid: str = "chat", services: Sequence[str | Service] = ("a:m", "b:m", "c:m"), **more: Any) -> Rule:
    options: dict[str, Any] = {"request_model": uuid, "lb_tactic": RoundRobin()} | more
    made = tuple(a_service(service) if isinstance(service, str) else service for service in services)
    return Rule(uuid=uuid, services=made, **options)


def a_configuration(*rules: Rule, **more: Any) -> Configuration:
    providers = dict.fromkeys(service.provider for rule in rules for service in rule.services)
    options: dict[str, Any] = {"providers": tuple(map(a_provider, providers))} | more
    return Configuration(rules=rules, **options)


def edited(configuration: Configuration, uuid: str, **changes: Any) -> Configuration:
    """The configuration with one rule, or else one provider, changed."""

    def change(items: Any) -> Any:
        return tuple(msgspec.structs.replace(i, **changes) if i.uuid == uuid else i for i in items)

    if configuration.rule(uuid):
        return msgspec.structs.replace(configuration, rules=change(configuration.rules))
    return msgspec.structs.replace(configuration, providers=change(configuration.providers))


class Door:
    """A server's socket under a name of ours: `shut` makes the server go away, `open` makes it return."""

    def __init__(self, folder: str, url: str) -> None:
        self._link = Path(folder, "s.sock")
        self._target = url.removeprefix("unix://")
        self.url = f"unix://{self._link}"
        self._link.symlink_to(self._target)

    def open(self) -> None:
        self._link.symlink_to(self._target)

    async def shut(self, control: Any) -> None:
        self._link.unlink()
        for kind in ("normal", "pubsub"):
            await control.client_kill_filter(_type=kind, skipme=True)


@contextlib.contextmanager
def a_door(url: str) -> Iterator[Door]:
    with tempfile.TemporaryDirectory(prefix="b-") as folder:
        yield Door(folder, url)


@pytest.fixture
async def client(url: str) -> AsyncIterator[redis.asyncio.Redis]:
    made = connection.client(url)
    yield made
    await made.aclose()


@pytest.fixture
def registry(client: redis.asyncio.Redis) -> Registry:
    return Registry(client)


async def fence(control: Any, rule: str, pool: str = "default") -> int:
    text: bytes = await control.hget(keys.partitions(pool), f"rule:{rule}") or stored.NEW_RULE.encode()
    return stored.rule(text.decode())["revision"]


async def is_defined(control: Any, rule: str, pool: str = "default") -> bool:
    return bool(await control.hexists(keys.partitions(pool), f"tactic:{keys.partition(rule)}"))


# -- compare and set ---------------------------------------------------------------------------------------------------


async def test_before_the_first_publication_nothing_stands(registry: Registry) -> None:
    assert await registry.head() == Head()
    assert await registry.current() is None
    assert await registry.load(1) is None


async def test_what_is_published_stands_and_reads_back_equal(registry: Registry) -> None:
    configuration = a_configuration(
        a_rule("chat", lb_tactic=Hybrid(request_threshold=3, token_threshold=70), description="first"),
        a_rule("org/embed:small", ("a:llama3:8b", "b:org/model x"), pool="embed", active=False),
    )
    published = await registry.publish(configuration, None, "digest-1")
    assert published.revision == 1
    assert await registry.head() == Head(revision=1, digest="digest-1", pending=0)
    assert await registry.current() == await registry.load(1) == published
    assert published.configuration == configuration
    assert await registry.revision_of("digest-1") == 1
    assert await registry.revision_of("digest-2") == 0


async def test_each_publication_is_one_revision_more_and_the_earlier_ones_stay(registry: Registry) -> None:
    first = await registry.publish(a_configuration(a_rule(description="1")), None)
    second = await registry.publish(a_configuration(a_rule(description="2")), first)
    assert second.revision == 2
    assert await registry.current() == second
    assert await registry.load(1) == first


async def test_of_many_publications_made_from_one_revision_one_stands_and_the_others_are_told(
    registry: Registry,
) -> None:
    base = await registry.publish(a_configuration(a_rule()), None)
    tries = [registry.publish(a_configuration(a_rule(description=str(i))), base) for i in range(8)]
    answers = await asyncio.gather(*tries, return_exceptions=True)
    (winner,) = [answer for answer in answers if isinstance(answer, Snapshot)]
    assert sum(isinstance(answer, ConflictError) for answer in answers) == 7
    assert await registry.current() == winner
    assert await registry.head() == Head(revision=2)


async def test_a_publication_made_from_an_outdated_revision_changes_nothing(registry: Registry, control: Any) -> None:
    first = await registry.publish(a_configuration(a_rule()), None)
    second = await registry.publish(a_configuration(a_rule(description="theirs")), first)
    for base in (None, first):
        with pytest.raises(ConflictError, match="revision 2"):
            await registry.publish(a_configuration(a_rule("mine")), base)
    assert await registry.current() == second
    assert await fence(control, "mine") == 0


async def test_publishers_that_read_again_after_a_conflict_lose_no_edit(url: str) -> None:
    names = [f"rule-{i}" for i in range(6)]

    async def add(name: str) -> None:
        """What one replica of a publisher does, on connections of its own."""
        mine = connection.client(url)
        registry = Registry(mine)
        while True:
            base = await registry.current()
            rules = base.configuration.rules if base else ()
            with contextlib.suppress(ConflictError):
                await registry.publish(a_configuration(*rules, a_rule(name)), base)
                break
        await mine.aclose()

    await asyncio.gather(*map(add, names))
    reader = connection.client(url)
    current = await Registry(reader).current()
    await reader.aclose()
    assert current is not None
    assert current.revision == 6
    assert sorted(rule.uuid for rule in current.configuration.rules) == names


async def test_the_feed_announces_each_revision_once(registry: Registry, control: Any) -> None:
    async with control.pubsub() as feed:
        await feed.subscribe(keys.FEED)
        base = None
        for i in range(3):
            base = await registry.publish(a_configuration(a_rule(description=str(i))), base)
        heard = [message async for message in _messages(feed, 3)]
    assert heard == [b"1", b"2", b"3"]


async def _messages(feed: Any, count: int) -> AsyncIterator[bytes]:
    async with asyncio.timeout(10):
        async for message in feed.listen():
            if message["type"] == "message":
                yield message["data"]
                count -= 1
                if not count:
                    return


async def test_the_last_200_snapshots_and_digests_are_kept(registry: Registry, control: Any) -> None:
    base = None
    for i in range(1, 204):
        base = await registry.publish(a_configuration(a_rule(services=(), description=str(i))), base, f"digest-{i}")
    assert (KEPT_SNAPSHOTS, KEPT_DIGESTS) == (200, 200)
    kept = {int(key.rpartition(b":")[2]) async for key in control.scan_iter(keys.snapshot(0)[:-1] + "*")}
    assert kept == set(range(4, 204))
    assert await registry.load(3) is None
    digests = await control.hgetall(keys.DIGESTS)
    assert {int(revision) for revision in digests.values()} == set(range(4, 204))
    assert await registry.revision_of("digest-3") == 0


async def test_a_file_published_again_is_known_by_its_newest_revision(registry: Registry) -> None:
    base = None
    for digest in ("one", "two", "one"):
        base = await registry.publish(a_configuration(a_rule(description=digest)), base, digest)
    assert await registry.revision_of("one") == 3
    assert await registry.head() == Head(revision=3, digest="one")


# -- revisions and fences of rules -------------------------------------------------------------------------------------

BEFORE = a_configuration(
    a_rule("x", ("a:m", "b:m"), lb_tactic=RoundRobin(request_threshold=3)),
    a_rule("y", ("b:m", "c:m")),
    a_rule("z", ("c:m",), pool="other"),
)

UNREAD_EDITS: dict[str, Callable[[], Configuration]] = {
    "nothing": lambda: BEFORE,
    "a description": lambda: edited(BEFORE, "x", description="new"),
    "a response_model": lambda: edited(BEFORE, "x", response_model="new"),
    "strict_settle": lambda: edited(BEFORE, "x", strict_settle=True),
    "a credential": lambda: edited(BEFORE, "b", token="${OTHER}"),
    "an address": lambda: edited(BEFORE, "b", api_base="https://elsewhere.invalid"),
    "a timeout": lambda: edited(BEFORE, "b", timeout=5.0),
    "a health probe": lambda: edited(BEFORE, "b", health=Health(path="/health", interval_s=5)),
    "a price of cached tokens": lambda: edited(BEFORE, "b", price=Price(cached=5)),
    "a fallback": lambda: edited(BEFORE, "x", fallback=("y",), on_context_overflow="y"),
    "a session's time": lambda: edited(BEFORE, "x", session_affinity=60, session_header="x-session"),
    "a queue's time": lambda: edited(BEFORE, "x", queue_timeout_ms=5),
    "more attempts": lambda: edited(BEFORE, "x", retry=Retry(attempts=5, backoff_ms=5)),
    "a provider of no rule": lambda: msgspec.structs.replace(
        BEFORE, providers=(*BEFORE.providers, a_provider("d", enabled=False))
    ),
    "the order of rules": lambda: msgspec.structs.replace(BEFORE, rules=BEFORE.rules[::-1]),
    "the order of providers": lambda: msgspec.structs.replace(BEFORE, providers=BEFORE.providers[::-1]),
}

READ_EDITS: dict[str, tuple[Callable[[], Configuration], set[str]]] = {
    "a threshold": (lambda: edited(BEFORE, "x", lb_tactic=RoundRobin(request_threshold=4)), {"x"}),
    "a tactic": (lambda: edited(BEFORE, "x", lb_tactic=Hybrid()), {"x"}),
    "a weight": (lambda: edited(BEFORE, "x", services=(a_service("a:m", weight=2), a_service("b:m"))), {"x"}),
    "a window": (lambda: edited(BEFORE, "x", services=(a_service("a:m", time_window=9), a_service("b:m"))), {"x"}),
    "a service off": (lambda: edited(BEFORE, "x", services=(a_service("a:m", active=False), a_service("b:m"))), {"x"}),
    "a service less": (lambda: edited(BEFORE, "y", services=(a_service("b:m"),)), {"y"}),
    "the order of services": (lambda: edited(BEFORE, "y", services=(a_service("c:m"), a_service("b:m"))), {"y"}),
    "a current_service_index": (lambda: edited(BEFORE, "y", current_service_index=1), {"y"}),
    "a rule off": (lambda: edited(BEFORE, "y", active=False), {"y"}),
    "a pool": (lambda: edited(BEFORE, "y", pool="other"), {"y"}),
    "a provider off": (lambda: edited(BEFORE, "b", enabled=False), {"x", "y"}),
    "a limit of a provider": (lambda: edited(BEFORE, "b", limits=Limits(rpm=5)), {"x", "y"}),
    "a limit split": (lambda: edited(BEFORE, "c", limits=Limits(rpm=5, split={"default": 1})), {"y", "z"}),
    "a breaker": (lambda: edited(BEFORE, "b", breaker=BreakerSettings(failures=5)), {"x", "y"}),
    "a price": (lambda: edited(BEFORE, "a", price=Price(input=5)), {"x"}),
    "a tier": (lambda: edited(BEFORE, "x", services=(a_service("a:m", tier=1), a_service("b:m"))), {"x"}),
    "a limit": (lambda: edited(BEFORE, "z", services=(a_service("c:m", limits=Limits(rpm=5)),)), {"z"}),
    "on_exhausted": (lambda: edited(BEFORE, "x", on_exhausted="refuse"), {"x"}),
    "a budget for retries": (lambda: edited(BEFORE, "x", retry=Retry(budget_ratio=0.5)), {"x"}),
    "another provider off": (lambda: edited(BEFORE, "c", enabled=False), {"y", "z"}),
    "a new rule": (lambda: msgspec.structs.replace(BEFORE, rules=(a_rule("w", ("a:m",)), *BEFORE.rules)), {"w"}),
}


@pytest.mark.parametrize("edit", UNREAD_EDITS)
async def test_what_no_select_reads_gives_no_rule_a_new_revision(registry: Registry, control: Any, edit: str) -> None:
    base = await registry.publish(BEFORE, None)
    places = [await control.hget(keys.services(pool), "place") for pool in ("default", "other")]
    after = await registry.publish(UNREAD_EDITS[edit](), base)
    assert after.revision == 2
    assert {uuid: after.rule_revision(uuid) for uuid in "xyz"} == {"x": 1, "y": 1, "z": 1}
    assert [await control.hget(keys.services(pool), "place") for pool in ("default", "other")] == places


@pytest.mark.parametrize("edit", READ_EDITS)
async def test_what_a_select_reads_raises_the_fence_of_its_rule_and_of_no_other(
    registry: Registry, control: Any, edit: str
) -> None:
    base = await registry.publish(BEFORE, None)
    make, changed = READ_EDITS[edit]
    after = await registry.publish(make(), base)
    for rule in after.configuration.rules:
        expected = 2 if rule.uuid in changed else 1
        assert (rule.uuid, after.rule_revision(rule.uuid)) == (rule.uuid, expected)
        assert (rule.uuid, await fence(control, rule.uuid, rule.pool)) == (rule.uuid, expected)


async def test_a_rule_that_changes_back_has_a_new_revision_all_the_same(registry: Registry, control: Any) -> None:
    first = await registry.publish(BEFORE, None)
    second = await registry.publish(edited(BEFORE, "x", lb_tactic=Hybrid()), first)
    third = await registry.publish(BEFORE, second)
    assert [third.rule_revision(uuid) for uuid in "xyz"] == [3, 1, 1]
    assert await fence(control, "x") == 3


async def test_a_deleted_rule_leaves_a_tombstone_that_fences_its_pool(registry: Registry, control: Any) -> None:
    base = await registry.publish(BEFORE, None)
    await registry.publish(a_configuration(*BEFORE.rules[1:]), base)
    assert await fence(control, "x") == 2
    assert not await is_defined(control, "x")
    assert await is_defined(control, "y")


async def test_a_moved_rule_is_fenced_in_its_old_pool_and_stands_in_the_new_one(
    registry: Registry, control: Any
) -> None:
    base = await registry.publish(BEFORE, None)
    moved = await registry.publish(edited(BEFORE, "x", pool="other"), base)
    assert [await fence(control, "x", pool) for pool in ("default", "other")] == [2, 2]
    assert [await is_defined(control, "x", pool) for pool in ("default", "other")] == [False, True]
    await registry.publish(BEFORE, moved)
    assert [await fence(control, "x", pool) for pool in ("default", "other")] == [3, 3]
    assert [await is_defined(control, "x", pool) for pool in ("default", "other")] == [True, False]


async def test_a_deleted_rule_that_returns_is_above_its_tombstone(registry: Registry, control: Any) -> None:
    base = await registry.publish(BEFORE, None)
    without = await registry.publish(a_configuration(*BEFORE.rules[1:]), base)
    back = await registry.publish(BEFORE, without)
    assert back.rule_revision("x") == await fence(control, "x") == 3
    assert await is_defined(control, "x")


async def test_the_first_revision_of_a_new_registry_is_above_the_fences_that_an_earlier_one_left(
    registry: Registry, control: Any
) -> None:
    base = None
    for threshold in range(1, 6):
        base = await registry.publish(a_configuration(a_rule(lb_tactic=RoundRobin(request_threshold=threshold))), base)
    await control.delete(keys.HEAD, keys.DIGESTS, *[keys.snapshot(i) for i in range(1, 6)])
    fresh = await registry.publish(a_configuration(a_rule("new"), a_rule()), None)
    assert fresh.revision == 6
    assert fresh.rule_revision("chat") == await fence(control, "chat") == 6
    assert await registry.current() == fresh


class Overtaken(Registry):
    """A registry in which a worker puts its rule back, under revision 7, once the fences have been looked at."""

    is_overtaken = False

    async def _first_revision(self, configuration: Configuration) -> int:
        found = await super()._first_revision(configuration)
        if not self.is_overtaken:
            self.is_overtaken = True
            snapshot = Snapshot(revision=7, configuration=configuration)
            definitions = [snapshot.definition(rule, Definer(configuration)) for rule in configuration.rules]
            await self.raise_fences(configuration.pool("default"), 7, definitions)
        return found


async def test_a_first_revision_that_a_worker_of_before_has_overtaken_is_published_above_it(
    client: redis.asyncio.Redis, control: Any
) -> None:
    """Head 1 under a fence of 7 was stale for ever: every request of the rule got 503."""
    registry = Overtaken(client)

    snapshot = await registry.publish(a_configuration(a_rule()), None, "file")

    assert snapshot.revision == snapshot.rule_revision("chat") == await fence(control, "chat") == 8
    assert await registry.current() == snapshot
    assert await registry.revision_of("file") == 8


# -- what an edit does to cursors and streaks --------------------------------------------------------------------------


class Picker:
    """Picks for one rule, one after the other, under the revision that stands."""

    def __init__(self, pool: PoolClient, registry: Registry) -> None:
        self._pool = pool
        self._registry = registry
        self._number = 0

    async def pick(self, rule: str) -> tuple[str, int]:
        """The service picked, and the streak."""
        snapshot = await self._registry.current()
        assert snapshot is not None
        self._number += 1
        selection = Selection(
            number=self._number,
            rule=rule,
            partition=keys.partition(rule),
            revision=snapshot.rule_revision(rule),
            deadline_ms=60_000,
        )
        answer = await self._pool.select(selection)
        assert answer[0] == "pick"
        return answer[1], answer[6]

    async def picks(self, rule: str, count: int) -> list[tuple[str, int]]:
        return [await self.pick(rule) for _ in range(count)]


@pytest.fixture
async def picker(url: str, registry: Registry) -> AsyncIterator[Picker]:
    pool = PoolClient(
        Topology(url), "default", "w", deadline_ms=5000, lease_ms=30_000, scripts_dir="", events=PoolEvents()
    )
    pool.start()
    await pool.wait_until_up(5)
    yield Picker(pool, registry)
    await pool.close(timeout_s=0.5)


def a_streaky_rule(**more: Any) -> Configuration:
    return a_configuration(a_rule(**({"lb_tactic": RoundRobin(request_threshold=3)} | more)))


async def test_a_rule_that_did_not_change_keeps_cursor_and_streak(registry: Registry, picker: Picker) -> None:
    base = await registry.publish(a_streaky_rule(), None)
    assert await picker.picks("chat", 5) == [("a:m", 1), ("a:m", 2), ("a:m", 3), ("b:m", 1), ("b:m", 2)]
    others = a_configuration(a_rule("new"), *a_streaky_rule(description="told better").rules)
    await registry.publish(others, base)
    assert await picker.picks("chat", 2) == [("b:m", 3), ("c:m", 1)]


async def test_an_edit_without_an_index_keeps_cursor_and_streak(registry: Registry, picker: Picker) -> None:
    base = await registry.publish(a_streaky_rule(), None)
    await picker.picks("chat", 5)
    services = (a_service("d:m"), a_service("b:m", weight=5), a_service("a:m"))
    await registry.publish(a_streaky_rule(services=services), base)
    assert await picker.picks("chat", 2) == [("b:m", 3), ("a:m", 1)]


async def test_another_threshold_keeps_the_cursor_and_starts_a_new_streak(registry: Registry, picker: Picker) -> None:
    base = await registry.publish(a_streaky_rule(), None)
    await picker.picks("chat", 5)
    await registry.publish(a_streaky_rule(lb_tactic=RoundRobin(request_threshold=2)), base)
    assert await picker.picks("chat", 3) == [("b:m", 1), ("b:m", 2), ("c:m", 1)]


async def test_an_edit_with_an_index_sets_the_cursor_and_starts_a_new_streak(
    registry: Registry, picker: Picker
) -> None:
    base = await registry.publish(a_streaky_rule(), None)
    await picker.picks("chat", 2)
    await registry.publish(a_streaky_rule(current_service_index=2), base)
    assert await picker.picks("chat", 4) == [("c:m", 1), ("c:m", 2), ("c:m", 3), ("a:m", 1)]


async def test_an_index_is_set_once_and_not_by_every_completion_again(
    registry: Registry, picker: Picker, control: Any
) -> None:
    snapshot = await registry.publish(a_streaky_rule(current_service_index=2), None)
    await picker.picks("chat", 4)
    await control.hset(keys.HEAD, "pending", snapshot.revision)
    await registry.complete_pending()
    assert await picker.pick("chat") == ("a:m", 2)


async def test_an_index_is_not_set_again_when_a_provider_is_disabled(registry: Registry, picker: Picker) -> None:
    """Nobody edited the rule then: what its edit did to the cursor was done once, when it was made."""
    before = a_streaky_rule(current_service_index=2)
    base = await registry.publish(before, None)
    await picker.picks("chat", 4)
    await registry.publish(edited(before, "c", enabled=False), base)
    assert await picker.pick("chat") == ("a:m", 2)


# -- publishers that die -----------------------------------------------------------------------------------------------


class DyingClient(redis.asyncio.Redis):
    """A client whose process ends after a number of scripts; nothing that it sends later arrives."""

    scripts_left = 0

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        if args[0] == "EVAL":
            self.scripts_left -= 1
        if self.scripts_left < 0:
            raise redis.ConnectionError
        return await super().execute_command(*args, **options)  # type: ignore[no-untyped-call]


AFTER = a_configuration(
    a_rule("x", ("a:m", "b:m"), lb_tactic=RoundRobin(request_threshold=9)),
    a_rule("y", ("b:m", "c:m"), pool="other"),
    a_rule("new", ("c:m",)),
)
"""From BEFORE: x edited, y moved, z deleted, one new; fences in two pools, so a publication is four scripts."""

STEPS = {"nothing": 0, "the snapshot": 1, "one pool's fences": 2, "all fences": 3}


async def publish_and_die(url: str, base: Snapshot, scripts: int, configuration: Configuration = AFTER) -> None:
    client: Any = DyingClient.from_url(url)
    client.scripts_left = scripts
    with pytest.raises(StoreUnavailableError):
        await Registry(client).publish(configuration, base, "of the dead")
    await client.aclose()


async def assert_is_whole(registry: Registry, control: Any) -> None:
    """No publication is under way, and the pools hold exactly what the head's snapshot says."""
    head, snapshot = await registry.head(), await registry.current()
    assert snapshot is not None
    assert (head.revision, head.pending) == (snapshot.revision, 0)
    expected = {(r.uuid, r.pool): snapshot.rule_revision(r.uuid) for r in snapshot.configuration.rules}
    for pool in ("default", "other"):
        fields = await control.hgetall(keys.partitions(pool))
        defined = {f.decode().partition("|")[2] for f in fields if f.startswith(b"tactic:")}
        assert {(rule, pool) for rule in defined} == {place for place in expected if place[1] == pool}
        for rule in defined:
            assert (rule, stored.rule(fields[f"rule:{rule}".encode()].decode())["revision"]) == (
                rule,
                expected[rule, pool],
            )


async def test_a_publication_is_its_snapshot_the_fences_of_each_pool_and_the_head(url: str, registry: Registry) -> None:
    base = await registry.publish(BEFORE, None)
    client: Any = DyingClient.from_url(url)
    client.scripts_left = 4
    assert (await Registry(client).publish(AFTER, base)).revision == 2
    assert client.scripts_left == 0
    await client.aclose()


@pytest.mark.parametrize("step", STEPS)
async def test_until_all_fences_are_up_the_head_stays(url: str, registry: Registry, control: Any, step: str) -> None:
    base = await registry.publish(BEFORE, None)
    await publish_and_die(url, base, STEPS[step])
    assert await registry.current() == base
    head = await registry.head()
    assert (head.revision, head.pending) == (1, 2 if STEPS[step] else 0)
    raised = [await fence(control, *place) for place in (("x", "default"), ("new", "default"), ("z", "other"))]
    assert raised.count(2) == {0: 0, 1: 0, 2: raised.count(2), 3: 3}[STEPS[step]]


@pytest.mark.parametrize("step", STEPS)
async def test_the_next_publisher_completes_what_a_dead_one_left(
    url: str, registry: Registry, control: Any, step: str
) -> None:
    base = await registry.publish(BEFORE, None)
    await publish_and_die(url, base, STEPS[step])
    if STEPS[step]:
        with pytest.raises(ConflictError):
            await registry.publish(BEFORE, base)
        await assert_is_whole(registry, control)
        assert await registry.head() == Head(revision=2, digest="of the dead")
        base = await registry.current() or base
    last = await registry.publish(edited(BEFORE, "x", active=False), base)
    await assert_is_whole(registry, control)
    assert await registry.current() == last


class SlowClient(redis.asyncio.Redis):
    """A client that stops before one of its scripts, counted from 0, until it may go on."""

    slow_script = 0
    stopped: asyncio.Event
    may_go_on: asyncio.Event

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        if args[0] == "EVAL":
            self.slow_script -= 1
            if self.slow_script == -1:
                self.stopped.set()
                await self.may_go_on.wait()
        return await super().execute_command(*args, **options)  # type: ignore[no-untyped-call]


def a_slow_client(url: str, script: int) -> Any:
    client: Any = SlowClient.from_url(url)
    client.slow_script, client.stopped, client.may_go_on = script, asyncio.Event(), asyncio.Event()
    return client


@pytest.mark.parametrize("step", ["the snapshot", "one pool's fences", "all fences"])
async def test_a_publisher_taken_for_dead_that_goes_on_changes_nothing_more(
    url: str, registry: Registry, control: Any, step: str
) -> None:
    base = await registry.publish(BEFORE, None)
    client = a_slow_client(url, STEPS[step])
    going = asyncio.create_task(Registry(client).publish(AFTER, base, "of the slow"))
    await client.stopped.wait()
    await registry.complete_pending()
    last = await registry.publish(BEFORE, await registry.current())
    client.may_go_on.set()
    assert (await going).revision == 2
    await client.aclose()
    assert await registry.current() == last
    await assert_is_whole(registry, control)


@pytest.mark.parametrize("step", ["the snapshot", "one pool's fences", "all fences"])
async def test_a_slow_publisher_does_not_commit_what_another_has_only_prepared(
    url: str, registry: Registry, control: Any, step: str
) -> None:
    base = await registry.publish(BEFORE, None)
    client = a_slow_client(url, STEPS[step])
    going = asyncio.create_task(Registry(client).publish(AFTER, base))
    await client.stopped.wait()
    await registry.complete_pending()
    second = await registry.current()
    assert second is not None
    await publish_and_die(url, second, 1, a_configuration(a_rule("x", ("a:m",))))
    client.may_go_on.set()
    await going
    await client.aclose()
    assert await registry.current() == second
    await registry.complete_pending()
    assert (await registry.head()).revision == 3
    await assert_is_whole(registry, control)


@pytest.mark.parametrize("step", ["one pool's fences", "all fences"])
async def test_a_worker_that_meets_a_dead_publishers_fence_completes_its_work(
    url: str, registry: Registry, client: redis.asyncio.Redis, control: Any, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    monkeypatch.setattr("balancer.store.registry._PATIENCE_S", 0.05)
    base = await registry.publish(BEFORE, None)
    follower = Follower(client, registry)
    await follower.refresh()
    await publish_and_die(url, base, STEPS[step])
    await follower.reach(2, timeout_s=10)
    assert follower.directory is not None
    assert follower.directory.configuration == AFTER
    await assert_is_whole(registry, control)


# -- followers ---------------------------------------------------------------------------------------------------------


@pytest.fixture
async def follow(client: redis.asyncio.Redis, registry: Registry) -> AsyncIterator[Callable[[], Any]]:
    """Starts followers whose feed is subscribed; closes them afterwards."""
    followers: list[Follower] = []

    async def start() -> Follower:
        follower = Follower(client, registry)
        await follower.start()
        followers.append(follower)

        async def is_subscribed() -> bool:
            return dict(await client.pubsub_numsub(keys.FEED)).get(keys.FEED.encode(), 0) >= len(followers)

        await eventually(is_subscribed)
        return follower

    yield start
    for follower in followers:
        await close(follower)


async def close(follower: Follower) -> None:
    async with asyncio.timeout(10):
        await follower.close()


def revision_of(follower: Follower) -> int:
    return follower.directory.revision if follower.directory else 0


def reached(follower: Follower, revision: int) -> Callable[[], Any]:
    async def is_reached() -> bool:
        return revision_of(follower) == revision

    return is_reached


async def test_a_follower_starts_with_what_stands(registry: Registry, follow: Any) -> None:
    snapshot = await registry.publish(BEFORE, None)
    follower: Follower = await follow()
    assert follower.directory is not None
    assert follower.directory.snapshot == snapshot
    assert follower.failure == ""


async def test_the_feed_tells_a_follower_long_before_it_would_poll(
    registry: Registry, follow: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("balancer.store.registry.POLL_S", NEVER_S)
    base = await registry.publish(BEFORE, None)
    follower: Follower = await follow()
    await registry.publish(AFTER, base)
    await eventually(reached(follower, 2))


async def test_a_follower_that_the_feed_does_not_reach_polls(
    registry: Registry, follow: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = await registry.publish(BEFORE, None)
    follower: Follower = await follow()
    monkeypatch.setattr(keys, "FEED", "elsewhere")
    await registry.publish(AFTER, base)
    await eventually(reached(follower, 2))


async def test_a_follower_polls_about_once_a_second(registry: Registry, follow: Any, control: Any) -> None:
    await registry.publish(BEFORE, None)
    await follow()

    async def polls() -> int:
        return int((await control.info("commandstats")).get("cmdstat_hgetall", {"calls": 0})["calls"])

    before, started = await polls(), asyncio.get_running_loop().time()

    async def has_polled_twice() -> bool:
        return await polls() >= before + 2

    await eventually(has_polled_twice)
    assert asyncio.get_running_loop().time() - started > 0.9


async def test_a_follower_without_a_configuration_says_so_and_takes_the_first(registry: Registry, follow: Any) -> None:
    follower: Follower = await follow()
    assert follower.directory is None
    assert "no configuration has been published yet" in follower.failure
    await registry.publish(BEFORE, None)
    await eventually(reached(follower, 1))
    assert follower.failure == ""


async def test_reach_returns_once_the_revision_is_published(registry: Registry, client: redis.asyncio.Redis) -> None:
    base = await registry.publish(BEFORE, None)
    follower = Follower(client, registry)
    waiting = asyncio.create_task(follower.reach(2, timeout_s=10))
    await eventually(reached(follower, 1))
    await registry.publish(AFTER, base)
    await waiting
    assert revision_of(follower) == 2
    await follower.reach(1, timeout_s=0)


async def test_reach_gives_up_on_a_revision_that_never_comes(registry: Registry, client: redis.asyncio.Redis) -> None:
    await registry.publish(BEFORE, None)
    follower = Follower(client, registry)
    for _ in range(20):
        async with asyncio.timeout(10):
            with pytest.raises(StoreUnavailableError, match="revision 7"):
                await follower.reach(7, timeout_s=0.02)
    assert revision_of(follower) == 1


async def test_a_follower_keeps_its_snapshot_while_redis_is_away_and_goes_on_when_it_is_back(
    url: str, registry: Registry, control: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("balancer.store.registry.POLL_S", 0.05)
    base = await registry.publish(BEFORE, None)
    with a_door(url) as door:
        client = connection.client(door.url)
        follower = Follower(client, Registry(client))
        await follower.start()
        await door.shut(control)

        async def has_noticed() -> bool:
            return follower.failure != ""

        await eventually(has_noticed)
        assert revision_of(follower) == 1
        await registry.publish(AFTER, base)
        door.open()
        await eventually(reached(follower, 2))
        assert follower.failure == ""
        await close(follower)
        await client.aclose()


async def test_a_follower_that_starts_without_redis_takes_the_head_once_it_is_there(
    url: str, registry: Registry, control: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("balancer.store.registry.POLL_S", 0.05)
    await registry.publish(BEFORE, None)
    with a_door(url) as door:
        await door.shut(control)
        client = connection.client(door.url)
        follower = Follower(client, Registry(client))
        await follower.start()
        assert follower.directory is None
        assert door.url.removeprefix("unix://") not in follower.failure
        door.open()
        await eventually(reached(follower, 1))
        await close(follower)
        await client.aclose()


async def test_a_follower_closes_at_whatever_moment_it_is_told_to(registry: Registry, url: str) -> None:
    """Cancelled while a command was being written, it lost the cancellation, went on, and closing never returned.

    `asyncio.wait_for` of Python 3.11, which redis-py writes under, swallows a cancellation that comes in the turn of
    the loop in which what it waits for is done.
    """
    await registry.publish(BEFORE, None)
    for turns in range(40):
        client = connection.client(url)
        follower = Follower(client, registry)
        await follower.start()
        for _ in range(turns):
            await asyncio.sleep(0)
        await close(follower)
        await client.aclose()


async def test_a_snapshot_that_cannot_be_read_does_not_end_the_following(
    registry: Registry, follow: Any, control: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("balancer.store.registry.POLL_S", 0.02)
    base = await registry.publish(BEFORE, None)
    follower: Follower = await follow()
    await control.set(keys.snapshot(2), '{"revision": "of another make"}')
    await control.hset(keys.HEAD, "revision", 2)

    async def has_noticed() -> bool:
        return follower.failure != ""

    await eventually(has_noticed, timeout_s=3)
    assert revision_of(follower) == 1
    await control.hset(keys.HEAD, "revision", 1)
    await registry.publish(AFTER, base)
    await eventually(reached(follower, 2), timeout_s=3)


async def test_a_registry_that_began_anew_is_followed_also_under_a_revision_seen_before(
    registry: Registry, follow: Any, control: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store came back empty, and somebody published another file: its revision is 1 again."""
    monkeypatch.setattr("balancer.store.registry.POLL_S", 0.02)
    await registry.publish(BEFORE, None, "one file")
    follower: Follower = await follow()
    await control.flushall()
    fresh = await registry.publish(AFTER, None, "another")

    async def is_followed() -> bool:
        return follower.directory is not None and follower.directory.snapshot == fresh

    await eventually(is_followed, timeout_s=3)


async def test_a_follower_whose_registry_was_emptied_keeps_its_copy_and_says_so_once(
    registry: Registry, follow: Any, control: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("balancer.store.registry.POLL_S", 0.02)
    told: list[str] = []
    monkeypatch.setattr("balancer.store.registry.log.warning", lambda event, **_: told.append(event))
    snapshot = await registry.publish(BEFORE, None)
    follower: Follower = await follow()

    await control.flushall()

    async def is_told() -> bool:
        return "publish it again" in follower.failure

    await eventually(is_told)
    await follower.refresh()
    assert follower.directory is not None
    assert follower.directory.snapshot == snapshot
    assert [event for event in told if "the registry is empty" in event] == told[:1]
    await registry.publish(AFTER, None)
    await eventually(lambda: _holds(follower, ""))


async def _holds(follower: Follower, failure: str) -> bool:
    return follower.failure == failure


async def test_a_server_that_does_not_answer_is_told_as_unavailable(url: str, control: Any) -> None:
    with a_door(url) as door:
        await door.shut(control)
        client = connection.client(door.url)
        registry = Registry(client)
        for asking in (registry.head(), registry.load(1), registry.current(), registry.publish(BEFORE, None)):
            with pytest.raises(StoreUnavailableError):
                await asking
        await client.aclose()
