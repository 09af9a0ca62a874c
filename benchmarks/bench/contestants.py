"""Who is measured beside us, and how each is started. All get the same requests and the same three accounts."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence

import msgspec

from benchmarks.bench import ours
from benchmarks.bench.bodies import MODEL
from benchmarks.bench.site import ROOT, Site, peers_folder
from tests.topologies import free_ports


class Contestant(msgspec.Struct, frozen=True, kw_only=True):
    """A program to measure; without a command it is the accounts themselves."""

    name: str
    command: tuple[str, ...] = ()
    port: int
    load_port: int = 0
    """Where the load goes if not there: to something that speaks for it."""
    headers: tuple[str, ...] = ()
    variables: dict[str, str] = {}
    slowness: float = 1.0
    """Its phases last so many times as long: it answers a few requests a second."""
    redis_url: str = ""
    """Of the store that it uses, if it is ours."""


class Missing(msgspec.Struct, frozen=True, kw_only=True):
    """One that cannot be measured here, and why."""

    name: str
    reason: str


def direct(site: Site) -> Contestant:
    """No proxy at all: what load and accounts can do."""
    return Contestant(name="direct", port=site.upstream_ports[0])


def file_name(name: str) -> str:
    """A contestant's name as part of a file's."""
    return re.sub(r"[^a-z0-9+_-]+", "-", name.lower())


_NGINX = """
daemon off;
worker_processes 1;
pid nginx.pid;
error_log nginx-error.log warn;
events {{ worker_connections 4096; }}
http {{
  access_log off;
  client_body_temp_path body; proxy_temp_path proxy; fastcgi_temp_path f; uwsgi_temp_path u; scgi_temp_path s;
  client_body_buffer_size 256k;
  client_max_body_size 32m;
  keepalive_requests 1000000000;
  keepalive_timeout 300;
  upstream accounts {{ {servers} keepalive 512; keepalive_requests 1000000000; }}
  server {{
    listen 127.0.0.1:{port} backlog=2048;
    location / {{
      proxy_pass http://accounts;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_buffering off;
    }}
  }}
}}
"""


def nginx_program() -> str | None:
    """Path of nginx, None where it is not installed."""
    return shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")


def nginx(site: Site) -> Contestant | Missing:
    """The yardstick for a proxy's CPU: one worker, keep-alive to the accounts, no buffering."""
    program = nginx_program()
    if program is None:
        return Missing(name="nginx", reason="not installed (Debian: apt-get install nginx-light)")
    (port,) = free_ports(1)
    servers = " ".join(f"server 127.0.0.1:{each};" for each in site.upstream_ports)
    file = site.folder / "nginx.conf"
    file.write_text(_NGINX.format(servers=servers, port=port), encoding="utf-8")
    command = (program, "-p", str(site.folder), "-c", str(file), "-e", "nginx-error.log")
    return Contestant(name="nginx", command=command, port=port)


def aiohttp(site: Site) -> Contestant:
    """The bare Python proxy."""
    (port,) = free_ports(1)
    command = (sys.executable, "-m", "benchmarks.bench.proxy", str(port), *site.upstreams)
    return Contestant(name="aiohttp", command=command, port=port, variables={"PYTHONPATH": str(ROOT)})


_LITELLM_VARIABLES = {
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "LITELLM_LOG": "ERROR",
    "LITELLM_MODE": "PRODUCTION",
    "DISABLE_ADMIN_UI": "True",
    "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true",
}


def litellm(site: Site) -> Contestant | Missing:
    """LiteLLM's proxy, shuffling; nothing shared."""
    return _litellm(site, "litellm", {})


def litellm_redis(site: Site) -> Contestant | Missing:
    """LiteLLM's proxy, shuffling, with what it shares in Redis."""
    database = site.redis_url().rpartition("/")[2]
    shared = {"redis_host": "127.0.0.1", "redis_port": site.redis_port, "redis_db": int(database)}
    return _litellm(site, "litellm+redis", shared)


