"""What a worker's own code costs for the usual request: µs of its CPU, from the client's bytes to the client's bytes.

`python -m benchmarks.express` prints them, for a number of requests that come in one turn of the loop. The whole way is
walked: lane, selection, upstream connection, answer, usage, settle. Only the kernel is left out, and Redis, and the
writing and reading of its protocol: clients, upstream and Redis are stood in for by what would be in their sockets.
`--access-log` and `--otel RATIO` turn on what tells of requests: lines go to /dev/null, that share of traces to a
collector in another process; the threads' CPU is counted too. `--smart` gives the rule an entry that each request
matches, by its model's name, or by a fact for which messages are decoded. `--opcodes` prints how many instructions of
the interpreter each function takes: no other load on the machine changes that.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import cProfile
import gc
import math
import os
import pstats
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any

import msgspec

from balancer import document, tracing
from balancer.access import AccessLog
from balancer.cli.worker import keep_freed_memory
from balancer.config import load
from balancer.gateway import express as express_way
from balancer.gateway.express import Express
from balancer.gateway.forwarding import Forwarder
from balancer.gateway.handlers import Handlers
from balancer.gateway.lane import Lane, Lanes
from balancer.gateway.matching import Plans
from balancer.gateway.upstream import UpstreamClient
from balancer.gateway.upstream.connection import Connection
from balancer.gateway.upstream.request import Origin
from balancer.gateway.watched import way_of
from balancer.gateway.witness import Watch
from balancer.metrics import Metrics
from balancer.store.balance import Balance, BalanceEvents
from balancer.store.pool import PoolClient, PoolEvents
from balancer.store.registry import Snapshot, directory_of
from benchmarks.collector import collecting
from benchmarks.path import Providers

_ROUNDS, _REQUESTS = 60, 800
_CONFIGURATION = """
providers:
  - {name: up1, api_base: "http://127.0.0.1:9101/v1", token: sk-up-0123456789}
rules:
  - uuid: bench
    request_model: mock-model
    lb_tactic: {type: round_robin, params: {request_threshold: 1}}
    services: [{provider: up1, model: mock-model}]
"""
_ENTRY = """
    smart_enabled: true
    smart_routing:
      - uuid: bench
        ops: [%s]
        services: [{provider: up1, model: mock-model}]
"""
_OPS = {
    "model": "{position: model, operation: glob, value: 'mock-*'}",
    "token": "{position: token, operation: ge, value: 10}",
}


class _Transport(asyncio.Transport):
    """Keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[bytes] = []

    def write(self, data: Any) -> None:
        self.written.append(data)

    def is_closing(self) -> bool:
        return False

    def get_write_buffer_size(self) -> int:
        return 0

    def abort(self) -> None:
        """An idle connection's time is over: it is used on."""


class _Link:
    """Keeps the calls of the script, to be answered."""

    is_up = is_connected = True
    is_idle = is_moving = False

    def __init__(self) -> None:
        self.calls: list[tuple[tuple[Any, ...], Callable[[Any], None]]] = []

    def post_call(self, script: object, command: tuple[Any, ...], on_reply: Callable[[Any], None]) -> None:
        self.calls.append((command, on_reply))

    def flush(self) -> None: ...


class _Connection(Connection):
    __slots__ = ()

    def _has_news(self, transport: asyncio.Transport) -> bool:
        return False


class _Worker:
    """A worker with so many clients, each of which asks again as soon as it is answered."""

    def __init__(self, clients: int, body_bytes: int, watch: Watch | None = None, smart: str = "") -> None:
        loop, settings, metrics = asyncio.get_running_loop(), load({}), Metrics()
        text = _CONFIGURATION + (_ENTRY % _OPS[smart] if smart else "")
        configuration = document.read(document.parse(text), door="strict").configuration
        directory = directory_of(Snapshot(revision=1, configuration=configuration, rule_revisions={}))
        balance = Balance("redis://127.0.0.1:1", settings, BalanceEvents(selected=metrics.select_s))
        balance._follower.directory = directory
        self._pool = balance._pools["default"] = PoolClient(
            balance._topology,
            "default",
            balance.worker,
            deadline_ms=250,
            lease_ms=30_000,
            scripts_dir=settings.scripts_dir,
            events=PoolEvents(),
        )
        self._link = _Link()
        self._pool._link = self._link  # type: ignore[assignment]
        self._position = 0
        upstream, plans = UpstreamClient(1000), Plans(balance.snapshot)
        drops = tracing.CONTEXT_HEADERS if watch is not None and watch.tracing is not None else frozenset[str]()
        providers = Providers(directory)
        forwarder = Forwarder(balance, providers, upstream, metrics, plans, decision_headers=True, drops=drops)
        handlers = Handlers(settings, balance, forwarder, metrics, plans, watch)
        lanes = Lanes(handlers.handle, asyncio.Protocol, 2**20, lambda: False)
        express = Express(
            handlers,
            forwarder,
            balance,
            upstream,
            plans,
            metrics,
            opened=lambda: None,
            closed=lambda: None,
            decision_headers=True,
            way=way_of(watch),
            watch=watch,
        )
        express_way._LATE_S = math.inf  # On a busy machine some turns take as long.
        lanes.begin = express.begin
        connections = upstream._new_pool(Origin("http", "127.0.0.1", 9101, ""))
        self._connections: list[tuple[Connection, _Transport]] = []
        self._lanes: list[tuple[Lane, _Transport]] = []
        for _ in range(clients):
            connection, sent = (
                _Connection(loop, upstream._buffer, first=lambda _: None, freed=connections.free, lost=lambda _: None),
                _Transport(),
            )
            connection.connection_made(sent)
            connections.reserve()
            connections.free(connection)
            self._connections.append((connection, sent))
            lane, answered = lanes(), _Transport()
            lane.connection_made(answered)
            self._lanes.append((lane, answered))
        self._request, self._answer = _request(body_bytes), _answer()

    async def run(self, requests: int) -> float:
        """µs of CPU for one of so many requests."""
        began, done = time.process_time(), 0
        while done < requests:
            for lane, _ in self._lanes:
                lane._receive(self._request)
            await asyncio.sleep(0)
            self._answer_calls()
            for connection, sent in self._connections:
                if sent.written:
                    sent.written.clear()
                    connection.data_received(self._answer)
            await asyncio.sleep(0)
            self._answer_calls()
            for _, answered in self._lanes:
                assert len(answered.written) == 1, "each has its answer"
                answered.written.clear()
            done += len(self._lanes)
        return (time.process_time() - began) / done * 1e6

    def _answer_calls(self) -> None:
        calls, self._link.calls = self._link.calls, []
        for command, on_reply in calls:
            reply: list[Any] = [[b"applied", self._pool.outbox.last_number, 1, self._position, 0]]
            for _ in msgspec.msgpack.decode(command[-1])[-1]:
                self._position += 1
                reply.append([b"pick", b"up1:mock-model", b"next", self._position, 1, self._position, 1, 0])
            on_reply(reply)


