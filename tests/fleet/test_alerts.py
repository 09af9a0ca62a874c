"""The alerts on a real fleet: a real Prometheus scrapes two pods and evaluates the very rules, on a faster clock."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import aiohttp
import pytest

from balancer.store import keys
from tests import prometheus
from tests import stored as by_hand
from tests.alerts.test_rules import RULES
from tests.fleet.account_log import Account
from tests.fleet.conftest import Fleet, Start
from tests.fleet.pairs import MESSAGES, PATIENT, provider, rule, running, service
from tests.topologies import Server

FASTER = 100
"""A minute of the rules is six tenths of a second here."""
CALM_S = 2.0
PAUSE_S = 0.02


def on_a_faster_clock(rules: Path) -> str:
    """The rules with every range, offset and `for` that much shorter. What they compare with stays."""

    def shorter(match: re.Match[str]) -> str:
        before, count, unit, after = match.groups()
        seconds = int(count) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[unit]
        return f"{before}{seconds * 1000 // FASTER}ms{after}"

    text = rules.read_text(encoding="utf-8")
    for pattern in (r"(\[)(\d+)([smhd])(\])", r"(\boffset )(\d+)([smhd])()", r"(\bfor: )(\d+)([smhd])()"):
        text, count = re.subn(pattern, shorter, text)
        assert count
    return text


@contextlib.asynccontextmanager
async def asked_all_the_time(fleets: Sequence[Fleet]) -> AsyncIterator[None]:
    """Requests to the rule, one after the other and in turn, whatever they are answered."""

    async def ask(session: aiohttp.ClientSession) -> None:
        while True:
            for fleet in fleets:
                body = {"model": "chat", "max_tokens": 7, "messages": MESSAGES}
                with contextlib.suppress(aiohttp.ClientError):
                    async with session.post(f"{fleet.url}/v1/chat/completions", json=body) as response:
                        await response.read()
                await asyncio.sleep(PAUSE_S)

    async with aiohttp.ClientSession() as session:
        asking = asyncio.create_task(ask(session))
        try:
            yield
        finally:
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)


async def fires(server: prometheus.Prometheus, alert: str) -> None:
    """Returns once the alert fires."""
    await server.until(f'ALERTS{{alertname="{alert}", alertstate="firing"}}')


async def firing(server: prometheus.Prometheus) -> set[str]:
    """The alerts that fire now."""
    return {alert for alert, state in (await server.alerts()).items() if state == "firing"}


@pytest.mark.needs("apt:prometheus")
async def test_alerts_tell_what_was_done_to_a_fleet_and_nothing_before(start: Start, tmp_path: Path) -> None:
    """An account that fails, a counter changed by hand; then Redis is killed, and a pod."""
    rules = tmp_path / "rules.yaml"
    rules.write_text(on_a_faster_clock(RULES), encoding="utf-8")
    anna, boris = Account("anna"), Account("boris")
    redis = Server("valkey-9", tmp_path / "redis", "--save", "", "--appendonly", "yes")
    try:
        async with running(anna, boris):
            document = {
                "providers": [provider(anna), provider(boris)],
                "rules": [rule("chat", service(anna), service(boris))],
            }
            variables = PATIENT | {"BALANCER_AUDIT_INTERVAL_S": "0.2"}
            starting = [
                start("--redis", f"redis://{redis.address}", document=document, workers=2, variables=variables)
                for _ in range(2)
            ]
            pods = await asyncio.gather(*starting)
            targets = {f"balancer-{i}": pod.url.removeprefix("http://") for i, pod in enumerate(pods)}
            scraping = prometheus.scraping(targets, rule_files=[rules])
            async with prometheus.running(scraping) as server, asked_all_the_time(pods):
                await server.until_scraped()
                await asyncio.sleep(CALM_S)
                assert await firing(server) == set()

                anna.fails(500)
                key, field = keys.services("default"), by_hand.field("boris:m", "in_flight")
                redis.control.hset(key, field, by_hand.with_added(redis.control.hget(key, field), "in_flight", 2))
                await fires(server, "BalancerBreakerOpen")
                await fires(server, "BalancerInvariantViolated")
                assert await firing(server) == {"BalancerBreakerOpen", "BalancerInvariantViolated"}

                redis.kill()
                os.kill(pods[1].process.pid, signal.SIGKILL)
                await fires(server, "BalancerStoreLost")
                await fires(server, "BalancerDegradedPicks")
                await fires(server, "BalancerTargetDown")

                assert "BalancerStoreLost" in await firing(server)

                assert redis.start()
                await server.until('absent(ALERTS{alertname="BalancerStoreLost"})')
                bad = [rule for rule in await server.rules() if rule["health"] != "ok"]
                assert bad == []
    finally:
        redis.end()
