"""Usage, from JSON answers and from streams."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable
from typing import Any

import pytest
import zstandard
from hypothesis import example, given
from hypothesis import strategies as st

from balancer.domain import Usage
from balancer.sse import Event, Parser
from balancer.usage import TAIL_BYTES, WHOLE_LIMIT_BYTES, StreamUsage, UsageTap, read, usage_of

CHAT = {
    "prompt_tokens": 20,
    "completion_tokens": 7,
    "total_tokens": 27,
    "prompt_tokens_details": {"cached_tokens": 8, "audio_tokens": 0},
    "completion_tokens_details": {"reasoning_tokens": 3},
}
RESPONSES = {
    "input_tokens": 20,
    "input_tokens_details": {"cached_tokens": 8},
    "output_tokens": 7,
    "output_tokens_details": {"reasoning_tokens": 3},
}
ANTHROPIC = {
    "input_tokens": 12,
    "cache_read_input_tokens": 8,
    "cache_creation_input_tokens": 4,
    "output_tokens": 7,
    "service_tier": "standard",
}
ODD: list[object] = [None, -1, "7", 7.0, True, [], {}, 2**48, 2**70]


def tapped(body: bytes, encoding: str = "", step: int = 1000) -> Usage | None:
    tap = UsageTap(encoding)
    for at in range(0, len(body), step):
        tap.feed(body[at : at + step])
    return tap.finish()


def event(data: object, name: str = "") -> Event:
    raw = data if isinstance(data, bytes) else json.dumps(data, separators=(",", ":")).encode()
    return Event(b"", name, raw)


def heard(*events: object) -> StreamUsage:
    stream = StreamUsage()
    for data in events:
        stream.see(data if isinstance(data, Event) else event(data))
    return stream


@pytest.mark.parametrize(
    ("table", "usage"),
    [
        (CHAT, Usage(input=20, output=7, cached=8, reasoning=3)),
        (RESPONSES, Usage(input=20, output=7, cached=8, reasoning=3)),
        (ANTHROPIC, Usage(input=12, output=7, cached=8, cache_creation=4)),
        (
            ANTHROPIC | {"output_tokens_details": {"thinking_tokens": 3}},
            Usage(input=12, output=7, cached=8, cache_creation=4, reasoning=3),
        ),
        ({"prompt_tokens": 5, "total_tokens": 5}, Usage(input=5)),
        ({"total_tokens": 5}, None),
        ({}, None),
    ],
)
def test_every_vendors_table_is_read(table: dict[str, object], usage: Usage | None) -> None:
    assert tapped(json.dumps({"id": "x", "usage": table}).encode()) == usage


@pytest.mark.parametrize("odd", ODD)
def test_an_odd_number_counts_as_absent(odd: object) -> None:
    assert read(CHAT | {"prompt_tokens": odd}) == Usage(output=7, cached=8, reasoning=3)
    assert read(CHAT | {"prompt_tokens_details": odd}) == Usage(input=20, output=7, reasoning=3)
    assert read({"prompt_tokens": odd, "completion_tokens": odd}) is None


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b"<html>",
        b'{"usage":',
        b'{"usage":null}',
        b'{"usage":"x"}',
        b'{"usage":[]}',
        b'{"usage":{"input_tokens":1,"output_tokens":"\xff"}}',
        b'{"usage":{"input_tokens":1,"output_tokens":1e999}}',
        b'{"usage":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    ],
)
def test_a_body_that_cannot_be_read_reports_nothing(body: bytes) -> None:
    """Bad UTF-8 and deep nesting once raised, and the relay with it."""
    assert tapped(body) is None


COUNTS = st.integers(0, 500) | st.sampled_from([None, *ODD])
DETAILS = st.dictionaries(st.sampled_from(["cached_tokens", "reasoning_tokens", "audio_tokens"]), COUNTS) | COUNTS
TABLES = st.fixed_dictionaries(
    {},
    optional={name: DETAILS if name.endswith("details") else COUNTS for name in (*CHAT, *RESPONSES, *ANTHROPIC)},
)


@given(TABLES | COUNTS, st.sampled_from(["", "word " * 1000]), st.booleans())
def test_a_table_is_read_alike_wherever_it_stands(table: Any, text: str, is_last: bool) -> None:
    answer = {"content": text, "usage": table} if is_last else {"usage": table, "content": text}

    assert usage_of(json.dumps(answer).encode()) == read(table)


@pytest.mark.parametrize(
    ("end", "input_"),
    [
        (b'"usage":{"input_tokens":5}}', 5),
        (b' "usage" : {"input_tokens":5} , "x":[{"usage_":1}]}\n', 5),
        (b'"usage":{"input_tokens":5},"x":{"usage":{"input_tokens":6}}}', 5),
        (b'"usage":{"input_tokens":5},"x":[{"usage":{"input_tokens":6}}]}', 5),
        (b'"x":{"usage":{"input_tokens":6}}}', None),
        (b'"usage":{"input_tokens":5,"usage":{"input_tokens":6}}}', 5),
        (b'"usage":{"input_tokens":5},"x":"\\"usage\\":{\\"input_tokens\\":6}"}', 5),
        (b'"usage":{"input_tokens":5},"x \\"usage":{"input_tokens":6}}', 5),
        (b'"usage":{"input_tokens":5},"x":["usage"]}', 5),
        (b'"usage":{"input_tokens":5},"usage":{"input_tokens":6}}', 6),
        (b'"usage":{"input_tokens":5},"us\\u0061ge":{"input_tokens":6}}', 6),
        (b'"usage":{"input_tokens":5},"usage":null}', None),
        (b'"usage":{"input_tokens":5}', None),
        (b'"usage":{"input_tokens":5}}}', None),
        (b'"usage":{"input_tokens":5}} x', None),
    ],
)
def test_the_end_of_a_long_answer_says_what_the_whole_says(end: bytes, input_: int | None) -> None:
    usage = Usage(input=input_) if input_ is not None else None

    assert usage_of(b'{"content":"%b",%b' % (b'a \\"word\\" ' * 400, end)) == usage
    assert usage_of(b'{"content":"",%b' % end) == usage


@pytest.mark.parametrize("step", [1, 10, 100_000])
@pytest.mark.parametrize(
    ("encoding", "code"),
    [("gzip", gzip.compress), ("deflate", zlib.compress), ("zstd", zstandard.compress), ("", bytes)],
)
def test_a_coded_answer_is_read(encoding: str, code: Callable[[bytes], bytes], step: int) -> None:
    assert tapped(code(json.dumps({"usage": ANTHROPIC}).encode()), encoding, step) == read(ANTHROPIC)


@pytest.mark.parametrize(("encoding", "body"), [("br", b"x"), ("gzip", b"no gzip"), ("zstd", b'{"usage":{}}')])
def test_a_coding_that_cannot_be_read_reports_nothing(encoding: str, body: bytes) -> None:
    assert tapped(body * 3, encoding, step=2) is None


def test_of_a_long_answer_only_the_end_is_held_and_its_last_usage_counts() -> None:
    tap = UsageTap()
    most = 0
    for chunk in (
        b'{"data":["',
        b"x" * (WHOLE_LIMIT_BYTES + TAIL_BYTES),
        b'"],"x":{"usage":{"input_tokens":1}},"usage" : ',
    ):
        tap.feed(chunk)
        most = max(most, len(tap._held))
    tap.feed(json.dumps(ANTHROPIC | {"note": "a } in a string"}).encode() + b',"object":"list","other":{}}')

    assert tap.finish() == read(ANTHROPIC)
    assert most <= TAIL_BYTES + 100


@pytest.mark.parametrize("end", [b"", b'"usage":null}', b'"usage":{"input_tokens":', b'"usage":' + b'{"a":' * 10_000])
def test_a_long_answer_without_a_readable_usage_reports_nothing(end: bytes) -> None:
    assert tapped(b" " * (WHOLE_LIMIT_BYTES + 1) + end, step=2**20) is None


def test_an_openai_stream_reports_in_its_last_chunk_and_is_over_with_done() -> None:
    stream = heard({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}], "usage": None})
    assert (stream.usage, stream.has_content, stream.is_complete) == (None, False, False)

    stream.see(event({"choices": [{"index": 0, "delta": {"content": "Hi"}}], "usage": None}))
    assert stream.has_content

    stream.see(event({"choices": [], "usage": CHAT}))
    assert (stream.usage, stream.is_complete) == (read(CHAT), False)

    stream.see(event(b"[DONE]"))
    assert (stream.usage, stream.is_complete, stream.is_error) == (read(CHAT), True, False)


def test_where_every_chunk_reports_the_last_counts() -> None:
    stream = heard(*({"choices": [], "usage": CHAT | {"completion_tokens": n}} for n in (1, 2, 9)))

    assert stream.usage == Usage(input=20, output=9, cached=8, reasoning=3)


def test_an_anthropic_stream_reports_at_its_start_and_cumulatively() -> None:
    stream = heard(
        {"type": "message_start", "message": {"id": "m", "content": [], "usage": ANTHROPIC | {"output_tokens": 1}}},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        {"type": "ping"},
    )
    assert (stream.usage, stream.has_content) == (Usage(input=12, output=1, cached=8, cache_creation=4), False)

    stream.see(event({"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "Hi"}}))
    assert stream.has_content

    ends = {"input_tokens": None, "cache_read_input_tokens": -3, "output_tokens": 15}
    stream.see(event({"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": ends}))
    assert stream.usage == Usage(input=12, output=15, cached=8, cache_creation=4)

    stream.see(event({"type": "message_delta", "usage": {"input_tokens": 14, "output_tokens": 20}}))
    assert (stream.usage, stream.is_complete) == (Usage(input=14, output=20, cached=8, cache_creation=4), False)

    stream.see(event({"type": "message_stop"}))
    assert (stream.is_complete, stream.is_error) == (True, False)


@pytest.mark.parametrize(("end", "is_error"), [("completed", False), ("incomplete", False), ("failed", True)])
def test_a_responses_stream_reports_in_its_last_event(end: str, is_error: bool) -> None:
    stream = heard(
        {"type": "response.created", "response": {"id": "r", "usage": None}},
        {"type": "response.output_text.delta", "delta": ""},
    )
    assert (stream.usage, stream.has_content, stream.is_complete) == (None, False, False)

    stream.see(event({"type": "response.output_text.delta", "delta": "Hi"}))
    assert stream.has_content

    stream.see(event({"type": f"response.{end}", "response": {"error": None, "usage": RESPONSES}}))
    assert (stream.usage, stream.is_complete, stream.is_error) == (read(RESPONSES), True, is_error)


@pytest.mark.parametrize(
    "failure",
    [
        event({"type": "error", "error": {"type": "overloaded_error", "message": "busy"}}, "error"),
        event({"error": {"message": "busy", "type": "server_error", "code": None}}),
        event({"type": "error", "code": "server_error", "message": "busy", "param": None, "sequence_number": 3}),
        event(b"not JSON", "error"),
    ],
)
def test_an_error_event_of_any_dialect_ends_a_stream_and_keeps_its_usage(failure: Event) -> None:
    """The Responses API's, whose `message` is a text, was once passed over as malformed."""
    stream = heard({"type": "message_start", "message": {"usage": ANTHROPIC}}, failure)

    assert (stream.is_complete, stream.is_error, stream.usage) == (True, True, read(ANTHROPIC))


