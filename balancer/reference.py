"""A pool's whole state machine in pure Python, told by events: what the scripts are compared with.

Each method does what the script of the same name does and answers with the same reply; `now_ms` is always given.
Written from the contract, not from the Lua. It is no store: one process, no expiry, no limit on its memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from balancer.domain import (
    Candidate,
    Entry,
    Hybrid,
    Outcome,
    PartitionDefinition,
    Random,
    RoundRobin,
    RuleDefinition,
    Selection,
    Tactic,
    TokenBased,
    WindowsDefinition,
)
from balancer.tactics import choose

Reply = list[int | str]

ABANDONED_MS = 60_000
FAILURES = (Outcome.RATE_LIMITED, Outcome.UNAUTHORIZED, Outcome.OVERLOADED, Outcome.FAILED)


class Window(msgspec.Struct):
    """Requests and tokens (of them `output`) counted since `start` (ms), for `length` seconds."""

    length: int
    start: int = 0
    requests: int = 0
    tokens: int = 0
    output: int = 0

    def has_ended(self, now_ms: int) -> bool:
        """True when its length has passed since its start."""
        return now_ms - self.start >= self.length * 1000

    def roll(self, now_ms: int) -> None:
        """A new window where this one has ended; a start in the future becomes now."""
        if self.has_ended(now_ms):
            self.start, self.requests, self.tokens, self.output = now_ms, 0, 0, 0
        elif self.start > now_ms:
            self.start = now_ms


class ServiceState(msgspec.Struct):
    """What a pool knows of one service."""

    windows: list[Window] = msgspec.field(default_factory=list)
    in_flight: int = 0
    reserved: int = 0
    picks: int = 0
    requests: int = 0
    failures: int = 0
    input: int = 0
    output: int = 0
    cached: int = 0
    cache_creation: int = 0
    reasoning: int = 0
    lost: int = 0
    lost_tokens: int = 0
    abandoned: int = 0
    last_used: int = 0
    cleared: int = 0
    windows_revision: int = 0

    def text(self, names: Sequence[str]) -> str:
        """The named counters and the windows as an event tells them."""
        values = " ".join(str(getattr(self, name)) for name in names)
        return values + "|" + ";".join(f"{w.length} {w.start} {w.requests} {w.tokens} {w.output}" for w in self.windows)

    def counts(self, length: int, now_ms: int) -> tuple[int, int]:
        """Requests and tokens of the window of that length, reserved tokens included."""
        for window in self.windows:
            if window.length == length and not window.has_ended(now_ms):
                return window.requests, window.tokens + self.reserved
        return 0, self.reserved

    def pick(self, now_ms: int, reserved: int) -> None:
        """Counts a pick, which holds a place in flight and its reserved tokens."""
        for window in self.windows:
            window.roll(now_ms)
            window.requests += 1
        self.in_flight += 1
        self.reserved += reserved
        self.picks += 1

    def release(self, reserved: int) -> None:
        """Gives back what a pick held."""
        self.in_flight -= 1
        self.reserved -= reserved

    def count(self, now_ms: int, entry: Entry) -> None:
        """Counts a settled attempt and what it used."""
        usage = entry.usage
        self.requests += 1
        self.failures += entry.outcome in FAILURES
        self.input += usage.input
        self.output += usage.output
        self.cached += usage.cached
        self.cache_creation += usage.cache_creation
        self.reasoning += usage.reasoning
        self.last_used = max(self.last_used, now_ms - entry.age_ms)
        self.add_tokens(usage.input, usage.output, now_ms, entry.age_ms)

    def lose(self, now_ms: int, reserved: int) -> None:
        """Counts an attempt whose worker died: one request, and its reserved tokens."""
        self.release(reserved)
        self.requests += 1
        self.lost += 1
        self.lost_tokens += reserved
        self.add_tokens(reserved, 0, now_ms, 0)

    def find_again(self, reserved: int, reaped_ms: int, position: int) -> None:
        """Takes `lose` back: the worker was only late. What was cleared in between is not there to be taken back."""
        if position <= self.cleared:
            return
        self.requests -= 1
        self.lost -= 1
        self.lost_tokens -= reserved
        for window in self.windows:
            if reaped_ms >= window.start:
                window.tokens = max(0, window.tokens - reserved)

    def clear(self, position: int) -> None:
        """Sets all counters to zero but what is in flight and reserved."""
        for name in CLEAR_COUNTERS[2:]:
            setattr(self, name, 0)
        for window in self.windows:
            window.start = window.requests = window.tokens = window.output = 0
        self.cleared = position

    def add_tokens(self, input_: int, output: int, now_ms: int, age_ms: int) -> None:
        """Counts tokens in the windows that were open `age_ms` ago and still are; fresh ones open a window."""
        for window in self.windows:
            if age_ms == 0:
                window.roll(now_ms)
            if not window.has_ended(now_ms) and now_ms - age_ms >= window.start:
                window.tokens += input_ + output
                window.output += output


PICK_COUNTERS = ("in_flight", "reserved", "picks")
LEDGER_COUNTERS = (
    "in_flight",
    "reserved",
    "requests",
    "failures",
    "input",
    "output",
    "cached",
    "cache_creation",
    "reasoning",
    "lost",
    "lost_tokens",
    "abandoned",
    "last_used",
    "cleared",
)
CLEAR_COUNTERS = ("in_flight", "reserved", "picks", *LEDGER_COUNTERS[2:])
"""What the events of pick; settle and reap; clear tell of a service, in this order."""


class PartitionState(msgspec.Struct):
    """A partition's definition, cursor and streak."""

    definition: PartitionDefinition
    cursor: str = ""
    streak: int = 0


