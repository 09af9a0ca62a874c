"""Smart routing: the first of a rule's entries whose conditions all hold for a request. No clock, no I/O.

An entry's ops are made into conditions once, when the configuration comes; values are typed, and checked when a rule is
written. A fact that a request does not give makes a condition false, and the trace says so. Traces hold no word of a
prompt.
"""

from __future__ import annotations

import operator
import re
import zoneinfo
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
import re2

from balancer.domain import Service, SmartOp, SmartRoute
from balancer.facts import AGENT_KINDS, CONTENT_KINDS, AbsentError, Facts, Services

_LONGEST_PATTERN = 4096
_MOST_TOKENS = 2**53
_SHOWN = 200
_TIME = re.compile(r"([01]\d|2[0-3]):([0-5]\d)")

Holds = Callable[[Facts], tuple[bool, str]]
"""Whether a condition holds, and what was found: a name or a number, never a text of the prompt."""
_Make = Callable[[str], Holds]


class Tried(msgspec.Struct, frozen=True, kw_only=True):
    """An op that was looked at: whether it held, and what was found, or why nothing was."""

    op: str
    holds: bool
    found: str


class Considered(msgspec.Struct, frozen=True, kw_only=True):
    """An entry that was looked at, by its place in the rule: its ops as far as they were asked, and if all held."""

    index: int
    entry: str
    matches: bool
    ops: tuple[Tried, ...]


class Matched(msgspec.Struct, frozen=True, kw_only=True):
    """The place of the entry that a request belongs to, None for none, and how each was considered."""

    index: int | None
    considered: tuple[Considered, ...]

    @property
    def reason(self) -> str:
        """Why it is this one, in a line that holds no word of the prompt."""
        return "; ".join(f"{c.entry} {'matches' if c.matches else 'fails'}: {_told(c.ops)}" for c in self.considered)


class Router:
    """The entries of a rule, ready to be asked."""

    def __init__(self, routes: Sequence[SmartRoute]) -> None:
        """An op that this version, or this machine, knows nothing of never holds."""
        self._entries = [
            (route.entry, [(_named(op), _condition(op, route.services)) for op in route.ops]) for route in routes
        ]

    def match(self, facts: Facts) -> Matched:
        """The first entry of which every op holds. Costs the facts that its ops ask for, each once."""
        considered: list[Considered] = []
        for index, (entry, ops) in enumerate(self._entries):
            tried: list[Tried] = []
            for name, holds in ops:
                tried.append(_try(name, holds, facts))
                if not tried[-1].holds:
                    break
            matches = bool(tried) and tried[-1].holds
            considered.append(Considered(index=index, entry=entry, matches=matches, ops=tuple(tried)))
            if matches:
                return Matched(index=index, considered=tuple(considered))
        return Matched(index=None, considered=tuple(considered))


def condition(op: SmartOp, services: tuple[Service, ...] = ()) -> Holds:
    """What asks whether an op of an entry with these services holds. Raises ValueError that says what is wrong."""
    about = _ABOUT_SERVICES.get((op.position, op.operation))
    if about is not None:
        return about(services)(op.value)
    operations = _OPERATIONS.get(op.position)
    if operations is None:
        raise ValueError(f"unknown position {op.position!r} (known: {', '.join(_OPERATIONS)})")
    make = operations.get(op.operation)
    if make is None:
        raise ValueError(f"{op.position} has no operation {op.operation!r} (known: {', '.join(operations)})")
    return make(op.value)


def _condition(op: SmartOp, services: tuple[Service, ...]) -> Holds:
    try:
        return condition(op, services)
    except ValueError as exc:
        reason = str(exc)

        def never(facts: Facts) -> tuple[bool, str]:
            raise AbsentError(reason)

        return never


def fault_of(op: SmartOp) -> tuple[str, str] | None:
    """The field of an op that is wrong, and what is wrong with it; None for one that can be asked."""
    operations = _OPERATIONS.get(op.position, {})
    field = "value" if op.operation in operations else "operation" if operations else "position"
    try:
        condition(op)
    except ValueError as exc:
        return field, str(exc)
    return None


def _try(name: str, holds: Holds, facts: Facts) -> Tried:
    try:
        is_held, found = holds(facts)
    except AbsentError as exc:
        return Tried(op=name, holds=False, found=f"absent: {exc}")
    return Tried(op=name, holds=is_held, found=found)


def _named(op: SmartOp) -> str:
    return f"{op.position}.{op.operation}"


def _told(ops: Sequence[Tried]) -> str:
    return ", ".join(f"{tried.op} ({tried.found})" for tried in ops)


# -- conditions --------------------------------------------------------------------------------------------------------


