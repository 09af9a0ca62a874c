"""No request that nobody sent, and no answer that nobody gave: raw bytes through both fronts, read as RFC 9112 does.

Both fronts see every request in one piece, byte by byte, and cut at random; a strict upstream notes what arrives.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import pytest_asyncio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests import servers
from tests.actors import OPENAI_JSON, chunk, openai_events
from tests.gateway import corpus, wire
from tests.gateway.conftest import FRONTS, Served, a_document, serving
from tests.store.conftest import eventually

pytestmark = pytest.mark.asyncio(loop_scope="module")

DELIVERIES = ("whole", "bytes", "cuts", "again")
"""At last behind two usual requests with much the same head, which a front may then know by its bytes."""
_BYTES_WHOLE = 3000
"""A request beyond it comes in pieces of a prime number of bytes instead of single ones."""
_PIECE_BYTES = 997
_SOON_S = 0.02
"""Most connections are closed by then, and others need not be served to see it."""


_USUAL = corpus.a_request(corpus.LENGTH, body=corpus.body_of("usual"))


class Seen(msgspec.Struct, frozen=True):
    """What came of a connection: the answers' statuses, what reached the upstream, and whether it was closed."""

    answers: tuple[int, ...]
    sent: tuple[str, ...]
    is_closed: bool = True
    faults: tuple[bytes, ...] = ()


class Fronts:
    """Two gateways on one store and one upstream, a front each."""

    def __init__(self, upstream: wire.Recorder, gateways: dict[str, Served]) -> None:
        self.upstream = upstream
        self.gateways = gateways
        self.answers: list[wire.Answer] = []

    async def ask(self, front: str, *pieces: bytes, closes: bool = False, again: bool = False) -> Seen:
        """Sends the pieces one by one; with `closes` the client closes its side once nothing more comes.

        That is: while two other clients were served one after the other. With `again` two requests were answered on
        the connection before.
        """
        upstream, url = self.upstream, self.gateways[front].url
        upstream.sent.clear()
        upstream.faults.clear()
        async with wire.a_line(url) as line:
            if again:
                for _ in range(2):
                    await line.send(_USUAL)
                    await line.until(OPENAI_JSON)
                    line.held.clear()
            await line.send(*pieces)
            if closes:
                held = -1
                while held != len(line.held) and not await line.until_closed(_SOON_S):
                    held = len(line.held)
                    await self._witness(url)
                    await self._witness(url)
                if not line.closed.done():
                    line.transport.write_eof()
            is_closed = await line.until_closed()
            self.answers = wire.answers_in(bytes(line.held))
        sent = tuple(name for name in map(_name, upstream.sent) if name not in ("usual", "witness"))
        return Seen(tuple(answer.status for answer in self.answers), sent, is_closed, tuple(upstream.faults))

    async def _witness(self, url: str) -> None:
        """Asks on another connection: what the first one's bytes were taken for has reached the upstream by then."""
        async with wire.a_line(url) as line:
            await line.send(corpus.sized(b"Connection: close", body=corpus.body_of("witness")))
            await line.until_closed()
            assert wire.answers_in(bytes(line.held))[0].status == 200


def _name(sent: wire.Sent) -> str:
    """The word in a request's body, and where it went if not to a chat."""
    try:
        word = str(msgspec.json.decode(sent.body)["messages"][0])
    except (msgspec.DecodeError, LookupError, TypeError):
        word = repr(sent.body)
    return word + sent.target.removeprefix(wire.CHAT)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fronts(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Fronts]:
    """Both fronts; at the end all that they sent has been settled, once."""
    folder: Path = tmp_path_factory.mktemp("smuggling")
    async with contextlib.AsyncExitStack() as stack:
        store = stack.enter_context(servers.running("valkey-9"))
        upstream = await stack.enter_async_context(wire.Recorder().running())
        gateways: dict[str, Served] = {}
        for front in FRONTS:
            flags: dict[str, Any] = {"fast_lane": front == "lane", "redis_deadline_ms": 5000}
            context = serving(store, folder / front, a_document(upstream.url), **flags)
            gateways[front] = await stack.enter_async_context(context)
        yield Fronts(upstream, gateways)
        await _assert_each_is_settled_once(upstream, gateways["lane"])


