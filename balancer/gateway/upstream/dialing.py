"""New connections: TCP to the upstream or its proxy, whichever address answers first, and TLS on it."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from typing import Any

from balancer.gateway.upstream.connection import Connection
from balancer.gateway.upstream.request import Origin

_HAPPY_EYEBALLS_S = 0.25
"""RFC 8305 §5: how long an address has before the next is tried beside it."""


async def dial(
    loop: asyncio.AbstractEventLoop, origin: Origin, tls: ssl.SSLContext, new: Callable[[], Connection]
) -> Connection:
    """A connection to the origin. Raises OSError, of which TLS' errors are some."""
    # uvloop knows nothing of happy eyeballs: it tries one address after the other.
    options: dict[str, Any] = (
        {"happy_eyeballs_delay": _HAPPY_EYEBALLS_S} if isinstance(loop, asyncio.BaseEventLoop) else {}
    )
    _, connection = await loop.create_connection(
        new, origin.host, origin.port, ssl=tls if origin.scheme == "https" else None, **options
    )
    return connection
