"""models: the list of models that a provider offers, fetched from it and kept in the configuration."""

from __future__ import annotations

import argparse
from datetime import UTC, datetime

import msgspec

from balancer import config, oauth
from balancer.cli.configuration import standing, with_registry
from balancer.cli.store import Store
from balancer.document.editing import Edited
from balancer.domain import Configuration, Provider
from balancer.errors import NotFoundError
from balancer.gateway.listing import models_of
from balancer.gateway.upstream import UpstreamClient
from balancer.store.changes import by_user
from balancer.store.connection import Commands
from balancer.store.credentials import Credentials
from balancer.store.grants import Grants
from balancer.store.publishing import publish_edit
from balancer.store.registry import Registry
from balancer.store.topology import Topology


def refresh(options: argparse.Namespace) -> int:
    """Fetches a provider's list, publishes it as `models` with `last_updated`, and prints what came and went."""
    settings = config.load(vars(options))

    async def work(registry: Registry, store: Store) -> tuple[Provider, tuple[str, ...], int]:
        provider = _provider((await standing(registry)).configuration, options.provider)
        upstream = UpstreamClient(1, settings.upstream_ca_file)
        try:
            models = await models_of(provider, await _secrets(store, provider), upstream)
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


class _Secrets:
    """A provider's credentials, with the access token that its fleet has been given last."""

    def __init__(self, credentials: Credentials, access_token: str) -> None:
        self._credentials = credentials
        self._access_token = access_token
        self.headers = credentials.headers
        self.query = credentials.query
        self.proxy_url = credentials.proxy_url

    def access_token(self, provider: Provider) -> str:
        """The credential to send."""
        return self._access_token or self._credentials.access_token(provider)


async def _secrets(store: Store, provider: Provider) -> _Secrets:
    access_token = ""
    if oauth.is_renewed(provider) and store.sealer is not None:
        commands = Commands(Topology(store.url))
        try:
            grant = await Grants(commands).load(provider.uuid)
        finally:
            await commands.aclose()
        if grant is not None and grant.access:
            access_token = store.sealer.open(grant.access, (provider.uuid, "grant.access"))
    return _Secrets(Credentials(store.sealer), access_token)


def _provider(configuration: Configuration, name: str) -> Provider:
    for provider in configuration.providers:
        if name in (provider.name, provider.uuid):
            return provider
    known = ", ".join(provider.name for provider in configuration.providers)
    raise NotFoundError(f"there is no provider {name!r} (known: {known or 'none'})")
