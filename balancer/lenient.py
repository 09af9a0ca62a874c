r"""JSON as others write it: msgspec's strict decoders, and what they refuse though the meaning is plain.

A lone surrogate ("\ud83d") comes from servers and clients that cut a text between the two halves of an emoji; RFC 8259
§8.2 lets them. msgspec refuses it even in fields that it skips.
"""

from __future__ import annotations

import re
from typing import TypeVar

import msgspec

T = TypeVar("T")

UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""All that msgspec raises for bytes which are malformed, of another shape, no UTF-8, or nested beyond reason."""

REPLACEMENT = "\ufffd"
"""What stands for a lone surrogate in what was decoded."""

_LONE_SURROGATE = re.compile(
    rb"\\u[dD](?:[89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])|[c-fC-F][0-9a-fA-F]{2}(?<!\\u[dD][89abAB]..\\u[dD]...))"
)


def decode(decoder: msgspec.json.Decoder[T], data: bytes | bytearray | msgspec.Raw) -> T:
    """What the bytes hold. Raises UNREADABLE; costs a second pass only where the first has failed."""
    try:
        return decoder.decode(data)
    except msgspec.ValidationError:
        raise
    except msgspec.DecodeError:
        plain = bytes(data)
        mended = _LONE_SURROGATE.sub(rb"\\ufffd", plain) if rb"\u" in plain else plain
        if mended == plain:
            raise
        return decoder.decode(mended)
