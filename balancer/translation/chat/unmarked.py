"""Requests for chat completions as services of the same API get them: without what only other APIs' vendors signed."""

from __future__ import annotations

import msgspec

from balancer import lenient
from balancer.translation.chat import models
from balancer.translation.marks import PREFIX_BYTES

_DETAILS = "reasoning_details"
_THOUGHT = "reasoning_content"
_body = msgspec.json.Decoder(dict[str, msgspec.Raw])
_messages = msgspec.json.Decoder(list[dict[str, msgspec.Raw]])


def without_foreign(body: bytes, model: str = "") -> bytes:
    """The body without what other vendors' models thought: where one of our marks stands in `reasoning_details`.

    OpenAI's own models know no such members at all. DeepSeek's and Moonshot's want a thought beside every call, and get
    a blank one where it was not theirs. The same object where nothing changes. What cannot be read is the vendor's to
    refuse.
    """
    try:
        members = lenient.decode(_body, body)
        messages = lenient.decode(_messages, members["messages"])
    except (KeyError, *lenient.UNREADABLE):
        return body
    family = models.family(model)
    changed = [_change(message, family) for message in messages]
    if not any(changed):
        return body
    return msgspec.json.encode(members | {"messages": msgspec.Raw(msgspec.json.encode(messages))})


def _change(message: dict[str, msgspec.Raw], family: models.Family) -> bool:
    """Changes a message in place; True when there was something to change."""
    details = message.get(_DETAILS)
    is_foreign = details is not None and PREFIX_BYTES in bytes(details)
    if family.is_own or (details is not None and family.blank_thought is not None):
        is_foreign = details is not None or _THOUGHT in message
    if is_foreign:
        message.pop(_DETAILS, None)
        message.pop(_THOUGHT, None)
    lacks_thought = family.blank_thought is not None and "tool_calls" in message and _THOUGHT not in message
    if lacks_thought:
        message[_THOUGHT] = msgspec.Raw(msgspec.json.encode(family.blank_thought))
    return is_foreign or lacks_thought
