"""Workers without I/O: from a claimed execution to its end.

:func:`attend` decides and yields actions; a shell performs them.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Callable, Generator
from typing import (
    TYPE_CHECKING,
    Any,
    Concatenate,
    Generic,
    NamedTuple,
    ParamSpec,
    Protocol,
    TypeVar,
)

from ff_fast import keys
from ff_fast._core import operations, ops
from ff_fast._core.binding import dressed
from ff_fast._core.durability import STORED, can_reach
from ff_fast._core.leases import is_ended_by_plan, is_lease_lost, say_lost
from ff_fast._core.ready import with_hints
from ff_fast._core.stats import counting
from ff_fast._core.steps import Step, Steps, command
from ff_fast._core.writer import WriterState, continue_writer
from ff_fast._hot.writer import WriterCore
from ff_fast._log import say, say_seldom
from ff_fast.errors import (
    AuthenticationFailed,
    ClusterModeRequired,
    DeploymentMismatch,
    ExecutionSuspended,
    FFError,
    ForkedClient,
    FramesLost,
    InvalidType,
    LeaseExpired,
    LibraryMismatch,
    NotReplicated,
    Outcome,
    SequenceGap,
    StaleOwner,
    StateLost,
    TlsFailed,
    UnsupportedServer,
    WriterSuperseded,
    WrongLoop,
)
from ff_fast.types import (
    FailureClass,
    FailureReason,
    HandleKind,
    payload_bytes,
)

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from ff_fast._core.deployment import Deployment
    from ff_fast._core.durability import Level
    from ff_fast._core.operations import Call
    from ff_fast._core.traces import Tracing
    from ff_fast.types import Handle, ResumeSignal, StreamMode

HAND_BACK_S = 2.0
"""Longest time, in seconds, for an interrupted worker to store its frames and hand the execution back."""

END_AGAIN_S = 0.25
"""Pause, in seconds, before a worker retries to end an execution that it holds."""

CANCEL_REASON = "the worker was asked to stop"

STOPPED = "The worker was stopped, and has handed the execution back."

_LONGEST_MESSAGE = 4_096

_MOST_CAUSES = 1_000
"""Most errors that are looked at in the groups and causes of a handler's exception."""


class TaskReleased(BaseException):
    """Leaves a handler whose lease was released by ``suspend``, ``delay`` or ``wait_children``. Do not catch it.

    The handler is called again when the execution continues.
    """


