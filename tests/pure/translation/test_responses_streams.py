"""Streams as the responses API has them: read by the official SDK, and by its types event by event."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from typing import Any, get_args

import httpx2
import pytest
from openai import OpenAI
from openai.types.responses import ResponseStreamEvent

from balancer.sse import Parser
from balancer.translation.answer import (
    Answer,
    Broke,
    CallBegan,
    CallDelta,
    Counted,
    Counts,
    Echo,
    Ended,
    Pinged,
    Signed,
    Started,
    Step,
    Stopped,
    TextDelta,
    ThinkingDelta,
)
from balancer.translation.conversation import Citation
from balancer.translation.responses.answers import write_answer
from balancer.translation.responses.streams import StreamWriter
from tests.pure.translation.responses_answers import ANSWERS, COUNTS, echo, steps_of

TYPES = {get_args(kind.model_fields["type"].annotation)[0]: kind for kind in get_args(get_args(ResponseStreamEvent)[0])}


def events_of(body: bytes) -> list[dict[str, Any]]:
    """The events of a stream, each of the SDK's own type for it and named by its type; their numbers leave none out."""
    parser = Parser()
    events = []
    for event in parser.feed(body):
        if not event.data:
            assert event.raw == b": ping\n\n"
            continue
        decoded = json.loads(event.data)
        assert event.name == decoded["type"]
        TYPES[event.name].model_validate(decoded)
        events.append(decoded)
    assert parser.tail == b""
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


def written(steps: Iterable[Step], given: Echo) -> bytes:
    writer = StreamWriter(given)
    return b"".join(writer.write([step]) for step in steps)


def kinds(body: bytes) -> list[str]:
    return [event["type"].removeprefix("response.") for event in events_of(body)]


