"""Responses that are kept by who gave them: what goes on from one, or asks for it by its id, goes there."""

from __future__ import annotations

import asyncio
import gzip
import json
import zlib
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
import redis.asyncio

from balancer.dialects.paths import route
from balancer.gateway.masking import Mask
from balancer.gateway.messages import Take
from balancer.gateway.opening import Opening
from balancer.gateway.relay import Relay
from tests.actors import STREAM_HEAD, Upstream, chunk, responses_events
from tests.gateway.conftest import Serve, Served, decoded
from tests.gateway.pairs import a_pair, settled

LAST_CHUNK = b"0\r\n\r\n"


def an_answer(response_id: str, *, id_first: bool = True) -> bytes:
    answer: dict[str, Any] = {
        "id": response_id,
        "object": "response",
        "model": "m",
        "output": [],
        "status": "completed",
    }
    if not id_first:
        answer = dict(reversed(answer.items()))
    return json.dumps(answer | {"usage": {"input_tokens": 11, "output_tokens": 7}}).encode()


@pytest.fixture
async def other() -> AsyncIterator[Upstream]:
    """A second scripted upstream."""
    async with Upstream().running() as actor:
        yield actor


@pytest.fixture
async def gateway(serve: Serve, upstream: Upstream, other: Upstream) -> Served:
    """A gateway in front of two that have each their own response."""
    upstream.answers(body=an_answer("resp_0"))
    other.answers(body=an_answer("resp_1"))
    return await serve(a_pair(upstream, other))


async def create(gateway: Served, **more: Any) -> tuple[int, str, Any]:
    """Status, service and body."""
    body = {"model": "gpt", "input": "hi"} | more
    async with gateway.session.post(f"{gateway.url}/v1/responses", json=body) as response:
        return response.status, response.headers.get("x-balancer-service", ""), decoded(await response.read())


async def test_what_goes_on_from_a_response_goes_where_that_is_kept(
    gateway: Served, upstream: Upstream, other: Upstream
) -> None:
    assert [(await create(gateway))[1] for _ in range(2)] == ["o0:m", "o1:m"]
    for response_id, service in (("resp_1", "o1:m"), ("resp_1", "o1:m"), ("resp_0", "o0:m"), ("resp_1", "o1:m")):
        assert (await create(gateway, previous_response_id=response_id))[:2] == (200, service)
    # The rotation did not see them.
    assert [(await create(gateway))[1] for _ in range(2)] == ["o0:m", "o1:m"]
    assert await settled(gateway) == {("o0:m", "success"): 3, ("o1:m", "success"): 5}


ANSWERS: dict[str, Any] = {
    "JSON": lambda up: up.answers(body=an_answer("resp_x")),
    "JSON in chunks": lambda up: up.answers(body=an_answer("resp_x"), chunked=True),
    "JSON with its id at the end": lambda up: up.answers(body=an_answer("resp_x", id_first=False)),
    "coded JSON": lambda up: up.answers(
        body=gzip.compress(an_answer("resp_x")), headers=(("Content-Encoding", "gzip"),)
    ),
    "a stream": lambda up: up.streams(responses_events("resp_x")),
    "a stream with a comment in front": lambda up: up.streams([b": hello\n\n", *responses_events("resp_x")]),
    "a stream byte by byte": lambda up: up.sends(
        STREAM_HEAD, *(chunk(bytes([byte])) for byte in b"".join(responses_events("resp_x"))), LAST_CHUNK
    ),
    "a stream in one piece": lambda up: up.answers(
        body=b"".join(responses_events("resp_x")), content_type="text/event-stream"
    ),
    "a coded stream": lambda up: up.answers(
        body=gzip.compress(b"".join(responses_events("resp_x"))),
        content_type="text/event-stream",
        headers=(("Content-Encoding", "gzip"),),
    ),
    "a stream without its first event": lambda up: up.streams(responses_events("resp_x")[1:]),
}


