"""Why a service was picked: a pool's decision stream, read backwards, decoded, and told in words.

A pick is an event only where the pool is recorded (`pools: [{name: …, record: full}]`). Looking one up reads at most
10 000 events, from the newest on, in small pages between which the worker's other requests go on.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping, Sequence
from typing import Annotated

import msgspec

from balancer import checkpoint
from balancer.admin import shapes
from balancer.admin.routing import Call, Parameter, Route
from balancer.admin.stats import at
from balancer.errors import NotFoundError, RequestError
from balancer.ledger import LEDGER_COUNTERS, PICK_COUNTERS
from balancer.store import history
from balancer.store.balance import Balance
from balancer.tactics import tactic_params

MOST_EVENTS = 10_000
_PAGE = 100
_PAUSE_S = 0.002
_DEFAULT_LIMIT = 50
_Limit = Annotated[int, msgspec.Meta(ge=1, le=500)]
_ID = re.compile(r"(.+)\.(\d{1,16})\.(\d{1,16})")

Event = Mapping[str, str]


class Search:
    """One walk through a pool's stream from its newest event; picks come out with what ended them."""

    def __init__(self, balance: Balance, pool: str, most: int) -> None:
        self._balance = balance
        self._pool = pool
        self._most = most
        self._endings: dict[tuple[str, str], dict[str, Event]] = {}
        self.looked_at = 0
        self.newest: Event | None = None
        self.oldest: Event | None = None

    @property
    def is_cut(self) -> bool:
        """True when there may be more events than were looked at."""
        return self.looked_at >= self._most

    async def picks(self, rule: str, limit: int) -> list[dict[str, object]]:
        """The newest picks, of one rule or (empty) of all."""
        found: list[dict[str, object]] = []
        send = await self._balance.sender(self._pool)
        async for page in history.newest(send, self._pool, _PAGE, self._most):
            for event in page:
                self._look_at(event)
                if event["event"] == "pick" and rule in ("", event["rule"]):
                    found.append(self._told(event))
                    if len(found) == limit:
                        return found
            await asyncio.sleep(_PAUSE_S)
        return found

    async def pick(self, place: tuple[int, int]) -> dict[str, object] | None:
        """The pick at that place. Raises NotFoundError when something else is there."""
        send = await self._balance.sender(self._pool)
        async for page in history.newest(send, self._pool, _PAGE, self._most):
            for event in page:
                self._look_at(event)
                where = _place(event)
                if where < place:
                    return None
                if where == place and event["event"] not in ("record", "checkpoint"):
                    if event["event"] != "pick":
                        raise NotFoundError(f"Decision not found: at this position is a {event['event']}, no pick")
                    return self._told(event)
            await asyncio.sleep(_PAUSE_S)
        return None

    def _look_at(self, event: Event) -> None:
        self.looked_at += 1
        self.newest = self.newest or event
        self.oldest = event
        if event["event"] in ("settle", "reap"):
            name = (event["worker"], event["number"])
            self._endings.setdefault(name, {}).setdefault(event["event"], event)

    def _told(self, event: Event) -> dict[str, object]:
        endings = self._endings.get((event["worker"], event["number"]), {})
        settle, reap = endings.get("settle"), endings.get("reap")
        return _pick(self._pool, event) | {
            "settle": _settle(settle) if settle else None,
            "reap": _reap(reap) if reap else None,
        }


