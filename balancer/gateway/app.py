"""One worker's data plane, put together: the store, the upstream client, the front, probes and metrics."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
from aiohttp import web

from balancer import log, tracing
from balancer.access import AccessLog
from balancer.config import Settings
from balancer.domain import Provider
from balancer.errors import StoreUnavailableError
from balancer.gateway.express import Express
from balancer.gateway.forwarding import Forwarder
from balancer.gateway.front import Front
from balancer.gateway.front_server import BACKLOG, QUIET, Answer, Server, Site, drop_server_header
from balancer.gateway.handlers import Handlers
from balancer.gateway.health import HealthProbe
from balancer.gateway.lane import Lanes
from balancer.gateway.matching import Plans
from balancer.gateway.messages import ClientRequest, ClientStream
from balancer.gateway.tls import server_context
from balancer.gateway.upstream import UpstreamClient
from balancer.gateway.watched import WatchedWay
from balancer.gateway.witness import Watch
from balancer.metrics import CONTENT_TYPE, Metrics, pool_gauges
from balancer.store.balance import Balance, BalanceEvents
from balancer.store.credentials import Credentials, Sealer
from balancer.store.pool import PoolEvents
from balancer.store.slices import in_slices

_TICK_S = 1.0
_LAST_SETTLES_S = 5.0
_LAST_LINES_S = 2.0
_LAST_SPANS_S = 5.0
_LEAST_S = 0.5
"""So long the last spans may take though the time to drain is over."""
_SHUTDOWN_S = 1.0


class _Providers:
    """Providers of the configuration that stands, with their credentials resolved."""

    def __init__(self, balance: Balance, credentials: Credentials) -> None:
        self._balance = balance
        self.access_token = credentials.access_token
        self.headers = credentials.headers
        self.query = credentials.query
        self.proxy_url = credentials.proxy_url

    def provider(self, uuid: str) -> Provider | None:
        """The provider of that uuid."""
        return self._balance.directory.provider(uuid)


class Gateway:
    """A worker's data plane: start, serve, drain."""

    def __init__(self, settings: Settings, url: str, sealer: Sealer | None, slot: int = 0) -> None:
        self._settings = settings
        folder = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
        self.metrics = Metrics(Path(folder) if folder else None, slot)
        self.balance = Balance(url, settings, self._events())
        self._upstream = UpstreamClient(settings.upstream_connections, settings.upstream_ca_file)
        providers = _Providers(self.balance, Credentials(sealer))
        self._access = AccessLog() if settings.access_log else None
        self._tracing: tracing.Tracing | None = None
        if settings.otel:
            self._tracing = tracing.start(settings.otel_semconv, self.balance.worker, providers.provider)
        self._watch = Watch(self._access, self._tracing) if self._access or self._tracing else None
        self._plans = plans = Plans(self.balance.snapshot)
        self._forwarder = Forwarder(
            self.balance,
            providers,
            self._upstream,
            self.metrics,
            plans,
            decision_headers=settings.decision_headers,
            drops=tracing.CONTEXT_HEADERS if settings.otel else frozenset(),
        )
        self._probe = HealthProbe(providers, self._upstream)
        self._handlers = Handlers(settings, self.balance, self._forwarder, self.metrics, plans, self._watch)
        self._runners: list[web.BaseRunner] = []
        self._ticker: asyncio.Task[None] | None = None
        self._is_draining = False
        self._open_requests = 0
        self._idle = asyncio.Event()

    def _events(self) -> BalanceEvents:
        metrics = self.metrics
        return BalanceEvents(
            stale=lambda pool: metrics.stale_picks.labels(pool).inc(),
            selected=metrics.select_s,
            pool=PoolEvents(
                epoch_bumped=lambda pool, lost: metrics.epoch_bumps.labels(pool).inc(),
                lease_expired=lambda pool, lost: metrics.leases_expired.labels(pool).inc(lost),
                batches_lost=lambda pool, count: metrics.batches_lost.labels(pool).inc(count),
                violated=lambda pool, count: metrics.violations.labels(pool).inc(count),
            ),
        )

    # -- life ----------------------------------------------------------------------------------------------------------

    async def start(
        self, sockets: list[socket.socket], planes: Sequence[tuple[web.Application, socket.socket]] = ()
    ) -> None:
        """Serves on the first socket; on the second, if there is one, the metrics alone; other planes on their own."""
        await self.balance.start(self._probe)
        self._ticker = asyncio.create_task(self._tick())
        data, *metrics = sockets
        await self._serve_data(data, with_metrics=not metrics)
        for listener in metrics:
            await self._serve_plane(self._metrics_plane(), listener)
        for app, listener in planes:
            await self._serve_plane(app, listener)

    async def _serve_data(self, listener: socket.socket, *, with_metrics: bool) -> None:
        server = Server(self._front(with_metrics=with_metrics).answer, self._watch)
        if self._settings.fast_lane:
            lanes = Lanes(self._counted, server, self._settings.max_body_bytes, lambda: self._is_draining)
            express = Express(
                self._handlers,
                self._forwarder,
                self.balance,
                self._upstream,
                self._plans,
                self.metrics,
                opened=self._opened,
                closed=self._closed,
                decision_headers=self._settings.decision_headers,
                way=WatchedWay if self._watch is not None else None,
                watch=self._watch,
            )
            lanes.begin = express.begin
            server.lanes = lanes
        runner = web.ServerRunner(server, shutdown_timeout=_SHUTDOWN_S)
        await runner.setup()
        self._runners.append(runner)
        await Site(runner, listener, server_context(self._settings)).start()

    async def _serve_plane(self, app: web.Application, listener: socket.socket) -> None:
        app.on_response_prepare.append(drop_server_header)
        runner = web.AppRunner(
            app,
            handler_cancellation=True,
            access_log=None,
            auto_decompress=False,
            logger=QUIET,
            shutdown_timeout=_SHUTDOWN_S,
        )
        await runner.setup()
        self._runners.append(runner)
        await web.SockSite(runner, listener, backlog=BACKLOG).start()

    async def drain(self) -> None:
        """Is not ready from now on, lets open requests finish, hands in the last settles, and closes."""
        self._is_draining = True
        ends_at = time.monotonic() + self._settings.drain_delay_s + self._settings.drain_timeout_s
        await asyncio.sleep(self._settings.drain_delay_s)
        for runner in self._runners:
            for site in list(runner.sites):
                await site.stop()
        try:
            async with asyncio.timeout(self._settings.drain_timeout_s):
                while self._open_requests:
                    self._idle.clear()
                    await self._idle.wait()
        except TimeoutError:
            log.warning("open requests are broken off", requests=self._open_requests)
        for runner in self._runners:
            await runner.cleanup()
        if self._ticker:
            self._ticker.cancel()
        exported = self._tracing.close() if self._tracing is not None else None
        await self.balance.close(_LAST_SETTLES_S)
        self.metrics.flush()
        await self._upstream.close()
        if self._access is not None:
            await self._access.close(_LAST_LINES_S)
        if exported is not None:
            left_s = min(max(ends_at - time.monotonic(), _LEAST_S), _LAST_SPANS_S)
            if not await asyncio.to_thread(exported.wait, left_s):
                log.warning("the last spans are not exported: the collector does not take them in time")

    async def _tick(self) -> None:
        """Keeps the gauges that describe this worker fresh, for whichever worker is scraped."""
        while True:
            for pool, entries in self.balance.outbox_entries().items():
                self.metrics.outbox.labels(pool).set(entries)
            try:
                self.metrics.revision.set(self.balance.directory.revision)
            except StoreUnavailableError:
                self.metrics.revision.set(0)
            await asyncio.sleep(_TICK_S)

    # -- routes --------------------------------------------------------------------------------------------------------

    def _front(self, *, with_metrics: bool) -> Front:
        own: dict[str, Answer] = {"/healthz": self._healthz, "/readyz": self._readyz}
        if with_metrics:
            own["/metrics"] = self._metrics
        return Front(
            self._counted,
            self._handlers.dialect_of,
            self._settings.max_body_bytes,
            lambda: self._is_draining,
            own,
            self._watch,
        )

    def _metrics_plane(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/metrics", self._metrics)
        return app

    async def _counted(self, request: ClientRequest, stream: ClientStream) -> None:
        self._opened()
        try:
            await self._handlers.handle(request, stream)
        finally:
            self._closed()

    def _opened(self) -> None:
        self._open_requests += 1

    def _closed(self) -> None:
        self._open_requests -= 1
        if self._is_draining and not self._open_requests:
            self._idle.set()

    async def _healthz(self, request: web.BaseRequest) -> web.Response:
        return _json(200, {"status": "alive"})

    async def _readyz(self, request: web.BaseRequest) -> web.Response:
        detail = {"pid": os.getpid(), "draining": self._is_draining, **self.balance.readiness()}
        is_ready = self.balance.is_ready and not self._is_draining
        return _json(200 if is_ready else 503, {"ready": is_ready, **detail})

    async def _metrics(self, request: web.BaseRequest) -> web.Response:
        try:
            configuration = self.balance.directory.configuration
            pools = await in_slices(pool_gauges(await self.balance.views(), configuration))
        except StoreUnavailableError:
            pools = []  # Absent, not 0: nobody knows.
        body = await in_slices(self.metrics.exposing(pools, self.balance.pools_up()))
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE})


def _json(status: int, value: object) -> web.Response:
    return web.Response(
        status=status,
        body=msgspec.json.encode(value),
        content_type="application/json",
        headers={"Cache-Control": "no-store"},
    )
