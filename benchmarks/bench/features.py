"""What each feature of ours costs: our program alone, with each switch in turn, interleaved like the contestants."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import msgspec

from benchmarks.bench import figures, processes
from benchmarks.bench.bodies import MODEL
from benchmarks.bench.contestants import Contestant, Missing, nginx_program, of_ours
from benchmarks.bench.figures import Figures
from benchmarks.bench.measuring import BURST, PACED, SMALL, STREAM, Phase
from benchmarks.bench.ours import ALL, Variant
from benchmarks.bench.processes import OTHERS_CORE
from benchmarks.bench.site import ROOT, Site
from benchmarks.bench.tables import number, table
from tests.topologies import HOST, free_ports, make_certificates

PHASES = (SMALL, STREAM)
OFF = Variant(
    name="off",
    has_breaker=False,
    has_limits=False,
    reserve="none",
    settings={"decision_headers": "off", "audit_interval_s": "0"},
)
"""All that can be switched off. A selection and a settle remain: there is no request without them."""
_TOKEN = "bench-client"  # noqa: S105 – it opens the bench's own gateway
_LONG_SESSION = "bench-session: bench-0123456789abcdef"


def _with(base: Variant, name: str, **changes: Any) -> Variant:
    """A variant that differs from its base in those."""
    if "settings" in changes:
        changes["settings"] = base.settings | changes["settings"]
    return msgspec.structs.replace(base, name=name, base=base.name, **changes)


def _smart(position: str, operation: str, value: object) -> dict[str, Any]:
    """A rule's entry that each request matches."""
    ops = [{"position": position, "operation": operation, "value": value}]
    services = [{"provider": "account1", "model": MODEL}]
    return {"smart_enabled": True, "smart_routing": [{"uuid": "bench", "ops": ops, "services": services}]}


VARIANTS: tuple[Variant, ...] = (
    OFF,
    _with(OFF, "off + breaker", has_breaker=True),
    _with(OFF, "off + limits", has_limits=True),
    _with(OFF, "off + reservation", reserve="input"),
    _with(OFF, "off + decision headers", settings={"decision_headers": "on"}),
    _with(OFF, "off + record sampled", record="sampled"),
    _with(OFF, "off + record full", record="full"),
    _with(
        OFF,
        "off + session pins",
        rule={"session_affinity": 3600, "session_header": "bench-session"},
        headers=(_LONG_SESSION,),
    ),
    _with(OFF, "off + smart routing, by model", rule=_smart("model", "contains", MODEL)),
    _with(OFF, "off + smart routing, by tokens", rule=_smart("token", "ge", 1)),
    _with(OFF, "off + translation to messages", provider={"api_style": "anthropic"}),
    _with(OFF, "off + access log", settings={"access_log": "on"}),
    _with(OFF, "off + tracing, one in ten kept", settings={"otel": "on"}, has_collector=True),
    _with(OFF, "off + client tokens", settings={"client_tokens": _TOKEN}, headers=(f"Authorization: Bearer {_TOKEN}",)),
    _with(OFF, "off + response_model", rule={"response_model": "another-name"}),
    _with(OFF, "off + strict_settle", rule={"strict_settle": True}),
    _with(OFF, "off + TLS upstream", has_tls_upstream=True),
    _with(OFF, "off + TLS listener", has_tls_listener=True),
    ALL,
    _with(ALL, "all, fast lane off", settings={"fast_lane": "off"}),
)
LOOPS: tuple[Variant, ...] = (
    _with(ALL, "all, asyncio", settings={"loop": "asyncio"}),
    _with(ALL, "all, uvloop", settings={"loop": "uvloop"}),
)
WORKERS: tuple[Variant, ...] = (
    msgspec.structs.replace(ALL, name="1 worker"),
    msgspec.structs.replace(ALL, name="2 workers", base="1 worker", workers=2),
)

_BRIDGE = """
daemon off;
worker_processes 1;
pid bridge.pid;
error_log bridge-error.log warn;
events {{ worker_connections 4096; }}
http {{
  access_log off;
  client_body_temp_path bb; proxy_temp_path bp; fastcgi_temp_path bf; uwsgi_temp_path bu; scgi_temp_path bs;
  client_body_buffer_size 256k;
  keepalive_requests 1000000000;
  keepalive_timeout 300;
  proxy_http_version 1.1;
  proxy_set_header Connection "";
  proxy_set_header Host $http_host;
  proxy_buffering off;
  ssl_certificate {folder}/server.pem;
  ssl_certificate_key {folder}/server.key;
  {servers}
}}
"""
_SERVER = """
  upstream to{port} {{ server 127.0.0.1:{target}; keepalive 512; keepalive_requests 1000000000; }}
  server {{ listen 127.0.0.1:{port} {ssl} backlog=2048; location / {{ proxy_pass {scheme}://to{port}; }} }}
"""


