"""The upstream client against RFC 9112 (HTTP/1.1), message by message: answers as bytes, in whatever pieces they come.

Each case is sent in one piece, byte by byte, and cut in two at each place; it is read by `read` and by `pump`. All of
that must come to the same end, and the request behind must get its own answer, on the same connection or on another.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import msgspec
import pytest
import uvloop
from hypothesis import strategies as st

from balancer import polling
from balancer.gateway.messages import Upstream
from tests.gateway.by_hand import READERS, Listener, Outcome, Reader, Wire, a_client, a_request, ask, turns

AGAIN = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nagain"
AGAIN_READ = Outcome(status=200, headers=(("Content-Length", "5"),), body=b"again")
OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
CL5 = ("Content-Length", "5")
TE = ("Transfer-Encoding", "chunked")


class End(msgspec.Struct, frozen=True, kw_only=True):
    """How a case may end: what comes of it, and whether the next request goes over the same connection.

    None is where both are right. What was read of a body that broke off may be any beginning of `body`.
    """

    outcome: Outcome
    is_kept: bool | None = None


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """An answer's bytes, and the ends that are right. All ways to cut it must come to one of them, the same."""

    id: str
    sent: bytes
    ends: tuple[End, ...]
    method: str = "POST"
    closes: bool = False
    is_cut_at_each: bool = True

    def is_met_by(self, outcome: Outcome, is_kept: bool) -> End | None:
        """The end that this is."""
        for end in self.ends:
            expected = end.outcome
            if expected.error == "body" and outcome.error == "body" and expected.body.startswith(outcome.body):
                outcome = msgspec.structs.replace(outcome, body=expected.body)
            if outcome == expected and end.is_kept in (None, is_kept):
                return end
        return None


def is_read(
    *headers: tuple[str, str], body: bytes = b"", status: int = 200, error: str = "", kept: bool | None = None
) -> End:
    """An answer with these headers and this body."""
    return End(outcome=Outcome(status=status, headers=headers, body=body, error=error), is_kept=kept)


REFUSED = End(outcome=Outcome(error="head"), is_kept=False)
"""No answer, and nothing more on that connection."""


def breaks_off(*headers: tuple[str, str], body: bytes = b"", status: int = 200) -> End:
    """An answer whose body does not come to its end; nothing more on that connection."""
    return is_read(*headers, body=body, status=status, error="body", kept=False)


def case(id: str, sent: bytes, *ends: End, method: str = "POST", closes: bool = False) -> Case:  # noqa: A002
    """A case in one line."""
    return Case(id=id, sent=sent, ends=ends, method=method, closes=closes)


def with_header(line: bytes) -> bytes:
    """An answer of five bytes with one more header line."""
    return OK + line + b"\r\nContent-Length: 5\r\n\r\nhello"


def with_length(value: bytes) -> bytes:
    """An answer of five bytes that tells its length so."""
    return OK + b"Content-Length:" + value + b"\r\n\r\nhello"


KEPT5 = is_read(CL5, body=b"hello", kept=True)

LENGTHS = (
    case("a length", with_length(b" 5"), KEPT5),
    case("a length without a space", with_length(b"5"), KEPT5),
    case("a length amid white space", with_length(b" \t 5 \t "), KEPT5),
    case("a length of nothing", OK + b"Content-Length: 0\r\n\r\n", is_read(("Content-Length", "0"), kept=True)),
    case(
        "a length with leading zeros",
        with_length(b" 005"),
        is_read(("Content-Length", "005"), body=b"hello", kept=True),
        REFUSED,
    ),
    case(
        "a name in odd letters", OK + b"cOnTeNt-LeNgTh: 5\r\n\r\nhello", is_read(("cOnTeNt-LeNgTh", "5"), body=b"hello")
    ),
    case("two lengths that agree", with_header(b"Content-Length: 5"), is_read(CL5, CL5, body=b"hello"), KEPT5, REFUSED),
    case(
        "a list of lengths that agree",
        with_length(b" 5, 5"),
        is_read(("Content-Length", "5, 5"), body=b"hello"),
        KEPT5,
        REFUSED,
    ),
    case("two lengths that differ", with_header(b"Content-Length: 6"), REFUSED),
    case(
        "two lengths that differ, the last too long",
        OK + b"Content-Length: 5\r\nContent-Length: 9\r\n\r\nhello",
        REFUSED,
    ),
    case("a list of lengths that differ", with_length(b" 5, 6"), REFUSED),
    *(
        case(f"a length of {value!r}", with_length(b" " + value), REFUSED)
        for value in (
            b"-5",
            b"+5",
            b"0x5",
            b"5a",
            b"a5",
            b"5 5",
            b"5;5",
            b"five",
            b"5.0",
            b"1e1",
            b"\xb2",
            b"5\x0b",
            b"",
        )
    ),
    case("a length beyond 64 bits", with_length(b" 18446744073709551621"), REFUSED),
    case("a length far beyond all", with_length(b" " + b"9" * 100), REFUSED),
    case(
        "a body that is too short", with_length(b" 9"), breaks_off(("Content-Length", "9"), body=b"hello"), closes=True
    ),
    case(
        "a body without its first byte",
        OK + b"Content-Length: 9\r\n\r\n",
        breaks_off(("Content-Length", "9")),
        closes=True,
    ),
    case("a body that is too long", with_length(b" 5") + b"!", is_read(CL5, body=b"hello", kept=False)),
)

