"""The chart as Kubernetes gets to see it: rendered objects, and what must hold of any set of them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import kubernetes_validate  # type: ignore[import-untyped]  # it has no types

from balancer import config
from balancer.cli import serve
from deploy.build import Object, template
from tests import needs

NAMESPACE = "llm"
WORKLOADS = ("Deployment", "StatefulSet")
SECRETS_OF_OURS = (
    *("BALANCER_CLIENT_TOKENS", "BALANCER_ADMIN_TOKEN", "BALANCER_SECRET_KEY", "BALANCER_SECRET_KEY_ALSO"),
)

CONFIG: Object = {
    "providers": [{"name": "openai", "api_base": "https://api.openai.com/v1", "token": "${OPENAI_KEY}"}],
    "rules": [{"request_model": "gpt-5", "services": [{"provider": "openai", "model": "gpt-5"}]}],
}
LEAST: Object = {"clients": {"existingSecret": "the-clients"}, "redis": {"existingSecret": "the-redis"}}
"""The values that nobody can do without."""


def render(values: Object, release: str = "r", namespace: str = NAMESPACE) -> list[Object]:
    """The objects of the chart. Raises CalledProcessError whose stderr tells why not."""
    helm = needs.program("npm:helm")
    assert helm
    return template(helm, release, "--namespace", namespace, values=values)


def validate(objects: list[Object], version: str) -> None:
    """Raises ValidationError for an object that this version of Kubernetes does not take."""
    for item in objects:
        # Of what operators define there is no schema.
        if item["kind"] not in ("ServiceMonitor", "PrometheusRule"):
            kubernetes_validate.validate(item, version, strict=True)


def of_kind(objects: list[Object], *kinds: str) -> list[Object]:
    """The objects of these kinds."""
    return [item for item in objects if item["kind"] in kinds]


def the(objects: list[Object], kind: str, suffix: str = "") -> Object:
    """The only object of a kind whose name ends so."""
    (found,) = [item for item in of_kind(objects, kind) if item["metadata"]["name"].endswith(suffix)]
    return found


def gateway(objects: list[Object]) -> Object:
    """The workload of the balancer itself."""
    (found,) = [
        item
        for item in of_kind(objects, *WORKLOADS)
        if item["metadata"]["labels"]["app.kubernetes.io/component"] == "gateway"
    ]
    return found


def pod(workload: Object) -> Object:
    """The spec of its pods."""
    spec: Object = workload["spec"]["template"]["spec"]
    return spec


def container(workload: Object) -> Object:
    """The only container of its pods."""
    (only,) = pod(workload)["containers"]
    found: Object = only
    return found


def environment(
    workload: Object, secrets: dict[str, dict[str, str]], fields: dict[str, str] | None = None
) -> dict[str, str]:
    """The container's variables as the kubelet sets them: Secrets looked up, $(NAME) of earlier ones put in."""
    found: dict[str, str] = {}
    for source in container(workload).get("envFrom", []):
        found |= secrets[source["secretRef"]["name"]]
    for entry in container(workload)["env"]:
        reference = entry.get("valueFrom", {})
        if "secretKeyRef" in reference:
            value = secrets[reference["secretKeyRef"]["name"]][reference["secretKeyRef"]["key"]]
        elif "fieldRef" in reference:
            value = (fields or {}).get(reference["fieldRef"]["fieldPath"], "a-field")
        else:
            value = re.sub(r"\$\((\w+)\)", lambda match: found.get(match[1], match[0]), entry["value"])
        found[entry["name"]] = value
    return found


