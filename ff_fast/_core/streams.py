"""Named streams without I/O: what an opened one is, and how it ends.

The functions that end one yield actions of :mod:`ff_fast._core.worker`; a shell performs them.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import time
from typing import TYPE_CHECKING, Any, Concatenate, Generic, Literal, ParamSpec, TypeVar

from ff_fast._core import operations, ops
from ff_fast._core.binding import dressed
from ff_fast._core.leases import is_lease_lost
from ff_fast._core.worker import (
    END_AGAIN_S,
    HAND_BACK_S,
    Action,
    Backend,
    CloseWriter,
    Ending,
    Failure,
    Holder,
    K,
    Run,
    W,
    WaitLost,
    cancellation,
    failure_of,
)
from ff_fast._log import say_seldom
from ff_fast.errors import ExecutionNotActive, FFError, InvalidInput, NotReplicated
from ff_fast.types import FailureClass

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from ff_fast._core.durability import Level
    from ff_fast.types import ExecutionState, FailOutcome, FailureReason, Handle

P = ParamSpec("P")
T = TypeVar("T")

CANCEL_REASON = "the producer was cancelled"

_CONSUMER = (
    "Somebody else produces this stream: only where `role` is producer it can be written and ended."
)

_ENDED: frozenset[ExecutionState] = frozenset({"cancelled", "completed"})
_RELEASED: frozenset[ExecutionState] = frozenset(
    {"waiting", "delayed", "waiting_children", "suspended", "failed"}
)
"""States into which nobody but the holder of its lease moves the attempt of a named stream, by a call with the handle."""


OPENED_STREAM = """A named stream, as `open_stream` opens it: a context manager.

    Leaving the block of a producer stores all frames and completes the stream; it raises what keeps that from being done.
    An exception of the block fails the stream, with its type and text as the reason. An ``asyncio.CancelledError``, an
    interrupt, an exit and a ``GeneratorExit`` cancel it. A stream that somebody has cancelled ends as cancelled, whatever
    the block does, and one whose lease was released by a call with its ``handle`` as that call has said. For a consumer, leaving does nothing. A producer that is dropped without leaving its block, or that
    cannot reach the server, is lost when its lease lapses.

    Attributes:
        role: ``producer`` or ``consumer``.
        execution_id: Id of the execution.
        handle: The lease, for the calls that take a handle; None for a consumer.
    """


class StreamState(Holder[W, K], Generic[W, K]):
    """The part of a named stream that is the same in both shells."""

    def __init__(
        self, backend: Backend, execution_id: str, handle: Handle | None, level: Level
    ) -> None:
        super().__init__(execution_id, level)
        self._backend = backend
        self.handle = handle
        self.role: Literal["producer", "consumer"] = "consumer" if handle is None else "producer"

    def __repr__(self) -> str:
        return f"{type(self).__name__}(role={self.role!r}, execution_id={self.execution_id!r})"

    def _check_producer(self) -> None:
        if self.handle is None:
            raise InvalidInput(_CONSUMER)

    @property
    def _lease(self) -> Handle:
        assert self.handle is not None
        return self.handle

    @property
    def _kept(self) -> K:
        """The keeper of the lease.

        Raises:
            InvalidInput: This is a consumer.
        """
        self._check_producer()
        assert self._keeper is not None
        return self._keeper

    @property
    def writer(self) -> W | None:
        """The writer; None for a consumer."""
        return self._current_writer

    @property
    def cancelled(self) -> bool:
        """Whether the producer should stop: a cancellation is requested, the lease is lost, or the backend is closed.

        Always False for a consumer.
        """
        return self.handle is not None and (
            self._cancel_requested or not (self._holds_lease or self._released)
        )

    @property
    def _producing(self) -> W:
        """The writer.

        Raises:
            InvalidInput: This is a consumer.
            FFError: The lease is gone.
        """
        self._check_producer()
        assert self._current_writer is not None
        if self._lost is not None:
            raise copy.copy(self._lost)
        return self._current_writer


def of_writer(
    method: Callable[Concatenate[Any, P], T],
) -> Callable[Concatenate[StreamState[Any, Any], P], T]:
    """Return a stream's method that calls the same method of its writer."""
    name = method.__name__

    def forward(self: StreamState[Any, Any], /, *args: P.args, **kwargs: P.kwargs) -> T:
        result: T = getattr(self._producing, name)(*args, **kwargs)
        return result

    return dressed("OpenedStream", forward, method)


def complete(stream: StreamState[Any, Any], payload: bytes | str | None = None) -> Ending:
    """Store all frames, and complete the stream with *payload* as its result. Leaving the block does nothing more.

    A stream that somebody has cancelled, or asked to be, ends as cancelled all the same.

    Args:
        payload: Result, at most 16 MiB; None for none.

    Raises:
        InvalidInput: This is a consumer.
        FFError: It is not complete: the lease is lost, or frames are. While the lease is held it has failed for that.
    """
    stream._check_producer()
    return _completed(stream, b"" if payload is None else payload)


