"""Checks a pool's recorded history against the reference: every pick, and every counter beside it.

The history must begin with the pool: a trimmed one is refused, for nothing is known of what came before.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec

from balancer.domain import Entry, Outcome, RuleDefinition, Selection, Usage
from balancer.reference import Abandoned, Held, Pool, ServiceState

Event = Mapping[str, str]
"""One entry of the decision stream, as the scripts write it."""


class Verdict(msgspec.Struct, kw_only=True):
    """What was checked, and what disagrees: one line for each violation, in order."""

    picks: int = 0
    picks_by_rule: dict[str, int] = msgspec.field(default_factory=dict)
    settles: int = 0
    lost: int = 0
    switches: int = 0
    epochs: int = 1
    violations: list[str] = msgspec.field(default_factory=list)
    pool: Pool = msgspec.field(default_factory=Pool)


def check(events: Iterable[Event]) -> Verdict:
    """Replays the events in (epoch, position) order. Raises KeyError or ValueError for what is no event of ours."""
    verdict = Verdict()
    for event in sorted(events, key=lambda event: (int(event["epoch"]), int(event["position"]))):
        _apply(verdict, event)
    return verdict


def _apply(verdict: Verdict, event: Event) -> None:
    pool = verdict.pool
    epoch, position = int(event["epoch"]), int(event["position"])
    if epoch > pool.epoch:
        verdict.epochs += 1
        pool.epoch, pool.position = epoch, position - 1
    if position != pool.position + 1:
        verdict.violations.append(f"position {pool.position + 1} is missing: the next one is {position}")
        pool.position = position - 1
    match event["event"]:
        case "pick":
            _pick(verdict, event)
        case "settle":
            _settle(verdict, event)
        case "reap":
            _reap(verdict, event)
        case "fence":
            definition = msgspec.json.decode(event["definition"], type=RuleDefinition)
            pool.fence(int(event["now_ms"]), [definition])
        case other:
            raise ValueError(f"unknown event {other!r}")
    pool.position = position


def _pick(verdict: Verdict, event: Event) -> None:
    pool, now_ms, number = verdict.pool, int(event["now_ms"]), int(event["number"])
    names = pool.workers[event["worker"]].names if event["worker"] in pool.workers else {}
    name = names.get(number)
    if isinstance(name, Abandoned) and name.until_ms <= now_ms:
        del names[number]
    selection = Selection(
        number=number,
        rule=event["rule"],
        partition=event["partition"],
        revision=int(event["revision"]),
        draw=int(event["draw"]),
        reserved=int(event["reserved"]),
        deadline_ms=int(event["deadline_ms"]) - now_ms,
        excluded=tuple(filter(None, event["excluded"].split("\n"))),
    )
    answer = pool.select(now_ms, event["worker"], [selection], 1)[0]
    verdict.picks += 1
    verdict.picks_by_rule[event["rule"]] = verdict.picks_by_rule.get(event["rule"], 0) + 1
    expected = [
        "pick",
        event["service"],
        event["reason"],
        int(event["seq"]),
        int(event["epoch"]),
        int(event["position"]),
        int(event["streak"]),
    ]
    if answer[:7] != expected:
        verdict.violations.append(
            f"position {event['position']}: rule {event['rule']} picked {expected[1:]}, the reference {answer[1:7]}"
        )
        return
    verdict.switches += int(answer[7])
    state = pool.services[event["service"]]
    _compare(verdict, event, state, picks=state.picks)


def _settle(verdict: Verdict, event: Event) -> None:
    pool, worker = verdict.pool, event["worker"]
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
    )
    last = pool.workers[worker].last if worker in pool.workers else 0
    pool.settle(int(event["now_ms"]), worker, last + 1, [entry], 1)
    verdict.settles += 1
    if event["service"]:
        state = pool.services[event["service"]]
        _compare(verdict, event, state, requests=state.requests)


def _reap(verdict: Verdict, event: Event) -> None:
    pool, worker, number = verdict.pool, event["worker"], int(event["number"])
    held = pool.workers[worker].names.get(number) if worker in pool.workers else None
    if not isinstance(held, Held):
        verdict.violations.append(f"position {event['position']}: {worker} holds nothing under {number}, yet lost it")
        return
    pool.lose(int(event["now_ms"]), worker, number)
    verdict.lost += 1
    state = pool.services[event["service"]]
    _compare(verdict, event, state, requests=state.requests)


def _compare(verdict: Verdict, event: Event, state: ServiceState, **counters: int) -> None:
    """The counters written beside an event against the reference's."""
    windows = ";".join(f"{w.length} {w.start} {w.requests} {w.tokens}" for w in state.windows)
    expected = {"windows": windows, "in_flight": str(state.in_flight), "held": str(state.reserved)}
    expected |= {name: str(value) for name, value in counters.items()}
    for name, value in expected.items():
        if event[name] != value:
            verdict.violations.append(
                f"position {event['position']}: {name} of {event['service']} is {event[name]}, the reference's {value}"
            )
