"""Answers that have come as a whole, in one piece: most JSON answers. They are read here without a parser.

What is read is a part of HTTP/1.1 that has one meaning only, and means the same to the parser; all else, valid or not,
is left to that.
"""

from __future__ import annotations

import re

from balancer.dialects import Headers

_MOST_HEAD_BYTES = 8192
_LINE = b"HTTP/1.1 200 OK\r\n"
# RFC 9112 §5: no space before the colon, no folding, no control characters; and no bytes beyond ASCII. Every quantifier
# is possessive, so that no head takes long.
_FIELD = re.compile(r"(?<=\n)([!#$%&'*+.^_`|~0-9A-Za-z-]++):[ \t]*+([ -~\t]*+)\r\n")
_LONGEST_LENGTH = 15

_LENGTH, _CONNECTION, _ELSEWHERE = 1, 2, 3
_KINDS = {
    "content-length": _LENGTH,
    "connection": _CONNECTION,
    "proxy-connection": _ELSEWHERE,
    "trailer": _ELSEWHERE,
    "transfer-encoding": _ELSEWHERE,
    "upgrade": _ELSEWHERE,
}
_KNOWN = 1024
_known: dict[str, int] = {}
"""What a header means to us, 0 for nothing, by its name as it is spelt; names recur."""


def read_whole(data: bytes) -> tuple[Headers, bytes] | None:
    """Headers and body of an answer with status 200 that keeps its connection; None for any other, or a part of one."""
    end = data.find(b"\r\n\r\n", 0, _MOST_HEAD_BYTES)
    if end < 0 or not data.startswith(_LINE):
        return None
    text = data[: end + 2].decode("latin-1")
    headers: list[tuple[str, str]] = _FIELD.findall(text, len(_LINE))
    # Each match is one line and begins behind one: as many as there are lines means that nothing was passed over.
    if len(headers) != text.count("\n") - 1 or " \r\n" in text or "\t\r\n" in text:
        return None
    length = ""
    for name, value in headers:
        kind = _known.get(name)
        if kind is None:
            kind = _learned(name)
        if not kind:
            continue
        if kind == _LENGTH and not length and value.isdecimal() and len(value) <= _LONGEST_LENGTH:
            length = value
        elif kind != _CONNECTION or value.lower() != "keep-alive":
            return None
    if not length or len(data) - end - 4 != int(length):
        return None
    return tuple(headers), data[end + 4 :]


def _learned(name: str) -> int:
    kind = _KINDS.get(name.lower(), 0)
    if len(_known) < _KNOWN:
        _known[name] = kind
    return kind
