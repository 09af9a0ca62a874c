"""Secrets and prompts go through every path; none is found on Redis' disk, in metrics, in the answers of the admin."""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import redis

from balancer import config, document, log
from balancer.admin.app import create_app
from balancer.gateway.app import Gateway
from balancer.store import connection, keeper
from balancer.store.credentials import Sealer
from balancer.store.publishing import publish_file
from balancer.store.registry import Registry
from tests.actors import Upstream, openai_events
from tests.authority import CLIENT_ID, Authority
from tests.gateway.conftest import SEALING_KEY
from tests.gateway.test_canaries import ACCOUNT, ANSWER, CANARY, CLIENT, COMPLETION, ENTRIES, OTHER, PROMPT
from tests.store.conftest import eventually
from tests.topologies import Server

ADMIN = "canary-admin-token-0b1e"
SAME = [{"provider": "up", "model": "m"}, {"provider": "spare", "model": "m"}]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """A server that writes all it is told to its disk, as it is told it."""
    plain = ("--appendonly", "yes", "--appendfsync", "always", "--rdbcompression", "no", "--save", "")
    server = Server("valkey-9", tmp_path / "redis", *plain)
    yield server
    server.end()


def a_document(upstream: Upstream, authority: Authority) -> dict[str, Any]:
    """Literal secrets wherever one may stand, every event recorded, sessions pinned, an account that is OAuth's."""
    login = authority.logs_in()
    literal = {
        "token": ACCOUNT,
        "headers": {"x-api-secret": f"{ACCOUNT}-header"},
        "query": {"api_key": f"{ACCOUNT}-query"},
        "breaker": {"failures": 0, "ratio": 0},
    }
    oauth = {
        "access_token": login.access,
        "refresh_token": login.refresh,
        "expires_at": "2026-01-01T00:00:00Z",
        "extra_fields": {"token_url": authority.url, "client_id": CLIENT_ID, "note": {"api_key": f"{ACCOUNT}-deep"}},
    }
    rule = {"session_affinity": 60, "session_header": "x-session", "retry": {"attempts": 2, "backoff_ms": 1}}
    return {
        "providers": [
            *({"name": name, "api_base": upstream.url} | literal for name in ("up", "spare")),
            {"name": "acct", "api_base": authority.api, "auth_type": "oauth", "oauth_detail": oauth},
        ],
        "rules": [
            {"uuid": "gpt", "request_model": "gpt", "smart_enabled": True, "smart_routing": ENTRIES, "services": SAME}
            | rule,
            {"uuid": "own", "request_model": "own", "services": [{"provider": "acct", "model": "m"}]},
        ],
        "pools": [{"name": "default", "record": "full"}],
    }


class Planes:
    """A gateway with its admin server, and all that either answers."""

    def __init__(self, gateway: Gateway, url: str, admin_url: str, session: aiohttp.ClientSession) -> None:
        self.gateway = gateway
        self.url = url
        self.admin_url = admin_url
        self.session = session
        self.answers = b""

    async def ask(self, path: str, body: Any = None, **headers: str) -> int:
        """A client's request; its answer is kept where no completion or echo of its own can be in it."""
        given = {"Authorization": f"Bearer {CLIENT}"} | {
            name.replace("_", "-"): value for name, value in headers.items()
        }
        method = "GET" if body is None else "POST"
        async with self.session.request(method, self.url + path, json=body, headers=given) as response:
            self.answers += await response.read() + repr(response.headers).encode()
            return response.status

    async def admin(self, path: str, body: Any = None, method: str = "") -> bytes:
        """What the admin server answers, whatever it is."""
        headers = {"Authorization": f"Bearer {ADMIN}"}
        method = method or ("GET" if body is None else "POST")
        async with self.session.request(method, self.admin_url + path, json=body, headers=headers) as response:
            return await response.read() + repr(response.headers).encode()


@contextlib.asynccontextmanager
async def serving(url: str, folder: Path, raw: dict[str, Any]) -> AsyncIterator[Planes]:
    sealer, client = Sealer(SEALING_KEY), connection.client(url)
    await publish_file(Registry(client), document.read(raw, door="strict").configuration, sealer)
    await client.aclose()
    flags = {"drain_timeout_s": 1.0, "data_dir": str(folder), "admin_token": ADMIN, "client_tokens": CLIENT}
    settings = config.load(flags | {"host": "127.0.0.1"}, {})
    gateway = Gateway(settings, url, sealer)
    data, admin = (socket.create_server(("127.0.0.1", 0)) for _ in range(2))
    await gateway.start([data], [(create_app(settings, gateway.balance, gateway.metrics), admin)])
    try:
        async with aiohttp.ClientSession() as session:
            url, admin_url = (f"http://127.0.0.1:{listener.getsockname()[1]}" for listener in (data, admin))
            yield Planes(gateway, url, admin_url, session)
    finally:
        await gateway.drain()


