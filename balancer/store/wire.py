"""The bytes of a connection that stands: commands go out at once, replies come back one by one, in their order.

redis-py connects and shakes hands; from then on its streams would cost a task's turn, a lock and a timeout for each
reply. So its transport is taken over, TLS or not, together with its parser: what that or the stream has read ahead is
not lost. How the bytes of a command and a reply look, hiredis knows.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast

import hiredis
from redis._parsers.hiredis import NOT_ENOUGH_DATA
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import ConnectionError as LostConnectionError

from balancer.polling import direct_socket

_BUFFER_BYTES = 65_536

pack: Callable[[tuple[str | int | bytes, ...]], bytes] = hiredis.pack_command  # type: ignore[assignment]
"""A command as Redis reads it. (hiredis' own type is that of a single word.)"""


class Wire(asyncio.BufferedProtocol):
    """A connection's transport and parser, once they are ours; `on_reply` gets every reply, errors as they are.

    What the server says unasked (the pushes of RESP3) is passed over. Writing never waits: what the socket does not
    take is kept by the transport, in order; what may be under way is bounded by those who write.
    """

    def __init__(self, connection: AbstractConnection, on_reply: Callable[[Any], None]) -> None:
        """Takes the connection over. Raises redis-py's ConnectionError when it is lost already."""
        # redis-py hands none of these out.
        writer, stream, parser = connection._writer, connection._reader, cast("Any", connection._parser)
        assert writer is not None
        assert stream is not None
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Fails with the reason once the connection is lost, or given up."""
        self._on_reply = on_reply
        self._transport = cast("asyncio.Transport", writer.transport)
        self._reader: Any = parser._reader  # hiredis' types do not know that it reads any buffer.
        self._buffer = bytearray(_BUFFER_BYTES)
        self._view = memoryview(self._buffer)
        read_ahead = cast("Any", stream)._buffer
        self._reader.feed(bytes(read_ahead))
        read_ahead.clear()
        if stream.at_eof() or self._transport.is_closing():
            raise LostConnectionError("the server closed the connection")
        self._transport.set_protocol(self)
        self._direct = direct_socket(self._transport, self._receive)
        self._transport.resume_reading()
        self._deliver()

    def write(self, data: bytes) -> None:
        """Writes to the socket, at once."""
        if self._direct is None or not self._direct.write(data):
            self._transport.write(data)

    def give_up(self, reason: BaseException) -> None:
        """Ends it: nothing more is delivered."""
        if not self.lost.done():
            self.lost.set_exception(reason)

    def abort(self) -> None:
        """Breaks the connection."""
        self._transport.abort()

    def release(self) -> None:
        """Lets go of it: whatever comes now concerns nobody."""
        self._leave_to_loop()
        if not self.lost.cancel() and not self.lost.cancelled():
            self.lost.exception()

    # -- what the transport calls --------------------------------------------------------------------------------------

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where the next bytes go."""
        return self._view

    def buffer_updated(self, nbytes: int) -> None:
        """Delivers the replies that are whole now."""
        self._reader.feed(self._buffer, 0, nbytes)
        self._deliver()

    def eof_received(self) -> None:
        """Tells whoever watches; the transport closes."""
        self._leave_to_loop()
        self.give_up(LostConnectionError("the server closed the connection"))

    def connection_lost(self, exc: Exception | None) -> None:
        """Tells whoever watches."""
        self._leave_to_loop()
        self.give_up(exc or LostConnectionError("the server closed the connection"))

    def _receive(self, data: bytes) -> None:
        self._reader.feed(data)
        self._deliver()

    def _leave_to_loop(self) -> None:
        if self._direct is not None:
            self._direct.leave()
            self._direct = None

    def _deliver(self) -> None:
        gets, on_reply, lost = self._reader.gets, self._on_reply, self.lost
        try:
            while not lost.done() and (reply := gets(False)) is not NOT_ENOUGH_DATA:
                if type(reply) is not hiredis.PushNotification:
                    on_reply(reply)
        except Exception as exc:  # noqa: BLE001  whoever waits for the loss tells what it means, and connects anew
            self.give_up(exc)
