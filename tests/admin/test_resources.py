"""Providers, rules and scenarios over the admin API: what is written stands, and no edit is lost."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any
from urllib.parse import quote

import msgspec
import pytest

from balancer import document
from balancer.__main__ import main
from balancer.document.fields import MASK
from balancer.store import connection
from balancer.store.credentials import Sealer
from balancer.store.publishing import publish_file
from balancer.store.registry import Registry
from tests.admin.conftest import FIRST, LIVE, RULE, SECOND, Admin, Start, a_document, of

KEY = "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="
RULES, PROVIDERS, SCENARIOS = "/api/v1/rules", "/api/v1/providers", "/api/v1/scenarios"
LATER = {"request_model": "later", "services": [{"provider": "a", "model": "m:1"}]}


def path(name: str, kind: str = RULES) -> str:
    return f"{kind}/{quote(name, safe='')}"


async def read(admin: Admin, place: str) -> tuple[Any, str]:
    """A resource and its ETag."""
    status, body, headers = await admin.ask("GET", place)
    assert status == 200, body
    return body, headers["ETag"]


async def put(admin: Admin, place: str, body: Any, etag: str = "*") -> tuple[int, Any]:
    status, answer, _ = await admin.ask("PUT", place, body, If_Match=etag)
    return status, answer


# -- reading -----------------------------------------------------------------------------------------------------------


async def test_a_list_has_all_in_their_order_with_their_etags(admin: Admin) -> None:
    found = await admin.get(RULES)
    assert [rule["uuid"] for rule in found["rules"]] == [RULE, "side", "off"]
    assert {name: found[name] for name in ("total", "offset", "limit", "revision")} == {
        "total": 3,
        "offset": 0,
        "limit": 100,
        "revision": 1,
    }
    for rule in found["rules"]:
        assert await read(admin, path(rule["uuid"])) == (rule, found["etags"][rule["uuid"]])


async def test_pages_are_parts_of_the_list(admin: Admin) -> None:
    whole = (await admin.get(PROVIDERS))["providers"]
    pages = [await admin.get(f"{PROVIDERS}?limit=2&offset={offset}") for offset in (0, 2, 4)]
    assert [page["providers"] for page in pages] == [whole[:2], whole[2:], []]
    assert {page["total"] for page in pages} == {3}


@pytest.mark.parametrize("query", ["limit=0", "limit=1001", "limit=x", "offset=-1", "limit=1&limit=2", "after=a"])
async def test_a_page_out_of_range_is_refused(admin: Admin, query: str) -> None:
    assert (await admin.ask("GET", f"{RULES}?{query}"))[0] == 400


async def test_what_is_not_there_is_404(admin: Admin) -> None:
    for kind, name in ((RULES, "none"), (PROVIDERS, "none"), (SCENARIOS, "opencode")):
        assert (await admin.ask("GET", path(name, kind)))[0] == 404
        assert (await admin.ask("DELETE", path(name, kind), If_Match="*"))[0] == 404


async def test_a_reader_that_has_the_state_is_told_so(admin: Admin) -> None:
    _, etag = await read(admin, path(RULE))
    status, body, headers = await admin.ask("GET", path(RULE), If_None_Match=etag)
    assert (status, body, headers["ETag"]) == (304, None, etag)
    assert (await admin.ask("GET", path(RULE), If_None_Match='"another"'))[0] == 200


# -- writing -----------------------------------------------------------------------------------------------------------


async def test_what_is_read_and_put_back_changes_nothing(admin: Admin) -> None:
    for place in (path(RULE), path("a", PROVIDERS)):
        body, etag = await read(admin, place)
        assert await put(admin, place, body, etag) == (
            200,
            {"revision": 1, "dry_run": False, "changes": [], "warnings": []},
        )
        assert await read(admin, place) == (body, etag)


async def test_a_rule_that_is_put_serves_at_once_and_over_every_worker(admin: Admin, start: Start) -> None:
    other = await start()
    status, answer, headers = await admin.ask("PUT", path("a/new one"), LATER, If_None_Match="*")
    assert (status, answer["revision"], answer["changes"]) == (201, 2, ["+ rule a/new one"])
    assert headers["Location"] == path("a/new one")
    assert (await read(other, path("a/new one")))[1] == headers["ETag"]
    assert (await admin.pick("a/new one"))["service"] == FIRST


async def test_an_edit_keeps_the_cursor_and_tells_its_difference(admin: Admin) -> None:
    for _ in range(3):
        await admin.pick()
    rule, etag = await read(admin, path(RULE))
    rule["services"][0]["weight"] = 5
    assert (await put(admin, path(RULE), rule, etag))[1]["changes"] == [
        f"~ rule {RULE}: services[0].weight (default) -> 5"
    ]
    assert (await admin.get(of(RULE)))["rule"]["current_service_index"] == 1
    assert (await read(admin, path(RULE)))[1] != etag


async def test_a_current_service_is_set_each_time_it_is_asked_for(admin: Admin) -> None:
    rule, _ = await read(admin, path(RULE))
    for revision in (2, 3):
        assert (await put(admin, path(RULE), rule | {"current_service_index": 1}))[1]["revision"] == revision
        assert (await admin.pick())["service"] == SECOND
        # Two more end the streak of two there: the cursor has left it when it is set again.
        await admin.pick()
        assert (await admin.pick())["service"] == FIRST
    assert "current_service_index" not in (await read(admin, path(RULE)))[0]
    # An edit of something else does not set it once more.
    assert (await put(admin, path(RULE), rule | {"description": "x"}))[0] == 200
    assert (await admin.get(of(RULE)))["rule"]["current_service_index"] == 0


async def test_what_is_deleted_is_gone(admin: Admin) -> None:
    _, etag = await read(admin, path("side"))
    status, answer, _ = await admin.ask("DELETE", path("side"), If_Match=etag)
    assert (status, answer["changes"]) == (200, ["- rule side"])
    assert (await admin.ask("GET", path("side")))[0] == 404
    assert (await admin.ask("POST", "/api/v1/pick", {"rule": "side"}))[0] == 404


async def test_a_scenario_is_put_and_deleted(admin: Admin) -> None:
    place = path("openai", SCENARIOS)
    body = {"flags": {"separate": True}}
    assert (await admin.ask("PUT", place, body, If_None_Match="*"))[0] == 201
    assert (await read(admin, place))[0] == {"scenario": "openai", "flags": {"separate": True}}
    assert (await admin.ask("DELETE", place, If_Match="*"))[0] == 200
    assert (await admin.get(SCENARIOS))["scenarios"] == []


async def test_the_first_configuration_of_all_can_be_made_here(start: Start) -> None:
    admin = await start()
    assert (await admin.get(RULES))["rules"] == []
    provider = {"api_base": "https://a.invalid/v1", "no_key_required": True}
    assert (await put_new(admin, path("a", PROVIDERS), provider))[1]["revision"] == 1
    assert (await put_new(admin, path("later"), LATER))[0] == 201
    assert (await admin.pick("later"))["service"] == FIRST


async def put_new(admin: Admin, place: str, body: Any) -> tuple[int, Any]:
    status, answer, _ = await admin.ask("PUT", place, body, If_None_Match="*")
    return status, answer


async def test_an_emptied_registry_is_not_begun_anew_by_an_edit(admin: Admin, control: Any) -> None:
    """One rule would have stood for the whole configuration that the workers still serve."""
    await control.flushall()
    status, answer, _ = await admin.ask("PUT", path("later"), LATER, If_None_Match="*")
    assert (status, answer["error"]) == (
        503,
        "the registry is empty, and had a configuration: `balancer apply FILE` first",
    )


# -- races -------------------------------------------------------------------------------------------------------------


async def test_of_two_that_edit_the_same_state_one_stands_and_the_other_is_told(admin: Admin, start: Start) -> None:
    other = await start()
    for round_ in range(5):
        rule, etag = await read(admin, path(RULE))
        edits = [rule | {"description": f"{who} {round_}"} for who in ("ann", "bob")]
        answers = await asyncio.gather(put(admin, path(RULE), edits[0], etag), put(other, path(RULE), edits[1], etag))
        assert sorted(status for status, _ in answers) == [200, 412]
        won = next(edit for (status, _), edit in zip(answers, edits, strict=True) if status == 200)
        assert (await read(other, path(RULE)))[0] == won
        assert (await admin.get(RULES))["revision"] == 2 + round_


async def test_of_two_that_make_the_same_rule_one_does(admin: Admin, start: Start) -> None:
    other = await start()
    answers = await asyncio.gather(put_new(admin, path("later"), LATER), put_new(other, path("later"), LATER))
    assert sorted(status for status, _ in answers) == [201, 412]


async def test_no_edit_is_lost_of_many_that_read_again_when_they_are_told(admin: Admin, start: Start) -> None:
    workers = [admin, await start()]

    async def add_weight(worker: Admin) -> None:
        for _ in range(5):
            while True:
                rule, etag = await read(worker, path(RULE))
                rule["services"][0]["weight"] = rule["services"][0].get("weight", 1) + 1
                status, answer = await put(worker, path(RULE), rule, etag)
                assert status in (200, 412), answer
                if status == 200:
                    break

    await asyncio.gather(*(add_weight(worker) for worker in workers * 2))
    assert (await read(admin, path(RULE)))[0]["services"][0]["weight"] == 1 + 5 * 4


async def test_edits_of_different_resources_do_not_hinder_each_other(admin: Admin, start: Start) -> None:
    workers = [admin, await start()]
    made = [put_new(workers[i % 2], path(f"r{i}"), LATER | {"request_model": f"r{i}"}) for i in range(8)]
    assert [status for status, _ in await asyncio.gather(*made)] == [201] * 8
    assert (await admin.get(RULES))["total"] == 11


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 428),
        ({"If_None_Match": '"x"'}, 428),
        ({"If_None_Match": "*"}, 412),
        ({"If_Match": '"x"'}, 412),
        ({"If_Match": "W/*"}, 412),
        ({"If_Match": '"x", *'}, 200),
        ({"If_Match": "*"}, 200),
    ],
)
async def test_a_write_says_which_state_it_means(admin: Admin, headers: dict[str, str], status: int) -> None:
    rule, etag = await read(admin, path(RULE))
    edited = rule | {"description": "x"}
    assert (await admin.ask("PUT", path(RULE), edited, **headers))[0] == status
    assert ((await read(admin, path(RULE)))[1] != etag) is (status == 200)
    if status != 200:
        assert (await admin.ask("DELETE", path("side"), **headers))[0] == (status if headers else 428)


async def test_a_weak_etag_and_one_of_what_is_not_there_match_nothing(admin: Admin) -> None:
    rule, etag = await read(admin, path(RULE))
    assert (await put(admin, path(RULE), rule, f"W/{etag}"))[0] == 412
    assert (await put(admin, path("later"), LATER, "*"))[0] == 412
    assert (await put(admin, path("later"), LATER, etag))[0] == 412


async def test_the_tactic_s_route_minds_an_etag_where_one_is_given(admin: Admin) -> None:
    _, etag = await read(admin, path(RULE))
    assert (await put(admin, f"{of(RULE)}/tactic", {"tactic": "random"}, '"old"'))[0] == 412
    assert (await put(admin, f"{of(RULE)}/tactic", {"tactic": "random"}, etag))[0] == 200


# -- faults ------------------------------------------------------------------------------------------------------------


async def test_every_fault_is_told_with_its_path(admin: Admin) -> None:
    rule, _ = await read(admin, path(RULE))
    rule["services"][1]["weight"] = -1
    rule |= {"nonsense": 1, "pool": "a b", "retry": {"attempts": 99}}
    status, answer = await put(admin, path(RULE), rule)
    assert status == 400
    assert [fault["path"] for fault in answer["faults"]] == [
        "services[1].weight",
        "retry.attempts",
        "nonsense",
        "pool",
    ]
    assert "must not be negative" in answer["faults"][0]["message"]
    assert (await admin.get(RULES))["revision"] == 1


async def test_what_others_need_is_not_deleted(admin: Admin) -> None:
    status, answer, _ = await admin.ask("DELETE", path("b", PROVIDERS), If_Match="*")
    assert (status, answer["faults"]) == (
        400,
        [{"path": f"rules[{RULE}].services[1].provider", "message": "there is no provider 'b'"}],
    )


async def test_an_old_fault_elsewhere_hinders_no_edit(start: Start, store_url: str) -> None:
    """A lenient reading lets in what the strict door would refuse today."""
    admin = await start(a_document())
    raw = a_document()
    raw["rules"][1]["services"].append({"provider": "gone", "model": "m"})
    client = connection.client(store_url)
    await publish_file(Registry(client), document.read(raw, door="lenient").configuration, None)
    await client.aclose()
    assert (await put_new(admin, path("later"), LATER))[0] == 201
    side, etag = await read(admin, path("side"))
    status, answer = await put(admin, path("side"), side, etag)
    assert (status, answer["faults"][0]["path"]) == (400, "services[1].provider")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b'"x"',
        b"{",
        b'{"request_model": "x", "request_model": "y"}',
        b'{"description": "\\ud800"}',
        b'{"session_affinity": NaN}',
        b'{"smart_routing": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"uuid": "another"}',
        b'{"uuid": 7}',
        b'{"request_model": ["x"]}',
        b"\xff\xfe",
    ],
)
async def test_a_body_that_is_no_rule_is_refused(admin: Admin, body: bytes) -> None:
    status, answer, _ = await admin.ask("PUT", path("later"), body, If_None_Match="*")
    assert status == 400, answer


async def test_a_name_that_is_no_text_is_refused(admin: Admin) -> None:
    for place in (f"{RULES}/%FF", f"{RULES}/\udcff", "/\udcff", f"{RULES}/%00", f"{RULES}/a%0Ab", f"{RULES}/"):
        status, answer, _ = await admin.ask("PUT", place, LATER, If_None_Match="*")
        assert status in (201, 400, 404), answer


# -- dry runs ----------------------------------------------------------------------------------------------------------


async def test_a_dry_run_tells_what_would_change_and_changes_nothing(admin: Admin, control: Any) -> None:
    await admin.pick()
    rule, _ = await read(admin, path(RULE))
    before = await everything(control)
    writes: tuple[tuple[str, str, Any, list[str]], ...] = (
        ("PUT", path("later"), LATER, ["+ rule later"]),
        ("PUT", path(RULE), rule | {"description": "x"}, [f'~ rule {RULE}: description (default) -> "x"']),
        ("DELETE", path("side"), None, ["- rule side"]),
        (
            "PUT",
            f"{of(RULE)}/tactic",
            {"tactic": "random"},
            [
                f"~ rule {RULE}: lb_tactic.params.request_threshold 2 -> (default)",
                f'~ rule {RULE}: lb_tactic.type "round_robin" -> "random"',
            ],
        ),
        ("POST", f"{of('side')}/stats/clear", None, [f"~ pool side.1: counters of {FIRST} -> 0"]),
    )
    for method, place, body, changes in writes:
        headers = {} if place.endswith("later") else {"If_Match": "*"}
        status, answer, _ = await admin.ask(method, f"{place}?dry_run=true", body, **headers)
        assert (status, answer["dry_run"], answer["changes"]) == (200, True, changes)
    for method, place in (("PUT", path(RULE)), ("POST", f"{LIVE}/stats/clear")):
        body = rule if method == "PUT" else None
        assert (await admin.ask(method, f"{place}?dry_run=maybe", body, If_Match="*"))[0] == 400
    assert await everything(control) == before
    # Where nothing can be foretold, it is not pretended.
    assert (await admin.ask("POST", "/api/v1/pick?dry_run=true", {"rule": RULE}))[0] == 400


async def test_a_dry_run_refuses_what_the_write_would(admin: Admin) -> None:
    assert (await admin.ask("PUT", f"{path(RULE)}?dry_run=true", {}, If_Match='"x"'))[0] == 412
    assert (await admin.ask("PUT", f"{path(RULE)}?dry_run=true", {"pool": " "}, If_Match="*"))[0] == 400


async def everything(control: Any) -> Any:
    """All that Redis has, but for what says who is alive."""
    found = {}
    for key in await control.keys("*"):
        kind = await control.type(key)
        if b":lease" not in key and b":holdings" not in key and b":auditor" not in key and b":prober" not in key:
            found[key] = await (control.get(key) if kind == b"string" else control.dump(key))
    return found


# -- credentials -------------------------------------------------------------------------------------------------------

SECRET = "sk-canary-4711"
ACCOUNT = {
    "api_base": "https://z.invalid/v1",
    "token": SECRET,
    "headers": {"x-api-key": SECRET, "x-region": "eu"},
    "query": {"signature": SECRET},
    "proxy_url": f"http://me:{SECRET}@proxy.invalid:8080",
    "auth_type": "oauth",
    "oauth_detail": {"access_token": SECRET, "extra_fields": {"client_secret": SECRET, "client_id": "open"}},
}


async def test_credentials_are_masked_in_every_answer_and_a_mask_put_back_leaves_them(
    start: Start, control: Any
) -> None:
    admin = await start(a_document(), secret_key=KEY)
    place = path("z", PROVIDERS)
    answers = [await put_new(admin, place, ACCOUNT)]
    shown, etag = await read(admin, place)
    assert shown == ACCOUNT | {
        "uuid": "z",
        "name": "z",
        "token": MASK,
        "headers": {"x-api-key": MASK, "x-region": "eu"},
        "query": {"signature": MASK},
        "proxy_url": MASK,
        "oauth_detail": {"access_token": MASK, "extra_fields": {"client_secret": MASK, "client_id": "open"}},
    }
    assert (await put(admin, place, shown, etag))[1]["changes"] == []
    answers += [await put(admin, place, shown | {"timeout": 7, "token": "sk-new"}, etag)]
    assert answers[-1][1]["changes"] == ["~ provider z: timeout (default) -> 7.0", "~ provider z: token changed"]
    assert SECRET not in str((answers, await admin.get(PROVIDERS), await admin.get("/api/v1/audit")))
    provider = admin.gateway.balance.directory.provider("z")
    assert provider is not None
    sealer = Sealer(KEY)
    assert sealer.open(provider.token, ("z", "token")) == "sk-new"
    assert sealer.open(provider.headers["x-api-key"], ("z", "headers.x-api-key")) == SECRET
    assert sealer.open(provider.proxy_url, ("z", "proxy_url")) == ACCOUNT["proxy_url"]
    for key in await control.keys("*"):
        assert SECRET.encode() not in await control.dump(key), key


async def test_a_mask_that_stands_for_nothing_is_refused(start: Start) -> None:
    admin = await start(a_document(), secret_key=KEY)
    status, answer = await put_new(admin, path("z", PROVIDERS), {"api_base": "https://z.invalid", "token": MASK})
    assert (status, answer["faults"][0]["path"]) == (400, "token")
    place = path("a", PROVIDERS)
    status, answer = await put(admin, place, {"api_base": "https://z.invalid", "headers": {"x-api-key": MASK}})
    assert (status, answer["faults"][0]["path"]) == (400, "headers.x-api-key")


async def test_without_a_key_a_literal_credential_is_refused_and_not_told(admin: Admin) -> None:
    status, answer = await put_new(admin, path("z", PROVIDERS), {"api_base": "https://z.invalid", "token": SECRET})
    assert (status, answer["faults"]) == (
        400,
        [{"path": "providers[z].token", "message": "a literal credential would reach Redis in the clear"}],
    )


# -- beside files ------------------------------------------------------------------------------------------------------


async def test_what_was_made_here_stays_when_a_file_is_published_unless_it_is_pruned(
    admin: Admin, store_url: str
) -> None:
    await put_new(admin, path("z", PROVIDERS), {"api_base": "https://z.invalid", "no_key_required": True})
    await put_new(admin, path("later"), LATER | {"services": [{"provider": "z", "model": "m"}]})
    await admin.ask("DELETE", path("off"), If_Match="*")
    raw = a_document() | {"rules": a_document()["rules"][:1]}
    client = connection.client(store_url)
    registry = Registry(client)
    file = document.read(raw, door="strict").configuration
    published = await publish_file(registry, file, None)
    assert published.differences == ("- rule side",)
    assert [rule["uuid"] for rule in (await admin.get(RULES))["rules"]] == [RULE, "later"]
    # What a file takes over is the file's from then on.
    raw["rules"].append(LATER | {"uuid": "later", "description": "the file's"})
    assert (await publish_file(registry, document.read(raw, door="strict").configuration, None)).result == "published"
    assert (await read(admin, path("later")))[0]["description"] == "the file's"
    await publish_file(registry, file, None, force=True)
    assert [rule["uuid"] for rule in (await admin.get(RULES))["rules"]] == [RULE]
    # The provider is in no file yet.
    assert (await admin.get(PROVIDERS))["total"] == 4
    pruned = await publish_file(registry, file, None, prune=True)
    assert (pruned.result, pruned.differences) == ("published", ("- provider z",))
    await client.aclose()


async def test_the_commands_prune_what_was_made_here_when_they_are_told_to(
    admin: Admin, store_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    await put_new(admin, path("later"), LATER)
    file = tmp_path / "file.json"
    file.write_bytes(msgspec.json.encode(a_document()))
    there = [str(file), "--redis", store_url]
    # The file is the one that stands, with what was added beside it.
    assert await asyncio.to_thread(main, ["diff", *there]) == 0
    assert await asyncio.to_thread(main, ["diff", "--prune", *there]) == 1
    assert capsys.readouterr().out == "- rule later\n"
    assert await asyncio.to_thread(main, ["apply", "--prune", "--force", *there]) == 0
    assert [rule["uuid"] for rule in (await admin.get(RULES))["rules"]] == [RULE, "side", "off"]


async def test_a_tactic_set_by_itself_tells_of_no_index_of_an_earlier_edit(admin: Admin) -> None:
    rule, _ = await read(admin, path(RULE))
    await put(admin, path(RULE), rule | {"current_service_index": 1})
    answer = await admin.send(f"{of(RULE)}/tactic?dry_run=true", {"tactic": "random"}, "PUT")
    assert [line for line in answer["changes"] if "index" in line] == []


async def test_a_file_that_takes_away_what_was_relied_on_here_is_refused(admin: Admin, store_url: str) -> None:
    await put_new(admin, path("later"), LATER | {"services": [{"provider": "c", "model": "m"}]})
    raw = a_document()
    raw["providers"], raw["rules"] = raw["providers"][:2], raw["rules"][:2]
    client = connection.client(store_url)
    with pytest.raises(Exception, match="--prune") as caught:
        await publish_file(Registry(client), document.read(raw, door="strict").configuration, None)
    assert "rules[later].services[0].provider: there is no provider 'c'" in str(caught.value)
    await client.aclose()
