"""A stream's way down: its bytes pass at once, or event by event where something of them must not pass.

Whole events in which nothing is of interest go from the upstream's socket to the client's within one callback. The
attempt is settled before the stream's last event is sent on.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable

import msgspec

from balancer import bodies
from balancer.details import DetailedUsage
from balancer.domain import ApiStyle, Outcome
from balancer.encoding import DecodeError, Decoder
from balancer.errors import UpstreamAnswerError, UpstreamError
from balancer.failures import Verdict, classify_error_event
from balancer.gateway.accounting import Accounting
from balancer.gateway.masking import Mask
from balancer.gateway.messages import ClientStream, Take, UpstreamResponse
from balancer.gateway.rewriting import Rewriter
from balancer.sse import Event, Parser
from balancer.usage import StreamUsage

Remember = Callable[[str], Awaitable[None]]
"""Takes the id of an answer that can be asked for again, and returns once it is kept."""

_EVENTS_WITHHELD = 16
"""Behind so many events none is expected to be the first that names the answer's id."""
_WITHHELD_LIMIT_BYTES = 8 * 1024 * 1024
"""The first event repeats the client's instructions and tools."""
_SMELL = b"error"
"""In every dialect it stands at the beginning of an event that tells of an error."""
_OF_INTEREST = re.compile(
    rb'"usage"\s*+:\s*+(?!null)|error|\[DONE\]|message_stop|response\.(?:completed|incomplete|failed)'
)
"""Stands in every event that reports usage, ends the stream, or tells of an error."""
_WORDS = (
    b"error",
    b"[DONE]",
    b"message_stop",
    b"response.completed",
    b"response.incomplete",
    b"response.failed",
    b'"usage"',
)
"""One of them stands there. `rfind` takes a tenth of the time that the pattern takes where there is none."""
_CHAT_PATHS = ("/v1/chat/completions", "/v1/completions")
_CHAT_WORDS = (b"error", b"[DONE]", b'"usage"')
"""The ones that streams of OpenAI's have which are asked for there; each word takes as long to look for."""
_EVENT_ENDS = (b"\n\n", b"\r\n\r\n")


def takes_none(chunk: bytes, framed: bytes = b"", /) -> bool:
    """False: each chunk is to be looked at."""
    return False


