"""Conversations, written for Google."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from balancer.translation.conversation import (
    Call,
    Choice,
    Citation,
    Conversation,
    Effort,
    Format,
    Media,
    Part,
    Reasoning,
    Refusal,
    Result,
    Target,
    Text,
    Thinking,
    Tool,
    Turn,
    UntranslatableError,
)
from balancer.translation.google.writing import write_request

GEMINI_3 = Target(model="gemini-3.5-flash", vendor="google")
GEMINI_2 = Target(model="gemini-2.5-flash", vendor="google")
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = Tool(name="weather", description="Tells it", schema=msgspec.Raw(msgspec.json.encode(SCHEMA)), at="tools[0]")
ASKED = Turn(role="user", parts=(Text(text="hi"),))
HI = {"role": "user", "parts": [{"text": "hi"}]}
CALL = Call(id="c1", name="weather", arguments='{"city":"Bonn"}')


def written(*turns: Turn, target: Target = GEMINI_3, **fields: Any) -> Any:
    return msgspec.json.decode(write_request(said(*turns, **fields), target).body)


def said(*turns: Turn, **fields: Any) -> Conversation:
    return Conversation(model="m", turns=turns or (ASKED,), **fields)


def left_out(*turns: Turn, target: Target = GEMINI_3, **fields: Any) -> tuple[str, ...]:
    return write_request(said(*turns, **fields), target).left_out


def refused(*turns: Turn, target: Target = GEMINI_3, **fields: Any) -> str | None:
    with pytest.raises(UntranslatableError) as caught:
        write_request(said(*turns, **fields), target)
    return caught.value.param


def user(*parts: Part) -> Turn:
    return Turn(role="user", parts=parts)


def model(*parts: Part) -> Turn:
    return Turn(role="assistant", parts=parts)


# -- what is said ------------------------------------------------------------------------------------------------------


def test_turns_of_one_side_are_joined_and_empty_texts_left_out() -> None:
    assert written(
        user(Text(text="a"), Text(text="")),
        Turn(role="system", parts=(Text(text="b"),)),
        model(Text(text="c"), Refusal(text="d")),
        system=(Text(text="s"), Text(text="t")),
    ) == {
        "systemInstruction": {"parts": [{"text": "s"}, {"text": "t"}]},
        "contents": [
            {"role": "user", "parts": [{"text": "a"}, {"text": "<system>\nb\n</system>"}]},
            {"role": "model", "parts": [{"text": "c"}, {"text": "d"}]},
            {"role": "user", "parts": [{"text": "(Go on.)"}]},
        ],
    }


@pytest.mark.parametrize("turns", [(user(Text(text="")),), (model(Text(text="a")),)])
def test_the_user_begins(turns: tuple[Turn, ...]) -> None:
    assert written(*turns)["contents"][0] == {"role": "user", "parts": [{"text": "(The conversation begins.)"}]}


@pytest.mark.parametrize(
    ("media", "part"),
    [
        (
            Media(kind="image", media_type="image/jpg", data="AA=="),
            {"inlineData": {"mimeType": "image/jpeg", "data": "AA=="}},
        ),
        (Media(kind="image", data="iVBORw0KGgoA"), {"inlineData": {"mimeType": "image/png", "data": "iVBORw0KGgoA"}}),
        (
            Media(kind="image", url="https://x.test/a.PNG?x=1"),
            {"fileData": {"mimeType": "image/png", "fileUri": "https://x.test/a.PNG?x=1"}},
        ),
        (
            Media(kind="document", url="gs://b/a"),
            {"fileData": {"mimeType": "application/pdf", "fileUri": "gs://b/a"}},
        ),
        (Media(kind="document", data="JVBERi0="), {"inlineData": {"mimeType": "application/pdf", "data": "JVBERi0="}}),
        (Media(kind="document", media_type="text/plain", data="aGk=", title="T"), {"text": "T\n\nhi"}),
        (Media(kind="document", text="hi", title="T", context="C"), {"text": "T\nC\n\nhi"}),
        (
            Media(kind="audio", media_type="audio/wav", data="AA=="),
            {"inlineData": {"mimeType": "audio/wav", "data": "AA=="}},
        ),
    ],
)
def test_media_are_sent_as_data_or_as_where_they_are(media: Media, part: dict[str, Any]) -> None:
    assert written(user(media))["contents"][0]["parts"] == [part]


@pytest.mark.parametrize(
    ("media", "path"),
    [
        (Media(kind="image", url="file:///x", at="m[0]"), "m[0]"),
        (Media(kind="document", media_type="text/plain", data="/w==", at="m[0]"), "m[0]"),
        (Media(kind="document", text="x", wants_citations=True, at="m[0]"), "m[0].citations"),
    ],
)
def test_media_that_google_does_not_take_are_refused_by_their_path(media: Media, path: str) -> None:
    assert refused(user(media)) == path


def test_what_only_another_vendor_knows_is_named() -> None:
    assert left_out(
        user(Text(text="a", cache="5m", at="t"), Media(kind="image", data="/9j/", detail="high", cache="1h", at="i")),
        model(Text(text="b", citations=(Citation(url="u"),), at="c"), Thinking(text="x", vendor="anthropic", at="th")),
        system=(Text(text="s", cache="5m", at="sys"),),
        tools=(WEATHER,),
        user="u1",
        is_parallel=False,
        hints=("store",),
        fields={"is_parallel": "parallel"},
        seed=2**40,
    ) == (
        "store",
        "t.cache_control",
        "i.cache_control",
        "i.detail",
        "c.citations",
        "th",
        "sys.cache_control",
        "parallel",
        "seed",
        "user",
    )


# -- tools -------------------------------------------------------------------------------------------------------------


def test_a_tool_is_a_declaration_with_its_schema_as_it_is() -> None:
    tools = (WEATHER, Tool(name="now"), Tool(name="patch", kind="custom", grammar=msgspec.Raw(b'{"a":1}')))

    assert written(tools=tools)["tools"] == [
        {
            "functionDeclarations": [
                {"name": "weather", "description": "Tells it", "parametersJsonSchema": SCHEMA},
                {"name": "now"},
                {
                    "name": "patch",
                    "description": 'The input must be of this grammar: {"a":1}',
                    "parametersJsonSchema": {
                        "type": "object",
                        "properties": {"input": {"type": "string"}},
                        "required": ["input"],
                        "additionalProperties": False,
                    },
                },
            ]
        }
    ]


@pytest.mark.parametrize(
    ("choice", "calling"),
    [
        (Choice(mode="auto"), None),
        (Choice(mode="none"), {"mode": "NONE"}),
        (Choice(mode="any"), {"mode": "ANY"}),
        (Choice(mode="any", among=("weather",)), {"mode": "ANY", "allowedFunctionNames": ["weather"]}),
        (Choice(mode="auto", among=("weather",)), {"mode": "VALIDATED", "allowedFunctionNames": ["weather"]}),
        (Choice(mode="named", name="weather"), {"mode": "ANY", "allowedFunctionNames": ["weather"]}),
    ],
)
def test_a_choice_is_a_mode(choice: Choice, calling: dict[str, Any] | None) -> None:
    config = written(tools=(WEATHER,), choice=choice).get("toolConfig")

    assert config == (None if calling is None else {"functionCallingConfig": calling})
    assert "toolConfig" not in written(choice=choice)


def test_strict_tools_are_held_to_their_schemas_where_the_model_can() -> None:
    strict = msgspec.structs.replace(WEATHER, is_strict=True)
    older = Target(model="gemini-2.0-flash", vendor="google")

    assert written(tools=(strict,))["toolConfig"] == {"functionCallingConfig": {"mode": "VALIDATED"}}
    assert left_out(tools=(strict,)) == ()
    assert "toolConfig" not in written(tools=(strict,), target=older)
    assert left_out(tools=(strict,), target=older) == ("tools[0].strict",)


@pytest.mark.parametrize("name", ["", "2nd", "a b", "ä", "x" * 129])
def test_a_name_that_google_refuses_is_refused_by_its_path(name: str) -> None:
    assert refused(tools=(Tool(name=name, at="tools[0].name"),)) == "tools[0].name"


def test_results_stand_first_in_the_order_of_their_calls() -> None:
    other = Call(id="c2", name="weather", arguments='{"city":"Ulm"}')
    turns = (
        ASKED,
        model(CALL, other),
        user(
            Text(text="go on"),
            Result(call_id="c2", content=(Text(text='{"degrees":7}'),)),
            Result(call_id="c1", content=(Text(text="gone"),), is_error=True),
        ),
    )

    assert written(*turns, target=GEMINI_2)["contents"] == [
        HI,
        {
            "role": "model",
            "parts": [
                {"functionCall": {"name": "weather", "args": {"city": "Bonn"}}},
                {"functionCall": {"name": "weather", "args": {"city": "Ulm"}}},
            ],
        },
        {
            "role": "user",
            "parts": [
                {"functionResponse": {"name": "weather", "response": {"error": "gone"}}},
                {"functionResponse": {"name": "weather", "response": {"degrees": 7}}},
                {"text": "go on"},
            ],
        },
    ]
    of_3 = written(*turns)["contents"]
    assert [part["functionCall"]["id"] for part in of_3[1]["parts"]] == ["c1", "c2"]
    assert [part["functionResponse"]["id"] for part in of_3[2]["parts"][:2]] == ["c1", "c2"]


@pytest.mark.parametrize(
    ("text", "response"),
    [
        ("", {"result": ""}),
        ("7", {"result": "7"}),
        ("[1]", {"result": "[1]"}),
        ("{no", {"result": "{no"}),
        ("{}", {}),
        ('{"a":"\\ud83d"}', {"a": "\ufffd"}),
    ],
)
def test_a_result_is_an_object(text: str, response: dict[str, Any]) -> None:
    contents = written(ASKED, model(CALL), user(Result(call_id="c1", content=(Text(text=text),))))["contents"]

    assert contents[2]["parts"][0]["functionResponse"]["response"] == response


def test_pictures_of_a_result_are_within_it_or_behind_it() -> None:
    result = Result(call_id="c1", content=(Text(text="seen"), Media(kind="image", data="/9j/")))
    picture = {"inlineData": {"mimeType": "image/jpeg", "data": "/9j/"}}

    [within] = written(ASKED, model(CALL), user(result))["contents"][2]["parts"]
    assert within["functionResponse"]["parts"] == [picture]
    assert written(ASKED, model(CALL), user(result), target=GEMINI_2)["contents"][2]["parts"] == [
        {"functionResponse": {"name": "weather", "response": {"result": "seen"}}},
        {"text": "From the result of weather:"},
        picture,
    ]


def test_a_text_document_of_a_result_is_part_of_its_text() -> None:
    document = Media(kind="document", media_type="text/plain", text="Once.", title="T")
    result = Result(call_id="c1", content=(Text(text="seen"), document))

    [part] = written(ASKED, model(CALL), user(result))["contents"][2]["parts"]
    assert part["functionResponse"]["response"] == {"result": "seen\nT\n\nOnce."}


def test_results_of_ids_that_come_again_are_of_the_last_calls() -> None:
    """By their first calls' order a result stood for the other call, on models whose calls have no ids."""
    calls = [Call(id=id_, name=f"f{id_}", arguments="{}") for id_ in "ab"]
    results = [Result(call_id=id_, content=(Text(text=id_),)) for id_ in "ab"]

    contents = written(ASKED, model(*calls), user(*results), model(*reversed(calls)), user(*results), target=GEMINI_2)[
        "contents"
    ]

    assert [part["functionResponse"]["name"] for part in contents[4]["parts"]] == ["fb", "fa"]


