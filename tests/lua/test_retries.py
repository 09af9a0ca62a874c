"""A rule retries a share of its requests, never more, and no retry changes what the next first attempt gets."""

from __future__ import annotations

import random
from typing import Any

import pytest

from balancer import stored
from balancer.reference import Pool
from balancer.store import keys
from tests.lua.builders import ABC, A, B, C, Fleet, a_provider, a_rule, a_selection, a_service, an_entry
from tests.lua.stories import FAILED, RATE_LIMITED, ask, breaker, chosen, live, standing

SAVINGS = 100
"""Retries that an unused rule may make at once."""


def retries(fleet: Fleet, count: int, **selection: Any) -> int:
    """How many of so many retries found a service; the others were refused for want of a budget."""
    answers = fleet.ask(count, excluded=[A], **selection)
    assert [answer for answer in answers if answer[0] != "pick"] == [
        ["none", "budget", 0] for answer in answers if answer[0] != "pick"
    ]
    return sum(answer[0] == "pick" for answer in answers)


@pytest.mark.parametrize("permille", [1, 200, 1_000])
def test_a_new_rule_has_savings_for_a_hundred_retries(fleet: Fleet, permille: int) -> None:
    fleet.fence(a_rule(retry_permille=permille))
    assert retries(fleet, 2 * SAVINGS) == SAVINGS


@pytest.mark.parametrize(("permille", "made"), [(200, 20), (10, 1), (9, 0), (500, 50), (1_000, 100), (333, 33)])
def test_when_those_are_spent_a_hundred_requests_earn_their_share(fleet: Fleet, permille: int, made: int) -> None:
    fleet.fence(a_rule(retry_permille=permille))
    retries(fleet, SAVINGS)
    fleet.ask(100)
    assert retries(fleet, 200) == made


def test_what_is_left_over_counts_towards_the_next_one(fleet: Fleet) -> None:
    fleet.fence(a_rule(retry_permille=300))
    retries(fleet, SAVINGS)
    made = []
    for _ in range(10):
        fleet.ask()
        made.append(retries(fleet, 2))
    assert made == [0, 0, 0, 1, 0, 0, 1, 0, 0, 1]


def test_no_more_than_a_hundred_are_saved(fleet: Fleet) -> None:
    fleet.fence(a_rule(retry_permille=1_000))
    fleet.ask(500)
    assert retries(fleet, 300) == SAVINGS
    fleet.ask(500)
    assert retries(fleet, 300) == SAVINGS


