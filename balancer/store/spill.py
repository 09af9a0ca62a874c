"""What an outbox leaves on disk: the batches of one worker for one pool, in a locked folder of small files.

    <outbox_dir>/<pool>.<worker>/lock             locked (flock) while whoever writes or replays the folder lives
    <outbox_dir>/<pool>.<worker>/00000001.jsonl   a segment: one JSON line a batch, about 1 MiB
    <outbox_dir>/<pool>.<worker>.00000001.jsonl.unreadable   set aside, for people

Segments, and not one file, because an outbox is a queue: what is acknowledged is dropped by removing whole segments, no
file is ever rewritten, and none grows for ever. A line has all that a stranger needs to replay it: version, worker,
pool, batch number, and the entries with the wall-clock time at which each was made, so that the next process can tell
their age. (A clock that stepped back makes an entry fresh, never younger than that.) Entries hold names and counts, no
prompt and no credential; folders are 0700 and files 0600 all the same.

A line without its newline was cut by a crash and counts as not written. Any other line that cannot be read makes its
segment unreadable: what can be read of it counts, and a copy is kept under another name, with a warning.

No policy and no asyncio here; `spiller` decides what is written when, in a thread. Every method may block on the disk.
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import msgspec

from balancer import log
from balancer.domain import Entry, Outcome, Usage
from balancer.errors import ConfigurationError
from balancer.store.settlement import Batch, TimedEntries

SEGMENT_BYTES = 1024 * 1024
_VERSION = 1
_LOCK = "lock"
_SUFFIX = ".jsonl"

_Whole = Annotated[int, msgspec.Meta(ge=0, lt=2**53)]


class _Item(msgspec.Struct, frozen=True, array_like=True):
    """An entry as a line holds it."""

    number: _Whole
    service: str
    outcome: Outcome
    made_ms: _Whole
    input: _Whole
    output: _Whole
    cached: _Whole
    cache_creation: _Whole
    reasoning: _Whole
    cooldown_ms: _Whole = 0


class _Line(msgspec.Struct, frozen=True, kw_only=True):
    version: int
    worker: str
    pool: str
    batch: Annotated[int, msgspec.Meta(ge=1, lt=2**53)]
    entries: tuple[_Item, ...]


class _Segment(msgspec.Struct):
    path: Path
    first: int
    last: int


def prepare(root: Path) -> None:
    """Makes the folder of all spills. Raises ConfigurationError when nothing can be written there."""
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        probe = root / f".{os.getpid()}"
        probe.touch(mode=0o600)
        probe.unlink(missing_ok=True)
    except OSError as exc:
        raise ConfigurationError(f"BALANCER_OUTBOX_DIR: cannot write to {root}: {exc.strerror}") from exc


def folders(root: Path) -> list[tuple[str, str]]:
    """Pool and worker of every spill in the folder, whoever has its lock."""
    found = []
    with suppress(FileNotFoundError), os.scandir(root) as entries:
        for entry in entries:
            pool, _, worker = entry.name.rpartition(".")
            if pool and worker and entry.is_dir(follow_symlinks=False):
                found.append((pool, worker))
    return sorted(found)


class Spill:
    """The folder of one worker and pool: `lock` it, then write or read; `release` it, or `remove` it when it is empty.

    Methods exclude each other, so that one that runs on in a thread after its task was cancelled does no harm.
    """

    def __init__(
        self,
        root: Path,
        pool: str,
        worker: str,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.pool = pool
        self.worker = worker
        self._clock = clock
        self._wall = wall
        self._root = root
        self._folder = root / f"{pool}.{worker}"
        self._mutex = threading.Lock()
        self._lock: int | None = None
        self._is_released = False
        self._segments: list[_Segment] = []
        self._file: int | None = None
        self._file_bytes = 0
        self._next_segment = 1
        self.newest_age_s = float("inf")
        """The age of the youngest entry that was read."""

    @property
    def is_empty(self) -> bool:
        """True when no batch is on disk."""
        return not self._segments

    # -- the lock ------------------------------------------------------------------------------------------------------

    def lock(self) -> bool:
        """Takes the folder's lock, making it if need be; False while somebody else has it, or after `release`."""
        with self._mutex:
            if self._is_released:
                return False
            if self._lock is None:
                self._folder.mkdir(mode=0o700, exist_ok=True)
                self._lock = _locked(self._folder / _LOCK)
            return self._lock is not None

    def release(self) -> None:
        """Gives the lock back for good; what is on disk is for the next process."""
        with self._mutex:
            self._is_released = True
            self._close_file()
            if self._lock is not None:
                os.close(self._lock)
                self._lock = None

    def remove(self) -> None:
        """Removes all that was written, and releases the lock."""
        with self._mutex:
            if self._lock is not None:
                self._drop(self._segments)
                (self._folder / _LOCK).unlink(missing_ok=True)
                with suppress(OSError):  # Somebody is looking at it; an empty folder goes with the next replay.
                    self._folder.rmdir()
        self.release()

    # -- writing -------------------------------------------------------------------------------------------------------

    def append(self, batches: Sequence[Batch]) -> None:
        """Writes batches and syncs them to the disk.

        Raises OSError; then none of them counts as written, and they may be given again.
        """
        with self._mutex:
            assert self._lock is not None, "lock it first"
            for batch in batches:
                self._write(batch.number, self._encode(batch))
            if self._file is not None:
                os.fsync(self._file)

    def _encode(self, batch: Batch) -> bytes:
        assert batch.entries is not None, "it is on disk already"
        born_ms = (self._wall() - self._clock()) * 1000
        items = tuple(
            _Item(
                entry.number,
                entry.service,
                entry.outcome,
                max(0, round(born_ms + made_at * 1000) - entry.age_ms),
                entry.usage.input,
                entry.usage.output,
                entry.usage.cached,
                entry.usage.cache_creation,
                entry.usage.reasoning,
                entry.cooldown_ms,  # Latencies are left out: only fresh ones count.
            )
            for entry, made_at in batch.entries
        )
        line = _Line(version=_VERSION, worker=self.worker, pool=self.pool, batch=batch.number, entries=items)
        return msgspec.json.encode(line) + b"\n"

    def _write(self, number: int, line: bytes) -> None:
        if self._file is None or self._file_bytes >= SEGMENT_BYTES:
            self._open_segment(number)
        assert self._file is not None
        segment = self._segments[-1]
        try:
            rest = memoryview(line)
            while rest:
                rest = rest[os.write(self._file, rest) :]
        except OSError:
            # A full disk may have taken half a line. Cut it off, or go on in another file.
            try:
                os.ftruncate(self._file, self._file_bytes)
            except OSError:
                self._close_file()
            raise
        self._file_bytes += len(line)
        segment.first, segment.last = min(segment.first, number), max(segment.last, number)

    def _open_segment(self, number: int) -> None:
        if self._file is not None:
            os.fsync(self._file)
            self._close_file()
        path = self._folder / f"{self._next_segment:08}{_SUFFIX}"
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._file_bytes = 0
        self._next_segment += 1
        self._segments.append(_Segment(path=path, first=number, last=number))
        _sync_folder(self._folder)

    def _close_file(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def drop(self, acknowledged: int) -> None:
        """Removes the segments that have no batch beyond this one."""
        with self._mutex:
            self._drop([segment for segment in self._segments if segment.last <= acknowledged])

    def _drop(self, segments: list[_Segment]) -> None:
        for segment in list(segments):
            if segment is self._segments[-1]:
                self._close_file()
            segment.path.unlink(missing_ok=True)
            self._segments.remove(segment)

    # -- reading -------------------------------------------------------------------------------------------------------

    def index(self) -> dict[int, Path]:
        """The segment of every batch that somebody left here, by number; unreadable segments are set aside."""
        with self._mutex:
            found: dict[int, Path] = {}
            for path in sorted(self._folder.glob(f"*{_SUFFIX}")):
                batches = self._read(path)
                self._segments.append(_Segment(path=path, first=min(batches, default=0), last=max(batches, default=0)))
                found |= dict.fromkeys(batches, path)
            return found

    def read(self, path: Path) -> dict[int, TimedEntries]:
        """The batches of a segment by number."""
        with self._mutex:
            return self._read(path)

    def fetch(self, number: int) -> tuple[int, int, dict[int, TimedEntries]]:
        """First and last number of the segment that has this batch, and what can be read of it."""
        with self._mutex:
            for segment in reversed(self._segments):
                if segment.first <= number <= segment.last:
                    batches = self._read(segment.path)
                    if number in batches:
                        return segment.first, segment.last, batches
        return number, number, {}

    def _read(self, path: Path) -> dict[int, TimedEntries]:
        *lines, _cut_off = path.read_bytes().split(b"\n")
        batches, faults = {}, []
        now, now_ms = self._clock(), self._wall() * 1000
        for place, raw in enumerate(lines, start=1):
            try:
                line = msgspec.json.decode(raw, type=_Line)
                if (line.version, line.worker, line.pool) != (_VERSION, self.worker, self.pool):
                    raise ValueError("another version, worker or pool")
                if not all(item.service or item.outcome is Outcome.ABANDONED for item in line.entries):
                    raise ValueError("an entry without a service")
            except ValueError as exc:  # msgspec's errors are such, and name no value
                faults.append(f"line {place}: {exc}")
                continue
            ages_s = [max(0, now_ms - item.made_ms) / 1000 for item in line.entries]
            self.newest_age_s = min(self.newest_age_s, *ages_s)
            batches[line.batch] = tuple(
                (_entry(item), now - age_s) for item, age_s in zip(line.entries, ages_s, strict=True)
            )
        if faults:
            self._set_aside(path, "unreadable", faults[0])
        return batches

    def set_all_aside(self, why: str, reason: str) -> None:
        """Keeps a copy of every segment for people."""
        with self._mutex:
            for segment in self._segments:
                self._set_aside(segment.path, why, reason)

    def _set_aside(self, path: Path, why: str, reason: str) -> None:
        """Keeps a copy of a segment where no process looks for it, once, and says so."""
        target = self._root / f"{self._folder.name}.{path.name}.{why}"
        with suppress(FileExistsError):
            copy = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with open(copy, "wb") as file:
                file.write(path.read_bytes())
            log.warning("part of a spilled outbox is set aside", file=str(target), reason=reason)


def _entry(item: _Item) -> Entry:
    usage = Usage(
        input=item.input,
        output=item.output,
        cached=item.cached,
        cache_creation=item.cache_creation,
        reasoning=item.reasoning,
    )
    return Entry(
        number=item.number,
        service=item.service,
        outcome=item.outcome,
        usage=usage,
        cooldown_ms=item.cooldown_ms,
    )


def _locked(path: Path) -> int | None:
    """A descriptor that holds the lock, None while somebody else does, or is just removing the folder."""
    try:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Whoever had it before us may have removed it since we opened it.
        if os.stat(path).st_ino == os.fstat(lock).st_ino:
            return lock
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        os.close(lock)
        raise
    os.close(lock)
    return None


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