class Decisions:
    """The routes /api/v1/decisions."""

    def __init__(self, balance: Balance) -> None:
        self._balance = balance

    def routes(self) -> list[Route]:
        """Both."""
        return [
            Route(
                method="GET",
                path="/api/v1/decisions",
                handler=self.list,
                gives=shapes.DecisionPage,
                query=(
                    Parameter(name="pool", kind=str, meaning="of this pool; absent: of the rule's, or of all"),
                    Parameter(name="rule", kind=str, meaning="of this rule alone"),
                    Parameter(name="limit", kind=_Limit, meaning=f"how many, 1 to 500; {_DEFAULT_LIMIT} if absent"),
                ),
            ),
            Route(
                method="GET",
                path="/api/v1/decisions/{decision}",
                handler=self.one,
                gives=shapes.DecisionAnswer,
            ),
        ]

    async def list(self, call: Call) -> object:
        """The newest picks, the newest first: of a pool, of a rule, or of all pools."""
        given = call.query
        limit = call.parameter("limit", _Limit, default=_DEFAULT_LIMIT)
        pools = self._pools(given.get("pool", ""), given.get("rule", ""))
        searches = [Search(self._balance, pool, MOST_EVENTS // len(pools)) for pool in pools]
        found = [pick for search in searches for pick in await search.picks(given.get("rule", ""), limit)]
        found.sort(key=lambda pick: str(pick["at"]), reverse=True)
        return {
            "decisions": found[:limit],
            "recording": {pool: await self._recording(pool) for pool in pools},
            "events_looked_at": sum(search.looked_at for search in searches),
            "is_cut": any(search.is_cut for search in searches),
        }

    async def one(self, call: Call) -> object:
        """One pick by its decision id, `<pool>.<epoch>.<position>`."""
        match = _ID.fullmatch(call.path["decision"])
        if not match:
            raise RequestError("expected a decision's id, <pool>.<epoch>.<position>", param="decision")
        (pool,) = self._pools(match[1], "")
        place = int(match[2]), int(match[3])
        search = Search(self._balance, pool, MOST_EVENTS)
        found = await search.pick(place)
        if found is None:
            raise NotFoundError(f"Decision not found: {await self._why_not(pool, place, search)}")
        await self._add_params(found)
        return {"decision": found}

    def _pools(self, pool: str, rule: str) -> Sequence[str]:
        configuration = self._balance.directory.configuration
        names = configuration.pool_names()
        if pool and pool not in names:
            raise NotFoundError("Pool not found")
        if rule:
            found = configuration.rule(rule)
            if found is None:
                raise NotFoundError("Rule not found")
            return [pool or found.pool]
        return [pool] if pool else names

    async def _recording(self, pool: str) -> str:
        return await history.recording(await self._balance.sender(pool), pool)

    async def _why_not(self, pool: str, place: tuple[int, int], search: Search) -> str:
        mode = await self._recording(pool)
        oldest, newest = search.oldest, search.newest
        if mode == "sampled" and oldest and _place(oldest) < place:
            return f"pool {pool} records a sample, one position in 17, and this one is not in it"
        if newest and place > _place(newest):
            return f"nothing is recorded after position {newest['position']} of epoch {newest['epoch']} ({mode})"
        if search.is_cut:
            return f"it is not among the newest {search.looked_at} events, and no more are looked at"
        if oldest and place < _place(oldest):
            return f"the record begins at position {oldest['position']} of epoch {oldest['epoch']}: earlier is trimmed"
        if mode == "off":
            return f"pool {pool} records no events (pools: [{{name: {pool}, record: full}}] in the configuration does)"
        return f"no event has this position (pool {pool} is recorded: {mode})"

    async def _add_params(self, decision: dict[str, object]) -> None:
        """What the tactic was set to, from the configuration of the pick's revision where the event does not tell."""
        if "candidates" in decision:
            return
        snapshot = self._balance.directory.snapshot
        uuid = str(decision["rule"])
        if snapshot.rule_revision(uuid) != decision["revision"]:
            earlier = await self._balance.registry.load(int(str(decision["revision"])))
            if earlier is None:
                return
            snapshot = earlier
        rule = snapshot.configuration.rule(uuid)
        if rule is not None:
            decision.update(tactic_params(rule.lb_tactic))


# -- events as JSON ----------------------------------------------------------------------------------------------------


def _place(event: Event) -> tuple[int, int]:
    return int(event["epoch"]), int(event["position"])


def _pick(pool: str, event: Event) -> dict[str, object]:
    """All that the event of a pick tells."""
    told: dict[str, object] = {
        "id": f"{pool}.{event['epoch']}.{event['position']}",
        "pool": pool,
        "epoch": int(event["epoch"]),
        "position": int(event["position"]),
        "at": at(int(event["now_ms"])),
        "rule": event["rule"],
        "partition": event["partition"],
        "entry": event["partition"][: -len(event["rule"]) - 1] or None,
        "revision": int(event["revision"]),
        "tactic": event["tactic"],
        "service": event["service"],
        "reason": event["reason"],
        "why": _why(event),
        "seq": int(event["seq"]),
        "switched": event["is_switch"] == "1" and event["reason"] != "pinned",
        "saved": event["is_switch"] == "1" and event["reason"] == "pinned",
        "cursor_before": event["cursor"],
        "streak_before": int(event["streak_before"]),
        "streak": int(event["streak"]),
        "draw": int(event["draw"]),
        "pin": event["pin"] or None,
        "affinity_s": int(event["affinity_ms"]) // 1000,
        "only": event["only"] or None,
        "excluded": [service for service in event["excluded"].split("\n") if service],
        "barred": [service for service in event.get("barred", "").split("\n") if service],
        "reserved": int(event["reserved"]),
        "deadline": at(int(event["deadline_ms"])),
        "worker": event["worker"],
        "number": int(event["number"]),
        "before": _counters(event, "before", PICK_COUNTERS),
        "after": _counters(event, "after", PICK_COUNTERS),
    }
    if "services" in event:  # Sampled: it tells what the tactic saw.
        services = checkpoint.read_services(event["services"])
        counts = [map(int, line.split(" ")) for line in event["counts"].split("\n") if line]
        told |= checkpoint.read_params(event["params"])
        told["candidates"] = [
            {
                "service": service.id,
                "active": bool(service.active),
                "candidate": bool(is_candidate),
                "weight": service.weight,
                "tier": service.tier,
                "time_window": service.window,
                "window_requests": requests,
                "window_tokens": tokens,
                "in_flight": in_flight,
                "first_token_us": first_token,
                "per_token_us": per_token,
            }
            for service, (is_candidate, requests, tokens, in_flight, first_token, per_token) in zip(
                services, counts, strict=True
            )
        ]
    return told


def _why(event: Event) -> str:
    """The reason in words."""
    service, cursor, tactic = event["service"], event["cursor"], event["tactic"]
    current = cursor or "no service"
    match event["reason"]:
        case "streak":
            return f"{service} stays: after {event['streak_before']} picks its streak was below the request threshold"
        case "threshold":
            return f"{service} stays: its window was below the threshold of {tactic}"
        case "next":
            return f"{current} had its streak of {event['streak_before']}, or could not serve: the next is {service}"
        case "least" if tactic == "least_in_flight":
            return f"{service} had the fewest requests in flight"
        case "least":
            measure = "requests x 10 + tokens" if tactic == "hybrid" else "tokens"
            return f"{current} was at a threshold, or could not serve: {service} had the least {measure} in its window"
        case "draw":
            return f"{service} was drawn by weight"
        case "turn":
            return f"it was the turn of {service}, by its weight"
        case "fastest":
            return f"of two that were drawn, {service} was the faster to expect"
        case "cheapest":
            return f"{service} is the cheapest that could serve"
        case "pinned" if event["only"]:
            return f"{service} alone was asked for; the cursor stays"
        case "pinned":
            return f"{service} has the session; the cursor stays"
        case "probe":
            return f"the breaker of {service} is half-open: this request tries it; the cursor stays"
        case "exhausted":
            return f"cooldowns and open breakers left none: {tactic} chose {service} all the same; the cursor stays"
        case "retry":
            return f"another attempt: {tactic} chose {service} without those tried before; the cursor stays"
        case other:
            return other


def _settle(event: Event) -> dict[str, object]:
    usage = ("input", "output", "cached", "cache_creation", "reasoning")
    return {
        **_ending(event),
        "outcome": event["outcome"],
        "age_ms": int(event["age_ms"]),
        "batch": int(event["batch"]),
        "usage": {name: int(event[name]) for name in usage},
        "cooldown_ms": int(event["cooldown_ms"]),
        "first_token_us": int(event["first_token_us"]),
        "stream_us": int(event["stream_us"]),
    }


def _reap(event: Event) -> dict[str, object]:
    return {**_ending(event), "by": event["by"], "reserved": int(event["reserved"])}


def _ending(event: Event) -> dict[str, object]:
    return {
        "at": at(int(event["now_ms"])),
        "epoch": int(event["epoch"]),
        "position": int(event["position"]),
        "before": _counters(event, "before", LEDGER_COUNTERS),
        "after": _counters(event, "after", LEDGER_COUNTERS),
    }


def _counters(event: Event, when: str, names: Sequence[str]) -> dict[str, object] | None:
    """A service's counters before or after, None where the event tells none."""
    if not event[when]:
        return None
    values, windows, minute, breaker = event[when].split("|")
    return dict(zip(names, map(int, values.split(" ")), strict=True)) | {
        "windows": [
            {
                "time_window": window.length,
                "start": at(window.start),
                "requests": window.requests,
                "tokens": window.tokens,
                "output": window.output,
            }
            for window in checkpoint.read_windows(windows)
        ],
        "minute": _minute(minute, int(event["now_ms"])),
        "breaker": msgspec.structs.asdict(checkpoint.read_breaker(breaker)) if breaker else None,
    }


def _minute(text: str, now_ms: int) -> dict[str, int]:
    """What counted for limits in the minute before the event."""
    minute = checkpoint.read_minute(text).rolled(now_ms)
    return {"requests": minute.total("requests"), "tokens": minute.total("tokens")}
