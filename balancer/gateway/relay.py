"""Bytes from an upstream to a client, and what they tell of the attempt on their way.

They pass unchanged and at once, but where the client did not ask for the usage chunk that we did, where a rule gives
the model another name, and where an error repeats a credential. The attempt is settled before the last byte is sent on.
"""

from __future__ import annotations

import contextlib

from balancer import bodies, lenient
from balancer.dialects import Headers
from balancer.dialects.headers import response_headers
from balancer.dialects.paths import Route
from balancer.domain import Outcome
from balancer.encoding import DecodeError, Decoder, decoded
from balancer.errors import UpstreamAnswerError, UpstreamError
from balancer.failures import Verdict
from balancer.gateway.accounting import Accounting, Uncounted
from balancer.gateway.events import EventRelay, Remember
from balancer.gateway.masking import Mask
from balancer.gateway.messages import ClientStream, UpstreamResponse
from balancer.gateway.opening import ERROR_LIMIT_BYTES, Opening
from balancer.gateway.rewriting import Rewriter
from balancer.usage import UsageTap, usage_of

_WHOLE_LIMIT_BYTES = 64 * 1024 * 1024
_DECODED_LIMIT_BYTES = 8 * 1024 * 1024
_SUCCESS = Verdict(outcome=Outcome.SUCCESS)


