"""Schemas, as Anthropic holds answers and calls to them: some keywords only, and objects that are closed.

From platform.claude.com's page on structured outputs, and what Anthropic's SDK makes of schemas (November 2026).
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from balancer import lenient
from balancer.domain import Struct

_SCHEMA: Final = frozenset({"items"})
_LISTS: Final = frozenset({"anyOf", "allOf", "oneOf"})
_MAPS: Final = frozenset({"properties", "$defs", "definitions"})
_KEPT: Final = frozenset({"type", "enum", "const", "default", "required", "title", "description", "$ref"})
_MEANINGLESS: Final = frozenset({"$schema", "$id", "$comment"})
_FORMATS: Final = frozenset(
    {"date-time", "time", "date", "duration", "email", "hostname", "uri", "ipv4", "ipv6", "uuid"}
)
_any = msgspec.json.Decoder()


class Held(Struct, frozen=True, kw_only=True):
    """A schema that Anthropic takes. `is_whole`: it says all that it said; else the rest is told in descriptions."""

    schema: object
    is_whole: bool
    is_same: bool


def held(schema: msgspec.Raw) -> Held | None:
    """The schema with objects closed, and the limits that Anthropic does not know moved into descriptions.

    None for one that it cannot be held to: with objects of any properties, or none at all.
    """
    try:
        value = lenient.decode(_any, schema)
        writing = _Writing()
        found = writing.schema(value)
    except (*lenient.UNREADABLE, _UnholdableError):
        return None
    return Held(schema=found, is_whole=not writing.has_moved, is_same=found == value)


class _UnholdableError(Exception):
    """A part of the schema allows what Anthropic cannot hold a model to."""


class _Writing:
    def __init__(self) -> None:
        self.has_moved = False

    def schema(self, value: Any) -> dict[str, Any]:
        """One schema, and all within it."""
        if not isinstance(value, dict):
            raise _UnholdableError
        found: dict[str, Any] = {}
        moved: list[str] = []
        for keyword, item in value.items():
            if keyword in _KEPT:
                found[keyword] = item
            elif keyword in _SCHEMA:
                found[keyword] = self.schema(item)
            elif keyword in _LISTS and isinstance(item, list):
                found["anyOf" if keyword == "oneOf" else keyword] = [self.schema(one) for one in item]
            elif keyword in _MAPS and isinstance(item, dict):
                found[keyword] = {name: self.schema(one) for name, one in item.items()}
            elif (keyword == "format" and item in _FORMATS) or (keyword == "minItems" and item in (0, 1)):
                found[keyword] = item
            elif keyword not in _MEANINGLESS and keyword != "additionalProperties":
                moved.append(f"{keyword}: {msgspec.json.encode(item).decode()}")
        if _is_object(value):
            if value.get("additionalProperties") is not False and not value.get("properties"):
                raise _UnholdableError
            if isinstance(value.get("additionalProperties"), dict):
                raise _UnholdableError
            found["additionalProperties"] = False
        if moved:
            self.has_moved = True
            told = "{" + ", ".join(moved) + "}"
            description = found.get("description")
            found["description"] = f"{description}\n\n{told}" if isinstance(description, str) else told
        return found


def _is_object(schema: dict[str, Any]) -> bool:
    kind = schema.get("type")
    return kind == "object" or (isinstance(kind, list) and "object" in kind)
