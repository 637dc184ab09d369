"""The blocking worker: claims executions, calls handlers on threads, and performs the core's actions."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Concatenate, NoReturn, ParamSpec, TypeVar

from ff_fast import _process
from ff_fast._core import operations, slots
from ff_fast._core import worker as worker_core
from ff_fast._core.binding import dressed
from ff_fast._core.handlers import Worker, check_handler, is_coroutine_function
from ff_fast._core.slots import Attend
from ff_fast._core.worker import (
    Action,
    CallHandler,
    CloseWriter,
    Raised,
    Returned,
    Run,
    TaskReleased,
    TaskState,
    UseWriter,
    WaitLost,
    forwarded,
    is_handlers_own,
)
from ff_fast._core.writer import store_and_close
from ff_fast._sync.leases import LeaseKeeper
from ff_fast._sync.operations import drive
from ff_fast._sync.writers import Writer
from ff_fast.errors import InvalidInput, InvalidType, StaleOwner
from ff_fast.types import OnCancel

if TYPE_CHECKING:
    from contextlib import AbstractContextManager
    from datetime import timedelta

    from ff_fast._core.deployment import Deployment
    from ff_fast._core.operations import Call, WorkerOptions
    from ff_fast._sync.operations import Operations
    from ff_fast.types import Handle, ResumeSignal, SuspendOutcome

P = ParamSpec("P")
T = TypeVar("T")

_LEAVE_LOOK_S = 0.01

Handler = Callable[["Task"], bytes | str | None]


def of_task(
    make: Callable[Concatenate[Deployment, Handle, P], Call[T]],
) -> Callable[Concatenate[Task, P], T]:
    """Return a task's method that runs an operation on the task's handle."""

    def method(self: Task, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self._backend._do(make(self._backend._deployment, self.handle, *args, **kwargs))

    return dressed("Task", method, make, hidden=2)


def releasing(
    make: Callable[Concatenate[Deployment, Handle, P], Call[Any]],
) -> Callable[Concatenate[Task, P], NoReturn]:
    """Return a task's method that releases the lease, and leaves the handler."""

    def method(self: Task, /, *args: P.args, **kwargs: P.kwargs) -> NoReturn:
        call = make(self._backend._deployment, self.handle, *args, **kwargs)
        self._close()
        self._backend._do(call)
        self._released = True
        raise TaskReleased

    return dressed("Task", method, make, "NoReturn", hidden=2)


def suspending(
    make: Callable[Concatenate[Deployment, Handle, P], Call[SuspendOutcome]],
) -> Callable[Concatenate[Task, P], tuple[ResumeSignal, ...]]:
    """Return a task's method that suspends it; it returns only if the condition was met already."""

    def method(self: Task, /, *args: P.args, **kwargs: P.kwargs) -> tuple[ResumeSignal, ...]:
        call = make(self._backend._deployment, self.handle, *args, **kwargs)
        self._close()
        if not self._backend._do(call).already_satisfied:
            self._released = True
            raise TaskReleased
        self._current_writer = self._backend.open_writer(self.handle, **self._writing)
        self.signals = self._backend.observe_signals(self.handle)
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

    def wait_cancelled(self, timeout: float | timedelta | None = None) -> bool:
        """Wait until the handler should stop; see `cancelled`.

        Args:
            timeout: Longest wait, in seconds or as a ``timedelta``; None has no limit.

        Returns:
            Whether it should stop; False after *timeout*.
        """
        assert self._keeper is not None
        return self.cancelled or self._keeper.wait_cancelled(timeout) or self.cancelled

    def _close(self) -> None:
        """Close the writer before the handler gives the lease up: what was written has reached its level."""
        if self._current_writer is not None:
            self._current_writer.close()

    def _store_and_close(self, timeout_s: float | None) -> None:
        """Store all written frames, and close the writer."""
        writer = self._current_writer
        if writer is not None:
            writer._wait(store_and_close(writer, timeout_s))


