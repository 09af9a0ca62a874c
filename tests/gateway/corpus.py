"""Requests as strangers spell them, and what becomes of each by a strict reading of RFC 9112.

Behind each request a second one, the marker, follows on the same connection. What is malformed is answered once, and
nothing behind it is read: its bytes may be half a request that somebody else wrote.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

CHAT = b"/v1/chat/completions"


def body_of(word: str) -> bytes:
    """A request's body; the word is how it is known again upstream."""
    return b'{"model":"gpt","messages":["%b"]}' % word.encode()


def a_request(
    *lines: bytes,
    body: bytes = body_of("meant"),
    first: bytes = b"POST " + CHAT + b" HTTP/1.1",
    host: bytes = b"Host: gateway\r\n",
) -> bytes:
    """A request with these header lines, and no other framing than they give it."""
    return first + b"\r\n" + host + b"Content-Type: application/json\r\n" + b"\r\n".join([*lines, b"", body])


def sized(*lines: bytes, body: bytes = body_of("meant"), first: bytes = b"POST " + CHAT + b" HTTP/1.1") -> bytes:
    """The same with its Content-Length behind the lines."""
    return a_request(*lines, b"Content-Length: %d" % len(body), body=body, first=first)


MEANT = body_of("meant")
LENGTH = b"Content-Length: %d" % len(MEANT)
CHUNKED = b"Transfer-Encoding: chunked"
MARKER = sized(b"Connection: close", body=body_of("marker"))
SMUGGLED = sized(body=body_of("smuggled"))
CHUNKS = b"%x\r\n%b\r\n0\r\n\r\n" % (len(MEANT), MEANT)


class Case(msgspec.Struct, frozen=True):
    """A request's bytes, the statuses that come back for it and the marker, and the requests that go upstream.

    With `is_unfinished` the client closes its side behind it: the server would wait for more. `or_else`: what a server
    may do as well, and so one of ours, for the reason that stands there.
    """

    raw: bytes
    answers: tuple[int, ...] = (400,)
    sent: tuple[str, ...] = ()
    is_unfinished: bool = False
    or_else: tuple[tuple[int, ...], tuple[str, ...]] | None = None


def served(raw: bytes) -> Case:
    """It is served, and the marker as well."""
    return Case(raw, (200, 200), ("meant", "marker"))


def tolerated(raw: bytes) -> Case:
    """It is served, or refused: the RFC leaves the choice."""
    return Case(raw, (200, 200), ("meant", "marker"), or_else=((400,), ()))


def refused(raw: bytes) -> Case:
    """It is malformed, and so all that follows is not read."""
    return Case(raw)


def not_upgraded(raw: bytes) -> Case:
    """It is served, and the offer of another protocol is not taken up.

    The connection is closed or not: aiohttp may lose a part of what is behind the offer, and must then not go on.
    """
    return Case(raw, (200,), ("meant",), or_else=((200, 200), ("meant", "marker")))


def answered(raw: bytes, *statuses: int) -> Case:
    """It is a well-formed request that goes nowhere; the marker is served."""
    return Case(raw, (*statuses, 200), ("marker",))


def unfinished(raw: bytes, *statuses: int) -> Case:
    """It has no end."""
    return Case(raw, statuses, (), is_unfinished=True)


# -- lengths -----------------------------------------------------------------------------------------------------------

_SIZE = len(MEANT)
_GOOD_LENGTHS = (b"%d ", b"  %d", b"%d\t", b"\t%d", b"0%d", b"000000000000000000000000%d")
_BAD_LENGTHS = (
    b"", b" ", b"+%d", b"-%d", b"-0", b"+0", b"%d,%d", b"%d, %d", b"%d,0", b",%d", b"%d,", b"0x%x", b"0X%x", b"%xh",
    b"%d.0", b"%d.", b"%de0", b"%d;", b"%d;q=1", b"'%d'", b'"%d"', b"(%d)", b"%d %d", b"3 3", b"3_3", b"3\t3",
    b"%d\x0b", b"%d\x0c", b"%d\x00", b"\x00%d", b"%d\x7f", b"%d\xa0", b"%d\x85",
    b"\xef\xbc\x93\xef\xbc\x93", b"\xd9\xa3\xd9\xa3",
    b"18446744073709551649", b"99999999999999999999999", b"NaN", b"inf", b"null", b"thirty-three",
    b"%d#", b"%%33", b"~%d",
)  # fmt: skip


