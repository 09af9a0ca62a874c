"""The heads of requests that the lane serves itself, a part of what HTTP/1.1 allows that has one meaning only.

Whatever is not in it, valid or not, is for the full parser to judge: nothing is refused here. A head that is read here
means the same to that parser.
"""

from __future__ import annotations

import re

import msgspec

from balancer.dialects import Headers
from balancer.gateway.fields import FIELD, LONGEST_LENGTH

MAX_HEAD_BYTES = 8192
MAX_HEADERS = 64
BEGINNING = b"POST /"
"""How every request of the lane begins."""

# RFC 9112 §3: a target in origin form (§3.2.1) of the characters of RFC 3986 §3.3, 3.4; `//` may hide an authority.
_SEGMENTS = r"!$%&'()*+,./0-9:;=@A-Z_a-z~-"
_LINE = re.compile(rf"POST (/(?!/)[{_SEGMENTS}]*+)(?:\?([?{_SEGMENTS}]*+))? HTTP/1\.1\r\n")
_HOST = re.compile(r"(?:[A-Za-z0-9._-]++|\[[0-9A-Fa-f:.]++\])(?::[0-9]++)?")
_UNFINISHED = re.compile(r"(?![ \t])[ -~\t]*+\r?")

# What frames the body in another way, or asks for more than an answer.
_ELSEWHERE = frozenset(
    ["transfer-encoding", "te", "trailer", "expect", "upgrade", "proxy-connection", "sec-websocket-key1"]
)
# Of which a second one is a fault, or means something else than the first.
_SINGLE = (
    "connection",
    "content-length",
    "content-location",
    "content-range",
    "content-type",
    "etag",
    "host",
    "max-forwards",
    "server",
    "user-agent",
    "x-request-id",
)
_LENGTH = re.compile(rb"\r\n[Cc][Oo][Nn][Tt][Ee][Nn][Tt]-[Ll][Ee][Nn][Gg][Tt][Hh]:[ \t]*+([0-9]++)")


class Head(msgspec.Struct, frozen=True, gc=False):
    """A head that was read: the target in parts, headers in order without Content-Length, the body's length."""

    path: str
    query: str
    headers: Headers
    first: dict[str, str]
    """The first value of each header by its name in lower case."""
    length: int
    is_last: bool
    """True if the client wants the connection closed behind the answer."""


def is_beginning(data: bytes) -> bool:
    """True if a head of ours may begin so: of its lines nothing can be wrong yet."""
    if not data.startswith(BEGINNING):
        return BEGINNING.startswith(data)
    text = data.decode("latin-1")
    end = text.rfind("\r\n") + 2
    if end == 1:
        return _UNFINISHED.fullmatch(text) is not None
    line = _LINE.match(text)
    if line is None or _UNFINISHED.fullmatch(text, end) is None:
        return False
    return len(FIELD.findall(text, line.end(), end)) == text.count("\n") - 1


def read_head(data: bytes) -> Head | None:
    """What a head says, given with its last header's line end and without the empty line; None for other than ours."""
    text = data.decode("latin-1")
    line = _LINE.match(text)
    if line is None:
        return None
    headers: list[tuple[str, str]] = FIELD.findall(text, line.end())
    # Each match is one line and begins behind one: as many as there are lines means that nothing was passed over.
    if len(headers) != text.count("\n") - 1 or len(headers) > MAX_HEADERS:
        return None
    if " \r\n" in text or "\t\r\n" in text:
        return None
    first = {name.lower(): value for name, value in reversed(headers)}
    if not _HOST.fullmatch(first.get("host", "")) or not first.keys().isdisjoint(_ELSEWHERE):
        return None
    if len(first) != len(headers):
        names = [name.lower() for name, _ in headers]
        if any(names.count(name) > 1 for name in _SINGLE):
            return None
    length = first.get("content-length", "")
    if not length.isdecimal() or len(length) > LONGEST_LENGTH:
        return None
    del first["content-length"]
    kept = tuple([pair for pair in headers if pair[0].lower() != "content-length"])
    option = first.get("connection", "keep-alive").lower()
    if option not in ("keep-alive", "close"):
        return None
    return Head(line[1], line[2] or "", kept, first, int(length), option == "close")


class Repeat(msgspec.Struct, frozen=True, gc=False):
    """A head that was read, to know it again: most clients send the same one each time, but for the body's length."""

    before: bytes
    behind: bytes
    """Its bytes before and behind the length's digits, with the empty line."""
    head: Head

    def read(self, data: bytes) -> tuple[Head, int] | None:
        """The head that data begins with and where its body begins; None if it is not the same, or not whole."""
        if not data.startswith(self.before):
            return None
        begin = len(self.before)
        end = data.find(b"\r", begin, begin + LONGEST_LENGTH + 1)
        digits = data[begin:end]
        if end < 0 or not digits.isdigit() or not data.startswith(self.behind, end):
            return None
        head = self.head
        length = int(digits)
        if length != head.length:
            head = Head(head.path, head.query, head.headers, head.first, length, head.is_last)
        return head, end + len(self.behind)


def repeat_of(data: bytes, head: Head) -> Repeat | None:
    """How to know again a head that was read from these bytes, the empty line included."""
    length = _LENGTH.search(data)
    if length is None:
        return None
    return Repeat(data[: length.start(1)], data[length.end(1) :], head)
