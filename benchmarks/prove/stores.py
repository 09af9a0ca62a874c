"""The stores of the proof, and what befalls them.

A server behind a proxy that does what networks do; sets of servers whose masters are killed or frozen under load.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec

from balancer.store import keys
from tests import servers, topologies
from tests.faults import FaultProxy

Fault = Callable[[], Awaitable[None]]
KINDS = ("standalone", "sentinel", "cluster")
POOLS = ("default", "other")
_LAG_BYTES = 16 * 1024 * 1024
_PATIENCE_S = 120.0  # for a replica to copy hundreds of megabytes while the fleet goes on


class Store(msgspec.Struct, frozen=True, kw_only=True):
    """Where workers connect, where we do, the URLs of all masters at the moment, and the faults that it can have."""

    workers_url: str
    url: str
    masters: Callable[[], list[str]]
    faults: list[Fault]


@contextlib.asynccontextmanager
async def running(kind: str, folder: Path) -> AsyncIterator[Store]:
    """A store of that kind, until the block ends."""
    if kind == "standalone":
        with servers.running("valkey-9") as url:
            async with FaultProxy(url, folder / "p.sock").running() as proxy:
                yield Store(workers_url=proxy.url, url=url, masters=lambda: [url], faults=_of_a_network(proxy))
        return
    with contextlib.ExitStack() as stack:
        group = await asyncio.to_thread(stack.enter_context, topologies.named(kind))
        group.lag_bytes, group.patience_s = _LAG_BYTES, _PATIENCE_S
        yield Store(
            workers_url=group.url,
            url=group.url,
            masters=lambda: [f"redis://{server.address}" for server in group.masters()],
            faults=_of_a_set(group),
        )


def _of_a_network(proxy: FaultProxy) -> list[Fault]:
    async def heal_after(seconds: float) -> None:
        await asyncio.sleep(seconds)
        proxy.passes()

    async def reset() -> None:
        proxy.resets()

    async def latency() -> None:
        proxy.delays(0.05)
        await heal_after(1.0)

    async def drip() -> None:
        proxy.drips(100_000)
        await heal_after(1.0)

    async def blackhole() -> None:
        proxy.blackholes()
        await heal_after(0.7)

    async def half_open() -> None:
        proxy.blackholes()
        await asyncio.sleep(3.0)
        proxy.resets()
        proxy.passes()

    async def lost_replies() -> None:
        proxy.loses_replies()
        await asyncio.sleep(0.1)
        proxy.resets()
        proxy.passes()

    async def refuse() -> None:
        proxy.refuses()
        await heal_after(0.5)

    return [reset, latency, drip, blackhole, half_open, lost_replies, refuse]


def _of_a_set(group: Any) -> list[Fault]:
    async def kill_master() -> None:
        """Kill -9; its replica is promoted, and it comes back as a replica."""
        master = await asyncio.to_thread(group.master_of, keys.partitions(POOLS[0]))
        master.kill()
        await asyncio.sleep(5.0)
        await asyncio.to_thread(group.restore)

    async def freeze_master() -> None:
        """SIGSTOP for longer than it takes to promote its replica."""
        master = await asyncio.to_thread(group.master_of, keys.partitions(POOLS[1]))
        master.stop()
        await asyncio.sleep(5.0)
        master.resume()
        await asyncio.to_thread(group.restore)

    return [kill_master, freeze_master]
