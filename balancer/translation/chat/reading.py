"""A client's chat completions request as a conversation.

Strict: what nobody knows is refused by its path, for it may be what the client relies on.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from balancer.errors import RequestError
from balancer.translation.chat import members, messages
from balancer.translation.chat.members import Members, decoded, refused
from balancer.translation.conversation import (
    NO_SCHEMA,
    Cache,
    Choice,
    Conversation,
    Effort,
    Format,
    Reasoning,
    Tool,
)

_HINTS = (
    "cache_control",
    "metadata",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "service_tier",
    "store",
    "usage",
    "verbosity",
)
"""What changes cost, speed or bookkeeping; `usage` is OpenRouter's way to ask for prices."""

_REFUSED: dict[str, tuple[str, tuple[object, ...]]] = {
    "n": ("the services of this rule give one answer at a time", (1,)),
    "logprobs": ("the services of this rule give no probabilities", (False,)),
    "top_logprobs": ("the services of this rule give no probabilities", (0,)),
    "logit_bias": ("the services of this rule take no bias of tokens", ({},)),
    "modalities": ("the services of this rule answer in text only", (["text"], [])),
    "audio": ("the services of this rule answer in text only", ()),
    "prediction": ("the services of this rule take no predicted output", ()),
    "web_search_options": ("the services of this rule do not search the web", ()),
    "moderation": ("the services of this rule do not moderate", ()),
    "functions": ("deprecated, and not carried to the services of this rule; send `tools`", ([],)),
    "function_call": ("deprecated, and not carried to the services of this rule; send `tool_choice`", ("auto", "none")),
    "repetition_penalty": ("the services of this rule have no such penalty", (1, 1.0)),
    "min_p": ("the services of this rule have no such limit", (0, 0.0)),
    "top_a": ("the services of this rule have no such limit", (0, 0.0)),
}
"""Why a field is refused, and the values that ask for nothing."""

_effort = msgspec.json.Decoder(Effort)
_stop = msgspec.json.Decoder(str | list[str])
_mode = msgspec.json.Decoder(Literal["auto", "required"])
_CHOICES: dict[str, Literal["auto", "none", "any"]] = {"auto": "auto", "none": "none", "required": "any"}


def read_request(body: bytes) -> Conversation:
    """What the client asks for.

    Raises RequestError for a malformed request, UntranslatableError for what no other API can do; both name the path.
    """
    request = Members(body)
    model = request.need("model", members.text)
    fields: dict[str, str] = {}
    hints = [name for name in _HINTS if _is_said(request.raw(name))]
    for name, (why, nothing) in _REFUSED.items():
        value = request.take(name, members.anything)
        if value is not None and value not in nothing:
            raise refused(name, why)
    stream = request.take("stream", members.flag) or False
    said = messages.read(request.raw("messages"))
    hints += said.hints
    stop = request.take("stop", _stop) or []
    conversation = Conversation(
        model=model,
        system=said.system,
        turns=said.turns,
        tools=_tools(request),
        choice=_choice(request.raw("tool_choice")),
        is_parallel=request.take("parallel_tool_calls", members.flag),
        max_tokens=_max_tokens(request, fields),
        temperature=_within(request, "temperature", 0, 2),
        top_p=_within(request, "top_p", 0, 1),
        top_k=_top_k(request),
        seed=request.take("seed", members.whole),
        presence_penalty=_within(request, "presence_penalty", -2, 2),
        frequency_penalty=_within(request, "frequency_penalty", -2, 2),
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        format=_format(request.object("response_format")),
        reasoning=_reasoning(request),
        user=_user(request, fields),
        stream=stream,
        wants_usage=_wants_usage(request, stream),
        fields=fields,
        hints=tuple(hints),
    )
    request.finish()
    return conversation


def _is_said(raw: msgspec.Raw | None) -> bool:
    return raw is not None and not members.asks_nothing(raw) and bytes(raw) != b"false"


def _within(request: Members, name: str, least: float, most: float) -> float | None:
    value = request.take(name, members.number)
    if value is not None and not least <= value <= most:
        raise RequestError(f"{name}: must be between {least} and {most}", param=name)
    return value


