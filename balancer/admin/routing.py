"""What the admin API's resources are made of: calls, routes, and how bodies and queries are read. No HTTP library."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar
from urllib.parse import parse_qsl, unquote

import msgspec

from balancer.errors import PreconditionError, PreconditionRequiredError, RequestError
from balancer.roles import Principal, Role
from balancer.store.changes import Deed

_Body = TypeVar("_Body")
_Value = TypeVar("_Value")


class Parameter(msgspec.Struct, frozen=True, kw_only=True):
    """One of a query: its name, its type with its range, and what it means."""

    name: str
    kind: Any
    meaning: str


DRY_RUN = Parameter(name="dry_run", kind=bool, meaning="true: answers what would change, and changes nothing")


class Call(msgspec.Struct, frozen=True, kw_only=True):
    """A request that found its route: the path's named parts, decoded, its query, its body, its preconditions, and who.

    `if_match` and `if_none_match` are the headers of these names, empty for none.
    """

    path: Mapping[str, str]
    principal: Principal
    query: Mapping[str, str] = {}
    body: bytes = b""
    if_match: str = ""
    if_none_match: str = ""

    def read(self, kind: type[_Body]) -> _Body:
        """The JSON body. Raises RequestError that names the field at fault."""
        try:
            return msgspec.json.decode(self.body or b"{}", type=kind)
        except (msgspec.DecodeError, RecursionError) as exc:
            raise RequestError(str(exc)) from exc

    def table(self) -> dict[str, Any]:
        """The JSON body, an object in which no key is there twice. Raises RequestError for anything else."""
        try:
            # What is no Unicode, or no JSON by the letter, is refused here, and keys that repeat below.
            msgspec.json.decode(self.body)
            value = json.loads(self.body, object_pairs_hook=_object)
        except (msgspec.DecodeError, ValueError, RecursionError) as exc:
            raise RequestError(f"the body is no JSON that is read here: {exc}") from exc
        if not isinstance(value, dict):
            raise RequestError("expected an object in JSON")
        return value

    def parameter(self, name: str, kind: Any, default: _Value) -> _Value:
        """A parameter of the query, or its default. Raises RequestError for one that is not of that type and range."""
        if name not in self.query:
            return default
        try:
            value: _Value = msgspec.convert(self.query[name], kind, strict=False)
        except msgspec.ValidationError as exc:
            raise RequestError(f"{name}: {exc}", param=name) from exc
        return value

    @property
    def is_dry(self) -> bool:
        """True when only what would change is asked for."""
        return self.parameter("dry_run", bool, default=False)

    def deed(self, action: str) -> Deed:
        """What the log of changes says of it."""
        return Deed(who=self.principal.name, via="api", action=action)

    def names(self, etag: str) -> bool:
        """True when the client has what is of that ETag (If-None-Match)."""
        return bool(self.if_none_match) and _names(self.if_none_match, etag)

    def check(self, etag: str | None, *, is_required: bool = True) -> None:
        """Returns when what stands is what the client means; `etag` is None where nothing stands (RFC 9110 §13.1).

        Raises PreconditionError when it is something else by now, and where a precondition is required and none is
        given for what stands, PreconditionRequiredError.
        """
        if self.if_match and (etag is None or not _names(self.if_match, etag)):
            stands = f"{etag} stands" if etag else "nothing stands there"
            raise PreconditionError(f"If-Match: it is something else by now ({stands}); read it again")
        if self.if_none_match and etag is not None and _names(self.if_none_match, etag):
            raise PreconditionError(f"If-None-Match: it is there already ({etag})")
        if is_required and etag is not None and not self.if_match:
            raise PreconditionRequiredError(
                "say which state you mean: `If-Match` with the ETag that GET answers, or `If-Match: *` for any"
            )


def _names(header: str, etag: str) -> bool:
    """True when the list names the ETag, or is `*`. Weak ones (`W/"…"`) name none: states are equal to the letter."""
    return any(part.strip() in ("*", etag) for part in header.split(","))


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} is there twice")
    return value


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """A value for JSON with a status and headers of its own."""

    status: int = 200
    value: object = None
    headers: tuple[tuple[str, str], ...] = ()


Handler = Callable[[Call], Awaitable[object]]


class Route(msgspec.Struct, frozen=True, kw_only=True):
    """A method and a path like `/rules/{rule}`, and what answers with a value for JSON, or with a Reply.

    `role` is whose it is, `takes` the type of its body and `gives` that of its answer: a fault in either is told in
    `faults`. With `precondition` a resource is read or written that has an ETag.
    """

    method: str
    path: str
    handler: Handler
    role: Role = "viewer"
    takes: Any = None
    gives: Any = None
    query: tuple[Parameter, ...] = ()
    precondition: Literal["", "reads", "writes"] = ""
    is_open: bool = False
    """True for what needs no token."""

    @property
    def meaning(self) -> str:
        """The first line of the handler's docstring."""
        return (self.handler.__doc__ or "").strip().partition("\n")[0]


class Routes:
    """Finds the route of a request. A path's parts are told apart before they are decoded: ids may hold a slash."""

    def __init__(self, routes: Sequence[Route]) -> None:
        self.all = tuple(routes)
        self._routes = [(route, route.path.split("/")) for route in routes]

    def find(self, path: str) -> dict[str, tuple[Route, dict[str, str]]]:
        """For every method that the path has: its route, and the path's named parts."""
        parts = [unquote(part) for part in path.split("/")]
        found: dict[str, tuple[Route, dict[str, str]]] = {}
        for route, pattern in self._routes:
            if len(pattern) == len(parts):
                named = {p[1:-1]: part for p, part in zip(pattern, parts, strict=True) if p.startswith("{")}
                if all(p.startswith("{") or p == part for p, part in zip(pattern, parts, strict=True)):
                    found.setdefault(route.method, (route, named))
        return found


def parameters(route: Route, query: str) -> dict[str, str]:
    """The query's parameters. Raises RequestError for one that the route does not know, or that is there twice."""
    pairs = parse_qsl(query, keep_blank_values=True)
    known = [parameter.name for parameter in route.query]
    given = dict(pairs)
    for name in given:
        if name not in known:
            raise RequestError(f"unknown parameter {name!r} (known: {', '.join(known) or 'none'})", param=name)
    if len(given) < len(pairs):
        raise RequestError("a parameter is there twice")
    return given
