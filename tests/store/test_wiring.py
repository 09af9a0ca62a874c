"""The registry's Python over a fake server: what is asked, in which order, and how replies are read."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import fakeredis
import pytest

from balancer.errors import ConflictError
from balancer.store import keys
from balancer.store.registry import Follower, Head, Registry
from tests.store.conftest import eventually
from tests.store.test_registry import a_configuration, a_rule


@pytest.fixture
async def client() -> AsyncIterator[Any]:
    fake = fakeredis.FakeAsyncRedis()
    yield fake
    await fake.aclose()


async def test_a_registry_publishes_loads_and_tells_the_head(client: Any) -> None:
    registry = Registry(client)
    first = await registry.publish(a_configuration(a_rule(description="first")), None, "digest-1")
    second = await registry.publish(a_configuration(a_rule(description="second")), first, "digest-2")
    assert await registry.head() == Head(revision=2, digest="digest-2")
    assert await registry.load(1) == first
    assert await registry.current() == second
    assert await registry.revision_of("digest-1") == 1
    with pytest.raises(ConflictError):
        await registry.publish(a_configuration(), first)


async def test_a_registry_writes_nothing_beside_its_own_keys_and_the_pools_of_its_rules(client: Any) -> None:
    await Registry(client).publish(a_configuration(a_rule(), a_rule("other", pool="eu")), None, "digest")
    assert {key.decode() for key in await client.keys("*")} == {
        keys.HEAD,
        keys.DIGESTS,
        keys.CHANGES,
        keys.snapshot(1),
        *(name(pool) for pool in ("default", "eu") for name in (keys.services, keys.partitions)),
    }


async def test_a_follower_takes_over_what_is_published(client: Any) -> None:
    registry = Registry(client)
    follower = Follower(client, registry)
    await follower.start()
    snapshot = await registry.publish(a_configuration(a_rule()), None)

    async def has_followed() -> bool:
        return follower.directory is not None and follower.directory.snapshot == snapshot

    await eventually(has_followed)
    assert follower.directory is not None
    assert follower.directory.rule("openai", "chat") == snapshot.configuration.rules[0]
    async with asyncio.timeout(10):
        await follower.close()
