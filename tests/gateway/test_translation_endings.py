"""How translated answers end: errors in the client's own shape, streams that break, clients that leave."""

from __future__ import annotations

import asyncio
import gzip
from typing import Any

import pytest

from balancer.domain import Outcome
from tests.actors import OPENAI_JSON, STREAM_HEAD, Upstream, anthropic_events, chunk, openai_events
from tests.gateway.conftest import KEY, Serve, decoded
from tests.gateway.pairs import counted, settled
from tests.gateway.test_translation import ASKS, ask, is_closed, text_of, text_of_events
from tests.gateway.translations import CHAT, MESSAGE, MESSAGES, RESPONSES, a_mixed_document, told, until

ANT, OAI, GOO = ({"m": {"services": [name], "retry": {"attempts": 1}}} for name in ("ant0", "oai0", "goo0"))


def a_fault(kind: str, message: str = "no luck") -> bytes:
    """An error's body in all three dialects."""
    return b'{"type":"error","error":{"type":"%b","status":"%b","message":"%b"}}' % (
        kind.encode(),
        kind.encode(),
        message.encode(),
    )


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "rules", "status", "kind", "told_status", "told_type"),
    [
        (CHAT, ANT, 529, "overloaded_error", 503, "server_error"),
        (CHAT, ANT, 429, "rate_limit_error", 429, "rate_limit_error"),
        (CHAT, ANT, 401, "authentication_error", 401, "authentication_error"),
        (CHAT, ANT, 403, "permission_error", 403, "permission_error"),
        (CHAT, ANT, 400, "invalid_request_error", 400, "invalid_request_error"),
        (CHAT, ANT, 404, "not_found_error", 404, "invalid_request_error"),
        (CHAT, ANT, 500, "api_error", 500, "server_error"),
        (CHAT, GOO, 400, "API_KEY_INVALID", 401, "authentication_error"),
        (CHAT, GOO, 503, "UNAVAILABLE", 503, "server_error"),
        (MESSAGES, OAI, 503, "server_error", 529, "overloaded_error"),
        (MESSAGES, OAI, 429, "insufficient_quota", 429, "rate_limit_error"),
        (MESSAGES, OAI, 401, "invalid_api_key", 401, "authentication_error"),
        (MESSAGES, OAI, 400, "invalid_request_error", 400, "invalid_request_error"),
        (MESSAGES, OAI, 502, "server_error", 502, "api_error"),
        (MESSAGES, GOO, 429, "RESOURCE_EXHAUSTED", 429, "rate_limit_error"),
    ],
)
async def test_an_error_has_the_status_and_shape_that_the_client_knows(
    serve: Serve,
    upstream: Upstream,
    path: str,
    rules: Any,
    status: int,
    kind: str,
    told_status: int,
    told_type: str,
) -> None:
    gateway = await serve(a_mixed_document(upstream, rules=rules))
    upstream.answers(status, a_fault(kind))
    answered, headers, body = await ask(gateway, path)
    error = decoded(body)["error"]
    assert (answered, error["type"], error["message"]) == (told_status, told_type, "no luck")
    assert headers["content-type"] == "application/json"
    assert headers["x-balancer-attempts"] == "1"
    if path == MESSAGES:
        assert decoded(body)["type"] == "error"


async def test_an_error_says_when_to_ask_again_and_shows_no_credential(serve: Serve, upstream: Upstream) -> None:
    gateway = await serve(a_mixed_document(upstream, rules=ANT))
    headers = (("anthropic-ratelimit-requests-reset", "2026-01-01T00:00:00Z"), ("retry-after", "7"))
    upstream.answers(429, a_fault("rate_limit_error", f"key {KEY} is spent"), headers=headers)
    _, headers, body = await ask(gateway, CHAT)
    assert (headers["retry-after"], decoded(body)["error"]["message"]) == ("7", "key *** is spent")
    assert "anthropic-ratelimit-requests-reset" not in headers