def _text(fact: Callable[[Facts], str], *, is_shown: bool = False) -> dict[str, _Make]:
    """The operations on a text, of which a trace shows the length, or with `is_shown` the beginning."""

    def found(text: str) -> str:
        return text[:_SHOWN] if is_shown else f"{len(text)} characters"

    def contains(value: str) -> Holds:
        _require(bool(value), "expected some text")

        def holds(facts: Facts) -> tuple[bool, str]:
            text = fact(facts)
            return value in text, found(text)

        return holds

    def equals(value: str) -> Holds:
        _require(bool(value), "expected some text")

        def holds(facts: Facts) -> tuple[bool, str]:
            text = fact(facts)
            return text == value, found(text)

        return holds

    def matching(pattern: Any) -> Holds:
        def holds(facts: Facts) -> tuple[bool, str]:
            text = fact(facts)
            return pattern.search(text) is not None, found(text)

        return holds

    return {
        "contains": contains,
        "equals": equals,
        "glob": lambda value: matching(_compiled(_glob(value))),
        "regex": lambda value: matching(_compiled(value)),
    }


def _compiled(pattern: str) -> Any:
    """The pattern of RE2's syntax, which is matched in a time linear in the text. Raises ValueError."""
    _require(bool(pattern), "expected a pattern")
    _require(len(pattern) <= _LONGEST_PATTERN, f"a pattern has {_LONGEST_PATTERN} characters at most")
    options = re2.Options()
    options.log_errors = False
    try:
        return re2.compile(pattern, options)
    except re2.error as exc:
        told = exc.args[0].decode("utf-8", "replace") if isinstance(exc.args[0], bytes) else str(exc)
        raise ValueError(f"no regular expression of RE2's syntax: {told}") from exc


def _glob(value: str) -> str:
    """A glob as a regular expression for the whole text.

    `*` is any text, `?` any character, `[abc]`, `[a-z]` and `[!abc]` one of or none of these, `{a,b}` either, and a
    backslash takes what follows as it is. Raises ValueError for a bracket or brace without its end.
    """
    parts: list[str] = []
    depth, at = 0, 0
    while at < len(value):
        character = value[at]
        at += 1
        if character == "*":
            parts.append(".*")
        elif character == "?":
            parts.append(".")
        elif character == "[":
            end = value.find("]", at + 2 if value[at : at + 1] == "!" else at + 1)
            _require(end > 0, "a `[` of the glob has no `]`")
            inside = value[at:end]
            negates = inside.startswith("!")
            parts.append(f"[{'^' if negates else ''}{_in_class(inside[negates:])}]")
            at = end + 1
        elif character == "{":
            depth += 1
            parts.append("(?:")
        elif character == "}" and depth:
            depth -= 1
            parts.append(")")
        elif character == "," and depth:
            parts.append("|")
        elif character == "\\" and at < len(value):
            parts.append(re2.escape(value[at]))
            at += 1
        else:
            parts.append(re2.escape(character))
    _require(not depth, "a `{` of the glob has no `}`")
    return rf"(?s)\A(?:{''.join(parts)})\z"


def _in_class(text: str) -> str:
    return "".join(c if c == "-" or c.isalnum() else re2.escape(c) for c in text)


def _number(fact: Callable[[Facts], int], compare: Callable[[int, int], bool]) -> _Make:
    def make(value: str) -> Holds:
        bound = _whole(value)

        def holds(facts: Facts) -> tuple[bool, str]:
            number = fact(facts)
            return compare(number, bound), str(number)

        return holds

    return make


def _whole(value: str) -> int:
    text = value.strip()
    _require(text.isascii() and text.isdigit() and int(text) <= _MOST_TOKENS, "expected a whole number, 0 or more")
    return int(text)


def _thinking(*, is_wanted: bool) -> _Make:
    def make(value: str) -> Holds:
        _require(value.strip().lower() in ("", "true"), "expected `true` or nothing: the operation says which")

        def holds(facts: Facts) -> tuple[bool, str]:
            thinks = facts.thinks
            return thinks is is_wanted, "thinking is asked for" if thinks else "no thinking is asked for"

        return holds

    return make


def _kind(value: str) -> Holds:
    _require(value in CONTENT_KINDS, f"expected one of {', '.join(CONTENT_KINDS)}")

    def holds(facts: Facts) -> tuple[bool, str]:
        kinds = facts.latest_kinds
        return value in kinds, ", ".join(kinds) or "nothing"

    return holds


def _tool_is(value: str) -> Holds:
    _require(bool(value), "expected a tool's name")

    def holds(facts: Facts) -> tuple[bool, str]:
        uses = facts.tool_uses
        return any(use.name == value for use in uses), f"{len(uses)} tool uses"

    return holds


def _tool_contains(value: str) -> Holds:
    _require(bool(value), "expected some text")

    def holds(facts: Facts) -> tuple[bool, str]:
        uses = facts.tool_uses
        return any(value in use.name or value in use.arguments for use in uses), f"{len(uses)} tool uses"

    return holds


def _agent(value: str) -> Holds:
    _require(value in AGENT_KINDS, f"expected one of {', '.join(AGENT_KINDS)}")

    def holds(facts: Facts) -> tuple[bool, str]:
        return facts.agent == value, facts.agent

    return holds


class _TimeRange(msgspec.Struct, forbid_unknown_fields=True):
    start: str
    end: str
    timezone: str
    outside: bool = False


