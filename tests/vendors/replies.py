"""What a fake vendor says, in no vendor's words: a test writes it once, and each says it in its own grammar."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import msgspec


class Say(msgspec.Struct, frozen=True):
    """Text."""

    text: str


class Think(msgspec.Struct, frozen=True):
    """A thought, which the vendor signs if it signs any; `is_redacted`: only the signature is shown."""

    text: str = ""
    is_redacted: bool = False


class Use(msgspec.Struct, frozen=True):
    """A call of a tool with these arguments; `text` are those of a custom tool."""

    name: str
    arguments: dict[str, Any] = msgspec.field(default_factory=dict)
    text: str = ""


Said = Say | Think | Use


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """One answer. Tokens are the neutral ones: `input` with what came from a cache, `output` with the reasoning.

    `stop` is end, length, tool, stop_sequence, filtered or refused; empty: what follows from the parts. With `status`
    the answer is an error, before anything else. `cut_after` and `broken_after` count the events of the stream that are
    sent before the connection ends, or an error is told; before event `gate_before` it waits for the gate.
    """

    parts: tuple[Said, ...] = ()
    stop: str = ""
    stop_sequence: str = ""
    input: int = 120
    cached: int = 0
    cache_creation: int = 0
    output: int = 30
    reasoning: int = 0
    status: int = 200
    message: str = ""
    headers: tuple[tuple[str, str], ...] = ()
    cut_after: int | None = None
    broken_after: int | None = None
    gate: asyncio.Event | None = None
    gate_before: int = 0

    @property
    def ending(self) -> str:
        """Why the model ended."""
        return self.stop or ("tool" if any(isinstance(part, Use) for part in self.parts) else "end")


def reply(*parts: Said, **more: Any) -> Reply:
    """An answer that says these parts."""
    return Reply(parts=parts, **more)


class Play:
    """The answers that are given, one after the other, by whichever of the vendors is asked; the last one stays."""

    def __init__(self, *replies: Reply) -> None:
        self._replies = list(replies)
        self._find: Callable[[Any], Reply] | None = None

    def says(self, *replies: Reply) -> None:
        """What is said from now on."""
        self._replies = list(replies)
        self._find = None

    def answers_by(self, find: Callable[[Any], Reply]) -> None:
        """From now on what is said depends on the request's body."""
        self._find = find

    def next(self, body: Any) -> Reply:
        """The next answer."""
        if self._find is not None:
            return self._find(body)
        return self._replies.pop(0) if len(self._replies) > 1 else self._replies[0]


class Tokens(msgspec.Struct):
    """A vendor's own account, in its own terms."""

    requests: int = 0
    input: int = 0
    output: int = 0
    cached: int = 0
    cache_creation: int = 0
    reasoning: int = 0

    def add(self, other: Tokens) -> None:
        """Counts the other's too."""
        for name in self.__struct_fields__:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def less(self, other: Tokens) -> Tokens:
        """What has come since the other was counted."""
        return Tokens(**{name: getattr(self, name) - getattr(other, name) for name in self.__struct_fields__})


class Event(msgspec.Struct, frozen=True):
    """An event of a stream, and the tokens that are known by then, where it tells them."""

    data: bytes
    told: Tokens | None = None


def pieces(text: str, size: int = 7) -> Iterator[str]:
    """A text as a stream brings it: cut anywhere."""
    return (text[i : i + size] for i in range(0, len(text), size))
