"""What the official SDK says of shapes: the judge of what is written here."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.chat.completion_create_params import (
    CompletionCreateParamsNonStreaming,
    CompletionCreateParamsStreaming,
)
from pydantic import TypeAdapter

from balancer.sse import Event, Parser

_REQUEST: TypeAdapter[Any] = TypeAdapter(CompletionCreateParamsNonStreaming)
_STREAMING: TypeAdapter[Any] = TypeAdapter(CompletionCreateParamsStreaming)


def sdk_request(body: bytes) -> dict[str, Any]:
    """The request; raises where it is none by the SDK's types, and where it has what they do not know."""
    given: dict[str, Any] = json.loads(body)
    judge = _STREAMING if given.get("stream") else _REQUEST
    assert _walked(judge.validate_python(given)) == given
    return given


def _walked(value: Any) -> Any:
    """The value with its lazy lists walked: each item is judged on the way."""
    if isinstance(value, dict):
        return {key: _walked(each) for key, each in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str | bytes):
        return [_walked(each) for each in value]
    return value


def sdk_answer(body: bytes) -> dict[str, Any]:
    """The answer; raises where it is none by the SDK's types."""
    ChatCompletion.model_validate_json(body, strict=True)
    answer: dict[str, Any] = json.loads(body)
    return answer


def sdk_chunks(stream: bytes) -> list[dict[str, Any]]:
    """The chunks of a stream that ends as it should; raises where one is none by the SDK's types."""
    events = [event.data for event in Parser().feed(stream) if event.data]
    assert events[-1] == b"[DONE]"
    chunks = []
    for data in events[:-1]:
        ChatCompletionChunk.model_validate_json(data, strict=True)
        chunks.append(json.loads(data))
    return chunks


def events(*data: object) -> list[Event]:
    """Events with this data, as an upstream sends them."""
    texts = (each if isinstance(each, str) else json.dumps(each) for each in data)
    return Parser().feed("".join(f"data: {text}\n\n" for text in texts).encode())
