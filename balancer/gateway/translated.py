"""An answer of a service that speaks another API than the client: read step by step, and written in the client's words.

A stream goes down event by event, each as soon as it has come; nothing is held but an unfinished event. As natively,
the attempt is settled before the last byte is sent on.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import secrets
import time
from collections.abc import Iterable

from balancer.dialects import Headers
from balancer.dialects.paths import Route
from balancer.domain import Outcome
from balancer.encoding import DecodeError, Decoder, decoded
from balancer.errors import UpstreamAnswerError, UpstreamError
from balancer.failures import MOST_COOLDOWN_MS, Verdict, retry_after_ms
from balancer.gateway.attempts import Attempt
from balancer.gateway.masking import Mask
from balancer.gateway.messages import ClientStream
from balancer.gateway.opening import ERROR_LIMIT_BYTES, Opening
from balancer.gateway.relay import read_whole
from balancer.gateway.translated_events import Events, used
from balancer.gateway.translating import Translated
from balancer.sse import Parser
from balancer.translation.answer import Answer, Echo, Pinged, Started
from balancer.translation.faults import FaultError, fault
from balancer.translation.folding import Folder, steps_of
from balancer.translation.pairs import Writer
from balancer.usage import usage_of

_WHOLE_LIMIT_BYTES = 64 * 1024 * 1024
_LINGER_S = 1.0
"""So long the upstream may take to end what it has told to be over: its connection can be used again then."""
_COMMENT = b": ping\n\n"
_JSON: Headers = (("Content-Type", "application/json"),)
_EVENTS: Headers = (("Content-Type", "text/event-stream; charset=utf-8"), ("Cache-Control", "no-cache"))
_IDS = ("x-request-id", "request-id")
_WAITS = ("retry-after", "retry-after-ms")
_BUSY = (429, 503, 529)


class TranslatedRelay:
    """One answer's way down. `response_model` is empty when the model keeps the name that its vendor gives it."""

    def __init__(
        self,
        *,
        request_id: str,
        route: Route,
        stream: ClientStream,
        extra_headers: Headers,
        mask: Mask,
        attempt: Attempt,
        translated: Translated,
        response_model: str = "",
    ) -> None:
        self._request_id = request_id
        self._route = route
        self._stream = stream
        self._extra = extra_headers
        self._mask = mask
        self._attempt = attempt
        self._translated = translated
        self._response_model = response_model
        self._wants_stream = translated.conversation.stream

    async def run(self, answer: Opening) -> None:
        """Relays the answer to its end. Raises UpstreamError while nothing was sent yet, ClientGoneError."""
        if answer.verdict is not None:
            await self._relay_error(answer, answer.verdict)
        elif answer.is_stream:
            await self._relay_events(answer)
        else:
            await self._relay_json(answer)

    def _headers(self, answer: Opening, kept: Iterable[str] = ()) -> Headers:
        """Of the upstream's headers those that mean the same to the client's SDK; the rest is its vendor's."""
        ids = [value for name, value in answer.headers if name.lower() in _IDS][:1]
        passed = [(name, value) for name, value in answer.headers if name.lower() in kept]
        told = (*passed, *(("x-upstream-request-id", value) for value in ids))
        return (*self._mask.over_headers(told), *self._extra)

    def _echo(self, model: str) -> Echo:
        return Echo(
            conversation=self._translated.conversation,
            model=self._response_model or model or self._translated.target.model,
            id=secrets.token_hex(12),
            created=int(time.time()),
        )

    # -- errors --------------------------------------------------------------------------------------------------------

    async def _relay_error(self, answer: Opening, verdict: Verdict) -> None:
        """An error in the client's own shape, with the status by which its SDK knows it."""
        body = await self._error_body(answer)
        error = fault(
            self._route.dialect.name,
            self._translated.provider.api_style,
            answer.status,
            body,
            verdict,
        )
        headers = (*_wait(answer, error), *self._headers(answer, _WAITS))
        told = self._route.dialect.error_body(error, self._request_id)
        await self._attempt.settle_before_last_byte(verdict.outcome, verdict.cooldown_ms)
        await self._stream.send(error.status, (*_JSON, *headers), told)

    async def _error_body(self, answer: Opening) -> bytes:
        """The error's JSON, masked; what was cut, or cannot be decoded, may hide a credential, and is nothing."""
        if answer.is_stream:
            # Its first event was the error; what stood before it told nothing.
            parser = Parser()
            with contextlib.suppress(DecodeError, UpstreamError):
                decoder = Decoder(answer.coding)
                while chunk := await answer.read():
                    for part in decoder.feed(chunk):
                        if event := next((event for event in parser.feed(part) if event.data), None):
                            return self._mask.over(event.data)
                if last := parser.finish():
                    return self._mask.over(last.data)
            return b""
        body, is_whole = await read_whole(answer, await answer.read(), ERROR_LIMIT_BYTES)
        if answer.is_cut or not is_whole:
            return b""
        with contextlib.suppress(DecodeError):
            return self._mask.over(decoded(body, answer.coding, ERROR_LIMIT_BYTES))
        return b""

    # -- whole answers -------------------------------------------------------------------------------------------------

    async def _relay_json(self, answer: Opening) -> None:
        body, is_whole = await read_whole(answer, await answer.read(), _WHOLE_LIMIT_BYTES)
        if not is_whole:
            raise UpstreamAnswerError("the upstream's answer is too long to be translated")
        try:
            body = decoded(body, answer.coding, _WHOLE_LIMIT_BYTES)
        except DecodeError as exc:
            raise UpstreamAnswerError("the upstream's answer is not in the coding that it announced") from exc
        said = self._translated.service.read_answer(body, self._translated.target)
        self._attempt.usage = usage_of(body) or used(said.usage, self._translated.service_api)
        if self._attempt.details is not None:
            self._attempt.details.read(body)
            self._attempt.details.hear(said.id, said.model, said.stop)
        await self._send_whole(answer, said)

    async def _send_whole(self, answer: Opening, said: Answer) -> None:
        """Sends a whole answer, as the stream that was asked for where it was one."""
        echo, headers = self._echo(said.model), self._headers(answer)
        if self._wants_stream:
            self._attempt.is_stream = True
            told = self._translated.client.writer(echo).write(list(steps_of(said)))
            kind = _EVENTS
        else:
            told, kind = self._translated.client.write_answer(said, echo), _JSON
        await self._attempt.settle_before_last_byte(Outcome.SUCCESS)
        await self._stream.send(200, (*kind, *headers), told)

    # -- streams -------------------------------------------------------------------------------------------------------

    async def _relay_events(self, answer: Opening) -> None:
        """Relays a stream, or gathers it where the client did not ask for one."""
        try:
            decoder = Decoder(answer.coding)
        except DecodeError as exc:
            raise UpstreamAnswerError("the upstream's stream is in a coding that it was not asked for") from exc
        events = Events(self._translated, self._route.dialect.name, self._attempt, self._mask, decoder)
        if not self._wants_stream:
            await self._gather(answer, events)
            return
        # Nothing is sent before the first event is there: until then a failure can be told properly.
        chunk = await answer.read()
        self._attempt.is_stream = True
        await self._stream.start(200, (*_EVENTS, *self._headers(answer)), None)
        try:
            await self._pass(answer, events, chunk)
        except UpstreamError as exc:
            await self._break_off(exc, events.verdict)

    async def _pass(self, answer: Opening, events: Events, chunk: bytes) -> None:
        writer: Writer | None = None
        while chunk:
            steps = events.read(chunk)
            out = b""
            while steps and writer is None:
                first = steps[0]
                if isinstance(first, Pinged):
                    out += _COMMENT
                    steps = steps[1:]
                else:
                    model = first.model if isinstance(first, Started) else ""
                    writer = self._translated.client.writer(self._echo(model))
            if steps and writer is not None:
                out += writer.write(steps)
            if events.is_over:
                await self._finish(answer, out)
                return
            if out:
                await self._stream.write(out)
            if events.fault is not None:
                raise events.fault
            chunk = await answer.read()
        steps = events.finish()
        if not events.is_over or writer is None:
            raise events.fault or UpstreamAnswerError("the upstream's stream ended before its answer did")
        await self._finish(answer, writer.write(steps))

    async def _finish(self, answer: Opening, last: bytes) -> None:
        """Sends the closing events, and the stream's end once the upstream has ended it too."""
        await self._attempt.settle_before_last_byte(Outcome.SUCCESS)
        if answer.is_at_end:
            await self._stream.end(last)
            return
        await self._stream.write(last)
        with contextlib.suppress(UpstreamError, TimeoutError):
            async with asyncio.timeout(_LINGER_S):
                while await answer.read():
                    pass
        await self._stream.end()

    async def _break_off(self, exc: UpstreamError, verdict: Verdict | None) -> None:
        """Tells the client that the stream broke: no closing event makes it look whole."""
        verdict = verdict or Verdict(outcome=Outcome.FAILED)
        await self._attempt.settle_before_last_byte(verdict.outcome, verdict.cooldown_ms)
        await self._stream.write(self._route.dialect.error_event(exc, self._route.path))
        await self._stream.end()

    async def _gather(self, answer: Opening, events: Events) -> None:
        """A stream that nobody asked for, as the whole answer that was."""
        folder, held = Folder(), 0
        while not folder.is_over and (chunk := await answer.read()):
            held += len(chunk)
            if held > _WHOLE_LIMIT_BYTES:
                raise UpstreamAnswerError("the upstream's answer is too long to be translated")
            folder.take(events.read(chunk))
            if events.fault is not None:
                raise events.fault
        folder.take(events.finish())
        if not folder.is_over:
            raise events.fault or UpstreamAnswerError("the upstream's stream ended before its answer did")
        await self._send_whole(answer, folder.answer())


def _wait(answer: Opening, error: FaultError) -> Headers:
    """How long to wait, where that is told in no header that the client's SDK knows: in its vendor's, or the body."""
    if error.status not in _BUSY or any(name.lower() in _WAITS for name, _ in answer.headers):
        return ()
    wait_ms = retry_after_ms(answer.headers, round(time.time() * 1000), MOST_COOLDOWN_MS)
    wait_s = error.retry_after_s if wait_ms is None else math.ceil(wait_ms / 1000)
    return () if wait_s is None else (("Retry-After", str(max(wait_s, 1))),)
