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
        case _ if 400 <= status < 500:
            return Outcome.REJECTED
        case _ if 200 <= status < 300:
            return Outcome.SUCCESS
        case _:
            return Outcome.FAILED  # A redirect too: none is followed, and no API answers with one.
