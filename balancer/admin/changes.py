"""/api/v1/audit: the log of who changed what, over the admin API and by commands, page by page."""

from __future__ import annotations

from typing import Annotated

import msgspec

from balancer.admin import shapes
from balancer.admin.routing import Call, Parameter, Route
from balancer.admin.stats import at
from balancer.store.balance import Balance
from balancer.store.changes import Noted

_DEFAULT_LIMIT = 50
_Limit = Annotated[int, msgspec.Meta(ge=1, le=500)]


class Changes:
    """The route /api/v1/audit."""

    def __init__(self, balance: Balance) -> None:
        self._balance = balance

    def routes(self) -> list[Route]:
        """It alone."""
        query = (
            Parameter(name="limit", kind=_Limit, meaning=f"how many, 1 to 500; {_DEFAULT_LIMIT} if absent"),
            Parameter(name="before", kind=str, meaning="those before this id: `next` of the page before"),
        )
        return [Route(method="GET", path="/api/v1/audit", handler=self.list, gives=shapes.Changes, query=query)]

    async def list(self, call: Call) -> object:
        """Who changed what, the newest first."""
        limit = call.parameter("limit", _Limit, default=_DEFAULT_LIMIT)
        found = await self._balance.changes.newest(limit + 1, call.query.get("before", ""))
        page = found[:limit]
        return shapes.Changes(changes=tuple(map(_told, page)), next=page[-1].id if len(found) > limit else None)


def _told(noted: Noted) -> shapes.ChangeEntry:
    change = noted.change
    return shapes.ChangeEntry(
        id=noted.id,
        at=at(noted.at_ms) or "",
        who=change.who,
        via=change.via,
        action=change.action,
        revision=change.revision or None,
        differences=change.differences,
        left_out=change.left_out,
    )
