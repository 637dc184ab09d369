"""Every public operation, declared once: signature, documentation, checks and steps.

The first parameter is the deployment; both shells bind the rest as their methods. An operation checks its arguments
before anything is sent, and returns a request for the shell to carry out, in most cases a :class:`Call`.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from functools import partial
from math import inf
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, Protocol, TypeVar, get_args

from ff_fast import keys
from ff_fast._core import claiming, diagnosis, flows, listing, ops, ready, supervision
from ff_fast._core import durability as levels
from ff_fast._core import explain as telling
from ff_fast._core import usage as usage_steps
from ff_fast._core import writer as writers
from ff_fast._core.completions import CompletionCore
from ff_fast._core.durability import DEFAULT_TIMEOUT_S, Level
from ff_fast._core.follow import Ended, FollowCore, WaitCore
from ff_fast._core.leases import LeaseClock, is_ended_by_plan, is_lease_lost, say_lost, told_as
from ff_fast._core.roles import ROLES
from ff_fast._core.stats import counting, stats_of
from ff_fast._core.steps import Pause, Step, Steps, applied_in_part
from ff_fast._core.summary import fold
from ff_fast._core.tail import MAX_COUNT, StreamPage, TailCore, read_page
from ff_fast.errors import (
    MAX_INT,
    DeadlineExceeded,
    ExecutionNotFound,
    ExecutionState,
    FFError,
    InvalidId,
    InvalidInput,
    InvalidType,
    Outcome,
    PayloadTooLarge,
    SequenceGap,
    check_int,
    make_unknown,
)
from ff_fast.types import (
    CancelFlowOutcome,
    CancelFlowPolicy,
    CancelFlowWait,
    CancelOutcome,
    CapabilitySet,
    ClaimPolicy,
    Durability,
    ExecutionDescription,
    ExecutionPage,
    FailOutcome,
    FailureClass,
    FailureReason,
    Finding,
    FlowDescription,
    Frame,
    Handle,
    HandleKind,
    LaneSummary,
    LeaseRenewal,
    OnCancel,
    PendingWaitpoint,
    ReclaimToken,
    ReportUsageResult,
    ResumeCondition,
    ResumeSignal,
    RetryPolicy,
    ScannerFilter,
    SignalOutcome,
    Stats,
    StreamDescription,
    StreamMode,
    SummaryDocument,
    SuspendOutcome,
    TailVisibility,
    TimeoutBehavior,
    UsageDimensions,
    WaitpointSpec,
    WorkerSummary,
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

MAX_TAGS = 256
"""Most tags of an execution."""

MAX_TTL_MS = 2**48

STATES: tuple[ExecutionState, ...] = get_args(ExecutionState)
"""All states of an execution."""


class Call(NamedTuple, Generic[T]):
    """A checked operation for a shell to carry out.

    Attributes:
        steps: Makes the steps; called again for every attempt.
        writes: The call changes something on the server.
        own_connection: The call takes long, and needs a connection of its own.
        releases: The id of the lease that the call may release. What was written under it is stored before.
        released_lease: Returns the id of the lease that the call has released, given its result; None if the lease
            continues. The shell then closes the writer that `append_frame` opened under it.
        extended_lease: The id of the lease that the call extends, and its length from then on, in seconds.
        claim: What a claim has taken and not yet passed to its caller.
        when_closed: The call may be made while the backend closes.
    """

    steps: Callable[[], Steps[T]]
    writes: bool = True
    own_connection: bool = False
    releases: str | None = None
    released_lease: Callable[[T], str | None] = lambda value: None
    extended_lease: tuple[str, float] | None = None
    claim: claiming.Claim | None = None
    when_closed: bool = False


class StopEvent(Protocol):
    """Tells a loop to stop: a ``threading.Event``, an ``asyncio.Event``, or any object with ``is_set``."""

    def is_set(self) -> bool:
        """Return whether to stop."""


_REPLAYS = 3
"""How often a call that releases a lease stores lost frames again before it gives up."""

# -- checks and calls that several operations share -----------------------------------------------------------------


def _call(op: ops.Op[T]) -> Call[T]:
    return Call(lambda: ops.call(op), writes=not op.read_only)


def _is_there(value: object) -> bool:
    return value is not None


def _hinted(op: ops.Op[tuple[T, ops.Hints]], execution_id: str) -> Call[T]:
    """Return a call that may make executions claimable, with the hints that it publishes."""
    partition = keys.partition_index(execution_id)
    return Call(lambda: ready.with_hints(op, partition))


def _releasing(
    on: Deployment,
    attempt: ops.Attempt,
    steps: Callable[[bytes], Steps[T]],
    *,
    last_sequence: int | None = None,
    releases: Callable[[T], bool] = lambda value: True,
    reach: Reach | None = None,
    fails: bool = False,
) -> Call[T]:
    """Return a call that releases a lease, unless its result says otherwise.

    *steps* gets the id of the last frame that is known to be stored, by this backend's writers or, with
    *last_sequence*, by the caller. It is looked up when the call is sent, as a writer may be closed until then. What the
    server has lost of this backend's frames is stored again before. With *fails* the lease is released whatever is lost,
    since the attempt ends without success. Then the call reaches the level of *reach*.
    """
    lease_id = attempt.fields.lease_id

    def releasing() -> Steps[T]:
        on.releases(lease_id)
        place = on.places.find(lease_id)
        compares = True
        # A server that is replaced meanwhile may lack frames again.
        left = _REPLAYS
        while True:
            if place is not None and not fails:
                place.tell_losses()
            known = on.places.last_id(lease_id, last_sequence) if compares else b""
            try:
                value = yield from steps(known)
                on.places.confirm(lease_id)
                if reach is not None:
                    # What was applied may be lost before the level is reached. A question then meets the gap.
                    yield from reach.steps(known)
            except SequenceGap:
                left -= 1
                if left and place is not None and (yield from writers.stored_again(attempt, place)):
                    continue
                if not fails:
                    on.places.tell(lease_id)
                    raise
                compares = False
            except FFError as error:
                if is_lease_lost(error):
                    on.places.forget(lease_id)
                raise
            else:
                # Not before: a try that follows a lost reply, or a level that was not reached, compares the last frame
                # as well, and stores again what is held.
                if releases(value):
                    on.places.release(lease_id)
                return value

    return Call(
        releasing,
        releases=lease_id,
        released_lease=lambda value: lease_id if releases(value) else None,
    )


class Reach:
    """The level that a call asks for what it has written.

    Args:
        op: Makes the call once more, given what its first steps got: a repeat changes nothing.
        durability, timeout: What the caller has passed.
    """

    __slots__ = ("_level", "_op", "_until")

    def __init__(
        self,
        op: Callable[[bytes], ops.Op[Any]],
        durability: Durability | None,
        timeout: float | timedelta,
    ) -> None:
        self._op = op
        self._level = Level.checked(durability, timeout)
        self._until: float | None = None

    def steps(self, last_id: bytes = b"") -> Steps[None]:
        """Wait until the level is reached; all tries of the call share its time."""
        if not self._level.asks:
            return
        if self._until is None:
            self._until = time.monotonic() + self._level.timeout_s
        yield from levels.reach(levels.of_call(self._op(last_id)), self._level, self._until)


def _checked(name: str, value: object, kind: type[V], default: V | None = None) -> V:
    """Return *value* if it is of *kind*; None stands for *default*, if there is one."""
    if value is None and default is not None:
        return default
    if not isinstance(value, kind):
        raise InvalidType(f"{name} must be a {kind.__name__}, not {type(value).__name__}.")
    return value


def _attempt(handle: Handle) -> ops.Attempt:
    return ops.Attempt.of(_checked("handle", handle, Handle))


def _ttl_ms(name: str, value: int | timedelta) -> int:
    return milliseconds(name, value, 1, MAX_TTL_MS)


def _document(what: str, value: object) -> bytes:
    return _bounded(what, payload_bytes(value), MAX_DOCUMENT)


def _bounded(what: str, data: bytes, limit: int) -> bytes:
    if len(data) > limit:
        raise PayloadTooLarge(limit, len(data), what)
    return data


def _tags(tags: object) -> dict[str, str]:
    if not isinstance(tags, Mapping):
        raise InvalidType(f"tags must be a mapping of str to str, not {type(tags).__name__}.")
    if len(tags) > MAX_TAGS:
        raise InvalidInput(f"An execution has at most {MAX_TAGS} tags.")
    return {keys.tag_key(name): keys.free_text("tag value", value) for name, value in tags.items()}


def _line(name: str, text: str, limit: int = keys.FREE_TEXT_LIMIT, *, empty: bool = False) -> str:
    return keys.free_text(name, text, limit, empty=empty, error=InvalidInput)


# -- executions ------------------------------------------------------------------------------------------------------


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
    handler: str | None = None,
) -> Call[str]:
    """Create an execution that a worker of *lane* can claim, and return its id.

    Durations are seconds or a ``timedelta``.

    Args:
        lane: 1 to 64 printable ASCII characters.
        payload: Input of the worker, at most 16 MiB.
        execution_id: Id of an earlier call or of ``keys.new_execution_id``, in the partition of the flow or parent if
            there is one. Repeating an id changes nothing. None makes a new id; retries of the call use the same one.
        priority: 0 to 9000. The highest is claimed first, then the oldest.
        required_capabilities: Capabilities that a worker must offer to claim the execution.
        namespace: Tenant, free text of at most 256 bytes.
        tags: ``namespace.name`` to text.
        retention: Time that all its data is kept after its end, at least 1 ms.
        retry: Policy for failed and lost attempts. None retries no failure, and replaces a lost worker 100 times.
        delay: Time before it can be claimed.
        deadline: Longest time from now to its end; then it ends as expired.
        attempt_timeout: Longest running time of one attempt, without suspensions and delays. An attempt that times out
            is retried by *retry*; without retries left, the execution ends as expired.
        flow_id: Flow of the execution.
        parent_id: Execution whose `wait_children` waits for this one.
        budgets: Ids of the budgets that its usage is charged to.
        handler: Name of the handler that runs it, a required capability of its worker: see :class:`ff_fast.Worker`. None
            leaves it to any worker's default one.

    Raises:
        InvalidInput: An argument is not accepted.
        FlowNotFound, FlowAlreadyTerminal: There is no such flow, or it is cancelled.
        ExecutionNotFound: There is no such parent, or it has ended.
    """
    required = _checked(
        "required_capabilities", required_capabilities, CapabilitySet, CapabilitySet()
    )
    if handler is not None:
        token = keys.handler_capability(keys.handler_name(handler))
        required = CapabilitySet((*required.tokens, token))
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
        payload=_document("payload of an execution", payload),
        tags=_tags({} if tags is None else tags),
        traceparent=None if on.tracing is None else on.tracing.traceparent(),
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
    """Return the state of an execution, without its payload, its result, and the id of its lease.

    Raises:
        ExecutionNotFound: There is no such execution.
    """
    return _call(ops.describe_execution(keys.canonical_execution_id(execution_id)))


def list_executions(
    on: Deployment,
    *,
    lane: str | None = None,
    state: ExecutionState | None = None,
    namespace: str | None = None,
    tag: tuple[str, str] | None = None,
    after: str | None = None,
    count: int = 100,
) -> Call[ExecutionPage]:
    """List executions, the newest first: by the time of their end, or of their creation while they have not ended.

    Executions that have not ended are all listed. Of those that have, each partition lists the newest 2,000 of a state, of
    the last day, as long as they are kept. The pages are no snapshot: an execution that ends while they are read may be in
    two of them or in none.

    A page takes one call a partition, and more where a filter lets little pass; a call takes at most 2 ms of the server.

    Args:
        lane: Only of this lane; the empty text is for named streams. None is all.
        state: Only in this state.
        namespace: Only of this namespace.
        tag: Only with this tag and value.
        after: `next` of the page before.
        count: Greatest number of executions, 1 to 1000. A page may have fewer, and even none, while `next` says that it is
            not the last one.

    Raises:
        InvalidCursor: *after* is no cursor of a page.
        InvalidInput: Another argument is not accepted.
        Corruption: An index is foreign data.
    """
    if state is not None and state not in STATES:
        raise InvalidInput(f"state must be one of {', '.join(STATES)}.")
    place = None if after is None else listing.Place.of(after)
    wanted = ops.Filter(
        STATES if state is None else (state,),
        None if lane is None else lane and keys.lane_id(lane),
        None if namespace is None else keys.free_text("namespace", namespace),
        None if tag is None else _tag(tag),
    )
    number = check_int("count", count, 1, 1000)
    return Call(
        lambda: listing.executions(on.partitions, wanted, place, number),
        writes=False,
        own_connection=True,
    )


def _tag(value: object) -> tuple[str, str]:
    if not isinstance(value, tuple) or len(value) != 2:
        raise InvalidType(f"tag must be a pair of str, not {type(value).__name__}.")
    return keys.tag_key(value[0]), keys.free_text("tag value", value[1])


def list_lanes(on: Deployment) -> Call[tuple[LaneSummary, ...]]:
    """Count what is in each lane that has executions, or has had failures within the last hour; the fullest first.

    It takes one call a partition, and one more for each 384 executions of it that neither wait nor have ended.

    Raises:
        Corruption: An index is foreign data.
    """
    return Call(lambda: listing.lanes(on.partitions), writes=False, own_connection=True)


def list_workers(on: Deployment) -> Call[tuple[WorkerSummary, ...]]:
    """List the instances of workers that hold leases, those with the most executions first.

    A worker without an execution holds no lease and is not listed. The list takes the calls of `list_executions` for all
    active executions.

    Raises:
        Corruption: An index is foreign data.
    """
    return Call(lambda: listing.workers(on.partitions), writes=False, own_connection=True)


def explain(on: Deployment, execution_id: str) -> Call[tuple[str, ...]]:
    """Tell the history of an execution in sentences, for people.

    They say when it was created with which tags and in which trace, who claimed it when, why each attempt ended, who holds
    the lease or what it waits for and why nobody claims it, and which frames have left its streams by which rule. Texts of callers and workers, such as errors, are in them as
    they are. Programs take `describe` and `describe_stream`, from which the sentences are made.

    Raises:
        ExecutionNotFound: There is no such execution.
    """
    eid = keys.canonical_execution_id(execution_id)
    return Call(lambda: telling.explain(eid, on.partitions), writes=False, own_connection=True)


def diagnose(on: Deployment, *, role: str | None = None) -> Call[tuple[Finding, ...]]:
    """Look at the deployment: server, memory policy, persistence, library, clock, supervision, rights of this user.

    Nothing is changed. What this user may not ask for is ``unknown``. In a cluster it is one node that tells of itself.

    Args:
        role: The part that this user shall play, one of those of ``ff-fast acl``; a right that it lacks is a failure. None
            tells which roles the user has.

    Raises:
        InvalidInput: There is no such role.
    """
    if role is not None and role not in ROLES:
        raise InvalidInput(f"role must be one of {', '.join(ROLES)}.")
    names = list(ROLES) if role is None else [role]
    return Call(lambda: diagnosis.diagnose(on, names, role), writes=False)


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
        policy: How long to wait for work; None answers at once. The server wakes a waiting worker.

    Returns:
        The handle, or None if there is no work. Work whose claim is abandoned, because the caller was cancelled or
        interrupted or the backend closed, is given back at once and waits as before.

    Raises:
        InvalidInput: An argument is not accepted.
        OutcomeUnknown: The server could not be reached again after a lost reply. Calling again is safe: an execution
            that the lost call claimed is given back by this backend, or after its lease has lapsed by a supervisor.
    """
    wait = _checked("policy", policy, ClaimPolicy, ClaimPolicy.immediate())
    return _claim(
        on,
        keys.lane_id(lane),
        *_claimer(worker_id, worker_instance_id, lease_ttl_ms, capabilities),
        max_wait_s=wait.max_wait,
    )


