"""A service's breaker: opens on failures, lets a probe through when it is half-open, closes on enough of them.

`closed` is state 0. State 1 is `open` until its time has come, then `half_open`. Nothing here looks at a clock.
"""

from __future__ import annotations

import msgspec

from balancer.domain import Entry, Outcome, ProviderDefinition

FAILURES = (Outcome.UNAUTHORIZED, Outcome.OVERLOADED, Outcome.FAILED)
"""What speaks against a service; the other outcomes but success say nothing of it."""
_MOST_DOUBLINGS = 3


def has_breaker(settings: ProviderDefinition | None) -> bool:
    """True when something can open it."""
    return settings is not None and bool(settings.failures or settings.ratio_permille)


class Breaker(msgspec.Struct):
    """One service's. `requests` and `failed` are of the window since `start`; `probe` is the position of its pick.

    `opens` counts how often it opened since it was closed for good, `successes` the probes in a row that went well.
    """

    state: int = 0
    consecutive: int = 0
    start: int = 0
    requests: int = 0
    failed: int = 0
    opens: int = 0
    successes: int = 0
    until: int = 0
    probe: int = 0

    def __str__(self) -> str:
        values = msgspec.structs.astuple(self)
        return " ".join(map(str, values)) if any(values) else ""

    def is_open(self, settings: ProviderDefinition | None) -> bool:
        """True while it keeps requests back, half-open or not."""
        return self.state == 1 and has_breaker(settings)

    def wants_probe(self, now_ms: int) -> bool:
        """True when it is half-open and no probe is out."""
        return self.state == 1 and self.until <= now_ms and self.probe == 0

    def reset(self) -> None:
        """Closed, and nothing remembered."""
        for name in self.__struct_fields__:
            setattr(self, name, 0)

    def settle(self, settings: ProviderDefinition | None, entry: Entry, now_ms: int, position: int, probe: int) -> None:
        """Counts how an attempt ended; `probe` is the one that it was, 0 for none. An old end tells nothing new."""
        is_probe = self.state == 1 and 0 < probe == self.probe
        is_success = entry.outcome is Outcome.SUCCESS and entry.age_ms == 0
        is_failure = entry.outcome in FAILURES and entry.age_ms == 0
        if settings is None or not has_breaker(settings):
            if is_success or is_failure:
                self.reset()
            elif is_probe:
                self.probe = 0
        elif self.state == 1:
            if is_probe:
                self.probe = 0
                if is_success:
                    self.succeed(settings)
                elif is_failure:
                    self.open(settings, now_ms, position)
        elif is_success:
            self._roll(settings, now_ms)
            self.requests += 1
            self.consecutive = 0
        elif is_failure:
            self._fail(settings, now_ms, position)

    def forget_probe(self, probe: int) -> None:
        """Takes back a probe that will not tell."""
        if self.state == 1 and 0 < probe == self.probe:
            self.probe = 0

    def check(self, settings: ProviderDefinition | None, now_ms: int, position: int, *, is_alive: bool) -> None:
        """Counts what a health check found."""
        if settings is None or not has_breaker(settings):
            return
        if self.wants_probe(now_ms):
            if is_alive:
                self.succeed(settings)
            else:
                self.open(settings, now_ms, position)
        elif self.state == 0 and not is_alive:
            self.consecutive += 1
            if 0 < settings.failures <= self.consecutive:
                self.open(settings, now_ms, position)

    def succeed(self, settings: ProviderDefinition) -> None:
        """One more success while half-open; after enough it is closed."""
        self.successes += 1
        if self.successes >= settings.successes:
            self.reset()

    def open(self, settings: ProviderDefinition, now_ms: int, position: int) -> None:
        """Opens, twice as long each time; up to a fifth more, so that not all probes come at once."""
        self.opens += 1
        length = settings.open_ms * 2 ** min(self.opens - 1, _MOST_DOUBLINGS)
        self.until = now_ms + length + length * (position * 7919 % 1000) // 5000
        self.state = 1
        self.consecutive = self.start = self.requests = self.failed = self.successes = self.probe = 0

    def _fail(self, settings: ProviderDefinition, now_ms: int, position: int) -> None:
        self._roll(settings, now_ms)
        self.requests += 1
        self.failed += 1
        self.consecutive += 1
        is_row = 0 < settings.failures <= self.consecutive
        share = settings.ratio_permille * self.requests
        is_share = settings.ratio_permille > 0 and self.failed * 1000 >= share
        if is_row or (is_share and self.requests >= settings.min_requests):
            self.open(settings, now_ms, position)

    def _roll(self, settings: ProviderDefinition, now_ms: int) -> None:
        if now_ms - self.start >= settings.window_ms or self.start > now_ms:
            self.start, self.requests, self.failed = now_ms, 0, 0
