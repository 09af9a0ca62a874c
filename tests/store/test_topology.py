"""Where the master is: URLs, what sentinels and nodes of a Cluster say, failovers and moved slots under load."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
import redis
from redis.crc import key_slot

from balancer import document, stored
from balancer.domain import Configuration
from balancer.errors import ConfigurationError, StoreUnavailableError
from balancer.store import connection, keys, registry
from balancer.store.connection import Commands, Link, check_server
from balancer.store.pool import PoolClient, PoolEvents
from balancer.store.registry import Follower, Registry
from balancer.store.topology import Node, Topology
from tests import servers, topologies
from tests.actors import served
from tests.store.conftest import Target, eventually
from tests.store.test_pool import a_definition, a_selection, an_entry

KEY = keys.partitions("default")

# -- URLs --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "kind", "nodes"),
    [
        ("redis://h", "standalone", ()),
        ("redis://user:p%40ss@[::1]:7000/2?protocol=2", "standalone", ()),
        ("rediss://h:6380?ssl_cert_reqs=none&ssl_check_hostname=false", "standalone", ()),
        ("unix:///run/redis.sock?db=1&password=x", "standalone", ()),
        ("redis+sentinel://h/main", "sentinel", (Node("h", 26379),)),
        (
            "redis+sentinel://u:p@a:1,[::2]:3,b/main/4?protocol=3",
            "sentinel",
            (Node("a", 1), Node("::2", 3), Node("b", 26379)),
        ),
        ("rediss+sentinel://a/main?sentinel_username=s&sentinel_password=p", "sentinel", (Node("a", 26379),)),
        ("redis+cluster://a,b:7001", "cluster", (Node("a", 6379), Node("b", 7001))),
        ("rediss+cluster://:p@[fe80::1]:7000,c/0", "cluster", (Node("fe80::1", 7000), Node("c", 6379))),
    ],
)
def test_a_url_names_one_server_sentinels_or_a_cluster(url: str, kind: str, nodes: tuple[Node, ...]) -> None:
    topology = Topology(url)
    assert (topology.kind, topology.nodes) == (kind, nodes)


@pytest.mark.parametrize(
    ("url", "what"),
    [
        ("", "expected one of redis://"),
        ("s3cret", "expected one of redis://"),
        ("http://u:s3cret@h", "expected one of redis://"),
        ("redis+proxy://u:s3cret@h", "expected one of redis://"),
        ("redis://u:s3cret@h:port", "port"),
        ("redis://u:s3cret@h:65536", "port"),
        ("redis://u:s3/cret@h", "port"),
        ("redis://u:s3#cret@h", "#"),
        ("redis://u:s3cret@h/first", "database"),
        ("redis://u:s3cret@a,b", "several hosts"),
        ("redis://u:s3cret@h?protocol=4", "value"),
        ("redis://u:s3cret@h?protocol=s3cret", "value"),
        ("redis://u:s3cret@h?decode_responses=1", "unknown parameter"),
        ("redis://u:s3cret@h?ssl_ca_certs=/x", "need rediss"),
        ("redis://u:s3cret@h?sentinel_password=s3cret", "unknown parameter"),
        ("rediss://u:s3cret@h?ssl_cert_reqs=perhaps", "value"),
        ("rediss://u:s3cret@h?ssl_wishes=s3cret", "not known"),
        ("rediss://u:s3cret@h?ssl_ca_certs=/does/not/exist", "No such file"),
        ("unix://", "path"),
        ("redis+sentinel://u:s3cret@a,b", "service"),
        ("redis+sentinel://u:s3cret@a,,b/main", "host"),
        ("redis+sentinel://u:s3cret@[::1/main", "host"),
        ("redis+sentinel://u:s3cret@[::1]x/main", "host"),
        ("redis+sentinel://u:s3cret@a:0/main", "port"),
        ("redis+sentinel://u:s3cret@a/main/first", "database"),
        ("redis+cluster://u:s3cret@/0", "host"),
        ("redis+cluster://u:s3cret@a/1", "database 0"),
        ("redis+cluster://u:s3cret@a?db=1", "database 0"),
    ],
)
def test_a_malformed_url_is_refused_without_repeating_any_of_it(url: str, what: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Topology(url)
    message = caught.value.message
    assert message.startswith("BALANCER_REDIS: ")
    assert what in message
    assert "s3" not in message
    assert "cret" not in message


# -- what nodes say, scripted ------------------------------------------------------------------------------------------


class Scripted:
    """A node that answers each command with the reply, in RESP, that it was given for its first word."""

    def __init__(self, **replies: bytes) -> None:
        self.replies = {"HELLO": b"%1\r\n+proto\r\n:3\r\n", "CLIENT": b"+OK\r\n", "PING": b"+PONG\r\n"} | replies
        self.received: list[tuple[str, ...]] = []
        self.gates: dict[str, asyncio.Event] = {}
        """Before it answers one of these words it waits."""
        self.address = ""

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Scripted]:
        """Listens on a free port until the block ends."""
        async with served(self._connection) as port:
            self.address = f"127.0.0.1:{port}"
            yield self

    def asked(self, word: str) -> int:
        """How often a command came."""
        return sum(command[0] == word for command in self.received)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while head := await reader.readline():
                words = []
                for _ in range(int(head[1:])):
                    length = int((await reader.readline())[1:])
                    words.append((await reader.readexactly(length + 2))[:-2].decode(errors="replace"))
                self.received.append(tuple(words))
                if gate := self.gates.get(words[0]):
                    await gate.wait()
                writer.write(self.replies.get(words[0], b"-ERR unknown command\r\n"))
                await writer.drain()


def bulk(text: str) -> bytes:
    return f"${len(text)}\r\n{text}\r\n".encode()


def an_address(host: str, port: int) -> bytes:
    return b"*2\r\n" + bulk(host) + bulk(str(port))


def a_range(first: int, last: int, host: bytes, port: int, more: bytes = b"*0\r\n") -> bytes:
    return b"*3\r\n:%d\r\n:%d\r\n*4\r\n%b:%d\r\n%b%b" % (first, last, host, port, bulk("id"), more)


@contextlib.asynccontextmanager
async def nodes(*scripted: Scripted) -> AsyncIterator[str]:
    """The addresses of running nodes, joined by commas."""
    async with contextlib.AsyncExitStack() as stack:
        yield ",".join([(await stack.enter_async_context(node.running())).address for node in scripted])


async def test_the_first_sentinel_that_knows_is_believed_and_dead_or_silent_ones_are_passed_over() -> None:
    (dead,) = topologies.free_ports(1)
    silent, knowing = Scripted(HELLO=b""), Scripted(SENTINEL=an_address("10.0.0.9", 7000))
    async with nodes(silent, knowing) as addresses:
        topology = Topology(f"redis+sentinel://u:p%40ss@127.0.0.1:{dead},{addresses}/main/3?protocol=3")
        assert await topology.locate(KEY) == "redis://u:p%40ss@10.0.0.9:7000/3?protocol=3"
    assert knowing.received[-1] == ("SENTINEL", "GET-MASTER-ADDR-BY-NAME", "main")


async def test_sentinels_get_their_own_credentials_and_never_those_of_the_data() -> None:
    sentinel = Scripted(SENTINEL=an_address("10.0.0.9", 7000))
    async with nodes(sentinel) as address:
        parameters = "sentinel_username=seer&sentinel_password=their%20secret&username=u&password=p"
        await Topology(f"redis+sentinel://{address}/main/3?{parameters}").locate(KEY)
    assert sentinel.received[0] == ("HELLO", "3", "AUTH", "seer", "their secret")
    assert sentinel.asked("SELECT") == 0
    assert not any(word in ("u", "p") for command in sentinel.received for word in command)


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (b"_\r\n", "the sentinels have no service main"),
        (b"-ERR unknown command 'SENTINEL'\r\n", "unknown command"),
        (
            b"-NOPERM User x has no permissions to run the 'sentinel|get-master-addr-by-name' command\r\n",
            "it may not run SENTINEL GET-MASTER-ADDR-BY-NAME",
        ),
    ],
)
async def test_why_no_sentinel_knows_is_told(reply: bytes, reason: str) -> None:
    async with nodes(Scripted(SENTINEL=reply), Scripted(SENTINEL=reply)) as addresses:
        with pytest.raises(StoreUnavailableError, match="no sentinel of 2 knows the master") as caught:
            await Topology(f"redis+sentinel://u:s3cret@{addresses}/main").locate(KEY)
    assert reason in caught.value.message
    assert "s3cret" not in caught.value.message


async def test_a_hundred_links_that_lose_their_master_ask_one_question() -> None:
    sentinel = Scripted(SENTINEL=an_address("10.0.0.9", 7000))
    async with nodes(sentinel) as address:
        topology = Topology(f"redis+sentinel://{address}/main")

        async def lost() -> str:
            topology.forget()
            return await topology.locate(KEY)

        assert len(set(await asyncio.gather(*(lost() for _ in range(100))))) == 1
        assert sentinel.asked("SENTINEL") == 1
        sentinel.replies["SENTINEL"] = b"_\r\n"
        topology.forget()
        failures = await asyncio.gather(*(topology.locate(KEY) for _ in range(100)), return_exceptions=True)
        assert all(isinstance(failure, StoreUnavailableError) for failure in failures)
        assert sentinel.asked("SENTINEL") == 2


@pytest.mark.parametrize(
    ("host", "more", "expected"),
    [
        (bulk("10.0.0.9"), b"*0\r\n", "10.0.0.9:7000"),
        (bulk("::9"), b"*0\r\n", "[::9]:7000"),
        (bulk(""), b"*0\r\n", "127.0.0.1:7000"),
        (b"_\r\n", b"*0\r\n", "127.0.0.1:7000"),
        (bulk("?"), b"*2\r\n" + bulk("ip") + bulk("10.0.0.8"), "10.0.0.8:7000"),
        (bulk("?"), b"%1\r\n" + bulk("ip") + bulk("10.0.0.8"), "10.0.0.8:7000"),
    ],
)
async def test_an_address_that_a_node_does_not_tell_is_the_one_it_was_asked_under(
    host: bytes, more: bytes, expected: str
) -> None:
    member = Scripted(CLUSTER=b"*1\r\n" + a_range(0, 16383, host, 7000, more))
    async with nodes(member) as address:
        assert await Topology(f"redis+cluster://u:p@{address}").masters() == [f"redis://u:p@{expected}"]


async def test_a_cluster_is_found_through_nodes_learned_later_when_those_of_the_url_are_gone() -> None:
    late = Scripted()
    async with nodes(late) as late_address:
        port = int(late_address.rpartition(":")[2])
        late.replies["CLUSTER"] = b"*1\r\n" + a_range(0, 16383, bulk("127.0.0.1"), port)
        async with nodes(Scripted(CLUSTER=late.replies["CLUSTER"])) as start:
            topology = Topology(f"redis+cluster://{start}")
            assert await topology.locate(KEY) == f"redis://{late_address}"
        topology.forget()
        assert await topology.locate(KEY) == f"redis://{late_address}"
    assert late.asked("CLUSTER") == 1


async def test_a_slot_without_a_master_and_a_node_without_a_map_are_told() -> None:
    async with nodes(Scripted(CLUSTER=b"*1\r\n" + a_range(0, 0, bulk("h"), 7000))) as address:
        with pytest.raises(StoreUnavailableError, match="no node of the Cluster serves the slot"):
            await Topology(f"redis+cluster://{address}").locate(KEY)
    async with nodes(Scripted(CLUSTER=b"*0\r\n")) as address:
        with pytest.raises(StoreUnavailableError, match="it has no slots yet"):
            await Topology(f"redis+cluster://{address}").locate(KEY)
    async with nodes(Scripted(CLUSTER=b"-ERR This instance has cluster support disabled\r\n")) as address:
        with pytest.raises(StoreUnavailableError, match="cluster support disabled"):
            await Topology(f"redis+cluster://{address}").locate(KEY)


@contextlib.asynccontextmanager
async def a_link(url: str) -> AsyncIterator[tuple[Link, list[str]]]:
    """A running link, and what its owner was told."""
    told: list[str] = []
    link = Link(Topology(url), KEY, 250, lambda: told.append("up"), lambda: told.append("down"), name="default")
    running = asyncio.create_task(link.run())
    try:
        yield link, told
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


def a_master() -> Scripted:
    return Scripted(ROLE=b"*1\r\n" + bulk("master"))


async def test_a_replica_that_passes_for_the_master_is_never_written_to() -> None:
    replica, sentinel = Scripted(ROLE=b"*1\r\n" + bulk("slave")), Scripted()
    async with nodes(replica), nodes(sentinel) as address:
        sentinel.replies["SENTINEL"] = an_address("127.0.0.1", replica.port)
        async with a_link(f"redis+sentinel://{address}/main") as (link, told):

            async def has_asked_twice() -> bool:
                return replica.asked("ROLE") >= 2

            await eventually(has_asked_twice)
            assert (link.is_up, link.failure) == (False, "the master is a replica now: a failover is under way")
    assert told == []
    assert {command[0] for command in replica.received} == {"HELLO", "CLIENT", "PING", "ROLE"}


async def test_a_master_that_is_replaced_while_we_wait_for_its_greeting_is_not_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It hung, came back, and answered as if it were the master still: what it took was lost when it was demoted."""
    monkeypatch.setattr(connection, "_STALE_S", 0.0)
    hung, successor, sentinel = a_master(), a_master(), Scripted()
    hung.gates["PING"] = asyncio.Event()
    async with nodes(hung, successor), nodes(sentinel) as address:
        sentinel.replies["SENTINEL"] = an_address("127.0.0.1", hung.port)
        async with a_link(f"redis+sentinel://{address}/main") as (link, told):

            async def is_greeted() -> bool:
                return hung.asked("PING") == 1

            await eventually(is_greeted)
            sentinel.replies["SENTINEL"] = an_address("127.0.0.1", successor.port)
            hung.gates["PING"].set()

            async def is_up() -> bool:
                return link.is_up

            await eventually(is_up)
            assert (told, successor.asked("PING")) == (["up"], 1)


