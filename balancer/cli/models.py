"""models: the list of models that a provider offers, fetched from it and kept in the configuration."""

from __future__ import annotations

import argparse
from datetime import UTC, datetime

import msgspec

from balancer import config
from balancer.cli.configuration import standing, with_registry
from balancer.cli.store import Store
from balancer.document.editing import Edited
from balancer.domain import Configuration, Provider
from balancer.errors import NotFoundError
from balancer.gateway.listing import models_of
from balancer.gateway.upstream import UpstreamClient
from balancer.store.changes import by_user
from balancer.store.credentials import Credentials
from balancer.store.publishing import publish_edit
from balancer.store.registry import Registry


def refresh(options: argparse.Namespace) -> int:
    """Fetches a provider's list, publishes it as `models` with `last_updated`, and prints what came and went."""
    settings = config.load(vars(options))

    async def work(registry: Registry, store: Store) -> tuple[Provider, tuple[str, ...], int]:
        provider = _provider((await standing(registry)).configuration, options.provider)
        upstream = UpstreamClient(1, settings.upstream_ca_file)
        try:
            models = await models_of(provider, Credentials(store.sealer), upstream)
        finally:
            await upstream.close()
        now = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")

        def edit(configuration: Configuration) -> Edited:
            current = _provider(configuration, provider.uuid)
            edited = msgspec.structs.replace(current, models=models, last_updated=now)
            providers = tuple(edited if p.uuid == provider.uuid else p for p in configuration.providers)
            after = msgspec.structs.replace(configuration, providers=providers)
            return Edited(before=configuration, after=after)

        deed = by_user(f"refresh the models of provider {provider.uuid}")
        return provider, models, (await publish_edit(registry, edit, deed, sealer=store.sealer)).revision

    provider, models, revision = with_registry(options, work)
    for name in (name for name in models if name not in provider.models):
        print(f"+ {name}")
    for name in (name for name in provider.models if name not in models):
        print(f"- {name}")
    print(f"{provider.name}: {len(models)} models, published as revision {revision}")
    return 0


def _provider(configuration: Configuration, name: str) -> Provider:
    for provider in configuration.providers:
        if name in (provider.name, provider.uuid):
            return provider
    known = ", ".join(provider.name for provider in configuration.providers)
    raise NotFoundError(f"there is no provider {name!r} (known: {known or 'none'})")
