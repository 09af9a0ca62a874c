"""The official SDKs through the gateway to mock servers that nobody here wrote: what these report is what we count."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import anthropic
import msgspec
import openai
import pytest

from tests import needs
from tests.gateway.conftest import KEY, Serve, Served

CLIENT_KEY = "client-secret-0123456789"
TOKENS = {"prompt_tokens": 21, "completion_tokens": 9, "input_tokens": 21, "output_tokens": 9}
TEXT = "Hi there, the fleet is well today and says hello."
ARGUMENTS = {"city": "Paris"}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
_ADDRESS = re.compile(rb"http://127\.0\.0\.1:\d+")

AIMOCK: Any = {
    "fixtures": [
        {"match": {"endpoint": "speech"}, "response": {"audio": "UklGRg==", "format": "mp3"}},
        {"match": {"endpoint": "transcription"}, "response": {"transcription": {"text": "hello"}}},
        {"match": {"endpoint": "image"}, "response": {"image": {"b64Json": "UklGRg=="}}},
        {
            "match": {"userMessage": "weather"},
            "response": {"toolCalls": [{"name": "weather", "arguments": json.dumps(ARGUMENTS)}], "usage": TOKENS},
        },
        {
            "match": {"userMessage": "too much"},
            "response": {"error": {"message": "slow down", "type": "rate_limit_error"}, "status": 429},
        },
        {"match": {"userMessage": "hello"}, "response": {"content": TEXT, "usage": TOKENS}},
    ]
}
FAKELLM: Any = {
    "version": 1,
    "rules": [
        {
            "name": "weather",
            "when": {"messages_contain": "weather"},
            "respond": {"tool_calls": [{"name": "weather", "arguments": ARGUMENTS}]},
        },
        {
            "name": "too much",
            "when": {"messages_contain": "too much"},
            "respond": {"status": 429, "error": "slow down"},
        },
        {"name": "hello", "respond": {"content": TEXT}},
    ],
}


class Mock(msgspec.Struct, frozen=True):
    """A foreign server, and how it says how many requests it has had."""

    name: str
    url: str
    journal: str
    count: Callable[[Any], int]


@contextlib.contextmanager
def running(arguments: list[str], folder: Path) -> Iterator[str]:
    """The address that a program prints once it listens on a port of its own choice; it ends with the block."""
    process = subprocess.Popen(
        arguments, cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert process.stdout is not None
    try:
        printed: list[bytes] = []
        for line in process.stdout:
            printed.append(line)
            address = _ADDRESS.search(line)
            if address and not address[0].endswith(b":0"):
                yield address[0].decode()
                return
        pytest.fail(f"it ended at once: {b''.join(printed).decode()}")
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture(scope="module")
def aimock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mock]:
    """aimock, which takes our upstream key only."""
    folder = tmp_path_factory.mktemp("aimock")
    (folder / "fixtures.json").write_text(json.dumps(AIMOCK))
    settings = {
        "port": 0,
        "host": "127.0.0.1",
        "auth": {"apiKeys": [KEY]},
        "llm": {"fixtures": str(folder / "fixtures.json")},
    }
    (folder / "aimock.json").write_text(json.dumps(settings))
    program = needs.program("npm:@copilotkit/aimock")
    assert program
    with running([program, "--config", str(folder / "aimock.json")], folder) as url:
        yield Mock("aimock", url, "/v1/_requests", len)


@pytest.fixture(scope="module")
def fakellm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mock]:
    """fakellm, which takes any key."""
    folder = tmp_path_factory.mktemp("fakellm")
    (folder / "fakellm.yaml").write_text(json.dumps(FAKELLM))
    with running([sys.executable, "-m", "fakellm.cli", "serve", "--port", "0"], folder) as url:
        yield Mock("fakellm", url, "/_fakellm/stats", lambda stats: int(stats["total_requests"]))


NEEDS_AIMOCK = pytest.mark.needs("npm:@copilotkit/aimock")
BOTH = [pytest.param("aimock", marks=NEEDS_AIMOCK), "fakellm"]


@pytest.fixture
def mock(request: pytest.FixtureRequest) -> Mock:
    """The foreign server that the test is about."""
    found: Mock = request.getfixturevalue(request.param)
    return found


Start = Callable[..., Awaitable["Books"]]


class Books:
    """A gateway before a foreign server, its clients, and what both sides have counted since the start."""

    def __init__(self, gateway: Served, mock: Mock, seen: int) -> None:
        self.openai = openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key=CLIENT_KEY, max_retries=0)
        self.anthropic = anthropic.AsyncAnthropic(base_url=gateway.url, api_key=CLIENT_KEY, max_retries=0)
        self.gateway = gateway
        self._mock = mock
        self._seen = seen

    async def assert_counted(self, style: str, requests: int, input_: int, output: int, failures: int = 0) -> None:
        """Ours are these, and the server has seen as many requests."""
        state = await self.gateway.service(f"{style}:up-model")
        ours = (state.requests, state.picks, state.input, state.output, state.failures)
        assert ours == (requests, requests, input_, output, failures)
        assert await seen_by(self._mock) - self._seen == requests


async def seen_by(mock: Mock) -> int:
    """How many requests the server has had."""
    headers = {"Authorization": f"Bearer {KEY}"}
    async with aiohttp.ClientSession() as session, session.get(mock.url + mock.journal, headers=headers) as response:
        return mock.count(await response.json())


@pytest.fixture
async def start(serve: Serve, mock: Mock) -> Start:
    """Starts a gateway before the mock."""

    async def go(token: str = KEY) -> Books:
        raw = {
            "providers": [
                {"name": style, "api_base": mock.url, "api_style": style, "token": token}
                for style in ("openai", "anthropic")
            ],
            "rules": [
                {
                    "scenario": style,
                    "request_model": f"{style}-model",
                    "services": [{"provider": style, "model": "up-model"}],
                }
                for style in ("openai", "anthropic")
            ],
        }
        return Books(await serve(raw, client_tokens=CLIENT_KEY, redis_deadline_ms=5000), mock, await seen_by(mock))

    return go


def saying(text: str) -> Any:
    """The messages of a request."""
    return [{"role": "user", "content": text}]


CHAT_TOOLS: Any = {"tools": [{"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}]}
MESSAGE_TOOLS: Any = {"tools": [{"name": "weather", "input_schema": SCHEMA}], "max_tokens": 30}


@pytest.mark.parametrize("mock", BOTH, indirect=True)
async def test_a_chat_answer(start: Start) -> None:
    books = await start()
    async with books.openai as client:
        answer: Any = await client.chat.completions.create(model="openai-model", messages=saying("hello"))
    assert (answer.model, answer.choices[0].message.content) == ("up-model", TEXT)
    assert answer.usage.prompt_tokens > 0
    await books.assert_counted("openai", 1, answer.usage.prompt_tokens, answer.usage.completion_tokens)


@pytest.mark.parametrize("mock", BOTH, indirect=True)
@pytest.mark.parametrize("asks", [True, False])
async def test_a_chat_stream(start: Start, mock: Mock, asks: bool) -> None:
    """There is nothing to count of fakellm's streams: they report no usage, also when asked."""
    books = await start()
    more: Any = {"stream_options": {"include_usage": True}} if asks else {}
    async with books.openai as client:
        stream: Any = await client.chat.completions.create(
            model="openai-model", messages=saying("hello"), stream=True, **more
        )
        chunks: list[Any] = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == TEXT
    told = [(chunk.usage.prompt_tokens, chunk.usage.completion_tokens) for chunk in chunks if chunk.usage]
    reports = mock.name == "aimock"
    assert told == ([(21, 9)] if asks and reports else [])
    assert all(chunk.choices for chunk in chunks) or (asks and reports)
    await books.assert_counted("openai", 1, *((21, 9) if reports else (0, 0)))


