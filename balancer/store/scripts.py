"""The Lua scripts: read with their includes and headers, called by the names in them.

`python -m balancer.store.scripts --expand FOLDER` writes each script as Redis gets it, for a linter.
"""

from __future__ import annotations

import functools
import hashlib
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypedDict

import msgspec

from balancer.errors import ConfigurationError

_PACKAGE = Path(__file__).resolve().parent.parent
_KEY = re.compile(r"^-- KEYS\[(\d+)(…?)\]\s+(\w+)")
_ARGUMENT = re.compile(r"^-- ARGV\[(\d+)(…?)\]\s+(\w+)")
_FUNCTION = re.compile(r"local function (\w+)\(")
_WORD = re.compile(r"\w+")
_INCLUDE = re.compile(r"^-- include: (\S+)\s*$")


class Script(msgspec.Struct, frozen=True, kw_only=True):
    """A script as Redis gets it, with the names of its keys and arguments.

    `rest` names the last group of arguments, `rest_keys` that of keys, where there may be any number of it.
    """

    name: str
    source: str
    sha: str
    keys: tuple[str, ...]
    arguments: tuple[str, ...]
    rest: str
    rest_keys: str = ""

    def command(
        self,
        keys: Mapping[str, str],
        arguments: Mapping[str, str | int],
        rest: Sequence[str | int] = (),
        rest_keys: Sequence[str] = (),
    ) -> tuple[str | int, ...]:
        """What follows the word EVALSHA <sha> or EVAL <source>: the number of keys, keys and arguments in order.

        Raises TypeError when the names are not exactly those of the header.
        """
        is_known = keys.keys() == set(self.keys) and arguments.keys() == set(self.arguments)
        if not is_known or (rest and not self.rest) or (rest_keys and not self.rest_keys):
            raise TypeError(
                f"{self.name} takes keys {self.keys} and {self.rest_keys or 'none'} more, "
                f"arguments {self.arguments} and {self.rest or 'none'} more"
            )
        return (
            len(self.keys) + len(rest_keys),
            *(keys[name] for name in self.keys),
            *rest_keys,
            *(arguments[name] for name in self.arguments),
            *rest,
        )


class Prepared:
    """Calls of a script that differ in a few arguments only: the names are looked up once, not at each call."""

    def __init__(self, script: Script, keys: Mapping[str, str], arguments: Mapping[str, str | int]) -> None:
        """`arguments` are those that stay. Raises TypeError when a name is not one of the header."""
        changing = [name for name in script.arguments if name not in arguments]
        script.command(keys, {**arguments, **dict.fromkeys(changing, 0)})
        self.script = script
        self._keys = tuple(keys[name] for name in script.keys)
        self._arguments = [arguments.get(name, 0) for name in script.arguments]
        self._places = {name: script.arguments.index(name) for name in changing}

    def command(
        self, changing: Mapping[str, str | int], rest: Sequence[str | int], rest_keys: Sequence[str] = ()
    ) -> tuple[str | int, ...]:
        """As Script.command, given all of the arguments that change. Raises KeyError for an argument that does not."""
        arguments = self._arguments.copy()
        for name, value in changing.items():
            arguments[self._places[name]] = value
        return (len(self._keys) + len(rest_keys), *self._keys, *rest_keys, *arguments, *rest)


def folder(override: str = "") -> Path:
    """Where the scripts lie: the folder given, else in the package, else beside it (an editable install)."""
    for candidate in (Path(override),) if override else (_PACKAGE / "lua", _PACKAGE.parent / "lua"):
        if (candidate / "select.lua").is_file():
            return candidate
    raise ConfigurationError(f"no Lua scripts in {override or _PACKAGE / 'lua'}: the installation is incomplete")


@functools.cache
def load(name: str, override: str = "") -> Script:
    """The script of that name. Raises ConfigurationError when its header or an include is wrong."""
    root = folder(override)
    text = (root / f"{name}.lua").read_text(encoding="utf-8")
    source = _without_unused(_expand(root, text, set()))
    return Script(
        name=name,
        source=source,
        sha=hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest(),
        **_header(name, text),
    )


def names(override: str = "") -> tuple[str, ...]:
    """All scripts of the folder."""
    return tuple(sorted(path.stem for path in folder(override).glob("*.lua")))


