"""Renewal of leases in the background."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Self

from ff_fast._core.leases import KeeperState
from ff_fast._core.writer import timeout_s
from ff_fast.errors import FFError

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import timedelta
    from types import TracebackType

    from ff_fast._core.leases import LeaseClock
    from ff_fast.types import LeaseRenewal


class LeaseKeeper(KeeperState):
    """Renews a lease in the background until it is stopped or lost. A context manager.

    Made by :meth:`ff_fast.ValkeyBackend.keep_lease`. Closing the backend stops it too.

    Attributes:
        error: Error with which the lease was lost; None while it is held.
        cancel_requested: Whether the worker is asked to stop; a push, an append or a renewal says so.
    """

    def __init__(
        self,
        clock: LeaseClock,
        renew: Callable[[float], LeaseRenewal],
        fail: Callable[[FFError], None],
        on_lost: Callable[[FFError], None],
        leave: Callable[[LeaseKeeper], None],
    ) -> None:
        super().__init__(clock, fail)
        self._renew = renew
        self._on_lost = on_lost
        self._leave = leave
        # Set when the lease is to be renewed now, and when the keeper is to end.
        self._due = threading.Event()
        self._over = threading.Event()
        self._told = threading.Event()
        self._thread = threading.Thread(target=self._main, name="ff_fast lease", daemon=True)
        self._thread.start()

    def wait_lost(self, seconds: float) -> bool:
        """Wait at most *seconds* until the lease is lost or the keeper is stopped; return whether it is lost."""
        self._over.wait(seconds)
        return not self.held

    def wait_cancelled(self, timeout: float | timedelta | None = None) -> bool:
        """Wait until a cancellation is requested, or the lease is lost, or the keeper is stopped.

        Args:
            timeout: Longest wait, in seconds or as a ``timedelta``; None has no limit.

        Returns:
            Whether the worker should stop: a cancellation is requested, or the lease is lost.
        """
        self._told.wait(timeout_s(timeout))
        return self.cancel_requested or not self.held

    def _main(self) -> None:
        try:
            while self.error is None:
                self._due.wait(self._clock.wait_s)
                if self._stopped or self.error is not None:
                    break
                # A push that comes from now on leads to another renewal, as this one may miss what it tells.
                self._due.clear()
                self._clock.sending()
                try:
                    renewal = self._renew(self._clock.held_until)
                except FFError as error:
                    self._lose(self._clock.failed(error))
                else:
                    if self._renewed() and renewal.cancel_requested:
                        self._ask_to_stop()
        finally:
            self._leave(self)
            self._over.set()
            self._told.set()
        if self.error is not None:
            self._on_lost(self.error)

    def _renew_soon(self) -> None:
        """Renew now."""
        self._due.set()

    def _ask_to_stop(self) -> None:
        self.cancel_requested = True
        self._told.set()

    def _wake(self) -> None:
        """Let whoever waits look again whether to stop."""
        self._told.set()

    def _tell_lost(self, error: FFError) -> None:  # noqa: ARG002
        self._due.set()

    def _abandon(self, error: FFError) -> None:
        """End with *error*, without waiting for the thread."""
        self._lose(error)
        self._end()
        # The thread may be in a renewal; who waits for a loss does not wait for the end of that.
        self._over.set()
        self._told.set()

    def _end(self) -> None:
        self._stopped = True
        self._due.set()

    def stop(self) -> None:
        """Stop renewing; the lease lapses by itself unless the execution ends first."""
        self._end()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        self.stop()
