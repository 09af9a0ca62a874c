"""The live state over HTTP: shapes as whole values, and that looking changes nothing."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import pytest

from balancer import stored
from balancer.store import keys
from tests.admin.conftest import FIRST, LIVE, RULE, SECOND, Admin, Start, a_document, counters, everything, of, used

_TOTALS = ("request_count", "window_request_count", "window_tokens", "window_input_tokens", "window_output_tokens")
SUPPORTED = "round_robin, token_based, hybrid, random, cost, latency, least_in_flight, weighted_round_robin"


def in_short(service: str, **more: Any) -> dict[str, Any]:
    """A service as a summary has it, unused but for what is given."""
    provider, _, model = service.partition(":")
    return {
        "service_id": service,
        "provider": provider,
        "model": model,
        "weight": 1,
        "active": True,
        "time_window": counters(service)["time_window"],
        "stats": dict.fromkeys(_TOTALS, 0) | {"last_used": None} | more,
    }


async def use(admin: Admin, requests: int, **usage: int) -> None:
    for _ in range(requests):
        await admin.settle((await admin.pick())["hold"], "success", **usage)


async def test_a_rule_is_told_as_in_the_configuration_with_its_live_index(admin: Admin) -> None:
    before = (await admin.get(of(RULE)))["rule"]
    await use(admin, 3)
    after = (await admin.get(of(RULE)))["rule"]
    assert before == {
        "uuid": RULE,
        "request_model": "llama",
        "response_model": "seen",
        "lb_tactic": {"type": "round_robin", "params": {"request_threshold": 2}},
        "services": [
            {"provider": "a", "model": "m:1"},
            {"provider": "b", "model": "org/m 2", "time_window": 60},
        ],
        "current_service_index": 0,
    }
    assert after == before | {"current_service_index": 1}


async def test_a_summary_tells_tactic_cursor_and_what_services_used(admin: Admin) -> None:
    await use(admin, 3, input=10, output=4)
    summary = (await admin.get(f"{of(RULE)}/summary"))["summary"]
    last_used = [service["stats"].pop("last_used") for service in summary["services"]]
    one = {"request_count": 1, "window_request_count": 1, "window_tokens": 14}
    one |= {"window_input_tokens": 10, "window_output_tokens": 4}
    expected = [in_short(FIRST, **{name: 2 * value for name, value in one.items()}), in_short(SECOND, **one)]
    for service in expected:
        del service["stats"]["last_used"]
    assert summary == {
        "uuid": RULE,
        "pool": "default",
        "request_model": "llama",
        "response_model": "seen",
        "tactic": "round_robin",
        "current_service_index": 1,
        "active": True,
        "is_legacy": False,
        "streak": 1,
        "seq": 3,
        "revision": 1,
        "services": expected,
        "smart_routing": [],
    }
    assert all(time.endswith("Z") for time in last_used)
    assert last_used[0] <= last_used[1]


async def test_counters_of_a_rule_and_of_one_service(admin: Admin) -> None:
    assert await admin.stats(SECOND) == counters(SECOND)
    await use(admin, 1, input=10, output=4, cached=3, cache_creation=2, reasoning=1)
    await admin.settle((await admin.pick())["hold"], "failed")
    await admin.pick(reserved=70)
    first = used(
        FIRST,
        request_count=2,
        picks=2,
        window_request_count=2,
        failures=1,
        window_tokens_consumed=14,
        window_input_tokens=10,
        window_output_tokens=4,
        input_tokens=10,
        output_tokens=4,
        cached_tokens=3,
        cache_creation_tokens=2,
        reasoning_tokens=1,
    )
    second = counters(SECOND, picks=1, window_request_count=1, in_flight=1, reserved_tokens=70) | {
        "window_start": first["window_start"]
    }
    assert await admin.get(f"{of(RULE)}/stats") == {
        "rule_id": RULE,
        "rule_name": "llama",
        "stats": {FIRST: first, SECOND: second},
    }
    assert await admin.get(f"{of(RULE)}/services/a%3Am%3A1/stats") == {
        "rule_id": RULE,
        "service_id": FIRST,
        "stats": first,
    }


async def test_a_window_that_has_ended_counts_nothing_and_stays_closed(admin: Admin, control: Any) -> None:
    await use(admin, 1, input=10)
    ended = "0 0 1 0 0 0 0|300 1000 1 10 0||"
    await control.hset(keys.services("default"), f"service:{FIRST}", ended)
    assert await admin.stats() == counters(FIRST, request_count=1, picks=1, input_tokens=10) | {
        "last_used": used(FIRST)["last_used"]
    }
    assert await control.hget(keys.services("default"), f"service:{FIRST}") == ended.encode()


async def test_pools_are_told_apart_and_added_up(admin: Admin) -> None:
    await use(admin, 1, input=10)
    await admin.settle((await admin.pick("side"))["hold"], input=5, output=1)
    told = await admin.get(f"{LIVE}/stats")
    here = used(FIRST, request_count=1, picks=1, window_request_count=1, input_tokens=10) | {
        "window_tokens_consumed": 10,
        "window_input_tokens": 10,
    }
    side = used(FIRST, request_count=1, picks=1, window_request_count=1, input_tokens=5, output_tokens=1) | {
        "window_tokens_consumed": 6,
        "window_input_tokens": 5,
        "window_output_tokens": 1,
    }
    total = used(FIRST, request_count=2, picks=2, window_request_count=2, input_tokens=15, output_tokens=1) | {
        "window_tokens_consumed": 16,
        "window_input_tokens": 15,
        "window_output_tokens": 1,
    }
    others = {SECOND: counters(SECOND), "c:m": counters("c:m")}
    assert told == {
        "stats": {FIRST: total} | others,
        "pools": {"default": {FIRST: here} | others, "side.1": {FIRST: side}},
    }
    starts = [pool[FIRST]["window_start"] for pool in told["pools"].values()]
    assert told["stats"][FIRST]["window_start"] == min(starts)
    assert told["stats"][FIRST]["last_used"] == told["pools"]["side.1"][FIRST]["last_used"]


async def test_looking_advances_nothing(admin: Admin, control: Any) -> None:
    """The current-service route of tingly-box moved the rotation each time it was asked."""
    await use(admin, 1)
    before = await everything(control)
    for _ in range(3):
        for path in ("", "/summary", "/stats", "/current-service", "/services/a%3Am%3A1/stats"):
            await admin.get(of(RULE) + path)
        await admin.get(f"{LIVE}/stats")
        await admin.get("/api/v1/decisions")
    assert await everything(control) == before


async def test_the_current_service_is_where_the_cursor_stands(admin: Admin) -> None:
    async def current() -> Any:
        return await admin.get(f"{of(RULE)}/current-service")

    assert await current() == {
        "rule_id": RULE,
        "rule_name": "llama",
        "service": {"provider": "a", "model": "m:1", "weight": 1, "active": True, "time_window": 300},
        "service_id": FIRST,
        "tactic": "round_robin",
        "stats": counters(FIRST),
    }
    await use(admin, 3)
    told = await current()
    assert told["service"] == {
        "provider": "b",
        "model": "org/m 2",
        "weight": 1,
        "active": True,
        "time_window": 60,
    }
    assert (told["service_id"], told["stats"]["request_count"]) == (SECOND, 1)


async def test_a_rule_without_a_usable_service_has_no_current_one(admin: Admin) -> None:
    assert (await admin.ask("GET", f"{of('off')}/current-service"))[:2] == (404, {"error": "No available service"})
    assert (await admin.ask("POST", "/api/v1/pick", {"rule": "off"}))[:2] == (
        503,
        {"error": "no service of rule off is active"},
    )


@pytest.mark.parametrize("route", ["", "/summary", "/stats", "/current-service", "/services/a%3Am%3A1/stats"])
async def test_an_unknown_rule_is_not_found(admin: Admin, route: str) -> None:
    assert (await admin.ask("GET", of("llama") + route))[:2] == (404, {"error": "Rule not found"})


async def test_a_service_that_the_rule_has_not_is_not_found(admin: Admin) -> None:
    for method, route in (("GET", "/services/c%3Am/stats"), ("POST", "/services/c%3Am/stats/clear")):
        answer = await admin.ask(method, of(RULE) + route)
        assert answer[:2] == (404, {"error": "Service not found in rule"})


# -- clearing ----------------------------------------------------------------------------------------------------------


async def a_used_pool(admin: Admin) -> None:
    """One settled request on each service and pool, and one in flight on the first service of each pool."""
    await use(admin, 1, input=10)
    await admin.pick(reserved=70)
    await use(admin, 1, input=20)
    await admin.settle((await admin.pick("side"))["hold"], input=5)
    await admin.pick("side", reserved=7)


CLEARED = counters(FIRST, in_flight=1, reserved_tokens=70)


@pytest.mark.parametrize(
    ("path", "message", "cleared"),
    [
        (f"{of(RULE)}/services/a%3Am%3A1/stats/clear", "Statistics cleared for service", {FIRST}),
        (f"{of(RULE)}/stats/clear", "Statistics cleared for all services in rule", {FIRST, SECOND}),
        (f"{LIVE}/stats/clear", "All statistics cleared", {FIRST, SECOND, "side"}),
    ],
)
async def test_clearing_sets_to_zero_what_it_names_and_nothing_else(
    admin: Admin, control: Any, path: str, message: str, cleared: set[str]
) -> None:
    await a_used_pool(admin)
    pools = {"default": await everything(control), "side.1": await everything(control, "side.1")}
    before = (await admin.get(f"{LIVE}/stats"))["pools"]
    assert await admin.send(path) == {"message": message}
    after = (await admin.get(f"{LIVE}/stats"))["pools"]
    expected = {
        "default": before["default"]
        | ({FIRST: CLEARED} if FIRST in cleared else {})
        | ({SECOND: counters(SECOND)} if SECOND in cleared else {}),
        "side.1": {FIRST: counters(FIRST, in_flight=1, reserved_tokens=7)} if "side" in cleared else before["side.1"],
    }
    assert after == expected
    # Cursors, streaks and sequences stay; every service that is cleared takes a position.
    count = {"default": len(cleared - {"side"}) + (LIVE in path and "rules" not in path), "side.1": "side" in cleared}
    for pool, (partitions, services) in pools.items():
        now = await everything(control, pool)
        assert now[0] == partitions
        assert place_of(now[1]) == (1, place_of(services)[1] + count[pool])


def place_of(services: dict[bytes, bytes]) -> tuple[int, int]:
    return stored.place({"place": services[b"place"].decode()})


async def test_what_was_in_flight_at_the_clearing_is_released_and_counted_after_it(admin: Admin) -> None:
    hold = (await admin.pick(reserved=70))["hold"]
    await admin.send(f"{of(RULE)}/stats/clear")
    await admin.settle(hold, input=3)
    assert await admin.stats() == used(FIRST, request_count=1, input_tokens=3) | {
        "window_tokens_consumed": 3,
        "window_input_tokens": 3,
    }


# -- tactics -----------------------------------------------------------------------------------------------------------


async def test_a_tactic_is_changed_for_every_worker_and_keeps_the_cursor(start: Start) -> None:
    one, other = await start(a_document()), await start()
    await use(one, 3)
    change = {"tactic": "Hybrid", "params": {"token_threshold": 500, "reserve": "none"}}
    assert await one.send(f"{of(RULE)}/tactic", change, "PUT") == {
        "message": "Tactic updated successfully",
        "tactic": "hybrid",
        "revision": 2,
    }
    pick = await other.pick()
    assert (pick["service"], pick["reason"], pick["streak"]) == (SECOND, "threshold", 1)
    params = {"request_threshold": 10, "token_threshold": 500, "reserve": "none"}
    assert (await other.get(of(RULE)))["rule"]["lb_tactic"] == {"type": "hybrid", "params": params}
    assert (await one.get(f"{of(RULE)}/summary"))["summary"]["revision"] == 2


async def test_a_tactic_is_changed_beside_a_provider_whose_tokens_are_renewed(start: Start) -> None:
    """It was refused for want of the key that seals them, which the worker had."""
    admin = await start(a_document(), secret_key=base64.b64encode(bytes(32)).decode())
    renewed = {
        "api_base": "https://z.invalid/v1",
        "auth_type": "oauth",
        "oauth_detail": {"refresh_token": "r", "provider_type": "anthropic"},
    }
    assert (await admin.ask("PUT", "/api/v1/providers/z", renewed, If_None_Match="*"))[0] == 201
    assert (await admin.send(f"{of(RULE)}/tactic", {"tactic": "random"}, "PUT"))["revision"] == 3


async def test_the_same_tactic_again_publishes_nothing(admin: Admin) -> None:
    change = {"tactic": "round_robin", "params": {"request_threshold": 2}}
    assert (await admin.send(f"{of(RULE)}/tactic", change, "PUT"))["revision"] == 1
    assert (await admin.send(f"{of(RULE)}/tactic", {"tactic": 3}, "PUT"))["tactic"] == "random"
    assert (await admin.send(f"{of(RULE)}/tactic", {"tactic": "random", "params": None}, "PUT"))["revision"] == 2


async def test_an_index_in_the_configuration_does_not_move_the_cursor_again(start: Start) -> None:
    """It was meant for the edit that brought it: a tactic change keeps the cursor."""
    raw = a_document()
    raw["rules"][0]["current_service_index"] = 1
    admin = await start(raw)
    await use(admin, 3)
    assert (await admin.get(f"{of(RULE)}/current-service"))["service_id"] == FIRST
    await admin.send(f"{of(RULE)}/tactic", {"tactic": "token_based"}, "PUT")
    assert (await admin.pick())["service"] == FIRST


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (
            {"tactic": "fastest"},
            f"Unsupported tactic: 'fastest' (supported: {SUPPORTED})",
        ),
        ({"tactic": 4}, f"Unsupported tactic: 4 (supported: {SUPPORTED})"),
        ({}, "Object missing required field `tactic`"),
        ({"tactic": True}, "Expected `int | str`, got `bool` - at `$.tactic`"),
        ({"tactic": "hybrid", "param": {}}, "Object contains unknown field `param`"),
        ({"tactic": "hybrid", "params": []}, "Expected `object | null`, got `array` - at `$.params`"),
        (
            {"tactic": "hybrid", "params": {"token_threshold": "x"}},
            "params.token_threshold: Expected `int`, got `str`",
        ),
        (
            {"tactic": "random", "params": {"request_threshold": 3}},
            "params.request_threshold: Random has no such parameter (known: reserve, reserve_cap)",
        ),
    ],
)
async def test_a_tactic_that_cannot_be_is_refused_by_its_fault(admin: Admin, change: Any, error: str) -> None:
    assert (await admin.ask("PUT", f"{of(RULE)}/tactic", change))[:2] == (400, {"error": error})
    assert (await admin.get(f"{of(RULE)}/summary"))["summary"]["revision"] == 1


async def test_two_changes_at_once_both_come_to_stand(start: Start) -> None:
    one, other = await start(a_document()), await start()
    answers = await asyncio.gather(
        one.send(f"{of(RULE)}/tactic", {"tactic": "random"}, "PUT"),
        other.send(f"{of('side')}/tactic", {"tactic": "hybrid"}, "PUT"),
    )
    assert sorted(answer["revision"] for answer in answers) == [2, 3]
    await one.gateway.balance.refresh()
    tactics = [(await one.get(of(rule)))["rule"]["lb_tactic"]["type"] for rule in (RULE, "side")]
    assert tactics == ["random", "hybrid"]
