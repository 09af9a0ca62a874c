"""Requests at a steady rate, whatever becomes of those before."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import time
from collections.abc import Sequence

import msgspec

from benchmarks.chaos.causes import FaultKind
from benchmarks.chaos.client import Answer, Ask, Clients, Manner

MOST_AT_ONCE = 2000


class Asked(msgspec.Struct, frozen=True):
    """A rule, the dialect of its clients, and how often it is asked for beside the others."""

    rule: str
    style: str
    weight: int = 1


class Load:
    """Asks for the rules in random order, streams and whole answers, until it is stopped; `answers` is what came."""

    def __init__(self, rand: random.Random, clients: Clients, rules: Sequence[Asked], per_s: float, name: str) -> None:
        self._random = rand
        self._clients = clients
        self._rules = rules
        self._per_s = per_s
        self._name = name
        self._numbers = itertools.count(1)
        self._under_way: set[asyncio.Task[None]] = set()
        self._sender: asyncio.Task[None] | None = None
        self.shares: dict[str, float] = {}
        """The share of clients that leave or dawdle at the moment."""
        self.answers: list[Answer] = []
        self._failure: BaseException | None = None
        self.unasked = 0
        """Requests that were due while too many were under way."""

    def start(self) -> None:
        """Begins to ask."""
        self._sender = asyncio.create_task(self._send())

    async def stop(self) -> None:
        """Asks no more, and returns when every request has ended and no connection is left."""
        if self._sender:
            self._sender.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._sender
        await asyncio.gather(*self._under_way)
        self._clients.close()
        if self._failure:
            raise self._failure

    async def _send(self) -> None:
        due = time.monotonic()
        while True:
            due += 1 / self._per_s
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            if len(self._under_way) >= MOST_AT_ONCE:
                self.unasked += 1
                continue
            task = asyncio.create_task(self._ask(self._make()))
            self._under_way.add(task)
            task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._under_way.discard(task)
        self._failure = self._failure or task.exception()

    async def _ask(self, ask: Ask) -> None:
        self.answers.append(await self._clients.ask(ask))

    def _make(self) -> Ask:
        rand = self._random
        (asked,) = rand.choices(self._rules, [asked.weight for asked in self._rules])
        is_stream = rand.random() < 0.6
        manner, leave_at = Manner.READS, 0
        if rand.random() < self.shares.get(FaultKind.LEAVE, 0.0):
            manner = rand.choice((Manner.LEAVES_BEFORE, Manner.LEAVES_AMID))
            leave_at = rand.randint(1, 300) if manner is Manner.LEAVES_AMID else rand.randint(300, 1500)
            is_stream = is_stream or manner is Manner.LEAVES_AMID
        elif rand.random() < self.shares.get(FaultKind.DAWDLE, 0.0):
            manner = Manner.DAWDLES
        return Ask(
            request_id=f"{self._name}-{next(self._numbers)}",
            rule=asked.rule,
            style=asked.style,
            is_stream=is_stream,
            manner=manner,
            leave_at=leave_at,
        )
