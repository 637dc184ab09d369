"""What both shells' workers share, without I/O: when to renew, what a handler's result and exception mean."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, Protocol, TypeVar

from ff_fast.errors import FFError, InvalidType, LeaseExpired
from ff_fast.types import (
    CapabilitySet,
    ClaimPolicy,
    FailureClass,
    FailureReason,
    HandleKind,
    payload_bytes,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

    from ff_fast.types import Handle, ResumeSignal

RENEW_AT = 1 / 3
"""A lease is renewed when this share of it has passed, so that renewals may fail before it lapses."""

CLAIM_WAIT_S = 1.0
"""How long a worker waits for work before it looks whether it shall stop."""

HAND_BACK_S = 2.0
"""How long a worker that is cancelled takes to store what was written, and to hand the execution back."""

END_AGAIN_S = 0.25
"""How long a worker waits before it tries again to end an execution that it holds."""

CANCEL_REASON = "the worker was asked to stop"

_LONGEST_PERIOD_S = 3_600.0
_LONGEST_MESSAGE = 4_096


class TaskGaveUp(BaseException):
    """Raised inside a handler by ``suspend``, ``delay`` and ``wait_children``: the lease is given up, the handler is
    called again when the execution goes on. Let it pass."""


class TaskFailed(Exception):  # noqa: N818 - what the handler reports
    """Raise it in a handler to end the attempt as failed, with a class that decides about retries.

    Args:
        reason: Why, as text (of which 4096 bytes are kept) or a ``FailureReason``.
        failure_class: What kind of failure it is.
    """

    def __init__(
        self,
        reason: FailureReason | str,
        failure_class: FailureClass = FailureClass.PERMANENT,
    ) -> None:
        if isinstance(reason, str):
            reason = FailureReason(message=_clean(reason))
        if not isinstance(reason, FailureReason):
            raise InvalidType("reason must be a str or a FailureReason.")
        if not isinstance(failure_class, FailureClass):
            raise InvalidType("failure_class must be a FailureClass.")
        self.reason = reason
        self.failure_class = failure_class
        super().__init__(self.reason.message)


class Failure(NamedTuple):
    """What `fail` is called with."""

    reason: FailureReason
    failure_class: FailureClass


def _clean(text: str) -> str:
    """Return *text* as a message can be: UTF-8, and not too long."""
    return text.encode("utf-8", "replace")[:_LONGEST_MESSAGE].decode("utf-8", "ignore")


def failure_of(error: BaseException) -> Failure:
    """Return what an exception of a handler means: transient, unless it says otherwise itself."""
    if isinstance(error, TaskFailed):
        return Failure(error.reason, error.failure_class)
    name = type(error).__name__
    try:
        text = f"{name}: {error}"
    except Exception:  # noqa: BLE001 - its text is the handler's code too
        text = name
    return Failure(FailureReason(message=_clean(text)), FailureClass.TRANSIENT)


def result_of(value: object) -> bytes:
    """Return a handler's result as bytes; None is no result.

    Raises:
        TaskFailed: It is neither None, bytes nor text; the same handler would return the same again.
    """
    if value is None:
        return b""
    try:
        return payload_bytes(value, "The result of a handler")
    except FFError as error:
        refused = TaskFailed(str(error))
    raise refused


def gave_up(error: BaseException) -> bool:
    """Whether an error is a :class:`TaskGaveUp`, or a group of nothing else, as a handler's own tasks make it."""
    if isinstance(error, BaseExceptionGroup):
        return all(gave_up(inner) for inner in error.exceptions)
    return isinstance(error, TaskGaveUp)


def is_lease_lost(error: FFError) -> bool:
    """Whether an error says that the execution is somebody else's, or ended."""
    return error.code in (
        "stale_owner",
        "lease_expired",
        "execution_not_active",
        "execution_not_found",
        "stream_closed",
        "suspended",
        "writer_superseded",
    )


class _Hears(Protocol):
    """What brings the news of a cancellation."""

    @property
    def cancel_requested(self) -> bool: ...


class _Keeps(_Hears, Protocol):
    """What knows whether the lease is held."""

    @property
    def held(self) -> bool: ...


W = TypeVar("W", bound=_Hears)
K = TypeVar("K", bound=_Keeps)


