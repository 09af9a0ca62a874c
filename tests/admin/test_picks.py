"""Picks over the API: held, settled by any worker exactly once, lost when nobody settles."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from balancer import audit
from balancer.store import history, holds, keys
from tests.admin.conftest import FIRST, RULE, SECOND, Admin, Start, a_document, counters, used
from tests.store.conftest import eventually

HOLDS = keys.HOLD_PREFIX


async def listed(control: Any) -> list[str]:
    """The holds that are listed with a lease."""
    members = [member.decode() for member in await control.zrange(keys.leases("default"), 0, -1)]
    return [member for member in members if member.startswith(HOLDS)]


async def lost(admin: Admin, service: str = FIRST) -> None:
    """Returns once an attempt on the service has been counted as lost."""

    async def is_lost() -> bool:
        return bool((await admin.stats(service))["lost"])

    await eventually(is_lost)


async def is_right(control: Any) -> None:
    """Holds the whole recorded history against the reference, with a checkpoint at its end."""
    await history.checkpoint(control.execute_command, "default")
    events = [
        {k.decode(): v.decode() for k, v in fields.items()}
        for _, fields in await control.xrange(keys.decisions("default"))
    ]
    verdict = audit.check(events)
    assert (verdict.violations, verdict.is_full) == ([], True)


async def test_a_pick_tells_where_to_send_and_holds_its_place(admin: Admin) -> None:
    pick = await admin.pick(reserved=70)
    hold = pick.pop("hold")
    assert pick == {
        "decision": "default.1.3",
        "rule": RULE,
        "service": FIRST,
        "provider": "a",
        "model": "m:1",
        "api_base": "https://a.invalid/v1",
        "api_style": "openai",
        "reason": "streak",
        "seq": 1,
        "streak": 1,
        "switched": False,
    }
    held = await admin.stats()
    assert (held["in_flight"], held["reserved_tokens"], held["request_count"]) == (1, 70, 0)
    assert await admin.settle(hold, input=11, output=7) == {"settled": True}
    assert await admin.stats() == used(
        FIRST,
        request_count=1,
        picks=1,
        window_request_count=1,
        input_tokens=11,
        output_tokens=7,
        window_tokens_consumed=18,
        window_input_tokens=11,
        window_output_tokens=7,
    )


async def test_a_rule_is_found_by_scenario_and_model(admin: Admin) -> None:
    for asked in ({"model": "llama"}, {"scenario": "openai", "model": "llama"}, {"rule": RULE}):
        assert (await admin.send("/api/v1/pick", asked))["rule"] == RULE
    for asked in ({"rule": "llama"}, {"scenario": "anthropic", "model": "llama"}):
        assert (await admin.ask("POST", "/api/v1/pick", asked))[:2] == (404, {"error": "Rule not found"})


async def test_picks_over_two_workers_alternate_as_the_rule_says(start: Start, control: Any) -> None:
    one, other = await start(a_document()), await start()
    picks = await asyncio.gather(*(admin.pick() for _ in range(10) for admin in (one, other)))
    picks.sort(key=lambda pick: pick["seq"])
    assert [pick["service"] for pick in picks] == [(FIRST, SECOND)[i // 2 % 2] for i in range(20)]
    assert [pick["switched"] for pick in picks] == [i > 0 and i % 2 == 0 for i in range(20)]
    await asyncio.gather(*((one, other)[i % 2].settle(pick["hold"], input=1) for i, pick in enumerate(picks)))
    assert (await one.stats())["request_count"] == 10
    assert await listed(control) == []
    await is_right(control)


async def test_what_was_tried_before_is_left_out_and_moves_no_cursor(admin: Admin) -> None:
    first = await admin.pick()
    again = await admin.pick(excluded=[FIRST])
    then = await admin.pick()
    assert [(p["service"], p["reason"], p["streak"]) for p in (first, again, then)] == [
        (FIRST, "streak", 1),
        (SECOND, "retry", 1),
        (FIRST, "streak", 2),
    ]
    assert (await admin.ask("POST", "/api/v1/pick", {"rule": RULE, "excluded": [FIRST, SECOND]}))[0] == 503


async def test_a_tactic_that_reserves_nothing_or_less_is_obeyed(start: Start) -> None:
    params = {"request_threshold": 1, "reserve_cap": 50}
    admin = await start(a_document(params=params))
    await admin.pick(reserved=70)
    assert (await admin.stats())["reserved_tokens"] == 50
    await admin.send(
        "/api/v1/load-balancer/rules/side/tactic", {"tactic": "random", "params": {"reserve": "none"}}, "PUT"
    )
    await admin.pick("side", reserved=70)
    assert (await admin.stats(FIRST, "side"))["reserved_tokens"] == 0


@pytest.mark.parametrize(
    ("asked", "error"),
    [
        ({}, "expected either `rule`, or `model` with its `scenario` (openai if absent)"),
        ({"rule": RULE, "model": "llama"}, "expected either `rule`, or `model` with its `scenario` (openai if absent)"),
        ({"rule": RULE, "reserved": -1}, "Expected `int` >= 0 - at `$.reserved`"),
        ({"rule": RULE, "reserved": 1.5}, "Expected `int`, got `float` - at `$.reserved`"),
        ({"rule": RULE, "hold_s": 86_401}, "Expected `float` <= 86400.0 - at `$.hold_s`"),
        ({"rule": RULE, "hold_s": 0}, "Expected `float` >= 1.0 - at `$.hold_s`"),
        ({"rule": RULE, "excluded": "x"}, "Expected `array`, got `str` - at `$.excluded`"),
        ({"rule": RULE, "holds": 1}, "Object contains unknown field `holds`"),
    ],
)
async def test_a_malformed_pick_is_refused_by_the_fields_name(admin: Admin, asked: Any, error: str) -> None:
    assert (await admin.ask("POST", "/api/v1/pick", asked))[:2] == (400, {"error": error})


# -- settling ----------------------------------------------------------------------------------------------------------


async def test_a_settle_counts_once_over_whichever_worker_it_comes(start: Start, control: Any) -> None:
    one, other = await start(a_document()), await start()
    hold = (await one.pick(reserved=70))["hold"]
    assert await other.settle(hold, input=11) == {"settled": True}
    for admin in (one, other, one):
        assert await admin.settle(hold, "failed", input=500) == {"settled": True, "repeated": True}
    expected = used(FIRST, request_count=1, picks=1, window_request_count=1, input_tokens=11)
    assert await one.stats() == expected | {"window_tokens_consumed": 11, "window_input_tokens": 11}
    await is_right(control)


async def test_of_many_settles_at_once_one_counts(start: Start, control: Any) -> None:
    one, other = await start(a_document()), await start()
    hold = (await one.pick())["hold"]
    answers = await asyncio.gather(*(admin.settle(hold, input=5) for _ in range(10) for admin in (one, other)))
    assert all(answer["settled"] for answer in answers)
    stats = await one.stats()
    assert (stats["request_count"], stats["input_tokens"], stats["in_flight"]) == (1, 5, 0)
    await is_right(control)


async def test_a_settle_needs_the_worker_that_picked_no_more(start: Start) -> None:
    one, other = await start(a_document()), await start()
    hold = (await one.pick())["hold"]
    await one.gateway.drain()
    assert await other.settle(hold, input=5) == {"settled": True}
    stats = await other.stats()
    assert (stats["request_count"], stats["input_tokens"], stats["in_flight"], stats["lost"]) == (1, 5, 0, 0)


async def test_a_hold_that_nobody_settles_is_lost_and_found_again_by_a_late_settle(start: Start, control: Any) -> None:
    one, other = await start(a_document()), await start()
    hold = (await one.pick(reserved=70, hold_s=1))["hold"]
    await lost(other)
    expected = counters(FIRST, request_count=1, picks=1, window_request_count=1, lost=1, lost_tokens=70)
    assert await other.stats() == expected | {
        "window_start": used(FIRST)["window_start"],
        "window_tokens_consumed": 70,
        "window_input_tokens": 70,
    }
    await is_right(control)
    assert await other.settle(hold, input=11, output=7) == {"settled": True}
    assert await one.settle(hold, input=11, output=7) == {"settled": True, "repeated": True}
    stats = await one.stats()
    assert stats == used(
        FIRST,
        request_count=1,
        picks=1,
        window_request_count=1,
        input_tokens=11,
        output_tokens=7,
        window_tokens_consumed=18,
        window_input_tokens=11,
        window_output_tokens=7,
    )
    await is_right(control)


async def test_a_hold_outlives_a_workers_lease(admin: Admin, control: Any) -> None:
    """Its time is its own: workers here have leases of a second."""
    short, long = (await admin.pick(hold_s=1))["hold"], (await admin.pick(hold_s=60))["hold"]
    await lost(admin)
    left_s = await control.zscore(keys.leases("default"), holds.read(long).worker) / 1000 - time.time()
    assert 50 < left_s <= 60
    await admin.settle(long, input=5)
    stats = await admin.stats()
    assert (stats["request_count"], stats["lost"], stats["input_tokens"]) == (2, 1, 5)
    await admin.settle(short)


async def test_an_attempt_that_was_never_sent_gives_back_what_it_held(admin: Admin) -> None:
    await admin.settle((await admin.pick(reserved=70))["hold"], "abandoned")
    stats = await admin.stats()
    assert (stats["abandoned"], stats["request_count"], stats["in_flight"], stats["reserved_tokens"]) == (1, 0, 0, 0)


async def test_a_settled_hold_leaves_the_list_and_is_remembered_while_it_may_be_repeated(
    admin: Admin, control: Any
) -> None:
    hold = holds.read((await admin.pick(hold_s=600))["hold"])
    assert await listed(control) == [hold.worker]
    await admin.settle(hold.token())
    assert await listed(control) == []
    left_ms = await control.pttl(keys.holdings("default", hold.worker))
    assert 7_700_000 < left_ms <= 600_000 + holds.LATE_MS + 3_600_000
    left: dict[bytes, bytes] = await control.hgetall(keys.holdings("default", hold.worker))
    assert {name: value.split()[0] for name, value in left.items()} == {b"last": b"1"}


async def test_a_pick_that_finds_nothing_leaves_nothing(admin: Admin, control: Any) -> None:
    assert (await admin.ask("POST", "/api/v1/pick", {"rule": "off"}))[0] == 503
    assert await listed(control) == []
    assert [key async for key in control.scan_iter(f"*{HOLDS}*")] == []


async def test_a_hold_that_is_long_over_is_refused(admin: Admin, control: Any) -> None:
    """Nobody remembers any more whether it was settled: to count it might count it twice."""
    hold = holds.read((await admin.pick())["hold"])
    over = holds.Hold(
        pool=hold.pool,
        worker=hold.worker,
        rule=hold.rule,
        service=hold.service,
        until_ms=round(time.time() * 1000) - holds.LATE_MS - 1,
    )
    status, body, _ = await admin.ask("POST", "/api/v1/settle", {"hold": over.token(), "outcome": "success"})
    assert status == 404
    assert body == {"error": "the hold is over: it was settled, or counted as lost, long ago"}
    assert (await admin.stats())["request_count"] == 0


async def test_no_hold_speaks_for_a_worker_or_an_unknown_pool(admin: Admin) -> None:
    hold = holds.read((await admin.pick())["hold"])
    for wrong, status in (
        ({"worker": admin.gateway.balance.worker}, 400),
        ({"worker": "api-"}, 400),
        ({"service": ""}, 400),
        ({"pool": "elsewhere"}, 404),
    ):
        values = {name: getattr(hold, name) for name in hold.__struct_fields__}
        token = holds.Hold(**values | wrong).token()
        assert (await admin.ask("POST", "/api/v1/settle", {"hold": token, "outcome": "success"}))[0] == status
    assert (await admin.stats())["request_count"] == 0


@pytest.mark.parametrize(
    ("report", "error"),
    [
        ({"outcome": "success"}, "Object missing required field `hold`"),
        ({"hold": "x"}, "Object missing required field `outcome`"),
        ({"hold": "x", "outcome": "success"}, "hold: not one that a pick has given"),
        ({"hold": "é", "outcome": "success"}, "hold: not one that a pick has given"),
        ({"hold": "bnVsbA", "outcome": "success"}, "hold: not one that a pick has given"),
        ({"hold": "x", "outcome": "lost"}, "Invalid enum value 'lost' - at `$.outcome`"),
        (
            {"hold": "x", "outcome": "success", "usage": {"input": -1}},
            "Expected `int` >= 0 - at `$.usage.input`",
        ),
        (
            {"hold": "x", "outcome": "success", "usage": {"prompt": 1}},
            "Object contains unknown field `prompt` - at `$.usage`",
        ),
    ],
)
async def test_a_malformed_settle_is_refused_by_the_fields_name(admin: Admin, report: Any, error: str) -> None:
    assert (await admin.ask("POST", "/api/v1/settle", report))[:2] == (400, {"error": error})


async def test_a_pick_that_redis_makes_too_late_is_given_back(admin: Admin, control: Any) -> None:
    await control.client_pause(500)
    assert (await admin.ask("POST", "/api/v1/pick", {"rule": RULE, "reserved": 70}))[0] == 503

    async def is_given_back() -> bool:
        view = await admin.gateway.balance.views()
        states = [v.services[FIRST] for v in view if v.pool == "default"]
        return bool(states and states[0].abandoned and not states[0].in_flight)

    await eventually(is_given_back)
    assert await admin.stats() == counters(FIRST, picks=1, abandoned=1, window_request_count=1) | {
        "window_start": used(FIRST)["window_start"]
    }
    await is_right(control)


async def test_picks_over_the_api_are_in_the_metrics(admin: Admin) -> None:
    await admin.settle((await admin.pick())["hold"], input=11)
    await admin.settle((await admin.pick())["hold"], "failed")
    text = admin.gateway.metrics.exposition().decode()
    labels = f'pool="default",rule="{RULE}",service="{FIRST}"'
    for line in (
        f'balancer_picks_total{{pool="default",reason="streak",rule="{RULE}",service="{FIRST}"}} 2.0',
        f'balancer_attempts_total{{outcome="success",{labels}}} 1.0',
        f'balancer_attempts_total{{outcome="failed",{labels}}} 1.0',
        f'balancer_tokens_total{{kind="input",{labels}}} 11.0',
    ):
        assert line in text


async def test_a_cooldown_that_is_reported_holds_for_the_whole_fleet(start: Start) -> None:
    one, two = (
        await start(a_document(params={"request_threshold": 1})),
        await start(a_document(params={"request_threshold": 1})),
    )
    first = await one.pick()
    report = {"hold": first["hold"], "outcome": "rate_limited", "cooldown_s": 60}
    assert await one.send("/api/v1/settle", report) == {"settled": True}
    assert {(await two.pick())["service"] for _ in range(4)} == {SECOND}


async def test_a_session_stays_where_its_first_pick_was(start: Start) -> None:
    document = a_document(params={"request_threshold": 1})
    document["rules"][0]["session_affinity"] = 60
    admin = await start(document)
    where = {session: (await admin.pick(session=session))["service"] for session in "ab"}
    assert set(where.values()) == {FIRST, SECOND}
    for session in "bbaab":
        pick = await admin.pick(session=session)
        assert (pick["service"], pick["reason"]) == (where[session], "pinned")


async def test_only_one_service_will_do(admin: Admin) -> None:
    picks = [await admin.pick(only=SECOND) for _ in range(3)]
    assert {(pick["service"], pick["reason"]) for pick in picks} == {(SECOND, "pinned")}
    assert (await admin.ask("POST", "/api/v1/pick", {"rule": RULE, "only": "c:m"}))[0] == 503
    assert (await admin.pick())["service"] == FIRST


@pytest.mark.parametrize("wrong", [{"cooldown_s": -1}, {"cooldown_s": "1"}, {"stream_s": 1e9}])
async def test_times_that_cannot_be_are_refused(admin: Admin, wrong: dict[str, Any]) -> None:
    pick = await admin.pick()
    status, *_ = await admin.ask("POST", "/api/v1/settle", {"hold": pick["hold"], "outcome": "success"} | wrong)
    assert status == 400
    assert await admin.settle(pick["hold"]) == {"settled": True}
