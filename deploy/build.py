"""What is made from something else below `deploy/`, for `make docs`.

The chart's README is made from the comments in values.yaml, the schema of its `settings` from config.py, and its copies
of alerts and dashboards from `grafana/`, since Helm reads nothing outside a chart. The manifests in deploy/k8s are the
chart rendered with the values that lie there, and taken apart: objects for the base, new objects and patches for each
overlay.
"""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from balancer import __version__, config
from grafana import build as grafana

ROOT = Path(__file__).resolve().parent.parent
CHART = ROOT / "deploy" / "helm" / "balancer"
K8S = ROOT / "deploy" / "k8s"
RELEASE = "balancer"

Object = dict[str, Any]

SET_BY = {
    "config": "config",
    "redis": "redis",
    "port": "ports.http",
    "metrics_port": "ports.metrics",
    "admin_port": "ports.admin",
    "admin_host": "admin.expose",
    "admin_token": "admin.existingSecret",
    "admin_tokens": "admin.listKey",
    "client_tokens": "clients.existingSecret",
    "insecure": "insecure",
    "secret_key": "secretKey.existingSecret",
    "secret_key_also": "secretKey.alsoKey",
    "tls_cert_file": "tls.existingSecret",
    "tls_key_file": "tls.existingSecret",
    "workers": "workers",
    "outbox_dir": "outbox.mode",
    "drain_delay_s": "drain.delaySeconds",
    "drain_timeout_s": "drain.timeoutSeconds",
    "access_log": "accessLog",
    "otel": "otel.enabled",
}
"""Settings that have a value of their own in the chart; all others are under `settings`."""

OVERLAYS = {"trial-valkey": "base", "production": "base", "monitored": "production", "sentinel": "production"}
"""Each overlay, and what it stands on."""

_MERGE_KEYS = {
    "containers": "name",
    "env": "name",
    "volumes": "name",
    "volumeMounts": "mountPath",
    "ports": "containerPort",
}
"""Lists that kustomize merges by a key of their items (of those that occur here); all others it replaces."""

_LABELS = {
    "app.kubernetes.io/name": "balancer",
    "app.kubernetes.io/instance": RELEASE,
    "app.kubernetes.io/version": __version__,
}

_ABOUT = {
    "base": """\
# Two pods over a Redis of yours. Put an overlay of your own on top, with your image, namespace and configuration:
#
#   resources: [../base]
#   namespace: llm
#   images: [{name: llm-balancer, newName: registry.example.com/team/llm-balancer}]
#   configMapGenerator: [{name: balancer-config, behavior: replace, files: [balancer.yaml]}]
#
# It names these Secrets: balancer-clients (tokens), balancer-redis (url), balancer-providers (a variable a key).
""",
    "trial-valkey": """\
# One pod and a Valkey of its own. Beside the Secrets of the base it names balancer-valkey (password: letters and
# digits), and no balancer-redis.
""",
    "production": """\
# The base with an autoscaler, a network policy, sealed credentials and a token for the admin API. Beside the Secrets of
# the base it names balancer-secret-key (secret-key: `openssl rand -base64 32`) and balancer-admin (token).
""",
    "monitored": """\
# Production, for a cluster with the Prometheus Operator and the dashboards' sidecar of Grafana's chart.
""",
    "sentinel": """\
# Production over Redis with Sentinel; name your sentinels in a patch of your own. In balancer-redis it wants the keys
# password and sentinel-password instead of url, percent-encoded.
""",
}

_OF_HELM = ("helm.sh/chart", "app.kubernetes.io/managed-by")
_BANNER = "# Made by `make docs`; do not edit.\n"


def files() -> dict[str, str]:
    """The text of every file that is made, by its path in the repository; without Helm not of those in deploy/k8s."""
    made = chart_files()
    helm = helm_program()
    return made | manifests(helm, made) if helm else made


def chart_files() -> dict[str, str]:
    """The text of the files in the chart that are made, by their paths in the repository."""
    chart = CHART.relative_to(ROOT).as_posix()
    made = {f"{chart}/README.md": _readme(), f"{chart}/values.schema.json": _schema()}
    alerts = ROOT / "grafana" / "alerts" / "balancer.yaml"
    made[f"{chart}/files/alerts/{alerts.name}"] = alerts.read_text(encoding="utf-8")
    dashboards = {Path(name).name: text for name, text in grafana.files().items()}
    made |= {f"{chart}/files/dashboards/{name}": text for name, text in dashboards.items()}
    made[f"{chart}/files/dashboards/kustomization.yaml"] = _dashboards(dashboards)
    return made


