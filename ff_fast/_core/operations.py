"""Every public operation, once: its signature, its documentation, its checks and its steps.

The first parameter is the deployment; both shells bind the rest as their methods. An operation checks its arguments
when it is called, before anything is sent, and returns what the shell carries out: most return a :class:`Call`.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Generic, NamedTuple, Protocol, TypeVar

from ff_fast import keys
from ff_fast._core import claiming, flows, ops, ready, supervision
from ff_fast._core import usage as usage_steps
from ff_fast._core import writer as writers
from ff_fast._core.completions import CompletionCore
from ff_fast._core.steps import Step, Steps
from ff_fast._core.summary import fold
from ff_fast._core.tail import MAX_COUNT, StreamPage, TailCore, read_page
from ff_fast.errors import FFError, InvalidInput, InvalidType, PayloadTooLarge, check_int
from ff_fast.types import (
    CancelFlowOutcome,
    CancelFlowPolicy,
    CancelFlowWait,
    CancelOutcome,
    CapabilitySet,
    ClaimPolicy,
    ExecutionDescription,
    FailOutcome,
    FailureClass,
    FailureReason,
    FlowDescription,
    Frame,
    Handle,
    HandleKind,
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
    duration_ms,
    milliseconds,
    payload_bytes,
    seconds,
)

if TYPE_CHECKING:
    from datetime import timedelta

    from ff_fast._core.deployment import Deployment

T = TypeVar("T")
V = TypeVar("V")

MAX_DOCUMENT = 16 << 20
"""Greatest payload of an execution and of its result, in bytes."""

MAX_SIGNAL = 65_536
"""Greatest payload of a signal, in bytes."""

MAX_TTL_MS = 2**48


class Call(NamedTuple, Generic[T]):
    """A checked operation, as a shell carries it out.

    Attributes:
        steps: Makes its steps; called again for every attempt.
        repeatable: The call may be sent again after a lost reply: it gives the same outcome.
        own_connection: The server may block on it, or it takes long: it needs a connection of its own.
        released: The lease id that the call has ended by answering this value; None where the lease goes on. The
            writer that `append_frame` opened for it is closed.
    """

    steps: Callable[[], Steps[T]]
    repeatable: bool = True
    own_connection: bool = False
    released: Callable[[T], str | None] = lambda value: None


class StopEvent(Protocol):
    """What says that a loop shall stop: a ``threading.Event``, an ``asyncio.Event``, or anything with its method."""

    def is_set(self) -> bool:
        """Whether to stop."""


# -- checks and calls that several operations share ------------------------------------------------------------------


def _call(op: ops.Op[T]) -> Call[T]:
    return Call(lambda: ops.call(op), op.repeatable)


def _hinted(
    op: ops.Op[tuple[T, ops.Hints]],
    execution_id: str,
    released: Callable[[T], str | None] = lambda value: None,
) -> Call[T]:
    """Return a call after which executions of the partition may wait for workers."""
    partition = keys.partition_index(execution_id)
    return Call(lambda: ready.with_hints(op, partition), op.repeatable, released=released)


def _always(lease_id: str) -> Callable[[object], str]:
    return lambda value: lease_id


def _checked(name: str, value: object, kind: type[V], default: V | None = None) -> V:
    """Return *value*, checked to be of *kind*; None is *default* where there is one."""
    if value is None and default is not None:
        return default
    if not isinstance(value, kind):
        raise InvalidType(f"{name} must be a {kind.__name__}, not {type(value).__name__}.")
    return value


def _attempt(handle: Handle) -> ops.Attempt:
    return ops.Attempt.of(_checked("handle", handle, Handle))


def _ttl_ms(name: str, value: int | timedelta) -> int:
    return milliseconds(name, value, 1, MAX_TTL_MS)


def _document(name: str, value: object) -> bytes:
    data = payload_bytes(value, name)
    if len(data) > MAX_DOCUMENT:
        raise PayloadTooLarge(MAX_DOCUMENT, len(data))
    return data


def _tags(tags: object) -> dict[str, str]:
    if not isinstance(tags, Mapping):
        raise InvalidType(f"tags must be a mapping of str to str, not {type(tags).__name__}.")
    return {keys.tag_key(name): keys.free_text("tag value", value) for name, value in tags.items()}


def _line(name: str, text: str, limit: int = keys.FREE_TEXT_LIMIT, *, empty: bool = False) -> str:
    return keys.free_text(name, text, limit, empty=empty, error=InvalidInput)


# -- executions -------------------------------------------------------------------------------------------------------


def create_execution(
    on: Deployment,
    *,
    lane: str = "default",
    payload: bytes | str = b"",
    execution_id: str | None = None,
    priority: int = 0,
    required_capabilities: CapabilitySet | None = None,
    namespace: str = "default",
    tags: Mapping[str, str] | None = None,
    retention: float | timedelta = 86_400.0,
    retry: RetryPolicy | None = None,
    delay: float | timedelta | None = None,
    deadline: float | timedelta | None = None,
    attempt_timeout: float | timedelta | None = None,
    flow_id: str | None = None,
    parent_id: str | None = None,
    budgets: Sequence[str] = (),
) -> Call[str]:
    """Create an execution that a worker of *lane* can claim, and return its id.

    Durations are seconds or a ``timedelta``.

    Args:
        lane: 1 to 64 printable ASCII characters.
        payload: Input of the worker, at most 16 MiB.
        execution_id: Id of an earlier call or of ``keys.new_execution_id``, in the partition of its flow or parent if
            it has one. The same id again changes nothing. None makes one, so that the call is repeated safely by
            itself.
        priority: 0 to 9000. The highest is claimed first, then the oldest.
        required_capabilities: Capabilities that a worker must offer to claim it.
        namespace: Tenant, free text of at most 256 bytes.
        tags: ``namespace.name`` to text.
        retention: How long everything of it is kept after its end.
        retry: When a failed or lost attempt is tried again. None retries no failure, and replaces a lost worker 100
            times.
        delay: How long it waits before it can be claimed.
        deadline: How long it may take from now on; then it ends as expired.
        attempt_timeout: How long one attempt may run, suspensions and delays not counted. An attempt that times out is
            retried as *retry* says, else the execution ends as expired.
        flow_id: Flow that it belongs to.
        parent_id: Execution whose `wait_children` waits for it.
        budgets: Budgets that its usage is charged to.

    Raises:
        InvalidInput: An argument is not accepted.
        FlowNotFound, FlowAlreadyTerminal: The flow takes no execution.
        ExecutionNotFound: There is no such parent, or it has ended.
    """
    required = _checked(
        "required_capabilities", required_capabilities, CapabilitySet, CapabilitySet()
    )
    policy = _checked("retry", retry, RetryPolicy, RetryPolicy())
    flow = "" if flow_id is None else keys.canonical_uuid("flow_id", flow_id)
    parent = "" if parent_id is None else keys.canonical_execution_id(parent_id)
    if execution_id is not None:
        eid = keys.canonical_execution_id(execution_id)
    elif parent:
        eid = keys.new_execution_id_beside(parent)
    elif flow:
        eid = keys.execution_id_for_flow(flow, on.partitions)
    else:
        eid = keys.new_execution_id(on.partitions)
    if flow and keys.slot_tag_of(eid) != keys.flow_slot_tag(flow, on.partitions):
        raise InvalidInput("An execution of a flow must have an id in the flow's partition.")
    if parent and keys.slot_tag_of(eid) != keys.slot_tag_of(parent):
        raise InvalidInput("A child must have an id in its parent's partition.")
    op = ops.create_execution(
        eid,
        namespace=keys.free_text("namespace", namespace),
        lane=keys.lane_id(lane),
        priority=check_int("priority", priority, 0, 9000),
        required_capabilities=required.csv(),
        retention_ms=_positive_ms("retention", retention),
        delay_ms=duration_ms("delay", delay),
        deadline_ms=duration_ms("deadline", deadline),
        attempt_timeout_ms=duration_ms("attempt_timeout", attempt_timeout),
        flow_id=flow,
        parent_id=parent,
        budget_ids=[keys.opaque_id("A budget id", budget) for budget in budgets],
        retry=policy,
        payload=_document("payload", payload),
        tags=_tags({} if tags is None else tags),
    )

    def steps() -> Steps[str]:
        yield from ready.with_hints(op, keys.partition_index(eid))
        return eid

    return Call(steps)


def _positive_ms(name: str, value: float | timedelta) -> int:
    ms = duration_ms(name, value)
    if ms < 1:
        raise InvalidInput(f"{name} must be at least a millisecond.")
    return ms


def describe(on: Deployment, execution_id: str) -> Call[ExecutionDescription]:
    """Return an execution as the server holds it; the id of its lease is left out.

    Raises:
        ExecutionNotFound: There is no such execution.
    """
    return _call(ops.describe_execution(keys.canonical_execution_id(execution_id)))


def claim(
    on: Deployment,
    *,
    lane: str = "default",
    worker_id: str = "worker",
    worker_instance_id: str | None = None,
    lease_ttl_ms: int | timedelta = 30_000,
    capabilities: CapabilitySet | None = None,
    policy: ClaimPolicy | None = None,
) -> Call[Handle | None]:
    """Claim the best execution of *lane* that *capabilities* cover, under a lease.

    Args:
        lane: Lane to take work from.
        worker_id: Name of the worker, free text.
        worker_instance_id: Name of its process, free text; None takes host name and process id.
        lease_ttl_ms: Length of the lease, in ms or as a ``timedelta``. Renew it before it lapses.
        capabilities: Capabilities that this worker offers.
        policy: How long to wait for work; the server wakes the worker. None answers at once. While there is only work
            that *capabilities* do not cover, the queue is looked at every 50 ms.

    Returns:
        The handle, or None where there is no work.

    Raises:
        InvalidInput: An argument is not accepted.
        OutcomeUnknown: The reply was lost. Calling again is safe: an execution that was claimed without an owner comes
            back when a supervisor sees its lease lapse.
    """
    wait = _checked("policy", policy, ClaimPolicy, ClaimPolicy.immediate())
    request = claiming.ClaimRequest(
        keys.lane_id(lane),
        *_claimer(worker_id, worker_instance_id, lease_ttl_ms, capabilities),
        max_wait_s=wait.max_wait,
    )
    return Call(
        lambda: claiming.claim(on, request),
        repeatable=False,
        own_connection=wait.max_wait is not None,
    )


def _claimer(
    worker_id: str,
    worker_instance_id: str | None,
    lease_ttl_ms: int | timedelta,
    capabilities: CapabilitySet | None,
) -> tuple[str, str, int, CapabilitySet]:
    instance = f"{socket.gethostname()}-{os.getpid()}"
    return (
        keys.free_text("worker_id", worker_id),
        keys.free_text(
            "worker_instance_id", instance if worker_instance_id is None else worker_instance_id
        ),
        _ttl_ms("lease_ttl_ms", lease_ttl_ms),
        _checked("capabilities", capabilities, CapabilitySet, CapabilitySet()),
    )


def read_payload(on: Deployment, handle: Handle) -> Call[bytes]:
    """Return the payload that the execution of *handle* was created with."""
    return _call(ops.read_payload(_attempt(handle).execution_id))


def renew(
    on: Deployment,
    handle: Handle,
    lease_ttl_ms: int | timedelta | None = None,
) -> Call[LeaseRenewal]:
    """Extend the lease to *lease_ttl_ms* from now.

    Args:
        handle: The lease.
        lease_ttl_ms: Its length, in ms or as a ``timedelta``; None takes that of the claim.

    Raises:
        LeaseExpired, StaleOwner, ExecutionNotActive, ExecutionSuspended, ExecutionNotFound: The lease is gone.
    """
    attempt = _attempt(handle)
    ttl = attempt.fields.lease_ttl_ms if lease_ttl_ms is None else lease_ttl_ms
    return _call(ops.renew_lease(attempt, _ttl_ms("lease_ttl_ms", ttl)))


def complete(on: Deployment, handle: Handle, payload: bytes | str = b"") -> Call[None]:
    """End the execution as completed, with *payload* as its result; its stream ends with it.

    Calling it again is safe. Flush or close writers first: frames that are still on their way are refused.

    Args:
        handle: The lease.
        payload: Result, at most 16 MiB.

    Raises:
        LeaseExpired, StaleOwner, ExecutionNotActive, ExecutionSuspended, ExecutionNotFound: The lease is gone.
    """
    attempt = _attempt(handle)
    op = ops.complete_execution(attempt, _document("payload", payload))
    return _hinted(op, attempt.execution_id, _always(attempt.fields.lease_id))


def fail(
    on: Deployment,
    handle: Handle,
    reason: FailureReason | str,
    failure_class: FailureClass = FailureClass.PERMANENT,
) -> Call[FailOutcome]:
    """End the attempt as failed; its stream ends with it. Calling it again is safe.

    The class and the execution's `RetryPolicy` decide what follows. A transient failure or a timeout is retried while
    retries are left. An ``INFRA_CRASH`` counts as a lost worker. A permanent or cancelled failure ends the execution.

    Args:
        handle: The lease.
        reason: Why, as text or a ``FailureReason``.
        failure_class: Kind of failure.

    Returns:
        Whether a retry is scheduled, and for when.

    Raises:
        LeaseExpired, StaleOwner, ExecutionNotActive, ExecutionSuspended, ExecutionNotFound: The lease is gone.
    """
    attempt = _attempt(handle)
    why = FailureReason(message=reason) if isinstance(reason, str) else reason
    op = ops.fail_execution(
        attempt,
        _checked("reason", why, FailureReason),
        _checked("failure_class", failure_class, FailureClass),
    )
    return _hinted(op, attempt.execution_id, _always(attempt.fields.lease_id))


def cancel(
    on: Deployment,
    target: Handle | str,
    *,
    reason: str = "cancelled",
    grace: float | timedelta | None = None,
) -> Call[CancelOutcome]:
    """Cancel an execution in any state that is not an end. Calling it again is safe.

    Args:
        target: A handle or an execution id.
        reason: Why, at most 4096 bytes of text.
        grace: How long a running worker may take to stop by itself, in seconds or as a ``timedelta``. The worker hears
            of the cancellation with its next append (``writer.cancel_requested``) or renewal, and a supervisor forces it
            afterwards. None cancels at once.

    Raises:
        ExecutionNotFound: There is no such execution.
        ExecutionNotActive: It has ended in another way.
    """
    eid = _attempt(target).execution_id if isinstance(target, Handle) else target
    eid = keys.canonical_execution_id(eid)
    op = ops.cancel_execution(eid, _line("reason", reason, 4096), duration_ms("grace", grace))
    return _hinted(op, eid)


def progress(
    on: Deployment,
    handle: Handle,
    percent: int | None = None,
    message: str = "",
) -> Call[None]:
    """Report progress: a percentage, a line of text, or both. A part that is left out stays as it is.

    Args:
        handle: The lease.
        percent: 0 to 100.
        message: At most 4096 bytes of text.

    Raises:
        LeaseExpired, StaleOwner, ExecutionNotActive, ExecutionSuspended, ExecutionNotFound: The lease is gone.
    """
    if percent is not None:
        check_int("percent", percent, 0, 100)
    text = _line("message", message, 4096, empty=True)
    return _call(ops.report_progress(_attempt(handle), percent, text))


def delay(on: Deployment, handle: Handle, delay: float | timedelta) -> Call[int]:
    """Release the lease; the same attempt goes on after *delay*. Close writers first.

    Args:
        handle: The lease.
        delay: Seconds or a ``timedelta``.

    Returns:
        When it can be claimed again, in ms since the epoch by the server's clock.

    Raises:
        LeaseExpired, StaleOwner, ExecutionNotActive, ExecutionSuspended, ExecutionNotFound: The lease is gone.
    """
    attempt = _attempt(handle)
    op = ops.delay_execution(attempt, duration_ms("delay", delay))
    return _call(op)._replace(released=_always(attempt.fields.lease_id))


def wait_children(on: Deployment, handle: Handle) -> Call[None]:
    """Release the lease until every child (``create_execution(parent_id=...)``) has ended.

    The same attempt goes on then, at once where no child is open.

    Raises:
        LeaseExpired, StaleOwner, ExecutionNotActive, ExecutionSuspended, ExecutionNotFound: The lease is gone.
    """
    attempt = _attempt(handle)
    op = ops.wait_children(attempt)
    return _hinted(op, attempt.execution_id, _always(attempt.fields.lease_id))


def find_reclaimable(on: Deployment, limit: int = 100) -> Call[list[ReclaimToken]]:
    """Find executions whose worker was lost: active, with a lease that has lapsed by the server's clock.

    Args:
        limit: Most tokens to return, 1 to 10,000.
    """
    check_int("limit", limit, 1, 10_000)
    return Call(lambda: supervision.find_reclaimable(on.partitions, limit))


def claim_from_reclaim(
    on: Deployment,
    token: ReclaimToken,
    *,
    worker_id: str = "worker",
    worker_instance_id: str | None = None,
    lease_ttl_ms: int | timedelta = 30_000,
    capabilities: CapabilitySet | None = None,
) -> Call[Handle]:
    """Take an execution over from a lost worker: a new attempt, with a handle of kind ``RESUMED``.

    The old attempt's stream ends as ``producer_lost``, and its worker is a stale owner everywhere. The arguments are
    those of `claim`.

    Raises:
        ExecutionNotClaimable: It is not waiting, and its lease has not lapsed.
        CapabilityMismatch: It requires capabilities that are missing here; the error names them.
        ExecutionNotFound: There is no such execution.
    """
    grant = _checked("token", token, ReclaimToken).grant
    worker, instance, ttl_ms, offered = _claimer(
        worker_id, worker_instance_id, lease_ttl_ms, capabilities
    )
    return _call(
        ops.claim_execution(
            grant.execution_id,
            lane=keys.lane_id(grant.lane_id),
            worker_id=worker,
            worker_instance_id=instance,
            lease_id=keys.new_uuid(),
            lease_ttl_ms=ttl_ms,
            attempt_id=keys.new_uuid(),
            reclaim=True,
            capabilities=offered.tokens,
        )
    )


# -- suspension and signals ---------------------------------------------------------------------------------------------


def create_waitpoint(
    on: Deployment,
    handle: Handle,
    *,
    waitpoint_id: str | None = None,
    expires: float | timedelta = 3600.0,
) -> Call[PendingWaitpoint]:
    """Create a waitpoint for a suspension to come. Signals that arrive before the suspension are kept for it.

    Args:
        handle: The lease.
        waitpoint_id: A UUID; the same again answers the same token. None makes one.
        expires: How long it may stay without a suspension, in seconds or as a ``timedelta``.

    Raises:
        WaitpointConflict: The id belongs to another execution or attempt.
        LeaseExpired, StaleOwner, ExecutionNotActive, ExecutionSuspended, ExecutionNotFound: The lease is gone.
    """
    expires_ms = _positive_ms("expires", expires)
    identity = (
        keys.new_uuid()
        if waitpoint_id is None
        else keys.canonical_uuid("waitpoint_id", waitpoint_id)
    )
    # The first waitpoint of a partition starts its ring of keys, unless a deployment did before.
    secret = os.urandom(32).hex()
    return _call(ops.create_waitpoint(_attempt(handle), identity, expires_ms, "auto", secret))


def suspend(
    on: Deployment,
    handle: Handle,
    condition: ResumeCondition | WaitpointSpec | Sequence[WaitpointSpec],
    *,
    timeout: float | timedelta | None = None,
    on_timeout: TimeoutBehavior = TimeoutBehavior.FAIL,
    reason: str = "waiting_for_signal",
) -> Call[SuspendOutcome]:
    """Release the lease until signals meet *condition*; the same attempt, and its stream, go on then.

    Close writers first. Where signals that came before meet the condition already, nothing is suspended, and the lease
    goes on. Calling it again after a lost reply answers as the first time.

    Args:
        handle: The lease.
        condition: What to wait for; several specs mean any of them.
        timeout: How long, in seconds or as a ``timedelta``; None has no limit.
        on_timeout: What happens then.
        reason: Shown by `describe` and in the history, at most 256 bytes of text.

    Raises:
        InvalidToken, WaitpointClosed: A waitpoint of the condition cannot be used.
        LeaseExpired, StaleOwner, ExecutionNotActive, ExecutionSuspended, ExecutionNotFound: The lease is gone.
    """
    if isinstance(condition, WaitpointSpec):
        condition = ResumeCondition.any(condition)
    elif isinstance(condition, (list, tuple)):
        condition = ResumeCondition.any(*condition)
    if not isinstance(condition, ResumeCondition):
        raise InvalidType("condition must be a ResumeCondition, a WaitpointSpec or several.")
    attempt = _attempt(handle)
    op = ops.suspend_execution(
        attempt,
        keys.new_uuid(),
        condition,
        duration_ms("timeout", timeout),
        _checked("on_timeout", on_timeout, TimeoutBehavior),
        _line("reason", reason),
    )
    suspended = handle.replace(kind=HandleKind.SUSPENDED)
    lease_id = attempt.fields.lease_id

    def steps() -> Steps[SuspendOutcome]:
        satisfied, first_id = yield from ops.call(op)
        return SuspendOutcome(first_id, handle if satisfied else suspended, satisfied)

    return Call(steps, released=lambda outcome: None if outcome.already_satisfied else lease_id)


def deliver_signal(
    on: Deployment,
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
) -> Call[SignalOutcome]:
    """Deliver a signal to a waitpoint, with the waitpoint's token. Calling it again after a lost reply is safe.

    Texts have at most 256 bytes.

    Args:
        execution_id: The execution that waits.
        waitpoint: Id and token, as `create_waitpoint` made them.
        signal_name: Name of the signal.
        payload: At most 64 KiB for the resumed worker.
        signal_id: A UUID; None makes one.
        idempotency_key: A second signal with this key answers the first one.
        correlation_id: Text that ties the signal to something else.
        category: Kind of signal.
        source_type: Kind of sender.
        source_identity: Name of the sender.

    Raises:
        InvalidToken: The token is not valid, or there is no such waitpoint.
        WaitpointClosed: The waitpoint takes no more signals.
        SignalLimitExceeded: The waitpoint has had 10,000 signals.
        ExecutionNotFound: There is no such execution.
    """
    eid = keys.canonical_execution_id(execution_id)
    data = None if payload is None else payload_bytes(payload)
    if data is not None and len(data) > MAX_SIGNAL:
        raise PayloadTooLarge(MAX_SIGNAL, len(data))
    op = ops.deliver_signal(
        eid,
        _checked("waitpoint", waitpoint, PendingWaitpoint),
        signal_id=(
            keys.new_uuid() if signal_id is None else keys.canonical_uuid("signal_id", signal_id)
        ),
        signal_name=_line("signal_name", signal_name),
        category=_line("category", category, empty=True),
        source_type=_line("source_type", source_type, empty=True),
        source_identity=_line("source_identity", source_identity, empty=True),
        correlation_id=_line("correlation_id", correlation_id, empty=True),
        idempotency_key=_line("idempotency_key", idempotency_key, empty=True),
        payload=data,
    )
    return _hinted(op, eid)


def observe_signals(on: Deployment, handle: Handle) -> Call[tuple[ResumeSignal, ...]]:
    """Return the signals that met the condition of the suspension after which this lease was granted.

    Raises:
        LeaseExpired, StaleOwner, ExecutionNotActive, ExecutionSuspended, ExecutionNotFound: The lease is gone.
    """
    return _call(ops.observe_signals(_attempt(handle)))


def rotate_waitpoint_secret(
    on: Deployment, kid: str, secret: bytes, *, grace: float | timedelta = 3600.0
) -> Call[None]:
    """Sign waitpoint tokens with another key from now on, in every partition. Calling it again completes it.

    Args:
        kid: Id of the key, 1 to 64 of ``A-Z a-z 0-9 _ -``.
        secret: 32 random bytes.
        grace: How long tokens of the key before stay valid, in seconds or as a ``timedelta``.

    Raises:
        RotationConflict: The kid is in use with another secret.
    """
    keys.opaque_id("kid", kid)
    if len(_checked("secret", secret, bytes)) != 32:
        raise InvalidInput("secret must be 32 random bytes.")
    grace_ms = duration_ms("grace", grace)
    text = secret.hex()

    def steps() -> Steps[None]:
        calls = [
            ops.rotate_waitpoint_secret(index, kid, text, grace_ms)
            for index in range(on.partitions)
        ]
        replies = yield Step([op.command() for op in calls])
        for op, reply in zip(calls, replies, strict=True):
            op.answer(reply)

    return Call(steps)


# -- usage, flows, tags -------------------------------------------------------------------------------------------------


def report_usage(on: Deployment, handle: Handle, usage: UsageDimensions) -> Call[ReportUsageResult]:
    """Report usage to the budgets of the execution and to its own ledger, completely or not at all.

    With ``usage.dedup_key`` a report counts once, however often it is made.

    Raises:
        BudgetNotFound: A budget of the execution does not exist.
        LeaseExpired, StaleOwner, ExecutionNotActive, ExecutionSuspended, ExecutionNotFound: The lease is gone.
    """
    given = _checked("usage", usage, UsageDimensions)
    attempt = _attempt(handle)
    keyed = given if given.dedup_key else given.with_dedup_key(keys.new_uuid())
    return Call(lambda: usage_steps.report_usage(attempt, keyed))


def create_budget(
    on: Deployment,
    budget_id: str,
    *,
    hard: Mapping[str, int] | None = None,
    soft: Mapping[str, int] | None = None,
) -> Call[None]:
    """Create a budget, or replace the limits of one; the amounts used so far stay.

    Args:
        budget_id: 1 to 64 of ``A-Z a-z 0-9 _ -``.
        hard: Dimension to limit. A report that would pass one is refused as a whole.
        soft: Dimension to limit. A report that passes one is applied, and says so.
    """
    keys.opaque_id("budget_id", budget_id)
    limits: list[dict[str, int]] = []
    for name, given in (("hard", hard), ("soft", soft)):
        if given is not None and not isinstance(given, Mapping):
            raise InvalidType(f"{name} must be a mapping of dimension to limit.")
        limits.append(
            {
                _line("A dimension's name", dimension, 128): check_int(
                    "A limit", limit, 0, 2**53 - 1
                )
                for dimension, limit in (given or {}).items()
            }
        )
    if not any(limits):
        raise InvalidInput("A budget needs at least one limit.")
    return _call(ops.create_budget(budget_id, *limits))


def create_flow(
    on: Deployment, flow_id: str | None = None, *, namespace: str = "default"
) -> Call[str]:
    """Create a flow, for executions that share its partition, and return its id. An existing flow is left as it is.

    A flow is kept while a member is open, and afterwards for a day, or as long as the last member where that is longer.

    Args:
        flow_id: A UUID; None makes one.
        namespace: Tenant, free text.
    """
    identity = keys.new_uuid() if flow_id is None else keys.canonical_uuid("flow_id", flow_id)
    op = ops.create_flow(
        identity,
        keys.flow_slot_tag(identity, on.partitions),
        keys.free_text("namespace", namespace),
    )

    def steps() -> Steps[str]:
        yield from ops.call(op)
        return identity

    return Call(steps)


def cancel_flow(
    on: Deployment,
    flow_id: str,
    policy: CancelFlowPolicy = CancelFlowPolicy.CANCEL_ALL,
    wait: CancelFlowWait = CancelFlowWait.WAIT_INDEFINITE,
    *,
    reason: str = "flow cancelled",
) -> Call[CancelFlowOutcome]:
    """Cancel a flow: no new attempt of a member begins from here on, and members are cancelled as *policy* says.

    Args:
        flow_id: The flow.
        policy: Which members.
        wait: Whether to wait until the members that the policy names are cancelled. Without waiting a supervisor
            cancels them. ``FLOW_ONLY`` waits for nobody.
        reason: Why, at most 4096 bytes of text.

    Raises:
        FlowNotFound: There is no such flow.
        DeadlineExceeded: The wait was over first; a supervisor goes on.
    """
    _checked("policy", policy, CancelFlowPolicy)
    _checked("wait", wait, CancelFlowWait)
    identity = keys.canonical_uuid("flow_id", flow_id)
    slot_tag = keys.flow_slot_tag(identity, on.partitions)
    why = _line("reason", reason, 4096)
    wait_s = (wait.timeout if wait.timeout is not None else float("inf")) if wait.wait else None
    return Call(lambda: flows.cancel_flow(identity, slot_tag, why, policy, wait_s))


def describe_flow(on: Deployment, flow_id: str) -> Call[FlowDescription]:
    """Return a flow and its members.

    Raises:
        FlowNotFound: There is no such flow.
    """
    identity = keys.canonical_uuid("flow_id", flow_id)
    return _call(ops.describe_flow(identity, keys.flow_slot_tag(identity, on.partitions)))


def set_tags(on: Deployment, execution_id: str, tags: Mapping[str, str]) -> Call[int]:
    """Set tags (``namespace.name`` to text) beside those that are there; return how many the execution has.

    Raises:
        InvalidInput: There is no tag, or one is not of this form.
        ExecutionNotFound: There is no such execution.
    """
    checked = _tags(tags)
    if not checked:
        raise InvalidInput("tags must hold at least one tag.")
    return _call(ops.set_tags(keys.canonical_execution_id(execution_id), checked))


def get_tags(on: Deployment, execution_id: str) -> Call[dict[str, str]]:
    """Return the tags of an execution.

    Raises:
        ExecutionNotFound: There is no such execution.
    """
    return _call(ops.read_tags(keys.canonical_execution_id(execution_id)))


def read_result(on: Deployment, execution_id: str) -> Call[bytes]:
    """Return the result that an execution was completed with; empty where it has none.

    Raises:
        ExecutionNotFound: There is no such execution.
    """
    return _call(ops.read_result(keys.canonical_execution_id(execution_id)))


# -- streams ------------------------------------------------------------------------------------------------------------


def describe_stream(
    on: Deployment,
    execution_id: str,
    attempt_index: int = 0,
) -> Call[StreamDescription]:
    """Return the state of the streams of one attempt.

    Raises:
        ExecutionNotFound: There is no such execution.
    """
    eid = keys.canonical_execution_id(execution_id)
    return _call(ops.describe_attempt(eid, keys.attempt_index(attempt_index)))


def read_stream(
    on: Deployment,
    execution_id: str,
    attempt_index: int = 0,
    *,
    after: str | None = None,
    count: int = 100,
    max_bytes: int = 8 << 20,
    visibility: TailVisibility = TailVisibility.ALL,
) -> Call[StreamPage]:
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
        InvalidInput: An argument is not accepted.
    """
    check_int("count", count, 1, MAX_COUNT)
    check_int("max_bytes", max_bytes, 1, 64 << 20)

    def core() -> TailCore:
        return TailCore(execution_id, attempt_index, after, visibility, count)

    core()
    return Call(lambda: read_page(core(), count, max_bytes))


