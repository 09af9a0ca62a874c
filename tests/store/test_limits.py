"""Limits, cooldowns, breakers, sessions and answers by id, as a worker over a real server meets them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from balancer import audit
from balancer.domain import BreakerSettings, Limits, Outcome, Pick, Retry, Rule, Service, Usage
from balancer.errors import NoServiceError, RateLimitedError, StoreUnavailableError
from balancer.store import keys
from balancer.store.balance import Balance, Recalled
from tests.store.conftest import eventually
from tests.store.test_balance import Start, are_ready, history, is_away, pick, settled, started, the_rule
from tests.store.test_registry import a_configuration, a_door, a_provider, a_rule, a_service


@pytest.fixture
async def start(url: str) -> AsyncIterator[Start]:
    start = Start(url)
    yield start
    await start.close()


def limited(id_: str = "a:m", *, rpm: int = 0, tpm: int = 0, in_flight: int = 0) -> Service:
    return a_service(id_, limits=Limits(rpm=rpm, tpm=tpm, in_flight=in_flight))


async def refusal(balance: Balance, **options: Any) -> NoServiceError:
    with pytest.raises(NoServiceError) as raised:
        await pick(balance, **options)
    return raised.value


# -- why there is none -------------------------------------------------------------------------------------------------


async def test_at_its_limit_a_rule_says_when_to_ask_again(start: Start) -> None:
    (worker,) = await started(start, a_configuration(a_rule(services=(limited(rpm=2),))))
    for _ in range(2):
        await pick(worker)
    told = await refusal(worker)
    assert isinstance(told, RateLimitedError)
    assert (told.status, told.cause, told.message) == (429, "limited", "every service of rule chat is at its limit")
    assert 50 < (told.retry_after_s or 0) <= 65


async def test_a_request_larger_than_every_limit_is_told_so_and_no_time(start: Start) -> None:
    rule = a_rule(services=(limited("a:m", tpm=50), limited("b:m", tpm=80)), queue_timeout_ms=60_000)
    (worker,) = await started(start, a_configuration(rule))
    told = await refusal(worker, reserved=81)
    assert isinstance(told, RateLimitedError)
    assert (told.cause, told.retry_after_s) == ("limited", None)
    assert "larger than the limit of tokens a minute" in told.message
    assert (await pick(worker, reserved=80)).service == "b:m"


async def test_a_provider_has_its_share_of_a_limit_in_each_pool(start: Start) -> None:
    rules = (a_rule("x", ("a:m", "a:n")), a_rule("y", ("a:m",), pool="eu"), a_rule("z", ("a:m",), pool="us"))
    provider = a_provider("a", limits=Limits(in_flight=6, split={"default": 0.5, "eu": 0.34}))
    (worker,) = await started(start, a_configuration(*rules, providers=(provider,)))
    for uuid, most in (("x", 3), ("y", 2), ("z", 0)):
        for _ in range(most):
            await pick(worker, the_rule(worker, uuid))
        assert (await refusal(worker, rule=the_rule(worker, uuid))).cause == "limited"


async def test_a_service_that_asked_for_quiet_is_left_alone_and_refused_for_if_the_rule_says_so(start: Start) -> None:
    rules = (a_rule("chat", ("a:m",), on_exhausted="refuse"), a_rule("tries", ("a:m",)))
    (worker,) = await started(start, a_configuration(*rules))
    worker.settle(await pick(worker), Outcome.RATE_LIMITED, None, cooldown_ms=20_000)
    assert await settled(worker)
    told = await refusal(worker)
    assert isinstance(told, RateLimitedError)
    assert told.cause == "cooling"
    assert 10 < (told.retry_after_s or 0) <= 20
    tried = await pick(worker, the_rule(worker, "tries"))
    assert (tried.reason, worker.cursor(the_rule(worker, "tries"))) == ("exhausted", "")


async def test_an_open_breaker_is_no_rate_limit(start: Start) -> None:
    provider = a_provider("a", breaker=BreakerSettings(failures=2, open_s=60))
    rule = a_rule(services=("a:m",), on_exhausted="refuse")
    (worker,) = await started(start, a_configuration(rule, providers=(provider,)))
    for _ in range(2):
        worker.settle(await pick(worker), Outcome.FAILED, None)
    assert await settled(worker)
    told = await refusal(worker)
    assert type(told) is NoServiceError
    assert (told.status, told.cause) == (503, "broken")
    assert 50 < (told.retry_after_s or 0) <= 72
    (view,) = await worker.views()
    assert view.breaker_state("a:m") == "open"


async def test_when_the_retries_of_a_rule_are_used_up_it_says_so(start: Start) -> None:
    rules = (a_rule(), a_rule("once", retry=Retry(attempts=1)))
    (worker,) = await started(start, a_configuration(*rules))
    assert (await pick(worker, excluded=("a:m",))).reason == "retry"
    assert (await refusal(worker, excluded=("a:m", "b:m", "c:m"))).cause == "tried"
    told = await refusal(worker, rule=the_rule(worker, "once"), excluded=("a:m",))
    assert (told.cause, told.message) == ("budget", "the retries of rule once are used up")


# -- waiting -----------------------------------------------------------------------------------------------------------


async def test_at_a_limit_in_flight_all_wait_their_turn_and_no_more_than_it_are_ever_in_flight(
    start: Start, control: Any
) -> None:
    most, count = 3, 60
    rule = a_rule(services=(limited(in_flight=most),), queue_timeout_ms=60_000)
    workers = await started(start, a_configuration(rule), 3)

    async def serve(worker: Balance) -> Pick:
        picked = await pick(worker)
        await asyncio.sleep(0)
        worker.settle(picked, Outcome.SUCCESS, Usage(input=1))
        return picked

    picks = await asyncio.gather(*(serve(workers[i % 3]) for i in range(count)))
    assert sorted(p.seq for p in picks) == list(range(1, count + 1))
    for worker in workers:
        assert await settled(worker)
    in_flight = highest = 0
    for event in await history(control):
        in_flight += {"pick": 1, "settle": -1}.get(event["event"], 0)
        highest = max(highest, in_flight)
    assert (highest, in_flight) == (most, 0)
    verdict = audit.check(await history(control))
    assert (verdict.violations, verdict.picks) == ([], count)


async def test_a_request_that_has_waited_in_vain_is_told_what_is_left(start: Start) -> None:
    (worker,) = await started(start, a_configuration(a_rule(services=(limited(rpm=1),), queue_timeout_ms=120)))
    await pick(worker)
    began = asyncio.get_running_loop().time()
    told = await refusal(worker)
    assert 0.1 < asyncio.get_running_loop().time() - began < 3
    assert isinstance(told, RateLimitedError)
    assert 45 < (told.retry_after_s or 0) <= 65


async def test_a_retry_does_not_wait(start: Start) -> None:
    rule = a_rule(services=("b:m", limited("a:m", in_flight=1)), queue_timeout_ms=60_000)
    (worker,) = await started(start, a_configuration(rule))
    assert (await pick(worker, only="a:m")).service == "a:m"
    assert (await refusal(worker, excluded=("b:m",))).cause == "limited"


# -- sessions ----------------------------------------------------------------------------------------------------------


async def test_a_session_stays_with_its_service_over_all_workers_and_moves_no_cursor(
    start: Start, control: Any
) -> None:
    workers = await started(start, a_configuration(a_rule(session_affinity=600)), 2)
    home = await pick(workers[0], session="secret-1")
    others = [await pick(workers[1]) for _ in range(10)]
    assert (home.reason, home.is_saved, others[-1].service) == ("streak", False, "b:m")
    again = await pick(workers[1], session="secret-1")
    assert (again.service, again.reason, again.is_switch, again.is_saved) == (home.service, "pinned", False, True)
    assert workers[1].cursor(the_rule(workers[1])) == "b:m"
    found = [key.decode() async for key in control.scan_iter("balancer:{default}:pin:*")]
    assert found == [keys.pin("default", keys.session("|chat", "secret-1"))]
    assert 590_000 < await control.pttl(found[0]) <= 600_000
    assert audit.check(await history(control)).violations == []


async def test_sessions_of_two_rules_are_apart_and_without_an_affinity_there_is_none(
    start: Start, control: Any
) -> None:
    rules = (a_rule("x", session_affinity=600), a_rule("y", session_affinity=600), a_rule("z"))
    (worker,) = await started(start, a_configuration(*rules))
    for uuid in "xyz":
        await pick(worker, the_rule(worker, uuid), session="s")
    assert len([key async for key in control.scan_iter("balancer:{default}:pin:*")]) == 2


async def test_only_one_service_is_asked_for_or_none(start: Start) -> None:
    rule = a_rule(services=("a:m", limited("b:m", in_flight=1), a_service("c:m", active=False)))
    (worker,) = await started(start, a_configuration(rule))
    assert [(p.service, p.reason, p.is_saved) for p in [await pick(worker, only="b:m")]] == [("b:m", "pinned", False)]
    full = await refusal(worker, only="b:m")
    assert (full.cause, full.message) == ("limited", "service b:m of rule chat is at its limit")
    off = await refusal(worker, only="c:m")
    assert (off.cause, off.message) == ("inactive", "service c:m of rule chat is not active")


# -- answers by id -----------------------------------------------------------------------------------------------------

RULES = (a_rule("x", ("a:m",)), a_rule("y", ("a:m",), pool="eu"), a_rule("z", ("a:m",), pool="us"))


async def test_finding_an_answer_among_many_pools_takes_no_more_commands_than_among_few(
    start: Start, control: Any
) -> None:
    """Each request that went on from an answer asked every pool, with a command for each."""
    rules = [a_rule(f"r{i}", ("a:m",), pool=f"p{i}") for i in range(20)]
    (worker,) = await started(start, a_configuration(*rules))
    first, last = the_rule(worker, "r0"), the_rule(worker, "r19")
    await worker.remember(await pick(worker, last), "resp_x")

    async def asked(response_id: str, rule: Rule | None) -> tuple[bool, int, int]:
        """Whether it was found, and after how many commands that get one key, or many."""
        await control.config_resetstat()
        found = await worker.recall(response_id, rule)
        stats = await control.info("commandstats")
        one, many = (stats.get(f"cmdstat_{name}", {}).get("calls", 0) for name in ("get", "mget"))
        return found is not None, one, many

    assert await asked("resp_x", last) == (True, 1, 0)
    assert await asked("resp_x", first) == (True, 1, 1)
    assert await asked("resp_x", None) == (True, 0, 1)
    assert await asked("resp_of_nobody", first) == (False, 1, 1)


async def is_back(worker: Balance) -> bool:
    return all(worker.pools_up().values())


async def test_an_answer_that_a_pool_away_may_know_is_not_denied(url: str, start: Start, control: Any) -> None:
    (first,) = await started(start, a_configuration(*RULES))
    with a_door(url) as door:
        worker = await start(door.url, redis_deadline_ms=300)
        await eventually(lambda: are_ready(worker))
        picked = await pick(worker, the_rule(worker, "x"))
        await worker.remember(picked, "resp_x")
        await door.shut(control)
        await eventually(lambda: is_away(worker))
        began = asyncio.get_running_loop().time()
        with pytest.raises(StoreUnavailableError):
            await worker.recall("resp_x")
        with pytest.raises(StoreUnavailableError):
            await worker.remember(picked, "resp_y")
        assert asyncio.get_running_loop().time() - began < 3
        door.open()
        await eventually(lambda: is_back(worker))
        assert await worker.recall("resp_x") == Recalled(pool="default", rule="x", service="a:m")
        await worker.close(timeout_s=1)
    assert await first.recall("resp_y") is None