async def _assert_each_is_settled_once(upstream: wire.Recorder, gateway: Served) -> None:
    """The store, which both fronts share, knows of each request that went upstream, and of no other."""

    async def is_over() -> bool:
        states = (await gateway.view()).services.values()
        return not any(state.in_flight for state in states) and sum(s.requests for s in states) == upstream.total

    await eventually(is_over)


@pytest.fixture(autouse=True)
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """The log, down to its debugging lines."""
    caplog.set_level(logging.DEBUG)
    return caplog


def troubles(log: pytest.LogCaptureFixture) -> list[str]:
    """What someone should look at, and lines that repeat a client's body."""
    formatter = logging.Formatter()
    lines = [(record.levelno, formatter.format(record)) for record in log.get_records("call")]
    return [line for level, line in lines if level >= logging.WARNING or '"messages"' in line]


# -- requests ----------------------------------------------------------------------------------------------------------


def _pieces(case: corpus.Case, delivery: str) -> list[bytes]:
    """A case and the marker behind it, as they are delivered."""
    marker = b"" if case.is_unfinished else corpus.MARKER
    if delivery == "bytes" and len(case.raw) > _BYTES_WHOLE:
        return [*(case.raw[at : at + _PIECE_BYTES] for at in range(0, len(case.raw), _PIECE_BYTES)), marker]
    if delivery == "bytes":
        return [*wire.in_pieces(case.raw, delivery), marker]
    return wire.in_pieces(case.raw + marker, delivery)


def _allowed(case: corpus.Case, delivery: str) -> list[Seen]:
    """What may come of it.

    In one read aiohttp throws away what it has read before it stumbles, over noise, or anything behind the last request
    of a connection: that one gets no answer but the 400, and does not go upstream. Nothing is read in another way.
    """
    allowed = [Seen(case.answers, case.sent)]
    if case.or_else is not None:
        allowed.append(Seen(*case.or_else))
    if delivery != "bytes" and "marker" not in case.sent and not case.is_unfinished:
        allowed.append(Seen((400,), ()))
    return allowed


_VOLATILE = frozenset(["date", "x-request-id", "x-balancer-decision"])


def _shape(answer: wire.Answer) -> tuple[int, list[tuple[str, str]], bytes]:
    """An answer but for what differs from one to the next."""
    headers = sorted((name.lower(), "" if name.lower() in _VOLATILE else value) for name, value in answer.headers)
    return answer.status, headers, answer.body


def _sent_shape(sent: wire.Sent) -> tuple[str, list[tuple[str, str]], bytes]:
    """A request that went upstream but for its id."""
    headers = sorted((name.lower(), "" if name.lower() in _VOLATILE else value) for name, value in sent.headers)
    return sent.target, headers, sent.body


def _assert_error(answer: wire.Answer) -> None:
    assert answer.header("content-type") == "application/json"
    assert answer.header("x-request-id")
    assert msgspec.json.decode(answer.body)["error"].keys() == {"message", "type", "code", "param"}


@pytest.mark.parametrize("name", corpus.CASES)
async def test_a_request_has_one_reading_and_both_fronts_have_it(
    fronts: Fronts, log: pytest.LogCaptureFixture, name: str
) -> None:
    case = corpus.CASES[name]
    for delivery in DELIVERIES:
        shapes = {}
        for front in FRONTS:
            pieces = _pieces(case, delivery)
            seen = await fronts.ask(front, *pieces, closes=case.is_unfinished, again=delivery == "again")
            assert seen in _allowed(case, delivery), (front, delivery)
            for answer in fronts.answers:
                assert answer.is_whole
                if answer.status >= 400:
                    _assert_error(answer)
            sent = [_sent_shape(sent) for sent in fronts.upstream.sent if b"usual" not in sent.body]
            shapes[front] = seen, list(map(_shape, fronts.answers)), sent
        # The same answers, and the same requests, have the same headers, whoever gives them.
        assert shapes["lane"][0] != shapes["aiohttp"][0] or shapes["lane"] == shapes["aiohttp"]
    assert troubles(log) == []


