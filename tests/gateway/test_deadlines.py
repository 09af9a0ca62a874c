"""Deadlines by ticks: never early, late by a tick at most, and what is left leaves nothing behind."""

from __future__ import annotations

import asyncio
import random
import time

import pytest

from balancer.gateway.deadlines import Deadlines

TICK_S = 0.05


class TooLateError(Exception):
    """What the deadlines of these tests raise."""


async def passed_s(deadlines: Deadlines, wait_s: float) -> float:
    """How long a wait that never ends was let wait, of which a deadline makes an end."""
    began = time.monotonic()
    with pytest.raises(TooLateError), deadlines.at(began + wait_s, TooLateError):
        await asyncio.Event().wait()
    return time.monotonic() - began


@pytest.mark.parametrize("wait_s", [-1.0, 0.0, 0.001, 0.05, 0.12])
async def test_a_deadline_is_not_early_and_hardly_late(wait_s: float) -> None:
    deadlines = Deadlines()

    waited_s = await passed_s(deadlines, wait_s)

    assert waited_s >= wait_s
    assert waited_s < max(wait_s, 0) + 2 * TICK_S + 0.25, "a loaded machine may be late as well"


async def test_many_deadlines_end_in_their_order() -> None:
    deadlines, ended, waits = Deadlines(), list[float](), [0.3, 0.1, 0.2]

    async def one(wait_s: float) -> None:
        assert await passed_s(deadlines, wait_s) >= wait_s
        ended.append(wait_s)

    await asyncio.gather(*map(one, waits))

    assert ended == sorted(waits)


async def test_what_ends_in_time_is_left_alone_and_nothing_is_kept_of_it() -> None:
    deadlines = Deadlines()
    for _ in range(1000):
        with deadlines.at(time.monotonic() + random.uniform(5, 500), TooLateError):
            await asyncio.sleep(0)

    assert deadlines._ticks == {}
    await asyncio.sleep(3 * TICK_S)
    assert not deadlines._is_ticking, "with nothing to look at, the timer rests"


async def test_a_cancellation_from_outside_is_one() -> None:
    deadlines = Deadlines()

    async def waits() -> None:
        with deadlines.at(time.monotonic() + 60, TooLateError):
            await asyncio.Event().wait()

    task = asyncio.create_task(waits())
    await asyncio.sleep(0)
    task.cancel()

    with pytest.raises(asyncio.CancelledError):
        await task
    assert deadlines._ticks == {}


async def test_a_cancellation_that_comes_with_the_deadline_wins() -> None:
    """As with asyncio.timeout: who cancelled the task means all of it."""
    deadlines = Deadlines()

    async def waits() -> None:
        with deadlines.at(time.monotonic(), TooLateError):
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                task.cancel()
                raise

    task = asyncio.create_task(waits())

    with pytest.raises(asyncio.CancelledError):
        await task


async def test_of_nested_deadlines_the_earlier_ends_the_wait() -> None:
    deadlines = Deadlines()

    class InnerError(Exception):
        pass

    began = time.monotonic()
    with pytest.raises(TooLateError), deadlines.at(began + 0.1, TooLateError), deadlines.at(began + 60, InnerError):
        await asyncio.Event().wait()
    with pytest.raises(InnerError), deadlines.at(began + 60, TooLateError), deadlines.at(began, InnerError):
        await asyncio.Event().wait()
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


async def test_an_error_within_passes() -> None:
    deadlines = Deadlines()

    with pytest.raises(KeyError), deadlines.at(time.monotonic() + 60, TooLateError):
        raise KeyError

    assert deadlines._ticks == {}


async def test_after_a_long_pause_of_the_loop_all_that_is_past_ends() -> None:
    deadlines = Deadlines()
    now = time.monotonic()
    waits = [asyncio.create_task(passed_s(deadlines, wait_s)) for wait_s in (0.06, 0.11, 0.16, 3600)]
    await asyncio.sleep(0)
    while time.monotonic() < now + 0.5:
        pass  # The loop stands still.
    done, pending = await asyncio.wait(waits, timeout=0.5)

    assert len(done) == 3
    for task in pending:
        task.cancel()
    await asyncio.gather(*pending, return_exceptions=True)
