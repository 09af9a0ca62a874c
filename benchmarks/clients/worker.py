"""One client library at work: `python -m benchmarks.clients.worker LOOP NAME URL SMALL_BODY STREAM_BODY SECONDS`.

Prints one line of JSON. Imports nothing but the library: it may run where nothing else of ours is installed.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import re
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from benchmarks.clients.adapters import ADAPTERS, Client

CONCURRENCY = 32
_WARM_UP_S = 0.3
_USAGE = b"completion_tokens"


async def main(name: str, url: str, small: bytes, stream: bytes, seconds: float) -> dict[str, float]:
    """CPU of this process, all threads, for a request and for a stream, in µs; both a second; memory in MiB.

    `parts` is in how many pieces the library hands over a stream: 51 are sent.
    """
    client = await ADAPTERS[name]()
    parts: list[int] = []
    small_us, small_per_s = await _measure(lambda: _whole(client, url, small), seconds)
    stream_us, streams_per_s = await _measure(lambda: _stream(client, url, stream, parts), seconds)
    return {
        "small_us": small_us,
        "small_per_s": small_per_s,
        "stream_us": stream_us,
        "streams_per_s": streams_per_s,
        "parts": statistics.fmean(parts),
        "memory_mib": _memory_mib(),
    }


async def _whole(client: Client, url: str, body: bytes) -> None:
    answer = await client.whole(url, body)
    if _USAGE not in answer:
        raise RuntimeError(f"no usage in the answer: {answer[:200]!r}")


async def _stream(client: Client, url: str, body: bytes, parts: list[int]) -> None:
    count, before, last = 0, b"", b""
    async for chunk in client.stream(url, body):
        count, before, last = count + 1, last, chunk
    if _USAGE not in before + last:
        raise RuntimeError(f"no usage at the end of the stream: {last[:200]!r}")
    parts.append(count)


async def _measure(request: Callable[[], Awaitable[None]], seconds: float) -> tuple[float, float]:
    await _run(request, _WARM_UP_S)
    cpu, started = time.process_time(), time.monotonic()
    count = await _run(request, seconds)
    return (time.process_time() - cpu) * 1e6 / count, count / (time.monotonic() - started)


async def _run(request: Callable[[], Awaitable[None]], seconds: float) -> int:
    ends = time.monotonic() + seconds

    async def one_after_the_other() -> int:
        count = 0
        while time.monotonic() < ends:
            await request()
            count += 1
        return count

    return sum(await asyncio.gather(*(one_after_the_other() for _ in range(CONCURRENCY))))


def _memory_mib() -> float:
    # Not ru_maxrss: that begins with the size of the process that started us.
    found = re.search(r"^VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text("ascii"), re.MULTILINE)
    return int(found[1]) / 1024 if found else 0.0


if __name__ == "__main__":
    loop, name, url, *files, seconds = sys.argv[1:]
    small, stream = (Path(file).read_bytes() for file in files)
    factory = importlib.import_module("uvloop").new_event_loop if loop == "uvloop" else asyncio.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        print(json.dumps(runner.run(main(name, url, small, stream, float(seconds)))), flush=True)
        # Some libraries keep threads that would hold up the end.
        os._exit(0)
