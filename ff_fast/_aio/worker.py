"""The asyncio worker: claims executions, awaits handlers in tasks, and performs the core's actions."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import time
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from typing import TYPE_CHECKING, Any, Concatenate, NoReturn, ParamSpec, TypeVar

from ff_fast import _process
from ff_fast._aio.leases import LeaseKeeper
from ff_fast._aio.operations import drive
from ff_fast._aio.writers import Writer
from ff_fast._core import operations, slots
from ff_fast._core import worker as worker_core
from ff_fast._core.binding import dressed
from ff_fast._core.handlers import Worker, check_handler
from ff_fast._core.slots import Attend
from ff_fast._core.worker import (
    Action,
    CallHandler,
    CloseWriter,
    Raised,
    Returned,
    Run,
    Stopped,
    TaskReleased,
    TaskState,
    UseWriter,
    WaitLost,
    forwarded,
    is_handlers_own,
)
from ff_fast._core.writer import store_and_close
from ff_fast.errors import InvalidType
from ff_fast.types import OnCancel

if TYPE_CHECKING:
    from datetime import timedelta

    from ff_fast._aio.operations import Operations
    from ff_fast._core.deployment import Deployment
    from ff_fast._core.operations import Call, WorkerOptions
    from ff_fast.types import Handle, ResumeSignal, SuspendOutcome

P = ParamSpec("P")
T = TypeVar("T")

_DRAIN_LOOK_S = 0.1

Handler = Callable[["Task"], Awaitable[bytes | str | None]]


def of_task(
    make: Callable[Concatenate[Deployment, Handle, P], Call[T]],
) -> Callable[Concatenate[Task, P], Coroutine[Any, Any, T]]:
    """Return a task's method that runs an operation on the task's handle."""

    async def method(self: Task, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await self._backend._do(
            make(self._backend._deployment, self.handle, *args, **kwargs)
        )

    return dressed("Task", method, make, hidden=2)


def releasing(
    make: Callable[Concatenate[Deployment, Handle, P], Call[Any]],
) -> Callable[Concatenate[Task, P], Coroutine[Any, Any, NoReturn]]:
    """Return a task's method that releases the lease, and leaves the handler."""

    async def method(self: Task, /, *args: P.args, **kwargs: P.kwargs) -> NoReturn:
        call = make(self._backend._deployment, self.handle, *args, **kwargs)
        await self._close()
        await self._backend._do(call)
        self._released = True
        raise TaskReleased

    return dressed("Task", method, make, "NoReturn", hidden=2)


def suspending(
    make: Callable[Concatenate[Deployment, Handle, P], Call[SuspendOutcome]],
) -> Callable[Concatenate[Task, P], Coroutine[Any, Any, tuple[ResumeSignal, ...]]]:
    """Return a task's method that suspends it; it returns only if the condition was met already."""

    async def method(self: Task, /, *args: P.args, **kwargs: P.kwargs) -> tuple[ResumeSignal, ...]:
        call = make(self._backend._deployment, self.handle, *args, **kwargs)
        await self._close()
        if not (await self._backend._do(call)).already_satisfied:
            self._released = True
            raise TaskReleased
        self._current_writer = await self._backend.open_writer(self.handle, **self._writing)
        self.signals = await self._backend.observe_signals(self.handle)
        return self.signals

    return dressed("Task", method, make, "tuple[ResumeSignal, ...]", hidden=2)


class Task(TaskState[Writer, LeaseKeeper]):
    __doc__ = worker_core.TASK

    _backend: Operations

    drain = forwarded(Writer.drain)
    flush = forwarded(Writer.flush)
    progress = of_task(operations.progress)
    report_usage = of_task(operations.report_usage)
    create_waitpoint = of_task(operations.create_waitpoint)
    suspend = suspending(operations.suspend)
    delay = releasing(operations.delay)
    wait_children = releasing(operations.wait_children)

    async def wait_cancelled(self, timeout: float | timedelta | None = None) -> bool:
        """Wait until the handler should stop; see `cancelled`.

        Args:
            timeout: Longest wait, in seconds or as a ``timedelta``; None has no limit.

        Returns:
            Whether it should stop; False after *timeout*.
        """
        assert self._keeper is not None
        return self.cancelled or await self._keeper.wait_cancelled(timeout) or self.cancelled

    async def _close(self) -> None:
        """Close the writer before the handler gives the lease up: what was written has reached its level."""
        if self._current_writer is not None:
            await self._current_writer.close()

    async def _store_and_close(self, timeout_s: float | None) -> None:
        """Store all written frames, and close the writer."""
        writer = self._current_writer
        if writer is not None:
            await writer._wait(store_and_close(writer, timeout_s))


