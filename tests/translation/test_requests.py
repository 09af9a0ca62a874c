"""Requests of every API's clients, written for every vendor: each vendor takes what is written for it.

The fake vendors judge, by the vendors' documentation.
"""

from __future__ import annotations

import importlib
from typing import Any

import msgspec
import pytest

from balancer.translation.conversation import Target, UntranslatableError
from tests.actors import Received
from tests.translation.asked import ALL, BASES, NEVER_FORCED, NEVER_STOPPED, REFUSED
from tests.vendors.chat import Chat
from tests.vendors.google import Google
from tests.vendors.messages import Messages
from tests.vendors.serving import KEY, Vendor

MODELS = {
    "chat": ("gpt-4o", "gpt-5"),
    "messages": ("claude-3-haiku-20240307", "claude-opus-4-5-20251101", "claude-sonnet-4-6", "claude-opus-5-5"),
    "google": ("gemini-2.5-flash", "gemini-3-pro-preview"),
}
VENDORS: dict[str, type[Vendor]] = {"chat": Chat, "messages": Messages, "google": Google}
SIGNERS = {"chat": "openai/a", "messages": "anthropic", "google": "google"}
BETA = "thinking-binding-controls-2026-08-01"
CASES = [
    pytest.param(api, name, to, id=f"{api}: {name}, to {to}")
    for api, asked in ALL.items()
    for name in asked
    for to in MODELS
    if to != api
]


def request_of(api: str, name: str) -> dict[str, Any]:
    """The whole request."""
    return BASES[api] | ALL[api][name]


def written(api: str, body: dict[str, Any], to: str, model: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """What is sent for a client's request, and what was left out."""
    conversation = _module(api, "reading").read_request(msgspec.json.encode(body))
    made = _module(to, "writing").write_request(conversation, Target(model=model, vendor=SIGNERS[to]))
    return msgspec.json.decode(made.body), made.left_out


def check(to: str, model: str, body: dict[str, Any], *, streams: bool = False) -> None:
    """Raises RefusedError for what the vendor would refuse."""
    way = "streamGenerateContent?alt=sse" if streams else "generateContent"
    path = {
        "chat": "/v1/chat/completions",
        "messages": "/v1/messages",
        "google": f"/v1beta/models/{model}:{way}",
    }[to]
    headers = {
        "chat": {"authorization": f"Bearer {KEY}"},
        "messages": {"x-api-key": KEY, "anthropic-version": "2023-06-01", "anthropic-beta": BETA},
        "google": {"x-goog-api-key": KEY},
    }[to] | {"content-type": "application/json"}
    request = Received(method="POST", target=path, headers=tuple(headers.items()), body=b"")
    VENDORS[to]().check(request, body)


def _module(api: str, name: str) -> Any:
    return importlib.import_module(f"balancer.translation.{api}.{name}")


@pytest.mark.parametrize(("api", "name", "to"), CASES)
def test_a_vendor_takes_what_is_written_for_it_or_the_client_is_told_the_field(api: str, name: str, to: str) -> None:
    body = request_of(api, name)
    for model in MODELS[to]:
        refused = REFUSED.get((api, name, to))
        if model == "claude-opus-5-5" and name in NEVER_FORCED.get(api, ()):
            refused = "tool_choice"
        if model == "gpt-5":
            refused = NEVER_STOPPED.get((api, name), refused)
        if refused is None:
            made, _ = written(api, body, to, model)
            check(to, model, made)
            continue
        with pytest.raises(UntranslatableError) as told:
            written(api, body, to, model)
        assert told.value.param == refused
