"""The access log: one line for each request, the same whichever way it went, also for what is refused early."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.actors import STREAM_HEAD, Upstream, anthropic_events, chunk, openai_events
from tests.faults import FaultProxy
from tests.gateway.told import OF_THE_MOMENT, telling
from tests.gateway.trails import WAYS, a_document, a_post
from tests.gateway.wire import a_line
from tests.store.conftest import eventually

ERROR = b'{"error":{"message":"no","type":"server_error","code":"x"}}'
ONE_SERVICE: dict[str, Any] = {"services": [{"provider": "up", "model": "m"}], "retry": {"attempts": 1}}
Tell = Callable[[Upstream], None]
ANSWERED = {
    "event": "request",
    "request": "r1",
    "method": "POST",
    "path": "/v1/chat/completions",
    "scenario": "openai",
    "rule": "gpt",
    "pool": "default",
    "service": "up:m",
    "status": 200,
    "outcome": "success",
    "attempts": 1,
    "stream": False,
    "input_tokens": 11,
    "output_tokens": 7,
}
REFUSED = {
    "event": "request",
    "request": "r1",
    "method": "POST",
    "path": "/v1/chat/completions",
    "scenario": "openai",
    "outcome": "rejected",
    "attempts": 0,
    "stream": False,
}


class Case(msgspec.Struct, kw_only=True):
    """A request, what the upstream does with it, and what the line says, but for what is of the moment."""

    line: dict[str, Any]
    ask: bytes = a_post("r1")
    upstream: Tell = lambda upstream: upstream.answers()
    rule: dict[str, Any] = {}
    provider: dict[str, Any] = {}
    flags: dict[str, Any] = {}


def failing(status: int, *, then: bool = False) -> Tell:
    def tell(upstream: Upstream) -> None:
        upstream.answers(status, ERROR)
        if then:
            upstream.then().answers()

    return tell


STREAM = b"".join(openai_events())
CUT = openai_events()[0]
CASES: dict[str, Case] = {
    "an answer": Case(line=ANSWERED),
    "all kinds of tokens": Case(
        upstream=lambda upstream: upstream.answers(
            body=b'{"usage":{"prompt_tokens":50,"prompt_tokens_details":{"cached_tokens":20},"completion_tokens":30,'
            b'"completion_tokens_details":{"reasoning_tokens":10}}}'
        ),
        line=ANSWERED | {"input_tokens": 50, "cached_tokens": 20, "output_tokens": 30, "reasoning_tokens": 10},
    ),
    "a path with a scenario, and a query": Case(
        ask=a_post("r1", path="/tingly/openai/v1/chat/completions?key=secret"), line=ANSWERED
    ),
    "a path that no vendor has": Case(ask=a_post("r1", path="/v1/something/else"), line=ANSWERED | {"path": "_OTHER"}),
    "a stream": Case(
        ask=a_post("r1", stream=True, stream_options={"include_usage": True}),
        upstream=lambda upstream: upstream.streams(openai_events()),
        line=ANSWERED | {"stream": True},
    ),
    "a stream of the other dialect": Case(
        ask=a_post("r1", path="/v1/messages", model="claude", stream=True),
        upstream=lambda upstream: upstream.streams(anthropic_events()),
        line=ANSWERED
        | {
            "path": "/v1/messages",
            "scenario": "anthropic",
            "rule": "claude",
            "service": "ant:m",
            "stream": True,
            "bytes_out": len(b"".join(anthropic_events())),
        },
    ),
    "a second try": Case(upstream=failing(500, then=True), line=ANSWERED | {"attempts": 2, "service": "spare:m"}),
    "the last failure": Case(
        upstream=failing(500),
        rule=ONE_SERVICE,
        line={k: v for k, v in ANSWERED.items() if "tokens" not in k} | {"status": 500, "outcome": "failed"},
    ),
    "a limit of the upstream's": Case(
        upstream=failing(429),
        rule=ONE_SERVICE,
        line={k: v for k, v in ANSWERED.items() if "tokens" not in k} | {"status": 429, "outcome": "rate_limited"},
    ),
    "a rule that stands in": Case(
        rule={"services": [{"provider": "up", "model": "m", "limits": {"tpm": 4}}], "fallback": ["other"]},
        line=ANSWERED | {"service": "spare:m", "fallback": "other"},
    ),
    "a limit of ours": Case(
        rule={"services": [{"provider": "up", "model": "m", "limits": {"tpm": 4}}]},
        line=REFUSED | {"status": 429, "outcome": "rate_limited", "rule": "gpt", "error": "rate_limit_exceeded"},
    ),
    "an upstream that is silent": Case(
        upstream=lambda upstream: upstream.stalls(),
        rule=ONE_SERVICE,
        provider={"timeouts": {"headers_s": 0.1}},
        line={k: v for k, v in ANSWERED.items() if "tokens" not in k}
        | {"status": 504, "outcome": "failed", "error": "upstream_timeout"},
    ),
    "a stream that is cut": Case(
        ask=a_post("r1", stream=True),
        upstream=lambda upstream: upstream.sends(STREAM_HEAD, chunk(CUT), resets=True),
        rule=ONE_SERVICE,
        line={k: v for k, v in ANSWERED.items() if "tokens" not in k} | {"outcome": "failed", "stream": True},
    ),
    "a model that is not known": Case(
        ask=a_post("r1", model="what"), line=REFUSED | {"status": 404, "error": "model_not_found"}
    ),
    "no JSON": Case(
        ask=a_post("r1", body=b"{what"),
        line=REFUSED
        | {
            "status": 400,
            "error": "invalid_request",
        },
    ),
    "no credential": Case(
        flags={"client_tokens": "a-token-of-ours"}, line=REFUSED | {"status": 401, "error": "invalid_api_key"}
    ),
    "a body that is too long": Case(
        flags={"max_body_bytes": 20}, line=REFUSED | {"status": 413, "error": "request_too_large", "bytes_in": 0}
    ),
    "a path that is not served": Case(
        ask=a_post("r1", path="/v2/secret-of-a-client"),
        line={k: v for k, v in REFUSED.items() if k != "scenario"}
        | {"status": 404, "error": "not_found", "path": "_OTHER"},
    ),
    "a list of models": Case(
        ask=b"GET /v1/models HTTP/1.1\r\nHost: x\r\nx-request-id: r1\r\n\r\n",
        line=REFUSED | {"method": "GET", "path": "/v1/models", "status": 200, "outcome": "success", "bytes_in": 0},
    ),
    "tokens to be counted": Case(
        ask=a_post("r1", path="/v1/messages/count_tokens", model="claude"),
        line=REFUSED
        | {
            "path": "/v1/messages/count_tokens",
            "scenario": "anthropic",
            "rule": "claude",
            "service": "ant:m",
            "status": 200,
            "outcome": "success",
            "attempts": 1,
        },
    ),
}


def a_watched_document(url: str, case: Case) -> dict[str, Any]:
    document = a_document(url, rule=case.rule, **case.provider)
    other = {"uuid": "other", "request_model": "other", "services": [{"provider": "spare", "model": "m"}]}
    return document | {"rules": [*document["rules"], other]}


def lasting(line: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if name not in OF_THE_MOMENT}


@pytest.mark.parametrize("name", CASES)
async def test_a_request_has_one_line_that_says_what_became_of_it(
    store_url: str, tmp_path: Path, upstream: Upstream, name: str
) -> None:
    case = CASES[name]
    for way in WAYS:
        case.upstream(upstream)
        async with telling(store_url, tmp_path, a_watched_document(upstream.url, case), way, **case.flags) as told:
            (answer,) = await told.walk.ask(case.ask)
            line = await told.line()
        sizes = {"bytes_in": len(case.ask.partition(b"\r\n\r\n")[2]), "bytes_out": len(answer.body)}
        expected = sizes | case.line
        assert lasting(line) == expected, way
        assert line["client"] == "127.0.0.1"
        assert ("decision" in line) == ("pool" in case.line)
        if "decision" in line:
            assert line["decision"] == answer.header("x-balancer-decision")
            assert 0 < line["upstream_ms"] <= line["duration_ms"]
            assert 0 < line["select_ms"] < line["duration_ms"]


@pytest.mark.parametrize("way", WAYS)
async def test_who_leaves_has_a_line_too(store_url: str, tmp_path: Path, upstream: Upstream, way: str) -> None:
    async with telling(store_url, tmp_path, a_document(upstream.url), way) as told:
        upstream.stalls()
        async with a_line(told.walk.url) as line:
            await line.send(a_post("before"))
            await upstream.stalled.wait()
        (before,) = await told.lines(1)
        gate = asyncio.Event()
        upstream.streams(openai_events(), gates={2: gate})
        async with a_line(told.walk.url) as line:
            await line.send(a_post("amid", stream=True))

            async def has_come() -> bool:
                return b"w1" in line.held

            await eventually(has_come)
        _, amid = await told.lines(2)

    assert (before["request"], before["status"], before["outcome"], before["bytes_out"]) == (
        "before",
        499,
        "cancelled",
        0,
    )
    assert (amid["request"], amid["status"], amid["outcome"], amid["stream"]) == ("amid", 200, "cancelled", True)
    assert amid["bytes_out"] == sum(map(len, openai_events()[:2]))
    assert amid["first_token_ms"] > 0


@pytest.mark.parametrize("way", WAYS)
async def test_what_is_no_request_has_a_line_without_any_of_it(
    store_url: str, tmp_path: Path, upstream: Upstream, way: str
) -> None:
    async with telling(store_url, tmp_path, a_document(upstream.url), way) as told:
        (answer,) = await told.walk.ask(b"SECRET /a-secret HTTP/1.1\r\nHost: x\r\na secret\r\n\r\n")
        line = await told.line()

    assert answer.status == 400
    assert (line["status"], line["error"], line["method"], line["path"]) == (400, "invalid_request", "_OTHER", "_OTHER")
    assert line["request"] == answer.header("x-request-id")
    assert "secret" not in str(line).lower()


async def test_probes_and_scrapes_have_no_line(store_url: str, tmp_path: Path, upstream: Upstream) -> None:
    async with telling(store_url, tmp_path, a_document(upstream.url)) as told:
        for path in ("/healthz", "/readyz", "/metrics"):
            async with told.walk.session.get(told.walk.url + path) as response:
                assert response.status == 200
        await told.walk.ask(a_post("r1"))
        assert (await told.line())["request"] == "r1"


async def test_lines_are_written_when_the_gateway_drains(store_url: str, tmp_path: Path, upstream: Upstream) -> None:
    async with telling(store_url, tmp_path, a_document(upstream.url)) as told:
        for number in range(20):
            await told.walk.ask(a_post(f"r{number}"))

    lines = [msgspec.json.decode(line) for line in told.file.read_bytes().splitlines()]
    assert [line["request"] for line in lines] == [f"r{number}" for number in range(20)]


async def test_a_pick_without_redis_is_marked(store_url: str, tmp_path: Path, upstream: Upstream) -> None:
    async with (
        FaultProxy(store_url, tmp_path / "p.sock").running() as proxy,
        telling(store_url, tmp_path, a_document(upstream.url), redis_url=proxy.url) as told,
    ):
        await told.walk.ask(a_post("r1"))
        proxy.refuses()
        await eventually(told.is_alone)
        (answer,) = await told.walk.ask(a_post("r2"))
        lines = await told.lines(2)
        proxy.passes()

    assert answer.header("x-balancer-degraded") == "store"
    assert [line.get("degraded", False) for line in lines] == [False, True]


async def test_without_it_nothing_is_watched(store_url: str, tmp_path: Path, upstream: Upstream) -> None:
    async with telling(store_url, tmp_path, a_document(upstream.url), access_log=False) as told:
        await told.walk.ask(a_post("r1"))
        (way,) = told.walk.trail.ways
        assert type(way).__name__ == "Way"

    assert told.file.read_bytes() == b""
