"""Every path of the data plane, in both dialects and all scenarios, and every way to reach a provider."""

from __future__ import annotations

import asyncio
import json
from typing import Any
from urllib.parse import parse_qsl

import aiohttp
import msgspec
import pytest

from tests.actors import OPENAI_JSON, Proxy, Upstream, anthropic_events, openai_events
from tests.gateway.conftest import KEY, Serve, Served, a_document, decoded

CHAT, MESSAGES, COUNT = "/v1/chat/completions", "/v1/messages", "/v1/messages/count_tokens"
OPENAI_PATHS = [
    CHAT,
    "/v1/completions",
    "/v1/responses",
    "/v1/embeddings",
    "/v1/moderations",
    "/v1/images/generations",
    "/v1/audio/speech",
]
SCENARIOS = ["openai", "anthropic", "claude_code", "opencode"]


@pytest.fixture
def serve(serve: Serve) -> Serve:
    """Starts gateways that do not take a busy machine for a lost store."""

    async def start(raw: dict[str, Any], **flags: Any) -> Served:
        return await serve(raw, **{"redis_deadline_ms": 5000} | flags)

    return start


def everywhere(url: str, **provider: Any) -> dict[str, Any]:
    """A rule `gpt` over the openai-style provider and a rule `claude` over the other one, in every scenario."""
    raw = a_document(url, **provider)
    raw["rules"] = [
        {
            "uuid": f"{scenario}-{model}",
            "scenario": scenario,
            "request_model": model,
            "services": [{"provider": name, "model": "up-model"}],
        }
        for scenario in SCENARIOS
        for model, name in (("gpt", "up"), ("claude", "ant"))
    ]
    return raw


def model_of(path: str) -> str:
    """The rule that speaks the path's dialect."""
    return "claude" if "/messages" in path else "gpt"


async def post(gateway: Served, path: str, headers: dict[str, str] | None = None, **more: Any) -> tuple[int, bytes]:
    """Status and body of a JSON request to the rule of the path's dialect."""
    body = {"model": model_of(path), "messages": []} | more
    async with gateway.session.post(gateway.url + path, json=body, headers=headers) as response:
        return response.status, await response.read()


async def picks(gateway: Served) -> dict[str, int]:
    """How often each rule has picked."""
    return {uuid: rule.seq for uuid, rule in (await gateway.view()).rules.items() if rule.seq}


# -- which paths there are ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [*OPENAI_PATHS, MESSAGES])
@pytest.mark.parametrize("scenario", [None, *SCENARIOS])
async def test_a_path_is_served_in_every_scenario_and_under_both_prefixes(
    serve: Serve, upstream: Upstream, path: str, scenario: str | None
) -> None:
    gateway = await serve(everywhere(upstream.url))
    prefixes = [f"/{scenario}", f"/tingly/{scenario}"] if scenario else [""]
    for prefix in prefixes:
        assert await post(gateway, prefix + path) == (200, OPENAI_JSON)
        assert upstream.last.target == path
        assert json.loads(upstream.last.body)["model"] == "up-model"
    own = "anthropic" if path == MESSAGES else "openai"
    assert await picks(gateway) == {f"{scenario or own}-{model_of(path)}": len(prefixes)}


@pytest.mark.parametrize("scenario", [None, *SCENARIOS])
async def test_tokens_are_counted_in_every_scenario_and_nothing_is_picked(
    serve: Serve, upstream: Upstream, scenario: str | None
) -> None:
    gateway = await serve(everywhere(upstream.url))
    upstream.answers(body=b'{"input_tokens":5}')
    for prefix in [f"/{scenario}", f"/tingly/{scenario}"] if scenario else [""]:
        assert await post(gateway, prefix + COUNT) == (200, b'{"input_tokens":5}')
        assert upstream.last.target == COUNT
        assert upstream.last.header("x-api-key") == KEY
    assert await picks(gateway) == {}


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/responses", MESSAGES])
async def test_every_generating_path_streams(serve: Serve, upstream: Upstream, path: str) -> None:
    gateway = await serve(everywhere(upstream.url))
    events = anthropic_events() if path == MESSAGES else openai_events()
    upstream.streams(events)
    status, body = await post(gateway, path, stream=True, stream_options={"include_usage": True})
    assert (status, body) == (200, b"".join(events))
    state = await gateway.service("ant:up-model" if path == MESSAGES else "up:up-model")
    assert (state.requests, state.input, state.output) == (1, 11, 7)


