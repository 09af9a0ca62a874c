"""Clients by the thousand: one connection each, as little Python a request as there can be."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, Iterable

from benchmarks.growth.upstream import HOLD

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_END_OF_CHUNKS = b"0\r\n\r\n"
_TAIL = 64
_PATIENCE_S = 60.0


def request(path: str, body: bytes, **headers: str) -> bytes:
    """A POST as bytes; `x_some_thing` becomes the header `x-some-thing`."""
    lines = [f"POST {path} HTTP/1.1", "Host: b", "Content-Type: application/json", f"Content-Length: {len(body)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode() + body


def chat(model: str, *, holds: bool = False) -> bytes:
    """The body of a chat, streamed and held open if asked for."""
    text = HOLD.decode() if holds else "hello"
    stream = ',"stream":true,"stream_options":{"include_usage":true}' if holds else ""
    return f'{{"model":"{model}","messages":[{{"role":"user","content":"{text}"}}]{stream}}}'.encode()


class Answer:
    """An answer as far as it has come."""

    def __init__(self) -> None:
        self.begun: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.ended: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        """The body, of a stream its last bytes; with an exception when it breaks off."""
        self._head = b""
        self._tail = b""
        self._left = -1

    def feed(self, data: bytes) -> None:
        """Takes what has come."""
        if not self.begun.done():
            self._head += data
            end = self._head.find(b"\r\n\r\n")
            if end < 0:
                return
            length = _LENGTH.search(self._head, 0, end)
            data, self._left = self._head[end + 4 :], int(length[1]) if length else -1
            self.begun.set_result(int(self._head[9:12]))
        self._tail = self._tail + data if self._left >= 0 else (self._tail + data)[-_TAIL:]
        is_whole = len(self._tail) >= self._left if self._left >= 0 else self._tail.endswith(_END_OF_CHUNKS)
        if is_whole and not self.ended.done():
            self.ended.set_result(self._tail)

    def breaks_off(self) -> None:
        """The connection is gone."""
        for future in (self.begun, self.ended):
            if not future.done():
                future.set_exception(ConnectionResetError("the answer broke off"))
                future.exception()  # Nobody has to look.


class Client(asyncio.Protocol):
    """One connection."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._answer: Answer | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The transport is there."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Bytes of the answer under way."""
        if self._answer:
            self._answer.feed(data)

    def connection_lost(self, exc: Exception | None) -> None:
        """Whatever is under way breaks off."""
        if self._answer:
            self._answer.breaks_off()

    def send(self, raw: bytes) -> Answer:
        """Sends a request; one at a time."""
        assert self._transport is not None
        self._answer = Answer()
        if self._transport.is_closing():
            self._answer.breaks_off()
        self._transport.write(raw)
        return self._answer

    async def ask(self, raw: bytes) -> tuple[int, bytes]:
        """Status and body of an answer."""
        answer = self.send(raw)
        async with asyncio.timeout(_PATIENCE_S):
            body = await answer.ended
        return answer.begun.result(), body

    def leave(self) -> None:
        """Closes the connection at once."""
        if self._transport:
            self._transport.abort()


async def connected(port: int) -> Client:
    """A new connection."""
    _, client = await asyncio.get_running_loop().create_connection(Client, "127.0.0.1", port)
    return client


async def in_turns(count: int, width: int, work: Callable[[int], Awaitable[None]]) -> None:
    """Does the work for 0 to count - 1, so many at a time."""
    numbers = iter(range(count))

    async def one_after_the_other() -> None:
        for number in numbers:
            await work(number)

    await asyncio.gather(*(one_after_the_other() for _ in range(width)))


async def asked(port: int, raws: Iterable[bytes], width: int) -> dict[int, int]:
    """How often each status came, for requests over so many kept connections."""
    waiting, statuses = iter(raws), dict[int, int]()

    async def one_after_the_other() -> None:
        client = await connected(port)
        for raw in waiting:
            status, _ = await client.ask(raw)
            statuses[status] = statuses.get(status, 0) + 1
        client.leave()

    await asyncio.gather(*(one_after_the_other() for _ in range(width)))
    return statuses


async def latencies_ms(port: int, raw: bytes, count: int, pause_s: float) -> list[float]:
    """How long each of some requests took, on one connection, one after the other with pauses between."""
    client, found = await connected(port), []
    for _ in range(count):
        began = time.perf_counter()
        await client.ask(raw)
        found.append((time.perf_counter() - began) * 1000)
        await asyncio.sleep(pause_s)
    client.leave()
    return found