@pytest.mark.parametrize("case", ANSWERS)
@pytest.mark.parametrize("response_model", ["", "house-model"])
async def test_the_id_is_kept_in_whatever_form_it_comes(
    serve: Serve, upstream: Upstream, other: Upstream, case: str, response_model: str
) -> None:
    gateway = await serve(a_pair(other, upstream, rule={"response_model": response_model}))
    await create(gateway)
    ANSWERS[case](upstream)
    body = {"model": "gpt", "input": "hi", "stream": "stream" in case}
    async with gateway.session.post(f"{gateway.url}/v1/responses", json=body) as response:
        got = await response.read()
        if response.headers.get("Content-Encoding"):
            got = gzip.decompress(got)
    assert got.count(b'"resp_x"') == (1 if "without" in case or "JSON" in case else 2)
    assert got.endswith((b"}", responses_events("resp_x")[-1]))
    upstream.answers(body=an_answer("resp_y"))
    assert (await create(gateway, previous_response_id="resp_x"))[:2] == (200, "o1:m")


class Down:
    """An upstream's answer that comes in just these parts, and the client that gets what passes."""

    status, length, is_started, is_at_end = 200, None, False, False

    def __init__(self, parts: list[bytes], kind: str, coding: str) -> None:
        self.parts = parts
        self.headers = (("Content-Type", kind), *((("Content-Encoding", coding),) if coding else ()))
        self.seen = b""

    def whole(self) -> bytes | None:
        return None

    async def read(self) -> bytes:
        return self.parts.pop(0) if self.parts else b""

    async def pump(self, take: Take) -> bytes:
        while (chunk := await self.read()) and take(chunk):
            pass
        return chunk

    async def close(self) -> None: ...

    def give_until(self, time: float) -> None: ...

    async def send(self, status: int, headers: tuple[tuple[str, str], ...], body: bytes) -> None:
        await self.start(status, headers, len(body))
        await self.write(body)
        await self.end()

    async def start(self, status: int, headers: tuple[tuple[str, str], ...], length: int | None) -> None: ...

    async def write(self, chunk: bytes) -> None:
        self.seen += chunk

    def write_now(self, chunk: bytes, framed: bytes = b"", /) -> bool:
        self.seen += chunk
        return True

    async def end(self, last: bytes = b"", /) -> None:
        self.seen += last

    def abort(self) -> None: ...


