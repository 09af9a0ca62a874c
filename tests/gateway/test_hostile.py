"""A stranger at the door, and a stranger behind it: raw sockets, odd clients, odd upstreams.

Whatever comes, the client gets its dialect's error or the upstream's own bytes, every attempt is settled once with what
was reported, no credential reaches the other side or a log, and the worker serves the next request.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import logging
import os
import tracemalloc
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import msgspec
import openai
import pytest
import zstandard

from tests.actors import OPENAI_JSON, Behaviour, Upstream, anthropic_events, chunk, openai_events
from tests.gateway.conftest import KEY, Serve, Served, a_document, decoded
from tests.store.conftest import eventually

CLIENT_KEY = "client-secret-0123456789"
CHAT, COMPLETIONS, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"
GPT, CLAUDE = "up:up-model", "ant:up-model"
PLAIN = b'{"model":"gpt","messages":[]}'
STREAM = b'{"model":"gpt","stream":true}'
USED = (11, 7)
STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
LAST_CHUNK = b"0\r\n\r\n"


class Scripted(Upstream):
    """An upstream that can also be given any behaviour."""

    def does(self, behaviour: Behaviour) -> None:
        """Behaves so from now on."""
        self._behaviour = behaviour


@pytest.fixture
async def upstream() -> AsyncIterator[Scripted]:
    """A scripted upstream."""
    actor = Scripted()
    async with actor.running():
        yield actor


@pytest.fixture
async def serve(serve: Serve, upstream: Upstream, caplog: pytest.LogCaptureFixture) -> AsyncIterator[Serve]:
    """Starts gateways; after the test each one serves a request, holds nothing, and has logged no credential."""
    caplog.set_level(logging.DEBUG)
    gateways: list[Served] = []

    async def start(raw: dict[str, Any], **flags: Any) -> Served:
        # A busy machine is no lost store.
        gateways.append(await serve(raw, **{"redis_deadline_ms": 5000} | flags))
        return gateways[-1]

    yield start
    for gateway in gateways:
        upstream.answers()
        (answer,) = await ask(gateway, a_request(headers=(("Authorization", f"Bearer {CLIENT_KEY}"),)))
        assert answer.status == 200
        await settled(gateway)
    assert secrets_in(caplog) == []


def secrets_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The log lines of the test's body that hold a credential of either side."""
    formatter = logging.Formatter()
    lines = [f"{formatter.format(record)} {vars(record).get('facts')}" for record in caplog.get_records("call")]
    return [line for line in lines if KEY in line or CLIENT_KEY in line]


class Books(msgspec.Struct, frozen=True):
    """What a service's counters say of its attempts."""

    requests: int = 0
    failures: int = 0
    input: int = 0
    output: int = 0


NOTHING = Books()
SERVED = Books(1, 0, *USED)
UNREPORTED = Books(1, 0)
FAILED = Books(1, 1)


async def settled(gateway: Served, service: str = GPT) -> Books:
    """A service's books, once every pick of the pool is settled, each of them once."""

    async def is_over() -> bool:
        states = (await gateway.view()).services.values()
        return all(not state.in_flight and state.picks == state.requests for state in states)

    await eventually(is_over)
    state = (await gateway.view()).services.get(service)
    return Books(state.requests, state.failures, state.input, state.output) if state else NOTHING


# -- a client on a raw socket ------------------------------------------------------------------------------------------


class Answer(msgspec.Struct, frozen=True):
    """An answer as its bytes came; `is_whole` is false when it broke off."""

    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes
    is_whole: bool = True

    def header(self, name: str) -> str | None:
        """The first value of a header, None when absent."""
        return next((value for key, value in self.headers if key.lower() == name.lower()), None)


def a_request(
    body: bytes = PLAIN,
    *,
    method: str = "POST",
    path: str = CHAT,
    version: str = "HTTP/1.1",
    headers: tuple[tuple[str, str], ...] = (),
    content_type: str = "application/json",
    closes: bool = True,
) -> bytes:
    """A request's bytes; with `closes` the server is asked to close the connection behind its answer."""
    lines = [f"{method} {path} {version}", "Host: gateway", *(f"{name}: {value}" for name, value in headers)]
    lines += [f"Content-Type: {content_type}"] if content_type else []
    lines += ["Connection: close"] if closes else []
    names = {name.lower() for name, _ in headers}
    lines += [] if names & {"content-length", "transfer-encoding"} else [f"Content-Length: {len(body)}"]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


@contextlib.asynccontextmanager
async def connected(gateway: Served) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A raw connection to the gateway."""
    host, _, port = gateway.url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port), limit=2**16)
    try:
        async with asyncio.timeout(20):
            yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def ask(gateway: Served, data: bytes) -> list[Answer]:
    """All answers on a connection that is sent these bytes, until the gateway closes it."""
    held = b""
    async with connected(gateway) as (reader, writer):
        writer.write(data)
        with contextlib.suppress(ConnectionError):
            while more := await reader.read(2**20):
                held += more
    return list(_answers(held))


def _answers(held: bytes) -> Iterator[Answer]:
    while held:
        head, _, rest = held.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = tuple((name, value.strip()) for name, _, value in (line.partition(":") for line in lines))
        names = {name.lower(): value for name, value in headers}
        status = int(first.split(" ")[1])
        if 100 <= status < 200 or status in (204, 304):
            yield Answer(status, headers, b"")
            held = rest
        elif "chunked" in names.get("transfer-encoding", ""):
            body, is_whole, held = _unchunked(rest)
            yield Answer(status, headers, body, is_whole)
        else:
            length = int(names.get("content-length", len(rest)))
            yield Answer(status, headers, rest[:length], len(rest) >= length)
            held = rest[length:]


def _unchunked(held: bytes) -> tuple[bytes, bool, bytes]:
    """The body of a chunked answer, whether its last chunk came, and what follows."""
    body = bytearray()
    at = 0
    while (end := held.find(b"\r\n", at)) >= 0:
        size = int(held[at:end], 16)
        body += held[end + 2 : end + 2 + size]
        at = end + 2 + size + 2
        if size == 0:
            return bytes(body), True, held[at:]
    return bytes(body), False, b""


async def ask_one(gateway: Served, data: bytes) -> Answer:
    """The one answer, after informational ones."""
    *early, answer = await ask(gateway, data)
    assert all(100 <= one.status < 200 for one in early)
    return answer


async def turns(gateway: Served) -> None:
    """Lets the gateway's loop read what lies in its sockets: other connections are served meanwhile."""
    for _ in range(3):
        async with gateway.session.get(f"{gateway.url}/healthz") as response:
            await response.read()


def assert_error(answer: Answer, path: str = CHAT) -> None:
    """The answer is an error as the SDK of the path's dialect reads it."""
    assert answer.header("content-type") == "application/json"
    assert answer.header("x-request-id")
    error = decoded(answer.body)
    if path.endswith(MESSAGES):
        assert error.keys() == {"type", "error", "request_id"}
        assert error["error"].keys() == {"type", "message"}
    else:
        assert error["error"].keys() == {"message", "type", "code", "param"}


# -- bodies ------------------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[bytes, int]] = {
    "nothing": (b"", 400),
    "blanks": (b" \r\n\t ", 400),
    "a list": (b"[]", 400),
    "a list of requests": (b'[{"model":"gpt"}]', 400),
    "a string": (b'"gpt"', 400),
    "a number": (b"7", 400),
    "null": (b"null", 400),
    "an empty object": (b"{}", 400),
    "no JSON": (b"model=gpt", 400),
    "single quotes": (b"{'model':'gpt'}", 400),
    "a comment": (b'{"model":"gpt" /* */}', 400),
    "a trailing comma": (b'{"model":"gpt",}', 400),
    "two objects": (b'{"model":"gpt"}{"model":"gpt"}', 400),
    "a brace too many": (b'{"model":"gpt"}}', 400),
    "half a request": (b'{"model":"gpt","messages":[', 400),
    "a byte order mark": (b"\xef\xbb\xbf" + PLAIN, 400),
    "UTF-16": (PLAIN.decode().encode("utf-16"), 400),
    "Latin-1": ('{"model":"gpt","x":"ü"}'.encode("latin-1"), 400),
    "an overlong code": (b'{"model":"gpt","x":"\xc0\xaf"}', 400),
    "an encoded surrogate": (b'{"model":"gpt","x":"\xed\xa0\x80"}', 400),
    "NUL before it": (b"\x00" + PLAIN, 400),
    "NUL in a string": (b'{"model":"gpt","x":"a\x00b"}', 400),
    "NaN": (b'{"model":"gpt","temperature":NaN}', 400),
    "nested without end": (b'{"model":"gpt","x":' + b"[" * 200_000, 400),
    "nested 200 000 deep": (b'{"model":"gpt","x":' + b"[" * 200_000 + b"]" * 200_000 + b"}", 400),
    "objects 100 000 deep": (b'{"model":"gpt","x":' + b'{"x":' * 100_000 + b"1" + b"}" * 100_001, 400),
    "a model that is null": (b'{"model":null}', 400),
    "a model that is a list": (b'{"model":["gpt"]}', 400),
    "a model that is an object": (b'{"model":{"id":"gpt"}}', 400),
    "a lone surrogate as the model": (b'{"model":"\\ud800"}', 400),
    "the last of two models is no string": (b'{"model":"gpt","model":7}', 400),
    "a stream that is a word": (b'{"model":"gpt","stream":"yes"}', 400),
    "a stream that is a number": (b'{"model":"gpt","stream":1}', 400),
    "stream options that are a list": (b'{"model":"gpt","stream_options":[]}', 400),
    "another letter case": (b'{"model":"GPT"}', 404),
    "blanks around the model": (b'{"model":" gpt "}', 404),
    "NUL behind the model": (b'{"model":"gpt\\u0000"}', 404),
    "quotes in the model": (b'{"model":"g\\"p\\\\t"}', 404),
    "markup in the model": (b'{"model":"<script>\\r\\nx: y"}', 404),
    "emoji in the model": ('{"model":"gpt-🦆"}'.encode(), 404),
    "a model of 10 000 letters": (b'{"model":"' + b"g" * 10_000 + b'"}', 404),
}


