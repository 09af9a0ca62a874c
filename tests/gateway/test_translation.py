"""Clients whose rule has services of another API: asked in theirs, answered in the client's own words."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from balancer.domain import Outcome
from tests.actors import OPENAI_JSON, Upstream, anthropic_events, openai_events
from tests.gateway.conftest import Serve, Served, decoded
from tests.gateway.pairs import settled
from tests.gateway.translations import (
    CHAT,
    GENERATED,
    MESSAGE,
    MESSAGES,
    RESPONSES,
    a_mixed_document,
    generated_events,
    told,
    until,
)

SAID = [{"role": "user", "content": "hello"}]
ASKS: dict[str, dict[str, Any]] = {
    CHAT: {"messages": SAID},
    MESSAGES: {"messages": SAID, "max_tokens": 50},
    RESPONSES: {"input": "hello"},
}
SERVICES: dict[str, tuple[bytes, list[bytes], str, str]] = {
    "oai0": (OPENAI_JSON, openai_events(), "/v1/chat/completions", "/v1/chat/completions"),
    "ant0": (MESSAGE, anthropic_events(), "/v1/messages", "/v1/messages"),
    "goo0": (
        GENERATED,
        generated_events(),
        "/v1beta/models/up-model:generateContent",
        "/v1beta/models/up-model:streamGenerateContent?alt=sse",
    ),
}
"""What a service answers, whole and as a stream, and where it is asked for that."""
PAIRS = [
    (CHAT, "ant0"),
    (CHAT, "goo0"),
    (MESSAGES, "oai0"),
    (MESSAGES, "goo0"),
    (RESPONSES, "ant0"),
    (RESPONSES, "goo0"),
]


async def ask(gateway: Served, path: str, *, model: str = "m", headers: Any = None, **more: Any) -> Any:
    """Status, headers and body of a request."""
    url = f"{gateway.url}/openai{path}"
    async with gateway.session.post(url, json={"model": model} | ASKS[path] | more, headers=headers) as answer:
        return answer.status, answer.headers, await answer.read()


def text_of(path: str, body: Any) -> str:
    """What the model says in a whole answer."""
    match path:
        case "/v1/chat/completions":
            return str(body["choices"][0]["message"]["content"])
        case "/v1/messages":
            return "".join(block["text"] for block in body["content"])
        case _:
            return "".join(part["text"] for item in body["output"] for part in item.get("content", ()))


def text_of_events(path: str, events: list[tuple[str, Any]]) -> str:
    """What the model says in a stream."""
    match path:
        case "/v1/chat/completions":
            chunks = [data for _, data in events if isinstance(data, dict) and data["choices"]]
            return "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
        case "/v1/messages":
            deltas = [data["delta"] for name, data in events if name == "content_block_delta"]
            return "".join(delta.get("text", "") for delta in deltas)
        case _:
            return "".join(data["delta"] for name, data in events if name == "response.output_text.delta")


ENDS: dict[str, Any] = {CHAT: ("", "[DONE]"), MESSAGES: "message_stop", RESPONSES: "response.completed"}


def is_closed(path: str, events: list[tuple[str, Any]]) -> bool:
    """True when the stream ends as a whole one does."""
    return bool(events[-1] == ENDS[path] if path == CHAT else events[-1][0] == ENDS[path])


# -- answers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("path", "service"), PAIRS)
async def test_a_client_is_answered_by_a_service_of_another_api(
    serve: Serve, upstream: Upstream, path: str, service: str
) -> None:
    gateway = await serve(a_mixed_document(upstream, rules={"m": {"services": [service]}}))
    body, _, target, _ = SERVICES[service]
    upstream.answers(body=body, headers=(("anthropic-ratelimit-requests-remaining", "3"), ("request-id", "up-1")))
    status, headers, answer = await ask(gateway, path)
    assert (status, text_of(path, decoded(answer))) == (200, "hi")
    assert upstream.last.target == target
    assert headers["x-balancer-service"] == f"{service}:up-model"
    assert headers["x-upstream-request-id"] == "up-1"
    assert not [name for name in headers if name.lower().startswith(("anthropic-", "openai-", "request-id"))]
    assert await settled(gateway) == {(f"{service}:up-model", Outcome.SUCCESS): 1}
    used = (await gateway.service(f"{service}:up-model")).input, (await gateway.service(f"{service}:up-model")).output
    assert used == ((9, 7) if service == "ant0" else (11, 7))


@pytest.mark.parametrize(("path", "service"), PAIRS)
async def test_a_stream_comes_down_event_by_event(serve: Serve, upstream: Upstream, path: str, service: str) -> None:
    gateway = await serve(a_mixed_document(upstream, rules={"m": {"services": [service]}}))
    _, events, _, target = SERVICES[service]
    gate = asyncio.Event()
    upstream.streams(events, gates={len(events) - 1: gate})
    body = {"model": "m", "stream": True} | ASKS[path]
    async with gateway.session.post(f"{gateway.url}/openai{path}", json=body) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        seen = await until(answer, lambda seen: b"w2" in seen)
        gate.set()
        seen += await answer.content.read()
    assert upstream.last.target == target
    assert text_of_events(path, told(seen)) == "w0w1w2"
    assert is_closed(path, told(seen))
    state = await gateway.service(f"{service}:up-model")
    assert (state.input, state.output, await settled(gateway)) == (11, 7, {(f"{service}:up-model", "success"): 1})
