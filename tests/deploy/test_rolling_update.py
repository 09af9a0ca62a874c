"""A rolling update on a cluster of this machine: the chart's pods, probed and ended as rendered, under load.

Without the preStop hook and BALANCER_DRAIN_DELAY_S dozens of requests meet a closed port; with
BALANCER_DRAIN_TIMEOUT_S=0 dozens of streams are cut.
"""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from balancer.cli.accounts import FakeAccount
from tests.deploy.front import Nginx
from tests.deploy.rendering import gateway, render
from tests.deploy.rollout import Cluster
from tests.fleet.conftest import LAST_WORDS, PATHS, STYLES, a_document, idle_view, ours, theirs
from tests.topologies import Server

REPLICAS = 4
EVERY_S = 0.025
TOKEN = "of-the-team"
KEYS = {"anna": "key-of-anna-0123", "boris": "key-of-boris-0123"}
MODELS = {"openai": "chat", "anthropic": "claude"}


class Load:
    """Requests at even distances, JSON and streams in both dialects, each on a connection of its own."""

    def __init__(self, url: str) -> None:
        self.failed: list[str] = []
        self.whole = 0
        self._url = url
        self._is_over = False

    async def run(self) -> None:
        """Asks until `stop`; returns when every answer is there."""
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        headers = {"Authorization": f"Bearer {TOKEN}"}
        kinds = itertools.cycle(itertools.product(STYLES, (False, True)))
        async with (
            aiohttp.ClientSession(connector=connector, headers=headers) as session,
            asyncio.TaskGroup() as group,
        ):
            while not self._is_over:
                group.create_task(self._ask(session, *next(kinds)))
                await asyncio.sleep(EVERY_S)

    def stop(self) -> None:
        """No further requests."""
        self._is_over = True

    async def _ask(self, session: aiohttp.ClientSession, style: str, is_stream: bool) -> None:
        messages = [{"role": "user", "content": f"request {self.whole}"}]
        body: dict[str, Any] = {"model": MODELS[style], "max_tokens": 40, "stream": is_stream, "messages": messages}
        try:
            async with session.post(self._url + PATHS[style], json=body) as response:
                text = await response.text()
        except aiohttp.ClientError as exc:
            self.failed.append(f"{style}, stream {is_stream}: {exc!r}")
            return
        if response.status != 200 or (is_stream and LAST_WORDS[style] not in text):
            self.failed.append(f"{style}, stream {is_stream}: {response.status} {text[-200:]}")
        else:
            self.whole += 1


@pytest.mark.needs("npm:helm", "apt:nginx")
async def test_pods_are_replaced_one_by_one_and_no_request_fails(tmp_path: Path) -> None:
    async with (
        FakeAccount("anna", KEYS["anna"]) as anna,
        # Its streams last up to three seconds: longer than everything that a pod waits for before it drains.
        FakeAccount("boris", KEYS["boris"], chunk_interval_s=0.25) as boris,
    ):
        accounts = [anna, boris]
        objects = render(
            {
                "clients": {"existingSecret": "clients"},
                "redis": {"existingSecret": "redis"},
                "credentials": {"environment": ["accounts"]},
                "replicas": REPLICAS,
                "config": a_document(accounts),
            }
        )
        store = Server("valkey-9", tmp_path / "store", "--save", "")
        secrets = {
            "clients": {"tokens": TOKEN},
            "redis": {"url": f"redis://{store.address}/0"},
            "accounts": KEYS,
        }
        nginx = Nginx(tmp_path, tries_another=False)
        cluster = Cluster(objects, gateway(objects), secrets, tmp_path, nginx)
        try:
            async with cluster.up(REPLICAS):
                load = Load(nginx.url)
                asking = asyncio.create_task(load.run())
                statuses = await cluster.replace_all()
                load.stop()
                await asking
                view = await idle_view(f"redis://{store.address}/0")
        finally:
            store.kill()

    assert load.failed == []
    assert statuses == [0] * REPLICAS
    assert load.whole == sum(requests for requests, _, _ in theirs(accounts).values())
    assert ours(view) == theirs(accounts)
    assert sum(state.lost for state in view.services.values()) == 0
