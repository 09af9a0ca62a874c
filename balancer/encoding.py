"""Content codings: what we can decode to read the usage in an answer (RFC 9110 §8.4, RFC 8878 for zstd).

A little of a coded body may be very much when decoded (gzip up to 1 000 times, zstd up to 30 000 times): it is decoded
in steps, and who takes them decides what to hold.
"""

from __future__ import annotations

import functools
import re
import zlib
from collections.abc import Iterable, Iterator
from typing import Protocol

import zstandard

_REFUSED = re.compile(r"\s*q\s*=\s*0(?:\.0{0,3})?\s*", re.IGNORECASE)
SUPPORTED = ("gzip", "x-gzip", "deflate", "zstd", "identity")

_STEP_BYTES = 64 * 1024
_ZSTD_STEP_BYTES = 128
_ZSTD_WINDOW_BYTES = 8 * 1024 * 1024
"""The most that a decoder has to hold for the coding `zstd` (RFC 9659 §3)."""


class DecodeError(Exception):
    """The bytes are not in the coding that was announced, or the coding is not one of ours."""


class _Stream(Protocol):
    @property
    def is_finished(self) -> bool: ...

    def steps(self, data: bytes) -> Iterator[bytes]: ...


class _Deflate:
    """`deflate` is zlib by the book, and raw deflate from some servers: the first byte tells."""

    def __init__(self) -> None:
        self._stream: zlib._Decompress | None = None

    @property
    def is_finished(self) -> bool:
        return self._stream is None or self._stream.eof

    def steps(self, data: bytes) -> Iterator[bytes]:
        if self._stream is None and data:
            self._stream = zlib.decompressobj(zlib.MAX_WBITS if data[0] & 0x0F == 8 else -zlib.MAX_WBITS)
        if self._stream is not None:
            yield from _inflated(self._stream, data)


class _Gzip:
    """One gzip member after the other; what follows the last and begins no other is ignored, as gzip(1) does."""

    def __init__(self) -> None:
        self._member: zlib._Decompress | None = None

    @property
    def is_finished(self) -> bool:
        return self._member is None or self._member.eof

    def steps(self, data: bytes) -> Iterator[bytes]:
        while data:
            if self._member is None or self._member.eof:
                if self._member is not None and data[:1] != b"\x1f":
                    break
                self._member = zlib.decompressobj(16 + zlib.MAX_WBITS)
            yield from _inflated(self._member, data)
            data = self._member.unused_data


class _Zstd:
    """One zstd frame after the other.

    Takes little at a time, because the library gives at once all that comes of it: of 128 bytes at most 4 MiB.
    """

    def __init__(self) -> None:
        self._frame: zstandard.ZstdDecompressionObj | None = None

    @property
    def is_finished(self) -> bool:
        return self._frame is None or self._frame.eof

    def steps(self, data: bytes) -> Iterator[bytes]:
        for at in range(0, len(data), _ZSTD_STEP_BYTES):
            rest = data[at : at + _ZSTD_STEP_BYTES]
            while rest:
                if self._frame is None or self._frame.eof:
                    self._frame = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_BYTES).decompressobj()
                yield self._frame.decompress(rest)
                rest = self._frame.unused_data if self._frame.eof else b""


def _inflated(stream: zlib._Decompress, data: bytes) -> Iterator[bytes]:
    """What zlib makes of the data, in steps. It may hold some back even when it has taken all of the data."""
    while True:
        decoded = stream.decompress(data, _STEP_BYTES)
        yield decoded
        data = stream.unconsumed_tail
        if stream.eof or (not data and len(decoded) < _STEP_BYTES):
            break


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
                self._stream = _Zstd()
            case _:
                raise DecodeError("a content coding that is not supported")

    @property
    def is_finished(self) -> bool:
        """True when the body may end here; nothing at all is a body too."""
        return self._stream is None or self._stream.is_finished

    @property
    def is_identity(self) -> bool:
        """True when there is nothing to decode."""
        return self._stream is None

    def feed(self, chunk: bytes) -> Iterable[bytes]:
        """What the chunk adds to the decoded body, in steps; all have to be taken before the next chunk."""
        return (chunk,) if self._stream is None else self._steps(self._stream, chunk)

    def _steps(self, stream: _Stream, chunk: bytes) -> Iterator[bytes]:
        try:
            yield from stream.steps(chunk)
        except (zlib.error, zstandard.ZstdError) as exc:
            raise DecodeError("the body is not in the coding that was announced") from exc


def decoded(body: bytes, encoding: str, limit_bytes: int) -> bytes:
    """A whole body, decoded. Raises DecodeError when that cannot be, ends too early, or is longer than the limit."""
    decoder = Decoder(encoding)
    if decoder.is_identity:
        return body
    steps, held = [], 0
    for step in decoder.feed(body):
        steps.append(step)
        held += len(step)
        if held > limit_bytes:
            raise DecodeError("the decoded body is too long")
    if not decoder.is_finished:
        raise DecodeError("the body ends before its coding does")
    return b"".join(steps)


@functools.lru_cache(maxsize=64)
def restrict_accept_encoding(value: str | None) -> str:
    """Of the client's Accept-Encoding what we can decode too, with its weights; identity when nothing is left."""
    kept = []
    for part in (value or "").split(","):
        name, _, parameters = part.partition(";")
        if name.strip().lower() in SUPPORTED and not _REFUSED.fullmatch(parameters):
            kept.append(part.strip())
    return ", ".join(kept) or "identity"
