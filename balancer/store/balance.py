"""The fleet's shared choice and counters, as one worker sees them: select, settle, and where the cursors were."""

from __future__ import annotations

import asyncio
import itertools
import random
import secrets
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec

from balancer import log
from balancer.config import Settings
from balancer.domain import Entry, Outcome, Pick, Rule, Selection, Usage
from balancer.errors import NoServiceError, NotFoundError, RateLimitedError, StoreUnavailableError
from balancer.store import holds, keys, spill
from balancer.store.changes import ChangeLog
from balancer.store.connection import Commands
from balancer.store.grants import Grants
from balancer.store.history import Send
from balancer.store.local import ASIDE
from balancer.store.pool import Answer, Asked, OnAnswer, PoolClient, PoolEvents
from balancer.store.prober import Probe, Probed, Prober, plans
from balancer.store.queue import Queues
from balancer.store.registry import Directory, Follower, Registry, kept_file
from balancer.store.seen import Seen
from balancer.store.topology import Topology
from balancer.store.views import PoolView

_TRIES = 5
_NOTHING_USED = Usage()
_RESPONSE_MS = 30 * 86_400_000
"""So long an answer is found by its id; the vendors keep theirs no longer."""


class BalanceEvents(msgspec.Struct, kw_only=True):
    """What the store tells its owner: counts for metrics."""

    stale: Callable[[str], None] = lambda pool: None
    selected: Callable[[str, float], None] = lambda pool, seconds: None
    pool: PoolEvents = msgspec.field(default_factory=PoolEvents)


class Recalled(msgspec.Struct, frozen=True, kw_only=True):
    """Who gave an answer: the rule, in its pool, and the service."""

    pool: str
    rule: str
    service: str


