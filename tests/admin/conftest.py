"""Workers with their admin servers in this process: a real store, real sockets."""

from __future__ import annotations

import contextlib
import io
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import ANY
from urllib.parse import quote

import aiohttp
import msgspec
import pytest
import redis
import redis.asyncio
import yarl

from balancer import config, document
from balancer.admin.app import create_app
from balancer.gateway.app import Gateway
from balancer.store import connection, keys
from balancer.store.credentials import Sealer
from balancer.store.publishing import publish_file
from balancer.store.registry import Registry
from tests import servers

TOKEN = "the-admin-token"
RULE = "org/llama3:8b x"
FIRST, SECOND = "a:m:1", "b:org/m 2"
LIVE = "/api/v1/load-balancer"


@pytest.fixture(scope="session")
def store() -> Iterator[str]:
    """The URL of a real server."""
    with servers.running("valkey-9") as url:
        yield url


@pytest.fixture
def store_url(store: str) -> Iterator[str]:
    """The same, emptied; afterwards every key but the registry's must expire."""
    with redis.Redis.from_url(store) as client:
        client.flushall()
        yield store
        immortal = [
            k for k in client.scan_iter("*") if client.pttl(k) < 0 and not k.startswith(b"balancer:{registry}:")
        ]
        assert not immortal, f"keys without an expiry: {immortal}"


@pytest.fixture
async def control(store_url: str) -> AsyncIterator[Any]:
    """A client of its own, to look at the server and to disturb it."""
    async with redis.asyncio.Redis.from_url(store_url) as client:
        yield client


def a_document(record: str = "full", events: int = 100_000, **tactic: Any) -> dict[str, Any]:
    """Rule RULE over two services, `side` with one of them in a pool of its own, and `off`, which has none to use."""
    providers = [
        {"name": name, "api_base": f"https://{name}.invalid/v1", "no_key_required": True, "enabled": name != "c"}
        for name in ("a", "b", "c")
    ]
    first, second = {"provider": "a", "model": "m:1"}, {"provider": "b", "model": "org/m 2", "time_window": 60}
    rules = [
        {
            "uuid": RULE,
            "request_model": "llama",
            "response_model": "seen",
            "lb_tactic": {"type": "round_robin", "params": {"request_threshold": 2}} | tactic,
            "services": [first, second],
        },
        {"uuid": "side", "request_model": "side", "pool": "side.1", "services": [first]},
        {"uuid": "off", "request_model": "off", "services": [{"provider": "c", "model": "m"}]},
    ]
    pools = [{"name": "default", "record": record, "record_events": events}]
    return {"providers": providers, "rules": rules, "pools": pools}


class Admin:
    """A worker's admin server, and a client of it."""

    def __init__(self, gateway: Gateway, url: str, session: aiohttp.ClientSession) -> None:
        self.gateway = gateway
        self.url = url
        self.session = session

    async def ask(
        self, method: str, path: str, body: Any = None, *, token: str | None = TOKEN, **headers: str
    ) -> tuple[int, Any, Mapping[str, str]]:
        """Status, body and headers of any answer. The path is sent as it is."""
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        if token is not None:
            given["Authorization"] = f"Bearer {token}"
        if body is not None:
            given.setdefault("Content-Type", "application/json")
        raw = body if isinstance(body, bytes | None) else msgspec.json.encode(body)
        data = raw if raw is None else io.BytesIO(raw)
        target = yarl.URL(self.url + path, encoded=True)
        async with self.session.request(method, target, data=data, headers=given) as response:
            text = await response.read()
            return response.status, msgspec.json.decode(text) if text else None, response.headers

    async def get(self, path: str) -> Any:
        """What a GET answers."""
        status, body, _ = await self.ask("GET", path)
        assert status == 200, body
        return body

    async def send(self, path: str, body: Any = None, method: str = "POST") -> Any:
        """What a POST answers."""
        status, answer, _ = await self.ask(method, path, body)
        assert status == 200, answer
        return answer

    async def pick(self, rule: str = RULE, **more: Any) -> Any:
        """A pick."""
        return await self.send("/api/v1/pick", {"rule": rule} | more)

    async def settle(self, hold: str, outcome: str = "success", **usage: int) -> Any:
        """The end of a pick."""
        return await self.send("/api/v1/settle", {"hold": hold, "outcome": outcome, "usage": usage})

    async def stats(self, service: str = FIRST, rule: str = RULE) -> Any:
        """The counters of a service."""
        return (await self.get(f"{of(rule)}/services/{quote(service, safe='')}/stats"))["stats"]


def of(rule: str) -> str:
    """The path of a rule."""
    return f"{LIVE}/rules/{quote(rule, safe='')}"


def counters(service: str, **more: Any) -> dict[str, Any]:
    """A service's counters, zero but for those given; its last use and its window's start are any or none."""
    names = (
        *("request_count", "window_request_count", "window_tokens_consumed", "window_input_tokens"),
        *("window_output_tokens", "in_flight", "reserved_tokens", "picks", "failures", "input_tokens"),
        *("output_tokens", "cached_tokens", "cache_creation_tokens", "reasoning_tokens", "lost", "lost_tokens"),
        "abandoned",
    )
    length = 60 if service == SECOND else 300
    known = {"service_id": service, "last_used": None, "window_start": None, "time_window": length}
    known |= {"breaker": "closed", "cooling_until": None}
    return dict.fromkeys(names, 0) | known | more


def used(service: str, **more: Any) -> dict[str, Any]:
    """The same of a service that has settled something in the window that is open."""
    return counters(service, last_used=ANY, window_start=ANY, **more)


async def everything(control: Any, pool: str = "default") -> Any:
    """All that Redis keeps of a pool's state."""
    return await control.hgetall(keys.partitions(pool)), await control.hgetall(keys.services(pool))


Start = Callable[..., Awaitable[Admin]]


@pytest.fixture
async def start(store_url: str, tmp_path: Path) -> AsyncIterator[Start]:
    """Starts workers; a document is published first. Everything is closed afterwards."""
    async with contextlib.AsyncExitStack() as stack:

        async def started(raw: dict[str, Any] | None = None, **flags: Any) -> Admin:
            if raw is not None:
                client = connection.client(store_url)
                await publish_file(Registry(client), document.read(raw, door="strict").configuration, None)
                await client.aclose()
            known = {"drain_timeout_s": 1.0, "lease_s": 1.0, "data_dir": str(tmp_path), "admin_token": TOKEN}
            settings = config.load(known | flags, {})
            gateway = Gateway(settings, store_url, None)
            listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
            sealer = Sealer(settings.secret_key) if settings.secret_key else None
            app = create_app(settings, gateway.balance, gateway.metrics, sealer)
            await gateway.start(listeners[:1], [(app, listeners[1])])
            stack.push_async_callback(gateway.drain)
            session = await stack.enter_async_context(aiohttp.ClientSession())
            return Admin(gateway, f"http://127.0.0.1:{listeners[1].getsockname()[1]}", session)

        yield started


@pytest.fixture
async def admin(start: Start) -> Admin:
    """One worker with the usual document."""
    return await start(a_document())
