"""The store of one command: the Redis that was named, or the embedded server, with what seals credentials."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import msgspec

from balancer.config import Settings
from balancer.store import embedded
from balancer.store.credentials import Sealer
from balancer.store.topology import Topology


class Store(msgspec.Struct, frozen=True, kw_only=True):
    """Where the store is, and how literal credentials are sealed (None: they are refused)."""

    url: str
    sealer: Sealer | None
    held: embedded.EmbeddedStore | None


@contextlib.contextmanager
def opened(settings: Settings) -> Iterator[Store]:
    """The store, held while the block runs. The embedded server starts if nobody else runs it."""
    also = settings.secret_key_also
    sealer = Sealer(settings.secret_key, also) if settings.secret_key else None
    if settings.redis:
        Topology(settings.redis)  # Refuses a malformed URL before anything starts.
        yield Store(url=settings.redis, sealer=sealer, held=None)
        return
    with embedded.acquire(settings.data_dir) as held:
        if sealer is None:
            sealer = Sealer(embedded.secret_key(settings.data_dir), also)
        yield Store(url=held.url, sealer=sealer, held=held)
