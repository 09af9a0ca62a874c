"""Requests through a gateway whose account is OAuth's: Authlib gives the tokens, and the API behind it checks them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
import redis

from balancer.domain import Outcome
from balancer.store import keeper as keeping
from balancer.store import keys
from tests.authority import CLIENT_ID, CLIENT_SECRET, Authority, Token
from tests.gateway.conftest import Serve, Served, a_document
from tests.store.conftest import eventually

OUT = ("success", "failed", "lost", "in_doubt")
FAR = "2099-01-01T00:00:00Z"


@pytest.fixture
async def authority() -> AsyncIterator[Authority]:
    async with Authority().running() as server:
        yield server


@pytest.fixture(autouse=True)
def _hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeping, "_BEREFT_S", 0.05)
    monkeypatch.setattr(keeping, "POLL_S", 0.02)
    monkeypatch.setattr("balancer.store.grants._REPLICA_MS", 0)


def an_oauth_document(authority: Authority, token: Token | None, **detail: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {"token_url": authority.url, "client_id": CLIENT_ID} | detail.pop("extra_fields", {})
    held = {"access_token": token.access, "refresh_token": token.refresh, "expires_at": FAR} if token else {}
    oauth = {"provider_type": "generic", "extra_fields": fields} | held | detail
    document = a_document(authority.api)
    document["providers"][0] |= {"token": "", "auth_type": "oauth", "oauth_detail": oauth}
    return document


async def is_followed(gateway: Served) -> None:
    """Returns once the worker knows the grants."""

    async def is_so() -> bool:
        return len(gateway.gateway._keeper._held) == 1

    await eventually(is_so)


async def test_a_refused_token_is_replaced_and_the_request_sent_again_and_counted_once(
    serve: Serve, authority: Authority
) -> None:
    first = authority.logs_in()
    gateway = await serve(an_oauth_document(authority, first))
    await is_followed(gateway)
    authority.revoke(first.access)
    async with gateway.chat() as response:
        assert response.status == 200
        assert response.headers["x-balancer-attempts"] == "1"
    assert authority.asked == [first.access, authority.newest.access]
    assert authority.used == [first.refresh]
    state = await gateway.service("up:up-model")
    assert (state.picks, state.requests, state.failures) == (1, 1, 0)
    assert gateway.gateway.metrics.attempts.totals() == {("default", "gpt", "up:up-model", "success"): 1.0}


async def test_what_is_not_counted_is_sent_again_too(serve: Serve, authority: Authority) -> None:
    first = authority.logs_in()
    document = an_oauth_document(authority, first)
    document["providers"][1] |= {name: document["providers"][0].pop(name) for name in ("auth_type", "oauth_detail")}
    gateway = await serve(document)
    await is_followed(gateway)
    authority.revoke(first.access)
    body = {"model": "claude", "messages": [{"role": "user", "content": "hello"}]}
    url = f"{gateway.url}/anthropic/v1/messages/count_tokens"
    async with gateway.session.post(url, json=body) as response:
        assert response.status == 200
    assert authority.asked == [first.access, authority.newest.access]


async def test_where_no_other_token_is_to_be_had_the_refusal_is_the_answer(serve: Serve, authority: Authority) -> None:
    first = authority.logs_in()
    gateway = await serve(an_oauth_document(authority, first))
    await is_followed(gateway)
    authority.revoke(first.access)
    authority.revoked.add(first.family)
    async with gateway.chat() as response:
        assert response.status == 401
    assert authority.asked == [first.access]
    totals = gateway.gateway.metrics.attempts.totals()
    assert totals == {("default", "gpt", "up:up-model", Outcome.UNAUTHORIZED.value): 1.0}
    async with gateway.session.get(f"{gateway.url}/readyz") as response:
        assert "invalid_grant" in (await response.json())["oauth"]["up"]


async def test_a_client_without_a_user_needs_no_token_to_begin_with(serve: Serve, authority: Authority) -> None:
    fields = {"grant": "client_credentials", "client_secret": CLIENT_SECRET}
    gateway = await serve(an_oauth_document(authority, None, extra_fields=fields))
    async with gateway.chat() as response:
        assert response.status == 200
    assert authority.asked[-1] in {token.access for token in authority.issued}


async def test_a_new_token_is_used_by_the_next_request(serve: Serve, authority: Authority) -> None:
    """An account was looked at again after a second only."""
    first = authority.logs_in()
    gateway = await serve(an_oauth_document(authority, first))
    await is_followed(gateway)
    async with gateway.chat() as response:
        assert response.status == 200
    provider = gateway.gateway.balance.directory.provider("up")
    assert provider is not None
    assert await gateway.gateway._keeper.renew(provider, first.access)
    async with gateway.chat() as response:
        assert response.status == 200
    assert authority.asked == [first.access, authority.newest.access]


async def test_what_is_told_of_tokens_is_how_long_they_live_and_what_came_of_refreshes(
    serve: Serve, authority: Authority
) -> None:
    authority.lives_s = 7200
    gateway = await serve(an_oauth_document(authority, authority.logs_in(), expires_at="2026-01-01T00:00:00Z"))

    async def is_renewed() -> bool:
        return sum(gateway.gateway.metrics.refreshes.totals().values()) >= 1

    await eventually(is_renewed)
    async with gateway.session.get(f"{gateway.url}/metrics") as response:
        lines = (await response.text()).splitlines()
    told = {
        line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if line.startswith("balancer_oauth")
    }
    refreshes = {
        outcome: told[f'balancer_oauth_refreshes_total{{outcome="{outcome}",provider="up"}}'] for outcome in OUT
    }
    assert refreshes == {"success": 1, "failed": 0, "lost": 0, "in_doubt": 0}
    assert told['balancer_oauth_expires_seconds{provider="up"}'] == pytest.approx(7200, abs=60)


async def test_a_grant_lies_beside_the_registry_and_ends(serve: Serve, authority: Authority, store_url: str) -> None:
    await is_followed(await serve(an_oauth_document(authority, authority.logs_in())))
    with redis.Redis.from_url(store_url) as client:
        assert 0 < client.pttl(keys.grant("up")) <= keys.GRANT_MS