@pytest.mark.parametrize("case", REFUSED)
async def test_a_bad_body_is_refused_in_each_dialect_and_picks_nothing(
    gateway: Served, upstream: Upstream, case: str
) -> None:
    body, status = REFUSED[case]
    for path in (CHAT, MESSAGES):
        answer = await ask_one(
            gateway, a_request(body.replace(b"gpt", b"claude") if path == MESSAGES else body, path=path)
        )
        assert answer.status == status
        assert_error(answer, path)
        assert len(answer.body) < 2000
    assert upstream.received == []
    assert await settled(gateway) == NOTHING


PASSED: dict[str, tuple[bytes, bytes]] = {
    "a model given twice": (b'{"model":"gpt","model":"gpt"}', b'{"model":"up-model","model":"up-model"}'),
    "another model before it": (b'{"model":"other","model":"gpt"}', b'{"model":"up-model","model":"up-model"}'),
    "an escaped key": (b'{"mod\\u0065l":"gpt"}', b'{"mod\\u0065l":"up-model"}'),
    "an escaped key behind a plain one": (
        b'{"model":"other","\\u006dodel":"gpt"}',
        b'{"model":"up-model","\\u006dodel":"up-model"}',
    ),
    "a plain key behind an escaped one": (
        b'{"\\u006Dodel":"other","model":"gpt"}',
        b'{"\\u006Dodel":"up-model","model":"up-model"}',
    ),
    "an escaped model": (b'{"model":"g\\u0070t"}', b'{"model":"up-model"}'),
    "a model inside": (b'{"x":{"model":"gpt"},"model":"gpt"}', b'{"x":{"model":"gpt"},"model":"up-model"}'),
    "a model inside a string": (
        b'{"x":"{\\"model\\":\\"gpt\\"}","y":["model"],"model":"gpt"}',
        b'{"x":"{\\"model\\":\\"gpt\\"}","y":["model"],"model":"up-model"}',
    ),
    "white space everywhere": (b'\n{\t"model"\r\n:\n"gpt" \n}\n ', b'\n{\t"model"\r\n:\n"up-model" \n}\n '),
    "a number of 400 digits": (
        b'{"seed":' + b"7" * 400 + b',"model":"gpt"}',
        b'{"seed":' + b"7" * 400 + b',"model":"up-model"}',
    ),
    "odd numbers": (
        b'{"a":-0.0,"b":1E+2,"c":1e400,"model":"gpt"}',
        b'{"a":-0.0,"b":1E+2,"c":1e400,"model":"up-model"}',
    ),
    "a lone surrogate in a message": (
        b'{"messages":[{"content":"\\ud83d"}],"model":"gpt"}',
        b'{"messages":[{"content":"\\ud83d"}],"model":"up-model"}',
    ),
    "an escaped NUL": (b'{"x":"\\u0000","model":"gpt"}', b'{"x":"\\u0000","model":"up-model"}'),
    "nested 200 deep": (
        b'{"x":' + b"[" * 200 + b"]" * 200 + b',"model":"gpt"}',
        b'{"x":' + b"[" * 200 + b"]" * 200 + b',"model":"up-model"}',
    ),
    "a stream that is null": (b'{"stream":null,"model":"gpt"}', b'{"stream":null,"model":"up-model"}'),
    "stream options that are null": (
        b'{"stream_options":null,"model":"gpt"}',
        b'{"stream_options":null,"model":"up-model"}',
    ),
    "the most tokens of no number": (b'{"max_tokens":{},"model":"gpt"}', b'{"max_tokens":{},"model":"up-model"}'),
}


@pytest.mark.parametrize("case", PASSED)
async def test_an_odd_body_passes_and_only_its_model_changes(gateway: Served, upstream: Upstream, case: str) -> None:
    sent, expected = PASSED[case]
    answer = await ask_one(gateway, a_request(sent))
    assert (answer.status, answer.body) == (200, OPENAI_JSON)
    assert upstream.last.body == expected
    assert await settled(gateway) == SERVED


@pytest.mark.parametrize(
    "body",
    [b'{"model":"dear","model":"gpt"}', b'{"mod\\u0065l":"dear","model":"gpt"}', b'{"model":"gpt","model":"gpt"}'],
)
async def test_no_other_model_passes_beside_one_that_keeps_its_name(
    serve: Serve, upstream: Upstream, body: bytes
) -> None:
    """A service whose model has the rule's name needs no edit; an upstream that takes the first key must not care."""
    raw = a_document(upstream.url)
    raw["rules"][0]["services"][0]["model"] = "gpt"
    gateway = await serve(raw)
    answer = await ask_one(gateway, a_request(body))
    pairs: list[tuple[str, str]] = json.loads(upstream.last.body, object_pairs_hook=list) if upstream.received else []
    assert answer.status == 400 or {value for _, value in pairs} == {"gpt"}


@pytest.mark.parametrize("model", ['a"b\\c', "größe/🦆:8b", "x" * 256])
async def test_models_of_any_spelling_are_matched_and_sent(serve: Serve, upstream: Upstream, model: str) -> None:
    raw = a_document(upstream.url)
    raw["rules"][0] |= {"request_model": model, "services": [{"provider": "up", "model": model[::-1]}]}
    raw["rules"].append({"request_model": "gpt", "services": [{"provider": "up", "model": "up-model"}]})
    gateway = await serve(raw)
    answer = await ask_one(gateway, a_request(json.dumps({"model": model}).encode()))
    assert answer.status == 200
    assert json.loads(upstream.last.body) == {"model": model[::-1]}


CONTENT_TYPES = {
    "": 200,
    "application/json": 200,
    "Application/JSON": 200,
    "application/json;charset=utf-8": 200,
    "application/json ; charset=UTF-8": 200,
    "application/vnd.api+json": 200,
    "text/plain": 415,
    "application/x-www-form-urlencoded": 415,
    "application/octet-stream": 415,
    "multipart/form-data": 400,
    "multipart/form-data; boundary=": 400,
    "multipart/form-data; boundary=zz": 400,
    "MULTIPART/Form-Data; Boundary=zz": 400,
}


@pytest.mark.parametrize("content_type", CONTENT_TYPES)
async def test_content_types_in_any_case(gateway: Served, upstream: Upstream, content_type: str) -> None:
    answer = await ask_one(gateway, a_request(content_type=content_type))
    assert answer.status == CONTENT_TYPES[content_type]
    if answer.status == 200:
        assert upstream.last.header("content-type") == (content_type or None)
    else:
        assert_error(answer)


CODINGS: dict[str, tuple[bytes, set[int]]] = {
    "identity": (PLAIN, {200}),
    "Identity": (PLAIN, {200}),
    "gzip": (gzip.compress(PLAIN), {415}),
    "GZIP": (gzip.compress(PLAIN), {415}),
    "deflate": (zlib.compress(PLAIN), {415}),
    "zstd": (zstandard.compress(PLAIN), {415}),
    "br": (PLAIN, {400, 415}),
    "something": (PLAIN, {400, 415}),
}


@pytest.mark.parametrize("coding", CODINGS)
async def test_a_coded_request_is_refused_and_an_uncoded_one_is_not(gateway: Served, coding: str) -> None:
    """RFC 9110 §8.4.1: codings are named in any letter case."""
    body, statuses = CODINGS[coding]
    answer = await ask_one(gateway, a_request(body, headers=(("Content-Encoding", coding),)))
    assert answer.status in statuses
    if answer.status != 200:
        assert_error(answer)


async def test_a_request_that_unpacks_to_much_more_is_refused_without_unpacking_it(
    serve: Serve, upstream: Upstream
) -> None:
    gateway = await serve(a_document(upstream.url), max_body_bytes=1_000_000)
    bomb = a_bomb(b'{"model":"gpt","x":"', b'"}')
    peak = await peak_of(lambda: ask(gateway, a_request(bomb, headers=(("Content-Encoding", "gzip"),))))
    assert peak < MOST_BYTES
    assert upstream.received == []


# -- paths and methods -------------------------------------------------------------------------------------------------

