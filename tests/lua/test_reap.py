"""What a dead worker, or a late attempt, held is given back, and counted as lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from balancer.store import keys
from balancer.store.views import ServiceView, WindowView
from tests.lua.builders import (
    DEADLINE_MS,
    LEASE_MS,
    NOW_MS,
    A,
    B,
    Fleet,
    a_rule,
    a_selection,
    a_service,
    an_abandoned,
    an_entry,
    evaluate,
    pool_keys,
    refused,
)
from tests.lua.pool import LuaPool

NewPool = Callable[..., LuaPool]
NOTHING = ["reaped", 0, 0]


@pytest.fixture
def fleet(new_pool: NewPool) -> Fleet:
    """A fleet that is about to pick A, and only A, for rule chat."""
    fleet = Fleet(new_pool())
    fleet.fence(a_rule("random", [a_service(A)]))
    return fleet


def leases(fleet: Fleet) -> dict[str, int]:
    """The end of each worker's lease, as ms since NOW_MS."""
    assert isinstance(fleet.pool, LuaPool)
    members = fleet.pool.client.zrange(keys.leases(fleet.pool.name), 0, -1, withscores=True)
    return {worker.decode(): int(end) - NOW_MS for worker, end in members}


def held(fleet: Fleet) -> tuple[int, int, int]:
    """In flight, reserved, lost."""
    service = fleet.service()
    return service.in_flight, service.reserved, service.lost


# -- leases ------------------------------------------------------------------------------------------------------------


def test_attempts_of_a_worker_whose_lease_ended_are_counted_as_lost(fleet: Fleet) -> None:
    fleet.ask(3, reserved=50)
    fleet.settle(an_entry(2, A, input=7))
    fleet.pass_ms(LEASE_MS)
    assert fleet.reap("w1") == ["reaped", 1, 2, 1, 7, 0]
    window = WindowView(length_s=300, start_ms=NOW_MS, requests=3, tokens=107)
    assert fleet.service() == ServiceView(
        windows=(window,), picks=3, requests=3, input=7, lost=2, lost_tokens=100, last_used=NOW_MS
    )


@pytest.mark.parametrize(("passed_ms", "reaped"), [(LEASE_MS - 1, NOTHING), (LEASE_MS, ["reaped", 1, 1])])
def test_a_lease_ends_at_its_end(fleet: Fleet, passed_ms: int, reaped: list[Any]) -> None:
    fleet.ask()
    fleet.pass_ms(passed_ms)
    assert fleet.reap("w1")[:3] == reaped


def test_what_was_lost_is_lost_once(fleet: Fleet) -> None:
    fleet.ask(2, reserved=50)
    fleet.pass_ms(LEASE_MS)
    assert [fleet.reap("w1", worker=worker)[2] for worker in ("w2", "w3", "w2")] == [2, 0, 0]
    assert held(fleet) == (0, 0, 2)


def test_every_select_and_settle_and_look_renews_the_own_lease(fleet: Fleet) -> None:
    fleet.ask(reserved=50, deadline_ms=10**9)
    for act in (
        lambda: fleet.ask(deadline_ms=10**9),
        fleet.settle,
        lambda: fleet.reap("w2", worker="w1"),
        lambda: fleet.reap("w1", worker="w1"),
    ):
        fleet.pass_ms(LEASE_MS - 1)
        act()
        assert leases(fleet)["w1"] == fleet.now_ms - NOW_MS + LEASE_MS
        assert fleet.reap("w1", worker="w2")[:3] == NOTHING
    assert fleet.service().lost == 0


def test_a_worker_that_looks_at_itself_late_keeps_what_it_holds(fleet: Fleet) -> None:
    fleet.ask(reserved=50, deadline_ms=10**9)
    fleet.pass_ms(10 * LEASE_MS)
    assert fleet.reap("w1", worker="w1")[:3] == NOTHING
    assert held(fleet) == (1, 50, 0)