class _Header(TypedDict):
    keys: tuple[str, ...]
    arguments: tuple[str, ...]
    rest: str
    rest_keys: str


def _header(name: str, text: str) -> _Header:
    keys: list[str] = []
    arguments: list[str] = []
    rest: dict[str, str] = {}
    for line in text.splitlines():
        if not line.startswith("--"):
            break
        for word, pattern, known in (("KEYS", _KEY, keys), ("ARGV", _ARGUMENT, arguments)):
            if match := pattern.match(line):
                if int(match[1]) != len(known) + 1 or word in rest:
                    raise ConfigurationError(f"{name}.lua: {word}[{match[1]}] is out of order")
                if match[2]:
                    rest[word] = match[3]
                else:
                    known.append(match[3])
    return {
        "keys": tuple(keys),
        "arguments": tuple(arguments),
        "rest": rest.get("ARGV", ""),
        "rest_keys": rest.get("KEYS", ""),
    }


def _expand(root: Path, text: str, done: set[str]) -> str:
    lines: list[str] = []
    for line in text.splitlines():
        if not (match := _INCLUDE.match(line)):
            lines.append(line)
        elif match[1].endswith("/*"):
            lines.append(_expand_folder(root, match[1][:-2], done))
        elif match[1] not in done:
            done.add(match[1])
            path = root / "include" / f"{match[1]}.lua"
            if not path.is_file():
                raise ConfigurationError(f"{path} is included but does not exist")
            lines.append(_expand(root, path.read_text(encoding="utf-8"), done).rstrip("\n"))
    return "\n".join(lines) + "\n"


def _expand_folder(root: Path, name: str, done: set[str]) -> str:
    """A function that gives that of an include of the folder by its name, nil without one: `<folder>_named`.

    A script makes its functions anew in each call, so no more of them are made than are asked for.
    """
    found = sorted(path.stem for path in (root / "include" / name).glob("*.lua"))
    lines = [f"local function {name}_named(name)"]
    for one in found:
        text = (root / "include" / name / f"{one}.lua").read_text(encoding="utf-8")
        if any(map(_INCLUDE.match, text.splitlines())):
            raise ConfigurationError(f"{name}/{one}.lua: what is included by its folder includes nothing")
        lines += [f"if name == '{one}' then", text.rstrip("\n"), f"return {one}", "end"]
    return "\n".join([*lines, "end"])


def _without_unused(text: str) -> str:
    """The source without the functions of includes that it never calls: each costs whenever the script runs."""
    pieces = _pieces(text)
    words = [Counter(_WORD.findall(piece)) for _, piece in pieces]
    total = sum(words, Counter[str]())
    kept = list(range(len(pieces)))
    while unused := [i for i in kept if pieces[i][0] and total[pieces[i][0]] == 1]:
        for i in unused:
            total.subtract(words[i])
        kept = [i for i in kept if i not in unused]
    return "".join(pieces[i][1] for i in kept)


def _pieces(text: str) -> list[tuple[str, str]]:
    """The source taken apart: each outermost function with its name and the comment above it, and what is between."""
    pieces: list[tuple[str, str]] = []
    between: list[str] = []
    comment: list[str] = []
    function: list[str] = []
    name = ""
    for line in text.splitlines(keepends=True):
        if function:
            function.append(line)
            if line == "end\n":
                pieces.append((name, "".join(function)))
                function = []
        elif match := _FUNCTION.match(line):
            pieces.append(("", "".join(between)))
            between, function, comment, name = [], [*comment, line], [], match[1]
        elif line.startswith("--"):
            comment.append(line)
        else:
            between += [*comment, line]
            comment = []
    pieces.append(("", "".join([*between, *comment, *function])))
    return pieces


def main() -> None:
    """Writes every expanded script into the folder given after --expand."""
    if len(sys.argv) != 3 or sys.argv[1] != "--expand":
        raise SystemExit("usage: python -m balancer.store.scripts --expand FOLDER")
    target = Path(sys.argv[2])
    target.mkdir(parents=True, exist_ok=True)
    for name in names():
        (target / f"{name}.lua").write_text(load(name).source, encoding="utf-8")


if __name__ == "__main__":
    main()
