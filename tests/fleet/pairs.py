"""Two `balancer serve` over one Redis, their clients, and whether the books are those of the accounts."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from typing import Any

import aiohttp
import anthropic
import msgspec
import openai
from prometheus_client.parser import text_string_to_metric_families

from tests.fleet.account_log import Account
from tests.fleet.conftest import Fleet, Start
from tests.store.conftest import eventually

ADMIN = {"Authorization": "Bearer admin-of-the-fleet"}
STATS = "/api/v1/load-balancer/stats"
MESSAGES: Any = [{"role": "user", "content": "what about fleets?"}]
LIMITED = 429
PATIENT = {"BALANCER_REDIS_DEADLINE_MS": "5000"}
"""On a busy machine Redis may take longer than usual: a worker that went on without it would not be exact."""

Json = dict[str, Any]


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What a client got; `error`: the SDK's exception by name, empty for none."""

    status: int
    service: str = ""
    attempts: int = 0
    retry_after: str = ""
    error: str = ""
    body: Json = {}


class Pair:
    """Two fleets of two workers each, and a client of every SDK for each."""

    def __init__(self, fleets: Sequence[Fleet], sessions: Sequence[aiohttp.ClientSession]) -> None:
        self.fleets = fleets
        self._sessions = sessions
        self._openai = [
            openai.AsyncOpenAI(base_url=f"{fleet.url}/v1", api_key="any", max_retries=0) for fleet in fleets
        ]
        self._anthropic = [anthropic.AsyncAnthropic(base_url=f.url, api_key="any", max_retries=0) for f in fleets]

    async def close(self) -> None:
        """Closes the SDKs' connections."""
        await asyncio.gather(*(client.close() for client in self._openai))
        await asyncio.gather(*(client.close() for client in self._anthropic))

    # -- asking --------------------------------------------------------------------------------------------------------

    async def chat(self, model: str, number: int = 0, max_tokens: int = 7) -> Answer:
        """Asks by the SDK of OpenAI."""
        client = self._openai[number % len(self._openai)]
        try:
            answer = await client.chat.completions.with_raw_response.create(
                model=model, messages=MESSAGES, max_tokens=max_tokens
            )
        except openai.APIStatusError as exc:
            return _refused(exc)
        return Answer(status=answer.status_code, service=answer.headers["x-balancer-service"])

    async def message(self, model: str, number: int = 0, max_tokens: int = 7) -> Answer:
        """Asks by the SDK of Anthropic."""
        client = self._anthropic[number % len(self._anthropic)]
        try:
            answer = await client.messages.with_raw_response.create(
                model=model, messages=MESSAGES, max_tokens=max_tokens
            )
        except anthropic.APIStatusError as exc:
            return _refused(exc)
        return Answer(status=answer.status_code, service=answer.headers["x-balancer-service"])

    async def ask(
        self,
        model: str,
        number: int = 0,
        *,
        path: str = "/v1/chat/completions",
        session: str = "",
        **more: object,
    ) -> Answer:
        """Asks by plain HTTP. Consecutive numbers go to different fleets."""
        headers = {"x-session": session} if session else {}
        said: Json = {"input": "hello"} if path == "/v1/responses" else {"messages": MESSAGES}
        url = self.fleets[number % len(self.fleets)].url + path
        one = self._sessions[number % len(self._sessions)]
        async with one.post(url, json={"model": model, **said, **more}, headers=headers) as response:
            return await answer_of(response)

    async def asks(self, model: str, count: int) -> list[Answer]:
        """So many at once by plain HTTP, over both fleets in turn."""
        return await self.several(count, lambda number: self.ask(model, number))

    async def several(self, count: int, ask: Callable[[int], Coroutine[Any, Any, Answer]]) -> list[Answer]:
        """So many at once, over both fleets in turn."""
        return list(await asyncio.gather(*(ask(number) for number in range(count))))

    @contextlib.asynccontextmanager
    async def under_load(self, model: str, pause_s: float = 0.02) -> AsyncIterator[list[Answer]]:
        """Clients of all workers that ask over and over while the block lasts; what they got."""
        answers: list[Answer] = []
        is_over = asyncio.Event()

        async def go_on(number: int) -> None:
            while not is_over.is_set():
                answers.append(await self.ask(model, number))
                await asyncio.sleep(pause_s)

        clients = [asyncio.create_task(go_on(number)) for number in range(8)]
        try:
            yield answers
        finally:
            is_over.set()
            await asyncio.gather(*clients)

    # -- the books -----------------------------------------------------------------------------------------------------

    async def stats(self) -> dict[str, Json]:
        """The counters of all services, by the admin API."""
        admin = self.fleets[-1].entries("serving")[0]["admin_url"]
        async with self._sessions[-1].get(admin + STATS, headers=ADMIN) as response:
            assert response.status == 200, await response.text()
            stats: dict[str, Json] = (await response.json())["stats"]
            return stats

    async def cancelled(self) -> float:
        """How many requests ended because their client had left, by the metrics of both fleets."""
        count = 0.0
        for fleet, session in zip(self.fleets, self._sessions, strict=True):
            async with session.get(f"{fleet.url}/metrics") as response:
                for family in text_string_to_metric_families(await response.text()):
                    for sample in family.samples:
                        if sample.name == "balancer_requests_total" and sample.labels["outcome"] == "cancelled":
                            count += sample.value
        return count

    async def books_are_those_of(self, accounts: Sequence[Account], lost: int = 0) -> None:
        """Fails unless every attempt in the accounts' logs is settled, and no other, with the tokens they reported."""
        theirs: dict[str, list[int]] = {}
        for account in accounts:
            for line in account.of():
                book = theirs.setdefault(f"{account.name}:{line.model}", [0, 0, 0])
                book[0] += 1
                book[1] += line.input
                book[2] += line.output

        async def is_idle() -> bool:
            return not any(s["in_flight"] or s["reserved_tokens"] for s in (await self.stats()).values())

        await eventually(is_idle, 5.0)
        stats = await self.stats()
        ours = {
            name: [s["request_count"], s["input_tokens"], s["output_tokens"]]
            for name, s in stats.items()
            if s["request_count"] or s["picks"]
        }
        assert ours == theirs
        assert sum(s["lost"] for s in stats.values()) == lost
        # A client may leave while its pick is under way: nothing is sent then.
        assert all(s["picks"] == s["request_count"] + s["abandoned"] for s in stats.values())


