"""Bytes from an upstream to a client, and what they tell of the attempt on their way.

They pass unchanged and at once, but where the client did not ask for the usage chunk that we did, and where a rule
gives the model another name. The attempt is settled before the last byte, or the stream's last event, is sent on.
"""

from __future__ import annotations

from typing import Protocol

import msgspec

from balancer import bodies
from balancer.dialects import Headers
from balancer.dialects.headers import response_headers, value_of
from balancer.dialects.paths import Route
from balancer.domain import Outcome, Usage
from balancer.encoding import DecodeError, Decoder
from balancer.errors import UpstreamError
from balancer.failures import outcome_of_status
from balancer.gateway.messages import ClientStream, UpstreamResponse
from balancer.sse import Event, Parser
from balancer.usage import StreamUsage, UsageTap

_ERROR_LIMIT_BYTES = 1024 * 1024
_MASK = b"***"


class Accounting(Protocol):
    """The attempt that is being relayed."""

    usage: Usage | None

    def settle(self, outcome: Outcome) -> None:
        """Settles the attempt; only the first call counts."""

    async def settle_before_last_byte(self, outcome: Outcome) -> None:
        """Settles, and returns when the rest may be sent."""

    def saw_token(self) -> None:
        """Notes the first content token."""


class Uncounted:
    """Stands in for the attempt where nothing is counted."""

    usage: Usage | None = None

    def settle(self, outcome: Outcome) -> None:
        """Nothing to settle."""

    async def settle_before_last_byte(self, outcome: Outcome) -> None:
        """Nothing to settle."""

    def saw_token(self) -> None:
        """Nothing to note."""


