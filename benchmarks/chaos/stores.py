"""The store of a run and what befalls it: a server with an append-only file, or a set under sentinels."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import msgspec

from benchmarks.chaos.causes import FaultKind
from benchmarks.chaos.processes import SERVERS_CORE, on_core
from tests import topologies

Strike = Callable[[float], Awaitable[None]]
KINDS = ("standalone", "sentinel")
_APPEND_ONLY = (
    *("--save", "", "--appendonly", "yes"),
    # What is written survives SIGKILL all the same. A busy disk, or a fork, would be an outage that nobody injects.
    *("--appendfsync", "no", "--auto-aof-rewrite-percentage", "0"),
)
_FAILOVER_S = 4.0
"""So long a master is away at least, for its replica to be promoted."""


class Store(msgspec.Struct, frozen=True, kw_only=True):
    """Where it is, and its faults; each lasts as many seconds as it is told."""

    url: str
    faults: dict[str, Strike]


@contextlib.asynccontextmanager
async def running(kind: str) -> AsyncIterator[Store]:
    """A store of that kind, until the block ends."""
    with contextlib.ExitStack() as stack:
        with on_core(SERVERS_CORE):
            if kind == "standalone":
                group: Any = stack.enter_context(topologies.Group())
                server = group.add("valkey-9", *_APPEND_ONLY)
                store = Store(url=f"redis://{server.address}", faults=_of_a_server(server))
            else:
                group = await asyncio.to_thread(stack.enter_context, topologies.named("sentinel"))
                group.patience_s = 60.0
                store = Store(url=group.url, faults=_of_a_set(group))
        yield store


def _of_a_server(server: Any) -> dict[str, Strike]:
    async def kill(lasts_s: float) -> None:
        server.kill()
        await asyncio.sleep(lasts_s)
        with on_core(SERVERS_CORE):
            assert await asyncio.to_thread(server.start), "the store does not start again"

    async def stall(lasts_s: float) -> None:
        server.stop()
        try:
            await asyncio.sleep(lasts_s)
        finally:
            server.resume()

    return {FaultKind.KILL_STORE: kill, FaultKind.STALL_STORE: stall}


def _of_a_set(group: Any) -> dict[str, Strike]:
    async def kill(lasts_s: float) -> None:
        master = await asyncio.to_thread(group.master_of, "")
        master.kill()
        await asyncio.sleep(max(lasts_s, _FAILOVER_S))
        with on_core(SERVERS_CORE):
            await asyncio.to_thread(group.restore)

    async def freeze(lasts_s: float) -> None:
        master = await asyncio.to_thread(group.master_of, "")
        master.stop()
        try:
            await asyncio.sleep(max(lasts_s, _FAILOVER_S))
        finally:
            master.resume()
        await asyncio.to_thread(group.restore)

    return {FaultKind.KILL_MASTER: kill, FaultKind.FREEZE_MASTER: freeze}
