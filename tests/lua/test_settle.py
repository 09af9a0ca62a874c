"""What attempts used is counted once and in order, and what they held is given back."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from balancer.domain import Outcome
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
    evaluate_tick,
    nothing_written,
    pool_keys,
    refused,
)
from tests.lua.pool import LuaPool

NewPool = Callable[..., LuaPool]


@pytest.fixture
def fleet(new_pool: NewPool) -> Fleet:
    """A fleet that is about to pick A, and only A, for rule chat."""
    fleet = Fleet(new_pool())
    fleet.fence(a_rule("random", [a_service(A)]))
    return fleet


def a_view(*, start_ms: int = NOW_MS, picks: int = 1, tokens: int = 0, **counters: Any) -> ServiceView:
    """A service with one window of 300 s in which every pick was made."""
    window = WindowView(
        length_s=300, start_ms=start_ms, requests=picks, tokens=tokens, output=counters.get("output", 0)
    )
    return ServiceView(windows=(window,), picks=picks, **counters)


# -- one attempt -------------------------------------------------------------------------------------------------------


def test_a_settle_counts_each_kind_of_usage_apart_and_releases_what_was_held(fleet: Fleet) -> None:
    fleet.ask(reserved=50)
    assert fleet.service() == a_view(in_flight=1, reserved=50)
    fleet.pass_ms(1_500)
    usage = {"input": 11, "output": 7, "cached": 5, "cache_creation": 3, "reasoning": 2}
    assert fleet.settle(an_entry(1, A, Outcome.SUCCESS, **usage)) == ["applied", 1, 1, 3, 0]
    assert fleet.service() == a_view(tokens=18, requests=1, last_used=NOW_MS + 1_500, **usage)


@pytest.mark.parametrize(
    ("outcome", "counted"),
    [
        (Outcome.SUCCESS, {"requests": 1}),
        (Outcome.RATE_LIMITED, {"requests": 1, "failures": 1}),
        (Outcome.UNAUTHORIZED, {"requests": 1, "failures": 1}),
        (Outcome.OVERLOADED, {"requests": 1, "failures": 1}),
        (Outcome.FAILED, {"requests": 1, "failures": 1}),
        (Outcome.REJECTED, {"requests": 1}),
        (Outcome.CANCELLED, {"requests": 1}),
    ],
)
def test_every_ending_is_one_request_and_some_are_failures(
    fleet: Fleet, outcome: Outcome, counted: dict[str, int]
) -> None:
    fleet.ask(reserved=50)
    fleet.settle(an_entry(1, A, outcome))
    assert fleet.service() == a_view(last_used=NOW_MS, **counted)


@pytest.mark.parametrize("outcome", [Outcome.CANCELLED, Outcome.FAILED])
def test_a_cut_stream_counts_the_usage_reported_before(fleet: Fleet, outcome: Outcome) -> None:
    fleet.ask()
    fleet.settle(an_entry(1, A, outcome, input=20, output=3))
    service = fleet.service()
    assert (service.requests, service.input, service.output, fleet.windows()) == (1, 20, 3, [(300, 0, 1, 23)])


def test_tokens_count_in_the_window_open_at_the_settle_and_the_pick_in_the_one_open_at_the_pick(fleet: Fleet) -> None:
    fleet.ask(deadline_ms=10**9)
    fleet.pass_ms(300_000)
    fleet.ask()
    assert fleet.windows() == [(300, 300_000, 1, 0)]
    fleet.settle(an_entry(1, A, input=5))
    assert fleet.windows() == [(300, 300_000, 1, 5)]


def test_usage_counts_in_every_window_of_the_service(fleet: Fleet) -> None:
    fleet.fence(a_rule("random", [a_service(A)], revision=2, lengths={A: (5, 60, 300)}))
    fleet.ask(revision=2)
    fleet.pass_ms(5_000)
    fleet.settle(an_entry(1, A, input=4, output=2))
    assert fleet.windows() == [(5, 5_000, 0, 6), (60, 0, 1, 6), (300, 0, 1, 6)]


def test_usage_of_an_attempt_that_holds_nothing_counts_and_releases_nothing(fleet: Fleet) -> None:
    fleet.ask(reserved=50)
    fleet.settle(an_entry(77, A, input=9))
    assert fleet.service() == a_view(in_flight=1, reserved=50, requests=1, input=9, tokens=9, last_used=NOW_MS)


def test_an_attempt_settled_twice_releases_once(fleet: Fleet) -> None:
    fleet.ask(2, reserved=50)
    fleet.settle(an_entry(1, A, input=1), an_entry(1, A, input=1))
    service = fleet.service()
    assert (service.in_flight, service.reserved, service.requests, service.input) == (1, 50, 2, 2)


def test_a_worker_releases_only_what_it_holds_itself(fleet: Fleet) -> None:
    fleet.ask(reserved=50, worker="w1")
    fleet.settle(an_entry(1, A), worker="w2")
    assert (fleet.service().in_flight, fleet.service().reserved) == (1, 50)


def test_an_entry_of_a_service_that_no_rule_has_counts_in_its_totals(fleet: Fleet) -> None:
    fleet.settle(an_entry(0, "gone:m", input=3))
    assert fleet.service("gone:m") == ServiceView(requests=1, input=3, last_used=NOW_MS)


def test_the_last_use_is_the_latest_whatever_the_order(fleet: Fleet) -> None:
    fleet.pass_ms(50_000)
    fleet.settle(an_entry(0, A, age_ms=2_000), an_entry(0, A, age_ms=40_000))
    assert fleet.service().last_used == NOW_MS + 48_000


# -- ages --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settled_at_ms", "age_ms", "windows"),
    [
        (200_000, 0, [(5, 200_000, 0, 9), (300, 0, 1, 9)]),
        (4_999, 4_999, [(5, 0, 1, 9), (300, 0, 1, 9)]),
        (4_999, 5_000, [(5, 0, 1, 0), (300, 0, 1, 0)]),
        (5_000, 1_000, [(5, 0, 1, 0), (300, 0, 1, 9)]),
        (299_999, 299_999, [(5, 0, 1, 0), (300, 0, 1, 9)]),
        (300_000, 1_000, [(5, 0, 1, 0), (300, 0, 1, 0)]),
        (300_000, 0, [(5, 300_000, 0, 9), (300, 300_000, 0, 9)]),
    ],
)
def test_an_entry_with_an_age_counts_in_a_window_only_if_that_was_open_then(
    fleet: Fleet, settled_at_ms: int, age_ms: int, windows: list[tuple[int, ...]]
) -> None:
    fleet.fence(a_rule("random", [a_service(A)], revision=2, lengths={A: (5, 300)}))
    fleet.ask(revision=2, deadline_ms=10**9)
    fleet.pass_ms(settled_at_ms)
    fleet.settle(an_entry(1, A, age_ms=age_ms, input=9))
    assert fleet.windows() == windows
    assert (fleet.service().requests, fleet.service().input) == (1, 9), "totals count always"


def test_an_old_entry_does_not_count_in_a_window_that_was_opened_since(fleet: Fleet) -> None:
    fleet.ask()
    fleet.pass_ms(300_000)
    fleet.ask()
    fleet.pass_ms(10_000)
    fleet.settle(an_entry(1, A, age_ms=10_001, input=9), an_entry(2, A, age_ms=10_000, input=4))
    assert fleet.windows() == [(300, 300_000, 1, 4)]


# -- batches -----------------------------------------------------------------------------------------------------------


def test_batches_are_applied_once_each_and_in_order(fleet: Fleet) -> None:
    replies = [fleet.batch(number, an_entry(0, A, input=10**number)) for number in (1, 2, 3)]
    assert replies == [["applied", number, 1, number + 1, 0] for number in (1, 2, 3)]
    assert fleet.service().input == 1110


def test_a_batch_that_was_applied_is_acknowledged_again_and_counts_nothing(fleet: Fleet) -> None:
    fleet.ask(3, reserved=50)
    for number in (1, 2):
        fleet.batch(number, an_entry(number, A, input=5))
    before = fleet.view()
    for number in (1, 2):
        assert fleet.batch(number, an_entry(3, A, input=1000), an_abandoned(9)) == ["applied", 2, 1, 6, 0]
    assert fleet.view() == before
    assert fleet.picks(1) == "a"


def test_a_gap_is_told_and_changes_nothing_at_all(fleet: Fleet, client: Any) -> None:
    fleet.ask(2, reserved=50)
    fleet.batch(1, an_entry(1, A))
    with nothing_written(client):
        assert fleet.batch(3, an_entry(2, A, input=5), an_abandoned(9)) == ["gap", 1]
        assert fleet.batch(4, an_entry(2, A, input=5), seen=(1, 999)) == ["gap", 1]
        assert fleet.batch(2, an_entry(2, A, input=5), worker="w2") == ["gap", 0]
    fleet.batch(2, an_entry(2, A, input=5))
    assert fleet.batch(3) == ["applied", 3, 1, 5, 0]


def test_a_gap_in_an_empty_pool_leaves_it_empty(new_pool: NewPool, client: Any) -> None:
    assert Fleet(new_pool()).batch(2, an_entry(0, A, input=5)) == ["gap", 0]
    assert list(client.scan_iter("*")) == []


def test_batches_that_are_held_no_longer_are_passed_over_when_told_so(fleet: Fleet) -> None:
    fleet.batch(1, an_entry(0, A, input=1))
    assert fleet.batch(5, an_entry(0, A, input=10), skip=True) == ["applied", 5, 1, 3, 0]
    assert fleet.batch(4, an_entry(0, A, input=100), skip=True) == ["applied", 5, 1, 3, 0]
    assert fleet.batch(6, an_entry(0, A, input=1000)) == ["applied", 6, 1, 4, 0]
    assert fleet.service().input == 1011


def test_batches_are_numbered_per_worker_and_pool(new_pool: NewPool) -> None:
    one, other = Fleet(new_pool()), Fleet(new_pool())
    for fleet, worker in ((one, "w1"), (one, "w2"), (other, "w1")):
        assert fleet.batch(1, an_entry(0, A, input=5), worker=worker)[:2] == ["applied", 1]
    assert (one.service().input, other.service().input) == (10, 5)


def test_an_empty_batch_takes_its_number(fleet: Fleet) -> None:
    assert fleet.batch(1) == ["applied", 1, 1, 1, 0]
    assert fleet.batch(2, an_entry(0, A)) == ["applied", 2, 1, 2, 0]


def test_a_batch_may_be_large(fleet: Fleet) -> None:
    assert fleet.settle(*(an_entry(0, A, input=1) for _ in range(3_000))) == ["applied", 1, 1, 3_001, 0]
    assert (fleet.service().requests, fleet.service().input) == (3_000, 3_000)


@pytest.mark.parametrize(
    ("seen", "reply"),
    [
        ((1, 2), ["applied", 1, 1, 3, 0]),
        ((1, 12), ["applied", 1, 2, 14, 10]),
        ((4, 1), ["applied", 1, 5, 4, 0]),
    ],
)
def test_a_caller_that_has_seen_more_starts_an_epoch(fleet: Fleet, seen: tuple[int, int], reply: list[Any]) -> None:
    fleet.ask()
    assert fleet.settle(an_entry(1, A), seen=seen) == reply
    view = fleet.view()
    assert [view.epoch, view.position] == reply[2:4]


def test_a_settle_renews_the_lease(fleet: Fleet, client: Any) -> None:
    assert isinstance(fleet.pool, LuaPool)
    fleet.ask()
    for passed_ms in (20_000, 20_000):
        fleet.pass_ms(passed_ms)
        fleet.settle()
    leases = client.zrange(keys.leases(fleet.pool.name), 0, -1, withscores=True)
    assert leases == [(b"w1", NOW_MS + 40_000 + LEASE_MS)]
    assert fleet.reap("w1")[:3] == ["reaped", 0, 0]


def test_the_mark_of_a_batch_lies_with_its_usage(fleet: Fleet, client: Any) -> None:
    """A replica that lost the one has lost the other: what it is told again counts once."""
    assert isinstance(fleet.pool, LuaPool)
    names = list(pool_keys(fleet.pool.name, "w1").values())
    fleet.ask()
    fleet.batch(1, an_entry(1, A, input=5))
    replica = [client.dump(name) for name in names]
    fleet.ask()
    fleet.batch(2, an_entry(2, A, input=7))
    client.delete(*names)
    for name, value in zip(names, replica, strict=True):
        if value:
            client.restore(name, 3_600_000, value)
    assert fleet.batch(3, an_entry(0, A, input=100), seen=(1, 5)) == ["gap", 1]
    assert fleet.batch(2, an_entry(2, A, input=7), seen=(1, 5)) == ["applied", 2, 2, 7, 2]
    assert fleet.batch(3, an_entry(0, A, input=100), seen=(2, 7)) == ["applied", 3, 2, 8, 0]
    assert (fleet.service().in_flight, fleet.service().requests, fleet.service().input) == (0, 3, 112)


# -- abandoned ---------------------------------------------------------------------------------------------------------


def test_a_pick_abandoned_after_its_select_is_given_back_and_is_no_request(fleet: Fleet) -> None:
    fleet.ask(reserved=50)
    assert fleet.settle(an_abandoned(1)) == ["applied", 1, 1, 3, 0]
    assert fleet.service() == a_view(abandoned=1)


def test_a_name_abandoned_before_its_select_is_refused_when_it_arrives(fleet: Fleet) -> None:
    assert fleet.settle(an_abandoned(1)) == ["applied", 1, 1, 2, 0]
    assert fleet.ask(reserved=50) == [["abandoned"]]
    assert fleet.service() == ServiceView(windows=(WindowView(length_s=300, start_ms=0, requests=0, tokens=0),))


def test_abandoning_twice_counts_once(fleet: Fleet) -> None:
    fleet.ask(reserved=50)
    fleet.settle(an_abandoned(1), an_abandoned(1))
    assert fleet.service() == a_view(abandoned=1)


def test_tokens_beside_an_abandoned_name_do_not_count(fleet: Fleet) -> None:
    fleet.ask(reserved=50)
    fleet.settle(an_entry(1, "", Outcome.ABANDONED, input=5))
    assert fleet.service() == a_view(abandoned=1)


# -- after a reap ------------------------------------------------------------------------------------------------------


def test_usage_that_arrives_after_its_attempt_was_counted_as_lost_takes_that_back(fleet: Fleet) -> None:
    fleet.ask(reserved=50)
    fleet.pass_ms(LEASE_MS)
    fleet.reap("w1")
    assert fleet.service() == a_view(requests=1, lost=1, lost_tokens=50, tokens=50)
    fleet.settle(an_entry(1, A, input=11, output=7))
    assert fleet.service() == a_view(requests=1, input=11, output=7, tokens=18, last_used=NOW_MS + LEASE_MS)


def test_what_was_lost_in_a_window_that_has_tumbled_is_not_taken_from_the_next(fleet: Fleet) -> None:
    fleet.ask(reserved=50)
    fleet.pass_ms(LEASE_MS)
    fleet.reap("w1")
    fleet.pass_ms(300_000)
    fleet.settle(an_entry(0, A, input=60), worker="w2")
    fleet.settle(an_entry(1, A, input=5))
    assert fleet.windows() == [(300, 330_000, 0, 65)]


def test_a_lost_attempt_that_proves_abandoned_is_no_request(fleet: Fleet) -> None:
    fleet.ask(reserved=50)
    fleet.pass_ms(LEASE_MS)
    fleet.reap("w1")
    fleet.settle(an_abandoned(1))
    assert fleet.service() == a_view(abandoned=1)


def test_a_late_settle_is_taken_back_once(fleet: Fleet) -> None:
    fleet.ask(reserved=50)
    fleet.pass_ms(LEASE_MS)
    fleet.reap("w1")
    fleet.settle(an_entry(1, A, input=5))
    fleet.settle(an_entry(1, A, input=5))
    service = fleet.service()
    assert (service.requests, service.lost, service.lost_tokens, service.input) == (2, 0, 0, 10)


# -- what is refused ---------------------------------------------------------------------------------------------------

ENTRY: list[Any] = [2, A, "success", 0, [1, 2, 3, 4, 5], 6, 7, 8]
"""number, service, outcome, age_ms, usage, cooldown_ms, first_token_us, stream_us."""
NO_WHOLE_NUMBERS: tuple[Any, ...] = ("", "1", -1, 1.5, math.nan, math.inf, 2**53, True, None, [1])
NO_BOOLEANS: tuple[Any, ...] = (0, 1, "", None, [])


@pytest.fixture
def settle_raw(fleet: Fleet, client: Any) -> Callable[..., Any]:
    """Sends a second batch, which may be malformed, to a pool with something in every key."""
    assert isinstance(fleet.pool, LuaPool)
    fleet.pool.record = "full"
    fleet.ask(3, reserved=5)
    fleet.settle(an_entry(1, A, input=5), an_abandoned(90))
    names = pool_keys(fleet.pool.name, "w1")

    def send(numbers: dict[str, Any], *entries: Any) -> Any:
        (reply,) = evaluate_tick(client, names, {"batch": 2} | numbers, entries)
        return reply

    return send


def test_the_entry_of_the_cases_below_is_taken_when_it_is_not_malformed(settle_raw: Callable[..., Any]) -> None:
    usage = {"input": 1, "output": 2, "cached": 3, "cache_creation": 4, "reasoning": 5}
    entry = an_entry(2, A, Outcome.SUCCESS, **usage, cooldown_ms=6, first_token_us=7, stream_us=8)
    assert msgspec.json.decode(msgspec.json.encode(entry)) == ENTRY
    assert settle_raw({}, ENTRY)[:2] == ["applied", 2]


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name in ("now_ms", "epoch", "position") for value in NO_WHOLE_NUMBERS]
    + [(name, value) for name in ("lease_ms", "batch") for value in (*NO_WHOLE_NUMBERS, 0)]
    + [("skips", value) for value in NO_BOOLEANS],
)
def test_a_malformed_argument_is_refused_and_nothing_is_written(
    settle_raw: Callable[..., Any], client: Any, name: str, value: Any
) -> None:
    with refused(client, "tick"):
        settle_raw({name: value}, ENTRY)


@pytest.mark.parametrize(
    ("place", "value"),
    [(place, value) for place in (0, 3, 5, 6, 7) for value in NO_WHOLE_NUMBERS]
    + [(1, value) for value in ("", 1, True, None, [A])]
    + [(2, value) for value in ("", "finished", 1, None, ["success"])]
    + [(4, value) for value in (1, "12345", None, [], [1, 2, 3, 4])]
    + [(4, [*[0] * place, value, *[0] * (4 - place)]) for place in range(5) for value in NO_WHOLE_NUMBERS],
)
def test_a_malformed_entry_is_refused_with_all_others_of_its_batch(
    settle_raw: Callable[..., Any], client: Any, place: int, value: Any
) -> None:
    malformed = [3, *ENTRY[1:]]
    malformed[place] = value
    with refused(client, "tick"):
        settle_raw({"epoch": 9}, ENTRY, malformed)


@pytest.mark.parametrize("kept", range(8))
def test_an_entry_that_is_cut_short_is_refused(settle_raw: Callable[..., Any], client: Any, kept: int) -> None:
    with refused(client, "tick"):
        settle_raw({}, ENTRY, [3, *ENTRY[1:]][:kept])


@pytest.mark.parametrize("batch", [1, 3])
def test_a_malformed_entry_is_refused_in_a_batch_that_is_not_the_next_too(
    settle_raw: Callable[..., Any], client: Any, batch: int
) -> None:
    with refused(client, "tick"):
        settle_raw({"batch": batch}, [*ENTRY[:-1], "x"])


# -- a deadline is no ending -------------------------------------------------------------------------------------------


def test_a_settle_past_the_deadline_that_nobody_reaped_counts_as_usual(fleet: Fleet) -> None:
    fleet.select(a_selection(1, reserved=50))
    fleet.pass_ms(2 * DEADLINE_MS)
    fleet.settle(an_entry(1, A, input=5))
    assert fleet.service() == a_view(requests=1, input=5, tokens=5, last_used=NOW_MS + 2 * DEADLINE_MS)


def test_services_of_one_batch_are_counted_apart(fleet: Fleet) -> None:
    fleet.settle(an_entry(0, A, input=1), an_entry(0, B, input=10), an_entry(0, A, output=100))
    counted = {name: (s.requests, s.input, s.output) for name, s in fleet.view().services.items()}
    assert counted == {A: (2, 1, 100), B: (1, 10, 0)}
