"""Chunks of a body (RFC 9112 §7.1) as nearly all upstreams send them: whole, and spelt in a way that all read alike.

Such bytes can be handed on as they came, framing included. Everything else is the parser's to read, or to refuse.
"""

from __future__ import annotations

import re

_BEGINNING = 6
"""Bytes of a chunk by which its size is known: up to four digits, and the line's end."""
_SIZE = re.compile(rb"([1-9a-f][0-9a-f]{1,3}|[1-9A-F][0-9A-F]{1,3})\r\n")
"""No leading zeros, which some read as octal, no extensions, no white space, and letters of one kind."""
_KNOWN = 4096
_known: dict[bytes, tuple[int, int]] = {}
"""Where a chunk's data begins, and where the chunk ends, by the chunk's first bytes; they recur."""


def data_of(chunks: bytes) -> bytes | None:
    """The data in one whole chunk, or several; None unless the bytes are that and nothing else, each spelt plainly.

    The last chunk, which has no data, is not among them.
    """
    beginning = chunks[:_BEGINNING]
    begin, end = _known.get(beginning) or _learned(beginning)
    if end == len(chunks):
        return chunks[begin:-2] if chunks.endswith(b"\r\n") else None
    parts = []
    at = 0
    while end and chunks[at + end - 2 : at + end] == b"\r\n":
        parts.append(chunks[at + begin : at + end - 2])
        at += end
        if at == len(chunks):
            return b"".join(parts)
        beginning = chunks[at : at + _BEGINNING]
        begin, end = _known.get(beginning) or _learned(beginning)
    return None


def _learned(beginning: bytes) -> tuple[int, int]:
    """Where a chunk's data begins and the chunk ends; (0, 0) where its size is not spelt plainly."""
    match = _SIZE.match(beginning)
    if match is None:
        return 0, 0
    known = match.end(), match.end() + int(match[1], 16) + 2
    if len(_known) < _KNOWN:
        _known[beginning] = known
    return known
