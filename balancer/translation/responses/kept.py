"""What an answer needs of its request beside what was said: it travels in the conversation as JSON."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from balancer.domain import Struct
from balancer.translation.conversation import Conversation


class Kept(Struct, frozen=True, kw_only=True):
    """`repeated` is an object with the request's members that the answer has again, in the client's words.

    `is_sealed`: the client keeps what the model thought, and wants the signatures with it.
    """

    repeated: msgspec.Raw = msgspec.Raw(b'{"tools":[],"tool_choice":"auto","parallel_tool_calls":true}')
    is_sealed: bool = False
    namespaces: Mapping[str, tuple[str, str]] = {}


_decoder = msgspec.json.Decoder(Kept)
_NONE = Kept()


def kept_of(conversation: Conversation) -> Kept:
    """What was kept of the request; defaults where another API's reader has read it."""
    return _decoder.decode(conversation.kept) if bytes(conversation.kept) else _NONE