def _claim(
    on: Deployment,
    lane: str,
    worker_id: str,
    worker_instance_id: str,
    lease_ttl_ms: int,
    capabilities: CapabilitySet,
    *,
    max_wait_s: float | None,
    offered: CapabilitySet | None = None,
    plain: bool = True,
) -> Call[Handle | None]:
    """Return a claim; *offered* are more capabilities, and *plain* whether it takes executions that require nothing."""
    if offered is not None:
        capabilities = CapabilitySet((*capabilities.tokens, *offered.tokens))
    request = claiming.ClaimRequest(
        lane, worker_id, worker_instance_id, lease_ttl_ms, capabilities, max_wait_s, plain
    )
    state = claiming.Claim(request)
    steps = counting(on.tally, "executions_claimed", lambda: claiming.claim(on, state), _is_there)
    return Call(steps, claim=state)


def _this_process() -> str:
    return f"{socket.gethostname()}-{os.getpid()}"


def _claimer(
    worker_id: str,
    worker_instance_id: str | None,
    lease_ttl_ms: int | timedelta,
    capabilities: CapabilitySet | None,
) -> tuple[str, str, int, CapabilitySet]:
    instance = _this_process() if worker_instance_id is None else worker_instance_id
    return (
        keys.free_text("worker_id", worker_id),
        keys.free_text("worker_instance_id", instance),
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
        lease_ttl_ms: Its new length, in ms or as a ``timedelta``; None takes the length of the claim.

    Raises:
        LeaseExpired, StaleOwner, StateLost, ExecutionNotActive, ExecutionSuspended, ExecutionNotFound: The lease is
            gone.
    """
    attempt = _attempt(handle)
    ttl = attempt.fields.lease_ttl_ms if lease_ttl_ms is None else lease_ttl_ms
    ttl_ms = _ttl_ms("lease_ttl_ms", ttl)
    call = _call(ops.renew_lease(attempt, ttl_ms))
    return call._replace(extended_lease=(attempt.fields.lease_id, ttl_ms / 1000))


def complete(
    on: Deployment,
    handle: Handle,
    payload: bytes | str = b"",
    *,
    last_sequence: int | None = None,
    durability: Durability | None = None,
    durability_timeout: float | timedelta = DEFAULT_TIMEOUT_S,
) -> Call[None]:
    """End the execution as completed, with *payload* as its result; its stream ends with it.

    Calling it again is safe. Flush or close writers first: frames that are not stored yet are refused. A stream that has
    lost frames which this backend's writers know to be stored cannot end as a success; `fail` can end it.

    Args:
        handle: The lease.
        payload: Result, at most 16 MiB.
        last_sequence: Sequence of the last frame, where a writer of another backend or process has written it.
        durability: Level that the end, and all before it, has reached when the call returns; None is
            ``Durability.stored()``.
        durability_timeout: Longest wait for that, in seconds or as a ``timedelta``, at least 1 ms.

    Raises:
        NotReplicated: *durability* was not confirmed in time. The call is applied; repeating it asks again.
        FramesLost: The server has lost frames in a failover that this backend does not keep any more. Nothing was
            completed; call again to complete without them.
        SequenceGap: The stream is shorter than that, or ends with another frame, as after a failover.
        LeaseExpired, StaleOwner, StateLost, ExecutionNotActive, ExecutionSuspended, ExecutionNotFound: The lease is
            gone.
    """
    attempt = _attempt(handle)
    result = _document("result", payload)
    if last_sequence is not None:
        check_int("last_sequence", last_sequence, 0, MAX_INT)
    partition = keys.partition_index(attempt.execution_id)

    completing = partial(ops.complete_execution, attempt, result)
    call = _releasing(
        on,
        attempt,
        lambda last_id: ready.with_hints(completing(last_id), partition),
        last_sequence=last_sequence,
        reach=Reach(completing, durability, durability_timeout),
    )
    return call._replace(steps=counting(on.tally, "executions_completed", call.steps))


def fail(
    on: Deployment,
    handle: Handle,
    reason: FailureReason | str,
    failure_class: FailureClass = FailureClass.PERMANENT,
    *,
    durability: Durability | None = None,
    durability_timeout: float | timedelta = DEFAULT_TIMEOUT_S,
) -> Call[FailOutcome]:
    """End the attempt as failed; its stream ends with it. Calling it again is safe.

    The class and the execution's `RetryPolicy` decide about retries. A transient failure or a timeout is retried while
    retries are left. An ``INFRA_CRASH`` counts as a lost worker. A permanent or cancelled failure ends the execution.

    Args:
        handle: The lease.
        reason: Text of at most 64 KiB, or a ``FailureReason``.
        failure_class: Kind of failure.
        durability: Level that the end, and all before it, has reached when the call returns; None is
            ``Durability.stored()``.
        durability_timeout: Longest wait for that, in seconds or as a ``timedelta``, at least 1 ms.

    Returns:
        Whether a retry is scheduled, and its time.

    Raises:
        NotReplicated: *durability* was not confirmed in time. The call is applied; repeating it asks again.
        LeaseExpired, StaleOwner, StateLost, ExecutionNotActive, ExecutionSuspended, ExecutionNotFound: The lease is
            gone.
    """
    attempt = _attempt(handle)
    why = FailureReason(message=reason) if isinstance(reason, str) else reason
    _checked("reason", why, FailureReason)
    _checked("failure_class", failure_class, FailureClass)
    partition = keys.partition_index(attempt.execution_id)

    def fail_with(last_id: bytes) -> ops.Op[tuple[FailOutcome, ops.Hints]]:
        return ops.fail_execution(attempt, why, failure_class, last_id)

    call = _releasing(
        on,
        attempt,
        lambda last_id: ready.with_hints(fail_with(last_id), partition),
        fails=True,
        reach=Reach(fail_with, durability, durability_timeout),
    )
    return call._replace(steps=counting(on.tally, "executions_failed", call.steps))


def cancel(
    on: Deployment,
    target: Handle | str,
    *,
    reason: str = "cancelled",
    grace: float | timedelta | None = None,
    durability: Durability | None = None,
    durability_timeout: float | timedelta = DEFAULT_TIMEOUT_S,
) -> Call[CancelOutcome]:
    """Cancel an execution that has not ended. Calling it again is safe.

    Args:
        target: A handle or an execution id.
        reason: Text of at most 4096 bytes.
        grace: Time for a running worker to stop by itself, in seconds or as a ``timedelta``. It is notified at once
            (``task.cancelled``), or by the answer to its next append or renewal; after the grace a supervisor forces the
            cancellation. None cancels at once, and the worker loses its lease.
        durability: Level that the cancellation or the request for it has reached when the call returns; None is
            ``Durability.stored()``.
        durability_timeout: Longest wait for that, in seconds or as a ``timedelta``, at least 1 ms.

    Raises:
        NotReplicated: *durability* was not confirmed in time. The call is applied; repeating it asks again.
        ExecutionNotFound: There is no such execution.
        ExecutionNotActive: The execution has ended, and not as cancelled.
    """
    eid = _attempt(target).execution_id if isinstance(target, Handle) else target
    eid = keys.canonical_execution_id(eid)
    op = ops.cancel_execution(eid, _line("reason", reason, 4096), duration_ms("grace", grace))
    reach = Reach(lambda last_id: op, durability, durability_timeout)
    call = _hinted(op, eid)

    def steps() -> Steps[CancelOutcome]:
        outcome = yield from call.steps()
        if outcome.cancelled:
            yield from counting(on.tally, "executions_cancelled", reach.steps)()
        else:
            yield from reach.steps()
        return outcome

    return call._replace(steps=steps)


def progress(
    on: Deployment,
    handle: Handle,
    percent: int | None = None,
    message: str = "",
) -> Call[None]:
    """Report progress: a percentage, a line of text, or both. An omitted part keeps its value.

    Args:
        handle: The lease.
        percent: 0 to 100.
        message: At most 4096 bytes of text.

    Raises:
        LeaseExpired, StaleOwner, StateLost, ExecutionNotActive, ExecutionSuspended, ExecutionNotFound: The lease is
            gone.
    """
    if percent is not None:
        check_int("percent", percent, 0, 100)
    text = _line("message", message, 4096, empty=True)
    return _call(ops.report_progress(_attempt(handle), percent, text))


def delay(on: Deployment, handle: Handle, delay: float | timedelta) -> Call[int]:
    """Release the lease; the same attempt continues after *delay*. Close writers first.

    Args:
        handle: The lease.
        delay: Seconds or a ``timedelta``.

    Returns:
        Time at which it can be claimed again, in ms since the epoch by the server's clock.

    Raises:
        FramesLost: The server has lost frames in a failover that this backend does not keep any more. Nothing was
            released; call again to go on without them.
        SequenceGap: The stream has lost frames which this backend knows to be stored, and the backend keeps none.
        LeaseExpired, StaleOwner, StateLost, ExecutionNotActive, ExecutionSuspended, ExecutionNotFound: The lease is
            gone.
    """
    attempt = _attempt(handle)
    delay_ms = duration_ms("delay", delay)
    return _releasing(
        on, attempt, lambda last_id: ops.call(ops.delay_execution(attempt, delay_ms, last_id))
    )


def wait_children(on: Deployment, handle: Handle) -> Call[None]:
    """Release the lease until every child (``create_execution(parent_id=...)``) has ended.

    The same attempt continues afterwards; at once if no child is open.

    Raises:
        FramesLost: The server has lost frames in a failover that this backend does not keep any more. Nothing was
            released; call again to go on without them.
        SequenceGap: The stream has lost frames which this backend knows to be stored, and the backend keeps none.
        LeaseExpired, StaleOwner, StateLost, ExecutionNotActive, ExecutionSuspended, ExecutionNotFound: The lease is
            gone.
    """
    attempt = _attempt(handle)
    partition = keys.partition_index(attempt.execution_id)
    return _releasing(
        on,
        attempt,
        lambda last_id: ready.with_hints(ops.wait_children(attempt, last_id), partition),
    )


def find_reclaimable(on: Deployment, limit: int = 100) -> Call[list[ReclaimToken]]:
    """Find executions whose worker was lost: they are active, and their lease has lapsed by the server's clock.

    Args:
        limit: Largest number of tokens to return, 1 to 10,000.
    """
    check_int("limit", limit, 1, 10_000)
    return Call(lambda: supervision.find_reclaimable(on.partitions, limit), writes=False)


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

    The old attempt's stream ends as ``producer_lost``, and every call of its worker raises ``StaleOwner``. The other
    arguments are those of `claim`.

    Raises:
        ExecutionNotClaimable: The execution is not waiting, and its lease has not lapsed.
        CapabilityMismatch: It requires capabilities that *capabilities* lack; the error names them.
        ExecutionNotFound: There is no such execution.
    """
    grant = _checked("token", token, ReclaimToken).grant
    claimer = _claimer(worker_id, worker_instance_id, lease_ttl_ms, capabilities)
    request = claiming.ClaimRequest(keys.lane_id(grant.lane_id), *claimer, max_wait_s=None)
    eid, lease_id = keys.canonical_execution_id(grant.execution_id), keys.new_uuid()
    op = ops.claim_execution(
        eid,
        lane=request.lane,
        worker_id=request.worker_id,
        worker_instance_id=request.worker_instance_id,
        lease_id=lease_id,
        lease_ttl_ms=request.lease_ttl_ms,
        attempt_id=keys.new_uuid(),
        reclaim=True,
        capabilities=request.capabilities.tokens,
    )
    state = claiming.Claim(request)
    steps = counting(
        on.tally, "executions_claimed", lambda: claiming.take_over(on, state, op, eid, lease_id)
    )
    return Call(steps, claim=state)


# -- suspension and signals --------------------------------------------------------------------------------------------


def create_waitpoint(
    on: Deployment,
    handle: Handle,
    *,
    waitpoint_id: str | None = None,
    expires: float | timedelta = 3600.0,
) -> Call[PendingWaitpoint]:
    """Create a waitpoint for a later suspension. Signals that arrive before the suspension are kept for it.

    Args:
        handle: The lease.
        waitpoint_id: A UUID; repeating one returns the same token. None makes one.
        expires: Time after which an unused waitpoint closes, in seconds or as a ``timedelta``.

    Raises:
        WaitpointConflict: The id belongs to another attempt of the execution.
        LeaseExpired, StaleOwner, StateLost, ExecutionNotActive, ExecutionSuspended, ExecutionNotFound: The lease is
            gone.
    """
    expires_ms = _positive_ms("expires", expires)
    identity = (
        keys.new_uuid()
        if waitpoint_id is None
        else keys.canonical_uuid("waitpoint_id", waitpoint_id)
    )
    # The server takes this secret only if the partition has no signing key yet.
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
    durability: Durability | None = None,
    durability_timeout: float | timedelta = DEFAULT_TIMEOUT_S,
) -> Call[SuspendOutcome]:
    """Release the lease until signals meet *condition*; then the same attempt, with its stream, continues.

    Close writers first. If earlier signals meet the condition already, nothing is suspended and the lease continues.
    Calling it again after a lost reply returns the first outcome.

    Args:
        handle: The lease.
        condition: A condition, one spec, or several specs of which any one suffices.
        timeout: Longest suspension, in seconds or as a ``timedelta``; None has no limit.
        on_timeout: Action at the timeout.
        reason: Text of at most 256 bytes; `describe` and the history show it.
        durability: Level that the suspension, and all before it, has reached when the call returns; None is
            ``Durability.stored()``.
        durability_timeout: Longest wait for that, in seconds or as a ``timedelta``, at least 1 ms.

    Raises:
        NotReplicated: *durability* was not confirmed in time. The call is applied; repeating it asks again.
        InvalidToken, WaitpointClosed: A waitpoint of the condition has another token, or is closed.
        FramesLost: The server has lost frames in a failover that this backend does not keep any more. Nothing was
            released; call again to go on without them.
        SequenceGap: The stream has lost frames which this backend knows to be stored, and the backend keeps none.
        LeaseExpired, StaleOwner, StateLost, ExecutionNotActive, ExecutionSuspended, ExecutionNotFound: The lease is
            gone.
    """
    if isinstance(condition, WaitpointSpec):
        condition = ResumeCondition.any(condition)
    elif isinstance(condition, (list, tuple)):
        condition = ResumeCondition.any(*condition)
    if not isinstance(condition, ResumeCondition):
        raise InvalidType("condition must be a ResumeCondition, a WaitpointSpec or several.")
    attempt = _attempt(handle)
    given = (
        attempt,
        keys.new_uuid(),
        condition,
        duration_ms("timeout", timeout),
        _checked("on_timeout", on_timeout, TimeoutBehavior),
        _line("reason", reason),
    )
    suspended = handle.replace(kind=HandleKind.SUSPENDED)

    def steps(last_id: bytes) -> Steps[SuspendOutcome]:
        op = ops.suspend_execution(*given, last_id)
        satisfied, first_id = yield from ops.call(op)
        with applied_in_part():
            while satisfied is None:
                satisfied, first_id = yield from ops.call(op)
        return SuspendOutcome(first_id, handle if satisfied else suspended, satisfied)

    return _releasing(
        on,
        attempt,
        steps,
        releases=lambda outcome: not outcome.already_satisfied,
        reach=Reach(partial(ops.suspend_execution, *given), durability, durability_timeout),
    )


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
        payload: Data for the resumed worker, at most 64 KiB.
        signal_id: A UUID; None makes one.
        idempotency_key: A second signal with this key changes nothing and returns the first one's id.
        correlation_id: Reference for the caller's own use.
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
    data = (
        None
        if payload is None
        else _bounded("payload of a signal", payload_bytes(payload), MAX_SIGNAL)
    )
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
    """Return the signals that ended the suspension before this lease.

    Raises:
        LeaseExpired, StaleOwner, StateLost, ExecutionNotActive, ExecutionSuspended, ExecutionNotFound: The lease is
            gone.
    """
    attempt = _attempt(handle)

    def steps() -> Steps[tuple[ResumeSignal, ...]]:
        signals, following = yield from ops.call(ops.observe_signals(attempt))
        return signals + (yield from ops.further_signals(attempt, following))

    return Call(steps, writes=False)