def manifests(helm: str, chart: dict[str, str]) -> dict[str, str]:
    """The text of every manifest in deploy/k8s that is made from the chart, by its path in the repository."""
    with tempfile.TemporaryDirectory() as folder:
        copied = Path(folder, CHART.name)
        # With what is to be made, which need not be written yet.
        shutil.copytree(CHART, copied)
        for name, text in chart.items():
            path = copied / (ROOT / name).relative_to(CHART)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        # ConfigMaps are made by kustomize: the configuration from base/balancer.yaml, dashboards beside their files.
        made = {
            place: {_name(item): plain(item) for item in rendered(helm, place, copied) if item["kind"] != "ConfigMap"}
            for place in ("base", *OVERLAYS)
        }
    texts = {}
    for place, objects in made.items():
        below = made[OVERLAYS[place]] if place in OVERLAYS else {}
        if gone := below.keys() - objects.keys():
            raise ValueError(f"{place}/values.yaml takes away {sorted(gone)}: overlays only add and change")
        folder = f"deploy/k8s/overlays/{place}" if place in OVERLAYS else f"deploy/k8s/{place}"
        resources, patches = {}, {}
        for name, item in objects.items():
            if name not in below:
                resources[f"{_file(name)}.yaml"] = item
            elif item != below[name]:
                head = {"apiVersion": item["apiVersion"], "kind": item["kind"]}
                head["metadata"] = {"name": item["metadata"]["name"]}
                patches[f"{_file(name)}-patch.yaml"] = head | patch(below[name], item)
        for name, item in (resources | patches).items():
            texts[f"{folder}/{name}"] = _BANNER + _yaml(item)
        texts[f"{folder}/kustomization.yaml"] = _kustomization(place, list(resources), list(patches))
    return texts


def _kustomization(place: str, resources: list[str], patches: list[str]) -> str:
    made: Object = {"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization"}
    if place in OVERLAYS:
        below = OVERLAYS[place]
        resources = [f"../{below}" if below in OVERLAYS else f"../../{below}", *resources]
    if place == "monitored":
        resources.append("../../../helm/balancer/files/dashboards")
    made["resources"] = resources
    if patches:
        made["patches"] = [{"path": name} for name in patches]
    if place == "base":
        made["configMapGenerator"] = [
            {"name": f"{RELEASE}-config", "files": ["balancer.yaml"], "options": {"labels": _LABELS}}
        ]
    return _BANNER + _ABOUT[place] + _yaml(made)


def rendered(helm: str, place: str, chart: Path = CHART) -> list[Object]:
    """The objects of the chart with the values of the base, or of an overlay and all that it stands on."""
    chain = []
    while place != "base":
        chain.append(K8S / "overlays" / place / "values.yaml")
        place = OVERLAYS[place]
    chain.append(K8S / "base" / "values.yaml")
    configuration = yaml.safe_load((K8S / "base" / "balancer.yaml").read_text(encoding="utf-8"))
    arguments = ["--set-json", f"config={json.dumps(configuration)}"]
    arguments += [part for path in reversed(chain) for part in ("--values", str(path))]
    return template(helm, RELEASE, *arguments, chart=chart)


def template(
    helm: str, release: str, *arguments: str, values: Object | None = None, chart: Path = CHART
) -> list[Object]:
    """The objects that `helm template` makes of the chart. Raises CalledProcessError when it refuses the values."""
    command = [helm, "template", release, str(chart), "--values", "-", *arguments]
    text = subprocess.run(command, input=json.dumps(values or {}), capture_output=True, check=True, text=True).stdout
    return [item for item in yaml.safe_load_all(text) if item]


def plain(item: Object) -> Object:
    """The object without what only Helm's releases have: labels, digests, the namespace."""
    item = copy.deepcopy(item)
    item["metadata"].pop("namespace", None)
    template_of = item["spec"]["template"] if item["kind"] in ("Deployment", "StatefulSet") else {"metadata": {}}
    for metadata in (item["metadata"], template_of["metadata"]):
        labels, annotations = metadata.get("labels", {}), metadata.get("annotations", {})
        for name in _OF_HELM:
            labels.pop(name, None)
        for name in [name for name in annotations if name.startswith("checksum/")]:
            annotations.pop(name)
    if item["kind"] == "ServiceMonitor":
        # The chart names the release's namespace; without one, the operator looks in the monitor's own.
        item["spec"].pop("namespaceSelector")
    return item


def patch(old: Any, new: Any) -> Any:
    """The strategic merge patch that makes the new object of the old one."""
    changes: Object = {}
    for key in [*old, *(key for key in new if key not in old)]:
        if key not in new:
            changes[key] = None
        elif key not in old or old[key] == new[key]:
            if key not in old:
                changes[key] = new[key]
        elif isinstance(old[key], dict) and isinstance(new[key], dict):
            changes[key] = patch(old[key], new[key])
        elif key in _MERGE_KEYS and isinstance(old[key], list):
            changes[key] = _patch_of_list(old[key], new[key], _MERGE_KEYS[key])
        else:
            changes[key] = new[key]
    return changes


def _patch_of_list(old: list[Object], new: list[Object], key: str) -> list[Object]:
    before, after = ({item[key]: item for item in items} for items in (old, new))
    changes = [
        {key: name} | patch(before.get(name, {}), item) for name, item in after.items() if before.get(name) != item
    ]
    return changes + [{key: name, "$patch": "delete"} for name in before if name not in after]


def _name(item: Object) -> str:
    return f"{item['kind'].lower()}-{item['metadata']['name']}"


