"""When which fault strikes whom: first each by itself, then several at a time; all of it follows from a seed."""

from __future__ import annotations

import random
from collections.abc import Sequence

import msgspec

from benchmarks.chaos.account import STORMS
from benchmarks.chaos.causes import OF_THE_STORE, FaultKind

ALL = "all"
"""Every account, or any worker."""


class Planned(msgspec.Struct, frozen=True, kw_only=True):
    """A fault to be injected, so many seconds after the plan has begun."""

    kind: str
    target: str
    at_s: float
    lasts_s: float


def kinds_of(store: str) -> list[str]:
    """The faults that a fleet on such a store can have."""
    own = {"standalone": (FaultKind.KILL_STORE, FaultKind.STALL_STORE)}
    masters = own.get(store, (FaultKind.KILL_MASTER, FaultKind.FREEZE_MASTER))
    return [FaultKind.KILL_WORKER, FaultKind.KILL_WORKER, FaultKind.LEAVE, FaultKind.DAWDLE, *masters, *STORMS]


def one_after_the_other(
    rand: random.Random, kinds: Sequence[str], accounts: Sequence[str], lasts_s: float, pause_s: float
) -> list[Planned]:
    """Every fault once, each storm on one account and on all; between any two the fleet may recover."""
    planned, at_s = [], 0.0
    for kind in kinds:
        for target in (rand.choice(accounts), ALL) if kind in STORMS else (ALL,):
            planned.append(Planned(kind=kind, target=target, at_s=at_s, lasts_s=lasts_s))
            # A store that comes back has its own to do before anything else strikes.
            at_s += lasts_s + pause_s * (2 if kind in OF_THE_STORE else 1)
    return planned


def overlapping(
    rand: random.Random, kinds: Sequence[str], accounts: Sequence[str], span_s: float, every_s: float, lasts_s: float
) -> list[Planned]:
    """Faults in random order, all kinds before any again; one about every so many seconds, up to 2 `lasts_s` long."""
    planned, at_s = [], 0.0
    bag: list[str] = []
    while at_s < span_s:
        bag = bag or rand.sample(kinds, len(kinds))
        kind = bag.pop()
        target = ALL if kind not in STORMS or rand.random() < 0.3 else rand.choice(accounts)
        planned.append(
            Planned(kind=kind, target=target, at_s=at_s, lasts_s=min(rand.uniform(0.5, 2) * lasts_s, span_s - at_s))
        )
        at_s += rand.uniform(0.2, 1.8) * every_s
    return planned


def span_s(planned: Sequence[Planned]) -> float:
    """Seconds until the last of them is over."""
    return max((each.at_s + each.lasts_s for each in planned), default=0.0)
