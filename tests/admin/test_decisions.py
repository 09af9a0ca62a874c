"""Why a service was picked: what the recorded events tell, and why one may be missing."""

from __future__ import annotations

import asyncio
from typing import Any
from unittest.mock import ANY

import pytest

from balancer.admin import decisions
from tests.admin.conftest import FIRST, RULE, SECOND, Admin, Start, a_document, of
from tests.store.conftest import eventually


async def found(admin: Admin, decision: str) -> Any:
    return (await admin.get(f"/api/v1/decisions/{decision}"))["decision"]


async def missing(admin: Admin, decision: str) -> str:
    status, body, _ = await admin.ask("GET", f"/api/v1/decisions/{decision}")
    assert status == 404
    return str(body["error"])


async def pick_many(admin: Admin, count: int) -> list[str]:
    """The decisions of so many picks, in order."""
    rule = admin.gateway.balance.directory.by_uuid[RULE]
    picks = [await admin.gateway.balance.select(rule, reserved=0, deadline_ms=60_000) for _ in range(count)]
    return [pick.decision for pick, _ in picks]


def windows(requests: int, tokens: int = 0, output: int = 0, length: int = 300) -> list[dict[str, Any]]:
    start = ANY if requests or tokens else None
    return [{"time_window": length, "start": start, "requests": requests, "tokens": tokens, "output": output}]


async def test_a_decision_is_told_in_full(admin: Admin) -> None:
    await admin.pick()
    await admin.pick()
    pick = await admin.pick(reserved=70)
    await admin.settle(pick["hold"], input=11, output=7)
    told = await found(admin, pick["decision"])
    ledger = dict.fromkeys(
        (
            *("requests", "failures", "input", "output", "cached", "cache_creation", "reasoning", "lost"),
            *("lost_tokens", "abandoned", "last_used", "cleared", "cooldown", "first_token", "per_token", "measured"),
        ),
        0,
    )
    minute = {"minute": {"requests": 0, "tokens": 0}}
    unbroken = minute | {"breaker": None}
    breaker = dict.fromkeys(("state", "consecutive", "failed", "opens", "successes", "until", "probe"), 0)
    assert told == {
        "id": "default.1.5",
        "pool": "default",
        "epoch": 1,
        "position": 5,
        "at": ANY,
        "rule": RULE,
        "partition": f"|{RULE}",
        "entry": None,
        "revision": 1,
        "tactic": "round_robin",
        "request_threshold": 2,
        "service": SECOND,
        "reason": "next",
        "why": f"{FIRST} had its streak of 2, or could not serve: the next is {SECOND}",
        "seq": 3,
        "switched": True,
        "saved": False,
        "pin": None,
        "affinity_s": 0,
        "only": None,
        "cursor_before": FIRST,
        "streak_before": 2,
        "streak": 1,
        "draw": ANY,
        "excluded": [],
        "barred": [],
        "reserved": 70,
        "deadline": ANY,
        "worker": ANY,
        "number": 1,
        "before": {"in_flight": 0, "reserved": 0, "picks": 0, "windows": windows(0, length=60)} | unbroken,
        "after": {"in_flight": 1, "reserved": 70, "picks": 1, "windows": windows(1, length=60)} | unbroken,
        "settle": {
            "at": ANY,
            "epoch": 1,
            "position": 6,
            "outcome": "success",
            "age_ms": 0,
            "batch": 1,
            "usage": {"input": 11, "output": 7, "cached": 0, "cache_creation": 0, "reasoning": 0},
            "cooldown_ms": 0,
            "first_token_us": 0,
            "stream_us": 0,
            "before": {"in_flight": 1, "reserved": 70} | ledger | {"windows": windows(1, length=60)} | unbroken,
            "after": {"in_flight": 0, "reserved": 0}
            | ledger
            | {"requests": 1, "input": 11, "output": 7, "last_used": ANY, "windows": windows(1, 18, 7, 60)}
            | minute
            | {"breaker": breaker | {"start": ANY, "requests": 1}},
        },
        "reap": None,
    }
    assert told["at"] < told["settle"]["at"]


async def test_a_tactics_numbers_are_those_of_the_picks_own_revision(admin: Admin) -> None:
    pick = await admin.pick()
    change = {"tactic": "hybrid", "params": {"request_threshold": 1}}
    await admin.send(f"{of(RULE)}/tactic", change, "PUT")
    later = await admin.pick()
    told = await found(admin, pick["decision"])
    assert (told["tactic"], told["request_threshold"], "token_threshold" in told) == ("round_robin", 2, False)
    told = await found(admin, later["decision"])
    assert (told["tactic"], told["request_threshold"], told["token_threshold"]) == ("hybrid", 1, 10_000)
    assert told["why"] == (
        f"{FIRST} was at a threshold, or could not serve: {SECOND} had the least requests x 10 + tokens in its window"
    )


async def test_a_retry_tells_what_was_tried_and_a_lost_attempt_who_reaped_it(admin: Admin) -> None:
    pick = await admin.pick(excluded=[FIRST], reserved=70, hold_s=1)

    async def is_reaped() -> bool:
        return (await found(admin, pick["decision"]))["reap"] is not None

    await eventually(is_reaped)
    told = await found(admin, pick["decision"])
    assert (told["excluded"], told["switched"], told["settle"]) == ([FIRST], False, None)
    assert told["why"] == (f"another attempt: round_robin chose {SECOND} without those tried before; the cursor stays")
    assert (told["reap"]["by"], told["reap"]["reserved"]) == (admin.gateway.balance.worker, 70)
    assert (told["reap"]["after"]["lost"], told["reap"]["after"]["lost_tokens"]) == (1, 70)


