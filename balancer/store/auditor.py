"""Checks a pool in the background: its invariants, and every event recorded since, against the reference.

One auditor in the fleet at a time has the pool. It costs the others nothing, and its own worker a bounded part of its
loop: a pool that records faster than it can follow is checked from the next checkpoint on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from balancer import checkpoint, log
from balancer.audit import Checker
from balancer.errors import StoreUnavailableError
from balancer.store import history, keys
from balancer.store.history import Send
from balancer.store.slices import in_slices

_PAGE = 50
_PAUSE_S = 0.01
"""After each page, some 2 ms of work, the loop is free for this long at least."""


class Auditor:
    """Audits one pool as long as it runs; `violated` is told how many violations it has found."""

    def __init__(
        self, send: Send, pool: str, worker: str, interval_s: float, violated: Callable[[str, int], None]
    ) -> None:
        self._send = send
        self._pool = pool
        self._worker = worker
        self._interval_s = interval_s
        self._violated = violated
        self._checker: Checker | None = None
        self._last = history.FIRST

    async def run(self) -> None:
        """Audits once an interval while nobody else does, until cancelled."""
        while True:
            await asyncio.sleep(self._interval_s)
            try:
                if await self._has_the_pool():
                    await self.audit()
                else:
                    self._checker = None
            except StoreUnavailableError as exc:
                log.debug("could not audit", pool=self._pool, reason=exc.message)
                self._checker = None
            except (KeyError, ValueError) as exc:
                # A newer worker may write events that this one does not know.
                log.warning("cannot read the pool's history", pool=self._pool, reason=repr(exc))
                self._checker = None

    async def _has_the_pool(self) -> bool:
        """Takes the pool, or keeps it, for three intervals."""
        key, lease_ms = keys.auditor(self._pool), round(self._interval_s * 3000)
        if await self._send("SET", key, self._worker, "NX", "PX", lease_ms):
            return True
        if await self._send("GET", key) != self._worker.encode():
            return False
        await self._send("PEXPIRE", key, lease_ms)
        return True

    async def audit(self) -> int:
        """Checks what has happened since the last time; how many violations were found."""
        if self._checker is None:
            self._checker = Checker()
            self._last = await history.last_id(self._send, self._pool)
        state = await in_slices(checkpoint.reading(await history.checkpoint(self._send, self._pool)))
        found = 0
        if state.record == "off":
            wrong = await in_slices(checkpoint.checking(state.pool))
            found = len(wrong)
            if wrong:
                self._report(found, wrong[0])
            return found
        checker = self._checker
        before = checker.verdict.violation_count
        async for page in history.pages(self._send, self._pool, self._last, _PAGE):
            if not page.follows:
                checker.lose_track("the record was trimmed faster than it was read")
            for event in page.events:
                await in_slices(checker.feeding(event))
            self._last = page.last
            await asyncio.sleep(_PAUSE_S)
        found = checker.verdict.violation_count - before
        if found:
            self._report(found, str(checker.verdict.violations[0]))
            self._checker = None  # From the next checkpoint on.
        return found

    def _report(self, found: int, first: str) -> None:
        log.error("the pool's history is not what the reference makes of it", pool=self._pool, count=found, first=first)
        self._violated(self._pool, found)
