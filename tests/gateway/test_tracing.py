"""Traces: a span for each request and each attempt, the same whichever way it went, in the trace of its client."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from balancer import __version__
from tests.actors import STREAM_HEAD, Upstream, anthropic_events, chunk, openai_events, responses_events
from tests.gateway.told import Telling, telling
from tests.gateway.trails import WAYS, a_document, a_post
from tests.gateway.wire import a_line
from tests.otlp import Collector, Span
from tests.store.conftest import eventually

ERROR = b'{"error":{"message":"no","type":"server_error","code":"x"}}'
ONE_SERVICE: dict[str, Any] = {"services": [{"provider": "up", "model": "m"}], "retry": {"attempts": 1}}
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
CONTEXT = (f"traceparent: 00-{TRACE}-{PARENT}-01", "tracestate: vendor=t61rcWkgMzE", "baggage: user=alice")
Tell = Callable[[Upstream], None]


@pytest.fixture
async def collector() -> AsyncIterator[Collector]:
    async with Collector().running() as actor:
        yield actor


class Case(msgspec.Struct, kw_only=True):
    """A request, what the upstream does with it, and what its span and those of its attempts say."""

    ask: bytes = a_post("r1")
    upstream: Tell = lambda upstream: upstream.answers()
    rule: dict[str, Any] = {}
    provider: dict[str, Any] = {}
    flags: dict[str, Any] = {}
    request: dict[str, Any]
    status: str = "UNSET"
    attempts: list[dict[str, Any]] = []
    """What stands on each, with `name`, `status` and `events` of the span where they are not as usual."""


REQUEST = {
    "http.request.method": "POST",
    "http.route": "/v1/chat/completions",
    "http.response.status_code": 200,
    "client.address": "127.0.0.1",
    "balancer.request": "r1",
    "balancer.scenario": "openai",
    "balancer.rule": "gpt",
    "balancer.pool": "default",
    "balancer.service": "up:m",
    "balancer.reason": "streak",
    "balancer.outcome": "success",
    "balancer.attempts": 1,
}
ATTEMPT = {
    "http.request.method": "POST",
    "http.response.status_code": 200,
    "server.address": "127.0.0.1",
    "gen_ai.operation.name": "chat",
    "gen_ai.provider.name": "openai",
    "gen_ai.request.model": "m",
    "balancer.rule": "gpt",
    "balancer.pool": "default",
    "balancer.service": "up:m",
    "balancer.reason": "streak",
    "balancer.attempt": 1,
    "balancer.outcome": "success",
}
USAGE = {"gen_ai.usage.input_tokens": 11, "gen_ai.usage.output_tokens": 7}
ANSWER = USAGE | {
    "gen_ai.response.id": "c1",
    "gen_ai.response.model": "up-model",
    "gen_ai.response.finish_reasons": ["stop"],
}
STREAMED = USAGE | {"gen_ai.response.id": "c1", "gen_ai.response.model": "up-model", "gen_ai.request.stream": True}
OF_THE_MOMENT = ("balancer.decision", "server.port", "gen_ai.response.time_to_first_chunk")


def without(attributes: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in attributes.items() if name not in names}


REFUSED = without(REQUEST, "balancer.pool", "balancer.service", "balancer.reason", "balancer.rule") | {
    "balancer.attempts": 0,
    "balancer.outcome": "rejected",
}


def failing(status: int, *, then: bool = False, retry_after: str = "") -> Tell:
    def tell(upstream: Upstream) -> None:
        upstream.answers(status, ERROR, retry_after=retry_after)
        if then:
            upstream.then().answers()

    return tell


def failed(status: int, outcome: str, **more: Any) -> dict[str, Any]:
    told = {"http.response.status_code": status, "error.type": str(status), "balancer.outcome": outcome}
    return ATTEMPT | told | {"status": "ERROR"} | more


SECOND = {
    "balancer.service": "spare:m",
    "balancer.attempt": 2,
    "balancer.reason": "retry",
    "http.request.resend_count": 1,
}
CASES: dict[str, Case] = {
    "an answer": Case(request=REQUEST, attempts=[ATTEMPT | ANSWER]),
    "an answer by older conventions": Case(
        flags={"otel_semconv": "1.36"},
        request=REQUEST,
        attempts=[without(ATTEMPT, "gen_ai.provider.name") | {"gen_ai.system": "openai"} | ANSWER],
    ),
    "an answer in chunks": Case(
        upstream=lambda upstream: upstream.answers(chunked=True), request=REQUEST, attempts=[ATTEMPT | ANSWER]
    ),
    "a stream": Case(
        ask=a_post("r1", stream=True),
        upstream=lambda upstream: upstream.streams(openai_events()),
        request=REQUEST,
        attempts=[ATTEMPT | STREAMED | {"events": ["balancer.first_token"]}],
    ),
    "a stream of the other dialect": Case(
        ask=a_post("r1", path="/claude_code/v1/messages", model="claude", stream=True),
        upstream=lambda upstream: upstream.streams(anthropic_events()),
        request=REQUEST
        | {
            "http.route": "/v1/messages",
            "balancer.scenario": "claude_code",
            "balancer.rule": "code",
            "balancer.service": "ant:m",
        },
        attempts=[
            ATTEMPT
            | STREAMED
            | {
                "gen_ai.provider.name": "anthropic",
                "gen_ai.response.id": "m1",
                "gen_ai.response.finish_reasons": ["end_turn"],
                "balancer.rule": "code",
                "balancer.service": "ant:m",
                "events": ["balancer.first_token"],
            }
        ],
    ),
    "a stream of another api than the client's": Case(
        ask=a_post("r1", stream=True, messages=[{"role": "user", "content": "hello"}]),
        upstream=lambda upstream: upstream.streams(anthropic_events()),
        rule={"services": [{"provider": "ant", "model": "m"}]},
        request=REQUEST | {"balancer.service": "ant:m"},
        attempts=[
            ATTEMPT
            | STREAMED
            | {
                "gen_ai.provider.name": "anthropic",
                "gen_ai.response.id": "m1",
                "gen_ai.response.finish_reasons": ["end_turn"],
                "balancer.service": "ant:m",
                "balancer.translated_to": "messages",
                "events": ["balancer.first_token"],
            }
        ],
    ),
    "a stream of responses": Case(
        ask=a_post("r1", path="/v1/responses", stream=True),
        upstream=lambda upstream: upstream.streams(responses_events()),
        request=REQUEST | {"http.route": "/v1/responses"},
        attempts=[
            without(ATTEMPT | STREAMED, "gen_ai.response.model")
            | {
                "gen_ai.response.id": "resp_1",
                "gen_ai.response.finish_reasons": ["completed"],
                "events": ["balancer.first_token"],
            }
        ],
    ),
    "tokens out of a cache": Case(
        ask=a_post("r1", path="/v1/messages", model="claude"),
        upstream=lambda upstream: upstream.answers(
            body=b'{"usage":{"input_tokens":11,"cache_read_input_tokens":3,"cache_creation_input_tokens":2,'
            b'"output_tokens":7}}'
        ),
        request=REQUEST
        | {
            "http.route": "/v1/messages",
            "balancer.scenario": "anthropic",
            "balancer.rule": "claude",
            "balancer.service": "ant:m",
        },
        attempts=[
            ATTEMPT
            | {
                "gen_ai.provider.name": "anthropic",
                "balancer.rule": "claude",
                "balancer.service": "ant:m",
                "gen_ai.usage.input_tokens": 16,
                "gen_ai.usage.cache_read.input_tokens": 3,
                "gen_ai.usage.cache_creation.input_tokens": 2,
                "gen_ai.usage.output_tokens": 7,
            }
        ],
    ),
    "a second try": Case(
        upstream=failing(500, then=True),
        request=REQUEST | {"balancer.attempts": 2, "balancer.service": "spare:m", "balancer.reason": "retry"},
        attempts=[failed(500, "failed"), ATTEMPT | SECOND | ANSWER],
    ),
    "a limit and a second try": Case(
        upstream=failing(429, then=True, retry_after="9"),
        request=REQUEST | {"balancer.attempts": 2, "balancer.service": "spare:m", "balancer.reason": "retry"},
        attempts=[
            failed(429, "rate_limited", **{"balancer.cooldown_ms": 9000}),
            ATTEMPT | SECOND | ANSWER,
        ],
    ),
    "the last failure": Case(
        upstream=failing(500),
        rule=ONE_SERVICE,
        request=REQUEST | {"http.response.status_code": 500, "error.type": "500", "balancer.outcome": "failed"},
        status="ERROR",
        attempts=[failed(500, "failed")],
    ),
    "the client's own fault": Case(
        upstream=failing(400),
        rule=ONE_SERVICE,
        request=REQUEST | {"http.response.status_code": 400, "balancer.outcome": "rejected"},
        attempts=[failed(400, "rejected")],
    ),
    "an upstream that is silent": Case(
        upstream=lambda upstream: upstream.stalls(),
        rule=ONE_SERVICE,
        provider={"timeouts": {"headers_s": 0.1}},
        request=REQUEST
        | {"http.response.status_code": 504, "error.type": "upstream_timeout", "balancer.outcome": "failed"},
        status="ERROR",
        attempts=[
            without(ATTEMPT, "http.response.status_code")
            | {"error.type": "upstream_timeout", "balancer.outcome": "failed", "status": "ERROR"}
        ],
    ),
    "an upstream that hangs up": Case(
        upstream=lambda upstream: upstream.sends(b"HTTP/1.1 200"),
        rule=ONE_SERVICE,
        request=REQUEST
        | {"http.response.status_code": 502, "error.type": "upstream_unreachable", "balancer.outcome": "failed"},
        status="ERROR",
        attempts=[
            without(ATTEMPT, "http.response.status_code")
            | {"error.type": "upstream_unreachable", "balancer.outcome": "failed", "status": "ERROR"}
        ],
    ),
    "a stream that is cut": Case(
        ask=a_post("r1", stream=True),
        upstream=lambda upstream: upstream.sends(STREAM_HEAD, chunk(openai_events()[0]), resets=True),
        rule=ONE_SERVICE,
        request=REQUEST | {"error.type": "failed", "balancer.outcome": "failed"},
        status="ERROR",
        attempts=[
            without(ATTEMPT | STREAMED, *USAGE)
            | {
                "error.type": "failed",
                "balancer.outcome": "failed",
                "status": "ERROR",
                "events": ["balancer.first_token"],
            }
        ],
    ),
    "a model that is not known": Case(
        ask=a_post("r1", model="what"), request=REFUSED | {"http.response.status_code": 404}
    ),
    "no JSON": Case(ask=a_post("r1", body=b"{what"), request=REFUSED | {"http.response.status_code": 400}),
    "no credential": Case(
        flags={"client_tokens": "a-token-of-ours"}, request=REFUSED | {"http.response.status_code": 401}
    ),
    "a body that is too long": Case(
        flags={"max_body_bytes": 20},
        request=REFUSED | {"http.response.status_code": 413},
    ),
    "nothing that is active": Case(
        rule={"services": [{"provider": "up", "model": "m", "active": False}]},
        request=REFUSED
        | {
            "balancer.outcome": "failed",
            "http.response.status_code": 503,
            "error.type": "no_service_available",
        },
        status="ERROR",
    ),
    "tokens to be counted": Case(
        ask=a_post("r1", path="/v1/messages/count_tokens", model="claude"),
        request=without(REQUEST, "balancer.pool", "balancer.reason")
        | {
            "http.route": "/v1/messages/count_tokens",
            "balancer.scenario": "anthropic",
            "balancer.rule": "claude",
            "balancer.service": "ant:m",
        },
        attempts=[
            {
                "name": "POST /v1/messages/count_tokens",
                "http.request.method": "POST",
                "http.response.status_code": 200,
                "server.address": "127.0.0.1",
                "balancer.service": "ant:m",
                "balancer.attempt": 1,
            }
        ],
    ),
}


def a_traced_document(url: str, case: Case) -> dict[str, Any]:
    document = a_document(url, rule=case.rule, **case.provider)
    services = [{"provider": "ant", "model": "m"}]
    code = {"uuid": "code", "scenario": "claude_code", "request_model": "claude", "services": services}
    return document | {"rules": [*document["rules"], code]}


def lasting(span: Span) -> dict[str, Any]:
    return without(span.attributes, *OF_THE_MOMENT)


@pytest.mark.parametrize("name", CASES)
async def test_a_request_and_each_of_its_attempts_have_a_span(
    store_url: str, tmp_path: Path, upstream: Upstream, collector: Collector, name: str
) -> None:
    case = CASES[name]
    for way in WAYS:
        case.upstream(upstream)
        collector.spans.clear()
        upstream.received.clear()
        before = time.time_ns()
        async with telling(
            store_url, tmp_path, a_traced_document(upstream.url, case), way, collector, **case.flags
        ) as told:
            (answer,) = await told.walk.ask(case.ask)
            *attempts, request = await told.spans(1 + len(case.attempts))
            line = await told.line()
        assert (request.kind, request.parent) == ("SERVER", ""), way
        assert request.name == f"POST {case.request['http.route']}"
        assert lasting(request) == case.request, way
        assert request.status == case.status
        assert request.attributes.get("balancer.decision") == answer.header("x-balancer-decision")
        assert line["trace"] == request.trace
        assert before < request.began_ns < request.ended_ns < time.time_ns()
        for span, expected, received in zip(attempts, case.attempts, upstream.received, strict=True):
            expected = {"name": "chat m", "status": "UNSET", "events": []} | expected
            assert lasting(span) | {"name": span.name, "status": span.status, "events": span.events} == expected, way
            assert (span.kind, span.trace, span.parent) == ("CLIENT", request.trace, request.id)
            assert request.began_ns <= span.began_ns <= span.ended_ns <= request.ended_ns
            assert received.header("traceparent") == f"00-{request.trace}-{span.id}-01"
            assert received.header("tracestate") is None
        assert len({span.id for span in collector.spans}) == len(collector.spans)


@pytest.mark.parametrize("way", WAYS)
async def test_the_client_s_trace_goes_on(
    store_url: str, tmp_path: Path, upstream: Upstream, collector: Collector, way: str
) -> None:
    async with telling(store_url, tmp_path, a_document(upstream.url), way, collector) as told:
        failing(500, then=True)(upstream)
        for number in (1, 2):  # The second has a head that is known.
            await told.walk.ask(a_post(f"r{number}", *CONTEXT))
        spans = await told.spans(5)

    assert {span.trace for span in spans} == {TRACE}
    assert {span.state for span in spans} == {"vendor=t61rcWkgMzE"}
    assert [span.parent for span in spans if span.kind == "SERVER"] == [PARENT, PARENT]
    sent = [one.header("traceparent") for one in upstream.received]
    assert sent == [f"00-{TRACE}-{span.id}-01" for span in spans if span.kind == "CLIENT"]
    assert [one.header("tracestate") for one in upstream.received] == ["vendor=t61rcWkgMzE"] * 3
    assert [one.header("baggage") for one in upstream.received] == [None] * 3


@pytest.mark.parametrize("way", WAYS)
async def test_a_trace_that_its_client_does_not_keep_is_not_kept(
    store_url: str, tmp_path: Path, upstream: Upstream, collector: Collector, way: str
) -> None:
    async with telling(store_url, tmp_path, a_document(upstream.url), way, collector) as told:
        await told.walk.ask(a_post("r1", f"traceparent: 00-{TRACE}-{PARENT}-00"))
        await told.walk.ask(a_post("r2"))
        request = (await told.spans(2))[-1]
        lines = await told.lines(2)

    assert request.attributes["balancer.request"] == "r2"
    assert ["trace" in line for line in lines] == [False, True]
    first = upstream.received[0].header("traceparent")
    assert first is not None
    assert first.startswith(f"00-{TRACE}-")
    assert first.endswith("-00")
    assert PARENT not in first


@pytest.mark.parametrize(
    "given",
    [f"00-{'0' * 32}-{PARENT}-01", f"ff-{TRACE}-{PARENT}-01", "what", f"00-{TRACE}-{PARENT}", f"00-{TRACE.upper()}-1"],
)
async def test_a_context_that_means_nothing_begins_a_trace(
    store_url: str, tmp_path: Path, upstream: Upstream, collector: Collector, given: str
) -> None:
    async with telling(store_url, tmp_path, a_document(upstream.url), "express", collector) as told:
        await told.walk.ask(a_post("r1", f"traceparent: {given}", "tracestate: a=b"))
        _, request = await told.spans(2)

    assert request.parent == ""
    assert request.trace != TRACE
    assert upstream.last.header("tracestate") is None


@pytest.mark.parametrize("state", ["A SECRET", "a=1,a=2,secret=", ",".join(f"secret{n}=1" for n in range(40))])
async def test_a_state_that_means_nothing_is_not_told_of(
    store_url: str,
    tmp_path: Path,
    upstream: Upstream,
    collector: Collector,
    caplog: pytest.LogCaptureFixture,
    state: str,
) -> None:
    """OpenTelemetry warned of each, with the client's text: a line that says what clients like, at every request."""
    async with telling(store_url, tmp_path, a_document(upstream.url), "express", collector) as told:
        await told.walk.ask(a_post("r1", CONTEXT[0], f"tracestate: {state}"))
        _, request = await told.spans(2)

    assert (request.trace, request.state) == (TRACE, "")
    assert [record.getMessage() for record in caplog.records if record.name.startswith("opentelemetry")] == []


