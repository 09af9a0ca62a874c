"""A small run of the chaos, and what its judge and its books make of errors and attempts that nothing explains."""

from __future__ import annotations

import asyncio
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import pytest

from balancer.store.views import PoolView, ServiceView
from benchmarks.chaos import books
from benchmarks.chaos.account import Attempt, Storm
from benchmarks.chaos.causes import Cause, Fault, FaultKind, Judge, RetryBudget, by_request
from benchmarks.chaos.client import Answer, Ask, End

ROOT = Path(__file__).resolve().parent.parent.parent
SERVICE = "anna-openai:chat"


async def test_a_short_chaos_leaves_no_error_without_a_cause_and_every_token_counted() -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "benchmarks.chaos", "--store", "standalone", "--seed", "3", "--overlap-only"),
        *("--calm", "3", "--lasts", "1", "--pause", "1", "--overlap", "15", "--every", "1.2", "--rest", "2"),
        cwd=ROOT,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        async with asyncio.timeout(110):
            out, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.terminate()
            await process.wait()
    text = out.decode()
    assert process.returncode == 0, text
    assert re.search(r"^\d{3,} requests, \d{2,} errors with a cause, 0 without: STANDS$", text, re.M), text
    assert "every attempt and token is counted once" in text
    for kind in (FaultKind.KILL_WORKER, FaultKind.KILL_STORE, FaultKind.STALL_STORE, Storm.STALL_STREAM):
        assert f"{kind} " in text


# -- the judge ---------------------------------------------------------------------------------------------------------


def an_answer(end: End, **more: Any) -> Answer:
    """The end of a request that was under way from 10 to 12, at worker 7."""
    ask = Ask(request_id="r1", rule=more.pop("rule", "chat"), style="openai", is_stream=True)
    return Answer(**{"ask": ask, "began": 10.0, "ended": 12.0, "first": 0.0, "end": end, "pid": 7, **more})


def an_attempt(storm: Storm = Storm.NONE, at: float = 10.5, serial: int = 1) -> Attempt:
    return Attempt(serial, "r1", SERVICE, at, storm)


def a_judge(
    faults: list[Fault], attempts: tuple[Attempt, ...] = (), most_attempts: int = 1, has_budget: bool = True
) -> Judge:
    return Judge(
        faults,
        by_request(attempts),
        closed_rules=frozenset({"strict"}),
        limited_rules=frozenset({"few"}),
        most_attempts=most_attempts,
        accounts=("anna", "boris"),
        has_budget=lambda rule, at: has_budget,
        serving_since={7: 1.0},
        store_grace_s=1.0,
        recovery_s=5.0,
    )


def judged(
    answer: Answer,
    faults: list[Fault],
    attempts: tuple[Attempt, ...] = (),
    most_attempts: int = 1,
    has_budget: bool = True,
) -> str:
    return str(a_judge(faults, attempts, most_attempts, has_budget).cause(answer) or "none")


BROKEN = an_answer(End.BROKEN)
CUT = an_answer(End.CUT, status=200, service=SERVICE)
FAILED = an_answer(End.ERROR, status=500, code="api_error", message="anna is told to fail")
CLOSED = an_answer(End.ERROR, status=503, code="store_unavailable", message="Redis is away", rule="strict")
LIMITED = an_answer(End.ERROR, status=429, code="rate_limit_exceeded", rule="few")