class Balance:
    """One worker's access to all pools. Its id is new for every process start."""

    def __init__(self, url: str, settings: Settings, events: BalanceEvents | None = None) -> None:
        self.worker = secrets.token_hex(8)
        self._topology = Topology(url)
        self._settings = settings
        self._events = events or BalanceEvents()
        self._commands = Commands(self._topology)
        self.registry = Registry(self._commands, settings.scripts_dir)
        self.grants = Grants(self._commands, settings.scripts_dir)
        self.changes = ChangeLog(self._commands, settings.scripts_dir)
        self._outbox_dir = Path(settings.outbox_dir).expanduser() if settings.outbox_dir else None
        self._follower = Follower(self._commands, self.registry, kept_file(settings.outbox_dir))
        self._pools: dict[str, PoolClient] = {}
        self._numbers = itertools.count(1)
        self._draw = random.Random(secrets.randbits(128)).getrandbits  # A draw is no secret.
        self._cursors: dict[str, str] = {}
        self._standing: dict[str | tuple[str, str], tuple[Directory, str, int]] = {}
        """The partition and the revision of a rule, by its uuid, and its entry if it has one, under a directory."""
        self._queues = Queues()
        self._probe: Probe | None = None
        self._probers: dict[str, asyncio.Task[None]] = {}
        self._plans: tuple[Directory, dict[str, list[Probed]]] | None = None
        """Who is to be asked in each pool, under a directory."""
        self._opener: asyncio.Task[None] | None = None

    # -- life ----------------------------------------------------------------------------------------------------------

    async def start(self, probe: Probe | None = None) -> None:
        """Reads the configuration and connects to its pools; goes on trying in the background where Redis is away.

        `probe` asks a provider for its health; without one this worker asks none.

        Raises ConfigurationError when the folder for the outbox cannot be used.
        """
        self._probe = probe
        if self._outbox_dir:
            spill.prepare(self._outbox_dir)
        await self._follower.start()
        self._open_pools()
        for pool in self._pools.values():
            try:
                await pool.wait_until_up(self._settings.redis_deadline_ms / 1000)
            except StoreUnavailableError as exc:
                log.warning("starting without a pool", pool=pool.pool, reason=exc.message)
        self._opener = asyncio.create_task(self._keep_pools_open())

    async def close(self, timeout_s: float = 5.0) -> None:
        """Waits for the settles under way, at most that long, and disconnects."""
        tasks = [*self._probers.values(), *filter(None, [self._opener])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(pool.close(timeout_s) for pool in self._pools.values()))
        await self._follower.close()
        await self._commands.aclose()

    async def _keep_pools_open(self) -> None:
        """Connects to pools that a new configuration brings, so that their lost attempts are reaped here too.

        Likewise to pools for which a process that is gone left something on disk, whether they are configured or not.
        """
        while True:
            if self._outbox_dir:
                try:
                    for name, _ in await asyncio.to_thread(spill.folders, self._outbox_dir):
                        self._pool(name)
                except OSError as exc:
                    log.warning("cannot look for spilled outboxes", reason=exc.strerror)
            await asyncio.sleep(1)
            self._open_pools()

    def _open_pools(self) -> None:
        for name in self.directory.pools if self._follower.directory else ():
            self._pool(name)
        if self._probe:
            for name in self._probed().keys() - self._probers.keys():
                self._probers[name] = asyncio.create_task(self._ask_for_health(name, self._probe))

    def _ask_for_health(self, name: str, probe: Probe) -> Coroutine[Any, Any, None]:
        return Prober(self._pool(name), self.worker, lambda: self._probed().get(name, ()), probe).run()

    def _pool(self, name: str) -> PoolClient:
        pool = self._pools.get(name)
        if pool is None:
            pool = self._pools[name] = PoolClient(
                self._topology,
                name,
                self.worker,
                deadline_ms=self._settings.redis_deadline_ms,
                lease_ms=round(self._settings.lease_s * 1000),
                scripts_dir=self._settings.scripts_dir,
                events=self._events.pool,
                audit_interval_s=self._settings.audit_interval_s,
                outbox_dir=self._outbox_dir,
                outbox_max_entries=self._settings.outbox_max_entries,
            )
            pool.start()
        return pool

    def _probed(self) -> dict[str, list[Probed]]:
        directory = self._follower.directory
        if directory is None:
            return {}
        if self._plans is None or self._plans[0] is not directory:
            self._plans = directory, plans(directory.configuration)
        return self._plans[1]

    # -- readiness -----------------------------------------------------------------------------------------------------

    @property
    def directory(self) -> Directory:
        """The configuration that stands. Raises StoreUnavailableError before the first is known."""
        directory = self._follower.directory
        if directory is None:
            raise StoreUnavailableError(self._follower.failure)
        return directory

    @property
    def standing(self) -> Directory | None:
        """The configuration that stands, None before the first."""
        return self._follower.directory

    @property
    def is_bereft(self) -> bool:
        """True when the registry is empty, and this worker knows a configuration that it had."""
        return self._follower.is_bereft

    def snapshot(self) -> Directory:
        """The configuration that stands, for the gateway. Raises as `directory`."""
        return self._follower.directory or self.directory

    @property
    def is_ready(self) -> bool:
        """True when a configuration is known, and every pool answers or has rules that go on without it."""
        directory = self._follower.directory
        if directory is None or not directory.pools <= self._pools.keys():
            return False
        return all(pool.is_up or self._goes_on_without(name) for name, pool in self._pools.items())

    def _goes_on_without(self, pool: str) -> bool:
        directory = self._follower.directory
        rules = directory.by_uuid.values() if directory else ()
        return any(rule.pool == pool and rule.active and rule.on_store_loss == "local" for rule in rules)

    def readiness(self) -> dict[str, object]:
        """What stands behind `is_ready`, for people."""
        directory, now = self._follower.directory, datetime.now(UTC)
        return {
            "worker": self.worker,
            "revision": directory.revision if directory else 0,
            "registry": self._follower.failure or "ok",
            "pools": {name: self._describe(pool) for name, pool in self._pools.items()},
            "away_since": {
                name: (now - timedelta(seconds=pool.away_s)).isoformat(timespec="seconds")
                for name, pool in self._pools.items()
                if not pool.is_up
            },
            "outbox_entries": sum(len(pool.outbox) for pool in self._pools.values()),
        }

    def _describe(self, pool: PoolClient) -> str:
        """`ok`, or what its requests get while Redis is away."""
        if pool.is_up:
            return "ok"
        return "away: local" if self._goes_on_without(pool.pool) else "away: closed"

    def pools_up(self) -> dict[str, bool]:
        """For each pool whether Redis answers."""
        return {name: pool.is_up for name, pool in self._pools.items()}

    def outbox_entries(self) -> dict[str, int]:
        """For each pool the entries that Redis has not acknowledged."""
        return {name: len(pool.outbox) for name, pool in self._pools.items()}

    def outbox_ages_s(self) -> dict[str, float]:
        """For each pool how long the oldest entry has waited that Redis has not acknowledged, 0 for none."""
        return {name: pool.outbox.oldest_s for name, pool in self._pools.items()}

    async def live_workers(self) -> dict[str, int]:
        """How many workers of the fleet have a lease on each pool that answers within the deadline."""
        pools = list(self._pools.values())
        counts = await asyncio.gather(*(pool.live_workers() for pool in pools), return_exceptions=True)
        found = {}
        for pool, count in zip(pools, counts, strict=True):
            if isinstance(count, int):
                found[pool.pool] = count
            elif not isinstance(count, StoreUnavailableError):
                raise count
        return found

    async def views(self) -> list[PoolView]:
        """A picture of every pool that answers within the deadline; the others are left out."""
        pictures = await asyncio.gather(*(p.view() for p in self._pools.values()), return_exceptions=True)
        views = []
        for picture in pictures:
            if isinstance(picture, PoolView):
                views.append(picture)
            elif not isinstance(picture, StoreUnavailableError):
                raise picture
        return views

    def seen(self, name: str) -> Seen:
        """What was last seen of a pool's services, without asking. Raises as `directory`."""
        return Seen(self.directory, name, self._pool(name).local.picture)

    async def view(self, name: str) -> PoolView:
        """A picture of one pool. Raises StoreUnavailableError."""
        return await (await self._up(name)).view()

    async def sender(self, name: str) -> Send:
        """What sends single commands to the server of a pool. Raises StoreUnavailableError."""
        return (await self._up(name)).command

    async def clear(self, name: str, services: Sequence[str]) -> None:
        """Sets the counters of a pool's services to zero. Raises StoreUnavailableError."""
        await (await self._up(name)).clear(services)

    async def refresh(self) -> None:
        """Takes over the configuration that stands now. Raises StoreUnavailableError."""
        await self._follower.refresh()

    async def _up(self, name: str) -> PoolClient:
        pool = self._pool(name)
        if not pool.is_up:
            await pool.wait_until_up(self._settings.redis_deadline_ms / 1000)
        return pool

    # -- selections and settles ----------------------------------------------------------------------------------------

    def select(
        self,
        rule: Rule,
        *,
        reserved: int,
        deadline_ms: int,
        excluded: tuple[str, ...] = (),
        session: str = "",
        only: str = "",
        holder: str = "",
        begun: Asked | None = None,
        variant: Callable[[Rule], Rule] | None = None,
        barred: tuple[str, ...] = (),
    ) -> Coroutine[Any, Any, tuple[Pick, Rule]]:
        """The pick for a rule, and the rule as it stood at the pick: an edit in between is followed.

        A `session` (as the client names it) stays with its service for the rule's `session_affinity`; `only` asks for
        one service or none; a `holder` is a worker id of its own for this one pick (see `holds`). At its limits, a
        first attempt waits in the rule's queue for up to `queue_timeout_ms`.

        While Redis is away, a rule with `on_store_loss: local` is picked for by this worker alone (see `local`), but
        not for a `holder`: any worker must be able to settle that.

        `begun` is what has come of `begin`, where that was no pick: it is gone on from there. `variant` tells as what
        the rule serves the request after an edit; by default as for the same smart-routing entry.

        Raises NoServiceError when no service may serve, or the rule is gone, RateLimitedError when that passes;
        StoreUnavailableError when Redis does not answer in time.
        """

        def ask() -> Coroutine[Any, Any, tuple[Pick, Rule]]:
            nonlocal begun
            first, begun = begun, None
            return self._select(rule, reserved, deadline_ms, excluded, session, only, holder, first, variant, barred)

        return self._queues.wait(rule, only, ask) if rule.queue_timeout_ms and not excluded else ask()

    async def _select(
        self,
        rule: Rule,
        reserved: int,
        deadline_ms: int,
        excluded: tuple[str, ...],
        session: str,
        only: str,
        holder: str,
        begun: Asked | None,
        variant: Callable[[Rule], Rule] | None,
        barred: tuple[str, ...],
    ) -> tuple[Pick, Rule]:
        current: Rule | None = rule
        if rule.entry and excluded:  # Its entry may be gone since the first attempt.
            standing = self.directory.by_uuid.get(rule.uuid)
            current = standing.variant(rule.entry) if standing else None
        for _ in range(_TRIES):
            if current is None or not current.active:
                raise NoServiceError(f"rule {rule.uuid} is no longer there")
            pool = self._pool(current.pool)
            goes_on_alone = current.on_store_loss == "local" and not holder
            if begun is not None:
                selection = begun.selection
            else:
                number = 1 if holder else next(self._numbers)
                selection = self._selection(current, number, reserved, deadline_ms, session, only, excluded, barred)
            try:
                if begun is not None:
                    answer, begun = begun.result(), None
                else:
                    answer = await self._ask(pool, selection, holder)
            except StoreUnavailableError as exc:
                begun = None
                if not goes_on_alone:
                    raise
                return self._picked_alone(current, selection, exc), current
            match answer[0]:
                case "pick":
                    pick = self._picked(current, selection, answer)
                    if not holder:
                        pool.local.picked(pick, selection)
                    return pick, current
                case "none":
                    raise no_service(current.uuid, str(answer[1]), int(answer[2]), only)
                case "stale" | "define" as word:
                    try:
                        await self._catch_up(current, word, int(answer[1]))
                    except StoreUnavailableError as exc:
                        if pool.is_up or not goes_on_alone:
                            raise
                        return self._picked_alone(current, selection, exc), current
                case _:
                    raise StoreUnavailableError("Redis answered too late")
            current = self.directory.by_uuid.get(rule.uuid)
            if current is not None:
                current = variant(current) if variant else current.variant(rule.entry)
        raise StoreUnavailableError(f"rule {rule.uuid} changes faster than a selection can be made")

    def _selection(
        self,
        rule: Rule,
        number: int,
        reserved: int,
        deadline_ms: int,
        session: str,
        only: str = "",
        excluded: tuple[str, ...] = (),
        barred: tuple[str, ...] = (),
    ) -> Selection:
        directory = self._follower.directory or self.directory
        name = (rule.uuid, rule.entry) if rule.entry else rule.uuid
        standing = self._standing.get(name)
        if standing is None or standing[0] is not directory:
            if self._standing and next(iter(self._standing.values()))[0] is not directory:
                self._standing.clear()  # What is left of another configuration.
            standing = directory, keys.partition(rule.uuid, rule.entry), directory.snapshot.rule_revision(rule.uuid)
            self._standing[name] = standing
        _, partition, revision = standing
        is_pinned = bool(session) and rule.session_affinity > 0
        return Selection(
            number=number,
            rule=rule.uuid,
            partition=partition,
            revision=revision,
            draw=self._draw(32),
            reserved=reserved,
            deadline_ms=deadline_ms,
            session=keys.session(partition, session) if is_pinned else "",
            affinity_ms=rule.session_affinity * 1000 if is_pinned else 0,
            only=only,
            excluded=excluded,
            barred=barred,
        )

    async def _ask(self, pool: PoolClient, selection: Selection, holder: str) -> Answer:
        if not (pool.was_up or pool.is_missed):  # The first request to a pool comes before its connection.
            await pool.wait_until_up(self._settings.redis_deadline_ms / 1000)
        began = time.monotonic()
        answer = await (pool.select_held(holder, selection) if holder else pool.select(selection))
        self._events.selected(pool.pool, time.monotonic() - began)
        return answer

    def begin(self, rule: Rule, reserved: int, deadline_ms: int, session: str, on_answer: OnAnswer) -> Asked | None:
        """Asks for the pick of a first attempt. None, with nothing asked, where that is for `select` to do.

        That is while Redis is away, or others wait in the rule's queue. `on_answer` is called with what has come of
        it, never before this returns.
        """
        pool = self._pools.get(rule.pool)
        if pool is None or not pool.is_up or (self._queues and self._queues.has_line(rule)):
            return None
        number = next(self._numbers)
        return pool.ask(self._selection(rule, number, reserved, deadline_ms, session), on_answer)

    def finish(self, rule: Rule, asked: Asked) -> Pick | None:
        """The pick that has come of `begin`, None where none has: then `select` goes on from there."""
        answer = asked.answer
        if answer is None or answer[0] != "pick":
            return None
        pick = self._picked(rule, asked.selection, answer)
        self._pools[rule.pool].local.picked(pick, asked.selection)
        return pick

    def give_up(self, rule: Rule, asked: Asked) -> None:
        """Nobody waits any more for what `begin` has asked."""
        self._pool(rule.pool).give_up(asked)

    def _picked_alone(self, rule: Rule, selection: Selection, loss: StoreUnavailableError) -> Pick:
        """This worker's own pick, under a new name: of the one that was asked for, Redis may have made something."""
        selection = msgspec.structs.replace(selection, number=next(self._numbers))
        answer = self._pool(rule.pool).local.select(self.directory, rule, selection, loss)
        match answer[0]:
            case "pick":
                # A revision's order of events, and its place in it, is Redis' to give.
                word, service, reason, _, _, _, *rest = answer
                pick = self._picked(rule, selection, [word, service, reason, 0, 0, 0, *rest])
                return msgspec.structs.replace(pick, is_local=True)
            case "none":
                raise no_service(rule.uuid, str(answer[1]), int(answer[2]), selection.only)
            case _:
                raise loss  # A rule newer than what this worker knows of it: only Redis can tell.

    def _picked(self, rule: Rule, selection: Selection, answer: Sequence[Any]) -> Pick:
        _, service, reason, seq, epoch, position, streak, is_switch = answer
        is_pinned = reason == "pinned"
        pick = Pick(
            pool=rule.pool,
            rule=rule.uuid,
            partition=selection.partition,
            revision=selection.revision,
            number=selection.number,
            service=service,
            reason=reason,
            seq=seq,
            epoch=epoch,
            position=position,
            streak=streak,
            is_switch=bool(is_switch) and not is_pinned,
            is_saved=bool(is_switch) and is_pinned,
            reserved=selection.reserved,
        )
        if pick.reason not in ASIDE:
            self._cursors[pick.partition] = pick.service
        return pick

    async def _catch_up(self, rule: Rule, word: str, revision: int) -> None:
        """Brings this worker, or the pool, to the rule as it stands: who is behind, says the script's answer."""
        if word == "stale":
            self._events.stale(rule.pool)
            await self._follower.reach(revision, timeout_s=3.0)
        else:
            # The pool has lost the rule, with all its state. Look at the head first: ours may be outdated.
            await self._follower.refresh()
            await self._define(rule)

    async def _define(self, rule: Rule) -> None:
        directory = self.directory
        current = directory.by_uuid.get(rule.uuid)
        if current is not None:
            settings = directory.configuration.pool(current.pool)
            definitions = [directory.definition(current)]
            await self._pool(current.pool).raise_fence(definitions, settings, directory.revision)

    def settle(
        self,
        pick: Pick,
        outcome: Outcome,
        usage: Usage | None,
        *,
        cooldown_ms: int = 0,
        first_token_us: int = 0,
        stream_us: int = 0,
    ) -> None:
        """Queues the end of an attempt; it is written to Redis with the other commands of this tick (see `flushed`).

        `cooldown_ms`: so long the service asks to be left alone. The times are an Entry's.
        """
        entry = Entry(
            number=pick.number,
            service=pick.service,
            outcome=outcome,
            usage=usage or _NOTHING_USED,
            cooldown_ms=cooldown_ms,
            first_token_us=first_token_us,
            stream_us=stream_us,
        )
        pool = self._pools.get(pick.pool) or self._pool(pick.pool)
        pool.local.settled(entry)
        pool.settle(entry)
        if self._queues:
            self._queues.settled(pick.pool, pick.service)

    async def pick_held(
        self,
        rule: Rule,
        *,
        reserved: int,
        hold_ms: int,
        excluded: tuple[str, ...] = (),
        session: str = "",
        only: str = "",
    ) -> tuple[Pick, holds.Hold]:
        """A pick that any worker can settle. Raises as `select`."""
        holder = holds.new_worker()
        pick, _ = await self.select(
            rule,
            reserved=reserved,
            deadline_ms=hold_ms,
            excluded=excluded,
            session=session,
            only=only,
            holder=holder,
        )
        until_ms = round(time.time() * 1000) + hold_ms
        return pick, holds.Hold(pool=pick.pool, worker=holder, rule=pick.rule, service=pick.service, until_ms=until_ms)

    async def settle_held(
        self,
        hold: holds.Hold,
        outcome: Outcome,
        usage: Usage,
        *,
        cooldown_ms: int = 0,
        first_token_us: int = 0,
        stream_us: int = 0,
    ) -> bool:
        """Settles such a pick; False if it was settled before. Raises NotFoundError, StoreUnavailableError."""
        kept_ms = hold.kept_ms()
        if hold.pool not in self._pools and hold.pool not in self.directory.configuration.pool_names():
            raise NotFoundError("the hold's pool is not known here", param="hold")
        entry = Entry(
            number=1,
            service=hold.service,
            outcome=outcome,
            usage=usage,
            cooldown_ms=cooldown_ms,
            first_token_us=first_token_us,
            stream_us=stream_us,
        )
        return await (await self._up(hold.pool)).settle_held(hold.worker, entry, kept_ms)

    def when_flushed(self, pool: str, then: Callable[[], None]) -> None:
        """Calls it once everything settled before has been written to Redis' socket: at once, or later in this tick."""
        self._pool(pool).when_flushed(then)

    async def flushed(self, pool: str) -> None:
        """Returns once everything settled before has been written to Redis' socket.

        Writing it apart from the rest of the tick would be no cheaper: a call of its own for each settle takes twice as
        much of Redis, and more of this worker.
        """
        client = self._pool(pool)
        if not client.is_flushed:
            await client.flushed()

    async def settled(self, pick: Pick) -> None:
        """Returns once all that was settled before is applied, or after the deadline; at once while Redis is away."""
        pool = self._pool(pick.pool)
        if pool.is_up:
            await pool.acknowledged(self._settings.redis_deadline_ms / 1000)

    # -- answers by id -------------------------------------------------------------------------------------------------

    async def remember(self, pick: Pick, response_id: str) -> None:
        """Keeps for 30 days who gave the answer of that id; returns when every worker can recall it.

        Raises StoreUnavailableError when the pool is away, or does not answer in time.
        """
        pool = self._pool(pick.pool)
        await pool.put(keys.response(pick.pool, response_id), f"{pick.rule}\n{pick.service}", _RESPONSE_MS)

    async def recall(self, response_id: str, rule: Rule | None = None) -> Recalled | None:
        """Who gave the answer of that id, None when no pool knows it.

        The pool of the rule that it is asked for with is asked first. The others are asked at once where it does not
        know: in one command, but on a Cluster, where each has a server of its own.

        Raises StoreUnavailableError when it was not found, and a pool that may know it did not answer in time.
        """
        pools = set(self.directory.pools)
        away: StoreUnavailableError | None = None
        if rule is not None and rule.pool in pools:
            pools.remove(rule.pool)
            try:
                if found := await self._recall(rule.pool, response_id):
                    return found
            except StoreUnavailableError as exc:
                away = exc
        if self._topology.kind != "cluster" and len(pools) > 1:
            try:
                found = await self._recall_of_any(sorted(pools), response_id)
            except StoreUnavailableError as exc:
                log.debug("pools must be asked one by one", reason=exc.message)
            else:
                if found is None and away:
                    raise away
                return found
        return await self._recall_of_each(pools, response_id, away)

    async def _recall_of_any(self, names: Sequence[str], response_id: str) -> Recalled | None:
        """What the pools of one server know."""
        pool = next((pool for pool in map(self._pools.get, names) if pool and pool.is_up), None)
        if pool is None:
            raise StoreUnavailableError("Redis is away: where the response is kept cannot be asked for")
        values: Sequence[bytes | None] = await self._asked(
            pool, "MGET", *(keys.response(name, response_id) for name in names)
        )
        return next((_recalled(name, value) for name, value in zip(names, values, strict=True) if value), None)

    async def _recall_of_each(
        self, names: Iterable[str], response_id: str, away: StoreUnavailableError | None
    ) -> Recalled | None:
        """What any of the pools knows; `away` is why one that was asked before has not answered."""
        asked = [asyncio.create_task(self._recall(name, response_id)) for name in names]
        try:
            for answer in asyncio.as_completed(asked):
                try:
                    if found := await answer:
                        return found
                except StoreUnavailableError as exc:
                    away = exc
        finally:
            for task in asked:
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)
        if away:
            raise away
        return None

    async def _recall(self, name: str, response_id: str) -> Recalled | None:
        """What one pool knows."""
        pool = self._pool(name)
        if pool.was_up and not pool.is_up:
            raise StoreUnavailableError("Redis is away: where the response is kept cannot be asked for")
        value: bytes | None = await self._asked(pool, "GET", keys.response(name, response_id))
        return _recalled(name, value) if value else None

    async def _asked(self, pool: PoolClient, *command: str) -> Any:
        try:
            async with asyncio.timeout(self._settings.redis_deadline_ms / 1000):
                await self._up(pool.pool)
                return await pool.command(*command)
        except TimeoutError:
            raise StoreUnavailableError("Redis did not answer in time") from None

    def cursor(self, rule: Rule) -> str:
        """The service where this worker last saw the rule's cursor, empty if never."""
        return self._cursors.get(keys.partition(rule.uuid, rule.entry), "")


