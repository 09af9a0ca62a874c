"""The upstream client with servers and proxies that others wrote: nginx, haproxy, aiohttp, OpenSSL's TLS, CONNECT."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gzip
import hashlib
import os
import random
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from balancer.errors import UpstreamError, UpstreamTimeoutError
from balancer.gateway.messages import Upstream
from tests import topologies
from tests.gateway.by_hand import (
    PATIENCE_S,
    READERS,
    Listener,
    Outcome,
    Reader,
    Wire,
    a_request,
    ask,
    turns,
)
from tests.needs import program

MakeClient = Callable[..., Upstream]
LARGE = os.urandom(2**20) * 50
SOME = LARGE[: 2**23]
FILE = os.urandom(2**20) + bytes(2**20)
WORDS = b"".join(b"word %d\n" % i for i in range(20_000))
SOON_S = 0.3


def value(outcome: Outcome, name: str) -> str:
    """The first value of a header, empty when it is absent."""
    return next((value for key, value in outcome.headers if key.lower() == name), "")


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ca.pem, and server.pem with server.key for 127.0.0.1."""
    folder = tmp_path_factory.mktemp("certificates")
    topologies.make_certificates(folder)
    return folder


@pytest.fixture
def trusting(a_client: MakeClient, certificates: Path) -> Upstream:
    """A client that knows the tests' own authority."""
    return a_client(connections_per_host=4, ca_file=str(certificates / "ca.pem"))


def server_context(certificates: Path) -> ssl.SSLContext:
    """A server's TLS."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificates / "server.pem", certificates / "server.key")
    return context


# -- programs ----------------------------------------------------------------------------------------------------------


NGINX = """
daemon off;
master_process off;
pid {folder}/pid;
error_log stderr crit;
events {{ worker_connections 512; }}
http {{
  access_log off;
  client_body_temp_path {folder}/body;
  proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi;
  scgi_temp_path {folder}/scgi;
  default_type text/plain;
  keepalive_requests 4;
  add_header X-Connection $connection always;
  add_header X-Requests $connection_requests always;
  add_header X-Reused "$ssl_session_reused" always;
  add_header X-Alpn "$ssl_alpn_protocol" always;
  add_header X-Tls "$ssl_protocol" always;
  server {{
    listen 127.0.0.1:{plain};
    listen 127.0.0.1:{secure} ssl http2;
    ssl_certificate {certificates}/server.pem;
    ssl_certificate_key {certificates}/server.key;
    ssl_protocols {protocol};
    root {folder}/files;
    client_max_body_size 1k;
    location /zipped {{ alias {folder}/files/words; gzip on; gzip_min_length 1; gzip_types *; gzip_proxied any; }}
    location /nothing {{ return 204; }}
    location /moved {{ return 301 /elsewhere; }}
    location /error {{ return 503 "not now"; }}
    location /leaves {{ keepalive_timeout 0; return 200 "bye"; }}
    location /resets {{ return 444; }}
    location /none {{ return 404; }}
  }}
}}
"""

HAPROXY = """
global
  maxconn 500
defaults
  mode http
  timeout connect 5s
  timeout client 10s
  timeout server 10s
  timeout http-request 5s
  retries 0
listen plain
  bind 127.0.0.1:{plain}
  use_backend none if {{ path /none }}
  default_backend one
listen secure
  bind 127.0.0.1:{secure} ssl crt {folder}/both.pem alpn h2,http/1.1
  http-response set-header X-Reused %[ssl_fc_is_resumed]
  http-response set-header X-Alpn %[ssl_fc_alpn]
  default_backend one
backend one
  server one 127.0.0.1:{behind}
backend none
  server none 127.0.0.1:{nobody}
