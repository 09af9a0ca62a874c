"""A worker alone, by what it has seen: cursors, use, limits, breakers, sessions. No server, and a clock of ours."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from balancer.domain import Entry, Limits, Outcome, Pick, Retry, Rule, Selection, Usage
from balancer.errors import StoreUnavailableError
from balancer.reference import Reply
from balancer.store import keys, local
from balancer.store.local import LocalPool, Picture
from balancer.store.registry import Directory, Snapshot, directory_of
from balancer.tactics import RoundRobin, TokenBased
from tests.builders import a_configuration, a_provider, a_rule, a_service

NOW_MS = 1_700_000_000_000
AWAY = StoreUnavailableError("Redis is away")


class Alone:
    """A worker with a directory, what Redis has told it, and its picks without."""

    def __init__(self, *rules: Rule, **more: Any) -> None:
        self.now_s = 100.0
        self.pool = LocalPool("default", "w", clock=lambda: self.now_s, wall=lambda: NOW_MS / 1000 + self.now_s)
        self._numbers = itertools.count(1)
        self._revision = 0
        self.directory: Directory
        self.publish(*rules, **more)

    def publish(self, *rules: Rule, **more: Any) -> None:
        """A new configuration is known to the worker."""
        self._revision += 1
        self.directory = directory_of(Snapshot(revision=self._revision, configuration=a_configuration(*rules, **more)))

    def selection(self, rule: str = "chat", session: str = "", **more: Any) -> Selection:
        return Selection(
            number=next(self._numbers),
            rule=rule,
            partition=keys.partition(rule),
            revision=self._revision,
            deadline_ms=60_000,
            session=session,
            affinity_ms=60_000 if session else 0,
            **more,
        )

    def redis_picks(self, service: str, position: int = 1, streak: int = 1, **more: Any) -> int:
        """Redis has made a pick for this worker; its number."""
        reason = more.pop("reason", "streak")
        selection = self.selection(**more)
        pick = Pick(
            pool="default",
            rule=selection.rule,
            partition=selection.partition,
            revision=selection.revision,
            number=selection.number,
            service=service,
            reason=reason,
            seq=position,
            epoch=1,
            position=position,
            streak=streak,
            is_switch=False,
            reserved=selection.reserved,
        )
        self.pool.picked(pick, selection)
        return selection.number

    def ask(self, rule: str = "chat", **more: Any) -> tuple[int, Reply]:
        selection = self.selection(rule, **more)
        answer = self.pool.select(self.directory, self.directory.by_uuid[rule], selection, AWAY)
        return selection.number, answer

    def picks(self, count: int = 1, **more: Any) -> list[str]:
        """The services of so many picks, or the words of why there is none."""
        return [str(self.ask(**more)[1][1]) for _ in range(count)]

    def settle(self, number: int, service: str, outcome: Outcome = Outcome.SUCCESS, **more: Any) -> None:
        self.pool.settled(Entry(number=number, service=service, outcome=outcome, **more))

    def picture(
        self, position: int = 1, *, cursor: str = "", streak: int = 0, budget: int = -1, **services: str
    ) -> None:
        """A look at the pool: the rule's cursor and budget, and services' texts by id, with `_` for the colon in it."""
        partitions = {
            b"partition:|chat": f"{streak} -1 0\n{cursor}\n\n".encode(),
            b"rule:chat": f"1 0 200 {budget}".encode(),
        }
        fields = {f"service:{id_.replace('_', ':')}".encode(): text.encode() for id_, text in services.items()}
        fields[b"place"] = f"1 {position} 0".encode()
        self.pool.pictured(Picture(partitions=partitions, services=fields, now_ms=NOW_MS, taken_at=self.now_s))


# -- cursors and streaks -----------------------------------------------------------------------------------------------


def test_it_goes_on_from_the_cursor_and_the_streak_of_its_last_pick() -> None:
    worker = Alone(a_rule(services=("a:m", "b:m", "c:m"), lb_tactic=RoundRobin(request_threshold=4)))
    worker.redis_picks("b:m", position=6, streak=2)
    assert worker.picks(7) == ["b:m", "b:m", "c:m", "c:m", "c:m", "c:m", "a:m"]


def test_a_picture_is_believed_where_it_is_newer_and_the_last_pick_where_that_is() -> None:
    rule = a_rule(services=("a:m", "b:m", "c:m"), lb_tactic=RoundRobin(request_threshold=3))
    worker = Alone(rule)
    worker.redis_picks("b:m", position=6)
    worker.picture(position=9, cursor="c:m", streak=2)
    assert worker.picks(2) == ["c:m", "a:m"]
    worker.redis_picks("b:m", position=10, streak=3)
    worker.picture(position=9, cursor="c:m", streak=2)
    assert worker.picks() == ["c:m"]


def test_picks_beside_the_tactic_do_not_tell_where_the_cursor_is() -> None:
    worker = Alone(a_rule(services=("a:m", "b:m", "c:m"), lb_tactic=RoundRobin(request_threshold=3)))
    worker.redis_picks("a:m", position=3, streak=1)
    for position, reason in enumerate(("pinned", "probe", "exhausted", "retry"), start=4):
        worker.redis_picks("b:m", position=position, reason=reason)
    assert worker.picks(3) == ["a:m", "a:m", "b:m"]


def test_a_worker_that_has_seen_nothing_begins_with_the_first_service() -> None:
    worker = Alone(a_rule(lb_tactic=RoundRobin(request_threshold=2)))
    assert worker.picks(3) == ["a:m", "a:m", "b:m"]


def test_a_cursor_that_has_left_the_rule_is_none() -> None:
    worker = Alone(a_rule())
    worker.redis_picks("gone:m", position=6)
    assert worker.picks() == ["a:m"]


def test_an_edit_is_followed_while_redis_is_away() -> None:
    worker = Alone(a_rule(services=("a:m", "b:m"), lb_tactic=RoundRobin(request_threshold=9)))
    worker.redis_picks("b:m", streak=2)
    assert worker.ask()[1][1:3] == ["b:m", "streak"]
    worker.publish(a_rule(services=("c:m", "b:m"), lb_tactic=RoundRobin(request_threshold=4)))
    assert worker.picks(2) == ["b:m", "b:m"]
    worker.publish(a_rule(services=("c:m",)))
    assert worker.picks() == ["c:m"]


def test_once_redis_picks_again_its_cursor_stands() -> None:
    worker = Alone(a_rule(services=("a:m", "b:m", "c:m"), lb_tactic=RoundRobin(request_threshold=2)))
    assert worker.picks(3) == ["a:m", "a:m", "b:m"]
    was_alone = worker.pool.is_alone
    worker.redis_picks("c:m", position=70, streak=1)
    assert (was_alone, worker.pool.is_alone) == (True, False)
    assert worker.picks(2) == ["c:m", "a:m"]


def test_an_outage_that_comes_and_goes_is_told_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
    worker = Alone(a_rule())
    for position in range(1, 41):
        worker.picks()
        worker.redis_picks("a:m", position=position)
        worker.now_s += 0.5
    lines = [record.getMessage() for record in caplog.records]
    assert lines == ["picking without Redis", "Redis picks again"] * 2


# -- what was used -----------------------------------------------------------------------------------------------------


def test_windows_go_on_from_the_picture_and_what_was_used_since() -> None:
    worker = Alone(a_rule(lb_tactic=TokenBased(token_threshold=1000)))
    worker.picture(cursor="a:m", streak=1, a_m=f"0 0 0 0 0 0 0|300 {NOW_MS - 9000} 4 700 0||")
    worker.settle(worker.redis_picks("a:m", position=2, streak=2), "a:m", usage=Usage(input=200))
    assert worker.picks() == ["a:m"]
    number, answer = worker.ask()
    worker.settle(number, str(answer[1]), usage=Usage(input=60, output=40))
    assert worker.picks() == ["b:m"]


def test_a_window_ends_by_the_servers_clock() -> None:
    worker = Alone(a_rule(lb_tactic=TokenBased(token_threshold=1000)))
    worker.picture(cursor="a:m", streak=1, a_m=f"0 0 0 0 0 0 0|300 {NOW_MS - 290_000} 4 1700 0||")
    worker.now_s += 9.9
    assert worker.pool.now_ms() == NOW_MS + 9900
    assert worker.picks() == ["b:m"]
    worker = Alone(a_rule(lb_tactic=TokenBased(token_threshold=1000)))
    worker.picture(cursor="a:m", streak=1, a_m=f"0 0 0 0 0 0 0|300 {NOW_MS - 290_000} 4 1700 0||")
    worker.now_s += 10
    assert worker.picks() == ["a:m"]


def test_a_picture_replaces_what_was_kept_beside_the_last_one() -> None:
    worker = Alone(a_rule(lb_tactic=TokenBased(token_threshold=1000)))
    worker.settle(worker.redis_picks("a:m"), "a:m", usage=Usage(input=900))
    worker.picture(cursor="a:m", streak=1, a_m=f"0 0 0 0 0 0 0|300 {NOW_MS} 1 900 0||")
    assert worker.picks() == ["a:m"]


# -- limits ------------------------------------------------------------------------------------------------------------


def limited(*ids: str, **limits: Any) -> Rule:
    return a_rule(services=tuple(a_service(id_, limits=Limits(**limits)) for id_ in ids or ("a:m",)))


@pytest.mark.parametrize(("workers", "most"), [(1, 10), (3, 3), (4, 2), (10, 1), (11, 0)])
def test_a_worker_uses_its_part_of_a_limit_rounded_down(workers: int, most: int) -> None:
    alone = Alone(limited(rpm=10))
    alone.pool.saw_workers(workers)
    assert alone.picks(most + 2) == ["a:m"] * most + ["limited"] * 2


def test_a_providers_limits_are_divided_likewise() -> None:
    rule = a_rule(services=("a:m", "a:n"), lb_tactic=RoundRobin(request_threshold=1))
    alone = Alone(rule, providers=(a_provider("a", limits=Limits(in_flight=5)),))
    alone.pool.saw_workers(2)
    assert alone.picks(3) == ["a:m", "a:n", "limited"]


def test_of_what_the_fleet_has_used_a_worker_counts_its_part_and_of_its_own_all() -> None:
    alone = Alone(limited(rpm=20))
    alone.pool.saw_workers(2)
    alone.picture(a_m=f"0 0 0 0 0 0 0||0 0 {NOW_MS // 5000 - 1} 7 0|", cursor="a:m", streak=1)
    alone.redis_picks("a:m", position=2)
    assert alone.picks(6) == ["a:m"] * 5 + ["limited"]
    alone.now_s += 60
    assert alone.picks(6) == ["a:m"] * 4 + ["limited"] * 2
    alone.now_s += 70
    assert alone.picks(11) == ["a:m"] * 10 + ["limited"]


def test_what_redis_picked_before_the_loss_is_in_flight_until_it_is_settled() -> None:
    alone = Alone(limited(in_flight=2))
    number = alone.redis_picks("a:m")
    assert alone.picks(2) == ["a:m", "limited"]
    alone.settle(number, "a:m")
    assert alone.picks(2) == ["a:m", "limited"]


def test_what_was_picked_alone_is_in_flight_in_the_next_outage_too() -> None:
    alone = Alone(limited(in_flight=2))
    number, _ = alone.ask()
    alone.settle(alone.redis_picks("a:m"), "a:m")
    assert alone.picks(2) == ["a:m", "limited"]
    alone.settle(number, "a:m")
    assert alone.picks() == ["a:m"]


def test_reserved_tokens_count_against_the_limit() -> None:
    alone = Alone(limited(tpm=100))
    number = alone.redis_picks("a:m", reserved=50)
    assert alone.picks(2, reserved=30) == ["a:m", "limited"]
    alone.settle(number, "a:m", usage=Usage(input=10))
    assert alone.picks(2, reserved=60) == ["a:m", "limited"]


def test_what_cannot_serve_a_request_is_no_candidate_alone_either() -> None:
    alone = Alone(a_rule(services=("a:m", "b:m"), retry=Retry(budget_ratio=0)))
    assert alone.picks(3, barred=("a:m",)) == ["b:m"] * 3


def test_the_retry_budget_is_divided_too() -> None:
    alone = Alone(a_rule(services=("a:m", "b:m"), retry=Retry(budget_ratio=0.1)))
    alone.pool.saw_workers(4)
    alone.picture(budget=9999)
    assert alone.picks(3, excluded=("a:m",)) == ["b:m", "b:m", "budget"]


def test_as_many_workers_as_were_alive_lately_share_though_all_leases_have_ended_in_an_outage() -> None:
    pool = Alone(a_rule()).pool
    assert pool.workers == 1
    for count in (3, 4, 1, 0):
        pool.saw_workers(count)
    assert pool.workers == 4
    for _ in range(20):
        pool.saw_workers(2)
    assert pool.workers == 2


# -- breakers and cooldowns --------------------------------------------------------------------------------------------


def test_a_breaker_opens_and_lets_a_probe_through_without_redis() -> None:
    alone = Alone(a_rule(lb_tactic=RoundRobin(request_threshold=10)))
    for _ in range(3):
        number, answer = alone.ask()
        assert answer[1] == "a:m"
        alone.settle(number, "a:m", Outcome.FAILED)
    assert alone.picks(2) == ["b:m", "b:m"]
    alone.now_s += 60
    assert [alone.ask()[1][1:3] for _ in range(2)] == [["a:m", "probe"], ["b:m", "streak"]]


def test_a_breaker_that_was_open_is_open_and_a_probe_of_somebody_else_is_not_waited_for() -> None:
    opened = f"1 0 0 0 0 1 0 {NOW_MS + 5000} 44"
    alone = Alone(a_rule())
    alone.picture(a_m=f"0 0 0 0 0 0 0|||{opened}", cursor="a:m", streak=1)
    assert alone.picks() == ["b:m"]
    alone.now_s += 6
    assert alone.ask()[1][1:3] == ["a:m", "probe"]


def test_a_service_that_asked_for_quiet_gets_it() -> None:
    alone = Alone(a_rule(services=("a:m", "b:m", "c:m"), lb_tactic=RoundRobin(request_threshold=9)))
    alone.picture(c_m=f"0 0 0 {NOW_MS + 5000} 0 0 0|||")
    alone.settle(alone.redis_picks("a:m"), "a:m", Outcome.RATE_LIMITED, cooldown_ms=20_000)
    assert alone.picks() == ["b:m"]
    number, _ = alone.ask()
    alone.settle(number, "b:m", Outcome.RATE_LIMITED, cooldown_ms=20_000)
    alone.now_s += 6
    assert alone.picks() == ["c:m"]


# -- sessions and single services --------------------------------------------------------------------------------------


def test_a_session_stays_where_it_was_last_seen_and_where_it_was_put() -> None:
    alone = Alone(a_rule(services=("a:m", "b:m"), lb_tactic=RoundRobin(request_threshold=1)))
    alone.redis_picks("b:m", session="x", reason="pinned")
    assert alone.picks(3, session="x") == ["b:m"] * 3
    first = alone.picks(session="y")
    assert alone.picks(3, session="y") == first * 3
    alone.now_s += 61
    assert alone.ask(session="x")[1][2] != "pinned"


def test_a_session_leaves_a_service_that_is_gone() -> None:
    alone = Alone(a_rule(services=("a:m", "b:m")))
    alone.redis_picks("b:m", session="x")
    assert alone.ask(session="x")[1][1:3] == ["b:m", "pinned"]
    alone.publish(a_rule(services=("a:m",)))
    assert alone.picks(session="x") == ["a:m"]
    alone.publish(a_rule(services=("a:m", "b:m")))
    assert alone.ask(session="x")[1][1:3] == ["a:m", "pinned"]


def test_sessions_that_were_not_asked_for_longest_are_forgotten_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "_MOST_PINS", 2)
    alone = Alone(a_rule(services=("a:m", "b:m"), lb_tactic=RoundRobin(request_threshold=100)))
    for session in ("x", "y", "x", "z"):
        alone.redis_picks("b:m", session=session, reason="pinned")
    assert [alone.ask(session=session)[1][2] for session in ("x", "z", "y")] == ["pinned", "pinned", "streak"]


def test_one_service_alone_may_be_asked_for() -> None:
    alone = Alone(a_rule(services=("a:m", a_service("b:m", active=False))))
    assert alone.ask(only="a:m")[1][1:3] == ["a:m", "pinned"]
    assert alone.ask(only="b:m")[1][:2] == ["none", "inactive"]
    assert alone.ask(only="c:m")[1][:2] == ["none", "inactive"]
