"""Smart routing where it meets the rest: retries, fallbacks, edits, lost stores, pins, queues, limits and scenarios."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from balancer import facts
from balancer.store import keys
from tests.actors import Upstream
from tests.faults import FaultProxy
from tests.gateway.conftest import Serve, Served, decoded
from tests.gateway.pairs import counted, settled
from tests.gateway.test_smart_routing import LONG, WORDS, a_document, an_entry, ask, services
from tests.gateway.trails import Walked, a_post, walked
from tests.store.conftest import eventually

ONE_IN_TURN = {"type": "round_robin", "params": {"request_threshold": 1}}


@pytest.fixture
async def other() -> AsyncIterator[Upstream]:
    """A second scripted upstream, which fails."""
    async with Upstream().running() as actor:
        actor.answers(500, b"{}")
        yield actor


def with_bad(raw: dict[str, Any], other: Upstream) -> dict[str, Any]:
    """The document with provider `bad`, which fails."""
    raw["providers"].append({"name": "bad", "api_base": other.url, "no_key_required": True})
    return raw


def a_rule(uuid: str, *models: str, **more: Any) -> dict[str, Any]:
    return {"uuid": uuid, "request_model": uuid, "services": [{"provider": "a", "model": m} for m in models]} | more


# -- fallbacks and retries ---------------------------------------------------------------------------------------------


async def test_a_rule_that_stands_in_looks_at_the_request_with_entries_of_its_own(
    serve: Serve, upstream: Upstream, other: Upstream
) -> None:
    entry = an_entry("x") | {"services": [{"provider": "bad", "model": "m"}]}
    raw = with_bad(a_document(upstream, entry, fallback=["second"]), other)
    mine = an_entry("big", uuid="mine") | {"ops": [{"position": "token", "operation": "gt", "value": "9"}]}
    raw["rules"].append(a_rule("second", "small", smart_enabled=True, smart_routing=[mine]))
    gateway = await serve(raw)
    status, headers, _ = await ask(gateway, WORDS)
    assert (status, headers["x-balancer-service"], headers["x-balancer-entry"]) == (200, "a:big", "mine")
    assert headers["x-balancer-attempts"] == "2"
    view = await gateway.view()
    assert view.partitions[keys.partition("second", "mine")].cursor == "a:big"
    assert view.partitions[keys.partition("second")].cursor == ""


async def test_a_rule_that_stands_in_serves_itself_what_none_of_its_entries_matches(
    serve: Serve, upstream: Upstream, other: Upstream
) -> None:
    raw = with_bad(a_document(upstream, fallback=["second"], services=[{"provider": "bad", "model": "m"}]), other)
    raw["rules"][0]["smart_enabled"] = False
    raw["rules"].append(a_rule("second", "small", smart_enabled=True, smart_routing=[an_entry("big")]))
    gateway = await serve(raw)
    assert await services(gateway, "short", WORDS) == ["small", "long/big"]


# -- edits between a pick and what follows it --------------------------------------------------------------------------


async def edited(walk: Walked, raw: dict[str, Any], upstream: Upstream, *, is_heard: bool) -> list[Any]:
    """What comes of a long request whose first attempt fails after the rule was edited."""
    upstream.stalls()
    count = len(upstream.received)
    asking = asyncio.create_task(walk.ask(a_post("r1", messages=[{"role": "user", "content": WORDS}])))
    await eventually(lambda: _came(upstream, count))
    upstream.answers()
    await walk.publishes(raw, is_heard=is_heard)
    return await asking


async def _came(upstream: Upstream, count: int) -> bool:
    return len(upstream.received) > count


@pytest.mark.parametrize("way", ["express", "lane", "aiohttp"])
@pytest.mark.parametrize("is_heard", [False, True])
@pytest.mark.parametrize("is_kept", [False, True])
async def test_a_retry_after_an_edit_goes_to_the_entry_as_it_stands_then_or_else_to_the_rules_own(
    store_url: str, tmp_path: Path, upstream: Upstream, way: str, is_heard: bool, is_kept: bool
) -> None:
    quick = {"timeouts": {"headers_s": 0.4, "first_byte_s": 0.4, "idle_s": 0.4}}
    raw = a_document(upstream, an_entry("b1", "b2"))
    raw["providers"][0] |= quick
    async with walked(store_url, tmp_path, raw, way) as walk:
        after = a_document(upstream, *([an_entry("b1", "b3")] if is_kept else []), smart_enabled=is_kept)
        after["providers"][0] |= quick
        (answer,) = await edited(walk, after, upstream, is_heard=is_heard)
        assert answer.status == 200
        expected = ("a:b3", "long") if is_kept else ("a:m1", None)
        assert (answer.header("x-balancer-service"), answer.header("x-balancer-entry")) == expected
        await walk.settled_view()


async def test_an_edit_that_keeps_an_entry_keeps_its_cursor_and_streak(
    store_url: str, tmp_path: Path, upstream: Upstream
) -> None:
    tactic = {"type": "round_robin", "params": {"request_threshold": 3}}
    async with walked(store_url, tmp_path, a_document(upstream, an_entry("b1", "b2"), lb_tactic=tactic)) as walk:
        assert await services(walk, *[WORDS] * 4, "x") == ["long/b1"] * 3 + ["long/b2", "m1"]
        moved = an_entry("new", uuid="new", ops=[{"position": "user", "operation": "contains", "value": "?"}])
        kept = an_entry("b1", "b2", ops=[{"position": "token", "operation": "ge", "value": "900"}])
        await walk.publishes(a_document(upstream, moved, kept, lb_tactic=tactic), is_heard=True)
        assert await services(walk, WORDS, WORDS, WORDS, "?") == ["long/b2", "long/b2", "long/b1", "new/new"]


async def test_the_state_of_an_entry_that_is_gone_is_gone_too(
    store_url: str, tmp_path: Path, upstream: Upstream
) -> None:
    async with walked(store_url, tmp_path, a_document(upstream, an_entry("b1", "b2"))) as walk:
        assert await services(walk, WORDS) == ["long/b1"]
        await walk.publishes(a_document(upstream, smart_enabled=False), is_heard=True)
        assert await services(walk, WORDS) == ["m1"]
        assert set((await walk.view()).partitions) == {keys.partition("gpt")}
        await walk.publishes(a_document(upstream, an_entry("b1", "b2"), queue_timeout_ms=1), is_heard=True)
        assert await services(walk, WORDS, "x") == ["long/b1", "m2"]


@pytest.mark.parametrize("way", ["express", "lane", "aiohttp"])
async def test_the_first_request_after_an_edit_belongs_to_an_entry_as_they_stand_then(
    store_url: str, tmp_path: Path, upstream: Upstream, way: str
) -> None:
    """A worker that had not heard of the edit picked under the new revision, for the entry that had matched before."""
    async with walked(store_url, tmp_path, a_document(upstream, smart_enabled=False), way) as walk:
        assert await services(walk, WORDS) == ["m1"]
        await walk.publishes(a_document(upstream, an_entry("b1")))
        assert await services(walk, WORDS, "x") == ["long/b1", "m2"]


# -- responses ---------------------------------------------------------------------------------------------------------


async def test_what_goes_on_from_a_response_stays_with_its_service_whatever_matches(
    serve: Serve, upstream: Upstream
) -> None:
    gateway = await serve(a_document(upstream, an_entry("big"), an_entry("image", uuid="i", ops=[IMAGE])))

    async def create(response_id: str, content: str, **more: Any) -> tuple[int, str, str]:
        upstream.answers(body=json.dumps({"id": response_id, "object": "response", "output": []}).encode())
        body = {"model": "gpt", "input": content} | more
        async with gateway.session.post(f"{gateway.url}/v1/responses", json=body) as response:
            headers = response.headers
            await response.read()
            return response.status, headers.get("x-balancer-service", ""), headers.get("x-balancer-entry", "")

    assert await create("resp_long", WORDS) == (200, "a:big", "long")
    assert await create("resp_short", "x") == (200, "a:m1", "")
    assert await create("resp_2", "x", previous_response_id="resp_long") == (200, "a:big", "long")
    assert await create("resp_3", WORDS, previous_response_id="resp_short") == (200, "a:m1", "")
    async with gateway.session.get(f"{gateway.url}/v1/responses/resp_long") as response:
        assert response.status == 200
    assert (await create("resp_4", "x"))[1] == "a:m2", "the rotation did not see them"


IMAGE = {"position": "user", "operation": "type", "value": "image"}


async def test_a_response_is_gone_on_from_though_the_matched_entry_cannot_serve(
    serve: Serve, upstream: Upstream
) -> None:
    entry = an_entry("big")
    entry["services"][0]["active"] = False
    gateway = await serve(a_document(upstream, entry))
    upstream.answers(body=b'{"id": "resp_1", "object": "response", "output": []}')
    for content, more in (("x", {}), (WORDS, {"previous_response_id": "resp_1"})):
        body = {"model": "gpt", "input": content} | more
        async with gateway.session.post(f"{gateway.url}/v1/responses", json=body) as response:
            assert (response.status, response.headers["x-balancer-service"]) == (200, "a:m1")


async def test_tokens_are_counted_by_the_service_of_the_entry(serve: Serve, upstream: Upstream) -> None:
    raw = a_document(upstream, an_entry("b1", "b2"), scenario="anthropic")
    raw["providers"][0]["api_style"] = "anthropic"
    gateway = await serve(raw)
    for content, model in ((WORDS, "b1"), ("x", "m1")):
        body = {"model": "gpt", "messages": [{"role": "user", "content": content}]}
        headers = {"anthropic-version": "2023-06-01"}
        async with gateway.session.post(
            f"{gateway.url}/v1/messages/count_tokens", json=body, headers=headers
        ) as response:
            assert response.status == 200
        assert json.loads(upstream.last.body)["model"] == model


# -- pins, queues and limits -------------------------------------------------------------------------------------------


async def test_a_session_is_pinned_in_each_entry_by_itself(serve: Serve, upstream: Upstream) -> None:
    gateway = await serve(a_document(upstream, an_entry("b1", "b2"), session_affinity=60, session_header="x-s"))

    async def of(content: str, session: str = "") -> str:
        body = {"model": "gpt", "messages": [{"role": "user", "content": content}]}
        headers = {"x-s": session} if session else {}
        async with gateway.session.post(f"{gateway.url}/v1/chat/completions", json=body, headers=headers) as response:
            return response.headers["x-balancer-service"]

    assert [await of("x", "s"), await of(WORDS, "s")] == ["a:m1", "a:b1"]
    assert [await of("x"), await of(WORDS)] == ["a:m2", "a:b2"]
    assert [await of("x", "s"), await of(WORDS, "s"), await of("x", "s")] == ["a:m1", "a:b1", "a:m1"]


async def test_who_waits_in_an_entrys_queue_keeps_nobody_of_the_rule_waiting(serve: Serve, upstream: Upstream) -> None:
    entry = an_entry("big")
    entry["services"][0]["limits"] = {"in_flight": 1}
    gateway = await serve(a_document(upstream, entry, queue_timeout_ms=20_000))
    upstream.stalls()
    first = asyncio.create_task(ask(gateway, WORDS))
    await eventually(lambda: _came(upstream, 0))
    upstream.answers()
    second = asyncio.create_task(ask(gateway, WORDS))
    await eventually(lambda: _waits(gateway))
    assert await services(gateway, "x", "x") == ["m1", "m2"]
    first.cancel()
    status, headers, _ = await second
    assert (status, headers["x-balancer-service"]) == (200, "a:big")


async def _waits(gateway: Served) -> bool:
    return len(gateway.gateway.balance._queues) == 1


async def test_tokens_that_only_a_service_of_an_entry_limits_are_estimated_for_it_alone(
    serve: Serve, upstream: Upstream
) -> None:
    entry = an_entry("big")
    entry["services"][0]["limits"] = {"tpm": 1500}
    gateway = await serve(a_document(upstream, entry))
    statuses = [(await ask(gateway, content))[0] for content in (WORDS, WORDS, "x")]
    assert statuses == [200, 200, 200]  # What was used is settled: two times 18 tokens.
    upstream.stalls()
    first = asyncio.create_task(ask(gateway, WORDS))
    await eventually(lambda: _came(upstream, 3))
    state = (await gateway.view()).services["a:big"]
    assert state.reserved > 900
    upstream.answers()
    status, _, body = await ask(gateway, WORDS)
    assert status == 429, body
    assert (await ask(gateway, "x"))[0] == 200
    first.cancel()


# -- a lost store ------------------------------------------------------------------------------------------------------


async def test_without_redis_an_entry_goes_on_from_its_own_cursor(
    store_url: str, tmp_path: Path, upstream: Upstream
) -> None:
    raw = a_document(upstream, an_entry("b1", "b2"), on_store_loss="local")
    async with (
        FaultProxy(store_url, tmp_path / "p.sock").running() as proxy,
        walked(store_url, tmp_path, raw, redis_url=proxy.url) as walk,
    ):
        assert await services(walk, WORDS, "x", "x", WORDS, WORDS) == ["long/b1", "m1", "m2", "long/b2", "long/b1"]
        await walk.settled_view()
        proxy.refuses()
        assert await services(walk, WORDS, WORDS, "x", WORDS) == ["long/b2", "long/b1", "m1", "long/b2"]
        proxy.passes()
        await eventually(lambda: _is_back(walk))
        view = await walk.settled_view()
        assert {name: s.requests for name, s in view.services.items()} == {"a:b1": 3, "a:b2": 3, "a:m1": 2, "a:m2": 1}


async def _is_back(walk: Walked) -> bool:
    return all(walk.gateway.balance.pools_up().values())


# -- scenarios ---------------------------------------------------------------------------------------------------------


async def models_served(gateway: Served, *models: str) -> list[Any]:
    """The service of each model's request, or the status of its refusal."""
    came: list[Any] = []
    for model in models:
        body = {"model": model, "messages": [{"role": "user", "content": WORDS}]}
        async with gateway.session.post(f"{gateway.url}/v1/chat/completions", json=body) as response:
            came.append(response.headers["x-balancer-service"] if response.status == 200 else response.status)
    return came


