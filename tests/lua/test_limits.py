"""Limits are never exceeded, over any sixty seconds and by whatever history, and a wait that is told is a true one."""

from __future__ import annotations

import random
from typing import Any

import pytest

from balancer.domain import Outcome
from tests.lua.builders import (
    DEADLINE_MS,
    LEASE_MS,
    NOW_MS,
    A,
    B,
    C,
    Fleet,
    a_provider,
    a_rule,
    a_service,
    an_abandoned,
    an_entry,
)
from tests.lua.stories import CANCELLED, FAILED, REJECTED, SUCCESS, ask, end, standing

MINUTE_MS = 60_000
FORGOTTEN_MS = 65_000
"""A bucket is of five seconds: after so long, all that was in it is over a minute ago."""
SHORT_WAIT_MS = 1_000
STEPS = (0, 1, 300, 1_000, 4_999, 5_000, 20_000, 59_999, 60_000, 61_000)


# -- requests a minute -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_no_sixty_seconds_see_more_requests_than_the_limit_and_none_is_kept_back_without_cause(
    fleet: Fleet, seed: int
) -> None:
    rand = random.Random(seed)
    rpm = rand.choice((1, 3, 10))
    fleet.fence(a_rule(services=[a_service(A, rpm=rpm)]))
    picked: list[int] = []
    for _ in range(250):
        for answer in fleet.ask(rand.choice((1, 1, 2, 7)), worker=rand.choice(("w1", "w2"))):
            if answer[0] == "pick":
                picked.append(fleet.now_ms)
            else:
                assert answer[:2] == ["none", "limited"]
                assert 0 < answer[2] <= FORGOTTEN_MS
                assert len([at for at in picked if at > fleet.now_ms - FORGOTTEN_MS]) >= rpm, "kept back without cause"
        fleet.pass_ms(rand.choice((*STEPS, rand.randrange(30_000))))
    worst = max(len([at for at in picked if start <= at <= start + MINUTE_MS]) for start in picked)
    assert worst == rpm, "it is reached, and never passed"


@pytest.mark.parametrize("seed", range(4))
def test_a_wait_that_is_told_is_enough_and_not_a_millisecond_too_long(fleet: Fleet, seed: int) -> None:
    """As long as nobody else comes in between."""
    rand = random.Random(seed)
    fleet.fence(a_rule(services=[a_service(A, rpm=5)]))
    waits = 0
    while waits < 40:
        word, *_, wait_ms = ask(fleet)
        if word != "none":
            fleet.pass_ms(rand.choice((0, 7, 900, 6_000)))
            continue
        waits += 1
        fleet.pass_ms(wait_ms - 1)
        assert ask(fleet) == ("none", "limited", 1)
        fleet.pass_ms(1)
        assert ask(fleet)[0] == A


@pytest.mark.parametrize(("at_ms", "wait_ms"), [(0, 65_000), (1, 64_999), (4_999, 60_001), (5_000, 65_000)])
def test_a_request_is_forgotten_when_the_last_of_its_five_seconds_is_over_a_minute_ago(
    fleet: Fleet, at_ms: int, wait_ms: int
) -> None:
    fleet.fence(a_rule(services=[a_service(A, rpm=1)]))
    fleet.pass_ms(at_ms)
    assert ask(fleet)[0] == A
    assert ask(fleet) == ("none", "limited", wait_ms)


def test_requests_that_are_over_make_room_for_others_as_they_go(fleet: Fleet) -> None:
    fleet.fence(a_rule(services=[a_service(A, rpm=6)]))
    for count in (1, 2, 3):
        fleet.ask(count)
        fleet.pass_ms(10_000)
    assert ask(fleet) == ("none", "limited", 35_000)
    fleet.pass_ms(35_000)
    assert fleet.picks(2) == "a-"
    fleet.pass_ms(10_000)
    assert fleet.picks(3) == "aa-"


def test_a_request_counts_whatever_becomes_of_it(fleet: Fleet) -> None:
    fleet.fence(a_rule(services=[a_service(A, rpm=4)]))
    for outcome in (SUCCESS, FAILED, REJECTED):
        assert ask(fleet)[0] == A
        end(fleet, A, outcome)
    assert ask(fleet)[0] == A
    fleet.settle(an_abandoned(4))
    assert ask(fleet)[1] == "limited"


