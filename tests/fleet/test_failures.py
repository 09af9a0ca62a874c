"""Accounts that fail, behind the whole fleet: their own logs tell of cooldowns, breakers, tiers, pins and retries."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterable

import pytest

from tests.fleet.account_log import Account, Line, most_at_once
from tests.fleet.conftest import Asker, Start
from tests.fleet.pairs import Answer, Pair, answer_of, pair_of, provider, rule, running, service
from tests.store.conftest import eventually

NO_BREAKER = {"failures": 0, "ratio": 0}
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
    assert 2.0 - CLOCK_S <= pauses(anna.lines)[0] < 3.0
    assert [answer for answer in answers if answer.status != 200] == []
    assert (stats["breaker"], stats["cooling_until"] is not None, stats["failures"]) == ("closed", True, 1)


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
        assert factor * open_s - CLOCK_S <= pause_s < 1.2 * factor * open_s + 0.5
    assert most_at_once(anna.lines[2:8]) == 1
    assert most_at_once(anna.lines[8:]) > 1


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
            seen = len(anna.lines)
            guest = next(n for n, name in enumerate(names) if home[name] == {"anna:m"})
            anna.fails(429, times=1, retry_after="1")
            away = [await ask(pair, guest + 12 * turn) for turn in range(4)]
            await asyncio.sleep(1.1)
            back = [await ask(pair, guest + 12 * turn) for turn in range(4)]
            await pair.books_are_those_of([anna, boris])

    assert {answer.status for answer in answers} == {200}
    assert sorted(len(some) for some in home.values()) == [1] * 12
    assert set().union(*home.values()) == {"anna:m", "boris:m"}
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