async def test_an_idle_link_leaves_a_master_that_the_sentinels_have_replaced() -> None:
    """A stopped and resumed master believes for up to ten seconds that it is the master still."""
    first, second, sentinel = a_master(), a_master(), Scripted()
    async with nodes(first, second), nodes(sentinel) as address:
        sentinel.replies["SENTINEL"] = an_address("127.0.0.1", first.port)
        async with a_link(f"redis+sentinel://{address}/main") as (link, told):

            async def is_up() -> bool:
                return link.is_up

            await eventually(is_up)
            sentinel.replies["SENTINEL"] = an_address("127.0.0.1", second.port)

            async def has_moved() -> bool:
                return link.is_up and second.asked("PING") == 1

            await eventually(has_moved)
    assert told == ["up", "down", "up"]


async def test_a_command_sent_while_the_sentinels_are_asked_is_no_silence() -> None:
    """A connection with nothing to wait for was cut when a command went out before the sentinels had answered."""
    master, sentinel = a_master(), Scripted()
    master.replies["GET"] = b"$-1\r\n"
    master.gates["GET"] = asyncio.Event()
    async with nodes(master), nodes(sentinel) as address:
        sentinel.replies["SENTINEL"] = an_address("127.0.0.1", master.port)
        async with a_link(f"redis+sentinel://{address}/main") as (link, told):

            async def is_up() -> bool:
                return link.is_up

            await eventually(is_up)
            asked = sentinel.asked("SENTINEL")
            sentinel.gates["SENTINEL"] = asyncio.Event()

            async def is_asked() -> bool:
                return sentinel.asked("SENTINEL") > asked

            await eventually(is_asked)
            reply = link.send("GET", KEY)
            link.flush()
            sentinel.gates.pop("SENTINEL").set()

            async def has_been_asked_again() -> bool:
                return sentinel.asked("SENTINEL") > asked + 1

            master.gates["GET"].set()
            assert await reply is None
            await eventually(has_been_asked_again)
    assert told == ["up"]