class Relay:
    """One answer's way down. `remember` is told the answer's id before the client is."""

    def __init__(
        self,
        *,
        request_id: str,
        route: Route,
        stream: ClientStream,
        extra_headers: Headers,
        mask: Mask,
        attempt: Accounting | None = None,
        response_model: str = "",
        hides_usage: bool = False,
        remember: Remember | None = None,
    ) -> None:
        self._request_id = request_id
        self._route = route
        self._stream = stream
        self._extra = extra_headers
        self._mask = mask
        self._attempt = attempt or Uncounted()
        self._rewriter = Rewriter(response_model, hides_usage=hides_usage)
        self._remember = remember

    async def run(self, answer: Opening) -> None:
        """Relays the answer to its end. Raises UpstreamError while nothing was sent yet, ClientGoneError."""
        headers = self._mask.over_headers(response_headers(answer.headers))
        verdict = answer.verdict or _SUCCESS
        if answer.status >= 400 or (answer.verdict is not None and not answer.is_stream):
            await self._relay_error(answer, headers, verdict)
            return
        is_json = "json" in answer.content_type
        # Nothing is sent before the first chunk is there: until then a failure can be told properly.
        chunk = await answer.read()
        if answer.is_stream:
            await self._relay_events(answer, headers, chunk)
            return
        if self._remember is not None and is_json:
            chunk = await self._remembered(answer, chunk, self._remember)
        if self._rewriter.renames and is_json:
            await self._relay_renamed(answer, headers, chunk, verdict)
        else:
            await self._relay_body(answer, headers, chunk, verdict)

    async def _start(self, status: int, headers: Headers, length: int | None) -> None:
        await self._stream.start(status, (*headers, *self._extra), length)

    async def _settle(self, verdict: Verdict) -> None:
        await self._attempt.settle_before_last_byte(verdict.outcome, verdict.cooldown_ms)

    async def _send_whole(self, status: int, headers: Headers, body: bytes, verdict: Verdict) -> None:
        await self._settle(verdict)
        await self._stream.send(status, (*headers, *self._extra), body)

    async def _relay_error(self, response: Opening, headers: Headers, verdict: Verdict) -> None:
        """An error's body is read first: some upstreams repeat the credential in it."""
        body, is_whole = await read_whole(response, await response.read(), ERROR_LIMIT_BYTES)
        try:
            if response.is_cut or not is_whole:
                raise DecodeError("the error is cut, or too long")
            body = self._mask.over(decoded(body, response.coding, ERROR_LIMIT_BYTES))
        except DecodeError:
            # What cannot be read cannot be cleared of credentials; an SDK still wants words.
            error = UpstreamAnswerError("the upstream's error cannot be read", status=response.status)
            body = self._route.dialect.error_body(error, self._request_id)
            headers = (*_without(headers, "content-type"), ("Content-Type", "application/json"))
        headers = _without(headers, "content-encoding")
        await self._send_whole(response.status, headers, body, verdict)

    async def _remembered(self, response: Opening, chunk: bytes, remember: Remember) -> bytes:
        """The JSON answer from its first chunk on, as much of it as had to be read to know its id."""
        coding = response.coding
        with contextlib.suppress(DecodeError):
            response_id = bodies.response_id_of_json(next(iter(Decoder(coding).feed(chunk)), b""))
            if not response_id:
                chunk, _ = await read_whole(response, chunk, _WHOLE_LIMIT_BYTES)
                response_id = bodies.response_id_of_json(decoded(chunk, coding, _DECODED_LIMIT_BYTES))
            if response_id:
                await remember(response_id)
        return chunk

    async def _relay_body(self, response: Opening, headers: Headers, chunk: bytes, verdict: Verdict) -> None:
        """The upstream's own bytes, from their first chunk on."""
        if len(chunk) == response.length and not response.coding:
            self._read(chunk)
            await self._send_whole(response.status, headers, chunk, verdict)
            return
        tap = UsageTap(response.coding)
        length, received = response.length, 0
        await self._start(response.status, headers, length)
        try:
            while chunk:
                tap.feed(chunk)
                received += len(chunk)
                if received == length:
                    self._attempt.usage = tap.finish()
                    await self._settle(verdict)
                await self._stream.write(chunk)
                chunk = await response.read()
        except UpstreamError:
            self._attempt.settle(Outcome.FAILED)
            self._stream.abort()
            return
        if received != length:
            self._attempt.usage = tap.finish()
        await self._settle(verdict)
        await self._stream.end()

    async def _relay_renamed(self, response: Opening, headers: Headers, chunk: bytes, verdict: Verdict) -> None:
        """A JSON answer under the model's other name; what is too long, or cannot be read, passes as it came."""
        body, is_whole = await read_whole(response, chunk, _WHOLE_LIMIT_BYTES)
        try:
            if not is_whole:
                raise DecodeError("the answer is too long")
            plain = decoded(body, response.coding, _DECODED_LIMIT_BYTES)
            renamed = self._rewriter.body(plain)
        except (DecodeError, *lenient.UNREADABLE):
            await self._relay_body(response, headers, body, verdict)
            return
        self._read(plain)
        await self._send_whole(response.status, _without(headers, "content-encoding"), renamed, verdict)

    def _read(self, body: bytes) -> None:
        """Takes over what a whole JSON answer tells of the attempt."""
        self._attempt.usage = usage_of(body)
        if self._attempt.details is not None:
            self._attempt.details.read(body)

    async def _relay_events(self, response: Opening, headers: Headers, chunk: bytes) -> None:
        decoder: Decoder | None = None
        with contextlib.suppress(DecodeError):  # Then the upstream's bytes pass; what they report cannot be read.
            decoder = Decoder(response.coding)
        if decoder is not None and self._rewriter.edits_events:
            headers = _without(headers, "content-encoding")
        await self._start(response.status, headers, None)
        events = EventRelay(
            attempt=self._attempt,
            stream=self._stream,
            decoder=decoder,
            rewriter=self._rewriter,
            mask=self._mask,
            style=self._route.dialect.name,
            path=self._route.path,
            remember=self._remember,
            error_event=lambda error: self._route.dialect.error_event(error, self._route.path),
        )
        await events.run(response, chunk)


def _without(headers: Headers, name: str) -> Headers:
    return tuple((key, value) for key, value in headers if key.lower() != name)


async def read_whole(response: UpstreamResponse, chunk: bytes, limit_bytes: int) -> tuple[bytes, bool]:
    """The body from its first chunk on, and True when that is all of it: reading ends beyond the limit."""
    chunks, held = [], 0
    while chunk:
        chunks.append(chunk)
        held += len(chunk)
        if held > limit_bytes:
            return b"".join(chunks), False
        chunk = await response.read()
    return b"".join(chunks), True
