"""How an answer's status becomes an outcome."""

from __future__ import annotations

from balancer.domain import Outcome


def outcome_of_status(status: int) -> Outcome:
    """The outcome that a finished answer of this status means."""
    match status:
        case 429 | 529:
            return Outcome.RATE_LIMITED
        case 401 | 403:
            return Outcome.UNAUTHORIZED
        case 503:
            return Outcome.OVERLOADED
        case 408:
            return Outcome.FAILED
        case _ if status >= 500:
            return Outcome.FAILED
        case _ if status >= 400:
            return Outcome.REJECTED
        case _:
            return Outcome.SUCCESS
