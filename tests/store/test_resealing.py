"""Keys are changed under a fleet that goes on: all that Redis keeps is sealed anew, and nothing else differs."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator
from typing import Any

import pytest
import redis.asyncio

from balancer.domain import OAuthDetail
from balancer.errors import ConfigurationError
from balancer.store import keys
from balancer.store.connection import Commands
from balancer.store.credentials import Credentials, Sealer
from balancer.store.grants import Asking, Grant, Grants
from balancer.store.publishing import publish_file, roll_back
from balancer.store.registry import Registry
from balancer.store.resealing import reseal
from balancer.store.topology import Topology
from tests.builders import a_configuration, a_provider, a_rule

OLD, NEW = (base64.b64encode(letter * 32).decode() for letter in (b"o", b"n"))
OTHER = base64.b64encode(b"x" * 32).decode()


@pytest.fixture
async def commands(url: str) -> AsyncIterator[Commands]:
    made = Commands(Topology(url))
    yield made
    await made.aclose()


def configured(token: str) -> Any:
    provider = a_provider("eu", token=token, oauth_detail=OAuthDetail(access_token="at-1"))
    return a_configuration(a_rule(services=("eu:m",)), providers=(provider,))


async def everything(url: str) -> str:
    async with redis.asyncio.Redis.from_url(url) as client:
        found: list[Any] = []
        for key in await client.keys("*"):
            match await client.type(key):
                case b"hash":
                    found.append(await client.hgetall(key))
                case b"stream":
                    found.append(await client.xrange(key))
                case _:
                    found.append(await client.get(key))
    return repr(found)


async def a_grant(grants: Grants, sealer: Sealer) -> None:
    asking = Asking(provider="eu", holder="w", lease_ms=9999, seed="r" + "a" * 24, revision=1, due_ms=0, rotates=True)
    lease = await grants.lease(asking)
    access, refresh = (sealer.seal(f"new-{name}", ("eu", f"grant.{name}")) for name in ("access", "refresh"))
    grant = Grant(
        seeds=asking.seed, version=lease.version + 1, fence=lease.number, access=access, refresh=refresh, renewed_ms=1
    )
    assert await grants.keep("eu", grant)


async def test_all_that_is_kept_opens_with_the_new_key_alone(commands: Commands, url: str) -> None:
    registry, grants, old = Registry(commands), Grants(commands), Sealer(OLD)
    await publish_file(registry, configured("sk-1"), old)
    await publish_file(registry, configured("sk-2"), old)
    await a_grant(grants, old)
    before = await registry.current()
    assert before is not None

    done = await reseal(registry, grants, Sealer(NEW, OLD))

    assert (done.revision, done.snapshots, done.grants, done.unopened) == (3, 2, 1, ())
    assert f"sealed:v2:{old.key_id}" not in await everything(url)
    after = await registry.current()
    assert after is not None
    assert (after.digest, after.rule_revision("chat")) == (before.digest, before.rule_revision("chat"))
    new = Sealer(NEW)
    assert Credentials(new).access_token(after.configuration.providers[0]) == "sk-2"
    assert (await publish_file(registry, configured("sk-2"), new)).result == "unchanged"
    await roll_back(registry, 1)
    first = await registry.current()
    assert first is not None
    assert Credentials(new).access_token(first.configuration.providers[0]) == "sk-1"
    grant = await grants.load("eu")
    assert grant is not None
    assert new.open(grant.refresh, ("eu", "grant.refresh")) == "new-refresh"


async def test_done_again_it_changes_nothing(commands: Commands) -> None:
    registry, grants = Registry(commands), Grants(commands)
    await publish_file(registry, configured("sk-1"), Sealer(OLD))
    first = await reseal(registry, grants, Sealer(NEW, OLD))
    again = await reseal(registry, grants, Sealer(NEW, OLD))
    assert (again.revision, again.snapshots, again.grants) == (first.revision, 0, 0)


async def test_an_earlier_revision_that_nothing_opens_is_left_and_named(commands: Commands) -> None:
    registry = Registry(commands)
    await publish_file(registry, configured("sk-1"), Sealer(OTHER))
    await publish_file(registry, configured("sk-2"), Sealer(OLD))
    done = await reseal(registry, Grants(commands), Sealer(NEW, OLD))
    assert done.unopened == ("revision 1",)


async def test_a_standing_revision_that_nothing_opens_is_refused(commands: Commands) -> None:
    registry = Registry(commands)
    await publish_file(registry, configured("sk-1"), Sealer(OTHER))
    with pytest.raises(ConfigurationError, match="BALANCER_SECRET_KEY_ALSO opens"):
        await reseal(registry, Grants(commands), Sealer(NEW, OLD))
    head = await registry.head()
    assert head.revision == 1


async def test_an_empty_store_has_nothing_to_seal(commands: Commands, url: str) -> None:
    done = await reseal(Registry(commands), Grants(commands), Sealer(NEW, OLD))
    assert (done.revision, done.snapshots, done.grants) == (0, 0, 0)
    async with redis.asyncio.Redis.from_url(url) as client:
        assert await client.exists(keys.HEAD) == 0
