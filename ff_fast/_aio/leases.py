"""Renewal of leases in the background."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING, Any, Self

from ff_fast import _transport
from ff_fast._core.leases import LeaseClock
from ff_fast.errors import DeadlineExceeded, FFError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine
    from types import TracebackType

    from ff_fast.types import LeaseRenewal


class LeaseKeeper:
    """Renews a lease in a task of its own until it is stopped or lost: ``async with backend.keep_lease(handle)``.

    Made by :meth:`ff_fast.aio.ValkeyBackend.keep_lease`. Closing the backend stops it too.

    Attributes:
        error: Error with which the lease was lost; None while it is held.
        cancel_requested: Whether the worker is asked to stop, as of the newest renewal.
    """

    def __init__(
        self,
        lease_ttl_ms: int,
        renew: Callable[[], Awaitable[LeaseRenewal]],
        on_lost: Callable[[FFError], None],
        closed: Callable[[], bool],
    ) -> None:
        self.error: FFError | None = None
        self.cancel_requested = False
        self._renew = renew
        self._on_lost = on_lost
        self._closed = closed
        self._stopped = False
        self._clock = LeaseClock(lease_ttl_ms)
        self._over = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def _start(self, spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]]) -> None:
        self._task = spawn(self._main())
        # A callback also runs for a task that is cancelled before its first step.
        self._task.add_done_callback(self._ended)

    @property
    def held(self) -> bool:
        """Whether the lease is held, as far as this process knows."""
        return self.error is None and self._clock.held

    async def wait_lost(self, seconds: float) -> bool:
        """Wait at most *seconds* until the lease is lost or the keeper is stopped; return whether it is lost."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._over.wait()
        return self._over.is_set() or not self.held

    async def _main(self) -> None:
        clock = self._clock
        while self.error is None:
            await asyncio.sleep(clock.wait_s)
            clock.sending()
            try:
                async with asyncio.timeout(max(clock.held_until - time.monotonic(), 0.0)):
                    renewal = await self._renew()
            except FFError as error:
                self._lost(clock.failed(error))
            except TimeoutError:
                self._lost(clock.failed(DeadlineExceeded()))
            else:
                clock.renewed()
                self.cancel_requested = renewal.cancel_requested

    def _ended(self, _: object) -> None:
        self._over.set()
        if self._closed():
            self._lost(_transport.closed_error())

    def _lost(self, error: FFError | None) -> None:
        # A renewal that fails after stop() is no loss: the execution has usually ended.
        if error is not None and self.error is None and not self._stopped:
            self.error = error
            self._over.set()
            self._on_lost(error)

    async def stop(self) -> None:
        """Stop renewing; the lease lapses by itself unless the execution ends first."""
        self._stopped = True
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