def read_summary(
    on: Deployment,
    execution_id: str,
    attempt_index: int = 0,
) -> Call[SummaryDocument | None]:
    """Return the summary of an attempt with the cursor that continues it; None where it has none.

    Raises:
        ExecutionNotFound: There is no such execution.
    """
    eid = keys.canonical_execution_id(execution_id)
    op = ops.read_summary(eid, keys.attempt_index(attempt_index))

    def steps() -> Steps[SummaryDocument | None]:
        return fold((yield from ops.call(op)))

    return Call(steps)


def tail(
    on: Deployment,
    execution_id: str,
    attempt_index: int = 0,
    *,
    after: str | None = None,
    visibility: TailVisibility = TailVisibility.ALL,
) -> TailCore:
    """Read what one attempt streams, live, on a connection of its own.

    Iterating yields ``StreamFrame`` in sequence order, a ``Gap`` wherever frames are missing, and at last one ``End``.
    A time-out or a cancellation of one read loses nothing: the tail goes on with the next read.

    Args:
        execution_id: Id of the execution.
        attempt_index: Attempt, from 0. One that is not claimed yet is waited for.
        after: ``cursor`` of an item, of a page or of a summary, exclusive; None is the beginning.
        visibility: Whether best-effort frames are wanted.

    Raises:
        InvalidInput: An argument is not accepted.
        ExecutionNotFound, AttemptNotFound: There is no such attempt. Raised by the first read.
        Unavailable: The server cannot be reached, however often the tail reconnects as the configuration allows. Raised
            by a read; the tail can still go on.
    """
    return TailCore(execution_id, attempt_index, after, visibility)