def _top_k(request: Members) -> int | None:
    """The limit, as vLLM and OpenRouter have it; both take 0 and -1 for none."""
    value = request.take("top_k", members.whole)
    return value if value is not None and value > 0 else None


def _max_tokens(request: Members, fields: dict[str, str]) -> int | None:
    old = request.take("max_tokens", members.whole)
    new = request.take("max_completion_tokens", members.whole)
    if new is None:
        name, value = "max_tokens", old
    elif old in (None, new):
        name, value = "max_completion_tokens", new
        fields["max_tokens"] = name
    else:
        raise RequestError("max_tokens: differs from max_completion_tokens; send one of them", param="max_tokens")
    if value is not None and value < 1:
        raise RequestError(f"{name}: must be at least 1", param=name)
    return value


def _user(request: Members, fields: dict[str, str]) -> str:
    old = request.take("user", members.text)
    new = request.take("safety_identifier", members.text)
    if new:
        fields["user"] = "safety_identifier"
    return new or old or ""


def _wants_usage(request: Members, stream: bool) -> bool:
    options = request.object("stream_options")
    if options is None:
        return not stream
    wanted = options.take("include_usage", members.flag) or False
    options.take("include_obfuscation", members.flag)
    options.take("continuous_usage_stats", members.flag)
    options.finish()
    return wanted or not stream


# -- tools -------------------------------------------------------------------------------------------------------------


def _tools(request: Members) -> tuple[Tool, ...]:
    tools = tuple(_tool(each) for each in request.objects("tools"))
    seen: set[str] = set()
    for tool in tools:
        if tool.name in seen:
            raise RequestError(f"{tool.at}: a tool named {tool.name!r} is there already", param=tool.at)
        seen.add(tool.name)
    return tools


def _tool(tool: Members) -> Tool:
    kind = tool.need("type", members.text)
    cache = messages.cache_of(tool)
    match kind:
        case "function":
            read = _function(_needed(tool, "function"), tool.path, cache)
        case "custom":
            read = _custom(_needed(tool, "custom"), tool.path, cache)
        case _:
            raise refused(tool.path, f"a tool of the type {kind!r} is not there at the services of this rule")
    tool.finish()
    return read


def _needed(holder: Members, name: str) -> Members:
    found = holder.object(name)
    if found is None:
        raise members.missing(holder.at(name))
    return found


def _function(function: Members, path: str, cache: Cache) -> Tool:
    own = messages.cache_of(function)
    tool = Tool(
        name=function.need("name", members.text),
        description=function.take("description", members.text) or "",
        schema=_schema(function, "parameters") or NO_SCHEMA,
        is_strict=function.take("strict", members.flag) or False,
        cache=cache or own,
        at=path,
    )
    function.finish()
    return tool


def _custom(custom: Members, path: str, cache: Cache) -> Tool:
    raw = custom.raw("format")
    grammar = None
    if raw is not None:
        form = Members(raw, custom.at("format"))
        kind = form.need("type", members.text)
        if kind == "grammar":
            inner = _needed(form, "grammar")
            inner.need("definition", members.text)
            inner.need("syntax", members.text)
            inner.finish()
            grammar = raw
        elif kind != "text":
            raise refused(form.at("type"), f"{kind!r} is not known; it is `text` or `grammar`")
        form.finish()
    tool = Tool(
        name=custom.need("name", members.text),
        description=custom.take("description", members.text) or "",
        kind="custom",
        grammar=grammar,
        cache=cache,
        at=path,
    )
    custom.finish()
    return tool


def _schema(holder: Members, name: str) -> msgspec.Raw | None:
    """A JSON Schema as it stands; an empty one says nothing."""
    raw = holder.raw(name)
    if raw is None:
        return None
    return raw if decoded(_any_object, raw, holder.at(name)) else None


_any_object = msgspec.json.Decoder(dict[str, Any])


