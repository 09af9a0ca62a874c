"""The lease on a refresh, and what is written behind it, on every topology: tri-state, fenced, and never used twice."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from balancer.errors import StoreUnavailableError
from balancer.store import keys
from balancer.store.connection import Commands
from balancer.store.grants import Asking, Grant, Grants, Lease
from balancer.store.topology import Topology
from tests import topologies

SEED, OTHER_SEED = "r" + "a" * 24, "r" + "b" * 24
ACCOUNT = "acct"


@pytest.fixture(autouse=True)
def _hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server without replicas looks ten times a second only whether it has waited for one long enough."""
    monkeypatch.setattr("balancer.store.grants._REPLICA_MS", 0)


@pytest.fixture
async def grants(url: str) -> AsyncIterator[Grants]:
    commands = Commands(Topology(url))
    yield Grants(commands)
    await commands.aclose()


def asking(holder: str = "one", **more: Any) -> Asking:
    values: dict[str, Any] = {"lease_ms": 60_000, "seed": SEED, "revision": 1, "due_ms": 0, "rotates": True}
    return Asking(provider=ACCOUNT, holder=holder, **(values | more))


async def acquired(grants: Grants, holder: str = "one", **more: Any) -> Lease:
    lease = await grants.lease(asking(holder, **more))
    assert lease.word == "acquired"
    return lease


def tokens(lease: Lease, name: str = "a") -> Grant:
    return Grant(
        seeds=SEED,
        revision=1,
        version=lease.version + 1,
        fence=lease.number,
        access=f"sealed-{name}",
        refresh=f"sealed-refresh-{name}",
        ends_ms=lease.now_ms + 3_600_000,
        due_ms=lease.now_ms + 3_300_000,
        renewed_ms=lease.now_ms,
    )


async def test_of_many_who_ask_at_once_one_acquires_and_the_others_see_it_held(grants: Grants) -> None:
    leases = await asyncio.gather(*(grants.lease(asking(f"worker-{i}")) for i in range(12)))
    assert sorted(lease.word for lease in leases) == ["acquired", *["held"] * 11]
    assert all(0 < lease.number <= 60_000 for lease in leases if lease.word == "held")


async def test_a_store_that_is_away_is_neither() -> None:
    commands = Commands(Topology(f"redis://127.0.0.1:{topologies.free_ports(1)[0]}"))
    with pytest.raises(StoreUnavailableError):
        await Grants(commands).lease(asking())
    await commands.aclose()


async def test_what_was_asked_for_is_kept_and_told_to_all(grants: Grants) -> None:
    lease = await acquired(grants)
    _, before = await grants.look()
    assert await grants.keep(ACCOUNT, tokens(lease))
    assert await grants.keep(ACCOUNT, tokens(lease)), "a reply that was lost is asked for again"
    now_ms, after = await grants.look()
    assert after[ACCOUNT] == before[ACCOUNT] + 1
    assert abs(now_ms - lease.now_ms) < 60_000
    kept = await grants.load(ACCOUNT)
    assert kept == tokens(lease)
    fresh = await grants.lease(asking("two"))
    assert fresh.word == "fresh"
    assert 3_200_000 < fresh.number <= 3_300_000


