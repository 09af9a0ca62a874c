"""What raising a rule's fence does to its state, once; and what it leaves alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import redis

from balancer.domain import RuleDefinition
from balancer.store.views import RuleView, ServiceView
from tests.lua.builders import (
    ABC,
    NEVER,
    NOW_MS,
    A,
    B,
    C,
    D,
    Fleet,
    a_provider,
    a_rule,
    a_selection,
    a_service,
    a_tombstone,
    an_entry,
    evaluate,
    nothing_written,
    pool_keys,
    refused,
)
from tests.lua.pool import LuaPool

NewPool = Callable[..., LuaPool]


@pytest.fixture
def fleet(new_pool: NewPool) -> Fleet:
    return Fleet(new_pool())


# -- raising -----------------------------------------------------------------------------------------------------------


def test_a_rule_is_picked_under_its_fence_from_then_on(fleet: Fleet) -> None:
    assert fleet.select(a_selection(1, revision=3))[0] == ["define", 0]
    assert fleet.fence(a_rule(revision=3)) == ["raised", 1, 1, 1, 0]
    assert fleet.select(a_selection(1, revision=3))[0][0] == "pick"


@pytest.mark.parametrize("revision", [1, 4, 5])
def test_a_lower_or_equal_revision_is_passed_over(fleet: Fleet, revision: int) -> None:
    fleet.fence(a_rule(revision=5))
    fleet.ask(3, revision=5)
    before = fleet.view()
    late = a_rule("random", [D], revision=revision, cursor=D, lengths={A: (7,)})
    assert fleet.fence(late) == ["raised", 0, 1, 4, 0]
    assert fleet.fence(a_tombstone(revision=revision)) == ["raised", 0, 1, 4, 0]
    assert fleet.view() == before
    assert fleet.picks(1, revision=5) == "b"


def test_a_fence_raised_twice_has_its_effect_once(fleet: Fleet) -> None:
    fleet.fence(a_rule())
    edited = a_rule(revision=2, cursor=C)
    fleet.fence(edited)
    fleet.ask(revision=2)
    assert fleet.fence(edited) == ["raised", 0, 1, 3, 0]
    assert fleet.cursor() == (C, 1)


def test_no_pick_is_made_under_a_superseded_revision(fleet: Fleet) -> None:
    fleet.fence(a_rule(revision=7))
    assert fleet.select(a_selection(1, revision=7))[0][0] == "pick"
    fleet.fence(a_rule(revision=9))
    assert [fleet.select(a_selection(2, revision=revision))[0] for revision in (7, 8)] == [["stale", 9]] * 2


def test_several_rules_are_raised_in_one_call_each_at_a_position(fleet: Fleet) -> None:
    fleet.fence(a_rule(rule="old", revision=9))
    reply = fleet.fence(
        a_rule(rule="one", revision=2), a_rule(rule="old", revision=8), a_rule("random", rule="two", revision=3)
    )
    assert reply == ["raised", 2, 1, 3, 0]
    assert fleet.view().rules == {
        "old": RuleView(revision=9),
        "one": RuleView(revision=2),
        "two": RuleView(revision=3),
    }


def test_a_rule_named_twice_in_one_call_ends_at_the_later_revision(fleet: Fleet) -> None:
    assert fleet.fence(a_rule(revision=1, cursor=B), a_rule(revision=2, requests=1)) == ["raised", 2, 1, 2, 0]
    assert fleet.picks(2, revision=2) == "bc"


def test_no_rules_are_no_change(fleet: Fleet) -> None:
    assert fleet.fence() == ["raised", 0, 1, 0, 0]


@pytest.mark.parametrize(
    ("seen", "reply"),
    [
        ((1, 1), ["raised", 1, 1, 2, 0]),
        ((1, 11), ["raised", 1, 2, 13, 10]),
        ((4, 0), ["raised", 1, 5, 3, 0]),
    ],
)
def test_a_caller_that_has_seen_more_starts_an_epoch(fleet: Fleet, seen: tuple[int, int], reply: list[Any]) -> None:
    fleet.fence(a_rule())
    assert fleet.fence(a_rule(revision=2), seen=seen) == reply


# -- cursor and streak -------------------------------------------------------------------------------------------------


def at_b(fleet: Fleet) -> None:
    """Rule chat, round_robin of threshold 4 over A B C, stands on B with a streak of 2."""
    fleet.fence(a_rule(requests=4, revision=1))
    fleet.ask(6, revision=1)
    assert fleet.cursor() == (B, 2)


EDITS: dict[str, tuple[RuleDefinition, tuple[str, int]]] = {
    "nothing but the revision": (a_rule(requests=4, revision=2), (B, 2)),
    "weights and windows": (
        a_rule(services=[a_service(s, weight=9, window_s=5) for s in ABC], requests=4, revision=2),
        (B, 2),
    ),
    "another order": (a_rule(services=[C, B, A], requests=4, revision=2), (B, 2)),
    "a service more": (a_rule(services=[D, A, B, C], requests=4, revision=2), (B, 2)),
    "another service left": (a_rule(services=[B, C], requests=4, revision=2), (B, 2)),
    "the cursor's service is switched off": (
        a_rule(services=[A, a_service(B, active=False), C], requests=4, revision=2),
        (B, 2),
    ),
    "the cursor's service left": (a_rule(services=[A, C], requests=4, revision=2), ("", 0)),
    "all services left": (a_rule(services=[], requests=4, revision=2), ("", 0)),
    "another tactic": (a_rule("hybrid", requests=4, revision=2), (B, 0)),
    "random": (a_rule("random", revision=2), (B, 0)),
    "another threshold": (a_rule(requests=5, revision=2), (B, 0)),
    "a cursor": (a_rule(requests=4, revision=2, cursor=C), (C, 0)),
    "the same cursor": (a_rule(requests=4, revision=2, cursor=B), (B, 0)),
    "a cursor that is switched off": (
        a_rule(services=[A, B, a_service(C, active=False)], requests=4, revision=2, cursor=C),
        (C, 0),
    ),
    "a cursor that is no service of the rule": (a_rule(requests=4, revision=2, cursor=D), ("", 0)),
    "a cursor and another tactic": (a_rule("token_based", revision=2, cursor=A), (A, 0)),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_keeps_or_moves_cursor_and_streak(fleet: Fleet, edit: str) -> None:
    definition, expected = EDITS[edit]
    at_b(fleet)
    fleet.fence(definition)
    assert fleet.cursor() == expected


@pytest.mark.parametrize(
    ("edit", "following"),
    [
        ("nothing but the revision", "bbcccc"),
        ("another order", "bbaaaa"),
        ("a service more", "bbcccc"),
        ("the cursor's service is switched off", "ccccaa"),
        ("the cursor's service left", "aaaacc"),
        ("another threshold", "bbbbbc"),
        ("a cursor", "ccccaa"),
        ("the same cursor", "bbbbcc"),
        ("a cursor that is switched off", "aaaabb"),
        ("a cursor that is no service of the rule", "aaaabb"),
    ],
)
def test_picks_after_an_edit_go_on_from_what_it_left(fleet: Fleet, edit: str, following: str) -> None:
    at_b(fleet)
    fleet.fence(EDITS[edit][0])
    assert fleet.picks(6, revision=2) == following


def test_a_streak_survives_while_the_cursors_service_is_switched_off_and_on(fleet: Fleet) -> None:
    at_b(fleet)
    fleet.fence(a_rule(services=[A, a_service(B, active=False), C], requests=4, revision=2))
    fleet.fence(a_rule(requests=4, revision=3))
    assert fleet.picks(4, revision=3) == "bbcc"


def test_a_tactic_that_has_counters_goes_on_from_the_cursor_that_random_drew(fleet: Fleet) -> None:
    fleet.fence(a_rule("random"))
    fleet.ask(draw=2**31)
    fleet.fence(a_rule(requests=2, revision=2))
    assert fleet.picks(4, revision=2) == "bbcc"


def test_an_edit_of_one_rule_leaves_the_others_alone(fleet: Fleet) -> None:
    at_b(fleet)
    fleet.fence(a_rule("random", rule="other", revision=2, cursor=C), a_tombstone("gone", revision=2))
    assert fleet.cursor() == (B, 2)
    assert fleet.picks(3) == "bbc"


# -- tombstones --------------------------------------------------------------------------------------------------------


def test_a_tombstone_forgets_the_rules_partition_and_keeps_its_fence(fleet: Fleet) -> None:
    at_b(fleet)
    fleet.fence(a_rule(rule="other"))
    assert fleet.fence(a_tombstone(revision=2)) == ["raised", 1, 1, 9, 0]
    view = fleet.view()
    assert list(view.partitions) == ["|other"]
    assert view.rules["chat"] == RuleView(revision=2, seq=6)
    assert fleet.select(a_selection(9, revision=1))[0] == ["stale", 2]
    assert fleet.select(a_selection(9, revision=2))[0] == ["define", 2]


def test_a_rule_made_again_after_its_tombstone_starts_without_a_cursor(fleet: Fleet) -> None:
    at_b(fleet)
    fleet.fence(a_tombstone(revision=2))
    fleet.fence(a_rule(requests=4, revision=3))
    assert fleet.cursor() == ("", 0)
    assert fleet.ask(revision=3)[0][1:4] == [A, "streak", 7], "its picks are counted on"


def test_partitions_that_an_edit_drops_are_forgotten(fleet: Fleet) -> None:
    whole = a_rule()
    entry = msgspec.structs.replace(whole.partitions[0], id="long prompts|chat")
    fleet.fence(msgspec.structs.replace(whole, partitions=(*whole.partitions, entry)))
    assert sorted(fleet.view().partitions) == ["long prompts|chat", "|chat"]
    fleet.fence(a_rule(revision=2))
    assert sorted(fleet.view().partitions) == ["|chat"]


# -- windows -----------------------------------------------------------------------------------------------------------


def test_a_new_service_has_empty_windows_of_the_lengths_given(fleet: Fleet) -> None:
    fleet.fence(a_rule(services=[A], lengths={A: (5, 300)}))
    assert fleet.windows() == [(5, -NOW_MS, 0, 0), (300, -NOW_MS, 0, 0)]


def test_windows_that_stay_keep_what_they_count_and_new_ones_start_empty(fleet: Fleet) -> None:
    fleet.fence(a_rule(services=[A], lengths={A: (60, 300)}))
    fleet.ask()
    fleet.settle(an_entry(1, A, input=7))
    fleet.pass_ms(1_000)
    fleet.fence(a_rule(services=[A], revision=2, lengths={A: (5, 300)}))
    assert fleet.windows() == [(5, -NOW_MS, 0, 0), (300, 0, 1, 7)]
    fleet.ask(revision=2)
    assert fleet.windows() == [(5, 1_000, 1, 0), (300, 0, 2, 7)]


def test_a_rule_whose_window_changed_reads_the_new_one(fleet: Fleet) -> None:
    fleet.fence(a_rule("hybrid", [A, B], requests=2))
    fleet.ask(2)
    services = [a_service(A, window_s=5), a_service(B, window_s=5)]
    fleet.fence(a_rule("hybrid", services, requests=2, revision=2))
    assert fleet.picks(3, revision=2) == "aab"


def test_an_edit_leaves_totals_and_what_is_held_alone(fleet: Fleet) -> None:
    fleet.fence(a_rule(services=[A]))
    fleet.ask(2, reserved=9)
    fleet.settle(an_entry(1, A, input=7))
    before = fleet.service()
    fleet.fence(a_rule(services=[A], revision=2))
    fleet.fence(a_tombstone(revision=3))
    assert fleet.service() == before
    fleet.settle(an_entry(2, A))
    assert (fleet.service().in_flight, fleet.service().reserved) == (0, 0)


def test_services_of_a_rule_are_known_to_the_pool_before_their_first_pick(fleet: Fleet) -> None:
    fleet.fence(a_rule())
    assert {name: service.picks for name, service in fleet.view().services.items()} == dict.fromkeys(ABC, 0)
    assert all(isinstance(service, ServiceView) for service in fleet.view().services.values())


def test_a_rule_may_have_hundreds_of_services_with_large_numbers(fleet: Fleet) -> None:
    services = [a_service(f"p{i}:m", weight=1_000_000, window_s=31_536_000) for i in range(300)]
    fleet.fence(a_rule("random", services))
    picked = [fleet.ask(draw=draw)[0][1] for draw in (0, 2**31, 2**32 - 1)]
    assert picked == ["p0:m", "p150:m", "p299:m"]
    assert fleet.windows("p0:m") == [(31_536_000, 0, 1, 0)]


# -- what is refused ---------------------------------------------------------------------------------------------------

ARGUMENTS: dict[str, str | int] = {"now_ms": NOW_MS, "epoch": 0, "position": 0, "record": "", "keep": 1, "revision": 0}


@pytest.fixture
def fence_raw(fleet: Fleet, client: Any) -> Callable[..., Any]:
    """Sends definitions, malformed or not, to a pool with something in it."""
    assert isinstance(fleet.pool, LuaPool)
    at_b(fleet)
    names = {key: name for key, name in pool_keys(fleet.pool.name, "").items() if key not in ("holdings", "leases")}
    return lambda arguments, *rest: evaluate(client, "fence", names, ARGUMENTS | arguments, rest)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (name, value)
        for name in ARGUMENTS
        for value in ("", "x", "-1", "1.5", "nan", "inf", "9007199254740992")
        if (name, value) != ("record", "")
    ],
)
def test_a_malformed_argument_is_refused_and_nothing_is_written(
    fence_raw: Callable[..., Any], client: Any, name: str, value: str
) -> None:
    with refused(client, "fence"):
        fence_raw({name: value}, msgspec.json.encode(a_rule(revision=2)))


def broken(**changes: Any) -> dict[str, Any]:
    """A definition with some of its fields changed; None takes one away."""
    return {k: v for k, v in (msgspec.to_builtins(a_rule(revision=2)) | changes).items() if v is not None}


def broken_part(**changes: Any) -> dict[str, Any]:
    (part,) = broken()["partitions"]
    return broken(partitions=[{k: v for k, v in (part | changes).items() if v is not None}])


def broken_service(**changes: Any) -> dict[str, Any]:
    services: list[dict[str, Any]] = broken()["partitions"][0]["services"]
    return broken_part(services=[services[0] | changes, *services[1:]])


def broken_provider(**changes: Any) -> dict[str, Any]:
    provider = msgspec.to_builtins(a_provider()) | changes
    return broken(providers=[{k: v for k, v in provider.items() if v is not None}])


MALFORMED = {
    "no JSON": b"{",
    "no object": b"7",
    "no rule": broken(rule=None),
    "no revision": broken(revision=None),
    "a revision in words": broken(revision="x"),
    "no partitions": broken(partitions=None),
    "no windows": broken(windows=None),
    "a window without lengths": broken(windows=[{"id": A}]),
    "a partition without an id": broken_part(id=None),
    "a partition without a tactic": broken_part(tactic=None),
    "a partition without a cursor": broken_part(cursor=None),
    "a partition without services": broken_part(services=None),
    "a service without an id": broken_part(services=[{"active": 1, "window": 5, "weight": 1}]),
    "a service without a weight": broken_part(services=[{"id": A, "active": 1, "window": 5}]),
    "a service of a tier below zero": broken_service(tier=-1),
    "a service with a weight below zero": broken_service(weight=-1),
    "a service with a window below zero": broken_service(window=-5),
    "a service with a cost below zero": broken_service(cost=-5),
    "a service with a limit in words": broken_service(rpm="many"),
    "a service with half a limit": broken_service(tpm=0.5),
    "a service that is neither active nor not": broken_service(active=2),
    "a service without an id in it": broken_service(id=""),
    "a service with two lines for an id": broken_service(id="a:m\n1"),
    "a provider without an id": broken_provider(id=None),
    "a provider without breaker numbers": broken_provider(failures=None),
    "a provider with half a failure": broken_provider(failures=0.5),
    "a provider with a breaker number below zero": broken_provider(window_ms=-1),
    "no providers": broken(providers=None),
    "no share of retries": broken(retry_permille=None),
    "a share of retries below zero": broken(retry_permille=-1),
    "a share of retries between thousandths": broken(retry_permille=0.5),
    "a parameter in words": broken_part(params={"request_threshold": "x"}),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_definition_is_refused_with_all_others_of_its_call(
    fence_raw: Callable[..., Any], client: Any, name: str
) -> None:
    """A rule written in part would be picked under a revision that is not what it says."""
    value = MALFORMED[name]
    malformed = value if isinstance(value, bytes) else json.dumps(value).encode()
    first = msgspec.json.encode(a_rule(rule="other", revision=2))
    with nothing_written(client), pytest.raises(redis.ResponseError):
        fence_raw({}, first, malformed)


def test_the_definitions_above_are_taken_when_nothing_is_broken(fence_raw: Callable[..., Any]) -> None:
    assert fence_raw({}, json.dumps(broken()).encode())[:2] == ["raised", 1]
    assert fence_raw({}, json.dumps(broken_service(rpm=-1) | {"revision": 3}).encode())[:2] == ["raised", 1]
    assert fence_raw({}, json.dumps(broken_provider(tpm=-1) | {"revision": 4}).encode())[:2] == ["raised", 1]
    assert NEVER == 2**53
