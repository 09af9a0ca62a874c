"""OpenAI's SDK, chat and responses, in front of vendors that speak Anthropic's and Google's APIs."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest
from pydantic import BaseModel, ConfigDict

from tests.translation.asked import CITY, PDF, PNG
from tests.translation.conftest import MODELS, World
from tests.vendors.replies import Reply, Say, Think, Use, reply

pytestmark = pytest.mark.asyncio(loop_scope="module")
FOREIGN = pytest.mark.parametrize("rule", ["claude", "gemini"])
ASKED: list[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
TOOL: Any = {"type": "function", "function": {"name": "weather", "parameters": CITY, "strict": True}}
LONG = "A text of many pieces, all of them short, and far more of them than anybody waits for."
COUNTED = {"input": 200, "cached": 64, "output": 90, "reasoning": 40}
STOPS = [("end", "stop"), ("length", "length"), ("filtered", "content_filter"), ("tool", "tool_calls")]
NAMED = pytest.mark.parametrize(("stop", "told"), STOPS)


class Report(BaseModel):
    """What is asked for."""

    model_config = ConfigDict(extra="forbid")
    rain: bool
    degrees: list[int]


REPORT = reply(Say('{"rain": true, "degrees": [3, 4]}'))


@FOREIGN
async def test_a_chat_answer_and_its_tokens(world: World, rule: str) -> None:
    world.says(reply(Think("Hm."), Say("Grüezi 🌦"), **COUNTED))
    client = world.openai
    answer = await client.chat.completions.create(model=rule, messages=ASKED, reasoning_effort="low")
    choice = answer.choices[0]
    assert (choice.message.content, choice.finish_reason, answer.object) == ("Grüezi 🌦", "stop", "chat.completion")
    assert choice.message.reasoning_content == "Hm."  # type: ignore[attr-defined]
    assert answer.model == MODELS[rule]
    assert_tokens(answer.usage, rule)
    assert world.refusals == []
    await world.assert_books_agree()


@FOREIGN
async def test_a_chat_stream_and_its_tokens(world: World, rule: str) -> None:
    world.says(reply(Think("Hm."), Say("Grüezi mitenand 🌦"), **COUNTED))
    options: Any = {"include_usage": True}
    client = world.openai
    stream = await client.chat.completions.create(
        model=rule, messages=ASKED, stream=True, stream_options=options, reasoning_effort="low"
    )
    chunks = [chunk async for chunk in stream]
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert "".join(delta.content or "" for delta in deltas) == "Grüezi mitenand 🌦"
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == "Hm."
    assert deltas[0].role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert len({chunk.id for chunk in chunks}) == 1
    assert_tokens(chunks[-1].usage, rule)
    assert all(chunk.usage is None for chunk in chunks[:-1])
    await world.assert_books_agree()


def assert_tokens(usage: Any, rule: str) -> None:
    """The neutral numbers, in OpenAI's terms."""
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (200, 90, 290)
    assert usage.prompt_tokens_details.cached_tokens == 64
    assert usage.completion_tokens_details.reasoning_tokens == 40


@FOREIGN
async def test_nobody_who_did_not_ask_gets_a_chunk_of_tokens_and_they_are_counted_all_the_same(
    world: World, rule: str
) -> None:
    world.says(reply(Say("Hello")))
    client = world.openai
    stream = await client.chat.completions.create(model=rule, messages=ASKED, stream=True)
    chunks = [chunk async for chunk in stream]
    assert all(chunk.usage is None for chunk in chunks)
    assert all(chunk.choices for chunk in chunks)
    await world.assert_books_agree()


@FOREIGN
@NAMED
async def test_why_a_model_stopped_in_chat(world: World, rule: str, stop: str, told: str) -> None:
    part = Use("weather", {"city": "Bern"}) if stop == "tool" else Say("Hello")
    world.says(reply(part, stop=stop))
    client = world.openai
    answer = await client.chat.completions.create(model=rule, messages=ASKED, tools=[TOOL])
    stream = await client.chat.completions.create(model=rule, messages=ASKED, tools=[TOOL], stream=True)
    reasons = [chunk.choices[0].finish_reason async for chunk in stream]
    assert answer.choices[0].finish_reason == told
    assert reasons[-1] == told


