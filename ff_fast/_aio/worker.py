"""The asyncio worker: claims, awaits the handler, renews, streams, ends."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import inspect
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, NoReturn

from ff_fast._aio.leases import LeaseKeeper
from ff_fast._aio.writers import Writer
from ff_fast._core.worker import (
    CANCEL_REASON,
    CLAIM_WAIT_S,
    END_AGAIN_S,
    HAND_BACK_S,
    TaskFailed,
    TaskGaveUp,
    TaskState,
    claim_arguments,
    failure_of,
    gave_up,
    is_lease_lost,
    on_stop_signals,
    result_of,
)
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

    from ff_fast._aio.operations import Operations

Handler = Callable[["Task"], Awaitable[bytes | str | None]]


class Task(TaskState[Writer, LeaseKeeper]):
    """One execution, as a handler sees it; its attributes are those of :class:`ff_fast.Task`."""

    def __init__(self, backend: Operations, handle: Handle, mode: StreamMode | None) -> None:
        super().__init__(handle)
        self._backend = backend
        self._mode = mode
        self._opening = asyncio.Lock()

    async def load(self) -> None:
        """Read what the handler starts from."""
        self.payload = await self._backend.read_payload(self.handle)
        if self.resumed:
            self.signals = await self._backend.observe_signals(self.handle)

    async def open(self) -> Writer:
        """Return the writer of the attempt, opened when it is first asked for; `write` needs it open."""
        # Two tasks of a handler that opened one each would supersede each other.
        async with self._opening:
            if self._lost is not None:
                raise copy.copy(self._lost)
            if self._writer is None or isinstance(self._writer.error, WriterClosed):
                self._cancel_requested = self.cancel_requested
                self._writer = await self._backend.open_writer(self.handle, mode=self._mode)
            return self._writer

    def write(
        self, payload: bytes | str, frame_type: str = "token", *, mode: StreamMode | None = None
    ) -> int:
        """Write one frame, without waiting; see `Writer.write`.

        Raises:
            WriterClosed: The writer is not open: await :meth:`open` first.
        """
        if self._lost is not None:
            raise copy.copy(self._lost)
        if self._writer is None or isinstance(self._writer.error, WriterClosed):
            raise WriterClosed("The task's writer is not open; await task.open() before write().")
        return self._writer.write(payload, frame_type, mode=mode)

    async def flush(self) -> AppendFrameOutcome:
        """Wait until everything that was written is stored; see `Writer.flush`."""
        return await (await self.open()).flush()

    @property
    def cancelled(self) -> bool:
        """Whether the handler should stop: a cancellation was asked for, the lease is gone, or the backend closed."""
        return self.cancel_requested or self._backend.closed or not self.holds_lease

    async def progress(self, percent: int | None = None, message: str = "") -> None:
        """Report progress; see :meth:`ff_fast.aio.ValkeyBackend.progress`."""
        await self._backend.progress(self.handle, percent, message)

    async def report_usage(self, usage: UsageDimensions) -> ReportUsageResult:
        """Report usage; see :meth:`ff_fast.aio.ValkeyBackend.report_usage`."""
        return await self._backend.report_usage(self.handle, usage)

    async def create_waitpoint(self, expires: float | timedelta = 3600.0) -> PendingWaitpoint:
        """Create a waitpoint; see :meth:`ff_fast.aio.ValkeyBackend.create_waitpoint`."""
        return await self._backend.create_waitpoint(self.handle, expires=expires)

    async def suspend(
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
        await self.close()
        outcome = await self._backend.suspend(
            self.handle, condition, timeout=timeout, on_timeout=on_timeout, reason=reason
        )
        if outcome.already_satisfied:
            self.signals = await self._backend.observe_signals(self.handle)
            return self.signals
        self.given_up = True
        raise TaskGaveUp

    async def delay(self, delay: float | timedelta) -> NoReturn:
        """Give the execution up for a while; the handler is called again then."""
        await self.close()
        await self._backend.delay(self.handle, delay)
        self.given_up = True
        raise TaskGaveUp

    async def wait_children(self) -> NoReturn:
        """Give the execution up until its children have ended; the handler is called again then."""
        await self.close()
        await self._backend.wait_children(self.handle)
        self.given_up = True
        raise TaskGaveUp

    async def close(self) -> None:
        """Store everything that was written, and close the writer."""
        if self._writer is not None:
            await self._writer.close()


class WorkerLoop:
    """Claims executions of one lane and awaits a handler for each, as many at once as *concurrency* says."""

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
        stop: asyncio.Event | None,
    ) -> None:
        if not callable(handler):
            raise InvalidType("handler must be a coroutine function.")
        self._backend = backend
        self._handler = handler
        self._claim = claim_arguments(
            lane, worker_id, worker_instance_id, capabilities, lease_ttl_ms
        )
        self._mode = mode
        self._concurrency = concurrency
        self._stop = stop
        # Its own, as the caller's event may stop other workers too.
        self._halt = asyncio.Event()
        self._error: BaseException | None = None

    async def run(self) -> None:
        """Run until told to stop or, in the main thread, by SIGTERM or SIGINT; or until the backend is closed."""
        loop = asyncio.get_running_loop()
        restore = on_stop_signals(lambda: _tell(loop, self._halt))
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(self._concurrency):
                    group.create_task(self._slot())
        finally:
            restore()
            self._halt.set()
        if self._error is not None:
            raise self._error

    @property
    def _stopping(self) -> bool:
        return (
            self._halt.is_set()
            or self._backend.closed
            or (self._stop is not None and self._stop.is_set())
        )

    async def _slot(self) -> None:
        try:
            while not self._stopping:
                try:
                    handle = await self._backend.claim(**self._claim)
                except FFError as error:
                    if self._backend.closed:
                        return
                    if not error.retryable:
                        raise
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(CLAIM_WAIT_S):
                            await self._halt.wait()
                    continue
                if handle is not None:
                    # Also when it is time to stop: it is claimed.
                    await self.run_one(handle)
        except asyncio.CancelledError:
            raise
        except BaseException as error:  # noqa: BLE001 - raised again by run(), when the other slots have ended
            if self._error is None:
                self._error = error
            self._halt.set()

    async def run_one(self, handle: Handle) -> None:
        """Run the handler for one claimed execution, and end it as the handler ended.

        What is not the handler's failure (a cancelled worker, an interrupt, an exit, a bug) hands the execution back to
        other workers.
        """
        task = Task(self._backend, handle, self._mode)
        try:
            async with self._backend.keep_lease(handle, task.lost) as task.keeper:
                try:
                    await task.load()
                except FFError as error:
                    if is_lease_lost(error):
                        return
                    if not error.retryable:
                        raise
                    await self._hand_back(task, error)
                else:
                    await self._handle(task)
        except BaseException as error:
            await self._hand_back(task, error)
            raise

    async def _handle(self, task: Task) -> None:
        try:
            result = result_of(await self._call(task))
            await task.close()
        except TaskGaveUp as error:
            if not task.given_up:
                await self._failed(task, error)
        except asyncio.CancelledError as error:
            current = asyncio.current_task()
            if current is not None and current.cancelling():
                raise
            # Not of the worker: something that the handler waited for was cancelled.
            await self._failed(task, error)
        except (Exception, BaseExceptionGroup) as error:
            if isinstance(error, Exception) or gave_up(error):
                await self._failed(task, error)
            else:
                raise
        else:
            if task.cancel_requested:
                await self._end(task, lambda: self._cancel(task))
                return
            try:
                await self._end(task, lambda: self._backend.complete(task.handle, result))
            except FFError as error:
                # Refused for what it is, as a result that is too large.
                await self._failed(task, error)

    async def _call(self, task: Task) -> object:
        returned: object = self._handler(task)
        if not inspect.isawaitable(returned):
            raise TaskFailed("The handler is not a coroutine function.")
        result: object = await returned
        return result

    async def _failed(self, task: Task, error: BaseException) -> None:
        # What could not be stored is on the writer's error; the failure itself is what counts.
        with contextlib.suppress(FFError):
            await task.close()
        if task.cancel_requested:
            # Failed because it was to stop: it must not be tried again.
            await self._end(task, lambda: self._cancel(task))
        else:
            await self._end(task, lambda: self._backend.fail(task.handle, *failure_of(error)))

    async def _cancel(self, task: Task) -> None:
        asked = (await self._backend.describe(task.execution_id)).cancellation_reason
        await self._backend.cancel(task.execution_id, reason=asked or CANCEL_REASON)

    async def _end(self, task: Task, call: Callable[[], Awaitable[object]]) -> None:
        """End the execution, as long as it is ours: what the handler did is not lost to a server that is away."""
        keeper = task.keeper
        assert keeper is not None
        while task.holds_lease and not self._backend.closed:
            try:
                await call()
            except FFError as error:
                if is_lease_lost(error):
                    return
                if not error.retryable:
                    raise
                await keeper.wait_lost(END_AGAIN_S)
            else:
                return

    async def _hand_back(self, task: Task, error: BaseException) -> None:
        """Let another worker have it now rather than when the lease lapses; counted as a lost worker."""
        if task.given_up or self._backend.closed:
            return
        with contextlib.suppress(FFError, TimeoutError):
            async with asyncio.timeout(HAND_BACK_S):
                with contextlib.suppress(FFError):
                    await task.close()
                await self._backend.fail(
                    task.handle, failure_of(error).reason, FailureClass.INFRA_CRASH
                )


def _tell(loop: asyncio.AbstractEventLoop, event: asyncio.Event) -> None:
    """Set an event of a loop from a signal handler."""
    with contextlib.suppress(RuntimeError):
        # A loop that is closed runs no worker any more.
        loop.call_soon_threadsafe(event.set)
