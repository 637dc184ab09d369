"""Workers without I/O: what to do with a claimed execution, when to renew its lease, and what a handler's end means.

:func:`attend` decides; it yields actions, and a shell performs them.
"""

from __future__ import annotations

import contextlib
import copy
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
from ff_fast._core.leases import is_lease_lost
from ff_fast._core.ready import with_hints
from ff_fast._core.steps import Step, Steps
from ff_fast._core.writer import WriterState, continue_writer
from ff_fast._hot.writer import WriterCore
from ff_fast.errors import FFError, InvalidType
from ff_fast.types import (
    FailureClass,
    FailureReason,
    HandleKind,
    payload_bytes,
)

if TYPE_CHECKING:
    from ff_fast._core.deployment import Deployment
    from ff_fast._core.operations import Call
    from ff_fast.types import Handle, ResumeSignal, StreamMode

HAND_BACK_S = 2.0
"""How long a worker that is interrupted takes to store what was written, and to hand the execution back."""

END_AGAIN_S = 0.25
"""How long a worker waits before it tries again to end an execution that it holds."""

CANCEL_REASON = "the worker was asked to stop"

_LONGEST_MESSAGE = 4_096


class TaskReleased(BaseException):
    """Raised inside a handler by ``suspend``, ``delay`` and ``wait_children``: the lease is released, and the handler is
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


def is_release(error: BaseException) -> bool:
    """Return whether an error is a :class:`TaskReleased`, or a group of nothing else, as a handler's own tasks make it."""
    if isinstance(error, BaseExceptionGroup):
        return all(is_release(inner) for inner in error.exceptions)
    return isinstance(error, TaskReleased)


class _Hears(Protocol):
    """What brings the news of a cancellation."""

    @property
    def cancel_requested(self) -> bool: ...


class _Keeps(_Hears, Protocol):
    """What knows whether the lease is held."""

    @property
    def held(self) -> bool: ...


P = ParamSpec("P")
T = TypeVar("T")
W = TypeVar("W", bound=_Hears)
K = TypeVar("K", bound=_Keeps)


def forwarded(
    method: Callable[Concatenate[Any, P], T],
) -> Callable[Concatenate[TaskState[Any, Any], P], T]:
    """Return the method of a task that calls a method of its writer."""
    name = method.__name__

    def forward(self: TaskState[Any, Any], /, *args: P.args, **kwargs: P.kwargs) -> T:
        result: T = getattr(self.writer, name)(*args, **kwargs)
        return result

    return dressed(forward, method)


TASK = """One execution, as a handler sees it.

    Attributes:
        handle: Its handle.
        execution_id: Its id.
        attempt_index: Which attempt this is, from 0.
        resumed: Whether the execution goes on after a suspension, a delay, waiting for children, or a lost worker.
        payload: Input that the execution was created with.
        signals: The signals that ended its last suspension.
    """


class TaskState(Generic[W, K]):
    """The part of a task that is the same in both shells."""

    def __init__(self, handle: Handle) -> None:
        fields = handle.fields()
        self.handle = handle
        self.execution_id = fields.execution_id
        self.attempt_index = fields.attempt_index
        self.resumed = handle.kind is HandleKind.RESUMED
        self.payload: bytes = b""
        self.signals: tuple[ResumeSignal, ...] = ()
        self._keeper: K | None = None
        self._current_writer: W | None = None
        self._lost: FFError | None = None
        self._released = False

    def _lose(self, error: FFError) -> None:
        """The lease is gone: whatever is written from here on is refused, at once."""
        self._lost = error

    @property
    def _holds_lease(self) -> bool:
        """Whether the execution is still this task's, as far as the process can know."""
        return not (
            self._released
            or self._lost is not None
            or (self._keeper is not None and not self._keeper.held)
        )

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

    @property
    def cancel_requested(self) -> bool:
        """Whether a cancellation was asked for; an append and a renewal bring the news."""
        return (self._current_writer is not None and self._current_writer.cancel_requested) or (
            self._keeper is not None and self._keeper.cancel_requested
        )


# -- from a claim to an end --------------------------------------------------------------------------------------------


class Run(NamedTuple):
    """Carry a call out, and resume with its value."""

    call: Call[Any]


class UseWriter(NamedTuple):
    """Make the task's writer from its state."""

    state: WriterState


class CallHandler(NamedTuple):
    """Call the handler, and resume with :class:`Returned` or :class:`Raised`."""


class CloseWriter(NamedTuple):
    """Store everything that was written, and close the task's writer; *timeout_s* bounds the wait."""

    timeout_s: float | None = None


class WaitLost(NamedTuple):
    """Wait until the lease is gone, but no longer than *seconds*."""

    seconds: float


class Returned(NamedTuple):
    """The handler has returned."""

    value: object


class Raised(NamedTuple):
    """The handler has raised an error that is its own, and no reason to end the worker."""

    error: BaseException


