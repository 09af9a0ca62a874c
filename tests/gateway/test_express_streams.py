"""Streams on the express way beside the ordinary one: whatever becomes of them, all is the same."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tests.actors import STREAM_HEAD, Upstream, anthropic_events, chunk, openai_events
from tests.gateway.conftest import KEY
from tests.gateway.test_express import ERROR, ONE_SERVICE, QUICK, answers, case, one_after_the_other, sends, walk
from tests.gateway.trails import WAYS, Books, Walked, a_document, a_post, come, nothing_left, told, walked
from tests.store.conftest import eventually

ON_BOTH_LOOPS = True
ASKS: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
OPENAI, ANTHROPIC = openai_events(words=5), anthropic_events()
WORDS, USAGE, DONE = OPENAI[:5], OPENAI[5], OPENAI[6]
END = b"0\r\n\r\n"
ERROR_EVENT = b'data: {"error":{"message":"no","type":"server_error"}}\n\n'


def a_stream(*stages: str, **more: Any) -> Any:
    """A stream whose client wants to know its usage."""
    return case(*stages, **{"asks": [[a_post("r1", **ASKS)]]} | more)


def streams(events: list[bytes], **more: Any) -> Any:
    return lambda upstream: upstream.then().streams(events, **more)


def parts(data: bytes, size: int) -> list[bytes]:
    return [data[at : at + size] for at in range(0, len(data), size)]


BODY = b"".join(OPENAI)
WHOLE = STREAM_HEAD + b"".join(map(chunk, OPENAI)) + END

CASES = {
    "as usual": a_stream("express", upstream=streams(OPENAI)),
    "no usage is asked for": a_stream("express", upstream=streams(OPENAI), asks=[[a_post("r1", stream=True)]]),
    "no usage is asked for, in one chunk": a_stream(
        "express", upstream=sends(STREAM_HEAD, chunk(BODY), END), asks=[[a_post("r1", stream=True)]]
    ),
    "no usage is asked for, nor may be": a_stream(
        "express", upstream=streams(OPENAI), asks=[[a_post("r1", stream=True)]], provider={"stream_usage": False}
    ),
    "the usage is asked for by nobody and told with the last": a_stream(
        "express",
        upstream=sends(STREAM_HEAD, *map(chunk, WORDS), chunk(USAGE + DONE) + END),
        asks=[[a_post("r1", stream=True)]],
    ),
    "Anthropic": a_stream(
        "express",
        upstream=streams(ANTHROPIC),
        asks=[[a_post("r1", "anthropic-version: 2023-06-01", path="/v1/messages", model="claude", stream=True)]],
    ),
    "several on one connection": a_stream(
        *["express"] * 3,
        upstream=one_after_the_other(streams(OPENAI), answers(), streams(OPENAI)),
        asks=[[a_post("r1", **ASKS)], [a_post("r2")], [a_post("r3", **ASKS)]],
    ),
    "two at once": a_stream(
        *["express"] * 2,
        upstream=one_after_the_other(streams(OPENAI), streams(OPENAI)),
        asks=[[a_post("r1", **ASKS) + a_post("r2", **ASKS)]],
    ),
    "all at once": a_stream("express", upstream=sends(WHOLE)),
    "all at once, with a length": a_stream(
        "express",
        upstream=answers(body=BODY, content_type="text/event-stream; charset=utf-8"),
    ),
    "until the connection ends": a_stream(
        "express", upstream=sends(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n", *OPENAI)
    ),
    "usage and end in one chunk": a_stream(
        "express", upstream=sends(STREAM_HEAD, *map(chunk, WORDS), chunk(USAGE + DONE), END)
    ),
    "words, usage and end in one chunk": a_stream("express", upstream=sends(STREAM_HEAD, chunk(BODY) + END)),
    "something behind its end": a_stream(
        "express", upstream=sends(STREAM_HEAD, *map(chunk, OPENAI), chunk(b": bye\n\n"), END)
    ),
    "no usage": a_stream("express", upstream=streams(openai_events(usage=None))),
    "a head of its own": a_stream("express", upstream=streams(OPENAI, headers=(("X-A", "b"), ("x-request-id", "c")))),
    "no decision headers": a_stream("express", upstream=streams(OPENAI), flags={"decision_headers": False}),
    "lines that end in CRLF": a_stream(
        "express", upstream=sends(STREAM_HEAD, *(chunk(event.replace(b"\n", b"\r\n")) for event in OPENAI), END)
    ),
    # -- the ordinary way begins it
    "a limit and a second try": a_stream(
        "answer", upstream=one_after_the_other(answers(429, ERROR, retry_after="9"), streams(OPENAI))
    ),
    "an error first": a_stream("answer", upstream=one_after_the_other(streams([ERROR_EVENT]), streams(OPENAI))),
    "an error first, and nothing else": a_stream("answer", upstream=streams([ERROR_EVENT]), rule=ONE_SERVICE),
    "a comment first": a_stream("answer", upstream=streams([b": hello\n\n", *OPENAI])),
    "a coding": a_stream(
        "answer", upstream=streams(OPENAI, headers=(("Content-Encoding", "br"),)), asks=[[a_post("r1", **ASKS)]]
    ),
    "its credential in a header": a_stream("answer", upstream=streams(OPENAI, headers=(("X-Debug", KEY),))),
    "nothing": a_stream("answer", upstream=sends(STREAM_HEAD, END), rule=ONE_SERVICE),
    "its end behind its head": a_stream("answer", upstream=sends(STREAM_HEAD), rule=ONE_SERVICE),
    "JSON": a_stream("express", upstream=answers()),
    # -- it goes on with it
    "an error later": a_stream("stream", upstream=streams([*WORDS, ERROR_EVENT])),
    "an error later with its credential": a_stream(
        "stream", upstream=streams([*WORDS, ERROR_EVENT.replace(b"no", KEY.encode())])
    ),
    "an error later that nobody may see the usage of": a_stream(
        "stream", upstream=streams([*WORDS, USAGE, ERROR_EVENT]), asks=[[a_post("r1", stream=True)]]
    ),
    "no end": a_stream("stream", upstream=sends(STREAM_HEAD, *map(chunk, [*WORDS, USAGE]), END)),
    "it breaks off": a_stream("stream", upstream=sends(STREAM_HEAD, *map(chunk, WORDS))),
    "a reset": a_stream("stream", upstream=sends(STREAM_HEAD, *map(chunk, WORDS), resets=True)),
    "it breaks off in an event": a_stream("stream", upstream=sends(STREAM_HEAD, *map(chunk, WORDS), chunk(USAGE[:20]))),
    "it breaks off behind its last event": a_stream("stream", upstream=sends(STREAM_HEAD, *map(chunk, OPENAI))),
    "no HTTP": a_stream("stream", upstream=sends(STREAM_HEAD, *map(chunk, WORDS), b"zz\r\n")),
    "silence": a_stream(
        "stream", upstream=sends(STREAM_HEAD, *map(chunk, WORDS), stalls=True), provider={"timeouts": QUICK}
    ),
    "silence behind its head": a_stream(
        "answer", upstream=sends(STREAM_HEAD, stalls=True), provider={"timeouts": QUICK}, rule=ONE_SERVICE
    ),
    "silence behind its last event": a_stream(
        "stream", upstream=sends(STREAM_HEAD, *map(chunk, OPENAI), stalls=True), provider={"timeouts": QUICK}
    ),
    "no time": a_stream(
        "stream", upstream=sends(STREAM_HEAD, *map(chunk, WORDS), stalls=True), provider={"timeout": 1}
    ),
}


BROKEN = {
    "its end behind its head",
    "it breaks off",
    "a reset",
    "it breaks off in an event",
    "it breaks off behind its last event",
    "no HTTP",
}
"""Of these the answer keeps its error, whose traceback leads back to it: by every way it is the collector's to free."""


