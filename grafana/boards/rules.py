"""Rule and switching: where each rule's cursor stands, why it moves, and whether the shares are what they should be."""

from __future__ import annotations

from grafana.boards.common import (
    ANNOTATIONS,
    ASIDE,
    OF_RULE,
    PLACES,
    RULE,
    STREAKS,
    or_zero,
    rate,
    shared,
    shown,
    total,
    variables,
)
from grafana.panels import Dashboard, Query, Row, bars, lines, timeline

_PICKS = f"{RULE}, {ASIDE}"
_OF_RULE = ("namespace", "pool", "rule")


def _share(of: str, whole: str) -> str:
    return f"{of} / on (namespace, pool, rule) group_left () ({whole} > 0)"


_SHARE_NOW = _share(
    rate("balancer_picks_total", _PICKS, *_OF_RULE, "service"), rate("balancer_picks_total", _PICKS, *_OF_RULE)
)
_SHARE = _share(
    total("balancer_picks_total", _PICKS, *_OF_RULE, "service"), total("balancer_picks_total", _PICKS, *_OF_RULE)
)
_EXPECTED = shared("balancer_expected_share", RULE, "pool", "rule", "service")


def _named(expression: str) -> str:
    """With a label that names rule and service."""
    return f'label_join({expression}, "where", "  ", "rule", "service")'


DASHBOARD = Dashboard(
    uid="balancer-rules",
    title="Balancer / Rule and switching",
    description="The cursor of each rule, its streak, its switches, and each service's share of the picks.",
    variables=variables("namespace", "pool", "rule"),
    annotations=ANNOTATIONS,
    rows=(
        Row(
            title="Cursor",
            panels=(
                timeline(
                    "Current service",
                    "Which of its services each rule uses, by its place in the rule, counted from 0. The same over "
                    "the whole fleet at any moment. A band that flickers on a tactic with a threshold: the threshold "
                    "is low for this traffic, or services fail.",
                    Query(
                        expr=shared("balancer_current_service_index", RULE, "pool", "rule"),
                        legend="{{rule}}",
                    ),
                    values=PLACES,
                    width=24,
                ),
                lines(
                    "Streak",
                    "Consecutive requests on the current service, by the count of the whole fleet, of the rules that "
                    "move on by it; in dashes where it ends. It never goes above. Only requests that the tactic "
                    "picks count.",
                    Query(
                        expr=f"{shared('balancer_streak', RULE, 'pool', 'rule')} and {OF_RULE} {STREAKS}",
                        legend="{{rule}}",
                    ),
                    Query(expr=STREAKS, legend="{{rule}} threshold"),
                    dashed="/ threshold$/",
                    width=12,
                ),
                lines(
                    "Switches",
                    "Moves of the cursor a second, by rule and reason: `next` after a full streak or because the "
                    "current service cannot serve, `least` by what windows count, `turn` and `draw` by weight.",
                    Query(
                        expr=rate("balancer_switches_total", RULE, "rule", "reason"),
                        legend="{{rule}} {{reason}}",
                    ),
                    unit="ops",
                    stacked=True,
                    width=12,
                ),
            ),
        ),
        Row(
            title="Shares",
            panels=(
                bars(
                    "Share of the picks",
                    "Each service's part of its rule's picks in the time shown, beside the part that the configuration "
                    "promises in the long run, where the tactic promises one. Pinned, retried and probing picks are "
                    "left out. Equal bars, but for a streak, are what exactness looks like.",
                    Query(expr=_named(f"{_SHARE} and {_EXPECTED}"), legend="picked"),
                    Query(expr=_named(_EXPECTED), legend="expected"),
                    by="where",
                    unit="percentunit",
                    width=12,
                    height=10,
                ),
                lines(
                    "Distance from the expected share",
                    "The largest difference, over a rule's services, between share and expectation. A streak of 10 "
                    "makes waves when there are few picks in a window. What stays is a service that cannot serve, a "
                    "worker without Redis, or a bug.",
                    Query(
                        expr=f"max by (pool, rule) (abs(({_SHARE_NOW}) - {_EXPECTED}))",
                        legend="{{rule}}",
                    ),
                    unit="percentunit",
                    width=12,
                    height=10,
                ),
                lines(
                    "Picks by service",
                    "Who gets the rule's requests, whatever the reason of the pick.",
                    Query(
                        expr=rate("balancer_picks_total", RULE, "rule", "service"),
                        legend="{{rule}}  {{service}}",
                    ),
                    unit="reqps",
                    stacked=True,
                    width=12,
                    links=({"title": "Services", "url": shown("balancer-services", "pool")},),
                ),
                lines(
                    "Picks by reason",
                    "Why a service was picked: by the tactic (`streak` and `threshold` stay), or aside from it: "
                    "`pinned` to a session, a `retry`, a `probe` of a breaker, `exhausted` when none may serve.",
                    Query(expr=rate("balancer_picks_total", RULE, "reason"), legend="{{reason}}"),
                    unit="reqps",
                    stacked=True,
                    width=12,
                ),
            ),
        ),
        Row(
            title="Beside the tactic",
            panels=(
                lines(
                    "Requests by smart-routing entry",
                    "Of rules with smart routing: the entry that a request belongs to, whose services then serve; "
                    "`none` for the rule's own.",
                    Query(
                        expr="label_replace("
                        + rate("balancer_routed_total", RULE, "rule", "entry")
                        + ', "entry", "none", "entry", "")',
                        legend="{{rule}}  {{entry}}",
                    ),
                    unit="reqps",
                    stacked=True,
                    width=12,
                ),
                lines(
                    "Translated attempts",
                    "Attempts at services that speak another API than their client: whose rule, and from which API to "
                    "which. Native ones are not counted here.",
                    Query(
                        expr=rate("balancer_translated_total", RULE, "rule", "client", "upstream"),
                        legend="{{rule}}  {{client}} to {{upstream}}",
                    ),
                    unit="ops",
                    stacked=True,
                    width=12,
                ),
                lines(
                    "Retries",
                    "Second and later attempts. They are held to `retry.budget_ratio` of a rule's requests: a line "
                    "that flattens while failures go on has used up its budget.",
                    Query(expr=rate("balancer_retries_total", RULE, "rule"), legend="{{rule}}"),
                    unit="ops",
                    calm=0,
                ),
                lines(
                    "Sessions kept by a pin",
                    "Picks that stayed with their session's service while the cursor stood elsewhere: prompt caches "
                    "that were not thrown away.",
                    Query(expr=rate("balancer_pinned_switches_saved_total", RULE, "rule"), legend="{{rule}}"),
                    unit="ops",
                ),
                lines(
                    "Picks without Redis",
                    "Made by a worker alone; here streaks, shares and limits are not exact.",
                    Query(
                        expr=or_zero(rate("balancer_degraded_picks_total", RULE, "rule")),
                        legend="{{rule}}",
                    ),
                    unit="reqps",
                    calm=0,
                    links=({"title": "Store and degradation", "url": shown("balancer-store", "pool")},),
                ),
            ),
        ),
    ),
)
