"""What can be done to executions and their streams, awaited."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import weakref
from typing import TYPE_CHECKING

from ff_fast import _transport, keys
from ff_fast._aio.leases import LeaseKeeper
from ff_fast._aio.pool import Connections
from ff_fast._aio.writers import Link, Writer, WriterOpening
from ff_fast._core import claiming, completions, ops, supervision
from ff_fast._core import operations as _arguments
from ff_fast._core import tail as _tail
from ff_fast._core import writer as _writing
from ff_fast._core.summary import fold
from ff_fast._core.tail import Item, StreamPage, TailCore
from ff_fast.errors import FFError, WriterClosed
from ff_fast.types import (
    AppendFrameOutcome,
    BackendConfig,
    CancelFlowOutcome,
    CancelFlowPolicy,
    CancelFlowWait,
    CancelOutcome,
    CapabilitySet,
    ClaimPolicy,
    CompletionPayload,
    ExecutionDescription,
    FailOutcome,
    FailureClass,
    FailureReason,
    FlowDescription,
    Frame,
    Handle,
    LeaseRenewal,
    PendingWaitpoint,
    ReclaimToken,
    ReportUsageResult,
    ResumeCondition,
    ResumeSignal,
    RetryPolicy,
    ScannerFilter,
    SignalOutcome,
    StreamDescription,
    StreamMode,
    SummaryDocument,
    SuspendOutcome,
    TailVisibility,
    TimeoutBehavior,
    UsageDimensions,
    WaitpointSpec,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
    from datetime import timedelta


class Operations(Connections):
    """Every operation on executions and streams: arguments are checked, and answers read, below the shell."""

    def __init__(self, config: BackendConfig) -> None:
        super().__init__(config)
        self._opening = asyncio.Lock()
        self._writers: weakref.WeakValueDictionary[str, Writer] = weakref.WeakValueDictionary()
        # Those that `append_frame` opened: nobody else holds them.
        self._implicit: dict[str, Writer] = {}
        self._sweeper = claiming.Sweeper(keys.DEFAULT_PARTITIONS)
        self._link = Link(self._shared, self._spawn, config.retry)

    def _stop(self) -> None:
        super()._stop()
        self._link.stop()
        self._implicit.clear()

    # -- executions ---------------------------------------------------------------------------------------------

    async def create_execution(
        self,
        *,
        lane: str = "default",
        payload: bytes | str = b"",
        execution_id: str | None = None,
        priority: int = 0,
        required_capabilities: CapabilitySet | None = None,
        namespace: str = "default",
        tags: Mapping[str, str] | None = None,
        retention_ms: int = _arguments.DEFAULT_RETENTION_MS,
        retry: RetryPolicy | None = None,
        delay: float | timedelta | None = None,
        deadline: float | timedelta | None = None,
        attempt_timeout: float | timedelta | None = None,
        flow_id: str | None = None,
        parent_id: str | None = None,
        budgets: Sequence[str] = (),
    ) -> str:
        """Create an execution; see :meth:`ff_fast.ValkeyBackend.create_execution`."""
        call = _arguments.create(
            lane=lane,
            payload=payload,
            execution_id=execution_id,
            priority=priority,
            required_capabilities=required_capabilities,
            namespace=namespace,
            tags=tags,
            retention_ms=retention_ms,
            retry=retry,
            delay=delay,
            deadline=deadline,
            attempt_timeout=attempt_timeout,
            flow_id=flow_id,
            parent_id=parent_id,
            budgets=budgets,
            partitions=self._sweeper.partitions,
        )
        return await self._do(call)

    async def describe(self, execution_id: str) -> ExecutionDescription:
        """Return the fields of an execution; see :meth:`ff_fast.ValkeyBackend.describe`."""
        return await self._call(ops.describe_execution(keys.canonical_execution_id(execution_id)))

    async def claim(
        self,
        *,
        lane: str = "default",
        worker_id: str,
        worker_instance_id: str,
        lease_ttl_ms: int = 30_000,
        capabilities: CapabilitySet | None = None,
        policy: ClaimPolicy | None = None,
    ) -> Handle | None:
        """Claim the best execution of *lane*; see :meth:`ff_fast.ValkeyBackend.claim`."""
        request = _arguments.claim(
            lane=lane,
            worker_id=worker_id,
            worker_instance_id=worker_instance_id,
            lease_ttl_ms=lease_ttl_ms,
            capabilities=capabilities,
            policy=policy,
        )
        return await self._run(
            lambda: claiming.claim(request, self._sweeper),
            repeatable=False,
            own_connection=request.max_wait_s is not None,
        )

    async def read_payload(self, handle: Handle) -> bytes:
        """Return the payload that the execution of *handle* was created with."""
        return await self._call(ops.read_payload(_arguments.attempt(handle).execution_id))

    async def renew(self, handle: Handle, lease_ttl_ms: int | None = None) -> LeaseRenewal:
        """Extend the lease; see :meth:`ff_fast.ValkeyBackend.renew`."""
        return await self._call(_arguments.renew(handle, lease_ttl_ms))

    async def complete(self, handle: Handle, payload: bytes | str = b"") -> None:
        """End the execution as completed; see :meth:`ff_fast.ValkeyBackend.complete`."""
        await self._do(_arguments.complete(handle, payload))
        self._ended(handle)

    async def fail(
        self,
        handle: Handle,
        reason: FailureReason | str,
        failure_class: FailureClass = FailureClass.PERMANENT,
    ) -> FailOutcome:
        """End the execution as failed; see :meth:`ff_fast.ValkeyBackend.fail`."""
        outcome = await self._do(_arguments.fail(handle, reason, failure_class))
        self._ended(handle)
        return outcome

    def _ended(self, handle: Handle) -> None:
        writer = self._implicit.pop(_arguments.attempt(handle).fields.lease_id, None)
        if writer is not None:
            writer.fail(WriterClosed())

    async def cancel(
        self,
        target: Handle | str,
        *,
        reason: str = "cancelled",
        grace: float | timedelta | None = None,
    ) -> CancelOutcome:
        """See :meth:`ff_fast.ValkeyBackend.cancel`."""
        return await self._do(_arguments.cancel(target, reason, grace))

    async def progress(self, handle: Handle, percent: int | None = None, message: str = "") -> None:
        """See :meth:`ff_fast.ValkeyBackend.progress`."""
        await self._do(_arguments.progress(handle, percent, message))

    async def delay(self, handle: Handle, delay: float | timedelta) -> int:
        """See :meth:`ff_fast.ValkeyBackend.delay`."""
        outcome = await self._do(_arguments.delay(handle, delay))
        self._ended(handle)
        return outcome

    async def wait_children(self, handle: Handle) -> None:
        """See :meth:`ff_fast.ValkeyBackend.wait_children`."""
        await self._do(_arguments.wait_children(handle))
        self._ended(handle)

    async def find_reclaimable(self, limit: int = 100) -> list[ReclaimToken]:
        """See :meth:`ff_fast.ValkeyBackend.find_reclaimable`."""
        return await self._do(_arguments.find_reclaimable(self._sweeper.partitions, limit))

    async def claim_from_reclaim(
        self,
        token: ReclaimToken,
        *,
        worker_id: str,
        worker_instance_id: str,
        lease_ttl_ms: int = 30_000,
        capabilities: CapabilitySet | None = None,
    ) -> Handle:
        """See :meth:`ff_fast.ValkeyBackend.claim_from_reclaim`."""
        return await self._do(
            _arguments.claim_from_reclaim(
                token,
                worker_id=worker_id,
                worker_instance_id=worker_instance_id,
                lease_ttl_ms=lease_ttl_ms,
                capabilities=capabilities,
            )
        )

    async def create_waitpoint(
        self,
        handle: Handle,
        *,
        waitpoint_id: str | None = None,
        expires: float | timedelta = 3600.0,
    ) -> PendingWaitpoint:
        """See :meth:`ff_fast.ValkeyBackend.create_waitpoint`."""
        return await self._do(_arguments.create_waitpoint(handle, waitpoint_id, expires))

    async def suspend(
        self,
        handle: Handle,
        condition: ResumeCondition | WaitpointSpec | Sequence[WaitpointSpec],
        *,
        timeout: float | timedelta | None = None,
        on_timeout: TimeoutBehavior = TimeoutBehavior.FAIL,
        reason: str = "waiting_for_signal",
    ) -> SuspendOutcome:
        """See :meth:`ff_fast.ValkeyBackend.suspend`."""
        outcome = await self._do(_arguments.suspend(handle, condition, timeout, on_timeout, reason))
        if not outcome.already_satisfied:
            self._ended(handle)
        return outcome

    async def deliver_signal(
        self,
        execution_id: str,
        waitpoint: PendingWaitpoint,
        signal_name: str,
        *,
        payload: bytes | str | None = None,
        signal_id: str | None = None,
        idempotency_key: str = "",
        correlation_id: str = "",
        category: str = "",
        source_type: str = "",
        source_identity: str = "",
    ) -> SignalOutcome:
        """See :meth:`ff_fast.ValkeyBackend.deliver_signal`."""
        return await self._do(
            _arguments.deliver_signal(
                execution_id,
                waitpoint,
                signal_name,
                payload=payload,
                signal_id=signal_id,
                idempotency_key=idempotency_key,
                correlation_id=correlation_id,
                category=category,
                source_type=source_type,
                source_identity=source_identity,
            )
        )

    async def report_usage(self, handle: Handle, usage: UsageDimensions) -> ReportUsageResult:
        """See :meth:`ff_fast.ValkeyBackend.report_usage`."""
        return await self._do(_arguments.report_usage(handle, usage))

    async def create_budget(
        self,
        budget_id: str,
        *,
        hard: Mapping[str, int] | None = None,
        soft: Mapping[str, int] | None = None,
    ) -> None:
        """See :meth:`ff_fast.ValkeyBackend.create_budget`."""
        await self._do(_arguments.create_budget(budget_id, hard, soft))

    async def create_flow(self, flow_id: str | None = None, *, namespace: str = "default") -> str:
        """See :meth:`ff_fast.ValkeyBackend.create_flow`."""
        return await self._do(_arguments.create_flow(flow_id, namespace, self._sweeper.partitions))

    async def cancel_flow(
        self,
        flow_id: str,
        policy: CancelFlowPolicy = CancelFlowPolicy.CANCEL_ALL,
        wait: CancelFlowWait = CancelFlowWait.WAIT_INDEFINITE,
        *,
        reason: str = "flow cancelled",
    ) -> CancelFlowOutcome:
        """See :meth:`ff_fast.ValkeyBackend.cancel_flow`."""
        return await self._do(
            _arguments.cancel_flow(flow_id, policy, wait, reason, self._sweeper.partitions)
        )

    async def set_tags(self, execution_id: str, tags: Mapping[str, str]) -> int:
        """See :meth:`ff_fast.ValkeyBackend.set_tags`."""
        return await self._do(_arguments.set_tags(execution_id, tags))

    async def rotate_waitpoint_secret(
        self, kid: str, secret: bytes, *, grace: float | timedelta = 3600.0
    ) -> None:
        """See :meth:`ff_fast.ValkeyBackend.rotate_waitpoint_secret`."""
        await self._do(
            _arguments.rotate_waitpoint_secret(kid, secret, grace, self._sweeper.partitions)
        )

    async def observe_signals(self, handle: Handle) -> tuple[ResumeSignal, ...]:
        """See :meth:`ff_fast.ValkeyBackend.observe_signals`."""
        return await self._call(ops.observe_signals(_arguments.attempt(handle)))

    async def describe_stream(self, execution_id: str, attempt_index: int = 0) -> StreamDescription:
        """See :meth:`ff_fast.ValkeyBackend.describe_stream`."""
        return await self._call(
            ops.describe_attempt(
                keys.canonical_execution_id(execution_id), keys.attempt_index(attempt_index)
            )
        )

    async def describe_flow(self, flow_id: str) -> FlowDescription:
        """See :meth:`ff_fast.ValkeyBackend.describe_flow`."""
        return await self._call(
            ops.describe_flow(
                keys.canonical_uuid("flow_id", flow_id),
                keys.flow_slot_tag(flow_id, self._sweeper.partitions),
            )
        )

    async def get_tags(self, execution_id: str) -> dict[str, str]:
        """See :meth:`ff_fast.ValkeyBackend.get_tags`."""
        return await self._call(ops.read_tags(keys.canonical_execution_id(execution_id)))

    async def read_result(self, execution_id: str) -> bytes:
        """See :meth:`ff_fast.ValkeyBackend.read_result`."""
        return await self._call(ops.read_result(keys.canonical_execution_id(execution_id)))

    # -- streams ------------------------------------------------------------------------------------------------

    def open_writer(
        self,
        handle: Handle,
        *,
        mode: StreamMode | None = None,
        retention_maxlen: int = _writing.RETENTION_MAXLEN,
        max_unacknowledged_bytes: int = _writing.MAX_UNACKNOWLEDGED_BYTES,
        linger_ms: float = 0.0,
    ) -> WriterOpening:
        """Open the writer of the attempt: ``async with backend.open_writer(handle) as writer``, or ``await`` it.

        Arguments and errors are those of :meth:`ff_fast.ValkeyBackend.open_writer`.
        """
        attempt = _arguments.attempt(handle)
        options = _arguments.writer(
            mode,
            retention_maxlen=retention_maxlen,
            max_unacknowledged_bytes=max_unacknowledged_bytes,
            linger_ms=linger_ms,
        )

        async def opening() -> Writer:
            state = await self._run(lambda: _writing.open_writer(attempt, options))
            self._check()
            writer = Writer(state, self._link, self)
            self._writers[attempt.fields.lease_id] = writer
            self._implicit.pop(attempt.fields.lease_id, None)
            return writer

        return WriterOpening(opening)

    async def append_frame(
        self, handle: Handle, frame: Frame, timeout: float | None = None
    ) -> AppendFrameOutcome:
        """Append one frame and wait until it is stored; see :meth:`ff_fast.ValkeyBackend.append_frame`."""
        _arguments.frame(frame)
        lease_id = _arguments.attempt(handle).fields.lease_id
        self._check()
        async with self._opening:
            # Two callers that opened one each would supersede each other.
            writer = self._writers.get(lease_id)
            if writer is None or isinstance(writer.error, WriterClosed):
                writer = await self.open_writer(handle)
                self._implicit[lease_id] = writer
        writer.write_frame(frame)
        return await writer.flush(timeout)

    async def read_stream(
        self,
        execution_id: str,
        attempt_index: int = 0,
        *,
        after: str | None = None,
        count: int = 100,
        max_bytes: int = 8 << 20,
        visibility: TailVisibility = TailVisibility.ALL,
    ) -> StreamPage:
        """Return the frames of one attempt after a cursor; see :meth:`ff_fast.ValkeyBackend.read_stream`."""
        return await self._run(
            lambda: _tail.read_page(
                execution_id,
                attempt_index,
                after=after,
                count=count,
                max_bytes=max_bytes,
                visibility=visibility,
            )
        )

    async def read_summary(
        self, execution_id: str, attempt_index: int = 0
    ) -> SummaryDocument | None:
        """Return the summary of an attempt; see :meth:`ff_fast.ValkeyBackend.read_summary`."""
        eid = keys.canonical_execution_id(execution_id)
        return fold(await self._call(ops.read_summary(eid, keys.attempt_index(attempt_index))))

    def tail(
        self,
        execution_id: str,
        attempt_index: int = 0,
        *,
        after: str | None = None,
        visibility: TailVisibility = TailVisibility.ALL,
    ) -> AsyncGenerator[Item, None]:
        """Yield what one attempt streams, live; see :meth:`ff_fast.ValkeyBackend.tail`."""
        core = TailCore(execution_id, attempt_index, after, visibility)
        return self._follow(core, lambda: _transport.read_on(core))

    def subscribe_completions(
        self, scope: ScannerFilter | None = None, *, after: str | None = None
    ) -> AsyncGenerator[CompletionPayload, None]:
        """Yield every execution that ends; see :meth:`ff_fast.ValkeyBackend.subscribe_completions`."""
        core = completions.CompletionCore(self._sweeper.partitions, after, _arguments.scope(scope))
        return self._follow(core, core.read)

    # -- work -------------------------------------------------------------------------------------------------------

    async def supervise(
        self,
        scope: ScannerFilter | None = None,
        *,
        interval: float = 0.25,
        stop: asyncio.Event | None = None,
    ) -> None:
        """Fire what is due, until *stop* is set or it is cancelled; see :meth:`ff_fast.ValkeyBackend.supervise`."""
        ended = asyncio.Event() if stop is None else stop
        rounds = supervision.Supervision(self._sweeper.partitions, _arguments.scope(scope))
        while not (ended.is_set() or self._closed):
            try:
                await self._run(rounds.round, own_connection=True)
            except FFError as error:
                # Work waits for the next round; a server that refuses for good is the operator's to hear of.
                if not error.retryable and not self._closed:
                    raise
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(interval):
                    await ended.wait()

    def keep_lease(
        self, handle: Handle, on_lost: Callable[[FFError], None] | None = None
    ) -> LeaseKeeper:
        """Renew a lease in a task until the keeper is stopped: ``async with backend.keep_lease(handle)``.

        Args:
            handle: The lease.
            on_lost: Called with the error when the lease is gone, or could not be renewed before it lapsed. The writers
                of the handle fail with it before.
        """
        self._check()
        lease_id = _arguments.attempt(handle).fields.lease_id

        def lost(error: FFError) -> None:
            writer = self._writers.get(lease_id)
            if writer is not None:
                writer.fail(copy.copy(error))
            if on_lost is not None:
                on_lost(error)

        keeper = LeaseKeeper(
            handle.fields().lease_ttl_ms, lambda: self.renew(handle), lost, lambda: self._closed
        )
        keeper.start(self._spawn)
        return keeper
