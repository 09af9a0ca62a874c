"""What vendors refuse in JSON schemas that a model must keep to strictly."""

from __future__ import annotations

from typing import Any

_ANTHROPIC_LACKS = ("minimum", "maximum", "multipleOf", "minLength", "maxLength", "maxItems", "uniqueItems")


def anthropic(schema: Any) -> str:
    """The first fault by Anthropic's limits of structured outputs, or an empty text."""
    for node in _nodes(schema):
        if node.get("type") == "object" and node.get("additionalProperties") is not False:
            return "For 'object' type, 'additionalProperties' must be explicitly set to false"
        for name in _ANTHROPIC_LACKS:
            if name in node:
                return f"For '{node.get('type')}' type, property '{name}' is not supported"
    return ""


def openai(schema: Any) -> str:
    """The first fault by OpenAI's rules of strict schemas, or an empty text."""
    for node in _nodes(schema):
        if node.get("type") == "object":
            if node.get("additionalProperties") is not False:
                return "'additionalProperties' is required to be supplied and to be false."
            if set(node.get("required", ())) != set(node.get("properties", {})):
                return "'required' is required to be supplied and to be an array including every key in properties."
    return ""


def _nodes(schema: Any) -> list[Any]:
    """All schemas inside a schema, itself first."""
    if not isinstance(schema, dict):
        return []
    found = [schema]
    for name in ("properties", "$defs", "definitions"):
        for inner in (schema.get(name) or {}).values():
            found += _nodes(inner)
    for name in ("items", "additionalProperties", "not"):
        found += _nodes(schema.get(name))
    for name in ("anyOf", "oneOf", "allOf", "prefixItems"):
        for inner in schema.get(name) or ():
            found += _nodes(inner)
    return found
