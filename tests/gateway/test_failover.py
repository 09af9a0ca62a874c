"""Failures before the first byte are the next service's chance; behind it they are the client's answer."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import aiohttp
import anthropic
import openai
import pytest
import redis.asyncio

from balancer.domain import Outcome
from balancer.gateway import opening
from tests.actors import (
    OPENAI_JSON,
    STREAM_HEAD,
    Upstream,
    anthropic_events,
    chunk,
    openai_events,
    responses_events,
)
from tests.gateway.conftest import KEY, Serve, Served, decoded
from tests.gateway.pairs import a_pair, counted, requests_total, settled
from tests.store.conftest import eventually

OVERLOADED = b'event: error\ndata: {"type":"error","error":{"type":"overloaded_error","message":"x"}}\n\n'
HALF_A_429 = (
    b"HTTP/1.1 429 Oh\r\nContent-Type: application/json\r\nRetry-After: 30\r\nContent-Length: 99\r\n\r\n"
    b'{"error":{"message":"key ' + KEY.encode()
)
QUICK: dict[str, Any] = {"timeouts": {"headers_s": 0.2, "first_byte_s": 0.2, "idle_s": 0.2}}
WANTS_USAGE: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}


@pytest.fixture
async def other() -> AsyncIterator[Upstream]:
    """A second scripted upstream."""
    async with Upstream().running() as actor:
        yield actor


@pytest.fixture
async def gateway(serve: Serve, upstream: Upstream, other: Upstream) -> Served:
    """A gateway in front of two."""
    return await serve(a_pair(upstream, other, **QUICK))


# -- before the first byte ---------------------------------------------------------------------------------------------

Tell = Callable[[Upstream], None]
BEFORE: dict[str, tuple[Tell, str]] = {
    "a 429": (lambda up: up.answers(429, b"{}", retry_after="30"), "rate_limited"),
    "a 529": (lambda up: up.answers(529, b"{}"), "rate_limited"),
    "a used-up quota": (lambda up: up.answers(403, b'{"error":{"code":"insufficient_quota"}}'), "rate_limited"),
    "a 401": (lambda up: up.answers(401, b"{}"), "unauthorized"),
    "a 503": (lambda up: up.answers(503, b"busy", "text/plain"), "overloaded"),
    "a 500": (lambda up: up.answers(500, b"{}"), "failed"),
    "a 502 in HTML": (lambda up: up.answers(502, b"<html>", "text/html"), "failed"),
    "a coded 500": (
        lambda up: up.answers(500, gzip.compress(b"{}"), headers=(("Content-Encoding", "gzip"),)),
        "failed",
    ),
    "a model that the account lacks": (
        lambda up: up.answers(404, b'{"error":{"code":"model_not_found","message":"no"}}'),
        "failed",
    ),
    "a redirect": (lambda up: up.answers(302, b"", headers=(("Location", "/x"),)), "failed"),
    "an error under status 200": (
        lambda up: up.answers(200, b'{"error":{"code":503,"message":"overloaded"}}'),
        "overloaded",
    ),
    "a coded error under status 200": (
        lambda up: up.answers(
            200,
            gzip.compress(b'{"error":{"code":503,"message":"overloaded"}}'),
            headers=(("Content-Encoding", "gzip"),),
        ),
        "overloaded",
    ),
    "no answer": (lambda up: up.stalls(), "failed"),
    "a broken connection": (lambda up: up.sends(b""), "failed"),
    "a reset connection": (lambda up: up.sends(b"", resets=True), "failed"),
    "half a head": (lambda up: up.sends(b"HTTP/1.1 200 OK\r\nContent-"), "failed"),
    "noise": (lambda up: up.sends(b"\x16\x03\x01 no HTTP\r\n\r\n"), "failed"),
    "a head and no body": (lambda up: up.sends(STREAM_HEAD, stalls=True), "failed"),
    "a body that never comes": (
        lambda up: up.sends(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n"),
        "failed",
    ),
    "half an event": (lambda up: up.sends(STREAM_HEAD + chunk(b'data: {"id":')), "failed"),
    "half an event and silence": (lambda up: up.sends(STREAM_HEAD + chunk(b'data: {"id":'), stalls=True), "failed"),
    "a stream that begins with an error": (
        lambda up: up.streams([b'data: {"error":{"message":"x","code":"server_error"}}\n\n']),
        "failed",
    ),
    "such a stream that comes in pieces": (
        lambda up: up.sends(
            STREAM_HEAD, chunk(b'data: {"error":{"mess'), chunk(b'age":"x","code":429}}\n\n'), stalls=True
        ),
        "rate_limited",
    ),
    "a stream that begins with comments and an error": (
        lambda up: up.streams([b": PROCESSING\n\n", b": PROCESSING\n\n", b'data: {"error":{"code":429}}\n\n']),
        "rate_limited",
    ),
    "nothing under status 200": (lambda up: up.answers(200, b""), "failed"),
    "a stream of nothing": (lambda up: up.streams([]), "failed"),
    "a stream of comments": (lambda up: up.streams([b": PROCESSING\n\n"]), "failed"),
    "half an error": (
        lambda up: up.sends(b"HTTP/1.1 500 Oh\r\nContent-Type: text/plain\r\nContent-Length: 9\r\n\r\nno"),
        "failed",
    ),
    "half a 429": (lambda up: up.sends(HALF_A_429), "rate_limited"),
    "half a 429 and silence": (lambda up: up.sends(HALF_A_429, stalls=True), "rate_limited"),
}


@pytest.mark.parametrize("case", BEFORE)
async def test_before_the_first_byte_the_next_service_is_tried(
    gateway: Served, upstream: Upstream, other: Upstream, case: str
) -> None:
    tell, outcome = BEFORE[case]
    tell(upstream)
    async with gateway.chat(**WANTS_USAGE) as response:
        assert (response.status, await response.read()) == (200, OPENAI_JSON)
        assert response.headers["x-balancer-attempts"] == "2"
        assert response.headers["x-balancer-service"] == "o1:m"
        assert "retry-after" not in response.headers
    assert await settled(gateway) == {("o0:m", outcome): 1, ("o1:m", "success"): 1}
    assert (len(upstream.received), len(other.received)) == (1, 1)
    services = (await gateway.view()).services
    assert (services["o0:m"].input, services["o1:m"].input) == (0, 11)
    assert requests_total(gateway)["gpt", "success"] == 1


async def test_a_connection_that_is_refused_is_the_next_service_s_chance(serve: Serve, upstream: Upstream) -> None:
    async with Upstream().running() as closed:
        pass
    gateway = await serve(a_pair(closed, upstream))
    async with gateway.chat() as response:
        assert (response.status, response.headers["x-balancer-attempts"]) == (200, "2")
    assert await settled(gateway) == {("o0:m", "failed"): 1, ("o1:m", "success"): 1}


@contextlib.contextmanager
def a_full_backlog() -> Iterator[str]:
    """The address of a socket on which no further connection is accepted, nor refused."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(3):
            queued = stack.enter_context(socket.socket())
            queued.setblocking(False)
            queued.connect_ex(listener.getsockname())
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