async def test_a_wait_that_a_vendor_tells_in_headers_of_its_own_is_told_in_the_one_that_clients_read(
    serve: Serve, upstream: Upstream
) -> None:
    gateway = await serve(a_mixed_document(upstream, rules=OAI))
    limits = (("x-ratelimit-remaining-requests", "0"), ("x-ratelimit-reset-requests", "8s"))
    upstream.answers(429, a_fault("rate_limit_exceeded"), headers=limits)
    _, headers, _ = await ask(gateway, MESSAGES)
    assert (headers["retry-after"], "x-ratelimit-remaining-requests" in headers) == ("8", False)
    upstream.answers(400, a_fault("invalid_request_error"), headers=(("x-ratelimit-remaining-requests", "9"),))
    assert "retry-after" not in (await ask(gateway, MESSAGES))[1]


async def test_google_s_wait_is_told_in_the_header_that_clients_read(serve: Serve, upstream: Upstream) -> None:
    gateway = await serve(a_mixed_document(upstream, rules=GOO))
    detail = b'{"@type":"type.googleapis.com/google.rpc.RetryInfo","retryDelay":"12s"}'
    upstream.answers(
        429, b'{"error":{"code":429,"status":"RESOURCE_EXHAUSTED","message":"no","details":[%b]}}' % detail
    )
    assert (await ask(gateway, CHAT))[1]["retry-after"] == "12"


@pytest.mark.parametrize("body", [b"<html>bad gateway</html>", b"", b'{"error":'])
async def test_an_error_without_words_is_told_by_its_status(serve: Serve, upstream: Upstream, body: bytes) -> None:
    gateway = await serve(a_mixed_document(upstream, rules=ANT))
    upstream.answers(502, body)
    status, _, told_body = await ask(gateway, CHAT)
    assert (status, decoded(told_body)["error"]["message"]) == (502, "the upstream answered with status 502")


async def test_a_prompt_that_is_too_long_is_told_in_the_words_that_clients_look_for(
    serve: Serve, upstream: Upstream
) -> None:
    gateway = await serve(a_mixed_document(upstream, rules=OAI))
    upstream.answers(400, b'{"error":{"code":"context_length_exceeded","message":"12 tokens"}}')
    status, _, body = await ask(gateway, MESSAGES)
    assert (status, decoded(body)["error"]["message"]) == (400, "prompt is too long: 12 tokens")


@pytest.mark.parametrize("stream", [False, True])
async def test_a_stream_that_begins_with_its_error_is_answered_with_a_status(
    serve: Serve, upstream: Upstream, stream: bool
) -> None:
    gateway = await serve(a_mixed_document(upstream, rules=ANT))
    upstream.streams([b": hm\n\n", b"event: error\ndata: %b\n\n" % a_fault("overloaded_error")])
    status, _, body = await ask(gateway, CHAT, stream=stream)
    assert (status, decoded(body)["error"]["message"]) == (503, "no luck")
    assert await settled(gateway) == {("ant0:up-model", Outcome.OVERLOADED): 1}


# -- streams -----------------------------------------------------------------------------------------------------------

WHOLE = {CHAT: anthropic_events(), MESSAGES: openai_events(), RESPONSES: anthropic_events()}
RULES = {CHAT: ANT, MESSAGES: OAI, RESPONSES: ANT}
SERVICE = {CHAT: "ant0:up-model", MESSAGES: "oai0:up-model", RESPONSES: "ant0:up-model"}
PATHS = tuple(WHOLE)


