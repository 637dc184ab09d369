"""Times of lease renewals, and the errors that mean a lost lease."""

from __future__ import annotations

import time

from ff_fast.errors import FFError, LeaseExpired

RENEW_AT = 1 / 3
"""Share of a lease after which it is renewed; the rest leaves time for failed renewals."""

_LONGEST_PERIOD_S = 3_600.0


def is_lease_lost(error: FFError) -> bool:
    """Return whether an error means that another worker owns the execution, that it has ended, or that the claim is lost."""
    return error.code in (
        "stale_owner",
        "state_lost",
        "lease_expired",
        "execution_not_active",
        "execution_not_found",
        "stream_closed",
        "suspended",
        "writer_superseded",
    )


class LeaseClock:
    """Times of a lease's renewals by the local clock. The server's clock decides when the lease lapses.

    Attributes:
        wait_s: Seconds until the next renewal.
        held_until: When the lease lapses unless it is renewed, in monotonic time.
    """

    __slots__ = ("_period_s", "_sent_at", "_ttl_s", "held_until", "wait_s")

    def __init__(self, lease_ttl_ms: int) -> None:
        self._ttl_s = lease_ttl_ms / 1000
        self._period_s = min(self._ttl_s * RENEW_AT, _LONGEST_PERIOD_S)
        self._sent_at = time.monotonic()
        self.wait_s = self._period_s
        self.held_until = self._sent_at + self._ttl_s

    @property
    def held(self) -> bool:
        return time.monotonic() < self.held_until

    def sending(self) -> None:
        """Note the time before a renewal is sent: the renewed lease begins no earlier."""
        self._sent_at = time.monotonic()

    def renewed(self) -> None:
        self.wait_s = self._period_s
        self.held_until = self._sent_at + self._ttl_s

    def failed(self, error: FFError) -> FFError | None:
        """Return the error with which the lease is lost, or None to retry the failed renewal."""
        if is_lease_lost(error) or not error.retryable:
            return error
        if not self.held:
            return LeaseExpired("The lease could not be renewed before it lapsed.")
        self.wait_s = self._period_s / 4
        return None
