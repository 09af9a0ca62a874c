"""Rounds: every contestant is started and put to sleep, then each in turn is woken, measured, and put to sleep again.

All are measured in one run, and within a round close to each other: whatever else the machine does befalls them alike.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec

from benchmarks.bench import processes
from benchmarks.bench.contestants import Contestant, Missing, file_name
from benchmarks.bench.measuring import SMALL, SMALL_1, Phase, Row, measure, run_load
from benchmarks.bench.processes import CONTESTANT_CORE, Process
from benchmarks.bench.site import Site

_START_S = 90.0
_WARM_S = 1.0


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """How long to measure what."""

    rounds: int
    seconds: float
    phases: tuple[Phase, ...]

    @property
    def told(self) -> str:
        """It in words."""
        return f"{self.rounds} rounds, {self.seconds:g} s a phase after its warm-up"


class Field:
    """The contestants that are ready, each with its process."""

    def __init__(self, site: Site, say: Callable[[str], None]) -> None:
        self._site = site
        self._say = say
        self._ready: list[tuple[Contestant, Process | None]] = []
        self.missing: list[Missing] = []

    @property
    def names(self) -> list[str]:
        """Of those that are ready."""
        return [contestant.name for contestant, _ in self._ready]

    def add(self, contestant: Contestant | Missing, check: Callable[[Contestant], None] | None = None) -> None:
        """Starts one and puts it to sleep once it has answered. What cannot be started is missing, and said so.

        `check` looks at it while it is awake.
        """
        if isinstance(contestant, Missing):
            self._leave_out(contestant)
            return
        started = time.monotonic()
        process: Process | None = None
        if contestant.command:
            process = processes.start(
                contestant.command, CONTESTANT_CORE, self._site.folder, file_name(contestant.name), contestant.variables
            )
        self._ready.append((contestant, process))
        if not self._answers(contestant, process):
            self._ready.pop()
            said = process.tail() if process else ""
            if process:
                process.end()
            self._leave_out(Missing(name=contestant.name, reason=f"does not answer: {said.strip()[-300:]}"))
            return
        run_load(self._site, contestant, SMALL, _WARM_S)
        if check:
            check(contestant)
        if process:
            process.freeze()
        self._say(f"ready: {contestant.name} ({time.monotonic() - started:.1f} s)")

    def run(self, plan: Plan) -> Iterator[Row]:
        """Measures all, round by round; each round starts with another one."""
        for round_ in range(plan.rounds if self._ready else 0):
            first = round_ % len(self._ready)
            for contestant, process in self._ready[first:] + self._ready[:first]:
                with _awake(process):
                    # Connections that slept were cut meanwhile, leases have ended; that is not what is measured.
                    run_load(self._site, contestant, SMALL, 0.2)
                    for phase in plan.phases:
                        yield measure(self._site, contestant, process, phase, plan.seconds, round_)
            self._say(f"round {round_ + 1} of {plan.rounds} is done")

    def end(self) -> None:
        """Ends all of them."""
        for _, process in self._ready:
            if process:
                process.end()
        self._ready.clear()

    def _answers(self, contestant: Contestant, process: Process | None) -> bool:
        ends = time.monotonic() + _START_S
        while time.monotonic() < ends and not (process and process.has_ended):
            if processes.is_listening(contestant.port) and run_load(self._site, contestant, SMALL_1, 0.3).right:
                return True
            time.sleep(0.2)
        return False

    def _leave_out(self, missing: Missing) -> None:
        self.missing.append(missing)
        self._say(f"left out: {missing.name}: {missing.reason}")


@contextlib.contextmanager
def _awake(process: Process | None) -> Iterator[None]:
    if process:
        process.thaw()
    try:
        yield
    finally:
        if process:
            process.freeze()


@contextlib.contextmanager
def field(site: Site, say: Callable[[str], None]) -> Iterator[Field]:
    """A field of contestants, all of which end with the block."""
    made = Field(site, say)
    try:
        yield made
    finally:
        made.end()


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Writes them as one JSON document, a row a line."""
    lines = ",\n".join(msgspec.json.encode(row).decode() for row in rows)
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