async def test_a_master_that_falls_silent_is_left_before_it_would_be_as_a_single_server() -> None:
    silent, successor, sentinel = a_master(), a_master(), Scripted()
    silent.gates["GET"] = asyncio.Event()
    async with nodes(silent, successor), nodes(sentinel) as address:
        sentinel.replies["SENTINEL"] = an_address("127.0.0.1", silent.port)
        async with a_link(f"redis+sentinel://{address}/main") as (link, _):

            async def is_up() -> bool:
                return link.is_up

            await eventually(is_up)
            unanswered = link.send("GET", KEY)
            link.flush()
            started = asyncio.get_running_loop().time()
            with pytest.raises(StoreUnavailableError):
                await unanswered
            assert 1.4 < asyncio.get_running_loop().time() - started < 4
            sentinel.replies["SENTINEL"] = an_address("127.0.0.1", successor.port)
            await eventually(is_up)
            assert successor.asked("PING") == 1


async def test_moved_is_believed_before_the_other_nodes_know() -> None:
    source, target = a_master(), a_master()
    async with nodes(source) as address, nodes(target):
        source.replies["CLUSTER"] = b"*1\r\n" + a_range(0, 16383, bulk("127.0.0.1"), source.port)
        # An empty host is the one that was asked.
        source.replies["GET"] = b"-MOVED %d :%d\r\n" % (key_slot(KEY.encode()), target.port)
        target.replies["GET"] = bulk("here")
        async with a_link(f"redis+cluster://{address}") as (link, told):

            async def asked() -> Any:
                reply = link.send("GET", KEY)
                link.flush()
                return await reply

            async def is_there() -> bool:
                with contextlib.suppress(StoreUnavailableError):
                    return bool(await asked() == b"here")
                return False

            await eventually(is_there)
            assert link.is_up
        commands = Commands(Topology(f"redis+cluster://{address}"))
        assert await commands.run(KEY, "GET", KEY) == b"here"
        await commands.aclose()
    assert told[-1] == "up"


