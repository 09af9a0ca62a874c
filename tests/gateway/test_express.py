"""The express way beside the ordinary one: for the same requests, whatever becomes of them, all is the same."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import socket
import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
import redis

from balancer.dialects.headers import response_headers
from balancer.domain import Entry, Outcome
from balancer.gateway import express, lane_stream
from balancer.gateway.masking import Mask
from balancer.gateway.upstream.answer import Answer
from balancer.gateway.upstream.client import UpstreamClient
from balancer.store import keys, views
from balancer.store.pool import PoolClient
from tests.actors import OPENAI_JSON, Proxy, Upstream, chunk, openai_events
from tests.faults import FaultProxy
from tests.gateway.conftest import KEY
from tests.gateway.trails import WAYS, Books, a_document, a_post, come, nothing_left, seen, told, walked
from tests.gateway.wire import a_line, answers_in
from tests.store.conftest import eventually
from tests.topologies import make_certificates

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
LENGTH = b"Content-Length: %d\r\n\r\n" % len(OPENAI_JSON)
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
ANTHROPIC_JSON = (
    b'{"id":"m1","type":"message","role":"assistant","model":"m","content":[{"type":"text","text":"hi"}],'
    b'"stop_reason":"end_turn","usage":{"input_tokens":11,"cache_read_input_tokens":3,"output_tokens":7}}'
)
ERROR = b'{"error":{"message":"no","type":"server_error","code":"x"}}'
QUICK = {"headers_s": 0.2, "first_byte_s": 0.2, "idle_s": 0.2}

Tell = Callable[[Upstream], None]


def answers(*arguments: Any, **more: Any) -> Tell:
    return lambda upstream: upstream.then().answers(*arguments, **more)


def sends(*parts: bytes, **more: Any) -> Tell:
    return lambda upstream: upstream.then().sends(*parts, **more)


def one_after_the_other(*tells: Tell) -> Tell:
    def tell(upstream: Upstream) -> None:
        for one in tells:
            one(upstream)

    return tell


def large(size: int) -> bytes:
    """JSON of that size, with a usage."""
    frame = b'{"usage":{"prompt_tokens":11,"completion_tokens":7},"x":"%b"}'
    return frame % (b"x" * (size - len(frame) + 2))


class Case(msgspec.Struct, kw_only=True):
    """What the upstream does with the requests that are asked, and where the express way is left for each of them."""

    stages: list[str]
    upstream: Tell = answers()
    asks: list[list[bytes]] = msgspec.field(default_factory=lambda: [[a_post("r1")]])
    rule: dict[str, Any] = msgspec.field(default_factory=dict)
    provider: dict[str, Any] = msgspec.field(default_factory=dict)
    flags: dict[str, Any] = msgspec.field(default_factory=dict)


def case(*stages: str, **more: Any) -> Case:
    return Case(stages=list(stages), **more)


LONG = [{"role": "user", "content": "word " * 100}]
MORE_THAN_100 = {"position": "token", "operation": "gt", "value": 100}
SESSION = ["x-session-id: s"]
TO_SPARE = {"services": [{"provider": "spare", "model": "m"}]}
ONE_SERVICE = {"services": [{"provider": "up", "model": "m"}]}

EXPRESS: dict[str, Case] = {
    "as usual": case("express"),
    "several on one connection": case("express", "express", "express", asks=[[a_post(f"r{n}")] for n in (1, 2, 3)]),
    "two at once": case("express", "express", asks=[[a_post("r1") + a_post("r2")]]),
    "a body in two reads": case("express", asks=[[a_post("r1")[:-9], a_post("r1")[-9:]]]),
    "a request in single bytes": case("express", asks=[[bytes([byte]) for byte in a_post("r1")]]),
    "the last on its connection": case("express", asks=[[a_post("r1", "Connection: close")]]),
    "no decision headers": case("express", flags={"decision_headers": False}),
    "Anthropic": case(
        "express",
        upstream=answers(body=ANTHROPIC_JSON),
        asks=[[a_post("r1", "anthropic-version: 2023-06-01", path="/v1/messages", model="claude", max_tokens=5)]],
    ),
    "completions": case("express", asks=[[a_post("r1", path="/v1/completions", prompt="x")]]),
    "embeddings": case("express", asks=[[a_post("r1", path="/tingly/openai/v1/embeddings?a=b", input="x")]]),
    "a provider's own header beyond ASCII": case("express", provider={"headers": {"X-A": "é"}}),
    "a body with spaces": case("express", asks=[[a_post("r1", body=b' {\n "x" : [1, {}] , "model" : "gpt" }\n')]]),
    "a model in letters of another kind": case("express", asks=[[a_post("r1", body=b'{"model":"\\u0067pt"}')]]),
    "client headers": case("express", asks=[[a_post("r1", "Cookie: a", "X-A: b", "x-forwarded-for: c")]]),
    "a patient client": case("express", asks=[[a_post("r1", "x-stainless-timeout: 600")]]),
    "full reservations": case(
        "express",
        asks=[[a_post("r1", max_tokens=99)]],
        rule={"lb_tactic": {"type": "token_based", "params": {"token_threshold": 15, "reserve": "full"}}},
    ),
    "a body of 3 MB": case("express", asks=[[a_post("r1", input="x" * 3_000_000)]]),
    "a session": case(
        *["express"] * 4,
        asks=[[a_post(f"r{n}", *session)] for n, session in enumerate([SESSION, [], SESSION, SESSION])],
        rule={
            "session_affinity": 60,
            "session_header": "x-session-id",
            "lb_tactic": {"type": "round_robin", "params": {"request_threshold": 1}},
        },
    ),
    # Once each answer with an entry's header was left to the ordinary way: it had a line more than was counted.
    "entries of smart routing": case(
        *["express"] * 6,
        asks=[[a_post(f"r{n}", messages=ask)] for n, ask in enumerate([LONG, [], LONG, 5, LONG, [{"content": 5}]])],
        rule={
            "smart_enabled": True,
            "smart_routing": [
                {"uuid": "long", "ops": [MORE_THAN_100], "services": [*TO_SPARE["services"], *ONE_SERVICE["services"]]}
            ],
            "lb_tactic": {"type": "round_robin", "params": {"request_threshold": 1}},
        },
    ),
    "a limit of an entry's service": case(
        "express",
        "select",
        "express",
        asks=[[a_post(f"r{n}", messages=ask)] for n, ask in enumerate([LONG, LONG, []])],
        rule={
            "smart_enabled": True,
            "smart_routing": [
                {
                    "uuid": "long",
                    "ops": [MORE_THAN_100],
                    "services": [{"provider": "spare", "model": "big", "limits": {"rpm": 1, "tpm": 9999}}],
                }
            ],
        },
    ),
    "an entry without an active service": case(
        "ordinary",
        asks=[[a_post("r1", messages=LONG)]],
        rule={
            "smart_enabled": True,
            "smart_routing": [
                {"uuid": "l", "ops": [MORE_THAN_100], "services": [{"provider": "up", "model": "m", "active": False}]}
            ],
        },
    ),
    "switches": case(
        *["express"] * 5,
        asks=[[a_post(f"r{n}")] for n in range(1, 6)],
        rule={"lb_tactic": {"type": "round_robin", "params": {"request_threshold": 2}}},
    ),
    # -- answers
    "parts": case("express", upstream=sends(HEAD, LENGTH, OPENAI_JSON[:9], OPENAI_JSON[9:70], OPENAI_JSON[70:])),
    "single bytes": case("express", upstream=sends(*(bytes([byte]) for byte in HEAD + LENGTH + OPENAI_JSON))),
    "a chunk": case("express", upstream=answers(chunked=True)),
    "chunks": case(
        "express",
        upstream=sends(CHUNKED, *(chunk(OPENAI_JSON[at : at + 50]) for at in range(0, 250, 50)), b"0\r\n\r\n"),
    ),
    "until the connection ends": case("express", upstream=sends(HEAD + b"\r\n" + OPENAI_JSON)),
    "an interim answer": case(
        "express", upstream=sends(b"HTTP/1.1 103 Hints\r\nLink: x\r\n\r\n", HEAD + LENGTH + OPENAI_JSON)
    ),
    "an interim answer along with it": case(
        "express", upstream=sends(b"HTTP/1.1 102 Working\r\n\r\n" + HEAD + LENGTH + OPENAI_JSON)
    ),
    "HTTP/1.0": case("express", upstream=sends(HEAD.replace(b"1.1", b"1.0") + LENGTH + OPENAI_JSON)),
    "the connection's last answer": case("express", upstream=answers(headers=(("Connection", "close"),))),
    "48 KiB": case("express", upstream=answers(body=large(48 * 1024))),
    "headers of all kinds": case(
        "express",
        upstream=answers(
            headers=(
                ("x-request-id", "theirs"),
                ("X-Balancer-Service", "no"),
                ("openai-organization", "acme"),
                ("openai-processing-ms", "12"),
                ("Set-Cookie", "a=b"),
                ("Date", "then"),
                ("Server", "x"),
                ("connection", "keep-alive"),
                ("X-Empty", ""),
                ("x-twice", "1"),
                ("X-Twice", "2"),
                ("Via", "1.1 x"),
                ("X%s", "%s%%"),
            )
        ),
    ),
    "letters beyond ASCII in a header": case(
        "express", upstream=sends(HEAD + "X-A: é\r\n".encode() + LENGTH + OPENAI_JSON)
    ),
    "no letters in a header": case("express", upstream=sends(HEAD + b"X-A: \xff\xe9\r\n" + LENGTH + OPENAI_JSON)),
    "another JSON": case("express", upstream=answers(content_type="Application/Vnd.x+JSON; charset=utf-8")),
    "no usage": case("express", upstream=answers(body=b'{"id":"c1","choices":[]}')),
    "a usage of null": case("express", upstream=answers(body=b'{"id":"c1","usage":null}')),
    "an error of null": case("express", upstream=answers(body=b'{"error":null,"usage":{"prompt_tokens":2}}')),
    "all kinds of tokens": case(
        "express",
        upstream=answers(
            body=b'{"usage":{"prompt_tokens":50,"prompt_tokens_details":{"cached_tokens":20},"completion_tokens":30,'
            b'"completion_tokens_details":{"reasoning_tokens":10}}}'
        ),
    ),
    "JSON that is none": case("express", upstream=answers(body=b'{"usage":{"prompt_tokens":11')),
}

AT_SELECT: dict[str, Case] = {
    "a limit": case("select", rule={"services": [{"provider": "up", "model": "m", "limits": {"rpm": 1}}]}),
    "a request beyond its limit": case(
        "select", rule={"services": [{"provider": "up", "model": "m", "limits": {"tpm": 4}}]}
    ),
    "a cooldown": case(
        "answer",
        "select",
        upstream=answers(429, ERROR, retry_after="30"),
        asks=[[a_post("r1")], [a_post("r2")]],
        rule=ONE_SERVICE | {"on_exhausted": "refuse", "retry": {"attempts": 1}},
    ),
    "an open breaker": case(
        "answer",
        "select",
        upstream=answers(500, ERROR),
        asks=[[a_post("r1")], [a_post("r2")]],
        rule=ONE_SERVICE | {"on_exhausted": "refuse", "retry": {"attempts": 1}},
        provider={"breaker": {"failures": 1}},
    ),
    "a fallback": case(
        "select",
        rule={"services": [{"provider": "up", "model": "m", "limits": {"rpm": 1}}], "fallback": ["other"]},
    ),
}

AT_SENDING: dict[str, Case] = {
    "a credential that is not there": case(
        "send", "send", asks=[[a_post("r1")], [a_post("r2")]], provider={"token": "${A_TOKEN_THAT_NOBODY_HAS_SET}"}
    ),
    "a request id of the provider's own": case("send", provider={"headers": {"X-Request-Id": "always-this"}}),
    "nobody listens": case("send", provider={"api_base": "http://127.0.0.1:9/v1"}),
}

AT_THE_ANSWER: dict[str, Case] = {
    "no second try for a bad request": case("answer", upstream=answers(400, ERROR)),
    "a second try": case("answer", upstream=one_after_the_other(answers(500, ERROR), answers())),
    "a second try that fails": case("answer", upstream=one_after_the_other(answers(500, ERROR), answers(503, ERROR))),
    "a limit and a second try": case(
        "answer", upstream=one_after_the_other(answers(429, ERROR, retry_after="9"), answers())
    ),
    "a limit": case("answer", upstream=answers(429, ERROR, retry_after="9"), rule=ONE_SERVICE),
    "an error in parts": case(
        "answer",
        upstream=sends(b"HTTP/1.1 401 No\r\nContent-Length: %d\r\n\r\n" % len(ERROR), ERROR[:9], ERROR[9:]),
        rule=ONE_SERVICE,
    ),
    "an error with status 200": case("answer", upstream=answers(body=ERROR), rule=ONE_SERVICE),
    "an error with status 200 and a second try": case(
        "answer",
        upstream=one_after_the_other(answers(body=b'{"error":{"message":"x","type":"overloaded_error"}}'), answers()),
    ),
    "status 201": case("answer", upstream=answers(201)),
    "status 204": case("answer", upstream=sends(b"HTTP/1.1 204 No Content\r\n\r\n"), rule=ONE_SERVICE),
    "a redirect": case("answer", upstream=answers(302, headers=(("Location", "http://127.0.0.1:9/"),))),
    "a stream that nobody asked for": case("answer", upstream=lambda u: u.then().streams(openai_events())),
    "a stream under another name": case("answer", upstream=sends(CHUNKED, *map(chunk, openai_events()), b"0\r\n\r\n")),
    "more than 48 KiB": case("answer", upstream=answers(body=large(48 * 1024 + 1))),
    "a head of 40 KiB": case("answer", upstream=answers(headers=(("X-A", "a" * 40_000),))),
    "half a megabyte in chunks": case("answer", upstream=answers(body=large(2**19), chunked=True)),
    "a coding": case("answer", upstream=answers(body=b"\x1f\x8b no gzip", headers=(("Content-Encoding", "gzip"),))),
    "no content type": case("answer", upstream=sends(b"HTTP/1.1 200 OK\r\n" + LENGTH + OPENAI_JSON)),
    "no content type, in chunks": case(
        "answer",
        upstream=sends(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", chunk(OPENAI_JSON) + b"0\r\n\r\n"),
    ),
    "another content type": case("answer", upstream=answers(content_type="text/plain")),
    "two content types": case("answer", upstream=answers(headers=(("content-type", "application/json"),))),
    "a header of the connection": case("answer", upstream=answers(headers=(("Connection", "X-A"), ("X-A", "b")))),
    "its credential in a header": case("answer", upstream=answers(headers=(("X-Debug", f"Bearer {KEY}"),))),
    "its credential in a name": case("answer", upstream=answers(headers=((f"X-{KEY}", "x"),))),
    "no object": case("answer", upstream=answers(body=b'[{"usage":{"prompt_tokens":11}}]')),
    "a space before it": case("answer", upstream=answers(body=b"\n" + OPENAI_JSON)),
    "nothing": case("answer", upstream=answers(body=b"")),
    "nothing, in chunks": case("answer", upstream=sends(CHUNKED + b"0\r\n\r\n")),
}

BREAKS_OFF: dict[str, Case] = {
    "another protocol": case(
        "answer", upstream=sends(b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n")
    ),
    "its end before its head": case("answer", upstream=sends()),
    "a reset before its head": case("answer", upstream=sends(resets=True)),
    "its end in its head": case("answer", upstream=sends(HEAD[:30])),
    "its end behind an interim answer": case("answer", upstream=sends(b"HTTP/1.1 100 Continue\r\n\r\n")),
    "its end behind its head": case("answer", upstream=sends(HEAD + LENGTH)),
    "its end in its body": case("answer", upstream=sends(HEAD + LENGTH + OPENAI_JSON[:60])),
    "a reset in its body": case("answer", upstream=sends(HEAD + LENGTH + OPENAI_JSON[:60], resets=True)),
    "its end between chunks": case("answer", upstream=sends(CHUNKED + chunk(OPENAI_JSON))),
    "no HTTP": case("answer", upstream=sends(b"SSH-2.0-OpenSSH_9.2\r\n")),
    "no HTTP in its body": case("answer", upstream=sends(CHUNKED + chunk(OPENAI_JSON[:60]) + b"zz\r\n")),
    "a control character": case("answer", upstream=sends(HEAD + b"X-A: a\x01b\r\n" + LENGTH + OPENAI_JSON)),
    "a length beside chunks": case("answer", upstream=sends(CHUNKED[:-2] + LENGTH + chunk(OPENAI_JSON) + b"0\r\n\r\n")),
    "a head without an end": case("answer", upstream=sends(HEAD + b"X-A: " + b"a" * 70_000)),
}

IS_LATE: dict[str, Case] = {
    "silence": case("answer", upstream=lambda u: u.then().stalls(), provider={"timeouts": QUICK}, rule=ONE_SERVICE),
    "silence in its head": case("answer", upstream=sends(HEAD, stalls=True), provider={"timeouts": QUICK}),
    "silence behind its head": case(
        "answer", upstream=sends(HEAD + LENGTH, stalls=True), provider={"timeouts": {"first_byte_s": 0.2}}
    ),
    "silence in its body": case(
        "answer",
        upstream=sends(HEAD + LENGTH + OPENAI_JSON[:60], stalls=True),
        provider={"timeouts": {"idle_s": 0.2}},
    ),
    "no time for a head": case("answer", upstream=lambda u: u.then().stalls(), provider={"timeout": 1}),
    "no time for a body": case(
        "answer", upstream=sends(HEAD + LENGTH + OPENAI_JSON[:60], stalls=True), provider={"timeout": 1}
    ),
}

FROM_THE_START: dict[str, Case] = {
    "another name in the answer": case("ordinary", rule={"response_model": "mine"}),
    "a strict rule": case("ordinary", rule={"strict_settle": True}),
    "an unknown model": case("ordinary", asks=[[a_post("r1", model="nobody")]]),
    "no JSON": case("ordinary", asks=[[a_post("r1", body=b"{")]]),
    "no body": case("ordinary", asks=[[a_post("r1", body=b"")]]),
    "an unknown path": case("ordinary", asks=[[a_post("r1", path="/nothing")]]),
    "count_tokens": case("ordinary", asks=[[a_post("r1", path="/v1/messages/count_tokens", model="claude")]]),
    "a response that is kept": case("ordinary", asks=[[a_post("r1", path="/v1/responses", input="x")]]),
    "a client in a hurry": case("ordinary", asks=[[a_post("r1", "x-stainless-timeout: 20")]]),
    "the other dialect": case("ordinary", asks=[[a_post("r1", "x-api-key: k", path="/openai/v1/messages")]]),
    "no active service": case("ordinary", rule={"services": [{"provider": "up", "model": "m", "active": False}]}),
}

CASES = {
    f"{stage}: {name}": case
    for stage, cases in (
        ("express", EXPRESS),
        ("select", AT_SELECT),
        ("sending", AT_SENDING),
        ("answer", AT_THE_ANSWER | BREAKS_OFF | IS_LATE),
        ("ordinary", FROM_THE_START),
    )
    for name, case in cases.items()
}


class Seen(msgspec.Struct, kw_only=True):
    """All that a client, an operator and an upstream see of a case by one way, and its trail."""

    answers: list[Any]
    books: Books
    sent: list[Any]
    stages: dict[str, str]


async def walk(way: str, case: Case, store_url: str, data_dir: Path) -> Seen:
    async with Upstream().running() as upstream:
        raw = a_document(upstream.url, rule=case.rule, **case.provider)
        raw["rules"].append({"uuid": "other", "request_model": "other", **TO_SPARE})
        async with walked(store_url, data_dir, raw, way, **case.flags) as served:
            got = await served.ask(a_post("first"))
            got += await served.ask(a_post("first-of-claude", path="/v1/messages", model="claude"))
            served.trail.stages.clear()
            case.upstream(upstream)
            upstream.then().answers()
            upstream.skips()
            for pieces in case.asks:
                got += await served.ask(*pieces, answers=b"".join(pieces).count(b"POST /"))
            stages = dict(served.trail.stages)
            got += await served.ask(a_post("last"))
            books = await served.books()
    address = upstream.url.removeprefix("http://")
    sent = [(target, [(n, v.replace(address, "up")) for n, v in head], body) for target, head, body in seen(upstream)]
    return Seen(answers=told(got), books=books, sent=sent, stages=stages)


@pytest.mark.parametrize("name", CASES)
async def test_by_every_way_all_is_the_same(name: str, store_url: str, tmp_path: Path) -> None:
    """Not so were once: the times of selections without a pick, and switches that pins had saved."""
    case = CASES[name]
    ours, *others = [await walk(way, case, store_url, tmp_path) for way in WAYS]
    assert list(ours.stages.values()) == case.stages
    for other in others:
        assert ours.answers == other.answers
        assert ours.sent == other.sent
        assert ours.books == other.books


# -- what takes more than one connection -------------------------------------------------------------------------------


async def by_each_way(scene: Callable[[str], Awaitable[dict[str, Any]]]) -> dict[str, Any]:
    """What a scene has come to, which is the same by each way, and its stages by ours."""
    ours, *others = [await scene(way) for way in WAYS]
    stages = ours.pop("stages")
    for other in others:
        assert ours == {name: value for name, value in other.items() if name != "stages"}
    return ours | {"stages": list(stages.values())}


async def test_a_rule_that_was_changed_meanwhile_is_asked_for_anew(store_url: str, tmp_path: Path) -> None:
    async def scene(way: str) -> dict[str, Any]:
        async with (
            Upstream().running() as upstream,
            walked(store_url, tmp_path, a_document(upstream.url), way) as served,
        ):
            got = await served.ask(a_post("r1"))
            await served.publishes(a_document(upstream.url, rule=TO_SPARE))
            got += await served.ask(a_post("r2"), answers=1)
            got += await served.ask(a_post("r3"), answers=1)
            return {
                "answers": told(got),
                "books": await served.books(),
                "services": [answer.header("x-balancer-service") for answer in got],
                "stages": served.trail.stages,
            }

    came = await by_each_way(scene)
    assert came["stages"] == ["send", "select", "express"]
    assert came["services"] == ["up:m", "spare:m", "spare:m"]
    assert came["books"].counters["balancer_stale_picks_total['default']"] == 1


async def test_a_rule_that_redis_has_lost_is_told_to_it_again(store_url: str, tmp_path: Path) -> None:
    async def scene(way: str) -> dict[str, Any]:
        async with (
            Upstream().running() as upstream,
            walked(store_url, tmp_path, a_document(upstream.url), way) as served,
        ):
            await served.ask(a_post("r1"))
            await served.settled_view()
            with redis.Redis.from_url(store_url) as client:
                client.delete(keys.partitions("default"), keys.services("default"))
            got = await served.ask(a_post("r2"))
            got += await served.ask(a_post("r3"))
            return {"answers": told(got)[1:], "books": await served.books(), "stages": served.trail.stages}

    came = await by_each_way(scene)
    assert came["stages"] == ["send", "select", "express"]
    assert came["books"].services["up:m"][:2] == [2, 2]


async def test_a_pick_that_comes_too_late_for_its_name_is_none(store_url: str, tmp_path: Path) -> None:
    async def scene(way: str) -> dict[str, Any]:
        async with (
            Upstream().running() as upstream,
            walked(store_url, tmp_path, a_document(upstream.url), way) as served,
        ):
            await served.ask(a_post("r1"))
            balance = served.gateway.balance
            (pool,) = balance._pools.values()
            pool.settle(Entry(number=next(balance._numbers) + 1, service="", outcome=Outcome.ABANDONED))
            await served.acknowledged()
            got = await served.ask(a_post("r2"))
            got += await served.ask(a_post("r3"))
            return {"answers": told(got), "books": await served.books(), "stages": served.trail.stages}

    came = await by_each_way(scene)
    assert came["stages"] == ["send", "select", "express"]
    assert [status for status, *_ in came["answers"]] == [503, 200]


@pytest.mark.parametrize("loss", ["silence", "reset"])
@pytest.mark.parametrize(("on_store_loss", "status"), [("closed", 503), ("local", 200)])
async def test_redis_may_be_lost_while_it_is_asked(
    store_url: str, tmp_path: Path, loss: str, on_store_loss: str, status: int
) -> None:
    async def scene(way: str) -> dict[str, Any]:
        async with (
            Upstream().running() as upstream,
            FaultProxy(store_url, tmp_path / f"{way}.sock").running() as proxy,
            walked(
                store_url,
                tmp_path,
                a_document(upstream.url, rule={"on_store_loss": on_store_loss}),
                way,
                redis_url=proxy.url,
                redis_deadline_ms=200,
            ) as served,
        ):
            await served.ask(a_post("r1"))
            await served.settled_view()
            (pool,) = served.gateway.balance._pools.values()
            proxy.blackholes()
            served.line.held.clear()
            await served.line.send(a_post("r2"))
            if loss == "reset":
                await eventually(lambda: is_true(bool(pool._waiting)))
                proxy.refuses()
            got = await come(served.line, 1)
            got += await served.ask(a_post("r3"))
            proxy.passes()
            await eventually(lambda: is_true(pool.is_up))
            got += await served.ask(a_post("r4"))
            books = await served.books()
            return {
                "answers": [(answer.status, answer.header("x-balancer-degraded")) for answer in got],
                "requests": books.services["up:m"][1],
                "counters": books.counters,
                "stages": served.trail.stages,
            }

    came = await by_each_way(scene)
    assert came["stages"] == ["send", "select", "ordinary", "express"]
    degraded = (status, "store" if status == 200 else None)
    assert came["answers"] == [degraded, degraded, (200, None)]
    assert came["requests"] == (4 if status == 200 else 2)


async def test_a_pick_that_has_taken_long_leaves_less_time(store_url: str, tmp_path: Path) -> None:
    async def scene(way: str) -> dict[str, Any]:
        async with (
            Upstream().running() as upstream,
            walked(store_url, tmp_path, a_document(upstream.url), way, late_s=0.0) as served,
        ):
            got = await served.ask(a_post("r1"))
            got += await served.ask(a_post("r2"))
            return {"answers": told(got), "books": await served.books(), "stages": served.trail.stages}

    assert (await by_each_way(scene))["stages"] == ["send", "send"]


async def test_nobody_overtakes_who_waits_in_line(store_url: str, tmp_path: Path) -> None:
    async def scene(way: str) -> dict[str, Any]:
        gate = asyncio.Event()
        async with Upstream().running() as upstream:
            rule = {
                "services": [{"provider": "up", "model": "m", "limits": {"in_flight": 1}}],
                "queue_timeout_ms": 10_000,
            }
            async with (
                walked(store_url, tmp_path, a_document(upstream.url, rule=rule), way) as served,
                a_line(served.url) as one,
                a_line(served.url) as two,
                a_line(served.url) as three,
            ):
                await served.ask(a_post("r0"))
                upstream.answers(gate=gate)
                queues = served.gateway.balance._queues
                one.transport.write(a_post("r1"))
                await eventually(lambda: is_true(len(upstream.received) == 2))
                two.transport.write(a_post("r2"))
                await eventually(lambda: is_true(len(queues) == 1))
                three.transport.write(a_post("r3"))
                await eventually(lambda: is_true(len(queues) == 2))
                gate.set()
                got = [answer for line in (one, two, three) for answer in await come(line, 1)]
                counters = (await served.books()).counters
                counters.pop("balancer_select_seconds_count['default']")  # The head of the line asks time and again.
                return {
                    "answers": [answer.status for answer in got],
                    "order": [received.header("x-request-id") for received in upstream.received],
                    "counters": counters,
                    "stages": served.trail.stages,
                }

    came = await by_each_way(scene)
    assert came["stages"] == ["send", "express", "select", "ordinary"]
    assert came["order"] == ["r0", "r1", "r2", "r3"]
    assert came["answers"] == [200, 200, 200]


async def test_idle_connections_that_have_ended_unseen_are_passed_over(
    store_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = UpstreamClient.begin
    async with Upstream().running() as upstream, walked(store_url, tmp_path, a_document(upstream.url)) as served:
        await served.ask(a_post("r1"))

        def ended(self: UpstreamClient, *arguments: Any) -> Answer | None:
            for one in self._connections:
                assert one.transport is not None
                end_unseen(one.transport)
            return begin(self, *arguments)

        monkeypatch.setattr(UpstreamClient, "begin", ended)
        (answer,) = await served.ask(a_post("r2"))
        monkeypatch.undo()
        (last,) = await served.ask(a_post("r3"))
        books = await served.books()
        assert (answer.status, last.status, upstream.connections) == (200, 200, 2)
        await eventually(lambda: is_true(len(served.gateway._upstream._connections) == 1))
        assert list(served.trail.stages.values()) == ["send", "send", "express"]
        assert (books.services["up:m"][:2], len(upstream.received)) == ([3, 3], 3)


def end_unseen(transport: asyncio.Transport) -> None:
    """Lets nothing more be read of a connection, as if the other side had ended it."""
    with socket.socket(fileno=os.dup(transport.get_extra_info("socket").fileno())) as sock:
        sock.shutdown(socket.SHUT_RD)


async def test_a_provider_may_be_gone_when_its_service_is_picked(store_url: str, tmp_path: Path) -> None:
    async def scene(way: str) -> dict[str, Any]:
        async with (
            Upstream().running() as upstream,
            walked(store_url, tmp_path, a_document(upstream.url), way) as served,
        ):
            await served.ask(a_post("r1"))
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(served.gateway._forwarder.preparer._providers, "provider", lambda _: None)
                got = await served.ask(a_post("r2", "X-A: another head"))
            got += await served.ask(a_post("r3"))
            return {"answers": told(got), "books": await served.books(), "stages": served.trail.stages}

    came = await by_each_way(scene)
    assert came["stages"] == ["send", "send", "express"]
    assert [status for status, *_ in came["answers"]] == [503, 200]


async def test_behind_a_socks_proxy_the_ordinary_way_sends(store_url: str, tmp_path: Path) -> None:
    async def scene(way: str) -> dict[str, Any]:
        async with Upstream().running() as upstream, Proxy("socks5").running() as proxy:
            raw = a_document(upstream.url, proxy_url=proxy.url)
            async with walked(store_url, tmp_path, raw, way) as served:
                got = await served.ask(a_post("r1"))
                got += await served.ask(a_post("r2"))
                return {"answers": told(got), "books": await served.books(), "stages": served.trail.stages}

    assert (await by_each_way(scene))["stages"] == ["send", "send"]


async def test_spaces_that_keep_a_connection_alive_come_down_at_once(store_url: str, tmp_path: Path) -> None:
    """They were once held back until the answer was whole."""

    async def scene(way: str) -> dict[str, Any]:
        async with (
            Upstream().running() as upstream,
            walked(store_url, tmp_path, a_document(upstream.url), way) as served,
        ):
            await served.ask(a_post("r1"))
            upstream.sends(CHUNKED, chunk(b"\n \n"), stalls=True)
            served.line.held.clear()
            served.line.transport.write(a_post("r2"))
            await served.line.until(b"\n \n")
            served.line.transport.abort()
            await upstream.hung_up.wait()
            return {"books": await served.books(), "stages": served.trail.stages}

    assert (await by_each_way(scene))["stages"] == ["send", "answer"]


async def test_redis_may_be_lost_while_the_upstream_answers(store_url: str, tmp_path: Path) -> None:
    async def scene(way: str) -> dict[str, Any]:
        gate = asyncio.Event()
        async with (
            Upstream().running() as upstream,
            FaultProxy(store_url, tmp_path / f"{way}.sock").running() as proxy,
            walked(store_url, tmp_path, a_document(upstream.url), way, redis_url=proxy.url) as served,
        ):
            await served.ask(a_post("r1"))
            await served.settled_view()
            (pool,) = served.gateway.balance._pools.values()
            upstream.answers(gate=gate)
            served.line.held.clear()
            served.line.transport.write(a_post("r2"))
            await eventually(lambda: is_true(len(upstream.received) == 2))
            proxy.refuses()
            await eventually(lambda: is_true(not pool.is_up))
            gate.set()
            got = await come(served.line, 1)
            assert len(pool.outbox) == 1
            proxy.passes()
            await eventually(lambda: is_true(pool.is_up))
            return {"answers": told(got), "books": await served.books(), "stages": served.trail.stages}

    came = await by_each_way(scene)
    assert came["stages"] == ["send", "express"]
    assert [status for status, *_ in came["answers"]] == [200]
    assert came["books"].services["up:m"][:5] == [2, 2, 0, 22, 14]


# -- what is remembered of a client's head -----------------------------------------------------------------------------


async def test_a_credential_that_is_changed_is_sent_with_the_next_request(store_url: str, tmp_path: Path) -> None:
    async with Upstream().running() as upstream, walked(store_url, tmp_path, a_document(upstream.url)) as served:
        balance = served.gateway.balance
        for _ in range(2):
            await served.ask(a_post("r"))
        before = balance.directory
        await served.publishes(a_document(upstream.url, token="sk-another-0123456789"), is_heard=True)
        await eventually(lambda: is_true(balance.directory is not before))
        await served.ask(a_post("r"))
        assert served.trail.stages["r"] == "express"
        sent = [received.header("authorization") for received in upstream.received]
        assert sent == [f"Bearer {KEY}", f"Bearer {KEY}", "Bearer sk-another-0123456789"]


async def test_each_request_of_a_connection_needs_its_own_credential(store_url: str, tmp_path: Path) -> None:
    async def scene(way: str) -> dict[str, Any]:
        async with (
            Upstream().running() as upstream,
            walked(store_url, tmp_path, a_document(upstream.url), way, client_tokens="good-token") as served,
        ):
            got = []
            for number, token in enumerate(["good-token", "good-token", "bad-token", "good-token", ""]):
                lines = [f"Authorization: Bearer {token}"] if token else []
                got += await served.ask(a_post(f"r{number}", *lines))
            return {
                "answers": told(got),
                "sent": len(upstream.received),
                "books": await served.books(),
                "stages": served.trail.stages,
            }

    came = await by_each_way(scene)
    assert came["stages"] == ["send", "express", "ordinary", "express", "ordinary"]
    assert [status for status, *_ in came["answers"]] == [200, 200, 401, 200, 401]
    assert came["sent"] == 3


# -- heads of answers --------------------------------------------------------------------------------------------------

NAMES = (
    *("Content-Type", "content-type", "X-A", "x-a", "x-request-id", "X-Balancer-Decision", "Date", "Server", "%s", "X"),
    *("Connection", "Keep-Alive", "Set-Cookie", "Content-Length", "Transfer-Encoding", "Content-Encoding"),
)
VALUES = (
    "application/json",
    "text/plain",
    "",
    "a",
    "%s %d",
    KEY,
    f"x{KEY}",
    "é",
    "\udce9",
    "keep-alive",
    "close",
    "X-A",
    "a\x01",
)


def test_the_head_of_an_answer_is_the_one_that_the_ordinary_way_gives() -> None:
    rng, mask, made = random.Random(1), Mask([KEY]), 0
    for _ in range(4000):
        kind = ("Content-Type", "application/json")
        headers = tuple((rng.choice(NAMES), rng.choice(VALUES)) for _ in range(rng.randrange(5)))
        headers = (*headers[:2], kind, *headers[2:]) if rng.random() < 0.8 else headers
        is_last = rng.random() < 0.5
        ours = express.answer_head(headers, "", "r", "Content-Length: 5", mask, is_last=is_last)
        if ours is None:
            continue
        theirs = lane_stream.answer_head(200, mask.over_headers(response_headers(headers)), 5, "r", is_last=is_last)
        assert sorted(ours.split(b"\r\n")) == sorted(theirs.split(b"\r\n")), headers
        made += 1
    assert made > 500


# -- connections -------------------------------------------------------------------------------------------------------


async def test_who_gives_no_id_gets_one_that_the_upstream_sees_too(store_url: str, tmp_path: Path) -> None:
    async with Upstream().running() as upstream, walked(store_url, tmp_path, a_document(upstream.url)) as served:
        await served.ask(a_post("first"))
        answers = [answer for _ in range(3) for answer in await served.ask(a_post())]
        ids = [answer.header("x-request-id") for answer in answers]
        assert ids == [received.header("x-request-id") for received in upstream.received[1:]]
        assert {id_: served.trail.stages[id_] for id_ in ids if id_} == dict.fromkeys(ids, "express")
        assert len(set(ids)) == 3


async def test_who_does_not_read_is_waited_for(store_url: str, tmp_path: Path) -> None:
    async with Upstream().running() as upstream, walked(store_url, tmp_path, a_document(upstream.url)) as served:
        upstream.answers(body=large(48 * 1024))
        await served.ask(a_post("first"))
        lane, line = served.lane, served.line
        assert lane.transport is not None
        line.held.clear()
        line.transport.pause_reading()
        count = 0
        while not lane.transport.get_write_buffer_size():
            count += 1
            line.transport.write(a_post(f"r{count}"))
            await eventually(lambda: is_true(lane.work is None and len(upstream.received) == 1 + count))  # noqa: B023
        assert (served.trail.stages[f"r{count}"], lane.is_held_up) == ("express", False)
        line.transport.write(a_post("more") + b"GET /healthz HTTP/1.1\r\nHost: gateway\r\n\r\n")
        await eventually(lambda: is_true(served.trail.stages.get("more") == "ordinary"))
        line.transport.resume_reading()
        answers = await come(line, count + 2)
        assert [answer.status for answer in answers] == [200] * (count + 2)
        assert answers[-1].body == b'{"status":"alive"}'


async def test_over_tls_all_is_the_same(store_url: str, tmp_path: Path) -> None:
    make_certificates(tmp_path)
    trusted = ssl.create_default_context(cafile=str(tmp_path / "ca.pem"))
    trusted.check_hostname = False
    files: dict[str, Any] = {
        "tls_cert_file": str(tmp_path / "server.pem"),
        "tls_key_file": str(tmp_path / "server.key"),
    }

    async def scene(way: str) -> dict[str, Any]:
        async with (
            Upstream().running() as upstream,
            walked(store_url, tmp_path, a_document(upstream.url), way, tls=trusted, **files) as served,
        ):
            got = await served.ask(a_post("r1"))
            got += await served.ask(a_post("r2")[:-9], a_post("r2")[-9:])
            got += await served.ask(a_post("r3") + a_post("r4"), answers=2)
            got += await served.ask(a_post("r5", "Connection: close"))
            return {"answers": told(got), "books": await served.books(), "stages": served.trail.stages}

    assert (await by_each_way(scene))["stages"][1:] == ["express"] * 4


class Watched:
    """A transport; `is_flushed` has whether all settles were on their way whenever something was written to it."""

    def __init__(self, transport: asyncio.Transport, pool: PoolClient) -> None:
        self._transport = transport
        self._pool = pool
        self.is_flushed: list[bool] = []

    def write(self, data: bytes) -> None:
        self.is_flushed.append(self._pool.is_flushed and not self._pool.outbox.take())
        self._transport.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


@pytest.mark.parametrize("clients", [1, 4])
async def test_a_settle_is_on_its_way_to_redis_before_the_client_has_its_answer(
    store_url: str, tmp_path: Path, clients: int
) -> None:
    gate = asyncio.Event()
    async with (
        Upstream().running() as upstream,
        walked(store_url, tmp_path, a_document(upstream.url)) as served,
        contextlib.AsyncExitStack() as stack,
    ):
        (pool,) = served.gateway.balance._pools.values()
        lines = [await stack.enter_async_context(a_line(served.url)) for _ in range(clients)]
        for round_ in ("first", "next"):
            gate.clear()
            upstream.answers(gate=gate)
            before = len(upstream.received)
            watched = []
            for number, line in enumerate(lines):
                line.held.clear()
                line.transport.write(a_post(f"{round_}-{number}"))
            await eventually(lambda: is_true(len(upstream.received) == before + clients))  # noqa: B023
            for lane in served.lanes.open:
                assert lane.transport is not None
                lane._leave_to_loop()  # It would be written to past its transport.
                watched.append(Watched(lane.transport, pool))
                lane.transport = cast(asyncio.Transport, watched[-1])
            gate.set()
            for line in lines:
                assert [answer.status for answer in await come(line, 1)] == [200]
            for lane in served.lanes.open:
                lane.transport = cast(Any, lane.transport)._transport
        assert {id_: served.trail.stages[id_] for id_ in served.trail.stages if "next" in id_} == {
            f"next-{number}": "express" for number in range(clients)
        }
        assert [one.is_flushed for one in watched if one.is_flushed] == [[True]] * clients


async def test_while_the_worker_drains_an_answer_is_its_connection_s_last(store_url: str, tmp_path: Path) -> None:
    gate = asyncio.Event()
    async with Upstream().running() as upstream, walked(store_url, tmp_path, a_document(upstream.url)) as served:
        await served.ask(a_post("first"))
        upstream.answers(gate=gate)
        async with a_line(served.url) as other:
            served.line.held.clear()
            served.line.transport.write(a_post("under-way"))
            await eventually(lambda: is_true(len(upstream.received) == 2))
            served.gateway._is_draining = True
            other.transport.write(a_post("late"))
            await eventually(lambda: is_true(len(upstream.received) == 3))
            draining = asyncio.create_task(served.gateway.drain())
            await asyncio.sleep(0)
            gate.set()
            assert await served.line.until_closed()
            assert await other.until_closed()
            await draining
            (answer,), (last,) = answers_in(bytes(served.line.held)), answers_in(bytes(other.held))
        assert (answer.status, answer.body, answer.header("connection")) == (200, OPENAI_JSON, None)
        assert (last.status, last.body, last.header("connection")) == (200, OPENAI_JSON, "close")
        assert (served.trail.stages["under-way"], served.open_requests) == ("express", 0)
        with redis.Redis.from_url(store_url) as client:
            state = client.hgetall(keys.services("default"))
        assert isinstance(state, dict)
        service = views.read_pool("default", {}, state, 0).services["up:m"]
        assert (service.requests, service.input, service.in_flight, service.reserved) == (3, 33, 0, 0)


async def test_thousands_of_requests_leave_nothing_behind(store_url: str, tmp_path: Path) -> None:
    async with Upstream().running() as upstream, walked(store_url, tmp_path, a_document(upstream.url)) as served:

        async def ask(number: int) -> None:
            async with a_line(served.url) as line:
                for count in range(250):
                    line.held.clear()
                    line.transport.write(a_post(f"{number}-{count}"))
                    (answer,) = await come(line, 1)
                    assert answer.status == 200

        await ask(0)
        async with nothing_left(served):
            await asyncio.gather(*map(ask, range(1, 9)))
        books = await served.books()
        services = books.services.values()
        assert [sum(counts) for counts in zip(*services, strict=True)][:5] == [2250, 2250, 0, 2250 * 11, 2250 * 7]
        assert books.counters["balancer_requests_total['gpt', 'openai', 'success']"] == 2250


async def test_requests_that_leave_the_express_way_leave_nothing_behind(store_url: str, tmp_path: Path) -> None:
    rule = ONE_SERVICE | {"retry": {"attempts": 1}}
    async with Upstream().running() as upstream:
        raw = a_document(upstream.url, rule=rule, breaker={"failures": 0, "ratio": 0})
        async with walked(store_url, tmp_path, raw) as served:
            await served.ask(a_post("first"))
            async with nothing_left(served):
                for case in AT_THE_ANSWER.values():
                    upstream.answers()
                    case.upstream(upstream)
                    upstream.then().answers()
                    upstream.skips()
                    await served.ask(a_post("r"))
            await served.books()


async def is_true(value: bool) -> bool:
    """For `eventually`."""
    return value
