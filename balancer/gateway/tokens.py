"""How a token endpoint is asked: one POST through the upstream client, its answer read up to a limit."""

from __future__ import annotations

import asyncio

from balancer import oauth
from balancer.dialects.headers import request_headers
from balancer.domain import Provider
from balancer.encoding import DecodeError, decoded
from balancer.errors import UpstreamAnswerError, UpstreamTimeoutError
from balancer.gateway.attempts import Secrets
from balancer.gateway.messages import Upstream, UpstreamRequest
from balancer.gateway.opening import described
from balancer.store.keeper import ASK_S


class TokenEndpoint:
    """Asks the token endpoints of providers, by way of their proxies."""

    def __init__(self, secrets: Secrets, upstream: Upstream) -> None:
        self._secrets = secrets
        self._upstream = upstream

    async def __call__(
        self, provider: Provider, renewal: oauth.Renewal, refresh_token: str, now_ms: int
    ) -> oauth.Renewed | oauth.Refused:
        """What it answers; redirects are not followed. Raises UpstreamError, ConfigurationError."""
        headers, body = oauth.request_of(renewal, refresh_token)
        request = UpstreamRequest(
            provider=f"the token endpoint of {provider.name}",
            method="POST",
            url=renewal.token_url,
            headers=request_headers((), dict(headers), identity_only=True),
            body=body,
            proxy_url=self._secrets.proxy_url(provider),
            timeouts=provider.timeouts,
            timeout_s=ASK_S,
        )
        try:
            async with asyncio.timeout(ASK_S):
                answer = await self._upstream.send(request)
                try:
                    data, chunk = b"", await answer.read()
                    while chunk:
                        data += chunk
                        if len(data) > oauth.LONGEST_ANSWER_BYTES:
                            raise UpstreamAnswerError(f"{request.provider} answered with more than tokens need")
                        chunk = await answer.read()
                finally:
                    await answer.close()
        except TimeoutError:
            raise UpstreamTimeoutError(f"{request.provider} did not answer in time") from None
        try:
            data = decoded(data, described(answer.headers)[1], oauth.LONGEST_ANSWER_BYTES)
        except DecodeError:
            data = b""
        return oauth.read(answer.status, answer.headers, data, now_ms)
