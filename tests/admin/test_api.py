"""Who may ask the admin server, and how it refuses."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from balancer.admin.app import MAX_BODY_BYTES
from balancer.admin.routing import Route, Routes
from tests.admin.conftest import LIVE, RULE, TOKEN, Admin, Start, of


async def test_health_needs_no_token_and_all_else_does(admin: Admin) -> None:
    assert (await admin.ask("GET", "/healthz", token=None))[:2] == (200, {"status": "alive"})
    for method, path in (("GET", f"{LIVE}/stats"), ("POST", "/api/v1/pick"), ("GET", "/nowhere"), ("OPTIONS", "/")):
        status, body, headers = await admin.ask(method, path, token=None)
        assert (status, headers["WWW-Authenticate"]) == (401, "Bearer")
        assert body == {"error": "no credential: send `Authorization: Bearer …` with the admin token"}


@pytest.mark.parametrize("token", [TOKEN + "x", TOKEN[:-1], "tökén", "a b"])
async def test_another_token_is_refused(admin: Admin, token: str) -> None:
    status, body, _ = await admin.ask("GET", f"{LIVE}/stats", token=None, Authorization=f"Bearer {token}")
    assert (status, body) == (401, {"error": "the credential is not the admin token"})


async def test_clients_tokens_and_other_schemes_open_nothing(start: Start) -> None:
    admin = await start({}, client_tokens="client-token")
    for headers in (
        {"Authorization": "Bearer client-token"},
        {"Authorization": f"Basic {TOKEN}"},
        {"x_api_key": TOKEN},
        {"Cookie": f"token={TOKEN}"},
    ):
        assert (await admin.ask("GET", f"{LIVE}/stats", token=None, **headers))[0] == 401


async def test_without_a_configured_token_nobody_may_ask(start: Start) -> None:
    admin = await start({}, admin_token="")
    for token in ("", "x", TOKEN):
        assert (await admin.ask("GET", f"{LIVE}/stats", token=token))[0] == 401


async def test_answers_are_json_that_nobody_keeps_and_no_page_of_others_may_read(admin: Admin) -> None:
    _, _, headers = await admin.ask("GET", f"{LIVE}/stats", Origin="https://elsewhere.invalid")
    assert headers["Content-Type"] == "application/json"
    assert headers["Cache-Control"] == "no-store"
    assert not [name for name in headers if name.lower().startswith("access-control")]


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("DELETE", f"{of(RULE)}/tactic", "PUT"),
        ("PUT", "/api/v1/pick", "POST"),
        ("POST", f"{LIVE}/stats", "GET, HEAD"),
        ("GET", f"{LIVE}/stats/clear", "POST"),
        ("OPTIONS", "/healthz", "GET, HEAD"),
    ],
)
async def test_another_method_is_told_which_are_allowed(admin: Admin, method: str, path: str, allowed: str) -> None:
    status, body, headers = await admin.ask(method, path)
    assert (status, headers["Allow"]) == (405, allowed)
    assert body == {"error": f"{method} is not allowed here: {allowed}"}


async def test_a_head_is_a_get_without_its_body(admin: Admin) -> None:
    status, body, headers = await admin.ask("HEAD", f"{LIVE}/stats")
    assert (status, body) == (200, None)
    assert int(headers["Content-Length"]) > 100


@pytest.mark.parametrize("path", ["/", "/api/v1", f"{LIVE}/stats/", f"{LIVE}/rules/a/b", "/healthz/x", "/api/v1/pick/"])
async def test_a_path_that_is_not_served_is_404(admin: Admin, path: str) -> None:
    assert (await admin.ask("GET", path))[:2] == (404, {"error": f"{path} is not served here"})


async def test_a_body_is_json_and_of_bounded_length(admin: Admin) -> None:
    for headers in ({"Content_Type": "text/plain"}, {"Content_Type": "application/x-www-form-urlencoded"}):
        status, body, _ = await admin.ask("POST", "/api/v1/pick", b'{"rule": "x"}', **headers)
        assert (status, body) == (415, {"error": "expected Content-Type: application/json"})
    status, _, _ = await admin.ask("POST", "/api/v1/pick", b"{}", Content_Encoding="gzip")
    assert status == 415
    status, body, _ = await admin.ask("POST", "/api/v1/pick", b'{"rule": ')
    assert status == 400
    assert body["error"].startswith("Input data was truncated")
    status, body, _ = await admin.ask("POST", "/api/v1/pick", b" " * (MAX_BODY_BYTES + 1))
    assert (status, body) == (413, {"error": f"the body is longer than {MAX_BODY_BYTES} bytes"})


async def test_while_redis_does_not_answer_the_state_is_503(admin: Admin, control: Any) -> None:
    await admin.pick()
    await control.client_pause(900)
    for method, path in (("GET", f"{of(RULE)}/stats"), ("GET", f"{LIVE}/stats"), ("POST", "/api/v1/pick")):
        body = {"rule": RULE} if method == "POST" else None
        status, answer, headers = await admin.ask(method, path, body)
        assert (status, headers["Retry-After"]) == (503, "1")
        assert "Redis" in answer["error"]
    assert (await admin.ask("GET", "/healthz"))[0] == 200


def test_parts_of_a_path_are_decoded_once_they_are_told_apart() -> None:
    async def handler(call: object) -> object:
        return None

    routes = Routes([Route(method="GET", path="/r/{rule}/s/{service}", handler=handler)])
    assert routes.find("/r/a%2Fb%3Ac%20d/s/%2525")["GET"][1] == {"rule": "a/b:c d", "service": "%25"}
    assert routes.find("/r/a/b/s/c") == {}


async def test_a_fault_of_ours_is_an_internal_error_without_its_details(
    admin: Admin, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(name: str) -> None:
        await asyncio.sleep(0)
        raise ZeroDivisionError("a secret")

    monkeypatch.setattr(admin.gateway.balance, "view", broken)
    assert (await admin.ask("GET", of(RULE)))[:2] == (500, {"error": "internal error"})