def _file(name: str) -> str:
    """deployment-balancer is deployment, service-balancer-pods is service-pods."""
    kind, _, rest = name.partition("-")
    return kind + rest.removeprefix(RELEASE)


class _Dumper(yaml.SafeDumper):
    """Texts of several lines as blocks, and no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        """True: what occurs twice is written twice."""
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _represent_text)


def _yaml(value: object) -> str:
    text: str = yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=116)
    return text


# -- the chart's own files ---------------------------------------------------------------------------------------------


def _schema() -> str:
    """values.schema.json, its `settings` by config.py."""
    path = CHART / "values.schema.json"
    schema = json.loads(path.read_text(encoding="utf-8"))
    kinds = {bool: "boolean", int: "integer", float: "number", str: "string"}
    schema["properties"]["settings"]["properties"] = {
        setting.name: {"type": kinds[type(setting.default)], "description": setting.meaning}
        for setting in config.SETTINGS
        if setting.name not in SET_BY
    }
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


def _dashboards(names: Iterable[str]) -> str:
    """A kustomization of the dashboards, each a ConfigMap as the chart makes it."""
    labels = _LABELS | {"grafana_dashboard": "1"}
    generators = [
        {"name": f"{RELEASE}-{name.removesuffix('.json')}"[:63].rstrip("-"), "files": [name]} for name in names
    ]
    return _BANNER + _yaml(
        {
            "apiVersion": "kustomize.config.k8s.io/v1beta1",
            "kind": "Kustomization",
            "generatorOptions": {"disableNameSuffixHash": True, "labels": labels},
            "configMapGenerator": generators,
        }
    )


_README = """\
<!-- Made by `make docs` from values.yaml; do not edit. -->
# Chart `balancer`

The balancer on Kubernetes >= 1.30, with Redis or Valkey outside the chart, or with a small Valkey in it for trials. The
[README](../../../README.md#on-kubernetes) goes through an installation from building the image to uninstalling.

Values that cannot work are refused before anything is installed, each with what to do; `helm template` tells them too.
Secrets are named, never given, but for `trial`. A changed configuration replaces the pods; a changed Secret, or a
ConfigMap of your own, does not: `kubectl rollout restart` does.

With `autoscaling.openRequests` the autoscaler asks a custom metrics API for the open requests of each pod. For
prometheus-adapter:

```yaml
rules:
  - seriesQuery: balancer_open_requests{namespace!="",pod!=""}
    resources: {overrides: {namespace: {resource: namespace}, pod: {resource: pod}}}
    metricsQuery: sum(<<.Series>>{<<.LabelMatchers>>}) by (<<.GroupBy>>)
```

## Values

| value | default | meaning |
|---|---|---|
"""


def _readme() -> str:
    text = (CHART / "values.yaml").read_text(encoding="utf-8")
    lines = text.splitlines()
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    assert isinstance(root, yaml.MappingNode)
    rows = [
        f"| `{name}` | {default} | {meaning} |"
        for name, default, meaning in _rows(root, yaml.safe_load(text), lines, "")
    ]
    settings = [
        f"| `settings.{setting.name}` |  | `{setting.variable}`: {setting.meaning} |"
        for setting in config.SETTINGS
        if setting.name not in SET_BY
    ]
    place = next(i for i, row in enumerate(rows) if row.startswith("| `settings`"))
    rows[place + 1 : place + 1] = settings
    return _README + "\n".join(rows) + "\n"


def _rows(node: yaml.MappingNode, values: Object, lines: list[str], prefix: str) -> Iterator[tuple[str, str, str]]:
    """Name, default and meaning of every value, in the order of the file."""
    for key, child in node.value:
        name, value = prefix + key.value, values[key.value]
        meaning = comment_above(lines, key.start_mark.line).replace("|", "\\|")
        is_leaf = not isinstance(child, yaml.MappingNode) or child.flow_style or _has_no_comments(child, lines)
        if is_leaf:
            shown = json.dumps(value, ensure_ascii=False)
            yield name, f"`{shown}`" if len(shown) <= 72 else "see values.yaml", meaning
        else:
            if meaning:
                yield name, "", meaning
            yield from _rows(child, value, lines, f"{name}.")


def _has_no_comments(node: yaml.MappingNode, lines: list[str]) -> bool:
    """True for a structure of Kubernetes' own, which is one value."""
    return all(isinstance(child, yaml.MappingNode) for _, child in node.value) and not any(
        comment_above(lines, key.start_mark.line) for key, _ in node.value
    )


def comment_above(lines: list[str], line: int) -> str:
    """The comment that ends above a line, at the same indentation, as one paragraph."""
    indent = lines[line][: len(lines[line]) - len(lines[line].lstrip())]
    found: list[str] = []
    while line > 0 and lines[line - 1].startswith(f"{indent}# "):
        line -= 1
        found.insert(0, lines[line].strip().removeprefix("# "))
    return " ".join(found)


# -- Helm --------------------------------------------------------------------------------------------------------------


def helm_program() -> str | None:
    """Helm on PATH, or where the gate puts it."""
    return shutil.which("helm") or shutil.which("helm", path=ROOT / ".cache" / "kubernetes" / "helm")
