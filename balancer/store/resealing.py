"""All that Redis keeps sealed, sealed anew with the key that seals: snapshots of the configuration, and grants.

The configuration that stands is published once more, as a new revision in which nothing else differs: no rule begins
anew, and every worker takes over, and leaves on its disk, what the new key opens.
"""

from __future__ import annotations

import msgspec

from balancer.domain import Configuration
from balancer.errors import ConfigurationError, ConflictError
from balancer.store.changes import by_user
from balancer.store.credentials import Place, Sealer, is_sealed, map_values
from balancer.store.grants import Grants
from balancer.store.registry import KEPT_SNAPSHOTS, Registry

_TRIES = 5


class Resealed(msgspec.Struct, frozen=True, kw_only=True):
    """What was sealed anew: earlier revisions and grants by number, and the revision that stands now.

    `unopened` names what no key at hand opens; it is left as it is.
    """

    revision: int
    snapshots: int
    grants: int
    unopened: tuple[str, ...]


class _Counting:
    """Seals values anew, and counts."""

    def __init__(self, sealer: Sealer) -> None:
        self._sealer = sealer
        self.changed = 0
        self.unopened = 0

    def value(self, value: str, place: Place) -> str:
        """The value as it is to be; as it is where nothing opens it."""
        if not is_sealed(value):
            return value
        try:
            anew = self._sealer.resealed(value, place)
        except ConfigurationError:
            self.unopened += 1
            return value
        self.changed += anew != value
        return anew

    def configuration(self, configuration: Configuration) -> Configuration:
        """The configuration with all its values so."""
        providers = tuple(map_values(provider, self.value) for provider in configuration.providers)
        return msgspec.structs.replace(configuration, providers=providers)


async def reseal(registry: Registry, grants: Grants, sealer: Sealer) -> Resealed:
    """Seals everything anew that another key has sealed. Done again, it changes nothing more.

    Raises ConfigurationError when no key at hand opens what the configuration that stands holds, or a grant.
    """
    snapshots = renewed = 0
    for _ in range(_TRIES):
        revision = await _standing(registry, sealer)
        count, unopened = await _earlier(registry, sealer, revision)
        snapshots += count
        renewed += await _grants(grants, sealer)
        if (await registry.head()).revision == revision:  # Else somebody has published, perhaps with the old key.
            return Resealed(revision=revision, snapshots=snapshots, grants=renewed, unopened=unopened)
    raise ConflictError("others keep publishing in between; try again")


async def _standing(registry: Registry, sealer: Sealer) -> int:
    for _ in range(_TRIES):
        base = await registry.current()
        if base is None:
            return 0
        counting = _Counting(sealer)
        configuration = counting.configuration(base.configuration)
        if counting.unopened:
            raise ConfigurationError(
                f"revision {base.revision}, which stands, holds credentials that neither BALANCER_SECRET_KEY nor "
                "BALANCER_SECRET_KEY_ALSO opens"
            )
        if not counting.changed:
            return base.revision
        try:
            deed = by_user("seal all credentials anew")
            return (await registry.publish(configuration, base, base.digest, deed=deed)).revision
        except ConflictError:
            continue
    raise ConflictError("others keep publishing in between; try again")


async def _earlier(registry: Registry, sealer: Sealer, standing: int) -> tuple[int, tuple[str, ...]]:
    """How many earlier revisions were sealed anew, and those that could not be."""
    renewed, unopened = 0, []
    for revision in range(max(1, standing - KEPT_SNAPSHOTS), standing):
        snapshot = await registry.load(revision)
        if snapshot is None:
            continue
        counting = _Counting(sealer)
        configuration = counting.configuration(snapshot.configuration)
        if counting.changed:
            await registry.rewrite(msgspec.structs.replace(snapshot, configuration=configuration))
            renewed += 1
        if counting.unopened:
            unopened.append(f"revision {revision}")
    return renewed, tuple(unopened)


async def _grants(grants: Grants, sealer: Sealer) -> int:
    renewed = 0
    _, changes = await grants.look()
    for provider in changes:
        for _ in range(_TRIES):
            grant = await grants.load(provider)
            if grant is None:
                break
            access = sealer.resealed(grant.access, (provider, "grant.access"))
            refresh = sealer.resealed(grant.refresh, (provider, "grant.refresh"))
            if (access, refresh) == (grant.access, grant.refresh):
                break
            if await grants.reseal(provider, grant, access, refresh):
                renewed += 1
                break
    return renewed