class TaskFailed(Exception):  # noqa: N818 - what the handler reports
    """Raise it in a handler to end the attempt as failed, with a class that decides about retries.

    Args:
        reason: Text, of which 4096 bytes are kept, or a ``FailureReason``.
        failure_class: Kind of failure.
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
    """Arguments of `fail`."""

    reason: FailureReason
    failure_class: FailureClass


def _clean(text: str) -> str:
    """Return *text* as a valid message: UTF-8, and cut to the longest one."""
    return text.encode("utf-8", "replace")[:_LONGEST_MESSAGE].decode("utf-8", "ignore")


def failure_of(error: BaseException) -> Failure:
    """Return the failure for an exception of a handler.

    A ``TaskFailed`` says its class. An :class:`FFError` that is a refusal for good is permanent, since a retry would meet
    it again. Both also count in an exception group, and as the cause of another exception. All else is transient.
    """
    deciding = None
    for found in _speaking_for_themselves(error):
        if isinstance(found, TaskFailed):
            failure = Failure(found.reason, found.failure_class)
        elif is_for_good(found):
            text = _said(found) if found is error else f"{_said(error)}: {_said(found)}"
            failure = Failure(FailureReason(message=_clean(text)), FailureClass.PERMANENT)
        else:
            continue
        if deciding is None or deciding.failure_class is not FailureClass.PERMANENT:
            deciding = failure
    return deciding or Failure(FailureReason(message=_clean(_said(error))), FailureClass.TRANSIENT)


def _speaking_for_themselves(error: BaseException) -> Generator[TaskFailed | FFError, None, None]:
    """Yield each ``TaskFailed`` and ``FFError`` among an exception, the members of its groups, and their causes."""
    stack, seen = [error], 0
    while stack and seen < _MOST_CAUSES:
        found = stack.pop()
        seen += 1
        if isinstance(found, TaskFailed | FFError):
            yield found
            continue
        if found.__cause__ is not None:
            stack.append(found.__cause__)
        if isinstance(found, BaseExceptionGroup):
            stack.extend(reversed(found.exceptions))


def _said(error: BaseException) -> str:
    name = type(error).__name__
    try:
        return f"{name}: {error}"
    except Exception:  # noqa: BLE001 - str() of the error runs the handler's code
        return name


# These concern the connection, the deployment, or this process: every call of the worker meets them.
_ENDS_WORKER = (
    AuthenticationFailed,
    TlsFailed,
    ClusterModeRequired,
    LibraryMismatch,
    UnsupportedServer,
    DeploymentMismatch,
    ForkedClient,
    WrongLoop,
)


# Another attempt has another lease and another stream.
_OF_ATTEMPT = (
    StaleOwner,
    StateLost,
    LeaseExpired,
    ExecutionSuspended,
    WriterSuperseded,
    SequenceGap,
    FramesLost,
)


def is_for_good(error: FFError) -> bool:
    """Return whether the same call, made again by another attempt, would be refused again.

    Not so: what ends a worker, since another worker may pass; a lost lease, or a stream that lost frames, since a new
    attempt has its own; and an answer that is malformed, since what was done is unknown. That an execution is not there
    or has ended is for good: it is another one, as the server would refuse to end the handler's own.
    """
    return not (
        error.retryable
        or type(error).outcome is Outcome.UNKNOWN
        or isinstance(error, (*_OF_ATTEMPT, *_ENDS_WORKER))
    )


def result_of(value: object) -> bytes:
    """Return a handler's result as bytes; None gives an empty result.

    Raises:
        TaskFailed: It is neither None, bytes nor text. The failure is permanent, as a retry would return the same.
    """
    if value is None:
        return b""
    try:
        return payload_bytes(value, "The result of a handler")
    except FFError as error:
        refused = TaskFailed(str(error))
    raise refused


def is_release(error: BaseException) -> bool:
    """Return whether an error is a :class:`TaskReleased`, or a group of them, as a handler's task group raises it."""
    if isinstance(error, BaseExceptionGroup):
        return all(is_release(inner) for inner in error.exceptions)
    return isinstance(error, TaskReleased)


class _ReportsCancel(Protocol):
    """A writer or a lease keeper: the server tells it of a requested cancellation."""

    @property
    def cancel_requested(self) -> bool: ...


class _Writer(_ReportsCancel, Protocol):
    """A writer."""

    @property
    def error(self) -> FFError | None: ...


class _HoldsLease(_ReportsCancel, Protocol):
    """A lease keeper."""

    @property
    def held(self) -> bool: ...

    @property
    def error(self) -> FFError | None: ...

    def _ask_to_stop(self) -> None: ...

    def _wake(self) -> None: ...


P = ParamSpec("P")
T = TypeVar("T")
W = TypeVar("W", bound=_Writer)
K = TypeVar("K", bound=_HoldsLease)


def forwarded(
    method: Callable[Concatenate[Any, P], T],
) -> Callable[Concatenate[TaskState[Any, Any], P], T]:
    """Return a task's method that calls the same method of its writer."""
    name = method.__name__

    def forward(self: TaskState[Any, Any], /, *args: P.args, **kwargs: P.kwargs) -> T:
        result: T = getattr(self.writer, name)(*args, **kwargs)
        return result

    return dressed("Task", forward, method)


TASK = """One claimed execution, the argument of a handler.

    Attributes:
        handle: Its handle.
        execution_id: Its id.
        attempt_index: Its attempt, from 0.
        resumed: Whether it continues after a suspension, a delay, waiting for children, or a lost worker.
        payload: Its input, as passed to `create_execution`.
        signals: The signals that ended its last suspension.
        handler: Name of the handler that it was created for; None without one, and with a plain function as handler.
        context: What the lifespan of its worker has yielded; None without one.
    """


