"""The recorded history, checked by the reference; and that the check can fail."""

from __future__ import annotations

import contextlib
import itertools
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from balancer import audit
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
from balancer.store import keys, scripts
from tests import stored as by_hand
from tests.lua.pool import LuaPool
from tests.lua.traces import RoutedTrace, Trace

NewPool = Callable[..., LuaPool]
NOW = 1_800_000_000_000


def history(pool: LuaPool) -> list[dict[str, str]]:
    entries = pool.client.xrange(keys.decisions(pool.name))
    return [{k.decode(): v.decode() for k, v in fields.items()} for _, fields in entries]


def add_by_hand(pool: LuaPool, name: str, by: int) -> None:
    """Adds to a counter of one service."""
    key, field = keys.services(pool.name), by_hand.field("p1:model 1", name)
    pool.client.hset(key, field, by_hand.with_added(pool.client.hget(key, field), name, by))


def is_unrecorded(verdict: audit.Verdict) -> bool:
    return verdict.events == verdict.picks == 0


@pytest.mark.parametrize("seed", range(3))
def test_a_recorded_history_is_replayed_from_the_pools_first_event(new_pool: NewPool, seed: int) -> None:
    pool = new_pool(record="full")
    Trace(pool, random.Random(seed)).run(steps=200)
    verdict = audit.check(history(pool))
    assert verdict.violations == []
    assert verdict.is_full, verdict.weaker
    assert verdict.picks > 100
    assert verdict.settles > 50
    assert verdict.checkpoints > 5


def test_a_pool_that_records_nothing_writes_no_event(new_pool: NewPool) -> None:
    pool = new_pool(record="off")
    Trace(pool, random.Random(1)).run(steps=60)
    assert is_unrecorded(audit.check(history(pool)))


def test_a_trimmed_history_is_checked_by_itself_up_to_its_first_checkpoint(new_pool: NewPool) -> None:
    pool = new_pool(record="full")
    Trace(pool, random.Random(3)).run(steps=120)
    whole = history(pool)
    marks = [i for i, event in enumerate(whole) if event["event"] == "checkpoint"]
    before, first = max(itertools.pairwise(marks), key=lambda pair: pair[1] - pair[0])
    verdict = audit.check(whole[before + 1 :])
    assert verdict.violations == []
    assert verdict.weaker == {"nothing is known of what came before": first - before - 1}
    assert verdict.replayed == verdict.events - (first - before - 1) > 20
    assert "weaker check" in verdict.summary()


def test_a_history_without_a_missing_event_is_not_accepted(new_pool: NewPool) -> None:
    pool = new_pool(record="full")
    Trace(pool, random.Random(3)).run(steps=60)
    whole = history(pool)
    cut = next(i for i, event in enumerate(whole) if event["event"] == "pick" and i > 30)
    verdict = audit.check(whole[:cut] + whole[cut + 1 :])
    assert verdict.violation_count
    assert verdict.violations[0].message == f"position {whole[cut]['position']} is missing"


def test_what_entries_picked_is_replayed_and_a_pick_of_another_entry_is_found(new_pool: NewPool) -> None:
    pool = new_pool(record="full")
    RoutedTrace(pool, random.Random(7)).run(steps=200)
    events = history(pool)
    assert audit.check(events).violations == []
    at = next(i for i, e in enumerate(events) if e["event"] == "pick" and e["partition"].startswith("long|"))
    rule = events[at]["rule"]
    verdict = audit.check([*events[:at], {**events[at], "partition": keys.partition(rule)}, *events[at + 1 :]])
    assert verdict.violation_count


def test_a_sampled_record_has_one_position_in_seventeen_and_its_choices_are_checked(new_pool: NewPool) -> None:
    pool = new_pool(record="sampled")
    Trace(pool, random.Random(4)).run(steps=400)
    events = history(pool)
    verdict = audit.check(events)
    assert verdict.violations == []
    assert not verdict.is_full
    assert verdict.picks > 30
    assert {int(e["position"]) % 17 for e in events if e["event"] in ("pick", "settle")} == {0}
    assert "sampled" in str(verdict.weaker)


