"""The container that the chart describes, run: its command line, variables, files and probes."""

from __future__ import annotations

from pathlib import Path

import aiohttp
import pytest

from deploy.build import Object
from tests import servers
from tests.actors import Upstream
from tests.deploy.kubelet import running
from tests.deploy.rendering import gateway, render
from tests.store.conftest import eventually

BODY = {"model": "gpt-5", "messages": [{"role": "user", "content": "hello"}]}


def values(upstream: str) -> Object:
    """Values with credentials from variables and from files, and a short end."""
    return {
        "clients": {"existingSecret": "clients"},
        "redis": {"existingSecret": "redis"},
        "admin": {"existingSecret": "admin"},
        "credentials": {"environment": ["providers"], "files": ["files"]},
        "workers": 2,
        "drain": {"delaySeconds": 1, "timeoutSeconds": 5},
        "config": {
            "providers": [
                {"name": "a", "api_base": upstream, "token": "${A_KEY}"},
                {"name": "b", "api_base": upstream, "token": "${file:/run/secrets/b-key}"},
            ],
            "rules": [
                {
                    "request_model": "gpt-5",
                    "lb_tactic": {"type": "round_robin", "params": {"request_threshold": 1}},
                    "services": [{"provider": "a", "model": "m"}, {"provider": "b", "model": "m"}],
                }
            ],
        },
    }


@pytest.mark.needs("npm:helm")
async def test_the_container_starts_with_what_is_rendered_answers_its_probes_and_drains(tmp_path: Path) -> None:
    async with Upstream().running() as upstream:
        objects = render(values(upstream.url))
        with servers.running("valkey-9") as store:
            secrets = {
                "clients": {"tokens": "a-client,another"},
                "redis": {"url": store},
                "admin": {"token": "an-operator"},
                "providers": {"A_KEY": "key-of-a"},
                "files": {"b-key": "key-of-b"},
            }
            async with running(objects, gateway(objects), secrets, tmp_path) as pod, aiohttp.ClientSession() as client:
                await pod.starts()
                assert await pod.probe("livenessProbe")

                async with client.post(pod.url("http", "/v1/chat/completions"), json=BODY) as refused:
                    assert refused.status == 401
                headers = {"Authorization": "Bearer another"}
                for _ in range(2):
                    async with client.post(
                        pod.url("http", "/v1/chat/completions"), json=BODY, headers=headers
                    ) as answer:
                        assert answer.status == 200
                assert sorted(request.header("Authorization") or "" for request in upstream.received) == [
                    "Bearer key-of-a",
                    "Bearer key-of-b",
                ]
                async with client.get(pod.url("metrics", "/metrics")) as scraped:
                    assert "balancer_build_info" in await scraped.text()
                async with client.get(pod.url("http", "/metrics"), headers=headers) as hidden:
                    assert hidden.status == 404

                async def is_told() -> bool:
                    return '"status":200' in pod.log.replace(" ", "")

                await eventually(is_told)  # The line of a request may come after its answer.
                stats = await pod.execs("balancer", "get", "stats")
                assert "a:m" in stats
                applied = await pod.execs("balancer", "apply", "--force", pod.variables["BALANCER_CONFIG"])
                assert "revision 1" in applied

                pod.terminate()

                async def is_unready() -> bool:
                    return not await pod.probe("readinessProbe")

                await eventually(is_unready)
                assert await pod.probe("livenessProbe")
                assert await pod.ended() == 0
    assert [line for line in pod.log.splitlines() if not line.startswith("{") or '"traceback"' in line] == []
    assert [path.name for path in (tmp_path / "mounts" / "tmp").iterdir()] == []
