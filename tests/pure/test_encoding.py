"""Content codings."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from balancer.encoding import DecodeError, Decoder, decoded, restrict_accept_encoding


def raw_deflate(data: bytes) -> bytes:
    stream = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return stream.compress(data) + stream.flush()


def fed(decoder: Decoder, coded: bytes, step: int) -> bytes:
    return b"".join(part for at in range(0, len(coded), step) for part in decoder.feed(coded[at : at + step]))


CODINGS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    "identity": bytes,
    "gzip": gzip.compress,
    " GZip ": gzip.compress,
    "x-gzip": gzip.compress,
    "deflate": zlib.compress,
    "Deflate": raw_deflate,
    "zstd": zstandard.compress,
}


@pytest.mark.parametrize("coding", CODINGS)
@given(data=st.binary(max_size=300), step=st.integers(1, 40))
def test_a_body_is_decoded_however_it_is_cut(coding: str, data: bytes, step: int) -> None:
    coded = CODINGS[coding](data)
    decoder = Decoder(coding)

    assert fed(decoder, coded, step) == data
    assert decoder.is_finished


@pytest.mark.parametrize("step", [1, 7, 1000])
@pytest.mark.parametrize(("coding", "code"), [("gzip", gzip.compress), ("zstd", zstandard.compress)])
def test_members_in_a_row_are_one_body(coding: str, code: Callable[[bytes], bytes], step: int) -> None:
    """Of gzip only the first member was once decoded."""
    coded = code(b"one ") + code(b"two ") + code(b"three")
    decoder = Decoder(coding)

    assert fed(decoder, coded, step) == b"one two three"
    assert decoder.is_finished


def test_what_follows_the_last_gzip_member_is_ignored() -> None:
    decoder = Decoder("gzip")

    assert fed(decoder, gzip.compress(b"x") + b"\0\0\0", 23) == b"x"
    assert decoder.is_finished


@pytest.mark.parametrize("coding", ["gzip", "deflate", "zstd"])
def test_bytes_in_no_such_coding_are_told(coding: str) -> None:
    with pytest.raises(DecodeError):
        fed(Decoder(coding), b"\xff\xff plain text", 100)


@pytest.mark.parametrize("coding", ["gzip", "deflate", "zstd"])
def test_a_body_that_breaks_off_is_not_finished(coding: str) -> None:
    coded = CODINGS[coding](b"a text of some words")
    decoder = Decoder(coding)

    fed(decoder, coded[:-1], 5)

    assert not decoder.is_finished
    assert Decoder(coding).is_finished
    with pytest.raises(DecodeError):
        decoded(coded[:-1], coding, 1000)


@pytest.mark.parametrize(("coding", "most"), [("gzip", 2**16), ("deflate", 2**16), ("zstd", 2**22)])
def test_a_little_that_becomes_much_comes_in_steps_and_can_be_left(coding: str, most: int) -> None:
    """It once came at once: 10 kB of an upstream's answer could take a worker's memory."""
    coded = CODINGS[coding](b"a" * 10_000_000)

    sizes = [len(part) for part in Decoder(coding).feed(coded)]

    assert sum(sizes) == 10_000_000
    assert max(sizes) <= most
    assert len(decoded(coded, coding, 10_000_000)) == 10_000_000
    with pytest.raises(DecodeError):
        decoded(coded, coding, 9_999_999)


@pytest.mark.parametrize("coding", ["br", "gzip, gzip", "compress"])
def test_an_unknown_coding_is_told_at_once(coding: str) -> None:
    with pytest.raises(DecodeError):
        Decoder(coding)


@pytest.mark.parametrize(
    ("asked", "accepted"),
    [
        (None, "identity"),
        ("", "identity"),
        ("br", "identity"),
        ("*", "identity"),
        ("gzip, deflate, br, zstd", "gzip, deflate, zstd"),
        ("br;q=1.0, gzip;q=0.8, *;q=0.1", "gzip;q=0.8"),
        ("GZIP ; q=0.5,identity;q=0.1", "GZIP ; q=0.5, identity;q=0.1"),
        ("gzip;q=0, zstd; Q=0.000, deflate;q=0.001", "deflate;q=0.001"),
        (",,", "identity"),
    ],
)
def test_of_the_accepted_codings_those_remain_that_we_can_decode(asked: str | None, accepted: str) -> None:
    assert restrict_accept_encoding(asked) == accepted
