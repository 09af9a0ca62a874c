"""The sliding minute, and what it lets through."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from balancer.limits import NEVER, Bucket, Meter, Minute, wait_ms

NOW = 1_800_000_000_000
CURRENT = NOW // 5000


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    rpm: int = 0
    tpm: int = 0
    in_flight: int = 0


def a_minute(*buckets: tuple[int, int, int]) -> Minute:
    """Buckets, each so many times five seconds before NOW, requests and tokens."""
    return Minute([Bucket(CURRENT - ago, requests, tokens) for ago, requests, tokens in buckets])


# -- the minute --------------------------------------------------------------------------------------------------------


def test_what_is_counted_within_five_seconds_is_one_bucket() -> None:
    minute = Minute()
    minute.count(NOW, 1, 0)
    minute.count(NOW + 4999, 0, 30)
    minute.count(NOW + 5000, 2, 5)

    assert str(minute) == f"{CURRENT} 1 30;{CURRENT + 1} 2 5"


def test_counting_nothing_only_forgets_what_is_over() -> None:
    minute = a_minute((13, 1, 1), (12, 2, 2))
    minute.count(NOW, 0, 0)

    assert minute == a_minute((12, 2, 2))
    minute.count(NOW + 5000, 0, 0)
    assert minute == Minute()


def test_what_was_used_counts_for_a_minute_at_least_and_65_seconds_at_most() -> None:
    minute = a_minute((12, 3, 30))

    assert minute.rolled(NOW + 4999).total("requests") == 3
    assert minute.rolled(NOW + 5000).total("requests") == 0


def test_what_lies_in_the_future_is_of_now() -> None:
    """The clock has stepped back: it must not count for longer than anything else."""
    minute = a_minute((1, 1, 10), (0, 2, 20), (-1, 4, 40), (-100, 8, 80))

    assert minute.rolled(NOW) == a_minute((1, 1, 10), (0, 14, 140))


def test_looking_changes_nothing() -> None:
    minute = a_minute((20, 1, 1), (-3, 1, 1))
    before = str(minute)
    minute.rolled(NOW)
    wait_ms(Limits(rpm=1), Meter(minute), 0, NOW)

    assert str(minute) == before


@given(
    rpm=st.integers(1, 5),
    steps=st.lists(st.integers(0, 20_000), min_size=1, max_size=80),
)
def test_in_no_sixty_seconds_is_there_more_than_the_limit(rpm: int, steps: list[int]) -> None:
    """Whoever waits as long as he is told is let through then, and a minute never has more than its limit."""
    meter, now, taken = Meter(), NOW, list[int]()
    for step in steps:
        now += step
        wait = wait_ms(Limits(rpm=rpm), meter, 0, now)
        if wait is not None:
            assert 0 < wait <= 65_000
            assert wait_ms(Limits(rpm=rpm), meter, 0, now + wait - 1) is not None
            now += wait
        assert wait_ms(Limits(rpm=rpm), meter, 0, now) is None
        meter.minute.count(now, 1, 0)
        taken.append(now)

    assert max(sum(at <= other < at + 60_000 for other in taken) for at in taken) <= rpm


# -- limits ------------------------------------------------------------------------------------------------------------

USED = a_minute((12, 2, 20), (6, 1, 50), (0, 4, 10))


@pytest.mark.parametrize(
    ("limits", "meter", "reserved", "wait"),
    [
        # None is no limit, whatever was used.
        (Limits(), Meter(USED, in_flight=99, reserved=10**9), 10**9, None),
        # Requests: seven were made; two of them are over in 5 s, one more in 35 s, the rest in 65 s.
        (Limits(rpm=8), Meter(USED), 0, None),
        (Limits(rpm=7), Meter(USED), 0, 5000),
        (Limits(rpm=6), Meter(USED), 0, 5000),
        (Limits(rpm=5), Meter(USED), 0, 35_000),
        (Limits(rpm=4), Meter(USED), 0, 65_000),
        # Tokens: 80 were used, and what others have reserved counts as well.
        (Limits(tpm=100), Meter(USED, reserved=10), 10, None),
        (Limits(tpm=100), Meter(USED, reserved=10), 11, 5000),
        (Limits(tpm=100), Meter(USED, reserved=10), 30, 5000),
        (Limits(tpm=100), Meter(USED, reserved=10), 31, 35_000),
        (Limits(tpm=100), Meter(USED, reserved=10), 90, 65_000),
        # Only what is reserved can give way.
        (Limits(tpm=100), Meter(USED, reserved=10), 91, 1000),
        (Limits(tpm=100), Meter(Minute(), reserved=60), 50, 1000),
        # A request that is above the limit by itself.
        (Limits(tpm=100), Meter(), 100, None),
        (Limits(tpm=100), Meter(), 101, NEVER),
        (Limits(tpm=100, rpm=4), Meter(USED), 101, NEVER),
        # In flight.
        (Limits(in_flight=3), Meter(in_flight=2), 0, None),
        (Limits(in_flight=3), Meter(in_flight=3), 0, 1000),
        # The longest of several.
        (Limits(rpm=5, tpm=81, in_flight=1), Meter(USED, in_flight=1), 3, 35_000),
        # Below zero nothing is let through.
        (Limits(rpm=-1), Meter(), 0, 1000),
        (Limits(tpm=-1), Meter(), 0, 1000),
        (Limits(in_flight=-1), Meter(), 0, 1000),
    ],
)
def test_a_request_waits_until_it_fits_in(limits: Limits, meter: Meter, reserved: int, wait: int | None) -> None:
    assert wait_ms(limits, meter, reserved, NOW) == wait
