"""What Redis and a worker must have room for: `python -m benchmarks.sizing`, some two minutes; prints Markdown.

One `balancer serve` with one worker over one Redis with an append-only file, and an upstream in this process. Bytes are
exact; CPU is that of the processes themselves, so that a busy machine changes little.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import redis
import yaml

from balancer.store import keys
from benchmarks.chaos.processes import Serve, size_of
from tests import servers

RULES, SERVICES = 1000, 4
REQUESTS, AT_ONCE = 3000, 32
SESSIONS = 3000
STREAMS, EVENTS_PER_S, STREAMED_S = 200, 20, 6.0
REST_S = 10.0
_TICKS = os.sysconf("SC_CLK_TCK")
_CHUNK = b'data: {"id":"c","object":"chat.completion.chunk","choices":[{"index":0,"delta":{"content":"word "}}]}\n\n'
_LAST = b'data: {"id":"c","choices":[],"usage":{"prompt_tokens":11,"completion_tokens":7}}\n\ndata: [DONE]\n\n'
_WHOLE = b'{"id":"c","object":"chat.completion","choices":[],"usage":{"prompt_tokens":11,"completion_tokens":7}}'
_RESPONSE = b'{"id":"resp_%d","object":"response","status":"completed","usage":{"input_tokens":1,"output_tokens":1}}'


class Upstream:
    """Answers at once, or streams events at a steady rate."""

    def __init__(self) -> None:
        self._responses = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = next(
                    int(line[15:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length")
                )
                body = await reader.readexactly(length)
                await self._answer(head, body, writer)
        writer.close()

    async def _answer(self, head: bytes, body: bytes, writer: asyncio.StreamWriter) -> None:
        if b'"stream":true' not in body.replace(b" ", b""):
            self._responses += 1
            text = _RESPONSE % self._responses if b"/responses" in head.split(b"\r\n")[0] else _WHOLE
            writer.write(
                b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(text), text)
            )
            await writer.drain()
            return
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(int(EVENTS_PER_S * STREAMED_S)):
            writer.write(b"%x\r\n%b\r\n" % (len(_CHUNK), _CHUNK))
            await asyncio.sleep(1 / EVENTS_PER_S)
        writer.write(b"%x\r\n%b\r\n0\r\n\r\n" % (len(_LAST), _LAST))


class Bench:
    """A store, an upstream, a worker, and what is read of them."""

    def __init__(self, url: str, folder: Path) -> None:
        self.client: Any = redis.Redis.from_url(url)
        self._url = url
        self._folder = folder
        self._upstream = 0

    async def upstream(self) -> None:
        """Starts the upstream."""
        server = await asyncio.start_server(Upstream().serve, "127.0.0.1", 0)
        self._upstream = server.sockets[0].getsockname()[1]

    def document(self, rules: int, record: str) -> str:
        """A file with so many rules, each over the same services."""
        base = f"http://127.0.0.1:{self._upstream}"
        providers = [{"name": f"p{i}", "api_base": base, "no_key_required": True} for i in range(SERVICES)]
        services = [{"provider": f"p{i}", "model": "m"} for i in range(SERVICES)]
        made = [
            {"request_model": f"model-{i}", "services": services, "session_affinity": 900 if i else 0}
            for i in range(rules)
        ]
        pools = [{"name": "default", "record": record, "record_events": 1_000_000}]
        file = self._folder / f"{rules}-{record}.yaml"
        file.write_text(yaml.safe_dump({"providers": providers, "rules": made, "pools": pools}), encoding="utf-8")
        return str(file)

    @contextlib.asynccontextmanager
    async def worker(self, rules: int, record: str = "off") -> AsyncIterator[Serve]:
        """One worker on an empty store."""
        self.client.flushall()
        arguments = ["--workers", "1", "--port", "0", "--redis", self._url, "--config", self.document(rules, record)]
        serve = await Serve.start(self._folder / "log", arguments, {"BALANCER_ADMIN_PORT": "0"})
        (self._folder / "log").unlink()
        try:
            yield serve
        finally:
            await serve.stop()

    def bytes_of(self, key: str) -> int:
        """Redis' memory for a key."""
        return int(self.client.memory_usage(key, samples=0) or 0)

    def state(self) -> dict[str, float]:
        """What Redis has received, sent, written to its file and used of a core, in bytes and µs."""
        info = self.client.info("everything")
        return {
            "in": info["total_net_input_bytes"],
            "out": info["total_net_output_bytes"],
            "aof": info["aof_current_size"],
            "cpu_us": (info["used_cpu_user"] + info["used_cpu_sys"]) * 1e6,
            "commands": info["total_commands_processed"],
        }

    @contextlib.contextmanager
    def counted(self, into: dict[str, float], count: float) -> Iterator[None]:
        """Enters what happened meanwhile, for each of so many."""
        before = self.state()
        yield
        into.update({name: (value - before[name]) / count for name, value in self.state().items()})


async def ask(port: int, count: int, *, at_once: int = AT_ONCE, path: str = "chat/completions", **more: Any) -> None:
    """So many requests. `{n}` in the additions is the request's number."""
    numbers = iter(range(count))

    async def client(session: aiohttp.ClientSession) -> None:
        for number in numbers:
            body = {"model": "model-0", "messages": [{"role": "user", "content": "hello"}]} | {
                name: value.format(n=number) if isinstance(value, str) else value for name, value in more.items()
            }
            async with session.post(f"http://127.0.0.1:{port}/v1/{path}", json=body) as response:
                await response.read()
                assert response.status == 200, await response.text()

    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:
        await asyncio.gather(*(client(session) for _ in range(at_once)))


