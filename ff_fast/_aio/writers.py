"""Writers, and their batches on the connection that a backend's calls and writers share."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import threading
import time
import weakref
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Self, TypeVar

from ff_fast import _process, _transport, keys
from ff_fast._aio.connection import BROKEN, LOST
from ff_fast._aio.nodes import CALLS_IN_FLIGHT
from ff_fast._core import durability
from ff_fast._core import writer as writer_core
from ff_fast._core.binding import dressed
from ff_fast._core.operations import Call
from ff_fast._core.writer import SharedWriter, SlotHome, Wait, warn_of_losses
from ff_fast._hot.writer import Outbox
from ff_fast.errors import (
    DeadlineExceeded,
    FFError,
    ForkedClient,
    FunctionMissing,
    NotPrimary,
    OutcomeUnknown,
    Redirected,
    WriterClosed,
    WrongLoop,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine
    from types import TracebackType

    from ff_fast._aio.nodes import Node, Nodes
    from ff_fast._aio.pool import Pool
    from ff_fast._core.durability import Ask, Level
    from ff_fast._hot.writer import Call as AppendCall
    from ff_fast.types import BackendConfig

P = ParamSpec("P")
T = TypeVar("T")

_EXIT_LOOK_S = 0.002


class OnLoop(Outbox):
    """An outbox for writers of the running loop."""

    def __init__(self, owner: Senders) -> None:
        self._owner = owner
        self._event_loop = asyncio.get_running_loop()
        super().__init__(
            linger_ms=owner.config.linger_ms,
            lost=(LOST, BROKEN),
            thread=threading.get_ident(),
            running=asyncio._get_running_loop,
            loop=self._event_loop,
        )

    def _on_wrong_thread(self) -> None:
        self._owner.check_thread()


class Waiting(OnLoop):
    """The writers of a slot for which nobody sends."""

    home: SlotHome

    def _on_ready(self) -> None:
        if not self.home.recovering:
            self._owner.recover_soon(self.home)


class Sender(OnLoop):
    """Sends what the writers of one node have, many of them in one call, on the connection that its calls share."""

    def __init__(self, owner: Senders, node: Node) -> None:
        super().__init__(owner)
        self._shared = node.shared
        self.node = node
        self._alone = node.address is None
        self._most_calls = writer_core.CALLS_IN_FLIGHT if self._alone else CALLS_IN_FLIGHT
        # Whether the pump runs in this turn of the loop, and the timer that runs it later.
        self._pump_scheduled = False
        self._timer: asyncio.TimerHandle | None = None
        self._hold_scheduled = False
        self._let_go_scheduled = False
        node.shared.on_can_write = self._on_can_write
        node.shared.on_lost = self._on_lost
        if node.shared.connection is not None:
            node.shared.connection.on_can_write = self._on_can_write

    def _on_ready(self) -> None:
        if not self._pump_scheduled:
            self._pump_scheduled = True
            self._event_loop.call_soon(self._pump)

    def _pump(self) -> None:
        """Send the calls that are due."""
        self._pump_scheduled = False
        if not self.ready:
            return
        connection = self._shared.connection
        if connection is None or connection.closed:
            self._wait(None)
            return
        if not connection.writable:
            return
        while (
            (wait_s := self.wait_s()) == 0.0
            and self._calls_in_flight < self._most_calls
            and len(connection.receivers) < CALLS_IN_FLIGHT
            and connection.writable
        ):
            if self._alone:
                call = self.next_call()
                if call is not None:
                    connection.send(call.take(), [call])
                    self._shared.watch_soon()
            else:
                calls = self.next_calls()
                if calls:
                    connection.send(b"".join([each.take() for each in calls]), [*calls])
                    self._shared.watch_soon()
        if wait_s > 0.0:
            self._pump_later(wait_s)
        if self.holds and not self._hold_scheduled:
            self._store_held()

    def _pump_later(self, wait_s: float) -> None:
        if self._timer is not None:
            if self._timer.when() <= self._event_loop.time() + wait_s:
                return
            # What is ready lingers no more.
            self._timer.cancel()
        self._timer = self._event_loop.call_later(wait_s, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self._pump()

    def _store_held(self) -> None:
        """Store the frames that were pushed some time ago, and come again for the others."""
        hold_s = self.hold_s()
        self._hold_scheduled = hold_s > 0.0 and not self._shared.closing
        if self._hold_scheduled:
            self._event_loop.call_later(hold_s, self._store_held)

    def _let_go(self) -> None:
        """Let go of what was acknowledged some time ago, and come again for the rest."""
        let_go_s = self.let_go_s()
        self._let_go_scheduled = let_go_s > 0.0 and not self._shared.closing
        if self._let_go_scheduled:
            self._event_loop.call_later(let_go_s, self._let_go)

    def _on_answer(self, call: AppendCall) -> None:
        if self.keeps and not self._let_go_scheduled:
            self._let_go()
        home = call.home
        assert isinstance(home, SlotHome)
        if call.error is not None:
            self._owner.wait(home, self, call.error)
        elif call.accepted:
            home.retries.reset()

    def _wait(self, error: FFError | None) -> None:
        """Let the writers that are ready wait for the node."""
        for home in self.homes():
            assert isinstance(home, SlotHome)
            self._owner.wait(home, self, error)

    def _on_can_write(self) -> None:
        if self.ready and not self._pump_scheduled:
            self._pump()

    def _on_lost(self) -> None:
        self.doubt()
        self._wait(OutcomeUnknown())


class Senders:
    """The senders of a backend: one a node."""

    def __init__(
        self, nodes: Nodes, check_thread: Callable[[], None], config: BackendConfig
    ) -> None:
        self._nodes = nodes
        self.check_thread = check_thread
        self.config = config
        self._senders: dict[Node, Sender] = {}
        self._homes: dict[int | None, SlotHome] = {}
        self._loop = asyncio.get_running_loop()
        self.writers: weakref.WeakSet[Writer] = weakref.WeakSet()
        _process.watch_fork(self)
        _process.watch_exit(self)

    def home(self, slot: int) -> SlotHome:
        """Return the home of the writers of a slot."""
        at = None if self._nodes.topology is None else slot
        home = self._homes.get(at)
        if home is None:
            waiting = Waiting(self)
            home = self._homes[at] = waiting.home = SlotHome(at, waiting, self.config.retry)
            with contextlib.suppress(FFError):
                # A node that is not known is looked for when there is something to send.
                home.lead_to(self._of(at))
        return home

    def _of(self, slot: int | None) -> Sender:
        """Return the sender of a slot's node."""
        node = self._nodes.of(slot)
        sender = self._senders.get(node)
        if sender is None:
            for left in [each for each in self._senders if each.stopped]:
                # Its frames that are held back are stored elsewhere.
                self._senders.pop(left).hand_over()
            sender = self._senders[node] = Sender(self, node)
        return sender

    def linger(self, writer: Writer) -> None:
        self._loop.call_later(writer._linger_us / 1e6, writer._seal_soon)

    def wait(self, home: SlotHome, sender: Sender, error: FFError | None) -> None:
        """Let the writers of a slot wait after an error, or for the first connection; then they go on.

        Writers that have something in flight may still be with a sender that the slot has left, also while they wait.
        """
        if self._nodes.stopped:
            return
        if home.outbox is not sender:
            sender.withdraw(home)
            return
        self.recover_soon(home, sender, error)
        home.hold()

    def recover_soon(
        self, home: SlotHome, sender: Sender | None = None, error: FFError | None = None
    ) -> None:
        """Find the node of a slot, and let it have the writers; *error* is what *sender* has met."""
        if self._nodes.stopped:
            return
        home.recovering = True
        _ = self._nodes.spawn(self._recover(home, sender, error))

    async def _recover(self, home: SlotHome, sender: Sender | None, error: FFError | None) -> None:
        """Back off; find the node again, connect, or load the library if needed; fail the writers without retries."""
        try:
            while True:
                if error is not None:
                    if sender is not None:
                        _transport.name_refuser(error, sender.node.reached)
                    pause = home.retries.pause(error)
                    if pause is None:
                        home.fail(error)
                        return
                    if sender is not None:
                        self._note(sender.node, error)
                    await asyncio.sleep(pause)
                    if not isinstance(error, Redirected):
                        await self._nodes.settled()
                try:
                    sender = self._of(home.slot)
                    await sender.node.shared.connected()
                    if isinstance(error, FunctionMissing):
                        await sender.node.load()
                except FFError as failure:
                    error = failure
                else:
                    return
        finally:
            home.recovering = False
            if sender is not None:
                home.lead_to(sender)

    def _note(self, node: Node, error: FFError) -> None:
        self._nodes.failed(node, error)
        if isinstance(error, NotPrimary) and node.shared.connection is not None:
            # Connect again: the host name may resolve to the new primary.
            node.shared.connection.abort()

    def store_soon(self) -> None:
        """Begin to store all that is written, without waiting."""
        for writer in list(self.writers):
            writer._seal_soon()

    @property
    def stored(self) -> bool:
        """Whether all that is written is stored, or never will be."""
        return all(writer._failure is not None or writer._idle for writer in list(self.writers))

    def stop(self) -> None:
        """Fail every writer, since the backend is closed."""
        for writer in list(self.writers):
            writer._fail(WriterClosed())
        for outbox in (*self._senders.values(), *(home.waiting for home in self._homes.values())):
            outbox.forget()

    def _finish_soon(self) -> None:
        """Store what is written at the end of the interpreter, where the loop has not ended before."""
        if self.stored or self._loop.is_closed():
            return
        if self._loop.is_running():
            # On another thread.
            self._loop.call_soon_threadsafe(self.store_soon)
        else:
            with contextlib.suppress(WrongLoop):
                self.check_thread()
                self._loop.run_until_complete(self._store(time.monotonic() + _process.EXIT_S))

    async def _store(self, until: float) -> None:
        self.store_soon()
        while time.monotonic() < until and not self.stored:  # noqa: ASYNC110 - there is no one event
            await asyncio.sleep(_EXIT_LOOK_S)

    def _finished(self) -> bool:
        return not self._loop.is_running() or self.stored

    def _warn_of_losses(self) -> None:
        warn_of_losses(list(self.writers))

    def _forked(self) -> None:
        """Fail every writer in a forked child."""
        for writer in list(self.writers):
            writer._forked()


