"""How long both fronts wait for a client, and how connections end when the gateway does."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import Callable

import pytest

from balancer.gateway import app, front, front_server
from balancer.gateway.lane import Lanes
from tests.actors import OPENAI_JSON, Upstream, openai_events
from tests.gateway import corpus, wire
from tests.gateway.conftest import Serve, Served, a_document
from tests.gateway.test_fronts import CHUNKED, MODELS, STREAM, Open, assert_nothing_stays, attempts

# -- slow clients ------------------------------------------------------------------------------------------------------

SLOW_S = 0.3


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> Callable[[Served], None]:
    """Both fronts wait for SLOW_S only where they would for a minute, or an hour; to be called with a gateway too."""
    monkeypatch.setattr(app, "Lanes", functools.partial(Lanes, idle_s=2 * SLOW_S, slow_s=SLOW_S, sweep_s=SLOW_S / 10))
    monkeypatch.setattr(front, "SLOW_S", SLOW_S)
    monkeypatch.setattr(front_server, "SLOW_S", SLOW_S)

    def shorten(gateway: Served) -> None:
        # A connection that is idle has no other limit on aiohttp's side.
        Open(gateway).server._kwargs["keepalive_timeout"] = 2 * SLOW_S

    return shorten


DRIPS = {
    "a usual head": corpus.sized()[:60],
    "a head of another method": MODELS[:-4],
    "a head in chunks": CHUNKED[:100],
    "a usual body": corpus.sized()[:-5],
    "a body in chunks": CHUNKED[:-12],
    "an expected body": corpus.sized(b"Expect: 100-continue")[:-5],
}


@pytest.mark.parametrize(("name", "drips"), [(name, drips) for name in DRIPS for drips in {False, "head" in name}])
async def test_a_request_that_never_ends_is_given_up(
    serve: Serve, upstream: Upstream, impatient: Callable[[Served], None], name: str, drips: bool
) -> None:
    """A head has that long as a whole; a body may go on as long as parts of it come."""
    gateway = await serve(a_document(upstream.url))
    impatient(gateway)
    sent = DRIPS[name]
    async with wire.a_line(gateway.url) as line:
        await line.send(sent[:-4] if drips else sent)
        if drips:
            for byte in sent[-4:]:
                await line.until_closed(SLOW_S / 3)
                await line.send(bytes([byte]))
        assert await line.until_closed(10 * SLOW_S)
    assert upstream.received == []
    await assert_nothing_stays(gateway)


@pytest.mark.parametrize(
    "raw", [corpus.sized(b"Connection: close"), CHUNKED.replace(b"Host", b"Connection: close\r\nHost")]
)
async def test_a_body_that_comes_slowly_but_comes_is_read(
    serve: Serve, upstream: Upstream, impatient: Callable[[Served], None], raw: bytes
) -> None:
    gateway = await serve(a_document(upstream.url))
    impatient(gateway)
    head, end, body = raw.partition(b"\r\n\r\n")
    size = len(body) // 5 + 1
    async with wire.a_line(gateway.url) as line:
        await line.send(head + end)
        for at in range(0, len(body), size):
            await line.send(body[at : at + size])
            await line.until_closed(SLOW_S / 2)
        assert await line.until_closed()
        assert [answer.status for answer in wire.answers_in(bytes(line.held))] == [200]
    await assert_nothing_stays(gateway)


@pytest.mark.parametrize("first", [b"", corpus.sized(), CHUNKED], ids=["nothing", "a request", "chunks"])
async def test_a_connection_that_is_idle_is_closed(
    serve: Serve, upstream: Upstream, impatient: Callable[[Served], None], first: bytes
) -> None:
    gateway = await serve(a_document(upstream.url))
    impatient(gateway)
    async with wire.a_line(gateway.url) as line:
        await line.send(first)
        if first:
            await line.until(OPENAI_JSON)
        assert not line.closed.done()
        assert await line.until_closed(20 * SLOW_S)
    await assert_nothing_stays(gateway)


async def test_an_answer_may_take_longer_than_a_client_may_be_idle(
    serve: Serve, upstream: Upstream, impatient: Callable[[Served], None]
) -> None:
    gateway = await serve(a_document(upstream.url))
    impatient(gateway)
    gate = asyncio.Event()
    upstream.streams(openai_events(), gates={1: gate})
    async with wire.a_line(gateway.url) as line:
        await line.send(STREAM)
        await line.until(b"w0")
        assert not await line.until_closed(4 * SLOW_S)
        gate.set()
        await line.until(b"[DONE]")


# -- drain -------------------------------------------------------------------------------------------------------------


async def test_a_drain_closes_idle_connections_and_lets_open_answers_end(serve: Serve, upstream: Upstream) -> None:
    gateway = await serve(a_document(upstream.url), drain_timeout_s=20)
    gate = asyncio.Event()
    upstream.streams(openai_events(), gates={1: gate})
    async with contextlib.AsyncExitStack() as stack:
        idle, half, used, handed_over, streaming, chunking = [
            await stack.enter_async_context(wire.a_line(gateway.url)) for _ in range(6)
        ]
        await half.send(corpus.sized()[:60])
        for line, raw in ((used, corpus.sized(body=b"{")), (handed_over, MODELS)):
            await line.send(raw)
            await line.until(b"}")
        await streaming.send(STREAM)
        await streaming.until(b"w0")
        await chunking.send(corpus.a_request(corpus.CHUNKED, body=b"1d\r\n%b\r\n0\r\n\r\n" % STREAM[-29:]))
        await chunking.until(b"w0")
        drain = asyncio.create_task(gateway.gateway.drain())
        await asyncio.sleep(0.05)
        assert not streaming.closed.done()
        assert not chunking.closed.done()
        gate.set()
        await drain
        for line in (idle, half, used, handed_over, streaming, chunking):
            assert await line.until_closed()
        for line in (streaming, chunking):
            (answer,) = wire.answers_in(bytes(line.held))
            assert answer.is_whole
            assert b"[DONE]" in answer.body
    assert attempts(gateway) == {"success": 2}


@pytest.mark.parametrize("raw", [corpus.sized(), CHUNKED], ids=["usual", "chunks"])
async def test_a_request_that_comes_while_the_gateway_drains_is_the_connection_s_last(
    serve: Serve, upstream: Upstream, raw: bytes
) -> None:
    gateway = await serve(a_document(upstream.url), drain_delay_s=1.0)
    async with wire.a_line(gateway.url) as line:
        await line.send(raw)
        await line.until(OPENAI_JSON)
        drain = asyncio.create_task(gateway.gateway.drain())
        await asyncio.sleep(0.05)
        await line.send(raw + corpus.SMUGGLED)
        assert await line.until_closed(0.9)
        first, second = wire.answers_in(bytes(line.held))
        assert (first.header("connection"), second.status, second.header("connection")) == (None, 200, "close")
        await drain
