"""A gateway over fake vendors of all APIs, and the official SDKs in front of it."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import anthropic
import openai
import pytest
import pytest_asyncio
import redis

from tests.gateway.conftest import Served, serving, store
from tests.store.conftest import eventually
from tests.vendors.chat import Chat
from tests.vendors.google import Google
from tests.vendors.messages import Messages
from tests.vendors.replies import Play, Reply, Tokens, reply
from tests.vendors.serving import KEY, Vendor

__all__ = ["store"]

MODELS = {
    "claude": "claude-opus-4-5-20251101",
    "gpt": "gpt-5",
    "gemini": "gemini-3-pro-preview",
    "deepseek": "deepseek-v4",
    "opus": "claude-opus-5-5",
}
STYLES = {"claude": "anthropic", "gpt": "openai", "gemini": "google", "deepseek": "openai", "opus": "anthropic"}
SCENARIOS = ("openai", "anthropic", "claude_code", "opencode")
TOKEN = "team-token"
APART = 12
"""So many rules have services of their own."""


class World:
    """Rules `claude`, `gpt`, `gemini`, … with one service each, and some whose vendors take turns.

    It lives for a module; what a test sees of it is what has happened since the test began. What the vendors say is one
    play.
    """

    def __init__(self, served: Served, play: Play, vendors: dict[str, Vendor]) -> None:
        self.served = served
        self.play = play
        self.vendors = vendors
        self.url = served.url
        self._before: dict[str, Tokens] = {}
        self._clients: dict[str, Any] = {}

    async def begin(self) -> None:
        """Forgets what has happened so far."""
        self._before = await self._counted()
        self.play.says(reply())
        for vendor in self.vendors.values():
            vendor.forgets()
            if isinstance(vendor, Messages):
                vendor.dropped.clear()

    async def close(self) -> None:
        """Closes the SDKs' connections."""
        for client in self._clients.values():
            await client.close()

    def says(self, *replies: Reply) -> None:
        """What is said from now on, one a request, whoever is asked."""
        self.play.says(*replies)

    @property
    def refusals(self) -> list[str]:
        """What any vendor has refused, or left out."""
        refused = [f"{name}: {refusal}" for name, vendor in self.vendors.items() for refusal in vendor.refusals]
        makers = [vendor for vendor in self.vendors.values() if isinstance(vendor, Messages)]
        return refused + [f"left out: {at}" for vendor in makers for at in vendor.dropped]

    def bodies(self, name: str) -> list[Any]:
        """What a vendor was asked."""
        return self.vendors[name].bodies

    @property
    def openai(self) -> openai.AsyncOpenAI:
        """OpenAI's SDK."""
        if "openai" not in self._clients:
            self._clients["openai"] = openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key=TOKEN, max_retries=0)
        client: openai.AsyncOpenAI = self._clients["openai"]
        return client

    @property
    def anthropic(self) -> anthropic.AsyncAnthropic:
        """Anthropic's SDK."""
        if "anthropic" not in self._clients:
            self._clients["anthropic"] = anthropic.AsyncAnthropic(base_url=self.url, api_key=TOKEN, max_retries=0)
        client: anthropic.AsyncAnthropic = self._clients["anthropic"]
        return client

    async def assert_books_agree(self) -> None:
        """Every service's counters in Redis are the vendor's own account, to the token."""
        counted = await self._counted()
        for name, vendor in self.vendors.items():
            assert counted[name].less(self._before[name]) == vendor.account, name

    async def _counted(self) -> dict[str, Tokens]:
        """The counters, once nothing is under way."""

        async def are_settled() -> bool:
            services = (await self.served.view()).services
            return not any(state.in_flight for state in services.values())

        await eventually(are_settled)
        services = (await self.served.view()).services
        counted = {}
        for name in self.vendors:
            counted[name] = Tokens()
            for service, state in services.items():
                if service.startswith(f"{name}:"):
                    counted[name].add(Tokens(**{field: getattr(state, field) for field in Tokens.__struct_fields__}))
        return counted


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def a_world(store: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    """The gateway and its vendors, for a module."""
    with redis.Redis.from_url(store) as client:
        client.flushall()
    play = Play(reply())
    vendors: dict[str, Vendor] = {
        "claude": Messages(play),
        "gpt": Chat(play),
        "gemini": Google(play),
        "deepseek": Chat(play, thinks=True),
        "opus": Messages(play),
    }
    for number, vendor in enumerate(vendors.values()):
        vendor.number = number * 1000  # No two have an id in common.
    folder = tmp_path_factory.mktemp("world")
    async with contextlib.AsyncExitStack() as stack:
        for vendor in vendors.values():
            await stack.enter_async_context(vendor.running())
        served = await stack.enter_async_context(serving(store, folder, _document(vendors), client_tokens=TOKEN))
        world = World(served, play, vendors)
        yield world
        await world.close()


@pytest_asyncio.fixture(loop_scope="module")
async def world(a_world: World) -> World:
    """The same, for a test."""
    await a_world.begin()
    return a_world


def _document(vendors: dict[str, Vendor]) -> dict[str, Any]:
    providers = [
        {
            "name": name,
            "api_style": STYLES[name],
            "api_base": f"{vendor.url}/v1" if STYLES[name] == "openai" else vendor.url,
            "token": KEY,
            "breaker": {"failures": 1000, "min_requests": 1000},
        }
        | ({"responses": False} if STYLES[name] == "openai" else {})
        for name, vendor in vendors.items()
    ]
    turns = {name: (name,) for name in vendors} | {
        "hop": ("claude", "gpt", "gemini"),
        "pairs": ("gemini", "opus"),
        "late": ("gpt", "opus", "deepseek"),
        "two": ("gpt", "claude"),
        "four": ("deepseek", "gemini", "gpt", "claude"),
    }
    rules = [
        {
            "scenario": scenario,
            "request_model": name,
            "lb_tactic": {"type": "round_robin", "params": {"request_threshold": 1}},
            "services": [{"provider": each, "model": MODELS[each]} for each in names],
            "retry": {"attempts": 1} if len(names) == 1 else {"attempts": 3, "budget_ratio": 1, "backoff_ms": 1},
        }
        for scenario in SCENARIOS
        for name, names in turns.items()
    ]
    return {"providers": providers, "rules": rules + [_apart(number) for number in range(APART)]}


def _apart(number: int) -> dict[str, Any]:
    """A rule whose services are its own: what fails there cools down nowhere else."""
    names = ["gemini", "claude", "gpt"] * 2
    return {
        "scenario": "anthropic" if number % 3 == 2 else "openai",
        "request_model": f"apart-{number}",
        "services": [
            {"provider": name, "model": f"{MODELS[name]}-{number}"} for name in names[number % 2 : number % 2 + 3]
        ],
        "retry": {"backoff_ms": 1},
    }