async def test_a_connection_that_never_comes_about_ends_after_connect_s(serve: Serve, upstream: Upstream) -> None:
    with a_full_backlog() as url:
        raw = a_pair(upstream, upstream, timeouts={"connect_s": 0.2})
        raw["providers"][0]["api_base"] = url
        gateway = await serve(raw)
        async with gateway.chat() as response:
            assert (response.status, response.headers["x-balancer-attempts"]) == (200, "2")
        raw["rules"][0]["services"].pop()
        alone = await serve(raw)
        async with alone.chat() as response:
            assert response.status == 504
            assert "connect_s" in decoded(await response.read())["error"]["message"]


async def test_an_anthropic_stream_that_begins_overloaded_goes_on_elsewhere(
    gateway: Served, upstream: Upstream, other: Upstream
) -> None:
    upstream.streams([OVERLOADED])
    other.streams(anthropic_events())
    body = {"model": "claude", "stream": True, "messages": []}
    async with gateway.session.post(f"{gateway.url}/v1/messages", json=body) as response:
        assert await response.read() == b"".join(anthropic_events())
        assert response.headers["x-balancer-service"] == "a1:m"
    assert await settled(gateway) == {("a0:m", "overloaded"): 1, ("a1:m", "success"): 1}


async def test_a_request_is_made_anew_for_each_service(serve: Serve, upstream: Upstream, other: Upstream) -> None:
    raw = a_pair(upstream, other)
    raw["providers"][2] |= {"stream_usage": False, "no_key_required": False, "token": KEY}
    raw["rules"][0]["services"][1]["model"] = "other-model"
    gateway = await serve(raw)
    upstream.answers(500)
    other.streams(openai_events(usage=None))
    async with gateway.chat(stream=True) as response:
        assert await response.read() == b"".join(openai_events(usage=None))
    first, second = json.loads(upstream.last.body), json.loads(other.last.body)
    assert (first.pop("stream_options"), first.pop("model")) == ({"include_usage": True}, "m")
    assert second.pop("model") == "other-model"
    assert first == second
    assert upstream.last.header("authorization") is None
    assert other.last.header("authorization") == f"Bearer {KEY}"


