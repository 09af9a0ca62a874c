"""Stands in until answers of Google's are read."""

from __future__ import annotations

from balancer.errors import UpstreamAnswerError
from balancer.translation.answer import Answer
from balancer.translation.conversation import Target


def read_answer(body: bytes, target: Target) -> Answer:
    """Refuses."""
    raise UpstreamAnswerError("services of Google are not there yet")
