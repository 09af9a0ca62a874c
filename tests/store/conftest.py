"""Real servers for the store's tests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import pytest
import redis
import redis.asyncio

from tests import servers

_PARAMETERS = [
    pytest.param(kind, marks=[pytest.mark.needs("apt:redis-server")] if kind == "redis-7" else [])
    for kind in servers.KINDS
]


@pytest.fixture(scope="session", params=_PARAMETERS)
def any_server(request: pytest.FixtureRequest) -> Iterator[str]:
    """The URL of a running server, of every kind in turn."""
    with servers.running(request.param) as url:
        yield url


@pytest.fixture
def url(any_server: str) -> Iterator[str]:
    """The URL of an empty server; afterwards every key but the registry's must expire."""
    with redis.Redis.from_url(any_server) as client:
        client.flushall()
        yield any_server
        immortal = [
            k for k in client.scan_iter("*") if client.pttl(k) < 0 and not k.startswith(b"balancer:{registry}:")
        ]
        assert not immortal, f"keys without an expiry: {immortal}"


@pytest.fixture
async def control(url: str) -> AsyncIterator[Any]:
    """A client of its own, to look at the server and to disturb it."""
    async with redis.asyncio.Redis.from_url(url) as client:
        yield client


async def eventually(holds: Callable[[], Awaitable[bool]], timeout_s: float = 10) -> None:
    """Returns as soon as the condition holds; fails after the time."""
    async with asyncio.timeout(timeout_s):
        while not await holds():  # noqa: ASYNC110  what it asks is elsewhere: in Redis, in another process
            await asyncio.sleep(0.01)