def test_a_clock_that_is_set_back_frees_nothing_until_it_has_caught_up_and_then_as_always(fleet: Fleet) -> None:
    fleet.fence(a_rule(services=[a_service(A, rpm=2)]))
    fleet.ask(2)
    fleet.pass_ms(-600_000)
    assert ask(fleet) == ("none", "limited", FORGOTTEN_MS)
    fleet.pass_ms(600_000 + FORGOTTEN_MS - 1)
    assert ask(fleet) == ("none", "limited", 1)
    fleet.pass_ms(1)
    assert ask(fleet)[0] == A


def test_what_is_counted_after_a_clock_was_set_back_brings_the_rest_to_its_time(fleet: Fleet) -> None:
    fleet.fence(a_rule(services=[a_service(A, rpm=3)]))
    fleet.ask(2)
    fleet.pass_ms(-600_000)
    assert fleet.picks(2) == "a-"
    fleet.pass_ms(FORGOTTEN_MS)
    assert fleet.picks(4) == "aaa-"


@pytest.mark.parametrize("reason", ["only", "excluded", "pinned", "exhausted"])
def test_every_kind_of_pick_counts_and_is_kept_within_the_limit(fleet: Fleet, reason: str) -> None:
    session: dict[str, Any] = {"session": "s", "affinity_ms": 600_000}
    kinds: dict[str, dict[str, Any]] = {"only": {"only": A}, "excluded": {"excluded": [B]}, "pinned": session}
    fleet.fence(a_rule(services=[a_service(A, rpm=3), B]))
    if reason == "pinned":
        assert ask(fleet, **session)[0] == A
    elif reason == "exhausted":
        fleet.settle(an_entry(0, A, cooldown_ms=600_000), an_entry(0, B, cooldown_ms=600_000))
        fleet.fence(a_rule(services=[a_service(A, rpm=3), a_service(B, active=False)], revision=2))
    revision = 2 if reason == "exhausted" else 1
    answers = fleet.ask(5, revision=revision, **kinds.get(reason, {}))
    picks = [answer[1] for answer in answers if answer[:2] == ["pick", A]]
    assert len(picks) == (2 if reason == "pinned" else 3)


def test_requests_asked_for_in_one_call_count_as_they_are_picked(fleet: Fleet) -> None:
    fleet.fence(a_rule(services=[a_service(A, rpm=5), a_service(B, rpm=2)], requests=1))
    assert fleet.picks(10) == "ababaaa---"


# -- tokens a minute ---------------------------------------------------------------------------------------------------


class TokenLog:
    """What was used and when, and what is out: held against the limit without buckets."""

    def __init__(self) -> None:
        self.used: list[tuple[int, int]] = []
        self.out: dict[int, int] = {}

    def within(self, now_ms: int, length_ms: int) -> int:
        """What is out, and what was used in so many ms that end now."""
        return sum(self.out.values()) + sum(tokens for at, tokens in self.used if at >= now_ms - length_ms)


@pytest.mark.parametrize("seed", range(6))
def test_tokens_used_in_sixty_seconds_and_in_flight_are_within_the_limit_at_every_pick(fleet: Fleet, seed: int) -> None:
    """As long as no request uses more than it has reserved, the limit holds over any sixty seconds then."""
    rand, tpm, log = random.Random(seed), 1_000, TokenLog()
    fleet.fence(a_rule(services=[a_service(A, tpm=tpm)]))
    refused = 0
    for _ in range(300):
        reserved = rand.choice((0, 10, 200, 600, 1_000, 1_001))
        word, *_, wait_ms = ask(fleet, reserved=reserved, deadline_ms=10**9)
        if word == A:
            assert log.within(fleet.now_ms, MINUTE_MS) + reserved <= tpm
            log.out[fleet.numbers["w1"]] = reserved
        else:
            refused += 1
            assert log.within(fleet.now_ms, FORGOTTEN_MS) + reserved > tpm
            assert wait_ms == -1 if reserved > tpm else wait_ms > 0
        for number in rand.sample(sorted(log.out), rand.randint(0, len(log.out))):
            held, outcome = log.out.pop(number), rand.choice((SUCCESS, FAILED, CANCELLED))
            tokens = rand.randint(0, held)
            fleet.settle(an_entry(number, A, outcome, input=tokens))
            log.used.append((fleet.now_ms, tokens or (0 if outcome is FAILED else held)))
        fleet.pass_ms(rand.choice((0, 0, 40, 1_000, 5_000, 21_000)))
    assert refused > 20


def test_input_and_output_count_and_no_other_tokens(fleet: Fleet) -> None:
    fleet.fence(a_rule(services=[a_service(A, tpm=100)]))
    fleet.ask()
    end(fleet, A, input=30, output=20, cached=500, cache_creation=500, reasoning=500)
    assert ask(fleet, reserved=51)[1] == "limited"
    assert ask(fleet, reserved=50)[0] == A