"""


@contextlib.asynccontextmanager
async def running(ports: tuple[int, ...], *command: str) -> AsyncIterator[None]:
    """A program that listens on the ports, until the block ends."""
    process = await asyncio.create_subprocess_exec(*command, stdin=asyncio.subprocess.DEVNULL)
    try:
        async with asyncio.timeout(PATIENCE_S):
            for port in ports:
                while True:
                    assert process.returncode is None, f"{command[0]} ended at once"
                    try:
                        _, writer = await asyncio.open_connection("127.0.0.1", port)
                    except OSError:
                        await asyncio.sleep(0.01)
                    else:
                        writer.close()
                        await writer.wait_closed()
                        break
        yield
    finally:
        process.kill()
        await process.wait()


@contextlib.asynccontextmanager
async def nginx(folder: Path, certificates: Path, protocol: str = "TLSv1.2 TLSv1.3") -> AsyncIterator[tuple[str, str]]:
    """The URLs of an nginx, plain and with TLS."""
    plain, secure = topologies.free_ports(2)
    (folder / "files").mkdir()
    (folder / "files" / "file").write_bytes(FILE)
    (folder / "files" / "words").write_bytes(WORDS)
    text = NGINX.format(folder=folder, certificates=certificates, plain=plain, secure=secure, protocol=protocol)
    (folder / "nginx.conf").write_text("user root;\n" + text if os.geteuid() == 0 else text)
    path = program("apt:nginx")
    assert path is not None
    async with running((plain, secure), path, "-p", str(folder), "-e", "stderr", "-c", str(folder / "nginx.conf")):
        yield f"http://127.0.0.1:{plain}", f"https://127.0.0.1:{secure}"


@contextlib.asynccontextmanager
async def haproxy(folder: Path, certificates: Path, behind: int) -> AsyncIterator[tuple[str, str]]:
    """The URLs of a haproxy before a port, plain and with TLS."""
    plain, secure, nobody = topologies.free_ports(3)
    pems = (certificates / "server.pem").read_text() + (certificates / "server.key").read_text()
    (folder / "both.pem").write_text(pems)
    text = HAPROXY.format(folder=folder, plain=plain, secure=secure, behind=behind, nobody=nobody)
    (folder / "haproxy.cfg").write_text(text)
    path = program("apt:haproxy")
    assert path is not None
    async with running((plain, secure), path, "-q", "-db", "-f", str(folder / "haproxy.cfg")):
        yield f"http://127.0.0.1:{plain}", f"https://127.0.0.1:{secure}"


async def echo(request: web.Request) -> web.StreamResponse:
    """The digest of what was sent."""
    digest = hashlib.sha256()
    async for part in request.content.iter_any():
        digest.update(part)
    return web.Response(text=digest.hexdigest(), headers={"X-Peer": str(request.transport.get_extra_info("peername"))})  # type: ignore[union-attr]


async def stream(request: web.Request) -> web.StreamResponse:
    """Words in chunks, or without a length to an HTTP/1.0 client."""
    response = web.StreamResponse()
    await response.prepare(request)
    for line in WORDS.splitlines(keepends=True)[:1000]:
        await response.write(line)
    return response


async def download(_: web.Request) -> web.StreamResponse:
    """Eight megabytes."""
    return web.Response(body=SOME)


@contextlib.asynccontextmanager
async def aiohttp_server(context: ssl.SSLContext | None = None) -> AsyncIterator[int]:
    """The port of an aiohttp server."""
    app = web.Application(client_max_size=2**30)
    app.router.add_route("*", "/echo", echo)
    app.router.add_get("/stream", stream)
    app.router.add_get("/download", download)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.05)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context)
    await site.start()
    try:
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()


@pytest.mark.needs("apt:nginx")
@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
@pytest.mark.parametrize("is_secure", [False, True])
async def test_nginx_is_understood(
    trusting: Upstream, certificates: Path, tmp_path: Path, is_secure: bool, read: Reader
) -> None:
    async with nginx(tmp_path, certificates) as urls:
        url = urls[is_secure]
        found = [
            await ask(trusting, a_request(url + path, method=method, headers=headers, body=body), read)
            for method, path, headers, body in (
                ("GET", "/file", (), b""),
                ("HEAD", "/file", (), b""),
                ("GET", "/zipped", (("Accept-Encoding", "gzip"),), b""),
                ("GET", "/nothing", (), b""),
                ("GET", "/moved", (), b""),
                ("GET", "/error", (), b""),
                ("POST", "/none", (), b"x" * 1000),
                ("POST", "/file", (), LARGE),
                ("GET", "/leaves", (), b""),
                ("GET", "/file", (), b""),
                ("HEAD", "/zipped", (("Accept-Encoding", "gzip"),), b""),
                ("GET", "/file", (("If-None-Match", "*"), ("Range", "bytes=5-9")), b""),
            )
        ]
        statuses = [outcome.status for outcome in found]
        assert statuses == [200, 200, 200, 204, 301, 503, 404, 413, 200, 200, 200, statuses[-1]]
        assert statuses[-1] in (206, 304)
        assert {outcome.error for outcome in found} == {""}
        assert found[0].body == found[9].body == FILE
        assert found[1].body == found[3].body == found[10].body == b""
        assert value(found[2], "transfer-encoding") == "chunked"
        assert gzip.decompress(found[2].body) == WORDS
        assert (found[5].body, found[8].body) == (b"not now", b"bye")
        # Four requests a connection is what this nginx allows: the first four go over one.
        connections = [value(outcome, "x-connection") for outcome in found[:5]]
        assert connections[:4] == connections[:1] * 4
        assert connections[4] != connections[0]
        assert await ask(trusting, a_request(f"{url}/resets"), read) == Outcome(error="head")
        if is_secure:
            assert {value(outcome, "x-alpn") for outcome in found} == {"http/1.1"}


@pytest.mark.needs("apt:nginx")
@pytest.mark.parametrize("protocol", ["TLSv1.2", "TLSv1.3"])
async def test_a_tls_session_is_taken_up_again(
    trusting: Upstream, certificates: Path, tmp_path: Path, protocol: str
) -> None:
    async with nginx(tmp_path, certificates, protocol) as (_, url):
        kept = [await ask(trusting, a_request(f"{url}/none")) for _ in range(12)]
        left = [await ask(trusting, a_request(f"{url}/leaves")) for _ in range(4)]
    assert {value(outcome, "x-tls") for outcome in kept + left} == {protocol}
    # Four requests a connection is what this nginx allows.
    assert [value(outcome, "x-reused") for outcome in kept] == ["."] * 4 + ["r"] * 8
    assert [value(outcome, "x-reused") for outcome in left] == ["r"] * 4
    assert len({value(outcome, "x-connection") for outcome in kept + left}) == 3 + 4


@pytest.mark.needs("apt:nginx")
@pytest.mark.parametrize("protocol", ["TLSv1.2", "TLSv1.3"])
async def test_a_tls_session_is_taken_up_again_where_no_connection_is_kept(
    trusting: Upstream, certificates: Path, tmp_path: Path, protocol: str
) -> None:
    async with nginx(tmp_path, certificates, protocol) as (_, url):
        found = [await ask(trusting, a_request(f"{url}/leaves")) for _ in range(4)]
    assert [value(outcome, "x-reused") for outcome in found] == [".", "r", "r", "r"]


@pytest.mark.needs("apt:haproxy")
@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
@pytest.mark.parametrize("is_secure", [False, True])
async def test_haproxy_is_understood(
    trusting: Upstream, certificates: Path, tmp_path: Path, is_secure: bool, read: Reader
) -> None:
    async with aiohttp_server() as behind, haproxy(tmp_path, certificates, behind) as urls:
        url = urls[is_secure]
        digest = hashlib.sha256(SOME).hexdigest().encode()
        for _ in range(2):
            outcome = await ask(trusting, a_request(f"{url}/echo", body=SOME), read)
            assert (outcome.status, outcome.body) == (200, digest)
            outcome = await ask(trusting, a_request(f"{url}/stream", method="GET"), read)
            assert (outcome.body, outcome.error) == (b"".join(WORDS.splitlines(keepends=True)[:1000]), "")
            outcome = await ask(trusting, a_request(f"{url}/download", method="GET"), read)
            assert hashlib.sha256(outcome.body).hexdigest().encode() == digest
            outcome = await ask(trusting, a_request(f"{url}/missing", method="DELETE"), read)
            assert outcome.status == 404
        if is_secure:
            assert value(outcome, "x-alpn") == "http/1.1"
        else:
            outcome = await ask(trusting, a_request(f"{url}/none"), read)
            assert (outcome.status, outcome.error) == (503, "")


@pytest.mark.parametrize("is_secure", [False, True])
async def test_aiohttp_is_understood_by_a_crowd(trusting: Upstream, certificates: Path, is_secure: bool) -> None:
    context = server_context(certificates) if is_secure else None
    async with aiohttp_server(context) as port:
        url = f"{'https' if is_secure else 'http'}://127.0.0.1:{port}"
        bodies = [os.urandom(size) for size in (0, 1, 1000, 2**16, 2**18 + 1, 2**20 + 1)] * 20
        reads = [*READERS.values()]
        outcomes = await asyncio.gather(
            *(
                ask(trusting, a_request(f"{url}/echo", body=body), reads[number % len(reads)])
                for number, body in enumerate(bodies)
            )
        )
        assert [outcome.body for outcome in outcomes] == [hashlib.sha256(body).hexdigest().encode() for body in bodies]
        assert len({value(outcome, "x-peer") for outcome in outcomes}) <= 4
        for read in reads:
            outcome = await ask(trusting, a_request(f"{url}/download", method="GET"), read)
            assert outcome.body == SOME
            outcome = await ask(trusting, a_request(f"{url}/stream", method="GET"), read)
            assert outcome.body == b"".join(WORDS.splitlines(keepends=True)[:1000])
        if context is not None:
            assert context.session_stats()["accept_good"] <= 4


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("is_secure", [False, True])
async def test_a_crowd_may_leave_at_any_moment(
    trusting: Upstream, certificates: Path, is_secure: bool, seed: int
) -> None:
    draw = random.Random(seed)
    async with aiohttp_server(server_context(certificates) if is_secure else None) as port:
        url = f"{'https' if is_secure else 'http'}://127.0.0.1:{port}/echo"
        bodies = [os.urandom(draw.randrange(1, 2**17)) for _ in range(200)]
        reads = [*READERS.values()]
        tasks = [asyncio.create_task(ask(trusting, a_request(url, body=body), draw.choice(reads))) for body in bodies]
        while not all(task.done() for task in tasks):
            draw.choice(tasks).cancel()
            await turns(draw.randrange(1, 40))
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        for body, end in zip(bodies, ends, strict=True):
            if not isinstance(end, asyncio.CancelledError):
                assert not isinstance(end, BaseException), end
                assert end.body == hashlib.sha256(body).hexdigest().encode()
        calm = await asyncio.gather(*(ask(trusting, a_request(url, body=body)) for body in bodies[:20]))
        assert [end.body for end in calm] == [hashlib.sha256(body).hexdigest().encode() for body in bodies[:20]]
        assert len({value(end, "x-peer") for end in calm}) <= 4


# -- TLS ---------------------------------------------------------------------------------------------------------------


async def secrets(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answers whoever has come so far, again and again."""
    with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
        while True:
            await reader.readuntil(b"\r\n\r\n")
            tls = writer.get_extra_info("ssl_object")
            alpn = str(tls.selected_alpn_protocol()).encode()
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(alpn) + alpn)