@pytest.mark.parametrize("status", [400, 404, 405, 409, 413, 422])
async def test_what_is_the_client_s_own_fault_is_not_tried_again(
    gateway: Served, upstream: Upstream, other: Upstream, status: int
) -> None:
    upstream.answers(status, b'{"error":{"message":"your fault"}}')
    async with gateway.chat() as response:
        assert (response.status, await response.read()) == (status, b'{"error":{"message":"your fault"}}')
        assert response.headers["x-balancer-attempts"] == "1"
    assert other.received == []
    assert await settled(gateway) == {("o0:m", "rejected"): 1}


async def test_a_rejection_in_a_first_event_passes_as_the_stream_it_is(
    gateway: Served, upstream: Upstream, other: Upstream
) -> None:
    events = [b'data: {"error":{"type":"invalid_request_error","message":"no"}}\n\n', b"data: [DONE]\n\n"]
    upstream.streams(events)
    async with gateway.chat(**WANTS_USAGE) as response:
        assert (response.status, await response.read()) == (200, b"".join(events))
    assert other.received == []
    assert await settled(gateway) == {("o0:m", "rejected"): 1}


async def test_the_connection_of_a_failure_is_given_back_before_the_pause(
    serve: Serve, upstream: Upstream, other: Upstream
) -> None:
    gateway = await serve(a_pair(upstream, other, rule={"retry": {"backoff_ms": 10_000}}))
    upstream.sends(STREAM_HEAD + chunk(b'data: {"error":{"message":"x"}}\n\n'), stalls=True)
    request = asyncio.create_task(gateway.chat(**WANTS_USAGE).__aenter__())
    await asyncio.wait_for(upstream.hung_up.wait(), 3)
    assert await settled(gateway) == {("o0:m", "failed"): 1}
    assert not request.done()
    request.cancel()
    await asyncio.gather(request, return_exceptions=True)


async def test_failures_with_a_whole_answer_leave_their_connection_to_the_next(
    serve: Serve, upstream: Upstream, other: Upstream
) -> None:
    gateway = await serve(a_pair(upstream, other, breaker={"failures": 0, "ratio": 0}))
    upstream.answers(500, b"no")
    for _ in range(6):
        async with gateway.chat() as response:
            assert response.status == 200
    assert (len(upstream.received), upstream.connections) == (3, 1)


# -- when all fail -----------------------------------------------------------------------------------------------------


