"""What an active check says of services: it opens their breakers, and closes them without a request's risk."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from balancer.store import keys
from balancer.store.views import BreakerView
from tests.lua.builders import (
    NOW_MS,
    A,
    B,
    C,
    Fleet,
    a_provider,
    a_rule,
    an_entry,
    evaluate,
    pool_keys,
    refused,
)
from tests.lua.pool import LuaPool
from tests.lua.stories import FAILED, breaker, broken, chosen, end, live, pinned, place

OPEN_MS = 10_000
LONGEST_MS = OPEN_MS * 6 // 5
CLOSED = BreakerView()
BREAKERS = [a_provider(uuid, failures=3, open_ms=OPEN_MS, successes=2) for uuid in "abc"]
ALIVE, DEAD = True, False


@pytest.fixture(autouse=True)
def rule(fleet: Fleet) -> None:
    fleet.fence(a_rule(requests=9, providers=BREAKERS))


def note(fleet: Fleet, is_alive: bool, *services: str, seen: tuple[int, int] = (0, 0)) -> Any:
    return fleet.pool.health(fleet.now_ms, services or (A,), is_alive, seen)


def half_open(fleet: Fleet) -> None:
    live(fleet, "fff")
    fleet.pass_ms(LONGEST_MS)


def test_each_service_noted_takes_a_place_in_the_history(fleet: Fleet) -> None:
    at = place(fleet)
    assert note(fleet, ALIVE, A, B, "unknown:m") == ["noted", 3, 1, at + 3, 0]
    assert note(fleet, DEAD, A) == ["noted", 1, 1, at + 4, 0]


def test_no_services_are_no_change(fleet: Fleet) -> None:
    at = place(fleet)
    assert fleet.pool.health(fleet.now_ms, [], ALIVE) == ["noted", 0, 1, at, 0]


def test_three_dead_in_a_row_open_a_breaker_and_sessions_leave(fleet: Fleet) -> None:
    session: dict[str, Any] = {"session": "s", "affinity_ms": 3_600_000}
    assert chosen(fleet, **session)[0] == A
    for consecutive in (1, 2):
        note(fleet, DEAD)
        assert breaker(fleet) == BreakerView(consecutive=consecutive)
    note(fleet, DEAD)
    opened = breaker(fleet)
    assert (opened.state, opened.opens) == (1, 1)
    assert OPEN_MS <= opened.until_ms - fleet.now_ms < LONGEST_MS
    assert broken(fleet) == f"{opened.until_ms} {A}\n"
    assert chosen(fleet, **session)[0] == B
    assert pinned(fleet) == B


@pytest.mark.parametrize("order", ["dff", "fdf", "ffd", "ddf"])
def test_dead_and_failed_add_up(fleet: Fleet, order: str) -> None:
    for letter in order:
        if letter == "d":
            note(fleet, DEAD)
        else:
            live(fleet, letter)
    assert breaker(fleet).state == 1


def test_alive_is_no_success_while_requests_fail(fleet: Fleet) -> None:
    """An account that is out of credit answers its check, and nothing else."""
    live(fleet, "ff")
    note(fleet, ALIVE)
    assert breaker(fleet).consecutive == 2
    live(fleet, "f")
    assert breaker(fleet).state == 1


def test_a_success_of_a_request_ends_a_row_of_dead(fleet: Fleet) -> None:
    note(fleet, DEAD)
    note(fleet, DEAD)
    live(fleet, "s")
    note(fleet, DEAD)
    note(fleet, DEAD)
    assert breaker(fleet).state == 0


def test_dead_counts_in_no_window(fleet: Fleet) -> None:
    ratio = [a_provider("a", ratio_permille=500, min_requests=2)]
    fleet.fence(a_rule(revision=2, providers=ratio))
    for _ in range(9):
        note(fleet, DEAD)
    assert (breaker(fleet).state, breaker(fleet).requests, breaker(fleet).failed) == (0, 0, 0)


@pytest.mark.parametrize("is_alive", [ALIVE, DEAD])
def test_while_a_breaker_is_open_nothing_is_noted(fleet: Fleet, is_alive: bool) -> None:
    live(fleet, "fff")
    opened = breaker(fleet)
    fleet.pass_ms(opened.until_ms - fleet.now_ms - 1)
    note(fleet, is_alive)
    assert breaker(fleet) == opened


def test_enough_alive_close_a_breaker_that_is_half_open(fleet: Fleet) -> None:
    half_open(fleet)
    note(fleet, ALIVE)
    assert (breaker(fleet).state, breaker(fleet).successes) == (1, 1)
    note(fleet, ALIVE)
    assert (breaker(fleet), broken(fleet)) == (CLOSED, "")
    assert chosen(fleet)[0] == A


def test_checks_and_probes_add_up(fleet: Fleet) -> None:
    half_open(fleet)
    note(fleet, ALIVE)
    assert chosen(fleet) == (A, "probe")
    end(fleet, A)
    assert breaker(fleet) == CLOSED


@pytest.mark.parametrize("is_alive", [ALIVE, DEAD])
def test_while_a_probe_is_out_nothing_is_noted(fleet: Fleet, is_alive: bool) -> None:
    half_open(fleet)
    assert chosen(fleet) == (A, "probe")
    probing = breaker(fleet)
    note(fleet, is_alive)
    assert breaker(fleet) == probing


def test_dead_opens_a_half_open_breaker_for_longer(fleet: Fleet) -> None:
    half_open(fleet)
    note(fleet, ALIVE)
    note(fleet, DEAD)
    opened = breaker(fleet)
    assert (opened.state, opened.opens, opened.successes) == (1, 2, 0)
    assert 2 * OPEN_MS <= opened.until_ms - fleet.now_ms < 2 * LONGEST_MS
    assert broken(fleet) == f"{opened.until_ms} {A}\n"
    assert chosen(fleet)[0] == B


@pytest.mark.parametrize("providers", [[], [a_provider()]])
@pytest.mark.parametrize("is_alive", [ALIVE, DEAD])
def test_services_without_a_breaker_are_noted_without_effect(
    fleet: Fleet, providers: Sequence[Any], is_alive: bool
) -> None:
    fleet.fence(a_rule(services=["z:m"], rule="other", providers=providers))
    for _ in range(5):
        note(fleet, is_alive, "z:m")
    assert breaker(fleet, "z:m") == CLOSED


def test_each_service_named_is_noted_apart_and_one_named_twice_twice(fleet: Fleet) -> None:
    live(fleet, "ff", B)
    note(fleet, DEAD, A, B, A, C)
    assert [breaker(fleet, service).consecutive for service in (A, C)] == [2, 1]
    assert breaker(fleet, B).state == 1


def test_a_caller_that_has_seen_more_starts_an_epoch(fleet: Fleet) -> None:
    at = place(fleet)
    assert note(fleet, ALIVE, seen=(1, at + 10)) == ["noted", 1, 2, at + 12, 10]


def test_a_check_moves_no_counters(fleet: Fleet) -> None:
    fleet.ask(2, reserved=5)
    at = place(fleet)
    note(fleet, DEAD)
    fleet.settle(an_entry(1, A, FAILED), an_entry(2, A))
    assert place(fleet) == at + 3
    if isinstance(fleet.pool, LuaPool):
        service = fleet.service()
        assert (service.requests, service.failures, service.in_flight, service.reserved) == (2, 1, 0, 0)


# -- what is refused ---------------------------------------------------------------------------------------------------

ARGUMENTS: dict[str, str | int] = {"now_ms": NOW_MS, "epoch": 0, "position": 0, "is_alive": 0}
NO_WHOLE_NUMBERS = ("", "x", "-1", "1.5", "nan", "inf", "9007199254740992")


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name in ("now_ms", "epoch", "position") for value in NO_WHOLE_NUMBERS]
    + [("is_alive", value) for value in ("", "x", "-1", "2", "01", "true")],
)
def test_a_malformed_argument_is_refused_and_nothing_is_written(
    fleet: Fleet, client: Any, name: str, value: str
) -> None:
    if isinstance(fleet.pool, LuaPool):
        fleet.pool.record = "full"
        fleet.ask()
        names = {key: at for key, at in pool_keys(fleet.pool.name, "").items() if key not in ("holdings", "leases")}
        assert evaluate(client, "health", names, ARGUMENTS, [A])[:2] == ["noted", 1]
        with refused(client, "health"):
            evaluate(client, "health", names, ARGUMENTS | {name: value}, [A])


def test_an_empty_id_is_refused_and_nothing_is_written(fleet: Fleet, client: Any) -> None:
    if isinstance(fleet.pool, LuaPool):
        assert client.exists(keys.services(fleet.pool.name))
        with refused(client, "health"):
            note(fleet, DEAD, A, "")
