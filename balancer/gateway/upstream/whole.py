"""Answers that have come as a whole, in one piece: most JSON answers. They are read here without a parser.

What is read is a part of HTTP/1.1 that has one meaning only, and means the same to the parser; all else, valid or not,
is left to that.
"""

from __future__ import annotations

from balancer.dialects import Headers
from balancer.gateway.fields import FIELD, LONGEST_LENGTH

MOST_HEADERS = 256
_MOST_HEAD_BYTES = 8192
_LINE = b"HTTP/1.1 200 OK\r\n"

_ELSEWHERE = frozenset(["proxy-connection", "trailer", "transfer-encoding", "upgrade"])
"""What frames a body in another way, or is about the connection."""

_KEPT = 256
_places: dict[tuple[str, ...], tuple[int, int]] = {}
"""Where among headers of these names Content-Length and Connection stand, -1 for nowhere; names recur.

The first is -1 too where an answer with such names is not for us.
"""


def read_whole(data: bytes) -> tuple[Headers, bytes] | None:
    """Headers and body of an answer with status 200 that keeps its connection; None for any other, or a part of one."""
    end = data.find(b"\r\n\r\n", 0, _MOST_HEAD_BYTES)
    if end < 0 or not data.startswith(_LINE):
        return None
    text = data[: end + 2].decode("latin-1")
    headers: list[tuple[str, str]] = FIELD.findall(text, len(_LINE))
    if not headers or len(headers) != text.count("\n") - 1 or " \r\n" in text or "\t\r\n" in text:
        return None
    names, values = zip(*headers)  # noqa: B905 - pairs; `strict` would take as long again.
    length_at, connection_at = _places.get(names) or _places_of(names)
    if length_at < 0 or (connection_at >= 0 and values[connection_at].lower() != "keep-alive"):
        return None
    length, body = values[length_at], data[end + 4 :]
    if not length.isdecimal() or len(length) > LONGEST_LENGTH or len(body) != int(length):
        return None
    return tuple(headers), body


def _places_of(names: tuple[str, ...]) -> tuple[int, int]:
    if len(names) > MOST_HEADERS:
        return -1, -1
    lower = [name.lower() for name in names]
    is_ours = lower.count("content-length") == 1 and lower.count("connection") <= 1 and _ELSEWHERE.isdisjoint(lower)
    connection_at = lower.index("connection") if "connection" in lower else -1
    places = (lower.index("content-length") if is_ours else -1, connection_at)
    if len(_places) >= _KEPT:
        _places.clear()
    _places[names] = places
    return places