def test_what_a_request_used_takes_the_place_of_what_it_had_reserved(fleet: Fleet) -> None:
    fleet.fence(a_rule(services=[a_service(A, tpm=100)]))
    assert ask(fleet, reserved=100)[0] == A
    assert ask(fleet, reserved=1) == ("none", "limited", SHORT_WAIT_MS), "nobody knows when it will end"
    fleet.settle(an_entry(1, A, input=1))
    assert ask(fleet, reserved=99)[0] == A


def test_a_request_that_used_more_than_it_reserved_is_paid_for_by_the_next(fleet: Fleet) -> None:
    fleet.fence(a_rule(services=[a_service(A, tpm=100)]))
    fleet.ask(reserved=10)
    end(fleet, A, input=250)
    assert ask(fleet) == ("none", "limited", FORGOTTEN_MS)


def test_the_wait_for_tokens_is_until_enough_of_them_are_over(fleet: Fleet) -> None:
    fleet.fence(a_rule(services=[a_service(A, tpm=100)]))
    for tokens in (20, 30, 40):
        fleet.ask()
        end(fleet, A, output=tokens)
        fleet.pass_ms(10_000)
    waits = {reserved: ask(fleet, reserved=reserved)[2] for reserved in (11, 30, 31, 60, 61, 100, 101)}
    assert waits == {11: 35_000, 30: 35_000, 31: 45_000, 60: 45_000, 61: 55_000, 100: 55_000, 101: -1}
    fleet.pass_ms(34_999)
    assert ask(fleet, reserved=30) == ("none", "limited", 1)
    fleet.pass_ms(1)
    assert ask(fleet, reserved=30)[0] == A


@pytest.mark.parametrize(("age_ms", "left"), [(0, 40), (59_999, 40), (60_000, 100), (10**9, 100)])
def test_tokens_of_an_entry_that_waited_for_a_minute_are_of_no_minute(fleet: Fleet, age_ms: int, left: int) -> None:
    fleet.fence(a_rule(services=[a_service(A, tpm=100)]))
    fleet.ask()
    end(fleet, A, input=60, age_ms=age_ms)
    assert ask(fleet, reserved=left + 1) == ("none", "limited", -1 if left == 100 else FORGOTTEN_MS)
    assert ask(fleet, reserved=left)[0] == A


def test_usage_of_what_holds_nothing_is_of_no_minute(fleet: Fleet) -> None:
    fleet.fence(a_rule(services=[a_service(A, tpm=100)]))
    fleet.ask(reserved=60)
    end(fleet, A, input=60)
    end(fleet, A, input=60)
    assert ask(fleet, reserved=40)[0] == A


def test_a_lost_attempt_counts_as_what_it_had_reserved_and_its_late_end_no_more(fleet: Fleet) -> None:
    fleet.fence(a_rule(services=[a_service(A, tpm=100)]))
    fleet.ask(reserved=70, worker="dead")
    fleet.pass_ms(LEASE_MS)
    fleet.reap("dead")
    end(fleet, A, input=5, worker="dead")
    assert ask(fleet, reserved=31) == ("none", "limited", FORGOTTEN_MS)
    assert ask(fleet, reserved=30)[0] == A


@pytest.mark.parametrize(("outcome", "left"), [(CANCELLED, 30), (SUCCESS, 30), (FAILED, 100), (REJECTED, 100)])
def test_who_was_served_and_reports_nothing_counts_as_what_it_had_reserved(
    fleet: Fleet, outcome: Outcome, left: int
) -> None:
    """A hundred clients that hung up before any usage came were once let through for nothing."""
    fleet.fence(a_rule(services=[a_service(A, tpm=100)], providers=[a_provider("a", tpm=100)]))
    fleet.ask(reserved=70)
    end(fleet, A, outcome)
    if left < 100:
        assert ask(fleet, reserved=left + 1) == ("none", "limited", FORGOTTEN_MS)
    assert ask(fleet, reserved=left)[0] == A


def test_an_attempt_that_was_given_up_used_nothing(fleet: Fleet) -> None:
    fleet.fence(a_rule(services=[a_service(A, tpm=100)]))
    fleet.ask(reserved=100)
    fleet.settle(an_abandoned(1))
    assert ask(fleet, reserved=100)[0] == A


