"""Reading and editing JSON bodies."""

from __future__ import annotations

import contextlib
import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balancer.bodies import (
    Peek,
    ask_for_usage,
    estimate_tokens,
    peek,
    replace_model,
    replace_string,
    response_id_of_event,
    response_id_of_json,
    values_at,
)
from balancer.errors import RequestError

KEYS = st.sampled_from(["model", "message", "response", "x", 'a"b', "mo\\del", "stream_options", "include_usage", "é"])
TEXTS = st.sampled_from(['"model":"old"', "\\", '\\"', "{[", "}],:", "old", "", "\n\t", "日本", '{"model":"x"}'])
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXTS | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=5),
    max_leaves=20,
)
OBJECTS = st.dictionaries(KEYS, VALUES, max_size=6)
REQUESTS = st.dictionaries(KEYS.filter(lambda key: key != "stream_options"), VALUES, max_size=6)


@st.composite
def bodies(draw: st.DrawFn, objects: st.SearchStrategy[dict[str, Any]] = OBJECTS) -> bytes:
    """An object, spelt one of the ways that a client may spell it."""
    text = json.dumps(draw(objects), ensure_ascii=draw(st.booleans()), indent=draw(st.sampled_from([None, 0, 2])))
    if draw(st.booleans()):
        text = text.replace('"model":', '"mod\\u0065l" \t:')
    return draw(st.sampled_from([b"", b" \n"])) + text.encode() + draw(st.sampled_from([b"", b"\r\n"]))


