"""A fresh pool on every kind of server."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis

from balancer.reference import Pool
from tests import servers
from tests.lua.builders import Fleet
from tests.lua.pool import LuaPool

_PARAMETERS = [
    pytest.param(kind, marks=[pytest.mark.needs("apt:redis-server")] if kind == "redis-7" else [])
    for kind in servers.KINDS
]


@pytest.fixture(scope="session", params=_PARAMETERS)
def server(request: pytest.FixtureRequest) -> Iterator[str]:
    """The URL of a running server."""
    with servers.running(request.param) as url:
        yield url


@pytest.fixture(scope="session")
def client(server: str) -> Iterator[Any]:
    """A connection to it."""
    with redis.Redis.from_url(server) as connection:
        yield connection


@pytest.fixture
def new_pool(client: Any) -> Iterator[Callable[..., LuaPool]]:
    """Makes empty pools; afterwards every key that they left must expire."""
    numbers = itertools.count()
    client.flushall()
    yield lambda **options: LuaPool(client, f"pool-{next(numbers)}", **options)
    immortal = [key for key in client.scan_iter("*") if client.pttl(key) < 0]
    assert not immortal, f"keys without an expiry: {immortal}"


@pytest.fixture(params=["scripts", "reference"])
def fleet(request: pytest.FixtureRequest, new_pool: Callable[..., LuaPool]) -> Fleet:
    """A fleet at an empty pool, told once to the scripts and once to the reference. Some modules have their own."""
    return Fleet(new_pool() if request.param == "scripts" else Pool())
