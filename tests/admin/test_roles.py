"""Who may do what: each route with each role, and the fields that an operator may change."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest

from balancer import config
from balancer.errors import ConfigurationError
from balancer.roles import ROLES, read_principals
from tests.admin.conftest import LIVE, RULE, TOKEN, Admin, Start, a_document, of
from tests.admin.test_resources import LATER, PROVIDERS, RULES, SCENARIOS, path, put, read

TOKENS = {role: f"the-token-of-a-{role}" for role in ROLES}
LIST = ",".join(f"{role}s:{role}:{token}" for role, token in TOKENS.items())

ROUTES: tuple[tuple[str, str, str, Any], ...] = (
    ("viewer", "GET", "/openapi.json", None),
    ("viewer", "GET", RULES, None),
    ("viewer", "GET", path(RULE), None),
    ("viewer", "GET", PROVIDERS, None),
    ("viewer", "GET", path("a", PROVIDERS), None),
    ("viewer", "GET", SCENARIOS, None),
    ("viewer", "GET", "/api/v1/audit", None),
    ("viewer", "GET", "/api/v1/decisions", None),
    ("viewer", "GET", f"{LIVE}/stats", None),
    ("viewer", "GET", of(RULE), None),
    ("viewer", "GET", f"{of(RULE)}/summary", None),
    ("viewer", "GET", f"{of(RULE)}/stats", None),
    ("viewer", "GET", f"{of(RULE)}/current-service", None),
    ("viewer", "GET", f"{of(RULE)}/services/a:m%3A1/stats", None),
    ("viewer", "POST", "/api/v1/explain", {"request": {"model": "llama"}}),
    ("operator", "POST", "/api/v1/pick", {"rule": RULE}),
    ("operator", "POST", f"{LIVE}/stats/clear", None),
    ("operator", "POST", f"{of(RULE)}/stats/clear", None),
    ("operator", "POST", f"{of(RULE)}/services/a:m%3A1/stats/clear", None),
    ("operator", "PUT", f"{of(RULE)}/tactic", {"tactic": "hybrid"}),
    ("admin", "PUT", path("later"), LATER),
    ("admin", "PUT", path("z", PROVIDERS), {"api_base": "https://z.invalid", "no_key_required": True}),
    ("admin", "PUT", path("openai", SCENARIOS), {"flags": {"separate": True}}),
    ("admin", "DELETE", path("side"), None),
    ("admin", "DELETE", path("z", PROVIDERS), None),
    ("admin", "DELETE", path("openai", SCENARIOS), None),
)


@pytest.fixture
async def staffed(start: Start) -> Admin:
    """A worker with a token for each role, and the owner's."""
    return await start(a_document(), admin_tokens=LIST)


async def test_each_route_is_for_its_role_and_those_above(staffed: Admin) -> None:
    for least, method, place, body in ROUTES:
        for role in ROLES:
            given: dict[str, str] = {}
            if method == "DELETE":
                given = {"If_Match": "*"}
            status, answer, _ = await staffed.ask(method, place, body, token=TOKENS[role], **given)
            if ROLES.index(role) < ROLES.index(least):
                assert (status, method, place, role) == (403, method, place, role), answer
                assert "takes the role" in answer["error"]
            else:
                assert status in (200, 201), (method, place, role, answer)


async def test_what_settles_is_the_operator_s_too(staffed: Admin) -> None:
    hold = (await staffed.pick())["hold"]
    settle = {"hold": hold, "outcome": "success"}
    assert (await staffed.ask("POST", "/api/v1/settle", settle, token=TOKENS["viewer"]))[0] == 403
    assert (await staffed.ask("POST", "/api/v1/settle", settle, token=TOKENS["operator"]))[0] == 200


async def test_every_route_is_tried(staffed: Admin) -> None:
    """A route that is added says here whose it is."""
    described = (await staffed.get("/openapi.json"))["paths"]
    count = sum(len(methods) for methods in described.values())
    untried = {"/healthz", "/api/v1/settle", "/api/v1/scenarios/{scenario} GET", "/api/v1/decisions/{decision}"}
    assert count == len(ROUTES) + len(untried)