async def answer_of(response: aiohttp.ClientResponse) -> Answer:
    """What a response says."""
    return Answer(
        status=response.status,
        service=response.headers.get("x-balancer-service", ""),
        attempts=int(response.headers.get("x-balancer-attempts", "0")),
        retry_after=response.headers.get("Retry-After", ""),
        body=msgspec.json.decode(await response.read()),
    )


def _refused(exc: openai.APIStatusError | anthropic.APIStatusError) -> Answer:
    return Answer(
        status=exc.status_code,
        error=f"{type(exc).__module__.partition('.')[0]}.{type(exc).__name__}",
        retry_after=exc.response.headers.get("retry-after", ""),
        body=exc.response.json(),
    )


@contextlib.asynccontextmanager
async def pair_of(
    start: Start, store_url: str, document: Json, variables: dict[str, str] | None = None
) -> AsyncIterator[Pair]:
    """Two fleets that start at the same time with the same file."""
    patient = PATIENT | (variables or {})
    starting: list[Awaitable[Fleet]] = [
        start("--redis", store_url, document=document, workers=2, variables=patient) for _ in range(2)
    ]
    fleets = await asyncio.gather(*starting)
    async with contextlib.AsyncExitStack() as stack:
        connector = [aiohttp.TCPConnector(limit=0) for _ in fleets]
        sessions = [await stack.enter_async_context(aiohttp.ClientSession(connector=one)) for one in connector]
        pair = Pair(fleets, sessions)
        stack.push_async_callback(pair.close)
        yield pair


@contextlib.asynccontextmanager
async def running(*accounts: Account) -> AsyncIterator[None]:
    """Serves all accounts until the block ends."""
    async with contextlib.AsyncExitStack() as stack:
        for account in accounts:
            await stack.enter_async_context(account.running())
        yield


def provider(account: Account, **more: object) -> Json:
    """The provider that is an account, under its name."""
    return {"name": account.name, "api_base": account.url, "no_key_required": True, **more}


def rule(name: str, *services: Json, **more: object) -> Json:
    """A rule of that uuid and model, that takes turns."""
    tactic = {"type": "round_robin", "params": {"request_threshold": 1}}
    return {"uuid": name, "request_model": name, "lb_tactic": tactic, "services": list(services), **more}


def service(account: Account, model: str = "m", **more: object) -> Json:
    """A model of an account."""
    return {"provider": account.name, "model": model, **more}
