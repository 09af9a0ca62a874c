"""Long work in slices, between which the loop turns."""

from __future__ import annotations

import asyncio

import pytest

from balancer.steps import Steps, finished
from balancer.store.slices import in_slices


def counting(to: int) -> Steps[int]:
    for _ in range(to):
        yield
    return to


def failing() -> Steps[None]:
    yield
    raise ValueError("half way")


def outer() -> Steps[int]:
    first = yield from counting(2)
    second = yield from counting(3)
    return first + second


async def turns_during(steps: Steps[int]) -> int:
    """How often the loop turned until the steps were done."""
    turns, is_done = 0, False

    def turn() -> None:
        nonlocal turns
        if not is_done:
            turns += 1
            asyncio.get_running_loop().call_soon(turn)

    turn()
    await in_slices(steps)
    is_done = True
    return turns - 1


async def test_what_comes_of_steps_is_the_same_at_once_and_in_slices() -> None:
    assert finished(outer()) == await in_slices(outer()) == 5


async def test_an_error_of_a_step_reaches_the_caller() -> None:
    with pytest.raises(ValueError, match="half way"):
        finished(failing())
    with pytest.raises(ValueError, match="half way"):
        await in_slices(failing())


async def test_the_loop_turns_once_a_slice_is_used_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("balancer.store.slices.SLICE_S", 0.0)
    assert await turns_during(counting(7)) == 7


async def test_the_loop_does_not_turn_for_what_fits_into_a_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("balancer.store.slices.SLICE_S", 60.0)
    assert await turns_during(counting(7)) == 0
