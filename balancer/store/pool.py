"""One pool as a worker reaches it: selections and settles of a loop tick in one write, leases, reaping, fences."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
import types
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from redis.exceptions import ResponseError

from balancer import log
from balancer.domain import Entry, Outcome, PoolSettings, RuleDefinition, Selection
from balancer.errors import StoreUnavailableError
from balancer.store import keys, views
from balancer.store.auditor import Auditor
from balancer.store.calls import call_argument, fence_arguments, older, pin_keys
from balancer.store.connection import AGAIN_S, Link, is_noscript
from balancer.store.local import LocalPool, Picture
from balancer.store.refusals import RefusedError, Then
from balancer.store.scripts import Prepared, load
from balancer.store.settlement import DEFAULT_MAX_ENTRIES, Batch, Outbox
from balancer.store.spiller import Replayer, Spiller
from balancer.store.topology import Topology

SELECTIONS_PER_CALL = 64
CALLS_AT_ONCE = 3
"""With so many calls with selections unanswered others wait for an answer: calls get larger when Redis is busy."""
_SCRIPTS = ("tick", "reap", "fence", "clear", "health")
_REAP_LIMIT = 500
_RETRY_S = 0.5
_WARN_S = 60.0
_ASKING_S = 1.0
"""So long a fence or a reap that Redis does not execute is asked again."""
_SERVICES_PER_CALL = 200
_ABANDONED_MS = 3_600_000

Answer = list[Any]
OnAnswer = Callable[["Asked"], None]


class PoolEvents(msgspec.Struct, kw_only=True):
    """What a pool tells its owner: counts for metrics."""

    epoch_bumped: Callable[[str, int], None] = lambda pool, lost: None
    lease_expired: Callable[[str, int], None] = lambda pool, lost: None
    batches_lost: Callable[[str, int], None] = lambda pool, count: None
    violated: Callable[[str, int], None] = lambda pool, count: None


class Asked(msgspec.Struct, eq=False):
    """A selection under way: whom its end is told, when that is at the latest, and how it ended.

    `is_over` once there is an `answer` or a `failure`, or nobody wants either any more. Whether it was sent, and what
    it was refused with last.
    """

    selection: Selection
    on_answer: OnAnswer
    asked_at: float
    until: float
    is_over: bool = False
    answer: Answer | None = None
    failure: StoreUnavailableError | None = None
    is_sent: bool = False
    refusal: RefusedError | None = None

    def result(self) -> Answer:
        """The answer. Raises the failure."""
        if self.answer is None:
            assert self.failure is not None, "without an answer there is a reason"
            raise self.failure
        return self.answer

    def end(self, answer: Answer | None, failure: StoreUnavailableError | None) -> None:
        """Tells who has asked."""
        self.is_over = True
        self.answer, self.failure = answer, failure
        on_answer, self.on_answer = self.on_answer, _nobody  # Who has asked holds this: no cycle is left behind.
        on_answer(self)


def _nobody(asked: Asked) -> None:
    """Hears of an end that was told already."""


class PoolClient:
    """The scripts of one pool behind one link.

    Everything that is asked within a loop tick goes out in one call, settles before selections; selections without
    settles wait while CALLS_AT_ONCE such calls are unanswered. Raises StoreUnavailableError when Redis does not answer
    within the deadline, at once while it is known to be away. What Redis says it has not executed (the pool's slot
    moves, its master is a replica now, a script blocks it) is asked again under the same name while its caller waits;
    what it has left unanswered never is.
    """

    def __init__(
        self,
        topology: Topology,
        pool: str,
        worker: str,
        *,
        deadline_ms: int,
        lease_ms: int,
        scripts_dir: str,
        events: PoolEvents,
        audit_interval_s: float = 0,
        outbox_dir: Path | None = None,
        outbox_max_entries: int = DEFAULT_MAX_ENTRIES,
    ) -> None:
        self.pool = pool
        self.worker = worker
        self.outbox = Outbox(max_entries=outbox_max_entries)
        self.local = LocalPool(pool, worker)
        self.seen = (0, 0)
        self._deadline_s = deadline_ms / 1000
        self._lease_ms = lease_ms
        self._events = events
        self._audit_interval_s = audit_interval_s
        self._scripts = {name: load(name, scripts_dir) for name in _SCRIPTS}
        self._link = Link(topology, keys.partitions(pool), deadline_ms, self._on_up, self._on_down, name=pool)
        self._tick = Prepared(self._scripts["tick"], self._keys(worker), {"worker": worker})
        self._asked: list[Asked] = []
        """Not sent yet."""
        self._selecting = 0
        """Calls with selections that are not answered yet."""
        self._refused: list[Asked] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiting: deque[Asked] = deque()
        """All that were asked, in that order, until they are answered and the next look at the deadlines."""
        self._deadline: asyncio.TimerHandle | None = None
        self._flush_scheduled = False
        self._behind_flush: list[Callable[[], None]] = []
        self._retry: asyncio.TimerHandle | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._given_up: set[asyncio.Task[None]] = set()
        self._quiet = asyncio.Event()
        self._quiet.set()
        self._up = asyncio.Event()
        self.was_up = False
        """True once it has been connected."""
        self.is_missed = False
        """True once somebody has waited for its first connection in vain."""
        self._full_warned_at = float("-inf")
        self._outbox_dir = outbox_dir
        self._spiller: Spiller | None = None
        self._spilling: asyncio.Task[None] | None = None

    # -- life ----------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Connects and begins to keep the lease, in the background."""
        self._tasks = [
            asyncio.create_task(self._link.run()),
            asyncio.create_task(self._keep_lease()),
            asyncio.create_task(self.local.watch(self.picture, self._up)),
        ]
        if self._audit_interval_s:
            auditor = Auditor(self.command, self.pool, self.worker, self._audit_interval_s, self._events.violated)
            self._tasks.append(asyncio.create_task(auditor.run()))
        if self._outbox_dir:
            self._spiller = Spiller(
                self.outbox,
                self._outbox_dir,
                self.pool,
                self.worker,
                on_loaded=self._schedule_flush,
                on_lost=self._batches_lost,
            )
            self._spilling = asyncio.create_task(self._spiller.run())
            replayer = Replayer(self._outbox_dir, self.pool, self._settle_for, self._batches_lost)
            self._tasks.append(asyncio.create_task(replayer.run(self._up)))

    async def close(self, timeout_s: float = 5.0) -> bool:
        """Ends the background work once everything settled is acknowledged, or the time is over; True if all was.

        What was not is left on disk for the next process, if there is a folder for it.
        """
        await self.acknowledged(timeout_s)
        if self._retry:
            self._retry.cancel()
        for task in (*self._tasks, *self._given_up):
            task.cancel()
        await asyncio.gather(*self._tasks, *self._given_up, return_exceptions=True)
        is_spilled = False
        if self._spiller and self._spilling:
            is_spilled = await self._spiller.close(self._spilling)
        entries = len(self.outbox)
        if entries and is_spilled:
            log.warning("settled attempts wait on disk for the next process", pool=self.pool, entries=entries)
        elif entries:
            advice = "" if self._spiller else "BALANCER_OUTBOX_DIR would have kept them"
            log.warning("settled attempts were not acknowledged in time", pool=self.pool, entries=entries, note=advice)
        return not entries

    @property
    def is_up(self) -> bool:
        """True when Redis is connected and answers in time."""
        return self._link.is_up

    @property
    def away_s(self) -> float:
        """How long Redis has been away, 0 while it is up."""
        return self._link.away_s

    async def wait_until_up(self, timeout_s: float) -> None:
        """Returns once connected. Raises StoreUnavailableError after the time."""
        try:
            await asyncio.wait_for(self._up.wait(), timeout_s)
        except TimeoutError:
            self.is_missed = True
            raise StoreUnavailableError(f"Redis is away: {self._link.failure}") from None

    # -- selections and settles ----------------------------------------------------------------------------------------

    def ask(self, selection: Selection, on_answer: OnAnswer) -> Asked:
        """Asks for one selection, while Redis is up or the link moves; `on_answer` is called with its end.

        That comes within the deadline, and never before this returns.

        A selection that is given up (deadline, lost connection, `give_up`) is settled as abandoned: should Redis have
        made the pick all the same, what it holds is given back.
        """
        loop = self._loop
        if loop is None:
            loop = self._loop = asyncio.get_running_loop()
        asked = Asked(selection, on_answer, time.monotonic(), loop.time() + self._deadline_s)
        self._asked.append(asked)
        self._waiting.append(asked)
        if self._deadline is None:
            self._deadline = loop.call_at(asked.until, self._end_waiting)
        if not self._flush_scheduled:
            try:
                self._flush_soon()
            except BaseException:
                # Whoever is told of the fault asks in another way: it must not hear of this one too.
                self._drop(asked)
                raise
        return asked

    def _drop(self, asked: Asked) -> None:
        """Nobody hears of it any more; what it was given is given back with the next settles."""
        asked.is_over, asked.on_answer = True, _nobody
        self.outbox.add(Entry(number=asked.selection.number, service="", outcome=Outcome.ABANDONED))

    def give_up(self, asked: Asked) -> None:
        """Whoever has asked wants no pick any more, or not the one that was made."""
        asked.is_over = True
        asked.on_answer = _nobody
        if asked.failure is None:
            self._abandon(asked.selection)

    async def select(self, selection: Selection) -> Answer:
        """The script's answer to one selection, waited for at most the deadline; it is given up with its caller."""
        if not self._link.is_up and not self._link.is_moving:
            raise StoreUnavailableError(f"Redis is away: {self._link.failure}")
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def on_answer(asked: Asked) -> None:
            if not waiter.done():
                waiter.set_result(None)

        asked = self.ask(selection, on_answer)
        try:
            await waiter
        except asyncio.CancelledError:
            self.give_up(asked)
            raise
        return asked.result()

    def _end_waiting(self) -> None:
        """Fails what has waited for the deadline, and looks again when the next one is over.

        One timer for all: those of before are answered by then, so that hardly anything is looked at twice.
        """
        self._deadline = None
        waiting, loop = self._waiting, asyncio.get_running_loop()
        now = loop.time()
        while waiting and (waiting[0].is_over or waiting[0].until <= now):
            asked = waiting.popleft()
            if asked.is_over:
                continue
            if asked.is_sent:
                self._link.late()
                self._abandon(asked.selection)
                failure = "Redis did not answer in time"
            else:
                failure = f"Redis is away: {self._link.failure}"
            asked.end(None, asked.refusal or StoreUnavailableError(failure))
        if waiting:
            self._deadline = loop.call_at(waiting[0].until, self._end_waiting)

    def settle(self, entry: Entry) -> None:
        """Queues an entry; it is written with the other commands of this tick, at once where there will be none."""
        self.outbox.add(entry)
        if not self._flush_scheduled:
            self._flush_soon()
        if self._spiller is None and self.outbox.is_full and time.monotonic() - self._full_warned_at > _WARN_S:
            self._full_warned_at = time.monotonic()
            log.warning(
                "the outbox is beyond BALANCER_OUTBOX_MAX_ENTRIES; with BALANCER_OUTBOX_DIR the rest would be on disk",
                pool=self.pool,
                entries=len(self.outbox),
            )

    @property
    def is_flushed(self) -> bool:
        """True when all that was queued is written to the socket, or waits for a socket."""
        return not self._flush_scheduled

    def when_flushed(self, then: Callable[[], None]) -> None:
        """Calls it once all that was queued before is written to the socket: at once, or behind this tick's write."""
        if self._flush_scheduled:
            self._behind_flush.append(then)
        else:
            then()

    async def flushed(self) -> None:
        """Returns once all that was queued before is written to the socket: the next turn of the loop at the latest."""
        if self._flush_scheduled:
            await _next_turn()

    async def acknowledged(self, timeout_s: float) -> bool:
        """Waits until everything settled so far is applied, at most that long; True if it is."""
        try:
            async with asyncio.timeout(timeout_s):
                while len(self.outbox):
                    self._quiet.clear()
                    await self._quiet.wait()
        except TimeoutError:
            return False
        return True

    def _abandon(self, selection: Selection) -> None:
        self.settle(Entry(number=selection.number, service="", outcome=Outcome.ABANDONED))

    def _flush_soon(self) -> None:
        """Writes with the other commands of this tick; at once for a worker that has nothing else under way.

        That would only pay for another turn of its loop.
        """
        if not self.local.in_flight and self._link.is_idle:
            self._flush()
        else:
            self._schedule_flush()

    def _schedule_flush(self) -> None:
        if not self._flush_scheduled:
            self._flush_scheduled = True
            if self._loop is None:  # Looking it up is a system call, before Python 3.12.
                self._loop = asyncio.get_running_loop()
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_scheduled = False
        self._write_out()
        if self._behind_flush:
            behind, self._behind_flush = self._behind_flush, []
            for then in behind:
                then()

    def _write_out(self) -> None:
        link = self._link
        batches = self.outbox.take() if link.is_connected and self._retry is None else []
        asked: list[Asked] = []
        # While the link moves they wait for `_on_up` or `_on_down`.
        if self._asked and (batches or self._selecting < CALLS_AT_ONCE) and not link.is_moving:
            asked, self._asked = [one for one in self._asked if not one.is_over], []
        if batches:
            for batch in batches[:-1]:
                self._send(batch, ())
            self._send(batches[-1], asked[:SELECTIONS_PER_CALL])
            asked = asked[SELECTIONS_PER_CALL:]
        for start in range(0, len(asked), SELECTIONS_PER_CALL):
            self._send(None, asked[start : start + SELECTIONS_PER_CALL])
        link.flush()

    def _keys(self, worker: str) -> dict[str, str]:
        return {
            "services": keys.services(self.pool),
            "partitions": keys.partitions(self.pool),
            "holdings": keys.holdings(self.pool, worker),
            "leases": keys.leases(self.pool),
            "decisions": keys.decisions(self.pool),
        }

    def _arguments(self, **more: str | int) -> dict[str, str | int]:
        return {
            "now_ms": 0,
            "worker": self.worker,
            "epoch": self.seen[0],
            "position": self.seen[1],
            "lease_ms": self._lease_ms,
            **more,
        }

    def _send(self, batch: Batch | None, asked: Sequence[Asked]) -> None:
        """One call of the script: a batch, if any, and behind it selections."""
        pins: Sequence[str] = ()
        selections = [one.selection for one in asked]
        if asked:
            self._selecting += 1
            for one in asked:
                one.is_sent = True
            pins = pin_keys(self.pool, selections)
        call = self._call_argument(batch, selections, self._lease_ms)
        generation = batch.generation if batch else None
        self._link.post_call(
            self._tick.script, self._tick.command((call,), pins), functools.partial(self._on_reply, generation, asked)
        )

    def _on_reply(self, generation: int | None, asked: Sequence[Asked], reply: Any) -> None:
        """What has come of a call, with a batch of a generation if any."""
        if asked:
            self._selecting -= 1
        if isinstance(reply, Exception):
            self._on_refused(generation, asked, reply)
        else:
            word, last, epoch, position, lost = reply[0]
            self._saw(epoch, position, lost)
            for i, one in enumerate(asked, start=1):
                if not one.is_over:
                    one.end(_decoded(reply[i]), None)
            # Replies come in the order of asking: what is answered must not be kept until a deadline looks at it.
            waiting = self._waiting
            while waiting and waiting[0].is_over:
                waiting.popleft()
            if generation is not None:
                self._on_settled(generation, word, last)
        if self._asked and not self._flush_scheduled and self._link.is_connected:
            self._schedule_flush()

    def _on_refused(self, generation: int | None, asked: Sequence[Asked], exc: Exception) -> None:
        if is_noscript(exc):
            # Nothing was run, so asking again is safe; once more at most, since the source goes along.
            self._link.forget(self._tick.script)
            if generation == self.outbox.generation:
                self._resend(None)
            if wanted := [one for one in asked if not one.is_over]:
                self._send(None, wanted)
                self._link.flush()
            return
        if generation is not None:
            self._on_batch_refused(generation, exc)
        if asked and not (isinstance(exc, RefusedError) and self._keep(asked, exc)):
            self._fail(asked, _store_error(exc))

    def _keep(self, asked: Sequence[Asked], refusal: RefusedError) -> bool:
        """Holds selections that were not executed until they can be asked again; False when that is no use."""
        if refusal.then is Then.AGAIN:
            if not self._refused:
                asyncio.get_running_loop().call_later(AGAIN_S, self._ask_again)
            self._refused.extend(asked)
        elif refusal.then is Then.MOVE and (self._link.is_moving or self._link.is_connected):
            self._asked[:0] = asked
            self._schedule_flush()
        else:
            return False
        for one in asked:
            one.is_sent, one.refusal = False, refusal
        return True

    def _ask_again(self) -> None:
        self._asked[:0] = self._refused
        self._refused.clear()
        self._schedule_flush()

    def _fail(self, asked: Sequence[Asked], exc: StoreUnavailableError) -> None:
        may_have_run = exc.may_have_run if isinstance(exc, RefusedError) else True
        for one in asked:
            if not one.is_over:
                if may_have_run:
                    self._abandon(one.selection)
                one.end(None, exc)

    def _saw(self, epoch: int, position: int, lost: int) -> None:
        if (epoch, position) > self.seen:
            if lost:
                log.warning("the store has lost writes in a failover", pool=self.pool, epoch=epoch, positions=lost)
                self._events.epoch_bumped(self.pool, lost)
            self.seen = (epoch, position)

    def _call_argument(self, batch: Batch | None, selections: Sequence[Selection], lease_ms: int) -> bytes:
        """What tick is told."""
        if batch is None:
            return call_argument(lease_ms=lease_ms, seen=self.seen, selections=selections)
        timed, age_ms = batch.entries or (), self.outbox.age_ms
        # The first is the oldest: where that is fresh, all are.
        if timed and age_ms(timed[0][1]):
            entries = [older(entry, age_ms(made_at)) for entry, made_at in timed]
        else:
            entries = [entry for entry, _ in timed]
        return call_argument(
            lease_ms=lease_ms,
            seen=self.seen,
            batch=batch.number,
            skips=batch.skips,
            entries=entries,
            selections=selections,
        )

    async def _settle_for(self, worker: str, batch: Batch, *, is_last: bool) -> int:
        """Applies a batch of a worker that is gone; the number of its last one that Redis has applied then.

        The last of all ends the worker's lease, so that what it left open is reaped at once.
        """
        call = self._call_argument(batch, (), 1 if is_last else self._lease_ms)
        ((_, last, *place),) = await self._ask_for(worker, call)
        self._saw(*place)
        return int(last)

    async def _ask_for(self, worker: str, call: bytes, pins: Sequence[str] = ()) -> Answer:
        """What tick says on behalf of another worker id."""
        return await self._ask("tick", self._keys(worker), {"worker": worker, "call": call}, (), pins)

    def _batches_lost(self, batches: int) -> None:
        self._events.batches_lost(self.pool, batches)

    def _on_settled(self, generation: int, word: bytes, last: int) -> None:
        if word == b"applied":
            self.outbox.acknowledge(last)
            if not len(self.outbox):
                self._quiet.set()
            elif self.outbox.is_behind and not self._flush_scheduled:
                self._schedule_flush()
        elif generation == self.outbox.generation:
            self._resend(last)

    def _on_batch_refused(self, generation: int, exc: Exception) -> None:
        if isinstance(exc, StoreUnavailableError) and not (isinstance(exc, RefusedError) and self._link.is_connected):
            return  # The batch stays in the outbox; it is sent again when the link is up.
        if generation != self.outbox.generation:
            return  # Sent before the last resend, which answers for it.
        pause_s = AGAIN_S if isinstance(exc, RefusedError) and exc.then is Then.AGAIN else _RETRY_S
        if not isinstance(exc, RefusedError):  # What Redis refuses, the link has logged, once.
            log.warning("the store refused a batch; trying again", pool=self.pool, reason=str(_store_error(exc)))
        self.outbox.generation += 1
        if self._retry is None:
            self._retry = asyncio.get_running_loop().call_later(pause_s, self._resend, None)

    def _resend(self, last: int | None) -> None:
        if self._retry:
            self._retry.cancel()
            self._retry = None
        if not self._link.is_connected:
            return
        batches, missing = self.outbox.resend(last)
        if missing:
            log.warning("settled batches are no longer held", pool=self.pool, batches=missing)
            self._batches_lost(missing)
        for batch in batches:
            self._send(batch, ())
        self._link.flush()

    def _on_up(self) -> None:
        self._up.set()
        self.was_up = True
        # From the newest acknowledged batch on: whom we are connected to now may lack it, and unless we settle again,
        # nobody would ever ask for it. Applied already, it changes nothing.
        newest = self.outbox.newest_kept
        self._resend(None if newest is None else newest - 1)
        self._schedule_flush()

    def _on_down(self) -> None:
        self._up.clear()
        # Those that wait were refused or never sent.
        asked, self._asked = self._asked, []
        self._fail(asked, RefusedError(f"Redis is away: {self._link.failure}", Then.GIVE_UP))

    # -- fences, clearing ----------------------------------------------------------------------------------------------

    async def command(self, *command: str | int) -> Any:
        """The reply to one rare command. Raises StoreUnavailableError."""
        reply = self._link.send(*command)
        self._link.flush()
        try:
            return await reply
        except ResponseError as exc:
            raise _store_error(exc) from exc

    async def put(self, key: str, value: str, lifetime_ms: int) -> None:
        """Keeps a string, and returns when it is there for all workers.

        Raises StoreUnavailableError: after the deadline, at once where Redis is known to be away.
        """
        if not self._link.is_up:
            raise StoreUnavailableError(f"Redis is away: {self._link.failure}")
        try:
            async with asyncio.timeout(self._deadline_s):
                await self.command("SET", key, value, "PX", lifetime_ms)
        except TimeoutError:
            raise StoreUnavailableError("Redis did not answer in time") from None

    async def _ask(
        self,
        script_name: str,
        names: dict[str, str],
        arguments: Mapping[str, str | int | bytes],
        rest: Sequence[str | int],
        rest_keys: Sequence[str] = (),
    ) -> Answer:
        """A rare script's reply; NOSCRIPT is answered with the source, and what was not executed is asked again."""
        script = self._scripts[script_name]
        command = script.command(names, arguments, rest, rest_keys)
        loop = asyncio.get_running_loop()
        asking_until = loop.time() + _ASKING_S
        has_sent_source = False
        while True:
            try:
                reply = self._link.call(script, command)
                self._link.flush()
                return list(await reply)
            except RefusedError as exc:
                if exc.then not in (Then.MOVE, Then.AGAIN) or loop.time() > asking_until:
                    raise
                await asyncio.sleep(AGAIN_S)
            except ResponseError as exc:
                if not is_noscript(exc):
                    raise _store_error(exc) from exc
                if has_sent_source:
                    raise StoreUnavailableError("Redis does not keep scripts") from exc
                self._link.forget(script)
                has_sent_source = True

    async def raise_fence(
        self, definitions: Sequence[RuleDefinition], settings: PoolSettings | None = None, revision: int = 0
    ) -> int:
        """Raises the fences of rules in this pool, and says how events are recorded; how many rose."""
        script = self._scripts["fence"]
        names = {name: key for name, key in self._keys("").items() if name in script.keys}
        arguments = {k: v for k, v in self._arguments().items() if k in script.arguments}
        arguments |= fence_arguments(settings or PoolSettings(name=self.pool), revision)
        rest = [msgspec.json.encode(definition).decode() for definition in definitions]
        _, raised, epoch, position, lost = await self._ask("fence", names, arguments, rest)
        self._saw(epoch, position, lost)
        return int(raised)

    async def clear(self, services: Sequence[str]) -> None:
        """Sets the counters of services to zero: totals and windows, not what is in flight or reserved."""
        script = self._scripts["clear"]
        names = {name: key for name, key in self._keys("").items() if name in script.keys}
        for start in range(0, len(services), _SERVICES_PER_CALL):
            arguments = {k: v for k, v in self._arguments().items() if k in script.arguments}
            rest = services[start : start + _SERVICES_PER_CALL]
            _, _, epoch, position, lost = await self._ask("clear", names, arguments, rest)
            self._saw(epoch, position, lost)

    async def health(self, services: Sequence[str], is_alive: bool) -> None:
        """Notes on the breakers of a provider's services whether it has answered a probe."""
        script = self._scripts["health"]
        names = {name: key for name, key in self._keys("").items() if name in script.keys}
        for start in range(0, len(services), _SERVICES_PER_CALL):
            arguments = {k: v for k, v in self._arguments().items() if k in script.arguments}
            arguments["is_alive"] = int(is_alive)
            rest = services[start : start + _SERVICES_PER_CALL]
            _, _, epoch, position, lost = await self._ask("health", names, arguments, rest)
            self._saw(epoch, position, lost)

    # -- picks of others (holds.py) ------------------------------------------------------------------------------------

    async def select_held(self, worker: str, selection: Selection) -> Answer:
        """As `select`, for a worker id of its own, whose lease ends with the attempt's deadline."""
        if not self._link.is_up:
            raise StoreUnavailableError(f"Redis is away: {self._link.failure}")
        call = call_argument(lease_ms=selection.deadline_ms, seen=self.seen, selections=(selection,))
        try:
            async with asyncio.timeout(self._deadline_s):
                (_, _, *place), answer = await self._ask_for(worker, call, pin_keys(self.pool, (selection,)))
        except TimeoutError:
            self._give_up(worker, selection)
            raise StoreUnavailableError("Redis did not answer in time") from None
        except (StoreUnavailableError, asyncio.CancelledError):
            self._give_up(worker, selection)
            raise
        self._saw(*place)
        if answer[0] != b"pick":
            await self.command("ZREM", keys.leases(self.pool), worker)  # It holds nothing.
        return _decoded(answer)

    async def settle_held(self, worker: str, entry: Entry, kept_ms: int) -> bool:
        """Applies the only entry of such a worker, and takes it off the list; False if it was applied before.

        Two that come at the same moment may both be told True; one of them is applied. What it leaves behind is kept
        for `kept_ms`: as long as somebody may repeat it. Raises StoreUnavailableError; then it may be repeated.
        """
        key = keys.holdings(self.pool, worker)
        call = call_argument(lease_ms=self._lease_ms, seen=self.seen, batch=1, entries=(entry,))
        try:
            async with asyncio.timeout(self._deadline_s):
                last, ((_, _, *place),) = await asyncio.gather(
                    self.command("HGET", key, "last"), self._ask_for(worker, call)
                )
                self._saw(*place)
                await asyncio.gather(
                    self.command("ZREM", keys.leases(self.pool), worker), self.command("PEXPIRE", key, kept_ms)
                )
        except TimeoutError:
            raise StoreUnavailableError("Redis did not answer in time") from None
        return last is None

    def _give_up(self, worker: str, selection: Selection) -> None:
        """Gives back in the background what a selection may have picked that nobody waits for any more."""
        task = asyncio.create_task(self._abandon_held(worker, selection))
        self._given_up.add(task)
        task.add_done_callback(self._given_up.discard)

    async def _abandon_held(self, worker: str, selection: Selection) -> None:
        entry = Entry(number=selection.number, service="", outcome=Outcome.ABANDONED)
        with contextlib.suppress(TimeoutError):  # By then it is reaped.
            async with asyncio.timeout(selection.deadline_ms / 1000):
                while True:
                    await self._up.wait()
                    try:
                        await self.settle_held(worker, entry, _ABANDONED_MS)
                    except StoreUnavailableError:
                        await asyncio.sleep(_RETRY_S)
                    else:
                        return

    # -- leases and views ----------------------------------------------------------------------------------------------

    async def _keep_lease(self) -> None:
        """Renews the lease, and reaps what other workers can no longer settle, a few times a lease."""
        pause_s = min(4.0, self._lease_ms / 4000)
        while True:
            await self._up.wait()
            try:
                await self._reap(self.worker)
                for target in await self._others_to_reap():
                    await self._reap(target)
            except StoreUnavailableError as exc:
                log.debug("could not keep the lease", pool=self.pool, reason=exc.message)
            await asyncio.sleep(pause_s)

    async def _others_to_reap(self) -> list[str]:
        """Workers whose lease has ended, and the next one in the ring, whose overdue attempts are ours to look at.

        A lease below zero has been reaped. Holds of picks over the API are no workers: they look at nobody, and their
        deadlines are their leases' ends.
        """
        leases = self.command("ZRANGEBYSCORE", keys.leases(self.pool), 0, "+inf", "WITHSCORES")
        reply, (seconds, micros) = await asyncio.gather(leases, self.command("TIME"))
        ends = _scores(reply)
        now_ms = int(seconds) * 1000 + int(micros) // 1000
        ended = [worker for worker, end_ms in ends.items() if 0 <= end_ms <= now_ms and worker != self.worker]
        alive = _alive(ends, now_ms)
        self.local.saw_workers(len(alive))
        following = [worker for worker in alive if worker > self.worker] or [w for w in alive if w < self.worker]
        return ended + following[:1]

    async def live_workers(self) -> int:
        """How many workers have a lease. Raises StoreUnavailableError, at once while Redis is known to be away."""
        if not self._link.is_up:
            raise StoreUnavailableError(f"Redis is away: {self._link.failure}")
        try:
            async with asyncio.timeout(self._deadline_s):
                leases = self.command("ZRANGEBYSCORE", keys.leases(self.pool), 0, "+inf", "WITHSCORES")
                reply, (seconds, micros) = await asyncio.gather(leases, self.command("TIME"))
        except TimeoutError:
            raise StoreUnavailableError("Redis did not answer in time") from None
        now_ms = int(seconds) * 1000 + int(micros) // 1000
        return len(_alive(_scores(reply), now_ms))

    async def _reap(self, target: str) -> None:
        names, place = self._keys(target), ""
        while True:
            arguments = self._arguments(target=target, limit=_REAP_LIMIT, place=place)
            _, is_ended, lost, epoch, position, lost_positions, following = await self._ask(
                "reap", names, arguments, ()
            )
            self._saw(epoch, position, lost_positions)
            if lost:
                log.warning("attempts were lost with their worker", pool=self.pool, worker=target, attempts=lost)
            if lost and is_ended:
                self._events.lease_expired(self.pool, lost)
            if not following:
                return
            place = following.decode()

    async def view(self) -> views.PoolView:
        """A picture of the pool that is read at once, within the deadline."""
        read = await self._read()
        return views.read_pool(self.pool, read.partitions, read.services, read.now_ms)

    async def picture(self) -> Picture:
        """The pool as it is stored. Raises StoreUnavailableError, at once while Redis is known to be away."""
        if not self._link.is_up:
            raise StoreUnavailableError(f"Redis is away: {self._link.failure}")
        return await self._read()

    async def _read(self) -> Picture:
        hashes = (keys.partitions(self.pool), keys.services(self.pool))
        try:
            async with asyncio.timeout(self._deadline_s):
                partitions, services, (seconds, micros) = await asyncio.gather(
                    *(self.command("HGETALL", key) for key in hashes), self.command("TIME")
                )
        except TimeoutError:
            raise StoreUnavailableError("Redis did not answer in time") from None
        return Picture(
            partitions=_mapping(partitions),
            services=_mapping(services),
            now_ms=int(seconds) * 1000 + int(micros) // 1000,
            taken_at=time.monotonic(),
        )


