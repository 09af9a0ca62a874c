"""What an attempt tells the store, and what of it the client and the metrics hear."""

from __future__ import annotations

from typing import Any

import pytest

from balancer.domain import Outcome, Pick, Usage
from balancer.errors import BalancerError, NoServiceError, RateLimitedError, StoreUnavailableError, UnauthorizedError
from balancer.gateway.attempts import Attempt
from balancer.gateway.telling import decision_headers, retry_after
from balancer.metrics import Metrics
from tests.actors import Upstream, anthropic_events
from tests.builders import a_rule
from tests.gateway.conftest import Serve, Served
from tests.gateway.pairs import a_pair, settled


def a_pick(**more: Any) -> Pick:
    base: dict[str, Any] = {"pool": "p", "rule": "chat", "partition": "chat", "revision": 1, "number": 1}
    base |= {"service": "a:m", "reason": "streak", "seq": 1, "epoch": 1, "position": 7, "streak": 1}
    return Pick(**(base | {"is_switch": False, "reserved": 0} | more))


class Books:
    """A store that only writes down."""

    def __init__(self) -> None:
        self.entries: list[tuple[Outcome, int, int, int]] = []

    async def select(self, *_: Any, **__: Any) -> Any:
        raise AssertionError

    def settle(
        self,
        pick: Pick,
        outcome: Outcome,
        usage: Usage | None,
        *,
        cooldown_ms: int = 0,
        first_token_us: int = 0,
        stream_us: int = 0,
    ) -> None:
        self.entries.append((outcome, cooldown_ms, first_token_us, stream_us))

    async def flushed(self, pool: str) -> None: ...

    async def settled(self, pick: Pick) -> None: ...

    async def remember(self, pick: Pick, response_id: str) -> None: ...


@pytest.fixture
def books() -> Books:
    return Books()


@pytest.fixture
def attempt(books: Books) -> Attempt:
    return Attempt(books, Metrics(), a_rule(), a_pick())


def test_only_the_first_settle_counts(attempt: Attempt, books: Books) -> None:
    attempt.settle(Outcome.RATE_LIMITED, 5000)
    attempt.settle(Outcome.SUCCESS)
    assert books.entries == [(Outcome.RATE_LIMITED, 5000, 0, 0)]
    assert attempt.outcome is Outcome.RATE_LIMITED


def test_a_stream_is_timed_to_its_first_token_and_from_there(attempt: Attempt, books: Books) -> None:
    attempt.is_stream = True
    attempt.saw_token()
    attempt.settle(Outcome.SUCCESS)
    ((_, _, first_token_us, stream_us),) = books.entries
    assert first_token_us >= 1
    assert stream_us >= 1


def test_an_answer_in_one_piece_is_timed_as_a_whole(attempt: Attempt, books: Books) -> None:
    attempt.settle(Outcome.SUCCESS)
    ((_, _, first_token_us, stream_us),) = books.entries
    assert first_token_us == 0
    assert stream_us >= 1


def test_a_stream_without_a_token_and_what_failed_are_not_timed(books: Books) -> None:
    empty, failed = (Attempt(books, Metrics(), a_rule(), a_pick()) for _ in range(2))
    empty.is_stream = True
    empty.settle(Outcome.SUCCESS)
    failed.saw_token()
    failed.settle(Outcome.FAILED)
    assert books.entries == [(Outcome.SUCCESS, 0, 0, 0), (Outcome.FAILED, 0, 0, 0)]


async def test_times_reach_the_store(serve: Serve, upstream: Upstream) -> None:
    gateway = await serve(a_pair(upstream))
    upstream.answers()
    async with gateway.chat() as response:
        await response.read()
    upstream.streams(anthropic_events())
    body = {"model": "claude", "stream": True, "messages": []}
    async with gateway.session.post(f"{gateway.url}/v1/messages", json=body) as response:
        await response.read()
    await settled(gateway)
    services = (await gateway.view()).services
    whole, stream = services["o0:m"], services["a0:m"]
    assert (whole.first_token, stream.first_token > 0) == (0, True)
    assert whole.per_token > 0
    assert stream.per_token > 0


def test_a_pick_without_the_store_is_told() -> None:
    service = ("x-balancer-service", "a:m")
    assert decision_headers(a_pick(), 2) == (("x-balancer-decision", "p.1.7"), service, ("x-balancer-attempts", "2"))
    local = decision_headers(a_pick(is_local=True), 1)
    assert local[-1] == ("x-balancer-degraded", "store")


def test_picks_without_the_store_and_switches_that_a_pin_saved_are_counted() -> None:
    metrics = Metrics()
    for more in ({"is_local": True}, {"is_saved": True}, {"is_saved": True}, {}):
        metrics.picked(a_pick(**more))
    lines = metrics.exposition().decode().splitlines()
    assert 'balancer_degraded_picks_total{pool="p",rule="chat"} 1.0' in lines
    assert 'balancer_pinned_switches_saved_total{pool="p",rule="chat"} 2.0' in lines


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (NoServiceError("x", cause="broken", retry_after_s=12.1), "13"),
        (RateLimitedError("x", cause="limited", retry_after_s=0.004), "1"),
        (RateLimitedError("x", cause="limited"), None),
        (NoServiceError("x"), "1"),
        (StoreUnavailableError("x"), "1"),
        (UnauthorizedError("x"), None),
        (BalancerError("x"), None),
    ],
)
def test_when_to_ask_again_is_told_in_whole_seconds(error: BalancerError, told: str | None) -> None:
    assert dict(retry_after(error)).get("Retry-After") == told


async def test_requests_of_a_session_stay_on_one_service(serve: Serve, upstream: Upstream) -> None:
    gateway = await serve(a_pair(upstream, upstream, rule={"session_affinity": 60, "session_header": "x-session"}))

    async def service(session: str) -> str:
        headers = {"x-session": session} if session else {}
        body = {"model": "gpt", "messages": []}
        url = f"{gateway.url}/v1/chat/completions"
        async with gateway.session.post(url, json=body, headers=headers) as response:
            return str(response.headers["x-balancer-service"])

    first = [await service("one"), await service("two")]
    assert sorted(first) == ["o0:m", "o1:m"]
    assert [await service("one") for _ in range(3)] == first[:1] * 3
    assert [await service("two") for _ in range(3)] == first[1:] * 3
    assert len({await service("") for _ in range(2)}) == 2


async def test_a_session_whose_service_fails_is_served_by_the_other(serve: Serve, upstream: Upstream) -> None:
    async with Upstream().running() as other:
        raw = a_pair(upstream, other, rule={"session_affinity": 60, "retry": {"backoff_ms": 1}})
        gateway: Served = await serve(raw)
        upstream.answers(500, b"{}")
        for _ in range(2):
            async with gateway.chat(prompt_cache_key="one") as response:
                assert (response.status, response.headers["x-balancer-service"]) == (200, "o1:m")
    assert await settled(gateway) == {("o0:m", "failed"): 2, ("o1:m", "success"): 2}
