"""The official SDKs through the gateway, against fake accounts that answer like the real APIs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import anthropic
import openai
import pytest

from balancer.cli.accounts import FakeAccount
from tests.gateway.conftest import Serve, Served

TOOL = {
    "name": "weather",
    "description": "the weather in a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
MESSAGES: Any = [{"role": "user", "content": "what about fleets?"}]


@pytest.fixture
async def accounts() -> AsyncIterator[list[FakeAccount]]:
    async with FakeAccount("one", "key-one-0123") as one, FakeAccount("two", "key-two-0123") as two:
        yield [one, two]


@pytest.fixture
async def gateway(serve: Serve, accounts: list[FakeAccount]) -> Served:
    """Every model over two accounts, one request in turn."""
    providers = [
        {"name": f"{account.name}-{style}", "api_base": account.url, "api_style": style, "token": account.api_key}
        for account in accounts
        for style in ("openai", "anthropic")
    ]
    rules = [
        {
            "scenario": style,
            "request_model": f"{style}-model",
            "lb_tactic": {"type": "round_robin", "params": {"request_threshold": 1}},
            "services": [{"provider": f"{account.name}-{style}", "model": f"{account.name}-m"} for account in accounts],
        }
        for style in ("openai", "anthropic")
    ]
    return await serve({"providers": providers, "rules": rules}, client_tokens="team-token")


def an_openai(gateway: Served, key: str = "team-token") -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key=key, max_retries=0)


def an_anthropic(gateway: Served, key: str = "team-token") -> anthropic.AsyncAnthropic:
    return anthropic.AsyncAnthropic(base_url=gateway.url, api_key=key, max_retries=0)


async def assert_books_agree(gateway: Served, accounts: list[FakeAccount]) -> None:
    """Every service's counters are what its account reported."""
    for account in accounts:
        theirs = account.ledger.models[f"{account.name}-m"]
        names = [f"{account.name}-{style}:{account.name}-m" for style in ("openai", "anthropic")]
        view = await gateway.view()
        ours = [view.services[name] for name in names if name in view.services]
        assert sum(state.requests for state in ours) == theirs.requests
        assert sum(state.input for state in ours) == theirs.input
        assert sum(state.output for state in ours) == theirs.output


