"""What we sent an upstream does not come down again, however it is spelt and cut."""

from __future__ import annotations

import gzip
import json
import zlib
from typing import Any
from urllib.parse import quote

import aiohttp
import pytest

from balancer.encoding import Decoder
from balancer.gateway.accounting import Uncounted
from balancer.gateway.events import EventRelay
from balancer.gateway.masking import Mask
from balancer.gateway.messages import Take
from balancer.gateway.rewriting import Rewriter
from tests.actors import OPENAI_JSON, Upstream, chunk, openai_events
from tests.gateway.conftest import KEY, Serve, Served, a_document

STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n"
LAST_CHUNK = b"0\r\n\r\n"
WORD = openai_events()[0]
ERROR = b'data: {"error":{"message":"Bearer %b is no good"}}\n\n' % KEY.encode()
ASKED: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}


@pytest.mark.parametrize("value", ["sk-0123456789", 'a/b+c"d\\e/f', "größe-größe"])
def test_a_value_is_masked_in_every_spelling(value: str) -> None:
    mask = Mask([value, "short"])
    spellings = [value, json.dumps(value, ensure_ascii=False)[1:-1], quote(value, safe=""), value.replace("/", "\\/")]
    if '"' in value:
        spellings.pop()

    for spelling in spellings:
        assert mask.over(f"<{spelling}>".encode()) == b"<***>"
        assert mask.over_headers((("x", f"<{spelling}>"),)) == (("x", "<***>"),)
    assert mask.over(b"short") == b"short"


class Parts:
    """An upstream's answer that comes in just these parts, and the client that gets what passes."""

    status, length = 200, None
    headers: tuple[tuple[str, str], ...] = ()
    is_started, is_at_end = True, False

    def __init__(self, data: bytes, step: int) -> None:
        self.parts = [data[at : at + step] for at in range(0, len(data), step)]
        self.seen: list[bytes] = []

    def whole(self) -> bytes | None:
        return None

    async def read(self) -> bytes:
        return self.parts.pop(0) if self.parts else b""

    async def pump(self, take: Take) -> bytes:
        while (chunk := await self.read()) and take(chunk):
            pass
        return chunk

    async def close(self) -> None: ...

    def give_until(self, time: float) -> None: ...

    async def send(self, status: int, headers: tuple[tuple[str, str], ...], body: bytes) -> None:
        await self.start(status, headers, len(body))
        await self.write(body)
        await self.end()

    async def start(self, status: int, headers: tuple[tuple[str, str], ...], length: int | None) -> None: ...

    async def write(self, chunk: bytes) -> None:
        self.seen.append(chunk)

    def write_now(self, chunk: bytes, framed: bytes = b"", /) -> bool:
        self.seen.append(chunk)
        return True

    async def end(self, last: bytes = b"", /) -> None:
        if last:
            self.seen.append(last)

    def abort(self) -> None: ...


@pytest.mark.parametrize("step", [1, 2, 3, 5, 8, 13, 21, 34, 55, 500])
async def test_an_error_event_is_masked_however_it_is_cut(step: int) -> None:
    data = WORD + ERROR + WORD
    parts = Parts(data, step)
    relay = EventRelay(
        attempt=Uncounted(),
        stream=parts,
        decoder=Decoder(""),
        rewriter=Rewriter("", hides_usage=False),
        mask=Mask([KEY]),
        error_event=lambda _: b"",
    )
    await relay.run(parts, await parts.read())
    assert b"".join(parts.seen) == data.replace(KEY.encode(), b"***")
    # What comes before any error passes at once.
    assert parts.seen[0] == data[:step].replace(KEY.encode(), b"***")


async def test_an_error_event_is_masked_and_counted(gateway: Served, upstream: Upstream) -> None:
    upstream.streams([WORD, ERROR])
    async with gateway.chat(**ASKED) as response:
        assert await response.read() == WORD + ERROR.replace(KEY.encode(), b"***")
    assert (await gateway.service("up:up-model")).failures == 1


async def test_a_word_that_stands_in_no_error_passes(gateway: Served, upstream: Upstream) -> None:
    """A model may write what looks like a key of ours; an `error` that is null is none."""
    data = b'data: {"error":null,"delta":"%b"}\n\n' % KEY.encode() + b"".join(openai_events())
    upstream.sends(STREAM_HEAD + b"\r\n", chunk(data[:30]), chunk(data[30:]), LAST_CHUNK)
    async with gateway.chat(**ASKED) as response:
        assert await response.read() == data
    state = await gateway.service("up:up-model")
    assert (state.failures, state.input, state.output) == (0, 11, 7)


async def test_a_coded_stream_breaks_before_an_error_that_shows_a_credential(
    gateway: Served, upstream: Upstream
) -> None:
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    good = packer.compress(WORD) + packer.flush(zlib.Z_SYNC_FLUSH)
    bad = packer.compress(ERROR) + packer.flush()
    upstream.sends(STREAM_HEAD + b"Content-Encoding: gzip\r\n\r\n", chunk(good), chunk(bad), LAST_CHUNK)
    # The lane sends a head with the first bytes behind it: where nothing may pass of the first read, there is neither.
    with pytest.raises((aiohttp.ClientPayloadError, aiohttp.ServerDisconnectedError)):
        async with gateway.chat(**ASKED) as response:
            await response.read()
    assert (await gateway.service("up:up-model")).failures == 1


async def test_a_credential_in_the_query_is_masked_in_errors_and_a_title_is_not(
    serve: Serve, upstream: Upstream
) -> None:
    raw = a_document(upstream.url, query={"key": "q/0123456789"}, headers={"X-Title": "something"})
    gateway = await serve(raw)
    upstream.answers(403, b'{"error":{"message":"something about ?key=q%2F0123456789"}}')
    async with gateway.chat() as response:
        assert await response.read() == b'{"error":{"message":"something about ?key=***"}}'


@pytest.mark.parametrize("coding", ["", "gzip"])
async def test_an_error_too_long_to_be_cleared_is_told_in_our_words(
    gateway: Served, upstream: Upstream, coding: str
) -> None:
    """It was once cut at 1 MiB, which left no JSON."""
    body = b'{"error":"%b"}' % (b"x" * 2**20)
    headers = (("Content-Encoding", coding),) if coding else ()
    upstream.answers(429, gzip.compress(body) if coding else body, headers=headers)
    async with gateway.chat() as response:
        assert response.status == 429
        assert json.loads(await response.read())["error"]["code"] == "upstream_bad_answer"


async def test_no_answer_says_which_versions_run_here_or_points_elsewhere(gateway: Served, upstream: Upstream) -> None:
    upstream.answers(201, headers=(("Location", "http://elsewhere.invalid"),))
    async with gateway.chat() as response:
        assert (response.status, await response.read()) == (201, OPENAI_JSON)
        assert "Location" not in response.headers
        assert "Server" not in response.headers
    for path in ("/healthz", "/readyz", "/metrics", "/nowhere"):
        async with gateway.session.get(gateway.url + path) as response:
            assert "Server" not in response.headers


async def test_an_escaped_key_does_not_show_the_upstream_s_model(serve: Serve, upstream: Upstream) -> None:
    raw = a_document(upstream.url)
    raw["rules"][0]["response_model"] = "house"
    gateway = await serve(raw)
    upstream.answers(body=b'{"mod\\u0065l":"up-model"}')
    async with gateway.chat() as response:
        assert await response.read() == b'{"mod\\u0065l":"house"}'
