"""The few edits of an answer: the model's other name, and no usage chunk for who did not ask for it."""

from __future__ import annotations

import msgspec

from balancer import bodies, lenient
from balancer.sse import Event, with_data

_PLACES = (("model",), ("message", "model"), ("response", "model"))


class Rewriter:
    """Edits bodies and events. `response_model` is empty when the model keeps its name."""

    def __init__(self, response_model: str, *, hides_usage: bool) -> None:
        self.renames = bool(response_model)
        self._response_model = response_model
        self._hides_usage = hides_usage

    @property
    def edits_events(self) -> bool:
        """True when events do not simply pass."""
        return self._hides_usage or self.renames

    def body(self, body: bytes) -> bytes:
        """The JSON under the model's other name. Raises lenient.UNREADABLE for what is no JSON."""
        if b'"model"' not in body and not bodies.may_spell_letters(body):
            return body
        lenient.decode(_any, body)
        for path in _PLACES:
            body = bodies.replace_string(body, path, self._response_model)
        return body

    def event(self, event: Event) -> bytes | bytearray:
        """The event as the client gets it, nothing when it is the usage chunk that only we asked for."""
        if self._hides_usage and b'"usage"' in event.data and _is_usage_chunk(event.data):
            return b""
        if not self.renames:
            return event.raw
        try:
            renamed = self.body(event.data)
        except lenient.UNREADABLE:
            return event.raw
        return event.raw if renamed == event.data else with_data(event, renamed)


class _UsageChunk(msgspec.Struct):
    choices: list[msgspec.Raw]
    usage: msgspec.Raw


_any = msgspec.json.Decoder()
_usage_chunk = msgspec.json.Decoder(_UsageChunk)


def _is_usage_chunk(data: bytes) -> bool:
    """True for the chunk that stream_options.include_usage adds: no choices, and a usage."""
    try:
        chunk = lenient.decode(_usage_chunk, data)
    except lenient.UNREADABLE:
        return False
    return not chunk.choices and bytes(chunk.usage) != b"null"
