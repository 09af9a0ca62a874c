"""Numbers that all workers of one supervisor share, in files of one folder: a set for each worker's slot.

A slot outlives its workers: one that takes the place of a dead one goes on counting where that stopped. `slot-N.rows`
names the rows, one JSON line each, and is only ever appended to; `slot-N.numbers` has their doubles in the same order,
mapped into the worker's memory; `slot-N.exemplars` has, for rows with exemplars, records of a fixed length. While a
worker lives it holds a lock on the first: whoever reads can tell whether the gauges there are of somebody alive.

Without a folder, as in tests, it all is in memory.
"""

from __future__ import annotations

import array
import contextlib
import errno
import fcntl
import mmap
import os
import re
import shutil
import stat
import struct
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from balancer import log
from balancer.errors import ConfigurationError

BEATS_AT = 0
"""The cell in which a worker writes when it last gave a sign of life, of the machine's monotonic clock."""
_SPARE_AT, _SPARE_CELLS = 1, 63
"""What has no room elsewhere is written there, and read by nobody."""
_FIRST_CELL = _SPARE_AT + _SPARE_CELLS
_WARN_S = 60.0
_PREFIX, _LOCK = "balancer-metrics-", "lock"
_CELLS_AT_ONCE = 1024
_CELL_BYTES = 8
_LOCK_S = 5.0
_ROWS, _NUMBERS, _EXEMPLARS = ".rows", ".numbers", ".exemplars"
_RECORD = struct.Struct("=dd128s")
_TEXT_AT, _TEXT_BYTES = 16, 128
"""The labels as they are told. OpenMetrics 1.0.0 allows as many characters in their names and values alone."""
_LABEL = re.compile(r'(\w+)="([^"]*)"')
_RECORD_DOUBLES = _RECORD.size // _CELL_BYTES
_READ_AT_ONCE = 1 << 20


class Row(msgspec.Struct, frozen=True, array_like=True):
    """What a run of cells is for: a family and label values; how many cells, and how many of them have exemplars."""

    family: str
    labels: tuple[str, ...]
    width: int = 1
    exemplars: int = 0


class Exemplar(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One thing that was counted: its value, when (seconds of the epoch), its decision, and its trace or ""."""

    value: float
    time_s: float
    decision: str
    trace_id: str = ""

    def packed(self) -> bytes:
        """The record. A trace that does not fit in beside its decision is left out."""
        text = f'decision="{self.decision}",trace_id="{self.trace_id}"' if self.trace_id else ""
        if not 0 < len(text) <= _TEXT_BYTES:
            text = f'decision="{self.decision}"'
        return _RECORD.pack(self.value, self.time_s, text.encode())


class Records:
    """The exemplars of a slot, by their places."""

    def __init__(self, data: bytes | bytearray) -> None:
        self._data = data
        self._doubles = memoryview(data)[: len(data) // _RECORD.size * _RECORD.size].cast("d")

    def __len__(self) -> int:
        return len(self._doubles) // _RECORD_DOUBLES

    def time_s(self, place: int) -> float:
        """When the thing at the place was counted, 0 for none."""
        return self._doubles[place * _RECORD_DOUBLES + 1]

    def told(self, place: int) -> tuple[dict[str, str], float, float]:
        """The exemplar's labels, its value, and when it was."""
        begin = place * _RECORD.size
        text = self._data[begin + _TEXT_AT : begin + _RECORD.size].rstrip(b"\0").decode()
        value, time_s = self._doubles[place * _RECORD_DOUBLES], self.time_s(place)
        return dict(_LABEL.findall(text)), value, time_s


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Row).decode


