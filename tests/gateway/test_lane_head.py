"""What the lane reads itself, and that it means the same to the parser which gets the rest."""

from __future__ import annotations

import asyncio
import time

import pytest
from aiohttp.base_protocol import BaseProtocol
from aiohttp.http_parser import HttpRequestParser
from hypothesis import example, given, settings
from hypothesis import strategies as st

from balancer.gateway.lane_head import MAX_HEADERS, Head, is_beginning, read_head, repeat_of

LINE = b"POST /v1/chat/completions?a=b HTTP/1.1\r\n"
HOST = b"Host: gateway:8080\r\n"
LENGTH = b"Content-Length: 2\r\n"
USUAL = LINE + HOST + b"Content-Type: application/json\r\nX-A:\tb  c\r\nx-empty:\r\nConnection: keep-alive\r\n" + LENGTH


def test_a_usual_head_is_read() -> None:
    head = read_head(USUAL)
    assert head is not None
    assert (head.path, head.query, head.length, head.is_last) == ("/v1/chat/completions", "a=b", 2, False)
    assert head.headers == (
        ("Host", "gateway:8080"),
        ("Content-Type", "application/json"),
        ("X-A", "b  c"),
        ("x-empty", ""),
        ("Connection", "keep-alive"),
    )
    assert head.first == {name.lower(): value for name, value in head.headers}


def test_of_headers_with_one_name_the_first_is_known_and_all_are_kept() -> None:
    head = read_head(LINE + HOST + b"X-A: 1\r\nx-a: 2\r\n" + LENGTH)
    assert head is not None
    assert head.first["x-a"] == "1"
    assert head.headers[1:3] == (("X-A", "1"), ("x-a", "2"))


def test_a_client_that_asks_for_it_gets_its_last_answer() -> None:
    head = read_head(LINE + HOST + LENGTH + b"Connection: Close\r\n")
    assert head is not None
    assert head.is_last


ELSEWHERE: dict[str, bytes] = {
    "GET": USUAL.replace(b"POST", b"GET"),
    "a method in lower case": USUAL.replace(b"POST", b"post"),
    "HTTP/1.0": USUAL.replace(b"HTTP/1.1", b"HTTP/1.0"),
    "HTTP/1.11": USUAL.replace(b"HTTP/1.1", b"HTTP/1.11"),
    "http/1.1": USUAL.replace(b"HTTP/1.1", b"http/1.1"),
    "a version that is none": USUAL.replace(b"HTTP/1.1", b"HTTP/1.1 "),
    "no version": USUAL.replace(b" HTTP/1.1", b""),
    "two blanks": USUAL.replace(b" HTTP", b"  HTTP"),
    "absolute form": USUAL.replace(b"POST /", b"POST http://gateway/"),
    "an authority without a scheme": USUAL.replace(b"POST /", b"POST //"),
    "a fragment": USUAL.replace(b"a=b", b"a=b#c"),
    "a target beyond ASCII": USUAL.replace(b"a=b", b"a=\xc3\xbc"),
    "a quote in the target": USUAL.replace(b"a=b", b'a="b"'),
    "an empty line first": b"\r\n" + USUAL,
    "no Host": LINE + LENGTH,
    "an empty Host": LINE + b"Host:\r\n" + LENGTH,
    "two Hosts": LINE + HOST + HOST + LENGTH,
    "a Host that is a list": LINE + b"Host: a, b\r\n" + LENGTH,
    "a Host with a user": LINE + b"Host: a@b\r\n" + LENGTH,
    "no length": LINE + HOST,
    "two lengths": LINE + HOST + LENGTH + LENGTH,
    "a length with a sign": LINE + HOST + b"Content-Length: +2\r\n",
    "a length that is a list": LINE + HOST + b"Content-Length: 2, 2\r\n",
    "a length in hex": LINE + HOST + b"Content-Length: 0x2\r\n",
    "a length of many digits": LINE + HOST + b"Content-Length: 0000000000000002\r\n",
    "an empty length": LINE + HOST + b"Content-Length:\r\n",
    "chunks": LINE + HOST + b"Transfer-Encoding: chunked\r\n",
    "chunks and a length": USUAL + b"Transfer-Encoding: chunked\r\n",
    "an expectation": USUAL + b"Expect: 100-continue\r\n",
    "an upgrade": USUAL + b"Upgrade: h2c\r\n",
    "TE": USUAL + b"TE: trailers\r\n",
    "a trailer": USUAL + b"Trailer: X-A\r\n",
    "another option for the connection": LINE + HOST + LENGTH + b"Connection: keep-alive, x-a\r\n",
    "two Connections": USUAL + b"Connection: close\r\n",
    "Proxy-Connection": USUAL + b"Proxy-Connection: close\r\n",
    "two content types": USUAL + b"Content-Type: text/plain\r\n",
    "two ids": USUAL + b"x-request-id: a\r\nX-Request-Id: b\r\n",
    "a blank before the colon": USUAL + b"X-B : c\r\n",
    "a name with a blank": USUAL + b"X B: c\r\n",
    "no name": USUAL + b": c\r\n",
    "no colon": USUAL + b"X-B\r\n",
    "a folded header": USUAL + b"X-B: c\r\n d\r\n",
    "a header that begins with a blank": USUAL + b" X-B: c\r\n",
    "a bare line feed": USUAL + b"X-B: c\nX-C: d\r\n",
    "a bare carriage return": USUAL + b"X-B: c\rX-C: d\r\n",
    "two carriage returns": USUAL + b"X-B: c\r\r\n",
    "NUL": USUAL + b"X-B: \x00\r\n",
    "DEL": USUAL + b"X-B: \x7f\r\n",
    "a value beyond ASCII": USUAL + b"X-B: \xc3\xbc\r\n",
    "a name beyond ASCII": USUAL + b"X-\xc3\xbc: c\r\n",
    "blanks behind a value": USUAL + b"X-B: c \r\n",
    "many headers": USUAL + b"X-B: c\r\n" * MAX_HEADERS,
}