async def test_a_write_that_waits_for_a_replica_is_answered_like_any_other(
    grants: Grants, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("balancer.store.grants._REPLICA_MS", 50)
    lease = await acquired(grants)
    assert await grants.keep(ACCOUNT, tokens(lease))
    assert await grants.load(ACCOUNT) == tokens(lease)


async def test_a_lost_reply_is_no_lost_lease(grants: Grants) -> None:
    lease = await acquired(grants, "one")
    assert (await acquired(grants, "one")).number == lease.number


async def test_a_lease_that_ran_out_leaves_a_doubt_once_and_its_own_answer_ends_it(grants: Grants) -> None:
    lease = await acquired(grants, lease_ms=1)
    await asyncio.sleep(0.01)
    words = [(await grants.lease(asking(holder))).word for holder in ("two", "three")]
    assert words == ["left", "in_doubt"]
    assert await grants.keep(ACCOUNT, tokens(lease)), "it was only slow"
    kept = await grants.load(ACCOUNT)
    assert kept is not None
    assert kept.state == "ready"


async def test_who_was_slow_is_fenced_where_another_could_ask(grants: Grants) -> None:
    slow = await acquired(grants, lease_ms=1, rotates=False)
    await asyncio.sleep(0.01)
    quick = await acquired(grants, "two", rotates=False)
    assert quick.number == slow.number + 1
    assert await grants.keep(ACCOUNT, tokens(quick, "quick"))
    assert not await grants.keep(ACCOUNT, tokens(slow, "slow"))
    assert not await grants.release(ACCOUNT, slow.number, "lost", 0, "late")
    kept = await grants.load(ACCOUNT)
    assert kept is not None
    assert kept.access == "sealed-quick"


async def test_after_a_failure_nobody_asks_before_the_pause_is_over(grants: Grants) -> None:
    lease = await acquired(grants)
    assert await grants.release(ACCOUNT, lease.number, "ready", 60_000, "status 503")
    later = await grants.lease(asking("two"))
    assert (later.word, later.number > 50_000) == ("later", True)


async def test_what_is_lost_stays_so_until_another_login(grants: Grants) -> None:
    lease = await acquired(grants)
    assert await grants.release(ACCOUNT, lease.number, "lost", 0, "invalid_grant")
    assert (await grants.lease(asking("two"))).word == "lost"
    healed = await acquired(grants, "two", seed=OTHER_SEED, revision=2)
    assert healed.refresh == ""
    assert await grants.keep(ACCOUNT, tokens(healed, "b"))
    assert (await grants.lease(asking("three", revision=3))).word == "fresh", "the old login does not come back"


async def test_a_login_that_not_all_have_heard_of_is_used_by_those_who_have(grants: Grants) -> None:
    await acquired(grants)
    assert (await grants.lease(asking("two", seed=OTHER_SEED, due_ms=-1))).word == "fresh"
    kept = await grants.load(ACCOUNT)
    assert kept is not None
    assert (await grants.lease(asking("one", refused_version=kept.version))).word == "held"
    assert (await acquired(grants, "two", seed=OTHER_SEED, refused_version=kept.version)).refresh == ""


async def test_a_refused_token_is_replaced_if_it_is_the_last_and_not_new(grants: Grants) -> None:
    lease = await acquired(grants)
    assert await grants.keep(ACCOUNT, tokens(lease))
    last = lease.version + 1
    assert (await grants.lease(asking(refused_version=lease.version))).word == "newer"
    assert (await grants.lease(asking(refused_version=last, least_ms=60_000))).word == "fresh"
    assert (await acquired(grants, refused_version=last)).refresh == "sealed-refresh-a"


async def test_what_the_store_lost_is_put_back_but_never_over_what_is_newer(grants: Grants, url: str) -> None:
    lease = await acquired(grants)
    old = tokens(lease, "old")
    assert await grants.keep(ACCOUNT, old)
    new = msgspec.structs.replace(old, version=old.version + 1, access="sealed-new")
    assert await grants.restore(ACCOUNT, new)
    assert not await grants.restore(ACCOUNT, old)
    kept = await grants.load(ACCOUNT)
    assert kept is not None
    assert (kept.access, kept.fence, kept.state) == ("sealed-new", lease.number + 1, "ready")


async def test_an_intent_that_the_store_lost_is_put_back_before_another_has_it(grants: Grants, url: str) -> None:
    before = await acquired(grants)
    assert await grants.keep(ACCOUNT, tokens(before))
    lost = await grants.load(ACCOUNT)
    asking_again = await acquired(grants, refused_version=before.version + 1)
    known = await grants.load(ACCOUNT)
    assert lost is not None
    assert known is not None
    key = keys.grant(ACCOUNT)
    await grants._commands.run(key, "HSET", key, "fence", lost.fence, "state", "ready", "lease_until_ms", 0)

    assert await grants.restore(ACCOUNT, known)

    assert (await grants.lease(asking("two", refused_version=known.version))).word == "held"
    assert await grants.keep(ACCOUNT, tokens(asking_again, "b"))


async def test_a_client_without_a_user_follows_the_newest_configuration(grants: Grants) -> None:
    first, second = "c" + "a" * 24, "c" + "b" * 24
    await acquired(grants, seed=first, rotates=False)
    assert (await grants.lease(asking("two", seed=second, revision=2, rotates=False))).word == "acquired"
    assert (await grants.lease(asking("one", seed=first, rotates=False))).word == "held"
    assert (await grants.lease(asking("one", seed=first, revision=3, rotates=False))).word == "acquired"


async def test_tokens_are_resealed_unless_there_are_others(grants: Grants) -> None:
    lease = await acquired(grants)
    assert await grants.keep(ACCOUNT, tokens(lease))
    old = tokens(lease)
    assert await grants.reseal(ACCOUNT, old, "anew", "anew-too")
    assert not await grants.reseal(ACCOUNT, old, "late", "late")
    kept = await grants.load(ACCOUNT)
    assert kept is not None
    assert (kept.access, kept.refresh) == ("anew", "anew-too")
