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

from ff_fast import _process, _transport, keys
from ff_fast._core import durability, operations
from ff_fast._core import writer as writer_core
from ff_fast._core.binding import dressed
from ff_fast._core.steps import Command, Step
from ff_fast._core.writer import SharedWriter, SlotHome, Wait, warn_of_losses
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
    from ff_fast._sync.connection import Connection, Node
    from ff_fast._sync.pool import Pool

LOOK_S = 0.5
"""Time between two looks at the connection of writers that wait, while they hold what a failover may lose."""

P = ParamSpec("P")
T = TypeVar("T")

_NOTHING = Command(b"", b"")

# Looks of a thread whose node has left the cluster are so far apart.
_LOOK_S = 0.1


class Sender(Outbox):
    """The connection of the writers of one node, and the only thread that uses it.

    The thread works in rounds: it sends the calls that are due, then reads the replies. Meanwhile the open batches fill.
    """

    def __init__(self, owner: Senders, pool: Pool, node: Node) -> None:
        super().__init__(linger_ms=pool.config.linger_ms)
        self._owner = owner
        self._pool = pool
        self.node = node
        # Writers with the time at which their batch must be sent, and None for a look at what is due. One call in C
        # puts an entry, so an interrupt cannot leave half of one.
        self._inbox: SimpleQueue[tuple[float, Writer] | None] = SimpleQueue()
        # Writers whose opening the server has lost.
        self._to_reopen: list[Writer] = []
        self._let_go_at = 0.0
        self._lingering: list[tuple[float, int, Writer]] = []
        # Slots whose writers wait, when their node is looked for, and after which error.
        self._held_slots: list[tuple[float, int, SlotHome, FFError]] = []
        self._order = itertools.count()
        self.closing = threading.Event()
        self._connection: Connection | None = None
        self._library_missing = False
        self._thread = threading.Thread(target=self._main, name="ff_fast writers", daemon=True)
        self._thread.start()

    def _on_ready(self) -> None:
        self._inbox.put(None)

    def linger(self, writer: Writer) -> None:
        self._inbox.put((time.monotonic() + writer._linger_us / 1e6, writer))

    def look(self) -> None:
        """Let the thread look whether it is still needed."""
        self._inbox.put(None)

    def end(self) -> None:
        """Let the thread end; its connection was aborted before."""
        self.closing.set()
        self._inbox.put(None)

    def join(self) -> None:
        self._thread.join()

    # -- the thread ---------------------------------------------------------------------------------------------

    def _main(self) -> None:
        try:
            while not (self.closing.is_set() or self._left()):
                self._listen()
                self._round()
        except BaseException:
            self._owner.break_off()
            raise
        finally:
            self._drop()
        while not self._inbox.empty():
            if (told := self._inbox.get()) is not None:
                told[1]._seal_soon()

    def _left(self) -> bool:
        """Whether the node has left the cluster, and the writers have gone elsewhere."""
        return (
            self.node.gone
            and not (self.ready or self._lingering or self._held_slots)
            and self._owner.leave(self)
        )

    def _listen(self) -> None:
        """Wait until a call is due."""
        while not (self.closing.is_set() or self.node.gone):
            self._seal_lingering()
            self._go_on_with_slots()
            hold = self.hold_s()
            self._let_go()
            wait = self.wait_s()
            if wait == 0.0 or self._to_reopen:
                break
            waits = [each for each in (wait, hold) if each > 0.0]
            waits += [
                max(found[0][0] - time.monotonic(), 0.0)
                for found in (self._lingering, self._held_slots)
                if found
            ]
            if self.keeps:
                waits.append(max(self._let_go_at - time.monotonic(), 0.0))
            with contextlib.suppress(Empty):
                self._take(self._inbox.get(timeout=min(waits, default=None)))
        else:
            self._seal_lingering()
            self._go_on_with_slots()
            if self.node.gone and not self.ready:
                # Whatever comes late is looked for now and then.
                with contextlib.suppress(Empty):
                    self._take(self._inbox.get(timeout=_LOOK_S))
        while not self._inbox.empty():
            self._take(self._inbox.get())

    def _let_go(self) -> None:
        """Let go of what was acknowledged some time ago, while the server is there."""
        if self.keeps and self._let_go_at <= time.monotonic():
            if self._connection is not None and not self._connection.reusable:
                self._drop()
            self._let_go_at = time.monotonic() + min(max(self.let_go_s(), 0.0), LOOK_S)

    def reopen(self, writer: Writer) -> None:
        """Open a writer again of which the server has lost the opening."""
        self._to_reopen.append(writer)
        self._inbox.put(None)

    def _reopen(self) -> None:
        while self._to_reopen:
            writer = self._to_reopen.pop()
            try:
                self._pool._run(operations.Call(writer._open_again))
            except FFError as error:
                writer._fail(error)

    def _take(self, told: tuple[float, Writer] | None) -> None:
        if told is not None:
            due, writer = told
            heapq.heappush(self._lingering, (due, next(self._order), writer))

    def _seal_lingering(self) -> None:
        while self._lingering and self._lingering[0][0] <= time.monotonic():
            heapq.heappop(self._lingering)[2]._seal_soon()

    def _round(self) -> None:
        if self.closing.is_set():
            return
        self._reopen()
        if not self.ready:
            return
        try:
            connection = self._connected()
        except FFError as error:
            self._wait(error)
            return
        calls: list[Call] = []
        size = 0
        try:
            while (
                self.wait_s() == 0.0
                and len(calls) < writer_core.CALLS_IN_FLIGHT
                and size < writer_core.ROUND_BYTES
            ):
                more = self._next_calls()
                calls += more
                if more:
                    request = b"".join([each.take() for each in more])
                    size += len(request)
                    # The first of them counts for all in `send`, so each has a command.
                    commands = [Command(b"", request), *[_NOTHING] * (len(more) - 1)]
                    connection.send(Step(commands))
            for call in calls:
                call(connection.receive())
        except FFError as error:
            # After a broken reply too the batches are sent again: a repeat is harmless.
            failure = OutcomeUnknown() if isinstance(error, ProtocolError) else error
            self._drop()
            for call in calls:
                call.lost()
            self._wait(failure)
        except BaseException:
            self._drop()
            for call in calls:
                call.lost()
            raise

    def _next_calls(self) -> list[Call]:
        if self.node.address is not None:
            return self.next_calls()
        call = self.next_call()
        return [] if call is None else [call]

    def _on_answer(self, call: Call) -> None:
        home = call.home
        assert isinstance(home, SlotHome)
        if call.error is not None:
            self._hold(home, call.error)
        elif call.accepted:
            home.retries.reset()

    def _wait(self, error: FFError) -> None:
        """Let the writers that are ready wait for the node."""
        for home in self.homes():
            assert isinstance(home, SlotHome)
            self._hold(home, error)

    def _hold(self, home: SlotHome, error: FFError) -> None:
        """Let the writers of a slot wait after an error; then they go on, perhaps at another node.

        Writers that have something in flight may still be here when the slot is elsewhere.
        """
        if home.outbox is not self:
            self.withdraw(home)
            return
        home.hold()
        self._again(home, error)

    def _again(self, home: SlotHome, error: FFError) -> None:
        _transport.name_refuser(error, self.node.reached)
        pause = home.retries.pause(error)
        if pause is None:
            home.fail(error)
            home.lead_to(self)
            return
        self._pool._nodes.failed(self.node, error)
        if isinstance(error, NotPrimary):
            # Connect again: the host name may resolve to the new primary.
            self._drop()
        self._library_missing = self._library_missing or isinstance(error, FunctionMissing)
        entry = (time.monotonic() + pause, next(self._order), home, error)
        heapq.heappush(self._held_slots, entry)

    def _go_on_with_slots(self) -> None:
        """Find the nodes of slots that have waited for long enough, and let them have the writers."""
        while self._held_slots and self._held_slots[0][0] <= time.monotonic():
            home = heapq.heappop(self._held_slots)[2]
            try:
                sender = self._owner.of(home.slot)
            except FFError as error:
                self._again(home, error)
            else:
                home.lead_to(sender)

    def _connected(self) -> Connection:
        """Return the connection; connect again if it was lost, and load the library if it is missing."""
        connection = self._connection
        if connection is not None and not self._pool._trusts(connection):
            self._drop()
            connection = None
        if connection is None:
            connection = self._connection = self._pool._connect(node=self.node)
        if self._library_missing:
            self._library_missing = False
            try:
                self._pool._load(connection)
            except FFError:
                # The next connect loads the library again, and reports the error.
                self._drop()
                raise
        return connection

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            self._pool._discard(connection)
            if not self.closing.is_set():
                self.doubt()


