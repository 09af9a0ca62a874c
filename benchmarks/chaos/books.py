"""The balance of usage: what the store has counted, against what the accounts have seen and reported themselves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import msgspec

from balancer.store.views import PoolView
from benchmarks.chaos.account import Attempt

Event = dict[str, str]


class Row(msgspec.Struct, kw_only=True):
    """One service: attempts and tokens here and there."""

    seen: int = 0
    settled: int = 0
    lost: int = 0
    theirs: int = 0
    """Tokens that the account reported for attempts that are not lost."""
    ours: int = 0
    untold: int = 0
    """Attempts whose usage the account reported and nobody settled: their worker was killed."""


class Balance(msgspec.Struct, kw_only=True):
    """All services, and what does not add up."""

    rows: dict[str, Row] = msgspec.field(default_factory=dict)
    lost: int = 0
    vanished: int = 0
    """Attempts of killed workers that the store never knew, or forgot in a failover."""
    unsent: int = 0
    """Attempts settled as cancelled for a client that left before its account was asked."""
    faults: list[str] = msgspec.field(default_factory=list)


class History:
    """What the pool's recorded events say of attempts; fed with them in order."""

    def __init__(self) -> None:
        self.settled: Counter[str] = Counter()
        """Attempts by service."""
        self.usage: dict[tuple[str, int], list[tuple[int, int]]] = {}
        """Input and output of every settle that reported usage, by service and the account's serial number."""
        self.lost: dict[tuple[str, int], str] = {}
        """Services of attempts that were reaped and not settled after all, by worker and number."""
        self.unsent: Counter[str] = Counter()

    def feed(self, event: Event) -> None:
        """Notes how an attempt ended."""
        if event["event"] == "reap":
            self.lost[event["worker"], int(event["number"])] = event["service"]
        elif event["event"] == "settle":
            self.lost.pop((event["worker"], int(event["number"])), None)  # Its worker was only late.
            if event["outcome"] == "abandoned":
                return
            service = event["service"]
            self.settled[service] += 1
            if event["outcome"] == "cancelled" and event["input"] == "0":
                self.unsent[service] += 1  # Or it was sent, and had reported nothing.
            if serial := int(event["cached"]):
                self.usage.setdefault((service, serial), []).append((int(event["input"]), int(event["output"])))


def compare(
    view: PoolView,
    history: History,
    attempts: Iterable[Attempt],
    *,
    most_lost: int,
    most_vanished: int,
    most_unsent: int,
) -> Balance:
    """The balance. `most_…`: what killed workers and clients that left early can explain."""
    balance = Balance(lost=len(history.lost))
    lost = Counter(history.lost.values())
    known: set[tuple[str, int]] = set()
    for attempt in attempts:
        row = balance.rows.setdefault(attempt.service, Row())
        row.seen += 1
        key = (attempt.service, attempt.serial)
        known.add(key)
        settles = history.usage.get(key, [])
        if len(settles) > 1:
            balance.faults.append(f"{attempt.request_id} at {attempt.service} was settled {len(settles)} times")
        elif settles:
            row.theirs += attempt.input + attempt.output
            if settles[0] != (attempt.input, attempt.output):
                balance.faults.append(
                    f"{attempt.request_id} at {attempt.service} was settled with {settles[0]} tokens, "
                    f"its account reported {(attempt.input, attempt.output)}"
                )
        elif attempt.has_usage:
            row.untold += 1
    balance.faults += [
        f"{service}: usage {serial} is of no attempt" for service, serial in history.usage.keys() - known
    ]
    for service in balance.rows.keys() | {name for name, state in view.services.items() if state.requests}:
        _check_row(service, balance, view, history, lost[service])
    limits = (("lost", balance.lost, most_lost), ("vanished", balance.vanished, most_vanished))
    for name, count, most in (*limits, ("unsent", balance.unsent, most_unsent)):
        if count > most:
            balance.faults.append(f"{count} attempts are {name}; killed workers and clients that left explain {most}")
    return balance


def _check_row(service: str, balance: Balance, view: PoolView, history: History, lost: int) -> None:
    row, state, faults = balance.rows.setdefault(service, Row()), view.services.get(service), balance.faults
    if state is None:
        faults.append(f"{service}: {row.seen} attempts, and the store knows nothing of it")
        return
    row.settled, row.lost, row.ours = state.requests - state.lost, state.lost, state.input + state.output
    if (row.settled, row.lost) != (history.settled[service], lost):
        faults.append(
            f"{service}: the store counts {row.settled} settled and {row.lost} lost attempts, "
            f"its history has {history.settled[service]} and {lost}"
        )
    if row.ours != row.theirs:
        faults.append(f"{service}: {row.ours} tokens counted, the account reported {row.theirs}")
    more = row.seen - row.settled
    if more < 0:
        balance.unsent -= more
        if -more > history.unsent[service]:
            faults.append(f"{service}: {row.settled} attempts settled, the account saw {row.seen}")
    balance.vanished += max(0, more - row.lost, row.untold - row.lost)
    if state.in_flight or state.reserved:
        faults.append(f"{service}: {state.in_flight} in flight and {state.reserved} tokens reserved, after the end")
