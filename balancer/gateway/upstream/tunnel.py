"""TLS to an upstream through an HTTP proxy: CONNECT (RFC 9110 §9.3.6), and then the proxy only hands on bytes."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable

import httptools

from balancer.gateway.upstream.connection import Connection
from balancer.gateway.upstream.request import Origin, proxy_authorization

_HEAD_BYTES = 64 * 1024


class ProxyRefusedError(ConnectionError):
    """The proxy does not connect us. Of what it answered only the status is told: the rest may repeat a credential."""


class _Connecting(asyncio.Protocol):
    """The proxy's answer."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.status: asyncio.Future[int] = loop.create_future()
        self._parser = httptools.HttpResponseParser(self)
        self._received = 0

    def data_received(self, data: bytes) -> None:
        self._received += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._refuse("answered CONNECT with what is no HTTP")
        if self._received > _HEAD_BYTES:
            self._refuse("answered CONNECT with a head that is too long")

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if status >= 200 and not self.status.done():
            self.status.set_result(status)

    def connection_lost(self, exc: Exception | None) -> None:
        self._refuse("broke off before it answered CONNECT")
        del self._parser  # It holds our methods.

    def _refuse(self, what: str) -> None:
        if not self.status.done():
            self.status.set_exception(ProxyRefusedError(f"its proxy {what}"))


async def through(
    loop: asyncio.AbstractEventLoop,
    sock: socket.socket,
    proxy_tls: ssl.SSLContext | None,
    proxy_name: str | None,
    origin: Origin,
    tls: ssl.SSLContext,
    new: Callable[[], Connection],
) -> Connection:
    """A connection to the origin, by way of the proxy that the socket leads to. Raises OSError."""
    transport, connecting = await loop.create_connection(
        lambda: _Connecting(loop), sock=sock, ssl=proxy_tls, server_hostname=proxy_name
    )
    try:
        name = f"[{origin.host}]" if ":" in origin.host else origin.host
        authority = f"{name}:{origin.port}"
        lines = f"CONNECT {authority} HTTP/1.1\r\nHost: {authority}\r\n{proxy_authorization(origin.proxy_url)}\r\n"
        transport.write(lines.encode("ascii"))
        status = await connecting.status
        if not 200 <= status < 300:
            raise ProxyRefusedError(f"its proxy answered CONNECT with status {status}")
        connection = new()
        secured = await loop.start_tls(transport, connection, tls, server_hostname=origin.host)
        if secured is None:
            raise ConnectionResetError("the connection was lost as TLS began")
        connection.connection_made(secured)
        return connection
    except BaseException:
        transport.abort()
        raise
