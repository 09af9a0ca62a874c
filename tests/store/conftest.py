"""Real servers for the store's tests, in every topology that we promise to work on."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import msgspec
import pytest
import redis
import redis.asyncio

from balancer.store import keys
from tests import servers, topologies

_TARGETS = (*servers.KINDS, "tls-acl", "sentinel", "cluster")
_MATRIX = [
    pytest.param(
        (target, protocol),
        id=f"{target}-resp{protocol}",
        marks=[pytest.mark.needs("apt:redis-server")] if target in ("redis-7", "tls-acl") else [],
    )
    for target in _TARGETS
    for protocol in (2, 3)
]
_SERVERS = [
    pytest.param((kind, None), id=kind, marks=[pytest.mark.needs("apt:redis-server")] if kind == "redis-7" else [])
    for kind in servers.KINDS
]
_PLACES = {
    # What a worker does all the time runs everywhere. All else runs on each kind of server; two do not depend on it.
    **dict.fromkeys(
        ("test_auditor", "test_grants", "test_holds", "test_link", "test_pool", "test_recall", "test_topology"), _MATRIX
    ),
    **dict.fromkeys(("test_keeper", "test_outage", "test_reservation", "test_spill"), _SERVERS[:1]),
}
_IN_MATRIX = re.compile(rf"(.*)\[((?:{'|'.join(_TARGETS)})-resp[23])\b.*\]")


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """What a test may need of a topology: the URL that Balancer gets, and the masters' for whoever may do anything."""

    url: str
    masters: Callable[[], list[str]]
    master_of: Callable[[str], str]


@pytest.fixture(scope="session")
def group() -> Iterator[Callable[[str], Any]]:
    """Gives the sentinel set, the Cluster, or the server with TLS; started once, when first asked for."""
    with contextlib.ExitStack() as stack:
        started: dict[str, Any] = {}

        def get(name: str) -> Any:
            if name not in started:
                started[name] = stack.enter_context(topologies.named(name))
            return started[name]

        yield get


@pytest.fixture(scope="session")
def target(group: Callable[[str], Any]) -> Iterator[Callable[[str], Target]]:
    """Gives a topology of the matrix by its name."""
    with contextlib.ExitStack() as stack:
        started: dict[str, str] = {}

        def get(name: str) -> Target:
            if name in servers.KINDS:
                if name not in started:
                    started[name] = stack.enter_context(servers.running(name))
                url = started[name]
                return Target(url=url, masters=lambda: [url], master_of=lambda _: url)
            found = group(name)
            if name == "tls-acl":
                return Target(
                    url=found.url, masters=lambda: [found.admin_url], master_of=lambda _: str(found.admin_url)
                )
            return Target(
                url=found.url,
                masters=lambda: [f"redis://{server.address}" for server in found.masters()],
                master_of=lambda key: f"redis://{found.master_of(key).address}",
            )

        yield get


@contextlib.contextmanager
def emptied(found: Target, protocol: int | None = None) -> Iterator[Target]:
    """The topology without a key, spoken to in that protocol if one is given; in the end its keys must expire."""
    for master in found.masters():
        with redis.Redis.from_url(master) as client:
            client.flushall()
    mark = "&" if "?" in found.url else "?"
    yield msgspec.structs.replace(found, url=f"{found.url}{mark}protocol={protocol}") if protocol else found
    immortal: list[bytes] = []
    for master in found.masters():
        with redis.Redis.from_url(master) as client:
            immortal += [
                k for k in client.scan_iter("*") if client.pttl(k) < 0 and not k.startswith(b"balancer:{registry}:")
            ]
    assert not immortal, f"keys without an expiry: {immortal}"


@pytest.fixture
def topology_target(request: pytest.FixtureRequest, target: Callable[[str], Target]) -> Iterator[Target]:
    """An empty topology of every kind in turn that the module is run on: see `_PLACES`."""
    name, protocol = request.param
    with emptied(target(name), protocol) as found:
        yield found


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run each test on the topologies of its module."""
    if "topology_target" in metafunc.fixturenames:
        places = _PLACES.get(metafunc.module.__name__.rpartition(".")[2], _SERVERS)
        metafunc.parametrize("topology_target", places, indirect=True)


@pytest.fixture
def url(topology_target: Target) -> str:
    """The URL of an empty topology, of every kind in turn."""
    return topology_target.url


@pytest.fixture
async def control(topology_target: Target) -> AsyncIterator[Any]:
    """A client of its own at the master of the pool `default`, to look at it and to disturb it."""
    async with redis.asyncio.Redis.from_url(topology_target.master_of(keys.partitions("default"))) as client:
        yield client


async def eventually(holds: Callable[[], Awaitable[bool]], timeout_s: float = 10) -> None:
    """Returns as soon as the condition holds; fails after the time."""
    async with asyncio.timeout(timeout_s):
        while not await holds():  # noqa: ASYNC110  what it asks is elsewhere: in Redis, in another process
            await asyncio.sleep(0.01)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many tests ran on how many topologies."""
    tests: set[str] = set()
    places: set[str] = set()
    passed = 0
    for report in terminalreporter.stats.get("passed", []):
        if report.when == "call" and (match := _IN_MATRIX.fullmatch(report.nodeid)):
            tests.add(match[1])
            places.add(match[2])
            passed += 1
    if passed:
        terminalreporter.write_line(
            f"store: {len(tests)} tests × {len(places)} topologies = {passed} passed ({', '.join(sorted(places))})"
        )
