"""The log of changes: each write stands in it once, with who made it and what it changed, and no credential."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import pytest

from balancer.__main__ import main
from balancer.store import changes, keys
from balancer.store.changes import ChangeLog, Deed
from balancer.store.connection import Commands
from balancer.store.topology import Topology
from tests.admin.conftest import FIRST, LIVE, RULE, SECOND, Admin, Start, a_document, of
from tests.admin.test_resources import KEY, LATER, PROVIDERS, path, put, put_new, read
from tests.admin.test_roles import LIST, TOKENS


async def told(admin: Admin, query: str = "") -> Any:
    return (await admin.get(f"/api/v1/audit{query}"))["changes"]


async def test_each_write_stands_there_with_who_made_it(start: Start) -> None:
    admin = await start(a_document(), admin_tokens=LIST)
    await put_new(admin, path("later"), LATER)
    await admin.ask("PUT", f"{of(RULE)}/tactic", {"tactic": "random"}, token=TOKENS["operator"])
    await admin.ask("POST", f"{of(RULE)}/stats/clear", token=TOKENS["operator"])
    await admin.ask("DELETE", path("side"), token=TOKENS["admin"], If_Match="*")
    found = await told(admin)
    assert [(c["who"], c["via"], c["action"], c["revision"]) for c in found] == [
        ("admins", "api", "delete rule side", 4),
        ("operators", "api", "clear statistics", None),
        ("operators", "api", f"change the tactic of rule {RULE}", 3),
        ("admin", "api", "put rule later", 2),
        ("unknown", "cli", "publish", 1),
    ]
    assert found[0]["differences"] == ["- rule side"]
    assert found[1]["differences"] == [f"~ pool default: counters of {name} -> 0" for name in (FIRST, SECOND)]
    assert f'~ rule {RULE}: lb_tactic.type "round_robin" -> "random"' in found[2]["differences"]


async def test_what_was_refused_or_changed_nothing_or_only_read_stands_nowhere(admin: Admin) -> None:
    rule, etag = await read(admin, path(RULE))
    await put(admin, path(RULE), rule, etag)
    await put(admin, path(RULE), rule | {"pool": " "}, etag)
    await put(admin, path(RULE), rule, '"old"')
    await admin.ask("PUT", f"{path('later')}?dry_run=true", LATER)
    await admin.ask("POST", f"{LIVE}/stats/clear?dry_run=true")
    await admin.pick()
    assert len(await told(admin)) == 1


async def test_of_a_race_only_the_edit_that_stands_is_there(admin: Admin, start: Start) -> None:
    other = await start()
    rule, etag = await read(admin, path(RULE))
    edits = [put(worker, path(RULE), rule | {"description": str(i)}, etag) for i, worker in enumerate((admin, other))]
    await asyncio.gather(*edits)
    found = await told(admin)
    assert [c["revision"] for c in found] == [2, 1]
    standing = (await read(admin, path(RULE)))[0]["description"]
    assert found[0]["differences"] == [f'~ rule {RULE}: description (default) -> "{standing}"']


async def test_pages_follow_each_other_to_the_end(admin: Admin) -> None:
    for i in range(4):
        await put_new(admin, path(f"r{i}"), LATER | {"request_model": f"r{i}"})
    whole = await told(admin)
    pages, query = [], "?limit=2"
    while query:
        page = await admin.get(f"/api/v1/audit{query}")
        pages.append(page["changes"])
        query = f"?limit=2&before={page['next']}" if page["next"] else ""
    assert [len(page) for page in pages] == [2, 2, 1]
    assert [change for page in pages for change in page] == whole


@pytest.mark.parametrize("query", ["limit=0", "limit=501", "before=x", "before=1-1;DEL", "after=1-1"])
async def test_a_page_that_there_cannot_be_is_refused(admin: Admin, query: str) -> None:
    assert (await admin.ask("GET", f"/api/v1/audit?{query}"))[0] == 400


async def test_credentials_only_changed(start: Start, control: Any) -> None:
    admin = await start(a_document(), secret_key=KEY)
    provider, _ = await read(admin, path("a", PROVIDERS))
    for token in ("sk-canary-1", "sk-canary-2"):
        await put(admin, path("a", PROVIDERS), provider | {"token": token, "headers": {"x-key": token}})
    assert [c["differences"] for c in (await told(admin))[:2]] == [
        ["~ provider a: headers.x-key changed", "~ provider a: token changed"]
    ] * 2
    entries = await control.xrange(keys.CHANGES)
    assert len(entries) == 3
    assert b"canary" not in repr(entries).encode()


async def test_the_log_is_bounded_by_length_and_by_age(
    admin: Admin, control: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = admin.gateway.balance.changes
    monkeypatch.setattr(changes, "KEPT", 3)
    for i in range(6):
        await log.note(Deed(who="x", via="api", action=str(i)))
    assert [noted.change.action for noted in await log.newest(10)] == ["5", "4", "3"]
    await control.delete(keys.CHANGES)
    for at in (1_000, 2_000):
        await control.xadd(keys.CHANGES, {"change": '{"who":"x","via":"api","action":"old"}'}, id=f"{at}-0")
    await log.note(Deed(who="x", via="api", action="new"))
    assert [noted.change.action for noted in await log.newest(10)] == ["new"]


async def test_of_a_long_difference_the_beginning_is_kept(admin: Admin) -> None:
    provider, _ = await read(admin, path("a", PROVIDERS))
    names = [f"model-{i}" for i in range(3000)]
    await put(admin, path("a", PROVIDERS), provider | {"models": names})
    (line,) = (await told(admin))[0]["differences"]
    assert len(line) == 1000
    for i in range(50):
        provider["headers"] = provider.get("headers", {}) | {f"x-{i}": "y" * 400}
    told_lines, left_out = changes.bounded([f"{i} {'é' * 400}" for i in range(50)])
    assert (len(told_lines), left_out) == (10, 40)


async def test_an_entry_of_somebody_else_s_hinders_no_reader(admin: Admin, control: Any) -> None:
    await control.xadd(keys.CHANGES, {"x": "y"})
    await control.xadd(keys.CHANGES, {"change": "{"})
    assert [c["action"] for c in await told(admin)][:2] == ["an entry that is not of this program"] * 2


async def test_without_its_log_nothing_is_cleared(admin: Admin, control: Any) -> None:
    await admin.settle((await admin.pick())["hold"])
    await control.set(keys.CHANGES, "no stream")
    assert (await admin.ask("POST", f"{LIVE}/stats/clear"))[0] == 503
    assert (await admin.stats())["picks"] == 1
    await control.delete(keys.CHANGES)


# -- the command -------------------------------------------------------------------------------------------------------


def test_commands_stand_there_too(store_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = []
    for i, raw in enumerate((a_document(), a_document() | {"pools": []})):
        files.append(tmp_path / f"{i}.json")
        files[-1].write_bytes(msgspec.json.encode(raw))
    there = ["--redis", store_url]
    for arguments in (["apply", str(files[0])], ["apply", str(files[1])], ["rollback", "1"]):
        assert main([*arguments, *there]) == 0
    capsys.readouterr()
    assert main(["changes", *there, "--output", "json"]) == 0
    found = [msgspec.json.decode(line) for line in capsys.readouterr().out.splitlines()]
    assert [(c["change"]["action"], c["change"]["via"], c["change"]["revision"]) for c in found] == [
        ("roll back to revision 1", "cli", 3),
        ("apply 1.json", "cli", 2),
        ("apply 0.json", "cli", 1),
    ]
    assert {c["change"]["who"] for c in found} == {changes.by_user("").who}
    assert main(["changes", *there, "--limit", "1", "--before", found[0]["id"]]) == 0
    assert "(cli): apply 1.json, revision 2\n  - pool default\n" in capsys.readouterr().out
    assert main(["changes", *there, "--limit", "0"]) == 1
    assert main(["changes", *there, "--before", "x"]) == 1


def test_a_user_without_a_name_is_told_by_number(monkeypatch: pytest.MonkeyPatch) -> None:
    def nameless() -> str:
        raise KeyError("uid not found")

    monkeypatch.setattr("getpass.getuser", nameless)
    assert changes.by_user("x").who.startswith("uid ")


async def test_a_publication_that_a_dead_publisher_left_is_noted_once(store_url: str, admin: Admin) -> None:
    """It is noted as it is prepared: whoever completes it has nothing to say."""
    commands = Commands(Topology(store_url))
    before = len(await ChangeLog(commands).newest(10))
    await admin.gateway.balance.registry.complete_pending()
    assert len(await ChangeLog(commands).newest(10)) == before
    await commands.aclose()