def _litellm(site: Site, name: str, shared: dict[str, object]) -> Contestant | Missing:
    program = peers_folder() / "venv-litellm" / "bin" / "litellm"
    if not program.exists():
        return Missing(name=name, reason="not installed: make bench-peers")
    models = [
        {
            "model_name": MODEL,
            "litellm_params": {"model": f"openai/{MODEL}", "api_base": f"{url}/v1", "api_key": "sk-upstream"},
        }
        for url in site.upstreams
    ]
    settings = {
        "model_list": models,
        "litellm_settings": {"num_retries": 0, "telemetry": False},
        "router_settings": {"routing_strategy": "simple-shuffle"} | shared,
    }
    file = site.folder / f"{name}.yaml"
    file.write_text(json.dumps(settings), encoding="utf-8")
    (port,) = free_ports(1)
    arguments = ("--config", str(file), "--port", str(port), "--host", "127.0.0.1", "--telemetry", "False")
    return Contestant(
        name=name, command=(str(program), *arguments), port=port, variables=_LITELLM_VARIABLES, slowness=2.5
    )


def portkey(site: Site) -> Contestant | Missing:
    """Portkey's gateway on Node."""
    program = peers_folder() / "npm" / "node_modules" / "@portkey-ai" / "gateway" / "build" / "start-server.js"
    node = shutil.which("node")
    if node is None or not program.exists():
        return Missing(name="portkey", reason="not installed: make bench-peers" if node else "needs node")
    (port,) = free_ports(1)
    targets = [
        {"provider": "openai", "api_key": "sk-upstream", "custom_host": f"{url}/v1", "weight": 1}
        for url in site.upstreams
    ]
    return Contestant(
        name="portkey",
        command=(node, str(program), f"--port={port}", "--headless"),
        port=port,
        headers=("x-portkey-config: " + json.dumps({"strategy": {"mode": "loadbalance"}, "targets": targets}),),
        variables={"NODE_ENV": "production"},
        slowness=1.5,
    )


def vllm_router(site: Site) -> Contestant | Missing:
    """The router of vLLM, in Rust."""
    return _router(site, "vllm-router", ())


def sglang_router(site: Site) -> Contestant | Missing:
    """The router of SGLang, in Rust."""
    return _router(site, "sglang-router", ("launch",))


def _router(site: Site, name: str, words: tuple[str, ...]) -> Contestant | Missing:
    program = peers_folder() / "venv-routers" / "bin" / name
    if not program.exists():
        return Missing(name=name, reason="not installed: make bench-peers")
    port, metrics_port = free_ports(2)
    arguments = ("--worker-urls", *site.upstreams, "--policy", "round_robin", "--host", "127.0.0.1")
    ports = ("--port", str(port), "--prometheus-port", str(metrics_port), "--log-level", "error")
    return Contestant(name=name, command=(str(program), *words, *arguments, *ports), port=port)


def of_ours(
    site: Site,
    variant: ours.Variant,
    *,
    name: str = "",
    upstreams: Sequence[str] = (),
    variables: Mapping[str, str] | None = None,
) -> Contestant | Missing:
    """Our program with a variant's configuration, on those upstreams instead of the accounts themselves."""
    name = name or variant.name
    absent = [each for each in variant.settings if not ours.has_setting(each)]
    if absent:
        return Missing(name=name, reason=f"this version has no setting {', '.join(absent)}")
    (port,) = free_ports(1)
    url = site.redis_url()
    file = site.folder / f"{file_name(name)}.json"
    file.write_text(json.dumps(ours.document(upstreams or site.upstreams, variant)), encoding="utf-8")
    command = (
        *(sys.executable, "-m", "balancer", "serve", "--config", str(file), "--redis", url),
        *("--port", str(port), "--admin-port", "0", "--workers", str(variant.workers), "--log-level", "warning"),
    )
    environment = {"PYTHONPATH": str(ROOT)} | ours.variables(variant) | dict(variables or {})
    return Contestant(
        name=name,
        command=command,
        port=port,
        headers=variant.headers,
        variables=environment,
        redis_url=url,
    )


def everything_on(site: Site) -> Contestant | Missing:
    """Our program with all that the targets ask for."""
    return of_ours(site, ours.ALL, name="ours")


def on_uvloop(site: Site) -> Contestant | Missing:
    """The same on the other loop."""
    return of_ours(site, msgspec.structs.replace(ours.ALL, settings={"loop": "uvloop"}), name="ours+uvloop")


ALL: dict[str, Callable[[Site], Contestant | Missing]] = {
    "direct": direct,
    "nginx": nginx,
    "aiohttp": aiohttp,
    "litellm": litellm,
    "litellm+redis": litellm_redis,
    "portkey": portkey,
    "vllm-router": vllm_router,
    "sglang-router": sglang_router,
    "ours": everything_on,
    "ours+uvloop": on_uvloop,
}
