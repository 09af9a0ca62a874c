"""What the upstreams of the proof saw: one line for each attempt's begin and end, written before anything else happens.

A line is in the file once `os.write` has returned, even when its process is killed a moment later: the journal is the
account that the store's counters are held to.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

BEGUN, ENDED = "b", "e"


class Line(msgspec.Struct, array_like=True, frozen=True):
    """An attempt begun (`place`: epoch and position of its pick) or ended (`tokens`: input and output)."""

    kind: str
    worker: str
    number: int
    service: str
    pool: str
    place: tuple[int, int] = (0, 0)
    tokens: tuple[int, int] = (0, 0)


class Attempt(msgspec.Struct):
    """An attempt as its upstream saw it; `tokens` is None when it never ended."""

    pool: str
    service: str
    place: tuple[int, int]
    tokens: tuple[int, int] | None = None


class Journal:
    """One worker's file."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._encoder = msgspec.json.Encoder()

    def write(self, line: Line) -> None:
        """Appends a line."""
        os.write(self._fd, self._encoder.encode(line) + b"\n")


def read(folder: Path) -> dict[tuple[str, int], Attempt]:
    """All attempts of all workers, by worker and number."""
    attempts: dict[tuple[str, int], Attempt] = {}
    for path in sorted(folder.glob("*.journal")):
        for line in _lines(path):
            key = (line.worker, line.number)
            if line.kind == BEGUN:
                assert key not in attempts, f"{key} was begun twice"
                attempts[key] = Attempt(pool=line.pool, service=line.service, place=line.place)
            else:
                attempts[key].tokens = line.tokens
    return attempts


def workers_of(folder: Path, journals: Iterable[str] | None = None) -> set[str]:
    """The ids of the workers that wrote these journals (all when None)."""
    names = [path.name for path in folder.glob("*.journal")] if journals is None else journals
    return {line.worker for name in names if (folder / name).exists() for line in _lines(folder / name)}


def _lines(path: Path) -> Iterator[Line]:
    decoder = msgspec.json.Decoder(Line)
    with path.open("rb") as file:
        for raw in file:
            if raw.endswith(b"\n"):  # Else the kernel was given half a line when its writer was killed.
                yield decoder.decode(raw)
