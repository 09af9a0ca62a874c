"""How the express way ends before its time: its client leaves, the worker drains, or something of ours is at fault.

Whenever that is, what was picked is settled once, nothing is left behind, and other requests are none the wiser.
"""

from __future__ import annotations

import asyncio
import contextlib
import pkgutil
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from balancer.gateway.lane import Lane
from balancer.gateway.upstream.connection import Connection
from balancer.store.balance import Balance
from tests.actors import OPENAI_JSON, Upstream
from tests.faults import FaultProxy
from tests.gateway.conftest import decoded
from tests.gateway.trails import WAYS, Books, Walked, a_document, a_post, come, nothing_left, walked
from tests.gateway.wire import Answer, a_line, in_pieces
from tests.store.conftest import eventually

ON_BOTH_LOOPS = True
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(OPENAI_JSON)
ERROR = b'{"error":{"message":"no","type":"server_error","code":"x"}}'
ONE_SERVICE: dict[str, Any] = {"services": [{"provider": "up", "model": "m"}], "retry": {"attempts": 1}}


class Scene(msgspec.Struct, kw_only=True):
    """A gateway that has answered a first request, its upstream, and what is between it and Redis."""

    served: Walked
    upstream: Upstream
    proxy: FaultProxy
    patch: pytest.MonkeyPatch
    read: list[int]
    """How much the gateway has read of upstreams, time after time."""

    def send(self) -> None:
        """Sends the request that will not come to its end."""
        self.served.line.transport.write(a_post("cut"))

    async def lives(self) -> None:
        """Asks once more, as if nothing had been."""
        self.upstream.answers()
        (last,) = await self.served.ask(a_post("last"))
        assert (last.status, last.body) == (200, OPENAI_JSON)


Staging = Callable[..., contextlib.AbstractAsyncContextManager[Scene]]