@pytest.mark.parametrize("mock", BOTH, indirect=True)
async def test_tools_in_a_chat(start: Start, mock: Mock) -> None:
    books = await start()
    request: Any = {"model": "openai-model", "messages": saying("what weather?"), **CHAT_TOOLS}
    async with books.openai as client:
        answer: Any = await client.chat.completions.create(**request)
        call = answer.choices[0].message.tool_calls[0].function
        assert (call.name, json.loads(call.arguments)) == ("weather", ARGUMENTS)
        stream: Any = await client.chat.completions.create(**request, stream=True)
        pieces = [c.choices[0].delta.tool_calls[0].function async for c in stream if c.choices[0].delta.tool_calls]
    assert pieces[0].name == "weather"
    assert json.loads("".join(piece.arguments or "" for piece in pieces)) == ARGUMENTS
    used = (answer.usage.prompt_tokens, answer.usage.completion_tokens)
    times = 2 if mock.name == "aimock" else 1
    await books.assert_counted("openai", 2, *(times * count for count in used))


@pytest.mark.parametrize("mock", BOTH, indirect=True)
async def test_a_message(start: Start) -> None:
    books = await start()
    async with books.anthropic as client:
        answer: Any = await client.messages.create(model="anthropic-model", max_tokens=30, messages=saying("hello"))
    assert (answer.model, answer.content[0].text) == ("up-model", TEXT)
    assert answer.usage.input_tokens > 0
    await books.assert_counted("anthropic", 1, answer.usage.input_tokens, answer.usage.output_tokens)


