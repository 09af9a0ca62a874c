"""A gateway that tells of its requests: its access log in a file, its spans at a collector."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from balancer.access import AccessLog
from balancer.gateway import app
from tests.gateway.trails import Walked, walked
from tests.otlp import Collector, Span
from tests.store.conftest import eventually

OF_THE_MOMENT = ("ts", "duration_ms", "select_ms", "upstream_ms", "first_token_ms", "decision", "client")


class Telling:
    """What such a gateway has told."""

    def __init__(self, walk: Walked, file: Path, collector: Collector | None) -> None:
        self.walk = walk
        self.file = file
        self.collector = collector

    async def lines(self, count: int) -> list[dict[str, Any]]:
        """The lines of the access log, once there are so many."""

        async def are_there() -> bool:
            access = self.walk.gateway._access
            assert access is not None
            access.flush()  # Sooner than it would be.
            return len(self.file.read_bytes().splitlines()) >= count

        await eventually(are_there)
        found = [msgspec.json.decode(line) for line in self.file.read_bytes().splitlines()]
        assert len(found) == count, found
        return found

    async def line(self) -> dict[str, Any]:
        """The only one."""
        (line,) = await self.lines(1)
        return line

    async def is_alone(self) -> bool:
        """True once the gateway knows that Redis is away."""
        return not any(self.walk.gateway.balance.pools_up().values())

    async def spans(self, count: int) -> list[Span]:
        """The spans, once there are so many, each request's own behind those of its attempts."""
        collector = self.collector
        assert collector is not None

        async def are_there() -> bool:
            return len(collector.spans) >= count

        await eventually(are_there)
        assert len(collector.spans) == count, [span.name for span in collector.spans]
        return collector.spans


@contextlib.asynccontextmanager
async def telling(
    store_url: str,
    folder: Path,
    raw: dict[str, Any],
    way: str = "express",
    collector: Collector | None = None,
    **flags: Any,
) -> AsyncIterator[Telling]:
    """Such a gateway, that serves by this way until the block ends."""
    file = folder / "access.log"
    with pytest.MonkeyPatch.context() as patch, file.open("wb") as out:
        patch.setattr(app, "AccessLog", lambda: AccessLog(out.fileno()))
        if collector is not None:
            patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
            patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
        flags = {"access_log": True, "otel": collector is not None} | flags
        async with walked(store_url, folder, raw, way, **flags) as walk:
            yield Telling(walk, file, collector)
