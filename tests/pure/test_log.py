"""Logs: one JSON object a line, with its facts, and nothing else on the stream."""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from balancer import log


@pytest.fixture(autouse=True)
def restored_logging() -> Iterator[None]:
    """Puts back what `configure` replaces, for the tests that come after."""
    root, ours = logging.getLogger(), logging.getLogger("balancer")
    handlers, levels = root.handlers[:], (root.level, ours.level)
    root.handlers.clear()  # `configure` closes those it finds; they are not its own.
    yield
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    ours.setLevel(levels[1])


def configured(level: str = "info") -> io.StringIO:
    stream = io.StringIO()
    log.configure(level, stream)
    return stream


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    """Every line of the stream, each of which must be an object."""
    text = stream.getvalue()
    assert text == "" or text.endswith("\n")
    return [msgspec.json.decode(line, type=dict[str, Any]) for line in text.split("\n")[:-1]]


def test_a_line_has_its_time_level_event_process_and_facts() -> None:
    stream = configured()
    before = datetime.now(UTC) - timedelta(milliseconds=1)

    log.info("worker ready", slot=3, pool="default", waited_s=0.25, is_new=True, of=None)

    (line,) = lines(stream)
    assert before <= datetime.fromisoformat(line.pop("ts")) <= datetime.now(UTC)
    assert line == {
        "level": "info",
        "event": "worker ready",
        "pid": os.getpid(),
        "slot": 3,
        "pool": "default",
        "waited_s": 0.25,
        "is_new": True,
        "of": None,
    }


@pytest.mark.parametrize(
    ("level", "told"),
    [
        ("debug", ["debug", "info", "warning", "error"]),
        ("info", ["info", "warning", "error"]),
        ("warning", ["warning", "error"]),
        ("error", ["error"]),
    ],
)
def test_what_is_below_the_level_is_not_told(level: str, told: list[str]) -> None:
    stream = configured(level)

    for say in (log.debug, log.info, log.warning, log.error):
        say("something")

    assert [line["level"] for line in lines(stream)] == told


def test_without_a_stream_lines_go_to_stderr_alone(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure("info")

    log.info("something")

    out, err = capsys.readouterr()
    assert out == ""
    assert msgspec.json.decode(err)["event"] == "something"


def test_line_breaks_in_an_event_or_a_fact_do_not_break_the_line() -> None:
    stream = configured()

    log.info("two\nlines", reason='a\r\nb\u2028c"\x00', more={"deep": ["\n"]})

    (line,) = lines(stream)
    assert (line["event"], line["reason"], line["more"]) == ("two\nlines", 'a\r\nb\u2028c"\x00', {"deep": ["\n"]})


def test_percent_signs_are_no_places_for_arguments() -> None:
    stream = configured()

    log.warning("100% of %s", used="%d")

    assert [(line["event"], line["used"]) for line in lines(stream)] == [("100% of %s", "%d")]


def test_a_fact_of_any_type_is_told() -> None:
    stream = configured()

    log.info("something", error=ValueError("no such thing"), kind=int)

    (line,) = lines(stream)
    assert (line["error"], line["kind"]) == ("no such thing", "<class 'int'>")


def test_an_error_has_the_traceback_of_its_exception_in_the_same_line() -> None:
    stream = configured()
    try:
        raise RuntimeError("broken")
    except RuntimeError as exc:
        log.error("handler failed", exc=exc, rule="chat")

    (line,) = lines(stream)
    assert (line["level"], line["event"], line["rule"]) == ("error", "handler failed", "chat")
    assert line["traceback"].startswith("Traceback (most recent call last):\n")
    assert line["traceback"].endswith("RuntimeError: broken")


def test_an_error_without_an_exception_has_no_traceback() -> None:
    stream = configured()

    log.error("worker ended", reason="lost")

    assert ["traceback" in line for line in lines(stream)] == [False]


def test_warnings_of_libraries_are_lines_too_that_name_their_logger() -> None:
    stream = configured()

    logging.getLogger("aiohttp.server").warning("bad %s", "request")
    logging.getLogger("aiohttp.server").info("chatter")

    (line,) = lines(stream)
    assert (line["level"], line["event"], line["logger"]) == ("warning", "bad request", "aiohttp.server")


def test_configuring_again_replaces_the_first_stream() -> None:
    first, second = configured(), configured()

    log.info("something")

    assert (lines(first), len(lines(second))) == ([], 1)


@given(
    facts=st.dictionaries(
        st.sampled_from(("reason", "service", "status")),
        st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.binary(max_size=9)),
    ),
    event=st.text(max_size=30),
)
def test_whatever_the_facts_there_is_one_line_of_json(event: str, facts: dict[str, Any]) -> None:
    stream = configured()

    log.info(event, **facts)

    (line,) = lines(stream)
    assert line["event"] == event
    assert facts.keys() <= line.keys()


def test_a_half_of_a_surrogate_pair_does_not_cost_the_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Paths and header values that are no UTF-8 reach Python with such halves."""
    stream = configured()

    log.warning("bad request", path="/v1/\udc80")

    assert [line["event"] for line in lines(stream)] == ["bad request"]
    assert capsys.readouterr().err == ""
