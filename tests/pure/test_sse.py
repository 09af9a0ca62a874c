"""The parser of server-sent events."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balancer.sse import Event, Parser, with_data

_PIECES = [
    b"data",
    b"event",
    b"id",
    b":",
    b" ",
    b"\n",
    b"\r",
    b"\r\n",
    b"\n\n",
    b"x",
    b"\xff",
    b"\xef\xbb\xbf",
    b"[DONE]",
]
STREAMS = st.lists(st.sampled_from(_PIECES), max_size=40).map(b"".join)


def told(stream: bytes) -> list[tuple[str, bytes]]:
    """Name and data of each event of a whole stream."""
    return [(event.name, event.data) for event in Parser().feed(stream)]


def plainly(stream: bytes) -> list[tuple[str, bytes]]:
    """The same by the letter of WHATWG HTML §9.2.6, line by line; a blank line without fields tells nothing."""
    told: list[tuple[str, bytes]] = []
    name, data = "", list[bytes]()
    for line in stream.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")[:-1]:
        field, _, value = line.partition(b":")
        value = value[1:] if value[:1] == b" " else value
        if not line:
            if name or data:
                told.append((name, b"\n".join(data)))
            name, data = "", list[bytes]()
        elif field == b"data":
            data.append(value)
        elif field == b"event":
            name = value.decode("utf-8", "replace")
    return told


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_an_event_of_several_lines_is_one_event_whatever_ends_its_lines(end: bytes) -> None:
    """The two bytes of one CRLF once counted as two line ends, so that every line was an event of its own."""
    stream = end.join([b"event: delta", b"data: 1", b"data: 2", b"", b"data: 3", b"", b": more"])

    assert told(stream) == [("delta", b"1\n2"), ("", b"3")]


@pytest.mark.parametrize(
    ("stream", "events"),
    [
        (b"data:x\n\n", [("", b"x")]),
        (b"data:  x\n\n", [("", b" x")]),
        (b"data\n\n", [("", b"")]),
        (b"data: a\ndata:\ndata: b\n\n", [("", b"a\n\nb")]),
        (b"\xef\xbb\xbfdata: x\n\n", [("", b"x")]),
        (b": ping\n\n", [("", b"")]),
        (b"id: 1\nretry: 2\nevent: a\nevent: b\ndata: x\n\n", [("b", b"x")]),
        (b"event: \xff\ndata: \xff\n\n", [("�", b"\xff")]),
        (b"data: x\n", []),
        (b"", []),
    ],
)
def test_fields_are_read_as_the_standard_says(stream: bytes, events: list[tuple[str, bytes]]) -> None:
    assert told(stream) == events


@given(STREAMS)
def test_what_is_told_is_what_a_line_by_line_reading_tells(stream: bytes) -> None:
    stream += b"\n\n:"  # So that no end of line is still in doubt.

    assert [event for event in told(stream) if event != ("", b"")] == [
        event for event in plainly(stream) if event != ("", b"")
    ]


@given(STREAMS, st.lists(st.integers(0, 120)))
def test_any_split_gives_the_same_events_and_loses_no_byte(stream: bytes, cuts: list[int]) -> None:
    parser, events, at = Parser(), [], 0
    for cut in (*sorted(cuts), len(stream)):
        events += parser.feed(stream[at:cut])
        at = max(at, cut)

    whole = Parser()

    assert events == whole.feed(stream)
    assert parser.tail == whole.tail
    assert b"".join(event.raw for event in events) + parser.tail == stream


def test_an_event_is_given_back_with_its_last_byte() -> None:
    parser = Parser()

    assert parser.feed(b"data: x\n") == []
    assert parser.feed(b"\n") == [Event(b"data: x\n\n", "", b"x")]


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
@pytest.mark.parametrize("step", [1, 2, 3, 10])
@pytest.mark.parametrize("more", range(12))
def test_an_event_beyond_the_limit_passes_unparsed_and_the_next_is_parsed(end: bytes, step: int, more: int) -> None:
    """One image was once enough for all counting to end."""
    parser = Parser(limit_bytes=12)
    long = [b"data: 12345678", b"data: 9" + b"0" * (50 + more), b"data: c"]
    stream = end.join([b"data: a", b"", *long, b"", b"data: b", b"", b":"])

    events = [event for at in range(0, len(stream), step) for event in parser.feed(stream[at : at + step])]

    assert [event.data for event in events if event.data] == [b"a", b"b"]
    assert b"".join(event.raw for event in events) + parser.tail == stream


def test_no_more_than_the_limit_is_held() -> None:
    parser = Parser(limit_bytes=10)
    held = []
    for _ in range(100):
        parser.feed(b"data: 1234\n")
        held.append(parser.tail_bytes)

    assert max(held) <= 10


def test_what_stands_behind_the_last_blank_line_is_the_last_event() -> None:
    parser = Parser()
    parser.feed(b"event: x\ndata: half")

    assert parser.finish() == Event(b"event: x\ndata: half", "x", b"half")
    assert parser.finish() is None
    assert parser.feed(b"data: x\n\n") == [Event(b"data: x\n\n", "", b"x")]


def test_the_last_of_a_long_event_is_not_parsed() -> None:
    parser = Parser(limit_bytes=10)
    parser.feed(b"data: 12345678\n")

    assert parser.finish() == Event(b"\n", "", b"")


@pytest.mark.parametrize("cut", [0, 1, 4, 5])
def test_a_word_is_found_among_the_last_bytes_of_an_unfinished_event(cut: int) -> None:
    parser = Parser()
    stream = b"data: error\n\ndata: an error"
    parser.feed(stream[: len(stream) - cut])
    parser.feed(stream[len(stream) - cut :])

    assert parser.tail_has(b"error", among=cut or len(stream))
    assert not parser.tail_has(b"data", among=cut or 5)


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_other_data_leaves_all_other_lines_alone(end: bytes) -> None:
    lines = [b"id: 7", b"data: 1", b": data: 2", b"data:3", b"database: 4", b"data", b"retry: 5", b"", b""]
    (event,) = Parser().feed(end.join(lines) + b":")
    assert event.data == b"1\n3\n"

    assert with_data(event, b"x\ny\n") == end.join(
        [b"id: 7", b"data: x", b": data: 2", b"data:y", b"database: 4", b"data", b"retry: 5", b"", b""]
    )
