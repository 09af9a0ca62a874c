"""The outbox: what settled attempts used, in numbered batches, until Redis has applied each exactly once.

No I/O here: `pool` sends what `take` and `resend` give, and reports what came back; `spiller` brings to disk and back
what has waited too long.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping

import msgspec

from balancer.domain import Entry

ENTRIES_PER_BATCH = 256
ENTRIES_UNDER_WAY = 1024
"""Sent and not yet answered for; more waits, so that a long outbox neither floods Redis nor holds up the loop."""
KEPT_S = 60.0
KEPT_BATCHES = 4096
DEFAULT_MAX_ENTRIES = 200_000

TimedEntries = tuple[tuple[Entry, float], ...]
"""Entries with the monotonic time at which each was made."""

_pack = msgspec.msgpack.Encoder().encode
_unpack = msgspec.msgpack.Decoder(TimedEntries).decode


class Batch(msgspec.Struct):
    """Entries under one number; None stands for those that are only on disk. `count` is how many it was made of."""

    number: int
    entries: TimedEntries | None
    count: int
    generation: int = 0
    is_spilled: bool = False
    skips: bool = False
    """Sent with the word that the batches before it are no longer held."""


class _Kept(msgspec.Struct, frozen=True, gc=False):
    """A batch that Redis has applied, packed: hardly one of them is ever asked for again."""

    number: int
    packed: bytes
    count: int
    acknowledged_at: float


class Outbox:
    """Batches of one worker for one pool, in order.

    A batch is *acknowledged* once Redis has applied it, and kept for a minute more (bounded in number too): a promoted
    replica may have lost it, and then asks for it again by answering with a gap.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, max_entries: int = DEFAULT_MAX_ENTRIES) -> None:
        self._clock = clock
        self._max_entries = max_entries
        self._entries: deque[tuple[Entry, float]] = deque()
        self._batches: deque[Batch] = deque()
        self._kept: deque[_Kept] = deque()
        self._kept_entries = 0
        self._unacknowledged = 0
        self._loaded = 0
        self._sent = 0
        self._under_way = 0
        self._next = 1
        self.added = 0
        """Entries ever added; with the length this tells how far Redis has come."""
        self.starved_of = 0
        """The batch that must be read back from disk before anything more can be sent, 0 for none."""
        self.generation = 0
        """Rises with every resend: an answer to a batch sent before it says nothing new."""

    def __len__(self) -> int:
        """Entries that Redis has not acknowledged, on disk or not."""
        return len(self._entries) + self._unacknowledged

    @property
    def oldest_s(self) -> float:
        """For how long the oldest of them has waited, as far as it is in memory; 0 for none."""
        for batch in self._batches:
            if batch.entries:
                return self._clock() - batch.entries[0][1]
        return self._clock() - self._entries[0][1] if self._entries else 0.0

    @property
    def last_number(self) -> int:
        """The number of the newest batch, 0 before the first."""
        return self._next - 1

    @property
    def acknowledged(self) -> int:
        """The number up to which every batch is acknowledged."""
        return self._batches[0].number - 1 if self._batches else self.last_number

    @property
    def is_behind(self) -> bool:
        """True when something could be sent that has not been."""
        return bool(self._entries) or self._sent < len(self._batches)

    @property
    def is_full(self) -> bool:
        """True when more unacknowledged entries are in memory than the bound allows."""
        return len(self._entries) + self._loaded > self._max_entries

    @property
    def newest_kept(self) -> int | None:
        """The number of the newest batch that Redis has applied and we still hold."""
        return self._kept[-1].number if self._kept else None

    def add(self, entry: Entry) -> None:
        """Queues an entry for the next batch."""
        self._entries.append((entry, self._clock()))
        self.added += 1

    def number(self) -> None:
        """Gives all that is queued its numbers, whether it can be sent or not."""
        while self._entries:
            self._number_next()

    def _number_next(self) -> None:
        queued = self._entries
        count = min(len(queued), ENTRIES_PER_BATCH)
        if count == len(queued):
            entries = tuple(queued)
            queued.clear()
        else:
            entries = tuple(queued.popleft() for _ in range(count))
        self._batches.append(Batch(number=self._next, entries=entries, count=count))
        self._next += 1
        self._unacknowledged += count
        self._loaded += count

    def take(self) -> list[Batch]:
        """The batches to be sent at once and in this order: the next ones, as many as may be under way."""
        batches = []
        while self._under_way < ENTRIES_UNDER_WAY:
            if self._sent == len(self._batches):
                if not self._entries:
                    break
                self._number_next()
            batch = self._batches[self._sent]
            if batch.entries is None:
                self.starved_of = batch.number
                break
            batch.generation = self.generation
            batches.append(batch)
            self._sent += 1
            self._under_way += batch.count
        return batches

    def acknowledge(self, last: int) -> None:
        """Redis has applied every batch up to this number."""
        now = self._clock()
        while self._batches and self._batches[0].number <= last:
            batch = self._batches.popleft()
            if self._sent:
                self._sent -= 1
                self._under_way -= batch.count
            self._unacknowledged -= batch.count
            if batch.entries is None:
                self._kept.clear()  # What is kept is one run up to the newest, and this one is not in memory.
                self._kept_entries = 0
                continue
            self._loaded -= batch.count
            self._kept.append(_Kept(batch.number, _pack(batch.entries), batch.count, now))
            self._kept_entries += batch.count
        if last >= self.starved_of:
            self.starved_of = 0
        while self._kept and (
            now - self._kept[0].acknowledged_at > KEPT_S
            or len(self._kept) > KEPT_BATCHES
            or self._kept_entries > self._max_entries
        ):
            self._kept_entries -= self._kept.popleft().count

    def resend(self, last: int | None = None) -> tuple[list[Batch], int]:
        """The batches to send again in order, and how many before them are no longer held and must be skipped.

        `last` is the newest that Redis says it has applied; None (after a reconnect) means the last acknowledged. What
        does not fit under way follows from `take`. When batches are missing and none is left to send, an empty one
        under the newest number tells so.
        """
        missing = 0
        if self._batches:
            self._batches[0].skips = False
        if last is not None:
            while self._kept and self._kept[-1].number > last:
                kept = self._kept.pop()
                batch = Batch(number=kept.number, entries=_unpack(kept.packed), count=kept.count)
                self._batches.appendleft(batch)
                self._kept_entries -= batch.count
                self._unacknowledged += batch.count
                self._loaded += batch.count
            first = self._batches[0].number if self._batches else self._next
            missing = max(0, first - last - 1)
        self.generation += 1
        self._sent = self._under_way = self.starved_of = 0
        if missing and not self._batches:
            last_word = Batch(number=self.last_number, entries=(), count=0, generation=self.generation, skips=True)
            return [last_word], missing
        if self._batches:
            self._batches[0].skips = missing > 0
        return self.take(), missing

    # -- to disk and back ----------------------------------------------------------------------------------------------

    def unspilled(self) -> list[Batch]:
        """Unacknowledged batches that are not on disk: the newest ones, and those that a failover brought back."""
        oldest = list(_until_spilled(iter(self._batches)))
        if len(oldest) == len(self._batches):
            return oldest
        newest = list(_until_spilled(reversed(self._batches)))
        return oldest + newest[::-1]

    def spilled(self, batches: list[Batch]) -> None:
        """These are on disk now; beyond the bound the later half of what is there leaves memory.

        What was acknowledged meanwhile is no longer one of ours: a failover that loses it brings back another batch.
        """
        for batch in batches:
            batch.is_spilled = True
        if not self.is_full:
            return
        room = self._max_entries // 2
        for i, batch in enumerate(self._batches):
            room -= batch.count
            if room < 0 and batch.is_spilled and batch.entries is not None and i >= self._sent:
                batch.entries = None
                self._loaded -= batch.count

    def load(self, first: int, last: int, found: Mapping[int, TimedEntries]) -> int:
        """Takes back the batches first…last from what was read from disk; how many of them were not there.

        Those stay as empty batches, since their numbers must be used up.
        """
        missing = 0
        for batch in self._batches:
            if batch.number > last:
                break
            if batch.number >= first and batch.entries is None:
                batch.entries = found.get(batch.number, ())
                missing += batch.number not in found
                self._loaded += batch.count
        self.starved_of = 0
        return missing

    def age_ms(self, made_at: float) -> int:
        """How long ago an entry was made; 0 for what is fresh (less than a second), which then counts as now."""
        age_s = self._clock() - made_at
        return int(age_s * 1000) if age_s >= 1 else 0


def _until_spilled(batches: Iterator[Batch]) -> Iterator[Batch]:
    for batch in batches:
        if batch.is_spilled:
            return
        yield batch
