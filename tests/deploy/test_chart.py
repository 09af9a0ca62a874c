"""The Helm chart, with every option on and off: what it renders is valid, safe, and what the program reads."""

from __future__ import annotations

import copy
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

import balancer
from balancer import config, document
from balancer.store.topology import Topology
from deploy.build import CHART, ROOT, SET_BY, Object
from tests import needs
from tests.deploy.rendering import (
    CONFIG,
    KNOWN_VARIABLES,
    LEAST,
    container,
    environment,
    faults,
    gateway,
    of_kind,
    render,
    secret_references,
    the,
    validate,
)

pytestmark = pytest.mark.needs("npm:helm")

VERSIONS = ("1.31", "1.34", "1.37")
LONG = "a-release-with-a-name-that-is-as-long-as-helm-allows"


def over(*values: Object) -> Object:
    """The values, each over those before it."""
    merged: Object = {}
    for layer in values:
        for key, value in copy.deepcopy(layer).items():
            merged[key] = over(merged[key], value) if isinstance(merged.get(key), dict) else value
    return merged


ALL: Object = over(
    LEAST,
    {
        "image": {"repository": "registry.example.com/team/llm-balancer", "pullSecrets": ["the-registry"]},
        "commonLabels": {"team": "blue"},
        "podLabels": {"tier": "edge"},
        "podAnnotations": {"a": "b"},
        "workers": 4,
        "config": CONFIG,
        "credentials": {"environment": ["the-providers"], "files": ["the-files", "more-files"]},
        "secretKey": {"existingSecret": "the-key", "alsoKey": "old-key"},
        "admin": {"existingSecret": "the-admin", "listKey": "list", "expose": True},
        "redis": {"tls": {"existingSecret": "the-ca"}},
        "tls": {"existingSecret": "the-certificate"},
        "otel": {"enabled": True, "endpoint": "http://collector.monitoring:4318", "headersSecret": "the-headers"},
        "extraEnv": [{"name": "HTTPS_PROXY", "value": "http://proxy:3128"}],
        "extraEnvFrom": [{"secretRef": {"name": "the-rest"}}],
        "extraVolumes": [{"name": "ca", "configMap": {"name": "our-ca"}}],
        "extraVolumeMounts": [{"name": "ca", "mountPath": "/etc/our-ca", "readOnly": True}],
        "service": {"type": "LoadBalancer", "annotations": {"c": "d"}, "loadBalancerSourceRanges": ["10.0.0.0/8"]},
        "ingress": {
            "enabled": True,
            "className": "nginx",
            "annotations": {"nginx.ingress.kubernetes.io/proxy-read-timeout": "1800"},
            "hosts": ["llm.example.com", "llm.example.org"],
            "tls": [{"hosts": ["llm.example.com"], "secretName": "llm-tls"}],
        },
        "autoscaling": {"enabled": True, "openRequests": 64},
        "networkPolicy": {
            "enabled": True,
            "clients": [{"namespaceSelector": {}}],
            "adminClients": [{"podSelector": {"matchLabels": {"role": "operator"}}}],
            "extraEgress": [
                {"to": [{"ipBlock": {"cidr": "10.1.0.0/16"}}], "ports": [{"port": 8000, "protocol": "TCP"}]}
            ],
        },
        "metrics": {
            "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
            "prometheusRule": {"enabled": True, "labels": {"release": "prometheus"}},
            "dashboards": {"enabled": True, "annotations": {"grafana_folder": "Balancer"}},
        },
        "serviceAccount": {"annotations": {"e": "f"}},
        "affinity": {
            "nodeAffinity": {
                "requiredDuringSchedulingIgnoredDuringExecution": {
                    "nodeSelectorTerms": [
                        {"matchExpressions": [{"key": "kubernetes.io/arch", "operator": "In", "values": ["amd64"]}]}
                    ]
                }
            }
        },
        "nodeSelector": {"pool": "edge"},
        "tolerations": [{"key": "edge", "operator": "Exists"}],
        "priorityClassName": "system-cluster-critical",
    },
)
SENTINELS: Object = {
    "mode": "sentinel",
    "existingSecret": "",
    "nodes": ["s-0.redis:26379", "s-1.redis", "[fd00::1]:26380"],
    "database": 3,
    "auth": {"existingSecret": "the-users", "usernameKey": "user"},
    "sentinelAuth": {"existingSecret": "the-sentinels", "usernameKey": "user"},
}
MATRIX: dict[str, Object] = {
    "the least": LEAST,
    "everything": ALL,
    "nobody asked who they are": over(LEAST, {"clients": {"existingSecret": ""}, "insecure": True}),
    "a trial": {
        "trial": {"enabled": True, "clientTokens": "a,b", "redisPassword": "c1", "credentials": {"OPENAI_KEY": "sk"}},
        "redis": {"mode": "valkey"},
        "config": CONFIG,
        "networkPolicy": {"enabled": True},
    },
    "a Valkey without a disk": over(
        LEAST,
        {"redis": {"mode": "valkey", "existingSecret": ""}, "valkey": {"existingSecret": "the-valkey"}},
        {"valkey": {"persistence": {"enabled": False}}, "commonLabels": {"team": "blue"}},
    ),
    "sentinels": over(LEAST, {"redis": SENTINELS, "networkPolicy": {"enabled": True}}),
    "sentinels over TLS": over(
        LEAST,
        {"redis": SENTINELS},
        {"redis": {"tls": {"enabled": True, "existingSecret": "the-ca", "clientCertificate": True}}},
    ),
    "a Cluster": over(
        LEAST,
        {"redis": {"mode": "cluster", "existingSecret": "", "nodes": ["a:7000", "b:7001"]}},
        {"networkPolicy": {"enabled": True, "redis": [{"ipBlock": {"cidr": "10.2.0.0/16"}}], "monitoring": []}},
    ),
    "a volume that outlives its pod": over(
        LEAST, {"outbox": {"mode": "persistent", "storageClassName": "fast"}, "autoscaling": {"enabled": True}}
    ),
    "a volume of each pod": over(LEAST, {"outbox": {"mode": "ephemeral", "size": "5Gi"}}),
    "no outbox": over(LEAST, {"outbox": {"mode": "none"}, "drain": {"preStopSleepSeconds": 0, "delaySeconds": 0.5}}),
    "an outbox of any size": over(
        LEAST, {"outbox": {"sizeLimit": ""}, "existingConfigMap": {"name": "own", "key": "c"}}
    ),
    "as little as possible": over(
        LEAST,
        {
            "serviceAccount": {"create": False},
            "podDisruptionBudget": {"enabled": False},
            "topologySpread": {"enabled": False},
            "runAsUser": None,
            "accessLog": False,
            "image": {"digest": "sha256:" + "0" * 64},
            "resources": {"requests": {"cpu": "100m", "memory": "64Mi"}},
        },
    ),
}
SECRETS = {
    "the-clients": {"tokens": "one,two"},
    "the-redis": {"url": "redis://:secret@redis.internal:6379/0"},
    "the-valkey": {"password": "p1"},
    "the-users": {"user": "balancer", "password": "p%2F2"},
    "the-sentinels": {"user": "watcher", "password": "p3"},
    "the-admin": {"token": "admin-token", "list": "ann:viewer:the-token-of-ann"},
    "the-key": {"secret-key": "A" * 43 + "=", "old-key": "B" * 42 + "A="},
    "the-headers": {"OTEL_EXPORTER_OTLP_HEADERS": "x=y"},
    "the-providers": {"OPENAI_KEY": "sk-1"},
    "the-rest": {"REST": "r"},
}