UNTIL_CLOSE = (
    case("until it closes", OK + b"\r\nhello", is_read(body=b"hello", kept=False), closes=True),
    case("until it closes, nothing", OK + b"\r\n", is_read(kept=False), closes=True),
    case("1.0 until it closes", b"HTTP/1.0 200 OK\r\n\r\nhello", is_read(body=b"hello", kept=False), closes=True),
    case(
        "until it closes, with what looks like an answer in it",
        OK + b"\r\n" + AGAIN,
        is_read(body=AGAIN, kept=False),
        closes=True,
    ),
)


def chunks(data: bytes, *ends: End, id: str, closes: bool = False) -> Case:  # noqa: A002
    """A case of a chunked body."""
    return case(f"chunks: {id}", CHUNKED + data, *ends, closes=closes)


def read_chunks(body: bytes, *, kept: bool | None = None) -> End:
    """A chunked body, read to its end."""
    return is_read(TE, body=body, kept=kept)


HELLO = read_chunks(b"hello", kept=True)
BROKEN = breaks_off(TE, body=b"hello")
LONG = b"a body of 27 bytes in all.\n"
LONG_BROKEN = breaks_off(TE, body=LONG)
LONG_CUT = breaks_off(TE, body=LONG + LONG + b"\r")

CHUNKS = (
    chunks(b"5\r\nhello\r\n0\r\n\r\n", HELLO, id="one"),
    chunks(b"2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n", HELLO, id="two"),
    chunks(b"0\r\n\r\n", read_chunks(b"", kept=True), id="none"),
    chunks(b"a\r\n0123456789\r\n0\r\n\r\n", read_chunks(b"0123456789", kept=True), id="a lower letter"),
    chunks(b"A\r\n0123456789\r\n0\r\n\r\n", read_chunks(b"0123456789", kept=True), id="an upper letter"),
    *(
        chunks(size + b"\r\n" + LONG + b"\r\n0\r\n\r\n", read_chunks(LONG, kept=True), id=f"a size spelt {size!r}")
        for size in (b"1b", b"1B", b"01b", b"0000000000001B", b"1b;a", b'1B;a="1B"')
    ),
    chunks(
        b"1b\r\n" + LONG + b"\r\n1B\r\n" + LONG + b"\r\n01b\r\n" + LONG + b"\r\n0\r\n\r\n",
        read_chunks(LONG * 3, kept=True),
        id="sizes spelt in several ways",
    ),
    *(
        chunks(
            b"1b\r\n" + LONG + b"\r\n" + size + b"\r\n" + LONG + b"\r\n0\r\n\r\n",
            LONG_BROKEN,
            id=f"{size!r} behind a chunk",
        )
        for size in (
            b"0x1b",
            b"1_b",
            b"+1b",
            b"-1b",
            b"1b\x00",
            b"1b\x0b",
            b"\xb2b",
            b"1g",
            b"1b\r",
            b"\r\n1b",
            b"\n1b",
            b"",
        )
    ),
    chunks(b"1b\r\n" + LONG + b"\r\n1b\n" + LONG + b"\r\n0\r\n\r\n", LONG_BROKEN, id="a bare line end behind a chunk"),
    chunks(
        b"1b\r\n" + LONG + b"\r\n1a\r\n" + LONG + b"\r\n0\r\n\r\n",
        LONG_CUT,
        id="a size that is too small behind a chunk",
    ),
    chunks(
        b"1b\r\n" + LONG + b"\r\n1c\r\n" + LONG + b"\r\n0\r\n\r\n",
        LONG_CUT,
        id="a size that is too large behind a chunk",
    ),
    chunks(b"1b\r\n" + LONG + b"\r\n", LONG_BROKEN, id="an end that never comes", closes=True),
    chunks(b"5\r\n0\r\n\r\n\r\n0\r\n\r\n", read_chunks(b"0\r\n\r\n", kept=True), id="an end that is data"),
    chunks(b"005\r\nhello\r\n000\r\n\r\n", HELLO, id="leading zeros"),
    chunks(b"5;a\r\nhello\r\n0;b\r\n\r\n", HELLO, id="an extension"),
    chunks(b"5;a=b;c=d\r\nhello\r\n0\r\n\r\n", HELLO, id="extensions with values"),
    chunks(b'5;a="b;c"\r\nhello\r\n0\r\n\r\n', HELLO, id="an extension in quotes"),
    chunks(b'5;a="\\""\r\nhello\r\n0\r\n\r\n', HELLO, id="an extension with an escape"),
    chunks(b"5 ;a = b\r\nhello\r\n0\r\n\r\n", HELLO, BROKEN, id="an extension amid bad white space"),
    chunks(b"5 \r\nhello\r\n0\r\n\r\n", HELLO, BROKEN, id="a space behind a size"),
    chunks(b" 5\r\nhello\r\n0\r\n\r\n", HELLO, BROKEN, id="a space before a size"),
    chunks(b"5\r\nhello\r\n0\r\nX-T: 1\r\nY-T: 2\r\n\r\n", HELLO, id="trailers"),
    chunks(b"5\r\nhello\r\n0\r\nContent-Length: 9\r\n\r\n", HELLO, BROKEN, id="a length among the trailers"),
    chunks(b"5\r\nhello\r\n0\r\nTransfer-Encoding: chunked\r\n\r\n", HELLO, BROKEN, id="a framing among the trailers"),
    chunks(b"5\r\nhello\r\n0\r\nConnection: close\r\n\r\n", read_chunks(b"hello"), id="a close among the trailers"),
    chunks(b"5\r\nhello\r\n0\r\nno trailer\r\n\r\n", BROKEN, id="a trailer without a colon"),
    chunks(b"5\r\nhello\r\n0\r\n: 1\r\n\r\n", BROKEN, id="a trailer without a name"),
    *(
        chunks(b"5\r\nhello\r\n" + size + b"\r\nhello\r\n0\r\n\r\n", BROKEN, id=f"a size of {size!r}")
        for size in (b"", b"g", b"-5", b"+5", b"0x5", b"5x", b"5,5", b"5 5", b"5\x00", b"\xb2", b";a", b'"5"', b"0 5")
    ),
    chunks(b"5\r\nhello\r\n10000000000000005\r\nhello\r\n0\r\n\r\n", BROKEN, id="a size beyond 64 bits"),
    chunks(b"5\r\nhello\r\n" + b"F" * 32 + b"\r\nhello\r\n0\r\n\r\n", BROKEN, id="a size far beyond all"),
    chunks(b"5\r\nhello0\r\n\r\n", BROKEN, id="no line end behind a chunk"),
    chunks(b"5\r\nhello!!\r\n0\r\n\r\n", breaks_off(TE, body=b"hello"), id="a chunk longer than its size"),
    chunks(b"5\r\nhell\r\n0\r\n\r\n", breaks_off(TE, body=b"hell\r"), id="a chunk shorter than its size"),
    chunks(b"5\r\nhello\n0\r\n\r\n", HELLO, BROKEN, id="a bare line feed behind a chunk"),
    chunks(b"5\nhello\r\n0\r\n\r\n", HELLO, BROKEN, id="a bare line feed behind a size"),
    chunks(b"5\rhello\r\n0\r\n\r\n", BROKEN, id="a bare carriage return behind a size"),
    chunks(b"5;a\nb\r\nhello\r\n0\r\n\r\n", BROKEN, id="a bare line feed in an extension"),
    chunks(b"5;a\rb\r\nhello\r\n0\r\n\r\n", BROKEN, id="a bare carriage return in an extension"),
    chunks(b"5;a\x00b\r\nhello\r\n0\r\n\r\n", BROKEN, id="a NUL in an extension"),
    chunks(b"5\r\nhello\r\n0\r\n\n", HELLO, BROKEN, id="a bare line feed at the end"),
    chunks(b"5\r\nhello\r\n0\r\n\r\n" + AGAIN, read_chunks(b"hello", kept=False), id="an answer behind"),
    chunks(b"5\r\nhello\r\n0\r\n\r\n\r\n", read_chunks(b"hello"), id="an empty line behind"),
    chunks(b"5\r\nhello\r\n0\r\n\r\n0\r\n\r\n", read_chunks(b"hello", kept=False), id="a second end behind"),
    *(
        chunks(b"5\r\nhello\r\n0\r\n\r\n"[:end], BROKEN, id=f"cut off behind {end} bytes", closes=True)
        for end in range(len(b"5\r\nhello\r\n0\r\n\r\n"))
    ),
)