class Holder(Generic[W, K]):
    """Somebody who holds a lease and its writer, and ends the execution.

    Attributes:
        execution_id: Id of the execution.
    """

    def __init__(self, execution_id: str, level: Level) -> None:
        self.execution_id = execution_id
        self._level = level
        self._keeper: K | None = None
        self._current_writer: W | None = None
        self._released = False
        # With what it was taken from its handler, which may still run.
        self._taken: FFError | None = None

    @property
    def _lost(self) -> FFError | None:
        """With what the lease was lost: nothing more can be written."""
        if self._taken is not None:
            return self._taken
        return None if self._keeper is None else self._keeper.error

    @property
    def _reaching(self) -> dict[str, Any]:
        """The level that the end of the task, and all before it, shall reach."""
        return {
            "durability": self._level.durability,
            "durability_timeout": self._level.timeout_s,
        }

    @property
    def _holds_lease(self) -> bool:
        """Whether this task still owns the execution, as far as the process knows."""
        if self._released or self._taken is not None:
            return False
        return self._keeper is None or self._keeper.held

    @property
    def _known_loss(self) -> FFError | None:
        """With what the lease is lost as far as the holder can see: what it ends then may be a part."""
        return self._lost if not (self._holds_lease or self._released) else None

    @property
    def _told_writer(self) -> FFError | None:
        """What has told the writer, maybe before the keeper, that the lease is lost or the execution has ended."""
        error = None if self._current_writer is None else self._current_writer.error
        if error is None or isinstance(error, (WriterSuperseded, StateLost)):
            return None
        return error if is_lease_lost(error) else None

    @property
    def _may_end(self) -> bool:
        """Whether the server may accept an end. A refused renewal leaves the lease as it is until it lapses."""
        return self._holds_lease or (
            not self._released and self._lost is not None and not is_lease_lost(self._lost)
        )

    @property
    def _cancel_requested(self) -> bool:
        """Whether a cancellation is requested; every push, append and renewal may say so."""
        return (self._current_writer is not None and self._current_writer.cancel_requested) or (
            self._keeper is not None and self._keeper.cancel_requested
        )


class TaskState(Holder[W, K]):
    """The part of a task that is the same in both shells."""

    def __init__(
        self,
        backend: Any,
        handle: Handle,
        mode: StreamMode | None = None,
        level: Level = STORED,
        worker_id: str | None = None,
    ) -> None:
        fields = handle.fields()
        super().__init__(fields.execution_id, level)
        self._backend = backend
        self.handle = handle
        self._mode = mode
        self._worker_id = worker_id
        # The span of whoever created the execution, and that of the attempt; None without traces.
        self._traceparent: str | None = None
        self._span: Any = None
        self.attempt_index = fields.attempt_index
        self.resumed = handle.kind is HandleKind.RESUMED
        self.payload: bytes = b""
        self.signals: tuple[ResumeSignal, ...] = ()
        self.handler: str | None = None
        self.context: Any = None
        self._named = False

    @property
    def _about(self) -> dict[str, Any]:
        """What a record about it has."""
        return {
            "execution_id": self.execution_id,
            "attempt_index": self.attempt_index,
            "worker_id": self._worker_id,
        }

    @property
    def _writing(self) -> dict[str, Any]:
        """What the task's writers are opened with."""
        return {"mode": self._mode, **self._reaching}

    @property
    def writer(self) -> W:
        """The writer of the attempt.

        Raises:
            FFError: The lease is gone.
        """
        if self._lost is not None:
            raise copy.copy(self._lost)
        assert self._current_writer is not None
        return self._current_writer

    write = forwarded(WriterCore.write)

    def _take(self) -> None:
        """Take the execution from its handler: it hears of a lost lease, and its end is not that of the attempt."""
        self._taken = StaleOwner(STOPPED)
        if self._keeper is not None:
            self._keeper._wake()

    @property
    def cancelled(self) -> bool:
        """Whether the handler should stop: a cancellation is requested, the lease is lost, or the backend is closed."""
        return self._cancel_requested or not self._holds_lease

    @property
    def lost(self) -> bool:
        """Whether the lease is lost, or the backend is closed: nothing can be written, and the result is discarded."""
        return not self._holds_lease and not self._released


# -- from a claim to an end --------------------------------------------------------------------------------------------


class Run(NamedTuple):
    """Make a call, and resume with its result."""

    call: Call[Any]


class UseWriter(NamedTuple):
    """Make the task's writer from its state."""

    state: WriterState


