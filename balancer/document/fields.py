"""The fields of the domain's structs, found out once (msgspec takes half a millisecond for it each time); the mask."""

from __future__ import annotations

import functools

import msgspec

MASK = "***"
"""What is shown in a credential's stead."""


@functools.cache
def fields_of(kind: type[msgspec.Struct]) -> dict[str, msgspec.structs.FieldInfo]:
    """A struct's fields by name."""
    return {field.name: field for field in msgspec.structs.fields(kind)}
