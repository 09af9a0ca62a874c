"""The loader, and what all scripts have in common: headers, keys, commands, no globals."""

from __future__ import annotations

import re
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lupa import lua51  # type: ignore[import-untyped]  # it has no types

from balancer.errors import ConfigurationError
from balancer.store import scripts
from balancer.store.scripts import Script, load

NAMES = (
    *("checkpoint", "clear", "commit", "fence"),
    *("grant_keep", "grant_lease", "grant_look", "grant_release", "grant_reseal", "grant_restore"),
    *("health", "note", "publish", "reap", "tick"),
)

# Commands and their words that Redis 6.2 has, and that the scripts may use. PEXPIRE only without NX, XX, GT, LT (7.0).
WORDS_OF_REDIS_6_2 = frozenset(
    {
        *("DEL", "EXISTS", "GET", "SET", "PX", "PEXPIRE", "PUBLISH", "TIME"),
        *("HDEL", "HGET", "HGETALL", "HKEYS", "HMGET", "HSCAN", "COUNT", "HSET", "HSETNX", "HINCRBY"),
        *("ZADD", "ZRANGE", "WITHSCORES", "ZREMRANGEBYSCORE", "ZSCORE"),
        *("XADD", "MAXLEN", "MINID", "XRANGE"),
    }
)
GLOBALS_OF_A_SCRIPT = frozenset(
    {
        *("KEYS", "ARGV", "redis", "cjson", "cmsgpack"),
        *("ipairs", "math", "next", "pairs", "pcall", "rawget", "setmetatable", "string", "table", "tonumber", "type"),
        "unpack",
    }
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of scripts that has a tick, without which it is none."""
    (tmp_path / "include").mkdir()
    (tmp_path / "tick.lua").write_text("return 1\n")
    return tmp_path


def written(folder: Path, *lines: str, name: str = "story") -> Script:
    (folder / f"{name}.lua").write_text("\n".join(lines) + "\n")
    return load(name, str(folder))


def include(folder: Path, name: str, *lines: str) -> None:
    path = folder / "include" / f"{name}.lua"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


# -- the header --------------------------------------------------------------------------------------------------------

HEADER = (
    "-- Does a thing; KEYS[9] in a sentence is no declaration.",
    "-- KEYS[1] services      the pool's services",
    "-- KEYS[2] leases        of all workers,",
    "--   told at length",
    "-- ARGV[1] now_ms        0 for the server's clock",
    "-- ARGV[2] worker        who asks",
    "-- ARGV[3…] entries      number, service",
    "-- Returns {'done'}.",
)


def test_a_header_names_keys_and_arguments_in_order(folder: Path) -> None:
    script = written(folder, *HEADER, "return {'done'}")
    assert (script.keys, script.arguments, script.rest) == (("services", "leases"), ("now_ms", "worker"), "entries")


def test_a_script_may_take_nothing(folder: Path) -> None:
    script = written(folder, "-- Does nothing.", "return 1")
    assert (script.keys, script.arguments, script.rest) == ((), (), "")
    assert script.command({}, {}) == (0,)


def test_the_header_ends_where_the_code_begins(folder: Path) -> None:
    script = written(folder, "-- Does a thing.", "-- KEYS[1] services", "local x = 1", "-- KEYS[2] leases", "return x")
    assert script.keys == ("services",)


@pytest.mark.parametrize(
    ("lines", "fault"),
    [
        (["-- KEYS[2] services"], r"KEYS\[2\] is out of order"),
        (["-- KEYS[0] services"], r"KEYS\[0\] is out of order"),
        (["-- KEYS[1] services", "-- KEYS[1] leases"], r"KEYS\[1\] is out of order"),
        (["-- KEYS[1] services", "-- KEYS[3] leases"], r"KEYS\[3\] is out of order"),
        (["-- ARGV[2] now_ms"], r"ARGV\[2\] is out of order"),
        (["-- ARGV[1] now_ms", "-- ARGV[1] worker"], r"ARGV\[1\] is out of order"),
        (["-- ARGV[1] now_ms", "-- ARGV[3…] entries"], r"ARGV\[3\] is out of order"),
        (["-- ARGV[1…] entries", "-- ARGV[2] now_ms"], r"ARGV\[2\] is out of order"),
        (["-- ARGV[1…] entries", "-- ARGV[2…] more"], r"ARGV\[2\] is out of order"),
    ],
)
def test_numbers_out_of_order_are_refused(folder: Path, lines: list[str], fault: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"story\.lua: {fault}"):
        written(folder, "-- Does a thing.", *lines, "return 1")


def test_a_folder_without_scripts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no Lua scripts"):
        load("tick", str(tmp_path))


# -- includes ----------------------------------------------------------------------------------------------------------


def test_an_include_is_pulled_in_where_its_line_stands(folder: Path) -> None:
    include(folder, "tactic/one", "local function one()", "  return 1", "end")
    script = written(folder, "-- Does a thing.", "-- include: tactic/one", "", "return one()")
    assert script.source == "-- Does a thing.\nlocal function one()\n  return 1\nend\n\nreturn one()\n"


def test_an_include_is_pulled_in_once_and_includes_of_includes_first(folder: Path) -> None:
    include(folder, "number", "local number = 1")
    include(folder, "window", "-- include: number", "local window = number")
    include(folder, "service", "-- include: window", "-- include: number", "local service = window")
    script = written(
        folder, "-- Does a thing.", "-- include: service", "-- include: window", "-- include: number", "return service"
    )
    assert script.source.splitlines() == [
        "-- Does a thing.",
        "local number = 1",
        "local window = number",
        "local service = window",
        "return service",
    ]


def test_an_include_that_does_not_exist_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"include/window\.lua is included but does not exist"):
        written(folder, "-- Does a thing.", "-- include: window", "return 1")


def test_an_unknown_include_of_an_include_is_refused(folder: Path) -> None:
    include(folder, "window", "-- include: nowhere")
    with pytest.raises(ConfigurationError, match=r"nowhere\.lua is included but does not exist"):
        written(folder, "-- Does a thing.", "-- include: window", "return 1")


def test_what_an_include_says_of_keys_is_no_part_of_the_header(folder: Path) -> None:
    include(folder, "window", "-- KEYS[1] other", "local window = 1")
    script = written(folder, "-- include: window", "-- KEYS[1] services", "return window")
    assert script.keys == ("services",)


# -- calls by name -----------------------------------------------------------------------------------------------------


def test_a_command_puts_names_in_the_headers_order(folder: Path) -> None:
    script = written(folder, *HEADER, "return 1")
    command = script.command({"leases": "L", "services": "S"}, {"worker": "w", "now_ms": 7}, [1, "a", 2, "b"])
    assert command == (2, "S", "L", 7, "w", 1, "a", 2, "b")
    assert script.command({"leases": "L", "services": "S"}, {"worker": "w", "now_ms": 7}) == (2, "S", "L", 7, "w")


@pytest.mark.parametrize(
    ("keys", "arguments"),
    [
        ({"services": "S"}, {"now_ms": 7, "worker": "w"}),
        ({"services": "S", "leases": "L", "decisions": "D"}, {"now_ms": 7, "worker": "w"}),
        ({"services": "S", "lease": "L"}, {"now_ms": 7, "worker": "w"}),
        ({"services": "S", "leases": "L"}, {"now_ms": 7}),
        ({"services": "S", "leases": "L"}, {"now_ms": 7, "worker": "w", "epoch": 1}),
        ({"services": "S", "leases": "L"}, {"now_ms": 7, "worker": "w", "entries": 1}),
        ({}, {}),
    ],
)
def test_names_that_are_not_exactly_the_headers_are_refused(
    folder: Path, keys: dict[str, str], arguments: dict[str, str | int]
) -> None:
    script = written(folder, *HEADER, "return 1")
    with pytest.raises(TypeError, match=r"story takes keys .*services.*arguments .*now_ms"):
        script.command(keys, arguments)


def test_a_rest_is_refused_where_the_header_has_none(folder: Path) -> None:
    script = written(folder, *HEADER[:-2], "return 1")
    with pytest.raises(TypeError, match="none more"):
        script.command({"services": "S", "leases": "L"}, {"now_ms": 7, "worker": "w"}, [1])


# -- the scripts themselves --------------------------------------------------------------------------------------------


def test_the_scripts_are_these() -> None:
    assert scripts.names() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_script_loads_under_the_name_that_evalsha_is_given(client: Any, name: str) -> None:
    script = load(name)
    assert client.script_load(script.source) == script.sha
    assert client.script_exists(script.sha) == [True]


@pytest.mark.parametrize("name", NAMES)
def test_every_script_opens_with_a_sentence_and_says_what_it_returns(name: str) -> None:
    header = re.split(r"\n(?!--)", (scripts.folder() / f"{name}.lua").read_text(), maxsplit=1)[0]
    assert re.match(r"-- [A-Z]", header)
    assert "\n-- Returns " in header


@pytest.mark.parametrize("name", NAMES)
def test_every_key_and_argument_used_is_declared_and_the_other_way_round(name: str) -> None:
    script = load(name)
    code = code_of(script.source)
    assert {int(n) for n in re.findall(r"KEYS\[(\d+)\]", code)} == set(range(1, len(script.keys) + 1))
    used = {int(n) for n in re.findall(r"ARGV\[(\d+)\]", code)}
    assert used == set(range(1, len(script.arguments) + 1))
    assert script.keys, "every script has keys, and names none itself"
    assert "balancer:" not in code


def files() -> list[Path]:
    return sorted(scripts.folder().rglob("*.lua"))


def code_of(source: str) -> str:
    """The source without its comments; none of ours has a string with two dashes."""
    return re.sub(r"--.*", "", source)


@pytest.mark.parametrize("path", files(), ids=lambda path: path.stem)
def test_only_commands_that_redis_6_2_has_are_called_and_by_their_plain_names(path: Path) -> None:
    code = code_of(path.read_text())
    words = set(re.findall(r"'([A-Z][A-Z.]+)'", code)) - {"KEYS", "ARGV"}
    assert words <= WORDS_OF_REDIS_6_2
    calls = re.findall(r"redis\.(\w+)\(\s*('[A-Z]+')?", code)
    assert {name for name, _ in calls} <= {"call", "error_reply"}
    assert [command for name, command in calls if name == "call" and not command] == [], "a command that is computed"
    assert len(calls) == len(re.findall(r"\bredis\b", code)), "redis is not passed on under another name"


@pytest.mark.parametrize("path", sorted((scripts.folder() / "include").rglob("*.lua")), ids=lambda path: path.stem)
def test_an_include_touches_only_its_arguments(path: Path) -> None:
    code = code_of(path.read_text())
    assert re.findall(r"\b(?:KEYS|ARGV)\b", code) == []
    assert [line for line in code.splitlines() if re.match(r"(?!local |end\b|[}']|\s|$)", line)] == []


@pytest.mark.parametrize("name", NAMES)
def test_no_script_has_a_global_of_its_own(name: str) -> None:
    read, set_ = globals_of(load(name).source)
    assert set_ == set()
    assert read <= GLOBALS_OF_A_SCRIPT


def test_globals_are_found_however_deep_they_are_hidden() -> None:
    source = "local a = b; c = 1; local function f() return function() d = e[1] end end; function g() end; return f"
    assert globals_of(source) == ({"b", "e"}, {"c", "d", "g"})


def test_expanding_writes_each_script_as_redis_gets_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["scripts", "--expand", str(tmp_path / "new" / "lua")])
    scripts.main()
    expanded = {path.stem: path.read_text() for path in (tmp_path / "new" / "lua").iterdir()}
    assert expanded == {name: load(name).source for name in NAMES}


# -- globals, from the compiled chunk ----------------------------------------------------------------------------------


def globals_of(source: str) -> tuple[set[str], set[str]]:
    """The globals that a Lua 5.1 source reads, and those that it sets."""
    runtime = lua51.LuaRuntime(encoding=None)
    dump = runtime.eval(b"function(source) return string.dump(assert(loadstring(source))) end")
    chunk = Chunk(dump(source.encode()))
    instructions = list(chunk.function())
    assert chunk.at == len(chunk.data)
    return (
        {name for opcode, name in instructions if opcode == Chunk.GET_GLOBAL},
        {name for opcode, name in instructions if opcode == Chunk.SET_GLOBAL},
    )


class Chunk:
    """A compiled chunk of Lua 5.1 (lundump.c), read as far as the accesses to globals."""

    GET_GLOBAL, SET_GLOBAL = 5, 7

    def __init__(self, data: bytes) -> None:
        assert data[:6] == b"\x1bLua\x51\x00"
        self.data = data
        self.order = "<" if data[6] else ">"
        self.int_bytes, self.size_bytes, self.instruction_bytes, self.number_bytes = data[7:11]
        self.at = 12

    def function(self) -> Iterator[tuple[int, str]]:
        """Opcode and name of each access to a global, in this function and those within."""
        self.text()
        self.skip(2 * self.int_bytes + 4)
        code = [self.whole(self.instruction_bytes) for _ in range(self.count())]
        constants = [self.constant() for _ in range(self.count())]
        for instruction in code:
            if (opcode := instruction & 0x3F) in (self.GET_GLOBAL, self.SET_GLOBAL):
                yield opcode, constants[instruction >> 14]
        for _ in range(self.count()):
            yield from self.function()
        self.skip(self.count() * self.int_bytes)
        for _ in range(self.count()):
            self.text()
            self.skip(2 * self.int_bytes)
        for _ in range(self.count()):
            self.text()

    def constant(self) -> str:
        """The constant if it is a string, else nothing."""
        kind = self.whole(1)
        if kind == 4:
            return self.text()
        self.skip({0: 0, 1: 1, 3: self.number_bytes}[kind])
        return ""

    def text(self) -> str:
        size = self.whole(self.size_bytes)
        self.skip(size)
        return self.data[self.at - size : self.at].rstrip(b"\0").decode()

    def count(self) -> int:
        return self.whole(self.int_bytes)

    def whole(self, size: int) -> int:
        self.skip(size)
        (value,) = struct.unpack_from(self.order + {1: "B", 4: "I", 8: "Q"}[size], self.data, self.at - size)
        return int(value)

    def skip(self, size: int) -> None:
        self.at += size


def test_an_included_folder_gives_a_function_by_its_name(folder: Path) -> None:
    for name in ("two", "one"):
        include(folder, f"numbers/{name}", f"local function {name}()", f"  return '{name}'", "end")
    script = written(folder, "-- Does a thing.", "-- include: numbers/*", "return numbers_named(ARGV[1])")
    numbers_named = lua51.LuaRuntime().execute(script.source.replace("(ARGV[1])", ""))
    assert [numbers_named("one")(), numbers_named("two")(), numbers_named("three")] == ["one", "two", None]


def test_what_is_included_by_its_folder_includes_nothing(folder: Path) -> None:
    include(folder, "number", "local number = 1")
    include(folder, "numbers/one", "-- include: number", "local function one()", "  return number", "end")
    with pytest.raises(ConfigurationError, match=r"numbers/one\.lua: .* includes nothing"):
        written(folder, "-- Does a thing.", "-- include: numbers/*", "return 1")


def test_functions_that_a_script_never_calls_are_left_out(folder: Path) -> None:
    include(
        folder,
        "number",
        *("local ONE = 1", "", "-- Used by what is not used.", "local function two()", "  return 2", "end", ""),
        *("-- Not used.", "local function three()", "  return two() + ONE", "end", ""),
        *("-- Used.", "local function four()", "  return 4", "end"),
    )
    script = written(folder, "-- Does a thing.", "-- include: number", "return four()")
    kept = [
        "-- Does a thing.",
        "local ONE = 1",
        "-- Used.",
        "local function four()",
        "  return 4",
        "end",
        "return four()",
    ]
    assert [line for line in script.source.splitlines() if line] == kept


# -- what a script makes in each call ----------------------------------------------------------------------------------

GATHERED = (
    "-- Does a thing.",
    "local SIZE, WORDS = 3, '%d+ ' .. 'b'",
    "",
    "-- Often needed.",
    "local function often(x)",
    "  return {often = x + SIZE}",
    "end",
    "",
    "local function seldom(x) -- apart: rare",
    "  return often(x).often + never(x)",
    "end",
    "",
    "local function never(x) -- apart: rare",
    "  return #WORDS -- often",
    "end",
    "",
    "-- main",
    "return often(1).often, seldom(1), 'often'",
)


def test_functions_of_a_script_with_a_main_part_are_fields_of_one_table(folder: Path) -> None:
    script = written(folder, *GATHERED)
    assert lua51.LuaRuntime().execute(script.source) == (4, 9, "often")
    assert "local SIZE" not in script.source
    assert "return fn.often(1).often, fn.rare().seldom(1), 'often'" in script.source


def test_functions_that_are_made_apart_are_made_when_the_first_of_them_is_called(folder: Path) -> None:
    source = written(folder, *GATHERED[:-1], "if KEYS then return seldom(1) end", "return fn").source
    functions = lua51.LuaRuntime().execute(source)
    before = functions["rare"]
    assert sorted(before()) == ["never", "seldom"]
    assert functions["rare"] != before, "it gives what is made"
    assert sorted(functions["rare"]()) == ["never", "seldom"]


def test_a_function_of_such_a_script_that_is_a_variable_too_is_refused(folder: Path) -> None:
    """It would be taken for the function where the variable is meant."""
    lines = [*GATHERED[:-1], "local often = 1", "return often"]
    with pytest.raises(ConfigurationError, match=r"story\.lua: often is a function and a variable"):
        written(folder, *lines)


@pytest.mark.parametrize("path", files(), ids=lambda path: path.stem)
def test_lines_of_the_sources_are_no_longer_than_elsewhere(path: Path) -> None:
    assert [line for line in path.read_text().splitlines() if len(line) > 120] == []