def cpu_us(pid: int) -> float:
    """µs of CPU that the process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * 1e6 / _TICKS


def show(title: str, rows: list[tuple[str, str]]) -> None:
    """Prints a table of two columns."""
    print(f"\n| {title} | |\n|---|--:|")
    for name, value in rows:
        print(f"| {name} | {value} |")
    sys.stdout.flush()


async def main() -> None:
    """Measures and prints."""
    arguments = ("--appendonly", "yes", "--appendfsync", "everysec", "--auto-aof-rewrite-percentage", "0")
    with servers.running("valkey-9", *arguments) as url, tempfile.TemporaryDirectory(prefix="sizing-") as name:
        bench = Bench(url, Path(name))
        await bench.upstream()
        show("Redis' memory, bytes", await _memory(bench))
        for record in ("off", "full"):
            show(f"a request, record: {record}", await _traffic(bench, record))
        show("one worker and its Redis", await _worker(bench))


async def _memory(bench: Bench) -> list[tuple[str, str]]:
    async with bench.worker(1):
        few = bench.bytes_of(keys.partitions("default"))
    async with bench.worker(RULES) as serve:
        rules = (bench.bytes_of(keys.partitions("default")) - few) / (RULES - 1)
        snapshot = bench.bytes_of(keys.snapshot(1)) / RULES
        await ask(serve.port, 200)
        services = bench.bytes_of(keys.services("default"))
        await ask(serve.port, SESSIONS, model="model-1", user="session {n}")
        pins = [bench.bytes_of(key) for key in bench.client.scan_iter("balancer:{default}:pin:*", count=1000)]
        await ask(serve.port, SESSIONS, path="responses", input="hello")
        responses = [bench.bytes_of(key) for key in bench.client.scan_iter("balancer:{default}:response:*", count=1000)]
    return [
        (f"a rule of {SERVICES} services, in its pool", f"{rules:.0f}"),
        (f"the same in each of the last 200 snapshots, {SERVICES} services", f"{snapshot:.0f}"),
        (f"the state of a pool's {SERVICES} services", f"{services}"),
        (f"a session's pin ({len(pins)} made)", f"{sum(pins) / len(pins):.0f}"),
        (f"a response's id ({len(responses)} made)", f"{sum(responses) / len(responses):.0f}"),
    ]


async def _traffic(bench: Bench, record: str) -> list[tuple[str, str]]:
    rows = []
    async with bench.worker(1, record) as serve:
        for at_once, count in ((1, REQUESTS // 6), (AT_ONCE, REQUESTS)):
            await ask(serve.port, 200, at_once=at_once)
            used: dict[str, float] = {}
            with bench.counted(used, count):
                await ask(serve.port, count, at_once=at_once)
                await asyncio.sleep(1)
            rows.append(
                (
                    f"{at_once} at once: bytes to Redis, from it, to its file; µs of its CPU",
                    f"{used['in']:.0f}, {used['out']:.0f}, {used['aof']:.0f}; {used['cpu_us']:.0f}",
                )
            )
        if record == "full":
            stream = keys.decisions("default")
            each = bench.bytes_of(stream) / bench.client.xlen(stream)
            rows.append(("memory of an event, two a request", f"{each:.0f}"))
    return rows


async def _worker(bench: Bench) -> list[tuple[str, str]]:
    async with bench.worker(1) as serve:
        (pid,) = serve.workers()
        rest: dict[str, float] = {}
        await asyncio.sleep(2)
        with bench.counted(rest, REST_S):
            await asyncio.sleep(REST_S)
        await ask(serve.port, 200)
        small, size = cpu_us(pid), size_of(pid)
        streams = asyncio.create_task(ask(serve.port, STREAMS, at_once=STREAMS, stream=True))
        await asyncio.sleep(2)
        began, during = cpu_us(pid), size_of(pid)
        (holdings,) = bench.client.scan_iter("balancer:{default}:holdings:*")
        held = bench.bytes_of(holdings)
        events: dict[str, float] = {}
        with bench.counted(events, 3.0):
            await asyncio.sleep(3)
        per_event = (cpu_us(pid) - began) / (STREAMS * EVENTS_PER_S * 3)
        await streams
    assert size is not None
    assert during is not None
    return [
        ("bytes a second to Redis and from it, at rest", f"{rest['in']:.0f}, {rest['out']:.0f}"),
        ("commands a second, at rest", f"{rest['commands']:.1f}"),
        ("Redis' memory for a request in flight, bytes", f"{held / STREAMS:.0f}"),
        (f"µs of a worker's CPU for an event, {STREAMS} streams of {EVENTS_PER_S}/s", f"{per_event:.0f}"),
        ("bytes a second to Redis meanwhile", f"{events['in']:.0f}"),
        ("open files of the worker, before and with the streams", f"{size.fds}, {during.fds}"),
        ("RSS of the worker, MiB", f"{size.rss_bytes / 2**20:.0f}"),
        ("CPU seconds until then", f"{small / 1e6:.1f}"),
    ]


if __name__ == "__main__":
    asyncio.run(main())
