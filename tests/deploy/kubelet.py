"""What the kubelet does with a pod, as far as one machine can: volumes, variables, probes, its end.

Paths of the container lie below a folder, and ports are free ones of this machine: both are replaced in variables and
files. Nothing else of the pod is changed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp

from deploy.build import Object
from tests.deploy.rendering import container, environment, of_kind, pod
from tests.store.conftest import eventually

PORT_VARIABLES = {"BALANCER_PORT": "http", "BALANCER_METRICS_PORT": "metrics", "BALANCER_ADMIN_PORT": "admin"}


class Pod:
    """A container that runs."""

    def __init__(self, workload: Object, folder: Path, ports: dict[str, int], variables: dict[str, str]) -> None:
        self.workload = workload
        self.variables = variables
        self.folder = folder
        self.ports = ports
        self.process: asyncio.subprocess.Process | None = None

    @property
    def log(self) -> str:
        """All that it wrote."""
        return (self.folder / "log").read_text(encoding="utf-8")

    def url(self, port: str, path: str) -> str:
        """An address on one of its ports, by the port's name."""
        return f"http://127.0.0.1:{self.ports[port]}{path}"

    async def probe(self, name: str) -> bool:
        """What a probe of the pod says now: 2xx or 3xx within its time."""
        probe = container(self.workload)[name]
        action = probe["httpGet"]
        timeout = aiohttp.ClientTimeout(total=probe["timeoutSeconds"])
        try:
            async with (
                aiohttp.ClientSession(timeout=timeout) as session,
                session.get(self.url(action["port"], action["path"])) as response,
            ):
                return 200 <= response.status < 400
        except (aiohttp.ClientError, TimeoutError):
            return False

    async def starts(self) -> None:
        """Returns when the startup probe, and then the readiness probe, say yes; fails when the kubelet would."""
        probe = container(self.workload)["startupProbe"]
        assert self.process is not None

        async def has_started() -> bool:
            assert self.process is not None
            assert self.process.returncode is None, self.log
            return await self.probe("startupProbe")

        await eventually(has_started, probe["periodSeconds"] * probe["failureThreshold"])
        await eventually(lambda: self.probe("readinessProbe"), 10)

    async def execs(self, *command: str) -> str:
        """What a command in the container prints, as by `kubectl exec`; fails if it fails."""
        process = await self._start(*command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT)
        output, _ = await process.communicate()
        assert process.returncode == 0, output.decode()
        return output.decode()

    async def _start(self, program: str, *arguments: str, stdout: Any, stderr: Any) -> asyncio.subprocess.Process:
        assert program == "balancer"
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "balancer", *arguments),
            env=self.variables,
            cwd=self.folder,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
        )

    def terminate(self) -> None:
        """Sends what comes after the preStop hook."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)

    async def ended(self) -> int:
        """Its exit status, within the grace period of the pod less the sleep before."""
        assert self.process is not None
        sleep: int = container(self.workload)["lifecycle"]["preStop"]["sleep"]["seconds"]
        async with asyncio.timeout(pod(self.workload)["terminationGracePeriodSeconds"] - sleep):
            return await self.process.wait()


def free_ports(names: list[str]) -> dict[str, int]:
    """A free port for each name."""
    with contextlib.ExitStack() as stack:
        sockets = {name: stack.enter_context(socket.socket()) for name in names}
        for sock in sockets.values():
            sock.bind(("127.0.0.1", 0))
        return {name: sock.getsockname()[1] for name, sock in sockets.items()}


@contextlib.asynccontextmanager
async def running(
    objects: list[Object], workload: Object, secrets: dict[str, dict[str, str]], folder: Path
) -> AsyncIterator[Pod]:
    """The workload's container as a process. Killed at the end, if it still runs."""
    only = container(workload)
    places = {mount["mountPath"]: folder / "mounts" / mount["mountPath"][1:] for mount in only["volumeMounts"]}
    ports = free_ports(list(PORT_VARIABLES.values()))

    def moved(text: str) -> str:
        """The text with the paths of the container, at its start or in ${file:…}, where they are here."""
        for path, place in places.items():
            text = text.replace(f"${{file:{path}/", f"${{file:{place}/")
            if text == path or text.startswith(f"{path}/"):
                return f"{place}{text.removeprefix(path)}"
        return text

    for mount in only["volumeMounts"]:
        place = places[mount["mountPath"]]
        place.mkdir(parents=True)
        for name, text in _content(workload, objects, secrets, mount["name"]).items():
            (place / name).write_text(moved(text), encoding="utf-8")
    variables = {name: moved(value) for name, value in environment(workload, secrets).items()}
    declared = {port["name"]: str(port["containerPort"]) for port in only["ports"]}
    for variable, name in PORT_VARIABLES.items():
        assert declared.get(name, variables[variable]) == variables[variable], f"it listens elsewhere than on {name}"
        variables[variable] = str(ports[name])
    inherited = {name: os.environ[name] for name in ("PATH", "PYTHONPATH", "LANG") if name in os.environ}
    running = Pod(workload, folder, ports, inherited | {"TMPDIR": str(places["/tmp"])} | variables)  # noqa: S108  a mount
    with (folder / "log").open("wb") as log:
        running.process = await running._start(*only["command"], stdout=log, stderr=log)
    try:
        yield running
    finally:
        if running.process.returncode is None:
            running.process.kill()
            await running.process.wait()
        sys.stderr.write(running.log[-6000:])  # Shown when the test has failed.


def _content(
    workload: Object, objects: list[Object], secrets: dict[str, dict[str, str]], volume: str
) -> dict[str, str]:
    """The files of a volume."""
    (source,) = [item for item in pod(workload)["volumes"] if item["name"] == volume]
    match source:
        case {"configMap": {"name": name, "items": items}}:
            (data,) = [item["data"] for item in of_kind(objects, "ConfigMap") if item["metadata"]["name"] == name]
            return {item["path"]: data[item["key"]] for item in items}
        case {"projected": {"sources": sources}}:
            found: dict[str, Any] = {}
            for part in sources:
                found |= secrets[part["secret"]["name"]]
            return found
        case {"emptyDir": _}:
            return {}
        case _:
            raise AssertionError(f"a volume that this kubelet does not know: {source}")
