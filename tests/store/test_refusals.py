"""What Redis refuses, on real servers: whether it is asked again, and what people are told."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest
import redis.asyncio
from redis.exceptions import ConnectionError as LostConnectionError
from redis.exceptions import ResponseError

from balancer.errors import StoreUnavailableError
from balancer.store import keys
from balancer.store.connection import Commands, Link
from balancer.store.pool import PoolClient, PoolEvents
from balancer.store.refusals import RefusedError, Then, describe, refusal
from balancer.store.topology import Topology
from tests import servers
from tests.store.conftest import eventually
from tests.store.test_pool import a_definition, a_selection, an_entry


def endless_script(control: Any) -> asyncio.Task[Any]:
    """A script that only SCRIPT KILL ends."""

    async def run() -> Any:
        return await control.eval("while true do end", 0)

    return asyncio.create_task(run())


@contextlib.asynccontextmanager
async def a_pool(url: str, deadline_ms: int = 300) -> AsyncIterator[PoolClient]:
    """A pool's client, connected if it can be."""
    pool = PoolClient(
        Topology(url),
        "default",
        "w",
        deadline_ms=deadline_ms,
        lease_ms=30_000,
        scripts_dir="",
        events=PoolEvents(),
    )
    pool.start()
    try:
        yield pool
    finally:
        await pool.close(timeout_s=0.2)


@contextlib.asynccontextmanager
async def a_server(
    *arguments: str, kind: str = "valkey-9", deadline_ms: int = 300
) -> AsyncIterator[tuple[str, PoolClient, Any]]:
    """A server of its own with a rule in its pool: its URL, the pool's client, and a client to disturb it."""
    with servers.running(kind, *arguments) as url:
        async with a_pool(url, deadline_ms) as pool, redis.asyncio.Redis.from_url(url) as control:
            await pool.wait_until_up(5)
            await pool.raise_fence([a_definition()])
            yield url, pool, control


async def picks_again(pool: PoolClient, number: int) -> list[Any]:
    """The first answer to selections that are asked until one is made."""
    answers: list[list[Any]] = []
    numbers = iter(range(number, number + 10_000))

    async def is_picked() -> bool:
        with contextlib.suppress(StoreUnavailableError):
            answers.append(await pool.select(a_selection(next(numbers))))
        return bool(answers)

    await eventually(is_picked)
    return answers[0]


async def test_a_master_that_became_a_replica_is_not_written_to_until_it_is_one_again() -> None:
    async with a_server() as (_, pool, control):
        await control.execute_command("REPLICAOF", "127.0.0.1", "1")
        with pytest.raises(StoreUnavailableError, match="this Redis is a read-only replica"):
            await pool.select(a_selection(1))
        await control.config_set("replica-serve-stale-data", "no")

        async def is_told() -> bool:
            return pool._link.failure == "this Redis is a replica that has lost its master"

        await eventually(is_told)
        await control.execute_command("REPLICAOF", "NO", "ONE")
        assert (await picks_again(pool, 3))[0] == "pick"
        view = await pool.view()
        # None of what was refused is held, or was given back: it had never been made.
        assert sum(service.abandoned for service in view.services.values()) == 0


async def test_while_redis_loads_its_data_it_is_away_and_says_so() -> None:
    slowly = (
        "--enable-debug-command",
        "yes",
        "--key-load-delay",
        "200",
        "--loading-process-events-interval-bytes",
        "1024",
    )
    async with a_server(*slowly) as (_, pool, control):
        for start in range(0, 4000, 500):
            await control.mset({f"k{start + n}": "v" * 100 for n in range(500)})
        loading = asyncio.create_task(control.execute_command("DEBUG", "RELOAD"))
        failures: list[str] = []

        async def is_told() -> bool:
            with contextlib.suppress(StoreUnavailableError):
                await pool.select(a_selection(len(failures) + 1))
            failures.append(pool._link.failure)
            return "Redis is loading its data" in failures

        await eventually(is_told)
        await loading
        assert (await picks_again(pool, 1000))[0] == "pick"