@pytest.mark.parametrize(
    "delta",
    [
        {"choices": [{"delta": {"tool_calls": [{"index": 0}]}}]},
        {"choices": [{"delta": {"reasoning_content": "hm"}}]},
        {"choices": [{"delta": {"refusal": "no"}}]},
        {"choices": [{"text": "Hi"}]},
        {"type": "content_block_delta", "delta": {"type": "thinking_delta", "thinking": "hm"}},
        {"type": "content_block_delta", "delta": {"type": "input_json_delta", "partial_json": "{"}},
        {"type": "response.function_call_arguments.delta", "delta": "{"},
    ],
)
def test_a_piece_of_any_kind_is_content(delta: object) -> None:
    assert heard(delta).has_content


@pytest.mark.parametrize(
    "data",
    [
        {"choices": [{"delta": {"role": "assistant", "content": None, "tool_calls": []}}]},
        {"choices": [{"delta": {}, "finish_reason": "stop"}]},
        {"choices": [{"text": ""}]},
        {"type": "message_delta", "delta": {"stop_reason": "end_turn"}},
        {"choices": None, "delta": 7},
        b'{"delta":',
    ],
)
def test_an_event_without_a_token_is_no_content(data: object) -> None:
    assert not heard(data).has_content


@example([{"cache_read_input_tokens": 5, "input_tokens": -1}, {"input_tokens": 20}])
@given(st.lists(TABLES, min_size=1, max_size=4))
def test_what_the_events_of_a_stream_report_adds_up(tables: list[dict[str, Any]]) -> None:
    """What stood beside something odd in the first of them was once left out."""
    told: dict[str, Any] = {}
    for table in tables:
        for name, value in table.items():
            is_details = name.endswith("details")
            if isinstance(value, dict) if is_details else type(value) is int and 0 <= value < 2**48:
                told[name] = value

    assert heard(*({"usage": table} for table in tables)).usage == read(told)