@FOREIGN
async def test_the_stream_helper_gathers_parallel_calls(world: World, rule: str) -> None:
    world.says(reply(Say("Both."), Use("weather", {"city": "Zürich"}), Use("weather", {"city": "Bern"})))
    async with world.openai.chat.completions.stream(model=rule, messages=ASKED, tools=[TOOL]) as stream:
        events = [event.type async for event in stream]
        final = await stream.get_final_completion()
    calls: Any = final.choices[0].message.tool_calls
    assert [call.function.parsed_arguments for call in calls] == [{"city": "Zürich"}, {"city": "Bern"}]
    assert len({call.id for call in calls}) == 2
    assert events.count("tool_calls.function.arguments.done") == 2


@FOREIGN
async def test_structured_output_is_parsed(world: World, rule: str) -> None:
    world.says(REPORT)
    client = world.openai
    chat = await client.chat.completions.parse(model=rule, messages=ASKED, response_format=Report)
    responses = await client.responses.parse(model=rule, input="Hello", text_format=Report)
    assert chat.choices[0].message.parsed == Report(rain=True, degrees=[3, 4])
    assert responses.output_parsed == Report(rain=True, degrees=[3, 4])
    assert world.refusals == []
    for body in world.bodies(rule):
        asked = (
            body["output_config"]["format"]["schema"]
            if rule == "claude"
            else body["generationConfig"]["responseJsonSchema"]
        )
        assert set(asked["properties"]) == {"rain", "degrees"}


@FOREIGN
async def test_images_and_documents_arrive(world: World, rule: str) -> None:
    world.says(reply(Say("A dot.")))
    content: Any = [
        {"type": "text", "text": "What is it?"},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}"}},
        {"type": "file", "file": {"filename": "a.pdf", "file_data": f"data:application/pdf;base64,{PDF}"}},
    ]
    client = world.openai
    await client.chat.completions.create(model=rule, messages=[{"role": "user", "content": content}])
    (body,) = world.bodies(rule)
    if rule == "claude":
        blocks = body["messages"][0]["content"]
        assert [block["type"] for block in blocks] == ["text", "image", "document"]
        assert [block["source"]["data"] for block in blocks[1:]] == [PNG, PDF]
    else:
        parts = body["contents"][0]["parts"]
        assert [part["inlineData"]["data"] for part in parts if "inlineData" in part] == [PNG, PDF]
    assert world.refusals == []


# -- responses ---------------------------------------------------------------------------------------------------------


@FOREIGN
async def test_a_response_and_its_tokens(world: World, rule: str) -> None:
    world.says(reply(Think("Hm."), Say("Grüezi 🌦"), **COUNTED))
    client = world.openai
    answer = await client.responses.create(
        model=rule, input="Hello", instructions="Be brief.", reasoning={"effort": "low", "summary": "auto"}
    )
    assert (answer.output_text, answer.status, answer.object) == ("Grüezi 🌦", "completed", "response")
    assert {item.type for item in answer.output} == {"reasoning", "message"}
    usage: Any = answer.usage
    assert (usage.input_tokens, usage.output_tokens, usage.total_tokens) == (200, 90, 290)
    assert usage.input_tokens_details.cached_tokens == 64
    assert usage.output_tokens_details.reasoning_tokens == 40
    await world.assert_books_agree()


@FOREIGN
async def test_a_response_s_stream_has_the_events_of_the_api_in_their_order(world: World, rule: str) -> None:
    world.says(reply(Think("Hm."), Say("Both."), Use("weather", {"city": "Zürich"}), Use("weather", {"city": "Bern"})))
    tool: Any = {"type": "function", "name": "weather", "parameters": CITY, "strict": True}
    client = world.openai
    stream = await client.responses.create(
        model=rule, input="Hello", tools=[tool], stream=True, reasoning={"effort": "low", "summary": "auto"}
    )
    events: list[Any] = [event async for event in stream]
    kinds = [event.type for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] == "response.completed"
    assert [event.sequence_number for event in events] == list(range(len(events)))
    final = events[-1].response
    wanted = ["reasoning", "message", "function_call", "function_call"]
    assert [item.type for item in final.output if item.type != "reasoning" or item.summary] == wanted
    added = [event for event in events if event.type == "response.output_item.added"]
    done = [event for event in events if event.type == "response.output_item.done"]
    assert [event.output_index for event in added] == [event.output_index for event in done]
    assert [event.output_index for event in added] == list(range(len(final.output)))
    assert [event.item.model_dump() for event in done] == [item.model_dump() for item in final.output]
    for index, item in enumerate(final.output):
        assert added[index].item.id == item.id
        if item.type == "function_call":
            deltas = [
                event.delta
                for event in events
                if event.type == "response.function_call_arguments.delta" and event.output_index == index
            ]
            assert "".join(deltas) == item.arguments
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == final.output_text == "Both."
    thought = "".join(event.delta for event in events if event.type == "response.reasoning_summary_text.delta")
    assert thought == final.output[0].summary[0].text == "Hm."
    for kind in ("response.content_part.added", "response.content_part.done", "response.output_text.done"):
        assert kinds.count(kind) == 1
    await world.assert_books_agree()


