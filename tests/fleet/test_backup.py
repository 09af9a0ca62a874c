"""Backup and disaster, as docs/operations.md tells them: a copy put back, a store lost wholly, while a fleet serves."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
import yaml

from balancer.cli.accounts import FakeAccount
from tests.fleet.conftest import Fleet, Start, a_document, idle_view, ours, run_command, theirs
from tests.store.conftest import eventually
from tests.topologies import Server

Run = Callable[..., Awaitable[str]]
RECORDED = {"pools": [{"name": "default", "record": "full"}]}
POLL_S = 1.5
"""Longer than a worker leaves the registry unread."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """A server that writes everything to its append-only file at once."""
    made = Server("valkey-9", tmp_path / "data", "--appendonly", "yes", "--appendfsync", "always", "--save", "")
    yield made
    made.end()


async def asked(fleet: Fleet, count: int) -> None:
    """So many requests, every one of which must be answered."""
    for _ in range(count):
        async with fleet.asker() as asker:
            assert await asker.is_whole("chat")


def empty(server: Server) -> None:
    """What a new disk in the dead server's stead holds."""
    shutil.rmtree(server.folder / "appendonlydir")


@pytest.fixture
def command(environment: dict[str, str], server: Server) -> Run:
    """Runs a command on the store, which must succeed; what it printed."""

    async def ran(*arguments: str) -> str:
        status, out, err = await run_command(
            *arguments, environment=environment | {"BALANCER_REDIS": f"redis://{server.address}"}
        )
        assert status == 0, out + err
        return out

    return ran


async def test_a_copy_of_the_data_put_back_is_gone_on_from_and_audited_clean(
    start: Start, accounts: list[FakeAccount], server: Server, command: Run, tmp_path: Path
) -> None:
    url = f"redis://{server.address}"
    fleet = await start("--redis", url, document=a_document(accounts) | RECORDED)
    await asked(fleet, 6)
    assert ours(await idle_view(url)) == theirs(accounts)
    shutil.copytree(server.folder / "appendonlydir", tmp_path / "copy")
    await command("apply", str(_edited(accounts, tmp_path)))
    await asked(fleet, 4)
    assert ours(await idle_view(url)) == theirs(accounts)

    server.kill()
    empty(server)
    shutil.copytree(tmp_path / "copy", server.folder / "appendonlydir")
    assert server.start()

    await eventually(lambda: _is_up(fleet), timeout_s=10)
    await asked(fleet, 4)
    # The workers still had the settles of the last minute: nothing is lost but the picks between, and those are told.
    await eventually(lambda: _is_counted(url, accounts), timeout_s=10)
    assert (await idle_view(url)).epoch == 2
    assert "no violation" in await command("audit")
    assert "published as revision 2" in await command("apply", str(_edited(accounts, tmp_path)))
    await asked(fleet, 2)


async def test_a_store_that_was_lost_wholly_is_filled_by_who_serves_and_published_to_anew(
    start: Start, accounts: list[FakeAccount], server: Server, command: Run, tmp_path: Path
) -> None:
    url = f"redis://{server.address}"
    fleet = await start("--redis", url, document=a_document(accounts) | RECORDED)
    await command("apply", str(_edited(accounts, tmp_path)))
    await asyncio.sleep(POLL_S)
    await asked(fleet, 4)

    server.kill()
    empty(server)
    assert server.start()

    await eventually(lambda: _is_up(fleet), timeout_s=10)
    await asked(fleet, 4)
    assert fleet.entries("the registry is empty, and had a configuration: publish it again, `balancer apply FILE`")
    # Above the revision that the workers had, so that none of them is taken for the newer one.
    assert "published as revision 3" in await command("apply", str(_edited(accounts, tmp_path)))
    await asked(fleet, 2)
    assert "no violation" in await command("audit")


def _edited(accounts: list[FakeAccount], folder: Path) -> Path:
    """A file with another threshold."""
    file = folder / "edited.yaml"
    file.write_text(yaml.safe_dump(a_document(accounts, threshold=5) | RECORDED), encoding="utf-8")
    return file


async def _is_up(fleet: Fleet) -> bool:
    """True once a worker says of every pool that Redis answers."""
    async with fleet.asker() as asker:
        status, text = await asker.get("/readyz")
    return status == 200 and '"pools":{"default":"ok"}' in text


async def _is_counted(url: str, accounts: list[FakeAccount]) -> bool:
    return ours(await idle_view(url)) == theirs(accounts)
