"""An answer of another service, written as a stream of Anthropic's event by event."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, assert_never

import msgspec

from balancer import lenient
from balancer.translation import marks
from balancer.translation.answer import (
    Broke,
    CallBegan,
    CallDelta,
    Counted,
    Counts,
    Echo,
    Ended,
    Pinged,
    RefusalDelta,
    Signed,
    Started,
    Step,
    Stop,
    Stopped,
    TextDelta,
    ThinkingDelta,
)
from balancer.translation.conversation import Citation
from balancer.translation.messages.citing import location
from balancer.translation.messages.ending import reason, usage
from balancer.translation.messages.ids import NewIds

_encode = msgspec.json.Encoder().encode
_object = msgspec.json.Decoder(dict[str, msgspec.Raw])
_PING = b'event: ping\ndata: {"type":"ping"}\n\n'
_START = b'event: content_block_start\ndata: {"type":"content_block_start","index":%d,"content_block":%b}\n\n'
_DELTA = b'event: content_block_delta\ndata: {"type":"content_block_delta","index":%d,"delta":{"type":%b:'
_DELTA_END = b"}}\n\n"
_CLOSE = b'event: content_block_stop\ndata: {"type":"content_block_stop","index":%d}\n\n'
_STOP = b'event: message_stop\ndata: {"type":"message_stop"}\n\n'

_Kind = Literal["text", "thinking", "redacted_thinking", "tool_use"]
# A delta's type, and the field that holds what it brings.
_TEXT = b'"text_delta","text"'
_THINKING = b'"thinking_delta","thinking"'
_SIGNATURE = b'"signature_delta","signature"'
_CITATION = b'"citations_delta","citation"'
_INPUT = b'"input_json_delta","partial_json"'
_GROWS: dict[_Kind, bytes] = {"text": _TEXT, "thinking": _THINKING, "tool_use": _INPUT, "redacted_thinking": b""}


class _Block:
    """A block of the answer: open, or waiting with what it holds until all before it are whole."""

    __slots__ = ("begins", "head", "held", "index", "is_over", "is_signed", "kind", "said")

    def __init__(self, kind: _Kind, begins: dict[str, object]) -> None:
        self.kind: _Kind = kind
        self.begins = begins
        self.index = -1
        """Its number among the blocks; -1 while it waits."""
        self.head = b""
        """What a delta of it begins with, once it is open."""
        self.held: list[tuple[bytes, bytes]] = []
        self.said: list[str] = []
        """A call's arguments so far."""
        self.is_signed = False
        self.is_over = False
        """Nothing more of its kind belongs to it, though it may be open."""