# -- every topology ----------------------------------------------------------------------------------------------------


def a_configuration(window_s: int) -> Configuration:
    raw = {
        "providers": [{"name": "p", "api_base": "http://127.0.0.1:1", "api_style": "openai", "no_key_required": True}],
        "rules": [
            {
                "request_model": pool,
                "pool": pool,
                "uuid": pool,
                "services": [{"provider": "p", "model": "m", "time_window": window_s}],
            }
            for pool in ("default", "second", "third")
        ],
    }
    return document.read(raw, door="strict").configuration


async def test_a_publication_reaches_pools_on_every_master_and_is_announced_at_once(
    topology_target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "POLL_S", 60.0)  # Only the feed is left.
    await check_server(topology_target.url)
    topology = Topology(topology_target.url)
    commands = Commands(topology)
    register = Registry(commands)
    follower = Follower(commands, register)
    try:
        first = await register.publish(a_configuration(300), None)
        await follower.start()
        with redis.Redis.from_url(topology_target.master_of(keys.HEAD)) as client:

            async def is_heard() -> bool:
                return dict(client.pubsub_numsub(keys.FEED)) == {keys.FEED.encode(): 1}

            await eventually(is_heard)
        await register.publish(a_configuration(60), first)

        async def has_followed() -> bool:
            return follower.directory is not None and follower.directory.revision == 2

        await eventually(has_followed)
        for pool in ("default", "second", "third"):
            key = keys.partitions(pool)
            assert (await commands.run(key, "HGET", key, f"rule:{pool}")).split()[0] == b"2"
    finally:
        await follower.close()
        await commands.aclose()


