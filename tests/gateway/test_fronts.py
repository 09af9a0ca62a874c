"""Clients that leave, ask for too much or speak TLS: the same on both fronts and loops, and nothing stays behind."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import ipaddress
import os
import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from balancer.gateway import front_server
from balancer.gateway.lane import Lane
from tests.actors import STREAM_HEAD, Upstream, chunk, openai_events
from tests.faults import FaultProxy
from tests.gateway import corpus, wire
from tests.gateway.conftest import Serve, Served, a_document, serving
from tests.store.conftest import eventually

ON_BOTH_LOOPS = True
GPT = "up:up-model"
STREAM = corpus.sized(body=b'{"model":"gpt","stream":true}')
MODELS = b"GET /v1/models HTTP/1.1\r\nHost: gateway\r\n\r\n"
CHUNKED = corpus.a_request(corpus.CHUNKED, body=corpus.CHUNKS)


class Open:
    """What a gateway holds of its clients, from within."""

    def __init__(self, gateway: Served) -> None:
        self._gateway = gateway.gateway

    @property
    def server(self) -> front_server.Server:
        """The server of the data plane."""
        server = self._gateway._runners[0].server
        assert isinstance(server, front_server.Server)
        return server

    @property
    def lanes(self) -> set[Lane]:
        """The lane's connections."""
        return self.server.lanes.open if self.server.lanes is not None else set()

    @property
    def connections(self) -> int:
        """The connections of both."""
        return len(self.lanes) + len(self.server.connections)

    @property
    def requests(self) -> int:
        """The requests that are being answered."""
        return self._gateway._open_requests


async def assert_nothing_stays(gateway: Served) -> None:
    """No connection, no request and no pick is left open."""

    async def is_over() -> bool:
        held = Open(gateway)
        states = (await gateway.view()).services.values()
        return not held.requests and not held.connections and not any(state.in_flight for state in states)

    await eventually(is_over)


def attempts(gateway: Served) -> dict[str, int]:
    """The attempts that were settled, by outcome."""
    gateway.gateway.metrics.flush()  # Those of the express way are counted some time soon.
    totals = gateway.gateway.metrics.attempts.totals()
    return {outcome: int(count) for (*_, outcome), count in totals.items() if count}


async def ask(gateway: Served, *pieces: bytes, tls: ssl.SSLContext | None = None) -> list[wire.Answer]:
    """The answers on a connection that is sent these pieces, until the gateway closes it."""
    async with wire.a_line(gateway.url, tls) as line:
        await line.send(*pieces)
        assert await line.until_closed()
        return wire.answers_in(bytes(line.held))


# -- clients that leave ------------------------------------------------------------------------------------------------


async def half_closes(line: wire.Line) -> None:
    """The client says that it sends no more: it is taken for gone."""
    if not line.transport.is_closing():
        line.transport.write_eof()
    await line.until_closed()


async def closes(line: wire.Line) -> None:
    """The client closes."""
    line.transport.close()


async def resets(line: wire.Line) -> None:
    """The client's machine is gone."""
    line.transport.abort()


LEAVES: dict[str, Callable[[wire.Line], Awaitable[None]]] = {
    "half-closes": half_closes,
    "closes": closes,
    "resets": resets,
}
HALVES = {
    "nothing": b"",
    "half a head": corpus.sized()[:50],
    "half a head for aiohttp": MODELS[:30],
    "half a body": corpus.sized()[:-5],
    "half a body in chunks": CHUNKED[:-12],
    "an expectation": corpus.sized(b"Expect: 100-continue")[: -len(corpus.MEANT)],
}


@pytest.mark.parametrize("how", LEAVES)
@pytest.mark.parametrize("name", HALVES)
async def test_a_client_that_leaves_in_its_request_leaves_nothing(
    gateway: Served, upstream: Upstream, how: str, name: str
) -> None:
    async with wire.a_line(gateway.url) as line:
        await line.send(HALVES[name])
        await LEAVES[how](line)
    await assert_nothing_stays(gateway)
    assert upstream.received == []
    assert attempts(gateway) == {}


