"""Gemini's generateContent, as Google's documentation tells it (November 2026).

ai.google.dev/api/generate-content, …/api/tokens, and …/gemini-api/docs: function-calling, thinking, thought-signatures,
structured-output.
"""

from __future__ import annotations

import base64
import hashlib
import re
from typing import Any, Literal, NotRequired, TypedDict

import msgspec

from tests.actors import Received
from tests.vendors.replies import Event, Play, Reply, Say, Think, Tokens, Use, pieces
from tests.vendors.serving import KEY, RefusedError, Vendor
from tests.vendors.shapes import fault

STOPS = {
    "end": "STOP",
    "length": "MAX_TOKENS",
    "tool": "STOP",
    "stop_sequence": "STOP",
    "filtered": "SAFETY",
    "refused": "SAFETY",
}
ERRORS = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    429: "RESOURCE_EXHAUSTED",
    500: "INTERNAL",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}
SKIPPED = "skip_thought_signature_validator"
"""What stands for the signature of a call that another model made (docs/thought-signatures, FAQ)."""
_PATH = re.compile(r"/v1beta/models/([A-Za-z0-9._-]+):(generateContent|streamGenerateContent\?alt=sse|countTokens)")
_NAME = re.compile(r"[a-zA-Z_][a-zA-Z0-9_.:-]{0,63}")
_MOST_STOPS = 5


# -- shapes ------------------------------------------------------------------------------------------------------------


class Blob(TypedDict):
    mimeType: str
    data: str
    displayName: NotRequired[str]


class FileData(TypedDict):
    mimeType: NotRequired[str]
    fileUri: str


class FunctionCall(TypedDict):
    id: NotRequired[str]
    name: str
    args: NotRequired[dict[str, Any]]


class ResponsePart(TypedDict):
    inlineData: Blob


class FunctionResponse(TypedDict):
    id: NotRequired[str]
    name: str
    response: dict[str, Any]
    parts: NotRequired[list[ResponsePart]]


class Part(TypedDict, total=False):
    text: str
    inlineData: Blob
    fileData: FileData
    functionCall: FunctionCall
    functionResponse: FunctionResponse
    thought: bool
    thoughtSignature: str


class Content(TypedDict):
    role: NotRequired[Literal["user", "model"]]
    parts: list[Part]


class FunctionDeclaration(TypedDict):
    name: str
    description: NotRequired[str]
    parameters: NotRequired[dict[str, Any]]
    parametersJsonSchema: NotRequired[Any]


class Tool(TypedDict):
    functionDeclarations: list[FunctionDeclaration]


class FunctionCallingConfig(TypedDict):
    mode: Literal["AUTO", "ANY", "NONE", "VALIDATED"]
    allowedFunctionNames: NotRequired[list[str]]


class ToolConfig(TypedDict):
    functionCallingConfig: FunctionCallingConfig


class ThinkingConfig(TypedDict, total=False):
    includeThoughts: bool
    thinkingBudget: int
    thinkingLevel: Literal["MINIMAL", "LOW", "MEDIUM", "HIGH", "XHIGH", "minimal", "low", "medium", "high", "xhigh"]


class GenerationConfig(TypedDict, total=False):
    stopSequences: list[str]
    responseMimeType: Literal["text/plain", "application/json", "text/x.enum"]
    responseSchema: dict[str, Any]
    responseJsonSchema: Any
    responseModalities: list[Literal["TEXT", "IMAGE", "AUDIO"]]
    candidateCount: int
    maxOutputTokens: int
    temperature: float
    topP: float
    topK: int
    seed: int
    presencePenalty: float
    frequencyPenalty: float
    thinkingConfig: ThinkingConfig


class Body(TypedDict):
    contents: list[Content]
    systemInstruction: NotRequired[Content]
    tools: NotRequired[list[Tool]]
    toolConfig: NotRequired[ToolConfig]
    generationConfig: NotRequired[GenerationConfig]
    safetySettings: NotRequired[list[dict[str, str]]]
    cachedContent: NotRequired[str]


class InnerBody(Body):
    model: str


class CountBody(TypedDict, total=False):
    contents: list[Content]
    generateContentRequest: InnerBody