class _Interrupt:
    """Cancels a handler that has to stop, and leaves no cancellation behind for the handlers that follow.

    Attributes:
        sent: Number of cancellations: at most one for the request and one for the loss of the lease.
    """

    def __init__(
        self, running: asyncio.Task[Any], keeper: LeaseKeeper, after_s: float | None
    ) -> None:
        self.sent = 0
        self._running = running
        self._keeper = keeper
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.Handle | None = None
        self._lost = False
        if after_s is not None:
            self._after_s = after_s
            keeper._on_told = self._told
            self._told()

    def _told(self) -> None:
        if self._keeper.error is not None:
            if not self._lost:
                self._lost = True
                if self._timer is not None:
                    self._timer.cancel()
                # Not here: a task that runs may leave the handler first, and would meet it behind.
                self._timer = self._loop.call_soon(self._cancel)
        elif self._keeper.cancel_requested and self._timer is None:
            self._timer = self._loop.call_later(self._after_s, self._cancel)

    def _cancel(self) -> None:
        self.sent += 1
        self._running.cancel()

    @property
    def outside(self) -> bool:
        """Whether somebody else has cancelled the task."""
        return self._running.cancelling() > self.sent

    def end(self, *, cancelled: bool) -> None:
        """Cancel no more, and take all cancellations back; one stays where somebody else has *cancelled* the handler.

        Python 3.11's task groups leave one behind where a member has failed.
        """
        self._keeper._on_told = None
        if self._timer is not None:
            self._timer.cancel()
        while self._running.cancelling() > int(cancelled):
            self._running.uncancel()


