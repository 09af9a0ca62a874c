"""What is written for Google, and what it answers, in the types of Google's own SDK; they take no unknown field."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from google.genai import types
from pydantic import BaseModel

from balancer.translation.conversation import (
    Call,
    Choice,
    Conversation,
    Effort,
    Format,
    Media,
    Reasoning,
    Result,
    Target,
    Text,
    Thinking,
    Tool,
    Turn,
)
from balancer.translation.google.answers import read_answer
from balancer.translation.google.writing import write_request

MODELS = ("gemini-3-pro-preview", "gemini-3.6-flash", "gemini-2.5-pro", "gemini-2.0-flash", "endpoints/123")
SCHEMA = msgspec.Raw(b'{"type":"object","properties":{"city":{"type":"string"}},"required":["city"]}')
PICTURE = Media(kind="image", media_type="image/png", data="iVBORw0KGgo=")
LOOP = (
    Turn(role="user", parts=(Text(text="hi"), PICTURE, Media(kind="document", url="https://example.com/a.pdf"))),
    Turn(
        role="assistant",
        parts=(
            Thinking(text="hm", signature="0:U0E=", vendor="google"),
            Text(text="See."),
            Call(id="a", name="weather", arguments='{"city":"Bern"}'),
            Call(id="b", name="patch", arguments="+1", kind="custom"),
        ),
    ),
    Turn(
        role="user",
        parts=(
            Result(call_id="b", content=(Text(text="no"),), is_error=True),
            Result(call_id="a", content=(Text(text='{"rain":true}'), PICTURE)),
        ),
    ),
    Turn(role="system", parts=(Text(text="Be brief."),)),
)
TOOLS = (Tool(name="weather", schema=SCHEMA, is_strict=True), Tool(name="patch", kind="custom"), Tool(name="now"))
CASES: dict[str, dict[str, Any]] = {
    "loop": {"turns": LOOP, "tools": TOOLS, "system": (Text(text="S"),)},
    "none": {"tools": TOOLS, "choice": Choice(mode="none")},
    "any": {"tools": TOOLS, "choice": Choice(mode="any", among=("now",))},
    "named": {"tools": TOOLS, "choice": Choice(mode="named", name="now")},
    "form": {"format": Format(schema=SCHEMA)},
    "form and tools": {"format": Format(schema=SCHEMA), "tools": TOOLS},
    "any object": {"format": Format()},
    "sampling": {
        "max_tokens": 5, "temperature": 0.5, "top_p": 0.5, "top_k": 3, "seed": 7, "stop": ("a",),
        "presence_penalty": 0.5, "frequency_penalty": 0.5,
    },
    "adaptive": {"reasoning": Reasoning(is_adaptive=True)},
    "budget": {"reasoning": Reasoning(budget_tokens=3000, is_shown=False)},
}  # fmt: skip
EFFORTS: tuple[Effort, ...] = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
CASES |= {f"effort {effort}": {"reasoning": Reasoning(effort=effort)} for effort in EFFORTS}
_KINDS: dict[str, type[BaseModel]] = {
    "systemInstruction": types.Content,
    "toolConfig": types.ToolConfig,
    "generationConfig": types.GenerationConfig,
}


@pytest.mark.parametrize("asked", CASES.values(), ids=CASES)
@pytest.mark.parametrize("model", MODELS)
def test_a_request_is_what_the_sdk_would_send(model: str, asked: dict[str, Any]) -> None:
    conversation = Conversation(**({"model": "m", "turns": LOOP[:1]} | asked))

    body = msgspec.json.decode(write_request(conversation, Target(model=model, vendor="google")).body)

    for content in body.pop("contents"):
        assert types.Content.model_validate(content).parts
    for tool in body.pop("tools", ()):
        assert types.Tool.model_validate(tool).function_declarations
    for name, value in body.items():
        _KINDS[name].model_validate(value)


def test_an_answer_of_the_sdks_types_is_read() -> None:
    told = types.GenerateContentResponse(
        candidates=[
            types.Candidate(
                content=types.Content(
                    role="model",
                    parts=[
                        types.Part(text="hm", thought=True),
                        types.Part(function_call=types.FunctionCall(name="f", args={}), thought_signature=b"sign"),
                        types.Part(text="It rains."),
                    ],
                ),
                finish_reason=types.FinishReason.STOP,
            )
        ],
        response_id="r",
        model_version="gemini-3-pro",
    )

    answer = read_answer(
        told.model_dump_json(by_alias=True, exclude_none=True).encode(), Target(model="m", vendor="google")
    )

    call = answer.parts[1]
    assert isinstance(call, Call)
    assert answer.parts == (
        Thinking(text="hm", signature="0:c2lnbg==", vendor="google"),
        Call(id=call.id, name="f", arguments="{}"),
        Text(text="It rains."),
    )
    assert (answer.id, answer.model, answer.stop) == ("r", "gemini-3-pro", "tool")
