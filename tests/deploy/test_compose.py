"""deploy/compose.yaml and what it mounts: held against each other, and run by hand on loopback."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml

from balancer import config
from balancer.cli import serve
from balancer.cli.accounts import FakeAccount
from balancer.cli.configuration import read_file
from tests.deploy.front import Nginx
from tests.fleet.conftest import LAST_WORDS, PATHS, a_document
from tests.store.conftest import eventually
from tests.topologies import Server, free_ports

DEPLOY = Path(__file__).resolve().parent.parent.parent / "deploy"
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
SERVICES: dict[str, Any] = COMPOSE["services"]
WORKERS = [name for name in SERVICES if name.startswith("worker-")]
SCRAPES: dict[str, Any] = yaml.safe_load((DEPLOY / "prometheus.yml").read_text(encoding="utf-8"))
VARIABLE = re.compile(r"\$\{(\w+):\?([^}]+)\}")
EXAMPLE = dict(
    line.split("=", 1)
    for line in (DEPLOY / "env.example").read_text(encoding="utf-8").splitlines()
    if line and not line.startswith("#")
)


def seconds(text: str) -> float:
    """A duration of compose's, as far as they are used."""
    assert text.endswith("s")
    return float(text[:-1])


# -- what stands there -------------------------------------------------------------------------------------------------


def test_workers_proxy_and_scrapes_agree_on_where_everything_is() -> None:
    addresses = [SERVICES[name]["networks"]["fleet"]["ipv4_address"] for name in WORKERS]
    environment = SERVICES[WORKERS[0]]["environment"]
    nginx = (DEPLOY / "nginx.conf").read_text(encoding="utf-8")
    targets = [entry for scrape in SCRAPES["scrape_configs"] for entry in scrape["static_configs"]]

    assert len(WORKERS) == 3
    assert re.findall(r"^ +server ([\d.:]+)", nginx, re.MULTILINE) == [
        f"{address}:{environment['BALANCER_PORT']}" for address in addresses
    ]
    assert [entry["targets"] for entry in targets] == [
        [f"{name}:{environment['BALANCER_METRICS_PORT']}"] for name in WORKERS
    ]
    assert [entry["labels"]["pod"] for entry in targets] == WORKERS
    assert SERVICES["nginx"]["ports"] == ["127.0.0.1:8080:8080"]
    assert "listen 8080" in nginx
    # The program's own limit: what passes one passes the other.
    assert f"client_max_body_size {config.load({}, {}).max_body_bytes >> 20}m;" in nginx


def test_a_worker_may_take_as_long_to_end_as_it_was_told() -> None:
    for name in WORKERS:
        environment = SERVICES[name]["environment"]
        drain_s = float(environment["BALANCER_DRAIN_DELAY_S"]) + float(environment["BALANCER_DRAIN_TIMEOUT_S"])
        assert seconds(SERVICES[name]["stop_grace_period"]) > drain_s + serve._EXTRA_S
    assert seconds(SERVICES["nginx"]["stop_grace_period"]) >= seconds(SERVICES["worker-1"]["stop_grace_period"])


def test_every_worker_has_an_outbox_of_its_own_and_settings_that_exist() -> None:
    outboxes = [volume for name in WORKERS for volume in SERVICES[name]["volumes"] if volume.startswith("outbox")]
    assert len(set(outboxes)) == len(WORKERS)
    known = {setting.variable for setting in config.SETTINGS}
    for name in WORKERS:
        assert SERVICES[name]["environment"].keys() <= known
        # Its root is read-only: what it writes to is mounted.
        assert SERVICES[name]["read_only"] is True
        assert SERVICES[name]["environment"]["BALANCER_OUTBOX_DIR"].startswith("/var/lib/balancer/")
    assert {volume.split(":")[0] for volume in outboxes} <= COMPOSE["volumes"].keys()