def secrets_of(objects: list[Object]) -> dict[str, dict[str, str]]:
    """The Secrets that exist: ours, and those that the chart makes."""
    return SECRETS | {item["metadata"]["name"]: item["stringData"] for item in of_kind(objects, "Secret")}


@pytest.fixture(scope="module")
def rendered() -> dict[str, list[Object]]:
    """The objects of the whole matrix."""
    return {name: render(values) for name, values in MATRIX.items()}


@pytest.mark.parametrize("version", VERSIONS)
def test_what_it_renders_is_valid_for_three_versions_of_kubernetes(
    rendered: dict[str, list[Object]], version: str
) -> None:
    different = {json.dumps(item): item for objects in rendered.values() for item in objects}

    validate(list(different.values()), version)


@pytest.mark.parametrize("name", MATRIX)
def test_what_it_renders_is_safe_and_holds_together(rendered: dict[str, list[Object]], name: str) -> None:
    assert faults(rendered[name]) == []


@pytest.mark.parametrize("name", MATRIX)
def test_the_program_reads_the_variables(rendered: dict[str, list[Object]], name: str) -> None:
    values = environment(gateway(rendered[name]), secrets_of(rendered[name]))

    settings = config.load(environ=values)

    assert settings.listen_host == "0.0.0.0"
    assert settings.port == 8080
    assert settings.metrics_port == 9464
    assert settings.outbox_dir == ("" if name == "no outbox" else "/var/lib/balancer/outbox")
    if "ssl_" not in settings.redis:
        Topology(settings.redis)
    else:
        Topology(settings.redis.partition("?")[0])


