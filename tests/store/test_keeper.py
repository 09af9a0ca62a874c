"""Many workers, one grant, and Authlib's authorization server: who asks, how often, and what a fault leaves behind."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
import pytest
import redis.asyncio

from balancer import oauth
from balancer.domain import OAuthDetail, Provider
from balancer.errors import StoreUnavailableError
from balancer.gateway.tokens import TokenEndpoint
from balancer.gateway.upstream import UpstreamClient
from balancer.store import keeper as keeping
from balancer.store.connection import Commands
from balancer.store.credentials import Credentials, Sealer
from balancer.store.grants import Asking, Grant, Grants, Lease
from balancer.store.keeper import Keeper, KeeperEvents, Plan, _Waiting
from balancer.store.topology import Topology
from tests import topologies
from tests.authority import CLIENT_ID, CLIENT_SECRET, Authority, Token
from tests.builders import a_provider
from tests.store.conftest import eventually

KEY = "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="
SOON = "2026-01-01T00:00:00Z"


@pytest.fixture(autouse=True)
def _hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers look often, so that one that should not ask has had every occasion to."""
    monkeypatch.setattr(keeping, "POLL_S", 0.02)
    monkeypatch.setattr(keeping, "_BEREFT_S", 0.06)
    monkeypatch.setattr(keeping, "_CLOSELY_S", 0.01)
    monkeypatch.setattr("balancer.store.grants._REPLICA_MS", 0)


@pytest.fixture
async def authority() -> AsyncIterator[Authority]:
    async with Authority().running() as server:
        yield server


def an_account(authority: Authority, token: Token | None = None, *, expires_at: str = SOON, **fields: Any) -> Provider:
    """A provider whose tokens the authority gives; its access token ends soon."""
    extra = {"token_url": authority.url, "client_id": CLIENT_ID} | fields
    detail = OAuthDetail(
        access_token=token.access if token else "",
        refresh_token=token.refresh if token else "",
        expires_at=expires_at,
        provider_type="generic",
        extra_fields=extra,
    )
    return a_provider("acct", auth_type="oauth", oauth_detail=detail, token="")


class Worker:
    """A worker's keeper, its own connections included."""

    def __init__(self, url: str, provider: Provider, revision: int = 1) -> None:
        self.plan = Plan(revision=revision, providers=(provider,))
        self.outcomes: list[str] = []
        self.changes = 0
        self.commands = Commands(Topology(url))
        self.upstream = UpstreamClient(4)
        self.grants = Grants(self.commands)
        sealer = Sealer(KEY)
        self.credentials = Credentials(sealer)
        self.keeper = Keeper(
            self.grants,
            self.credentials,
            sealer,
            lambda: self.plan,
            TokenEndpoint(self.credentials, self.upstream),
            KeeperEvents(changed=self._changed, refreshed=lambda _, outcome: self.outcomes.append(outcome)),
        )

    def _changed(self, _: str) -> None:
        self.changes += 1

    @property
    def provider(self) -> Provider:
        return self.plan.providers[0]

    def takes_over(self, provider: Provider, revision: int = 2) -> None:
        """The configuration changes."""
        self.plan = Plan(revision=revision, providers=(provider,))

    @property
    def token(self) -> str:
        return self.keeper.access_token(self.provider) or self.credentials.access_token(self.provider)

    async def close(self) -> None:
        await self.keeper.close(1)
        await self.upstream.close()
        await self.commands.aclose()

    def die(self) -> None:
        """As kill -9 does: nothing of what it was about to do is done."""
        tasks = [self.keeper._running, *(waiting.task for waiting in self.keeper._refreshing.values())]
        for task in filter(None, tasks):
            task.cancel()


Start = Callable[..., Worker]


@pytest.fixture
async def start(url: str) -> AsyncIterator[Start]:
    """Starts workers; all are closed in the end."""
    async with contextlib.AsyncExitStack() as stack:

        def begin(provider: Provider, revision: int = 1) -> Worker:
            worker = Worker(url, provider, revision)
            stack.push_async_callback(worker.close)
            worker.keeper.start()
            return worker

        yield begin


async def use(workers: list[Worker], authority: Authority, number: int) -> Token:
    """The token that was issued so many after the first, once all workers use it."""

    async def is_so() -> bool:
        return len(authority.issued) > number and all(w.token == authority.issued[number].access for w in workers)

    await eventually(is_so)
    return authority.issued[number]


def outcomes(workers: list[Worker]) -> Counter[str]:
    return Counter(outcome for worker in workers for outcome in worker.outcomes)


async def are(workers: list[Worker], **counts: int) -> None:
    """Returns once exactly that has come of all refreshes."""

    async def is_so() -> bool:
        return outcomes(workers) == counts

    await eventually(is_so)


