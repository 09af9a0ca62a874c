"""The outbox: numbers, acknowledgements, gaps."""

from __future__ import annotations

import tracemalloc

from balancer.domain import Entry, Outcome, Usage
from balancer.store.settlement import ENTRIES_PER_BATCH, ENTRIES_UNDER_WAY, KEPT_BATCHES, KEPT_S, Batch, Outbox


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
    sent = [entry.number for batch in batches for entry, _ in batch.entries or ()]
    assert sent == list(range(ENTRIES_PER_BATCH + 1))
    assert outbox.take() == []


def test_length_counts_what_is_not_acknowledged() -> None:
    outbox = filled(3)
    outbox.add(an_entry(9))
    assert len(outbox) == 4
    outbox.acknowledge(2)
    assert len(outbox) == 2


def test_the_age_is_that_of_the_oldest_entry_that_is_not_acknowledged() -> None:
    clock = Clock()
    outbox = Outbox(clock)
    assert outbox.oldest_s == 0
    for number in range(3):
        clock.now += 1
        outbox.add(an_entry(number))
        if number:
            outbox.take()
    clock.now += 5
    assert outbox.oldest_s == 7
    outbox.acknowledge(1)
    assert outbox.oldest_s == 5
    outbox.acknowledge(2)
    assert outbox.oldest_s == 0


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


def test_a_gap_is_filled_with_entries_that_are_just_what_they_were() -> None:
    clock = Clock()
    outbox = Outbox(clock)
    usage = Usage(input=1, output=2, cached=3, cache_creation=4, reasoning=5)
    slow = Entry(
        number=2**53 - 1,
        service="p:größer\n|",
        outcome=Outcome.RATE_LIMITED,
        age_ms=6,
        usage=usage,
        cooldown_ms=7,
        first_token_us=8,
        stream_us=9,
    )
    entries = (slow, an_entry(1), Entry(number=2, service="", outcome=Outcome.ABANDONED))
    for entry in entries:
        clock.now += 0.1 + 0.2
        outbox.add(entry)
    (sent,) = outbox.take()
    before = sent.entries
    outbox.acknowledge(1)
    ((again,), _) = outbox.resend(0)
    assert again.entries == before
    assert [entry for entry, _ in before or ()] == list(entries)


def test_what_is_kept_of_an_entry_takes_a_hundred_bytes() -> None:
    """At ten thousand a second and as the structs that they were, a minute's took ninety megabytes."""
    outbox = Outbox(Clock())
    service, count = "openai-eu:gpt-5-mini", 20 * ENTRIES_PER_BATCH
    tracemalloc.start()
    try:
        for i in range(count):
            usage = Usage(input=1_000 + i, output=500)
            outbox.add(
                Entry(
                    number=1_000_000 + i,
                    service=service,
                    outcome=Outcome.SUCCESS,
                    usage=usage,
                    first_token_us=400_000 + i,
                    stream_us=2_000_000 + i,
                )
            )
            if i % ENTRIES_PER_BATCH == ENTRIES_PER_BATCH - 1:
                (batch,) = outbox.take()
                outbox.acknowledge(batch.number)
        del batch, usage
        kept_bytes, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert outbox.newest_kept == 20
    assert kept_bytes / count < 100


def test_what_is_no_longer_kept_is_reported_as_missing() -> None:
    clock = Clock()
    outbox = filled(3, clock)
    outbox.acknowledge(2)
    clock.now += KEPT_S + 1
    outbox.acknowledge(3)
    batches, missing = outbox.resend(0)
    assert numbers(list(batches)) == [3]
    assert missing == 2


def test_a_server_that_lost_everything_after_nothing_is_kept_is_told_so_by_an_empty_batch() -> None:
    clock = Clock()
    outbox = filled(3, clock)
    outbox.acknowledge(3)
    clock.now += KEPT_S + 1
    outbox.acknowledge(3)
    assert outbox.resend(0) == ([Batch(number=3, entries=(), count=0, generation=1, skips=True)], 3)
    assert len(outbox) == 0


