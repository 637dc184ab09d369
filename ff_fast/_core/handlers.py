"""A worker as an object: its handlers by name, and what each of its processes opens.

The name of a handler is a capability of its worker, so an execution that names one is claimed only by workers that have
it, and waits while there is none: workers of an older release leave it alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar, overload

from ff_fast import keys
from ff_fast._core import operations
from ff_fast._core.binding import HANDLER, OnDeployment, dressed
from ff_fast._core.deployment import Deployment
from ff_fast._core.worker import TaskFailed
from ff_fast.errors import InvalidInput, InvalidType
from ff_fast.types import CapabilitySet, FailureClass

if TYPE_CHECKING:
    from ff_fast._core.operations import WorkerOptions
    from ff_fast._core.worker import TaskState

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")
S = TypeVar("S", bound=OnDeployment)
H = TypeVar("H")
F = TypeVar("F", bound=Callable[[Any], Any])


class Worker:
    """A worker of a lane: handlers by name, options, and what each process opens before it claims.

    Pass it to ``backend.run_worker``, or name it on the command line: ``ff-fast worker MODULE:WORKER``. Its handlers are
    all coroutine functions, for :mod:`ff_fast.aio`, or all ordinary functions.

    Args:
        lane: Lane to take work from.
        lifespan: Called with the backend before the first claim; returns a context manager, in asyncio perhaps an
            asynchronous one. What it yields is ``task.context``, and it ends behind the last handler.
        **options: Other arguments of ``run_worker``, as ``concurrency`` or ``lease_ttl_ms``.

    Attributes:
        lane: The lane.
        lifespan: As given.

    Raises:
        InvalidInput: An option is not accepted.
    """

    def __init__(
        self,
        *,
        lane: str = "default",
        lifespan: Callable[[Any], Any] | None = None,
        **options: Any,  # noqa: ANN401 - those of run_worker
    ) -> None:
        if lifespan is not None and not callable(lifespan):
            raise InvalidType("lifespan must be a function that returns a context manager.")
        self.lane = lane
        self.lifespan = lifespan
        self._options: dict[str, Any] = {"lane": lane, **options}
        # Checks the options.
        operations.run_worker(Deployment(), **self._options)
        self._table: dict[str | None, Callable[[Any], Any]] = {}

    @overload
    def handler(self, name: F, /) -> F: ...

    @overload
    def handler(self, name: str | None = None, /) -> Callable[[F], F]: ...

    def handler(self, name: F | str | None = None, /) -> F | Callable[[F], F]:
        """Register a handler, as a decorator: ``@worker.handler("summarise")``, or ``@worker.handler``.

        Args:
            name: Name that ``create_execution(handler=...)`` gives: 1 to 64 printable ASCII characters without blank and
                comma. Without a name the handler is for executions that name none.

        Raises:
            InvalidInput: The name is taken, or a coroutine function and an ordinary one were registered.
        """
        if name is None or isinstance(name, str):
            return partial(self._register, name)
        return self._register(None, name)

    def _register(self, name: str | None, function: F) -> F:
        if name is not None:
            keys.handler_name(name)
        check_handler(function)
        if name in self._table:
            raise InvalidInput("The worker has a handler of this name.")
        if self._table and self.is_async != is_coroutine_function(function):
            raise InvalidInput(
                "The handlers of a worker are all coroutine functions, or all ordinary ones; make a second worker."
            )
        self._table[name] = function
        return function

    @property
    def handlers(self) -> tuple[str | None, ...]:
        """The names of the handlers; None stands for the one of executions that name none."""
        return tuple(self._table)

    @property
    def is_async(self) -> bool:
        """Whether the handlers are coroutine functions."""
        return any(map(is_coroutine_function, self._table.values()))

    def __repr__(self) -> str:
        return f"<ff_fast.Worker lane={self.lane!r} handlers={list(self._table)}>"

    def _with(self, given: dict[str, Any]) -> dict[str, Any]:
        return {**self._options, **given}

    def _offering(self, options: WorkerOptions) -> WorkerOptions:
        """Return *options* with claims of what the worker has handlers for.

        Raises:
            InvalidInput: There is no handler.
        """
        if not self._table:
            raise InvalidInput("The worker has no handler; register one with @worker.handler.")
        names = [name for name in self._table if name is not None]
        if not names:
            return options
        offered = CapabilitySet(keys.handler_capability(name) for name in names)
        claim = partial(options.claim, offered=offered, plain=None in self._table)
        # Checks the number of the names.
        claim()
        return options._replace(claim=claim, named=True)

    def _dispatch(self, task: TaskState[Any, Any]) -> Any:  # noqa: ANN401 - as the shell has it
        """Call the handler that the execution of *task* names."""
        function = self._table.get(task.handler)
        if function is None:
            raise TaskFailed("This worker lost its handler of the name.", FailureClass.TRANSIENT)
        return function(task)


def is_coroutine_function(function: object) -> bool:
    """Return whether a function, a partial or an object with ``__call__`` gives coroutines."""
    return any(map(inspect.iscoroutinefunction, _called(function)))


def _called(function: object) -> tuple[object, object]:
    """Return what may be the function that a call runs."""
    while isinstance(function, partial):
        function = function.func
    return function, getattr(function, "__call__", None)  # noqa: B004


def check_handler(function: object) -> None:
    """Check that a handler can be called for executions.

    Raises:
        InvalidType: It is no function, or its calls would run nothing of it.
    """
    if not callable(function) or isinstance(function, type):
        raise InvalidType("A handler must be a function.")
    for each in _called(function):
        if inspect.isgeneratorfunction(each) or inspect.isasyncgenfunction(each):
            raise InvalidType(
                "A handler must not be a generator: pass what it streams to task.write, and return the result."
            )


def options_of(handler: object, given: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of ``run_worker``: those *given* go before those of a :class:`Worker`."""
    return handler._with(given) if isinstance(handler, Worker) else given  # noqa: SLF001


def of_handler(
    make: Callable[Concatenate[Deployment, P], R], carry_out: Callable[[S, H, R], T]
) -> Callable[Concatenate[S, H, P], T]:
    """Return a method that takes the shell's kind of handler before the operation's arguments."""

    def method(self: S, handler: H, /, *args: P.args, **kwargs: P.kwargs) -> T:
        options: dict[str, Any] = options_of(handler, kwargs)
        return carry_out(self, handler, make(self._deployment, *args, **options))

    method.__module__ = carry_out.__module__
    return dressed("ValkeyBackend", method, make, "None", HANDLER)
