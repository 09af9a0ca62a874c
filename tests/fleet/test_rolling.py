"""A deploy: gateways behind an L4 balancer are replaced one after the other, under load, and no client notices."""

from __future__ import annotations

import asyncio
import random
import time
from pathlib import Path

import aiohttp
import msgspec
import pytest

from balancer.cli.accounts import FakeAccount
from benchmarks.chaos.client import Clients, End
from benchmarks.chaos.load import Asked, Load
from benchmarks.chaos.processes import haproxy
from tests.fleet.conftest import Fleet, Start, a_document, idle_view, ours, theirs

GATEWAYS = 4
PER_S = 60.0
DRAIN = {"BALANCER_DRAIN_DELAY_S": "1.5", "BALANCER_ADMIN_PORT": "0"}
"""Longer than it takes the balancer's health check to see that a gateway is not ready, and clients to come again."""


async def _is_reached(port: int, fleet: Fleet) -> None:
    """Returns once the balancer gives new connections to that gateway."""
    (pid,) = await fleet.workers()
    deadline = time.monotonic() + 10
    while True:
        async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{port}/readyz") as response:
            if msgspec.json.decode(await response.read())["pid"] == pid:
                return
        assert time.monotonic() < deadline, "the balancer never uses the new gateway"


@pytest.mark.needs("apt:haproxy")
async def test_gateways_are_replaced_one_by_one_and_no_request_fails(
    start: Start, accounts: list[FakeAccount], store_url: str, tmp_path: Path
) -> None:
    for account in accounts:
        account.chunk_interval_s = 0.02
    document = a_document(accounts)
    fleets = [await start("--redis", store_url, document=document, workers=1, variables=DRAIN) for _ in range(GATEWAYS)]
    ports = [int(fleet.url.rpartition(":")[2]) for fleet in fleets]
    async with haproxy(tmp_path, ports, asks_readiness=True) as port:
        rules = (Asked("chat", "openai"), Asked("claude", "anthropic"))
        load = Load(random.Random(7), Clients([port]), rules, PER_S, "rolling")
        load.start()
        for fleet, own in zip(fleets, ports, strict=True):
            await _is_reached(port, fleet)
            assert await fleet.stopped() == 0
            successor = await start("--redis", store_url, document=document, workers=1, port=own, variables=DRAIN)
            await _is_reached(port, successor)
        await asyncio.sleep(0.5)
        await load.stop()

    assert [answer for answer in load.answers if answer.end is not End.WHOLE] == []
    # The last successor may have been given no connection, since there were enough.
    assert len({answer.pid for answer in load.answers}) >= 2 * GATEWAYS - 1
    assert load.unasked == 0
    view = await idle_view(store_url)
    assert ours(view) == theirs(accounts)
    assert sum(state.lost for state in view.services.values()) == 0
