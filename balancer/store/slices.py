"""Long work on the event loop, in slices: requests wait for a slice at most, not for the work."""

from __future__ import annotations

import asyncio
import time
from typing import TypeVar

from balancer.steps import Steps

_T = TypeVar("_T")

SLICE_S = 0.001


async def in_slices(steps: Steps[_T]) -> _T:
    """What comes of all steps; the loop turns after each millisecond of them."""
    until = time.perf_counter() + SLICE_S
    while True:
        try:
            next(steps)
        except StopIteration as end:
            found: _T = end.value
            return found
        if time.perf_counter() >= until:
            await asyncio.sleep(0)
            until = time.perf_counter() + SLICE_S
