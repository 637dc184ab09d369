"""Writers, and their batches on the connection that a backend's calls and writers share."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import threading
import weakref
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Self, TypeVar

from ff_fast import _process
from ff_fast._aio.connection import BROKEN, LOST, Connection
from ff_fast._aio.nodes import CALLS_IN_FLIGHT, SharedConnection
from ff_fast._core import writer as writer_core
from ff_fast._core.binding import dressed
from ff_fast._core.steps import Retries
from ff_fast._core.writer import SharedWriter, Wait
from ff_fast._hot.writer import Outbox
from ff_fast.errors import (
    DeadlineExceeded,
    FFError,
    ForkedClient,
    FunctionMissing,
    NotPrimary,
    OutcomeUnknown,
    WriterClosed,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine
    from types import TracebackType

    from ff_fast._aio.pool import Pool
    from ff_fast._hot.writer import Call
    from ff_fast.types import BackendConfig

P = ParamSpec("P")
T = TypeVar("T")


class Sender(Outbox):
    """Sends what the writers have, many of them in one call, on the shared connection."""

    def __init__(
        self,
        shared: SharedConnection,
        prepare: Callable[[Connection], Awaitable[None]],
        spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]],
        check_thread: Callable[[], None],
        config: BackendConfig,
    ) -> None:
        self._shared = shared
        self._prepare = prepare
        self._spawn = spawn
        self._check_thread = check_thread
        self._event_loop = asyncio.get_running_loop()
        super().__init__(
            linger_ms=config.linger_ms,
            lost=(LOST, BROKEN),
            thread=threading.get_ident(),
            running=asyncio._get_running_loop,
            loop=self._event_loop,
        )
        self._recovering: asyncio.Task[None] | None = None
        self._retries = Retries(config.retry, retry_timeouts=True)
        # Whether the pump runs in this turn of the loop, and the timer that runs it later.
        self._pump_scheduled = False
        self._timer: asyncio.TimerHandle | None = None
        self._hold_scheduled = False
        self.writers: weakref.WeakSet[Writer] = weakref.WeakSet()
        shared.on_can_write = self._on_can_write
        shared.on_lost = self._on_lost
        _process.watch_fork(self)
        _process.watch_exit(self)

    def _on_wrong_thread(self) -> None:
        self._check_thread()

    def _on_ready(self) -> None:
        if not self._pump_scheduled:
            self._pump_scheduled = True
            self._event_loop.call_soon(self._pump)

    def linger(self, writer: Writer) -> None:
        self._event_loop.call_later(writer._linger_us / 1e6, writer._seal_soon)

    def _pump(self) -> None:
        """Send the calls that are due."""
        self._pump_scheduled = False
        if not self.ready or self._shared.closing or self._recovering is not None:
            return
        connection = self._shared.connection
        if connection is None or connection.closed:
            self._recover_soon(None)
            return
        if not connection.writable:
            return
        while (
            (wait_s := self.wait_s()) == 0.0
            and self._calls_in_flight < writer_core.CALLS_IN_FLIGHT
            and len(connection.receivers) < CALLS_IN_FLIGHT
            and connection.writable
        ):
            call = self.next_call()
            if call is not None:
                connection.send(call.take(), [call])
                self._shared.watch_soon()
        if wait_s > 0.0:
            self._pump_later(wait_s)
        if self.holds and not self._hold_scheduled:
            self._store_held()

    def _pump_later(self, wait_s: float) -> None:
        if self._timer is not None:
            if self._timer.when() <= self._event_loop.time() + wait_s:
                return
            # What is ready lingers no more.
            self._timer.cancel()
        self._timer = self._event_loop.call_later(wait_s, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self._pump()

    def _store_held(self) -> None:
        """Store the frames that were pushed some time ago, and come again for the others."""
        hold_s = self.hold_s()
        self._hold_scheduled = hold_s > 0.0 and not self._shared.closing
        if self._hold_scheduled:
            self._event_loop.call_later(hold_s, self._store_held)

    def _on_answer(self, call: Call) -> None:
        if call.error is not None:
            self._recover_soon(call.error)
        elif call.accepted:
            self._retries.reset()

    def _recover_soon(self, error: FFError | None) -> None:
        if self._recovering is None and not self._shared.closing:
            self._recovering = self._spawn(self._recover(error))

    async def _recover(self, error: FFError | None) -> None:
        """Back off; connect again or load the library if needed; fail the writers when the retries are used up."""
        try:
            while True:
                if error is not None:
                    pause = self._retries.pause(error)
                    if pause is None:
                        self._fail_waiting(error)
                        return
                    if isinstance(error, NotPrimary) and self._shared.connection is not None:
                        # Connect again: the host name may resolve to the new primary.
                        self._shared.connection.abort()
                    await asyncio.sleep(pause)
                try:
                    connection = await self._shared.connected()
                    if isinstance(error, FunctionMissing):
                        await self._prepare(connection)
                except FFError as failure:
                    error = failure
                else:
                    return
        finally:
            self._recovering = None
            self._pump()

    def _fail_waiting(self, error: FFError) -> None:
        # The next writer starts with all retries.
        self._retries.reset()
        for writer in self.take_ready():
            writer._fail(copy.copy(error))

    def _on_can_write(self) -> None:
        if self.ready and not self._pump_scheduled:
            self._pump()

    def _on_lost(self) -> None:
        if self.ready:
            self._recover_soon(OutcomeUnknown())

    def store_soon(self) -> None:
        """Begin to store all that is written, without waiting."""
        for writer in list(self.writers):
            writer._seal_soon()

    @property
    def stored(self) -> bool:
        """Whether all that is written is stored, or never will be."""
        return all(writer._failure is not None or writer._idle for writer in list(self.writers))

    def stop(self) -> None:
        """Fail every writer, since the backend is closed."""
        for writer in list(self.writers):
            writer._fail(WriterClosed())
        self.forget()

    def _finish_soon(self) -> None:
        """Do nothing at the end of the interpreter: the loop has ended, so nothing can be sent."""

    def _finished(self) -> bool:
        return True

    def _warn_of_losses(self) -> None:
        for writer in list(self.writers):
            writer._warn_of_losses()

    def _forked(self) -> None:
        """Fail every writer in a forked child."""
        for writer in list(self.writers):
            writer._forked()


def waiting(
    make: Callable[Concatenate[SharedWriter, P], Wait[T]],
) -> Callable[Concatenate[Writer, P], Coroutine[Any, Any, T]]:
    """Return a writer's method that performs a wait of the core."""

    async def method(self: Writer, /, *args: P.args, **kwargs: P.kwargs) -> T:
        self._pool._check_loop()
        return await self._wait(make(self, *args, **kwargs))

    return dressed("Writer", method, make)