async def test_when_all_fail_the_client_gets_the_last_error_as_it_came(
    gateway: Served, upstream: Upstream, other: Upstream
) -> None:
    upstream.answers(500, b"first")
    other.answers(503, b'{"error":{"message":"last"}}', headers=(("x-own", "1"), ("Retry-After", "9")))
    async with gateway.chat() as response:
        assert (response.status, await response.read()) == (503, b'{"error":{"message":"last"}}')
        assert (response.headers["x-own"], response.headers["Retry-After"]) == ("1", "9")
        assert (response.headers["x-balancer-attempts"], response.headers["x-balancer-service"]) == ("2", "o1:m")
    assert await settled(gateway) == {("o0:m", "failed"): 1, ("o1:m", "overloaded"): 1}
    assert requests_total(gateway)["gpt", "overloaded"] == 1


@pytest.mark.parametrize("status", [401, 200])
async def test_the_credential_in_an_error_that_was_held_back_is_masked(
    serve: Serve, upstream: Upstream, other: Upstream, status: int
) -> None:
    """Under status 200 it once came through."""
    gateway = await serve(a_pair(upstream, other, no_key_required=False, token=KEY))
    upstream.echoes_its_credential(status)
    other.echoes_its_credential(status)
    async with gateway.chat() as response:
        assert (response.status, response.headers["x-balancer-attempts"]) == (status, "2")
        assert b"bad key: Bearer ***" in await response.read()


@pytest.mark.parametrize("stalls", [False, True])
async def test_half_an_error_counts_by_its_status_and_headers(
    serve: Serve, upstream: Upstream, other: Upstream, monkeypatch: pytest.MonkeyPatch, stalls: bool
) -> None:
    """It was once a failure of the connection: it cooled nothing, and hid from the client when to come again."""
    monkeypatch.setattr(opening, "_ERROR_LIMIT_S", 0.1)
    gateway = await serve(a_pair(upstream, other, no_key_required=False, token=KEY))
    for each in (upstream, other):
        each.sends(HALF_A_429, stalls=stalls)
    async with gateway.chat() as response:
        assert (response.status, response.headers["Retry-After"]) == (429, "30")
        assert decoded(await response.read())["error"]["message"] == "the upstream's error cannot be read"
    assert await settled(gateway) == {("o0:m", "rate_limited"): 1, ("o1:m", "rate_limited"): 1}
    async with gateway.chat() as response:
        assert (response.status, int(response.headers["Retry-After"]) > 20) == (429, True)
    assert len(upstream.received) + len(other.received) == 2 + 1


async def test_comments_that_go_on_and_on_reach_the_client(
    gateway: Served, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "_COMMENTS_S", 0.0)
    gate = asyncio.Event()
    upstream.streams([b": PROCESSING\n\n", *openai_events()], gates={1: gate})
    async with gateway.chat(**WANTS_USAGE) as response:
        assert await response.content.readany() == b": PROCESSING\n\n"
        gate.set()
        assert await response.read() == b"".join(openai_events())


async def test_a_first_event_that_was_held_back_reaches_the_client_when_nothing_else_does(
    gateway: Served, upstream: Upstream, other: Upstream
) -> None:
    upstream.streams([OVERLOADED])
    other.streams([OVERLOADED.replace(b'"x"', b'"y"')])
    body = {"model": "claude", "stream": True, "messages": []}
    async with gateway.session.post(f"{gateway.url}/v1/messages", json=body) as response:
        assert response.status == 200
        assert await response.read() == OVERLOADED.replace(b'"x"', b'"y"')
    assert await settled(gateway) == {("a0:m", "overloaded"): 1, ("a1:m", "overloaded"): 1}


@pytest.mark.parametrize(("attempts", "made"), [(1, 1), (2, 2), (3, 3)])
async def test_no_more_attempts_are_made_than_the_rule_allows(
    serve: Serve, upstream: Upstream, attempts: int, made: int
) -> None:
    rule = {"retry": {"attempts": attempts, "backoff_ms": 1}}
    gateway = await serve(a_pair(upstream, upstream, upstream, upstream, rule=rule))
    upstream.answers(500, b"no")
    async with gateway.chat() as response:
        assert (response.status, response.headers["x-balancer-attempts"]) == (500, str(made))
    assert len(upstream.received) == made


