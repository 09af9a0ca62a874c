"""The tools of a request, and which of them may be called.

A namespace is a group of tools; other APIs have none, so its tools go as `namespace__name`, the first with what the
namespace says of itself, and their calls come back with the two apart.
"""

from __future__ import annotations

import hashlib
import re

import msgspec

from balancer.errors import RequestError
from balancer.translation.conversation import NO_SCHEMA, Choice, Tool
from balancer.translation.responses.fields import Fields, named, unsupported

_NAME = re.compile(r"[A-Za-z0-9_-]{1,128}")
_ODD = re.compile(r"[^A-Za-z0-9_-]")
_LONGEST_OF_ALL = 128
_LONGEST = 64
"""What most APIs take."""
_DIRECTLY: tuple[object, ...] = (None, [], ["direct"])


class Tools:
    """Gathers the tools of a request.

    `namespaces` has the namespace and the name of a tool by the name under which the model knows it.
    """

    def __init__(self) -> None:
        self.hints: set[str] = set()
        self.namespaces: dict[str, tuple[str, str]] = {}
        self._tools: dict[str, Tool] = {}

    @property
    def all(self) -> tuple[Tool, ...]:
        """The tools so far."""
        return tuple(self._tools.values())

    def read(self, value: object, at: str) -> None:
        """Adds a tool, or those of a namespace."""
        tool = Fields(value, at)
        if tool.peek("type") != "namespace":
            self._add(tool)
            return
        tool.skip("type")
        name, description = tool_name(tool), tool.maybe_text("description")
        for path, inner in tool.each("tools"):
            self._add(Fields(inner, path), name, description)
            description = ""  # Told once: it may be long, and there may be many tools.
        tool.done()

    def choice(self, fields: Fields) -> Choice | None:
        """Which may be called; None where the model may choose, or there is nothing to choose from."""
        value = fields.take("tool_choice")
        at = fields.path("tool_choice")
        if value is None or value == "auto":
            return None
        if value == "none":
            return Choice(mode="none") if self._tools else None
        if value == "required":
            if not self._tools:
                raise RequestError(f"`{at}` requires a call, and there are no `tools`", param=at)
            return Choice(mode="any")
        if isinstance(value, str):
            raise unsupported(at, f"{named(value)} is none of auto, none, required")
        chosen = Fields(value, at)
        if chosen.peek("type") == "allowed_tools":
            chosen.skip("type")
            mode = chosen.word("mode", ("auto", "required"), "auto")
            among = tuple(self._chosen(Fields(entry, path)) for path, entry in chosen.each("tools"))
            chosen.done()
            if not among:
                raise RequestError(f"`{at}.tools` allows no tool", param=f"{at}.tools")
            return Choice(mode="any" if mode == "required" else "auto", among=among)
        return Choice(mode="named", name=self._chosen(chosen))

    def _chosen(self, chosen: Fields) -> str:
        """The name of the tool that is meant."""
        kind = chosen.text("type")
        if kind not in ("function", "custom"):
            raise unsupported(chosen.at, f"the services of this rule have no {named(kind)} tool")
        name, namespace = tool_name(chosen), chosen.maybe_text("namespace")
        chosen.done()
        if namespace:
            name = qualified(namespace, name, chosen.path("name"))
        if name not in self._tools:
            raise RequestError(f"`{chosen.path('name')}` is no tool of this request", param=chosen.path("name"))
        return name

    def _add(self, tool: Fields, namespace: str = "", of_namespace: str = "") -> None:
        kind = tool.text("type")
        if kind not in ("function", "custom"):
            raise unsupported(
                tool.at,
                f"the services of this rule have no {named(kind)} tool; offer functions and custom tools, which the"
                " client runs, or switch this one off in the client",
            )
        name = own = tool_name(tool)
        description = tool.maybe_text("description")
        if namespace:
            name = qualified(namespace, own, tool.path("name"))
            self.namespaces[name] = (namespace, own)
            description = f"{of_namespace}\n\n{description}".strip()
        if name in self._tools:
            raise RequestError(f"`{tool.path('name')}`: another tool has this name", param=tool.path("name"))
        if tool.flag("defer_loading"):
            raise unsupported(tool.path("defer_loading"), "tools cannot be searched for; offer this one at once")
        if tool.flag("async"):
            raise unsupported(tool.path("async"), "the model waits for what its tools give")
        if tool.take("allowed_callers") not in _DIRECTLY:
            raise unsupported(tool.path("allowed_callers"), "only the model itself calls tools")
        if tool.take("output_schema") is not None:
            self.hints.add("tools[].output_schema")
        if kind == "function":
            read = Tool(
                name=name,
                description=description,
                schema=_schema(tool),
                is_strict=tool.flag("strict") is True,
                at=tool.at,
            )
        else:
            read = Tool(name=name, description=description, kind="custom", grammar=_grammar(tool), at=tool.at)
        tool.done()
        self._tools[name] = read


def tool_name(fields: Fields) -> str:
    """The member `name`: letters, digits, dashes and underscores."""
    name = fields.text("name")
    if not _NAME.fullmatch(name):
        path = fields.path("name")
        raise RequestError(f"`{path}` must be 1 to 128 letters, digits, dashes and underscores", param=path)
    return name


def called_name(fields: Fields) -> str:
    """The member `name` of a call that a model has made: models make names up, and no API takes those back."""
    name, namespace = fields.text("name"), fields.maybe_text("namespace")
    name = _ODD.sub("_", name)[:_LONGEST_OF_ALL] or "_"
    return qualified(namespace, name, fields.path("name")) if namespace else name


def qualified(namespace: str, name: str, at: str) -> str:
    """The name under which the model knows a namespace's tool."""
    whole = f"{namespace}__{name}"
    if not _NAME.fullmatch(namespace):
        raise RequestError(f"`{at}`: its namespace must be letters, digits, dashes and underscores", param=at)
    if len(whole) <= _LONGEST:
        return whole
    return f"{whole[: _LONGEST - 9]}_{hashlib.sha256(whole.encode()).hexdigest()[:8]}"


def _schema(tool: Fields) -> msgspec.Raw:
    if not tool.peek("parameters"):
        tool.skip("parameters")
    return tool.raw("parameters") or NO_SCHEMA


def _grammar(tool: Fields) -> msgspec.Raw | None:
    """What a custom tool's input must look like, as the client gave it; None for any text."""
    given = tool.inner("format")
    if given is None:
        return None
    kind = given.word("type", ("text", "grammar"), "text")
    if kind == "text":
        given.done()
        return None
    syntax, definition = given.word("syntax", ("lark", "regex"), "lark"), given.text("definition")
    given.done()
    return msgspec.Raw(msgspec.json.encode({"type": kind, "syntax": syntax, "definition": definition}))