async def test_decisions_are_listed_newest_first_by_pool_and_rule(admin: Admin) -> None:
    here = [(await admin.pick())["decision"] for _ in range(3)]
    side = [(await admin.pick("side"))["decision"] for _ in range(2)]

    async def listed(query: str) -> list[str]:
        return [pick["id"] for pick in (await admin.get(f"/api/v1/decisions{query}"))["decisions"]]

    assert await listed("") == here[::-1], "the other pool records nothing"
    assert await listed("?limit=2") == here[:0:-1]
    assert await listed("?rule=side") == []
    assert await listed("?rule=org%2Fllama3%3A8b%20x&pool=default") == here[::-1]
    assert await listed("?rule=off") == []
    told = await admin.get("/api/v1/decisions?limit=1&pool=default")
    known = await found(admin, here[-1])
    del known["request_threshold"]  # Looked up for one decision, not for a list.
    assert told == {"decisions": [known], "recording": {"default": "full"}, "events_looked_at": 1, "is_cut": False}
    assert "pool side.1 records no events" in await missing(admin, side[0])


@pytest.mark.parametrize(
    ("query", "status", "error"),
    [
        ("?limit=0", 400, "limit: Expected `int` >= 1"),
        ("?limit=501", 400, "limit: Expected `int` <= 500"),
        ("?limit=x", 400, "limit: Expected `int`, got `str`"),
        ("?rules=x", 400, "unknown parameter 'rules' (known: pool, rule, limit)"),
        ("?pool=x", 404, "Pool not found"),
        ("?rule=x", 404, "Rule not found"),
        ("/default.1", 400, "expected a decision's id, <pool>.<epoch>.<position>"),
        ("/x.1.1", 404, "Pool not found"),
    ],
)
async def test_a_question_that_cannot_be_answered_is_refused(admin: Admin, query: str, status: int, error: str) -> None:
    assert (await admin.ask("GET", f"/api/v1/decisions{query}"))[:2] == (status, {"error": error})


async def test_what_is_no_pick_or_has_not_happened_is_told(admin: Admin) -> None:
    pick = await admin.pick()
    await admin.settle(pick["hold"])
    assert pick["decision"] == "default.1.3"
    assert await missing(admin, "default.1.2") == "Decision not found: at this position is a fence, no pick"
    assert await missing(admin, "default.1.4") == "Decision not found: at this position is a settle, no pick"
    nothing = "Decision not found: nothing is recorded after position 4 of epoch 1 (full)"
    assert await missing(admin, "default.1.5") == nothing
    assert await missing(admin, "default.2.1") == nothing


async def test_without_a_record_it_says_how_to_have_one(start: Start) -> None:
    admin = await start(a_document("off"))
    decision = (await admin.pick())["decision"]
    assert await missing(admin, decision) == (
        "Decision not found: pool default records no events "
        "(pools: [{name: default, record: full}] in the configuration does)"
    )
    assert (await admin.get("/api/v1/decisions"))["recording"] == {"default": "off", "side.1": "off"}


async def test_a_sampled_record_tells_what_the_tactic_saw(start: Start) -> None:
    admin = await start(a_document("sampled"))
    made = await pick_many(admin, 40)
    sampled = [decision for decision in made if int(decision.rpartition(".")[2]) % 17 == 0]
    other = made[made.index(sampled[0]) + 1]
    told = await found(admin, sampled[0])
    assert (told["request_threshold"], "token_threshold" in told) == (2, False)
    assert told["candidates"] == [
        {
            "service": service,
            "active": True,
            "candidate": True,
            "weight": 1,
            "tier": 0,
            "time_window": length,
            "window_requests": ANY,
            "window_tokens": 0,
            "in_flight": ANY,
            "first_token_us": 0,
            "per_token_us": 0,
        }
        for service, length in ((FIRST, 300), (SECOND, 60))
    ]
    assert sum(candidate["window_requests"] for candidate in told["candidates"]) == told["seq"] - 1
    assert await missing(admin, other) == (
        "Decision not found: pool default records a sample, one position in 17, and this one is not in it"
    )


async def test_what_was_trimmed_is_told(start: Start) -> None:
    admin = await start(a_document(events=1))
    made = await pick_many(admin, 250)
    assert (await found(admin, made[-1]))["seq"] == 250
    error = await missing(admin, made[0])
    assert error.startswith("Decision not found: the record begins at position ")
    assert error.endswith(" of epoch 1: earlier is trimmed")


async def test_looking_stops_after_so_many_events_and_says_so(admin: Admin, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decisions, "MOST_EVENTS", 200)
    made = await pick_many(admin, 250)
    assert await missing(admin, made[0]) == (
        "Decision not found: it is not among the newest 200 events, and no more are looked at"
    )
    told = await admin.get("/api/v1/decisions?pool=default&rule=off")
    assert (told["decisions"], told["events_looked_at"], told["is_cut"]) == ([], 200, True)


async def test_picks_go_on_while_a_long_record_is_read(admin: Admin) -> None:
    await pick_many(admin, 300)
    reading = asyncio.create_task(admin.get("/api/v1/decisions?rule=off"))
    assert len(await pick_many(admin, 20)) == 20
    assert (await reading)["events_looked_at"] >= 300
