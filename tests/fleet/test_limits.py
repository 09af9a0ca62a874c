"""Limits of the whole fleet, held against the accounts' own logs: four workers at once never add up to more."""

from __future__ import annotations

import asyncio
import math
import os
import signal
import time
from collections import Counter
from pathlib import Path

import yaml

from tests.fleet.account_log import INPUT, Account, most_a_minute, most_at_once, tokens
from tests.fleet.conftest import Start, run_command
from tests.fleet.pairs import LIMITED, Answer, Pair, pair_of, provider, rule, running, service
from tests.store.conftest import eventually

LEASE_S = 1.0
SHORT_LEASE = {"BALANCER_LEASE_S": str(LEASE_S)}
WHOLE_MINUTE_S = (45, 65)
"""A minute is full until its first five seconds are out of it, and the first requests began some seconds ago."""


def statuses(answers: list[Answer]) -> Counter[int]:
    """How many of each status."""
    return Counter(answer.status for answer in answers)


async def test_requests_a_minute_are_counted_over_the_whole_fleet(start: Start, store_url: str) -> None:
    """Of a provider over all its models, of either dialect, of a service beside one without; the rest is told when."""
    anna, claude, small, free = (Account(name, hold_s=0.01) for name in ("anna", "claude", "small", "free"))
    async with running(anna, claude, small, free):
        document = {
            "providers": [
                provider(anna, limits={"rpm": 30}),
                provider(claude, limits={"rpm": 25}, api_style="anthropic"),
                provider(small),
                provider(free),
            ],
            "rules": [
                rule("chat", service(anna)),
                rule("mini", service(anna, "mini")),
                rule("claude", service(claude), scenario="anthropic"),
                rule("both", service(small, limits={"rpm": 12}), service(free)),
            ],
        }
        async with pair_of(start, store_url, document) as pair:
            chats, messages, both = await asyncio.gather(
                pair.several(80, lambda n: pair.chat(("chat", "mini")[n // 2 % 2], n)),
                pair.several(60, lambda n: pair.message("claude", n)),
                pair.asks("both", 60),
            )
            await pair.books_are_those_of([anna, claude, small, free])

    assert statuses(chats) == {200: 30, LIMITED: 50}
    assert statuses(messages) == {200: 25, LIMITED: 35}
    assert statuses(both) == {200: 60}
    assert [most_a_minute(account.lines) for account in (anna, claude, small)] == [30, 25, 12]
    refused = [answer for answer in (*chats, *messages) if answer.status == LIMITED]
    assert {answer.error for answer in refused} == {"openai.RateLimitError", "anthropic.RateLimitError"}
    assert all(WHOLE_MINUTE_S[0] <= int(answer.retry_after) <= WHOLE_MINUTE_S[1] for answer in refused)
    assert refused[0].body["error"]["code"] == "rate_limit_exceeded"
    assert refused[-1].body["error"]["type"] == "rate_limit_error"


async def test_tokens_a_minute_are_never_more_than_the_limit_however_many_ask_at_once(
    start: Start, store_url: str
) -> None:
    """What is reserved for requests in flight counts in full; what was not used is there for others."""
    anna = Account("anna", hold_s=0.02)
    limit, output = 4000, 50
    tactic = {"type": "round_robin", "params": {"request_threshold": 1, "reserve": "full"}}
    async with running(anna):
        document = {
            "providers": [provider(anna, limits={"tpm": limit})],
            "rules": [rule("chat", service(anna), lb_tactic=tactic), rule("later", service(anna), lb_tactic=tactic)],
        }
        document["rules"][1]["queue_timeout_ms"] = 5000
        async with pair_of(start, store_url, document) as pair:
            first = await pair.several(160, lambda n: pair.chat("chat", n, output))
            used_first = sum(map(tokens, anna.lines))
            while (more := await pair.chat("chat", 0, output)).status == 200:
                pass
            began = time.monotonic()
            huge = await pair.chat("later", 1, limit)
            took_s = time.monotonic() - began
            await pair.books_are_those_of([anna])

    assert set(statuses(first)) == {200, LIMITED}
    assert used_first >= 0.5 * limit
    # Together with what one request reserves, there is no room left.
    assert limit - 2 * (output + INPUT) - 100 <= most_a_minute(anna.lines, tokens) <= limit
    assert (more.error, huge.error) == ("openai.RateLimitError", "openai.RateLimitError")
    assert WHOLE_MINUTE_S[0] <= int(more.retry_after) <= WHOLE_MINUTE_S[1]
    # No waiting helps a request that is larger than the limit: it is not kept in the queue, and told no time.
    assert (huge.retry_after, took_s < 4) == ("", True)


async def test_requests_in_flight_are_those_of_all_workers_and_a_queue_serves_everyone(
    start: Start, store_url: str
) -> None:
    """One provider behind a rule that refuses, one behind a rule that waits, and a service's own limit."""
    anna, boris, carla = (Account(name, hold_s=0.03) for name in ("anna", "boris", "carla"))
    claude = Account("claude", hold_s=0.03)
    async with running(anna, boris, carla, claude):
        document = {
            "providers": [
                provider(anna, limits={"in_flight": 5}),
                provider(boris, limits={"in_flight": 6}),
                provider(claude, limits={"in_flight": 3}, api_style="anthropic"),
                provider(carla),
            ],
            "rules": [
                rule("refuses", service(anna)),
                rule("waits", service(boris), queue_timeout_ms=20_000),
                rule("claude", service(claude), scenario="anthropic", queue_timeout_ms=20_000),
                rule("service", service(carla, limits={"in_flight": 4}), queue_timeout_ms=20_000),
            ],
        }
        async with pair_of(start, store_url, document) as pair:
            refuses, waits, messages, by_service = await asyncio.gather(
                pair.several(40, lambda n: pair.chat("refuses", n)),
                pair.asks("waits", 150),
                pair.several(40, lambda n: pair.message("claude", n)),
                pair.asks("service", 60),
            )
            await pair.books_are_those_of([anna, boris, carla, claude])

    assert [most_at_once(account.lines) for account in (anna, boris, claude, carla)] == [5, 6, 3, 4]
    assert (statuses(waits), statuses(messages), statuses(by_service)) == ({200: 150}, {200: 40}, {200: 60})
    assert set(statuses(refuses)) == {200, LIMITED}
    refused = [answer for answer in refuses if answer.status == LIMITED]
    assert {(answer.error, answer.retry_after) for answer in refused} == {("openai.RateLimitError", "1")}


async def test_who_waits_in_vain_is_told_so_when_its_time_is_over(start: Start, store_url: str) -> None:
    anna = Account("anna")
    anna.gate = asyncio.Event()
    async with running(anna):
        document = {
            "providers": [provider(anna, limits={"in_flight": 2})],
            "rules": [rule("waits", service(anna), queue_timeout_ms=700)],
        }
        async with pair_of(start, store_url, document) as pair:
            held = [asyncio.create_task(pair.ask("waits", n)) for n in range(2)]
            await eventually(lambda: _has(anna, 2))
            began = time.monotonic()
            waits = await pair.several(20, lambda n: pair.chat("waits", n))
            took_s = time.monotonic() - began
            anna.gate.set()
            served = await asyncio.gather(*held, pair.ask("waits"))
            await pair.books_are_those_of([anna])

    assert statuses(waits) == {LIMITED: 20}
    assert {(answer.error, answer.retry_after) for answer in waits} == {("openai.RateLimitError", "1")}
    assert 0.7 <= took_s < 5
    assert statuses(served) == {200: 3}
    assert len(anna.lines) == 3


async def test_retries_count_against_limits_like_all_attempts(start: Start, store_url: str) -> None:
    anna, boris = Account("anna", hold_s=0.01), Account("boris", hold_s=0.01)
    async with running(anna, boris):
        document = {
            "providers": [
                provider(anna, limits={"rpm": 10}, breaker={"failures": 0, "ratio": 0}),
                provider(boris, limits={"rpm": 25}),
            ],
            "rules": [rule("chat", service(anna), service(boris), retry={"backoff_ms": 1})],
        }
        async with pair_of(start, store_url, document) as pair:
            anna.fails(500)
            answers = await pair.asks("chat", 80)
            await pair.books_are_those_of([anna, boris])

    assert (most_a_minute(anna.lines), most_a_minute(boris.lines)) == (10, 25)
    assert statuses(answers)[200] == 25
    # A request whose retry finds no room gets the failure that it had.
    assert set(statuses(answers)) <= {200, LIMITED, 500}
    assert all(answer.retry_after for answer in answers if answer.status == LIMITED)


async def test_clients_that_leave_hold_no_place_neither_in_the_queue_nor_at_the_account(
    start: Start, store_url: str
) -> None:
    anna = Account("anna")
    anna.gate = asyncio.Event()
    async with running(anna):
        document = {
            "providers": [provider(anna, limits={"in_flight": 2})],
            "rules": [rule("waits", service(anna), queue_timeout_ms=20_000)],
        }
        async with pair_of(start, store_url, document, {"BALANCER_LEASE_S": "30"}) as pair:
            held = [asyncio.create_task(pair.ask("waits", n)) for n in range(2)]
            await eventually(lambda: _has(anna, 2))
            waiting = [asyncio.create_task(pair.ask("waits", n)) for n in range(20)]
            await asyncio.sleep(0.5)  # Who has not arrived by then cannot be seen to leave.
            for task in waiting[:16]:
                task.cancel()
            await eventually(lambda: _have_left(pair, 16))
            for task in held:
                task.cancel()
            anna.gate = None
            stayed = await asyncio.gather(*waiting[16:])
            more = await pair.asks("waits", 2)
            await asyncio.gather(*held, *waiting[:16], return_exceptions=True)
            await pair.books_are_those_of([anna])

    assert (statuses(stayed), statuses(more)) == ({200: 4}, {200: 2})
    assert [line.status for line in anna.lines] == [0, 0] + [200] * 6


async def test_two_pools_share_a_provider_s_limits_as_the_split_says(start: Start, store_url: str) -> None:
    anna, boris = Account("anna"), Account("boris", hold_s=0.03)
    split = {"one": 0.75, "two": 0.25}
    async with running(anna, boris):
        document = {
            "providers": [
                provider(anna, limits={"rpm": 40, "split": split}),
                provider(boris, limits={"in_flight": 8, "split": split}),
            ],
            "rules": [
                rule(f"{what}-{pool}", service(account, f"m-{pool}"), pool=pool, queue_timeout_ms=wait_ms)
                for what, account, wait_ms in (("rpm", anna, 0), ("at-once", boris, 20_000))
                for pool in split
            ],
        }
        async with pair_of(start, store_url, document) as pair:
            one, two, many, few = await asyncio.gather(
                *(pair.asks(model, 50) for model in ("rpm-one", "rpm-two")),
                *(pair.asks(model, 60) for model in ("at-once-one", "at-once-two")),
            )
            await pair.books_are_those_of([anna, boris])

    assert (statuses(one), statuses(two)) == ({200: 30, LIMITED: 20}, {200: 10, LIMITED: 40})
    assert (statuses(many), statuses(few)) == ({200: 60}, {200: 60})
    assert most_a_minute(anna.lines) == 40
    assert [most_at_once(boris.of(f"m-{pool}")) for pool in split] == [6, 2]
    assert most_at_once(boris.lines) <= 8


async def test_a_gateway_that_starts_later_knows_what_the_minute_has_seen(start: Start, store_url: str) -> None:
    anna = Account("anna")
    async with running(anna):
        document = {
            "providers": [provider(anna, limits={"rpm": 10})],
            "rules": [rule("chat", service(anna))],
        }
        async with pair_of(start, store_url, document) as pair:
            first = await pair.asks("chat", 6)
            for fleet in pair.fleets:
                await fleet.stopped()
        async with pair_of(start, store_url, document) as pair:
            second = await pair.asks("chat", 40)
            await pair.books_are_those_of([anna])

    assert (statuses(first), statuses(second)) == ({200: 6}, {200: 4, LIMITED: 36})


async def test_an_edited_limit_holds_for_all_workers_at_once(
    start: Start, store_url: str, environment: dict[str, str], tmp_path: Path
) -> None:
    anna = Account("anna")
    file = tmp_path / "edited.yaml"
    async with running(anna):
        document = {
            "providers": [provider(anna, limits={"rpm": 10})],
            "rules": [rule("chat", service(anna))],
        }
        async with pair_of(start, store_url, document) as pair:
            before = await pair.asks("chat", 40)
            document["providers"][0]["limits"]["rpm"] = 15
            file.write_text(yaml.safe_dump(document), encoding="utf-8")
            applied = await run_command("apply", str(file), "--redis", store_url, environment=environment)
            after = await pair.asks("chat", 40)
            await pair.books_are_those_of([anna])

    assert applied[0] == 0
    assert (statuses(before), statuses(after)) == ({200: 10, LIMITED: 30}, {200: 5, LIMITED: 35})


async def test_a_killed_worker_s_places_are_free_once_its_lease_is_over(start: Start, store_url: str) -> None:
    """Not before: nobody can know that the account does not work on them any more."""
    anna = Account("anna")
    anna.gate = asyncio.Event()
    async with running(anna):
        document = {
            "providers": [provider(anna, limits={"in_flight": 4})],
            "rules": [rule("chat", service(anna)), rule("waits", service(anna), queue_timeout_ms=20_000)],
        }
        async with pair_of(start, store_url, document, SHORT_LEASE) as pair:
            fleet, _ = pair.fleets
            async with fleet.askers(each=4) as askers:
                victim, other = askers
                lost = [asyncio.create_task(asker.is_whole("chat")) for asker in askers[victim][:3]]
                kept = asyncio.create_task(askers[other][0].is_whole("chat"))
                await eventually(lambda: _has(anna, 4))
                assert statuses(await pair.asks("chat", 8)) == {LIMITED: 8}

                os.kill(victim, signal.SIGKILL)

                killed = time.monotonic()
                broken = await asyncio.gather(*lost, return_exceptions=True)
                assert not any(end is True for end in broken)
                waits = [asyncio.create_task(pair.ask("waits", 1)) for _ in range(8)]
                await eventually(lambda: _has(anna, 7), LEASE_S + 5)
                free_s = anna.lines[4].began - killed
                assert len([line for line in anna.lines if math.isinf(line.ended)]) == 4
                anna.hold_s = 0.03
                anna.gate.set()
                assert statuses(await asyncio.gather(*waits)) == {200: 8}
                assert await kept
            anna.gate = None
            await fleet.workers()
            many = await pair.asks("waits", 80)
            await pair.books_are_those_of([anna], lost=3)

    assert 0 < free_s < LEASE_S + 3
    assert statuses(many) == {200: 80}
    # The account has noticed that its callers were gone, long before.
    assert most_at_once(anna.lines) == 4


async def _has(account: Account, count: int) -> bool:
    return len(account.lines) >= count


async def _have_left(pair: Pair, count: int) -> bool:
    return await pair.cancelled() >= count
