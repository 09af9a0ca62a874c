"""Every way a request can end: the client gets its dialect's error, the attempt is settled once, the worker lives."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp
import pytest
import redis.asyncio

from balancer.steps import Steps
from tests.actors import OPENAI_JSON, Upstream, anthropic_events, chunk, openai_events
from tests.gateway.conftest import KEY, Serve, Served, a_document, decoded
from tests.store.conftest import eventually

JSON = {"Content-Type": "application/json"}
STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


async def post(gateway: Served, path: str, data: bytes, headers: dict[str, str] = JSON) -> tuple[int, Any]:
    async with gateway.session.post(gateway.url + path, data=data, headers=headers) as response:
        return response.status, decoded(await response.read())


async def is_serving(gateway: Served, upstream: Upstream) -> bool:
    upstream.answers()
    async with gateway.chat() as response:
        return bool(response.status == 200)


# -- what is refused before anything is picked -------------------------------------------------------------------------

REFUSED = {
    "malformed JSON": (b'{"model": "gpt"', 400, "no valid JSON"),
    "no object": (b'["gpt"]', 400, "must be a JSON object"),
    "invalid UTF-8": (b'{"model": "\xff"}', 400, "valid"),
    "no body": (b"", 400, "no body"),
    "no model": (b'{"messages": []}', 400, "`model` is missing"),
    "a model that is no string": (b'{"model": 7}', 400, "`model` must be a string"),
    "an empty model": (b'{"model": ""}', 400, "must not be empty"),
    "an unknown model": (b'{"model": "nope"}', 404, "there is: gpt"),
    "a stream that is no boolean": (b'{"model": "gpt", "stream": "yes"}', 400, "`stream` must be true or false"),
}


@pytest.mark.parametrize("case", REFUSED)
async def test_bad_bodies_are_refused_in_openai_s_words(gateway: Served, upstream: Upstream, case: str) -> None:
    body, status, words = REFUSED[case]
    got, answer = await post(gateway, "/v1/chat/completions", body)
    assert got == status
    assert words in answer["error"]["message"]
    assert answer["error"].keys() == {"message", "type", "code", "param"}
    assert upstream.received == []
    assert (await gateway.view()).position == 2  # The fences of two rules: nothing was picked.


async def test_bad_bodies_are_refused_in_anthropic_s_words(gateway: Served) -> None:
    status, answer = await post(gateway, "/v1/messages", b'{"model": "nope"}')
    assert status == 404
    assert answer["type"] == "error"
    assert answer["error"]["type"] == "not_found_error"
    assert "there is: claude" in answer["error"]["message"]


async def test_another_content_type_is_refused(gateway: Served) -> None:
    status, answer = await post(gateway, "/v1/chat/completions", b"model=gpt", {"Content-Type": "text/plain"})
    assert (status, answer["error"]["code"]) == (415, "unsupported_media_type")


async def test_a_body_over_the_limit_is_refused_with_and_without_its_length(serve: Serve, upstream: Upstream) -> None:
    gateway = await serve(a_document(upstream.url), max_body_bytes=1000)
    body = b'{"model": "gpt", "x": "' + b"y" * 2000 + b'"}'
    status, answer = await post(gateway, "/v1/chat/completions", body)
    assert (status, answer["error"]["code"]) == (413, "request_too_large")

    async def parts() -> Any:
        yield body[:900]
        yield body[900:]

    async with gateway.session.post(f"{gateway.url}/v1/messages", data=parts(), headers=JSON) as response:
        assert response.status == 413
        assert decoded(await response.read())["error"]["type"] == "request_too_large"
    assert await is_serving(gateway, upstream)


async def test_a_rule_without_active_services_answers_503(serve: Serve, upstream: Upstream) -> None:
    raw = a_document(upstream.url)
    raw["rules"][0]["services"][0]["active"] = False
    gateway = await serve(raw)
    status, answer = await post(gateway, "/v1/chat/completions", b'{"model": "gpt"}')
    assert (status, answer["error"]["code"]) == (503, "no_service_available")


async def test_a_disabled_provider_is_never_picked(serve: Serve, upstream: Upstream) -> None:
    raw = a_document(upstream.url)
    raw["providers"].append({"name": "off", "api_base": upstream.url, "no_key_required": True, "enabled": False})
    raw["rules"][0]["lb_tactic"] = {"type": "round_robin", "params": {"request_threshold": 1}}
    raw["rules"][0]["services"].insert(0, {"provider": "off", "model": "m"})
    gateway = await serve(raw)
    for _ in range(3):
        async with gateway.chat() as response:
            assert response.headers["x-balancer-service"] == "up:up-model"


async def test_an_unknown_path_is_a_404_in_json(gateway: Served) -> None:
    async with gateway.session.get(f"{gateway.url}/nothing") as response:
        assert response.status == 404
        assert decoded(await response.read())["error"]["code"] == "not_found"


async def test_client_tokens_are_asked_for_and_never_passed_on(serve: Serve, upstream: Upstream) -> None:
    gateway = await serve(a_document(upstream.url), client_tokens="team-one, team-two")
    for headers, status in (
        ({}, 401),
        ({"Authorization": "Bearer wrong"}, 401),
        ({"Authorization": "Bearer team-one"}, 200),
        ({"x-api-key": "team-two"}, 200),
    ):
        body = {"model": "gpt", "messages": []}
        async with gateway.session.post(f"{gateway.url}/v1/chat/completions", json=body, headers=headers) as response:
            assert response.status == status
    assert "team-" not in str([request.headers for request in upstream.received])
    assert len(upstream.received) == 2


# -- upstreams that fail -----------------------------------------------------------------------------------------------


async def test_an_upstream_that_refuses_the_connection_is_a_502(serve: Serve, upstream: Upstream) -> None:
    async with Upstream().running() as closed:
        url = closed.url
    gateway = await serve(a_document(url))
    status, answer = await post(gateway, "/v1/chat/completions", b'{"model": "gpt"}')
    assert (status, answer["error"]["code"]) == (502, "upstream_unreachable")
    assert url.rpartition(":")[2] not in json.dumps(answer)
    state = await gateway.service("up:up-model")
    assert (state.requests, state.failures, state.input) == (1, 1, 0)


async def test_an_upstream_s_html_passes_as_it_is(gateway: Served, upstream: Upstream) -> None:
    upstream.answers(502, b"<html>bad gateway</html>", "text/html")
    async with gateway.chat() as response:
        assert response.status == 502
        assert await response.read() == b"<html>bad gateway</html>"
        assert response.headers["Content-Type"] == "text/html"
    assert (await gateway.service("up:up-model")).failures == 1


@pytest.mark.parametrize(("status", "failures"), [(400, 0), (429, 1), (500, 1), (529, 1)])
async def test_an_upstream_s_error_passes_with_its_status_and_retry_after(
    gateway: Served, upstream: Upstream, status: int, failures: int
) -> None:
    upstream.answers(status, b'{"error":{"message":"x"}}', headers=(("Retry-After", "7"),))
    async with gateway.chat() as response:
        assert (response.status, response.headers["Retry-After"]) == (status, "7")
        assert await response.read() == b'{"error":{"message":"x"}}'
    state = await gateway.service("up:up-model")
    assert (state.requests, state.failures) == (1, failures)


async def test_a_credential_that_an_upstream_repeats_does_not_come_down(gateway: Served, upstream: Upstream) -> None:
    upstream.echoes_its_credential()
    async with gateway.chat() as response:
        body = await response.read()
        assert response.status == 401
        assert KEY.encode() not in body
        assert b"bad key: Bearer ***" in body


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({"timeouts": {"headers_s": 0.1}}, "headers_s"),
        ({"timeout": 0.1}, "timeout"),
        ({"timeouts": {"first_byte_s": 0.1}}, "first_byte_s"),
    ],
)
async def test_an_upstream_that_stalls_before_its_first_byte_is_a_504(
    serve: Serve, upstream: Upstream, limits: dict[str, Any], words: str
) -> None:
    gateway = await serve(a_document(upstream.url, **limits))
    if words == "first_byte_s":
        upstream.sends(STREAM_HEAD, stalls=True)
    else:
        upstream.stalls()
    status, answer = await post(gateway, "/v1/chat/completions", b'{"model": "gpt"}')
    assert (status, answer["error"]["code"]) == (504, "upstream_timeout")
    assert words in answer["error"]["message"]
    assert (await gateway.service("up:up-model")).failures == 1


async def test_a_stream_that_stalls_ends_with_an_error_event(serve: Serve, upstream: Upstream) -> None:
    gateway = await serve(a_document(upstream.url, timeouts={"idle_s": 0.1}))
    upstream.sends(STREAM_HEAD + chunk(openai_events()[0]), stalls=True)
    async with gateway.chat(stream=True) as response:
        events = (await response.read()).decode().strip().split("\n\n")
    assert events[0] == openai_events()[0].decode().strip()
    assert json.loads(events[1].removeprefix("data: "))["error"]["code"] == "upstream_timeout"


@pytest.mark.parametrize("resets", [False, True])
async def test_a_stream_that_breaks_ends_with_an_error_event_and_its_usage_is_counted(
    gateway: Served, upstream: Upstream, resets: bool
) -> None:
    events = anthropic_events()
    upstream.sends(STREAM_HEAD + b"".join(map(chunk, events[:4])), resets=resets)
    body = {"model": "claude", "stream": True, "messages": []}
    async with gateway.session.post(f"{gateway.url}/v1/messages", json=body) as response:
        got = await response.read()
    assert got.startswith(b"".join(events[:3]))
    assert got.rstrip().rpartition(b"\n\n")[2].startswith(b"event: error\ndata: ")
    state = await gateway.service("ant:up-model")
    assert (state.requests, state.failures, state.input, state.output) == (1, 1, 11, 1)


async def test_half_an_event_is_closed_off_before_the_error_event(gateway: Served, upstream: Upstream) -> None:
    first = anthropic_events()[0]
    upstream.sends(STREAM_HEAD + chunk(first) + chunk(b'event: ping\ndata: {"type"'))
    body = {"model": "claude", "stream": True, "messages": []}
    async with gateway.session.post(f"{gateway.url}/v1/messages", json=body) as response:
        got = await response.read()
    assert got.startswith(first + b'event: ping\ndata: {"type"\n\nevent: error\ndata: ')


async def test_a_json_answer_that_breaks_off_is_never_taken_for_a_whole_one(
    gateway: Served, upstream: Upstream
) -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 500\r\n\r\n"
    upstream.sends(head + OPENAI_JSON[:60])
    with pytest.raises(aiohttp.ClientPayloadError):
        async with gateway.chat() as response:
            await response.read()
    state = await gateway.service("up:up-model")
    assert (state.requests, state.failures) == (1, 1)


async def test_a_malformed_event_passes_and_harms_nothing(gateway: Served, upstream: Upstream) -> None:
    broken = b'data: {"choices": [}, "usage": \xff\n\n'
    upstream.streams([broken, *openai_events()])
    async with gateway.chat(stream=True, stream_options={"include_usage": True}) as response:
        assert await response.read() == broken + b"".join(openai_events())
    assert (await gateway.service("up:up-model")).input == 11


async def test_an_error_event_in_a_stream_counts_as_a_failure(gateway: Served, upstream: Upstream) -> None:
    upstream.streams([openai_events()[0], b'data: {"error":{"message":"overloaded"}}\n\n'])
    async with gateway.chat(stream=True) as response:
        await response.read()
    assert (await gateway.service("up:up-model")).failures == 1


async def test_a_missing_variable_is_told_to_the_operator_alone_and_settled(
    serve: Serve, upstream: Upstream, caplog: pytest.LogCaptureFixture
) -> None:
    gateway = await serve(a_document(upstream.url, token="${BALANCER_TEST_NOT_THERE}"))
    status, answer = await post(gateway, "/v1/chat/completions", b'{"model": "gpt"}')
    assert status == 500
    assert "BALANCER_TEST_NOT_THERE" not in answer["error"]["message"]
    assert any("BALANCER_TEST_NOT_THERE" in str(vars(record)) for record in caplog.records)
    assert (await gateway.service("up:up-model")).requests == 1


# -- clients that leave ------------------------------------------------------------------------------------------------


async def test_a_client_that_leaves_while_the_upstream_thinks_ends_the_attempt_at_once(
    gateway: Served, upstream: Upstream
) -> None:
    upstream.stalls()
    request = asyncio.create_task(post(gateway, "/v1/chat/completions", b'{"model": "gpt"}'))
    await asyncio.wait_for(upstream.stalled.wait(), 5)
    request.cancel()
    await asyncio.gather(request, return_exceptions=True)
    await asyncio.wait_for(upstream.hung_up.wait(), 5)
    state = await gateway.service("up:up-model")
    assert (state.requests, state.failures, state.input) == (1, 0, 0)


async def test_a_client_that_leaves_in_mid_stream_is_counted_with_what_was_reported(
    gateway: Served, upstream: Upstream
) -> None:
    upstream.streams(anthropic_events(), gates={3: asyncio.Event()})
    body = {"model": "claude", "stream": True, "messages": []}
    async with aiohttp.ClientSession() as session:
        response = await session.post(f"{gateway.url}/v1/messages", json=body)
        assert b"message_start" in await response.content.readany()
        response.close()
    await asyncio.wait_for(upstream.hung_up.wait(), 5)
    state = await gateway.service("ant:up-model")
    assert (state.requests, state.failures, state.input, state.output) == (1, 0, 11, 1)


async def test_a_client_that_leaves_after_the_last_event_has_been_served(gateway: Served, upstream: Upstream) -> None:
    events = anthropic_events()
    gate = asyncio.Event()
    upstream.streams([*events, b": the end\n\n"], gates={len(events): gate})
    body = {"model": "claude", "stream": True, "messages": []}
    async with aiohttp.ClientSession() as session:
        response = await session.post(f"{gateway.url}/v1/messages", json=body)
        held = b""
        while b"message_stop" not in held:
            held += await response.content.readany()
        response.close()
    state = await gateway.service("ant:up-model")
    assert (state.requests, state.failures, state.input, state.output) == (1, 0, 11, 7)


# -- probes, metrics, the store ----------------------------------------------------------------------------------------


async def test_probes_and_metrics_tell_of_a_healthy_worker(gateway: Served, upstream: Upstream) -> None:
    async with gateway.chat() as response:
        await response.read()
    await gateway.service("up:up-model")
    async with gateway.session.get(f"{gateway.url}/readyz") as response:
        assert response.status == 200
        assert decoded(await response.read())["pools"] == {"default": "ok"}
    async with gateway.session.get(f"{gateway.url}/metrics") as response:
        lines = (await response.text()).splitlines()
    service = 'pool="default",rule="gpt",service="up:up-model"'
    assert f'balancer_attempts_total{{outcome="success",{service}}} 1.0' in lines
    assert f'balancer_tokens_total{{kind="input",{service}}} 11.0' in lines
    assert 'balancer_window_tokens{pool="default",service="up:up-model",window="300"} 18.0' in lines
    assert 'balancer_current_service_index{pool="default",rule="gpt"} 0.0' in lines
    assert 'balancer_store_up{pool="default"} 1.0' in lines


async def test_models_that_clients_make_up_are_no_labels(gateway: Served) -> None:
    async def series() -> int:
        async with gateway.session.get(f"{gateway.url}/metrics") as response:
            return len((await response.text()).splitlines())

    await post(gateway, "/v1/chat/completions", b'{"model": "made-up"}')
    await post(gateway, "/v1/chat/x", b'{"model": "made-up"}')
    before = await series()
    for number in range(50):
        await post(gateway, f"/v1/chat/x{number}", b'{"model": "made-up-%d"}' % number)
    assert await series() == before


async def test_without_redis_requests_of_closed_rules_get_503_at_once_and_readiness_says_so(
    serve: Serve, upstream: Upstream, store_url: str
) -> None:
    closed = a_document(upstream.url)
    for rule in closed["rules"]:
        rule["on_store_loss"] = "closed"
    gateway = await serve(closed, redis_deadline_ms=100)
    async with redis.asyncio.Redis.from_url(store_url) as control:
        await control.client_pause(700)
        status, answer = await post(gateway, "/v1/chat/completions", b'{"model": "gpt"}')
        assert (status, answer["error"]["code"]) == (503, "store_unavailable")
        async with gateway.session.get(f"{gateway.url}/readyz") as response:
            assert response.status == 503
            assert decoded(await response.read())["pools"] == {"default": "away: closed"}

        async def is_back() -> bool:
            return await is_serving(gateway, upstream)

        await eventually(is_back)
    assert all(state.in_flight == 0 for state in (await gateway.view()).services.values())


async def test_without_redis_requests_are_served_all_the_same_and_counted_when_it_is_back(
    serve: Serve, upstream: Upstream, store_url: str
) -> None:
    gateway = await serve(a_document(upstream.url), redis_deadline_ms=100)
    upstream.answers()
    async with redis.asyncio.Redis.from_url(store_url) as control:
        await control.client_pause(700)
        for _ in range(10):
            async with gateway.chat() as response:
                assert (response.status, response.headers["x-balancer-degraded"]) == (200, "store")
        async with gateway.session.get(f"{gateway.url}/readyz") as response:
            assert response.status == 200
            assert decoded(await response.read())["pools"] == {"default": "away: local"}

    async def is_counted() -> bool:
        views = await gateway.gateway.balance.views()
        return [(s.requests, s.in_flight) for v in views for s in v.services.values() if s.requests] == [(10, 0)]

    await eventually(is_counted)


async def test_a_draining_worker_is_not_ready_and_finishes_what_is_open(serve: Serve, upstream: Upstream) -> None:
    gateway = await serve(a_document(upstream.url), drain_delay_s=0.3, drain_timeout_s=5.0)
    gate = asyncio.Event()
    upstream.streams(openai_events(), gates={1: gate})
    async with gateway.chat(stream=True) as response:
        await response.content.readany()
        draining = asyncio.create_task(gateway.gateway.drain())
        async with aiohttp.ClientSession() as session, session.get(f"{gateway.url}/readyz") as probe:
            assert probe.status == 503
        gate.set()
        assert b"[DONE]" in await response.read()
    await draining


async def test_requests_are_served_while_a_scrape_is_written(gateway: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of thousands of services it is as long as some hundred requests together."""
    monkeypatch.setattr("balancer.store.slices.SLICE_S", 0.0)
    has_begun, is_answered = asyncio.Event(), False

    def exposing(*given: object, is_open: bool) -> Steps[bytes]:
        has_begun.set()
        for _ in range(1_000_000):
            if is_answered:
                return b"behind it"
            yield
        return b"before it"

    async def scraped() -> bytes:
        async with gateway.session.get(f"{gateway.url}/metrics") as response:
            return await response.read()

    monkeypatch.setattr("balancer.metrics.Metrics.exposing", exposing)
    scraping = asyncio.create_task(scraped())
    await has_begun.wait()
    async with gateway.chat() as response:
        assert response.status == 200
    is_answered = True
    assert await scraping == b"behind it"
