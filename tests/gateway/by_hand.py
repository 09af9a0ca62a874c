"""An upstream whose sockets a test holds in its own hands, and what our client makes of what they do."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
import sys
from collections.abc import Awaitable, Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, Protocol

import msgspec

from balancer.dialects import Headers
from balancer.domain import Timeouts
from balancer.errors import UpstreamError
from balancer.gateway.messages import Upstream, UpstreamRequest, UpstreamResponse
from balancer.gateway.upstream import UpstreamClient

PATIENCE_S = 20.0
"""What takes longer hangs."""
NO_LIMITS: Mapping[str, float] = MappingProxyType({})


def a_client(connections_per_host: int = 8, ca_file: str = "") -> Upstream:
    """The client that workers use."""
    return UpstreamClient(connections_per_host, ca_file)


def a_request(
    url: str,
    *,
    method: str = "POST",
    headers: Headers = (),
    body: bytes = b"",
    proxy_url: str = "",
    limits: Mapping[str, float] = NO_LIMITS,
) -> UpstreamRequest:
    """A request whose limits in time are far away, but for those that are given."""
    parts = {**dict.fromkeys(("connect_s", "headers_s", "first_byte_s", "idle_s", "timeout_s"), PATIENCE_S), **limits}
    timeout_s = parts.pop("timeout_s")
    return UpstreamRequest(
        provider="up",
        method=method,
        url=url,
        headers=headers,
        body=body,
        proxy_url=proxy_url,
        timeouts=Timeouts(**parts),
        timeout_s=timeout_s,
    )


# -- the client's side -------------------------------------------------------------------------------------------------


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What came of a request. `error` is where it failed: `head` before there was an answer, `body` behind that."""

    status: int = 0
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = b""
    error: str = ""


class Body(Protocol):
    """What parts of a body are added to."""

    def extend(self, part: bytes, /) -> None:
        """One more part."""


Reader = Callable[[UpstreamResponse, Body], Awaitable[None]]
"""Reads an answer's body to its end."""


async def read_all(answer: UpstreamResponse, body: Body) -> None:
    """The body by `read`, each part as soon as it is there."""
    while part := await answer.read():
        body.extend(part)


def unframed(chunks: bytes) -> bytes:
    """The data in chunks that nobody could read differently; fails for any others (RFC 9112 §7.1)."""
    data = b""
    while chunks:
        line, _, rest = chunks.partition(b"\r\n")
        size = int(line, 16)
        assert line in (b"%x" % size, b"%X" % size)
        assert size, "the last chunk is not to be handed on: trailers may follow"
        assert rest[size : size + 2] == b"\r\n"
        data, chunks = data + rest[:size], rest[size + 2 :]
    return data


async def pump_all(answer: UpstreamResponse, body: Body) -> None:
    """The body by `pump`, every part taken."""

    def take(part: bytes, framed: bytes = b"", /) -> bool:
        assert not framed or unframed(framed) == part
        body.extend(part)
        return True

    assert await answer.pump(take) == b""


async def pump_some(answer: UpstreamResponse, body: Body) -> None:
    """The body by `pump`, where every second part is refused at first."""
    is_willing = False

    def take(part: bytes, framed: bytes = b"", /) -> bool:
        nonlocal is_willing
        assert not framed or unframed(framed) == part
        is_willing = not is_willing
        if is_willing:
            body.extend(part)
        return is_willing

    while part := await answer.pump(take):
        body.extend(part)


async def pump_and_read(answer: UpstreamResponse, body: Body) -> None:
    """The body by `pump` and `read` in turns: what is refused comes back, and the next part is read."""
    while part := await answer.pump(lambda *_: False):
        body.extend(part)
        part = await answer.read()
        if not part:
            return
        body.extend(part)


READERS: dict[str, Reader] = {
    "read": read_all,
    "pump": pump_all,
    "pump some": pump_some,
    "pump and read": pump_and_read,
}


async def ask(client: Upstream, request: UpstreamRequest, read: Reader = read_all) -> Outcome:
    """What comes of the request, the answer closed. Fails where it hangs."""
    body = bytearray()
    async with asyncio.timeout(PATIENCE_S):
        try:
            answer = await client.send(request)
        except UpstreamError:
            return Outcome(error="head")
        error = ""
        try:
            await read(answer, body)
        except UpstreamError:
            error = "body"
        finally:
            await answer.close()
    return Outcome(status=answer.status, headers=answer.headers, body=bytes(body), error=error)


