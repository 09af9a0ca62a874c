"""An object of a request, read member by member: each has a path, and what nobody reads is refused."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import msgspec

from balancer.errors import RequestError
from balancer.translation.conversation import UntranslatableError

_PLAIN = re.compile(r"[A-Za-z0-9_.-]{1,64}")


class Fields:
    """The members of one object; `at` is its path, empty for the request itself.

    `done` refuses members that were not taken. Null, and what is empty, asks for nothing.
    """

    __slots__ = ("_members", "at")

    def __init__(self, value: object, at: str = "") -> None:
        if not isinstance(value, dict):
            raise malformed(at, "an object")
        self._members: dict[str, object] = dict(value)
        self.at = at

    def path(self, name: str) -> str:
        """A member's path in the request."""
        return f"{self.at}.{name}" if self.at else name

    def __contains__(self, name: str) -> bool:
        return self._members.get(name) is not None

    def take(self, name: str) -> object:
        """The member's value, which counts as read from now on; None where it is absent or null."""
        return self._members.pop(name, None)

    def peek(self, name: str) -> object:
        """The member's value, which still has to be taken."""
        return self._members.get(name)

    def skip(self, *names: str) -> None:
        """Members that are read by not looking at them."""
        for name in names:
            self._members.pop(name, None)

    def text(self, name: str) -> str:
        """A string that must be there."""
        value = self.take(name)
        if not isinstance(value, str):
            raise malformed(self.path(name), "a string")
        return value

    def maybe_text(self, name: str) -> str:
        """A string, empty where it is absent."""
        return "" if self.peek(name) is None else self.text(name)

    def word(self, name: str, among: Sequence[str], default: str) -> str:
        """One of some words; others are refused."""
        value = self.maybe_text(name)
        if not value:
            return default
        if value not in among:
            raise unsupported(self.path(name), f"{named(value)} is none of {', '.join(among)}")
        return value

    def flag(self, name: str) -> bool | None:
        """A boolean, or None."""
        value = self.take(name)
        if value is not None and not isinstance(value, bool):
            raise malformed(self.path(name), "true or false")
        return value

    def number(self, name: str) -> float | None:
        """A number as it is written, or None."""
        value = self.take(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise malformed(self.path(name), "a number")
        return value

    def count(self, name: str) -> int | None:
        """A whole number from 0 on, or None."""
        value = self.take(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
            raise malformed(self.path(name), "a whole number")
        return value

    def each(self, name: str) -> Iterator[tuple[str, object]]:
        """The path and value of each entry; none where the list is absent."""
        value = self.take(name)
        if value is None:
            return iter(())
        if not isinstance(value, list):
            raise malformed(self.path(name), "a list")
        return entries(value, self.path(name))

    def inner(self, name: str) -> Fields | None:
        """An object, or None."""
        value = self.take(name)
        return None if value is None else Fields(value, self.path(name))

    def raw(self, name: str) -> msgspec.Raw | None:
        """An object's JSON, or None."""
        value = self.take(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise malformed(self.path(name), "an object")
        try:
            return msgspec.Raw(msgspec.json.encode(value))
        except RecursionError as exc:
            raise RequestError(f"`{self.path(name)}` is nested too deep", param=self.path(name)) from exc

    def refuse(self, name: str, why: str) -> None:
        """Refuses the member if it asks for something."""
        value = self.take(name)
        if not _is_nothing(value):
            raise unsupported(self.path(name), why)

    def done(self) -> None:
        """Refuses what was not read."""
        for name, value in self._members.items():
            if not _is_nothing(value):
                path = self.path(name) if _PLAIN.fullmatch(name) else self.at or "body"
                raise unsupported(path, "the services of this rule do not know this field; leave it out")


def entries(values: Sequence[object], at: str) -> Iterator[tuple[str, object]]:
    """The path and value of each entry of a list."""
    return ((f"{at}[{index}]", value) for index, value in enumerate(values))


def malformed(path: str, expected: str) -> RequestError:
    """What to raise for a value of the wrong type."""
    return RequestError(f"`{path or 'body'}` must be {expected}", param=path or None)


def unsupported(path: str, why: str) -> UntranslatableError:
    """What to raise for what the services' APIs cannot do."""
    return UntranslatableError(f"`{path}`: {why}", param=path)


def named(word: str) -> str:
    """A client's word for an error message, where it is one."""
    return f"`{word}`" if _PLAIN.fullmatch(word) else "this"


def _is_nothing(value: object) -> bool:
    return value is None or value == [] or value == {}