@pytest.mark.needs("apt:redis-server")
async def test_tls_reaches_the_sentinels_and_every_node_of_a_cluster() -> None:
    with topologies.TlsEverywhere("redis-7") as group:
        for url in (group.sentinel_url, group.cluster_url):
            await check_server(url)
            load = Load(Topology(url), workers=1)
            async with load.running():
                await load.goes_on(20)
            load.check()
            with pytest.raises(StoreUnavailableError, match="TLS: self-signed certificate"):
                await Topology(url.rpartition("ssl_ca_certs")[0]).locate(KEY)
        with pytest.raises(StoreUnavailableError, match=r"NOAUTH.*sentinel_password"):
            await Topology(re.sub("sentinel_[^&]*&", "", group.sentinel_url)).locate(KEY)


# -- failovers and moved slots -----------------------------------------------------------------------------------------


class Load:
    """Workers that select and settle until told to stop, and what came of it."""

    def __init__(self, topology: Topology, workers: int = 2, deadline_ms: int = 250) -> None:
        self.bumps: list[int] = []
        self.lost_batches: list[int] = []
        self.settled = 0
        self.refused: list[str] = []
        self.longest_gap_s = 0.0
        self._numbers = 0
        self._stopping = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        events = PoolEvents(
            epoch_bumped=lambda _, lost: self.bumps.append(lost),
            batches_lost=lambda _, count: self.lost_batches.append(count),
        )
        self.pools = [
            PoolClient(
                topology,
                "default",
                f"w{i}",
                deadline_ms=deadline_ms,
                lease_ms=30_000,
                scripts_dir="",
                events=events,
            )
            for i in range(workers)
        ]

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Load]:
        """Sends from the start to the end of the block."""
        for pool in self.pools:
            pool.start()
            await pool.wait_until_up(5)
        await self.pools[0].raise_fence([a_definition()])
        self._tasks = [asyncio.create_task(self._send(pool)) for pool in self.pools for _ in range(3)]
        try:
            yield self
        finally:
            await self.stop()
            self.view = await self.pools[0].view()
            for pool in self.pools:
                await pool.close()

    async def stop(self) -> None:
        """Returns when nothing is sent any more, and all that was is acknowledged."""
        self._stopping.set()
        await asyncio.gather(*self._tasks)
        for pool in self.pools:
            assert await pool.acknowledged(10)

    async def _send(self, pool: PoolClient) -> None:
        loop = asyncio.get_running_loop()
        last = loop.time()
        while not self._stopping.is_set():
            self._numbers += 1
            number = self._numbers
            try:
                answer = await pool.select(a_selection(number))
            except StoreUnavailableError as exc:
                self.refused.append(exc.message)
                await asyncio.sleep(0.01)
                continue
            if answer[0] == "define":  # A promoted replica may lack even that.
                await pool.raise_fence([a_definition()])
                continue
            self.longest_gap_s = max(self.longest_gap_s, loop.time() - last)
            last = loop.time()
            await asyncio.sleep(0)
            pool.settle(an_entry(number, answer[1]))
            self.settled += 1

    async def goes_on(self, more: int = 300) -> None:
        """Returns once that many more attempts are settled."""
        goal = self.settled + more

        async def is_reached() -> bool:
            return self.settled >= goal

        await eventually(is_reached, 20)

    def check(self) -> None:
        """Each settle counted once, nothing held any more."""
        services = self.view.services.values()
        counts = [sum(getattr(s, name) for s in services) for name in ("requests", "input", "in_flight", "reserved")]
        assert counts == [self.settled, 10 * self.settled, 0, 0]
        assert self.lost_batches == []
        assert self.view.epoch == 1 + len(self.bumps)


