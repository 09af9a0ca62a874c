"""The lane beside the other front: what it serves itself, what it hands over, and how its connections end."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import re
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from balancer import config
from balancer.dialects import Headers
from balancer.dialects.openai import OPENAI
from balancer.errors import ConfigurationError
from balancer.gateway.accepting import Acceptor
from balancer.gateway.front import Front
from balancer.gateway.front_server import Server, Site
from balancer.gateway.lane import Handle, Lanes
from balancer.gateway.messages import ClientGoneError, ClientRequest, ClientStream
from balancer.gateway.tls import server_context
from tests.gateway.wire import Answer, Line, a_line, answers_in
from tests.store.conftest import eventually
from tests.topologies import make_certificates

CHAT = b"/v1/chat/completions"
ON_BOTH_LOOPS = True


def a_post(body: bytes = b"{}", *lines: bytes, path: bytes = CHAT) -> bytes:
    """A request that is for the lane, but for what its lines say."""
    head = b"\r\n".join([b"POST " + path + b" HTTP/1.1", b"Host: gateway", *lines, b"Content-Length: %d" % len(body)])
    return head + b"\r\n\r\n" + body


def a_chunked_post(body: bytes = b"{}") -> bytes:
    """A request that is not for the lane."""
    head = b"POST " + CHAT + b" HTTP/1.1\r\nHost: gateway\r\nTransfer-Encoding: chunked\r\n\r\n"
    return head + b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)


async def tell(request: ClientRequest, stream: ClientStream) -> None:
    """Answers with what was asked."""
    body = f"{request.path} {request.query} ".encode() + request.body
    await stream.start(200, (("Content-Type", "text/plain"),), len(body))
    await stream.write(body)
    await stream.end()


class Door:
    """Both fronts on one port."""

    def __init__(self, server: Server, url: str) -> None:
        self.server = server
        self.url = url
        self.runner: web.ServerRunner

    @property
    def lanes(self) -> Lanes:
        """The lane's connections."""
        assert self.server.lanes is not None
        return self.server.lanes

    def line(self, tls: ssl.SSLContext | None = None) -> contextlib.AbstractAsyncContextManager[Line]:
        """A client's connection."""
        return a_line(self.url, tls)

    async def ask(self, data: bytes) -> list[Answer]:
        """All answers until the server closes the connection."""
        async with self.line() as line:
            line.transport.write(data)
            assert await line.until_closed()
            return answers_in(bytes(line.held))


@contextlib.asynccontextmanager
async def opened(
    handle: Handle = tell,
    *,
    has_lane: bool = True,
    is_draining: bool = False,
    tls: ssl.SSLContext | None = None,
    idle_s: float = 60.0,
    slow_s: float = 60.0,
    sweep_s: float = 60.0,
) -> AsyncIterator[Door]:
    """A front with this handler; closed at the end."""
    server = Server(Front(handle, lambda _: OPENAI, 2**20, lambda: is_draining, {}).answer)
    if has_lane:
        limits = {"idle_s": idle_s, "slow_s": slow_s, "sweep_s": sweep_s}
        server.lanes = Lanes(handle, server, 2**20, lambda: is_draining, **limits)
    runner = web.ServerRunner(server, shutdown_timeout=5.0)
    await runner.setup()
    listener = socket.create_server(("127.0.0.1", 0))
    await Site(runner, listener, tls).start()
    door = Door(server, f"http://127.0.0.1:{listener.getsockname()[1]}")
    door.runner = runner
    try:
        yield door
    finally:
        await runner.cleanup()


# -- which front serves ------------------------------------------------------------------------------------------------