class Slot:
    """One worker's rows, to be written by that worker alone."""

    def __init__(self, folder: Path | None = None, number: int = 0) -> None:
        """Takes the slot over, with what the worker before has counted.

        Raises ConfigurationError when a living one has it, or there is no room for files.
        """
        self.numbers: array.array[float] | memoryview[float] = array.array("d", bytes(_CELL_BYTES * _FIRST_CELL))
        """All cells. Others may stand here after each call of `place`."""
        self.rows: list[tuple[Row, int]] = []
        """With the first cell of each."""
        self.records: list[int] = []
        """The place of the first exemplar of each row."""
        self.exemplars = bytearray()
        """Their records in memory; with a folder they are in their file."""
        self._places: dict[Row, tuple[int, int]] = {}
        self._next = _FIRST_CELL
        self._next_record = 0
        self._map: mmap.mmap | None = None
        self._rows_fd = self._numbers_fd = self._exemplars_fd = -1
        self.is_closed = False
        self._warned_at = float("-inf")
        if folder is not None:
            try:
                self._open(folder, number)
            except OSError as exc:
                self.close()
                raise ConfigurationError(f"metrics cannot be kept in {folder}: {exc.strerror}") from exc

    def _open(self, folder: Path, number: int) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        self._rows_fd = os.open(path_of(folder, number, _ROWS), flags | os.O_APPEND, 0o600)
        _lock(self._rows_fd, number)
        self._numbers_fd = os.open(path_of(folder, number, _NUMBERS), flags, 0o600)
        self._exemplars_fd = os.open(path_of(folder, number, _EXEMPLARS), flags, 0o600)
        text = _read_all(self._rows_fd, 0)
        whole = text.rfind(b"\n") + 1
        os.ftruncate(self._rows_fd, whole)  # The worker before died while it wrote the rest.
        for line in text[:whole].splitlines():
            self._note(_decode(line))
        self._reserve(self._next)

    def _note(self, row: Row) -> int:
        place = self._next
        self._places[row] = place, self._next_record
        self.rows.append((row, place))
        self.records.append(self._next_record)
        self._next += row.width
        self._next_record += row.exemplars
        return place

    def place(self, row: Row) -> int:
        """The first cell of the row, which is made if it is not there; somewhere unread where there is no room."""
        found = self._places.get(row)
        if found is not None:
            return found[0]
        try:
            self._reserve(self._next + row.width)
            self._name(row)
        except OSError as exc:
            assert row.width <= _SPARE_CELLS, "as all are"
            if time.monotonic() - self._warned_at > _WARN_S:
                self._warned_at = time.monotonic()
                log.warning("there is no room for more metrics; what is new is not counted", reason=exc.strerror)
            return _SPARE_AT
        return self._note(row)

    def _name(self, row: Row) -> None:
        """Appends the row's line, or nothing of it."""
        if self._rows_fd < 0:
            return
        line, end = _encode(row) + b"\n", os.fstat(self._rows_fd).st_size
        try:
            if os.write(self._rows_fd, line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            os.ftruncate(self._rows_fd, end)
            raise

    def _reserve(self, cells: int) -> None:
        """Makes room for so many cells. Raises OSError."""
        missing = cells - len(self.numbers)
        if self._numbers_fd < 0:
            if missing > 0:
                assert isinstance(self.numbers, array.array), "in memory"
                self.numbers.frombytes(bytes(_CELL_BYTES * missing))
            return
        if missing <= 0 and self._map is not None:
            return
        held = os.fstat(self._numbers_fd).st_size // _CELL_BYTES
        size = max(held, -(-cells // _CELLS_AT_ONCE) * _CELLS_AT_ONCE) * _CELL_BYTES
        if hasattr(os, "posix_fallocate"):
            # Writing to what the disk has no room for would end the process (SIGBUS).
            os.posix_fallocate(self._numbers_fd, 0, size)
        else:
            os.ftruncate(self._numbers_fd, size)
        self._unmap()
        self._map = mmap.mmap(self._numbers_fd, size)
        # Each cell is one aligned word, which is written at once: who reads meanwhile sees the old number or the new.
        self.numbers = memoryview(self._map).cast("d")

    def _unmap(self) -> None:
        if isinstance(self.numbers, memoryview):
            self.numbers.release()
        if self._map is not None:
            self._map.close()
            self._map = None

    def exemplify(self, row: Row, index: int, exemplar: Exemplar) -> None:
        """Keeps an exemplar of that cell of the row, in place of the one before; none where there is no room."""
        found = self._places.get(row)
        if found is None:
            return
        record = found[1] + index
        if self._exemplars_fd < 0:
            begin = record * _RECORD.size
            self.exemplars.extend(bytes(max(0, begin + _RECORD.size - len(self.exemplars))))
            self.exemplars[begin : begin + _RECORD.size] = exemplar.packed()
        else:
            with contextlib.suppress(OSError):  # They are samples.
                os.pwrite(self._exemplars_fd, exemplar.packed(), record * _RECORD.size)

    def close(self) -> None:
        """Leaves the slot to the next worker."""
        if self.is_closed:
            return
        self.is_closed = True
        self._unmap()
        self.numbers = array.array("d", bytes(_CELL_BYTES * self._next))
        for fd in (self._rows_fd, self._numbers_fd, self._exemplars_fd):
            if fd >= 0:
                os.close(fd)
        self._rows_fd = self._numbers_fd = self._exemplars_fd = -1


class Seen:
    """A slot as others see it: the rows known so far, and at each look its numbers, and whether its worker lives."""

    def __init__(self, folder: Path, number: int) -> None:
        self.number = number
        self.rows: list[tuple[Row, int]] = []
        """With the first cell of each."""
        self.records: list[int] = []
        """The place of the first exemplar of each row."""
        self._folder = folder
        self._read_bytes = 0
        self._next = _FIRST_CELL
        self._next_record = 0

    def look(self) -> tuple[Sequence[float], bool]:
        """The cells of all rows, and whether the worker lives."""
        fd = os.open(path_of(self._folder, self.number, _ROWS), os.O_RDONLY | os.O_CLOEXEC)
        try:
            is_alive = not _takes(fd, fcntl.LOCK_SH)
            text = _read_all(fd, self._read_bytes)
        finally:
            os.close(fd)
        whole = text.rfind(b"\n") + 1
        for line in text[:whole].splitlines():
            row = _decode(line)
            self.rows.append((row, self._next))
            self.records.append(self._next_record)
            self._next += row.width
            self._next_record += row.exemplars
        self._read_bytes += whole
        numbers = array.array("d", self._bytes(_NUMBERS)[: self._next * _CELL_BYTES])
        if len(numbers) < self._next:  # Rows are named before there is room for them.
            numbers.frombytes(bytes(_CELL_BYTES * (self._next - len(numbers))))
        return numbers, is_alive

    def exemplars(self) -> Records:
        """The exemplars of all rows."""
        return Records(self._bytes(_EXEMPLARS))

    def _bytes(self, kind: str) -> bytes:
        try:
            fd = os.open(path_of(self._folder, self.number, kind), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return b""
        try:
            return _read_all(fd, 0)
        finally:
            os.close(fd)


# -- the folder --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def shared_folder() -> Iterator[Path]:
    """A new folder for the workers of one supervisor; it is gone afterwards, and so are those that killed ones left."""
    remove_abandoned()
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
        with _held(folder / _LOCK, create=True) as fd:
            # Before it was locked it was anybody's, who may have taken it for abandoned.
            if fd is None or not _is_at(fd, folder / _LOCK):
                continue
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
            return


def remove_abandoned() -> int:
    """Removes the folders of supervisors that are gone, and none of whose workers is left to drain; how many.

    Only those of this user, in the folder for temporary files that we use; what has no lock is none of ours.
    """
    removed = 0
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):  # It is gone, or nothing that we may touch.
            state = folder.lstat()
            if not stat.S_ISDIR(state.st_mode) or state.st_uid != os.geteuid():
                continue
            with _held(folder / _LOCK) as fd:
                if fd is not None and not any(map(_is_held, folder.glob(f"slot-*{_ROWS}"))):
                    shutil.rmtree(folder)
                    removed += 1
    return removed


def _is_at(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False


def path_of(folder: Path, number: int, kind: str) -> Path:
    """A file of a slot."""
    return folder / f"slot-{number}{kind}"


def slots_in(folder: Path) -> list[int]:
    """The numbers of the slots that a worker has had, in order."""
    return sorted(int(path.name[5 : -len(_ROWS)]) for path in folder.glob(f"slot-*{_ROWS}"))


def _is_held(path: Path) -> bool:
    """True while somebody holds the lock on a file."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return not _takes(fd, fcntl.LOCK_SH)
    finally:
        os.close(fd)


@contextlib.contextmanager
def _held(path: Path, *, create: bool = False) -> Iterator[int | None]:
    """The lock on a file, as its descriptor, for as long as the block runs; None where somebody else has it."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if create else 0), 0o600)
    try:
        yield fd if _takes(fd, fcntl.LOCK_EX) else None
    finally:
        os.close(fd)


def _takes(fd: int, how: int) -> bool:
    """True when the lock was there for the taking: it is ours until the descriptor is closed."""
    try:
        fcntl.flock(fd, how | fcntl.LOCK_NB)
    except OSError as exc:
        if exc.errno not in (errno.EAGAIN, errno.EACCES):
            raise
        return False
    return True


def _lock(fd: int, number: int) -> None:
    """Takes the slot's lock; who looks whether it is free holds it for a moment."""
    until = time.monotonic() + _LOCK_S
    while not _takes(fd, fcntl.LOCK_EX):
        if time.monotonic() > until:
            raise ConfigurationError(f"another process counts in slot {number} of the same metrics folder")
        time.sleep(0.001)


def _read_all(fd: int, offset: int) -> bytes:
    chunks = []
    while chunk := os.pread(fd, _READ_AT_ONCE, offset):
        chunks.append(chunk)
        offset += len(chunk)
    return b"".join(chunks)
