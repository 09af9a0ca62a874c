"""Long work in steps, for whoever has something else to do in between.

A generator does a little, yields, and returns what it was asked for in the end. A caller with time to spare takes
`finished`; one on an event loop lets that turn between steps (`store.slices`).
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TypeVar

_T = TypeVar("_T")

Steps = Generator[None, None, _T]


def finished(steps: Steps[_T]) -> _T:
    """What comes of all steps, taken at once."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            found: _T = end.value
            return found