async def test_retries_end_with_their_budget(serve: Serve, upstream: Upstream, other: Upstream) -> None:
    gateway = await serve(a_pair(upstream, other, rule={"retry": {"budget_ratio": 0, "backoff_ms": 1}}))
    upstream.answers(500, b"no")
    async with gateway.chat() as response:
        assert (response.status, response.headers["x-balancer-attempts"]) == (500, "1")
    assert other.received == []


async def test_the_second_service_missing_its_credential_is_logged_and_the_first_one_s_error_is_not_lost(
    serve: Serve, upstream: Upstream, other: Upstream, caplog: pytest.LogCaptureFixture
) -> None:
    raw = a_pair(upstream, other)
    raw["providers"][0] |= {"no_key_required": False, "token": "${BALANCER_TEST_NOT_THERE}"}
    gateway = await serve(raw)
    async with gateway.chat() as response:
        assert (response.status, response.headers["x-balancer-service"]) == (200, "o1:m")
    assert any("BALANCER_TEST_NOT_THERE" in str(vars(record)) for record in caplog.records)
    assert await settled(gateway) == {("o0:m", "failed"): 1, ("o1:m", "success"): 1}


# -- cooldowns ---------------------------------------------------------------------------------------------------------


async def test_a_service_is_left_alone_for_as_long_as_it_asks(
    gateway: Served, upstream: Upstream, other: Upstream
) -> None:
    upstream.answers(429, b"{}", retry_after="60")
    upstream.then().answers()
    for attempts in ("2", "1", "1"):
        async with gateway.chat() as response:
            assert (response.status, response.headers["x-balancer-attempts"]) == (200, attempts)
    assert (len(upstream.received), len(other.received)) == (1, 3)


async def test_when_all_cool_the_sdks_hear_a_rate_limit_and_for_how_long(
    serve: Serve, upstream: Upstream, other: Upstream
) -> None:
    gateway = await serve(a_pair(upstream, other, rule={"on_exhausted": "refuse"}))
    for actor in (upstream, other):
        actor.answers(429, b"{}", retry_after="60")
    messages: Any = [{"role": "user", "content": "hi"}]
    async with openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="k", max_retries=0) as client:
        for _ in range(2):
            with pytest.raises(openai.RateLimitError) as told:
                await client.chat.completions.create(model="gpt", messages=messages)
    assert told.value.code == "rate_limit_exceeded"
    assert 55 <= int(told.value.response.headers["retry-after"]) <= 60
    async with anthropic.AsyncAnthropic(base_url=gateway.url, api_key="k", max_retries=0) as client_:
        for _ in range(2):
            with pytest.raises(anthropic.RateLimitError) as refused:
                await client_.messages.create(model="claude", max_tokens=3, messages=messages)
    assert "rate_limit_error" in str(refused.value.body)
    assert 55 <= int(refused.value.response.headers["retry-after"]) <= 60
    assert (len(upstream.received), len(other.received)) == (2, 2)
    assert requests_total(gateway)["gpt", "rate_limited"] == 2


async def test_when_all_breakers_are_open_the_sdks_hear_of_it(
    serve: Serve, upstream: Upstream, other: Upstream
) -> None:
    raw = a_pair(upstream, other, rule={"on_exhausted": "refuse"}, breaker={"failures": 1, "open_s": 60})
    gateway = await serve(raw)
    for actor in (upstream, other):
        actor.answers(500, b"{}")
    messages: Any = [{"role": "user", "content": "hi"}]
    async with openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="k", max_retries=0) as client:
        for _ in range(2):
            with pytest.raises(openai.InternalServerError) as told:
                await client.chat.completions.create(model="gpt", messages=messages)
    assert told.value.status_code == 503
    assert 55 <= int(told.value.response.headers["retry-after"]) <= 75
    assert (len(upstream.received), len(other.received)) == (1, 1)


