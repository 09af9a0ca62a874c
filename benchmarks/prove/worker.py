"""One worker of the proof: the product's own store code, driven as hard as it goes; its upstream is a journal.

`python -m benchmarks.prove.worker URL JOURNAL SEED` runs until SIGTERM, and prints how many picks it has made more.
"""

from __future__ import annotations

import asyncio
import random
import signal
import sys
from pathlib import Path

from balancer import config, log
from balancer.domain import Outcome, Pick, Rule, Usage
from balancer.errors import BalancerError
from balancer.store.balance import Balance
from benchmarks.prove.journal import BEGUN, ENDED, Journal, Line

CONCURRENCY = 64
DEADLINE_MS = 20_000
LEASE_S = 2.0
_REPORT_EVERY = 500


class Driver:
    """Makes attempts, one after the other in each of many tasks."""

    def __init__(self, balance: Balance, journal: Journal, seed: int) -> None:
        self._balance = balance
        self._journal = journal
        self._random = random.Random(seed)
        self._picks = 0
        self.is_stopping = False

    async def drive(self) -> None:
        """Attempts until told to stop."""
        while not self.is_stopping:
            try:
                rule = self._random.choice(self._balance.directory.configuration.rules)
                if self._random.random() < 0.01:
                    await self._give_up(rule)
                else:
                    await self._attempt(rule)
            except BalancerError:
                await asyncio.sleep(0.01)

    async def _give_up(self, rule: Rule) -> None:
        """A client that leaves while its selection is under way."""
        asking = asyncio.create_task(self._select(rule, ()))
        await asyncio.sleep(0)
        asking.cancel()
        done = (await asyncio.gather(asking, return_exceptions=True))[0]
        if isinstance(done, Pick):  # It was quicker.
            self._settle(done, Outcome.ABANDONED, None)

    async def _select(self, rule: Rule, excluded: tuple[str, ...]) -> Pick:
        reserved = self._random.choice((0, 10, 40))
        pick, _ = await self._balance.select(rule, reserved=reserved, deadline_ms=DEADLINE_MS, excluded=excluded)
        return pick

    async def _attempt(self, rule: Rule) -> None:
        pick = await self._select(rule, ())
        if self._random.random() < 0.05:
            self._work_and_settle(pick, Outcome.FAILED, Usage())
            pick = await self._select(rule, (pick.service,))
        self._begin(pick)
        chance = self._random.random()
        if chance < 0.3:
            await asyncio.sleep(self._random.random() * (0.02 if chance < 0.27 else 0.3))
        self._settle(pick, Outcome.SUCCESS, Usage(input=self._random.randrange(60), output=self._random.randrange(60)))

    def _work_and_settle(self, pick: Pick, outcome: Outcome, usage: Usage) -> None:
        self._begin(pick)
        self._settle(pick, outcome, usage)

    def _begin(self, pick: Pick) -> None:
        place = (pick.epoch, pick.position)
        self._journal.write(Line(BEGUN, self._balance.worker, pick.number, pick.service, pick.pool, place))
        self._picks += 1
        if self._picks % _REPORT_EVERY == 0:
            print(_REPORT_EVERY, flush=True)

    def _settle(self, pick: Pick, outcome: Outcome, usage: Usage | None) -> None:
        if usage is not None:
            tokens = (usage.input, usage.output)
            line = Line(ENDED, self._balance.worker, pick.number, pick.service, pick.pool, tokens=tokens)
            self._journal.write(line)
        self._balance.settle(pick, outcome, usage)


async def main(url: str, journal: str, seed: int) -> None:
    """Drives until SIGTERM, then lets open attempts end and hands in what is settled."""
    log.configure("error")
    settings = config.load({"lease_s": LEASE_S, "audit_interval_s": 0.0}, {})
    balance = Balance(url, settings)
    driver = Driver(balance, Journal(Path(journal)), seed)
    await balance.start()

    def stop() -> None:
        driver.is_stopping = True

    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop)
    await asyncio.gather(*(driver.drive() for _ in range(CONCURRENCY)))
    await balance.close(timeout_s=20.0)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
