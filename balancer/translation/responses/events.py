"""The events of a stream, and the items that they build up."""

from __future__ import annotations

from abc import ABC, abstractmethod

import msgspec

from balancer.translation.chat.inputs import Unwrapping
from balancer.translation.conversation import Citation
from balancer.translation.responses import objects
from balancer.translation.responses.objects import (
    CustomCall,
    FunctionCall,
    Item,
    Message,
    OutputRefusal,
    OutputText,
    ReasoningItem,
    Status,
    Summary,
    encode,
)


class Events:
    """Numbers the events of one stream; `count` is how many there have been."""

    def __init__(self) -> None:
        self.count = 0

    def event(self, kind: bytes, members: bytes) -> bytes:
        """One event: its members follow its type and number."""
        number = self.count
        self.count += 1
        return b'event: %b\ndata: {"type":"%b","sequence_number":%d,%b}\n\n' % (kind, kind, number, members)


class Deltas:
    """A text that comes piece by piece, and the events that bring it."""

    def __init__(self, events: Events, kind: bytes, place: bytes) -> None:
        self._events = events
        self._head = b'event: %b\ndata: {"type":"%b",%b,"sequence_number":' % (kind, kind, place)
        self._pieces: list[str] = []

    def more(self, piece: str) -> bytes:
        """The event of a piece."""
        self._pieces.append(piece)
        events = self._events
        number = events.count
        events.count = number + 1
        return b'%b%d,"delta":%b}\n\n' % (self._head, number, encode(piece))

    @property
    def whole(self) -> str:
        """All pieces so far."""
        return "".join(self._pieces)


class OpenItem(ABC):
    """An item that is not finished. `opened` and `closed` are to be called once, and give its first and last events."""

    def __init__(self, events: Events, index: int, item: Item) -> None:
        self.index = index
        self.item = item
        self._events = events
        self._place = b'"item_id":%b,"output_index":%d' % (encode(item.id), index)

    def opened(self) -> bytes:
        """The item is there."""
        return self._event(b"output_item.added", b'"output_index":%d,"item":%b' % (self.index, encode(self.item)))

    @abstractmethod
    def closed(self, status: Status) -> bytes:
        """The item is whole, and will not change."""

    def _finished(self, item: Item) -> bytes:
        self.item = item
        return self._event(b"output_item.done", b'"output_index":%d,"item":%b' % (self.index, encode(item)))

    def _event(self, kind: bytes, members: bytes) -> bytes:
        return self._events.event(b"response." + kind, members)

    def _placed(self, kind: bytes, members: bytes) -> bytes:
        return self._event(kind, b"%b,%b" % (self._place, members))


class OpenMessage(OpenItem):
    """A message: its parts are texts and refusals, one behind the other."""

    def __init__(self, events: Events, index: int, item: Message) -> None:
        super().__init__(events, index, item)
        self._message = item
        self._parts: list[OutputText | OutputRefusal] = []
        self._deltas: Deltas | None = None
        self._is_refusal = False
        self._citations: list[Citation] = []

    def text(self, piece: str, citations: tuple[Citation, ...], begins: bool) -> bytes:
        """More of a text."""
        written = self._part(is_refusal=False, begins=begins)
        self._citations += citations
        return written + self._more(piece) if piece else written

    def refusal(self, piece: str) -> bytes:
        """More of a refusal."""
        return self._part(is_refusal=True, begins=False) + self._more(piece)

    def closed(self, status: Status) -> bytes:
        """The part and the item are whole."""
        written = self._part_closed()
        item = msgspec.structs.replace(self._message, status=status, content=tuple(self._parts))
        return written + self._finished(item)

    def _more(self, piece: str) -> bytes:
        assert self._deltas is not None
        return self._deltas.more(piece)

    def _part(self, *, is_refusal: bool, begins: bool) -> bytes:
        """The events that another part of this kind begins with; none where one is open."""
        if self._deltas is not None and self._is_refusal == is_refusal and not begins:
            return b""
        written = self._part_closed()
        self._is_refusal = is_refusal
        place = b'%b,"content_index":%d' % (self._place, len(self._parts))
        self._deltas = (
            Deltas(self._events, b"response.refusal.delta", place)
            if is_refusal
            else Deltas(self._events, b"response.output_text.delta", place + b',"logprobs":[]')
        )
        part = OutputRefusal(refusal="") if is_refusal else OutputText(text="")
        return written + self._in_part(b"content_part.added", b'"part":' + encode(part))

    def _part_closed(self) -> bytes:
        if self._deltas is None:
            return b""
        text = self._deltas.whole
        part: OutputText | OutputRefusal
        written = b""
        if self._is_refusal:
            part = OutputRefusal(refusal=text)
            written = self._in_part(b"refusal.done", b'"refusal":' + encode(text))
        else:
            annotations = objects.annotated(self._citations, len(text))
            part = OutputText(text=text, annotations=annotations)
            for index, annotation in enumerate(annotations):
                members = b'"annotation_index":%d,"annotation":%b' % (index, encode(annotation))
                written += self._in_part(b"output_text.annotation.added", members)
            written += self._in_part(b"output_text.done", b'"logprobs":[],"text":' + encode(text))
        written += self._in_part(b"content_part.done", b'"part":' + encode(part))
        self._parts.append(part)
        self._deltas = None
        self._citations = []
        return written

    def _in_part(self, kind: bytes, members: bytes) -> bytes:
        return self._placed(kind, b'"content_index":%d,%b' % (len(self._parts), members))


