"""Services: what each has used of its windows, whether it may serve, how fast it is."""

from __future__ import annotations

from grafana.boards.common import (
    ANNOTATIONS,
    ANY_POOL_SERVICE,
    BREAKER,
    NAMESPACE,
    OUTCOMES,
    POOL,
    SERVICE,
    TROUBLE,
    WINDOWS,
    has,
    quantile,
    rate,
    served,
    shared,
    variables,
)
from grafana.panels import Dashboard, Query, Row, heat, lines, timeline

_OF_SERVICE = ("namespace", "pool", "service")

DASHBOARD = Dashboard(
    uid="balancer-services",
    title="Balancer / Services",
    description="Windows against thresholds, breakers, cooldowns, load, latency and tokens of each service.",
    variables=variables("namespace", "pool", "service"),
    annotations=ANNOTATIONS,
    rows=(
        Row(
            title="Windows",
            panels=(
                lines(
                    "Tokens in the window",
                    "Tokens that a service has settled in its window, which starts anew when it is over, for the "
                    "services of rules that move on by tokens; in dashes those rules' thresholds. A service above is "
                    "left. All of a rule above: its threshold is too low for this traffic, the least used serves.",
                    Query(
                        expr=served("balancer_window_tokens", has("token", POOL)),
                        legend="{{service}} {{window}} s",
                    ),
                    Query(expr=has("token", POOL), legend="{{rule}} threshold"),
                    dashed="/ threshold$/",
                    width=12,
                ),
                lines(
                    "Requests in the window",
                    "Picks of a service in its window, for the services of rules that count them (hybrid); in dashes "
                    "those rules' thresholds.",
                    Query(
                        expr=served("balancer_window_requests", WINDOWS),
                        legend="{{service}} {{window}} s",
                    ),
                    Query(expr=WINDOWS, legend="{{rule}} threshold"),
                    dashed="/ threshold$/",
                    width=12,
                ),
            ),
        ),
        Row(
            title="Health",
            panels=(
                timeline(
                    "Breaker",
                    "Open: nothing is sent, for twice as long each time. Half-open: one probe of the whole fleet at a "
                    "time. Open and half-open in turn for long: the service is down, or its credential is wrong.",
                    Query(expr=shared("balancer_breaker_state", SERVICE, "pool", "service"), legend="{{service}}"),
                    values=BREAKER,
                    width=12,
                    calm=0,
                ),
                lines(
                    "Cooldown",
                    "How much longer a service is left alone because it answered that it is at its limits. Saw teeth "
                    "that never end: ask the vendor for more, or set `limits` a little below theirs.",
                    Query(expr=shared("balancer_cooldown_seconds", SERVICE, "pool", "service"), legend="{{service}}"),
                    unit="s",
                    width=12,
                    calm=0,
                ),
                lines(
                    "Attempts by outcome",
                    "How attempts ended, before any retry. `unauthorized`: look at the credential; `rate_limited`: at "
                    "the limits; `lost`: at the workers, which died.",
                    Query(expr=rate("balancer_attempts_total", SERVICE, "outcome"), legend="{{outcome}}"),
                    unit="reqps",
                    stacked=True,
                    colours=OUTCOMES,
                    width=12,
                ),
                lines(
                    "Failing attempts",
                    "The share of a service's attempts that failed for its sake, whatever a retry mended.",
                    Query(
                        expr=f"{rate('balancer_attempts_total', f'{SERVICE}, {TROUBLE}', *_OF_SERVICE)}"
                        f" / {rate('balancer_attempts_total', SERVICE, *_OF_SERVICE)}",
                        legend="{{service}}",
                    ),
                    unit="percentunit",
                    most=1,
                    width=12,
                    calm=0,
                ),
            ),
        ),
        Row(
            title="OAuth tokens",
            panels=(
                lines(
                    "Access tokens",
                    "How much longer each access token lives. Saw teeth that turn five minutes above the ground are "
                    "well; one that falls through to nothing has no successor: the log of any worker, and `/readyz`, "
                    "say why.",
                    Query(
                        expr=f"min by (namespace, provider) (balancer_oauth_expires_seconds{{{NAMESPACE}}})",
                        legend="{{provider}}",
                    ),
                    unit="s",
                    width=12,
                ),
                lines(
                    "Refreshes",
                    "Requests for new tokens, of the whole fleet. `failed` is tried again; after `lost` and `in_doubt` "
                    "somebody must log in again, and publish the new refresh token, before the access token ends.",
                    Query(
                        expr=rate("balancer_oauth_refreshes_total", NAMESPACE, "provider", "outcome"),
                        legend="{{provider}} {{outcome}}",
                    ),
                    unit="reqps",
                    width=12,
                ),
            ),
        ),
        Row(
            title="Load",
            panels=(
                lines(
                    "In flight",
                    "Attempts that are under way, by the count in Redis. One that only grows holds attempts that "
                    "never end.",
                    Query(expr=shared("balancer_in_flight_requests", SERVICE, "pool", "service"), legend="{{service}}"),
                ),
                lines(
                    "Reserved tokens",
                    "What attempts under way are expected to use, and what they hold of windows and limits until "
                    "they end. That is why a burst does not pile up on one service.",
                    Query(expr=shared("balancer_reserved_tokens", SERVICE, "pool", "service"), legend="{{service}}"),
                ),
                lines(
                    "Picks",
                    "How often each service is picked, by whichever rule.",
                    Query(expr=rate("balancer_picks_total", SERVICE, "service"), legend="{{service}}"),
                    unit="reqps",
                    stacked=True,
                ),
            ),
        ),
        Row(
            title="Latency",
            panels=(
                lines(
                    "First token, p95",
                    "From sending to the first content token. One service that is slower than its like: give it less "
                    "weight, a higher tier, or the tactic `latency`.",
                    Query(
                        expr=quantile(0.95, "balancer_time_to_first_token_seconds", ANY_POOL_SERVICE, "service"),
                        legend="{{service}}",
                    ),
                    unit="s",
                ),
                lines(
                    "Whole attempts, p95",
                    "From sending to the last byte: grows with the length of the answers.",
                    Query(
                        expr=quantile(0.95, "balancer_upstream_duration_seconds", ANY_POOL_SERVICE, "service"),
                        legend="{{service}}",
                    ),
                    unit="s",
                ),
                heat(
                    "Whole attempts",
                    "All durations of the services chosen. Two bands are two kinds of traffic, or one service that "
                    "is slower than the others. Diamonds are single requests, by their decision.",
                    Query(expr=rate("balancer_upstream_duration_seconds_bucket", ANY_POOL_SERVICE, "le")),
                ),
            ),
        ),
        Row(
            title="Tokens",
            panels=(
                lines(
                    "Tokens by service",
                    "Input and output together.",
                    Query(
                        expr=rate("balancer_tokens_total", f'{SERVICE}, kind=~"input|output"', "service"),
                        legend="{{service}}",
                    ),
                    unit="cps",
                    stacked=True,
                    width=12,
                ),
                lines(
                    "Tokens by kind",
                    "As the vendors report them: OpenAI's input includes what was cached, Anthropic's does not.",
                    Query(expr=rate("balancer_tokens_total", SERVICE, "kind"), legend="{{kind}}"),
                    unit="cps",
                    width=12,
                ),
            ),
        ),
    ),
)
