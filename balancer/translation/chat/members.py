"""The members of a JSON object of a request, taken one by one; what nobody took is refused by its path."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

from balancer import lenient
from balancer.errors import RequestError
from balancer.translation.conversation import UntranslatableError

T = TypeVar("T")

_object = msgspec.json.Decoder(dict[str, msgspec.Raw])
# One pass for a list and its objects: each costs a look at every byte.
_objects = msgspec.json.Decoder(list[dict[str, msgspec.Raw]])
_NULL = b"null"
_NOTHING = frozenset((b"null", b"[]", b"{}", b'""'))
_LONGEST = max(map(len, _NOTHING))

text = msgspec.json.Decoder(str)
whole = msgspec.json.Decoder(int)
number = msgspec.json.Decoder(float)
flag = msgspec.json.Decoder(bool)
anything: msgspec.json.Decoder[Any] = msgspec.json.Decoder()


class Members:
    """An object at `path`, which is empty for the request itself. Raises RequestError for anything but an object."""

    def __init__(self, given: bytes | msgspec.Raw | dict[str, msgspec.Raw], path: str = "") -> None:
        self.path = path
        self._members = given if isinstance(given, dict) else decoded(_object, given, path)

    def at(self, name: str) -> str:
        """The path of a member."""
        return f"{self.path}.{name}" if self.path else name

    def raw(self, name: str) -> msgspec.Raw | None:
        """A member as it stands, None where it is absent or null."""
        value = self._members.pop(name, None)
        return None if value is None or (len(value) == len(_NULL) and bytes(value) == _NULL) else value

    def take(self, name: str, decoder: msgspec.json.Decoder[T]) -> T | None:
        """A member's value, None where it is absent or null. Raises RequestError for one of another type."""
        value = self.raw(name)
        return None if value is None else decoded(decoder, value, self.at(name))

    def need(self, name: str, decoder: msgspec.json.Decoder[T]) -> T:
        """A member's value. Raises RequestError where it is absent."""
        value = self.take(name, decoder)
        if value is None:
            raise missing(self.at(name))
        return value

    def object(self, name: str) -> Members | None:
        """A member that is an object, None where it is absent or null."""
        value = self.raw(name)
        return None if value is None else Members(value, self.at(name))

    def objects(self, name: str) -> tuple[Members, ...]:
        """The objects in a member that is a list; none where it is absent or null."""
        value = self.raw(name)
        return () if value is None else objects(value, self.at(name))

    def names(self) -> tuple[str, ...]:
        """What was not taken yet and asks for something."""
        return tuple(name for name, value in self._members.items() if not asks_nothing(value))

    def finish(self, meaning: str = "is not known") -> None:
        """Refuses what was not taken, unless it asks for nothing."""
        for name in self.names():
            raise refused(self.at(name), f"{meaning} to the services of this rule")


def asks_nothing(raw: msgspec.Raw) -> bool:
    """True for null and for what is empty."""
    return len(raw) <= _LONGEST and bytes(raw) in _NOTHING


def is_text(raw: msgspec.Raw) -> bool:
    """True for a JSON string."""
    return bytes(memoryview(raw)[:1]) == b'"'


def objects(raw: msgspec.Raw, path: str) -> tuple[Members, ...]:
    """The objects of a list. Raises RequestError for anything but a list of objects."""
    found = decoded(_objects, raw, path)
    return tuple(Members(each, f"{path}[{number}]") for number, each in enumerate(found))


def decoded(decoder: msgspec.json.Decoder[T], raw: bytes | msgspec.Raw, path: str) -> T:
    """The value. Raises RequestError that names the path of what is wrong."""
    try:
        return lenient.decode(decoder, raw)
    except msgspec.ValidationError as exc:
        reason, _, inner = str(exc).partition(" - at `$")
        where = path + inner.removesuffix("`") if path else inner.removesuffix("`").removeprefix(".")
        raise RequestError(f"{where or 'the request'}: {reason}", param=where or None) from exc
    except lenient.UNREADABLE as exc:
        raise RequestError(f"{path or 'the request'}: malformed JSON: {exc}", param=path or None) from exc


def missing(path: str) -> RequestError:
    """The error for a member that has to be there."""
    return RequestError(f"{path}: is required", param=path)


def refused(path: str, why: str) -> UntranslatableError:
    """The error for what cannot be carried."""
    return UntranslatableError(f"{path}: {why}", param=path)