@pytest.mark.parametrize("name", MATRIX)
def test_secrets_are_named_in_the_values_and_literal_only_in_a_trial(
    rendered: dict[str, list[Object]], name: str
) -> None:
    objects = rendered[name]
    made = {item["metadata"]["name"] for item in of_kind(objects, "Secret")}

    assert bool(made) == (name == "a trial")
    text = json.dumps(MATRIX[name])
    assert [found for found in secret_references(objects) if found not in made and f'"{found}"' not in text] == []


@pytest.mark.parametrize("release", [LONG, "balancer", "my-balancer"])
def test_a_long_name_of_a_release_leaves_names_valid_and_different(release: str) -> None:
    for values in (ALL, MATRIX["a trial"], MATRIX["a volume that outlives its pod"]):
        objects = render(values, release=release, namespace="elsewhere")

        assert faults(objects, namespace="elsewhere") == []


def test_every_setting_of_the_program_has_its_value() -> None:
    others = [setting for setting in config.SETTINGS if setting.name not in SET_BY]
    odd: dict[type, Any] = {
        bool: lambda v: not v,
        int: lambda v: v + 1_000_000,
        float: lambda v: v + 0.5,
        str: lambda v: v or "/a",
    }
    words = {"host": "::", "log_level": "debug", "loop": "uvloop", "otel_semconv": "1.36"}
    given = {setting.name: words.get(setting.name, odd[type(setting.default)](setting.default)) for setting in others}

    workload = gateway(render(over(ALL, {"settings": given})))

    settings = config.load(environ=environment(workload, SECRETS))
    assert {name: getattr(settings, name) for name in given} == given | {"data_dir": Path("/a"), "admin_hosts": ("/a",)}
    assert [setting.name for setting in others if given[setting.name] == setting.default] == []
    variables = {entry["name"] for entry in container(workload)["env"]} | {"BALANCER_INSECURE"}
    assert {setting.variable for setting in config.SETTINGS} <= variables
    assert {name for name in SET_BY if f"BALANCER_{name.upper()}" not in variables} == set()


def test_it_sets_no_variable_that_the_program_does_not_know(rendered: dict[str, list[Object]]) -> None:
    named = {entry["name"] for objects in rendered.values() for entry in container(gateway(objects))["env"]}

    assert {name for name in named if name.startswith("BALANCER_")} <= KNOWN_VARIABLES


def test_the_configuration_arrives_as_it_was_given() -> None:
    """Helm reads numbers as floating point and has its own ideas of printing them."""
    given = copy.deepcopy(CONFIG)
    given["rules"][0]["lb_tactic"] = {
        "type": "hybrid",
        "params": {"request_threshold": 1_000_000, "token_threshold": 123_456_789_012},
    }
    given["rules"][0]["smart_routing"] = []
    given["providers"][0]["headers"] = {"x-number": "1000000", "x-yes": "yes", "x-template": "{{ .Values }}"}

    text = the(render(over(LEAST, {"config": given})), "ConfigMap")["data"]["balancer.yaml"]

    assert document.parse(text) == given
    document.read(document.parse(text), door="strict")


def test_the_store_s_url_is_made_for_sentinels_and_clusters(rendered: dict[str, list[Object]]) -> None:
    urls = {
        name: environment(gateway(objects), secrets_of(objects))["BALANCER_REDIS"] for name, objects in rendered.items()
    }

    nodes = "s-0.redis:26379,s-1.redis,[fd00::1]:26380"
    assert urls["sentinels"] == (
        f"redis+sentinel://balancer:p%2F2@{nodes}/mymaster/3?sentinel_username=watcher&sentinel_password=p3"
    )
    assert urls["sentinels over TLS"] == (
        f"rediss+sentinel://balancer:p%2F2@{nodes}/mymaster/3?sentinel_username=watcher&sentinel_password=p3"
        "&ssl_ca_certs=/etc/redis-tls/ca.crt&ssl_certfile=/etc/redis-tls/tls.crt&ssl_keyfile=/etc/redis-tls/tls.key"
    )
    assert urls["a Cluster"] == "redis+cluster://a:7000,b:7001"
    assert urls["a trial"] == "redis://:c1@r-balancer-valkey:6379/0"


