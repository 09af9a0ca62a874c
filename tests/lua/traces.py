"""Seeded random histories of a pool, told to the scripts and to the reference at once."""

from __future__ import annotations

import random
from typing import Any

import msgspec

from balancer import checkpoint
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
from balancer.reference import Pool
from balancer.store import keys
from balancer.store.views import PoolView
from tests.lua.pool import LuaPool

TACTICS = ("round_robin", "token_based", "hybrid", "random")
WORKERS = ("w1", "w2", "w3")
LEASE_MS = 30_000


class Trace:
    """One history: each step is drawn and must be answered alike by both."""

    def __init__(self, lua: LuaPool, rand: random.Random) -> None:
        self.lua = lua
        self.reference = Pool()
        self.random = rand
        self.now_ms = 1_800_000_000_000
        self.numbers = dict.fromkeys(WORKERS, 0)
        self.batches = dict.fromkeys(WORKERS, 0)
        self.open: dict[str, list[Selection]] = {worker: [] for worker in WORKERS}
        self.picked: dict[tuple[str, int], str] = {}
        self.revisions: dict[str, int] = {}
        self.rules = ("chat", "org/embed", "a:b|c")

    def run(self, steps: int) -> None:
        """Takes that many steps; raises AssertionError at the first that is answered differently."""
        for rule in self.rules:
            self.raise_fence(rule)
        doings = (
            [self.select] * 8
            + [self.settle] * 5
            + [self.pass_time] * 4
            + [self.reap, self.resend, self.rewind, self.clear]
        )
        for step in range(steps):
            self.random.choice(doings)()
            if self.random.random() < 0.03:
                self.raise_fence(self.random.choice(self.rules))
            if step % 20 == 0:
                self.compare_state()
        self.compare_state()

    def both(self, name: str, *arguments: Any, **options: Any) -> Any:
        """The answer of both, which must be equal."""
        expected = getattr(self.reference, name)(*arguments, **options)
        actual = getattr(self.lua, name)(*arguments, **options)
        assert actual == expected, f"{name}{arguments}: the script says {actual}, the reference {expected}"
        return actual

    def seen(self) -> tuple[int, int]:
        """Mostly the pool's place; sometimes less, or more than it remembers."""
        place = self.reference.epoch, self.reference.position
        chance = self.random.random()
        if chance < 0.01:
            return place[0] + self.random.randint(0, 1), place[1] + self.random.randint(1, 9)
        return place if chance < 0.8 else (0, 0)

    def raise_fence(self, rule: str) -> None:
        """A new revision, or now and then an old one again, or a tombstone."""
        revision = self.revisions.get(rule, 0) + self.random.choice((0, 1, 1, 2))
        self.revisions[rule] = max(revision, self.revisions.get(rule, 0), 1)
        services = tuple(
            ServiceDefinition(
                id=f"p{i}:model {i}",
                active=int(self.random.random() < 0.8),
                window=self.random.choice((5, 300)),
                weight=self.random.choice((0, 0, 1, 5)),
            )
            for i in self.random.sample(range(6), self.random.randint(1, 5))
        )
        tactic = self.random.choice(TACTICS)
        partition = PartitionDefinition(
            id=keys.partition(rule),
            tactic=tactic,
            params={
                "request_threshold": self.random.choice((1, 2, 3, 7, 2**53)),
                "token_threshold": self.random.choice((10, 50, 400, 2000, 2**53)),
            },
            cursor=self.random.choice((*(s.id for s in services), "", "", "", "")),
            services=services,
        )
        windows = tuple(WindowsDefinition(id=s.id, lengths=tuple({5, s.window})) for s in services)
        is_gone = self.random.random() < 0.1
        definition = RuleDefinition(
            rule=rule,
            revision=self.revisions[rule],
            partitions=() if is_gone else (partition,),
            windows=windows,
        )
        self.both("fence", self.now_ms, [definition], self.seen())

    def select(self) -> None:
        """One call of a few selections."""
        worker = self.random.choice(WORKERS)
        selections = []
        for _ in range(self.random.choice((1, 1, 2, 5, 64))):
            self.numbers[worker] += 1
            rule = self.random.choice(self.rules)
            excluded = self.random.sample(range(6), 2) if self.random.random() < 0.2 else ()
            selections.append(
                Selection(
                    number=self.numbers[worker],
                    rule=rule,
                    partition=keys.partition(rule),
                    revision=max(1, self.revisions[rule] + self.random.choice((0, 0, 0, 0, 0, 0, -1, 1))),
                    draw=self.random.randrange(2**32),
                    reserved=self.random.choice((0, 0, 10, 50)),
                    deadline_ms=self.random.choice((1000, 60_000)),
                    excluded=tuple(f"p{i}:model {i}" for i in excluded),
                )
            )
        answers = self.both("select", self.now_ms, worker, selections, LEASE_MS, self.seen())
        for selection, answer in zip(selections, answers, strict=False):
            if answer[0] == "pick":
                self.picked[worker, selection.number] = answer[1]
                self.open[worker].append(selection)

    def settle(self) -> None:
        """A batch of some open attempts, an abandoned name that never arrived, and a stranger."""
        worker = self.random.choice(WORKERS)
        entries = []
        for _ in range(min(len(self.open[worker]), self.random.randint(0, 6))):
            selection = self.open[worker].pop(self.random.randrange(len(self.open[worker])))
            outcome = self.random.choice((Outcome.SUCCESS, Outcome.FAILED, Outcome.CANCELLED, Outcome.ABANDONED))
            entries.append(
                Entry(
                    number=selection.number,
                    service=self.picked[worker, selection.number] if outcome is not Outcome.ABANDONED else "",
                    outcome=outcome,
                    age_ms=self.random.choice((0, 0, 0, 4000, 400_000)),
                    usage=Usage(
                        input=self.random.choice((0, 10, 20, 50)),
                        output=self.random.choice((0, 10, 20, 50)),
                        cached=self.random.randrange(3),
                        cache_creation=self.random.randrange(3),
                        reasoning=self.random.randrange(3),
                    ),
                )
            )
        if self.random.random() < 0.1:
            number = self.numbers[worker] + self.random.randint(1, 3)
            entries.append(Entry(number=number, service="", outcome=Outcome.ABANDONED))
        if self.random.random() < 0.1:
            entries.append(Entry(number=0, service="p0:model 0", outcome=Outcome.SUCCESS, usage=Usage(input=7)))
        self.batches[worker] += 1
        skip = False
        if self.random.random() < 0.05:
            self.both("settle", self.now_ms, worker, self.batches[worker] + 1, entries, LEASE_MS, self.seen())
        elif self.random.random() < 0.05:
            self.batches[worker] += 2
            skip = True
        self.both("settle", self.now_ms, worker, self.batches[worker], entries, LEASE_MS, self.seen(), skip=skip)

    def resend(self) -> None:
        """A batch that was applied before, with other entries: nothing of it may count."""
        worker = self.random.choice(WORKERS)
        if self.batches[worker]:
            entries = [Entry(number=0, service="p1:model 1", outcome=Outcome.SUCCESS, usage=Usage(input=1000))]
            self.both("settle", self.now_ms, worker, self.batches[worker], entries, LEASE_MS, self.seen())

    def reap(self) -> None:
        """Somebody looks at somebody's holdings."""
        by, target = self.random.choice(WORKERS), self.random.choice(WORKERS)
        self.both("reap", self.now_ms, by, target, LEASE_MS, self.random.choice((1, 3, 1000)), self.seen())

    def clear(self) -> None:
        """The counters of some services, back to zero."""
        if self.random.random() < 0.3:
            services = [f"p{i}:model {i}" for i in self.random.sample(range(6), self.random.randint(1, 6))]
            self.both("clear", self.now_ms, services, self.seen())

    def pass_time(self) -> None:
        """From nothing to past every window, deadline and lease."""
        self.now_ms += self.random.choice((0, 1, 40, 1000, 4999, 5000, 31_000, 70_000, 300_000))

    def rewind(self) -> None:
        """The server's clock steps back."""
        if self.random.random() < 0.2:
            self.now_ms -= self.random.choice((1, 3000, 100_000))

    def compare_state(self) -> None:
        """Every counter of the server's state against the reference's."""
        assert _plain(self.lua.view()) == _state(self.reference)
        word, *_, text = self.lua.checkpoint(self.now_ms)
        assert word == "checkpoint"
        state = checkpoint.read(text)
        assert checkpoint.differences(self.reference, state.pool) == []
        assert checkpoint.broken_invariants(state.pool) == []


