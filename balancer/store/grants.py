"""Grants in Redis: of each provider the tokens that OAuth has given the fleet, and who may ask for new ones.

One worker at a time asks, under a lease with a fencing number. Taking the lease is the intent to use the refresh token,
and is written before the request; what came of it is written behind, and only under the fence of the last lease. A
refresh token that is good for one use, and whose use has no known result, is never used again: the grant is in doubt.
Both writes wait for a replica, where there is one, so that a failover does not forget them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec

from balancer.store import keys
from balancer.store.connection import Commands, translated
from balancer.store.scripts import load

LeaseWord = Literal["acquired", "held", "later", "fresh", "newer", "lost", "in_doubt", "left"]
_REPLICA_MS = 200
"""So long a write waits for a replica; where there is none, in vain."""


class Grant(msgspec.Struct, frozen=True, kw_only=True):
    """A provider's grant. Its tokens are sealed, empty where those of the configuration still stand."""

    state: Literal["ready", "asking", "lost", "in_doubt"] = "ready"
    seeds: str = ""
    revision: int = 0
    version: int = 0
    fence: int = 0
    access: str = ""
    refresh: str = ""
    ends_ms: int = 0
    due_ms: int = 0
    again_ms: int = 0
    renewed_ms: int = 0
    lease_until_ms: int = 0
    failures: int = 0
    fault: str = ""

    def is_of(self, seed: str) -> bool:
        """True when the family of that name is, or once was, this one's."""
        return seed in self.seeds.split()


_FIELDS = tuple(field.encode() for field in Grant.__struct_fields__)
_KEPT_IN_RESTORE = (
    *("state", "seeds", "revision", "access", "refresh", "ends_ms", "due_ms", "renewed_ms", "lease_until_ms", "fault"),
)


class Lease(msgspec.Struct, frozen=True, kw_only=True):
    """What came of asking for a lease. `number` is the fence, or ms, or a version: see grant_lease.lua."""

    word: LeaseWord
    number: int
    now_ms: int = 0
    version: int = 0
    failures: int = 0
    refresh: str = ""


class Asking(msgspec.Struct, frozen=True, kw_only=True):
    """What a lease is asked for with; see grant_lease.lua."""

    provider: str
    holder: str
    lease_ms: int
    seed: str
    revision: int
    due_ms: int
    rotates: bool
    refused_version: int = -1
    least_ms: int = 0


class Grants:
    """Reads and writes them. Raises StoreUnavailableError when Redis does not answer."""

    def __init__(self, commands: Commands, scripts_dir: str = "") -> None:
        self._commands = commands
        self._scripts_dir = scripts_dir

    async def look(self) -> tuple[int, dict[str, int]]:
        """The server's time in ms, and for each provider with a grant how often that has changed."""
        reply = await self._run("grant_look", {"grants": keys.GRANTS}, {})
        values = [_text(value) for value in reply[1:]]
        return int(reply[0]), {uuid: int(count) for uuid, count in zip(values[::2], values[1::2], strict=True)}

    async def load(self, provider: str) -> Grant | None:
        """The grant of a provider, None if it has none."""
        key = keys.grant(provider)
        with translated("reading a grant"):
            values: Any = await self._commands.run(key, "HMGET", key, *_FIELDS)
        found = {name.decode(): _text(value) for name, value in zip(_FIELDS, values, strict=True) if value is not None}
        return msgspec.convert(found, Grant, strict=False) if found.get("seeds") else None

    async def lease(self, asking: Asking) -> Lease:
        """Acquires the lease, or says why not. Asked again by the same holder, it has the same answer."""
        reply = await self._run(
            "grant_lease",
            _keys_of(asking.provider),
            {
                "now_ms": 0,
                "provider": asking.provider,
                "holder": asking.holder,
                "lease_ms": asking.lease_ms,
                "seed": asking.seed,
                "revision": asking.revision,
                "due_ms": asking.due_ms,
                "rotates": int(asking.rotates),
                "version": asking.refused_version,
                "least_ms": asking.least_ms,
            },
            is_durable=True,
        )
        word: Any = _text(reply[0])
        if word != "acquired":
            return Lease(word=word, number=int(reply[1]))
        _, fence, now_ms, version, failures, refresh = reply
        return Lease(
            word="acquired",
            number=int(fence),
            now_ms=int(now_ms),
            version=int(version),
            failures=int(failures),
            refresh=_text(refresh),
        )

    async def keep(self, provider: str, grant: Grant) -> bool:
        """Writes new tokens under the lease's fence; False when another lease, or another login, came between."""
        reply = await self._run(
            "grant_keep",
            _keys_of(provider),
            {
                "provider": provider,
                "fence": grant.fence,
                "version": grant.version,
                "access": grant.access,
                "refresh": grant.refresh,
                "ends_ms": grant.ends_ms,
                "due_ms": grant.due_ms,
                "renewed_ms": grant.renewed_ms,
                "seeds": grant.seeds,
                "revision": grant.revision,
            },
            is_durable=True,
        )
        return bool(reply[0] == b"kept")

    async def release(self, provider: str, fence: int, state: str, pause_ms: int, fault: str) -> bool:
        """Gives back a lease that has brought no tokens; False when it is nobody's any more."""
        reply = await self._run(
            "grant_release",
            _keys_of(provider),
            {
                "now_ms": 0,
                "provider": provider,
                "fence": fence,
                "state": state,
                "pause_ms": pause_ms,
                "fault": fault,
            },
            is_durable=True,
        )
        return bool(reply[0] == b"released")

    async def restore(self, provider: str, grant: Grant) -> bool:
        """Puts back a grant of which the store has only an older state, or none; False where it has one as new."""
        fields = [part for name in _KEPT_IN_RESTORE for part in (name, str(getattr(grant, name)))]
        reply = await self._run(
            "grant_restore",
            _keys_of(provider),
            {"provider": provider, "version": grant.version, "fence": grant.fence},
            rest=fields,
        )
        return bool(reply[0] == b"restored")

    async def reseal(self, provider: str, old: Grant, access: str, refresh: str) -> bool:
        """Writes its tokens as another key has sealed them; False when there are others by now."""
        reply = await self._run(
            "grant_reseal",
            _keys_of(provider),
            {
                "provider": provider,
                "old_access": old.access,
                "old_refresh": old.refresh,
                "access": access,
                "refresh": refresh,
            },
        )
        return bool(reply[0] == b"resealed")

    async def keep_from_expiring(self, provider: str) -> None:
        """Lets a grant live on that nobody writes to, since its access token does not end."""
        with translated("keeping a grant"):
            for key in (keys.grant(provider), keys.GRANTS):
                await self._commands.run(key, "PEXPIRE", key, keys.GRANT_MS)

    async def _run(
        self,
        name: str,
        names: Mapping[str, str],
        arguments: Mapping[str, str | int],
        rest: Sequence[str | int] = (),
        *,
        is_durable: bool = False,
    ) -> list[Any]:
        script = load(name, self._scripts_dir)
        with translated(f"running {name}"):
            key = next(iter(names.values()))
            command = ("EVAL", script.source, *script.command(names, arguments, rest))
            reply: Any = await self._commands.run(key, *command, replica_ms=_REPLICA_MS if is_durable else 0)
        return list(reply)


def _keys_of(provider: str) -> dict[str, str]:
    return {"grant": keys.grant(provider), "grants": keys.GRANTS}


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