Action = Run | UseWriter | CallHandler | CloseWriter | WaitLost
Actions = Generator[Action, Any, None]


class Backend(Protocol):
    """What a worker has to know of its backend."""

    @property
    def closed(self) -> bool: ...

    @property
    def _deployment(self) -> Deployment: ...


def attend(backend: Backend, task: TaskState[Any, Any], mode: StreamMode | None) -> Actions:
    """Call the handler for one claimed execution, and end the execution as the handler ended.

    Errors that are not the handler's own (an interrupt, an exit, a defect) hand the execution back to other workers, and
    are raised.
    """
    try:
        try:
            yield from _load(backend._deployment, task, mode)
        except FFError as error:
            if is_lease_lost(error):
                return
            if not error.retryable:
                raise
            yield from _hand_back(backend, task, error)
        else:
            yield from _handle(backend, task)
    except GeneratorExit:
        raise
    except BaseException as error:
        yield from _hand_back(backend, task, error)
        raise


def _load(on: Deployment, task: TaskState[Any, Any], mode: StreamMode | None) -> Actions:
    """Read what the handler starts from and open its writer, in one round trip."""
    request = operations.open_writer(on, task.handle, mode=mode)
    attempt = ops.Attempt.of(task.handle)
    writer_id = ops.writer_id(attempt)
    opening = ops.open_writer(attempt, writer_id)
    reading = ops.read_payload(task.execution_id)
    observing = ops.observe_signals(attempt)

    def steps() -> Steps[WriterState]:
        commands = [reading.command(), opening.command()]
        if task.resumed:
            commands.append(observing.command())
        replies = yield Step(commands)
        task.payload = reading.answer(replies[0])
        opened = opening.answer(replies[1])
        if task.resumed:
            task.signals = observing.answer(replies[2])
        return (yield from continue_writer(attempt, writer_id, opened, request.options))

    yield UseWriter((yield Run(operations.Call(steps))))


def _handle(backend: Backend, task: TaskState[Any, Any]) -> Actions:
    end: Returned | Raised = yield CallHandler()
    if isinstance(end, Raised):
        if not (task._released and is_release(end.error)):
            yield from _failed(backend, task, end.error)
        return
    try:
        result = result_of(end.value)
        yield CloseWriter()
    except Exception as error:  # noqa: BLE001 - the attempt ends with it
        yield from _failed(backend, task, error)
        return
    if task.cancel_requested:
        yield from _end(backend, task, _cancellation(task))
        return
    try:
        call = operations.complete(backend._deployment, task.handle, result)
        yield from _end(backend, task, call)
    except FFError as error:
        # The server rejects this result whatever we do, for instance because it is too large.
        yield from _failed(backend, task, error)


def _failed(backend: Backend, task: TaskState[Any, Any], error: BaseException) -> Actions:
    # Frames that could not be stored are on the writer's error; the failure itself is what counts.
    with contextlib.suppress(FFError):
        yield CloseWriter()
    if task.cancel_requested:
        # Failed because it was to stop: it must not be tried again.
        yield from _end(backend, task, _cancellation(task))
    else:
        call = operations.fail(backend._deployment, task.handle, *failure_of(error))
        yield from _end(backend, task, call)


def _cancellation(task: TaskState[Any, Any]) -> Call[Any]:
    """Return the call that ends a task as cancelled, with the reason of whoever asked for it."""
    eid = task.execution_id

    def steps() -> Steps[object]:
        description = yield from ops.call(ops.describe_execution(eid))
        reason = description.cancellation_reason or CANCEL_REASON
        op = ops.cancel_execution(eid, reason, 0)
        return (yield from with_hints(op, keys.partition_index(eid)))

    return operations.Call(steps)


def _end(backend: Backend, task: TaskState[Any, Any], call: Call[Any]) -> Actions:
    """End the execution, as long as it is ours: what the handler did is not lost to a server that is away."""
    while task._holds_lease and not backend.closed:
        try:
            yield Run(call)
        except FFError as error:
            if is_lease_lost(error):
                return
            if not error.retryable:
                raise
            yield WaitLost(END_AGAIN_S)
        else:
            return


def _hand_back(backend: Backend, task: TaskState[Any, Any], error: BaseException) -> Actions:
    """Let another worker have it now rather than when the lease lapses; counted as a lost worker."""
    if task._released or backend.closed:
        return
    with contextlib.suppress(FFError, TimeoutError):
        with contextlib.suppress(FFError):
            yield CloseWriter(HAND_BACK_S)
        reason = failure_of(error).reason
        yield Run(
            operations.fail(backend._deployment, task.handle, reason, FailureClass.INFRA_CRASH)
        )


def is_handlers_own(error: BaseException) -> bool:
    """Return whether an error that a handler raised ends its attempt; any other one ends the worker."""
    return isinstance(error, Exception) or is_release(error)
