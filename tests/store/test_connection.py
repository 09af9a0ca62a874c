"""Reaching Redis: which URLs and servers are refused in which words, both protocols, nothing secret in a message."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from balancer.domain import (
    Entry,
    Outcome,
    PartitionDefinition,
    RuleDefinition,
    Selection,
    ServiceDefinition,
    Usage,
    WindowsDefinition,
)
from balancer.errors import BalancerError, ConfigurationError, StoreUnavailableError
from balancer.store import connection, keys
from balancer.store.connection import check_server
from balancer.store.pool import PoolClient, PoolEvents
from balancer.store.registry import Head, Registry
from balancer.store.topology import Topology
from tests.store.conftest import eventually

PASSWORD = "hunter2"


# -- URLs --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "redis://localhost",
        "redis://user:pass%2Fword@redis.internal:6380/3",
        "redis://[::1]:6379",
        "rediss://redis.internal",
        "unix:///run/redis.sock",
        "unix://user:pass@/run/redis.sock?db=2",
        "redis://localhost?protocol=2",
        "redis://localhost?protocol=3&socket_keepalive=true",
    ],
)
def test_urls_of_a_single_server_are_accepted(url: str) -> None:
    Topology(url)


@pytest.mark.parametrize("url", ["", "localhost:6379", "http://localhost", "tcp://localhost"])
def test_what_is_no_redis_url_is_told_what_is_expected(url: str) -> None:
    with pytest.raises(ConfigurationError, match=r"BALANCER_REDIS: expected one of redis://"):
        Topology(url)


@pytest.mark.parametrize(
    "url",
    [
        "redis://localhost:port",
        "redis://localhost:99999",
        "redis:6379",
        "redis://localhost?socket_timeout=soon",
        "redis://[::1",
        "redis://localhost?passwrd=x",
        "redis://localhost?protocol=4",
    ],
)
def test_urls_with_a_part_that_cannot_be_used_are_refused(url: str) -> None:
    with pytest.raises(ConfigurationError, match=r"^BALANCER_REDIS: "):
        Topology(url)


@pytest.mark.parametrize(
    "url",
    [
        f"http://:{PASSWORD}@localhost",
        f"redis+cluster://:{PASSWORD}@localhost:port",
        f"redis://:{PASSWORD}@localhost:port",
        f"redis://:{PASSWORD}@localhost?socket_timeout=soon",
        f"redis://:{PASSWORD}/x@localhost:6379",
    ],
    ids=["scheme", "a node's port", "port", "option", "an unescaped slash"],
)
def test_no_refusal_of_a_url_shows_its_password(url: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Topology(url)
    assert PASSWORD not in str(caught.value)


# -- servers -----------------------------------------------------------------------------------------------------------


async def test_a_server_of_ours_is_fine(url: str) -> None:
    await check_server(url)


@pytest.mark.parametrize("policy", ["allkeys-lru", "volatile-ttl"])
async def test_a_server_that_may_evict_keys_is_refused_with_the_remedy(url: str, control: Any, policy: str) -> None:
    await control.config_set("maxmemory-policy", policy)
    try:
        with pytest.raises(ConfigurationError, match=f"{policy}.*set maxmemory-policy noeviction"):
            await check_server(url)
    finally:
        await control.config_set("maxmemory-policy", "noeviction")


@contextlib.asynccontextmanager
async def a_server_with(info: str, *, knows_hello: bool = True) -> AsyncIterator[str]:
    """The URL of something on loopback that greets as Redis does and answers INFO with these lines."""
    hello = b"%1\r\n$5\r\nproto\r\n:3\r\n" if knows_hello else b"-ERR unknown command `HELLO`\r\n"

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while line := await reader.readline():
                words = []
                for _ in range(int(line[1:])):
                    length = int((await reader.readline())[1:])
                    words.append((await reader.readexactly(length + 2))[:-2].upper())
                text = b"# Server\r\n" + info.replace("\n", "\r\n").encode()
                answers = {b"INFO": b"$%d\r\n%b\r\n" % (len(text), text), b"HELLO": hello}
                writer.write(answers.get(words[0], b"+OK\r\n"))
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}"


@pytest.mark.parametrize(
    ("info", "message"),
    [
        ("redis_version:6.0.16", "redis 6.0.16 is too old: redis 6.2 or newer is needed"),
        ("redis_version:5.0.14", "redis 5.0.14 is too old"),
        ("redis_version:7.2.4\nvalkey_version:7.1.9", "valkey 7.1.9 is too old: valkey 7.2 or newer is needed"),
    ],
)
async def test_a_server_that_is_too_old_is_refused_with_both_versions(info: str, message: str) -> None:
    async with a_server_with(info) as url:
        with pytest.raises(ConfigurationError, match=message):
            await check_server(url)


async def test_a_server_from_before_the_newer_protocol_is_refused_as_too_old() -> None:
    """Redis 5 does not know HELLO, with which clients ask for the protocol."""
    async with a_server_with("redis_version:5.0.14", knows_hello=False) as url:
        with pytest.raises(
            ConfigurationError, match=r"this Redis is too old: redis 6\.2 or valkey 7\.2 or newer is needed"
        ):
            await check_server(url)


@pytest.mark.parametrize(
    "info",
    [
        "redis_version:6.2.0",
        "redis_version:8.2.3\nmaxmemory_policy:noeviction",
        "redis_version:7.2.4\nvalkey_version:7.2.0",
        "redis_version:10.0.0",
        "redis_version:7.2.4\nvalkey_version:9.1.2-rc1",
    ],
)
async def test_servers_that_are_new_enough_are_accepted(info: str) -> None:
    async with a_server_with(info) as url:
        await check_server(url)


def a_closed_port() -> int:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return int(unused.getsockname()[1])


async def test_a_server_that_is_away_is_unavailable_and_not_misconfigured(tmp_path: Path) -> None:
    for url in (f"redis://127.0.0.1:{a_closed_port()}", f"unix://{tmp_path / 'none.sock'}"):
        with pytest.raises(StoreUnavailableError, match="checking Redis: Redis does not answer"):
            await check_server(url)


# -- passwords ---------------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def a_password(control: Any) -> AsyncIterator[None]:
    await control.config_set("requirepass", PASSWORD)
    try:
        yield
    finally:
        await control.config_set("requirepass", "")


def with_password(url: str, password: str) -> str:
    return url.replace("unix://", f"unix://:{password}@")


async def test_a_password_in_the_url_opens_the_server(url: str, control: Any) -> None:
    async with a_password(control):
        good = with_password(url, PASSWORD)
        await check_server(good)
        client = connection.client(good)
        assert await Registry(client).head() == Head()
        await client.aclose()
        pool = a_pool(good)
        await pool.wait_until_up(5)
        await pool.close(timeout_s=0)


async def test_no_password_is_shown_when_it_is_wrong_or_the_server_is_away(
    url: str, control: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "balancer")
    async with a_password(control):
        wrong = with_password(url, f"{PASSWORD}-wrong")
        away = f"redis://user:{PASSWORD}@127.0.0.1:{a_closed_port()}"
        for refused in (wrong, away):
            with pytest.raises(BalancerError) as checked:
                await check_server(refused)
            client = connection.client(refused)
            with pytest.raises(StoreUnavailableError) as read:
                await Registry(client).head()
            await client.aclose()
            pool = a_pool(refused)
            with pytest.raises(StoreUnavailableError) as waited:
                await pool.wait_until_up(0.2)
            await pool.close(timeout_s=0)
            told = f"{checked.value} {read.value} {waited.value}"
            assert PASSWORD not in told
            assert "127.0.0.1" not in told
    assert not [r for r in caplog.records if PASSWORD in r.getMessage() + str(getattr(r, "facts", ""))]


# -- protocols ---------------------------------------------------------------------------------------------------------


def a_pool(url: str, worker: str = "w") -> PoolClient:
    pool = PoolClient(
        Topology(url), "default", worker, deadline_ms=5000, lease_ms=30_000, scripts_dir="", events=PoolEvents()
    )
    pool.start()
    return pool


def a_definition() -> RuleDefinition:
    return RuleDefinition(
        rule="chat",
        revision=1,
        partitions=(
            PartitionDefinition(
                id=keys.partition("chat"),
                tactic="round_robin",
                params={"request_threshold": 1},
                cursor="",
                services=(ServiceDefinition(id="a:m", active=1, window=300, weight=1),),
            ),
        ),
        windows=(WindowsDefinition(id="a:m", lengths=(300,)),),
    )


def a_selection(number: int, revision: int = 1) -> Selection:
    return Selection(
        number=number,
        rule="chat",
        partition=keys.partition("chat"),
        revision=revision,
        reserved=5,
        deadline_ms=60_000,
    )


@pytest.mark.parametrize("protocol", ["", "?protocol=2", "?protocol=3"])
async def test_a_pool_works_alike_over_both_protocols(url: str, control: Any, protocol: str) -> None:
    pool = a_pool(url + protocol)
    await pool.wait_until_up(5)
    assert await pool.select(a_selection(1)) == ["define", 0]
    assert await pool.raise_fence([a_definition()]) == 1
    picks = [await pool.select(a_selection(number)) for number in (2, 3)]
    assert [pick[:2] + pick[3:6] for pick in picks] == [["pick", "a:m", 1, 1, 2], ["pick", "a:m", 2, 1, 3]]
    pool.settle(Entry(number=2, service="a:m", outcome=Outcome.SUCCESS, usage=Usage(input=7)))
    assert await pool.acknowledged(5)
    state = (await pool.view()).services["a:m"]
    assert (state.picks, state.requests, state.input, state.in_flight, state.reserved) == (2, 1, 7, 1, 5)
    await pool.close(timeout_s=0)
    await control.zadd(keys.leases("default"), {"w": 1})
    other = a_pool(url + protocol, "other")

    async def is_reaped() -> bool:
        await other.wait_until_up(5)
        return (await other.view()).services["a:m"].lost == 1

    await eventually(is_reaped)
    await other.close(timeout_s=0)


@pytest.mark.parametrize("protocol", ["?protocol=2", "?protocol=3"])
async def test_the_registry_reads_the_head_alike_over_both_protocols(url: str, control: Any, protocol: str) -> None:
    await control.hset(keys.HEAD, mapping={"revision": 3, "digest": "d", "pending": 4})
    client = connection.client(url + protocol)
    assert await Registry(client).head() == Head(revision=3, digest="d", pending=4)
    await client.aclose()


async def test_a_pool_closes_at_whatever_moment_it_is_told_to(url: str) -> None:
    """Also while it is still greeting the server; a cancellation lost there must not keep a process from ending."""
    for turns in range(60):
        pool = a_pool(url)
        for _ in range(turns):
            await asyncio.sleep(0)
        async with asyncio.timeout(10):
            await pool.close(timeout_s=0)
