"""Crowds of concurrent clients, each with a connection of its own, checked by invariants and by their history."""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import msgspec
import pytest
import redis

from balancer import audit
from balancer.domain import Entry, Outcome, RuleDefinition, Selection
from balancer.store import keys
from tests.lua.builders import ABC, LEASE_MS, Fleet, a_rule, a_selection, a_service, an_abandoned, an_entry
from tests.lua.pool import LuaPool

NewPool = Callable[..., LuaPool]
SERVERS_CLOCK = 0
DAY_MS = 86_400_000
OUTCOMES = (Outcome.SUCCESS, Outcome.SUCCESS, Outcome.FAILED, Outcome.CANCELLED, Outcome.RATE_LIMITED)
STREAK = 3


class Picked(msgspec.Struct, frozen=True):
    """A pick as its client was told it."""

    worker: str
    selection: Selection
    service: str
    seq: int
    place: tuple[int, int]
    streak: int


class Client:
    """One worker with a connection of its own: picks in batches of random size, settles in between, on real time."""

    def __init__(self, url: str, pool: str, number: int) -> None:
        self.redis: Any = redis.Redis.from_url(url)
        self.pool = LuaPool(self.redis, pool, record="full")
        self.worker = f"w{number}"
        self.random = random.Random(number)
        self.picked: list[Picked] = []
        self.open: list[Picked] = []
        self.settled: list[Entry] = []
        self.sent: list[list[Entry]] = []
        self.names = 0
        self.seen = (0, 0)

    def work(self, rules: tuple[str, ...], picks: int) -> None:
        """Makes at least so many picks and settles every one of them."""
        while len(self.picked) < picks:
            self.ask(rules, self.random.choice((0, 0, 3)))
            if self.random.random() < 0.5:
                self.settle(self.random.randint(0, len(self.open)))
            if self.sent and self.random.random() < 0.1:
                self.resend()
        self.settle(len(self.open))
        self.resend()

    def ask(self, rules: tuple[str, ...], settling: int = 0) -> None:
        """One call, which settles so many too; sometimes one of its names was given up before."""
        selections = []
        for _ in range(self.random.choice((1, 2, 5, 16))):
            self.names += 1
            selections.append(
                a_selection(
                    self.names,
                    rule=self.random.choice(rules),
                    draw=self.random.randrange(2**32),
                    reserved=self.random.choice((0, 10, 200)),
                    deadline_ms=DAY_MS,
                    excluded=self.random.sample(ABC, 1) if self.random.random() < 0.1 else (),
                )
            )
        given_up = self.random.choice(selections).number if self.random.random() < 0.05 else 0
        if given_up:
            self.send([an_abandoned(given_up)])
        entries = self.draw_entries(settling)
        if entries:
            self.sent.append(entries)
            self.settled += entries
        batch = len(self.sent) if entries else 0
        reply = self.pool.tick(SERVERS_CLOCK, self.worker, batch, entries, selections, LEASE_MS, self.seen)
        (word, last, epoch, position, lost), *answers = reply
        assert (word, last, lost) == ("applied" if entries else "none", len(self.sent), 0)
        self.seen = max(self.seen, (epoch, position))
        for selection, answer in zip(selections, answers, strict=True):
            if selection.number == given_up:
                assert answer == ["abandoned"]
            else:
                word, service, _, seq, epoch, position, streak, _ = answer
                assert word == "pick"
                pick = Picked(self.worker, selection, service, seq, (epoch, position), streak)
                self.picked.append(pick)
                self.open.append(pick)

    def settle(self, count: int) -> None:
        """A batch of so many open attempts."""
        self.send(self.draw_entries(count))

    def draw_entries(self, count: int) -> list[Entry]:
        """How so many open attempts end, in no order; a few of them were never sent."""
        self.random.shuffle(self.open)
        entries = []
        for pick in self.open[:count]:
            number = pick.selection.number
            if self.random.random() < 0.05:
                entries.append(an_abandoned(number))
            else:
                used = self.random.randrange(50)
                entries.append(an_entry(number, pick.service, self.random.choice(OUTCOMES), input=used, output=1))
        del self.open[:count]
        return entries

    def send(self, entries: list[Entry]) -> None:
        """The next batch."""
        self.sent.append(entries)
        reply = self.pool.settle(SERVERS_CLOCK, self.worker, len(self.sent), entries, LEASE_MS, self.seen)
        assert reply[:2] == ["applied", len(self.sent)]
        assert reply[4] == 0, "no position was lost"
        self.seen = max(self.seen, (reply[2], reply[3]))
        self.settled += entries

    def resend(self) -> None:
        """One of the batches again, as after a lost answer."""
        number = self.random.randint(1, len(self.sent))
        reply = self.pool.settle(SERVERS_CLOCK, self.worker, number, self.sent[number - 1], LEASE_MS, self.seen)
        assert reply[:2] == ["applied", len(self.sent)]