@pytest.mark.parametrize("how", LEAVES)
@pytest.mark.parametrize("raw", [corpus.sized(), CHUNKED], ids=["usual", "chunks"])
async def test_a_client_that_leaves_before_the_answer_cancels_its_attempt(
    gateway: Served, upstream: Upstream, how: str, raw: bytes
) -> None:
    upstream.stalls()
    async with wire.a_line(gateway.url) as line:
        await line.send(raw)
        await asyncio.wait_for(upstream.stalled.wait(), 10)
        await LEAVES[how](line)
        await asyncio.wait_for(upstream.hung_up.wait(), 10)
    await assert_nothing_stays(gateway)
    assert attempts(gateway) == {"cancelled": 1}


@pytest.mark.parametrize("how", LEAVES)
@pytest.mark.parametrize("raw", [STREAM, CHUNKED], ids=["usual", "chunks"])
async def test_a_client_that_leaves_in_a_stream_cancels_its_attempt(
    gateway: Served, upstream: Upstream, how: str, raw: bytes
) -> None:
    upstream.sends(STREAM_HEAD + chunk(openai_events()[0]), stalls=True)
    async with wire.a_line(gateway.url) as line:
        await line.send(raw)
        await line.until(b"w0")
        await LEAVES[how](line)
        await asyncio.wait_for(upstream.hung_up.wait(), 10)
    await assert_nothing_stays(gateway)
    assert attempts(gateway) == {"cancelled": 1}


@pytest.mark.parametrize("how", LEAVES)
async def test_a_client_that_leaves_while_its_service_is_picked_gives_the_pick_back(
    store_url: str, tmp_path: Path, upstream: Upstream, front: str, how: str
) -> None:
    async with FaultProxy(store_url, tmp_path / "proxy.sock").running() as proxy:
        flags: dict[str, Any] = {"fast_lane": front == "lane", "redis_deadline_ms": 30_000}
        async with serving(proxy.url, tmp_path, a_document(upstream.url), **flags) as gateway:
            assert [answer.status for answer in await ask(gateway, corpus.MARKER)] == [200]
            proxy.delays(0.2)
            async with wire.a_line(gateway.url) as line:
                await line.send(corpus.sized())

                async def is_asking() -> bool:
                    return Open(gateway).requests == 1

                await eventually(is_asking)
                await LEAVES[how](line)
            proxy.passes()
            await assert_nothing_stays(gateway)
            assert len(upstream.received) == 1
            assert attempts(gateway) == {"success": 1}


@pytest.mark.parametrize("turns", range(0, 60, 4))
async def test_a_client_may_leave_in_any_turn_of_the_loop(gateway: Served, upstream: Upstream, turns: int) -> None:
    """Between select, connect, send, the answer's head and its body there are some fifty."""
    for leave in (half_closes, closes, resets):
        async with wire.a_line(gateway.url) as line:
            await line.send(STREAM)
            for _ in range(turns):
                await asyncio.sleep(0)
            await leave(line)
    await assert_nothing_stays(gateway)
    state = (await gateway.view()).services.get(GPT)
    assert sum(attempts(gateway).values()) == (state.requests if state else 0)
    assert attempts(gateway).keys() <= {"success", "cancelled"}


async def test_a_thousand_connections_come_and_go(gateway: Served) -> None:
    beginnings = [b"", corpus.sized()[:50], MODELS[:20], corpus.sized()[:-1], CHUNKED[:-3]]
    # Once it has answered, what runs in the background is there: the feed of changes begins a moment after the start.
    assert [answer.status for answer in await ask(gateway, corpus.MARKER)] == [200]
    before = len(asyncio.all_tasks())
    async with contextlib.AsyncExitStack() as stack:
        lines = [await stack.enter_async_context(wire.a_line(gateway.url)) for _ in range(1000)]
        for number, line in enumerate(lines):
            line.transport.write(beginnings[number % len(beginnings)])

        async def is_full() -> bool:
            return Open(gateway).connections == len(lines)

        await eventually(is_full)
        assert [answer.status for answer in await ask(gateway, corpus.MARKER)] == [200]
        for number, line in enumerate(lines):
            await (closes if number % 2 else resets)(line)
    await assert_nothing_stays(gateway)
    assert len(asyncio.all_tasks()) <= before