@pytest.mark.parametrize("name", CASES)
async def test_by_every_way_a_stream_is_the_same(name: str, store_url: str, tmp_path: Path) -> None:
    case = CASES[name]
    ours, *others = [await walk(way, case, store_url, tmp_path) for way in WAYS]
    for stage, expected in zip(ours.stages.values(), case.stages, strict=True):
        assert stage in (expected, "answer" if expected == "stream" else expected), "it may all come in one read"
    for other in others:
        assert ours.answers == other.answers
        assert ours.sent == other.sent
        assert ours.books == other.books


@pytest.mark.parametrize("asks", [ASKS, {"stream": True}], ids=["usage", "no usage"])
@pytest.mark.parametrize("size", [1, 7, 150, 333])
async def test_a_stream_may_be_cut_anywhere(size: int, asks: dict[str, Any], store_url: str, tmp_path: Path) -> None:
    """In pieces of the events, each a chunk, and in pieces of the bytes."""
    for pieces in ([STREAM_HEAD, *map(chunk, parts(BODY, size)), END], parts(WHOLE, size)):
        cut = a_stream(upstream=sends(*pieces), asks=[[a_post("r1", **asks)]])
        ours, *others = [await walk(way, cut, store_url, tmp_path) for way in WAYS]
        for other in others:
            assert (ours.answers, ours.books) == (other.answers, other.books)
        assert ours.books.services["up:m"][3:5] == [33, 21]


LATER = {
    "an error": ("stream", [ERROR_EVENT]),
    "an error with its credential": ("stream", [ERROR_EVENT.replace(b"no", KEY.encode())]),
    "an error behind the usage": ("stream", [USAGE, ERROR_EVENT]),
    "no end": ("stream", [USAGE]),
    "half an event": ("stream", [*WORDS, USAGE[:20]]),
    "its end": ("express", [USAGE, DONE]),
    "all at once": ("express", [WORDS[0] + USAGE + DONE]),
    "the word error in its text": ("express", [WORDS[0].replace(b"w0", b"error"), USAGE, DONE]),
    "the word error in its name": ("stream", [WORDS[0].replace(b"data", b"event: error\ndata")]),
    "something behind its end": ("express", [USAGE, DONE, b": bye\n\n"]),
}


