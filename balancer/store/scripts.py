"""The Lua scripts: read with their includes and headers, called by the names in them.

`python -m balancer.store.scripts --expand FOLDER` writes each script as Redis gets it, for a linter.
"""

from __future__ import annotations

import functools
import hashlib
import re
import sys
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypedDict

import msgspec

from balancer.errors import ConfigurationError

_PACKAGE = Path(__file__).resolve().parent.parent
_KEY = re.compile(r"^-- KEYS\[(\d+)(…?)\]\s+(\w+)")
_ARGUMENT = re.compile(r"^-- ARGV\[(\d+)(…?)\]\s+(\w+)")
_FUNCTION = re.compile(r"local function (\w+)\(.*?\)(?: -- apart: (\w+))?$")
_FUNCTION_HEAD = re.compile(r"^local function (\w+)\(", re.MULTILINE)
_WORD = re.compile(r"\w+")
_CODE_WORD = re.compile(r"--[^\n]*|'(?:[^'\\\n]|\\.)*'|(?<![\w.])(?<!local function )\w+\b(?! =[^=])")
"""A word that is no field's name, or what only looks like words: comments and strings."""
_VARIABLES = re.compile(r"function\b[^(\n]*\(([^)]*)\)|\blocal (?!function\b)([\w, ]+)|\bfor ([\w, ]+?) (?:in|=) ")
_LITERAL = r"(?:-?\d+|'(?:[^'\\\n]|\\.)*'|[A-Z][A-Z_0-9]*)"
_VALUE = re.compile(rf"{_LITERAL}(?: \.\. {_LITERAL})*")
_CONSTANTS = re.compile(rf"local ([A-Z][A-Z_0-9]*(?:, [A-Z][A-Z_0-9]*)*) = ({_VALUE.pattern}(?:, {_VALUE.pattern})*)$")
_MAIN = "-- main\n"
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
        arguments: Mapping[str, str | int | bytes],
        rest: Sequence[str | int] = (),
        rest_keys: Sequence[str] = (),
    ) -> tuple[str | int | bytes, ...]:
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
    """Calls of a script that differ in their last arguments only: the names are looked up once, not at each call."""

    def __init__(self, script: Script, keys: Mapping[str, str], arguments: Mapping[str, str | int | bytes]) -> None:
        """`arguments` are those that stay, the first of the header. Raises TypeError when a name is not one of it."""
        changing = script.arguments[len(arguments) :]
        script.command(keys, {**arguments, **dict.fromkeys(changing, 0)})
        self.script = script
        self._keys = tuple(keys[name] for name in script.keys)
        self._arguments = tuple(arguments[name] for name in script.arguments[: len(arguments)])

    def command(
        self, changing: Sequence[str | int | bytes], rest_keys: Sequence[str] = ()
    ) -> tuple[str | int | bytes, ...]:
        """As Script.command, given in their order the arguments that change, and behind them the rest."""
        return (len(self._keys) + len(rest_keys), *self._keys, *rest_keys, *self._arguments, *changing)


def folder(override: str = "") -> Path:
    """Where the scripts lie: the folder given, else in the package, else beside it (an editable install)."""
    for candidate in (Path(override),) if override else (_PACKAGE / "lua", _PACKAGE.parent / "lua"):
        if (candidate / "tick.lua").is_file():
            return candidate
    raise ConfigurationError(f"no Lua scripts in {override or _PACKAGE / 'lua'}: the installation is incomplete")


@functools.cache
def load(name: str, override: str = "") -> Script:
    """The script of that name. Raises ConfigurationError when its header or an include is wrong."""
    root = folder(override)
    text = (root / f"{name}.lua").read_text(encoding="utf-8")
    source = _source(name, _expand(root, text, set()))
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
        lines += [
            f"  if name == '{one}' then",
            textwrap.indent(text.rstrip("\n"), "    "),
            f"    return {one}",
            "  end",
        ]
    return "\n".join([*lines, "end"])


class _Piece(msgspec.Struct, frozen=True):
    """An outermost function with the comment above it, or what is between two: then it has no name.

    `apart` is the group that the function is made with, empty for one that is made in any case.
    """

    text: str
    name: str = ""
    apart: str = ""