@contextlib.asynccontextmanager
async def tls_server(
    context: ssl.SSLContext, serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Any] = secrets
) -> AsyncIterator[int]:
    """The port of a server with TLS; it closes what it serves."""

    async def connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await serve(reader, writer)
        finally:
            writer.transport.abort()

    server = await asyncio.start_server(connection, "127.0.0.1", 0, ssl=context)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        await server.wait_closed()
        await turns(8)


async def test_an_authority_that_is_not_known_is_refused(a_client: MakeClient, certificates: Path) -> None:
    client = a_client(connections_per_host=1)
    async with tls_server(server_context(certificates)) as port:
        for _ in range(3):
            with pytest.raises(UpstreamError, match="up cannot be reached"):
                await client.send(a_request(f"https://127.0.0.1:{port}/"))


async def test_a_name_that_the_certificate_does_not_have_is_refused(
    a_client: MakeClient, trusting: Upstream, certificates: Path
) -> None:
    async with tls_server(server_context(certificates)) as port:
        for _ in range(3):
            with pytest.raises(UpstreamError, match="up cannot be reached"):
                await trusting.send(a_request(f"https://localhost:{port}/"))
        outcome = await ask(trusting, a_request(f"https://127.0.0.1:{port}/"))
        assert outcome.status == 200
        # A session that was begun with one name is not taken for another.
        with pytest.raises(UpstreamError, match="up cannot be reached"):
            await trusting.send(a_request(f"https://localhost:{port}/"))