@pytest.mark.parametrize(
    ("kind", "name", "change", "status"),
    [
        (RULES, RULE, {"active": False}, 200),
        (RULES, RULE, {"current_service_index": 1}, 200),
        (RULES, RULE, {"lb_tactic": {"type": "random"}}, 200),
        (RULES, RULE, {"services.weight": 3}, 200),
        (RULES, RULE, {"services.active": False}, 200),
        (RULES, RULE, {"services.time_window": 7}, 403),
        (RULES, RULE, {"services.model": "other"}, 403),
        (RULES, RULE, {"services.tier": 1}, 403),
        (RULES, RULE, {"services": []}, 403),
        (RULES, RULE, {"request_model": "x"}, 403),
        (RULES, RULE, {"pool": "x"}, 403),
        (RULES, RULE, {"description": "x"}, 403),
        (RULES, RULE, {"fallback": ["off"]}, 403),
        (RULES, RULE, {"active": False, "on_exhausted": "refuse"}, 403),
        (PROVIDERS, "a", {"enabled": False}, 200),
        (PROVIDERS, "a", {"api_base": "https://elsewhere.invalid"}, 403),
        (PROVIDERS, "a", {"token": "${OTHER}"}, 403),
        (PROVIDERS, "a", {"headers": {"x": "y"}}, 403),
        (PROVIDERS, "a", {"limits": {"rpm": 10, "split": {"default": 0.5, "side.1": 0.5}}}, 403),
    ],
)
async def test_an_operator_switches_and_weighs_and_an_admin_does_all(
    staffed: Admin, kind: str, name: str, change: dict[str, Any], status: int
) -> None:
    place = path(name, kind)
    body, _ = await read(staffed, place)
    for field, value in change.items():
        first, _, inner = field.partition(".")
        if inner:
            body[first][0][inner] = value
        else:
            body[field] = value
    answered, answer, _ = await staffed.ask("PUT", place, body, token=TOKENS["operator"], If_Match="*")
    assert answered == status, answer
    assert ((await staffed.get(RULES))["revision"] == 2) is (status == 200)
    assert (await staffed.ask("PUT", place, body, token=TOKENS["viewer"], If_Match="*"))[0] == 403
    assert (await staffed.ask("PUT", place, body, token=TOKENS["admin"], If_Match="*"))[0] == 200


async def test_a_dry_run_takes_the_role_of_the_write(staffed: Admin) -> None:
    place = f"{path('later')}?dry_run=true"
    assert (await staffed.ask("PUT", place, LATER, token=TOKENS["operator"]))[0] == 403
    assert (await staffed.ask("POST", f"{LIVE}/stats/clear?dry_run=true", token=TOKENS["viewer"]))[0] == 403


async def test_a_smart_entry_s_services_are_weighed_by_operators_and_its_ops_are_not(start: Start) -> None:
    raw = a_document()
    op = {"position": "token", "operation": "ge", "value": "9"}
    raw["rules"][0] |= {
        "smart_enabled": True,
        "smart_routing": [{"ops": [op], "services": [{"provider": "b", "model": "org/m 2"}]}],
    }
    admin = await start(raw, admin_tokens=LIST)
    rule, _ = await read(admin, path(RULE))
    rule["smart_routing"][0]["services"][0]["weight"] = 9
    assert (await admin.ask("PUT", path(RULE), rule, token=TOKENS["operator"], If_Match="*"))[0] == 200
    rule["smart_routing"][0]["ops"][0]["value"] = "10"
    assert (await admin.ask("PUT", path(RULE), rule, token=TOKENS["operator"], If_Match="*"))[0] == 403


async def test_the_owner_s_token_is_an_admin_s_beside_the_list_and_unknown_ones_are_nobody_s(staffed: Admin) -> None:
    assert (await put(staffed, path("side"), LATER))[0] == 200
    for token in (TOKENS["viewer"] + "x", hashlib.sha256(TOKENS["admin"].encode()).hexdigest(), "viewers", LIST):
        assert (await staffed.ask("GET", RULES, token=token))[0] == 401


