"""The manifests for kustomize, beside the chart that they were made from."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from balancer import document
from deploy.build import CHART, K8S, OVERLAYS, ROOT, Object, chart_files, files, patch, plain, rendered
from tests import needs
from tests.deploy.rendering import container, environment, faults, gateway, of_kind, the, validate

PLACES = {"base": K8S / "base"} | {overlay: K8S / "overlays" / overlay for overlay in OVERLAYS}
BY = {"env": "name", "volumes": "name", "volumeMounts": "mountPath", "ports": "name"}

needs_both = pytest.mark.needs("npm:helm", "npm:kubectl")


def kustomized(folder: Path) -> list[Object]:
    """The objects that `kubectl kustomize` makes of a folder."""
    kubectl = needs.program("npm:kubectl")
    assert kubectl
    text = subprocess.run([kubectl, "kustomize", str(folder)], capture_output=True, check=True, text=True).stdout
    return [item for item in yaml.safe_load_all(text) if item]


def comparable(value: Any, place: str = "") -> Any:
    """A structure without the order of lists that have keys, and without the digest in a ConfigMap's name."""
    if isinstance(value, dict):
        return {key: comparable(inner, key) for key, inner in value.items()}
    if isinstance(value, list):
        inner = [comparable(item) for item in value]
        return sorted(inner, key=lambda item: str(item[BY[place]])) if place in BY and "name" in inner[0] else inner
    if isinstance(value, str):
        if place == "balancer.yaml":
            return document.parse(value)
        return re.sub(r"^balancer-config-[a-z0-9]{10}$", "balancer-config", value)
    return value


@needs_both
@pytest.mark.parametrize("place", PLACES)
def test_a_kustomization_gives_what_the_chart_gives_for_its_values(place: str) -> None:
    helm = needs.program("npm:helm")
    assert helm
    made = {(item["kind"], comparable(item["metadata"]["name"])): item for item in kustomized(PLACES[place])}
    wanted = {(item["kind"], item["metadata"]["name"]): plain(item) for item in rendered(helm, place)}

    assert made.keys() == wanted.keys()
    for key, item in wanted.items():
        assert comparable(made[key]) == comparable(item)


@needs_both
@pytest.mark.parametrize("place", PLACES)
def test_a_kustomization_is_valid_safe_and_holds_together(place: str) -> None:
    objects = kustomized(PLACES[place])

    validate(objects, "1.34")
    assert faults(objects, namespace=None) == []
    assert of_kind(objects, "Secret") == []


@needs_both
def test_the_store_s_variables_stand_before_the_url_that_they_are_put_into() -> None:
    values = environment(
        gateway(kustomized(PLACES["sentinel"])),
        {
            "balancer-redis": {"password": "p", "sentinel-password": "q"},
            "balancer-providers": {},
            "balancer-clients": {"tokens": "t"},
            "balancer-admin": {"token": "a"},
            "balancer-secret-key": {"secret-key": "k"},
        },
    )

    assert values["BALANCER_REDIS"].startswith("redis+sentinel://:p@sentinel-0.")
    assert values["BALANCER_REDIS"].endswith("/mymaster/0?sentinel_password=q")


@needs_both
def test_an_overlay_of_one_s_own_sets_image_namespace_and_configuration(tmp_path: Path) -> None:
    shutil.copytree(K8S, tmp_path / "k8s")
    own = tmp_path / "k8s" / "own"
    own.mkdir()
    comment = (K8S / "base" / "kustomization.yaml").read_text(encoding="utf-8")
    lines = re.findall(r"^#   (.*)$", comment, re.MULTILINE)
    (own / "kustomization.yaml").write_text("\n".join(lines), encoding="utf-8")
    (own / "balancer.yaml").write_text("rules: []\n", encoding="utf-8")

    objects = kustomized(own)

    assert faults(objects, namespace="llm") == []
    configuration = the(objects, "ConfigMap")
    assert configuration["data"] == {"balancer.yaml": "rules: []\n"}
    workload = gateway(objects)
    assert container(workload)["image"] == "registry.example.com/team/llm-balancer:0.1.0"
    volumes = workload["spec"]["template"]["spec"]["volumes"]
    assert configuration["metadata"]["name"] in [volume.get("configMap", {}).get("name") for volume in volumes]


def test_the_example_configuration_is_one_that_the_program_takes() -> None:
    text = (K8S / "base" / "balancer.yaml").read_text(encoding="utf-8")

    reading = document.read(document.parse(text), door="strict")

    assert reading.warnings == ()
    assert len(reading.configuration.rules) == 2


# -- what is made from something else ----------------------------------------------------------------------------------


@pytest.mark.needs("npm:helm")
def test_the_manifests_are_among_what_is_made_and_nothing_else_lies_there() -> None:
    made = files()
    folders = [*(CHART / "files").iterdir(), *PLACES.values()]
    by_hand = {"values.yaml", "balancer.yaml"}

    lying = {path.relative_to(ROOT).as_posix() for folder in folders for path in folder.iterdir()}

    made_there = {name for name in made if (ROOT / name).parent in folders}
    assert made_there <= lying
    assert {name for name in lying - made_there if Path(name).name not in by_hand} == set()


def test_every_value_has_a_meaning_in_the_readme() -> None:
    """Its own, or that of the structure it is in."""
    readme = chart_files()["deploy/helm/balancer/README.md"]
    rows = re.findall(r"^\| `([\w.]+)` \| (.*?) \| (.*?) \|$", readme, re.MULTILINE)
    told = {name for name, _, meaning in rows if meaning}

    def is_told(name: str) -> bool:
        return name in told or name.rpartition(".")[0] in told

    assert len(rows) > 120
    assert [name for name, _, _ in rows if not is_told(name)] == []


def test_a_patch_adds_changes_and_takes_away() -> None:
    old = {"a": 1, "b": {"c": 1, "d": 2}, "env": [{"name": "x", "value": "1"}, {"name": "y", "value": "2"}], "l": [1]}
    new = {
        "b": {"c": 1, "d": 3},
        "env": [{"name": "x", "valueFrom": {}}, {"name": "z", "value": "3"}],
        "l": [2],
        "e": 5,
    }

    assert patch(old, new) == {
        "a": None,
        "b": {"d": 3},
        "env": [
            {"name": "x", "value": None, "valueFrom": {}},
            {"name": "z", "value": "3"},
            {"name": "y", "$patch": "delete"},
        ],
        "l": [2],
        "e": 5,
    }