def test_a_counter_that_somebody_changed_by_hand_is_found_at_the_next_checkpoint(new_pool: NewPool) -> None:
    pool = new_pool(record="full")
    trace = Trace(pool, random.Random(5))
    trace.run(steps=60)
    add_by_hand(pool, "input", 1)
    pool.checkpoint(trace.now_ms)
    verdict = audit.check(history(pool))
    assert verdict.violation_count == 1
    assert "service p1:model 1" in verdict.violations[0].message


def test_holdings_that_do_not_add_up_are_found_without_any_event(new_pool: NewPool) -> None:
    pool = new_pool(record="sampled")
    trace = Trace(pool, random.Random(5))
    trace.run(steps=60)
    add_by_hand(pool, "in_flight", 1)
    pool.checkpoint(trace.now_ms)
    verdict = audit.check(history(pool))
    assert [v.message for v in verdict.violations if "in flight" in v.message]


def test_recording_that_begins_in_mid_life_is_replayed_from_the_next_checkpoint(new_pool: NewPool) -> None:
    pool = new_pool(record="off")
    trace = Trace(pool, random.Random(6))
    trace.run(steps=60)
    pool.record = "full"
    trace.run(steps=60)
    verdict = audit.check(history(pool))
    assert verdict.violations == []
    assert set(verdict.weaker) == {"recording began in mid-life"}
    assert verdict.replayed > 100


# -- mutants -----------------------------------------------------------------------------------------------------------

MUTANTS = {
    "a streak one too long": ("include/tactic/round_robin.lua", "turn.streak < turn", "turn.streak <= turn"),
    "a streak that is not reset": (
        "include/tactic/round_robin.lua",
        "return line and line.id, 1, 'next'",
        "return line and line.id, turn.streak + 1, 'next'",
    ),
    "a tie broken the other way": ("include/view.lua", "value < least", "value <= least"),
    "a threshold that is reached too late": (
        "include/tactic/token_based.lua",
        "tokens < turn.params.token_threshold",
        "tokens <= turn.params.token_threshold",
    ),
    "a missing fence": ("tick.lua", "if rule.revision > revision then", "if false then"),
    "a settle that drops its tokens": ("include/ledger.lua", "w.tokens + input + output", "w.tokens"),
    "a batch that is settled twice": ("tick.lua", "batch > last and not is_gap", "not is_gap"),
    "a reap that forgets what it took": (
        "reap.lua",
        "  redis.call('HSET', holdings_key, number,",
        "  redis.call('HSET', holdings_key, number .. '0',",
    ),
    "a reservation never released": ("include/ledger.lua", "service.reserved - holding.reserved", "service.reserved"),
    "a window never reset": ("include/window.lua", ">= window.length * 1000", ">= window.length * 1e15"),
    "a minute that forgets what came before its last step": (
        "include/minute.lua",
        "minute.older_tokens = minute.older_tokens + minute.tokens",
        "minute.older_tokens = minute.older_tokens",
    ),
    "a retry that moves the cursor": (
        "tick.lua",
        "if is_retry then return take(selection, rule, part, line, 'retry', part.streak, 0) end",
        "if is_retry then return take(selection, rule, part, line, 'retry', streak, 0, memory) end",
    ),
    "a lost attempt that is never found again": (
        "tick.lua",
        "uncount_lost(service, holding)",
        "service.is_changed = true",
    ),
    "a clear that keeps the windows": (
        "clear.lua",
        "w.start, w.requests, w.tokens, w.output = 0, 0, 0, 0",
        "w.start = w.start",
    ),
    "a pin that moves the cursor": (
        "tick.lua",
        "line, 'pinned', part.streak, is_switch, nil, true)",
        "line, 'pinned', part.streak, is_switch, part.memory, true)",
    ),
    "a second probe": (
        "include/breaker.lua",
        "breaker.until_ms <= now and breaker.probe == 0",
        "breaker.until_ms <= now",
    ),
    "a limit that lets one more through": (
        "include/limits.lua",
        "used.in_flight >= in_flight",
        "used.in_flight > in_flight",
    ),
    "a cooldown that is not seen": (
        "tick.lua",
        "elseif service.cooldown > call.now then",
        "elseif false then",
    ),
    "an epoch that loses its numbers": (
        "include/pool.lua",
        "pool.position = math.max(was_position, seen_position)",
        "pool.position = was_position",
    ),
}


