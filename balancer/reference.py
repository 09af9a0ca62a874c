"""A pool's whole state machine in pure Python, told by events: what the scripts are compared with.

Each method does what the script of the same name does and answers with the same reply; `now_ms` is always given. What
tick does in one call is told as `settle` and then `select`.
Written from the contract, not from the Lua. It is no store: one process, no expiry, no limit on its memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from balancer.domain import (
    Candidate,
    Entry,
    Outcome,
    PartitionDefinition,
    ProviderDefinition,
    RuleDefinition,
    Selection,
    ServiceDefinition,
    WindowsDefinition,
)
from balancer.ledger import ServiceState, Window
from balancer.limits import MINUTE_MS, NEVER, SHORT_WAIT_MS, Meter, has_limits, longest, wait_ms
from balancer.tactics import Choice, choose, tactic_of

Reply = list[int | str]

ABANDONED_MS = 60_000
HOLD_MS = 60_000
"""How long a tier that was taken over is held, at least."""
SHORT_LEASE_MS = 1000
MOST_BUDGET = 100_000
RETRY_COST = 1000
BY_SERVICE, BY_PROVIDER = 1, 2
"""Bits of a holding's `meters`."""


class PartitionState(msgspec.Struct):
    """A partition's definition, cursor and streak, the tier that serves (-1: none yet), and the tactic's memory."""

    definition: PartitionDefinition
    cursor: str = ""
    streak: int = 0
    tier: int = -1
    hold: int = 0
    memory: str = ""

    @property
    def top(self) -> int:
        """The first tier of its services; -1 when they are all of one."""
        tiers = {service.tier for service in self.definition.services}
        return min(tiers) if len(tiers) > 1 else -1

    @property
    def serving_tier(self) -> int:
        """The tier that serves, -1 when there is but one."""
        return self.tier if self.tier >= 0 else self.top


class RuleState(msgspec.Struct):
    """A rule's fence, its count of picks, its partitions' ids, and what it may retry.

    `retry_permille` of each first attempt goes into the budget; None is one that was never used.
    """

    revision: int = 0
    seq: int = 0
    partitions: tuple[str, ...] = ()
    retry_permille: int = 0
    budget: int | None = None

    @property
    def left(self) -> int:
        """What is in the budget."""
        if self.budget is None:
            return MOST_BUDGET if self.retry_permille > 0 else 0
        return self.budget

    def spend(self, cost: int) -> None:
        """Takes that much out of the budget; puts it in where it is below zero."""
        left = min(MOST_BUDGET, self.left - cost)
        if left != self.left:
            self.budget = left


class ProviderState(msgspec.Struct):
    """A provider's limits and breaker numbers, as of a rule's revision."""

    definition: ProviderDefinition
    revision: int


class Held(msgspec.Struct, frozen=True):
    """What an attempt in flight holds: tokens, the meters that count it, and (its pick's position) a probe."""

    service: str
    reserved: int
    deadline_ms: int
    meters: int = 0
    probe: int = 0


class Lost(msgspec.Struct, frozen=True):
    """What an attempt held when it was counted as lost."""

    service: str
    reserved: int
    reaped_ms: int
    position: int


class Abandoned(msgspec.Struct, frozen=True):
    """A name given up before its select arrived."""

    until_ms: int


class WorkerState(msgspec.Struct):
    """A worker's lease, its last batch, and its attempts by number."""

    lease_end_ms: int = 0
    renewed_ms: int = 0
    """When the lease was renewed, as far as is noted: beside the last batch, once there is one."""
    last: int = 0
    names: dict[int, Held | Lost | Abandoned] = msgspec.field(default_factory=dict)


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """What a selection gets, before it is counted."""

    service: str
    reason: str
    streak: int
    is_switch: bool = False


