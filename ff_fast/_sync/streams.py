"""Named streams of the blocking shell."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Self, TypeVar

from ff_fast._core import operations
from ff_fast._core import streams as streams_core
from ff_fast._core.binding import dressed
from ff_fast._core.streams import StreamState, of_writer
from ff_fast._core.worker import Action, CloseWriter, Run, WaitLost
from ff_fast._core.writer import store_and_close
from ff_fast._hot.writer import WriterCore
from ff_fast._sync.leases import LeaseKeeper
from ff_fast._sync.operations import drive
from ff_fast._sync.writers import Writer

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from datetime import timedelta
    from types import TracebackType

    from ff_fast._core.deployment import Deployment
    from ff_fast._core.operations import Production, StreamRequest
    from ff_fast._sync.operations import Operations

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


def ending(
    make: Callable[Concatenate[StreamState[Any, Any], P], Generator[Action, Any, T]],
    returns: str,
) -> Callable[Concatenate[OpenedStream, P], T]:
    """Return a stream's method that ends it as the core says."""

    def method(self: OpenedStream, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self._end(make(self, *args, **kwargs))

    return dressed("OpenedStream", method, make, returns)


def reading(
    make: Callable[Concatenate[Deployment, str, P], R],
    carry_out: Callable[[Operations, R], T],
    returns: str,
) -> Callable[Concatenate[OpenedStream, P], T]:
    """Return a stream's method that reads its execution."""

    def method(self: OpenedStream, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return carry_out(
            self._backend, make(self._backend._deployment, self.execution_id, *args, **kwargs)
        )

    return dressed("OpenedStream", method, make, returns, hidden=2)


class OpenedStream(StreamState[Writer, LeaseKeeper]):
    __doc__ = streams_core.OPENED_STREAM

    _backend: Operations
    # The deadline of what ends the stream, in monotonic time.
    _until = float("inf")

    def __init__(
        self, backend: Operations, request: StreamRequest, produced: Production | None
    ) -> None:
        handle = None if produced is None else produced.handle
        super().__init__(backend, request.execution_id, handle, request.level)
        if produced is not None:
            self._current_writer = backend._use_writer(produced.writer)
            self._keeper = backend.keep_lease(produced.handle)

    write = of_writer(WriterCore.write)
    drain = of_writer(Writer.drain)
    flush = of_writer(Writer.flush)
    complete = ending(streams_core.complete, "None")
    fail = ending(streams_core.fail, "FailOutcome")
    follow = reading(operations.follow, lambda backend, source: backend._follow(source), "Follow")
    wait = reading(operations.wait, lambda backend, request: backend._wait(request), "bytes")

    def wait_cancelled(self, timeout: float | timedelta | None = None) -> bool:
        """Wait until the producer should stop; see `cancelled`.

        Args:
            timeout: Longest wait, in seconds or as a ``timedelta``; None has no limit.

        Returns:
            Whether it should stop; False after *timeout*.

        Raises:
            InvalidInput: This is a consumer.
        """
        return self.cancelled or self._kept.wait_cancelled(timeout)

    def _end(self, actions: Generator[Action, Any, T], limit_s: float | None = None) -> T:
        if limit_s is not None:
            self._until = time.monotonic() + limit_s
        try:
            return drive(actions, self._perform)
        finally:
            if self._released and self._keeper is not None:
                self._keeper.stop()

    def _perform(self, action: Action) -> object:
        match action:
            case Run(call):
                return self._backend._do(call, until=self._until)
            case CloseWriter(timeout_s):
                writer = self._current_writer
                assert writer is not None
                writer._wait(store_and_close(writer, timeout_s))
            case WaitLost(seconds):
                self._kept.wait_lost(seconds)
            case _:
                pass  # no action of a stream
        return None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        try:
            self._end(streams_core.left(self, error), streams_core.limit_s(error))
        finally:
            if self._keeper is not None:
                self._keeper.stop()

    def __del__(self) -> None:
        keeper = self.__dict__.get("_keeper")
        if keeper is not None:
            keeper._end()
