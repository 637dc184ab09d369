"""The connection pool of one backend, the retries of its calls, and the checks of loop and process."""

from __future__ import annotations

import asyncio
import copy
import os
import threading
import time
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from ff_fast import _transport
from ff_fast._aio.claims import Waits
from ff_fast._aio.connection import Connection, run_steps
from ff_fast._aio.credentials import Credentials
from ff_fast._aio.hub import Hub
from ff_fast._aio.sentinel import resolve
from ff_fast._core import claiming
from ff_fast._core.deployment import Deployment
from ff_fast._core.steps import Retries
from ff_fast.errors import FFError, ForkedClient, FunctionMissing, Unavailable, WrongLoop

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

    from ff_fast._core.claiming import Claim
    from ff_fast._core.operations import Call
    from ff_fast._core.steps import Step
    from ff_fast.types import BackendConfig

T = TypeVar("T")

# Bound of the requests in flight on the shared connection; beyond it calls queue, and open batches grow.
CALLS_IN_FLIGHT = 256


async def _result_of(task: asyncio.Task[T]) -> T:
    """Wait for a task of the backend that several callers share, and return its result or raise its error."""
    # Awaiting the task directly would cancel it along with a cancelled caller.
    await asyncio.wait({task})
    if task.cancelled():
        raise _transport.closed_error()
    error = task.exception()
    if error is not None:
        raise copy.copy(error)
    return task.result()


class SharedConnection:
    """The connection that calls and writers share.

    Attributes:
        connection: None before the first connect, and after a loss until the next one.
        closing: True when the backend is closed; the connection is not made again.
        on_can_write: Called when more may be sent.
        on_lost: Called when the connection is lost.
    """

    def __init__(
        self,
        connect: Callable[[], Awaitable[Connection]],
        spawn: Callable[[Coroutine[Any, Any, Connection]], asyncio.Task[Connection]],
        timeout_s: float,
    ) -> None:
        self._connect_one = connect
        self._spawn = spawn
        self._timeout_s = timeout_s
        self._loop = asyncio.get_running_loop()
        self._connecting: asyncio.Task[Connection] | None = None
        self._turn = asyncio.Semaphore(CALLS_IN_FLIGHT)
        self._watch: asyncio.TimerHandle | None = None
        self.connection: Connection | None = None
        self.closing = False
        self.on_can_write: Callable[[], None] | None = None
        self.on_lost: Callable[[], None] | None = None

    def watch_soon(self) -> None:
        """Check for a silent server after one request timeout."""
        if self._watch is None:
            self._watch = self._loop.call_later(self._timeout_s, self._watch_now)

    def _watch_now(self) -> None:
        """Abort the connection if the server owes replies and has sent nothing for a request timeout."""
        self._watch = None
        connection = self.connection
        if connection is None or not connection.receivers:
            return
        if time.monotonic() - connection.silent_since >= self._timeout_s:
            connection.abort_silent(connection.silent_since)
        else:
            self.watch_soon()

    def _lost(self, connection: Connection) -> None:
        if self.connection is connection:
            self.connection = None
            if self.on_lost is not None:
                self.on_lost()

    async def connected(self) -> Connection:
        """Return the connection; make it again if it was lost. Concurrent callers share one attempt."""
        if self.connection is not None and not self.connection.closed:
            return self.connection
        if self.closing:
            raise _transport.closed_error()
        if self._connecting is None:
            self._connecting = self._spawn(self._connect())
        return await _result_of(self._connecting)

    async def _connect(self) -> Connection:
        try:
            connection = await self._connect_one()
        finally:
            self._connecting = None
        if connection.closed:
            raise Unavailable
        connection.on_can_write = self.on_can_write
        connection.on_lost.append(self._lost)
        self.connection = connection
        if self.on_can_write is not None:
            self.on_can_write()
        return connection

    async def request(self, step: Step, longest: float = float("inf")) -> list[object]:
        """Send the commands of *step* in turn with other callers, and return their replies, in order.

        Args:
            step: The step.
            longest: Longest time for the replies in seconds, where it is shorter than the request timeout.
        """
        connection = await self.connected()
        began = time.monotonic()
        try:
            async with asyncio.timeout(self._timeout_s) as waiting, self._turn:
                await connection.wait_writable()
                # The queueing deadline is met; the replies have a deadline of their own.
                waiting.reschedule(None)
                self.watch_soon()
                return await connection.request(step, min(self._timeout_s, longest))
        except FFError:
            raise
        except TimeoutError:
            late = _transport.not_sent_in_time()
            # Those before it wait for a connection that may have died.
            late.silent = connection.heard_at <= began
        raise late

    def stop(self) -> None:
        self.closing = True
        if self._watch is not None:
            self._watch.cancel()
        if self.connection is not None:
            self.connection.abort()


