"""Requests to Anthropic itself, without the thoughts that other vendors' models had earlier in the conversation."""

from __future__ import annotations

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


class _Typed(msgspec.Struct):
    type: str | None = None


_object = msgspec.json.Decoder(dict[str, msgspec.Raw])
_list = msgspec.json.Decoder(list[msgspec.Raw])
_message = msgspec.json.Decoder(_Message)
_block = msgspec.json.Decoder(_Block)
_typed = msgspec.json.Decoder(_Typed)
_encode = msgspec.json.Encoder().encode


def without_foreign(body: bytes) -> bytes:
    """The request without the thoughts that carry our mark; as it is when there are none, or it cannot be read.

    Anthropic refuses what it did not sign. A turn that held nothing else goes with them: it takes the user's turns
    around it as one. And where a model that is told a budget lost the thoughts before the calls whose results end the
    request, which it insists on, it does not think this time. All else stays as it came, to the byte.
    """
    try:
        request = lenient.decode(_object, body)
        messages = lenient.decode(_list, request["messages"])
        kept = [mended for raw in messages if (mended := _without_foreign(raw)) is not None]
        if all(new is old for new, old in zip(kept, messages, strict=False)) and len(kept) == len(messages):
            return body
        request["messages"] = msgspec.Raw(_encode(kept))
        if _thinks_by_budget(request) and _lacks_thoughts(kept):
            del request["thinking"]
            _keep_thinking(request)
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
    if len(messages) < 2:
        return False
    last, before = (lenient.decode(_message, raw) for raw in (messages[-1], messages[-2]))
    if not isinstance(last.content, list) or not isinstance(before.content, list) or before.role != "assistant":
        return False
    if not any(_type(block) == "tool_result" for block in last.content):
        return False
    return _type(before.content[0]) not in ("thinking", "redacted_thinking") if before.content else False


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