def error_of(path: str, events: list[tuple[str, Any]]) -> Any:
    """The error with which a stream ends."""
    name, data = events[-1]
    match path:
        case "/v1/chat/completions":
            return data["error"]
        case "/v1/messages":
            assert name == "error"
            return data["error"]
        case _:
            assert name == "error"
            return data


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("resets", [False, True])
async def test_a_stream_that_is_cut_ends_in_an_error_and_does_not_look_whole(
    serve: Serve, upstream: Upstream, path: str, resets: bool
) -> None:
    gateway = await serve(a_mixed_document(upstream, rules=RULES[path]))
    begun = [chunk(event) for event in WHOLE[path][:4]]
    if resets:
        upstream.sends(STREAM_HEAD, *begun)
    else:
        upstream.sends(STREAM_HEAD, *begun[:3], b"0\r\n\r\n")
    status, _, body = await ask(gateway, path, stream=True)
    events = told(body)
    assert (status, is_closed(path, events)) == (200, False)
    assert error_of(path, events)["message"]
    assert b"w0" in body
    assert await settled(gateway) == {(SERVICE[path], Outcome.FAILED): 1}


@pytest.mark.parametrize("path", PATHS)
async def test_an_error_in_a_stream_is_told_masked_and_judged(serve: Serve, upstream: Upstream, path: str) -> None:
    gateway = await serve(a_mixed_document(upstream, rules=RULES[path]))
    fault = a_fault("rate_limit_error", f"slow down {KEY}")
    name = b"event: error\n" if path != MESSAGES else b""
    upstream.streams([*WHOLE[path][:4], name + b"data: %b\n\n" % fault])
    _, _, body = await ask(gateway, path, stream=True)
    events = told(body)
    assert error_of(path, events)["message"] == "slow down ***"
    assert not is_closed(path, events)
    assert await settled(gateway) == {(SERVICE[path], Outcome.RATE_LIMITED): 1}
    assert (await gateway.service(SERVICE[path])).cooldown > 0


@pytest.mark.parametrize("path", PATHS)
async def test_signs_of_life_reach_the_client(serve: Serve, upstream: Upstream, path: str) -> None:
    gateway = await serve(a_mixed_document(upstream, rules=RULES[path]))
    whole = WHOLE[path]
    gate = asyncio.Event()
    upstream.streams([b": one\n\n", *whole[:3], b": two\n\n", *whole[3:]], gates={5: gate})
    body = {"model": "m", "stream": True} | ASKS[path]
    async with gateway.session.post(f"{gateway.url}/openai{path}", json=body) as answer:
        seen = await until(answer, lambda seen: seen.count(b"ping") >= 2)
        gate.set()
        seen += await answer.content.read()
    assert text_of_events(path, told(seen)) == "w0w1w2"


@pytest.mark.parametrize("path", PATHS)
async def test_a_client_that_leaves_is_settled_with_what_was_used_until_then(
    serve: Serve, upstream: Upstream, path: str
) -> None:
    gateway = await serve(a_mixed_document(upstream, rules=RULES[path]))
    upstream.streams(WHOLE[path], gates={4: asyncio.Event()})
    body = {"model": "m", "stream": True} | ASKS[path]
    async with gateway.session.post(f"{gateway.url}/openai{path}", json=body) as answer:
        await until(answer, lambda seen: b"w0" in seen)
    await asyncio.wait_for(upstream.hung_up.wait(), 5)
    assert await settled(gateway) == {(SERVICE[path], Outcome.CANCELLED): 1}
    if path != MESSAGES:
        assert (await gateway.service(SERVICE[path])).input == 11


async def test_the_attempt_is_settled_before_the_last_byte_is_sent(serve: Serve, upstream: Upstream) -> None:
    rules = {"m": {"services": ["ant0"], "strict_settle": True}}
    gateway = await serve(a_mixed_document(upstream, rules=rules))
    for events in (anthropic_events(), None):
        if events:
            upstream.streams(events)
        else:
            upstream.answers(body=MESSAGE)
        await ask(gateway, CHAT, stream=events is not None)
        (view,) = await gateway.gateway.balance.views()
        assert view.services["ant0:up-model"].in_flight == 0


