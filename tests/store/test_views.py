"""Pictures of a pool, read from the hashes that the scripts have written."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

import msgspec
import pytest

from balancer import stored
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
from balancer.store import keys
from balancer.store.pool import PoolClient, PoolEvents
from balancer.store.topology import Topology
from balancer.store.views import PartitionView, PoolView, ProviderView, RuleView, ServiceView, WindowView, read_pool

AWKWARD_SERVICES = ("a:llama3:8b", "b:org/model", "c:one two  three", "d:x|y;z", "e:windows:1 2 3 4", "f:模型")
AWKWARD_RULES = ("openai/gpt-5", "a:b|c d", "|", "seq:x", "revision", "tactic:|x", " spaced out ", "规则")


def a_definition(rule: str, services: Sequence[str], *, threshold: int = 1, lengths: Sequence[int] = (300,)) -> Any:
    return RuleDefinition(
        rule=rule,
        revision=4,
        partitions=(
            PartitionDefinition(
                id=keys.partition(rule),
                tactic="round_robin",
                params={"request_threshold": threshold},
                cursor="",
                services=tuple(ServiceDefinition(id=s, active=1, window=lengths[0], weight=1) for s in services),
            ),
        ),
        windows=tuple(WindowsDefinition(id=s, lengths=tuple(lengths)) for s in services),
    )


@pytest.fixture
async def pool(url: str) -> AsyncIterator[PoolClient]:
    client = PoolClient(
        Topology(url), "default", "w", deadline_ms=5000, lease_ms=30_000, scripts_dir="", events=PoolEvents()
    )
    client.start()
    await client.wait_until_up(5)
    yield client
    await client.close(timeout_s=0.5)


async def pick(pool: PoolClient, rule: str, number: int, reserved: int = 0) -> str:
    selection = Selection(
        number=number,
        rule=rule,
        partition=keys.partition(rule),
        revision=4,
        reserved=reserved,
        deadline_ms=60_000,
    )
    answer = await pool.select(selection)
    assert answer[0] == "pick"
    return str(answer[1])


async def test_a_pool_that_nothing_has_touched_is_empty(pool: PoolClient) -> None:
    view = await pool.view()
    assert (view.rules, view.partitions, view.services) == ({}, {}, {})
    assert view.now_ms > 1_700_000_000_000


async def test_a_picture_has_every_counter_as_the_scripts_wrote_it(pool: PoolClient) -> None:
    await pool.raise_fence([a_definition("chat", ("a:m", "b:m"), threshold=2, lengths=(300, 60))])
    for number in range(1, 4):
        await pick(pool, "chat", number, reserved=5)
    usage = Usage(input=10, output=4, cached=3, cache_creation=2, reasoning=1)
    pool.settle(Entry(number=1, service="a:m", outcome=Outcome.SUCCESS, usage=usage))
    pool.settle(Entry(number=2, service="a:m", outcome=Outcome.FAILED))
    pool.settle(Entry(number=3, service="b:m", outcome=Outcome.ABANDONED))
    assert await pool.acknowledged(5)
    view = await pool.view()
    assert (view.pool, view.epoch, view.position) == ("default", 1, 7)
    assert view.rules == {"chat": RuleView(revision=4, seq=3)}
    assert view.partitions == {"|chat": PartitionView(tactic="round_robin", cursor="b:m", streak=1)}
    assert view.cursor("chat") == "b:m"
    assert view.cursor("other") == ""
    a, b = view.services["a:m"], view.services["b:m"]
    assert a == ServiceView(
        windows=a.windows,
        picks=2,
        requests=2,
        failures=1,
        input=10,
        output=4,
        cached=3,
        cache_creation=2,
        reasoning=1,
        last_used=a.last_used,
    )
    assert [(w.length_s, w.requests, w.tokens) for w in a.windows] == [(300, 2, 14), (60, 2, 14)]
    assert {w.start_ms <= view.now_ms for w in a.windows} == {True}
    assert 0 <= view.now_ms - a.last_used < 60_000
    assert b == ServiceView(windows=b.windows, picks=1, abandoned=1)


async def test_services_keep_their_ids_whatever_characters_they_hold(pool: PoolClient) -> None:
    await pool.raise_fence([a_definition("chat", AWKWARD_SERVICES)])
    picked = [await pick(pool, "chat", number) for number in range(1, len(AWKWARD_SERVICES) + 1)]
    assert picked == list(AWKWARD_SERVICES)
    for number, service in enumerate(picked, start=1):
        pool.settle(Entry(number=number, service=service, outcome=Outcome.SUCCESS, usage=Usage(input=number)))
    assert await pool.acknowledged(5)
    view = await pool.view()
    assert {id_: service.input for id_, service in view.services.items()} == {
        service: number for number, service in enumerate(AWKWARD_SERVICES, start=1)
    }
    assert {len(service.windows) for service in view.services.values()} == {1}
    assert view.cursor("chat") == AWKWARD_SERVICES[-1]


async def test_rules_keep_their_ids_whatever_characters_they_hold(pool: PoolClient) -> None:
    await pool.raise_fence([a_definition(rule, (f"p:{rule}",)) for rule in AWKWARD_RULES])
    for number, rule in enumerate(AWKWARD_RULES, start=1):
        assert await pick(pool, rule, number) == f"p:{rule}"
    view = await pool.view()
    assert view.rules == dict.fromkeys(AWKWARD_RULES, RuleView(revision=4, seq=1))
    assert {rule: view.cursor(rule) for rule in AWKWARD_RULES} == {rule: f"p:{rule}" for rule in AWKWARD_RULES}
    assert view.partitions.keys() == {keys.partition(rule) for rule in AWKWARD_RULES}


async def test_a_deleted_rule_shows_its_fence_and_no_partition(pool: PoolClient) -> None:
    await pool.raise_fence([a_definition("chat", ("a:m",))])
    await pool.raise_fence([RuleDefinition(rule="chat", revision=5)])
    view = await pool.view()
    assert view.rules == {"chat": RuleView(revision=5)}
    assert view.partitions == {}


async def test_a_picture_has_minutes_breakers_cooldowns_and_latencies(pool: PoolClient) -> None:
    definition = a_definition("chat", ("a:m", "b:m"), threshold=9)
    limited = [msgspec.structs.replace(s, rpm=100, tpm=1000) for s in definition.partitions[0].services]
    partition = msgspec.structs.replace(definition.partitions[0], services=tuple(limited))
    provider = ProviderDefinition(id="a", in_flight=9, failures=1)
    await pool.raise_fence([msgspec.structs.replace(definition, partitions=(partition,), providers=(provider,))])
    for number in (1, 2, 3):
        assert await pick(pool, "chat", number, reserved=5) == "a:m"
    usage = Usage(input=10, output=4)
    pool.settle(
        Entry(number=1, service="a:m", outcome=Outcome.SUCCESS, usage=usage, first_token_us=300_000, stream_us=40_000)
    )
    pool.settle(Entry(number=2, service="a:m", outcome=Outcome.FAILED, cooldown_ms=30_000))
    assert await pool.acknowledged(5)
    view = await pool.view()
    a = view.services["a:m"]
    assert a.minute.counts(view.now_ms) == (3, 14)
    assert a.minute.counts(view.now_ms + 65_000) == (0, 0)
    assert (a.breaker.state, a.breaker.opens, view.breaker_state("a:m")) == (1, 1, "open")
    assert 20_000 < view.cooldown_ms("a:m") <= 30_000
    assert (a.first_token, a.per_token) == (300_000, 10_000)
    assert 0 <= view.now_ms - a.measured < 60_000
    assert view.providers == {
        "a": ProviderView(
            minute=view.providers["a"].minute,
            in_flight=1,
            reserved=5,
            provider=(0, 0, 9, 1, 500, 20, 60_000, 30_000, 3),
        )
    }
    assert view.providers["a"].minute.counts(view.now_ms) == (3, 14)
    assert view.services.keys() == {"a:m", "b:m"}
    later = msgspec.structs.replace(view, now_ms=a.breaker.until_ms)
    assert (later.breaker_state("a:m"), later.cooldown_ms("a:m")) == ("half_open", 0)
    assert (later.breaker_state("unknown:m"), later.cooldown_ms("unknown:m")) == ("closed", 0)


def test_a_breaker_without_settings_counts_as_closed() -> None:
    """As for select: whoever switches breakers off is not kept waiting by an old one."""
    services = {b"service:a:m": b"0 0 0 0 0 0 0|||1 0 0 0 0 1 0 99 0", b"provider:a": b"0 0 0 0 0 20 60000 30000 3"}
    assert read_pool("default", {}, services, now_ms=7).breaker_state("a:m") == "closed"
    services[b"provider:a"] = b"0 0 0 1 0 20 60000 30000 3"
    assert read_pool("default", {}, services, now_ms=7).breaker_state("a:m") == "open"
    assert read_pool("default", {}, services, now_ms=99).breaker_state("a:m") == "half_open"


def test_fields_of_a_newer_version_are_passed_over() -> None:
    view = read_pool(
        "default",
        {b"mood:|chat": b"good", b"partition:|chat": b"3 -1 0\n\n\n", b"shape": b"round"},
        {b"place": b"2 9 0", b"service:a:m": b"0 0 4 0 0 0 0|||", b"colour:a:m": b"red"},
        now_ms=7,
    )
    assert view == PoolView(
        pool="default",
        now_ms=7,
        epoch=2,
        position=9,
        rules={},
        partitions={"|chat": PartitionView(streak=3)},
        services={"a:m": ServiceView(picks=4)},
    )


@pytest.mark.parametrize(
    ("now_ms", "counts"), [(1000, (3, 70)), (60_999, (3, 70)), (61_000, (0, 0)), (10**13, (0, 0)), (0, (3, 70))]
)
def test_a_reader_of_an_ended_window_sees_zeros(now_ms: int, counts: tuple[int, int]) -> None:
    window = WindowView(length_s=60, start_ms=1000, requests=3, tokens=70)
    assert window.counts(now_ms) == counts


def test_a_picture_decodes_what_is_asked_of_it_and_nothing_else() -> None:
    """Whoever asked for one rule waited until the texts of all of them were taken apart, and with them all requests."""
    fields = {f"service:a:m{i}".encode(): b"torn" for i in range(3)} | {b"service:a:m": stored.NEW_SERVICE.encode()}
    partitions = {b"rule:torn": b"torn", b"partition:|torn": b"torn"}
    view = read_pool("default", partitions, fields, now_ms=1)
    assert view.services["a:m"] == ServiceView()
    assert view.breaker_state("a:m") == "closed"
    assert view.cursor("chat") == ""
    assert list(view.services) == ["a:m0", "a:m1", "a:m2", "a:m"]
    with pytest.raises(ValueError, match="unpack"):
        view.services["a:m0"]
    with pytest.raises(KeyError):
        view.services["a:other"]
