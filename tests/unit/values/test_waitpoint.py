"""Tokens of waitpoints, and conditions."""

import ast
import inspect

import pytest

from ff_fast.errors import (
    InvalidInput,
)
from ff_fast.types import (
    CountKind,
    ResumeCondition,
    WaitpointHmac,
)

from .samples import TOKEN, spec

# -- tokens ----------------------------------------------------------------------------------------


def test_waitpoint_token():
    token = WaitpointHmac(TOKEN)
    assert token.reveal() == token.as_str() == TOKEN
    assert token.kid == "kid1"
    assert token == WaitpointHmac(TOKEN) != WaitpointHmac(TOKEN[:-1] + "c")
    assert token != TOKEN
    assert repr(token) == "WaitpointHmac('kid1:<REDACTED:len=40>')"
    assert str(token) == f"{token}" == "kid1:<REDACTED:len=40>"
    assert f"{token:>30}" == f"{'kid1:<REDACTED:len=40>':>30}"


def test_bad_waitpoint_tokens(subtests):
    for text in (
        "",
        "kid1",
        ":" + "a" * 40,
        "k:" + "a" * 39,
        "k:" + "a" * 41,
        "k:" + "A" * 40,
        "k:k:" + "a" * 40,
        "k:" + "a" * 40 + "\n",
        "é:" + "a" * 40,
        "k k:" + "a" * 40,
        "x" * 65 + ":" + "a" * 40,
        None,
        TOKEN.encode(),
        5,
    ):
        with subtests.test(f"{text!r:.60}"):
            with pytest.raises(InvalidInput) as caught:
                WaitpointHmac(text)
            assert "aaaa" not in f"{caught.value!r}"


def test_tokens_are_never_compared_with_an_operator():
    source = inspect.getsource(WaitpointHmac.__eq__)
    compared = [
        node for node in ast.walk(ast.parse(source.lstrip())) if isinstance(node, ast.Compare)
    ]
    assert "compare_digest" in source
    assert not compared


# -- conditions ------------------------------------------------------------------------------------


def test_conditions_are_made_by_name():
    assert ResumeCondition.any(spec(1), spec(2)) == ResumeCondition((spec(1), spec(2)), 1)
    assert ResumeCondition.all(spec(1), spec(2)).needed == 2
    counted = ResumeCondition.count(2, spec(1), spec(2))
    assert (counted.needed, counted.distinct) == (2, CountKind.DISTINCT_WAITPOINTS)


def nested(levels):
    condition = ResumeCondition.any(spec())
    for _ in range(levels - 1):
        condition = ResumeCondition.any(condition)
    return condition


def test_bad_conditions(subtests):
    for make in (
        ResumeCondition.any,
        ResumeCondition.all,
        lambda: ResumeCondition.any("x"),
        lambda: ResumeCondition([spec()], 1),
        lambda: ResumeCondition((spec(),), 0),
        lambda: ResumeCondition((spec(),), True),
        lambda: ResumeCondition((spec(),), 1, "leaf"),
        # More than can ever come.
        lambda: ResumeCondition((spec(),), 2),
        lambda: ResumeCondition.count(2, spec(1), spec(1)),
        lambda: ResumeCondition.count(3, spec(1), spec(1), nested(1)),
        lambda: ResumeCondition.count(3, nested(1), nested(1), distinct=CountKind.DISTINCT_SOURCES),
        lambda: ResumeCondition.count(10_001, spec(), distinct=CountKind.DISTINCT_SIGNALS),
        lambda: nested(17),
        lambda: ResumeCondition.any(*[spec(i) for i in range(257)]),
    ):
        with subtests.test(f"{make!r:.60}"), pytest.raises(InvalidInput):
            make()


def test_the_largest_conditions():
    nested(16)
    ResumeCondition.any(*[spec(i) for i in range(256)])
    for distinct in (CountKind.DISTINCT_SIGNALS, CountKind.DISTINCT_SOURCES):
        assert ResumeCondition.count(10_000, spec(), distinct=distinct).needed == 10_000