class Google(Vendor):
    """Gemini. It takes a signature back only where it stood: on that call, or on a text."""

    name = "google"

    def __init__(self, play: Play | None = None) -> None:
        super().__init__(play)
        self.signed: dict[str, str] = {}

    # -- what it refuses -----------------------------------------------------------------------------------------------

    def counts(self, request: Received) -> bool:
        return request.target.endswith(":countTokens")

    def streams_for(self, request: Received, body: Any) -> bool:
        return ":streamGenerateContent" in request.target

    def check(self, request: Received, body: Any) -> None:
        match = _PATH.fullmatch(request.target)
        if request.method != "POST" or not match:
            raise RefusedError(f"Not found: {request.method} {request.target}", 404)
        if request.header("x-goog-api-key") != KEY and request.header("authorization") != f"Bearer {KEY}":
            raise RefusedError("API key not valid. Please pass a valid API key.", 400)
        model = match[1]
        if self.counts(request):
            _require(fault(body, CountBody))
            if "generateContentRequest" not in body:
                _require(_check_contents(body["contents"]))
                return
            body = body["generateContentRequest"]
            if body["model"] != f"models/{model}":
                raise RefusedError("generateContentRequest.model: is not the path's")
        else:
            _require(fault(body, Body))
        tools = body.get("tools", [])
        for found in (
            _check_contents(body["contents"]),
            _check_system(body.get("systemInstruction")),
            _check_tools(tools, body.get("toolConfig")),
            _check_config(body.get("generationConfig") or {}, model, bool(tools)),
            self._check_signatures(body["contents"], is_strict=_is_third(model)),
        ):
            _require(found)

    def _check_signatures(self, contents: list[Any], *, is_strict: bool) -> str:
        turn = max((i for i, content in enumerate(contents) if _is_asked(content)), default=0)
        for i, content in enumerate(contents):
            calls = 0
            for j, part in enumerate(content["parts"]):
                at = f"contents[{i}].parts[{j}]"
                signature = part.get("thoughtSignature")
                if signature not in (None, SKIPPED) and self.signed.get(signature) != _digest(part):
                    return f"{at}: Thought signature is not valid, or not of this part."
                if "functionCall" in part:
                    calls += 1
                    if is_strict and i > turn and calls == 1 and signature is None:
                        name = part["functionCall"]["name"]
                        return f"Function call is missing a thought_signature in functionCall parts: {name}, {at}."
        return ""

    # -- what it says --------------------------------------------------------------------------------------------------

    def _sign(self, part: dict[str, Any]) -> dict[str, Any]:
        signature = base64.b64encode(b"google-%d" % len(self.signed)).decode()
        self.signed[signature] = _digest(part)
        return part | {"thoughtSignature": signature}

    def _parts(self, said: Reply) -> list[dict[str, Any]]:
        """The parts. Gemini 3 signs the first call, or the last text without one; 2.5 what follows a thought."""
        parts: list[dict[str, Any]] = []
        for part in said.parts:
            match part:
                case Think():
                    parts += [{"text": part.text, "thought": True}] if part.text else []
                case Say():
                    parts.append({"text": part.text})
                case Use():
                    parts.append({"functionCall": {"name": part.name, "args": _arguments(part)}})
        calls = [i for i, part in enumerate(parts) if "functionCall" in part]
        texts = [i for i, part in enumerate(parts) if "thought" not in part]
        if not _is_third(self._model):
            thoughts = [i for i, part in enumerate(said.parts) if isinstance(part, Think)]
            signed = texts[:1] if thoughts else []
        else:
            signed = calls[:1] or texts[-1:]
        for i in signed:
            parts[i] = self._sign(parts[i])
        return parts

    def _usage(self, said: Reply, share: float = 1) -> tuple[dict[str, Any], Tokens]:
        """The tokens so far."""
        visible = int((said.output - said.reasoning) * share)
        usage: dict[str, Any] = {"promptTokenCount": said.input}
        if visible:
            usage["candidatesTokenCount"] = visible
        usage["totalTokenCount"] = said.input + visible + said.reasoning
        usage["promptTokensDetails"] = [{"modality": "TEXT", "tokenCount": said.input}]
        if said.cached:
            usage["cachedContentTokenCount"] = said.cached
        if said.reasoning:
            usage["thoughtsTokenCount"] = said.reasoning
        output = visible + said.reasoning
        return usage, Tokens(input=said.input, output=output, cached=said.cached, reasoning=said.reasoning)

    def _answer(self, parts: list[Any], reason: str | None, usage: Any) -> bytes:
        candidate: dict[str, Any] = {"content": {"parts": parts, "role": "model"}}
        if reason:
            candidate["finishReason"] = reason
        candidate["index"] = 0
        answer = {"candidates": [candidate], "usageMetadata": usage, "modelVersion": self._model}
        return msgspec.json.encode(answer | {"responseId": f"resp-{self.number}"})

    @property
    def _model(self) -> str:
        match = _PATH.fullmatch(self.last.target)
        assert match
        return match[1]

    def whole(self, body: Any, said: Reply) -> Event:
        usage, told = self._usage(said)
        return Event(self._answer(self._parts(said), STOPS[said.ending], usage), told)

    def events(self, body: Any, said: Reply) -> list[Event]:
        """The parts, texts in pieces. The signature of a last text comes behind it, with the last event."""
        cut: list[dict[str, Any]] = []
        last: dict[str, Any] = {"text": ""}
        parts = self._parts(said)
        for part in parts:
            if "text" not in part:
                cut.append(part)
                continue
            signature = {name: value for name, value in part.items() if name == "thoughtSignature"}
            if part is parts[-1] and _is_third(self._model):
                last |= signature
                signature = {}
            thought = {name: value for name, value in part.items() if name == "thought"}
            texts = [{"text": text} | thought for text in pieces(part["text"], 12)]
            texts[0] |= signature
            cut += texts
        events = []
        for i, part in enumerate(cut):
            usage, told = self._usage(said, (i + 1) / (len(cut) + 1))
            events.append(Event(_event(self._answer([part], None, usage)), told))
        usage, told = self._usage(said)
        return [*events, Event(_event(self._answer([last], STOPS[said.ending], usage)), told)]

    def counted(self, body: Any) -> bytes:
        inner = body.get("generateContentRequest", body)
        return b'{"totalTokens":%d}' % (100 * len(inner["contents"]))

    def error(self, status: int, message: str) -> bytes:
        return msgspec.json.encode(
            {"error": {"code": status, "message": message, "status": ERRORS.get(status, "UNKNOWN")}}
        )

    def broken(self, message: str) -> bytes:
        return _event(self.error(503, message or "The model is overloaded. Please try again later."))


