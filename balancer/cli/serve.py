"""serve: a small supervisor that owns the listening sockets, and worker processes that serve on them.

One socket a worker, inherited: what waits in the accept queue of a worker that died is served by its successor.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import secrets
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec

from balancer import config, log
from balancer.cells import shared_folder
from balancer.cli.configuration import describe, read_file
from balancer.cli.store import Store, opened
from balancer.config import Settings
from balancer.domain import Configuration
from balancer.errors import BalancerError, ConfigurationError, StoreUnavailableError
from balancer.gateway.tls import server_context
from balancer.store import connection
from balancer.store.changes import by_user
from balancer.store.publishing import Publication, publish_file
from balancer.store.registry import Registry, kept_file
from balancer.store.topology import Topology

_BACKLOG = 1024
_QUICK_S = 5.0
_LONGEST_PAUSE_S = 5.0
_EXTRA_S = 10.0
"""Beyond the drain timeout a worker has this long to hand in its settles; then it is killed."""


class Slot(msgspec.Struct):
    """One place for a worker: its listening sockets, and the process that serves on them at the moment."""

    number: int
    sockets: tuple[socket.socket, ...]
    """For the data plane, and for the metrics if they have a port of their own."""
    admin: socket.socket | None = None
    process: asyncio.subprocess.Process | None = None

    @property
    def listeners(self) -> tuple[socket.socket, ...]:
        """All of them."""
        return (*self.sockets, self.admin) if self.admin else self.sockets


def run(options: argparse.Namespace) -> int:
    """Serves until SIGTERM or SIGINT."""
    settings = config.load(vars(options))
    log.configure(settings.log_level)
    has_token = settings.admin_token or settings.admin_tokens
    is_token_ours = settings.admin_listen_port is not None and not has_token
    if is_token_ours:
        settings = msgspec.structs.replace(settings, admin_token=secrets.token_urlsafe(24))
    server_context(settings)  # What is wrong with it is said here, once, and not by every worker.
    configuration = read_file(settings.config, lenient=options.lenient) if settings.config else None
    with opened(settings) as store, shared_folder() as metrics_folder:
        publication = asyncio.run(_prepare(store, settings, configuration))
        if publication:
            say = log.warning if publication.result == "ignored" else log.info
            say("configuration file", outcome=describe(publication))
        with _listening(settings) as slots:
            if is_token_ours:
                # To whoever started us, and not into the log, which may be shipped elsewhere.
                print(f"balancer: the admin server's token for this run: {settings.admin_token}", file=sys.stderr)
            return asyncio.run(_supervise(settings, store, slots, metrics_folder))


async def _prepare(store: Store, settings: Settings, configuration: Configuration | None) -> Publication | None:
    try:
        await connection.check_server(store.url)
    except StoreUnavailableError as exc:
        kept = kept_file(settings.outbox_dir)
        if kept is None or not kept.exists():
            raise
        note = "what --config names is not published" if configuration else ""
        log.warning("starting without Redis, on the configuration that was kept", reason=exc.message, note=note)
        return None
    if configuration is None:
        return None
    commands = connection.Commands(Topology(store.url))
    try:
        registry = Registry(commands, settings.scripts_dir)
        deed = by_user(f"serve {Path(settings.config).name}")
        return await publish_file(registry, configuration, store.sealer, deed=deed)
    finally:
        await commands.aclose()


@contextlib.contextmanager
def _listening(settings: Settings) -> Iterator[tuple[Slot, ...]]:
    """Listening sockets for every worker, closed afterwards."""
    with contextlib.ExitStack() as stack:
        places = [(settings.listen_host, settings.port, "")]
        if settings.metrics_port:
            places.append((settings.listen_host, settings.metrics_port, ""))
        if settings.admin_listen_port is not None:
            hint = "; --admin-port names another one for the admin server, 0 starts none"
            places.append((settings.admin_host, settings.admin_listen_port, hint))
        columns = [
            [stack.enter_context(listener) for listener in _listen_for_all(*place, settings.workers)]
            for place in places
        ]
        admin = columns.pop() if settings.admin_listen_port is not None else [None] * settings.workers
        rows = zip(*columns, strict=True)
        yield tuple(Slot(number=i, sockets=row, admin=admin[i]) for i, row in enumerate(rows))


def _listen_for_all(host: str, port: int, hint: str, workers: int) -> list[socket.socket]:
    """One socket a worker on the same port; with port 0 the first finds a free one, and the others join it."""
    listeners: list[socket.socket] = []
    try:
        if port:
            # Our sockets may share the port with each other, and so with those of any other balancer: is there one?
            _listen(host, port, is_shared=False).close()
        for _ in range(workers):
            listeners.append(_listen(host, port, is_shared=True))
            port = listeners[-1].getsockname()[1]
    except OSError as exc:
        for listener in listeners:
            listener.close()
        raise ConfigurationError(f"cannot listen on {host}:{port}: {exc.strerror}{hint}") from exc
    return listeners


def _listen(host: str, port: int, *, is_shared: bool) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if is_shared:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind((host, port))
        if is_shared:
            listener.listen(_BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


async def _supervise(settings: Settings, store: Store, slots: tuple[Slot, ...], metrics_folder: Path) -> int:
    """Keeps a worker in every slot until a signal, then lets them drain; the exit status."""
    loop = asyncio.get_running_loop()
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    # Workers see the end of this pipe when the supervisor is gone, however it went.
    life_read, life_write = os.pipe()
    environment = os.environ | settings.environment()
    keeper = asyncio.create_task(store.held.keep()) if store.held else None
    keepers: list[asyncio.Task[None]] = []
    try:
        starting = (_start(slot, environment, life_read, metrics_folder) for slot in slots)
        failures = [exc for exc in await asyncio.gather(*starting, return_exceptions=True) if exc]
        if failures:
            await _stop(settings, slots)
            raise failures[0]
        urls = {"url": _url(slots[0].sockets[0], "https" if settings.tls_cert_file else "http")}
        if slots[0].admin:
            urls["admin_url"] = _url(slots[0].admin)
        log.info("serving", **urls, workers=len(slots), pid=os.getpid())
        keepers = [
            asyncio.create_task(_keep_alive(slot, environment, life_read, metrics_folder, stopping)) for slot in slots
        ]
        await stopping.wait()
        log.info("draining", timeout_s=settings.drain_timeout_s)
        for task in keepers:
            task.cancel()
        await asyncio.gather(*keepers, return_exceptions=True)
        for listener in (listener for slot in slots for listener in slot.listeners):
            # Nobody succeeds a worker from now on. While we held them too, connections would go on queueing in sockets
            # that a drained worker has left, only to be reset.
            listener.close()
        await _stop(settings, slots)
        log.info("stopped")
        return 0
    finally:
        if keeper:
            keeper.cancel()
            await asyncio.gather(keeper, return_exceptions=True)
        os.close(life_write)
        os.close(life_read)


def _url(listener: socket.socket, scheme: str = "http") -> str:
    host, port = listener.getsockname()[:2]
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


async def _start(slot: Slot, environment: dict[str, str], life_fd: int, metrics_folder: Path) -> None:
    """Starts a worker in the slot and returns when it serves. Raises BalancerError when it ends before that."""
    ready_read, ready_write = os.pipe()
    command = [sys.executable, "-m", "balancer.cli.worker", "--slot", str(slot.number)]
    command += ["--metrics-folder", str(metrics_folder)]
    command += ["--ready-fd", str(ready_write), "--life-fd", str(life_fd)]
    command += [part for listener in slot.sockets for part in ("--listen-fd", str(listener.fileno()))]
    command += ["--admin-fd", str(slot.admin.fileno())] if slot.admin else []
    try:
        # A session of its own: Ctrl-C reaches the supervisor alone, which then drains its workers.
        slot.process = await asyncio.create_subprocess_exec(
            *command,
            env=environment,
            stdin=asyncio.subprocess.DEVNULL,
            pass_fds=(*(listener.fileno() for listener in slot.listeners), ready_write, life_fd),
            start_new_session=True,
        )
    finally:
        os.close(ready_write)
    is_ready = await _reads_a_byte(ready_read)
    if not is_ready:
        status = await slot.process.wait()
        slot.process = None
        raise BalancerError(f"worker {slot.number} ended at its start (status {status}); its log says why")


async def _reads_a_byte(fd: int) -> bool:
    """True when a byte comes through the pipe, False at its end. Closes it."""
    reader = asyncio.StreamReader()
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(fd, "rb", buffering=0)
    )
    try:
        return bool(await reader.read(1))
    finally:
        transport.close()


async def _keep_alive(
    slot: Slot, environment: dict[str, str], life_fd: int, metrics_folder: Path, stopping: asyncio.Event
) -> None:
    """Puts a new worker in the slot whenever the old one has ended. Pauses grow while they end at once."""
    loop = asyncio.get_running_loop()
    pause_s = 0.0
    while not stopping.is_set():
        started = loop.time()
        if slot.process:
            status = await slot.process.wait()
            log.warning("a worker has died", slot=slot.number, status=status)
        pause_s = min(_LONGEST_PAUSE_S, pause_s * 2 or 0.1) if loop.time() - started < _QUICK_S else 0.0
        await asyncio.sleep(pause_s)
        try:
            await _start(slot, environment, life_fd, metrics_folder)
            log.info("a worker was replaced", slot=slot.number)
        except BalancerError as exc:
            log.error("a worker cannot start", slot=slot.number, reason=exc.message)


async def _stop(settings: Settings, slots: tuple[Slot, ...]) -> None:
    """Asks every worker to drain, waits for them, and kills what is left."""
    alive = [slot.process for slot in slots if slot.process and slot.process.returncode is None]
    for process in alive:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
    patience_s = settings.drain_delay_s + settings.drain_timeout_s + _EXTRA_S
    try:
        async with asyncio.timeout(patience_s):
            await asyncio.gather(*(process.wait() for process in alive))
    except TimeoutError:
        for process in alive:
            if process.returncode is None:
                log.error("a worker did not end in time and is killed", pid=process.pid)
                process.kill()
                await process.wait()