def with_model(objects: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    """The same with a model, at any place."""
    return st.tuples(objects, st.booleans()).map(
        lambda pair: pair[0] | {"model": "old"} if pair[1] else {"model": "old"} | pair[0] | {"model": "old"}
    )


def renamed(body: bytes, new: str = "new") -> bytes:
    """The body of a request with another model."""
    return replace_model(body, new, peek(body))


def asking(body: bytes) -> bytes:
    """The body of a request that asks for its usage."""
    return ask_for_usage(body, peek(body))


# -- peek --------------------------------------------------------------------------------------------------------------


def test_the_fields_of_a_request_are_read() -> None:
    body = (
        b'{"messages":[{"model":3}],"model":"m","stream":true,"stream_options":{"include_usage":true},"max_tokens":9}'
    )

    request = peek(body)

    assert (request.model, request.stream, request.asks_for_usage, request.most_output) == ("m", True, True, 9)


def test_what_a_client_leaves_out_or_nulls_is_absent() -> None:
    """`"stream": null` is OpenAI's own default, and was once refused."""
    request = peek(b'{"model":"m","stream":null,"stream_options":null,"max_tokens":null}')

    assert (bool(request.stream), request.asks_for_usage, request.most_output) == (False, False, 0)


@pytest.mark.parametrize("odd", [-5, True, "9", 1.5])
def test_an_odd_most_output_is_none(odd: object) -> None:
    assert Peek(model="m", max_tokens=odd).most_output == 0


@pytest.mark.parametrize(
    ("body", "words", "param"),
    [
        (b"", "no valid JSON", None),
        (b"{", "no valid JSON", None),
        (b'{"model":"secret",}', "no valid JSON", None),
        (b'{"model":"secret"} secret', "no valid JSON", None),
        (b'{"model":7,"x":secret}', "no valid JSON", None),
        (b'["secret"]', "must be a JSON object", None),
        (b'"secret"', "must be a JSON object", None),
        (b"null", "must be a JSON object", None),
        (b'{"modell":"secret"}', "`model` is missing", "model"),
        (b'{"x":{"model":"secret"}}', "`model` is missing", "model"),
        (b'{"model":null,"x":"secret"}', "`model` must be a string", "model"),
        (b'{"model":["secret"]}', "`model` must be a string", "model"),
        (b'{"model":"","x":"secret"}', "`model` must not be empty", "model"),
        (b'{"model":"secret","stream":"secret"}', "`stream` must be", "stream"),
        (b'{"model":"secret","stream_options":"secret"}', "`stream_options` must be", "stream_options"),
        (b'{"model":"secret","max_tokens":1e999}', "out of range", None),
        (b'{"model":"secret","stream":1e999}', "out of range", None),
        (b'{"model":"secret\xff"}', "no valid UTF-8", None),
        (b'{"model":"secret","messages":"\xff"}', "no valid UTF-8", None),
        (b'{"model":"secret","messages":"\xc3', "no valid UTF-8", None),
        (b'{"model":"secret","x":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply", None),
        (b'{"model":7,"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply", None),
    ],
)
def test_a_bad_body_is_refused_with_its_reason_and_none_of_its_content(
    body: bytes, words: str, param: str | None
) -> None:
    with pytest.raises(RequestError) as caught:
        peek(body)

    assert words in caught.value.message
    assert "secret" not in caught.value.message
    assert (caught.value.status, caught.value.param) == (400, param)


def test_what_names_a_conversation_is_read() -> None:
    request = peek(b'{"model":"m","metadata":{"x":[1],"user_id":"a"},"prompt_cache_key":"b","user":"c","store":false}')

    assert (request.user_id, request.prompt_cache_key, request.user, request.store) == ("a", "b", "c", False)


@pytest.mark.parametrize("odd", [b"null", b"7", b"1e999", b"true", b'[{"user_id":"x"}]', b'{"user_id":[1e999]}', b"{}"])
def test_a_wrong_type_there_is_absent_and_no_reason_to_refuse(odd: bytes) -> None:
    request = peek(b'{"model":"m","metadata":%b,"prompt_cache_key":%b,"user":%b,"store":%b}' % ((odd,) * 4))

    assert (request.user_id, request.prompt_cache_key, request.user, request.store) == ("", "", "", True)


def test_an_answer_is_stored_unless_the_client_says_no() -> None:
    stores = [
        peek(b'{"model":"m"%b}' % more).store for more in (b"", b',"store":null', b',"store": true ', b',"store":0')
    ]

    assert stores == [True] * 4
    assert not peek(b'{"model":"m","store": false }').store


def test_a_character_across_two_steps_of_the_check_is_valid() -> None:
    start = b'{"model":"m","x":"'
    body = start + b"x" * (2**20 - len(start) - 1) + "é".encode() + b'"}'

    assert peek(body).model == "m"


@pytest.mark.parametrize(
    ("body", "names_one"),
    [
        (b'{"model":"m"}', True),
        (b'{"x":{"model":"n"},"model":"m","y":"\\"model\\":1"}', True),
        (b'{"mod\\u0065l":"m"}', True),
        (b'{"model":"n","model":"m"}', False),
        (b'{"mod\\u0065l":"n","model":"m"}', False),
        (b'{"model":"n","x":1,"\\u006do\\u0064el":"m"}', False),
    ],
)
def test_a_second_model_is_noticed_however_it_is_spelt(body: bytes, names_one: bool) -> None:
    request = peek(body)

    assert (request.model, request.names_one_model) == ("m", names_one)


def test_one_request_says_nothing_about_the_next() -> None:
    with pytest.raises(RequestError):
        peek(b'{"model":"m",')

    assert peek(b'{"model":"m"}').names_one_model


@given(st.binary(max_size=30))
def test_any_bytes_are_read_or_refused(rest: bytes) -> None:
    with contextlib.suppress(RequestError):
        assert peek(b'{"model":"m",' + rest).model


# -- the model ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "edited"),
    [
        (b'{"model":"old"}', b'{"model":"new"}'),
        (b' { "model"\t:\n"old" , "x":1}', b' { "model"\t:\n"new" , "x":1}'),
        (b'{"x":{"model":"old"},"model":"old"}', b'{"x":{"model":"old"},"model":"new"}'),
        (b'{"x":[{"model":"old"}],"model":"old"}', b'{"x":[{"model":"old"}],"model":"new"}'),
        (b'{"x":"\\"model\\":\\"old\\"","model":"old"}', b'{"x":"\\"model\\":\\"old\\"","model":"new"}'),
        (b'{"x":"\\\\","model":"old"}', b'{"x":"\\\\","model":"new"}'),
        (b'{"x":"a \\"model","model":"old"}', b'{"x":"a \\"model","model":"new"}'),
        (b'{"x":"model","model":"old"}', b'{"x":"model","model":"new"}'),
        (b'{"mod\\u0065l":"old","x":"model"}', b'{"mod\\u0065l":"new","x":"model"}'),
        (b'{"mod\\u0065l":"old","x":{"model":"old"}}', b'{"mod\\u0065l":"new","x":{"model":"old"}}'),
        (b'{"model":"a","model":"b"}', b'{"model":"new","model":"new"}'),
        (b'{"model":"q\\"\\\\"}', b'{"model":"new"}'),
        (b'{"model":"old","n":1E+2,"u":"\\u00e9"}', b'{"model":"new","n":1E+2,"u":"\\u00e9"}'),
    ],
)
def test_only_the_top_level_model_changes(body: bytes, edited: bytes) -> None:
    assert renamed(body) == edited


def test_a_new_model_is_spelt_as_json() -> None:
    assert json.loads(renamed(b'{"model":"old"}', 'a"\\é\n')) == {"model": 'a"\\é\n'}


@given(bodies(with_model(REQUESTS)))
def test_replacing_the_model_says_what_setting_it_says(body: bytes) -> None:
    edited = renamed(body)

    assert json.loads(edited) == json.loads(body) | {"model": "new"}
    assert renamed(edited, "old") == body


MESSAGES = b'[{"role":"user","content":"%b"}]' % (rb"a \"model\" or two: \u006dodel, " * 200)
LONG = [
    b'{"model":@,"messages":%b}',
    b'{"messages":%b,"model":@}',
    b'\n{ "temperature" : 0.5 ,\n "stop" : ["a"] , "messages" : %b ,\t"model" : @ } ',
    b'{"a":1,"b":"x\\"","c":null,"messages":%b,"model":@,"tools":[{"model":"old"}]}',
    b'{"tools":%b,"mod\\u0065l":@,"system":"s"}',
    b'{"unknown":%b,"model":@,"x":{"model":"old"}}',
    b'{"unknown":%b,"model":@}',
    b'{"x":{"model":"old"},"messages":%b,"model":@}',
    b'{"system":"' + b"word " * 200 + b'","messages":%b,"model":@}',
    b"{" + b"".join(b'"k%d":%d,' % (i, i) for i in range(100)) + b'"messages":%b,"model":@}',
]
"""Bodies that are long once there is a prompt in them, `@` where their model stands."""


@pytest.mark.parametrize("body", LONG)
def test_a_long_body_changes_in_nothing_but_its_model(body: bytes) -> None:
    body %= MESSAGES

    assert renamed(body.replace(b"@", b'"old"')) == body.replace(b"@", b'"new"')


@pytest.mark.parametrize("body", [b'{"model":@}', *LONG])
def test_a_body_with_the_right_model_alone_is_not_copied(body: bytes) -> None:
    body = body.replace(b"%b", MESSAGES).replace(b"@", b'"old"')

    assert renamed(body, "old") is body


@pytest.mark.parametrize(
    "first", [rb'["x\",\"model\":\"old\""]', b'[{"a":1,"model":"old"}]', b'[],"messages":[1]', b"[1,[2]]", b"12", b"[]"]
)
@pytest.mark.parametrize("last", [b"[1]", b"[12345]", b'["x"]', b"1", b'"x"', b"[]"])
def test_members_that_are_there_twice_lead_to_no_wrong_place(first: bytes, last: bytes) -> None:
    """The decoder tells only of the last of them, and of its length."""
    padding = b'"pad":"%b"' % (b"p q " * 2000)
    for start in (first, last):
        body = b'{"messages":%b,"messages":%b,"model":"old",%b}' % (start, last, padding)

        assert renamed(body) == body.replace(b',"model":"old","pad"', b',"model":"new","pad"')


@pytest.mark.parametrize("padding", [b"", b"p q " * 2000])
@pytest.mark.parametrize("key", [b'"model"', rb'"mod\u0065l"', rb'"\u006d\u006fdel"'])
def test_none_of_several_models_is_passed_on(key: bytes, padding: bytes) -> None:
    """Which of them counts is the upstream's choice: the right one may be the one that it does not take."""
    for models in ((b"other", b"new"), (b"new", b"other"), (b"new", b"new")):
        body = b'{"x":"%b",%b:"%b","y":1,"model":"%b"}' % (padding, key, *models)

        assert renamed(body) == b'{"x":"%b",%b:"new","y":1,"model":"new"}' % (padding, key)


def test_a_body_with_half_an_emoji_changes_in_nothing_but_its_model() -> None:
    body = rb'{"model":"old","messages":[{"content":"\ud83d"}]}'

    assert renamed(body) == body.replace(b"old", b"new")
    assert renamed(body, "old") == body


MEMBERS = st.tuples(
    st.sampled_from(
        ['"model"', '"mod\\u0065l"', '"messages"', '"m\\u0065ssages"', '"tools"', '"x"', '"a \\"model"', '""']
    ),
    VALUES.map(json.dumps) | st.sampled_from(["[1]", "1", "12", '["x\\",\\"model\\":\\"old"]', "1E+2", "{}"]),
)


@given(st.lists(MEMBERS, min_size=1, max_size=8), st.sampled_from([None, 0, -1]), st.sampled_from(["", " ", "\n\t"]))
def test_every_model_changes_and_nothing_else(
    members: list[tuple[str, str]], padded_at: int | None, space: str
) -> None:
    """The whole truth about a body, keys that are repeated and all, is its members in order."""
    members = [(key, '"old"' if json.loads(key) == "model" else value) for key, value in [*members, ('"model"', "")]]
    if padded_at is not None:
        members.insert(padded_at, ('"messages"', json.dumps(["word " * 1000])))
    body = ("{" + ",".join(space + key + space + ":" + space + value for key, value in members) + "}").encode()

    def pairs(text: bytes) -> Any:
        return json.loads(text, object_pairs_hook=list)

    assert pairs(renamed(body)) == [(key, "new" if key == "model" else value) for key, value in pairs(body)]
    assert len(renamed(body)) == len(body)
    assert renamed(body, "old") == body


@pytest.mark.parametrize("path", [("model",), ("message", "model"), ("response", "model"), ("x", "x", "model")])
@given(body=bodies())
def test_replacing_a_string_under_a_path_says_what_setting_it_says(path: tuple[str, ...], body: bytes) -> None:
    expected = json.loads(body)
    holder: Any = expected
    for key in path[:-1]:
        holder = holder.get(key) if isinstance(holder, dict) else None
    if isinstance(holder, dict) and isinstance(holder.get(path[-1]), str):
        holder[path[-1]] = "new"

    assert json.loads(replace_string(body, path, "new")) == expected


@given(bodies())
def test_a_value_is_found_where_it_stands(body: bytes) -> None:
    table = json.loads(body)

    for key in ("model", "x", 'a"b', "mo\\del", "é"):
        found = [json.loads(body[start:end]) for start, end in values_at(body, (key,))]

        assert found == ([table[key]] if key in table else [])


@pytest.mark.parametrize("path", [("a",), ("a", "b"), ("a", "a"), ("b", "a", "b")])
@given(
    table=st.recursive(
        st.sampled_from(["", "{", 1, None]),
        lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("ab"), inner, max_size=2),
        max_leaves=12,
    )
)
def test_a_path_leads_where_looking_it_up_leads(path: tuple[str, ...], table: Any) -> None:
    holder = table
    for key in path:
        holder = holder.get(key, ...) if isinstance(holder, dict) else ...
    body = json.dumps(table).encode()

    assert [json.loads(body[slice(*place)]) for place in values_at(body, path)] == [holder] * (holder is not ...)


def test_a_path_ends_with_its_object() -> None:
    body = b'{"message":{"model":"old"},"x":{"model":"old"},"message":{"x":{"model":"old"},"model":"old"}}'
    edited = b'{"message":{"model":"new"},"x":{"model":"old"},"message":{"x":{"model":"old"},"model":"new"}}'

    assert replace_string(body, ("message", "model"), "new") == edited


def test_a_path_is_not_followed_through_a_list_nor_past_a_scalar() -> None:
    body = b'{"message":[{"model":"old"}],"x":{"message":1,"model":"old","y":{"model":"old"}}}'

    assert replace_string(body, ("message", "model"), "new") == body
    assert replace_string(b'[{"model":"old"}]', ("model",), "new") == b'[{"model":"old"}]'


def test_megabytes_are_edited_without_a_stall() -> None:
    """The generic way once took seconds and a gigabyte for a long prompt with a schema that has a `model`."""
    prompt = {"messages": [{"content": 'a "long"\n word ' * 400_000}], "tools": [{"model": 1}], "model": "old"}
    body = json.dumps(prompt).encode()
    began = time.process_time()

    edited = asking(renamed(body))

    assert time.process_time() - began < 1
    assert edited.endswith(b'"model": "new"}')
    assert len(edited) == len(body) + len(b'"stream_options":{"include_usage":true},')


def test_a_key_repeated_very_often_is_no_stall() -> None:
    body = b"{" + b",".join([b'"model":"old"'] * 50_000) + b"}"
    began = time.process_time()

    assert renamed(body).count(b'"new"') == 50_000
    assert time.process_time() - began < 2


# -- usage in streams --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "edited"),
    [
        (b"null", b'{"include_usage":true}'),
        (b"{ }", b'{"include_usage":true }'),
        (b'{"x":[1]}', b'{"include_usage":true,"x":[1]}'),
        (b'{"include_usage":false,"x":1}', b'{"include_usage":true,"x":1}'),
        (b'{"include_usage": null}', b'{"include_usage": true}'),
        (b'{"include_usage":true}', b'{"include_usage":true}'),
    ],
)
@pytest.mark.parametrize("key", [b'"stream_options"', b'"stream\\u005foptions"'])
def test_asking_for_usage_sets_one_option_and_keeps_the_rest(key: bytes, options: bytes, edited: bytes) -> None:
    body = b'{"model":"m",%b: %%b ,"x":{"stream_options":{}}}' % key

    assert asking(body % options) == body % edited