def rotate_waitpoint_secret(
    on: Deployment, kid: str, secret: bytes, *, grace: float | timedelta = 3600.0
) -> Call[None]:
    """Sign waitpoint tokens with a new key from now on, in every partition.

    Calling it again completes a partial change. A partition forgets its keys a day after its last waitpoint was open,
    and not before *grace* is over; the next waitpoint there is signed with a random key.

    Args:
        kid: Id of the new key, 1 to 64 of ``A-Z a-z 0-9 _ -``.
        secret: The key, 32 random bytes.
        grace: Time that tokens of the previous key stay valid, in seconds or as a ``timedelta``.

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
        refusals: list[FFError] = []
        for op, reply in zip(calls, replies, strict=True):
            try:
                op.answer(reply)
            except FFError as error:
                refusals.append(error)
        if refusals:
            if len(refusals) < len(calls) or any(
                each.outcome is Outcome.UNKNOWN for each in refusals
            ):
                make_unknown(refusals[0], "Other partitions may have the new key.")
            raise refusals[0]

    return Call(steps)


# -- usage, flows, tags ------------------------------------------------------------------------------------------------


def report_usage(on: Deployment, handle: Handle, usage: UsageDimensions) -> Call[ReportUsageResult]:
    """Report usage to the budgets of the execution and to its own ledger, completely or not at all.

    Reports with the same ``usage.dedup_key`` count once: an execution remembers the last 1,000 keys, and a budget the
    last 200 reports of each execution, until an hour after the last. A report without a key is retried safely after a
    lost reply, and leaves nothing behind that grows. An execution and a budget have at most 256 dimensions.

    Args:
        handle: The lease.
        usage: Amounts since the last report.

    Raises:
        BudgetNotFound: A budget of the execution does not exist.
        LeaseExpired, StaleOwner, StateLost, ExecutionNotActive, ExecutionSuspended, ExecutionNotFound: The lease is
            gone.
    """
    given = _checked("usage", usage, UsageDimensions)
    attempt = _attempt(handle)
    report_id = given.dedup_key or keys.new_uuid()
    return Call(lambda: usage_steps.report_usage(attempt, given, report_id))


def create_budget(
    on: Deployment,
    budget_id: str,
    *,
    hard: Mapping[str, int] | None = None,
    soft: Mapping[str, int] | None = None,
) -> Call[None]:
    """Create a budget, or replace its limits; the amounts used so far stay.

    Args:
        budget_id: 1 to 64 of ``A-Z a-z 0-9 _ -``.
        hard: Limit of each dimension, 0 to 2^53-1. A report that would exceed one is refused as a whole.
        soft: Limit of each dimension, 0 to 2^53-1. A report that exceeds one is applied as ``SOFT_BREACH``.
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
    """Create a flow, and return its id. Its executions share its partition. An existing flow is not changed.

    A flow is kept while a member is open, and afterwards for a day or the retention of its last member, whichever is
    longer.

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
    """Cancel a flow: no new attempt of a member begins, and *policy* selects the members to cancel.

    Args:
        flow_id: The flow.
        policy: Members to cancel.
        wait: Whether and how long to wait until they are cancelled. Without waiting a supervisor cancels them.
            ``FLOW_ONLY`` never waits.
        reason: Text of at most 4096 bytes.

    Raises:
        FlowNotFound: There is no such flow.
        DeadlineExceeded: The wait ended first; a supervisor cancels the rest.
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
    slot_tag = keys.flow_slot_tag(identity, on.partitions)
    return Call(lambda: flows.describe_flow(identity, slot_tag), writes=False)


