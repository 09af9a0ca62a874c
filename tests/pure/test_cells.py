"""Numbers that workers share in files: what outlives them, what does not, and whose folders may be removed."""

from __future__ import annotations

import errno
import os
import random
import shutil
import tempfile
from pathlib import Path

import pytest

from balancer import cells
from balancer.cells import Exemplar, Row, Seen, Slot, remove_abandoned, shared_folder, slots_in
from balancer.errors import ConfigurationError

A, B = Row("a", ("x",)), Row("b", ("x", "y"), 3)


def told(folder: Path, number: int = 0) -> dict[Row, list[float]]:
    """What others see of a slot."""
    seen = Seen(folder, number)
    numbers, _ = seen.look()
    return {row: list(numbers[begin : begin + row.width]) for row, begin in seen.rows}


def told_exemplars(seen: Seen) -> dict[int, tuple[dict[str, str], float, float]]:
    """All exemplars by their places."""
    records = seen.exemplars()
    return {place: records.told(place) for place in range(len(records)) if records.time_s(place)}


def test_what_a_worker_writes_others_read_at_once(tmp_path: Path) -> None:
    slot, seen = Slot(tmp_path, 4), Seen(tmp_path, 4)
    place = slot.place(B)
    slot.numbers[place + 1] += 2.5
    assert seen.look()[0][seen.rows[0][1] + 1] == 2.5
    slot.numbers[slot.place(A)] = 7
    numbers, is_alive = seen.look()
    assert [(row, list(numbers[begin : begin + row.width])) for row, begin in seen.rows] == [(B, [0, 2.5, 0]), (A, [7])]
    assert is_alive
    assert slots_in(tmp_path) == [4]
    slot.close()


def test_a_slot_outlives_its_worker_and_says_that_it_is_gone(tmp_path: Path) -> None:
    slot = Slot(tmp_path)
    slot.numbers[slot.place(A)] += 3
    slot.close()
    assert not Seen(tmp_path, 0).look()[1]
    slot = Slot(tmp_path)
    slot.numbers[slot.place(A)] += 4
    assert Seen(tmp_path, 0).look()[1]
    slot.close()
    assert told(tmp_path) == {A: [7]}


def test_two_workers_cannot_have_a_slot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("balancer.cells._LOCK_S", 0.01)
    slot = Slot(tmp_path)
    with pytest.raises(ConfigurationError, match="slot 0"):
        Slot(tmp_path)
    slot.close()


def test_a_row_that_was_half_named_when_its_worker_died_is_forgotten(tmp_path: Path) -> None:
    slot = Slot(tmp_path)
    slot.numbers[slot.place(A)] = 1
    slot.close()
    with (tmp_path / "slot-0.rows").open("ab") as file:
        file.write(b'["b",["x"')
    seen = Seen(tmp_path, 0)
    seen.look()
    assert [row for row, _ in seen.rows] == [A]
    slot = Slot(tmp_path)
    slot.numbers[slot.place(B) + 2] = 5
    slot.close()
    numbers, _ = seen.look()
    assert [(row, list(numbers[begin : begin + row.width])) for row, begin in seen.rows] == [(A, [1]), (B, [0, 0, 5])]


def test_thousands_of_rows_find_room(tmp_path: Path) -> None:
    slot, memory = Slot(tmp_path), Slot()
    rng = random.Random(1)
    expected: dict[Row, list[float]] = {}
    for i in range(3000):
        row = Row("c", (str(i),), rng.choice([1, 2, 18]))
        expected[row] = [rng.random() for _ in range(row.width)]
        for each in (slot, memory):
            place = each.place(row)
            for j, number in enumerate(expected[row]):
                each.numbers[place + j] = number
    assert told(tmp_path) == expected
    assert {row: list(memory.numbers[begin : begin + row.width]) for row, begin in memory.rows} == expected
    slot.close()


def test_an_exemplar_is_kept_in_place_of_the_one_before(tmp_path: Path) -> None:
    slot, row = Slot(tmp_path), Row("d", (), 3, 2)
    slot.place(Row("e", (), 5, 4))
    slot.place(row)
    slot.exemplify(row, 1, Exemplar(0.5, 10.0, "default.1.7"))
    slot.exemplify(row, 1, Exemplar(0.25, 11.0, "default.1.8", "f" * 32))
    seen = Seen(tmp_path, 0)
    seen.look()
    assert seen.records == [0, 4]
    assert told_exemplars(seen) == {5: ({"decision": "default.1.8", "trace_id": "f" * 32}, 0.25, 11)}
    slot.close()