OURS: dict[str, bytes] = {
    "a request": a_post(),
    "a request without a body": a_post(b""),
    "a path that nobody serves": a_post(path=b"/nowhere?a=b"),
    "a body of some size": a_post(b"x" * 2**19),
}
OTHERS: dict[str, bytes] = {
    "chunks": a_chunked_post(),
    "GET": b"GET " + CHAT + b" HTTP/1.1\r\nHost: gateway\r\n\r\n",
    "an expectation": a_post(b"{}", b"Expect: 100-continue"),
    "an absolute target": a_post(path=b"http://gateway" + CHAT),
    "a head of more than 8 KiB": a_post(b"{}", *(b"X-A: " + b"b" * 1000 for _ in range(9))),
    "a header beyond ASCII": a_post(b"{}", "X-A: ü".encode()),
    "an empty line before it": b"\r\n" + a_post(),
}


@pytest.mark.parametrize("case", OURS)
async def test_usual_requests_are_served_in_the_lane(case: str) -> None:
    async with opened() as door, door.line() as line:
        for count in (1, 2):
            line.transport.write(OURS[case])
            await eventually_answered(line, count)
            (lane,) = door.lanes.open
            assert door.server.connections == []
            assert lane.transport is not None
            assert lane.transport.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)


async def test_requests_of_one_client_differ_in_their_bodies_and_sometimes_in_their_heads() -> None:
    bodies = [b"x" * size for size in (5, 0, 1000, 5, 1001, 2**17)]
    posts = [a_post(body) for body in bodies] + [a_post(b"y", b"X-A: %d" % number) for number in range(10)]
    async with opened() as door:
        answers = await door.ask(b"".join([*posts, *posts, a_post(b"last", b"Connection: close")]))
    expected = [*bodies, *[b"y"] * 10] * 2 + [b"last"]
    assert [answer.body.rpartition(b" ")[2] for answer in answers] == expected


async def test_the_head_of_a_silent_client_is_forgotten() -> None:
    async with opened(sweep_s=0.01, slow_s=0.02) as door, door.line() as line:
        line.transport.write(a_post())
        await eventually_answered(line, 1)
        (lane,) = door.lanes.open
        await eventually(lambda: is_true(lane._repeat is None))
        line.transport.write(a_post(b"more"))
        await eventually_answered(line, 2)


@pytest.mark.parametrize("case", OTHERS)
@pytest.mark.parametrize("is_first", [True, False], ids=["first", "later"])
async def test_others_are_handed_over_and_their_connection_stays_there(case: str, is_first: bool) -> None:
    async with opened() as door, door.line() as line:
        earlier = [] if is_first else [a_post(b"earlier")]
        for count, request in enumerate([*earlier, OTHERS[case], a_post(b"later")], start=1):
            line.transport.write(request)
            await eventually_answered(line, count)
        assert [a.status for a in answers_in(bytes(line.held)) if a.status != 100] == [200] * (2 + len(earlier))
        assert len(door.lanes.open) == 0
        assert len(door.server.connections) == 1


async def eventually_answered(line: Line, count: int) -> None:
    """Returns when that many final answers have come in whole."""

    async def is_there() -> bool:
        # Half a head has no meaning yet.
        held = bytes(line.held)
        if not held or b"\r\n\r\n" not in held:
            return False
        with contextlib.suppress(AssertionError):
            answers = [answer for answer in answers_in(held) if answer.status >= 200]
            return len(answers) == count and all(answer.is_whole for answer in answers)
        return False

    await eventually(is_there)


@pytest.mark.parametrize("case", OTHERS)
async def test_an_odd_request_behind_a_usual_one_waits_for_its_answer(case: str) -> None:
    async with opened() as door, door.line() as line:
        line.transport.write(a_post(b"1") + OTHERS[case] + a_post(b"3"))
        await eventually_answered(line, 3)


@pytest.mark.parametrize("case", [case for case, data in (OURS | OTHERS).items() if len(data) < 12_000])
async def test_a_request_may_come_byte_by_byte(case: str) -> None:
    data = (OURS | OTHERS)[case]
    async with opened() as door, door.line() as line:
        await line.send(*(data[at : at + 1] for at in range(len(data))))
        await eventually_answered(line, 1)


async def test_without_a_lane_the_other_front_serves_all() -> None:
    async with opened(has_lane=False) as door, door.line() as line:
        line.transport.write(a_post())
        await eventually_answered(line, 1)
        assert len(door.server.connections) == 1