def fail(
    stream: StreamState[Any, Any],
    reason: FailureReason | str,
    failure_class: FailureClass = FailureClass.PERMANENT,
) -> Generator[Action, Any, FailOutcome]:
    """Store all frames, and end the stream as failed. Leaving the block does nothing more.

    An ``INFRA_CRASH`` hands the stream to whoever opens its name next, as if its producer had died.

    Args:
        reason: Text of at most 64 KiB, or a ``FailureReason``.
        failure_class: Kind of failure.

    Returns:
        Whether another producer may go on.

    Raises:
        InvalidInput: This is a consumer.
        FFError: The lease is lost, or the server cannot be reached.
    """
    stream._check_producer()
    call = operations.fail(
        stream._backend._deployment, stream._lease, reason, failure_class, **stream._reaching
    )
    return _failed_by(stream, call)


def limit_s(error: BaseException | None) -> float | None:
    """Return how long leaving a block by *error* may take: who interrupts it waits for it."""
    return None if error is None or isinstance(error, Exception) else HAND_BACK_S


def left(stream: StreamState[Any, Any], error: BaseException | None) -> Ending:
    """End a stream whose block was left, by *error* or without one.

    Raises:
        FFError: The block was left without an error, and the stream cannot be completed.
    """
    if stream.handle is None or stream._released:
        return
    if error is None:
        yield from _completed(stream, over=_ENDED | _RELEASED)
        return
    try:
        if isinstance(error, Exception):
            yield from _failed(stream, failure_of(error))
        else:
            yield from _cancelled(stream, HAND_BACK_S / 2)
    except (FFError, TimeoutError) as refused:
        # The error of the block is the cause. A stream whose lease is lost is somebody else's.
        if not (isinstance(refused, FFError) and is_lease_lost(refused)):
            say_seldom(
                logging.WARNING,
                "stream",
                type(refused).__name__,
                "The stream of execution %s was not ended: %s",
                stream.execution_id,
                refused,
                execution_id=stream.execution_id,
            )


def _completed(
    stream: StreamState[Any, Any],
    payload: bytes | str = b"",
    over: frozenset[ExecutionState] = _ENDED,
) -> Ending:
    # What is no result is refused before anything is done.
    call = operations.complete(
        stream._backend._deployment, stream._lease, payload, **stream._reaching
    )
    return _completed_by(stream, call, over)


def _completed_by(
    stream: StreamState[Any, Any], call: operations.Call[None], over: frozenset[ExecutionState]
) -> Ending:
    # The server may not know of the loss: it has renewed the lease, and the answer was late.
    lost_before = stream._known_loss
    try:
        yield CloseWriter()
        if lost_before is not None:
            raise copy.copy(lost_before)
        if stream._cancel_requested:
            yield from _cancelled(stream)
            return
        yield from _over(stream, call)
    except FFError as error:
        # Also the end that this call has made, and whose reply was lost, shows as a lease that is lost.
        lost = is_lease_lost(error) or not stream._holds_lease
        if lost and (_told_of_cancellation(stream) or (yield from _is_over(stream, over))):
            stream._released = True
            return
        with contextlib.suppress(FFError):
            if stream._may_end:
                yield from _failed(stream, failure_of(error))
        raise


def _over(
    stream: StreamState[Any, Any],
    call: operations.Call[T],
    limit_s: float | None = None,
) -> Generator[Action, Any, T]:
    """Make the call that ends a stream; while the lease is held, until the server is reachable again.

    Raises:
        FFError: The server has refused it, or could not be reached in time.
    """
    until = float("inf") if limit_s is None else time.monotonic() + limit_s
    while True:
        try:
            value: T = yield Run(call)
        except NotReplicated:
            # It is applied.
            stream._released = True
            raise
        except FFError as error:
            if (
                not error.retryable
                or not stream._holds_lease
                or stream._backend.closed
                or time.monotonic() >= until
            ):
                raise
            yield WaitLost(END_AGAIN_S)
        else:
            stream._released = True
            return value


def _failed_by(
    stream: StreamState[Any, Any], call: operations.Call[FailOutcome]
) -> Generator[Action, Any, FailOutcome]:
    # An error of the writer does not keep the stream from being failed.
    with contextlib.suppress(FFError):
        yield CloseWriter()
    return (yield from _over(stream, call))


def _failed(stream: StreamState[Any, Any], failure: Failure) -> Ending:
    if stream._cancel_requested:
        yield from _cancelled(stream)
    else:
        yield from _failed_by(
            stream,
            operations.fail(
                stream._backend._deployment, stream._lease, *failure, **stream._reaching
            ),
        )


def _cancelled(stream: StreamState[Any, Any], limit_s: float | None = None) -> Ending:
    with contextlib.suppress(FFError):
        yield CloseWriter(limit_s)
    on = stream._backend._deployment
    call = cancellation(on, stream.execution_id, stream._lease, stream._level, CANCEL_REASON)
    yield from _over(stream, call, limit_s)


def _told_of_cancellation(stream: StreamState[Any, Any]) -> bool:
    """Whether the server has said that somebody has cancelled it; it may have been removed since."""
    lost = stream._lost
    return isinstance(lost, ExecutionNotActive) and lost.terminal_outcome == "cancelled"


def _is_over(
    stream: StreamState[Any, Any], over: frozenset[ExecutionState]
) -> Generator[Action, Any, bool]:
    """Whether the execution is in one of these states, and has no later attempt."""
    state: ops.State | None = None
    with contextlib.suppress(FFError):
        call = operations.Call(lambda: ops.call(ops.read_state(stream.execution_id)), writes=False)
        state = yield Run(call)
    if state is None or state.state not in over:
        return False
    return state.state == "cancelled" or state.attempt_index == stream._lease.attempt_index
