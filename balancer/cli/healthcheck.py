"""healthcheck: asks the gateway of this machine how it is, for images that carry no HTTP client.

It runs every few seconds beside the workers, so it imports little: no event loop, and TLS only where that is spoken.
"""

from __future__ import annotations

import argparse
import http.client
import ipaddress

from balancer import config
from balancer.config import Settings
from balancer.errors import BalancerError

TIMEOUT_S = 2.0
_TOLD_BYTES = 1000


def run(options: argparse.Namespace) -> int:
    """Exit status 0 if the gateway answers 200. Raises BalancerError that says what it answered instead.

    Where it listens is read as `serve` reads it; flags that were given to `serve` must be given here too.
    """
    # Whether it may listen there was for `serve` to say.
    settings = config.load(vars(options) | {"insecure": True})
    if not settings.port:
        raise BalancerError("healthcheck: with BALANCER_PORT=0 the port is chosen at the start; name it with --port")
    path = "/readyz" if options.ready else "/healthz"
    asked = f"{_host(settings)}:{settings.port}{path}"
    connection = _connection(settings)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        told = response.read(_TOLD_BYTES).decode("utf-8", "replace").strip()
    except (OSError, http.client.HTTPException) as exc:
        raise BalancerError(f"healthcheck: no answer from {asked}: {str(exc) or type(exc).__name__}") from exc
    finally:
        connection.close()
    if response.status != 200:
        raise BalancerError(f"healthcheck: {asked} answered {response.status}: {told}")
    return 0


def _host(settings: Settings) -> str:
    """The address under which this machine reaches itself."""
    host = settings.listen_host
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    if not address.is_unspecified:
        return host
    return "::1" if address.version == 6 else "127.0.0.1"


def _connection(settings: Settings) -> http.client.HTTPConnection:
    host, port = _host(settings), settings.port
    if not settings.tls_cert_file:
        return http.client.HTTPConnection(host, port, timeout=TIMEOUT_S)
    import ssl

    # The certificate is for the name that clients use, from an authority that perhaps only they know.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return http.client.HTTPSConnection(host, port, timeout=TIMEOUT_S, context=context)