@pytest.mark.parametrize(
    ("offered", "chosen"), [(["h2", "http/1.1"], b"http/1.1"), (["http/1.1"], b"http/1.1"), (["h2"], None), ([], None)]
)
async def test_http_1_1_is_what_is_offered(
    trusting: Upstream, certificates: Path, offered: list[str], chosen: bytes | None
) -> None:
    context = server_context(certificates)
    if offered:
        context.set_alpn_protocols(offered)
    async with tls_server(context) as port:
        outcome = await ask(trusting, a_request(f"https://127.0.0.1:{port}/"))
    assert (outcome.status, outcome.body) in ((200, chosen or b"None"), *([(0, b"")] if offered == ["h2"] else []))


async def test_tls_below_1_2_is_refused(trusting: Upstream, certificates: Path) -> None:
    context = server_context(certificates)
    with pytest.warns(DeprecationWarning, match="TLSv1"):
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    context.set_ciphers("ALL:@SECLEVEL=0")
    async with tls_server(context) as port:
        with pytest.raises(UpstreamError, match="up cannot be reached"):
            await trusting.send(a_request(f"https://127.0.0.1:{port}/"))


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        (b"", Outcome(error="head")),
        (b"HTTP/1.1 200 OK\r\nContent-Le", Outcome(error="head")),
        (
            b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhello",
            Outcome(status=200, headers=(("Content-Length", "9"),), body=b"hello", error="body"),
        ),
        (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n",
            Outcome(status=200, headers=(("Transfer-Encoding", "chunked"),), body=b"hello", error="body"),
        ),
    ],
)
@pytest.mark.parametrize("how", ["ends", "aborts"])
async def test_a_tls_connection_that_ends_too_early_is_an_error(
    trusting: Upstream, certificates: Path, sent: bytes, expected: Outcome, how: str
) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(sent)
        await turns(20)
        if how == "ends":
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async with tls_server(server_context(certificates), serve) as port:
        assert await ask(trusting, a_request(f"https://127.0.0.1:{port}/")) == expected


