"""The metrics of a fleet as Prometheus reads them, while its workers are killed, replaced and drained."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import signal
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

import aiohttp
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as text_string_to_open_families
from prometheus_client.parser import text_string_to_metric_families

from balancer.cli.accounts import FakeAccount
from balancer.metrics import BY_NAME
from tests.actors import Upstream, openai_events
from tests.fleet.conftest import Asker, Fleet, Start, a_document, theirs, with_upstream
from tests.store.conftest import eventually

WORKERS = 3
OPEN = "application/openmetrics-text;version=1.0.0"

Series = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def series_of(text: str) -> Series:
    """Every sample by its name and labels."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(series: Series, name: str, **labels: str) -> float:
    """The sum of a series' samples with these labels; NaN for none."""
    found = [v for (n, has), v in series.items() if n == name and labels.items() <= dict(has).items()]
    return sum(found) if found else math.nan


def is_counted(name: str) -> bool:
    """True for what must never fall."""
    family = BY_NAME.get(name)
    if family is None:
        family = BY_NAME[name.removesuffix("_bucket").removesuffix("_count").removesuffix("_sum")]
    return family.type != "gauge"


class Scraper:
    """Reads the metrics of whichever worker answers, and holds each counter against the greatest that any has told."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._highest: Series = {}
        self.scrapes = 0
        self.latest: Series = {}

    async def scrape(self, asker: Asker | None = None) -> Series:
        """All series, by that client's worker, or any on a new connection."""
        if asker is not None:
            status, text = await asker.get("/metrics")
        else:
            connector = aiohttp.TCPConnector(force_close=True)
            async with (
                aiohttp.ClientSession(connector=connector) as session,
                session.get(f"{self._fleet.url}/metrics") as response,
            ):
                status, text = response.status, await response.text()
        assert status == 200
        series = series_of(text)
        gone = [key for key in self._highest if key not in series]
        fallen = {key: (high, series[key]) for key, high in self._highest.items() if series.get(key, high) < high}
        assert (gone, fallen) == ([], {})
        self._highest |= {key: number for key, number in series.items() if is_counted(key[0])}
        self.scrapes += 1
        self.latest = series
        return series

    @contextlib.asynccontextmanager
    async def scraping(self) -> AsyncIterator[None]:
        """Scrapes all the time while the block runs; what a killed worker leaves unanswered is asked again."""
        is_over = False

        async def go_on() -> None:
            while not is_over:
                with contextlib.suppress(aiohttp.ClientError):
                    await self.scrape()
                await asyncio.sleep(0.01)

        task = asyncio.create_task(go_on())
        try:
            yield
        finally:
            is_over = True
            await task


@contextlib.asynccontextmanager
async def load(fleet: Fleet, clients: int = 6) -> AsyncIterator[list[int]]:
    """Clients that ask one request after the other while the block runs; how many were answered."""
    answered, is_over = [0], False

    async def ask() -> None:
        while not is_over:
            with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                async with fleet.asker() as asker:
                    for i in range(10):
                        answered[0] += await asker.is_whole("chat", stream=i % 2 == 0)

    tasks = [asyncio.create_task(ask()) for _ in range(clients)]
    try:
        yield answered
    finally:
        is_over = True
        await asyncio.gather(*tasks)


async def test_no_counter_falls_and_no_dead_worker_s_state_stays_while_workers_are_killed_and_replaced(
    start: Start, accounts: list[FakeAccount], store_url: str
) -> None:
    """Open requests of a worker that was killed stayed in the sum for as long as its supervisor ran."""
    gate, upstream = asyncio.Event(), Upstream()
    upstream.streams(openai_events(3, (11, 7)), gates={1: gate})
    async with upstream.running():
        document = with_upstream(a_document(accounts), upstream.url)
        fleet = await start("--redis", store_url, document=document, workers=WORKERS)
        scraper, killed = Scraper(fleet), 0
        async with scraper.scraping(), load(fleet) as answered:
            for _ in range(2):
                async with fleet.asker() as asker:
                    response = await asker.post("held", stream=True)  # It is open while its worker is killed.
                    assert response.status == 200
                    killed += 1
                    os.kill(asker.pid, signal.SIGKILL)
                    await fleet.logged("a worker was replaced", killed)
                    response.close()
                more = answered[0] + 30

                async def goes_on(more: int = more) -> bool:
                    return answered[0] >= more

                await eventually(goes_on)
        assert scraper.scrapes > 20

        async def is_settled() -> bool:
            series = await scraper.scrape()
            names = ("balancer_workers", "balancer_ready_workers", "balancer_open_requests", "balancer_outbox_entries")
            return [value(series, name) for name in names] == [WORKERS, WORKERS, 0, 0]

        await eventually(is_settled)
        series = scraper.latest
        assert value(series, "balancer_config_revision") == 1
        assert value(series, "balancer_store_up", pool="default") == 1
        # What a killed worker had not brought into its files is lost, of 100 ms at most; no more than that.
        asked = sum(requests for requests, *_ in theirs(accounts).values())
        counted = value(series, "balancer_attempts_total", rule="chat")
        assert 0.8 * asked < counted <= asked
        durations = value(series, "balancer_request_duration_seconds_count")
        assert abs(durations - value(series, "balancer_requests_total")) < 0.2 * asked, "it may die between the two"
        gate.set()


