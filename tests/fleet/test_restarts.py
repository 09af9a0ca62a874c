"""Fleets that start while Redis is away, or that are told to end while they start."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

from balancer.cli.accounts import FakeAccount
from tests.fleet.conftest import END_S, Start, a_document, idle_view, ours, run_command, theirs
from tests.store.conftest import eventually
from tests.topologies import Server


async def test_a_fleet_that_starts_while_redis_is_away_serves_and_nothing_it_used_is_lost(
    start: Start, accounts: list[FakeAccount], tmp_path: Path
) -> None:
    server = Server("valkey-9", tmp_path / "data", "--appendonly", "yes", "--appendfsync", "always", "--save", "")
    url, variables = f"redis://{server.address}", {"BALANCER_OUTBOX_DIR": str(tmp_path / "outbox")}
    try:
        first = await start("--redis", url, document=a_document(accounts), workers=1, variables=variables)
        async with first.asker() as asker:
            assert await asker.is_whole("chat")
        assert await first.stopped() == 0
        server.kill()

        second = await start("--redis", url, document=a_document(accounts), workers=2, variables=variables)
        assert second.entries("starting without Redis, on the configuration that was kept")
        for _ in range(6):
            async with second.asker() as asker:
                assert await asker.is_whole("claude", style="anthropic", stream=True)
                async with asker.post("chat") as response:
                    assert response.headers["x-balancer-degraded"] == "store"
                    await response.read()

        assert server.start()

        async def is_counted() -> bool:
            return ours(await idle_view(url)) == theirs(accounts)

        await eventually(is_counted, timeout_s=20)
    finally:
        server.end()


async def test_without_a_kept_configuration_redis_must_be_there(environment: dict[str, str], tmp_path: Path) -> None:
    variables = environment | {"BALANCER_OUTBOX_DIR": str(tmp_path / "outbox")}
    command = ("serve", "--redis", f"unix://{tmp_path}/nobody", "--port", "0")
    status, _, err = await run_command(*command, environment=variables)
    assert status != 0
    assert "checking Redis" in err


async def test_a_fleet_that_is_told_to_end_while_it_starts_ends_at_once(
    environment: dict[str, str], tmp_path: Path
) -> None:
    """The first process of a container has no default action for SIGTERM.

    One within the first quarter of a second was lost, and the container served on until it was killed at the end of its
    grace.
    """
    configuration = tmp_path / "balancer.yaml"
    os.mkfifo(configuration)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "balancer", "serve", "--port", "0", "--config", str(configuration)),
        env=environment,
        stdin=asyncio.subprocess.DEVNULL,
    )
    # Can be opened once it is about to read it, and then waits for what nobody writes.
    with await asyncio.to_thread(configuration.open, "wb"):
        process.terminate()
        async with asyncio.timeout(END_S):
            status = await process.wait()
    assert status == 128 + signal.SIGTERM