@pytest.mark.parametrize("mock", BOTH, indirect=True)
async def test_a_stream_of_a_message(start: Start) -> None:
    books = await start()
    async with books.anthropic as client:
        request: Any = {"model": "anthropic-model", "max_tokens": 30, "messages": saying("hello")}
        async with client.messages.stream(**request) as stream:
            assert "".join([text async for text in stream.text_stream]) == TEXT
            final = await stream.get_final_message()
    assert final.usage.output_tokens > 0
    await books.assert_counted("anthropic", 1, final.usage.input_tokens, final.usage.output_tokens)


@pytest.mark.parametrize("mock", BOTH, indirect=True)
async def test_tools_in_messages(start: Start) -> None:
    books = await start()
    request: Any = {"model": "anthropic-model", "messages": saying("what weather?"), **MESSAGE_TOOLS}
    async with books.anthropic as client:
        answer: Any = await client.messages.create(**request)
        async with client.messages.stream(**request) as stream:
            streamed: Any = await stream.get_final_message()
    for message in (answer, streamed):
        (call,) = (block for block in message.content if block.type == "tool_use")
        assert (call.name, call.input) == ("weather", ARGUMENTS)
    usages = [answer.usage, streamed.usage]
    await books.assert_counted(
        "anthropic", 2, sum(usage.input_tokens for usage in usages), sum(usage.output_tokens for usage in usages)
    )


@pytest.mark.parametrize("mock", BOTH, indirect=True)
async def test_a_refusal_becomes_the_sdk_s_exception(start: Start) -> None:
    books = await start()
    request: Any = {"messages": saying("too much"), "max_tokens": 30}
    async with books.openai as one, books.anthropic as two:
        with pytest.raises(openai.RateLimitError, match="slow down"):
            await one.chat.completions.create(model="openai-model", **request)
        await books.assert_counted("openai", 1, 0, 0, failures=1)
        with pytest.raises(anthropic.RateLimitError, match="slow down"):
            await two.messages.create(model="anthropic-model", **request)


@NEEDS_AIMOCK
@pytest.mark.parametrize("mock", ["aimock"], indirect=True)
async def test_a_response(start: Start) -> None:
    books = await start()
    async with books.openai as client:
        answer: Any = await client.responses.create(model="openai-model", input="hello")
        assert (answer.model, answer.output_text) == ("up-model", TEXT)
        stream: Any = await client.responses.create(model="openai-model", input="what weather?", stream=True)
        events: list[Any] = [event async for event in stream]
    assert events[-1].type == "response.completed"
    assert json.loads(events[-1].response.output[0].arguments) == ARGUMENTS
    assert answer.usage.input_tokens == events[-1].response.usage.input_tokens == 21
    await books.assert_counted("openai", 2, 42, 18)


@NEEDS_AIMOCK
@pytest.mark.parametrize("mock", ["aimock"], indirect=True)
async def test_embeddings_images_and_sound(start: Start) -> None:
    books = await start()
    async with books.openai as client:
        vectors = await client.embeddings.create(model="openai-model", input="hello", encoding_format="float")
        assert len(vectors.data[0].embedding) > 100
        speech = await client.audio.speech.create(model="openai-model", input="hello", voice="alloy")
        assert speech.content == b"RIFF"
        text: Any = await client.audio.transcriptions.create(model="openai-model", file=("a.wav", b"RIFF"))
        assert text.text == "hello"
        images: Any = await client.images.generate(model="openai-model", prompt="hello")
        assert images.data[0].b64_json == "UklGRg=="
    await books.assert_counted("openai", 4, vectors.usage.prompt_tokens, 0)


@NEEDS_AIMOCK
@pytest.mark.parametrize("mock", ["aimock"], indirect=True)
async def test_a_server_that_knows_another_key_refuses_ours_and_no_key_comes_down(start: Start) -> None:
    books = await start("sk-another-0123456789")
    async with books.openai as client:
        with pytest.raises(openai.AuthenticationError) as refused:
            await client.chat.completions.create(model="openai-model", messages=saying("hello"))
    assert "sk-another" not in refused.value.response.text
    assert CLIENT_KEY not in refused.value.response.text
    state = await books.gateway.service("openai:up-model")
    assert (state.requests, state.failures, state.input) == (1, 1, 0)