STYLES: dict[tuple[str | None, bool], tuple[str, str]] = {
    (None, False): ("openai", "openai"),
    (None, True): ("anthropic", "anthropic"),
    ("openai", False): ("openai", "openai"),
    ("openai", True): ("openai", "openai"),
    ("anthropic", False): ("anthropic", "anthropic"),
    ("claude_code", False): ("claude_code", "anthropic"),
    ("opencode", False): ("opencode", "openai"),
    ("opencode", True): ("opencode", "anthropic"),
}


@pytest.mark.parametrize(("scenario", "speaks_anthropic"), STYLES)
@pytest.mark.parametrize("door", ["/", "/tingly/"])
async def test_models_are_those_of_the_scenario_in_the_caller_s_dialect(
    serve: Serve, upstream: Upstream, scenario: str | None, speaks_anthropic: bool, door: str
) -> None:
    names, dialect = STYLES[scenario, speaks_anthropic]
    raw = everywhere(upstream.url)
    for rule in raw["rules"]:
        rule["request_model"] = f"{rule['scenario']}/{rule['request_model']}"
    gateway = await serve(raw)
    url = f"{gateway.url}{f'{door}{scenario}' if scenario else ''}/v1/models"
    headers = {"anthropic-version": "2023-06-01"} if speaks_anthropic else {}
    async with gateway.session.get(url, headers=headers) as response:
        page = decoded(await response.read())
    assert [model["id"] for model in page["data"]] == [f"{names}/gpt", f"{names}/claude"]
    assert ("has_more" in page) == (dialect == "anthropic")
    async with gateway.session.get(f"{url}/{names}%2Fgpt", headers=headers) as response:
        model = decoded(await response.read())
    assert (response.status, model["id"]) == (200, f"{names}/gpt")
    assert ("display_name" in model) == (dialect == "anthropic")
    async with gateway.session.get(f"{url}/nothing", headers=headers) as response:
        error = decoded(await response.read())
    assert response.status == 404
    assert ("request_id" in error) == (dialect == "anthropic")
    assert upstream.received == []


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/responses/r1"),
        ("GET", "/v1/responses/r1/input_items"),
        ("DELETE", "/v1/responses/r1"),
        ("POST", "/v1/responses/r1/cancel"),
        ("GET", "/tingly/openai/v1/responses/r1"),
    ],
)
async def test_a_response_that_nobody_keeps_is_not_found(
    gateway: Served, upstream: Upstream, method: str, path: str
) -> None:
    async with gateway.session.request(method, gateway.url + path) as response:
        assert (response.status, decoded(await response.read())["error"]["code"]) == (404, "not_found")
    assert upstream.received == []


@pytest.mark.parametrize("path", [MESSAGES, CHAT])
async def test_what_a_service_of_the_other_style_cannot_be_asked_is_refused_in_the_client_s_dialect(
    serve: Serve, upstream: Upstream, path: str
) -> None:
    gateway = await serve(everywhere(upstream.url))
    status, body = await post(gateway, path, model="gpt" if "messages" in path else "claude", unheard_of=1)
    assert status == 400
    assert ("request_id" in decoded(body)) == ("messages" in path)
    assert upstream.received == []


# -- forms -------------------------------------------------------------------------------------------------------------

SOUND = b"RIFF\r\n--not-the-boundary\r\n" + bytes(range(256))
FORMS = ["/v1/audio/transcriptions", "/v1/audio/translations", "/v1/images/edits", "/v1/images/variations"]


@pytest.mark.parametrize("path", FORMS)
@pytest.mark.parametrize("prefix", ["", "/openai", "/tingly/opencode"])
async def test_a_form_passes_with_nothing_but_its_model_changed(
    serve: Serve, upstream: Upstream, path: str, prefix: str
) -> None:
    gateway = await serve(everywhere(upstream.url))
    form = aiohttp.MultipartWriter("form-data", boundary="b0undary")
    for name, value in (("prompt", "größe, model=gpt"), ("model", "gpt"), ("n", "1")):
        form.append(value).set_content_disposition("form-data", name=name)
    for file in ("a; name=model", "b"):
        form.append(SOUND).set_content_disposition("form-data", name="image[]", filename=f"{file}.bin")
    upstream.answers(body=b'{"text":"hello","usage":{"input_tokens":11,"output_tokens":7}}')
    async with gateway.session.post(gateway.url + prefix + path, data=form) as response:
        assert (response.status, await response.read()) == (
            200,
            b'{"text":"hello","usage":{"input_tokens":11,"output_tokens":7}}',
        )
    assert upstream.last.target == path
    assert upstream.last.header("content-type") == "multipart/form-data; boundary=b0undary"
    body = upstream.last.body
    assert body.count(b"\r\n\r\nup-model\r\n--b0undary\r\n") == 1
    assert body.count(b"\r\n\r\ngpt\r\n") == 0
    assert body.count(SOUND + b"\r\n--b0undary") == 2
    assert "größe, model=gpt".encode() in body
    state = await gateway.service("up:up-model")
    assert (state.requests, state.input, state.output) == (1, 11, 7)