async def is_quiet(workers: list[Worker]) -> None:
    """Returns once every worker has looked a few times, and would have asked."""
    seen = [worker.keeper.now_ms() for worker in workers]

    async def have_looked() -> bool:
        return all(worker.keeper._clock[0] > ms + 200 for worker, ms in zip(workers, seen, strict=True))

    await eventually(have_looked)


# -- the usual ---------------------------------------------------------------------------------------------------------


async def test_of_eight_workers_one_asks_and_all_use_what_it_gets(start: Start, authority: Authority) -> None:
    first = authority.logs_in()
    workers = [start(an_account(authority, first)) for _ in range(8)]
    await use(workers, authority, 1)
    assert authority.used == [first.refresh]
    assert outcomes(workers) == {"success": 1}
    (left_s,) = {round(worker.keeper.left_s()["acct"], -2) for worker in workers}
    assert left_s == 3600


async def test_each_expiry_is_one_refresh_and_no_refresh_token_comes_twice(start: Start, authority: Authority) -> None:
    authority.lives_s = 1
    first = authority.logs_in()
    workers = [start(an_account(authority, first)) for _ in range(8)]

    async def has_gone_round() -> bool:
        return len(authority.used) >= 4

    await eventually(has_gone_round)
    authority.lives_s = 3600

    async def lives_long() -> bool:
        return all(worker.keeper.left_s()["acct"] > 2 for worker in workers)

    await eventually(lives_long)
    assert authority.reused == []
    assert authority.used == [token.refresh for token in authority.issued[:-1]]
    assert outcomes(workers) == {"success": len(authority.used)}


async def test_a_token_that_is_good_for_long_is_left_alone(start: Start, authority: Authority) -> None:
    first = authority.logs_in()
    worker = start(an_account(authority, first, expires_at="2099-01-01T00:00:00Z"))
    await is_quiet([worker])
    assert authority.forms == []
    assert worker.token == first.access