def _plain(view: PoolView) -> dict[str, Any]:
    state: dict[str, Any] = msgspec.to_builtins(view)
    return {
        "epoch": state["epoch"],
        "position": state["position"],
        "rules": {name: (rule["revision"], rule["seq"]) for name, rule in state["rules"].items() if rule["revision"]},
        "partitions": {k: (p["tactic"], p["cursor"], p["streak"]) for k, p in state["partitions"].items()},
        "services": {
            name: {k: [tuple(w.values()) for w in v] if k == "windows" else v for k, v in service.items()}
            for name, service in state["services"].items()
            if any(service.values())
        },
    }


def _state(pool: Pool) -> dict[str, Any]:
    return {
        "epoch": pool.epoch,
        "position": pool.position,
        "rules": {name: (rule.revision, rule.seq) for name, rule in pool.rules.items() if rule.revision},
        "partitions": {k: (p.definition.tactic, p.cursor, p.streak) for k, p in pool.partitions.items()},
        "services": {
            name: {
                k: [msgspec.structs.astuple(w) for w in v] if k == "windows" else v
                for k, v in msgspec.structs.asdict(service).items()
                if k not in ("cleared", "windows_revision")
            }
            for name, service in pool.services.items()
            if any(v for k, v in msgspec.structs.asdict(service).items() if k not in ("cleared", "windows_revision"))
        },
    }
