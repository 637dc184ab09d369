"""Writers, and the connection on which all writers of a backend send."""

from __future__ import annotations

import contextlib
import copy
import heapq
import itertools
import threading
import time
import weakref
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Self, TypeVar

from ff_fast import _process
from ff_fast._core import durability
from ff_fast._core import writer as writer_core
from ff_fast._core.binding import dressed
from ff_fast._core.steps import Command, Retries, Step
from ff_fast._core.writer import SharedWriter, Wait
from ff_fast._hot.writer import Outbox
from ff_fast.errors import (
    DeadlineExceeded,
    FFError,
    ForkedClient,
    FunctionMissing,
    NotPrimary,
    OutcomeUnknown,
    ProtocolError,
    WriterClosed,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from ff_fast._core.durability import Ask, Level
    from ff_fast._hot.writer import Call
    from ff_fast._sync.connection import Connection
    from ff_fast.types import BackendConfig

P = ParamSpec("P")
T = TypeVar("T")


class Sender(Outbox):
    """The connection of all writers, and the only thread that uses it.

    The thread works in rounds: it sends the calls that are due, then reads the replies. Meanwhile the open batches fill.
    """

    def __init__(
        self,
        connect: Callable[[], Connection],
        prepare: Callable[[Connection], None],
        discard: Callable[[Connection], None],
        trusts: Callable[[Connection], bool],
        config: BackendConfig,
    ) -> None:
        super().__init__(linger_ms=config.linger_ms)
        self._connect = connect
        self._prepare = prepare
        self._discard = discard
        self._trusts = trusts
        # Writers with the time at which their batch must be sent, and None for a look at what is due. One call in C
        # puts an entry, so an interrupt cannot leave half of one.
        self._inbox: SimpleQueue[tuple[float, Writer] | None] = SimpleQueue()
        self._lingering: list[tuple[float, int, Writer]] = []
        self._order = itertools.count()
        self._retries = Retries(config.retry, retry_timeouts=True)
        self._closing = threading.Event()
        self._connection: Connection | None = None
        # Why the batches of the round are sent again.
        self._failure: FFError | None = None
        self.writers: weakref.WeakSet[Writer] = weakref.WeakSet()
        self.lock = threading.Lock()
        _process.watch_fork(self)
        _process.watch_exit(self)
        self._thread = threading.Thread(target=self._main, name="ff_fast writers", daemon=True)
        self._thread.start()

    def _on_ready(self) -> None:
        self._inbox.put(None)

    def linger(self, writer: Writer) -> None:
        self._inbox.put((time.monotonic() + writer._linger_us / 1e6, writer))

    def close(self) -> None:
        """End the thread; its connection was aborted before."""
        self._closing.set()
        self._inbox.put(None)
        self._thread.join()
        self.fail_all(WriterClosed())
        self.forget()

    def fail_all(self, error: FFError) -> None:
        for writer in self._all():
            writer._fail(copy.copy(error))

    def _forked(self) -> None:
        """Fail every writer in a forked child."""
        self.lock = threading.Lock()
        for writer in list(self.writers):
            writer._forked()

    def _finish_soon(self) -> None:
        for writer in self._all():
            writer._seal_soon()

    def _finished(self) -> bool:
        return all(writer._failure is not None or writer._idle for writer in self._all())

    def _warn_of_losses(self) -> None:
        for writer in self._all():
            writer._warn_of_losses()

    def _all(self) -> list[Writer]:
        with self.lock:
            return list(self.writers)

    # -- the thread ---------------------------------------------------------------------------------------------

    def _main(self) -> None:
        try:
            while not self._closing.is_set():
                self._listen()
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
        """Wait until a call is due."""
        while not self._closing.is_set():
            self._seal_lingering()
            hold = self.hold_s()
            wait = self.wait_s()
            if wait == 0.0:
                while not self._inbox.empty():
                    self._take(self._inbox.get())
                return
            waits = [each for each in (wait, hold) if each > 0.0]
            if self._lingering:
                waits.append(max(self._lingering[0][0] - time.monotonic(), 0.0))
            with contextlib.suppress(Empty):
                self._take(self._inbox.get(timeout=min(waits, default=None)))

    def _take(self, told: tuple[float, Writer] | None) -> None:
        if told is not None:
            due, writer = told
            heapq.heappush(self._lingering, (due, next(self._order), writer))

    def _seal_lingering(self) -> None:
        while self._lingering and self._lingering[0][0] <= time.monotonic():
            heapq.heappop(self._lingering)[2]._seal_soon()

    def _round(self) -> None:
        if self._closing.is_set() or self._connected() is None:
            return
        connection = self._connection
        assert connection is not None
        calls: list[Call] = []
        size = 0
        self._failure = None
        try:
            while (
                self.wait_s() == 0.0
                and len(calls) < writer_core.CALLS_IN_FLIGHT
                and size < writer_core.ROUND_BYTES
            ):
                call = self.next_call()
                if call is not None:
                    calls.append(call)
                    request = call.take()
                    size += len(request)
                    connection.send(Step([Command(b"", request)]))
            for call in calls:
                call(connection.receive())
        except FFError as error:
            # After a broken reply too the batches are sent again: a repeat is harmless.
            self._failure = OutcomeUnknown() if isinstance(error, ProtocolError) else error
            self._drop()
        finally:
            if self._connection is None:
                for call in calls:
                    call.lost()
        if self._failure is not None:
            self._recover(self._failure)

    def _on_answer(self, call: Call) -> None:
        if call.error is not None:
            self._failure = call.error
        elif call.accepted:
            self._retries.reset()

    def _recover(self, failure: FFError) -> None:
        """Back off; load the Lua library if it is missing; fail the writers when the retries are used up."""
        pause = self._retries.pause(failure)
        if pause is None:
            self._fail_waiting(failure)
            return
        if isinstance(failure, NotPrimary):
            # Connect again: the host name may resolve to the new primary.
            self._drop()
        if isinstance(failure, FunctionMissing) and self._connection is not None:
            try:
                self._prepare(self._connection)
            except FFError:
                # The next connect loads the library again, and reports the error.
                self._drop()
        else:
            self._closing.wait(pause)

    def _connected(self) -> Connection | None:
        """Return the connection; connect again if it was lost. Out of retries, fail every waiting writer."""
        if self._connection is not None and not self._trusts(self._connection):
            self._drop()
        while self._connection is None and not self._closing.is_set():
            try:
                self._connection = self._connect()
            except FFError as error:
                pause = self._retries.pause(error)
                if pause is None:
                    self._fail_waiting(error)
                    return None
                self._closing.wait(pause)
        return self._connection

    def _fail_waiting(self, error: FFError) -> None:
        # The next writer starts with all retries.
        self._retries.reset()
        for writer in self.take_ready():
            writer._fail(copy.copy(error))

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            self._discard(connection)


def waiting(
    make: Callable[Concatenate[SharedWriter, P], Wait[T]],
) -> Callable[Concatenate[Writer, P], T]:
    """Return a writer's method that performs a wait of the core."""

    def method(self: Writer, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self._wait(make(self, *args, **kwargs))

    return dressed("Writer", method, make)


class Writer(SharedWriter):
    """A stream of frames into one attempt. Made by :meth:`ff_fast.ValkeyBackend.open_writer`.

    :meth:`write` may be called from any thread and never waits; a thread of the backend sends.
    """

    def __init__(
        self,
        state: writer_core.WriterState,
        sender: Sender,
        timeout_s: float,
        witness: Callable[[Ask], None],
    ) -> None:
        self._sender = sender
        self._witness = witness
        self._timeout_s = timeout_s
        self._waiters: list[threading.Lock] = []
        super().__init__(state, sender)
        with self._sender.lock:
            self._sender.writers.add(self)
        if not self._sender.running:
            self._fail(WriterClosed())

    def _on_linger(self) -> None:
        self._sender.linger(self)

    def _on_progress(self) -> None:
        for waiter in tuple(self._waiters):
            # RuntimeError: already released, so already notified.
            with contextlib.suppress(RuntimeError):
                waiter.release()
        if not self._waiters:
            # Clear, then check again: a waiter added in between must not be missed.
            self._has_waiters = False
            self._has_waiters = bool(self._waiters)

    def _forked(self) -> None:
        """Fail in a forked child, without ``unstored``: the parent still stores the frames."""
        self._fail(ForkedClient(), hand_back=False)

    def _wait(self, wait: Wait[T]) -> T:
        if isinstance(self.error, ForkedClient):
            raise copy.copy(self.error)
        deadline = None if wait.timeout_s is None else time.monotonic() + wait.timeout_s
        if not wait.done():
            self._progress(wait, deadline)
        if wait.level is not None:
            self._reach(wait.level, deadline)
        return wait.value()

    def _reach(self, level: Level, deadline: float | None) -> None:
        """Wait until what is stored has reached *level*."""
        ask = self._ask(level, deadline)
        while True:
            self._witness(ask)
            if not self._asked(ask, deadline):
                return
            if ask.failure is not None:
                time.sleep(durability.AGAIN_S)

    def _progress(self, wait: Wait[Any], deadline: float | None) -> None:
        # A lock, not a Condition: an interrupt could leave a Condition locked for ever.
        waiter = threading.Lock()
        waiter.acquire()
        self._waiters.append(waiter)
        self._has_waiters = True
        try:
            while not wait.done():
                if self.error is not None:
                    raise copy.copy(self.error)
                left = -1.0 if deadline is None else max(deadline - time.monotonic(), 0.0)
                if not waiter.acquire(timeout=left) and not wait.done():
                    raise DeadlineExceeded
        finally:
            self._waiters.remove(waiter)

    drain = waiting(writer_core.drain)
    flush = waiting(writer_core.flush)
    close = waiting(writer_core.close)

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
        # The block's own error is the cause; the writer's stays in `error`, with its unstored frames.
        with contextlib.suppress(FFError):
            # Bounded, so that an interrupted block ends soon.
            self.close(self._timeout_s)
