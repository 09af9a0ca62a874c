"""A fake account that can be told to misbehave, and keeps books of what it saw and what it reported.

`python -m benchmarks.chaos.account NAME BOOKS` prints its URL and ends with its stdin; a line there with the name of a
storm, or an empty one for none, it takes and answers `ok`. Every attempt has a serial number, which the account reports
as the attempt's cached tokens: so the store's history says which attempt of the account a settle belongs to.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import sys
import time
from enum import StrEnum
from pathlib import Path
from typing import Any

import msgspec

from tests.actors import Received, chunk, read_request, served

STAYS_SILENT = "stay silent"
STAYS_OPEN = "stay open"
"""What a client asks for that will leave: an account that reports no more usage, so that none is on its way then."""

THINKS_S = 0.01
"""Until the first byte of an answer."""
_BETWEEN_EVENTS_S = 0.02
_WORDS = 8
_LONGEST_S = 15.0
_RETRY_AFTER_S = "1"

Json = dict[str, Any]


class Storm(StrEnum):
    """What befalls every request to an account for a while."""

    NONE = ""
    RATE_LIMIT = "rate_limit"
    SERVER_ERROR = "server_error"
    STALL_HEADERS = "stall_headers"
    STALL_FIRST_BYTE = "stall_first_byte"
    STALL_STREAM = "stall_stream"
    CUT_STREAM = "cut_stream"


STORMS = tuple(storm for storm in Storm if storm)
BREAKS_STREAMS = frozenset({Storm.STALL_STREAM, Storm.CUT_STREAM})


class Begun(msgspec.Struct, frozen=True, tag="begun"):
    """An attempt that the account saw, at a monotonic time, and what befell it."""

    serial: int
    request_id: str
    service: str
    at: float
    storm: Storm


class Reported(msgspec.Struct, frozen=True, tag="reported"):
    """Tokens that the account reported for an attempt, beyond what it had reported before."""

    serial: int
    input: int
    output: int


class Attempt(msgspec.Struct):
    """An attempt by the account's books."""

    serial: int
    request_id: str
    service: str
    at: float
    storm: Storm
    input: int = 0
    output: int = 0
    has_usage: bool = False


def read_books(path: Path) -> list[Attempt]:
    """All attempts that an account has noted."""
    attempts: dict[int, Attempt] = {}
    decoder: msgspec.json.Decoder[Begun | Reported] = msgspec.json.Decoder(Begun | Reported)
    with path.open("rb") as file:
        for line in file:
            match decoder.decode(line):
                case Begun() as begun:
                    attempts[begun.serial] = Attempt(
                        begun.serial, begun.request_id, begun.service, begun.at, begun.storm
                    )
                case Reported() as reported:
                    attempt = attempts[reported.serial]
                    attempt.input += reported.input
                    attempt.output += reported.output
                    attempt.has_usage = True
    return list(attempts.values())


