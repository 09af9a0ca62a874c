"""What Anthropic's own SDK makes of what we write: its types check requests, its accumulation reads streams."""

from __future__ import annotations

import itertools
from typing import Any, cast

import msgspec
from anthropic.lib.streaming._messages import accumulate_event
from anthropic.types import (
    ContentBlockParam,
    Message,
    MessageParam,
    OutputConfigParam,
    RawMessageStreamEvent,
    TextBlockParam,
    ThinkingConfigParam,
    ToolChoiceParam,
    ToolParam,
)
from anthropic.types.parsed_message import ParsedMessage
from pydantic import TypeAdapter

from balancer import sse

_EVENT: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)
_MESSAGE: TypeAdapter[Any] = TypeAdapter(MessageParam)
_BLOCK: TypeAdapter[Any] = TypeAdapter(ContentBlockParam)
_TEXT: TypeAdapter[Any] = TypeAdapter(TextBlockParam)
_TOOL: TypeAdapter[Any] = TypeAdapter(ToolParam)
_ONES: dict[str, TypeAdapter[Any]] = {
    "thinking": TypeAdapter(ThinkingConfigParam),
    "output_config": TypeAdapter(OutputConfigParam),
    "tool_choice": TypeAdapter(ToolChoiceParam),
    "max_tokens": TypeAdapter(int),
    "stop_sequences": TypeAdapter(list[str]),
}


def request_of(body: bytes) -> dict[str, Any]:
    """A request that the SDK's types take, decoded."""
    request = cast("dict[str, Any]", msgspec.json.decode(body))
    assert request["max_tokens"] > 0
    for message in request["messages"]:
        _MESSAGE.validate_python(message)
        assert message["content"], message
        for block in message["content"]:
            _BLOCK.validate_python(block)
            for inner in block.get("content", ()) if block["type"] == "tool_result" else ():
                _BLOCK.validate_python(inner)
    for block in request.get("system", ()):
        _TEXT.validate_python(block)
    for tool in request.get("tools", ()):
        _TOOL.validate_python(tool)
    for name, adapter in _ONES.items():
        if name in request:
            adapter.validate_python(request[name])
    roles = [message["role"] for message in request["messages"]]
    assert roles[0] == "user"
    assert all(role != before for before, role in itertools.pairwise(roles)), roles
    return request


def events_of(stream: bytes, *, opened: int | None = None) -> list[dict[str, Any]]:
    """A stream's events, decoded; each is named as its data says, and blocks follow one behind the other.

    `opened` is the block that is open before them.
    """
    parser = sse.Parser()
    found: list[dict[str, Any]] = []
    blocks = 0 if opened is None else opened + 1
    for event in parser.feed(stream):
        data = msgspec.json.decode(event.data)
        assert event.name == data["type"]
        match event.name:
            case "content_block_start":
                assert opened is None
                assert data["index"] == blocks
                opened, blocks = blocks, blocks + 1
            case "content_block_delta":
                assert data["index"] == opened
            case "content_block_stop":
                assert data["index"] == opened
                opened = None
            case "message_delta" | "message_stop":
                assert opened is None
            case _:
                pass
        found.append(data)
    assert parser.tail == b""
    return found


def message_of(stream: bytes) -> Message:
    """The message that the SDK accumulates from a stream; each event has the shape that its types ask for."""
    snapshot: ParsedMessage[Any] | None = None
    buffers: dict[int, bytes] = {}
    names = []
    for data in events_of(stream):
        names.append(data["type"])
        if data["type"] == "ping":
            continue
        event = _EVENT.validate_python(data)
        snapshot = accumulate_event(event=event, current_snapshot=snapshot, json_bufs=buffers)
    assert snapshot is not None
    assert names[-1] == "message_stop"
    return Message.model_validate(snapshot.to_dict())
