"""How a provider is asked for its health: a GET with its own credential, and what its answer means."""

from __future__ import annotations

from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from balancer.dialects.headers import request_headers
from balancer.dialects.styles import ACCOUNTS
from balancer.domain import Provider
from balancer.errors import UpstreamError
from balancer.gateway.attempts import Providers
from balancer.gateway.messages import Upstream, UpstreamRequest


def means_alive(status: int) -> bool:
    """True for an answer of one that can serve.

    Redirects and complaints about the request (404, 405) come from a server that is up: a wrong path must not take a
    good provider out. 429 is for the cooldowns of real requests. A refused credential or a 5xx is what requests would
    meet too; 408 and 421 are answers of somebody in between.
    """
    return 200 <= status < 500 and status not in (401, 403, 407, 408, 421)


class HealthProbe:
    """Asks providers through the upstream client."""

    def __init__(self, providers: Providers, upstream: Upstream) -> None:
        self._providers = providers
        self._upstream = upstream

    async def __call__(self, provider: Provider) -> bool:
        """True when the provider answers as one that can serve. Raises BalancerError when its secrets are not there."""
        token = "" if provider.no_key_required else self._providers.access_token(provider)
        accounts = ACCOUNTS[provider.api_style]
        headers = accounts.credential_headers(provider, token, lambda name: "") | self._providers.headers(provider)
        request = UpstreamRequest(
            provider=provider.name,
            method="GET",
            url=health_url(provider, self._providers.query(provider)),
            headers=request_headers((), headers, identity_only=True),
            body=b"",
            proxy_url=self._providers.proxy_url(provider),
            timeouts=provider.timeouts,
            timeout_s=provider.timeout,
        )
        try:
            response = await self._upstream.send(request)
        except UpstreamError:
            return False
        await response.close()
        return means_alive(response.status)


def health_url(provider: Provider, own: dict[str, str]) -> str:
    """The health path on the provider's host (not below its base's path), with its query parameters."""
    base, path = urlsplit(provider.api_base), urlsplit(provider.health.path)
    parameters = [(k, v) for k, v in parse_qsl(path.query, keep_blank_values=True) if k not in own]
    query = urlencode([*parameters, *own.items()])
    return urlunsplit((base.scheme, base.netloc, f"/{path.path.lstrip('/')}", query, ""))
