"""What the admin API tells of smart-routing entries, and its dry run of them."""

from __future__ import annotations

from typing import Any

import pytest

from balancer.domain import Outcome, Rule, Usage
from tests.admin.conftest import FIRST, LIVE, RULE, SECOND, Admin, Start, a_document, counters, of
from tests.store.conftest import eventually

BIG = "a:big"
WORDS = " ".join(["word"] * 1000)


def a_routed_document() -> dict[str, Any]:
    """The usual document, whose first rule has entry `long` over a service of its own and the rule's first."""
    raw = a_document()
    services = [{"provider": "a", "model": "big", "limits": {"rpm": 100}}, {"provider": "a", "model": "m:1"}]
    ops = [{"position": "token", "operation": "ge", "value": 1000}]
    entry = {"uuid": "long", "description": "long prompts", "ops": ops, "services": services}
    raw["rules"][0] |= {"smart_enabled": True, "smart_routing": [entry]}
    return raw


@pytest.fixture
async def routed(start: Start) -> Admin:
    """A worker with that document."""
    return await start(a_routed_document())


def the_entry(admin: Admin) -> Rule:
    return admin.gateway.balance.directory.by_uuid[RULE].routed(0)


async def use(admin: Admin, rule: Rule, requests: int) -> list[str]:
    """The decisions of so many settled picks of the rule, or its entry."""
    balance, decisions = admin.gateway.balance, []
    for _ in range(requests):
        pick, _ = await balance.select(rule, reserved=0, deadline_ms=60_000)
        balance.settle(pick, Outcome.SUCCESS, Usage(input=5))
        decisions.append(pick.decision)

    async def is_settled() -> bool:
        return all(not service.in_flight for service in (await balance.view("default")).services.values())

    await eventually(is_settled)
    return decisions


async def test_a_summary_tells_where_each_entry_stands(routed: Admin) -> None:
    await use(routed, the_entry(routed), 3)
    await routed.settle((await routed.pick())["hold"])
    summary = (await routed.get(f"{of(RULE)}/summary"))["summary"]
    assert [service["service_id"] for service in summary["services"]] == [FIRST, SECOND]
    assert (summary["current_service_index"], summary["streak"]) == (0, 1)
    (entry,) = summary["smart_routing"]
    assert entry["services"][0]["stats"]["request_count"] == 2
    del entry["services"][0]["stats"], entry["services"][1]["stats"]
    assert entry == {
        "entry": "long",
        "description": "long prompts",
        "current_service": FIRST,
        "streak": 1,
        "services": [
            {"service_id": id_, "provider": "a", "model": id_[2:], "weight": 1, "active": True, "time_window": 300}
            for id_ in (BIG, FIRST)
        ],
    }


async def test_counters_know_services_that_only_entries_have_each_once(routed: Admin) -> None:
    await use(routed, the_entry(routed), 2)
    told = await routed.get(f"{of(RULE)}/stats")
    assert list(told["stats"]) == [FIRST, SECOND, BIG]
    assert told["stats"][BIG]["request_count"] == 2
    assert (await routed.stats(BIG))["input_tokens"] == 10
    assert BIG in (await routed.get(f"{LIVE}/stats"))["stats"]
    await routed.send(f"{of(RULE)}/stats/clear")
    assert await routed.stats(BIG) == counters(BIG)


async def test_one_service_of_an_entry_is_cleared_alone(routed: Admin) -> None:
    await use(routed, the_entry(routed), 3)
    await routed.send(f"{of(RULE)}/services/a%3Abig/stats/clear")
    assert await routed.stats(BIG) == counters(BIG)
    assert (await routed.stats(FIRST))["request_count"] == 1


async def test_a_decision_tells_its_entry(routed: Admin) -> None:
    (decision,) = await use(routed, the_entry(routed), 1)
    (own,) = await use(routed, routed.gateway.balance.directory.by_uuid[RULE], 1)
    told = [(await routed.get(f"/api/v1/decisions/{one}"))["decision"] for one in (decision, own)]
    assert [(one["rule"], one["entry"], one["service"]) for one in told] == [(RULE, "long", BIG), (RULE, None, FIRST)]


# -- explain -----------------------------------------------------------------------------------------------------------


async def test_a_dry_run_tells_the_entry_and_picks_nothing(routed: Admin) -> None:
    request = {"model": "llama", "messages": [{"role": "user", "content": WORDS}]}
    op = {"op": "token.ge", "value": "1000", "holds": True, "found": "1249"}
    expected = {
        "rule": RULE,
        "pool": "default",
        "model": "llama",
        "entry": "long",
        "description": "long prompts",
        "services": [BIG, FIRST],
        "estimated_tokens": 1249,
        "considered": [{"index": 0, "entry": "long", "description": "long prompts", "matches": True, "ops": [op]}],
        "note": "",
    }
    for more in ({}, {"rule": RULE}, {"scenario": "openai"}):
        assert await routed.send("/api/v1/explain", {"request": request} | more) == expected
    assert await routed.stats(BIG) == counters(BIG)


async def test_a_dry_run_tells_why_no_entry_matches(routed: Admin) -> None:
    request = {"model": "llama", "messages": [{"role": "user", "content": "canary"}]}
    told = await routed.send("/api/v1/explain", {"request": request})
    assert (told["entry"], told["services"]) == ("", [FIRST, SECOND])
    assert told["considered"][0]["ops"] == [{"op": "token.ge", "value": "1000", "holds": False, "found": "1"}]
    assert "canary" not in str(told)


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"request": {"model": "nobody"}}, 404, "no active rule of scenario openai"),
        ({"request": {"model": "llama"}, "rule": "nobody"}, 404, "no rule with uuid 'nobody'"),
        ({"request": {"model": "llama"}, "scenario": "anthropic"}, 404, "no active rule of scenario anthropic"),
        ({"request": {"model": "llama"}, "scenario": "nowhere"}, 400, "scenario"),
        ({"request": []}, 400, "body"),
        ({"request": {}}, 400, "model"),
        ({}, 400, "request"),
        ({"request": {"model": "llama"}, "color": 1}, 400, "color"),
        (b"{", 400, ""),
    ],
)
async def test_a_dry_run_says_what_is_wrong(routed: Admin, body: Any, status: int, words: str) -> None:
    answer = await routed.ask("POST", "/api/v1/explain", body)
    assert answer[0] == status, answer
    assert words in answer[1]["error"]


async def test_a_dry_run_is_for_those_with_the_token(routed: Admin) -> None:
    assert (await routed.ask("POST", "/api/v1/explain", {"request": {"model": "llama"}}, token=None))[0] == 401