@contextlib.contextmanager
def fresh(found: Any) -> Iterator[Any]:
    """The same, emptied and able to fail over; restored afterwards."""
    found.restore()
    for master in found.masters():
        master.control.flushall()
    found.wait_in_sync()
    yield found
    found.restore()


@pytest.fixture(params=["sentinel", "cluster"])
def replicated(request: pytest.FixtureRequest, group: Callable[[str], Any]) -> Iterator[Any]:
    """A set under sentinels, and a Cluster, each able to fail over."""
    with fresh(group(request.param)) as found:
        yield found


@pytest.mark.parametrize("how", ["kill", "stop"])
async def test_a_dead_master_is_left_for_its_replica_and_every_settle_counts_once(replicated: Any, how: str) -> None:
    load = Load(Topology(replicated.url))
    async with load.running():
        await load.goes_on()
        master = replicated.master_of(KEY)
        getattr(master, how)()
        await load.goes_on()
        assert replicated.master_of(KEY) is not master
        if how == "stop":
            master.resume()
            await load.goes_on()
    load.check()
    assert load.refused
    assert load.longest_gap_s < 8


async def test_writes_that_the_promoted_replica_lacks_raise_the_epoch_and_settles_come_again(replicated: Any) -> None:
    load = Load(Topology(replicated.url), workers=1)
    pool = load.pools[0]
    async with load.running():
        await load.goes_on(50)
        await load.stop()
        master = replicated.master_of(KEY)
        await asyncio.to_thread(replicated.wait_in_sync)
        others = replicated.replicas_of(master)
        for server in others:
            server.stop()
        master.control.execute_command("CLIENT", "KILL", "TYPE", "replica")
        for number in range(100_001, 100_011):
            answer = await pool.select(a_selection(number))
            pool.settle(an_entry(number, answer[1]))
            load.settled += 1
        assert await pool.acknowledged(5)
        master.kill()
        for server in others:
            server.resume()
        await pool_is_back(pool)
        answer = await pool.select(a_selection(100_011))
        pool.settle(an_entry(100_011, answer[1]))
        load.settled += 1
    load.check()
    assert load.bumps == [20]


