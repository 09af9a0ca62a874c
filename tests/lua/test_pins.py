"""A session stays on its service, saves switches, and leaves it only when that cannot serve for long."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from balancer.store import keys
from tests.lua.builders import ABC, A, B, C, Fleet, a_provider, a_rule, a_selection, a_service, a_tombstone, an_entry
from tests.lua.pool import LuaPool
from tests.lua.stories import FAILED, RATE_LIMITED, abandon, ask, chosen, end, live, pinned, standing

HOUR_MS = 3_600_000
S: dict[str, Any] = {"session": "s", "affinity_ms": HOUR_MS}
T: dict[str, Any] = {"session": "t", "affinity_ms": HOUR_MS}
BREAKERS = [a_provider(uuid, failures=1, open_ms=10_000, successes=1) for uuid in "abc"]


def test_a_session_gets_the_tactics_choice_first_and_keeps_it(fleet: Fleet) -> None:
    fleet.fence(a_rule(requests=2))
    assert ask(fleet) == (A, "streak", 1, 0)
    assert ask(fleet, **S) == (A, "streak", 2, 0)
    assert ask(fleet) == (B, "next", 1, 1)
    assert [chosen(fleet, **S) for _ in range(9)] == [(A, "pinned")] * 9


def test_a_pinned_pick_moves_nothing_and_tells_the_streak_as_it_stands(fleet: Fleet) -> None:
    fleet.fence(a_rule(requests=3))
    ask(fleet, **S)
    assert [ask(fleet) for _ in range(4)][-1] == (B, "streak", 2, 0)
    assert ask(fleet, **S) == (A, "pinned", 2, 1)
    assert standing(fleet) == (B, 2)
    assert fleet.picks(2) == "bc"


def test_a_switch_is_saved_when_the_cursor_is_elsewhere(fleet: Fleet) -> None:
    fleet.fence(a_rule(requests=1))
    ask(fleet, **S)
    saved = []
    for _ in range(6):
        saved.append(ask(fleet, **S)[3])
        fleet.ask()
    assert saved == [0, 1, 1, 0, 1, 1]


def test_pinned_picks_take_a_seq_and_count_in_the_window(fleet: Fleet) -> None:
    fleet.fence(a_rule("hybrid", [A, B], requests=3))
    seqs = [answer[3] for answer in fleet.ask(5, **S)]
    assert seqs == [1, 2, 3, 4, 5]
    assert fleet.picks(1) == "b", "A has had its three"


def test_two_sessions_are_pinned_apart(fleet: Fleet) -> None:
    fleet.fence(a_rule(requests=1))
    assert [chosen(fleet, **session)[0] for session in (S, T, T, S, S, T)] == [A, B, B, A, A, B]
    assert (pinned(fleet, "s"), pinned(fleet, "t")) == (A, B)


def test_sessions_and_others_in_one_call_are_answered_in_order(fleet: Fleet) -> None:
    fleet.fence(a_rule(requests=1))
    asked = [{}, S, T, {}, S, T, {"session": "s", "affinity_ms": 0}]
    reply = fleet.select(*(a_selection(number, **more) for number, more in enumerate(asked, start=1)))
    assert [(answer[1][0], answer[2]) for answer in reply[:-1]] == [
        ("a", "streak"),
        ("b", "next"),
        ("c", "next"),
        ("a", "next"),
        ("b", "pinned"),
        ("c", "pinned"),
        ("b", "next"),
    ]


def test_without_affinity_a_session_is_none(fleet: Fleet) -> None:
    fleet.fence(a_rule(requests=1))
    asked: dict[str, Any] = {"session": "s", "affinity_ms": 0}
    assert fleet.picks(4, **asked) == "abca"
    assert pinned(fleet) == ""


def test_a_pin_ends_after_its_time_and_each_use_renews_it(fleet: Fleet) -> None:
    fleet.fence(a_rule(requests=1))
    ask(fleet, **S)
    for _ in range(3):
        fleet.pass_ms(HOUR_MS - 1)
        assert chosen(fleet, **S) == (A, "pinned")
    fleet.pass_ms(HOUR_MS)
    assert chosen(fleet, **S) == (B, "next")
    assert pinned(fleet) == B


def test_the_affinity_of_the_last_request_says_how_long(fleet: Fleet) -> None:
    fleet.fence(a_rule(requests=1))
    ask(fleet, **S)
    assert chosen(fleet, session="s", affinity_ms=500) == (A, "pinned")
    fleet.pass_ms(500)
    assert chosen(fleet, **S) == (B, "next")


def test_a_pin_is_no_candidate_for_anyone_else(fleet: Fleet) -> None:
    fleet.fence(a_rule(requests=2))
    fleet.ask(40, **S)
    assert fleet.picks(6) == "abbcca", "the first pick of the session began the streak"


@pytest.mark.parametrize("kind", ["cooling", "limited", "limited and broken"])
def test_a_session_whose_service_is_away_for_a_moment_goes_elsewhere_and_comes_back(fleet: Fleet, kind: str) -> None:
    fleet.fence(a_rule(services=[a_service(A, in_flight=1), B, C], requests=1, providers=BREAKERS))
    assert chosen(fleet, **S)[0] == A
    if kind == "cooling":
        end(fleet, A, RATE_LIMITED, cooldown_ms=5_000)
    elif kind == "limited and broken":
        fleet.settle(an_entry(0, A, FAILED))
    assert [chosen(fleet, **S)[0] for _ in range(2)] == [B, C]
    assert pinned(fleet) == A
    fleet.fence(a_rule(services=ABC, revision=2, requests=1, providers=[a_provider(u) for u in "abc"]))
    fleet.pass_ms(5_000)
    assert chosen(fleet, revision=2, **S) == (A, "pinned")


def test_a_pin_that_is_kept_for_one_that_is_away_is_not_renewed(fleet: Fleet) -> None:
    fleet.fence(a_rule(services=[a_service(A, in_flight=1), B]))
    assert chosen(fleet, **S)[0] == A
    fleet.pass_ms(HOUR_MS - 1)
    assert chosen(fleet, **S)[0] == B
    assert pinned(fleet) == A
    fleet.pass_ms(1)
    assert pinned(fleet) == ""
    assert chosen(fleet, **S)[0] == B
    assert pinned(fleet) == B


def test_a_session_leaves_a_service_with_an_open_breaker_for_good(fleet: Fleet) -> None:
    fleet.fence(a_rule(requests=9, providers=BREAKERS))
    assert chosen(fleet, **S)[0] == A
    end(fleet, A, FAILED)
    assert chosen(fleet, **S) == (B, "next")
    assert pinned(fleet) == B
    fleet.pass_ms(12_000)
    assert chosen(fleet, **S) == (B, "pinned")
    assert chosen(fleet) == (A, "probe")
    end(fleet, A)
    assert chosen(fleet, **S) == (B, "pinned")


def test_a_session_leaves_a_service_that_is_switched_off_or_gone(fleet: Fleet) -> None:
    fleet.fence(a_rule(requests=9))
    assert chosen(fleet, **S)[0] == A
    fleet.fence(a_rule(services=[a_service(A, active=False), B, C], requests=9, revision=2))
    assert chosen(fleet, revision=2, **S)[0] == B
    fleet.fence(a_rule(services=[A, C], requests=9, revision=3))
    first = chosen(fleet, revision=3, **S)[0]
    assert (first, pinned(fleet)) == (A, A)


def test_a_pin_to_a_service_of_no_partition_is_dropped_though_nothing_can_serve(fleet: Fleet) -> None:
    fleet.fence(a_rule(requests=9))
    assert chosen(fleet, **S)[0] == A
    fleet.fence(a_rule(services=[a_service(B, active=False)], revision=2))
    assert chosen(fleet, revision=2, **S) == ("none", "inactive")
    assert pinned(fleet) == ""


def test_pins_outlive_edits_and_the_rule(fleet: Fleet) -> None:
    fleet.fence(a_rule(requests=9, cursor=C))
    assert chosen(fleet, **S)[0] == C
    fleet.fence(a_tombstone(revision=2))
    fleet.fence(a_rule("random", revision=3))
    assert chosen(fleet, revision=3, **S) == (C, "pinned")


def test_neither_probe_retry_exhausted_nor_only_pins_a_session(fleet: Fleet) -> None:
    fleet.fence(a_rule(services=[A], providers=BREAKERS))
    live(fleet, "f")
    assert chosen(fleet, **S) == (A, "exhausted")
    fleet.pass_ms(12_000)
    assert chosen(fleet, **S) == (A, "probe")
    end(fleet, A)
    assert chosen(fleet, only=A, **S) == (A, "pinned")
    fleet.fence(a_rule(revision=2))
    assert chosen(fleet, excluded=[A], revision=2, **S)[1] == "retry"
    assert pinned(fleet) == ""


def test_a_retry_leaves_the_pin_of_its_session(fleet: Fleet) -> None:
    """What went wrong once says little; the breaker says it when it goes on."""
    fleet.fence(a_rule(requests=9))
    assert chosen(fleet, **S)[0] == A
    assert chosen(fleet, excluded=[A], **S) == (B, "retry")
    assert chosen(fleet, **S) == (A, "pinned")


def test_a_request_that_the_pinned_service_cannot_serve_leaves_the_pin(fleet: Fleet) -> None:
    fleet.fence(a_rule(requests=9))
    assert chosen(fleet, **S)[0] == A
    assert chosen(fleet, barred=[A], **S)[0] == B
    assert chosen(fleet, **S) == (A, "pinned")


def test_an_abandoned_first_pick_leaves_its_pin(fleet: Fleet) -> None:
    fleet.fence(a_rule(requests=1))
    ask(fleet, **S)
    abandon(fleet)
    assert chosen(fleet, **S) == (A, "pinned")


def test_one_service_only_looks_at_no_pin_and_moves_nothing(fleet: Fleet) -> None:
    fleet.fence(a_rule(requests=9))
    assert chosen(fleet, **S)[0] == A
    assert ask(fleet, only=C, **S) == (C, "pinned", 1, 0)
    assert (standing(fleet), pinned(fleet)) == ((A, 1), A)
    assert ask(fleet, only=C) == (C, "pinned", 1, 0)
    assert ask(fleet) == (A, "streak", 2, 0)


@pytest.mark.parametrize("only", ["x:y", B])
def test_only_what_is_not_there_or_switched_off_is_nothing(fleet: Fleet, only: str) -> None:
    fleet.fence(a_rule(services=[A, a_service(B, active=False), C]))
    assert ask(fleet, only=only) == ("none", "inactive", 0)


def test_one_service_only_is_within_its_limits(fleet: Fleet) -> None:
    fleet.fence(a_rule(services=[a_service(A, in_flight=1), B]))
    assert [chosen(fleet, only=A) for _ in range(2)] == [(A, "pinned"), ("none", "limited")]


@pytest.mark.parametrize("excluded", [[A], [B], [A, B, C]])
def test_one_service_only_is_not_tried_twice(fleet: Fleet, excluded: list[str]) -> None:
    fleet.fence(a_rule())
    assert ask(fleet, only=A, excluded=excluded) == ("none", "tried", 0)


def test_a_pin_lives_in_a_key_of_its_own_for_as_long_as_it_holds(new_pool: Callable[..., LuaPool], client: Any) -> None:
    pool = new_pool()
    fleet = Fleet(pool)
    fleet.fence(a_rule(requests=1))
    select = LuaPool(client, pool.name)  # it tells no time of its own to the pins' keys
    key = keys.pin(pool.name, "s")
    select._hold_pin = lambda now_ms, selection: None  # type: ignore[method-assign]
    fleet.pool = select
    ask(fleet, **S)
    assert client.get(key) == A.encode()
    assert HOUR_MS - 60_000 < client.pttl(key) <= HOUR_MS
    client.pexpire(key, 5_000)
    assert chosen(fleet, **S) == (A, "pinned")
    assert client.pttl(key) > HOUR_MS - 60_000, "renewed"
    client.pexpire(key, 5_000)
    fleet.settle(an_entry(0, A, RATE_LIMITED, cooldown_ms=1_000))
    assert chosen(fleet, **S)[0] == B
    assert (client.get(key), client.pttl(key) <= 5_000) == (A.encode(), True), "kept as it is"
    client.delete(key)
    assert chosen(fleet, **S)[0] in (B, C)
    assert client.get(key) != A.encode()
