"""Stands in until requests are written for Google."""

from __future__ import annotations

from balancer.translation.conversation import Conversation, Target, UntranslatableError, Written


def write_request(conversation: Conversation, target: Target) -> Written:
    """Refuses."""
    raise UntranslatableError("services of Google are not there yet", param="model")
