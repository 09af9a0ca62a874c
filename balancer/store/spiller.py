"""When an outbox goes to disk, and who replays what a dead process left there.

**Going.** A look every 50 ms. What Redis has left unanswered for three looks, that is 100 to 150 ms, is written, and so
is everything that is settled from then on, look by look, until all is acknowledged; at the end of a process, whatever
is left. Looks are counted, not milliseconds, so that a loop which was held up does not take its own delay for an
outage. While Redis answers, nothing is written, and no file is opened. The writing is done in a thread, one write and
one fsync a look at most: a worker that is killed loses what it settled since the last look but one, a machine that
loses power no more than that. A disk that refuses is tried again every second; the entries stay in memory meanwhile.

**Bounded.** Entries are not added up: each has an attempt's number, under which settle releases what the attempt
holds, takes back what was counted as lost, and takes a position of its own in the pool's history. A sum of entries
could do none of that, and a list of numbers in its place would grow as the entries do. So beyond
BALANCER_OUTBOX_MAX_ENTRIES the later half of what is written leaves memory (but for some 150 bytes a batch, of which an
outage makes at most one a look) and is read back, a segment a look, when its turn to be sent comes. Without a folder
entries stay in memory all the same, since dropping them would break the account; the log says so.

**Replay.** Every few seconds each worker tries the locks of the folders of its pool. One that is free belongs to a
process that is gone: its batches are sent under its own worker id and numbers, in order, one at a time, so that the
settles of the living are not held up. Numbers make repetition harmless: what was applied before its worker saw the
answer, or is sent by two processes after all, counts once. The last batch ends the dead worker's lease, and what the
worker left open is reaped at once. Redis remembers a worker's last number for seven days. A folder that is older cannot
be told from one that was applied already; it is set aside.
"""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Protocol

from balancer import log
from balancer.errors import StoreUnavailableError
from balancer.store.settlement import Batch, Outbox, TimedEntries
from balancer.store.spill import Spill, folders

LOOK_S = 0.05
_LOOKS = 3
_REPLAY_S = 3.0
_DISK_RETRY_S = 1.0
_WARN_S = 60.0
_CLOSE_S = 5.0
_REMEMBERED_S = 7 * 86_400 - 3600
"""A little less than the life of a worker's holdings in Redis."""


class Spiller:
    """Keeps an outbox's unacknowledged batches on disk while Redis does not answer."""

    def __init__(
        self,
        outbox: Outbox,
        root: Path,
        pool: str,
        worker: str,
        *,
        on_loaded: Callable[[], None],
        on_lost: Callable[[int], None],
    ) -> None:
        self._outbox = outbox
        self._root = root
        self._pool = pool
        self._worker = worker
        self._spill = Spill(root, pool, worker)
        self._on_loaded = on_loaded
        self._on_lost = on_lost
        self._added: deque[int] = deque([0] * (_LOOKS - 1), maxlen=_LOOKS - 1)
        self._warned_at = float("-inf")
        self._is_closing = False

    async def run(self) -> None:
        """Looks until `close`."""
        while not self._is_closing:
            await asyncio.sleep(LOOK_S)
            try:
                await self._look()
            except OSError as exc:
                self._warn(exc)
                await asyncio.sleep(_DISK_RETRY_S)
            except Exception as exc:  # noqa: BLE001  a task's root: the next look may fare better
                log.error("the outbox cannot be spilled", exc=exc, pool=self._pool)
                await asyncio.sleep(_DISK_RETRY_S)

    async def _look(self) -> None:
        outbox = self._outbox
        applied = outbox.added - len(outbox)
        is_late = applied < self._added[0]
        self._added.append(outbox.added)
        if is_late or (len(outbox) and not self._spill.is_empty):
            await self._write()
        if not self._spill.is_empty:
            await asyncio.to_thread(self._spill.drop, outbox.acknowledged)
        if outbox.starved_of:
            await self._read_back(outbox.starved_of)

    async def _write(self) -> None:
        self._outbox.number()
        batches = self._outbox.unspilled()
        if not batches:
            return
        is_written = await asyncio.to_thread(self._append, batches)
        if is_written:
            self._outbox.spilled(batches)

    def _append(self, batches: list[Batch]) -> bool:
        if not self._spill.lock():
            return False  # Somebody looks at the new folder just now, and finds nothing in it.
        self._spill.append(batches)
        return True

    async def _read_back(self, number: int) -> None:
        first, last, found = await asyncio.to_thread(self._spill.fetch, number)
        missing = self._outbox.load(first, last, found)
        if missing:
            log.warning("spilled batches cannot be read back", pool=self._pool, batches=missing)
            self._on_lost(missing)
        self._on_loaded()

    def _warn(self, exc: OSError) -> None:
        if time.monotonic() - self._warned_at > _WARN_S:
            self._warned_at = time.monotonic()
            log.warning("the outbox cannot use its disk", pool=self._pool, folder=str(self._root), reason=exc.strerror)

    async def close(self, running: asyncio.Task[None]) -> bool:
        """Ends `run`, writes what is not acknowledged, or removes the folder; True if nothing is in memory alone."""
        self._is_closing = True
        try:
            async with asyncio.timeout(_CLOSE_S):
                await running
                if len(self._outbox):
                    await self._write()
                    self._spill.release()
                else:
                    await asyncio.to_thread(self._spill.remove)
        except (OSError, TimeoutError) as exc:
            log.warning("the outbox cannot use its disk", pool=self._pool, reason=str(exc) or "it takes too long")
        return not self._outbox.unspilled()