async def test_a_limit_is_a_429_with_an_honest_retry_after(serve: Serve, upstream: Upstream) -> None:
    raw = a_pair(upstream)
    raw["rules"][0]["services"][0]["limits"] = {"rpm": 1}
    gateway = await serve(raw)
    async with gateway.chat() as response:
        assert response.status == 200
    async with gateway.chat() as response:
        assert (response.status, decoded(await response.read())["error"]["code"]) == (429, "rate_limit_exceeded")
        assert 1 <= int(response.headers["Retry-After"]) <= 65
    assert len(upstream.received) == 1


async def test_without_redis_failures_go_on_elsewhere_too_and_answers_say_so(
    serve: Serve, upstream: Upstream, other: Upstream, store_url: str
) -> None:
    gateway = await serve(a_pair(upstream, other, rule={"on_store_loss": "local"}), redis_deadline_ms=100)
    async with gateway.chat() as response:
        assert "x-balancer-degraded" not in response.headers
    upstream.answers(500, b"no")
    other.answers(500, b"no")
    other.then().answers()
    async with redis.asyncio.Redis.from_url(store_url) as control:
        await control.client_pause(1000)
        for _ in range(2):
            async with gateway.chat() as response:
                told = response.status, response.headers["x-balancer-attempts"]
                assert response.headers["x-balancer-degraded"] == "store"
        assert told == (200, "2")
    degraded = counted(gateway.gateway.metrics.degraded_picks)["default", "gpt"]
    assert degraded == len(upstream.received) + len(other.received) - 1

    async def is_settled() -> bool:
        with contextlib.suppress(ValueError, AssertionError):
            return bool(sum((await settled(gateway)).values()) == degraded + 1)
        return False

    await eventually(is_settled)


# -- behind the first byte ---------------------------------------------------------------------------------------------

AFTER: dict[str, tuple[str, dict[str, Any], list[bytes], str]] = {
    "chat": ("/v1/chat/completions", {"model": "gpt", **WANTS_USAGE}, openai_events()[:2], "o0:m"),
    "responses": ("/v1/responses", {"model": "gpt", "stream": True}, responses_events()[:2], "o0:m"),
    "messages": ("/v1/messages", {"model": "claude", "stream": True}, anthropic_events()[:3], "a0:m"),
}


@pytest.mark.parametrize("case", AFTER)
@pytest.mark.parametrize("stalls", [False, True], ids=["breaks off", "goes silent"])
async def test_behind_the_first_byte_a_stream_ends_with_its_dialect_s_error(
    gateway: Served, upstream: Upstream, other: Upstream, case: str, stalls: bool
) -> None:
    path, body, events, service = AFTER[case]
    upstream.sends(STREAM_HEAD + b"".join(map(chunk, events)), stalls=stalls)
    async with gateway.session.post(gateway.url + path, json=body) as response:
        got = await response.read()
    assert got.startswith(b"".join(events))
    name, _, data = got.removeprefix(b"".join(events)).strip().rpartition(b"data: ")
    assert name == (b"" if case == "chat" else b"event: error\n")
    error = json.loads(data)
    code = "upstream_timeout" if stalls else "upstream_unreachable"
    match case:
        case "chat":
            assert error["error"]["code"] == code
        case "responses":
            assert (error["type"], error["code"]) == ("error", code)
        case _:
            assert (error["type"], error["error"]["type"]) == ("error", "timeout_error" if stalls else "api_error")
    assert other.received == []
    assert await settled(gateway) == {(service, "failed"): 1}


async def test_an_error_behind_the_first_byte_cools_the_service_for_the_next_request(
    gateway: Served, upstream: Upstream, other: Upstream
) -> None:
    error = b'data: {"error":{"message":"slow down","type":"rate_limit_error"}}\n\n'
    upstream.streams([openai_events()[0], error])
    async with gateway.chat(**WANTS_USAGE) as response:
        assert await response.read() == openai_events()[0] + error
    assert await settled(gateway) == {("o0:m", "rate_limited"): 1}
    for _ in range(2):
        async with gateway.chat() as response:
            assert response.headers["x-balancer-service"] == "o1:m"
    assert (len(upstream.received), len(other.received)) == (1, 2)


