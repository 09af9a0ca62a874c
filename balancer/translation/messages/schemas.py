"""Schemas of answers, as Anthropic holds models to them."""

from __future__ import annotations

from typing import Any, Final

import msgspec

_VALUES: Final = frozenset({"const", "default", "enum", "examples"})
"""Keywords that hold values, and no schemas."""


def closed(schema: msgspec.Raw) -> object:
    """The schema with every object closed, which Anthropic asks for: nothing but the named properties.

    As it is where that is so already.
    """
    value = msgspec.json.decode(schema)
    return value if _close(value) else schema


def _close(value: Any) -> bool:
    """Closes the objects in place; True when there was one to close."""
    changed = False
    if isinstance(value, list):
        for item in value:
            changed |= _close(item)
    elif isinstance(value, dict):
        if value.get("type") == "object" and value.get("additionalProperties") is not False:
            value["additionalProperties"] = False
            changed = True
        for keyword, item in value.items():
            if keyword not in _VALUES:
                changed |= _close(item)
    return changed
