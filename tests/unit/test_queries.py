import time

import pytest
from pydantic import ValidationError

from stormline.operators.queries import AlertCondition, StandingQuery


def condition(**fields):
    return AlertCondition.model_validate(fields)


@pytest.mark.parametrize(
    ("fields", "answer", "holds"),
    [
        ({"answer": "yes"}, "yes", True),
        ({"answer": "yes"}, " Yes. It leaves.", True),
        ({"answer": "yes"}, "no", False),
        ({"answer": "yes"}, "yesterday", False),
        ({"answer": "yes"}, "I would say yes", False),
        ({"answer": "a red circle"}, "A red circle, then nothing", True),
        ({"answer": "yes"}, "", False),
        ({"contains": "Red Van"}, "there is a red van", True),
        ({"contains": "red van"}, "there is a van", False),
        ({"matches": r"\b[2-9] (people|cars)\b"}, "I see 3 people", True),
        ({"matches": r"\b[2-9] (people|cars)\b"}, "I see 1 people", False),
        ({"matches": "RED"}, "red", False),
        ({"matches": "(?i)RED"}, "red", True),
    ],
)
def test_condition_when_an_answer_comes_then_holds_or_not(fields, answer, holds):
    assert condition(**fields).holds(answer) is holds


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "got nothing, expected one of answer, contains and matches"),
        ({"answer": "yes", "contains": "yes"}, "got answer and contains"),
        ({"matches": "(a"}, "no regular expression of RE2"),
        ({"matches": r"(a)\1"}, "no regular expression of RE2"),
        ({"answer": "?!"}, "expected at least one word"),
    ],
)
def test_condition_when_wrong_then_said_so(fields, said):
    with pytest.raises(ValidationError, match=said):
        condition(**fields)


def test_condition_when_the_pattern_is_an_evil_one_then_quick_all_the_same():
    evil = condition(matches="^(a+)+$")

    began_s = time.perf_counter()

    assert not evil.holds("a" * 5000 + "!")
    assert time.perf_counter() - began_s < 1


def query(**fields):
    return StandingQuery.model_validate({"id": "q", **fields})


def test_query_when_little_is_said_then_the_rest_is_filled_in():
    assert (query().kind, query().window_s, query().streams) == ("caption", 10.0, ("*",))
    assert query(kind="alert", prompt="Smoke?").condition == condition(answer="yes")
    assert query(streams="gate-*").streams == ("gate-*",)


def test_query_when_written_and_read_then_the_same():
    for made in (query(), query(kind="alert", prompt="Smoke?", condition={"contains": "smoke"}, streams=["a", "b"])):
        assert StandingQuery.model_validate(made.model_dump(mode="json")) == made


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"kind": "alert"}, "an alert needs a prompt"),
        ({"kind": "answer"}, "Input should be 'caption' or 'alert'"),
        ({"condition": {"answer": "yes"}}, "a caption has no condition"),
        ({"streams": []}, "at least 1 item"),
        ({"streams": [""]}, "patterns of 1 to 256 characters"),
        ({"window_s": 0}, "greater than 0"),
        ({"window_s": float("nan")}, "window_s"),
        ({"id": "../x"}, "should match pattern"),
        ({"widow_s": 3}, "Extra inputs"),
    ],
)
def test_query_when_wrong_then_said_so(fields, said):
    with pytest.raises(ValidationError, match=said):
        query(**fields)


def test_query_when_it_names_streams_then_watches_those_that_fit_any_pattern():
    asked = query(streams=["gate-*", "yard"])

    assert [asked.watches(name) for name in ("gate-1", "yard", "yard-2", "Gate-1")] == [True, True, False, False]


def test_query_when_only_its_budget_or_streams_change_then_an_alert_means_the_same():
    asked = query(kind="alert", prompt="Smoke?")

    assert asked.asks_as(query(kind="alert", prompt="Smoke?", streams="x", token_budget=1))
    assert not asked.asks_as(query(kind="alert", prompt="Fire?"))
    assert not asked.asks_as(query(kind="alert", prompt="Smoke?", condition={"contains": "smoke"}))