# -- much at once ------------------------------------------------------------------------------------------------------


def resident_bytes() -> int:
    """The memory of this process that is in use."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def until_it_stands(count: Callable[[], int], stands_s: float = 0.3) -> int:
    """The count, once it has not moved for a while."""
    last, still = -1, 0
    async with asyncio.timeout(60):
        while still < 10:
            await asyncio.sleep(stands_s / 10)
            still = still + 1 if count() == last else 0
            last = count()
    return last


async def test_answers_to_requests_that_came_at_once_come_in_their_order(gateway: Served, upstream: Upstream) -> None:
    requests = [corpus.sized(b"x-request-id: n%d" % number) for number in range(60)]
    requests[7] = corpus.sized(b"x-request-id: n7", body=b"{")
    requests[20] = corpus.sized(b"x-request-id: n20", first=b"POST /nowhere HTTP/1.1")
    requests[40] = corpus.a_request(b"x-request-id: n40", corpus.CHUNKED, body=corpus.CHUNKS)
    requests[50] = MODELS.replace(b"Host", b"x-request-id: n50\r\nHost")
    answers = await ask(gateway, b"".join(requests) + corpus.MARKER)
    assert [answer.header("x-request-id") for answer in answers[:-1]] == [f"n{number}" for number in range(60)]
    assert len(upstream.received) == 60 - 3 + 1


MEGABYTE = 2**20
FLOOD = corpus.sized() * (MEGABYTE // len(corpus.sized()))
FLOODS = 32


@pytest.mark.parametrize("answers", [False, True], ids=["stalls", "answers"])
@pytest.mark.parametrize("first", [b"", CHUNKED], ids=["usual", "chunks"])
async def test_a_client_that_asks_on_and_on_is_held_back(
    gateway: Served, upstream: Upstream, answers: bool, first: bytes
) -> None:
    """What waits in the gateway stays small, whether the request before it is answered at once or late."""
    gate = asyncio.Event()
    if not answers:
        upstream.streams(openai_events(), gates={0: gate})
    async with wire.a_line(gateway.url) as line:
        line.transport.write(first + FLOOD * FLOODS)
        if answers:

            async def has_answered() -> bool:
                return len(upstream.received) > 100

            await eventually(has_answered, 30)
        else:
            await until_it_stands(line.transport.get_write_buffer_size)
        # The client's own buffer holds what the gateway does not, but for what the kernel does.
        assert line.transport.get_write_buffer_size() > (FLOODS - 12) * MEGABYTE
    # While nothing is read of it, a connection that is gone is noticed when something is written.
    gate.set()
    await assert_nothing_stays(gateway)


PIECE = b"data: " + b"x" * 2**16 + b"\n\n"
PIECES = 3200


@pytest.mark.parametrize("raw", [STREAM, corpus.sized(), CHUNKED], ids=["stream", "json", "chunks"])
async def test_of_200_megabytes_that_a_client_does_not_read_little_is_held(
    serve: Serve, raw: bytes, upstream: Upstream
) -> None:
    sent = 0

    async def behave(_: Upstream, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        is_stream = raw == STREAM
        head = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: %d\r\n\r\n" % (len(PIECE) * PIECES)
        writer.write(STREAM_HEAD if is_stream else head)
        for _piece in range(PIECES):
            writer.write(chunk(PIECE) if is_stream else PIECE)
            await writer.drain()
            sent += 1

    upstream._behaviour = behave
    gateway = await serve(a_document(upstream.url))
    async with wire.a_line(gateway.url) as line:
        line.transport.pause_reading()
        before = resident_bytes()
        await line.send(raw)
        assert 0 < await until_it_stands(lambda: sent) < PIECES // 4
        assert resident_bytes() - before < 32 * MEGABYTE
    await assert_nothing_stays(gateway)
    assert attempts(gateway) == {"cancelled": 1}


# -- TLS ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for localhost, and its key."""
    folder = tmp_path_factory.mktemp("tls")
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    cert_file, key_file = folder / "cert.pem", folder / "key.pem"
    cert_file.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    key_file.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return cert_file, key_file