def _source(name: str, text: str) -> str:
    """What Redis gets: no function that is never called; of a script with a line `-- main`, functions that cost little.

    The server makes each function of a script anew whenever the script runs, and looks up each variable from around it
    that it uses. So they become fields of one table, `fn`, the only such variable that they share, and constants are
    written where they are used. `local function f(…) -- apart: GROUP` says that f is rarely needed, or only with all
    others of its group: these are made when the first of them is called.
    """
    pieces = _without_unused(_pieces(text))
    if not any(_MAIN in piece.text for piece in pieces):
        return "".join(piece.text for piece in pieces)
    pieces = _with_literals(pieces)
    names = {piece.name: piece.apart for piece in pieces if piece.name}
    for shadow in _VARIABLES.findall("".join(piece.text for piece in pieces)):
        if hidden := names.keys() & set(_WORD.findall("".join(shadow))):
            raise ConfigurationError(f"{name}.lua: {hidden.pop()} is a function and a variable")
    declared = "".join(_renamed(piece.text, names, "") for piece in pieces if not piece.name)
    declarations, main = declared.split(_MAIN)
    groups: dict[str, list[str]] = {}
    for piece in pieces:
        if piece.name:
            body = _renamed(piece.text, names, piece.apart)
            groups.setdefault(piece.apart, []).append(body)
    made = [_FUNCTION_HEAD.sub(r"\1 = function(", body).rstrip("\n") + ",\n" for body in groups.pop("", [])]
    for group, bodies in groups.items():
        members = [name for name, apart in names.items() if apart == group]
        functions = "".join(_FUNCTION_HEAD.sub(r"function \1(", body) for body in bodies)
        made.append(
            f"{group} = function()\nlocal {_wrapped(members)}\n{functions}"
            f"local made = {{\n{_wrapped(f'{name} = {name}' for name in members)},\n}}\n"
            f"fn.{group} = function() return made end\nreturn made\nend,\n"
        )
    return f"{declarations}local fn\nfn = {{\n{''.join(made)}}}\n{main}"


def _wrapped(words: Iterable[str]) -> str:
    return "\n".join(textwrap.wrap(", ".join(words), 110))


def _renamed(text: str, names: Mapping[str, str], inside: str) -> str:
    """The code with functions called by way of the table, or of their group; within that they are at hand."""

    def renamed(match: re.Match[str]) -> str:
        word = match[0]
        apart = names.get(word)
        if apart is None or (inside and apart == inside):
            return word
        return f"fn.{apart}().{word}" if apart else f"fn.{word}"

    return _CODE_WORD.sub(renamed, text)


def _with_literals(pieces: list[_Piece]) -> list[_Piece]:
    """The pieces with numbers and strings in the place of the constants that were declared to stand for them."""
    values: dict[str, str] = {}

    def literal(match: re.Match[str]) -> str:
        return values.get(match[0], match[0])

    def without_constants(text: str) -> str:
        lines = []
        for line in text.splitlines(keepends=True):
            if match := _CONSTANTS.match(line):
                texts = [_CODE_WORD.sub(literal, value) for value in _VALUE.findall(match[2])]
                values.update(zip(match[1].split(", "), map(_joined, texts), strict=True))
            else:
                lines.append(line)
        return "".join(lines)

    kept = [
        piece if piece.name else msgspec.structs.replace(piece, text=without_constants(piece.text)) for piece in pieces
    ]
    return [msgspec.structs.replace(piece, text=_CODE_WORD.sub(literal, piece.text)) for piece in kept]


def _joined(value: str) -> str:
    """Strings that are joined by `..` as one."""
    return value.replace("' .. '", "")


def _without_unused(pieces: list[_Piece]) -> list[_Piece]:
    """The pieces but for the functions of includes that the script never calls."""
    words = [Counter(_WORD.findall(piece.text)) for piece in pieces]
    total = sum(words, Counter[str]())
    kept = list(range(len(pieces)))
    while unused := [i for i in kept if pieces[i].name and total[pieces[i].name] == 1]:
        for i in unused:
            total.subtract(words[i])
        kept = [i for i in kept if i not in unused]
    return [pieces[i] for i in kept]


def _pieces(text: str) -> list[_Piece]:
    """The source taken apart."""
    pieces: list[_Piece] = []
    between: list[str] = []
    comment: list[str] = []
    function: list[str] = []
    name = apart = ""
    for line in text.splitlines(keepends=True):
        if function:
            function.append(line)
            if line == "end\n":
                pieces.append(_Piece("".join(function), name, apart))
                function = []
        elif match := _FUNCTION.match(line):
            pieces.append(_Piece("".join(between)))
            between, function, comment = [], [*comment, line], []
            name, apart = match[1], match[2] or ""
        elif line.startswith("--"):
            comment.append(line)
        else:
            between += [*comment, line]
            comment = []
    pieces.append(_Piece("".join([*between, *comment, *function])))
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
