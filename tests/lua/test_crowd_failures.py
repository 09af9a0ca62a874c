"""Crowds at limits and half-open breakers: clients with connections of their own, all at once, and what must hold."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import redis

from balancer import audit, stored
from balancer.domain import Outcome, RuleDefinition
from balancer.store import keys
from tests.lua.builders import (
    LEASE_MS,
    NOW_MS,
    A,
    B,
    C,
    Fleet,
    a_provider,
    a_rule,
    a_selection,
    a_service,
    an_abandoned,
    an_entry,
)
from tests.lua.pool import LuaPool
from tests.lua.stories import FAILED, REJECTED, SUCCESS, breaker, live

CLIENTS = 8
HOUR_MS = 3_600_000
Gather = Callable[..., tuple[Fleet, list["Member"]]]


class Member:
    """One of the crowd: a worker with a connection, at a time that the test gives."""

    def __init__(self, url: str, pool: str, number: int) -> None:
        self.redis: Any = redis.Redis.from_url(url)
        self.pool = LuaPool(self.redis, pool, record="full")
        self.worker = f"crowd-{number}"
        self.random = random.Random(number)
        self.number = 0
        self.batch = 0

    def ask(self, now_ms: int, count: int = 1, **selection: Any) -> list[tuple[int, list[Any]]]:
        """New selections in one call: each with its number."""
        first, self.number = self.number + 1, self.number + count
        asked = [a_selection(number, deadline_ms=HOUR_MS, **selection) for number in range(first, self.number + 1)]
        *answers, _ = self.pool.select(now_ms, self.worker, asked, LEASE_MS)
        return list(zip(range(first, self.number + 1), answers, strict=True))

    def end(self, now_ms: int, number: int, service: str, outcome: Outcome, **usage: int) -> None:
        entry = an_abandoned(number) if outcome is Outcome.ABANDONED else an_entry(number, service, outcome, **usage)
        self.batch += 1
        reply = self.pool.settle(now_ms, self.worker, self.batch, [entry], LEASE_MS)
        assert reply[:2] == ["applied", self.batch]


@pytest.fixture
def gather(server: str, new_pool: Callable[..., LuaPool]) -> Iterator[Gather]:
    """Makes a pool with these rules, and a crowd at it."""
    members: list[Member] = []

    def make(*rules: RuleDefinition) -> tuple[Fleet, list[Member]]:
        pool = new_pool(record="full")
        fleet = Fleet(pool)
        fleet.fence(*rules)
        members.extend(Member(server, pool.name, number) for number in range(CLIENTS))
        return fleet, members

    yield make
    for member in members:
        member.redis.close()


def together(tasks: list[Callable[[], Any]]) -> list[Any]:
    """Runs all tasks at once, each in a thread that waits for the others; their results, or the first failure."""
    start = threading.Barrier(len(tasks))

    def run(task: Callable[[], Any]) -> Any:
        start.wait(30)
        return task()

    with ThreadPoolExecutor(len(tasks)) as threads:
        return [future.result(timeout=60) for future in [threads.submit(run, task) for task in tasks]]


def picked(results: list[list[tuple[int, list[Any]]]], *, service: str = "") -> list[list[Any]]:
    """All picks, of one service or of any."""
    answers = [answer for result in results for _, answer in result]
    return [answer for answer in answers if answer[0] == "pick" and service in ("", answer[1])]


def account(fleet: Fleet) -> audit.Verdict:
    """What the auditor says of the whole history."""
    assert isinstance(fleet.pool, LuaPool)
    entries = fleet.pool.client.xrange(keys.decisions(fleet.pool.name))
    return audit.check([{k.decode(): v.decode() for k, v in fields.items()} for _, fields in entries])


@pytest.mark.parametrize("kind", ["service", "provider"])
def test_a_crowd_gets_no_more_requests_a_minute_than_the_limit(gather: Gather, kind: str) -> None:
    if kind == "service":
        rule = a_rule(services=[a_service(A, rpm=100), B], requests=3)
    else:
        rule = a_rule(services=["a:1", "a:2", B], requests=1, providers=[a_provider("a", rpm=100)])
    fleet, members = gather(rule)
    results = together([partial(member.ask, NOW_MS + 600 * i, 40) for i, member in enumerate(members)])
    results += together([partial(member.ask, NOW_MS + 9_000, 40) for member in members])
    picks = picked(results)
    assert len(picks) == 2 * 40 * CLIENTS, "B takes the rest"
    assert sum(answer[1].startswith("a:") for answer in picks) == 100
    assert account(fleet).violations == []


def test_a_crowd_has_no_more_in_flight_than_the_limit_at_any_position(gather: Gather) -> None:
    limit = 5
    fleet, members = gather(a_rule(services=[a_service(A, in_flight=limit)]))
    endings = (SUCCESS, FAILED, REJECTED, Outcome.ABANDONED)

    def work(member: Member) -> int:
        made = 0
        for _ in range(40):
            for number, answer in member.ask(NOW_MS, member.random.choice((1, 2, 4))):
                if answer[0] == "pick":
                    made += 1
                    assert 0 < fleet_in_flight(member) <= limit
                    member.end(NOW_MS, number, A, member.random.choice(endings))
        return made

    def fleet_in_flight(member: Member) -> int:
        text: bytes = member.redis.hget(keys.services(member.pool.name), f"service:{A}")
        return stored.service(text.decode()).counters["in_flight"]

    assert sum(together([partial(work, member) for member in members])) > 100
    service = fleet.service()
    assert (service.in_flight, service.reserved) == (0, 0)
    assert account(fleet).violations == []


def test_a_crowd_holds_no_more_tokens_than_the_limit(gather: Gather) -> None:
    fleet, members = gather(a_rule(services=[a_service(A, tpm=10_000), B], requests=1))
    results = together([partial(member.ask, NOW_MS, 20, reserved=300) for member in members])
    assert len(picked(results, service=A)) == 33
    assert fleet.service().reserved == 9_900

    def end(member: Member, result: list[tuple[int, list[Any]]]) -> None:
        for number, answer in result:
            member.end(NOW_MS + 5_000, number, answer[1], SUCCESS, input=100, output=100)

    together([partial(end, member, result) for member, result in zip(members, results, strict=True)])
    again = together([partial(member.ask, NOW_MS + 6_000, 20, reserved=300) for member in members])
    assert len(picked(again, service=A)) == (10_000 - 33 * 200) // 300
    assert account(fleet).violations == []


@pytest.mark.parametrize("ending", ["reap", "abandon", "rejected"])
def test_a_crowd_at_a_half_open_breaker_makes_one_probe_at_a_time(gather: Gather, ending: str) -> None:
    breakers = [a_provider("a", failures=3, open_ms=1_000, successes=3)]
    fleet, members = gather(a_rule(services=[A, B, C], requests=2, providers=breakers))
    live(fleet, "fff")
    now_ms = NOW_MS + 1_200
    for _ in range(4):
        results = together([partial(member.ask, now_ms, 16) for member in members])
        probes = [
            (member, number)
            for member, result in zip(members, results, strict=True)
            for number, answer in result
            if answer[:3] == ["pick", A, "probe"]
        ]
        ((prober, number),) = probes
        assert len(picked(results, service=A)) == 1
        if ending == "reap":
            now_ms += LEASE_MS
            together([partial(reap, member, now_ms, prober.worker) for member in members if member is not prober])
        else:
            prober.end(now_ms, number, A, Outcome.ABANDONED if ending == "abandon" else REJECTED)
        assert (breaker(fleet).state, breaker(fleet).probe) == (1, 0)
    assert account(fleet).violations == []


def reap(member: Member, now_ms: int, target: str) -> None:
    assert member.pool.reap(now_ms, member.worker, target, LEASE_MS)[0] == "reaped"


def test_a_crowd_closes_a_breaker_with_three_probes_in_turn(gather: Gather) -> None:
    breakers = [a_provider("a", failures=3, open_ms=1_000, successes=3)]
    fleet, members = gather(a_rule(services=[A, B], requests=1, providers=breakers))
    live(fleet, "fff")
    now_ms = NOW_MS + 1_200

    def work(member: Member) -> list[int]:
        """The positions of its probes, and below zero of the first pick of A that was none."""
        seen = []
        for _ in range(60):
            ((number, answer),) = member.ask(now_ms)
            if answer[1] == A:
                seen.append(answer[5] if answer[2] == "probe" else -answer[5])
                member.end(now_ms, number, A, SUCCESS)
                if answer[2] != "probe":
                    break
        return seen

    seen = [position for positions in together([partial(work, member) for member in members]) for position in positions]
    probes, others = [p for p in seen if p > 0], [-p for p in seen if p < 0]
    assert len(probes) == 3
    assert others
    assert max(probes) < min(others), "nothing but probes before it closed"
    assert breaker(fleet).state == 0
    assert account(fleet).violations == []


def test_a_crowd_opens_a_breaker_once(gather: Gather) -> None:
    breakers = [a_provider("a", failures=3, open_ms=HOUR_MS)]
    fleet, members = gather(a_rule(services=[A, B], requests=1, providers=breakers))

    def work(member: Member) -> None:
        for number, answer in member.ask(NOW_MS, 9):
            member.end(NOW_MS, number, answer[1], FAILED if answer[1] == A else SUCCESS)

    together([partial(work, member) for member in members])
    assert (breaker(fleet).state, breaker(fleet).opens) == (1, 1)
    assert account(fleet).violations == []


def test_a_crowd_retries_no_more_than_its_rules_budget(gather: Gather) -> None:
    fleet, members = gather(a_rule(services=[A, B], retry_permille=200))
    together([partial(member.ask, NOW_MS, 60, excluded=[A]) for member in members])
    together([partial(member.ask, NOW_MS, 25) for member in members])
    results = together([partial(member.ask, NOW_MS, 60, excluded=[A]) for member in members])
    assert len(picked(results)) == 25 * CLIENTS // 5
    assert account(fleet).violations == []


def test_a_crowd_of_one_session_stays_together(gather: Gather) -> None:
    session: dict[str, Any] = {"session": "s", "affinity_ms": HOUR_MS}
    fleet, members = gather(a_rule("random", [A, B, C]))
    results = together([partial(member.ask, NOW_MS, 8, draw=2**29 * i, **session) for i, member in enumerate(members)])
    assert len({answer[1] for answer in picked(results)}) == 1
    assert [answer[2] for answer in picked(results)].count("draw") == 1
    assert account(fleet).violations == []