class Situation(msgspec.Struct, frozen=True, kw_only=True):
    """A selection before its partition at one moment: who may be picked, and why the others may not."""

    pool: Pool
    partition: PartitionState
    selection: Selection
    now_ms: int

    @property
    def services(self) -> tuple[ServiceDefinition, ...]:
        """All services of the partition."""
        return self.partition.definition.services

    def find(self, service: str) -> ServiceDefinition | None:
        """The service of that id in the partition."""
        return next((line for line in self.services if line.id == service), None)

    def status(self, line: ServiceDefinition) -> str:
        """Why a service is no candidate: the first reason; empty for a candidate."""
        if not line.active:
            return "inactive"
        if self._is_excluded(line):
            return "excluded"
        if self.wait_ms(line) is not None:
            return "limited"
        if self.is_broken(line):
            return "broken"
        return "cooling" if self._state(line).cooldown > self.now_ms else ""

    def wait_ms(self, line: ServiceDefinition) -> int | None:
        """How long limits keep a service back, None when they do not."""
        reserved = self.selection.reserved
        waits = [wait_ms(line, self._state(line), reserved, self.now_ms)]
        provider = self.pool.provider(line.id)
        if provider and has_limits(provider):
            waits.append(wait_ms(provider, self.pool.meter(line.id), reserved, self.now_ms))
        return longest([wait for wait in waits if wait is not None])

    def is_broken(self, line: ServiceDefinition) -> bool:
        """True while the breaker keeps requests back, half-open or not."""
        return self._state(line).breaker.is_open(self.pool.provider(line.id))

    def candidates(self) -> list[ServiceDefinition]:
        """The services that nothing speaks against."""
        return [line for line in self.services if not self.status(line)]

    def open(self) -> list[ServiceDefinition]:
        """The services that are switched on, can serve the request, and were not tried before."""
        return [line for line in self.services if line.active and not self._is_excluded(line)]

    def probe(self) -> ServiceDefinition | None:
        """The first service whose breaker wants one request to try it with, and that may have it."""
        for line in self.open():
            is_served = self.partition.top < 0 or line.tier <= self.partition.serving_tier
            wants = self.is_broken(line) and self._state(line).breaker.wants_probe(self.now_ms)
            is_cooling = self._state(line).cooldown > self.now_ms
            if wants and is_served and not is_cooling and self.wait_ms(line) is None:
                return line
        return None

    def tier_of(self, candidates: Sequence[ServiceDefinition]) -> tuple[int, int]:
        """The tier that serves from here on, and until when it is held: down at once, up again when that is over."""
        part = self.partition
        if part.top < 0:
            return part.tier, part.hold
        least, tier = min(line.tier for line in candidates), part.serving_tier
        if least > tier:
            return least, self.now_ms + HOLD_MS
        if self.now_ms >= part.hold or tier not in {line.tier for line in candidates}:
            return least, part.hold
        return tier, part.hold

    def choose(self, lines: Iterable[ServiceDefinition]) -> Choice:
        """The tactic's choice among these."""
        part, definition = self.partition, self.partition.definition
        tactic = tactic_of(definition.tactic, definition.params)
        assert tactic is not None, "asked for before"
        choice = choose(
            tactic,
            cursor=part.cursor,
            streak=part.streak,
            order=[line.id for line in self.services],
            candidates=[self._candidate(line) for line in lines],
            draw=self.selection.draw,
            memory=part.memory,
        )
        assert choice is not None, "asked only with a candidate"
        return choice

    def nothing(self) -> Reply:
        """Why there is no candidate, and how many ms to wait; [] when limits alone keep none back."""
        opened = self.open()
        if not opened:
            is_tried = self.selection.excluded and any(line.active for line in self.services)
            return ["none", "tried" if is_tried else "inactive", 0]
        waits = [self.wait_ms(line) for line in opened]
        if None not in waits:
            return ["none", "limited", min((w for w in waits if w is not None and w != NEVER), default=NEVER)]
        return ["none", "tried", 0] if self.selection.excluded else []

    def refusal(self, within: Sequence[ServiceDefinition]) -> Reply:
        """Which of breakers and cooldowns keeps these back, and how many ms to wait."""
        states = [self._state(line) for line in within if self.is_broken(line)]
        if states:
            waits = [max(0, state.breaker.until - self.now_ms) or SHORT_WAIT_MS for state in states]
            return ["none", "broken", min(waits)]
        return ["none", "cooling", min(self._state(line).cooldown - self.now_ms for line in within)]

    def _is_excluded(self, line: ServiceDefinition) -> bool:
        selection = self.selection
        return line.id in selection.excluded or line.id in selection.barred or selection.only not in ("", line.id)

    def _state(self, line: ServiceDefinition) -> ServiceState:
        return self.pool.service(line.id)

    def _candidate(self, line: ServiceDefinition) -> Candidate:
        state = self._state(line)
        requests, tokens = state.counts(line.window, self.now_ms)
        return Candidate(
            service=line.id,
            weight=line.weight,
            requests=requests,
            tokens=tokens,
            in_flight=state.in_flight,
            cost=line.cost,
            first_token=state.first_token,
            per_token=state.per_token,
        )