@pytest.fixture
async def secure(serve: Serve, upstream: Upstream, certificate: tuple[Path, Path]) -> tuple[Served, ssl.SSLContext]:
    """A gateway that speaks TLS, and a client's context that trusts it."""
    cert_file, key_file = certificate
    gateway = await serve(a_document(upstream.url), tls_cert_file=str(cert_file), tls_key_file=str(key_file))
    return gateway, ssl.create_default_context(cafile=str(cert_file))


SECURE = {
    "usual": (corpus.sized(), [200, 200]),
    "chunks": (CHUNKED, [200, 200]),
    "models": (MODELS, [200, 200]),
    "usual, then chunks": (corpus.sized() + CHUNKED, [200, 200, 200]),
    "chunks, then usual": (CHUNKED + corpus.sized(), [200, 200, 200]),
    "malformed": (corpus.a_request(b"Content-Length: x"), [400]),
    "an expectation": (corpus.sized(b"Expect: 100-continue"), [100, 200, 200]),
    "5 MB": (corpus.sized(body=b'{"model":"gpt","messages":["%b"]}' % (b"x" * 5_000_000)), [200, 200]),
}


@pytest.mark.parametrize("delivery", ["whole", "bytes", "cuts"])
@pytest.mark.parametrize("name", SECURE)
async def test_requests_over_tls_are_served_by_both_fronts(
    secure: tuple[Served, ssl.SSLContext], name: str, delivery: str
) -> None:
    gateway, tls = secure
    raw, statuses = SECURE[name]
    if delivery == "bytes" and len(raw) > 3000:
        delivery = "cuts"
    pieces = [*wire.in_pieces(raw, delivery), corpus.MARKER]
    assert [answer.status for answer in await ask(gateway, *pieces, tls=tls)] == statuses
    await assert_nothing_stays(gateway)


@pytest.mark.parametrize("how", ["closes", "resets"])
@pytest.mark.parametrize("raw", [STREAM, CHUNKED], ids=["usual", "chunks"])
async def test_a_client_that_leaves_a_stream_over_tls_cancels_its_attempt(
    secure: tuple[Served, ssl.SSLContext], upstream: Upstream, raw: bytes, how: str
) -> None:
    gateway, tls = secure
    upstream.sends(STREAM_HEAD + chunk(openai_events()[0]), stalls=True)
    async with wire.a_line(gateway.url, tls) as line:
        await line.send(raw)
        await line.until(b"w0")
        await LEAVES[how](line)
        await asyncio.wait_for(upstream.hung_up.wait(), 10)
    await assert_nothing_stays(gateway)
    assert attempts(gateway) == {"cancelled": 1}


@pytest.mark.parametrize(
    "noise",
    [corpus.MARKER, bytes(200), b"\x16\x03\x01\x02\x00\x01", b""],
    ids=["a request", "noise", "half a handshake", "nothing"],
)
async def test_who_speaks_no_tls_at_its_port_is_not_served_and_harms_nobody(
    secure: tuple[Served, ssl.SSLContext], upstream: Upstream, noise: bytes
) -> None:
    gateway, tls = secure
    async with wire.a_line(gateway.url) as line:
        await line.send(noise)
        assert [answer.status for answer in await ask(gateway, corpus.MARKER, tls=tls)] == [200]
        await half_closes(line)
        assert b"HTTP/" not in line.held
    assert len(upstream.received) == 1
    await assert_nothing_stays(gateway)


async def test_a_client_over_tls_that_does_not_read_holds_the_upstream_back(
    secure: tuple[Served, ssl.SSLContext], upstream: Upstream
) -> None:
    gateway, tls = secure
    sent = 0

    async def behave(_: Upstream, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(STREAM_HEAD)
        for _piece in range(PIECES):
            writer.write(chunk(PIECE))
            await writer.drain()
            sent += 1

    upstream._behaviour = behave
    async with wire.a_line(gateway.url, tls) as line:
        line.transport.pause_reading()
        before = resident_bytes()
        await line.send(STREAM)
        assert 0 < await until_it_stands(lambda: sent) < PIECES // 4
        assert resident_bytes() - before < 32 * MEGABYTE
    await assert_nothing_stays(gateway)
    assert attempts(gateway) == {"cancelled": 1}
