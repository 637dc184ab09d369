"""Writers, and the one connection on which all of a backend's writers send."""

from __future__ import annotations

import contextlib
import copy
import heapq
import itertools
import threading
import time
import weakref
from collections import deque
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Self

from ff_fast import _transport
from ff_fast._core import writer as _writing
from ff_fast._core.steps import Retries, Step
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
    from collections.abc import Callable
    from types import TracebackType

    from ff_fast._hot.writer import Batch
    from ff_fast._sync.connection import Channel
    from ff_fast.types import AppendFrameOutcome, BackendRetry


class Link:
    """The connection of all writers, and the thread that alone touches it.

    In rounds: one request for each writer that has something to send, then their replies. While a round is on its way
    the open batches fill.
    """

    def __init__(
        self,
        connect: Callable[[], Channel],
        discard: Callable[[Channel], None],
        retry: BackendRetry,
    ) -> None:
        self._connect = connect
        self._discard = discard
        # To the thread: a writer, and when its batch is to leave. One call in C, so no interrupt can tear it apart.
        self._told: SimpleQueue[tuple[float, Writer] | None] = SimpleQueue()
        self._ready: deque[Writer] = deque()
        self._lingering: list[tuple[float, int, Writer]] = []
        self._order = itertools.count()
        self._retries = Retries(retry, patient=True)
        self._closing = threading.Event()
        self._channel: Channel | None = None
        self.writers: weakref.WeakSet[Writer] = weakref.WeakSet()
        self.lock = threading.Lock()
        _transport.watch_fork(self)
        self._thread = threading.Thread(target=self._main, name="ff_fast writers", daemon=True)
        self._thread.start()

    def enqueue(self, writer: Writer) -> None:
        self._told.put((0.0, writer))

    def linger(self, writer: Writer) -> None:
        self._told.put((time.monotonic() + writer._linger_us / 1e6, writer))

    def close(self) -> None:
        """End the thread, whose connection was aborted."""
        self._closing.set()
        self._told.put(None)
        self._thread.join()
        self.fail_all(WriterClosed())

    def fail_all(self, error: FFError) -> None:
        with self.lock:
            writers = list(self.writers)
        for writer in writers:
            writer._fail(copy.copy(error))

    def _forked(self) -> None:
        """Called in a forked child."""
        self.lock = threading.Lock()
        for writer in list(self.writers):
            writer._forked()

    # -- the thread ---------------------------------------------------------------------------------------------

    def _main(self) -> None:
        try:
            while not self._closing.is_set():
                self._listen()
                while self._ready and not self._closing.is_set():
                    self._round()
        except BaseException:
            self._closing.set()
            self.fail_all(
                OutcomeUnknown("The thread of the writers stopped with an error of its own.")
            )
            raise
        finally:
            self._drop()

    @property
    def running(self) -> bool:
        return not self._closing.is_set()

    def _listen(self) -> None:
        """Wait until a writer is ready."""
        wait: float | None = None
        if self._lingering:
            wait = max(self._lingering[0][0] - time.monotonic(), 0.0)
        told: tuple[float, Writer] | None = None
        with contextlib.suppress(Empty):
            told = self._told.get(timeout=wait)
        while told is not None:
            due, writer = told
            if due:
                heapq.heappush(self._lingering, (due, next(self._order), writer))
            else:
                self._ready.append(writer)
            told = None if self._told.empty() else self._told.get()
        while self._lingering and self._lingering[0][0] <= time.monotonic():
            heapq.heappop(self._lingering)[2]._seal_soon()

    def _round(self) -> None:
        channel = self._connected()
        if channel is None:
            return
        sent: list[tuple[Writer, Batch]] = []
        size = 0
        while self._ready and size < _writing.ROUND_BYTES:
            writer = self._ready.popleft()
            batch = writer._next_batch()
            if batch is not None:
                sent.append((writer, batch))
                size += len(batch.message)
        if not sent:
            return
        failure: FFError | None = None
        try:
            step = Step(b"".join([batch.message for _, batch in sent]), len(sent))
            channel.send(step)
            for writer, batch in sent:
                reply = channel.receive(step)
                failure = writer._acknowledge(batch, reply) or failure
                if type(reply) is bytes:
                    self._retries.reset()
        except FFError as error:
            failure = error
            self._drop()
        finally:
            if self._channel is None:
                for writer, _ in sent:
                    writer._requeue()
        if failure is not None:
            self._recover(failure, [writer for writer, _ in sent])

    def _recover(self, failure: FFError, writers: list[Writer]) -> None:
        """Give the server a moment, and the library where that is what it lacks; or give up."""
        pause = self._retries.pause(failure)
        if pause is None:
            self._give_up(failure, writers)
            return
        if isinstance(failure, NotPrimary):
            # The name may lead to another server by now.
            self._drop()
        if isinstance(failure, FunctionMissing) and self._channel is not None:
            try:
                self._channel.run(_transport.ensure_library())
            except FFError:
                # Connecting again tries it again, and says why not.
                self._drop()
        else:
            self._closing.wait(pause)

    def _connected(self) -> Channel | None:
        """The channel, connected again where it was lost; without one, every waiting writer fails."""
        while self._channel is None and not self._closing.is_set():
            try:
                self._channel = self._connect()
            except FFError as error:
                pause = self._retries.pause(error)
                if pause is None:
                    while not self._told.empty():
                        self._listen()
                    waiting = list(self._ready)
                    self._ready.clear()
                    self._give_up(error, waiting)
                    return None
                self._closing.wait(pause)
        return self._channel

    def _give_up(self, error: FFError, writers: list[Writer]) -> None:
        # The next writer begins with all its retries.
        self._retries.reset()
        for writer in writers:
            writer._fail(copy.copy(error))

    def _drop(self) -> None:
        channel, self._channel = self._channel, None
        if channel is not None:
            self._discard(channel)


