"""What an answer says of itself beside its usage: its id, the model that gave it, and why it ended.

Only the fields where the vendors tell that are read, and only names without spaces are taken: nothing of what a model
wrote gets here. Nothing raises.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

from balancer import lenient
from balancer.sse import Event
from balancer.usage import StreamUsage

_NAME = re.compile(r"[A-Za-z0-9_.:/@+-]{1,128}")
_MOST_REASONS = 8
_REASONS = (b"_reason", b'"status"')
"""One of them stands in every event that says why the answer ended."""


class _Choice(msgspec.Struct):
    finish_reason: Any = None


class _Candidate(msgspec.Struct):
    finishReason: Any = None  # noqa: N815 - Google's name


class _Part(msgspec.Struct):
    id: Any = None
    model: Any = None
    stop_reason: Any = None
    status: Any = None


class _Answer(msgspec.Struct):
    """The fields of an answer, or of an event, in any dialect; a `delta` or a `message` is text in some."""

    id: Any = None
    object: Any = None
    model: Any = None
    status: Any = None
    stop_reason: Any = None
    choices: list[_Choice] | None = None
    delta: _Part | str | None = None
    message: _Part | str | None = None
    response: _Part | None = None
    responseId: Any = None  # noqa: N815 - Google's names, here and below
    modelVersion: Any = None  # noqa: N815
    candidates: list[_Candidate] | None = None


_answer = msgspec.json.Decoder(_Answer)


class Details:
    """What is known of an answer by now."""

    __slots__ = ("finish_reasons", "id", "model")

    def __init__(self) -> None:
        self.id = ""
        self.model = ""
        self.finish_reasons: tuple[str, ...] = ()

    def read(self, data: bytes | bytearray) -> None:
        """Takes over what a whole answer, or an event's data, says."""
        try:
            answer = lenient.decode(_answer, data)
        except lenient.UNREADABLE:
            return
        self._take(answer.id or answer.responseId, answer.model or answer.modelVersion)
        self._end(answer.stop_reason, *(choice.finish_reason for choice in (answer.choices or ())[:_MOST_REASONS]))
        if answer.candidates:
            self._end(*(candidate.finishReason for candidate in answer.candidates[:_MOST_REASONS]))
        if answer.object == "response":
            self._end(answer.status)
        for part in (answer.delta, answer.message, answer.response):
            if isinstance(part, _Part):
                self._take(part.id, part.model)
                self._end(part.stop_reason, part.status)

    def hear(self, id_: str = "", model: str = "", reason: str = "") -> None:
        """Takes over what others have read in it, where nothing is known yet."""
        self._take(id_, model)
        if not self.finish_reasons:
            self._end(reason)

    def _take(self, id_: object, model: object) -> None:
        self.id = self.id or _name(id_)
        self.model = self.model or _name(model)

    def _end(self, *reasons: object) -> None:
        found = tuple(name for reason in reasons if (name := _name(reason)) and name != "in_progress")
        if found:
            self.finish_reasons = found


class DetailedUsage(StreamUsage):
    """Listens to a stream as its base does, and to what it says of itself."""

    def __init__(self, details: Details) -> None:
        super().__init__()
        self._details = details

    def see(self, event: Event) -> None:
        """Hears one event."""
        super().see(event)
        data = event.data
        if not self._details.model or any(word in data for word in _REASONS):
            self._details.read(data)


def _name(value: object) -> str:
    return value if isinstance(value, str) and _NAME.fullmatch(value) else ""