async def test_all_who_ask_before_the_first_answer_has_come_wait_for_it(url: str) -> None:
    """They took an answer that was on its way for one that had come, and met an assertion."""
    topology = Topology(url)
    assert len(set(await asyncio.gather(*(topology.locate(KEY) for _ in range(8))))) == 1


async def pool_is_back(pool: PoolClient) -> None:
    async def is_up() -> bool:
        return pool.is_up

    async def is_down() -> bool:
        return not pool.is_up

    await eventually(is_down)
    await eventually(is_up, 20)


@pytest.fixture
def cluster(group: Callable[[str], Any]) -> Iterator[topologies.Cluster]:
    """An empty Cluster, restored afterwards."""
    with fresh(group("cluster")) as found:
        yield found


@pytest.fixture
def sentinels(group: Callable[[str], Any]) -> Iterator[topologies.SentinelSet]:
    """An empty set under sentinels, restored afterwards."""
    with fresh(group("sentinel")) as found:
        yield found


async def test_a_moved_slot_is_followed_and_no_selection_fails(cluster: topologies.Cluster) -> None:
    load = Load(Topology(cluster.url), deadline_ms=2000)
    async with load.running():
        for _ in range(3):
            await load.goes_on(100)
            source = cluster.master_of(KEY)
            target = next(server for server in cluster.masters() if server is not source)
            await asyncio.to_thread(cluster.move, KEY, source, target)
        await load.goes_on(100)
    load.check()
    assert load.refused == []
    assert load.longest_gap_s < 1
    assert load.bumps == []


async def test_a_planned_failover_fails_no_selection(cluster: topologies.Cluster) -> None:
    load = Load(Topology(cluster.url), deadline_ms=2000)
    async with load.running():
        await load.goes_on(100)
        master = cluster.master_of(KEY)
        cluster.replicas_of(master)[0].control.execute_command("CLUSTER", "FAILOVER")

        async def has_moved() -> bool:
            return cluster.master_of(KEY) is not master

        await eventually(has_moved)
        await load.goes_on(100)
    load.check()
    assert load.refused == []


async def test_while_a_slot_is_half_moved_selections_wait_and_are_made_once(cluster: topologies.Cluster) -> None:
    load = Load(Topology(cluster.url), workers=1, deadline_ms=150)
    pool = load.pools[0]
    async with load.running():
        await load.goes_on(20)
        await load.stop()
        source = cluster.master_of(KEY)
        target = next(server for server in cluster.masters() if server is not source)
        slot = cluster.slot_of(KEY)
        target.control.execute_command("CLUSTER", "SETSLOT", slot, "IMPORTING", cluster.id_of(source))
        source.control.execute_command("CLUSTER", "SETSLOT", slot, "MIGRATING", cluster.id_of(target))
        try:
            with pytest.raises(StoreUnavailableError, match="the slot of this pool is being moved"):
                await pool.select(a_selection(100_001))
            pool.settle(an_entry(100_000, "a:m"))
            load.settled += 1
            waiting = asyncio.create_task(pool.select(a_selection(100_002)))
            await asyncio.sleep(0.05)
        finally:
            source.control.execute_command("CLUSTER", "SETSLOT", slot, "STABLE")
            target.control.execute_command("CLUSTER", "SETSLOT", slot, "STABLE")
        answer = await waiting
        assert answer[0] == "pick"
        pool.settle(an_entry(100_002, answer[1]))
        load.settled += 1
    load.check()
    # What was never executed needs no giving back: nothing was abandoned.
    assert sum(service.abandoned for service in load.view.services.values()) == 0
    assert sum(service.picks for service in load.view.services.values()) == load.settled - 1