def _lengths() -> Iterator[tuple[str, Case]]:
    def filled(value: bytes) -> bytes:
        return value % ((_SIZE,) * (value.replace(b"%%", b"").count(b"%"))) if b"%" in value else value

    for value in _GOOD_LENGTHS:
        yield f"{value!r}", served(a_request(b"Content-Length:" + b" " + filled(value)))
    for value in _BAD_LENGTHS:
        yield f"{value!r}", refused(a_request(b"Content-Length: " + filled(value)))
    for name in (b"content-length", b"CONTENT-LENGTH", b"cOnTeNt-LeNgTh"):
        yield f"{name!r}", served(a_request(name + b": %d" % _SIZE))
        yield f"{name!r} behind another", refused(a_request(LENGTH, name + b": 0"))
    yield "twice the same", refused(a_request(LENGTH, LENGTH))
    yield "twice, the first too short", refused(a_request(b"Content-Length: 0", LENGTH))
    yield "twice, the second too short", refused(a_request(LENGTH, b"Content-Length: 0"))
    yield "twice, apart", refused(a_request(LENGTH, b"X-A: b", b"Content-Length: 5"))
    yield "a blank before the colon", refused(a_request(b"Content-Length : %d" % _SIZE))
    yield "a tab before the colon", refused(a_request(b"Content-Length\t: %d" % _SIZE))
    yield "a blank before the name", refused(a_request(b" " + LENGTH))
    yield "folded", refused(a_request(b"Content-Length:\r\n %d" % _SIZE))
    yield "folded behind a digit", refused(a_request(b"Content-Length: 3\r\n 3"))
    yield "NUL before the name", refused(a_request(b"\x00" + LENGTH))
    yield "no colon", refused(a_request(b"Content-Length %d" % _SIZE))
    yield "another name with it", served(sized(b"X-Content-Length: 0", b"Content-Length-X: 0", b"Content_Length: 0"))
    # The body is read as what it is then: the next request, and no request.
    yield "none", Case(a_request(), (400, 400), ())
    yield "none, and a request as the body", Case(a_request(body=SMUGGLED), (400, 200, 200), ("smuggled", "marker"))
    yield (
        "zero, and a request as the body",
        Case(a_request(b"Content-Length: 0", body=SMUGGLED), (400, 200, 200), ("smuggled", "marker")),
    )
    yield "a request inside the body", answered(a_request(b"Content-Length: %d" % len(SMUGGLED), body=SMUGGLED), 400)
    yield "too short", Case(a_request(b"Content-Length: 5"), (400, 400), ())
    yield "two bytes more than came", Case(a_request(b"Content-Length: %d" % (_SIZE + 2)), (400, 400), ())
    yield "more than ever comes", unfinished(a_request(b"Content-Length: 5000"))
    yield "2 to the 63", unfinished(a_request(b"Content-Length: 9223372036854775807"), 413)
    yield "2 to the 64", refused(a_request(b"Content-Length: 18446744073709551616"))


# -- codings -----------------------------------------------------------------------------------------------------------

_GOOD_CODINGS = (b"chunked", b"Chunked", b"CHUNKED", b"cHuNkEd", b" chunked", b"\tchunked", b"chunked ")
_BAD_CODINGS = (
    b"", b"xchunked", b"chunkedx", b"chunked, identity", b"chunked,identity", b"identity", b"identity, chunked",
    b"gzip", b"gzip, chunked", b"chunked, gzip", b"chunked, chunked", b"chunked;q=1", b"chunked;", b"chunked,",
    b",chunked", b'"chunked"', b"'chunked'", b"chunk", b"chunke", b"\x0bchunked", b"chunked\x0b", b"chunked\x0c",
    b"chunked\x00", b"\x00chunked", b"chunked\x7f", b"chunked\xa0", b"chunked\x85", b"\xefchunked", b"chunk ed",
    b"chunked gzip", b"chunked\rx", b"trailers, chunked", b"deflate,chunked", b"none", b"*", b"chunked chunked",
    b"\xd1\x81hunked", b"0", b"compress", b"chunked:", b"chunked=1",
)  # fmt: skip
_BAD_CODING_LINES = {
    "a blank before the colon": b"Transfer-Encoding : chunked",
    "a tab before the colon": b"Transfer-Encoding\t: chunked",
    "a blank before the name": b" Transfer-Encoding: chunked",
    "a tab before the name": b"\tTransfer-Encoding: chunked",
    "a blank before a name behind another": b"X-A: b\r\n Transfer-Encoding: chunked",
    "folded": b"Transfer-Encoding:\r\n chunked",
    "folded in the middle": b"Transfer-Encoding: chun\r\n ked",
    "behind a line feed": b"X-A: b\nTransfer-Encoding: chunked",
    "behind a carriage return": b"X-A: b\rTransfer-Encoding: chunked",
    "behind two carriage returns": b"X-A: b\r\r\nTransfer-Encoding: chunked",
    "NUL before the name": b"\x00Transfer-Encoding: chunked",
    "NUL behind the name": b"Transfer-Encoding\x00: chunked",
    "no-break space behind the name": b"Transfer-Encoding\xa0: chunked",
    "no colon": b"Transfer-Encoding chunked",
    "no value": b"Transfer-Encoding",
    "two colons": b"Transfer-Encoding:: chunked",
    "chunked twice": b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
    "chunked, then identity": b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity",
    "identity, then chunked": b"Transfer-Encoding: identity\r\nTransfer-Encoding: chunked",
    "gzip, then chunked": b"Transfer-Encoding: gzip\r\nTransfer-Encoding: chunked",
    "chunked, then gzip": b"Transfer-Encoding: chunked\r\nTransfer-Encoding: gzip",
    "nothing, then chunked": b"Transfer-Encoding:\r\nTransfer-Encoding: chunked",
    "chunked, then nothing": b"Transfer-Encoding: chunked\r\nTransfer-Encoding:",
    "chunked, then x": b"Transfer-Encoding: chunked\r\nTransfer-Encoding: x",
}


