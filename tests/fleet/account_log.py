"""Accounts for black-box tests: each logs every request with its times, to be held against what was promised."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import msgspec

from tests.actors import Received, read_request, served

INPUT = 11
OUTPUT = 7
"""The tokens that an account reports; a request's own `max_tokens` is its output."""
MINUTE_S = 60.0

Json = dict[str, Any]


class Line(msgspec.Struct, kw_only=True):
    """One request: when it was read, and when the last byte of its answer was about to be written, or its caller left.

    In between it was in flight for certain.
    """

    method: str
    path: str
    model: str
    text: str
    began: float
    ended: float = float("inf")
    status: int = 0
    input: int = 0
    output: int = 0


class Fault(msgspec.Struct, frozen=True, kw_only=True):
    """An answer that is no good; status 0 is none at all: the connection is closed."""

    status: int
    retry_after: str = ""
    code: str = "server_error"
    message: str = "out of order"


class Account:
    """An account that answers the way the real ones do, `hold_s` later, or fails as it was told."""

    def __init__(self, name: str, *, hold_s: float = 0.0) -> None:
        self.name = name
        self.hold_s = hold_s
        self.lines: list[Line] = []
        self.url = ""
        self.gate: asyncio.Event | None = None
        self._once: deque[Fault] = deque()
        self._fault: Fault | None = None

    # -- what it does --------------------------------------------------------------------------------------------------

    def fails(self, status: int, *, times: int = 0, **more: str) -> None:
        """Fails so often, or until it `recovers`."""
        fault = Fault(status=status, **more)
        if times:
            self._once.extend([fault] * times)
        else:
            self._fault = fault

    def recovers(self) -> None:
        """Answers again."""
        self._fault = None
        self._once.clear()

    # -- what it saw ---------------------------------------------------------------------------------------------------

    def of(self, model: str = "") -> list[Line]:
        """The requests that made it generate something, or tried to, of a model or of all."""
        return [line for line in self.lines if line.model and line.model == (model or line.model)]

    def paths(self) -> list[str]:
        """Method and path of every request."""
        return [f"{line.method} {line.path}" for line in self.lines]

    # -- how -----------------------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Account]:
        """Serves on a free port until the block ends."""
        async with served(self._connection) as port:
            self.url = f"http://127.0.0.1:{port}"
            yield self

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while request := await read_request(reader):
                if not await self._answer(request, reader, writer):
                    return

    async def _answer(self, request: Received, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        body: Json = msgspec.json.decode(request.body) if request.body else {}
        path = request.target.partition("?")[0]
        line = Line(
            method=request.method,
            path=path,
            model=body.get("model", ""),
            text=msgspec.json.encode(body.get("messages", body.get("input", ""))).decode(),
            began=time.monotonic(),
        )
        self.lines.append(line)
        fault = self._once.popleft() if self._once else self._fault
        is_there = await self._holds(reader)
        line.ended = time.monotonic()
        if not is_there or (fault and not fault.status):
            return False
        if fault:
            line.status = fault.status
            answer: Json = {"error": {"message": fault.message, "type": fault.code, "code": fault.code}}
            if path.startswith("/v1/messages"):
                answer = {"type": "error", "error": {"type": fault.code, "message": fault.message}}
        else:
            line.status = 200
            if line.model:
                line.input, line.output = INPUT, int(body.get("max_tokens", OUTPUT))
            answer = _body(path, line, f"resp_{self.name}_{len(self.lines)}")
        text = msgspec.json.encode(answer)
        head = [f"HTTP/1.1 {line.status} Whatever", "Content-Type: application/json", f"Content-Length: {len(text)}"]
        if fault and fault.retry_after:
            head.append(f"Retry-After: {fault.retry_after}")
        writer.write("\r\n".join(head).encode() + b"\r\n\r\n" + text)
        await writer.drain()
        return True

    async def _holds(self, reader: asyncio.StreamReader) -> bool:
        """Keeps the request as long as it was told; False when its caller has left."""
        if not self.gate and not self.hold_s:
            return True
        wait = asyncio.create_task(self.gate.wait() if self.gate else asyncio.sleep(self.hold_s))
        gone = asyncio.create_task(reader.read(1))
        try:
            await asyncio.wait({wait, gone}, return_when=asyncio.FIRST_COMPLETED)
            return not gone.done()
        finally:
            wait.cancel()
            gone.cancel()
            await asyncio.gather(wait, gone, return_exceptions=True)


def _body(path: str, line: Line, response_id: str) -> Json:
    if path.startswith("/v1/messages"):
        content = [{"type": "text", "text": "hi"}]
        usage: Json = {"input_tokens": line.input, "output_tokens": line.output}
        rest = {"content": content, "stop_reason": "end_turn", "stop_sequence": None, "usage": usage}
        return {"id": "m1", "type": "message", "role": "assistant", "model": line.model, **rest}
    if path.startswith("/v1/responses"):
        usage = {"input_tokens": line.input, "output_tokens": line.output, "total_tokens": line.input + line.output}
        asked = path.split("/")[3] if path != "/v1/responses" else response_id
        return {"id": asked, "object": "response", "status": "completed", "output": [], "usage": usage}
    usage = {"prompt_tokens": line.input, "completion_tokens": line.output, "total_tokens": line.input + line.output}
    choice = {"index": 0, "message": {"role": "assistant", "content": "hi"}, "finish_reason": "stop"}
    return {"id": "c1", "object": "chat.completion", "created": 1, "model": line.model, "choices": [choice]} | {
        "usage": usage
    }


# -- what a log says ---------------------------------------------------------------------------------------------------


def most_at_once(lines: Sequence[Line]) -> int:
    """The most requests that were in flight at any moment. One that ends as another begins was over by then."""
    steps = sorted([(line.began, 1) for line in lines] + [(line.ended, -1) for line in lines])
    most = now = 0
    for _, step in steps:
        now += step
        most = max(most, now)
    return most


def most_a_minute(lines: Sequence[Line], weight: Callable[[Line], int] = lambda _: 1) -> int:
    """The most requests, or what else they weigh, that began in any sixty seconds."""
    return max(
        (sum(weight(line) for line in lines if 0 <= line.began - first.began < MINUTE_S) for first in lines), default=0
    )


def tokens(line: Line) -> int:
    """What a request has used."""
    return line.input + line.output