async def test_a_worker_that_drains_is_not_ready_and_its_open_requests_are_told_until_their_end(
    start: Start, accounts: list[FakeAccount], store_url: str
) -> None:
    gate, upstream = asyncio.Event(), Upstream()
    upstream.streams(openai_events(3, (11, 7)), gates={1: gate})
    async with upstream.running():
        document = with_upstream(a_document(accounts), upstream.url)
        fleet = await start("--redis", store_url, document=document, workers=WORKERS)
        scraper = Scraper(fleet)
        names = ("balancer_workers", "balancer_ready_workers", "balancer_open_requests")

        async with fleet.askers() as askers:
            (asker,), (other,), _ = askers.values()

            async def tells(*expected: float) -> None:
                async def is_told() -> bool:
                    series = await scraper.scrape(other)
                    return tuple(value(series, name) for name in names) == expected

                await eventually(is_told)

            response = await asker.post("held", stream=True)
            assert b"w0" in await response.content.readline()
            await tells(WORKERS, WORKERS, 1)
            os.kill(asker.pid, signal.SIGTERM)
            await tells(WORKERS, WORKERS - 1, 1)
            gate.set()
            assert b"[DONE]" in await response.read()
            await fleet.logged("a worker was replaced")
            await tells(WORKERS, WORKERS, 0)


async def test_every_pod_tells_the_fleet_s_gauges_alike_and_counts_for_itself(
    start: Start, accounts: list[FakeAccount], store_url: str
) -> None:
    document = a_document(accounts)
    document["providers"][0] |= {"limits": {"rpm": 1000}, "price": {"input": 3}}
    pods = [await start("--redis", store_url, document=document, workers=2) for _ in range(2)]
    scrapers = [Scraper(pod) for pod in pods]
    for pod in pods:
        async with pod.askers() as askers:
            for (asker,) in askers.values():
                for _ in range(5):
                    assert await asker.is_whole("chat")

    def of(series: Series, *sources: str) -> Series:
        return {
            key: number
            for key, number in series.items()
            if not key[0].endswith(("_bucket", "_count", "_sum")) and BY_NAME[key[0]].source in sources
        }

    async def are_alike() -> bool:
        one, other = [of(await scraper.scrape(), "fleet", "configuration") for scraper in scrapers]
        return one == other and value(one, "balancer_live_workers", pool="default") == 4

    await eventually(are_alike)
    series = scrapers[0].latest
    assert value(series, "balancer_window_requests", pool="default") == 20
    assert value(series, "balancer_expected_share", rule="chat") == 1
    assert value(series, "balancer_limit", kind="rpm") == 1000
    assert 0 < value(series, "balancer_limit_used", kind="rpm") < 20

    async def are_counted() -> bool:
        return [value(await scraper.scrape(), "balancer_requests_total") for scraper in scrapers] == [10, 10]

    await eventually(are_counted)


async def test_exemplars_of_all_workers_are_told_by_each(
    start: Start, accounts: list[FakeAccount], store_url: str
) -> None:
    fleet = await start("--redis", store_url, document=a_document(accounts), workers=2)
    decisions: list[str] = []
    async with fleet.askers() as askers:
        for (asker,) in askers.values():
            async with asker.post("chat") as response:
                decisions.append(response.headers["x-balancer-decision"])

        async def told_by(asker: Asker) -> set[str]:
            async with asker.session.get(f"{fleet.url}/metrics", headers={"Accept": OPEN}) as response:
                assert response.content_type == "application/openmetrics-text"
                text = await response.text()
            families: Iterable[Metric] = text_string_to_open_families(text)  # type: ignore[no-untyped-call]
            samples = [sample for family in families for sample in family.samples]
            return {sample.exemplar.labels["decision"] for sample in samples if sample.exemplar}

        async def all_tell() -> bool:
            found = [await told_by(asker) for (asker,) in askers.values()]
            return all(decisions[-1] in each and each <= set(decisions) for each in found)

        await eventually(all_tell)


async def test_a_killed_supervisor_s_metrics_are_removed_by_the_next(
    start: Start, accounts: list[FakeAccount], store_url: str, tmp_path: Path
) -> None:
    temporary = tmp_path / "t"
    temporary.mkdir()
    variables = {"TMPDIR": str(temporary)}
    killed = await start("--redis", store_url, document=a_document(accounts), workers=1, variables=variables)
    (left,) = temporary.glob("balancer-metrics-*")
    killed.process.kill()
    await killed.ended()
    assert left.exists()
    fleet = await start("--redis", store_url, workers=1, variables=variables)
    assert not left.exists()
    await fleet.stopped()
    assert list(temporary.iterdir()) == []
