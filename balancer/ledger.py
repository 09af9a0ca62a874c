"""What a pool knows of one service: its windows and counters, and how attempts change them."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from balancer import stored
from balancer.breaker import Breaker
from balancer.domain import Entry, Outcome
from balancer.limits import Minute

FAILURES = (Outcome.RATE_LIMITED, Outcome.UNAUTHORIZED, Outcome.OVERLOADED, Outcome.FAILED)
DECAY_MS = 10_000
"""After as long without a sample, half of the way to a lower one is gone at once."""
LONGEST_MEMORY_MS = 600_000


class Window(msgspec.Struct):
    """Requests and tokens (of them `output`) counted since `start` (ms), for `length` seconds."""

    length: int
    start: int = 0
    requests: int = 0
    tokens: int = 0
    output: int = 0

    def has_ended(self, now_ms: int) -> bool:
        """True when its length has passed since its start."""
        return now_ms - self.start >= self.length * 1000

    def roll(self, now_ms: int) -> None:
        """A new window where this one has ended; a start in the future becomes now."""
        if self.has_ended(now_ms):
            self.start, self.requests, self.tokens, self.output = now_ms, 0, 0, 0
        elif self.start > now_ms:
            self.start = now_ms


class ServiceState(msgspec.Struct):
    """What a pool knows of one service."""

    windows: list[Window] = msgspec.field(default_factory=list)
    in_flight: int = 0
    reserved: int = 0
    picks: int = 0
    requests: int = 0
    failures: int = 0
    input: int = 0
    output: int = 0
    cached: int = 0
    cache_creation: int = 0
    reasoning: int = 0
    lost: int = 0
    lost_tokens: int = 0
    abandoned: int = 0
    last_used: int = 0
    cleared: int = 0
    windows_revision: int = 0
    minute: Minute = msgspec.field(default_factory=Minute)
    breaker: Breaker = msgspec.field(default_factory=Breaker)
    cooldown: int = 0
    first_token: int = 0
    per_token: int = 0
    measured: int = 0

    def text(self, names: Sequence[str]) -> str:
        """The named counters, the windows, the minute and the breaker as an event tells them."""
        values = " ".join(str(getattr(self, name)) for name in names)
        windows = ";".join(f"{w.length} {w.start} {w.requests} {w.tokens} {w.output}" for w in self.windows)
        return f"{values}|{windows}|{self.minute}|{self.breaker}"

    def counts(self, length: int, now_ms: int) -> tuple[int, int]:
        """Requests and tokens of the window of that length, reserved tokens included."""
        for window in self.windows:
            if window.length == length and not window.has_ended(now_ms):
                return window.requests, window.tokens + self.reserved
        return 0, self.reserved

    def pick(self, now_ms: int, reserved: int) -> None:
        """Counts a pick, which holds a place in flight and its reserved tokens."""
        for window in self.windows:
            window.roll(now_ms)
            window.requests += 1
        self.in_flight += 1
        self.reserved += reserved
        self.picks += 1

    def release(self, reserved: int) -> None:
        """Gives back what a pick held."""
        self.in_flight -= 1
        self.reserved -= reserved

    def count(self, now_ms: int, entry: Entry) -> None:
        """Counts a settled attempt and what it used."""
        usage = entry.usage
        self.requests += 1
        self.failures += entry.outcome in FAILURES
        self.input += usage.input
        self.output += usage.output
        self.cached += usage.cached
        self.cache_creation += usage.cache_creation
        self.reasoning += usage.reasoning
        self.last_used = max(self.last_used, now_ms - entry.age_ms)
        self.add_tokens(usage.input, usage.output, now_ms, entry.age_ms)

    def lose(self, now_ms: int, reserved: int) -> None:
        """Counts an attempt whose worker died, and which is released: one request, and its reserved tokens."""
        self.requests += 1
        self.lost += 1
        self.lost_tokens += reserved
        self.add_tokens(reserved, 0, now_ms, 0)

    def find_again(self, reserved: int, reaped_ms: int, position: int) -> None:
        """Takes `lose` back: the worker was only late. What was cleared in between is not there to be taken back."""
        if position <= self.cleared:
            return
        self.requests -= 1
        self.lost -= 1
        self.lost_tokens -= reserved
        for window in self.windows:
            if reaped_ms >= window.start:
                window.tokens = max(0, window.tokens - reserved)

    def clear(self, position: int) -> None:
        """Sets all counters to zero; what is in flight and reserved stays, and so does what says how the service is."""
        for name in CLEARED_COUNTERS:
            setattr(self, name, 0)
        for window in self.windows:
            window.start = window.requests = window.tokens = window.output = 0
        self.cleared = position

    def cool_down(self, now_ms: int, entry: Entry) -> None:
        """Keeps the service back for as long as it asked."""
        if entry.cooldown_ms > 0:
            self.cooldown = max(self.cooldown, now_ms - entry.age_ms + entry.cooldown_ms)

    def measure(self, now_ms: int, entry: Entry) -> None:
        """Takes in how long a success took: at once where it took longer than known, else little by little."""
        is_known = entry.first_token_us > 0 or (entry.stream_us > 0 and entry.usage.output > 0)
        if entry.outcome is not Outcome.SUCCESS or entry.age_ms > 0 or not is_known:
            return
        passed_ms = min(max(0, now_ms - self.measured), LONGEST_MEMORY_MS) if self.measured > 0 else 0
        if entry.first_token_us > 0:
            self.first_token = _decayed(self.first_token, entry.first_token_us, passed_ms)
        if entry.stream_us > 0 and entry.usage.output > 0:
            self.per_token = _decayed(self.per_token, entry.stream_us // entry.usage.output, passed_ms)
        self.measured = now_ms

    def add_tokens(self, input_: int, output: int, now_ms: int, age_ms: int) -> None:
        """Counts tokens in the windows that were open `age_ms` ago and still are; fresh ones open a window."""
        for window in self.windows:
            if age_ms == 0:
                window.roll(now_ms)
            if not window.has_ended(now_ms) and now_ms - age_ms >= window.start:
                window.tokens += input_ + output
                window.output += output


PICK_COUNTERS = ("in_flight", "reserved", "picks")
LEDGER_COUNTERS = (*stored.HOT[:2], *stored.TOTALS, *stored.HOT[3:])
CLEAR_COUNTERS = ("in_flight", "reserved", "picks", *LEDGER_COUNTERS[2:])
"""What the events of pick; settle, reap and health; clear tell of a service, in this order."""
CLEARED_COUNTERS = CLEAR_COUNTERS[2 : CLEAR_COUNTERS.index("cleared")]
"""What `clear` sets to zero."""


def _decayed(old: int, sample: int, passed_ms: int) -> int:
    """The peak of what was measured, moved towards a lower sample the more, the longer ago the last one was."""
    if old == 0 or sample >= old:
        return sample
    return old - (old - sample) * passed_ms // (passed_ms + DECAY_MS)
