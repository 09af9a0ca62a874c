"""The loop that hands readable sockets to whom they belong: it is asyncio's in all else."""

from __future__ import annotations

import asyncio
import os
import select
import selectors
import signal
import socket
from collections.abc import AsyncIterator, Iterator

import pytest

from balancer import polling
from balancer.errors import UpstreamError
from balancer.gateway.messages import Upstream, UpstreamResponse
from balancer.gateway.upstream.connection import Connection
from balancer.polling import Loop, Poller
from tests.gateway.by_hand import Listener, Wire, a_client, a_request, turns

HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
CHUNK = b'12\r\ndata: {"n": 1234}\n\n'[:22] + b"\r\n"
DATA = CHUNK[4:-2]


@pytest.fixture
def poller() -> Iterator[Poller]:
    """A poller of its own."""
    made = Poller()
    yield made
    made.close()


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two connected sockets."""
    one, two = socket.socketpair()
    with one, two:
        yield one, two


# -- the poller --------------------------------------------------------------------------------------------------------


def test_who_is_ready_is_told_to_the_loop_or_to_its_reader(
    poller: Poller, pair: tuple[socket.socket, socket.socket]
) -> None:
    one, two = pair
    key = poller.register(one, selectors.EVENT_READ, "data")
    two.send(b"x")
    assert poller.select(0) == [(key, selectors.EVENT_READ)]
    called: list[int] = []
    poller.readers[one.fileno()] = lambda: called.append(1)
    assert (poller.select(0), called) == ([], [1])
    poller.modify(one, selectors.EVENT_READ | selectors.EVENT_WRITE, "data")
    (_, events), *more = poller.select(0)
    assert (events, more, called) == (selectors.EVENT_READ | selectors.EVENT_WRITE, [], [1])


def test_an_end_is_told_to_the_loop(poller: Poller, pair: tuple[socket.socket, socket.socket]) -> None:
    one, two = pair
    key = poller.register(one, selectors.EVENT_READ)
    poller.readers[one.fileno()] = lambda: pytest.fail("an end is not only something to be read")
    two.close()
    assert poller.select(0) == [(key, selectors.EVENT_READ)]


def test_a_poller_knows_what_is_registered(poller: Poller, pair: tuple[socket.socket, socket.socket]) -> None:
    one, two = pair
    key = poller.register(one, selectors.EVENT_READ)
    with pytest.raises(KeyError):
        poller.register(one.fileno(), selectors.EVENT_READ)
    assert poller.get_key(one.fileno()) == key == poller.get_map()[one]
    assert (list(poller.get_map()), len(poller.get_map()), poller.get_map().get(two)) == ([one.fileno()], 1, None)
    assert poller.unregister(one) == key
    for ask in (poller.get_key, poller.unregister):
        with pytest.raises(KeyError):
            ask(one)
    with pytest.raises(KeyError):
        poller.modify(one, selectors.EVENT_READ)


def test_a_closed_socket_can_be_unregistered(poller: Poller, pair: tuple[socket.socket, socket.socket]) -> None:
    fd = pair[0].fileno()
    poller.register(fd, selectors.EVENT_READ)
    pair[0].close()
    poller.unregister(fd)
    assert len(poller.get_map()) == 0


def test_no_wait_is_too_short(poller: Poller) -> None:
    loop = asyncio.new_event_loop()
    try:
        began = loop.time()
        assert poller.select(0.0101) == []
        assert loop.time() - began >= 0.0101
        assert poller.select(-1) == []
    finally:
        loop.close()


# -- the loop ----------------------------------------------------------------------------------------------------------


async def test_signals_pipes_streams_and_timers_work_as_ever() -> None:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, Loop)
    told = asyncio.Event()
    loop.add_signal_handler(signal.SIGUSR1, told.set)
    os.kill(os.getpid(), signal.SIGUSR1)
    await told.wait()
    assert loop.remove_signal_handler(signal.SIGUSR1)
    one, two = os.pipe()
    told.clear()
    loop.add_reader(one, told.set)
    os.write(two, b"x")
    await told.wait()
    assert loop.remove_reader(one)
    os.close(one)
    os.close(two)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(await reader.readexactly(2**20))  # More than fits the buffers: it waits until it can write.
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    writer.write(bytes(2**20))
    assert await reader.read(-1) == bytes(2**20)
    writer.close()
    server.close()
    await server.wait_closed()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await loop.create_future()


def test_a_loop_is_made_where_there_is_no_epoll_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(select, "epoll")
    loop = polling.new_event_loop()
    assert not isinstance(loop, Loop)
    loop.close()


# -- an upstream's connection on it ------------------------------------------------------------------------------------


@pytest.fixture
async def listener() -> AsyncIterator[Listener]:
    """An upstream by hand."""
    made = Listener()
    yield made
    await made.close()


@pytest.fixture
async def client() -> AsyncIterator[Upstream]:
    """The client that workers use."""
    made = a_client()
    yield made
    await made.close()


def readers() -> int:
    """How many sockets are read in the loop's stead."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, Loop)
    return len(loop.readers)