def test_a_trace_that_has_no_room_beside_its_decision_is_left_out(tmp_path: Path) -> None:
    slot, row = Slot(tmp_path), Row("d", (), 1, 1)
    decision = f"{'p' * 64}.1234567890.123456789012345"
    slot.place(row)
    slot.exemplify(row, 0, Exemplar(1, 10.0, decision, "f" * 32))
    assert told_exemplars(Seen(tmp_path, 0)) == {0: ({"decision": decision}, 1, 10)}
    slot.close()


# -- a full disk -------------------------------------------------------------------------------------------------------


def is_full(*_: object) -> int:
    """Fails as a full disk does."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("where", ["posix_fallocate", "write"])
def test_what_has_no_room_is_not_counted_and_the_rest_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, where: str
) -> None:
    """A page of a mapped file that the disk has no room for ends the process when it is written to."""
    slot = Slot(tmp_path)
    slot.numbers[slot.place(A)] += 1
    with monkeypatch.context() as full:
        full.setattr(os, where, is_full)
        for i in range(200):
            row = Row("c", (str(i),), 18, 17)
            slot.numbers[slot.place(row) + 17] += 1
            slot.exemplify(row, 1, Exemplar(1, 1.0, "d"))
        slot.numbers[slot.place(A)] += 1
    slot.numbers[slot.place(B)] += 1
    counted = told(tmp_path)
    assert (counted[A], counted[B]) == ([2], [1, 0, 0])
    assert 2 < len(counted) < 202 if where == "posix_fallocate" else len(counted) == 2
    assert caplog.text.count("no room for more metrics") == 1
    slot.close()


def test_a_folder_without_room_is_refused_with_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "posix_fallocate", is_full)
    with pytest.raises(ConfigurationError, match=f"{tmp_path}: No space left"):
        Slot(tmp_path)


# -- folders -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def a_folder(temporary: Path, name: str, *, is_locked: bool = True) -> Path:
    """A folder as a supervisor has left it that was killed."""
    folder = temporary / f"balancer-metrics-{name}"
    folder.mkdir()
    Slot(folder).close()
    if is_locked:
        (folder / "lock").touch()
    return folder


def test_a_folder_is_gone_with_its_supervisor_and_so_are_those_that_killed_ones_left(temporary: Path) -> None:
    left = a_folder(temporary, "left")
    with shared_folder() as folder:
        assert not left.exists()
        Slot(folder).close()
        assert remove_abandoned() == 0
        assert list(temporary.iterdir()) == [folder]
    assert list(temporary.iterdir()) == []


def test_a_folder_of_a_worker_that_still_drains_stays(temporary: Path) -> None:
    """Its supervisor was killed; until it has ended, somebody may look at its numbers."""
    left = a_folder(temporary, "left")
    draining = Slot(left, 3)
    assert remove_abandoned() == 0
    draining.close()
    assert remove_abandoned() == 1
    assert not left.exists()


def test_what_has_no_lock_or_another_owner_or_is_no_folder_is_not_touched(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_folder(temporary, "unlocked", is_locked=False)
    (temporary / "balancer-metrics-file").touch()
    elsewhere = a_folder(temporary, "x").rename(temporary / "elsewhere")
    (temporary / "balancer-metrics-link").symlink_to(elsewhere)
    before = sorted(temporary.rglob("*"))
    assert remove_abandoned() == 0
    a_folder(temporary, "foreign")
    uid = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: uid + 1)
    assert remove_abandoned() == 0
    assert set(before) < set(temporary.rglob("*"))


def test_a_folder_that_is_taken_for_abandoned_before_it_is_locked_is_made_again(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    removed: list[Path] = []
    takes = cells._takes

    def takes_behind_another(fd: int, how: int) -> bool:
        if not removed:
            removed.extend(temporary.iterdir())
            shutil.rmtree(removed[0])
        return takes(fd, how)

    monkeypatch.setattr(cells, "_takes", takes_behind_another)
    with shared_folder() as folder:
        assert list(temporary.iterdir()) == [folder]
        assert removed != [folder]
        assert (folder / "lock").exists()