LONG_ID = "resp_" + "0123456789" * 5
LONG = b" ".join(b"%d" % number for number in range(20_000))
FORMS = {
    "a stream": ("text/event-stream", b"".join(responses_events(LONG_ID))),
    "a stream whose second event names the id": (
        "text/event-stream",
        b"event: ping\ndata: {}\n\n" + b"".join(responses_events(LONG_ID)),
    ),
    "a stream whose first event is long": (
        "text/event-stream",
        b"".join(responses_events(LONG_ID)).replace(b'"error":null', b'"error":null,"instructions":"%b"' % LONG, 1),
    ),
    "JSON": ("application/json", an_answer(LONG_ID)),
    "JSON with its id at the end": ("application/json", an_answer(LONG_ID, id_first=False)),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("step", [1, 7, 40, 100, 10_000])
@pytest.mark.parametrize("coding", ["", "gzip"])
@pytest.mark.parametrize("secret", ["", "sk-0123456789"])
async def test_no_part_of_an_id_is_sent_before_it_is_kept(form: str, step: int, coding: str, secret: str) -> None:
    kind, data = FORMS[form]
    step = max(step, len(data) // 2000)
    coder = zlib.compressobj(wbits=31)
    parts = [data[at : at + step] for at in range(0, len(data), step)]
    if coding:
        parts = [coder.compress(part) + coder.flush(zlib.Z_SYNC_FLUSH) for part in parts] + [coder.flush()]
    down = Down(parts, kind, coding)
    kept: list[str] = []

    def plain() -> bytes:
        return zlib.decompressobj(wbits=31).decompress(down.seen) if coding else down.seen

    async def remember(response_id: str) -> None:
        kept.append(response_id)
        assert LONG_ID[:8].encode() not in plain()

    answer = Opening(down)
    await answer.look("openai", 0)
    route_ = route("POST", "/v1/responses", speaks_anthropic=False)
    assert route_ is not None
    relay = Relay(request_id="r", route=route_, stream=down, extra_headers=(), mask=Mask([secret]), remember=remember)
    await relay.run(answer)
    assert (kept, plain()) == ([LONG_ID], data)


async def test_the_id_can_be_asked_for_as_soon_as_the_client_sees_it(
    serve: Serve, upstream: Upstream, other: Upstream
) -> None:
    gateway = await serve(a_pair(upstream, other))
    upstream.streams(responses_events("resp_0"), gates={1: asyncio.Event()})
    body = {"model": "gpt", "input": "hi", "stream": True}
    async with gateway.session.post(f"{gateway.url}/v1/responses", json=body) as response:
        held = b""
        while b"resp_0" not in held:
            held += await response.content.readany()
        recalled = await gateway.gateway.balance.recall("resp_0")
        assert recalled is not None
        assert (recalled.pool, recalled.rule, recalled.service) == ("default", "gpt", "o0:m")


async def test_an_answer_that_is_not_stored_is_not_kept(gateway: Served) -> None:
    assert (await create(gateway, store=False))[0] == 200
    status, _, answer = await create(gateway, previous_response_id="resp_0")
    assert (status, answer["error"]["code"]) == (400, "previous_response_not_found")


async def test_a_response_that_nobody_here_handed_out_is_refused_where_there_is_a_choice(
    gateway: Served, upstream: Upstream, other: Upstream
) -> None:
    async with openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="k", max_retries=0) as client:
        with pytest.raises(openai.BadRequestError, match="did not hand it out, or has forgotten it") as told:
            await client.responses.create(model="gpt", input="hi", previous_response_id="resp_elsewhere")
    assert (told.value.code, told.value.param) == ("previous_response_not_found", "previous_response_id")
    assert upstream.received == other.received == []


async def test_a_rule_of_one_service_sends_it_there_and_nowhere_else(serve: Serve, upstream: Upstream) -> None:
    gateway = await serve(a_pair(upstream))
    upstream.answers(500, b"{}")
    status, service, _ = await create(gateway, previous_response_id="resp_elsewhere")
    assert (status, service) == (500, "o0:m")
    assert json.loads(upstream.last.body)["previous_response_id"] == "resp_elsewhere"


async def test_a_response_of_another_rule_s_service_is_refused_with_its_name(
    serve: Serve, upstream: Upstream, other: Upstream
) -> None:
    raw = a_pair(upstream, other)
    raw["rules"].append(raw["rules"][0] | {"uuid": "mini", "request_model": "mini"})
    raw["rules"][-1]["services"] = [{"provider": "o1", "model": "m"}]
    gateway = await serve(raw)
    upstream.answers(body=an_answer("resp_0"))
    assert (await create(gateway))[1] == "o0:m"
    status, _, answer = await create(gateway, model="mini", previous_response_id="resp_0")
    assert (status, answer["error"]["code"]) == (400, "previous_response_not_found")
    assert "kept by o0:m, which is no service of rule mini" in answer["error"]["message"]


@pytest.mark.parametrize("link", [{"fallback": ["between"]}, {"on_context_overflow": "between"}])
async def test_a_response_of_a_rule_that_stands_in_is_gone_on_from_there(
    link: dict[str, object], serve: Serve, upstream: Upstream, other: Upstream
) -> None:
    """Every further turn was refused: the asked rule has no such service."""
    raw = a_pair(upstream, other)
    far = raw["rules"][0]
    far["services"] = [{"provider": "o0", "model": "m"}]
    near = far | {"services": [{"provider": "o1", "model": "m"}]}
    raw["rules"] += [
        near | {"uuid": "between", "request_model": "between", "fallback": [far["uuid"]]},
        near | {"uuid": "mini", "request_model": "mini", "response_model": "small", **link},
    ]
    gateway = await serve(raw)
    upstream.answers(body=an_answer("resp_0"))
    assert (await create(gateway))[1] == "o0:m"
    status, service, answer = await create(gateway, model="mini", previous_response_id="resp_0")
    assert (status, service, answer["model"]) == (200, "o0:m", "small")
    assert other.received == []


async def test_a_failure_of_who_keeps_the_response_is_nobody_else_s_chance(
    gateway: Served, upstream: Upstream, other: Upstream
) -> None:
    await create(gateway)
    upstream.answers(500, b'{"error":{"message":"no"}}')
    status, service, answer = await create(gateway, previous_response_id="resp_0")
    assert (status, service, answer) == (500, "o0:m", {"error": {"message": "no"}})
    assert other.received == []
    assert await settled(gateway) == {("o0:m", "success"): 1, ("o0:m", "failed"): 1}


async def test_when_who_keeps_the_response_cannot_serve_the_client_is_told_who_that_is(
    serve: Serve, upstream: Upstream, other: Upstream
) -> None:
    gateway = await serve(a_pair(upstream, other, rule={"on_exhausted": "refuse"}))
    upstream.answers(body=an_answer("resp_0"))
    upstream.then().answers(429, b"{}", retry_after="60")
    await create(gateway)
    assert (await create(gateway, previous_response_id="resp_0"))[0] == 429
    status, _, answer = await create(gateway, previous_response_id="resp_0")
    assert status == 429
    assert "kept by o0:m alone" in answer["error"]["message"]
    assert (len(upstream.received), len(other.received)) == (2, 0)


# -- by id -------------------------------------------------------------------------------------------------------------


async def test_a_response_is_asked_for_where_it_is_kept_and_not_counted(
    gateway: Served, upstream: Upstream, other: Upstream
) -> None:
    await create(gateway)
    await create(gateway)
    books = await settled(gateway)
    for method, path in (
        ("GET", "/v1/responses/resp_1?include=a&stream=false"),
        ("GET", "/openai/v1/responses/resp_1/input_items?limit=2"),
        ("POST", "/v1/responses/resp_1/cancel"),
        ("DELETE", "/tingly/openai/v1/responses/resp_1"),
    ):
        async with gateway.session.request(method, gateway.url + path) as response:
            assert (response.status, decoded(await response.read())["id"]) == (200, "resp_1")
        assert other.last.method == method
        assert other.last.target == path[path.index("/v1") :]
        assert other.last.body == b""
    assert len(upstream.received) == 1
    assert await settled(gateway) == books


async def test_a_response_may_be_asked_for_as_a_stream(gateway: Served, upstream: Upstream) -> None:
    await create(gateway)
    upstream.streams(responses_events("resp_0"))
    async with openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="k", max_retries=0) as client:
        stream = await client.responses.retrieve("resp_0", stream=True)
        assert [event.type async for event in stream][-1] == "response.completed"


