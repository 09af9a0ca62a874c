"""Anthropic's SDK in front of vendors that speak OpenAI's chat completions and Google's API."""

from __future__ import annotations

import asyncio
from typing import Any

import anthropic
import pytest
from pydantic import BaseModel, ConfigDict

from tests.translation.asked import CITY, PDF, PNG
from tests.translation.conftest import World
from tests.vendors.replies import Reply, Say, Think, Use, reply

pytestmark = pytest.mark.asyncio(loop_scope="module")
FOREIGN = pytest.mark.parametrize("rule", ["gpt", "deepseek", "gemini"])
ASKED: list[Any] = [{"role": "user", "content": "Hello"}]
TOOL: Any = {"name": "weather", "description": "The weather.", "input_schema": CITY}
COUNTED = {"input": 200, "cached": 64, "output": 90, "reasoning": 40}
BASE: dict[str, Any] = {"max_tokens": 6000, "messages": ASKED}
LONG = "A text of many pieces, all of them short, and far more of them than anybody waits for."
THINKS: dict[str, Any] = {"thinking": {"type": "enabled", "budget_tokens": 2000}}


class Report(BaseModel):
    """What is asked for."""

    model_config = ConfigDict(extra="forbid")
    rain: bool
    degrees: list[int]


@FOREIGN
@pytest.mark.parametrize("streams", [True, False], ids=["stream", "whole"])
async def test_a_message_and_its_tokens(world: World, rule: str, streams: bool) -> None:
    world.says(reply(Say("Grüezi 🌦"), **COUNTED))
    client = world.anthropic
    answer = await _asked(client, streams, model=rule, system="Be brief.", **BASE)
    assert texts(answer) == ["Grüezi 🌦"]
    assert (answer.stop_reason, answer.type, answer.role) == ("end_turn", "message", "assistant")
    assert (answer.usage.input_tokens, answer.usage.cache_read_input_tokens) == (136, 64)
    assert answer.usage.output_tokens == 90
    assert world.refusals == []
    await world.assert_books_agree()


def texts(answer: anthropic.types.Message) -> list[str]:
    """What the model says; beside it may stand a signature, which some vendors give to every answer."""
    return [block.text for block in answer.content if block.type == "text"]


async def _asked(client: anthropic.AsyncAnthropic, streams: bool, **asked: Any) -> anthropic.types.Message:
    if not streams:
        answer: anthropic.types.Message = await client.messages.create(**asked)
        return answer
    async with client.messages.stream(**asked) as stream:
        return await stream.get_final_message()


@pytest.mark.parametrize("rule", ["deepseek", "gemini"])
@pytest.mark.parametrize("streams", [True, False], ids=["stream", "whole"])
async def test_thoughts_are_shown_and_signed(world: World, rule: str, streams: bool) -> None:
    world.says(reply(Think("Hm, two."), Say("Two.")))
    client = world.anthropic
    answer = await _asked(client, streams, model=rule, **BASE, **THINKS)
    thought: Any = answer.content[0]
    assert thought.thinking == "Hm, two."
    assert texts(answer) == ["Two."]
    assert all(block.signature for block in answer.content if block.type == "thinking")


@FOREIGN
async def test_a_stream_has_the_events_of_the_api_in_their_order(world: World, rule: str) -> None:
    world.says(
        reply(
            Think("Hm."), Say("Both."), Use("weather", {"city": "Zürich"}), Use("weather", {"city": "Bern"}), **COUNTED
        )
    )
    client = world.anthropic
    stream = await client.messages.create(model=rule, tools=[TOOL], stream=True, **BASE, **THINKS)
    events: list[Any] = [event async for event in stream]
    kinds = [event.type for event in events]
    assert kinds[0] == "message_start"
    assert events[0].message.content == []
    assert events[0].message.stop_reason is None
    assert kinds[-2:] == ["message_delta", "message_stop"]
    wanted = ["thinking"] * (rule != "gpt") + ["text", "tool_use", "tool_use"]
    begun = [event for event in events if event.type == "content_block_start"]
    kinds = [event.content_block.type for event in begun]
    if rule == "gemini":  # The signature of its first call stands alone, before it.
        wanted.insert(2, "thinking")
    assert kinds == wanted
    assert [event.index for event in begun] == list(range(len(wanted)))
    open_: list[int] = []
    for event in events:
        if event.type == "content_block_start":
            assert open_ == []
            open_ = [event.index]
        elif event.type in ("content_block_delta", "content_block_stop"):
            assert open_ == [event.index]
            open_ = open_ if event.type == "content_block_delta" else []
    assert open_ == []
    assert events[-2].delta.stop_reason == "tool_use"
    assert events[-2].usage.output_tokens == 90
    assert events[-2].usage.input_tokens == 136
    await world.assert_books_agree()


@FOREIGN
@pytest.mark.parametrize("streams", [True, False], ids=["stream", "whole"])
@pytest.mark.parametrize(
    ("stop", "told"), [("end", "end_turn"), ("length", "max_tokens"), ("filtered", "refusal"), ("tool", "tool_use")]
)
async def test_why_a_model_stopped(world: World, rule: str, streams: bool, stop: str, told: str) -> None:
    part = Use("weather", {"city": "Bern"}) if stop == "tool" else Say("Hello")
    world.says(reply(part, stop=stop))
    client = world.anthropic
    answer = await _asked(client, streams, model=rule, tools=[TOOL], **BASE)
    assert answer.stop_reason == told