@pytest.mark.parametrize(
    ("body", "edited"),
    [
        (b' { "model":"m"}', b' {"stream_options":{"include_usage":true}, "model":"m"}'),
        (
            b'{"x":{"stream_options":{}},"model":"m"}',
            b'{"stream_options":{"include_usage":true},"x":{"stream_options":{}},"model":"m"}',
        ),
        (
            b'{"stream_options":{"include_usage":false},"model":"m","stream_options":null}',
            b'{"stream_options":{"include_usage":true},"model":"m","stream_options":{"include_usage":true}}',
        ),
    ],
)
def test_options_are_added_where_there_are_none_and_each_of_several_is_set(body: bytes, edited: bytes) -> None:
    assert asking(body) == edited


OPTIONS = st.none() | st.dictionaries(KEYS, VALUES, max_size=4)


@given(
    bodies(st.tuples(OBJECTS, OPTIONS).map(lambda pair: {**pair[0], "stream_options": pair[1], "model": "old"})),
    st.booleans(),
)
def test_asking_for_usage_says_what_setting_it_says(body: bytes, twice: bool) -> None:
    table = json.loads(body)
    table["stream_options"] = {**(table["stream_options"] or {}), "include_usage": True}

    edited = asking(asking(body)) if twice else asking(body)

    assert json.loads(edited) == table


