"""Rules whose services speak other APIs than their clients, and what such services say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import aiohttp
import msgspec

from tests.actors import Upstream
from tests.gateway.conftest import KEY

CHAT, MESSAGES, RESPONSES = "/v1/chat/completions", "/v1/messages", "/v1/responses"
MESSAGE = (
    b'{"id":"msg_1","type":"message","role":"assistant","model":"claude-real","content":[{"type":"text","text":"hi"}],'
    b'"stop_reason":"end_turn","stop_sequence":null,"usage":{"input_tokens":9,"cache_read_input_tokens":2,'
    b'"output_tokens":7}}'
)
GENERATED = (
    b'{"candidates":[{"content":{"role":"model","parts":[{"text":"hi"}]},"finishReason":"STOP","index":0}],'
    b'"usageMetadata":{"promptTokenCount":11,"candidatesTokenCount":5,"thoughtsTokenCount":2,"totalTokenCount":18},'
    b'"modelVersion":"gemini-real","responseId":"r1"}'
)


def generated_events(words: int = 3) -> list[bytes]:
    """The events of a stream of Google's."""

    def event(value: dict[str, Any]) -> bytes:
        return b"data: %b\r\n\r\n" % msgspec.json.encode(value | {"modelVersion": "gemini-real", "responseId": "r1"})

    def of(text: str, **more: Any) -> dict[str, Any]:
        return {"candidates": [{"content": {"role": "model", "parts": [{"text": text}]}, "index": 0} | more]}

    usage = {"usageMetadata": {"promptTokenCount": 11, "candidatesTokenCount": 7, "totalTokenCount": 18}}
    return [*(event(of(f"w{i}")) for i in range(words)), event(of("", finishReason="STOP") | usage)]


def a_mixed_document(*upstreams: Upstream, rules: dict[str, dict[str, Any]], **provider: Any) -> dict[str, Any]:
    """Rules by their names, each with a list of `services` like `ant0` (of the first upstream), `oai1`, `goo0`.

    A rule's services take turns, unless it says otherwise.
    """
    styles = {"oai": "openai", "ant": "anthropic", "goo": "google"}
    providers = [
        {"name": f"{name}{number}", "api_style": style, "api_base": upstream.url, "token": KEY} | provider
        for number, upstream in enumerate(upstreams)
        for name, style in styles.items()
    ]
    made = [_rule(name, dict(rule)) for name, rule in rules.items()]
    named = msgspec.json.encode(made).decode()
    return {"providers": [each for each in providers if f'"{each["name"]}"' in named], "rules": made}


def _rule(name: str, rule: dict[str, Any]) -> dict[str, Any]:
    services = [
        {"provider": service, "model": "up-model"} if isinstance(service, str) else service
        for service in rule.pop("services")
    ]
    tactic = {"type": "round_robin", "params": {"request_threshold": 1}}
    return {
        "uuid": name,
        "request_model": name,
        "lb_tactic": tactic,
        "services": services,
        "retry": {"backoff_ms": 1},
    } | rule


def told(body: bytes) -> list[tuple[str, Any]]:
    """A stream's events: their names and their data, a text where it is no JSON."""
    events = []
    for block in body.replace(b"\r\n", b"\n").split(b"\n\n"):
        lines = [line.partition(b":") for line in block.split(b"\n") if line]
        name = b"".join(value.strip() for field, _, value in lines if field == b"event").decode()
        data = b"\n".join(value.strip() for field, _, value in lines if field == b"data")
        if data:
            events.append((name, msgspec.json.decode(data) if data[:1] == b"{" else data.decode()))
        elif block.startswith(b":"):
            events.append(("comment", block.decode()))
    return events


async def until(answer: aiohttp.ClientResponse, is_there: Callable[[bytes], bool]) -> bytes:
    """What has come of an answer once it is there."""
    seen = b""
    while not is_there(seen):
        more = await answer.content.readany()
        assert more, f"the answer has ended: {seen!r}"
        seen += more
    return seen