async def test_openai_chat_in_json_and_in_a_stream(gateway: Served, accounts: list[FakeAccount]) -> None:
    async with an_openai(gateway) as client:
        answer = await client.chat.completions.create(model="openai-model", messages=MESSAGES)
        assert answer.choices[0].message.content
        assert answer.model == "one-m"
        stream = await client.chat.completions.create(model="openai-model", messages=MESSAGES, stream=True)
        chunks = [chunk async for chunk in stream]
        assert chunks[0].model == "two-m"
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert all(chunk.usage is None for chunk in chunks)
        stream = await client.chat.completions.create(
            model="openai-model", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        assert chunks[-1].usage is not None
    await assert_books_agree(gateway, accounts)


async def test_openai_tools_in_json_and_in_a_stream(gateway: Served) -> None:
    more: Any = {"tools": [{"type": "function", "function": TOOL}], "tool_choice": "required"}
    async with an_openai(gateway) as client:
        answer: Any = await client.chat.completions.create(model="openai-model", messages=MESSAGES, **more)
        assert answer.choices[0].message.tool_calls[0].function.arguments == '{"city":"Paris"}'
        stream: Any = await client.chat.completions.create(model="openai-model", messages=MESSAGES, stream=True, **more)
        calls = [c.choices[0].delta.tool_calls[0] async for c in stream if c.choices[0].delta.tool_calls]
        assert "".join(call.function.arguments for call in calls) == '{"city":"Paris"}'


async def test_openai_responses_embeddings_models_and_sound(gateway: Served, accounts: list[FakeAccount]) -> None:
    async with an_openai(gateway) as client:
        answer = await client.responses.create(model="openai-model", input="hello")
        assert answer.output_text
        stream = await client.responses.create(model="openai-model", input="hello", stream=True)
        kinds = [event.type async for event in stream]
        assert kinds[-1] == "response.completed"
        vectors = await client.embeddings.create(model="openai-model", input="hello", encoding_format="float")
        assert vectors.data[0].embedding == [0.25, -0.5, 0.125]
        assert [model.id async for model in client.models.list()] == ["openai-model"]
        speech = await client.audio.speech.create(model="openai-model", input="hello", voice="alloy")
        assert len(speech.content) == 256 * 64
        text = await client.audio.transcriptions.create(model="openai-model", file=("a.wav", b"RIFF"))
        assert text.text == "hello"
    await assert_books_agree(gateway, accounts)


async def test_openai_errors_become_the_sdk_s_exceptions(gateway: Served) -> None:
    number: Any = 7
    async with an_openai(gateway) as client:
        with pytest.raises(openai.NotFoundError, match="openai-model"):
            await client.chat.completions.create(model="nope", messages=MESSAGES)
        with pytest.raises(openai.BadRequestError):
            await client.chat.completions.create(model=number, messages=MESSAGES)
    async with an_openai(gateway, key="wrong") as client:
        with pytest.raises(openai.AuthenticationError):
            await client.chat.completions.create(model="openai-model", messages=MESSAGES)


async def test_anthropic_messages_in_json_and_in_a_stream(gateway: Served, accounts: list[FakeAccount]) -> None:
    async with an_anthropic(gateway) as client:
        answer: Any = await client.messages.create(model="anthropic-model", max_tokens=30, messages=MESSAGES)
        assert answer.content[0].text
        async with client.messages.stream(model="anthropic-model", max_tokens=30, messages=MESSAGES) as stream:
            assert "".join([text async for text in stream.text_stream])
            assert (await stream.get_final_message()).usage.output_tokens > 0
        counted = await client.messages.count_tokens(model="anthropic-model", messages=MESSAGES)
        assert counted.input_tokens > 0
        assert [model.id async for model in client.models.list()] == ["anthropic-model"]
    await assert_books_agree(gateway, accounts)


async def test_anthropic_tools_in_json_and_in_a_stream(gateway: Served) -> None:
    tool = {"name": "weather", "description": "the weather", "input_schema": TOOL["parameters"]}
    more: Any = {"tools": [tool], "tool_choice": {"type": "any"}, "max_tokens": 30, "messages": MESSAGES}
    async with an_anthropic(gateway) as client:
        answer: Any = await client.messages.create(model="anthropic-model", **more)
        assert answer.content[0].input == {"city": "Paris"}
        async with client.messages.stream(model="anthropic-model", **more) as stream:
            final: Any = await stream.get_final_message()
        assert final.content[0].input == {"city": "Paris"}


async def test_anthropic_errors_become_the_sdk_s_exceptions(gateway: Served) -> None:
    async with an_anthropic(gateway) as client:
        with pytest.raises(anthropic.NotFoundError, match="anthropic-model"):
            await client.messages.create(model="nope", max_tokens=3, messages=MESSAGES)
    async with an_anthropic(gateway, key="wrong") as client:
        with pytest.raises(anthropic.AuthenticationError):
            await client.messages.create(model="anthropic-model", max_tokens=3, messages=MESSAGES)


async def test_the_sync_sdks_work_too(gateway: Served) -> None:
    def ask() -> tuple[str | None, int]:
        with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="team-token") as one:
            answer = one.chat.completions.create(model="openai-model", messages=MESSAGES)
            pieces = list(one.chat.completions.create(model="openai-model", messages=MESSAGES, stream=True))
        with anthropic.Anthropic(base_url=gateway.url, api_key="team-token") as two:
            message = two.messages.create(model="anthropic-model", max_tokens=30, messages=MESSAGES)
            with two.messages.stream(model="anthropic-model", max_tokens=30, messages=MESSAGES) as stream:
                text = "".join(stream.text_stream)
        assert text
        return answer.choices[0].message.content, len(pieces) + message.usage.output_tokens

    content, count = await asyncio.to_thread(ask)
    assert content
    assert count > 2
