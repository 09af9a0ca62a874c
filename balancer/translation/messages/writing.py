"""A conversation, as a request to Anthropic or to a service that speaks its API."""

from __future__ import annotations

import msgspec

from balancer import lenient
from balancer.translation.conversation import (
    Conversation,
    Format,
    Reasoning,
    Target,
    Tool,
    UntranslatableError,
    Written,
)
from balancer.translation.messages.models import Traits, effort_of, traits
from balancer.translation.messages.schemas import held
from balancer.translation.messages.turns import Block, Turns, cache_control, name, texts

_OBJECT = msgspec.json.Decoder(dict[str, msgspec.Raw])
_ENCODER = msgspec.json.Encoder()
_LONGEST_USER = 256
_LEAST_ANSWER = 1024
_CUSTOM_SCHEMA = msgspec.Raw(b'{"type":"object","properties":{"input":{"type":"string"}},"required":["input"]}')
_BINDING_BETA = "thinking-binding-controls-2026-08-01"
_ANY_OBJECT = "Answer with one JSON object and nothing else."
_OBJECT_OF_SCHEMA = "Answer with one JSON value that this JSON Schema describes, and nothing else:"


def write_request(conversation: Conversation, target: Target) -> Written:
    """The request, and what was left out of it.

    Raises UntranslatableError for what Anthropic cannot do, with the client's path.
    """
    return _Request(conversation, target).written()


