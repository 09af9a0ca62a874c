"""Our own program as it is measured: the configuration with everything on, and variants of it for each feature."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec
import redis

from balancer import config
from balancer.store import keys
from balancer.store.views import read_pool
from benchmarks.bench.bodies import MODEL

RULE, POOL = "bench", "default"
_PLENTY = {"rpm": 1_000_000_000, "tpm": 1_000_000_000_000, "in_flight": 1_000_000}
"""Limits that are counted and never reached."""
_NO_BREAKER = {"failures": 0, "ratio": 0}
_KEY = "BENCH_UPSTREAM_KEY"


class Variant(msgspec.Struct, frozen=True, kw_only=True):
    """A configuration of ours: what is on, in the document and in the settings."""

    name: str
    base: str = ""
    """The variant that it is compared with."""
    has_breaker: bool = True
    has_limits: bool = True
    reserve: str = "input"
    record: str = "off"
    rule: dict[str, Any] = {}
    provider: dict[str, Any] = {}
    settings: dict[str, str] = {}
    headers: tuple[str, ...] = ()
    workers: int = 1
    has_tls_upstream: bool = False
    has_tls_listener: bool = False
    has_collector: bool = False
    """Its traces go to a collector, which throws them away."""


ALL = Variant(name="all")
"""Breaker, limits, reservation, leases, settlement, decision headers; three accounts, round robin."""


def has_setting(name: str) -> bool:
    """True if this version of the program knows that setting."""
    return any(setting.name == name for setting in config.SETTINGS)


def variables(variant: Variant) -> dict[str, str]:
    """The environment of a variant."""
    return {_KEY: "sk-upstream"} | {config.PREFIX + name.upper(): value for name, value in variant.settings.items()}


def document(upstreams: Sequence[str], variant: Variant) -> dict[str, Any]:
    """The configuration file of a variant."""
    limits = _PLENTY if variant.has_limits else {}
    providers = [
        {
            "name": f"account{i}",
            "api_base": f"{url}/v1",
            "token": f"${{{_KEY}}}",
            "limits": limits,
            "breaker": {} if variant.has_breaker else _NO_BREAKER,
        }
        | variant.provider
        for i, url in enumerate(upstreams, 1)
    ]
    rule = {
        "uuid": RULE,
        "request_model": MODEL,
        "lb_tactic": {"type": "round_robin", "params": {"request_threshold": 1, "reserve": variant.reserve}},
        "services": [{"provider": each["name"], "model": MODEL, "limits": limits} for each in providers],
    }
    pools = [] if variant.record == "off" else [{"name": POOL, "record": variant.record}]
    return {"providers": providers, "rules": [rule | variant.rule], "pools": pools}


def switches(variant: Variant) -> list[str]:
    """What is on and what is off, one line each."""

    def line(name: str, value: object) -> str:
        return f"{name}: {value}"

    return [
        line("breaker", "on, the defaults" if variant.has_breaker else "off"),
        line("limits", "rpm, tpm and in_flight on every service and provider" if variant.has_limits else "off"),
        line("reservation", variant.reserve),
        line("leases", "on"),
        line("settlement", "on"),
        line("tactic", "round_robin, 1 request, 3 accounts"),
        line("record", variant.record),
        line("decision headers", variant.settings.get("decision_headers", "on")),
    ]


def check(url: str, variant: Variant, serve: Callable[[], None]) -> list[str]:
    """What is in Redis of those switches while requests are served. Raises RuntimeError for what is missing.

    `serve` sends streams for a second or so; it is called in a thread.
    """
    serving = threading.Thread(target=serve)
    serving.start()
    evidence: list[Evidence] = []
    try:
        with redis.Redis.from_url(url) as client:
            while serving.is_alive():
                evidence = _evidence(client, variant)
                if all(each.is_there for each in evidence):
                    break
                time.sleep(0.05)
    finally:
        serving.join()
    faults = [f"no {each.what} ({each.where})" for each in evidence if not each.is_there]
    if faults or not evidence:
        raise RuntimeError("Redis does not show what should be measured: " + ("; ".join(faults) or "nothing there"))
    return [f"{each.what}: {each.where}" for each in evidence]


class Evidence(msgspec.Struct, frozen=True, kw_only=True):
    """Something that a switch leaves in Redis, where that is, and whether it was seen there."""

    what: str
    where: str
    is_there: bool


def _evidence(client: redis.Redis, variant: Variant) -> list[Evidence]:
    partitions: Any = client.hgetall(keys.partitions(POOL))
    services: Any = client.hgetall(keys.services(POOL))
    workers: Any = client.zrange(keys.leases(POOL), 0, -1)
    now_ms = time.time_ns() // 1_000_000
    view = read_pool(POOL, partitions, services, now_ms)
    accounts = list(view.services.values())
    providers = list(view.providers.values())
    holdings = [keys.holdings(POOL, worker.decode()) for worker in workers]
    found = [
        Evidence(
            what="selection",
            where=f"{keys.partitions(POOL)}: the seq of {RULE}",
            is_there=RULE in view.rules and view.rules[RULE].seq > 0,
        ),
        Evidence(
            what="settlement",
            where=f"{keys.services(POOL)}: requests, input and output of services",
            is_there=any(each.requests > 0 and each.input > 0 and each.output > 0 for each in accounts),
        ),
        Evidence(
            what="leases",
            where=f"{keys.leases(POOL)} and {keys.holdings(POOL, '<worker>')}",
            is_there=_all(client.exists(each) for each in holdings),
        ),
    ]
    if variant.has_breaker:
        found.append(
            Evidence(
                what="breaker",
                where=f"{keys.services(POOL)}: requests in the breakers of services",
                is_there=any(each.breaker.requests > 0 for each in accounts)
                and _all(each.has_breaker for each in providers),
            )
        )
    if variant.has_limits:
        where = f"{keys.services(POOL)}: the minute of each"
        of_services = _all(each.minute.counts(now_ms)[0] > 0 for each in accounts)
        of_providers = _all(each.minute.counts(now_ms)[0] > 0 and any(each.provider[:3]) for each in providers)
        found.append(Evidence(what="limits of services", where=f"{where} service", is_there=of_services))
        found.append(Evidence(what="limits of providers", where=f"{where} provider", is_there=of_providers))
    if variant.reserve != "none":
        is_reserved = any(each.reserved > 0 and each.in_flight > 0 for each in accounts)
        where = f"{keys.services(POOL)}: reserved and in_flight, while requests run"
        found.append(Evidence(what="reservation", where=where, is_there=is_reserved))
    if variant.record != "off":
        is_recorded = bool(client.exists(keys.decisions(POOL)))
        found.append(Evidence(what=f"record {variant.record}", where=keys.decisions(POOL), is_there=is_recorded))
    return found


def _all(claims: Iterable[object]) -> bool:
    """True if there are any, and all hold."""
    listed = list(claims)
    return bool(listed) and all(listed)
