"""The Lua scripts: read with their includes and headers, called by the names in them.

`python -m balancer.store.scripts --expand FOLDER` writes each script as Redis gets it, for a linter.
"""

from __future__ import annotations

import functools
import hashlib
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from balancer.errors import ConfigurationError

_PACKAGE = Path(__file__).resolve().parent.parent
_KEY = re.compile(r"^-- KEYS\[(\d+)\]\s+(\w+)")
_ARGUMENT = re.compile(r"^-- ARGV\[(\d+)(…?)\]\s+(\w+)")
_INCLUDE = re.compile(r"^-- include: (\S+)\s*$")


class Script(msgspec.Struct, frozen=True, kw_only=True):
    """A script as Redis gets it, with the names of its keys and arguments; `rest` names the last, repeated group."""

    name: str
    source: str
    sha: str
    keys: tuple[str, ...]
    arguments: tuple[str, ...]
    rest: str

    def command(
        self, keys: Mapping[str, str], arguments: Mapping[str, str | int], rest: Sequence[str | int] = ()
    ) -> tuple[str | int, ...]:
        """What follows the word EVALSHA <sha> or EVAL <source>: the number of keys, keys and arguments in order.

        Raises TypeError when the names are not exactly those of the header.
        """
        if keys.keys() != set(self.keys) or arguments.keys() != set(self.arguments) or (rest and not self.rest):
            raise TypeError(f"{self.name} takes keys {self.keys}, arguments {self.arguments}, rest {self.rest or None}")
        return (
            len(self.keys),
            *(keys[name] for name in self.keys),
            *(arguments[name] for name in self.arguments),
            *rest,
        )


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
    keys, arguments, rest = _header(name, text)
    source = _expand(root, text, set())
    return Script(
        name=name,
        source=source,
        sha=hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest(),
        keys=keys,
        arguments=arguments,
        rest=rest,
    )


def names(override: str = "") -> tuple[str, ...]:
    """All scripts of the folder."""
    return tuple(sorted(path.stem for path in folder(override).glob("*.lua")))


def _header(name: str, text: str) -> tuple[tuple[str, ...], tuple[str, ...], str]:
    keys: list[str] = []
    arguments: list[str] = []
    rest = ""
    for line in text.splitlines():
        if not line.startswith("--"):
            break
        if match := _KEY.match(line):
            if int(match[1]) != len(keys) + 1:
                raise ConfigurationError(f"{name}.lua: KEYS[{match[1]}] is out of order")
            keys.append(match[2])
        elif match := _ARGUMENT.match(line):
            if int(match[1]) != len(arguments) + 1 or rest:
                raise ConfigurationError(f"{name}.lua: ARGV[{match[1]}] is out of order")
            if match[2]:
                rest = match[3]
            else:
                arguments.append(match[3])
    return tuple(keys), tuple(arguments), rest


def _expand(root: Path, text: str, done: set[str]) -> str:
    lines: list[str] = []
    for line in text.splitlines():
        if not (match := _INCLUDE.match(line)):
            lines.append(line)
        elif match[1] not in done:
            done.add(match[1])
            path = root / "include" / f"{match[1]}.lua"
            if not path.is_file():
                raise ConfigurationError(f"{path} is included but does not exist")
            lines.append(_expand(root, path.read_text(encoding="utf-8"), done).rstrip("\n"))
    return "\n".join(lines) + "\n"


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