def test_a_thought_that_led_to_nothing_is_left_out() -> None:
    turns = (ASKED, model(Thinking(text="hm", vendor="google", at="th")), ASKED)

    assert written(*turns)["contents"] == [{"role": "user", "parts": [*HI["parts"], *HI["parts"]]}]
    assert left_out(*turns) == ("th",)


def test_a_model_that_does_not_think_gets_no_thoughts() -> None:
    turns = (ASKED, model(Thinking(text="hm", signature="UzE=", vendor="google", at="th"), Text(text="a")))
    older = Target(model="gemini-2.0-flash", vendor="google")

    assert written(*turns, target=older)["contents"][1]["parts"] == [{"text": "a"}]
    assert left_out(*turns, target=older) == ("th",)


def test_models_that_paint_are_not_told_how_much_to_think() -> None:
    painter = Target(model="gemini-2.5-flash-image", vendor="google")
    reasoning = Reasoning(effort="high", at="reasoning_effort")

    assert "generationConfig" not in written(target=painter, reasoning=reasoning)
    assert left_out(target=painter, reasoning=reasoning) == ("reasoning_effort",)


def test_a_schema_names_its_type() -> None:
    tool = Tool(name="f", schema=msgspec.Raw(b'{"properties":{}}'))

    [declared] = written(tools=(tool,))["tools"][0]["functionDeclarations"]
    assert declared["parametersJsonSchema"] == {"type": "object", "properties": {}}
    assert refused(tools=(Tool(name="f", schema=msgspec.Raw(b"[]"), at="tools[0]"),)) == "tools[0]"