FAULTY_FORMS = {
    "no model": b'--b\r\nContent-Disposition: form-data; name="file"\r\n\r\ngpt\r\n--b--\r\n',
    "two models": b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\ngpt\r\n' * 2 + b"--b--\r\n",
    "an empty model": b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\n\r\n--b--\r\n',
    "no end": b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\ngpt',
    "nothing": b"",
    "a file that is named so": (
        b'--b\r\nContent-Disposition: form-data; name="file"; filename="; name=model"\r\n\r\ngpt\r\n--b--\r\n'
    ),
}


@pytest.mark.parametrize("case", FAULTY_FORMS)
async def test_a_form_without_one_model_is_refused(gateway: Served, upstream: Upstream, case: str) -> None:
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    url = f"{gateway.url}/v1/audio/transcriptions"
    async with gateway.session.post(url, data=FAULTY_FORMS[case], headers=headers) as response:
        assert response.status == 400
        assert "model" in decoded(await response.read())["error"]["message"]
    assert upstream.received == []


# -- where a provider is -----------------------------------------------------------------------------------------------

BASES = {
    "": "/v1/chat/completions",
    "/": "/v1/chat/completions",
    "/v1": "/v1/chat/completions",
    "/v1/": "/v1/chat/completions",
    "/proxy": "/proxy/v1/chat/completions",
    "/proxy/v1": "/proxy/v1/chat/completions",
    "/api/paas/v4": "/api/paas/v4/chat/completions",
    "/v1beta/openai": "/v1beta/openai/chat/completions",
    "/v1beta/openai/": "/v1beta/openai/chat/completions",
    "/serve/v10x": "/serve/v10x/chat/completions",
    "/vision": "/vision/v1/chat/completions",
    "/a%20b": "/a%20b/v1/chat/completions",
}


@pytest.mark.parametrize("base", BASES)
async def test_the_version_is_added_where_the_base_has_none(serve: Serve, upstream: Upstream, base: str) -> None:
    gateway = await serve(a_document(upstream.url + base))
    assert (await post(gateway, CHAT))[0] == 200
    assert upstream.last.target == BASES[base]
    assert (await post(gateway, COUNT))[0] == 200
    assert upstream.last.target == BASES[base].replace("/chat/completions", "/messages/count_tokens")


class Azure(msgspec.Struct, frozen=True):
    """An Azure provider's settings, and the target of a chat request to it."""

    base: str
    target: str
    query: dict[str, str] = {}
    client_query: str = ""
    model: str = "up-model"


DEPLOYMENT = "/openai/deployments/up-model/chat/completions"
AZURE: dict[str, Azure] = {
    "bare": Azure("", f"{DEPLOYMENT}?api-version=2024-10-21"),
    "with /openai": Azure("/openai/", f"{DEPLOYMENT}?api-version=2024-10-21"),
    "behind a gateway": Azure("/apim", f"/apim{DEPLOYMENT}?api-version=2024-10-21"),
    "its own version": Azure("", f"{DEPLOYMENT}?api-version=2025-01-01", {"api-version": "2025-01-01"}),
    "the client's version": Azure("", f"{DEPLOYMENT}?api-version=2023-05-15", {}, "?api-version=2023-05-15"),
    "its own wins": Azure("", f"{DEPLOYMENT}?api-version=2025-01-01", {"api-version": "2025-01-01"}, "?api-version=x"),
    "the new API": Azure("/openai/v1", "/openai/v1/chat/completions"),
    "a model to be quoted": Azure(
        "", "/openai/deployments/a%2Fb%20c%3F/chat/completions?api-version=2024-10-21", model="a/b c?"
    ),
}


