"""Actors for tests: upstreams and proxies on loopback that do exactly what a test tells them."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable

import msgspec

OPENAI_JSON = (
    b'{"id":"c1","object":"chat.completion","created":1,"model":"up-model","choices":[{"index":0,"message":'
    b'{"role":"assistant","content":"hi"},"finish_reason":"stop"}],"usage":{"prompt_tokens":11,"completion_tokens":7,'
    b'"total_tokens":18}}'
)


class Received(msgspec.Struct, frozen=True, kw_only=True):
    """A request as its bytes came."""

    method: str
    target: str
    headers: tuple[tuple[str, str], ...]
    body: bytes

    def header(self, name: str) -> str | None:
        """The first value of a header, None when absent."""
        return next((value for key, value in self.headers if key.lower() == name.lower()), None)


Behaviour = Callable[["Upstream", asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunk(data: bytes) -> bytes:
    """A chunk of a chunked body."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def openai_events(words: int = 3, usage: tuple[int, int] | None = (11, 7)) -> list[bytes]:
    """The events of an OpenAI stream."""
    events = [
        b'data: {"id":"c1","model":"up-model","choices":[{"index":0,"delta":{"content":"w%d"}}]}\n\n' % i
        for i in range(words)
    ]
    if usage:
        events.append(
            b'data: {"id":"c1","model":"up-model","choices":[],"usage":{"prompt_tokens":%d,"completion_tokens":%d}}\n\n'
            % usage
        )
    return [*events, b"data: [DONE]\n\n"]


def anthropic_events(words: int = 3, usage: tuple[int, int] = (11, 7)) -> list[bytes]:
    """The events of an Anthropic stream."""

    def event(name: str, rest: bytes) -> bytes:
        return b'event: %b\ndata: {"type":"%b"%b}\n\n' % (name.encode(), name.encode(), rest)

    start = (
        b',"message":{"id":"m1","type":"message","role":"assistant","model":"up-model","content":[],'
        b'"usage":{"input_tokens":%d,"output_tokens":1}}'
    )
    return [
        event("message_start", start % usage[0]),
        event("content_block_start", b',"index":0,"content_block":{"type":"text","text":""}'),
        *(
            event("content_block_delta", b',"index":0,"delta":{"type":"text_delta","text":"w%d"}' % i)
            for i in range(words)
        ),
        event("content_block_stop", b',"index":0'),
        event("message_delta", b',"delta":{"stop_reason":"end_turn"},"usage":{"output_tokens":%d}' % usage[1]),
        event("message_stop", b""),
    ]


def responses_events(response_id: str = "resp_1", words: int = 3, usage: tuple[int, int] = (11, 7)) -> list[bytes]:
    """The events of a stream of the Responses API."""

    def event(name: str, rest: bytes) -> bytes:
        return b'event: %b\ndata: {"type":"%b",%b}\n\n' % (name.encode(), name.encode(), rest)

    head = b'"response":{"id":"%b","object":"response","error":null,"status":"%b"' % (response_id.encode(), b"%b")
    told = b',"usage":{"input_tokens":%d,"output_tokens":%d}}' % usage
    return [
        event("response.created", head % b"in_progress" + b"}"),
        *(event("response.output_text.delta", b'"delta":"w%d"' % i) for i in range(words)),
        event("response.completed", head % b"completed" + told),
    ]


