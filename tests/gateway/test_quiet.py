"""The planes on aiohttp's own protocol log no malformed request either, and everything else."""

from __future__ import annotations

import asyncio
import logging
import socket

import pytest
from aiohttp import web

from balancer.gateway.front_server import QUIET


async def test_a_plane_logs_its_own_faults_and_no_malformed_request(caplog: pytest.LogCaptureFixture) -> None:
    """An admin's token in a malformed header was once logged, with the traceback of the parser."""

    async def fail(_: web.Request) -> web.Response:
        raise RuntimeError("a fault of ours")

    app = web.Application()
    app.router.add_get("/", fail)
    runner = web.AppRunner(app, access_log=None, logger=QUIET)
    await runner.setup()
    listener = socket.create_server(("127.0.0.1", 0))
    await web.SockSite(runner, listener).start()
    for header in (b"Authorization: Bearer admin-token\x01\r\n", b"Connection: close\r\n"):
        reader, writer = await asyncio.open_connection(*listener.getsockname())
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n" + header + b"\r\n")
        assert (await reader.read()).split()[1] in (b"400", b"500")
        writer.close()
        await writer.wait_closed()
    await runner.cleanup()
    lines = [logging.Formatter().format(record) for record in caplog.records]
    assert not [line for line in lines if "admin-token" in line]
    assert [line for line in lines if "a fault of ours" in line]