class WorkerLoop:
    """Claims executions of one lane and runs a handler for each, on *concurrency* threads."""

    def __init__(
        self, backend: Operations, handler: Handler | Worker, options: WorkerOptions
    ) -> None:
        self.lifespan: Callable[[Any], AbstractContextManager[Any]] | None = None
        coroutines = is_coroutine_function(handler)
        if isinstance(handler, Worker):
            options = handler._offering(options)
            self.lifespan = handler.lifespan
            coroutines = handler.is_async
            handler = handler._dispatch
        check_handler(handler)
        if coroutines:
            raise InvalidType(
                "handler must be an ordinary function; coroutines are for ff_fast.aio."
            )
        if options.on_cancel is OnCancel.CANCEL:
            raise InvalidInput(
                "OnCancel.CANCEL is for ff_fast.aio: a thread cannot be interrupted. Leave on_cancel out, and let the"
                " handler look at task.cancelled or call task.wait_cancelled."
            )
        self._backend = backend
        self._handler = handler
        self._options = options
        # The caller's event may be shared with other workers, so this loop never sets it.
        self._halt = threading.Event()
        self._signalled = False
        self._drain = slots.Drain(options.drain_s, options.stop)
        self._tasks: set[Task] = set()
        self._context: object = None
        self._error: BaseException | None = None

    def run(self) -> None:
        """Run until the caller's event, SIGTERM or SIGINT (in the main thread), or the backend's close."""
        if self.lifespan is None:
            self._run()
            return
        with self.lifespan(self._backend) as self._context:
            self._run()

    def _run(self) -> None:
        slots.say_started(self._options)
        restore = _process.on_stop_signals(self._on_signal, twice=self._drain.limited)
        threads = [
            threading.Thread(target=self._slot, name=f"ff_fast worker {index}", daemon=True)
            for index in range(self._options.concurrency)
        ]
        started: list[threading.Thread] = []
        try:
            try:
                for thread in threads:
                    thread.start()
                    started.append(thread)
            except RuntimeError as error:
                # Start no more threads; the running ones finish their executions.
                self._stopped_by(error)
            while alive := [thread for thread in started if thread.is_alive()]:
                # A join without a timeout cannot be interrupted by a signal on every platform.
                alive[0].join(0.1)
                if self._signalled:
                    self._halt.set()
                if self._drain.over(stopping=self._stopping):
                    self._halt.set()
                    self._leave_behind(started)
                    break
        finally:
            restore()
            self._halt.set()
            slots.say_stopped(self._options, self._error)
        if self._error is not None:
            raise self._error

    def _on_signal(self) -> None:
        # A flag, not an event: the interrupted main thread may hold the event's lock.
        if self._signalled:
            self._drain.hurry()
        self._signalled = True

    def _leave_behind(self, threads: list[threading.Thread]) -> None:
        """Hand back the executions whose handlers still run; a thread cannot be interrupted."""
        until = time.monotonic() + worker_core.HAND_BACK_S
        left: set[Task] = set()
        # The others end when their claims do; what such a claim brings is handed back too.
        while time.monotonic() < until and (
            not self._tasks <= left
            or sum(map(threading.Thread.is_alive, threads)) > len(self._tasks)
        ):
            for task in self._tasks - left:
                left.add(task)
                error = StaleOwner(worker_core.STOPPED)
                actions = worker_core.hand_back(self._backend, task, error)
                drive(actions, partial(self._perform, task))
                if task._keeper is not None:
                    task._keeper._abandon(error)
            time.sleep(_LEAVE_LOOK_S)

    def _stopped_by(self, error: BaseException) -> None:
        if self._error is None:
            self._error = error
        self._halt.set()

    @property
    def _stopping(self) -> bool:
        stop = self._options.stop
        return (
            self._halt.is_set()
            or self._signalled
            or self._backend.closed
            or (stop is not None and stop.is_set())
        )

    def _slot(self) -> None:
        serving = slots.serve(self._backend, self._options, lambda: self._stopping, self._halt.set)
        try:
            drive(serving, self._perform_slot)
        except BaseException as error:  # noqa: BLE001 - raised again by run()
            self._stopped_by(error)

    def _perform_slot(self, action: Run | Attend | operations.Rest) -> object:
        match action:
            case Run(call):
                return self._backend._do(call)
            case Attend(handle):
                return self.run_one(handle)
            case operations.Rest(seconds):
                self._pause(seconds)
        return None

    def _pause(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while not self._stopping and (left := until - time.monotonic()) > 0:
            self._halt.wait(min(left, operations.CLAIM_WAIT_S))

    def run_one(self, handle: Handle) -> bool:
        """Run the handler for one claimed execution, and end the execution; return whether it is over for this worker."""
        options = self._options
        task = Task(self._backend, handle, options.mode, options.level, options.worker_id)
        task.context, task._named = self._context, options.named
        with (
            self._backend._attending,
            self._backend.keep_lease(handle) as task._keeper,
        ):
            self._tasks.add(task)
            try:
                return drive(worker_core.attend(self._backend, task), partial(self._perform, task))
            finally:
                self._tasks.discard(task)

    def _perform(self, task: Task, action: Action) -> object:
        match action:
            case Run(call):
                return self._backend._do(call)
            case UseWriter(state):
                task._current_writer = self._backend._use_writer(state)
            case CallHandler():
                return self._call(task)
            case CloseWriter(timeout_s):
                task._store_and_close(timeout_s)
            case WaitLost(seconds):
                assert task._keeper is not None
                task._keeper.wait_lost(seconds)
        return None

    def _call(self, task: Task) -> Returned | Raised:
        try:
            return Returned(self._handler(task))
        except BaseException as error:
            if not is_handlers_own(error):
                raise
            return Raised(error)