@pytest.mark.parametrize("case", AZURE)
async def test_azure_has_its_own_paths_versions_and_key_header(serve: Serve, upstream: Upstream, case: str) -> None:
    azure = AZURE[case]
    raw = a_document(upstream.url + azure.base, provider_type="azure", query=azure.query)
    raw["rules"][0]["services"][0]["model"] = azure.model
    gateway = await serve(raw)
    assert (await post(gateway, CHAT + azure.client_query))[0] == 200
    assert upstream.last.target == azure.target
    assert (upstream.last.header("api-key"), upstream.last.header("authorization")) == (KEY, None)


async def test_azure_with_oauth_gets_a_bearer_token(serve: Serve, upstream: Upstream) -> None:
    oauth: dict[str, Any] = {"auth_type": "oauth", "oauth_detail": {"access_token": "entra-0123456789"}}
    gateway = await serve(a_document(upstream.url, provider_type="azure", **oauth))
    assert (await post(gateway, CHAT))[0] == 200
    assert (upstream.last.header("api-key"), upstream.last.header("authorization")) == (None, "Bearer entra-0123456789")


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/images/generations", "/v1/completions"])
async def test_azure_s_other_paths_lie_in_the_deployment_too(serve: Serve, upstream: Upstream, path: str) -> None:
    gateway = await serve(a_document(upstream.url, provider_type="azure"))
    assert (await post(gateway, path))[0] == 200
    assert upstream.last.target == f"/openai/deployments/up-model{path.removeprefix('/v1')}?api-version=2024-10-21"


# -- what goes with every request --------------------------------------------------------------------------------------

ALL = [CHAT, "/v1/responses", "/v1/embeddings", MESSAGES, COUNT]


@pytest.mark.parametrize("path", ALL)
async def test_a_provider_s_headers_and_query_go_with_every_request_and_win(
    serve: Serve, upstream: Upstream, path: str
) -> None:
    headers = {"X-Title": "ours", "authorization": "Basic b3Vycw==", "x-api-key": "ours-too"}
    gateway = await serve(a_document(upstream.url, headers=headers, query={"region": "eu", "n": "1"}))
    status, _ = await post(gateway, f"{path}?region=us&beta=true&n=2", {"x-title": "theirs", "X-Kept": "yes"})
    assert status == 200
    target, _, query = upstream.last.target.partition("?")
    assert target == path
    assert parse_qsl(query) == [("beta", "true"), ("region", "eu"), ("n", "1")]
    sent = [(name.lower(), value) for name, value in upstream.last.headers]
    for name, value in headers.items():
        assert [v for n, v in sent if n == name.lower()] == [value]
    assert ("x-kept", "yes") in sent


@pytest.mark.parametrize("path", [CHAT, COUNT])
async def test_a_provider_s_secrets_in_headers_and_query_are_resolved(
    serve: Serve, upstream: Upstream, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    """References and sealed literals alike: what an upstream gets is the value, never how it is kept."""
    monkeypatch.setenv("BALANCER_TEST_SECRET", "from-the-environment")
    secrets = {
        "x-token": "${BALANCER_TEST_SECRET}",
        "x-key": "a-literal-secret",
        "x-plain": "Bearer ${BALANCER_TEST_SECRET}",
    }
    gateway = await serve(a_document(upstream.url, headers=secrets, query=secrets))
    assert (await post(gateway, path))[0] == 200
    expected = {
        "x-token": "from-the-environment",
        "x-key": "a-literal-secret",
        "x-plain": "Bearer from-the-environment",
    }
    sent = {name.lower(): value for name, value in upstream.last.headers}
    assert {name: sent[name] for name in expected} == expected
    assert dict(parse_qsl(upstream.last.target.partition("?")[2])) == expected


async def test_a_credential_in_a_file_is_sent_without_its_line_end(
    serve: Serve, upstream: Upstream, tmp_path: Any
) -> None:
    (tmp_path / "key").write_text("sk-from-a-file\n")
    gateway = await serve(a_document(upstream.url, token=f"${{file:{tmp_path}/key}}"))
    assert (await post(gateway, CHAT))[0] == 200
    assert upstream.last.header("authorization") == "Bearer sk-from-a-file"


@pytest.mark.parametrize("path", [MESSAGES, COUNT])
@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ([], "oauth-2025-04-20"),
        (["a-1"], "a-1,oauth-2025-04-20"),
        (["a-1, b-2"], "a-1,b-2,oauth-2025-04-20"),
        (["oauth-2025-04-20,a-1"], "oauth-2025-04-20,a-1"),
        (["a-1", "b-2"], "a-1,b-2,oauth-2025-04-20"),
    ],
)
async def test_oauth_at_anthropic_is_a_bearer_token_and_one_beta_more(
    serve: Serve, upstream: Upstream, path: str, asked: list[str], expected: str
) -> None:
    """A list may come in several lines (RFC 9110 §5.3): none of them is lost."""
    oauth: dict[str, Any] = {"auth_type": "oauth", "oauth_detail": {"access_token": "oat-0123456789"}, "token": ""}
    gateway = await serve(a_document(upstream.url, **oauth))
    headers = [("anthropic-beta", value) for value in asked] + [("x-api-key", "theirs")]
    body = {"model": "claude", "messages": []}
    async with gateway.session.post(gateway.url + path, json=body, headers=headers) as response:
        assert response.status == 200
    sent = [(name.lower(), value) for name, value in upstream.last.headers]
    assert [value for name, value in sent if name == "anthropic-beta"] == [expected]
    assert dict(sent)["authorization"] == "Bearer oat-0123456789"
    assert "x-api-key" not in dict(sent)