@pytest.mark.parametrize("case", ELSEWHERE)
def test_anything_else_is_left_to_the_other_parser(case: str) -> None:
    assert read_head(ELSEWHERE[case]) is None


# -- the same meaning --------------------------------------------------------------------------------------------------


def as_aiohttp_reads(head: bytes) -> Head | None:
    """What aiohttp's parser makes of a head with its body, None when it refuses it, or wants more than the body."""

    class Protocol(BaseProtocol):
        def data_received(self, data: bytes) -> None: ...

    loop = asyncio.new_event_loop()
    try:
        parser = HttpRequestParser(Protocol(loop), loop, 2**16)
        messages, is_upgraded, tail = parser.feed_data(head + b"\r\n")
    except Exception:  # noqa: BLE001 - whatever it refuses with.
        return None
    finally:
        loop.close()
    ((message, _),) = messages
    assert (message.method, message.version, message.chunked, is_upgraded, tail) == ("POST", (1, 1), False, False, b"")
    path, _, query = message.path.partition("?")
    fields = [(name.decode(), value.decode()) for name, value in message.raw_headers]
    headers = tuple((name, value) for name, value in fields if name.lower() != "content-length")
    first = {name.lower(): value for name, value in reversed(headers)}
    length = int(message.headers["Content-Length"])
    return Head(path, query, headers, first, length, message.should_close)


PARTS = [
    *(
        b"\r\n",
        b"\n",
        b"\r",
        b" ",
        b"\t",
        b":",
        b"\x00",
        b"\x0b",
        b"\x7f",
        b"\x80",
        b"\xc3\xbc",
        b",",
        b"#",
        b"?",
        b"//",
    ),
    *(b"%", b"*", b'"', b"\\", b"^", b"HTTP/1.1", b"POST ", b" HTTP/1.1\r\n"),
    *(b"Host: a\r\n", b"Host: b:1\r\n", b"Connection: close\r\n", b"connection: Keep-Alive\r\n"),
    *(LENGTH, b"Content-Length: 02\r\n", b"Content-Length: 2 \r\n", b"content-length: 3\r\n"),
    *(
        b"Transfer-Encoding: chunked\r\n",
        b"Upgrade: websocket\r\n",
        b"Expect: 100-continue\r\n",
        b"Content-Type: a\r\n",
    ),
    *(b"Server: a\r\n", b"ETag: a\r\n", b"X-A: b\r\n", b"User-Agent: a b\r\n", b"Sec-WebSocket-Key1: a\r\n"),
]
STARTS = [place for place in range(len(USUAL) + 1) if USUAL[:place].endswith(b"\n")]
PLACES = st.sampled_from(STARTS) | st.integers(0, len(USUAL))
CHANGES = st.lists(st.tuples(PLACES, st.integers(0, 3), st.sampled_from(PARTS)), max_size=6)