class CallHandler(NamedTuple):
    """Call the handler, and resume with :class:`Returned`, :class:`Raised` or :class:`Stopped`.

    Attributes:
        cancel_after_s: Cancel the handler so many seconds after a cancellation was requested, and at once when the lease
            is lost; each once. None leaves it alone.
    """

    cancel_after_s: float | None = None


class CloseWriter(NamedTuple):
    """Store everything that was written, and close the task's writer; *timeout_s* bounds the wait.

    Its durability is not waited for: that of the end covers it.
    """

    timeout_s: float | None = None


class WaitLost(NamedTuple):
    """Wait until the lease is lost, at most *seconds*."""

    seconds: float


class Returned(NamedTuple):
    """The handler has returned."""

    value: object


class Raised(NamedTuple):
    """The handler has raised an error that fails its attempt, and does not end the worker."""

    error: BaseException


class Stopped(NamedTuple):
    """The handler was cancelled, as its :class:`CallHandler` says, and has ended with that."""


Action = Run | UseWriter | CallHandler | CloseWriter | WaitLost
Actions = Generator[Action, Any, bool]
Ending = Generator[Action, Any, None]


class Backend(Protocol):
    """A backend, as far as a worker needs it."""

    @property
    def closed(self) -> bool: ...

    @property
    def _deployment(self) -> Deployment: ...


def attend(
    backend: Backend,
    task: TaskState[Any, Any],
    cancel_after_s: float | None = None,
) -> Actions:
    """Call the handler for one claimed execution, and end the execution by the handler's result or exception.

    After an interrupt, an exit or a defect the execution is handed back to other workers, and the error is raised. So is
    an error that every call of the worker would meet. Any other error fails the execution alone.

    Returns:
        Whether the execution is over for this worker. If not, the server has refused each end, the execution comes back
        when its lease lapses, and the worker should pause.
    """
    try:
        try:
            yield from _load(backend._deployment, task)
        except FFError as error:
            return (yield from _not_started(backend, task, error))
        if backend._deployment.tracing is None:
            yield from _handle(backend, task, cancel_after_s)
        else:
            with _span(backend._deployment.tracing, task) as task._span:
                yield from _traced(_handle(backend, task, cancel_after_s), backend, task)
    except _NotEnded:
        return False
    except GeneratorExit:
        raise
    except BaseException as error:
        yield from hand_back(backend, task, error)
        raise
    return True


def _span(tracing: Tracing, task: TaskState[Any, Any]) -> AbstractContextManager[Any]:
    """Return the span of an attempt, which is the current one in its block."""
    lane = task.handle.fields().lane_id
    return tracing.attempt(lane, task.execution_id, task.attempt_index, task._traceparent)


def _traced(steps: Ending, backend: Backend, task: TaskState[Any, Any]) -> Ending:
    """Note in the span of an attempt what breaks it off."""
    try:
        yield from steps
    except (GeneratorExit, _NotEnded):
        raise
    except BaseException as error:
        _trace_failed(backend, task, error)
        raise


def _trace_failed(backend: Backend, task: TaskState[Any, Any], error: BaseException) -> None:
    """Note in the span of an attempt that it has failed; its first error counts, and an end that was asked for is none."""
    if task._cancel_requested or (isinstance(error, FFError) and is_ended_by_plan(error)):
        return
    span, task._span = task._span, None
    if span is not None and backend._deployment.tracing is not None:
        backend._deployment.tracing.failed(span, error)


class _NotEnded(Exception):  # noqa: N818 - no fault of the worker
    """The server refuses for good to end the execution in any way; its lease lapses."""


def _not_started(backend: Backend, task: TaskState[Any, Any], error: FFError) -> Actions:
    """Fail an execution that cannot be loaded, or hand it back where the server's state is at fault."""
    if is_lease_lost(error):
        if not is_ended_by_plan(error):
            say_lost(error, **task._about)
        return True
    if isinstance(error, _ENDS_WORKER):
        raise error
    if error.retryable:
        return (yield from hand_back(backend, task, error))
    yield from _fail(
        backend, task, failure_of(error)._replace(failure_class=FailureClass.PERMANENT)
    )
    return True