CLOSE = ("Connection", "close")

CODINGS = (
    case(
        "chunked in odd letters",
        OK + b"Transfer-Encoding: ChUnKeD\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
        is_read(("Transfer-Encoding", "ChUnKeD"), body=b"hello", kept=True),
    ),
    case(
        "a length beside chunks",
        OK + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
        is_read(("Content-Length", "3"), TE, body=b"hello", kept=False),
        is_read(TE, body=b"hello", kept=False),
        REFUSED,
    ),
    case(
        "a length behind chunks",
        OK + b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
        is_read(TE, ("Content-Length", "3"), body=b"hello", kept=False),
        is_read(TE, body=b"hello", kept=False),
        REFUSED,
    ),
    *(
        case(
            f"a coding of {value!r}",
            OK + b"Transfer-Encoding: " + value + b"\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
            is_read(("Transfer-Encoding", value.decode()), body=b"5\r\nhello\r\n0\r\n\r\n", kept=False),
            REFUSED,
            closes=True,
        )
        for value in (
            b"identity",
            b"gzip",
            b"chunked, gzip",
            b"xchunked",
            b"chunkedx",
            b"chunk",
            b"chunked;q=1",
            b"chunked,identity",
        )
    ),
    *(
        case(
            f"a coding of {value!r}",
            OK + b"Transfer-Encoding: " + value + b"\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
            is_read(("Transfer-Encoding", value.decode()), body=b"hello", kept=False),
            REFUSED,
        )
        for value in (b"chunked, chunked", b"identity, chunked")
    ),
    case("chunks in another coding", OK + b"Transfer-Encoding: gzip, chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n", REFUSED),
    case(
        "chunks twice in two lines",
        OK + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
        is_read(TE, TE, body=b"hello", kept=False),
        REFUSED,
    ),
    case(
        "chunks from a 1.0 server",
        b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
        is_read(TE, body=b"hello", kept=False),
        REFUSED,
    ),
    case(
        "chunks from a 1.0 server that would keep the connection",
        b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
        is_read(("Connection", "keep-alive"), TE, body=b"hello", kept=False),
        REFUSED,
    ),
)