@pytest.fixture
def staged(store_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Staging:
    """Sets a scene."""

    @contextlib.asynccontextmanager
    async def scene(way: str = "express", **rule: Any) -> AsyncIterator[Scene]:
        async with Upstream().running() as upstream, FaultProxy(store_url, tmp_path / "p.sock").running() as proxy:
            raw, read, reads = a_document(upstream.url, rule=ONE_SERVICE | rule), list[int](), Connection._read

            def noted(self: Connection, data: bytes | memoryview) -> None:
                read.append(len(data))
                reads(self, data)

            monkeypatch.setattr(Connection, "_read", noted)
            with pytest.MonkeyPatch.context() as patch:
                async with walked(store_url, tmp_path, raw, way, redis_url=proxy.url) as served:
                    (first,) = await served.ask(a_post("first"))
                    assert first.status == 200
                    yield Scene(served=served, upstream=upstream, proxy=proxy, patch=patch, read=read)

    return scene


# -- it is cut off -----------------------------------------------------------------------------------------------------


async def is_true(value: bool) -> bool:
    """For `eventually`."""
    return value


async def before_its_pick(scene: Scene) -> None:
    scene.proxy.blackholes()
    scene.send()
    (pool,) = scene.served.gateway.balance._pools.values()
    await eventually(lambda: is_true(bool(pool._waiting)))


async def before_its_answer(scene: Scene) -> None:
    scene.upstream.stalls()
    scene.send()
    await scene.upstream.stalled.wait()


async def in_its_head(scene: Scene) -> None:
    await _in_its_answer(scene, HEAD[:40])


async def behind_its_head(scene: Scene) -> None:
    await _in_its_answer(scene, HEAD)


async def in_its_body(scene: Scene) -> None:
    await _in_its_answer(scene, HEAD + OPENAI_JSON[:70])


async def _in_its_answer(scene: Scene, part: bytes) -> None:
    until = sum(scene.read) + len(part)
    scene.upstream.sends(part, stalls=True)
    scene.send()
    await eventually(lambda: is_true(sum(scene.read) == until))


async def before_its_settle_is_written(scene: Scene) -> None:
    is_settled, when_flushed = asyncio.Event(), Balance.when_flushed

    async def flushed(*_: Any) -> None:
        is_settled.set()
        await asyncio.Event().wait()

    def flushed_some_time(self: Balance, pool: str, then: Callable[[], None]) -> None:
        is_settled.set()
        asyncio.get_running_loop().call_later(0.05, when_flushed, self, pool, then)

    scene.patch.setattr(Balance, "flushed", flushed)
    scene.patch.setattr(Balance, "when_flushed", flushed_some_time)
    scene.send()
    await is_settled.wait()


class Cut(msgspec.Struct, kw_only=True):
    """What is there once a request was cut off: how its attempt ended, how often its service was picked, tokens."""

    stage: Callable[[Scene], Awaitable[None]]
    outcome: str
    reaches_upstream: bool = True


CUTS = {
    "before its pick": Cut(stage=before_its_pick, outcome="", reaches_upstream=False),
    "before its answer": Cut(stage=before_its_answer, outcome="cancelled"),
    "in its head": Cut(stage=in_its_head, outcome="cancelled"),
    "behind its head": Cut(stage=behind_its_head, outcome="cancelled"),
    "in its body": Cut(stage=in_its_body, outcome="cancelled"),
    "before its settle is written": Cut(stage=before_its_settle_is_written, outcome="success"),
}


async def cut_off(staged: Staging, cut: Cut, way: str, how: str) -> Books:
    async with staged(way) as scene:
        served = scene.served
        await cut.stage(scene)
        if how == "client":
            served.line.transport.abort()
            if way == "aiohttp":
                await eventually(lambda: is_true(not served.open_requests))
            else:
                await eventually(lambda: is_true(not served.lanes.open))
        else:
            await served.lanes.close(0.01)
            assert await served.line.until_closed()
        scene.proxy.passes()
        scene.patch.undo()
        books = await served.books()
        assert len(scene.upstream.received) == 1 + cut.reaches_upstream
        if way == "express":
            (work,) = served.trail.ways[1:]
            assert (served.trail.stages["cut"], work.is_over) == ("express", True)
        if how == "client":
            await scene.lives()
        return books


@pytest.mark.parametrize("how", ["client", "drain"])
@pytest.mark.parametrize("name", CUTS)
async def test_a_request_that_is_cut_off_is_settled_as_on_the_ordinary_way(
    staged: Staging, name: str, how: str
) -> None:
    cut = CUTS[name]
    ours = await cut_off(staged, cut, "express", how)
    for way in WAYS[1:] if how == "client" else ["lane"]:
        assert ours == await cut_off(staged, cut, way, how)
    assert ours.counters["balancer_requests_total['cancelled', 'gpt', 'openai']"] == 1
    if cut.outcome:
        outcomes = sorted(["default", "gpt", cut.outcome, "up:m"])
        assert ours.counters[f"balancer_attempts_total{outcomes}"] == 1 + (cut.outcome == "success")


async def test_who_leaves_before_its_pick_leaves_nothing_behind(staged: Staging) -> None:
    """A selection that was given up and its request once held each other."""
    async with staged() as scene, nothing_left(scene.served):
        for _ in range(5):
            await scene.served.ask()
            await before_its_pick(scene)
            scene.served.line.transport.abort()
            await eventually(lambda: is_true(not scene.served.lanes.open))
            scene.proxy.passes()
            await scene.served.books()


# -- it is cut off in the very tick in which the ordinary way takes over -----------------------------------------------


async def nothing_is_picked(scene: Scene) -> None:
    pass


async def no_connection_is_left(scene: Scene) -> None:
    for connection in tuple(scene.served.gateway._upstream._connections):
        connection.drop()


async def an_error_is_answered(scene: Scene) -> None:
    scene.upstream.answers(500, ERROR)


async def an_answer_is_cut(scene: Scene) -> None:
    scene.upstream.sends(HEAD + OPENAI_JSON[:70])


async def an_answer_is_large(scene: Scene) -> None:
    scene.upstream.sends(HEAD.replace(b": %d" % len(OPENAI_JSON), b": 100000") + b"{" * 60_000, stalls=True)


async def something_is_at_fault(scene: Scene) -> None:
    scene.patch.setattr("balancer.gateway.express.bodies.replace_model", fails)


def fails(*_: Any, **__: Any) -> Any:
    raise RuntimeError("the test's own fault")


OVER = {
    "nothing is picked": (nothing_is_picked, "select", "", 0),
    "no connection is left": (no_connection_is_left, "send", "cancelled", 0),
    "an error is answered": (an_error_is_answered, "answer", "cancelled", 1),
    "an answer is cut": (an_answer_is_cut, "answer", "cancelled", 1),
    "an answer is large": (an_answer_is_large, "answer", "cancelled", 1),
    "something is at fault": (something_is_at_fault, "fault", "failed", 0),
}


@pytest.mark.parametrize("name", OVER)
async def test_a_client_may_leave_before_the_ordinary_way_has_begun(staged: Staging, name: str) -> None:
    """The request's picks and times were once counted twice."""
    happens, stage, outcome, sent = OVER[name]
    rule = {"services": [{"provider": "up", "model": "m", "limits": {"rpm": 1}}]} if stage == "select" else {}
    async with staged(**rule) as scene:
        served, task, begun = scene.served, Lane.task, list[asyncio.Task[None]]()
        before = served.counters()

        def cut(self: Lane, *arguments: Any) -> asyncio.Task[None]:
            asyncio.get_running_loop().call_soon(self.break_off)
            begun.append(task(self, *arguments))
            return begun[-1]

        await happens(scene)
        scene.patch.setattr(Lane, "task", cut)
        scene.send()
        await eventually(lambda: is_true(not served.lanes.open))
        scene.patch.undo()
        (way,) = served.trail.ways[1:]
        assert way.is_over
        await eventually(lambda: is_true(begun[0].cancelled()))
        books = await served.books()
        after = {name: count - before.get(name, 0) for name, count in books.counters.items()}
        picked = stage != "select"
        assert {name: count for name, count in after.items() if count} == {
            "balancer_requests_total['cancelled', 'gpt', 'openai']": 1,
            "balancer_request_duration_seconds_count['openai']": 1,
            "balancer_select_seconds_count['default']": 1,
        } | (
            {
                "balancer_picks_total['default', 'gpt', 'streak', 'up:m']": 1,
                f"balancer_attempts_total{sorted(['default', 'gpt', outcome, 'up:m'])}": 1,
                "balancer_upstream_duration_seconds_count['up:m']": 1,
            }
            if picked
            else {}
        ) | ({"balancer_overhead_seconds_count[]": 1} if stage == "answer" else {})
        assert books.services["up:m"][:2] == [1 + picked, 1 + picked]
        assert len(scene.upstream.received) == 1 + sent
        if picked:
            await scene.lives()


# -- something of ours is at fault -------------------------------------------------------------------------------------


class Fault(msgspec.Struct, kw_only=True):
    """What is at fault, the status that its client is told, None where its connection breaks, and the attempt's end."""

    where: str
    stage: str = "fault"
    status: int | None = 500
    outcome: str = "failed"
    is_sent: bool = True
    upstream: Callable[[Upstream], None] = Upstream.answers


def errs(upstream: Upstream) -> None:
    upstream.answers(400, ERROR)


EXPRESS = "balancer.gateway.express"
UNHARMED: dict[str, Any] = {"stage": "ordinary", "status": 200, "outcome": "success"}
FAULTS = {
    "reading the body": Fault(where=f"{EXPRESS}.bodies.peek", **UNHARMED),
    "finding the rule": Fault(where="balancer.gateway.matching.Plans.matching", **UNHARMED),
    "estimating": Fault(where=f"{EXPRESS}.reserved", **UNHARMED),
    "asking for a pick": Fault(where="balancer.store.balance.Balance.begin", **UNHARMED),
    "taking the pick": Fault(where="balancer.store.balance.Balance.finish", outcome="", is_sent=False),
    "beginning the attempt": Fault(where=f"{EXPRESS}.Attempt", outcome="", is_sent=False),
    "finding the account": Fault(where="balancer.gateway.outgoing.Preparer.account", is_sent=False),
    "making the headers": Fault(where="balancer.gateway.outgoing.Preparer.common", is_sent=False),
    "making the head": Fault(where="balancer.gateway.upstream.client.UpstreamClient.prepared", is_sent=False),
    "making the body": Fault(where=f"{EXPRESS}.bodies.replace_model", is_sent=False),
    "sending": Fault(where="balancer.gateway.upstream.client.UpstreamClient.begin", is_sent=False),
    "joining the answer": Fault(where="balancer.gateway.upstream.answer.Answer.whole"),
    "looking at the answer": Fault(where=f"{EXPRESS}.says_error"),
    "making the answer's head": Fault(where=f"{EXPRESS}.answer_head"),
    "reading the usage": Fault(where=f"{EXPRESS}.usage_of"),
    "settling": Fault(where="balancer.gateway.attempts.Attempt.end"),
    "waiting for the write": Fault(where="balancer.store.balance.Balance.when_flushed", outcome="success"),
    "logging the attempt": Fault(
        where="balancer.gateway.attempts.Attempt.log", stage="express", status=None, outcome="success"
    ),
    "counting": Fault(where="balancer.metrics.Metrics.answered", stage="express", status=200, outcome="uncounted"),
    "counting what is left": Fault(where="balancer.metrics.Metrics.picked", upstream=errs),
    "taking over": Fault(where="balancer.gateway.forwarding.Forwarder.clock", upstream=errs),
    "the course": Fault(where="balancer.gateway.handlers.Handlers._course", stage="answer", upstream=errs),
}


def fails_once(patch: pytest.MonkeyPatch, where: str) -> list[bool]:
    """Makes a function fail the first time that it is called; what it returns is then no longer empty."""
    failed = list[bool]()
    owner, _, name = where.rpartition(".")
    function = getattr(pkgutil.resolve_name(owner), name)

    def fails(*arguments: Any, **more: Any) -> Any:
        if not failed:
            failed.append(True)
            raise RuntimeError("the test's own fault")
        return function(*arguments, **more)

    patch.setattr(where, fails)
    return failed


async def asked_at_once(scene: Scene, name: str) -> dict[str, list[Answer]]:
    """What comes of four requests on connections of their own, which are sent in one tick."""
    ids = [f"{name}-{number}" for number in range(4)]
    async with contextlib.AsyncExitStack() as stack:
        lines = [await stack.enter_async_context(a_line(scene.served.url)) for _ in ids]
        for id_, line in zip(ids, lines, strict=True):
            line.transport.write(a_post(id_))
        return {id_: await come(line, 1) for id_, line in zip(ids, lines, strict=True)}


@pytest.mark.parametrize("name", FAULTS)
async def test_a_fault_of_ours_is_told_and_others_are_none_the_wiser(
    staged: Staging, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Some left an attempt in flight, or a lane at work for ever; others took Redis' or the upstream's connection."""
    fault = FAULTS[name]
    async with staged() as scene:
        served = scene.served
        (pool,) = served.gateway.balance._pools.values()
        wire = pool._link._wire
        await asked_at_once(scene, "warm")
        before = await served.books()
        fault.upstream(scene.upstream)
        failed = fails_once(scene.patch, fault.where)
        answers = await asked_at_once(scene, "r")
        scene.patch.undo()
        assert failed
        others = ("express", 200) if fault.upstream is Upstream.answers else ("answer", 400)
        ends = {id_: (served.trail.stages[id_], got[0].status if got else None) for id_, got in answers.items()}
        hit = [id_ for id_, end in ends.items() if end != others] or list(ends)
        assert [ends[id_] for id_ in hit] == [(fault.stage, fault.status)] * len(hit)
        assert len(hit) == 1 or others == (fault.stage, fault.status)
        if fault.status == 500:
            assert decoded(answers[hit[0]][0].body)["error"]["message"] == "internal error"
        books = await served.books()
        after = {name: count - before.counters.get(name, 0) for name, count in books.counters.items()}
        ended = {
            outcome: after.get(f"balancer_attempts_total{sorted(['default', 'gpt', outcome, 'up:m'])}", 0)
            for outcome in ("success", "rejected", "failed")
        }
        expected = dict.fromkeys(ended, 0) | {"success" if others[1] == 200 else "rejected": 3}
        if fault.outcome in expected:
            expected[fault.outcome] += 1
        assert ended == expected
        expected["uncounted"] = fault.outcome == "uncounted"
        assert books.services["up:m"][1] - before.services["up:m"][1] == sum(expected.values())
        assert len(scene.upstream.received) == 5 + 3 + fault.is_sent
        assert pool._link._wire is wire
        await scene.lives()
    assert "the test's own fault" in caplog.text


LASTING = {
    "taking the pick": ("balancer.store.balance.Balance.finish", 500),
    "settling": ("balancer.gateway.attempts.Attempt.end", 500),
    "counting what is left": ("balancer.metrics.Metrics.picked", 500),
    "counting the request": ("balancer.metrics.Metrics.answered", 200),
    "taking over": ("balancer.gateway.forwarding.Forwarder.clock", None),
}


@pytest.mark.parametrize("name", LASTING)
async def test_a_fault_that_lasts_costs_the_requests_that_meet_it(staged: Staging, name: str) -> None:
    where, status = LASTING[name]
    async with staged() as scene:
        served = scene.served
        (pool,) = served.gateway.balance._pools.values()
        wire = pool._link._wire
        if status != 200:
            errs(scene.upstream)
        scene.patch.setattr(where, fails)
        for answers in (await asked_at_once(scene, "r")).values():
            assert [answer.status for answer in answers] == ([status] if status else [])
        scene.patch.undo()
        await eventually(lambda: is_true(not (served.open_requests or served.lanes._working)))
        assert pool._link._wire is wire
        await scene.lives()


# -- all of it together ------------------------------------------------------------------------------------------------


def does_anything(upstream: Upstream, rng: random.Random) -> None:
    """Has the upstream do something with the next request but one."""
    body = OPENAI_JSON
    at, rest = rng.randrange(len(HEAD + body)), HEAD + body
    match rng.randrange(10):
        case 0:
            upstream.then().answers(rng.choice([400, 429, 500, 503]), ERROR)
        case 1:
            upstream.then().answers(chunked=True)
        case 2:
            upstream.then().sends(rest[:at], resets=rng.random() < 0.5)
        case 3:
            upstream.then().sends(rest[:at], stalls=True)
        case 4:
            upstream.then().sends(HEAD, *(body[at : at + 50] for at in range(0, len(body), 50)))
        case 5:
            upstream.then().answers(headers=(("Content-Encoding", "x"),))
        case _:
            upstream.then().answers()


@pytest.mark.parametrize("seed", range(3))
async def test_in_a_storm_every_attempt_is_settled_once(store_url: str, tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    async with Upstream().running() as upstream:
        timeouts = {"headers_s": 0.3, "first_byte_s": 0.3, "idle_s": 0.3}
        raw = a_document(upstream.url, timeouts=timeouts, breaker={"failures": 0, "ratio": 0})
        for _ in range(400):
            does_anything(upstream, rng)
        upstream.then().answers()
        async with walked(store_url, tmp_path, raw, audit_interval_s=0.2) as served:
            asked = 0

            async def a_client(number: int) -> None:
                nonlocal asked
                for _ in range(6):
                    async with a_line(served.url) as line:
                        for _ in range(6):
                            asked += 1
                            line.held.clear()
                            await line.send(*in_pieces(a_post(f"{number}-{asked}"), rng.choice(["whole", "cuts"])))
                            if rng.random() < 0.2:
                                for _ in range(rng.randrange(12)):
                                    await asyncio.sleep(0)
                                break
                            await come(line, 1)
                            if line.closed.done():
                                break

            await asyncio.gather(*map(a_client, range(8)))
            books = await served.books()
            view = await served.view()
            await eventually(lambda: is_true(len(served.lanes.open) == 1))

            def total(name: str, label: str = "") -> int:
                return int(
                    sum(n for key, n in books.counters.items() if key.startswith(f"balancer_{name}") and label in key)
                )

            stages = set(served.trail.stages.values())
            assert {"express", "send", "answer"} <= stages, "of each some"
            services = view.services.values()
            assert total("requests_total") == len(served.trail.stages) == total("request_duration_seconds_count")
            assert total("attempts_total") == sum(s.requests for s in services) == total("picks_total")
            assert total("attempts_total") == total("upstream_duration_seconds_count")
            assert sum(s.picks for s in services) == total("picks_total") + sum(s.abandoned for s in services)
            assert total("tokens_total", "input") == sum(s.input for s in services)
            assert total("tokens_total", "output") == sum(s.output for s in services)
            assert sum(s.lost for s in services) == total("invariant_violations_total") == 0
            assert len(upstream.received) <= total("attempts_total")
            for pool in served.gateway._upstream._pools.values():
                await eventually(lambda pool=pool: is_true(pool._places == len(pool._idle)))  # type: ignore[misc]
