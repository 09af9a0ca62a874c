"""Two services for every rule, and what became of the attempts on them."""

from __future__ import annotations

from typing import Any

from balancer.tally import Counts
from tests.actors import Upstream
from tests.gateway.conftest import Served
from tests.store.conftest import eventually

Settled = dict[tuple[str, str], int]


def a_pair(*upstreams: Upstream, rule: dict[str, Any] | None = None, **provider: Any) -> dict[str, Any]:
    """Rules `gpt` and `claude` over a service of each upstream, one request in turn: `o0:m`, `a0:m` of the first."""
    options = {"no_key_required": True} | provider
    providers = [
        {"name": f"{style[0]}{number}", "api_style": style, "api_base": upstream.url} | options
        for number, upstream in enumerate(upstreams)
        for style in ("openai", "anthropic")
    ]
    rules = [
        {
            "uuid": name,
            "scenario": style,
            "request_model": name,
            "lb_tactic": {"type": "round_robin", "params": {"request_threshold": 1}},
            "services": [{"provider": f"{style[0]}{number}", "model": "m"} for number in range(len(upstreams))],
            "retry": {"backoff_ms": 1},
        }
        | (rule or {})
        for name, style in (("gpt", "openai"), ("claude", "anthropic"))
    ]
    return {"providers": providers, "rules": rules}


async def settled(gateway: Served) -> Settled:
    """How often which service ended how, once nothing is in flight; the store's books say the same."""

    async def is_over() -> bool:
        return all(not service.in_flight for service in (await gateway.view()).services.values())

    await eventually(is_over)
    counts: Settled = {}
    gateway.gateway.metrics.flush()  # Those of the express way are counted some time soon.
    for (_, _, service, outcome), count in gateway.gateway.metrics.attempts.totals().items():
        counts[service, outcome] = counts.get((service, outcome), 0) + int(count)
    totals: dict[str, int] = {}
    for (service, _), count in counts.items():
        totals[service] = totals.get(service, 0) + count
    services = (await gateway.view()).services
    assert totals == {name: state.requests for name, state in services.items() if state.requests}
    return counts


def counted(counts: Counts) -> dict[tuple[str, ...], int]:
    """What a counter says, by the values of its labels."""
    return {labels: int(count) for labels, count in counts.totals().items()}


def requests_total(gateway: Served) -> dict[tuple[str, str], int]:
    """Requests by rule and outcome."""
    return {(rule, outcome): count for (_, rule, outcome), count in counted(gateway.gateway.metrics.requests).items()}
