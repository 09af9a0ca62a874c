"""The installation that the README goes through, with programs that only note what they were asked."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from balancer import document
from deploy.build import ROOT
from tests import needs
from tests.deploy.rendering import container, environment, faults, gateway, secret_references, the

README = (ROOT / "README.md").read_text(encoding="utf-8")
SECTION = README.partition("\n## On Kubernetes\n")[2].partition("\n## ")[0]

NOTING = """#!{python}
import os, sys
with open(os.environ["NOTES"], "a") as notes:
    print(os.path.basename(sys.argv[0]), *sys.argv[1:], sep="\\t", file=notes)
if sys.argv[0].endswith("openssl"):
    print("from-openssl")
"""
TEMPLATING = """#!/bin/sh
shift 2
exec '{helm}' template "$@" >"$RENDERED"
"""


@pytest.mark.needs("npm:helm")
@pytest.mark.parametrize("store", ["a Redis of yours", "a trial"])
def test_the_readme_s_installation_creates_the_secrets_that_it_names_and_a_pod_that_works(
    tmp_path: Path, store: str
) -> None:
    helm = needs.program("npm:helm")
    assert helm
    install, trial = re.findall(r"```sh\n(.*?)```", SECTION, re.DOTALL)[:2]
    if store == "a trial":
        install += trial
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("docker", "kubectl", "openssl"):
        (programs / name).write_text(NOTING.format(python=sys.executable), encoding="utf-8")
    (programs / "helm").write_text(TEMPLATING.format(helm=helm), encoding="utf-8")
    for program in programs.iterdir():
        program.chmod(0o755)
    checkout = tmp_path / "checkout"
    shutil.copytree(ROOT / "deploy", checkout / "deploy")

    rendered = tmp_path / "rendered.yaml"
    subprocess.run(
        ["sh", "-eu", "-c", install],
        cwd=checkout,
        env={"PATH": f"{programs}:/usr/bin:/bin", "NOTES": str(tmp_path / "notes"), "RENDERED": str(rendered)},
        capture_output=True,
        text=True,
        check=True,
    )

    objects = [item for item in yaml.safe_load_all(rendered.read_text(encoding="utf-8")) if item]
    notes = [line.split("\t") for line in (tmp_path / "notes").read_text(encoding="utf-8").splitlines()]
    secrets = {
        words[6]: dict(word.removeprefix("--from-literal=").split("=", 1) for word in words[7:])
        for words in notes
        if words[0] == "kubectl" and "secret" in words
    }
    assert faults(objects) == []
    unused = {"balancer-redis"} if store == "a trial" else set()
    assert set(secret_references(objects)) == set(secrets) - unused
    variables = environment(gateway(objects), secrets)
    assert variables["BALANCER_CLIENT_TOKENS"] == "from-openssl"
    configuration = the(objects, "ConfigMap")["data"]["balancer.yaml"]
    reading = document.read(document.parse(configuration), door="strict")
    named = set(re.findall(r"\$\{(\w+)\}", configuration))
    assert len(reading.configuration.rules) == 2
    assert named == {"OPENAI_KEY", "ANTHROPIC_KEY"} & variables.keys()
    pushed = [words[2] for words in notes if words[:2] == ["docker", "push"]]
    assert pushed == [container(gateway(objects))["image"]]


def test_what_the_section_says_of_objects_values_and_files_is_so() -> None:
    values = yaml.safe_load((ROOT / "deploy" / "helm" / "balancer" / "values.yaml").read_text(encoding="utf-8"))
    for name in re.findall(r"`(deploy/[\w./-]+)`", SECTION):
        assert (ROOT / name).exists(), name
    for path in ("drain.timeoutSeconds", "outbox.mode", "metrics.serviceMonitor", "metrics.prometheusRule"):
        assert f"`{path}" in SECTION
        found = values
        for part in path.split("."):
            found = found[part]
    assert f"`drain.timeoutSeconds` ({values['drain']['timeoutSeconds']})" in SECTION
    overlays = {path.name for path in (ROOT / "deploy" / "k8s" / "overlays").iterdir()}
    assert overlays == set(re.findall(r"`([a-z-]+)`", SECTION.partition("Overlays:")[2].partition(";")[0]))
