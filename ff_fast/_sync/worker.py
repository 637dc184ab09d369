"""The blocking worker: claims, calls the handler, renews, streams, ends."""

from __future__ import annotations

import contextlib
import copy
import inspect
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

from ff_fast._core.worker import (
    CANCEL_REASON,
    CLAIM_WAIT_S,
    END_AGAIN_S,
    TaskGaveUp,
    TaskState,
    claim_arguments,
    failure_of,
    gave_up,
    is_lease_lost,
    on_stop_signals,
    result_of,
)
from ff_fast._sync.leases import LeaseKeeper
from ff_fast._sync.writers import Writer
from ff_fast.errors import FFError, InvalidType, WriterClosed
from ff_fast.types import (
    AppendFrameOutcome,
    CapabilitySet,
    FailureClass,
    Handle,
    PendingWaitpoint,
    ReportUsageResult,
    ResumeCondition,
    ResumeSignal,
    StreamMode,
    TimeoutBehavior,
    UsageDimensions,
)

if TYPE_CHECKING:
    from datetime import timedelta

    from ff_fast._sync.operations import Operations

Handler = Callable[["Task"], bytes | str | None]


class Task(TaskState[Writer, LeaseKeeper]):
    """One execution, as a handler sees it.

    Attributes:
        handle: Its handle.
        execution_id: Its id.
        attempt_index: Which attempt this is, from 0.
        resumed: Whether the execution goes on after a suspension, a delay, waiting for children, or a lost worker.
        payload: What the execution was created with.
        signals: The signals that ended its last suspension.
    """

    def __init__(self, backend: Operations, handle: Handle, mode: StreamMode | None) -> None:
        super().__init__(handle)
        self._backend = backend
        self._mode = mode
        self._opening = threading.Lock()

    def load(self) -> None:
        """Read what the handler starts from."""
        self.payload = self._backend.read_payload(self.handle)
        if self.resumed:
            self.signals = self._backend.observe_signals(self.handle)

    @property
    def writer(self) -> Writer:
        """The writer of the attempt, opened when it is first asked for."""
        # Two threads of a handler that opened one each would supersede each other.
        with self._opening:
            if self._lost is not None:
                raise copy.copy(self._lost)
            if self._writer is None or isinstance(self._writer.error, WriterClosed):
                self._cancel_requested = self.cancel_requested
                self._writer = self._backend.open_writer(self.handle, mode=self._mode)
            return self._writer

    def write(
        self, payload: bytes | str, frame_type: str = "token", *, mode: StreamMode | None = None
    ) -> int:
        """Write one frame; see `Writer.write`."""
        return self.writer.write(payload, frame_type, mode=mode)

    def flush(self) -> AppendFrameOutcome:
        """Wait until everything that was written is stored; see `Writer.flush`."""
        return self.writer.flush()

    @property
    def cancelled(self) -> bool:
        """Whether the handler should stop: a cancellation was asked for, the lease is gone, or the backend closed."""
        return self.cancel_requested or self._backend.closed or not self.holds_lease

    def progress(self, percent: int | None = None, message: str = "") -> None:
        """Report progress; see :meth:`ff_fast.ValkeyBackend.progress`."""
        self._backend.progress(self.handle, percent, message)

    def report_usage(self, usage: UsageDimensions) -> ReportUsageResult:
        """Report usage; see :meth:`ff_fast.ValkeyBackend.report_usage`."""
        return self._backend.report_usage(self.handle, usage)

    def create_waitpoint(self, expires: float | timedelta = 3600.0) -> PendingWaitpoint:
        """Create a waitpoint; see :meth:`ff_fast.ValkeyBackend.create_waitpoint`."""
        return self._backend.create_waitpoint(self.handle, expires=expires)

    def suspend(
        self,
        condition: ResumeCondition,
        *,
        timeout: float | timedelta | None = None,
        on_timeout: TimeoutBehavior = TimeoutBehavior.FAIL,
        reason: str = "waiting_for_signal",
    ) -> tuple[ResumeSignal, ...]:
        """Give the execution up until *condition* is met; the handler is called again then.

        Returns:
            Only where signals that came before meet the condition already: those signals.
        """
        self.close()
        outcome = self._backend.suspend(
            self.handle, condition, timeout=timeout, on_timeout=on_timeout, reason=reason
        )
        if outcome.already_satisfied:
            self.signals = self._backend.observe_signals(self.handle)
            return self.signals
        self.given_up = True
        raise TaskGaveUp

    def delay(self, delay: float | timedelta) -> NoReturn:
        """Give the execution up for a while; the handler is called again then."""
        self.close()
        self._backend.delay(self.handle, delay)
        self.given_up = True
        raise TaskGaveUp

    def wait_children(self) -> NoReturn:
        """Give the execution up until its children have ended; the handler is called again then."""
        self.close()
        self._backend.wait_children(self.handle)
        self.given_up = True
        raise TaskGaveUp

    def close(self) -> None:
        """Store everything that was written, and close the writer."""
        if self._writer is not None:
            self._writer.close()