@pytest.mark.parametrize(
    ("answer", "fault", "storm", "cause"),
    [
        (BROKEN, Fault(FaultKind.KILL_WORKER, "7", 11.0, 11.0), Storm.NONE, Cause.WORKER_KILLED),
        (BROKEN, Fault(FaultKind.KILL_WORKER, "8", 11.0, 11.0), Storm.NONE, "none"),
        (BROKEN, Fault(FaultKind.KILL_WORKER, "7", 13.0, 13.0), Storm.NONE, "none"),
        (BROKEN, Fault(Storm.CUT_STREAM, "anna", 10.0, 12.0), Storm.CUT_STREAM, "none"),
        (CUT, Fault(Storm.CUT_STREAM, "anna", 10.0, 12.0), Storm.CUT_STREAM, Cause.STREAM_CUT),
        (CUT, Fault(Storm.CUT_STREAM, "boris", 10.0, 12.0), Storm.CUT_STREAM, "none"),
        (CUT, Fault(Storm.CUT_STREAM, "anna", 10.0, 12.0), Storm.NONE, "none"),
        (FAILED, Fault(Storm.SERVER_ERROR, "anna", 10.0, 12.0), Storm.SERVER_ERROR, Cause.UPSTREAM_EXHAUSTED),
        (FAILED, Fault(Storm.SERVER_ERROR, "anna", 11.0, 12.0), Storm.SERVER_ERROR, "none"),
        (FAILED, Fault(Storm.RATE_LIMIT, "anna", 10.0, 12.0), Storm.SERVER_ERROR, "none"),
        (CLOSED, Fault(FaultKind.STALL_STORE, "store", 8.0, 9.5), Storm.NONE, Cause.STORE_CLOSED),
        (CLOSED, Fault(FaultKind.STALL_STORE, "store", 7.0, 8.0), Storm.NONE, "none"),
        (CLOSED, Fault(FaultKind.KILL_WORKER, "7", 11.0, 11.0), Storm.NONE, "none"),
        (LIMITED, Fault(FaultKind.LEAVE, "all", 0.0, 0.0), Storm.NONE, Cause.LIMITED),
        (an_answer(End.LEFT), Fault(FaultKind.LEAVE, "all", 0.0, 20.0), Storm.NONE, Cause.CLIENT_DISCONNECTED),
        (an_answer(End.FORGOTTEN), Fault(FaultKind.KILL_WORKER, "7", 11.0, 11.0), Storm.NONE, "none"),
    ],
)
def test_an_error_has_the_cause_that_fits_in_kind_time_and_target_or_none(
    answer: Answer, fault: Fault, storm: Storm, cause: str
) -> None:
    assert judged(answer, [fault], (an_attempt(storm),)) == cause


def test_upstreams_are_exhausted_only_when_every_attempt_was_made_and_befallen() -> None:
    storm = Fault(Storm.SERVER_ERROR, "anna", 10.0, 12.0)
    befallen = an_attempt(Storm.SERVER_ERROR)
    assert judged(FAILED, [storm], (befallen,), most_attempts=2) == "none"
    assert judged(FAILED, [storm], (befallen, befallen), most_attempts=2) == Cause.UPSTREAM_EXHAUSTED
    assert judged(FAILED, [storm], (befallen, an_attempt()), most_attempts=2) == "none"
    assert judged(FAILED, [storm], (), most_attempts=2) == "none"


def test_fewer_attempts_are_enough_when_no_retry_or_no_other_account_was_left() -> None:
    storm, befallen = Fault(Storm.SERVER_ERROR, "anna", 10.0, 12.0), an_attempt(Storm.SERVER_ERROR)
    earlier, long_ago = Fault(Storm.RATE_LIMIT, "boris", 1.0, 6.0), Fault(Storm.RATE_LIMIT, "boris", 1.0, 4.0)
    assert judged(FAILED, [storm], (befallen,), most_attempts=2, has_budget=False) == Cause.UPSTREAM_EXHAUSTED
    assert judged(FAILED, [storm, earlier], (befallen,), most_attempts=2) == Cause.UPSTREAM_EXHAUSTED
    assert judged(FAILED, [storm, long_ago], (befallen,), most_attempts=2) == "none"
    limited = an_answer(End.ERROR, status=500, code="api_error", rule="few")
    assert judged(limited, [storm], (befallen,), most_attempts=2) == Cause.UPSTREAM_EXHAUSTED
    assert judged(limited, [storm], (an_attempt(),), most_attempts=2) == "none"


def test_a_retry_budget_is_reckoned_from_what_the_accounts_saw() -> None:
    attempts = [an_attempt(at=float(i)) for i in range(30)]  # One request with 29 retries.
    budget = RetryBudget(attempts, ratio=0.2, most=25)
    assert budget.is_left("chat", 10.0)
    assert not budget.is_left("chat", 29.0)
    assert budget.is_left("another", 29.0)