class OpenReasoning(OpenItem):
    """A thought: `has_summary` is false for what is only a signature."""

    def __init__(self, events: Events, index: int, item: ReasoningItem, *, has_summary: bool = True) -> None:
        super().__init__(events, index, item)
        self._reasoning = item
        self._has_summary = has_summary
        self._deltas = Deltas(events, b"response.reasoning_summary_text.delta", self._place + b',"summary_index":0')
        self.sealed = ""

    def opened(self) -> bytes:
        """The item and its summary are there."""
        written = super().opened()
        return written + self._in_summary(b"part.added", b'"part":' + encode(Summary(text="")))

    def more(self, piece: str) -> bytes:
        """More of the thought."""
        return self._deltas.more(piece)

    def closed(self, status: Status) -> bytes:
        """The thought is whole, with its signature if there is one by now. It has no status."""
        text = self._deltas.whole
        part = Summary(text=text)
        written = self._in_summary(b"text.done", b'"text":' + encode(text))
        written += self._in_summary(b"part.done", b'"part":' + encode(part))
        item = msgspec.structs.replace(
            self._reasoning,
            summary=(part,) if self._has_summary else (),
            encrypted_content=self.sealed or msgspec.UNSET,
        )
        return written + self._finished(item)

    def _in_summary(self, kind: bytes, members: bytes) -> bytes:
        if not self._has_summary:
            return b""
        return self._placed(b"reasoning_summary_" + kind, b'"summary_index":0,' + members)


class OpenCall(OpenItem):
    """A call of a function or a custom tool; `unwrapping` finds the bare input where the model knows a function."""

    def __init__(
        self, events: Events, index: int, item: FunctionCall | CustomCall, unwrapping: Unwrapping | None = None
    ) -> None:
        super().__init__(events, index, item)
        self._call = item
        self._unwrapping = unwrapping
        kind = b"function_call_arguments" if isinstance(item, FunctionCall) else b"custom_tool_call_input"
        self._kind = kind
        self._deltas = Deltas(events, b"response.%b.delta" % kind, self._place)

    def more(self, piece: str) -> bytes:
        """More of what the tool is called with."""
        if self._unwrapping is not None:
            piece = self._unwrapping.feed(piece)
        return self._deltas.more(piece) if piece else b""

    def closed(self, status: Status) -> bytes:
        """The call is whole. A function that is called with nothing gets an empty object: clients parse it."""
        rest = "" if self._unwrapping is None else self._unwrapping.finish()
        if isinstance(self._call, FunctionCall) and not self._deltas.whole:
            rest = "{}"
        written = self._deltas.more(rest) if rest else b""
        given = self._deltas.whole
        item: Item
        if isinstance(self._call, FunctionCall):
            members = b'"name":%b,"arguments":%b' % (encode(self._call.name), encode(given))
            item = msgspec.structs.replace(self._call, status=status, arguments=given)
        else:
            members = b'"input":' + encode(given)
            item = msgspec.structs.replace(self._call, status=status, input=given)
        return written + self._placed(self._kind + b".done", members) + self._finished(item)