def subscribe_completions(
    on: Deployment, scope: ScannerFilter | None = None, *, after: str | None = None
) -> CompletionCore:
    """Read every execution that ends, on a connection of its own, without an end.

    A time-out or a cancellation of one read loses nothing.

    Args:
        scope: Which executions; None is all of them.
        after: ``cursor`` of an earlier completion, from which the subscription goes on without hole or repeat;
            ``start`` for all that is kept (about 10,000 for each partition); None begins when the first is asked for.

    Raises:
        InvalidCursor: *after* is none of these, or completions behind it were trimmed already.
        Unavailable: The server cannot be reached, however often the subscription reconnects as the configuration
            allows.
    """
    return CompletionCore(on.partitions, after, _scope(scope))


def _scope(value: ScannerFilter | None) -> ScannerFilter:
    return _checked("scope", value, ScannerFilter, ScannerFilter.NOOP)


class WriterRequest(NamedTuple):
    """A writer to be opened: whose, and how."""

    lease_id: str
    options: writers.WriterOptions
    call: Call[writers.WriterState]


def open_writer(
    on: Deployment,
    handle: Handle,
    *,
    mode: StreamMode | None = None,
    retention_maxlen: int = writers.RETENTION_MAXLEN,
    max_unacknowledged_bytes: int = writers.MAX_UNACKNOWLEDGED_BYTES,
    linger: float | timedelta = 0.0,
) -> WriterRequest:
    """Open the writer of the attempt; one that was open before is superseded.

    Args:
        handle: The lease.
        mode: Mode of frames that name none; durable where None.
        retention_maxlen: How many durable frames are kept, 1 to 2^40.
        max_unacknowledged_bytes: Past this many bytes, 64 KiB to 16 GiB, ``write`` raises ``Overloaded``.
        linger: How long a batch may wait for more frames, at most a second; in seconds or as a ``timedelta``.

    Raises:
        ExecutionNotFound, StaleOwner, ExecutionSuspended, StreamClosed, LeaseExpired: The handle may not write.
    """
    attempt = _attempt(handle)
    linger_s = seconds("linger", linger, zero=True)
    if linger_s > 1:
        raise InvalidInput("linger must be at most a second.")
    options = writers.WriterOptions(
        mode=_checked("mode", mode, StreamMode, StreamMode.durable()),
        retention_maxlen=check_int("retention_maxlen", retention_maxlen, 1, 2**40),
        max_unacknowledged_bytes=check_int(
            "max_unacknowledged_bytes", max_unacknowledged_bytes, 1 << 16, 1 << 34
        ),
        linger_ms=linger_s * 1000,
    )
    call = Call(lambda: writers.open_writer(attempt, options))
    return WriterRequest(attempt.fields.lease_id, options, call)