async def test_a_response_shows_the_rule_s_own_name_for_the_model(serve: Serve, upstream: Upstream) -> None:
    gateway = await serve(a_pair(upstream, rule={"response_model": "house-model"}))
    upstream.answers(body=an_answer("resp_0"))
    await create(gateway)
    async with gateway.session.get(f"{gateway.url}/v1/responses/resp_0") as response:
        assert decoded(await response.read())["model"] == "house-model"


@pytest.mark.parametrize("path", ["/v1/responses/resp_9", "/opencode/v1/responses/resp_0"])
async def test_a_response_that_is_not_known_in_the_scenario_is_a_404(
    gateway: Served, upstream: Upstream, path: str
) -> None:
    await create(gateway)
    async with gateway.session.get(gateway.url + path) as response:
        assert response.status == 404
        assert "is not found in scenario" in decoded(await response.read())["error"]["message"]
    assert len(upstream.received) == 1


async def test_an_upstream_s_error_for_an_id_passes_as_it_is(gateway: Served, upstream: Upstream) -> None:
    await create(gateway)
    upstream.answers(404, b'{"error":{"message":"gone"}}')
    async with gateway.session.get(f"{gateway.url}/v1/responses/resp_0") as response:
        assert (response.status, await response.read()) == (404, b'{"error":{"message":"gone"}}')


async def test_while_redis_is_away_an_answer_passes_all_the_same_and_an_id_is_a_503(
    serve: Serve, upstream: Upstream, other: Upstream, store_url: str
) -> None:
    gateway = await serve(a_pair(upstream, other), redis_deadline_ms=100)
    gate = asyncio.Event()
    upstream.streams([b'data: {"type":"soon"}\n\n', *responses_events("resp_0")], gates={1: gate})
    body = {"model": "gpt", "input": "hi", "stream": True}
    async with (
        redis.asyncio.Redis.from_url(store_url) as control,
        gateway.session.post(f"{gateway.url}/v1/responses", json=body) as response,
    ):
        await response.content.readany()
        await control.client_pause(700)
        async with gateway.session.get(f"{gateway.url}/v1/responses/resp_0") as asked:
            assert (asked.status, decoded(await asked.read())["error"]["code"]) == (503, "store_unavailable")
        gate.set()
        assert (await response.read()).endswith(responses_events("resp_0")[-1])
