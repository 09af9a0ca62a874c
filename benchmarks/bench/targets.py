"""What we want to reach, and whether we have."""

from __future__ import annotations

from typing import Literal

import msgspec

from benchmarks.bench import figures
from benchmarks.bench.figures import Figures
from benchmarks.bench.measuring import AGENT, PACED, SMALL, SMALL_256, STREAM, Phase

OURS = "ours"
Verdict = Literal["aim", "must", "missed", "not measured"]


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """A figure, what it must be, what we aim at, and what it is (None: not measured). `unit` follows the numbers."""

    what: str
    must: float
    aim: float | None
    measured: float | None
    unit: str = "×"
    is_least: bool = False
    """The figure should be that or more; else that or less."""

    @property
    def verdict(self) -> Verdict:
        """What it has reached."""
        if self.measured is None:
            return "not measured"
        if self.aim is not None and self._reaches(self.aim):
            return "aim"
        return "must" if self._reaches(self.must) else "missed"

    def _reaches(self, bound: float) -> bool:
        assert self.measured is not None
        return self.measured >= bound if self.is_least else self.measured <= bound


def targets(found: Figures, workers: Figures | None = None) -> list[Target]:
    """All targets; `workers` has the rows of one worker and of two, named `1 worker` and `2 workers`."""

    def ours_to(other: str, phase: Phase, value: figures.Value) -> float | None:
        return found.ratio(OURS, other, phase, value)

    body = found.ratio_of_phases((OURS, AGENT), (OURS, SMALL), figures.cpu_us)
    listed = [
        Target(
            what="requests/s, of the bare aiohttp proxy's",
            must=2.5,
            aim=4.0,
            measured=ours_to("aiohttp", SMALL, figures.per_s),
            is_least=True,
        ),
        Target(
            what="requests/s, of vllm-router's",
            must=1.0,
            aim=1.5,
            measured=ours_to("vllm-router", SMALL, figures.per_s),
            is_least=True,
        ),
        Target(
            what="requests/s, of LiteLLM's with Redis",
            must=120,
            aim=250,
            measured=ours_to("litellm+redis", SMALL, figures.per_s),
            is_least=True,
        ),
        Target(what="CPU a request, of nginx's", must=4.0, aim=2.2, measured=ours_to("nginx", SMALL, figures.cpu_us)),
        Target(
            what="CPU a request of LiteLLM with Redis, of ours",
            must=120,
            aim=250,
            measured=found.ratio("litellm+redis", OURS, SMALL, figures.cpu_us),
            is_least=True,
        ),
        Target(
            what="CPU a stream of 51 events, of nginx's",
            must=1.4,
            aim=1.1,
            measured=ours_to("nginx", STREAM, figures.cpu_us),
        ),
        Target(
            what="p99 over 256 connections, of vllm-router's",
            must=1.0,
            aim=0.5,
            measured=ours_to("vllm-router", SMALL_256, figures.p99_ms),
        ),
        Target(
            what="CPU of Redis a request",
            must=25,
            aim=12,
            measured=found.median(OURS, SMALL, figures.redis_us),
            unit="µs",
        ),
        Target(what="CPU a request of 44 KB, of a small one's", must=1.5, aim=None, measured=body),
    ]
    if workers:
        two = workers.ratio("2 workers", "1 worker", PACED, figures.cpu_us)
        listed.append(Target(what="CPU a request of two workers, of one's", must=1.1, aim=None, measured=two))
    return listed
