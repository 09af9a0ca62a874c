"""A batch and selections in one call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import redis

from balancer.domain import Entry, Selection
from balancer.store import keys
from tests.lua.builders import (
    LEASE_MS,
    NOW_MS,
    A,
    B,
    Fleet,
    a_rule,
    a_selection,
    a_service,
    an_abandoned,
    an_entry,
    evaluate_packed,
    evaluate_tick,
    pool_keys,
    refused,
)
from tests.lua.pool import LuaPool

MINUTE_MS = 60_000


@pytest.fixture
def pool(new_pool: Callable[..., LuaPool]) -> LuaPool:
    """A pool with two services that take one request at a time, and a pick of the first in flight."""
    pool = new_pool(record="full")
    fleet = Fleet(pool)
    fleet.fence(a_rule(services=[a_service(A, in_flight=1), a_service(B, in_flight=1)], requests=2**40))
    fleet.ask()
    return pool


def call(pool: LuaPool, entries: list[Entry], selections: list[Selection], batch: int = 1, now_ms: int = NOW_MS) -> Any:
    return pool.tick(now_ms, "w1", batch, entries, selections, LEASE_MS)


def lease_end_ms(pool: LuaPool) -> int:
    return int(pool.client.zscore(keys.leases(pool.name), "w1"))


def test_what_is_settled_is_free_for_the_selections_of_the_call(pool: LuaPool) -> None:
    head, first, second, third = call(pool, [an_entry(1, A)], [a_selection(n) for n in (2, 3, 4)])
    assert head == ["applied", 1, 1, 5, 0]
    assert [first[:2], second[:2], third[:2]] == [["pick", A], ["pick", B], ["none", "limited"]]


def test_a_gap_changes_nothing_of_the_batch_and_the_selections_are_decided_all_the_same(pool: LuaPool) -> None:
    head, answer = call(pool, [an_entry(1, A)], [a_selection(2)], batch=3)
    assert head == ["gap", 0, 1, 3, 0]
    assert answer[:2] == ["pick", B], "the first is still in flight"


def test_a_batch_that_was_applied_before_is_not_applied_again_beside_selections(pool: LuaPool) -> None:
    call(pool, [an_entry(1, A, input=5)], [])
    head, answer = call(pool, [an_entry(1, A, input=5)], [a_selection(2)])
    assert (head, answer[:2]) == (["applied", 1, 1, 4, 0], ["pick", A])
    assert pool.view().services[A].input == 5


def test_a_name_that_is_given_up_is_refused_in_the_same_call(pool: LuaPool) -> None:
    _, answer = call(pool, [an_abandoned(2)], [a_selection(2)])
    assert answer == ["abandoned"]


def test_a_name_that_is_settled_may_be_taken_again_in_the_same_call(pool: LuaPool) -> None:
    _, answer = call(pool, [an_entry(1, A)], [a_selection(1, reserved=7)])
    assert answer[:2] == ["pick", A]
    holding = pool.client.hget(keys.holdings(pool.name, "w1"), "1")
    assert holding.startswith(b"h 7 ")


def test_the_lease_is_written_when_a_third_of_it_has_passed(pool: LuaPool) -> None:
    call(pool, [an_entry(1, A)], [])
    assert lease_end_ms(pool) == NOW_MS + LEASE_MS
    soon_ms = NOW_MS + LEASE_MS // 3 - 1
    call(pool, [], [a_selection(2)], batch=0, now_ms=soon_ms)
    assert lease_end_ms(pool) == NOW_MS + LEASE_MS
    call(pool, [], [a_selection(3)], batch=0, now_ms=soon_ms + 1)
    assert lease_end_ms(pool) == soon_ms + 1 + LEASE_MS


def test_a_lease_that_was_reaped_begins_anew_with_the_next_call(pool: LuaPool) -> None:
    call(pool, [an_entry(1, A)], [])
    late_ms = NOW_MS + 2 * LEASE_MS
    pool.reap(late_ms, "w2", "w1", LEASE_MS)
    assert lease_end_ms(pool) < 0
    call(pool, [], [a_selection(2)], batch=0, now_ms=late_ms)
    assert lease_end_ms(pool) == late_ms + LEASE_MS


def test_a_call_reads_and_writes_each_hash_once(new_pool: Callable[..., LuaPool]) -> None:
    pool = new_pool()
    Fleet(pool).fence(a_rule(requests=2**40))
    call(pool, [], [a_selection(n) for n in range(1, 33)], batch=0)
    call(pool, [an_entry(1, A)], [])  # Now its holdings have the number of its last batch.
    entries, selections = [an_entry(n, A) for n in range(2, 33)], [a_selection(n) for n in range(33, 65)]
    pool.client.config_resetstat()
    call(pool, entries, selections, batch=2)
    stats = pool.client.info("commandstats")
    counted = {name.removeprefix("cmdstat_"): stat["calls"] for name, stat in stats.items()}
    assert {name: counted[name] for name in counted if name not in ("eval", "info", "config|resetstat")} == {
        "hmget": 3,
        "hset": 3,
        "hdel": 1,
    }


ENTRY: list[Any] = msgspec.to_builtins(an_entry(1, A))
SELECTION: list[Any] = msgspec.to_builtins(a_selection(2))


@pytest.mark.parametrize(
    ("batch", "entries", "selections"),
    [
        (1, [ENTRY], [[2, 0, *SELECTION[2:]]]),
        (1, [[*ENTRY[:2], "finished", *ENTRY[3:]]], [SELECTION]),
        (1, [ENTRY, SELECTION], [SELECTION]),
        (1, [ENTRY], [SELECTION, ENTRY]),
        (0, [ENTRY], [SELECTION]),
    ],
    ids=["selection", "entry", "no entry", "no selection", "entries without a batch"],
)
def test_what_is_malformed_in_one_part_is_refused_with_the_other(
    pool: LuaPool, batch: int, entries: list[Any], selections: list[Any]
) -> None:
    names = pool_keys(pool.name, "w1")
    with refused(pool.client, "tick"):
        evaluate_tick(pool.client, names, {"batch": batch}, entries, selections)


GOOD: list[Any] = [NOW_MS, 0, 0, LEASE_MS, 1, False, [ENTRY], [SELECTION]]
PACKED = msgspec.msgpack.encode(GOOD)
MALFORMED: list[Any] = [None, 1, True, "", "text", {"a": ENTRY}, [1], ["text"], [[]], [{"number": 1}]]


def test_the_call_that_is_spoilt_below_is_taken(pool: LuaPool) -> None:
    assert evaluate_packed(pool.client, pool_keys(pool.name, "w1"), PACKED)[0][0] == "applied"


@pytest.mark.parametrize(
    "call",
    [
        b"",
        b"\xc1",
        b"1 2 3",
        PACKED[:-1],
        PACKED + b"\x01",
        5,
        "text",
        {"now_ms": 0},
        None,
        [],
        *(GOOD[:kept] for kept in range(1, 8)),
        *([*GOOD[:6], entries, [SELECTION]] for entries in MALFORMED),
        *([*GOOD[:7], selections] for selections in MALFORMED),
    ],
    ids=repr,
)
def test_what_is_no_packed_call_is_refused_and_nothing_is_written(pool: LuaPool, call: Any) -> None:
    with refused(pool.client, "tick"):
        evaluate_packed(pool.client, pool_keys(pool.name, "w1"), call)


@pytest.mark.parametrize(
    ("entries", "selections", "told"),
    [
        ([ENTRY, ENTRY[:5]], [SELECTION], "entry 2 is malformed"),
        ([ENTRY], [SELECTION, SELECTION, SELECTION[:3]], "selection 3 is malformed"),
        ([ENTRY], [SELECTION] * 65, "64 at most"),
    ],
)
def test_a_refusal_tells_what_is_malformed(pool: LuaPool, entries: Any, selections: Any, told: str) -> None:
    with pytest.raises(redis.ResponseError, match=told):
        evaluate_tick(pool.client, pool_keys(pool.name, "w1"), {"batch": 1}, entries, selections)


def test_what_a_newer_worker_says_beyond_that_is_not_read(pool: LuaPool) -> None:
    call = [*GOOD[:6], [[*ENTRY, "more"]], [[*SELECTION, 1]], {"more": 1}]
    head, answer = evaluate_packed(pool.client, pool_keys(pool.name, "w1"), call)
    assert (head[0], answer[0]) == ("applied", "pick")


def test_a_call_of_nothing_is_refused(pool: LuaPool) -> None:
    with refused(pool.client, "tick"):
        call(pool, [], [], batch=0)