@pytest.mark.parametrize(
    "raw",
    [
        corpus.a_request(corpus.LENGTH, b"Expect: a miracle"),
        corpus.a_request(corpus.LENGTH, host=b"Host: a b\r\n"),
        corpus.a_request(b"Transfer-Encoding: gzip, chunked", body=corpus.CHUNKS),
        corpus.a_request(b"Content-Length: 9223372036854775807"),
        corpus.a_request(corpus.CHUNKED, body=b"zz\r\n"),
    ],
    ids=["expectation", "host", "coding", "length", "chunk"],
)
@pytest.mark.parametrize("front", FRONTS)
async def test_what_has_a_path_is_refused_in_the_dialect_of_the_path(fronts: Fronts, front: str, raw: bytes) -> None:
    raw = raw.replace(corpus.CHAT, b"/v1/messages")
    head, end, body = raw.partition(b"\r\n\r\n")
    await fronts.ask(front, head + end, body, closes=True)
    (answer,) = fronts.answers
    assert 400 <= answer.status < 500
    assert msgspec.json.decode(answer.body)["error"].keys() == {"type", "message"}
    assert answer.header("connection") == "close"


@pytest.mark.parametrize("front", FRONTS)
async def test_an_answer_to_head_is_a_head_and_the_next_one_follows_it(fronts: Fronts, front: str) -> None:
    """RFC 9110 §9.3.2. A body there would be read as the beginning of the next answer."""
    async with wire.a_line(fronts.gateways[front].url) as line:
        await line.send(corpus.a_request(first=b"HEAD /healthz HTTP/1.1", body=b"") + corpus.MARKER)
        assert await line.until_closed()
        head, _, rest = bytes(line.held).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ")
    assert [answer.status for answer in wire.answers_in(rest)] == [200]


_INJECTED = (
    "größe\u560aX-Evil: b",
    "\u010aX-Evil: b",
    "\u2028X-Evil: b",
    "\x85X-Evil: b",
    "\u0d0aX-Evil: b",
    "\ud83e\udd86",
)


@pytest.mark.parametrize("value", _INJECTED)
@pytest.mark.parametrize("coding", ["utf-8", "utf-16-be", "latin-1"])
async def test_no_header_becomes_two_on_its_way_up(fronts: Fronts, value: str, coding: str) -> None:
    """What is a line end to some function or in some coding: a character that loses its high byte may become one."""
    raw = corpus.sized(b"X-A: " + value.encode(coding, "replace").translate(None, bytes(range(32))))
    for front in FRONTS:
        seen = await fronts.ask(front, raw + corpus.MARKER)
        assert seen == Seen((200, 200), ("meant", "marker"))
        assert {name.lower() for name, _ in fronts.upstream.sent[0].headers} == {
            "host", "content-type", "content-length", "accept-encoding", "authorization", "x-request-id", "x-a"
        }  # fmt: skip


# -- answers -----------------------------------------------------------------------------------------------------------

_OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
_SIZE = b"Content-Length: %d\r\n" % len(OPENAI_JSON)
_EVIL = b'{"whose":"somebody else"}'
_EVIL_ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nX-Evil: b\r\nContent-Length: %d\r\n\r\n%b" % (
    len(_EVIL),
    _EVIL,
)
_WHOLE = chunk(OPENAI_JSON) + b"0\r\n\r\n"
_STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def _with(header: bytes, *, body: bytes = OPENAI_JSON) -> bytes:
    return _OK + _SIZE + header + b"\r\n\r\n" + body


