"""The upstream client's small parts on their own: a request's bytes, a pool's order, a connection's one timer."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from balancer.dialects import Headers
from balancer.domain import Timeouts
from balancer.errors import ConfigurationError, UpstreamError, UpstreamTimeoutError
from balancer.gateway.messages import UpstreamRequest
from balancer.gateway.upstream import request as requests
from balancer.gateway.upstream import whole
from balancer.gateway.upstream.answer import answer_to
from balancer.gateway.upstream.chunks import data_of
from balancer.gateway.upstream.connection import Connection
from balancer.gateway.upstream.pool import Pool
from balancer.gateway.upstream.request import Heads, Origin, Targets
from balancer.gateway.upstream.tls import client_context
from balancer.gateway.upstream.whole import read_whole
from tests.gateway.by_hand import unframed

ON_BOTH_LOOPS = True
BUFFER = memoryview(bytearray(16384))
PLAIN = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


def a_request(
    url: str = "http://up.invalid/v1",
    *,
    method: str = "POST",
    headers: Headers = (),
    proxy_url: str = "",
) -> UpstreamRequest:
    """A request with a body of two bytes if its method has one."""
    return UpstreamRequest(
        provider="up",
        method=method,
        url=url,
        headers=headers,
        body=b"{}" if method == "POST" else b"",
        proxy_url=proxy_url,
        timeouts=Timeouts(),
        timeout_s=600,
    )


def head(request: UpstreamRequest) -> bytes:
    """Its first lines."""
    return Heads().of(request, Targets().of(request.url, request.proxy_url))


# -- the head ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "lines"),
    [
        (a_request(), b"POST /v1 HTTP/1.1\r\nHost: up.invalid\r\nContent-Length: 2\r\n\r\n"),
        (a_request("http://up.invalid", method="GET"), b"GET / HTTP/1.1\r\nHost: up.invalid\r\n\r\n"),
        (a_request("http://u/?a=%20b", method="PUT"), b"PUT /?a=%20b HTTP/1.1\r\nHost: u\r\nContent-Length: 0\r\n\r\n"),
        (a_request("https://u:443/", method="GET"), b"GET / HTTP/1.1\r\nHost: u\r\n\r\n"),
        (a_request("https://u:80/", method="GET"), b"GET / HTTP/1.1\r\nHost: u:80\r\n\r\n"),
        (a_request("http://[::1]:81/", method="GET"), b"GET / HTTP/1.1\r\nHost: [::1]:81\r\n\r\n"),
        (a_request("http://größe.invalid/", method="GET"), b"GET / HTTP/1.1\r\nHost: xn--gre-6ka8i.invalid\r\n\r\n"),
        (
            a_request(headers=(("X-A", "é\udce9"), ("host", "other"), ("Content-Length", "9"), ("TE", "x"))),
            b"POST /v1 HTTP/1.1\r\nX-A: \xc3\xa9\xe9\r\nHost: other\r\nContent-Length: 2\r\n\r\n",
        ),
        (
            a_request("http://u/x", method="GET", proxy_url="http://me:p%40ss@proxy.invalid:3128"),
            b"GET http://u/x HTTP/1.1\r\nHost: u\r\nProxy-Authorization: Basic bWU6cEBzcw==\r\n\r\n",
        ),
        (
            a_request("https://u/x", method="GET", proxy_url="http://me:p%40ss@proxy.invalid:3128"),
            b"GET /x HTTP/1.1\r\nHost: u\r\n\r\n",
        ),
    ],
)
def test_a_request_s_first_lines(request_: UpstreamRequest, lines: bytes) -> None:
    assert head(request_) == lines


@pytest.mark.parametrize("value", ["a\r\nX-B: c", "a\nb", "a\rb", "a\0b", "a\n"])
def test_a_header_that_would_end_early_is_named_and_its_value_is_not(value: str) -> None:
    with pytest.raises(UpstreamError) as caught:
        head(a_request(headers=(("X-A", "fine"), ("Authorization", f"s3cret{value}"))))
    assert "'Authorization'" in caught.value.message
    assert "s3cret" not in caught.value.message


@pytest.mark.parametrize("name", ["", "X A", "X:A", "X\r\nA", "é"])
def test_a_name_that_is_no_token_is_refused(name: str) -> None:
    with pytest.raises(UpstreamError, match="name"):
        head(a_request(headers=((name, "b"),)))


@pytest.mark.parametrize(
    "url",
    ["http://u/a b", "http://u/\r\nX-A: b", "http://u/\0", "ftp://u/", "http://", "http://u:x/", "http://[u/", ""],
)
def test_a_url_that_cannot_be_requested_is_refused(url: str) -> None:
    with pytest.raises(UpstreamError, match="URL"):
        Targets().of(url, "")


def test_what_is_kept_of_urls_and_names_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "_KEPT", 3)
    monkeypatch.setattr(requests, "_starts", {})
    targets = Targets()
    for number in range(9):
        assert targets.of(f"http://u/{number}", "").line == f" /{number} HTTP/1.1\r\n"
        assert b"X-%d: b\r\n" % number in head(a_request(headers=((f"X-{number}", "b"),)))
    assert (len(targets._kept), len(requests._starts)) == (3, 3)


def test_a_file_without_certificates_is_refused_with_its_setting_s_name() -> None:
    with pytest.raises(ConfigurationError, match="BALANCER_UPSTREAM_CA_FILE"):
        client_context(__file__)


# -- the connection ----------------------------------------------------------------------------------------------------


class Transport(asyncio.Transport):
    """Takes what is written; `refuses`: the kernel takes nothing more."""

    def __init__(self, *, refuses: bool = False) -> None:
        super().__init__()
        self.written: list[bytes] = []
        self._refuses = refuses
        self._is_closing = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self._is_closing = self._refuses
        if not self._refuses:
            self.written.append(bytes(data))

    def is_closing(self) -> bool:
        return self._is_closing

    def abort(self) -> None:
        self._is_closing = True


class Connections:
    """Makes connections, and notes which are free."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.freed: list[Connection] = []
        self.lost: list[Connection] = []

    def make(self, *, refuses: bool = False) -> tuple[Connection, Transport]:
        transport = Transport(refuses=refuses)
        connection = Connection(self.loop, BUFFER, first=lambda _: None, freed=self.freed.append, lost=self.lost.append)
        connection.connection_made(transport)
        return connection, transport


