"""Secrets and prompts go through every path, and are found in no log, no line of the access log, and no span."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import msgspec
import pytest

from balancer import log
from tests.actors import Upstream, chunk, openai_events
from tests.gateway.told import telling
from tests.gateway.trails import WAYS, Walked, a_document, a_post
from tests.otlp import Collector

PROMPT, COMPLETION = "canary-prompt-7f3a", "canary-completion-91bc"
CLIENT, ACCOUNT, OTHER = "canary-client-token-55d0", "canary-account-key-e20c", "canary-header-c4c4"
CANARY = b"canary"
ANSWER = (
    b'{"id":"c1","model":"m","choices":[{"message":{"content":"%b","tool_calls":[{"model":"%b"}]},"finish_reason":"stop"}],'
    b'"usage":{"prompt_tokens":11,"completion_tokens":7}}' % (COMPLETION.encode(), COMPLETION.encode())
)
STREAM = [event.replace(b'"w1"', b'"%b"' % COMPLETION.encode()) for event in openai_events()]
AUTHORIZED = f"Authorization: Bearer {CLIENT}"
SAME = [{"provider": "up", "model": "m"}, {"provider": "spare", "model": "m"}]
ENTRIES = [
    {"uuid": f"e{number}", "services": SAME, "ops": [{"position": position, "operation": operation, "value": value}]}
    for number, (position, operation, value) in enumerate(
        [
            ("system", "regex", "nowhere"),
            ("user", "type", "image"),
            ("tool_use", "contains", "nowhere"),
            ("latest_user", "regex", "c.n.ry-prompt-7f3a$"),
            ("user", "any_contains", "nowhere"),
        ]
    )
]
MESSAGES = [{"role": "user", "content": PROMPT}]


def asks() -> list[bytes]:
    """Requests of all kinds, each with something that is nobody's business."""
    more: dict[str, Any] = {"messages": MESSAGES, "user": PROMPT, "metadata": {"model": PROMPT}}
    return [
        a_post("", AUTHORIZED, **more),
        a_post("", AUTHORIZED, stream=True, **more),
        a_post("", AUTHORIZED, f"x-secret: {OTHER}", f"Cookie: {OTHER}", f"baggage: k={OTHER}", **more),
        a_post("", AUTHORIZED, f"traceparent: {OTHER}", f"tracestate: {OTHER}", **more),
        a_post("", AUTHORIZED, path=f"/v1/chat/completions?api_key={OTHER}", **more),
        a_post("", AUTHORIZED, path=f"/v1/{OTHER}", **more),
        a_post("", AUTHORIZED, path=f"/{OTHER}/v1/messages", **more),
        a_post("", AUTHORIZED, body=b'{"model": "gpt", "messages": [{"content": "%b"' % PROMPT.encode()),
        a_post("", AUTHORIZED, body=PROMPT.encode()),
        a_post("", AUTHORIZED, model=PROMPT, messages=MESSAGES),
        a_post("", f"Authorization: Bearer {CLIENT}-wrong", **more),
        a_post("", f"x-api-key: {OTHER}", **more),
        a_post("", AUTHORIZED, f"x-long: {OTHER * 800}", **more),
        a_post("", AUTHORIZED, f"X-Long: {OTHER * 8000}", **more),
        a_post("", AUTHORIZED, path="/v1/responses", input=PROMPT, previous_response_id=f"resp_{OTHER}"),
        f"GET /v1/responses/{OTHER} HTTP/1.1\r\nHost: x\r\n{AUTHORIZED}\r\n\r\n".encode(),
        f"GET /v1/models/{OTHER} HTTP/1.1\r\nHost: x\r\n{AUTHORIZED}\r\n\r\n".encode(),
        f"{OTHER.upper()} /v1/models HTTP/1.1\r\nHost: x\r\n{AUTHORIZED}\r\n\r\n".encode(),
        f"POST /v1/x HTTP/1.1\r\nHost: x\r\n{OTHER}\r\n\r\n".encode(),
    ]


def behaviours(upstream: Upstream) -> list[Any]:
    """What the upstream does, one after the other."""
    echo = f'{{"error":{{"message":"bad key {ACCOUNT}: {PROMPT}","type":"{ACCOUNT}","code":"{ACCOUNT}"}}}}'.encode()
    return [
        lambda: upstream.answers(body=ANSWER),
        lambda: upstream.streams(STREAM),
        lambda: upstream.echoes_its_credential(401),
        lambda: upstream.answers(500, echo, headers=(("x-error", ACCOUNT), ("Retry-After", ACCOUNT))),
        lambda: upstream.answers(body=echo),
        lambda: upstream.streams([b"data: " + echo + b"\n\n"]),
        lambda: upstream.sends(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n",
            chunk(STREAM[1]),
            resets=True,
        ),
        lambda: upstream.answers(body=b'{"model":"%b x","id":["%b"]' % (COMPLETION.encode(), ACCOUNT.encode())),
        lambda: upstream.sends(f"HTTP/1.1 {ACCOUNT}\r\n\r\n".encode()),
    ]


async def asked(walk: Walked, ask: bytes) -> None:
    """Asks on a connection of its own: some that went before are about to be closed."""
    walk.line = await walk._connected()
    await walk.ask(ask)


@pytest.mark.parametrize("way", WAYS)
async def test_nothing_of_a_body_a_header_or_a_credential_is_told(
    store_url: str, tmp_path: Path, upstream: Upstream, caplog: pytest.LogCaptureFixture, way: str
) -> None:
    caplog.set_level(logging.DEBUG)
    rule = {"retry": {"attempts": 2, "backoff_ms": 1}, "smart_enabled": True, "smart_routing": ENTRIES}
    document = a_document(upstream.url, rule=rule, token=ACCOUNT, breaker={"failures": 0, "ratio": 0})
    answered = 0
    async with (
        Collector().running() as collector,
        telling(store_url, tmp_path, document, way, collector, client_tokens=CLIENT) as told,
    ):
        for behave in behaviours(upstream):
            for ask in asks()[:4]:
                behave()
                await asked(told.walk, ask)
                answered += 1
        upstream.answers(body=ANSWER)
        for ask in asks():
            await asked(told.walk, ask)
            answered += 1
        lines = await told.lines(answered)

    assert len(collector.of("SERVER")) >= answered - 4  # What is no request has none.
    formatter = log._JsonLines()
    logged = "\n".join(formatter.format(record) for record in caplog.records if record.name.startswith("balancer"))
    assert CANARY not in logged.lower().encode()
    assert CANARY not in told.file.read_bytes().lower()
    assert CANARY not in collector.raw.lower()
    assert {line["outcome"] for line in lines} >= {"success", "rejected", "failed", "unauthorized"}
    assert any(CANARY in received.body for received in upstream.received), "they were there to be told"
    assert "user.any_contains (absent" in logged or "latest_user.regex (" in logged
    assert {line["entry"] for line in lines if "entry" in line} >= {"e3"}
    assert msgspec.json.decode(told.file.read_bytes().splitlines()[0])["event"] == "request"