async def test_requests_in_a_row_are_answered_one_after_the_other() -> None:
    running: list[bytes] = []

    async def handle(request: ClientRequest, stream: ClientStream) -> None:
        running.append(request.body)
        await asyncio.sleep(0)
        await tell(request, stream)
        assert running == [request.body]
        running.clear()

    async with opened(handle) as door:
        posts = b"".join(a_post(b"%d" % number) for number in range(200))
        answers = await door.ask(posts + a_post(b"last", b"Connection: close"))
    assert [answer.body.rpartition(b" ")[2] for answer in answers] == [*(b"%d" % n for n in range(200)), b"last"]


async def standing(number: Callable[[], int]) -> int:
    """The number, once it has not moved for a while."""
    last, still = -1, 0
    async with asyncio.timeout(20):
        while still < 5:
            await asyncio.sleep(0.02)
            still = still + 1 if number() == last else 0
            last = number()
    return last


async def is_true(value: bool) -> bool:
    """For `eventually`."""
    return value


async def test_no_more_than_some_is_read_ahead() -> None:
    gate = asyncio.Event()

    async def handle(request: ClientRequest, stream: ClientStream) -> None:
        await gate.wait()
        await tell(request, stream)

    flood = a_post(b"x" * 65536) * 500
    async with opened(handle) as door, door.line() as line:
        line.transport.write(flood)
        # What is not read waits on the client's side, but for what the kernel holds.
        assert await standing(line.transport.get_write_buffer_size) > 2**20
        gate.set()
        await eventually(lambda: is_true(line.held.count(b"HTTP/1.1 200 OK\r\n") == 500))


# -- answers -----------------------------------------------------------------------------------------------------------

ANSWERS: dict[str, tuple[int, Headers, int | None, list[bytes]]] = {
    "a length": (200, (("Content-Type", "text/plain"),), 5, [b"he", b"llo"]),
    "chunks": (200, (("Content-Type", "text/event-stream"),), None, [b"he", b"", b"llo" * 1000]),
    "an empty body": (200, (("Content-Type", "text/plain"),), 0, []),
    "an empty body in chunks": (200, (), None, []),
    "no content type": (200, (), 5, [b"hello"]),
    "no content": (204, (("X-A", "b"),), None, []),
    "no content and a length": (204, (), 0, []),
    "not modified": (304, (("ETag", "a"),), None, []),
    "an error": (429, (("Retry-After", "1"), ("Content-Type", "application/json")), 2, [b"{}"]),
    "a status that nobody knows": (599, (), 2, [b"{}"]),
    "a header twice": (200, (("X-A", "b"), ("x-a", "c")), 2, [b"{}"]),
    "headers that are ours": (200, (("Server", "x"), ("Date", "then")), 2, [b"{}"]),
    "a length that is not the body's": (200, (("Content-Length", "7"),), 2, [b"{}"]),
    "more than was announced": (200, (), 2, [b"{}", b"more"]),
    "letters beyond ASCII": (200, (("X-A", "ü\udcff€"),), 2, [b"{}"]),
    "an empty header": (200, (("X-A", ""),), 2, [b"{}"]),
}


@pytest.mark.parametrize("case", ANSWERS)
@pytest.mark.parametrize("ending", ["stays", "leaves", "drains"])
async def test_an_answer_is_the_one_that_the_other_front_gives(case: str, ending: str) -> None:
    status, headers, length, chunks = ANSWERS[case]

    async def handle(_: ClientRequest, stream: ClientStream) -> None:
        await stream.start(status, headers, length)
        for chunk in chunks:
            await stream.write(chunk)
        await stream.end()

    answers = []
    lines = (b"x-request-id: r", *((b"Connection: close",) if ending == "leaves" else ()))
    for has_lane in (True, False):
        async with opened(handle, has_lane=has_lane, is_draining=ending == "drains") as door, door.line() as line:
            line.transport.write(a_post(b"{}", *lines))
            if ending == "stays":
                await eventually_answered(line, 1)
            else:
                assert await line.until_closed()
            answers.append(bytes(line.held))
    ours, others = (taken_apart(answer) for answer in answers)
    assert ours == others


