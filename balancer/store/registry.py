"""The registry: immutable snapshots of the configuration by revision, and a head that says which one stands.

Publishing has three steps: write the snapshot if the head is still the one it was made from; raise the fence of every
changed rule in its pool; move the head. A publisher that dies in between is completed by the next one, or by a worker
that meets the raised fence.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import redis.asyncio

from balancer import document, log, stored
from balancer.domain import Configuration, PoolSettings, Provider, Rule, RuleDefinition
from balancer.errors import BalancerError, ConfigurationError, ConflictError, StoreUnavailableError
from balancer.store import changes, keys
from balancer.store.calls import Definer, fence_arguments
from balancer.store.connection import Commands, WrappedClient, translated
from balancer.store.scripts import load

KEPT_SNAPSHOTS = 200
KEPT_DIGESTS = 200
POLL_S = 1.0
_RULES_PER_CALL = 100
_PATIENCE_S = 1.0
_LOOK_S = 0.01
_NOTHING_YET = "no configuration has been published yet: run `balancer apply FILE` or serve --config FILE"

_EMPTIED = "the registry is empty, and had a configuration: publish it again, `balancer apply FILE`"


class Head(msgspec.Struct, frozen=True, kw_only=True):
    """Which revision stands (0: none), the digest of the file it was made of, and a publication under way (0: none)."""

    revision: int = 0
    digest: str = ""
    pending: int = 0


class Tombstone(msgspec.Struct, frozen=True, kw_only=True):
    """A rule that has left a pool with this revision."""

    pool: str
    rule: str


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """A configuration under its revision. Credentials in it are references or sealed."""

    revision: int
    configuration: Configuration
    digest: str = ""
    made_at: str = ""
    rule_revisions: dict[str, int] = {}
    tombstones: tuple[Tombstone, ...] = ()
    edits: dict[str, int] = {}
    """For each rule the revision that last changed the rule itself, and not only what it refers to."""
    additions: tuple[str, ...] = ()
    """What was made over the admin API and is in no file: `rule x`, `provider y`, `scenario z`."""

    def rule_revision(self, uuid: str) -> int:
        """The revision that last changed anything the rule's select reads."""
        return self.rule_revisions.get(uuid, self.revision)

    def definition(self, rule: Rule, definer: Definer) -> RuleDefinition:
        """What raising the rule's fence writes; `definer` is the configuration's."""
        revision = self.rule_revision(rule.uuid)
        is_edited = self.edits.get(rule.uuid, revision) == revision
        return definer.definition(rule, revision, is_edited=is_edited)


class Directory(msgspec.Struct, frozen=True, kw_only=True, weakref=True):
    """A snapshot with its indexes, as the request path reads it."""

    snapshot: Snapshot
    by_model: dict[tuple[str, str], Rule]
    by_uuid: dict[str, Rule]
    by_scenario: dict[str, tuple[Rule, ...]]
    catch_alls: dict[str, Rule]
    """By scenario what serves the models that no rule names."""
    providers: dict[str, Provider]
    pools: frozenset[str]
    """The pools of all rules."""
    definer: Definer

    @property
    def revision(self) -> int:
        """The snapshot's revision."""
        return self.snapshot.revision

    @property
    def configuration(self) -> Configuration:
        """The snapshot's configuration."""
        return self.snapshot.configuration

    def rule(self, scenario: str, model: str) -> Rule | None:
        """The active rule of that scenario and request_model, the first one wins; else what serves all others."""
        return self.by_model.get((scenario, model)) or self.catch_alls.get(scenario)

    def rules(self, scenario: str) -> tuple[Rule, ...]:
        """The active rules of a scenario, in order."""
        return self.by_scenario.get(scenario, ())

    def definition(self, rule: Rule) -> RuleDefinition:
        """What raising the rule's fence writes."""
        return self.snapshot.definition(rule, self.definer)

    def provider(self, uuid: str) -> Provider | None:
        """The provider of that uuid."""
        return self.providers.get(uuid)