async def test_a_tls_answer_may_go_on_until_its_end(trusting: Upstream, certificates: Path) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\n\r\nhello")
        writer.close()
        await writer.wait_closed()

    async with tls_server(server_context(certificates), serve) as port:
        outcome = await ask(trusting, a_request(f"https://127.0.0.1:{port}/"))
    assert outcome == Outcome(status=200, body=b"hello")


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
@pytest.mark.parametrize("size", [5, 2**18 + 1, 2**22])
@pytest.mark.parametrize("how", ["ends", "is cut"])
async def test_a_tls_answer_without_a_length_is_whole_only_when_tls_ended(
    trusting: Upstream, certificates: Path, how: str, size: int, read: Reader
) -> None:
    """Whoever sits on the line can end TCP, and would thereby shorten the answer (RFC 9112 §9.8)."""
    sent = LARGE[:size]

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n" + sent)
        await writer.drain()
        if how == "is cut":
            while writer.transport.get_write_buffer_size():
                await turns()
            writer.get_extra_info("socket").shutdown(socket.SHUT_WR)
            await reader.read()
        else:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async with tls_server(server_context(certificates), serve) as port:
        answer = await trusting.send(a_request(f"https://127.0.0.1:{port}/"))
        await turns(50)
        body = bytearray()
        if how == "ends":
            await read(answer, body)
            assert body == sent
        else:
            with pytest.raises(UpstreamError):
                await read(answer, body)
        await answer.close()


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
@pytest.mark.parametrize("size", [2**16, 300_000, 2**22])
async def test_a_tls_answer_waits_for_a_late_reader(
    trusting: Upstream, certificates: Path, size: int, read: Reader
) -> None:
    sent = LARGE[:size]

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                await reader.readuntil(b"\r\n\r\n")
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size + sent)
                await writer.drain()

    async with tls_server(server_context(certificates), serve) as port:
        for _ in range(3):
            answer = await trusting.send(a_request(f"https://127.0.0.1:{port}/"))
            await turns(50)
            body = bytearray()
            await read(answer, body)
            await answer.close()
            assert body == sent


