"""The attempts of an execution, as the transitions of its state tell of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast, get_args

from ff_fast.types import AttemptDescription, EndReason

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ff_fast.types import StateTransition

_ENDS = {
    "completed": "attempt_success",
    "failed": "attempt_failure",
    "cancelled": "attempt_cancelled",
    "expired": "expired",
}

_REASONS = frozenset(get_args(EndReason))

_CAUSES = {
    "producer_lost": "the worker was lost: its lease lapsed, and nobody had renewed it",
    "attempt_timeout": "the attempt ran longer than its time limit",
    "suspension_timeout": "the suspension lasted longer than its time limit",
    "expired": "the deadline of the execution passed",
}

BEGUN = ("active", "suspended", "waiting_children")
"""States in which an attempt has begun, whatever is known of it."""


def _end_of(change: StateTransition) -> str | None:
    """Return why the attempt of a transition ended; None if it goes on."""
    over = _ENDS.get(change.to_state)
    if change.reason in _REASONS:
        # A suspension whose time is over may resume.
        return None if over is None and change.reason == "suspension_timeout" else change.reason
    return over


def cause_of(change: StateTransition) -> str | None:
    """Return as a clause what was lost or ran out where that ended an attempt; None where a message says why, or nothing."""
    reason = _end_of(change)
    # A message that is the reason itself is the server's.
    return _CAUSES.get(reason or "") if change.error in (None, reason) else None


def attempts_of(history: Sequence[StateTransition]) -> tuple[AttemptDescription, ...]:
    """Return what *history*, oldest first, tells of each attempt that a worker has claimed."""
    found: dict[int, AttemptDescription] = {}
    for change in history:
        index = change.attempt_index
        attempt = found.get(index)
        if change.to_state == "active":
            if attempt is None:
                found[index] = AttemptDescription(index, change.at_ms)
            continue
        if attempt is None:
            if change.from_state not in BEGUN:
                # Nobody has claimed it.
                continue
            # Its claim is older than the transitions that are known.
            attempt = found[index] = AttemptDescription(index)
        reason = _end_of(change)
        if reason is None or attempt.ended_at_ms is not None:
            continue
        cause = cause_of(change)
        error = change.error if cause is None else f"{cause[0].upper()}{cause[1:]}."
        found[index] = attempt.replace(
            ended_at_ms=change.at_ms,
            end_reason=cast("EndReason", reason),
            error=error,
            failure_class=change.failure_class,
        )
    return tuple(found[index] for index in sorted(found))
