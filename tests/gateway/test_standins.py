"""Rules that stand in for another: when that has no candidate, or when the prompt is too long for it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.actors import OPENAI_JSON, Upstream, openai_events
from tests.gateway.conftest import Serve, Served, decoded
from tests.gateway.pairs import counted, requests_total, settled

TOO_LONG = b'{"error":{"message":"too long","type":"invalid_request_error","code":"context_length_exceeded"}}'


@pytest.fixture
async def other() -> AsyncIterator[Upstream]:
    """A second scripted upstream."""
    async with Upstream().running() as actor:
        yield actor


def a_document(one: Upstream, two: Upstream, *, first: dict[str, Any], **rules: dict[str, Any]) -> dict[str, Any]:
    """Rule `first` over `a:m` at the first upstream; others, over `b:m` at the second unless they say otherwise."""

    def provider(name: str, at: Upstream, style: str = "openai") -> dict[str, Any]:
        return {"name": name, "api_style": style, "api_base": at.url, "no_key_required": True}

    def rule(name: str, service: str, more: dict[str, Any]) -> dict[str, Any]:
        base = {"uuid": name, "request_model": name, "retry": {"backoff_ms": 1}}
        return base | {"services": [{"provider": service, "model": f"{service}-model"}]} | more

    return {
        "providers": [provider("a", one), provider("b", two), provider("ant", two, "anthropic")],
        "rules": [rule("first", "a", first), *(rule(name, "b", more) for name, more in rules.items())],
    }


async def ask(gateway: Served, **more: Any) -> tuple[int, Any, Any]:
    """Status, headers and body."""
    body = {"model": "first", "messages": []} | more
    async with gateway.session.post(f"{gateway.url}/v1/chat/completions", json=body) as response:
        return response.status, response.headers, await response.read()


async def test_when_every_service_failed_another_rule_stands_in(
    serve: Serve, upstream: Upstream, other: Upstream
) -> None:
    gateway = await serve(a_document(upstream, other, first={"fallback": ["second"]}, second={"pool": "elsewhere"}))
    upstream.answers(500, b"{}")
    status, headers, body = await ask(gateway)
    assert (status, body) == (200, OPENAI_JSON)
    assert (headers["x-balancer-attempts"], headers["x-balancer-service"]) == ("2", "b:b-model")
    assert headers["x-balancer-decision"].startswith("elsewhere.")
    assert json.loads(other.last.body)["model"] == "b-model"
    assert counted(gateway.gateway.metrics.attempts) == {
        ("default", "first", "a:a-model", "failed"): 1,
        ("elsewhere", "second", "b:b-model", "success"): 1,
    }
    assert requests_total(gateway) == {("first", "success"): 1}


async def test_when_a_rule_has_no_candidate_at_first_another_stands_in_at_once(
    serve: Serve, upstream: Upstream, other: Upstream
) -> None:
    raw = a_document(upstream, other, first={"fallback": ["second"]}, second={})
    raw["rules"][0]["services"][0]["limits"] = {"rpm": 1}
    gateway = await serve(raw)
    assert (await ask(gateway))[1]["x-balancer-service"] == "a:a-model"
    status, headers, _ = await ask(gateway)
    assert (status, headers["x-balancer-service"], headers["x-balancer-attempts"]) == (200, "b:b-model", "1")
    assert await settled(gateway) == {("a:a-model", "success"): 1, ("b:b-model", "success"): 1}


async def test_when_none_that_stands_in_has_a_candidate_the_asked_rule_s_reason_is_told(
    serve: Serve, upstream: Upstream, other: Upstream
) -> None:
    raw = a_document(upstream, other, first={"fallback": ["second"]}, second={})
    for rule in raw["rules"]:
        rule["services"][0]["limits"] = {"rpm": 1}
    gateway = await serve(raw)
    assert [(await ask(gateway))[0] for _ in range(2)] == [200, 200]
    status, headers, body = await ask(gateway)
    assert (status, decoded(body)["error"]["code"]) == (429, "rate_limit_exceeded")
    assert "rule first" in decoded(body)["error"]["message"]
    assert int(headers["Retry-After"]) >= 1


async def test_a_service_is_tried_once_whichever_rules_have_it(
    serve: Serve, upstream: Upstream, other: Upstream
) -> None:
    rules: Any = {"second": {"fallback": ["third"]}, "third": {}}
    rules["third"]["services"] = [{"provider": name, "model": f"{name}-model"} for name in ("a", "b")]
    gateway = await serve(a_document(upstream, other, first={"fallback": ["second", "third"]}, **rules))
    upstream.answers(500, b"first")
    other.answers(503, b"second")
    status, headers, body = await ask(gateway)
    assert (status, headers["x-balancer-attempts"], body) == (503, "2", b"second")
    assert (len(upstream.received), len(other.received)) == (1, 1)


async def test_a_rule_that_the_client_s_dialect_cannot_use_is_passed_over(
    serve: Serve, upstream: Upstream, other: Upstream
) -> None:
    rules: Any = {"foreign": {"services": [{"provider": "ant", "model": "c"}]}, "off": {"active": False}, "second": {}}
    gateway = await serve(a_document(upstream, other, first={"fallback": list(rules)}, **rules))
    upstream.answers(500, b"{}")
    status, headers, _ = await ask(gateway)
    assert (status, headers["x-balancer-service"]) == (200, "b:b-model")
    assert [request.target for request in other.received] == ["/v1/chat/completions"]


async def test_the_client_sees_the_model_s_name_of_the_rule_it_asked_for(
    serve: Serve, upstream: Upstream, other: Upstream
) -> None:
    first = {"fallback": ["second"], "response_model": "house"}
    gateway = await serve(a_document(upstream, other, first=first, second={"response_model": "spare"}))
    upstream.answers(500, b"{}")
    assert decoded((await ask(gateway))[2])["model"] == "house"


async def test_a_prompt_that_is_too_long_goes_on_under_the_rule_for_long_ones(
    serve: Serve, upstream: Upstream, other: Upstream
) -> None:
    gateway = await serve(a_document(upstream, other, first={"on_context_overflow": "long"}, long={}))
    upstream.answers(400, TOO_LONG)
    other.streams(openai_events())
    more = {"stream": True, "stream_options": {"include_usage": True}}
    status, headers, body = await ask(gateway, **more)
    assert (status, body, headers["x-balancer-attempts"]) == (200, b"".join(openai_events()), "2")
    assert await settled(gateway) == {("a:a-model", "rejected"): 1, ("b:b-model", "success"): 1}


async def test_a_prompt_that_is_too_long_for_that_one_too_is_told(
    serve: Serve, upstream: Upstream, other: Upstream
) -> None:
    gateway = await serve(a_document(upstream, other, first={"on_context_overflow": "long"}, long={}))
    upstream.answers(400, TOO_LONG)
    other.answers(400, TOO_LONG.replace(b"too long", b"far too long"))
    status, headers, body = await ask(gateway)
    assert (status, headers["x-balancer-attempts"]) == (400, "2")
    assert decoded(body)["error"]["message"] == "far too long"


async def test_when_the_rule_for_long_prompts_has_no_candidate_the_rejection_is_told(
    serve: Serve, upstream: Upstream, other: Upstream
) -> None:
    raw = a_document(upstream, other, first={"on_context_overflow": "long"}, long={})
    raw["rules"][1]["services"][0]["limits"] = {"rpm": 1}
    gateway = await serve(raw)
    upstream.answers(400, TOO_LONG)
    assert (await ask(gateway))[0] == 200
    status, headers, body = await ask(gateway)
    assert (status, headers["x-balancer-attempts"], body) == (400, "1", TOO_LONG)
