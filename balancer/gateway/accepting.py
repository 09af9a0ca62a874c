"""New connections of a listening socket, many in one turn of the loop.

uvloop accepts one connection a turn, and a turn is long when hundreds of requests are open: the last of a burst of
connections would wait for hundreds of turns.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable

from balancer import log

_A_TURN = 64
_RETRY_S = 1.0


class Acceptor:
    """Accepts connections until it is closed."""

    def __init__(
        self,
        listener: socket.socket,
        protocol: Callable[[], asyncio.BaseProtocol],
        tls: ssl.SSLContext | None,
        backlog: int,
    ) -> None:
        self._listener = listener
        self._protocol = protocol
        self._tls = tls
        self._loop = asyncio.get_running_loop()
        self._connecting: set[asyncio.Task[None]] = set()
        self._retry: asyncio.TimerHandle | None = None
        listener.setblocking(False)
        # Connections inherit it.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        listener.listen(backlog)
        self._loop.add_reader(listener, self._accept)

    def close(self) -> None:
        """Closes the socket; accepted connections go on."""
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None
        else:
            self._loop.remove_reader(self._listener)
        self._listener.close()

    def _accept(self) -> None:
        for _ in range(_A_TURN):
            try:
                connection, _address = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as exc:
                # Most often no file descriptor is left. The connection stays in the queue: we would be called at once.
                log.error("no connection can be accepted", reason=exc.strerror, retry_s=_RETRY_S)
                self._loop.remove_reader(self._listener)
                self._retry = self._loop.call_later(_RETRY_S, self._go_on)
                return
            connection.setblocking(False)
            task = self._loop.create_task(self._connect(connection))
            self._connecting.add(task)
            task.add_done_callback(self._connecting.discard)

    def _go_on(self) -> None:
        self._retry = None
        self._loop.add_reader(self._listener, self._accept)

    async def _connect(self, connection: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(self._protocol, connection, ssl=self._tls)
        except (OSError, TimeoutError) as exc:
            # Gone already, or no TLS that we speak: nobody is left to be told.
            log.debug("a connection came to nothing", error=type(exc).__name__)
            connection.close()
