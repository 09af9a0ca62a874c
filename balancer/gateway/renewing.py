"""The same request once more, with another access token, where an upstream has refused the one that it came with."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable

from balancer.dialects.paths import Route
from balancer.domain import Provider
from balancer.gateway.clock import Clock
from balancer.gateway.messages import Upstream
from balancer.gateway.opening import Opening, opening_s
from balancer.gateway.outgoing import Outgoing

Renew = Callable[[Provider, str], Awaitable[bool]]
"""Has another access token of a provider than the one that was refused; False when there is none."""
_RENEW_S = 20.0
"""More than another one is waited for."""


class Renewing:
    """Sends requests again."""

    def __init__(self, upstream: Upstream, renew: Renew) -> None:
        self._upstream = upstream
        self._renew = renew

    async def again(
        self,
        clock: Clock,
        route: Route,
        provider: Provider,
        refused: Outgoing,
        answer: Opening,
        made: Callable[[], Outgoing],
    ) -> tuple[Outgoing, Opening]:
        """What was sent at last, and its answer: those at hand where there is no other token.

        `made` makes the request anew. The client's time is what it was; of what is counted this is one attempt.
        """
        with clock.until_first_byte(most_s=_RENEW_S):
            if not await self._renew(provider, refused.token):
                return refused, answer
        outgoing = made()
        if outgoing.token == refused.token:
            return refused, answer
        with clock.until_first_byte(most_s=opening_s(outgoing.request.timeouts)):
            again = Opening(await self._upstream.send(outgoing.request))
            try:
                await again.look(outgoing.style or route.dialect.name, round(time.time() * 1000))
            except BaseException:
                await again.close()
                raise
        await answer.close()
        return outgoing, again