async def test_a_connection_is_used_again_behind_a_translated_stream(serve: Serve, upstream: Upstream) -> None:
    """Its last event comes before the end of the connection's answer: who closes it then has to connect anew."""
    gateway = await serve(a_mixed_document(upstream, rules=ANT))
    whole = anthropic_events()
    for _ in range(3):
        gate = asyncio.Event()
        upstream.streams([*whole, b": bye\n\n"], gates={len(whole): gate})
        body = {"model": "m", "stream": True} | ASKS[CHAT]
        async with gateway.session.post(f"{gateway.url}/openai{CHAT}", json=body) as answer:
            await until(answer, lambda seen: b"[DONE]" in seen)
            gate.set()
            assert await answer.content.read() == b""
    assert upstream.connections == 1


async def test_a_stream_may_be_cut_anywhere_on_its_way(serve: Serve, upstream: Upstream) -> None:
    gateway = await serve(a_mixed_document(upstream, rules=ANT))
    whole = b"".join(anthropic_events())
    upstream.sends(STREAM_HEAD, *(chunk(whole[at : at + 7]) for at in range(0, len(whole), 7)), b"0\r\n\r\n")
    _, _, body = await ask(gateway, CHAT, stream=True)
    assert (text_of_events(CHAT, told(body)), is_closed(CHAT, told(body))) == ("w0w1w2", True)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_coding_that_was_not_asked_for_is_read_all_the_same(
    serve: Serve, upstream: Upstream, stream: bool
) -> None:
    gateway = await serve(a_mixed_document(upstream, rules=ANT))
    if stream:
        packed = gzip.compress(b"".join(anthropic_events()))
        upstream.streams([packed[:50], packed[50:]], headers=(("Content-Encoding", "gzip"),))
    else:
        upstream.answers(body=gzip.compress(MESSAGE), headers=(("Content-Encoding", "gzip"),))
    _, headers, body = await ask(gateway, CHAT, stream=stream)
    assert "content-encoding" not in headers
    assert (text_of_events(CHAT, told(body)) if stream else text_of(CHAT, decoded(body))) == (
        "w0w1w2" if stream else "hi"
    )


# -- what was not asked for --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
async def test_json_where_a_stream_was_asked_for_is_streamed(serve: Serve, upstream: Upstream, path: str) -> None:
    gateway = await serve(a_mixed_document(upstream, rules=RULES[path]))
    upstream.answers(body=OPENAI_JSON if path == MESSAGES else MESSAGE)
    _, headers, body = await ask(gateway, path, stream=True)
    events = told(body)
    assert headers["content-type"].startswith("text/event-stream")
    assert (text_of_events(path, events), is_closed(path, events)) == ("hi", True)


@pytest.mark.parametrize("path", PATHS)
async def test_a_stream_that_was_not_asked_for_is_gathered(serve: Serve, upstream: Upstream, path: str) -> None:
    gateway = await serve(a_mixed_document(upstream, rules=RULES[path]))
    upstream.streams(WHOLE[path])
    status, headers, body = await ask(gateway, path)
    assert (status, headers["content-type"]) == (200, "application/json")
    assert text_of(path, decoded(body)) == "w0w1w2"
    assert (await gateway.service(SERVICE[path])).output == 7


async def test_a_stream_that_is_cut_before_it_was_gathered_is_another_service_s_chance(
    serve: Serve, upstream: Upstream, other_upstream: Upstream
) -> None:
    raw = a_mixed_document(upstream, other_upstream, rules={"m": {"services": ["ant0", "ant1"]}})
    gateway = await serve(raw)
    upstream.sends(STREAM_HEAD, *(chunk(event) for event in anthropic_events()[:4]))
    other_upstream.answers(body=MESSAGE)
    status, headers, _ = await ask(gateway, CHAT)
    assert (status, headers["x-balancer-service"]) == (200, "ant1:up-model")
    assert counted(gateway.gateway.metrics.translations) == {("default", "m", "chat", "messages"): 2}