_LINE_ENDS = {
    "LF": b"\n", "CR": b"\r", "CR CR LF": b"\r\r\n", "NUL": b"\x00", "NUL CRLF": b"\x00\r\n", "CRLF blank": b"\r\n ",
    "CRLF tab": b"\r\n\t", "LF blank": b"\n ", "vertical tab": b"\x0b", "form feed": b"\x0c", "DEL": b"\x7f",
    "NEL": b"\x85", "NEL in UTF-8": b"\xc2\x85", "a line separator": b"\xe2\x80\xa8",
    "U+560A": b"\xe5\x98\x8a", "U+010A": b"\xc4\x8a",
    "U+560D U+560A": b"\xe5\x98\x8d\xe5\x98\x8a",
}  # fmt: skip
TRICKS: dict[str, bytes] = {
    **{f"{spelt} in a header": _with(b"X-A: b" + end + b"X-Evil: c") for spelt, end in _LINE_ENDS.items()},
    "CR in a name": _with(b"X-A\r: b"),
    "a blank in a name": _with(b"X A: b"),
    "a blank before a colon": _with(b"X-A : b"),
    "no colon": _with(b"X-A"),
    "an empty name": _with(b": b"),
    "a colon in a name": _with(b"X-A:: b"),
    "bytes in a name": _with(b"X-\xff: b"),
    "a line end in the reason": _OK.replace(b"200 OK", b"200 OK\rX-Evil: b") + _SIZE + b"\r\n" + OPENAI_JSON,
    "a line feed in the reason": _OK.replace(b"200 OK", b"200 OK\nX-Evil: b") + _SIZE + b"\r\n" + OPENAI_JSON,
    "a long reason": _OK.replace(b"OK", b"x" * 5000) + _SIZE + b"\r\n" + OPENAI_JSON,
    "two answers": wire.ANSWER + OPENAI_JSON + _EVIL_ANSWER,
    "an answer behind chunks": _OK + b"Transfer-Encoding: chunked\r\n\r\n" + _WHOLE + _EVIL_ANSWER,
    "an answer behind a stream": _STREAM + b"".join(map(chunk, openai_events())) + b"0\r\n\r\n" + _EVIL_ANSWER,
    "an answer inside a stream": _STREAM + chunk(b"data: {}\n\n" + _EVIL_ANSWER) + b"0\r\n\r\n",
    "the end of chunks inside a stream": _STREAM + chunk(b"data: 0\r\n\r\n" + _EVIL_ANSWER) + b"0\r\n\r\n",
    "an answer in the trailer": _OK
    + b"Transfer-Encoding: chunked\r\n\r\n"
    + chunk(OPENAI_JSON)
    + b"0\r\n"
    + _EVIL_ANSWER,
    "an answer in an extension": _OK
    + b"Transfer-Encoding: chunked\r\n\r\n%x;" % len(OPENAI_JSON)
    + b"a=HTTP/1.1 200 OK\r\n"
    + OPENAI_JSON
    + b"\r\n0\r\n\r\n",
    "a length and chunks": _with(b"Transfer-Encoding: chunked", body=_WHOLE),
    "a length and chunks that hide an answer": _OK
    + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n"
    + b"0\r\n\r\n"
    + _EVIL_ANSWER,
    "two lengths": _with(b"Content-Length: 5"),
    "the same length twice": _with(_SIZE.strip()),
    "a length with a sign": _OK + b"Content-Length: +%d\r\n\r\n" % len(OPENAI_JSON) + OPENAI_JSON,
    "a list of lengths": _OK + b"Content-Length: 5, 5\r\n\r\n" + OPENAI_JSON,
    "a length too short": _OK + b"Content-Length: 5\r\n\r\n" + OPENAI_JSON,
    "a length too short before an answer": _OK + b"Content-Length: 2\r\n\r\n{}" + _EVIL_ANSWER,
    "a length too long": _OK + b"Content-Length: 5000\r\n\r\n" + OPENAI_JSON,
    "a stream with a length too long": _STREAM.replace(b"Transfer-Encoding: chunked", b"Content-Length: 900")
    + b"".join(openai_events()),
    "an unknown coding": _OK + b"Transfer-Encoding: xchunked\r\n\r\n" + _WHOLE,
    "two codings": _OK + b"Transfer-Encoding: gzip, chunked\r\n\r\n" + _WHOLE,
    "chunked twice": _OK + b"Transfer-Encoding: chunked, chunked\r\n\r\n" + _WHOLE,
    "chunks in HTTP/1.0": _OK.replace(b"1.1", b"1.0") + b"Transfer-Encoding: chunked\r\n\r\n" + _WHOLE,
    "a folded coding": _OK + b"Transfer-Encoding:\r\n chunked\r\n\r\n" + _WHOLE,
    "a chunk that ends in a line feed": _OK + b"Transfer-Encoding: chunked\r\n\r\n5\n{}   \r\n0\r\n\r\n",
    "a chunk that is longer than told": _OK + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}   \r\n0\r\n\r\n",
    "a negative chunk": _OK + b"Transfer-Encoding: chunked\r\n\r\n-5\r\n{}   \r\n0\r\n\r\n",
    "a chunk of 2 to the 64": _OK + b"Transfer-Encoding: chunked\r\n\r\n10000000000000002\r\n{}\r\n0\r\n\r\n",
    "a body of no content": b"HTTP/1.1 204 No Content\r\nContent-Length: %d\r\n\r\n" % len(_EVIL) + _EVIL,
    "an answer behind no content": b"HTTP/1.1 204 No Content\r\n\r\n" + _EVIL_ANSWER,
    "an answer behind not modified": b"HTTP/1.1 304 Not Modified\r\n\r\n" + _EVIL_ANSWER,
    "a body of not modified": b"HTTP/1.1 304 Not Modified\r\nContent-Length: 25\r\n\r\n" + _EVIL,
    "early hints": b"HTTP/1.1 103 Early Hints\r\nX-Evil: b\r\n\r\n" * 3 + wire.ANSWER + OPENAI_JSON,
    "a switch of protocols": b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n" + _EVIL_ANSWER,
    "bare line feeds": (wire.ANSWER + OPENAI_JSON).replace(b"\r\n", b"\n"),
    "a status of four digits": _OK.replace(b"200", b"2000") + _SIZE + b"\r\n" + OPENAI_JSON,
    "a status of two digits": _OK.replace(b"200", b"20") + _SIZE + b"\r\n" + OPENAI_JSON,
    "a status that is negative": _OK.replace(b"200", b"-20") + _SIZE + b"\r\n" + OPENAI_JSON,
    "a status of zero": _OK.replace(b"200", b"000") + _SIZE + b"\r\n" + OPENAI_JSON,
    "HTTP/2.0": _OK.replace(b"1.1", b"2.0") + _SIZE + b"\r\n" + OPENAI_JSON,
    "framing of their own": _with(b"Connection: close, x-a\r\nKeep-Alive: timeout=1\r\nTrailer: x-a\r\nUpgrade: h2c"),
    "a header of ours": _with(b"x-balancer-service: theirs\r\nx-request-id: theirs\r\nDate: theirs"),
    "an error with an answer behind it": b"HTTP/1.1 400 Bad\r\nContent-Length: 2\r\n\r\n{}" + _EVIL_ANSWER,
}  # fmt: skip


