"""`balancer serve` tells of its requests: lines on its stdout, spans at a collector, all by the end of its drain."""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec

from balancer.cli.accounts import FakeAccount
from tests.fleet.conftest import Start, a_document, run_command
from tests.otlp import Collector

_INTO_A_FILE = ("sh", "-c", 'exec "$0" "$@" > access.log', sys.executable, "-m", "balancer")


async def test_two_workers_share_a_stdout_and_a_trace_goes_through(
    start: Start, accounts: list[FakeAccount], store_url: str, tmp_path: Path
) -> None:
    async with Collector().running() as collector:
        variables = {
            "BALANCER_ACCESS_LOG": "on",
            "BALANCER_OTEL": "on",
            "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
            "OTEL_BSP_SCHEDULE_DELAY": "60000",
        }
        document = a_document(accounts)
        fleet = await start("--redis", store_url, document=document, variables=variables, command=_INTO_A_FILE)
        async with fleet.askers(2) as askers:
            asked = 0
            for some in askers.values():
                for asker in some:
                    assert await asker.is_whole("chat")
                    assert await asker.is_whole("claude", style="anthropic", stream=True)
                    asked += 2
        assert await fleet.stopped() == 0
        lines = [msgspec.json.decode(line) for line in (tmp_path / "access.log").read_bytes().splitlines()]

    assert len(lines) == asked
    assert {line["outcome"] for line in lines} == {"success"}
    assert len({span.resource["service.instance.id"] for span in collector.spans}) == 2
    spans = collector.of("SERVER")
    assert sorted(span.trace for span in spans) == sorted(line["trace"] for line in lines)
    assert len(collector.of("CLIENT")) == asked


async def test_without_the_packages_it_says_what_to_install(environment: dict[str, str], tmp_path: Path) -> None:
    hidden = tmp_path / "opentelemetry.py"
    hidden.write_text("", encoding="utf-8")
    variables = {"BALANCER_OTEL": "on", "PYTHONPATH": f"{tmp_path}:{environment.get('PYTHONPATH', '')}"}
    status, _, err = await run_command("serve", "--port", "0", environment=environment | variables)

    assert status != 0
    assert "pip install 'llm-balancer[otel]'" in err
