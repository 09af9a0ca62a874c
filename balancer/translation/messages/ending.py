"""How a message ends, in Anthropic's words and in ours: why the model stopped, and what it used."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from balancer import lenient
from balancer.translation.answer import Counts, Stop

STOPS: Mapping[str, Stop] = {
    "end_turn": "end",
    "max_tokens": "length",
    "tool_use": "tool",
    "stop_sequence": "stop_sequence",
    "refusal": "refused",
    "pause_turn": "paused",
    "model_context_window_exceeded": "context_length",
}
"""Why a model stopped; any other reason counts as `end`."""

REASONS: Mapping[Stop, str] = {stop: reason for reason, stop in STOPS.items()} | {"filtered": "refusal"}


def reason(stop: Stop, *, calls: bool, refuses: bool) -> str:
    """Anthropic's word for why the model stopped.

    A client goes on with its tools only at `tool_use`, and some models that call them name another reason, or name that
    one and call none.
    """
    if stop in ("end", "tool"):
        return "tool_use" if calls else "refusal" if refuses else "end_turn"
    return REASONS[stop]


class _Details(msgspec.Struct):
    thinking_tokens: int | None = None


class _Usage(msgspec.Struct):
    input_tokens: int | None = None
    output_tokens: int | None = None
    cache_read_input_tokens: int | None = None
    cache_creation_input_tokens: int | None = None
    output_tokens_details: _Details | None = None


NULL = msgspec.Raw(b"null")
"""Of what an answer leaves out."""

_usage = msgspec.json.Decoder(_Usage | None)


def counts(raw: msgspec.Raw, before: Counts | None = None) -> Counts | None:
    """The tokens of a `usage`: what it leaves out is as before. As before altogether when it cannot be read.

    Anthropic's input leaves out what came from a cache and went to one; ours is the whole prompt.
    """
    try:
        usage = lenient.decode(_usage, raw)
    except lenient.UNREADABLE:
        return before
    if usage is None:
        return before
    old = before or Counts()
    cached = _or(usage.cache_read_input_tokens, old.cached)
    creation = _or(usage.cache_creation_input_tokens, old.cache_creation)
    fresh = _or(usage.input_tokens, old.input - old.cached - old.cache_creation)
    thinking = usage.output_tokens_details.thinking_tokens if usage.output_tokens_details else None
    return Counts(
        input=fresh + cached + creation,
        output=_or(usage.output_tokens, old.output),
        cached=cached,
        cache_creation=creation,
        reasoning=_or(thinking, old.reasoning),
    )


def usage(counts: Counts | None) -> dict[str, object]:
    """A message's `usage`; zeros when nothing is known."""
    if counts is None:
        counts = Counts()
    fields: dict[str, object] = {
        "input_tokens": max(0, counts.input - counts.cached - counts.cache_creation),
        "cache_creation_input_tokens": counts.cache_creation,
        "cache_read_input_tokens": counts.cached,
        "output_tokens": counts.output,
    }
    if counts.reasoning:
        fields["output_tokens_details"] = {"thinking_tokens": counts.reasoning}
    return fields


def _or(value: int | None, otherwise: int) -> int:
    return max(0, otherwise if value is None else value)
