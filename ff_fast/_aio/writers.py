"""Writers, and how they take turns on the connection that a backend's calls and writers share."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import weakref
from collections import deque
from typing import TYPE_CHECKING, Any, Self

from ff_fast import _transport
from ff_fast._aio.connection import LOST, Receiver
from ff_fast._aio.pool import CALLS_IN_FLIGHT, Connections, Shared
from ff_fast._core import writer as _writing
from ff_fast._core.steps import Retries
from ff_fast._core.writer import SharedWriter
from ff_fast.errors import (
    DeadlineExceeded,
    FFError,
    ForkedClient,
    FunctionMissing,
    NotPrimary,
    OutcomeUnknown,
    WriterClosed,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Generator
    from types import TracebackType

    from ff_fast._hot.writer import Batch
    from ff_fast.types import AppendFrameOutcome, BackendRetry


class Link:
    """All writers on the connection that they share: what they have goes out together."""

    def __init__(
        self,
        shared: Shared,
        spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]],
        retry: BackendRetry,
    ) -> None:
        self._shared = shared
        self._spawn = spawn
        self._loop = asyncio.get_running_loop()
        self._queue: deque[Writer] = deque()
        self._recovering: asyncio.Task[None] | None = None
        self._retries = Retries(retry, patient=True)
        self._pump_scheduled = False
        self.writers: weakref.WeakSet[Writer] = weakref.WeakSet()
        shared.on_room = self._on_room
        shared.on_lost = self._on_lost
        _transport.watch_fork(self)

    def enqueue(self, writer: Writer) -> None:
        self._queue.append(writer)
        if not self._pump_scheduled:
            self._pump_scheduled = True
            self._loop.call_soon(self._pump)

    def linger(self, writer: Writer) -> None:
        self._loop.call_later(writer._linger_us / 1e6, writer._seal_soon)

    def _pump(self) -> None:
        """Send what the waiting writers have, as one write."""
        self._pump_scheduled = False
        queue = self._queue
        if not queue or self._shared.closing or self._recovering is not None:
            return
        channel = self._shared.channel
        if channel is None or channel.closed:
            self._recover_soon(None)
            return
        if not channel.writable:
            return
        messages: list[bytes] = []
        receivers: list[Receiver] = []
        size = 0
        room = CALLS_IN_FLIGHT - len(channel.receivers)
        while queue and len(receivers) < room and size < _writing.ROUND_BYTES:
            writer = queue.popleft()
            batch = writer._next_batch()
            if batch is not None:
                messages.append(batch.message)
                size += len(batch.message)
                receivers.append(_BatchReceiver(self, writer, batch))
        if messages:
            channel.send(messages[0] if len(messages) == 1 else b"".join(messages), receivers)
            self._shared.watch_soon()

    def answered(self, writer: Writer, batch: Batch, reply: object) -> None:
        if reply is LOST:
            writer._requeue()
            return
        error = writer._acknowledge(batch, reply)
        if error is not None:
            self._recover_soon(error)
        elif type(reply) is bytes:
            self._retries.reset()

    def _recover_soon(self, error: FFError | None) -> None:
        if self._recovering is None and not self._shared.closing:
            self._recovering = self._spawn(self._recover(error))

    async def _recover(self, error: FFError | None) -> None:
        """After a failure: give the server a moment, and what it lacks, until the writers can go on; or give up."""
        try:
            while True:
                if error is not None:
                    pause = self._retries.pause(error)
                    if pause is None:
                        self._give_up(error)
                        return
                    if isinstance(error, NotPrimary) and self._shared.channel is not None:
                        # The name may lead to another server by now.
                        self._shared.channel.abort()
                    await asyncio.sleep(pause)
                try:
                    if isinstance(error, FunctionMissing):
                        await self._shared.run(_transport.ensure_library())
                    else:
                        await self._shared.connected()
                except FFError as failure:
                    error = failure
                else:
                    return
        finally:
            self._recovering = None
            self._pump()

    def _give_up(self, error: FFError) -> None:
        # The next writer begins with all its retries.
        self._retries.reset()
        waiting, self._queue = self._queue, deque()
        for writer in waiting:
            writer._fail(copy.copy(error))

    def _on_room(self) -> None:
        if self._queue and not self._pump_scheduled:
            self._pump()

    def _on_lost(self) -> None:
        if self._queue:
            self._recover_soon(OutcomeUnknown())

    def stop(self) -> None:
        """Fail every writer; the connection is closed."""
        for writer in list(self.writers):
            writer._fail(WriterClosed())

    def _forked(self) -> None:
        """Called in a forked child."""
        for writer in list(self.writers):
            writer._forked()


class _BatchReceiver:
    """Takes the reply to one batch."""

    __slots__ = ("batch", "link", "writer")

    def __init__(self, link: Link, writer: Writer, batch: Batch) -> None:
        self.link = link
        self.writer = writer
        self.batch = batch

    def __call__(self, reply: object) -> None:
        self.link.answered(self.writer, self.batch, reply)


class Writer(SharedWriter):
    """A stream of frames into one attempt. Made by :meth:`ff_fast.aio.ValkeyBackend.open_writer`.

    :meth:`write` is a plain call that never waits; it is made on the backend's loop.
    """

    def __init__(self, state: _writing.WriterState, link: Link, connections: Connections) -> None:
        self._link = link
        self._connections = connections
        self._waiters: list[asyncio.Future[None]] = []
        super().__init__(state)
        self._link.writers.add(self)

    def _on_ready(self) -> None:
        self._connections._check_thread()
        self._link.enqueue(self)

    def _on_linger(self) -> None:
        self._connections._check_thread()
        self._link.linger(self)

    def _forked(self) -> None:
        """The frames are the parent's, which stores them."""
        self._waiters.clear()
        error = ForkedClient()
        self._fail(error)
        error.unstored = ()

    def _on_progress(self) -> None:
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)

    async def _wait(self, done: Callable[[], bool], timeout: float | None) -> None:
        self._connections._check_loop()
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(timeout):
                while not done():
                    if self.error is not None:
                        raise copy.copy(self.error)
                    waiter: asyncio.Future[None] = loop.create_future()
                    self._waiters.append(waiter)
                    self._has_waiters = True
                    try:
                        await waiter
                    finally:
                        self._waiters.remove(waiter)
                        self._has_waiters = bool(self._waiters)
        except TimeoutError:
            raise DeadlineExceeded from None

    async def drain(self, timeout: float | None = None) -> None:
        """Wait while much is unacknowledged; see :meth:`ff_fast.Writer.drain`."""
        self._connections._check_loop()
        if self.error is not None:
            raise copy.copy(self.error)
        if self.unacknowledged_bytes > self._high_water_bytes:
            await self._wait(lambda: self.unacknowledged_bytes <= self._high_water_bytes, timeout)

    async def flush(self, timeout: float | None = None) -> AppendFrameOutcome:
        """Wait until every frame written so far is stored; see :meth:`ff_fast.Writer.flush`."""
        self._connections._check_loop()
        last = self.next_sequence - 1
        self._seal_soon()
        await self._wait(lambda: self.last_sequence >= last, timeout)
        return self.outcome()

    async def close(self, timeout: float | None = None) -> None:
        """Flush, store what a later writer and late readers continue from, and stop."""
        self._connections._check_loop()
        if self.error is None:
            self._seal_last()
            await self._wait(lambda: self._idle, timeout)
            self._fail(WriterClosed())
        elif not isinstance(self.error, WriterClosed):
            raise copy.copy(self.error)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        if kind is None:
            await self.close()
            return
        # The error of the block says what went wrong first; `error` keeps what was not stored.
        with contextlib.suppress(FFError):
            # Not for long: whoever interrupts the block wants to get away.
            await self.close(self._connections._timeout_s)


class WriterOpening:
    """What :meth:`ff_fast.aio.ValkeyBackend.open_writer` returns: awaited, or entered with ``async with``, it is the writer."""

    def __init__(self, opening: Callable[[], Coroutine[Any, Any, Writer]]) -> None:
        self._opening = opening
        self._writer: Writer | None = None

    def __await__(self) -> Generator[Any, None, Writer]:
        return self._opening().__await__()

    async def __aenter__(self) -> Writer:
        self._writer = await self
        return self._writer

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        if self._writer is not None:
            await self._writer.__aexit__(kind, error, where)
