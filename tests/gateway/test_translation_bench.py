"""The benchmark of translation measures every pair of APIs, and the native way beside them."""

from __future__ import annotations

import pytest

from benchmarks import translation


def test_each_pair_has_a_row(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(translation, "_ROUNDS", 1)
    monkeypatch.setattr(translation, "_CHUNKS", 20)
    monkeypatch.setattr("sys.argv", ["benchmarks.translation"])
    translation.main()
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [tuple(row[:2]) for row in rows] == [("chat", "native"), *translation._PAIRS]
    assert all(float(us) >= 0 for row in rows for us in row[2:])