@pytest.mark.parametrize("way", WAYS)
async def test_without_tracing_the_client_s_context_passes(
    store_url: str, tmp_path: Path, upstream: Upstream, way: str
) -> None:
    async with telling(store_url, tmp_path, a_document(upstream.url), way) as told:
        await told.walk.ask(a_post("r1", *CONTEXT))

    assert [f"{name}: {upstream.last.header(name)}" for name in ("traceparent", "tracestate", "baggage")] == [*CONTEXT]


async def test_the_standard_variables_say_what_is_sampled_and_where_from(
    store_url: str, tmp_path: Path, upstream: Upstream, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_traceidratio")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "0.25")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "gateway-of-tests")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "api-key=of-the-collector")
    async with telling(store_url, tmp_path, a_document(upstream.url), "express", collector) as told:
        for number in range(100):
            await told.walk.ask(a_post(f"r{number}"))
        lines = await told.lines(100)

    kept = [line["request"] for line in lines if "trace" in line]
    assert 5 < len(kept) < 60
    assert sorted(kept) == sorted(span.attributes["balancer.request"] for span in collector.of("SERVER"))
    resource = collector.spans[0].resource
    assert resource["service.name"] == "gateway-of-tests"
    assert resource["deployment.environment.name"] == "test"
    assert resource["service.version"] == __version__
    assert resource["service.instance.id"] == told.walk.gateway.balance.worker
    assert collector.requests[0].header("api-key") == "of-the-collector"
    assert collector.spans[0].scope == "balancer"
    assert collector.spans[0].schema.endswith("/1.41.0")


@pytest.mark.parametrize("way", WAYS)
async def test_a_sampler_that_fails_costs_no_request(
    store_url: str,
    tmp_path: Path,
    upstream: Upstream,
    collector: Collector,
    way: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("no sampling today")

    async with telling(store_url, tmp_path, a_document(upstream.url), way, collector) as told:
        monkeypatch.setattr(told.walk.gateway._tracing, "_sample", fails)
        (answer,) = await told.walk.ask(a_post("r1", *CONTEXT))
        (line,) = await told.lines(1)

    assert (answer.status, line["status"], "trace" in line) == (200, 200, False)
    assert "a trace could not begin" in caplog.text


@pytest.mark.parametrize("way", WAYS)
async def test_who_leaves_ends_its_spans(
    store_url: str, tmp_path: Path, upstream: Upstream, collector: Collector, way: str
) -> None:
    async with telling(store_url, tmp_path, a_document(upstream.url), way, collector) as told:
        upstream.stalls()
        async with a_line(told.walk.url) as line:
            await line.send(a_post("before"))
            await upstream.stalled.wait()
        attempt, request = await told.spans(2)

    assert request.attributes["balancer.outcome"] == attempt.attributes["balancer.outcome"] == "cancelled"
    assert "http.response.status_code" not in request.attributes
    assert (request.status, attempt.status) == ("UNSET", "UNSET")
    assert attempt.parent == request.id


async def test_a_collector_in_trouble_touches_no_request(
    store_url: str,
    tmp_path: Path,
    upstream: Upstream,
    collector: Collector,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "8")
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "4")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    async with telling(store_url, tmp_path, a_document(upstream.url), "express", collector) as told:
        collector.status = 400
        await _ask(told, 3)
        await collector.came.wait()
        collector.status = 200
        collector.gate.clear()
        await _ask(told, 50)  # More than the queue holds.
        collector.gate.set()
        assert len(await told.lines(53)) == 53

    assert len(collector.spans) <= 2 * 50
    assert "dropping" in caplog.text.lower()


async def _ask(told: Telling, count: int) -> None:
    for _ in range(count):
        began = time.monotonic()
        (answer,) = await told.walk.ask(a_post())
        assert answer.status == 200
        assert time.monotonic() - began < 1


async def test_what_is_left_is_exported_when_the_gateway_drains(
    store_url: str, tmp_path: Path, upstream: Upstream, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with telling(store_url, tmp_path, a_document(upstream.url), "express", collector) as told:
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "60000")
        await _ask(told, 20)

    assert len(collector.of("SERVER")) == len(collector.of("CLIENT")) == 20


async def test_a_collector_that_hangs_does_not_hold_up_the_drain(
    store_url: str, tmp_path: Path, upstream: Upstream, collector: Collector, caplog: pytest.LogCaptureFixture
) -> None:
    async with telling(
        store_url, tmp_path, a_document(upstream.url), "express", collector, drain_timeout_s=0.6
    ) as told:
        collector.gate.clear()
        await _ask(told, 3)
        await collector.came.wait()
        began = time.monotonic()
    took_s = time.monotonic() - began
    collector.gate.set()

    assert took_s < 2
    assert "the last spans are not exported" in caplog.text


async def test_a_fault_of_ours_is_logged_with_the_request_and_its_trace(
    store_url: str, tmp_path: Path, upstream: Upstream, collector: Collector, caplog: pytest.LogCaptureFixture
) -> None:
    async with telling(store_url, tmp_path, a_document(upstream.url), "express", collector) as told:
        document = a_document(upstream.url, token="${A_TOKEN_THAT_NOBODY_HAS_SET}")
        await told.walk.publishes(document, is_heard=True)

        async def is_heard() -> bool:
            return told.walk.gateway.balance.directory.revision > 1

        await eventually(is_heard)
        (answer,) = await told.walk.ask(a_post("r1"))
        request = (await told.spans(3))[-1]

    assert answer.status == 500
    facts = [
        getattr(record, "facts", {}) for record in caplog.records if "configuration does not give" in record.message
    ]
    assert {(fact["request"], fact["trace"]) for fact in facts} == {("r1", request.trace)}
    await asyncio.sleep(0)