@FOREIGN
async def test_a_tool_without_arguments_is_called_with_an_empty_object(world: World, rule: str) -> None:
    world.says(reply(Use("now")))
    tool: Any = {"name": "now", "description": "d", "input_schema": {"type": "object", "properties": {}}}
    client = world.anthropic
    for streams in (True, False):
        answer = await _asked(client, streams, model=rule, tools=[tool], **BASE)
        assert [block.input for block in answer.content if block.type == "tool_use"] == [{}]
    assert world.refusals == []


@FOREIGN
async def test_structured_output_is_parsed(world: World, rule: str) -> None:
    world.says(reply(Say('{"rain": true, "degrees": [3, 4]}')))
    client = world.anthropic
    answer = await client.messages.parse(model=rule, output_format=Report, **BASE)
    assert answer.parsed_output == Report(rain=True, degrees=[3, 4])
    assert world.refusals == []
    (body,) = world.bodies(rule)
    if rule == "gemini":
        assert set(body["generationConfig"]["responseJsonSchema"]["properties"]) == {"rain", "degrees"}
    else:
        assert set(body["response_format"]["json_schema"]["schema"]["properties"]) == {"rain", "degrees"}


@FOREIGN
async def test_images_documents_and_results_with_images_arrive(world: World, rule: str) -> None:
    world.says(reply(Say("A dot.")))
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PNG}}
    document = {"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": PDF}}
    call = {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Bern"}}
    gave = {"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "See"}, image]}
    said: Any = [
        {"role": "user", "content": [{"type": "text", "text": "What is it?"}, image, document]},
        {"role": "assistant", "content": [call]},
        {"role": "user", "content": [gave, {"type": "text", "text": "And?"}]},
    ]
    client = world.anthropic
    await client.messages.create(model=rule, max_tokens=99, messages=said, tools=[TOOL])
    assert world.refusals == []
    (body,) = world.bodies(rule)
    assert str(body).count(PNG) == 2
    assert str(body).count(PDF) == 1


@FOREIGN
async def test_tokens_are_counted_before_they_are_used(world: World, rule: str) -> None:
    client = world.anthropic
    counted = await client.messages.count_tokens(model=rule, messages=ASKED, system="Be brief.", tools=[TOOL])
    assert counted.input_tokens > 0
    assert world.refusals == []
    await world.assert_books_agree()


@FOREIGN
async def test_the_sync_sdk_works_too(world: World, rule: str) -> None:
    world.says(reply(Say("Hello there")))

    def ask() -> list[str]:
        with anthropic.Anthropic(base_url=world.url, api_key="team-token", max_retries=0) as client:
            whole: Any = client.messages.create(model=rule, **BASE)
            with client.messages.stream(model=rule, **BASE) as stream:
                text = "".join(stream.text_stream)
            return [*texts(whole), text]

    assert await asyncio.to_thread(ask) == ["Hello there"] * 2
    await world.assert_books_agree()


@FOREIGN
@pytest.mark.parametrize(
    ("status", "error"),
    [
        (400, anthropic.BadRequestError),
        (429, anthropic.RateLimitError),
        (500, anthropic.InternalServerError),
        (503, anthropic.InternalServerError),
    ],
)
async def test_a_vendor_s_error_is_the_sdk_s_exception(
    world: World, rule: str, status: int, error: type[anthropic.APIStatusError]
) -> None:
    world.says(Reply(status=status, message="Words of the vendor.", headers=(("Retry-After", "7"),)))
    client = world.anthropic
    for streams in (False, True):
        with pytest.raises(error, match=r"Words of the vendor\.") as told:
            await _asked(client, streams, model=rule, **BASE)
        body: Any = told.value.body
        assert body["type"] == "error"
    if status == 429:
        assert told.value.response.headers["retry-after"] == "7"
    await world.assert_books_agree()


@FOREIGN
async def test_a_stream_that_breaks_is_an_exception(world: World, rule: str) -> None:
    world.says(reply(Say(LONG), broken_after=4, message="Overloaded."))
    client = world.anthropic
    with pytest.raises(anthropic.APIStatusError, match=r"Overloaded\."):
        await _asked(client, True, model=rule, **BASE)
    await world.assert_books_agree()


@FOREIGN
async def test_a_stream_that_is_cut_never_looks_whole(world: World, rule: str) -> None:
    world.says(reply(Say(LONG), cut_after=4))
    client = world.anthropic
    with pytest.raises(anthropic.APIError):
        await _asked(client, True, model=rule, **BASE)
    await world.assert_books_agree()


@FOREIGN
async def test_a_client_that_hangs_up_is_counted_as_the_vendor_counts(world: World, rule: str) -> None:
    gate = asyncio.Event()
    world.says(reply(Say(LONG), gate=gate, gate_before=3))
    async with world.anthropic.messages.stream(model=rule, **BASE) as stream:
        async for _ in stream.text_stream:
            break
    async with asyncio.timeout(5):
        await world.vendors[rule].hung_up.wait()
    await world.assert_books_agree()


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0]"),
        ({"extra_body": {"mcp_servers": [{"type": "url", "url": "https://a", "name": "a"}]}}, "mcp_servers"),
        ({"container": "c1"}, "container"),
        ({"extra_body": {"best_of": 2}}, "best_of"),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "document", "source": {"type": "file", "file_id": "file_1"}}],
                    }
                ]
            },
            "messages[0].content[0]",
        ),
    ],
)
async def test_what_no_service_can_do_is_refused_with_its_field(
    world: World, asked: dict[str, Any], param: str
) -> None:
    client = world.anthropic
    with pytest.raises(anthropic.BadRequestError) as told:
        await client.messages.create(**{"model": "gpt"} | BASE | asked)
    assert param in str(told.value)
    assert world.bodies("gpt") == []