def _codings() -> Iterator[tuple[str, Case]]:
    both = b"Content-Length: %d" % len(CHUNKS)
    for value in _GOOD_CODINGS:
        line = b"Transfer-Encoding: " + value
        yield f"{value!r}", served(a_request(line, body=CHUNKS))
        yield f"{value!r} behind a length", refused(a_request(both, line, body=CHUNKS))
        yield f"{value!r} before a length", refused(a_request(line, both, body=CHUNKS))
    for value in _BAD_CODINGS:
        line = b"Transfer-Encoding: " + value
        yield f"{value!r}", refused(a_request(line, body=CHUNKS))
        yield f"{value!r} behind a length", refused(a_request(both, line, body=CHUNKS))
    for name, line in _BAD_CODING_LINES.items():
        yield name, refused(a_request(line, body=CHUNKS))
        yield f"{name}, with a length", refused(a_request(both, line, body=CHUNKS))
    for other in (b"TE", b"Transfer_Encoding", b"X-Transfer-Encoding", b"Transfer-Encodin", b"Transfer-Encodings"):
        # No framing at all: the body is text, of the length that is told.
        yield f"{other!r}", served(sized(other + b": chunked"))
    yield (
        "a length of 4, then chunked: CL.TE",
        refused(a_request(b"Content-Length: 4", CHUNKED, body=b"0\r\n\r\n" + SMUGGLED)),
    )
    yield (
        "chunked, then a length of 4: TE.CL",
        refused(a_request(CHUNKED, b"Content-Length: 4", body=b"%x\r\n%b\r\n0\r\n\r\n" % (len(SMUGGLED), SMUGGLED))),
    )
    yield (
        "an empty body before a request",
        Case(a_request(CHUNKED, body=b"0\r\n\r\n" + SMUGGLED), (400, 200, 200), ("smuggled", "marker")),
    )
    for version in (b"HTTP/1.0",):
        yield (
            f"chunked in {version!r}",
            refused(a_request(CHUNKED, body=CHUNKS, first=b"POST " + CHAT + b" " + version)),
        )
        yield (
            f"chunked and kept alive in {version!r}",
            refused(a_request(CHUNKED, b"Connection: keep-alive", body=CHUNKS, first=b"POST " + CHAT + b" " + version)),
        )


# -- chunks ------------------------------------------------------------------------------------------------------------