def set_tags(on: Deployment, execution_id: str, tags: Mapping[str, str]) -> Call[int]:
    """Add tags (``namespace.name`` to text), or replace their values; return how many tags the execution has.

    Raises:
        InvalidInput: *tags* is empty, one is not of this form, or the execution would have more than 256.
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
    """Return the result of a completed execution; empty if it has none.

    Raises:
        ExecutionNotFound: There is no such execution.
    """
    return _call(ops.read_result(keys.canonical_execution_id(execution_id)))


# -- streams -----------------------------------------------------------------------------------------------------------


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
        after: Id of a frame or a cursor, exclusive; None is the beginning. `ff_fast.types.cursor_after` makes one of a
            sequence.
        count: Largest number of frames, 1 to 10,000.
        max_bytes: Bytes of payload after which no further frame is read, 1 to 64 MiB; the last frame may exceed it.
        visibility: Whether best-effort frames are included.

    Raises:
        ExecutionNotFound, AttemptNotFound: There is no such attempt.
        InvalidInput: An argument is not accepted.
    """
    check_int("count", count, 1, MAX_COUNT)
    check_int("max_bytes", max_bytes, 1, 64 << 20)

    def core() -> TailCore:
        return TailCore(execution_id, attempt_index, after, visibility, count, max_bytes)

    core()

    def steps() -> Steps[StreamPage]:
        page = yield from read_page(core(), count, max_bytes)
        on.tally.took([*page, *page.gaps])
        return page

    return Call(steps, writes=False)