def test_an_empty_stop_sequence_is_none() -> None:
    assert written(stop=("", "a"))["generationConfig"] == {"stopSequences": ["a"]}
    assert "generationConfig" not in written(stop=("",))


def test_a_result_that_nobody_asked_for_is_refused() -> None:
    assert refused(user(Result(call_id="c9", at="messages[0]"))) == "messages[0]"


@pytest.mark.parametrize(
    ("call", "args"),
    [
        (Call(id="c", name="f"), {}),
        (Call(id="c", name="f", arguments="{}"), {}),
        (Call(id="c", name="f", arguments='{"a":'), {"input": '{"a":'}),
        (Call(id="c", name="f", arguments='{"a":"\\ud83d"}'), {"a": "\ufffd"}),
        (Call(id="c", name="f", arguments="{}", kind="custom"), {"input": "{}"}),
    ],
)
def test_arguments_are_an_object(call: Call, args: dict[str, Any]) -> None:
    assert written(ASKED, model(call))["contents"][1]["parts"][0]["functionCall"]["args"] == args


# -- thoughts ----------------------------------------------------------------------------------------------------------


def thought(signature: str = "", text: str = "") -> Thinking:
    return Thinking(text=text, signature=signature, vendor="google", at="th")


@pytest.mark.parametrize(
    ("parts", "sent"),
    [
        (
            (thought("0:UzE=", "hm"), Text(text="a"), CALL),
            [
                {"text": "hm", "thought": True},
                {"text": "a"},
                {"functionCall": {}, "thoughtSignature": "UzE="},
            ],
        ),
        (
            (thought("UzE="), thought("1:UzI="), Text(text="a"), CALL, CALL),
            [
                {"text": "a", "thoughtSignature": "UzE="},
                {"functionCall": {}, "thoughtSignature": "skip_thought_signature_validator"},
                {"functionCall": {}, "thoughtSignature": "UzI="},
            ],
        ),
        ((CALL,), [{"functionCall": {}, "thoughtSignature": "skip_thought_signature_validator"}]),
        ((Text(text="a"), thought("UzE=")), [{"text": "a"}, {"text": "", "thoughtSignature": "UzE="}]),
        (
            (thought("0:UzE="), CALL, CALL),
            [{"functionCall": {}, "thoughtSignature": "UzE="}, {"functionCall": {}}],
        ),
        ((thought("7:UzE="), Text(text="a")), [{"text": "a"}]),
    ],
)
def test_a_signature_stands_on_the_call_or_the_text_that_it_came_with(parts: tuple[Part, ...], sent: list[Any]) -> None:
    found = written(ASKED, model(*parts))["contents"][1]["parts"]

    assert [part | {"functionCall": {}} if "functionCall" in part else part for part in found] == sent


