"""Checks a pool's recorded history against the reference: every pick, and every counter beside it.

A *full* check begins where the whole state is known (the pool's first event, or a checkpoint) and replays every event
from there. Where that is not possible (a sampled record, the part of a trimmed one before its first checkpoint) the
check is *weaker*: each event by itself. A sampled pick tells what the tactic saw, so its choice is checked even then;
every event tells a service's counters before and after it, and the difference must be what the event says.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence

import msgspec

from balancer import checkpoint
from balancer.domain import Candidate, Entry, Outcome, RuleDefinition, Selection, Usage
from balancer.ledger import CLEAR_COUNTERS, LEDGER_COUNTERS, PICK_COUNTERS, ServiceState
from balancer.reference import BY_SERVICE, Held, Pool, Reply, minute_tokens
from balancer.steps import Steps, finished
from balancer.tactics import choose, tactic_of

Event = Mapping[str, str]
"""One entry of the decision stream, as the scripts write it."""

_KEPT_VIOLATIONS = 100
_CONTEXT = 5
_EVERY = 2**31
"""As a place in a batch: all of it."""
_SESSION = "session"
"""Stands for every session: which it was is not recorded, only where it was pinned to."""


class Violation(msgspec.Struct, frozen=True, kw_only=True):
    """What is wrong at a place of the history, and the events that led there, the one at fault last."""

    epoch: int
    position: int
    message: str
    context: tuple[Event, ...] = ()

    def __str__(self) -> str:
        return f"position {self.position} of epoch {self.epoch}: {self.message}"


class Verdict(msgspec.Struct, kw_only=True):
    """What was checked, how, and what is wrong."""

    events: int = 0
    picks: int = 0
    picks_by_rule: dict[str, int] = msgspec.field(default_factory=dict)
    settles: int = 0
    lost: int = 0
    switches: int = 0
    clears: int = 0
    epochs: int = 1
    lost_to_failover: int = 0
    checkpoints: int = 0
    replayed: int = 0
    """Events that were replayed on a known state; the others were checked by themselves."""
    weaker: dict[str, int] = msgspec.field(default_factory=dict)
    """Why events were not replayed, and how many."""
    violation_count: int = 0
    violations: list[Violation] = msgspec.field(default_factory=list)
    """The first hundred."""

    @property
    def is_full(self) -> bool:
        """True when every event was replayed."""
        return self.replayed == self.events

    def summary(self) -> str:
        """The verdict in a few lines."""
        kind = "full" if self.is_full else "weaker"
        counts = {"picks": self.picks, "settles": self.settles, "lost": self.lost, "cleared": self.clears}
        marks = f"{self.checkpoints} checkpoints, {self.epochs} epochs"
        lines = [
            f"{self.events} events: " + ", ".join(f"{count} {name}" for name, count in counts.items()),
            f"{kind} check: {self.replayed} events replayed against the reference, {marks}",
        ]
        lines += [f"  {count} events checked by themselves: {why}" for why, count in self.weaker.items()]
        if self.lost_to_failover:
            lines.append(f"  {self.lost_to_failover} positions lost to failover")
        if not self.violation_count:
            lines.append("no violation")
        else:
            lines.append(f"{self.violation_count} violation{'s, the first' if self.violation_count > 1 else ''}:")
            first = self.violations[0]
            lines.append(f"  {first}")
            lines += ["    " + " ".join(f"{k}={v!r}" for k, v in event.items()) for event in first.context]
        return "\n".join(lines)


def check(events: Iterable[Event]) -> Verdict:
    """The verdict on a history in its stream's order. Raises KeyError or ValueError for what is no event of ours."""
    checker = Checker()
    for event in events:
        checker.feed(event)
    return checker.verdict


