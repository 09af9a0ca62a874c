"""What an import says beside the document that it makes, and how it treats credentials."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

import msgspec

_NO_NAME = re.compile(r"[^A-Za-z0-9]+")
_NO_WORD = re.compile(r"[^A-Za-z0-9._-]+")


class Imported(msgspec.Struct, frozen=True, kw_only=True):
    """A document of ours, as a file would hold it, and a line for each thing that it does not carry over."""

    document: dict[str, Any]
    warnings: tuple[str, ...] = ()


class Notes:
    """Warnings in the order in which they came; each once."""

    def __init__(self) -> None:
        self._lines: dict[str, None] = {}

    def warn(self, path: str, message: str) -> None:
        """Notes what is not, or not quite, carried over from that path of the other document."""
        self._lines[f"{path}: {message}"] = None

    def lines(self) -> tuple[str, ...]:
        """All of them."""
        return tuple(self._lines)


class Secrets:
    """Gives literal credentials a name in the environment, one for each; or leaves them as they are.

    `taken` are the names that mean something else already.
    """

    def __init__(self, notes: Notes, *, is_literal: bool, taken: Collection[str] = ()) -> None:
        self._notes = notes
        self._taken = taken
        self._is_literal = is_literal
        self._names: dict[str, str] = {}

    def reference(self, value: str, name: str, path: str) -> str:
        """`${NAME}` in a literal's stead, with a warning; the value itself where literals are wanted, or it is one.

        `name` is what the variable is called after, if it does not have a name yet.
        """
        if not value or "${" in value or self._is_literal:
            return value
        variable = self._names.get(value)
        if variable is None:
            variable = base = _NO_NAME.sub("_", name).strip("_").upper()
            count = 1
            while variable in self._names.values() or variable in self._taken:
                count += 1
                variable = f"{base}_{count}"
            self._names[value] = variable
        self._notes.warn(
            path,
            f"a literal credential is not written into files: ${{{variable}}} stands for it; set {variable} where "
            "workers run, or import with --literals",
        )
        return f"${{{variable}}}"


def plain_name(text: str) -> str:
    """The text as a name of letters, digits, dots and dashes."""
    return _NO_WORD.sub("-", text).strip("-.") or "provider"