def _event(data: bytes) -> bytes:
    return b"data: %b\r\n\r\n" % data


def _arguments(use: Use) -> dict[str, Any]:
    return {"input": use.text} if use.text else use.arguments


def _digest(part: dict[str, Any]) -> str:
    """What a signature is bound to: a call's name and arguments; a text may come back joined with more of it."""
    if call := part.get("functionCall"):
        made = msgspec.json.encode([call["name"], call.get("args", {})], order="deterministic")
        return "call " + hashlib.sha256(made).hexdigest()
    return "thought" if part.get("thought") else "text"


# -- rules -------------------------------------------------------------------------------------------------------------


def _require(found: str) -> None:
    if found:
        raise RefusedError(found)


def _is_third(model: str) -> bool:
    """Gemini 3 and later."""
    match = re.match(r"gemini-(\d+)", model)
    return bool(match and int(match[1]) >= 3)


def _is_asked(content: Any) -> bool:
    """The user says something, and does not only give back what tools gave."""
    return content.get("role", "user") == "user" and not any("functionResponse" in part for part in content["parts"])


def _check_contents(contents: list[Any]) -> str:
    if not contents:
        return "contents: contents are required"
    if contents[0].get("role", "user") != "user":
        return "contents[0]: Please ensure that function call turn comes immediately after a user turn"
    if contents[-1].get("role", "user") != "user":
        return "Please ensure that single turn requests end with a user role or the role field is empty."
    wanted: list[tuple[str, str | None]] = []
    before = ""
    for i, content in enumerate(contents):
        at = f"contents[{i}]"
        role = content.get("role", "user")
        if role == before:
            return f"{at}: the roles do not alternate"
        before = role
        if not content["parts"]:
            return f"{at}.parts: contents.parts must not be empty."
        if found := _check_parts(content["parts"], at, role):
            return found
        given = [part["functionResponse"] for part in content["parts"] if "functionResponse" in part]
        if [(part["name"], part.get("id")) for part in given] != wanted:
            return (
                f"{at}: Please ensure that the number of function response parts is equal to the number of function "
                f"call parts of the function call turn, and that they are of the same names: {given} for {wanted}"
            )
        calls = [part["functionCall"] for part in content["parts"] if "functionCall" in part]
        wanted = [(call["name"], call.get("id")) for call in calls]
    return ""