def test_a_signature_of_two_that_have_one_place_is_named() -> None:
    turns = (ASKED, model(thought("UzE="), thought("UzI="), Text(text="a")))

    assert written(*turns)["contents"][1]["parts"] == [{"text": "a", "thoughtSignature": "UzI="}]
    assert left_out(*turns) == ("th",)


def test_calls_are_counted_from_the_turn_in_which_their_signature_is() -> None:
    contents = written(
        ASKED, model(thought("0:UzE=")), model(CALL), model(thought("0:UzI=")), model(Text(text="a")), model(CALL)
    )["contents"]

    assert [part.get("thoughtSignature") for part in contents[1]["parts"]] == ["UzE=", None, "UzI="]


def test_a_call_of_another_vendor_needs_no_signature_before_gemini_3() -> None:
    contents = written(ASKED, model(Thinking(text="x", signature="A", vendor="anthropic"), CALL), target=GEMINI_2)

    assert contents["contents"][1]["parts"] == [{"functionCall": {"name": "weather", "args": {"city": "Bonn"}}}]


@pytest.mark.parametrize(
    ("name", "reasoning", "thinking", "names"),
    [
        ("gemini-2.5-flash", Reasoning(effort="none"), {"thinkingBudget": 0}, ()),
        ("gemini-2.5-pro", Reasoning(effort="none"), {"thinkingBudget": 128}, ("reasoning_effort",)),
        ("gemini-2.5-pro", Reasoning(effort="max"), {"includeThoughts": True, "thinkingBudget": 32768}, ()),
        ("gemini-2.5-flash", Reasoning(effort="low"), {"includeThoughts": True, "thinkingBudget": 2048}, ()),
        (
            "gemini-2.5-flash",
            Reasoning(budget_tokens=99999, is_shown=False),
            {"thinkingBudget": 24576},
            (),
        ),
        ("gemini-2.5-flash", Reasoning(is_adaptive=True), {"includeThoughts": True, "thinkingBudget": -1}, ()),
        ("gemini-2.5-flash", Reasoning(is_shown=True), {"includeThoughts": True}, ()),
        ("gemini-3.5-flash", Reasoning(effort="none"), {"thinkingLevel": "MINIMAL"}, ("reasoning_effort",)),
        ("gemini-3.8-flash", Reasoning(effort="minimal"), {"includeThoughts": True, "thinkingLevel": "LOW"}, ()),
        ("gemini-3-pro-preview", Reasoning(effort="medium"), {"includeThoughts": True, "thinkingLevel": "HIGH"}, ()),
        ("gemini-3.1-pro", Reasoning(effort="medium"), {"includeThoughts": True, "thinkingLevel": "MEDIUM"}, ()),
        ("gemini-3.1-pro", Reasoning(budget_tokens=9000), {"includeThoughts": True, "thinkingLevel": "HIGH"}, ()),
        ("gemini-flash-latest", Reasoning(effort="max"), {"includeThoughts": True, "thinkingLevel": "HIGH"}, ()),
        ("gemini-3-pro", Reasoning(is_adaptive=True), {"includeThoughts": True}, ()),
        ("gemini-2.0-flash", Reasoning(effort="low"), None, ("reasoning_effort",)),
        ("gemma-3-27b-it", Reasoning(effort="none"), None, ()),
    ],
)
def test_an_effort_is_what_the_model_knows(
    name: str, reasoning: Reasoning, thinking: dict[str, Any] | None, names: tuple[str, ...]
) -> None:
    target = Target(model=name, vendor="google")

    assert written(reasoning=reasoning, target=target).get("generationConfig", {}).get("thinkingConfig") == thinking
    assert left_out(reasoning=reasoning, target=target) == names