# -- ids of answers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "id_"),
    [
        (b'{"id":"resp_1","object":"response","output":[{"id":"msg_1"}]}', "resp_1"),
        (b' {\n  "id" : "resp_1",\n  "object": "response",\n  "output": [{"te', "resp_1"),
        (b'{"object":"response","output":[{"id":"msg_1","object":"x"}],"id":"resp\\u005f1"}', "resp_1"),
        (b'{"object":"response","output":[{"id":"msg_1"', ""),
        (b'{"id":"chatcmpl-1","object":"chat.completion"}', ""),
        (b'{"id":"msg_1","type":"message"}', ""),
        (b'{"id":7,"object":"response"}', ""),
        (b'{"object":"response"}', ""),
        (b'{"response":{"id":"resp_1","object":"response"}}', ""),
        (b'[{"id":"resp_1","object":"response"}]', ""),
        (b"", ""),
        (b"\xff", ""),
    ],
)
def test_an_answer_of_the_responses_api_has_its_id(body: bytes, id_: str) -> None:
    assert response_id_of_json(body) == id_


@pytest.mark.parametrize(
    ("data", "id_"),
    [
        (b'{"type":"response.created","sequence_number":0,"response":{"id":"resp_1","object":"response"}}', "resp_1"),
        (b'{"type":"response.in_progress","response":{"id":"resp_1"}}', "resp_1"),
        (b'{"response":{"output":[{"id":"msg_1"}],"id":"resp_1"},"type":"response.completed"}', "resp_1"),
        (b'{"type":"response.output_text.delta","item_id":"msg_1","delta":"\\"response\\""}', ""),
        (b'{"type":"response.output_text.delta","delta":"response","response":7}', ""),
        (b'{"type":"response.created","response":{"id":7}}', ""),
        (b'{"type":"x","response":{"id":"resp_1"}}', ""),
        (b'{"type":"response.created","response":{"id":"resp_1"}', ""),
        (b"[DONE]", ""),
        (b'"response"', ""),
    ],
)
def test_an_event_names_the_answer_that_it_speaks_of(data: bytes, id_: str) -> None:
    assert response_id_of_event(data) == id_