class FrameRequest(NamedTuple):
    """One frame to be appended, and how long to wait until it is stored, in seconds."""

    handle: Handle
    lease_id: str
    frame: Frame
    timeout: float | None


def append_frame(
    on: Deployment,
    handle: Handle,
    frame: Frame,
    timeout: float | timedelta | None = None,
) -> FrameRequest:
    """Append one frame, wait until it is stored, and return the newest id, the frame count and the summary version.

    The writer that is open for the handle is used, or one is opened. With ``frame.seq`` the call is idempotent: a frame
    that this writer has written is not written again.

    Args:
        handle: The lease.
        frame: The frame.
        timeout: How long to wait, in seconds or as a ``timedelta``; None waits as long as the writer tries.

    Raises:
        SequenceGap: ``frame.seq`` is not the next sequence.
        FFError: As `Writer.write` and `Writer.flush`.
    """
    lease_id = _attempt(handle).fields.lease_id
    return FrameRequest(
        handle, lease_id, _checked("frame", frame, Frame), writers.timeout_s(timeout)
    )


# -- loops that go on beside the calls --------------------------------------------------------------------------------


class LeaseRequest(NamedTuple):
    """A lease to be kept: its id, its length, the call that renews it, and whom to tell of its loss."""

    lease_id: str
    ttl_ms: int
    renewal: Call[LeaseRenewal]
    on_lost: Callable[[FFError], None] | None