def read_by_sdk(body: bytes) -> tuple[list[Any], Any]:
    """What the SDK's stream gives, and the answer that it has put together."""

    def answer(_: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(200, headers={"content-type": "text/event-stream"}, content=body)

    with (
        httpx2.Client(transport=httpx2.MockTransport(answer)) as http,
        OpenAI(api_key="k", base_url="http://balancer/v1", http_client=http, max_retries=0) as client,
        client.responses.stream(model="m", input="a") as stream,
    ):
        events: list[Any] = list(stream)
        if events[-1].type != "response.completed":
            return events, events[-1].response
        return events, stream.get_final_response()


@pytest.mark.parametrize("name", ANSWERS)
def test_a_stream_ends_in_the_answer_that_is_written_whole(name: str) -> None:
    answer, given = ANSWERS[name], echo()
    whole = json.loads(write_answer(answer, given))
    for seed in range(10):
        steps = list(steps_of(answer, random.Random(seed)))
        events = events_of(written(steps, given))
        assert events[-1]["response"] == whole
        assert events[-1]["type"] == "response." + whole["status"]
        put_together(events, whole)


def put_together(events: Sequence[dict[str, Any]], whole: dict[str, Any]) -> None:
    """Asserts that the events, each for itself and all together, tell the output of the whole answer."""
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    assert events[0]["response"]["output"] == []
    assert events[0]["response"]["status"] == "in_progress"
    assert {key: value for key, value in events[0]["response"].items() if key in REPEATED} == {
        key: value for key, value in whole.items() if key in REPEATED
    }
    items: list[dict[str, Any]] = []
    done: dict[int, dict[str, Any]] = {}
    for event in events[2:-1]:
        index = event["output_index"]
        assert index not in done
        match event["type"].removeprefix("response."):
            case "output_item.added":
                assert index == len(items)
                items.append(event["item"])
            case "output_item.done":
                done[index] = event["item"]
                assert {**items[index], **AT_THE_END} == {**event["item"], **AT_THE_END}
            case kind:
                assert event["item_id"] == items[index]["id"]
                told(kind, event, items[index])
    assert [done[index] for index in range(len(items))] == whole["output"]


REPEATED = ("id", "model", "created_at", "instructions", "tools", "tool_choice", "text", "reasoning", "metadata")
AT_THE_END = {"status": None, "encrypted_content": None}
"""What an item has only when it is done."""


def told(kind: str, event: dict[str, Any], item: dict[str, Any]) -> None:
    """Puts an event's news into an item, or asserts that its sum is what was put there."""
    match kind:
        case "content_part.added":
            assert event["content_index"] == len(item["content"])
            item["content"].append(event["part"])
        case "output_text.delta":
            item["content"][event["content_index"]]["text"] += event["delta"]
        case "refusal.delta":
            item["content"][event["content_index"]]["refusal"] += event["delta"]
        case "output_text.annotation.added":
            annotations = item["content"][event["content_index"]]["annotations"]
            assert event["annotation_index"] == len(annotations)
            annotations.append(event["annotation"])
        case "output_text.done":
            assert item["content"][event["content_index"]]["text"] == event["text"]
        case "refusal.done":
            assert item["content"][event["content_index"]]["refusal"] == event["refusal"]
        case "content_part.done":
            assert item["content"][event["content_index"]] == event["part"]
        case "reasoning_summary_part.added":
            assert event["summary_index"] == len(item["summary"])
            item["summary"].append(event["part"])
        case "reasoning_summary_text.delta":
            item["summary"][event["summary_index"]]["text"] += event["delta"]
        case "reasoning_summary_text.done":
            assert item["summary"][event["summary_index"]]["text"] == event["text"]
        case "reasoning_summary_part.done":
            assert item["summary"][event["summary_index"]] == event["part"]
        case "function_call_arguments.delta":
            item["arguments"] += event["delta"]
        case "function_call_arguments.done":
            assert (item["arguments"], item["name"]) == (event["arguments"], event["name"])
        case "custom_tool_call_input.delta":
            item["input"] += event["delta"]
        case "custom_tool_call_input.done":
            assert item["input"] == event["input"]
        case _:
            raise AssertionError(kind)


@pytest.mark.parametrize("name", ANSWERS)
def test_the_sdk_puts_a_stream_together(name: str) -> None:
    answer, given = ANSWERS[name], echo()
    body = written(steps_of(answer, random.Random(name)), given)
    whole = json.loads(write_answer(answer, given))
    events, response = read_by_sdk(body)
    assert response.id == whole["id"]
    output = [item.to_dict() for item in response.output]
    for item in output:
        item.pop("parsed_arguments", None)
        for part in item.get("content") or []:
            part.pop("parsed", None)
    assert output == whole["output"]
    snapshots = [event.snapshot for event in events if event.type == "response.output_text.delta"]
    texts = [part["text"] for item in whole["output"] for part in item.get("content", ()) if "text" in part]
    assert [text for text in texts if text in snapshots] == texts


def test_the_events_of_a_text() -> None:
    steps: list[Step] = [Started(), TextDelta(text="a", begins=True), TextDelta(text="b"), Stopped(stop="end"), Ended()]
    assert kinds(written(steps, echo())) == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]


def test_a_delta_goes_out_with_the_step_that_brings_it() -> None:
    writer = StreamWriter(echo())
    writer.write([Started(id="x"), TextDelta(text="a")])
    assert writer.write([TextDelta(text='"\n')]) == (
        b'event: response.output_text.delta\ndata: {"type":"response.output_text.delta","item_id":"msg_0a1b2c_0",'
        b'"output_index":0,"content_index":0,"logprobs":[],"sequence_number":5,"delta":"\\"\\n"}\n\n'
    )


def test_calls_may_interleave() -> None:
    steps: list[Step] = [
        Started(),
        CallBegan(index=0, id="a", name="f"),
        CallDelta(index=0, arguments='{"a"'),
        CallBegan(index=1, id="b", name="apply_patch"),
        CallDelta(index=1, arguments='{"input": "x'),
        CallDelta(index=0, arguments=":1}"),
        TextDelta(text="meanwhile"),
        CallDelta(index=1, arguments='y"}'),
        Stopped(stop="tool"),
        Ended(),
    ]
    events = events_of(written(steps, echo()))
    output = events[-1]["response"]["output"]
    assert output[0]["arguments"] == '{"a":1}'
    assert output[1]["input"] == "xy"
    assert output[2]["content"][0]["text"] == "meanwhile"
    put_together(events, events[-1]["response"])


