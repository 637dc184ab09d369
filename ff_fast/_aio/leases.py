"""Renewal of leases in the background."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING, Any, Self

from ff_fast._core.leases import KeeperState
from ff_fast._core.writer import timeout_s
from ff_fast.errors import DeadlineExceeded, FFError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine
    from datetime import timedelta
    from types import TracebackType

    from ff_fast._core.leases import LeaseClock
    from ff_fast.types import LeaseRenewal


class LeaseKeeper(KeeperState):
    """Renews a lease in the background until it is stopped or lost: ``async with backend.keep_lease(handle)``.

    Made by :meth:`ff_fast.aio.ValkeyBackend.keep_lease`. Closing the backend stops it too.

    Attributes:
        error: Error with which the lease was lost; None while it is held.
        cancel_requested: Whether the worker is asked to stop; a push, an append or a renewal says so.
    """

    def __init__(
        self,
        clock: LeaseClock,
        renew: Callable[[], Awaitable[LeaseRenewal]],
        fail: Callable[[FFError], None],
        on_lost: Callable[[FFError], None],
        spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]],
        leave: Callable[[LeaseKeeper], None],
    ) -> None:
        super().__init__(clock, fail)
        self._renew = renew
        self._on_lost = on_lost
        self._spawn = spawn
        self._leave = leave
        self._over = asyncio.Event()
        self._told = asyncio.Event()
        # Called when a cancellation is requested and when the lease is lost.
        self._on_told: Callable[[], None] | None = None
        # The renewal under way, and whether a push has come meanwhile, which it may have missed.
        self._task: asyncio.Task[None] | None = None
        self._again = False
        self._loop = asyncio.get_running_loop()
        self._timer = self._loop.call_later(clock.wait_s, self._renew_soon)

    @property
    def _may_look(self) -> bool:
        # The writers belong to the loop. Elsewhere its timer finds out.
        try:
            return asyncio.get_running_loop() is self._loop
        except RuntimeError:
            return False

    async def wait_lost(self, seconds: float) -> bool:
        """Wait at most *seconds* until the lease is lost or the keeper is stopped; return whether it is lost."""
        await _set_within(self._over, seconds)
        return not self.held

    async def wait_cancelled(self, timeout: float | timedelta | None = None) -> bool:
        """Wait until a cancellation is requested, or the lease is lost, or the keeper is stopped.

        Args:
            timeout: Longest wait, in seconds or as a ``timedelta``; None has no limit.

        Returns:
            Whether the worker should stop: a cancellation is requested, or the lease is lost.
        """
        await _set_within(self._told, timeout_s(timeout))
        return self.cancel_requested or not self.held

    def _renew_soon(self) -> None:
        """Renew now."""
        self._timer.cancel()
        if self._task is not None:
            self._again = True
        elif self.error is None and not self._stopped:
            self._again = False
            self._task = self._spawn(self._renewal())
            # A callback also runs for a task that is cancelled before its first step.
            self._task.add_done_callback(self._renewal_over)

    async def _renewal(self) -> None:
        clock = self._clock
        clock.sending()
        try:
            async with asyncio.timeout(max(clock.held_until - time.monotonic(), 0.0)):
                renewal = await self._renew()
        except FFError as error:
            self._lose(clock.failed(error))
        except TimeoutError:
            self._lose(clock.failed(DeadlineExceeded()))
        else:
            if self._renewed() and renewal.cancel_requested:
                self._ask_to_stop()

    def _renewal_over(self, _: object) -> None:
        self._task = None
        if self.error is None and not self._stopped:
            wait_s = 0.0 if self._again else self._clock.wait_s
            self._timer = self._loop.call_later(wait_s, self._renew_soon)

    def _ask_to_stop(self) -> None:
        if not (self.cancel_requested or self._stopped):
            self.cancel_requested = True
            self._tell()

    def _wake(self) -> None:
        """Let whoever waits look again whether to stop."""
        self._told.set()

    def _tell_lost(self, error: FFError) -> None:
        self._timer.cancel()
        self._leave(self)
        # Not within whatever has found out: a callback that raises is the loop's to report. Before whoever waits goes on.
        self._loop.call_soon(self._on_lost, error)
        self._over.set()
        self._tell()

    _abandon = KeeperState._lose

    def _tell(self) -> None:
        self._told.set()
        if self._on_told is not None:
            self._on_told()

    def _end(self) -> None:
        self._stopped = True
        self._timer.cancel()
        self._leave(self)
        self._over.set()
        self._told.set()

    async def stop(self) -> None:
        """Stop renewing; the lease lapses by itself unless the execution ends first."""
        self._end()
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        await self.stop()


async def _set_within(event: asyncio.Event, seconds: float | None) -> None:
    """Wait until an event is set, at most *seconds*."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