def keep_lease(
    on: Deployment, handle: Handle, on_lost: Callable[[FFError], None] | None = None
) -> LeaseRequest:
    """Renew a lease in the background until the keeper is stopped; a context manager.

    Args:
        handle: The lease.
        on_lost: Called with the error, on a thread or the loop of the library, when the lease is gone, or could not be
            renewed before it lapsed. The writers of the handle fail with the error before that.
    """
    fields = _attempt(handle).fields
    return LeaseRequest(fields.lease_id, fields.lease_ttl_ms, renew(on, handle), on_lost)


class SupervisionRequest(NamedTuple):
    """Rounds of supervision: one of them as a call, the seconds between two, and what ends them."""

    round: Call[int]
    interval_s: float
    stop: StopEvent | None


def supervise(
    on: Deployment,
    scope: ScannerFilter | None = None,
    *,
    interval: float | timedelta = 0.25,
    stop: StopEvent | None = None,
) -> SupervisionRequest:
    """Fire what is due until *stop* is set: lapsed leases, delays, timeouts, deadlines, waitpoints, cancellations.

    Without a supervisor, none of these happens. Any number may run at once; a deployment needs one.

    Args:
        scope: Which executions it looks after; None is all of them.
        interval: Time between two rounds, in seconds or as a ``timedelta``.
        stop: Set it to return after the current round.
    """
    rounds = supervision.Supervision(on, _scope(scope))
    return SupervisionRequest(
        Call(rounds.round, own_connection=True), seconds("interval", interval, zero=True), stop
    )


