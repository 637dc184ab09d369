"""Work: claiming, leases, retries, ends, usage, flows, and descriptions of executions."""

from __future__ import annotations

import enum
import re
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, Literal

from ff_fast import keys
from ff_fast.errors import (
    MAX_INT,
    CompletionOutcome,
    ExecutionState,
    InvalidCapabilities,
    InvalidId,
    InvalidInput,
    InvalidType,
    PayloadTooLarge,
    check_int,
)

from ._value import (
    MAX_U32,
    Value,
    check_flag,
    check_type,
    milliseconds,
    payload_bytes,
    seconds,
    set_field,
    utf8,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from dataclasses import KW_ONLY
    from datetime import timedelta

    from .stream import EndReason
    from .waitpoint import TimeoutBehavior

FlowState = Literal["open", "cancelled"]
"""State of a flow."""


# -- claiming and leases ---------------------------------------------------------------------------


class CapabilitySet(Value):
    """Capabilities that a worker offers, or an execution requires: a set of tokens.

    Args:
        tokens: Any iterable of text.  A token has no comma, no blank, no control character and is
            not empty; at most 256 of them, and at most 4096 bytes as CSV.

    Attributes:
        tokens: The tokens, each once, sorted.

    Raises:
        InvalidCapabilities: A token is malformed, or there are too many.
        InvalidType: *tokens* is a single text, or not an iterable of text.
    """

    tokens: tuple[str, ...] = ()

    def __init__(self, tokens: Iterable[str] = ()) -> None:
        if isinstance(tokens, (str, bytes)) or not hasattr(tokens, "__iter__"):
            raise InvalidType(f"tokens must be a list of str, not {type(tokens).__name__}.")
        unique: set[str] = set()
        for token in tokens:
            if not isinstance(token, str):
                raise InvalidType(f"A capability must be str, not {type(token).__name__}.")
            if re.fullmatch(_CAPABILITY, token) is None or utf8(token) is None:
                raise InvalidCapabilities
            unique.add(token)
            if len(unique) > 256:
                raise InvalidCapabilities
        set_field(self, "tokens", tuple(sorted(unique)))
        if len(self.csv()) > 4096:
            raise InvalidCapabilities("Capabilities must take at most 4096 bytes, commas included.")

    def is_empty(self) -> bool:
        """Return whether there is no token."""
        return not self.tokens

    def csv(self) -> bytes:
        """Return the tokens as the server functions take them: sorted, joined by commas."""
        return ",".join(self.tokens).encode("utf-8")


_CAPABILITY = r"[^,\x00-\x20\x7f]+"


class ClaimPolicy(Value):
    """How long a claim may wait for work.

    Attributes:
        max_wait: Longest wait in seconds, from 0; None answers at once.  Also takes a ``timedelta``.
    """

    max_wait: float | None = None

    if TYPE_CHECKING:

        def __init__(self, max_wait: float | timedelta | None = None) -> None: ...

    def __post_init__(self) -> None:
        if self.max_wait is not None:
            set_field(self, "max_wait", seconds("max_wait", self.max_wait, zero=True))

    @classmethod
    def immediate(cls) -> ClaimPolicy:
        """Return the policy that answers at once."""
        return cls()

    @classmethod
    def with_max_wait(cls, max_wait: float | timedelta) -> ClaimPolicy:
        """Return the policy that waits for work up to *max_wait*, in seconds or as a ``timedelta``."""
        return cls(seconds("max_wait", max_wait, zero=True))


class LeaseRenewal(Value):
    """A renewed lease.

    Attributes:
        expires_at_ms: When it now expires, Unix milliseconds by the server's clock.
        lease_epoch: Its epoch; renewing does not change it.
        cancel_requested: Whether the worker is asked to stop.
    """

    expires_at_ms: int
    lease_epoch: int
    cancel_requested: bool = False

    def __post_init__(self) -> None:
        check_int("expires_at_ms", self.expires_at_ms, 0, MAX_INT)
        check_int("lease_epoch", self.lease_epoch, 0, MAX_INT)
        check_flag("cancel_requested", self.cancel_requested)


class OnCancel(enum.Enum):
    """What befalls a handler whose execution is to be cancelled, or whose lease is lost.

    ``TELL``: it is told, and ends by itself. ``CANCEL``: it is told, and an asyncio handler is cancelled at its next
    ``await``: after a grace, or at once when the lease is lost.
    """

    TELL = "tell"
    CANCEL = "cancel"


class ReclaimGrant(Value):
    """Permission to take over an execution whose worker was lost.

    Attributes:
        execution_id: Canonical execution id.
        partition_key: Its hash tag, ``{fp:N}``.
        grant_key: Key that holds the grant.
        expires_at_ms: When the grant expires, by the server's clock.
        lane_id: Lane of the execution.
    """

    execution_id: str
    partition_key: str
    grant_key: str
    expires_at_ms: int
    lane_id: str

    def __post_init__(self) -> None:
        set_field(self, "execution_id", keys.canonical_execution_id(self.execution_id))
        if self.partition_key != keys.slot_tag_of(self.execution_id):
            raise InvalidId("partition_key must be the hash tag of the execution id.")
        check_type("grant_key", self.grant_key, str)
        check_int("expires_at_ms", self.expires_at_ms, 0, MAX_INT)
        keys.lane_id(self.lane_id)


class ReclaimToken(Value):
    """Result of `find_reclaimable` and argument of `claim_from_reclaim`."""

    grant: ReclaimGrant

    def __post_init__(self) -> None:
        check_type("grant", self.grant, ReclaimGrant)


# -- retries ---------------------------------------------------------------------------------------


class RetryBackoff(enum.Enum):
    """How the pauses between retries grow."""

    FIXED = "fixed"
    EXPONENTIAL = "exponential"


class RetryPolicy(Value):
    """Retries of failed and lost attempts.

    The pause before retry n (from 0) is ``delay`` or, exponentially, ``delay * multiplier^n``, at most ``max_delay``,
    less a random share of up to ``jitter_percent``.  The server rounds it to whole milliseconds.

    Attributes:
        max_retries: Number of retries after transient failures and timeouts.
        backoff: How the pauses grow.
        delay: First pause in seconds.  Also takes a ``timedelta``.
        multiplier: Growth of an exponential backoff, 1 to 100.
        max_delay: Longest pause in seconds.  Also takes a ``timedelta``.
        jitter_percent: Largest random share of each pause, 0 to 100.
        max_reclaims: Number of times that a lost worker is replaced.
    """

    max_retries: int = 0
    backoff: RetryBackoff = RetryBackoff.EXPONENTIAL
    delay: float = 1.0
    multiplier: float = 2.0
    max_delay: float = 60.0
    jitter_percent: int = 20
    max_reclaims: int = 100

    if TYPE_CHECKING:

        def __init__(
            self,
            max_retries: int = 0,
            backoff: RetryBackoff = RetryBackoff.EXPONENTIAL,
            delay: float | timedelta = 1.0,
            multiplier: float = 2.0,
            max_delay: float | timedelta = 60.0,
            jitter_percent: int = 20,
            max_reclaims: int = 100,
        ) -> None: ...

    def __post_init__(self) -> None:
        check_int("max_retries", self.max_retries, 0, MAX_U32)
        check_type("backoff", self.backoff, RetryBackoff)
        set_field(self, "delay", seconds("delay", self.delay))
        set_field(self, "max_delay", seconds("max_delay", self.max_delay))
        check_int("jitter_percent", self.jitter_percent, 0, 100)
        check_int("max_reclaims", self.max_reclaims, 0, MAX_U32)
        if type(self.multiplier) not in (int, float) or not 1 <= self.multiplier <= 100:
            raise InvalidInput("multiplier must be a number from 1 to 100.")


# -- ends ------------------------------------------------------------------------------------------


_REASON_BYTES = 65_536


class FailureReason(Value):
    """Why an attempt failed.

    Attributes:
        message: Text for people, at most 64 KiB of UTF-8.  It is stored and shown unchanged.
        detail: Structured detail, at most 64 KiB; ``repr`` shows its size only.
    """

    message: str
    detail: bytes | None = None

    def __post_init__(self) -> None:
        encoded = utf8(check_type("message", self.message, str))
        if encoded is None:
            raise InvalidInput("message contains a lone surrogate; replace it before reporting.")
        if self.detail is not None:
            set_field(self, "detail", payload_bytes(self.detail, "detail"))
        for name, data in (("message", encoded), ("detail", self.detail or b"")):
            if len(data) > _REASON_BYTES:
                raise PayloadTooLarge(_REASON_BYTES, len(data), name)

    @classmethod
    def with_detail(cls, message: str, detail: bytes) -> FailureReason:
        """Return a reason with structured detail."""
        return cls(message, detail)


class FailureClass(enum.Enum):
    """Kind of a failure; decides about retries."""

    TRANSIENT = "transient"
    PERMANENT = "permanent"
    INFRA_CRASH = "infra_crash"
    TIMEOUT = "timeout"
    CANCELLED = "cancelled"


class FailOutcome(Value):
    """Outcome of `fail`: a scheduled retry, or the end of the execution.

    Attributes:
        retry_scheduled: Whether the execution will be retried.
        delay_until_ms: When it can be claimed again, Unix milliseconds; None without a retry.
    """

    retry_scheduled: bool
    delay_until_ms: int | None = None

    TERMINAL_FAILED: ClassVar[FailOutcome]

    def __post_init__(self) -> None:
        check_flag("retry_scheduled", self.retry_scheduled)
        if self.retry_scheduled:
            check_int("delay_until_ms", self.delay_until_ms, 0, MAX_INT)
        elif self.delay_until_ms is not None:
            raise InvalidInput("An execution that ended has no delay_until_ms.")

    @classmethod
    def RETRY_SCHEDULED(cls, delay_until_ms: int) -> FailOutcome:  # noqa: N802 - a variant
        """Return the outcome "retried from *delay_until_ms* on"."""
        return cls(True, delay_until_ms)


FailOutcome.TERMINAL_FAILED = FailOutcome(False)


class CancelOutcome(Value):
    """Answer to a cancellation.

    Attributes:
        cancelled: Whether the execution is cancelled; False during the grace of its worker.
        previous_state: State before the cancellation.
    """

    cancelled: bool
    previous_state: ExecutionState


class CompletionPayload(Value):
    """The end of an execution, as subscribers get it.

    Attributes:
        execution_id: Canonical execution id.
        outcome: How it ended.
        payload_bytes: Its result; None without one, and where the execution's retention was over when it was read.
        produced_at_ms: When it ended, Unix milliseconds by the server's clock; 0 if unknown.
        flow_id: Its flow; None without one.
        cursor: ``after`` of a subscription that continues after it; None outside a subscription.
        error: What ended it, its first 256 bytes: the message of its last failure, the reason of its cancellation, or
            which time ran out. None after a success.
    """

    execution_id: str
    outcome: CompletionOutcome
    payload_bytes: bytes | None = None
    produced_at_ms: int = 0
    flow_id: str | None = None
    cursor: str | None = None
    error: str | None = None

    def __post_init__(self) -> None:
        set_field(self, "execution_id", keys.canonical_execution_id(self.execution_id))
        check_type("outcome", self.outcome, str)
        if self.payload_bytes is not None:
            set_field(self, "payload_bytes", payload_bytes(self.payload_bytes, "payload_bytes"))
        check_int("produced_at_ms", self.produced_at_ms, 0, MAX_INT)
        if self.flow_id is not None:
            set_field(self, "flow_id", keys.canonical_uuid("flow_id", self.flow_id))

    def with_flow_id(self, flow_id: str) -> CompletionPayload:
        """Return a copy that belongs to this flow."""
        return self.replace(flow_id=flow_id)


# -- usage -----------------------------------------------------------------------------------------


class UsageDimensions(Value):
    """Usage of an attempt since its last report.

    Attributes:
        input_tokens: Tokens read, from 0.
        output_tokens: Tokens written, from 0.
        wall_ms: Wall-clock time in milliseconds; None is not counted.  Also takes a ``timedelta``.
        custom: At most 61 more dimensions by name; stored as a copy, sorted by name.  Names are text of 1
            to 128 bytes, other than those of the attributes above.
        dedup_key: Key that counts once in reports of the execution; None and empty do not deduplicate.
    """

    input_tokens: int = 0
    output_tokens: int = 0
    wall_ms: int | None = None
    custom: Mapping[str, int] = MappingProxyType({})
    dedup_key: str | None = None

    if TYPE_CHECKING:

        def __init__(
            self,
            input_tokens: int = 0,
            output_tokens: int = 0,
            wall_ms: int | timedelta | None = None,
            custom: Mapping[str, int] = ...,
            dedup_key: str | None = None,
        ) -> None: ...

    def __post_init__(self) -> None:
        check_int("input_tokens", self.input_tokens, 0, MAX_INT)
        check_int("output_tokens", self.output_tokens, 0, MAX_INT)
        if self.wall_ms is not None:
            set_field(self, "wall_ms", milliseconds("wall_ms", self.wall_ms, 0, MAX_INT))
        if not hasattr(self.custom, "items"):
            raise InvalidType(f"custom must be a dict, not {type(self.custom).__name__}.")
        # The server takes 64 dimensions in one report, three of which have names of their own.
        if len(self.custom) > 61:
            raise InvalidInput("custom must have at most 61 dimensions.")
        for name, amount in self.custom.items():
            keys.free_text("A dimension's name", name, 128, error=InvalidInput)
            if name in ("input_tokens", "output_tokens", "wall_ms"):
                raise InvalidInput("custom must not repeat input_tokens, output_tokens or wall_ms.")
            check_int("A custom amount", amount, 0, MAX_INT)
        set_field(self, "custom", dict(sorted(self.custom.items())))
        if self.dedup_key is not None:
            keys.free_text("dedup_key", self.dedup_key, empty=True, error=InvalidInput)
            set_field(self, "dedup_key", self.dedup_key or None)

    def with_input_tokens(self, tokens: int) -> UsageDimensions:
        """Return a copy with this number of input tokens."""
        return self.replace(input_tokens=tokens)

    def with_output_tokens(self, tokens: int) -> UsageDimensions:
        """Return a copy with this number of output tokens."""
        return self.replace(output_tokens=tokens)

    def with_wall_ms(self, ms: int | timedelta) -> UsageDimensions:
        """Return a copy with this wall-clock time: milliseconds, or a ``timedelta``."""
        return self.replace(wall_ms=ms)

    def with_custom(self, name: str, amount: int) -> UsageDimensions:
        """Return a copy with one more custom dimension, or another amount of it."""
        return self.replace(custom={**self.custom, name: amount})

    def with_dedup_key(self, key: str) -> UsageDimensions:
        """Return a copy with this key against double counting."""
        return self.replace(dedup_key=key)

    def __hash__(self) -> int:
        return hash(
            (
                self.input_tokens,
                self.output_tokens,
                self.wall_ms,
                tuple(self.custom.items()),
                self.dedup_key,
            )
        )


class UsageVerdict(enum.Enum):
    """Verdict on a usage report."""

    OK = "ok"
    SOFT_BREACH = "soft_breach"
    HARD_BREACH = "hard_breach"
    ALREADY_APPLIED = "already_applied"


class ReportUsageResult(Value):
    """Answer to a usage report.

    Attributes:
        verdict: ``OK`` and ``SOFT_BREACH``: applied. ``HARD_BREACH``: applied to no budget and not to the execution.
            ``ALREADY_APPLIED``: an earlier report with this key was applied.
        budget_id: For a breach, the budget.
        dimension: For a breach, the dimension.
        current: For a breach, the amount used, including this report if it was applied.
        limit: For a breach, the limit.
    """

    verdict: UsageVerdict
    budget_id: str | None = None
    dimension: str | None = None
    current: int = 0
    limit: int = 0


# -- flows -----------------------------------------------------------------------------------------


class CancelFlowPolicy(enum.Enum):
    """Members that cancelling a flow cancels.

    ``FLOW_ONLY``: none. ``CANCEL_ALL``: every member that has not ended. ``CANCEL_PENDING``: those that
    are not running.
    """

    FLOW_ONLY = "flow_only"
    CANCEL_ALL = "cancel_all"
    CANCEL_PENDING = "cancel_pending"


class CancelFlowWait(Value):
    """Whether cancelling a flow waits until its members are cancelled.

    Use ``NO_WAIT``, ``WAIT_INDEFINITE``, or :meth:`wait_timeout`.

    Attributes:
        wait: Whether to wait.
        timeout: Longest wait in seconds; None has no limit.  Also takes a ``timedelta``.
    """

    wait: bool
    timeout: float | None = None

    if TYPE_CHECKING:

        def __init__(self, wait: bool, timeout: float | timedelta | None = None) -> None: ...

    NO_WAIT: ClassVar[CancelFlowWait]
    WAIT_INDEFINITE: ClassVar[CancelFlowWait]

    def __post_init__(self) -> None:
        check_flag("wait", self.wait)
        if self.timeout is not None:
            if not self.wait:
                raise InvalidInput("timeout has no meaning without waiting.")
            set_field(self, "timeout", seconds("timeout", self.timeout, zero=True))

    @classmethod
    def wait_timeout(cls, timeout: float | timedelta) -> CancelFlowWait:
        """Return the wait of at most *timeout*, in seconds or as a ``timedelta``."""
        return cls(True, seconds("timeout", timeout, zero=True))


CancelFlowWait.NO_WAIT = CancelFlowWait(False)

CancelFlowWait.WAIT_INDEFINITE = CancelFlowWait(True)


class CancelFlowOutcome(Value):
    """Answer to the cancellation of a flow.

    Attributes:
        policy: The policy in force: that of the first cancellation.
        cancelled_members: Number of members that this call cancelled.
        open_members: Number of members that had not ended when it returned.
    """

    policy: CancelFlowPolicy
    cancelled_members: int
    open_members: int


class FlowDescription(Value):
    """A flow.

    Attributes:
        flow_id: Its id.
        state: Whether it takes executions.
        members: Ids of its executions.
        open_members: Ids of the members that have not ended.
    """

    flow_id: str
    state: FlowState
    members: tuple[str, ...]
    open_members: tuple[str, ...]


# -- executions ------------------------------------------------------------------------------------


class StateTransition(Value):
    """One change of an execution's state.

    Attributes:
        at_ms: When, Unix milliseconds by the server's clock.
        from_state: State before it.
        to_state: State after it.
        attempt_index: Attempt that ran then, or the next one if none ran; from 0.
        reason: A word, or for a suspension the text of the worker; None if the states say it all.
        error: The first 1024 bytes of the message with which the attempt failed, or of the reason of a cancellation; None
            for another change.
        failure_class: Class of that failure; None without one.
    """

    at_ms: int
    from_state: ExecutionState
    to_state: ExecutionState
    attempt_index: int
    reason: str | None = None
    error: str | None = None
    failure_class: FailureClass | None = None


class AttemptDescription(Value):
    """One attempt of an execution.

    Attributes:
        attempt_index: The attempt, from 0.
        started_at_ms: When it was first claimed, Unix milliseconds by the server's clock; None where that is not known any
            more.
        ended_at_ms: When it ended; None while it runs, or waits to be continued.
        end_reason: Why its stream ended; None before.
        error: Why it did not succeed: the first 1024 bytes of the message with which it failed or of the reason of its
            cancellation, or a sentence about the worker that was lost or the time that ran out. None after a success, and
            before its end.
        failure_class: Class of its failure; None without one.
    """

    attempt_index: int
    started_at_ms: int | None = None
    ended_at_ms: int | None = None
    end_reason: EndReason | None = None
    error: str | None = None
    failure_class: FailureClass | None = None


class SuspensionDescription(Value):
    """The suspension of an execution.

    Attributes:
        suspension_id: Its id.
        attempt_index: The suspended attempt, which continues afterwards; from 0.
        reason: Text of the worker.
        suspended_at_ms: When it began, Unix milliseconds by the server's clock.
        timeout_at_ms: When ``on_timeout`` takes effect; None without a limit.
        on_timeout: Action at the timeout.
        waitpoint_ids: Waitpoints that take signals, each once.
        waiting_for: What these signals must have, each once: ``signal_name`` or ``correlation_id`` with the text, or
            ``external``, which any signal has.
        needed: How many members of its condition must be met.
        received: How many are.
    """

    suspension_id: str
    attempt_index: int
    reason: str
    suspended_at_ms: int
    timeout_at_ms: int | None
    on_timeout: TimeoutBehavior
    waitpoint_ids: tuple[str, ...]
    waiting_for: tuple[str, ...] = ()
    needed: int = 1
    received: int = 0


class ExecutionDescription(Value):
    """State of an execution, without its payload, its result, and secrets such as lease ids.

    Points in time are Unix milliseconds by the server's clock, durations are seconds.

    Attributes:
        execution_id: Its id.
        state: Its state.
        lane: Its lane; empty for a named stream, which is in none.
        namespace: Its namespace.
        priority: Its priority, 0 to 9000; higher ones are claimed first.
        required_capabilities: Capabilities that its worker must offer.
        flow_id: Its flow; None without one.
        parent_id: The execution that may wait for it; None without one.
        traceparent: The span in which it was created, as in the W3C header; None where its creator was not traced, see
            `ff_fast.tracing.trace`.
        budget_ids: Budgets that its usage is charged to.
        tags: Its tags.
        created_at_ms: When it was created.
        started_at_ms: When it was first claimed; None before.
        finished_at_ms: When it ended; None before.
        last_transition_at_ms: When its state last changed.
        delay_until_ms: When it can be claimed again; None unless it is ``delayed``.
        deadline_at_ms: When it expires unless it has ended; None without a limit.
        attempt_deadline_at_ms: When the running attempt times out; None without a limit or a running attempt.
        lease_expires_at_ms: When its lease expires; None unless it is ``active``.
        attempt_count: Number of attempts so far.
        attempt_index: Newest attempt, from 0; None before the first claim.
        worker_id: Worker of the newest attempt; None before the first claim.
        worker_instance_id: Instance of that worker; None before the first claim.
        lease_epoch: Number of leases granted so far.
        retry: Its retry policy.
        retry_count: Number of retries so far.
        reclaim_count: Number of lost workers so far.
        attempt_timeout: Longest time of an attempt; None without a limit.
        retention: Time that it is kept after its end.
        outcome: How it ended; None before.
        failure_reason: Message of the last failure; None without one.
        failure_class: Class of the last failure.
        failure_detail: Structured detail of the last failure; ``repr`` shows its size only.
        cancel_requested: Whether its worker is asked to stop.
        cancellation_reason: Reason of its cancellation, or of the request; None without one.
        cancelled_from: State before its cancellation; None if it is not cancelled.
        progress_percent: Last progress reported, 0 to 100.
        progress_message: Last message reported.
        progress_at_ms: When progress was last reported.
        suspension: Its suspension; None unless it is ``suspended``.
        usage: Reported usage by dimension.
        history: Its newest 100 transitions, oldest first.
        attempts: Its attempts as far as these transitions tell of them, oldest first, each with its own error.
    """

    _: KW_ONLY
    execution_id: str
    state: ExecutionState
    lane: str
    namespace: str
    priority: int
    required_capabilities: CapabilitySet = CapabilitySet()
    flow_id: str | None = None
    parent_id: str | None = None
    traceparent: str | None = None
    budget_ids: tuple[str, ...] = ()
    tags: Mapping[str, str] = MappingProxyType({})
    created_at_ms: int
    started_at_ms: int | None = None
    finished_at_ms: int | None = None
    last_transition_at_ms: int
    delay_until_ms: int | None = None
    deadline_at_ms: int | None = None
    attempt_deadline_at_ms: int | None = None
    lease_expires_at_ms: int | None = None
    attempt_count: int = 0
    attempt_index: int | None = None
    worker_id: str | None = None
    worker_instance_id: str | None = None
    lease_epoch: int = 0
    retry: RetryPolicy = RetryPolicy()
    retry_count: int = 0
    reclaim_count: int = 0
    attempt_timeout: float | None = None
    retention: float
    outcome: CompletionOutcome | None = None
    failure_reason: str | None = None
    failure_class: FailureClass | None = None
    failure_detail: bytes | None = None
    cancel_requested: bool = False
    cancellation_reason: str | None = None
    cancelled_from: ExecutionState | None = None
    progress_percent: int | None = None
    progress_message: str | None = None
    progress_at_ms: int | None = None
    suspension: SuspensionDescription | None = None
    usage: Mapping[str, int] = MappingProxyType({})
    history: tuple[StateTransition, ...] = ()
    attempts: tuple[AttemptDescription, ...] = ()

    def __post_init__(self) -> None:
        set_field(self, "tags", dict(self.tags))
        set_field(self, "usage", dict(self.usage))

    @property
    def handler(self) -> str | None:
        """Name of the handler that it was created for; None without one."""
        return keys.handler_in(self.required_capabilities.tokens)

    @property
    def retries_left(self) -> int:
        """Number of retries left after transient failures and timeouts."""
        return max(self.retry.max_retries - self.retry_count, 0)

    def __hash__(self) -> int:
        return hash((self.execution_id, self.state, self.last_transition_at_ms))


# -- filters ---------------------------------------------------------------------------------------


class Namespace(str):
    """Name of a tenant or workspace: one line of text of 1 to 256 bytes of UTF-8.

    Raises:
        InvalidId: The text is anything else.
    """

    __slots__ = ()

    def __new__(cls, text: str) -> Namespace:
        return super().__new__(cls, keys.free_text("namespace", text))


class ScannerFilter(Value):
    """Filter of executions for a supervisor or a subscription; an empty one passes all.

    Attributes:
        namespace: Only executions of this namespace.
        instance_tag: Only executions whose tag ``instance_tag[0]`` has the value
            ``instance_tag[1]``.
    """

    namespace: Namespace | None = None
    instance_tag: tuple[str, str] | None = None

    NOOP: ClassVar[ScannerFilter]

    def __post_init__(self) -> None:
        if self.namespace is not None:
            set_field(self, "namespace", Namespace(self.namespace))
        if self.instance_tag is not None:
            if len(check_type("instance_tag", self.instance_tag, tuple)) != 2:
                raise InvalidType("instance_tag must be a pair (key, value).")
            keys.tag_key(self.instance_tag[0])
            check_type("tag value", self.instance_tag[1], str)

    def with_namespace(self, namespace: str) -> ScannerFilter:
        """Return a copy that sees this namespace only."""
        return ScannerFilter(Namespace(namespace), self.instance_tag)

    def with_instance_tag(self, key: str, value: str) -> ScannerFilter:
        """Return a copy that sees only executions whose tag *key* is *value*."""
        return ScannerFilter(self.namespace, (key, value))

    def is_noop(self) -> bool:
        """Return whether every execution passes."""
        return self.namespace is None and self.instance_tag is None

    def matches(self, core_namespace: str | None = None, tag_value: str | None = None) -> bool:
        """Return whether an execution passes.

        Args:
            core_namespace: Its namespace; ignored if the filter has none.
            tag_value: Its value of the filter's tag; ignored if the filter has none.
        """
        if self.namespace is not None and core_namespace != self.namespace:
            return False
        return self.instance_tag is None or tag_value == self.instance_tag[1]


ScannerFilter.NOOP = ScannerFilter()
