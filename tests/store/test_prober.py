"""Health probes over a real server: one prober in the fleet, and what its answers do to breakers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from balancer.domain import BreakerSettings, Health, Outcome, Provider, Timeouts
from balancer.errors import ConfigurationError
from balancer.store import keys
from balancer.store.balance import Balance
from balancer.store.prober import Probed, probed
from tests.store.conftest import eventually
from tests.store.test_balance import Start, are_ready, pick, settled, started, the_rule
from tests.store.test_registry import a_configuration, a_provider, a_rule, a_service

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


@pytest.fixture
async def start(url: str) -> AsyncIterator[Start]:
    start = Start(url)
    yield start
    await start.close()


def a_watched_provider(uuid: str = "a", **more: Any) -> Provider:
    breaker = BreakerSettings(failures=2, ratio=0, open_s=0.01, successes=2)
    return a_provider(uuid, **{"health": HEALTH, "breaker": breaker} | more)


async def a_worker(start: Start, doctor: Doctor, *providers: Provider, **rule: Any) -> Balance:
    services = {"services": ("a:m", "a:n", "b:m")} | rule
    made = providers or (a_watched_provider(), a_provider("b"))
    (worker,) = await started(start, a_configuration(a_rule(**services), providers=made))
    probing = await start(probe=doctor)
    assert worker.worker != probing.worker
    return probing


async def breaker(worker: Balance, service: str = "a:m") -> Any:
    (view,) = await worker.views()
    return view.services[service].breaker if service in view.services else None


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
    assert probed(configuration, "default") == [
        Probed(provider=watched[0], services=("a:m", "a:o")),
        Probed(provider=watched[1], services=("b:m",)),
    ]
    assert probed(configuration, "eu") == [Probed(provider=watched[0], services=("a:q",))]


async def test_a_provider_that_is_dead_is_picked_no_more_and_alive_again_it_is(start: Start) -> None:
    doctor = Doctor()
    doctor.answer = False
    worker = await a_worker(
        start, doctor, a_watched_provider(breaker=BreakerSettings(failures=2, open_s=60)), a_provider("b")
    )

    async def are_open() -> bool:
        found = [await breaker(worker, service) for service in ("a:m", "a:n")]
        return all(each and each.state == 1 for each in found)

    await eventually(are_open)
    assert set(doctor.asked) == {"a"}
    assert {(await pick(worker)).service for _ in range(10)} == {"b:m"}


async def test_signs_of_life_close_a_breaker_without_a_request(start: Start) -> None:
    doctor = Doctor()
    worker = await a_worker(start, doctor)
    for _ in range(2):
        worker.settle(await pick(worker), Outcome.FAILED, None)
    assert await settled(worker)

    async def is_closed() -> bool:
        found = await breaker(worker)
        return bool(found.state == 0)

    await eventually(is_closed)
    (view,) = await worker.views()
    assert (view.services["a:m"].picks, view.breaker_state("a:m")) == (2, "closed")


async def test_a_provider_that_does_not_answer_in_time_is_dead(start: Start) -> None:
    doctor = Doctor()
    doctor.hangs = True
    provider = a_watched_provider(timeouts=Timeouts(headers_s=0.01))
    worker = await a_worker(start, doctor, provider, a_provider("b"))

    async def is_open() -> bool:
        found = await breaker(worker)
        return bool(found and found.opens)

    await eventually(is_open)


async def test_what_cannot_be_asked_is_not_called_dead(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    doctor = Doctor()
    worker = await a_worker(start, doctor)
    for wrong in (ConfigurationError("no such secret"), ZeroDivisionError()):
        doctor.answer = wrong
        await doctor.is_asked_again()
        await doctor.is_asked_again()
    found = await breaker(worker)
    assert found is None or (found.state, found.consecutive) == (0, 0)


async def test_one_worker_of_the_fleet_asks_and_another_goes_on_for_it(start: Start, control: Any) -> None:
    doctors = [Doctor() for _ in range(3)]
    first = await a_worker(start, doctors[0])
    await doctors[0].is_asked_again()
    others = [await start(probe=doctor) for doctor in doctors[1:]]
    await eventually(lambda: are_ready(*others))
    for _ in range(5):
        await doctors[0].is_asked_again()
    assert [bool(doctor.asked) for doctor in doctors] == [True, False, False]
    assert await control.get(keys.prober("default")) == first.worker.encode()
    assert 0 < await control.pttl(keys.prober("default")) <= 10_000
    await first.close(timeout_s=1)
    await control.delete(keys.prober("default"))  # As its expiry would.

    async def has_a_successor() -> bool:
        return any(doctor.asked for doctor in doctors[1:])

    await eventually(has_a_successor)
    assert [bool(doctor.asked) for doctor in doctors[1:]].count(True) == 1
    assert await control.get(keys.prober("default")) in {other.worker.encode() for other in others}


async def test_a_provider_that_is_to_be_left_alone_is_asked_no_more(start: Start) -> None:
    doctor = Doctor()
    worker = await a_worker(start, doctor)
    await doctor.is_asked_again()
    configuration = worker.directory.configuration
    quiet = tuple(a_provider(p.uuid) for p in configuration.providers)
    await worker.registry.publish(a_configuration(*configuration.rules, providers=quiet), worker.directory.snapshot)
    await worker.refresh()
    while probed(worker.directory.configuration, "default"):
        await worker.refresh()
    asked = len(doctor.asked)
    for _ in range(10):
        await pick(worker, the_rule(worker))
        await asyncio.sleep(HEALTH.interval_s)
    assert len(doctor.asked) <= asked + 1