class Writer(SharedWriter):
    """A stream of frames into one attempt. Made by :meth:`ff_fast.aio.ValkeyBackend.open_writer`.

    :meth:`write` is a plain call that never waits; it is made on the backend's loop.
    """

    def __init__(self, state: writer_core.WriterState, sender: Sender, pool: Pool) -> None:
        self._sender = sender
        self._pool = pool
        self._waiters: list[asyncio.Future[None]] = []
        super().__init__(state, sender)
        self._sender.writers.add(self)

    def _on_linger(self) -> None:
        self._pool._check_thread()
        self._sender.linger(self)

    def _forked(self) -> None:
        """Fail in a forked child, without ``unstored``: the parent still stores the frames."""
        self._waiters.clear()
        self._fail(ForkedClient(), hand_back=False)

    def _on_progress(self) -> None:
        for waiter in self._waiters:
            _notify(waiter)

    async def _wait(self, wait: Wait[T]) -> T:
        loop = asyncio.get_running_loop()
        deadline = None if wait.timeout_s is None else loop.time() + wait.timeout_s
        while not wait.done():
            if self.error is not None:
                raise copy.copy(self.error)
            if deadline is not None and loop.time() >= deadline:
                raise DeadlineExceeded
            waiter: asyncio.Future[None] = loop.create_future()
            timer = None if deadline is None else loop.call_at(deadline, _notify, waiter)
            self._waiters.append(waiter)
            self._has_waiters = True
            try:
                await waiter
            finally:
                if timer is not None:
                    timer.cancel()
                self._waiters.remove(waiter)
                self._has_waiters = bool(self._waiters)
        return wait.value()

    drain = waiting(writer_core.drain)
    flush = waiting(writer_core.flush)
    close = waiting(writer_core.close)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        if kind is None:
            await self.close()
            return
        # The block's own error is the cause; the writer's stays in `error`, with its unstored frames.
        with contextlib.suppress(FFError):
            # Bounded, so that an interrupted block ends soon.
            await self.close(self._pool._timeout_s)


def _notify(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