def test_others_keep_what_they_hold(fleet: Fleet) -> None:
    fleet.ask(reserved=50, worker="w1")
    fleet.ask(reserved=7, worker="w2")
    fleet.pass_ms(LEASE_MS)
    fleet.reap("w1", worker="w2")
    assert held(fleet) == (1, 7, 1)


def test_a_worker_that_is_reaped_stays_listed_below_zero_while_its_holdings_are_kept(fleet: Fleet) -> None:
    fleet.ask()
    fleet.pass_ms(LEASE_MS)
    fleet.reap("w1", worker="w2")
    assert leases(fleet)["w1"] < 0 < leases(fleet)["w2"]
    fleet.pass_ms(7 * 24 * 3_600_000)
    fleet.reap("w2", worker="w2")
    assert list(leases(fleet)) == ["w2"]


def test_a_worker_that_returns_after_its_lease_goes_on(fleet: Fleet) -> None:
    fleet.ask(reserved=50)
    fleet.settle()
    fleet.pass_ms(LEASE_MS)
    fleet.reap("w1")
    assert fleet.picks(1, reserved=7) == "a"
    assert fleet.settle(an_entry(2, A, input=5))[:2] == ["applied", 2], "its batches go on where they were"
    assert held(fleet) == (0, 0, 1)
    assert "w1" in leases(fleet)


def test_a_worker_that_nobody_knows_has_nothing_to_lose(fleet: Fleet) -> None:
    assert fleet.reap("nobody") == ["reaped", 1, 0, 1, 1, 0]
    assert leases(fleet)["w2"] == LEASE_MS


def test_a_living_worker_keeps_the_number_of_its_last_batch(fleet: Fleet, client: Any) -> None:
    """However long it has nothing to do: else its next batch is a gap, and all before it are taken for lost."""
    assert isinstance(fleet.pool, LuaPool)
    fleet.ask()
    fleet.settle(an_entry(1, A))
    holdings = keys.holdings(fleet.pool.name, "w1")
    soon_ms = 600_000
    client.pexpire(holdings, soon_ms)
    fleet.reap("w1", worker="w1")
    assert client.pttl(holdings) > soon_ms


# -- deadlines ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["w1", "w2"])
@pytest.mark.parametrize(("passed_ms", "lost"), [(999, 0), (1_000, 1), (1_999, 1), (2_000, 2)])
def test_single_attempts_past_their_deadline_are_lost_though_the_worker_lives(
    fleet: Fleet, by: str, passed_ms: int, lost: int
) -> None:
    for number, deadline_ms in enumerate((1_000, 2_000, 3_000), start=1):
        fleet.select(a_selection(number, reserved=10**number, deadline_ms=deadline_ms))
    fleet.pass_ms(passed_ms)
    assert fleet.reap("w1", worker=by)[:3] == ["reaped", 0, lost]
    assert held(fleet) == (3 - lost, [1110, 1100, 1000][lost], lost)
    assert "w1" in leases(fleet)


def test_a_deadline_counts_from_the_pick(fleet: Fleet) -> None:
    fleet.pass_ms(5_000)
    fleet.ask(deadline_ms=1_000)
    fleet.pass_ms(999)
    assert fleet.reap("w1")[:3] == NOTHING


# -- limit -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "limit", "lost"), [(5, 2, [2, 2, 1]), (4, 2, [2, 2, 0]), (1, 1000, [1]), (3, 3, [3, 0])]
)
def test_a_limit_leaves_the_rest_for_the_next_calls(fleet: Fleet, count: int, limit: int, lost: list[int]) -> None:
    fleet.ask(count, reserved=10)
    fleet.pass_ms(LEASE_MS)
    replies = [fleet.reap("w1", limit=limit) for _ in lost]
    assert [reply[:3] for reply in replies] == [["reaped", 1, n] for n in lost]
    assert replies[-1][4] == 1 + count + count
    assert held(fleet) == (0, 0, count)