async def test_an_idle_tls_connection_that_ended_is_not_used(trusting: Upstream, certificates: Path) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello")
        await turns(20)
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()

    async with tls_server(server_context(certificates), serve) as port:
        for _ in range(5):
            outcome = await ask(trusting, a_request(f"https://127.0.0.1:{port}/", body=b"x"))
            assert (outcome.body, outcome.error) == (b"hello", "")
            await turns(60)


@pytest.mark.parametrize("count", range(0, 24, 2))
async def test_whoever_leaves_in_a_tls_handshake_leaves_nothing(
    a_client: MakeClient, certificates: Path, count: int
) -> None:
    client = a_client(connections_per_host=1, ca_file=str(certificates / "ca.pem"))
    async with tls_server(server_context(certificates)) as port:
        for _ in range(3):
            task = asyncio.create_task(ask(client, a_request(f"https://127.0.0.1:{port}/")))
            await turns(count)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        assert (await ask(client, a_request(f"https://127.0.0.1:{port}/"))).status == 200


# -- proxies -----------------------------------------------------------------------------------------------------------


class ConnectProxy:
    """An HTTP proxy by hand: `heads` has what it was asked, `answer` is what it says to CONNECT before it hands on."""

    def __init__(self, listener: Listener) -> None:
        self.heads: list[bytes] = []
        self.answer = b"HTTP/1.1 200 Connection established\r\n\r\n"
        self.pieces = 1
        self.url = listener.url
        listener.serve(self._behave)

    async def _behave(self, wire: Wire) -> None:
        while head := await wire.head():
            self.heads.append(head)
            method, target, _ = head.split(b"\r\n")[0].decode().split(" ")
            if method != "CONNECT":
                wire.sends(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello")
                continue
            step = max(1, len(self.answer) // self.pieces)
            await wire.feeds([self.answer[i : i + step] for i in range(0, len(self.answer), step)])
            if not self.answer.startswith(b"HTTP/1.1 2") and b"\r\n\r\nHTTP/1.1 2" not in self.answer:
                await wire.is_left()
                return
            host, _, port = target.partition(":")
            await self._hand_on(wire, host, int(port))

    @staticmethod
    async def _hand_on(wire: Wire, host: str, port: int) -> None:
        reader, writer = await asyncio.open_connection(host, port)

        async def back() -> None:
            while data := await reader.read(2**16):
                await wire.sends_all(data)
            wire.stops_sending()

        backward = asyncio.create_task(back())
        try:
            while data := await wire.receives():
                writer.write(data)
                await writer.drain()
        finally:
            backward.cancel()
            await asyncio.gather(backward, return_exceptions=True)
            writer.transport.abort()


@pytest.fixture
async def proxy(listener: Listener) -> ConnectProxy:
    """An HTTP proxy."""
    return ConnectProxy(listener)


def credentials(text: str) -> bytes:
    """The line that tells a proxy who asks."""
    return b"\r\nProxy-Authorization: Basic " + base64.b64encode(text.encode()) + b"\r\n"


@pytest.mark.parametrize("pieces", [1, 3, 1000])
async def test_https_goes_through_a_proxy_s_tunnel(
    trusting: Upstream, certificates: Path, proxy: ConnectProxy, pieces: int
) -> None:
    proxy.pieces = pieces
    proxy_url = proxy.url.replace("//", "//me:a%3Ab%40c@")
    async with aiohttp_server(server_context(certificates)) as port:
        url = f"https://127.0.0.1:{port}"
        headers = (("Authorization", "Bearer secret"), ("X-A", "b"))
        for _ in range(3):
            request = a_request(f"{url}/echo", headers=headers, body=SOME[: 2**21], proxy_url=proxy_url)
            outcome = await ask(trusting, request)
            assert outcome.body == hashlib.sha256(SOME[: 2**21]).hexdigest().encode()
        (head,) = proxy.heads  # One tunnel for all three.
        first, *lines = head.split(b"\r\n")
        assert first == b"CONNECT 127.0.0.1:%d HTTP/1.1" % port
        assert credentials("me:a:b@c") in head
        assert b"host: 127.0.0.1:%d" % port in [line.lower() for line in lines]
        assert b"secret" not in head
        assert b"X-A" not in head


async def test_http_goes_through_a_proxy_in_absolute_form(client: Upstream, proxy: ConnectProxy) -> None:
    proxy_url = proxy.url.replace("//", "//me:pass@")
    for path in ("/v1/x?a=b", "", "?a=b"):
        request = a_request(f"http://up.invalid:8000{path}", headers=(("X-A", "b"),), body=b"", proxy_url=proxy_url)
        assert (await ask(client, request)).body == b"hello"
    targets = [head.split(b"\r\n")[0] for head in proxy.heads]
    assert targets == [
        b"POST http://up.invalid:8000/v1/x?a=b HTTP/1.1",
        b"POST http://up.invalid:8000/ HTTP/1.1",
        b"POST http://up.invalid:8000/?a=b HTTP/1.1",
    ]
    request = a_request("http://up.invalid:80/x", proxy_url=proxy_url)
    assert (await ask(client, request)).body == b"hello"
    assert proxy.heads.pop().lower().startswith(b"post http://up.invalid/x http/1.1\r\nhost: up.invalid\r\n")
    for head in proxy.heads:
        lines = [line.lower() for line in head.split(b"\r\n")]
        assert b"host: up.invalid:8000" in lines
        assert credentials("me:pass") in head
        assert b"x-a: b" in lines


async def test_a_proxy_s_credentials_never_reach_the_upstream(
    trusting: Upstream, certificates: Path, proxy: ConnectProxy
) -> None:
    seen: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        await writer.drain()
        await reader.read()

    async with tls_server(server_context(certificates), serve) as port:
        request = a_request(f"https://127.0.0.1:{port}/", proxy_url=proxy.url.replace("//", "//me:pass@"))
        assert (await ask(trusting, request)).status == 200
    assert len(seen) == 1
    assert b"proxy" not in seen[0].lower()
    assert seen[0].startswith(b"POST / HTTP/1.1\r\n")


async def test_users_of_a_proxy_do_not_share_connections(client: Upstream, proxy: ConnectProxy) -> None:
    for user in ("one", "two", "one"):
        request = a_request("http://up.invalid/", proxy_url=proxy.url.replace("//", f"//{user}:x@"))
        assert (await ask(client, request)).body == b"hello"
    one, two, again = proxy.heads
    assert credentials("one:x") in one
    assert credentials("two:x") in two
    assert credentials("one:x") in again


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 407 Who\r\nProxy-Authenticate: Basic\r\nContent-Length: 5\r\n\r\nhello",
        b"HTTP/1.1 403 No\r\n\r\n",
        b"HTTP/1.1 502 No\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 301 There\r\nLocation: http://up.invalid/\r\n\r\n",
        b"HTTP/1.1 101 Switching\r\n\r\n",
        b"HTTP/1.1 099 No\r\n\r\n",
        b"nonsense\r\n\r\n",
        b"\x15\x03\x01\x00\x02\x02\x46",
        b"HTTP/1.1 " + b"x" * 2**17,
    ],
)
async def test_a_proxy_that_refuses_is_told_as_such_and_leaves_its_place(
    a_client: MakeClient, certificates: Path, proxy: ConnectProxy, answer: bytes
) -> None:
    client = a_client(connections_per_host=1, ca_file=str(certificates / "ca.pem"))
    good, proxy.answer = proxy.answer, answer
    async with aiohttp_server(server_context(certificates)) as port:
        url = f"https://127.0.0.1:{port}/echo"
        for _ in range(2):
            with pytest.raises(UpstreamError) as caught:
                await client.send(a_request(url, proxy_url=proxy.url, limits={"connect_s": 1.0}))
            assert "hello" not in caught.value.message
            assert "up " in caught.value.message
        proxy.answer = b"HTTP/1.1 100 Continue\r\n\r\n" + good
        assert (await ask(client, a_request(url, proxy_url=proxy.url))).status == 200


