"""Every key in Redis: its type, its lifetime, and the tag that it shares.

| key | type | lifetime |
|---|---|---|
| `balancer:{<pool>}:services` | hash: place in history, windows, totals of services | 30 days after the last use |
| `balancer:{<pool>}:partitions` | hash: rules, cursors | 30 days after the last use |
| `balancer:{<pool>}:holdings:<worker>` | hash: what its attempts hold, its last batch | 7 days after the last use |
| `balancer:{<pool>}:holdings:api-<random>` | hash: the same for one pick over the API | as long as it may be settled |
| `balancer:{<pool>}:leases` | sorted set: worker by the end of its lease in ms | 30 days after the last use |
| `balancer:{<pool>}:auditor` | string: the worker that audits the pool | three intervals |
| `balancer:{<pool>}:prober` | string: the worker that asks the pool's providers for their health | ten seconds |
| `balancer:{<pool>}:pin:<digest>` | string: the service of a session | the rule's `session_affinity` |
| `balancer:{<pool>}:response:<digest>` | string: the rule and service that gave an answer with an id | 30 days |
| `balancer:{<pool>}:decisions` | stream: events, when recorded | 30 days after the last use, bounded by length |
| `balancer:{registry}:head` | hash: revision, digest, and a publication in progress | permanent |
| `balancer:{registry}:snapshot:<revision>` | string: JSON | the last 200 |
| `balancer:{registry}:digests` | hash: digest of a file to its revision | the last 200 |
| `balancer:{oauth}:grant:<provider>` | hash: its OAuth tokens, sealed; who renews them | 180 days after the last use |
| `balancer:{oauth}:grants` | hash: provider to how often its grant has changed | 180 days after the last use |
| `balancer:{registry}:changes` | stream: who changed what | the last 10 000, for 400 days |
| `balancer:{registry}:feed` | channel: announces the head's revision | – |

A Cluster hashes only what stands between the braces, so all keys of a pool lie in one slot. What clients name, sessions
and the ids of answers, stands in no key as it is: a digest does.
"""

from __future__ import annotations

import hashlib

_PREFIX = "balancer:"


def services(pool: str) -> str:
    """The hash of the pool's place in its history and of its services."""
    return f"{_PREFIX}{{{pool}}}:services"


def partitions(pool: str) -> str:
    """The hash of the pool's rules and partitions."""
    return f"{_PREFIX}{{{pool}}}:partitions"


def holdings(pool: str, worker: str) -> str:
    """The hash of what a worker's attempts hold in the pool."""
    return f"{_PREFIX}{{{pool}}}:holdings:{worker}"


def leases(pool: str) -> str:
    """The sorted set of the workers' leases in the pool."""
    return f"{_PREFIX}{{{pool}}}:leases"


def decisions(pool: str) -> str:
    """The stream of the pool's events."""
    return f"{_PREFIX}{{{pool}}}:decisions"


def auditor(pool: str) -> str:
    """The string that names the worker that audits the pool."""
    return f"{_PREFIX}{{{pool}}}:auditor"


def prober(pool: str) -> str:
    """The string that names the worker that asks the pool's providers for their health."""
    return f"{_PREFIX}{{{pool}}}:prober"


def pin(pool: str, session: str) -> str:
    """The string that names the service of a session, by its digest."""
    return f"{_PREFIX}{{{pool}}}:pin:{session}"


def response(pool: str, response_id: str) -> str:
    """The string that names the rule and the service that gave the answer of that id."""
    return f"{_PREFIX}{{{pool}}}:response:{_digest(response_id)}"


def session(partition: str, client_session: str) -> str:
    """The digest of a client's session in a partition: each pins its own service."""
    return _digest(f"{partition}\0{client_session}")


def _digest(text: str) -> str:
    # Whatever a client sends is a name here, also what is no proper text.
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


HEAD = f"{_PREFIX}{{registry}}:head"
DIGESTS = f"{_PREFIX}{{registry}}:digests"
FEED = f"{_PREFIX}{{registry}}:feed"
CHANGES = f"{_PREFIX}{{registry}}:changes"


def snapshot(revision: int) -> str:
    """The string that holds the configuration of a revision."""
    return f"{_PREFIX}{{registry}}:snapshot:{revision}"


GRANTS = f"{_PREFIX}{{oauth}}:grants"
GRANT_MS = 180 * 86_400_000
"""So long a grant is kept that nobody uses: as long as the vendors let refresh tokens lie, and longer."""


def grant(provider: str) -> str:
    """The hash of a provider's OAuth tokens."""
    return f"{_PREFIX}{{oauth}}:grant:{provider}"


HOLD_PREFIX = "api-"
"""Begins the worker ids under which picks over the API are made, one each (`holds`). They reap nothing."""

PERMANENT = (HEAD, DIGESTS, CHANGES, f"{_PREFIX}{{registry}}:snapshot:")
"""Prefixes of the keys without an expiry."""


def partition(rule: str, entry: str = "") -> str:
    """The id of a partition: a rule, or a rule with one matched smart-routing entry (which holds no `|`)."""
    return f"{entry}|{rule}"