NOWHERE = [
    "/",
    "//v1/chat/completions",
    "/V1/chat/completions",
    "/v1",
    "/v1/../v1/chat/completions",
    "/v1/..",
    "/v1/./chat/completions",
    "/v1/chat/../../admin",
    "/v1/%2e%2e/admin",
    "/v1/%2E%2e%2fadmin",
    "/v1/%252e%252e/admin",
    "/v1/%25252e%25252e/admin",
    "/v1/.%2e/admin",
    "/v1/..%2fadmin",
    "/v1/..%5cadmin",
    "/v1/..\\admin",
    "/v1/chat/%2e",
    "/openai/v1/../../admin",
    "/openai/../v1/chat/completions",
    "/tingly/openai/v1/%2e%2e/admin",
    "/tingly/v1/chat/completions",
    "/nobody/v1/chat/completions",
    "/openai/openai/v1/chat/completions",
    "/anthropic/tingly/v1/messages",
    "/openai/chat/completions",
    "/openai%2fv1/chat/completions",
]


@pytest.mark.parametrize("path", NOWHERE)
async def test_a_path_that_walks_away_leads_nowhere(gateway: Served, upstream: Upstream, path: str) -> None:
    answer = await ask_one(gateway, a_request(path=path))
    assert answer.status == 404
    assert_error(answer, path)
    assert upstream.received == []
    assert await settled(gateway) == NOTHING


