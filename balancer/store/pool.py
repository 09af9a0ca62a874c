"""One pool as a worker reaches it: selections and settles of a loop tick in one write, leases, reaping, fences."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
from redis.exceptions import ResponseError

from balancer import log
from balancer.domain import Entry, Outcome, RuleDefinition, Selection
from balancer.errors import StoreUnavailableError
from balancer.store import keys, views
from balancer.store.calls import entry_arguments, selection_arguments
from balancer.store.connection import AGAIN_S, Link, is_noscript
from balancer.store.refusals import RefusedError, Then
from balancer.store.scripts import load
from balancer.store.settlement import Batch, Outbox
from balancer.store.topology import Topology

SELECTIONS_PER_CALL = 64
_REAP_LIMIT = 500
_RETRY_S = 0.5
_ASKING_S = 1.0
"""So long a fence or a reap that Redis does not execute is asked again."""

Answer = list[Any]


class PoolEvents(msgspec.Struct, kw_only=True):
    """What a pool tells its owner: counts for metrics."""

    epoch_bumped: Callable[[str, int], None] = lambda pool, lost: None
    lease_expired: Callable[[str, int], None] = lambda pool, lost: None
    batches_lost: Callable[[str, int], None] = lambda pool, count: None


class _Asked(msgspec.Struct, eq=False):
    """A selection and whoever waits for its answer; whether it is on its way, and what it was refused with last."""

    selection: Selection
    future: asyncio.Future[Answer]
    is_sent: bool = False
    refusal: RefusedError | None = None


class PoolClient:
    """The scripts of one pool behind one link.

    Everything that is asked within a loop tick goes out in one write, settles before selections. Raises
    StoreUnavailableError when Redis does not answer within the deadline, at once while it is known to be away. What
    Redis says it has not executed (the pool's slot moves, its master is a replica now, a script blocks it) is asked
    again under the same name while its caller waits; what it has left unanswered never is.
    """

    def __init__(
        self,
        topology: Topology,
        pool: str,
        worker: str,
        *,
        deadline_ms: int,
        lease_ms: int,
        record: int,
        scripts_dir: str,
        events: PoolEvents,
    ) -> None:
        self.pool = pool
        self.worker = worker
        self.outbox = Outbox()
        self.seen = (0, 0)
        self._deadline_s = deadline_ms / 1000
        self._lease_ms = lease_ms
        self._record = record
        self._events = events
        self._scripts = {name: load(name, scripts_dir) for name in ("select", "settle", "reap", "fence")}
        self._link = Link(topology, keys.partitions(pool), deadline_ms, self._on_up, self._on_down, name=pool)
        self._asked: list[_Asked] = []
        self._refused: list[_Asked] = []
        self._flush_scheduled = False
        self._retry: asyncio.TimerHandle | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._quiet = asyncio.Event()
        self._quiet.set()
        self._up = asyncio.Event()

    # -- life ----------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Connects and begins to keep the lease, in the background."""
        self._tasks = [asyncio.create_task(self._link.run()), asyncio.create_task(self._keep_lease())]

    async def close(self, timeout_s: float = 5.0) -> bool:
        """Ends the background work once everything settled is acknowledged, or the time is over; True if all was."""
        try:
            async with asyncio.timeout(timeout_s):
                while len(self.outbox):
                    self._quiet.clear()
                    await self._quiet.wait()
        except TimeoutError:
            log.warning("settled attempts were not acknowledged in time", pool=self.pool, entries=len(self.outbox))
        if self._retry:
            self._retry.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        return not len(self.outbox)

    @property
    def is_up(self) -> bool:
        """True when Redis is connected and answers in time."""
        return self._link.is_up

    async def wait_until_up(self, timeout_s: float) -> None:
        """Returns once connected. Raises StoreUnavailableError after the time."""
        try:
            await asyncio.wait_for(self._up.wait(), timeout_s)
        except TimeoutError:
            raise StoreUnavailableError(f"Redis is away: {self._link.failure}") from None

    # -- selections and settles ----------------------------------------------------------------------------------------

    async def select(self, selection: Selection) -> Answer:
        """The script's answer to one selection, waited for at most the deadline.

        A selection that is given up (deadline, lost connection, cancelled caller) is settled as abandoned: should Redis
        have made the pick all the same, what it holds is given back.
        """
        if not self._link.is_up and not self._link.is_moving:
            raise StoreUnavailableError(f"Redis is away: {self._link.failure}")
        asked = _Asked(selection=selection, future=asyncio.get_running_loop().create_future())
        self._asked.append(asked)
        self._schedule_flush()
        try:
            async with asyncio.timeout(self._deadline_s):
                return await asked.future
        except TimeoutError:
            if not asked.is_sent:
                raise asked.refusal or StoreUnavailableError(f"Redis is away: {self._link.failure}") from None
            self._link.late()
            self._abandon(selection)
            raise asked.refusal or StoreUnavailableError("Redis did not answer in time") from None
        except RefusedError as exc:
            if exc.may_have_run:
                self._abandon(selection)
            raise
        except (StoreUnavailableError, asyncio.CancelledError):
            self._abandon(selection)
            raise

    def settle(self, entry: Entry) -> None:
        """Queues an entry; it is written with the other commands of this tick."""
        self.outbox.add(entry)
        self._schedule_flush()

    async def flushed(self) -> None:
        """Returns once all that was queued before is written to the socket: the next turn of the loop."""
        if self._flush_scheduled:
            await asyncio.sleep(0)

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

    def _schedule_flush(self) -> None:
        if not self._flush_scheduled:
            self._flush_scheduled = True
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_scheduled = False
        if self._link.is_connected:
            for batch in self.outbox.take():
                self._send_batch(batch)
        if self._link.is_moving:
            return  # They wait for `_on_up` or `_on_down`.
        asked, self._asked = self._asked, []
        for start in range(0, len(asked), SELECTIONS_PER_CALL):
            self._send_selections(asked[start : start + SELECTIONS_PER_CALL])
        self._link.flush()

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
            "record": self._record,
            **more,
        }

    def _send_selections(self, asked: Sequence[_Asked]) -> None:
        asked = [one for one in asked if not one.future.done()]
        if not asked:
            return
        script = self._scripts["select"]
        rest = [argument for one in asked for argument in selection_arguments(one.selection)]
        for one in asked:
            one.is_sent = True
        reply = self._link.call(script, script.command(self._keys(self.worker), self._arguments(), rest))
        reply.add_done_callback(lambda done: self._on_selected(asked, done))

    def _on_selected(self, asked: Sequence[_Asked], done: asyncio.Future[Any]) -> None:
        if done.cancelled():
            return
        exc = done.exception()
        if is_noscript(exc):
            # Nothing was run, so asking again is safe; once more at most, since the source goes along.
            self._link.forget(self._scripts["select"])
            self._send_selections(asked)
            self._link.flush()
            return
        if isinstance(exc, RefusedError) and self._keep(asked, exc):
            return
        if exc is not None:
            self._fail(asked, _store_error(exc))
            return
        *answers, (_, epoch, position, lost) = done.result()
        self._saw(epoch, position, lost)
        for one, answer in zip(asked, answers, strict=True):
            if not one.future.done():
                one.future.set_result([item.decode() if isinstance(item, bytes) else item for item in answer])

    def _keep(self, asked: Sequence[_Asked], refusal: RefusedError) -> bool:
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

    @staticmethod
    def _fail(asked: Sequence[_Asked], exc: StoreUnavailableError) -> None:
        for one in asked:
            if not one.future.done():
                one.future.set_exception(exc)

    def _saw(self, epoch: int, position: int, lost: int) -> None:
        if (epoch, position) > self.seen:
            if lost:
                log.warning("the store has lost writes in a failover", pool=self.pool, epoch=epoch, positions=lost)
                self._events.epoch_bumped(self.pool, lost)
            self.seen = (epoch, position)

    def _send_batch(self, batch: Batch, skip: bool = False) -> None:
        script = self._scripts["settle"]
        rest = [a for entry, made_at in batch.entries for a in entry_arguments(entry, self.outbox.age_ms(made_at))]
        arguments = self._arguments(batch=batch.number, skip=int(skip))
        reply = self._link.call(script, script.command(self._keys(self.worker), arguments, rest))
        generation = batch.generation
        reply.add_done_callback(lambda done: self._on_settled(generation, done))

    def _on_settled(self, generation: int, done: asyncio.Future[Any]) -> None:
        if done.cancelled():
            return
        exc = done.exception()
        if isinstance(exc, StoreUnavailableError) and not (isinstance(exc, RefusedError) and self._link.is_connected):
            return  # The batch stays in the outbox; it is sent again when the link is up.
        if exc is None:
            word, last, *place = done.result()
            if word == b"applied":
                self._saw(*place)
                self.outbox.acknowledge(last)
                if not len(self.outbox):
                    self._quiet.set()
                return
        if generation != self.outbox.generation:
            return  # Sent before the last resend, which answers for it.
        if exc is None:
            self._resend(last)
        elif is_noscript(exc):
            self._link.forget(self._scripts["settle"])
            self._resend(None)
        else:
            pause_s = AGAIN_S if isinstance(exc, RefusedError) and exc.then is Then.AGAIN else _RETRY_S
            if not isinstance(exc, RefusedError):  # What Redis refuses, the link has logged, once.
                log.warning("the store refused a batch; trying again", pool=self.pool, reason=str(_store_error(exc)))
            self.outbox.generation += 1
            self._retry = asyncio.get_running_loop().call_later(pause_s, self._resend, None)

    def _resend(self, last: int | None) -> None:
        if not self._link.is_connected:
            return
        batches, missing = self.outbox.resend(last)
        if missing:
            log.warning("settled batches are no longer held", pool=self.pool, batches=missing)
            self._events.batches_lost(self.pool, missing)
            if not batches:
                batches = [Batch(number=self.outbox.last_number, entries=(), generation=self.outbox.generation)]
        for i, batch in enumerate(batches):
            self._send_batch(batch, skip=bool(missing) and i == 0)
        self._link.flush()

    def _on_up(self) -> None:
        self._up.set()
        # From the newest acknowledged batch on: whom we are connected to now may lack it, and unless we settle again,
        # nobody would ever ask for it. Applied already, it changes nothing.
        acknowledged = self.outbox.acknowledged
        self._resend(None if acknowledged is None else acknowledged - 1)
        self._schedule_flush()

    def _on_down(self) -> None:
        self._up.clear()
        # Those that wait were refused or never sent.
        asked, self._asked = self._asked, []
        self._fail(asked, RefusedError(f"Redis is away: {self._link.failure}", Then.GIVE_UP))

    # -- fences, leases, views -----------------------------------------------------------------------------------------

    async def _ask(self, script_name: str, names: dict[str, str], arguments: dict[str, str | int], rest: Any) -> Answer:
        """A rare script's reply; NOSCRIPT is answered with the source, and what was not executed is asked again."""
        script = self._scripts[script_name]
        command = script.command(names, arguments, rest)
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

    async def raise_fence(self, definitions: Sequence[RuleDefinition]) -> int:
        """Raises the fences of rules in this pool; how many rose."""
        names = {name: key for name, key in self._keys("").items() if name in self._scripts["fence"].keys}
        arguments = {k: v for k, v in self._arguments().items() if k in self._scripts["fence"].arguments}
        rest = [msgspec.json.encode(definition).decode() for definition in definitions]
        _, raised, epoch, position, lost = await self._ask("fence", names, arguments, rest)
        self._saw(epoch, position, lost)
        return int(raised)

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
        """Workers whose lease has ended, and the next one in the ring, whose overdue attempts are ours to look at."""
        leases, clock = self._link.send("ZRANGE", keys.leases(self.pool), 0, -1, "WITHSCORES"), self._link.send("TIME")
        self._link.flush()
        try:
            ends = _scores(await leases)
            seconds, micros = await clock
        except ResponseError as exc:
            raise _store_error(exc) from exc
        now_ms = int(seconds) * 1000 + int(micros) // 1000
        ended = [worker for worker, end_ms in ends.items() if end_ms <= now_ms and worker != self.worker]
        alive = sorted(worker for worker, end_ms in ends.items() if end_ms > now_ms)
        following = [worker for worker in alive if worker > self.worker] or [w for w in alive if w < self.worker]
        return ended + following[:1]

    async def _reap(self, target: str) -> None:
        names = self._keys(target)
        while True:
            arguments = self._arguments(target=target, limit=_REAP_LIMIT)
            _, is_ended, lost, epoch, position, lost_positions = await self._ask("reap", names, arguments, ())
            self._saw(epoch, position, lost_positions)
            if lost:
                log.warning("attempts were lost with their worker", pool=self.pool, worker=target, attempts=lost)
            if lost and is_ended:
                self._events.lease_expired(self.pool, lost)
            if lost < _REAP_LIMIT:
                return

    async def view(self) -> views.PoolView:
        """A picture of the pool, within the deadline."""
        partitions = self._link.send("HGETALL", keys.partitions(self.pool))
        services = self._link.send("HGETALL", keys.services(self.pool))
        clock = self._link.send("TIME")
        self._link.flush()
        try:
            async with asyncio.timeout(self._deadline_s):
                seconds, micros = await clock
                now_ms = int(seconds) * 1000 + int(micros) // 1000
                return views.read_pool(self.pool, _mapping(await partitions), _mapping(await services), now_ms)
        except TimeoutError:
            raise StoreUnavailableError("Redis did not answer in time") from None
        except ResponseError as exc:
            raise _store_error(exc) from exc


def _store_error(exc: BaseException) -> StoreUnavailableError:
    """The server's refusal as ours. Its message names no key of a client: it is Redis' own, or a script's."""
    return exc if isinstance(exc, StoreUnavailableError) else StoreUnavailableError(f"Redis refused: {exc}")


def _mapping(reply: Any) -> dict[bytes, bytes]:
    """A hash as RESP3 (a map) or RESP2 (a flat list) gives it."""
    return reply if isinstance(reply, dict) else dict(zip(reply[::2], reply[1::2], strict=True))


def _scores(reply: Any) -> dict[str, float]:
    """Members and scores as RESP3 (pairs) or RESP2 (a flat list) gives them."""
    pairs = reply if reply and isinstance(reply[0], list) else zip(reply[::2], reply[1::2], strict=True)
    return {member.decode(): float(score) for member, score in pairs}