class _Books:
    """What is noted before anything of it is sent."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._encoder = msgspec.json.Encoder()
        self.serial = 0

    def note(self, line: Begun | Reported) -> None:
        """Appends a line."""
        os.write(self._fd, self._encoder.encode(line) + b"\n")


class Account:
    """One account; `storm` is what it does at the moment."""

    def __init__(self, name: str, books: Path) -> None:
        self._name = name
        self._books = _Books(books)
        self.storm = Storm.NONE

    async def connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answers requests until the caller leaves."""
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while request := await read_request(reader):
                await self._answer(request, reader, writer)
                await writer.drain()

    async def _answer(self, request: Received, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        body: Json = msgspec.json.decode(request.body)
        style = "anthropic" if request.target.startswith("/v1/messages") else "openai"
        self._books.serial += 1
        begun = Begun(
            serial=self._books.serial,
            request_id=request.header("x-request-id") or "",
            service=f"{self._name}-{style}:{body['model']}",
            at=time.monotonic(),
            storm=self.storm,
        )
        self._books.note(begun)
        wish = str(body["messages"][0]["content"])
        if begun.storm is Storm.STALL_HEADERS or wish.startswith(STAYS_SILENT):
            await _wait_until_left(reader)
        match begun.storm:
            case Storm.RATE_LIMIT:
                _send_error(writer, style, 429, f"{self._name} is told to limit", (("Retry-After", _RETRY_AFTER_S),))
                return
            case Storm.SERVER_ERROR:
                _send_error(writer, style, 500, f"{self._name} is told to fail")
                return
            case _:
                await asyncio.sleep(THINKS_S)
        tokens = (max(1, len(request.body) // 4), 2 + hashlib.sha256(request.body).digest()[0] % 30)
        answer = _openai if style == "openai" else _anthropic
        await answer(_Exchange(self._books, begun, body, tokens, reader, writer, wish.startswith(STAYS_OPEN)))


class _Exchange(msgspec.Struct, frozen=True):
    """One answer under way."""

    books: _Books
    begun: Begun
    body: Json
    tokens: tuple[int, int]
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    stays_open: bool

    def report(self, input_: int, output: int) -> None:
        """Notes what the next bytes will say."""
        self.books.note(Reported(self.begun.serial, input_, output))

    async def begin(self, length: int | None, first: bytes, usage: tuple[int, int] | None = None) -> None:
        """Sends the headers and the first bytes, which may report usage."""
        kind = "application/json" if length is not None else "text/event-stream"
        framing = f"Content-Length: {length}" if length is not None else "Transfer-Encoding: chunked"
        self.writer.write(f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\n{framing}\r\n\r\n".encode())
        if self.begun.storm is Storm.STALL_FIRST_BYTE:
            await _wait_until_left(self.reader)
        if usage:
            self.report(*usage)
        self.writer.write(first)
        await self.writer.drain()

    async def word(self, event: bytes) -> None:
        """Sends one event of the text."""
        await asyncio.sleep(_BETWEEN_EVENTS_S)
        self.writer.write(chunk(event))
        await self.writer.drain()

    async def befalls(self, half_sent: bytes = b"") -> None:
        """What befalls the answer in its middle. Raises ConnectionResetError when that is its end."""
        if self.begun.storm is Storm.STALL_STREAM:
            self.writer.write(half_sent)
            await _wait_until_left(self.reader)
        elif self.begun.storm is Storm.CUT_STREAM:
            self.writer.write(half_sent)
            raise ConnectionResetError

    async def linger(self, event: bytes) -> None:
        """Goes on with the text while the client stays, if it has said that it will leave."""
        until = time.monotonic() + (_LONGEST_S if self.stays_open else 0)
        while time.monotonic() < until:
            await self.word(event)

    async def send_json(self, value: Json) -> None:
        """A whole answer at once."""
        raw = msgspec.json.encode(value)
        if self.stays_open:
            await _wait_until_left(self.reader)
        if self.begun.storm not in BREAKS_STREAMS:
            await self.begin(len(raw), raw, self.tokens)
            return
        # What is broken in its middle has reported nothing: a usage in half a document is none.
        await self.begin(len(raw), raw[: len(raw) // 3])
        await self.befalls()
        raise ConnectionResetError

    def end(self) -> None:
        """Ends a stream properly."""
        self.writer.write(b"0\r\n\r\n")


async def _openai(exchange: _Exchange) -> None:
    given, made = exchange.tokens
    base: Json = {"id": "chatcmpl-fake", "created": 1_790_000_000, "model": exchange.begun.service.partition(":")[2]}
    usage = {
        "prompt_tokens": given,
        "completion_tokens": made,
        "total_tokens": given + made,
        "prompt_tokens_details": {"cached_tokens": exchange.begun.serial},
    }
    if not exchange.body.get("stream"):
        choice = {"index": 0, "message": {"role": "assistant", "content": "word " * _WORDS}, "finish_reason": "stop"}
        await exchange.send_json({**base, "object": "chat.completion", "choices": [choice], "usage": usage})
        return
    base |= {"object": "chat.completion.chunk"}

    def part(delta: Json, finish: str | None = None) -> bytes:
        return _data({**base, "choices": [{"index": 0, "delta": delta, "finish_reason": finish}], "usage": None})

    await exchange.begin(None, chunk(part({"role": "assistant", "content": ""})))
    word = part({"content": "word "})
    for _ in range(_WORDS // 2):
        await exchange.word(word)
    await exchange.befalls(b"2000\r\n" + word[:20])
    await exchange.linger(word)
    for _ in range(_WORDS // 2):
        await exchange.word(word)
    await exchange.word(part({}, "stop"))
    if (exchange.body.get("stream_options") or {}).get("include_usage"):
        exchange.report(given, made)
        exchange.writer.write(chunk(_data({**base, "choices": [], "usage": usage})))
    exchange.writer.write(chunk(b"data: [DONE]\n\n"))
    exchange.end()


async def _anthropic(exchange: _Exchange) -> None:
    given, made = exchange.tokens
    model = exchange.begun.service.partition(":")[2]
    base: Json = {"id": "msg_fake", "type": "message", "role": "assistant", "model": model, "stop_sequence": None}
    usage = {"input_tokens": given, "output_tokens": made, "cache_read_input_tokens": exchange.begun.serial}
    if not exchange.body.get("stream"):
        content = [{"type": "text", "text": "word " * _WORDS}]
        await exchange.send_json({**base, "content": content, "stop_reason": "end_turn", "usage": usage})
        return
    started = {**base, "content": [], "stop_reason": None, "usage": {**usage, "output_tokens": 1}}
    await exchange.begin(None, chunk(_event({"type": "message_start", "message": started})), (given, 1))
    block = {"type": "text", "text": ""}
    await exchange.word(_event({"type": "content_block_start", "index": 0, "content_block": block}))
    delta = {"type": "text_delta", "text": "word "}
    word = _event({"type": "content_block_delta", "index": 0, "delta": delta})
    for _ in range(_WORDS // 2):
        await exchange.word(word)
    await exchange.befalls(b"2000\r\n" + word[:20])
    await exchange.linger(word)
    for _ in range(_WORDS // 2):
        await exchange.word(word)
    await exchange.word(_event({"type": "content_block_stop", "index": 0}))
    exchange.report(0, made - 1)
    end = {"stop_reason": "end_turn", "stop_sequence": None}
    exchange.writer.write(
        chunk(_event({"type": "message_delta", "delta": end, "usage": {"output_tokens": made}}))
        + chunk(_event({"type": "message_stop"}))
    )
    exchange.end()


async def _wait_until_left(reader: asyncio.StreamReader) -> None:
    """Returns after the longest time. Raises ConnectionResetError when the caller has left."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(reader.read(1), _LONGEST_S)
        raise ConnectionResetError


def _send_error(
    writer: asyncio.StreamWriter, style: str, status: int, message: str, headers: tuple[tuple[str, str], ...] = ()
) -> None:
    kind = "rate_limit_error" if status == 429 else "api_error"
    error: Json = {"type": kind, "message": message}
    value: Json = {"type": "error", "error": error}
    if style == "openai":
        value = {"error": {**error, "code": None, "param": None}}
    raw = msgspec.json.encode(value)
    lines = [f"HTTP/1.1 {status} Told", "Content-Type: application/json", f"Content-Length: {len(raw)}"]
    lines += [f"{name}: {text}" for name, text in headers]
    writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + raw)


def _data(value: Json) -> bytes:
    return b"data: %b\n\n" % msgspec.json.encode(value)


def _event(value: Json) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (str(value["type"]).encode(), msgspec.json.encode(value))


async def main(name: str, books: str) -> None:
    """Serves until stdin ends."""
    account = Account(name, Path(books))
    async with served(account.connection) as port:
        print(f"http://127.0.0.1:{port}", flush=True)
        reader = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
        while line := await reader.readline():
            account.storm = Storm(line.decode().strip())
            print("ok", flush=True)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2]))
