"""The access log: a JSON line for each request on stdout, written in batches by a thread of its own.

A line is a struct of names and numbers: none of its fields could hold a body, a header, a query or a credential.
Whoever reads stdout slowly holds up nobody: what cannot be written is dropped, and a warning says how much.
"""

from __future__ import annotations

import asyncio
import os
import queue
import select
import stat
import sys
import threading
import time
from collections.abc import Iterator

import msgspec

from balancer import log
from balancer.errors import ConfigurationError

FLUSH_S = 0.1
"""So long a line waits for others at most."""
_FLUSH_LINES = 256
"""So many do not wait: encoding more at once would hold up requests."""
_MOST_BYTES = 8 * 1024 * 1024
"""So much may wait for who reads stdout."""
_ATOMIC_BYTES = select.PIPE_BUF
"""What several processes write to one pipe in pieces of that size is not mixed."""
_WARN_INTERVAL_S = 10.0


class Line(msgspec.Struct, frozen=True, gc=False, omit_defaults=True, tag_field="event", tag="request"):
    """What is told of a request. Fields with a default are left out where they say nothing.

    `path` is the shape of what was asked for, `status` what the client was sent: 0 for nothing, 499 where it had left.
    Durations are from the request's last byte: of all, of its selections, of its last attempt, and of that until its
    first token.
    """

    ts: str
    request: str
    client: str
    method: str
    path: str
    status: int
    outcome: str
    duration_ms: float
    bytes_in: int
    bytes_out: int
    attempts: int
    is_stream: bool = msgspec.field(name="stream")
    scenario: str = ""
    rule: str = ""
    fallback: str = ""
    """The rule that stood in for it."""
    pool: str = ""
    service: str = ""
    decision: str = ""
    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    cache_creation_tokens: int = 0
    reasoning_tokens: int = 0
    select_ms: float | None = None
    upstream_ms: float | None = None
    first_token_ms: float | None = None
    is_degraded: bool = msgspec.field(default=False, name="degraded")
    error: str = ""
    trace: str = ""
    entry: str = ""
    """The smart-routing entry that it belongs to."""
    key: str = ""
    """The name of the client's key, once clients have keys with names."""


_encode = msgspec.json.Encoder()
_second = -1
_prefix = ""


def stamp(now: float) -> str:
    """A time in seconds since 1970 as the log gives it, with milliseconds."""
    global _second, _prefix
    second = int(now)
    if second != _second:
        _second, _prefix = second, time.strftime("%Y-%m-%dT%H:%M:%S.", time.gmtime(second))
    return f"{_prefix}{int(now * 1000) - second * 1000:03}+00:00"


def encoded(lines: list[Line]) -> bytes:
    """The lines as bytes, each with its line end."""
    try:
        return _encode.encode_lines(lines)
    except UnicodeEncodeError:
        # Half a surrogate pair, from a name that was no text to begin with.
        return b"".join(map(_readable, lines))


def _readable(line: Line) -> bytes:
    try:
        return _encode.encode(line) + b"\n"
    except UnicodeEncodeError:
        texts = {name: value for name in line.__struct_fields__ if isinstance(value := getattr(line, name), str)}
        plain = {name: text.encode("utf-8", "replace").decode() for name, text in texts.items()}
        return _encode.encode(msgspec.structs.replace(line, **plain)) + b"\n"


def pieces(data: bytes, most_bytes: int) -> Iterator[bytes]:
    """Whole lines, together no longer than that; one that is longer is on its own."""
    begin = 0
    while len(data) - begin > most_bytes:
        end = data.rfind(b"\n", begin, begin + most_bytes) + 1 or data.find(b"\n", begin) + 1 or len(data)
        yield data[begin:end]
        begin = end
    if begin < len(data):
        yield data[begin:]


class AccessLog:
    """Writes lines to a file descriptor, stdout's as a rule, from the loop's thread on."""

    def __init__(self, fd: int = 1, *, most_bytes: int = _MOST_BYTES) -> None:
        """Raises ConfigurationError where the process has no stdout: the number may be some connection's by now."""
        if fd == 1 and sys.__stdout__ is None:
            raise ConfigurationError("BALANCER_ACCESS_LOG: stdout is closed: redirect it to where the lines should go")
        self._fd = fd
        self._most_bytes = most_bytes
        self._is_pipe = stat.S_ISFIFO(os.fstat(self._fd).st_mode)
        self._lines: list[Line] = []
        self._timer: asyncio.TimerHandle | None = None
        self._batches: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        # Each is changed by one thread alone.
        self._given_bytes = self._dropped = 0
        self._taken_bytes = self._told = 0
        self._told_at = -_WARN_INTERVAL_S
        self._is_broken = False
        self._writer = threading.Thread(target=self._run, name="access-log", daemon=True)
        self._writer.start()

    def write(self, line: Line) -> None:
        """Has a line written some time soon."""
        lines = self._lines
        lines.append(line)
        if len(lines) >= _FLUSH_LINES:
            self.flush()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(FLUSH_S, self.flush)

    def flush(self) -> None:
        """Gives what has come together to the writing thread; drops it where too much waits there already."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        lines, self._lines = self._lines, []
        if not lines:
            return
        data = encoded(lines)
        if self._given_bytes - self._taken_bytes + len(data) > self._most_bytes:
            self._dropped += len(lines)
            return
        self._given_bytes += len(data)
        self._batches.put(data)

    async def close(self, timeout_s: float) -> None:
        """Writes what is left, for no longer than that."""
        self.flush()
        self._batches.put(b"")
        await asyncio.to_thread(self._writer.join, timeout_s)

    # -- the writing thread --------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while data := self._batches.get():
            if not self._is_broken:
                try:
                    self._put(data)
                except OSError as exc:
                    self._is_broken = True
                    log.warning("the access log ends: stdout cannot be written to", reason=exc.strerror)
            self._taken_bytes += len(data)
            self._tell_of_drops()
        self._told_at = -_WARN_INTERVAL_S
        self._tell_of_drops()

    def _put(self, data: bytes) -> None:
        for piece in pieces(data, _ATOMIC_BYTES) if self._is_pipe else (data,):
            view = memoryview(piece)
            while view:
                try:
                    view = view[os.write(self._fd, view) :]
                except BlockingIOError:  # Somebody else has made it so: it is shared.
                    select.select([], [self._fd], [])

    def _tell_of_drops(self) -> None:
        """Warns from here, and not from where they are dropped: stderr may be as slow as stdout."""
        now = time.monotonic()
        if self._dropped > self._told and now - self._told_at >= _WARN_INTERVAL_S:
            dropped, self._told_at = self._dropped, now
            log.warning("lines of the access log were dropped: stdout is read too slowly", lines=dropped - self._told)
            self._told = dropped
