"""Health probes over a real server: one prober in the fleet, and what its answers do to breakers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from balancer.domain import Entry, Health, Outcome, Provider, ProviderDefinition, Rule, Service, Timeouts
from balancer.errors import ConfigurationError
from balancer.store import keys
from balancer.store.pool import PoolClient, PoolEvents
from balancer.store.prober import Probed, Prober, plans
from balancer.store.topology import Topology
from balancer.store.views import BreakerView, ServiceView
from tests.builders import a_configuration, a_provider, a_rule, a_service
from tests.store.conftest import eventually
from tests.store.test_balance import Start, are_ready
from tests.store.test_pool import a_definition, a_selection

HEALTH = Health(path="/health", interval_s=0.03)


class Doctor:
    """Answers probes as told; `asked` has whom it was asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.answer: bool | Exception = True
        self.hangs = False

    async def __call__(self, provider: Provider) -> bool:
        self.asked.append(provider.uuid)
        if self.hangs:
            await asyncio.Event().wait()
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    async def is_asked_again(self) -> None:
        """Returns once an answer given from now on has been noted."""
        asked = len(self.asked)

        async def twice_more() -> bool:
            return len(self.asked) >= asked + 2

        await eventually(twice_more)


@pytest.fixture(autouse=True)
def _hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who asks is looked up often, so that a worker that should not ask has had every occasion to."""
    for name in ("_TICK_S", "_CLAIM_S"):
        monkeypatch.setattr(f"balancer.store.prober.{name}", 0.01)


def a_watched_provider(uuid: str = "a", **more: Any) -> Provider:
    return a_provider(uuid, **{"health": HEALTH} | more)


WATCHED = Probed(provider=a_watched_provider(), services=("a:m", "a:n"))


class Worker:
    """A pool as a worker has it, and its prober."""

    def __init__(self, url: str, name: str) -> None:
        self.name = name
        self.doctor = Doctor()
        self.plan: list[Probed] = [WATCHED]
        self.pool = PoolClient(
            Topology(url), "default", name, deadline_ms=5000, lease_ms=30_000, scripts_dir="", events=PoolEvents()
        )
        self._prober = Prober(self.pool, name, lambda: self.plan, self.doctor)
        self._running: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self.pool.start()
        await self.pool.wait_until_up(5)

    def probe(self) -> None:
        """Begins."""
        self._running = asyncio.create_task(self._prober.run())

    async def close(self) -> None:
        if self._running:
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)
        await self.pool.close(timeout_s=0.5)

    async def breaker(self, service: str = "a:m") -> BreakerView:
        return (await self.pool.view()).services.get(service, ServiceView()).breaker


Join = Callable[[str], Awaitable[Worker]]


@pytest.fixture
async def join(url: str) -> AsyncIterator[Join]:
    """Makes workers; the first defines the rule, whose provider `a` breaks after two failures."""
    workers: list[Worker] = []

    async def make(name: str) -> Worker:
        worker = Worker(url, name)
        await worker.start()
        if not workers:
            provider = ProviderDefinition(id="a", failures=2, ratio_permille=0, open_ms=10, successes=2)
            await worker.pool.raise_fence([a_definition(providers=(provider,))])
        workers.append(worker)
        return worker

    yield make
    await asyncio.gather(*(worker.close() for worker in workers))


def test_asked_are_providers_with_an_interval_for_what_they_serve_in_the_pool() -> None:
    rules = (
        a_rule("x", ("a:m", "b:m", "off:m", a_service("a:n", active=False), "quiet:m")),
        a_rule("y", ("a:m", "a:o")),
        a_rule("z", ("a:p",), active=False),
        a_rule("eu", ("a:q",), pool="eu"),
    )
    watched = [a_watched_provider(uuid) for uuid in ("a", "b")]
    others = [a_watched_provider("off", enabled=False), a_provider("quiet"), a_watched_provider("unused")]
    configuration = a_configuration(*rules, providers=(*watched, *others))
    assert plans(configuration) == {
        "default": [
            Probed(provider=watched[0], services=("a:m", "a:o")),
            Probed(provider=watched[1], services=("b:m",)),
        ],
        "eu": [Probed(provider=watched[0], services=("a:q",))],
    }


async def test_the_breakers_of_a_provider_that_is_dead_open_and_those_of_others_do_not(join: Join) -> None:
    worker = await join("w")
    worker.doctor.answer = False
    worker.probe()

    async def are_open() -> bool:
        return all([(await worker.breaker(service)).opens for service in WATCHED.services])

    await eventually(are_open)
    assert set(worker.doctor.asked) == {"a"}
    assert await worker.breaker("b:m") == BreakerView()


async def test_signs_of_life_close_a_breaker_without_a_request(join: Join) -> None:
    worker = await join("w")
    for number in (1, 3):
        services = [(await worker.pool.select(a_selection(number + i)))[1] for i in range(2)]
        worker.pool.settle(Entry(number=number + services.index("a:m"), service="a:m", outcome=Outcome.FAILED))
        assert await worker.pool.acknowledged(5)
    assert (await worker.breaker()).state == 1
    picks = (await worker.pool.view()).services["a:m"].picks
    worker.probe()

    async def is_closed() -> bool:
        return (await worker.breaker()).state == 0

    await eventually(is_closed)
    assert (await worker.pool.view()).services["a:m"].picks == picks


async def test_a_provider_that_does_not_answer_in_time_is_dead(join: Join) -> None:
    worker = await join("w")
    worker.doctor.hangs = True
    hurried = a_watched_provider(timeouts=Timeouts(headers_s=0.01))
    worker.plan = [Probed(provider=hurried, services=("a:m",))]
    worker.probe()

    async def is_open() -> bool:
        return (await worker.breaker()).opens > 0

    await eventually(is_open)


async def test_what_cannot_be_asked_is_not_called_dead(join: Join) -> None:
    worker = await join("w")
    worker.probe()
    for wrong in (ConfigurationError("no such secret"), ZeroDivisionError()):
        worker.doctor.answer = wrong
        await worker.doctor.is_asked_again()
        await worker.doctor.is_asked_again()
    assert (await worker.breaker()).consecutive == 0


async def test_one_worker_of_the_fleet_asks_and_another_goes_on_for_it(join: Join, control: Any) -> None:
    first, *others = [await join(name) for name in ("w1", "w2", "w3")]
    first.probe()
    await first.doctor.is_asked_again()
    for other in others:
        other.probe()
    for _ in range(5):
        await first.doctor.is_asked_again()
    assert [bool(other.doctor.asked) for other in others] == [False, False]
    assert await control.get(keys.prober("default")) == b"w1"
    assert 0 < await control.pttl(keys.prober("default")) <= 10_000
    await first.close()
    await control.delete(keys.prober("default"))  # As its expiry would.

    async def has_a_successor() -> bool:
        return any(other.doctor.asked for other in others)

    await eventually(has_a_successor)
    (successor,) = [other for other in others if other.doctor.asked]
    assert await control.get(keys.prober("default")) == successor.name.encode()


async def test_a_provider_that_is_to_be_left_alone_is_asked_no_more(join: Join) -> None:
    worker = await join("w")
    worker.probe()
    await worker.doctor.is_asked_again()
    other = a_watched_provider("b")
    worker.plan = [Probed(provider=other, services=("b:m",))]
    await worker.doctor.is_asked_again()
    await worker.doctor.is_asked_again()
    assert set(worker.doctor.asked[-2:]) == {"b"}


@pytest.fixture
async def start(url: str) -> AsyncIterator[Start]:
    start = Start(url)
    yield start
    await start.close()


async def test_a_worker_asks_for_what_is_configured_now(start: Start) -> None:
    doctor = Doctor()
    watched = a_provider("a", health=Health(path="/health", interval_s=1))
    rule = a_rule()
    await start.publish(a_configuration(rule, providers=(a_provider("a"), a_provider("b"))))
    worker = await start(probe=doctor)
    await eventually(lambda: are_ready(worker))
    assert doctor.asked == []
    configuration = a_configuration(rule, providers=(watched, a_provider("b")))
    await worker.registry.publish(configuration, worker.directory.snapshot)

    async def is_asked() -> bool:
        return bool(doctor.asked)

    await eventually(is_asked)
    assert set(doctor.asked) == {"a"}


async def test_who_is_to_be_asked_is_looked_up_once_for_a_configuration(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All rules were walked for each pool every second, on the loop of every worker."""
    walked: list[str] = []
    active_services = Rule.active_services

    def counting(rule: Rule) -> tuple[Service, ...]:
        walked.append(rule.uuid)
        return active_services(rule)

    doctor = Doctor()
    rules = [a_rule(f"r{i}") for i in range(3)]
    watched = a_provider("a", health=Health(path="/health", interval_s=1))
    await start.publish(a_configuration(*rules, providers=(watched, a_provider("b"))))
    monkeypatch.setattr(Rule, "active_services", counting)
    await start(probe=doctor)

    async def is_asked_twice() -> bool:
        return len(doctor.asked) > 1

    await eventually(is_asked_twice)
    assert sorted(walked) == [rule.uuid for rule in rules]


async def test_where_nobody_is_to_be_asked_nothing_runs(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    running: list[Prober] = []

    async def run(prober: Prober) -> None:
        running.append(prober)

    monkeypatch.setattr(Prober, "run", run)
    configuration = a_configuration(a_rule(), providers=(a_provider("a"), a_provider("b")))
    await start.publish(configuration)
    worker = await start(probe=Doctor())
    await eventually(lambda: are_ready(worker))
    assert running == []