def test_a_worker_that_starts_while_the_store_is_away_may_refuse_what_goes_on_elsewhere() -> None:
    away = Fault(FaultKind.KILL_STORE, "store", 8.0, 11.0)
    refused = an_answer(End.ERROR, status=503, message="Redis is away")
    assert judged(refused, [away]) == "none"
    assert judged(msgspec.structs.replace(refused, pid=8), [away]) == Cause.STORE_CLOSED


def test_a_pick_without_the_store_is_needless_while_it_is_there_or_where_the_rule_forbids_it() -> None:
    judge = a_judge([Fault(FaultKind.KILL_STORE, "store", 8.0, 9.5)])
    alone = an_answer(End.WHOLE, degraded="store")
    assert not judge.is_needlessly_degraded(alone)
    assert judge.is_needlessly_degraded(an_answer(End.WHOLE, degraded="store", rule="strict"))
    assert a_judge([]).is_needlessly_degraded(alone)
    assert not a_judge([]).is_needlessly_degraded(an_answer(End.WHOLE))


# -- the books ---------------------------------------------------------------------------------------------------------


def a_settle(serial: int, tokens: tuple[int, int], number: int = 1) -> dict[str, str]:
    return {
        "event": "settle",
        "worker": "w",
        "number": str(number),
        "service": SERVICE,
        "outcome": "success",
        "input": str(tokens[0]),
        "output": str(tokens[1]),
        "cached": str(serial),
    }


def balanced(events: list[dict[str, str]], attempts: list[Attempt], lost: int = 0, most: int = 0) -> list[str]:
    """What does not add up, when the store's counters are those of its history."""
    history = books.History()
    for event in events:
        history.feed(event)
    settled = Counter(event["event"] for event in events)["settle"]
    tokens = [sum(int(event.get(name, 0)) for event in events) for name in ("input", "output")]
    state = ServiceView(requests=settled + lost, lost=lost, input=tokens[0], output=tokens[1])
    view = PoolView(pool="default", now_ms=0, epoch=1, position=1, rules={}, partitions={}, services={SERVICE: state})
    return books.compare(view, history, attempts, most_lost=most, most_vanished=0, most_unsent=0).faults


def an_account_s(serial: int, tokens: tuple[int, int]) -> Attempt:
    return Attempt(serial, f"r{serial}", SERVICE, 10.0, Storm.NONE, *tokens, has_usage=True)


REAP = {"event": "reap", "worker": "w", "number": "2", "service": SERVICE}


def test_books_agree_when_each_attempt_is_settled_once_or_lost_with_its_worker() -> None:
    attempts = [an_account_s(1, (5, 6)), an_account_s(2, (7, 8))]
    assert balanced([a_settle(1, (5, 6)), a_settle(2, (7, 8), 2)], attempts) == []
    assert balanced([a_settle(1, (5, 6)), REAP], attempts, lost=1, most=1) == []


@pytest.mark.parametrize(
    ("events", "lost", "complaint"),
    [
        ([a_settle(1, (5, 6))], 0, "1 attempts are vanished"),
        ([a_settle(1, (5, 6)), REAP], 1, "1 attempts are lost"),
        ([a_settle(1, (5, 6)), a_settle(2, (7, 9), 2)], 0, "was settled with (7, 9) tokens"),
        ([a_settle(1, (5, 6)), a_settle(1, (5, 6), 2)], 0, "was settled 2 times"),
        ([a_settle(1, (5, 6)), a_settle(2, (7, 8), 2), a_settle(3, (1, 1), 3)], 0, "usage 3 is of no attempt"),
    ],
)
def test_whatever_is_missing_twice_or_wrong_is_told(events: list[dict[str, str]], lost: int, complaint: str) -> None:
    faults = balanced(events, [an_account_s(1, (5, 6)), an_account_s(2, (7, 8))], lost=lost)
    assert any(complaint in fault for fault in faults), faults
