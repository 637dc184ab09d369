"""The arguments of the public operations, checked before anything is sent: once, for both shells."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

from ff_fast import keys
from ff_fast._core import flows, ops, ready, supervision
from ff_fast._core import usage as usage_steps
from ff_fast._core.claiming import ClaimRequest
from ff_fast._core.steps import Flow, Step
from ff_fast._core.writer import WriterOptions
from ff_fast.errors import InvalidInput, InvalidType, PayloadTooLarge, check_int
from ff_fast.types import (
    CancelFlowOutcome,
    CancelFlowPolicy,
    CancelFlowWait,
    CancelOutcome,
    CapabilitySet,
    ClaimPolicy,
    FailOutcome,
    FailureClass,
    FailureReason,
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
    StreamMode,
    SuspendOutcome,
    TimeoutBehavior,
    UsageDimensions,
    WaitpointSpec,
    duration_ms,
    payload_bytes,
)

if TYPE_CHECKING:
    from datetime import timedelta


T = TypeVar("T")


class Call(NamedTuple, Generic[T]):
    """A checked operation: how to make its steps, and whether it may be run again after a lost reply."""

    flow: Callable[[], Flow[T]]
    repeatable: bool = True


def call(op: ops.Op[T]) -> Call[T]:
    """Return the operation that a single call is."""
    return Call(lambda: ops.call(op), op.repeatable)


def hinted(op: ops.Op[tuple[T, ops.Hints]], execution_id: str) -> Call[T]:
    """Return the operation of a single call after which executions may wait for workers."""
    partition = keys.partition_index(execution_id)
    return Call(lambda: ready.hinted(op, partition))


MAX_DOCUMENT = 16 << 20
"""Greatest payload of an execution and of its result, in bytes."""

MAX_TTL_MS = 2**48
DEFAULT_RETENTION_MS = 86_400_000


def _document(name: str, value: object) -> bytes:
    data = payload_bytes(value, name)
    if len(data) > MAX_DOCUMENT:
        raise PayloadTooLarge(MAX_DOCUMENT, len(data))
    return data


def _tags(tags: object) -> dict[str, str]:
    if not isinstance(tags, Mapping):
        raise InvalidType(f"tags must be a mapping of str to str, not {type(tags).__name__}.")
    return {keys.tag_key(name): keys.free_text("tag value", value) for name, value in tags.items()}


def create(
    *,
    lane: str,
    payload: object,
    execution_id: str | None,
    priority: int,
    required_capabilities: CapabilitySet | None,
    namespace: str,
    tags: Mapping[str, str] | None,
    retention_ms: int,
    retry: RetryPolicy | None,
    delay: float | timedelta | None,
    deadline: float | timedelta | None,
    attempt_timeout: float | timedelta | None,
    flow_id: str | None,
    parent_id: str | None,
    budgets: Sequence[str],
    partitions: int,
) -> Call[str]:
    """Return the checked operation of `create_execution`."""
    required = CapabilitySet() if required_capabilities is None else required_capabilities
    if not isinstance(required, CapabilitySet):
        raise InvalidType("required_capabilities must be a CapabilitySet.")
    policy = RetryPolicy() if retry is None else retry
    if not isinstance(policy, RetryPolicy):
        raise InvalidType("retry must be a RetryPolicy.")
    flow = "" if flow_id is None else keys.canonical_uuid("flow_id", flow_id)
    parent = "" if parent_id is None else keys.canonical_execution_id(parent_id)
    if execution_id is not None:
        eid = keys.canonical_execution_id(execution_id)
    elif parent:
        eid = keys.new_execution_id_beside(parent)
    elif flow:
        eid = keys.execution_id_for_flow(flow, partitions)
    else:
        eid = keys.new_execution_id(partitions)
    if flow and keys.slot_tag_of(eid) != keys.flow_slot_tag(flow, partitions):
        raise InvalidInput("An execution of a flow must have an id in the flow's partition.")
    if parent and keys.slot_tag_of(eid) != keys.slot_tag_of(parent):
        raise InvalidInput("A child must have an id in its parent's partition.")
    op = ops.create_execution(
        eid,
        namespace=keys.free_text("namespace", namespace),
        lane=keys.lane_id(lane),
        priority=check_int("priority", priority, 0, 9000),
        required_capabilities=required.csv(),
        retention_ms=check_int("retention_ms", retention_ms, 1, MAX_TTL_MS),
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
    return Call(lambda: ready.create(op, eid))


def claim(
    *,
    lane: str,
    worker_id: str,
    worker_instance_id: str,
    lease_ttl_ms: int,
    capabilities: CapabilitySet | None,
    policy: ClaimPolicy | None,
) -> ClaimRequest:
    """Return the checked arguments of `claim`."""
    offered = CapabilitySet() if capabilities is None else capabilities
    wait = ClaimPolicy.immediate() if policy is None else policy
    if not isinstance(offered, CapabilitySet):
        raise InvalidType("capabilities must be a CapabilitySet.")
    if not isinstance(wait, ClaimPolicy):
        raise InvalidType("policy must be a ClaimPolicy.")
    return ClaimRequest(
        lane=keys.lane_id(lane),
        worker_id=keys.free_text("worker_id", worker_id),
        worker_instance_id=keys.free_text("worker_instance_id", worker_instance_id),
        lease_ttl_ms=check_int("lease_ttl_ms", lease_ttl_ms, 1, MAX_TTL_MS),
        capabilities=offered,
        max_wait_s=wait.max_wait,
    )


def attempt(handle: Handle) -> ops.Attempt:
    """Return the attempt of *handle*."""
    if not isinstance(handle, Handle):
        raise InvalidType(f"handle must be a Handle, not {type(handle).__name__}.")
    return ops.Attempt.of(handle)


def renew(handle: Handle, lease_ttl_ms: int | None) -> ops.Op[LeaseRenewal]:
    """Return the checked call of `renew`; without a length it is that of the claim."""
    owned = attempt(handle)
    ttl = owned.fields.lease_ttl_ms if lease_ttl_ms is None else lease_ttl_ms
    return ops.renew_lease(owned, check_int("lease_ttl_ms", ttl, 1, MAX_TTL_MS))


def complete(handle: Handle, payload: object) -> Call[None]:
    """Return the checked operation of `complete`."""
    owned = attempt(handle)
    op = ops.complete_execution(owned, _document("payload", payload))
    return hinted(op, owned.execution_id)


def fail(
    handle: Handle, reason: FailureReason | str, failure_class: FailureClass
) -> Call[FailOutcome]:
    """Return the checked operation of `fail`."""
    owned = attempt(handle)
    why = FailureReason(message=reason) if isinstance(reason, str) else reason
    if not isinstance(why, FailureReason):
        raise InvalidType("reason must be a FailureReason or a str.")
    if not isinstance(failure_class, FailureClass):
        raise InvalidType("failure_class must be a FailureClass.")
    return hinted(ops.fail_execution(owned, why, failure_class), owned.execution_id)


def cancel(
    target: Handle | str, reason: str, grace: float | timedelta | None
) -> Call[CancelOutcome]:
    """Return the checked operation of `cancel`; *target* is a handle or an execution id."""
    eid = attempt(target).execution_id if isinstance(target, Handle) else target
    eid = keys.canonical_execution_id(eid)
    why = keys.free_text("reason", reason, 4096, error=InvalidInput)
    return hinted(ops.cancel_execution(eid, why, duration_ms("grace", grace)), eid)


def progress(handle: Handle, percent: int | None, message: str) -> Call[None]:
    """Return the checked operation of `progress`."""
    if percent is not None:
        check_int("percent", percent, 0, 100)
    text = keys.free_text("message", message, 4096, empty=True, error=InvalidInput)
    return call(ops.report_progress(attempt(handle), percent, text))


def delay(handle: Handle, duration: float | timedelta) -> Call[int]:
    """Return the checked operation of `delay`."""
    return call(ops.delay_execution(attempt(handle), duration_ms("delay", duration)))


def wait_children(handle: Handle) -> Call[None]:
    """Return the checked operation of `wait_children`."""
    owned = attempt(handle)
    return hinted(ops.wait_children(owned), owned.execution_id)


def claim_from_reclaim(
    token: ReclaimToken,
    *,
    worker_id: str,
    worker_instance_id: str,
    lease_ttl_ms: int,
    capabilities: CapabilitySet | None,
) -> Call[Handle]:
    """Return the checked operation of `claim_from_reclaim`."""
    if not isinstance(token, ReclaimToken):
        raise InvalidType("token must be a ReclaimToken.")
    request = claim(
        lane=token.grant.lane_id,
        worker_id=worker_id,
        worker_instance_id=worker_instance_id,
        lease_ttl_ms=lease_ttl_ms,
        capabilities=capabilities,
        policy=None,
    )
    op = ops.claim_execution(
        token.grant.execution_id,
        lane=request.lane,
        worker_id=request.worker_id,
        worker_instance_id=request.worker_instance_id,
        lease_id=keys.new_uuid(),
        lease_ttl_ms=request.lease_ttl_ms,
        attempt_id=keys.new_uuid(),
        reclaim=True,
        capabilities=request.capabilities.tokens,
    )
    return call(op)


def find_reclaimable(partitions: int, limit: int) -> Call[list[ReclaimToken]]:
    """Return the checked operation of `find_reclaimable`."""
    check_int("limit", limit, 1, 10_000)
    return Call(lambda: supervision.find_reclaimable(partitions, limit))


def create_waitpoint(
    handle: Handle, waitpoint_id: str | None, expires: float | timedelta
) -> Call[PendingWaitpoint]:
    """Return the checked operation of `create_waitpoint`."""
    expires_ms = duration_ms("expires", expires)
    if expires_ms < 1:
        raise InvalidInput("expires must be at least a millisecond.")
    identity = (
        keys.new_uuid()
        if waitpoint_id is None
        else keys.canonical_uuid("waitpoint_id", waitpoint_id)
    )
    # The first waitpoint of a partition starts its ring of keys, unless a deployment did before.
    secret = os.urandom(32).hex()
    return call(ops.create_waitpoint(attempt(handle), identity, expires_ms, "auto", secret))


def rotate_waitpoint_secret(
    kid: str, secret: object, grace: float | timedelta, partitions: int
) -> Call[None]:
    """Return the checked operation of `rotate_waitpoint_secret`."""
    keys.opaque_id("kid", kid)
    if not isinstance(secret, bytes) or len(secret) != 32:
        raise InvalidInput("secret must be 32 random bytes.")
    grace_ms = duration_ms("grace", grace)
    text = secret.hex()
    return Call(lambda: _rotate(kid, text, grace_ms, partitions))


def suspend(
    handle: Handle,
    condition: ResumeCondition | WaitpointSpec | Sequence[WaitpointSpec],
    timeout: float | timedelta | None,
    on_timeout: TimeoutBehavior,
    reason: str,
) -> Call[SuspendOutcome]:
    """Return the checked operation of `suspend`."""
    if isinstance(condition, WaitpointSpec):
        condition = ResumeCondition.any(condition)
    elif isinstance(condition, (list, tuple)):
        condition = ResumeCondition.any(*condition)
    if not isinstance(condition, ResumeCondition):
        raise InvalidType("condition must be a ResumeCondition, a WaitpointSpec or several.")
    if not isinstance(on_timeout, TimeoutBehavior):
        raise InvalidType("on_timeout must be a TimeoutBehavior.")
    owned = attempt(handle)
    suspension_id = keys.new_uuid()
    op = ops.suspend_execution(
        owned,
        suspension_id,
        condition,
        duration_ms("timeout", timeout),
        on_timeout,
        keys.free_text("reason", reason, 256, error=InvalidInput),
    )
    suspended = handle.replace(kind=HandleKind.SUSPENDED)

    def flow() -> Flow[SuspendOutcome]:
        satisfied, first_id = yield from ops.call(op)
        return SuspendOutcome(first_id, handle if satisfied else suspended, satisfied)

    return Call(flow)


def deliver_signal(
    execution_id: str,
    waitpoint: PendingWaitpoint,
    signal_name: str,
    *,
    payload: object,
    signal_id: str | None,
    idempotency_key: str,
    correlation_id: str,
    category: str,
    source_type: str,
    source_identity: str,
) -> Call[SignalOutcome]:
    """Return the checked operation of `deliver_signal`."""
    if not isinstance(waitpoint, PendingWaitpoint):
        raise InvalidType("waitpoint must be a PendingWaitpoint.")
    eid = keys.canonical_execution_id(execution_id)
    data = None if payload is None else payload_bytes(payload)
    if data is not None and len(data) > MAX_SIGNAL:
        raise PayloadTooLarge(MAX_SIGNAL, len(data))
    texts = {
        "signal_category": category,
        "source_type": source_type,
        "source_identity": source_identity,
        "correlation_id": correlation_id,
    }
    for name, text in texts.items():
        keys.free_text(name, text, empty=True, error=InvalidInput)
    signal = ResumeSignal(
        signal_id=keys.new_uuid() if signal_id is None else signal_id,
        signal_name=keys.free_text("signal_name", signal_name, error=InvalidInput),
        accepted_at=0,
        payload=data,
        **texts,
    )
    key = keys.free_text("idempotency_key", idempotency_key, empty=True, error=InvalidInput)
    return hinted(ops.deliver_signal(eid, waitpoint, signal, key), eid)


MAX_SIGNAL = 65_536
"""Greatest payload of a signal, in bytes."""


def report_usage(handle: Handle, usage: UsageDimensions) -> Call[ReportUsageResult]:
    """Return the checked operation of `report_usage`."""
    if not isinstance(usage, UsageDimensions):
        raise InvalidType("usage must be UsageDimensions.")
    owned = attempt(handle)
    keyed = usage if usage.dedup_key else usage.with_dedup_key(keys.new_uuid())
    return Call(lambda: usage_steps.report_usage(owned, keyed))


def create_budget(
    budget_id: str, hard: Mapping[str, int] | None, soft: Mapping[str, int] | None
) -> Call[None]:
    """Return the checked operation of `create_budget`."""
    keys.opaque_id("budget_id", budget_id)
    limits: list[dict[str, int]] = []
    for name, given in (("hard", hard), ("soft", soft)):
        if given is not None and not isinstance(given, Mapping):
            raise InvalidType(f"{name} must be a mapping of dimension to limit.")
        limits.append(
            {
                keys.free_text("A dimension's name", dimension, 128, error=InvalidInput): check_int(
                    "A limit", limit, 0, 2**53 - 1
                )
                for dimension, limit in (given or {}).items()
            }
        )
    if not any(limits):
        raise InvalidInput("A budget needs at least one limit.")
    return call(ops.create_budget(budget_id, *limits))


def create_flow(flow_id: str | None, namespace: str, partitions: int) -> Call[str]:
    """Return the checked operation of `create_flow`."""
    identity = keys.new_uuid() if flow_id is None else keys.canonical_uuid("flow_id", flow_id)
    op = ops.create_flow(
        identity, keys.flow_slot_tag(identity, partitions), keys.free_text("namespace", namespace)
    )

    def flow() -> Flow[str]:
        yield from ops.call(op)
        return identity

    return Call(flow)


def cancel_flow(
    flow_id: str, policy: CancelFlowPolicy, wait: CancelFlowWait, reason: str, partitions: int
) -> Call[CancelFlowOutcome]:
    """Return the checked operation of `cancel_flow`."""
    if not isinstance(policy, CancelFlowPolicy):
        raise InvalidType("policy must be a CancelFlowPolicy.")
    if not isinstance(wait, CancelFlowWait):
        raise InvalidType("wait must be a CancelFlowWait.")
    identity = keys.canonical_uuid("flow_id", flow_id)
    slot_tag = keys.flow_slot_tag(identity, partitions)
    why = keys.free_text("reason", reason, 4096, error=InvalidInput)
    wait_s = (wait.timeout if wait.timeout is not None else float("inf")) if wait.wait else None
    return Call(lambda: flows.cancel_flow(identity, slot_tag, why, policy, wait_s))


def set_tags(execution_id: str, tags: Mapping[str, str]) -> Call[int]:
    """Return the checked operation of `set_tags`."""
    checked = _tags(tags)
    if not checked:
        raise InvalidInput("tags must hold at least one tag.")
    return call(ops.set_tags(keys.canonical_execution_id(execution_id), checked))


def scope(value: ScannerFilter | None) -> ScannerFilter:
    """Return *value*, checked to be a filter; None is the one that lets everything pass."""
    if value is None:
        return ScannerFilter.NOOP
    if not isinstance(value, ScannerFilter):
        raise InvalidType("The filter must be a ScannerFilter.")
    return value


def writer(
    mode: StreamMode | None,
    *,
    retention_maxlen: int,
    max_unacknowledged_bytes: int,
    linger_ms: float,
) -> WriterOptions:
    """Return the checked arguments of `open_writer`."""
    default = StreamMode.durable() if mode is None else mode
    if not isinstance(default, StreamMode):
        raise InvalidType("mode must be a StreamMode.")
    if type(linger_ms) not in (int, float) or not 0 <= linger_ms <= 1000:
        raise InvalidInput("linger_ms must be a number from 0 to 1000.")
    return WriterOptions(
        mode=default,
        retention_maxlen=check_int("retention_maxlen", retention_maxlen, 1, 2**40),
        max_unacknowledged_bytes=check_int(
            "max_unacknowledged_bytes", max_unacknowledged_bytes, 1 << 16, 1 << 34
        ),
        linger_ms=float(linger_ms),
    )


def frame(value: Frame) -> Frame:
    """Return *value*, checked to be a frame."""
    if not isinstance(value, Frame):
        raise InvalidType(f"append_frame() takes a Frame, not {type(value).__name__}.")
    return value


def _rotate(kid: str, secret: str, grace_ms: int, partitions: int) -> Flow[None]:
    """Let a key sign from now on in every partition; repeating it completes one that was interrupted."""
    calls = [
        ops.rotate_waitpoint_secret(index, kid, secret, grace_ms) for index in range(partitions)
    ]
    replies = yield Step(b"".join(op.request() for op in calls), replies=len(calls))
    for op, reply in zip(calls, replies, strict=True):
        op.answer(reply)