async def test_an_abandoned_selection_is_given_back_after_a_failover(replicated: Any) -> None:
    load = Load(Topology(replicated.url), workers=1)
    pool = load.pools[0]
    async with load.running():
        await load.goes_on(20)
        await load.stop()
        master = replicated.master_of(KEY)
        master.stop()
        with pytest.raises(StoreUnavailableError, match="in time"):
            await pool.select(a_selection(100_001))
        await pool_is_back(pool)
        assert await pool.acknowledged(5)
        assert await pool.select(a_selection(100_001)) == ["abandoned"]
        master.resume()
    load.check()


async def test_what_a_replaced_master_acknowledged_after_it_hung_is_settled_again(
    sentinels: topologies.SentinelSet,
) -> None:
    """It believes for seconds that it is the master; a worker that then settled no more had lost its last batch."""
    load = Load(Topology(sentinels.url), workers=1)
    pool = load.pools[0]
    async with load.running():
        await load.goes_on(20)
        await load.stop()
        master = sentinels.master_of(KEY)
        answer = await pool.select(a_selection(100_001))
        master.stop()

        async def is_replaced() -> bool:
            return sentinels.master_of(KEY) is not master

        await eventually(is_replaced)
        master.resume()
        pool.settle(an_entry(100_001, answer[1]))
        load.settled += 1

        async def is_counted() -> bool:
            client = sentinels.master_of(KEY).control
            texts: list[bytes | None] = client.hmget(keys.services("default"), "totals:a:m", "totals:b:m")
            return sum(stored.totals(text.decode())["requests"] for text in texts if text) == load.settled

        await eventually(is_counted)
    load.check()


# -- what is looked at before a start ----------------------------------------------------------------------------------


async def test_an_evicting_policy_is_refused_on_any_master_of_a_cluster(cluster: topologies.Cluster) -> None:
    await check_server(cluster.url)
    for master in cluster.masters():
        master.control.config_set("maxmemory-policy", "allkeys-lru")
        try:
            with pytest.raises(ConfigurationError, match="set maxmemory-policy noeviction"):
                await check_server(cluster.url)
        finally:
            master.control.config_set("maxmemory-policy", "noeviction")
    await check_server(cluster.url)


async def test_a_node_named_as_what_it_is_not_is_told_apart(
    cluster: topologies.Cluster, sentinels: topologies.SentinelSet
) -> None:
    with pytest.raises(ConfigurationError, match=r"redis\+cluster://"):
        await check_server(f"redis://{cluster.data[0].address}")
    with pytest.raises(ConfigurationError, match=r"redis\+sentinel://"):
        await check_server(f"redis://{sentinels.sentinels[0].address}")
    master = sentinels.master_of(KEY)
    replica = next(server for server in sentinels.data if server is not master)
    with pytest.raises(ConfigurationError, match="read-only replica; name its master"):
        await check_server(f"redis://{replica.address}")
    with pytest.raises(StoreUnavailableError, match="unknown command"):
        await check_server(f"redis+sentinel://{master.address}/balancer")


async def test_the_command_that_the_user_may_not_run_is_named() -> None:
    with servers.running("valkey-9") as url:
        with redis.Redis.from_url(url) as client:
            client.execute_command("ACL", "SETUSER", "limited", "on", ">pw", "+@all", "-info")
        with pytest.raises(ConfigurationError, match="it may not run INFO"):
            await check_server(url.replace("unix://", "unix://limited:pw@"))