@pytest.mark.parametrize(("given", "sent"), [(None, "2023-06-01"), ("2024-01-01", "2024-01-01")])
async def test_anthropic_s_version_is_the_client_s_or_the_known_one(
    gateway: Served, upstream: Upstream, given: str | None, sent: str
) -> None:
    assert (await post(gateway, MESSAGES, {"Anthropic-Version": given} if given else None))[0] == 200
    assert [value for name, value in upstream.last.headers if name.lower() == "anthropic-version"] == [sent]


# -- proxies -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["http", "socks5"])
@pytest.mark.parametrize("path", [CHAT, MESSAGES, COUNT, "stream", "form"])
async def test_every_kind_of_request_goes_through_the_proxy(
    serve: Serve, upstream: Upstream, kind: str, path: str
) -> None:
    async with Proxy(kind).running() as proxy:
        gateway = await serve(a_document(upstream.url, proxy_url=proxy.url))
        if path == "stream":
            upstream.streams(openai_events())
            status, body = await post(gateway, CHAT, stream=True, stream_options={"include_usage": True})
            assert (status, body) == (200, b"".join(openai_events()))
        elif path == "form":
            form = aiohttp.FormData({"model": "gpt"}, default_to_multipart=True)
            async with gateway.session.post(f"{gateway.url}/v1/audio/transcriptions", data=form) as response:
                assert response.status == 200
        else:
            assert await post(gateway, path) == (200, OPENAI_JSON)
        assert len(upstream.received) == 1
        (asked,) = proxy.asked
        assert upstream.url.removeprefix("http://") in asked


@pytest.mark.parametrize("kind", ["http", "socks5"])
async def test_a_stream_through_a_proxy_is_not_held_up(serve: Serve, upstream: Upstream, kind: str) -> None:
    gate = asyncio.Event()
    events = openai_events()
    upstream.streams(events, gates={1: gate})
    async with Proxy(kind).running() as proxy:
        gateway = await serve(a_document(upstream.url, proxy_url=proxy.url))
        async with gateway.chat(stream=True, stream_options={"include_usage": True}) as response:
            assert await response.content.readany() == events[0]
            gate.set()
            assert await response.read() == b"".join(events[1:])


@pytest.mark.parametrize("kind", ["http", "socks5"])
async def test_a_proxy_that_is_gone_is_an_upstream_that_cannot_be_reached(
    serve: Serve, upstream: Upstream, kind: str
) -> None:
    async with Proxy(kind).running() as proxy:
        url = proxy.url
    gateway = await serve(a_document(upstream.url, proxy_url=url))
    for path, code in ((CHAT, "upstream_unreachable"), (COUNT, None)):
        status, body = await post(gateway, path)
        assert status == 502
        assert code is None or decoded(body)["error"]["code"] == code
        assert url.rpartition(":")[2] not in body.decode()
    assert upstream.received == []
    assert (await gateway.service("up:up-model")).failures == 1


async def test_a_proxy_s_password_reaches_the_proxy_and_nobody_else(serve: Serve, upstream: Upstream) -> None:
    async with Proxy("http").running() as proxy:
        url = proxy.url.replace("http://", "http://me:pass-0123456789@")
        gateway = await serve(a_document(upstream.url, proxy_url=url))
        assert await post(gateway, CHAT) == (200, OPENAI_JSON)
        assert len(proxy.asked) == 1
    assert "pass-0123456789" not in str(upstream.last)
