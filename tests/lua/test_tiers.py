"""The least tier serves while it can; the next one takes over at once and is held for a minute."""

from __future__ import annotations

from typing import Any

import pytest

from tests.lua.builders import A, B, C, D, Fleet, a_provider, a_rule, a_selection, a_service, an_entry
from tests.lua.stories import RATE_LIMITED, ask, chosen, live, standing

HOLD_MS = 60_000
TIERS = (a_service(A), a_service(B), a_service(C, tier=1), a_service(D, tier=2))


def cool(fleet: Fleet, *services: str, for_ms: int = 1_000) -> None:
    fleet.settle(*(an_entry(0, service, RATE_LIMITED, cooldown_ms=for_ms) for service in services))


@pytest.mark.parametrize(
    "tactic",
    ["round_robin", "token_based", "hybrid", "random", "least_in_flight", "weighted_round_robin", "latency", "cost"],
)
def test_every_tactic_chooses_within_the_least_tier(fleet: Fleet, tactic: str) -> None:
    services = [a_service(C, tier=1), a_service(A, tier=0, weight=9), a_service(D, tier=0), a_service(B, tier=1)]
    fleet.fence(a_rule(tactic, services, requests=1, tokens=1))
    picked = {answer[1] for draw in (0, 2**31, 2**32 - 1) for answer in fleet.ask(8, draw=draw)}
    assert picked <= {A, D}
    cool(fleet, A, D)
    assert {answer[1] for answer in fleet.ask(8)} <= {B, C}


@pytest.mark.parametrize("tiers", [(0, 0), (5, 5), (9, 9)])
def test_services_of_one_tier_are_as_good_as_without(fleet: Fleet, tiers: tuple[int, int]) -> None:
    fleet.fence(a_rule(services=[a_service(s, tier=t) for s, t in zip((A, B), tiers, strict=True)], requests=1))
    assert fleet.picks(4) == "abab"
    cool(fleet, A)
    assert fleet.picks(2) == "bb"
    fleet.pass_ms(1_000)
    assert fleet.picks(2) == "ab", "nothing is held"


def test_the_least_number_serves_first_wherever_it_stands(fleet: Fleet) -> None:
    fleet.fence(a_rule(services=[a_service(C, tier=7), a_service(B, tier=3), a_service(A, tier=5)]))
    assert fleet.picks(2) == "bb"
    cool(fleet, B)
    assert fleet.picks(2) == "aa"
    cool(fleet, A)
    assert fleet.picks(2) == "cc"


def test_the_next_tier_takes_over_when_none_of_the_first_can_serve(fleet: Fleet) -> None:
    fleet.fence(a_rule(services=TIERS, requests=1))
    cool(fleet, A)
    assert fleet.picks(4) == "bbbb"
    cool(fleet, B)
    assert fleet.picks(4) == "cccc"
    cool(fleet, C)
    assert fleet.picks(4) == "dddd"


def test_a_tier_that_took_over_is_held_for_a_minute_though_the_first_could_serve(fleet: Fleet) -> None:
    fleet.fence(a_rule(services=TIERS, requests=1))
    cool(fleet, A, B)
    assert fleet.picks(1) == "c"
    fleet.pass_ms(HOLD_MS - 1)
    assert fleet.picks(3) == "ccc"
    fleet.pass_ms(1)
    assert fleet.picks(3) == "aba"


def test_the_minute_counts_from_the_first_pick_of_the_tier(fleet: Fleet) -> None:
    fleet.fence(a_rule(services=TIERS, requests=1))
    cool(fleet, A, B, for_ms=100_000)
    fleet.pass_ms(50_000)
    assert fleet.picks(1) == "c"
    fleet.pass_ms(HOLD_MS - 1)
    assert fleet.picks(1) == "c"
    fleet.pass_ms(1)
    assert fleet.picks(1) == "a"


def test_a_tier_that_is_held_and_cannot_serve_gives_way_upwards_at_once(fleet: Fleet) -> None:
    fleet.fence(a_rule(services=TIERS, requests=1))
    cool(fleet, A, B)
    assert fleet.picks(1) == "c"
    fleet.pass_ms(1_000)
    cool(fleet, C)
    assert fleet.picks(2) == "ab"


def test_a_tier_further_down_is_held_anew(fleet: Fleet) -> None:
    fleet.fence(a_rule(services=TIERS))
    cool(fleet, A, B)
    assert fleet.picks(1) == "c"
    fleet.pass_ms(HOLD_MS - 10)
    cool(fleet, A, B, C)
    assert fleet.picks(1) == "d"
    fleet.pass_ms(HOLD_MS - 1)
    assert fleet.picks(1) == "d"
    fleet.pass_ms(1)
    assert fleet.picks(1) == "a", "by more than one tier when that can serve"


def test_a_tier_is_taken_up_again_though_the_one_between_is_still_away(fleet: Fleet) -> None:
    fleet.fence(a_rule(services=TIERS))
    cool(fleet, A, B, C, for_ms=10 * HOLD_MS)
    assert fleet.picks(1) == "d"
    fleet.pass_ms(HOLD_MS)
    assert fleet.picks(1) == "d"
    fleet.settle(an_entry(0, C))
    fleet.pass_ms(9 * HOLD_MS)
    assert fleet.picks(1) == "a"


