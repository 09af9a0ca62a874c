"""Requests to Anthropic itself, without the thoughts that other vendors' models had earlier in the conversation."""

from __future__ import annotations

import operator

import msgspec

from balancer import lenient
from balancer.translation import marks

_CLEARS_THINKING = "clear_thinking"


class _Block(msgspec.Struct):
    type: str | None = None
    signature: str | None = None
    data: str | None = None

    @property
    def is_foreign(self) -> bool:
        """True for a thought with our mark."""
        if self.type == "thinking":
            return (self.signature or "").startswith(marks.PREFIX)
        return self.type == "redacted_thinking" and (self.data or "").startswith(marks.PREFIX)


class _Message(msgspec.Struct):
    role: str | None = None
    content: str | list[msgspec.Raw] | None = None

    def kinds(self) -> list[str]:
        """The types of its blocks."""
        return ["text"] if isinstance(self.content, str) else [_type(block) for block in self.content or ()]


class _Typed(msgspec.Struct):
    type: str | None = None


_object = msgspec.json.Decoder(dict[str, msgspec.Raw])
_list = msgspec.json.Decoder(list[msgspec.Raw])
_message = msgspec.json.Decoder(_Message)
_block = msgspec.json.Decoder(_Block)
_typed = msgspec.json.Decoder(_Typed)
_encode = msgspec.json.Encoder().encode


def without_foreign(body: bytes) -> bytes:
    """The request without what Anthropic refuses of other vendors' answers in it; as it is when there is nothing.

    Thoughts that carry our mark go; a turn that held nothing else goes with them: the user's turns around it count as
    one. And a model that is told a budget does not think this time, where the calls whose results end the request come
    without the thoughts that it insists on: they were another model's. All else stays as it came, to the byte.
    """
    if marks.PREFIX_BYTES not in body and b'"enabled"' not in body:
        return body
    try:
        request = lenient.decode(_object, body)
        messages = lenient.decode(_list, request["messages"])
        kept = [mended for raw in messages if (mended := _without_foreign(raw)) is not None]
        is_whole = len(kept) == len(messages) and all(map(operator.is_, kept, messages))
        if _thinks_by_budget(request) and _lacks_thoughts(kept):
            del request["thinking"]
            _keep_thinking(request)
        elif is_whole:
            return body
        if not is_whole:
            request["messages"] = msgspec.Raw(_encode(kept))
    except (KeyError, *lenient.UNREADABLE):
        return body
    return _encode(request)


def _without_foreign(raw: msgspec.Raw) -> msgspec.Raw | None:
    """A message without foreign thoughts; None when nothing is left of it."""
    if marks.PREFIX_BYTES not in bytes(raw):
        return raw
    content = lenient.decode(_message, raw).content
    if not isinstance(content, list):
        return raw
    kept = [block for block in content if not _is_foreign(block)]
    if len(kept) == len(content):
        return raw
    if not kept:
        return None
    fields = lenient.decode(_object, raw)
    fields["content"] = msgspec.Raw(_encode(kept))
    return msgspec.Raw(_encode(fields))


def _is_foreign(raw: msgspec.Raw) -> bool:
    try:
        return lenient.decode(_block, raw).is_foreign
    except lenient.UNREADABLE:
        return False


def _type(raw: msgspec.Raw | None) -> str:
    try:
        return (lenient.decode(_typed, raw).type or "") if raw is not None else ""
    except lenient.UNREADABLE:
        return ""


def _thinks_by_budget(request: dict[str, msgspec.Raw]) -> bool:
    return _type(request.get("thinking")) == "enabled"


def _lacks_thoughts(messages: list[msgspec.Raw]) -> bool:
    """True when results of tools end the request, and the turn with their calls does not begin with a thought."""
    read = [lenient.decode(_message, raw) for raw in messages]
    calls = len(read)
    while calls and read[calls - 1].role != "assistant":
        calls -= 1
    if not any(kind == "tool_result" for message in read[calls:] for kind in message.kinds()):
        return False
    kinds: list[str] = []
    while calls and read[calls - 1].role == "assistant":
        calls -= 1
        kinds = [*read[calls].kinds(), *kinds]
    return bool(kinds) and kinds[0] not in ("thinking", "redacted_thinking")


def _keep_thinking(request: dict[str, msgspec.Raw]) -> None:
    """Takes out the edits of the context that are refused where the model does not think."""
    management = request.get("context_management")
    if management is None:
        return
    fields = lenient.decode(_object, management)
    edits = lenient.decode(_list, fields.get("edits", msgspec.Raw(b"[]")))
    kept = [edit for edit in edits if not _type(edit).startswith(_CLEARS_THINKING)]
    if len(kept) == len(edits):
        return
    if not kept and len(fields) == 1:
        del request["context_management"]
        return
    fields["edits"] = msgspec.Raw(_encode(kept))
    request["context_management"] = msgspec.Raw(_encode(fields))
