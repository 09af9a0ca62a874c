"""The books of a phase: what the store's history says of every attempt, against what the upstreams saw of it."""

from __future__ import annotations

import msgspec

from balancer.audit import Event
from benchmarks.prove.journal import Attempt

Key = tuple[str, int]


class Books(msgspec.Struct, kw_only=True):
    """Attempts by how they ended, and what does not add up."""

    seen: int = 0
    settled: int = 0
    lost: int = 0
    lost_unseen: int = 0
    """Picked for a worker that was killed before it could send anything."""
    lost_to_failover: int = 0
    tokens: int = 0
    faults: list[str] = msgspec.field(default_factory=list)


class Ledger:
    """What a history says of attempts; fed with its events."""

    def __init__(self, *, has_failovers: bool) -> None:
        self.settles: dict[Key, list[tuple[int, int]]] = {}
        self.lost: dict[Key, str] = {}
        self._has_failovers = has_failovers
        self._picks: set[Key] = set()

    def feed(self, pool: str, event: Event) -> None:
        """Notes a pick, or the end of an attempt."""
        match event["event"]:
            case "settle":
                key = (event["worker"], int(event["number"]))
                self.lost.pop(key, None)  # Its worker was only late.
                if event["outcome"] != "abandoned":
                    self.settles.setdefault(key, []).append((int(event["input"]), int(event["output"])))
            case "reap":
                self.lost[event["worker"], int(event["number"])] = f"{pool} {event['service']}"
            case "pick":
                self._picks.add((event["worker"], int(event["number"])))
            case _:
                pass

    def was_rolled_back(self, key: Key) -> bool:
        """True when a failover has lost the attempt's pick: the history that stands does not have it."""
        return self._has_failovers and key not in self._picks


def compare(ledger: Ledger, attempts: dict[Key, Attempt], ended_well: set[str]) -> Books:
    """Every attempt that an upstream saw is settled once with its tokens, or lost with its worker; nothing else is.

    `ended_well`: the workers that nobody has killed, which therefore have lost nothing.
    """
    books = Books(seen=len(attempts), lost_unseen=len(ledger.lost.keys() - attempts.keys()))
    for key, attempt in attempts.items():
        settles = ledger.settles.get(key, [])
        if len(settles) > 1:
            books.faults.append(f"{key} was settled {len(settles)} times")
        elif settles:
            books.settled += 1
            books.tokens += sum(settles[0])
            if attempt.tokens is None:
                books.faults.append(f"{key} was settled, but its upstream never ended it")
            elif settles[0] != attempt.tokens:
                books.faults.append(f"{key} was settled with {settles[0]} tokens, the upstream says {attempt.tokens}")
        elif key in ledger.lost:
            books.lost += 1
        elif ledger.was_rolled_back(key):
            books.lost_to_failover += 1
        else:
            books.faults.append(f"{key} was seen upstream, and neither settled nor lost")
    books.faults += [f"{key} was settled, and no upstream saw it" for key in ledger.settles.keys() - attempts.keys()]
    books.faults += [f"{key} was lost, and its worker ended well" for key in ledger.lost if key[0] in ended_well]
    return books


def totals(ledger: Ledger, attempts: dict[Key, Attempt]) -> dict[str, tuple[int, int, int]]:
    """Requests, tokens and lost attempts by `<pool> <service>`, as the books have them."""
    rows: dict[str, tuple[int, int, int]] = {}

    def add(service: str, requests: int, tokens: int, lost: int) -> None:
        before = rows.get(service, (0, 0, 0))
        rows[service] = (before[0] + requests, before[1] + tokens, before[2] + lost)

    for key, settles in ledger.settles.items():
        if attempt := attempts.get(key):
            add(f"{attempt.pool} {attempt.service}", 1, sum(settles[0]), 0)
    for service in ledger.lost.values():
        add(service, 1, 0, 1)
    return rows
