"""An upstream that answers at once, or holds streams open and lets an event drip into each every few seconds.

`python -m benchmarks.growth.upstream` prints its URL and ends with its stdin. A request whose body has `HOLD` in it
gets a stream that stays open until a line `finish` comes; `books` prints how many requests of either kind it has seen.
An answer has an id of its own and reports `INPUT` and `OUTPUT` tokens.
"""

from __future__ import annotations

import asyncio
import re
import sys

from benchmarks.growth.files import raise_open_files
from tests.actors import chunk

HOLD = b"hold this stream"
INPUT, OUTPUT = 11, 7
DRIP_S = 3.0
_TICK_S = 0.02
_AT_ONCE = 40
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
_WORD = chunk(
    b'data: {"id":"c1","object":"chat.completion.chunk","created":1,"model":"m","choices":[{"index":0,"delta":'
    b'{"content":"word "},"finish_reason":null}],"usage":null}\n\n'
)
_USAGE = b'{"prompt_tokens":%d,"completion_tokens":%d,"total_tokens":%d}' % (INPUT, OUTPUT, INPUT + OUTPUT)
_END = (
    chunk(
        b'data: {"id":"c1","object":"chat.completion.chunk","created":1,"model":"m","choices":[],"usage":%b}\n\n'
        % _USAGE
    )
    + chunk(b"data: [DONE]\n\n")
    + b"0\r\n\r\n"
)
_CHAT = (
    b'{"id":"chatcmpl-%d","object":"chat.completion","created":1,"model":"m","choices":[{"index":0,"message":'
    b'{"role":"assistant","content":"hi"},"finish_reason":"stop"}],"usage":%b}'
)
_RESPONSE = (
    b'{"id":"resp_%d","object":"response","created_at":1,"status":"completed","error":null,"model":"m","output":[],'
    b'"usage":{"input_tokens":%d,"output_tokens":%d,"total_tokens":%d}}'
)


class Upstream:
    """All connections of the upstream, and its books."""

    def __init__(self) -> None:
        self.requests = 0
        self.streams = 0
        self.held: list[asyncio.Transport] = []

    def answer(self, target: bytes, body: bytes, transport: asyncio.Transport) -> None:
        """Answers one request."""
        if HOLD in body:
            self.streams += 1
            self.held.append(transport)
            transport.write(_STREAM_HEAD + _WORD)
            return
        self.requests += 1
        if b"/responses" in target:
            text = _RESPONSE % (self.requests, INPUT, OUTPUT, INPUT + OUTPUT)
        else:
            text = _CHAT % (self.requests, _USAGE)
        transport.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(text), text)
        )

    async def drip(self) -> None:
        """An event for each stream in `DRIP_S`, a few of them at a time, until cancelled."""
        turn = 0
        steps = round(DRIP_S / _TICK_S)
        while True:
            await asyncio.sleep(_TICK_S)
            turn = (turn + 1) % steps
            for transport in self.held[turn::steps]:
                transport.write(_WORD)

    async def finish(self) -> None:
        """Ends all streams properly, some after the others."""
        while self.held:
            for transport in self.held[:_AT_ONCE]:
                transport.write(_END)
            del self.held[:_AT_ONCE]
            await asyncio.sleep(_TICK_S)


class _Connection(asyncio.Protocol):
    def __init__(self, upstream: Upstream) -> None:
        self._upstream = upstream
        self._buffer = b""
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        if self._transport in self._upstream.held:
            self._upstream.held.remove(self._transport)

    def data_received(self, data: bytes) -> None:
        assert self._transport is not None
        self._buffer += data
        while (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            length = _LENGTH.search(self._buffer, 0, end)
            whole = end + 4 + (int(length[1]) if length else 0)
            if len(self._buffer) < whole:
                return
            target = self._buffer[: self._buffer.find(b"\r\n")]
            body, self._buffer = self._buffer[end + 4 : whole], self._buffer[whole:]
            self._upstream.answer(target, body, self._transport)


async def main() -> None:
    """Serves until stdin ends."""
    raise_open_files()
    upstream = Upstream()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: _Connection(upstream), "127.0.0.1", 0, backlog=1024)
    dripping = asyncio.create_task(upstream.drip())
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := (await reader.readline()).decode().strip():
        if line == "finish":
            await upstream.finish()
        print(f"{upstream.requests} {upstream.streams}", flush=True)
    dripping.cancel()
    server.close()


if __name__ == "__main__":
    asyncio.run(main())
