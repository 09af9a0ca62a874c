"""A gateway over fake vendors of all APIs, and the official SDKs in front of it."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest

from tests.gateway.conftest import Served, serving, store, store_url
from tests.store.conftest import eventually
from tests.vendors.chat import Chat
from tests.vendors.google import Google
from tests.vendors.messages import Messages
from tests.vendors.replies import Play, Reply, Tokens, reply
from tests.vendors.serving import KEY, Vendor

__all__ = ["store", "store_url"]

MODELS = {
    "claude": "claude-opus-4-5-20251101",
    "gpt": "gpt-5",
    "gemini": "gemini-3-pro-preview",
    "deepseek": "deepseek-v4",
}
STYLES = {"claude": "anthropic", "gpt": "openai", "gemini": "google", "deepseek": "openai"}
SCENARIOS = ("openai", "anthropic", "claude_code", "opencode")
TOKEN = "team-token"


class World:
    """Rules `claude`, `gpt`, `gemini` and `deepseek` with one service each, and `hop`: another vendor at each request.

    `rounds` has more rules, by their names, each with the vendors that take turns. What the vendors say is one play.
    """

    def __init__(self, served: Served, play: Play, vendors: dict[str, Vendor]) -> None:
        self.served = served
        self.play = play
        self.vendors = vendors
        self.url = served.url

    def says(self, *replies: Reply) -> None:
        """What is said from now on, one a request, whoever is asked."""
        self.play.says(*replies)

    @property
    def refusals(self) -> list[str]:
        """What any vendor has refused."""
        return [f"{name}: {refusal}" for name, vendor in self.vendors.items() for refusal in vendor.refusals]

    def bodies(self, name: str) -> list[Any]:
        """What a vendor was asked."""
        return self.vendors[name].bodies

    def openai(self, scenario: str = "", **more: Any) -> openai.AsyncOpenAI:
        """OpenAI's SDK."""
        base = f"{self.url}/{scenario}/v1" if scenario else f"{self.url}/v1"
        return openai.AsyncOpenAI(base_url=base, api_key=TOKEN, **{"max_retries": 0} | more)

    def anthropic(self, scenario: str = "", **more: Any) -> anthropic.AsyncAnthropic:
        """Anthropic's SDK."""
        base = f"{self.url}/{scenario}" if scenario else self.url
        return anthropic.AsyncAnthropic(base_url=base, api_key=TOKEN, **{"max_retries": 0} | more)

    async def assert_books_agree(self) -> None:
        """Every service's counters in Redis are the vendor's own account, to the token."""

        async def are_settled() -> bool:
            services = (await self.served.view()).services
            return not any(state.in_flight for state in services.values())

        await eventually(are_settled)
        services = (await self.served.view()).services
        for name, vendor in self.vendors.items():
            state = services.get(f"{name}:{MODELS[name]}")
            ours = Tokens() if state is None else Tokens(**{f: getattr(state, f) for f in Tokens.__struct_fields__})
            assert ours == vendor.account, name


@pytest.fixture
async def world(store_url: str, tmp_path: Path) -> AsyncIterator[World]:
    """The gateway and its vendors."""
    play = Play(reply())
    vendors: dict[str, Vendor] = {
        "claude": Messages(play),
        "gpt": Chat(play),
        "gemini": Google(play),
        "deepseek": Chat(play, thinks=True),
    }
    async with contextlib.AsyncExitStack() as stack:
        for vendor in vendors.values():
            await stack.enter_async_context(vendor.running())
        served = await stack.enter_async_context(serving(store_url, tmp_path, _document(vendors), client_tokens=TOKEN))
        yield World(served, play, vendors)


def _document(vendors: dict[str, Vendor]) -> dict[str, Any]:
    providers = [
        {
            "name": name,
            "api_style": STYLES[name],
            "api_base": f"{vendor.url}/v1" if STYLES[name] == "openai" else vendor.url,
            "token": KEY,
        }
        | ({"responses": False} if STYLES[name] == "openai" else {})
        for name, vendor in vendors.items()
    ]
    turns = {name: (name,) for name in vendors} | {
        "hop": ("claude", "gpt", "gemini"),
        "pairs": ("gemini", "claude"),
        "four": ("deepseek", "gemini", "gpt", "claude"),
    }
    rules = [
        {
            "scenario": scenario,
            "request_model": name,
            "lb_tactic": {"type": "round_robin", "params": {"request_threshold": 1}},
            "services": [{"provider": each, "model": MODELS[each]} for each in names],
            "retry": {"attempts": 1},
        }
        for scenario in SCENARIOS
        for name, names in turns.items()
    ]
    return {"providers": providers, "rules": rules}
