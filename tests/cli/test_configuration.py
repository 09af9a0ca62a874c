"""check, apply, diff, get and rollback: what a person reads, what the exit status says, and what then stands."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
import redis
import yaml

from tests.cli.conftest import Ran, Run, Write, a_document

LITERAL = "sk-literal-0123456789"


def lines(text: str) -> list[str]:
    return text.splitlines()


def thresholds(run: Run) -> list[int]:
    """The request threshold of every rule that stands."""
    got = run("get", "rules", "--output", "json")
    assert got.status == 0, got.err
    return [rule["lb_tactic"]["params"]["request_threshold"] for rule in msgspec.json.decode(got.out)]


# -- check -------------------------------------------------------------------------------------------------------------


def test_check_accepts_a_good_file_and_asks_no_redis(run: Run, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BALANCER_REDIS", "unix:///nowhere/at/all.sock")

    assert run("check", write(a_document())) == Ran(status=0, out="ok: 1 providers, 1 rules\n", err="")


def test_check_reads_json_too(run: Run, write: Write) -> None:
    assert run("check", write(a_document(), "balancer.json")).status == 0


def test_check_names_every_fault_with_its_path(run: Run, write: Write) -> None:
    document = a_document(
        colour="red",
        pool="no/slash",
        services=[
            {"provider": "up", "model": "m1", "weight": -1},
            {"provider": "up", "model": "m1"},
            {"provider": "gone", "model": "m2"},
        ],
    )
    document["providers"].append({"name": "up", "api_base": "ftp://up.invalid"})
    document["rules"].append({"uuid": "r", "request_model": "r", "lb_tactic": {"type": "dice"}})
    document["extra"] = 1

    ran = run("check", write(document))

    head, *faults = lines(ran.err)
    assert (ran.status, ran.out, head) == (1, "", "balancer: 10 faults in the configuration")
    assert sorted(fault.split(": ")[0] for fault in faults) == [
        "  extra",
        "  providers[1].api_base",
        "  providers[1].name",
        "  providers[1].uuid",
        "  rules[0].colour",
        "  rules[0].pool",
        "  rules[0].services[0].weight",
        "  rules[0].services[1]",
        "  rules[0].services[2].provider",
        "  rules[1].lb_tactic.type",
    ]


def test_what_is_not_built_yet_is_refused_and_never_ignored(run: Run, write: Write) -> None:
    document = a_document()
    document["keys"] = [{"name": "ci"}]

    ran = run("check", write(document))

    assert (ran.status, ran.out) == (1, "")
    assert [line for line in lines(ran.err) if "not supported yet" in line] == ["  keys: not supported yet"]


def test_check_warns_when_one_rule_hides_another(run: Run, write: Write) -> None:
    document = a_document()
    document["rules"].append(document["rules"][0] | {"uuid": "second"})

    ran = run("check", write(document))

    assert (ran.status, ran.out) == (0, "ok: 1 providers, 2 rules\n")
    assert re.fullmatch(r"warning: rules\[1\]: rules\[0\] .*\n", ran.err)


def test_check_says_how_to_mend_limits_that_two_pools_reach_and_rules_that_lead_back(run: Run, write: Write) -> None:
    document = a_document(fallback=["other"])
    document["providers"][0]["limits"] = {"rpm": 600}
    document["rules"].append(
        document["rules"][0] | {"uuid": "other", "request_model": "other", "pool": "eu", "fallback": ["gpt"]}
    )

    ran = run("check", write(document))

    assert (ran.status, ran.out) == (1, "")
    assert lines(ran.err)[1:] == [
        "  providers[0].limits: rules of 2 pools reach the provider: must say split: {default: …, eu: …}",
        "  rules[1].fallback[0]: leads back: other → gpt → other; leave one of these out",
    ]


def test_check_warns_of_limits_that_differ_and_of_a_rule_that_stands_in_for_nothing(run: Run, write: Write) -> None:
    service = {"provider": "up", "model": "m1"}
    document = a_document(services=[service | {"limits": {"rpm": 5}}], fallback=["off"])
    for uuid, more in {"other": {"services": [service]}, "off": {"active": False}}.items():
        document["rules"].append(a_document()["rules"][0] | {"uuid": uuid, "request_model": uuid} | more)

    ran = run("check", write(document))

    assert (ran.status, ran.out) == (0, "ok: 1 providers, 3 rules\n")
    assert [line.split(": ")[1] for line in lines(ran.err)] == ["rules[1]", "rules[0].fallback[0]"]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("providers: [\n  {name: a\n", "line 3"),
        ("providers:\n  - name: a\n    name: b\n", "line 3: the key 'name' is written twice"),
        ("a: !!python/object/apply:os.getcwd []\n", "line 1"),
        ("just text\n", "document: expected a mapping, not text"),
        ("providers: []\nrules: {}\n", "rules: expected a list, not a mapping"),
    ],
)
def test_a_malformed_file_is_told_where(run: Run, write: Write, text: str, complaint: str) -> None:
    ran = run("check", write(text))

    assert (ran.status, ran.out) == (1, "")
    assert complaint in ran.err


def test_a_date_that_does_not_exist_is_a_fault_like_any_other(run: Run, write: Write) -> None:
    """YAML makes dates of what looks like one; the 45th of a 13th month ended in a traceback."""
    ran = run("check", write("providers:\n  - {name: a, last_updated: 2026-13-45}\n"))

    assert (ran.status, ran.out) == (1, "")
    assert "Traceback" not in ran.err


def test_a_file_that_cannot_be_read_is_named(run: Run, tmp_path: Path) -> None:
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")

    for path, complaint in (
        (tmp_path / "absent.yaml", "No such file or directory"),
        (tmp_path, "Is a directory"),
        (binary, "no UTF-8 text"),
    ):
        ran = run("check", str(path))
        assert (ran.status, ran.out, len(lines(ran.err))) == (1, "", 1)
        assert str(path) in ran.err
        assert complaint in ran.err


def test_the_example_with_every_field_is_accepted_published_and_stands_as_it_was_written(on_store: Run) -> None:
    example = str(Path(__file__).parents[2] / "docs" / "example.yaml")

    checked, applied, differing = (on_store(command, example) for command in ("check", "apply", "diff"))

    assert (checked.status, checked.err) == (0, "")
    assert checked.out.startswith("ok: ")
    assert (applied.status, lines(applied.out)[-1]) == (0, "published as revision 1")
    assert differing == Ran(status=0, out="", err="")


# -- tingly-box --------------------------------------------------------------------------------------------------------


def a_tingly_box_document() -> dict[str, Any]:
    """Shapes of an existing configuration, with what it tolerates."""
    return {
        "server_port": 12580,
        "user_token": "tingly-box-user",
        "providers_v2": [
            {"uuid": "u-1", "name": "one", "api_base": "https://one.invalid/v1", "api_style": "openai", "token": "${K}"}
        ],
        "rules": [
            {
                "uuid": "rule-1",
                "scenario": "openai",
                "request_model": "gpt",
                "response_model": "",
                "services": [
                    {"provider": "u-1", "model": "m1", "weight": 1, "active": True, "time_window": 300},
                    {"provider": "u-gone", "model": "m2", "weight": 1, "active": True, "time_window": 300},
                ],
                "current_service_index": 5,
                "lb_tactic": {"type": "adaptive", "params": None},
                "active": True,
                "legend": "x",
            },
            {"uuid": "rule-2", "request_model": "two", "lb_tactic": {"type": 2, "params": {"token_threshold": 0}}},
        ],
    }


def test_a_tingly_box_document_is_read_leniently_with_a_warning_for_each_mend(on_store: Run, write: Write) -> None:
    ran = on_store("apply", write(a_tingly_box_document(), "config.json"))

    assert ran.status == 0, ran.err
    assert sorted(line.removeprefix("warning: ").split(": ")[0] for line in lines(ran.err)) == [
        "rules[0].current_service_index",
        "rules[0].lb_tactic.type",
        "rules[0].legend",
        "rules[0].services[1].provider",
        "server_port",
        "user_token",
    ]
    first, second = msgspec.json.decode(on_store("get", "rules", "--output", "json").out)
    assert first["lb_tactic"]["type"] == "round_robin"
    assert first["current_service_index"] == 1
    assert [service.get("active", True) for service in first["services"]] == [True, False]
    assert second["lb_tactic"] == {"type": "hybrid", "params": {"request_threshold": 10, "token_threshold": 10000}}


def test_the_same_shapes_without_tingly_box_s_marks_are_refused_unless_lenient_is_said(run: Run, write: Write) -> None:
    document = a_tingly_box_document()
    del document["server_port"], document["user_token"]
    document["providers"] = document.pop("providers_v2")
    path = write(document)

    strict, lenient = run("check", path), run("check", "--lenient", path)

    assert (strict.status, strict.out) == (1, "")
    assert "rules[0].lb_tactic.type: unknown tactic 'adaptive'" in strict.err
    assert (lenient.status, lenient.out) == (0, "ok: 1 providers, 2 rules\n")
    assert "warning: rules[0].lb_tactic.type: unknown tactic 'adaptive'" in lenient.err


# -- apply, diff -------------------------------------------------------------------------------------------------------


def test_apply_prints_the_difference_and_then_the_revision(on_store: Run, write: Write) -> None:
    first = on_store("apply", write(a_document()))
    second = on_store("apply", write(a_document(threshold=3)))

    assert first == Ran(status=0, out="+ provider up\n+ rule gpt\npublished as revision 1\n", err="")
    change = "~ rule gpt: lb_tactic.params.request_threshold 10 -> 3"
    assert second == Ran(status=0, out=f"{change}\npublished as revision 2\n", err="")
    assert thresholds(on_store) == [3]


def test_apply_of_what_stands_does_nothing_however_the_file_writes_it(on_store: Run, write: Write) -> None:
    on_store("apply", write(a_document()))
    document = a_document()
    document["rules"][0] = dict(reversed(document["rules"][0].items())) | {"active": True}

    again = on_store("apply", write(document, "other.json"))

    assert again == Ran(status=0, out="nothing to do: revision 1 is the same\n", err="")


def test_diff_exits_1_with_a_difference_and_publishes_nothing(on_store: Run, write: Write) -> None:
    on_store("apply", write(a_document()))
    document = a_document(threshold=3)
    document["rules"].append({"uuid": "new", "request_model": "new"})

    differing = on_store("diff", write(document))

    expected = ["+ rule new", "~ rule gpt: lb_tactic.params.request_threshold 10 -> 3"]
    assert (differing.status, sorted(lines(differing.out)), differing.err) == (1, expected, "")
    assert thresholds(on_store) == [10]
    assert on_store("diff", write(a_document())) == Ran(status=0, out="", err="")


def test_diff_shows_that_a_credential_changed_and_not_to_what(on_store: Run, write: Write) -> None:
    on_store("apply", write(a_document(token=LITERAL)))

    same, other = (on_store("diff", write(a_document(token=token))) for token in (LITERAL, "sk-another-0123456789"))

    assert same == Ran(status=0, out="", err="")
    assert other == Ran(status=1, out="~ provider up: token changed\n", err="")


def test_an_earlier_file_is_ignored_with_the_name_of_the_newer_revision_unless_forced(
    on_store: Run, write: Write
) -> None:
    old = write(a_document(threshold=1), "old.yaml")
    on_store("apply", old)
    on_store("apply", write(a_document(threshold=2)))

    ignored = on_store("apply", old)

    assert ignored.status == 0
    assert "ignored: this file was revision 1, and revision 2 is newer" in ignored.out + ignored.err
    assert "--force" in ignored.out + ignored.err
    assert thresholds(on_store) == [2]
    forced = on_store("apply", "--force", old)
    assert (forced.status, lines(forced.out)[-1]) == (0, "published as revision 3")
    assert thresholds(on_store) == [1]


def test_a_file_with_faults_publishes_nothing(on_store: Run, write: Write) -> None:
    on_store("apply", write(a_document()))

    for command in ("apply", "diff"):
        ran = on_store(command, write(a_document(threshold=3, colour="red")))
        assert (ran.status, ran.out) == (1, "")
        assert "rules[0].colour: unknown field" in ran.err
    assert thresholds(on_store) == [10]


# -- rollback ----------------------------------------------------------------------------------------------------------


def test_rollback_publishes_an_earlier_revision_as_a_new_one(on_store: Run, write: Write) -> None:
    for threshold in (1, 2):
        on_store("apply", write(a_document(threshold=threshold)))

    back = on_store("rollback", "1")

    change = "~ rule gpt: lb_tactic.params.request_threshold 2 -> 1"
    assert back == Ran(status=0, out=f"{change}\npublished as revision 3\n", err="")
    assert thresholds(on_store) == [1]
    assert on_store("rollback", "3") == Ran(status=0, out="nothing to do: revision 3 is the same\n", err="")


@pytest.mark.parametrize("revision", ["0", "7"])
def test_rollback_to_a_revision_that_is_not_there_is_refused(on_store: Run, write: Write, revision: str) -> None:
    on_store("apply", write(a_document()))

    ran = on_store("rollback", revision)

    assert ran == Ran(status=1, out="", err=f"balancer: revision {revision} is not kept in the registry\n")
    assert thresholds(on_store) == [10]


# -- get ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["rules", "providers", "stats"])
def test_get_says_the_same_in_yaml_and_in_json(on_store: Run, write: Write, what: str) -> None:
    on_store("apply", write(a_document()))

    as_yaml, as_json = on_store("get", what), on_store("get", what, "--output", "json")

    assert (as_yaml.status, as_json.status, as_yaml.err, as_json.err) == (0, 0, "", "")
    value = msgspec.json.decode(as_json.out)
    assert yaml.safe_load(as_yaml.out) == value
    assert len(value) == 1


def test_the_whole_configuration_can_be_published_again(on_store: Run, write: Write) -> None:
    on_store("apply", write(a_document_with_secrets()))

    sealed = on_store("get", "configuration", "--sealed")

    assert LITERAL not in sealed.out
    assert on_store("diff", write(sealed.out)) == Ran(status=0, out="", err="")


def test_what_was_printed_with_masks_is_not_taken_for_credentials(on_store: Run, write: Write) -> None:
    """`***` was sealed and published as if it were the key: every request got 401 from then on."""
    on_store("apply", write(a_document_with_secrets()))

    ran = on_store("apply", write(on_store("get", "configuration").out))

    assert (ran.status, ran.out) == (1, "")
    assert [line.split(": ")[0] for line in lines(ran.err)[1:]] == [
        "  providers[0].token",
        "  providers[0].proxy_url",
        "  providers[0].headers.x-api-key",
        "  providers[1].oauth_detail.access_token",
    ]


def test_get_rules_is_the_shape_of_a_file(on_store: Run, write: Write) -> None:
    on_store("apply", write(a_document(threshold=3, response_model="ours", pool="fast")))

    (rule,) = yaml.safe_load(on_store("get", "rules").out)

    services = [{key: service[key] for key in ("provider", "model")} for service in rule["services"]]
    assert (rule["uuid"], rule["pool"], rule["response_model"]) == ("gpt", "fast", "ours")
    assert services == [{"provider": "up", "model": "m1"}, {"provider": "up", "model": "m2"}]
    document = a_document() | {"rules": [rule]}
    assert on_store("diff", write(document)) == Ran(status=0, out="", err="")


def test_get_stats_of_a_rule_that_nobody_asked_for_is_zeros(on_store: Run, write: Write) -> None:
    on_store("apply", write(a_document()))

    (pool,) = yaml.safe_load(on_store("get", "stats").out)

    assert (pool["pool"], pool["epoch"]) == ("default", 1)
    assert pool["rules"] == [
        {"uuid": "gpt", "current_service": "", "current_service_index": 0, "streak": 0, "picks": 0}
    ]
    assert [service["id"] for service in pool["services"]] == ["up:m1", "up:m2"]
    for service in pool["services"]:
        assert service.pop("windows") == [{"seconds": 300, "requests": 0, "tokens": 0}]
        assert service.pop("id")
        assert service.pop("breaker") == "closed"
        assert set(service.values()) == {0}


def test_get_before_anything_was_published_says_what_to_do(on_store: Run) -> None:
    ran = on_store("get", "rules")

    assert (ran.status, ran.out) == (1, "")
    assert "balancer apply FILE" in ran.err


# -- credentials -------------------------------------------------------------------------------------------------------


def a_document_with_secrets() -> dict[str, Any]:
    """Literals wherever a credential may stand."""
    document = a_document(token=LITERAL)
    document["providers"][0] |= {
        "headers": {"x-api-key": f"{LITERAL}-header", "x-team": "blue"},
        "proxy_url": f"http://user:{LITERAL}-proxy@127.0.0.1:1",
    }
    oauth = {"access_token": f"{LITERAL}-access", "provider_type": "anthropic"}
    document["providers"].append(
        {
            "name": "max",
            "api_base": "https://max.invalid",
            "api_style": "anthropic",
            "auth_type": "oauth",
            "oauth_detail": oauth,
        }
    )
    return document


def test_literal_credentials_are_masked_in_every_answer_and_sealed_in_redis(
    on_store: Run, write: Write, store_url: str
) -> None:
    ran = [on_store("apply", write(a_document_with_secrets()))]
    ran += [on_store("get", what, "--output", form) for what in ("providers", "rules") for form in ("yaml", "json")]
    ran += [on_store("diff", write(a_document(token="${UP_KEY}"))), on_store("get", "stats")]

    assert [r.status for r in ran] == [0, 0, 0, 0, 0, 1, 0], ran
    assert not [r for r in ran if LITERAL in r.out + r.err]
    up, oauth = msgspec.json.decode(ran[2].out)
    assert (up["token"], up["proxy_url"]) == ("***", "***")
    assert up["headers"] == {"x-api-key": "***", "x-team": "blue"}
    assert oauth["oauth_detail"]["access_token"] == "***"
    with redis.Redis.from_url(store_url) as client:
        held = [client.dump(key) for key in client.scan_iter("*")] + list(client.scan_iter("*"))
        texts = [client.get(key) for key in client.scan_iter("*", _type="string")]
    assert any(text and b"sealed:v2:" in text for text in texts)
    assert not [value for value in (*held, *texts) if value and LITERAL.encode() in value]


def test_literals_without_a_key_are_refused_with_what_to_do_and_references_go_on_working(
    on_store: Run, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("BALANCER_SECRET_KEY")

    refused = on_store("apply", write(a_document_with_secrets()))

    assert (refused.status, refused.out) == (1, "")
    for words in ("BALANCER_SECRET_KEY", "openssl rand -base64 32", "${ENV}", "${file:/path}"):
        assert words in refused.err
    places = [line.strip().split(": ")[0] for line in lines(refused.err)[1:]]
    assert places == [
        "providers[up].token",
        "providers[up].headers.x-api-key",
        "providers[up].proxy_url",
        "providers[max].oauth_detail.access_token",
    ]
    assert LITERAL not in refused.err
    assert on_store("get", "rules").status == 1
    assert on_store("apply", write(a_document(token="${UP_KEY}"))).status == 0
    (provider,) = yaml.safe_load(on_store("get", "providers").out)
    assert provider["token"] == "${UP_KEY}"


def test_a_sealing_key_of_the_wrong_length_is_refused(
    on_store: Run, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BALANCER_SECRET_KEY", "c2hvcnQ=")

    ran = on_store("apply", write(a_document(token=LITERAL)))

    assert (ran.status, ran.out) == (1, "")
    assert "BALANCER_SECRET_KEY: expected 32 bytes in base64" in ran.err
    assert "c2hvcnQ=" not in ran.err


# -- the store ---------------------------------------------------------------------------------------------------------


def test_a_flag_wins_over_the_environment(on_store: Run, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    url = "unix:///nowhere/at/all.sock"

    ran = on_store("apply", "--redis", url, write(a_document()))

    assert (ran.status, ran.out) == (1, "")
    assert on_store("apply", write(a_document())).status == 0


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("http://127.0.0.1:6379", "expected one of redis://"),
        ("127.0.0.1:6379", "expected one of redis://"),
        ("redis+cluster://127.0.0.1:1", "no node of the Cluster"),
        ("redis://user:hunter2@127.0.0.1:port", "BALANCER_REDIS"),
        ("redis://user:hunter2@127.0.0.1:1", "Redis does not answer"),
        ("unix:///nowhere/at/all.sock", "Redis does not answer"),
    ],
)
def test_a_redis_that_cannot_be_used_is_one_message_without_its_password(
    run: Run, write: Write, url: str, complaint: str
) -> None:
    ran = run("apply", "--redis", url, write(a_document()))

    assert (ran.status, ran.out, len(lines(ran.err))) == (1, "", 1)
    assert complaint in ran.err
    assert "hunter2" not in ran.err


def test_without_redis_the_embedded_store_keeps_what_one_command_published_for_the_next(
    run: Run, write: Write, tmp_path: Path
) -> None:
    folder = ("--data-dir", str(tmp_path / "data"))

    assert run("apply", *folder, write(a_document(token=LITERAL))).status == 0
    got = run("get", *folder, "providers")

    assert (got.status, yaml.safe_load(got.out)[0]["token"]) == (0, "***")
    assert run("diff", *folder, write(a_document(token=LITERAL))) == Ran(status=0, out="", err="")


# -- as processes ------------------------------------------------------------------------------------------------------


def as_a_process(*arguments: str, redis_url: str) -> Ran:
    command = [sys.executable, "-m", "balancer", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={"BALANCER_REDIS": redis_url})
    return Ran(status=done.returncode, out=done.stdout, err=done.stderr)


def test_exit_statuses_and_streams_of_real_processes(write: Write, store_url: str) -> None:
    good, bad = write(a_document(), "good.yaml"), write(a_document(colour="red"), "bad.yaml")

    ran = [
        as_a_process(*arguments, redis_url=store_url)
        for arguments in (("check", good), ("check", bad), ("diff", good), ("apply", good), ("diff", good), ("pray",))
    ]

    assert [r.status for r in ran] == [0, 1, 1, 0, 0, 2]
    assert [bool(r.out) for r in ran] == [True, False, True, True, False, False]
    assert [bool(r.err) for r in ran] == [False, True, False, False, False, True]
    assert not [r for r in ran if "Traceback" in r.err]
    away = as_a_process("get", "rules", redis_url="unix:///nowhere/at/all.sock")
    assert (away.status, away.out, len(lines(away.err))) == (1, "", 1)


def test_a_reader_that_has_had_enough_ends_a_command_quietly(write: Write) -> None:
    """`balancer get rules | head -1`: what was still in the buffer at the end gave a complaint and status 120."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [sys.executable, "-m", "balancer", "check", write(a_document())]
    try:
        done = subprocess.run(command, stdout=write_end, stderr=subprocess.PIPE, check=False, env={})
    finally:
        os.close(write_end)
    assert (done.returncode, done.stderr) == (0, b"")
