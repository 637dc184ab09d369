"""Cancelling a flow step by step."""

import types

import pytest

from ff_fast import CancelFlowOutcome, CancelFlowPolicy, FlowDescription, errors, keys
from ff_fast._core import flows

from .script import functions, run

FLOW = "550e8400-e29b-41d4-a716-446655440000"
TAG = "{fp:3}"
ALL = CancelFlowPolicy.CANCEL_ALL
ONLY = CancelFlowPolicy.FLOW_ONLY


def cancelled(policy=ALL, still_open=5):
    return [1, b"OK", policy.value.encode(), b"%d" % still_open]


def members(count, left, *hints):
    return [1, b"OK", b"%d" % count, b"%d" % left, *hints]


def described(*still_open):
    return [1, b"OK", b"cancelled", b"2", b"%d" % len(still_open)]


def cancel(*replies, policy=ALL, wait_s=10.0):
    return run(flows.cancel_flow(FLOW, TAG, "why", policy, wait_s), replies)


@pytest.mark.parametrize("policy, wait_s", [(ALL, None), (ONLY, None), (ONLY, 10.0)])
def test_the_flow_alone_is_one_call(policy, wait_s):
    asked, outcome = cancel(cancelled(policy), policy=policy, wait_s=wait_s)
    assert functions(asked) == ["ff_cancel_flow"]
    assert asked[0][3] == keys.flow(TAG, FLOW)
    assert asked[0][7:9] == [b"why", policy.value.encode()]
    assert outcome == CancelFlowOutcome(policy, 0, 5)


def test_the_policy_of_the_first_call_holds():
    assert cancel(cancelled(ONLY))[1] == CancelFlowOutcome(ONLY, 0, 5)


def test_members_are_cancelled_until_none_is_left():
    asked, outcome = cancel(
        cancelled(), members(100, 1), members(3, 0, b"lane", b"", b"-1"), 1, 1, 1, described(b"b")
    )
    assert functions(asked) == [
        *("ff_cancel_flow", "ff_cancel_members", "ff_cancel_members", "ZADD", "HSET", "PEXPIRE", "ff_describe_flow"),
    ]  # fmt: skip
    assert asked[3] == [b"ZADD", keys.ready("lane"), b"LT", b"-1", b"3"]
    assert outcome == CancelFlowOutcome(ALL, 103, 1)


def test_a_wait_that_is_over_leaves_the_rest_to_a_supervisor(monkeypatch):
    times = iter([0.0, 0.5, 1.0])
    monkeypatch.setattr(flows, "time", types.SimpleNamespace(monotonic=lambda: next(times)))
    asked, error = cancel(cancelled(), members(100, 1), members(100, 1), wait_s=1.0)
    assert type(error) is errors.DeadlineExceeded
    assert functions(asked)[1:] == ["ff_cancel_members"] * 2


@pytest.mark.parametrize(
    "replies, error",
    [
        ([[0, b"flow_not_found"]], errors.FlowNotFound),
        ([cancelled(), errors.OutcomeUnknown()], errors.OutcomeUnknown),
        ([cancelled(), [1, b"OK", b"x", b"0"]], errors.ProtocolError),
        ([cancelled(), members(1, 0), [0, b"flow_not_found"]], errors.FlowNotFound),
    ],
)
def test_a_refusal_ends_it(replies, error):
    assert type(cancel(*replies)[1]) is error


def test_members_are_described_in_pages_and_each_once(monkeypatch):
    monkeypatch.setattr(flows, "_PAGE", 2)
    asked, told = run(
        flows.describe_flow(FLOW, TAG),
        [described(b"a"), [b"7", [b"b", b"a"]], [b"0", [b"a"]], [b"a", b"b"], [b"c"]],
    )
    assert asked[1:] == [
        [b"SSCAN", keys.flow_members(TAG, FLOW), b"0", b"COUNT", b"2"],
        [b"SSCAN", keys.flow_members(TAG, FLOW), b"7", b"COUNT", b"2"],
        [b"ZRANGEBYLEX", keys.flow_open(TAG, FLOW), b"-", b"+", b"LIMIT", b"0", b"2"],
        [b"ZRANGEBYLEX", keys.flow_open(TAG, FLOW), b"(b", b"+", b"LIMIT", b"0", b"2"],
    ]
    assert told == FlowDescription(FLOW, "cancelled", ("a", "b"), ("a", "b", "c"))


@pytest.mark.parametrize("page", [[], [b"0"], [b"0", b"a"], [0, []], [b"0", [7]], None])
def test_a_page_of_members_that_is_not_understood_is_none(page):
    _, error = run(flows.describe_flow(FLOW, TAG), [described(), page])
    assert isinstance(error, (errors.ProtocolError, errors.Corruption))