@pytest.fixture
def crowd(server: str, new_pool: NewPool) -> Iterator[Callable[[int, Any], tuple[Fleet, list[Client]]]]:
    """Makes a pool with these rules, and so many clients of it."""
    clients: list[Client] = []

    def gather(count: int, *rules: RuleDefinition) -> tuple[Fleet, list[Client]]:
        pool = new_pool(record="full")
        fleet = Fleet(pool, now_ms=SERVERS_CLOCK)
        fleet.fence(*rules)
        clients.extend(Client(server, pool.name, number) for number in range(count))
        return fleet, clients

    yield gather
    for client in clients:
        client.redis.close()


def together(tasks: list[Callable[[], Any]]) -> list[Any]:
    """Runs all tasks at once, each in a thread; their results, or the first failure."""
    with ThreadPoolExecutor(len(tasks)) as threads:
        return [future.result(timeout=60) for future in [threads.submit(task) for task in tasks]]


def history(fleet: Fleet) -> list[dict[str, str]]:
    assert isinstance(fleet.pool, LuaPool)
    entries = fleet.pool.client.xrange(keys.decisions(fleet.pool.name))
    return [{k.decode(): v.decode() for k, v in fields.items()} for _, fields in entries]


def in_order(picks: list[Picked]) -> list[Picked]:
    return sorted(picks, key=lambda pick: pick.place)


SHORT = [a_service(s, window_s=1, weight=i) for i, s in enumerate(ABC)]
RULES = (
    a_rule("round_robin", rule="turns", requests=STREAK, lengths=dict.fromkeys(ABC, (1, 300))),
    a_rule("token_based", rule="tokens", tokens=700, lengths=dict.fromkeys(ABC, (1, 300))),
    a_rule("hybrid", SHORT, rule="both", requests=7, tokens=900, lengths=dict.fromkeys(ABC, (1, 300))),
    a_rule("random", SHORT, rule="dice", lengths=dict.fromkeys(ABC, (1, 300))),
)