async def test_a_json_answer_that_breaks_behind_its_first_byte_is_broken_off(
    gateway: Served, upstream: Upstream, other: Upstream
) -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 500\r\n\r\n"
    upstream.sends(head + OPENAI_JSON[:60])
    with pytest.raises(aiohttp.ClientPayloadError):
        async with gateway.chat() as response:
            await response.read()
    assert other.received == []
    assert await settled(gateway) == {("o0:m", "failed"): 1}


# -- deadlines ---------------------------------------------------------------------------------------------------------


async def test_the_client_s_own_timeout_counts_over_all_attempts(
    serve: Serve, upstream: Upstream, other: Upstream
) -> None:
    gateway = await serve(a_pair(upstream, other, timeouts={"headers_s": 0.4}))
    upstream.stalls()
    other.stalls()
    began = time.monotonic()
    headers = {"x-stainless-timeout": "0.6"}
    body = {"model": "gpt", "messages": []}
    async with gateway.session.post(f"{gateway.url}/v1/chat/completions", json=body, headers=headers) as response:
        assert (response.status, decoded(await response.read())["error"]["code"]) == (504, "upstream_timeout")
        assert response.headers["x-balancer-attempts"] == "2"
    assert 0.55 <= time.monotonic() - began < 0.8
    # The second was not too slow: nobody waited for it.
    assert await settled(gateway) == {("o0:m", "failed"): 1, ("o1:m", "cancelled"): 1}
    assert (len(upstream.received), len(other.received)) == (1, 1)


async def test_waiting_for_room_ends_with_the_client_s_timeout(serve: Serve, upstream: Upstream) -> None:
    raw = a_pair(upstream, rule={"queue_timeout_ms": 10_000})
    raw["rules"][0]["services"][0]["limits"] = {"in_flight": 1}
    gateway = await serve(raw)
    upstream.stalls()
    first = asyncio.create_task(gateway.chat().__aenter__())
    await asyncio.wait_for(upstream.stalled.wait(), 5)
    body = {"model": "gpt", "messages": []}
    headers = {"x-stainless-timeout": "0.2"}
    async with gateway.session.post(f"{gateway.url}/v1/chat/completions", json=body, headers=headers) as response:
        assert (response.status, decoded(await response.read())["error"]["code"]) == (504, "upstream_timeout")
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    assert await settled(gateway) == {("o0:m", "cancelled"): 1}
    assert len(upstream.received) == 1


async def test_a_service_that_comes_free_too_late_is_not_to_blame(
    serve: Serve, upstream: Upstream, other: Upstream
) -> None:
    """Whoever had waited for longer than its timeout was sent with no time left, and fed its breaker."""
    raw = a_pair(upstream, other, rule={"queue_timeout_ms": 5000}, limits={"in_flight": 1}, timeout=60)
    raw["providers"][0]["timeout"] = 1
    upstream.stalls()
    gateway = await serve(raw)
    balance = gateway.gateway.balance
    rule = balance.snapshot().by_uuid["gpt"]
    held = {}
    for _ in range(2):
        pick, _ = await balance.select(rule, reserved=0, deadline_ms=60_000)
        held[pick.service] = pick

    async def ask() -> int:
        async with gateway.chat() as response:
            await response.read()
            return int(response.status)

    asking = asyncio.create_task(ask())
    await asyncio.sleep(1.1)  # As long as the first provider gives to a whole request.
    balance.settle(held["o0:m"], Outcome.SUCCESS, None)
    assert await asking == 504
    balance.settle(held["o1:m"], Outcome.SUCCESS, None)
    assert not upstream.received
    assert (await gateway.view()).services["o0:m"].breaker.consecutive == 0


