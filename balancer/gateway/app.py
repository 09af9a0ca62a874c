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
from balancer.exposition import CLASSIC_TYPE, OPEN_TYPE, Lines, is_open_wanted
from balancer.gateway.express import Express
from balancer.gateway.forwarding import Forwarder
from balancer.gateway.front import Front
from balancer.gateway.front_server import BACKLOG, QUIET, Answer, Server, Site, drop_server_header
from balancer.gateway.handlers import Handlers
from balancer.gateway.health import HealthProbe
from balancer.gateway.lane import Lanes
from balancer.gateway.matching import Plans
from balancer.gateway.messages import ClientRequest, WayBack
from balancer.gateway.tls import server_context
from balancer.gateway.tokens import TokenEndpoint
from balancer.gateway.upstream import UpstreamClient
from balancer.gateway.watched import way_of
from balancer.gateway.witness import Watch
from balancer.gauges import Configured, configured, pooled
from balancer.metrics import Metrics
from balancer.store.balance import Balance, BalanceEvents
from balancer.store.credentials import Credentials, Sealer
from balancer.store.keeper import Keeper, KeeperEvents, Plan, renewed_providers
from balancer.store.pool import PoolEvents
from balancer.store.registry import Directory
from balancer.store.slices import in_slices

_TICK_S = 1.0
_LAST_SETTLES_S = 5.0
_LAST_TOKENS_S = 5.0
_LAST_LINES_S = 2.0
_LAST_SPANS_S = 5.0
_LEAST_S = 0.5
"""So long the last spans may take though the time to drain is over."""
_SHUTDOWN_S = 1.0


class _Providers:
    """Providers of the configuration that stands, with their credentials resolved."""

    def __init__(self, balance: Balance, credentials: Credentials) -> None:
        self._balance = balance
        self._credentials = credentials
        self.keeper: Keeper | None = None
        self.headers = credentials.headers
        self.query = credentials.query
        self.proxy_url = credentials.proxy_url

    def provider(self, uuid: str) -> Provider | None:
        """The provider of that uuid."""
        return self._balance.directory.provider(uuid)

    def access_token(self, provider: Provider) -> str:
        """The credential to send: what the fleet was given last, or the configuration's; empty for none."""
        kept = self.keeper.access_token(provider) if self.keeper is not None else ""
        return kept or self._credentials.access_token(provider)