class WorkerLoop:
    """Claims executions of one lane and awaits a handler for each, *concurrency* at once."""

    def __init__(
        self, backend: Operations, handler: Handler | Worker, options: WorkerOptions
    ) -> None:
        self.lifespan: Callable[[Any], Any] | None = None
        if isinstance(handler, Worker):
            options = handler._offering(options)
            self.lifespan = handler.lifespan
            if not handler.is_async:
                raise InvalidType("The handlers must be coroutine functions.")
            handler = handler._dispatch
        check_handler(handler)
        self._backend = backend
        self._handler = handler
        self._options = options
        # The caller's event may be shared with other workers, so this loop never sets it.
        self._halt = asyncio.Event()
        self._signalled = False
        self._drain = slots.Drain(options.drain_s, options.stop)
        self._tasks: set[Task] = set()
        self._context: object = None
        self._error: BaseException | None = None
        self._cancel_after_s = (
            None if options.on_cancel is OnCancel.TELL else options.cancel_grace_s
        )

    async def run(self) -> None:
        """Run until the caller's event, SIGTERM or SIGINT (in the main thread), or the backend's close."""
        if self.lifespan is None:
            await self._run()
            return
        opened = self.lifespan(self._backend)
        if hasattr(opened, "__aenter__"):
            async with opened as self._context:
                await self._run()
        else:
            with opened as self._context:
                await self._run()

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        slots.say_started(self._options)
        restore = _process.on_stop_signals(lambda: self._on_signal(loop), twice=self._drain.limited)
        try:
            async with asyncio.TaskGroup() as group:
                count = self._options.concurrency
                try:
                    await self._ended({group.create_task(self._slot()) for _ in range(count)})
                except asyncio.CancelledError:
                    # A handler may keep its cancellation to itself: its slot ends behind it.
                    self._halt.set()
                    self._take_all()
                    raise
        finally:
            restore()
            self._halt.set()
            slots.say_stopped(self._options, self._error)
        if self._error is not None:
            raise self._error

    async def _ended(self, slots: set[asyncio.Task[None]]) -> None:
        """Wait for the slots; cancel those whose time to drain is over."""
        if not self._drain.limited:
            await asyncio.wait(slots)
            return
        while slots and not self._drain.over(stopping=self._stopping):
            _, slots = await asyncio.wait(slots, timeout=_DRAIN_LOOK_S)
        if slots:
            self._halt.set()
            self._take_all()
            for slot in slots:
                slot.cancel()
            await asyncio.wait(slots)

    def _take_all(self) -> None:
        """Take the executions from the handlers that are about to be cancelled, whatever they make of that."""
        for task in self._tasks:
            task._take()

    def _on_signal(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._signalled:
            self._drain.hurry()
        self._signalled = True
        _tell(loop, self._halt)

    @property
    def _stopping(self) -> bool:
        stop = self._options.stop
        return self._halt.is_set() or self._backend.closed or (stop is not None and stop.is_set())

    async def _slot(self) -> None:
        serving = slots.serve(self._backend, self._options, lambda: self._stopping, self._halt.set)
        try:
            await drive(serving, self._perform_slot)
        except asyncio.CancelledError:
            raise
        except BaseException as error:  # noqa: BLE001 - raised again by run(), when the other slots have ended
            if self._error is None:
                self._error = error
            self._halt.set()

    async def _perform_slot(self, action: Run | Attend | operations.Rest) -> object:
        match action:
            case Run(call):
                return await self._backend._do(call)
            case Attend(handle):
                return await self.run_one(handle)
            case operations.Rest(seconds):
                await self._pause(seconds)
        return None

    async def _pause(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while not self._stopping and (left := until - time.monotonic()) > 0:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(left, operations.CLAIM_WAIT_S)):
                    await self._halt.wait()

    async def run_one(self, handle: Handle) -> bool:
        """Run the handler for one claimed execution, and end the execution; return whether it is over for this worker."""
        options = self._options
        task = Task(self._backend, handle, options.mode, options.level, options.worker_id)
        task.context, task._named = self._context, options.named
        with self._backend._attending:
            async with self._backend.keep_lease(handle) as task._keeper:
                actions = worker_core.attend(self._backend, task, self._cancel_after_s)
                self._tasks.add(task)
                try:
                    return await drive(actions, partial(self._perform, task))
                finally:
                    self._tasks.discard(task)

    async def _perform(self, task: Task, action: Action) -> object:
        match action:
            case Run(call):
                return await self._backend._do(call)
            case UseWriter(state):
                task._current_writer = self._backend._use_writer(state)
            case CallHandler(cancel_after_s):
                return await self._call(task, cancel_after_s)
            case CloseWriter(timeout_s):
                await task._store_and_close(timeout_s)
            case WaitLost(seconds):
                assert task._keeper is not None
                await task._keeper.wait_lost(seconds)
        return None

    async def _call(self, task: Task, cancel_after_s: float | None) -> Returned | Raised | Stopped:
        ended = await self._ended_by(task, cancel_after_s)
        if task._taken is not None and not task._released:
            # What it returns or raises then is not the end of the attempt.
            raise asyncio.CancelledError
        return ended

    async def _ended_by(
        self, task: Task, cancel_after_s: float | None
    ) -> Returned | Raised | Stopped:
        current, keeper = asyncio.current_task(), task._keeper
        assert current is not None
        assert keeper is not None
        interrupt = _Interrupt(current, keeper, cancel_after_s)
        cancelled = False
        try:
            returned: object = self._handler(task)
            if not inspect.isawaitable(returned):
                raise worker_core.TaskFailed("The handler is not a coroutine function.")
            return Returned(await returned)
        except asyncio.CancelledError as error:
            if interrupt.outside:
                cancelled = True
                raise
            # The worker itself is not cancelled. Else the handler awaited a cancelled task.
            return Stopped() if interrupt.sent else Raised(error)
        except BaseException as error:
            if not is_handlers_own(error):
                raise
            return Raised(error)
        finally:
            interrupt.end(cancelled=cancelled)


def _tell(loop: asyncio.AbstractEventLoop, event: asyncio.Event) -> None:
    """Set an event of a loop from a signal handler."""
    with contextlib.suppress(RuntimeError):
        # A closed loop runs no worker.
        loop.call_soon_threadsafe(event.set)
