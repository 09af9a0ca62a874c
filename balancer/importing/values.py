"""Values of other people's files: what they are good for, whatever they are."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

_ENVIRONMENT = re.compile(r"os\.environ/(\w+)")
_REFERENCE = re.compile(r"\$\{(\w+)\}")
_MOST_WEIGHT = 1_000_000


def as_table(value: Any) -> dict[str, Any]:
    """The mapping, empty for anything else."""
    return dict(value) if isinstance(value, Mapping) else {}


def as_list(value: Any) -> list[Any]:
    """The list; one value as a list of it, nothing as an empty one."""
    if value is None:
        return []
    return list(value) if isinstance(value, list) else [value]


def as_number(value: Any) -> float | None:
    """The finite number, also where it is written as text; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def plain(number: float) -> int | float:
    """The number without a needless point."""
    return int(number) if number == int(number) else number


def referenced(value: Any) -> str:
    """Text in which LiteLLM's `os.environ/NAME` is our `${NAME}`."""
    return _ENVIRONMENT.sub(r"${\1}", value if isinstance(value, str) else "" if value is None else str(value))


def variables(value: Any) -> frozenset[str]:
    """The names of all variables that the value refers to, however deep in it."""
    match value:
        case str():
            return frozenset(_ENVIRONMENT.findall(value) + _REFERENCE.findall(value))
        case Mapping():
            return frozenset().union(*map(variables, value.values()))
        case list() | tuple():
            return frozenset().union(*map(variables, value))
        case _:
            return frozenset()


def whole_weights(values: Sequence[float]) -> list[int]:
    """Whole weights in the same proportions, as small as they can be, and 1 000 000 at most."""
    fractions = [Fraction(str(max(value, 0))).limit_denominator(1000) for value in values]
    most = max(fractions, default=Fraction(0))
    if most == 0:
        return [0] * len(values)
    scale = math.lcm(*(fraction.denominator for fraction in fractions))
    whole = [int(fraction * scale) for fraction in fractions]
    divisor = math.gcd(*whole)
    whole = [weight // divisor for weight in whole]
    largest = max(whole)
    if largest > _MOST_WEIGHT:
        whole = [max(1, weight * _MOST_WEIGHT // largest) if weight else 0 for weight in whole]
    return whole
