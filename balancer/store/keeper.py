"""A worker's part in keeping the fleet's OAuth tokens fresh: it follows the grants, and asks when it is its turn.

Every worker looks twice a second which grants have changed, so that all use a new token within a second. When one is
due, each tries to take its lease, and one gets it. What a worker knows of a grant it puts back where the store has lost
it. Time is the server's: what this worker's clock says does not count.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

import msgspec

from balancer import log, oauth
from balancer.domain import OAuthDetail, Provider
from balancer.errors import BalancerError, ConfigurationError, StoreUnavailableError, UpstreamError
from balancer.store.credentials import Credentials, Sealer
from balancer.store.grants import Asking, Grant, Grants, Lease

POLL_S = 0.5
ASK_S = 30.0
"""A token endpoint has so long to answer."""
_LEASE_MS = round(ASK_S * 1000) + 15_000
_CLOSELY_S = 0.05
_READ_ALL_S = 10.0
_KEEP_S = 3600.0
_AGAIN_S = 0.2
_BEREFT_S = 3 * POLL_S
"""A grant that is not there may just have been lost: by then a worker that knows it has put it back."""
PATIENCE_S = 10.0
"""A request that was refused its token waits for another one no longer."""
FORCED_AGE_MS = 30_000
"""A token that was refused is replaced early only at this age: a new one that is refused too is not what is wrong."""
_NO_USE_S = 1.0
_LATE_S = 5.0
"""So long after somebody has waited in vain nobody does: there may be another service."""
_HEAL = "log in again, and publish the new refresh_token with `balancer apply`"


class Ask(Protocol):
    """Asks a token endpoint."""

    async def __call__(
        self, provider: Provider, renewal: oauth.Renewal, refresh_token: str, now_ms: int
    ) -> oauth.Renewed | oauth.Refused:
        """What it answers. Raises UpstreamError where there was no answer, ConfigurationError."""


class KeeperEvents(msgspec.Struct, kw_only=True):
    """What a keeper tells its owner: a provider has another access token; a refresh has ended so."""

    changed: Callable[[str], None] = lambda provider: None
    refreshed: Callable[[str, str], None] = lambda provider, outcome: None


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """Whose tokens are renewed, under a revision of the configuration."""

    revision: int = 0
    providers: tuple[Provider, ...] = ()


class _Held(msgspec.Struct, kw_only=True):
    """What this worker knows of a grant, and its access token, empty where the configuration's stands."""

    grant: Grant
    changes: int
    access_token: str = ""
    is_written: bool = True
    """False for tokens that the store is yet to be told."""


class _Waiting(msgspec.Struct, kw_only=True):
    """What a request to renew stands on: the task that all who wait for it share."""

    task: asyncio.Task[None]
    is_forced: bool


