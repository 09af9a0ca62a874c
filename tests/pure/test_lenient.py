"""JSON as others write it."""

from __future__ import annotations

import msgspec
import pytest

from balancer import lenient

ANY = msgspec.json.Decoder()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (rb'"\ud83d"', "\ufffd"),
        (rb'"\uDE00"', "\ufffd"),
        (rb'"a\ud83dz"', "a\ufffdz"),
        (rb'"\ud83d\ud83d\ude00"', "\ufffd😀"),
        (rb'"\ud83d\ude00\ude00"', "😀\ufffd"),
        (rb'"\ud83d\u00e9"', "\ufffdé"),
        (rb'{"\udfff":["\ud83d\ude00"]}', {"\ufffd": ["😀"]}),
    ],
)
def test_half_a_pair_of_surrogates_is_replaced_and_whole_ones_are_read(text: bytes, value: object) -> None:
    assert lenient.decode(ANY, text) == value
    assert lenient.decode(ANY, bytearray(text)) == value


@pytest.mark.parametrize(
    "text", [b"", b"{", b'"\xff"', rb'"\ud83"', rb'"\ud83d', rb'{"x":"\ud83d",}', b"[" * 100_000, b"\xef\xbb\xbf1"]
)
def test_what_is_no_json_is_still_refused(text: bytes) -> None:
    with pytest.raises(lenient.UNREADABLE):
        lenient.decode(ANY, text)