def receive(connection: Connection, data: bytes) -> None:
    """Gives it bytes as a loop would."""
    connection.get_buffer(-1)[: len(data)] = data
    connection.buffer_updated(len(data))


@pytest.fixture
async def connections() -> Connections:
    """A maker of connections on this loop."""
    return Connections()


async def test_head_and_body_go_out_in_one_write(connections: Connections) -> None:
    connection, transport = connections.make()
    request = a_request()
    assert connection.ask(answer_to(request, connections.loop, 0), head(request), request.body, head_only=False)
    assert transport.written == [head(request) + b"{}"]
    connection.connection_lost(None)


async def test_what_the_kernel_refuses_was_not_sent(connections: Connections) -> None:
    connection, _ = connections.make(refuses=True)
    request = a_request()
    assert not connection.ask(answer_to(request, connections.loop, 0), head(request), request.body, head_only=False)
    connection.connection_lost(BrokenPipeError())
    assert connections.lost == [connection]


async def test_parts_that_came_together_are_taken_at_once(connections: Connections) -> None:
    connection, _ = connections.make()
    answer = answer_to(a_request(), connections.loop, connections.loop.time())
    connection.ask(answer, b"", b"", head_only=False)
    receive(connection, b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    await answer.opened(connection)
    taken: list[bytes] = []
    pumping = asyncio.ensure_future(answer.pump(lambda chunk, _=b"": not taken.append(chunk)))  # type: ignore[func-returns-value]
    await asyncio.sleep(0)
    receive(connection, b"1\r\na\r\n2\r\nbc\r\n3\r\ndef\r\n")
    assert taken == [b"abcdef"]
    receive(connection, b"1\r\ng\r\n0\r\n\r\n")
    assert (taken, connections.freed) == ([b"abcdef", b"g"], [connection])
    assert await pumping == b""
    connection.connection_lost(None)


@pytest.mark.parametrize(
    "begin",
    [b"1", b"11b", b"11b\r", b"40\r\n", b"40\r\nabc\r\n", b"1b\r\nsome of 27 bytes", b"10\r\n0123456789abcdef\r"],
)
async def test_what_goes_on_in_a_chunk_is_no_chunk(connections: Connections, begin: bytes) -> None:
    """However it looks: a size that was cut in two is read as another one."""
    connection, _ = connections.make()
    answer = answer_to(a_request(), connections.loop, connections.loop.time())
    connection.ask(answer, b"", b"", head_only=False)
    chunk = b"10\r\n0123456789abcdef\r\n"
    receive(connection, b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk + begin)
    framings: list[bytes] = []
    pumping = asyncio.ensure_future(answer.pump(lambda _, framed=b"": not framings.append(framed)))  # type: ignore[func-returns-value]
    await asyncio.sleep(0)
    receive(connection, chunk)
    assert not any(framings)
    pumping.cancel()
    connection.connection_lost(None)
    await asyncio.wait([pumping])


PARTS = st.lists(st.binary(min_size=16, max_size=300), min_size=1, max_size=3)


@given(parts=PARTS, size=st.sampled_from([b"%x", b"%X"]))
def test_the_data_of_plain_chunks_is_known_without_a_parser(parts: list[bytes], size: bytes) -> None:
    assert data_of(b"".join(size % len(part) + b"\r\n" + part + b"\r\n" for part in parts)) == b"".join(parts)


@settings(max_examples=500)
@given(
    parts=PARTS,
    place=st.integers(0, 1000),
    gone=st.integers(0, 1),
    new=st.sampled_from([b"", *(b"%c" % byte for byte in b"0123456789abcdefABCDEF xX;_+-\r\n\x00")]),
    is_near=st.booleans(),
)
def test_chunks_that_are_spelt_or_end_in_another_way_are_left_to_the_parser(
    parts: list[bytes], place: int, gone: int, new: bytes, is_near: bool
) -> None:
    """`unframed` fails for them."""
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts)
    place %= len(chunks)
    if is_near:  # Where sizes and ends are.
        place = max(0, chunks.rfind(b"\r\n", 0, place))
    chunks = chunks[:place] + new + chunks[place + gone :]
    data = data_of(chunks)
    assert data is None or data == unframed(chunks)


