"""What fits of an object of which something does not: a wrong field is as good as absent, its neighbours are kept."""

from __future__ import annotations

import functools
import typing
from typing import Any, TypeVar

import msgspec

T = TypeVar("T", bound=msgspec.Struct)


def fitting(kind: type[T], value: dict[str, Any]) -> T:
    """The struct with the fields of `value` that are of their type, and those of its structs; the rest has defaults.

    Costs some microseconds a field: it is for what the typed decoder has refused.
    """
    found: dict[str, Any] = {}
    for name, hint in _hints(kind).items():
        if name not in value:
            continue
        try:
            found[name] = msgspec.convert(value[name], hint)
        except msgspec.ValidationError:
            part = _part(hint, value[name])
            if part is not None:
                found[name] = part
    return kind(**found)


@functools.cache
def _hints(kind: type[msgspec.Struct]) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _part(hint: object, value: object) -> object:
    """What fits of a struct, or of a list of structs; None where the field is neither."""
    for option in typing.get_args(hint) or (hint,):
        if isinstance(value, dict) and isinstance(option, type) and issubclass(option, msgspec.Struct):
            return fitting(option, value)
        if isinstance(value, list) and typing.get_origin(option) is list:
            (item,) = typing.get_args(option)
            if isinstance(item, type) and issubclass(item, msgspec.Struct):
                return [fitting(item, each) for each in value if isinstance(each, dict)]
    return None