class TaskState(Generic[W, K]):
    """What a task is, and what it knows of its lease: the part of it that is the same in both shells."""

    def __init__(self, handle: Handle) -> None:
        self._writer: W | None = None
        self._lost: FFError | None = None
        self._cancel_requested = False
        self.keeper: K | None = None
        self.given_up = False
        self.handle = handle
        fields = handle.fields()
        self.execution_id = fields.execution_id
        self.attempt_index = fields.attempt_index
        self.resumed = handle.kind is HandleKind.RESUMED
        self.payload: bytes = b""
        self.signals: tuple[ResumeSignal, ...] = ()

    def lost(self, error: FFError) -> None:
        """The lease is gone: whatever is written from here on is refused, at once."""
        self._lost = error

    @property
    def holds_lease(self) -> bool:
        """Whether the execution is still this task's, as far as the process can know."""
        return not (
            self.given_up
            or self._lost is not None
            or (self.keeper is not None and not self.keeper.held)
        )

    @property
    def cancel_requested(self) -> bool:
        """Whether a cancellation was asked for; an append and a renewal bring the news."""
        return (
            self._cancel_requested
            or (self._writer is not None and self._writer.cancel_requested)
            or (self.keeper is not None and self.keeper.cancel_requested)
        )


class LeaseClock:
    """When to renew a lease. By the local clock, which cannot lengthen it: the server's decides.

    Attributes:
        wait_s: Seconds until the next renewal.
        held_until: When the lease lapses unless it is renewed, in monotonic time.
    """

    __slots__ = ("_period_s", "_sent_at", "_ttl_s", "held_until", "wait_s")

    def __init__(self, lease_ttl_ms: int) -> None:
        self._ttl_s = lease_ttl_ms / 1000
        self._period_s = min(self._ttl_s * RENEW_AT, _LONGEST_PERIOD_S)
        self._sent_at = time.monotonic()
        self.wait_s = self._period_s
        self.held_until = self._sent_at + self._ttl_s

    @property
    def held(self) -> bool:
        return time.monotonic() < self.held_until

    def sending(self) -> None:
        """A renewal is about to be sent: no lease that it gets begins before."""
        self._sent_at = time.monotonic()

    def renewed(self) -> None:
        self.wait_s = self._period_s
        self.held_until = self._sent_at + self._ttl_s

    def failed(self, error: FFError) -> FFError | None:
        """A renewal failed; returns why the lease is gone, or None where it is to be tried again."""
        if is_lease_lost(error) or not error.retryable:
            return error
        if not self.held:
            return LeaseExpired("The lease could not be renewed before it lapsed.")
        self.wait_s = self._period_s / 4
        return None


def claim_arguments(
    lane: str,
    worker_id: str,
    worker_instance_id: str | None,
    capabilities: CapabilitySet | None,
    lease_ttl_ms: int,
) -> dict[str, Any]:
    """Return what a worker calls `claim` with."""
    return {
        "lane": lane,
        "worker_id": worker_id,
        "worker_instance_id": worker_instance_id or f"{socket.gethostname()}-{os.getpid()}",
        "capabilities": capabilities,
        "lease_ttl_ms": lease_ttl_ms,
        "policy": ClaimPolicy.with_max_wait(CLAIM_WAIT_S),
    }


# -- signals of the process --------------------------------------------------------------------------------------


_NUMBERS = (signal.SIGTERM, signal.SIGINT)
_stops: list[Callable[[], None]] = []
_before: dict[int, Any] = {}
_interrupted = False


def on_stop_signals(stop: Callable[[], None]) -> Callable[[], None]:
    """Call *stop* on SIGTERM and SIGINT, until what is returned is called. In the main thread; elsewhere, do nothing.

    Several workers of one loop share the signals. A second SIGINT does what the first would have done without workers.

    Args:
        stop: Called in the signal handler, in the middle of anything: it must take no lock.
    """
    if threading.current_thread() is not threading.main_thread():
        return lambda: None
    global _interrupted  # noqa: PLW0603 - signals belong to the process
    if not _stops:
        _interrupted = False
        for number in _NUMBERS:
            before = signal.signal(number, _stop_all)
            # None: whoever set it was not Python, and cannot be put back.
            _before[number] = signal.SIG_DFL if before is None else before
    _stops.append(stop)

    def restore() -> None:
        _stops.remove(stop)
        if _stops:
            return
        for number in _NUMBERS:
            before = _before.pop(number)
            # What a handler has set in the meantime is its own.
            if signal.getsignal(number) is _stop_all:
                signal.signal(number, before)

    return restore


def _stop_all(number: int, frame: FrameType | None) -> None:
    global _interrupted  # noqa: PLW0603
    before = _before.get(number)
    if number == signal.SIGINT:
        if _interrupted and callable(before):
            before(number, frame)
            return
        _interrupted = True
    for stop in tuple(_stops):
        stop()
