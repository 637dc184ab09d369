"""What both shells' workers share, without I/O: when to renew, what a handler's result and exception mean."""

from __future__ import annotations

from typing import NamedTuple

from ff_fast.errors import FFError
from ff_fast.types import FailureClass, FailureReason, payload_bytes

RENEW_AT = 1 / 3
"""A lease is renewed when this share of it has passed, so that two renewals may fail before it lapses."""

CLAIM_WAIT_S = 1.0
"""How long a worker waits for work before it looks whether it shall stop."""

_LONGEST_MESSAGE = 4_096


class TaskGaveUp(BaseException):
    """Raised inside a handler by ``suspend``, ``delay`` and ``wait_children``: the lease is given up, the handler is
    called again when the execution goes on. Let it pass."""


class TaskFailed(Exception):  # noqa: N818 - what the handler reports
    """Raise it in a handler to end the attempt as failed, with a class that decides about retries.

    Args:
        reason: Why, as text or a ``FailureReason``.
        failure_class: What kind of failure it is.
    """

    def __init__(
        self,
        reason: FailureReason | str,
        failure_class: FailureClass = FailureClass.PERMANENT,
    ) -> None:
        self.reason = FailureReason(message=reason) if isinstance(reason, str) else reason
        self.failure_class = failure_class
        super().__init__(self.reason.message)


class Failure(NamedTuple):
    """What `fail` is called with."""

    reason: FailureReason
    failure_class: FailureClass


def failure_of(error: BaseException) -> Failure:
    """Return what an exception of a handler means: transient, unless it says otherwise itself."""
    if isinstance(error, TaskFailed):
        return Failure(error.reason, error.failure_class)
    text = f"{type(error).__name__}: {error}"
    clean = text.encode("utf-8", "replace")[:_LONGEST_MESSAGE].decode("utf-8", "ignore")
    return Failure(FailureReason(message=clean), FailureClass.TRANSIENT)


def result_of(value: object) -> bytes:
    """Return a handler's result as bytes; None is no result.

    Raises:
        InvalidType: It is neither None, bytes nor text.
    """
    return b"" if value is None else payload_bytes(value, "The result of a handler")


def is_lease_lost(error: FFError) -> bool:
    """Whether an error says that the execution is somebody else's, or ended."""
    return error.code in (
        "stale_owner",
        "lease_expired",
        "execution_not_active",
        "execution_not_found",
        "stream_closed",
        "suspended",
        "writer_superseded",
    )
