"""Deadlines of requests, cheap to make and to drop: most of them never come.

A timer of the loop costs some microseconds for each wait, and what is cancelled stays in the loop's heap. Here waits
are kept by the tick in which they end, and one timer looks at the tick that has come. A deadline is never early, and
late by a tick at most.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from types import TracebackType

_TICK_S = 0.05


class Deadlines:
    """All deadlines of one loop."""

    def __init__(self) -> None:
        self._ticks: dict[int, set[Deadline]] = {}
        self._seen = 0
        self._is_ticking = False

    def at(self, time_s: float, error: Callable[[], Exception]) -> Deadline:
        """A context that ends at a time of the monotonic clock, with an error that is made then."""
        return Deadline(self, time_s, error)

    def enter(self, deadline: Deadline, time_s: float) -> int:
        """Notes a deadline; the tick that it is kept under."""
        if not self._is_ticking:
            self._is_ticking = True
            self._seen = int(time.monotonic() / _TICK_S)
            asyncio.get_running_loop().call_later(_TICK_S, self._tick)
        tick = max(int(time_s / _TICK_S), self._seen) + 1
        waiting = self._ticks.get(tick)
        if waiting is None:
            self._ticks[tick] = {deadline}
        else:
            waiting.add(deadline)
        return tick

    def leave(self, deadline: Deadline, tick: int) -> None:
        """Forgets a deadline."""
        waiting = self._ticks.get(tick)
        if waiting is not None:
            waiting.discard(deadline)
            if not waiting:
                del self._ticks[tick]

    def _tick(self) -> None:
        now = int(time.monotonic() / _TICK_S)
        # After a long pause of the loop there are fewer ticks with deadlines than ticks.
        past = range(self._seen + 1, now + 1)
        for tick in past if len(past) < len(self._ticks) else sorted(t for t in self._ticks if t <= now):
            for deadline in self._ticks.pop(tick, ()):
                deadline.expire()
        self._seen = now
        self._is_ticking = bool(self._ticks)
        if self._is_ticking:
            asyncio.get_running_loop().call_later(_TICK_S, self._tick)


class Deadline:
    """Cancels what runs within it when the time comes, and raises its error instead, as asyncio.timeout does."""

    __slots__ = ("_cancelling", "_deadlines", "_error", "_has_expired", "_task", "_tick", "_time_s")

    def __init__(self, deadlines: Deadlines, time_s: float, error: Callable[[], Exception]) -> None:
        self._deadlines = deadlines
        self._time_s = time_s
        self._error = error
        self._has_expired = False

    def __enter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None, "what waits is a task"
        self._task = task
        self._cancelling = task.cancelling()
        self._tick = self._deadlines.enter(self, self._time_s)

    def expire(self) -> None:
        """The time has come."""
        self._has_expired = True
        self._task.cancel()

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self._has_expired:
            self._deadlines.leave(self, self._tick)
        elif self._task.uncancel() <= self._cancelling and kind is asyncio.CancelledError:
            raise self._error() from exc