@pytest.mark.parametrize("cut", range(1, 40))
def test_a_custom_tools_input_is_bare_wherever_its_json_is_cut(cut: int) -> None:
    arguments = r'{"input":"a\n\"b\\ \ud83c\udf0d c"}'
    steps: list[Step] = [
        CallBegan(index=0, id="a", name="apply_patch"),
        CallDelta(index=0, arguments=arguments[:cut]),
        CallDelta(index=0, arguments=arguments[cut:]),
        Ended(),
    ]
    events = events_of(written(steps, echo()))
    deltas = [event["delta"] for event in events if event["type"] == "response.custom_tool_call_input.delta"]
    assert "".join(deltas) == 'a\n"b\\ 🌍 c'
    assert events[-1]["response"]["output"][0]["input"] == 'a\n"b\\ 🌍 c'


def test_a_thought_gets_its_signature_at_its_end() -> None:
    steps: list[Step] = [
        ThinkingDelta(text="a"),
        Signed(signature="", vendor="openai/kimi"),
        TextDelta(text="b"),
        Ended(),
    ]
    events = events_of(written(steps, echo()))
    assert events[-1]["response"]["output"][0]["encrypted_content"] == "balancer:openai/kimi:"
    hidden = events_of(written(steps, echo(store=None)))
    assert "encrypted_content" not in hidden[-1]["response"]["output"][0]


def test_a_thought_that_is_not_shown_keeps_its_signature() -> None:
    steps: list[Step] = [ThinkingDelta(text="", begins=True), Signed(signature="Eq", vendor="anthropic"), Ended()]
    (item,) = events_of(written(steps, echo()))[-1]["response"]["output"]
    assert item["summary"] == []
    assert item["encrypted_content"] == "balancer:anthropic:Eq"


def test_a_stream_that_begins_in_the_middle_is_begun() -> None:
    assert kinds(written([TextDelta(text="a"), Ended()], echo()))[:3] == ["created", "in_progress", "output_item.added"]
    assert kinds(written([Ended()], echo())) == ["created", "in_progress", "completed"]


def test_what_says_nothing_writes_nothing() -> None:
    writer = StreamWriter(echo())
    assert writer.write([]) == b""
    assert writer.write([Pinged()]) == b""
    writer.write([Started()])
    quiet: list[Step] = [
        TextDelta(begins=True),
        ThinkingDelta(text=""),
        Counted(usage=COUNTS),
        CallDelta(index=7, arguments="a"),
        Signed(signature="", vendor="v"),
        Started(),
        Broke(message="m"),
    ]
    assert writer.write(quiet) == b""
    assert writer.write([Pinged()]) == b": ping\n\n"


def test_a_part_that_begins_empty_begins() -> None:
    steps: list[Step] = [
        TextDelta(text="a"),
        TextDelta(begins=True),
        TextDelta(text="b"),
        TextDelta(citations=(Citation(url="https://h"),)),
        Ended(),
    ]
    (message,) = events_of(written(steps, echo()))[-1]["response"]["output"]
    assert [(part["text"], len(part["annotations"])) for part in message["content"]] == [("a", 0), ("b", 1)]


def test_the_last_count_counts() -> None:
    steps: list[Step] = [Started(usage=Counts(input=5)), Stopped(stop="end"), Counted(usage=COUNTS), Ended()]
    events = events_of(written(steps, echo()))
    assert events[0]["response"]["usage"] is None
    assert events[-1]["response"]["usage"]["total_tokens"] == 120
    none = events_of(written([Ended()], echo()))
    assert none[-1]["response"]["usage"]["total_tokens"] == 0
    begun = events_of(written([Started(usage=Counts(input=5)), Ended()], echo()))
    assert begun[-1]["response"]["usage"]["input_tokens"] == 5


def test_only_the_last_item_of_a_cut_answer_is_incomplete() -> None:
    answer = Answer(parts=ANSWERS["calls"].parts[:-1], stop="length", usage=COUNTS)
    events = events_of(written(steps_of(answer, random.Random(1)), echo()))
    statuses = [item["status"] for item in events[-1]["response"]["output"]]
    assert statuses == ["completed"] * 5 + ["incomplete"]
    assert events[-1]["response"] == json.loads(write_answer(answer, echo()))