def directory_of(snapshot: Snapshot) -> Directory:
    """The snapshot, indexed."""
    by_model: dict[tuple[str, str], Rule] = {}
    for rule in snapshot.configuration.rules:
        if rule.active:
            by_model.setdefault((rule.scenario, rule.request_model), rule)
    by_scenario: dict[str, list[Rule]] = {}
    for rule in by_model.values():
        by_scenario.setdefault(rule.scenario, []).append(rule)
    return Directory(
        snapshot=snapshot,
        by_model=by_model,
        by_uuid={rule.uuid: rule for rule in snapshot.configuration.rules},
        by_scenario={scenario: tuple(rules) for scenario, rules in by_scenario.items()},
        catch_alls={
            scenario.scenario: catch_all
            for scenario in snapshot.configuration.scenarios
            if (catch_all := snapshot.configuration.catch_all(scenario.scenario))
        },
        pools=frozenset(rule.pool for rule in snapshot.configuration.rules),
        definer=Definer(snapshot.configuration),
        providers={provider.uuid: provider for provider in snapshot.configuration.providers},
    )


class _Stored(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot as JSON in Redis."""

    revision: int
    digest: str
    made_at: str
    rule_revisions: dict[str, int]
    tombstones: tuple[Tombstone, ...]
    document: dict[str, Any]
    edits: dict[str, int] = {}
    additions: tuple[str, ...] = ()


class Registry:
    """Reads and publishes snapshots. Raises StoreUnavailableError when Redis does not answer."""

    def __init__(self, client: Commands | redis.asyncio.Redis, scripts_dir: str = "") -> None:
        self._commands = client if isinstance(client, Commands) else WrappedClient(client)
        self._scripts_dir = scripts_dir

    async def head(self) -> Head:
        """The head as it is now."""
        with translated("reading the registry"):
            values: Any = await self._commands.run(keys.HEAD, "HGETALL", keys.HEAD)
        return Head(
            revision=int(values.get(b"revision", 0)),
            digest=values.get(b"digest", b"").decode(),
            pending=int(values.get(b"pending", 0)),
        )

    async def load(self, revision: int) -> Snapshot | None:
        """The snapshot of a revision; None when it is not, or no longer, kept.

        Raises ConfigurationError when it cannot be read.
        """
        with translated("reading the registry"):
            text: Any = await self._commands.run(keys.HEAD, "GET", keys.snapshot(revision))
        if text is None:
            return None
        # A configuration of thousands of rules takes long to read: requests must not wait for that.
        return await asyncio.to_thread(decoded, text)

    async def current(self) -> Snapshot | None:
        """The snapshot that stands, None before the first."""
        for _ in range(3):
            head = await self.head()
            if head.revision == 0:
                return None
            if snapshot := await self.load(head.revision):
                return snapshot
        raise StoreUnavailableError("the registry's head names a snapshot that is not there")

    async def rewrite(self, snapshot: Snapshot) -> None:
        """Writes a kept snapshot as its credentials are sealed by now; nothing where it is no longer kept."""
        with translated("writing the registry"):
            key = keys.snapshot(snapshot.revision)
            await self._commands.run(keys.HEAD, "SET", key, encoded(snapshot), "XX")

    async def revision_of(self, digest: str) -> int:
        """The revision that was made of a file, 0 when the registry has not had it."""
        with translated("reading the registry"):
            value: Any = await self._commands.run(keys.DIGESTS, "HGET", keys.DIGESTS, digest)
        return int(value or 0)

    async def publish(
        self,
        configuration: Configuration,
        base: Snapshot | None,
        digest: str = "",
        *,
        additions: tuple[str, ...] | None = None,
        deed: changes.Deed = changes.UNNAMED,
    ) -> Snapshot:
        """Publishes a configuration made from `base`; its credentials must be sealed already.

        `additions` is what of it is in no file (None: what of `base` was), `deed` who does this. Raises ConflictError
        when another revision was published since `base` was read.
        """
        await self.complete_pending()
        revision = base.revision + 1 if base else await self._first_revision(configuration)
        draft = Snapshot(
            revision=revision,
            configuration=configuration,
            digest=digest,
            made_at=datetime.now(UTC).isoformat(timespec="seconds"),
            additions=(base.additions if base else ()) if additions is None else additions,
        )
        snapshot = await self._publish(draft, base, base.revision if base else 0, deed)
        while base is None and (above := await self._first_revision(configuration)) > snapshot.revision + 1:
            # The registry was emptied, and workers have just put their rules back under the revisions that they had.
            draft = msgspec.structs.replace(draft, revision=above)
            snapshot = await self._publish(draft, None, snapshot.revision, deed)
        return snapshot

    async def _publish(self, draft: Snapshot, base: Snapshot | None, standing: int, deed: changes.Deed) -> Snapshot:
        """Publishes the draft, if the standing revision is still the head's."""
        # Of thousands of rules this takes a second, for which the worker's requests must not wait.
        snapshot, text, change = await asyncio.to_thread(_prepared, draft, base, deed)
        word, found = await self._run(
            "publish",
            {"head": keys.HEAD, "snapshot": keys.snapshot(draft.revision), "changes": keys.CHANGES},
            {"base": standing, "revision": draft.revision, "document": text, **changes.arguments(change)},
        )
        if word != b"prepared":
            raise ConflictError(f"revision {int(found)} was published in between; read it and try again")
        await self._finish(snapshot)
        return snapshot

    async def complete_pending(self) -> None:
        """Finishes a publication that somebody has left half-way. Doing it beside its live publisher does no harm."""
        head = await self.head()
        if head.pending and (snapshot := await self.load(head.pending)):
            await self._finish(snapshot)

    async def raise_fences(self, settings: PoolSettings, revision: int, definitions: Sequence[RuleDefinition]) -> None:
        """Raises the fences of rules in a pool, and says how its events are recorded as of that revision."""
        for start in range(0, max(1, len(definitions)), _RULES_PER_CALL):
            await self._run(
                "fence",
                {
                    "services": keys.services(settings.name),
                    "partitions": keys.partitions(settings.name),
                    "decisions": keys.decisions(settings.name),
                },
                {"now_ms": 0, "epoch": 0, "position": 0, **fence_arguments(settings, revision)},
                [msgspec.json.encode(d).decode() for d in definitions[start : start + _RULES_PER_CALL]],
            )

    async def _finish(self, snapshot: Snapshot) -> None:
        by_pool: dict[str, list[RuleDefinition]] = {name: [] for name in snapshot.configuration.pool_names()}
        for tombstone in snapshot.tombstones:
            gone = RuleDefinition(rule=tombstone.rule, revision=snapshot.revision)
            by_pool.setdefault(tombstone.pool, []).append(gone)
        definer = Definer(snapshot.configuration)
        for rule in snapshot.configuration.rules:
            if snapshot.rule_revision(rule.uuid) == snapshot.revision:
                by_pool.setdefault(rule.pool, []).append(snapshot.definition(rule, definer))
        for pool, definitions in by_pool.items():
            await self.raise_fences(snapshot.configuration.pool(pool), snapshot.revision, definitions)
        await self._run(
            "commit",
            {
                "head": keys.HEAD,
                "digests": keys.DIGESTS,
                "outdated": keys.snapshot(max(0, snapshot.revision - KEPT_SNAPSHOTS)),
            },
            {"revision": snapshot.revision, "digest": snapshot.digest, "kept": KEPT_DIGESTS, "feed": keys.FEED},
        )

    async def _first_revision(self, configuration: Configuration) -> int:
        """1, or more than any fence that an earlier registry has left in the pools."""
        highest = 0
        with translated("reading the fences"):
            for rule in configuration.rules:
                key = keys.partitions(rule.pool)
                fence: Any = await self._commands.run(key, "HGET", key, f"rule:{rule.uuid}")
                highest = max(highest, stored.rule(fence.decode())["revision"] if fence else 0)
        return highest + 1

    async def _run(
        self, name: str, names: Mapping[str, str], arguments: Mapping[str, str | int], rest: Sequence[str | int] = ()
    ) -> list[Any]:
        script = load(name, self._scripts_dir)
        with translated(f"running {name}"):
            key = next(iter(names.values()))
            reply: Any = await self._commands.run(key, "EVAL", script.source, *script.command(names, arguments, rest))
        return list(reply)


def _prepared(draft: Snapshot, base: Snapshot | None, deed: changes.Deed) -> tuple[Snapshot, str, changes.Change]:
    """The draft with what follows from `base`, as it is stored, and what is noted of it."""
    configuration, revision = draft.configuration, draft.revision
    snapshot = msgspec.structs.replace(
        draft,
        rule_revisions=_rule_revisions(configuration, base, revision),
        tombstones=_tombstones(configuration, base),
        edits=_edits(configuration, base, revision),
    )
    before = base.configuration if base else Configuration()
    return snapshot, encoded(snapshot).decode(), changes.of_revision(deed, revision, before, configuration)


def encoded(snapshot: Snapshot) -> bytes:
    """The snapshot as it is stored, defaults left out."""
    return msgspec.json.encode(
        _Stored(
            revision=snapshot.revision,
            digest=snapshot.digest,
            made_at=snapshot.made_at,
            rule_revisions=snapshot.rule_revisions,
            tombstones=snapshot.tombstones,
            edits=snapshot.edits,
            additions=snapshot.additions,
            document=document.write(snapshot.configuration),
        )
    )


def decoded(text: bytes) -> Snapshot:
    """The snapshot that was stored so. Raises ConfigurationError for what is none."""
    try:
        stored = msgspec.json.decode(text, type=_Stored)
    except msgspec.DecodeError as exc:
        raise ConfigurationError(f"the snapshot of the configuration cannot be read: {exc}") from exc
    return Snapshot(
        revision=stored.revision,
        configuration=document.read(stored.document, door="stored").configuration,
        digest=stored.digest,
        made_at=stored.made_at,
        rule_revisions=stored.rule_revisions,
        tombstones=stored.tombstones,
        edits=stored.edits,
        additions=stored.additions,
    )


def _rule_revisions(new: Configuration, base: Snapshot | None, revision: int) -> dict[str, int]:
    """The new revision for rules whose select reads something else now, the old one for the others."""
    if base is None:
        return {rule.uuid: revision for rule in new.rules}
    before = {rule.uuid: document.select_view(base.configuration, rule) for rule in base.configuration.rules}
    return {
        rule.uuid: base.rule_revision(rule.uuid)
        if before.get(rule.uuid) == document.select_view(new, rule)
        else revision
        for rule in new.rules
    }


def _edits(new: Configuration, base: Snapshot | None, revision: int) -> dict[str, int]:
    """The new revision for rules that are not what they were."""
    before = {rule.uuid: rule for rule in base.configuration.rules} if base else {}
    known = base.edits if base else {}
    return {
        rule.uuid: known.get(rule.uuid, revision) if before.get(rule.uuid) == rule else revision for rule in new.rules
    }


def _tombstones(new: Configuration, base: Snapshot | None) -> tuple[Tombstone, ...]:
    """The rules that are no longer in the pool where they were."""
    pools = {rule.uuid: rule.pool for rule in new.rules}
    return tuple(
        Tombstone(pool=rule.pool, rule=rule.uuid)
        for rule in (base.configuration.rules if base else ())
        if pools.get(rule.uuid) != rule.pool
    )


def kept_file(outbox_dir: str) -> Path | None:
    """Where workers keep the snapshot that stands, for those that start while Redis is away; None without a folder."""
    return Path(outbox_dir).expanduser() / "configuration.json" if outbox_dir else None


class Follower:
    """A worker's copy of the head: polled every second, sooner when the feed announces one.

    With a file, the copy is kept there too: a worker that starts while Redis is away begins with it.
    """

    def __init__(self, client: Commands | redis.asyncio.Redis, registry: Registry, kept: Path | None = None) -> None:
        self._commands = client if isinstance(client, Commands) else WrappedClient(client)
        self._registry = registry
        self._kept = kept
        self.directory: Directory | None = None
        """The newest snapshot this worker has, None before the first."""
        self._loading = asyncio.Lock()
        self._wake = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._failure = _NOTHING_YET
        self.is_bereft = False
        """True when the registry is empty, and had a configuration that is known here."""
        self._looked_at = float("-inf")

    @property
    def failure(self) -> str:
        """Why there is no newer (or no) snapshot; empty when all is well."""
        return self._failure

    async def start(self) -> None:
        """Reads the head once, and follows it in the background from then on."""
        try:
            await self.refresh()
        except BalancerError as exc:
            self._note(exc)
            if self._kept and isinstance(exc, StoreUnavailableError):
                await self._begin_with(self._kept)
        self._tasks = [asyncio.create_task(self._poll()), asyncio.create_task(self._listen())]

    async def _begin_with(self, kept: Path) -> None:
        """Takes over what an earlier worker has left, if there is such a thing."""
        try:
            self.directory = directory_of(decoded(await asyncio.to_thread(kept.read_bytes)))
        except FileNotFoundError:
            return
        except (OSError, ConfigurationError) as exc:
            log.warning("cannot read the configuration that was kept", file=str(kept), reason=str(exc))
        else:
            log.warning("beginning with the configuration that was kept", revision=self.directory.revision)

    async def _keep(self, kept: Path, snapshot: Snapshot) -> None:
        """Leaves the snapshot to workers that start while Redis is away. Its credentials are references or sealed."""
        try:
            await asyncio.to_thread(lambda: _replace(kept, encoded(snapshot)))
        except OSError as exc:
            log.warning("cannot keep the configuration", file=str(kept), reason=exc.strerror)

    async def close(self) -> None:
        """Stops following."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def reach(self, revision: int, timeout_s: float) -> None:
        """Returns when this worker's snapshot is of that revision or newer.

        The fence rises before the head: while the head lags, its publisher is waited for, and after a second its work
        is completed. Raises StoreUnavailableError after the time.
        """
        loop = asyncio.get_running_loop()
        started = loop.time()
        try:
            async with asyncio.timeout(timeout_s):
                while not self._has(revision):
                    await self._look(revision, completes=loop.time() - started > _PATIENCE_S)
                    if not self._has(revision):
                        await asyncio.sleep(_LOOK_S)
        except TimeoutError:
            raise StoreUnavailableError(f"revision {revision} is fenced but not published yet") from None

    def _has(self, revision: int) -> bool:
        return self.directory is not None and self.directory.revision >= revision

    async def _look(self, revision: int, *, completes: bool) -> None:
        """Refreshes, unless another request that waits for the same has just done so; one of them for all."""
        async with self._loading:
            if not self._has(revision) and asyncio.get_running_loop().time() - self._looked_at > _LOOK_S:
                if completes:
                    await self._registry.complete_pending()
                await self._load_head()

    async def refresh(self) -> None:
        """Takes over the head as it stands now. Raises StoreUnavailableError, ConfigurationError."""
        async with self._loading:
            await self._load_head()

    async def _load_head(self) -> None:
        self._looked_at = asyncio.get_running_loop().time()
        head = await self._registry.head()
        self._failure = ""
        if head.revision == 0:
            if self.directory and not self.is_bereft:
                self.is_bereft = True
                log.warning(_EMPTIED, revision=self.directory.revision)
            self._failure = _EMPTIED if self.directory else _NOTHING_YET
            return
        self.is_bereft = False
        known = self.directory.snapshot if self.directory else None
        if known and (known.revision, known.digest) == (head.revision, head.digest):
            return
        snapshot = await self._registry.load(head.revision)
        if snapshot is None:
            raise StoreUnavailableError(f"the snapshot of revision {head.revision} is missing")
        self.directory = directory_of(snapshot)
        if self._kept:
            await self._keep(self._kept, snapshot)
        log.info("configuration loaded", revision=head.revision, rules=len(snapshot.configuration.rules))

    def _note(self, exc: BalancerError) -> None:
        if self._failure != exc.message:
            log.warning("cannot read the registry", reason=exc.message)
        self._failure = exc.message

    async def _poll(self) -> None:
        while True:
            try:
                async with asyncio.timeout(POLL_S):
                    await self._wake.wait()
            except TimeoutError:
                pass  # Nothing was announced: the second is over.
            self._wake.clear()
            try:
                await self.refresh()
            except (StoreUnavailableError, ConfigurationError) as exc:
                self._note(exc)

    async def _listen(self) -> None:
        """Wakes the poll when the feed announces a revision; it only makes it faster, so its failures do not matter."""
        while True:
            try:
                with translated("listening to the feed"):
                    async with self._commands.listening(keys.HEAD, keys.FEED) as messages:
                        async for message in messages:
                            if message["type"] == "message":
                                self._wake.set()
            except StoreUnavailableError as exc:
                log.debug("the feed is away", reason=exc.message)
            await asyncio.sleep(POLL_S)


def _replace(path: Path, text: bytes) -> None:
    """Writes a file that nobody else reads, at once or not at all."""
    new = path.with_name(f"{path.name}.{os.getpid()}")
    with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(text)
    new.replace(path)
