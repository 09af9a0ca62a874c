"""A stream's way down: its bytes pass at once, or event by event where something of them must not pass.

The attempt is settled before the stream's last event is sent on.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from balancer.domain import Outcome
from balancer.encoding import DecodeError, Decoder
from balancer.errors import UpstreamAnswerError, UpstreamError
from balancer.gateway.accounting import Accounting
from balancer.gateway.masking import Mask
from balancer.gateway.messages import ClientStream, UpstreamResponse
from balancer.gateway.rewriting import Rewriter
from balancer.sse import Event, Parser
from balancer.usage import StreamUsage

_SMELL = b"error"
"""In every dialect it stands at the beginning of an event that tells of an error."""


class EventRelay:
    """Relays one stream that has been started. `decoder` is None for a coding that we cannot read."""

    def __init__(
        self,
        *,
        attempt: Accounting,
        stream: ClientStream,
        decoder: Decoder | None,
        rewriter: Rewriter,
        mask: Mask,
        error_event: Callable[[UpstreamError], bytes],
    ) -> None:
        self._attempt = attempt
        self._stream = stream
        self._decoder = decoder
        self._rewriter = rewriter
        self._mask = mask
        self._error_event = error_event
        self._by_event = decoder is not None and rewriter.edits_events
        self._is_coded = not self._by_event and (decoder is None or not decoder.is_identity)
        self._parser, self._usage = Parser(), StreamUsage()
        self._must_abort = False
        self._sent_bytes = 0  # How much of the unfinished event was sent before it went event by event.

    async def run(self, response: UpstreamResponse, chunk: bytes) -> None:
        """Relays a stream, from its first chunk on, to its end."""
        try:
            while chunk:
                if self._by_event:
                    await self._edit(chunk)
                else:
                    await self._pass(chunk)
                chunk = await response.read()
            await self._finish()
        except UpstreamError as exc:
            await self._break_off(exc)

    # -- chunks --------------------------------------------------------------------------------------------------------

    async def _pass(self, chunk: bytes) -> None:
        """Sends the chunk as it came, unless an error in it could show a credential."""
        sent_bytes = self._parser.tail_bytes
        events: list[Event] = []
        try:
            for part in self._decoder.feed(chunk) if self._decoder else ():
                events = self._hear(part)
                if self._is_coded and self._usage.is_error and any(self._mask.shows_in(e.raw) for e in events):
                    self._must_abort = True  # Nothing can be masked in coded bytes.
                    raise UpstreamAnswerError("the upstream repeats a credential in a coded error")
        except DecodeError:
            self._decoder = None  # The upstream's bytes pass; what they report cannot be read.
        await self._settle_if_complete()
        # An unfinished event is of no use to a client yet, so that holding one back costs nothing.
        may_show = self._usage.is_error or self._parser.tail_has(_SMELL, among=len(chunk))
        if may_show and self._mask and not self._is_coded:
            self._by_event, self._sent_bytes = True, sent_bytes
            await self._send(events)
        else:
            await self._stream.write(chunk)

    async def _edit(self, chunk: bytes) -> None:
        """Sends the events that the chunk finishes, each as the client should see it."""
        assert self._decoder is not None, "only what can be read is edited"
        try:
            for part in self._decoder.feed(chunk):
                events = self._hear(part)
                await self._settle_if_complete()
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
        if out:
            await self._stream.write(out)

    def _hear(self, part: bytes) -> list[Event]:
        events = self._parser.feed(part)
        for event in events:
            self._see(event)
        return events

    def _see(self, event: Event) -> None:
        self._usage.see(event)
        self._attempt.usage = self._usage.usage
        if self._usage.has_content:
            self._attempt.saw_token()

    # -- ends ----------------------------------------------------------------------------------------------------------

    async def _settle_if_complete(self) -> None:
        if self._usage.is_complete:
            outcome = Outcome.FAILED if self._usage.is_error else Outcome.SUCCESS
            await self._attempt.settle_before_last_byte(outcome)

    async def _finish(self) -> None:
        """The upstream has ended the stream; its last event may lack the blank line."""
        last = self._parser.finish()
        if last is not None:
            self._see(last)
        await self._settle_if_complete()
        is_cut = self._decoder is not None and not self._decoder.is_finished
        if self._by_event and is_cut and not self._usage.is_complete:
            raise UpstreamAnswerError("the upstream's stream ends before its coding does")
        if self._by_event and last is not None:
            await self._send([last])
        await self._attempt.settle_before_last_byte(Outcome.SUCCESS)
        await self._stream.end()

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
        if not self._usage.is_complete:
            # Half an event may be on its way already: a blank line ends it.
            is_half_sent = self._sent_bytes > 0 if self._by_event else last is not None
            await self._stream.write((b"\n\n" if is_half_sent else b"") + self._error_event(exc))
        await self._stream.end()
