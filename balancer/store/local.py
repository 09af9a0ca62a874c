"""Life without Redis: a worker goes on alone, from the last that it has seen of a pool.

While Redis answers, little is kept: the pool's two hashes as read now and then (a *picture*), and of this worker's own
picks what no picture has yet. Only a loss makes a state out of it: the Python twin of the scripts, with cursors and
streaks, windows, breakers, cooldowns and sessions as last seen. Its limits are the fleet's, divided by the workers that
were alive. It is dropped when Redis picks again: what was used meanwhile is settled there, and Redis' cursor stands.

What cannot be had is what makes a hundred workers one: each has a streak of its own, sends a probe of its own, and
counts in its windows what it uses itself.
"""

from __future__ import annotations

import asyncio
import random
import secrets
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from typing import TypeVar

import msgspec

from balancer import log, stored
from balancer.breaker import Breaker
from balancer.domain import Entry, Pick, ProviderDefinition, Rule, RuleDefinition, Selection, ServiceDefinition
from balancer.errors import StoreUnavailableError
from balancer.ledger import Window
from balancer.limits import Bucket, Minute
from balancer.reference import BY_PROVIDER, BY_SERVICE, MOST_BUDGET, Held, Pool, Reply, WorkerState, provider_of
from balancer.store.registry import Directory

PICTURE_S = 10.0
_A_WORKER_S = 0.5
"""With many workers pictures are rarer, so that all of them together cost Redis no more than two a second."""
_MOST_PINS = 10_000
_LOOKS = 15
_QUIET_S = 10.0
"""Between two lines that say the same."""
ASIDE = frozenset({"pinned", "probe", "exhausted", "retry"})
"""Reasons of picks that leave the cursor alone."""

_Limited = TypeVar("_Limited", ServiceDefinition, ProviderDefinition)


class Picture(msgspec.Struct, frozen=True, kw_only=True):
    """A pool's two hashes as they were at `now_ms` of the server's clock, which was `taken_at` of our monotonic one."""

    partitions: Mapping[bytes, bytes]
    services: Mapping[bytes, bytes]
    now_ms: int
    taken_at: float

    @property
    def place(self) -> tuple[int, int]:
        """Epoch and position."""
        return stored.place({"place": self.services.get(b"place", stored.NEW_PLACE.encode()).decode()})

    def budget(self, rule: str) -> int:
        """What the rule has left to try again with, below zero for all of it."""
        return stored.rule(self.partitions.get(f"rule:{rule}".encode(), stored.NEW_RULE.encode()).decode())["budget"]

    def partition(self, id_: str) -> stored.Partition:
        """The partition's state, a new one when it is not there."""
        text = self.partitions.get(f"partition:{id_}".encode(), stored.NEW_PARTITION.encode())
        return stored.partition(text.decode())

    def service(self, id_: str) -> stored.Measured:
        """The service's state, a new one when it is not there."""
        return stored.service(self.services.get(f"service:{id_}".encode(), stored.NEW_SERVICE.encode()).decode())

    def meter(self, provider: str) -> stored.Measured:
        """The provider's meter, a new one when it is not there."""
        return stored.meter(self.services.get(f"meter:{provider}".encode(), stored.NEW_METER.encode()).decode())


class _Recent(msgspec.Struct):
    """What this worker has used of a service since the last picture, and until when that asks to be left alone."""

    picks: int = 0
    tokens: int = 0
    output: int = 0
    cooldown: int = 0