def test_a_crowd_on_all_tactics_leaves_an_exact_account(crowd: Callable[..., tuple[Fleet, list[Client]]]) -> None:
    fleet, clients = crowd(8, *RULES)
    names = tuple(rule.rule for rule in RULES)
    together([partial(client.work, names, 250) for client in clients])
    picks = in_order([pick for client in clients for pick in client.picked])
    entries = [entry for client in clients for entry in client.settled]
    view = fleet.view()

    assert len({pick.place for pick in picks}) == len(picks) >= 2_000
    assert (view.epoch, view.position) == (1, len(RULES) + len(picks) + len(entries))
    for name in names:
        assert [pick.seq for pick in picks if pick.selection.rule == name] == list(range(1, view.rules[name].seq + 1))
    turns = [pick for pick in picks if pick.selection.rule == "turns" and not pick.selection.excluded]
    assert [pick.service for pick in turns] == [ABC[i // STREAK % 3] for i in range(len(turns))]
    assert [pick.streak for pick in turns] == [i % STREAK + 1 for i in range(len(turns))]

    never_arrived = sum(len(batch) == 1 and not batch[0].service for client in clients for batch in client.sent)
    assert never_arrived > 0
    services = view.services.values()
    assert {(service.in_flight, service.reserved, service.lost) for service in services} == {(0, 0, 0)}
    assert sum(service.picks for service in services) == len(picks)
    assert sum(service.requests + service.abandoned for service in services) == len(picks)
    settled = [entry for entry in entries if entry.outcome is not Outcome.ABANDONED]
    for id_, service in view.services.items():
        mine = [entry for entry in settled if entry.service == id_]
        assert (service.requests, service.input, service.output) == (
            len(mine),
            sum(entry.usage.input for entry in mine),
            sum(entry.usage.output for entry in mine),
        )

    verdict = audit.check(history(fleet))
    assert verdict.violations == []
    assert (verdict.picks, verdict.settles, verdict.lost, verdict.epochs) == (len(picks), len(entries), 0, 1)
    assert len({pick.service for pick in picks if pick.selection.rule == "tokens"}) == 3, "the rule did switch"


def test_no_client_of_a_crowd_picks_under_a_superseded_revision(
    crowd: Callable[..., tuple[Fleet, list[Client]]],
) -> None:
    fleet, clients = crowd(4, a_rule(requests=STREAK))
    last = 40
    start, is_edited = threading.Barrier(len(clients) + 1), threading.Event()

    def edit() -> None:
        start.wait(30)
        try:
            for revision in range(2, last + 1):
                fleet.fence(a_rule(requests=STREAK, revision=revision))
        finally:
            is_edited.set()

    def pick(client: Client) -> list[tuple[int, int]]:
        """Asks until it has picked after the last edit; position and revision of each pick."""
        revision, made = 1, []
        start.wait(30)
        for number in itertools.count(1):
            is_last = is_edited.is_set()
            selection = a_selection(number, revision=revision)
            answer, _ = client.pool.select(SERVERS_CLOCK, client.worker, [selection], LEASE_MS)
            if answer[0] == "pick":
                made.append((answer[5], revision))
                if is_last:
                    break
            else:
                assert answer[0] == "stale"
                assert answer[1] > revision
                revision = answer[1]
        return made

    _, *results = together([edit, *(partial(pick, client) for client in clients)])
    made = sorted(itertools.chain.from_iterable(results))
    events = history(fleet)
    fences = {int(e["position"]): fenced(e) for e in events if e["event"] == "fence"}
    assert sorted(fences.values()) == list(range(1, last + 1))
    standing = {p: max(r for at, r in fences.items() if at < p) for p, _ in made}
    assert made == sorted(standing.items())
    assert audit.check(events).violations == []
    assert [(e["service"], int(e["streak"])) for e in events if e["event"] == "pick"] == [
        (ABC[i // STREAK % 3], i % STREAK + 1) for i in range(len(made))
    ], "edits keep cursor and streak"


def fenced(event: dict[str, str]) -> int:
    """The revision that a fence event raised."""
    return msgspec.json.decode(event["definition"], type=RuleDefinition).revision


def test_a_crowd_that_reaps_a_dead_worker_counts_each_of_its_attempts_once(
    crowd: Callable[..., tuple[Fleet, list[Client]]],
) -> None:
    fleet, clients = crowd(5, a_rule(requests=STREAK))
    dead, *living = clients
    while len(dead.open) < 300:
        dead.ask(("chat",))
    tomorrow_ms = int(dead.redis.time()[0]) * 1000 + DAY_MS // 2

    def reap(client: Client) -> int:
        lost = 0
        for _ in range(1_000):
            _, is_ended, some, *_ = client.pool.reap(tomorrow_ms, client.worker, dead.worker, LEASE_MS, limit=7)
            assert is_ended == 1
            lost += some
            if some < 7:
                break
        return lost

    counts = together([partial(reap, client) for client in living])
    assert sum(counts) == len(dead.open)
    services = fleet.view().services.values()
    assert {(service.in_flight, service.reserved) for service in services} == {(0, 0)}
    assert sum(service.lost for service in services) == sum(service.requests for service in services) == len(dead.open)
    reserved = sum(pick.selection.reserved for pick in dead.open)
    assert sum(service.lost_tokens for service in services) == reserved
    verdict = audit.check(history(fleet))
    assert (verdict.violations, verdict.lost) == ([], len(dead.open))