async def test_a_list_is_enough_without_the_owner_s_token(start: Start) -> None:
    admin = await start({}, admin_token="", admin_tokens=LIST)
    assert (await admin.ask("GET", RULES, token=TOKENS["viewer"]))[0] == 200
    assert (await admin.ask("GET", RULES, token=TOKEN))[0] == 401
    assert (await admin.ask("GET", RULES, token=""))[0] == 401


# -- the list ----------------------------------------------------------------------------------------------------------


def test_a_list_may_be_lines_with_comments_and_digests_and_is_handed_on_without_its_tokens() -> None:
    digest = hashlib.sha256(b"the-token-of-bob").hexdigest()
    text = (
        f"# ours, and theirs\n ann:viewer:the-token:of:ann \n\nbob:operator:sha256:{digest}, eve:admin:the-token-of-eve"
    )
    found = read_principals(text)
    assert [(p.name, p.role) for p in found] == [("ann", "viewer"), ("bob", "operator"), ("eve", "admin")]
    assert found[0].digest == hashlib.sha256(b"the-token:of:ann").hexdigest()
    settings = config.load({"admin_tokens": text}, {})
    environment = settings.environment()
    assert "the-token" not in str(environment)
    assert config.load({}, environment).admin_tokens == found


@pytest.mark.parametrize(
    ("entry", "fault"),
    [
        ("secret-token-alone", "the role: expected viewer, operator, admin"),
        ("the-secret-token-of-ann:viewer", "the token: expected at least 16 characters"),
        ("viewer:the-secret-token-of-ann:ann", "the role: expected viewer, operator, admin"),
        ("ann:root:the-secret-token-of-ann", "the role: expected viewer, operator, admin"),
        ("ann:viewer:short-secret", "the token: expected at least 16 characters"),
        ("ann:viewer:", "the token: expected at least 16 characters"),
        ("ann:viewer:sha256:secret", "the token: expected 64 digits of SHA-256"),
        ("a secret:viewer:the-secret-token-of-ann", "the name"),
        ("admin:viewer:the-secret-token-of-ann", "the name 'admin' is that of BALANCER_ADMIN_TOKEN"),
        (
            "x:viewer:the-secret-token-of-ann,x:admin:the-secret-token-of-bob",
            "an entry before it has the same name",
        ),
        (
            "x:viewer:the-secret-token-of-ann,y:admin:the-secret-token-of-ann",
            "an entry before it has the same token",
        ),
    ],
)
def test_a_faulty_list_is_refused_and_shows_no_token(entry: str, fault: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        config.load({}, {"BALANCER_ADMIN_TOKENS": entry})
    assert fault in str(caught.value)
    assert "secret" not in str(caught.value)


def test_beyond_loopback_a_list_is_enough() -> None:
    with pytest.raises(ConfigurationError, match="without a token"):
        config.load({"admin_host": "0.0.0.0"}, {})
    assert config.load({"admin_host": "0.0.0.0"}, {"BALANCER_ADMIN_TOKENS": LIST}).admin_tokens


# -- hosts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:8081", 200),
        ("127.0.0.1:99", 200),
        ("127.9.9.9", 200),
        ("[::1]:8081", 200),
        ("balancer.internal:8081", 200),
        ("evil.invalid", 421),
        ("evil.invalid:8081", 421),
        ("localhost.evil.invalid", 421),
        ("127.0.0.1.evil.invalid", 421),
        ("10.0.0.1", 421),
        ("", 421),
    ],
)
async def test_on_loopback_no_other_host_s_name_is_answered_to(start: Start, host: str, status: int) -> None:
    admin = await start({}, admin_hosts="balancer.internal")
    assert (await admin.ask("GET", "/healthz", Host=host))[0] == status
    assert (await admin.ask("GET", RULES, Host=host))[0] == status


async def test_beyond_loopback_all_hosts_are_answered_to_unless_some_are_named(start: Start) -> None:
    for hosts, status in (("", 200), ("a.invalid", 421)):
        admin = await start({}, admin_host="0.0.0.0", admin_hosts=hosts)
        assert (await admin.ask("GET", "/healthz", Host="b.invalid"))[0] == status
