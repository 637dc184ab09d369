"""Renewal of leases in the background."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Self

from ff_fast._core.leases import LeaseClock
from ff_fast.errors import FFError

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from ff_fast.types import LeaseRenewal


class LeaseKeeper:
    """Renews a lease in a thread of its own until it is stopped or lost. A context manager.

    Made by :meth:`ff_fast.ValkeyBackend.keep_lease`. Closing the backend stops it too.

    Attributes:
        error: Error with which the lease was lost; None while it is held.
        cancel_requested: Whether the worker is asked to stop, as of the newest renewal.
    """

    def __init__(
        self,
        lease_ttl_ms: int,
        renew: Callable[[float], LeaseRenewal],
        on_lost: Callable[[FFError], None],
    ) -> None:
        self.error: FFError | None = None
        self.cancel_requested = False
        self._renew = renew
        self._on_lost = on_lost
        self._clock = LeaseClock(lease_ttl_ms)
        self._stop = threading.Event()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._main, name="ff_fast lease", daemon=True)
        self._thread.start()

    @property
    def held(self) -> bool:
        """Whether the lease is held, as far as this process knows."""
        return self.error is None and self._clock.held

    def wait_lost(self, seconds: float) -> bool:
        """Wait at most *seconds* until the lease is lost or the keeper is stopped; return whether it is lost."""
        return self._over.wait(seconds) or not self.held

    def _main(self) -> None:
        try:
            while self.error is None and not self._stop.wait(self._clock.wait_s):
                self._clock.sending()
                try:
                    renewal = self._renew(self._clock.held_until)
                except FFError as error:
                    self._lost(self._clock.failed(error))
                else:
                    self._clock.renewed()
                    self.cancel_requested = renewal.cancel_requested
        finally:
            self._over.set()

    def _lost(self, error: FFError | None) -> None:
        # A renewal that fails after stop() is no loss: the execution has usually ended.
        if error is not None and not self._stop.is_set():
            self.error = error
            self._over.set()
            self._on_lost(error)

    def _abandon(self, error: FFError) -> None:
        """End with *error*, without waiting for the thread."""
        self._lost(error)
        self._stop.set()

    def stop(self) -> None:
        """Stop renewing; the lease lapses by itself unless the execution ends first."""
        self._stop.set()
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