def _load(on: Deployment, task: TaskState[Any, Any]) -> Ending:
    """Read the task's payload and signals and open its writer, in one round trip."""
    request = operations.open_writer(on, task.handle, **task._writing)
    attempt = ops.Attempt.of(task.handle)
    writer_id = ops.writer_id(attempt)
    opening = ops.open_writer(
        attempt, writer_id, max_payload_bytes=request.options.max_payload_bytes
    )
    reading = ops.read_input(task.execution_id)
    renewing = ops.renew_lease(attempt, attempt.fields.lease_ttl_ms)
    observing = ops.observe_signals(attempt)

    def steps() -> Steps[WriterState]:
        yield from can_reach(task._level.durability, keys.slot_tag_of(task.execution_id))
        commands = [reading.command(), opening.command()]
        if task.resumed or task.attempt_index > 0:
            # A cancellation that was requested of an earlier lease still holds, and no push tells this one of it.
            commands.append(renewing.command())
        if task.resumed:
            commands.append(observing.command())
        if task._named:
            core = keys.core(task.execution_id)
            commands.append(command(b"HGET", core, b"required_capabilities"))
        replies = yield Step(commands, large=True)
        if task._named:
            required = replies.pop()
            if isinstance(required, bytes):
                task.handler = keys.handler_in(required.decode("utf-8", "replace").split(","))
        task.payload, task._traceparent = reading.answer(replies[0])
        opened = opening.answer(replies[1])
        if len(replies) > 2:
            renewal = renewing.answer(replies[2])
            if renewal.cancel_requested and task._keeper is not None:
                task._keeper._ask_to_stop()
        if task.resumed:
            signals, following = observing.answer(replies[3])
            task.signals = signals + (yield from ops.further_signals(attempt, following))
        return (yield from continue_writer(attempt, writer_id, opened, request.options, on.places))

    yield UseWriter((yield Run(operations.Call(steps))))


def _handle(backend: Backend, task: TaskState[Any, Any], cancel_after_s: float | None) -> Ending:
    ended: Returned | Raised | Stopped = yield CallHandler(cancel_after_s)
    if isinstance(ended, Stopped):
        # Where the server may still accept an end, it gets the reason.
        ended = Raised(task._lost or TaskFailed(CANCEL_REASON, FailureClass.CANCELLED))
    if isinstance(ended, Raised):
        if not (task._released and is_release(ended.error)):
            yield from _failed(backend, task, ended.error)
        return
    try:
        result = result_of(ended.value)
        # The server may not know of the loss: it has renewed the lease, and the answer was late.
        lost = task._known_loss
        yield CloseWriter()
        if lost is not None:
            raise copy.copy(lost)
    except Exception as error:  # noqa: BLE001 - the attempt ends with it
        yield from _failed(backend, task, error)
        return
    if task._cancel_requested:
        yield from _cancel(backend, task)
        return
    try:
        call = operations.complete(backend._deployment, task.handle, result, **task._reaching)
        yield from _end(backend, task, call)
    except FFError as error:
        if isinstance(error, _ENDS_WORKER):
            raise
        # The server rejects this result whatever we do, for instance because it is too large.
        yield from _failed(backend, task, error)


def _say_raised(task: TaskState[Any, Any], error: BaseException) -> None:
    """Say with which exception an attempt ends; one that was asked to stop, or has lost its lease, ends as it must."""
    expected = task._cancel_requested or not task._holds_lease or task._told_writer is not None
    say(
        logging.DEBUG if expected else logging.ERROR,
        "Attempt %d of execution %s has raised %s.",
        task.attempt_index,
        task.execution_id,
        type(error).__name__,
        raised=error,
        **task._about,
    )


def _failed(backend: Backend, task: TaskState[Any, Any], error: BaseException) -> Ending:
    _say_raised(task, error)
    _trace_failed(backend, task, task._lost or task._told_writer or error)
    # An error of the writer must not replace the handler's own failure.
    with contextlib.suppress(FFError):
        yield CloseWriter()
    if task._cancel_requested:
        # The handler failed because it was asked to stop: cancel, so that no retry follows.
        yield from _cancel(backend, task)
    else:
        yield from _fail(backend, task, failure_of(error))