def _decoded(answer: Answer) -> Answer:
    """An answer of select with its words as text."""
    if answer[0] == b"pick":  # Nearly always; the rest of it is numbers.
        answer[0], answer[1], answer[2] = "pick", answer[1].decode(), answer[2].decode()
        return answer
    return [item.decode() if type(item) is bytes else item for item in answer]


@types.coroutine
def _next_turn() -> Generator[None, None, None]:
    """Lets the loop turn once, as asyncio.sleep(0) does, in one frame instead of two."""
    yield


def _store_error(exc: BaseException) -> StoreUnavailableError:
    """The server's refusal as ours. Its message names no key of a client: it is Redis' own, or a script's."""
    return exc if isinstance(exc, StoreUnavailableError) else StoreUnavailableError(f"Redis refused: {exc}")


def _mapping(reply: Any) -> dict[bytes, bytes]:
    """A hash as RESP3 (a map) or RESP2 (a flat list) gives it."""
    return reply if isinstance(reply, dict) else dict(zip(reply[::2], reply[1::2], strict=True))


def _alive(ends: Mapping[str, float], now_ms: int) -> list[str]:
    """The workers, in order, whose leases end later than now."""
    return sorted(w for w, end_ms in ends.items() if end_ms > now_ms and not w.startswith(keys.HOLD_PREFIX))


def _scores(reply: Any) -> dict[str, float]:
    """Members and scores as RESP3 (pairs) or RESP2 (a flat list) gives them."""
    pairs = reply if reply and isinstance(reply[0], list) else zip(reply[::2], reply[1::2], strict=True)
    return {member.decode(): float(score) for member, score in pairs}
