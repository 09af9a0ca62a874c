"""A line for a rule at its limits, with answers given by hand."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from balancer.errors import NoServiceError, RateLimitedError, StoreUnavailableError
from balancer.store.queue import Queues
from tests.builders import a_rule

LONG_MS = 60_000


def limited(retry_after_s: float | None = 30.0) -> RateLimitedError:
    return RateLimitedError("at its limit", cause="limited", retry_after_s=retry_after_s)


class Desk:
    """Serves as many as there is room for; `asked` has the names of those who asked, in order."""

    def __init__(self, room: int = 0, retry_after_s: float | None = 30.0) -> None:
        self.room = room
        self.asked: list[str] = []
        self.refusal: Exception = limited(retry_after_s)
        self.asking = 0
        self.most_asking = 0

    def ask(self, name: str) -> Callable[[], Awaitable[str]]:
        async def answer() -> str:
            self.asked.append(name)
            self.asking += 1
            self.most_asking = max(self.most_asking, self.asking)
            await asyncio.sleep(0)
            self.asking -= 1
            if not self.room:
                raise self.refusal
            self.room -= 1
            return name

        return answer


@pytest.fixture
def queues() -> Queues:
    return Queues()


def join(queues: Queues, desk: Desk, name: str, *, timeout_ms: int = LONG_MS, only: str = "") -> asyncio.Task[str]:
    rule = a_rule(queue_timeout_ms=timeout_ms)
    return asyncio.create_task(queues.wait(rule, only, desk.ask(name)))


async def line_up(queues: Queues, desk: Desk, *names: str, **options: int) -> list[asyncio.Task[str]]:
    """One after the other; all wait."""
    tasks = []
    for count, name in enumerate(names, start=len(queues) + 1):
        tasks.append(join(queues, desk, name, **options))  # type: ignore[arg-type]
        while len(queues) < count:  # noqa: ASYNC110  a few turns of the loop
            await asyncio.sleep(0)
    return tasks


async def test_who_finds_room_asks_once_and_does_not_wait(queues: Queues) -> None:
    desk = Desk(room=1)
    assert await join(queues, desk, "one") == "one"
    assert (desk.asked, len(queues)) == (["one"], 0)


async def test_those_who_wait_are_served_in_the_order_they_came(queues: Queues) -> None:
    desk = Desk()
    tasks = await line_up(queues, desk, "one", "two", "three", "four")
    served: list[str] = []
    for task in tasks:
        task.add_done_callback(lambda done: served.append(done.result()))
    desk.room = 4
    queues.settled("default", "a:m")
    await asyncio.gather(*tasks)
    assert served == ["one", "two", "three", "four"]
    assert len(queues) == 0


async def test_only_the_head_asks_however_many_wait(queues: Queues) -> None:
    desk = Desk(retry_after_s=0.02)
    tasks = await line_up(queues, desk, "head", *(f"w{i}" for i in range(50)))
    while len(desk.asked) < 5:  # noqa: ASYNC110  the head's pauses
        await asyncio.sleep(0.005)
    assert set(desk.asked) == {"head"}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert (len(queues), desk.most_asking) == (0, 1)


async def test_who_comes_while_others_wait_lines_up_behind_them_though_there_is_room(queues: Queues) -> None:
    desk = Desk()
    (first,) = await line_up(queues, desk, "first")
    desk.room = 2
    late = join(queues, desk, "late")
    assert await late == "late"
    assert first.done()
    assert desk.asked == ["first", "first", "late"]


async def test_a_settle_at_one_of_the_rules_providers_makes_the_head_ask_at_once(queues: Queues) -> None:
    desk = Desk()
    (task,) = await line_up(queues, desk, "one")
    for _ in range(3):
        queues.settled("default", "a:other-model")
        asked = len(desk.asked)
        while len(desk.asked) == asked or desk.asking:  # noqa: ASYNC110  a few turns of the loop
            await asyncio.sleep(0)
    assert len(desk.asked) == 4
    for pool, service in (("default", "elsewhere:m"), ("other", "a:m")):
        queues.settled(pool, service)
        for _ in range(20):
            await asyncio.sleep(0)
    assert len(desk.asked) == 4
    task.cancel()


async def test_nobody_waits_longer_than_its_own_time_and_is_told_what_is_left(queues: Queues) -> None:
    desk = Desk(retry_after_s=30)
    patient = await line_up(queues, desk, "patient")
    began = asyncio.get_running_loop().time()
    hasty = join(queues, desk, "hasty", timeout_ms=50)
    with pytest.raises(RateLimitedError) as told:
        await hasty
    assert 0.04 < asyncio.get_running_loop().time() - began < 2
    assert told.value.cause == "limited"
    assert 27 < (told.value.retry_after_s or 0) <= 30
    assert "hasty" not in desk.asked
    assert len(queues) == 1
    patient[0].cancel()


async def test_the_head_asks_a_last_time_when_its_time_is_over(queues: Queues) -> None:
    desk = Desk(retry_after_s=30)
    task = join(queues, desk, "one", timeout_ms=50)
    with pytest.raises(RateLimitedError):
        await task
    assert desk.asked == ["one", "one"]
    assert len(queues) == 0


async def test_whoever_hangs_up_leaves_no_gap(queues: Queues) -> None:
    desk = Desk()
    tasks = await line_up(queues, desk, "head", "middle", "last")
    for task in tasks[:2]:
        task.cancel()
    await asyncio.gather(*tasks[:2], return_exceptions=True)
    assert len(queues) == 1
    desk.room = 1
    assert await tasks[2] == "last"
    assert len(queues) == 0


async def test_a_crowd_that_hangs_up_at_once_asks_nothing(queues: Queues) -> None:
    desk = Desk()
    tasks = await line_up(queues, desk, *(f"w{i}" for i in range(20)))
    asked = len(desk.asked)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert (len(desk.asked), len(queues)) == (asked, 0)


NO_USE = [
    limited(retry_after_s=None),
    RateLimitedError("cooling", cause="cooling", retry_after_s=1),
    NoServiceError("none", cause="broken", retry_after_s=1),
    StoreUnavailableError("away"),
]


@pytest.mark.parametrize("refusal", NO_USE, ids=lambda refusal: getattr(refusal, "cause", "store"))
async def test_what_waiting_does_not_mend_is_raised_at_once(queues: Queues, refusal: Exception) -> None:
    desk = Desk()
    desk.refusal = refusal
    with pytest.raises(type(refusal)) as raised:
        await join(queues, desk, "one")
    assert raised.value is refusal
    assert desk.asked == ["one"]


async def test_a_request_that_fits_never_does_not_hold_up_those_behind_it(queues: Queues) -> None:
    desk = Desk()
    head, behind = await line_up(queues, desk, "head", "behind")
    desk.refusal = limited(retry_after_s=None)
    queues.settled("default", "a:m")
    with pytest.raises(RateLimitedError):
        await head
    desk.refusal = limited()
    desk.room = 1
    assert await behind == "behind"


async def test_those_who_want_one_service_have_a_line_of_their_own(queues: Queues) -> None:
    desk, other = Desk(), Desk(room=1)
    (waiting,) = await line_up(queues, desk, "any")
    assert await join(queues, other, "one", only="b:m") == "one"
    assert not waiting.done()
    waiting.cancel()
