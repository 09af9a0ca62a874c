"""Requests and tokens a minute: what was used in any sixty seconds, and whether one more request fits in.

The minute slides in steps of five seconds and errs on the safe side: it holds thirteen of them, the last one not over.
"""

from __future__ import annotations

from typing import Literal, Protocol

import msgspec

BUCKET_MS = 5000
BUCKETS = 13
SHORT_WAIT_MS = 1000
"""How long to wait for what ends when some request does."""
MINUTE_MS = 60_000
NEVER = -1
"""As a wait: the request alone is above the limit."""


class Limited(Protocol):
    """What has limits: 0 is none, below zero nothing is let through."""

    @property
    def rpm(self) -> int:
        """Requests a minute."""

    @property
    def tpm(self) -> int:
        """Tokens a minute."""

    @property
    def in_flight(self) -> int:
        """Requests at once."""


class Bucket(msgspec.Struct):
    """What was used in the five seconds from `number` times five seconds on."""

    number: int
    requests: int = 0
    tokens: int = 0


class Minute(msgspec.Struct):
    """Buckets of the last minute, the oldest first."""

    buckets: list[Bucket] = msgspec.field(default_factory=list)

    def __str__(self) -> str:
        return ";".join(f"{b.number} {b.requests} {b.tokens}" for b in self.buckets)

    def rolled(self, now_ms: int) -> Minute:
        """Without what is over a minute ago; what lies in the future, for the clock stepped back, is of now."""
        current = now_ms // BUCKET_MS
        kept: dict[int, Bucket] = {}
        for bucket in self.buckets:
            number = min(bucket.number, current)
            if number > current - BUCKETS:
                into = kept.setdefault(number, Bucket(number))
                into.requests += bucket.requests
                into.tokens += bucket.tokens
        return Minute(list(kept.values()))

    def count(self, now_ms: int, requests: int, tokens: int) -> None:
        """Adds to the bucket of now, and forgets what is over."""
        self.buckets = self.rolled(now_ms).buckets
        if requests or tokens:
            current = now_ms // BUCKET_MS
            if not self.buckets or self.buckets[-1].number != current:
                self.buckets.append(Bucket(current))
            self.buckets[-1].requests += requests
            self.buckets[-1].tokens += tokens

    def total(self, name: Literal["requests", "tokens"]) -> int:
        """The sum over all buckets."""
        return sum(getattr(bucket, name) for bucket in self.buckets)

    def wait_ms(self, now_ms: int, name: Literal["requests", "tokens"], excess: int) -> int:
        """Until `excess` of them are over a minute ago, if nothing is added."""
        gone = 0
        for bucket in self.buckets:
            gone += getattr(bucket, name)
            if gone >= excess:
                return (bucket.number + BUCKETS) * BUCKET_MS - now_ms
        return MINUTE_MS


class Meter(msgspec.Struct):
    """What is measured of a provider in a pool."""

    minute: Minute = msgspec.field(default_factory=Minute)
    in_flight: int = 0
    reserved: int = 0


class Measured(Protocol):
    """What limits are held against."""

    minute: Minute
    in_flight: int
    reserved: int


def has_limits(limits: Limited) -> bool:
    """True when one of them is set."""
    return bool(limits.rpm or limits.tpm or limits.in_flight)


def wait_ms(limits: Limited, measured: Measured, reserved: int, now_ms: int) -> int | None:
    """None when a request that reserves so many tokens fits in, else how long it has to wait at least, or NEVER."""
    if not has_limits(limits):
        return None
    minute = measured.minute.rolled(now_ms)
    waits = []
    if min(limits.rpm, limits.tpm, limits.in_flight) < 0:
        waits.append(SHORT_WAIT_MS)
    if 0 < limits.in_flight <= measured.in_flight:
        waits.append(SHORT_WAIT_MS)
    excess = minute.total("requests") + 1 - limits.rpm
    if limits.rpm > 0 and excess > 0:
        waits.append(minute.wait_ms(now_ms, "requests", excess))
    used = minute.total("tokens")
    excess = used + measured.reserved + reserved - limits.tpm
    if limits.tpm > 0 and reserved > limits.tpm:
        waits.append(NEVER)
    elif limits.tpm > 0 and excess > 0:
        waits.append(SHORT_WAIT_MS if excess > used else minute.wait_ms(now_ms, "tokens", excess))
    return longest(waits)


def longest(waits: list[int]) -> int | None:
    """The greatest of them, NEVER before all others; None for none."""
    if not waits:
        return None
    return NEVER if NEVER in waits else max(waits)