class Upstream:
    """An upstream that answers as it was told last; `received` has what it got, `hung_up` is set when a caller left.

    What it is told behind `then()` is for the request after: `actor.answers(429); actor.then().answers()`.
    """

    def __init__(self) -> None:
        self.received: list[Received] = []
        self.connections = 0
        self.hung_up = asyncio.Event()
        self.stalled = asyncio.Event()
        self._behaviours: list[Behaviour] = []
        self._is_adding = False
        self.url = ""
        self.answers()

    @property
    def last(self) -> Received:
        """The newest request."""
        return self.received[-1]

    # -- what it does --------------------------------------------------------------------------------------------------

    def then(self) -> Upstream:
        """The same, told of the request behind those that it knows what to do with. The last goes for all that come."""
        self._is_adding = True
        return self

    def skips(self) -> None:
        """Forgets what it was to do with the next request."""
        self._behaviours.pop(0)

    @property
    def _behaviour(self) -> Behaviour:
        return self._behaviours[0]

    @_behaviour.setter
    def _behaviour(self, behaviour: Behaviour) -> None:
        self._behaviours = [*self._behaviours, behaviour] if self._is_adding else [behaviour]
        self._is_adding = False

    def answers(
        self,
        status: int = 200,
        body: bytes = OPENAI_JSON,
        content_type: str = "application/json",
        headers: tuple[tuple[str, str], ...] = (),
        *,
        chunked: bool = False,
        retry_after: str = "",
        gate: asyncio.Event | None = None,
    ) -> None:
        """A whole answer, which waits for the gate."""
        if retry_after:
            headers = (*headers, ("Retry-After", retry_after))
        head = self._head(status, (("Content-Type", content_type), *headers), None if chunked else len(body))

        async def behave(_: Upstream, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            if gate is not None:
                await gate.wait()
            writer.write(head + (chunk(body) + b"0\r\n\r\n" if chunked else body))

        self._behaviour = behave

    def streams(
        self,
        events: list[bytes],
        *,
        gates: dict[int, asyncio.Event] | None = None,
        headers: tuple[tuple[str, str], ...] = (),
    ) -> None:
        """Events one after the other; before event i it waits for gates[i]."""
        head = self._head(200, (("Content-Type", "text/event-stream"), *headers), None)

        async def behave(actor: Upstream, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(head)
            gone = asyncio.create_task(reader.read(1))
            for i, event in enumerate(events):
                if gates and i in gates:
                    gate = asyncio.create_task(gates[i].wait())
                    await asyncio.wait({gate, gone}, return_when=asyncio.FIRST_COMPLETED)
                    if gone.done():
                        gate.cancel()
                        actor.hung_up.set()
                        raise ConnectionResetError
                writer.write(chunk(event))
                await writer.drain()
            writer.write(b"0\r\n\r\n")
            gone.cancel()
            await asyncio.wait({gone})  # The next request is read from the same reader.

        self._behaviour = behave

    def stalls(self) -> None:
        """Reads the request and never answers."""

        async def behave(actor: Upstream, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            actor.stalled.set()
            if not await reader.read(1):
                actor.hung_up.set()

        self._behaviour = behave

    def sends(self, *parts: bytes, stalls: bool = False, resets: bool = False) -> None:
        """Bytes as they are, and then closes, resets or stalls."""

        async def behave(actor: Upstream, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            for part in parts:
                writer.write(part)
                await writer.drain()
            if stalls:
                actor.stalled.set()
                if not await reader.read(1):
                    actor.hung_up.set()
            if resets:
                sock = writer.get_extra_info("socket")
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            raise ConnectionResetError

        self._behaviour = behave

    def echoes_its_credential(self, status: int = 401) -> None:
        """Repeats the credential it got in its error."""

        async def behave(actor: Upstream, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            given = actor.last.header("authorization") or actor.last.header("x-api-key") or ""
            body = b'{"error":{"message":"bad key: %b"}}' % given.encode()
            writer.write(actor._head(status, (("Content-Type", "application/json"),), len(body)) + body)

        self._behaviour = behave

    # -- how -----------------------------------------------------------------------------------------------------------

    @staticmethod
    def _head(status: int, headers: tuple[tuple[str, str], ...], length: int | None) -> bytes:
        framing = ("Transfer-Encoding", "chunked") if length is None else ("Content-Length", str(length))
        lines = [f"HTTP/1.1 {status} Whatever", *(f"{name}: {value}" for name, value in (*headers, framing))]
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Upstream]:
        """Serves on a free port until the block ends."""
        async with served(self._connection) as port:
            self.url = f"http://127.0.0.1:{port}"
            yield self

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while request := await read_request(reader):
                self.received.append(request)
                behave = self._behaviour
                if len(self._behaviours) > 1:
                    self._behaviours.pop(0)
                await behave(self, reader, writer)
                await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # The other side left, or this actor was told to.


@contextlib.asynccontextmanager
async def served(
    connection: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
) -> AsyncIterator[int]:
    """Serves connections on a free port of loopback, which it gives; at the end they are all closed, for sure."""
    tasks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await connection(reader, writer)
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not server.is_serving():  # Accepted in the very tick in which the block ends.
            writer.transport.abort()
            return
        task = asyncio.create_task(serve(reader, writer))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    server = await asyncio.start_server(accept, "127.0.0.1", 0, limit=2**20)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await server.wait_closed()


async def read_request(reader: asyncio.StreamReader) -> Received | None:
    """The next request on a connection, None at its end."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return None
    first, *lines = head.decode("latin-1").split("\r\n")[:-2]
    method, target, _ = first.split(" ")
    headers = tuple((name, value.strip()) for name, _, value in (line.partition(":") for line in lines))
    names = {name.lower(): value for name, value in headers}
    body = b""
    if "chunked" in names.get("transfer-encoding", ""):
        while size := int(await reader.readline(), 16):
            body += await reader.readexactly(size)
            await reader.readexactly(2)
        await reader.readexactly(2)
    elif length := int(names.get("content-length", "0")):
        body = await reader.readexactly(length)
    return Received(method=method, target=target, headers=headers, body=body)


class Proxy:
    """A proxy that notes whom it was asked for; it connects to where a test wants, whatever the name says."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.asked: list[str] = []
        self.url = ""

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Proxy]:
        """Serves on a free port until the block ends."""
        async with served(self._http if self.kind == "http" else self._socks5) as port:
            self.url = f"{self.kind}://127.0.0.1:{port}"
            yield self

    async def _http(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            request = await read_request(reader)
            assert request is not None
            self.asked.append(request.target)
            host, _, rest = request.target.removeprefix("http://").partition("/")
            name, _, port = host.partition(":")
            up_reader, up_writer = await asyncio.open_connection(name, int(port))
            lines = [f"{request.method} /{rest} HTTP/1.1", *(f"{k}: {v}" for k, v in request.headers)]
            up_writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + request.body)
            await _pipe_both(reader, writer, up_reader, up_writer)

    async def _socks5(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            _, count = await reader.readexactly(2)
            await reader.readexactly(count)
            writer.write(b"\x05\x00")
            _, _, _, kind = await reader.readexactly(4)
            if kind == 1:
                host = socket.inet_ntoa(await reader.readexactly(4))
            else:
                host = (await reader.readexactly((await reader.readexactly(1))[0])).decode()
            (port,) = struct.unpack("!H", await reader.readexactly(2))
            self.asked.append(f"{host}:{port}")
            up_reader, up_writer = await asyncio.open_connection(host, port)
            writer.write(b"\x05\x00\x00\x01\x00\x00\x00\x00\x00\x00")
            await _pipe_both(reader, writer, up_reader, up_writer)


async def _pipe_both(
    one: asyncio.StreamReader, one_out: asyncio.StreamWriter, two: asyncio.StreamReader, two_out: asyncio.StreamWriter
) -> None:
    async def pipe(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        while data := await source.read(65536):
            target.write(data)
            await target.drain()
        target.close()

    try:
        await asyncio.gather(pipe(one, two_out), pipe(two, one_out))
    finally:
        two_out.close()
        with contextlib.suppress(ConnectionError):
            await two_out.wait_closed()
