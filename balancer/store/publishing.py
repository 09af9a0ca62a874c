"""How a configuration file becomes the fleet's configuration: once, and never backwards by accident."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import msgspec

from balancer import document
from balancer.domain import Configuration
from balancer.errors import ConfigurationError, ConflictError
from balancer.store.credentials import Sealer, seal_configuration
from balancer.store.registry import Registry, Snapshot

_TRIES = 5


class Publication(msgspec.Struct, frozen=True, kw_only=True):
    """What came of a file. `revision` stands now; `earlier` is the one that this file was, if it was ignored."""

    result: Literal["published", "unchanged", "ignored"]
    revision: int
    differences: tuple[str, ...] = ()
    earlier: int = 0


async def plan(
    registry: Registry, configuration: Configuration, sealer: Sealer | None, *, force: bool
) -> tuple[Publication, Configuration, Snapshot | None]:
    """What publishing the file would do, its sealed configuration, and the snapshot that stands."""
    base = await registry.current()
    standing = base.configuration if base else Configuration()
    revision = base.revision if base else 0
    digest = document.digest(configuration)
    sealed = seal_configuration(configuration, sealer, previous=standing)
    differences = tuple(document.diff(standing, sealed))
    if base and ((base.digest == digest and not force) or not differences):
        return Publication(result="unchanged", revision=revision), sealed, base
    earlier = await registry.revision_of(digest)
    if base and earlier and not force:
        ignored = Publication(result="ignored", revision=revision, differences=differences, earlier=earlier)
        return ignored, sealed, base
    return Publication(result="published", revision=revision + 1, differences=differences), sealed, base


async def publish_file(
    registry: Registry, configuration: Configuration, sealer: Sealer | None, *, force: bool = False
) -> Publication:
    """Publishes a file's configuration if the registry has not had it.

    Equal to what stands: nothing happens. Equal to an earlier file: ignored, so that a restarting old process does not
    revert the fleet; `force` publishes it all the same.
    """
    digest = document.digest(configuration)
    for _ in range(_TRIES):
        publication, sealed, base = await plan(registry, configuration, sealer, force=force)
        if publication.result != "published":
            return publication
        try:
            snapshot = await registry.publish(sealed, base, digest)
        except ConflictError:
            continue  # Somebody else was quicker: look again at what stands now.
        return msgspec.structs.replace(publication, revision=snapshot.revision)
    raise ConflictError("others keep publishing in between; try again")


async def publish_edit(registry: Registry, edit: Callable[[Configuration], Configuration]) -> Snapshot:
    """Publishes what `edit` makes of the configuration that stands; the snapshot that then stands.

    `edit` is asked again when somebody else was quicker, may raise, and changes no credential.
    """
    for _ in range(_TRIES):
        base = await registry.current()
        if base is None:
            raise ConfigurationError("nothing has been published yet: there is nothing to edit")
        changed = edit(base.configuration)
        if changed == base.configuration:
            return base
        try:
            return await registry.publish(changed, base)
        except ConflictError:
            continue
    raise ConflictError("others keep publishing in between; try again")


async def roll_back(registry: Registry, revision: int) -> Publication:
    """Publishes what an earlier revision held as a new one."""
    base = await registry.current()
    old = await registry.load(revision)
    if base is None or old is None:
        raise ConfigurationError(f"revision {revision} is not kept in the registry")
    differences = tuple(document.diff(base.configuration, old.configuration))
    if not differences:
        return Publication(result="unchanged", revision=base.revision)
    snapshot = await registry.publish(old.configuration, base, old.digest)
    return Publication(result="published", revision=snapshot.revision, differences=differences)