@pytest.mark.parametrize(
    ("scenario", "rules", "expected"),
    [
        (None, ("r1",), ["a:r1", 404]),
        ({}, ("r1",), ["a:r1", "a:r1"]),
        ({"flags": {"unified": True}}, ("r1",), ["a:r1", "a:r1"]),
        ({"flags": {"unified": True}}, ("r1", "r2"), ["a:r1", 404]),
        ({"flags": {"separate": True}}, ("r1",), ["a:r1", 404]),
        ({"extensions": {"default_model": "r2"}}, ("r1", "r2"), ["a:r1", "a:r2"]),
        ({"flags": {"separate": True}, "extensions": {"default_model": "r2"}}, ("r1", "r2"), ["a:r1", "a:r2"]),
    ],
)
async def test_a_scenario_tells_which_rule_serves_models_that_no_rule_names(
    serve: Serve, upstream: Upstream, scenario: dict[str, Any] | None, rules: tuple[str, ...], expected: list[Any]
) -> None:
    raw = a_document(upstream) | {"rules": [a_rule(name, name) for name in rules]}
    if scenario is not None:
        raw["scenarios"] = [{"scenario": "openai"} | scenario]
    gateway = await serve(raw)
    assert await models_served(gateway, "r1", "unknown") == expected
    async with gateway.session.get(f"{gateway.url}/v1/models") as response:
        assert [model["id"] for model in decoded(await response.read())["data"]] == list(rules)


