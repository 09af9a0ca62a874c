"""One measurement: a phase of load on one contestant, and what it and its surroundings used meanwhile."""

from __future__ import annotations

import subprocess
import time
from typing import Any

import msgspec
import redis

from benchmarks.bench.contestants import Contestant
from benchmarks.bench.processes import OTHERS_CORE, Process, on_core
from benchmarks.bench.site import Site

PATH = "/v1/chat/completions"
_PATIENCE_S = 30.0
_REST_S = 12.0


class Phase(msgspec.Struct, frozen=True, kw_only=True):
    """A kind of load: which body over how many connections; `rate` requests a second, 0 for as many as possible."""

    name: str
    body: str
    connections: int
    rate: float = 0.0
    warm_up_s: float = 0.4


SMALL_1 = Phase(name="small c1", body="small", connections=1)
SMALL = Phase(name="small c32", body="small", connections=32)
AGENT = Phase(name="44 KB c32", body="agent", connections=32)
STREAM = Phase(name="stream c32", body="small_stream", connections=32)
SMALL_256 = Phase(name="small c256", body="small", connections=256)
BURST = Phase(name="burst c256", body="small", connections=256, warm_up_s=0.0)
PACED = Phase(name="small c32, 1000 a second", body="small", connections=32, rate=1000.0)
"""A load that every variant of ours can carry, so that two can be compared at an equal one."""
PHASES = (SMALL_1, SMALL, AGENT, STREAM, SMALL_256)
PHASES_BY_WORD = {"c1": SMALL_1, "small": SMALL, "agent": AGENT, "stream": STREAM, "c256": SMALL_256}


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """What the load program reports."""

    per_s: float = 0.0
    right: int = 0
    all_right: int = 0
    wrong: int = 0
    reconnects: int = 0
    p50_ms: float = 0.0
    p99_ms: float = 0.0
    ttfb_p50_ms: float = 0.0
    ttfb_p99_ms: float = 0.0
    first_p50_ms: float = 0.0
    first_p99_ms: float = 0.0
    load_cores: float = 0.0
    complaint: str = ""


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One measurement. CPU is in µs for a request (a stream is one), warm-up included; memory is proportional."""

    contestant: str
    round: int
    phase: str
    load: Load
    cpu_us: float
    cores: float
    memory_mib: float
    upstream_cores: float
    redis_cores: float
    redis_us: float = 0.0
    """The server's CPU, for contestants of ours."""
    scripts_us: float = 0.0
    """What of it the scripts say that they used."""
    scripts_per_request: float = 0.0


class _Store:
    """What Redis says of its own work: scripts run, and their µs."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._before = self._read()

    def _read(self) -> tuple[int, float]:
        if not self._url:
            return 0, 0.0
        with redis.Redis.from_url(self._url) as client:
            stats: dict[str, Any] = client.info("commandstats").get("cmdstat_evalsha", {})
        return int(stats.get("calls", 0)), float(stats.get("usec", 0.0))

    def used(self) -> tuple[int, float]:
        """Since it was made."""
        calls, us = self._read()
        return calls - self._before[0], us - self._before[1]


def run_load(site: Site, contestant: Contestant, phase: Phase, seconds: float) -> Load:
    """Sends a phase's load; nothing right in it if the load program fails."""
    warm_up_s = phase.warm_up_s * contestant.slowness
    command = [str(site.load), str(contestant.load_port or contestant.port), PATH, str(site.bodies[phase.body])]
    command += [str(phase.connections), str(seconds), str(warm_up_s), str(phase.rate), *contestant.headers]
    patience_s = seconds + warm_up_s + _PATIENCE_S
    with on_core(OTHERS_CORE):
        done = subprocess.run(command, capture_output=True, text=True, timeout=patience_s, check=False)
    if done.returncode:
        return Load(wrong=1, complaint=done.stderr[-200:])
    return msgspec.json.decode(done.stdout, type=Load)


def measure(
    site: Site, contestant: Contestant, process: Process | None, phase: Phase, seconds: float, round_: int
) -> Row:
    """One row, after which the contestant is at rest."""
    seconds *= contestant.slowness
    store = _Store(contestant.redis_url)
    watched = (process, site.upstream, site.redis)
    before = [each.cpu_s() if each else 0.0 for each in watched]
    started = time.monotonic()
    load = run_load(site, contestant, phase, seconds)
    wall_s = time.monotonic() - started
    own_s, upstream_s, redis_s = (each.cpu_s() - b if each else 0.0 for each, b in zip(watched, before, strict=True))
    calls, scripts_us = store.used()
    requests = max(1, load.all_right)
    row = Row(
        contestant=contestant.name,
        round=round_,
        phase=phase.name,
        load=load,
        cpu_us=own_s * 1e6 / requests,
        cores=own_s / wall_s,
        memory_mib=process.memory_mib() if process else 0.0,
        upstream_cores=upstream_s / wall_s,
        redis_cores=redis_s / wall_s,
        redis_us=redis_s * 1e6 / requests if contestant.redis_url else 0.0,
        scripts_us=scripts_us / requests,
        scripts_per_request=calls / requests,
    )
    if process:
        process.rest(_REST_S)
    return row
