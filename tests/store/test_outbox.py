"""The outbox: numbers, acknowledgements, gaps."""

from __future__ import annotations

from balancer.domain import Entry, Outcome
from balancer.store.settlement import ENTRIES_PER_BATCH, KEPT_BATCHES, KEPT_S, Outbox


def an_entry(number: int) -> Entry:
    return Entry(number=number, service="p:m", outcome=Outcome.SUCCESS)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def numbers(batches: list[object]) -> list[int]:
    return [batch.number for batch in batches]  # type: ignore[attr-defined]


def filled(batches: int, clock: Clock | None = None) -> Outbox:
    outbox = Outbox(clock or Clock())
    for number in range(batches):
        outbox.add(an_entry(number))
        outbox.take()
    return outbox


def test_entries_go_out_in_order_under_rising_numbers_and_a_bounded_size() -> None:
    outbox = Outbox()
    for number in range(ENTRIES_PER_BATCH + 1):
        outbox.add(an_entry(number))
    batches = outbox.take()
    assert numbers(list(batches)) == [1, 2]
    sent = [entry.number for batch in batches for entry, _ in batch.entries]
    assert sent == list(range(ENTRIES_PER_BATCH + 1))
    assert outbox.take() == []


def test_length_counts_what_is_not_acknowledged() -> None:
    outbox = filled(3)
    outbox.add(an_entry(9))
    assert len(outbox) == 4
    outbox.acknowledge(2)
    assert len(outbox) == 2


def test_after_a_reconnect_the_unacknowledged_are_sent_again_in_order() -> None:
    outbox = filled(4)
    outbox.acknowledge(2)
    batches, missing = outbox.resend()
    assert numbers(list(batches)) == [3, 4]
    assert missing == 0


def test_a_gap_is_filled_with_acknowledged_batches_that_are_still_kept() -> None:
    outbox = filled(4)
    outbox.acknowledge(3)
    batches, missing = outbox.resend(1)
    assert numbers(list(batches)) == [2, 3, 4]
    assert missing == 0
    assert len(outbox) == 3


def test_what_is_no_longer_kept_is_reported_as_missing() -> None:
    clock = Clock()
    outbox = filled(3, clock)
    outbox.acknowledge(2)
    clock.now += KEPT_S + 1
    outbox.acknowledge(3)
    batches, missing = outbox.resend(0)
    assert numbers(list(batches)) == [3]
    assert missing == 2


def test_a_server_that_lost_everything_after_nothing_is_kept_is_told_the_whole_gap() -> None:
    clock = Clock()
    outbox = filled(3, clock)
    outbox.acknowledge(3)
    clock.now += KEPT_S + 1
    outbox.acknowledge(3)
    assert outbox.resend(0) == ([], 3)


def test_kept_batches_are_bounded_in_number() -> None:
    outbox = filled(KEPT_BATCHES + 10)
    outbox.acknowledge(KEPT_BATCHES + 10)
    batches, missing = outbox.resend(0)
    assert len(batches) == KEPT_BATCHES
    assert missing == 10


def test_an_entry_that_has_just_been_made_counts_as_now_and_an_older_one_carries_its_age() -> None:
    clock = Clock()
    outbox = Outbox(clock)
    made_at = clock.now
    clock.now += 0.9
    assert outbox.age_ms(made_at) == 0
    clock.now += 1.1
    assert outbox.age_ms(made_at) == 2000
