"""Conversations that another vendor continues at every request: tools, thoughts and results survive each hop.

The fake vendors refuse what the real ones do: a thought that another signed, a call without its result, a call of the
current turn without a signature, a tool loop with thinking on that does not begin with a thought.
"""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from tests.translation.conftest import World
from tests.vendors.google import Google
from tests.vendors.replies import Reply, Say, Think, Use, reply

ROUNDS = 6
NAMES = {
    "hop": ("claude", "gpt", "gemini"),
    "two": ("gpt", "claude"),
    "pairs": ("gemini", "opus"),
    "late": ("gpt", "opus", "deepseek"),
    "four": ("claude", "gpt", "gemini", "deepseek"),
}
pytestmark = pytest.mark.asyncio(loop_scope="module")
RULES = pytest.mark.parametrize("rule", list(NAMES))
WAYS = pytest.mark.parametrize("streams", [True, False], ids=["streams", "whole"])
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
QUESTION = "What is the weather in Zürich and Bern? «Now»"


def step(number: int) -> Reply:
    """What the model says at a round: a thought, a word, and one or two calls."""
    calls = [Use("weather", {"city": f"Zürich {number}"})]
    if number % 2:
        calls.append(Use("weather", {"city": 'Bern "old" \\ 🌦'}))
    said = [Say(f"Step {number}.")] if number % 3 else []
    # Claude's later models show nothing of a thought but its signature, unless they are asked to.
    return reply(
        Think(f"I think {number}." if number % 4 else ""),
        *said,
        *calls,
        input=100 + number,
        cached=10,
        output=40,
        reasoning=12,
    )


def a_play() -> list[Reply]:
    """A tool loop of several rounds, an answer, and another loop for the next question."""
    first = [step(n) for n in range(ROUNDS)]
    return [*first, reply(Think("Done."), Say("It rains.")), *first[:4], reply(Say("Still."))]


def results(calls: list[tuple[str, str, dict[str, Any]]]) -> list[tuple[str, str]]:
    """What the tool gives for each call: its id, and a text."""
    for _, name, arguments in calls:
        assert name == "weather"
        assert set(arguments) == {"city"}
    return [(id_, f"rain in {arguments['city']}") for id_, _, arguments in calls]


def assert_play_was_understood(heard: list[tuple[str, list[str]]]) -> None:
    """The client has heard each text, and each city."""
    assert heard == [
        (
            "".join(part.text for part in said.parts if isinstance(part, Say)),
            [part.arguments["city"] for part in said.parts if isinstance(part, Use)],
        )
        for said in a_play()
    ]


def assert_all_were_asked(world: World, rule: str) -> None:
    """Nobody refused, and each vendor was in turn."""
    assert world.refusals == []
    names = NAMES[rule]
    counts = [len(world.bodies(name)) for name in names]
    assert sum(counts) == len(a_play())
    assert max(counts) - min(counts) <= 1
    if "gemini" in names:
        # It has got back what it signed itself, and not only the word that stands for a signature.
        google = world.vendors["gemini"]
        assert isinstance(google, Google)
        contents = google.bodies[-1]["contents"]
        returned = [part.get("thoughtSignature") for content in contents for part in content["parts"]]
        assert set(returned) & set(google.signed)