def _recalled(pool: str, value: bytes) -> Recalled:
    rule, _, service = value.decode().partition("\n")
    return Recalled(pool=pool, rule=rule, service=service)


def no_service(rule: str, cause: str, retry_ms: int, only: str = "") -> NoServiceError:
    """Why select has found none, as an error for the client; `retry_ms` is what it says of when to ask again."""
    whose = f"rule {rule}"
    which = f"service {only} of {whose}" if only else f"every service of {whose}"
    retry_after_s = retry_ms / 1000
    match cause:
        case "limited" if retry_ms < 0:
            message = f"{whose}: this request alone is larger than the limit of tokens a minute"
            return RateLimitedError(message, cause=cause)
        case "limited":
            return RateLimitedError(f"{which} is at its limit", cause=cause, retry_after_s=retry_after_s)
        case "cooling":
            message = f"{which} waits until its upstream takes requests again"
            return RateLimitedError(message, cause=cause, retry_after_s=retry_after_s)
        case "broken":
            return NoServiceError(
                f"{which} has failed too often: a breaker is open", cause=cause, retry_after_s=retry_after_s
            )
        case "tried":
            return NoServiceError(f"{which} that may serve was tried for this request", cause=cause)
        case "budget":
            return NoServiceError(f"the retries of {whose} are used up", cause=cause)
        case _:
            none = f"service {only} of {whose} is not active" if only else f"no service of {whose} is active"
            return NoServiceError(none, cause=cause)