@given(st.binary(max_size=40))
def test_any_bytes_have_an_id_or_none(rest: bytes) -> None:
    for start in (b"", b'{"id":"', b'{"type":"response.created","response":'):
        response_id_of_json(start + rest)
        response_id_of_event(start + rest)


# -- the estimate ------------------------------------------------------------------------------------------------------


def plain_estimate(body: bytes) -> int:
    """The rule, without the short cut."""
    runs = [part for part in body.split(b'"') if len(part) >= 512 and not {0x20, 0x5C} & set(part) and max(part) < 0x80]
    return max(1, (len(body) - sum(map(len, runs))) // 4 + 1000 * len(runs))


@pytest.mark.parametrize(
    ("body", "tokens"),
    [
        (b"x", 1),
        (b'{"c":"' + b"a b " * 1000 + b'"}', 1002),
        (b'{"c":"' + b"A" * 512 + b'"}', 1002),
        (b'{"c":"' + b"A" * 511 + b'"}', 129),
        (b' {"c": "' + b"A" * 512 + b'" }', 1002),
        (b" " * 257 + b'"' + b"A" * 512 + b'"', 1064),
        (b'{"c":"' + b"A" * 511 + b' "}', 130),
        (b'{"c":"' + b"\\n" * 512 + b'"}', 258),
        (b'{"c":"' + "日".encode() * 400 + b'"}', 302),
        (b'{"c":"' + b"A" * 10**6 + b'","d":"' + b"B" * 10**6 + b'"}', 2003),
    ],
)
def test_a_quarter_of_the_bytes_and_a_thousand_a_run(body: bytes, tokens: int) -> None:
    assert estimate_tokens(body) == tokens


@given(
    st.lists(
        st.tuples(st.sampled_from([b"A", b"a b", b'"', b"\\n", b'" "', b"\xc3\xa9"]), st.integers(1, 700)), max_size=6
    )
)
def test_the_short_cut_of_the_estimate_changes_nothing(pieces: list[tuple[bytes, int]]) -> None:
    body = b"".join(piece * times for piece, times in pieces)

    assert estimate_tokens(body) == plain_estimate(body)
