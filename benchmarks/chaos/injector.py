"""Injects what is planned, and notes what was injected when. It ends only processes that the run has started."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import Sequence

from benchmarks.chaos.account import STORMS, Storm
from benchmarks.chaos.causes import OF_THE_STORE, Fault, FaultKind
from benchmarks.chaos.load import Load
from benchmarks.chaos.plan import ALL, Planned
from benchmarks.chaos.processes import AccountProcess, Serve
from benchmarks.chaos.stores import Store

_SHARE = 0.3


class Injector:
    """The faults of a run."""

    def __init__(
        self,
        rand: random.Random,
        store: Store,
        accounts: Sequence[AccountProcess],
        victims: Sequence[Serve],
        load: Load,
    ) -> None:
        """`victims`: the fleets whose workers may be killed."""
        self._random = rand
        self._store = store
        self._accounts = accounts
        self._victims = victims
        self._load = load
        self._busy: set[str] = set()
        self.faults: list[Fault] = []

    async def run(self, planned: Sequence[Planned]) -> None:
        """Injects all of it, and returns when all is over."""
        began = time.monotonic()
        async with asyncio.TaskGroup() as tasks:
            for each in planned:
                await asyncio.sleep(max(0.0, began + each.at_s - time.monotonic()))
                tasks.create_task(self._inject(each))

    async def _inject(self, planned: Planned) -> None:
        kind = planned.kind
        if kind == FaultKind.KILL_WORKER:
            self._kill_worker()
        elif kind in OF_THE_STORE:
            await self._during(kind, "store", "store", self._store.faults[kind](planned.lasts_s))
        elif kind in STORMS:
            targets = [a for a in self._accounts if planned.target in (ALL, a.name)]
            await asyncio.gather(*(self._storm(a, Storm(kind), planned.lasts_s) for a in targets))
        else:
            await self._during(kind, kind, ALL, self._manner(kind, planned.lasts_s))

    def _kill_worker(self) -> None:
        workers = [pid for serve in self._victims for pid in serve.workers()]
        if not workers:
            return
        pid = self._random.choice(workers)
        self.faults.append(Fault(FaultKind.KILL_WORKER, str(pid), time.monotonic()))
        os.kill(pid, signal.SIGKILL)
        self.faults[-1].ended = time.monotonic()

    async def _storm(self, account: AccountProcess, storm: Storm, lasts_s: float) -> None:
        async def blow() -> None:
            await account.storm(storm)
            try:
                await asyncio.sleep(lasts_s)
            finally:
                await account.storm(Storm.NONE)

        await self._during(storm, account.name, account.name, blow())

    async def _manner(self, kind: str, lasts_s: float) -> None:
        self._load.shares[kind] = _SHARE
        await asyncio.sleep(lasts_s)
        self._load.shares[kind] = 0.0

    async def _during(self, kind: str, place: str, target: str, doing: object) -> None:
        """Notes the fault while it lasts. What is befallen already is left alone."""
        assert asyncio.iscoroutine(doing)
        if place in self._busy:
            doing.close()
            return
        self._busy.add(place)
        fault = Fault(kind, target, time.monotonic())
        self.faults.append(fault)
        try:
            await doing
        finally:
            fault.ended = time.monotonic()
            self._busy.discard(place)
