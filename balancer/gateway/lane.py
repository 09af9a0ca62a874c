"""The fast lane of the HTTP front: one protocol for each connection, which serves the usual requests itself.

The usual ones are POSTs whose head `lane_head` reads and whose body has a length. With anything else, valid or not, the
connection is handed over to the other front, with all that came of the request, and stays there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final, Protocol, cast

from balancer import log
from balancer.gateway.lane_head import MAX_HEAD_BYTES, Head, Repeat, is_beginning, read_head, repeat_of
from balancer.gateway.lane_stream import LaneStream
from balancer.gateway.messages import ClientGoneError, ClientRequest, WayBack
from balancer.gateway.request_ids import request_id_of
from balancer.polling import DirectSocket, direct_socket

_RECEIVED = memoryview(bytearray(262144))
_WAITING_BYTES = 65536
"""What may have come of the next requests while one is being answered; then no more is read."""
_NEWS = 4
"""So many heads of a connection are remembered, one at a time; then its client is one whose heads differ each time."""

_SWEEP_S = 5.0
IDLE_S = 3630.0
"""Longer than most reverse proxies keep a connection: the one that closes first should be theirs."""
SLOW_S = 60.0
"""For a whole head, and between two parts of a body."""

Handle = Callable[[ClientRequest, WayBack], Awaitable[None]]


class Work(Protocol):
    """What answers a request."""

    def cancel(self) -> object:
        """Ends it: nobody is left to read the answer."""


Begin = Callable[["Lane", Head, bytes, bool], Work | None]


class Lanes:
    """All connections of the lane, and what they share."""

    def __init__(
        self,
        handle: Handle,
        hand_over: Callable[[], asyncio.Protocol],
        max_body_bytes: int,
        is_draining: Callable[[], bool],
        *,
        idle_s: float = IDLE_S,
        slow_s: float = SLOW_S,
        sweep_s: float = _SWEEP_S,
    ) -> None:
        """`hand_over`: makes the protocol that takes over what is not for the lane."""
        self.handle = handle
        self.hand_over = hand_over
        self.max_body_bytes = max_body_bytes
        self.is_draining = is_draining
        self.loop = asyncio.get_running_loop()
        self.open: set[Lane] = set()
        self.is_closing = False
        self._idle_s, self._slow_s, self._sweep_s = idle_s, slow_s, sweep_s
        self._working: set[Lane] = set()
        self._all_done: asyncio.Future[None] | None = None
        self.begin: Begin | None = None
        """Answers a usual request without a task; None for one that `handle` answers."""
        self.now = self.loop.time()
        """The time of the last sweep: near enough for limits that are many sweeps long."""
        self._sweeper = self.loop.call_later(sweep_s, self._sweep)

    def __call__(self) -> Lane:
        """The protocol of a new connection."""
        return Lane(self)

    def _sweep(self) -> None:
        """Closes the connections that have been silent, or slow, for too long."""
        self.now = self.loop.time()
        idle, slow = self.now - self._idle_s, self.now - self._slow_s
        for lane in list(self.open):
            if lane.is_lingering or lane.since < (slow if lane.is_in_request else idle):
                lane.close_unless_answering()
            elif lane.since < slow:
                lane.forget()
        self._sweeper = self.loop.call_later(self._sweep_s, self._sweep)

    def close_idle(self) -> None:
        """Closes the connections that are not being answered, and from now on each behind its answer."""
        self.is_closing = True
        for lane in list(self.open):
            lane.close_unless_answering()

    async def close(self, timeout_s: float) -> None:
        """Ends all connections; those that are being answered get that long."""
        self.close_idle()
        self._sweeper.cancel()
        await self._wait_for_answers(timeout_s)
        for lane in list(self.open):
            lane.break_off()
        await self._wait_for_answers(timeout_s)

    def works(self, lane: Lane) -> None:
        """Notes that a lane answers a request."""
        self._working.add(lane)

    def rests(self, lane: Lane) -> None:
        """Notes that it has done so."""
        self._working.discard(lane)
        if self._all_done is not None and not self._working and not self._all_done.done():
            self._all_done.set_result(None)

    async def _wait_for_answers(self, timeout_s: float) -> None:
        if self._working:
            self._all_done = self.loop.create_future()
            await asyncio.wait([self._all_done], timeout=timeout_s)


class Lane(asyncio.BufferedProtocol):
    """One connection, with one request at a time."""

    __slots__ = (
        "_chunks",
        "_direct",
        "_drained",
        "_head",
        "_is_reading_paused",
        "_lanes",
        "_missing",
        "_news_left",
        "_repeat",
        "_waiting",
        "is_held_up",
        "is_in_request",
        "is_lingering",
        "kept",
        "since",
        "transport",
        "work",
    )

    def __init__(self, lanes: Lanes) -> None:
        self._lanes: Final = lanes
        self.transport: asyncio.Transport | None = None
        self.is_held_up = False
        self.since = lanes.now
        """When it fell silent, or when its head or the last part of its body came."""
        self.is_lingering = False
        """True once its last answer is sent, until the client ends too."""
        self.is_in_request = False
        """True from a request's first byte to its last."""
        self.work: Work | None = None
        """What answers the request, None between requests."""
        self._waiting = b""
        self._head: Head | None = None
        self._chunks: list[bytes] = []
        self._missing = 0
        self._is_reading_paused = False
        self.kept: object = None
        """What is remembered of the client's head, for as long as that is."""
        self._repeat: Repeat | None = None
        self._news_left = _NEWS
        self._direct: DirectSocket | None = None
        self._drained: asyncio.Future[None] | None = None

    # -- the transport's side ------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begins to wait for the first request."""
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is one by its methods only.
        self._direct = direct_socket(self.transport, self._receive)
        self._lanes.open.add(self)
        if self._lanes.is_closing:
            # Accepted before the listener was closed, and in a TLS handshake until now.
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancels what is being answered: nobody is left to read it."""
        self.transport = None
        self._leave_to_loop()
        self._lanes.open.discard(self)
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)
        if self.work is not None:
            self.work.cancel()

    def pause_writing(self) -> None:
        """Holds the answer up."""
        self.is_held_up = True

    def resume_writing(self) -> None:
        """Lets the answer go on."""
        self.is_held_up = False
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where the transport puts what came: one place for all, emptied at once.

        With `data_received` asyncio makes a new one of 256 KiB for every read, which costs more than reading.
        """
        return _RECEIVED

    def buffer_updated(self, nbytes: int) -> None:
        """Takes what the transport has put there."""
        self._receive(bytes(_RECEIVED[:nbytes]))

    def _receive(self, data: bytes) -> None:
        """Takes what came of this request, or of the next."""
        transport = self.transport
        if transport is None or transport.is_closing():
            # TLS gives what came behind the last request to a protocol that has closed.
            return
        if self.is_lingering:
            return
        if self.work is not None:
            self._waiting += data
            if len(self._waiting) > _WAITING_BYTES and not self._is_reading_paused:
                self._is_reading_paused = True
                transport.pause_reading()
        elif self._head is not None:
            self._take_body(self._head, data)
        else:
            self._take_head(self._waiting + data if self._waiting else data)

    # -- requests ------------------------------------------------------------------------------------------------------

    def _take_head(self, data: bytes) -> None:
        repeated = self._repeat.read(data) if self._repeat is not None else None
        if repeated is not None:
            self._begin(*repeated, data)
            return
        end = data.find(b"\r\n\r\n", 0, MAX_HEAD_BYTES)
        if end < 0:
            if len(data) < MAX_HEAD_BYTES and is_beginning(data):
                if not self.is_in_request:
                    self.is_in_request = True
                    self.since = self._lanes.now
                self._waiting = data
            else:
                self._hand_over(data)
            return
        head = read_head(data[: end + 2])
        if head is None:
            self._hand_over(data)
            return
        if self._news_left:
            self._news_left -= 1
            self._repeat = repeat_of(data[: end + 4], head)
        self._begin(head, end + 4, data)

    def _begin(self, head: Head, begin: int, data: bytes) -> None:
        """Begins a request whose head was read, and whose body begins there."""
        if head.length > self._lanes.max_body_bytes:
            self._hand_over(data)
            return
        end = begin + head.length
        if len(data) >= end:
            self._waiting = data[end:]
            self._answer(head, data[begin:end])
            return
        self._waiting = b""
        self._missing = head.length
        self.is_in_request = True
        self._head = head
        self._take_body(head, data[begin:])

    def _take_body(self, head: Head, data: bytes) -> None:
        self.since = self._lanes.now
        missing = self._missing - len(data)
        if missing > 0:
            self._missing = missing
            self._chunks.append(data)
            return
        if missing:
            self._waiting = data[missing:]
            data = data[:missing]
        self._chunks.append(data)
        body = b"".join(self._chunks)
        self._chunks = []
        self._head = None
        self._answer(head, body)

    def _answer(self, head: Head, body: bytes) -> None:
        """Starts what answers a request."""
        lanes = self._lanes
        is_last = head.is_last or lanes.is_closing or lanes.is_draining()
        self.is_in_request = False
        lanes.works(self)
        if lanes.begin is not None:
            try:
                self.work = lanes.begin(self, head, body, is_last)
            except Exception as exc:  # noqa: BLE001 - a root: `handle` meets it too, and tells, or it was no harm.
                self._begin_task(head, body, is_last, exc)
                return
            if self.work is not None:
                return
        self._begin_task(head, body, is_last)

    def _begin_task(self, head: Head, body: bytes, is_last: bool, fault: Exception | None = None) -> None:
        """Answers a request in a task; a `fault` is why that was not done without one."""
        lanes = self._lanes
        request = request_of(head, body, request_id_of(head.first.get("x-request-id", "")))
        if fault is not None:
            log.error("a request could not be begun", exc=fault, **request.facts)
        stream = self.stream(request.request_id, is_last=is_last)
        self.work = task = self.task(request, stream, lambda: lanes.handle(request, stream))
        task.add_done_callback(self._never_begun)

    def stream(self, request_id: str, *, is_last: bool) -> LaneStream:
        """The way back for an answer."""
        return LaneStream(self, self._lanes.loop, request_id, is_last=is_last)

    def task(
        self, request: ClientRequest, stream: LaneStream, answer: Callable[[], Awaitable[None]]
    ) -> asyncio.Task[None]:
        """A task that answers a request on its stream."""
        return asyncio.Task(self._run(request, stream, answer), loop=self._lanes.loop, name="request")

    def _never_begun(self, task: asyncio.Task[None]) -> None:
        """Of a task that is cancelled before its first step nothing is run."""
        if self.work is task:
            self.work = None
            self._lanes.rests(self)

    async def _run(self, request: ClientRequest, stream: LaneStream, answer: Callable[[], Awaitable[None]]) -> None:
        try:
            await answer()
        except ClientGoneError:
            pass
        except Exception as exc:  # noqa: BLE001 - a task's root: it is logged, and the worker lives.
            log.error("a request failed in the gateway", exc=exc, **request.facts)
        finally:
            self.answered(is_whole=stream.is_ended, is_last=stream.is_last)

    def answered(self, *, is_whole: bool, is_last: bool) -> None:
        """Takes up the next request, if there is one and the answer to the last was whole."""
        self.work = None
        self._lanes.rests(self)
        transport = self.transport
        if transport is None or transport.is_closing():
            return
        if not is_whole:
            transport.abort()
        elif is_last or self._lanes.is_closing:
            self._linger(transport)
        else:
            self.since = self._lanes.now
            if self._waiting:
                self._take_head(self._waiting)
            # Not as long as enough is there for the next ones: what is let in with every answer would add up.
            if len(self._waiting) <= _WAITING_BYTES:
                self._resume_reading()

    def _linger(self, transport: asyncio.Transport) -> None:
        """Says that nothing follows, and closes when the client does, or in the next sweep.

        What a client sends to a closed socket is answered by a reset, which takes from it the answer that it has not
        read yet (RFC 9112 §9.6).
        """
        if self._lanes.is_closing or not transport.can_write_eof():
            transport.close()
            return
        self.is_lingering = True
        self._waiting = b""
        self._resume_reading()
        transport.write_eof()

    def _resume_reading(self) -> None:
        if self._is_reading_paused and self.transport is not None:
            self._is_reading_paused = False
            self.transport.resume_reading()

    def _hand_over(self, data: bytes) -> None:
        """Gives the connection, and what came of the request, to the other front."""
        transport = self.transport
        assert transport is not None, "open"
        assert not self.is_held_up, "an answer ends when the client's buffer has room"
        self._resume_reading()
        self._leave_to_loop()
        self.transport = None
        self._waiting = b""
        self._lanes.open.discard(self)
        protocol = self._lanes.hand_over()
        transport.set_protocol(protocol)
        protocol.connection_made(transport)
        protocol.data_received(data)

    def _leave_to_loop(self) -> None:
        if self._direct is not None:
            self._direct.leave()
            self._direct = None

    # -- the answer's and the owner's side -----------------------------------------------------------------------------

    def write(self, transport: asyncio.Transport, head: bytes, body: bytes) -> None:
        """Sends a whole answer."""
        if self._direct is None or not self._direct.write(head, body):
            transport.write(head + body)

    async def drained(self) -> None:
        """Returns when the client's buffer has room, or the connection is lost."""
        if self.is_held_up and self.transport is not None:
            if self._drained is None or self._drained.done():
                self._drained = self._lanes.loop.create_future()
            await self._drained

    def forget(self) -> None:
        """Keeps no head for a client that is silent: there may be many, and credentials are in it."""
        self._repeat = None
        self._news_left = _NEWS
        self.kept = None

    def close_unless_answering(self) -> None:
        """Closes the connection if no answer is on its way."""
        if self.work is None and self.transport is not None:
            self.transport.close()

    def break_off(self) -> None:
        """Breaks the connection, and with it the answer; what gives it is cancelled."""
        if self.work is not None:
            self.work.cancel()
        if self.transport is not None:
            self.transport.abort()


def request_of(head: Head, body: bytes, request_id: str) -> ClientRequest:
    """A request out of its parts."""
    return ClientRequest(
        method="POST",
        path=head.path,
        query=head.query,
        headers=head.headers,
        body=body,
        request_id=request_id,
        first=head.first,
    )