def waiting(
    make: Callable[Concatenate[SharedWriter, P], Wait[T]],
) -> Callable[Concatenate[Writer, P], Coroutine[Any, Any, T]]:
    """Return a writer's method that performs a wait of the core."""

    async def method(self: Writer, /, *args: P.args, **kwargs: P.kwargs) -> T:
        self._pool._check_loop()
        return await self._wait(make(self, *args, **kwargs))

    return dressed("Writer", method, make)


class Writer(SharedWriter):
    """A stream of frames into one attempt. Made by :meth:`ff_fast.aio.ValkeyBackend.open_writer`.

    :meth:`write` is a plain call that never waits; it is made on the backend's loop.
    """

    def __init__(
        self,
        state: writer_core.WriterState,
        senders: Senders,
        pool: Pool,
        witness: Callable[[Ask], Awaitable[None]],
    ) -> None:
        self._senders = senders
        self._witness = witness
        self._pool = pool
        self._waiters: list[asyncio.Future[None]] = []
        super().__init__(state, senders.home(keys.key_slot(state.attempt.stream_keys[0])))
        senders.writers.add(self)

    def _on_lost_opening(self) -> None:
        if not self._reopening:
            self._reopening = True
            self._opener = self._pool._spawn(self._reopen())

    async def _reopen(self) -> None:
        try:
            await self._pool._run(Call(self._open_again))
        except FFError as error:
            self._fail(error)

    def _on_linger(self) -> None:
        self._pool._check_thread()
        self._senders.linger(self)

    def _forked(self) -> None:
        """Fail in a forked child, without ``unstored``: the parent still stores the frames."""
        self._waiters.clear()
        self._fail(ForkedClient(), hand_back=False)

    def _on_progress(self) -> None:
        for waiter in self._waiters:
            _notify(waiter)

    async def _wait(self, wait: Wait[T]) -> T:
        loop = asyncio.get_running_loop()
        deadline = None if wait.timeout_s is None else loop.time() + wait.timeout_s
        await self._progress(wait, loop, deadline)
        if wait.level is not None and self._lacks(wait.level, wait.last):
            await self._reach(wait.level, deadline)
        return wait.value()

    async def _reach(self, level: Level, deadline: float | None) -> None:
        """Wait until what is stored has reached *level*."""
        ask = self._question(level, deadline)
        while True:
            await self._witness(ask)
            if not self._asks_again(ask, deadline):
                return
            if ask.failure is not None:
                await asyncio.sleep(durability.AGAIN_S)

    async def _progress(
        self, wait: Wait[Any], loop: asyncio.AbstractEventLoop, deadline: float | None
    ) -> None:
        while not wait.done():
            if self.error is not None:
                raise copy.copy(self.error)
            if deadline is not None and loop.time() >= deadline:
                raise DeadlineExceeded
            waiter: asyncio.Future[None] = loop.create_future()
            timer = None if deadline is None else loop.call_at(deadline, _notify, waiter)
            self._waiters.append(waiter)
            self._has_waiters = True
            try:
                await waiter
            finally:
                if timer is not None:
                    timer.cancel()
                self._waiters.remove(waiter)
                self._has_waiters = bool(self._waiters)

    drain = waiting(writer_core.drain)
    flush = waiting(writer_core.flush)
    close = waiting(writer_core.close)

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
        # The block's own error is the cause; the writer's stays in `error`, with its unstored frames.
        with contextlib.suppress(FFError):
            # Bounded, so that an interrupted block ends soon.
            await self.close(self._pool._timeout_s)


def _notify(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