@FOREIGN
@pytest.mark.parametrize(
    ("stop", "status", "reason"),
    [
        ("end", "completed", None),
        ("length", "incomplete", "max_output_tokens"),
        ("filtered", "incomplete", "content_filter"),
    ],
)
async def test_why_a_response_ended(world: World, rule: str, stop: str, status: str, reason: str | None) -> None:
    world.says(reply(Say("Hello"), stop=stop))
    client = world.openai
    answers: list[Any] = [await client.responses.create(model=rule, input="Hello")]
    stream = await client.responses.create(model=rule, input="Hello", stream=True)
    events: list[Any] = [event async for event in stream]
    assert events[-1].type == f"response.{status}"
    for answer in [*answers, events[-1].response]:
        assert answer.status == status
        assert (answer.incomplete_details and answer.incomplete_details.reason) == reason


@FOREIGN
async def test_a_custom_tool_is_called_with_its_bare_input(world: World, rule: str) -> None:
    patch = '*** Begin Patch\n"a" \\ 🌦 </b>\n*** End Patch\n'
    world.says(reply(Use("apply_patch", text=patch)))
    tool: Any = {"type": "custom", "name": "apply_patch", "description": "Edits files.", "format": {"type": "text"}}
    asked: Any = {"model": rule, "input": "Hello", "tools": [tool]}
    client = world.openai
    whole: Any = await client.responses.create(**asked)
    async with client.responses.stream(**asked) as stream:
        events: list[Any] = [event async for event in stream]
        streamed: Any = await stream.get_final_response()
    said: list[Any] = [{"role": "user", "content": "Hello"}, whole.output[0].model_dump(exclude_none=True)]
    said.append({"type": "custom_tool_call_output", "call_id": whole.output[0].call_id, "output": "done"})
    world.says(reply(Say("Done.")))
    after = await client.responses.create(**asked | {"input": said})
    assert (whole.output[0].type, whole.output[0].input) == ("custom_tool_call", patch)
    assert streamed.output[0].input == patch
    assert "".join(e.delta for e in events if e.type == "response.custom_tool_call_input.delta") == patch
    assert after.output_text == "Done."
    assert world.refusals == []


# -- the rest ----------------------------------------------------------------------------------------------------------


@FOREIGN
async def test_the_sync_sdk_works_too(world: World, rule: str) -> None:
    world.says(reply(Say("Hello there")))

    def ask() -> list[str]:
        with openai.OpenAI(base_url=f"{world.url}/v1", api_key="team-token", max_retries=0) as client:
            whole = client.chat.completions.create(model=rule, messages=ASKED)
            stream = client.chat.completions.create(model=rule, messages=ASKED, stream=True)
            text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
            with client.responses.stream(model=rule, input="Hello") as events:
                final = events.get_final_response()
            return [whole.choices[0].message.content or "", text, final.output_text]

    assert await asyncio.to_thread(ask) == ["Hello there"] * 3
    await world.assert_books_agree()


@FOREIGN
@pytest.mark.parametrize(
    ("status", "error"),
    [
        (400, openai.BadRequestError),
        (429, openai.RateLimitError),
        (500, openai.InternalServerError),
        (529, openai.InternalServerError),
    ],
)
async def test_a_vendor_s_error_is_the_sdk_s_exception(
    world: World, rule: str, status: int, error: type[openai.APIStatusError]
) -> None:
    world.says(Reply(status=status, message="Words of the vendor.", headers=(("Retry-After", "7"),)))
    client = world.openai
    for _ in range(2):
        with pytest.raises(error, match=r"Words of the vendor\.") as told:
            await client.chat.completions.create(model=rule, messages=ASKED)
        with pytest.raises(error, match=r"Words of the vendor\."):
            await client.responses.create(model=rule, input="Hello", stream=True)
    if status == 429:
        assert told.value.response.headers["retry-after"] == "7"
    await world.assert_books_agree()