def _check_parts(parts: list[Any], at: str, role: str) -> str:
    for j, part in enumerate(parts):
        kinds = set(part) - {"thought", "thoughtSignature"}
        if len(kinds) != 1:
            return f"{at}.parts[{j}].data: required oneof field 'data' must have one initialized field: {sorted(kinds)}"
        kind = kinds.pop()
        if kind == "functionCall" and role != "model":
            return f"{at}.parts[{j}]: a function call of a user"
        if kind == "functionResponse" and role != "user":
            return f"{at}.parts[{j}]: a function response of a model"
        if kind == "text" and not part["text"] and "thoughtSignature" not in part:
            return f"{at}.parts[{j}]: Unable to submit request because it has an empty text parameter."
        media = [part["inlineData"]] if kind == "inlineData" else []
        if kind == "functionResponse":
            media += (inner["inlineData"] for inner in part[kind].get("parts", ()))
        for blob in media:
            if not re.fullmatch(r"(image|audio|video|text|application)/[\w.+-]+", blob["mimeType"]):
                return f"{at}.parts[{j}].inlineData.mimeType: Unsupported MIME type"
            if not re.fullmatch(r"[A-Za-z0-9+/_-]*={0,2}", blob["data"]):
                return f"{at}.parts[{j}].inlineData.data: Base64 decoding failed"
    return ""


def _check_system(system: Any) -> str:
    if system is None:
        return ""
    if not system["parts"] or any(set(part) != {"text"} or not part["text"] for part in system["parts"]):
        return "systemInstruction: only text, and not empty"
    return ""


def _check_tools(tools: list[Any], config: Any) -> str:
    names: list[str] = []
    for i, tool in enumerate(tools):
        for j, made in enumerate(tool["functionDeclarations"]):
            at = f"tools[{i}].functionDeclarations[{j}]"
            if not _NAME.fullmatch(made["name"]):
                return f"{at}.name: Invalid function name."
            if "parameters" in made and "parametersJsonSchema" in made:
                return f"{at}: parameters and parametersJsonSchema are mutually exclusive"
            if "parameters" in made and {"$schema", "additionalProperties", "$ref", "$defs"} & set(
                str(made).split("'")
            ):
                return f"Invalid JSON payload received. Unknown name at {at}.parameters: Cannot find field."
            names.append(made["name"])
    if len(set(names)) < len(names):
        return "tools: Duplicate function declaration found"
    calling = (config or {}).get("functionCallingConfig")
    if calling:
        allowed = calling.get("allowedFunctionNames")
        if allowed and calling["mode"] not in ("ANY", "VALIDATED"):
            return "allowedFunctionNames: should only be set when mode is ANY or VALIDATED"
        if set(allowed or ()) - set(names):
            return "allowedFunctionNames: are not all declared"
        if calling["mode"] == "ANY" and not names:
            return "Function calling mode is ANY but no function declarations were provided."
    return ""


def _check_config(config: Any, model: str, has_tools: bool) -> str:
    for name, least, most in (
        ("temperature", 0, 2),
        ("topP", 0, 1),
        ("maxOutputTokens", 1, 1 << 20),
        ("topK", 1, 1000),
    ):
        if name in config and not least <= config[name] <= most:
            return f"generationConfig.{name}: out of range"
    if len(config.get("stopSequences", ())) > _MOST_STOPS:
        return "generationConfig.stopSequences: at most 5"
    if config.get("candidateCount", 1) != 1:
        return "Only one candidate can be specified"
    is_json = config.get("responseMimeType") == "application/json"
    if ("responseJsonSchema" in config or "responseSchema" in config) and not is_json:
        return "responseJsonSchema: needs responseMimeType application/json"
    if is_json and has_tools and not _is_third(model):
        return "Function calling with a response mime type: 'application/json' is unsupported"
    thinking = config.get("thinkingConfig") or {}
    if "thinkingBudget" in thinking and "thinkingLevel" in thinking:
        return "You can only set only one of thinking budget and thinking level."
    if "thinkingLevel" in thinking and not _is_third(model):
        return "Thinking level is not supported for this model."
    if "thinkingBudget" in thinking and model.startswith("gemini-2.5-pro") and thinking["thinkingBudget"] == 0:
        return "Budget 0 is invalid. This model only works in thinking mode."
    if thinking and model.startswith(("gemini-1", "gemini-2.0")):
        return "Thinking is not enabled for this model."
    return ""