class Pool:
    """Connections to one server, on one loop: one shared by calls and writers, others for blocking reads and claims."""

    def __init__(self, config: BackendConfig) -> None:
        self.config = config
        self._loop = asyncio.get_running_loop()
        self._pid = os.getpid()
        self._thread = threading.get_ident()
        self._closed = False
        self._timeout_s = _transport.request_timeout_s(config)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._own: set[Connection] = set()
        # The most recently used is at the right.
        self._idle: deque[Connection] = deque()
        self._idle_timer: asyncio.TimerHandle | None = None
        # Claims under way, and the tasks that give back what others have left.
        self._claims: set[Claim] = set()
        self._giving_back: set[asyncio.Task[None]] = set()
        self._loading: asyncio.Task[None] | None = None
        provider = config.connection.credential_provider
        self._credentials = (
            None if provider is None else Credentials(provider, self._timeout_s, self._spawn)
        )
        self._deployment = Deployment(config.partitions, config.max_payload_bytes)
        self._shared = SharedConnection(self._connect, self._spawn, self._timeout_s)
        self._hub = Hub(
            self._connect, self._spawn, self._shared.request, self._timeout_s, config.retry
        )
        self._waits = Waits(self, self._shared.request)

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._closed

    async def close(self) -> None:
        """Close every connection; callers that wait for a reply get an error.

        What is written is stored first, and claims under way give back what they took, where that takes a short time.
        """
        self._closed = True
        if self._pid != os.getpid():
            # The parent still uses the sockets and the loop's selector, which a fork shares.
            return
        self._check_loop()
        try:
            if self._claims or self._giving_back or not self._stored():
                await self._finish()
        finally:
            # Everything is aborted before the next await, in which the caller may be cancelled.
            await self._abort()

    async def _finish(self) -> None:
        settling = self._loop.create_task(self._settle())
        try:
            await asyncio.shield(settling)
        except asyncio.CancelledError:
            # What a short wait does not give back waits until its lease lapses.
            await asyncio.wait({settling})
            raise
        finally:
            settling.cancel()

    async def _settle(self) -> None:
        """Wait for a short time until all is stored, and every claim under way has given back what it took."""
        for claim in self._claims:
            claim.abandoned = True
            claim.wake()
        self._store_soon()
        until = time.monotonic() + claiming.SETTLE_S
        while time.monotonic() < until and (  # noqa: ASYNC110 - there is no one event
            self._giving_back or any(each.unsettled for each in self._claims) or not self._stored()
        ):
            await asyncio.sleep(claiming.SETTLE_LOOK_S)

    def _store_soon(self) -> None:
        """Begin to store what is written."""

    def _stored(self) -> bool:
        """Whether all that is written is stored, or never will be."""
        return True

    async def _abort(self) -> None:
        tasks, connections = list(self._tasks), list(self._own)
        self._stop()
        for task in tasks:
            task.cancel()
        for connection in connections:
            connection.abort()
        if tasks:
            await asyncio.wait(tasks)
        for connection in connections:
            await connection.wait_closed()

    def _stop(self) -> None:
        """Abort the connections of calls and readers, without waiting."""
        self._shared.stop()
        self._hub.stop()
        if self._credentials is not None:
            self._credentials.stop()
        if self._idle_timer is not None:
            self._idle_timer.cancel()

    def _spawn(self, coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._reap)
        return task

    def _reap(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            # Reading the exception marks it as retrieved: all waiting callers may have been cancelled.
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
        """Check that `write` runs on the loop's thread: elsewhere it could not wake the loop."""
        if self._thread != threading.get_ident() or self._loop.is_closed():
            raise WrongLoop
        if asyncio._get_running_loop() not in (self._loop, None):
            raise WrongLoop

    def _check(self) -> None:
        self._check_loop()
        if self._closed:
            raise _transport.closed_error()

    async def _connect(self, role: str = "calls") -> Connection:
        connection = Connection()
        await connection.open(await resolve(self.config))
        if self._credentials is not None:
            self._credentials.opened_by(connection)
        self._own.add(connection)
        connection.on_lost.append(self._own.discard)
        connection.on_silent = self._on_silent
        try:
            await self._prepare(connection, role)
        except BaseException:
            connection.abort()
            raise
        return connection

    async def _prepare(self, connection: Connection, role: str | None = None) -> None:
        """Load the library if it is missing, and check the deployment; its errors are those of connecting."""
        try:
            await run_steps(self._deployment.prepare(role), self._requests_on(connection))
        except FFError as error:
            failure = _transport.connect_error(error, self.config)
        else:
            connection.ready = True
            return
        raise failure

    async def _load_library(self) -> None:
        """Load the library, which a reader has found missing; concurrent callers share one attempt."""
        if self._loading is None:
            self._loading = self._spawn(self._load_once())
        await _result_of(self._loading)

    async def _load_once(self) -> None:
        try:
            await self._prepare(await self._shared.connected())
        finally:
            self._loading = None

    def _on_silent(self, since: float) -> None:
        """Close the connections that owe nothing and were last heard of before another one fell silent."""
        for connection in list(self._own):
            if not connection.receivers and connection.heard_at < since:
                connection.abort()

    def _requests_on(self, connection: Connection) -> Callable[[Step], Awaitable[list[object]]]:
        return lambda step: connection.request(step, self._timeout_s)

    def _take_idle(self) -> Connection | None:
        self._check()
        while self._idle:
            connection = self._idle.pop()
            if not connection.closed:
                return connection
        return None

    async def _acquire(self) -> Connection:
        return self._take_idle() or await self._connect()

    def _release(self, connection: Connection, most: int = _transport.MAX_IDLE) -> None:
        """Give back a connection; one that owes a reply, or finds *most* idle ones, is dropped."""
        if connection.closed or connection.receivers or self._closed or len(self._idle) >= most:
            connection.abort()
        else:
            self._idle.append(connection)
        self._close_idle()

    def _close_idle(self) -> None:
        """Close the connections that have been idle for too long, and look again while there are others."""
        before = time.monotonic() - _transport.MAX_IDLE_S
        while self._idle and (self._idle[0].closed or self._idle[0].heard_at <= before):
            self._idle.popleft().abort()
        if self._idle and self._idle_timer is None and not self._closed:
            wait_s = self._idle[0].heard_at - before
            self._idle_timer = self._loop.call_later(wait_s, self._look_at_idle)

    def _look_at_idle(self) -> None:
        self._idle_timer = None
        self._close_idle()

    async def _run(self, call: Call[T], *, until: float = float("inf")) -> T:
        """Make a call that is of no use after *until*, in monotonic time; retry as configuration and call allow."""
        retries = Retries(self.config.retry, writes=call.writes)
        missing = False
        while True:
            if call.when_closed:
                self._check_loop()
            else:
                self._check()
            try:
                if missing:
                    await self._prepare(await self._shared.connected())
                if call.own_connection:
                    connection = await self._acquire()
                    try:
                        return await run_steps(call.steps(), self._requests_on(connection))
                    finally:
                        self._release(connection)
                request: Callable[[Step], Awaitable[list[object]]] = self._shared.request
                if until != float("inf"):
                    longest = _transport.longest_try_s(until)
                    request = partial(self._shared.request, longest=longest)
                # What a claim gives back is sent behind what it sent before, on the same connection.
                return await run_steps(call.steps(), request, self._waits.wait)
            except FFError as error:
                pause = None if self._closed else retries.pause(error)
                if pause is None:
                    retries.settle(error)
                    raise
                missing = isinstance(error, FunctionMissing)
            await asyncio.sleep(pause)
