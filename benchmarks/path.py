"""What the gateway's own path costs: µs of CPU a request, and a stream, between the front and the upstream client.

`python -m benchmarks.path` prints them. No socket is opened and Redis is not asked: all that is measured is the reading
of the request, the course of its attempts, the relay of its answer, usage and settlement. `--profile` prints where the
time goes.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import pstats
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence

import msgspec

from balancer import document
from balancer.config import load
from balancer.dialects import Headers
from balancer.domain import Outcome, Pick, Provider, Rule, Usage
from balancer.gateway.forwarding import Forwarder
from balancer.gateway.handlers import Handlers, Recalled
from balancer.gateway.matching import Plans
from balancer.gateway.messages import ClientRequest, Take, UpstreamRequest
from balancer.metrics import Metrics
from balancer.store.pool import Asked
from balancer.store.registry import Directory, Snapshot, directory_of

_ROUNDS = 5
_REQUESTS = 3000
_STREAMS = 200
_EVENTS = 50

_CONFIGURATION = """
providers:
  - {name: up1, api_base: "http://127.0.0.1:9101/v1", token: sk-up-0123456789}
rules:
  - uuid: bench
    request_model: mock-model
    lb_tactic: {type: round_robin, params: {request_threshold: 1}}
    services: [{provider: up1, model: mock-model}]
