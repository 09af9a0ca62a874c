"""What the upstream client promises: what it writes, whom it answers, how long it waits, what it holds, what it leaves.

The upstream is a socket in the test's hand, so that each thing happens at its moment.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import random
import socket
import tracemalloc
from collections.abc import AsyncIterator, Callable, Iterator

import pytest

from balancer.errors import UpstreamError, UpstreamTimeoutError
from balancer.gateway.messages import Upstream, UpstreamRequest
from balancer.gateway.upstream import connection, pool
from tests.actors import chunk
from tests.gateway.by_hand import (
    PATIENCE_S,
    READERS,
    Listener,
    Outcome,
    Reader,
    Wire,
    a_request,
    ask,
    read_all,
    turns,
)

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"
ANSWERED = Outcome(status=200, headers=(("Content-Length", "5"),), body=b"hello")
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
LARGE = os.urandom(2**20) * 50
SOON_S = 0.15
ON_BOTH_LOOPS = True
MakeClient = Callable[..., Upstream]


@contextlib.asynccontextmanager
async def asking(
    client: Upstream, request: UpstreamRequest, read: Reader = read_all
) -> AsyncIterator[asyncio.Task[Outcome]]:
    """A request on its way, in a task; cancelled behind the block where it has not ended."""
    task = asyncio.create_task(ask(client, request, read))
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def answer_one(listener: Listener, answer: bytes = ANSWER) -> Wire:
    """Accepts a connection, reads a request, answers."""
    wire = await listener.accept()
    assert await wire.request()
    wire.sends(answer)
    return wire


async def an_idle_wire(client: Upstream, listener: Listener) -> Wire:
    """A connection on which a request was answered, idle now."""
    async with asking(client, a_request(f"{listener.url}/first")) as asked:
        wire = await answer_one(listener)
        assert await asked == ANSWERED
    await turns()
    return wire


# -- what is written ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "target"),
    [
        ("", b"/"),
        ("/", b"/"),
        ("?a=b", b"/?a=b"),
        ("/v1/x?a=b&c", b"/v1/x?a=b&c"),
        ("/v1/%7Bx%7d/%2F/%25?a=%20+", b"/v1/%7Bx%7d/%2F/%25?a=%20+"),
        ("/v1/a:b@c;d=e,f", b"/v1/a:b@c;d=e,f"),
        ("/v1//x/../y/.", b"/v1//x/../y/."),
        ("/v1/x#part", b"/v1/x"),
    ],
)
async def test_the_target_goes_out_as_it_is(client: Upstream, listener: Listener, path: str, target: bytes) -> None:
    async with asking(client, a_request(listener.url + path, method="GET")) as asked:
        wire = await listener.accept()
        head = await wire.head()
        wire.sends(ANSWER)
        assert await asked == ANSWERED
    assert head.split(b"\r\n")[0] == b"GET " + target + b" HTTP/1.1"


@pytest.mark.parametrize(
    ("method", "body", "framing"),
    [
        ("GET", b"", []),
        ("HEAD", b"", []),
        ("DELETE", b"", None),
        ("POST", b"", [b"content-length: 0"]),
        ("PUT", b"", [b"content-length: 0"]),
        ("POST", b"x", [b"content-length: 1"]),
        ("DELETE", b"xyz", [b"content-length: 3"]),
        ("POST", b"\r\n\r\n0\r\n\r\n", [b"content-length: 9"]),
    ],
)
async def test_a_body_goes_out_with_its_length_and_nothing_else(
    client: Upstream, listener: Listener, method: str, body: bytes, framing: list[bytes] | None
) -> None:
    headers = (("X-A", "b"), ("x-a", "c"), ("X-Empty", ""), ("X-Utf", "café"))
    async with asking(client, a_request(f"{listener.url}/x", method=method, body=body, headers=headers)) as asked:
        wire = await listener.accept()
        request = await wire.request()
        wire.sends(ANSWER)
        await asked
    head, _, sent = request.partition(b"\r\n\r\n")
    first, *lines = head.split(b"\r\n")
    assert first == method.encode() + b" /x HTTP/1.1"
    assert sent == body
    assert lines.count(b"X-A: b") == lines.count(b"x-a: c") == lines.count("X-Utf: café".encode()) == 1
    assert b"X-Empty:" in [line.strip() for line in lines]
    lower = [line.lower() for line in lines]
    assert [line for line in lower if line.startswith(b"host:")] == [f"host: 127.0.0.1:{listener.port}".encode()]
    found = [line for line in lower if line.startswith((b"content-length:", b"transfer-encoding:"))]
    assert found == framing or (framing is None and found in ([], [b"content-length: 0"]))
    names = {line.partition(b":")[0] for line in lower}
    assert names <= {b"host", b"x-a", b"x-empty", b"x-utf", b"content-length", b"connection", b"accept"}


@pytest.mark.parametrize(
    "given",
    [
        {"headers": (("X-A", "b\r\nX-Evil: 1"),)},
        {"headers": (("X-A", "b\nX-Evil: 1"),)},
        {"headers": (("X-A", "b\rX-Evil: 1"),)},
        {"headers": (("X-A", "b\x00X-Evil: 1"),)},
        {"headers": (("X-A\r\nX-Evil", "1"),)},
        {"headers": (("X-A: b\r\nX-Evil", "1"),)},
        {"method": "GET / HTTP/1.1\r\nX-Evil: 1\r\nX:"},
        {"path": "/x HTTP/1.1\r\nX-Evil: 1\r\nX: "},
        {"path": "/x\r\nX-Evil: 1\r\nX: "},
        {"path": "/x?\nX-Evil: 1"},
    ],
)
async def test_no_line_can_be_smuggled_into_a_request(
    client: Upstream, listener: Listener, given: dict[str, object]
) -> None:
    """Such a request fails, as an error of the request, or goes out without a line of its own."""
    heads: list[bytes] = []

    async def behave(wire: Wire) -> None:
        while head := await wire.head():
            heads.append(head)
            wire.sends(ANSWER)

    listener.serve(behave)
    given = {"path": "/x"} | given
    url = f"{listener.url}{given.pop('path')}"
    with contextlib.suppress(UpstreamError, ValueError):
        answer = await client.send(a_request(url, **given))  # type: ignore[arg-type]
        await answer.close()
    for head in heads:
        assert not any(line.lower().startswith(b"x-evil") for line in head.replace(b"\r", b"\n").split(b"\n"))
        assert head.split(b"\r\n")[0].count(b" ") == 2
    # And the pool still has its place for others.
    assert await ask(client, a_request(f"{listener.url}/good")) == ANSWERED


async def test_a_port_that_nobody_listens_on_is_told_as_such(client: Upstream) -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    with pytest.raises(UpstreamError, match="up cannot be reached") as caught:
        await client.send(a_request(f"http://127.0.0.1:{port}/"))
    assert not isinstance(caught.value, UpstreamTimeoutError)


async def test_a_name_that_nobody_knows_is_told_as_such(client: Upstream) -> None:
    with pytest.raises(UpstreamError, match="up cannot be reached"):
        await client.send(a_request("http://nowhere.invalid/"))


async def test_a_name_is_looked_up(client: Upstream, listener: Listener) -> None:
    async with asking(client, a_request(f"http://localhost:{listener.port}/x")) as asked:
        wire = await listener.accept()
        assert f"host: localhost:{listener.port}".encode() in (await wire.request()).lower()
        wire.sends(ANSWER)
        assert await asked == ANSWERED


async def test_an_address_of_ipv6_is_written_in_brackets(client: Upstream) -> None:
    hosts: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        hosts.extend(line for line in head.split(b"\r\n") if line.lower().startswith(b"host:"))
        writer.write(ANSWER)
        await reader.read()
        writer.close()

    server = await asyncio.start_server(serve, "::1", 0)
    port = server.sockets[0].getsockname()[1]
    assert await ask(client, a_request(f"http://[::1]:{port}/x")) == ANSWERED
    await client.close()
    server.close()
    await server.wait_closed()
    await turns(8)
    assert hosts == [b"Host: [::1]:%d" % port]


Found = list[tuple[int, int, int, str, tuple[str, int]]]


def resolving(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> tuple[list[str], asyncio.Event]:
    """Has every name lead to the addresses, in that order, once the event is set; the list has who was asked for."""
    asked: list[str] = []
    gate = asyncio.Event()

    async def getaddrinfo(host: str, port: int, *_: object, **__: object) -> Found:
        if host in addresses:  # uvloop asks so for an address that it is to connect to.
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, port))]
        asked.append(host)
        await gate.wait()
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo)
    return asked, gate


async def test_an_address_that_refuses_is_followed_by_the_next(
    client: Upstream, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, gate = resolving(monkeypatch, "127.0.0.3", "127.0.0.2", "127.0.0.1")
    gate.set()
    async with asking(client, a_request(f"http://up.invalid:{listener.port}/")) as asked:
        await answer_one(listener)
        assert await asked == ANSWERED


async def test_whoever_leaves_while_a_name_is_looked_up_takes_it_from_nobody(
    client: Upstream, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    names, gate = resolving(monkeypatch, "127.0.0.1")
    request = a_request(f"http://up.invalid:{listener.port}/")
    async with asking(client, request) as one, asking(client, request) as two:
        await turns()
        one.cancel()
        await turns()
        gate.set()
        await answer_one(listener)
        assert await two == ANSWERED
    assert names == ["up.invalid"]


async def test_a_client_that_is_closed_while_it_looks_a_name_up_leaves_nothing(
    client: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolving(monkeypatch, "127.0.0.1")
    async with asking(client, a_request("http://up.invalid:1/")):
        await turns()
        async with asyncio.timeout(PATIENCE_S):
            await client.close()


async def test_a_name_that_is_not_found_in_time_is_left_after_connect_s(
    client: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, gate = resolving(monkeypatch, "127.0.0.1")
    message = await failure(client, a_request("http://up.invalid:1/", limits={"connect_s": SOON_S}))
    assert message == "up could not be reached in time (connect_s)"
    gate.set()
    await turns()


@pytest.mark.parametrize("host", ["a" * 64, f"{'a' * 64}.invalid", "a..invalid"])
async def test_a_host_that_cannot_be_is_an_error_of_the_upstream(client: Upstream, host: str) -> None:
    with pytest.raises(UpstreamError):
        await client.send(a_request(f"http://{host}:1/"))


@pytest.mark.parametrize("url", ["", "up", "ftp://127.0.0.1/", "http://", "http://127.0.0.1:99999/", "http://[::1/"])
async def test_a_url_that_leads_nowhere_is_an_error_of_the_upstream(client: Upstream, url: str) -> None:
    with pytest.raises(UpstreamError):
        await client.send(a_request(url))


# -- connections that end at the wrong moment --------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["closes", "stops_sending", "resets"])
async def test_a_connection_that_ended_while_it_was_idle_is_not_used(
    client: Upstream, listener: Listener, how: str
) -> None:
    idle = await an_idle_wire(client, listener)
    getattr(idle, how)()
    await turns()
    async with asking(client, a_request(f"{listener.url}/second")) as asked:
        wire = await answer_one(listener)
        assert await asked == ANSWERED
    assert wire.number == 1


@pytest.mark.parametrize("how", ["closes", "stops_sending", "resets"])
async def test_a_request_on_a_connection_that_ends_in_that_moment_is_seen_once_at_most(
    client: Upstream, listener: Listener, how: str
) -> None:
    """The end is on its way while the request is written: it fails, or goes over a new connection, never both."""
    idle = await an_idle_wire(client, listener)
    seen: list[bytes] = []

    async def behave(wire: Wire) -> None:
        while request := await wire.request():
            seen.append(request)
            wire.sends(ANSWER)

    listener.serve(behave)
    getattr(idle, how)()
    outcome = await ask(client, a_request(f"{listener.url}/second", body=b"x"))
    if how == "stops_sending" and (request := await idle.request()):
        seen.append(request)
    assert (outcome, len(seen)) in [(ANSWERED, 1), (Outcome(error="head"), 0), (Outcome(error="head"), 1)]
    assert await ask(client, a_request(f"{listener.url}/third", body=b"x")) == ANSWERED


@pytest.mark.parametrize("how", ["closes", "stops_sending", "resets"])
@pytest.mark.parametrize("is_reused", [False, True])
@pytest.mark.parametrize("sent", [b"", b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 2", ANSWER[:-6]])
async def test_a_request_that_was_read_and_not_answered_is_not_sent_again(
    client: Upstream, listener: Listener, how: str, is_reused: bool, sent: bytes
) -> None:
    wire = await an_idle_wire(client, listener) if is_reused else None
    async with asking(client, a_request(f"{listener.url}/second", body=b"x" * 100)) as asked:
        wire = wire or await listener.accept()
        assert await wire.request()
        if sent:
            await wire.feeds([sent])
        getattr(wire, how)()
        assert await asked == Outcome(error="head")
        await turns()
    async with asking(client, a_request(f"{listener.url}/third", body=b"y")) as asked:
        wire = await listener.accept()
        assert (await wire.request()).endswith(b"\r\n\r\ny")
        wire.sends(ANSWER)
        assert await asked == ANSWERED


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\nhello",
        CHUNKED + b"50\r\nhello",
        CHUNKED + b"5\r\nhello\r\n",
        CHUNKED + b"5\r\nhello\r\n0\r\n",
        b"HTTP/1.1 200 OK\r\n\r\nhello",
    ],
)
async def test_a_reset_is_never_the_end_of_a_body(
    client: Upstream, listener: Listener, answer: bytes, read: Reader
) -> None:
    async with asking(client, a_request(listener.url), read) as asked:
        wire = await listener.accept()
        await wire.request()
        await wire.feeds([answer])
        wire.resets()
        outcome = await asked
    assert (outcome.status, outcome.error) == (200, "body")
    assert b"hello".startswith(outcome.body)


@pytest.mark.parametrize(
    "late",
    [
        b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nsecret",
        b"HTTP/1.1 100 Continue\r\n\r\n",
        b"HTTP/1.1 2",
        b"\r\n",
        b"\x00",
    ],
)
@pytest.mark.parametrize("closes", [False, True])
async def test_what_comes_while_a_connection_is_idle_answers_nobody(
    client: Upstream, listener: Listener, late: bytes, closes: bool
) -> None:
    idle = await an_idle_wire(client, listener)
    idle.sends(late)
    if closes:
        idle.stops_sending()
    await turns()
    if late.strip():
        assert await idle.is_left()
    else:
        idle.closes()
        await turns()
    async with asking(client, a_request(f"{listener.url}/second")) as asked:
        await answer_one(listener)
        assert await asked == ANSWERED


async def test_what_came_just_before_the_request_was_written_answers_nobody(
    client: Upstream, listener: Listener
) -> None:
    """The second answer is in the socket, but the loop has not turned since: whoever looks before writing sees it."""
    idle = await an_idle_wire(client, listener)
    idle.sends(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nsecret")
    async with asking(client, a_request(f"{listener.url}/second")) as asked:
        served = asyncio.create_task(answer_one(listener))
        outcome = await asked
        served.cancel()
        await asyncio.gather(served, return_exceptions=True)
    assert outcome in (ANSWERED, Outcome(error="head"))


# -- large bodies, slow sides ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def growing_by(most: int) -> Iterator[None]:
    """Fails where the block needs more memory than that at any moment."""
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    try:
        yield
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak - before < most, f"{(peak - before) / 2**20:.1f} MiB"


async def is_stuck(wire: Wire, data: memoryview) -> int:
    """Sends until the other side takes no more; how many bytes it took."""
    sent = 0
    for _ in range(20):  # The kernel may make room some turns later.
        with contextlib.suppress(BlockingIOError):
            while sent < len(data):
                sent += wire.sock.send(data[sent : sent + 2**18])
                await turns(2)
        await turns(10)
    return sent


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
@pytest.mark.parametrize("is_chunked", [False, True])
async def test_an_upstream_waits_for_a_reader_that_is_slow(
    client: Upstream, listener: Listener, read: Reader, is_chunked: bool
) -> None:
    """A hundred megabytes are never held: what was not read yet stays with the upstream."""
    size = 100 * 2**20
    part = os.urandom(2**20)
    piece = memoryview(chunk(part) if is_chunked else part)
    head = CHUNKED if is_chunked else b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size
    last = b"0\r\n\r\n" if is_chunked else b""
    sending = asyncio.create_task(client.send(a_request(listener.url)))
    wire = await listener.accept()
    await wire.request()
    wire.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**16)
    wire.sends(head)
    answer = await sending
    with growing_by(8 * 2**20):
        stuck_at = await is_stuck(wire, piece)
        pieces = 1
        while stuck_at == len(piece):
            stuck_at = await is_stuck(wire, piece)
            pieces += 1
        assert pieces < 30, "it read on though nobody asked for it"

        async def send_rest() -> None:
            assert await wire.sends_all(bytes(piece[stuck_at:]))
            for _ in range(size // 2**20 - pieces):
                assert await wire.sends_all(piece)
            assert await wire.sends_all(last)

        rest = asyncio.create_task(send_rest())
        body = Digest()
        await read(answer, body)
        await rest
    await answer.close()
    expected = hashlib.sha256()
    for _ in range(size // 2**20):
        expected.update(part)
    assert (body.size, body.digest.digest()) == (size, expected.digest())
    await turns()
    async with asking(client, a_request(f"{listener.url}/second")) as asked:
        assert await wire.request()
        wire.sends(ANSWER)
        assert await asked == ANSWERED


class Digest:
    """Takes a body's parts, and keeps their size and digest only."""

    def __init__(self) -> None:
        self.size = 0
        self.digest = hashlib.sha256()

    def extend(self, part: bytes) -> None:
        """One more part."""
        self.size += len(part)
        self.digest.update(part)

    def __iadd__(self, part: bytes) -> Digest:
        self.extend(part)
        return self


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
@pytest.mark.parametrize("size", [2**16, 2**18, 2**18 + 1, 300_000, 2**19, 2**19 + 1, 700_000, 2**20])
@pytest.mark.parametrize("is_chunked", [False, True])
async def test_an_answer_that_came_whole_before_it_was_read_leaves_a_connection_that_works(
    client: Upstream, listener: Listener, size: int, is_chunked: bool, read: Reader
) -> None:
    """A connection held back for its reader was once given to the next request as it was: deaf."""
    part = os.urandom(size)
    sending = asyncio.create_task(client.send(a_request(listener.url)))
    wire = await listener.accept()
    await wire.request()
    wire.sends(CHUNKED if is_chunked else b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
    answer = await sending
    rest = asyncio.create_task(wire.sends_all(chunk(part) + b"0\r\n\r\n" if is_chunked else part))
    await turns(50)
    body = bytearray()
    await read(answer, body)
    assert await rest
    await answer.close()
    assert body == part
    await turns()
    async with asking(client, a_request(f"{listener.url}/second")) as asked:
        assert await wire.request()
        wire.sends(ANSWER)
        assert await asked == ANSWERED


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
async def test_what_waits_for_its_readers_is_not_touched_by_what_others_receive(
    client: Upstream, listener: Listener, read: Reader
) -> None:
    bodies = [os.urandom(300_000 + number) for number in range(6)]
    wires, answers, sending = [], [], []
    for body in bodies:
        task = asyncio.create_task(client.send(a_request(listener.url)))
        wire = await listener.accept()
        await wire.request()
        wire.sends(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body))
        wires.append(wire)
        answers.append(await task)
    for wire, body in zip(wires, bodies, strict=True):
        sending.append(asyncio.create_task(wire.sends_all(body)))
    await turns(50)
    found = []
    for answer in reversed(answers):
        found.append(bytearray())
        await read(answer, found[-1])
        await answer.close()
    assert found[::-1] == bodies
    assert await asyncio.gather(*sending) == [True] * len(bodies)


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
@pytest.mark.parametrize("size", [5, 2**18 + 1, 2**20, 2**22])
async def test_an_answer_that_ends_with_its_connection_waits_for_a_late_reader(
    client: Upstream, listener: Listener, size: int, read: Reader
) -> None:
    body = os.urandom(size)
    sending = asyncio.create_task(client.send(a_request(listener.url)))
    wire = await listener.accept()
    await wire.request()
    wire.sends(b"HTTP/1.1 200 OK\r\n\r\n")

    async def send() -> None:
        await wire.sends_all(body)
        wire.stops_sending()

    rest = asyncio.create_task(send())
    answer = await sending
    await turns(50)
    found = bytearray()
    await read(answer, found)
    await answer.close()
    await rest
    assert found == body


