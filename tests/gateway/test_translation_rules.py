"""Which services of a rule a request may go to when they speak different APIs, and what it takes there."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from balancer.domain import Outcome, Provider
from balancer.gateway.matching import FOREIGN, MARKED, NATIVE
from balancer.translation import pairs
from balancer.translation.conversation import Conversation, Target, UntranslatableError, Written
from tests.actors import OPENAI_JSON, Upstream
from tests.gateway.conftest import KEY, Serve, decoded
from tests.gateway.pairs import counted, settled
from tests.gateway.test_translation import ask
from tests.gateway.translations import CHAT, MESSAGE, MESSAGES, RESPONSES, a_mixed_document

MIXED: dict[str, Any] = {"m": {"services": ["oai0", "ant1"]}}


@pytest.fixture
async def other(other_upstream: Upstream) -> Upstream:
    """The upstream of Anthropic's."""
    other_upstream.answers(body=MESSAGE)
    return other_upstream


# -- the choice --------------------------------------------------------------------------------------------------------


async def test_a_rule_s_services_take_turns_whatever_they_speak(
    serve: Serve, upstream: Upstream, other: Upstream
) -> None:
    gateway = await serve(a_mixed_document(upstream, other, rules=MIXED))
    served = [(await ask(gateway, CHAT, user="native"))[1]["x-balancer-service"] for _ in range(4)]
    assert served == ["oai0:up-model", "ant1:up-model"] * 2
    bodies = [decoded(request.body) for request in upstream.received]
    assert [body["user"] for body in bodies] == ["native"] * 2, "its own dialect passes as it came"
    assert [request.target for request in other.received] == [MESSAGES] * 2


async def test_a_service_that_cannot_be_asked_for_it_is_no_candidate(
    serve: Serve, upstream: Upstream, other: Upstream
) -> None:
    gateway = await serve(a_mixed_document(upstream, other, rules=MIXED))
    served = [(await ask(gateway, CHAT, n=2))[1]["x-balancer-service"] for _ in range(3)]
    assert served == ["oai0:up-model"] * 3
    (view,) = await gateway.gateway.balance.views()
    assert view.partitions["|m"].streak == 1, "each time it is the next one again"
    assert counted(gateway.gateway.metrics.picks) == {("default", "m", "oai0:up-model", "next"): 2} | {
        ("default", "m", "oai0:up-model", "streak"): 1
    }
    assert (await ask(gateway, CHAT))[1]["x-balancer-service"] == "ant1:up-model"


async def test_where_no_service_can_be_asked_the_field_is_named_and_nothing_is_picked(
    serve: Serve, upstream: Upstream
) -> None:
    gateway = await serve(a_mixed_document(upstream, rules={"m": {"services": ["ant0", "goo0"]}}))
    status, _, body = await ask(gateway, CHAT, n=2)
    error = decoded(body)["error"]
    assert (status, error["code"], error["param"], error["type"]) == (
        400,
        "unsupported_parameter",
        "n",
        "invalid_request_error",
    )
    assert not upstream.received
    assert not counted(gateway.gateway.metrics.picks)
    assert counted(gateway.gateway.metrics.refusals) == {("openai", "not_supported"): 1}


async def test_a_rule_that_cannot_be_asked_is_stood_in_for_by_one_that_can(serve: Serve, upstream: Upstream) -> None:
    rules: dict[str, Any] = {"m": {"services": ["ant0"], "fallback": ["no", "yes"]}, "no": {"services": ["ant0"]}} | {
        "yes": {"services": ["oai0"]}
    }
    gateway = await serve(a_mixed_document(upstream, rules=rules))
    status, headers, _ = await ask(gateway, CHAT, n=2)
    assert (status, headers["x-balancer-service"], headers["x-balancer-attempts"]) == (200, "oai0:up-model", "1")


async def test_a_failure_goes_on_to_a_service_of_another_api(serve: Serve, upstream: Upstream, other: Upstream) -> None:
    gateway = await serve(a_mixed_document(upstream, other, rules=MIXED))
    upstream.answers(500, b"{}")
    status, headers, body = await ask(gateway, CHAT)
    assert (status, headers["x-balancer-service"]) == (200, "ant1:up-model")
    assert decoded(body)["choices"][0]["message"]["content"] == "hi"
    assert await settled(gateway) == {
        ("oai0:up-model", Outcome.FAILED): 1,
        ("ant1:up-model", Outcome.SUCCESS): 1,
    }
    assert counted(gateway.gateway.metrics.translations) == {("default", "m", "chat", "messages"): 1}