def read_summary(
    on: Deployment,
    execution_id: str,
    attempt_index: int = 0,
) -> Call[SummaryDocument | None]:
    """Return the summary of an attempt, with the cursor of the tail that continues it; None if it has none.

    Raises:
        ExecutionNotFound: There is no such execution.
    """
    eid = keys.canonical_execution_id(execution_id)
    index = keys.attempt_index(attempt_index)
    op = ops.read_summary(eid, index)

    def steps() -> Steps[SummaryDocument | None]:
        return fold((yield from ops.call(op)), index)

    return Call(steps, writes=False)


def tail(
    on: Deployment,
    execution_id: str,
    attempt_index: int = 0,
    *,
    after: str | None = None,
    visibility: TailVisibility = TailVisibility.ALL,
) -> TailCore:
    """Read the stream of one attempt, live. All tails of a backend share one connection.

    Iterating yields ``StreamFrame`` in sequence order, a ``Gap`` wherever frames are missing, and one ``End`` at the
    end. A timeout or a cancellation of one read loses nothing: the next read continues.

    Args:
        execution_id: Id of the execution.
        attempt_index: Attempt, from 0. The tail waits for one that is not claimed yet.
        after: ``cursor`` of an item, of a page or of a summary, exclusive; None is the beginning.
            `ff_fast.types.cursor_after` makes one of a sequence.
        visibility: Whether best-effort frames are included.

    Raises:
        InvalidInput: An argument is not accepted.
        ExecutionNotFound, AttemptNotFound: There is no such attempt. Raised by the first read.
        Unavailable: The server cannot be reached within the retries of the configuration. Raised by a read; the next
            read tries again.
    """
    core = TailCore(execution_id, attempt_index, after, visibility)
    core.tally = on.tally
    return core


def follow(
    on: Deployment,
    execution_id: str,
    after: str | None = None,
    *,
    snapshot: bool = False,
    visibility: TailVisibility = TailVisibility.ALL,
) -> FollowCore:
    """Follow an execution to its end, live, across all its attempts.

    It waits for the first claim, and for the next one after a retry, a delay, a suspension or a lost worker. Iterating
    yields, in order:

    - ``Snapshot``: with *snapshot*, once, in place of the frames that its document already holds.
    - ``AttemptStarted``: a worker has claimed an attempt. What earlier attempts have streamed does not count any more.
      An attempt that continues after a delay or a suspension does not start again. A snapshot stands for the start of
      its attempt.
    - ``StreamFrame`` in sequence order, and a ``Gap`` wherever frames are missing. An attempt whose frames are not kept
      any more has a gap with the reason ``expired`` in their place.
    - ``End``, once: how the execution ended, with ``outcome`` and ``error``.

    A timeout or a cancellation of one read loses nothing: the next read continues. Any process can continue after any
    item, at any time, by its ``cursor``.

    Args:
        execution_id: Id of the execution.
        after: ``cursor`` of an item, of a page or of a summary, exclusive. None is the beginning: the first attempt, so
            that every reader gets the same; with *snapshot* the newest one, for a reader that joins late.
            `ff_fast.types.cursor_after` makes a cursor of an attempt and a sequence.
        snapshot: Begin with the summary document of the attempt, if it has one.
        visibility: Whether best-effort frames are included.

    Raises:
        InvalidInput: An argument is not accepted.
        ExecutionNotFound: There is no such execution, or it was removed after its end. Raised by a read.
        Unavailable: The server cannot be reached within the retries of the configuration. Raised by a read; the next
            read tries again.
    """
    if type(snapshot) is not bool:
        raise InvalidType(f"snapshot must be bool, not {type(snapshot).__name__}.")
    _checked("visibility", visibility, TailVisibility)
    core = FollowCore(execution_id, after, snapshot=snapshot, visibility=visibility)
    core.tally = on.tally
    return core


class WaitRequest(NamedTuple):
    """What reads the end of an execution, and the longest wait for it, in seconds; None has no limit."""

    source: WaitCore
    timeout_s: float | None

    def value(self, ends: Sequence[Ended]) -> bytes:
        """Return the result of the execution that has ended.

        Args:
            ends: What was read in time.

        Raises:
            DeadlineExceeded: Nothing was.
        """
        for end in ends:
            return end.value()
        late = DeadlineExceeded(
            "The execution had not ended when the time of the wait was over; it goes on, and can be waited for again."
        )
        late.outcome = Outcome.NOT_APPLIED
        raise late


def wait(
    on: Deployment, execution_id: str, timeout: float | timedelta | None = None
) -> WaitRequest:
    """Wait for the end of an execution, and return its result: what `complete` was given, empty if that was nothing.

    Args:
        execution_id: Id of the execution.
        timeout: Longest wait, in seconds or as a ``timedelta``; None has no limit, 0 looks once.

    Raises:
        ExecutionFailed, ExecutionCancelled, ExecutionExpired: It has ended without a result; ``reason`` says why.
        DeadlineExceeded: It had not ended in time. Nothing was changed, and it goes on.
        ExecutionNotFound: There is no such execution, or it was removed after its end.
        Unavailable: The server cannot be reached within the retries of the configuration.
    """
    timeout_s = None if timeout is None else seconds("timeout", timeout, zero=True)
    return WaitRequest(WaitCore(execution_id), timeout_s)


def subscribe_completions(
    on: Deployment, scope: ScannerFilter | None = None, *, after: str | None = None
) -> CompletionCore:
    """Read the completion of every execution, live.

    The subscription never ends by itself. A timeout or a cancellation of one read loses nothing.

    Args:
        scope: Filter of the executions; None reads all.
        after: ``cursor`` of an earlier completion, to continue without hole or repeat, wherever the server's clock has
            been meanwhile; ``start`` for all completions that are kept (those of a day, about 2,000 in each
            partition); None begins at the first read. A cursor is text of about 16 bytes for each partition that has had
            completions: 4 KiB for 256.

    Raises:
        InvalidCursor: *after* is none of these, completions after it were already trimmed, or the server has lost those
            before it.
        Unavailable: The server cannot be reached within the retries of the configuration. Raised by a read.
    """
    return CompletionCore(on.partitions, after, _scope(scope))


def _scope(value: ScannerFilter | None) -> ScannerFilter:
    return _checked("scope", value, ScannerFilter, ScannerFilter.NOOP)


