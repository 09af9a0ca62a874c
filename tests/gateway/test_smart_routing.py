"""Smart routing on the way of a request: the entry that it matches serves it, with a state of its own."""

from __future__ import annotations

import json
from typing import Any

import pytest

from balancer.store import keys
from tests.actors import Upstream
from tests.gateway.conftest import Serve, Served, decoded
from tests.gateway.pairs import settled

LONG = {"position": "token", "operation": "ge", "value": "1000"}
WORDS = " ".join(["word"] * 1000)


def a_document(upstream: Upstream, *routes: dict[str, Any], **rule: Any) -> dict[str, Any]:
    """Rule `gpt` over `a:m1` and `a:m2`, one request in turn, and its entries."""
    return {
        "providers": [{"name": "a", "api_base": upstream.url, "no_key_required": True}],
        "rules": [
            {
                "uuid": "gpt",
                "request_model": "gpt",
                "lb_tactic": {"type": "round_robin", "params": {"request_threshold": 1}},
                "services": [{"provider": "a", "model": model} for model in ("m1", "m2")],
                "smart_enabled": True,
                "smart_routing": list(routes),
                "retry": {"backoff_ms": 1},
            }
            | rule
        ],
    }


def an_entry(*models: str, ops: list[dict[str, Any]] | None = None, **more: Any) -> dict[str, Any]:
    services = [{"provider": "a", "model": model} for model in models]
    return {"uuid": "long", "ops": ops or [LONG], "services": services} | more


async def ask(gateway: Served, content: str, **more: Any) -> tuple[int, Any, bytes]:
    body = {"model": "gpt", "messages": [{"role": "user", "content": content}]} | more
    async with gateway.session.post(f"{gateway.url}/v1/chat/completions", json=body) as response:
        return response.status, response.headers, await response.read()


async def services(gateway: Served, *contents: str) -> list[str]:
    """Which service each request went to, one after the other, as `model` or `entry/model`."""
    came = []
    for content in contents:
        status, headers, _ = await ask(gateway, content)
        assert status == 200
        entry = headers.get("x-balancer-entry", "")
        came.append("/".join(filter(None, (entry, headers["x-balancer-service"].removeprefix("a:")))))
    return came


async def test_what_matches_an_entry_goes_to_its_services_and_all_else_to_the_rules_own(
    serve: Serve, upstream: Upstream
) -> None:
    gateway = await serve(a_document(upstream, an_entry("big")))
    assert await services(gateway, "short", WORDS, "short") == ["m1", "long/big", "m2"]
    assert [json.loads(request.body)["model"] for request in upstream.received] == ["m1", "big", "m2"]
    assert await settled(gateway) == {("a:m1", "success"): 1, ("a:big", "success"): 1, ("a:m2", "success"): 1}


async def test_an_entry_has_a_cursor_and_a_streak_of_its_own(serve: Serve, upstream: Upstream) -> None:
    gateway = await serve(a_document(upstream, an_entry("b1", "b2")))
    came = await services(gateway, "x", WORDS, "x", WORDS, WORDS, "x")
    assert came == ["m1", "long/b1", "m2", "long/b2", "long/b1", "m1"]
    view = await gateway.view()
    assert view.partitions[keys.partition("gpt")].cursor == "a:m1"
    assert view.partitions[keys.partition("gpt", "long")].cursor == "a:b1"


async def test_the_first_entry_that_matches_wins(serve: Serve, upstream: Upstream) -> None:
    first = an_entry("one", ops=[{"position": "user", "operation": "contains", "value": "please"}], uuid="polite")
    gateway = await serve(a_document(upstream, first, an_entry("two")))
    assert await services(gateway, f"please {WORDS}", WORDS) == ["polite/one", "long/two"]


async def test_a_retry_stays_within_the_entry(serve: Serve, upstream: Upstream) -> None:
    async with Upstream().running() as other:
        other.answers(500, b"{}")
        entry = an_entry("good")
        entry["services"].insert(0, {"provider": "bad", "model": "m"})
        raw = a_document(upstream, entry)
        raw["providers"].append({"name": "bad", "api_base": other.url, "no_key_required": True})
        gateway = await serve(raw)
        status, headers, _ = await ask(gateway, WORDS)
    assert (status, headers["x-balancer-service"], headers["x-balancer-attempts"]) == (200, "a:good", "2")
    assert await settled(gateway) == {("bad:m", "failed"): 1, ("a:good", "success"): 1}


async def test_without_smart_enabled_entries_are_kept_and_not_asked(serve: Serve, upstream: Upstream) -> None:
    gateway = await serve(a_document(upstream, an_entry("big"), smart_enabled=False))
    assert await services(gateway, WORDS) == ["m1"]


async def test_an_entry_whose_services_are_off_is_named_when_it_cannot_serve(serve: Serve, upstream: Upstream) -> None:
    entry = an_entry("big")
    entry["services"][0]["active"] = False
    gateway = await serve(a_document(upstream, entry))
    status, _, body = await ask(gateway, WORDS)
    assert status == 503
    assert "entry long of rule gpt has no active service" in decoded(body)["error"]["message"]


@pytest.mark.parametrize("content", [[{"type": 7}], {"no": "list"}, 5])
async def test_a_shape_that_is_not_known_matches_nothing_and_is_the_upstreams_to_refuse(
    serve: Serve, upstream: Upstream, content: Any
) -> None:
    gateway = await serve(a_document(upstream, an_entry("big")))
    status, headers, _ = await ask(gateway, "", messages=[{"role": "user", "content": content}])
    assert (status, headers["x-balancer-service"], "x-balancer-entry" in headers) == (200, "a:m1", False)
