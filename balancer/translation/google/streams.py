"""Stands in until streams of Google's are read."""

from __future__ import annotations

from balancer.sse import Event
from balancer.translation.answer import Step
from balancer.translation.conversation import Target


class StreamReader:
    """Reads nothing."""

    def __init__(self, target: Target) -> None:
        self._target = target

    def read(self, event: Event) -> list[Step]:
        """Nothing."""
        return []

    def finish(self) -> list[Step]:
        """Nothing."""
        return []