async def test_in_a_smart_scenario_the_entries_of_all_rules_count(serve: Serve, upstream: Upstream) -> None:
    raw = a_document(upstream, an_entry("big"), smart_enabled=False)
    raw["scenarios"] = [{"scenario": "openai", "flags": {"smart": True}}]
    gateway = await serve(raw)
    assert await services(gateway, WORDS, "x") == ["long/big", "m1"]


async def test_models_that_clients_make_up_are_kept_nowhere(serve: Serve, upstream: Upstream) -> None:
    raw = a_document(upstream, an_entry("big"))
    raw["scenarios"] = [{"scenario": "openai"}]
    gateway = await serve(raw)
    assert await models_served(gateway, "gpt", *(f"made-up-{n}" for n in range(30))) == ["a:big"] * 31
    plans = gateway.gateway._plans
    assert len(plans._matching) <= 1
    assert len(plans._plans) <= 2
    gateway.gateway.metrics.flush()
    assert counted(gateway.gateway.metrics.requests) == {("openai", "gpt", "success"): 31}


# -- bodies ------------------------------------------------------------------------------------------------------------


async def test_a_body_of_10_mb_is_decoded_once_by_all_ops_of_all_entries(
    serve: Serve, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded_bytes: list[int] = []
    read = facts._read

    def noted(decoder: Any, raw: msgspec.Raw, name: str) -> Any:
        decoded_bytes.append(len(bytes(raw)))
        return read(decoder, raw, name)

    monkeypatch.setattr(facts, "_read", noted)
    never = [{"position": "user", "operation": "regex", "value": "nowhere"}]
    more = [{"position": "system", "operation": "any_contains", "value": "nowhere"}]
    gateway = await serve(
        a_document(upstream, an_entry("b1", ops=never, uuid="1"), an_entry("b2", ops=more, uuid="2"), an_entry("b3")),
        max_body_bytes=20_000_000,
    )
    text = b"word " * 2_000_000
    body = io.BytesIO(b'{"model":"gpt","messages":[{"role":"user","content":"%b"}]}' % text)
    url, headers = f"{gateway.url}/v1/chat/completions", {"Content-Type": "application/json"}
    async with gateway.session.post(url, data=body, headers=headers) as response:
        assert (response.status, response.headers["x-balancer-entry"]) == (200, "long"), await response.read()
    assert [size for size in decoded_bytes if size > 1_000_000] == [10_000_030]


@pytest.mark.parametrize(
    "body",
    [
        b'{"model":"gpt","messages":[{"role":"user","content":"\\ud83d"}]}',
        b'{"model":"gpt","messages":' + b"[" * 400 + b"]" * 400 + b"}",
        b'{"model":"gpt","messages":"' + b"x" * 100_000 + b'"}',
        b'{"model":"gpt","messages":null,"input":{},"system":7,"thinking":[],"tools":{}}',
        b'{"model":"gpt","messages":[{"role":["user"],"content":{"text":[1]}}]}',
        b'{"model":"gpt","messages":[{"role":"user","content":"x"}],"messages":[1]}',
        b'{"model":"gpt","messages":[{"role":"user","content":[{"type":"tool_result","content":'
        + b"[" * 300
        + b"]" * 300
        + b"}]}]}",
        b'{"model":"gpt","messages":[{"role":"user","content":1e999}]}',
    ],
)
async def test_no_body_is_too_strange_to_be_passed_on(serve: Serve, upstream: Upstream, body: bytes) -> None:
    ops = ("user.regex=x", "system.glob=*", "tool_use.contains=x", "token.gt=99999999", "user.type=image")
    every = [dict(zip(("position", "operation", "value"), _split(text), strict=True)) for text in ops]
    entries = [an_entry("never", uuid=f"e{n}", ops=[op, LONG]) for n, op in enumerate(every)]
    gateway = await serve(a_document(upstream, *entries))
    headers = {"Content-Type": "application/json"}
    async with gateway.session.post(f"{gateway.url}/v1/chat/completions", data=body, headers=headers) as response:
        assert response.status == 200, await response.read()
        assert response.headers["x-balancer-service"] == "a:m1"
    assert upstream.last.body.count(b'"m1"') == 1


def _split(text: str) -> tuple[str, str, str]:
    name, _, value = text.partition("=")
    position, _, operation = name.partition(".")
    return position, operation, value


async def test_without_decision_headers_the_entry_is_not_told(serve: Serve, upstream: Upstream) -> None:
    gateway = await serve(a_document(upstream, an_entry("big")), decision_headers=False)
    status, headers, _ = await ask(gateway, WORDS)
    assert status == 200
    assert not [name for name in headers if name.lower().startswith("x-balancer-")]
    assert await settled(gateway) == {("a:big", "success"): 1}


# -- what is counted ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["express", "lane", "aiohttp"])
async def test_each_request_to_a_rule_with_entries_is_counted_by_the_entry_once(
    store_url: str, tmp_path: Path, upstream: Upstream, way: str
) -> None:
    raw = a_document(upstream, an_entry("big"))
    raw["rules"].append(a_rule("plain", "m1"))
    async with walked(store_url, tmp_path, raw, way) as walk:
        await services(walk, WORDS, "x", WORDS)
        await walk.ask(a_post("r1", model="plain"))
        walk.gateway.metrics.flush()
        assert counted(walk.gateway.metrics.routings) == {
            ("default", "gpt", "long"): 2,
            ("default", "gpt", ""): 1,
        }


async def test_gauges_of_the_fleet_know_services_that_only_entries_have(serve: Serve, upstream: Upstream) -> None:
    entry = an_entry("big")
    entry["services"][0]["limits"] = {"rpm": 100}
    gateway = await serve(a_document(upstream, entry))
    await services(gateway, WORDS, "x")
    async with gateway.session.get(f"{gateway.url}/metrics") as response:
        lines = (await response.text()).splitlines()
    labels = 'kind="rpm"', 'pool="default"', 'service="a:big"'
    (limit,) = (line for line in lines if line.startswith("balancer_limit{"))
    assert all(label in limit for label in labels)
    assert limit.endswith("} 100.0")
    assert any(line.startswith("balancer_routed_total{") and 'entry="long"' in line for line in lines)
