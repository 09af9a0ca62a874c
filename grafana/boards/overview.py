"""Fleet overview: is it well, and where to look if it is not."""

from __future__ import annotations

from grafana.boards.common import (
    ANNOTATIONS,
    ANY_POOL_RULE,
    BREAKER,
    NAMESPACE,
    OUTCOMES,
    POOL,
    RULE,
    TROUBLE,
    UP,
    or_zero,
    part,
    quantile,
    rate,
    shared,
    shown,
    summed,
    variables,
)
from grafana.panels import (
    BLUE,
    GREEN,
    GREY,
    NEVER_GOOD,
    ORANGE,
    RED,
    YELLOW,
    Column,
    Dashboard,
    Query,
    Row,
    lines,
    stat,
    table,
)

_IS_AWAY = (
    f"{shared('balancer_breaker_state', POOL, 'pool', 'service')} > 0"
    f" or {shared('balancer_cooldown_seconds', POOL, 'pool', 'service')} > 0"
)
_OF_SERVICE = ("pool", "service")

DASHBOARD = Dashboard(
    uid="balancer-overview",
    title="Balancer / Fleet overview",
    description="Whether the fleet is well: traffic, failures, latency, workers, services.",
    variables=variables("namespace", "pool", "rule"),
    annotations=ANNOTATIONS,
    rows=(
        Row(
            title="Now",
            panels=(
                stat(
                    "Requests",
                    "Requests answered, by all pods together.",
                    Query(expr=rate("balancer_requests_total", ANY_POOL_RULE)),
                    unit="reqps",
                ),
                stat(
                    "Failed",
                    "The share of requests that failed for a service's sake or ours, after all attempts. What clients "
                    "did wrong or broke off is not in it. Look at the outcomes below, then at Services.",
                    Query(
                        expr=part(
                            rate("balancer_requests_total", f"{ANY_POOL_RULE}, {TROUBLE}"),
                            rate("balancer_requests_total", ANY_POOL_RULE),
                        )
                    ),
                    unit="percentunit",
                    thresholds=((None, GREEN), (0.001, YELLOW), (0.01, RED)),
                    calm=0,
                ),
                stat(
                    "First token, p95",
                    "From sending a request on to the first content token, 95 of 100 are faster: what people wait for.",
                    Query(expr=quantile(0.95, "balancer_time_to_first_token_seconds", NAMESPACE)),
                    unit="s",
                ),
                stat(
                    "Tokens",
                    "Input and output tokens that the services reported.",
                    Query(expr=rate("balancer_tokens_total", f'{RULE}, kind=~"input|output"')),
                    unit="cps",
                ),
                stat(
                    "Open requests",
                    "Requests that are being answered at this moment, in all pods. It is what to scale by.",
                    Query(expr=summed("balancer_open_requests", NAMESPACE)),
                    decimals=0,
                ),
                stat(
                    "Ready workers",
                    "Worker processes that can pick and take new requests. Below what was deployed: look at the pods' "
                    "logs. 0: nobody is served.",
                    Query(expr=summed("balancer_ready_workers", NAMESPACE)),
                    thresholds=((None, RED), (1, GREEN)),
                    decimals=0,
                ),
                stat(
                    "Store",
                    "Away as soon as one worker does not reach its Redis; it then goes on by itself or refuses, as "
                    "`on_store_loss` says. Look at Store and degradation.",
                    Query(expr=f"min(balancer_store_up{{{POOL}}})"),
                    values=UP,
                    links=({"title": "Store and degradation", "url": shown("balancer-store", "pool")},),
                ),
                stat(
                    "Services left alone",
                    "Services whose breaker is not closed or that cool down: the others carry their load.",
                    Query(expr=or_zero(f"count({_IS_AWAY})")),
                    thresholds=((None, GREEN), (1, ORANGE)),
                    decimals=0,
                    calm=0,
                    links=({"title": "Services", "url": shown("balancer-services", "pool")},),
                ),
            ),
        ),
        Row(
            title="Traffic",
            panels=(
                lines(
                    "Requests by rule",
                    "What is asked for. A rule that stops at once lost its clients, or all its services.",
                    Query(expr=rate("balancer_requests_total", ANY_POOL_RULE, "rule"), legend="{{rule}}"),
                    unit="reqps",
                    stacked=True,
                    width=12,
                    links=({"title": "Rule and switching", "url": shown("balancer-rules", "pool", "rule")},),
                ),
                lines(
                    "Requests by outcome",
                    "How requests ended for their clients, retries included. Anything but green and grey is worth a "
                    "look; `rejected` is the clients' own fault.",
                    Query(expr=rate("balancer_requests_total", ANY_POOL_RULE, "outcome"), legend="{{outcome}}"),
                    unit="reqps",
                    stacked=True,
                    colours=OUTCOMES,
                    width=12,
                    links=({"title": "Clients and budgets", "url": shown("balancer-clients", "pool", "rule")},),
                ),
                lines(
                    "Whole requests",
                    "From the first byte of a request to the last of its answer. Long answers are long: compare with "
                    "the first token before you worry.",
                    *(
                        Query(
                            expr=quantile(share, "balancer_request_duration_seconds", NAMESPACE),
                            legend=f"p{share * 100:g}",
                        )
                        for share in (0.5, 0.95, 0.99)
                    ),
                    unit="s",
                ),
                lines(
                    "First token",
                    "From sending a request on to the first content token, of streams and of whole answers alike.",
                    *(
                        Query(
                            expr=quantile(share, "balancer_time_to_first_token_seconds", NAMESPACE),
                            legend=f"p{share * 100:g}",
                        )
                        for share in (0.5, 0.95, 0.99)
                    ),
                    unit="s",
                    links=({"title": "Services", "url": shown("balancer-services", "pool")},),
                ),
                lines(
                    "What we add",
                    "From a request's last byte to sending it on: authentication, the pick, a connection. A few "
                    "milliseconds; more means busy workers (scale out) or a slow Redis (see Store and degradation).",
                    *(
                        Query(expr=quantile(share, "balancer_overhead_seconds", NAMESPACE), legend=f"p{share * 100:g}")
                        for share in (0.5, 0.95, 0.99)
                    ),
                    unit="s",
                    links=({"title": "Store and degradation", "url": shown("balancer-store", "pool")},),
                ),
            ),
        ),
        Row(
            title="Fleet",
            panels=(
                lines(
                    "Open requests by pod",
                    "Requests that are being answered. One pod far above the others: what stands in front of them "
                    "does not spread.",
                    Query(expr=summed("balancer_open_requests", NAMESPACE, "pod"), legend="{{pod}}"),
                    stacked=True,
                ),
                lines(
                    "Workers",
                    "Alive and ready as the pods say, and how many Redis counts, which divides the limits among so "
                    "many when it is away. All three should be one line; ready lies lower while pods start or drain.",
                    Query(expr=summed("balancer_workers", NAMESPACE), legend="alive"),
                    Query(expr=summed("balancer_ready_workers", NAMESPACE), legend="ready"),
                    Query(expr=shared("balancer_live_workers", POOL, "pool"), legend="in Redis, pool {{pool}}"),
                ),
                lines(
                    "Tokens by kind",
                    "As the services report them. `cached` and `reasoning` are parts of input and output with some "
                    "vendors, so the kinds are not added up.",
                    Query(expr=rate("balancer_tokens_total", RULE, "kind"), legend="{{kind}}"),
                    unit="cps",
                ),
                table(
                    "Services at a glance",
                    "Every service now. Click on one to look at it. In trouble: a breaker that is not closed, a "
                    "cooldown, failures.",
                    Column(
                        title="Attempts/s",
                        expr=rate("balancer_attempts_total", POOL, "namespace", *_OF_SERVICE),
                        unit="reqps",
                        decimals=1,
                    ),
                    Column(
                        title="Failing",
                        expr=f"{rate('balancer_attempts_total', f'{POOL}, {TROUBLE}', 'namespace', *_OF_SERVICE)}"
                        f" / {rate('balancer_attempts_total', POOL, 'namespace', *_OF_SERVICE)}",
                        unit="percentunit",
                        decimals=1,
                        colours=((None, "text"), (1e-9, ORANGE), (0.5, RED)),
                        calm=0,
                    ),
                    Column(
                        title="In flight",
                        expr=shared("balancer_in_flight_requests", POOL, *_OF_SERVICE),
                        decimals=0,
                    ),
                    Column(
                        title="Window tokens",
                        expr=shared("balancer_window_tokens", POOL, *_OF_SERVICE),
                        decimals=0,
                    ),
                    Column(
                        title="Breaker",
                        expr=shared("balancer_breaker_state", POOL, *_OF_SERVICE),
                        values=BREAKER,
                        calm=0,
                    ),
                    Column(
                        title="Cooldown",
                        expr=shared("balancer_cooldown_seconds", POOL, *_OF_SERVICE),
                        unit="s",
                        decimals=0,
                        colours=((None, GREY), (1e-9, ORANGE)),
                        calm=0,
                    ),
                    labels={"pool": "Pool", "service": "Service"},
                    links={
                        "service": shown("balancer-services", "pool") + "&var-service=${__data.fields.Service}",
                    },
                    width=16,
                    height=9,
                ),
                lines(
                    "Versions",
                    "Pods by the version they run: two lines while a new one is rolled out, one else.",
                    Query(expr=f"count by (version) (balancer_build_info{{{NAMESPACE}}})", legend="{{version}}"),
                    stacked=True,
                    height=9,
                ),
                stat(
                    "Configuration revision",
                    "The newest that a pod stands on.",
                    Query(expr=f"max(balancer_config_revision{{{NAMESPACE}}})"),
                    unit="none",
                    decimals=0,
                    width=6,
                    thresholds=((None, BLUE),),
                ),
                stat(
                    "Pods behind",
                    "Pods with a worker on an older revision than the newest. A second after a change there are none; "
                    "one that stays cannot read the configuration, and its log says why.",
                    Query(
                        expr=or_zero(
                            f"count(balancer_config_revision{{{NAMESPACE}}} < on (namespace) group_left ()"
                            f" max by (namespace) (balancer_config_revision{{{NAMESPACE}}}))"
                        )
                    ),
                    thresholds=NEVER_GOOD,
                    decimals=0,
                    width=6,
                    calm=0,
                ),
                stat(
                    "Audit",
                    "What the audit of the pools' histories found wrong in the time shown. It must be 0: anything "
                    "else is a bug of ours, please report it with the workers' logs.",
                    Query(expr=or_zero(f"sum(increase(balancer_invariant_violations_total{{{POOL}}}[$__range]))")),
                    thresholds=NEVER_GOOD,
                    decimals=0,
                    width=6,
                    calm=0,
                ),
                stat(
                    "Attempts lost",
                    "Attempts that were open when their worker died, in the time shown.",
                    Query(expr=or_zero(f"sum(increase(balancer_leases_expired_total{{{POOL}}}[$__range]))")),
                    thresholds=((None, GREEN), (1e-9, ORANGE)),
                    decimals=0,
                    width=6,
                    calm=0,
                ),
            ),
        ),
    ),
)
