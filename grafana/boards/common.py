"""What the dashboards share: how series are chosen and put together, the choices at the top, the marks in the graphs.

Counters, and gauges of a process, are summed over workers and pods. What Redis or the configuration says is the same
from every worker: of that the largest is taken, for each namespace, since another namespace has another fleet.
"""

from __future__ import annotations

from grafana.panels import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, YELLOW, Annotation, Variable

EVERY = "$__rate_interval"
RANGE = "$__range"

NAMESPACE = 'namespace=~"$namespace"'
POOL = f'{NAMESPACE}, pool=~"$pool"'
RULE = f'{POOL}, rule=~"$rule"'
SERVICE = f'{POOL}, service=~"$service"'
ANY_POOL_RULE = f'{NAMESPACE}, rule=~"$rule"'
ANY_POOL_SERVICE = f'{NAMESPACE}, service=~"$service"'

ASIDE = 'reason!~"pinned|retry|exhausted|probe"'
"""The picks that a tactic has made, and no others: those that move cursor and streak, and whose shares are expected."""
TROUBLE = 'outcome!~"success|rejected|cancelled|abandoned"'
"""The outcomes that are a service's fault, or ours: a rejected request is its client's own."""

OUTCOMES = {
    "success": GREEN,
    "rejected": YELLOW,
    "cancelled": GREY,
    "abandoned": "#555555",
    "rate_limited": ORANGE,
    "overloaded": "dark-orange",
    "failed": RED,
    "unauthorized": PURPLE,
    "lost": "dark-red",
}
UP = {0: ("away", RED), 1: ("up", GREEN)}
BREAKER = {0: ("closed", GREEN), 1: ("half-open", YELLOW), 2: ("open", RED)}
PLACES = {
    place: (f"#{place}", colour)
    for place, colour in enumerate(
        (BLUE, ORANGE, PURPLE, GREEN, YELLOW, "light-blue", "light-orange", "light-purple", "light-green", RED)
    )
}
"""A service's place among those of its rule, counted from 0."""


def rate(metric: str, where: str, *by: str) -> str:
    """So often a second, over all workers."""
    return _sum(f"rate({metric}{{{where}}}[{EVERY}])", *by)


def total(metric: str, where: str, *by: str) -> str:
    """So much in the time that is shown, over all workers."""
    return _sum(f"increase({metric}{{{where}}}[{RANGE}])", *by)


def summed(metric: str, where: str, *by: str) -> str:
    """The sum over all workers of a gauge that each has for itself."""
    return _sum(f"{metric}{{{where}}}", *by)


def shared(metric: str, where: str, *by: str) -> str:
    """A gauge that every worker reads from the same place."""
    return f"max by (namespace, {', '.join(by)}) ({metric}{{{where}}})" if by else f"max({metric}{{{where}}})"


def quantile(share: float, metric: str, where: str, *by: str) -> str:
    """A quantile of a histogram, over all workers."""
    return f"histogram_quantile({share}, {rate(f'{metric}_bucket', where, *by, 'le')})"


def has(threshold: str, where: str) -> str:
    """The rules whose tactic has that threshold."""
    return shared(f"balancer_{threshold}_threshold", where, "pool", "rule")


OF_RULE = "on (namespace, pool, rule)"
STREAKS = f"({has('request', RULE)} unless {OF_RULE} {has('token', RULE)})"
"""The threshold of the rules that move on by a streak."""
WINDOWS = f"({has('request', POOL)} and {OF_RULE} {has('token', POOL)})"
"""The request threshold of the rules that move on by what a window counts."""


def served(metric: str, by: str) -> str:
    """A gauge of windows, of those services that a rule with such a threshold has picked."""
    pairs = f"group by (namespace, pool, rule, service) (balancer_picks_total{{{SERVICE}}})"
    windows = shared(metric, SERVICE, "pool", "service", "window")
    return f"{windows} and on (namespace, pool, service) ({pairs} and {OF_RULE} {by})"


def or_zero(expression: str) -> str:
    """The expression, 0 where it has no value."""
    return f"({expression} or vector(0))"


def part(of: str, whole: str) -> str:
    """One as a share of the other; 0 where there is none of it."""
    return f"{or_zero(of)} / {whole}"


def shown(dashboard: str, *variables: str) -> str:
    """The address of a dashboard, with the same choices and times."""
    kept = "&".join(f"${{{name}:queryparam}}" for name in ("datasource", "namespace", *variables))
    return f"/d/{dashboard}?{kept}&${{__url_time_range}}"


def _sum(expression: str, *by: str) -> str:
    return f"sum by ({', '.join(by)}) ({expression})" if by else f"sum({expression})"


VARIABLES = {
    variable.name: variable
    for variable in (
        Variable(
            name="namespace",
            label="Namespace",
            description="One fleet is in one namespace; with several chosen, gauges have a line for each.",
            query="label_values(balancer_build_info, namespace)",
            is_first=True,
        ),
        Variable(
            name="pool",
            label="Pool",
            description="The rules and services whose state is kept together.",
            query=f"label_values(balancer_store_up{{{NAMESPACE}}}, pool)",
        ),
        Variable(
            name="rule",
            label="Rule",
            description="What clients ask for.",
            query=f"label_values(balancer_current_service_index{{{POOL}}}, rule)",
        ),
        Variable(
            name="service",
            label="Service",
            description="A provider and one of its models.",
            query=f"label_values(balancer_breaker_state{{{POOL}}}, service)",
        ),
        Variable(
            name="scenario",
            label="Scenario",
            description="The kind of client: openai, anthropic, claude_code, opencode.",
            query=f"label_values(balancer_requests_total{{{NAMESPACE}}}, scenario)",
        ),
    )
}

ANNOTATIONS = (
    Annotation(
        name="Epoch raised",
        expr=f"sum by (namespace, pool) (increase(balancer_epoch_bumps_total{{{POOL}}}[2m])) > 0",
        text="A failover lost writes of pool {{pool}}; its history goes on in a new epoch.",
        colour=RED,
    ),
    Annotation(
        name="Configuration changed",
        expr=f"max by (namespace) (changes(balancer_config_revision{{{NAMESPACE}}}[2m])) > 0",
        text="The workers stand on a new revision.",
        colour=BLUE,
    ),
)


def variables(*names: str) -> tuple[Variable, ...]:
    """Those choices, in that order."""
    return tuple(VARIABLES[name] for name in names)