class WriterRequest(NamedTuple):
    """Checked arguments of `open_writer`, and the call that opens the writer."""

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
    durability: Durability | None = None,
    durability_timeout: float | timedelta = DEFAULT_TIMEOUT_S,
) -> WriterRequest:
    """Open the writer of the attempt. It supersedes a writer that was opened before.

    Args:
        handle: The lease.
        mode: Mode of frames that name none; None is durable.
        retention_maxlen: Number of the newest durable frames to keep at least, 1 to 2^40.
        max_unacknowledged_bytes: Limit beyond which ``write`` raises ``Overloaded``: at most 16 GiB, and at least
            64 KiB or the backend's ``max_payload_bytes``, if that is more.
        linger: Longest wait of a batch for more frames, 0 to 1 s; in seconds or as a ``timedelta``.
        durability: Level that frames have reached when ``flush`` or ``close`` returns; None is ``Durability.stored()``.
            Writing never waits for it, and no other writer does.
        durability_timeout: Longest wait for that, in seconds or as a ``timedelta``, at least 1 ms.

    Raises:
        UnsupportedServer: *durability* is ``synced``, and the server keeps no append-only file.
        ExecutionNotFound, StaleOwner, StateLost, ExecutionSuspended, StreamClosed, LeaseExpired: The handle may not
            write.
    """
    attempt = _attempt(handle)
    options = _writer_options(
        on,
        mode,
        retention_maxlen,
        max_unacknowledged_bytes,
        linger,
        Level.checked(durability, durability_timeout),
    )
    call = Call(lambda: writers.open_writer(attempt, options, on.places))
    return WriterRequest(attempt.fields.lease_id, options, call)


def _writer_options(
    on: Deployment,
    mode: StreamMode | None,
    retention_maxlen: int,
    max_unacknowledged_bytes: int,
    linger: float | timedelta,
    level: Level,
) -> writers.WriterOptions:
    linger_s = seconds("linger", linger, zero=True)
    if linger_s > 1:
        raise InvalidInput("linger must be at most a second.")
    return writers.WriterOptions(
        mode=_checked("mode", mode, StreamMode, StreamMode.durable()),
        retention_maxlen=check_int("retention_maxlen", retention_maxlen, 1, 2**40),
        max_unacknowledged_bytes=check_int(
            "max_unacknowledged_bytes",
            max_unacknowledged_bytes,
            max(1 << 16, on.max_payload_bytes),
            1 << 34,
        ),
        linger_ms=linger_s * 1000,
        max_payload_bytes=on.max_payload_bytes,
        level=level,
    )


def _implicit_writer(on: Deployment, handle: Handle) -> WriterRequest:
    """Open the writer behind `append_frame`, whose caller does not see where it begins.

    Raises:
        SequenceGap: The stream has lost frames which this backend knows to be stored, as after a failover.
    """
    request = open_writer(on, handle)
    attempt = _attempt(handle)
    steps = partial(writers.open_writer, attempt, request.options, on.places, complete=True)
    return request._replace(call=Call(steps))


class FrameRequest(NamedTuple):
    """Checked arguments of `append_frame`, and what opens its writer; *lease_s* and *timeout* are in seconds."""

    opening: Callable[[], WriterRequest]
    lease_id: str
    lease_s: float
    frame: Frame
    timeout: float | None
    level: Level


def append_frame(
    on: Deployment,
    handle: Handle,
    frame: Frame,
    timeout: float | timedelta | None = None,
    *,
    durability: Durability | None = None,
    durability_timeout: float | timedelta = DEFAULT_TIMEOUT_S,
) -> FrameRequest:
    """Append one frame, wait until it is stored, and return the newest id, the frame count and the summary version.

    The call uses the writer that is open for the handle, or opens one, which stays open until it fails or the lease is
    gone. With ``frame.seq`` it is idempotent: this writer writes each sequence once.

    Args:
        handle: The lease.
        frame: The frame.
        timeout: Longest wait, in seconds or as a ``timedelta``; None waits until the writer succeeds or fails.
        durability: Level that the frame has reached when the call returns; None is that of the writer, and
            ``Durability.stored()`` if the call opens it.
        durability_timeout: Longest wait for that, in seconds or as a ``timedelta``, at least 1 ms.

    Raises:
        NotReplicated: *durability* was not confirmed in time. The frame is stored; with ``frame.seq`` the call may be
            made again to ask again.
        SequenceGap: ``frame.seq`` is beyond the next sequence, or before this writer's first.
        FFError: As `Writer.write` and `Writer.flush`.
    """
    lease = _attempt(handle).fields
    opening = partial(_implicit_writer, on, handle)
    return FrameRequest(
        opening,
        lease.lease_id,
        lease.lease_ttl_ms / 1000,
        _checked("frame", frame, Frame),
        writers.timeout_s(timeout),
        Level.checked(durability, durability_timeout),
    )


# -- named streams ---------------------------------------------------------------------------------------------------


def execution_id_for(on: Deployment, name: str, *, namespace: str = "default") -> str:
    """Return the execution id that a name stands for in this deployment. Nothing is sent.

    Args:
        name: 1 to 512 bytes of UTF-8 without control characters.
        namespace: Tenant, free text of at most 256 bytes. Equal names of two namespaces are two ids.

    Raises:
        InvalidId: *name* or *namespace* is not such a text.
    """
    return keys.execution_id_for(name, namespace=namespace, num_partitions=on.partitions)


class Production(NamedTuple):
    """What the producer of a named stream gets: its lease, and what its writer is made from."""

    handle: Handle
    writer: writers.WriterState


class StreamRequest(NamedTuple):
    """Checked arguments of `open_stream`: the execution, the level of its frames and end, and the call that opens it."""

    execution_id: str
    level: Level
    call: Call[Production | None]


def open_stream(
    on: Deployment,
    name: str,
    *,
    namespace: str = "default",
    mode: StreamMode | None = None,
    ttl: float | timedelta = 86_400.0,
    lease_ttl_ms: int | timedelta = 30_000,
    takeover: float | timedelta = 60.0,
    payload: bytes | str = b"",
    tags: Mapping[str, str] | None = None,
    retention_maxlen: int = writers.RETENTION_MAXLEN,
    max_unacknowledged_bytes: int = writers.MAX_UNACKNOWLEDGED_BYTES,
    linger: float | timedelta = 0.0,
    durability: Durability | None = None,
    durability_timeout: float | timedelta = DEFAULT_TIMEOUT_S,
) -> StreamRequest:
    """Produce the stream of a name, or learn that somebody else does: see `OpenedStream`. One call of the server.

    Whoever opens a name first is its ``producer``: the execution is created, under a lease that is kept in the background,
    and its writer is open. Everybody else is a ``consumer``, until the execution is gone. It is in no lane, so no worker
    ever claims it. Leaving the ``with`` block completes it, an exception fails it, and a cancellation, an interrupt or an
    exit cancels it.

    A producer that dies loses its lease: readers of its attempt get the end ``producer_lost``, and the next one who opens
    the name becomes the producer of a new attempt, which `follow` goes on with. If nobody does so within *takeover* after
    a supervisor has found the lapse, the execution ends as failed, with ``producer_lost``. What has ended stays ended:
    whoever opens the name is a consumer until it is removed, *ttl* after the end or by `delete_execution`.

    Args:
        name: 1 to 512 bytes of UTF-8 without control characters, whose id is that of `execution_id_for`; or an execution
            id, of any namespace. That of an execution which was created for the workers of a lane makes a consumer. Text that a
            client chooses may look like an id: pass ``execution_id_for(text, namespace=...)``, for which it is a name.
        namespace: Tenant, free text of at most 256 bytes; a part of what the name stands for.
        mode: Mode of frames that name none; None is durable.
        ttl: Time that all its data is kept after its end, at least 1 ms; in seconds or as a ``timedelta``, as the others.
            This and the next four are those of the call that creates the execution, but for the lease's.
        lease_ttl_ms: Length of the lease, in ms or as a ``timedelta``: so long readers wait for a producer that has died.
        takeover: Time from a lapse in which another producer may go on, at least 1 ms.
        payload: Input, at most 16 MiB, which `describe` leaves out.
        tags: ``namespace.name`` to text.
        retention_maxlen: Number of the newest durable frames to keep at least, 1 to 2^40.
        max_unacknowledged_bytes: Limit beyond which ``write`` raises ``Overloaded``: at most 16 GiB, and at least
            64 KiB or the backend's ``max_payload_bytes``, if that is more.
        linger: Longest wait of a batch for more frames, 0 to 1 s.
        durability: Level that frames have reached when ``flush`` returns, and with the end all frames and the end; None is
            ``Durability.stored()``.
        durability_timeout: Longest wait for that, at least 1 ms.

    Raises:
        InvalidInput: An argument is not accepted.
        UnsupportedServer: *durability* is ``synced``, and the server keeps no append-only file.
        OutcomeUnknown: The server could not be reached again after a lost reply. Calling again is safe: what the lost call
            has opened is given back by this backend, or lapses.
    """
    eid = _stream_id(on, name, namespace)
    ttl_ms = _ttl_ms("lease_ttl_ms", lease_ttl_ms)
    level = Level.checked(durability, durability_timeout)
    options = _writer_options(on, mode, retention_maxlen, max_unacknowledged_bytes, linger, level)
    lease_id = keys.new_uuid()
    op = ops.open_stream(
        eid,
        namespace=namespace,
        retention_ms=_positive_ms("ttl", ttl),
        takeover_ms=_positive_ms("takeover", takeover),
        worker_instance_id=_this_process(),
        lease_id=lease_id,
        lease_ttl_ms=ttl_ms,
        attempt_id=keys.new_uuid(),
        writer_text=ops.writer_text(),
        max_payload_bytes=on.max_payload_bytes,
        payload=_document("payload of an execution", payload),
        tags=_tags({} if tags is None else tags),
    )
    state = claiming.Claim(
        claiming.ClaimRequest(
            "", ops.NAMED_WORKER.decode(), _this_process(), ttl_ms, CapabilitySet(), max_wait_s=None
        )
    )

    def opening() -> Steps[Production | None]:
        yield from levels.can_reach(level.durability, keys.slot_tag_of(eid))
        produced = yield from claiming.produce(on, state, op, eid, lease_id)
        if produced is None:
            return None
        on.tally.note("executions_claimed")
        with applied_in_part():
            attempt = ops.Attempt.of(produced.handle)
            writer = yield from writers.continue_writer(
                attempt, produced.writer_id, produced.opened, options, on.places
            )
        return Production(produced.handle, writer)

    return StreamRequest(eid, level, Call(opening, claim=state))


