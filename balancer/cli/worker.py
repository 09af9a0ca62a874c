"""One worker process: serves on inherited sockets until told to drain, or until its supervisor is gone."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path

from balancer import config, log, polling
from balancer.cli.store import Store, opened
from balancer.config import Settings
from balancer.errors import BalancerError

_LARGEST_BLOCK_BYTES = 8 * 1024 * 1024


def main() -> int:
    """Runs the worker that the arguments describe; the exit status."""
    parser = argparse.ArgumentParser(prog="balancer.cli.worker", description=__doc__)
    parser.add_argument("--slot", type=int, required=True)
    parser.add_argument("--metrics-folder", type=Path, required=True)
    parser.add_argument("--ready-fd", type=int, required=True)
    parser.add_argument("--life-fd", type=int, required=True)
    parser.add_argument("--listen-fd", type=int, action="append", required=True)
    parser.add_argument("--admin-fd", type=int)
    options = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    settings = config.load()
    log.configure(settings.log_level)
    try:
        with opened(settings) as store, asyncio.Runner(loop_factory=_loop_factory(settings)) as runner:
            runner.run(_serve(settings, store, options))
    except BalancerError as exc:
        log.error("worker ended", reason=exc.message)
        return 1
    return 0


def _loop_factory(settings: Settings) -> Callable[[], asyncio.AbstractEventLoop]:
    """What makes the event loop that the settings ask for."""
    if settings.loop != "uvloop":
        return polling.new_event_loop
    import uvloop

    return uvloop.new_event_loop


def _relax_collector() -> None:
    """Makes the garbage collector look at what was made since the start only, and less often.

    Requests leave no cycles behind them, so that looking every 700 objects, as by default, finds nothing; it took one
    twentieth of a busy worker's time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def keep_freed_memory() -> None:
    """Makes glibc keep up to 16 MiB of what was freed: no page is given back and asked for again at each turn.

    From 128 KiB on, which three prompts are, it gives the end of its heap back. With prompts of 44 KB each request met
    five pages that the kernel had to clear first, a tenth of its CPU. The limit rises to twice the largest block that
    was freed (mallopt(3), M_MMAP_THRESHOLD), as it would with the first long prompt. The block is never touched.
    """
    bytes(_LARGEST_BLOCK_BYTES)


async def _serve(settings: Settings, store: Store, options: argparse.Namespace) -> None:
    from balancer.admin.app import create_app
    from balancer.gateway.app import Gateway

    draining = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, draining.set)
    loop.add_reader(options.life_fd, draining.set)
    keeper = asyncio.create_task(store.held.keep()) if store.held else None
    gateway = Gateway(settings, store.url, store.sealer, slot=options.slot, metrics_folder=options.metrics_folder)
    try:
        planes = []
        if options.admin_fd is not None:
            admin = create_app(settings, gateway.balance, gateway.metrics, store.sealer)
            planes.append((admin, socket.socket(fileno=options.admin_fd)))
        await gateway.start([socket.socket(fileno=fd) for fd in options.listen_fd], planes)
        _relax_collector()
        keep_freed_memory()
        with contextlib.suppress(BrokenPipeError):  # A supervisor that is stopping already does not wait for it.
            os.write(options.ready_fd, b"1")
        os.close(options.ready_fd)
        await draining.wait()
        loop.remove_reader(options.life_fd)
        await gateway.drain()
    finally:
        if keeper:
            keeper.cancel()
            await asyncio.gather(keeper, return_exceptions=True)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
