"""Seeded random histories of a pool, told to the scripts and to the reference at once."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import msgspec

from balancer import checkpoint
from balancer.breaker import Breaker
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
from balancer.ledger import ServiceState, Window
from balancer.limits import Bucket, Meter, Minute
from balancer.reference import Pool
from balancer.store import keys
from balancer.store.views import MinuteView, PoolView, ServiceView
from balancer.tactics import TACTIC_NAMES, tactic_from_map, tactic_params
from tests.lua.pool import LuaPool

WORKERS = ("w1", "w2", "w3")
SERVICES = tuple(f"p{i % 3}:model {i}" for i in range(6))
AFFINITIES = {"one": 20_000, "two": 40_000, "three": 600_000}
"""For how long each session is pinned."""
OUTCOMES = (
    *((Outcome.SUCCESS,) * 9),
    *(Outcome.FAILED, Outcome.FAILED, Outcome.OVERLOADED),
    *(Outcome.UNAUTHORIZED, Outcome.RATE_LIMITED, Outcome.REJECTED, Outcome.CANCELLED, Outcome.ABANDONED),
)
LEASE_MS = 30_000
TINY = {"request_threshold": (1, 2, 3, 7, 2**53), "token_threshold": (10, 20, 30, 50, 400, 2**53)}
"""Numbers of tactics at which something happens within a history."""


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
        self.partitions: dict[str, PartitionDefinition] = {}
        self.met: Counter[str] = Counter()

    def run(self, steps: int) -> None:
        """Takes that many steps; raises AssertionError at the first that is answered differently."""
        for rule in self.rules:
            self.raise_fence(rule)
        doings = (
            [self.select] * 5
            + [self.settle] * 3
            + [self.tick] * 5
            + [self.pass_time] * 4
            + [self.health] * 2
            + [self.reap, self.resend, self.rewind, self.clear]
        )
        for step in range(steps):
            self.random.choice(doings)()
            if self.random.random() < 0.06:
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
        known = self.partitions.get(rule)
        partition = self.edited(known) if known and self.random.random() < 0.3 else self.draw_partition(rule)
        self.partitions[rule] = partition
        entries = self.entries_of(rule)
        services = {s.id: s for part in (partition, *entries) for s in part.services}.values()
        named = sorted({s.id.partition(":")[0] for s in services})
        definition = RuleDefinition(
            rule=rule,
            revision=self.revisions[rule],
            retry_permille=self.random.choice((0, 200, 200, 1000)),
            partitions=() if self.random.random() < 0.1 else (partition, *entries),
            windows=tuple(WindowsDefinition(id=s.id, lengths=tuple({5, s.window})) for s in services),
            providers=tuple(self.draw_provider(id_) for id_ in named if self.random.random() < 0.7),
        )
        self.both("fence", self.now_ms, [definition], self.seen())

    def entries_of(self, rule: str) -> tuple[PartitionDefinition, ...]:
        """The partitions that a rule has beside its own."""
        return ()

    def partition_of(self, rule: str) -> str:
        """The partition that a selection asks for."""
        return keys.partition(rule)

    def draw_partition(self, rule: str) -> PartitionDefinition:
        """Any services under any tactic."""
        chosen = self.random.sample(SERVICES, self.random.randint(1, 6))
        is_limited, is_tiered = self.random.random() < 0.3, self.random.random() < 0.3
        tactic = self.random.choice((*TACTIC_NAMES, "round_robin", "token_based", "hybrid"))
        return PartitionDefinition(
            id=keys.partition(rule),
            tactic=tactic,
            params=self.draw_params(tactic),
            cursor=self.random.choice((*chosen, "", "", "", "")),
            refuses=self.random.choice((0, 0, 1)),
            services=tuple(self.draw_service(id_, is_limited, is_tiered) for id_ in chosen),
        )

    def draw_params(self, tactic: str) -> dict[str, int]:
        """Numbers for all that the tactic has."""
        known = tactic_params(tactic_from_map(tactic))
        return {name: self.random.choice(TINY.get(name, (1, 200))) for name in known}

    def edited(self, partition: PartitionDefinition) -> PartitionDefinition:
        """The partition with one service switched, weighed or limited anew, or other numbers for its tactic."""
        place = self.random.randrange(len(partition.services))
        service = partition.services[place]
        changed = self.random.choice(
            (
                msgspec.structs.replace(service, active=1 - service.active),
                msgspec.structs.replace(service, weight=service.weight + 1),
                msgspec.structs.replace(service, rpm=4),
                service,
            )
        )
        services = (*partition.services[:place], changed, *partition.services[place + 1 :])
        params = self.draw_params(partition.tactic) if changed is service else partition.params
        is_edit = self.random.choice((0, 1))
        return msgspec.structs.replace(partition, services=services, params=params, is_edit=is_edit)

    def draw_service(self, id_: str, is_limited: bool, is_tiered: bool) -> ServiceDefinition:
        """A service, now and then inactive; of a rule with limits or tiers where it says so."""
        some = int(is_limited)
        return ServiceDefinition(
            id=id_,
            active=int(self.random.random() < 0.85),
            window=self.random.choice((5, 300)),
            weight=self.random.choice((0, 0, 1, 5)),
            tier=self.random.choice((0, 1, 1, 2)) * int(is_tiered),
            rpm=self.random.choice((0, 0, 0, 2, 9, -1)) * some,
            tpm=self.random.choice((0, 0, 0, 60, 900)) * some,
            in_flight=self.random.choice((0, 0, 0, 1, 5)) * some,
            cost=self.random.choice((0, 300, 300, 12_500)),
        )

    def draw_provider(self, id_: str) -> ProviderDefinition:
        """A provider with any limits and breaker, or none of them."""
        some = int(self.random.random() < 0.3)
        return ProviderDefinition(
            id=id_,
            rpm=self.random.choice((0, 0, 5, 30)) * some,
            tpm=self.random.choice((0, 0, 200, 3000)) * some,
            in_flight=self.random.choice((0, 0, 3, 9, -1)) * some,
            failures=self.random.choice((0, 0, 1, 3, 6)),
            ratio_permille=self.random.choice((0, 0, 300, 700)),
            min_requests=self.random.choice((1, 3, 8)),
            window_ms=self.random.choice((1000, 60_000)),
            open_ms=self.random.choice((500, 500, 4000, 30_000)),
            successes=self.random.choice((1, 2, 3)),
        )

    def select(self) -> None:
        """One call of a few selections."""
        worker = self.random.choice(WORKERS)
        selections = self.draw_selections(worker)
        self.note(worker, selections, self.both("select", self.now_ms, worker, selections, LEASE_MS, self.seen()))

    def tick(self) -> None:
        """A batch and selections in one call, told to the reference one after the other."""
        worker = self.random.choice(WORKERS)
        entries, skip = self.draw_entries(worker), self.random.random() < 0.05
        is_gap = not skip and self.random.random() < 0.1
        self.batches[worker] += 1 + skip
        batch = self.batches[worker] + is_gap
        selections = self.draw_selections(worker)
        if entries and entries[0].number and self.random.random() < 0.2:
            selections[0] = msgspec.structs.replace(selections[0], number=entries[0].number)
        seen = self.seen()
        word, last, *place = self.reference.settle(self.now_ms, worker, batch, entries, LEASE_MS, seen, skip=skip)
        *answers, (_, epoch, position, lost) = self.reference.select(self.now_ms, worker, selections, LEASE_MS, seen)
        if place:
            lost = place[2]
        reply = self.lua.tick(self.now_ms, worker, batch, entries, selections, LEASE_MS, seen, skip=skip)
        assert reply == [[word, last, epoch, position, lost], *answers]
        self.met[f"{word} in one call"] += 1
        self.note(worker, selections, answers)
        if is_gap:
            self.both("settle", self.now_ms, worker, self.batches[worker], entries, LEASE_MS, self.seen())

    def draw_selections(self, worker: str) -> list[Selection]:
        """A few, each under a new name."""
        selections = []
        for _ in range(self.random.choice((1, 1, 1, 2, 2, 5, 20, 64))):
            self.numbers[worker] += 1
            rule = self.random.choice(self.rules)
            session = self.random.choice((*AFFINITIES, "", "", "", ""))
            selections.append(
                Selection(
                    number=self.numbers[worker],
                    rule=rule,
                    partition=self.partition_of(rule),
                    revision=max(1, self.revisions[rule] + self.random.choice((0, 0, 0, 0, 0, 0, 0, 0, -1, 1))),
                    draw=self.random.randrange(2**32),
                    reserved=self.random.choice((*((0, 0, 0, 10) * 4), 300)),
                    deadline_ms=self.random.choice((1000, 60_000)),
                    session=session,
                    affinity_ms=AFFINITIES.get(session, 0),
                    only=self.random.choice(SERVICES) if self.random.random() < 0.07 else "",
                    excluded=tuple(self.random.sample(SERVICES, 2)) if self.random.random() < 0.2 else (),
                    barred=tuple(self.random.sample(SERVICES, 2)) if self.random.random() < 0.1 else (),
                )
            )
        return selections

    def note(self, worker: str, selections: list[Selection], answers: list[Any]) -> None:
        """Remembers what was answered, and what is open now."""
        for selection, answer in zip(selections, answers, strict=False):
            self.met[answer[2] if answer[0] == "pick" else " ".join(map(str, answer[:2]))] += 1
            if answer[0] == "pick":
                self.picked[worker, selection.number] = answer[1]
                self.open[worker].append(selection)

    def settle(self) -> None:
        """The next batch."""
        worker = self.random.choice(WORKERS)
        entries = self.draw_entries(worker)
        self.batches[worker] += 1
        skip = False
        if self.random.random() < 0.05:
            self.both("settle", self.now_ms, worker, self.batches[worker] + 1, entries, LEASE_MS, self.seen())
        elif self.random.random() < 0.05:
            self.batches[worker] += 2
            skip = True
        self.both("settle", self.now_ms, worker, self.batches[worker], entries, LEASE_MS, self.seen(), skip=skip)

    def draw_entries(self, worker: str) -> list[Entry]:
        """Some open attempts, an abandoned name that never arrived, and a stranger."""
        entries = []
        for _ in range(min(len(self.open[worker]), self.random.choice((1, 6, 40)))):
            selection = self.open[worker].pop(self.random.randrange(len(self.open[worker])))
            outcome = self.random.choice(OUTCOMES)
            entries.append(
                Entry(
                    number=selection.number,
                    service=self.picked[worker, selection.number] if outcome is not Outcome.ABANDONED else "",
                    outcome=outcome,
                    age_ms=self.random.choice((0, 0, 0, 0, 0, 4000, 60_000, 400_000)),
                    usage=Usage(
                        input=self.random.choice((0, 0, 10, 20)),
                        output=self.random.choice((0, 0, 10, 50)),
                        cached=self.random.randrange(3),
                        cache_creation=self.random.randrange(3),
                        reasoning=self.random.randrange(3),
                    ),
                    cooldown_ms=self.random.choice((0, 0, 0, 0, 0, 0, 0, 1, 900, 5000, 60_000)),
                    first_token_us=self.random.choice((0, 250_000, self.random.randrange(10**7))),
                    stream_us=self.random.choice((0, 3_000_000, self.random.randrange(10**9))),
                )
            )
        if self.random.random() < 0.1:
            number = self.numbers[worker] + self.random.randint(1, 3)
            entries.append(Entry(number=number, service="", outcome=Outcome.ABANDONED))
        if self.random.random() < 0.1:
            entries.append(Entry(number=0, service=SERVICES[0], outcome=Outcome.SUCCESS, usage=Usage(input=7)))
        return entries

    def resend(self) -> None:
        """A batch that was applied before, with other entries: nothing of it may count."""
        worker = self.random.choice(WORKERS)
        if self.batches[worker]:
            entries = [Entry(number=0, service=SERVICES[1], outcome=Outcome.SUCCESS, usage=Usage(input=1000))]
            self.both("settle", self.now_ms, worker, self.batches[worker], entries, LEASE_MS, self.seen())

    def reap(self) -> None:
        """Somebody looks at somebody's holdings."""
        by, target = self.random.choice(WORKERS), self.random.choice(WORKERS)
        self.both("reap", self.now_ms, by, target, LEASE_MS, self.random.choice((1, 3, 1000)), self.seen())

    def clear(self) -> None:
        """The counters of some services, back to zero."""
        if self.random.random() < 0.3:
            services = self.random.sample(SERVICES, self.random.randint(1, 6))
            self.both("clear", self.now_ms, services, self.seen())

    def health(self) -> None:
        """Some services' provider answers, or does not."""
        services = self.random.sample(SERVICES, self.random.randint(1, 3))
        self.both("health", self.now_ms, services, self.random.random() < 0.6, self.seen())

    def pass_time(self) -> None:
        """From nothing to past every window, deadline and lease."""
        self.now_ms += self.random.choice((0, 1, 40, 700, 1000, 4999, 5000, 12_000, 31_000, 60_000, 70_000, 300_000))

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
        assert state.broken == self.reference.broken
        pins = {session: pin for session, pin in self.reference.pins.items() if pin[1] > self.now_ms}
        assert self.lua.pinned(self.now_ms, AFFINITIES) == pins