def _choice(raw: msgspec.Raw | None) -> Choice | None:
    if raw is None:
        return None
    if members.is_text(raw):
        mode = decoded(members.text, raw, "tool_choice")
        if mode not in _CHOICES:
            raise RequestError("tool_choice: must be none, auto, required, or an object", param="tool_choice")
        return Choice(mode=_CHOICES[mode])
    choice = Members(raw, "tool_choice")
    kind = choice.need("type", members.text)
    match kind:
        case "function" | "custom":
            named = _needed(choice, kind)
            read = Choice(mode="named", name=named.need("name", members.text))
            named.finish()
        case "allowed_tools":
            read = _allowed(_needed(choice, kind))
        case "auto" | "none" | "required":  # No word of OpenAI's, but of clients that speak to many.
            read = Choice(mode=_CHOICES[kind])
        case _:
            raise refused("tool_choice.type", f"{kind!r} is not known to the services of this rule")
    choice.finish()
    return read


def _allowed(allowed: Members) -> Choice:
    mode = allowed.take("mode", _mode) or "auto"
    names = []
    for tool in allowed.objects("tools"):
        kind = tool.need("type", members.text)
        if kind not in ("function", "custom"):
            raise refused(tool.path, f"a tool of the type {kind!r} is not there at the services of this rule")
        names.append(_needed(tool, kind).need("name", members.text))
    allowed.finish()
    return Choice(mode="any" if mode == "required" else "auto", among=tuple(names))


# -- what the answer is to be ------------------------------------------------------------------------------------------


def _format(form: Members | None) -> Format | None:
    if form is None:
        return None
    kind = form.need("type", members.text)
    read: Format | None
    match kind:
        case "text":
            read = None
        case "json_object":
            read = Format(is_strict=False)
        case "json_schema":
            schema = _needed(form, "json_schema")
            read = Format(
                schema=_schema(schema, "schema") or msgspec.Raw(b"{}"),
                name=schema.need("name", members.text),
                description=schema.take("description", members.text) or "",
                is_strict=schema.take("strict", members.flag) or False,
            )
            schema.finish()
        case _:
            raise refused("response_format.type", f"{kind!r} is not known to the services of this rule")
    form.finish()
    return read


def _reasoning(request: Members) -> Reasoning | None:
    """What is asked for by one of three ways: OpenAI's, OpenRouter's `reasoning`, or `thinking` as Anthropic has it.

    DeepSeek, Moonshot and Z.ai take the last, and so do clients that speak to many. OpenAI's goes before the others.
    """
    effort = request.take("reasoning_effort", _effort)
    is_shown = request.take("include_reasoning", members.flag)
    routed = _routed(request.object("reasoning"))
    native = _thinking(request.object("thinking"))
    found = next((each for each in (routed, native) if each is not None), None)
    if effort is not None:
        found = msgspec.structs.replace(found or Reasoning(), effort=effort, budget_tokens=None, at="reasoning_effort")
    if is_shown is not None:
        found = (
            msgspec.structs.replace(found, is_shown=is_shown)
            if found
            else Reasoning(is_shown=is_shown, at="include_reasoning")
        )
    return found


def _routed(reasoning: Members | None) -> Reasoning | None:
    if reasoning is None:
        return None
    effort = reasoning.take("effort", _effort)
    budget = reasoning.take("max_tokens", members.whole)
    is_hidden = reasoning.take("exclude", members.flag)
    is_enabled = reasoning.take("enabled", members.flag)
    reasoning.raw("summary")  # How much is told of it; every vendor tells what it tells.
    reasoning.finish()
    if is_enabled is False:
        effort, budget = "none", None
    elif is_enabled and effort is None and budget is None:
        effort = "medium"
    return Reasoning(
        effort=effort,
        budget_tokens=budget if effort is None else None,
        is_shown=None if is_hidden is None else not is_hidden,
        at=reasoning.path,
    )


def _thinking(thinking: Members | None) -> Reasoning | None:
    if thinking is None:
        return None
    kind = thinking.need("type", members.text)
    budget = thinking.take("budget_tokens", members.whole)
    display = thinking.take("display", members.text)
    thinking.finish()
    is_shown = None if display is None else display != "omitted"
    match kind:
        case "disabled":
            return Reasoning(effort="none", at=thinking.path)
        case "adaptive":
            return Reasoning(is_adaptive=True, is_shown=is_shown, at=thinking.path)
        case "enabled":
            effort: Effort | None = "medium" if budget is None else None
            return Reasoning(effort=effort, budget_tokens=budget, is_shown=is_shown, at=thinking.path)
        case _:
            raise refused(thinking.at("type"), f"{kind!r} is not known to the services of this rule")