def taken_apart(answer: bytes) -> tuple[bytes, list[bytes], bytes]:
    """The status line, the headers in any order and with the same date, and the body."""
    head, _, body = answer.partition(b"\r\n\r\n")
    first, *lines = head.split(b"\r\n")
    return first, sorted(re.sub(rb"^(Date: )\w+, .* GMT$", rb"\1now", line) for line in lines), body


@pytest.mark.parametrize("bad", ["a\r\nX-B: c", "a\nb", "a\rb", "a\x00b", "a\x7fb"])
@pytest.mark.parametrize("where", ["name", "value"])
@pytest.mark.parametrize("has_lane", [True, False])
async def test_a_header_with_a_control_character_is_not_sent(bad: str, where: str, has_lane: bool) -> None:
    refused = []

    async def handle(_: ClientRequest, stream: ClientStream) -> None:
        try:
            await stream.start(200, (("X-A", bad) if where == "value" else (bad, "x"),), 0)
        except ValueError:
            refused.append(True)
            raise

    async with opened(handle, has_lane=has_lane) as door:
        answers = await door.ask(a_post())
    assert refused == [True]
    assert [answer.status for answer in answers] in ([], [500])


async def test_the_head_waits_for_the_first_part_of_a_body_but_not_for_long() -> None:
    gate = asyncio.Event()

    async def handle(_: ClientRequest, stream: ClientStream) -> None:
        await stream.start(200, (), None)
        await gate.wait()
        assert stream.write_now(b"a")
        await stream.end()

    async with opened(handle) as door, door.line() as line:
        line.transport.write(a_post())
        await line.until(b"\r\n\r\n")
        gate.set()
        await line.until(b"1\r\na\r\n0\r\n\r\n")


async def test_nothing_is_written_before_an_answer_s_start_or_behind_its_end() -> None:
    faults = []

    async def handle(_: ClientRequest, stream: ClientStream) -> None:
        for step in ("before", "in it", "behind"):
            if step == "in it":
                await stream.start(200, (), None)
                await stream.write(b"a")
                with pytest.raises(RuntimeError):
                    await stream.start(200, (), None)
                await stream.end()
                continue
            for way in (stream.write(b"x"), stream.end()):
                with pytest.raises(RuntimeError):
                    await way
                faults.append(step)
        stream.abort()

    async with opened(handle) as door:
        answers = await door.ask(a_post() + a_post(b"last", b"Connection: close"))
    assert [answer.body for answer in answers] == [b"a", b"a"]
    assert faults == ["before", "before", "behind", "behind"] * 2


async def test_an_answer_that_is_shorter_than_announced_ends_its_connection() -> None:
    async def handle(_: ClientRequest, stream: ClientStream) -> None:
        await stream.start(200, (), 5)
        await stream.write(b"abc")
        await stream.end()

    async with opened(handle) as door:
        assert len(await door.ask(a_post() + a_post())) <= 1


