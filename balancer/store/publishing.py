"""How a configuration file becomes the fleet's configuration: once, and never backwards by accident."""

from __future__ import annotations

import asyncio
from typing import Literal

import msgspec

from balancer import document
from balancer.document import editing
from balancer.document.editing import Edit
from balancer.domain import Configuration
from balancer.errors import ConfigurationError, ConflictError
from balancer.store.changes import UNNAMED, Deed
from balancer.store.credentials import Sealer, seal_configuration
from balancer.store.registry import Registry, Snapshot

_TRIES = 20


class Publication(msgspec.Struct, frozen=True, kw_only=True):
    """What came of a file. `revision` stands now; `earlier` is the one that this file was, if it was ignored."""

    result: Literal["published", "unchanged", "ignored"]
    revision: int
    differences: tuple[str, ...] = ()
    earlier: int = 0


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What publishing a file would do: its sealed configuration, what of it is in no file, and what stands."""

    publication: Publication
    configuration: Configuration
    additions: tuple[str, ...]
    base: Snapshot | None


async def plan(
    registry: Registry, configuration: Configuration, sealer: Sealer | None, *, force: bool, prune: bool = False
) -> Plan:
    """What publishing the file would do. What was made over the admin API is kept, unless `prune` has it go."""
    base = await registry.current()
    standing = base.configuration if base else Configuration()
    revision = base.revision if base else 0
    digest = document.digest(configuration)
    kept = base.additions if base and not prune else ()
    additions = tuple(sorted(set(kept) - editing.names(configuration)))
    merged = editing.merged(configuration, standing, additions) if additions else configuration
    sealed = seal_configuration(merged, sealer, previous=standing)
    differences = tuple(document.diff(standing, sealed))

    def planned(result: Literal["published", "unchanged", "ignored"], revision: int, earlier: int = 0) -> Plan:
        told = () if result == "unchanged" else differences
        publication = Publication(result=result, revision=revision, differences=told, earlier=earlier)
        return Plan(publication=publication, configuration=sealed, additions=additions, base=base)

    is_the_last = base is not None and base.digest == digest
    if base and (not differences or (is_the_last and not force and not prune)):
        return planned("unchanged", revision)
    earlier = await registry.revision_of(digest)
    if base and earlier and not is_the_last and not force:
        return planned("ignored", revision, earlier)
    return planned("published", revision + 1)


async def publish_file(
    registry: Registry,
    configuration: Configuration,
    sealer: Sealer | None,
    *,
    force: bool = False,
    prune: bool = False,
    deed: Deed = UNNAMED,
) -> Publication:
    """Publishes a file's configuration if the registry has not had it.

    Equal to what stands: nothing happens. Equal to an earlier file: ignored, so that a restarting old process does not
    revert the fleet; `force` publishes it all the same.
    """
    digest = document.digest(configuration)
    for _ in range(_TRIES):
        planned = await plan(registry, configuration, sealer, force=force, prune=prune)
        if planned.publication.result != "published":
            return planned.publication
        try:
            snapshot = await registry.publish(
                planned.configuration, planned.base, digest, additions=planned.additions, deed=deed
            )
        except ConflictError:
            continue  # Somebody else was quicker: look again at what stands now.
        return msgspec.structs.replace(planned.publication, revision=snapshot.revision)
    raise ConflictError("others keep publishing in between; try again")


class Edition(msgspec.Struct, frozen=True, kw_only=True):
    """What came of an edit: the revision that stands, its configuration, and what the edit changes of it.

    Of a dry run, `configuration` is the one that would stand.
    """

    revision: int
    configuration: Configuration
    differences: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


async def publish_edit(
    registry: Registry,
    edit: Edit,
    deed: Deed,
    *,
    sealer: Sealer | None,
    is_dry: bool = False,
    may_begin: bool = False,
) -> Edition:
    """Publishes what `edit` makes of the configuration that stands; with `is_dry` only tells what it would.

    `edit` is asked again when somebody else was quicker, in a thread, and may raise. With `may_begin` it may be the
    first configuration of all. What it adds is noted as being in no file.
    """
    for _ in range(_TRIES):
        base = await registry.current()
        if base is None and not may_begin:
            raise ConfigurationError("nothing has been published yet: there is nothing to edit")
        edited = await asyncio.to_thread(edit, base.configuration if base else Configuration())
        before = edited.before
        after = seal_configuration(edited.after, sealer, previous=before)
        edition = Edition(
            revision=base.revision if base else 0,
            configuration=after,
            differences=tuple(await asyncio.to_thread(document.diff, before, after)),
            warnings=edited.warnings,
        )
        if is_dry or after == before:
            return edition
        known = editing.names(after)
        additions = known & ({*(base.additions if base else ())} | (known - editing.names(before)))
        made_from = msgspec.structs.replace(base, configuration=before) if base else None
        try:
            snapshot = await registry.publish(after, made_from, additions=tuple(sorted(additions)), deed=deed)
        except ConflictError:
            continue
        return msgspec.structs.replace(edition, revision=snapshot.revision)
    raise ConflictError("others keep publishing in between; try again")


async def roll_back(registry: Registry, revision: int, deed: Deed = UNNAMED) -> Publication:
    """Publishes what an earlier revision held as a new one."""
    base = await registry.current()
    old = await registry.load(revision)
    if base is None or old is None:
        raise ConfigurationError(f"revision {revision} is not kept in the registry")
    differences = tuple(document.diff(base.configuration, old.configuration))
    if not differences:
        return Publication(result="unchanged", revision=base.revision)
    snapshot = await registry.publish(old.configuration, base, old.digest, additions=old.additions, deed=deed)
    return Publication(result="published", revision=snapshot.revision, differences=differences)
