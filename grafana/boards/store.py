"""Store and degradation: what Redis costs, whether it is there, and what was lost or is not exact."""

from __future__ import annotations

from grafana.boards.common import (
    ANNOTATIONS,
    NAMESPACE,
    POOL,
    UP,
    or_zero,
    part,
    quantile,
    rate,
    shared,
    summed,
    variables,
)
from grafana.panels import (
    GREEN,
    NEVER_GOOD,
    ORANGE,
    RED,
    YELLOW,
    Dashboard,
    Query,
    Row,
    heat,
    lines,
    stat,
    timeline,
)

DEADLINE_S = 0.25
"""The default of BALANCER_REDIS_DEADLINE_MS."""
OFTEN, OFTEN_S = 20, 1
"""So many settles may be under way at any moment, for so long."""
_HELD = "A worker holds for a minute what it has settled: only a failover that loses more shows this."


def _lost(metric: str) -> Query:
    return Query(expr=or_zero(f"sum(increase({metric}{{{POOL}}}[$__range]))"))


DASHBOARD = Dashboard(
    uid="balancer-store",
    title="Balancer / Store and degradation",
    description="Redis as the workers see it: latency, outages, what waits, what was lost, failovers.",
    variables=variables("namespace", "pool"),
    annotations=ANNOTATIONS,
    rows=(
        Row(
            title="Now",
            panels=(
                stat(
                    "Store",
                    "Away as soon as one worker does not reach the Redis of a pool.",
                    Query(expr=f"min(balancer_store_up{{{POOL}}})"),
                    values=UP,
                ),
                stat(
                    "Select, p99",
                    "What a request waits for its pick. Some milliseconds; never beyond the deadline of 250 ms.",
                    Query(expr=quantile(0.99, "balancer_select_seconds", POOL)),
                    unit="s",
                    thresholds=((None, GREEN), (0.02, YELLOW), (0.1, RED)),
                ),
                stat(
                    "Live workers",
                    "So many workers have a lease in Redis, in the pool that has the fewest.",
                    Query(expr=f"min({shared('balancer_live_workers', POOL, 'pool')})"),
                    thresholds=((None, RED), (1, GREEN)),
                    decimals=0,
                ),
                stat(
                    "Unsettled",
                    "Attempts that ended and that Redis has not acknowledged. Near 0; it grows while Redis is away.",
                    Query(expr=summed("balancer_outbox_entries", POOL)),
                    thresholds=((None, GREEN), (1000, ORANGE), (100_000, RED)),
                    decimals=0,
                    calm=OFTEN,
                ),
                stat(
                    "Failovers with a loss",
                    "How often a master came up that lacked acknowledged writes, in the time shown.",
                    Query(expr=or_zero(f"sum(changes(({shared('balancer_epoch', POOL, 'pool')})[$__range:]))")),
                    thresholds=((None, GREEN), (1e-9, ORANGE)),
                    decimals=0,
                    calm=0,
                ),
                stat(
                    "Settles lost",
                    "Batches of settled attempts that a failover lost and that nobody held any more: their tokens are "
                    "missing in the counters.",
                    _lost("balancer_settle_batches_lost_total"),
                    thresholds=NEVER_GOOD,
                    decimals=0,
                    calm=0,
                    unmoved=_HELD,
                ),
                stat(
                    "Attempts lost",
                    "Attempts that were open when their worker died: their tokens are not known.",
                    _lost("balancer_leases_expired_total"),
                    thresholds=((None, GREEN), (1e-9, ORANGE)),
                    decimals=0,
                    calm=0,
                ),
                stat(
                    "Audit",
                    "Violations of what is promised that the audit of the pools' histories found. It must be 0.",
                    _lost("balancer_invariant_violations_total"),
                    thresholds=NEVER_GOOD,
                    decimals=0,
                    calm=0,
                ),
            ),
        ),
        Row(
            title="Latency",
            panels=(
                lines(
                    "Select",
                    "One round trip of the script that picks, by pool. The dashed line is the deadline, after which a "
                    "worker goes on without Redis. Rising with traffic: Redis is busy (one core), split the pools; "
                    "rising without: its network or disk.",
                    *(
                        Query(
                            expr=quantile(share, "balancer_select_seconds", POOL, "pool"),
                            legend=f"p{share * 100:g} {{{{pool}}}}",
                        )
                        for share in (0.5, 0.99)
                    ),
                    unit="s",
                    thresholds=((None, GREEN), (DEADLINE_S, RED)),
                    width=12,
                ),
                heat(
                    "Selects",
                    "All of them. A second band far above the first: some workers are busy, or some of the network is "
                    "slow.",
                    Query(expr=rate("balancer_select_seconds_bucket", POOL, "le")),
                    width=12,
                ),
            ),
        ),
        Row(
            title="Without Redis",
            panels=(
                timeline(
                    "Store by pod",
                    "Whether each pod's workers reach the Redis of each pool. One pod alone: its network; all: Redis.",
                    Query(
                        expr=f"min by (namespace, pod, pool) (balancer_store_up{{{POOL}}})",
                        legend="{{pod}} {{pool}}",
                    ),
                    values=UP,
                ),
                lines(
                    "Degraded picks",
                    "The share of picks that a worker made by itself, from the last state it saw. Not exact, and "
                    "counted afterwards. With `on_store_loss: closed` clients get 503: see Clients and budgets.",
                    Query(
                        expr=part(rate("balancer_degraded_picks_total", POOL), rate("balancer_picks_total", POOL)),
                        legend="of all picks",
                    ),
                    unit="percentunit",
                    most=1,
                    calm=0,
                ),
                lines(
                    "Stale picks",
                    "Selections asked for under an older configuration than the pool's; they are refused, and asked "
                    "again under the new one. A few at each change; many for long: a worker cannot read the registry.",
                    Query(expr=or_zero(rate("balancer_stale_picks_total", POOL, "pool")), legend="{{pool}}"),
                    unit="ops",
                    calm=0,
                ),
                lines(
                    "Outbox",
                    "Settled attempts that wait for Redis, of all workers. It must fall back to 0 after an outage; "
                    "beyond BALANCER_OUTBOX_MAX_ENTRIES what is not on disk is lost.",
                    Query(expr=summed("balancer_outbox_entries", POOL, "pool"), legend="{{pool}}"),
                    calm=OFTEN,
                ),
                lines(
                    "Age of the outbox",
                    "How long the oldest of them has waited. A line that climbs by a second each second: Redis is "
                    "away, or refuses that worker's settles.",
                    Query(expr=shared("balancer_outbox_age_seconds", POOL, "pool"), legend="{{pool}}"),
                    unit="s",
                    calm=OFTEN_S,
                ),
                lines(
                    "Settles lost, by pool",
                    "Batches that were no longer held when a failover lost them, a second.",
                    Query(expr=or_zero(rate("balancer_settle_batches_lost_total", POOL, "pool")), legend="{{pool}}"),
                    unit="ops",
                    calm=0,
                    unmoved=_HELD,
                ),
            ),
        ),
        Row(
            title="Fleet",
            panels=(
                lines(
                    "Epoch",
                    "A step up is a failover in which acknowledged writes were lost; the pool's history goes on in a "
                    "new epoch, and the workers settle the last minute again.",
                    Query(expr=shared("balancer_epoch", POOL, "pool"), legend="{{pool}}"),
                    unit="none",
                ),
                lines(
                    "Epochs raised",
                    "By the workers that noticed it first. Often: give Redis replicas that acknowledge "
                    "(`min-replicas-to-write`), or a disk it syncs to.",
                    Query(expr=or_zero(rate("balancer_epoch_bumps_total", POOL, "pool")), legend="{{pool}}"),
                    unit="ops",
                    calm=0,
                ),
                lines(
                    "Workers",
                    "Alive as the pods say, and with a lease in Redis. Fewer leases than workers: some do not reach "
                    "Redis. More: some died, and their leases run out within 30 s.",
                    Query(expr=summed("balancer_workers", NAMESPACE), legend="alive"),
                    Query(expr=shared("balancer_live_workers", POOL, "pool"), legend="in Redis, {{pool}}"),
                ),
                lines(
                    "Attempts lost, by pool",
                    "Open attempts whose worker died, when their lease was over. They count as requests without "
                    "tokens.",
                    Query(expr=or_zero(rate("balancer_leases_expired_total", POOL, "pool")), legend="{{pool}}"),
                    unit="ops",
                    calm=0,
                ),
                lines(
                    "Configuration revision",
                    "Of each pod, by its worker that is furthest behind. The lines go up together, within a second; "
                    "one that stays below picks nothing under the old rules, but is slow to start.",
                    Query(expr=f"min by (namespace, pod) (balancer_config_revision{{{NAMESPACE}}})", legend="{{pod}}"),
                    unit="none",
                ),
                lines(
                    "Violations",
                    "What the audit of a pool's history found wrong, a second. It must never move; if it does, please "
                    "report it with the workers' logs.",
                    Query(expr=or_zero(rate("balancer_invariant_violations_total", POOL, "pool")), legend="{{pool}}"),
                    unit="ops",
                    calm=0,
                ),
            ),
        ),
    ),
)