@RULES
@WAYS
async def test_chat_clients_go_on_with_every_vendor(world: World, rule: str, streams: bool) -> None:
    world.says(*a_play())
    tools: Any = [{"type": "function", "function": {"name": "weather", "parameters": SCHEMA, "strict": True}}]
    said: list[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": QUESTION}]
    heard = []
    client = world.openai
    for _ in a_play():
        message = await _chat(client, streams, model=rule, messages=said, tools=tools, reasoning_effort="high")
        calls = [
            (call["id"], call["function"]["name"], msgspec.json.decode(call["function"]["arguments"]))
            for call in message.get("tool_calls") or ()
        ]
        heard.append((message.get("content") or "", [arguments["city"] for _, _, arguments in calls]))
        said.append(message)
        said += ({"role": "tool", "tool_call_id": id_, "content": text} for id_, text in results(calls))
        if not calls:
            said.append({"role": "user", "content": "And now?"})
    assert_play_was_understood(heard)
    assert_all_were_asked(world, rule)
    await world.assert_books_agree()


async def _chat(client: Any, streams: bool, **asked: Any) -> dict[str, Any]:
    """The message as an agent keeps it: all that it was given, extra fields too."""
    if not streams:
        answer = await client.chat.completions.create(**asked)
        message: dict[str, Any] = answer.choices[0].message.model_dump(exclude_none=True)
        message.pop("annotations", None)
        return message
    message = {"role": "assistant", "content": ""}
    calls: dict[int, dict[str, Any]] = {}
    async for chunk in await client.chat.completions.create(stream=True, **asked):
        for choice in chunk.choices:
            delta = choice.delta.model_dump(exclude_none=True)
            message["content"] += delta.get("content", "")
            if "reasoning_content" in delta:
                message["reasoning_content"] = message.get("reasoning_content", "") + delta["reasoning_content"]
            message.setdefault("reasoning_details", []).extend(delta.get("reasoning_details", ()))
            for call in delta.get("tool_calls", ()):
                kept = calls.setdefault(call["index"], {"type": "function", "function": {"name": "", "arguments": ""}})
                kept |= {"id": call["id"]} if "id" in call else {}
                kept["function"]["name"] += call["function"].get("name", "")
                kept["function"]["arguments"] += call["function"].get("arguments", "")
    if calls:
        message["tool_calls"] = [calls[index] for index in sorted(calls)]
    if not message["reasoning_details"]:
        del message["reasoning_details"]
    message["content"] = message["content"] or None
    return message


@RULES
@WAYS
@pytest.mark.parametrize("thinking", ["enabled", "off"])
async def test_messages_clients_go_on_with_every_vendor(world: World, rule: str, streams: bool, thinking: str) -> None:
    world.says(*a_play())
    more: dict[str, Any] = {
        "model": rule,
        "max_tokens": 9000,
        "system": [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
        "tools": [{"name": "weather", "description": "The weather.", "input_schema": SCHEMA}],
    }
    if thinking == "enabled":
        more["thinking"] = (
            {"type": "adaptive"} if rule in ("pairs", "late") else {"type": "enabled", "budget_tokens": 4000}
        )
    said: list[Any] = [{"role": "user", "content": QUESTION}]
    heard = []
    client = world.anthropic
    for _ in a_play():
        if streams:
            async with client.messages.stream(messages=said, **more) as stream:
                answer = await stream.get_final_message()
        else:
            answer = await client.messages.create(messages=said, **more)
        blocks = [block.model_dump(exclude_none=True) for block in answer.content]
        calls = [(block["id"], block["name"], block["input"]) for block in blocks if block["type"] == "tool_use"]
        heard.append(
            (
                "".join(block["text"] for block in blocks if block["type"] == "text"),
                [arguments["city"] for _, _, arguments in calls],
            )
        )
        assert answer.stop_reason == ("tool_use" if calls else "end_turn")
        said.append({"role": "assistant", "content": [_sendable(block) for block in blocks]})
        content: list[Any] = [
            {"type": "tool_result", "tool_use_id": id_, "content": text} for id_, text in results(calls)
        ]
        said.append({"role": "user", "content": content or "And now?"})
    assert_play_was_understood(heard)
    assert_all_were_asked(world, rule)
    await world.assert_books_agree()


def _sendable(block: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in block.items() if name not in ("parsed_output", "caller", "citations")}


@RULES
@WAYS
async def test_responses_clients_go_on_with_every_vendor(world: World, rule: str, streams: bool) -> None:
    world.says(*a_play())
    more: dict[str, Any] = {
        "model": rule,
        "instructions": "Be brief.",
        "tools": [{"type": "function", "name": "weather", "parameters": SCHEMA, "strict": True}],
        "reasoning": {"effort": "high", "summary": "auto"},
        "include": ["reasoning.encrypted_content"],
        "store": False,
    }
    said: list[Any] = [{"role": "user", "content": QUESTION}]
    heard = []
    client = world.openai
    for _ in a_play():
        if streams:
            async with client.responses.stream(input=said, **more) as stream:
                answer = await stream.get_final_response()
        else:
            answer = await client.responses.create(input=said, **more)
        items = [item.model_dump(exclude_none=True) for item in answer.output]
        calls = [
            (item["call_id"], item["name"], msgspec.json.decode(item["arguments"]))
            for item in items
            if item["type"] == "function_call"
        ]
        heard.append((answer.output_text, [arguments["city"] for _, _, arguments in calls]))
        assert answer.status == "completed"
        said += ({name: item[name] for name in item if name not in ("parsed_arguments",)} for item in items)
        said += ({"type": "function_call_output", "call_id": id_, "output": text} for id_, text in results(calls))
        if not calls:
            said.append({"role": "user", "content": "And now?"})
    assert_play_was_understood(heard)
    assert_all_were_asked(world, rule)
    await world.assert_books_agree()
