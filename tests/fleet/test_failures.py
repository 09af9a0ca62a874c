"""Accounts that fail, behind the whole fleet: their own logs tell of cooldowns, breakers, tiers, pins and retries."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import time
from collections.abc import Iterable

import aiohttp
import pytest

from tests.fleet.account_log import Account, Line, most_at_once
from tests.fleet.conftest import Asker, Start
from tests.fleet.pairs import Answer, Pair, answer_of, pair_of, provider, rule, running, service
from tests.store.conftest import eventually

NO_BREAKER = {"failures": 0, "ratio": 0}
LEASE_S = 1.0
CLOCK_S = 0.002
"""Redis counts in whole milliseconds."""
OVERFLOW = {
    "code": "context_length_exceeded",
    "message": "This model's maximum context length is 8192 tokens. However, your messages resulted in 9000 tokens.",
}


def pauses(lines: Iterable[Line]) -> list[float]:
    """How long after the end of one request the next began."""
    return [later.began - earlier.ended for earlier, later in itertools.pairwise(lines)]


def told(answers: list[Answer]) -> list[tuple[int, str, int]]:
    """Status, account and attempts of each answer."""
    return [(answer.status, answer.service.partition(":")[0], answer.attempts) for answer in answers]


async def asked_in_turn(pair: Pair, model: str, count: int) -> list[Answer]:
    """Answers to requests one after the other, by all fleets in turn."""
    return [await pair.ask(model, number) for number in range(count)]


async def has(account: Account, count: int, timeout_s: float = 10.0) -> None:
    """Returns once an account has seen so many requests."""

    async def is_so() -> bool:
        return len(account.lines) >= count

    await eventually(is_so, timeout_s)


# -- cooldown, breaker -------------------------------------------------------------------------------------------------


async def test_an_account_that_asks_for_two_seconds_is_left_alone_by_every_worker(start: Start, store_url: str) -> None:
    anna, boris = Account("anna"), Account("boris")
    async with running(anna, boris):
        document = {
            "providers": [provider(anna), provider(boris)],
            "rules": [rule("chat", service(anna), service(boris))],
        }
        async with pair_of(start, store_url, document) as pair:
            anna.fails(429, times=1, retry_after="2")
            first = await pair.ask("chat")
            stats = (await pair.stats())["anna:m"]
            async with pair.under_load("chat") as answers:
                await has(anna, 5)
            await pair.books_are_those_of([anna, boris])

    assert told([first]) == [(200, "boris", 2)]
    assert 2.0 - CLOCK_S <= pauses(anna.lines)[0] < 4.0
    assert [answer for answer in answers if answer.status != 200] == []
    assert (stats["breaker"], stats["cooling_until"] is not None, stats["failures"]) == ("closed", True, 1)


async def test_a_rule_that_refuses_sends_nothing_while_all_its_accounts_are_away(start: Start, store_url: str) -> None:
    """Where all ask for time it is a rate limit, where one is broken an outage; either way the client is told when."""
    cooling, broken = Account("cooling"), Account("broken")
    async with running(cooling, broken):
        document = {
            "providers": [provider(cooling), provider(broken, breaker={"failures": 1, "open_s": 60})],
            "rules": [
                rule("one", service(cooling), on_exhausted="refuse"),
                rule("both", service(cooling), service(broken), on_exhausted="refuse", retry={"backoff_ms": 1}),
            ],
        }
        async with pair_of(start, store_url, document) as pair:
            cooling.fails(429, retry_after="30")
            broken.fails(503)
            first = await pair.ask("both")
            one = await pair.several(20, lambda n: pair.chat("one", n))
            both = await pair.several(20, lambda n: pair.chat("both", n))
            await pair.books_are_those_of([cooling, broken])

    assert told([first]) == [(503, "broken", 2)]
    assert {(answer.status, answer.error) for answer in one} == {(429, "openai.RateLimitError")}
    assert {(answer.status, answer.error) for answer in both} == {(503, "openai.InternalServerError")}
    assert all(25 <= int(answer.retry_after) <= 30 for answer in one)
    assert all(55 <= int(answer.retry_after) <= 72 for answer in both)
    assert (len(cooling.lines), len(broken.lines)) == (1, 1)


async def test_a_broken_account_gets_one_probe_at_a_time_from_the_whole_fleet(start: Start, store_url: str) -> None:
    """The breaker opens for ever longer while probes fail, and closes after three that succeed."""
    open_s, anna, boris = 0.5, Account("anna"), Account("boris")
    breaker = {"failures": 3, "open_s": open_s, "successes": 3}
    async with running(anna, boris):
        document = {
            "providers": [provider(anna, breaker=breaker), provider(boris)],
            "rules": [rule("chat", service(anna), service(boris), retry={"backoff_ms": 1})],
        }
        async with pair_of(start, store_url, document) as pair:
            anna.fails(500, times=1)
            anna.fails(0, times=1)
            anna.fails(503)
            failing = await asked_in_turn(pair, "chat", 5)
            opened = (await pair.stats())["anna:m"]
            anna.hold_s = 0.2
            async with pair.under_load("chat") as answers:
                await has(anna, 5)
                anna.recovers()  # The fifth, which is the second probe, will fail yet.
                await has(anna, 20)
            await pair.books_are_those_of([anna, boris])
            closed = (await pair.stats())["anna:m"]

    assert told(failing) == [(200, "boris", 2), (200, "boris", 1)] * 2 + [(200, "boris", 2)]
    assert [answer for answer in answers if answer.status != 200] == []
    assert (opened["breaker"], closed["breaker"]) == ("open", "closed")
    assert [line.status for line in anna.lines[:8]] == [500, 0, 503, 503, 503, 200, 200, 200]
    for factor, pause_s in zip((1, 2, 4), pauses(anna.lines[2:6]), strict=True):
        # Up to a fifth longer, and until somebody asks.
        assert factor * open_s - CLOCK_S <= pause_s < 1.2 * factor * open_s + 1
    assert most_at_once(anna.lines[2:8]) == 1
    assert most_at_once(anna.lines[8:]) > 1


async def test_a_probe_that_dies_with_its_worker_is_followed_by_another(start: Start, store_url: str) -> None:
    """Once the lease is over: until then nothing else is sent to the account, for its probe may live."""
    anna, boris = Account("anna"), Account("boris")
    async with running(anna, boris):
        document = {
            "providers": [provider(anna, breaker={"failures": 1, "open_s": 0.2, "successes": 1}), provider(boris)],
            "rules": [rule("chat", service(anna), service(boris), retry={"backoff_ms": 1})],
        }
        async with pair_of(start, store_url, document, {"BALANCER_LEASE_S": str(LEASE_S)}) as pair:
            fleet, _ = pair.fleets
            async with fleet.askers() as askers:
                victim, (asker,) = next(iter(askers.items()))
                anna.fails(500, times=1)
                failed = await pair.ask("chat", 1)
                anna.gate = asyncio.Event()
                probing = asyncio.create_task(_ask_on(asker))
                await has(anna, 2)
                meanwhile = await pair.asks("chat", 20)
                os.kill(victim, signal.SIGKILL)
                killed = time.monotonic()
                with pytest.raises((aiohttp.ClientError, ConnectionError)):
                    await probing
            anna.gate = None
            async with pair.under_load("chat") as answers:
                await has(anna, 10)
            await pair.books_are_those_of([anna, boris], lost=1)

    assert told([failed]) == [(200, "boris", 2)]
    assert told(meanwhile) == [(200, "boris", 1)] * 20
    assert 0 < anna.lines[2].began - killed < LEASE_S + 3
    # The load began when that worker was dead, but its socket is served by its successor.
    assert [answer for answer in answers if answer.status != 200] == []


async def _ask_on(asker: Asker) -> None:
    while True:
        assert await asker.is_whole("chat")


async def test_one_prober_of_the_whole_fleet_opens_and_closes_a_breaker(start: Start, store_url: str) -> None:
    """No request meets an account that does not answer, and none is risked to learn that it does again."""
    anna, boris = Account("anna"), Account("boris")
    health = {"path": "/health", "interval_s": 1}
    breaker = {"failures": 2, "open_s": 0.5, "successes": 1}
    async with running(anna, boris):
        document = {
            "providers": [provider(anna, health=health, breaker=breaker), provider(boris)],
            "rules": [rule("chat", service(anna), service(boris))],
        }
        anna.fails(503)
        async with pair_of(start, store_url, document) as pair:
            await _breaker_is(pair, "open")
            away = await pair.asks("chat", 20)
            anna.recovers()
            await _breaker_is(pair, "closed")
            back = await asked_in_turn(pair, "chat", 4)
            await pair.books_are_those_of([anna, boris])

    assert told(away) == [(200, "boris", 1)] * 20
    assert {answer.status for answer in back} == {200}
    assert len(anna.of("m")) == 2
    probes = [line for line in anna.lines if line.path == "/health"]
    assert min(pauses(probes)) > 0.7


async def _breaker_is(pair: Pair, state: str) -> None:
    async def is_so() -> bool:
        return bool((await pair.stats())["anna:m"]["breaker"] == state)

    await eventually(is_so, 8.0)


# -- tiers -------------------------------------------------------------------------------------------------------------


async def test_a_paid_account_serves_only_while_the_free_one_is_away(start: Start, store_url: str) -> None:
    """It goes on for a minute, so that its caches are worth filling, unless it is away itself."""
    free, paid = Account("free"), Account("paid")
    async with running(free, paid):
        document = {
            "providers": [provider(free), provider(paid)],
            "rules": [rule("chat", service(paid, tier=1), service(free), retry={"backoff_ms": 1})],
        }
        async with pair_of(start, store_url, document) as pair:
            before = await pair.asks("chat", 40)
            free.fails(429, times=1, retry_after="1")
            away = await asked_in_turn(pair, "chat", 10)
            await asyncio.sleep(1.1)
            held = await asked_in_turn(pair, "chat", 10)
            paid.fails(429, times=1, retry_after="1")
            back = await asked_in_turn(pair, "chat", 10)
            await asyncio.sleep(1.1)
            after = await pair.asks("chat", 40)
            await pair.books_are_those_of([free, paid])

    assert told(before) == [(200, "free", 1)] * 40
    assert told(away) == [(200, "paid", 2)] + [(200, "paid", 1)] * 9
    assert told(held) == [(200, "paid", 1)] * 10
    assert told(back) == [(200, "free", 2)] + [(200, "free", 1)] * 9
    assert told(after) == [(200, "free", 1)] * 40


# -- pins --------------------------------------------------------------------------------------------------------------


async def test_a_session_stays_with_its_account_and_comes_back_after_a_cooldown(start: Start, store_url: str) -> None:
    anna, boris = Account("anna"), Account("boris")
    names = [f"session-{number}." for number in range(12)]
    async with running(anna, boris):
        document = {
            "providers": [provider(anna), provider(boris)],
            "rules": [
                rule("chat", service(anna), service(boris), session_affinity=60, session_header="x-session"),
            ],
        }

        async def ask(pair: Pair, number: int) -> Answer:
            name = names[number % 12]
            messages = [{"role": "user", "content": name}]
            # The fleet changes within each session.
            return await pair.ask("chat", number // 12, session=name, messages=messages)

        async with pair_of(start, store_url, document) as pair:
            answers = await pair.several(96, lambda number: ask(pair, number))
            home = {name: {answers[i].service for i in range(n, 96, 12)} for n, name in enumerate(names)}
            assert sorted(len(some) for some in home.values()) == [1] * 12
            assert set().union(*home.values()) == {"anna:m", "boris:m"}
            seen = len(anna.lines)
            guest = next(n for n, name in enumerate(names) if home[name] == {"anna:m"})
            anna.fails(429, times=1, retry_after="1")
            away = [await ask(pair, guest + 12 * turn) for turn in range(4)]
            await asyncio.sleep(1.1)
            back = [await ask(pair, guest + 12 * turn) for turn in range(4)]
            await pair.books_are_those_of([anna, boris])

    assert {answer.status for answer in answers} == {200}
    assert told(away) == [(200, "boris", 2)] + [(200, "boris", 1)] * 3
    assert told(back) == [(200, "anna", 1)] * 4
    texts = {account.name: {line.text for line in account.lines} for account in (anna, boris)}
    guests = {line.text for line in anna.lines[seen:]}
    assert texts["anna"] & texts["boris"] == guests
    assert len(guests) == 1


async def test_a_response_is_found_by_its_id_from_every_worker(start: Start, store_url: str) -> None:
    anna, boris = Account("anna"), Account("boris")
    async with running(anna, boris):
        document = {
            "providers": [provider(anna), provider(boris)],
            "rules": [rule("chat", service(anna), service(boris))],
        }
        async with pair_of(start, store_url, document) as pair:
            made = [await pair.ask("chat", number, path="/v1/responses") for number in range(4)]
            one, two = pair.fleets
            async with one.askers() as some, two.askers() as more:
                askers = [asker for (asker,) in (*some.values(), *more.values())]
                for answer in made:
                    await _is_at_home(answer, askers)
                unknown = await _by_id(askers[0], "GET", "/resp_of_nobody")
                lost = await pair.ask("chat", 0, path="/v1/responses", previous_response_id="resp_of_nobody")
            await pair.books_are_those_of([anna, boris])

    assert told(made) == [(200, "anna", 1), (200, "boris", 1)] * 2
    assert (len(askers), unknown.status, lost.status) == (4, 404, 400)
    assert (unknown.body["error"]["code"], lost.body["error"]["param"]) == ("not_found", "previous_response_id")
    for account in (anna, boris):
        ids = [f"/v1/responses/{answer.body['id']}" for answer in made if answer.service == f"{account.name}:m"]
        verbs = [*(f"GET {i}" for i in ids), *(f"POST {i}/cancel" for i in ids), *(f"DELETE {i}" for i in ids)]
        # Each worker asked for each once, and went on from it once.
        assert sorted(account.paths()) == sorted(verbs * 4 + ["POST /v1/responses"] * (2 + 2 * 4))


async def _is_at_home(answer: Answer, askers: list[Asker]) -> None:
    """Fails unless every worker finds a response at its account, and goes on from it there."""
    response_id = answer.body["id"]
    for asker in askers:
        for method, path in (("GET", ""), ("POST", "/cancel"), ("DELETE", "")):
            found = await _by_id(asker, method, f"/{response_id}{path}")
            assert (found.status, found.body["id"]) == (200, response_id)
        body = {"model": "chat", "input": "and?", "previous_response_id": response_id}
        async with asker.session.post(f"{asker.url}/v1/responses", json=body) as response:
            assert told([await answer_of(response)]) == told([answer])


async def _by_id(asker: Asker, method: str, path: str) -> Answer:
    async with asker.session.request(method, f"{asker.url}/v1/responses{path}") as response:
        return await answer_of(response)


async def test_a_conversation_goes_on_where_another_rule_has_stood_in(start: Start, store_url: str) -> None:
    """Its next turn was refused for ever: the asked rule has no such service."""
    dead, other = Account("dead"), Account("other")
    async with running(dead, other):
        document = {
            "providers": [provider(dead), provider(other)],
            "rules": [
                rule("chat", service(dead), fallback=["between"], response_model="name", retry={"backoff_ms": 1}),
                rule("between", service(dead), fallback=["other"]),
                rule("other", service(other)),
            ],
        }
        async with pair_of(start, store_url, document) as pair:
            dead.fails(503)
            first = await pair.ask("chat", 0, path="/v1/responses")
            dead.recovers()
            second = await pair.ask("chat", 1, path="/v1/responses", previous_response_id=first.body["id"])
            await pair.books_are_those_of([dead, other])

    assert (first.status, first.service) == (200, "other:m")
    assert told([second]) == [(200, "other", 1)]


# -- rules that stand in -----------------------------------------------------------------------------------------------


async def test_another_rule_stands_in_when_one_has_nobody_left(start: Start, store_url: str) -> None:
    """After a failure it is the next attempt; where a breaker or a limit leaves nobody, it is the first."""
    dead, small, other = Account("dead"), Account("small"), Account("other")
    async with running(dead, small, other):
        document = {
            "providers": [
                provider(dead, breaker={"failures": 3, "open_s": 60}),
                provider(small, limits={"rpm": 3}),
                provider(other),
            ],
            "rules": [
                rule("broken", service(dead), fallback=["other"], on_exhausted="refuse", retry={"backoff_ms": 1}),
                rule("limited", service(small), fallback=["other"]),
                rule("other", service(other)),
            ],
        }
        async with pair_of(start, store_url, document) as pair:
            dead.fails(503)
            failing = await asked_in_turn(pair, "broken", 3)
            broken = await pair.asks("broken", 20)
            limited = await pair.asks("limited", 20)
            other.fails(503)
            (last,) = await asked_in_turn(pair, "broken", 1)
            await pair.books_are_those_of([dead, small, other])

    assert told(failing) == [(200, "other", 2)] * 3
    assert told(broken) == [(200, "other", 1)] * 20
    assert sorted(told(limited)) == [(200, "other", 1)] * 17 + [(200, "small", 1)] * 3
    assert told([last]) == [(503, "other", 1)]
    assert (len(dead.lines), len(small.lines)) == (3, 3)


@pytest.mark.parametrize("style", ["openai", "anthropic"])
async def test_a_prompt_that_is_too_long_goes_to_the_rule_for_long_ones_once(
    style: str, start: Start, store_url: str
) -> None:
    short, long = Account("short"), Account("long")
    path = {"openai": "/v1/chat/completions", "anthropic": "/v1/messages"}[style]
    overflow = {
        "openai": OVERFLOW,
        "anthropic": {"code": "invalid_request_error", "message": "prompt is too long: 215000 tokens > 200000 maximum"},
    }[style]
    async with running(short, long):
        document = {
            "providers": [provider(short, api_style=style), provider(long, api_style=style)],
            "rules": [
                rule("chat", service(short), scenario=style, on_context_overflow="long", retry={"backoff_ms": 1}),
                rule("long", service(long), scenario=style),
            ],
        }
        async with pair_of(start, store_url, document) as pair:
            short.fails(400, times=5, **overflow)
            longer = [await pair.ask("chat", number, path=path, max_tokens=9) for number in range(5)]
            usual = [await pair.ask("chat", number, path=path, max_tokens=9) for number in range(2)]
            short.fails(400, times=1, code="invalid_request_error", message="temperature is too high")
            wrong = await pair.ask("chat", 0, path=path, max_tokens=9)
            short.fails(400, times=1, **overflow)
            long.fails(400, times=1, **overflow)
            too_long = await pair.ask("chat", 1, path=path, max_tokens=9)
            await pair.books_are_those_of([short, long])

    assert told(longer) == [(200, "long", 2)] * 5
    # None of them is a failure of the account's: its breaker is closed.
    assert told(usual) == [(200, "short", 1)] * 2
    assert told([wrong]) == [(400, "short", 1)]
    assert told([too_long]) == [(400, "long", 2)]
    assert too_long.body["error"]["message"] == overflow["message"]
    assert (len(short.lines), len(long.lines)) == (9, 6)


# -- retries -----------------------------------------------------------------------------------------------------------


async def test_retries_are_a_fraction_of_the_requests_of_the_whole_fleet(start: Start, store_url: str) -> None:
    """With every account dead there would be three attempts a request: a crowd that makes an outage worse."""
    accounts = [Account("anna"), Account("boris"), Account("carla")]
    count, ratio, burst = 200, 0.2, 100
    async with running(*accounts):
        document = {
            "providers": [provider(account, breaker=NO_BREAKER) for account in accounts],
            "rules": [
                rule(
                    "chat",
                    *(service(account) for account in accounts),
                    retry={"attempts": 3, "budget_ratio": ratio, "backoff_ms": 1},
                ),
            ],
        }
        async with pair_of(start, store_url, document) as pair:
            for account, status in zip(accounts, (500, 503, 529), strict=True):
                account.fails(status)
            answers = await pair.asks("chat", count)
            attempts = sum(len(account.lines) for account in accounts)
            await pair.books_are_those_of(accounts)
            for account in accounts:
                account.recovers()
            well = await pair.asks("chat", 20)

    assert count + burst <= attempts <= count * (1 + ratio) + burst
    assert sum(answer.attempts for answer in answers) == attempts
    assert {answer.status for answer in answers} <= {500, 503, 529}
    assert {answer.status for answer in well} == {200}
    assert {answer.body["error"]["code"] for answer in answers} == {"server_error"}