async def test_out_of_memory_is_told_at_once_and_settles_wait_for_space() -> None:
    async with a_server() as (_, pool, control):
        answer = await pool.select(a_selection(1))
        await control.config_set("maxmemory", "1")
        started = asyncio.get_running_loop().time()
        with pytest.raises(StoreUnavailableError, match=r"out of memory \(OOM\): raise maxmemory"):
            await pool.select(a_selection(2))
        assert asyncio.get_running_loop().time() - started < 0.2
        assert pool._link.failure == "Redis is out of memory (OOM): raise maxmemory or add space"
        pool.settle(an_entry(1, answer[1]))
        assert not await pool.acknowledged(0.1)
        await control.config_set("maxmemory", "0")
        assert await pool.acknowledged(5)
        await pool.select(a_selection(3))
        view = await pool.view()
        assert [(s.requests, s.input) for s in view.services.values() if s.requests] == [(1, 10)]
        assert sum(service.abandoned for service in view.services.values()) == 0


async def test_too_few_replicas_is_told_at_once() -> None:
    async with a_server() as (_, pool, control):
        await control.config_set("min-replicas-to-write", "1")
        with pytest.raises(StoreUnavailableError, match="too few replicas are in sync"):
            await pool.select(a_selection(1))
        await control.config_set("min-replicas-to-write", "0")
        assert (await pool.select(a_selection(2)))[0] == "pick"


@pytest.mark.parametrize("kind", ["valkey-9", "redis-8"])
async def test_a_selection_waits_while_a_script_blocks_redis_and_is_made_once(kind: str) -> None:
    async with a_server("--lua-time-limit", "50", kind=kind, deadline_ms=200) as (url, pool, control):
        endless = endless_script(control)
        async with redis.asyncio.Redis.from_url(url) as other:
            numbers = iter(range(1, 1000))
            picks = 0

            async def is_busy() -> bool:
                nonlocal picks
                try:
                    await pool.select(a_selection(next(numbers)))
                except StoreUnavailableError as exc:
                    return exc.message == "a script or function blocks Redis (BUSY)"
                picks += 1
                return False

            await eventually(is_busy)
            waiting = asyncio.create_task(pool.select(a_selection(1000)))
            await asyncio.sleep(0.05)
            await other.script_kill()
            assert (await waiting)[0] == "pick"
        with pytest.raises(ResponseError):
            await endless
        assert await pool.acknowledged(5)
        view = await pool.view()
        assert sum(service.picks - service.abandoned for service in view.services.values()) == picks + 1


ACCOUNT = "ACL SETUSER limited on >s3cret ~* &* +@all"


@pytest.mark.parametrize(
    ("acl", "user", "message"),
    [
        ("", "", "(NOAUTH): the URL needs a user and password"),
        (ACCOUNT, "limited:s3cret2@", "(WRONGPASS): wrong user or password"),
        (f"{ACCOUNT} off", "limited:s3cret@", "(WRONGPASS): wrong user or password, or the user is off"),
        (f"{ACCOUNT} -ping", "limited:s3cret@", "(NOPERM): it may not run PING"),
        (f"{ACCOUNT} -client|setname", "limited:s3cret@", "(NOPERM): it may not run CLIENT SETNAME"),
    ],
)
@pytest.mark.parametrize("protocol", [2, 3])
async def test_a_refused_user_is_told_why_and_what_is_missing(acl: str, user: str, message: str, protocol: int) -> None:
    with servers.running("valkey-9") as url:
        async with redis.asyncio.Redis.from_url(url) as control:
            if acl:
                await control.execute_command(*acl.split())  # type: ignore[no-untyped-call]
            await control.config_set("requirepass", "another")
        async with a_pool(f"{url.replace('://', f'://{user}')}?protocol={protocol}") as pool:

            async def is_told() -> bool:
                return message in pool._link.failure

            await eventually(is_told)
            with pytest.raises(StoreUnavailableError) as caught:
                await pool.select(a_selection(1))
            assert message in caught.value.message
            for word in ("s3cret", "limited", url.removeprefix("unix://")):
                assert word not in caught.value.message


@pytest.mark.parametrize("kind", servers.KINDS[:2])
@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("-eval", "it may not run EVAL"),
        ("-hset", "NOPERM"),
        ("resetkeys ~other:*", "some of the keys are not permitted"),
    ],
)
async def test_a_command_or_key_that_the_user_may_not_use_is_named(kind: str, missing: str, message: str) -> None:
    with servers.running(kind) as url:
        async with redis.asyncio.Redis.from_url(url) as control:
            await control.execute_command(*ACCOUNT.split(), *missing.split())  # type: ignore[no-untyped-call]
        async with a_pool(url.replace("://", "://limited:s3cret@")) as pool:
            await pool.wait_until_up(5)
            with pytest.raises(StoreUnavailableError) as caught:
                await pool.raise_fence([a_definition()])
            assert message in caught.value.message
            assert "limited" not in caught.value.message
            assert "Redis refused the user (NOPERM)" in pool._link.failure


