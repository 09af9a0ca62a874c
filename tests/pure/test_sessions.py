"""Which conversation a request belongs to."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balancer.bodies import peek, peek_form
from balancer.dialects import Headers
from balancer.sessions import CLAUDE_CODE_HEADER, session_of
from tests.builders import a_rule

PINNED = a_rule(session_affinity=60, session_header="X-Chat")
CODE: Headers = (("X-Claude-Code-Session-Id", "code"),)
BODY: dict[str, Any] = {"metadata": {"user_id": "meta"}, "prompt_cache_key": "cache", "user": "user"}


def _first(headers: Headers) -> dict[str, str]:
    return {name.lower(): value for name, value in reversed(headers)}


def session(headers: Headers = (), **body: Any) -> str:
    return session_of(PINNED, _first(headers), peek(json.dumps({"model": "m"} | body).encode()))


def test_a_session_is_named_by_the_first_that_is_there() -> None:
    assert session((("x-chat", "own"), *CODE), **BODY) == "own"
    assert session(CODE, **BODY) == "code"
    assert session(**BODY) == "meta"
    assert session(prompt_cache_key="cache", user="user") == "cache"
    assert session(user="user") == "user"
    assert session() == ""


def test_without_affinity_or_a_header_of_its_own_a_rule_looks_at_less() -> None:
    request = peek(json.dumps({"model": "m"} | BODY).encode())

    assert session_of(a_rule(session_header="X-Chat"), _first((("x-chat", "own"), *CODE)), request) == ""
    assert session_of(a_rule(session_affinity=60), _first((("x-chat", "own"), ("", "x"))), request) == "meta"


def test_what_is_blank_or_no_text_is_absent() -> None:
    blank: Headers = (("x-chat", " "), (CLAUDE_CODE_HEADER, ""))

    assert session(blank, metadata={"user_id": "\t "}, prompt_cache_key=" ", user=" u ") == "u"
    assert session(metadata={"user_id": 7}, prompt_cache_key={}, user="u") == "u"
    assert session(metadata={"x": "y"}, prompt_cache_key=None, user="u") == "u"


@pytest.mark.parametrize("odd", [None, 7, True, "text", [], ["x"], {"user_id": {}}, {"x": 1}])
def test_an_odd_type_names_no_session(odd: Any) -> None:
    assert session(metadata=odd, user=[odd]) == ""


def test_a_name_may_be_long_and_odd_and_can_be_encoded() -> None:
    assert session((("x-chat", "x" * 10_000),)) == "x" * 10_000
    assert session((("x-chat", "a\udcff"),)) == "a\\udcff"
    assert session_of(PINNED, _first(()), peek(b'{"model":"m","user":"\\ud83d"}')).encode() == "\ufffd".encode()
    assert session_of(PINNED, _first(()), peek(b'{"model":"m","user": "a\\u0062"  }')) == "ab"


def test_a_form_belongs_to_the_session_of_its_headers() -> None:
    form = b'--x\r\ncontent-disposition: form-data; name="model"\r\n\r\nm\r\n--x--'
    request = peek_form(form, "multipart/form-data; boundary=x")

    assert (session_of(PINNED, _first(CODE), request), session_of(PINNED, _first(()), request)) == ("code", "")


@given(st.text(st.characters(codec=None), max_size=20))
def test_any_session_can_be_encoded(value: str) -> None:
    session_of(PINNED, _first((("x-chat", value),)), peek(b'{"model":"m"}')).encode()
