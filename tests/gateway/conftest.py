"""A worker's whole data plane in this process: a real store, real sockets, scripted upstreams."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
import redis
import uvloop

from balancer import config, document, polling
from balancer.gateway.app import Gateway
from balancer.gateway.messages import Upstream as UpstreamClient
from balancer.store import connection
from balancer.store.credentials import Sealer
from balancer.store.publishing import publish_file
from balancer.store.registry import Registry
from balancer.store.views import PoolView, ServiceView
from tests import servers
from tests.actors import Upstream
from tests.gateway import by_hand
from tests.store.conftest import eventually

SEALING_KEY = "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="
KEY = "sk-upstream-0123456789"
FRONTS = ("lane", "aiohttp")
"""With the fast lane, which is the default, and without it."""


def pytest_asyncio_loop_factories(item: pytest.Item) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """The loops that a test runs on: ours, and in a module that is ON_BOTH_LOOPS uvloop's too."""
    is_on_both = isinstance(item, pytest.Function) and hasattr(item.module, "ON_BOTH_LOOPS")
    return {"asyncio": polling.new_event_loop} | ({"uvloop": uvloop.new_event_loop} if is_on_both else {})


@pytest.fixture(scope="session")
def store() -> Iterator[str]:
    """The URL of a real server."""
    with servers.running("valkey-9") as url:
        yield url


@pytest.fixture
def store_url(store: str) -> str:
    """The same, emptied."""
    with redis.Redis.from_url(store) as client:
        client.flushall()
    return store


@pytest.fixture
async def upstream() -> AsyncIterator[Upstream]:
    """A scripted upstream."""
    async with Upstream().running() as actor:
        yield actor


@pytest.fixture
async def other_upstream() -> AsyncIterator[Upstream]:
    """Another one."""
    async with Upstream().running() as actor:
        yield actor


class Served:
    """A running gateway, and what a test asks of it."""

    def __init__(self, gateway: Gateway, url: str, session: aiohttp.ClientSession) -> None:
        self.gateway = gateway
        self.url = url
        self.session = session

    async def view(self) -> PoolView:
        """The pool as Redis has it, once nothing is on its way there any more."""
        (view,) = await self.gateway.balance.views()
        return view

    async def service(self, name: str) -> ServiceView:
        """A service's counters, once every attempt on it has ended."""

        async def is_over() -> bool:
            state = (await self.view()).services.get(name)
            return bool(state and state.picks and not state.in_flight)

        await eventually(is_over)
        return (await self.view()).services[name]

    def chat(self, **more: Any) -> Any:
        """A chat request to the rule `gpt`."""
        body = {"model": "gpt", "messages": [{"role": "user", "content": "hello"}]} | more
        return self.session.post(f"{self.url}/v1/chat/completions", json=body)


Serve = Callable[..., Awaitable[Served]]


def a_document(url: str, **provider: Any) -> dict[str, Any]:
    """Two rules over one upstream: `gpt` for OpenAI clients, `claude` for Anthropic's."""
    base = {"api_base": url, "token": KEY} | provider
    return {
        "providers": [
            {"name": "up", "api_style": "openai"} | base,
            {"name": "ant", "api_style": "anthropic"} | base,
        ],
        "rules": [
            {"uuid": "gpt", "request_model": "gpt", "services": [{"provider": "up", "model": "up-model"}]},
            {
                "uuid": "claude",
                "scenario": "anthropic",
                "request_model": "claude",
                "services": [{"provider": "ant", "model": "up-model"}],
            },
        ],
    }


@contextlib.asynccontextmanager
async def serving(store_url: str, data_dir: Path, raw: dict[str, Any], **flags: Any) -> AsyncIterator[Served]:
    """A gateway with a configuration document, until the block ends."""
    sealer = Sealer(SEALING_KEY)
    client = connection.client(store_url)
    await publish_file(Registry(client), document.read(raw, door="strict").configuration, sealer)
    await client.aclose()
    flags = {"drain_timeout_s": 1.0, "data_dir": str(data_dir)} | flags
    gateway = Gateway(config.load(flags, {}), store_url, sealer)
    listener = socket.create_server(("127.0.0.1", 0))
    scheme = "https" if flags.get("tls_cert_file") else "http"
    url = f"{scheme}://127.0.0.1:{listener.getsockname()[1]}"
    await gateway.start([listener])
    try:
        async with aiohttp.ClientSession(auto_decompress=False) as session:
            yield Served(gateway, url, session)
    finally:
        await gateway.drain()


@pytest.fixture(params=FRONTS)
def front(request: pytest.FixtureRequest) -> str:
    """Which front serves: what holds on one of them holds on the other."""
    return str(request.param)


@pytest.fixture
async def serve(store_url: str, tmp_path: Path, front: str) -> AsyncIterator[Serve]:
    """Starts a gateway with a configuration document; everything is closed afterwards."""
    async with contextlib.AsyncExitStack() as stack:

        async def start(raw: dict[str, Any], **flags: Any) -> Served:
            flags = {"fast_lane": front == "lane"} | flags
            return await stack.enter_async_context(serving(store_url, tmp_path, raw, **flags))

        yield start


@pytest.fixture
async def gateway(serve: Serve, upstream: Upstream) -> Served:
    """A gateway in front of the scripted upstream."""
    return await serve(a_document(upstream.url))


def decoded(body: bytes) -> Any:
    """What a JSON body holds."""
    return msgspec.json.decode(body)


@pytest.fixture
async def a_client() -> AsyncIterator[Callable[..., UpstreamClient]]:
    """Makes clients as workers use them; in the end they are closed, and no task or socket of them is left."""
    sockets = by_hand.open_sockets()
    clients: list[UpstreamClient] = []

    def make(**options: Any) -> UpstreamClient:
        clients.append(by_hand.a_client(**options))
        return clients[-1]

    yield make
    for client in clients:
        await client.close()
    await by_hand.turns(8)
    assert asyncio.all_tasks() == {asyncio.current_task()}
    assert by_hand.open_sockets() == sockets


@pytest.fixture
def client(a_client: Callable[..., UpstreamClient]) -> UpstreamClient:
    """A client as workers use it."""
    return a_client()


@pytest.fixture
async def listener(a_client: Callable[..., UpstreamClient]) -> AsyncIterator[by_hand.Listener]:
    """A listening socket, closed before the clients are looked at."""
    listener = by_hand.Listener()
    yield listener
    await listener.close()