class Gateway:
    """A worker's data plane: start, serve, drain."""

    def __init__(
        self,
        settings: Settings,
        url: str,
        sealer: Sealer | None,
        *,
        slot: int = 0,
        metrics_folder: Path | None = None,
    ) -> None:
        """`metrics_folder`: where the workers of a supervisor, one in each `slot`, share what they count."""
        self._settings = settings
        self.metrics = Metrics(metrics_folder, slot)
        self.metrics.open_requests = lambda: self._open_requests
        self._configured: tuple[Directory, Configured] | None = None
        """What the metrics tell of a configuration."""
        self._plan: tuple[Directory, Plan] | None = None
        self.balance = Balance(url, settings, self._events())
        self._upstream = UpstreamClient(settings.upstream_connections, settings.upstream_ca_file)
        credentials = Credentials(sealer)
        providers = _Providers(self.balance, credentials)
        self._keeper = providers.keeper = Keeper(
            self.balance.grants,
            credentials,
            sealer,
            self._renewed,
            TokenEndpoint(providers, self._upstream),
            KeeperEvents(changed=self._token_changed, refreshed=self.metrics.refreshed),
        )
        self._access = AccessLog() if settings.access_log else None
        self._tracing: tracing.Tracing | None = None
        if settings.otel:
            self._tracing = tracing.start(settings.otel_semconv, self.balance.worker, providers.provider)
        self._watch = Watch(self._access, self._tracing) if self._access or self._tracing else None
        self._plans = plans = Plans(self.balance.snapshot, self.balance.seen)
        self._forwarder = Forwarder(
            self.balance,
            providers,
            self._upstream,
            self.metrics,
            plans,
            decision_headers=settings.decision_headers,
            drops=tracing.CONTEXT_HEADERS if settings.otel else frozenset(),
            renew=self._keeper.renew,
        )
        self._probe = HealthProbe(providers, self._upstream)
        self._handlers = Handlers(settings, self.balance, self._forwarder, self.metrics, plans, self._watch)
        self._runners: list[web.BaseRunner] = []
        self._last_runners: list[web.BaseRunner] = []
        """Of what is served to the very end: metrics on a port of their own."""
        self._ticker: asyncio.Task[None] | None = None
        self._is_draining = False
        self._open_requests = 0
        self._idle = asyncio.Event()

    def _events(self) -> BalanceEvents:
        metrics = self.metrics
        return BalanceEvents(
            stale=lambda pool: metrics.count(metrics.stale_picks, pool),
            selected=metrics.select_s,
            pool=PoolEvents(
                epoch_bumped=lambda pool, lost: metrics.count(metrics.epoch_bumps, pool),
                lease_expired=lambda pool, lost: metrics.count(metrics.leases_expired, pool, lost),
                batches_lost=lambda pool, count: metrics.count(metrics.batches_lost, pool, count),
                violated=lambda pool, count: metrics.count(metrics.violations, pool, count),
            ),
        )

    def _renewed(self) -> Plan:
        """Whose access tokens are renewed, under the configuration that stands."""
        try:
            directory = self.balance.directory
        except StoreUnavailableError:
            return Plan()
        if self._plan is None or self._plan[0] is not directory:
            providers = renewed_providers(directory.configuration.providers)
            self._plan = directory, Plan(revision=directory.revision, providers=providers)
            for provider in providers:
                self.metrics.knows_provider(provider.uuid)
        return self._plan[1]

    def _token_changed(self, provider: str) -> None:
        self._forwarder.preparer.look_again(provider)

    # -- life ----------------------------------------------------------------------------------------------------------

    async def start(
        self, sockets: list[socket.socket], planes: Sequence[tuple[web.Application, socket.socket]] = ()
    ) -> None:
        """Serves on the first socket; on the second, if there is one, the metrics alone; other planes on their own."""
        await self.balance.start(self._probe)
        self._keeper.start()
        self._ticker = asyncio.create_task(self._tick())
        data, *metrics = sockets
        await self._serve_data(data, with_metrics=not metrics)
        for listener in metrics:
            self._last_runners.append(await self._serve_plane(self._metrics_plane(), listener))
        for app, listener in planes:
            self._runners.append(await self._serve_plane(app, listener))

    async def _serve_data(self, listener: socket.socket, *, with_metrics: bool) -> None:
        server = Server(self._front(with_metrics=with_metrics).answer, self._watch)
        server.refused = self.metrics.refused
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
                way=way_of(self._watch),
                watch=self._watch,
            )
            lanes.begin = express.begin
            server.lanes = lanes
        runner = web.ServerRunner(server, shutdown_timeout=_SHUTDOWN_S)
        await runner.setup()
        self._runners.append(runner)
        await Site(runner, listener, server_context(self._settings)).start()

    async def _serve_plane(self, app: web.Application, listener: socket.socket) -> web.BaseRunner:
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
        await web.SockSite(runner, listener, backlog=BACKLOG).start()
        return runner

    async def drain(self) -> None:
        """Is not ready from now on, lets open requests finish, hands in the last settles, and closes.

        Metrics on a port of their own are served until then: a pod may drain for minutes, and what it counts meanwhile,
        the longest answers of all, would never be scraped.
        """
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
        await self._keeper.close(max(_LAST_TOKENS_S, ends_at - time.monotonic()))
        exported = self._tracing.close() if self._tracing is not None else None
        await self.balance.close(_LAST_SETTLES_S)
        self.metrics.flush()
        await self._upstream.close()
        for runner in self._last_runners:
            await runner.cleanup()
        if self._access is not None:
            await self._access.close(_LAST_LINES_S)
        if exported is not None:
            left_s = min(max(ends_at - time.monotonic(), _LEAST_S), _LAST_SPANS_S)
            if not await asyncio.to_thread(exported.wait, left_s):
                log.warning("the last spans are not exported: the collector does not take them in time")

    async def _tick(self) -> None:
        """Keeps the gauges that describe this worker fresh, for whichever worker is scraped."""
        while True:
            self._tell_state()
            await asyncio.sleep(_TICK_S)

    def _tell_state(self) -> None:
        metrics, balance = self.metrics, self.balance
        for pool, entries in balance.outbox_entries().items():
            metrics.knows(pool)
            metrics.outbox.set(entries, pool)
        for pool, age_s in balance.outbox_ages_s().items():
            metrics.outbox_age.set(age_s, pool)
        for pool, is_up in balance.pools_up().items():
            metrics.store_up.set(is_up, pool)
        metrics.tokens_live(self._keeper.left_s())
        try:
            metrics.revision.set(balance.directory.revision)
        except StoreUnavailableError:
            metrics.revision.set(0)
        metrics.ready.set(self._is_ready)
        metrics.flush()

    @property
    def _is_ready(self) -> bool:
        return self.balance.is_ready and not self._is_draining

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
            self._handlers.refused,
            self._watch,
        )

    def _metrics_plane(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/metrics", self._metrics)
        return app

    async def _counted(self, request: ClientRequest, stream: WayBack) -> None:
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
        if faults := self._keeper.faults():
            detail["oauth"] = faults
        is_ready = self._is_ready
        return _json(200 if is_ready else 503, {"ready": is_ready, **detail})

    async def _metrics(self, request: web.BaseRequest) -> web.Response:
        gauges: list[Lines] = []
        try:
            directory = self.balance.directory
        except StoreUnavailableError:
            pass  # Absent, not 0: nobody knows.
        else:
            known = await self._configured_by(directory)
            views, workers = await asyncio.gather(self.balance.views(), self.balance.live_workers())
            gauges = [known.lines, await in_slices(pooled(views, workers, directory.configuration, known))]
        self._tell_state()
        is_open = is_open_wanted(request.headers.getall("Accept", []))
        body = await in_slices(self.metrics.exposing(gauges, is_open=is_open))
        return web.Response(body=body, headers={"Content-Type": OPEN_TYPE if is_open else CLASSIC_TYPE})

    async def _configured_by(self, directory: Directory) -> Configured:
        """What the metrics tell of the configuration, worked out once."""
        if self._configured is None or self._configured[0] is not directory:
            known = await in_slices(configured(directory.configuration, directory.definition))
            self._configured = directory, known
        return self._configured[1]


def _json(status: int, value: object) -> web.Response:
    return web.Response(
        status=status,
        body=msgspec.json.encode(value),
        content_type="application/json",
        headers={"Cache-Control": "no-store"},
    )
