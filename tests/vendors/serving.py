"""What all fake vendors have in common: they check, then say what is theirs to say, and keep their own account."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec

from tests.actors import STREAM_HEAD, Received, Upstream, chunk
from tests.vendors.replies import Event, Play, Reply, Tokens, reply

KEY = "sk-vendor-0123456789"


class RefusedError(Exception):
    """The vendor's 4xx."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


class Vendor(Upstream):
    """An upstream that checks what it is asked, and plays what a test wrote.

    `account` is what it has reported, `refusals` what it has refused, `bodies` what it was asked.
    """

    name = ""

    def __init__(self, play: Play | None = None) -> None:
        super().__init__()
        self.play = play or Play(reply())
        self.account = Tokens()
        self.refusals: list[str] = []
        self.bodies: list[Any] = []
        self.number = 0
        """Of its answers, for their ids."""
        self.plays()

    def plays(self) -> None:
        """Says what its play has next; what it does unless told otherwise."""
        self._behaviour = _plays

    def forgets(self) -> None:
        """Begins anew, but for what it has signed and the numbers in its ids."""
        self.account = Tokens()
        self.refusals = []
        self.bodies = []
        self.received = self.received[-1:]
        self.hung_up.clear()
        self.stalled.clear()
        self.plays()

    def says(self, *replies: Reply) -> None:
        """Says these, one a request; the last one stays."""
        self.play.says(*replies)
        self.plays()

    # -- what a vendor fills in ----------------------------------------------------------------------------------------

    def check(self, request: Received, body: Any) -> None:
        """Raises RefusedError for what the vendor would refuse."""
        raise NotImplementedError

    def counts(self, request: Received) -> bool:
        """True for a question about tokens, which is none for an answer."""
        raise NotImplementedError

    def streams_for(self, request: Received, body: Any) -> bool:
        """True where a stream is wanted."""
        raise NotImplementedError

    def whole(self, body: Any, said: Reply) -> Event:
        """The answer as JSON."""
        raise NotImplementedError

    def events(self, body: Any, said: Reply) -> list[Event]:
        """The answer as events."""
        raise NotImplementedError

    def counted(self, body: Any) -> bytes:
        """The answer to a question about tokens."""
        raise NotImplementedError

    def error(self, status: int, message: str) -> bytes:
        """An error's body."""
        raise NotImplementedError

    def broken(self, message: str) -> bytes:
        """The event by which a stream tells that it breaks off."""
        raise NotImplementedError

    # -- how -----------------------------------------------------------------------------------------------------------

    def _json(self, status: int, body: bytes, headers: tuple[tuple[str, str], ...] = ()) -> bytes:
        return self._head(status, (("Content-Type", "application/json"), *headers), len(body)) + body

    async def _send(self, said: Reply, events: list[Event], reader: Any, writer: asyncio.StreamWriter) -> None:
        told: Tokens | None = None
        last = len(events) if said.cut_after is None else said.cut_after
        writer.write(STREAM_HEAD)
        gone = asyncio.create_task(reader.read(1))
        try:
            for i, event in enumerate(events[:last]):
                if said.gate is not None and i == said.gate_before:
                    gate = asyncio.create_task(said.gate.wait())
                    self.stalled.set()
                    await asyncio.wait({gate, gone}, return_when=asyncio.FIRST_COMPLETED)
                    gate.cancel()
                if gone.done():
                    self.hung_up.set()
                    raise ConnectionResetError
                if said.broken_after == i:
                    writer.write(chunk(self.broken(said.message)) + b"0\r\n\r\n")
                    return
                writer.write(chunk(event.data))
                await writer.drain()
                told = event.told or told
            if said.cut_after is not None:
                raise ConnectionResetError
            writer.write(b"0\r\n\r\n")
        finally:
            gone.cancel()
            if told is not None:
                self.account.add(told)


async def _plays(actor: Upstream, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    assert isinstance(actor, Vendor)
    request = actor.last
    try:
        body = msgspec.json.decode(request.body)
        actor.bodies.append(body)
        actor.check(request, body)
    except (RefusedError, msgspec.DecodeError) as exc:
        actor.refusals.append(str(exc))
        status = exc.status if isinstance(exc, RefusedError) else 400
        actor.account.requests += 1
        writer.write(actor._json(status, actor.error(status, str(exc))))
        return
    if actor.counts(request):
        writer.write(actor._json(200, actor.counted(body)))
        return
    said = actor.play.next(body)
    actor.number += 1
    actor.account.requests += 1
    if said.status != 200:
        writer.write(actor._json(said.status, actor.error(said.status, said.message), said.headers))
    elif actor.streams_for(request, body):
        await actor._send(said, actor.events(body, said), reader, writer)
    else:
        whole = actor.whole(body, said)
        if whole.told is not None:
            actor.account.add(whole.told)
        writer.write(actor._json(200, whole.data, said.headers))