"""
_CLIENT_HEADERS: Headers = (
    ("Host", "127.0.0.1:8080"),
    ("Accept", "application/json"),
    ("Content-Type", "application/json"),
    ("User-Agent", "OpenAI/Python 3.54.0"),
    ("X-Stainless-Lang", "python"),
    ("X-Stainless-Package-Version", "3.54.0"),
    ("X-Stainless-OS", "Linux"),
    ("X-Stainless-Arch", "x64"),
    ("X-Stainless-Runtime", "CPython"),
    ("Authorization", "Bearer client-token"),
    ("x-stainless-retry-count", "0"),
    ("x-stainless-read-timeout", "600"),
    ("Accept-Encoding", "gzip, deflate"),
    ("Connection", "keep-alive"),
    ("Content-Length", "331"),
)


class _Balance:
    """Picks the first service at once."""

    def __init__(self, directory: Directory) -> None:
        self._directory = directory
        self._number = 0

    def snapshot(self) -> Directory:
        return self._directory

    def cursor(self, rule: Rule) -> str:
        return ""

    async def recall(self, response_id: str, rule: Rule | None = None) -> Recalled | None:
        return None

    async def select(
        self,
        rule: Rule,
        *,
        reserved: int,
        deadline_ms: int,
        excluded: tuple[str, ...] = (),
        session: str = "",
        only: str = "",
        begun: Asked | None = None,
        variant: Callable[[Rule], Rule] | None = None,
        barred: tuple[str, ...] = (),
    ) -> tuple[Pick, Rule]:
        self._number += 1
        pick = Pick(
            pool=rule.pool,
            rule=rule.uuid,
            partition=rule.uuid,
            revision=1,
            number=self._number,
            service=rule.services[0].id,
            reason="next",
            seq=self._number,
            epoch=1,
            position=self._number,
            streak=1,
            is_switch=False,
            reserved=reserved,
        )
        return pick, rule

    def settle(
        self,
        pick: Pick,
        outcome: Outcome,
        usage: Usage | None,
        *,
        cooldown_ms: int = 0,
        first_token_us: int = 0,
        stream_us: int = 0,
    ) -> None:
        assert (outcome, usage) == (Outcome.SUCCESS, Usage(input=100, output=50))

    async def flushed(self, pool: str) -> None:
        pass

    async def settled(self, pick: Pick) -> None:
        pass

    async def remember(self, pick: Pick, response_id: str) -> None:
        pass


class Providers:
    """Accounts whose credentials are at hand."""

    def __init__(self, directory: Directory) -> None:
        self._directory = directory

    def provider(self, uuid: str) -> Provider | None:
        """The provider of that uuid."""
        return self._directory.provider(uuid)

    def access_token(self, provider: Provider) -> str:
        """Always the same."""
        return "sk-up-0123456789"

    def headers(self, provider: Provider) -> dict[str, str]:
        """None."""
        return {}

    def query(self, provider: Provider) -> dict[str, str]:
        """None."""
        return {}

    def proxy_url(self, provider: Provider) -> str:
        """None."""
        return ""


class _Response:
    status = 200
    is_at_end = False

    def __init__(self, headers: Headers, length: int | None, chunks: Sequence[bytes]) -> None:
        self.headers = headers
        self.length = length
        self._chunks = deque(chunks)

    def whole(self) -> bytes | None:
        return self._chunks[0] if len(self._chunks) == 1 else None

    async def read(self) -> bytes:
        return self._chunks.popleft() if self._chunks else b""

    async def pump(self, take: Take) -> bytes:
        while self._chunks:
            chunk = self._chunks.popleft()
            if not take(chunk):
                return chunk
        return b""

    async def close(self) -> None:
        pass


class _Upstream:
    def __init__(self) -> None:
        text = " ".join(["word"] * 100)
        self._json = msgspec.json.encode(
            {
                "id": "chatcmpl-mock",
                "object": "chat.completion",
                "model": "mock-model",
                "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
                "usage": {"prompt_tokens": 100, "completion_tokens": 50, "total_tokens": 150},
            }
        )
        self._events = [
            b"data: "
            + msgspec.json.encode(
                {
                    "id": "chatcmpl-mock",
                    "object": "chat.completion.chunk",
                    "model": "mock-model",
                    "choices": [{"index": 0, "delta": {"content": f" token{i}"}, "finish_reason": None}],
                }
            )
            + b"\n\n"
            for i in range(_EVENTS)
        ]
        self._events.append(
            b'data: {"id":"chatcmpl-mock","choices":[],"usage":{"prompt_tokens":100,"completion_tokens":50}}\n\n'
            b"data: [DONE]\n\n"
        )

    async def send(self, request: UpstreamRequest) -> _Response:
        if b'"stream": true' in request.body[:120]:
            headers = (("Content-Type", "text/event-stream"), ("Transfer-Encoding", "chunked"))
            return _Response(headers, None, self._events)
        length = str(len(self._json))
        return _Response((("Content-Type", "application/json"), ("Content-Length", length)), int(length), [self._json])

    async def close(self) -> None:
        pass


class _Stream:
    is_started = False
    status, client, body_bytes = 0, "", 0
    sent = 0

    def give_until(self, time: float) -> None: ...

    async def send(self, status: int, headers: tuple[tuple[str, str], ...], body: bytes) -> None:
        await self.start(status, headers, len(body))
        await self.write(body)
        await self.end()

    async def start(self, status: int, headers: Headers, length: int | None) -> None:
        assert status == 200
        self.is_started = True

    async def write(self, chunk: bytes) -> None:
        self.sent += len(chunk)

    def write_now(self, chunk: bytes, framed: bytes = b"", /) -> bool:
        self.sent += len(chunk)
        return True

    async def end(self, last: bytes = b"", /) -> None:
        self.sent += len(last)
        assert self.sent > 500

    def abort(self) -> None:
        raise AssertionError("the answer was whole")


def _body(*, pad: int = 0, stream: bool = False, usage: bool = True) -> bytes:
    head = b'{"model": "mock-model", "stream": true, ' if stream else b'{"model": "mock-model", '
    options = b'"stream_options": {"include_usage": true}, ' if stream and usage else b""
    text = b"Write one sentence about queues. " * (10 + pad // 33)
    return head + options + b'"messages": [{"role": "user", "content": "' + text + b'"}], "max_tokens": 64}'


def _handlers() -> Handlers:
    configuration = document.read(document.parse(_CONFIGURATION), door="strict").configuration
    directory = directory_of(Snapshot(revision=1, configuration=configuration, rule_revisions={}))
    metrics, balance = Metrics(), _Balance(directory)
    plans = Plans(balance.snapshot)
    forwarder = Forwarder(balance, Providers(directory), _Upstream(), metrics, plans, decision_headers=True)
    return Handlers(load({}), balance, forwarder, metrics, plans)


async def _spent(handlers: Handlers, body: bytes, count: int) -> float:
    """µs of CPU a request."""
    started = time.process_time()
    for _ in range(count):
        request = ClientRequest(
            method="POST",
            path="/v1/chat/completions",
            query="",
            headers=_CLIENT_HEADERS,
            body=body,
            request_id="0123456789abcdef",
        )
        await handlers.handle(request, _Stream())
    return (time.process_time() - started) / count * 1e6


async def _run(is_profiled: bool) -> None:
    handlers = _handlers()
    kinds = {
        "small": (_body(), _REQUESTS),
        "44 KB": (_body(pad=44_000), _REQUESTS),
        f"stream of {_EVENTS + 1} events": (_body(stream=True), _STREAMS),
        "stream, usage not asked for": (_body(stream=True, usage=False), _STREAMS),
    }
    spent: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(_ROUNDS):
        for name, (body, count) in kinds.items():
            spent[name].append(await _spent(handlers, body, count))
    print("| | µs of CPU |\n|---|--:|")
    for name, values in spent.items():
        print(f"| {name} | {statistics.median(values):.1f} |")
    for name, (body, count) in kinds.items() if is_profiled else ():
        profile = cProfile.Profile()
        profile.enable()
        await _spent(handlers, body, count)
        profile.disable()
        print(f"\n{name}")
        pstats.Stats(profile).sort_stats("tottime").print_stats(40)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profile", action="store_true")
    asyncio.run(_run(parser.parse_args().profile))


if __name__ == "__main__":
    main()
