"""A client's messages request, as a conversation."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from balancer.errors import RequestError
from balancer.translation.conversation import (
    NO_SCHEMA,
    Choice,
    Conversation,
    Effort,
    Format,
    Reasoning,
    Text,
    Tool,
    Turn,
    UntranslatableError,
)
from balancer.translation.messages.blocks import cache, parts, texts
from balancer.translation.messages.fields import (
    ANY,
    FLOAT,
    INT,
    OBJECT,
    RAW,
    RAWS,
    STR,
    STRS,
    Fields,
    read,
)

_FIELDS: Mapping[str, str] = {
    "stop": "stop_sequences",
    "user": "metadata.user_id",
    "is_parallel": "tool_choice.disable_parallel_tool_use",
    "choice": "tool_choice",
    "format": "output_config.format",
    "reasoning": "thinking",
}
_HINTS = (
    "anthropic_beta",
    "anthropic_version",
    "betas",
    "billing_policy",
    "cache_control",
    "context_management",
    "diagnostics",
    "fallback_credit_token",
    "fallbacks",
    "service_tier",
    "speed",
    "user_profile_id",
    "workspace_id",
)
_EFFORTS: Mapping[str, Effort] = {name: name for name in ("low", "medium", "high", "xhigh", "max")}
_BILLING = "x-anthropic-billing-header:"
"""Claude Code begins its system text with this bookkeeping (2.1.36 and later). It differs with each request, so that
no other service would find anything of it in a cache."""


def read_request(body: bytes) -> Conversation:
    """The conversation that a client asks to be gone on with.

    Raises UntranslatableError for what only Anthropic does, RequestError for what it would refuse as well.
    """
    request = Fields.of(body)
    max_tokens = request.need("max_tokens", INT)
    if max_tokens < 1:
        if max_tokens == 0:
            raise request.refuse(
                "max_tokens", "0 warms Anthropic's cache, which the services of this model do not have"
            )
        raise RequestError("`max_tokens` must not be negative", param="max_tokens")
    return _conversation(request, max_tokens)


def read_count_tokens(body: bytes) -> Conversation:
    """The conversation whose tokens a client wants counted: a request without `max_tokens`. Raises as read_request."""
    request = Fields.of(body)
    return _conversation(request, request.take("max_tokens", INT))


def _conversation(request: Fields, max_tokens: int | None) -> Conversation:
    hints = list(request.drop(*_HINTS))
    system = _system(request, hints)
    turns = _turns(request, hints)
    choice, is_parallel = _choice(request)
    output = request.object("output_config")
    effort = _effort(output)
    format_ = _format(output, "format") or _format(request, "output_format")
    if output is not None:
        hints += output.drop("task_budget")
        output.close()
    conversation = Conversation(
        model=request.need("model", STR),
        system=system,
        turns=turns,
        tools=_tools(request, hints),
        choice=choice,
        is_parallel=is_parallel,
        max_tokens=max_tokens,
        temperature=request.take("temperature", FLOAT),
        top_p=request.take("top_p", FLOAT),
        top_k=request.take("top_k", INT),
        stop=_strings(request, "stop_sequences"),
        format=format_,
        reasoning=_reasoning(request, effort, hints),
        user=_user(request, hints),
        stream=request.flag("stream"),
        fields=_FIELDS,
        hints=tuple(dict.fromkeys(hints)),
    )
    request.close()
    return conversation


def _strings(holder: Fields, name: str) -> tuple[str, ...]:
    found: list[str] | None = holder.take(name, STRS)
    return tuple(found or ())


def _user(request: Fields, hints: list[str]) -> str:
    metadata = request.object("metadata")
    if metadata is None:
        return ""
    user = metadata.take("user_id", STR)
    hints += [metadata.path(name) for name in metadata.names()]
    return user or ""


def _system(request: Fields, hints: list[str]) -> tuple[Text, ...]:
    content = request.content("system")
    if content is None:
        return ()
    found = texts(content, "system")
    hints += [text.at for text in found if text.text.startswith(_BILLING)]
    return tuple(text for text in found if not text.text.startswith(_BILLING))


def _turns(request: Fields, hints: list[str]) -> tuple[Turn, ...]:
    found = []
    messages = request.objects("messages")
    if not messages:
        raise RequestError("`messages` must hold a message", param="messages")
    roles = [message.need("role", STR) for message in messages]
    last_of_user = max((index for index, role in enumerate(roles) if role == "user"), default=-1)
    for index, (message, role) in enumerate(zip(messages, roles, strict=True)):
        at = message.path("content")
        if role == "system":
            is_over = _is_for_a_turn(message) and index < last_of_user
            hints += message.drop("output_config")
            content = message.content("content")
            if content is not None and not is_over:
                found.append(Turn(role="system", parts=texts(content, at), at=message.at))
        elif role in ("user", "assistant"):
            content = message.content("content")
            if content is None:
                raise RequestError(f"`{at}` is missing", param=at)
            of_turn, left = parts(content, at)
            hints += left
            if of_turn or not content:
                found.append(Turn(role="user" if role == "user" else "assistant", parts=of_turn, at=message.at))
        else:
            raise message.refuse("role", f"a message of the role {role[:64]!r} cannot be carried")
        message.close()
    return tuple(found)


def _is_for_a_turn(message: Fields) -> bool:
    """True for a system message that counts only until the user speaks again."""
    until = message.take("clear_at", STR)
    if until not in (None, "never", "next_user_message"):
        raise message.refuse("clear_at", f"{until[:64]!r} cannot be carried")
    return until == "next_user_message"


# -- tools -------------------------------------------------------------------------------------------------------------


def _tools(request: Fields, hints: list[str]) -> tuple[Tool, ...]:
    found = []
    for item in request.objects("tools"):
        kind = item.take("type", STR) or "custom"
        if kind.startswith("tool_search_tool_"):
            hints.append(item.at)
        elif kind == "custom":
            found.append(_tool(item, hints))
        else:
            raise UntranslatableError(
                f"`{item.at}`: the tool {kind[:64]!r} is Anthropic's own; the services of this model do not have it",
                param=item.at,
            )
    return tuple(found)


def _tool(item: Fields, hints: list[str]) -> Tool:
    # Each of Claude Code's many tools may have these; one name for all of them is enough.
    hints += [f"tools[].{name}" for name in ("eager_input_streaming", "defer_loading") if item.flag(name)]
    callers = _strings(item, "allowed_callers")
    if callers and "direct" not in callers:
        raise item.refuse("allowed_callers", "tools that only code on Anthropic's servers may call cannot be carried")
    if callers and callers != ("direct",):
        hints.append("tools[].allowed_callers")
    schema = item.take("input_schema", RAW)
    if schema is not None:
        read(OBJECT, schema, item.path("input_schema"))
    tool = Tool(
        name=item.need("name", STR),
        description=_description(item),
        schema=NO_SCHEMA if schema is None else msgspec.Raw(bytes(schema)),
        is_strict=item.flag("strict"),
        cache=cache(item),
        at=item.at,
    )
    item.close()
    return tool


def _description(item: Fields) -> str:
    """What a tool is for; examples of its input, which no other API has a place for, end it."""
    description = item.take("description", STR) or ""
    examples = item.take("input_examples", RAWS)
    if not examples:
        return description
    told = "\n".join(["Examples of its input:", *(bytes(example).decode() for example in examples)])
    return f"{description}\n\n{told}" if description else told


def _choice(request: Fields) -> tuple[Choice | None, bool | None]:
    choice = request.object("tool_choice")
    if choice is None:
        return None, None
    is_parallel = False if choice.flag("disable_parallel_tool_use") else None
    kind = choice.need("type", STR)
    match kind:
        case "auto" | "any" | "none":
            found = Choice(mode=kind)
        case "tool":
            found = Choice(mode="named", name=choice.need("name", STR))
        case _:
            raise choice.refuse("type", f"{kind[:64]!r} cannot be carried")
    choice.close()
    return found, is_parallel


# -- how the model is to think, and to answer --------------------------------------------------------------------------


def _effort(output: Fields | None) -> Effort | None:
    effort = output.take("effort", STR) if output is not None else None
    if output is None or effort is None:
        return None
    if effort not in _EFFORTS:
        raise output.refuse("effort", f"{effort[:64]!r} cannot be carried")
    return _EFFORTS[effort]


def _reasoning(request: Fields, effort: Effort | None, hints: list[str]) -> Reasoning | None:
    thinking = request.object("thinking")
    if thinking is None:
        return None if effort is None else Reasoning(effort=effort, at="output_config.effort")
    kind = thinking.need("type", STR)
    display = thinking.take("display", STR)
    is_shown = None if display is None else display != "omitted"
    budget = thinking.take("budget_tokens", INT)
    thinking.close()
    match kind:
        case "enabled" if effort is not None:
            hints.append("thinking.budget_tokens")
            return Reasoning(effort=effort, is_shown=is_shown, at="output_config.effort")
        case "enabled":
            if budget is None:
                raise RequestError("`thinking.budget_tokens` is missing", param="thinking.budget_tokens")
            return Reasoning(budget_tokens=budget, is_shown=is_shown, at="thinking")
        case "adaptive":
            at = "thinking" if effort is None else "output_config.effort"
            return Reasoning(effort=effort, is_adaptive=True, is_shown=is_shown, at=at)
        case "disabled" | "between_tools":
            if effort is not None:
                hints.append("output_config.effort")
            return Reasoning(effort="none", at="thinking")
        case _:
            raise thinking.refuse("type", f"{kind[:64]!r} cannot be carried")


def _format(holder: Fields | None, name: str) -> Format | None:
    found = holder.object(name) if holder is not None else None
    if found is None:
        return None
    kind = found.need("type", STR)
    if kind != "json_schema":
        raise found.refuse("type", f"{kind[:64]!r} cannot be carried")
    schema = found.need("schema", RAW)
    read(ANY, schema, found.path("schema"))
    name_ = found.take("name", STR) or ""
    found.close()
    return Format(schema=msgspec.Raw(bytes(schema)), name=name_, at=found.at)
