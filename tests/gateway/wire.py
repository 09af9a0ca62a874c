"""Both ends of the wire as bytes: a client that sends what it likes, and an upstream that notes what it gets."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import re
import ssl
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import cast

import msgspec

from tests.actors import OPENAI_JSON, served

CHAT = "/v1/chat/completions"
PATIENCE_S = 10.0


class Answer(msgspec.Struct, frozen=True):
    """An answer as its bytes came; `is_whole` is false when it broke off."""

    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes
    is_whole: bool = True

    def header(self, name: str) -> str | None:
        """The first value of a header, None when absent."""
        return next((value for key, value in self.headers if key.lower() == name.lower()), None)


_STATUS_LINE = re.compile(rb"HTTP/1\.[01] ([1-9][0-9]{2}) [\x20-\x7e]*")
_FIELD = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+): ?((?:[\x21-\x7e\x80-\xff](?:[\x20-\x7e\t\x80-\xff]*))?)")


def answers_in(held: bytes) -> list[Answer]:
    """The answers that a connection's bytes are, read strictly: what is no answer fails the test."""
    return list(_answers_in(held))


def _answers_in(held: bytes) -> Iterator[Answer]:
    while held:
        head, end, rest = held.partition(b"\r\n\r\n")
        first, *lines = head.split(b"\r\n")
        line = _STATUS_LINE.fullmatch(first)
        assert end, f"half a head: {held[:200]!r}"
        assert line, f"no status line: {first[:200]!r}"
        status, headers = int(line[1]), _fields(lines)
        names = [name.lower() for name, _ in headers]
        assert names.count("content-length") + names.count("transfer-encoding") <= 1, headers
        values = {name.lower(): value for name, value in headers}
        if status < 200 or status in (204, 304):
            yield Answer(status, headers, b"")
            held = rest
        elif "transfer-encoding" in values:
            assert values["transfer-encoding"] == "chunked"
            body, is_whole, held = _unchunked(rest)
            yield Answer(status, headers, body, is_whole)
        else:
            length = int(values.get("content-length", len(rest)))
            yield Answer(status, headers, rest[:length], len(rest) >= length)
            held = rest[length:]


def _fields(lines: Sequence[bytes]) -> tuple[tuple[str, str], ...]:
    fields = []
    for line in lines:
        match = _FIELD.fullmatch(line)
        assert match, f"no header: {line[:200]!r}"
        fields.append((match[1].decode(), match[2].decode("latin-1").rstrip()))
    return tuple(fields)


def _unchunked(held: bytes) -> tuple[bytes, bool, bytes]:
    """The body of a chunked answer, whether its last chunk came, and what follows."""
    body, at = bytearray(), 0
    while (end := held.find(b"\r\n", at)) >= 0:
        assert re.fullmatch(rb"[0-9a-fA-F]+", held[at:end]), f"no chunk size: {held[at:end][:200]!r}"
        size = int(held[at:end], 16)
        body += held[end + 2 : end + 2 + size]
        at = end + 2 + size + 2
        if size == 0:
            return bytes(body), True, held[at:]
    return bytes(body), False, b""


# -- a client ----------------------------------------------------------------------------------------------------------


class Line(asyncio.Protocol):
    """A client's end of a connection: keeps what comes in `held`, and `closed` is done when the other side closed."""

    def __init__(self) -> None:
        self.held = bytearray()
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is one by its methods only.

    def data_received(self, data: bytes) -> None:
        self.held += data

    def eof_received(self) -> bool | None:
        if not self.closed.done():
            self.closed.set_result(None)
        return None

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.closed.done():
            self.closed.set_result(None)

    async def send(self, *pieces: bytes) -> None:
        """Sends the pieces so that the other side, in this very loop, reads one after the other."""
        for piece in pieces:
            if self.transport.is_closing():
                return
            self.transport.write(piece)
            await asyncio.sleep(0)
            await asyncio.sleep(0)

    async def until_closed(self, patience_s: float = PATIENCE_S) -> bool:
        """True once the other side has closed, False if it never does."""
        await asyncio.wait({self.closed}, timeout=patience_s)
        return self.closed.done()

    async def until(self, words: bytes, patience_s: float = PATIENCE_S) -> None:
        """Waits until the words have come. Raises TimeoutError, or ConnectionError where they cannot come any more."""
        async with asyncio.timeout(patience_s):
            while words not in self.held:
                if self.closed.done():
                    raise ConnectionResetError(f"closed behind {bytes(self.held[-200:])!r}")
                await asyncio.sleep(0.001)


