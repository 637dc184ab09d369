"""A report of usage step by step: budgets first, then the ledger, and what is taken back."""

import hiredis
import pytest

from ff_fast import Handle, ReportUsageResult, UsageDimensions, UsageVerdict, errors, keys
from ff_fast._core import ops, usage

from .script import functions, run

EID = "{fp:1}:550e8400-e29b-41d4-a716-446655440000"
ATTEMPT = ops.Attempt.of(
    Handle.encode(
        execution_id=EID, attempt_index=0, attempt_id="a", lease_id="l", lease_epoch=1,
        lease_ttl_ms=1000, lane_id="lane", worker_instance_id="w-1",
    )
)  # fmt: skip
USAGE = UsageDimensions(input_tokens=10, dedup_key="report-1")
CHECKED = [1, b"OK", b"b-1 b-2"]
OK, AGAIN = [1, b"OK"], [1, b"ALREADY_APPLIED"]
SOFT = [1, b"SOFT_BREACH", b"input_tokens", b"12", b"10"]
HARD = [1, b"HARD_BREACH", b"input_tokens", b"12", b"10"]
APPLIED = [1, b"OK", b""]
LOST = errors.OutcomeUnknown()
BOTH_RELEASED = ["ff_release_charge"] * 2


def report(*replies):
    return run(usage.report_usage(ATTEMPT, USAGE, "report-1"), replies)


def budgets(asked, function):
    """The budgets of the calls of one function."""
    return [each[3] for each in asked if each[1] == function]


def test_every_budget_is_charged_then_the_ledger():
    asked, result = report(CHECKED, OK, OK, APPLIED)
    assert functions(asked) == [
        *("ff_report_usage", "ff_charge_budget", "ff_charge_budget", "ff_report_usage"),
    ]  # fmt: skip
    assert asked[0][4:] == [*ATTEMPT.fence, b"check", b"keyed", b"report-1", b"input_tokens", b"10"]
    assert asked[1][3:6] == [
        keys.budget_limits("b-1"), keys.budget_usage("b-1"), keys.budget_charges("b-1", EID),
    ]  # fmt: skip
    assert asked[3][4:] == [*ATTEMPT.fence, b"apply", b"keyed", b"report-1", b"input_tokens", b"10"]
    assert result == ReportUsageResult(UsageVerdict.OK)


def test_without_a_budget_there_is_the_ledger_alone():
    asked, result = report([1, b"OK", b""], APPLIED)
    assert functions(asked) == ["ff_report_usage"] * 2
    assert result == ReportUsageResult(UsageVerdict.OK)


def test_a_report_that_was_applied_is_not_charged_again():
    asked, result = report([1, b"ALREADY_APPLIED", b"b-1"])
    assert len(asked) == 1
    assert result == ReportUsageResult(UsageVerdict.ALREADY_APPLIED)


def test_a_repeat_completes_what_the_first_call_began():
    assert report(CHECKED, AGAIN, OK, APPLIED)[1] == ReportUsageResult(UsageVerdict.OK)


@pytest.mark.parametrize("charges, budget", [((SOFT, OK), "b-1"), ((OK, SOFT), "b-2"), ((SOFT, SOFT), "b-1")])  # fmt: skip
def test_the_first_soft_limit_is_told_and_the_report_counts(charges, budget):
    asked, result = report(CHECKED, *charges, APPLIED)
    assert asked[-1][7] == b"apply"
    assert result == ReportUsageResult(UsageVerdict.SOFT_BREACH, budget, "input_tokens", 12, 10)


def test_a_hard_limit_takes_back_what_was_charged_before_it():
    asked, result = report(CHECKED, OK, HARD, OK)
    assert functions(asked)[-1] == "ff_release_charge"
    assert budgets(asked, b"ff_release_charge") == [keys.budget_limits("b-1")]
    assert result == ReportUsageResult(UsageVerdict.HARD_BREACH, "b-2", "input_tokens", 12, 10)
    asked, result = report(CHECKED, HARD)
    assert functions(asked) == ["ff_report_usage", "ff_charge_budget"]
    assert result.verdict is UsageVerdict.HARD_BREACH


@pytest.mark.parametrize(
    "replies, error, last",
    [
        ([[0, b"stale_owner"]], errors.StaleOwner, ["ff_report_usage"]),
        ([CHECKED, [0, b"budget_not_found"]], errors.BudgetNotFound, ["ff_charge_budget"]),
        ([CHECKED, OK, [0, b"budget_not_found"], OK], errors.BudgetNotFound, ["ff_release_charge"]),
        ([CHECKED, OK, OK, [0, b"lease_expired"], OK, OK], errors.LeaseExpired, BOTH_RELEASED),
        # A repeat may complete these, so nothing is taken back.
        ([CHECKED, OK, LOST], errors.OutcomeUnknown, ["ff_charge_budget"] * 2),
        ([CHECKED, OK, OK, LOST], errors.OutcomeUnknown, ["ff_report_usage"]),
        ([CHECKED, OK, hiredis.ReplyError("LOADING no")], errors.Unavailable, ["ff_charge_budget"] * 2),
        ([CHECKED, OK, [1, b"WHAT"]], errors.ProtocolError, ["ff_charge_budget"] * 2),
        # A failure to take back is what the caller hears of.
        ([CHECKED, OK, OK, [0, b"lease_expired"], LOST], errors.OutcomeUnknown, ["ff_release_charge"]),
    ],
)  # fmt: skip
def test_a_refusal_takes_back_what_no_repeat_would_complete(replies, error, last):
    asked, raised = report(*replies)
    assert type(raised) is error
    assert functions(asked)[-len(last) :] == last
