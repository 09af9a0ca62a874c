"""Schemas as Anthropic takes them."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from balancer.translation.messages.schemas import Held, held

STRING = {"type": "string"}
CLOSED = {"type": "object", "properties": {"a": STRING}, "required": ["a"], "additionalProperties": False}
OPEN = {"type": "object", "properties": {"a": STRING}, "required": ["a"]}


@pytest.mark.parametrize(
    ("schema", "found"),
    [
        (CLOSED, Held(schema=CLOSED, is_whole=True, is_same=True)),
        (OPEN, Held(schema=CLOSED, is_whole=True, is_same=False)),
        (OPEN | {"additionalProperties": True}, Held(schema=CLOSED, is_whole=True, is_same=False)),
        (OPEN | {"$schema": "https://json-schema.org"}, Held(schema=CLOSED, is_whole=True, is_same=False)),
        (
            {"type": ["object", "null"], "properties": {}, "additionalProperties": False},
            Held(
                schema={"type": ["object", "null"], "properties": {}, "additionalProperties": False},
                is_whole=True,
                is_same=True,
            ),
        ),
        (
            {"type": "array", "items": OPEN, "minItems": 1, "maxItems": 3},
            Held(
                schema={"type": "array", "items": CLOSED, "minItems": 1, "description": "{maxItems: 3}"},
                is_whole=False,
                is_same=False,
            ),
        ),
        (
            {"type": "integer", "minimum": 0, "multipleOf": 2, "description": "even"},
            Held(
                schema={"type": "integer", "description": "even\n\n{minimum: 0, multipleOf: 2}"},
                is_whole=False,
                is_same=False,
            ),
        ),
        (
            {"type": "string", "format": "uuid", "default": "x", "enum": ["x"]},
            Held(
                schema={"type": "string", "format": "uuid", "default": "x", "enum": ["x"]}, is_whole=True, is_same=True
            ),
        ),
        (
            {"type": "string", "format": "color", "pattern": '^"#'},
            Held(
                schema={"type": "string", "description": '{format: "color", pattern: "^\\"#"}'},
                is_whole=False,
                is_same=False,
            ),
        ),
        (
            {"oneOf": [OPEN, {"$ref": "#/$defs/n"}], "$defs": {"n": {"type": "null"}}},
            Held(
                schema={"anyOf": [CLOSED, {"$ref": "#/$defs/n"}], "$defs": {"n": {"type": "null"}}},
                is_whole=True,
                is_same=False,
            ),
        ),
        # Properties with the names of keywords, and values that look like schemas.
        (
            {
                "type": "object",
                "properties": {"type": OPEN, "minimum": {"enum": [OPEN]}},
                "additionalProperties": False,
            },
            Held(
                schema={
                    "type": "object",
                    "properties": {"type": CLOSED, "minimum": {"enum": [OPEN]}},
                    "additionalProperties": False,
                },
                is_whole=True,
                is_same=False,
            ),
        ),
    ],
)
def test_a_schema_is_held_to(schema: dict[str, Any], found: Held) -> None:
    assert held(msgspec.Raw(msgspec.json.encode(schema))) == found


@pytest.mark.parametrize(
    "schema",
    [
        b"true",
        b"[]",
        b"{",
        b'{"type":"object"}',
        b'{"type":"object","additionalProperties":{"type":"string"}}',
        b'{"type":"object","properties":{"a":{"type":"object"}}}',
        b'{"type":"object","properties":{"a":{}},"additionalProperties":{"type":"string"}}',
        b'{"type":"array","items":true}',
        b'{"anyOf":[{"type":"null"},true]}',
    ],
)
def test_what_allows_anything_is_not(schema: bytes) -> None:
    """Closed, an object of any properties would be an empty one always."""
    assert held(msgspec.Raw(schema)) is None
