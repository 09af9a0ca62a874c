"""Two pods of four workers on one login: refreshed once for all, and never twice with one token, whatever dies."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import re
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import redis
import yaml

from balancer.store import keys
from tests.authority import CLIENT_ID, Authority, Token
from tests.fleet.conftest import Asker, Fleet, Start, run_command
from tests.store.conftest import eventually

PODS, WORKERS = 2, 4
KEY = {"BALANCER_SECRET_KEY": base64.b64encode(bytes(range(32))).decode()}
FAR, SOON = "2099-01-01T00:00:00Z", "2026-01-01T00:00:00Z"


def a_document(authority: Authority, token: Token, expires_at: str = SOON) -> dict[str, Any]:
    detail = {
        "access_token": token.access,
        "refresh_token": token.refresh,
        "expires_at": expires_at,
        "extra_fields": {"token_url": authority.url, "client_id": CLIENT_ID},
    }
    return {
        "providers": [{"name": "acct", "api_base": authority.api, "auth_type": "oauth", "oauth_detail": detail}],
        "rules": [{"uuid": "chat", "request_model": "chat", "services": [{"provider": "acct", "model": "m"}]}],
    }


async def each_uses(askers: list[Asker], authority: Authority, token: Token) -> None:
    """Returns once a request through every worker carries that token."""

    async def is_so() -> bool:
        before = len(authority.asked)
        whole = [await asker.is_whole("chat") for asker in askers]
        return all(whole) and set(authority.asked[before:]) == {token.access}

    await eventually(is_so)


async def test_a_fleet_refreshes_once_for_all_and_outlives_the_worker_that_was_asking(
    start: Start, store_url: str, environment: dict[str, str], tmp_path: Path
) -> None:
    async with Authority().running() as authority, contextlib.AsyncExitStack() as stack:
        authority.lives_s = 3
        first = authority.logs_in()
        document = a_document(authority, first)
        pods = await asyncio.gather(
            *(
                start("--redis", store_url, document=document, workers=WORKERS, variables=KEY, port=0)
                for _ in range(PODS)
            )
        )
        askers = [some[0] for pod in pods for some in (await stack.enter_async_context(pod.askers())).values()]
        assert len(askers) == PODS * WORKERS

        async def has_gone_round() -> bool:
            await asyncio.gather(*(asker.is_whole("chat") for asker in askers))
            return len(authority.used) >= 3

        await eventually(has_gone_round)
        assert authority.used == [token.refresh for token in authority.issued[: len(authority.used)]]

        # A refused token: eight workers are refused at once, and one asks.
        authority.lives_s = 3600
        lasting = await lives_long(authority)
        await each_uses(askers, authority, lasting)
        with redis.Redis.from_url(store_url) as client:  # As if it were old enough.
            client.hset(keys.grant("acct"), "renewed_ms", 1)
        authority.revoke(lasting.access)
        assert all(await asyncio.gather(*(asker.is_whole("chat") for asker in askers)))
        assert authority.used[-1] == lasting.refresh
        assert authority.newest.family == first.family

        # The worker that asks dies with its request on the way, and all others with it.
        count = len(authority.used)
        authority.hangs()
        authority.revoke(authority.newest.access)
        with redis.Redis.from_url(store_url) as client:
            client.hset(keys.grant("acct"), "due_ms", 1)
            client.hincrby(keys.GRANTS, "acct", 1)

        async def is_asking() -> bool:
            return len(authority.used) > count

        await eventually(is_asking)
        await kill_all(pods)
        for pod in pods:
            await pod.workers()
        assert len(authority.used) == count + 1
        assert authority.reused == []

        # A new login heals it, for all that live by now.
        second = authority.logs_in()
        file = tmp_path / "healed.yaml"
        file.write_text(yaml.safe_dump(a_document(authority, second, FAR)), encoding="utf-8")
        status, _, err = await run_command("apply", "--redis", store_url, str(file), environment=environment | KEY)
        assert (status, err) == (0, "")
        healed = [some[0] for pod in pods for some in (await stack.enter_async_context(pod.askers())).values()]
        await each_uses(healed, authority, second)
        assert authority.reused == []

        told = "".join(pod.text() for pod in pods)
        assert not re.search(r"(?:access|refresh)-\d+-", told)


async def lives_long(authority: Authority) -> Token:
    """The token that lives for an hour, once there is one."""

    async def is_so() -> bool:
        return authority.newest.get_expires_in() > 60

    await eventually(is_so)
    return authority.newest


async def kill_all(pods: Sequence[Fleet]) -> None:
    for pod in pods:
        for pid in await pod.workers():
            os.kill(pid, signal.SIGKILL)