class RuleState(msgspec.Struct):
    """A rule's fence, its count of picks, and its partitions' ids."""

    revision: int = 0
    seq: int = 0
    partitions: tuple[str, ...] = ()


class Held(msgspec.Struct, frozen=True):
    """What an attempt in flight holds."""

    service: str
    reserved: int
    deadline_ms: int


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
    last: int = 0
    names: dict[int, Held | Lost | Abandoned] = msgspec.field(default_factory=dict)


def tactic_of(definition: PartitionDefinition) -> Tactic | None:
    """The tactic that a partition's definition names, None for one that is not known."""
    match definition.tactic:
        case "round_robin":
            return RoundRobin(request_threshold=definition.request_threshold)
        case "token_based":
            return TokenBased(token_threshold=definition.token_threshold)
        case "hybrid":
            return Hybrid(request_threshold=definition.request_threshold, token_threshold=definition.token_threshold)
        case "random":
            return Random()
        case _:
            return None


def _tactic_values(definition: PartitionDefinition) -> tuple[str, int, int]:
    return definition.tactic, definition.request_threshold, definition.token_threshold


class Pool:
    """The state of one pool."""

    def __init__(self) -> None:
        self.epoch = 1
        self.position = 0
        self.rules: dict[str, RuleState] = {}
        self.partitions: dict[str, PartitionState] = {}
        self.services: dict[str, ServiceState] = {}
        self.workers: dict[str, WorkerState] = {}

    def _open(self, seen: tuple[int, int]) -> int:
        """Starts a new epoch when the caller has seen more than is known here; how many positions were lost."""
        epoch, position = seen
        if (epoch, position) <= (self.epoch, self.position):
            return 0
        lost = max(0, position - self.position)
        self.epoch = epoch + 1
        self.position = max(position, self.position) + 1
        return lost

    def _service(self, service: str) -> ServiceState:
        return self.services.setdefault(service, ServiceState())

    def _worker(self, worker: str) -> WorkerState:
        return self.workers.setdefault(worker, WorkerState())

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
            rule.revision, rule.partitions = definition.revision, ids
            self.position += 1
            raised += 1
        return ["raised", raised, self.epoch, self.position, lost]

    def _define(self, new: PartitionDefinition) -> None:
        old = self.partitions.get(new.id)
        cursor, streak = (old.cursor, old.streak) if old else ("", 0)
        if old and _tactic_values(old.definition) != _tactic_values(new):
            streak = 0
        if new.cursor and (new.is_edit or old is None):
            cursor, streak = new.cursor, 0
        if cursor not in (service.id for service in new.services):
            cursor, streak = "", 0
        definition = msgspec.structs.replace(new, cursor="", is_edit=1)
        self.partitions[new.id] = PartitionState(definition=definition, cursor=cursor, streak=streak)

    def _set_windows(self, windows: WindowsDefinition, revision: int) -> None:
        service = self._service(windows.id)
        known = {window.length: window for window in service.windows}
        lengths = windows.lengths
        if revision < service.windows_revision:
            lengths = tuple(sorted({*lengths, *known}))
        service.windows = [known.get(length) or Window(length=length) for length in lengths]
        service.windows_revision = max(revision, service.windows_revision)

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
        asking.lease_end_ms = now_ms + lease_ms
        answers = [self._select(now_ms, asking, selection) for selection in selections]
        return [*answers, ["pool", self.epoch, self.position, lost]]

    def _select(self, now_ms: int, worker: WorkerState, selection: Selection) -> Reply:
        name = worker.names.get(selection.number)
        if name is not None and not (isinstance(name, Abandoned) and name.until_ms <= now_ms):
            return ["abandoned"]
        rule = self.rules.get(selection.rule, RuleState())
        partition = self.partitions.get(selection.partition)
        tactic = tactic_of(partition.definition) if partition else None
        if rule.revision > selection.revision:
            return ["stale", rule.revision]
        if rule.revision < selection.revision or partition is None or tactic is None:
            return ["define", rule.revision]
        candidates = [
            self._candidate(service.id, service.window, service.weight, now_ms)
            for service in partition.definition.services
            if service.active and service.id not in selection.excluded
        ]
        choice = choose(
            tactic,
            cursor=partition.cursor,
            streak=partition.streak,
            order=[service.id for service in partition.definition.services],
            candidates=candidates,
            draw=selection.draw,
        )
        if choice is None:
            return ["none"]
        reason, streak, is_switch = choice.reason, choice.streak, 0
        if selection.excluded:
            reason, streak = "retry", partition.streak
        else:
            is_switch = int(partition.cursor not in ("", choice.service))
            partition.cursor, partition.streak = choice.service, choice.streak
        self._service(choice.service).pick(now_ms, selection.reserved)
        rule.seq += 1
        worker.names[selection.number] = Held(choice.service, selection.reserved, now_ms + selection.deadline_ms)
        self.position += 1
        return ["pick", choice.service, reason, rule.seq, self.epoch, self.position, streak, is_switch]

    def _candidate(self, service: str, length: int, weight: int, now_ms: int) -> Candidate:
        requests, tokens = self._service(service).counts(length, now_ms)
        return Candidate(service=service, weight=weight, requests=requests, tokens=tokens)

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
        state.lease_end_ms = now_ms + lease_ms
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
        service = self._service(entry.service) if entry.service and not isinstance(name, Held | Lost) else None
        self.position += 1
        if isinstance(name, Held):
            service = self._service(name.service)
            service.release(name.reserved)
            del worker.names[entry.number]
        elif isinstance(name, Lost):
            service = self._service(name.service)
            service.find_again(name.reserved, name.reaped_ms, name.position)
            del worker.names[entry.number]
        if entry.outcome is not Outcome.ABANDONED:
            assert service is not None, "only an abandoned name has no service"
            service.count(now_ms, entry)
        elif service:
            service.abandoned += 1
        else:
            worker.names[entry.number] = Abandoned(now_ms + ABANDONED_MS)

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
        self._service(held.service).lose(now_ms, held.reserved)
        self.position += 1
        names[number] = Lost(held.service, held.reserved, now_ms, self.position)

    # -- clear ---------------------------------------------------------------------------------------------------------

    def clear(self, now_ms: int, services: Sequence[str], seen: tuple[int, int] = (0, 0)) -> Reply:
        """Sets the counters of services to zero."""
        lost = self._open(seen)
        for name in services:
            self.position += 1
            self._service(name).clear(self.position)
        return ["cleared", len(services), self.epoch, self.position, lost]
