"""Events that pass unread, among those that are read: whatever the cuts, the client and the books get the same."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balancer.details import Details
from balancer.domain import Outcome, Usage
from balancer.encoding import Decoder
from balancer.gateway.events import EventRelay
from balancer.gateway.masking import Mask
from balancer.gateway.messages import Take
from balancer.gateway.rewriting import Rewriter

KEY = "sk-upstream-0123456789"


def chunk(text: str, more: str = "") -> bytes:
    return b'data: {"id":"c","choices":[{"index":0,"delta":{"content":"%s"}}]%s}' % (text.encode(), more.encode())


USAGE = b'data: {"id":"c","choices":[],"usage":{"prompt_tokens":7,"completion_tokens":5}}'
DONE = b"data: [DONE]"
USUAL = (
    chunk("one"),
    chunk("two", ',"usage":null'),
    chunk("", ',"usage": null'),
    chunk("an error? usage? [DONE]? no"),
    chunk('\\"usage\\":{'),
    b": a comment",
    b"event: ping\ndata: {}",
    b'data: {"id":"c","choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}',
)


class Ends:
    """An upstream's answer in these parts, and a client that takes at once what it is told to."""

    status, length, is_started = 200, None, True
    headers: tuple[tuple[str, str], ...] = ()
    details: Details | None = None

    def __init__(self, parts: Sequence[bytes], refusals: Sequence[bool], *, tells_end: bool = False) -> None:
        self.parts = list(parts)
        self.tells_end = tells_end
        self.refusals = list(refusals)
        self.at_once = 0
        self.seen = self.sent_last = b""
        self.usage: Usage | None = None
        self.is_stream = False
        self.outcomes: list[tuple[Outcome, int]] = []
        self.has_token = False

    @property
    def is_at_end(self) -> bool:
        return self.tells_end and not self.parts

    def whole(self) -> bytes | None:
        return None

    async def read(self) -> bytes:
        return self.parts.pop(0) if self.parts else b""

    async def pump(self, take: Take) -> bytes:
        while (part := await self.read()) and take(part):
            pass
        return part

    async def close(self) -> None: ...

    def give_until(self, time: float) -> None: ...

    async def start(self, status: int, headers: tuple[tuple[str, str], ...], length: int | None) -> None: ...

    async def send(self, status: int, headers: tuple[tuple[str, str], ...], body: bytes) -> None: ...

    def write_now(self, chunk: bytes, framed: bytes = b"", /) -> bool:
        if self.refusals and self.refusals.pop(0):
            return False
        self.seen += chunk
        self.at_once += 1
        return True

    async def write(self, chunk: bytes) -> None:
        self.seen += chunk

    async def end(self, last: bytes = b"", /) -> None:
        self.sent_last = last
        self.seen += last

    def abort(self) -> None:
        raise AssertionError("the stream was whole")

    # -- as the attempt ------------------------------------------------------------------------------------------------

    def settle(self, outcome: Outcome, cooldown_ms: int = 0) -> None:
        self.outcomes.append((outcome, len(self.seen)))

    async def settle_before_last_byte(self, outcome: Outcome, cooldown_ms: int = 0) -> None:
        self.settle(outcome, cooldown_ms)

    def saw_token(self) -> None:
        self.has_token = True


def relayed(ends: Ends, *, hides_usage: bool, path: str = "/v1/chat/completions") -> None:
    relay = EventRelay(
        attempt=ends,
        stream=ends,
        decoder=Decoder(""),
        rewriter=Rewriter("", hides_usage=hides_usage),
        mask=Mask([KEY]),
        error_event=lambda _: b"",
        path=path,
    )

    async def run() -> None:
        await relay.run(ends, await ends.read())

    asyncio.run(run())


def cut(data: bytes, places: Sequence[int]) -> list[bytes]:
    at = sorted({place % (len(data) + 1) for place in places} - {0, len(data)})
    return [data[i:j] for i, j in zip([0, *at], [*at, len(data)], strict=True)]


