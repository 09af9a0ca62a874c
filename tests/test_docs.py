"""What is made out of the program and checked in is as it would be made now."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from docs import build


@pytest.mark.parametrize("generator", build.GENERATORS)
def test_what_a_generator_makes_is_checked_in(generator: str) -> None:
    assert build.made(generator)
    assert [str(path) for path, _ in build.stale(generator)] == [], "run `make docs`, and commit what it writes"


def test_what_is_stale_is_written_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(build, "ROOT", tmp_path)
    monkeypatch.setattr(build, "made", lambda generator: {"docs/page.md": "new\n", "docs/other.md": "same\n"})
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "page.md").write_text("old\n", encoding="utf-8")
    (tmp_path / "docs" / "other.md").write_text("same\n", encoding="utf-8")

    assert build.main() == 1

    assert (tmp_path / "docs" / "page.md").read_text(encoding="utf-8") == "new\n"
    assert set(capsys.readouterr().err.splitlines()) == {"stale, and made anew: docs/page.md"}
    assert build.main() == 0


def test_make_docs_runs_all_of_them() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "docs.build"], cwd=build.ROOT, check=False, capture_output=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, b"")
