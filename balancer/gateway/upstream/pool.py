"""The connections of one origin: who may open one, who gets the next that comes free.

The one used last is used next, so that those which are not needed end. As many as the limit allows are open; who
comes then waits, and is served in the order of coming.
"""

from __future__ import annotations

import asyncio
import select
from collections import deque
from collections.abc import Callable

from balancer.gateway.upstream.connection import Connection

_IDLE_S = 15.0
"""Kept for no longer: an upstream that ends an idle connection must not do so just when a request is sent on it."""
_LOOKS_S = 0.5
"""Idle for longer, a connection is looked at before it is used: the loop may not have seen its end yet."""


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

    def take(self, now: float) -> Connection | None:
        """An idle connection that can be used, if there is one."""
        while self._idle:
            connection = self._idle.pop()
            if connection.is_usable and (now - connection.idle_since < _LOOKS_S or not _has_news(connection)):
                return connection
            connection.drop()
        return None

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
            if not waiter.done() or waiter.cancelled():
                self._waiters.remove(waiter)
            elif (connection := waiter.result()) is None:
                self.leave()
            elif connection.is_usable:
                self.free(connection)
            raise

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

    def _next(self) -> asyncio.Future[Connection | None] | None:
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                return waiter
        return None


def _has_news(connection: Connection) -> bool:
    """True when something has come on it that nobody has asked for, its end above all."""
    assert connection.transport is not None, "a connection that is usable has a transport"
    poll = select.poll()
    poll.register(connection.transport.get_extra_info("socket").fileno(), select.POLLIN)
    return bool(poll.poll(0))