@pytest.mark.parametrize("has_lane", [True, False])
async def test_what_is_more_than_announced_is_not_sent(has_lane: bool) -> None:
    """It would be read as the next answer."""

    async def handle(_: ClientRequest, stream: ClientStream) -> None:
        await stream.start(200, (), 2)
        await stream.write(b"{}HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        await stream.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        await stream.end()

    async with opened(handle, has_lane=has_lane) as door:
        answers = await door.ask(a_post() + a_post(b"{}", b"Connection: close"))
        assert [answer.body for answer in answers] == [b"{}", b"{}"]


@pytest.mark.parametrize("has_lane", [True, False])
async def test_a_handler_that_fails_is_logged_and_ends_its_connection(
    has_lane: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async def handle(_: ClientRequest, stream: ClientStream) -> None:
        raise RuntimeError("a fault of ours")

    async with opened(handle, has_lane=has_lane) as door:
        await door.ask(a_post() + a_post())
    assert [record for record in caplog.records if "a fault of ours" in logging.Formatter().format(record)]


async def test_a_slow_client_holds_its_answer_up() -> None:
    sent = 0

    async def handle(_: ClientRequest, stream: ClientStream) -> None:
        nonlocal sent
        await stream.start(200, (), None)
        for _piece in range(500):
            await stream.write(b"x" * 65536)
            sent += 1
        await stream.end()

    async with opened(handle) as door, door.line() as line:
        line.transport.write(a_post())
        await line.until(b"x" * 1000)
        line.transport.pause_reading()
        assert await standing(lambda: sent) < 400
        line.transport.resume_reading()
        await line.until(b"0\r\n\r\n")
    assert sent == 500


# -- clients that leave ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["closes", "resets", "half-closes"])
@pytest.mark.parametrize("is_started", [True, False])
@pytest.mark.parametrize("has_lane", [True, False])
async def test_a_client_that_leaves_cancels_its_request_at_once(way: str, is_started: bool, has_lane: bool) -> None:
    begun, cancelled = asyncio.Event(), asyncio.Event()
    streams: list[ClientStream] = []

    async def handle(_: ClientRequest, stream: ClientStream) -> None:
        streams.append(stream)
        if is_started:
            await stream.start(200, (), None)
            await stream.write(b"a")
        begun.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise

    async with opened(handle, has_lane=has_lane) as door, door.line() as line:
        line.transport.write(a_post())
        await begun.wait()
        match way:
            case "closes":
                line.transport.close()
            case "resets":
                line.transport.abort()
            case _:
                line.transport.write_eof()
        async with asyncio.timeout(5):
            await cancelled.wait()
        (stream,) = streams
        assert not (is_started and stream.write_now(b"b"))
        with pytest.raises(ClientGoneError):
            await (stream.write(b"b") if is_started else stream.start(200, (), None))


async def test_a_client_that_leaves_while_its_answer_is_held_up_ends_it() -> None:
    ended = asyncio.Event()

    async def handle(_: ClientRequest, stream: ClientStream) -> None:
        try:
            await stream.start(200, (), None)
            while True:
                await stream.write(b"x" * 65536)
        finally:
            ended.set()

    async with opened(handle) as door, door.line() as line:
        line.transport.write(a_post())
        await line.until(b"x")
        line.transport.pause_reading()
        await asyncio.sleep(0.05)
        line.transport.abort()
        async with asyncio.timeout(5):
            await ended.wait()


# -- time --------------------------------------------------------------------------------------------------------------

TOO_SLOW = {
    "nothing": b"",
    "nothing behind an answer": a_post(),
    "half a head": a_post()[:40],
    "half a body": a_post()[:-1],
}


@pytest.mark.parametrize("case", TOO_SLOW)
async def test_a_client_that_takes_too_long_is_given_up(case: str) -> None:
    limits = (60.0, 0.05) if case.startswith("half") else (0.05, 60.0)
    async with opened(sweep_s=0.01, idle_s=limits[0], slow_s=limits[1]) as door, door.line() as line:
        line.transport.write(TOO_SLOW[case])
        assert await line.until_closed()


async def test_a_head_that_drips_is_given_up_and_a_body_that_drips_is_not() -> None:
    async with opened(sweep_s=0.01, slow_s=0.2) as door, door.line() as head, door.line() as body:
        data = a_post(b"x" * 30)
        body.transport.write(data[:-30])
        for at in range(30):
            if not head.closed.done():
                head.transport.write(data[at : at + 1])
            body.transport.write(b"x")
            await asyncio.sleep(0.02)
        assert head.closed.done()
        await eventually_answered(body, 1)


async def test_an_answer_takes_its_time() -> None:
    async def handle(request: ClientRequest, stream: ClientStream) -> None:
        await asyncio.sleep(0.1)
        await tell(request, stream)

    async with opened(handle, sweep_s=0.01, slow_s=0.02, idle_s=0.02) as door, door.line() as line:
        line.transport.write(a_post())
        await eventually_answered(line, 1)


# -- the end -----------------------------------------------------------------------------------------------------------


async def test_at_the_end_idle_connections_are_closed_and_open_requests_finish() -> None:
    begun, gate = asyncio.Event(), asyncio.Event()

    async def handle(request: ClientRequest, stream: ClientStream) -> None:
        begun.set()
        await gate.wait()
        await tell(request, stream)

    async with opened(handle) as door, door.line() as idle, door.line() as half, door.line() as busy:
        half.transport.write(a_post()[:30])
        busy.transport.write(a_post() + a_post())
        await begun.wait()
        await eventually(lambda: is_true(len(door.lanes.open) == 3))
        ending = asyncio.create_task(door.runner.cleanup())
        assert await idle.until_closed()
        assert await half.until_closed()
        assert not busy.closed.done()
        gate.set()
        await ending
        assert await busy.until_closed()
        assert [answer.status for answer in answers_in(bytes(busy.held))] == [200]


async def test_at_the_end_a_request_that_does_not_finish_is_cancelled() -> None:
    begun, cancelled = asyncio.Event(), asyncio.Event()

    async def handle(_: ClientRequest, stream: ClientStream) -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    async with opened(handle) as door, door.line() as line:
        line.transport.write(a_post())
        await begun.wait()
        await door.lanes.close(0.01)
        assert cancelled.is_set()
        assert await line.until_closed()
        assert door.lanes.open == set()


# -- TLS ---------------------------------------------------------------------------------------------------------------


def contexts(folder: Path) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """The server's as the settings make it, and a client's that trusts it."""
    make_certificates(folder)
    flags = {"tls_cert_file": str(folder / "server.pem"), "tls_key_file": str(folder / "server.key")}
    server = server_context(config.load(flags, {}))
    assert server is not None
    client = ssl.create_default_context(cafile=str(folder / "ca.pem"))
    client.check_hostname = False  # The certificate is for the address.
    client.set_alpn_protocols(["h2", "http/1.1"])
    return server, client


@pytest.mark.parametrize("has_lane", [True, False])
async def test_both_fronts_speak_tls(tmp_path: Path, has_lane: bool) -> None:
    server, client = contexts(tmp_path)
    async with opened(tls=server, has_lane=has_lane) as door, door.line(client) as line:
        tls = line.transport.get_extra_info("ssl_object")
        assert (tls.selected_alpn_protocol(), tls.version()) == ("http/1.1", "TLSv1.3")
        for count, request in enumerate([a_post(), a_post(b"x" * 2**19), a_chunked_post(), a_post()], start=1):
            line.transport.write(request)
            await eventually_answered(line, count)
        assert len(door.server.connections) == 1


@pytest.mark.parametrize("has_tls", [True, False])
async def test_behind_the_last_request_of_a_connection_nothing_is_served(tmp_path: Path, has_tls: bool) -> None:
    server, client = contexts(tmp_path) if has_tls else (None, None)
    served = []

    async def handle(request: ClientRequest, stream: ClientStream) -> None:
        served.append(request.body)
        await tell(request, stream)

    async with opened(handle, tls=server) as door, door.line(client) as line:
        await line.send(a_post(b"last", b"Connection: close"), *[a_post(b"more")] * 20)
        assert await line.until_closed()
    assert served == [b"last"]


async def test_over_tls_too_a_client_that_leaves_cancels_its_request(tmp_path: Path) -> None:
    server, client = contexts(tmp_path)
    begun, cancelled = asyncio.Event(), asyncio.Event()

    async def handle(_: ClientRequest, stream: ClientStream) -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    async with opened(handle, tls=server) as door, door.line(client) as line:
        line.transport.write(a_post())
        await begun.wait()
        line.transport.close()
        async with asyncio.timeout(5):
            await cancelled.wait()


async def test_a_client_without_tls_or_with_an_old_one_gets_nothing(tmp_path: Path) -> None:
    server, client = contexts(tmp_path)
    async with opened(tls=server) as door:
        async with door.line() as line:
            line.transport.write(a_post())
            assert await line.until_closed()
            assert b"HTTP" not in line.held
        client.maximum_version = ssl.TLSVersion.TLSv1_2
        async with door.line(client) as line:
            line.transport.write(a_post())
            await eventually_answered(line, 1)


BAD_FILES: dict[str, tuple[dict[str, str], str]] = {
    "no certificate": ({"tls_cert_file": "none.pem"}, "BALANCER_TLS_CERT_FILE: cannot read"),
    "no key": ({"tls_key_file": "none.key"}, "BALANCER_TLS_KEY_FILE: cannot read"),
    "another key": ({"tls_key_file": "other.key"}, "KEY_VALUES_MISMATCH"),
    "an encrypted key": ({"tls_key_file": "sealed.key"}, "unencrypted"),
    "no PEM": ({"tls_cert_file": "text"}, "must be a certificate"),
    "a folder": ({"tls_cert_file": "."}, "Is a directory"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_tls_files_that_do_not_do_are_named(tmp_path: Path, case: str) -> None:
    make_certificates(tmp_path)
    (tmp_path / "server.key").rename(tmp_path / "other.key")
    (tmp_path / "server.pem").rename(tmp_path / "other.pem")
    make_certificates(tmp_path)
    (tmp_path / "text").write_text("text", encoding="utf-8")
    sealed = "-----BEGIN ENCRYPTED PRIVATE KEY-----\nMIGjMF8GCSqGSIb3DQEFDTBSMDEGCSqGSIb3DQEFDDAkBBA=\n"
    (tmp_path / "sealed.key").write_text(f"{sealed}-----END ENCRYPTED PRIVATE KEY-----\n", encoding="utf-8")
    changed, words = BAD_FILES[case]
    flags = {"tls_cert_file": "server.pem", "tls_key_file": "server.key"} | changed
    loaded = config.load({name: str(tmp_path / file) for name, file in flags.items()}, {})
    with pytest.raises(ConfigurationError, match=words) as caught:
        server_context(loaded)
    assert "BALANCER_TLS_" in str(caught.value)


@pytest.mark.parametrize("given", ["tls_cert_file", "tls_key_file"])
def test_a_certificate_wants_its_key_and_a_key_its_certificate(given: str) -> None:
    missing = {"tls_cert_file": "KEY", "tls_key_file": "CERT"}[given]
    with pytest.raises(ConfigurationError) as caught:
        config.load({given: "x.pem"}, {})
    assert f"BALANCER_TLS_{missing}_FILE: expected a file" in str(caught.value)


# -- new connections ---------------------------------------------------------------------------------------------------


async def test_a_burst_of_connections_does_not_starve_the_last() -> None:
    """One accepted a turn of the loop, as uvloop does, left half of 256 without an answer as long as others asked."""
    count = 0

    async def handle(request: ClientRequest, stream: ClientStream) -> None:
        nonlocal count
        count += 1
        await tell(request, stream)

    async with opened(handle) as door, contextlib.AsyncExitStack() as stack:
        lines = await asyncio.gather(*(stack.enter_async_context(door.line()) for _ in range(256)))
        for line in lines:
            line.transport.write(a_post())
        for line in lines:
            await eventually_answered(line, 1)
    assert count == 256


async def test_without_file_descriptors_accepting_pauses_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    faults = [OSError(errno.EMFILE, "Too many open files"), ConnectionAbortedError()]

    class Exhausted(socket.socket):
        def accept(self) -> tuple[socket.socket, Any]:
            if faults:
                raise faults.pop(0)
            return super().accept()

    monkeypatch.setattr("balancer.gateway.accepting._RETRY_S", 0.01)
    listener = Exhausted(socket.AF_INET, socket.SOCK_STREAM)
    listener.bind(("127.0.0.1", 0))
    acceptor = Acceptor(listener, Line, None, 16)
    async with a_line(f"http://127.0.0.1:{listener.getsockname()[1]}"):
        await eventually(lambda: is_true(not faults and not acceptor._connecting))
    acceptor.close()
