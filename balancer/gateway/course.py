"""A request's way through services and rules: what may be tried after a failure. No clock, no I/O."""

from __future__ import annotations

from collections.abc import Callable

from balancer.domain import Pick, Rule
from balancer.failures import RETRYABLE, Verdict

FindRule = Callable[[str], Rule | None]
"""The rule of a uuid, None for one that cannot serve the request."""

_MOST_BACKOFF_S = 10.0


class Course:
    """Where one request stands: `rule` is the one to pick under next, `attempts` how many were made, over all rules.

    Each rule is entered once. A rule's own fallbacks come before those that are left of the rule that led to it.
    With `only`, or when it `is_bound`, the request belongs to one service: nothing else is ever tried. That service may
    be one of a rule that stands in for the asked one: then it begins `under` that.
    """

    def __init__(
        self, rule: Rule, find: FindRule, *, under: Rule | None = None, only: str = "", is_bound: bool = False
    ) -> None:
        self.asked = rule
        self.rule = under or rule
        self.only = only
        self.attempts = 0
        self.pick: Pick | None = None
        """The last, as the forwarder notes it."""
        self._find = find
        self._is_bound = is_bound or bool(only)
        self._here = 0
        self._tried: list[str] = []
        self._entered = {self.rule.uuid}
        self._fallbacks = self.rule.fallback
        self._has_overflowed = False

    @property
    def response_model(self) -> str:
        """The name under which the client sees the model: the asked rule's, if it has one."""
        return self.asked.response_model or self.rule.response_model

    @property
    def tried(self) -> tuple[str, ...]:
        """The services of the rule that were tried, under whichever rule."""
        return tuple(id_ for id_ in (s.id for s in self.rule.services) if id_ in self._tried) if self._tried else ()

    def picked(self, service: str, rule: Rule) -> None:
        """Notes an attempt, and the rule as it stood at the pick."""
        self.rule = rule
        self.attempts += 1
        self._here += 1
        self._tried.append(service)

    def goes_on(self, verdict: Verdict) -> bool:
        """True when another attempt may follow one of this verdict, of which the client has seen nothing."""
        return self._next(verdict) is not None

    def go_on(self, verdict: Verdict) -> bool:
        """Turns to what follows; False when nothing does."""
        rule = self._next(verdict)
        if rule is None:
            return False
        if verdict.is_context_overflow:
            self._has_overflowed = True
            self._enter(rule, ())  # What stood in for a rule of shorter prompts is no help.
        elif rule is not self.rule:
            self._enter(rule, self._fallbacks)
        return True

    def fall_back(self) -> bool:
        """Turns to the next rule that stands in, the current one having no candidate; False when there is none."""
        rule = self._fallback()
        if rule is None:
            return False
        self._enter(rule, self._fallbacks)
        return True

    def backoff_s(self, jitter: float) -> float:
        """The pause before the next attempt, twice as long after each; `jitter` from 0 to 1 makes it 50 to 150 %."""
        return min(self.rule.retry.backoff_ms / 1000 * 2.0 ** (self.attempts - 1), _MOST_BACKOFF_S) * (0.5 + jitter)

    def _next(self, verdict: Verdict) -> Rule | None:
        if self._is_bound:
            return None
        if verdict.is_context_overflow:
            uuid = self.rule.on_context_overflow
            if not uuid or self._has_overflowed or uuid in self._entered:
                return None
            return self._find(uuid)
        if verdict.outcome not in RETRYABLE or self._here >= self.rule.retry.attempts:
            return None
        # Where each service was tried, select needs not be asked to know it.
        if any(service.id not in self._tried for service in self.rule.active_services()):
            return self.rule
        return self._fallback()

    def _fallback(self) -> Rule | None:
        if self._is_bound:
            return None
        rules = (self._find(uuid) for uuid in self._fallbacks if uuid not in self._entered)
        return next((rule for rule in rules if rule is not None), None)

    def _enter(self, rule: Rule, left: tuple[str, ...]) -> None:
        self.rule = rule
        self._here = 0
        self._entered.add(rule.uuid)
        self._fallbacks = (*rule.fallback, *left)
