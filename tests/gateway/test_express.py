"""The express way beside the ordinary one: for the same requests, whatever becomes of them, all is the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.actors import OPENAI_JSON, Upstream, chunk, openai_events
from tests.gateway.conftest import KEY
from tests.gateway.trails import WAYS, a_document, a_post, seen, told, walked

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
    "a session": case(
        "express",
        "express",
        asks=[[a_post("r1", "x-session-id: s")], [a_post("r2", "x-session-id: s")]],
        rule={
            "session_affinity": 60,
            "session_header": "x-session-id",
            "lb_tactic": {"type": "round_robin", "params": {"request_threshold": 1}},
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
    "another protocol": case(
        "answer", upstream=sends(b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n")
    ),
    "a stream that nobody asked for": case("answer", upstream=lambda u: u.then().streams(openai_events())),
    "a stream under another name": case("answer", upstream=sends(CHUNKED, *map(chunk, openai_events()), b"0\r\n\r\n")),
    "more than 48 KiB": case("answer", upstream=answers(body=large(48 * 1024 + 1))),
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
    # -- it breaks off
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
    # -- it is late
    "silence": case("answer", upstream=lambda u: u.then().stalls(), provider={"timeouts": QUICK}, rule=ONE_SERVICE),
    "silence in its head": case("answer", upstream=sends(HEAD, stalls=True), provider={"timeouts": QUICK}),
    "silence behind its head": case("answer", upstream=sends(HEAD + LENGTH, stalls=True), provider={"timeouts": QUICK}),
    "silence in its body": case(
        "answer", upstream=sends(HEAD + LENGTH + OPENAI_JSON[:60], stalls=True), provider={"timeouts": QUICK}
    ),
    "no time for a head": case("answer", upstream=lambda u: u.then().stalls(), provider={"timeout": 1}),
    "no time for a body": case(
        "answer", upstream=sends(HEAD + LENGTH + OPENAI_JSON[:60], stalls=True), provider={"timeout": 1}
    ),
}

FROM_THE_START: dict[str, Case] = {
    "a stream": case(
        "ordinary", upstream=lambda u: u.then().streams(openai_events()), asks=[[a_post("r1", stream=True)]]
    ),
    "another name in the answer": case("ordinary", rule={"response_model": "mine"}),
    "a strict rule": case("ordinary", rule={"strict_settle": True}),
    "an unknown model": case("ordinary", asks=[[a_post("r1", model="nobody")]]),
    "no JSON": case("ordinary", asks=[[a_post("r1", body=b"{")]]),
    "no body": case("ordinary", asks=[[a_post("r1", body=b"")]]),
    "an unknown path": case("ordinary", asks=[[a_post("r1", path="/nothing")]]),
    "count_tokens": case("ordinary", asks=[[a_post("r1", path="/v1/messages/count_tokens", model="claude")]]),
    "a response that is kept": case("ordinary", asks=[[a_post("r1", path="/v1/responses", input="x")]]),
    "a client in a hurry": case("ordinary", asks=[[a_post("r1", "x-stainless-timeout: 20")]]),
    "the other dialect": case("ordinary", asks=[[a_post("r1", "x-api-key: k", path="/anthropic/v1/messages")]]),
    "no active service": case("ordinary", rule={"services": [{"provider": "up", "model": "m", "active": False}]}),
}

CASES = {
    f"{stage}: {name}": case
    for stage, cases in (
        ("express", EXPRESS),
        ("select", AT_SELECT),
        ("sending", AT_SENDING),
        ("answer", AT_THE_ANSWER),
        ("ordinary", FROM_THE_START),
    )
    for name, case in cases.items()
}


async def walk(way: str, case: Case, store_url: str, data_dir: Path) -> tuple[Any, dict[str, str]]:
    """All that a client, an upstream and an operator see of a case by one way, and the trail."""
    async with Upstream().running() as upstream:
        raw = a_document(upstream.url, rule=case.rule, **case.provider)
        raw["rules"].append({"uuid": "other", "request_model": "other", **TO_SPARE})
        async with walked(store_url, data_dir, raw, way, **case.flags) as served:
            got = await served.ask(a_post("first"))
            got += await served.ask(a_post("first-of-claude", path="/v1/messages", model="claude"))
            served.trail.stages.clear()
            upstream.answers()
            case.upstream(upstream)
            upstream._behaviours.pop(0)
            upstream.then().answers()
            for pieces in case.asks:
                count = b"".join(pieces).count(b"POST /")
                got += await served.ask(*pieces, answers=count)
            stages = dict(served.trail.stages)
            got += await served.ask(a_post("last"))
            books = await served.books()
        address = upstream.url.removeprefix("http://")
        sent = [
            (target, [(n, v.replace(address, "up")) for n, v in head], body) for target, head, body in seen(upstream)
        ]
    return (told(got), books, sent), stages


TO_SPARE = {"services": [{"provider": "spare", "model": "m"}]}


@pytest.mark.parametrize("name", CASES)
async def test_by_every_way_all_is_the_same(name: str, store_url: str, tmp_path: Path) -> None:
    case = CASES[name]
    walks = {way: await walk(way, case, store_url, tmp_path) for way in WAYS}
    assert list(walks["express"][1].values()) == case.stages
    assert walks["express"][0] == walks["lane"][0]
    assert walks["lane"][0] == walks["aiohttp"][0]
