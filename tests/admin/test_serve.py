"""`balancer serve` with its admin server, as processes."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
import yarl

from tests.admin.conftest import LIVE, RULE, a_document, of
from tests.store.conftest import eventually

PRINTED = re.compile(r"^balancer: the admin server's token for this run: (\S+)$", re.MULTILINE)

Serve = Callable[..., Awaitable["Served"]]


class Served:
    """A supervisor, and what it wrote to stderr."""

    def __init__(self, process: asyncio.subprocess.Process, log: Path) -> None:
        self.process = process
        self.log = log

    def text(self) -> str:
        return self.log.read_text(encoding="utf-8")

    def entry(self, event: str) -> dict[str, Any] | None:
        """The first entry of an event."""
        lines = [line for line in self.text().splitlines() if line.startswith("{")]
        return next((entry for line in lines if (entry := msgspec.json.decode(line))["event"] == event), None)


@pytest.fixture
async def serve(store_url: str, tmp_path: Path) -> AsyncIterator[Serve]:
    """Starts `balancer serve` with two workers; all are ended afterwards."""
    started: list[Served] = []
    environment = {name: value for name, value in os.environ.items() if not name.startswith("BALANCER_")}
    file = tmp_path / "balancer.json"
    file.write_bytes(msgspec.json.encode(a_document()))

    async def start(*arguments: str, **variables: str) -> Served:
        log = tmp_path / f"serve-{len(started)}.log"
        line = ["serve", "--redis", store_url, "--config", str(file), "--port", "0", "--workers", "2", *arguments]
        with log.open("wb") as stderr:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "balancer", *line),
                env=environment | variables,
                stdin=asyncio.subprocess.DEVNULL,
                stderr=stderr,
            )
        served = Served(process, log)
        started.append(served)

        async def is_up() -> bool:
            return process.returncode is not None or served.entry("serving") is not None

        await eventually(is_up, 30)
        return served

    yield start
    for served in started:
        if served.process.returncode is None:
            served.process.terminate()
        assert await asyncio.wait_for(served.process.wait(), 30) in (0, 1), served.text()


async def ask(url: str, token: str, body: Any = None) -> Any:
    """What a new connection is answered."""
    target = yarl.URL(url, encoded=True)
    headers = {"Authorization": f"Bearer {token}", "Connection": "close"}
    method = "POST" if body is not None else "GET"
    async with (
        aiohttp.ClientSession() as session,
        session.request(method, target, json=body, headers=headers) as response,
    ):
        return response.status, await response.json()


async def test_serve_prints_a_token_once_and_every_worker_takes_it(serve: Serve) -> None:
    served = await serve()
    entry = served.entry("serving")
    assert entry is not None
    url, (token,) = entry["admin_url"], PRINTED.findall(served.text())
    assert served.text().count(token) == 1
    status, told = await ask(f"{url}{of(RULE)}/summary", token)
    assert (status, told["summary"]["uuid"]) == (200, RULE)
    settled = []
    for _ in range(12):
        _, pick = await ask(f"{url}/api/v1/pick", token, {"model": "llama"})
        settled.append(await ask(f"{url}/api/v1/settle", token, {"hold": pick["hold"], "outcome": "success"}))
    assert settled == [(200, {"settled": True})] * 12
    _, told = await ask(f"{url}{LIVE}/stats", token)
    assert sum(stats["request_count"] for stats in told["stats"].values()) == 12
    assert (await ask(f"{url}{LIVE}/stats", token[:-1]))[0] == 401


async def test_every_worker_knows_the_tokens_of_a_file_and_none_is_told_or_printed(
    serve: Serve, tmp_path: Path
) -> None:
    file = tmp_path / "tokens"
    file.write_text("# who\nann:viewer:the-token-of-ann-viewer\nbob:operator:the-token-of-bob-operator\n")
    served = await serve(BALANCER_ADMIN_TOKENS_FILE=str(file))
    entry = served.entry("serving")
    assert entry is not None
    clear = f"{entry['admin_url']}{LIVE}/stats/clear"
    for _ in range(8):  # Each a connection of its own, and so over either worker.
        assert (await ask(f"{entry['admin_url']}{LIVE}/stats", "the-token-of-ann-viewer"))[0] == 200
        assert (await ask(clear, "the-token-of-ann-viewer", {}))[0] == 403
        assert (await ask(clear, "the-token-of-bob-operator", {}))[0] == 200
    assert PRINTED.findall(served.text()) == []
    assert "the-token" not in served.text()
    refused = served.entry("refused in the admin server")
    assert refused is not None
    assert (refused["who"], refused["route"]) == ("ann", f"{LIVE}/stats/clear")


async def test_a_second_serve_on_the_same_admin_port_names_the_flag(serve: Serve) -> None:
    first = await serve(BALANCER_ADMIN_TOKEN="given")
    entry = first.entry("serving")
    assert entry is not None
    assert PRINTED.findall(first.text()) == []
    assert "given" not in first.text()
    port = entry["admin_url"].rpartition(":")[2]
    second = await serve("--admin-port", port)
    assert second.process.returncode == 1
    assert second.text().splitlines()[-1] == (
        f"balancer: cannot listen on 127.0.0.1:{port}: Address already in use; "
        "--admin-port names another one for the admin server, 0 starts none"
    )
    assert (await ask(f"{entry['admin_url']}{LIVE}/stats", "given"))[0] == 200


async def test_a_port_that_another_balancer_serves_is_in_use(serve: Serve) -> None:
    """Sockets that workers share were shared with any other process of the user too."""
    entry = (await serve()).entry("serving")
    assert entry is not None
    port = entry["url"].rpartition(":")[2]
    second = await serve("--port", port, "--admin-port", "0")
    assert second.process.returncode == 1
    assert second.text().splitlines()[-1] == f"balancer: cannot listen on 127.0.0.1:{port}: Address already in use"


async def test_without_an_admin_port_there_is_no_admin_server(serve: Serve) -> None:
    served = await serve("--admin-port", "0")
    entry = served.entry("serving")
    assert entry is not None
    assert "admin_url" not in entry
    assert PRINTED.findall(served.text()) == []
    async with aiohttp.ClientSession() as session, session.get(f"{entry['url']}{LIVE}/stats") as response:
        assert response.status == 404