def _request(body_bytes: int) -> bytes:
    text = b"Write one sentence about queues. " * (body_bytes // 33)
    body = b'{"model": "mock-model", "messages": [{"role": "user", "content": "' + text + b'"}], "max_tokens": 64}'
    return (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:8080\r\nAccept: application/json\r\n"
        b"Content-Type: application/json\r\nAuthorization: Bearer client\r\nUser-Agent: OpenAI/Python 3.54.0\r\n"
        b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
    )


def _answer() -> bytes:
    body = msgspec.json.encode(
        {
            "id": "chatcmpl-mock",
            "object": "chat.completion",
            "model": "mock-model",
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": " ".join(["word"] * 100)},
                    "finish_reason": "stop",
                }
            ],
            "usage": {"prompt_tokens": 100, "completion_tokens": 50, "total_tokens": 150},
        }
    )
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nx-request-id: req_1\r\nContent-Length: %d\r\n\r\n"
    return head % len(body) + body


def _watch(options: argparse.Namespace, collector: str) -> Watch | None:
    """What tells of requests, as the options have it."""
    if not options.access_log and not collector:
        return None
    access = AccessLog(os.open(os.devnull, os.O_WRONLY)) if options.access_log else None
    if not collector:
        return Watch(access, None)
    os.environ |= {
        "OTEL_EXPORTER_OTLP_ENDPOINT": collector,
        "OTEL_TRACES_SAMPLER": "traceidratio",
        "OTEL_TRACES_SAMPLER_ARG": str(options.otel),
        "OTEL_BSP_MAX_QUEUE_SIZE": "100000",  # None is to be dropped: that would be cheap.
    }
    configuration = document.read(document.parse(_CONFIGURATION), door="strict").configuration
    named = {provider.uuid: provider for provider in configuration.providers}
    return Watch(access, tracing.start("1.41", "bench", named.get))


async def _time(options: argparse.Namespace, watch: Watch | None) -> None:
    print("| requests a turn | body | µs of CPU, least | median |\n|--:|--:|--:|--:|")
    for clients in options.clients:
        for body_bytes in (330, 44_000):
            worker = _Worker(clients, body_bytes, watch, options.smart)
            await worker.run(2000)
            gc.collect()
            gc.freeze()
            keep_freed_memory()
            spent = [await worker.run(_REQUESTS) for _ in range(_ROUNDS)]
            print(f"| {clients} | {body_bytes} | {min(spent):.1f} | {statistics.median(spent):.1f} |", flush=True)


async def _profile(options: argparse.Namespace, watch: Watch | None) -> None:
    worker = _Worker(options.clients[-1], 330, watch, options.smart)
    await worker.run(2000)
    profile = cProfile.Profile()
    profile.enable()
    await worker.run(8000)
    profile.disable()
    pstats.Stats(profile).sort_stats("tottime").print_stats(45)


async def _count(options: argparse.Namespace, watch: Watch | None) -> None:
    worker, requests = _Worker(options.clients[-1], 330, watch, options.smart), 400
    await worker.run(2000)
    counts: Counter[CodeType] = Counter()

    def trace(frame: FrameType, event: str, _: object) -> Any:
        if event == "call":
            frame.f_trace_opcodes, frame.f_trace_lines = True, False
        elif event == "opcode":
            counts[frame.f_code] += 1
        return trace

    sys.settrace(trace)
    await worker.run(requests)
    sys.settrace(None)
    print(f"{counts.total() / requests:.0f} instructions a request")
    for code, count in counts.most_common(60):
        print(f"{count / requests:7.1f} {code.co_qualname} ({code.co_filename.rpartition('/')[2]})")


def main() -> None:
    """Prints the table, a profile, or counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--opcodes", action="store_true")
    parser.add_argument("--access-log", action="store_true")
    parser.add_argument("--otel", type=float, metavar="RATIO")
    parser.add_argument("--smart", choices=tuple(_OPS), default="")
    options = parser.parse_args()
    measure = _profile if options.profile else _count if options.opcodes else _time
    with collecting() if options.otel is not None else contextlib.nullcontext("") as collector:

        async def run() -> None:
            watch = _watch(options, collector)
            await measure(options, watch)
            if watch is not None and watch.tracing is not None:
                watch.tracing.close().wait(30)

        asyncio.run(run())


if __name__ == "__main__":
    main()