async def test_a_worker_whose_clock_is_wrong_asks_neither_early_nor_late(
    start: Start, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.time", lambda: 0.0)
    first = authority.logs_in()
    worker = start(an_account(authority, first))
    await use([worker], authority, 1)
    await is_quiet([worker])
    assert len(authority.used) == 1
    assert worker.keeper.left_s()["acct"] == pytest.approx(3600, abs=30)


async def test_a_slow_answer_is_waited_for_by_all(start: Start, authority: Authority) -> None:
    authority.delay_s = 0.5
    first = authority.logs_in()
    workers = [start(an_account(authority, first)) for _ in range(8)]
    await use(workers, authority, 1)
    assert len(authority.used) == 1


@pytest.mark.parametrize("auth", ["basic", "post"])
async def test_a_client_gets_its_tokens_without_a_user(start: Start, authority: Authority, auth: str) -> None:
    account = an_account(
        authority, grant="client_credentials", client_secret=CLIENT_SECRET, client_auth=auth, scopes=["a", "b"]
    )
    workers = [start(account) for _ in range(4)]
    await use(workers, authority, 0)
    assert [form["grant_type"] for form in authority.forms] == ["client_credentials"]
    assert authority.newest.scope == "a b"
    assert ("client_secret" in authority.forms[0]) is (auth == "post")


async def test_a_refresh_token_that_does_not_rotate_is_used_again(start: Start, authority: Authority) -> None:
    authority.rotates, authority.lives_s = False, 1
    first = authority.logs_in()
    worker = start(an_account(authority, first, rotates=False))
    await are([worker], success=2)
    assert set(authority.used) == {first.refresh}


async def test_a_token_without_an_end_is_kept_until_it_is_refused(start: Start, authority: Authority) -> None:
    authority.tells_life = False
    worker = start(an_account(authority, authority.logs_in()))
    token = await use([worker], authority, 1)
    await is_quiet([worker])
    assert worker.keeper.left_s() == {}
    assert len(authority.used) == 1
    assert token.access == worker.token


# -- faults ------------------------------------------------------------------------------------------------------------


async def is_in_doubt(workers: list[Worker], first: Token, caplog: pytest.LogCaptureFixture) -> None:
    """Nobody asks any more, all go on with what they have, and people are told, once, what to do."""
    await are(workers, in_doubt=1)

    async def do_all_say_so() -> bool:
        return all("in doubt" in w.keeper.faults().get("acct", "") for w in workers)

    await eventually(do_all_say_so)
    await is_quiet(workers)
    assert {worker.token for worker in workers} == {first.access}
    told = [str(record.__dict__["facts"]) for record in caplog.records if "not renewed" in record.message]
    assert len(told) == 1
    assert "nobody knows whether the refresh token was used" in told[0]
    assert "balancer apply" in told[0]


@pytest.mark.parametrize("how", ["breaks_before", "breaks_after"])
async def test_a_refresh_token_whose_use_is_not_known_is_never_used_again(
    start: Start, authority: Authority, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    first = authority.logs_in()
    getattr(authority, how)()
    workers = [start(an_account(authority, first)) for _ in range(4)]
    await is_in_doubt(workers, first, caplog)
    assert authority.used == ([] if how == "breaks_before" else [first.refresh])


async def test_a_worker_that_dies_between_the_request_and_the_write_leaves_a_doubt(
    start: Start, authority: Authority, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeping, "_LEASE_MS", 400)
    first = authority.logs_in()
    authority.hangs()
    workers = [start(an_account(authority, first)) for _ in range(4)]
    await authority.arrived.wait()
    (asking,) = [worker for worker in workers if worker.keeper._refreshing and worker.upstream._connections]
    asking.die()
    workers.remove(asking)
    await is_in_doubt(workers, first, caplog)
    assert authority.used == [first.refresh]


async def test_a_new_login_heals_a_doubt_and_the_old_configuration_does_not_come_back(
    start: Start, authority: Authority
) -> None:
    first = authority.logs_in()
    authority.breaks_after()
    workers = [start(an_account(authority, first)) for _ in range(4)]
    await are(workers, in_doubt=1)
    second = authority.logs_in()
    for worker in workers[:2]:  # The others have not heard of it yet.
        worker.takes_over(an_account(authority, second))
    await use(workers, authority, len(authority.issued))
    for worker in workers:
        worker.takes_over(an_account(authority, first), revision=3)  # A rollback.
    await is_quiet(workers)
    assert {worker.token for worker in workers} == {authority.newest.access}
    assert authority.used == [first.refresh, second.refresh]
    assert [worker.keeper.faults() for worker in workers] == [{}] * 4


async def test_a_refused_refresh_token_is_lost_and_said_to_be(start: Start, authority: Authority) -> None:
    first = authority.logs_in()
    authority.revoked.add(first.family)
    workers = [start(an_account(authority, first)) for _ in range(4)]
    await are(workers, lost=1)
    await is_quiet(workers)
    assert authority.used == [first.refresh]
    assert "lost: the token endpoint answered with status 400, invalid_grant" in workers[0].keeper.faults()["acct"]


@pytest.mark.parametrize("status", [429, 503, 400, 403])
async def test_an_answer_that_says_that_nothing_was_done_is_followed_by_another_try(
    start: Start, authority: Authority, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(oauth, "_FIRST_PAUSE_MS", 50)
    first = authority.logs_in()
    authority.answers(status, b'{"error": "invalid_client"}')
    workers = [start(an_account(authority, first)) for _ in range(4)]
    await use(workers, authority, 1)
    assert outcomes(workers) == {"failed": 1, "success": 1}


async def test_an_endpoint_that_cannot_be_reached_was_sent_nothing(start: Start, authority: Authority) -> None:
    port = topologies.free_ports(1)[0]
    worker = start(an_account(authority, authority.logs_in(), token_url=f"http://127.0.0.1:{port}/token"))
    await are([worker], failed=1)
    assert worker.keeper.faults() == {}


async def test_the_first_failure_of_a_client_without_a_user_loses_nothing(start: Start, authority: Authority) -> None:
    authority.breaks_after()
    worker = start(an_account(authority, grant="client_credentials", client_secret=CLIENT_SECRET))
    await are([worker], failed=1)


async def test_one_login_under_two_names_is_used_by_one_of_them(
    start: Start, authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    account = an_account(authority, authority.logs_in())
    twin = msgspec.structs.replace(account, uuid="twin", name="twin")
    worker = start(account)
    worker.plan = Plan(revision=1, providers=(account, twin))
    await use([worker], authority, 1)
    await is_quiet([worker])
    assert len(authority.used) == 1
    assert not await worker.keeper.renew(twin, authority.issued[0].access)
    told = [str(record.__dict__["facts"]) for record in caplog.records if "looked after" in record.message]
    assert ["that of acct too" in text for text in told] == [True]


async def test_of_a_token_without_a_successor_it_is_told_how_long_it_lives(start: Start, authority: Authority) -> None:
    first = authority.logs_in()
    authority.revoked.add(first.family)
    worker = start(an_account(authority, first))
    await are([worker], lost=1)
    assert worker.keeper.left_s()["acct"] < 0


# -- what an upstream refuses ------------------------------------------------------------------------------------------


async def test_a_refused_token_is_replaced_once_for_all_who_were_refused(start: Start, authority: Authority) -> None:
    first = authority.logs_in()
    workers = [start(an_account(authority, first, expires_at="2099-01-01T00:00:00Z")) for _ in range(8)]
    await is_quiet(workers)
    authority.delay_s = 0.2
    renewed = await asyncio.gather(*(w.keeper.renew(w.provider, first.access) for w in workers for _ in range(5)))
    assert set(renewed) == {True}
    assert authority.used == [first.refresh]
    assert {worker.token for worker in workers} == {authority.newest.access}


async def test_who_comes_when_a_refresh_has_just_ended_asks_for_the_next(start: Start, authority: Authority) -> None:
    """A task is done a turn of the loop before it is forgotten: who awaited it then had the loop to itself for ever."""
    first = authority.logs_in()
    worker = start(an_account(authority, first, expires_at="2099-01-01T00:00:00Z"))
    uuid, keeper = worker.provider.uuid, worker.keeper

    async def is_known() -> bool:
        return uuid in keeper._held and not keeper._refreshing

    await eventually(is_known)
    over = asyncio.create_task(asyncio.sleep(0))
    await over
    keeper._refreshing[uuid] = _Waiting(task=over, is_forced=False)
    assert await keeper.renew(worker.provider, first.access)
    assert authority.used == [first.refresh]


async def test_a_new_token_that_is_refused_too_is_not_replaced_again(start: Start, authority: Authority) -> None:
    worker = start(an_account(authority, authority.logs_in()))
    second = await use([worker], authority, 1)
    assert not await worker.keeper.renew(worker.provider, second.access)
    assert len(authority.used) == 1


async def test_nothing_is_to_be_had_of_a_lost_grant(start: Start, authority: Authority) -> None:
    first = authority.logs_in()
    authority.revoked.add(first.family)
    worker = start(an_account(authority, first))
    await are([worker], lost=1)
    assert not await worker.keeper.renew(worker.provider, first.access)


# -- the store ---------------------------------------------------------------------------------------------------------


async def test_a_store_that_was_emptied_gets_its_tokens_back(start: Start, authority: Authority, url: str) -> None:
    first = authority.logs_in()
    workers = [start(an_account(authority, first)) for _ in range(4)]
    second = await use(workers, authority, 1)
    async with redis.asyncio.Redis.from_url(url) as client:
        await client.flushall()
    late = start(workers[0].provider)
    await use([*workers, late], authority, 1)
    assert len(authority.used) == 1
    assert authority.newest is second


async def test_new_tokens_are_written_however_long_the_store_is_away(
    start: Start, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = authority.logs_in()
    worker = start(an_account(authority, first))
    keep, tries = worker.grants.keep, 0

    async def fails(provider: str, grant: Grant) -> bool:
        nonlocal tries
        tries += 1
        if tries < 3:
            raise StoreUnavailableError("Redis is away")
        return await keep(provider, grant)

    monkeypatch.setattr(worker.grants, "keep", fails)
    other = start(worker.provider)
    await use([worker, other], authority, 1)
    assert len(authority.used) == 1


async def test_a_store_that_goes_away_between_the_lease_and_the_request_costs_no_doubt(
    start: Start, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = start(an_account(authority, authority.logs_in()))
    load, lease, losses = worker.grants.load, worker.grants.lease, 3
    is_leased = False

    async def leased(asking: Asking) -> Lease:
        nonlocal is_leased
        found = await lease(asking)
        is_leased = True
        return found

    async def lost(provider: str) -> Grant | None:
        nonlocal losses
        if is_leased and losses:
            losses -= 1
            raise StoreUnavailableError("Redis is away")
        return await load(provider)

    monkeypatch.setattr(worker.grants, "lease", leased)
    monkeypatch.setattr(worker.grants, "load", lost)
    await use([worker], authority, 1)
    assert losses == 0
    assert outcomes([worker]) == {"success": 1}


async def test_who_has_waited_in_vain_for_a_token_lets_others_try_elsewhere(
    start: Start, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeping, "PATIENCE_S", 0.2)
    first = authority.logs_in()
    worker = start(an_account(authority, first, expires_at="2099-01-01T00:00:00Z"))
    await is_quiet([worker])
    authority.hangs()
    assert not await worker.keeper.renew(worker.provider, first.access)
    async with asyncio.timeout(0.1):
        assert not await worker.keeper.renew(worker.provider, first.access)


async def test_what_redis_keeps_is_sealed_and_ends(start: Start, authority: Authority, url: str) -> None:
    worker = start(an_account(authority, authority.logs_in()))
    await use([worker], authority, 1)
    async with redis.asyncio.Redis.from_url(url) as client:
        kept = {key: await client.hgetall(key) for key in await client.keys("*")}
        assert {await client.pttl(key) > 0 for key in kept} == {True}
    text = repr(kept)
    assert "sealed:v2:" in text
    for token in authority.issued:
        assert token.access not in text
        assert token.refresh not in text


async def test_a_worker_without_a_key_leaves_tokens_as_they_are(
    start: Start, authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    worker = start(an_account(authority, authority.logs_in()))
    worker.keeper._sealer = None
    await eventually(lambda: asyncio.sleep(0, "no BALANCER_SECRET_KEY" in caplog.text))
    assert authority.used == []