class Bridges:
    """Speaks TLS for the accounts and the load, which do not: an nginx on their core."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._servers: list[str] = []
        self._ports: list[int] = []
        (self._collector_port,) = free_ports(1)
        make_certificates(site.folder)

    @property
    def collector(self) -> dict[str, str]:
        """The variables that let traces go to the collector, one in ten."""
        return {
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{HOST}:{self._collector_port}",
            "OTEL_TRACES_SAMPLER": "parentbased_traceidratio",
            "OTEL_TRACES_SAMPLER_ARG": "0.1",
            "OTEL_BSP_MAX_QUEUE_SIZE": "100000",
        }

    @property
    def ca(self) -> str:
        """The file with the authority that the certificates are from."""
        return str(self._site.folder / "ca.pem")

    def to_accounts(self) -> list[str]:
        """The accounts' addresses behind TLS."""
        ports = [self._add(target, ssl="ssl", scheme="http") for target in self._site.upstream_ports]
        return [f"https://{HOST}:{port}" for port in ports]

    def to_listener(self, target: int) -> int:
        """A port without TLS before one with it."""
        return self._add(target, ssl="", scheme="https")

    def _add(self, target: int, ssl: str, scheme: str) -> int:
        (port,) = free_ports(1)
        self._servers.append(_SERVER.format(port=port, target=target, ssl=ssl, scheme=scheme))
        self._ports.append(port)
        return port

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Speaks for all that was added, and takes traces, until the block ends."""
        command = (sys.executable, "-m", "benchmarks.collector", str(self._collector_port))
        collector = processes.start(command, OTHERS_CORE, self._site.folder, "collector", {"PYTHONPATH": str(ROOT)})
        try:
            processes.wait_until_listening(collector, self._collector_port)
            with self._bridging():
                yield
        finally:
            collector.end()

    @contextlib.contextmanager
    def _bridging(self) -> Iterator[None]:
        program = nginx_program()
        if program is None or not self._ports:
            yield
            return
        folder = self._site.folder
        file = folder / "bridge.conf"
        file.write_text(_BRIDGE.format(folder=folder, servers="".join(self._servers)), encoding="utf-8")
        command = (program, "-p", str(folder), "-c", str(file), "-e", "bridge-error.log")
        process = processes.start(command, OTHERS_CORE, folder, "bridge")
        try:
            processes.wait_until_listening(process, self._ports[-1])
            yield
        finally:
            process.end()


def contestant(site: Site, variant: Variant, bridges: Bridges) -> Contestant | Missing:
    """Our program with that variant, reached and reaching out with TLS where it asks for that."""
    if (variant.has_tls_upstream or variant.has_tls_listener) and nginx_program() is None:
        return Missing(name=variant.name, reason="needs nginx, which speaks TLS for the accounts and the load")
    if variant.has_tls_listener:
        files = {"tls_cert_file": str(site.folder / "server.pem"), "tls_key_file": str(site.folder / "server.key")}
        variant = msgspec.structs.replace(variant, settings=variant.settings | files)
    upstreams = bridges.to_accounts() if variant.has_tls_upstream else site.upstreams
    variables = {"SSL_CERT_FILE": bridges.ca} | (bridges.collector if variant.has_collector else {})
    made = of_ours(site, variant, upstreams=upstreams, variables=variables)
    if variant.has_tls_listener and isinstance(made, Contestant):
        made = msgspec.structs.replace(made, load_port=bridges.to_listener(made.port))
    return made


def cost_table(found: Figures) -> str:
    """CPU for a request of each variant, and beside its base in the same round."""
    rows = []
    for variant in VARIANTS:
        if variant.name not in found.contestants:
            continue
        cells = [variant.name]
        for phase in PHASES:
            cells.append(number(found.median(variant.name, phase, figures.cpu_us), 0))
            cells.append(_beside(found, variant, phase, figures.cpu_us))
        cells.append(number(found.median(variant.name, SMALL, figures.redis_us), 1))
        cells.append(_beside(found, variant, SMALL, figures.redis_us))
        rows.append(cells)
    head = ["variant", "CPU µs/req", "more", "CPU µs/stream", "more", "Redis CPU µs/req", "more"]
    return table(head, rows)


def _beside(found: Figures, variant: Variant, phase: Phase, value: figures.Value) -> str:
    if not variant.base:
        return "–"
    more = found.added(variant.name, variant.base, phase, value)
    return "–" if more is None else f"{more:+.1f}"


def loops_table(found: Figures) -> str:
    """Each loop: steady load, and 256 connections that come at once."""
    rows = [
        [
            name,
            number(found.median(name, SMALL, figures.cpu_us), 0),
            number(found.median(name, STREAM, figures.cpu_us), 0),
            number(found.median(name, BURST, lambda row: row.load.first_p50_ms)),
            number(found.median(name, BURST, lambda row: row.load.first_p99_ms)),
            number(found.median(name, BURST, figures.p99_ms)),
        ]
        for name in (variant.name for variant in LOOPS)
        if name in found.contestants
    ]
    head = ["loop", "CPU µs/req", "CPU µs/stream", "burst: first request p50 ms", "p99 ms", "all requests p99 ms"]
    return table(head, rows)


def workers_table(found: Figures) -> str:
    """One worker and two under the same load."""
    rows = []
    for variant in WORKERS:
        if variant.name not in found.contestants:
            continue
        own = number(found.median(variant.name, PACED, figures.cpu_us), 0)
        ratio = number(found.ratio(variant.name, WORKERS[0].name, PACED, figures.cpu_us), 2)
        per_s = number(found.median(variant.name, PACED, figures.per_s), 0)
        rows.append([variant.name, per_s, own, ratio, number(found.median(variant.name, PACED, figures.redis_us), 1)])
    return table(["workers", "req/s", "CPU µs/req", "× one", "Redis CPU µs/req"], rows)