_HEX = b"%x" % _SIZE
_END = b"\r\n0\r\n\r\n"
_GOOD_CHUNKS = {
    "upper case": _HEX.upper() + b"\r\n" + MEANT + _END,
    "leading zeros": b"000000" + _HEX + b"\r\n" + MEANT + _END,
    "a byte a chunk": b"".join(b"1\r\n%c\r\n" % byte for byte in MEANT) + b"0\r\n\r\n",
    "an extension": _HEX + b";a=b\r\n" + MEANT + _END,
    "an extension without a value": _HEX + b";a\r\n" + MEANT + _END,
    "a quoted extension": _HEX + b';a="b c"\r\n' + MEANT + _END,
    "an extension of the last chunk": _HEX + b"\r\n" + MEANT + b"\r\n0;a=b\r\n\r\n",
    "a last chunk of many zeros": _HEX + b"\r\n" + MEANT + b"\r\n0000\r\n\r\n",
    "a trailer": _HEX + b"\r\n" + MEANT + b"\r\n0\r\nX-A: b\r\n\r\n",
}
_BAD_CHUNKS = {
    "no size": b"\r\n" + MEANT + _END,
    "no digit": b"zz\r\n" + MEANT + _END,
    "a prefix": b"0x" + _HEX + b"\r\n" + MEANT + _END,
    "a sign": b"+" + _HEX + b"\r\n" + MEANT + _END,
    "a negative size": b"-" + _HEX + b"\r\n" + MEANT + _END,
    "minus one": b"-1\r\n" + MEANT + _END,
    "an underscore": b"2_1\r\n" + MEANT + _END,
    "a blank before the size": b" " + _HEX + b"\r\n" + MEANT + _END,
    "a tab before the size": b"\t" + _HEX + b"\r\n" + MEANT + _END,
    "a tab behind the size": _HEX + b"\t\r\n" + MEANT + _END,
    "two sizes": _HEX + b" " + _HEX + b"\r\n" + MEANT + _END,
    "a comma": _HEX + b",\r\n" + MEANT + _END,
    "NUL behind the size": _HEX + b"\x00\r\n" + MEANT + _END,
    "more than 64 bits": b"1" + b"0" * 14 + _HEX + b"\r\n" + MEANT + _END,
    "far more than 64 bits": b"f" * 40 + b"\r\n" + MEANT + _END,
    "a line feed behind the size": _HEX + b"\n" + MEANT + _END,
    "a carriage return behind the size": _HEX + b"\r" + MEANT + _END,
    "two carriage returns": _HEX + b"\r\r\n" + MEANT + _END,
    "a line feed in an extension": _HEX + b";a\nb\r\n" + MEANT + _END,
    "a line feed behind an extension": _HEX + b";a=b\n" + MEANT + _END,
    "a carriage return in an extension": _HEX + b";a\rb\r\n" + MEANT + _END,
    "NUL in an extension": _HEX + b";a\x00b\r\n" + MEANT + _END,
    "a line feed in a quoted extension": _HEX + b';a="\n"\r\n' + MEANT + _END,
    "nothing behind the data": _HEX + b"\r\n" + MEANT + b"0\r\n\r\n",
    "a line feed behind the data": _HEX + b"\r\n" + MEANT + b"\n0\r\n\r\n",
    "a carriage return behind the data": _HEX + b"\r\n" + MEANT + b"\r0\r\n\r\n",
    "other bytes behind the data": _HEX + b"\r\n" + MEANT + b"xx0\r\n\r\n",
    "a size too small": b"5\r\n" + MEANT + _END,
    "a line feed behind the last chunk": _HEX + b"\r\n" + MEANT + b"\r\n0\n\r\n",
    "a line feed at the end": _HEX + b"\r\n" + MEANT + b"\r\n0\r\n\n",
    "a last chunk of a sign": _HEX + b"\r\n" + MEANT + b"\r\n-0\r\n\r\n",
    "a trailer without a colon": _HEX + b"\r\n" + MEANT + b"\r\n0\r\nX-A\r\n\r\n",
    "a trailer with a blank before its colon": _HEX + b"\r\n" + MEANT + b"\r\n0\r\nX-A : b\r\n\r\n",
    "a folded trailer": _HEX + b"\r\n" + MEANT + b"\r\n0\r\nX-A: b\r\n c\r\n\r\n",
    "a trailer behind a line feed": _HEX + b"\r\n" + MEANT + b"\r\n0\r\nX-A: b\nX-C: d\r\n\r\n",
    "NUL in a trailer": _HEX + b"\r\n" + MEANT + b"\r\n0\r\nX-A: \x00\r\n\r\n",
    "a request as the trailer": _HEX + b"\r\n" + MEANT + b"\r\n0\r\n" + SMUGGLED,
    "a length as the trailer": _HEX + b"\r\n" + MEANT + b"\r\n0\r\nContent-Length: 5\r\n\r\n",
    "a coding as the trailer": _HEX + b"\r\n" + MEANT + b"\r\n0\r\nTransfer-Encoding: chunked\r\n\r\n",
    "no last line": _HEX + b"\r\n" + MEANT + b"\r\n0\r\n",
    "a trailer of 100 kB": _HEX + b"\r\n" + MEANT + b"\r\n0\r\nX-A: " + b"b" * 100_000 + b"\r\n\r\n",
}


def _chunks() -> Iterator[tuple[str, Case]]:
    for name, body in _GOOD_CHUNKS.items():
        yield name, served(a_request(CHUNKED, body=body))
    for name, body in _BAD_CHUNKS.items():
        yield name, refused(a_request(CHUNKED, body=body))
    # RFC 9112 §7.1.1: a server ought to limit the length; aiohttp keeps nothing of it, and sets no limit.
    yield (
        "an extension of 100 kB",
        tolerated(a_request(CHUNKED, body=_HEX + b";" + b"a" * 100_000 + b"\r\n" + MEANT + _END)),
    )
    yield "a size too large", unfinished(a_request(CHUNKED, body=b"fff\r\n" + MEANT + _END))
    yield "no last chunk", refused(a_request(CHUNKED, body=_HEX + b"\r\n" + MEANT + b"\r\n"))


# -- lines -------------------------------------------------------------------------------------------------------------


