"""What can be done to executions and their streams."""

from __future__ import annotations

import copy
import threading
import weakref
from typing import TYPE_CHECKING

from ff_fast import _transport, keys
from ff_fast._core import claiming, completions, ops, supervision
from ff_fast._core import operations as _arguments
from ff_fast._core import tail as _tail
from ff_fast._core import writer as _writing
from ff_fast._core.summary import fold
from ff_fast._core.tail import Item, StreamPage, TailCore
from ff_fast._sync.leases import LeaseKeeper
from ff_fast._sync.pool import Connections
from ff_fast._sync.writers import Link, Writer
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
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from datetime import timedelta


class Operations(Connections):
    """Every operation on executions and streams: arguments are checked, and answers read, below the shell."""

    def __init__(self, config: BackendConfig) -> None:
        super().__init__(config)
        self._opening = threading.Lock()
        self._link_started: Link | None = None
        self._writers: weakref.WeakValueDictionary[str, Writer] = weakref.WeakValueDictionary()
        # Those that `append_frame` opened: nobody else holds them.
        self._implicit: dict[str, Writer] = {}
        self._keepers: weakref.WeakSet[LeaseKeeper] = weakref.WeakSet()
        self._sweeper = claiming.Sweeper(keys.DEFAULT_PARTITIONS)

    def _stop(self) -> None:
        super()._stop()
        for keeper in list(self._keepers):
            keeper.abandon(_transport.closed_error())
        with self._lock:
            link = self._link_started
        if link is not None:
            link.close()
        self._implicit.clear()

    def _forked(self) -> None:
        super()._forked()
        self._opening = threading.Lock()

    @property
    def _link(self) -> Link:
        with self._lock:
            if self._closed:
                raise _transport.closed_error()
            if self._link_started is None or not self._link_started.running:
                self._link_started = Link(self._connect, self._discard, self.config.retry)
            return self._link_started

    # -- executions ---------------------------------------------------------------------------------------------

    def create_execution(
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
        """Create an execution that a worker of *lane* can claim, and return its id.

        Args:
            lane: 1 to 64 printable ASCII characters.
            payload: What the worker gets, at most 16 MiB.
            execution_id: Its id, as an earlier call or ``keys.new_execution_id`` made it, in the partition of its flow
                or parent if it has one; the same id again changes nothing. None makes one, so this call is repeated safely by itself.
            priority: 0 to 9000; the highest is claimed first, then the oldest.
            required_capabilities: What a worker must offer to claim it.
            namespace: Tenant, free text.
            tags: ``namespace.name`` to text.
            retention_ms: How long everything of it is kept after its end, in ms.
            retry: When a failed or lost attempt is tried again; None retries no failure, and replaces a lost worker
                100 times.
            delay: How long it waits before it can be claimed; this and the next two in seconds or as a timedelta.
            deadline: How long it may take from now on; then it ends as expired.
            attempt_timeout: How long one attempt may run, suspensions and delays not counted; a timed out one is
                retried as *retry* says, else the execution ends as expired.
            flow_id: Flow that it belongs to.
            parent_id: Execution whose `wait_children` waits for it.
            budgets: Budgets that its usage is charged to.

        Raises:
            InvalidInput: An argument is not one of those that are accepted.
            FlowNotFound, FlowAlreadyTerminal: The flow takes no execution.
            ExecutionNotFound: There is no such parent, or it has ended.
        """
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
        return self._do(call)

    def describe(self, execution_id: str) -> ExecutionDescription:
        """Return an execution as the server holds it; the id of its lease is left out.

        Raises:
            ExecutionNotFound: There is none.
        """
        return self._call(ops.describe_execution(keys.canonical_execution_id(execution_id)))

    def claim(
        self,
        *,
        lane: str = "default",
        worker_id: str,
        worker_instance_id: str,
        lease_ttl_ms: int = 30_000,
        capabilities: CapabilitySet | None = None,
        policy: ClaimPolicy | None = None,
    ) -> Handle | None:
        """Claim the best execution of *lane* that *capabilities* cover, under a lease.

        Args:
            lane: Lane to take work from.
            worker_id: Which worker this is, free text.
            worker_instance_id: Which process of it, free text.
            lease_ttl_ms: Length of the lease in ms; renew it before it lapses.
            capabilities: What this worker can do.
            policy: How long to wait for work; the server wakes the worker. None answers at once. While there is only
                work that *capabilities* do not cover, it is looked at again every 50 ms.

        Returns:
            The handle, or None where there is no work.

        Raises:
            InvalidInput: An argument is not one of those that are accepted.
            OutcomeUnknown: The reply was lost. Calling again is safe: an execution that was claimed without an owner
                comes back when a supervisor sees its lease lapse.
        """
        request = _arguments.claim(
            lane=lane,
            worker_id=worker_id,
            worker_instance_id=worker_instance_id,
            lease_ttl_ms=lease_ttl_ms,
            capabilities=capabilities,
            policy=policy,
        )
        return self._run(lambda: claiming.claim(request, self._sweeper), repeatable=False)

    def read_payload(self, handle: Handle) -> bytes:
        """Return the payload that the execution of *handle* was created with."""
        return self._call(ops.read_payload(_arguments.attempt(handle).execution_id))

    def renew(self, handle: Handle, lease_ttl_ms: int | None = None) -> LeaseRenewal:
        """Extend the lease to *lease_ttl_ms* (ms; that of the claim where None) from now.

        Raises:
            LeaseExpired, StaleOwner, ExecutionNotActive, ExecutionSuspended, ExecutionNotFound: The lease is gone.
        """
        return self._call(_arguments.renew(handle, lease_ttl_ms))

    def complete(self, handle: Handle, payload: bytes | str = b"") -> None:
        """End the execution as completed, with *payload* as its result; its stream ends with it.

        Calling it again is safe. Flush or close writers first: frames that are still on their way are refused.

        Raises:
            LeaseExpired, StaleOwner, ExecutionNotActive, ExecutionSuspended, ExecutionNotFound: The lease is gone.
        """
        self._do(_arguments.complete(handle, payload))
        self._ended(handle)

    def fail(
        self,
        handle: Handle,
        reason: FailureReason | str,
        failure_class: FailureClass = FailureClass.PERMANENT,
    ) -> FailOutcome:
        """End the attempt as failed; its stream ends with it. Calling it again is safe.

        The class and the execution's `RetryPolicy` decide what follows: a transient failure or a timeout is retried
        while retries are left, an ``INFRA_CRASH`` counts as a lost worker, a permanent or cancelled one ends the
        execution.

        Args:
            handle: The lease.
            reason: Why, as text or a ``FailureReason``.
            failure_class: What kind of failure it is.

        Returns:
            Whether a retry is scheduled, and for when.

        Raises:
            LeaseExpired, StaleOwner, ExecutionNotActive, ExecutionSuspended, ExecutionNotFound: The lease is gone.
        """
        outcome = self._do(_arguments.fail(handle, reason, failure_class))
        self._ended(handle)
        return outcome

    def _ended(self, handle: Handle) -> None:
        writer = self._implicit.pop(_arguments.attempt(handle).fields.lease_id, None)
        if writer is not None:
            writer.fail(WriterClosed())

    def cancel(
        self,
        target: Handle | str,
        *,
        reason: str = "cancelled",
        grace: float | timedelta | None = None,
    ) -> CancelOutcome:
        """Cancel an execution in any state that is not an end. Calling it again is safe.

        Args:
            target: A handle or an execution id.
            reason: Why, up to 4096 bytes of text.
            grace: How long a running worker may take to stop by itself (seconds or timedelta): it hears of the
                cancellation with its next append (``writer.cancel_requested``) or renewal, and a supervisor forces
                it afterwards. None cancels at once.

        Raises:
            ExecutionNotFound: There is no such execution.
            ExecutionNotActive: It has ended in another way.
        """
        return self._do(_arguments.cancel(target, reason, grace))

    def progress(self, handle: Handle, percent: int | None = None, message: str = "") -> None:
        """Report progress: 0 to 100, a line of text, or both; what is left out stays as it is.

        Raises:
            LeaseExpired, StaleOwner, ExecutionNotActive, ExecutionSuspended, ExecutionNotFound: The lease is gone.
        """
        self._do(_arguments.progress(handle, percent, message))

    def delay(self, handle: Handle, delay: float | timedelta) -> int:
        """Give the lease up; the same attempt goes on after *delay* (seconds or timedelta). Close writers first.

        Returns:
            When it can be claimed again, in ms since the epoch by the server's clock.

        Raises:
            LeaseExpired, StaleOwner, ExecutionNotActive, ExecutionSuspended, ExecutionNotFound: The lease is gone.
        """
        outcome = self._do(_arguments.delay(handle, delay))
        self._ended(handle)
        return outcome

    def wait_children(self, handle: Handle) -> None:
        """Give the lease up until every child (``create_execution(parent_id=...)``) has ended; the same attempt goes on then,
        at once where none is open.

        Raises:
            LeaseExpired, StaleOwner, ExecutionNotActive, ExecutionSuspended, ExecutionNotFound: The lease is gone.
        """
        self._do(_arguments.wait_children(handle))
        self._ended(handle)

    def find_reclaimable(self, limit: int = 100) -> list[ReclaimToken]:
        """Find executions whose worker was lost: active, with a lease that has lapsed by the server's clock.

        Args:
            limit: At most so many, 1 to 10,000.
        """
        return self._do(_arguments.find_reclaimable(self._sweeper.partitions, limit))

    def claim_from_reclaim(
        self,
        token: ReclaimToken,
        *,
        worker_id: str,
        worker_instance_id: str,
        lease_ttl_ms: int = 30_000,
        capabilities: CapabilitySet | None = None,
    ) -> Handle:
        """Take an execution over from a lost worker: a new attempt, with a handle of kind ``RESUMED``.

        The old attempt's stream ends as ``producer_lost``, and its worker is a stale owner everywhere.

        Raises:
            ExecutionNotClaimable: It is not waiting, and its lease has not lapsed.
            CapabilityMismatch: It requires what *capabilities* lack; the error names it.
            ExecutionNotFound: There is no such execution.
        """
        return self._do(
            _arguments.claim_from_reclaim(
                token,
                worker_id=worker_id,
                worker_instance_id=worker_instance_id,
                lease_ttl_ms=lease_ttl_ms,
                capabilities=capabilities,
            )
        )

    def create_waitpoint(
        self,
        handle: Handle,
        *,
        waitpoint_id: str | None = None,
        expires: float | timedelta = 3600.0,
    ) -> PendingWaitpoint:
        """Create a waitpoint for a suspension to come. Signals that arrive before it are kept for it.

        Args:
            handle: The lease.
            waitpoint_id: A UUID; the same again answers the same token. None makes one.
            expires: How long it may stay without a suspension, in seconds or as a timedelta.

        Raises:
            WaitpointConflict: The id belongs to another execution or attempt.
            LeaseExpired, StaleOwner, ExecutionNotActive, ExecutionSuspended, ExecutionNotFound: The lease is gone.
        """
        return self._do(_arguments.create_waitpoint(handle, waitpoint_id, expires))

    def suspend(
        self,
        handle: Handle,
        condition: ResumeCondition | WaitpointSpec | Sequence[WaitpointSpec],
        *,
        timeout: float | timedelta | None = None,
        on_timeout: TimeoutBehavior = TimeoutBehavior.FAIL,
        reason: str = "waiting_for_signal",
    ) -> SuspendOutcome:
        """Give the lease up until signals meet *condition*; the same attempt, and its stream, go on then.

        Close writers first. Where signals that came before meet the condition already, nothing is suspended, and the
        lease goes on. Calling it again after a lost reply answers as the first time.

        Args:
            handle: The lease.
            condition: What to wait for; several specs mean any of them.
            timeout: How long, in seconds or as a timedelta; None has no limit.
            on_timeout: What happens then.
            reason: A line of text for whoever looks.

        Raises:
            InvalidToken, WaitpointClosed: A waitpoint of the condition cannot be used.
            LeaseExpired, StaleOwner, ExecutionNotActive, ExecutionSuspended, ExecutionNotFound: The lease is gone.
        """
        outcome = self._do(_arguments.suspend(handle, condition, timeout, on_timeout, reason))
        if not outcome.already_satisfied:
            self._ended(handle)
        return outcome

    def deliver_signal(
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
        """Deliver a signal to a waitpoint, with the waitpoint's token. Calling it again after a lost reply is safe.

        Args:
            execution_id: The execution that waits.
            waitpoint: Id and token, as `create_waitpoint` made them.
            signal_name: Name of the signal.
            payload: Up to 64 KiB that the resumed worker gets.
            signal_id: A UUID; None makes one.
            idempotency_key: A second signal with this key answers the first one.
            correlation_id, category, source_type, source_identity: Text about the signal.

        Raises:
            InvalidToken: The token is not valid, or there is no such waitpoint.
            WaitpointClosed: The waitpoint takes no more signals.
            SignalLimitExceeded: The waitpoint has had 10,000 signals.
            ExecutionNotFound: There is no such execution.
        """
        return self._do(
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

    def report_usage(self, handle: Handle, usage: UsageDimensions) -> ReportUsageResult:
        """Report usage: to the budgets of the execution and to its own ledger, completely or not at all.

        With ``usage.dedup_key`` a report counts once, however often it is made.

        Raises:
            BudgetNotFound: A budget of the execution does not exist.
            LeaseExpired, StaleOwner, ExecutionNotActive, ExecutionSuspended, ExecutionNotFound: The lease is gone.
        """
        return self._do(_arguments.report_usage(handle, usage))

    def create_budget(
        self,
        budget_id: str,
        *,
        hard: Mapping[str, int] | None = None,
        soft: Mapping[str, int] | None = None,
    ) -> None:
        """Create a budget, or replace the limits of one; what was used stays.

        Args:
            budget_id: 1 to 64 of ``A-Z a-z 0-9 _ -``.
            hard: Dimension to limit; a report that would pass one is refused as a whole.
            soft: Dimension to limit; a report that passes one is applied, and says so.
        """
        self._do(_arguments.create_budget(budget_id, hard, soft))

    def create_flow(self, flow_id: str | None = None, *, namespace: str = "default") -> str:
        """Create a flow, for executions that share its partition, and return its id; an existing one is left as it is.

        It is kept while a member is open, and afterwards for a day, or as long as the last member where that is longer.
        """
        return self._do(_arguments.create_flow(flow_id, namespace, self._sweeper.partitions))

    def cancel_flow(
        self,
        flow_id: str,
        policy: CancelFlowPolicy = CancelFlowPolicy.CANCEL_ALL,
        wait: CancelFlowWait = CancelFlowWait.WAIT_INDEFINITE,
        *,
        reason: str = "flow cancelled",
    ) -> CancelFlowOutcome:
        """Cancel a flow: no new attempt of a member begins from here on, and its members are cancelled as *policy* says.

        Args:
            flow_id: The flow.
            policy: Which members.
            wait: Whether to wait until those that the policy names are cancelled, without a limit where it is left out;
                without waiting a supervisor cancels them. ``FLOW_ONLY`` waits for nobody.
            reason: Why.

        Raises:
            FlowNotFound: There is no such flow.
            DeadlineExceeded: The wait was over first; a supervisor goes on.
        """
        return self._do(
            _arguments.cancel_flow(flow_id, policy, wait, reason, self._sweeper.partitions)
        )

    def set_tags(self, execution_id: str, tags: Mapping[str, str]) -> int:
        """Set tags (``namespace.name`` to text) beside those that are there; return how many the execution has.

        Raises:
            InvalidInput: There is no tag, or one is not of this form.
            ExecutionNotFound: There is no such execution.
        """
        return self._do(_arguments.set_tags(execution_id, tags))

    def rotate_waitpoint_secret(
        self, kid: str, secret: bytes, *, grace: float | timedelta = 3600.0
    ) -> None:
        """Sign waitpoint tokens with another key from now on, in every partition. Calling it again completes it.

        Args:
            kid: Id of the key, 1 to 64 of ``A-Z a-z 0-9 _ -``.
            secret: 32 random bytes.
            grace: How long tokens of the key before stay valid, in seconds or as a timedelta.

        Raises:
            RotationConflict: The kid is in use with another secret.
        """
        self._do(_arguments.rotate_waitpoint_secret(kid, secret, grace, self._sweeper.partitions))

    def observe_signals(self, handle: Handle) -> tuple[ResumeSignal, ...]:
        """Return the signals that met the condition of the suspension after which this lease was granted.

        Raises:
            LeaseExpired, StaleOwner, ExecutionNotActive, ExecutionSuspended, ExecutionNotFound: The lease is gone.
        """
        return self._call(ops.observe_signals(_arguments.attempt(handle)))

    def describe_stream(self, execution_id: str, attempt_index: int = 0) -> StreamDescription:
        """Return the state of the streams of one attempt.

        Raises:
            ExecutionNotFound: There is no such execution.
        """
        return self._call(
            ops.describe_attempt(
                keys.canonical_execution_id(execution_id), keys.attempt_index(attempt_index)
            )
        )

    def describe_flow(self, flow_id: str) -> FlowDescription:
        """Return a flow and its members.

        Raises:
            FlowNotFound: There is no such flow.
        """
        return self._call(
            ops.describe_flow(
                keys.canonical_uuid("flow_id", flow_id),
                keys.flow_slot_tag(flow_id, self._sweeper.partitions),
            )
        )

    def get_tags(self, execution_id: str) -> dict[str, str]:
        """Return the tags of an execution.

        Raises:
            ExecutionNotFound: There is no such execution.
        """
        return self._call(ops.read_tags(keys.canonical_execution_id(execution_id)))

    def read_result(self, execution_id: str) -> bytes:
        """Return the result that an execution was completed with; empty where it has none.

        Raises:
            ExecutionNotFound: There is no such execution.
        """
        return self._call(ops.read_result(keys.canonical_execution_id(execution_id)))

    # -- streams ------------------------------------------------------------------------------------------------

    def open_writer(
        self,
        handle: Handle,
        *,
        mode: StreamMode | None = None,
        retention_maxlen: int = _writing.RETENTION_MAXLEN,
        max_unacknowledged_bytes: int = _writing.MAX_UNACKNOWLEDGED_BYTES,
        linger_ms: float = 0.0,
    ) -> Writer:
        """Open the writer of the attempt; one that was open before is superseded.

        Args:
            handle: From :meth:`claim`.
            mode: Mode of frames that name none; durable where None.
            retention_maxlen: Least number of durable frames that stay readable.
            max_unacknowledged_bytes: Past this many bytes, ``write`` raises ``Overloaded``.
            linger_ms: How long a batch may wait for more frames, 0 to 1000 ms.

        Raises:
            ExecutionNotFound, StaleOwner, ExecutionSuspended, StreamClosed, LeaseExpired: The handle may not write.
        """
        attempt = _arguments.attempt(handle)
        options = _arguments.writer(
            mode,
            retention_maxlen=retention_maxlen,
            max_unacknowledged_bytes=max_unacknowledged_bytes,
            linger_ms=linger_ms,
        )
        state = self._run(lambda: _writing.open_writer(attempt, options))
        writer = Writer(state, self._link, _transport.request_timeout_s(self.config))
        self._writers[attempt.fields.lease_id] = writer
        self._implicit.pop(attempt.fields.lease_id, None)
        return writer

    def append_frame(
        self, handle: Handle, frame: Frame, timeout: float | None = None
    ) -> AppendFrameOutcome:
        """Append one frame and wait until it is stored.

        The writer that is open for the handle is used, or one is opened. With ``frame.seq`` the call is idempotent:
        a frame that this writer has written is not written again.

        Raises:
            SequenceGap: ``frame.seq`` is not the next sequence.
            FFError: As `Writer.write` and `Writer.flush`.
        """
        _arguments.frame(frame)
        lease_id = _arguments.attempt(handle).fields.lease_id
        self._check()
        with self._opening:
            # Two callers that opened one each would supersede each other.
            writer = self._writers.get(lease_id)
            if writer is None or isinstance(writer.error, WriterClosed):
                writer = self.open_writer(handle)
                self._implicit[lease_id] = writer
        writer.write_frame(frame)
        return writer.flush(timeout)

    def read_stream(
        self,
        execution_id: str,
        attempt_index: int = 0,
        *,
        after: str | None = None,
        count: int = 100,
        max_bytes: int = 8 << 20,
        visibility: TailVisibility = TailVisibility.ALL,
    ) -> StreamPage:
        """Return the frames of one attempt after a cursor, without waiting.

        Args:
            execution_id: Id of the execution.
            attempt_index: Attempt, from 0.
            after: Id of a frame or a cursor, exclusive; None is the beginning.
            count: 1 to 10,000 frames.
            max_bytes: About how many bytes of payload, 1 to 64 MiB.
            visibility: Whether best-effort frames are wanted.

        Raises:
            ExecutionNotFound, AttemptNotFound: There is no such attempt.
            InvalidInput: An argument is not one of those that are accepted.
        """
        return self._run(
            lambda: _tail.read_page(
                execution_id,
                attempt_index,
                after=after,
                count=count,
                max_bytes=max_bytes,
                visibility=visibility,
            )
        )

    def read_summary(self, execution_id: str, attempt_index: int = 0) -> SummaryDocument | None:
        """Return the summary of an attempt with the cursor that continues it; None where it has none.

        Raises:
            ExecutionNotFound: There is no such execution.
        """
        eid = keys.canonical_execution_id(execution_id)
        return fold(self._call(ops.read_summary(eid, keys.attempt_index(attempt_index))))

    def tail(
        self,
        execution_id: str,
        attempt_index: int = 0,
        *,
        after: str | None = None,
        visibility: TailVisibility = TailVisibility.ALL,
    ) -> Iterator[Item]:
        """Yield what one attempt streams, live, on a connection of its own.

        Yields:
            ``StreamFrame`` in sequence order; a ``Gap`` wherever frames are missing; at last one ``End``.

        Args:
            execution_id: Id of the execution.
            attempt_index: Attempt, from 0; one that is not claimed yet is waited for.
            after: Id of a frame or the cursor of a summary, exclusive; None is the beginning.
            visibility: Whether best-effort frames are wanted.

        Raises:
            ExecutionNotFound, AttemptNotFound: There is no such attempt.
            InvalidInput: An argument is not one of those that are accepted.
            Unavailable: The server cannot be reached; the tail reconnected as often as the configuration allows.
        """
        core = TailCore(execution_id, attempt_index, after, visibility)
        return self._follow(core, lambda: _transport.read_on(core))

    def subscribe_completions(
        self, scope: ScannerFilter | None = None, *, after: str | None = None
    ) -> Iterator[CompletionPayload]:
        """Yield every execution that ends, on a connection of its own, without an end.

        Args:
            scope: Which executions; None is all of them.
            after: ``completion.cursor`` of an earlier subscription, which goes on from there without hole or repeat;
                ``start`` for all that is kept (about 10,000 for each partition); None begins when the first is asked for.

        Raises:
            InvalidCursor: *after* is none of these, or what comes behind it is not kept any more.
            Unavailable: The server cannot be reached; the subscription reconnected as often as the configuration allows.
        """
        core = completions.CompletionCore(self._sweeper.partitions, after, _arguments.scope(scope))
        return self._follow(core, core.read)

    # -- work -------------------------------------------------------------------------------------------------------

    def supervise(
        self,
        scope: ScannerFilter | None = None,
        *,
        interval: float = 0.25,
        stop: threading.Event | None = None,
    ) -> None:
        """Fire what is due, until *stop* is set: lapsed leases, delays, timeouts, deadlines, waitpoints, cancellations.

        Without one, none of these happens. Any number of supervisors may run at once; a deployment needs one.

        Args:
            scope: Which executions it looks after; None is all of them.
            interval: Seconds between two rounds.
            stop: Set it to return after the round that runs.
        """
        ended = threading.Event() if stop is None else stop
        rounds = supervision.Supervision(self._sweeper.partitions, _arguments.scope(scope))
        while not (ended.is_set() or self._closed):
            try:
                self._run(rounds.round)
            except FFError as error:
                # Work waits for the next round; a server that refuses for good is the operator's to hear of.
                if not error.retryable and not self._closed:
                    raise
            ended.wait(interval)

    def keep_lease(
        self, handle: Handle, on_lost: Callable[[FFError], None] | None = None
    ) -> LeaseKeeper:
        """Renew a lease in the background until the keeper is stopped; a context manager.

        Args:
            handle: The lease.
            on_lost: Called with the error, in a thread of the library, when the lease is gone, or could not be renewed
                before it lapsed. The writers of the handle fail with it before.
        """
        self._check()
        lease_id = _arguments.attempt(handle).fields.lease_id
        renewal = _arguments.renew(handle, None)

        def lost(error: FFError) -> None:
            writer = self._writers.get(lease_id)
            if writer is not None:
                writer.fail(copy.copy(error))
            if on_lost is not None:
                on_lost(error)

        def renew(until: float) -> LeaseRenewal:
            return self._run(lambda: ops.call(renewal), until=until)

        keeper = LeaseKeeper(handle.fields().lease_ttl_ms, renew, lost)
        self._keepers.add(keeper)
        if self._closed:
            keeper.abandon(_transport.closed_error())
        return keeper