async def test_nothing_secret_is_kept_counted_or_shown(
    server: Server,
    tmp_path: Path,
    upstream: Upstream,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setattr(keeper, "_BEREFT_S", 0.0)
    chat, said = "/v1/chat/completions", {"messages": [{"role": "user", "content": PROMPT}], "user": PROMPT}
    stream = [event.replace(b'"w1"', b'"%b"' % COMPLETION.encode()) for event in openai_events()]
    async with Authority().running() as authority:
        authority.prefix = "canary-"
        async with serving(f"redis://{server.address}", tmp_path, a_document(upstream, authority)) as planes:
            # Through a rule with sessions and entries: answers, a stream, an echo of the credential, a fault.
            upstream.answers(body=ANSWER)
            assert await planes.ask(chat, {"model": "gpt", **said}, x_session=OTHER, x_secret=OTHER) == 200
            upstream.streams(stream)
            assert await planes.ask(chat, {"model": "gpt", "stream": True, **said}, x_session=OTHER) == 200
            planes.answers = b""  # The completion is for the client.
            upstream.echoes_its_credential(401)
            assert await planes.ask(chat, {"model": "gpt", **said}) == 401
            upstream.answers(500, f'{{"error": {{"message": "{ACCOUNT}", "code": "{ACCOUNT}"}}}}'.encode())
            assert await planes.ask(chat, {"model": "gpt", **said}) == 500
            assert await planes.ask(chat, {"model": "gpt", **said}, Authorization=f"Bearer {CLIENT}-no") == 401
            upstream.answers(body=ANSWER.replace(b'"c1"', b'"resp_%b"' % OTHER.encode()))
            answers = planes.answers
            await planes.ask("/v1/responses", {"model": "gpt", "input": PROMPT})
            await planes.ask("/v1/responses", {"model": "gpt", "input": PROMPT, "previous_response_id": OTHER})
            planes.answers = answers

            # Through the account that is OAuth's: renewed by time, renewed for a refusal, lost.
            async def is_renewed() -> bool:
                return len(authority.issued) > 1

            await eventually(is_renewed)
            assert await planes.ask(chat, {"model": "own", **said}) == 200
            monkeypatch.setattr(keeper, "FORCED_AGE_MS", 0)
            authority.revoke(authority.newest.access)
            assert await planes.ask(chat, {"model": "own", **said}) == 200
            authority.revoked.add(authority.newest.family)
            assert await planes.ask(chat, {"model": "own", **said}) == 401
            assert await planes.ask("/readyz") == 200

            await planes.ask("/metrics")
            shown = planes.answers + await everything_the_admin_shows(planes)
        with redis.Redis.from_url(f"redis://{server.address}") as client:
            assert client.xlen("balancer:{default}:decisions") > 5
            client.save()

    disk = {path: path.read_bytes() for path in (tmp_path / "redis").rglob("*") if path.is_file()}
    assert [path.name for path, data in disk.items() if CANARY in data.lower()] == []
    assert sum(b"sealed:v2:" in data for data in disk.values()) >= 2, "RDB and AOF hold what was sealed"
    assert CANARY not in shown.lower(), around(shown)
    formatter = log._JsonLines()
    logged = "\n".join(formatter.format(record) for record in caplog.records if record.name.startswith("balancer"))
    assert CANARY not in logged.lower().encode(), around(logged.encode())
    assert "an access token was not renewed" in logged
    assert len(authority.used) == 3
    assert any(CANARY in received.body for received in upstream.received), "it was there to be kept"


async def everything_the_admin_shows(planes: Planes) -> bytes:
    """Its answers to all there is to ask, good questions and bad ones."""
    live = "/api/v1/load-balancer"
    shown = [
        await planes.admin(path)
        for path in (
            *("/openapi.json", "/api/v1/decisions", f"{live}/stats", f"{live}/rules/gpt", f"{live}/rules/gpt/summary"),
            *(f"{live}/rules/gpt/stats", f"{live}/rules/gpt/current-service", f"{live}/rules/own/stats"),
            *("/api/v1/providers", "/api/v1/rules", "/api/v1/scenarios", "/api/v1/decisions/default.1.1"),
        )
    ]
    shown.append(await planes.admin("/api/v1/pick", {"rule": "gpt", "session": OTHER}))
    shown.append(await planes.admin("/api/v1/explain", {"rule": "gpt", "request": {"messages": PROMPT}}))
    shown.append(await planes.admin(f"{live}/rules/gpt/tactic", {"tactic": "random", "params": {}}, "PUT"))
    return b"\n".join(shown)


def around(data: bytes) -> bytes:
    """What stands around the first find."""
    at = data.lower().find(CANARY)
    return data[max(0, at - 200) : at + 100]