class LocalPool:
    """What one worker knows of one pool, and its picks while Redis is away."""

    def __init__(
        self,
        pool: str,
        worker: str,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._pool = pool
        self._worker = worker
        self._clock = clock
        self._wall = wall
        self._picture = Picture(partitions={}, services={}, now_ms=0, taken_at=0)
        self._seen: dict[str, Pick] = {}
        """The last pick of each partition that has moved its cursor."""
        self._recent: dict[str, _Recent] = {}
        self._open: dict[int, tuple[str, int]] = {}
        self._pins: dict[str, tuple[str, int]] = {}
        self._counts: deque[int] = deque(maxlen=_LOOKS)
        self._wanted = asyncio.Event()
        self._twin: Pool | None = None
        self._share = 1
        self._loaded: set[str] = set()
        self._picks = 0
        self._alone_since = 0.0
        self._said_at: dict[str, float] = {}

    # -- while Redis answers -------------------------------------------------------------------------------------------

    @property
    def is_alone(self) -> bool:
        """True from the first pick without Redis until Redis picks again."""
        return self._twin is not None

    @property
    def has_picture(self) -> bool:
        """True once the pool was looked at."""
        return self._picture.now_ms > 0

    @property
    def picture(self) -> Picture:
        """The pool as it was last looked at, some seconds ago."""
        return self._picture

    @property
    def workers(self) -> int:
        """How many workers were alive: the most of the last looks, for after an outage all leases have ended."""
        return max(self._counts, default=1)

    @property
    def in_flight(self) -> int:
        """How many of this worker's own attempts are not settled."""
        return len(self._open)

    def saw_workers(self, count: int) -> None:
        """Notes how many workers have a lease."""
        self._counts.append(max(1, count))

    def picked(self, pick: Pick, selection: Selection) -> None:
        """Notes a pick that Redis has made; what was made of an outage is over."""
        if self._twin is not None:
            self._end()
        service = pick.service
        recent = self._recent.get(service)
        if recent is None:
            recent = self._recent[service] = _Recent()
        recent.picks += 1
        self._open[selection.number] = service, selection.reserved
        if pick.reason not in ASIDE:
            seen = self._seen.get(pick.partition)
            if seen is None or (seen.epoch, seen.position) < (pick.epoch, pick.position):
                self._seen[pick.partition] = pick
        if selection.affinity_ms and pick.reason not in ("probe", "exhausted", "retry"):
            self._pin(selection.session, (pick.service, self.now_ms() + selection.affinity_ms))

    def settled(self, entry: Entry) -> None:
        """Notes the end of an attempt, whoever picked it."""
        self._open.pop(entry.number, None)
        usage = entry.usage
        recent = self._recent.get(entry.service)
        if recent is None:
            recent = self._recent[entry.service] = _Recent()
        recent.tokens += usage.input + usage.output
        recent.output += usage.output
        if entry.cooldown_ms:
            recent.cooldown = max(recent.cooldown, self.now_ms() + entry.cooldown_ms)
        if self._twin is not None:
            self._twin.apply_settle(self.now_ms(), self._worker, entry)

    def pictured(self, picture: Picture) -> None:
        """Takes over how the pool was a moment ago: from here on only what is newer is kept beside it."""
        self._picture = picture
        self._recent.clear()
        place = picture.place
        self._seen = {id_: seen for id_, seen in self._seen.items() if (seen.epoch, seen.position) > place}

    async def watch(self, take: Callable[[], Awaitable[Picture]], up: asyncio.Event) -> None:
        """Takes pictures while Redis is up, about every ten seconds, and one soon after an outage; until cancelled."""
        while True:
            await up.wait()
            self._wanted.clear()
            try:
                picture = await take()
            except StoreUnavailableError as exc:
                log.debug("no picture of the pool", pool=self._pool, reason=exc.message)
            else:
                self.pictured(picture)
            pause_s = max(PICTURE_S, self.workers * _A_WORKER_S) * random.uniform(0.5, 1.5)
            try:
                async with asyncio.timeout(pause_s):
                    await self._wanted.wait()
            except TimeoutError:
                pass  # Nothing has happened: the time is over.

    def now_ms(self) -> int:
        """The server's time, as far as we know it."""
        if not self.has_picture:
            return round(self._wall() * 1000)
        return self._picture.now_ms + round((self._clock() - self._picture.taken_at) * 1000)

    def _note(self, service: str, selection: Selection) -> None:
        """Notes an attempt in flight."""
        self._recent.setdefault(service, _Recent()).picks += 1
        self._open[selection.number] = service, selection.reserved

    def _pin(self, session: str, pin: tuple[str, int]) -> None:
        """Remembers where a session is, and forgets the one that was asked for longest ago."""
        self._pins.pop(session, None)
        self._pins[session] = pin
        if len(self._pins) > _MOST_PINS:
            del self._pins[next(iter(self._pins))]

    # -- alone ---------------------------------------------------------------------------------------------------------

    def select(self, directory: Directory, rule: Rule, selection: Selection, loss: StoreUnavailableError) -> Reply:
        """What the script would answer to a selection if it knew no more than this worker; `loss` is why it is asked.

        Its number must be new: it is never told to Redis before its settle.
        """
        twin = self._twin or self._begin(loss)
        now_ms = self.now_ms()
        self._define(twin, directory, rule, selection.revision, now_ms)
        pin = self._pins.get(selection.session)
        twin.pins = {selection.session: pin} if pin else {}
        answer, _ = twin.select(now_ms, self._worker, [selection], 0)
        if selection.affinity_ms:
            if pin := twin.pins.get(selection.session):
                self._pin(selection.session, pin)
            else:
                self._pins.pop(selection.session, None)
        if answer[0] == "pick":
            self._picks += 1
            self._note(str(answer[1]), selection)
        return answer

    def _begin(self, loss: StoreUnavailableError) -> Pool:
        """A state with nothing in it but this worker's own attempts in flight; the rest comes as it is needed."""
        twin = self._twin = Pool()
        self._share = self.workers
        self._loaded.clear()
        self._picks, self._alone_since = 0, self._clock()
        # Where breakers look for what spreads their probes; the workers shall not all have the same.
        twin.position = secrets.randbelow(1_000_000)
        names = {number: Held(*held, 0, BY_SERVICE | BY_PROVIDER) for number, held in self._open.items()}
        twin.workers[self._worker] = WorkerState(names=dict(names))
        for held in names.values():
            for measured in (twin.service(held.service), twin.meter(held.service)):
                measured.in_flight += 1
                measured.reserved += held.reserved
        if self._may_say("begin"):
            log.warning("picking without Redis", pool=self._pool, reason=loss.message, workers=self._share)
        return twin

    def _end(self) -> None:
        """Forgets what was made of an outage."""
        self._twin = None
        self._wanted.set()
        if self._may_say("end"):
            seconds = round(self._clock() - self._alone_since, 1)
            log.warning("Redis picks again", pool=self._pool, local_picks=self._picks, seconds=seconds)

    def _may_say(self, what: str) -> bool:
        now = self._clock()
        if now - self._said_at.get(what, float("-inf")) < _QUIET_S:
            return False
        self._said_at[what] = now
        return True

    def _define(self, twin: Pool, directory: Directory, rule: Rule, revision: int, now_ms: int) -> None:
        """Raises a rule's fence where it is behind; the first time it goes on from what was seen."""
        known = twin.rules.get(rule.uuid)
        if known and known.revision >= revision:
            return
        whole = directory.by_uuid.get(rule.uuid, rule)  # With all its partitions.
        definition = divided(directory.definition(whole), self._share)
        for windows in definition.windows:
            self._load_service(twin, windows.id, now_ms)
        for provider in definition.providers:
            self._load_meter(twin, provider.id, now_ms)
        twin.fence(now_ms, [definition])
        if known:
            return
        budget = self._picture.budget(rule.uuid)
        if definition.retry_permille:
            twin.rules[rule.uuid].budget = (MOST_BUDGET if budget < 0 else budget) // self._share
        for partition in definition.partitions:
            self._resume(twin, partition.id)

    def _resume(self, twin: Pool, id_: str) -> None:
        """Sets a partition's cursor, streak, tier and memory to what was seen last."""
        part, known = twin.partitions[id_], self._picture.partition(id_)
        seen = self._seen.get(id_)
        cursor, streak = (seen.service, seen.streak) if seen else (known.cursor, known.streak)
        if cursor in (service.id for service in part.definition.services):
            part.cursor, part.streak = cursor, streak
        part.tier, part.hold, part.memory = known.tier, known.hold, known.memory

    def _load_service(self, twin: Pool, id_: str, now_ms: int) -> None:
        """Takes a service's windows, breaker, cooldown and latencies from the picture, and adds our own use since."""
        if id_ in self._loaded:
            return
        self._loaded.add(id_)
        state, known = twin.service(id_), self._picture.service(id_)
        recent = self._recent.get(id_, _Recent())
        state.windows = [Window(*row) for row in known.windows]
        for window in state.windows:
            _add(window, recent, now_ms)
        state.breaker = _without_probe(Breaker(*known.breaker))
        state.cooldown = max(known.counters["cooldown"], recent.cooldown)
        for name in ("first_token", "per_token", "measured"):
            setattr(state, name, known.counters[name])
        state.minute = self._own_minute(known, [recent], now_ms)

    def _load_meter(self, twin: Pool, provider: str, now_ms: int) -> None:
        """Takes a provider's minute from the picture, and adds our own use since."""
        if provider not in self._loaded:
            self._loaded.add(provider)
            own = [recent for id_, recent in self._recent.items() if provider_of(id_) == provider]
            twin.meter(f"{provider}:").minute = self._own_minute(self._picture.meter(provider), own, now_ms)

    def _own_minute(self, known: stored.Measured, own: list[_Recent], now_ms: int) -> Minute:
        """This worker's part of what the fleet had used in the last minute, and all that it has used itself since."""
        share = self._share
        minute = Minute(
            [Bucket(step, -(-requests // share), -(-tokens // share)) for step, requests, tokens in known.minute]
        )
        minute.count(now_ms, sum(recent.picks for recent in own), sum(recent.tokens for recent in own))
        return minute


def divided(definition: RuleDefinition, share: int) -> RuleDefinition:
    """The definition with one worker's part of all limits, rounded down: of what is less than that, nothing at all."""
    return msgspec.structs.replace(
        definition,
        partitions=tuple(
            msgspec.structs.replace(part, services=tuple(_divided(service, share) for service in part.services))
            for part in definition.partitions
        ),
        providers=tuple(_divided(provider, share) for provider in definition.providers),
    )


def _divided(limited: _Limited, share: int) -> _Limited:
    parts = {
        name: limit // share or -1 if limit > 0 else limit
        for name, limit in (("rpm", limited.rpm), ("tpm", limited.tpm), ("in_flight", limited.in_flight))
    }
    return msgspec.structs.replace(limited, **parts)


def _without_probe(breaker: Breaker) -> Breaker:
    """The breaker without a probe: how that of another worker ends, is never told here."""
    breaker.probe = 0
    return breaker


def _add(window: Window, recent: _Recent, now_ms: int) -> None:
    if recent.picks or recent.tokens:
        window.roll(now_ms)
        window.requests += recent.picks
        window.tokens += recent.tokens
        window.output += recent.output
