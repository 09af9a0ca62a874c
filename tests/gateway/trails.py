"""What a gateway does with the same requests by each of its ways, and where the express way was left."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import ssl
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
import redis
from prometheus_client.parser import text_string_to_metric_families

from balancer import document
from balancer.gateway import express
from balancer.gateway.attempts import Attempt
from balancer.gateway.forwarding import Begun
from balancer.gateway.front_server import Server
from balancer.gateway.lane import Lane, Lanes, Work
from balancer.gateway.lane_head import Head
from balancer.gateway.messages import ClientRequest, WayBack
from balancer.gateway.upstream.answer import Answer
from balancer.store import connection
from balancer.store.credentials import Sealer
from balancer.store.publishing import publish_file
from balancer.store.registry import Registry
from balancer.store.views import PoolView
from tests.actors import Upstream
from tests.gateway.conftest import KEY, SEALING_KEY, Served, serving
from tests.gateway.wire import PATIENCE_S, Line, a_line, answers_in
from tests.gateway.wire import Answer as Told
from tests.store.conftest import eventually

WAYS = ("express", "lane", "aiohttp")
"""With all that is there, without the express way, and without the lane."""
CHAT = "/v1/chat/completions"
_OF_THE_MOMENT = ("date", "content-length", "transfer-encoding")
_UNHURRIED = {"redis_deadline_ms": 10_000}


def a_document(url: str, *, rule: dict[str, Any] | None = None, **provider: Any) -> dict[str, Any]:
    """Rule `gpt` over `up:m` and `spare:m`, which serves what `up` does not, and `claude` over `ant:m`."""
    options: dict[str, Any] = {"api_base": url, "token": KEY} | provider
    more = {"retry": {"backoff_ms": 1}, "lb_tactic": {"type": "round_robin", "params": {"request_threshold": 1000}}}
    return {
        "providers": [
            {"name": "up", "api_style": "openai"} | options,
            {"name": "spare", "api_style": "openai"} | options,
            {"name": "ant", "api_style": "anthropic"} | options,
        ],
        "rules": [
            {
                "uuid": "gpt",
                "request_model": "gpt",
                "services": [{"provider": "up", "model": "m"}, {"provider": "spare", "model": "m"}],
            }
            | more
            | (rule or {}),
            {
                "uuid": "claude",
                "scenario": "anthropic",
                "request_model": "claude",
                "services": [{"provider": "ant", "model": "m"}],
            }
            | more,
        ],
    }


def a_post(
    request_id: str = "", *lines: str, path: str = CHAT, body: bytes | None = None, model: str = "gpt", **more: Any
) -> bytes:
    """A request's bytes; `more` stands in its body."""
    if body is None:
        body = msgspec.json.encode({"model": model, "messages": [{"role": "user", "content": "hello"}]} | more)
    named = [f"x-request-id: {request_id}"] if request_id else []
    head = [f"POST {path} HTTP/1.1", "Host: gateway", "Content-Type: application/json", *named, *lines]
    return "\r\n".join([*head, f"Content-Length: {len(body)}", "", ""]).encode() + body


class Trail:
    """For each request by its id, how it was answered: by the `express` way, or by the `ordinary` one from its start.

    Or the stage at which the ordinary way took over: `select`, `send`, `answer`, or a `fault` of ours.
    """

    def __init__(self) -> None:
        self.stages: dict[str, str] = {}
        self.ways: list[express.Way] = []

    def begun(self, work: Work | None) -> None:
        """Notes what the lane was given."""
        if work is not None:
            assert isinstance(work, express.Way)
            self.ways.append(work)
            self.stages[work.request_id] = "express"

    def handled(self, request: ClientRequest, begun: Begun | None) -> None:
        """Notes what the handlers were given; nothing else is told of an answer that they get."""
        if begun is not None and begun.answer is not None:
            assert isinstance(begun.answer, Answer)
            assert begun.answer.on_news is None
        self.stages[request.request_id] = _stage(begun)


