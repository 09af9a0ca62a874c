"""A pool's whole state, as the checkpoint script tells it, read into the reference's structs.

There may be thousands of rules: what goes through all of them does so in steps (`reading`, `checking`, `comparing`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import msgspec

from balancer import stored
from balancer.breaker import Breaker
from balancer.domain import PartitionDefinition, ProviderDefinition, ServiceDefinition
from balancer.ledger import ServiceState, Window
from balancer.limits import Bucket, Meter, Minute
from balancer.reference import (
    BY_PROVIDER,
    Abandoned,
    Held,
    Lost,
    PartitionState,
    Pool,
    ProviderState,
    RuleState,
    WorkerState,
    provider_of,
)
from balancer.steps import Steps, finished

_SERVICE_LINE = re.compile(r"([^\n]+)\t(\d) (\d+) (-?\d+) (-?\d+) (-?\d+) (-?\d+) (-?\d+) (\d+)\n")
_HELD = re.compile(r"h (\d+) (\d+) (\d+) (\d+) (.+)", re.DOTALL)
_LOST = re.compile(r"l (\d+) (\d+) (\d+) (.+)", re.DOTALL)
_ABANDONED = re.compile(r"x (\d+)")


class State(msgspec.Struct, frozen=True, kw_only=True):
    """What a checkpoint holds: the pool, whether every one of its events is recorded, and its list of open breakers."""

    pool: Pool
    record: str
    broken: str


class _Raw(msgspec.Struct):
    """Flat arrays of fields and values, each parsed by itself; an empty one comes as `{}`: Lua knows no difference."""

    services: msgspec.Raw
    partitions: msgspec.Raw
    leases: msgspec.Raw
    holdings: msgspec.Raw


def read(text: str | bytes) -> State:
    """The state in a checkpoint's JSON. Raises msgspec.DecodeError or ValueError for what is none."""
    return finished(reading(text))


def reading(text: str | bytes) -> Steps[State]:
    """As `read`, in steps."""
    raw = msgspec.json.decode(text, type=_Raw)
    yield
    pool = Pool()
    services = yield from _fields(raw.services)
    pool.epoch, pool.position = stored.place(services)
    for field, value in services.items():
        name, _, key = field.partition(":")
        match name:
            case "provider":
                revision = int(services[f"provider_revision:{key}"])
                pool.providers[key] = ProviderState(read_provider(key, value), revision)
            case "service":
                _read_service(pool.service(key), stored.service(value))
            case "totals":
                _set(pool.service(key), stored.totals(value))
            case "windows_revision":
                pool.service(key).windows_revision = int(value)
            case "meter":
                measured = stored.meter(value)
                meter = pool.meters.setdefault(key, Meter())
                meter.minute = _minute(measured.minute)
                _set(meter, measured.counters)
            case _:
                pass
        yield
    partitions = yield from _fields(raw.partitions)
    for field, value in partitions.items():
        name, _, key = field.partition(":")
        if name == "rule":
            pool.rules[key] = _rule(stored.rule(value), partitions.get(f"partitions:{key}", ""))
        elif name == "tactic":
            pool.partitions[key] = _partition(key, partitions)
        yield
    for worker, flat in msgspec.json.decode(raw.holdings) or ():
        pool.workers[worker] = yield from _worker(_pairs(flat))
    for worker, end_ms in _pairs(msgspec.json.decode(raw.leases)):
        pool.workers.setdefault(worker, WorkerState()).lease_end_ms = int(float(end_ms))
    return State(pool=pool, record=stored.record(services), broken=services.get("broken", ""))


def read_windows(text: str) -> list[Window]:
    """Windows from `length start requests tokens output` joined by `;`."""
    return [Window(*row) for row in stored.rows(text)]


def read_minute(text: str) -> Minute:
    """A minute from `bucket requests tokens` joined by `;`."""
    return _minute(stored.rows(text))


def read_breaker(text: str) -> Breaker:
    """A breaker from its numbers, empty for one that never saw anything."""
    return Breaker(*map(int, text.split()))


def read_params(text: str) -> dict[str, int]:
    """A tactic's numbers from `name value` joined by `;`."""
    pairs = (part.split(" ") for part in text.split(";") if part)
    return {name: int(value) for name, value in pairs}


def read_provider(id_: str, text: str) -> ProviderDefinition:
    """A provider's limits and breaker numbers from those numbers in order."""
    names = ProviderDefinition.__struct_fields__[1:]
    return ProviderDefinition(id=id_, **dict(zip(names, map(int, text.split(" ")), strict=True)))


def read_services(text: str) -> tuple[ServiceDefinition, ...]:
    """A partition's services from its lines: id, a tab, `active window weight tier rpm tpm in_flight cost`."""
    names = ServiceDefinition.__struct_fields__[1:]
    return tuple(
        ServiceDefinition(id=id_, **dict(zip(names, map(int, numbers), strict=True)))
        for id_, *numbers in _SERVICE_LINE.findall(text)
    )


def _read_service(state: ServiceState, read: stored.Measured) -> None:
    state.windows = [Window(*row) for row in read.windows]
    state.minute = _minute(read.minute)
    state.breaker = Breaker(*read.breaker)
    _set(state, read.counters)


def _minute(steps: Iterable[stored.Row]) -> Minute:
    return Minute([Bucket(*step) for step in steps])


def _set(state: ServiceState | Meter, counters: Mapping[str, int]) -> None:
    for name, value in counters.items():
        setattr(state, name, value)


def _rule(numbers: Mapping[str, int], partitions: str) -> RuleState:
    return RuleState(
        revision=numbers["revision"],
        seq=numbers["seq"],
        partitions=tuple(filter(None, partitions.split("\n"))),
        retry_permille=numbers["retry_permille"],
        budget=None if numbers["budget"] < 0 else numbers["budget"],
    )