def _stream_id(on: Deployment, name: str, namespace: str) -> str:
    keys.free_text("namespace", namespace)
    keys.free_text("name", name, keys.NAME_LIMIT)
    try:
        eid = keys.canonical_execution_id(name)
    except InvalidId:
        return execution_id_for(on, name, namespace=namespace)
    if keys.partition_index(eid) >= on.partitions:
        raise InvalidId("The execution id is of a partition that this deployment does not have.")
    return eid


_READ_END_S = 0.25
"""Time, in seconds, in which readers learn the end of an execution before its keys are removed."""


def delete_execution(on: Deployment, execution_id: str, *, reason: str = "deleted") -> Call[None]:
    """Remove an execution with its streams, its payload and its result.

    One that has not ended is cancelled first; its readers get that end, and it is removed a quarter of a second later. A
    reader that has not read the end by then gets ``ExecutionNotFound``. The name of a stream is free again.

    Args:
        execution_id: Id of the execution.
        reason: Why it is cancelled, at most 4096 bytes of text.

    Raises:
        ExecutionNotFound: There is no such execution.
    """
    eid = keys.canonical_execution_id(execution_id)
    op = ops.delete_execution(eid, _line("reason", reason, 4096))
    partition = keys.partition_index(eid)
    # Whether a try before may have removed it, whose answer was lost.
    sent = False

    def steps() -> Steps[None]:
        nonlocal sent
        again = sent
        sent = True
        while True:
            try:
                deleted = yield from ready.with_hints(op, partition)
            except ExecutionNotFound:
                if again:
                    return
                raise
            if deleted.cancelled:
                yield Pause(_READ_END_S)
            elif not deleted.more:
                return
            again = True

    return Call(steps)


# -- loops -----------------------------------------------------------------------------------------------------------


class LeaseRequest(NamedTuple):
    """A lease to keep.

    Attributes:
        lease_id: Its id.
        name: Its execution and attempt, as pushes name it.
        channel: Channel of those pushes.
        clock: Makes the times of its renewals.
        renewal: The call that renews it.
        lost: Takes note of its loss.
        on_lost: The caller's callback for that.
    """

    lease_id: str
    name: bytes
    channel: bytes
    clock: Callable[[], LeaseClock]
    renewal: Call[LeaseRenewal]
    lost: Callable[[FFError], None]
    on_lost: Callable[[FFError], None] | None


def keep_lease(
    on: Deployment, handle: Handle, on_lost: Callable[[FFError], None] | None = None
) -> LeaseRequest:
    """Renew a lease in the background until the keeper is stopped; a context manager.

    The keeper hears at once of a requested cancellation, and of a lease that is lost: see `LeaseKeeper.wait_cancelled`.
    Where pushes do not reach it, the next append or renewal tells it.

    Args:
        handle: The lease.
        on_lost: Called with the error when the lease is gone, or could not be renewed before it lapsed; on a thread of
            the library, or on the backend's loop. The writers of the handle have failed with the error by then.
    """
    fields = _attempt(handle).fields
    # A cancellation that was requested of an earlier lease still holds; no push tells this one of it.
    soon = handle.kind is HandleKind.RESUMED or fields.attempt_index > 0
    channel, name = told_as(fields.execution_id, fields.attempt_index)

    def lost(error: FFError) -> None:
        if is_ended_by_plan(error) or on.gives_up(fields.lease_id):
            # The execution has ended, or this process has released the lease meanwhile.
            return
        on.tally.note("leases_lost")
        say_lost(error, fields.execution_id, fields.attempt_index)

    return LeaseRequest(
        fields.lease_id,
        name,
        channel,
        partial(LeaseClock, fields.lease_ttl_ms, soon=soon),
        renew(on, handle),
        lost,
        on_lost,
    )


def stats(on: Deployment) -> Callable[..., Stats]:
    """Return what this backend has done since it was opened, and what it is doing, in numbers.

    A plain call that asks no server. The counters are kept once a batch; reading them takes microseconds, and a few more
    for each open writer. A closed backend keeps its counts. In a process that was forked from the one that opened the
    backend all numbers are 0.
    """
    return partial(stats_of, on)


SUPERVISE_EVERY_S = 0.25
"""Time between two rounds of supervision, in seconds."""


_STOP_LOOK_S = 0.05
_LEAVE_S = 0.5


class MakeCall(NamedTuple):
    """An action of a supervisor: make a call, in so many seconds, and resume with its value."""

    call: Call[Any]
    limit_s: float = inf


class Rest(NamedTuple):
    """An action of a supervisor or a worker: do nothing for so many seconds."""

    seconds: float


class SupervisionRequest(NamedTuple):
    """Rounds of supervision.

    Attributes:
        round: Makes one.
        interval_s: Seconds between two.
        turn: Says whether to make the next one, and that to the others; None makes each, and says nothing.
        stop: The event that ends the rounds.
        watch: Says what becomes of them.
    """

    round: Call[int]
    interval_s: float
    turn: supervision.Turn | None
    stop: StopEvent | None
    watch: supervision.Watch

    @classmethod
    def standing_by(cls, on: Deployment, stop: StopEvent) -> SupervisionRequest:
        """Supervise until *stop* is set, while nobody else does: one call in two seconds tells."""
        turn = supervision.Turn(_supervisor_name(), SUPERVISE_EVERY_S, insists=False)
        watch = supervision.Watch(ScannerFilter.NOOP, aside=True)
        return cls(_round(on, ScannerFilter.NOOP), SUPERVISE_EVERY_S, turn, stop, watch)

    def actions(
        self, closed: Callable[[], bool], reached: Callable[[bool], None]
    ) -> Generator[MakeCall | Rest, Any, None]:
        """Yield what to do, until the event is set or the backend is *closed*.

        Args:
            closed: Whether the backend is closed.
            reached: Told each time whether the server has answered who makes the next round.

        Raises:
            FFError: No other round would pass.
        """
        with self.watch:
            try:
                yield from self._rounds(closed, reached)
            except GeneratorExit:
                raise
            except BaseException:
                yield from self._leave(closed)
                raise
            yield from self._leave(closed)

    def _rounds(
        self, closed: Callable[[], bool], reached: Callable[[bool], None]
    ) -> Generator[MakeCall | Rest, Any, None]:
        def stopped() -> bool:
            return closed() or (self.stop is not None and self.stop.is_set())

        while not stopped():
            mine, fired = True, 0
            try:
                if self.turn is not None:
                    try:
                        mine = yield MakeCall(Call(self.turn.take))
                    except FFError as error:
                        reached(not error.retryable)
                        raise
                    reached(True)
                if mine:
                    fired = yield MakeCall(self.round)
            except FFError as error:
                # A retryable error leaves the timers to the next round; any other needs an operator.
                if not error.retryable and not closed():
                    raise
                if not closed():
                    self.watch.failed(error)
            else:
                self.watch.done(fired)
            pause_s = self.interval_s if mine else supervision.stand_by_s()
            until = time.monotonic() + pause_s
            # The event may be any object with is_set(), so it can only be polled.
            while (left := until - time.monotonic()) > 0 and not stopped():
                yield Rest(min(left, _STOP_LOOK_S))

    def _leave(self, closed: Callable[[], bool]) -> Generator[MakeCall, Any, None]:
        """Let others supervise at once."""
        if self.turn is not None and not closed():
            with contextlib.suppress(FFError, TimeoutError):
                yield MakeCall(Call(self.turn.leave), _LEAVE_S)