def _time_range(value: str) -> Holds:
    """A daily interval of a zone's clock, its start in it and its end not; over midnight when the end comes first."""
    try:
        given = msgspec.json.decode(value, type=_TimeRange)
        zone = zoneinfo.ZoneInfo(given.timezone)
    except msgspec.MsgspecError as exc:
        example = '{"start": "22:00", "end": "06:00", "timezone": "Europe/Berlin"}'
        raise ValueError(f"expected JSON like {example}: {exc}") from exc
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError) as exc:
        raise ValueError("`timezone` is no time zone of the IANA's, like Europe/Berlin") from exc
    start, end = _minute(given.start, "start"), _minute(given.end, "end")
    _require(start != end, "`start` and `end` must differ")

    def holds(facts: Facts) -> tuple[bool, str]:
        local = facts.now.astimezone(zone)
        minute = local.hour * 60 + local.minute
        is_inside = start <= minute < end if start < end else minute >= start or minute < end
        return is_inside is not given.outside, f"{local:%H:%M}"

    return holds


def _minute(text: str, name: str) -> int:
    match = _TIME.fullmatch(text)
    if match is None:
        raise ValueError(f"`{name}` must be a time of day like 08:30")
    return int(match[1]) * 60 + int(match[2])


def _require(holds: bool, expected: str) -> None:
    if not holds:
        raise ValueError(expected)


def _these(makers: Mapping[str, _Make], **names: str) -> dict[str, _Make]:
    """Operations under the names that configurations give them."""
    return {name: makers[maker] for name, maker in names.items()}


_MODEL = _text(lambda facts: facts.model, is_shown=True)
_SYSTEM = _text(lambda facts: facts.system)
_USER = _text(lambda facts: facts.user)
_LATEST = _text(lambda facts: facts.latest_user)
_ALL_OF_A_TEXT = {"contains": "contains", "regex": "regex", "glob": "glob"}

# The names of tingly-box as of January 2026 come first, those that it has today (July 2026) behind them.
_OPERATIONS: dict[str, dict[str, _Make]] = {
    "model": _MODEL,
    "thinking": {"enabled": _thinking(is_wanted=True), "disabled": _thinking(is_wanted=False)},
    "system": _these(_SYSTEM, any_contains="contains", regex="regex", glob="glob"),
    "user": {
        **_these(_USER, any_contains="contains", regex="regex", glob="glob"),
        **_these(_LATEST, contains="contains"),
        "type": _kind,
    },
    "tool_use": {"is": _tool_is, "equals": _tool_is, "contains": _tool_contains},
    "token": {
        name: _number(lambda facts: facts.tokens, compare)
        for name, compare in {"ge": operator.ge, "gt": operator.gt, "le": operator.le, "lt": operator.lt}.items()
    },
    "context_system": _these(_SYSTEM, **_ALL_OF_A_TEXT),
    "context_user": _these(_USER, **_ALL_OF_A_TEXT),
    "latest_user": {**_these(_LATEST, **_ALL_OF_A_TEXT), "type": _kind},
    "agent.claude_code": {"equals": _agent},
    "time": {"time_range": _time_range},
}
_COMPARE = {"le": operator.le, "ge": operator.ge, "lt": operator.lt, "gt": operator.gt}


def _about_services(
    ask: Callable[[Services, Service], int | None], gather: Callable[[Sequence[int]], float], compare: str, unit: str
) -> Callable[[tuple[Service, ...]], _Make]:
    """An operation on what is known of an entry's services. Where nothing is, it holds: nobody would ever find out."""

    def over(services: tuple[Service, ...]) -> _Make:
        def make(value: str) -> Holds:
            bound = _whole(value)

            def holds(facts: Facts) -> tuple[bool, str]:
                live = facts.services
                known = [n for service in services if live and (n := ask(live, service)) is not None]
                if not known:
                    return True, "nothing is known yet"
                number = gather(known)
                return _COMPARE[compare](number, bound), f"{number:.0f} {unit}"

            return holds

        return make

    return over


def _mean(numbers: Sequence[int]) -> float:
    return sum(numbers) / len(numbers)


_ABOUT_SERVICES: dict[tuple[str, str], Callable[[tuple[Service, ...]], _Make]] = {
    ("service_ttft", "avg_le"): _about_services(lambda live, service: live.first_token_ms(service), min, "le", "ms"),
    ("service_ttft", "avg_ge"): _about_services(lambda live, service: live.first_token_ms(service), _mean, "ge", "ms"),
    **{
        ("service_capacity", f"util_{name}"): _about_services(
            lambda live, service: live.used_percent(service), _mean, name, "%"
        )
        for name in _COMPARE
    },
}
for (_position, _operation), _about in _ABOUT_SERVICES.items():
    _OPERATIONS.setdefault(_position, {})[_operation] = _about(())

OPERATIONS: Mapping[str, tuple[str, ...]] = {position: tuple(makers) for position, makers in _OPERATIONS.items()}
"""The operations of each position."""