@pytest.mark.parametrize("asks", [ASKS, {"stream": True}], ids=["usage", "no usage"])
@pytest.mark.parametrize("name", LATER)
async def test_what_comes_once_the_client_has_the_first_events(
    name: str, asks: dict[str, Any], store_url: str, tmp_path: Path
) -> None:
    expected, events = LATER[name]

    async def scene(way: str) -> tuple[Any, Books]:
        gate = asyncio.Event()
        async with (
            Upstream().running() as upstream,
            walked(store_url, tmp_path, a_document(upstream.url), way) as served,
        ):
            await served.ask(a_post("first"))
            upstream.streams([*WORDS, *events], gates={len(WORDS): gate})
            served.line.held.clear()
            served.line.transport.write(a_post("r", **asks))
            await served.line.until(WORDS[-1])
            gate.set()
            got = await come(served.line, 1)
            books = await served.books()
            assert way != "express" or served.trail.stages["r"] == expected
            return told(got), books

    ours, *others = [await scene(way) for way in WAYS]
    assert others == [ours, ours]


async def left(way: str, at: int, store_url: str, tmp_path: Path) -> Books:
    """What is counted when a client leaves once it has so many events."""
    async with (
        Upstream().running() as upstream,
        walked(store_url, tmp_path, a_document(upstream.url), way) as served,
    ):
        await served.ask(a_post("first"))
        upstream.streams(OPENAI, gates={at: asyncio.Event()})
        served.line.held.clear()
        served.line.transport.write(a_post("cut", **ASKS))
        await served.line.until(OPENAI[at - 1])
        served.line.transport.abort()
        await upstream.hung_up.wait()
        books = await served.books()
        upstream.answers()
        await served.ask(a_post("last"))
        return books


@pytest.mark.parametrize("at", [1, 3, 6])
async def test_who_leaves_a_stream_is_counted_as_on_the_ordinary_way(at: int, store_url: str, tmp_path: Path) -> None:
    ours, *others = [await left(way, at, store_url, tmp_path) for way in WAYS]
    assert others == [ours, ours]
    assert ours.services["up:m"][3] == (22 if at == 6 else 11)


async def test_a_slow_client_gets_the_whole_stream(store_url: str, tmp_path: Path) -> None:
    word = OPENAI[0].replace(b"w0", b"x" * 30_000)
    events = [word] * 400 + [USAGE, DONE]
    async with (
        Upstream().running() as upstream,
        walked(store_url, tmp_path, a_document(upstream.url)) as served,
    ):
        await served.ask(a_post("first"))
        upstream.streams(events)
        served.line.held.clear()
        served.line.transport.pause_reading()
        served.line.transport.write(a_post("slow", **ASKS))
        await eventually(lambda: is_true(served.trail.stages.get("slow") == "stream"))
        served.line.transport.resume_reading()
        (answer,) = await come(served.line, 1)
        books = await served.books()
        assert answer.body == b"".join(events)
        assert books.services["up:m"][1:5] == [2, 0, 22, 14]


async def test_a_drain_lets_a_stream_come_to_its_end(store_url: str, tmp_path: Path) -> None:
    gate = asyncio.Event()
    async with (
        Upstream().running() as upstream,
        walked(store_url, tmp_path, a_document(upstream.url)) as served,
    ):
        await served.ask(a_post("first"))
        upstream.streams(OPENAI, gates={3: gate})
        served.line.held.clear()
        served.line.transport.write(a_post("r", **ASKS))
        await served.line.until(OPENAI[2])
        draining = asyncio.create_task(served.gateway.drain())
        await asyncio.sleep(0)
        gate.set()
        (answer,) = await come(served.line, 1)
        assert await served.line.until_closed()
        await draining
        assert (answer.body, answer.is_whole) == (BODY, True)
        assert (served.trail.stages["r"], served.open_requests) == ("express", 0)


async def test_streams_leave_nothing_behind(store_url: str, tmp_path: Path) -> None:
    async with (
        Upstream().running() as upstream,
        walked(store_url, tmp_path, a_document(upstream.url, rule=ONE_SERVICE)) as served,
    ):
        await served.ask(a_post("first"))
        async with nothing_left(served):
            for name, one in CASES.items():
                if name not in BROKEN and not one.provider and not one.flags:
                    await _asked(served, upstream, one)


async def _asked(served: Walked, upstream: Upstream, one: Any) -> None:
    upstream.answers()
    one.upstream(upstream)
    upstream.then().answers()
    upstream.skips()
    for pieces in one.asks:
        await served.ask(*pieces, answers=b"".join(pieces).count(b"POST /"))


async def is_true(value: bool) -> bool:
    """For `eventually`."""
    return value