def _lines() -> Iterator[tuple[str, Case]]:
    good = sized(b"X-A: b")
    for spelt, end in {
        "LF": b"\n", "CR": b"\r", "CR CR LF": b"\r\r\n", "LF CR": b"\n\r", "CR NUL LF": b"\r\x00\n",
        "CR blank LF": b"\r \n",
        "vertical tab": b"\x0b", "form feed": b"\x0c", "CRLF blank": b"\r\n ", "CRLF tab": b"\r\n\t",
        "NUL CRLF": b"\x00\r\n",
    }.items():  # fmt: skip
        parts = good.split(b"\r\n")
        for number in range(len(parts) - 1):
            raw = b"\r\n".join(parts[: number + 1]) + end + b"\r\n".join(parts[number + 1 :])
            is_in_body = number == len(parts) - 2 and end.startswith(b"\r\n")
            # A blank behind the head is the body's first byte, whose last one is then too much.
            yield f"{spelt} for line end {number}", Case(raw, (400, 400)) if is_in_body else refused(raw)
    yield "line feeds only", refused(good.replace(b"\r\n", b"\n"))
    yield "carriage returns only", refused(good.replace(b"\r\n", b"\r"))
    yield "an empty line before it", served(b"\r\n" + good)
    yield "a line feed before it", tolerated(b"\n" + good)  # RFC 9112 §2.2
    yield "a blank before it", refused(b" " + good)
    yield "NUL before it", refused(b"\x00" + good)
    yield "a byte order mark before it", refused(b"\xef\xbb\xbf" + good)
    yield "blanks at a value's ends", served(sized(b"X-A:\t  b \t "))
    yield "no blank behind a colon", served(sized(b"X-A:b"))
    yield "an empty value", served(sized(b"X-A:", b"X-B: "))
    yield "a value of blanks", served(sized(b"X-A:  \t "))
    yield "an empty name", refused(sized(b": b"))
    yield "a colon alone", refused(sized(b":"))
    yield "no colon", refused(sized(b"X-A b"))
    yield "a blank in a name", refused(sized(b"X A: b"))
    yield "a request as a header", refused(sized(b"POST /v1/chat/completions HTTP/1.1"))
    yield "a first header that is folded", refused(sized().replace(b"Host:", b" X-A: b\r\nHost:"))


_CONTROLS = (*range(0x20), 0x7F)


def _bytes() -> Iterator[tuple[str, Case]]:
    for byte in _CONTROLS:
        if byte not in (0x0A, 0x0D):  # Line ends have a table of their own.
            if byte != 0x09:
                yield f"{byte:02x} in a value", refused(sized(b"X-A: b%cc" % byte))
                yield f"{byte:02x} at a value's end", refused(sized(b"X-A: b%c" % byte))
            yield f"{byte:02x} in a name", refused(sized(b"X%cA: b" % byte))
            yield f"{byte:02x} in a target", refused(sized(first=b"POST %b%c HTTP/1.1" % (CHAT, byte)))
            yield f"{byte:02x} in a query", refused(sized(first=b"POST %b?a=%cb HTTP/1.1" % (CHAT, byte)))
            yield f"{byte:02x} in a method", refused(sized(first=b"PO%cST %b HTTP/1.1" % (byte, CHAT)))
            yield f"{byte:02x} in a version", refused(sized(first=b"POST %b HTTP/1.%c1" % (CHAT, byte)))
    for byte in b'"(),/;<=>?@[\\]{}\x80\xa0\xff':
        yield f"{byte:02x} in a name", refused(sized(b"X%cA: b" % byte))
    for byte in b"!#$%&'*+.^_`|~":
        yield f"{byte:02x} in a name", served(sized(b"X%cA: b" % byte))
    yield "a tab in a value", served(sized(b"X-A: b\tc"))
    yield "85 in a value", served(sized(b"X-A: b\x85X-C: d"))
    yield "ff in a value", served(sized(b"X-A: \xff"))
    yield "UTF-8 in a value", served(sized("X-A: größe 🦆".encode()))


# -- first lines -------------------------------------------------------------------------------------------------------


