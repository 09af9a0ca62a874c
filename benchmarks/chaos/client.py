"""A client that knows which worker serves each of its connections, and does what clients do: read, leave, dawdle."""

from __future__ import annotations

import asyncio
import contextlib
import time
import zlib
from collections import deque
from enum import StrEnum
from typing import Any

import msgspec

from benchmarks.chaos.account import STAYS_OPEN, STAYS_SILENT

PATHS = {"openai": "/v1/chat/completions", "anthropic": "/v1/messages"}
LAST_WORDS = {"openai": b"data: [DONE]", "anthropic": b"event: message_stop"}
MOST_S = 40.0
"""Longer than whatever the gateway allows: who waits so long was forgotten."""
_IDLE_S = 8.0
_INTRODUCTION_S = 20.0
_SIP_BYTES = 400
_SIP_S = 0.1


class Manner(StrEnum):
    """How a client reads."""

    READS = "reads"
    LEAVES_BEFORE = "leaves before the first byte"
    LEAVES_AMID = "leaves at some byte"
    DAWDLES = "dawdles"


class End(StrEnum):
    """How a request ended for its client."""

    WHOLE = "whole"
    LEFT = "left"
    ERROR = "error"
    CUT = "cut"
    BROKEN = "broken"
    FORGOTTEN = "forgotten"


class Ask(msgspec.Struct, frozen=True, kw_only=True):
    """One request to be made."""

    request_id: str
    rule: str
    style: str
    is_stream: bool
    manner: Manner = Manner.READS
    leave_at: int = 0
    """Bytes of the body after which the client leaves, or milliseconds if it leaves before the first."""

    def body(self) -> bytes:
        """The request's body."""
        wish = {Manner.LEAVES_BEFORE: STAYS_SILENT, Manner.LEAVES_AMID: STAYS_OPEN}.get(self.manner, "tell")
        text = f"{wish} {self.request_id} " + "of fleets " * (zlib.crc32(self.request_id.encode()) % 30)
        message = {"role": "user", "content": text}
        return msgspec.json.encode(
            {"model": self.rule, "max_tokens": 40, "stream": self.is_stream, "messages": [message]}
        )


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What became of it. Times are monotonic; `first` is that of the answer's first byte, 0 for none."""

    ask: Ask
    began: float
    ended: float
    first: float
    end: End
    pid: int
    """The process of the worker whose connection it was made on."""
    status: int = 0
    code: str = ""
    message: str = ""
    service: str = ""
    decision: str = ""
    attempts: int = 0
    degraded: str = ""


class _BrokenError(Exception):
    """The connection has ended before the answer did."""


class _LeftError(Exception):
    """The client has left, as it was told to."""