class EventRelay:
    """Relays one stream that has been started. `decoder` is None for a coding that we cannot read.

    With `remember`, nothing of an event that names the answer's id is sent before that is kept. `path`: what was asked.
    """

    __slots__ = (
        "_attempt",
        "_by_event",
        "_decoder",
        "_error_event",
        "_is_coded",
        "_is_last",
        "_mask",
        "_may_skim",
        "_must_abort",
        "_parser",
        "_remember",
        "_rewriter",
        "_sent_bytes",
        "_stream",
        "_style",
        "_unnamed",
        "_usage",
        "_verdict",
        "_withheld",
        "_withheld_bytes",
        "_words",
    )

    def __init__(
        self,
        *,
        attempt: Accounting,
        stream: ClientStream,
        decoder: Decoder | None,
        rewriter: Rewriter,
        mask: Mask,
        error_event: Callable[[UpstreamError], bytes],
        style: ApiStyle = "openai",
        path: str = "",
        remember: Remember | None = None,
    ) -> None:
        self._attempt = attempt
        self._stream = stream
        self._decoder = decoder
        self._rewriter = rewriter
        self._mask = mask
        self._error_event = error_event
        self._style: ApiStyle = style
        self._words = _CHAT_WORDS if style == "openai" and path in _CHAT_PATHS else _WORDS
        self._remember = remember if decoder is not None else None
        self._withheld: list[bytes] = []  # With the beginning of an event that may name the answer's id.
        self._withheld_bytes = self._unnamed = 0
        self._verdict: Verdict | None = None
        self._by_event = decoder is not None and rewriter.edits_events
        self._is_coded = not self._by_event and (decoder is None or not decoder.is_identity)
        self._may_skim = decoder is not None and decoder.is_identity and not rewriter.renames
        attempt.is_stream = True
        self._parser = Parser()
        self._usage = StreamUsage() if attempt.details is None else DetailedUsage(attempt.details)
        self._must_abort = False
        self._is_last = False  # Nothing comes behind what is being read: it is sent with the stream's end.
        self._sent_bytes = 0  # How much of the unfinished event was sent before it went event by event.

    async def run(self, response: UpstreamResponse, chunk: bytes) -> None:
        """Relays a stream, from its first chunk on, to its end."""
        try:
            await self._relay(response, chunk)
        except UpstreamError as exc:
            await self._break_off(exc)

    async def go_on(self, response: UpstreamResponse) -> None:
        """Relays the rest of a stream of which some was heard, to its end."""
        try:
            await self._settle_if_complete()
            if not response.is_at_end:
                await self._release()
            await self._relay(response, await response.read())
        except UpstreamError as exc:
            await self._break_off(exc)

    async def _relay(self, response: UpstreamResponse, chunk: bytes) -> None:
        while chunk:
            known = self._skimmable(chunk) if self._can_skim else 0
            self._is_last = response.is_at_end
            if not self._by_event:
                await self._pass(chunk, known)
            elif not known or not self._sent_unread(chunk[:known]):
                await self._edit(chunk)
            elif known < len(chunk):
                await self._edit(chunk[known:])
            chunk = await (response.pump(self._skim) if self._can_skim else response.read())
        await self._finish()

    # -- without waiting -----------------------------------------------------------------------------------------------

    @property
    def take(self) -> Take:
        """What takes chunks in the callback that received them, until it refuses one."""
        return self._skim if self._can_skim else takes_none

    @property
    def is_complete(self) -> bool:
        """True once the last event was heard, and was no error."""
        return self._usage.is_complete and not self._usage.is_error

    def hear(self, chunk: bytes) -> bool:
        """Puts what is to be sent of a chunk of whole plain events aside; False, with nothing done, for any other.

        It is `send_now` or `end_now` that sends it, or else `go_on`, as it must behind an error.
        """
        if not chunk.endswith(_EVENT_ENDS) or not self._parser.is_between_events or self._usage.is_error:
            return False
        known = self._skimmable(chunk) if self._can_skim else 0
        events = self._hear(chunk[known:] if known else chunk)
        if self._by_event:
            chunk = chunk[:known] + b"".join(map(self._rewriter.event, events))
        if self._verdict is not None:
            self._by_event = True
            chunk = chunk[:known] + self._mask.over(chunk[known:])
        self._withheld.append(chunk)
        return True

    def send_now(self) -> bool:
        """Sends what was put aside; False, with nothing done, where that has to wait, or is for `go_on`."""
        if self._usage.is_error:
            return False
        withheld = self._withheld
        data = withheld[0] if len(withheld) == 1 else b"".join(withheld)
        if data and not self._stream.write_now(data):
            return False
        withheld.clear()
        return True

    def put_aside(self) -> bytes:
        """What `send_now` would send."""
        return b"".join(self._withheld)

    # -- chunks --------------------------------------------------------------------------------------------------------

    @property
    def _can_skim(self) -> bool:
        """True when events of which nothing needs to be known may pass unread."""
        return (
            self._may_skim
            and self._usage.has_content
            and self._remember is None
            and not self._usage.is_error
            and self._parser.is_between_events
        )

    def _skim(self, chunk: bytes, framed: bytes = b"", /) -> bool:
        """Sends a chunk of whole events of which nothing needs to be known; False, with nothing done, for any other."""
        if not chunk.endswith(_EVENT_ENDS):
            return False
        rfind = chunk.rfind
        for word in self._words:
            if rfind(word) >= 0 and _OF_INTEREST.search(chunk, chunk.find(word)):
                return False
        return self._stream.write_now(chunk, framed)

    def _skimmable(self, chunk: bytes) -> int:
        """How many bytes of a chunk are its first events, of which nothing needs to be known."""
        found = _OF_INTEREST.search(chunk)
        end = chunk.rfind(b"\n\n", 0, found.start() if found else len(chunk))
        return end + 2 if end >= 0 else 0

    def _sent_unread(self, events: bytes) -> bool:
        """Sends events at once; False where that cannot be."""
        if self._is_last:
            self._withheld.append(events)
            return True
        return self._stream.write_now(events)

    async def _pass(self, chunk: bytes, known: int) -> None:
        """Sends the chunk as it came, unless an error in it could show a credential.

        Nothing needs to be known of its first `known` bytes.
        """
        sent_bytes = self._parser.tail_bytes
        events: list[Event] = []
        try:
            for part in self._decoder.feed(chunk[known:] if known else chunk) if self._decoder else ():
                events = self._hear(part)
                await self._keep(events)
                if self._is_coded and self._usage.is_error and any(self._mask.shows_in(e.raw) for e in events):
                    self._must_abort = True  # Nothing can be masked in coded bytes.
                    raise UpstreamAnswerError("the upstream repeats a credential in a coded error")
        except DecodeError:
            self._decoder = None  # The upstream's bytes pass; what they report cannot be read.
        await self._settle_if_complete()
        # An unfinished event is of no use to a client yet, so that holding one back costs nothing.
        may_show = self._usage.is_error or self._parser.tail_has(_SMELL, among=len(chunk))
        if may_show and self._mask and not self._is_coded:
            if self._withheld:  # The whole unfinished event is at its end, and none of that was sent.
                await self._release(but_bytes=sent_bytes)
                sent_bytes = 0
            if known:
                await self._stream.write(chunk[:known])
            self._by_event, self._sent_bytes = True, sent_bytes
            await self._send(events)
        else:
            self._withheld.append(chunk)
            self._withheld_bytes += len(chunk)
            if not self._is_last and not self._must_withhold():
                await self._release()

    async def _edit(self, chunk: bytes) -> None:
        """Sends the events that the chunk finishes, each as the client should see it."""
        assert self._decoder is not None, "only what can be read is edited"
        try:
            for part in self._decoder.feed(chunk):
                events = self._hear(part)
                await self._settle_if_complete()
                await self._keep(events)
                await self._send(events)
        except DecodeError as exc:
            # What was sent so far is decoded: coded bytes behind it would be nobody's.
            raise UpstreamAnswerError("the upstream's stream is not in the coding that it announced") from exc

    async def _send(self, events: list[Event]) -> None:
        if events and self._sent_bytes:
            events[0] = msgspec.structs.replace(events[0], raw=events[0].raw[self._sent_bytes :])
            self._sent_bytes = 0
        out = b"".join(map(self._rewriter.event, events))
        if self._usage.is_error:
            out = self._mask.over(out)
        if self._is_last:
            self._withheld.append(out)
        elif out:
            await self._stream.write(out)

    async def _keep(self, events: list[Event]) -> None:
        """Looks for the answer's id as long as it is not known."""
        if self._remember is None:
            return
        for event in events:
            if response_id := bodies.response_id_of_event(event.data):
                await self._remember(response_id)
                self._remember = None
                break
            self._unnamed += bool(event.data)

    def _must_withhold(self) -> bool:
        """True while an unfinished event may be the first to name the answer's id."""
        return (
            self._remember is not None
            and self._parser.tail_bytes > 0
            and self._unnamed < _EVENTS_WITHHELD
            and self._withheld_bytes <= _WITHHELD_LIMIT_BYTES
        )

    async def _release(self, *, but_bytes: int = 0) -> None:
        """Sends what was put aside, without its last bytes."""
        data = self._withdrawn()
        if len(data) > but_bytes:
            await self._stream.write(data[: len(data) - but_bytes])

    def _withdrawn(self) -> bytes:
        """What was put aside, which is not any more."""
        data = b"".join(self._withheld)
        self._withheld.clear()
        self._withheld_bytes = 0
        return data

    def _hear(self, part: bytes) -> list[Event]:
        events = self._parser.feed(part)
        for event in events:
            self._see(event)
        return events

    def _see(self, event: Event) -> None:
        self._usage.see(event)
        self._attempt.usage = self._usage.usage
        if self._usage.is_error and self._verdict is None:
            self._verdict = classify_error_event(self._style, event.data)
        if self._usage.has_content:
            self._attempt.saw_token()

    # -- ends ----------------------------------------------------------------------------------------------------------

    async def _settle_if_complete(self) -> None:
        if self._usage.is_complete:
            verdict = self._verdict or Verdict(outcome=Outcome.SUCCESS)
            await self._attempt.settle_before_last_byte(verdict.outcome, verdict.cooldown_ms)

    async def _finish(self) -> None:
        """The upstream has ended the stream; its last event may lack the blank line."""
        last = self._parser.finish()
        if last is not None:
            self._see(last)
        await self._settle_if_complete()
        is_cut = self._decoder is not None and not self._decoder.is_finished
        if self._by_event and is_cut and not self._usage.is_complete:
            raise UpstreamAnswerError("the upstream's stream ends before its coding does")
        if last is not None:
            await self._keep([last])
        if self._by_event and last is not None:
            self._is_last = True
            await self._send([last])
        await self._attempt.settle_before_last_byte(Outcome.SUCCESS)
        await self._stream.end(self._withdrawn())

    async def _break_off(self, exc: UpstreamError) -> None:
        """Tells the client that the stream broke, unless it was complete all the same."""
        last = self._parser.finish()
        if last is not None:
            self._see(last)
        await self._settle_if_complete()
        await self._attempt.settle_before_last_byte(Outcome.FAILED)
        if self._must_abort or (self._is_coded and not self._usage.is_complete):
            self._stream.abort()  # No plain event can stand behind coded bytes.
            return
        await self._release()
        if not self._usage.is_complete:
            # Half an event may be on its way already: a blank line ends it.
            is_half_sent = self._sent_bytes > 0 if self._by_event else last is not None
            await self._stream.write((b"\n\n" if is_half_sent else b"") + self._error_event(exc))
        await self._stream.end()