def test_a_worker_keeps_its_place_among_the_leases_until_all_is_reaped(fleet: Fleet) -> None:
    fleet.ask(3)
    fleet.pass_ms(LEASE_MS)
    seen = []
    for _ in range(3):
        fleet.reap("w1", limit=2)
        seen.append(leases(fleet)["w1"] > 0)
    assert seen == [True, False, False]


def test_the_oldest_attempts_are_lost_first(fleet: Fleet) -> None:
    fleet.ask(12)
    fleet.pass_ms(LEASE_MS)
    fleet.reap("w1", limit=10)
    fleet.settle(an_entry(11, A), an_entry(12, A))
    assert held(fleet) == (0, 0, 10)


# -- steps -------------------------------------------------------------------------------------------------------------


def steps(fleet: Fleet, limit: int = 500, begin: str = "") -> Iterator[list[Any]]:
    """The replies of w2's calls until all that w1 holds was looked at, each going on where the last one ended."""
    assert isinstance(fleet.pool, LuaPool)
    place = begin
    while True:
        reply = fleet.pool.reap_from(place, fleet.now_ms, "w2", "w1", LEASE_MS, limit)
        yield reply
        place = reply[-1]
        if not place:
            return


def test_many_attempts_of_a_dead_worker_are_reaped_in_steps_each_of_which_reads_a_part_of_them(
    fleet: Fleet, client: Any
) -> None:
    """Each call read all of them: what reaping cost grew as the square of what a worker held."""
    fleet.ask(2_500, reserved=3)
    fleet.pass_ms(LEASE_MS)
    client.config_resetstat()
    replies = list(steps(fleet))
    assert "cmdstat_hgetall" not in client.info("commandstats"), "nothing reads all of them"
    assert all(300 < reply[2] <= 500 for reply in replies[:-1])
    assert sum(reply[2] for reply in replies) == 2_500
    assert held(fleet) == (0, 0, 2_500)
    assert leases(fleet)["w1"] < 0


def test_what_a_step_is_not_allowed_to_reap_the_next_one_does(fleet: Fleet) -> None:
    fleet.ask(1_000, reserved=3)
    fleet.pass_ms(LEASE_MS)
    replies = list(steps(fleet, limit=150))
    assert all(reply[2] <= 150 for reply in replies)
    assert sum(reply[2] for reply in replies) == 1_000
    assert held(fleet) == (0, 0, 1_000)


def test_a_worker_keeps_its_place_among_the_leases_until_the_last_step(fleet: Fleet) -> None:
    fleet.ask(1_000)
    fleet.pass_ms(LEASE_MS)
    seen = [(bool(reply[-1]), leases(fleet)["w1"] > 0) for reply in steps(fleet)]
    assert len(seen) > 1
    assert all(goes_on == is_listed for goes_on, is_listed in seen)


def test_what_a_worker_picked_between_two_ends_of_its_lease_is_reaped_though_the_first_look_has_passed_it(
    fleet: Fleet,
) -> None:
    """A look that goes on under another lease would never see it, and the worker would be listed as done with."""
    fleet.ask(1_000)
    fleet.pass_ms(LEASE_MS)
    place = next(steps(fleet))[-1]
    fleet.ask(1_000)
    fleet.pass_ms(LEASE_MS)
    list(steps(fleet, begin=place))
    assert held(fleet) == (0, 0, 2_000)


def test_a_worker_that_lives_is_looked_at_from_one_end_to_the_other_while_it_renews_its_lease(fleet: Fleet) -> None:
    fleet.ask(1_000, deadline_ms=1_000)
    fleet.pass_ms(1_000)
    lost = 0
    for reply in steps(fleet):
        assert reply[1] == 0
        lost += reply[2]
        fleet.pass_ms(1)
        fleet.settle()
    assert lost == 1_000


