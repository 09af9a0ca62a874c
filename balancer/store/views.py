"""Read-only pictures of the shared state, decoded from the pool's hashes.

A pool may have thousands of services, of which most readers want a few: each is decoded when it is first asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Generic, Literal, TypeVar

import msgspec

from balancer import stored
from balancer.store import keys

BreakerState = Literal["closed", "half_open", "open"]

_BUCKET_MS = 5000
_BUCKETS = 12
_WINDOW = ("length_s", "start_ms", "requests", "tokens", "output")


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


class BreakerView(msgspec.Struct, frozen=True):
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
    rules: Mapping[str, RuleView]
    partitions: Mapping[str, PartitionView]
    services: Mapping[str, ServiceView]
    providers: Mapping[str, ProviderView] = {}

    def cursor(self, rule: str, entry: str = "") -> str:
        """The current service of the rule, or of an entry of it, empty for none."""
        partition = self.partitions.get(keys.partition(rule, entry))
        return partition.cursor if partition else ""

    def streak(self, rule: str, entry: str = "") -> int | None:
        """The consecutive picks on the current service of the rule, or of an entry of it; None before the first."""
        partition = self.partitions.get(keys.partition(rule, entry))
        return partition.streak if partition else None

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


_T = TypeVar("_T")


class _Read(Mapping[str, _T], Generic[_T]):
    """What a hash says under `name:<id>`, by id; `names` are those that make one be there."""

    def __init__(self, fields: Mapping[bytes, bytes], decode: Callable[[_Texts], _T], *names: str) -> None:
        self._fields = fields
        self._decode = decode
        self._prefixes = tuple(f"{name}:".encode() for name in names)
        self._decoded: dict[str, _T] = {}
        self._ids: tuple[str, ...] | None = None

    def __getitem__(self, id_: str) -> _T:
        found = self._decoded.get(id_)
        if found is None:
            key = id_.encode()
            if not key or not any(prefix + key in self._fields for prefix in self._prefixes):
                raise KeyError(id_)
            found = self._decoded[id_] = self._decode(
                lambda name: self._fields.get(b"%b:%b" % (name, key), b"").decode()
            )
        return found

    def __iter__(self) -> Iterator[str]:
        if self._ids is None:
            prefixes = self._prefixes
            found = (field.partition(b":")[2].decode() for field in self._fields if field.startswith(prefixes))
            self._ids = tuple(dict.fromkeys(filter(None, found)))
        return iter(self._ids)

    def __len__(self) -> int:
        return sum(1 for _ in self)


_Texts = Callable[[bytes], str]
"""What the hash says of an id under a name, empty for nothing."""


def read_pool(pool: str, partitions: Mapping[bytes, bytes], services: Mapping[bytes, bytes], now_ms: int) -> PoolView:
    """The picture from the two hashes as HGETALL gives them, at that time of the server."""
    epoch, position = stored.place({"place": text} if (text := services.get(b"place", b"").decode()) else {})
    return PoolView(
        pool=pool,
        now_ms=now_ms,
        epoch=epoch,
        position=position,
        rules=_Read(partitions, lambda of: _rule(of(b"rule")), "rule"),
        partitions=_Read(partitions, lambda of: _partition(of(b"tactic"), of(b"partition")), "partition"),
        services=_Read(services, lambda of: _service(of(b"service"), of(b"totals")), "service"),
        providers=_Read(services, lambda of: _provider(of(b"meter"), of(b"provider")), "meter", "provider"),
    )


def _rule(text: str) -> RuleView:
    numbers = stored.rule(text)
    return RuleView(revision=numbers["revision"], seq=numbers["seq"])


def _partition(tactic: str, text: str) -> PartitionView:
    state = stored.partition(text)
    name = stored.tactic(tactic)[0] if tactic else ""
    return PartitionView(tactic=name, cursor=state.cursor, streak=state.streak, tier=state.tier)


def _service(text: str, totals: str) -> ServiceView:
    read = stored.service(text)
    ends = stored.totals(totals) if totals else {}
    ends.pop("cleared", None)
    return ServiceView(
        windows=tuple(WindowView(**dict(zip(_WINDOW, row, strict=True))) for row in read.windows),
        minute=_minute(read.minute),
        breaker=BreakerView(*read.breaker),
        **read.counters,
        **ends,
    )


def _provider(meter: str, numbers: str) -> ProviderView:
    provider = tuple(map(int, numbers.split()))
    if not meter:
        return ProviderView(provider=provider)
    read = stored.meter(meter)
    return ProviderView(minute=_minute(read.minute), provider=provider, **read.counters)


def _minute(steps: tuple[stored.Row, ...]) -> MinuteView:
    return MinuteView(buckets=tuple((step, requests, tokens) for step, requests, tokens in steps))