def a_mutant(folder: Path, mutant: str) -> str:
    """A copy of the scripts with the mutation."""
    file, right, wrong = MUTANTS[mutant]
    shutil.copytree(scripts.folder(), folder / "lua")
    source = (folder / "lua" / file).read_text()
    assert source.count(right) == 1
    (folder / "lua" / file).write_text(source.replace(right, wrong))
    return str(folder / "lua")


# What the check finds does not depend on the server.
on_one_server = pytest.mark.parametrize("server", ["valkey-9"], indirect=True)


@on_one_server
@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_wrong_script_is_found_out_by_its_history(new_pool: NewPool, tmp_path: Path, mutant: str) -> None:
    """Some histories end before what is wrong shows in their events: the trace sees a wrong reply at once."""
    mutated = a_mutant(tmp_path, mutant)
    for seed in range(1, 6):
        pool = new_pool(record="full", scripts=mutated)
        with contextlib.suppress(AssertionError):
            Trace(pool, random.Random(seed)).run(steps=4000)
            continue
        verdict = audit.check(history(pool))
        if verdict.violation_count:
            assert verdict.violations[0].context or verdict.violations[0].message
            return
    raise AssertionError("no history shows it")


TIGHT = {
    "round_robin": {"request_threshold": 3},
    "token_based": {"token_threshold": 10},
    "hybrid": {"request_threshold": 1, "token_threshold": 2**53},
}
"""Thresholds at which ties and exact hits are common."""


def be_busy(pool: LuaPool) -> None:
    """Some hundred attempts, each settled with ten tokens, under rules whose thresholds are hit all the time."""
    services = ("a:m", "b:m", "c:m")
    for rule, params in TIGHT.items():
        partition = PartitionDefinition(
            id=keys.partition(rule),
            tactic=rule,
            params=params,
            cursor="",
            services=tuple(ServiceDefinition(id=f"{rule}{s}", active=1, window=300, weight=1) for s in services),
        )
        windows = tuple(WindowsDefinition(id=s.id, lengths=(300,)) for s in partition.services)
        pool.fence(NOW, [RuleDefinition(rule=rule, revision=1, partitions=(partition,), windows=windows)])
    for number in range(1, 401):
        rule = tuple(TIGHT)[number % 3]
        selection = Selection(number=number, rule=rule, partition=keys.partition(rule), revision=1, deadline_ms=60_000)
        answer = pool.select(NOW + number, "w", [selection], 30_000)[0]
        entry = Entry(number=number, service=answer[1], outcome=Outcome.SUCCESS, usage=Usage(input=10))
        pool.settle(NOW + number, "w", number, [entry], 30_000)


@on_one_server
@pytest.mark.parametrize(
    "mutant", ["a streak one too long", "a tie broken the other way", "a threshold that is reached too late"]
)
def test_a_wrong_choice_is_found_out_by_a_sampled_record_too(new_pool: NewPool, tmp_path: Path, mutant: str) -> None:
    pool = new_pool(record="sampled", scripts=a_mutant(tmp_path, mutant))
    be_busy(pool)
    assert audit.check(history(pool)).violation_count


def test_a_sampled_record_of_the_right_scripts_has_no_violation(new_pool: NewPool) -> None:
    pool = new_pool(record="sampled")
    be_busy(pool)
    verdict = audit.check(history(pool))
    assert verdict.violations == []
    assert verdict.picks > 10