async def begun(
    client: Upstream, listener: Listener
) -> tuple[Wire, UpstreamResponse, asyncio.Task[bytes], list[bytes]]:
    """A stream whose first chunk was taken, framed or not."""
    sending = asyncio.create_task(client.send(a_request(listener.url)))
    wire = await listener.accept()
    await wire.request()
    wire.sends(HEAD)
    answer = await sending
    taken: list[bytes] = []

    def take(chunk: bytes, framed: bytes = b"", /) -> bool:
        taken.append(framed or chunk)
        return True

    pumping = asyncio.create_task(answer.pump(take))
    await turns()
    await wire.feeds([CHUNK])
    assert taken == [CHUNK]
    return wire, answer, pumping, taken


async def test_chunks_pass_with_their_framing_and_the_connection_is_used_again(
    client: Upstream, listener: Listener
) -> None:
    wire, answer, pumping, taken = await begun(client, listener)
    assert readers() == 1
    await wire.feeds([CHUNK * 3, CHUNK[:9], CHUNK[9:], CHUNK, b"0\r\n\r\n"])
    assert await pumping == b""
    assert taken[1:] == [CHUNK * 3, CHUNK[4:9], DATA[5:], CHUNK]
    await answer.close()
    again = asyncio.create_task(client.send(a_request(listener.url)))
    await wire.request()
    wire.sends(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nagain")
    assert await (await again).read() == b"again"
    assert (len(listener.wires), readers()) == (1, 1)


async def test_an_end_in_the_middle_breaks_the_answer_off(client: Upstream, listener: Listener) -> None:
    wire, _, pumping, _ = await begun(client, listener)
    wire.closes()
    with pytest.raises(UpstreamError, match="broke off its answer"):
        await pumping
    await turns()
    assert readers() == 0


async def test_a_broken_connection_breaks_the_answer_off(client: Upstream, listener: Listener) -> None:
    wire, _, pumping, _ = await begun(client, listener)
    wire.resets()
    with pytest.raises(UpstreamError, match="broke off its answer"):
        await pumping
    await turns()
    assert readers() == 0


async def test_an_error_of_a_read_breaks_the_answer_off(
    client: Upstream, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel tells of an error once: what the loop would read behind it looks like an end in order."""
    wire, _, pumping, _ = await begun(client, listener)

    def fails(*_: object) -> bytes:
        raise ConnectionResetError

    monkeypatch.setattr("balancer.polling.os.read", fails)
    wire.sends(CHUNK)
    with pytest.raises(UpstreamError, match="broke off its answer"):
        await pumping
    await turns()
    assert readers() == 0


async def test_what_is_held_back_is_not_read(client: Upstream, listener: Listener) -> None:
    sending = asyncio.create_task(client.send(a_request(listener.url)))
    wire = await listener.accept()
    await wire.request()
    wire.sends(HEAD)
    answer = await sending
    part = b"fff8\r\n" + b"x" * 0xFFF8 + b"\r\n"
    sent = asyncio.create_task(wire.sends_all(part * 400))
    await asyncio.wait([sent], timeout=0.3)
    assert not sent.done(), "26 MB fit no buffer, unless all is read"
    received = len(await answer.read())
    while received < 0xFFF8 * 400:
        received += len(await answer.read())
    assert await sent
    await answer.close()


async def test_a_secured_connection_is_the_loop_s_to_read(pair: tuple[socket.socket, socket.socket]) -> None:
    """Its bytes are not the answer's."""

    class Secured(asyncio.Transport):
        def get_extra_info(self, name: str, default: object = None) -> object:
            return {"sslcontext": object(), "socket": pair[0]}.get(name, default)

    nobody = lambda _: None  # noqa: E731
    connection = Connection(
        asyncio.get_running_loop(), memoryview(bytearray(9)), first=nobody, freed=nobody, lost=nobody
    )
    connection.connection_made(Secured())
    assert readers() == 0
    connection.connection_lost(None)