def changed(raw: bytes, changes: list[tuple[int, int, bytes]]) -> bytes:
    """A head with parts put in, each in the place of some bytes; with its last line end."""
    for place, cut, part in changes:
        raw = raw[:place] + part + raw[place + cut :]
    return raw.partition(b"\r\n\r\n")[0].removesuffix(b"\r\n") + b"\r\n"


@settings(max_examples=600, deadline=None)
@given(CHANGES)
@example([])
@example([(len(USUAL), 0, b"Host: b:1\r\n")])
def test_what_is_read_means_the_same_to_the_other_parser(changes: list[tuple[int, int, bytes]]) -> None:
    raw = changed(USUAL, changes)
    head = read_head(raw)
    if head is not None:
        assert head == as_aiohttp_reads(raw)
        assert all(is_beginning(raw[:end]) for end in range(len(raw)))


# -- heads that come again ---------------------------------------------------------------------------------------------

LATER = [
    USUAL,
    USUAL.replace(b": 2\r", b": 12345\r"),
    USUAL.replace(b": 2\r", b": 002\r"),
    USUAL.replace(b": 2\r", b":  2\r"),
    USUAL.replace(b": 2\r", b": 2 \r"),
    USUAL.replace(b": 2\r", b": \r"),
    USUAL.replace(b": 2\r", b": -2\r"),
    USUAL.replace(b": 2\r", b": 2,2\r"),
    USUAL.replace(b": 2\r", b": \xb2\r"),
    USUAL.replace(b": 2\r", b": 1234567890123456\r"),
    USUAL.replace(b": 2\r\n", b": 2\r\nX-B: c\r\n"),
    USUAL.replace(b"a=b", b"a=c"),
    LINE + LENGTH + HOST,
]


@settings(max_examples=300, deadline=None)
@given(st.sampled_from([USUAL, LINE + LENGTH + HOST]), st.sampled_from(LATER), CHANGES)
def test_a_head_that_is_known_again_is_read_as_if_it_were_new(
    earlier: bytes, later: bytes, changes: list[tuple[int, int, bytes]]
) -> None:
    head = read_head(earlier)
    assert head is not None
    repeat = repeat_of(earlier + b"\r\n", head)
    assert repeat is not None
    for raw in (later, changed(later, changes)):
        data = raw + b"\r\n" + b"body"
        assert repeat.read(data) in (None, (read_head(raw), len(raw) + 2))
        assert repeat.read(data[: len(raw) + 1]) is None


def test_a_head_is_known_again_whatever_its_body_s_length() -> None:
    head = read_head(USUAL)
    assert head is not None
    repeat = repeat_of(USUAL + b"\r\n", head)
    assert repeat is not None
    assert repeat.read(USUAL + b"\r\n{}") == (head, len(USUAL) + 2)
    other = USUAL.replace(b": 2\r", b": 345\r")
    assert repeat.read(other + b"\r\n{}") == (read_head(other), len(other) + 2)


# -- heads that are not whole ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        b"GET",
        b"P0",
        b"\r\nPOST",
        b"POST http",
        b"POST /v1 HTTP/1.1\n",
        b"POST /v1\x00",
        b"POST /v1 HTTP/1.0\r\nHo",
        LINE + b"Host : a\r\nX",
        LINE + b" Host",
        LINE + HOST + b"X\x00",
        LINE + b"X-A: b\nHost",
        LINE + b"X-A: b\r\rc",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"PRI * HTTP/2.0\r\n",
    ],
)
def test_what_cannot_become_a_head_of_ours_is_not_waited_for(data: bytes) -> None:
    assert not is_beginning(data)


SLOW: dict[str, bytes] = {
    "blanks": LINE + b"X:" + b" " * 8000 + b"\x01\r\n",
    "blanks behind a value": LINE + b"X: a" + b" " * 8000 + b"\x01\r\n",
    "words": LINE + b"X:" + b" a" * 4000 + b"\x01\r\n",
    "a long name": LINE + b"X" * 8000 + b"\r\n",
    "a long target": b"POST /" + b"?" * 8000 + b"\r\n",
    "lines without names": LINE + b"\r\n" * 4000,
}


@pytest.mark.parametrize("case", SLOW)
def test_no_head_takes_long(case: str) -> None:
    """Quantifiers that give back what they took need the square of the length: 0.3 s for 8 000 blanks."""
    began = time.process_time()
    assert read_head(SLOW[case]) is None
    is_beginning(SLOW[case])
    assert time.process_time() - began < 0.05
