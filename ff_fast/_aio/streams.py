"""Named streams of the asyncio shell."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Self, TypeVar

from ff_fast._aio.leases import LeaseKeeper
from ff_fast._aio.operations import drive
from ff_fast._aio.writers import Writer
from ff_fast._core import operations
from ff_fast._core import streams as streams_core
from ff_fast._core.binding import dressed
from ff_fast._core.streams import StreamState, of_writer
from ff_fast._core.worker import Action, CloseWriter, Run, WaitLost
from ff_fast._core.writer import store_and_close
from ff_fast._hot.writer import WriterCore

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Generator
    from datetime import timedelta
    from types import TracebackType

    from ff_fast._aio.operations import Operations
    from ff_fast._core.deployment import Deployment
    from ff_fast._core.operations import Production, StreamRequest

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


def ending(
    make: Callable[Concatenate[StreamState[Any, Any], P], Generator[Action, Any, T]],
    returns: str,
) -> Callable[Concatenate[OpenedStream, P], Coroutine[Any, Any, T]]:
    """Return a stream's method that ends it as the core says."""

    async def method(self: OpenedStream, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await self._end(make(self, *args, **kwargs))

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


def awaiting(
    make: Callable[Concatenate[Deployment, str, P], R],
    carry_out: Callable[[Operations, R], Coroutine[Any, Any, T]],
    returns: str,
) -> Callable[Concatenate[OpenedStream, P], Coroutine[Any, Any, T]]:
    """Return a stream's method that awaits what it reads of its execution."""

    async def method(self: OpenedStream, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await carry_out(
            self._backend, make(self._backend._deployment, self.execution_id, *args, **kwargs)
        )

    return dressed("OpenedStream", method, make, returns, hidden=2)


class OpenedStream(StreamState[Writer, LeaseKeeper]):
    __doc__ = streams_core.OPENED_STREAM

    _backend: Operations

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
    wait = awaiting(operations.wait, lambda backend, request: backend._wait(request), "bytes")

    async def wait_cancelled(self, timeout: float | timedelta | None = None) -> bool:
        """Wait until the producer should stop; see `cancelled`.

        Args:
            timeout: Longest wait, in seconds or as a ``timedelta``; None has no limit.

        Returns:
            Whether it should stop; False after *timeout*.

        Raises:
            InvalidInput: This is a consumer.
        """
        return self.cancelled or await self._kept.wait_cancelled(timeout)

    async def _end(self, actions: Generator[Action, Any, T], limit_s: float | None = None) -> T:
        try:
            return await drive(actions, self._perform, limit_s)
        finally:
            if self._released and self._keeper is not None:
                await self._keeper.stop()

    async def _perform(self, action: Action) -> object:
        match action:
            case Run(call):
                return await self._backend._do(call)
            case CloseWriter(timeout_s):
                writer = self._current_writer
                assert writer is not None
                await writer._wait(store_and_close(writer, timeout_s))
            case WaitLost(seconds):
                await self._kept.wait_lost(seconds)
            case _:
                pass  # no action of a stream
        return None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        try:
            await self._end(streams_core.left(self, error), streams_core.limit_s(error))
        finally:
            if self._keeper is not None:
                await self._keeper.stop()

    def __del__(self) -> None:
        keeper = self.__dict__.get("_keeper")
        if keeper is not None:
            # The last reference may be dropped on any thread, and when the loop is gone.
            with contextlib.suppress(RuntimeError):
                keeper._loop.call_soon_threadsafe(keeper._end)