@pytest.mark.parametrize("seed", range(4))
def test_retries_are_never_more_than_the_share_and_the_savings(fleet: Fleet, seed: int) -> None:
    rand = random.Random(seed)
    permille = rand.choice((50, 200, 700))
    fleet.fence(a_rule(retry_permille=permille))
    made, first, level = 0, 0, SAVINGS * 1_000
    for _ in range(400):
        count = rand.randint(1, 9)
        if rand.random() < 0.5:
            assert {answer[0] for answer in fleet.ask(count)} == {"pick"}
            first += count
            level = min(SAVINGS * 1_000, level + count * permille)
        else:
            granted = retries(fleet, count)
            assert granted == min(count, level // 1_000)
            made, level = made + granted, level - granted * 1_000
        assert made * 1_000 <= SAVINGS * 1_000 + first * permille


def test_a_rule_without_a_share_never_retries(fleet: Fleet) -> None:
    fleet.fence(a_rule(retry_permille=0))
    fleet.ask(50)
    assert ask(fleet, excluded=[A]) == ("none", "budget", 0)


def test_each_rule_has_a_budget_of_its_own_for_all_workers(fleet: Fleet) -> None:
    fleet.fence(a_rule(), a_rule(rule="other"))
    assert [len(fleet.ask(25, excluded=[A], worker=f"w{number}")) for number in range(4)] == [25] * 4
    assert ask(fleet, excluded=[A]) == ("none", "budget", 0)
    assert ask(fleet, excluded=[A], rule="other")[1] == "retry"


@pytest.mark.parametrize("kind", ["pinned", "only", "exhausted", "probe", "tactic"])
def test_every_first_attempt_that_is_picked_earns(fleet: Fleet, kind: str) -> None:
    breakers = [a_provider("a", failures=1, open_ms=1_000, successes=10)]
    fleet.fence(a_rule(retry_permille=1_000, providers=breakers))
    retries(fleet, SAVINGS)
    match kind:
        case "pinned":
            fleet.ask(2, session="s", affinity_ms=9_000)
        case "only":
            fleet.ask(2, only=B)
        case "exhausted":
            fleet.settle(*(an_entry(0, service, RATE_LIMITED, cooldown_ms=5) for service in ABC))
            assert [chosen(fleet)[1] for _ in range(2)] == ["exhausted"] * 2
            fleet.pass_ms(5)
        case "probe":
            fleet.settle(an_entry(0, A, FAILED))
            fleet.pass_ms(1_200)
            assert [chosen(fleet)[1] == "probe" for _ in range(2)] == [True, False]
        case _:
            fleet.ask(2)
    assert retries(fleet, 9) == 2


@pytest.mark.parametrize("kind", ["limited", "inactive", "stale", "abandoned"])
def test_what_is_not_picked_earns_nothing(fleet: Fleet, kind: str) -> None:
    services = [a_service(A, in_flight=-1 if kind == "limited" else 0, active=kind != "inactive")]
    fleet.fence(a_rule(retry_permille=1_000, rule="chat", revision=2))
    retries(fleet, SAVINGS, revision=2)
    fleet.fence(a_rule(services=services, retry_permille=1_000, revision=3))
    asked = fleet.ask(5, revision=2 if kind == "stale" else 3)
    if kind == "abandoned":
        fleet.numbers["w1"] -= 5
        assert {answer[0] for answer in fleet.ask(5, revision=3)} == {"abandoned"}
    fleet.fence(a_rule(retry_permille=1_000, revision=4))
    assert retries(fleet, 9, revision=4) == sum(answer[0] == "pick" for answer in asked)


def test_a_retry_that_finds_nobody_costs_nothing(fleet: Fleet) -> None:
    fleet.fence(a_rule(services=[A, B]))
    for _ in range(2 * SAVINGS):
        assert ask(fleet, excluded=[A, B]) == ("none", "tried", 0)
    assert retries(fleet, 2 * SAVINGS) == SAVINGS


def test_without_a_budget_nobody_is_looked_for(fleet: Fleet) -> None:
    fleet.fence(a_rule(services=[a_service(A, active=False)], retry_permille=0))
    assert ask(fleet, excluded=[B]) == ("none", "budget", 0)


def test_an_edit_keeps_what_is_left(fleet: Fleet) -> None:
    fleet.fence(a_rule(retry_permille=200))
    retries(fleet, SAVINGS - 3)
    fleet.fence(a_rule(retry_permille=900, revision=2))
    assert retries(fleet, 9, revision=2) == 3
    fleet.ask(10, revision=2)
    assert retries(fleet, 20, revision=2) == 9


def test_a_rule_that_may_retry_again_starts_with_nothing(fleet: Fleet) -> None:
    """It would get a hundred retries anew with each edit otherwise."""
    fleet.fence(a_rule(retry_permille=200))
    fleet.fence(a_rule(retry_permille=0, revision=2))
    fleet.fence(a_rule(retry_permille=500, revision=3))
    assert retries(fleet, 9, revision=3) == 0
    fleet.ask(4, revision=3)
    assert retries(fleet, 9, revision=3) == 2


# -- what a retry gets -------------------------------------------------------------------------------------------------


def test_a_retry_chooses_as_if_those_tried_were_no_candidates_and_changes_nothing(fleet: Fleet) -> None:
    fleet.fence(a_rule(requests=2, cursor=B))
    fleet.ask()
    assert ask(fleet, excluded=[B]) == (C, "retry", 1, 0)
    assert ask(fleet, excluded=[B, C]) == (A, "retry", 1, 0)
    assert ask(fleet, excluded=[C]) == (B, "retry", 1, 0)
    assert standing(fleet) == (B, 1)
    assert fleet.picks(3) == "bcc"


@pytest.mark.parametrize("tactic", ["token_based", "hybrid", "least_in_flight", "cost", "weighted_round_robin"])
def test_no_tactic_gives_a_retry_what_was_tried(fleet: Fleet, tactic: str) -> None:
    fleet.fence(a_rule(tactic))
    for excluded in ([A], [B], [C], [A, B], [B, C], [A, C]):
        service, reason = chosen(fleet, excluded=excluded)
        assert (reason, service in excluded) == ("retry", False)


def test_a_retry_takes_a_seq_a_place_and_counts_in_windows(fleet: Fleet) -> None:
    fleet.fence(a_rule("hybrid", [A, B], requests=2))
    (first,), (second,) = fleet.ask(), fleet.ask(excluded=[A])
    assert (second[3], second[5]) == (first[3] + 1, first[5] + 1)
    fleet.ask(excluded=[A])
    assert fleet.picks(2) == "aa", "A's second, and then both have had their two: the least is the first"


def test_services_excluded_that_are_not_in_the_rule_change_nothing(fleet: Fleet) -> None:
    fleet.fence(a_rule())
    assert chosen(fleet, excluded=["x:y", "z"])[1] == "retry"


def test_a_weighted_turn_is_not_taken_by_a_retry(fleet: Fleet) -> None:
    services = [a_service(A, weight=3), a_service(B, weight=2)]
    fleet.fence(a_rule("weighted_round_robin", services))
    with_retries = ""
    for _ in range(10):
        with_retries += fleet.picks(1)
        fleet.ask(excluded=[A])
    fleet.fence(a_rule("weighted_round_robin", services, rule="other"))
    assert with_retries == fleet.picks(10, rule="other")


def test_a_retry_is_not_tried_on_what_cools_or_is_broken(fleet: Fleet) -> None:
    fleet.fence(a_rule(providers=[a_provider("b", failures=1)]))
    live(fleet, "f", B)
    assert breaker(fleet, B).state == 1
    fleet.settle(an_entry(0, C, RATE_LIMITED, cooldown_ms=9))
    assert ask(fleet, excluded=[A]) == ("none", "tried", 0)
    fleet.pass_ms(9)
    assert chosen(fleet, excluded=[A]) == (C, "retry")


def test_a_retry_that_limits_keep_back_is_told_how_long(fleet: Fleet) -> None:
    fleet.fence(a_rule(services=[A, a_service(B, rpm=1)]))
    assert chosen(fleet, excluded=[A]) == (B, "retry")
    assert ask(fleet, excluded=[A]) == ("none", "limited", 65_000)


@pytest.mark.parametrize("excluded", [[A], [A, B]])
def test_a_retry_of_a_rule_whose_others_are_switched_off_has_tried_all(fleet: Fleet, excluded: list[str]) -> None:
    fleet.fence(a_rule(services=[A, a_service(B, active=False)]))
    assert ask(fleet, excluded=excluded) == ("none", "tried", 0)


def test_a_retry_of_a_rule_that_has_nothing_active_any_more_is_told_so(fleet: Fleet) -> None:
    fleet.fence(a_rule(services=[a_service(A, active=False)]))
    assert ask(fleet, excluded=[A]) == ("none", "inactive", 0)


def test_budget_is_kept_in_thousandths_and_expires_with_the_pool(fleet: Fleet) -> None:
    fleet.fence(a_rule(retry_permille=200))
    fleet.select(*(a_selection(number) for number in range(1, 4)))
    fleet.numbers["w1"] = 3
    retries(fleet, 2)
    fleet.ask()
    if isinstance(fleet.pool, Pool):
        assert fleet.pool.rules["chat"].left == 98_200
    else:
        kept: bytes = fleet.pool.client.hget(keys.partitions(fleet.pool.name), "rule:chat")
        assert stored.rule(kept.decode())["budget"] == 98_200