def _first_lines() -> Iterator[tuple[str, Case]]:
    def first(line: bytes) -> bytes:
        return sized(first=line)

    yield "absolute form", served(first(b"POST http://elsewhere.invalid" + CHAT + b" HTTP/1.1"))
    yield "absolute form with https", served(first(b"POST https://elsewhere.invalid" + CHAT + b" HTTP/1.1"))
    yield "absolute form in capitals", served(first(b"POST HTTP://elsewhere.invalid" + CHAT + b" HTTP/1.1"))
    yield "absolute form with a user", served(first(b"POST http://a:b@elsewhere.invalid" + CHAT + b" HTTP/1.1"))
    yield "absolute form of another scheme", answered(first(b"POST ftp://elsewhere.invalid" + CHAT + b" HTTP/1.1"), 404)
    yield "absolute form without a path", answered(first(b"POST http://elsewhere.invalid HTTP/1.1"), 404)
    yield "authority form", refused(first(b"POST elsewhere.invalid:80 HTTP/1.1"))
    # Behind a refused CONNECT bytes may be the tunnel's.
    yield "CONNECT", Case(first(b"CONNECT elsewhere.invalid:80 HTTP/1.1"), (404,))
    yield "CONNECT to a path", Case(first(b"CONNECT " + CHAT + b" HTTP/1.1"), (404,))
    yield (
        "CONNECT, with a request as its body",
        Case(sized(body=SMUGGLED, first=b"CONNECT elsewhere.invalid:80 HTTP/1.1"), (404,)),
    )
    yield (
        "CONNECT, with a request behind it",
        Case(b"CONNECT elsewhere.invalid:80 HTTP/1.1\r\nHost: elsewhere.invalid:80\r\n\r\n" + SMUGGLED, (404,)),
    )
    yield "asterisk form", answered(first(b"OPTIONS * HTTP/1.1"), 404)
    yield "a POST to an asterisk", refused(first(b"POST * HTTP/1.1"))
    yield "no slash", refused(first(b"POST v1/chat/completions HTTP/1.1"))
    yield "a backslash", refused(first(b"POST \\v1\\chat\\completions HTTP/1.1"))
    yield "a fragment", answered(first(b"POST " + CHAT + b"#a HTTP/1.1"), 404)
    yield "a fragment with a path", answered(first(b"POST " + CHAT + b"#/../../x HTTP/1.1"), 404)
    yield "two slashes", answered(first(b"POST /" + CHAT + b" HTTP/1.1"), 404)
    yield "two slashes within", answered(first(b"POST /v1//chat/completions HTTP/1.1"), 404)
    yield "an escaped slash", answered(first(b"POST /v1%2fchat/completions HTTP/1.1"), 404)
    yield "an escaped line end", answered(first(b"POST /v1/chat/completions%0d%0aX-A:%20b HTTP/1.1"), 404)
    yield (
        "an escaped line end in the query",
        Case(first(b"POST " + CHAT + b"?a=%0d%0aX-A:%20b HTTP/1.1"), (200, 200), ("meant?a=%0D%0AX-A%3A+b", "marker")),
    )
    yield "half an escape", answered(first(b"POST /v1/chat/completions%2 HTTP/1.1"), 404)
    yield "a question mark only", served(first(b"POST " + CHAT + b"? HTTP/1.1"))
    yield "a raw byte in the path", refused(first(b"POST /v1/chat\xff HTTP/1.1"))
    yield "a raw byte in the query", refused(first(b"POST " + CHAT + b"?a=\xff HTTP/1.1"))
    # RFC 9112 §3: a server may read words with any blanks between them.
    yield "two blanks before the target", tolerated(first(b"POST  " + CHAT + b" HTTP/1.1"))
    yield "two blanks behind the target", tolerated(first(b"POST " + CHAT + b"  HTTP/1.1"))
    yield "a tab before the target", refused(first(b"POST\t" + CHAT + b" HTTP/1.1"))
    yield "a tab behind the target", refused(first(b"POST " + CHAT + b"\tHTTP/1.1"))
    yield "a blank behind the version", refused(first(b"POST " + CHAT + b" HTTP/1.1 "))
    yield "a blank in the target", refused(first(b"POST " + CHAT + b" x HTTP/1.1"))
    yield "two versions", refused(first(b"POST " + CHAT + b" HTTP/1.1 HTTP/1.1"))
    yield "no target", refused(first(b"POST HTTP/1.1"))
    yield "no version", refused(first(b"POST " + CHAT))
    yield "HTTP/0.9", Case(b"GET /healthz\r\n")
    for version in (
        b"HTTP/0.9", b"HTTP/1.2", b"HTTP/1.9", b"HTTP/2", b"HTTP/2.0", b"HTTP/3.0", b"HTTP/1", b"HTTP/1.", b"HTTP/.1",
        b"HTTP/01.1", b"HTTP/1.01", b"HTTP/1.10", b"HTTP/11.1", b"HTTP/1,1", b"http/1.1", b"Http/1.1", b"HTTPS/1.1",
        b"ICE/1.0", b"HTTP /1.1", b"HTTP/ 1.1", b"HTTP/1 .1", b"HTTP/-1.1", b"HTTP/1.1x", b"XHTTP/1.1",
        b"HTTP/1.\xef\xbc\x91", b"HTP/1.1", b"HTTP/A.B",
    ):  # fmt: skip
        yield f"{version!r}", refused(first(b"POST " + CHAT + b" " + version))
    for method in (
        b"post", b"Post", b"pOST", b"POS", b"POSTX", b"XPOST", b"BREW", b"P0ST", b"PO-ST", b"", b'"POST"', b"POST,POST",
        b"PO\xd0\x85T", b"@", b"(", b"POST:", b"PRI",
    ):  # fmt: skip
        yield f"{method!r}", refused(first(method + b" " + CHAT + b" HTTP/1.1"))
    for method in (b"PUT", b"PATCH", b"DELETE", b"OPTIONS", b"TRACE", b"PROPFIND", b"SOURCE", b"M-SEARCH", b"GET"):
        yield f"{method!r}", answered(first(method + b" " + CHAT + b" HTTP/1.1"), 404)
    # For aiohttp it is another name of HTTP/1.0; there is one reading of what follows.
    yield "RTSP/1.0", Case(first(b"POST " + CHAT + b" RTSP/1.0"), (200,), ("meant",), or_else=((400,), ()))
    yield "a preface of HTTP/2", refused(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9))
    yield "a handshake of TLS", refused(bytes.fromhex("1603010200010001fc0303"))
    yield "HTTP/1.0", Case(first(b"POST " + CHAT + b" HTTP/1.0"), (200,), ("meant",))
    yield "HTTP/1.0 that is kept alive", served(sized(b"Connection: keep-alive", first=b"POST " + CHAT + b" HTTP/1.0"))
    yield "a target of 8 kB", answered(first(b"POST /" + b"a" * 8000 + b" HTTP/1.1"), 404)
    yield "a target of 9 kB", refused(first(b"POST /" + b"a" * 9000 + b" HTTP/1.1"))
    yield "a method of 9 kB", refused(first(b"P" * 9000 + b" " + CHAT + b" HTTP/1.1"))
    yield "a version of 9 kB", refused(first(b"POST " + CHAT + b" HTTP/1." + b"1" * 9000))