def _fields(raw: msgspec.Raw) -> Steps[dict[str, str]]:
    flat = msgspec.json.decode(raw)
    yield
    fields = dict(_pairs(flat))
    yield
    return fields


def _pairs(flat: Any) -> Iterable[tuple[str, str]]:
    return zip(flat[::2], flat[1::2], strict=True) if flat else ()


def _partition(key: str, fields: Mapping[str, str]) -> PartitionState:
    tactic, refuses, params = stored.tactic(fields[f"tactic:{key}"])
    definition = PartitionDefinition(
        id=key,
        tactic=tactic,
        params=read_params(params),
        refuses=refuses,
        services=read_services(fields[f"services:{key}"]),
    )
    state = stored.partition(fields[f"partition:{key}"])
    return PartitionState(
        definition=definition,
        cursor=state.cursor,
        streak=state.streak,
        tier=state.tier,
        hold=state.hold,
        memory=state.memory,
    )


def _worker(fields: Iterable[tuple[str, str]]) -> Steps[WorkerState]:
    worker = WorkerState()
    for name, value in fields:
        yield
        if name == "last":
            worker.last = int(value.partition(" ")[0])
        elif match := _HELD.fullmatch(value):
            reserved, deadline_ms, meters, probe = map(int, match.groups()[:4])
            worker.names[int(name)] = Held(match[5], reserved, deadline_ms, meters, probe)
        elif match := _LOST.fullmatch(value):
            worker.names[int(name)] = Lost(match[4], int(match[1]), int(match[2]), int(match[3]))
        elif match := _ABANDONED.fullmatch(value):
            worker.names[int(name)] = Abandoned(int(match[1]))
        else:
            raise ValueError(f"a holding that is none: {value!r}")
    return worker


# -- invariants and differences ----------------------------------------------------------------------------------------


def broken_invariants(pool: Pool) -> list[str]:
    """What cannot be, whatever the events were: holdings that do not add up, probes without one, numbers below 0."""
    return finished(checking(pool))


def checking(pool: Pool) -> Steps[list[str]]:
    """As `broken_invariants`, in steps."""
    found: list[str] = []
    measured: dict[str, ServiceState | Meter] = {**pool.services, **pool.meters}
    holdings: dict[str, list[Held]] = {}
    for worker in pool.workers.values():
        for name in worker.names.values():
            if isinstance(name, Held):
                holdings.setdefault(name.service, []).append(name)
                if name.meters & BY_PROVIDER:
                    holdings.setdefault(provider_of(name.service), []).append(name)
            yield
    for id_, state in measured.items():
        own = holdings.get(id_, [])
        reserved = sum(name.reserved for name in own)
        if state.in_flight != len(own):
            found.append(f"{id_}: {state.in_flight} in flight, {len(own)} holdings")
        if state.reserved != reserved:
            found.append(f"{id_}: {state.reserved} tokens reserved, holdings of {reserved}")
        found += [f"{id_}: {name} is {value}" for name, value in _numbers(state) if value < 0]
        yield
    for id_, service in pool.services.items():
        if service.breaker.probe > 0:
            probes = sum(name.probe == service.breaker.probe for name in holdings.get(id_, []))
            if probes != 1:
                found.append(f"{id_}: a probe is out from position {service.breaker.probe}, {probes} holdings of it")
        yield
    found += [f"rule {id_}: its budget is {r.budget}" for id_, r in pool.rules.items() if r.budget and r.budget < 0]
    found += [f"{id_}: holdings, but no counters" for id_ in holdings.keys() - measured.keys()]
    return found


def _numbers(value: Any, name: str = "") -> Iterator[tuple[str, int]]:
    """All whole numbers in a struct, with what they are called."""
    if isinstance(value, int):
        yield name, value
    elif isinstance(value, msgspec.Struct):
        for field in value.__struct_fields__:
            yield from _numbers(getattr(value, field), f"{name} {field}".strip())
    elif isinstance(value, list):
        for item in value:
            yield from _numbers(item, name)


def differences(expected: Pool, actual: Pool) -> list[str]:
    """What two states disagree on, a line each. No event tells of leases and abandoned names: they are left out."""
    return finished(comparing(expected, actual))


def comparing(expected: Pool, actual: Pool) -> Steps[list[str]]:
    """As `differences`, in steps."""
    found = []
    for kind, tell in _KINDS:
        before, after = tell(expected), tell(actual)
        yield
        for key in sorted(before.keys() | after.keys(), key=str):
            one, other = _unless_new(before.get(key)), _unless_new(after.get(key))
            if one != other:
                found.append(f"{kind} {key}: {_told(other)}, expected {_told(one)}")
            yield
    return found


def _unless_new(struct: msgspec.Struct | None) -> msgspec.Struct | None:
    """The struct, None for one that says no more than if it were not there."""
    return None if struct in _NEW else struct


def _told(struct: msgspec.Struct | None) -> Any:
    return None if struct is None else msgspec.to_builtins(struct)


_Structs = Mapping[Any, msgspec.Struct]


def _holdings(pool: Pool) -> _Structs:
    return {
        (worker, number): name
        for worker, state in pool.workers.items()
        for number, name in state.names.items()
        if isinstance(name, Held | Lost)
    }


_NEW = (ServiceState(), Meter())
_KINDS: tuple[tuple[str, Callable[[Pool], _Structs]], ...] = (
    ("service", lambda pool: pool.services),
    ("provider", lambda pool: pool.providers),
    ("meter", lambda pool: pool.meters),
    ("rule", lambda pool: {k: v for k, v in pool.rules.items() if v.revision}),
    ("partition", lambda pool: pool.partitions),
    ("holding", _holdings),
)
