"""Streamed answers: Anthropic's read, and those of other services written as Anthropic's, event by event."""

from __future__ import annotations

from balancer.translation.messages.stream_reading import StreamReader
from balancer.translation.messages.stream_writing import StreamWriter

__all__ = ["StreamReader", "StreamWriter"]
