"""A conversation, as a request to Google's generateContent, whole or as a stream: the path tells which."""

from __future__ import annotations

import msgspec

from balancer import lenient
from balancer.translation.chat import inputs
from balancer.translation.conversation import (
    NO_SCHEMA,
    Choice,
    Conversation,
    Format,
    Reasoning,
    Target,
    Tool,
    UntranslatableError,
    Written,
)
from balancer.translation.google.contents import Block, Contents, name, sent
from balancer.translation.google.models import BUDGETS, Traits, effort_of, traits

_OBJECT = msgspec.json.Decoder(dict[str, msgspec.Raw])
_ENCODER = msgspec.json.Encoder()
_MOST_STOPS = 5
_INT32 = 2**31
_ANY_OBJECT = "Answer with one JSON object and nothing else."
_OBJECT_OF_SCHEMA = "Answer with one JSON value that this JSON Schema describes, and nothing else:"


def write_request(conversation: Conversation, target: Target) -> Written:
    """The request, and what was left out of it.

    Raises UntranslatableError for what Google cannot do, with the client's path.
    """
    return _Request(conversation, target).written()


class _Request:
    def __init__(self, conversation: Conversation, target: Target) -> None:
        self._asked = conversation
        self._target = target
        self._traits: Traits = traits(target.model)
        self._left_out = list(conversation.hints)
        self._config: dict[str, object] = {}

    def written(self) -> Written:
        asked = self._asked
        contents = Contents(self._target.vendor, self._traits)
        contents.write(asked.turns)
        self._left_out += contents.left_out
        body: dict[str, object] = {
            "contents": sent(contents.contents),
        }
        tools = self._tools()
        system = self._system(has_tools=bool(tools))
        if system:
            body["systemInstruction"] = {"parts": system}
        if tools:
            body["tools"] = [{"functionDeclarations": tools}]
            calling = self._calling()
            if calling:
                body["toolConfig"] = {"functionCallingConfig": calling}
            if asked.is_parallel is False:
                self._leave_out("is_parallel", "parallel_tool_calls")
        self._write_sampling()
        if asked.reasoning is not None:
            self._write_reasoning(asked.reasoning)
        if asked.user:
            self._leave_out("user")
        if self._config:
            body["generationConfig"] = self._config
        return Written(body=_ENCODER.encode(body), left_out=tuple(dict.fromkeys(self._left_out)))

    def _leave_out(self, field: str, usual: str = "") -> None:
        self._left_out.append(self._asked.fields.get(field, usual or field))

    # -- what is said --------------------------------------------------------------------------------------------------

    def _system(self, *, has_tools: bool) -> list[Block]:
        parts: list[Block] = []
        for text in self._asked.system:
            if text.cache:
                self._left_out.append(f"{text.at}.cache_control")
            if text.text:
                parts.append({"text": text.text})
        format_ = self._asked.format
        if format_ is not None:
            told = self._write_format(format_, has_tools=has_tools)
            if told:
                parts.append({"text": told})
        return parts

    def _write_format(self, format_: Format, *, has_tools: bool) -> str:
        """Asks for an answer of this form; what a model refuses to be held to, it is told: the text comes back."""
        if has_tools and not self._traits.calls_and_formats:
            if format_.schema is None:
                return _ANY_OBJECT
            if format_.is_strict:
                self._left_out.append(f"{format_.at}.strict")
            return f"{_OBJECT_OF_SCHEMA}\n{bytes(format_.schema).decode()}"
        self._config["responseMimeType"] = "application/json"
        if format_.schema is not None:
            self._config["responseJsonSchema"] = format_.schema
        return ""

    # -- tools ---------------------------------------------------------------------------------------------------------

    def _tools(self) -> list[Block]:
        choice, tools = self._asked.choice, self._asked.tools
        if choice is not None and choice.among and not self._traits.validates:
            tools = tuple(tool for tool in tools if tool.name in choice.among)
        return [self._tool(tool) for tool in tools]

    def _tool(self, tool: Tool) -> Block:
        block: Block = {"name": name(tool.name, tool.at)}
        description, schema = tool.description, tool.schema
        if tool.kind == "custom":
            schema = inputs.SCHEMA
            if tool.grammar is not None:
                told = f"The input must be of this grammar: {bytes(tool.grammar).decode()}"
                description = f"{description}\n\n{told}" if description else told
        elif tool.is_strict and not self._traits.validates:
            self._left_out.append(f"{tool.at}.strict")
        if tool.cache:
            self._left_out.append(f"{tool.at}.cache_control")
        if description:
            block["description"] = description
        if schema != NO_SCHEMA:
            block["parametersJsonSchema"] = _schema(schema, tool.at)
        return block

    def _calling(self) -> Block:
        """Which tools may, or must, be called; nothing where the model decides."""
        choice = self._asked.choice or Choice()
        match choice.mode:
            case "none":
                return {"mode": "NONE"}
            case "named":
                return {"mode": "ANY", "allowedFunctionNames": [choice.name]}
            case "any":
                return {"mode": "ANY"} | _allowed(choice)
            case "auto":
                is_strict = any(tool.is_strict for tool in self._asked.tools)
                if self._traits.validates and (is_strict or choice.among):
                    return {"mode": "VALIDATED"} | _allowed(choice)
                return {}

    # -- sampling ------------------------------------------------------------------------------------------------------

    def _write_sampling(self) -> None:
        asked = self._asked
        seed = asked.seed
        if seed is not None and not -_INT32 <= seed < _INT32:
            self._leave_out("seed")
            seed = None
        stop = [sequence for sequence in asked.stop if sequence]
        if len(stop) > _MOST_STOPS:
            field = asked.field("stop")
            raise UntranslatableError(f"`{field}`: Google takes up to {_MOST_STOPS} stop sequences", param=field)
        for name_, value in (
            ("maxOutputTokens", asked.max_tokens),
            ("temperature", asked.temperature),
            ("topP", asked.top_p),
            ("topK", asked.top_k),
            ("seed", seed),
            ("presencePenalty", asked.presence_penalty or None),
            ("frequencyPenalty", asked.frequency_penalty or None),
            ("stopSequences", stop or None),
        ):
            if value is not None:
                self._config[name_] = value

    # -- how much it thinks --------------------------------------------------------------------------------------------

    def _write_reasoning(self, reasoning: Reasoning) -> None:
        kind = self._traits.thinks_by
        if not kind:
            if reasoning.effort != "none":
                self._left_out.append(reasoning.at)
            return
        thinking: Block = {}
        if reasoning.effort == "none":
            if not self._traits.can_stop_thinking:
                self._left_out.append(reasoning.at)
        elif reasoning.is_shown is not False:
            thinking["includeThoughts"] = True
        if kind == "level":
            effort = reasoning.effort
            if effort is None and reasoning.budget_tokens is not None:
                effort = effort_of(reasoning.budget_tokens)
            if effort is not None:
                thinking["thinkingLevel"] = self._traits.level(effort)
        else:
            budget = self._budget(reasoning)
            if budget is not None:
                thinking["thinkingBudget"] = budget
        if thinking:
            self._config["thinkingConfig"] = thinking

    def _budget(self, reasoning: Reasoning) -> int | None:
        """Tokens, -1 for as many as the model likes; None for what it does by itself."""
        least, most = self._traits.budgets
        if reasoning.effort == "none":
            return 0 if self._traits.can_stop_thinking else least
        asked = reasoning.budget_tokens
        if reasoning.effort is not None:
            asked = BUDGETS.get(reasoning.effort, most)
        elif asked is None:
            return -1 if reasoning.is_adaptive else None
        return min(max(asked, least), most)


def _allowed(choice: Choice) -> Block:
    return {"allowedFunctionNames": list(choice.among)} if choice.among else {}


def _schema(schema: msgspec.Raw, at: str) -> object:
    """A tool's schema, which must name its type."""
    try:
        members = lenient.decode(_OBJECT, schema)
    except lenient.UNREADABLE as exc:
        raise UntranslatableError(f"`{at}`: the schema of the tool's input is no object", param=at) from exc
    return schema if "type" in members else {"type": "object", **members}
