"""The outbox: what settled attempts used, in numbered batches, until Redis has applied each exactly once.

No I/O here: `pool` sends what `take` and `resend` give, and reports what came back.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

import msgspec

from balancer.domain import Entry

ENTRIES_PER_BATCH = 256
KEPT_S = 60.0
KEPT_BATCHES = 4096


class Batch(msgspec.Struct):
    """Entries under one number, with the monotonic time at which each was made."""

    number: int
    entries: tuple[tuple[Entry, float], ...]
    generation: int = 0
    acknowledged_at: float = 0


class Outbox:
    """Batches of one worker for one pool, in order.

    A batch is *acknowledged* once Redis has applied it, and kept for a minute more (bounded in number too): a promoted
    replica may have lost it, and then asks for it again by answering with a gap.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._entries: deque[tuple[Entry, float]] = deque()
        self._sent: deque[Batch] = deque()
        self._kept: deque[Batch] = deque()
        self._sent_entries = 0
        self._next = 1
        self.generation = 0
        """Rises with every resend: an answer to a batch sent before it says nothing new."""

    def __len__(self) -> int:
        """Entries that Redis has not acknowledged."""
        return len(self._entries) + self._sent_entries

    @property
    def last_number(self) -> int:
        """The number of the newest batch, 0 before the first."""
        return self._next - 1

    @property
    def acknowledged(self) -> int | None:
        """The number of the newest batch that Redis has applied and we still hold."""
        return self._kept[-1].number if self._kept else None

    def add(self, entry: Entry) -> None:
        """Queues an entry for the next batch."""
        self._entries.append((entry, self._clock()))

    def take(self) -> list[Batch]:
        """New batches of all that is queued, to be sent at once and in this order."""
        batches = []
        while self._entries:
            count = min(len(self._entries), ENTRIES_PER_BATCH)
            entries = tuple(self._entries.popleft() for _ in range(count))
            batches.append(Batch(number=self._next, entries=entries, generation=self.generation))
            self._next += 1
            self._sent_entries += count
        self._sent.extend(batches)
        return batches

    def acknowledge(self, last: int) -> None:
        """Redis has applied every batch up to this number."""
        now = self._clock()
        while self._sent and self._sent[0].number <= last:
            batch = self._sent.popleft()
            batch.acknowledged_at = now
            self._sent_entries -= len(batch.entries)
            self._kept.append(batch)
        while self._kept and (now - self._kept[0].acknowledged_at > KEPT_S or len(self._kept) > KEPT_BATCHES):
            self._kept.popleft()

    def resend(self, last: int | None = None) -> tuple[list[Batch], int]:
        """The batches to send again in order, and how many before them are no longer held and must be skipped.

        `last` is the newest that Redis says it has applied; None (after a reconnect) means the last acknowledged.
        """
        missing = 0
        if last is not None:
            while self._kept and self._kept[-1].number > last:
                batch = self._kept.pop()
                self._sent.appendleft(batch)
                self._sent_entries += len(batch.entries)
            first = self._sent[0].number if self._sent else self._next
            missing = max(0, first - last - 1)
        self.generation += 1
        for batch in self._sent:
            batch.generation = self.generation
        return list(self._sent), missing

    def age_ms(self, made_at: float) -> int:
        """How long ago an entry was made; 0 for what is fresh (less than a second), which then counts as now."""
        age_s = self._clock() - made_at
        return int(age_s * 1000) if age_s >= 1 else 0