@pytest.mark.parametrize("effort", ["none", "minimal", "low", "medium", "high", "xhigh", "max"])
@pytest.mark.parametrize("name", ["gemini-2.5-flash-lite", "gemini-2.5-pro", "gemini-3-pro", "gemini-4-flash"])
def test_every_effort_is_written_for_every_model(name: str, effort: Effort) -> None:
    config = written(reasoning=Reasoning(effort=effort), target=Target(model=name, vendor="google"))

    assert len(config["generationConfig"]["thinkingConfig"].keys() & {"thinkingLevel", "thinkingBudget"}) == 1


# -- how it answers ----------------------------------------------------------------------------------------------------


def test_sampling_is_carried() -> None:
    assert written(
        max_tokens=9,
        temperature=1.5,
        top_p=0.5,
        top_k=3,
        seed=7,
        presence_penalty=0.0,
        frequency_penalty=0.5,
        stop=("a", "b"),
    )["generationConfig"] == {
        "maxOutputTokens": 9,
        "temperature": 1.5,
        "topP": 0.5,
        "topK": 3,
        "seed": 7,
        "frequencyPenalty": 0.5,
        "stopSequences": ["a", "b"],
    }


def test_more_stop_sequences_than_google_takes_are_refused() -> None:
    assert refused(stop=tuple("abcdef"), fields={"stop": "stop_sequences"}) == "stop_sequences"


def test_a_form_is_asked_for_or_told() -> None:
    format_ = Format(schema=msgspec.Raw(msgspec.json.encode(SCHEMA)))

    assert written(format=format_)["generationConfig"] == {
        "responseMimeType": "application/json",
        "responseJsonSchema": SCHEMA,
    }
    assert written(format=Format())["generationConfig"] == {"responseMimeType": "application/json"}
    assert "responseMimeType" in written(format=format_, tools=(WEATHER,))["generationConfig"]
    # Before Gemini 3 a request with tools is refused with a form beside them.
    told = written(format=format_, tools=(WEATHER,), target=GEMINI_2)
    assert "generationConfig" not in told
    assert '"city"' in told["systemInstruction"]["parts"][0]["text"]
    assert left_out(format=format_, tools=(WEATHER,), target=GEMINI_2) == ("response_format.strict",)