class Keeper:
    """Keeps the tokens of the providers in `plan` as long as it runs."""

    def __init__(
        self,
        grants: Grants,
        credentials: Credentials,
        sealer: Sealer | None,
        plan: Callable[[], Plan],
        ask: Ask,
        events: KeeperEvents | None = None,
    ) -> None:
        self._grants = grants
        self._credentials = credentials
        self._sealer = sealer
        self._plan = plan
        self._ask = ask
        self._events = events or KeeperEvents()
        self._held: dict[str, _Held] = {}
        self._missed_since: dict[str, float] = {}
        self._logins: dict[str, str] = {}
        """Whose a family of tokens is."""
        self._without_login: set[str] = set()
        self._known_plan: Plan | None = None
        self._refreshing: dict[str, _Waiting] = {}
        self._holders: dict[str, str] = {}
        """Under which name a lease was asked for that may have been given without our hearing of it."""
        self._wait_until: dict[str, float] = {}
        """Nobody asks the store for a lease before."""
        self._no_use_until: dict[str, float] = {}
        self._faults: dict[str, str] = {}
        self._clock = (0, 0.0)
        self._read_all_at = 0.0
        self._keep_at = time.monotonic() + _KEEP_S
        self._wake = asyncio.Event()
        self._running: asyncio.Task[None] | None = None
        self._is_warned = False

    # -- life ----------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begins to follow the grants."""
        self._running = asyncio.create_task(self._run())

    async def close(self, timeout_s: float) -> None:
        """Ends; a request that is on its way to a token endpoint has so long to bring its tokens home."""
        if self._running is not None:
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)
        tasks = [waiting.task for waiting in self._refreshing.values()]
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=timeout_s)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            try:
                await self._turn()
            except StoreUnavailableError as exc:
                self._note("", f"cannot look after OAuth tokens: {exc.message}")
            except Exception as exc:  # noqa: BLE001 - a task's root: the next turn tries again.
                log.error("looking after OAuth tokens broke", exc=exc)
            try:
                async with asyncio.timeout(_CLOSELY_S if self._is_watched else POLL_S):
                    await self._wake.wait()
            except TimeoutError:
                pass  # Nobody is in a hurry.
            self._wake.clear()

    @property
    def _is_watched(self) -> bool:
        """True while a request waits for another token."""
        return any(waiting.is_forced for waiting in self._refreshing.values())

    # -- who asks ------------------------------------------------------------------------------------------------------

    def access_token(self, provider: Provider) -> str:
        """The token that the fleet has been given last, empty where that of the configuration stands."""
        held = self._held.get(provider.uuid)
        return held.access_token if held is not None else ""

    def is_kept(self, provider: Provider) -> bool:
        """True for a provider whose token is renewed here."""
        return self._sealer is not None and oauth.is_renewed(provider)

    async def renew(self, provider: Provider, refused: str) -> bool:
        """Has another access token than the one that an upstream has refused; False when there is none to be had.

        Of all requests of the fleet that ask, one token endpoint hears once.
        """
        uuid, loop = provider.uuid, asyncio.get_running_loop()
        if not self.is_kept(provider) or uuid in self._without_login:
            return False
        if self._current(provider) != refused:
            return True
        if loop.time() < self._no_use_until.get(uuid, 0):
            return False
        no_use_s = _LATE_S
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE_S):
                while uuid not in self._held and self._current(provider) == refused:  # noqa: ASYNC110 - the store's
                    await asyncio.sleep(_CLOSELY_S)
                while self._current(provider) == refused:
                    waiting = self._refreshing.get(uuid)
                    if waiting is None or waiting.task.done():  # To await what is done gives nobody else a turn.
                        waiting = self._begin(provider, is_forced=True)
                    self._wake.set()
                    await asyncio.shield(waiting.task)
                    if waiting.is_forced:
                        break
            no_use_s = _NO_USE_S
        if self._current(provider) != refused:
            return True
        self._no_use_until[uuid] = loop.time() + no_use_s
        return False

    def _current(self, provider: Provider) -> str:
        try:
            return self.access_token(provider) or self._credentials.access_token(provider)
        except ConfigurationError:
            return ""

    def left_s(self) -> dict[str, float]:
        """For each provider whose token is known to end, how long it still lives; less than 0 once it has ended."""
        now_ms = self.now_ms()
        found = {}
        for provider in self._plan().providers if now_ms else ():
            held, detail = self._held.get(provider.uuid), provider.oauth_detail
            ends_ms = held.grant.ends_ms if held is not None and held.grant.access else 0
            if not ends_ms and detail is not None and (held is None or not held.grant.access):
                ends_ms = oauth.own_ends_ms(detail)
            if ends_ms:
                found[provider.uuid] = (ends_ms - now_ms) / 1000
        return found

    def faults(self) -> dict[str, str]:
        """For each provider whose tokens nobody can renew any more, why, and what to do."""
        return {
            uuid: f"{held.grant.state.replace('_', ' ')}: {held.grant.fault}; {_HEAL}"
            for uuid, held in self._held.items()
            if held.grant.state in ("lost", "in_doubt")
        }

    def now_ms(self) -> int:
        """The server's clock, 0 before it was first read."""
        read_ms, at = self._clock
        return read_ms + round((time.monotonic() - at) * 1000) if read_ms else 0

    # -- following -----------------------------------------------------------------------------------------------------

    async def _turn(self) -> None:
        plan = self._plan()
        uuids = {provider.uuid for provider in plan.providers}
        for gone in self._held.keys() - uuids:
            del self._held[gone]
            self._events.changed(gone)
        if not plan.providers:
            return
        if self._sealer is None:
            if not self._is_warned:
                self._is_warned = True
                log.warning("OAuth tokens are not renewed: this worker has no BALANCER_SECRET_KEY to seal them")
            return
        now_ms, changes = await self._grants.look()
        self._clock = (now_ms, time.monotonic())
        self._faults.pop("", None)
        reads_all = time.monotonic() >= self._read_all_at
        if reads_all:
            self._read_all_at = time.monotonic() + _READ_ALL_S
        if plan is not self._known_plan:
            self._known_plan = plan
            self._logins.clear()
            self._without_login.clear()
        for provider in plan.providers:
            held, count = self._held.get(provider.uuid), changes.get(provider.uuid, 0)
            if held is None or held.changes != count or reads_all:
                await self._read(provider, count)
            self._refresh_if_due(provider, plan.revision)
        if time.monotonic() >= self._keep_at:
            self._keep_at = time.monotonic() + _KEEP_S
            for provider in plan.providers:
                await self._grants.keep_from_expiring(provider.uuid)

    async def _read(self, provider: Provider, changes: int) -> None:
        """Takes over the grant as it stands, or puts back what the store has lost of it."""
        uuid = provider.uuid
        found = await self._grants.load(uuid)
        held = self._held.get(uuid)
        if held is not None and (found is None or _place(found) < _place(held.grant)):
            if held.is_written and await self._grants.restore(uuid, held.grant):
                log.warning("the store had lost a provider's OAuth tokens, which were put back", provider=provider.name)
            return
        if found is not None:
            self._missed_since.pop(uuid, None)
            self._take(provider, found, changes)

    def _take(self, provider: Provider, grant: Grant, changes: int, *, is_written: bool = True) -> None:
        uuid, held = provider.uuid, self._held.get(provider.uuid)
        access_token = held.access_token if held is not None else ""
        if held is None or held.grant.access != grant.access:
            try:
                access_token = self._opened(uuid, "access", grant.access)
            except ConfigurationError as exc:
                self._note(uuid, exc.message)
        if held is None or held.grant.version != grant.version:
            self._wait_until.pop(uuid, None)
        is_other = held is None or held.access_token != access_token
        self._held[uuid] = _Held(grant=grant, changes=changes, access_token=access_token, is_written=is_written)
        if is_other:
            self._events.changed(uuid)

    def _opened(self, uuid: str, name: str, value: str) -> str:
        assert self._sealer is not None, "without one nothing is read"
        return self._sealer.open(value, (uuid, f"grant.{name}")) if value else ""

    def _sealed(self, uuid: str, name: str, value: str) -> str:
        assert self._sealer is not None, "without one nothing is kept"
        return self._sealer.seal(value, (uuid, f"grant.{name}")) if value else ""

    # -- refreshing ----------------------------------------------------------------------------------------------------

    def _refresh_if_due(self, provider: Provider, revision: int) -> None:
        uuid, now = provider.uuid, time.monotonic()
        try:
            renewal, detail = self._renewal(provider)
        except ConfigurationError as exc:
            self._note(uuid, exc.message)
            return
        seed = oauth.seed_of(renewal, detail.refresh_token)
        if renewal.grant == "refresh_token" and not self._has_login(uuid, seed):
            return
        if uuid in self._refreshing or now < self._wait_until.get(uuid, 0):
            return
        held, now_ms = self._held.get(uuid), self.now_ms()
        if held is None:
            if now - self._missed_since.setdefault(uuid, now) >= _BEREFT_S:
                self._begin(provider)
            return
        grant = held.grant
        is_known = grant.is_of(seed)
        if renewal.grant == "client_credentials":
            is_known = grant.seeds.split()[0] == seed or revision <= grant.revision
        match grant.state:
            case "ready":
                is_due = 0 <= grant.due_ms <= now_ms and grant.again_ms <= now_ms
            case "asking":
                is_due = grant.lease_until_ms <= now_ms
            case "lost" | "in_doubt":
                is_due = False
        # With a holder's name left, a lease was asked for, and perhaps given, and nothing came of it so far.
        if is_due or not is_known or uuid in self._holders:
            self._begin(provider)

    def _has_login(self, uuid: str, seed: str) -> bool:
        """False for a refresh token that a provider before it has too: each would use it up for the other."""
        owner = self._logins.setdefault(seed, uuid)
        if owner == uuid:
            self._without_login.discard(uuid)
            return True
        self._without_login.add(uuid)
        self._note(uuid, f"the refresh token is that of {owner} too: log in once more, for this one alone")
        return False

    def _renewal(self, provider: Provider) -> tuple[oauth.Renewal, OAuthDetail]:
        detail = self._credentials.oauth(provider)
        return oauth.renewal_of(detail), detail

    def _begin(self, provider: Provider, *, is_forced: bool = False) -> _Waiting:
        """Asks in a task, which is there for all who want the same."""
        uuid = provider.uuid
        refused = self._held[uuid].grant.version if is_forced else -1
        task = asyncio.create_task(self._refreshed(provider, refused))
        waiting = self._refreshing[uuid] = _Waiting(task=task, is_forced=is_forced)
        task.add_done_callback(lambda _: self._forget(uuid, waiting))
        return waiting

    def _forget(self, uuid: str, waiting: _Waiting) -> None:
        if self._refreshing.get(uuid) is waiting:
            del self._refreshing[uuid]

    async def _refreshed(self, provider: Provider, refused: int) -> None:
        uuid = provider.uuid
        try:
            await self._refresh(provider, refused)
        except StoreUnavailableError as exc:
            self._note(uuid, f"cannot ask for the lease: {exc.message}")
        except BalancerError as exc:
            self._wait(uuid, 5.0)
            self._note(uuid, exc.message)
        except Exception as exc:  # noqa: BLE001 - a task's root.
            self._wait(uuid, 5.0)
            log.error("renewing an access token broke", exc=exc, provider=provider.name)

    def _wait(self, uuid: str, seconds: float) -> None:
        self._wait_until[uuid] = time.monotonic() + seconds

    async def _refresh(self, provider: Provider, refused: int) -> None:
        """Asks for the lease, and with it for new tokens. Where another worker has it, waits for what comes of it."""
        uuid = provider.uuid
        renewal, detail = self._renewal(provider)
        seed = oauth.seed_of(renewal, detail.refresh_token)
        holder = self._holders.setdefault(uuid, secrets.token_hex(8))
        while True:
            lease = await self._grants.lease(
                Asking(
                    provider=uuid,
                    holder=holder,
                    lease_ms=_LEASE_MS,
                    seed=seed,
                    revision=self._plan().revision,
                    due_ms=oauth.own_due_ms(detail),
                    rotates=renewal.rotates,
                    refused_version=refused,
                    least_ms=FORCED_AGE_MS,
                )
            )
            await self._read(provider, -1)
            if lease.word != "held" or refused < 0:
                break
            # Somebody waits for the token that another worker is asking for: until that is there, or is not to be had.
            while (held := self._held.get(uuid)) and held.grant.state == "asking" and held.grant.version == refused:
                await asyncio.sleep(_CLOSELY_S)
                if held.grant.lease_until_ms <= self.now_ms():
                    break
            await asyncio.sleep(_CLOSELY_S)
        del self._holders[uuid]  # From here on nobody can tell what was sent: to ask again would be to use it again.
        match lease.word:
            case "acquired":
                await self._use(provider, renewal, detail, lease)
            case "left":
                self._tell(provider, "in_doubt", "the worker that asked has left no answer")
            case "held" | "later":
                self._wait(uuid, min(lease.number / 1000, POLL_S * 4))
            case "fresh" | "newer" | "lost" | "in_doubt":
                pass  # Which is what the grant says.

    async def _use(self, provider: Provider, renewal: oauth.Renewal, detail: OAuthDetail, lease: Lease) -> None:
        uuid, fence = provider.uuid, lease.number
        answer: oauth.Renewed | oauth.Refused
        refresh_token = detail.refresh_token
        try:
            if lease.refresh:
                refresh_token = self._opened(uuid, "refresh", lease.refresh)
            answer = await self._ask(provider, renewal, refresh_token, lease.now_ms)
        except ConfigurationError as exc:
            answer = oauth.Refused(outcome="failed", reason=exc.message)
        except UpstreamError as exc:
            answer = oauth.Refused(outcome="in_doubt" if exc.was_sent else "failed", reason=exc.message)
        if isinstance(answer, oauth.Renewed):
            await self._keep(provider, renewal, answer, lease, refresh_token)
            return
        outcome = answer.outcome
        if renewal.grant == "client_credentials" or (outcome == "in_doubt" and not renewal.rotates):
            outcome = "failed"  # Nothing was used up.
        pause_ms = oauth.pause_ms(lease.failures + 1, answer.after_ms) if outcome == "failed" else 0
        state = "ready" if outcome == "failed" else outcome
        self._tell(provider, outcome, answer.reason, again_in_s=pause_ms / 1000)
        await self._written(provider, lambda: self._grants.release(uuid, fence, state, pause_ms, answer.reason))
        await self._read(provider, -1)

    async def _keep(
        self, provider: Provider, renewal: oauth.Renewal, answer: oauth.Renewed, lease: Lease, refresh_token: str
    ) -> None:
        """Uses the new tokens at once, and writes them as long as it takes: nobody else has them."""
        uuid = provider.uuid
        refresh = (answer.refresh_token or refresh_token) if renewal.grant == "refresh_token" else ""
        before = self._held[uuid]
        grant = Grant(
            seeds=before.grant.seeds,
            revision=before.grant.revision,
            version=lease.version + 1,
            fence=lease.number,
            access=self._sealed(uuid, "access", answer.access_token),
            refresh=self._sealed(uuid, "refresh", refresh),
            ends_ms=oauth.ends_ms(lease.now_ms, answer.life_ms),
            due_ms=oauth.due_ms(lease.now_ms, answer.life_ms),
            renewed_ms=lease.now_ms,
        )
        self._take(provider, grant, -1, is_written=False)
        if not await self._written(provider, lambda: self._grants.keep(uuid, grant)):
            del self._held[uuid]
            await self._read(provider, -1)
            self._events.changed(uuid)
            self._tell(provider, "failed", "its answer came too late: there was another lease, or login, meanwhile")
            return
        self._faults.pop(uuid, None)
        self._events.refreshed(uuid, "success")
        log.info("access token renewed", provider=provider.name, lives_s=round((answer.life_ms or 0) / 1000))
        await self._read(provider, -1)

    async def _written(self, provider: Provider, write: Callable[[], Awaitable[bool]]) -> bool:
        """What `write` says, tried until the store answers."""
        while True:
            try:
                return await write()
            except StoreUnavailableError as exc:
                self._note(provider.uuid, f"cannot write what came of a refresh, trying on: {exc.message}")
                await asyncio.sleep(_AGAIN_S)

    # -- telling -------------------------------------------------------------------------------------------------------

    def _tell(self, provider: Provider, outcome: str, reason: str, *, again_in_s: float = 0) -> None:
        self._events.refreshed(provider.uuid, outcome)
        match outcome:
            case "lost":
                what = f"the refresh token is refused for good; {_HEAL}"
            case "in_doubt":
                what = (
                    "nobody knows whether the refresh token was used, so it is not used again; when its access token "
                    f"ends, {_HEAL}"
                )
            case _:
                what = f"it is tried again in {again_in_s:g} s"
        log.warning(
            "an access token was not renewed", provider=provider.name, outcome=outcome, reason=reason, next=what
        )

    def _note(self, uuid: str, message: str) -> None:
        """Says it once."""
        if self._faults.get(uuid) != message:
            self._faults[uuid] = message
            log.warning("OAuth tokens cannot be looked after", provider=uuid, reason=message)


def _place(grant: Grant) -> tuple[int, int]:
    """Where it is in its history."""
    return grant.version, grant.fence


def renewed_providers(providers: Sequence[Provider]) -> tuple[Provider, ...]:
    """Those whose access tokens are renewed."""
    return tuple(filter(oauth.is_renewed, providers))