class Checker:
    """Checks one event after the other, as the stream has them."""

    def __init__(self) -> None:
        self.verdict = Verdict()
        self._pool: Pool | None = None
        self._why = "nothing is known of what came before"
        self._place = (0, 0)
        self._recent: dict[str, deque[Event]] = {}
        self._batches: dict[str, tuple[int, int]] = {}

    @property
    def pool(self) -> Pool | None:
        """The state that the reference has reached, None while it is not known."""
        return self._pool

    def feed(self, event: Event) -> None:
        """Checks the next event."""
        finished(self.feeding(event))

    def feeding(self, event: Event) -> Steps[None]:
        """As `feed`, in steps: a checkpoint may be of thousands of rules."""
        kind = event["event"]
        place = int(event["epoch"]), int(event["position"])
        verdict = self.verdict
        verdict.events += 1
        subject = event.get("service") or event.get("rule", "")
        recent = self._recent.setdefault(subject, deque(maxlen=_CONTEXT))
        recent.append(event)
        is_anchored = self._pool is not None
        self._check_place(kind, event, place)
        handler = _HANDLERS.get(kind)
        if handler is None:
            raise ValueError(f"unknown event {kind!r}")
        if (steps := handler(self, event)) is not None:
            yield from steps
        self._place = place
        if self._pool is not None:
            self._pool.epoch, self._pool.position = place
        if is_anchored or self._pool is not None:
            verdict.replayed += 1
        else:
            verdict.weaker[self._why] = verdict.weaker.get(self._why, 0) + 1

    def lose_track(self, why: str) -> None:
        """Says that events are missing here, and why: the weaker check, up to the next checkpoint."""
        self._leave(why)
        self._batches.clear()

    def check_invariants(self, pool: Pool) -> None:
        """Checks a state by itself, where no event is recorded."""
        for wrong in checkpoint.broken_invariants(pool):
            self._violate({"event": "", "epoch": str(pool.epoch), "position": str(pool.position)}, wrong)

    # -- places --------------------------------------------------------------------------------------------------------

    def _check_place(self, kind: str, event: Event, place: tuple[int, int]) -> None:
        if kind in ("checkpoint", "record"):  # They change nothing, and take no position.
            if self._pool is not None and place != self._place:
                self._violate(event, f"a {kind} at {place}, the last event was at {self._place}")
            return
        if kind == "epoch":
            self._check_epoch(event)
        elif self._pool is not None and place != (self._place[0], self._place[1] + 1):
            self._violate(event, f"position {self._place[1] + 1} is missing")
        elif self._pool is None and place <= self._place:
            self._violate(event, f"it comes after position {self._place[1]} of epoch {self._place[0]}")

    def _check_epoch(self, event: Event) -> None:
        """Writes were lost in a failover: what the history shows must end where the store said that it stood."""
        was = int(event["was_epoch"]), int(event["was_position"])
        self.verdict.epochs += 1
        self.verdict.lost_to_failover += int(event["lost"])
        if self._pool is not None and was != self._place:
            self._violate(event, f"the store stood at {was}, the history at {self._place}")
        elif int(event["position"]) != was[1] + int(event["lost"]) + 1:
            self._violate(event, f"numbers do not go on from {was[1]} and the {event['lost']} that were lost")

    def _violate(self, event: Event, message: str) -> None:
        """Notes a violation. Of what follows the state is not known: it gets the weaker check, up to a checkpoint."""
        verdict = self.verdict
        verdict.violation_count += 1
        if len(verdict.violations) < _KEPT_VIOLATIONS:
            subject = event.get("service") or event.get("rule", "")
            context = tuple(_shortened(e) for e in self._recent.get(subject, ()))
            verdict.violations.append(
                Violation(epoch=int(event["epoch"]), position=int(event["position"]), message=message, context=context)
            )
        self._leave("a violation came before")

    def _leave(self, why: str) -> None:
        self._pool = None
        self._why = why

    # -- events --------------------------------------------------------------------------------------------------------

    def _on_record(self, event: Event) -> None:
        self._batches.clear()
        if event["record"] != "full":
            self._leave("the record is sampled" if event["record"] == "sampled" else "recording ended")
        elif event["origin"] == "1":
            self._pool = Pool()
        elif self._pool is None:
            self._why = "recording began in mid-life"

    def _on_epoch(self, event: Event) -> None:
        pass  # All that it says was checked with its place.

    def _on_checkpoint(self, event: Event) -> Steps[None]:
        self.verdict.checkpoints += 1
        state = yield from checkpoint.reading(event["state"])
        wrong = yield from checkpoint.checking(state.pool)
        if self._pool is not None:
            wrong += yield from checkpoint.comparing(self._pool, state.pool)
        if state.broken != state.pool.broken:
            wrong.append(f"breakers are listed as {state.broken!r}, and are {state.pool.broken!r}")
        if wrong:
            self._violate(event, "; ".join(wrong[:_CONTEXT]))
        if state.record == "full":
            self._pool = state.pool
            self._batches = {name: (worker.last, _EVERY) for name, worker in state.pool.workers.items()}

    def _on_fence(self, event: Event) -> None:
        if self._pool is None:
            return
        definition = msgspec.json.decode(event["definition"], type=RuleDefinition)
        if self._pool.fence(int(event["now_ms"]), [definition])[1] != 1:
            self._violate(event, f"rule {definition.rule} was fenced at {definition.revision} or later before")

    def _on_pick(self, event: Event) -> None:
        verdict, rule = self.verdict, event["rule"]
        verdict.picks += 1
        verdict.picks_by_rule[rule] = verdict.picks_by_rule.get(rule, 0) + 1
        if event["is_switch"] == "1" and event["reason"] != "pinned":
            verdict.switches += 1
        if self._pool is not None:
            self._replay_pick(self._pool, event)
            return
        if "services" in event:
            self._check_sampled_choice(event)
        state = _state(event["before"], PICK_COUNTERS)
        state.pick(int(event["now_ms"]), int(event["reserved"]))
        if int(event["meters"]) & BY_SERVICE:
            state.minute.count(int(event["now_ms"]), 1, 0)
        if event["reason"] == "probe":
            state.breaker.probe = int(event["position"])
        self._compare(event, state, PICK_COUNTERS)

    def _replay_pick(self, pool: Pool, event: Event) -> None:
        now_ms, number, worker = int(event["now_ms"]), int(event["number"]), event["worker"]
        selection = Selection(
            number=number,
            rule=event["rule"],
            partition=event["partition"],
            revision=int(event["revision"]),
            draw=int(event["draw"]),
            reserved=int(event["reserved"]),
            deadline_ms=int(event["deadline_ms"]) - now_ms,
            session=_SESSION,
            affinity_ms=int(event["affinity_ms"]),
            only=event["only"],
            excluded=tuple(filter(None, event["excluded"].split("\n"))),
            barred=tuple(filter(None, event.get("barred", "").split("\n"))),
        )
        if not self._agrees_before(event, PICK_COUNTERS):
            return
        pool.pins = {_SESSION: (event["pin"], now_ms + 1)} if event["pin"] else {}
        answer: Reply = pool.select(now_ms, worker, [selection], 1)[0]
        given = [
            *("pick", event["service"], event["reason"], int(event["seq"])),
            *(int(event["epoch"]), int(event["position"]), int(event["streak"]), int(event["is_switch"])),
        ]
        if answer != given:
            self._violate(event, f"rule {event['rule']}: {given} was picked, the reference says {answer}")
            return
        held = pool.workers[worker].names[number]
        assert isinstance(held, Held), "it was picked"
        if held.meters != int(event["meters"]):
            self._violate(event, f"meters {event['meters']} count it, the reference says {held.meters}")
        else:
            self._compare(event, pool.services[event["service"]], PICK_COUNTERS)

    def _check_sampled_choice(self, event: Event) -> None:
        services = checkpoint.read_services(event["services"])
        tactic = tactic_of(event["tactic"], checkpoint.read_params(event["params"]))
        counts = [tuple(map(int, line.split(" "))) for line in event["counts"].split("\n") if line]
        if tactic is None:
            self._violate(event, f"rule {event['rule']}: {event['tactic']!r} is no tactic")
            return
        choice = choose(
            tactic,
            cursor=event["cursor"],
            streak=int(event["streak_before"]),
            order=[service.id for service in services],
            candidates=[
                Candidate(
                    service=service.id,
                    weight=service.weight,
                    cost=service.cost,
                    requests=requests,
                    tokens=tokens,
                    in_flight=in_flight,
                    first_token=first_token,
                    per_token=per_token,
                )
                for service, (is_candidate, requests, tokens, in_flight, first_token, per_token) in zip(
                    services, counts, strict=True
                )
                if is_candidate
            ],
            draw=int(event["draw"]),
            memory=event["memory"],
        )
        given = (event["service"], event["reason"], int(event["streak"]))
        if choice is None:
            self._violate(event, f"rule {event['rule']}: {given} was picked without a candidate")
            return
        expected = (choice.service, choice.reason, choice.streak)
        if event["reason"] in ("retry", "exhausted"):  # They leave the streak alone.
            expected = (choice.service, event["reason"], int(event["streak_before"]))
        if given != expected:
            self._violate(event, f"rule {event['rule']}: {given} was picked, by what it saw it had to be {expected}")

    def _on_settle(self, event: Event) -> None:
        self.verdict.settles += 1
        worker, at = event["worker"], (int(event["batch"]), int(event["place"]))
        if at <= self._batches.get(worker, (0, 0)):
            self._violate(event, f"entry {at[1]} of batch {at[0]} of {worker} was settled before")
        self._batches[worker] = at
        entry = Entry(
            number=int(event["number"]),
            service=event["service"],
            outcome=Outcome(event["outcome"]),
            age_ms=int(event["age_ms"]),
            usage=Usage(
                input=int(event["input"]),
                output=int(event["output"]),
                cached=int(event["cached"]),
                cache_creation=int(event["cache_creation"]),
                reasoning=int(event["reasoning"]),
            ),
            cooldown_ms=int(event["cooldown_ms"]),
            first_token_us=int(event["first_token_us"]),
            stream_us=int(event["stream_us"]),
        )
        if not event["service"]:
            if self._pool is not None:
                self._pool.apply_settle(int(event["now_ms"]), worker, entry)
        elif self._pool is not None:
            if not self._agrees_before(event, LEDGER_COUNTERS):
                return
            self._pool.apply_settle(int(event["now_ms"]), worker, entry)
            self._compare(event, self._pool.services.get(event["service"], ServiceState()), LEDGER_COUNTERS)
        else:
            self._check_settle_by_itself(event, entry)

    def _check_settle_by_itself(self, event: Event, entry: Entry) -> None:
        """What the attempt held is not known: what it gave back is taken from the event, the rest must follow."""
        state, after = _state(event["before"], LEDGER_COUNTERS), _state(event["after"], LEDGER_COUNTERS)
        reserved = 0
        if after.in_flight == state.in_flight - 1 and after.reserved <= state.reserved:
            reserved = state.reserved - after.reserved
            state.release(reserved)
        elif after.lost < state.lost:
            return  # A lost attempt was found again; when it was lost is not known here.
        if entry.outcome is Outcome.ABANDONED:
            state.abandoned += 1
        else:
            now_ms = int(event["now_ms"])
            state.count(now_ms, entry)
            state.cool_down(now_ms, entry)
            state.measure(now_ms, entry)
        self._compare_loosely(event, state, minute_tokens(entry, reserved))

    def _on_reap(self, event: Event) -> None:
        self.verdict.lost += 1
        now_ms, worker, number = int(event["now_ms"]), event["worker"], int(event["number"])
        if self._pool is None:
            state = _state(event["before"], LEDGER_COUNTERS)
            state.release(int(event["reserved"]))
            state.lose(now_ms, int(event["reserved"]))
            self._compare_loosely(event, state, int(event["reserved"]))
            return
        held = self._pool.workers[worker].names.get(number) if worker in self._pool.workers else None
        if not isinstance(held, Held):
            self._violate(event, f"{worker} holds nothing under {number}, yet lost it")
            return
        if not self._agrees_before(event, LEDGER_COUNTERS):
            return
        self._pool.lose(now_ms, worker, number)
        self._compare(event, self._pool.services[event["service"]], LEDGER_COUNTERS)

    def _on_clear(self, event: Event) -> None:
        self.verdict.clears += 1
        if self._pool is not None:
            if not self._agrees_before(event, CLEAR_COUNTERS):
                return
            self._pool.clear(int(event["now_ms"]), [event["service"]])
            state = self._pool.services[event["service"]]
        else:
            state = _state(event["before"], CLEAR_COUNTERS)
            state.clear(int(event["position"]))
        self._compare(event, state, CLEAR_COUNTERS)

    def _on_health(self, event: Event) -> None:
        if self._pool is None:
            self._compare_loosely(event, _state(event["before"], LEDGER_COUNTERS), 0)
        elif self._agrees_before(event, LEDGER_COUNTERS):
            self._pool.health(int(event["now_ms"]), [event["service"]], event["is_alive"] == "1")
            self._compare(event, self._pool.services[event["service"]], LEDGER_COUNTERS)

    def _agrees_before(self, event: Event, names: Sequence[str]) -> bool:
        """True when the counters before an event are the reference's."""
        assert self._pool is not None
        before = self._pool.services.get(event["service"], ServiceState()).text(names)
        if event["before"] != before:
            self._violate(event, f"{event['service']} counted {event['before']} before, the reference says {before}")
            return False
        return True

    def _compare(self, event: Event, state: ServiceState, names: Sequence[str]) -> None:
        """The counters after an event against what they must be."""
        expected = state.text(names)
        if event["after"] != expected:
            told = ", ".join(names) + " | windows | minute | breaker"
            self._violate(event, f"{event['service']} counts {event['after']}, expected {expected} ({told})")

    def _compare_loosely(self, event: Event, state: ServiceState, tokens: int) -> None:
        """As `_compare`, where neither meters nor breaker numbers are known: the minute may have counted the tokens."""
        after = _state(event["after"], LEDGER_COUNTERS)
        state.breaker = after.breaker
        if after.minute != state.minute:
            state.minute.count(int(event["now_ms"]), 0, tokens)
        self._compare(event, state, LEDGER_COUNTERS)


def _state(text: str, names: Sequence[str]) -> ServiceState:
    """A service from what an event tells of it."""
    counters, windows, minute, breaker = text.split("|")
    state = ServiceState(
        windows=checkpoint.read_windows(windows),
        minute=checkpoint.read_minute(minute),
        breaker=checkpoint.read_breaker(breaker),
    )
    for name, value in zip(names, counters.split(" "), strict=True):
        setattr(state, name, int(value))
    return state


def _shortened(event: Event) -> Event:
    """The event without the parts that fill pages."""
    return {k: v if len(v) <= 300 else v[:300] + "…" for k, v in event.items()}


_HANDLERS: dict[str, Callable[[Checker, Event], Steps[None] | None]] = {
    "record": Checker._on_record,
    "epoch": Checker._on_epoch,
    "checkpoint": Checker._on_checkpoint,
    "fence": Checker._on_fence,
    "pick": Checker._on_pick,
    "settle": Checker._on_settle,
    "reap": Checker._on_reap,
    "clear": Checker._on_clear,
    "health": Checker._on_health,
}
