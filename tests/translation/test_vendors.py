"""The fake vendors: the official SDKs understand what they say, and they refuse what the real ones refuse."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import anthropic
import msgspec
import openai
import pytest
from google.genai import types

from tests.vendors.chat import Chat
from tests.vendors.google import SKIPPED, Google
from tests.vendors.messages import Messages
from tests.vendors.replies import Reply, Say, Think, Tokens, Use, reply
from tests.vendors.serving import KEY

THOUGHTFUL = reply(
    Think("Two cities, two calls."),
    Say("I look them up."),
    Use("weather", {"city": "Zürich"}),
    Use("weather", {"city": "Bern"}),
    input=200,
    cached=64,
    output=90,
    reasoning=40,
)
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
ASKED: list[Any] = [{"role": "user", "content": "What is the weather in Zürich and Bern?"}]


@pytest.fixture
async def messages() -> AsyncIterator[Messages]:
    async with Messages().running() as vendor:
        assert isinstance(vendor, Messages)
        yield vendor


@pytest.fixture
async def chat() -> AsyncIterator[Chat]:
    async with Chat(thinks=True).running() as vendor:
        assert isinstance(vendor, Chat)
        yield vendor


@pytest.fixture
async def google() -> AsyncIterator[Google]:
    async with Google().running() as vendor:
        assert isinstance(vendor, Google)
        yield vendor


async def test_anthropic_s_sdk_understands_the_fake_one_and_a_tool_loop_goes_through(messages: Messages) -> None:
    tools: list[Any] = [{"name": "weather", "description": "w", "input_schema": SCHEMA}]
    more: dict[str, Any] = {
        "model": "claude-opus-4-5",
        "max_tokens": 9000,
        "tools": tools,
        "thinking": {"type": "enabled", "budget_tokens": 4096},
    }
    said = list(ASKED)
    messages.says(THOUGHTFUL, THOUGHTFUL, reply(Say("Rain.")))
    async with anthropic.AsyncAnthropic(base_url=messages.url, api_key=KEY, max_retries=0) as client:
        for streams in (True, False):
            if streams:
                async with client.messages.stream(messages=said, **more) as stream:
                    answer = await stream.get_final_message()
            else:
                answer = await client.messages.create(messages=said, **more)
            assert [block.type for block in answer.content] == ["thinking", "text", "tool_use", "tool_use"]
            assert answer.stop_reason == "tool_use"
            assert (answer.usage.input_tokens, answer.usage.cache_read_input_tokens) == (136, 64)
            results = [
                {"type": "tool_result", "tool_use_id": block.id, "content": "rain"}
                for block in answer.content
                if block.type == "tool_use"
            ]
            said += [{"role": "assistant", "content": answer.content}, {"role": "user", "content": results}]
        last = await client.messages.create(messages=said, **more)
    assert last.stop_reason == "end_turn"
    assert messages.refusals == []
    assert messages.account == Tokens(requests=3, input=136 * 2 + 120, output=210, cached=128, reasoning=80)


async def test_openai_s_sdk_understands_the_fake_one_and_a_tool_loop_goes_through(chat: Chat) -> None:
    tools: list[Any] = [{"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}]
    said = list(ASKED)
    chat.says(THOUGHTFUL, THOUGHTFUL, reply(Say("Rain.")))
    async with openai.AsyncOpenAI(base_url=f"{chat.url}/v1", api_key=KEY, max_retries=0) as client:
        for streams in (True, False):
            if streams:
                options: Any = {"include_usage": True}
                async with client.chat.completions.stream(
                    model="deepseek-v4", messages=said, tools=tools, stream_options=options
                ) as stream:
                    answer: Any = await stream.get_final_completion()
            else:
                answer = await client.chat.completions.create(model="deepseek-v4", messages=said, tools=tools)
            message = answer.choices[0].message
            assert message.content == "I look them up."
            assert message.reasoning_content == "Two cities, two calls."
            assert [call.function.arguments for call in message.tool_calls] == ['{"city":"Zürich"}', '{"city":"Bern"}']
            assert answer.usage.prompt_tokens_details.cached_tokens == 64
            said.append(message.model_dump(exclude_none=True, exclude={"annotations", "parsed", "refusal"}))
            for call in said[-1]["tool_calls"]:
                call["function"].pop("parsed_arguments", None)
                call.pop("index", None)
                said.append({"role": "tool", "tool_call_id": call["id"], "content": "rain"})
        await client.chat.completions.create(model="deepseek-v4", messages=said, tools=tools)
    assert chat.refusals == []
    assert chat.account == Tokens(requests=3, input=520, output=210, cached=128, reasoning=80)


async def test_google_s_types_understand_the_fake_one_and_a_tool_loop_goes_through(google: Google) -> None:
    google.says(THOUGHTFUL, reply(Say("Rain.")))
    said: list[Any] = [{"role": "user", "parts": [{"text": "What is the weather?"}]}]
    body = {
        "contents": said,
        "tools": [{"functionDeclarations": [{"name": "weather", "parametersJsonSchema": SCHEMA}]}],
        "generationConfig": {"thinkingConfig": {"thinkingLevel": "high", "includeThoughts": True}},
    }
    async with aiohttp.ClientSession(headers={"x-goog-api-key": KEY}) as session:
        base = f"{google.url}/v1beta/models/gemini-3-pro-preview"
        async with session.post(f"{base}:generateContent", json=body) as response:
            answer = await response.json()
        read = types.GenerateContentResponse.model_validate(answer)
        assert read.function_calls is not None
        assert [call.args for call in read.function_calls] == [{"city": "Zürich"}, {"city": "Bern"}]
        content = answer["candidates"][0]["content"]
        gone = [{"functionResponse": {"name": "weather", "response": {"result": "rain"}}}] * 2
        said += [content, {"role": "user", "parts": gone}]
        async with session.post(f"{base}:streamGenerateContent?alt=sse", json=body) as response:
            events = [line[6:] for line in (await response.read()).split(b"\r\n\r\n") if line]
        for event in events:
            types.GenerateContentResponse.model_validate(msgspec.json.decode(event))
        for part in content["parts"]:
            part.pop("thoughtSignature", None)
        async with session.post(f"{base}:generateContent", json=body) as response:
            assert response.status == 400
        content["parts"][2]["thoughtSignature"] = SKIPPED
        async with session.post(f"{base}:generateContent", json=body) as response:
            assert response.status == 200, await response.text()
    assert google.refusals == [
        "Function call is missing a thought_signature in functionCall parts: weather, contents[1].parts[2]."
    ]


CALL = {"role": "assistant", "content": [{"type": "tool_use", "id": "t1", "name": "weather", "input": {}}]}
RESULT = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1", "content": "rain"}]}
FORGED = {"role": "assistant", "content": [{"type": "thinking", "thinking": "x", "signature": "Zm9yZ2Vk"}]}
THINKS = {"max_tokens": 4000, "thinking": {"type": "enabled", "budget_tokens": 2048}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_tokens": None}, "max_tokens: an integer"),
        ({"n": 1}, "n: Extra inputs"),
        ({"messages": [*ASKED, *ASKED]}, "must alternate"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": ""}]}]}, "non-whitespace"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "at": 1}]}]}, "Extra inputs"),
        ({"messages": [*ASKED, CALL, *ASKED]}, "without `tool_result`"),
        ({"messages": [*ASKED, RESULT]}, "must alternate"),
        ({"messages": [*ASKED, FORGED, *ASKED]}, "Invalid `signature`"),
        ({"messages": [*ASKED, CALL, RESULT], **THINKS}, "must start with a thinking block"),
        ({"temperature": 1.5}, "range: 0..1"),
        ({"temperature": 0.5, "top_p": 0.5}, "cannot both"),
        ({"temperature": 0.5, **THINKS}, "may only be set to 1"),
        ({**THINKS, "max_tokens": 2048}, "greater than"),
        ({"model": "claude-opus-4-7", "temperature": 1}, "deprecated"),
        ({"model": "claude-opus-4-7", **THINKS}, "not supported"),
        ({"thinking": {"type": "adaptive"}}, "adaptive thinking is not supported"),
        ({"tools": [{"name": "a b", "input_schema": SCHEMA}]}, "should match pattern"),
        ({"tool_choice": {"type": "auto"}}, "while providing tools"),
    ],
)
async def test_the_fake_anthropic_refuses_what_the_real_one_does(
    messages: Messages, change: dict[str, Any], message: str
) -> None:
    body = {"model": "claude-sonnet-4-5", "max_tokens": 99, "messages": ASKED} | change
    headers = {"x-api-key": KEY, "anthropic-version": "2023-06-01"}
    async with (
        aiohttp.ClientSession(headers=headers) as session,
        session.post(f"{messages.url}/v1/messages", json=body) as response,
    ):
        assert response.status == 400, await response.text()
        assert message in (await response.json())["error"]["message"]


CALLS = {
    "role": "assistant",
    "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}],
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_k": 4}, "top_k: Extra inputs"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "cache_control": {}}]}]}, "Extra"),
        ({"messages": [*ASKED, CALLS, *ASKED]}, "must be followed by tool messages"),
        ({"messages": [*ASKED, {"role": "tool", "tool_call_id": "c1", "content": "rain"}]}, "must be a response"),
        ({"messages": [*ASKED, {"role": "assistant", "content": "a", "reasoning_content": "b"}]}, "Extra inputs"),
        ({"model": "gpt-5", "max_tokens": 5}, "max_completion_tokens"),
        ({"model": "gpt-5", "temperature": 0.5}, "does not support"),
        ({"reasoning_effort": "low"}, "Unrecognized"),
        ({"tools": []}, "empty array"),
        ({"parallel_tool_calls": True}, "only allowed when 'tools'"),
        ({"response_format": {"type": "json_object"}}, "the word 'json'"),
        ({"stream_options": {"include_usage": True}}, "only allowed when 'stream'"),
    ],
)
async def test_the_fake_openai_refuses_what_the_real_one_does(change: dict[str, Any], message: str) -> None:
    body = {"model": "gpt-4o", "messages": ASKED} | change
    async with (
        Chat().running() as vendor,
        aiohttp.ClientSession(headers={"authorization": f"Bearer {KEY}"}) as session,
        session.post(f"{vendor.url}/v1/chat/completions", json=body) as response,
    ):
        assert response.status == 400, await response.text()
        assert message in (await response.json())["error"]["message"]


def _said(*parts: Any, role: str = "user") -> dict[str, Any]:
    return {"role": role, "parts": list(parts)}


HELLO = _said({"text": "hello"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"system": "x"}, "system: Extra inputs"),
        ({"contents": [HELLO, HELLO]}, "alternate"),
        ({"contents": [_said({"text": ""})]}, "empty text"),
        ({"contents": [_said()]}, "must not be empty"),
        ({"contents": [{"role": "assistant", "parts": [{"text": "a"}]}]}, "'assistant' is none of"),
        ({"contents": [HELLO, _said({"functionCall": {"name": "f"}}, role="model"), HELLO]}, "number of function"),
        ({"contents": [HELLO, _said({"text": "a", "thoughtSignature": "Zm9v"}, role="model"), HELLO]}, "not valid"),
        ({"generationConfig": {"max_tokens": 5}}, "Extra inputs"),
        ({"generationConfig": {"responseJsonSchema": {}}}, "needs responseMimeType"),
        ({"generationConfig": {"thinkingConfig": {"thinkingLevel": "low", "thinkingBudget": 5}}}, "only one"),
        ({"generationConfig": {"stopSequences": list("abcdef")}}, "at most 5"),
        ({"toolConfig": {"functionCallingConfig": {"mode": "ANY"}}}, "no function declarations"),
    ],
)
async def test_the_fake_google_refuses_what_the_real_one_does(
    google: Google, change: dict[str, Any], message: str
) -> None:
    url = f"{google.url}/v1beta/models/gemini-3-flash:generateContent"
    async with (
        aiohttp.ClientSession(headers={"x-goog-api-key": KEY}) as session,
        session.post(url, json={"contents": [HELLO]} | change) as response,
    ):
        assert response.status == 400, await response.text()
        assert message in (await response.json())["error"]["message"]


@pytest.mark.parametrize("status", [429, 500])
async def test_the_fake_ones_fail_as_they_are_told(messages: Messages, chat: Chat, status: int) -> None:
    fails = Reply(status=status, message="no", headers=(("Retry-After", "7"),))
    messages.says(fails)
    chat.says(fails)
    async with anthropic.AsyncAnthropic(base_url=messages.url, api_key=KEY, max_retries=0) as one:
        with pytest.raises(anthropic.APIStatusError) as told:
            await one.messages.create(model="claude-opus-4-5", max_tokens=9, messages=ASKED)
    async with openai.AsyncOpenAI(base_url=f"{chat.url}/v1", api_key=KEY, max_retries=0) as two:
        with pytest.raises(openai.APIStatusError) as told_too:
            await two.chat.completions.create(model="gpt-4o", messages=ASKED)
    for failure in (told.value, told_too.value):
        assert failure.status_code == status
        assert failure.response.headers["retry-after"] == "7"