class Pool:
    """The state of one pool."""

    def __init__(self) -> None:
        self.epoch = 1
        self.position = 0
        self.rules: dict[str, RuleState] = {}
        self.partitions: dict[str, PartitionState] = {}
        self.services: dict[str, ServiceState] = {}
        self.providers: dict[str, ProviderState] = {}
        self.meters: dict[str, Meter] = {}
        self.workers: dict[str, WorkerState] = {}
        self.pins: dict[str, tuple[str, int]] = {}

    @property
    def broken(self) -> str:
        """The services whose breaker is not closed, a line each: until when, and the id."""
        lines = sorted((id_.encode(), s.breaker.until, id_) for id_, s in self.services.items() if s.breaker.state == 1)
        return "".join(f"{until} {id_}\n" for _, until, id_ in lines)

    def service(self, service: str) -> ServiceState:
        """What is known of a service."""
        return self.services.setdefault(service, ServiceState())

    def provider(self, service: str) -> ProviderDefinition | None:
        """The definition of a service's provider, None where there is none."""
        state = self.providers.get(provider_of(service))
        return state.definition if state else None

    def meter(self, service: str) -> Meter:
        """What is measured of a service's provider."""
        return self.meters.setdefault(provider_of(service), Meter())

    def _open(self, seen: tuple[int, int]) -> int:
        """Starts a new epoch when the caller has seen more than is known here; how many positions were lost."""
        epoch, position = seen
        if (epoch, position) <= (self.epoch, self.position):
            return 0
        lost = max(0, position - self.position)
        self.epoch = epoch + 1
        self.position = max(position, self.position) + 1
        return lost

    def _worker(self, worker: str) -> WorkerState:
        return self.workers.setdefault(worker, WorkerState())

    def _renew(self, now_ms: int, worker: WorkerState, lease_ms: int, *, is_applied: bool = False) -> None:
        """Renews a lease of which a third has passed, or that is a short one."""
        if worker.renewed_ms <= now_ms < worker.renewed_ms + lease_ms / 3 and lease_ms >= SHORT_LEASE_MS:
            return
        worker.lease_end_ms = now_ms + lease_ms
        if is_applied or worker.last:
            worker.renewed_ms = now_ms

    def _count_minute(self, now_ms: int, service: str, meters: int, requests: int, tokens: int) -> None:
        """Counts in the minutes of a service and of its provider, where they are metered."""
        if meters & BY_SERVICE:
            self.service(service).minute.count(now_ms, requests, tokens)
        if meters & BY_PROVIDER:
            self.meter(service).minute.count(now_ms, requests, tokens)

    def _release(self, held: Held) -> None:
        """Gives back what an attempt held."""
        self.service(held.service).release(held.reserved)
        if held.meters & BY_PROVIDER:
            meter = self.meter(held.service)
            meter.in_flight -= 1
            meter.reserved -= held.reserved

    # -- fence ---------------------------------------------------------------------------------------------------------

    def fence(self, now_ms: int, definitions: Sequence[RuleDefinition], seen: tuple[int, int] = (0, 0)) -> Reply:
        """Raises the fence of each rule whose revision is above the one known."""
        lost = self._open(seen)
        raised = 0
        for definition in definitions:
            rule = self.rules.setdefault(definition.rule, RuleState())
            if definition.revision <= rule.revision:
                continue
            ids = tuple(partition.id for partition in definition.partitions)
            for gone in set(rule.partitions) - set(ids):
                del self.partitions[gone]
            for partition in definition.partitions:
                self._define(partition)
            for windows in definition.windows:
                self._set_windows(windows, definition.revision)
            for provider in definition.providers:
                self._set_provider(provider, definition.revision)
            rule.revision, rule.partitions = definition.revision, ids
            rule.retry_permille = definition.retry_permille
            if rule.retry_permille == 0:
                rule.budget = 0
            elif rule.budget is not None:
                rule.budget = min(rule.budget, MOST_BUDGET)
            self.position += 1
            raised += 1
        return ["raised", raised, self.epoch, self.position, lost]

    def _define(self, new: PartitionDefinition) -> None:
        old = self.partitions.get(new.id)
        state = PartitionState(definition=msgspec.structs.replace(new, cursor="", is_edit=1))
        if old:
            is_same_tactic = (old.definition.tactic, old.definition.params) == (new.tactic, new.params)
            state.cursor, state.streak = old.cursor, old.streak if is_same_tactic else 0
            if _shape(old.definition) == _shape(new):
                state.tier, state.hold, state.memory = old.tier, old.hold, old.memory
        if new.cursor and (new.is_edit or old is None):
            state.cursor, state.streak = new.cursor, 0
        if state.cursor not in (service.id for service in new.services):
            state.cursor, state.streak = "", 0
        self.partitions[new.id] = state

    def _set_windows(self, windows: WindowsDefinition, revision: int) -> None:
        service = self.service(windows.id)
        known = {window.length: window for window in service.windows}
        lengths = windows.lengths
        if revision < service.windows_revision:
            lengths = tuple(sorted({*lengths, *known}))
        service.windows = [known.get(length) or Window(length=length) for length in lengths]
        service.windows_revision = max(revision, service.windows_revision)

    def _set_provider(self, definition: ProviderDefinition, revision: int) -> None:
        known = self.providers.get(definition.id)
        if known is None or revision >= known.revision:
            self.providers[definition.id] = ProviderState(definition, revision)

    # -- select --------------------------------------------------------------------------------------------------------

    def select(
        self,
        now_ms: int,
        worker: str,
        selections: Sequence[Selection],
        lease_ms: int,
        seen: tuple[int, int] = (0, 0),
    ) -> list[Reply]:
        """One answer for each selection in order, then the pool's place."""
        lost = self._open(seen)
        asking = self._worker(worker)
        self._renew(now_ms, asking, lease_ms)
        self.pins = {session: pin for session, pin in self.pins.items() if pin[1] > now_ms}
        answers = [self._select(now_ms, asking, selection) for selection in selections]
        return [*answers, ["pool", self.epoch, self.position, lost]]

    def _select(self, now_ms: int, worker: WorkerState, selection: Selection) -> Reply:
        name = worker.names.get(selection.number)
        if name is not None and not (isinstance(name, Abandoned) and name.until_ms <= now_ms):
            return ["abandoned"]
        rule = self.rules.get(selection.rule, RuleState())
        partition = self.partitions.get(selection.partition)
        tactic = tactic_of(partition.definition.tactic, partition.definition.params) if partition else None
        if rule.revision > selection.revision:
            return ["stale", rule.revision]
        if rule.revision < selection.revision or partition is None or tactic is None:
            return ["define", rule.revision]
        situation = Situation(pool=self, partition=partition, selection=selection, now_ms=now_ms)
        decision = self._retry(situation, rule) if selection.excluded else self._first(situation)
        if not isinstance(decision, Decision):
            return decision
        rule.spend(RETRY_COST if selection.excluded else -rule.retry_permille)
        rule.seq += 1
        self.position += 1
        line = situation.find(decision.service)
        assert line is not None, "what is picked is in the partition"
        worker.names[selection.number] = self._take(now_ms, line, selection, is_probe=decision.reason == "probe")
        return [
            *("pick", decision.service, decision.reason, rule.seq),
            *(self.epoch, self.position, decision.streak, int(decision.is_switch)),
        ]

    def _take(self, now_ms: int, line: ServiceDefinition, selection: Selection, *, is_probe: bool) -> Held:
        """Counts a pick, and says what it holds."""
        provider = self.provider(line.id)
        meters = BY_SERVICE if line.rpm or line.tpm else 0
        if provider and has_limits(provider):
            meters |= BY_PROVIDER
            meter = self.meter(line.id)
            meter.in_flight += 1
            meter.reserved += selection.reserved
        service = self.service(line.id)
        service.pick(now_ms, selection.reserved)
        self._count_minute(now_ms, line.id, meters, 1, 0)
        probe = self.position if is_probe else 0
        if probe:
            service.breaker.probe = probe
        return Held(line.id, selection.reserved, now_ms + selection.deadline_ms, meters, probe)

    def _retry(self, situation: Situation, rule: RuleState) -> Decision | Reply:
        """Another attempt, while the rule's budget allows; it changes nothing of the partition."""
        if rule.left < RETRY_COST:
            return ["none", "budget", 0]
        if situation.selection.only:
            return ["none", "tried", 0]
        candidates = situation.candidates()
        if not candidates:
            return situation.nothing()
        tier, _ = situation.tier_of(candidates)
        chosen = situation.choose(_of_tier(situation.partition, candidates, tier))
        return Decision(service=chosen.service, reason="retry", streak=situation.partition.streak)

    def _first(self, situation: Situation) -> Decision | Reply:
        """A first attempt: where it is pinned to, or a probe, or what the tactic chooses."""
        part, selection = situation.partition, situation.selection
        if selection.only:
            line = situation.find(selection.only)
            if line and not situation.status(line):
                return Decision(service=line.id, reason="pinned", streak=part.streak)
            return self._exhausted(situation)
        pinned = self._pinned(situation)
        if pinned and not situation.status(pinned):
            self._pin(situation, pinned.id)
            is_switch = part.cursor not in ("", pinned.id)
            return Decision(service=pinned.id, reason="pinned", streak=part.streak, is_switch=is_switch)
        probe = situation.probe()
        if probe:
            return Decision(service=probe.id, reason="probe", streak=part.streak)
        candidates = situation.candidates()
        if not candidates:
            return self._exhausted(situation)
        part.tier, part.hold = situation.tier_of(candidates)
        chosen = situation.choose(_of_tier(part, candidates, part.tier))
        is_switch = part.cursor not in ("", chosen.service)
        part.cursor, part.streak = chosen.service, chosen.streak
        if chosen.memory is not None:
            part.memory = chosen.memory
        if not pinned:
            self._pin(situation, chosen.service)
        return Decision(service=chosen.service, reason=chosen.reason, streak=chosen.streak, is_switch=is_switch)

    def _pinned(self, situation: Situation) -> ServiceDefinition | None:
        """The service that the session is pinned to; a pin on one that can serve none of it for long is dropped."""
        session = situation.selection.session
        pinned, _ = self.pins.get(session, ("", 0))
        if not situation.selection.affinity_ms or not pinned:
            return None
        line = situation.find(pinned)
        if line and situation.status(line) in ("", "limited", "cooling", "excluded"):
            return line
        del self.pins[session]
        return None

    def _pin(self, situation: Situation, service: str) -> None:
        selection = situation.selection
        if selection.affinity_ms > 0:
            self.pins[selection.session] = service, situation.now_ms + selection.affinity_ms

    def _exhausted(self, situation: Situation) -> Decision | Reply:
        """Without a candidate: whom limits let through, cooling or broken, or why nobody."""
        part = situation.partition
        nothing = situation.nothing()
        if nothing:
            return nothing
        within = [line for line in situation.open() if situation.wait_ms(line) is None]
        if part.definition.refuses:
            return situation.refusal(within)
        chosen = situation.choose(_of_tier(part, within, min(line.tier for line in within)))
        return Decision(service=chosen.service, reason="exhausted", streak=part.streak)

    # -- settle --------------------------------------------------------------------------------------------------------

    def settle(
        self,
        now_ms: int,
        worker: str,
        batch: int,
        entries: Sequence[Entry],
        lease_ms: int,
        seen: tuple[int, int] = (0, 0),
        *,
        skip: bool = False,
    ) -> Reply:
        """Applies a batch once, in order."""
        state = self._worker(worker)
        if batch > state.last + 1 and not skip:
            return ["gap", state.last]
        lost = self._open(seen)
        self._renew(now_ms, state, lease_ms, is_applied=batch > state.last)
        if batch > state.last:
            for entry in entries:
                self._settle(now_ms, state, entry)
            state.last = batch
        return ["applied", state.last, self.epoch, self.position, lost]

    def apply_settle(self, now_ms: int, worker: str, entry: Entry) -> None:
        """Applies one entry, whatever batch it came in."""
        self._settle(now_ms, self._worker(worker), entry)

    def _settle(self, now_ms: int, worker: WorkerState, entry: Entry) -> None:
        name = worker.names.get(entry.number)
        held = name if isinstance(name, Held) else None
        lost = name if isinstance(name, Lost) else None
        id_ = held.service if held else lost.service if lost else entry.service
        self.position += 1
        if held:
            self._release(held)
        elif lost:
            self.service(id_).find_again(lost.reserved, lost.reaped_ms, lost.position)
        if held or lost:
            del worker.names[entry.number]
        if entry.outcome is not Outcome.ABANDONED:
            self._count(now_ms, id_, entry, held, is_late=lost is not None)
        elif id_:
            service = self.service(id_)
            service.abandoned += 1
            service.breaker.forget_probe(held.probe if held else 0)
        else:
            worker.names[entry.number] = Abandoned(now_ms + ABANDONED_MS)

    def _count(self, now_ms: int, id_: str, entry: Entry, held: Held | None, *, is_late: bool) -> None:
        """Counts an attempt that has ended; one that was lost before has no say in minute and breaker any more."""
        assert id_, "only an abandoned name has no service"
        service = self.service(id_)
        service.count(now_ms, entry)
        if held and entry.age_ms < MINUTE_MS:
            self._count_minute(now_ms, id_, held.meters, 0, minute_tokens(entry, held.reserved))
        service.cool_down(now_ms, entry)
        service.measure(now_ms, entry)
        if not is_late:
            service.breaker.settle(self.provider(id_), entry, now_ms, self.position, held.probe if held else 0)

    # -- reap ----------------------------------------------------------------------------------------------------------

    def reap(
        self,
        now_ms: int,
        worker: str,
        target: str,
        lease_ms: int,
        limit: int = 1000,
        seen: tuple[int, int] = (0, 0),
    ) -> Reply:
        """Counts as lost what `target` can no longer settle in time, and renews the asking worker's lease."""
        lost_positions = self._open(seen)
        self._worker(worker).lease_end_ms = now_ms + lease_ms
        state = self._worker(target)
        is_ended = state.lease_end_ms <= now_ms
        lost = 0
        for number, name in sorted(state.names.items()):
            if isinstance(name, Abandoned) and name.until_ms <= now_ms:
                del state.names[number]
            elif isinstance(name, Held) and (is_ended or name.deadline_ms <= now_ms) and lost < limit:
                self.lose(now_ms, target, number)
                lost += 1
        if is_ended and lost < limit and state.lease_end_ms > 0:
            state.lease_end_ms = -now_ms
        return ["reaped", int(is_ended), lost, self.epoch, self.position, lost_positions]

    def lose(self, now_ms: int, worker: str, number: int) -> None:
        """Counts one attempt in flight as lost: one request, and its reserved tokens."""
        names = self._worker(worker).names
        held = names[number]
        assert isinstance(held, Held), "only an attempt in flight can be lost"
        self._release(held)
        service = self.service(held.service)
        service.lose(now_ms, held.reserved)
        self._count_minute(now_ms, held.service, held.meters, 0, held.reserved)
        service.breaker.forget_probe(held.probe)
        self.position += 1
        names[number] = Lost(held.service, held.reserved, now_ms, self.position)

    # -- clear and health ----------------------------------------------------------------------------------------------

    def clear(self, now_ms: int, services: Sequence[str], seen: tuple[int, int] = (0, 0)) -> Reply:
        """Sets the counters of services to zero."""
        lost = self._open(seen)
        for name in services:
            self.position += 1
            self.service(name).clear(self.position)
        return ["cleared", len(services), self.epoch, self.position, lost]

    def health(self, now_ms: int, services: Sequence[str], is_alive: bool, seen: tuple[int, int] = (0, 0)) -> Reply:
        """Tells the breakers of services what a health check of their provider found."""
        lost = self._open(seen)
        for name in services:
            self.position += 1
            breaker = self.service(name).breaker
            breaker.check(self.provider(name), now_ms, self.position, is_alive=is_alive)
        return ["noted", len(services), self.epoch, self.position, lost]


def provider_of(service: str) -> str:
    """The uuid of a service's provider."""
    return service.partition(":")[0]


def minute_tokens(entry: Entry, reserved: int) -> int:
    """What a minute counts of an attempt: the usage, or what one that was served without a word of it had reserved."""
    tokens = entry.usage.input + entry.usage.output
    return reserved if not tokens and entry.outcome in (Outcome.SUCCESS, Outcome.CANCELLED) else tokens


def _shape(definition: PartitionDefinition) -> object:
    """What a partition's tier and its tactic's memory are about."""
    return definition.tactic, [(service.id, service.weight, service.tier) for service in definition.services]


def _of_tier(partition: PartitionState, lines: Sequence[ServiceDefinition], tier: int) -> list[ServiceDefinition]:
    """Those of a tier; all of them where the partition has but one."""
    return [line for line in lines if partition.top < 0 or line.tier == tier]
