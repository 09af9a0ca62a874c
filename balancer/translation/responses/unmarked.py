"""Requests for OpenAI's own responses API, whose input has what another vendor's model thought.

OpenAI refuses encrypted content that it has not made itself.
"""

from __future__ import annotations

import msgspec

from balancer import lenient
from balancer.translation import marks


class _Item(msgspec.Struct):
    type: object = None
    encrypted_content: object = None


_body = msgspec.json.Decoder(dict[str, msgspec.Raw])
_input = msgspec.json.Decoder(list[msgspec.Raw])
_item = msgspec.json.Decoder(_Item)


def without_foreign(body: bytes) -> bytes:
    """The body without the reasoning items that have one of our marks, all else as it is.

    A body without such items, or one that cannot be read, comes back untouched.
    """
    try:
        members = lenient.decode(_body, body)
        items = _input.decode(members.get("input", b"[]"))
        own = [item for item in items if not _is_foreign(item)]
    except lenient.UNREADABLE:
        return body
    if len(own) == len(items):
        return body
    members["input"] = msgspec.Raw(msgspec.json.encode(own))
    return msgspec.json.encode(members)


def _is_foreign(raw: msgspec.Raw) -> bool:
    if bytes(raw).find(marks.PREFIX_BYTES) < 0:
        return False
    try:
        item = _item.decode(raw)
    except msgspec.ValidationError:
        return False
    content = item.encrypted_content
    return item.type == "reasoning" and isinstance(content, str) and content.startswith(marks.PREFIX)