@given(
    events=st.lists(st.sampled_from(USUAL), max_size=12),
    end=st.sampled_from([b"\n\n", b"\r\n\r\n"]),
    places=st.lists(st.integers(0, 5000), max_size=12),
    refusals=st.lists(st.booleans(), max_size=12),
    hides_usage=st.booleans(),
    tells_end=st.booleans(),
    path=st.sampled_from(["/v1/chat/completions", "/v1/responses"]),
    is_ended=st.booleans(),
)
def test_any_cuts_and_any_hurry_give_the_same(
    events: list[bytes],
    end: bytes,
    places: list[int],
    refusals: list[bool],
    hides_usage: bool,
    tells_end: bool,
    path: str,
    is_ended: bool,
) -> None:
    """`is_ended`: the last event has its blank line."""
    told = [chunk("first"), *events, USAGE, DONE]
    last = end if is_ended else b""
    ends = Ends(cut(end.join(told) + last, places), refusals, tells_end=tells_end)

    relayed(ends, hides_usage=hides_usage, path=path)

    shown = [event for event in told if not (hides_usage and event == USAGE)]
    assert ends.seen == end.join(shown) + last
    assert (ends.usage, ends.has_token) == (Usage(input=7, output=5), True)
    settled, sent = ends.outcomes[0]
    assert settled is Outcome.SUCCESS
    assert sent < len(ends.seen) or not is_ended, "the settle is on its way before the last byte is"


@pytest.mark.parametrize("hides_usage", [False, True])
def test_usual_events_are_not_read_and_wait_for_nothing(hides_usage: bool) -> None:
    usual = [chunk(f"word {number}", ',"usage":null' if number % 2 else "") + b"\n\n" for number in range(20)]
    ends = Ends([chunk("first") + b"\n\n", *usual, USAGE + b"\n\n", DONE + b"\n\n"], ())

    relayed(ends, hides_usage=hides_usage)

    assert ends.at_once == 20


def test_of_events_that_come_together_those_before_the_usage_pass_unread() -> None:
    usual = [chunk(f"word {number}") + b"\n\n" for number in range(20)]
    ends = Ends([chunk("first") + b"\n\n", b"".join([*usual, USAGE + b"\n\n", DONE + b"\n\n"])], ())

    relayed(ends, hides_usage=True)

    assert ends.at_once == 1
    assert ends.seen.endswith(usual[-1] + DONE + b"\n\n")


@pytest.mark.parametrize("hides_usage", [False, True])
def test_what_comes_with_the_stream_s_end_is_sent_with_it(hides_usage: bool) -> None:
    usual = [chunk(f"word {number}") + b"\n\n" for number in range(3)]
    ends = Ends(
        [chunk("first") + b"\n\n", *usual, b"".join([*usual, USAGE, b"\n\n", DONE, b"\n\n"])], (), tells_end=True
    )

    relayed(ends, hides_usage=hides_usage)

    assert ends.sent_last == b"".join([*usual, b"" if hides_usage else USAGE + b"\n\n", DONE, b"\n\n"])
    assert ends.outcomes[0] == (Outcome.SUCCESS, len(ends.seen) - len(ends.sent_last))


@pytest.mark.parametrize("kind", ["completed", "incomplete", "failed"])
def test_the_end_of_a_response_is_never_missed(kind: str) -> None:
    usual = [b'event: response.output_text.delta\ndata: {"delta":"word %d"}\n\n' % number for number in range(9)]
    end = b'data: {"type":"response.%b","response":{"id":"r"}}\n\n' % kind.encode()
    ends = Ends([chunk("first") + b"\n\n", *usual, end, *usual], ())

    relayed(ends, hides_usage=False, path="/v1/responses")

    assert ends.outcomes[0][1] == len(ends.seen) - len(end + b"".join(usual)), "settled as it came"


def test_usage_between_events_that_report_none_is_never_missed() -> None:
    none = chunk("word", ',"usage":null') + b"\n\n"
    ends = Ends([chunk("first") + b"\n\n", none, none + USAGE + b"\n\n" + none, none], ())

    relayed(ends, hides_usage=False)

    assert ends.usage == Usage(input=7, output=5)


def test_an_error_amid_what_passes_is_masked() -> None:
    error = b'data: {"error":{"message":"bad key %s"}}\n\n' % KEY.encode()
    ends = Ends([chunk("first") + b"\n\n", chunk("second") + b"\n\n" + error], ())

    relayed(ends, hides_usage=False)

    assert ends.seen.endswith(error.replace(KEY.encode(), b"***"))
    assert ends.outcomes[0][0] is not Outcome.SUCCESS