def _fail(backend: Backend, task: TaskState[Any, Any], failure: Failure) -> Ending:
    try:
        call = operations.fail(backend._deployment, task.handle, *failure, **task._reaching)
        yield from _end(backend, task, call)
    except FFError as error:
        if isinstance(error, _ENDS_WORKER):
            raise
        say_seldom(
            logging.ERROR,
            "end",
            error.code,
            "Execution %s cannot be ended, and comes back when its lease lapses: %s",
            task.execution_id,
            error,
            **task._about,
        )
        raise _NotEnded from None


def _cancel(backend: Backend, task: TaskState[Any, Any]) -> Ending:
    try:
        call = cancellation(backend._deployment, task.execution_id, task.handle, task._level)
        yield from _end(backend, task, call)
    except FFError as error:
        if isinstance(error, _ENDS_WORKER):
            raise
        # The class keeps it from being retried, as a cancellation does.
        yield from _fail(backend, task, Failure(failure_of(error).reason, FailureClass.CANCELLED))


def cancellation(
    on: Deployment, eid: str, handle: Handle, level: Level, unasked: str = CANCEL_REASON
) -> Call[Any]:
    """Return the call with which the holder of a lease ends the execution as cancelled.

    Args:
        on: The deployment.
        eid: Id of the execution.
        handle: The lease.
        level: What the end shall reach.
        unasked: The reason, where nobody has requested the cancellation.
    """

    def steps() -> Steps[object]:
        on.releases(handle.fields().lease_id)
        reason = unasked
        try:
            description = yield from ops.call(ops.describe_execution(eid))
        except FFError as error:
            if error.retryable or is_lease_lost(error):
                raise
        else:
            reason = description.cancellation_reason or reason
        op = ops.cancel_execution(eid, reason, 0, handle.fields().lease_id)
        cancelled = yield from with_hints(op, keys.partition_index(eid))
        reach = operations.Reach(lambda _: op, *level)
        yield from counting(on.tally, "executions_cancelled", reach.steps)()
        return cancelled

    return operations.Call(steps)


def _end(backend: Backend, task: TaskState[Any, Any], call: Call[Any]) -> Ending:
    """End the execution; while the lease is held, retry until the server is reachable again.

    Raises:
        FFError: The server refuses this end for good.
    """
    while task._may_end and not backend.closed:
        try:
            yield Run(call)
        except NotReplicated as error:
            say_seldom(
                logging.WARNING,
                "end",
                error.code,
                "Execution %s has ended. %s",
                task.execution_id,
                error,
                **task._about,
            )
            return
        except FFError as error:
            if is_lease_lost(error) or (error.retryable and not task._holds_lease):
                if task._lost is None and not is_ended_by_plan(error):
                    say_lost(error, **task._about)
                _trace_failed(backend, task, error)
                return
            if not error.retryable:
                raise
            yield WaitLost(END_AGAIN_S)
        else:
            return
    if task._lost is not None:
        _trace_failed(backend, task, task._lost)


def hand_back(backend: Backend, task: TaskState[Any, Any], error: BaseException) -> Actions:
    """Make the execution claimable now, not when its lease lapses; it counts as a lost worker. Return whether it is."""
    if task._released or backend.closed:
        return False
    # Before its writer is closed, which a handler that still runs would take for an error of its own, or for its end.
    task._take()
    say_seldom(
        logging.WARNING,
        "broken off",
        # What stops a worker, or keeps it from its server, meets all its handlers.
        type(error).__name__,
        "Attempt %d of execution %s was broken off by %s; the execution goes to another worker.",
        task.attempt_index,
        task.execution_id,
        type(error).__name__,
        **task._about,
    )
    with contextlib.suppress(FFError, TimeoutError):
        with contextlib.suppress(FFError):
            yield CloseWriter(HAND_BACK_S)
        reason = failure_of(error).reason
        yield Run(
            operations.fail(backend._deployment, task.handle, reason, FailureClass.INFRA_CRASH)
        )
        return True
    return False


def is_handlers_own(error: BaseException) -> bool:
    """Return whether an error raised by a handler concerns its attempt alone; any other error ends the worker."""
    if isinstance(error, BaseExceptionGroup):
        return all(is_handlers_own(inner) for inner in error.exceptions)
    return isinstance(error, Exception | TaskReleased)
