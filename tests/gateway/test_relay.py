"""Bytes both ways: unchanged, at once, and counted."""

from __future__ import annotations

import asyncio
import gzip
import io
import json
import zlib
from typing import Any

import aiohttp
import pytest
import zstandard

from tests.actors import OPENAI_JSON, Proxy, Upstream, anthropic_events, chunk, openai_events
from tests.gateway.conftest import KEY, Serve, Served, a_document, decoded


async def test_an_answer_passes_unchanged_and_its_usage_is_counted(gateway: Served, upstream: Upstream) -> None:
    async with gateway.chat() as response:
        assert response.status == 200
        assert await response.read() == OPENAI_JSON
        assert response.headers["x-balancer-service"] == "up:up-model"
        assert response.headers["x-balancer-decision"].startswith("default.1.")
    state = await gateway.service("up:up-model")
    assert (state.requests, state.input, state.output, state.failures) == (1, 11, 7, 0)


async def test_only_the_model_changes_in_a_request(gateway: Served, upstream: Upstream) -> None:
    body = (
        b'{ "zeta":[1,{"model":"inner"}],\n "model" : "gpt", "tools":[{"x":"\\u00e9 \\"model\\""}],"n":1e2, "n2":1.50}'
    )
    url = f"{gateway.url}/v1/chat/completions"
    async with gateway.session.post(url, data=body, headers={"Content-Type": "application/json"}) as response:
        assert response.status == 200
    assert upstream.last.body == body.replace(b'"gpt"', b'"up-model"')


async def test_a_prompt_of_ten_megabytes_passes(gateway: Served, upstream: Upstream) -> None:
    image = "data:image/png;base64," + "iVBORw0KGgo" * 900_000
    content = [{"type": "text", "text": "what is this"}, {"type": "image_url", "image_url": {"url": image}}]
    body = json.dumps({"model": "gpt", "messages": [{"role": "user", "content": content}]}).encode()
    url, headers = f"{gateway.url}/v1/chat/completions", {"Content-Type": "application/json"}
    async with gateway.session.post(url, data=io.BytesIO(body), headers=headers) as response:
        assert response.status == 200
    sent = json.loads(upstream.last.body)
    assert sent["model"] == "up-model"
    assert sent["messages"][0]["content"] == content


@pytest.mark.parametrize(
    ("encoding", "encode"), [("gzip", gzip.compress), ("deflate", zlib.compress), ("zstd", zstandard.compress)]
)
async def test_a_compressed_answer_passes_as_it_is_and_its_usage_is_read(
    gateway: Served, upstream: Upstream, encoding: str, encode: Any
) -> None:
    body = encode(OPENAI_JSON)
    upstream.answers(body=body, headers=(("Content-Encoding", encoding),))
    async with gateway.chat() as response:
        assert response.headers["Content-Encoding"] == encoding
        assert await response.read() == body
    assert (await gateway.service("up:up-model")).input == 11


async def test_the_first_byte_comes_before_the_upstream_sends_the_second_event(
    gateway: Served, upstream: Upstream
) -> None:
    gate = asyncio.Event()
    events = openai_events()
    upstream.streams(events, gates={1: gate})
    async with gateway.chat(stream=True, stream_options={"include_usage": True}) as response:
        assert await response.content.readany() == events[0]
        gate.set()
        assert await response.read() == b"".join(events[1:])


async def test_half_an_event_passes_at_once_when_nothing_is_hidden(gateway: Served, upstream: Upstream) -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    first = anthropic_events()[0]
    upstream.sends(head + chunk(first + b"event: ping\nda"), stalls=True)
    body = {"model": "claude", "stream": True, "messages": []}
    async with gateway.session.post(f"{gateway.url}/v1/messages", json=body) as response:
        assert await response.content.readany() == first + b"event: ping\nda"


async def test_the_usage_chunk_is_asked_for_and_hidden_from_a_client_that_did_not(
    gateway: Served, upstream: Upstream
) -> None:
    events = openai_events()
    upstream.streams(events)
    async with gateway.chat(stream=True) as response:
        assert await response.read() == b"".join([*events[:3], events[4]])
    assert json.loads(upstream.last.body)["stream_options"] == {"include_usage": True}
    state = await gateway.service("up:up-model")
    assert (state.input, state.output) == (11, 7)


async def test_a_client_that_asks_for_usage_gets_every_byte(gateway: Served, upstream: Upstream) -> None:
    upstream.streams(openai_events())
    async with gateway.chat(stream=True, stream_options={"include_usage": True}) as response:
        assert await response.read() == b"".join(openai_events())


