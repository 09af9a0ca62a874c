"""The range of each number of a configuration, where it is more than its type says."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from balancer.domain import BreakerSettings, Health, Limits, Price, Retry, Rule, Service


class Range(msgspec.Struct, frozen=True, kw_only=True):
    """From `least` to `most`, both allowed; `or_zero`: 0 too, which switches off what the number is about."""

    least: float
    most: float
    or_zero: bool = False

    def holds(self, value: float) -> bool:
        """True for a value inside."""
        return self.least <= value <= self.most or (self.or_zero and value == 0)

    def __str__(self) -> str:
        return f"{'0, or ' if self.or_zero else ''}{self.least:.16g} to {self.most:.16g}"


_DAY_S = 24 * 3600
_COUNT = Range(least=0, most=2**53)  # Lua's whole numbers end there.
# The scripts count in thousandths: less would be rounded to nothing, or to "never".
_SHARE = Range(least=0.001, most=1, or_zero=True)
_TIME_S = Range(least=0.001, most=3600)
_PRICE = Range(least=0, most=1_000_000)

_RANGES: dict[type[msgspec.Struct], dict[str, Range]] = {
    Limits: {"rpm": _COUNT, "tpm": _COUNT, "in_flight": _COUNT},
    BreakerSettings: {
        "failures": _COUNT,
        "ratio": _SHARE,
        "min_requests": Range(least=1, most=2**53),
        "window_s": _TIME_S,
        "open_s": _TIME_S,
        "successes": Range(least=1, most=100),
    },
    Price: {"input": _PRICE, "output": _PRICE, "cached": _PRICE},
    Health: {"interval_s": Range(least=1, most=_DAY_S, or_zero=True)},
    Service: {"tier": Range(least=0, most=9)},
    Rule: {
        "session_affinity": Range(least=0, most=30 * _DAY_S),
        "queue_timeout_ms": Range(least=0, most=600_000),
    },
    Retry: {
        "attempts": Range(least=1, most=10),
        "budget_ratio": _SHARE,
        "backoff_ms": Range(least=0, most=10_000),
    },
}


def outside(struct: msgspec.Struct) -> Iterator[tuple[str, Range]]:
    """The fields whose numbers are outside their range, and the range."""
    for name, allowed in _RANGES.get(type(struct), {}).items():
        if not allowed.holds(getattr(struct, name)):
            yield name, allowed
