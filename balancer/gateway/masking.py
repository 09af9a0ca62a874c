"""Credentials that an upstream repeats: what we sent it must not come down to a client."""

from __future__ import annotations

import re
from collections.abc import Iterable
from urllib.parse import quote, quote_plus

import msgspec

from balancer.dialects import Headers

_MASK = "***"
_PLAIN = re.compile(r"[A-Za-z0-9._~-]*")
_LEAST_LENGTH = 8
"""What is shorter is no secret, and stands in too many words."""


class Mask:
    """Lies over the values that were sent upstream. Its repr shows nothing of them."""

    def __init__(self, values: Iterable[str] = ()) -> None:
        self._texts = tuple(text for value in values if len(value) >= _LEAST_LENGTH for text in _spellings(value))
        self._bytes = tuple(text.encode("utf-8", "surrogateescape") for text in self._texts)

    def __bool__(self) -> bool:
        return bool(self._texts)

    def shows_in(self, data: bytes | bytearray) -> bool:
        """True when one of the values stands in it."""
        return any(secret in data for secret in self._bytes)

    def shows_in_text(self, text: str) -> bool:
        """True when one of the values stands in it."""
        for secret in self._texts:  # noqa: SIM110 - a generator would take several times as long.
            if secret in text:
                return True
        return False

    def over(self, data: bytes) -> bytes:
        """The data with the values masked; the same object when there are none."""
        for secret in self._bytes:
            if secret in data:
                data = data.replace(secret, _MASK.encode())
        return data

    def over_headers(self, headers: Headers) -> Headers:
        """The headers with the values masked. Looks at each once, in well under a microsecond a header."""
        if not self._texts:
            return headers
        values = "\n".join([value for _, value in headers])
        for secret in self._texts:
            if secret in values:
                headers = tuple((name, value.replace(secret, _MASK)) for name, value in headers)
        return headers


def _spellings(value: str) -> set[str]:
    """The value as it is, and as it stands in a JSON string or in a URL."""
    if _PLAIN.fullmatch(value):
        return {value}  # Most are: this is built for every request.
    in_json = msgspec.json.encode(value)[1:-1].decode()
    return {value, in_json, in_json.replace("/", "\\/"), quote(value, safe=""), quote_plus(value)}
