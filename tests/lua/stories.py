"""Short words for stories of attempts that end badly, told alike to the scripts and to the reference."""

from __future__ import annotations

from typing import Any

import msgspec

from balancer.domain import Outcome
from balancer.reference import Pool
from balancer.store import keys
from balancer.store.views import BreakerView
from tests.lua.builders import A, Fleet, an_abandoned, an_entry

SUCCESS, FAILED, REJECTED, CANCELLED = Outcome.SUCCESS, Outcome.FAILED, Outcome.REJECTED, Outcome.CANCELLED
RATE_LIMITED, OVERLOADED, UNAUTHORIZED = Outcome.RATE_LIMITED, Outcome.OVERLOADED, Outcome.UNAUTHORIZED
OUTCOMES = {
    "s": SUCCESS,
    "f": FAILED,
    "o": OVERLOADED,
    "u": UNAUTHORIZED,
    "r": REJECTED,
    "c": CANCELLED,
    "l": RATE_LIMITED,
}
"""Each by a letter, `l` for what was limited, so that a history is a word."""


def told(answer: list[Any]) -> tuple[Any, ...]:
    """An answer without its place: service, reason, streak and switch of a pick, else the word and all else."""
    return (answer[1], answer[2], answer[6], answer[7]) if answer[0] == "pick" else tuple(answer)


def ask(fleet: Fleet, **selection: Any) -> tuple[Any, ...]:
    """The answer to one new selection, without its place."""
    (answer,) = fleet.ask(**selection)
    return told(answer)


def chosen(fleet: Fleet, **selection: Any) -> tuple[str, str]:
    """Service and reason of one pick, or `none` and what keeps all back."""
    first, second, *_ = ask(fleet, **selection)
    return first, second


def end(fleet: Fleet, service: str, outcome: Outcome = SUCCESS, *, worker: str = "w1", **entry: Any) -> None:
    """Settles the attempt that the worker asked for last."""
    fleet.settle(an_entry(fleet.numbers[worker], service, outcome, **entry), worker=worker)


def abandon(fleet: Fleet, *, worker: str = "w1") -> None:
    """Gives up the attempt that the worker asked for last."""
    fleet.settle(an_abandoned(fleet.numbers[worker]), worker=worker)


def live(fleet: Fleet, history: str, service: str = A, **selection: Any) -> None:
    """Attempts at a service, asked for by itself and settled at once, with these outcomes."""
    for letter in history:
        assert ask(fleet, only=service, **selection)[0] == service
        end(fleet, service, OUTCOMES[letter])


def breaker(fleet: Fleet, service: str = A) -> BreakerView:
    """A service's breaker as it is stored."""
    if not isinstance(fleet.pool, Pool):
        return fleet.service(service).breaker
    kept = msgspec.structs.astuple(fleet.pool.service(service).breaker)
    return BreakerView(**dict(zip(BreakerView.__struct_fields__, kept, strict=True)))


def place(fleet: Fleet) -> int:
    """The pool's position."""
    return fleet.pool.position if isinstance(fleet.pool, Pool) else fleet.view().position


def standing(fleet: Fleet, rule: str = "chat") -> tuple[str, int]:
    """The rule's cursor and streak."""
    if not isinstance(fleet.pool, Pool):
        return fleet.cursor(rule)
    partition = fleet.pool.partitions[keys.partition(rule)]
    return partition.cursor, partition.streak


def broken(fleet: Fleet) -> str:
    """The list of breakers that are not closed."""
    if isinstance(fleet.pool, Pool):
        return fleet.pool.broken
    text: bytes | None = fleet.pool.client.hget(keys.services(fleet.pool.name), "broken")
    return (text or b"").decode()


def pinned(fleet: Fleet, session: str = "s") -> str:
    """The service that a session is pinned to, empty for none."""
    if not isinstance(fleet.pool, Pool):
        return fleet.pool.pinned(fleet.now_ms, [session]).get(session, ("", 0))[0]
    service, until_ms = fleet.pool.pins.get(session, ("", 0))
    return service if until_ms > fleet.now_ms else ""