class Relay:
    """One answer's way down."""

    def __init__(
        self,
        *,
        route: Route,
        stream: ClientStream,
        extra_headers: Headers,
        secrets: tuple[str, ...],
        attempt: Accounting | None = None,
        response_model: str = "",
        hides_usage: bool = False,
    ) -> None:
        self._route = route
        self._stream = stream
        self._extra = extra_headers
        self._secrets = secrets
        self._attempt = attempt or Uncounted()
        self._response_model = response_model
        self._hides_usage = hides_usage

    async def run(self, response: UpstreamResponse) -> None:
        """Relays the answer to its end. Raises UpstreamError while nothing was sent yet, ClientGoneError."""
        headers = response_headers(response.headers)
        kind = value_of(headers, "content-type").lower()
        if response.status >= 400:
            await self._relay_error(response, headers)
        elif kind.startswith("text/event-stream"):
            await self._relay_events(response, headers)
        elif self._response_model and "json" in kind:
            await self._relay_renamed(response, headers)
        else:
            await self._relay_body(response, headers)

    async def _start(self, status: int, headers: Headers, length: int | None) -> None:
        await self._stream.start(status, (*headers, *self._extra), length)

    # -- errors --------------------------------------------------------------------------------------------------------

    async def _relay_error(self, response: UpstreamResponse, headers: Headers) -> None:
        """An error's body is read first: some upstreams repeat the credential in it."""
        body = await _read_all(response, _ERROR_LIMIT_BYTES)
        encoding = value_of(headers, "content-encoding")
        try:
            body = Decoder(encoding).feed(body)
            headers = _without(headers, "content-encoding")
        except DecodeError:
            body = b""  # What cannot be read cannot be cleared of credentials.
            headers = _without(headers, "content-encoding")
        for secret in self._secrets:
            body = body.replace(secret.encode(), _MASK)
        await self._attempt.settle_before_last_byte(outcome_of_status(response.status))
        await self._start(response.status, headers, len(body))
        await self._stream.write(body)
        await self._stream.end()

    # -- whole bodies --------------------------------------------------------------------------------------------------

    async def _relay_body(self, response: UpstreamResponse, headers: Headers) -> None:
        tap = UsageTap(value_of(headers, "content-encoding"))
        length, received = response.length, 0
        # Nothing is sent before the first byte is there: until then a failure can be told properly.
        chunk = await response.read()
        await self._start(response.status, headers, length)
        try:
            while chunk:
                tap.feed(chunk)
                received += len(chunk)
                if received == length:
                    self._attempt.usage = tap.finish()
                    await self._attempt.settle_before_last_byte(Outcome.SUCCESS)
                await self._stream.write(chunk)
                chunk = await response.read()
        except UpstreamError:
            self._attempt.settle(Outcome.FAILED)
            self._stream.abort()
            return
        if received != length:
            self._attempt.usage = tap.finish()
        await self._attempt.settle_before_last_byte(Outcome.SUCCESS)
        await self._stream.end()

    async def _relay_renamed(self, response: UpstreamResponse, headers: Headers) -> None:
        """A JSON answer under the model's other name; it is read whole, decoded if need be."""
        body = await _read_all(response, None)
        encoding = value_of(headers, "content-encoding")
        tap = UsageTap()
        try:
            decoded = Decoder(encoding).feed(body)
            tap.feed(decoded)
            self._attempt.usage = tap.finish()
            body = self._rename(decoded)
            headers = _without(headers, "content-encoding")
        except (DecodeError, msgspec.DecodeError):
            pass  # No JSON, or not readable: the upstream's own bytes pass.
        await self._attempt.settle_before_last_byte(Outcome.SUCCESS)
        await self._start(response.status, headers, len(body))
        await self._stream.write(body)
        await self._stream.end()

    def _rename(self, body: bytes) -> bytes:
        if b'"model"' not in body:
            return body
        msgspec.json.decode(body)
        for path in (("model",), ("message", "model"), ("response", "model")):
            body = bodies.replace_string(body, path, self._response_model)
        return body

    # -- streams -------------------------------------------------------------------------------------------------------

    async def _relay_events(self, response: UpstreamResponse, headers: Headers) -> None:
        encoding = value_of(headers, "content-encoding")
        rewrites = self._hides_usage or bool(self._response_model)
        decoder: Decoder | None = None
        try:
            decoder = Decoder(encoding)
        except DecodeError:
            rewrites = False  # The upstream's bytes pass; what they report cannot be read.
        if rewrites:
            headers = _without(headers, "content-encoding")
        parser, usage = Parser(), StreamUsage()
        chunk = await response.read()
        await self._start(response.status, headers, None)
        try:
            while chunk:
                events: list[Event] = []
                if decoder is not None:
                    try:
                        events = parser.feed(decoder.feed(chunk))
                    except DecodeError:
                        decoder, rewrites = None, False
                for event in events:
                    usage.see(event)
                self._attempt.usage = usage.usage
                if usage.has_content:
                    self._attempt.saw_token()
                if usage.is_complete:
                    outcome = Outcome.FAILED if usage.is_error else Outcome.SUCCESS
                    await self._attempt.settle_before_last_byte(outcome)
                out = b"".join(map(self._rewrite, events)) if rewrites else chunk
                if rewrites and parser.is_overflowed:
                    out += parser.take_tail()
                if out:
                    await self._stream.write(out)
                chunk = await response.read()
        except UpstreamError as exc:
            await self._attempt.settle_before_last_byte(Outcome.FAILED)
            if not usage.is_complete:
                # Half an event may be on its way already: a blank line ends it.
                separator = b"\n\n" if parser.tail and not rewrites else b""
                await self._stream.write(separator + self._route.dialect.error_event(exc, self._route.path))
            await self._stream.end()
            return
        if rewrites and (tail := parser.take_tail()):
            await self._stream.write(tail)
        await self._attempt.settle_before_last_byte(Outcome.SUCCESS)
        await self._stream.end()

    def _rewrite(self, event: Event) -> bytes:
        """The event as the client gets it, nothing when it is the usage chunk that only we asked for."""
        if self._hides_usage and b'"usage"' in event.data and _is_usage_chunk(event.data):
            return b""
        if not self._response_model or b'"model"' not in event.data:
            return event.raw
        try:
            renamed = self._rename(event.data)
        except msgspec.DecodeError:
            return event.raw
        if event.data in event.raw:
            return event.raw.replace(event.data, renamed, 1)
        name = f"event: {event.name}\n".encode() if event.name else b""
        return name + b"".join(b"data: %b\n" % line for line in renamed.split(b"\n")) + b"\n"


class _UsageChunk(msgspec.Struct):
    choices: list[msgspec.Raw]
    usage: msgspec.Raw


_usage_chunk = msgspec.json.Decoder(_UsageChunk)


def _is_usage_chunk(data: bytes) -> bool:
    """True for the chunk that stream_options.include_usage adds: no choices, and a usage."""
    try:
        chunk = _usage_chunk.decode(data)
    except msgspec.DecodeError:
        return False
    return not chunk.choices and bytes(chunk.usage) != b"null"


def _without(headers: Headers, name: str) -> Headers:
    return tuple((key, value) for key, value in headers if key.lower() != name)


async def _read_all(response: UpstreamResponse, limit_bytes: int | None) -> bytes:
    """The body, cut at the limit."""
    chunks, held = [], 0
    while chunk := await response.read():
        chunks.append(chunk)
        held += len(chunk)
        if limit_bytes is not None and held >= limit_bytes:
            break
    return b"".join(chunks)[:limit_bytes]