def supervise(
    on: Deployment,
    scope: ScannerFilter | None = None,
    *,
    interval: float | timedelta = SUPERVISE_EVERY_S,
    stop: StopEvent | None = None,
) -> SupervisionRequest:
    """Fire due timers until *stop* is set: lapsed leases, delays, timeouts, deadlines, waitpoints, cancellations.

    Without a supervisor, none of these takes effect. A deployment needs one; any number may run at once.

    Args:
        scope: Filter of the executions; None supervises all.
        interval: Time between two rounds, in seconds or as a ``timedelta``.
        stop: Set it to return after the current round.
    """
    filtered = _scope(scope)
    every_s = seconds("interval", interval, zero=True)
    # Who fires some timers alone stands in for nobody.
    turn = None
    if filtered.is_noop():
        turn = supervision.Turn(_supervisor_name(), every_s, insists=True)
    watch = supervision.Watch(filtered)
    return SupervisionRequest(_round(on, filtered), every_s, turn, stop, watch)


def _round(on: Deployment, scope: ScannerFilter) -> Call[int]:
    return Call(supervision.Supervision(on, scope).round, own_connection=True)


def _supervisor_name() -> str:
    """Return a name of which a process may have several."""
    return f"{_this_process()}-{keys.new_uuid()[:8]}"


class WorkerOptions(NamedTuple):
    """Checked options of a worker.

    Attributes:
        claim: Makes the next claim.
        mode: Mode of frames that name none.
        level: What the frames and the end of a task shall reach.
        concurrency: Number of handlers that run at once.
        stop: The caller's event.
        on_cancel: What befalls a handler that shall stop; None is the shell's default.
        cancel_grace_s: Seconds until a handler is cancelled.
        supervise: Whether the worker supervises the deployment while nobody else does.
        drain_s: Longest time that handlers have after a stop; None has no limit.
        until_idle: Whether the worker ends when there is nothing to do.
        remaining: Tells whether executions of the lane are delayed, or run in any worker.
        lane: The lane.
        worker_id: Name of the worker.
        named: Whether executions name their handlers.
    """

    claim: Callable[..., Call[Handle | None]]
    mode: StreamMode | None
    level: Level
    concurrency: int
    stop: StopEvent | None
    on_cancel: OnCancel | None
    cancel_grace_s: float
    supervise: bool
    drain_s: float | None
    until_idle: bool
    remaining: Call[bool]
    lane: str
    worker_id: str
    named: bool = False


CLAIM_WAIT_S = 1.0
"""Wait of one claim, in seconds; a worker checks between two claims whether it should stop."""


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
    on_cancel: OnCancel | None = None,
    cancel_grace: float | timedelta = 2.0,
    durability: Durability | None = None,
    durability_timeout: float | timedelta = DEFAULT_TIMEOUT_S,
    supervise: bool = True,
    drain_timeout: float | timedelta | None = None,
    until_idle: bool = False,
) -> WorkerOptions:
    """Claim executions of a lane and call *handler* with a `Task` for each, until stopped.

    The lease is renewed in the background. The handler's result is the execution's result. An exception fails the
    attempt as transient, a ``TaskFailed`` with its own class, and an ``FFError`` that is a refusal for good, such as
    ``PayloadTooLarge``, as permanent; also in an exception group, and as the cause of another exception.

    A handler hears at once that a cancellation is requested: ``task.cancelled`` is true, and ``task.wait_cancelled``
    returns. Unless the handler gives its lease up, the attempt then ends as cancelled, whatever it returns or raises. It
    hears likewise that its lease is lost: ``task.lost`` is true as well, writes fail, and its result or exception is
    discarded. In asyncio the handler is also cancelled, at its next ``await``: *cancel_grace* after the request, and at
    once when the lease is lost or the backend closed. Each happens once; a handler that catches
    ``asyncio.CancelledError`` and goes on is not cancelled again. A thread cannot be interrupted, so the handlers of
    blocking workers must look.

    An execution that cannot be loaded, or not be ended as its handler ended, fails with the reason, and the worker goes
    on. A worker ends with an error that all its calls would meet: wrong credentials, another library or partition count,
    a missing right to claim.

    The worker also fires due timers, as `supervise` does, while no other process does: of many workers one, and the
    others ask every two seconds whether it still does.

    SIGTERM and SIGINT in the main thread, *stop*, and closing the backend stop the claims; running handlers end first.
    A handler of these signals that the program has installed, as a web server does, is called too; an exit that it
    raises would break off what stops in order, and is not raised.
    An exit or an interrupt raised by a handler ends the worker and is raised here; the execution goes to another worker
    and counts as lost. In asyncio, cancelling the worker cancels its running handlers: the frames that they wrote are
    stored, and their executions go to other workers within about two seconds, whatever the handlers return or raise.

    With *drain_timeout*, handlers that still run so long after a stop, or at a second signal, are interrupted, and their
    executions go to other workers. In asyncio they are cancelled. A thread cannot be interrupted: it hears that its
    lease is lost, and is left behind.

    Args:
        handler: An ordinary function; in :mod:`ff_fast.aio` a coroutine function. Or a :class:`ff_fast.Worker` with
            several of them; the arguments given here go before its options.
        lane: Lane to take work from.
        worker_id: Name of the worker.
        worker_instance_id: Name of its process; None takes host name and process id.
        capabilities: Capabilities that this worker offers.
        lease_ttl_ms: Length of a lease, in ms or as a ``timedelta``.
        mode: Mode of frames that name none; None is durable.
        concurrency: Number of handlers that run at once, 1 to 10,000.
        stop: Set it to stop.
        on_cancel: Whether a handler that shall stop is cancelled or only told. None is ``CANCEL`` in
            :mod:`ff_fast.aio` and ``TELL`` in blocking workers, which accept no other.
        cancel_grace: Time that a handler has to stop by itself before it is cancelled, in seconds or as a ``timedelta``.
            The grace of whoever cancels ends it too: the lease is lost then.
        durability: Level that frames have reached when ``task.flush`` returns, and with the end of each task all of its
            frames and the end; None is ``Durability.stored()``. An end that does not reach it is logged: it is stored.
        durability_timeout: Longest wait for that, in seconds or as a ``timedelta``, at least 1 ms.
        supervise: Whether the worker takes part in supervision. False leaves it to others: without a supervisor no lost
            worker is replaced, and no delay, timeout or deadline takes effect.
        drain_timeout: Longest time that handlers have to end after a stop, in seconds or as a ``timedelta``; None has no
            limit.
        until_idle: End when there has been nothing to claim for about a second, no handler of this backend runs, and no
            execution of the lane is delayed, as for a retry, or runs in another worker. With ``supervise=False`` the
            last two are not waited for, as others bring such work back.

    Raises:
        UnsupportedServer: *durability* is ``synced``, and the server keeps no append-only file.
        InvalidInput: An argument is not accepted.
    """
    check_int("concurrency", concurrency, 1, 10_000)
    _checked("supervise", supervise, bool)
    _checked("until_idle", until_idle, bool)
    drain_s = None if drain_timeout is None else seconds("drain_timeout", drain_timeout, zero=True)
    if on_cancel is not None:
        _checked("on_cancel", on_cancel, OnCancel)
    grace_s = seconds("cancel_grace", cancel_grace, zero=True)
    if mode is not None:
        _checked("mode", mode, StreamMode)
    next_claim = partial(
        _claim,
        on,
        keys.lane_id(lane),
        *_claimer(worker_id, worker_instance_id, lease_ttl_ms, capabilities),
        max_wait_s=CLAIM_WAIT_S,
    )
    level = Level.checked(durability, durability_timeout)
    return WorkerOptions(
        claim=next_claim,
        mode=mode,
        level=level,
        concurrency=concurrency,
        stop=stop,
        on_cancel=on_cancel,
        cancel_grace_s=grace_s,
        supervise=supervise,
        drain_s=drain_s,
        until_idle=until_idle,
        remaining=Call(partial(_remaining, on, lane), writes=False, own_connection=True),
        lane=lane,
        worker_id=worker_id,
    )


def _remaining(on: Deployment, lane: str) -> Steps[bool]:
    """Tell whether executions of the lane are delayed, or run."""
    wanted, place = ops.Filter(("delayed", "active"), lane), None
    while True:
        page = yield from listing.executions(on.partitions, wanted, place, 1)
        if page.items or page.next is None:
            return bool(page.items)
        place = listing.Place.of(page.next)