class _Request:
    def __init__(self, conversation: Conversation, target: Target) -> None:
        self._asked = conversation
        self._target = target
        self._traits: Traits = traits(target.model)
        self._left_out = list(conversation.hints)
        self._body: dict[str, object] = {"model": target.model}

    def written(self) -> Written:
        asked = self._asked
        takes = self._traits
        is_off = asked.reasoning is not None and asked.reasoning.effort == "none" and takes.off is not None
        turns = Turns(
            self._target.vendor,
            takes_thoughts=not (takes.binds_thoughts and is_off),
            takes_unsigned=not takes.is_claude,
        )
        turns.write(asked.turns)
        self._left_out += turns.left_out
        thinks = self._write_reasoning(turns)
        if turns.ends_with_assistant():
            if takes.continues and not thinks:
                turns.prefill()
            else:
                turns.go_on()
        betas = self._loosen() if turns.has_thoughts and takes.binds_thoughts else ()
        self._write_system()
        self._body["messages"] = [{"role": role, "content": blocks} for role, blocks in turns.messages]
        self._write_tools()
        self._write_sampling(thinks=thinks)
        self._write_stop()
        if asked.user:
            if len(asked.user) > _LONGEST_USER:
                self._leave_out("user")
            else:
                self._body["metadata"] = {"user_id": asked.user}
        if asked.stream:
            self._body["stream"] = True
        body = _ENCODER.encode(self._body)
        return Written(body=body, left_out=tuple(dict.fromkeys(self._left_out)), betas=betas)

    def _leave_out(self, field: str) -> None:
        self._left_out.append(self._asked.field(field))

    # -- what is said --------------------------------------------------------------------------------------------------

    def _write_system(self) -> None:
        blocks = texts(self._asked.system)
        format_ = self._asked.format
        if format_ is not None:
            instruction = self._write_format(format_)
            if instruction:
                blocks.append({"type": "text", "text": instruction})
        if blocks:
            self._body["system"] = blocks

    def _write_format(self, format_: Format) -> str:
        """Asks for an answer of this form; what a model does not know by itself, it is told: the text comes back."""
        if format_.schema is None:
            return _ANY_OBJECT
        schema = held(format_.schema) if self._traits.has_schemas else None
        if schema is not None:
            if not schema.is_whole:
                self._left_out.append(f"{format_.at}.schema")
            self._output()["format"] = {
                "type": "json_schema",
                "schema": format_.schema if schema.is_same else schema.schema,
            }
            return ""
        if format_.is_strict:
            self._left_out.append(f"{format_.at}.strict")
        return f"{_OBJECT_OF_SCHEMA}\n{bytes(format_.schema).decode()}"

    def _output(self) -> dict[str, object]:
        config: dict[str, object] = self._body.setdefault("output_config", {})  # type: ignore[assignment]
        return config

    # -- how much it thinks --------------------------------------------------------------------------------------------

    def _write_reasoning(self, turns: Turns) -> bool:
        """True when the model is to think. Writes `max_tokens`, which thoughts are part of, too."""
        asked = self._asked
        most = asked.max_tokens or self._traits.default_max_tokens
        self._body["max_tokens"] = most
        reasoning = asked.reasoning
        if reasoning is None:
            return False
        if not self._traits.thinks:
            if reasoning.effort != "none":
                self._left_out.append(reasoning.at)
            return False
        if reasoning.effort == "none":
            self._switch_off(reasoning)
            return False
        if not self._traits.thinks_by_budget:
            return self._think_by_effort(reasoning)
        if reasoning.effort is None and reasoning.budget_tokens is None and not reasoning.is_adaptive:
            return False
        if turns.lacks_thoughts() or self._is_forced():
            self._left_out.append(reasoning.at)
            return False
        self._think_by_budget(reasoning, most)
        return True

    def _is_forced(self) -> bool:
        choice = self._asked.choice
        return choice is not None and choice.mode in ("any", "named")

    def _switch_off(self, reasoning: Reasoning) -> None:
        off = self._traits.off
        if off:
            self._body["thinking"] = {"type": off}
        elif off is None:
            self._left_out.append(reasoning.at)
            self._output()["effort"] = "low"

    def _think_by_effort(self, reasoning: Reasoning) -> bool:
        thinking: Block = {"type": "adaptive", "display": "omitted" if reasoning.is_shown is False else "summarized"}
        self._body["thinking"] = thinking
        effort = reasoning.effort
        if effort is None and reasoning.budget_tokens is not None:
            effort = effort_of(reasoning.budget_tokens)
        if effort is not None:
            self._output()["effort"] = self._traits.effort(effort)
        return True

    def _think_by_budget(self, reasoning: Reasoning, most: int) -> None:
        budget = reasoning.budget_tokens or self._traits.budget(reasoning.effort or "medium")
        budget = max(budget, 1024)
        if self._asked.max_tokens is None:
            most += budget
        elif budget >= most:
            most += budget
            self._leave_out("max_tokens")
        if self._traits.is_claude and most > self._traits.most_tokens:
            most = max(self._traits.most_tokens, self._asked.max_tokens or 0)
            if budget > most - _LEAST_ANSWER:
                budget = most - _LEAST_ANSWER
        self._body["max_tokens"] = most
        thinking: Block = {"type": "enabled", "budget_tokens": budget}
        if reasoning.is_shown is False and self._traits.is_claude:
            thinking["display"] = "omitted"
        self._body["thinking"] = thinking

    def _loosen(self) -> tuple[str, ...]:
        """Lets thoughts that do not fit be dropped, where the request would be refused for them.

        The client's API may hold what the model said in another order, or join two texts of it.
        """
        thinking: Block = self._body.setdefault("thinking", {"type": "adaptive"})  # type: ignore[assignment]
        thinking["block_binding"] = {"prefix_mismatch_behavior": "drop_block"}
        return (_BINDING_BETA,)

    # -- tools ---------------------------------------------------------------------------------------------------------

    def _write_tools(self) -> None:
        asked = self._asked
        choice = asked.choice
        tools = asked.tools
        if choice is not None and choice.among:
            tools = tuple(tool for tool in tools if tool.name in choice.among)
        if not tools:
            return
        self._body["tools"] = [self._tool(tool) for tool in tools]
        if choice is None and asked.is_parallel is not False:
            return
        written: Block = {"type": "auto"}
        if choice is not None:
            if self._is_forced() and not self._traits.can_be_forced:
                raise UntranslatableError(
                    f"`{choice.at}`: {self._target.model} cannot be told to call a tool", param=choice.at
                )
            match choice.mode:
                case "named":
                    written = {"type": "tool", "name": choice.name}
                case mode:
                    written = {"type": mode}
        if asked.is_parallel is False and written["type"] != "none":
            written["disable_parallel_tool_use"] = True
        self._body["tool_choice"] = written

    def _tool(self, tool: Tool) -> Block:
        block: Block = {"name": name(tool.name, tool.at)}
        description = tool.description
        if tool.kind == "custom":
            if tool.grammar is not None:
                told = f"The input must be of this grammar: {bytes(tool.grammar).decode()}"
                description = f"{description}\n\n{told}" if description else told
            block["input_schema"] = _CUSTOM_SCHEMA
        else:
            block["input_schema"] = _schema(tool)
            if tool.is_strict:
                schema = held(tool.schema) if self._traits.has_schemas else None
                if schema is not None and schema.is_same:
                    block["strict"] = True
                else:
                    self._left_out.append(f"{tool.at}.strict")
        if description:
            block["description"] = description
        if tool.cache:
            block["cache_control"] = cache_control(tool.cache)
        return block

    # -- sampling ------------------------------------------------------------------------------------------------------

    def _write_sampling(self, *, thinks: bool) -> None:
        asked, takes = self._asked, self._traits
        temperature, top_p, top_k = asked.temperature, asked.top_p, asked.top_k
        if temperature is not None and temperature > 1:
            temperature = 1.0
            self._leave_out("temperature")
        if temperature is not None and temperature != 1 and (thinks or not takes.samples):
            self._leave_out("temperature")
            temperature = None
        if top_p is not None and top_p != 1 and (not takes.samples or (thinks and top_p < 0.95)):
            self._leave_out("top_p")
            top_p = None
        if top_k is not None and (thinks or not takes.samples):
            self._leave_out("top_k")
            top_k = None
        if not takes.samples:
            # What is left asks for what they do anyway, and some refuse even that.
            temperature = top_p = None
        if temperature is not None and top_p is not None and takes.samples_by_one:
            if top_p != 1:
                self._leave_out("top_p")
            top_p = None
        for name_, value in (("temperature", temperature), ("top_p", top_p), ("top_k", top_k)):
            if value is not None:
                self._body[name_] = value
        if asked.seed is not None:
            self._leave_out("seed")
        for name_, penalty in (
            ("presence_penalty", asked.presence_penalty),
            ("frequency_penalty", asked.frequency_penalty),
        ):
            if penalty:
                field = asked.field(name_)
                raise UntranslatableError(f"`{field}`: Anthropic's models know no penalties", param=field)

    def _write_stop(self) -> None:
        stop = self._asked.stop
        if any(not sequence.strip() for sequence in stop):
            field = self._asked.field("stop")
            raise UntranslatableError(f"`{field}`: Anthropic takes no stop sequence of white space only", param=field)
        if stop:
            self._body["stop_sequences"] = stop


def _schema(tool: Tool) -> object:
    """A tool's schema, which must name its type."""
    try:
        schema = lenient.decode(_OBJECT, tool.schema)
    except lenient.UNREADABLE as exc:
        raise UntranslatableError(f"`{tool.at}`: the schema of the tool's input is no object", param=tool.at) from exc
    if "type" in schema:
        return tool.schema
    return {"type": "object", **schema}
