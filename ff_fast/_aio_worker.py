"""The asyncio worker: claims, awaits the handler, renews, streams, ends."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Awaitable, Callable
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn, Self

from ff_fast._work import (
    CLAIM_WAIT_S,
    RENEW_AT,
    TaskGaveUp,
    failure_of,
    is_lease_lost,
    result_of,
)
from ff_fast.errors import FFError, WriterClosed
from ff_fast.types import (
    AppendFrameOutcome,
    CapabilitySet,
    ClaimPolicy,
    Handle,
    HandleKind,
    PendingWaitpoint,
    ReportUsageResult,
    ResumeCondition,
    ResumeSignal,
    StreamMode,
    TimeoutBehavior,
    UsageDimensions,
)

if TYPE_CHECKING:
    from ff_fast.aio import ValkeyBackend, Writer

Handler = Callable[["Task"], Awaitable[bytes | str | None]]


class LeaseKeeper:
    """Renews a lease in a task of its own until it is stopped or lost: ``async async with backend.keep_lease(handle)``.

    Attributes:
        error: Why the lease is gone; None while it is held.
    """

    def __init__(
        self,
        backend: ValkeyBackend,
        handle: Handle,
        on_lost: Callable[[FFError], None] | None = None,
    ) -> None:
        self.error: FFError | None = None
        self._backend = backend
        self._handle = handle
        self._on_lost = on_lost
        self._period_s = handle.fields().lease_ttl_ms / 1000 * RENEW_AT
        self._task = asyncio.get_running_loop().create_task(self._main())

    async def _main(self) -> None:
        held_until = time.monotonic() + self._period_s / RENEW_AT
        while True:
            await asyncio.sleep(self._period_s)
            try:
                await self._backend.renew(self._handle)
            except FFError as error:
                if is_lease_lost(error) or not error.retryable or time.monotonic() >= held_until:
                    self.error = error
                    if self._on_lost is not None:
                        self._on_lost(error)
                    return
            else:
                held_until = time.monotonic() + self._period_s / RENEW_AT

    async def stop(self) -> None:
        """Stop renewing; the lease runs out by itself unless the execution ends first."""
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


class Task:
    """One execution, as a handler sees it.

    Attributes:
        handle: Its handle.
        execution_id: Its id.
        attempt_index: Which attempt this is, from 0.
        resumed: Whether the execution goes on after a suspension, a delay, waiting for children, or a lost worker.
        payload: What the execution was created with.
        signals: The signals that ended its last suspension.
    """

    def __init__(self, backend: ValkeyBackend, handle: Handle, mode: StreamMode | None) -> None:
        self._backend = backend
        self._mode = mode
        self._writer: Writer | None = None
        self._lost: FFError | None = None
        self.handle = handle
        fields = handle.fields()
        self.execution_id = fields.execution_id
        self.attempt_index = fields.attempt_index
        self.resumed = handle.kind is HandleKind.RESUMED
        self.payload: bytes = b""
        self.signals: tuple[ResumeSignal, ...] = ()

    async def load(self) -> None:
        """Read what the handler starts from."""
        self.payload = await self._backend.read_payload(self.handle)
        if self.resumed:
            self.signals = await self._backend.observe_signals(self.handle)

    def lost(self, error: FFError) -> None:
        """The lease is gone: whatever is written from here on is refused, at once."""
        self._lost = error

    async def open(self) -> Writer:
        """Return the writer of the attempt, opened when it is first asked for; `write` needs it open."""
        if self._lost is not None:
            raise self._lost.with_traceback(None)
        if self._writer is None or isinstance(self._writer.error, WriterClosed):
            self._writer = await self._backend.open_writer(self.handle, mode=self._mode)
        return self._writer

    def write(
        self, payload: bytes | str, frame_type: str = "token", *, mode: StreamMode | None = None
    ) -> int:
        """Write one frame, without waiting; see `Writer.write`.

        Raises:
            WriterClosed: The writer is not open: await :meth:`open` first.
        """
        if self._writer is None:
            raise WriterClosed("The task's writer is not open; await task.open() before write().")
        return self._writer.write(payload, frame_type, mode=mode)

    async def flush(self) -> AppendFrameOutcome:
        """Wait until everything that was written is stored; see `Writer.flush`."""
        return await (await self.open()).flush()

    @property
    def cancelled(self) -> bool:
        """Whether the handler should stop: a cancellation was asked for, or the lease is gone."""
        if self._lost is not None:
            return True
        return self._writer is not None and self._writer.cancel_requested

    async def progress(self, percent: int | None = None, message: str = "") -> None:
        """Report progress; see :meth:`ValkeyBackend.progress`."""
        await self._backend.progress(self.handle, percent, message)

    async def report_usage(self, usage: UsageDimensions) -> ReportUsageResult:
        """Report usage; see :meth:`ValkeyBackend.report_usage`."""
        return await self._backend.report_usage(self.handle, usage)

    async def create_waitpoint(self, expires: float | timedelta = 3600.0) -> PendingWaitpoint:
        """Create a waitpoint; see :meth:`ValkeyBackend.create_waitpoint`."""
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
        raise TaskGaveUp

    async def delay(self, delay: float | timedelta) -> NoReturn:
        """Give the execution up for a while; the handler is called again then."""
        await self.close()
        await self._backend.delay(self.handle, delay)
        raise TaskGaveUp

    async def wait_children(self) -> NoReturn:
        """Give the execution up until its children have ended; the handler is called again then."""
        await self.close()
        await self._backend.wait_children(self.handle)
        raise TaskGaveUp

    async def close(self) -> None:
        """Store everything that was written, and close the writer."""
        if self._writer is not None:
            await self._writer.close()


class WorkerLoop:
    """Claims executions of one lane and awaits a handler for each, as many at once as *concurrency* says."""

    def __init__(
        self,
        backend: ValkeyBackend,
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
        self._backend = backend
        self._handler = handler
        self._claim = {
            "lane": lane,
            "worker_id": worker_id,
            "worker_instance_id": worker_instance_id or f"{socket.gethostname()}-{os.getpid()}",
            "capabilities": capabilities,
            "lease_ttl_ms": lease_ttl_ms,
            "policy": ClaimPolicy.with_max_wait(CLAIM_WAIT_S),
        }
        self._mode = mode
        self._concurrency = concurrency
        self._stop = asyncio.Event() if stop is None else stop

    async def run(self) -> None:
        """Run until told to stop or, in the main thread, by SIGTERM or SIGINT."""
        restore = self._on_signals()
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(self._concurrency):
                    group.create_task(self._slot())
        except BaseExceptionGroup as group_error:
            # One slot's failure cancels the others; it alone is what happened.
            raise group_error.exceptions[0] from None
        finally:
            restore()

    def _on_signals(self) -> Callable[[], None]:
        if threading.current_thread() is not threading.main_thread():
            return lambda: None
        loop = asyncio.get_running_loop()
        numbers = (signal.SIGTERM, signal.SIGINT)
        before = {number: signal.getsignal(number) for number in numbers}
        for number in numbers:
            loop.add_signal_handler(number, self._stop.set)

        def restore() -> None:
            for number, handler in before.items():
                loop.remove_signal_handler(number)
                signal.signal(number, handler)

        return restore

    async def _slot(self) -> None:
        while not self._stop.is_set():
            try:
                handle = await self._backend.claim(**self._claim)  # type: ignore[arg-type]
            except FFError as error:
                if not error.retryable:
                    raise
                await asyncio.sleep(CLAIM_WAIT_S)
                continue
            if handle is not None:
                await self.run_one(handle)

    async def run_one(self, handle: Handle) -> None:
        """Run the handler for one claimed execution, and end it as the handler ended."""
        backend = self._backend
        task = Task(backend, handle, self._mode)
        try:
            await task.load()
        except FFError as error:
            if is_lease_lost(error) or error.retryable:
                return
            raise
        async with backend.keep_lease(handle, task.lost):
            try:
                result = result_of(await self._handler(task))
                await task.close()
                if task.cancelled:
                    await backend.cancel(handle, reason="the worker was asked to stop")
                else:
                    await backend.complete(handle, result)
            except TaskGaveUp:
                return
            except FFError as error:
                if is_lease_lost(error):
                    return
                await self._failed(task, error)
            except Exception as error:  # noqa: BLE001 - a handler may raise anything; the execution records it
                await self._failed(task, error)

    async def _failed(self, task: Task, error: Exception) -> None:
        # What could not be stored is on the writer's error; the failure itself is what counts.
        with contextlib.suppress(FFError):
            await task.close()
        try:
            await self._backend.fail(task.handle, *failure_of(error))
        except FFError as refusal:
            if not (is_lease_lost(refusal) or refusal.retryable):
                raise