class Writer(SharedWriter):
    """A stream of frames into one attempt. Made by :meth:`ff_fast.ValkeyBackend.open_writer`.

    :meth:`write` may be called from any thread and never waits; a thread of the backend sends.
    """

    def __init__(self, state: _writing.WriterState, link: Link, timeout_s: float) -> None:
        self._link = link
        self._timeout_s = timeout_s
        self._waiters: list[threading.Lock] = []
        super().__init__(state)
        with self._link.lock:
            self._link.writers.add(self)
        if not self._link.running:
            self._fail(WriterClosed())

    def _on_ready(self) -> None:
        self._link.enqueue(self)

    def _on_linger(self) -> None:
        self._link.linger(self)

    def _on_progress(self) -> None:
        for waiter in tuple(self._waiters):
            # One that is open has been told already.
            with contextlib.suppress(RuntimeError):
                waiter.release()
        if not self._waiters:
            # In this order, as a waiter that comes in between would not be told otherwise.
            self._has_waiters = False
            self._has_waiters = bool(self._waiters)

    def _forked(self) -> None:
        """The frames are the parent's, which stores them."""
        error = ForkedClient()
        self._fail(error)
        error.unstored = ()

    def _wait(self, done: Callable[[], bool], timeout: float | None) -> None:
        if isinstance(self.error, ForkedClient):
            raise copy.copy(self.error)
        deadline = None if timeout is None else time.monotonic() + timeout
        # A lock and not a Condition, which an interrupt can leave in a state that it cannot be left from.
        waiter = threading.Lock()
        waiter.acquire()
        self._waiters.append(waiter)
        self._has_waiters = True
        try:
            while not done():
                if self.error is not None:
                    raise copy.copy(self.error)
                left = -1.0 if deadline is None else max(deadline - time.monotonic(), 0.0)
                if not waiter.acquire(timeout=left) and not done():
                    raise DeadlineExceeded
        finally:
            self._waiters.remove(waiter)

    def drain(self, timeout: float | None = None) -> None:
        """Wait while more than 1 MiB, or too much for one more frame of any size, is unacknowledged.

        Args:
            timeout: Seconds to wait at the most; None waits as long as the writer tries.

        Raises:
            DeadlineExceeded: *timeout* passed; the frames stay on their way.
            FFError: The writer failed.
        """
        if self.error is not None:
            raise copy.copy(self.error)
        if self.unacknowledged_bytes > self._high_water_bytes:
            self._wait(lambda: self.unacknowledged_bytes <= self._high_water_bytes, timeout)

    def flush(self, timeout: float | None = None) -> AppendFrameOutcome:
        """Wait until every frame written so far is stored.

        Returns:
            Id of the newest frame, how many frames the attempt has had, and the version of its summary.

        Raises:
            DeadlineExceeded: *timeout* (seconds) passed; the frames stay on their way.
            FFError: The writer failed; the error's ``unstored`` has the frames that were not stored.
        """
        last = self.next_sequence - 1
        self._seal_soon()
        self._wait(lambda: self.last_sequence >= last, timeout)
        return self.outcome()

    def close(self, timeout: float | None = None) -> None:
        """Flush, store what a later writer and late readers continue from, and stop.

        Raises:
            DeadlineExceeded: *timeout* (seconds) passed.
            FFError: The writer failed.
        """
        if self.error is None:
            self._seal_last()
            self._wait(lambda: self._idle, timeout)
            self._fail(WriterClosed())
        elif not isinstance(self.error, WriterClosed):
            raise copy.copy(self.error)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
            return
        # The error of the block says what went wrong first; `error` keeps what was not stored.
        with contextlib.suppress(FFError):
            # Not for long: whoever interrupts the block wants to get away.
            self.close(self._timeout_s)