class WorkerLoop:
    """Claims executions of one lane and runs a handler for each, on as many threads as *concurrency* says."""

    def __init__(
        self,
        backend: Operations,
        handler: Handler,
        *,
        lane: str,
        worker_id: str,
        worker_instance_id: str | None,
        capabilities: CapabilitySet | None,
        lease_ttl_ms: int,
        mode: StreamMode | None,
        concurrency: int,
        stop: threading.Event | None,
    ) -> None:
        if inspect.iscoroutinefunction(handler) or not callable(handler):
            raise InvalidType(
                "handler must be an ordinary function; coroutines are for ff_fast.aio."
            )
        self._backend = backend
        self._handler = handler
        self._claim = claim_arguments(
            lane, worker_id, worker_instance_id, capabilities, lease_ttl_ms
        )
        self._mode = mode
        self._concurrency = concurrency
        self._stop = stop
        # Its own, as the caller's event may stop other workers too.
        self._halt = threading.Event()
        self._signalled = False
        self._error: BaseException | None = None

    def run(self) -> None:
        """Run until told to stop or, in the main thread, by SIGTERM or SIGINT; or until the backend is closed."""
        restore = on_stop_signals(self._on_signal)
        threads = [
            threading.Thread(target=self._slot, name=f"ff_fast worker {index}", daemon=True)
            for index in range(self._concurrency)
        ]
        started: list[threading.Thread] = []
        try:
            try:
                for thread in threads:
                    thread.start()
                    started.append(thread)
            except RuntimeError as error:
                # No more threads: those that run end what they have begun.
                self._stopped_by(error)
            for thread in started:
                # A join without a limit cannot be interrupted by a signal on every platform.
                while thread.is_alive():
                    thread.join(0.1)
                    if self._signalled:
                        self._halt.set()
        finally:
            restore()
            self._halt.set()
        if self._error is not None:
            raise self._error

    def _on_signal(self) -> None:
        # No event: its lock may be the one that the main thread holds just now.
        self._signalled = True

    def _stopped_by(self, error: BaseException) -> None:
        if self._error is None:
            self._error = error
        self._halt.set()

    @property
    def _stopping(self) -> bool:
        return (
            self._halt.is_set()
            or self._signalled
            or self._backend.closed
            or (self._stop is not None and self._stop.is_set())
        )

    def _slot(self) -> None:
        try:
            while not self._stopping:
                try:
                    handle = self._backend.claim(**self._claim)
                except FFError as error:
                    if self._backend.closed:
                        return
                    if not error.retryable:
                        raise
                    self._halt.wait(CLAIM_WAIT_S)
                    continue
                if handle is not None:
                    # Also when it is time to stop: it is claimed.
                    self.run_one(handle)
        except BaseException as error:  # noqa: BLE001 - raised again by run()
            self._stopped_by(error)

    def run_one(self, handle: Handle) -> None:
        """Run the handler for one claimed execution, and end it as the handler ended.

        What is not the handler's failure (an interrupt, an exit, a bug) hands the execution back to other workers.
        """
        task = Task(self._backend, handle, self._mode)
        try:
            with self._backend.keep_lease(handle, task.lost) as task.keeper:
                try:
                    task.load()
                except FFError as error:
                    if is_lease_lost(error):
                        return
                    if not error.retryable:
                        raise
                    self._hand_back(task, error)
                else:
                    self._handle(task)
        except BaseException as error:
            self._hand_back(task, error)
            raise

    def _handle(self, task: Task) -> None:
        try:
            result = result_of(self._handler(task))
            task.close()
        except TaskGaveUp as error:
            if not task.given_up:
                self._failed(task, error)
        except (Exception, BaseExceptionGroup) as error:
            if isinstance(error, Exception) or gave_up(error):
                self._failed(task, error)
            else:
                raise
        else:
            if task.cancel_requested:
                self._end(task, lambda: self._cancel(task))
                return
            try:
                self._end(task, lambda: self._backend.complete(task.handle, result))
            except FFError as error:
                # Refused for what it is, as a result that is too large.
                self._failed(task, error)

    def _failed(self, task: Task, error: BaseException) -> None:
        # What could not be stored is on the writer's error; the failure itself is what counts.
        with contextlib.suppress(FFError):
            task.close()
        if task.cancel_requested:
            # Failed because it was to stop: it must not be tried again.
            self._end(task, lambda: self._cancel(task))
        else:
            self._end(task, lambda: self._backend.fail(task.handle, *failure_of(error)))

    def _cancel(self, task: Task) -> None:
        asked = self._backend.describe(task.execution_id).cancellation_reason
        self._backend.cancel(task.execution_id, reason=asked or CANCEL_REASON)

    def _end(self, task: Task, call: Callable[[], object]) -> None:
        """End the execution, as long as it is ours: what the handler did is not lost to a server that is away."""
        keeper = task.keeper
        assert keeper is not None
        while task.holds_lease and not self._backend.closed:
            try:
                call()
            except FFError as error:
                if is_lease_lost(error):
                    return
                if not error.retryable:
                    raise
                keeper.wait_lost(END_AGAIN_S)
            else:
                return

    def _hand_back(self, task: Task, error: BaseException) -> None:
        """Let another worker have it now rather than when the lease lapses; counted as a lost worker."""
        if task.given_up or self._backend.closed:
            return
        with contextlib.suppress(FFError):
            self._backend.fail(task.handle, failure_of(error).reason, FailureClass.INFRA_CRASH)