async def test_a_prompt_that_is_too_long_goes_on_under_the_rule_for_long_ones_of_another_api(
    serve: Serve, upstream: Upstream, other: Upstream
) -> None:
    rules: dict[str, Any] = {"m": {"services": ["oai0"], "on_context_overflow": "long"}, "long": {"services": ["ant1"]}}
    gateway = await serve(a_mixed_document(upstream, other, rules=rules))
    upstream.answers(400, b'{"error":{"code":"context_length_exceeded","message":"too long"}}')
    assert (await ask(gateway, CHAT))[1]["x-balancer-service"] == "ant1:up-model"


async def test_an_answer_that_is_none_goes_on_to_the_next_service(
    serve: Serve, upstream: Upstream, other: Upstream
) -> None:
    gateway = await serve(a_mixed_document(other, upstream, rules={"m": {"services": ["ant0", "ant1"]}}))
    other.answers(body=b'{"hello":"world"}')
    upstream.answers(body=MESSAGE)
    status, headers, _ = await ask(gateway, CHAT)
    assert (status, headers["x-balancer-service"]) == (200, "ant1:up-model")
    assert (await settled(gateway))["ant0:up-model", Outcome.FAILED] == 1


async def test_what_only_one_model_cannot_be_asked_is_another_service_s_chance(
    serve: Serve, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each API is tried with one of its services: with another it may turn out that it cannot be asked."""
    side = pairs.SERVICES["messages"]

    def write(conversation: Conversation, target: Target, provider: Provider) -> Written:
        if target.model == "odd":
            raise UntranslatableError("too odd", param="messages[0]")
        return side.write_request(conversation, target, provider)

    upstream.answers(body=MESSAGE)
    odd = {"provider": "ant0", "model": "odd"}
    rules = {"m": {"services": [odd | {"model": "up-model"}, odd]}}
    gateway = await serve(a_mixed_document(upstream, rules=rules))
    monkeypatch.setitem(pairs.SERVICES, "messages", msgspec.structs.replace(side, write_request=write))
    answers = [await ask(gateway, CHAT) for _ in range(2)]
    assert [headers["x-balancer-service"] for _, headers, _ in answers] == ["ant0:up-model"] * 2
    assert await settled(gateway) == {("ant0:up-model", "success"): 2, ("ant0:odd", "cancelled"): 1}


async def test_a_session_stays_with_its_service_of_another_api(
    serve: Serve, upstream: Upstream, other: Upstream
) -> None:
    rule = MIXED["m"] | {"session_affinity": 60, "session_header": "x-session"}
    gateway = await serve(a_mixed_document(upstream, other, rules={"m": rule}))
    await ask(gateway, CHAT)
    served = [(await ask(gateway, CHAT, headers={"x-session": "s"}))[1]["x-balancer-service"] for _ in range(3)]
    assert served == ["ant1:up-model"] * 3
    assert (await ask(gateway, CHAT, headers={"x-session": "s"}, n=2))[1]["x-balancer-service"] == "oai0:up-model"
    again = await ask(gateway, CHAT, headers={"x-session": "s"})
    assert again[1]["x-balancer-service"] == "ant1:up-model", "its pin has stood"


async def test_smart_routing_may_lead_to_services_of_another_api(
    serve: Serve, upstream: Upstream, other: Upstream
) -> None:
    entry = {
        "uuid": "e",
        "ops": [{"position": "user", "operation": "contains", "value": "hello"}],
        "services": [{"provider": "ant1", "model": "up-model"}],
    }
    rule = {"services": ["oai0"], "smart_enabled": True, "smart_routing": [entry]}
    gateway = await serve(a_mixed_document(upstream, other, rules={"m": rule}))
    _, headers, _ = await ask(gateway, CHAT)
    assert (headers["x-balancer-service"], headers["x-balancer-entry"]) == ("ant1:up-model", "e")


async def test_what_goes_on_from_a_response_is_not_for_services_of_another_api(
    serve: Serve, upstream: Upstream
) -> None:
    gateway = await serve(a_mixed_document(upstream, rules={"m": {"services": ["ant0"]}}))
    status, _, body = await ask(gateway, RESPONSES, previous_response_id="resp_1")
    assert (status, decoded(body)["error"]["param"]) == (400, "previous_response_id")
    assert not upstream.received


async def test_a_provider_without_responses_is_asked_for_chat_completions(serve: Serve, upstream: Upstream) -> None:
    gateway = await serve(a_mixed_document(upstream, rules={"m": {"services": ["oai0"]}}, responses=False))
    upstream.answers(body=OPENAI_JSON)
    status, _, body = await ask(gateway, RESPONSES)
    assert (status, upstream.last.target, decoded(body)["object"]) == (200, CHAT, "response")


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/completions", "/v1/images/generations"])
async def test_what_has_no_translation_is_refused(serve: Serve, upstream: Upstream, path: str) -> None:
    gateway = await serve(a_mixed_document(upstream, rules={"m": {"services": ["ant0", "goo0"]}}))
    body = {"model": "m", "input": "x"}
    async with gateway.session.post(f"{gateway.url}{path}", json=body) as answer:
        error = decoded(await answer.read())["error"]
        assert (answer.status, error["code"]) == (400, "unsupported_parameter")
    assert path in error["message"]
    assert not upstream.received


async def test_what_has_no_translation_goes_to_the_services_that_need_none(
    serve: Serve, upstream: Upstream, other: Upstream
) -> None:
    gateway = await serve(a_mixed_document(upstream, other, rules=MIXED))
    for _ in range(3):
        async with gateway.session.post(f"{gateway.url}/v1/embeddings", json={"model": "m"}) as answer:
            assert answer.headers["x-balancer-service"] == "oai0:up-model"
    assert not other.received


# -- what is sent ------------------------------------------------------------------------------------------------------


async def test_nothing_that_is_said_in_the_client_s_api_passes_to_another(serve: Serve, upstream: Upstream) -> None:
    gateway = await serve(a_mixed_document(upstream, rules={"m": {"services": ["oai0"]}}))
    headers = {
        "anthropic-version": "2023-06-01",
        "anthropic-beta": "x",
        "x-stainless-lang": "js",
        "Accept": "application/json",
        "User-Agent": "cli/1",
        "x-api-key": "of-the-client",
    }
    async with gateway.session.post(
        f"{gateway.url}/openai{MESSAGES}?beta=true",
        json={"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "hello"}]},
        headers=headers,
    ) as answer:
        assert answer.status == 200, await answer.read()
    sent = {name.lower(): value for name, value in upstream.last.headers}
    assert upstream.last.target == CHAT
    assert not [name for name in sent if name.startswith(("anthropic-", "x-stainless-"))]
    assert (sent["authorization"], sent["accept-encoding"], sent["content-type"], sent["user-agent"]) == (
        f"Bearer {KEY}",
        "identity",
        "application/json",
        "cli/1",
    )
    assert "x-api-key" not in sent


async def test_an_account_of_anthropic_s_gets_its_version_and_key(serve: Serve, upstream: Upstream) -> None:
    upstream.answers(body=MESSAGE)
    gateway = await serve(a_mixed_document(upstream, rules={"m": {"services": ["ant0"]}}))
    await ask(gateway, CHAT, headers={"Authorization": "Bearer of-the-client", "OpenAI-Beta": "x"})
    sent = {name.lower(): value for name, value in upstream.last.headers}
    assert (sent["x-api-key"], sent["anthropic-version"]) == (KEY, "2023-06-01")
    assert not {"authorization", "openai-beta"} & set(sent)
    assert decoded(upstream.last.body)["model"] == "up-model"


@pytest.mark.parametrize(("stream_usage", "asked"), [(True, {"include_usage": True}), (False, None)])
async def test_a_stream_s_usage_is_asked_for_where_the_provider_has_it(
    serve: Serve, upstream: Upstream, stream_usage: bool, asked: Any
) -> None:
    raw = a_mixed_document(upstream, rules={"m": {"services": ["oai0"]}}, stream_usage=stream_usage)
    gateway = await serve(raw)
    await ask(gateway, MESSAGES, stream=True)
    assert decoded(upstream.last.body).get("stream_options") == asked


@pytest.mark.parametrize("is_told", [True, False])
async def test_what_is_left_out_is_told(serve: Serve, upstream: Upstream, is_told: bool) -> None:
    gateway = await serve(a_mixed_document(upstream, rules={"m": {"services": ["ant0"]}}), decision_headers=is_told)
    upstream.answers(body=MESSAGE)
    _, headers, _ = await ask(gateway, CHAT, metadata={"a": "b"}, seed=3)
    assert headers.get("x-balancer-left-out") == ("metadata,seed" if is_told else None)


async def test_the_client_sees_the_model_under_the_rule_s_other_name(serve: Serve, upstream: Upstream) -> None:
    rules: dict[str, Any] = {"m": {"services": ["ant0"], "response_model": "house"}, "n": {"services": ["ant0"]}}
    gateway = await serve(a_mixed_document(upstream, rules=rules))
    upstream.answers(body=MESSAGE)
    assert decoded((await ask(gateway, CHAT))[2])["model"] == "house"
    assert decoded((await ask(gateway, CHAT, model="n"))[2])["model"] == "claude-real"


# -- marks -------------------------------------------------------------------------------------------------------------


def a_thought(signature: str) -> list[dict[str, Any]]:
    """A conversation in which a model has thought."""
    thinking = {"type": "thinking", "thinking": "hm", "signature": signature}
    return [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": [thinking, {"type": "text", "text": "hi"}]},
        {"role": "user", "content": "and?"},
    ]


async def test_a_vendor_gets_back_no_signature_that_another_has_made(
    serve: Serve, upstream: Upstream, other: Upstream
) -> None:
    rules = {"m": {"services": ["ant1"]}, "n": {"services": ["oai0"]}}
    gateway = await serve(a_mixed_document(upstream, other, rules=rules))
    await ask(gateway, MESSAGES, messages=a_thought("balancer:openai/oai0:xyz"))
    assert b"balancer:" not in other.last.body
    await ask(gateway, MESSAGES, messages=a_thought("its-own"))
    assert b"its-own" in other.last.body


async def test_only_a_fleet_of_several_apis_looks_for_marks(serve: Serve, upstream: Upstream) -> None:
    """A search in each request takes its time."""
    rules: dict[str, Any] = {"m": {"services": ["ant0"]}, "off": {"services": ["oai0"], "active": False}}
    gateway = (await serve(a_mixed_document(upstream, rules=rules))).gateway
    plan = gateway._plans.matching("openai", "m")
    assert plan is not None
    assert (plan.apart["messages"], plan.apart["chat"]) == (NATIVE, FOREIGN)
    rules["off"]["active"] = True
    mixed = (await serve(a_mixed_document(upstream, rules=rules))).gateway
    plan = mixed._plans.matching("openai", "m")
    assert plan is not None
    assert (plan.apart["messages"], plan.apart["chat"]) == (MARKED, FOREIGN)
    assert [plan.is_apart("messages", body) for body in (b"{}", b'"balancer:x"')] == [False, True]


# -- counting ----------------------------------------------------------------------------------------------------------


async def count(gateway: Any, **more: Any) -> Any:
    """Status, headers and body of a request for the number of tokens."""
    body = {"model": "m", "messages": [{"role": "user", "content": "x" * 400}]} | more
    async with gateway.session.post(f"{gateway.url}/openai/v1/messages/count_tokens", json=body) as answer:
        return answer.status, answer.headers, decoded(await answer.read())


async def test_tokens_are_estimated_where_the_service_cannot_count_them(serve: Serve, upstream: Upstream) -> None:
    gateway = await serve(a_mixed_document(upstream, rules={"m": {"services": ["oai0"]}}))
    status, headers, told = await count(gateway)
    assert (status, told, headers["x-balancer-token-count"]) == (200, {"input_tokens": 100}, "estimated")
    assert not upstream.received


async def test_google_counts_tokens_itself(serve: Serve, upstream: Upstream) -> None:
    gateway = await serve(a_mixed_document(upstream, rules={"m": {"services": ["goo0"]}}))
    upstream.answers(body=b'{"totalTokens":77}')
    status, headers, told = await count(gateway)
    assert (status, told, headers.get("x-balancer-token-count")) == (200, {"input_tokens": 77}, None)
    assert upstream.last.target == "/v1beta/models/up-model:countTokens"
    asked = decoded(upstream.last.body)["generateContentRequest"]
    assert (asked["model"], asked["contents"][0]["parts"]) == ("models/up-model", [{"text": "x" * 400}])
    upstream.answers(500)
    _, headers, told = await count(gateway)
    assert (told, headers["x-balancer-token-count"]) == ({"input_tokens": 100}, "estimated")
