"""What the admin API's resources are made of: calls, routes, and how bodies and queries are read. No HTTP library."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TypeVar
from urllib.parse import parse_qsl, unquote

import msgspec

from balancer.errors import RequestError

_Body = TypeVar("_Body")


class Call(msgspec.Struct, frozen=True, kw_only=True):
    """A request that found its route: the path's named parts, decoded, its query and its body."""

    path: Mapping[str, str]
    query: str = ""
    body: bytes = b""

    def read(self, kind: type[_Body]) -> _Body:
        """The JSON body. Raises RequestError that names the field at fault."""
        try:
            return msgspec.json.decode(self.body or b"{}", type=kind)
        except msgspec.DecodeError as exc:
            raise RequestError(str(exc)) from exc

    def parameters(self, *known: str) -> dict[str, str]:
        """The query's parameters. Raises RequestError for an unknown one."""
        given = dict(parse_qsl(self.query, keep_blank_values=True))
        for name in given:
            if name not in known:
                raise RequestError(f"unknown parameter {name!r} (known: {', '.join(known) or 'none'})", param=name)
        return given


Handler = Callable[[Call], Awaitable[object]]


class Route(msgspec.Struct, frozen=True, kw_only=True):
    """A method and a path like `/rules/{rule}`, and what answers with a value for JSON."""

    method: str
    path: str
    handler: Handler


class Routes:
    """Finds the route of a request. A path's parts are told apart before they are decoded: ids may hold a slash."""

    def __init__(self, routes: Sequence[Route]) -> None:
        self._routes = [(route, route.path.split("/")) for route in routes]

    def find(self, path: str) -> dict[str, tuple[Handler, dict[str, str]]]:
        """For every method that the path has: what answers, and the path's named parts."""
        parts = [unquote(part) for part in path.split("/")]
        found: dict[str, tuple[Handler, dict[str, str]]] = {}
        for route, pattern in self._routes:
            if len(pattern) == len(parts):
                named = {p[1:-1]: part for p, part in zip(pattern, parts, strict=True) if p.startswith("{")}
                if all(p.startswith("{") or p == part for p, part in zip(pattern, parts, strict=True)):
                    found.setdefault(route.method, (route.handler, named))
        return found