def test_a_limit_that_is_set_later_knows_nothing_of_what_was_before(fleet: Fleet) -> None:
    fleet.fence(a_rule(services=[A]))
    fleet.ask(5)
    fleet.fence(a_rule(services=[a_service(A, rpm=2, tpm=100)], revision=2))
    fleet.settle(*(an_entry(number, A, input=100) for number in range(1, 6)))
    assert fleet.picks(3, revision=2) == "aa-"


# -- in flight ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_no_more_are_in_flight_than_the_limit_and_as_many_as_it_allows(fleet: Fleet, seed: int) -> None:
    rand, limit = random.Random(seed), 4
    fleet.fence(a_rule(services=[a_service(A, in_flight=limit)]))
    out: list[int] = []
    for _ in range(200):
        word, *_, last = ask(fleet, deadline_ms=10**9)
        assert (word == A) == (len(out) < limit)
        if word == A:
            out.append(fleet.numbers["w1"])
        else:
            assert last == SHORT_WAIT_MS
        while out and rand.random() < 0.4:
            number = out.pop(rand.randrange(len(out)))
            fleet.settle(an_abandoned(number) if rand.random() < 0.3 else an_entry(number, A, FAILED))
        fleet.pass_ms(rand.choice((0, 1, 9_000)))


def test_what_other_rules_have_in_flight_counts(fleet: Fleet) -> None:
    fleet.fence(a_rule(services=[a_service(A, in_flight=2)]), a_rule(services=[A], rule="free"))
    assert fleet.picks(3, rule="free") == "aaa"
    assert ask(fleet) == ("none", "limited", SHORT_WAIT_MS)
    fleet.settle(an_entry(1, A), an_entry(2, A))
    assert fleet.picks(2) == "a-"


@pytest.mark.parametrize(("passed_ms", "deadline_ms"), [(LEASE_MS, DEADLINE_MS), (700, 700)])
def test_a_reap_gives_back_the_place_of_what_is_lost(fleet: Fleet, passed_ms: int, deadline_ms: int) -> None:
    provider = a_provider("a", in_flight=1)
    fleet.fence(a_rule(services=[a_service(A, in_flight=1)], providers=[provider]))
    assert fleet.picks(2, worker="dead", deadline_ms=deadline_ms) == "a-"
    fleet.pass_ms(passed_ms)
    assert ask(fleet)[1] == "limited"
    fleet.reap("dead")
    assert fleet.picks(2) == "a-"


# -- of a provider -----------------------------------------------------------------------------------------------------


def test_a_providers_requests_are_those_of_all_its_services_in_all_rules(fleet: Fleet) -> None:
    provider = a_provider("p", rpm=5)
    fleet.fence(a_rule(services=["p:1", "p:2"], requests=1, providers=[provider]))
    fleet.fence(a_rule(services=["p:3", A], requests=1, rule="other", providers=[provider]))
    assert fleet.picks(3) + fleet.picks(4, rule="other") == "ppppapa"
    assert ask(fleet) == ("none", "limited", FORGOTTEN_MS)
    assert fleet.picks(3, rule="other") == "aaa"


def test_a_providers_tokens_are_those_of_all_its_services(fleet: Fleet) -> None:
    fleet.fence(a_rule(services=["p:1", "p:2"], requests=1, providers=[a_provider("p", tpm=100)]))
    assert [ask(fleet, reserved=30)[0] for _ in range(3)] == ["p:1", "p:2", "p:1"]
    assert ask(fleet, reserved=11) == ("none", "limited", SHORT_WAIT_MS)
    fleet.settle(an_entry(1, "p:1", output=50), an_entry(2, "p:2", FAILED))
    assert ask(fleet, reserved=21) == ("none", "limited", FORGOTTEN_MS)
    assert ask(fleet, reserved=20)[0] == "p:2"


def test_both_a_service_and_its_provider_must_have_room_and_the_longer_wait_counts(fleet: Fleet) -> None:
    fleet.fence(a_rule(services=[a_service("p:1", rpm=1), "p:2"], requests=9, providers=[a_provider("p", rpm=2)]))
    assert fleet.ask()[0][1] == "p:1"
    fleet.pass_ms(20_000)
    assert [ask(fleet)[0] for _ in range(2)] == ["p:2", "none"]
    assert ask(fleet, only="p:2") == ("none", "limited", 45_000)
    fleet.fence(a_rule(services=[a_service("p:1", in_flight=1)], revision=2))
    assert ask(fleet, revision=2) == ("none", "limited", 45_000), "45 s for the provider, 1 s for the service"


