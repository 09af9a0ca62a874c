"""What a cluster does in a rolling update: it starts pods, probes them, removes endpoints and ends pods, each in time.

The times that a cluster waits are the chart's, divided by `PACE`; those that a process may take are not: a start, a
probe, a drain. Endpoints reach the proxy some time after the API server has them.
"""

from __future__ import annotations

import asyncio
import copy
import itertools
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from pathlib import Path

from deploy.build import Object
from tests.deploy.front import Nginx
from tests.deploy.kubelet import Pod, running
from tests.deploy.rendering import container, pod

PACE = 5.0
PROPAGATION_S = 3.0
"""What it may take until every proxy knows that an endpoint is gone. The chart's preStop hook sleeps for longer."""


class Hosted:
    """A pod with its kubelet: probed all the time, and ended as it is asked to be."""

    def __init__(self, runs: Pod, workload: Object, changed: Callable[[], None]) -> None:
        self.runs = runs
        self.is_ready = False
        self.is_terminating = False
        self.restarts = 0
        self._workload = workload
        self._changed = changed
        self.ready = asyncio.Event()

    async def keep(self) -> None:
        """Probes it until cancelled: the startup probe, then the two others at once."""
        probe = container(self._workload)["startupProbe"]
        deadline = time.monotonic() + probe["failureThreshold"] * probe["periodSeconds"]
        while not await self.runs.probe("startupProbe"):
            assert time.monotonic() < deadline, f"its startup probe never passed:\n{self.runs.log}"
            await asyncio.sleep(probe["periodSeconds"] / PACE)
        async with asyncio.TaskGroup() as group:
            group.create_task(self._watch("livenessProbe"))
            group.create_task(self._watch("readinessProbe"))

    async def _watch(self, name: str) -> None:
        probe = container(self._workload)[name]
        failures = 0
        while True:
            failures = 0 if await self.runs.probe(name) else failures + 1
            has_failed = failures >= probe["failureThreshold"]
            if name == "livenessProbe" and has_failed and not self.is_terminating:
                raise AssertionError(f"the kubelet would restart it:\n{self.runs.log}")
            if name == "readinessProbe" and (has_failed if self.is_ready else not failures):
                self._becomes(is_ready=not has_failed)
            await asyncio.sleep(probe["periodSeconds"] / PACE)

    def _becomes(self, *, is_ready: bool) -> None:
        self.is_ready = is_ready
        if is_ready:
            self.ready.set()
        self._changed()

    async def end(self) -> int:
        """Deletes it: its endpoint goes, its preStop hook sleeps, then SIGTERM; its exit status, within its grace."""
        began = time.monotonic()
        self.is_terminating = True
        self._changed()
        hook = container(self._workload).get("lifecycle", {}).get("preStop", {"sleep": {"seconds": 0}})
        await asyncio.sleep(hook["sleep"]["seconds"] / PACE)
        self.runs.terminate()
        process = self.runs.process
        assert process is not None
        grace_s = pod(self._workload)["terminationGracePeriodSeconds"] - (time.monotonic() - began)
        async with asyncio.timeout(grace_s):
            return await process.wait()


class Cluster:
    """Pods of one workload behind nginx."""

    def __init__(
        self, objects: list[Object], workload: Object, secrets: dict[str, dict[str, str]], folder: Path, nginx: Nginx
    ) -> None:
        self.pods: list[Hosted] = []
        self.workload = hastened(workload)
        self.nginx = nginx
        self._objects = objects
        self._secrets = secrets
        self._folder = folder
        self._numbers = itertools.count()
        self._stack = AsyncExitStack()
        self._group = asyncio.TaskGroup()
        self._keepers: list[asyncio.Task[None]] = []
        self._endpoints: list[int] = []
        self._has_changed = asyncio.Event()

    @asynccontextmanager
    async def up(self, replicas: int) -> AsyncIterator[None]:
        """So many pods, ready and behind nginx."""
        async with self._stack, self._group:
            await asyncio.gather(*(self.add() for _ in range(replicas)))
            self._endpoints = self._ready()
            async with self.nginx.running(self._endpoints):
                self._keepers.append(self._group.create_task(self._propagate()))
                yield
                for keeper in self._keepers:
                    keeper.cancel()

    async def add(self) -> Hosted:
        """A new pod, once it is ready."""
        folder = self._folder / f"pod-{next(self._numbers)}"
        folder.mkdir()
        context: AbstractAsyncContextManager[Pod] = running(self._objects, self.workload, self._secrets, folder)
        hosted = Hosted(await self._stack.enter_async_context(context), self.workload, self._has_changed.set)
        self.pods.append(hosted)
        self._keepers.append(self._group.create_task(hosted.keep()))
        await hosted.ready.wait()
        return hosted

    async def replace_all(self) -> list[int]:
        """A rolling update with one pod more and none fewer; the exit statuses of the pods that went."""
        strategy = self.workload["spec"]["strategy"]["rollingUpdate"]
        assert (strategy["maxSurge"], strategy["maxUnavailable"]) == (1, 0)
        ending = []
        for old in list(self.pods):
            new = await self.add()
            await asyncio.sleep(self.workload["spec"]["minReadySeconds"] / PACE)
            assert new.is_ready
            # Nobody waits for a pod that is going: it counts as gone.
            ending.append(self._group.create_task(old.end()))
        return await asyncio.gather(*ending)

    def _ready(self) -> list[int]:
        return [pod.runs.ports["http"] for pod in self.pods if pod.is_ready and not pod.is_terminating]

    async def _propagate(self) -> None:
        """Tells nginx of every change, some time later."""
        while True:
            await self._has_changed.wait()
            self._has_changed.clear()
            wanted = self._ready()
            await asyncio.sleep(PROPAGATION_S / PACE)
            if wanted != self._endpoints:
                await self.nginx.uses(wanted)
                self._endpoints = wanted


def hastened(workload: Object) -> Object:
    """The workload whose container waits as much shorter as the cluster does."""
    found = copy.deepcopy(workload)
    for entry in container(found)["env"]:
        if entry["name"] == "BALANCER_DRAIN_DELAY_S":
            entry["value"] = str(float(entry["value"]) / PACE)
    return found
