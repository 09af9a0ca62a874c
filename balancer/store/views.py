"""Read-only pictures of the shared state, decoded from the pool's hashes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import msgspec

from balancer.store import keys

_View = TypeVar("_View", "RuleView", "PartitionView", "ServiceView")


class WindowView(msgspec.Struct, frozen=True, kw_only=True):
    """What a service used since `start_ms`, for `length_s` seconds; `output` is part of the tokens.

    Whether it has ended, the reader decides.
    """

    length_s: int
    start_ms: int
    requests: int
    tokens: int
    output: int = 0

    def counts(self, now_ms: int) -> tuple[int, int]:
        """Requests and tokens, zeros once the window has ended."""
        if now_ms - self.start_ms >= self.length_s * 1000:
            return 0, 0
        return self.requests, self.tokens


class ServiceView(msgspec.Struct, frozen=True, kw_only=True):
    """A service's counters in its pool. `requests` counts settled attempts, `picks` selections."""

    windows: tuple[WindowView, ...] = ()
    in_flight: int = 0
    reserved: int = 0
    picks: int = 0
    requests: int = 0
    failures: int = 0
    input: int = 0
    output: int = 0
    cached: int = 0
    cache_creation: int = 0
    reasoning: int = 0
    lost: int = 0
    lost_tokens: int = 0
    abandoned: int = 0
    last_used: int = 0


class PartitionView(msgspec.Struct, frozen=True, kw_only=True):
    """A partition's cursor (a service id, empty for none) and streak."""

    tactic: str = ""
    cursor: str = ""
    streak: int = 0


class RuleView(msgspec.Struct, frozen=True, kw_only=True):
    """A rule's fence and its count of picks."""

    revision: int = 0
    seq: int = 0


class PoolView(msgspec.Struct, frozen=True, kw_only=True):
    """A pool at one moment."""

    pool: str
    now_ms: int
    epoch: int
    position: int
    rules: dict[str, RuleView]
    partitions: dict[str, PartitionView]
    services: dict[str, ServiceView]

    def cursor(self, rule: str) -> str:
        """The rule's current service, empty for none."""
        partition = self.partitions.get(keys.partition(rule))
        return partition.cursor if partition else ""


def read_pool(pool: str, partitions: Mapping[bytes, bytes], services: Mapping[bytes, bytes], now_ms: int) -> PoolView:
    """The picture from the two hashes as HGETALL gives them, at that time of the server."""
    place = {name: int(partitions.get(name.encode(), b"0")) for name in ("epoch", "position")}
    return PoolView(
        pool=pool,
        now_ms=now_ms,
        rules=_group(partitions, RuleView),
        partitions=_group(partitions, PartitionView),
        services=_group(services, ServiceView),
        **place,
    )


def _group(fields: Mapping[bytes, bytes], kind: type[_View]) -> dict[str, _View]:
    """The hash's fields `name:id` gathered by id, for the names that the struct has."""
    names = set(kind.__struct_fields__)
    gathered: dict[str, dict[str, object]] = {}
    for field, value in fields.items():
        name, _, id_ = field.decode().partition(":")
        if name in names and id_:
            text = value.decode()
            read: object = _windows(text) if name == "windows" else text if name in ("tactic", "cursor") else int(text)
            gathered.setdefault(id_, {})[name] = read
    return {id_: msgspec.convert(values, kind) for id_, values in gathered.items()}


def _windows(text: str) -> tuple[WindowView, ...]:
    windows = []
    for part in filter(None, text.split(";")):
        length, start, requests, tokens, output = map(int, part.split())
        windows.append(WindowView(length_s=length, start_ms=start, requests=requests, tokens=tokens, output=output))
    return tuple(windows)
