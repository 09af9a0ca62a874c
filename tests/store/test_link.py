"""The bytes of a link: replies in order whatever their size, nothing lost, nothing taken for a reply that is none."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from redis.exceptions import ConnectionError as LostConnectionError
from redis.exceptions import ResponseError

from balancer.errors import StoreUnavailableError
from balancer.store import keys
from balancer.store.pool import PoolClient, PoolEvents
from balancer.store.topology import Topology, hang_up, new_connection
from balancer.store.wire import Wire, pack
from tests import servers
from tests.store.conftest import eventually
from tests.store.test_pool import a_selection
from tests.store.test_refusals import a_pool
from tests.store.test_topology import KEY, Scripted, a_link, nodes

MEGABYTE = b"m" * 1_000_000


def a_key(number: int) -> str:
    return keys.response("default", str(number))


async def test_replies_come_in_the_order_of_the_commands_whatever_their_size(url: str) -> None:
    values = [bytes([65 + i % 26]) * size for i, size in enumerate((0, 1, 10, 70_000, 3, 400_000, 65_536, 2))]
    async with a_link(url) as (link, _):

        async def is_up() -> bool:
            return link.is_up

        await eventually(is_up)
        for _ in range(3):
            written = [link.send("SET", a_key(i), value, "PX", 60_000) for i, value in enumerate(values)]
            link.flush()
            read = [link.send("GET", a_key(i)) for i in range(len(values))]
            refused = link.send("GET")
            missing = link.send("GET", a_key(99))
            link.flush()
            assert await asyncio.gather(*written) == [b"OK"] * len(values)
            assert await asyncio.gather(*read) == values
            with pytest.raises(ResponseError, match="wrong number"):
                await refused
            assert await missing is None


async def test_more_than_the_socket_takes_arrives_whole_and_in_order(url: str) -> None:
    async with a_link(url) as (link, told):

        async def is_up() -> bool:
            return link.is_up

        await eventually(is_up)
        written = [link.send("SET", a_key(0), b"%d" % i + MEGABYTE, "PX", 60_000) for i in range(16)]
        link.flush()
        last = link.send("GET", a_key(0))
        link.flush()
        assert await asyncio.gather(*written) == [b"OK"] * 16
        assert await last == b"15" + MEGABYTE
    assert told == ["up"]


async def test_a_lost_connection_is_noticed_at_once(url: str, control: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Topology, "patience_s", 3600)  # Nobody else would notice.
    async with a_pool(url, deadline_ms=60_000) as pool:
        await pool.wait_until_up(5)

        await control.client_pause(60_000, all=False)  # Writes wait; looking at clients does not.
        try:
            unanswered = asyncio.create_task(pool.put(a_key(0), "x", 60_000))
            await asyncio.sleep(0)
            for client in await control.client_list():
                if client["name"] == "balancer":
                    await control.client_kill_filter(_id=client["id"])
            with pytest.raises(StoreUnavailableError, match="Redis is away"):
                await asyncio.wait_for(unanswered, 10)
        finally:
            await control.client_unpause()
        await pool.wait_until_up(10)


# -- nodes that misbehave ----------------------------------------------------------------------------------------------


async def test_what_redis_says_unasked_is_no_reply() -> None:
    with servers.running("valkey-9") as url:
        async with a_link(f"{url}?protocol=3") as (link, told), a_link(url) as (other, _):

            async def are_up() -> bool:
                return link.is_up and other.is_up

            await eventually(are_up)
            tracking = link.send("CLIENT", "TRACKING", "ON", "BCAST")
            link.flush()
            assert await tracking == b"OK"
            for i in range(50):
                told_of = other.send("SET", a_key(1), str(i))
                other.flush()
                await told_of
                asked = link.send("GET", a_key(1)), link.send("ECHO", str(i))
                link.flush()
                assert [await reply for reply in asked] == [str(i).encode()] * 2
    assert told[0] == "up"


async def test_what_was_read_ahead_in_the_handshake_is_not_lost() -> None:
    node = Scripted(PING=b"+PONG\r\n>2\r\n+some\r\n+ne", GET=b"ws\r\n$4\r\nhere\r\n")
    async with nodes(node) as address, a_link(f"redis://{address}") as (link, told):

        async def is_up() -> bool:
            return link.is_up

        await eventually(is_up)
        asked = link.send("GET", KEY)
        link.flush()
        assert await asked == b"here"
    assert told == ["up"]


async def test_what_came_before_the_transport_was_taken_over_is_delivered() -> None:
    async with nodes(Scripted()) as address:
        topology = Topology(f"redis://{address}")
        connection = new_connection(await topology.locate(KEY), None, topology.connect_timeout_s)
        await connection.connect()  # type: ignore[no-untyped-call]
        await connection.send_command("PING")

        async def has_come() -> bool:
            return await connection.can_read()

        await eventually(has_come)
        replies: list[Any] = []
        wire = Wire(connection, replies.append)
        assert replies == [b"PONG"]
        wire.write(pack(("PING",)))

        async def has_followed() -> bool:
            return replies == [b"PONG", b"PONG"]

        await eventually(has_followed)
        wire.abort()
        with pytest.raises(LostConnectionError):
            await wire.lost
        await hang_up(connection)


async def test_a_reply_that_is_none_ends_the_connection() -> None:
    node = Scripted(GET=b"HTTP/1.1 400 Bad Request\r\n\r\n")
    async with nodes(node) as address, a_link(f"redis://{address}") as (link, told):

        async def is_up() -> bool:
            return link.is_up

        await eventually(is_up)
        asked = link.send("GET", KEY)
        link.flush()
        with pytest.raises(StoreUnavailableError, match="InvalidResponse"):
            await asked
        await eventually(is_up)
    assert told == ["up", "down", "up"]


async def test_a_fault_of_ours_in_reading_a_reply_is_no_end_of_the_link() -> None:
    async with nodes(Scripted()) as address, a_link(f"redis://{address}") as (link, told):

        async def is_up() -> bool:
            return link.is_up

        def stumble(reply: Any) -> None:
            raise ZeroDivisionError

        await eventually(is_up)
        link.post(("PING",), stumble)
        behind = link.send("PING")
        link.flush()
        with pytest.raises(StoreUnavailableError, match="a fault of ours"):
            await behind
        await eventually(is_up)
    assert told == ["up", "down", "up"]


# -- ticks -------------------------------------------------------------------------------------------------------------


async def test_each_selection_is_waited_for_as_long_as_the_deadline_from_its_own_asking() -> None:
    node = Scripted(EVAL=b"", EVALSHA=b"")  # It takes them and says nothing.
    async with nodes(node) as address:
        options: dict[str, Any] = {"deadline_ms": 300, "lease_ms": 30_000, "scripts_dir": "", "events": PoolEvents()}
        pool = PoolClient(Topology(f"redis://{address}"), "default", "w", **options)
        running = asyncio.create_task(pool._link.run())  # Without what a pool asks in the background.
        await pool.wait_until_up(5)
        loop = asyncio.get_running_loop()

        async def waited_s(number: int) -> float:
            asked_at = loop.time()
            with pytest.raises(StoreUnavailableError, match="Redis did not answer in time"):
                await pool.select(a_selection(number))
            return loop.time() - asked_at

        first = asyncio.create_task(waited_s(1))
        await asyncio.sleep(0.15)  # Half of the deadline, so that the second's ends apart from the first's.
        second = asyncio.create_task(waited_s(2))
        for waited in await asyncio.gather(first, second):
            assert 0.299 <= waited < 3
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
