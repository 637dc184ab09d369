"""Reporting usage: first the budgets, each in a slot of its own, then the execution's ledger."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ff_fast._core import ops
from ff_fast._core.steps import applied_in_part
from ff_fast.errors import FFError, Outcome, make_unknown
from ff_fast.types import ReportUsageResult, UsageDimensions, UsageVerdict

if TYPE_CHECKING:
    from ff_fast._core.steps import Steps

# A budget forgets the reports of an execution after this time without one.
_WINDOW_MS = 3_600_000


def report_usage(
    attempt: ops.Attempt, usage: UsageDimensions, report_id: str
) -> Steps[ReportUsageResult]:
    """Charge every budget of the execution, then its own ledger; at a hard limit, release the earlier charges.

    Budgets are in different slots, so a report takes several calls. Each applies once for *report_id*, so repeating the
    report after a lost reply completes it.
    """
    check = ops.report_usage(attempt, usage, report_id, apply=False)
    known = yield from ops.call(check)
    if known.already_applied:
        return ReportUsageResult(UsageVerdict.ALREADY_APPLIED)
    result = ReportUsageResult(UsageVerdict.OK)
    charged: list[str] = []
    try:
        for budget_id in known.budget_ids:
            charge = ops.charge_budget(
                budget_id, attempt.execution_id, report_id, usage, _WINDOW_MS
            )
            answer = yield from ops.call(charge)
            if answer.verdict is UsageVerdict.HARD_BREACH:
                with applied_in_part():
                    yield from _release(charged, attempt.execution_id, report_id)
                return answer
            charged.append(budget_id)
            if answer.verdict is UsageVerdict.SOFT_BREACH and result.verdict is UsageVerdict.OK:
                result = answer
        apply = ops.report_usage(attempt, usage, report_id, apply=True)
        yield from ops.call(apply)
    except FFError as error:
        # After an unknown outcome the caller repeats the report, which completes it; a release would undo it.
        if error.outcome is Outcome.NOT_APPLIED and not error.retryable:
            with applied_in_part():
                yield from _release(charged, attempt.execution_id, report_id)
        elif charged:
            make_unknown(error, "Some budgets were charged.")
        raise
    return result


def _release(budget_ids: list[str], execution_id: str, report_id: str) -> Steps[None]:
    """Release the charges of one report from these budgets."""
    for budget_id in budget_ids:
        yield from ops.call(ops.release_charge(budget_id, execution_id, report_id))