class Senders:
    """The senders of a backend: one a node."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._senders: dict[Node, Sender] = {}
        self._homes: dict[int | None, SlotHome] = {}
        self._ended = False
        self.writers: weakref.WeakSet[Writer] = weakref.WeakSet()
        self.lock = threading.RLock()
        _process.watch_fork(self)
        _process.watch_exit(self)

    def home(self, slot: int) -> SlotHome:
        """Return the home of the writers of a slot.

        Raises:
            FFError: No node is known to have the slot.
        """
        at = None if self._pool._nodes.topology is None else slot
        home = self._homes.get(at)
        if home is None:
            sender = self.of(at)
            with self.lock:
                home = self._homes.get(at)
                if home is None:
                    home = SlotHome(at, Outbox(), self._pool.config.retry)
                    home.lead_to(sender)
                    self._homes[at] = home
        return home

    def of(self, slot: int | None) -> Sender:
        """Return the sender of a slot's node.

        Raises:
            FFError: No node is known to have the slot.
        """
        node = self._pool._nodes.of(slot)
        with self.lock:
            sender = self._senders.get(node)
            if sender is None:
                for each in self._senders.values():
                    each.look()
                sender = self._senders[node] = Sender(self, self._pool, node)
                if self._ended:
                    sender.end()
        return sender

    def linger(self, writer: Writer) -> None:
        """Seal the open batch of a writer when it has lingered; any thread can do so."""
        sender = next(iter(tuple(self._senders.values())), None)
        if sender is None:
            writer._seal_soon()
        else:
            sender.linger(writer)

    def reopen(self, writer: Writer) -> None:
        """Open a writer again of which the server has lost the opening; any thread can do so."""
        for sender in tuple(self._senders.values())[:1]:
            sender.reopen(writer)

    def leave(self, sender: Sender) -> bool:
        """Let a sender go, whose node has left the cluster; return False if somebody may still need it."""
        try:
            led = [
                (home, self.of(home.slot))
                for home in list(self._homes.values())
                if home.outbox is sender
            ]
        except FFError:
            return False
        if any(other is sender for _, other in led):
            return False
        with self.lock:
            for home, other in led:
                if home.outbox is sender:
                    home.outbox = other
            if self._senders.get(sender.node) is sender:
                del self._senders[sender.node]
        # Also what was held back, or has come meanwhile.
        sender.hand_over()
        return True

    def close(self) -> None:
        """End the threads; their connections were aborted before."""
        self._end()
        with self.lock:
            senders = list(self._senders.values())
        for sender in senders:
            sender.join()
        self.fail_all(WriterClosed())
        for outbox in (*senders, *(home.waiting for home in self._homes.values())):
            outbox.forget()

    def _end(self) -> None:
        with self.lock:
            self._ended = True
            for sender in self._senders.values():
                sender.end()

    @property
    def running(self) -> bool:
        return not self._ended

    def break_off(self) -> None:
        """End all after an error of a thread's own."""
        self._end()
        self.fail_all(OutcomeUnknown("The thread of the writers stopped with an error of its own."))

    def fail_all(self, error: FFError) -> None:
        for writer in self._all():
            writer._fail(copy.copy(error))

    def _forked(self) -> None:
        """Fail every writer in a forked child."""
        self.lock = threading.RLock()
        for writer in list(self.writers):
            writer._forked()

    def _finish_soon(self) -> None:
        for writer in self._all():
            writer._seal_soon()

    def _finished(self) -> bool:
        return all(writer._failure is not None or writer._idle for writer in self._all())

    def _warn_of_losses(self) -> None:
        warn_of_losses(self._all())

    def _all(self) -> list[Writer]:
        with self.lock:
            return list(self.writers)


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
        senders: Senders,
        timeout_s: float,
        witness: Callable[[Ask], None],
    ) -> None:
        self._senders = senders
        self._witness = witness
        self._timeout_s = timeout_s
        self._waiters: list[threading.Lock] = []
        super().__init__(state, senders.home(keys.key_slot(state.attempt.stream_keys[0])))
        with senders.lock:
            senders.writers.add(self)
        if not senders.running:
            self._fail(WriterClosed())

    def _on_lost_opening(self) -> None:
        if not self._reopening:
            self._reopening = True
            self._senders.reopen(self)

    def _on_linger(self) -> None:
        self._senders.linger(self)

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
        if wait.level is not None and self._lacks(wait.level, wait.last):
            self._reach(wait.level, deadline)
        return wait.value()

    def _reach(self, level: Level, deadline: float | None) -> None:
        """Wait until what is stored has reached *level*."""
        ask = self._question(level, deadline)
        while True:
            self._witness(ask)
            if not self._asks_again(ask, deadline):
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
                failure = self._failure
                if failure is not None:
                    if wait.done():
                        # Another thread has closed it meanwhile: what is waited for came first.
                        break
                    raise copy.copy(self.error or failure)
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
