"""A real Prometheus for tests: its own folder, a free port of loopback, ended with the block; and what to ask it.

    async with prometheus.running(scraping({"balancer-0": "127.0.0.1:9464"})) as server:
        rate = await server.query("rate(balancer_requests_total[10s])")

It scrapes four times a second, the first time five seconds after its start, and forgets everything at its end.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import tempfile
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import yaml

from tests import needs

INTERVAL_S = 0.25
_PATIENCE_S = 20.0


class Series(msgspec.Struct, frozen=True, kw_only=True):
    """A series of an answer: its labels, and its values with their times, one for an instant."""

    labels: dict[str, str]
    points: tuple[tuple[float, float], ...]

    @property
    def last(self) -> float:
        """The newest value."""
        return self.points[-1][1]

    @property
    def values(self) -> list[float]:
        """The values that are numbers."""
        return [value for _, value in self.points if not math.isnan(value)]


class QueryError(Exception):
    """Prometheus refused a question; the message is its own, and the question."""


def scraping(
    targets: Mapping[str, str],
    *,
    namespace: str = "llm",
    job: str = "balancer",
    interval_s: float = INTERVAL_S,
    rule_files: Sequence[Path] = (),
) -> dict[str, Any]:
    """A configuration that scrapes targets (`host:port` by the pod's name) and gives them the labels Kubernetes has.

    The names stand in `__meta_kubernetes_…`, as service discovery has them, and are relabelled as a ServiceMonitor
    does: to `namespace`, `pod` and `job`.
    """
    interval = f"{round(interval_s * 1000)}ms"
    return {
        "global": {"scrape_interval": interval, "evaluation_interval": interval, "scrape_timeout": interval},
        "rule_files": [str(file) for file in rule_files],
        "scrape_configs": [
            {
                "job_name": job,
                "static_configs": [
                    {
                        "targets": [address],
                        "labels": {"__meta_kubernetes_namespace": namespace, "__meta_kubernetes_pod_name": pod},
                    }
                    for pod, address in targets.items()
                ],
                "relabel_configs": [
                    {"source_labels": ["__meta_kubernetes_namespace"], "target_label": "namespace"},
                    {"source_labels": ["__meta_kubernetes_pod_name"], "target_label": "pod"},
                ],
            }
        ],
    }


class Prometheus:
    """A running server. Times are seconds since the epoch; without one a question is about now."""

    def __init__(self, url: str, process: asyncio.subprocess.Process, session: aiohttp.ClientSession) -> None:
        self.url = url
        self.process = process
        self._session = session

    async def ask(self, path: str, **parameters: Any) -> Any:
        """The `data` of an answer of /api/v1; an error says what Prometheus said."""
        async with self._session.get(f"{self.url}/api/v1/{path}", params=parameters) as response:
            answer = await response.json()
        if answer["status"] != "success":
            raise QueryError(f"{answer['error']}: {parameters}")
        return answer["data"]

    async def query(self, expression: str, at: float | None = None) -> list[Series]:
        """The value of an expression at one time; a scalar is a series without labels."""
        found = await self.ask("query", query=expression, time=time.time() if at is None else at)
        if found["resultType"] == "scalar":
            return [_series({"values": [found["result"]]})]
        return [_series(one) for one in found["result"]]

    async def query_range(self, expression: str, start: float, end: float, step_s: float = 1.0) -> list[Series]:
        """The values of an expression from one time to another."""
        found = await self.ask("query_range", query=expression, start=start, end=end, step=step_s)
        return [_series(one) for one in found["result"]]

    async def value(self, expression: str) -> float | None:
        """The one value of an expression now; None if there is none."""
        found = await self.query(expression)
        assert len(found) <= 1, f"{len(found)} series, not one: {expression}"
        return found[0].last if found else None

    async def label_values(self, label: str, *selectors: str) -> list[str]:
        """The values of a label, among the series of those selectors."""
        return list(await self.ask(f"label/{label}/values", **{"match[]": list(selectors)} if selectors else {}))

    async def exemplars(self, expression: str, start: float, end: float) -> list[dict[str, Any]]:
        """The exemplars of an expression's series: each with its `labels`, `value` and `timestamp`."""
        found = await self.ask("query_exemplars", query=expression, start=start, end=end)
        return [exemplar for series in found for exemplar in series["exemplars"]]

    async def metadata(self) -> dict[str, str]:
        """The type of every metric that was scraped."""
        return {name: entries[0]["type"] for name, entries in (await self.ask("metadata")).items()}

    async def rules(self) -> list[dict[str, Any]]:
        """The rules of all groups, as they stand: `name`, `health`, `state` and `alerts` of alerting ones."""
        return [rule for group in (await self.ask("rules"))["groups"] for rule in group["rules"]]

    async def alerts(self) -> dict[str, str]:
        """The state, `pending` or `firing`, of every alert that is either; `firing` where it has several."""
        states: dict[str, str] = {}
        for alert in (await self.ask("alerts"))["alerts"]:
            name = alert["labels"]["alertname"]
            states[name] = "firing" if "firing" in (states.get(name), alert["state"]) else "pending"
        return states

    async def targets(self) -> dict[str, str]:
        """The health (`up`, `down`, `unknown`) of every target, by pod."""
        active = (await self.ask("targets", state="active"))["activeTargets"]
        return {target["labels"].get("pod", target["scrapeUrl"]): target["health"] for target in active}

    async def until_scraped(self, timeout_s: float = _PATIENCE_S) -> None:
        """Returns once every target has answered a scrape."""
        async with asyncio.timeout(timeout_s):
            while True:
                health = (await self.targets()).values()
                if health and set(health) == {"up"}:
                    return
                await asyncio.sleep(0.05)

    async def until(self, expression: str, timeout_s: float = _PATIENCE_S) -> list[Series]:
        """The answer of an expression, a comparison as alerts have it, as soon as it has one."""
        deadline = time.monotonic() + timeout_s
        while not (found := await self.query(expression)):
            assert time.monotonic() < deadline, f"never true: {expression}"
            await asyncio.sleep(0.05)
        return found


@contextlib.asynccontextmanager
async def running(configuration: Mapping[str, Any], *arguments: str) -> AsyncIterator[Prometheus]:
    """A server with that configuration (see `scraping`), once it is ready. Exemplars are kept."""
    program = needs.program("apt:prometheus")
    assert program, "prometheus is not installed"
    with tempfile.TemporaryDirectory(prefix="b-") as name:
        folder = Path(name)
        (folder / "prometheus.yml").write_text(yaml.safe_dump(dict(configuration)), encoding="utf-8")
        log = folder / "log"
        with log.open("wb") as stderr:
            process = await asyncio.create_subprocess_exec(
                *(program, f"--config.file={folder / 'prometheus.yml'}"),
                *(f"--storage.tsdb.path={folder / 'data'}", "--web.listen-address=127.0.0.1:0"),
                *("--log.format=json", "--enable-feature=exemplar-storage"),
                # Not five seconds more until it scrapes what it has discovered.
                *("--scrape.discovery-reload-interval=100ms", *arguments),
                cwd=folder,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=stderr,
                stderr=stderr,
            )
        try:
            url = await _ready_url(process, log)
            async with aiohttp.ClientSession() as session:
                yield Prometheus(url, process, session)
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()


async def _ready_url(process: asyncio.subprocess.Process, log: Path) -> str:
    """Where it listens, once its log says that it is ready."""
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        entries = _entries(log)
        if any("ready to receive" in entry.get("msg", "") for entry in entries):
            (address,) = (entry["address"] for entry in entries if entry.get("msg") == "Listening on")
            return f"http://{address}"
        assert process.returncode is None, f"prometheus ended at once: {entries[-3:]}"
        assert time.monotonic() < deadline, f"prometheus is not ready: {entries[-3:]}"
        await asyncio.sleep(0.02)


def _entries(log: Path) -> list[dict[str, Any]]:
    """What it has logged so far; a line that is being written is left out."""
    entries = []
    for line in log.read_bytes().splitlines():
        with contextlib.suppress(msgspec.DecodeError):
            entries.append(msgspec.json.decode(line, type=dict[str, Any]))
    return entries


def _series(answer: Mapping[str, Any]) -> Series:
    points = answer["values"] if "values" in answer else [answer["value"]]
    return Series(labels=answer.get("metric", {}), points=tuple((float(at), float(value)) for at, value in points))
