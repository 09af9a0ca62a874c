"""The image's recipe. `make verify-deploy` builds it for real, on a Debian root, and runs it there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.compile import named
from tests.deploy.rendering import LEAST, container, gateway, pod, render

ROOT = Path(__file__).resolve().parent.parent.parent
DOCKERFILE = (ROOT / "deploy" / "Dockerfile").read_text(encoding="utf-8")
INSTRUCTIONS = re.sub(r"\\\n(?: *#.*\n)*", " ", re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.MULTILINE)).splitlines()


def instructions(word: str) -> list[str]:
    """The rest of every instruction of that kind."""
    return [line.removeprefix(word).strip() for line in INSTRUCTIONS if line.startswith(f"{word} ")]


def test_the_linter_of_dockerfiles_has_nothing_to_say() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    linted = subprocess.run([hadolint, ROOT / "deploy" / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (linted.returncode, linted.stdout + linted.stderr) == (0, "")


def test_the_context_is_what_the_build_copies_and_no_more() -> None:
    """What is not named cannot get in: a secret in a new file needs no new line in .dockerignore."""
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    copied = {name for line in instructions("COPY") if "--from" not in line for name in line.split()[:-1]}
    copied |= set(re.findall(r"--mount=type=bind,source=([^,]+)", DOCKERFILE))

    assert rules[0] == "*"
    assert {rule.removeprefix("!") for rule in rules if rule.startswith("!")} == copied
    # Within what is let in: caches, hidden files, keys.
    assert [rule for rule in rules[1:] if not rule.startswith("!")] == [
        "**/__pycache__",
        "**/*.py[cod]",
        "**/.*",
        "**/*.key",
        "**/*.pem",
    ]
    assert rules.index("**/.*") > max(number for number, rule in enumerate(rules) if rule.startswith("!"))


def test_everything_from_an_index_is_a_wheel_with_a_known_hash() -> None:
    installs = [part for line in instructions("RUN") for part in line.split("&&") if "pip install" in part]
    assert len(installs) == 3
    for install in installs:
        assert "--no-index" in install or ("--require-hashes" in install and "--only-binary :all:" in install)


@pytest.mark.needs("npm:helm")
def test_the_chart_runs_the_image_as_it_is_made() -> None:
    """Command, user and ports are said twice, for whoever runs it without a chart."""
    workload = gateway(render(LEAST))
    (user,) = {line for line in instructions("USER") if line != "0:0"}

    assert instructions("ENTRYPOINT") == ['["balancer"]']
    assert instructions("CMD") == ['["serve"]']
    assert container(workload)["command"] == ["balancer", "serve"]
    assert INSTRUCTIONS.index("USER 10001:10001") > INSTRUCTIONS.index("USER 0:0")
    security = pod(workload)["securityContext"]
    assert user == f"{security['runAsUser']}:{security['runAsGroup']}"
    assert instructions("EXPOSE") == [" ".join(str(port["containerPort"]) for port in container(workload)["ports"])]


def test_what_is_imported_inside_of_functions_is_compiled_too() -> None:
    source = "import a, b.c\nfrom . import x\ndef f():\n    import d as e\n    from g.h import i\n"
    assert named(source) == {"a", "b.c", "d", "g.h"}


def test_the_compiler_leaves_bytecode_that_no_time_can_make_stale(tmp_path: Path) -> None:
    package = tmp_path / "balancer"
    package.mkdir()
    (package / "__init__.py").write_text("", encoding="utf-8")
    (package / "late.py").write_text("def f():\n    import only_later\n    import never_there\n", encoding="utf-8")
    (tmp_path / "only_later.py").write_text("", encoding="utf-8")
    cache = tmp_path / "cache"

    subprocess.run(
        [sys.executable, str(ROOT / "deploy" / "compile.py")],
        env=os.environ | {"PYTHONPATH": str(tmp_path), "PYTHONPYCACHEPREFIX": str(cache)},
        check=True,
    )

    for name in ("balancer/__init__", "balancer/late", "only_later"):
        (file,) = cache.rglob(f"{tmp_path.relative_to('/')}/{name}.*.pyc")
        # The flags of PEP 552: by hash, and checked.
        assert file.read_bytes()[4:8] == b"\x03\x00\x00\x00"