def _stage(begun: Begun | None) -> str:
    if begun is None:
        return "ordinary"
    if begun.error is not None:
        return "fault"
    if begun.attempt is None:
        return "select"
    if begun.answer is None:
        return "send"
    return "answer" if begun.events is None else "stream"


class Walked(Served):
    """A running gateway whose requests leave a trail, and the client's connection to it."""

    trail: Trail
    line: Line
    store_url: str
    tls: ssl.SSLContext | None
    lines_made: list[contextlib.AbstractAsyncContextManager[Line]]

    @property
    def lanes(self) -> Lanes:
        """The lane's connections."""
        lanes = _server(self).lanes
        assert lanes is not None
        return lanes

    @property
    def lane(self) -> Lane:
        """The only one."""
        (lane,) = self.lanes.open
        return lane

    @property
    def open_requests(self) -> int:
        """How many requests the gateway counts as open."""
        return self.gateway._open_requests

    async def ask(self, *pieces: bytes, answers: int = 1) -> list[Told]:
        """What comes back for the pieces, on a connection that is made anew when the last is closed."""
        if self.line.closed.done():
            self.line = await self._connected()
        line = self.line
        line.held.clear()
        await line.send(*pieces)
        got = await come(line, answers) if pieces else []
        if got and got[-1].header("connection") == "close":
            assert await line.until_closed()
        return got

    async def _connected(self) -> Line:
        line = a_line(self.url, self.tls)
        self.lines_made.append(line)
        return await line.__aenter__()

    async def publishes(self, raw: dict[str, Any], *, is_heard: bool = False) -> None:
        """Has the configuration changed, of which this worker does not hear until it asks, unless it `is_heard`."""
        follower = self.gateway.balance._follower
        if not is_heard:
            for task in follower._tasks:
                task.cancel()
            await asyncio.gather(*follower._tasks, return_exceptions=True)
        client = connection.client(self.store_url)
        await publish_file(Registry(client), document.read(raw, door="strict").configuration, Sealer(SEALING_KEY))
        await client.aclose()

    def counters(self) -> dict[str, float]:
        """All that was counted: each series that is not 0, and of each histogram how many it holds."""
        text = self.gateway.metrics.exposition().decode()
        return {
            f"{sample.name}{sorted(sample.labels.values())}": sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name.startswith("balancer_") and sample.name.endswith(("_total", "_count")) and sample.value
        }

    async def settled_view(self) -> PoolView:
        """The pool once all that was picked is settled. Fails when something stays in flight or reserved."""

        async def is_over() -> bool:
            view = await self.view()
            return not any(service.in_flight or service.reserved for service in view.services.values())

        await eventually(is_over)
        await self.acknowledged()
        return await self.view()

    async def acknowledged(self) -> None:
        """Returns when Redis has taken all that was settled."""
        for pool in self.gateway.balance._pools.values():
            assert await pool.acknowledged(PATIENCE_S)

    async def books(self) -> Books:
        """What was counted, once nothing is in flight, reserved, open, or waited for any more."""
        view = await self.settled_view()
        await eventually(self._is_quiet)
        return Books(
            services={
                name: [s.picks, s.requests, s.failures, s.input, s.output, s.cached, s.reasoning, s.lost]
                for name, s in view.services.items()
            },
            counters=self.counters(),
        )

    async def _is_quiet(self) -> bool:
        server = _server(self)
        is_resting = server.lanes is None or not server.lanes._working
        pools = self.gateway.balance._pools.values()
        return is_resting and not self.open_requests and not any(pool._waiting for pool in pools)


class Books(msgspec.Struct, kw_only=True):
    """Of each service picks, settled requests, failures, tokens in, out, cached, reasoning, lost; and the metrics."""

    services: dict[str, list[int]]
    counters: dict[str, float]


def _server(served: Served) -> Server:
    server = served.gateway._runners[0].server
    assert isinstance(server, Server)
    return server


