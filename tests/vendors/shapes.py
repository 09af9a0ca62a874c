"""Whether a JSON value has the shape of a type: TypedDicts as the SDKs have them, but closed to fields unknown."""

from __future__ import annotations

import functools
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NotRequired, Required, Union, get_args, get_origin

import typing_extensions
from pydantic import BaseModel

_WRAPPERS: tuple[Any, ...] = (
    Annotated,
    Required,
    NotRequired,
    typing_extensions.Required,
    typing_extensions.NotRequired,
)
_FREE: tuple[Any, ...] = (NotRequired, typing_extensions.NotRequired)
_REQUIRED: tuple[Any, ...] = (Required, typing_extensions.Required)


def fault(value: object, hint: Any, at: str = "") -> str:
    """What is wrong with a value, and where, or an empty text."""
    origin = get_origin(hint)
    if hint in (Any, object):
        return ""
    if origin in _WRAPPERS:
        return fault(value, get_args(hint)[0], at)
    if origin is Literal:
        return "" if value in get_args(hint) else f"{at}: {value!r} is none of {get_args(hint)}"
    if origin in (Union, types.UnionType):
        return _of_union(value, get_args(hint), at)
    if typing.is_typeddict(hint) or typing_extensions.is_typeddict(hint):
        return _of_dict(value, hint, at)
    if origin is dict or (origin is not None and origin is Mapping):
        if not isinstance(value, dict):
            return f"{at}: an object is wanted"
        return _first(fault(item, get_args(hint)[1], _inside(at, key)) for key, item in value.items())
    if origin is not None:
        if not isinstance(value, list):
            return f"{at}: a list is wanted"
        return _first(fault(item, get_args(hint)[0], f"{at}[{i}]") for i, item in enumerate(value))
    if hint is type(None) or hint is None:
        return "" if value is None else f"{at}: null is wanted"
    if hint is float:
        return "" if isinstance(value, int | float) and not isinstance(value, bool) else f"{at}: a number is wanted"
    if hint is int:
        return "" if isinstance(value, int) and not isinstance(value, bool) else f"{at}: an integer is wanted"
    return "" if isinstance(value, hint) else f"{at}: {hint.__name__} is wanted"


@functools.cache
def _fields(hint: Any) -> tuple[dict[str, Any], frozenset[str]]:
    """A TypedDict's fields, and the names of those that must be there."""
    hints = typing_extensions.get_type_hints(hint, include_extras=True)
    marked = {name for name, field in hints.items() if get_origin(field) in _REQUIRED}
    free = {name for name, field in hints.items() if get_origin(field) in _FREE}
    return hints, (frozenset(hint.__required_keys__) | marked) - free


def _of_dict(value: object, hint: Any, at: str) -> str:
    if not isinstance(value, dict):
        return f"{at}: an object is wanted"
    hints, required = _fields(hint)
    if getattr(hint, "__pydantic_config__", {}).get("extra") != "allow":
        for name in value:
            if name not in hints:
                return f"{_inside(at, name)}: Extra inputs are not permitted"
    for name in sorted(required):
        if name not in value:
            return f"{_inside(at, name)}: Field required"
    return _first(fault(item, hints[name], _inside(at, name)) for name, item in value.items() if name in hints)


def _of_union(value: object, branches: tuple[Any, ...], at: str) -> str:
    """The fault in the branch that the value's tag names, or in the first of all."""
    branches = tuple(b for b in branches if not (isinstance(b, type) and issubclass(b, BaseModel)))
    faults = [fault(value, branch, at) for branch in branches]
    if "" in faults:
        return ""
    if isinstance(value, dict):
        for branch, found in zip(branches, faults, strict=True):
            if _is_tagged(value, branch):
                return found
        return f"{at}: none of the kinds that may be here"
    # A list's own fault tells more than that it is no text.
    inner = [found for found in faults if not found.startswith(f"{at}:")]
    return inner[0] if inner else faults[0] if len(faults) == 1 else f"{at}: none of the types that may be here"


def _is_tagged(value: dict[str, object], branch: Any) -> bool:
    if get_origin(branch) in (Union, types.UnionType):
        return any(_is_tagged(value, part) for part in get_args(branch))
    if not (typing.is_typeddict(branch) or typing_extensions.is_typeddict(branch)):
        return False
    hints, _ = _fields(branch)
    tags = [name for name in ("type", "role") if name in hints and name in value]
    return bool(tags) and all(not fault(value[name], hints[name]) for name in tags)


def _inside(at: str, name: object) -> str:
    return f"{at}.{name}" if at else str(name)


def _first(faults: typing.Iterable[str]) -> str:
    return next((found for found in faults if found), "")
