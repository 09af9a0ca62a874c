"""What holds in every situation: a batch is its single calls, and the script picks what the tactic in Python picks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from balancer.domain import Candidate, Outcome, ServiceDefinition, Tactic
from balancer.store.views import PoolView
from balancer.tactics import Hybrid, Random, RoundRobin, TokenBased, choose, tactic_params
from balancer.tactics import tactic_name as name_of
from balancer.tactics.cost import Cost
from balancer.tactics.latency import Latency
from balancer.tactics.least_in_flight import LeastInFlight
from balancer.tactics.weighted_round_robin import WeightedRoundRobin
from tests.lua.builders import NEVER, A, B, C, D, Fleet, a_rule, a_selection, a_service, an_abandoned, an_entry
from tests.lua.pool import LuaPool

NewPool = Callable[..., LuaPool]
IDS = (A, B, C, D, "e:x y")

# The fixture makes a fresh pool at each call: examples do not share one.
bounded = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
of_each_tactic = settings(bounded, max_examples=25)

draws = st.integers(0, 2**32 - 1)
request_thresholds = st.one_of(st.integers(1, 5), st.just(NEVER))
token_thresholds = st.one_of(st.integers(1, 150), st.just(NEVER))
TACTICS: dict[str, st.SearchStrategy[Tactic]] = {
    "round_robin": st.builds(RoundRobin, request_threshold=request_thresholds),
    "token_based": st.builds(TokenBased, token_threshold=token_thresholds),
    "hybrid": st.builds(Hybrid, request_threshold=request_thresholds, token_threshold=token_thresholds),
    "random": st.builds(Random),
    "least_in_flight": st.builds(LeastInFlight),
    "weighted_round_robin": st.builds(WeightedRoundRobin),
    "latency": st.builds(Latency, expected_output=st.integers(1, 500)),
    "cost": st.builds(Cost),
}
tactics = st.one_of(*TACTICS.values())


@st.composite
def services(draw: st.DrawFn) -> list[ServiceDefinition]:
    """Up to five services in any order."""
    ids = draw(st.lists(st.sampled_from(IDS), unique=True, max_size=5))
    return [
        a_service(
            id_,
            active=draw(st.integers(0, 3)) > 0,
            window_s=draw(st.sampled_from((5, 300))),
            weight=draw(st.sampled_from((0, 0, 1, 2, 1_000_000))),
            cost=draw(st.sampled_from((0, 300, 301))),
        )
        for id_ in ids
    ]


# -- a batch is its single calls ---------------------------------------------------------------------------------------


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """One selection of a batch, without its number."""

    rule: str
    revision: int
    draw: int
    reserved: int
    excluded: tuple[str, ...]
    barred: tuple[str, ...]


asked = st.builds(
    Asked,
    rule=st.sampled_from(("one", "one", "two", "unknown")),
    revision=st.sampled_from((2, 2, 2, 2, 1, 3)),
    draw=draws,
    reserved=st.integers(0, 60),
    excluded=st.lists(st.sampled_from(IDS), max_size=2, unique=True).map(tuple) | st.just(()),
    barred=st.just(()) | st.lists(st.sampled_from(IDS), max_size=2, unique=True).map(tuple),
)
batches = st.lists(
    st.tuples(st.lists(asked, min_size=1, max_size=12), st.integers(0, 6_000), st.integers(0, 3)),
    min_size=1,
    max_size=4,
)


@bounded
@given(one=st.tuples(tactics, services()), two=st.tuples(tactics, services()), batches=batches)
def test_a_batch_of_selections_equals_the_single_calls_in_the_same_order(
    new_pool: NewPool,
    one: tuple[Tactic, list[ServiceDefinition]],
    two: tuple[Tactic, list[ServiceDefinition]],
    batches: list[tuple[list[Asked], int, int]],
) -> None:
    whole, single = Fleet(new_pool()), Fleet(new_pool())
    lengths = dict.fromkeys(IDS, (5, 300))
    for fleet in (whole, single):
        for rule, (tactic, members) in (("one", one), ("two", two)):
            params = tactic_params(tactic)
            fleet.fence(a_rule(name_of(tactic), members, rule=rule, revision=2, lengths=lengths, params=params))
        fleet.settle(an_abandoned(3), an_abandoned(17))
    number = 0
    for batch, passed_ms, settled in batches:
        selections = [
            a_selection(number + i, **msgspec.structs.asdict(selection)) for i, selection in enumerate(batch, start=1)
        ]
        number += len(selections)
        answers, place = _split(whole.select(*selections))
        singles = [_split(single.select(selection)) for selection in selections]
        assert answers == [answer for (answer,), _ in singles]
        assert place == singles[-1][1]
        picked = [(s.number, a[1]) for s, a in zip(selections, answers, strict=True) if a[0] == "pick"]
        for fleet in (whole, single):
            fleet.settle(*(an_entry(n, service, input=n % 40) for n, service in picked[:settled]))
            fleet.pass_ms(passed_ms)
    assert _state(whole.view()) == _state(single.view())


def _split(reply: list[Any]) -> tuple[list[Any], list[Any]]:
    return reply[:-1], reply[-1]


def _state(view: PoolView) -> PoolView:
    return msgspec.structs.replace(view, pool="")


# -- the script picks what the tactic picks ----------------------------------------------------------------------------


class Used(msgspec.Struct, frozen=True, kw_only=True):
    """What a service has used before."""

    requests: int = 0
    tokens: int = 0
    reserved: int = 0


# Many of them whole tens, for a request weighs as much as ten tokens: so there are ties.
token_counts = st.one_of(st.integers(0, 120), st.integers(0, 6).map(lambda tens: tens * 10))
used = st.builds(Used, requests=st.integers(0, 6), tokens=token_counts, reserved=st.integers(0, 60) | st.just(0))
asks = st.lists(
    st.tuples(draws, st.lists(st.sampled_from(IDS), max_size=3, unique=True), st.integers(0, 50)),
    min_size=1,
    max_size=6,
)


@pytest.mark.parametrize("name", TACTICS)
@of_each_tactic
@given(
    data=st.data(),
    members=services(),
    uses=st.lists(used, min_size=5, max_size=5),
    cursor=st.one_of(st.just(""), st.sampled_from(IDS)),
    passed_ms=st.sampled_from((0, 4_999, 5_000, 300_000)),
    asks=asks,
)
def test_the_script_picks_what_the_tactic_in_python_picks(
    new_pool: NewPool,
    name: str,
    data: st.DataObject,
    members: list[ServiceDefinition],
    uses: list[Used],
    cursor: str,
    passed_ms: int,
    asks: list[tuple[int, list[str], int]],
) -> None:
    tactic = data.draw(TACTICS[name])
    fleet = Fleet(new_pool())
    for member, use in zip(members, uses, strict=False):
        fleet.use(member.id, window_s=member.window, **msgspec.structs.asdict(use))
    fleet.fence(a_rule(name, members, cursor=cursor, params=tactic_params(tactic)))
    fleet.pass_ms(passed_ms)
    for number, (draw, excluded, reserved) in enumerate(asks, start=1):
        before, memory = fleet.view(), fleet.memory()
        expected = _expected(before, tactic, memory, members, draw, excluded, fleet.now_ms)
        selection = a_selection(number, draw=draw, excluded=excluded, reserved=reserved)
        answer, _ = fleet.select(selection)
        assert answer == expected
        if answer[0] == "pick" and reserved % 2:
            times = {"first_token_us": draw % 1000, "stream_us": draw % 5000}
            fleet.settle(an_entry(number, answer[1], Outcome.SUCCESS, input=reserved, output=draw % 9, **times))


def _expected(
    view: PoolView,
    tactic: Tactic,
    memory: str,
    members: list[ServiceDefinition],
    draw: int,
    excluded: list[str],
    now_ms: int,
) -> list[Any]:
    """The answer that follows from the pool's state before the call and the tactic in Python."""
    part = view.partitions["|chat"]
    candidates = [_candidate(view, member, now_ms) for member in members if member.active and member.id not in excluded]
    choice = choose(
        tactic,
        cursor=part.cursor,
        streak=part.streak,
        order=[member.id for member in members],
        candidates=candidates,
        draw=draw,
        memory=memory,
    )
    if choice is None:
        return ["none", "tried" if any(m.active for m in members) and excluded else "inactive", 0]
    place = [view.rules["chat"].seq + 1, view.epoch, view.position + 1]
    if excluded:
        return ["pick", choice.service, "retry", *place, part.streak, 0]
    is_switch = int(part.cursor not in ("", choice.service))
    return ["pick", choice.service, choice.reason, *place, choice.streak, is_switch]


def _candidate(view: PoolView, member: ServiceDefinition, now_ms: int) -> Candidate:
    service = view.services[member.id]
    (window,) = (window for window in service.windows if window.length_s == member.window)
    requests, tokens = window.counts(now_ms)
    return Candidate(
        service=member.id,
        weight=member.weight,
        requests=requests,
        tokens=tokens + service.reserved,
        in_flight=service.in_flight,
        cost=member.cost,
        first_token=service.first_token,
        per_token=service.per_token,
    )