@pytest.mark.parametrize("how", ["closes", "resets"])
@pytest.mark.parametrize("sent", [b"", b"HTTP/1.1 200", b"HTTP/1.1 200 OK\r\n\r\n"])
async def test_a_proxy_that_breaks_off_is_told_as_such(
    trusting: Upstream, listener: Listener, how: str, sent: bytes
) -> None:
    asked = asyncio.create_task(ask(trusting, a_request("https://127.0.0.1:1/", proxy_url=listener.url)))
    wire = await listener.accept()
    assert (await wire.head()).startswith(b"CONNECT 127.0.0.1:1 ")
    await wire.feeds([sent] if sent else [])
    getattr(wire, how)()
    assert await asked == Outcome(error="head")


@pytest.mark.parametrize("sent", [b"", b"HTTP/1.1 200", b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 200 OK\r\n\r\n"])
async def test_a_proxy_that_falls_silent_is_left_after_connect_s(
    trusting: Upstream, listener: Listener, sent: bytes
) -> None:
    request = a_request("https://127.0.0.1:1/", proxy_url=listener.url, limits={"connect_s": SOON_S})
    sending = asyncio.create_task(trusting.send(request))
    wire = await listener.accept()
    await wire.head()
    await wire.feeds([sent] if sent else [])
    with pytest.raises(UpstreamTimeoutError, match=r"up could not be reached in time \(connect_s\)"):
        await sending
    while await wire.receives():
        pass


async def test_a_proxy_is_reached_over_tls(trusting: Upstream, certificates: Path, proxy: ConnectProxy) -> None:
    """TLS to the proxy, and in it TLS to the upstream."""
    plain = int(proxy.url.rpartition(":")[2])

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up_reader, up_writer = await asyncio.open_connection("127.0.0.1", plain)

        async def hand_on(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
            with contextlib.suppress(ConnectionError):
                while data := await source.read(2**16):
                    target.write(data)
                    await target.drain()
                target.write_eof() if target.can_write_eof() else target.close()

        try:
            await asyncio.gather(hand_on(reader, up_writer), hand_on(up_reader, writer))
        finally:
            up_writer.transport.abort()

    async with (
        aiohttp_server(server_context(certificates)) as port,
        tls_server(server_context(certificates), serve) as secure,
    ):
        request = a_request(
            f"https://127.0.0.1:{port}/echo", body=SOME[: 2**21], proxy_url=f"https://127.0.0.1:{secure}"
        )
        digest = hashlib.sha256(SOME[: 2**21]).hexdigest().encode()
        for _ in range(2):
            outcome = await ask(trusting, request)
            assert (outcome.body, outcome.error) == (digest, "")
        await trusting.close()
    assert len(proxy.heads) == 1


@pytest.mark.parametrize("count", range(0, 40, 3))
async def test_whoever_leaves_while_a_tunnel_is_made_leaves_nothing(
    a_client: MakeClient, certificates: Path, proxy: ConnectProxy, count: int
) -> None:
    client = a_client(connections_per_host=1, ca_file=str(certificates / "ca.pem"))
    async with aiohttp_server(server_context(certificates)) as port:
        request = a_request(f"https://127.0.0.1:{port}/echo", body=b"x", proxy_url=proxy.url)
        for _ in range(3):
            task = asyncio.create_task(ask(client, request))
            await turns(count)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        assert (await ask(client, request)).status == 200