class RoutedTrace(Trace):
    """A history in which each rule has up to two entries, whose services may be its own too: they come, stay and go."""

    def __init__(self, lua: LuaPool, rand: random.Random) -> None:
        super().__init__(lua, rand)
        self.entries: dict[str, dict[str, PartitionDefinition]] = {}

    def entries_of(self, rule: str) -> tuple[PartitionDefinition, ...]:
        """Each entry as it was, edited, or drawn anew; now and then it is not there."""
        before, now = self.entries.get(rule, {}), {}
        for name in ("long", "b:c"):
            if self.random.random() < 0.2:
                continue
            known = before.get(name)
            is_kept = known is not None and self.random.random() < 0.6
            drawn = self.edited(known) if is_kept and known else self.draw_partition(rule)
            now[name] = msgspec.structs.replace(drawn, id=keys.partition(rule, name))
        self.entries[rule] = now
        return tuple(now.values())

    def partition_of(self, rule: str) -> str:
        """The rule's own, or that of an entry, be it there or not."""
        name = self.random.choice(("", "long", "long", "b:c"))
        self.met[f"entry {name}"] += 1
        return keys.partition(rule, name)


def _plain(view: PoolView) -> dict[str, Any]:
    services = {name: _service(service) for name, service in view.services.items()}
    meters = {name: Meter(_minute(p.minute), p.in_flight, p.reserved) for name, p in view.providers.items()}
    return {
        "epoch": view.epoch,
        "position": view.position,
        "rules": {name: (rule.revision, rule.seq) for name, rule in view.rules.items() if rule.revision},
        "partitions": {k: (p.tactic, p.cursor, p.streak, p.tier) for k, p in view.partitions.items()},
        "services": {name: service for name, service in services.items() if service != ServiceState()},
        "meters": {name: meter for name, meter in meters.items() if meter != Meter()},
        "providers": {name: p.provider for name, p in view.providers.items() if p.provider},
    }


def _service(view: ServiceView) -> ServiceState:
    values = msgspec.structs.asdict(view) | {
        "windows": [Window(*msgspec.structs.astuple(w)) for w in view.windows],
        "minute": _minute(view.minute),
        "breaker": Breaker(*msgspec.structs.astuple(view.breaker)),
    }
    return ServiceState(**values)


def _minute(view: MinuteView) -> Minute:
    return Minute([Bucket(*bucket) for bucket in view.buckets])


def _state(pool: Pool) -> dict[str, Any]:
    services = {
        name: msgspec.structs.replace(service, cleared=0, windows_revision=0) for name, service in pool.services.items()
    }
    return {
        "epoch": pool.epoch,
        "position": pool.position,
        "rules": {name: (rule.revision, rule.seq) for name, rule in pool.rules.items() if rule.revision},
        "partitions": {k: (p.definition.tactic, p.cursor, p.streak, p.tier) for k, p in pool.partitions.items()},
        "services": {name: service for name, service in services.items() if service != ServiceState()},
        "meters": {name: meter for name, meter in pool.meters.items() if meter != Meter()},
        "providers": {name: msgspec.structs.astuple(p.definition)[1:] for name, p in pool.providers.items()},
    }
