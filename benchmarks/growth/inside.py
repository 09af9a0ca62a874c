"""A worker that tells what is in it: the product's own gateway, with a line of commands on stdin.

`python -m benchmarks.growth.inside REDIS_URL [KEPT_S]` prints its port and ends with its stdin. Each line gets a line
of JSON: `size`; `mark` and `since` (objects by type, and with PYTHONTRACEMALLOC memory by line, that are there since
the mark); `count` and `counted` (how often each line of the product ran for requests in between). KEPT_S is how long
settled batches are kept for a failover, instead of a minute: so long whatever is settled looks like a leak.
"""

from __future__ import annotations

import asyncio
import contextvars
import gc
import os
import socket
import sys
import tempfile
import tracemalloc
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import msgspec

import balancer
from balancer import config, log
from balancer.gateway.app import Gateway
from balancer.gateway.handlers import Handlers
from balancer.gateway.messages import ClientRequest, WayBack
from balancer.store import settlement
from benchmarks.growth.files import raise_open_files

_PACKAGE = str(Path(balancer.__file__).parent) + os.sep
_SHOWN = 40
_is_request: contextvars.ContextVar[bool] = contextvars.ContextVar("is_request", default=False)


class Size(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker is made of, at rest: garbage is collected first."""

    rss_bytes: int
    blocks: int
    """Of memory that Python has given out."""
    objects: int
    """That the garbage collector knows."""
    fds: int
    tasks: int
    cpu_s: float


class Since(msgspec.Struct, frozen=True, kw_only=True):
    """What has come since the mark."""

    types: dict[str, int]
    """How many objects more."""
    lines: dict[str, tuple[int, int]]
    """Bytes and blocks more, by the line that asked for them, the most first; empty unless memory is traced."""
    traced_bytes: int
    """The same of all lines."""


def size() -> Size:
    """This process, now."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    times = os.times()
    return Size(
        rss_bytes=pages * os.sysconf("SC_PAGE_SIZE"),
        blocks=sys.getallocatedblocks(),
        objects=len(gc.get_objects()),
        fds=len(os.listdir("/proc/self/fd")),
        tasks=len(asyncio.all_tasks()),
        cpu_s=times.user + times.system,
    )


class Marks:
    """Compares what is there with what was there at the mark."""

    def __init__(self) -> None:
        self._types: Counter[str] = Counter()
        self._lines: tracemalloc.Snapshot | None = None

    def mark(self) -> None:
        """From here on."""
        gc.collect()
        self._types = _types()
        self._lines = tracemalloc.take_snapshot() if tracemalloc.is_tracing() else None

    def since(self) -> Since:
        """What has come."""
        gc.collect()
        more = _types() - self._types
        lines: dict[str, tuple[int, int]] = {}
        traced_bytes = 0
        if self._lines:
            snapshot = tracemalloc.take_snapshot().filter_traces((tracemalloc.Filter(False, tracemalloc.__file__),))
            differences = snapshot.compare_to(self._lines, "lineno")
            traced_bytes = sum(difference.size_diff for difference in differences)
            for difference in differences:
                frame = difference.traceback[0]
                lines[f"{_short(frame.filename)}:{frame.lineno}"] = (difference.size_diff, difference.count_diff)
        return Since(types=dict(more.most_common(_SHOWN)), lines=lines, traced_bytes=traced_bytes)


def _types() -> Counter[str]:
    return Counter(f"{type(each).__module__}.{type(each).__qualname__}" for each in gc.get_objects())


def _short(path: str) -> str:
    """A path from the package's or library's name on."""
    for mark in (f"{os.sep}site-packages{os.sep}", f"{os.sep}lib{os.sep}"):
        if mark in path:
            return path.rpartition(mark)[2]
    return f"balancer{os.sep}" + path.removeprefix(_PACKAGE) if path.startswith(_PACKAGE) else path


class Lines:
    """Counts how often lines of the product run for requests, which it tells from what runs in the background."""

    def __init__(self) -> None:
        self._handle = Handlers.handle
        self._counts: Counter[tuple[str, str, int]] = Counter()

    def begin(self) -> None:
        """Counts from zero on."""
        self._counts.clear()
        handle = self._handle

        async def marked(handlers: Handlers, request: ClientRequest, stream: WayBack) -> None:
            _is_request.set(True)
            try:
                await handle(handlers, request, stream)
            finally:
                _is_request.set(False)

        Handlers.handle = marked  # type: ignore[assignment, method-assign]
        sys.settrace(self._trace)

    def end(self) -> dict[str, int]:
        """The counts by `file:function:line`; counts no more."""
        sys.settrace(None)
        Handlers.handle = self._handle  # type: ignore[method-assign]
        return {f"{_short(name)}:{inner}:{line}": count for (name, inner, line), count in self._counts.items()}

    def _trace(self, frame: FrameType, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(_PACKAGE) or not _is_request.get():
            return None
        frame.f_trace_lines = True
        return self._of_frame

    def _of_frame(self, frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            code = frame.f_code
            self._counts[code.co_filename, code.co_qualname.partition(".<locals>")[0], frame.f_lineno] += 1
        return self._of_frame


async def main(url: str, kept_s: float) -> None:
    """Serves until stdin ends."""
    settlement.KEPT_S = kept_s
    raise_open_files()
    log.configure("error")
    marks, lines = Marks(), Lines()
    with tempfile.TemporaryDirectory(prefix="growth-") as folder:
        # As the workers of `serve` have it: metrics in files that they share.
        gateway = Gateway(config.load({"redis": url}), url, None, metrics_folder=Path(folder))
        listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        await gateway.start([listener])
        print(listener.getsockname()[1], flush=True)
        reader = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
        while line := (await reader.readline()).decode().strip():
            answer: Any = None
            match line:
                case "size":
                    answer = size()
                case "mark":
                    marks.mark()
                case "since":
                    answer = marks.since()
                case "count":
                    lines.begin()
                case "counted":
                    answer = lines.end()
                case _:
                    answer = f"{line} is no command"
            print(msgspec.json.encode(answer).decode(), flush=True)
        await gateway.drain()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], float(sys.argv[2]) if len(sys.argv) > 2 else settlement.KEPT_S))