class Timer:
    """A timer that never goes off by itself."""

    def cancel(self) -> None: ...


async def test_one_timer_serves_many_waits(connections: Connections, monkeypatch: pytest.MonkeyPatch) -> None:
    armed: list[float] = []

    class Clock:
        def call_at(self, at: float, _: Any) -> Timer:
            armed.append(at)
            return Timer()

        def time(self) -> float:
            return now

    now = 0.0
    connection, transport = connections.make()
    monkeypatch.setattr(connection, "_loop", Clock())
    for now in (0.0, 1.0, 2.0):
        connection.arm(now + 10)
    assert armed == [10.0]
    now = 10.0
    connection._on_timer()
    assert (armed, transport.is_closing()) == ([10.0, 12.0], False)
    connection.arm(11.0)
    assert armed == [10.0, 12.0, 11.0]
    connection.idle_since, now = 5.0, 11.0
    connection._on_timer()
    assert transport.is_closing()


async def test_what_is_taken_puts_the_limit_off_without_a_timer(
    connections: Connections, monkeypatch: pytest.MonkeyPatch
) -> None:
    armed: list[float] = []

    class Clock:
        create_future = connections.loop.create_future

        def call_at(self, at: float, _: Any) -> Timer:
            armed.append(at)
            return Timer()

        def time(self) -> float:
            return now

    now = 0.0
    connection, transport = connections.make()
    clock: Any = Clock()
    monkeypatch.setattr(connection, "_loop", clock)
    monkeypatch.setattr("balancer.gateway.upstream.answer.monotonic", clock.time)
    request = msgspec.structs.replace(a_request(), timeouts=Timeouts(first_byte_s=50, idle_s=10))
    answer = answer_to(request, clock, now)
    connection.ask(answer, b"", b"", head_only=False)
    receive(connection, b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    pumping = asyncio.ensure_future(answer.pump(lambda *_: True))
    await asyncio.sleep(0)
    for at in (1.0, 2.0, 8.0):
        now = at
        receive(connection, b"10\r\n0123456789abcdef\r\n")
    assert armed == [50.0, 11.0]
    now = 11.0
    connection._on_timer()
    assert armed == [50.0, 11.0, 18.0]
    now = 18.0
    connection._on_timer()
    with pytest.raises(UpstreamTimeoutError, match=r"idle_s"):
        await pumping
    assert transport.is_closing()
    connection.connection_lost(None)


# -- answers in one piece ----------------------------------------------------------------------------------------------

NAMES = (b"X-A", b"x-a", b"Date", b"a", b"!#$%&'*+.^_`|~9", b"Content-Type", b"Keep-Alive", b"Content-Encoding", b"Age")
ODD_NAMES = (b"", b"X A", b"X-A ", b" X-A", "é".encode(), b"X\0A", b"(a)", b"X:A", b"\tX", b"X\rA", b"\x7f")
VALUES = (b"", b"b", b"a b", b"a\tb", b'a, b;c="d"', b"application/json", b"~", b":", b"x" * 300, b"{}")
ODD_VALUES = (
    "é".encode(),
    b"\xff",
    b"a\0b",
    b"a\rb",
    b"a\nb",
    b"a\x01b",
    b"a\x7fb",
    b"a\r\n b",
    b"a\r\n\tb",
    b"a ",
    b"a\t",
    b" ",
)
FRAMES = (
    b"Connection: keep-alive",
    b"connection: Keep-Alive",
    b"Connection: close",
    b"Connection: keep-alive, x",
    b"Connection:",
    b"Proxy-Connection: close",
    b"Transfer-Encoding: chunked",
    b"transfer-encoding: identity",
    b"Upgrade: h2c",
    b"Trailer: x",
    b"Content-Length: 2",
)
LENGTHS = (
    b"%d",
    b"%d",
    b"%d",
    b"%d",
    b"%d",
    b"%d",
    b"00%d",
    b"+%d",
    b"-%d",
    b"%d.0",
    b"0x%d",
    b" %d",
    b"\t%d",
    b"%d ",
    b"%d, %d",
)
STARTS = (
    *[b"HTTP/1.1 200 OK"] * 12,
    b"HTTP/1.1 200 Ok",
    b"HTTP/1.1 200 ",
    b"HTTP/1.1 200",
    b"HTTP/1.0 200 OK",
    b"HTTP/1.1 201 OK",
    b"HTTP/1.1 204 OK",
    b"HTTP/1.1 100 OK",
    b"HTTP/2.0 200 OK",
    b"HTTP/1.1  200 OK",
    b"\r\nHTTP/1.1 200 OK",
)


def an_answer(rng: random.Random) -> bytes:
    """An answer, valid or nearly so; most have nothing odd, or one thing."""
    oddity = rng.randrange(20)
    body = rng.choice([b"", b"{}", b'{"a":1}', b"\r\n\r\n", b"HTTP/1.1 200 OK\r\n\r\n", b"x" * 1000])
    lines = [
        rng.choice(NAMES) + rng.choice([b":", b": ", b":  ", b":\t"]) + rng.choice(VALUES)
        for _ in range(rng.choice([0, 1, 2, 5]))
    ]
    if oddity == 1:
        lines += [b"a:b"] * rng.choice([100, 255, 256, 300])
    elif oddity == 2:
        lines.append(rng.choice(ODD_NAMES) + b": " + rng.choice(VALUES))
    elif oddity == 3:
        lines.append(rng.choice(NAMES) + b": " + rng.choice(ODD_VALUES))
    elif oddity == 4:
        lines.append(rng.choice(NAMES) + rng.choice([b" : x", b"", b";x"]))
    elif oddity == 5:
        lines += rng.choices(FRAMES, k=rng.choice([1, 2]))
    length = rng.choice(LENGTHS) if oddity == 6 else b"%d"
    said = len(body) + (rng.choice([-1, 1, 5]) if oddity == 7 else 0)
    if oddity != 8:
        lines.append(rng.choice([b"Content-Length: ", b"content-length:"]) + length.replace(b"%d", b"%d" % said))
    rng.shuffle(lines)
    end = b"\r\n"
    start = rng.choice(STARTS) if oddity == 9 else STARTS[0]
    data = end.join([start, *lines, b"", body])
    if oddity == 10:
        at = rng.randrange(len(data))
        data = data[:at] + bytes([rng.randrange(256)]) + data[at + rng.randrange(2) :]
    elif oddity == 11:
        at = data.find(b"\r\n", rng.randrange(len(data)))
        data = data[:at] + rng.choice([b"\n", b"\r", b"\r\r\n", b"\n\n"]) + data[at + 2 :]
    return data


def came_of(connections: Connections, data: bytes) -> tuple[int, Headers, bytes | None, bool]:
    """What a connection makes of an answer: its status, headers and body, and if it can be asked again."""
    connection, _ = connections.make()
    answer = answer_to(a_request(), connections.loop, connections.loop.time())
    assert connection.ask(answer, b"", b"", head_only=False)
    receive(connection, data)
    body = answer.whole() if answer.is_over else None
    if answer.is_over and body is None and answer.length == 0:
        body = b""
    is_free = connections.freed[-1:] == [connection] and connection.is_usable
    connection.connection_lost(None)
    return answer.status, answer.headers, body, is_free


@pytest.mark.parametrize("seed", range(3))
async def test_what_is_read_without_the_parser_is_what_the_parser_reads(
    connections: Connections, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """A head of more than 256 headers was once taken, which the parser's reader refuses."""
    rng, taken = random.Random(seed), 0
    answers = [an_answer(rng) for _ in range(1500)]
    read = [read_whole(data) for data in answers]
    as_one = [came_of(connections, data) for data, one in zip(answers, read, strict=True) if one is not None]
    monkeypatch.setattr("balancer.gateway.upstream.connection.read_whole", lambda _: None)
    for data, one in zip(answers, read, strict=True):
        if one is None:
            continue
        headers, body = one
        assert came_of(connections, data) == (200, headers, body, True) == as_one[taken], data
        taken += 1
    assert 500 < taken < 1200


@pytest.mark.parametrize(
    "data",
    [
        PLAIN,
        b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nconnection: Keep-Alive\r\nX-A:\r\nX-A:  b\tc\r\ncontent-length: 2\r\n\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"A:\r\n" * 255 + PLAIN[17:],
    ],
)
def test_usual_answers_are_read_without_the_parser(data: bytes) -> None:
    assert read_whole(data) is not None


@pytest.mark.parametrize("at", range(1, len(PLAIN)))
def test_of_a_part_nothing_is_read_without_the_parser(at: int) -> None:
    assert read_whole(PLAIN[:at]) is None
    assert read_whole(PLAIN + PLAIN[:at]) is None


def test_what_is_kept_of_names_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole, "_KEPT", 3)
    monkeypatch.setattr(whole, "_places", {})
    for number in range(9):
        assert read_whole(PLAIN[:17] + b"X-%d: b\r\n" % number + PLAIN[17:]) is not None
        assert len(whole._places) <= 3


# -- the pool ----------------------------------------------------------------------------------------------------------


async def test_the_connection_used_last_is_used_next(connections: Connections) -> None:
    pool = Pool(connections.loop, 2, lambda _: None)
    assert (pool.reserve(), pool.reserve(), pool.reserve()) == (True, True, False)
    (first, _), (second, _) = connections.make(), connections.make()
    pool.free(first)
    pool.free(second)
    assert (pool.take(), pool.take(), pool.take()) == (second, first, None)
    first.connection_lost(None)
    second.connection_lost(None)


async def test_who_waits_is_served_in_turn_and_who_has_left_is_passed_over(connections: Connections) -> None:
    emptied: list[Pool] = []
    pool = Pool(connections.loop, 1, emptied.append)
    assert pool.reserve()
    waiting = [asyncio.ensure_future(pool.turn()) for _ in range(3)]
    again = asyncio.ensure_future(pool.turn(again=True))
    await asyncio.sleep(0)
    connection, _ = connections.make()
    waiting[0].cancel()
    pool.free(connection)
    assert await again is connection
    pool.free(connection)
    waiting[1].cancel()  # It was given the connection, and does not know it yet.
    assert await waiting[2] is connection
    assert [task.cancelled() for task in waiting] == [True, True, False]
    last = asyncio.ensure_future(pool.turn())
    await asyncio.sleep(0)
    pool.lose(connection)
    assert await last is None
    assert emptied == []
    pool.leave()
    assert emptied == [pool]
    connection.connection_lost(None)


def test_origins_are_told_apart_by_their_proxy_too() -> None:
    plain, proxied = Targets().of("http://u/", ""), Targets().of("http://u/", "http://p.invalid")
    assert plain.origin == Origin("http", "u", 80, "")
    assert proxied.origin == Origin("http", "u", 80, "http://p.invalid")