@contextlib.asynccontextmanager
async def walked(
    store_url: str,
    data_dir: Path,
    raw: dict[str, Any],
    way: str = "express",
    *,
    redis_url: str = "",
    late_s: float = 60.0,
    tls: ssl.SSLContext | None = None,
    **flags: Any,
) -> AsyncIterator[Walked]:
    """A gateway that serves by this way on an emptied store, which it reaches at `redis_url`, until the block ends.

    No request is `late` for the express way for a machine that is loaded.
    """
    with redis.Redis.from_url(store_url) as client:
        client.flushall()
    flags = _UNHURRIED | {"fast_lane": way != "aiohttp"} | flags
    async with serving(redis_url or store_url, data_dir, raw, **flags) as served:
        walk = Walked(served.gateway, served.url, served.session)
        walk.trail, walk.store_url, walk.tls, walk.lines_made = Trail(), store_url, tls, []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(express, "_LATE_S", late_s)
            _mark(walk, way, patch)
            walk.line = await walk._connected()
            try:
                yield walk
            finally:
                for line in walk.lines_made:
                    await line.__aexit__(None, None, None)


def _mark(walk: Walked, way: str, patch: pytest.MonkeyPatch) -> None:
    """Makes requests leave a trail."""
    trail, handlers, lanes = walk.trail, walk.gateway._handlers, _server(walk).lanes
    handle = handlers.handle

    async def noted(request: ClientRequest, stream: WayBack, begun: Begun | None = None) -> None:
        trail.handled(request, begun)
        await handle(request, stream, begun)

    patch.setattr(handlers, "handle", noted)
    if lanes is None:
        return
    begin = lanes.begin
    assert begin is not None

    def begun(lane: Lane, head: Head, body: bytes, is_last: bool) -> Work | None:
        work = begin(lane, head, body, is_last)
        trail.begun(work)
        return work

    patch.setattr(lanes, "begin", begun if way == "express" else None)


async def come(line: Line, count: int) -> list[Told]:
    """The answers on a connection, once so many are whole, or it is closed."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            held = bytes(line.held)
            if line.closed.done():
                return answers_in(held)
            with contextlib.suppress(AssertionError):  # Half a head has no meaning yet.
                answers = [answer for answer in answers_in(held) if answer.is_whole]
                if len(answers) >= count:
                    return answers
            await asyncio.sleep(0.001)


def told(answers: Sequence[Told]) -> list[tuple[int, list[tuple[str, str]], bytes, bool]]:
    """What a client makes of answers, however they were framed and whenever they were given."""
    return [(answer.status, sorted(_lasting(answer)), answer.body, answer.is_whole) for answer in answers]


def _lasting(answer: Told) -> Iterator[tuple[str, str]]:
    for name, value in answer.headers:
        lower = name.lower()
        if lower not in _OF_THE_MOMENT:
            yield lower, "later" if lower == "retry-after" else value


def seen(upstream: Upstream) -> list[tuple[str, list[tuple[str, str]], bytes]]:
    """What an upstream was sent."""
    return [(one.target, sorted((n.lower(), v) for n, v in one.headers), one.body) for one in upstream.received]


@contextlib.asynccontextmanager
async def nothing_left(served: Walked) -> AsyncIterator[None]:
    """Fails when what is done in the block leaves something of a request, or a cycle for the collector to find."""
    await served.books()
    served.trail.ways.clear()
    gc.collect()
    gc.disable()
    try:
        yield
        await served.books()
        served.trail.ways.clear()
        assert [one for one in gc.get_objects() if isinstance(one, express.Way | Attempt | Begun)] == []
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        assert [one for one in gc.garbage if is_ours(one)] == []
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


def is_ours(one: object) -> bool:
    """True for what the program has made."""
    made_by = getattr(one, "__module__", None) or type(one).__module__
    return isinstance(made_by, str) and made_by.startswith("balancer")