@contextlib.asynccontextmanager
async def a_line(url: str, tls: ssl.SSLContext | None = None) -> AsyncIterator[Line]:
    """A connection to a gateway; cut at the end, if it still stands."""
    host, _, port = url.partition("://")[2].partition(":")
    _, line = await asyncio.get_running_loop().create_connection(
        Line, host, int(port), ssl=tls, server_hostname="localhost" if tls else None
    )
    try:
        yield line
    finally:
        line.transport.abort()
        await line.until_closed()


def in_pieces(data: bytes, delivery: str) -> list[bytes]:
    """The same bytes whole, as single `bytes`, or in `cuts` at random places, always the same ones."""
    match delivery:
        case "bytes":
            return [data[at : at + 1] for at in range(len(data))]
        case "cuts":
            rng = random.Random(data)
            places = sorted({0, len(data), *(rng.randrange(len(data)) for _ in range(4))})
            return [data[start:end] for start, end in itertools.pairwise(places)]
        case _:
            return [data]


# -- an upstream -------------------------------------------------------------------------------------------------------

_REQUEST_LINE = re.compile(rb"(POST) (/[\x21-\x7e]*) HTTP/1\.1")
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(OPENAI_JSON)


class Sent(msgspec.Struct, frozen=True):
    """A request that reached the upstream."""

    target: str
    headers: tuple[tuple[str, str], ...]
    body: bytes


class Recorder:
    """An upstream that reads strictly; `faults` has what was no request, `sent` what was one."""

    def __init__(self) -> None:
        self.sent: list[Sent] = []
        self.total = 0
        """How many requests came, whatever became of `sent`."""
        self.faults: list[bytes] = []
        self.scripted: list[bytes] = []
        """What it sends for the next requests, before it closes; all others get an ordinary answer."""
        self.url = ""

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Recorder]:
        """Serves on a free port until the block ends."""
        async with served(self._connection) as port:
            self.url = f"http://127.0.0.1:{port}"
            yield self

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while sent := await self._request(reader):
                self.sent.append(sent)
                self.total += 1
                if self.scripted:
                    writer.write(self.scripted.pop(0))
                    await writer.drain()
                    return
                writer.write(ANSWER + OPENAI_JSON)
                await writer.drain()

    async def _request(self, reader: asyncio.StreamReader) -> Sent | None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError as exc:
            if exc.partial:
                self.faults.append(exc.partial)
            return None
        first, *lines = head[:-4].split(b"\r\n")
        fields = [_FIELD.fullmatch(line) for line in lines]
        names = [field[1].lower() for field in fields if field]
        line = _REQUEST_LINE.fullmatch(first)
        if not line or None in fields or names.count(b"host") != 1 or b"transfer-encoding" in names:
            self.faults.append(head)
            return None
        lengths = [field[2] for field in fields if field and field[1].lower() == b"content-length"]
        if len(lengths) != 1 or not re.fullmatch(rb"[0-9]+", lengths[0]):
            self.faults.append(head)
            return None
        try:
            body = await reader.readexactly(int(lengths[0]))
        except asyncio.IncompleteReadError as exc:
            self.faults.append(head + exc.partial)
            return None
        headers = tuple((field[1].decode(), field[2].decode("latin-1")) for field in fields if field)
        return Sent(line[2].decode(), headers, body)