def test_the_network_policy_lets_out_what_is_needed_and_keeps_the_cloud_s_credentials_away(
    rendered: dict[str, list[Object]],
) -> None:
    def ports(name: str) -> list[list[int]]:
        policy = the(rendered[name], "NetworkPolicy", "r-balancer")
        for rule in policy["spec"]["egress"]:
            for peer in rule.get("to", []):
                if peer.get("ipBlock", {}).get("cidr") == "0.0.0.0/0":
                    assert peer["ipBlock"]["except"] == ["169.254.0.0/16"]
        return [[port["port"] for port in rule["ports"]] for rule in policy["spec"]["egress"]]

    assert ports("everything") == [[53, 53], [6379], [443], [4318], [8000]]
    assert ports("sentinels") == [[53, 53], [6379, 26379, 26380], [443]]
    assert ports("a Cluster") == [[53, 53], [6379, 7000, 7001], [443]]
    assert ports("a trial") == [[53, 53], [6379], [443]]
    doors = {
        rule["ports"][0]["port"]: rule.get("from")
        for rule in the(rendered["a trial"], "NetworkPolicy", "r-balancer")["spec"]["ingress"]
    }
    assert doors == {
        "http": None,
        "metrics": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}],
    }


def test_a_changed_configuration_replaces_the_pods_and_nothing_else_does() -> None:
    def annotations(values: Object) -> Object:
        found: Object = gateway(render(values))["spec"]["template"]["metadata"]["annotations"]
        return found

    first = annotations(over(LEAST, {"config": CONFIG}))
    edited = copy.deepcopy(CONFIG)
    edited["rules"][0]["request_model"] = "gpt-6"

    assert annotations(over(LEAST, {"config": edited})) != first
    assert annotations(over(LEAST, {"config": CONFIG, "replicas": 9, "ingress": {"className": "x"}})) == first


def test_resources_follow_the_workers() -> None:
    assert container(gateway(render(over(LEAST, {"workers": 3}))))["resources"] == {
        "requests": {"cpu": "3", "memory": "448Mi"},
        "limits": {"memory": "1664Mi"},
    }


def test_pods_are_scraped_unready_too_and_our_label_service_survives(rendered: dict[str, list[Object]]) -> None:
    (endpoint,) = the(rendered["everything"], "ServiceMonitor")["spec"]["endpoints"]
    service = the(rendered["everything"], "Service", "-pods")["spec"]

    assert service["publishNotReadyAddresses"] is True
    assert endpoint["relabelings"] == [{"action": "labeldrop", "regex": "service"}]
    assert endpoint["path"] == "/metrics"


def test_the_alerts_are_those_of_grafana_with_the_budget_and_runbooks_that_were_asked_for() -> None:
    text = (ROOT / "grafana" / "alerts" / "balancer.yaml").read_text(encoding="utf-8")
    asked = text.replace("vector(0.005)", "vector(0.001)").replace("docs/alerts.md#", "https://wiki/alerts#")
    assert "expr: vector(0.001)" in asked
    assert "runbook_url: https://wiki/alerts#" in asked
    rule = {"enabled": True, "errorBudget": 0.001, "runbooks": "https://wiki/alerts"}

    (usual,) = of_kind(render(over(LEAST, {"metrics": {"prometheusRule": {"enabled": True}}})), "PrometheusRule")
    (other,) = of_kind(render(over(LEAST, {"metrics": {"prometheusRule": rule}})), "PrometheusRule")

    assert usual["spec"]["groups"] == yaml.safe_load(text)["groups"]
    assert other["spec"]["groups"] == yaml.safe_load(asked)["groups"]


def test_every_dashboard_of_grafana_is_a_config_map_that_the_sidecar_finds(rendered: dict[str, list[Object]]) -> None:
    found = {
        name: json.loads(text)
        for item in of_kind(rendered["everything"], "ConfigMap")
        if item["metadata"]["labels"].get("grafana_dashboard") == "1"
        for name, text in item["data"].items()
    }

    sources = (ROOT / "grafana" / "dashboards").glob("*.json")
    assert found == {path.name: json.loads(path.read_text(encoding="utf-8")) for path in sources}


