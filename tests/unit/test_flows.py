"""Cancelling a flow step by step."""

import types

import pytest

from ff_fast import CancelFlowOutcome, CancelFlowPolicy, errors, keys
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
    return [1, b"OK", [b"state", b"cancelled"], [b"a", b"b"], list(still_open)]


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
