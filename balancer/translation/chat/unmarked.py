"""Requests for chat completions as services of the same API get them: without what only other APIs' vendors signed."""

from __future__ import annotations

import msgspec

from balancer import lenient
from balancer.translation.marks import PREFIX_BYTES

_MEMBER = "reasoning_details"
_body = msgspec.json.Decoder(dict[str, msgspec.Raw])
_messages = msgspec.json.Decoder(list[dict[str, msgspec.Raw]])


def without_foreign(body: bytes) -> bytes:
    """The body without the `reasoning_details` in which one of our marks stands: few vendors know that member at all.

    The same object where there are none. What cannot be read is the vendor's to refuse.
    """
    try:
        members = lenient.decode(_body, body)
        messages = lenient.decode(_messages, members["messages"])
    except (KeyError, *lenient.UNREADABLE):
        return body
    marked = [message for message in messages if _MEMBER in message and PREFIX_BYTES in bytes(message[_MEMBER])]
    if not marked:
        return body
    for message in marked:
        del message[_MEMBER]
    return msgspec.json.encode(members | {"messages": msgspec.Raw(msgspec.json.encode(messages))})