# -- abandoned names ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("passed_ms", "answer"), [(59_999, "abandoned"), (60_000, "pick")])
def test_an_abandoned_name_is_remembered_for_60_s(fleet: Fleet, passed_ms: int, answer: str) -> None:
    fleet.settle(an_abandoned(1))
    fleet.pass_ms(passed_ms)
    assert fleet.reap("w1")[2] == 0
    assert fleet.ask()[0][0] == answer


def test_abandoned_names_are_forgotten_beyond_the_limit_too(fleet: Fleet, client: Any) -> None:
    assert isinstance(fleet.pool, LuaPool)
    fleet.ask(2)
    fleet.settle(*(an_abandoned(number) for number in range(100, 300)))
    fleet.pass_ms(60_000)
    fleet.reap("w1", limit=1)
    fleet.reap("w1", limit=1)
    fields = client.hkeys(keys.holdings(fleet.pool.name, "w1"))
    assert [name for name in fields if name.isdigit() and int(name) >= 100] == []


def test_forgetting_a_name_is_no_change_of_the_pool(fleet: Fleet) -> None:
    fleet.settle(an_abandoned(1))
    fleet.pass_ms(60_000)
    assert fleet.reap("w1") == ["reaped", 1, 0, 1, 2, 0]


# -- windows and place -------------------------------------------------------------------------------------------------


def test_what_was_lost_counts_in_the_window_open_at_the_reap(fleet: Fleet) -> None:
    fleet.ask(reserved=50)
    fleet.pass_ms(300_000)
    fleet.reap("w1")
    assert fleet.windows() == [(300, 300_000, 0, 50)]


@pytest.mark.parametrize(("passed_ms", "picked"), [(9_999, "b"), (10_000, "a")])
def test_the_estimate_of_a_lost_attempt_counts_for_one_window_more(
    new_pool: NewPool, passed_ms: int, picked: str
) -> None:
    fleet = Fleet(new_pool())
    services = [a_service(A, window_s=10), a_service(B, window_s=10)]
    fleet.fence(a_rule("token_based", services, tokens=100))
    fleet.ask(reserved=100)
    fleet.pass_ms(LEASE_MS)
    fleet.reap("w1")
    fleet.pass_ms(passed_ms)
    assert fleet.picks(1) == picked


@pytest.mark.parametrize(
    ("seen", "reply"),
    [
        ((1, 2), ["reaped", 1, 1, 1, 3, 0]),
        ((1, 12), ["reaped", 1, 1, 2, 14, 10]),
        ((4, 1), ["reaped", 1, 1, 5, 4, 0]),
    ],
)
def test_a_caller_that_has_seen_more_starts_an_epoch(fleet: Fleet, seen: tuple[int, int], reply: list[Any]) -> None:
    fleet.ask()
    fleet.pass_ms(LEASE_MS)
    assert fleet.reap("w1", seen=seen) == reply


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (name, value)
        for name in ("now_ms", "epoch", "position", "lease_ms", "limit")
        for value in ("", "x", "-1", "1.5", "nan", "inf", "9007199254740992")
    ]
    + [("lease_ms", "0"), ("limit", "0")]
    + [("place", value) for value in ("x", "7", "7 ", "-1 7", "7 7 7", "7 x", "7\n7")],
)
def test_a_malformed_argument_is_refused_and_nothing_is_written(
    fleet: Fleet, client: Any, name: str, value: str
) -> None:
    assert isinstance(fleet.pool, LuaPool)
    fleet.ask(2, reserved=5)
    fleet.settle(an_abandoned(9))
    arguments: dict[str, str | int] = {
        "now_ms": NOW_MS + DEADLINE_MS,
        "worker": "w2",
        "epoch": 0,
        "position": 0,
        "lease_ms": LEASE_MS,
        "target": "w1",
        "limit": 10,
        "place": "",
    }
    names = pool_keys(fleet.pool.name, "w1")
    with refused(client, "reap"):
        evaluate(client, "reap", names, arguments | {name: value})
    assert evaluate(client, "reap", names, arguments)[:3] == ["reaped", 1, 2]
