"""Which schemas OpenAI holds a model to: what it is asked to keep to strictly, and does not take, is a 400."""

from __future__ import annotations

from typing import Any

import msgspec

_SCHEMAS = ("properties", "$defs", "definitions")
_INNER = ("items", "additionalProperties", "not")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")


def is_strict(schema: msgspec.Raw) -> bool:
    """True when every object is closed and requires all that it may have (OpenAI's guide to structured outputs)."""
    return _holds(msgspec.json.decode(schema))


def _holds(value: Any) -> bool:
    if not isinstance(value, dict):
        return True
    if value.get("type") == "object":
        members, required = value.get("properties"), value.get("required")
        wanted = required if isinstance(required, list) else []
        if value.get("additionalProperties") is not False:
            return False
        if isinstance(members, dict) and any(name not in wanted for name in members):
            return False
    inner = [value.get(keyword) for keyword in _INNER]
    for keyword in _SCHEMAS:
        held = value.get(keyword)
        inner += held.values() if isinstance(held, dict) else ()
    for keyword in _LISTS:
        held = value.get(keyword)
        inner += held if isinstance(held, list) else ()
    return all(_holds(item) for item in inner)
