"""A request's objects, field by field. What nobody takes asks for something, and is refused by its path."""

from __future__ import annotations

import re
from typing import Final, TypeVar

import msgspec

from balancer import lenient
from balancer.errors import RequestError
from balancer.translation.conversation import UntranslatableError

T = TypeVar("T")

ANY: Final = msgspec.json.Decoder()
BOOL: Final = msgspec.json.Decoder(bool)
INT: Final = msgspec.json.Decoder(int)
FLOAT: Final = msgspec.json.Decoder(float)
STR: Final = msgspec.json.Decoder(str)
STRS: Final = msgspec.json.Decoder(list[str])
RAW: Final = msgspec.json.Decoder(msgspec.Raw)
RAWS: Final = msgspec.json.Decoder(list[msgspec.Raw])
OBJECT: Final = msgspec.json.Decoder(dict[str, msgspec.Raw])
OBJECTS: Final = msgspec.json.Decoder(list[dict[str, msgspec.Raw]])
STR_OR_OBJECTS: Final = msgspec.json.Decoder(str | list[dict[str, msgspec.Raw]])

_NULL = msgspec.Raw(b"null")
_ASKS_NOTHING: tuple[object, ...] = (None, [], {})
_WHERE = re.compile(r" - at `\$(.*)`$")


def read(decoder: msgspec.json.Decoder[T], raw: bytes | msgspec.Raw, at: str) -> T:
    """What the bytes hold. Raises RequestError with the path of what is wrong."""
    try:
        return lenient.decode(decoder, raw)
    except msgspec.ValidationError as exc:
        what = str(exc)
        where = _WHERE.search(what)
        path = f"{at}{where[1] if where else ''}".lstrip(".")
        said = what[: where.start()] if where else what
        raise RequestError(f"`{path or 'body'}`: {said[:1].lower()}{said[1:]}", param=path or None) from exc
    except lenient.UNREADABLE as exc:
        raise RequestError(f"`{at or 'body'}` is malformed JSON, or nested too deeply", param=at or None) from exc


class Fields:
    """The fields of one object that are not taken yet; `at` is its path, empty for the request itself."""

    def __init__(self, fields: dict[str, msgspec.Raw], at: str) -> None:
        self._fields = fields
        self.at = at

    @classmethod
    def of(cls, body: bytes) -> Fields:
        """Those of a request."""
        return cls(read(OBJECT, body, ""), "")

    def path(self, name: str) -> str:
        """Where a field of this object stands."""
        return f"{self.at}.{name}" if self.at else name

    def take(self, name: str, decoder: msgspec.json.Decoder[T]) -> T | None:
        """A field's value; None when it is absent or null. Raises RequestError when it is of another type."""
        raw = self._fields.pop(name, None)
        if raw is None or raw == _NULL:
            return None
        return read(decoder, raw, self.path(name))

    def need(self, name: str, decoder: msgspec.json.Decoder[T]) -> T:
        """A field's value. Raises RequestError when it is absent."""
        value = self.take(name, decoder)
        if value is None:
            raise RequestError(f"`{self.path(name)}` is missing", param=self.path(name))
        return value

    def flag(self, name: str) -> bool:
        """True when a field is true; absent and null are false."""
        return self.take(name, BOOL) is True

    def object(self, name: str) -> Fields | None:
        """The fields of an object in this one; None when it is absent or null."""
        fields = self.take(name, OBJECT)
        return None if fields is None else Fields(fields, self.path(name))

    def objects(self, name: str) -> list[Fields]:
        """Those of each object of a list; none when it is absent or null."""
        return self._each(name, self.take(name, OBJECTS) or [])

    def content(self, name: str) -> str | list[Fields] | None:
        """A content: a text, or blocks; None when it is absent or null."""
        content = self.take(name, STR_OR_OBJECTS)
        return content if content is None or isinstance(content, str) else self._each(name, content)

    def drop(self, *names: str) -> tuple[str, ...]:
        """The paths of those fields, among the named ones, that are given and ask for something; they are taken."""
        return tuple(self.path(name) for name in names if self._asks(self._fields.pop(name, None)))

    def names(self) -> tuple[str, ...]:
        """The fields that nobody has taken."""
        return tuple(self._fields)

    def close(self) -> None:
        """Nothing, when all that is left asks for nothing. Raises UntranslatableError for the first that does."""
        for name, raw in self._fields.items():
            if self._asks(raw):
                raise UntranslatableError(
                    f"`{self.path(name)}` cannot be carried to the services of this model", param=self.path(name)
                )

    def refuse(self, name: str, why: str) -> UntranslatableError:
        """The error that names a field of this object."""
        return UntranslatableError(f"`{self.path(name)}`: {why}", param=self.path(name))

    def _asks(self, raw: msgspec.Raw | None) -> bool:
        return raw is not None and read(ANY, raw, self.at) not in _ASKS_NOTHING

    def _each(self, name: str, objects: list[dict[str, msgspec.Raw]]) -> list[Fields]:
        return [Fields(fields, f"{self.path(name)}[{index}]") for index, fields in enumerate(objects)]