class Settle(Protocol):
    """How a replay reaches Redis."""

    def __call__(self, worker: str, batch: Batch, *, is_last: bool) -> Awaitable[int]:
        """Applies a batch of a worker that is gone; the number of its last one that Redis has applied then."""


class Replayer:
    """Hands in what processes that are gone have left on disk for one pool."""

    def __init__(self, root: Path, pool: str, settle: Settle, on_lost: Callable[[int], None]) -> None:
        self._root = root
        self._pool = pool
        self._settle = settle
        self._on_lost = on_lost
        self._complained: set[str] = set()

    async def run(self, is_up: asyncio.Event) -> None:
        """Looks for folders without an owner, again and again, until cancelled."""
        while True:
            await is_up.wait()
            try:
                await self.replay_all()
            except StoreUnavailableError as exc:
                log.debug("a replay was cut short", pool=self._pool, reason=exc.message)
            except Exception as exc:  # noqa: BLE001  a task's root: nothing in a file may end the replays
                log.error("spilled outboxes cannot be replayed", exc=exc, pool=self._pool)
            await asyncio.sleep(_REPLAY_S)

    async def replay_all(self) -> None:
        """Replays every folder of the pool that has no owner; one that cannot be read is passed over, with a warning.

        Raises StoreUnavailableError; then the rest is for the next call.
        """
        for pool, worker in await asyncio.to_thread(folders, self._root):
            if pool != self._pool:
                continue
            spill = Spill(self._root, pool, worker)
            try:
                if await asyncio.to_thread(spill.lock):
                    await self._replay(spill)
                    await asyncio.to_thread(spill.remove)
            except OSError as exc:
                if worker not in self._complained:
                    self._complained.add(worker)
                    log.warning("a spilled outbox cannot be read", pool=pool, worker=worker, reason=exc.strerror)
            finally:
                spill.release()

    async def _replay(self, spill: Spill) -> None:
        places = await asyncio.to_thread(spill.index)
        numbers = sorted(places)
        if spill.newest_age_s > _REMEMBERED_S:
            await asyncio.to_thread(spill.set_all_aside, "old", "older than what Redis remembers of its worker")
            self._lost(spill, len(numbers))
            return
        path: Path | None = None
        batches: dict[int, TimedEntries] = {}
        applied: int | None = None
        at = len(numbers) - 1  # The last one first: a gap changes nothing, and tells where Redis is.
        while 0 <= at < len(numbers):
            number = numbers[at]
            if places[number] != path:
                path = places[number]
                batches = await asyncio.to_thread(spill.read, path)
            content = batches.get(number, ())
            missing = 0 if applied is None else number - applied - 1
            batch = Batch(number=number, entries=content, count=len(content), skips=missing > 0)
            applied = await self._settle(spill.worker, batch, is_last=number == numbers[-1])
            if applied >= number:
                self._lost(spill, missing)
            at = bisect_right(numbers, applied)
        if numbers:
            log.info("replayed a spilled outbox", pool=self._pool, worker=spill.worker, batches=len(numbers))

    def _lost(self, spill: Spill, batches: int) -> None:
        if batches:
            log.warning("settled batches are no longer held", pool=self._pool, worker=spill.worker, batches=batches)
            self._on_lost(batches)