def connection(value: str, *, kept: bool, version: bytes = b"1.1", id: str = "") -> Case:  # noqa: A002
    """A case of the Connection header."""
    return case(
        id or f"connection: {value} in {version.decode()}",
        b"HTTP/%b 200 OK\r\nConnection: %b\r\nContent-Length: 5\r\n\r\nhello" % (version, value.encode()),
        is_read(("Connection", value), CL5, body=b"hello", kept=kept),
    )


CONNECTIONS = (
    connection("close", kept=False),
    connection("Close", kept=False),
    connection("keep-alive", kept=True),
    connection("x, close", kept=False),
    connection("close,x", kept=False),
    connection("x ,\tclose ,y", kept=False),
    connection("keep-alive, close", kept=False),
    connection("closed", kept=True),
    connection("x-close", kept=True),
    connection("keep-alive", kept=True, version=b"1.0"),
    connection("Keep-Alive, x", kept=True, version=b"1.0"),
    connection("close", kept=False, version=b"1.0"),
    connection("x", kept=False, version=b"1.0"),
    case("1.0", b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nhello", is_read(CL5, body=b"hello", kept=False)),
    case(
        "connection in two lines",
        OK + b"Connection: x\r\nConnection: close\r\nContent-Length: 5\r\n\r\nhello",
        is_read(("Connection", "x"), CLOSE, CL5, body=b"hello", kept=False),
    ),
    case(
        "close behind chunks",
        OK + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
        is_read(CLOSE, TE, body=b"hello", kept=False),
    ),
    case(
        "close and bytes behind the length",
        OK + b"Connection: close\r\nContent-Length: 5\r\n\r\nhello!!!",
        is_read(CLOSE, CL5, body=b"hello", kept=False),
        closes=True,
    ),
)

EARLY = b"HTTP/1.1 100 Continue\r\n\r\n"
HINTS = b"HTTP/1.1 103 Early Hints\r\nLink: </a>; rel=preload\r\n\r\n"
PLAIN = with_length(b" 5")

INTERIM = (
    case("100 before the answer", EARLY + PLAIN, KEPT5),
    case("102 before the answer", b"HTTP/1.1 102 Processing\r\n\r\n" + PLAIN, KEPT5),
    case("103 before the answer", HINTS + PLAIN, KEPT5),
    case("several before the answer", EARLY + HINTS + EARLY + HINTS + PLAIN, KEPT5),
    case("199 before the answer", b"HTTP/1.1 199 What\r\n\r\n" + PLAIN, KEPT5),
    case("100 before chunks", EARLY + CHUNKED + b"5\r\nhello\r\n0\r\n\r\n", HELLO),
    case("100 before 204", EARLY + b"HTTP/1.1 204 No Content\r\n\r\n", is_read(status=204, kept=True)),
    case("100 that says a length", b"HTTP/1.1 100 Continue\r\nContent-Length: 5\r\n\r\n" + PLAIN, KEPT5, REFUSED),
    case(
        "100 that says chunks", b"HTTP/1.1 100 Continue\r\nTransfer-Encoding: chunked\r\n\r\n" + PLAIN, KEPT5, REFUSED
    ),
    case("100 with a body", b"HTTP/1.1 100 Continue\r\nContent-Length: 5\r\n\r\nhello" + PLAIN, REFUSED),
    case("100 and no answer", EARLY, REFUSED, closes=True),
    case("100 and a beginning", EARLY + b"HTTP/1.1 200", REFUSED, closes=True),
    case(
        "101 that nobody asked for",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
        REFUSED,
    ),
    case("101 with an answer behind", b"HTTP/1.1 101 Switching Protocols\r\n\r\n" + PLAIN, REFUSED),
    case(
        "an upgrade that is only offered",
        OK + b"Connection: upgrade\r\nUpgrade: h2c\r\nContent-Length: 5\r\n\r\nhello",
        is_read(("Connection", "upgrade"), ("Upgrade", "h2c"), CL5, body=b"hello"),
    ),
)


def bodiless(status: int, *headers: tuple[str, str], kept: bool | None = True) -> End:
    """An answer that has no body whatever its headers say."""
    return is_read(*headers, status=status, kept=kept)


NO_BODY = (
    case("204", b"HTTP/1.1 204 No Content\r\n\r\n", bodiless(204)),
    case("204 that says a length", b"HTTP/1.1 204 No\r\nContent-Length: 5\r\n\r\n", bodiless(204, CL5, kept=None)),
    case("204 with a body", b"HTTP/1.1 204 No\r\nContent-Length: 5\r\n\r\nhello", bodiless(204, CL5, kept=False)),
    case(
        "204 that says chunks", b"HTTP/1.1 204 No\r\nTransfer-Encoding: chunked\r\n\r\n", bodiless(204, TE, kept=None)
    ),
    case(
        "204 with chunks",
        b"HTTP/1.1 204 No\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        bodiless(204, TE, kept=False),
    ),
    case("204 and an answer behind", b"HTTP/1.1 204 No Content\r\n\r\n" + AGAIN, bodiless(204, kept=False)),
    case("304", b"HTTP/1.1 304 Not Modified\r\nETag: x\r\n\r\n", bodiless(304, ("ETag", "x"))),
    case("304 that says a length", b"HTTP/1.1 304 Not\r\nContent-Length: 5\r\n\r\n", bodiless(304, CL5)),
    case(
        "304 that says chunks", b"HTTP/1.1 304 Not\r\nTransfer-Encoding: chunked\r\n\r\n", bodiless(304, TE, kept=None)
    ),
    case("304 with a body", b"HTTP/1.1 304 Not\r\nContent-Length: 5\r\n\r\nhello", bodiless(304, CL5, kept=False)),
    case("HEAD with a length", OK + b"Content-Length: 5\r\n\r\n", bodiless(200, CL5), method="HEAD"),
    case(
        "HEAD with a large length",
        OK + b"Content-Length: 99999999999\r\n\r\n",
        bodiless(200, ("Content-Length", "99999999999")),
        method="HEAD",
    ),
    case("HEAD with chunks", CHUNKED, bodiless(200, TE), method="HEAD"),
    case("HEAD with neither", OK + b"\r\n", bodiless(200, kept=None), method="HEAD"),
    case(
        "HEAD with close",
        OK + b"Connection: close\r\nContent-Length: 5\r\n\r\n",
        bodiless(200, CLOSE, CL5, kept=False),
        method="HEAD",
    ),
    case("HEAD with a body", with_length(b" 5"), bodiless(200, CL5, kept=False), method="HEAD"),
    case(
        "HEAD and an answer behind",
        OK + b"Content-Length: 5\r\n\r\n" + AGAIN,
        bodiless(200, CL5, kept=False),
        method="HEAD",
    ),
    case("HEAD of an error", b"HTTP/1.1 500 No\r\nContent-Length: 5\r\n\r\n", bodiless(500, CL5), method="HEAD"),
    case(
        "205 with a length of nothing",
        b"HTTP/1.1 205 Reset\r\nContent-Length: 0\r\n\r\n",
        bodiless(205, ("Content-Length", "0")),
    ),
    case("GET", PLAIN, KEPT5, method="GET"),
    case("DELETE", PLAIN, KEPT5, method="DELETE"),
)


def header(line: bytes, *ends: tuple[str, str] | None, id: str) -> Case:  # noqa: A002
    """A case of one header line: as which it may be read, None where it may be refused."""
    return case(
        f"header: {id}",
        with_header(line),
        *(is_read(end, CL5, body=b"hello", kept=True) if end else REFUSED for end in ends),
    )


HEADERS = (
    header(b"X-A: b", ("X-A", "b"), id="plain"),
    header(b"X-A:b", ("X-A", "b"), id="without a space"),
    header(b"X-A: \t b c\td \t", ("X-A", "b c\td"), id="amid white space"),
    header(b"X-A:", ("X-A", ""), id="empty"),
    header(b"X-A:  ", ("X-A", ""), id="only spaces"),
    header(b"X-A: b: c", ("X-A", "b: c"), id="a colon in it"),
    header(b"X-A: caf\xc3\xa9", ("X-A", "café"), id="UTF-8"),
    header(b"X-A: caf\xe9", ("X-A", "caf\udce9"), id="neither ASCII nor UTF-8"),
    header(b"!#$%&'*+-.^_`|~09aZ: b", ("!#$%&'*+-.^_`|~09aZ", "b"), id="all that a name may have"),
    header(b"X-A: b\r\n c", ("X-A", "b c"), ("X-A", "b   c"), None, id="folded"),
    header(b"X-A: b\r\n\tc\r\n d", ("X-A", "b c d"), ("X-A", "b\tc d"), None, id="folded twice"),
    header(b"X-A:\r\n b", ("X-A", "b"), None, id="folded at once"),
    case("header: folded before the first", OK + b" X-A: b\r\nContent-Length: 5\r\n\r\nhello", KEPT5, REFUSED),
    header(b"X-A : b", ("X-A", "b"), None, id="a space before the colon"),
    header(b"X-A\t: b", ("X-A", "b"), None, id="a tab before the colon"),
    case("header: a length with a space before the colon", OK + b"Content-Length : 5\r\n\r\nhello", KEPT5, REFUSED),
    case(
        "header: chunks with a space before the colon",
        OK + b"Transfer-Encoding : chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
        HELLO,
        REFUSED,
    ),
    header(b": b", None, id="no name"),
    header(b"X-A", None, id="no colon"),
    header(b"X A: b", None, id="a space in the name"),
    *(
        header(b"X" + bytes([byte]) + b"A: b", None, id=f"byte {byte:#04x} in the name")
        for byte in b'\x00\x01\x0b\x0c\x1f()"/,;<=>?@[\\]{}\x7f\x80\xff'
    ),
    *(
        header(b"X-A: b" + bytes([byte]) + b"c", None, ("X-A", "b c"), id=f"byte {byte:#04x} in the value")
        for byte in b"\x00\r\x01\x08\x0b\x0c\x1f\x7f"
    ),
    header(b"X-A: b\nX-B: c", None, id="a bare line feed between two"),
    header(b"X-A: b\r\rX-B: c", None, id="two carriage returns"),
    header(b"X-A: b\r", None, id="a carriage return too many"),
    case("header: bare line feeds only", OK.replace(b"\r", b"") + b"Content-Length: 5\n\nhello", KEPT5, REFUSED),
    case("header: a bare line feed at the end", OK + b"Content-Length: 5\r\n\nhello", KEPT5, REFUSED),
    case(
        "header: twice the same",
        with_header(b"Set-Cookie: a=1\r\nset-cookie: b=2"),
        is_read(("Set-Cookie", "a=1"), ("set-cookie", "b=2"), CL5, body=b"hello", kept=True),
    ),
    case(
        "header: a hundred",
        with_header(b"\r\n".join(b"X-%d: %d" % (i, i) for i in range(100))),
        is_read(*((f"X-{i}", str(i)) for i in range(100)), CL5, body=b"hello", kept=True),
    ),
    case(
        "header: of four thousand bytes",
        with_header(b"X-A: " + b"b" * 4000),
        is_read(("X-A", "b" * 4000), CL5, body=b"hello", kept=True),
    ),
)


def first_line(line: bytes, *ends: End, id: str = "") -> Case:  # noqa: A002
    """A case of the status line."""
    return case(f"status line: {id or line!r}", line + b"\r\nContent-Length: 5\r\n\r\nhello", *ends)


def status(code: int, *, kept: bool | None = True) -> End:
    """An answer of that status."""
    return is_read(CL5, body=b"hello", status=code, kept=kept)


STATUS_LINES = (
    *(first_line(b"HTTP/1.1 %d X" % code, status(code)) for code in (200, 201, 202, 206, 299, 300, 301, 307, 399)),
    *(first_line(b"HTTP/1.1 %d X" % code, status(code)) for code in (400, 401, 404, 407, 408, 413, 426, 429, 451, 499)),
    *(first_line(b"HTTP/1.1 %d X" % code, status(code)) for code in (500, 502, 503, 504, 529, 599)),
    *(first_line(b"HTTP/1.1 %d X" % code, status(code), REFUSED) for code in (600, 999)),
    first_line(b"HTTP/1.1 200 ", status(200), id="an empty reason"),
    first_line(b"HTTP/1.1 200", status(200), id="no reason, no space"),
    first_line(b"HTTP/1.1 200 a b\tc", status(200), id="a reason of words"),
    first_line(b"HTTP/1.1 200 \xe9\xff", status(200), id="a reason beyond ASCII"),
    first_line(b"HTTP/1.1 200 HTTP/1.1 500 X", status(200), id="a reason like a status line"),
    first_line(b"HTTP/1.1 200 a\x00b", status(200), REFUSED, id="a NUL in the reason"),
    first_line(b"HTTP/1.1 200 a\rb", status(200), REFUSED, id="a bare carriage return in the reason"),
    first_line(b"HTTP/1.1  200 OK", status(200), REFUSED, id="two spaces"),
    first_line(b"HTTP/1.1\t200 OK", status(200), REFUSED, id="a tab"),
    first_line(b"HTTP/1.2 200 OK", status(200), REFUSED, id="1.2"),
    first_line(b"HTTP/1.9 200 OK", status(200), REFUSED, id="1.9"),
    *(
        first_line(line, REFUSED)
        for line in (
            b"HTTP/1.1 99 X",
            b"HTTP/1.1 099 X",
            b"HTTP/1.1 000 X",
            b"HTTP/1.1 1000 X",
            b"HTTP/1.1 2000 X",
            b"HTTP/1.1 20 X",
            b"HTTP/1.1 2 X",
            b"HTTP/1.1 -200 X",
            b"HTTP/1.1 +200 X",
            b"HTTP/1.1 0200 X",
            b"HTTP/1.1 2e2 X",
            b"HTTP/1.1 200X",
            b"HTTP/1.1 OK",
            b"HTTP/1.1 ",
            b"HTTP/1.1",
            b"HTTP/1.1200 OK",
            b"HTTP/2.0 200 OK",
            b"HTTP/2 200 OK",
            b"HTTP/0.9 200 OK",
            b"HTTP/1 200 OK",
            b"HTTP/1. 200 OK",
            b"HTTP/1.10 200 OK",
            b"HTTP/01.1 200 OK",
            b"HTTP/11.1 200 OK",
            b"HTTP/1.1.1 200 OK",
            b"HTTP/a.b 200 OK",
            b"http/1.1 200 OK",
            b"HTTPS/1.1 200 OK",
            b"HTP/1.1 200 OK",
            b"ICY 200 OK",
            b" HTTP/1.1 200 OK",
            b"XHTTP/1.1 200 OK",
            b"200 OK",
            b"\x00HTTP/1.1 200 OK",
            b"\xef\xbb\xbfHTTP/1.1 200 OK",
            b"GET / HTTP/1.1",
            b"\x16\x03\x01\x00\x01",
            b"PRI * HTTP/2.0",
            b"SSH-2.0-x",
        )
    ),
    case("an empty line before the answer", b"\r\n" + PLAIN, KEPT5, REFUSED),
    case("empty lines before the answer", b"\r\n\r\n\r\n" + PLAIN, KEPT5, REFUSED),
    case("a bare line feed before the answer", b"\n" + PLAIN, KEPT5, REFUSED),
    case("nothing at all", b"", REFUSED, closes=True),
    *(
        Case(
            id=f"a head cut off behind {end} bytes",
            sent=PLAIN[:end],
            ends=(REFUSED,),
            closes=True,
            is_cut_at_each=False,
        )
        for end in range(1, len(PLAIN) - len(b"hello"))
    ),
    case("no empty line", OK + b"Content-Length: 5\r\n", REFUSED, closes=True),
)

BEHIND = (
    case("two answers at once", PLAIN + with_length(b" 5"), is_read(CL5, body=b"hello", kept=False)),
    case("an answer and a half", PLAIN + OK, is_read(CL5, body=b"hello", kept=False)),
    case("an answer and an empty line", PLAIN + b"\r\n", is_read(CL5, body=b"hello")),
    case("an answer and 100", PLAIN + EARLY, is_read(CL5, body=b"hello", kept=False)),
    case("an answer and rubbish", PLAIN + b"\x00\x01\x02", is_read(CL5, body=b"hello", kept=False)),
    case("an answer, then the end", PLAIN, is_read(CL5, body=b"hello", kept=False), closes=True),
    case(
        "an answer and a late 408",
        PLAIN + b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
        is_read(CL5, body=b"hello", kept=False),
        closes=True,
    ),
)

CASES = (*LENGTHS, *UNTIL_CLOSE, *CHUNKS, *CODINGS, *CONNECTIONS, *INTERIM, *NO_BODY, *HEADERS, *STATUS_LINES, *BEHIND)

CUT_EACH_BELOW = 200
"""Longer answers are cut at a few places only."""


class Fed:
    """An upstream that feeds a case in pieces to whoever asks, and a short answer to whoever asks again."""

    def __init__(self, client: Upstream, listener: Listener, case: Case) -> None:
        self._client = client
        self._listener = listener
        self._case = case
        self._pieces: list[bytes] = []
        self._asked: list[tuple[str, int]] = []
        self._is_over = asyncio.Event()
        listener.serve(self._behave)

    async def _behave(self, wire: Wire) -> None:
        while head := await wire.head():
            path = head.split(b" ", 2)[1].decode()
            self._asked.append((path, wire.number))
            if path == "/again":
                wire.sends(AGAIN)
                continue
            await wire.feeds(self._pieces)
            if self._case.closes:
                wire.stops_sending()
            self._is_over.set()

    async def comes_to(self, pieces: list[bytes], read: Reader) -> tuple[Outcome, bool]:
        """What comes of the case in these pieces, and whether the connection was used again."""
        self._pieces = pieces
        self._asked.clear()
        self._is_over.clear()
        outcome = await ask(self._client, a_request(f"{self._listener.url}/first", method=self._case.method), read)
        await self._is_over.wait()
        await turns()
        again = await ask(self._client, a_request(f"{self._listener.url}/again"))
        assert again == AGAIN_READ
        (first, one), (second, two) = self._asked
        assert (first, second) == ("/first", "/again")
        return outcome, one == two


def cuts(sent: bytes) -> Iterator[list[bytes]]:
    """The ways to cut an answer: not at all, everywhere, in two at each place; long ones at some places only."""
    step = 1 if len(sent) < CUT_EACH_BELOW else len(sent) // 20
    yield [sent] if sent else []
    yield [sent[i : i + 1 + step // 8] for i in range(0, len(sent), 1 + step // 8)]
    for place in range(1, len(sent), step):
        yield [sent[:place], sent[place:]]
    yield from cuts_at_lines(sent)


def cuts_at_lines(sent: bytes) -> Iterator[list[bytes]]:
    """Behind the head and one other line, and behind all lines: so that chunks come whole, alone or several."""
    head, end, body = sent.partition(b"\r\n\r\n")
    places = [place + 2 for place in range(len(body)) if body.startswith(b"\r\n", place)]
    for place in places:
        yield [head + end, body[:place], body[place:]]
    yield [head + end, *(body[one:two] for one, two in itertools.pairwise((0, *places, len(body))))]


@pytest.mark.parametrize("case", [pytest.param(case, id=case.id) for case in CASES])
async def test_an_answer_comes_to_the_same_end_however_it_is_cut(
    client: Upstream, listener: Listener, case: Case
) -> None:
    fed = Fed(client, listener, case)
    reached: dict[End, list[bytes]] = {}
    for pieces in itertools.islice(cuts(case.sent), None if case.is_cut_at_each else 2):
        outcome, is_kept = await fed.comes_to(pieces, READERS["read"])
        end = case.is_met_by(outcome, is_kept)
        assert end is not None, f"in pieces {pieces}: {outcome}, kept: {is_kept}"
        reached.setdefault(end, pieces)
    assert len(reached) == 1, f"it depends on the pieces: {reached}"


@pytest.mark.parametrize("case", [pytest.param(case, id=case.id) for case in CASES])
async def test_whoever_pumps_gets_what_whoever_reads_gets(client: Upstream, listener: Listener, case: Case) -> None:
    fed = Fed(client, listener, case)
    for pieces in (*itertools.islice(cuts(case.sent), 2), *(cuts_at_lines(case.sent) if case in CHUNKS else ())):
        read = await fed.comes_to(pieces, READERS["read"])
        for name, reader in READERS.items():
            pumped = await fed.comes_to(pieces, reader)
            if read[0].error:
                assert case.is_met_by(*pumped) == case.is_met_by(*read), f"{name}: {pumped}, not {read}"
            else:
                assert pumped == read, name


# -- answers that nobody thought of ------------------------------------------------------------------------------------

RESERVED = frozenset({"connection", "content-length", "transfer-encoding", "upgrade", "keep-alive"})
NAMES = st.from_regex(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,12}", fullmatch=True).filter(lambda it: it.lower() not in RESERVED)
VALUES = st.from_regex(r"([!-~é]([ -~\t]{0,20}[!-~])?)?", fullmatch=True)
EXTENSIONS = st.sampled_from((b"", b";a", b";a=b", b';a="b;\\"c"', b";a=b;c"))
MUTATIONS = (b"", b"\r", b"\n", b"\r\n", b"\x00", b" ", b":", b"0", b"9", b"f", b";", b",", b"\xff")
LOOPS = st.sampled_from((asyncio.new_event_loop, polling.new_event_loop, uvloop.new_event_loop))
INTERIMS = st.sampled_from((EARLY, HINTS, b"HTTP/1.1 102 Processing\r\nX-A: b\r\n\r\n"))


class Composed(msgspec.Struct, frozen=True, kw_only=True):
    """A valid answer made of parts, and what comes of it; `closes` where only the connection's end is its end."""

    sent: bytes
    outcome: Outcome
    closes: bool


@st.composite
def answers(draw: st.DrawFn) -> Composed:
    """Any answer that RFC 9112 allows, within reason."""
    interim = b"".join(draw(st.lists(INTERIMS, max_size=2)))
    code = draw(st.sampled_from((200, 201, 204, 301, 304, 400, 404, 429, 500, 503, 529)))
    headers = draw(st.lists(st.tuples(NAMES, VALUES), max_size=4))
    parts = [] if code in (204, 304) else draw(st.lists(st.binary(min_size=1, max_size=40), max_size=5))
    body = b"".join(parts)
    framing = "none" if code in (204, 304) else draw(st.sampled_from(("length", "chunks", "close")))
    payload = body
    if framing == "length":
        headers.insert(draw(st.integers(0, len(headers))), ("Content-Length", str(len(body))))
    elif framing == "chunks":
        headers.insert(draw(st.integers(0, len(headers))), ("Transfer-Encoding", "chunked"))
        sizes = st.sampled_from((b"%x", b"%X", b"0%x", b"000%X"))
        payload = b"".join(
            b"%b%b\r\n%b\r\n" % (draw(sizes) % len(part), draw(EXTENSIONS), part) for part in (*parts, b"")
        )
        trailers = draw(st.lists(st.tuples(NAMES, VALUES), max_size=2))
        payload = payload.removesuffix(b"\r\n") + b"".join(f"{n}: {v}\r\n".encode() for n, v in trailers) + b"\r\n"
    lines = [f"HTTP/1.1 {code} {draw(st.sampled_from(('', 'OK', 'Not so good')))}", *(f"{n}: {v}" for n, v in headers)]
    head = "\r\n".join(lines).encode() + b"\r\n\r\n"
    return Composed(
        sent=interim + head + payload,
        outcome=Outcome(status=code, headers=tuple(headers), body=body),
        closes=framing == "close",
    )


@st.composite
def in_pieces(draw: Callable[[st.SearchStrategy[Any]], Any], sent: bytes) -> list[bytes]:
    """The bytes, cut anywhere; half of the time behind lines only."""
    lines = [place + 2 for place in range(len(sent)) if sent.startswith(b"\r\n", place)]
    at_lines = bool(lines) and draw(st.booleans())
    places = draw(st.lists(st.sampled_from(lines) if at_lines else st.integers(0, len(sent)), max_size=8))
    places = sorted({0, len(sent), *places})
    return [sent[one:two] for one, two in itertools.pairwise(places)]


async def story(pieces: list[bytes], read: Reader, *, closes: bool) -> Outcome:
    """What comes of the pieces; the connection ends behind them if told so, or where the client waits for more.

    The request behind must get its own answer.
    """
    listener, client = Listener(), a_client()
    is_over = asyncio.Event()

    async def behave(wire: Wire) -> None:
        while head := await wire.head():
            if head.startswith(b"POST /again "):
                wire.sends(AGAIN)
                continue
            await wire.feeds(pieces)
            await turns(8)
            if closes or not asked.done():
                wire.stops_sending()
            is_over.set()

    listener.serve(behave)
    try:
        asked = asyncio.create_task(ask(client, a_request(f"{listener.url}/first"), read))
        outcome = await asked
        await is_over.wait()
        await turns()
        assert await ask(client, a_request(f"{listener.url}/again")) == AGAIN_READ
        return outcome
    finally:
        await client.close()
        await listener.close()


@hypothesis.settings(max_examples=150, deadline=None)
@hypothesis.given(answer=answers(), data=st.data(), read=st.sampled_from(sorted(READERS)), loop=LOOPS)
def test_any_valid_answer_is_read_back_exactly(
    answer: Composed, data: st.DataObject, read: str, loop: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    pieces = data.draw(in_pieces(answer.sent))
    with asyncio.Runner(loop_factory=loop) as runner:
        assert runner.run(story(pieces, READERS[read], closes=answer.closes)) == answer.outcome


@hypothesis.settings(max_examples=300, deadline=None)
@hypothesis.given(answer=answers(), data=st.data(), read=st.sampled_from(sorted(READERS)), loop=LOOPS)
def test_one_wrong_byte_neither_hangs_nor_answers_the_next_request(
    answer: Composed, data: st.DataObject, read: str, loop: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    place = data.draw(st.integers(0, len(answer.sent) - 1))
    new = data.draw(
        st.sampled_from((b"", b"\r", b"\n", b"\x00", b" ", b":", b"0", b"9", b"f", b";", b",", b"\xff", b"\r\n"))
    )
    gone = data.draw(st.integers(0, 1))
    sent = answer.sent[:place] + new + answer.sent[place + gone :]
    pieces = data.draw(in_pieces(sent))
    with asyncio.Runner(loop_factory=loop) as runner:
        outcome = runner.run(story(pieces, READERS[read], closes=answer.closes))
    assert outcome.error == "head" or 200 <= outcome.status <= 999
    for name, value in outcome.headers:
        assert not set("\r\n\x00") & set(name + value)
        assert name.strip() == name