# -- headers -----------------------------------------------------------------------------------------------------------


def _headers() -> Iterator[tuple[str, Case]]:
    def host(lines: bytes) -> bytes:
        return a_request(LENGTH, host=lines)

    yield "no host", refused(host(b""))
    yield "two hosts", refused(host(b"Host: a\r\nHost: b\r\n"))
    yield "the same host twice", refused(host(b"Host: a\r\nHost: a\r\n"))
    yield "an empty host", served(host(b"Host:\r\n"))
    yield "a host of blanks", served(host(b"Host:  \r\n"))
    yield "a host with a port", served(host(b"Host: gateway:8080\r\n"))
    yield "a host of many signs", served(host(b"Host: a,b;c=d!$&'()*+~_%41.invalid:\r\n"))
    yield "a host in IPv6", served(host(b"Host: [::1]:8080\r\n"))
    for value in (b"a b", b"a/b", b"a@b", b"a\tb", b"a#b", b"a?b", b"a\\b", b"[::1", b"a:b", b"a:1:2", b"\xff"):
        yield f"host {value!r}", refused(host(b"Host: " + value + b"\r\n"))
    yield (
        "no host in HTTP/1.0",
        Case(a_request(LENGTH, host=b"", first=b"POST " + CHAT + b" HTTP/1.0"), (200,), ("meant",)),
    )
    yield "an expectation", Case(sized(b"Expect: 100-continue"), (100, 200, 200), ("meant", "marker"))
    yield "an expectation in capitals", Case(sized(b"Expect: 100-Continue"), (100, 200, 200), ("meant", "marker"))
    yield (
        "an expectation before chunks",
        Case(a_request(b"Expect: 100-continue", CHUNKED, body=CHUNKS), (100, 200, 200), ("meant", "marker")),
    )
    yield (
        "an expectation in HTTP/1.0",
        Case(sized(b"Expect: 100-continue", first=b"POST " + CHAT + b" HTTP/1.0"), (200,), ("meant",)),
    )
    for value in (
        b"a miracle",
        b"100",
        b"100-continue, 100-continue",
        b"100-continue;a=b",
        b"200-ok",
        b"100-continuex",
    ):
        yield f"expectation {value!r}", Case(sized(b"Expect: " + value), (417,), ())
    yield "two expectations", Case(sized(b"Expect: 100-continue", b"Expect: a miracle"), (417,), ())
    for value in (b"h2c", b"websocket", b"TLS/1.3", b"HTTP/2.0, x"):
        yield f"upgrade to {value!r}", not_upgraded(sized(b"Connection: Upgrade", b"Upgrade: " + value))
        yield f"upgrade to {value!r} without an option", served(sized(b"Upgrade: " + value))
    yield (
        "an upgrade with settings of HTTP/2",
        not_upgraded(
            sized(b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA")
        ),
    )
    yield (
        "an upgrade before chunks",
        not_upgraded(a_request(b"Connection: Upgrade", b"Upgrade: h2c", CHUNKED, body=CHUNKS)),
    )
    yield "an upgrade without a body", Case(a_request(b"Connection: Upgrade", b"Upgrade: h2c", body=SMUGGLED), (400,))
    for value in (b"close", b"Close", b"close, x-a", b"keep-alive, close", b"x-a,close"):
        yield f"connection {value!r}", Case(sized(b"Connection: " + value), (200,), ("meant",))
    for value in (b"keep-alive", b"content-length", b"transfer-encoding", b"host", b"closed", b"", b"x"):
        yield f"connection {value!r}", served(sized(b"Connection: " + value))
    yield "120 headers", served(sized(*(b"X-%d: y" % i for i in range(120))))
    yield "200 headers", refused(sized(*(b"X-%d: y" % i for i in range(200))))
    yield "a value of 8 kB", served(sized(b"X-A: " + b"y" * 8000))
    # The lane reads heads of 8192 bytes and 64 headers; aiohttp lines of 8190 bytes and 128 headers.
    for size in (8190, 8191):
        fate = served if size == 8190 else refused
        yield f"a value of {size} bytes", fate(sized(b"X-A: " + b"y" * size))
    for size in range(8189, 8195):
        rest = size - len(sized(b"X-A: ", b"X-B: ", body=b""))
        yield f"a head of about {size} bytes", served(sized(b"X-A: " + b"y" * 4000, b"X-B: " + b"y" * (rest - 4000)))
    for count in (63, 64, 65, 128, 129):
        fate = served if count <= 128 else refused
        yield f"{count} headers", fate(sized(*(b"X-%d: y" % number for number in range(count - 3))))
    yield "a value of 9 kB", refused(sized(b"X-A: " + b"y" * 9000))
    yield "a name of 9 kB", refused(sized(b"X" * 9000 + b": y"))
    yield "a head that never ends", refused(b"POST " + CHAT + b" HTTP/1.1\r\nX-A: " + b"y" * 300_000)
    yield "values of 100 kB", served(sized(*(b"X-%d: " % i + b"y" * 8000 for i in range(12))))
    yield "a request id with a line end escaped", served(sized(b"X-Request-Id: a%0d%0aX-B: c"))
    yield "two content types", refused(sized(b"Content-Type: text/plain"))


# -- what follows ------------------------------------------------------------------------------------------------------


def _followed() -> Iterator[tuple[str, Case]]:
    yield "a second request", Case(sized() + SMUGGLED, (200, 200, 200), ("meant", "smuggled", "marker"))
    yield "ten more", Case(sized() * 11, (200,) * 12, ("meant",) * 11 + ("marker",))
    yield "forty more", Case(sized() * 41, (200,) * 42, ("meant",) * 41 + ("marker",))
    yield "an empty line", served(sized() + b"\r\n")
    yield "three empty lines", served(sized() + b"\r\n" * 3)
    yield (
        "a probe of health",
        Case(sized() + b"GET /healthz HTTP/1.1\r\nHost: gateway\r\n\r\n", (200, 200, 200), ("meant", "marker")),
    )
    yield "another path", Case(sized() + sized(first=b"POST /nowhere HTTP/1.1"), (200, 404, 200), ("meant", "marker"))
    yield "a bad body", Case(sized() + sized(body=b"{"), (200, 400, 200), ("meant", "marker"))
    yield "chunks", Case(sized() + a_request(CHUNKED, body=CHUNKS), (200, 200, 200), ("meant", "meant", "marker"))
    yield (
        "a second behind chunks",
        Case(a_request(CHUNKED, body=CHUNKS) + SMUGGLED, (200, 200, 200), ("meant", "smuggled", "marker")),
    )
    yield "a second behind the last of the connection", Case(sized(b"Connection: close") + SMUGGLED, (200,), ("meant",))
    yield "noise behind the last of the connection", Case(sized(b"Connection: close") + bytes(64), (200,), ("meant",))
    for name, more in {
        "noise": b"\x00\x01\x02\x03",
        "a word": b"GOAWAY",
        "a bad request": a_request(LENGTH, b"Content-Length: 0"),
        "a request with both framings": a_request(LENGTH, CHUNKED, body=b"0\r\n\r\n" + SMUGGLED),
        "a carriage return": b"\rx",
    }.items():
        yield name, Case(sized() + more, (200, 400), ("meant",))
    yield "half a request", Case(sized() + SMUGGLED[:-9], (200,), ("meant",), is_unfinished=True)


TABLES: dict[str, dict[str, Case]] = {
    "length": dict(_lengths()),
    "coding": dict(_codings()),
    "chunks": dict(_chunks()),
    "line": dict(_lines()),
    "byte": dict(_bytes()),
    "first line": dict(_first_lines()),
    "headers": dict(_headers()),
    "followed by": dict(_followed()),
}
CASES: dict[str, Case] = {f"{table}: {name}": case for table, cases in TABLES.items() for name, case in cases.items()}
