"""The arguments of the public operations, checked before anything is sent: once, for both shells."""

from __future__ import annotations

from collections.abc import Mapping

from ff_fast import keys, ops
from ff_fast._lifecycle import ClaimRequest
from ff_fast._writing import WriterOptions
from ff_fast.errors import InvalidInput, InvalidType, PayloadTooLarge, check_int
from ff_fast.types import (
    CapabilitySet,
    ClaimPolicy,
    FailOutcome,
    FailureClass,
    FailureReason,
    Frame,
    Handle,
    LeaseRenewal,
    StreamMode,
    payload_bytes,
)

MAX_DOCUMENT = 16 << 20
"""Greatest payload of an execution and of its result, in bytes."""

MAX_TTL_MS = 2**48
DEFAULT_RETENTION_MS = 86_400_000


def _document(name: str, value: object) -> bytes:
    data = payload_bytes(value, name)
    if len(data) > MAX_DOCUMENT:
        raise PayloadTooLarge(MAX_DOCUMENT, len(data))
    return data


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
    partitions: int,
) -> ops.Op[bytes]:
    """Return the checked call of `create_execution`; its id is ``op.argv[0]``."""
    checked_tags: dict[str, str] = {}
    if tags is not None and not isinstance(tags, Mapping):
        raise InvalidType(f"tags must be a mapping of str to str, not {type(tags).__name__}.")
    for name, value in (tags or {}).items():
        checked_tags[keys.tag_key(name)] = keys.free_text("tag value", value)
    required = CapabilitySet() if required_capabilities is None else required_capabilities
    if not isinstance(required, CapabilitySet):
        raise InvalidType("required_capabilities must be a CapabilitySet.")
    return ops.create_execution(
        keys.new_execution_id(partitions)
        if execution_id is None
        else keys.canonical_execution_id(execution_id),
        namespace=keys.free_text("namespace", namespace),
        lane=keys.lane_id(lane),
        priority=check_int("priority", priority, 0, 9000),
        required_capabilities=required.csv(),
        retention_ms=check_int("retention_ms", retention_ms, 1, MAX_TTL_MS),
        payload=_document("payload", payload),
        tags=checked_tags,
    )


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


def complete(handle: Handle, payload: object) -> ops.Op[None]:
    """Return the checked call of `complete`."""
    return ops.complete_execution(attempt(handle), _document("payload", payload))


def fail(
    handle: Handle, reason: FailureReason | str, failure_class: FailureClass
) -> ops.Op[FailOutcome]:
    """Return the checked call of `fail`."""
    why = FailureReason(message=reason) if isinstance(reason, str) else reason
    if not isinstance(why, FailureReason):
        raise InvalidType("reason must be a FailureReason or a str.")
    if not isinstance(failure_class, FailureClass):
        raise InvalidType("failure_class must be a FailureClass.")
    return ops.fail_execution(attempt(handle), why, failure_class)


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
