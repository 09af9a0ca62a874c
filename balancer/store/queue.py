"""Where requests wait for a rule that is at its limits: one line a rule and worker, first come first served.

Only the head of a line asks Redis: soon after the time that the last answer gave, a few times a second at most, and at
once when this worker settles an attempt at one of the rule's providers, which may have made room. So waiting costs
Redis one select at a time, however many wait. The price of the order is that a large request holds up small ones.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import TypeVar

from balancer.domain import Rule
from balancer.errors import RateLimitedError

_T = TypeVar("_T")

_LEAST_PAUSE_S = 0.01
_MOST_PAUSE_S = 0.1


class _Line:
    """Those that wait, and what the last one who asked was told; `room` is set when asking at once is worth it."""

    def __init__(self, rule: Rule) -> None:
        self.pool = rule.pool
        self.providers = {service.provider for service in rule.services}
        self.waiting: deque[asyncio.Event] = deque()
        self.room = asyncio.Event()
        self._refusal = RateLimitedError("")
        self._refused_at = 0.0

    def refused(self, refusal: RateLimitedError, now: float) -> None:
        """Notes an answer."""
        self._refusal, self._refused_at = refusal, now

    def rest(self, now: float) -> RateLimitedError:
        """The last answer, with what is left of its time."""
        left_s = max(0.0, (self._refusal.retry_after_s or 0.0) - (now - self._refused_at))
        return RateLimitedError(self._refusal.message, cause=self._refusal.cause, retry_after_s=left_s)

    def pause_s(self, now: float) -> float:
        """How long the head waits before it asks again."""
        wanted_s = min(max(self._refusal.retry_after_s or 0.0, _LEAST_PAUSE_S), _MOST_PAUSE_S)
        return wanted_s - (now - self._refused_at)


class Queues:
    """The lines of one worker."""

    def __init__(self) -> None:
        self._lines: dict[tuple[str, str, str], _Line] = {}

    def __len__(self) -> int:
        """How many wait."""
        return sum(len(line.waiting) for line in self._lines.values())

    def __bool__(self) -> bool:
        """True when anybody waits."""
        return bool(self._lines)

    def has_line(self, rule: Rule) -> bool:
        """True when somebody waits for the rule, whichever service of it serves."""
        return bool(self._lines) and (rule.uuid, rule.entry, "") in self._lines

    async def wait(self, rule: Rule, only: str, ask: Callable[[], Awaitable[_T]]) -> _T:
        """What `ask` returns once it is no longer refused for a limit, for up to the rule's `queue_timeout_ms`.

        Nobody overtakes: while others wait, `ask` is called only when they are through. Those that want one service
        `only` have a line of their own. Raises RateLimitedError with the rest of the time to wait when the time is
        over, at once when waiting is no use, and whatever else `ask` raises. An `ask` under way is not broken off.
        """
        now = asyncio.get_running_loop().time
        until = now() + rule.queue_timeout_ms / 1000
        key = (rule.uuid, rule.entry, only)
        line = self._lines.get(key)
        if line is None:
            try:
                return await ask()
            except RateLimitedError as exc:
                if not _passes(exc):
                    raise
                # Others that asked along with this one may have lined up before it.
                line = self._lines.setdefault(key, _Line(rule))
                line.refused(exc, now())
        turn = asyncio.Event()
        line.waiting.append(turn)
        try:
            if line.waiting[0] is not turn:
                await _set_within(turn, until - now())
            if line.waiting[0] is not turn:
                raise line.rest(now())
            return await _at_the_head(line, until, ask)
        finally:
            line.waiting.remove(turn)
            if line.waiting:
                line.waiting[0].set()
            else:
                del self._lines[key]

    def settled(self, pool: str, service: str) -> None:
        """Tells the lines for which this worker's settle of an attempt may have made room."""
        provider = service.partition(":")[0]
        for line in self._lines.values():
            if line.pool == pool and provider in line.providers:
                line.room.set()


async def _at_the_head(line: _Line, until: float, ask: Callable[[], Awaitable[_T]]) -> _T:
    now = asyncio.get_running_loop().time
    while (left_s := until - now()) > 0:
        await _set_within(line.room, min(line.pause_s(now()), left_s))
        line.room.clear()
        try:
            answer = await ask()
        except RateLimitedError as exc:
            if not _passes(exc):
                raise
            line.refused(exc, now())
        else:
            line.room.set()  # There may be more where this came from.
            return answer
    raise line.rest(now())


def _passes(refusal: RateLimitedError) -> bool:
    """True for a limit that gives way in time: not for a cooldown, which the upstream has asked for."""
    return refusal.cause == "limited" and refusal.retry_after_s is not None


async def _set_within(event: asyncio.Event, timeout_s: float) -> None:
    """Returns when the event is set, or after the time."""
    try:
        async with asyncio.timeout(timeout_s):
            await event.wait()
    except TimeoutError:
        pass
