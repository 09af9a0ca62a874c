"""Addresses of hosts, asked for once where many connections to a host are opened together."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

_KEPT_S = 10.0
_KEPT = 256

Addresses = list[tuple[int, int, int, str, Any]]


class Names:
    """The name service's answers, kept for a few seconds."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, int], tuple[float, Addresses]] = {}
        self._asked: dict[tuple[str, int], asyncio.Task[Addresses]] = {}

    async def addresses(self, host: str, port: int) -> Addresses:
        """The host's addresses, as getaddrinfo orders them. Raises OSError."""
        if ":" in host or host.replace(".", "").isdigit():
            return _plain(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST))
        loop, key = asyncio.get_running_loop(), (host, port)
        until, known = self._known.get(key, (0.0, []))
        if loop.time() < until:
            return known
        asked = self._asked.get(key)
        if asked is None:
            asked = self._asked[key] = loop.create_task(self._ask(loop, key))
            asked.add_done_callback(lambda task: task.cancelled() or task.exception())  # Those who asked may have left.
        try:
            return await asyncio.shield(asked)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if asked.cancelled() and not (task and task.cancelling()):
                raise ConnectionAbortedError("the look-up was ended") from None
            raise

    def close(self) -> None:
        """Ends the look-ups that are under way."""
        for asked in self._asked.values():
            asked.cancel()

    async def _ask(self, loop: asyncio.AbstractEventLoop, key: tuple[str, int]) -> Addresses:
        try:
            found = _plain(await loop.getaddrinfo(*key, type=socket.SOCK_STREAM))
        finally:
            del self._asked[key]
        if len(self._known) >= _KEPT:
            self._known.clear()
        self._known[key] = (loop.time() + _KEPT_S, found)
        return found


def _plain(found: Any) -> Addresses:
    return [(int(family), int(kind), proto, name, address) for family, kind, proto, name, address in found]