@pytest.mark.parametrize("content_type", ["application/json", "text/plain; charset=utf-8", "application/octet-stream"])
async def test_a_stream_under_another_content_type_is_a_stream(
    gateway: Served, upstream: Upstream, content_type: str
) -> None:
    """Its usage was once not counted, and the chunk with it shown to a client that had not asked."""
    events = openai_events()
    upstream.answers(body=b"".join(events), content_type=content_type)
    async with gateway.chat(stream=True) as response:
        assert await response.read() == b"".join([*events[:3], events[4]])
    state = await gateway.service("up:up-model")
    assert (state.requests, state.input, state.output) == (1, 11, 7)


async def test_an_upstream_that_refuses_stream_options_is_not_asked(serve: Serve, upstream: Upstream) -> None:
    gateway = await serve(a_document(upstream.url, stream_usage=False))
    upstream.streams(openai_events(usage=None))
    async with gateway.chat(stream=True) as response:
        assert await response.read() == b"".join(openai_events(usage=None))
    assert "stream_options" not in json.loads(upstream.last.body)


async def test_an_anthropic_stream_passes_unchanged_and_is_counted(gateway: Served, upstream: Upstream) -> None:
    events = anthropic_events()
    upstream.streams(events)
    body = {"model": "claude", "stream": True, "max_tokens": 9, "messages": []}
    async with gateway.session.post(f"{gateway.url}/v1/messages", json=body) as response:
        assert await response.read() == b"".join(events)
    assert upstream.last.header("x-api-key") == KEY
    assert upstream.last.header("anthropic-version") == "2023-06-01"
    state = await gateway.service("ant:up-model")
    assert (state.input, state.output) == (11, 7)


async def test_the_settle_is_in_redis_before_the_last_event_is_with_the_client(
    serve: Serve, upstream: Upstream
) -> None:
    raw = a_document(upstream.url)
    raw["rules"][1]["strict_settle"] = True
    gateway = await serve(raw)
    gate = asyncio.Event()
    events = anthropic_events()
    upstream.streams(events, gates={len(events) - 1: gate})
    body = {"model": "claude", "stream": True, "messages": []}
    async with gateway.session.post(f"{gateway.url}/v1/messages", json=body) as response:
        held = b""
        while b"message_delta" not in held:
            held += await response.content.readany()
        assert (await gateway.view()).services["ant:up-model"].requests == 0
        gate.set()
        assert b"message_stop" in await response.content.readany()
        assert (await gateway.view()).services["ant:up-model"].requests == 1


@pytest.mark.parametrize("encoding", [None, "gzip"])
async def test_a_rule_can_give_the_model_another_name(serve: Serve, upstream: Upstream, encoding: str | None) -> None:
    raw = a_document(upstream.url)
    raw["rules"][0]["response_model"] = "house-model"
    gateway = await serve(raw)
    body = gzip.compress(OPENAI_JSON) if encoding else OPENAI_JSON
    upstream.answers(body=body, headers=(("Content-Encoding", encoding),) if encoding else ())
    async with gateway.chat() as response:
        assert await response.read() == OPENAI_JSON.replace(b"up-model", b"house-model")
    assert upstream.last.header("accept-encoding") == "identity"
    upstream.streams(openai_events())
    async with gateway.chat(stream=True, stream_options={"include_usage": True}) as response:
        assert await response.read() == b"".join(openai_events()).replace(b"up-model", b"house-model")


async def test_connection_headers_stay_on_their_connection(gateway: Served, upstream: Upstream) -> None:
    upstream.answers(
        headers=(
            ("Connection", "x-private"),
            ("X-Private", "1"),
            ("Set-Cookie", "account=1"),
            ("openai-organization", "org-secret"),
            ("x-request-id", "up-1"),
            ("x-ratelimit-remaining-requests", "9"),
        )
    )
    headers = {
        "Authorization": "Bearer client-secret",
        "Cookie": "a=b",
        "Connection": "keep-alive, x-mine",
        "X-Mine": "1",
        "X-Forwarded-For": "10.0.0.1",
        "OpenAI-Organization": "org-client",
        "X-Stainless-Lang": "python",
        "x-request-id": "mine-1",
    }
    body = {"model": "gpt", "messages": []}
    async with gateway.session.post(f"{gateway.url}/v1/chat/completions", json=body, headers=headers) as response:
        down = response.headers
    up = {name.lower(): value for name, value in upstream.last.headers}
    assert up["authorization"] == f"Bearer {KEY}"
    assert up["x-stainless-lang"] == "python"
    assert not up.keys() & {"cookie", "x-mine", "x-forwarded-for", "openai-organization"}
    assert "client-secret" not in str(upstream.last.headers)
    assert down["x-request-id"] == "mine-1"
    assert down["x-upstream-request-id"] == "up-1"
    assert down["x-ratelimit-remaining-requests"] == "9"
    assert not {"X-Private", "Set-Cookie", "openai-organization"} & set(down)