@pytest.mark.parametrize(
    "path",
    [
        "/v1/chat/completions/",
        "/v1//chat/completions",
        "/v1/chat//completions",
        "/v1/chat%2fcompletions",
        "/v1/chat/c%6fmpletions",
        "/v1/chat/completions;x=1",
    ],
)
async def test_another_spelling_of_a_path_is_refused_or_counted_all_the_same(
    gateway: Served, upstream: Upstream, path: str
) -> None:
    """Many servers take these for the plain path: nobody may stream past the books with a slash more."""

    async def behave(actor: Upstream, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked = b"include_usage" in actor.last.body
        events = openai_events(usage=USED if asked else None)
        writer.write(STREAM_HEAD + b"".join(map(chunk, events)) + LAST_CHUNK)

    assert isinstance(upstream, Scripted)
    upstream.does(behave)
    answer = await ask_one(gateway, a_request(STREAM, path=path))
    assert (answer.status, await settled(gateway)) in ((404, NOTHING), (200, SERVED))


@pytest.mark.parametrize("path", ["/v1/chat/completions/count_tokens", "/v1/embeddings/count_tokens"])
async def test_only_messages_have_a_count_that_is_not_counted(gateway: Served, upstream: Upstream, path: str) -> None:
    answer = await ask_one(gateway, a_request(path=path))
    assert (answer.status, await settled(gateway)) in ((404, NOTHING), (200, SERVED))


@pytest.mark.parametrize("query", ["a=1&b=&a=2", "q=%20%26%3D%F0%9F%A6%86", "model=dear", "x=" + "y" * 5000, "?", "&&"])
async def test_a_query_passes_by_its_meaning(gateway: Served, upstream: Upstream, query: str) -> None:
    answer = await ask_one(gateway, a_request(path=f"{CHAT}?{query}"))
    assert answer.status == 200
    path, _, sent = upstream.last.target.partition("?")
    assert path == CHAT
    assert parse_qsl(sent, keep_blank_values=True) == parse_qsl(query, keep_blank_values=True)


@pytest.mark.parametrize("method", ["GET", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND"])
@pytest.mark.parametrize("path", [CHAT, MESSAGES, "/openai/v1/embeddings"])
async def test_the_wrong_method_is_an_error_of_the_dialect(
    gateway: Served, upstream: Upstream, method: str, path: str
) -> None:
    answer = await ask_one(gateway, a_request(method=method, path=path))
    assert answer.status in (404, 405)
    assert_error(answer, path)
    assert upstream.received == []


async def test_an_answer_to_head_has_no_body(gateway: Served, upstream: Upstream) -> None:
    """RFC 9110 §9.3.2. A body there would be read as the beginning of the next answer."""
    async with connected(gateway) as (reader, writer):
        writer.write(a_request(method="HEAD", closes=False) + a_request())
        held = await reader.read()
    head, _, rest = held.partition(b"\r\n\r\n")
    assert head.split(b" ")[1] in (b"404", b"405")
    assert rest.startswith(b"HTTP/1.1 200 ")


# -- messages on the wire ----------------------------------------------------------------------------------------------


def chunked_request(*parts: bytes, trailer: bytes = b"") -> bytes:
    """A request whose body comes in chunks with extensions."""
    chunks = b"".join(b'%x;name="value"\r\n%b\r\n' % (len(part), part) for part in parts)
    return a_request(chunks + b"0\r\n" + trailer + b"\r\n", headers=(("Transfer-Encoding", "chunked"),))


PLAIN_REQUEST = a_request()
MESSAGES_ON_THE_WIRE: dict[str, tuple[bytes, list[int]]] = {
    "a chunked body": (chunked_request(PLAIN[:5], PLAIN[5:]), [200]),
    "a byte a chunk": (chunked_request(*(bytes([byte]) for byte in PLAIN)), [200]),
    "a chunked body with a trailer": (chunked_request(PLAIN, trailer=b"X-Api-Key: x\r\n"), [200]),
    "a chunk without a size": (
        a_request(b"zz\r\n" + PLAIN, headers=(("Transfer-Encoding", "chunked"),)),
        [400],
    ),
    "an expectation": (a_request(headers=(("Expect", "100-continue"),)), [100, 200]),
    "an expectation in capitals": (a_request(headers=(("Expect", "100-CONTINUE"),)), [100, 200]),
    "an unknown expectation": (a_request(headers=(("Expect", "a miracle"),)), [417]),
    "HTTP/1.0": (a_request(version="HTTP/1.0", closes=False), [200]),
    "HTTP/1.2": (a_request(version="HTTP/1.2"), [400]),
    "three at once": (a_request(closes=False) * 2 + PLAIN_REQUEST, [200, 200, 200]),
    "a bad one between two": (a_request(closes=False) + a_request(b"{", closes=False) + PLAIN_REQUEST, [200, 400, 200]),
    "a blank line before it": (b"\r\n" + PLAIN_REQUEST, [200]),
    "5 000 headers": (a_request(headers=tuple((f"X-{i}", "y") for i in range(5000))), [400]),
    "a header of 100 kB": (a_request(headers=(("X-A", "y" * 100_000),)), [400]),
    "a path of 100 kB": (a_request(path=f"/v1/{'y' * 100_000}"), [400]),
    "two lengths": (a_request(headers=(("Content-Length", "29"), ("Content-Length", "3"))), [400]),
    "a length and chunks": (
        a_request(headers=(("Content-Length", "29"), ("Transfer-Encoding", "chunked"))),
        [400],
    ),
    "a length that is no number": (a_request(headers=(("Content-Length", "0x1d"),)), [400]),
    "a negative length": (a_request(headers=(("Content-Length", "-29"),)), [400]),
    "bare line feeds": (PLAIN_REQUEST.replace(b"\r\n", b"\n"), [400]),
    "a folded header": (PLAIN_REQUEST.replace(b"Host: gateway", b"Host: gateway\r\nX-A: b\r\n c"), [400]),
    "a blank before the colon": (PLAIN_REQUEST.replace(b"Host:", b"X-A : b\r\nHost:"), [400]),
    "NUL in a header": (PLAIN_REQUEST.replace(b"Host:", b"X-A: b\x00\r\nHost:"), [400]),
    "no host": (PLAIN_REQUEST.replace(b"Host: gateway\r\n", b""), [400]),
    "two content types": (a_request(headers=(("Content-Type", "text/plain"),)), [400]),
    "Latin-1 in a header": (PLAIN_REQUEST.replace(b"Host:", b"X-City: Z\xfcrich\r\nHost:"), [200]),
    "UTF-8 in a header": (PLAIN_REQUEST.replace(b"Host:", b"X-City: Z\xc3\xbcrich\r\nHost:"), [200]),
    "raw bytes in a path": (PLAIN_REQUEST.replace(b"completions", b"completions\xff"), [400]),
    "an offer of HTTP/2": (
        PLAIN_REQUEST.replace(
            b"Connection: close",
            b"Connection: Upgrade, HTTP2-Settings, close\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAAB",
        ),
        [200],
    ),
    "an offer of a websocket": (
        PLAIN_REQUEST.replace(b"Connection: close", b"Connection: Upgrade, close\r\nUpgrade: websocket"),
        [200],
    ),
    "TLS": (bytes.fromhex("16030102000100") + b"\x01\xfc\x03\x03", [400]),
    "noise": (bytes(range(256)), [400]),
}


@pytest.mark.parametrize("case", MESSAGES_ON_THE_WIRE)
async def test_messages_on_the_wire_are_served_or_refused(gateway: Served, upstream: Upstream, case: str) -> None:
    data, statuses = MESSAGES_ON_THE_WIRE[case]
    answers = await ask(gateway, data)
    assert [answer.status for answer in answers] == statuses
    assert all(answer.is_whole for answer in answers)
    assert [request.body for request in upstream.received] == [b'{"model":"up-model","messages":[]}'] * statuses.count(
        200
    )


@pytest.mark.parametrize(
    "data",
    [
        a_request(headers=(("Expect", "a miracle"),)),
        a_request(method="CONNECT", path="elsewhere.invalid:443"),
        a_request(method="OPTIONS", path="*"),
        a_request(headers=(("X-A", "y" * 100_000),)),
        a_request(version="HTTP/1.2"),
    ],
    ids=["expectation", "connect", "asterisk", "long header", "version"],
)
async def test_what_is_refused_before_it_is_a_request_is_told_in_json_too(gateway: Served, data: bytes) -> None:
    answer = await ask_one(gateway, data)
    assert 400 <= answer.status < 500
    assert "error" in decoded(answer.body)


async def test_a_request_in_absolute_form_is_served_and_never_sent_where_it_points(
    gateway: Served, upstream: Upstream
) -> None:
    """RFC 9112 §3.2.2: a server must accept it."""
    answer = await ask_one(gateway, a_request(path=f"http://elsewhere.invalid{CHAT}"))
    assert answer.status == 200
    assert upstream.last.target == CHAT


@pytest.mark.parametrize("keeps_alive", [False, True])
async def test_a_stream_to_an_http_1_0_client_ends_with_its_connection(
    gateway: Served, upstream: Upstream, keeps_alive: bool
) -> None:
    """There are no chunks in HTTP/1.0: only the connection's end can tell the body's."""
    upstream.streams(openai_events())
    headers = (("Connection", "keep-alive"),) if keeps_alive else ()
    data = a_request(STREAM, version="HTTP/1.0", headers=headers, closes=False)
    async with asyncio.timeout(2):
        answer = await ask_one(gateway, data)
    assert answer.header("transfer-encoding") is None
    assert answer.body == b"".join([*openai_events()[:3], openai_events()[4]])
    assert await settled(gateway) == SERVED


@pytest.mark.parametrize("header", ["Authorization: Bearer {}\x01", "x-api-key: {}\x00", "{}"])
async def test_a_credential_in_a_malformed_request_is_not_logged(
    gateway: Served, caplog: pytest.LogCaptureFixture, header: str
) -> None:
    line = header.format(CLIENT_KEY).encode()
    answer = await ask_one(gateway, PLAIN_REQUEST.replace(b"Host:", line + b"\r\nHost:"))
    leaks = secrets_in(caplog)
    caplog.clear()
    assert answer.status == 400
    assert leaks == []


async def test_a_prompt_in_a_malformed_request_is_not_logged(gateway: Served, caplog: pytest.LogCaptureFixture) -> None:
    body = b'{"model":"gpt","messages":["a word in confidence"]}'
    await ask(gateway, a_request(body).replace(b"\r\n", b"\n"))
    lines = [logging.Formatter().format(record) for record in caplog.get_records("call")]
    assert not [line for line in lines if "confidence" in line]


# -- headers -----------------------------------------------------------------------------------------------------------

CREDENTIALS = ["Authorization", "X-Api-Key", "api-key", "x-goog-api-key", "Cookie", "Proxy-Authorization"]


@pytest.mark.parametrize("path", [CHAT, MESSAGES, "/v1/messages/count_tokens"])
@pytest.mark.parametrize("has_key", [True, False])
async def test_no_credential_of_a_client_reaches_an_upstream(
    serve: Serve, upstream: Upstream, path: str, has_key: bool
) -> None:
    more: dict[str, Any] = {} if has_key else {"token": "", "no_key_required": True}
    gateway = await serve(a_document(upstream.url, **more), client_tokens=CLIENT_KEY)
    headers = tuple((name, f"Bearer {CLIENT_KEY}") for name in CREDENTIALS)
    body = PLAIN.replace(b"gpt", b"claude") if "messages" in path else PLAIN
    answer = await ask_one(gateway, a_request(body, path=path, headers=headers))
    assert answer.status == 200
    assert CLIENT_KEY not in str(upstream.last)
    sent = {name.lower() for name, _ in upstream.last.headers}
    ours = {"x-api-key" if "messages" in path else "authorization"} if has_key else set()
    assert sent & {name.lower() for name in CREDENTIALS} == ours


@pytest.mark.parametrize("name", CREDENTIALS)
async def test_a_wrong_credential_is_neither_logged_nor_repeated(serve: Serve, upstream: Upstream, name: str) -> None:
    gateway = await serve(a_document(upstream.url), client_tokens=f"other-token,{CLIENT_KEY}")
    wrong = f"wrong-{CLIENT_KEY}"
    for path in (CHAT, MESSAGES):
        answer = await ask_one(gateway, a_request(path=path, headers=((name, f"Bearer {wrong}"),)))
        assert answer.status == 401
        assert_error(answer, path)
        assert wrong not in str(answer)
    assert upstream.received == []


async def test_what_belongs_to_the_client_s_connection_stays_there(gateway: Served, upstream: Upstream) -> None:
    ours = (
        ("Connection", "x-one, X-Two"),
        ("connection", "close,x-three"),
        ("X-One", "1"),
        ("x-two", "2"),
        ("X-Three", "3"),
        ("Keep-Alive", "timeout=5"),
        ("Proxy-Connection", "keep-alive"),
        ("TE", "trailers, gzip"),
        ("Trailer", "x-late"),
        ("Upgrade", "h2c"),
        ("Via", "1.1 somewhere"),
        ("Forwarded", "for=10.0.0.1"),
        ("X-Forwarded-Host", "inside"),
        ("X-Real-IP", "10.0.0.1"),
        ("x-balancer-service", "another"),
        ("X-Kept", "yes"),
    )
    answer = await ask_one(gateway, a_request(headers=ours, closes=False))
    assert answer.status == 200
    names = {name.lower() for name, _ in upstream.last.headers}
    assert names - {"connection"} == {
        "host",
        "content-type",
        "content-length",
        "accept-encoding",
        "authorization",
        "x-kept",
        "x-request-id",
    }


DROPPED = (
    ("Connection", "x-one, X-Two"),
    ("connection", "x-three"),
    ("X-One", "1"),
    ("x-two", "2"),
    ("X-Three", "3"),
    ("Keep-Alive", "timeout=5"),
    ("Proxy-Authenticate", "Basic"),
    ("Proxy-Connection", "keep-alive"),
    ("Trailer", "x-late"),
    ("Upgrade", "h2c"),
    ("Set-Cookie", "account=1"),
    ("WWW-Authenticate", 'Bearer realm="theirs"'),
    ("Server", "theirs"),
    ("Via", "1.1 theirs"),
    ("Alt-Svc", 'h3=":443"'),
    ("Strict-Transport-Security", "max-age=1"),
    ("openai-organization", "org-theirs"),
    ("OpenAI-Project", "proj-theirs"),
    ("anthropic-organization-id", "org-theirs"),
    ("x-balancer-service", "theirs"),
    ("X-Balancer-Decision", "theirs"),
)


@pytest.mark.parametrize("kind", ["json", "stream", "error", "count_tokens"])
async def test_what_belongs_to_the_upstream_s_account_stays_there(
    gateway: Served, upstream: Upstream, kind: str
) -> None:
    headers = (*DROPPED, ("x-ratelimit-remaining-requests", "9"), ("x-request-id", "up-1"))
    if kind == "stream":
        upstream.streams(openai_events(), headers=headers)
    else:
        upstream.answers(400 if kind == "error" else 200, headers=headers)
    path, body = CHAT, STREAM if kind == "stream" else PLAIN
    if kind == "count_tokens":
        path, body = "/v1/messages/count_tokens", PLAIN.replace(b"gpt", b"claude")
    answer = await ask_one(gateway, a_request(body, path=path))
    ours = {"connection", "server", "x-balancer-service", "x-balancer-decision"}
    names = {name.lower() for name, _ in answer.headers}
    assert names & {name.lower() for name, _ in DROPPED} <= ours
    assert "theirs" not in str(answer.headers)
    assert (answer.header("x-ratelimit-remaining-requests"), answer.header("x-upstream-request-id")) == ("9", "up-1")


@pytest.mark.parametrize("place", ["body", "header", "event"])
async def test_a_credential_that_an_upstream_repeats_in_an_error_is_masked(
    gateway: Served, upstream: Upstream, place: str
) -> None:
    told = b'{"error":{"message":"Bearer %b is no good"}}' % KEY.encode()
    match place:
        case "body":
            upstream.answers(401, told)
        case "header":
            upstream.answers(401, b"{}", headers=(("x-debug", f"Bearer {KEY}"),))
        case _:
            upstream.streams([b"data: %b\n\n" % told])
    answer = await ask_one(gateway, a_request(STREAM))
    assert KEY not in str(answer)
    assert await settled(gateway) == FAILED


# -- what upstreams answer ---------------------------------------------------------------------------------------------


class Answered(msgspec.Struct, frozen=True):
    """What an upstream sends before it closes, and what becomes of it; `body` None is an error of our dialect."""

    raw: bytes
    status: int = 200
    body: bytes | None = OPENAI_JSON
    books: Books = SERVED


def an_answer(
    body: bytes = OPENAI_JSON, *headers: bytes, status: bytes = b"200 OK", length: int | None = None
) -> bytes:
    """An answer's bytes, of any length it may claim."""
    size = len(body) if length is None else length
    lines = [b"HTTP/1.1 " + status, b"Content-Type: application/json", *headers, b"Content-Length: %d" % size]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def a_chunked_answer(data: bytes) -> bytes:
    """The head of a chunked answer, and these bytes."""
    return b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n" + data


GZIPPED = gzip.compress(OPENAI_JSON, mtime=0)
DEEP = b'{"model":"up-model","x":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
BROKEN = Answered(b"", 502, None, FAILED)


def broken(raw: bytes) -> Answered:
    """The client is told that the upstream broke off."""
    return msgspec.structs.replace(BROKEN, raw=raw)


ANSWERED: dict[str, Answered] = {
    "early hints": Answered(b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\nSet-Cookie: a=b\r\n\r\n" + an_answer()),
    "three times 100": Answered(b"HTTP/1.1 100 Continue\r\n\r\n" * 3 + an_answer()),
    "no reason phrase": Answered(an_answer(status=b"200")),
    "no content type": Answered(an_answer().replace(b"Content-Type: application/json\r\n", b"")),
    "no length": Answered(an_answer().replace(b"Content-Length: %d\r\n" % len(OPENAI_JSON), b"")),
    "a charset": Answered(an_answer().replace(b"application/json", b"Application/JSON; charset=utf-8")),
    "chunks with extensions": Answered(
        a_chunked_answer(
            b"5;a=b;c\r\n%b\r\n%x\r\n%b\r\n0;z\r\n\r\n" % (OPENAI_JSON[:5], len(OPENAI_JSON) - 5, OPENAI_JSON[5:])
        )
    ),
    "a trailer": Answered(a_chunked_answer(chunk(OPENAI_JSON) + b"0\r\nSet-Cookie: a=b\r\n\r\n")),
    "a byte a chunk": Answered(a_chunked_answer(b"".join(chunk(bytes([b])) for b in OPENAI_JSON) + LAST_CHUNK)),
    "Latin-1 in a header": Answered(an_answer(OPENAI_JSON, b"X-City: Z\xfcrich")),
    "white space around": Answered(an_answer(b"\n " + OPENAI_JSON + b"\n"), body=b"\n " + OPENAI_JSON + b"\n"),
    "a byte order mark": Answered(an_answer(b"\xef\xbb\xbf" + OPENAI_JSON), body=b"\xef\xbb\xbf" + OPENAI_JSON),
    "a lone surrogate": Answered(
        an_answer(OPENAI_JSON.replace(b'"hi"', b'"\\ud83d"')), body=OPENAI_JSON.replace(b'"hi"', b'"\\ud83d"')
    ),
    "bytes that are no UTF-8": Answered(
        an_answer(OPENAI_JSON.replace(b'"hi"', b'"\xff"')), body=OPENAI_JSON.replace(b'"hi"', b'"\xff"')
    ),
    "a usage that is null": Answered(an_answer(b'{"usage":null}'), body=b'{"usage":null}', books=UNREPORTED),
    "a negative usage": Answered(
        an_answer(b'{"usage":{"prompt_tokens":-1,"completion_tokens":-2}}'),
        body=b'{"usage":{"prompt_tokens":-1,"completion_tokens":-2}}',
        books=UNREPORTED,
    ),
    "a usage beyond reason": Answered(
        an_answer(b'{"usage":{"prompt_tokens":1e300,"completion_tokens":99999999999999999999}}'),
        body=b'{"usage":{"prompt_tokens":1e300,"completion_tokens":99999999999999999999}}',
        books=UNREPORTED,
    ),
    "a usage that is a list": Answered(an_answer(b'{"usage":[7]}'), body=b'{"usage":[7]}', books=UNREPORTED),
    "a usage given twice": Answered(
        an_answer(b'{"usage":{"prompt_tokens":1,"completion_tokens":1},' + OPENAI_JSON[1:]),
        body=b'{"usage":{"prompt_tokens":1,"completion_tokens":1},' + OPENAI_JSON[1:],
    ),
    "nested 100 000 deep": Answered(an_answer(DEEP), body=DEEP, books=UNREPORTED),
    "HTML": Answered(an_answer(b"<html>").replace(b"application/json", b"text/html"), body=b"<html>", books=UNREPORTED),
    "nothing": Answered(an_answer(b""), 502, None, FAILED),
    "half a JSON": Answered(an_answer(OPENAI_JSON[:40]), body=OPENAI_JSON[:40], books=UNREPORTED),
    "gzip that breaks off": Answered(
        an_answer(GZIPPED[:60], b"Content-Encoding: gzip"), body=GZIPPED[:60], books=UNREPORTED
    ),
    "gzip that is none": Answered(an_answer(OPENAI_JSON, b"Content-Encoding: gzip"), books=UNREPORTED),
    "an unknown coding": Answered(an_answer(OPENAI_JSON, b"Content-Encoding: br"), books=UNREPORTED),
    "no content": Answered(b"HTTP/1.1 204 No Content\r\n\r\n", 204, b"", UNREPORTED),
    "an error of another kind": Answered(an_answer(b"oh", status=b"418 I"), 418, b"oh", UNREPORTED),
    "a status beyond all": Answered(an_answer(b"oh", status=b"799 X"), 799, b"oh", FAILED),
    "a length that is too long": Answered(an_answer(length=500), 200, OPENAI_JSON, FAILED),
    "a negative length": broken(an_answer(length=-5)),
    "a length and chunks": broken(an_answer(OPENAI_JSON, b"Transfer-Encoding: chunked")),
    "two lengths": broken(an_answer(OPENAI_JSON, b"Content-Length: 3")),
    "a chunk without a size": broken(a_chunked_answer(b"zz\r\n" + OPENAI_JSON)),
    "NUL in a header": broken(an_answer(OPENAI_JSON, b"X-A: b\x00c")),
    "3 000 headers": broken(an_answer(OPENAI_JSON, *(b"X-%d: y" % i for i in range(3000)))),
    "a header of 100 kB": broken(an_answer(OPENAI_JSON, b"X-A: " + b"y" * 100_000)),
    "HTTP/0.9": broken(OPENAI_JSON),
    "noise": broken(bytes(range(256))),
    "silence": broken(b""),
}


@pytest.mark.parametrize("case", ANSWERED)
@pytest.mark.parametrize("response_model", ["", "house-model"])
async def test_an_odd_answer_comes_down_as_it_is_or_as_an_error(
    serve: Serve, upstream: Upstream, case: str, response_model: str
) -> None:
    """With a `response_model` too: an answer that cannot be read passes under the upstream's own name."""
    expected = ANSWERED[case]
    raw = a_document(upstream.url)
    raw["rules"][0]["response_model"] = response_model
    gateway = await serve(raw)
    upstream.sends(expected.raw)
    answer = await ask_one(gateway, a_request())
    if response_model and not answer.is_whole:
        pytest.fail("an answer that is read whole first is never half sent")
    if expected.status == 200 and expected.books == FAILED:
        assert (answer.status, answer.is_whole) == ((502, True) if response_model else (200, False))
    else:
        assert (answer.status, answer.is_whole) == (expected.status, True)
        if expected.body is None:
            assert_error(answer)
        else:
            renamed = expected.body.replace(b'"up-model"', b'"house-model"')
            assert answer.body in ((expected.body, renamed) if response_model else (expected.body,))
            sent_coding = b"Content-Encoding" in expected.raw
            assert (answer.header("content-encoding") is not None) == sent_coding
    assert await settled(gateway) == expected.books
    assert "set-cookie" not in {name.lower() for name, _ in answer.headers}


@pytest.mark.parametrize("status", [300, 301, 302, 303, 304, 307, 308])
async def test_a_redirect_is_neither_followed_nor_handed_on(gateway: Served, upstream: Upstream, status: int) -> None:
    """An SDK that follows it would take its own credential and the prompt past us, to a place the upstream names."""
    async with Upstream().running() as elsewhere:
        upstream.answers(status, b"", headers=(("Location", f"{elsewhere.url}/v1/chat/completions"),))
        async with openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key=CLIENT_KEY, max_retries=0) as client:
            with pytest.raises(openai.APIError):
                await client.chat.completions.create(model="gpt", messages=[{"role": "user", "content": "hi"}])
        answer = await ask_one(gateway, a_request())
        assert elsewhere.received == []
    assert answer.header("location") is None
    assert len(upstream.received) == 2
    assert await settled(gateway) == Books(2, 2)


async def test_an_upstream_cannot_switch_protocols(gateway: Served, upstream: Upstream) -> None:
    """RFC 9110 §15.2.2: nobody asked for it, so it is no answer."""
    upstream.sends(b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\nhello")
    answers = await ask(gateway, a_request())
    assert [answer.status for answer in answers] == [502]
    assert await settled(gateway) == FAILED


@pytest.mark.parametrize("coding", ["gzip", "br"])
async def test_an_error_that_cannot_be_decoded_is_still_an_error_with_words(
    gateway: Served, upstream: Upstream, coding: str
) -> None:
    """Its bytes may hide a credential, so they stay here; an SDK that finds no body cannot tell what happened."""
    upstream.answers(400, b"\x0b\x02\x80 no such coding", headers=(("Content-Encoding", coding),))
    answer = await ask_one(gateway, a_request())
    assert answer.status == 400
    assert_error(answer)


@pytest.mark.parametrize("is_late", [False, True])
async def test_a_second_answer_on_a_connection_is_nobody_s(gateway: Served, upstream: Scripted, is_late: bool) -> None:
    """An upstream that answers twice, or says 408 to an idle connection, must not answer somebody else's request."""
    stray = an_answer(b'{"whose":"somebody else"}', status=b"408 Request Timeout")
    gate = asyncio.Event()
    sent = asyncio.Event()

    async def behave(actor: Upstream, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(actor.received) > 1:
            writer.write(an_answer())
            return
        writer.write(an_answer() + (b"" if is_late else stray))
        await writer.drain()
        if is_late:
            await gate.wait()
            writer.write(stray)
            await writer.drain()
        sent.set()

    upstream.does(behave)
    first = await ask_one(gateway, a_request())
    gate.set()
    await sent.wait()
    await turns(gateway)
    second = await ask_one(gateway, a_request())
    assert (first.status, first.body) in ((200, OPENAI_JSON), (502, first.body))
    assert (second.status, second.body) == (200, OPENAI_JSON)


# -- streams -----------------------------------------------------------------------------------------------------------


class Streamed(msgspec.Struct, frozen=True):
    """A stream's bytes, what a client sees of them that did not ask for usage (None: all), and the books."""

    sent: bytes
    seen: bytes | None = None
    books: Books = SERVED


EVENTS = openai_events()
WORDS, USAGE, DONE = EVENTS[:3], EVENTS[3], EVENTS[4]
WHOLE = b"".join(EVENTS)
HIDDEN = b"".join([*WORDS, DONE])


def with_line_end(data: bytes, end: bytes) -> bytes:
    """The same stream with other line ends."""
    return data.replace(b"\n", end)


def beside(extra: bytes, *, at: int = 0, books: Books = SERVED) -> Streamed:
    """The usual stream with something more in it, which everyone sees."""
    return Streamed(
        b"".join([*EVENTS[:at], extra, *EVENTS[at:]]), b"".join([*EVENTS[:at], extra, *EVENTS[at:3], DONE]), books
    )


STREAMED: dict[str, Streamed] = {
    "CRLF": Streamed(with_line_end(WHOLE, b"\r\n"), with_line_end(HIDDEN, b"\r\n")),
    "CR": Streamed(with_line_end(WHOLE, b"\r"), with_line_end(HIDDEN, b"\r")),
    "a byte order mark": Streamed(b"\xef\xbb\xbf" + WHOLE, b"\xef\xbb\xbf" + HIDDEN),
    "comments": beside(b": keep-alive\n\n:\n\n", at=1),
    "ids and retries": beside(b"id: 7\nretry: 10\ndata: {}\n\n", at=1),
    "blank lines": beside(b"\n\n\n", at=2),
    "several data lines": Streamed(
        b"".join(
            [
                *WORDS,
                b'data: {"choices":[],\ndata: "usage":{"prompt_tokens":11,\ndata:"completion_tokens":7}}\n\n',
                DONE,
            ]
        ),
        HIDDEN,
    ),
    "no blank after the colon": Streamed(WHOLE.replace(b"data: ", b"data:"), HIDDEN.replace(b"data: ", b"data:")),
    "text beyond ASCII": beside('data: {"choices":[{"delta":{"content":"größe 🦆"}}]}\n\n'.encode(), at=1),
    "bytes that are no UTF-8": beside(b'data: {"choices":[{"delta":{"content":"\xff"}}],"usage":null}\n\n'),
    "a lone surrogate": beside(b'data: {"choices":[{"delta":{"content":"\\ud83d"}}],"usage":null}\n\n'),
    "nested 100 000 deep": beside(b'data: {"choices":' + b"[" * 100_000 + b"]" * 100_000 + b',"usage":null}\n\n'),
    "no JSON": beside(b"data: hello\n\n", at=1),
    "an event of 9 MB": beside(b'data: {"image":"' + b"A" * 9_000_000 + b'"}\n\n', at=1),
    "Azure's first chunk": beside(
        b'data: {"choices":[],"created":0,"id":"","model":"","object":"","prompt_filter_results":[{"prompt_index":0}],'
        b'"usage":null}\n\n'
    ),
    "Azure's first chunk without usage": beside(b'data: {"choices":[],"prompt_filter_results":[]}\n\n'),
    "a null usage in every chunk": Streamed(
        WHOLE.replace(b"}}]}\n", b'}}],"usage":null}\n'), HIDDEN.replace(b"}}]}\n", b'}}],"usage":null}\n')
    ),
    "usage beside choices": Streamed(
        b"".join(
            [*WORDS, b'data: {"choices":[{"delta":{}}],"usage":{"prompt_tokens":11,"completion_tokens":7}}\n\n', DONE]
        )
    ),
    "usage so far in every chunk": Streamed(
        b"".join(
            b'data: {"choices":[{"delta":{"content":"w"}}],"usage":{"prompt_tokens":11,"completion_tokens":%d}}\n\n' % n
            for n in range(1, 8)
        )
        + DONE
    ),
    "usage twice": Streamed(
        b"".join([*WORDS, USAGE.replace(b":11", b":1").replace(b":7", b":1"), USAGE, DONE]),
        HIDDEN,
    ),
    "usage null at the end": Streamed(
        b"".join([*WORDS, b'data: {"choices":[],"usage":null}\n\n', DONE]), books=UNREPORTED
    ),
    "no usage": Streamed(HIDDEN, books=UNREPORTED),
    "negative usage": Streamed(
        b"".join([*WORDS, b'data: {"choices":[{}],"usage":{"prompt_tokens":-1,"completion_tokens":-1}}\n\n', DONE]),
        books=UNREPORTED,
    ),
    "no [DONE]": Streamed(b"".join([*WORDS, USAGE]), b"".join(WORDS)),
    "[DONE] twice": Streamed(WHOLE + DONE, HIDDEN + DONE),
    "something after [DONE]": Streamed(WHOLE + b": bye\n\ndata: {}\n\n", HIDDEN + b": bye\n\ndata: {}\n\n"),
    "no line end behind the usage": Streamed(b"".join([*WORDS, USAGE.rstrip()]), b"".join(WORDS)),
    "no blank line behind the usage": Streamed(b"".join([*WORDS, USAGE.rstrip(), b"\n"]), b"".join(WORDS)),
    "no line end behind [DONE]": Streamed(WHOLE.rstrip(), HIDDEN.rstrip()),
}


@pytest.mark.parametrize("case", STREAMED)
@pytest.mark.parametrize("asks", [True, False], ids=["asked", "not asked"])
async def test_an_odd_stream_passes_and_its_usage_is_counted_and_shown_to_who_asked(
    gateway: Served, upstream: Upstream, case: str, asks: bool
) -> None:
    stream = STREAMED[case]
    upstream.sends(STREAM_HEAD + (chunk(stream.sent) if stream.sent else b"") + LAST_CHUNK)
    body = STREAM[:-1] + b',"stream_options":{"include_usage":true}}' if asks else STREAM
    answer = await ask_one(gateway, a_request(body))
    assert answer.is_whole
    assert answer.body == (stream.sent if asks or stream.seen is None else stream.seen)
    assert await settled(gateway) == stream.books


@pytest.mark.parametrize("cut", [1, 2, 7])
@pytest.mark.parametrize("case", ["CRLF", "CR", "text beyond ASCII", "several data lines", "a byte order mark"])
async def test_a_stream_may_be_cut_anywhere(gateway: Served, upstream: Upstream, case: str, cut: int) -> None:
    stream = STREAMED[case]
    parts = [stream.sent[at : at + cut] for at in range(0, len(stream.sent), cut)]
    upstream.sends(STREAM_HEAD, *map(chunk, parts), LAST_CHUNK)
    answer = await ask_one(gateway, a_request(STREAM))
    assert answer.body == stream.seen
    assert await settled(gateway) == SERVED


@pytest.mark.parametrize(
    "options",
    [
        b"null",
        b"{}",
        b'{"include_usage":false}',
        b'{"include_usage":null}',
        b'{"include_usage":"true"}',
        b'{"include_usage":1}',
        b'{"include_usage":false,"include_usage":false}',
        b'{"include\\u005fusage":false}',
        b'{"other":[{"include_usage":true}]}',
    ],
)
async def test_usage_is_asked_for_and_hidden_whatever_the_client_s_options(
    gateway: Served, upstream: Upstream, options: bytes
) -> None:
    upstream.streams(EVENTS)
    answer = await ask_one(gateway, a_request(STREAM[:-1] + b',"stream_options":' + options + b"}"))
    assert answer.body == HIDDEN
    assert json.loads(upstream.last.body)["stream_options"]["include_usage"] is True
    assert await settled(gateway) == SERVED


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, RESPONSES])
@pytest.mark.parametrize("coding", ["gzip", "zstd", "br"])
async def test_a_coded_stream_passes(gateway: Served, upstream: Upstream, path: str, coding: str) -> None:
    data = WHOLE if path != RESPONSES else b"".join(RESPONSE_EVENTS).replace(b"\\ud83d", b"w")
    encode: dict[str, Callable[[bytes], bytes]] = {"gzip": gzip.compress, "zstd": zstandard.compress, "br": bytes}
    coded = encode[coding](data)
    head = STREAM_HEAD[:-2] + f"Content-Encoding: {coding}\r\n\r\n".encode()
    upstream.sends(head + chunk(coded[:50]) + chunk(coded[50:]) + LAST_CHUNK)
    answer = await ask_one(gateway, a_request(STREAM, path=path))
    if answer.header("content-encoding"):
        assert (answer.header("content-encoding"), answer.body) == (coding, coded)
    else:
        assert answer.body == HIDDEN
    assert await settled(gateway) == (UNREPORTED if coding == "br" else SERVED)


async def test_a_coded_stream_that_goes_bad_is_broken_off_and_not_passed_on_coded(
    gateway: Served, upstream: Upstream
) -> None:
    """It was being decoded for the client; the rest cannot be, and coded bytes behind plain ones are nobody's."""
    noise = b"\xff\xfe no gzip \xfd"
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    good = packer.compress(b"".join(WORDS)) + packer.flush(zlib.Z_SYNC_FLUSH)
    head = STREAM_HEAD[:-2] + b"Content-Encoding: gzip\r\n\r\n"
    upstream.sends(head + chunk(good), chunk(noise) + LAST_CHUNK)
    answer = await ask_one(gateway, a_request(STREAM))
    assert noise not in answer.body
    assert not answer.is_whole or b'"error"' in answer.body
    assert await settled(gateway) == FAILED


RESPONSE_EVENTS = [
    (
        b'event: response.created\ndata: {"type":"response.created","response":{"id":"r1","model":"up-model",'
        b'"usage":null}}\n\n'
    ),
    b'event: response.output_text.delta\ndata: {"type":"response.output_text.delta","delta":"w"}\n\n',
    (
        b'event: response.completed\ndata: {"type":"response.completed","response":{"id":"r1","model":"up-model",'
        b'"output":[{"text":"\\ud83d"}],"usage":{"input_tokens":11,"output_tokens":7}}}\n\n'
    ),
]


@pytest.mark.parametrize(("cut", "end"), [(None, b"\n"), (None, b"\r\n"), (None, b"\r"), (-1, b"\n"), (-2, b"\n")])
async def test_the_usage_in_a_response_s_last_event_counts_however_that_ends(
    gateway: Served, upstream: Upstream, cut: int | None, end: bytes
) -> None:
    data = with_line_end(b"".join(RESPONSE_EVENTS).replace(b"\\ud83d", b"w")[:cut], end)
    upstream.sends(STREAM_HEAD + chunk(data) + LAST_CHUNK)
    answer = await ask_one(gateway, a_request(STREAM, path=RESPONSES))
    assert answer.body == data
    assert await settled(gateway) == SERVED


async def test_a_lone_surrogate_in_a_completed_response_costs_no_usage(gateway: Served, upstream: Upstream) -> None:
    """Servers that cut a text between two halves of an emoji write it so; RFC 8259 §8.2 lets them."""
    upstream.streams(RESPONSE_EVENTS)
    await ask_one(gateway, a_request(STREAM, path=RESPONSES))
    assert await settled(gateway) == SERVED


# -- another name for the model ----------------------------------------------------------------------------------------


class Renamed(msgspec.Struct, frozen=True):
    """An answer of an upstream whose model is `up-model`, and the path it is for."""

    path: str
    body: bytes
    is_stream: bool = False
    keeps: bytes = b"\x00"


RENAMED: dict[str, Renamed] = {
    "chat": Renamed(CHAT, OPENAI_JSON),
    "white space": Renamed(CHAT, b'{\n "model" :\t"up-model",\n "x": [1,  2]}'),
    "chat with a model in its text": Renamed(
        CHAT, b'{"model":"up-model","choices":[{"model":"mine","content":"{\\"model\\":\\"mine\\"}"}]}', keeps=b"mine"
    ),
    "no model": Renamed(CHAT, b'{"choices":[]}'),
    "a model that is null": Renamed(CHAT, b'{"model":null}'),
    "completions": Renamed(COMPLETIONS, b'{"model":"up-model","choices":[{"text":"x"}]}'),
    "embeddings": Renamed("/v1/embeddings", b'{"model":"up-model","data":[]}'),
    "responses": Renamed(RESPONSES, b'{"object":"response","model":"up-model","output":[]}'),
    "messages": Renamed(MESSAGES, b'{"type":"message","model":"up-model","content":[]}'),
    "a chat stream": Renamed(CHAT, WHOLE, is_stream=True),
    "a chat stream with CRLF": Renamed(CHAT, with_line_end(WHOLE, b"\r\n"), is_stream=True),
    "a chat stream with CR": Renamed(CHAT, with_line_end(WHOLE, b"\r"), is_stream=True),
    "a stream with ids": Renamed(
        CHAT, b'id: 7\n: note\nretry: 9\ndata: {"model":"up-model"}\n\n' + WHOLE, is_stream=True
    ),
    "several data lines with an id": Renamed(
        CHAT, b'id: 7\ndata: {"x":1,\ndata: "model":"up-model"}\n\n' + WHOLE, is_stream=True, keeps=b"id: 7"
    ),
    "a stream of responses": Renamed(RESPONSES, b"".join(RESPONSE_EVENTS).replace(b"\\ud83d", b"w"), is_stream=True),
    "a stream of messages": Renamed(MESSAGES, b"".join(anthropic_events()), is_stream=True),
}


@pytest.mark.parametrize("case", RENAMED)
async def test_only_the_rule_s_own_name_for_the_model_is_seen(serve: Serve, upstream: Upstream, case: str) -> None:
    renamed = RENAMED[case]
    raw = a_document(upstream.url)
    for rule in raw["rules"]:
        rule["response_model"] = "house-model"
    gateway = await serve(raw)
    if renamed.is_stream:
        upstream.sends(STREAM_HEAD + chunk(renamed.body) + LAST_CHUNK)
    else:
        upstream.answers(body=renamed.body)
    model = "claude" if renamed.path == MESSAGES else "gpt"
    body = {"model": model, "stream": renamed.is_stream, "stream_options": {"include_usage": True}}
    answer = await ask_one(gateway, a_request(json.dumps(body).encode(), path=renamed.path))
    assert b"up-model" not in answer.body
    if "several data lines" not in case:
        assert answer.body == renamed.body.replace(b"up-model", b"house-model")
    assert renamed.keeps == b"\x00" or renamed.keeps in answer.body


# -- errors in mid-stream ----------------------------------------------------------------------------------------------

ERRORS: dict[str, tuple[str, list[bytes], Books]] = {
    "OpenAI's": (CHAT, [*WORDS, USAGE, b'data: {"error":{"message":"overloaded","code":"x"}}\n\n'], Books(1, 1, *USED)),
    "an error event in a chat": (CHAT, [*WORDS, b'event: error\ndata: {"message":"x"}\n\n'], FAILED),
    "a failed response": (
        RESPONSES,
        [
            b'event: response.failed\ndata: {"type":"response.failed","response":{"error":{"code":"x"},%b}}\n\n'
            % b'"usage":{"input_tokens":3,"output_tokens":1}'
        ],
        Books(1, 1, 3, 1),
    ),
    "a response's error": (RESPONSES, [b'event: error\ndata: {"type":"error","code":"x","message":"y"}\n\n'], FAILED),
    "Anthropic's": (
        MESSAGES,
        [
            *anthropic_events()[:4],
            b'event: error\ndata: {"type":"error","error":{"type":"overloaded_error","message":"x"}}\n\n',
        ],
        Books(1, 1, 11, 1),
    ),
}


@pytest.mark.parametrize("case", ERRORS)
@pytest.mark.parametrize("breaks", [False, True], ids=["ends", "breaks off"])
async def test_an_error_in_mid_stream_passes_once_and_counts_as_a_failure(
    gateway: Served, upstream: Upstream, case: str, breaks: bool
) -> None:
    path, events, books = ERRORS[case]
    upstream.sends(STREAM_HEAD + b"".join(map(chunk, events)) + (b"" if breaks else LAST_CHUNK), resets=breaks)
    service, model = (CLAUDE, b"claude") if path == MESSAGES else (GPT, b"gpt")
    body = STREAM[:-1].replace(b"gpt", model) + b',"stream_options":{"include_usage":true}}'
    answer = await ask_one(gateway, a_request(body, path=path))
    assert answer.body.count(b"error") >= 1
    assert answer.body == b"".join(events)
    assert await settled(gateway, service) == books


BREAKS: dict[str, tuple[str, str, list[bytes], Books]] = {
    "chat": (CHAT, GPT, WORDS, FAILED),
    "chat after its usage": (CHAT, GPT, [*WORDS, USAGE], Books(1, 1, *USED)),
    "completions": (COMPLETIONS, GPT, WORDS, FAILED),
    "responses": (RESPONSES, GPT, RESPONSE_EVENTS[:2], FAILED),
    "messages": (MESSAGES, CLAUDE, anthropic_events()[:4], Books(1, 1, 11, 1)),
}


@pytest.mark.parametrize("case", BREAKS)
@pytest.mark.parametrize("resets", [False, True], ids=["closes", "resets"])
async def test_a_stream_that_breaks_ends_with_its_dialect_s_error(
    gateway: Served, upstream: Upstream, case: str, resets: bool
) -> None:
    path, service, events, books = BREAKS[case]
    gate = asyncio.Event()

    async def behave(actor: Upstream, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(STREAM_HEAD + b"".join(map(chunk, events)))
        await writer.drain()
        await gate.wait()
        if resets:
            writer.transport.abort()
        raise ConnectionResetError

    assert isinstance(upstream, Scripted)
    upstream.does(behave)
    body = STREAM.replace(b"gpt", b"claude" if service == CLAUDE else b"gpt")
    held = b""
    async with connected(gateway) as (reader, writer):
        writer.write(a_request(body, path=path))
        while events[-1 if path != CHAT else 2].rstrip() not in held:
            held += await reader.read(2**16)
        gate.set()
        held += await reader.read()
    (answer,) = _answers(held)
    last = answer.body.rstrip(b"\n").rpartition(b"\n\n")[2]
    name, _, data = last.rpartition(b"data: ")
    error = json.loads(data)
    assert name == (b"" if path in (CHAT, COMPLETIONS) else b"event: error\n")
    assert error["message" if path == RESPONSES else "error"]
    assert answer.body.startswith(b"".join(events[:3]))
    assert await settled(gateway, service) == books


async def test_a_stream_that_turns_to_noise_ends_at_once(gateway: Served, upstream: Scripted) -> None:
    """Not only when it was silent for `idle_s`: the connection is closed by then."""
    gate = asyncio.Event()

    async def behave(actor: Upstream, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(STREAM_HEAD + chunk(WORDS[0]))
        await writer.drain()
        await gate.wait()
        writer.write(b"no size\r\n")
        await writer.drain()
        raise ConnectionResetError

    upstream.does(behave)
    async with connected(gateway) as (reader, writer), asyncio.timeout(3):
        writer.write(a_request(STREAM))
        await reader.readuntil(WORDS[0])
        gate.set()
        assert b'"error"' in await reader.read()
    assert await settled(gateway) == FAILED


# -- clients that leave, and clients that wait -------------------------------------------------------------------------

LEAVING: dict[str, bytes] = {
    "at once": b"",
    "in the request line": PLAIN_REQUEST[:9],
    "in the headers": PLAIN_REQUEST[:60],
    "before the body": PLAIN_REQUEST[: -len(PLAIN)],
    "in the body": PLAIN_REQUEST[:-3],
    "in a chunk": chunked_request(PLAIN)[:-12],
    "before it is told to go on": a_request(headers=(("Expect", "100-continue"),))[: -len(PLAIN)],
}


@pytest.mark.parametrize("case", LEAVING)
@pytest.mark.parametrize("resets", [False, True])
async def test_a_client_that_leaves_before_its_request_is_whole_costs_nothing(
    gateway: Served, upstream: Upstream, case: str, resets: bool
) -> None:
    async with connected(gateway) as (_, writer):
        writer.write(LEAVING[case])
        await writer.drain()
        if resets:
            writer.transport.abort()
    (answer,) = await ask(gateway, a_request(b"{}"))
    assert answer.status == 400
    assert upstream.received == []
    assert await settled(gateway) == NOTHING


STAGES: dict[str, tuple[bytes, bytes, Books]] = {
    "before the headers": (b"", b"", UNREPORTED),
    "before the first byte": (STREAM_HEAD, b"", UNREPORTED),
    "after the first word": (STREAM_HEAD + chunk(WORDS[0]), WORDS[0], UNREPORTED),
    "after the usage": (STREAM_HEAD + chunk(WORDS[0]) + chunk(USAGE), WORDS[0], SERVED),
    "after [DONE]": (STREAM_HEAD + b"".join(map(chunk, EVENTS)), DONE, SERVED),
    "in a JSON answer": (an_answer()[:-20], b'"hi"', UNREPORTED),
}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("resets", [False, True], ids=["closes", "resets"])
async def test_a_client_that_leaves_ends_its_attempt_and_what_was_reported_counts(
    gateway: Served, upstream: Upstream, stage: str, resets: bool
) -> None:
    sent, awaited, books = STAGES[stage]
    upstream.sends(sent, stalls=True)
    async with connected(gateway) as (reader, writer):
        writer.write(a_request(STREAM))
        held = b""
        while awaited not in held:
            held += await reader.read(2**16)
        await asyncio.wait_for(upstream.stalled.wait(), 10)
        await turns(gateway)
        if resets:
            writer.transport.abort()
    await asyncio.wait_for(upstream.hung_up.wait(), 10)
    assert await settled(gateway) == books


def resident_bytes() -> int:
    """The memory of this process that is in use."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


PIECE = b"x" * 2**16
PIECES = 1024


def a_flood(actor: list[int]) -> Behaviour:
    """64 MB of events, as fast as they are taken; `actor[0]` counts the pieces."""

    async def behave(_: Upstream, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(STREAM_HEAD)
        for _piece in range(PIECES):
            writer.write(chunk(b"data: " + PIECE + b"\n\n"))
            await writer.drain()
            actor[0] += 1
        writer.write(chunk(USAGE + DONE) + LAST_CHUNK)

    return behave


async def until_it_stands(count: list[int]) -> int:
    """The count, once it has not moved for a while."""
    last, still = -1, 0
    async with asyncio.timeout(20):
        while still < 10:
            await asyncio.sleep(0.03)
            still = still + 1 if count[0] == last else 0
            last = count[0]
    return last


async def test_a_client_that_does_not_read_holds_the_upstream_back(gateway: Served, upstream: Scripted) -> None:
    sent = [0]
    upstream.does(a_flood(sent))
    async with connected(gateway) as (reader, writer):
        writer.write(a_request(STREAM))
        await reader.read(100)
        before = resident_bytes()
        assert await until_it_stands(sent) < PIECES
        assert resident_bytes() - before < 16 * 2**20
        received = 0
        last = b""
        while data := await reader.read(2**18):
            received += len(data)
            last = (last + data)[-100:]
    assert sent[0] == PIECES
    assert received > PIECES * len(PIECE)
    assert DONE in last
    assert await settled(gateway) == SERVED


async def test_a_client_that_does_not_read_is_given_up_after_the_provider_s_timeout(
    serve: Serve, upstream: Scripted
) -> None:
    """`timeout` is for the whole request: an attempt that outlives it is taken for lost, and its slot given away."""
    gateway = await serve(a_document(upstream.url, timeout=0.5))
    upstream.does(a_flood([0]))
    async with connected(gateway) as (reader, writer):
        writer.write(a_request(STREAM))
        await reader.read(100)
        async with asyncio.timeout(3):
            assert (await settled(gateway)).requests == 1


# -- little that becomes much ------------------------------------------------------------------------------------------

BOMB_MEGABYTES = 40
MOST_BYTES = 16 * 2**20


def a_bomb(head: bytes, tail: bytes) -> bytes:
    """40 MB between head and tail, as 40 kB of gzip."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    parts = [
        packer.compress(head),
        *(packer.compress(b"a" * 2**20) for _ in range(BOMB_MEGABYTES)),
        packer.compress(tail),
    ]
    return b"".join([*parts, packer.flush()])


async def peak_of(work: Callable[[], Awaitable[Any]]) -> int:
    """The most memory that Python held at once during the work, beyond what it held before."""
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        await work()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", ["json", "renamed", "error", "stream"])
async def test_a_little_gzip_does_not_become_much_memory(serve: Serve, upstream: Upstream, kind: str) -> None:
    raw = a_document(upstream.url)
    raw["rules"][0]["response_model"] = "house-model" if kind == "renamed" else ""
    gateway = await serve(raw)
    if kind == "stream":
        bomb = a_bomb(b'data: {"x":"', b'"}\n\n' + USAGE + DONE)
        head = STREAM_HEAD[:-2] + b"Content-Encoding: gzip\r\n\r\n"
        upstream.sends(head + chunk(bomb) + LAST_CHUNK)
    else:
        bomb = a_bomb(b'{"model":"up-model","x":"', b'","usage":{"prompt_tokens":11,"completion_tokens":7}}')
        upstream.answers(400 if kind == "error" else 200, bomb, headers=(("Content-Encoding", "gzip"),))
    body = STREAM[:-1] + b',"stream_options":{"include_usage":true}}' if kind == "stream" else PLAIN

    async def work() -> None:
        async with connected(gateway) as (reader, writer):
            writer.write(a_request(body))
            with contextlib.suppress(ConnectionError):
                while await reader.read(2**16):
                    pass

    assert await peak_of(work) < MOST_BYTES
    assert (await settled(gateway)).requests == 1