REFUSED: list[tuple[Object, str]] = [
    (
        {},
        r"clients.existingSecret: name the Secret with the tokens.*\n- redis.existingSecret: name the Secret with the",
    ),
    (
        over(LEAST, {"redis": {"mode": "sentinel"}}),
        "redis.nodes: with redis.mode=sentinel list host:port of the sentinels",
    ),
    (over(LEAST, {"redis": {"mode": "valkey"}}), "valkey.existingSecret: name the Secret with Valkey's password"),
    (over(LEAST, {"redis": {"tls": {"clientCertificate": True}}}), "redis.tls.existingSecret: name the Secret"),
    (over(LEAST, {"admin": {"expose": True}}), "admin.existingSecret: name the Secret with the admin API's token"),
    (over(LEAST, {"config": CONFIG, "existingConfigMap": {"name": "x"}}), "config, existingConfigMap.name: give one"),
    (
        over(LEAST, {"config": {"providers": [{"name": "a", "api_base": "http://a", "token": "sk-secret"}]}}),
        r"config.providers\[0\].token: a literal would stand in a ConfigMap",
    ),
    (
        over(LEAST, {"config": {"providers": [{"name": "a", "oauth_detail": {"access_token": "at-secret"}}]}}),
        r"config.providers\[0\].oauth_detail.access_token: a literal",
    ),
    (
        over(LEAST, {"config": {"providers": [{"oauth_detail": {"extra_fields": {"client_secret": "s3cret"}}}]}}),
        r"config.providers\[0\].oauth_detail.extra_fields.client_secret: a literal",
    ),
    (over(LEAST, {"trial": {"clientTokens": "a"}}), "trial.enabled: set it to true if the literal secrets"),
    (over(LEAST, {"trial": {"enabled": True, "redisPassword": "a/b"}}), "trial.redisPassword: letters and digits only"),
    (over(LEAST, {"ingress": {"enabled": True}}), "ingress.hosts: list the host names"),
    (over(LEAST, {"autoscaling": {"enabled": True, "minReplicas": 11}}), "autoscaling.maxReplicas: less than"),
    (over(LEAST, {"autoscaling": {"enabled": True, "cpuUtilization": 0}}), "autoscaling.openRequests: both are 0"),
    (over(LEAST, {"strategy": {"maxSurge": 0}}), "strategy.maxSurge: 1 or more"),
    (over(LEAST, {"otel": {"enabled": True}}), "otel.endpoint: the collector's URL"),
    (over(LEAST, {"ports": {"http": 9464}}), "ports: each is to be another one"),
    (over(LEAST, {"extraEnv": [{"name": "BALANCER_PORT", "value": "1"}]}), "extraEnv: BALANCER_PORT is set already"),
    (over(LEAST, {"settings": {"log_levels": "info"}}), "'/settings': additional properties 'log_levels' not allowed"),
    (over(LEAST, {"settings": {"lease_s": "30"}}), "'/settings/lease_s': got string, want number"),
    (over(LEAST, {"replica": 3}), "additional properties 'replica' not allowed"),
    (over(LEAST, {"workers": 0}), "'/workers': minimum: got 0, want 1"),
    (
        over(LEAST, {"redis": {"mode": "standalone"}}),
        "'/redis/mode': value must be one of 'url', 'sentinel', 'cluster'",
    ),
    (over(LEAST, {"drain": {"marginSeconds": 5}}), "'/drain/marginSeconds': minimum: got 5, want 12"),
]


@pytest.mark.parametrize(("values", "reason"), REFUSED, ids=[reason[:40] for _, reason in REFUSED])
def test_values_that_cannot_work_are_refused_with_what_to_do(values: Object, reason: str) -> None:
    with pytest.raises(subprocess.CalledProcessError) as refused:
        render(values)

    assert re.search(reason, refused.value.stderr)
    assert '-secret"' not in refused.value.stderr
    assert "sk-secret" not in refused.value.stderr


@pytest.mark.parametrize("values", [{}, ALL], ids=["nothing", "everything"])
def test_helm_s_linter_has_no_complaint(values: Object) -> None:
    helm = needs.program("npm:helm")
    assert helm

    linted = subprocess.run(
        [helm, "lint", "--strict", str(CHART), "--values", "-"],
        input=json.dumps(values),
        capture_output=True,
        text=True,
        check=False,
    )

    assert (linted.returncode, "1 chart(s) linted, 0 chart(s) failed" in linted.stdout) == (0, True), linted.stdout


def test_the_chart_says_the_program_s_version_and_asks_for_a_kubernetes_that_can_sleep() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text(encoding="utf-8"))

    assert chart["appVersion"] == chart["version"] == balancer.__version__
    assert chart["kubeVersion"] == ">=1.30.0-0"
    assert container(gateway(render(LEAST)))["image"] == f"llm-balancer:{balancer.__version__}"


def test_the_notes_tell_how_to_look_and_warn_of_a_trial() -> None:
    helm = needs.program("npm:helm")
    assert helm
    command = [helm, "install", "r", str(CHART), "--namespace", "llm", "--dry-run=client", "--values", "-"]

    notes = subprocess.run(
        command, input=json.dumps(MATRIX["a trial"]), capture_output=True, text=True, check=True
    ).stdout.partition("NOTES:")[2]

    assert "kubectl --namespace llm rollout status deployment/r-balancer" in notes
    assert "TRIAL: secrets came as literals" in notes
    assert "The store is a single Valkey pod" in notes
    assert "balancer apply --force /etc/balancer/balancer.yaml" in notes