def test_nothing_is_reachable_from_elsewhere_and_no_secret_has_a_default() -> None:
    for service in SERVICES.values():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
        assert not service["image"].endswith(":latest")
    asked_for = set(VARIABLE.findall((DEPLOY / "compose.yaml").read_text(encoding="utf-8")))
    assert {name for name, _ in asked_for} == {"BALANCER_CLIENT_TOKENS", "GRAFANA_PASSWORD"}
    assert set(EXAMPLE.values()) == {""}
    assert {name for name, _ in asked_for} <= EXAMPLE.keys()
    named = set(re.findall(r"\$\{(\w+)\}", (DEPLOY / "balancer.yaml").read_text(encoding="utf-8")))
    assert named <= EXAMPLE.keys()


def test_every_file_that_is_mounted_exists() -> None:
    for service in SERVICES.values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            if source.startswith("."):
                assert (DEPLOY / source).exists(), source
            else:
                assert source in COMPOSE["volumes"]


def test_the_configuration_that_it_starts_with_is_valid() -> None:
    assert len(read_file(str(DEPLOY / "balancer.yaml"), lenient=False).rules) == 2


@pytest.mark.needs("apt:prometheus")
def test_prometheus_reads_its_configuration() -> None:
    checked = subprocess.run(
        ["promtool", "check", "config", "--syntax-only", DEPLOY / "prometheus.yml"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr


# -- run by hand -------------------------------------------------------------------------------------------------------


class Fleet:
    """The workers of the composition as processes."""

    def __init__(self, folder: Path) -> None:
        self.ports = dict(zip(WORKERS, free_ports(len(WORKERS)), strict=True))
        self.metrics_ports = dict(zip(WORKERS, free_ports(len(WORKERS)), strict=True))
        self._folder = folder

    @asynccontextmanager
    async def worker(self, name: str, variables: dict[str, str]) -> AsyncIterator[asyncio.subprocess.Process]:
        """One of them, with the variables that compose would give it; what is the container's is replaced."""
        environment = SERVICES[name]["environment"] | {
            "BALANCER_PORT": str(self.ports[name]),
            "BALANCER_METRICS_PORT": str(self.metrics_ports[name]),
            "BALANCER_OUTBOX_DIR": str(self._folder / name),
            "BALANCER_HOST": "127.0.0.1",
        }
        inherited = {key: os.environ[key] for key in ("PATH", "PYTHONPATH") if key in os.environ}
        with (self._folder / f"{name}.log").open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "balancer", "serve"),
                env=inherited | environment | variables,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        try:
            yield process
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()
            sys.stderr.write((self._folder / f"{name}.log").read_text(encoding="utf-8")[-3000:])

    async def is_ready(self, name: str) -> bool:
        """Whether it can pick."""
        try:
            async with (
                aiohttp.ClientSession() as session,
                session.get(f"http://127.0.0.1:{self.ports[name]}/readyz") as response,
            ):
                return response.status == 200
        except aiohttp.ClientConnectionError:
            return False


async def ask(session: aiohttp.ClientSession, url: str, *, stream: bool) -> tuple[int, str]:
    """Status and text of a request to rule `chat`. A stream that does not come piece by piece fails."""
    body = {"model": "chat", "max_tokens": 40, "stream": stream, "messages": [{"role": "user", "content": "hello"}]}
    async with session.post(url + PATHS["openai"], json=body) as response:
        first = await response.content.readany()
        assert LAST_WORDS["openai"].encode() not in first
        return response.status, (first + await response.read()).decode()


@pytest.mark.needs("apt:nginx")
async def test_its_parts_serve_together_and_a_worker_is_replaced_without_an_error(tmp_path: Path) -> None:
    """The store with compose's arguments, three workers with its variables, nginx with its very configuration."""
    keys = {"anna": "key-of-anna-0123", "boris": "key-of-boris-0123"}
    fleet = Fleet(tmp_path)
    _, *arguments = SERVICES["redis"]["command"]
    async with AsyncExitStack() as stack:
        accounts = [
            await stack.enter_async_context(FakeAccount(name, key, chunk_interval_s=0.05)) for name, key in keys.items()
        ]
        store = Server("valkey-9", tmp_path / "store", *arguments)
        stack.callback(store.kill)
        document = tmp_path / "balancer.yaml"
        document.write_text(yaml.safe_dump(a_document(accounts)), encoding="utf-8")
        variables = keys | {
            "BALANCER_CLIENT_TOKENS": "of-the-team",
            "BALANCER_CONFIG": str(document),
            "BALANCER_REDIS": f"redis://{store.address}/0",
            "BALANCER_DRAIN_DELAY_S": "0.2",
        }
        processes = {name: await stack.enter_async_context(fleet.worker(name, variables)) for name in WORKERS}
        for name in WORKERS:
            await eventually(lambda name=name: fleet.is_ready(name), 30)  # type: ignore[misc]
        nginx = await stack.enter_async_context(Nginx(tmp_path).running(list(fleet.ports.values())))

        async with aiohttp.ClientSession(headers={"Authorization": "Bearer of-the-team"}) as session:
            first = asyncio.gather(*(ask(session, nginx.url, stream=bool(i % 2)) for i in range(12)))
            await asyncio.sleep(0)
            # `docker compose restart worker-1`: nobody tells nginx, which finds the port closed and asks another.
            processes["worker-1"].terminate()
            while processes["worker-1"].returncode is None:
                assert (await ask(session, nginx.url, stream=True))[0] == 200
            assert processes["worker-1"].returncode == 0
            answers = [*await first, *[await ask(session, nginx.url, stream=bool(i % 2)) for i in range(12)]]

            async with session.get(f"http://127.0.0.1:{fleet.metrics_ports['worker-2']}/metrics") as scraped:
                assert "balancer_build_info" in await scraped.text()
            async with session.get(f"{nginx.url}/metrics") as hidden:
                assert hidden.status == 404

    assert [status for status, _ in answers] == [200] * len(answers)
    assert all(LAST_WORDS["openai"] in text for _, text in answers if text.startswith("data:"))
    assert "no live upstreams" not in nginx.log


@pytest.mark.needs("apt:nginx")
async def test_nginx_never_sends_again_what_was_sent_and_goes_on_where_nobody_listens(tmp_path: Path) -> None:
    """A worker that dies with a POST in its hands has perhaps spent tokens on it; one that is not there has not."""
    received: list[bytes] = []

    async def take_and_leave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        received.append(await reader.readuntil(b"\r\n\r\n"))
        writer.close()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        received.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        await writer.drain()
        writer.close()

    async with AsyncExitStack() as stack:
        session = await stack.enter_async_context(aiohttp.ClientSession())
        dying = [await stack.enter_async_context(await listening(take_and_leave)) for _ in range(2)]
        (tmp_path / "dying").mkdir()
        nginx = await stack.enter_async_context(Nginx(tmp_path / "dying").running([port_of(each) for each in dying]))
        async with session.post(f"{nginx.url}/v1/chat/completions", data=b"{}") as response:
            assert response.status == 502
        assert len(received) == 1

        alive = await stack.enter_async_context(await listening(answer))
        (tmp_path / "alive").mkdir()
        ports = [*free_ports(2), port_of(alive)]
        nginx = await stack.enter_async_context(Nginx(tmp_path / "alive").running(ports))
        for _ in range(3):
            async with session.post(f"{nginx.url}/v1/chat/completions", data=b"{}") as response:
                assert response.status == 200
        assert len(received) == 4


async def listening(serves: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]) -> asyncio.Server:
    """A server on a free port."""
    return await asyncio.start_server(serves, "127.0.0.1", 0)


def port_of(server: asyncio.Server) -> int:
    """Its port."""
    port: int = server.sockets[0].getsockname()[1]
    return port