def secret_references(value: Any) -> Iterator[str]:
    """The names of all Secrets that a structure refers to."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key in ("secretKeyRef", "secretRef", "secret") and isinstance(inner, dict):
                yield inner.get("name") or inner["secretName"]
            yield from secret_references(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from secret_references(inner)


def faults(objects: list[Object], namespace: str | None = NAMESPACE) -> list[str]:
    """What is wrong with the objects, whatever the values were; one line each."""
    found = [fault for item in objects for fault in _faults_of_names(item, namespace)]
    names = [(item["kind"], item["metadata"]["name"]) for item in objects]
    found += [f"{kind} {name} occurs twice" for kind, name in set(names) if names.count((kind, name)) > 1]
    for workload in of_kind(objects, *WORKLOADS):
        found += [f"{workload['metadata']['name']}: {fault}" for fault in _faults_of_pods(workload)]
    found += _faults_of_selectors(objects)
    found += _faults_of_the_end(gateway(objects))
    return found


def _faults_of_names(item: Object, namespace: str | None) -> Iterator[str]:
    metadata = item["metadata"]
    place = f"{item['kind']} {metadata['name']}"
    # `kubectl apply` keeps the object in an annotation of itself.
    if len(json.dumps(item)) > 256 * 1024:
        yield f"{place}: too large to be applied"
    if len(metadata["name"]) > 63 or not re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", metadata["name"]):
        yield f"{place}: no DNS label"
    # A StatefulSet's pods carry its name, a dash and ten letters in a label.
    if item["kind"] == "StatefulSet" and len(metadata["name"]) > 52:
        yield f"{place}: too long for the labels of its pods"
    if metadata.get("namespace") != namespace:
        yield f"{place}: in namespace {metadata.get('namespace')}"
    for name, value in metadata["labels"].items():
        if not isinstance(value, str) or not re.fullmatch(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?", value):
            yield f"{place}: label {name}: {value!r}"


def _faults_of_pods(workload: Object) -> Iterator[str]:
    spec, only = pod(workload), container(workload)
    security = spec["securityContext"]
    if security["runAsNonRoot"] is not True or security["seccompProfile"] != {"type": "RuntimeDefault"}:
        yield "may run as root, or without seccomp"
    if not security.get("runAsUser", 10001):
        yield "runs as root"
    if only["securityContext"] != {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }:
        yield "the container may do more than it needs"
    if spec["automountServiceAccountToken"] is not False or spec["enableServiceLinks"] is not False:
        yield "a token, or service links"
    for key in ("hostNetwork", "hostPID", "hostIPC"):
        if spec.get(key):
            yield key
    ports = {port["name"] for port in only["ports"]}
    for name in ("startupProbe", "livenessProbe", "readinessProbe"):
        action = only[name].get("httpGet") or only[name]["tcpSocket"]
        if action["port"] not in ports:
            yield f"{name} asks a port that is not there"
    if not only["resources"]["requests"].keys() >= {"cpu", "memory"}:
        yield "asks for no resources"
    volumes = [volume["name"] for volume in spec.get("volumes", [])]
    volumes += [claim["metadata"]["name"] for claim in workload["spec"].get("volumeClaimTemplates", [])]
    mounts = only["volumeMounts"]
    if sorted(mount["name"] for mount in mounts) != sorted(volumes):
        yield f"volumes {volumes} are not those mounted"
    paths = [mount["mountPath"] for mount in mounts]
    # Nothing can be mounted inside a volume that is read-only.
    if nested := [path for path in paths if any(path.startswith(f"{other}/") for other in paths)]:
        yield f"mounted inside another volume: {nested}"
    if not {"/tmp"} <= {mount["mountPath"] for mount in mounts if not mount.get("readOnly")}:  # noqa: S108  a mount
        yield "there is nowhere to write"
    variables = [entry["name"] for entry in only["env"]]
    if repeated := {name for name in variables if variables.count(name) > 1}:
        yield f"variables set twice: {sorted(repeated)}"
    for number, entry in enumerate(only["env"]):
        for name in re.findall(r"\$\((\w+)\)", entry.get("value", "")):
            if name not in variables[:number]:
                yield f"{entry['name']} refers to {name}, which is not set before it"
        if entry["name"] in SECRETS_OF_OURS and "value" in entry:
            yield f"{entry['name']} is a literal"


def _faults_of_selectors(objects: list[Object]) -> Iterator[str]:
    workloads = of_kind(objects, *WORKLOADS)
    labels = {item["metadata"]["name"]: item["spec"]["template"]["metadata"]["labels"] for item in workloads}
    ports = {item["metadata"]["name"]: {port["name"] for port in container(item)["ports"]} for item in workloads}

    def selected(selector: dict[str, str]) -> list[str]:
        return [name for name, given in labels.items() if selector.items() <= given.items()]

    for item in workloads:
        if selected(item["spec"]["selector"]["matchLabels"]) != [item["metadata"]["name"]]:
            yield f"{item['metadata']['name']}: its selector is not that of its pods alone"
        for spread in pod(item).get("topologySpreadConstraints", []):
            if selected(spread["labelSelector"]["matchLabels"]) != [item["metadata"]["name"]]:
                yield f"{item['metadata']['name']}: spreads other pods"
    for item in of_kind(objects, "Service", "PodDisruptionBudget", "NetworkPolicy"):
        place = f"{item['kind']} {item['metadata']['name']}"
        spec = item["spec"]
        found = selected(spec.get("podSelector", spec.get("selector", {})).get("matchLabels", spec.get("selector")))
        if len(found) != 1:
            yield f"{place}: selects {found}"
            continue
        named = [port["targetPort"] for port in spec.get("ports", [])]
        named += [port["port"] for rule in spec.get("ingress") or [] for port in rule["ports"]]
        if unknown := set(named) - ports[found[0]]:
            yield f"{place}: {found[0]} has no port {unknown}"
        for rule in (spec.get("egress") or []) + (spec.get("ingress") or []):
            for peer in rule.get("to", []) + rule.get("from", []):
                own = peer.get("podSelector", {}).get("matchLabels", {})
                if "app.kubernetes.io/instance" in own and len(selected(own)) != 1:
                    yield f"{place}: a peer of ours selects {selected(own)}"
    for item in of_kind(objects, "HorizontalPodAutoscaler"):
        target = item["spec"]["scaleTargetRef"]
        if [target["kind"], target["name"]] != [gateway(objects)["kind"], gateway(objects)["metadata"]["name"]]:
            yield "the autoscaler scales something else"
        if "replicas" in gateway(objects)["spec"]:
            yield "an upgrade would undo what the autoscaler did"
    for item in of_kind(objects, "ServiceMonitor"):
        wanted = item["spec"]["selector"]["matchLabels"]
        services = [
            {port["name"] for port in service["spec"]["ports"]}
            for service in of_kind(objects, "Service")
            if wanted.items() <= service["metadata"]["labels"].items()
        ]
        if services != [{endpoint["port"] for endpoint in item["spec"]["endpoints"]}]:
            yield f"the monitor finds {services}"


def _faults_of_the_end(workload: Object) -> Iterator[str]:
    values = {entry["name"]: entry.get("value", "") for entry in container(workload)["env"]}
    sleeps = container(workload).get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
    needed = (
        sleeps + float(values["BALANCER_DRAIN_DELAY_S"]) + float(values["BALANCER_DRAIN_TIMEOUT_S"]) + serve._EXTRA_S
    )
    grace = pod(workload)["terminationGracePeriodSeconds"]
    if grace <= needed:
        yield f"killed after {grace} s, and needs {needed}"


KNOWN_VARIABLES = {setting.variable for setting in config.SETTINGS}