@pytest.mark.parametrize("front", FRONTS)
@pytest.mark.parametrize("name", TRICKS)
async def test_an_upstream_gives_no_answer_but_the_one_to_its_request(
    fronts: Fronts, log: pytest.LogCaptureFixture, front: str, name: str
) -> None:
    """Whatever it sends, the client gets one answer, whole or visibly broken off, and the next is the marker's own."""
    fronts.upstream.scripted.append(TRICKS[name])
    first = await fronts.ask(front, corpus.sized() + corpus.MARKER)
    answers = fronts.answers
    assert first.is_closed
    assert first.faults == ()
    if answers[0].is_whole:
        assert first.sent == ("meant", "marker")
        assert answers[1].status == 200
        assert answers[1].body == OPENAI_JSON
        assert len(answers) == 2
    else:
        assert len(answers) == 1
    # RFC 9112 §2.2: a line feed alone may end a line, so that what is behind it is a header, and no more than that.
    hidden = {"keep-alive", "trailer", "upgrade"} | (
        {"x-evil"} if "LF" not in name and "line feed" not in name else set()
    )
    for answer in answers:
        assert not {name.lower() for name, _ in answer.headers} & hidden
        assert "theirs" not in str([value for name, value in answer.headers if name != "x-upstream-request-id"])
        assert answer.body != _EVIL
    assert troubles(log) == []


