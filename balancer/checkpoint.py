"""A pool's whole state, as the checkpoint script tells it, read into the reference's structs."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import msgspec

from balancer.domain import PartitionDefinition, ServiceDefinition
from balancer.reference import (
    Abandoned,
    Held,
    Lost,
    PartitionState,
    Pool,
    RuleState,
    ServiceState,
    Window,
    WorkerState,
)

_SERVICE_LINE = re.compile(r"(\d) (\d+) (\d+) ([^\n]+)\n")
_HELD = re.compile(r"h (\d+) (\d+) (.+)", re.DOTALL)
_LOST = re.compile(r"l (\d+) (\d+) (\d+) (.+)", re.DOTALL)
_ABANDONED = re.compile(r"x (\d+)")
_COUNTERS = frozenset(ServiceState.__struct_fields__)


class State(msgspec.Struct, frozen=True, kw_only=True):
    """What a checkpoint holds: the pool, and whether every one of its events is recorded."""

    pool: Pool
    record: str


class _Raw(msgspec.Struct):
    """Flat arrays of fields and values; an empty one comes as `{}`, for Lua knows no difference."""

    services: Any
    partitions: Any
    leases: Any
    holdings: Any


def read(text: str | bytes) -> State:
    """The state in a checkpoint's JSON. Raises msgspec.DecodeError or ValueError for what is none."""
    raw = msgspec.json.decode(text, type=_Raw)
    pool = Pool()
    partitions = dict(_pairs(raw.partitions))
    pool.epoch = int(partitions.get("epoch", "1"))
    pool.position = int(partitions.get("position", "0"))
    for field, value in _pairs(raw.services):
        name, _, service = field.partition(":")
        if name in _COUNTERS:
            state = pool.services.setdefault(service, ServiceState())
            setattr(state, name, read_windows(value) if name == "windows" else int(value))
    for field, value in partitions.items():
        name, _, key = field.partition(":")
        if name == "revision":
            ids = tuple(filter(None, partitions.get(f"partitions:{key}", "").split("\n")))
            pool.rules[key] = RuleState(revision=int(value), seq=int(partitions.get(f"seq:{key}", "0")), partitions=ids)
        elif name == "tactic":
            pool.partitions[key] = _partition(key, partitions)
    for worker, flat in raw.holdings or ():
        pool.workers[worker] = _worker(_pairs(flat))
    for worker, end_ms in _pairs(raw.leases):
        pool.workers.setdefault(worker, WorkerState()).lease_end_ms = int(float(end_ms))
    return State(pool=pool, record=partitions.get("record", "off"))


def read_windows(text: str) -> list[Window]:
    """Windows from `length start requests tokens` joined by `;`."""
    return [Window(*map(int, part.split(" "))) for part in text.split(";") if part]


def read_services(text: str) -> tuple[ServiceDefinition, ...]:
    """A partition's services from its lines `active window weight id`."""
    return tuple(
        ServiceDefinition(id=id_, active=int(active), window=int(window), weight=int(weight))
        for active, window, weight, id_ in _SERVICE_LINE.findall(text)
    )


def _pairs(flat: Any) -> Iterable[tuple[str, str]]:
    return zip(flat[::2], flat[1::2], strict=True) if flat else ()


def _partition(key: str, fields: dict[str, str]) -> PartitionState:
    definition = PartitionDefinition(
        id=key,
        tactic=fields[f"tactic:{key}"],
        request_threshold=int(fields[f"request_threshold:{key}"]),
        token_threshold=int(fields[f"token_threshold:{key}"]),
        cursor="",
        services=read_services(fields[f"services:{key}"]),
    )
    return PartitionState(definition=definition, cursor=fields[f"cursor:{key}"], streak=int(fields[f"streak:{key}"]))


def _worker(fields: Iterable[tuple[str, str]]) -> WorkerState:
    worker = WorkerState()
    for name, value in fields:
        if name == "last":
            worker.last = int(value)
        elif match := _HELD.fullmatch(value):
            worker.names[int(name)] = Held(match[3], int(match[1]), int(match[2]))
        elif match := _LOST.fullmatch(value):
            worker.names[int(name)] = Lost(match[4], int(match[1]), int(match[2]), int(match[3]))
        elif match := _ABANDONED.fullmatch(value):
            worker.names[int(name)] = Abandoned(int(match[1]))
        else:
            raise ValueError(f"a holding that is none: {value!r}")
    return worker


# -- invariants and differences ----------------------------------------------------------------------------------------


def broken_invariants(pool: Pool) -> list[str]:
    """What cannot be, whatever the events were: holdings that do not add up, counters below zero."""
    found = []
    held: dict[str, tuple[int, int]] = {}
    for worker in pool.workers.values():
        for name in worker.names.values():
            if isinstance(name, Held):
                count, reserved = held.get(name.service, (0, 0))
                held[name.service] = count + 1, reserved + name.reserved
    for service, state in pool.services.items():
        count, reserved = held.get(service, (0, 0))
        if state.in_flight != count:
            found.append(f"{service}: {state.in_flight} in flight, {count} holdings")
        if state.reserved != reserved:
            found.append(f"{service}: {state.reserved} tokens reserved, holdings of {reserved}")
        values = {name: value for name, value in msgspec.structs.asdict(state).items() if isinstance(value, int)}
        values |= {
            f"window {w.length} {name}": getattr(w, name) for w in state.windows for name in ("requests", "tokens")
        }
        found += [f"{service}: {name} is {value}" for name, value in values.items() if value < 0]
    found += [f"{service}: holdings, but no counters" for service in held.keys() - pool.services.keys()]
    return found


def differences(expected: Pool, actual: Pool) -> list[str]:
    """What two states disagree on, a line each. No event tells of leases and abandoned names: they are left out."""
    found = []
    for kind, before, after in (
        ("service", _services(expected), _services(actual)),
        ("rule", _rules(expected), _rules(actual)),
        ("partition", _partitions(expected), _partitions(actual)),
        ("holding", _holdings(expected), _holdings(actual)),
    ):
        found += [
            f"{kind} {key}: {after.get(key)}, expected {before.get(key)}"
            for key in sorted(before.keys() | after.keys(), key=str)
            if before.get(key) != after.get(key)
        ]
    return found


def _services(pool: Pool) -> dict[Any, Any]:
    return {k: msgspec.to_builtins(v) for k, v in pool.services.items() if any(msgspec.structs.astuple(v))}


def _rules(pool: Pool) -> dict[Any, Any]:
    return {k: msgspec.to_builtins(v) for k, v in pool.rules.items() if v.revision}


def _partitions(pool: Pool) -> dict[Any, Any]:
    return {k: msgspec.to_builtins(v) for k, v in pool.partitions.items()}


def _holdings(pool: Pool) -> dict[Any, Any]:
    return {
        (worker, number): msgspec.structs.astuple(name)
        for worker, state in pool.workers.items()
        for number, name in state.names.items()
        if isinstance(name, Held | Lost)
    }