# -- the upstream's side -----------------------------------------------------------------------------------------------


def open_sockets() -> int:
    """How many sockets this process has open."""
    count = 0
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            count += os.readlink(f"/proc/self/fd/{name}").startswith("socket:")
    return count


async def turns(count: int = 4) -> None:
    """Lets the loop turn, so that what was sent on loopback is received: a send is in the other's buffer at once."""
    for _ in range(count):
        await asyncio.sleep(0)


class Wire:
    """A connection as the upstream has it: nothing is read, sent or closed but by these methods."""

    def __init__(self, sock: socket.socket, number: int) -> None:
        self.number = number
        self.sock = sock
        self._received = bytearray()

    async def _fill(self) -> bool:
        try:
            data = await asyncio.get_running_loop().sock_recv(self.sock, 2**18)
        except ConnectionError:
            return False
        self._received += data
        return bool(data)

    def _taken(self, count: int) -> bytes:
        data = bytes(self._received[:count])
        del self._received[:count]
        return data

    async def receives(self, most: int = sys.maxsize) -> bytes:
        """Bytes that the client sent, b"" when it has closed the connection, however it did."""
        if not self._received:
            await self._fill()
        return self._taken(min(most, len(self._received)))

    async def head(self) -> bytes:
        """The next request's head, up to its empty line; b"" when the client has closed the connection before."""
        while (end := self._received.find(b"\r\n\r\n")) < 0:
            if not await self._fill():
                return b""
        return self._taken(end + 4)

    async def request(self) -> bytes:
        """The next request with its body, which has a length; b"" when the client has closed the connection before."""
        head = await self.head()
        length = 0
        for line in head.lower().split(b"\r\n"):
            if line.startswith(b"content-length:"):
                length = int(line.partition(b":")[2])
        while len(self._received) < length:
            if not await self._fill():
                return b""
        return head + self._taken(length)

    def sends(self, data: bytes) -> None:
        """Gives bytes to the network at once; they fit its buffer."""
        assert self.sock.send(data) == len(data)

    async def sends_all(self, data: bytes | memoryview) -> bool:
        """Sends much, as fast as the client reads; False when that has closed the connection."""
        try:
            await asyncio.get_running_loop().sock_sendall(self.sock, data)
        except ConnectionError:
            return False
        return True

    async def feeds(self, pieces: Iterable[bytes]) -> None:
        """Sends the pieces so that the client receives each of them on its own; it may close in between."""
        with contextlib.suppress(ConnectionError):
            for piece in pieces:
                self.sends(piece)
                await turns()

    def closes(self) -> None:
        """Ends the connection in order, if all was read."""
        self.sock.close()

    def stops_sending(self) -> None:
        """Ends its own side only."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_WR)

    def resets(self) -> None:
        """Breaks the connection."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    async def is_left(self) -> bool:
        """True as soon as the client has closed the connection; fails where it sends or stays."""
        async with asyncio.timeout(PATIENCE_S):
            data = await self.receives()
        assert data == b"", f"the client sent {data!r}"
        return True


class Listener:
    """A listening socket; `wires` has the connections that were accepted."""

    def __init__(self, backlog: int = 512) -> None:
        self._sock = socket.create_server(("127.0.0.1", 0), backlog=backlog)
        self._sock.setblocking(False)
        self._tasks: set[asyncio.Task[None]] = set()
        self.port: int = self._sock.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.wires: list[Wire] = []

    async def accept(self) -> Wire:
        """The next connection. Fails where none comes."""
        async with asyncio.timeout(PATIENCE_S):
            return await self._accept()

    async def _accept(self) -> Wire:
        sock, _ = await asyncio.get_running_loop().sock_accept(self._sock)
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.wires.append(Wire(sock, len(self.wires)))
        return self.wires[-1]

    def serve(self, behave: Callable[[Wire], Any]) -> None:
        """Gives every connection to `behave` from now on, and closes it behind that."""

        async def one(wire: Wire) -> None:
            try:
                await behave(wire)
            except ConnectionError:
                pass  # The client left.
            finally:
                wire.closes()

        async def accept() -> None:
            while True:
                wire = await self._accept()
                self._start(one(wire))

        self._start(accept())

    def _start(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Ends the serving and closes every socket. Raises what a behaviour raised."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        self._sock.close()
        for wire in self.wires:
            wire.closes()
        for end in ends:
            if isinstance(end, BaseException) and not isinstance(end, asyncio.CancelledError):
                raise end