# -- what nobody thought of --------------------------------------------------------------------------------------------

_SEEDS = [
    corpus.sized(b"X-A: b", b"Connection: keep-alive"),
    corpus.sized(first=b"POST /v1/chat/completions?a=b HTTP/1.1"),
    corpus.a_request(corpus.CHUNKED, body=corpus.CHUNKS),
    corpus.sized(b"Expect: 100-continue"),
    corpus.sized() + corpus.SMUGGLED,
]
_TOKENS = [
    b"\r", b"\n", b"\r\n", b"\r\n\r\n", b" ", b"\t", b"\x00", b"\x0b", b"\x7f", b"\x85", b"\xff", b":", b";", b",",
    b"0", b"1", b"-", b"+", b"chunked", b"HTTP/1.0", b"Content-Length: 5\r\n", b"Transfer-Encoding: chunked\r\n",
    b"Transfer-Encoding: identity\r\n", b"Connection: close\r\n", b"Host: b\r\n", b"Expect: 100-continue\r\n",
    b"Upgrade: h2c\r\n", b"POST / HTTP/1.1\r\n", b"0\r\n\r\n", b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n",
]  # fmt: skip


@st.composite
def mutants(draw: st.DrawFn) -> bytes:
    """A good request in which one to three places were changed."""
    raw = draw(st.sampled_from(_SEEDS))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(raw)))
        end = min(len(raw), at + draw(st.integers(0, 12)))
        part = draw(st.one_of(st.sampled_from(_TOKENS), st.binary(max_size=3), st.just(raw[at:end] * 2)))
        raw = raw[:at] + part + raw[draw(st.sampled_from([at, end])) :]
    return raw


def _agree(lane: Seen, aiohttp: Seen) -> bool:
    """True if both read the same, as far as they read.

    In one read aiohttp throws away what it has read before it stumbles; behind an offer of another protocol it closes.
    """
    if lane == aiohttp:
        return True
    whole, part = (lane, aiohttp) if len(lane.answers) >= len(aiohttp.answers) else (aiohttp, lane)
    answered = part.answers[:-1] if part.answers[-1:] == (400,) else part.answers
    return whole.answers[: len(answered)] == answered and whole.sent[: len(part.sent)] == part.sent


@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(raw=mutants())
async def test_both_fronts_read_whatever_comes_alike(fronts: Fronts, log: pytest.LogCaptureFixture, raw: bytes) -> None:
    log.clear()
    seen = {}
    for front in FRONTS:
        seen[front] = await fronts.ask(front, raw + corpus.MARKER, closes=True)
        assert seen[front].is_closed
        assert seen[front].faults == ()
        assert max(seen[front].answers, default=0) < 500
        assert all(answer.is_whole for answer in fronts.answers)
    assert _agree(seen["lane"], seen["aiohttp"]), seen
    assert troubles(log) == []