class StreamWriter:
    """Events from steps. Blocks come one behind the other, each closed before the next opens, as Anthropic's do.

    So of calls that interleave one is told as it comes, and what else comes is held until that one's arguments are
    whole.
    """

    def __init__(self, echo: Echo) -> None:
        self._echo = echo
        self._has_started = False
        self._is_over = False
        self._opened = 0
        self._open: _Block | None = None
        self._waiting: list[_Block] = []
        self._calls: dict[int, _Block] = {}
        self._ids = NewIds(echo.id)
        self._refuses = False
        self._usage: Counts | None = None
        self._stop: Stop = "end"
        self._stop_sequence = ""

    def write(self, steps: Sequence[Step]) -> bytes:
        """The events that tell the steps, empty when there is nothing to tell yet."""
        out: list[bytes] = []
        for step in steps:
            self._write(step, out)
        return out[0] if len(out) == 1 else b"".join(out)

    def _write(self, step: Step, out: list[bytes]) -> None:
        if not self._has_started and not isinstance(step, Pinged):
            self._start(step, out)
        match step:
            case TextDelta():
                self._text(step.text, step.begins, step.citations, out)
            case CallDelta():
                block = self._calls.get(step.index)
                if block is not None and step.arguments:
                    self._argue(block, step.arguments, out)
            case ThinkingDelta():
                self._thinking(step.text, step.begins, out)
            case CallBegan():
                begins: dict[str, object] = {
                    "type": "tool_use",
                    "id": self._ids.of(step.id),
                    "name": step.name,
                    "input": {},
                }
                self._calls[step.index] = self._begin("tool_use", begins, out)
            case Signed():
                self._signed(step, out)
            case RefusalDelta():
                self._refuses = True
                self._text(step.text, False, (), out)
            case Counted():
                self._usage = step.usage
            case Stopped():
                self._stop, self._stop_sequence = step.stop, step.stop_sequence
                self._flush(out)
            case Pinged():
                out.append(_PING)
            case Ended():
                self._end(out)
            case Started() | Broke():
                pass
            case _:
                assert_never(step)

    # -- the message ---------------------------------------------------------------------------------------------------

    def _start(self, step: Step, out: list[bytes]) -> None:
        self._has_started = True
        id_ = ""
        if isinstance(step, Started):
            id_, self._usage = step.id, step.usage
        message: dict[str, object] = {
            "id": id_ or f"msg_{self._echo.id}",
            "type": "message",
            "role": "assistant",
            "model": self._echo.model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": usage(self._usage),
        }
        out.append(_event("message_start", {"message": message}))

    def _end(self, out: list[bytes]) -> None:
        if self._is_over:
            return
        self._is_over = True
        self._flush(out)
        delta = {
            "stop_reason": reason(self._stop, calls=bool(self._calls), refuses=self._refuses),
            "stop_sequence": self._stop_sequence or None,
        }
        out.append(_event("message_delta", {"delta": delta, "usage": usage(self._usage)}))
        out.append(_STOP)

    # -- what a step adds ----------------------------------------------------------------------------------------------

    def _text(self, text: str, begins: bool, citations: Sequence[Citation], out: list[bytes]) -> None:
        block = self._last()
        if block is not None and block.kind == "text":
            block.is_over |= begins
        if text:
            if block is None or block.kind != "text" or block.is_over:
                block = self._begin("text", {"type": "text", "text": ""}, out)
            self._tell(block, _TEXT, _encode(text), out)
        if citations and block is not None and block.kind == "text":
            for citation in citations:
                found = location(citation)
                if found is not None:
                    self._tell(block, _CITATION, _encode(found), out)

    def _thinking(self, text: str, begins: bool, out: list[bytes]) -> None:
        block = self._last()
        if block is not None and block.kind == "thinking":
            block.is_over |= begins
        if text:
            if block is None or block.kind != "thinking" or block.is_over:
                block = self._begin("thinking", _NO_THOUGHT, out)
            self._tell(block, _THINKING, _encode(text), out)

    def _signed(self, step: Signed, out: list[bytes]) -> None:
        sealed = marks.sealed(step.vendor, step.signature)
        if step.is_redacted:
            self._begin("redacted_thinking", {"type": "redacted_thinking", "data": sealed}, out)
            return
        block = self._last()
        if block is None or block.kind != "thinking" or block.is_over:
            if not step.signature:
                return
            block = self._begin("thinking", _NO_THOUGHT, out)
        block.is_signed = block.is_over = True
        self._tell(block, _SIGNATURE, _encode(sealed), out)

    def _argue(self, block: _Block, arguments: str, out: list[bytes]) -> None:
        if block.is_over:
            return
        block.said.append(arguments)
        self._tell(block, _INPUT, _encode(arguments), out)
        if self._waiting and block is self._open and arguments.rstrip().endswith("}"):
            self._advance(out)

    # -- one block behind the other ------------------------------------------------------------------------------------

    def _last(self) -> _Block | None:
        return self._waiting[-1] if self._waiting else self._open

    def _begin(self, kind: _Kind, begins: dict[str, object], out: list[bytes]) -> _Block:
        block = _Block(kind, begins)
        self._waiting.append(block)
        self._advance(out)
        return block

    def _tell(self, block: _Block, delta: bytes, value: bytes, out: list[bytes]) -> None:
        if block is self._open:
            head = block.head if delta is _GROWS[block.kind] else _DELTA % (block.index, delta)
            out.append(head + value + _DELTA_END)
        else:
            block.held.append((delta, value))

    def _advance(self, out: list[bytes]) -> None:
        """Opens what waits, as far as all before it is whole."""
        while self._waiting and (self._open is None or _is_whole(self._open)):
            self._next(out)

    def _flush(self, out: list[bytes]) -> None:
        """Tells all that waits: nothing more comes."""
        while self._waiting:
            self._next(out)
        self._close(out)

    def _next(self, out: list[bytes]) -> None:
        self._close(out)
        block = self._open = self._waiting.pop(0)
        block.index = self._opened
        self._opened += 1
        block.head = _DELTA % (block.index, _GROWS[block.kind])
        out.append(_START % (block.index, _encode(block.begins)))
        out.extend(_DELTA % (block.index, delta) + value + _DELTA_END for delta, value in block.held)
        block.held.clear()

    def _close(self, out: list[bytes]) -> None:
        block = self._open
        if block is None:
            return
        if block.kind == "thinking" and not block.is_signed:
            unsigned = _encode(marks.sealed(self._echo.vendor, ""))
            out.append(_DELTA % (block.index, _SIGNATURE) + unsigned + _DELTA_END)
        block.is_over = True
        self._open = None
        out.append(_CLOSE % block.index)


_NO_THOUGHT: dict[str, object] = {"type": "thinking", "thinking": "", "signature": ""}


def _is_whole(block: _Block) -> bool:
    """True when nothing more can come of a block, as another one has begun."""
    if block.kind != "tool_use":
        return True
    try:
        lenient.decode(_object, "".join(block.said).encode("utf-8", "replace"))
    except lenient.UNREADABLE:
        return False
    return True


def _event(name: str, fields: dict[str, object]) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (name.encode(), _encode({"type": name, **fields}))
