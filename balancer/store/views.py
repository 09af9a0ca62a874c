"""Read-only pictures of the shared state, decoded from the pool's hashes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal, TypeVar

import msgspec

from balancer.store import keys

_View = TypeVar("_View", "RuleView", "PartitionView", "ServiceView", "ProviderView")

BreakerState = Literal["closed", "half_open", "open"]

_BUCKET_MS = 5000
_BUCKETS = 12
_TEXTS = ("tactic", "cursor")


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


class MinuteView(msgspec.Struct, frozen=True, kw_only=True):
    """What was used in the last minute: (bucket, requests, tokens), a bucket being 5 s of the server's time."""

    buckets: tuple[tuple[int, int, int], ...] = ()

    def counts(self, now_ms: int) -> tuple[int, int]:
        """Requests and tokens of the last minute, as limits see them."""
        oldest = now_ms // _BUCKET_MS - _BUCKETS
        kept = [(requests, tokens) for bucket, requests, tokens in self.buckets if bucket >= oldest]
        return sum(requests for requests, _ in kept), sum(tokens for _, tokens in kept)


class BreakerView(msgspec.Struct, frozen=True, kw_only=True):
    """A service's breaker: failures in a row and in its window; while it is open, until when, and how often in a row.

    `probe` is the position of the pick that tries it, 0 for none; `successes` are those of probes.
    """

    state: int = 0
    consecutive: int = 0
    start_ms: int = 0
    requests: int = 0
    failed: int = 0
    opens: int = 0
    successes: int = 0
    until_ms: int = 0
    probe: int = 0


class ServiceView(msgspec.Struct, frozen=True, kw_only=True):
    """A service's counters in its pool. `requests` counts settled attempts, `picks` selections.

    It cools until `cooldown` (ms). `first_token` and `per_token` are latencies in µs, 0 before the first, as of
    `measured` (ms). `minute` counts only while the service has limits.
    """

    windows: tuple[WindowView, ...] = ()
    minute: MinuteView = MinuteView()
    breaker: BreakerView = BreakerView()
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
    cooldown: int = 0
    first_token: int = 0
    per_token: int = 0
    measured: int = 0


class ProviderView(msgspec.Struct, frozen=True, kw_only=True):
    """A provider's meter in a pool, which counts while the provider has limits; and its numbers, as fence writes them.

    `provider` is: rpm, tpm, in_flight, failures, ratio_permille, min_requests, window_ms, open_ms, successes.
    """

    minute: MinuteView = MinuteView()
    in_flight: int = 0
    reserved: int = 0
    provider: tuple[int, ...] = ()

    @property
    def has_breaker(self) -> bool:
        """True when its services' breakers may open."""
        return len(self.provider) > 4 and (self.provider[3] > 0 or self.provider[4] > 0)


class PartitionView(msgspec.Struct, frozen=True, kw_only=True):
    """A partition's cursor (a service id, empty for none) and streak, and the tier that serves, -1 for the first."""

    tactic: str = ""
    cursor: str = ""
    streak: int = 0
    tier: int = -1


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
    providers: dict[str, ProviderView] = {}

    def cursor(self, rule: str) -> str:
        """The rule's current service, empty for none."""
        partition = self.partitions.get(keys.partition(rule))
        return partition.cursor if partition else ""

    def breaker_state(self, service: str) -> BreakerState:
        """Whether the service's breaker lets requests through: `half_open` is one at a time, as a probe."""
        state = self.services.get(service)
        provider = self.providers.get(service.partition(":")[0])
        if state is None or state.breaker.state == 0 or provider is None or not provider.has_breaker:
            return "closed"
        return "open" if state.breaker.until_ms > self.now_ms else "half_open"

    def cooldown_ms(self, service: str) -> int:
        """How long the service is left alone from now on, 0 for not at all."""
        state = self.services.get(service)
        return max(0, state.cooldown - self.now_ms) if state else 0


def read_pool(pool: str, partitions: Mapping[bytes, bytes], services: Mapping[bytes, bytes], now_ms: int) -> PoolView:
    """The picture from the two hashes as HGETALL gives them, at that time of the server."""
    place = {name: int(partitions.get(name.encode(), b"0")) for name in ("epoch", "position")}
    # A service's id is `<provider>:<model>`, a provider's has no colon.
    of_providers = {field: value for field, value in services.items() if field.count(b":") == 1}
    of_services = {field: value for field, value in services.items() if field.count(b":") > 1}
    return PoolView(
        pool=pool,
        now_ms=now_ms,
        rules=_group(partitions, RuleView),
        partitions=_group(partitions, PartitionView),
        services=_group(of_services, ServiceView),
        providers=_group(of_providers, ProviderView),
        **place,
    )


def _group(fields: Mapping[bytes, bytes], kind: type[_View]) -> dict[str, _View]:
    """The hash's fields `name:id` gathered by id, for the names that the struct has."""
    names = set(kind.__struct_fields__)
    gathered: dict[str, dict[str, object]] = {}
    for field, value in fields.items():
        name, _, id_ = field.decode().partition(":")
        if name in names and id_:
            gathered.setdefault(id_, {})[name] = _read(name, value.decode())
    return {id_: msgspec.convert(values, kind) for id_, values in gathered.items()}


def _read(name: str, text: str) -> object:
    match name:
        case "windows":
            return _windows(text)
        case "minute":
            return MinuteView(buckets=tuple((b, r, t) for b, r, t in _rows(text)))
        case "breaker":
            return BreakerView(**dict(zip(BreakerView.__struct_fields__, map(int, text.split()), strict=False)))
        case "provider":
            return tuple(map(int, text.split()))
        case _:
            return text if name in _TEXTS else int(text)


def _rows(text: str) -> Iterator[list[int]]:
    for part in filter(None, text.split(";")):
        yield [int(number) for number in part.split()]


def _windows(text: str) -> tuple[WindowView, ...]:
    return tuple(
        WindowView(length_s=length, start_ms=start, requests=requests, tokens=tokens, output=output)
        for length, start, requests, tokens, output in _rows(text)
    )
