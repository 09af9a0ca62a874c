"""What may follow a failure: the rule's other services, rules that stand in, one for longer prompts, or nothing."""

from __future__ import annotations

from typing import Any

import pytest

from balancer.domain import Outcome, Retry, Rule
from balancer.failures import Verdict
from balancer.gateway.course import Course
from tests.builders import a_rule, a_service

FAILED = Verdict(outcome=Outcome.FAILED)
TOO_LONG = Verdict(outcome=Outcome.REJECTED, is_context_overflow=True)


def a_course(*rules: Rule, **more: Any) -> Course:
    by_uuid = {rule.uuid: rule for rule in rules}
    return Course(rules[0], by_uuid.get, **more)


def test_a_failure_leads_to_the_services_that_were_not_tried_and_then_to_none() -> None:
    rule = a_rule(services=("a:m", "b:m"))
    course = a_course(rule)

    course.picked("b:m", rule)
    assert (course.go_on(FAILED), course.rule, course.tried) == (True, rule, ("b:m",))

    course.picked("a:m", rule)
    assert not course.go_on(FAILED)
    assert course.attempts == 2


def test_services_that_are_switched_off_are_no_chance() -> None:
    rule = a_rule(services=("a:m", a_service("b:m", active=False)))
    course = a_course(rule)
    course.picked("a:m", rule)
    assert not course.goes_on(FAILED)


@pytest.mark.parametrize("outcome", Outcome)
def test_only_what_another_service_may_do_better_leads_on(outcome: Outcome) -> None:
    rule = a_rule()
    course = a_course(rule)
    course.picked("a:m", rule)
    retried = {Outcome.RATE_LIMITED, Outcome.UNAUTHORIZED, Outcome.OVERLOADED, Outcome.FAILED}
    assert course.goes_on(Verdict(outcome=outcome)) == (outcome in retried)


def test_attempts_are_counted_for_each_rule_and_told_in_all() -> None:
    first = a_rule("first", ("a:m", "b:m", "c:m"), retry=Retry(attempts=2), fallback=("second",))
    second = a_rule("second", ("d:m", "e:m"), retry=Retry(attempts=2))
    course = a_course(first, second)

    course.picked("a:m", first)
    assert course.go_on(FAILED)
    assert course.fall_back()  # Say its pool had no candidate.
    for service in ("d:m", "e:m"):
        course.picked(service, second)
    assert not course.go_on(FAILED)
    assert course.attempts == 3


def test_when_attempts_are_used_up_no_rule_stands_in() -> None:
    first = a_rule("first", ("a:m",), retry=Retry(attempts=1), fallback=("second",))
    course = a_course(first, a_rule("second", ("d:m",)))
    course.picked("a:m", first)
    assert not course.go_on(FAILED)


def test_rules_stand_in_in_order_each_once_and_theirs_before_the_rest() -> None:
    rules = [
        a_rule("one", fallback=("two", "four")),
        a_rule("two", fallback=("three", "one")),
        a_rule("three", fallback=("two", "missing")),
        a_rule("four", fallback=("three", "one")),
    ]
    course = a_course(*rules)
    entered = []
    while course.fall_back():
        entered.append(course.rule.uuid)
    assert entered == ["two", "three", "four"]


def test_a_service_that_was_tried_is_not_tried_again_under_a_rule_that_stands_in() -> None:
    first = a_rule("first", ("a:m",), fallback=("second",))
    second = a_rule("second", ("a:m", "b:m"))
    course = a_course(first, second)
    course.picked("a:m", first)
    assert (course.go_on(FAILED), course.rule, course.tried) == (True, second, ("a:m",))


def test_a_prompt_that_is_too_long_leads_to_the_rule_for_it_once() -> None:
    first = a_rule("first", on_context_overflow="long", fallback=("second",))
    long = a_rule("long", ("l:m",), on_context_overflow="longer", fallback=("spare",))
    course = a_course(first, long, a_rule("longer", ("x:m",)), a_rule("second"), a_rule("spare", ("s:m",)))

    course.picked("a:m", first)
    assert (course.go_on(TOO_LONG), course.rule) == (True, long)
    course.picked("l:m", long)
    assert not course.goes_on(TOO_LONG)
    assert (course.go_on(FAILED), course.rule.uuid) == (True, "spare")
    course.picked("s:m", course.rule)
    assert not course.goes_on(FAILED)  # `second` stands in for the rule of short prompts.


def test_without_a_rule_for_it_a_prompt_that_is_too_long_is_the_client_s_to_mend() -> None:
    rule = a_rule()
    course = a_course(rule)
    course.picked("a:m", rule)
    assert not course.goes_on(TOO_LONG)


@pytest.mark.parametrize("bound", [{"only": "a:m"}, {"is_bound": True}])
def test_what_belongs_to_one_service_is_tried_there_alone(bound: dict[str, Any]) -> None:
    rule = a_rule(fallback=("other",), on_context_overflow="other")
    course = a_course(rule, a_rule("other", ("o:m",)), **bound)
    assert not course.fall_back()
    course.picked("a:m", rule)
    assert not course.goes_on(FAILED)
    assert not course.goes_on(TOO_LONG)


def test_pauses_double_and_vary_by_half() -> None:
    rule = a_rule(services=[f"{name}:m" for name in "abcdefghijklmnop"], retry=Retry(attempts=16, backoff_ms=50))
    course = a_course(rule)
    pauses = []
    for service in rule.services:
        course.picked(service.id, rule)
        pauses.append((course.backoff_s(0.0), course.backoff_s(1.0)))
    assert pauses[:3] == [pytest.approx(pause) for pause in ((0.025, 0.075), (0.05, 0.15), (0.1, 0.3))]
    assert pauses[-1] == (5.0, 15.0)


def test_the_client_s_name_for_the_model_is_that_of_the_rule_it_asked_for() -> None:
    first = a_rule("first", response_model="house", fallback=("second",))
    second = a_rule("second", response_model="other")
    course = a_course(first, second)
    course.fall_back()
    assert course.response_model == "house"
    plain = a_course(a_rule("first", fallback=("second",)), second)
    plain.fall_back()
    assert plain.response_model == "other"