def test_a_request_too_great_for_its_provider_can_never_be_served(fleet: Fleet) -> None:
    fleet.fence(a_rule(services=[a_service("p:1", rpm=1)], providers=[a_provider("p", tpm=100)]))
    fleet.ask()
    assert ask(fleet, reserved=101) == ("none", "limited", -1)


def test_a_providers_edited_limit_counts_at_once(fleet: Fleet) -> None:
    fleet.fence(a_rule(services=[A], providers=[a_provider(rpm=9)]))
    assert fleet.picks(4) == "aaaa"
    fleet.fence(a_rule(services=[A], revision=2, providers=[a_provider(rpm=5)]))
    assert fleet.picks(2, revision=2) == "a-"
    fleet.fence(a_rule(services=[A], revision=3, providers=[a_provider()]))
    assert fleet.picks(5, revision=3) == "aaaaa"


def test_a_provider_without_limits_any_more_gets_back_what_was_held(fleet: Fleet) -> None:
    fleet.fence(a_rule(services=[A], providers=[a_provider(in_flight=2)]))
    assert fleet.picks(3) == "aa-"
    fleet.fence(a_rule(services=[A], revision=2, providers=[a_provider()]))
    fleet.settle(an_entry(1, A))
    fleet.fence(a_rule(services=[A], revision=3, providers=[a_provider(in_flight=2)]))
    assert fleet.picks(2, revision=3) == "a-"


# -- nothing, and never ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [{"rpm": -1}, {"tpm": -1}, {"in_flight": -1}, {"rpm": -1, "tpm": 50}])
def test_below_zero_nothing_is_let_through_by_a_service_or_a_provider(fleet: Fleet, limit: dict[str, Any]) -> None:
    fleet.fence(a_rule(services=[a_service(A, **limit), B], requests=1))
    fleet.fence(a_rule(services=[C], rule="other", providers=[a_provider("c", **limit)]))
    assert fleet.picks(3) == "bbb"
    assert ask(fleet, only=A) == ask(fleet, rule="other") == ("none", "limited", SHORT_WAIT_MS)


def test_the_least_wait_of_all_services_is_told_and_never_only_when_all_say_so(fleet: Fleet) -> None:
    services = [a_service(A, tpm=10), a_service(B, rpm=1), a_service(C, in_flight=1)]
    fleet.fence(a_rule(services=services, requests=1))
    assert fleet.picks(1, excluded=[A, C]) == "b"
    fleet.pass_ms(30_000)
    assert ask(fleet, reserved=11, only=A) == ("none", "limited", -1)
    assert fleet.picks(1, excluded=[A, B]) == "c"
    assert ask(fleet, reserved=11) == ("none", "limited", SHORT_WAIT_MS)
    fleet.fence(a_rule(services=services[:2], revision=2))
    assert ask(fleet, reserved=11, revision=2) == ("none", "limited", 35_000)


def test_a_refused_request_leaves_no_trace(fleet: Fleet) -> None:
    fleet.fence(a_rule(services=[a_service(A, rpm=2)], requests=9))
    fleet.ask(2)
    assert fleet.picks(50) == "-" * 50
    assert standing(fleet) == (A, 2)
    fleet.pass_ms(FORGOTTEN_MS)
    (answer,) = fleet.ask()
    assert (answer[1], answer[3], answer[6]) == (A, 3, 3)


def test_a_name_that_limits_kept_back_may_be_asked_again(fleet: Fleet) -> None:
    fleet.fence(a_rule(services=[a_service(A, in_flight=1)]))
    assert fleet.picks(2) == "a-"
    fleet.settle(an_entry(1, A, Outcome.SUCCESS))
    fleet.numbers["w1"] = 1
    assert fleet.picks(1) == "a"


@pytest.mark.parametrize("kind", ["service", "provider"])
def test_time_flows_to_the_limit_over_an_hour(fleet: Fleet, kind: str) -> None:
    """A client that comes again after each wait gets close to the limit: 12 of 13 buckets' worth."""
    limits: dict[str, Any] = {"rpm": 12}
    provider = [a_provider("a", **limits)] if kind == "provider" else []
    fleet.fence(a_rule(services=[a_service(A, **({} if provider else limits))], providers=provider))
    made = 0
    while fleet.now_ms < NOW_MS + 3_600_000:
        word, *_, wait_ms = ask(fleet)
        if word == A:
            made += 1
        else:
            fleet.pass_ms(wait_ms)
    assert 12 * 60 * 12 // 13 <= made <= 12 * 60