@FOREIGN
async def test_a_stream_that_breaks_tells_why(world: World, rule: str) -> None:
    world.says(reply(Say(LONG), broken_after=5, message="Overloaded."))
    client = world.openai
    stream = await client.chat.completions.create(model=rule, messages=ASKED, stream=True)
    with pytest.raises(openai.APIError, match=r"Overloaded\."):
        [chunk async for chunk in stream]
    events: list[Any] = [e async for e in await client.responses.create(model=rule, input="Hello", stream=True)]
    assert (events[-1].type, events[-1].message) == ("error", "Overloaded.")
    await world.assert_books_agree()


@FOREIGN
async def test_a_stream_that_is_cut_never_looks_whole(world: World, rule: str) -> None:
    world.says(reply(Say(LONG), cut_after=5))
    client = world.openai
    stream = await client.chat.completions.create(model=rule, messages=ASKED, stream=True)
    with pytest.raises(openai.APIError):
        [chunk async for chunk in stream]
    events: list[Any] = [e async for e in await client.responses.create(model=rule, input="Hello", stream=True)]
    assert events[-1].type == "error"
    await world.assert_books_agree()


@FOREIGN
@pytest.mark.parametrize("api", ["chat", "responses"])
async def test_a_client_that_hangs_up_is_counted_as_the_vendor_counts(world: World, rule: str, api: str) -> None:
    gate = asyncio.Event()
    world.says(reply(Say(LONG), gate=gate, gate_before=4))
    if api == "chat":
        stream: Any = await world.openai.chat.completions.create(model=rule, messages=ASKED, stream=True)
    else:
        stream = await world.openai.responses.create(model=rule, input="Hello", stream=True)
    async for event in stream:
        if "A text" in event.model_dump_json():
            break
    await stream.close()
    async with asyncio.timeout(5):
        await world.vendors[rule].hung_up.wait()
    await world.assert_books_agree()


@FOREIGN
@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"n": 2}, "n"),
        ({"logprobs": True}, "logprobs"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"prediction": {"type": "content", "content": "x"}}, "prediction"),
        ({"extra_body": {"best_of": 2}}, "best_of"),
        ({"messages": [{"role": "user", "content": [{"type": "video", "video": "x"}]}]}, "messages[0].content[0]"),
    ],
)
async def test_what_no_service_can_do_is_refused_with_its_field(
    world: World, rule: str, asked: dict[str, Any], param: str
) -> None:
    client = world.openai
    with pytest.raises(openai.BadRequestError) as told:
        await client.chat.completions.create(**{"model": rule, "messages": ASKED} | asked)
    assert told.value.param is not None
    assert told.value.param.startswith(param)
    assert param in str(told.value)
    assert world.bodies(rule) == []


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]"),
        ({"truncation": "auto"}, "truncation"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]"),
    ],
)
async def test_what_no_service_can_respond_to_is_refused_with_its_field(
    world: World, asked: dict[str, Any], param: str
) -> None:
    client = world.openai
    with pytest.raises(openai.BadRequestError) as told:
        await client.responses.create(**{"model": "claude", "input": "Hello"} | asked)
    assert told.value.param is not None
    assert told.value.param.startswith(param)


async def test_a_service_that_can_do_it_is_asked_whoever_is_in_turn(world: World) -> None:
    sound: Any = {"type": "input_audio", "input_audio": {"data": "UklGRg==", "format": "wav"}}
    world.says(reply(Say("A bell.")))
    client = world.openai
    for _ in range(3):
        await client.chat.completions.create(model="pairs", messages=[{"role": "user", "content": [sound]}])
    assert (len(world.bodies("gemini")), len(world.bodies("opus"))) == (3, 0)


async def test_what_is_left_out_by_rule_is_named(world: World) -> None:
    more: Any = {"temperature": 1.7, "service_tier": "auto", "metadata": {"a": "b"}}
    answer = await world.openai.chat.completions.with_raw_response.create(model="claude", messages=ASKED, **more)
    named = answer.headers["x-balancer-left-out"].split(",")
    assert set(named) == {"temperature", "service_tier", "metadata"}