class WorkerOptions(NamedTuple):
    """Checked options of a worker."""

    claim: Call[Handle | None]
    mode: StreamMode | None
    concurrency: int
    stop: StopEvent | None


CLAIM_WAIT_S = 1.0
"""How long a worker waits for work before it looks whether it shall stop."""


def run_worker(
    on: Deployment,
    *,
    lane: str = "default",
    worker_id: str = "worker",
    worker_instance_id: str | None = None,
    capabilities: CapabilitySet | None = None,
    lease_ttl_ms: int | timedelta = 30_000,
    mode: StreamMode | None = None,
    concurrency: int = 1,
    stop: StopEvent | None = None,
) -> WorkerOptions:
    """Claim executions of a lane and call *handler* with a `Task` for each, until stopped.

    The lease is renewed in the background. The handler's result is the execution's result; an exception fails the
    attempt (as transient, or as the ``TaskFailed`` that it is). Where the lease is lost in the middle, writes fail,
    ``task.cancelled`` is true, and the handler's result or exception is discarded.

    SIGTERM and SIGINT in the main thread, *stop*, and the close of the backend let running handlers end and claim
    nothing more. An exit or an interrupt that a handler raises ends the worker too, and is raised here; its execution
    goes to another worker as from a lost one. In asyncio, cancelling the worker cancels the handlers that run: the
    frames that they wrote are stored, and their executions go to other workers within about two seconds.

    Args:
        handler: An ordinary function; in :mod:`ff_fast.aio` a coroutine function.
        lane: Lane to take work from.
        worker_id: Name of the worker.
        worker_instance_id: Name of its process; None takes host name and process id.
        capabilities: Capabilities that it offers.
        lease_ttl_ms: Length of a lease, in ms or as a ``timedelta``.
        mode: Mode of frames that name none; durable where None.
        concurrency: How many handlers run at once, 1 to 10,000.
        stop: Set it to stop.
    """
    check_int("concurrency", concurrency, 1, 10_000)
    if mode is not None:
        _checked("mode", mode, StreamMode)
    call = claim(
        on,
        lane=lane,
        worker_id=worker_id,
        worker_instance_id=worker_instance_id,
        lease_ttl_ms=lease_ttl_ms,
        capabilities=capabilities,
        policy=ClaimPolicy.with_max_wait(CLAIM_WAIT_S),
    )
    return WorkerOptions(call, mode, concurrency, stop)