def test_kept_batches_are_bounded_in_number() -> None:
    outbox = Outbox(Clock())
    for number in range(1, KEPT_BATCHES + 11):
        outbox.add(an_entry(number))
        outbox.take()
        outbox.acknowledge(number)
    _, missing = outbox.resend(0)
    assert len(outbox) == KEPT_BATCHES
    assert missing == 10


def test_only_the_first_batch_after_a_gap_says_that_others_are_missing() -> None:
    clock = Clock()
    outbox = filled(4, clock)
    outbox.acknowledge(2)
    clock.now += KEPT_S + 1
    outbox.acknowledge(2)
    assert [batch.skips for batch in outbox.resend(0)[0]] == [True, False]
    assert [batch.skips for batch in outbox.resend()[0]] == [False, False]


def test_a_long_outbox_is_sent_in_pieces_as_answers_come() -> None:
    outbox = Outbox(Clock())
    for number in range(3 * ENTRIES_UNDER_WAY):
        outbox.add(an_entry(number))
    full = ENTRIES_UNDER_WAY // ENTRIES_PER_BATCH
    assert numbers(list(outbox.take())) == list(range(1, full + 1))
    assert outbox.take() == []
    outbox.acknowledge(1)
    assert numbers(list(outbox.take())) == [full + 1]
    outbox.acknowledge(1)
    assert numbers(list(outbox.resend()[0])) == list(range(2, full + 2))
    assert outbox.is_behind


def test_beyond_the_bound_the_later_half_of_what_is_on_disk_leaves_memory_and_is_waited_for() -> None:
    outbox = Outbox(Clock(), max_entries=1024)
    for number in range(1536):
        outbox.add(an_entry(number))
    outbox.number()
    batches = outbox.unspilled()
    contents = {batch.number: batch.entries or () for batch in batches}
    outbox.spilled(batches)
    assert not outbox.is_full
    assert len(outbox) == 1536
    assert numbers(list(outbox.take())) == [1, 2]
    assert outbox.starved_of == 3
    outbox.acknowledge(2)
    assert outbox.load(3, 6, {number: contents[number] for number in range(3, 6)}) == 1
    sent = outbox.take()
    assert [batch.entries for batch in sent] == [*(contents[number] for number in range(3, 6)), ()]
    outbox.acknowledge(6)
    assert (len(outbox), outbox.acknowledged, outbox.starved_of) == (0, 6, 0)


def test_what_is_under_way_stays_in_memory_for_the_failover_that_loses_it() -> None:
    outbox = Outbox(Clock(), max_entries=1024)
    for number in range(1536):
        outbox.add(an_entry(number))
    assert numbers(list(outbox.take())) == [1, 2, 3, 4]
    outbox.number()
    outbox.spilled(outbox.unspilled())
    outbox.acknowledge(4)
    batches, missing = outbox.resend(0)
    assert ([batch.count for batch in batches if batch.entries], missing) == ([256] * 4, 0)


def test_a_batch_that_a_failover_brings_back_must_go_to_disk_again() -> None:
    outbox = filled(3)
    outbox.number()
    outbox.spilled(outbox.unspilled())
    assert outbox.unspilled() == []
    outbox.acknowledge(2)
    outbox.resend(0)
    outbox.add(an_entry(9))
    outbox.number()
    assert numbers(list(outbox.unspilled())) == [1, 2, 4]


def test_an_entry_that_has_just_been_made_counts_as_now_and_an_older_one_carries_its_age() -> None:
    clock = Clock()
    outbox = Outbox(clock)
    made_at = clock.now
    clock.now += 0.9
    assert outbox.age_ms(made_at) == 0
    clock.now += 1.1
    assert outbox.age_ms(made_at) == 2000