@pytest.mark.parametrize("odd", ["x", 7, [], {"usage": 3}, {"usage": {"input_tokens": "x"}}])
def test_odd_fields_hide_neither_the_end_nor_what_was_reported(odd: object) -> None:
    begin = {"type": "message_start", "message": {"usage": ANTHROPIC}}
    stream = heard(begin, {"type": "message_stop", "usage": odd, "message": odd, "response": odd})

    assert (stream.is_complete, stream.is_error, stream.usage) == (True, False, read(ANTHROPIC))


def test_words_of_the_model_are_not_taken_for_the_vendors() -> None:
    said = 'data: {"usage":{"prompt_tokens":9,"completion_tokens":9}} "error" "message_stop" [DONE]'
    stream = heard({"choices": [{"delta": {"content": said}}]}, {"type": "x", "delta": {"text": said}})

    assert (stream.usage, stream.is_complete, stream.is_error) == (None, False, False)


_WORDS = st.sampled_from(
    [
        b'{"usage":',
        b'"error":',
        b'{"delta":',
        b'"message_stop"',
        b'"type":',
        b"{",
        b"}",
        b"[",
        b"]",
        b"1",
        b",",
        b"\xff",
    ]
)


@given(st.lists(_WORDS, max_size=12).map(b"".join), st.sampled_from(["", "error", "x"]))
def test_nothing_that_comes_raises(data: bytes, name: str) -> None:
    heard(Event(data, name, data))
    tapped(data)


@given(st.integers(1, 400))
def test_a_stream_is_read_alike_however_it_is_cut(step: int) -> None:
    raw = b"".join(
        b"data: %b\r\n\r\n" % json.dumps(chunk).encode()
        for chunk in ({"choices": [{"delta": {"content": "Hi"}}]}, {"choices": [], "usage": CHAT})
    )
    raw += b"data: [DONE]\r\n\r\n"
    parser, stream = Parser(), StreamUsage()
    for at in range(0, len(raw), step):
        for one in parser.feed(raw[at : at + step]):
            stream.see(one)

    assert (stream.usage, stream.has_content, stream.is_complete) == (read(CHAT), True, True)
