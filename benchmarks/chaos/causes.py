"""Why a request failed: exactly one cause out of a closed list, matched to an injected fault by time and by target.

What matches none has no cause, and fails the run.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import StrEnum

import msgspec

from benchmarks.chaos.account import BREAKS_STREAMS, STORMS, Attempt
from benchmarks.chaos.client import Answer, End


class Cause(StrEnum):
    """All that a client may have to bear, and from what."""

    WORKER_KILLED = "worker_killed"
    STORE_CLOSED = "store_closed"
    UPSTREAM_EXHAUSTED = "upstream_exhausted"
    STREAM_CUT = "stream_cut_after_first_byte"
    LIMITED = "limited"
    CLIENT_DISCONNECTED = "client_disconnected"


class FaultKind(StrEnum):
    """What is injected; storms have their own names."""

    KILL_WORKER = "kill_worker"
    KILL_STORE = "kill_store"
    STALL_STORE = "stall_store"
    KILL_MASTER = "kill_master"
    FREEZE_MASTER = "freeze_master"
    LEAVE = "clients_leave"
    DAWDLE = "clients_dawdle"


OF_THE_STORE = frozenset({FaultKind.KILL_STORE, FaultKind.STALL_STORE, FaultKind.KILL_MASTER, FaultKind.FREEZE_MASTER})
OF_STORE_SILENCE = frozenset({FaultKind.KILL_STORE, FaultKind.STALL_STORE})


_NOTICE_S = 0.25
"""Until a client that has an idle connection learns that its worker is dead."""


_AT_ONCE = 10


class Fault(msgspec.Struct):
    """One that was injected, at monotonic times; `target` is a process, an account, or a share of the clients."""

    kind: str
    target: str
    began: float
    ended: float = float("inf")

    def meets(self, began: float, ended: float, grace_s: float = 0.0) -> bool:
        """True when it was there at some time of that span; its effects may last a little longer."""
        return self.began <= ended and began <= self.ended + grace_s


class Judge:
    """Finds the cause of whatever went wrong."""

    def __init__(
        self,
        faults: Sequence[Fault],
        attempts: dict[str, list[Attempt]],
        *,
        closed_rules: frozenset[str],
        limited_rules: frozenset[str],
        most_attempts: int,
        accounts: Sequence[str],
        has_budget: Callable[[str, float], bool],
        serving_since: Mapping[int, float],
        store_grace_s: float,
        recovery_s: float,
    ) -> None:
        """`attempts`: what all accounts have seen, by request id; a request has `most_attempts` if it needs them.

        It has fewer where its rule's other services are at their limits, where the rule's retry budget is used up
        (`has_budget`: of a rule, at a time), or where every account was befallen not longer than `recovery_s` ago, so
        that breakers may be open and services cool. A worker that has not served before the store left
        (`serving_since`) knows no rules to go on with.
        """
        self._faults = faults
        self._attempts = attempts
        self._closed = closed_rules
        self._limited = limited_rules
        self._most_attempts = most_attempts
        self._accounts = accounts
        self._has_budget = has_budget
        self._recovery_s = recovery_s
        self._serving_since = serving_since
        self._store_grace_s = store_grace_s

    def cause(self, answer: Answer) -> Cause | None:
        """The cause of an end that is not whole, None if there is none."""
        match answer.end:
            case End.LEFT:
                return Cause.CLIENT_DISCONNECTED
            case End.BROKEN if self._was_killed(answer):
                return Cause.WORKER_KILLED
            case End.BROKEN | End.CUT if answer.status == 200 and self._was_cut(answer):
                return Cause.STREAM_CUT
            case End.ERROR if answer.status == 503 and "Redis" in answer.message:
                return Cause.STORE_CLOSED if self._store_was_away(answer) else None
            case End.ERROR if answer.ask.rule in self._limited and answer.code == "rate_limit_exceeded":
                return Cause.LIMITED
            case End.ERROR if self._is_exhausted(answer):
                return Cause.UPSTREAM_EXHAUSTED
            case _:
                return None

    def is_needlessly_degraded(self, answer: Answer) -> bool:
        """True when its worker picked without the store, which was there, or when it must not."""
        was_away = any(
            fault.kind in OF_THE_STORE and fault.meets(answer.began, answer.ended, self._store_grace_s)
            for fault in self._faults
        )
        return bool(answer.degraded) and (answer.ask.rule in self._closed or not was_away)

    def attempts_of(self, request_id: str) -> list[Attempt]:
        """What the accounts have seen of a request."""
        return self._attempts.get(request_id, [])

    def faults_during(self, answer: Answer) -> list[Fault]:
        """What was injected while it was under way."""
        return [fault for fault in self._faults if fault.meets(answer.began, answer.ended, self._store_grace_s)]

    def _was_killed(self, answer: Answer) -> bool:
        """Its own worker died while it was under way, or just before, so that the client could not know yet."""
        return any(
            fault.kind == FaultKind.KILL_WORKER
            and fault.target == str(answer.pid)
            and answer.began - _NOTICE_S <= fault.began <= answer.ended
            for fault in self._faults
        )

    def _was_cut(self, answer: Answer) -> bool:
        """Its last attempt, at the service that it names, was broken in the middle."""
        last = max(self._attempts.get(answer.ask.request_id, ()), key=lambda a: a.at, default=None)
        return (
            last is not None
            and last.service == answer.service
            and last.storm in BREAKS_STREAMS
            and self._was_injected(last)
        )

    def _store_was_away(self, answer: Answer) -> bool:
        since = self._serving_since.get(answer.pid, math.inf)
        return any(
            fault.kind in OF_THE_STORE
            and fault.meets(answer.began, answer.ended, self._store_grace_s)
            and (answer.ask.rule in self._closed or since > fault.began)
            for fault in self._faults
        )

    def _is_exhausted(self, answer: Answer) -> bool:
        """It had every attempt that it may have, and a storm befell each."""
        attempts = self._attempts.get(answer.ask.request_id, [])
        if not attempts or not all(map(self._was_injected, attempts)):
            return False
        return (
            len(attempts) >= self._most_attempts
            or answer.ask.rule in self._limited  # More is asked for than all of its services may do.
            or not self._has_budget(answer.ask.rule, answer.ended)
            or all(self._was_befallen(account, answer) for account in self._accounts)
        )

    def _was_befallen(self, account: str, answer: Answer) -> bool:
        return any(
            fault.kind in STORMS
            and fault.target == account
            and fault.meets(answer.began, answer.ended, self._recovery_s)
            for fault in self._faults
        )

    def _was_injected(self, attempt: Attempt) -> bool:
        return any(
            fault.kind == attempt.storm
            and fault.target == attempt.service.partition("-")[0]
            and fault.meets(attempt.at, attempt.at)
            for fault in self._faults
        )


class RetryBudget:
    """What is left of each rule's retries, by the rules' own arithmetic over what the accounts have seen.

    A rule begins with `most` retries; every first attempt adds `ratio`, every further one takes one.
    """

    def __init__(self, attempts: Iterable[Attempt], ratio: float, most: float) -> None:
        self._steps: dict[str, list[tuple[float, float]]] = {}
        left: dict[str, float] = {}
        seen: set[str] = set()
        for attempt in sorted(attempts, key=lambda a: a.at):
            rule = attempt.service.partition(":")[2]  # Here a rule's services are all of a model of its name.
            step = -1.0 if attempt.request_id in seen else ratio
            seen.add(attempt.request_id)
            left[rule] = min(most, left.get(rule, most) + step)
            self._steps.setdefault(rule, []).append((attempt.at, left[rule]))

    def is_left(self, rule: str, at: float) -> bool:
        """True if the rule surely had a retry left then; what happens at once may come in any order."""
        steps = self._steps.get(rule, [])
        last = bisect.bisect_right(steps, (at, math.inf))
        return all(left >= 1 + _AT_ONCE for _, left in steps[max(0, last - _AT_ONCE) : last])


def by_request(attempts: Iterable[Attempt]) -> dict[str, list[Attempt]]:
    """Attempts by the request that they were made for."""
    found: dict[str, list[Attempt]] = {}
    for attempt in attempts:
        found.setdefault(attempt.request_id, []).append(attempt)
    return found
