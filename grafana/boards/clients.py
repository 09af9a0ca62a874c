"""Clients and budgets: who asks for what, what is refused and why, what is left of the limits, what it costs."""

from __future__ import annotations

from grafana.boards.common import (
    ANNOTATIONS,
    ANY_POOL_RULE,
    NAMESPACE,
    OUTCOMES,
    POOL,
    RULE,
    part,
    quantile,
    rate,
    shared,
    total,
    variables,
)
from grafana.panels import GREEN, ORANGE, RED, Column, Dashboard, Query, Row, bars, lines, stat, table

_ASKED = f'{ANY_POOL_RULE}, scenario=~"$scenario"'
_SCENARIO = f'{NAMESPACE}, scenario=~"$scenario"'
_PRICED = f'{RULE}, kind=~"input|output|cached"'
_OF_LIMIT = ("pool", "service", "kind")
_USED = f"{shared('balancer_limit_used', POOL, *_OF_LIMIT)} / {shared('balancer_limit', POOL, *_OF_LIMIT)}"


def _cost(tokens: str, *by: str) -> str:
    """What tokens cost, in the currency of the prices."""
    price = shared("balancer_token_price", NAMESPACE, "service", "kind")
    return f"sum by ({', '.join(by)}) ({tokens} * on (namespace, service, kind) group_left () {price} / 1e6)"


_BY = ("namespace", "pool", "rule", "service", "kind")
_TOKENS_AN_HOUR = f"{rate('balancer_tokens_total', _PRICED, *_BY)} * 3600"
_TOKENS = total("balancer_tokens_total", _PRICED, *_BY)