def test_the_tier_is_the_fleets_and_not_a_workers(fleet: Fleet) -> None:
    fleet.fence(a_rule(services=TIERS))
    cool(fleet, A, B)
    assert fleet.picks(1, worker="w1") == "c"
    fleet.pass_ms(1_000)
    assert [fleet.picks(1, worker=f"w{number}") for number in range(2, 6)] == ["c"] * 4


def test_each_rule_has_a_tier_of_its_own(fleet: Fleet) -> None:
    fleet.fence(a_rule(services=TIERS), a_rule(services=TIERS, rule="other"))
    cool(fleet, A, B)
    assert fleet.picks(1) == "c"
    fleet.pass_ms(1_000)
    assert (fleet.picks(1), fleet.picks(1, rule="other")) == ("c", "a")


def test_going_down_and_up_a_tier_are_switches_with_a_new_streak(fleet: Fleet) -> None:
    fleet.fence(a_rule(services=TIERS, requests=9))
    fleet.ask(2)
    cool(fleet, A, B)
    assert ask(fleet) == (C, "next", 1, 1)
    fleet.pass_ms(HOLD_MS)
    assert ask(fleet) == (A, "next", 1, 1)


@pytest.mark.parametrize("kind", ["cooling", "limited", "broken", "inactive"])
def test_whatever_keeps_the_first_tier_back_makes_room_for_the_next(fleet: Fleet, kind: str) -> None:
    first = a_service(A, active=kind != "inactive", in_flight=1 if kind == "limited" else 0)
    fleet.fence(a_rule(services=[first, a_service(C, tier=1)], requests=9, providers=[a_provider(failures=1)]))
    match kind:
        case "cooling":
            cool(fleet, A)
        case "limited":
            assert fleet.picks(1) == "a"
        case "broken":
            live(fleet, "f")
        case _:
            pass
    assert fleet.picks(3) == "ccc"


def test_a_retry_goes_down_the_tiers_and_changes_none(fleet: Fleet) -> None:
    fleet.fence(a_rule(services=TIERS, requests=9))
    fleet.ask()
    assert chosen(fleet, excluded=[A]) == (B, "retry")
    assert chosen(fleet, excluded=[A, B]) == (C, "retry")
    assert chosen(fleet, excluded=[A, B, C]) == (D, "retry")
    assert standing(fleet) == (A, 1)
    assert ask(fleet) == (A, "streak", 2, 0), "no tier is held for a retry"


def test_a_retry_keeps_to_the_tier_that_is_held(fleet: Fleet) -> None:
    fleet.fence(a_rule(services=[*TIERS, a_service("e:m", tier=1)], requests=9))
    cool(fleet, A, B)
    assert fleet.picks(1) == "c"
    fleet.pass_ms(1_000)
    assert chosen(fleet, excluded=[C]) == ("e:m", "retry")
    assert chosen(fleet, excluded=[C, "e:m"]) == (A, "retry")


def test_a_pin_and_a_request_for_one_service_only_are_above_tiers_and_change_none(fleet: Fleet) -> None:
    session: dict[str, Any] = {"session": "s", "affinity_ms": 10**7}
    fleet.fence(a_rule(services=TIERS, requests=9))
    cool(fleet, A, B)
    assert chosen(fleet, **session)[0] == C
    fleet.pass_ms(2 * HOLD_MS)
    assert fleet.picks(1) == "a"
    assert chosen(fleet, **session) == (C, "pinned")
    assert chosen(fleet, only=D) == (D, "pinned")
    assert ask(fleet) == (A, "streak", 2, 0)


def test_an_exhausted_rule_tries_its_least_tier_within_limits(fleet: Fleet) -> None:
    services = [a_service(A, in_flight=1), a_service(C, tier=2), a_service(B, tier=1), a_service(D, tier=1)]
    fleet.fence(a_rule(services=services, requests=1))
    cool(fleet, A, B, C, D)
    assert [ask(fleet)[:2] for _ in range(2)] == [(A, "exhausted"), (B, "exhausted")]
    fleet.settle(an_entry(1, A))
    assert chosen(fleet) == (A, "exhausted")


def test_a_probe_belongs_to_the_tier_that_serves_or_a_lower_number(fleet: Fleet) -> None:
    uuids = "abcd"
    breakers = [a_provider(u, failures=1, open_ms=1_000) for u in uuids]
    fleet.fence(a_rule(services=TIERS, requests=9, providers=breakers))
    for service in (A, B):
        live(fleet, "f", service)
    assert fleet.picks(1) == "c"
    live(fleet, "f", D)
    fleet.pass_ms(1_200)
    assert [chosen(fleet) for _ in range(3)] == [(A, "probe"), (B, "probe"), (C, "streak")]


def test_a_call_of_many_selections_is_answered_as_so_many_calls(new_fleets: tuple[Fleet, Fleet]) -> None:
    one, many = new_fleets
    for fleet in new_fleets:
        fleet.fence(a_rule(services=[a_service(A, in_flight=2), *TIERS[1:]], requests=1))
        cool(fleet, B)
    together = one.select(*(a_selection(number) for number in range(1, 7)))[:-1]
    assert together == [many.select(a_selection(number))[0] for number in range(1, 7)]
    assert "".join(answer[1][0] for answer in together) == "aacccc"


@pytest.fixture
def new_fleets(request: pytest.FixtureRequest, fleet: Fleet) -> tuple[Fleet, Fleet]:
    """Two fleets at two pools of one kind."""
    other = type(fleet.pool)() if not hasattr(fleet.pool, "client") else request.getfixturevalue("new_pool")()
    return fleet, Fleet(other)