async def test_the_client_s_timeout_ends_with_the_first_byte(gateway: Served, upstream: Upstream) -> None:
    """SDKs wait so long for the beginning of an answer, and then for each part anew."""
    gate = asyncio.Event()
    upstream.streams(openai_events(), gates={1: gate})
    headers = {"x-stainless-timeout": "0.1"}
    body = {"model": "gpt", "messages": [], **WANTS_USAGE}
    async with gateway.session.post(f"{gateway.url}/v1/chat/completions", json=body, headers=headers) as response:
        await response.content.readany()
        await asyncio.sleep(0.15)
        gate.set()
        assert (await response.read()).endswith(b"[DONE]\n\n")


async def test_the_provider_s_timeout_counts_over_all_attempts(
    serve: Serve, upstream: Upstream, other: Upstream
) -> None:
    gateway = await serve(a_pair(upstream, other, timeout=0.6, timeouts={"headers_s": 0.4}))
    upstream.stalls()
    other.stalls()
    began = time.monotonic()
    body = {"model": "claude", "messages": []}
    async with gateway.session.post(f"{gateway.url}/v1/messages", json=body) as response:
        assert (response.status, decoded(await response.read())["error"]["type"]) == (504, "timeout_error")
    assert 0.55 <= time.monotonic() - began < 0.8


async def test_a_service_whose_time_for_the_request_is_over_is_not_tried(
    serve: Serve, upstream: Upstream, other: Upstream
) -> None:
    raw = a_pair(upstream, other, timeouts={"headers_s": 0.3})
    raw["providers"][2]["timeout"] = 0.2
    gateway = await serve(raw)
    upstream.stalls()
    async with gateway.chat() as response:
        assert (response.status, response.headers["x-balancer-attempts"]) == (504, "1")
        assert "headers_s" in decoded(await response.read())["error"]["message"]
    assert other.received == []
    assert await settled(gateway) == {("o0:m", "failed"): 1}


async def test_no_pause_begins_that_would_outlast_the_deadline(
    serve: Serve, upstream: Upstream, other: Upstream
) -> None:
    gateway = await serve(a_pair(upstream, other, timeout=1, rule={"retry": {"backoff_ms": 5000}}))
    upstream.answers(500, b"at once")
    began = time.monotonic()
    async with gateway.chat() as response:
        assert (response.status, await response.read()) == (500, b"at once")
    assert time.monotonic() - began < 0.9
    assert other.received == []


# -- clients that leave ------------------------------------------------------------------------------------------------


async def test_a_client_that_leaves_during_the_pause_ends_the_request(
    serve: Serve, upstream: Upstream, other: Upstream
) -> None:
    gateway = await serve(a_pair(upstream, other, rule={"retry": {"backoff_ms": 10_000}}))
    upstream.answers(500, b"no")
    async with aiohttp.ClientSession() as session:
        body = {"model": "gpt", "messages": []}
        request = asyncio.create_task(session.post(f"{gateway.url}/v1/chat/completions", json=body))

        async def has_failed() -> bool:
            return await settled(gateway) == {("o0:m", "failed"): 1}

        await eventually(has_failed)
        request.cancel()
        await asyncio.gather(request, return_exceptions=True)

    async def is_over() -> bool:
        return requests_total(gateway) == {("gpt", "cancelled"): 1}

    await eventually(is_over)
    assert other.received == []
    assert await settled(gateway) == {("o0:m", "failed"): 1}


async def test_a_client_that_leaves_during_the_second_attempt_ends_that_at_once(
    serve: Serve, upstream: Upstream, other: Upstream
) -> None:
    gateway = await serve(a_pair(upstream, other))
    upstream.answers(500, b"no")
    other.stalls()
    request = asyncio.create_task(gateway.chat().__aenter__())
    await asyncio.wait_for(other.stalled.wait(), 5)
    request.cancel()
    await asyncio.gather(request, return_exceptions=True)
    await asyncio.wait_for(other.hung_up.wait(), 5)
    assert await settled(gateway) == {("o0:m", "failed"): 1, ("o1:m", "cancelled"): 1}
