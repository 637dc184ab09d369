"""What the transitions of an execution tell of its attempts."""

import pytest

from ff_fast import AttemptDescription, FailureClass, StateTransition
from ff_fast._core.attempts import attempts_of


def change(at, before, after, attempt, reason=None, error=None, failure=None):
    return StateTransition(at, before, after, attempt, reason, error, failure)


CLAIMED = change(1, "waiting", "active", 0)
TRANSIENT = FailureClass.TRANSIENT


@pytest.mark.parametrize(
    "history, expected",
    [
        ([], []),
        ([CLAIMED], [AttemptDescription(0, 1)]),
        (
            [CLAIMED, change(2, "active", "completed", 0)],
            [AttemptDescription(0, 1, 2, "attempt_success")],
        ),
        (
            [
                CLAIMED,
                change(2, "active", "delayed", 0, "attempt_failure", "boom", TRANSIENT),
                change(3, "delayed", "waiting", 1),
                change(4, "waiting", "active", 1),
                change(5, "active", "waiting", 1, "producer_lost"),
                change(6, "waiting", "active", 2),
                change(7, "active", "failed", 2, "attempt_failure", "bang", FailureClass.PERMANENT),
            ],
            [
                AttemptDescription(0, 1, 2, "attempt_failure", "boom", TRANSIENT),
                AttemptDescription(
                    1,
                    4,
                    5,
                    "producer_lost",
                    "The worker was lost: its lease lapsed, and nobody had renewed it.",
                ),
                AttemptDescription(2, 6, 7, "attempt_failure", "bang", FailureClass.PERMANENT),
            ],
        ),
        (
            # It is continued under a later lease.
            [
                CLAIMED,
                change(2, "active", "suspended", 0, "needs a person"),
                change(3, "suspended", "waiting", 0, "suspension_timeout"),
                change(4, "waiting", "active", 0),
                change(5, "active", "expired", 0),
            ],
            [AttemptDescription(0, 1, 5, "expired", "The deadline of the execution passed.")],
        ),
        (
            # The server's word for what ran out is no message.
            [CLAIMED, change(2, "active", "expired", 0, "attempt_timeout", "attempt_timeout")],
            [
                AttemptDescription(
                    0, 1, 2, "attempt_timeout", "The attempt ran longer than its time limit."
                )
            ],
        ),
        (
            # Cancelled between two attempts: the second never began.
            [
                CLAIMED,
                change(2, "active", "delayed", 0, "attempt_failure", "boom", TRANSIENT),
                change(3, "delayed", "cancelled", 1, None, "stop it"),
            ],
            [AttemptDescription(0, 1, 2, "attempt_failure", "boom", TRANSIENT)],
        ),
        (
            # The claim is older than what is known.
            [change(9, "active", "cancelled", 4, None, "stop it")],
            [AttemptDescription(4, None, 9, "attempt_cancelled", "stop it")],
        ),
    ],
)
def test_each_attempt_has_its_own_end_and_error(history, expected):
    assert attempts_of(history) == tuple(expected)