DASHBOARD = Dashboard(
    uid="balancer-clients",
    title="Balancer / Clients and budgets",
    description="Requests by scenario, rule and outcome, refusals, limits, retries, tokens and what they cost.",
    variables=variables("namespace", "pool", "rule", "scenario"),
    annotations=ANNOTATIONS,
    rows=(
        Row(
            title="Requests",
            panels=(
                lines(
                    "By scenario",
                    "Which kind of client asks. One that falls to nothing has lost its way here, or its credential.",
                    Query(expr=rate("balancer_requests_total", _ASKED, "scenario"), legend="{{scenario}}"),
                    unit="reqps",
                    stacked=True,
                ),
                lines(
                    "By rule",
                    "What is asked for. Compare with the tokens below: the busiest rule is seldom the dearest.",
                    Query(expr=rate("balancer_requests_total", _ASKED, "rule"), legend="{{rule}}"),
                    unit="reqps",
                    stacked=True,
                ),
                lines(
                    "By outcome",
                    "How it ended for the client, after all attempts. Red: retries did not help, or ran out.",
                    Query(expr=rate("balancer_requests_total", _ASKED, "outcome"), legend="{{outcome}}"),
                    unit="reqps",
                    stacked=True,
                    colours=OUTCOMES,
                ),
                lines(
                    "Whole requests by scenario",
                    "From the first byte of a request to the last of its answer, waits for a limit and all attempts "
                    "included.",
                    *(
                        Query(
                            expr=quantile(share, "balancer_request_duration_seconds", _SCENARIO, "scenario"),
                            legend=f"p{share * 100:g} {{{{scenario}}}}",
                        )
                        for share in (0.5, 0.95)
                    ),
                    unit="s",
                ),
                lines(
                    "Refused",
                    "Requests that no service saw, by reason: `unauthorized` and `unknown_model` are clients set up "
                    "wrongly, `limited` are limits at work, `exhausted` and `store_lost` are ours to mend.",
                    Query(expr=rate("balancer_refused_total", _SCENARIO, "reason"), legend="{{reason}}"),
                    unit="reqps",
                    stacked=True,
                    calm=0,
                ),
                lines(
                    "Attempts per request",
                    "1 while all is well; each retry adds to it. Below 1 requests are answered that no service saw.",
                    Query(
                        expr=f"{rate('balancer_attempts_total', RULE)}"
                        f" / {rate('balancer_requests_total', ANY_POOL_RULE)}",
                        legend="attempts",
                    ),
                ),
            ),
        ),
        Row(
            title="Limits and retries",
            panels=(
                lines(
                    "Limits used",
                    "How much of each limit of a service is used, in the minute that slides or in flight. At 100 % the "
                    "service is no candidate; with all of a rule there, clients wait or get 429.",
                    Query(expr=_USED, legend="{{service}} {{kind}}"),
                    unit="percentunit",
                    thresholds=((None, GREEN), (0.8, ORANGE), (1, RED)),
                    width=12,
                ),
                table(
                    "Limits",
                    "What is used of what is allowed, now. Near to it for long: more accounts, or fewer clients.",
                    Column(title="Used", expr=shared("balancer_limit_used", POOL, *_OF_LIMIT), decimals=0),
                    Column(title="Limit", expr=shared("balancer_limit", POOL, *_OF_LIMIT), decimals=0),
                    Column(
                        title="Share",
                        expr=_USED,
                        unit="percentunit",
                        decimals=0,
                        colours=((None, "text"), (0.8, ORANGE), (1, RED)),
                    ),
                    labels={"service": "Service", "kind": "Kind"},
                    width=12,
                ),
                lines(
                    "Retries by rule",
                    "Second and later attempts a second. The rule that retries most has the service that fails most.",
                    Query(expr=rate("balancer_retries_total", RULE, "rule"), legend="{{rule}}"),
                    unit="ops",
                    width=12,
                    calm=0,
                ),
                lines(
                    "Retries as a share of requests",
                    "Held to `retry.budget_ratio` (0.2) over time; at that line an outage is being contained.",
                    Query(
                        expr=part(rate("balancer_retries_total", RULE), rate("balancer_requests_total", ANY_POOL_RULE)),
                        legend="retries",
                    ),
                    unit="percentunit",
                    thresholds=((None, GREEN), (0.2, ORANGE)),
                    width=12,
                    calm=0,
                ),
            ),
        ),
        Row(
            title="Tokens and cost",
            panels=(
                lines(
                    "Tokens by rule",
                    "Input and output together, as the services report them.",
                    Query(
                        expr=rate("balancer_tokens_total", f'{RULE}, kind=~"input|output"', "rule"),
                        legend="{{rule}}",
                    ),
                    unit="cps",
                    stacked=True,
                    width=12,
                ),
                lines(
                    "Cost an hour by service",
                    "At the prices in the configuration, in their currency; services without a price are not in it. "
                    "An upper bound: where a vendor's input includes cached tokens, those are counted at both prices.",
                    Query(expr=_cost(_TOKENS_AN_HOUR, "service"), legend="{{service}}"),
                    unit="none",
                    stacked=True,
                    width=12,
                ),
                bars(
                    "Cost by rule",
                    "What each rule cost in the time shown, in the currency of the prices.",
                    Query(expr=_cost(_TOKENS, "rule"), legend="cost"),
                    by="rule",
                    unit="none",
                    width=12,
                ),
                bars(
                    "Tokens by rule and kind",
                    "In the time shown. Many input tokens for few output ones: a cache, or pins, would pay.",
                    *(
                        Query(
                            expr=total("balancer_tokens_total", f'{RULE}, kind="{kind}"', "rule"),
                            legend=kind,
                        )
                        for kind in ("input", "output", "cached")
                    ),
                    by="rule",
                    width=8,
                ),
                stat(
                    "Cost",
                    "Of all rules chosen, in the time shown, in the currency of the prices.",
                    Query(expr=f"sum({_cost(_TOKENS, 'rule')})"),
                    unit="none",
                    decimals=2,
                    width=4,
                    height=8,
                ),
            ),
        ),
    ),
)