async def test_a_large_body_goes_out_whole_and_is_not_held_twice(client: Upstream, listener: Listener) -> None:
    async def read(wire: Wire) -> bytes:
        head = await wire.head()
        assert b"content-length: %d\r\n" % len(LARGE) in head.lower()
        digest, left = hashlib.sha256(), len(LARGE)
        while left:
            data = await wire.receives()
            assert data
            left -= len(data)
            digest.update(data)
            await turns(2)
        wire.sends(ANSWER)
        return digest.digest()

    with growing_by(16 * 2**20):
        async with asking(client, a_request(listener.url, body=LARGE)) as asked:
            wire = await listener.accept()
            assert await read(wire) == hashlib.sha256(LARGE).digest()
            assert await asked == ANSWERED
    async with asking(client, a_request(f"{listener.url}/second")) as asked:
        assert b"/second" in await wire.request()
        wire.sends(ANSWER)
        assert await asked == ANSWERED


async def test_what_the_kernel_takes_later_stays_in_order(
    client: Upstream, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one body, and of the request behind it, where the answer has come before all of the body was sent."""
    monkeypatch.setattr(connection, "_LARGE_BYTES", len(LARGE))
    async with asking(client, a_request(listener.url, body=LARGE)) as asked:
        wire = await listener.accept()
        assert await wire.head()
        wire.sends(ANSWER)
        assert await asked == ANSWERED
    await turns()
    async with asking(client, a_request(f"{listener.url}/second", body=LARGE[:50_000])) as asked:
        digest, left = hashlib.sha256(), len(LARGE)
        while left:
            data = await wire.receives(left)
            assert data
            left -= len(data)
            digest.update(data)
        assert digest.digest() == hashlib.sha256(LARGE).digest()
        second = await wire.request()
        assert (second[:13], second[-50_000:]) == (b"POST /second ", LARGE[:50_000])
        wire.sends(ANSWER)
        assert await asked == ANSWERED


@pytest.mark.parametrize("how", ["stays", "reads on", "stops_sending", "resets"])
async def test_an_answer_that_comes_before_the_body_was_sent_counts(
    client: Upstream, listener: Listener, how: str
) -> None:
    early = b"HTTP/1.1 413 Too Large\r\nContent-Length: 5\r\n\r\nhello"
    async with asking(client, a_request(listener.url, body=LARGE)) as asked:
        wire = await listener.accept()
        assert await wire.head()
        await wire.feeds([early])
        if how in ("resets", "stops_sending"):
            getattr(wire, how)()
        if how == "reads on":
            while await wire.receives():
                pass
        assert await asked == Outcome(status=413, headers=(("Content-Length", "5"),), body=b"hello")
    await turns()
    async with asking(client, a_request(f"{listener.url}/second", body=b"x")) as asked:
        second = await listener.accept()
        assert (await second.request()).startswith(b"POST /second ")
        second.sends(ANSWER)
        assert await asked == ANSWERED
    if how == "stays":
        while await wire.receives():
            pass


async def test_a_stream_that_begins_before_the_body_was_sent_goes_on_beside_it(
    client: Upstream, listener: Listener
) -> None:
    sending = asyncio.create_task(client.send(a_request(listener.url, body=LARGE)))
    wire = await listener.accept()
    assert await wire.head()
    wire.sends(CHUNKED + chunk(b"one"))
    answer = await sending
    assert await answer.read() == b"one"
    left = len(LARGE)
    while left:
        left -= len(await wire.receives())
    wire.sends(chunk(b"two") + b"0\r\n\r\n")
    assert (await answer.read(), await answer.read()) == (b"two", b"")
    await answer.close()


async def test_an_upstream_that_resets_while_it_is_sent_a_body_is_told_as_such(
    client: Upstream, listener: Listener
) -> None:
    async with asking(client, a_request(listener.url, body=LARGE)) as asked:
        wire = await listener.accept()
        assert await wire.head()
        wire.resets()
        assert await asked == Outcome(error="head")


# -- heads without end -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "again", "error"),
    [
        (b"HTTP/1.1 200 OK\r\n", b"X-A: bcdefghijklmnopqrstuvwxyz\r\n", "head"),
        (b"HTTP/1.1 200 OK\r\n", b"A:\r\n", "head"),
        (b"HTTP/1.1 200 OK\r\nX-A: ", b"abcdefgh", "head"),
        (b"HTTP/1.1 200 OK\r\n", b"abcdefgh", "head"),
        (b"HTTP/1.1 200 ", b"reason ", "head"),
        (b"", b"\r\n", "head"),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n", "head"),
        (b"", b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n", "head"),
        (CHUNKED + b"5\r\nhello\r\n5;", b"extension", "body"),
        (CHUNKED + b"5\r\nhello\r\n", b"0", "body"),
        (CHUNKED + b"5\r\nhello\r\n0\r\n", b"X-T: trailer\r\n", "body"),
        (CHUNKED + b"5\r\nhello\r\n0\r\nX-T: ", b"trailer", "body"),
    ],
)
async def test_a_head_that_does_not_end_is_cut_off(
    client: Upstream, listener: Listener, start: bytes, again: bytes, error: str
) -> None:
    """Such an upstream is refused long before the limits in time, and before it costs memory."""
    flood = again * (2**18 // len(again))

    async def behave(wire: Wire) -> None:
        await wire.head()
        wire.sends(start)
        for _ in range(64):
            if not await wire.sends_all(flood):
                return
        await wire.is_left()

    listener.serve(behave)
    with growing_by(8 * 2**20):
        outcome = await ask(client, a_request(listener.url))
    assert outcome.error == error
    await turns()


# -- time --------------------------------------------------------------------------------------------------------------


async def failure(client: Upstream, request: UpstreamRequest, read: Reader = read_all) -> str:
    """The message of the error in time that the request ends with."""
    async with asyncio.timeout(PATIENCE_S):
        try:
            answer = await client.send(request)
            try:
                await read(answer, bytearray())
            finally:
                await answer.close()
        except UpstreamTimeoutError as exc:
            return exc.message
    raise AssertionError("it came to its end")


async def says_nothing(wire: Wire) -> None:
    """Reads what comes and does not answer."""
    while await wire.receives():
        pass


async def test_an_upstream_that_does_not_accept_is_left_after_connect_s(client: Upstream) -> None:
    with full_listener() as url:
        message = await failure(client, a_request(url, limits={"connect_s": SOON_S}))
    assert message == "up could not be reached in time (connect_s)"


async def test_an_upstream_that_does_not_speak_tls_is_left_after_connect_s(
    client: Upstream, listener: Listener
) -> None:
    listener.serve(says_nothing)
    message = await failure(client, a_request(listener.url.replace("http", "https"), limits={"connect_s": SOON_S}))
    assert message == "up could not be reached in time (connect_s)"


@contextlib.contextmanager
def full_listener() -> Iterator[str]:
    """A port whose queue is full: who connects there waits."""
    with contextlib.ExitStack() as stack:
        full = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(4):
            sock = stack.enter_context(socket.socket())
            sock.setblocking(False)
            sock.connect_ex(full.getsockname())
        yield f"http://127.0.0.1:{full.getsockname()[1]}"


@pytest.mark.parametrize("is_reused", [False, True])
@pytest.mark.parametrize("sent", [b"", b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 200 OK\r\nX-A: b\r\n"])
@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({"headers_s": SOON_S}, "up did not answer in time (headers_s)"),
        ({"headers_s": SOON_S, "timeout_s": 10 * SOON_S}, "up did not answer in time (headers_s)"),
        ({"timeout_s": SOON_S}, "up did not answer in time (timeout)"),
        ({"timeout_s": SOON_S, "headers_s": 10 * SOON_S}, "up did not answer in time (timeout)"),
    ],
)
async def test_headers_that_do_not_come_are_not_waited_for(
    client: Upstream, listener: Listener, is_reused: bool, sent: bytes, limits: dict[str, float], words: str
) -> None:
    wire = await an_idle_wire(client, listener) if is_reused else None
    failed = asyncio.create_task(failure(client, a_request(listener.url, body=b"x", limits=limits)))
    if wire is None:
        accepting = asyncio.create_task(listener.accept())
        await asyncio.wait((accepting, failed), return_when=asyncio.FIRST_COMPLETED)
        if not accepting.done():  # The machine stood still: time was over before there was a connection.
            accepting.cancel()
            assert await failed == words
            return
        wire = accepting.result()
    await wire.request()
    await wire.feeds([sent] if sent else [])
    assert await failed == words
    assert await wire.is_left()


async def test_an_upstream_that_stops_reading_a_body_is_left_after_headers_s(
    client: Upstream, listener: Listener
) -> None:
    failed = asyncio.create_task(failure(client, a_request(listener.url, body=LARGE, limits={"headers_s": SOON_S})))
    await listener.accept()
    assert await failed == "up did not answer in time (headers_s)"


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
@pytest.mark.parametrize(
    ("sent", "limits", "words"),
    [
        (b"", {"first_byte_s": SOON_S}, "first_byte_s"),
        (b"", {"first_byte_s": SOON_S, "idle_s": 9}, "first_byte_s"),
        (b"5", {"first_byte_s": SOON_S}, "first_byte_s"),
        (b"", {"timeout_s": 2 * SOON_S}, "timeout"),
        (chunk(b"one"), {"idle_s": SOON_S}, "idle_s"),
        (chunk(b"one") + b"5\r\nhel", {"idle_s": SOON_S}, "idle_s"),
        (chunk(b"one") + b"0\r\n", {"idle_s": SOON_S}, "idle_s"),
        (chunk(b"one"), {"timeout_s": 2 * SOON_S}, "timeout"),
    ],
)
async def test_a_body_that_falls_silent_is_not_waited_for(
    client: Upstream, listener: Listener, sent: bytes, limits: dict[str, float], words: str, read: Reader
) -> None:
    failed = asyncio.create_task(failure(client, a_request(listener.url, limits=limits), read))
    wire = await listener.accept()
    await wire.request()
    await wire.feeds([CHUNKED, sent] if sent else [CHUNKED])
    assert await failed == f"up was silent for too long ({words})"
    assert await wire.is_left()


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
async def test_a_body_that_goes_on_may_take_longer_than_its_pauses(
    client: Upstream, listener: Listener, read: Reader
) -> None:
    limit_s = 1.0
    async with asking(
        client, a_request(listener.url, limits={"headers_s": limit_s, "first_byte_s": limit_s, "idle_s": limit_s}), read
    ) as asked:
        wire = await listener.accept()
        await wire.request()
        wire.sends(CHUNKED)
        for _ in range(6):
            await asyncio.sleep(limit_s / 4)  # Time is what this is about.
            wire.sends(chunk(b"one"))
        wire.sends(b"0\r\n\r\n")
        assert await asked == Outcome(status=200, headers=(("Transfer-Encoding", "chunked"),), body=b"one" * 6)


async def test_a_reader_that_comes_late_is_not_the_upstream_s_silence(client: Upstream, listener: Listener) -> None:
    sending = asyncio.create_task(
        client.send(a_request(listener.url, limits={"first_byte_s": SOON_S, "idle_s": SOON_S}))
    )
    wire = await listener.accept()
    await wire.request()
    wire.sends(CHUNKED + chunk(b"one"))
    answer = await sending
    await asyncio.sleep(2 * SOON_S)  # Time is what this is about.
    assert await answer.read() == b"one"
    wire.sends(chunk(b"two"))
    await asyncio.sleep(2 * SOON_S)
    assert await answer.read() == b"two"
    wire.sends(b"0\r\n\r\n")
    assert await answer.read() == b""
    await answer.close()


async def test_whoever_waits_for_a_connection_waits_no_longer_than_for_headers(
    a_client: MakeClient, listener: Listener
) -> None:
    client = a_client(connections_per_host=1)
    async with asking(client, a_request(listener.url)) as asked:
        wire = await listener.accept()
        await wire.request()
        message = await failure(client, a_request(listener.url, limits={"headers_s": SOON_S}))
        assert message == "up did not answer in time (headers_s)"
        message = await failure(client, a_request(listener.url, limits={"timeout_s": SOON_S}))
        assert message == "up did not answer in time (timeout)"
        wire.sends(ANSWER)
        assert await asked == ANSWERED


# -- pools -------------------------------------------------------------------------------------------------------------


async def test_requests_wait_for_a_connection_in_the_order_in_which_they_came(
    a_client: MakeClient, listener: Listener
) -> None:
    client = a_client(connections_per_host=1)
    seen: list[bytes] = []
    gate = asyncio.Event()

    async def behave(wire: Wire) -> None:
        while request := await wire.request():
            seen.append(request.split(b" ")[1])
            await gate.wait()
            wire.sends(ANSWER)

    listener.serve(behave)
    asked = []
    for i in range(20):
        asked.append(asyncio.create_task(ask(client, a_request(f"{listener.url}/{i}"))))
        await turns(1)
    await turns()
    for i in (3, 4, 11, 19):
        asked[i].cancel()
    gate.set()
    outcomes = await asyncio.gather(*asked, return_exceptions=True)
    assert seen == [b"/%d" % i for i in range(20) if i not in (3, 4, 11, 19)]
    assert all(outcome == ANSWERED for i, outcome in enumerate(outcomes) if i not in (3, 4, 11, 19))
    assert len(listener.wires) == 1


async def test_whoever_is_given_a_connection_that_has_ended_keeps_his_place_in_the_line(
    a_client: MakeClient, listener: Listener
) -> None:
    client = a_client(connections_per_host=1)
    seen: list[bytes] = []

    async def behave(wire: Wire) -> None:
        request = await wire.request()
        seen.append(request.split(b" ")[1])
        wire.sends(ANSWER)
        wire.stops_sending()
        await wire.is_left()

    listener.serve(behave)
    asked = []
    for i in range(10):
        asked.append(asyncio.create_task(ask(client, a_request(f"{listener.url}/{i}"))))
        await turns(1)
    assert await asyncio.gather(*asked) == [ANSWERED] * 10
    assert seen == [b"/%d" % i for i in range(10)]


@pytest.mark.parametrize("count", range(16))
async def test_a_place_given_to_somebody_who_has_left_goes_to_the_next(
    a_client: MakeClient, listener: Listener, count: int
) -> None:
    client = a_client(connections_per_host=1)
    async with asking(client, a_request(listener.url)) as one, asking(client, a_request(listener.url)) as two:
        wire = await listener.accept()
        await wire.request()
        wire.sends(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
        await turns(count)
        two.cancel()
        await asyncio.gather(two, return_exceptions=True)
        assert (await one).status == 200
    listener.serve(answers_all)
    assert await ask(client, a_request(listener.url)) == ANSWERED


async def answers_all(wire: Wire) -> None:
    """Answers each request."""
    while await wire.request():
        wire.sends(ANSWER)


async def test_a_place_in_the_pool_outlives_every_kind_of_failure(a_client: MakeClient, listener: Listener) -> None:
    """With one place only, whatever lost it would be the last."""
    client = a_client(connections_per_host=1)
    ends = [
        b"",
        b"HTTP/1.1 2",
        b"nonsense\r\n\r\n",
        CHUNKED + b"x\r\n",
        CHUNKED + chunk(b"a"),
        b"HTTP/1.1 101 X\r\n\r\n",
    ]
    for sent in ends:
        async with asking(client, a_request(listener.url)) as asked:
            wire = await listener.accept()
            await wire.request()
            await wire.feeds([sent] if sent else [])
            wire.stops_sending()
            assert (await asked).error
            assert await wire.is_left()
    refusing = a_request(listener.url, limits={"connect_s": SOON_S})
    async with asking(client, refusing) as asked:
        await answer_one(listener)
        assert await asked == ANSWERED


async def test_a_failed_connection_attempt_gives_its_place_to_the_next(a_client: MakeClient) -> None:
    client = a_client(connections_per_host=1)
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    outcomes = await asyncio.gather(*(ask(client, a_request(f"http://127.0.0.1:{port}/")) for _ in range(10)))
    assert outcomes == [Outcome(error="head")] * 10


async def test_pools_of_different_origins_are_their_own(a_client: MakeClient, listener: Listener) -> None:
    client = a_client(connections_per_host=1)
    async with asking(client, a_request(listener.url)) as one:
        first = await listener.accept()
        await first.request()
        async with asking(client, a_request(f"http://localhost:{listener.port}")) as two:
            await answer_one(listener)
            assert await two == ANSWERED
        first.sends(ANSWER)
        assert await one == ANSWERED


class Crowd:
    """Upstreams that answer in all ways, by what each path asks for; `most` is how many connections were ever open."""

    def __init__(self, seed: int) -> None:
        self._draw = random.Random(seed)
        self._open: set[Wire] = set()
        self.most = 0
        self.seen: dict[str, int] = {}
        self.is_calm = False

    @property
    def open(self) -> int:
        """How many connections the client has not closed."""
        return sum(not self._is_left(wire) for wire in self._open)

    @staticmethod
    def _is_left(wire: Wire) -> bool:
        try:
            return wire.sock.recv(1, socket.MSG_PEEK) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True

    async def behave(self, wire: Wire) -> None:
        """Serves a connection."""
        self._open.add(wire)
        self.most = max(self.most, self.open)
        try:
            while request := await wire.request():
                await self._answer(wire, request.split(b" ")[1][1:])
        finally:
            self._open.discard(wire)

    async def _answer(self, wire: Wire, path: bytes) -> None:
        self.seen[path.decode()] = self.seen.get(path.decode(), 0) + 1
        draw = self._draw
        await turns(draw.randrange(8))
        body = path * 50
        if draw.random() < 0.5:
            whole = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        else:
            whole = CHUNKED + chunk(body[:20]) + chunk(body[20:]) + b"0\r\n\r\n"
        cut = draw.randrange(1, len(whole))  # Never behind the answer: what comes later may answer the next request.
        fate = 1.0 if self.is_calm else draw.random()
        if fate < 0.1:
            whole = whole[: draw.randrange(len(whole))]
        elif fate < 0.2:
            whole += b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nsecret"
        await wire.feeds([piece for piece in (whole[:cut], whole[cut:]) if piece])
        if fate < 0.1 or 0.2 < fate < 0.25:
            raise ConnectionResetError


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("limit", [1, 8, 40])
async def test_a_crowd_that_comes_and_goes_gets_its_own_answers_over_a_bounded_pool(
    a_client: MakeClient, listener: Listener, seed: int, limit: int
) -> None:
    """Five hundred at once, some of whom leave at any moment: no answer goes astray, nothing is lost or left over."""
    client = a_client(connections_per_host=limit)
    crowd = Crowd(seed)
    listener.serve(crowd.behave)
    draw = random.Random(seed)
    count = 500

    async def one(number: int) -> tuple[int, Outcome]:
        read = draw.choice([*READERS.values()])
        return number, await ask(client, a_request(f"{listener.url}/{number}", body=b"x" * draw.randrange(100)), read)

    async def leave(tasks: list[asyncio.Task[tuple[int, Outcome]]]) -> None:
        while not all(task.done() for task in tasks):
            draw.choice(tasks).cancel()
            await turns(draw.randrange(1, 12))

    tasks = [asyncio.create_task(one(number)) for number in range(count)]
    leaving = asyncio.create_task(leave(tasks))
    ends = await asyncio.gather(*tasks, return_exceptions=True)
    await leaving
    for end in ends:
        if isinstance(end, asyncio.CancelledError):
            continue
        assert not isinstance(end, BaseException), end
        number, outcome = end
        body = str(number).encode() * 50
        assert outcome.body == body if not outcome.error else body.startswith(outcome.body)
    assert set(crowd.seen.values()) == {1}, "something was asked twice"
    assert crowd.most <= limit
    await turns(50)
    assert crowd.open <= limit
    # Nothing of it is in the way of those who come next, as many at a time as the pool allows.
    crowd.is_calm = True
    outcomes = await asyncio.gather(*(ask(client, a_request(f"{listener.url}/{count + i}")) for i in range(2 * limit)))
    assert [outcome.body for outcome in outcomes] == [str(count + i).encode() * 50 for i in range(2 * limit)]
    assert crowd.most <= limit


async def test_a_connection_that_nobody_uses_ends_after_a_while(
    a_client: MakeClient, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "_IDLE_S", SOON_S)
    client = a_client()
    async with asking(client, a_request(listener.url)) as one, asking(client, a_request(listener.url)) as two:
        wires = [await answer_one(listener), await answer_one(listener)]
        assert [await one, await two] == [ANSWERED, ANSWERED]
    assert [await wire.is_left() for wire in wires] == [True, True]
    async with asking(client, a_request(listener.url)) as asked:
        wire = await answer_one(listener)
        assert await asked == ANSWERED
    assert wire.number == 2


# -- leaving -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", range(16))
@pytest.mark.parametrize("answer", [ANSWER, CHUNKED + chunk(b"hel") + chunk(b"lo") + b"0\r\n\r\n"])
async def test_whoever_leaves_at_any_moment_leaves_nothing_behind(
    a_client: MakeClient, listener: Listener, count: int, answer: bytes
) -> None:
    """The place in a pool of one is free again, whatever was under way: connecting, writing, waiting, reading."""
    client = a_client(connections_per_host=1)
    halves = [answer[: len(answer) // 2], answer[len(answer) // 2 :]]

    async def behave(wire: Wire) -> None:
        while await wire.request():
            await wire.feeds(halves)

    listener.serve(behave)
    for read in READERS.values():
        for body in (b"", b"x", b"x" * 2**22):
            async with asking(client, a_request(f"{listener.url}/left", body=body), read) as asked:
                await turns(count)
                asked.cancel()
                await asyncio.gather(asked, return_exceptions=True)
        outcome = await ask(client, a_request(f"{listener.url}/next"))
        assert (outcome.status, outcome.body, outcome.error) == (200, b"hello", "")


async def test_whoever_leaves_while_a_connection_is_made_leaves_no_socket(a_client: MakeClient) -> None:
    client = a_client(connections_per_host=1)
    with full_listener() as url:
        for _ in range(3):
            async with asking(client, a_request(url)):
                await turns()


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
@pytest.mark.parametrize("sent", [b"", CHUNKED, CHUNKED + chunk(b"one")])
async def test_whoever_leaves_in_the_middle_ends_the_connection(
    client: Upstream, listener: Listener, sent: bytes, read: Reader
) -> None:
    async with asking(client, a_request(listener.url), read):
        wire = await listener.accept()
        await wire.request()
        await wire.feeds([sent] if sent else [])
        await turns()
    assert await wire.is_left()


async def test_an_answer_closed_before_its_end_ends_the_connection(client: Upstream, listener: Listener) -> None:
    sending = asyncio.create_task(client.send(a_request(listener.url)))
    wire = await listener.accept()
    await wire.request()
    wire.sends(CHUNKED + chunk(b"one"))
    answer = await sending
    await answer.close()
    assert await wire.is_left()
    await answer.close()


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
async def test_whoever_reads_an_answer_that_is_closed_meanwhile_is_told_so(
    client: Upstream, listener: Listener, read: Reader
) -> None:
    sending = asyncio.create_task(client.send(a_request(listener.url)))
    wire = await answer_one(listener, CHUNKED)
    answer = await sending
    reading = asyncio.ensure_future(read(answer, bytearray()))
    await turns()
    await answer.close()
    async with asyncio.timeout(PATIENCE_S):
        with pytest.raises(UpstreamError):
            await reading
    assert await wire.is_left()


async def test_an_answer_at_its_end_says_so_as_often_as_it_is_asked(client: Upstream, listener: Listener) -> None:
    sending = asyncio.create_task(client.send(a_request(listener.url)))
    await answer_one(listener)
    answer = await sending
    assert answer.length == 5
    assert await answer.read() == b"hello"
    assert [await answer.read() for _ in range(3)] == [b""] * 3
    assert await answer.pump(lambda *_: True) == b""
    await answer.close()


async def test_a_failed_answer_fails_as_often_as_it_is_asked(client: Upstream, listener: Listener) -> None:
    sending = asyncio.create_task(client.send(a_request(listener.url)))
    wire = await answer_one(listener, CHUNKED + chunk(b"one"))
    answer = await sending
    wire.resets()
    assert await answer.read() == b"one"
    for _ in range(3):
        with pytest.raises(UpstreamError, match="up broke off its answer"):
            await answer.read()
        with pytest.raises(UpstreamError, match="up broke off its answer"):
            await answer.pump(lambda *_: True)
    await answer.close()


async def test_an_error_of_whoever_takes_reaches_whoever_pumps(client: Upstream, listener: Listener) -> None:
    def take(chunk: bytes, framed: bytes = b"", /) -> bool:
        raise ZeroDivisionError

    sending = asyncio.create_task(client.send(a_request(listener.url)))
    wire = await answer_one(listener, CHUNKED)
    answer = await sending
    pumping = asyncio.create_task(answer.pump(take))
    await turns()
    wire.sends(chunk(b"one"))
    with pytest.raises(ZeroDivisionError):
        await pumping
    await answer.close()
    assert await wire.is_left()


@pytest.mark.parametrize("closes", [False, True])
async def test_an_answer_may_be_closed_by_whoever_takes_it(client: Upstream, listener: Listener, closes: bool) -> None:
    """The client of a client hangs up in the very callback that writes to it."""
    sending = asyncio.create_task(client.send(a_request(listener.url)))
    wire = await answer_one(listener, CHUNKED)
    answer = await sending
    pumping: asyncio.Task[bytes]

    def take(chunk: bytes, framed: bytes = b"", /) -> bool:
        pumping.cancel()
        return closes

    pumping = asyncio.create_task(answer.pump(take))
    await turns()
    wire.sends(chunk(b"one") + chunk(b"two"))
    with pytest.raises(asyncio.CancelledError):
        await pumping
    await answer.close()
    assert await wire.is_left()


@pytest.mark.parametrize("sent", [b"", b"HTTP/1.1 200", CHUNKED, CHUNKED + chunk(b"one")])
@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
async def test_a_client_that_is_closed_ends_what_is_under_way(
    client: Upstream, listener: Listener, sent: bytes, read: Reader
) -> None:
    async with asking(client, a_request(listener.url), read) as asked:
        wire = await listener.accept()
        await wire.request()
        await wire.feeds([sent] if sent else [])
        async with asyncio.timeout(PATIENCE_S):
            await client.close()
            assert (await asked).error == ("body" if sent.startswith(CHUNKED) else "head")
            assert await wire.is_left()


async def test_a_client_that_is_closed_while_it_connects_leaves_nothing(client: Upstream) -> None:
    with full_listener() as url:
        async with asking(client, a_request(url)):
            await turns()
            async with asyncio.timeout(PATIENCE_S):
                await client.close()


async def test_a_client_that_is_closed_sends_its_idle_connections_their_end(
    client: Upstream, listener: Listener
) -> None:
    idle = await an_idle_wire(client, listener)
    await client.close()
    assert await idle.is_left()
