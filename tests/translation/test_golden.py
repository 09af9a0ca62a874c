"""Recorded streams of the vendors, and what clients of the other APIs get of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.translation.golden import GOLDEN, golden, pairs, streams, translated

PAIRS = pytest.mark.parametrize(("path", "client"), [pytest.param(p, c, id=f"{p.stem}-{c}") for p, c in pairs()])


@PAIRS
def test_a_recorded_stream_becomes_what_the_golden_file_has(path: Path, client: str) -> None:
    assert translated(path, client).decode() == golden(path, client).read_bytes().decode()


@PAIRS
def test_a_stream_is_the_same_however_it_is_cut(path: Path, client: str) -> None:
    assert translated(path, client, chunk_bytes=7) == translated(path, client)


def test_every_golden_file_is_of_a_recorded_stream() -> None:
    assert len(streams()) > 10
    assert {file.name for file in GOLDEN.iterdir()} == {golden(path, client).name for path, client in pairs()}
