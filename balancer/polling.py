"""A loop of asyncio's that hands readable sockets to whom they belong at once.

asyncio's own way from the kernel's answer to a protocol makes a list of what is ready, a callback for each entry, and
runs them in its next turn: two microseconds, which is as much as all that is done with an event of a stream here.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import select
import selectors
from collections.abc import Callable, Iterator, Mapping
from typing import Any

_MOST = 1024
"""So many sockets are heard of in one turn at most."""
READ_BYTES = 64 * 1024
"""So much is read at once."""
_READ, _WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE

Readers = dict[int, Callable[[], None]]
"""Whom to call when there is something to be read, by file descriptor. They must not raise."""


class Poller(selectors.BaseSelector):
    """A selector (epoll) that calls the `readers` itself; of all else it tells the loop.

    Who is in `readers` is registered by the loop all the same: the loop decides what is waited for, and is told of
    ends and errors.
    """

    def __init__(self) -> None:
        self.readers: Readers = {}
        self._epoll = select.epoll()
        self._keys: dict[int, selectors.SelectorKey] = {}
        self._map = _Map(self._keys)

    def fileno(self) -> int:
        """Its own descriptor."""
        return self._epoll.fileno()

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        """Waits for these events from now on."""
        fd = _fd_of(fileobj)
        if fd in self._keys:
            raise KeyError(f"{fileobj!r} is registered already")
        key = selectors.SelectorKey(fileobj, fd, events, data)
        self._epoll.register(fd, _mask(events))
        self._keys[fd] = key
        return key

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        """Waits for nothing any more."""
        key = self._keys.pop(_fd_of(fileobj))
        with contextlib.suppress(OSError):  # It was closed before.
            self._epoll.unregister(key.fd)
        return key

    def modify(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        """Waits for other events, or with other data."""
        fd = _fd_of(fileobj)
        if events != self._keys[fd].events:
            self._epoll.modify(fd, _mask(events))
        key = self._keys[fd] = selectors.SelectorKey(fileobj, fd, events, data)
        return key

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """What is ready and was not handed to a reader, after `timeout` seconds at the latest (None: whenever)."""
        if timeout is None:
            wait = -1.0
        elif timeout <= 0:
            wait = 0.0
        else:
            wait = math.ceil(timeout * 1000) / 1000  # The kernel counts in milliseconds: never too early.
        keys, reader_of = self._keys, self.readers.get
        ready = []
        for fd, event in self._epoll.poll(wait, min(len(keys), _MOST) or 1):
            if event == select.EPOLLIN and (reader := reader_of(fd)) is not None:
                reader()
            elif (key := keys.get(fd)) is not None:
                # Ends and errors wake readers and writers.
                events = (_READ if event & ~select.EPOLLOUT else 0) | (_WRITE if event & ~select.EPOLLIN else 0)
                ready.append((key, events & key.events))
        return ready

    def close(self) -> None:
        """Ends it."""
        self._keys.clear()
        self.readers.clear()
        self._epoll.close()

    def get_key(self, fileobj: Any) -> selectors.SelectorKey:
        """What was registered. Raises KeyError."""
        return self._keys[_fd_of(fileobj)]

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        """All that is registered."""
        return self._map


class _Map(Mapping[Any, selectors.SelectorKey]):
    def __init__(self, keys: dict[int, selectors.SelectorKey]) -> None:
        self._keys = keys

    def __getitem__(self, fileobj: Any) -> selectors.SelectorKey:
        return self._keys[_fd_of(fileobj)]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


class Loop(asyncio.SelectorEventLoop):
    """asyncio's loop on a Poller, whose readers are `readers`."""

    def __init__(self) -> None:
        poller = Poller()
        super().__init__(poller)
        self.readers = poller.readers


class DirectSocket:
    """A plain transport's socket, read and written in its stead until its end, which is the loop's to see."""

    __slots__ = ("_fd", "_readers", "_receive", "_transport")

    def __init__(
        self, readers: Readers, fd: int, transport: asyncio.Transport, receive: Callable[[bytes], None]
    ) -> None:
        self._readers = readers
        self._fd = fd
        self._transport = transport
        self._receive = receive
        readers[fd] = self.read

    def read(self) -> None:
        """Hands on what has come."""
        try:
            data = os.read(self._fd, READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            # The kernel tells of an error once: what the loop would read behind it looks like an end in order.
            self.leave()
            self._transport.abort()
            return
        if not data:
            self.leave()
            return
        try:
            self._receive(data)
        except Exception as exc:  # noqa: BLE001 - as the loop does: the connection ends, and all others live on.
            context = {
                "message": "what was received could not be taken",
                "exception": exc,
                "transport": self._transport,
            }
            asyncio.get_running_loop().call_exception_handler(context)
            self.leave()
            self._transport.close()

    def write(self, *parts: bytes) -> bool:
        """Writes the parts, which saves joining them; False, with nothing written, where that is for the transport.

        What the kernel does not take is left to the transport, and so is finding out why it takes none.
        """
        transport = self._transport
        if transport.get_write_buffer_size() or transport.is_closing():
            return False
        try:
            sent = os.writev(self._fd, parts)
        except OSError:
            return False
        if sent < sum(map(len, parts)):
            transport.write(b"".join(parts)[sent:])
        return True

    def leave(self) -> None:
        """Leaves all that comes to the loop from now on. To be called before the socket is closed."""
        if self._readers.get(self._fd) == self.read:
            del self._readers[self._fd]


def direct_socket(transport: asyncio.Transport, receive: Callable[[bytes], None]) -> DirectSocket | None:
    """Reads the transport's socket in its stead from now on; None where that cannot be: in TLS, on another loop."""
    loop = asyncio.get_running_loop()
    sock = transport.get_extra_info("socket")
    if not isinstance(loop, Loop) or sock is None or transport.get_extra_info("sslcontext") is not None:
        return None
    return DirectSocket(loop.readers, sock.fileno(), transport, receive)


def new_event_loop() -> asyncio.AbstractEventLoop:
    """A Loop; asyncio's usual one where there is no epoll."""
    return Loop() if hasattr(select, "epoll") else asyncio.new_event_loop()


def _fd_of(fileobj: Any) -> int:
    return fileobj if isinstance(fileobj, int) else int(fileobj.fileno())


def _mask(events: int) -> int:
    return (select.EPOLLIN if events & _READ else 0) | (select.EPOLLOUT if events & _WRITE else 0)
