"""A service's counters as the admin API tells them: tingly-box's fields, and our own beside them."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

import msgspec

from balancer.store.views import BreakerState, PoolView, ServiceView


class Stats(msgspec.Struct, frozen=True, kw_only=True):
    """What a service has used. `request_count` counts settled attempts, `picks` and the window's requests picks.

    The window is the one of `time_window` seconds; one that has ended, or never began, counts zeros and has no start.
    """

    service_id: str
    request_count: int = 0
    last_used: str | None = None
    window_start: str | None = None
    window_request_count: int = 0
    window_tokens_consumed: int = 0
    window_input_tokens: int = 0
    window_output_tokens: int = 0
    time_window: int
    in_flight: int = 0
    reserved_tokens: int = 0
    picks: int = 0
    failures: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    cache_creation_tokens: int = 0
    reasoning_tokens: int = 0
    lost: int = 0
    lost_tokens: int = 0
    abandoned: int = 0
    breaker: BreakerState = "closed"
    cooling_until: str | None = None


def stats_of(view: PoolView, service_id: str, window_s: int) -> Stats:
    """The counters of a service in a pool, with its window of that length. Opens none."""
    state = view.services.get(service_id, ServiceView())
    window = next((w for w in state.windows if w.length_s == window_s), None)
    requests, tokens = window.counts(view.now_ms) if window else (0, 0)
    is_open = window is not None and window.start_ms > 0 and view.now_ms - window.start_ms < window_s * 1000
    # Tokens of attempts that were lost and found again may be taken from a window after their output was counted.
    output = min(window.output, tokens) if window and is_open else 0
    return Stats(
        service_id=service_id,
        request_count=state.requests,
        last_used=at(state.last_used),
        window_start=at(window.start_ms) if window and is_open else None,
        window_request_count=requests,
        window_tokens_consumed=tokens,
        window_input_tokens=tokens - output,
        window_output_tokens=output,
        time_window=window_s,
        in_flight=state.in_flight,
        reserved_tokens=state.reserved,
        picks=state.picks,
        failures=state.failures,
        input_tokens=state.input,
        output_tokens=state.output,
        cached_tokens=state.cached,
        cache_creation_tokens=state.cache_creation,
        reasoning_tokens=state.reasoning,
        lost=state.lost,
        lost_tokens=state.lost_tokens,
        abandoned=state.abandoned,
        breaker=view.breaker_state(service_id),
        cooling_until=at(state.cooldown) if view.cooldown_ms(service_id) else None,
    )


def added_up(several: Sequence[Stats]) -> Stats:
    """The counters of one service in several pools as one: sums, the latest use, the earliest start of a window.

    Of breakers the one that is furthest from closed, of cooldowns the longest.
    """
    values = [msgspec.structs.asdict(stats) for stats in several]
    total = {name: sum(value[name] for value in values) for name, first in values[0].items() if isinstance(first, int)}
    return Stats(
        **total
        | {
            "service_id": several[0].service_id,
            "time_window": several[0].time_window,
            "last_used": max((s.last_used for s in several if s.last_used), default=None),
            "breaker": max((s.breaker for s in several), key=("closed", "half_open", "open").index),
            "cooling_until": max((s.cooling_until for s in several if s.cooling_until), default=None),
            "window_start": min((s.window_start for s in several if s.window_start), default=None),
        }
    )


def at(time_ms: int) -> str | None:
    """A moment in RFC 3339, None for 0."""
    if not time_ms:
        return None
    return datetime.fromtimestamp(time_ms / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
