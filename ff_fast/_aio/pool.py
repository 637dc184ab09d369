"""The connections of one backend: what runs on them and is tried again, the loop it happens on, and their end."""

from __future__ import annotations

import asyncio
import copy
import os
import threading
import time
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from ff_fast import _transport
from ff_fast._aio.connection import Channel, drive
from ff_fast._core import ops
from ff_fast._core.steps import Flow, Retries, Source, Step
from ff_fast.errors import FFError, ForkedClient, Unavailable, WrongLoop

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine

    from ff_fast._core import operations as _arguments
    from ff_fast.types import BackendConfig

T = TypeVar("T")

# More calls than this wait their turn on one connection: the batches of the writers behind them grow meanwhile.
CALLS_IN_FLIGHT = 256


class Shared:
    """The connection that calls and writers share.

    Attributes:
        channel: None until it is connected, and while it is lost.
        closing: It will not be connected again.
        on_room: Called when more may be sent.
        on_lost: Called when the connection is lost.
    """

    def __init__(
        self,
        connect: Callable[[], Awaitable[Channel]],
        spawn: Callable[[Coroutine[Any, Any, Channel]], asyncio.Task[Channel]],
        timeout_s: float,
    ) -> None:
        self._connect_one = connect
        self._spawn = spawn
        self._timeout_s = timeout_s
        self._loop = asyncio.get_running_loop()
        self._connecting: asyncio.Task[Channel] | None = None
        self._turn = asyncio.Semaphore(CALLS_IN_FLIGHT)
        self._watch: asyncio.TimerHandle | None = None
        self.channel: Channel | None = None
        self.closing = False
        self.on_room: Callable[[], None] | None = None
        self.on_lost: Callable[[], None] | None = None

    def watch_soon(self) -> None:
        """Look after the time of a request whether the server has answered."""
        if self._watch is None:
            self._watch = self._loop.call_later(self._timeout_s, self._watch_now)

    def _watch_now(self) -> None:
        """A server that is silent while it owes replies is taken for lost."""
        self._watch = None
        channel = self.channel
        if channel is None or not channel.receivers:
            return
        if time.monotonic() - channel.silent_since >= self._timeout_s:
            channel.abort()
        else:
            self.watch_soon()

    def _lost(self, channel: Channel) -> None:
        if self.channel is channel:
            self.channel = None
            if self.on_lost is not None:
                self.on_lost()

    async def connected(self) -> Channel:
        """The connection, made again where it was lost: once, for all who wait for it."""
        if self.channel is not None and not self.channel.closed:
            return self.channel
        if self.closing:
            raise _transport.closed_error()
        if self._connecting is None:
            self._connecting = self._spawn(self._connect())
        task = self._connecting
        # Not awaited itself: a caller that is cancelled would take it along.
        await asyncio.wait({task})
        if task.cancelled():
            raise _transport.closed_error()
        error = task.exception()
        if error is not None:
            raise copy.copy(error)
        return task.result()

    async def _connect(self) -> Channel:
        try:
            channel = await self._connect_one()
        finally:
            self._connecting = None
        if channel.closed:
            raise Unavailable
        channel.on_room = self.on_room
        lost = channel.on_lost

        def both(gone: Channel) -> None:
            if lost is not None:
                lost(gone)
            self._lost(gone)

        channel.on_lost = both
        self.channel = channel
        if self.on_room is not None:
            self.on_room()
        return channel

    async def run(self, flow: Flow[T]) -> T:
        """Drive an operation of several steps to its value, on the shared connection."""
        return await drive(flow, self._ask)

    async def _ask(self, step: Step) -> list[object]:
        channel = await self.connected()
        try:
            async with asyncio.timeout(self._timeout_s) as waiting, self._turn:
                await channel.room()
                # From here on the deadline is that of the reply.
                waiting.reschedule(None)
                self.watch_soon()
                return await channel.ask(step, self._timeout_s)
        except FFError:
            raise
        except TimeoutError:
            raise _transport.not_sent_in_time() from None

    def stop(self) -> None:
        self.closing = True
        if self._watch is not None:
            self._watch.cancel()
        if self.channel is not None:
            self.channel.abort()


