"""What a worker has last seen of a pool's services, some seconds ago: what smart routing asks for, without Redis."""

from __future__ import annotations

from balancer.domain import Provider, Service
from balancer.store.calls import share_of
from balancer.store.local import Picture
from balancer.store.registry import Directory


class Seen:
    """The services of a pool as in its last picture."""

    def __init__(self, directory: Directory, pool: str, picture: Picture) -> None:
        self._directory = directory
        self._pool = pool
        self._picture = picture

    def first_token_ms(self, service: Service) -> int | None:
        """How long the service takes to its first token, a running mean over the fleet; None before it was measured."""
        counters = self._picture.service(service.id).counters
        return counters["first_token"] // 1000 if counters["measured"] else None

    def used_percent(self, service: Service) -> int | None:
        """How much of what may be in flight on the service, or its provider, is: the larger part. None without a limit.

        Above 100 while more is in flight than a limit allows that was lowered since.
        """
        parts = []
        if service.limits.in_flight:
            parts.append((self._picture.service(service.id).counters["in_flight"], service.limits.in_flight))
        provider = self._directory.provider(service.provider)
        if provider is not None and (limit := self._limit(provider)) > 0:
            parts.append((self._picture.meter(provider.uuid).counters["in_flight"], limit))
        return max((used * 100 // limit for used, limit in parts), default=None)

    def _limit(self, provider: Provider) -> int:
        return share_of(provider.limits.in_flight, provider.limits, self._pool)
