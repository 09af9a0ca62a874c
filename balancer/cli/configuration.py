"""check, apply, diff, get, rollback: the configuration, from files and from the registry."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import yaml

from balancer import config, document
from balancer.cli.store import Store, opened
from balancer.domain import Configuration, Rule
from balancer.errors import ConfigurationError
from balancer.store import connection, keys
from balancer.store.changes import by_user
from balancer.store.publishing import Publication, plan, publish_file, roll_back
from balancer.store.registry import Registry, Snapshot
from balancer.store.topology import Topology
from balancer.store.views import PoolView, read_pool

_Result = TypeVar("_Result")
_COUNTERS = (
    *("in_flight", "reserved", "picks", "requests", "failures"),
    *("input", "output", "cached", "cache_creation", "reasoning", "lost", "lost_tokens", "abandoned"),
)


def read_file(path: str, *, lenient: bool) -> Configuration:
    """The configuration in a file; warnings go to stderr. A tingly-box document is read leniently."""
    raw = _load(Path(path))
    is_lenient = lenient or document.is_tingly_box(raw)
    reading = document.read(raw, door="lenient" if is_lenient else "strict")
    for warning in reading.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    return reading.configuration


def _load(path: Path) -> Any:
    """What a YAML or JSON file holds. Raises ConfigurationError with the line of a syntax fault."""
    try:
        return document.parse(path.read_text(encoding="utf-8"), str(path))
    except OSError as exc:
        raise ConfigurationError(f"cannot read {path}: {exc.strerror}") from exc
    except UnicodeDecodeError as exc:
        raise ConfigurationError(f"{path} is no UTF-8 text") from exc


def check(options: argparse.Namespace) -> int:
    """Validates a file, without Redis."""
    configuration = read_file(options.file, lenient=options.lenient)
    print(f"ok: {len(configuration.providers)} providers, {len(configuration.rules)} rules")
    return 0


def apply(options: argparse.Namespace) -> int:
    """Prints the difference, and publishes."""
    configuration = read_file(options.file, lenient=options.lenient)

    async def work(registry: Registry, store: Store) -> Publication:
        how = {"force": options.force, "prune": options.prune}
        _print_differences((await plan(registry, configuration, store.sealer, **how)).publication)
        deed = by_user(f"apply {Path(options.file).name}")
        return await publish_file(registry, configuration, store.sealer, **how, deed=deed)

    publication = with_registry(options, work)
    print(describe(publication))
    return 0


def diff(options: argparse.Namespace) -> int:
    """Prints the difference; 1 if there is any."""
    configuration = read_file(options.file, lenient=options.lenient)

    async def work(registry: Registry, store: Store) -> Publication:
        return (await plan(registry, configuration, store.sealer, force=True, prune=options.prune)).publication

    publication = with_registry(options, work)
    _print_differences(publication)
    return 1 if publication.differences else 0


def rollback(options: argparse.Namespace) -> int:
    """Publishes an earlier revision again."""

    async def work(registry: Registry, store: Store) -> Publication:
        return await roll_back(registry, options.revision, by_user(f"roll back to revision {options.revision}"))

    publication = with_registry(options, work)
    _print_differences(publication)
    print(describe(publication))
    return 0


def get(options: argparse.Namespace) -> int:
    """Prints what stands: rules, providers or all in the shape of a file, or counters.

    Credentials are references, or masked; with --sealed those that Redis has sealed are printed as they are there, so
    that the file can be published again where BALANCER_SECRET_KEY is the same.
    """

    async def work(registry: Registry, store: Store) -> object:
        snapshot = await standing(registry)
        if options.what == "stats":
            pools = sorted({rule.pool for rule in snapshot.configuration.rules})
            return [_stats(view, snapshot.configuration) for view in await _views(store.url, pools)]
        shown = snapshot.configuration if options.sealed else document.masked(snapshot.configuration)
        written = document.write(shown)
        return written if options.what == "configuration" else written.get(options.what, [])

    value = with_registry(options, work)
    if options.output == "json":
        print(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())
    else:
        print(yaml.safe_dump(value, sort_keys=False, allow_unicode=True), end="")
    return 0


def current_configuration(options: argparse.Namespace) -> Configuration:
    """The configuration that stands in the registry. Raises ConfigurationError where none does."""

    async def work(registry: Registry, store: Store) -> Configuration:
        return (await standing(registry)).configuration

    return with_registry(options, work)


async def standing(registry: Registry) -> Snapshot:
    """What stands in the registry. Raises ConfigurationError where nothing does."""
    snapshot = await registry.current()
    if snapshot is None:
        raise ConfigurationError("nothing has been published yet: run `balancer apply FILE`")
    return snapshot


def describe(publication: Publication) -> str:
    """A sentence on what came of a publication."""
    match publication.result:
        case "published":
            return f"published as revision {publication.revision}"
        case "unchanged":
            return f"nothing to do: revision {publication.revision} is the same"
        case "ignored":
            return (
                f"ignored: this file was revision {publication.earlier}, and revision {publication.revision} is newer; "
                "`balancer apply --force` publishes it again"
            )


def _print_differences(publication: Publication) -> None:
    for line in publication.differences:
        print(line)


def with_registry(options: argparse.Namespace, work: Callable[[Registry, Store], Awaitable[_Result]]) -> _Result:
    """What `work` makes of the fleet's registry."""
    settings = config.load(vars(options))

    async def run(store: Store) -> _Result:
        await connection.check_server(store.url)
        commands = connection.Commands(Topology(store.url))
        try:
            return await work(Registry(commands, settings.scripts_dir), store)
        finally:
            await commands.aclose()

    with opened(settings) as store:
        return asyncio.run(run(store))


