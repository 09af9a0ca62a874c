"""New connections: TCP to the upstream or its proxy, whichever address answers first, and TLS on it."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from urllib.parse import urlsplit

from aiohappyeyeballs import start_connection

from balancer.gateway.upstream.connection import Connection
from balancer.gateway.upstream.names import Names
from balancer.gateway.upstream.request import Origin
from balancer.gateway.upstream.tunnel import through

_NEXT_ADDRESS_S = 0.25
"""RFC 8305 §5: an address that has not answered by then has the next one tried beside it."""
_PROXY_PORTS = {"http": 80, "https": 443}


class Dialer:
    """Opens connections; `tls` is for upstreams and for proxies."""

    def __init__(self, tls: ssl.SSLContext) -> None:
        self._tls = tls
        self._names = Names()

    def close(self) -> None:
        """Ends the look-ups of names that are under way."""
        self._names.close()

    async def dial(self, origin: Origin, new: Callable[[], Connection]) -> Connection:
        """A connection to the origin. Raises OSError, of which ssl.SSLError and ProxyRefusedError are some."""
        scheme, host, port = _first_stop(origin)
        loop = asyncio.get_running_loop()
        addresses = await self._names.addresses(host, port)
        # Not the loop's own happy eyeballs: uvloop has none, and asyncio's loses a socket when it is cancelled.
        sock = await start_connection(addresses, happy_eyeballs_delay=_NEXT_ADDRESS_S)
        secure, name = (self._tls, host) if scheme == "https" else (None, None)
        if origin.is_tunnelled:
            return await through(loop, sock, secure, name, origin, self._tls, new)
        _, connection = await loop.create_connection(new, sock=sock, ssl=secure, server_hostname=name)
        return connection


def _first_stop(origin: Origin) -> tuple[str, str, int]:
    """Whom to connect to: the proxy, if there is one."""
    if not origin.proxy_url:
        return origin.scheme, origin.host, origin.port
    try:
        proxy = urlsplit(origin.proxy_url)
        if proxy.hostname:
            return proxy.scheme, proxy.hostname, proxy.port or _PROXY_PORTS[proxy.scheme]
    except (ValueError, KeyError):
        pass
    raise OSError("the proxy's URL is none")
