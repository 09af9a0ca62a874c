"""How a service is chosen: every rule of it, told to the real scripts."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from balancer.domain import Configuration, Provider, Rule, ServiceDefinition
from balancer.domain import Service as ConfiguredService
from balancer.store import keys
from balancer.store.calls import Definer
from balancer.tactics import Hybrid, RoundRobin, TokenBased
from tests.lua.builders import (
    ABC,
    DEADLINE_MS,
    LEASE_MS,
    NEVER,
    NOW_MS,
    A,
    B,
    C,
    D,
    Fleet,
    a_rule,
    a_selection,
    a_service,
    a_tombstone,
    an_abandoned,
    an_entry,
    evaluate_tick,
    pool_keys,
    refused,
)
from tests.lua.pool import LuaPool

NewPool = Callable[..., LuaPool]
DAY_MS = 86_400_000


@pytest.fixture
def fleet(new_pool: NewPool) -> Fleet:
    return Fleet(new_pool())


# -- round_robin -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("threshold", "picks"),
    [(1, "abcabcabcabc"), (2, "aabbccaabbcc"), (3, "aaabbbcccaaa"), (5, "aaaaabbbbbcc"), (NEVER, "aaaaaaaaaaaa")],
)
def test_round_robin_moves_on_after_its_streak(fleet: Fleet, threshold: int, picks: str) -> None:
    fleet.fence(a_rule("round_robin", requests=threshold))
    assert fleet.picks(12) == picks


def test_each_answer_tells_service_reason_seq_place_streak_and_switch(fleet: Fleet) -> None:
    fleet.fence(a_rule("round_robin", requests=2))
    reply = fleet.select(*(a_selection(number) for number in range(1, 5)))
    assert reply == [
        ["pick", A, "streak", 1, 1, 2, 1, 0],
        ["pick", A, "streak", 2, 1, 3, 2, 0],
        ["pick", B, "next", 3, 1, 4, 1, 1],
        ["pick", B, "streak", 4, 1, 5, 2, 0],
        ["pool", 1, 5, 0],
    ]


def test_a_streak_is_counted_over_all_workers(fleet: Fleet) -> None:
    fleet.fence(a_rule("round_robin", requests=3))
    picks = [fleet.picks(count, worker=f"w{number}") for number, count in enumerate((1, 1, 2, 4, 1))]
    assert "".join(picks) == "aaabbbccc"


def test_the_only_service_starts_a_streak_anew_without_a_switch(fleet: Fleet) -> None:
    fleet.fence(a_rule("round_robin", [A], requests=2))
    answers = [(answer[1], answer[2], answer[6], answer[7]) for answer in fleet.ask(5)]
    assert answers == [
        (A, "streak", 1, 0),
        (A, "streak", 2, 0),
        (A, "next", 1, 0),
        (A, "streak", 2, 0),
        (A, "next", 1, 0),
    ]


def test_round_robin_passes_over_what_is_inactive(fleet: Fleet) -> None:
    fleet.fence(a_rule("round_robin", [A, a_service(B, active=False), C, a_service(D, active=False)], requests=2))
    assert fleet.picks(8) == "aaccaacc"


@pytest.mark.parametrize(("cursor", "following"), [(A, "bbcc"), (B, "ccaa"), (C, "aabb")])
def test_round_robin_goes_on_after_a_cursor_that_became_inactive(fleet: Fleet, cursor: str, following: str) -> None:
    fleet.fence(a_rule("round_robin", cursor=cursor))
    assert fleet.picks(1) == cursor[0]
    fleet.fence(a_rule("round_robin", [a_service(s, active=s != cursor) for s in ABC], revision=2))
    assert fleet.picks(4, revision=2) == following


def test_settles_and_time_leave_a_streak_alone(fleet: Fleet) -> None:
    fleet.fence(a_rule("round_robin", requests=3))
    fleet.ask(2)
    fleet.settle(an_entry(1, A, input=1000), an_entry(2, A, input=1000))
    fleet.pass_ms(10 * DAY_MS)
    assert fleet.picks(4) == "abbb"


# -- token_based -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "cursor", "picked"),
    [
        ((0, 0, 0), "", A),
        ((99, 0, 0), A, A),
        ((100, 0, 0), A, B),
        ((101, 5, 4), A, C),
        ((0, 99, 0), B, B),
        ((0, 0, 100), C, A),
        ((100, 100, 100), C, A),
        ((500, 200, 300), B, B),
        ((300, 200, 200), C, B),
        ((101, 0, 0), "", B),
    ],
)
def test_token_based_stays_below_its_threshold_and_then_takes_the_least(
    fleet: Fleet, tokens: tuple[int, int, int], cursor: str, picked: str
) -> None:
    for service, used in zip(ABC, tokens, strict=True):
        fleet.use(service, tokens=used)
    fleet.fence(a_rule("token_based", tokens=100, cursor=cursor))
    assert fleet.ask()[0][1] == picked


def test_token_based_counts_input_and_output_and_nothing_else(fleet: Fleet) -> None:
    fleet.fence(a_rule("token_based", [A, B], tokens=100))
    fleet.settle(an_entry(0, A, input=60, output=39, cached=500, cache_creation=500, reasoning=500))
    assert fleet.picks(1) == "a"
    fleet.settle(an_entry(0, A, output=1))
    assert fleet.picks(1) == "b"


def test_token_based_does_not_count_requests(fleet: Fleet) -> None:
    fleet.fence(a_rule("token_based", tokens=1))
    assert fleet.picks(100) == "a" * 100


def test_token_based_passes_over_what_is_inactive_though_it_used_least(fleet: Fleet) -> None:
    for service, used in ((A, 100), (B, 50), (C, 0)):
        fleet.use(service, tokens=used)
    fleet.fence(a_rule("token_based", [A, B, a_service(C, active=False)], tokens=100))
    assert fleet.picks(1) == "b"


# -- hybrid ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("requests", "tokens", "cursor", "picked"),
    [
        ((0, 0, 0), (0, 0, 0), "", A),
        ((4, 0, 0), (99, 0, 0), A, A),
        ((5, 0, 0), (0, 0, 0), A, B),
        ((0, 0, 0), (100, 0, 0), A, B),
        ((5, 3, 2), (0, 0, 10), A, B),
        ((5, 3, 2), (0, 0, 9), A, C),
        ((5, 0, 5), (0, 51, 0), A, A),
        ((5, 5, 5), (100, 100, 100), C, A),
        ((0, 0, 7), (0, 0, 0), C, A),
        ((5, 0, 0), (0, 0, 0), "", B),
    ],
)
def test_hybrid_stays_below_both_thresholds_and_then_takes_the_least_of_both(
    fleet: Fleet, requests: tuple[int, int, int], tokens: tuple[int, int, int], cursor: str, picked: str
) -> None:
    for service, picks, used in zip(ABC, requests, tokens, strict=True):
        fleet.use(service, requests=picks, tokens=used)
    fleet.fence(a_rule("hybrid", requests=5, tokens=100, cursor=cursor))
    assert fleet.ask()[0][1] == picked


def test_a_streak_of_hybrid_goes_on_while_it_keeps_taking_the_cursor(fleet: Fleet) -> None:
    fleet.fence(a_rule("hybrid", [A, B], requests=2))
    fleet.use(B, tokens=25)
    answers = [(answer[1], answer[2], answer[6], answer[7]) for answer in fleet.ask(4)]
    assert answers == [(A, "threshold", 1, 0), (A, "threshold", 2, 0), (A, "least", 3, 0), (B, "least", 1, 1)]


# -- random ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "draw", "picked"),
    [
        ((1, 3, 0), 0, A),
        ((1, 3, 0), 2**30 - 1, A),
        ((1, 3, 0), 2**30, B),
        ((1, 3, 0), 2**32 - 1, B),
        ((0, 0, 1), 0, C),
        ((0, 0, 1), 2**32 - 1, C),
        ((0, 0, 0), 0, A),
        ((0, 0, 0), 2**31, B),
        ((0, 0, 0), 2**32 - 1, C),
    ],
)
def test_random_draws_by_weight(fleet: Fleet, weights: tuple[int, int, int], draw: int, picked: str) -> None:
    fleet.fence(a_rule("random", [a_service(s, weight=w) for s, w in zip(ABC, weights, strict=True)]))
    (answer,) = fleet.ask(draw=draw)
    assert answer == ["pick", picked, "draw", 1, 1, 2, 0, 0]


@pytest.mark.parametrize(
    ("services", "shares"),
    [
        ([a_service(A, weight=1), a_service(B, weight=2), a_service(C, weight=5)], {"a": 64, "b": 128, "c": 320}),
        ([a_service(A, weight=1), a_service(B, weight=2, active=False), a_service(C, weight=3)], {"a": 128, "c": 384}),
        ([a_service(A, weight=0), a_service(B, weight=2, active=False)], {"a": 512}),
        ([a_service(A, weight=0), a_service(B, weight=0)], {"a": 256, "b": 256}),
    ],
)
def test_evenly_spread_draws_give_each_candidate_its_share(
    fleet: Fleet, services: list[ServiceDefinition], shares: dict[str, int]
) -> None:
    fleet.fence(a_rule("random", services))
    picked = ""
    for start in range(0, 512, 64):
        reply = fleet.select(*(a_selection(i + 1, draw=i * 2**23) for i in range(start, start + 64)))
        picked += "".join(answer[1][0] for answer in reply[:-1])
    assert {letter: picked.count(letter) for letter in sorted(set(picked))} == shares


def test_random_sets_the_cursor_and_streak_0(fleet: Fleet) -> None:
    fleet.fence(a_rule("random"))
    answers = [fleet.ask(draw=draw)[0] for draw in (2**31, 2**31, 0)]
    assert [(answer[1], answer[6], answer[7]) for answer in answers] == [(B, 0, 0), (B, 0, 0), (A, 0, 1)]
    assert fleet.cursor() == (A, 0)


# -- the cursor --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tactic", ["round_robin", "token_based", "hybrid"])
def test_without_a_cursor_the_first_candidate_is_the_current_one(fleet: Fleet, tactic: str) -> None:
    fleet.fence(a_rule(tactic, [a_service(A, active=False), B, C]))
    assert fleet.cursor() == ("", 0)
    (answer,) = fleet.ask()
    assert (answer[1], answer[6], answer[7]) == (B, 1, 0)
    assert fleet.cursor() == (B, 1)


@pytest.mark.parametrize("tactic", ["round_robin", "token_based", "hybrid"])
def test_after_the_cursor_left_the_rule_the_first_candidate_is_the_current_one(fleet: Fleet, tactic: str) -> None:
    fleet.fence(a_rule(tactic, cursor=C))
    fleet.ask()
    fleet.fence(a_rule(tactic, [A, B], revision=2))
    assert fleet.cursor() == ("", 0)
    (answer,) = fleet.ask(revision=2)
    assert (answer[1], answer[6], answer[7]) == (A, 1, 0)


@pytest.mark.parametrize("tactic", ["token_based", "hybrid"])
def test_a_cursor_that_is_no_candidate_gives_way_to_the_least(fleet: Fleet, tactic: str) -> None:
    fleet.use(A, tokens=20)
    fleet.fence(a_rule(tactic, requests=9, cursor=B))
    fleet.fence(a_rule(tactic, [A, a_service(B, active=False), C], requests=9, revision=2))
    (answer,) = fleet.ask(revision=2)
    assert (answer[1], answer[6], answer[7]) == (C, 1, 1)


@pytest.mark.parametrize("tactic", ["round_robin", "token_based", "hybrid", "random"])
@pytest.mark.parametrize(
    ("services", "excluded", "why"),
    [([a_service(A, active=False)], (), "inactive"), ([], (), "inactive"), ([A, B], (A, B), "tried")],
    ids=["all inactive", "no services", "all tried"],
)
def test_without_a_candidate_nothing_is_picked_counted_or_held(
    fleet: Fleet, tactic: str, services: list[str | ServiceDefinition], excluded: tuple[str, ...], why: str
) -> None:
    fleet.fence(a_rule(tactic, services))
    before = fleet.view()
    assert fleet.select(a_selection(1, excluded=excluded, reserved=7)) == [["none", why, 0], ["pool", 1, 1, 0]]
    assert fleet.view() == before
    assert fleet.reap("w1") == ["reaped", 0, 0, 1, 1, 0]


# -- thresholds that are never reached ---------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [2**53, 2**53 + 1, 2**60])
@pytest.mark.parametrize("kind", [RoundRobin, TokenBased, Hybrid])
def test_a_threshold_beyond_2_53_is_never_reached(fleet: Fleet, kind: Any, threshold: int) -> None:
    known = {"request_threshold": threshold, "token_threshold": threshold}
    tactic = kind(**{name: value for name, value in known.items() if name in kind.__struct_fields__})
    services = (ConfiguredService(provider="a", model="m"), ConfiguredService(provider="b", model="m"))
    rule = Rule(uuid="chat", request_model="chat", lb_tactic=tactic, services=services)
    providers = tuple(Provider(uuid=u, name=u, api_base="https://upstream.invalid") for u in "ab")
    fleet.fence(Definer(Configuration(providers=providers, rules=(rule,))).definition(rule, 1))
    fleet.settle(an_entry(0, A, input=2**52))
    assert fleet.picks(70) == "a" * 70


def test_a_threshold_just_below_2_53_is_reached_exactly(fleet: Fleet) -> None:
    fleet.fence(a_rule("token_based", [A, B], tokens=2**53 - 1))
    fleet.settle(an_entry(0, A, input=2**53 - 2))
    assert fleet.picks(1) == "a"
    fleet.settle(an_entry(0, A, input=1))
    assert fleet.picks(1) == "b"


# -- retries -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tactic", ["round_robin", "token_based", "hybrid", "random"])
def test_a_retry_leaves_cursor_and_streak_alone_and_counts_all_the_same(fleet: Fleet, tactic: str) -> None:
    fleet.fence(a_rule(tactic, requests=9))
    fleet.ask()
    before = fleet.cursor()
    (answer,) = fleet.ask(excluded=(A,), reserved=7, draw=0)
    assert answer == ["pick", B, "retry", 2, 1, 3, before[1], 0]
    assert fleet.cursor() == before
    assert fleet.windows(B) == [(300, 0, 1, 0)]
    service = fleet.service(B)
    assert (service.picks, service.in_flight, service.reserved) == (1, 1, 7)


def test_a_streak_goes_on_as_if_there_had_been_no_retries(fleet: Fleet) -> None:
    fleet.fence(a_rule("round_robin", requests=3))
    picked = [fleet.picks(1) + fleet.picks(2, excluded=(A,)) for _ in range(4)]
    assert "".join(picks[0] for picks in picked) == "aaab"


def test_a_retry_may_take_the_cursor_when_another_was_tried(fleet: Fleet) -> None:
    fleet.fence(a_rule("round_robin", requests=2))
    fleet.ask()
    assert [answer[1:3] for answer in fleet.ask(3, excluded=(B,))] == [[A, "retry"]] * 3
    assert fleet.cursor() == (A, 1)


@pytest.mark.parametrize(
    ("cursor", "excluded", "picked"),
    [(A, (A,), B), (A, (A, B), C), (B, (B, C), A), (C, (C,), A), (C, (A, C), B), (B, ("gone:m", B), C)],
)
def test_a_retry_of_round_robin_goes_on_after_the_cursor_past_what_was_tried(
    fleet: Fleet, cursor: str, excluded: tuple[str, ...], picked: str
) -> None:
    fleet.fence(a_rule("round_robin", cursor=cursor))
    fleet.ask()
    assert fleet.ask(excluded=excluded)[0][1] == picked


@pytest.mark.parametrize("tactic", ["token_based", "hybrid"])
def test_a_retry_takes_the_least_of_what_was_not_tried(fleet: Fleet, tactic: str) -> None:
    for service, used in ((A, 0), (B, 90), (C, 80), (D, 70)):
        fleet.use(service, tokens=used)
    fleet.fence(a_rule(tactic, [A, B, C, a_service(D, active=False)], requests=9, cursor=A))
    assert fleet.ask(excluded=(A,))[0][1] == C


def test_a_retry_draws_among_the_weights_of_what_was_not_tried(fleet: Fleet) -> None:
    fleet.fence(a_rule("random", [a_service(A, weight=8), a_service(B, weight=1), a_service(C, weight=1)]))
    answers = [fleet.ask(excluded=(A,), draw=draw)[0][1] for draw in (2**31 - 1, 2**31)]
    assert answers == [B, C]


def test_a_first_attempt_that_some_cannot_serve_moves_the_cursor_past_them_and_costs_no_budget(fleet: Fleet) -> None:
    """Requests that only some services can carry would else use the budget of retries up, or all go to one of them."""
    fleet.fence(a_rule("round_robin", requests=2, retry_permille=0))
    assert fleet.picks(8, barred=(B,)) == "aaccaacc"
    assert fleet.cursor() == (C, 2)
    assert [fleet.picks(1, barred=(A,)), fleet.picks(2), fleet.picks(1, barred=(B, C))] == ["b", "bc", "a"]


def test_a_first_attempt_that_the_cursor_can_serve_goes_on_with_its_streak(fleet: Fleet) -> None:
    fleet.fence(a_rule("round_robin", requests=3))
    assert fleet.ask(2, barred=(B,))[1] == ["pick", A, "streak", 2, 1, 3, 2, 0]
    assert fleet.picks(2) == "ab"


@pytest.mark.parametrize("tactic", ["token_based", "hybrid"])
def test_a_first_attempt_takes_the_least_of_those_that_can_serve_it(fleet: Fleet, tactic: str) -> None:
    for service, used in ((A, 90), (B, 10), (C, 50)):
        fleet.use(service, tokens=used)
    fleet.fence(a_rule(tactic, requests=9, tokens=60, cursor=A))
    assert fleet.ask(barred=(B,))[0][1] == C


def test_nothing_is_picked_when_all_are_barred_and_a_retry_says_that_the_rest_was_tried(fleet: Fleet) -> None:
    fleet.fence(a_rule())
    assert fleet.ask(barred=(A, B, C))[0] == ["none", "inactive", 0]
    assert fleet.ask(barred=(B, C), excluded=(A,))[0] == ["none", "tried", 0]
    assert fleet.ask(barred=(B,), excluded=(A,))[0][1:3] == [C, "retry"]


def test_a_retry_sets_no_cursor_where_there_was_none(fleet: Fleet) -> None:
    fleet.fence(a_rule("round_robin"))
    assert fleet.ask(excluded=(A,))[0] == ["pick", B, "retry", 1, 1, 2, 0, 0]
    assert fleet.cursor() == ("", 0)
    assert fleet.picks(1) == "a"


# -- windows -----------------------------------------------------------------------------------------------------------


def test_a_window_starts_with_its_first_pick_and_tumbles_when_its_length_has_passed(fleet: Fleet) -> None:
    fleet.fence(a_rule("random", [a_service(A, window_s=10)]))
    assert fleet.windows() == [(10, -NOW_MS, 0, 0)]
    seen = []
    for passed_ms in (0, 9_999, 1, 25_000, 9_999):
        fleet.pass_ms(passed_ms)
        fleet.ask()
        seen += fleet.windows()
    assert seen == [(10, 0, 1, 0), (10, 0, 2, 0), (10, 10_000, 1, 0), (10, 35_000, 1, 0), (10, 35_000, 2, 0)]


def test_usage_opens_a_window_as_a_pick_does(fleet: Fleet) -> None:
    fleet.fence(a_rule("random", [a_service(A, window_s=10)]))
    fleet.ask()
    fleet.pass_ms(10_000)
    fleet.settle(an_entry(1, A, input=3, output=4))
    assert fleet.windows() == [(10, 10_000, 0, 7)]


def test_an_ended_window_reads_as_zeros(fleet: Fleet) -> None:
    services = [a_service(A, window_s=10), a_service(B, window_s=10)]
    fleet.fence(a_rule("hybrid", services, requests=2))
    assert fleet.picks(3) == "aab"
    fleet.pass_ms(9_999)
    assert fleet.picks(1) == "b"
    fleet.pass_ms(1)
    assert fleet.picks(2) == "bb", "the cursor stays, for its window has ended"


def test_looking_at_a_window_opens_none(fleet: Fleet) -> None:
    services = [a_service(s, window_s=10) for s in ABC]
    fleet.fence(a_rule("token_based", services, tokens=100))
    fleet.settle(*(an_entry(0, s, input=100 + i) for i, s in enumerate(ABC)))
    fleet.pass_ms(10_000)
    fleet.settle(an_entry(0, A, input=100))
    assert fleet.picks(1) == "b", "all three were looked at"
    assert [fleet.windows(s) for s in ABC] == [[(10, 10_000, 0, 100)], [(10, 10_000, 1, 0)], [(10, 0, 0, 102)]]


def test_a_start_in_the_future_counts_as_now(fleet: Fleet) -> None:
    fleet.fence(a_rule("random", [a_service(A, window_s=10)]))
    fleet.ask()
    fleet.pass_ms(-100_000)
    fleet.ask()
    assert fleet.windows() == [(10, -100_000, 2, 0)]
    fleet.pass_ms(10_000)
    fleet.ask()
    assert fleet.windows() == [(10, -90_000, 1, 0)]


def test_a_window_whose_start_is_in_the_future_still_counts(fleet: Fleet) -> None:
    fleet.fence(a_rule("hybrid", [A, B], requests=2))
    assert fleet.picks(2) == "aa"
    fleet.pass_ms(-100_000)
    assert fleet.picks(1) == "b"


def test_each_rule_reads_the_window_of_its_own_length_and_all_count_every_pick(fleet: Fleet) -> None:
    lengths = {A: (5, 60), B: (5, 60)}
    for rule, window_s in (("short", 5), ("long", 60)):
        services = [a_service(A, window_s=window_s), a_service(B, window_s=window_s)]
        fleet.fence(a_rule("hybrid", services, rule=rule, requests=3, lengths=lengths))
    assert fleet.picks(2, rule="short") + fleet.picks(2, rule="long") == "aaab"
    assert fleet.windows(A) == [(5, 0, 3, 0), (60, 0, 3, 0)]
    fleet.pass_ms(5_000)
    assert fleet.picks(3, rule="short") == "aaa"
    assert fleet.windows(A) == [(5, 5_000, 3, 0), (60, 0, 6, 0)]
    assert fleet.picks(6, rule="long") == "bbbbba", "B is taken until its long window counts six requests, as A's does"


def test_a_rule_may_give_each_service_a_window_of_its_own(fleet: Fleet) -> None:
    fleet.fence(a_rule("hybrid", [a_service(A, window_s=5), a_service(B, window_s=60)], requests=1))
    assert fleet.picks(2) == "ab"
    fleet.pass_ms(5_000)
    assert fleet.picks(1) == "a"
    fleet.pass_ms(5_000)
    assert fleet.picks(2) == "aa"


def test_counters_of_a_service_are_shared_by_the_rules_of_its_pool(fleet: Fleet) -> None:
    fleet.fence(a_rule("hybrid", [A, B], requests=2), a_rule("random", [A], rule="other"))
    fleet.ask(2, rule="other")
    assert fleet.picks(1) == "b"


def test_another_pool_shares_nothing(new_pool: NewPool) -> None:
    one, other = Fleet(new_pool()), Fleet(new_pool())
    for fleet in (one, other):
        fleet.fence(a_rule("hybrid", [A, B], requests=2))
    one.ask(2)
    assert other.ask()[0] == ["pick", A, "threshold", 1, 1, 2, 1, 0]


# -- reserved tokens ---------------------------------------------------------------------------------------------------


def test_concurrent_requests_do_not_pile_up_on_one_service(fleet: Fleet) -> None:
    fleet.fence(a_rule("token_based", tokens=100))
    assert fleet.picks(8, reserved=50) == "aabbccab"
    assert [fleet.service(s).reserved for s in ABC] == [150, 150, 100]


@pytest.mark.parametrize(("reserved", "picked"), [(39, "a"), (40, "b")])
def test_reserved_tokens_count_toward_the_threshold_exactly(fleet: Fleet, reserved: int, picked: str) -> None:
    fleet.fence(a_rule("hybrid", [A, B], requests=9, tokens=100))
    fleet.settle(an_entry(0, A, input=60))
    fleet.ask(reserved=reserved)
    assert fleet.picks(1) == picked


@pytest.mark.parametrize("tactic", ["token_based", "hybrid"])
def test_reserved_tokens_of_the_others_count_when_the_least_is_taken(fleet: Fleet, tactic: str) -> None:
    fleet.use(A, tokens=100)
    fleet.use(B, reserved=30)
    fleet.use(C, requests=1, tokens=29)
    fleet.fence(a_rule(tactic, requests=9, tokens=100, cursor=A))
    assert fleet.picks(1) == "c"


def test_reserved_tokens_belong_to_no_window(fleet: Fleet) -> None:
    fleet.fence(a_rule("token_based", [a_service(A, window_s=5), a_service(B, window_s=5)], tokens=100))
    fleet.ask(reserved=100)
    assert fleet.windows() == [(5, 0, 1, 0)]
    fleet.pass_ms(50_000)
    assert fleet.picks(1) == "b", "they are in flight still, though every window has ended"


def test_a_settle_puts_what_was_used_in_the_place_of_what_was_reserved(fleet: Fleet) -> None:
    fleet.fence(a_rule("token_based", [A, B], tokens=100))
    fleet.ask(reserved=100)
    fleet.settle(an_entry(1, A, input=99))
    assert fleet.picks(1) == "a"
    assert (fleet.service().reserved, fleet.windows()) == (0, [(300, 0, 2, 99)])


# -- seq, position, epoch ----------------------------------------------------------------------------------------------


def test_seq_counts_a_rules_picks_and_position_the_pools_changes(fleet: Fleet) -> None:
    fleet.fence(a_rule(rule="chat"), a_rule(rule="embed"))
    asked = [a_selection(i, rule=rule) for i, rule in enumerate(("chat", "embed", "embed", "chat"), start=1)]
    first = [answer[3:6] for answer in fleet.select(*asked)[:-1]]
    fleet.settle(an_entry(1, A), an_entry(2, A))
    second = [answer[3:6] for answer in fleet.select(a_selection(5), a_selection(6, rule="embed"), worker="w2")[:-1]]
    assert first == [[1, 1, 3], [1, 1, 4], [2, 1, 5], [2, 1, 6]]
    assert second == [[3, 1, 9], [3, 1, 10]]


def test_an_edit_keeps_a_rules_seq(fleet: Fleet) -> None:
    fleet.fence(a_rule())
    fleet.ask(3)
    fleet.fence(a_rule("random", revision=2))
    assert fleet.ask(revision=2)[0][3] == 4


@pytest.mark.parametrize(
    ("seen", "place", "lost"),
    [
        ((0, 0), (1, 5), 0),
        ((1, 4), (1, 5), 0),
        ((0, 99), (1, 5), 0),
        ((1, 5), (2, 7), 1),
        ((1, 104), (2, 106), 100),
        ((2, 5), (3, 7), 1),
        ((2, 1), (3, 6), 0),
        ((7, 4), (8, 6), 0),
    ],
)
def test_a_caller_that_has_seen_more_starts_an_epoch(
    fleet: Fleet, seen: tuple[int, int], place: tuple[int, int], lost: int
) -> None:
    fleet.fence(a_rule())
    fleet.ask(3)
    answer, pool = fleet.select(a_selection(4), seen=seen)
    assert (tuple(answer[4:6]), pool) == (place, ["pool", *place, lost])
    view = fleet.view()
    assert (view.epoch, view.position) == place
    assert fleet.ask(worker="w2")[0][4:6] == [place[0], place[1] + 1]


# -- revisions ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "answer"),
    [
        ({"revision": 4}, ["stale", 5]),
        ({"revision": 6}, ["define", 5]),
        ({"rule": "unknown", "revision": 1}, ["define", 0]),
        ({"rule": "deleted", "revision": 6}, ["stale", 7]),
        ({"rule": "deleted", "revision": 7}, ["define", 7]),
        ({"rule": "deleted", "revision": 8}, ["define", 7]),
    ],
)
def test_only_the_fences_revision_is_picked_under(fleet: Fleet, asked: dict[str, Any], answer: list[Any]) -> None:
    fleet.fence(a_rule(revision=5), a_rule(rule="deleted", revision=6), a_tombstone("deleted", revision=7))
    before = fleet.view()
    assert fleet.select(a_selection(1, reserved=9, **asked))[0] == answer
    assert fleet.view() == before


def test_a_name_that_was_not_picked_may_be_asked_again(fleet: Fleet) -> None:
    fleet.fence(a_rule(revision=2))
    assert [fleet.select(a_selection(1, revision=r))[0][0] for r in (1, 3, 2)] == ["stale", "define", "pick"]


def test_one_call_may_hold_every_kind_of_answer(fleet: Fleet) -> None:
    fleet.fence(a_rule(revision=2), a_rule(rule="idle", services=[]))
    fleet.settle(an_abandoned(4))
    reply = fleet.select(
        a_selection(1, revision=2),
        a_selection(2, revision=1),
        a_selection(3, rule="idle"),
        a_selection(4, revision=2),
        a_selection(5, revision=3),
        a_selection(6, revision=2),
    )
    assert reply == [
        ["pick", A, "streak", 1, 1, 4, 1, 0],
        ["stale", 2],
        ["none", "inactive", 0],
        ["abandoned"],
        ["define", 2],
        ["pick", A, "streak", 2, 1, 5, 2, 0],
        ["pool", 1, 5, 0],
    ]


def test_an_abandoned_name_is_refused_and_nothing_is_held_for_it(fleet: Fleet) -> None:
    fleet.fence(a_rule())
    fleet.settle(an_abandoned(1))
    before = fleet.view()
    assert fleet.select(a_selection(1, reserved=5))[0] == ["abandoned"]
    assert fleet.view() == before
    assert fleet.select(a_selection(1), worker="w2")[0][0] == "pick", "another worker's name is another name"


def test_a_name_asked_twice_is_picked_once(fleet: Fleet) -> None:
    fleet.fence(a_rule())
    first, second = fleet.select(a_selection(1))[0], fleet.select(a_selection(1))[0]
    assert (first[0], second) == ("pick", ["abandoned"])
    assert fleet.service().in_flight == 1


def test_a_name_asked_twice_in_one_call_is_picked_once(fleet: Fleet) -> None:
    """As in two calls: results equal those of single calls in the same order."""
    fleet.fence(a_rule())
    reply = fleet.select(a_selection(1, reserved=5), a_selection(1, reserved=5))
    assert [answer[0] for answer in reply] == ["pick", "abandoned", "pool"]
    fleet.settle(an_entry(1, A))
    assert (fleet.service().in_flight, fleet.service().reserved) == (0, 0)


# -- what a pick leaves ------------------------------------------------------------------------------------------------


def test_a_pick_is_held_under_its_name_and_renews_the_lease(fleet: Fleet, client: Any) -> None:
    assert isinstance(fleet.pool, LuaPool)
    fleet.fence(a_rule())
    fleet.select(a_selection(17, reserved=5))
    assert client.zrange(keys.leases(fleet.pool.name), 0, -1, withscores=True) == [(b"w1", NOW_MS + LEASE_MS)]
    fleet.pass_ms(DEADLINE_MS)
    assert fleet.reap("w1")[:3] == ["reaped", 1, 1]


def test_state_lives_30_days_and_a_workers_holdings_7_after_the_last_use(fleet: Fleet, client: Any) -> None:
    assert isinstance(fleet.pool, LuaPool)
    fleet.pool.record = "full"
    fleet.fence(a_rule())
    fleet.ask()
    fleet.settle(an_entry(1, A))
    for name, key in pool_keys(fleet.pool.name, "w1").items():
        assert client.pexpire(key, 5_000), name
    fleet.pass_ms(60_000)
    fleet.ask()
    days = {name: client.pttl(key) // DAY_MS for name, key in pool_keys(fleet.pool.name, "w1").items()}
    assert days == {"services": 30, "partitions": 30, "holdings": 7, "leases": 30, "decisions": 30}


def test_the_servers_clock_counts_when_no_time_is_given(fleet: Fleet, client: Any) -> None:
    fleet.fence(a_rule())
    fleet.now_ms = 0
    start_s, _ = client.time()
    fleet.ask()
    end_s, end_us = client.time()
    assert start_s * 1000 <= fleet.service().windows[0].start_ms <= end_s * 1000 + end_us // 1000


def test_names_with_spaces_colons_bars_and_other_alphabets_are_kept_apart(fleet: Fleet) -> None:
    services = ["p:llama3:8b", "p:llama3:8b 1 300 1 x", "p:org/модель", "1 300 1 p:m"]
    for rule in ("a:b|c", "a:b", "org/модель é"):
        fleet.fence(a_rule("round_robin", services, rule=rule, requests=1))
        assert [answer[1] for answer in fleet.ask(5, rule=rule)] == [*services, services[0]]
    assert {name: rule.seq for name, rule in fleet.view().rules.items()} == dict.fromkeys(
        ("a:b|c", "a:b", "org/модель é"), 5
    )


# -- what is refused ---------------------------------------------------------------------------------------------------

SELECTION: list[Any] = [1, 1, 0, 5, 1000, 0, "chat", keys.partition("chat"), "", [A]]
"""number, revision, draw, reserved, deadline_ms, affinity_ms, rule, partition, only, and who is excluded."""
NO_WHOLE_NUMBERS: tuple[Any, ...] = ("", "1", -1, 1.5, math.nan, math.inf, 2**53, True, None, [1])
NO_BOOLEANS: tuple[Any, ...] = (0, 1, "", None, [])


def used(new_pool: NewPool) -> Fleet:
    """A fleet with something in every key."""
    fleet = Fleet(new_pool(record="full"))
    fleet.fence(a_rule())
    fleet.ask(3, reserved=5)
    fleet.settle(an_entry(1, A, input=5), an_abandoned(90))
    return fleet


def ask_raw(fleet: Fleet, numbers: dict[str, Any], *selections: Any) -> Any:
    assert isinstance(fleet.pool, LuaPool)
    return evaluate_tick(fleet.pool.client, pool_keys(fleet.pool.name, "w1"), numbers, (), selections)


def test_the_selection_of_the_cases_below_is_taken_when_it_is_not_malformed(new_pool: NewPool) -> None:
    fleet = used(new_pool)
    assert ask_raw(fleet, {}, [100, *SELECTION[1:]])[1][0] == "pick"
    selection = a_selection(1, reserved=5, deadline_ms=1000, excluded=[A])
    assert msgspec.to_builtins(selection) == [*SELECTION[:9], (A,), "", ()]


@pytest.mark.parametrize("value", [1, True, A, [1], [A, 1], [[A]]])
def test_a_selection_with_malformed_barred_ones_is_refused(new_pool: NewPool, value: Any) -> None:
    fleet = used(new_pool)
    assert isinstance(fleet.pool, LuaPool)
    with refused(fleet.pool.client, "tick"):
        ask_raw(fleet, {}, [100, *SELECTION[1:], "", value])
    assert ask_raw(fleet, {}, [100, *SELECTION[1:], "", [B]])[1][0] == "pick"


@pytest.mark.parametrize("count", [1, 64])
def test_a_call_takes_1_to_64_selections(fleet: Fleet, count: int) -> None:
    fleet.fence(a_rule(requests=NEVER))
    reply = fleet.select(*(a_selection(number) for number in range(1, count + 1)))
    assert [answer[1] for answer in reply] == [A] * count + [1]


@pytest.mark.parametrize("count", [0, 65])
def test_no_or_too_many_selections_are_refused_and_nothing_is_written(new_pool: NewPool, count: int) -> None:
    fleet = used(new_pool)
    selections = [a_selection(number) for number in range(100, 100 + count)]
    assert isinstance(fleet.pool, LuaPool)
    with refused(fleet.pool.client, "tick"):
        fleet.select(*selections, seen=(9, 9))


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name in ("now_ms", "epoch", "position", "batch") for value in NO_WHOLE_NUMBERS]
    + [("lease_ms", value) for value in (*NO_WHOLE_NUMBERS, 0)]
    + [("skips", value) for value in NO_BOOLEANS],
)
def test_a_malformed_argument_is_refused_and_nothing_is_written(new_pool: NewPool, name: str, value: Any) -> None:
    fleet = used(new_pool)
    assert isinstance(fleet.pool, LuaPool)
    with refused(fleet.pool.client, "tick"):
        ask_raw(fleet, {name: value}, [100, *SELECTION[1:]])


@pytest.mark.parametrize(
    ("place", "value"),
    [(place, value) for place in range(6) for value in NO_WHOLE_NUMBERS]
    + [(0, 0), (1, 0), (2, 2**32), (5, 1)]
    + [(place, value) for place in (6, 7, 8) for value in (1, True, None, ["chat"])]
    + [(9, value) for value in (1, True, None, A, [1], [A, 1], [[A]])],
)
def test_a_malformed_selection_is_refused_with_all_others_of_its_call(
    new_pool: NewPool, place: int, value: Any
) -> None:
    fleet = used(new_pool)
    malformed = [101, *SELECTION[1:]]
    malformed[place] = value
    assert isinstance(fleet.pool, LuaPool)
    with refused(fleet.pool.client, "tick"):
        ask_raw(fleet, {"epoch": 9}, [100, *SELECTION[1:]], malformed)


@pytest.mark.parametrize("kept", range(10))
def test_a_selection_that_is_cut_short_is_refused(new_pool: NewPool, kept: int) -> None:
    fleet = used(new_pool)
    assert isinstance(fleet.pool, LuaPool)
    with refused(fleet.pool.client, "tick"):
        ask_raw(fleet, {}, [100, *SELECTION[1:]], [101, *SELECTION[1:]][:kept])


@pytest.mark.parametrize(("affinities", "pins"), [((9_000,), 0), ((0,), 1), ((9_000, 0), 2), ((9_000, 9_000), 1)])
def test_a_call_with_another_number_of_pins_than_its_sessions_is_refused(
    new_pool: NewPool, affinities: tuple[int, ...], pins: int
) -> None:
    """The second session would be found out after the first was picked."""
    fleet = used(new_pool)
    assert isinstance(fleet.pool, LuaPool)
    client, name = fleet.pool.client, fleet.pool.name
    selections = [
        [number, *SELECTION[1:5], affinity_ms, *SELECTION[6:]] for number, affinity_ms in enumerate(affinities, 100)
    ]
    with refused(client, "tick"):
        evaluate_tick(client, pool_keys(name, "w1"), {}, (), selections, [keys.pin(name, f"s{i}") for i in range(pins)])


def test_a_refused_call_does_not_start_an_epoch(new_pool: NewPool) -> None:
    fleet = used(new_pool)
    assert isinstance(fleet.pool, LuaPool)
    with refused(fleet.pool.client, "tick"):
        fleet.select(a_selection(0), seen=(5, 500))
    assert fleet.view().epoch == 1
