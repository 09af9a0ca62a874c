"""Content codings: what we can decode to read the usage in an answer (RFC 9110 §8.4, RFC 8878 for zstd)."""

from __future__ import annotations

import re
import zlib
from typing import Protocol

import zstandard

_REFUSED = re.compile(r"\s*q\s*=\s*0(?:\.0{0,3})?\s*", re.IGNORECASE)
SUPPORTED = ("gzip", "x-gzip", "deflate", "zstd", "identity")


class DecodeError(Exception):
    """The bytes are not in the coding that was announced, or the coding is not one of ours."""


class _Stream(Protocol):
    def decompress(self, data: bytes, /) -> bytes: ...


class _Deflate:
    """`deflate` is zlib by the book, and raw deflate from some servers: the first byte tells."""

    def __init__(self) -> None:
        self._stream: _Stream | None = None

    def decompress(self, data: bytes, /) -> bytes:
        if self._stream is None and data:
            self._stream = zlib.decompressobj(zlib.MAX_WBITS if data[0] & 0x0F == 8 else -zlib.MAX_WBITS)
        return self._stream.decompress(data) if self._stream else b""


class _Gzip:
    """One gzip member after the other; what follows the last and begins no other is ignored, as gzip(1) does."""

    def __init__(self) -> None:
        self._member = zlib.decompressobj(16 + zlib.MAX_WBITS)

    def decompress(self, data: bytes, /) -> bytes:
        parts = []
        while data:
            if self._member.eof:
                if data[:1] != b"\x1f":
                    break
                self._member = zlib.decompressobj(16 + zlib.MAX_WBITS)
            parts.append(self._member.decompress(data))
            data = self._member.unused_data
        return b"".join(parts)


class Decoder:
    """Decodes a body chunk by chunk. Raises DecodeError."""

    def __init__(self, encoding: str) -> None:
        self._stream: _Stream | None
        match encoding.strip().lower():
            case "" | "identity":
                self._stream = None
            case "gzip" | "x-gzip":
                self._stream = _Gzip()
            case "deflate":
                self._stream = _Deflate()
            case "zstd":
                self._stream = zstandard.ZstdDecompressor().decompressobj(read_across_frames=True)
            case _:
                raise DecodeError("a content coding that is not supported")

    def feed(self, chunk: bytes) -> bytes:
        """What the chunk adds to the decoded body."""
        if self._stream is None:
            return chunk
        try:
            return self._stream.decompress(chunk)
        except (zlib.error, zstandard.ZstdError) as exc:
            raise DecodeError("the body is not in the coding that was announced") from exc


def restrict_accept_encoding(value: str | None) -> str:
    """Of the client's Accept-Encoding what we can decode too, with its weights; identity when nothing is left."""
    kept = []
    for part in (value or "").split(","):
        name, _, parameters = part.partition(";")
        if name.strip().lower() in SUPPORTED and not _REFUSED.fullmatch(parameters):
            kept.append(part.strip())
    return ", ".join(kept) or "identity"
