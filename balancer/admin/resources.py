"""Providers, rules and scenarios of the configuration that stands: listed, read, put, deleted, one at a time.

Each has an ETag. Whoever writes says which state of it is meant (`If-Match`, or `If-None-Match: *` for a new one), and
the registry publishes only what was made from the revision that stands: of two who read the same, one is told 412.
"""

from __future__ import annotations

import asyncio
from typing import Annotated
from urllib.parse import quote

import msgspec

from balancer.admin import shapes
from balancer.admin.routing import DRY_RUN, Call, Parameter, Reply, Route
from balancer.document import editing
from balancer.document.editing import Edited, Kind
from balancer.domain import Configuration, Provider, Rule, ScenarioConfig
from balancer.errors import ForbiddenError, NotFoundError, StoreUnavailableError
from balancer.roles import Role
from balancer.store.balance import Balance
from balancer.store.credentials import Sealer
from balancer.store.publishing import Edition, publish_edit
from balancer.store.registry import Snapshot

_DEFAULT_LIMIT = 100
_Limit = Annotated[int, msgspec.Meta(ge=1, le=1000)]
_Offset = Annotated[int, msgspec.Meta(ge=0, le=2**31)]
_PAGE = (
    Parameter(name="limit", kind=_Limit, meaning=f"how many, 1 to 1000; {_DEFAULT_LIMIT} if absent"),
    Parameter(name="offset", kind=_Offset, meaning="how many to leave out at the beginning"),
)


class Resources:
    """The routes /api/v1/providers, /rules and /scenarios."""

    def __init__(self, balance: Balance, sealer: Sealer | None) -> None:
        self._balance = balance
        self._sealer = sealer

    def routes(self) -> list[Route]:
        """All of them."""
        kinds: tuple[tuple[Kind, type, type], ...] = (
            ("provider", Provider, shapes.Providers),
            ("rule", Rule, shapes.Rules),
            ("scenario", ScenarioConfig, shapes.Scenarios),
        )
        return [route for kind, one, page in kinds for route in self._routes(kind, one, page)]

    def _routes(self, kind: Kind, one: type, page: type) -> list[Route]:
        many = f"/api/v1/{kind}s"
        path = f"{many}/{{{kind}}}"

        async def list_(call: Call) -> object:
            """A page of them, in their order."""
            return await self._list(call, kind)

        async def get(call: Call) -> object:
            """One as it is put, with its ETag."""
            return await self._get(call, kind)

        async def put(call: Call) -> object:
            """Writes one as a new revision; one that is not there is made. Operators may switch and weigh."""
            return await self._put(call, kind)

        async def delete(call: Call) -> object:
            """Takes one out as a new revision."""
            return await self._delete(call, kind)

        # What operators may not change in a scenario is all of it.
        writer: Role = "admin" if kind == "scenario" else "operator"
        return [
            Route(method="GET", path=many, handler=list_, gives=page, query=_PAGE),
            Route(method="GET", path=path, handler=get, gives=one, precondition="reads"),
            Route(
                method="PUT",
                path=path,
                handler=put,
                role=writer,
                takes=one,
                gives=shapes.Written,
                query=(DRY_RUN,),
                precondition="writes",
            ),
            Route(
                method="DELETE",
                path=path,
                handler=delete,
                role="admin",
                gives=shapes.Written,
                query=(DRY_RUN,),
                precondition="writes",
            ),
        ]

    # -- reading -------------------------------------------------------------------------------------------------------

    async def _list(self, call: Call, kind: Kind) -> object:
        snapshot = await self._standing()
        found = editing.resources(snapshot.configuration, kind)
        offset = call.parameter("offset", _Offset, default=0)
        limit = call.parameter("limit", _Limit, default=_DEFAULT_LIMIT)
        page = found[offset : offset + limit]
        shown, etags = await asyncio.to_thread(
            lambda: (
                [editing.shown(resource) for resource in page],
                {editing.name_of(resource): editing.etag(resource) for resource in page},
            )
        )
        return {
            f"{kind}s": shown,
            "etags": etags,
            "total": len(found),
            "offset": offset,
            "limit": limit,
            "revision": snapshot.revision,
        }

    async def _get(self, call: Call, kind: Kind) -> object:
        resource = editing.find((await self._standing()).configuration, kind, call.path[kind])
        if resource is None:
            raise NotFoundError(f"{kind.capitalize()} not found")
        etag = editing.etag(resource)
        headers = (("ETag", etag),)
        if call.names(etag):
            return Reply(status=304, headers=headers)
        return Reply(value=editing.shown(resource), headers=headers)

    async def _standing(self) -> Snapshot:
        """The configuration as the registry has it now: whoever has just written over another worker reads that."""
        await self._balance.refresh()
        standing = self._balance.standing
        return standing.snapshot if standing else Snapshot(revision=0, configuration=Configuration())

    # -- writing -------------------------------------------------------------------------------------------------------

    async def _put(self, call: Call, kind: Kind) -> object:
        name = call.path[kind]
        table = call.table()
        is_new = False

        def edit(configuration: Configuration) -> Edited:
            nonlocal is_new
            standing = editing.find(configuration, kind, name)
            is_new = standing is None
            if standing is None and not call.principal.may("admin"):
                raise ForbiddenError(f"a new {kind} takes the role admin, and {call.principal.name} is an operator")
            call.check(None if standing is None else editing.etag(standing))
            edited = editing.put(configuration, kind, name, table)
            after = editing.find(edited.after, kind, name)
            fields = editing.beyond(standing, after) if standing and after else []
            if fields and not call.principal.may("admin"):
                raise ForbiddenError(
                    f"to change {', '.join(fields)} takes the role admin, and {call.principal.name} is an operator"
                )
            return edited

        edition = await self._publish(call, edit, f"put {kind} {name}")
        after = editing.find(edition.configuration, kind, name)
        headers = [("ETag", editing.etag(after))] if after and not call.is_dry else []
        if is_new and not call.is_dry:
            headers.append(("Location", f"/api/v1/{kind}s/{quote(name, safe='')}"))
        return Reply(
            status=201 if is_new and not call.is_dry else 200, value=_written(call, edition), headers=tuple(headers)
        )

    async def _delete(self, call: Call, kind: Kind) -> object:
        name = call.path[kind]

        def edit(configuration: Configuration) -> Edited:
            standing = editing.find(configuration, kind, name)
            if standing is None:
                raise NotFoundError(f"{kind.capitalize()} not found")
            call.check(editing.etag(standing))
            return editing.remove(configuration, kind, name)

        return _written(call, await self._publish(call, edit, f"delete {kind} {name}"))

    async def _publish(self, call: Call, edit: editing.Edit, action: str) -> Edition:
        return await published(self._balance, call, edit, action, self._sealer)


async def published(balance: Balance, call: Call, edit: editing.Edit, action: str, sealer: Sealer | None) -> Edition:
    """What came of an edit that a call asks for; this worker then has it too."""
    await balance.refresh()
    if balance.is_bereft:
        # The first edit would stand for the whole, and all else be gone.
        raise StoreUnavailableError("the registry is empty, and had a configuration: `balancer apply FILE` first")
    edition = await publish_edit(
        balance.registry,
        edit,
        call.deed(action),
        sealer=sealer,
        is_dry=call.is_dry,
        may_begin=balance.standing is None,
    )
    if not call.is_dry:
        await balance.refresh()
    return edition


def _written(call: Call, edition: Edition) -> shapes.Written:
    return shapes.Written(
        revision=edition.revision, dry_run=call.is_dry, changes=edition.differences, warnings=edition.warnings
    )
