"""The connections of one origin: who may open one, who gets the next that comes free.

The one used last is used next, so that those which are not needed end. As many as the limit allows are open; who
comes then waits, and is served in the order of coming.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable

from balancer.errors import UpstreamError
from balancer.gateway.upstream.connection import Connection

_IDLE_S = 15.0
"""Kept for no longer: an upstream that ends an idle connection must not do so just when a request is sent on it."""


class Pool:
    """Connections of one origin. `emptied` is told when there is none any more, and nobody waits."""

    def __init__(self, loop: asyncio.AbstractEventLoop, limit: int, emptied: Callable[[Pool], None]) -> None:
        self.loop = loop
        self._limit = limit
        self._emptied = emptied
        self._idle: list[Connection] = []
        self._waiters: deque[asyncio.Future[Connection | None]] = deque()
        self._places = 0
        """Taken by connections that are open, or being opened."""

    @property
    def is_empty(self) -> bool:
        """True when it holds nothing, and nobody counts on it."""
        return not self._places

    def take(self) -> Connection | None:
        """An idle connection, if there is one."""
        return self._idle.pop() if self._idle else None

    def reserve(self) -> bool:
        """Takes a place for a new connection, if there is one."""
        if self._places >= self._limit:
            return False
        self._places += 1
        return True

    async def turn(self, *, again: bool = False) -> Connection | None:
        """Waits for one's turn: a connection, or None with a place for a new one. `again`: is the next in line."""
        waiter: asyncio.Future[Connection | None] = self.loop.create_future()
        if again:
            self._waiters.appendleft(waiter)
        else:
            self._waiters.append(waiter)
        try:
            return await waiter
        except asyncio.CancelledError:
            if waiter.cancelled():
                with contextlib.suppress(ValueError):  # `_next` may have passed over it already.
                    self._waiters.remove(waiter)
            elif waiter.exception() is None:
                self._give_back(waiter.result())
            raise

    def _give_back(self, turn: Connection | None) -> None:
        """What somebody was given who has left before knowing of it."""
        if turn is None:
            self.leave()
        elif turn.is_usable:  # Else it has left its place, or is about to.
            self.free(turn)

    def free(self, connection: Connection) -> None:
        """The connection can carry the next request."""
        now = self.loop.time()
        connection.idle_since = now
        connection.arm(now + _IDLE_S)
        if (waiter := self._next()) is not None:
            waiter.set_result(connection)
        else:
            self._idle.append(connection)

    def lose(self, connection: Connection) -> None:
        """The connection is gone, and leaves its place."""
        if connection in self._idle:
            self._idle.remove(connection)
        self.leave()

    def leave(self) -> None:
        """Gives a place back."""
        if (waiter := self._next()) is not None:
            waiter.set_result(None)
            return
        self._places -= 1
        if not self._places:
            self._emptied(self)

    def close(self, why: str) -> None:
        """Whoever waits is told why it is in vain."""
        while (waiter := self._next()) is not None:
            waiter.set_exception(UpstreamError(why, was_sent=False))

    def _next(self) -> asyncio.Future[Connection | None] | None:
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                return waiter
        return None
