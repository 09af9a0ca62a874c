"""Statuses as outcomes."""

from __future__ import annotations

import pytest

from balancer.domain import Outcome
from balancer.failures import outcome_of_status


@pytest.mark.parametrize(
    ("outcome", "statuses"),
    [
        (Outcome.SUCCESS, (200, 201, 204, 299)),
        (Outcome.RATE_LIMITED, (429, 529)),
        (Outcome.UNAUTHORIZED, (401, 403)),
        (Outcome.OVERLOADED, (503,)),
        (Outcome.FAILED, (301, 302, 307, 408, 500, 502, 504, 599, 600)),
        (Outcome.REJECTED, (400, 402, 404, 413, 422, 499)),
    ],
)
def test_a_status_means_an_outcome(outcome: Outcome, statuses: tuple[int, ...]) -> None:
    assert {outcome_of_status(status) for status in statuses} == {outcome}