async def test_a_server_without_script_commands_will_do() -> None:
    async with a_server("--rename-command", "SCRIPT", "") as (_, pool, control):
        with pytest.raises(ResponseError, match="unknown command"):
            await control.script_flush()
        answers = [await pool.select(a_selection(number)) for number in (1, 2, 3)]
        pool.settle(an_entry(1, answers[0][1]))
        assert await pool.acknowledged(5)
        assert [answer[0] for answer in answers] == ["pick"] * 3


@pytest.mark.needs("apt:redis-server")
async def test_a_certificate_of_somebody_else_is_told(target: Any) -> None:
    url = target("tls-acl").url.partition("?")[0]
    async with a_pool(url) as pool:

        async def is_told() -> bool:
            return "TLS: self-signed certificate" in pool._link.failure

        await eventually(is_told)
    async with a_pool(f"{url}?ssl_cert_reqs=none") as pool:
        await pool.wait_until_up(5)


async def test_a_server_that_accepts_and_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stopped server's kernel accepts connections for ever; the handshake had no limit."""
    monkeypatch.setattr(Topology, "connect_timeout_s", 0.2)
    with servers.running("valkey-9") as url:
        topology = Topology(url)
        async with redis.asyncio.Redis.from_url(url) as control:
            await control.client_pause(60_000)  # HELLO and PING wait with all the rest.
            link = Link(topology, keys.partitions("default"), 250, lambda: None, lambda: None, name="p")
            running = asyncio.create_task(link.run())

            async def is_given_up() -> bool:
                return link.failure == "Redis does not answer (TimeoutError)"

            await eventually(is_given_up)
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)


async def test_rare_commands_are_asked_again_only_if_they_were_not_executed() -> None:
    with servers.running("valkey-9", "--lua-time-limit", "50") as url:
        commands = Commands(Topology(url))
        async with redis.asyncio.Redis.from_url(url) as control, redis.asyncio.Redis.from_url(url) as other:
            endless = endless_script(control)

            async def is_busy() -> bool:
                try:
                    await other.get("k")
                except ResponseError:
                    return True
                return False

            await eventually(is_busy)
            asked = asyncio.create_task(commands.run("k", "INCR", "k"))
            await asyncio.sleep(0.1)
            await other.script_kill()
            assert await asked == 1
            with pytest.raises(ResponseError):
                await endless
            with pytest.raises(ResponseError, match="wrong number"):
                await commands.run("k", "INCR")
            lost = asyncio.create_task(commands.run("k", "BLPOP", "list", 60))

            async def is_waiting() -> bool:
                return int((await other.info("clients"))["blocked_clients"]) == 1

            await eventually(is_waiting)
            clients = await other.client_list()
            await other.client_kill_filter(_id=next(c["id"] for c in clients if c["cmd"] == "blpop"))
            with pytest.raises(LostConnectionError):
                await asyncio.wait_for(lost, 5)  # Asked again, it would block for a minute.
            assert await commands.run("k", "GET", "k") == b"1"
        await commands.aclose()


@pytest.mark.parametrize(
    ("text", "then"),
    [
        (
            "ERR Error running script (call to f_a): @user_script:22: -READONLY You can't write against a replica.",
            Then.MOVE,
        ),
        ("ERR Error running script (call to f_a): @user_script: 7: -OOM command not allowed.", Then.GIVE_UP),
        ("ERR ACL failure in script: User x has no permissions to run the 'hset' command", Then.UNKNOWN),
        ("BUSY Redis is busy running a script.", Then.AGAIN),
        ("MISCONF Errors writing to the AOF file", Then.GIVE_UP),
        ("ERR unknown command", None),
        ("BALANCER select: malformed argument", None),
    ],
)
def test_the_codes_of_old_and_new_servers_mean_the_same(text: str, then: Then | None) -> None:
    found = refusal(ResponseError(text))
    assert (found and found.then) == then
    assert found is None or "x" not in found.message.split()


def test_a_lost_connection_is_no_refusal_and_its_description_has_no_address() -> None:
    lost = LostConnectionError("Error 111 connecting to 10.0.0.1:6379. Connect call failed ('10.0.0.1', 6379).")
    lost.__cause__ = ConnectionRefusedError(111, "Connect call failed ('10.0.0.1', 6379)")
    assert refusal(lost) is None
    assert describe(lost) == "Redis does not answer (Connection refused)"
    assert describe(RefusedError("as it is", Then.MOVE)) == "as it is"
