"""A proxy between workers and Redis that does to the bytes what networks do: late, slow, lost, cut, or nothing."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import quote

_CHUNK = 65536


class FaultProxy:
    """Passes a unix socket on to another one, with the fault of the moment. `url` is where workers connect."""

    def __init__(self, upstream: str, path: Path) -> None:
        self._upstream = upstream.removeprefix("unix://")
        self._path = path
        self._pairs: set[tuple[asyncio.StreamWriter, asyncio.StreamWriter]] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._delay_s = 0.0
        self._bytes_per_s = 0.0
        self._is_open = asyncio.Event()
        self._loses_replies = False
        self._accepts = True
        self.passes()

    @property
    def url(self) -> str:
        """The proxy's own unix:// URL."""
        return f"unix://{quote(str(self._path))}"

    # -- what it does --------------------------------------------------------------------------------------------------

    def passes(self) -> None:
        """Everything goes through, at once."""
        self._delay_s = self._bytes_per_s = 0.0
        self._loses_replies = False
        self._accepts = True
        self._is_open.set()

    def delays(self, seconds: float) -> None:
        """Every part takes that much longer, both ways."""
        self._delay_s = seconds

    def drips(self, bytes_per_s: float) -> None:
        """Bytes come slowly."""
        self._bytes_per_s = bytes_per_s

    def blackholes(self) -> None:
        """Connections stay, and nothing comes through any more: neither bytes nor their end. Heals with `passes`."""
        self._is_open.clear()

    def loses_replies(self) -> None:
        """What is asked arrives, what is answered does not; the next `resets` makes that final."""
        self._loses_replies = True

    def refuses(self) -> None:
        """Every connection is cut, and new ones are refused."""
        self._accepts = False
        self.resets()

    def resets(self) -> None:
        """Every connection is cut, whatever was on its way."""
        for pair in list(self._pairs):
            for writer in pair:
                _reset(writer)

    # -- how -----------------------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[FaultProxy]:
        """Serves until the block ends."""
        server = await asyncio.start_unix_server(self._accept, str(self._path))
        try:
            yield self
        finally:
            server.close()
            self.passes()
            self.resets()
            for task in list(self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not self._accepts:
            _reset(writer)
            return
        try:
            up_reader, up_writer = await asyncio.open_unix_connection(self._upstream)
        except OSError:
            _reset(writer)
            return
        pair = (writer, up_writer)
        self._pairs.add(pair)
        ways = [
            asyncio.create_task(self._pipe(reader, up_writer, is_reply=False)),
            asyncio.create_task(self._pipe(up_reader, writer, is_reply=True)),
        ]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            await self._is_open.wait()
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            self._pairs.discard(pair)
            for end in pair:
                end.transport.abort()

    async def _pipe(self, source: asyncio.StreamReader, target: asyncio.StreamWriter, *, is_reply: bool) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await source.read(_CHUNK):
                if self._delay_s:
                    await asyncio.sleep(self._delay_s)
                if self._bytes_per_s:
                    await asyncio.sleep(len(data) / self._bytes_per_s)
                await self._is_open.wait()
                if not (is_reply and self._loses_replies):
                    target.write(data)
                    await target.drain()


def _reset(writer: asyncio.StreamWriter) -> None:
    sock = writer.get_extra_info("socket")
    if sock is not None:
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
