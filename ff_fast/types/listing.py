"""Listings: executions, lanes and workers of a deployment, as those see them who look after it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from ._value import Value

if TYPE_CHECKING:
    from dataclasses import KW_ONLY

    from ff_fast.errors import ExecutionState

    from .work import FailureClass


FindingLevel = Literal["ok", "warning", "failed", "unknown"]
"""How a check has ended; ``unknown`` where this user may not ask."""


class Finding(Value):
    """What a check of a deployment has found.

    Attributes:
        check: What was looked at: ``server``, ``memory``, ``persistence``, ``library``, ``partitions``, ``clock``,
            ``supervisor`` or ``rights``.
        level: How that has ended.
        text: What was found and what to do, in sentences.
    """

    check: str
    level: FindingLevel
    text: str


class ExecutionSummary(Value):
    """What a listing says of an execution.

    Points in time are Unix milliseconds by the server's clock.

    Attributes:
        execution_id: Its id.
        state: Its state.
        lane: Its lane; empty for a named stream, which is in none.
        namespace: Its namespace.
        priority: Its priority.
        flow_id: Its flow; None without one.
        created_at_ms: When it was created.
        started_at_ms: When it was first claimed; None before.
        finished_at_ms: When it ended; None before.
        last_transition_at_ms: When its state last changed.
        due_at_ms: When it can be claimed again, while it is ``delayed``, or when its suspension times out; else None.
        attempt_count: Number of attempts so far.
        attempt_index: Newest attempt, from 0; None before the first claim.
        retry_count: Number of retries so far.
        worker_id: Worker of the newest attempt; None before the first claim.
        worker_instance_id: Instance of that worker.
        lease_expires_at_ms: When its lease expires; None unless it is ``active``.
        error: Message of its last failure, or the reason of its cancellation, of at most 512 bytes; None without one, and
            of an execution that completed.
        failure_class: Class of its last failure.
        progress_percent: Last progress reported.
        suspension_reason: Text of the worker that has suspended it; None unless it is ``suspended``.
        waiting_for: Signals that it waits for while it is ``suspended``, such as ``signal_name approve``; empty where
            its condition is large.
    """

    _: KW_ONLY
    execution_id: str
    state: ExecutionState
    lane: str
    namespace: str
    priority: int = 0
    flow_id: str | None = None
    created_at_ms: int
    started_at_ms: int | None = None
    finished_at_ms: int | None = None
    last_transition_at_ms: int
    due_at_ms: int | None = None
    attempt_count: int = 0
    attempt_index: int | None = None
    retry_count: int = 0
    worker_id: str | None = None
    worker_instance_id: str | None = None
    lease_expires_at_ms: int | None = None
    error: str | None = None
    failure_class: FailureClass | None = None
    progress_percent: int | None = None
    suspension_reason: str | None = None
    waiting_for: tuple[str, ...] = ()


class ExecutionPage(Value):
    """A part of a listing.

    Attributes:
        items: Executions, in the order of the listing.
        next: Cursor of the next part, letters, digits, dots and hyphens; None where this is the last one.
    """

    items: tuple[ExecutionSummary, ...]
    next: str | None


class LaneSummary(Value):
    """How many executions of a lane are in which state.

    Attributes:
        lane: The lane; empty for all named streams.
        waiting: Executions that can be claimed.
        delayed: Executions that wait for a time: of a delay, or of a retry.
        waiting_children: Executions that wait for their children.
        active: Executions that are with a worker.
        suspended: Executions that wait for a signal.
        failed: Executions that have failed within the last hour, of each partition at most 256 of all lanes.
        oldest_waiting_at_ms: When the oldest of those that can be claimed was created, Unix milliseconds by the server's
            clock; None without one.
    """

    lane: str
    waiting: int = 0
    delayed: int = 0
    waiting_children: int = 0
    active: int = 0
    suspended: int = 0
    failed: int = 0
    oldest_waiting_at_ms: int | None = None


class WorkerSummary(Value):
    """An instance of a worker that holds leases.

    Points in time are Unix milliseconds by the server's clock.

    Attributes:
        worker_id: Name of the worker.
        worker_instance_id: Name of its process.
        lanes: Lanes of the executions that it has, sorted.
        executions: How many executions it has.
        oldest_claim_at_ms: When it has got the one that it has for longest.
        next_lease_expires_at_ms: When the first of its leases expires. Renewals move it; a time in the past is that of a
            worker that is lost.
    """

    worker_id: str
    worker_instance_id: str
    lanes: tuple[str, ...]
    executions: int
    oldest_claim_at_ms: int
    next_lease_expires_at_ms: int
