"""The tactics in pure Python: the reference that the scripts are held to, the simulator, and life without Redis.

A tactic looks at the cursor, the streak and the candidates (in the rule's order) and says which candidate is picked.
A new one is one small module here, which is found by being there, and its twin in `lua/include/tactic`.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from balancer.domain import Candidate, Tactic
from balancer.tactics.base import CHOOSERS, DRAW_RANGE, Choice, View
from balancer.tactics.hybrid import Hybrid
from balancer.tactics.random import Random
from balancer.tactics.round_robin import RoundRobin
from balancer.tactics.token_based import TokenBased

__all__ = [
    "DRAW_RANGE",
    "TACTICS",
    "TACTIC_NAMES",
    "Choice",
    "Hybrid",
    "Random",
    "RoundRobin",
    "TokenBased",
    "choose",
    "is_valid_tactic",
    "parameters",
    "tactic_from_map",
    "tactic_name",
    "tactic_of",
    "tactic_params",
    "tactic_to_map",
]

_HIGHEST = 2**53
"""Above this a threshold is never reached; Lua's numbers end there."""

for _module in sorted(pkgutil.iter_modules(__path__), key=lambda module: module.name):
    importlib.import_module(f"{__name__}.{_module.name}")

_LEGACY: tuple[type[Tactic], ...] = (RoundRobin, TokenBased, Hybrid, Random)
"""In the order of the legacy integers 0…3."""
TACTICS: tuple[type[Tactic], ...] = (*_LEGACY, *(kind for kind in CHOOSERS if kind not in _LEGACY))
"""Those of the legacy integers, then the others by name."""
TACTIC_NAMES: tuple[str, ...] = tuple(str(kind.__struct_config__.tag) for kind in TACTICS)


@functools.cache
def parameters(kind: type[Tactic]) -> dict[str, type]:
    """The names and types of what a tactic of that kind is told. Not to be changed: every caller gets the same one.

    msgspec evaluates a class's annotations at each look, which was once half of what reading a configuration cost.
    """
    return {field.name: field.type for field in msgspec.structs.fields(kind)}


def choose(
    tactic: Tactic,
    *,
    cursor: str,
    streak: int,
    order: Sequence[str],
    candidates: Sequence[Candidate],
    draw: int,
    memory: str = "",
) -> Choice | None:
    """The tactic's choice, or None without a candidate.

    `order` has the ids of all services of the rule, candidates or not. `draw` is a whole number in [0, 2^32), `memory`
    what the tactic remembered last. Without a cursor the first candidate is the current one, with streak 0.
    """
    if not candidates:
        return None
    if not cursor or cursor not in order:
        cursor, streak = candidates[0].service, 0
    view = View(cursor=cursor, streak=streak, memory=memory, order=order, candidates=candidates, draw=draw)
    return CHOOSERS[type(tactic)](tactic, view)


def tactic_name(tactic: Tactic) -> str:
    """The tactic's word, as in `lb_tactic.type`."""
    return TACTIC_NAMES[TACTICS.index(type(tactic))]


def is_valid_tactic(name: object) -> bool:
    """True for the tactics' names in any letter case, and for the legacy integers 0…3."""
    if isinstance(name, bool):
        return False
    if isinstance(name, int):
        return 0 <= name < len(_LEGACY)
    return isinstance(name, str) and name.lower() in TACTIC_NAMES


def tactic_from_map(name: str | int, params: Mapping[str, Any] | None = None) -> Tactic:
    """The tactic of that name with these parameters; absent, null or ≤ 0 numbers take their defaults.

    An unknown name means round_robin. Unknown parameters are dropped. Raises msgspec.ValidationError for a parameter
    of the wrong type.
    """
    if not is_valid_tactic(name):
        name = TACTIC_NAMES[0]
    kind = TACTICS[name if isinstance(name, int) else TACTIC_NAMES.index(name.lower())]
    known = parameters(kind)
    given = {k: v for k, v in (params or {}).items() if k in known and v is not None}
    for key in [key for key in given if known[key] is int]:
        value = given[key]
        if isinstance(value, float) and value.is_integer():
            given[key] = value = int(value)
        if isinstance(value, int) and not isinstance(value, bool) and value <= 0:
            del given[key]
    return msgspec.convert({"type": kind.__struct_config__.tag, **given}, kind)


def tactic_to_map(tactic: Tactic) -> dict[str, Any]:
    """The tactic in the shape of a configuration: {type, params}, its own numbers always there."""
    own = _own(type(tactic))
    params: dict[str, Any] = {}
    for name, default in zip(tactic.__struct_fields__, _defaults(type(tactic)), strict=True):
        value = getattr(tactic, name)
        if name in own or value != default:
            params[name] = value
    return {"type": tactic_name(tactic), "params": params}


def tactic_params(tactic: Tactic) -> dict[str, int]:
    """The tactic's own numbers as `PartitionDefinition.params` carries them."""
    return {name: min(getattr(tactic, name), _HIGHEST) for name in _own(type(tactic))}


def tactic_of(name: str, params: Mapping[str, int]) -> Tactic | None:
    """The tactic that a partition's definition names, with its numbers; None for one that is not known."""
    if name not in TACTIC_NAMES:
        return None
    kind = TACTICS[TACTIC_NAMES.index(name)]
    given: dict[str, Any] = {key: params[key] for key in _own(kind) if key in params}
    return kind(**given)


def _own(kind: type[Tactic]) -> list[str]:
    """The names of the fields that a tactic does not share with all."""
    return [name for name in kind.__struct_fields__ if name not in Tactic.__struct_fields__]


@functools.cache
def _defaults(kind: type[Tactic]) -> tuple[object, ...]:
    return tuple(field.default for field in msgspec.structs.fields(kind))
