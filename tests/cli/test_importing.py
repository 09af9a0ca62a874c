"""import litellm and import tingly: what is written, what is told, and that the result can be checked and applied."""

from __future__ import annotations

import io
import stat
from pathlib import Path

import pytest
import yaml

from tests.cli.conftest import Run, Write

LITELLM = """
model_list:
  - model_name: chat
    litellm_params: {model: gpt-4o, api_key: os.environ/OPENAI_API_KEY, temperature: 0.2}
"""
BASE_IN_THE_ENVIRONMENT = """
model_list:
  - model_name: chat
    litellm_params: {model: openai/m, api_key: none, api_base: os.environ/BASE}
"""
TINGLY = {
    "user_token": "u",
    "providers_v2": [{"uuid": "p", "name": "one", "api_base": "https://one.invalid", "token": "sk-literal"}],
    "rules": [{"uuid": "r", "request_model": "chat", "services": [{"provider": "p", "model": "m"}]}],
}


def test_an_import_can_be_checked_and_applied(on_store: Run, write: Write, tmp_path: Path) -> None:
    result = tmp_path / "balancer.yaml"

    ran = on_store("import", "litellm", write(LITELLM, "litellm.yaml"), "--output", str(result))

    assert (ran.status, ran.out) == (0, "")
    assert ran.err.startswith("warning: model_list[0].litellm_params.temperature: ")
    assert on_store("check", str(result)).out == "ok: 1 providers, 1 rules\n"
    assert on_store("apply", str(result)).out.endswith("published as revision 1\n")


def test_an_import_is_printed_without_an_output(run: Run, write: Write) -> None:
    ran = run("import", "tingly", write(TINGLY, "config.json"))

    document = yaml.safe_load(ran.out)
    assert ran.status == 0
    assert document["providers"][0]["token"] == "${ONE_KEY}"
    assert "sk-literal" not in ran.out + ran.err


def test_literals_are_written_only_where_that_is_asked_for_and_for_the_owner_alone(
    run: Run, write: Write, tmp_path: Path
) -> None:
    result = tmp_path / "balancer.yaml"

    ran = run("import", "tingly", write(TINGLY, "config.json"), "--literals", "--output", str(result))

    assert ran.status == 0
    assert yaml.safe_load(result.read_text())["providers"][0]["token"] == "sk-literal"
    assert stat.S_IMODE(result.stat().st_mode) == 0o600


def test_what_check_would_refuse_is_named_and_the_rest_is_written(run: Run, write: Write) -> None:
    ran = run("import", "litellm", write(BASE_IN_THE_ENVIRONMENT, "litellm.yaml"))

    assert ran.status == 1
    assert yaml.safe_load(ran.out)["providers"][0]["api_base"] == "${BASE}"
    assert "warning: model_list[0].litellm_params.api_base: a URL takes no reference: write what BASE holds" in ran.err
    assert "to do: providers[0].api_base: expected an http:// or https:// URL with a host" in ran.err


def test_a_dash_reads_stdin(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(LITELLM))

    assert run("import", "litellm", "-").status == 0


@pytest.mark.parametrize(
    ("source", "text", "complaint"),
    [
        ("litellm", "rules: []\n", "no model_list"),
        ("litellm", "model_list: [\n", "line 2"),
        ("tingly", "- 1\n", "no tingly-box configuration"),
    ],
)
def test_what_is_no_such_file_is_refused(run: Run, write: Write, source: str, text: str, complaint: str) -> None:
    ran = run("import", source, write(text, "other.yaml"))

    assert (ran.status, ran.out) == (1, "")
    assert complaint in ran.err


def test_a_file_that_is_not_there_is_told(run: Run, tmp_path: Path) -> None:
    assert "cannot read" in run("import", "litellm", str(tmp_path / "none.yaml")).err