async def _views(url: str, pools: list[str]) -> list[PoolView]:
    commands = connection.Commands(Topology(url))
    try:
        with connection.translated("reading the counters"):
            views = []
            for pool in pools:
                partitions_key, services_key = keys.partitions(pool), keys.services(pool)
                seconds, micros = await commands.run(partitions_key, "TIME")
                now_ms = int(seconds) * 1000 + int(micros) // 1000
                partitions = await commands.run(partitions_key, "HGETALL", partitions_key)
                services = await commands.run(services_key, "HGETALL", services_key)
                views.append(read_pool(pool, partitions, services, now_ms))
            return views
    finally:
        await commands.aclose()


def _entries(view: PoolView, rule: Rule) -> dict[str, object]:
    """Where the cursors of a rule's smart-routing entries stand; nothing for a rule without."""
    entries = [
        {
            "entry": variant.entry,
            "current_service": view.cursor(rule.uuid, variant.entry),
            "streak": view.streak(rule.uuid, variant.entry) or 0,
        }
        for variant in rule.variants()[1:]
    ]
    return {"smart_routing": entries} if entries else {}


def _stats(view: PoolView, configuration: Configuration) -> dict[str, object]:
    rules = [rule for rule in configuration.rules if rule.pool == view.pool]
    return {
        "pool": view.pool,
        "epoch": view.epoch,
        "position": view.position,
        "rules": [
            {
                "uuid": rule.uuid,
                "current_service": view.cursor(rule.uuid),
                "current_service_index": rule.current_service_index_of(view.cursor(rule.uuid)),
                "streak": partition.streak if (partition := view.partitions.get(keys.partition(rule.uuid))) else 0,
                "picks": view.rules[rule.uuid].seq if rule.uuid in view.rules else 0,
                **_entries(view, rule),
            }
            for rule in rules
        ],
        "services": [
            {
                "id": id_,
                **{name: getattr(service, name) for name in _COUNTERS},
                "breaker": view.breaker_state(id_),
                "cooldown_ms": view.cooldown_ms(id_),
                "first_token_us": service.first_token,
                "per_token_us": service.per_token,
                "windows": [
                    dict(zip(("seconds", "requests", "tokens"), (w.length_s, *w.counts(view.now_ms)), strict=True))
                    for w in service.windows
                ],
            }
            for id_, service in sorted(view.services.items())
        ],
    }