async def test_azure_gets_its_deployment_path_version_and_key_header(serve: Serve, upstream: Upstream) -> None:
    gateway = await serve(a_document(upstream.url, provider_type="azure", query={"api-version": "2025-01-01"}))
    async with gateway.chat() as response:
        assert response.status == 200
    assert upstream.last.target == "/openai/deployments/up-model/chat/completions?api-version=2025-01-01"
    assert upstream.last.header("api-key") == KEY
    assert upstream.last.header("authorization") is None


@pytest.mark.parametrize("kind", ["http", "socks5"])
async def test_every_path_goes_through_the_provider_s_proxy(serve: Serve, upstream: Upstream, kind: str) -> None:
    async with Proxy(kind).running() as proxy:
        gateway = await serve(a_document(upstream.url, proxy_url=proxy.url))
        async with gateway.chat() as response:
            assert response.status == 200
        body = {"model": "claude", "messages": []}
        async with gateway.session.post(f"{gateway.url}/v1/messages/count_tokens", json=body) as response:
            assert response.status == 200
        assert len(upstream.received) == 2
        assert upstream.connections == len(proxy.asked)
        assert all(upstream.url.removeprefix("http://") in asked for asked in proxy.asked)


async def test_other_bodies_with_a_model_are_relayed(gateway: Served, upstream: Upstream) -> None:
    sound = bytes(range(256)) * 100
    upstream.answers(body=sound, content_type="audio/mpeg")
    url = f"{gateway.url}/v1/audio/speech"
    async with gateway.session.post(url, json={"model": "gpt", "input": "hi", "voice": "x"}) as response:
        assert await response.read() == sound
    assert upstream.last.target == "/v1/audio/speech"


async def test_a_form_is_relayed_with_its_model_replaced(gateway: Served, upstream: Upstream) -> None:
    form = aiohttp.FormData({"model": "gpt", "language": "en"})
    form.add_field("file", b"RIFF" + bytes(range(256)), filename="a.wav", content_type="audio/wav")
    upstream.answers(body=b'{"text":"hello"}')
    async with gateway.session.post(f"{gateway.url}/v1/audio/transcriptions", data=form) as response:
        assert await response.read() == b'{"text":"hello"}'
    assert b"\r\nup-model\r\n" in upstream.last.body
    assert b"RIFF" + bytes(range(256)) in upstream.last.body


async def test_count_tokens_picks_nothing_and_counts_nothing(gateway: Served, upstream: Upstream) -> None:
    upstream.answers(body=b'{"input_tokens":5}')
    body = {"model": "claude", "messages": []}
    async with gateway.session.post(f"{gateway.url}/v1/messages/count_tokens", json=body) as response:
        assert await response.read() == b'{"input_tokens":5}'
    assert (await gateway.view()).rules["claude"].seq == 0


@pytest.mark.parametrize("prefix", ["", "/openai", "/tingly/openai"])
async def test_paths_exist_under_every_prefix(gateway: Served, upstream: Upstream, prefix: str) -> None:
    body = {"model": "gpt", "messages": []}
    async with gateway.session.post(f"{gateway.url}{prefix}/v1/chat/completions", json=body) as response:
        assert response.status == 200
    assert upstream.last.target == "/v1/chat/completions"


async def test_models_are_listed_in_the_caller_s_dialect(gateway: Served) -> None:
    async with gateway.session.get(f"{gateway.url}/v1/models") as response:
        assert [model["id"] for model in decoded(await response.read())["data"]] == ["gpt"]
    headers = {"anthropic-version": "2023-06-01"}
    async with gateway.session.get(f"{gateway.url}/v1/models", headers=headers) as response:
        assert decoded(await response.read())["data"][0] == {
            "type": "model",
            "id": "claude",
            "display_name": "claude",
            "created_at": "1970-01-01T00:00:00Z",
        }
    async with gateway.session.get(f"{gateway.url}/v1/models/nope") as response:
        assert response.status == 404