class Connection:
    """One connection, introduced: its worker has told who it is."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self.pid = 0
        self.is_usable = True
        self.used_at = time.monotonic()

    @property
    def is_fresh(self) -> bool:
        """True while the other side holds it too, as far as one can tell."""
        return (
            self.is_usable
            and not self._reader.at_eof()
            and self._reader.exception() is None
            and time.monotonic() - self.used_at < _IDLE_S
        )

    def abort(self) -> None:
        """Ends it as a process that is killed does."""
        self.is_usable = False
        self._writer.transport.abort()

    async def introduce(self) -> None:
        """Asks who serves it. Raises ConnectionError, TimeoutError."""
        self._writer.write(b"GET /readyz HTTP/1.1\r\nHost: fleet\r\n\r\n")
        try:
            async with asyncio.timeout(_INTRODUCTION_S):
                _, headers = await self._head()
                body = b"".join([part async for part in self._body(headers)])
        except _BrokenError as exc:
            raise ConnectionResetError from exc
        self.pid = msgspec.json.decode(body)["pid"]

    async def ask(self, ask: Ask) -> Answer:
        """Sends a request and reads its answer, in the client's manner."""
        body = ask.body()
        head = (
            f"POST {PATHS[ask.style]} HTTP/1.1\r\nHost: fleet\r\nContent-Type: application/json\r\n"
            f"x-request-id: {ask.request_id}\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        began = time.monotonic()
        seen: dict[str, Any] = {}
        read = bytearray()
        end = End.FORGOTTEN
        try:
            self._writer.write(head.encode() + body)
            async with asyncio.timeout(MOST_S):
                await self._read(ask, seen, read)
            end = _end_of(ask, seen["status"], bytes(read))
        except _LeftError:
            end = End.LEFT
        except (_BrokenError, ConnectionError):
            end = End.BROKEN
        except TimeoutError:
            pass
        if end not in (End.WHOLE, End.ERROR, End.CUT):
            self.abort()
        self.used_at = time.monotonic()
        code, message = _error_in(bytes(read)) if end is End.ERROR else ("", "")
        return Answer(
            ask=ask, began=began, ended=self.used_at, end=end, pid=self.pid, code=code, message=message,
            first=seen.get("first", 0.0), **{name: seen[name] for name in _SEEN if name in seen},
        )  # fmt: skip

    async def _read(self, ask: Ask, seen: dict[str, Any], read: bytearray) -> None:
        if ask.manner is Manner.LEAVES_BEFORE:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(ask.leave_at / 1000):
                    await self._started(seen)
            if "status" not in seen:
                raise _LeftError
        else:
            await self._started(seen)
        async for part in self._body(seen["headers"]):
            read += part
            if ask.manner is Manner.LEAVES_AMID and len(read) >= ask.leave_at and seen["status"] == 200:
                raise _LeftError
            if ask.manner is Manner.DAWDLES:
                await asyncio.sleep(_SIP_S)
        if seen["headers"].get("connection") == "close":
            self.abort()

    async def _started(self, seen: dict[str, Any]) -> None:
        status, headers = await self._head()
        seen |= {
            "first": time.monotonic(),
            "status": status,
            "headers": headers,
            "service": headers.get("x-balancer-service", ""),
            "decision": headers.get("x-balancer-decision", ""),
            "attempts": int(headers.get("x-balancer-attempts", "0")),
            "degraded": headers.get("x-balancer-degraded", ""),
        }

    async def _head(self) -> tuple[int, dict[str, str]]:
        try:
            first, *lines = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")[:-2]
        except asyncio.IncompleteReadError as exc:
            raise _BrokenError from exc
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        return int(first.split(" ")[1]), headers

    async def _body(self, headers: dict[str, str]) -> Any:
        """The body's bytes as they come."""
        try:
            if "content-length" in headers:
                left = int(headers["content-length"])
                while left:
                    left -= len(part := await self._some(left))
                    yield part
                return
            while left := int(await self._reader.readuntil(b"\r\n"), 16):
                while left:
                    left -= len(part := await self._some(left))
                    yield part
                await self._reader.readexactly(2)
            await self._reader.readexactly(2)
        except asyncio.IncompleteReadError as exc:
            raise _BrokenError from exc

    async def _some(self, most: int) -> bytes:
        part = await self._reader.read(min(most, _SIP_BYTES))
        if not part:
            raise _BrokenError
        return part


_SEEN = ("status", "service", "decision", "attempts", "degraded")


def _end_of(ask: Ask, status: int, body: bytes) -> End:
    if status != 200:
        return End.ERROR
    if ask.is_stream:
        return End.WHOLE if LAST_WORDS[ask.style] in body else End.CUT
    return End.WHOLE


def _error_in(body: bytes) -> tuple[str, str]:
    """Code (or type) and message of an error in either dialect."""
    try:
        error = msgspec.json.decode(body)["error"]
        return str(error.get("code") or error["type"]), str(error["message"])
    except (msgspec.DecodeError, KeyError, TypeError, AttributeError):
        return "", body[:200].decode("utf-8", "replace")


class Clients:
    """Connections to a fleet, used again as SDKs do; each request is made once and never repeated."""

    def __init__(self, ports: list[int]) -> None:
        self._ports = ports
        self._turn = 0
        self._idle: deque[Connection] = deque()
        """The longest idle is used first, so that none is idle for long."""
        self.introductions_failed = 0

    async def ask(self, ask: Ask) -> Answer:
        """Makes a request on an idle connection, or on a new one."""
        began = time.monotonic()
        connection = self._take()
        try:
            async with asyncio.timeout(MOST_S):
                connection = connection or await self._connect()
        except (OSError, TimeoutError) as exc:
            end = End.FORGOTTEN if isinstance(exc, TimeoutError) else End.BROKEN
            return Answer(ask=ask, began=began, ended=time.monotonic(), first=0.0, end=end, pid=0, message=str(exc))
        answer = await connection.ask(ask)
        if connection.is_usable:
            self._idle.append(connection)
        return answer

    def close(self) -> None:
        """Ends what is idle."""
        while self._idle:
            self._idle.pop().abort()

    def _take(self) -> Connection | None:
        while self._idle:
            connection = self._idle.popleft()
            if connection.is_fresh:
                return connection
            connection.abort()
        return None

    async def _connect(self) -> Connection:
        """A new connection. Whom it reaches may be killed before it has told its name: then another one is tried."""
        while True:
            self._turn += 1
            reader, writer = await asyncio.open_connection("127.0.0.1", self._ports[self._turn % len(self._ports)])
            connection = Connection(reader, writer)
            try:
                await connection.introduce()
            except (ConnectionError, TimeoutError):
                self.introductions_failed += 1
                connection.abort()
                await asyncio.sleep(0.05)
            else:
                return connection
