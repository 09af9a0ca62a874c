"""secrets: what is kept sealed, and with which key."""

from __future__ import annotations

import argparse
import asyncio

from balancer import config
from balancer.cli.store import opened
from balancer.errors import ConfigurationError
from balancer.store.connection import Commands
from balancer.store.grants import Grants
from balancer.store.registry import Registry
from balancer.store.resealing import Resealed, reseal
from balancer.store.topology import Topology


def rotate(options: argparse.Namespace) -> int:
    """Seals everything anew that another key than BALANCER_SECRET_KEY has sealed, and prints what that was."""
    settings = config.load(vars(options))
    with opened(settings) as store:
        sealer = store.sealer
        if sealer is None:
            raise ConfigurationError("there is no key to seal with: set BALANCER_SECRET_KEY")

        async def work() -> Resealed:
            commands = Commands(Topology(store.url))
            try:
                return await reseal(
                    Registry(commands, settings.scripts_dir), Grants(commands, settings.scripts_dir), sealer
                )
            finally:
                await commands.aclose()

        done = asyncio.run(work())
    print(f"revision {done.revision} stands; sealed anew: {done.snapshots} earlier ones, {done.grants} grants")
    for name in done.unopened:
        print(f"{name}: sealed with a key that is not at hand; it cannot be rolled back to")
    print(f"All else is sealed with key {sealer.key_id}.")
    return 0