class Connections:
    """Connections to one server, on the loop that made them: one that calls and writers share, and others apart."""

    def __init__(self, config: BackendConfig) -> None:
        self.config = config
        self._loop = asyncio.get_running_loop()
        self._pid = os.getpid()
        self._thread = threading.get_ident()
        self._closed = False
        self._timeout_s = _transport.request_timeout_s(config)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._own: set[Channel] = set()
        self._idle: list[Channel] = []
        self._shared = Shared(self._connect, self._spawn, self._timeout_s)

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._closed

    async def close(self) -> None:
        """Close every connection; what waits for a reply there ends with an error."""
        self._closed = True
        if self._pid != os.getpid():
            # The sockets and the loop's selector are shared with the parent, which goes on using them.
            return
        self._check_loop()
        # All that matters happens before the first wait, in which a caller may be cancelled.
        tasks, channels = list(self._tasks), list(self._own)
        self._stop()
        for task in tasks:
            task.cancel()
        for channel in channels:
            channel.abort()
        if tasks:
            await asyncio.wait(tasks)
        for channel in channels:
            await channel.gone()

    def _stop(self) -> None:
        """End what goes on, without waiting."""
        self._shared.stop()

    def _spawn(self, coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._reap)
        return task

    def _reap(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            # Whoever waits for it sees the error too; they may all have been cancelled.
            error = task.exception()
            if error is not None and not isinstance(error, FFError):
                self._loop.call_exception_handler(
                    {"message": "A task of ff_fast failed.", "exception": error, "task": task}
                )

    def _check_loop(self) -> None:
        if self._pid != os.getpid():
            raise ForkedClient
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            raise WrongLoop from None
        if loop is not self._loop:
            raise WrongLoop

    def _check_thread(self) -> None:
        """Of `write`: another thread or loop would not wake ours; a loop that stands still finds it when it goes on."""
        if self._thread != threading.get_ident() or self._loop.is_closed():
            raise WrongLoop
        if asyncio._get_running_loop() not in (self._loop, None):
            raise WrongLoop

    def _check(self) -> None:
        self._check_loop()
        if self._closed:
            raise _transport.closed_error()

    async def _connect(self) -> Channel:
        channel = Channel()
        await channel.open(self.config)
        self._own.add(channel)
        channel.on_lost = self._own.discard
        failure: FFError
        try:
            await drive(
                _transport.ensure_library(), lambda step: channel.ask(step, self._timeout_s)
            )
        except FFError as error:
            failure = _transport.connect_error(error, self.config)
        except BaseException:
            channel.abort()
            raise
        else:
            return channel
        channel.abort()
        raise failure

    async def _acquire(self) -> Channel:
        self._check()
        while self._idle:
            channel = self._idle.pop()
            if not channel.closed:
                return channel
        return await self._connect()

    def _release(self, channel: Channel) -> None:
        """Give back a connection that owes no reply; one that does is dropped."""
        if channel.closed or channel.receivers or self._closed:
            channel.abort()
        else:
            self._idle.append(channel)

    async def _run_apart(self, flow: Flow[T]) -> T:
        channel = await self._acquire()
        try:
            return await drive(flow, lambda step: channel.ask(step, self._timeout_s))
        finally:
            self._release(channel)

    async def _run(
        self, make: Callable[[], Flow[T]], *, repeatable: bool = True, own_connection: bool = False
    ) -> T:
        """Run an operation, again where it may be repeated, until the retries of the configuration are used up."""
        retries = Retries(self.config.retry, repeatable=repeatable)
        while True:
            self._check()
            if not repeatable:
                # Two turns of the loop: an end of the idle connection that the kernel knows of is then known here.
                await asyncio.sleep(0)
                await asyncio.sleep(0)
            flow = _transport.with_library(make)
            try:
                return await (self._run_apart(flow) if own_connection else self._shared.run(flow))
            except FFError as error:
                pause = None if self._closed else retries.pause(error)
                if pause is None:
                    raise
            await asyncio.sleep(pause)

    async def _do(self, call: _arguments.Call[T]) -> T:
        return await self._run(call.flow, repeatable=call.repeatable)

    async def _call(self, op: ops.Op[T]) -> T:
        return await self._run(lambda: ops.call(op), repeatable=op.repeatable)

    async def _follow(
        self, core: Source, read: Callable[[], Flow[list[T]]]
    ) -> AsyncGenerator[T, None]:
        """Yield what *core* reads, on a connection of its own, until it has ended."""
        channel: Channel | None = None
        retries = Retries(self.config.retry, patient=True)
        try:
            while not core.ended:
                try:
                    if channel is None:
                        channel = await self._acquire()
                    ask = partial(channel.ask, timeout=self._timeout_s)
                    items = await drive(_transport.with_library(read), ask)
                except FFError as error:
                    pause = retries.pause(error)
                    if pause is None or self._closed:
                        raise
                    if channel is not None:
                        channel.abort()
                        channel = None
                else:
                    retries.reset()
                    for item in items:
                        yield item
                    continue
                core.restart()
                await asyncio.sleep(pause)
        finally:
            if channel is not None:
                self._release(channel)
