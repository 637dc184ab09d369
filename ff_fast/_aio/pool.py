"""The connection pool of one backend, the retries of its calls, and the checks of loop and process."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
import weakref
from math import inf
from typing import TYPE_CHECKING, Any, TypeVar

from ff_fast import _process, _transport
from ff_fast._aio.claims import Waits
from ff_fast._aio.connection import Connection, run_steps
from ff_fast._aio.credentials import Credentials
from ff_fast._aio.hub import Hub, Hubs
from ff_fast._aio.nodes import Nodes, Own
from ff_fast._aio.sentinel import Watch
from ff_fast._core import claiming
from ff_fast._core.deployment import Deployment
from ff_fast._core.steps import Retries
from ff_fast.errors import FFError, ForkedClient, FunctionMissing, NotPrimary, WrongLoop

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Coroutine

    from ff_fast._core.claiming import Claim
    from ff_fast._core.operations import Call
    from ff_fast.types import BackendConfig

T = TypeVar("T")


class Pool:
    """Connections to the servers, on one loop: for each one shared by calls and writers, others for pushes and waits."""

    def __init__(self, config: BackendConfig) -> None:
        self.config = config
        self._loop = asyncio.get_running_loop()
        self._pid = os.getpid()
        self._thread = threading.get_ident()
        self._closed = False
        self._timeout_s = _transport.request_timeout_s(config)
        self._tasks: set[asyncio.Task[Any]] = set()
        # Claims under way, and the tasks that give back what others have left.
        self._claims: set[Claim] = set()
        self._giving_back: set[asyncio.Task[None]] = set()
        provider = config.connection.credential_provider
        self._credentials = (
            None if provider is None else Credentials(provider, self._timeout_s, self._spawn)
        )
        self._deployment = Deployment.of(config)
        self._watch: Watch | None = None
        if config.connection.sentinel_service is not None:
            self._watch = Watch(config, self._switched)
        self._nodes = Nodes(config, self._deployment, self._spawn, self._opened)
        self._hub = self._make_hub()
        self._waits = Waits(self._nodes)
        # A loop closes its asynchronous generators before it ends, as asyncio.run() does.
        ends = _until_loop_ends(weakref.ref(self))
        self._loop_end = weakref.finalize(self, _close_now, ends)
        self._loop_end.atexit = False
        with contextlib.suppress(StopIteration):
            ends.__anext__().send(None)

    def _make_hub(self) -> Hub | Hubs:
        nodes, retry = self._nodes, self.config.retry
        if nodes.topology is not None:
            return Hubs(nodes, retry)
        first = nodes.first
        return Hub(first.connect, self._spawn, first.shared.request, self._timeout_s, retry)

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._closed

    async def close(self) -> None:
        """Close every connection; callers that wait for a reply get an error.

        What is written is stored first, and claims under way give back what they took, where that takes a short time.
        """
        self._closed = self._nodes.closed = True
        self._loop_end()
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

    async def _end_with_loop(self) -> None:
        """Store what is written, within a bound, and close: the loop ends, and nobody has closed the backend."""
        self._loop_end.detach()
        if self._pid != os.getpid():
            return
        self._store_soon()
        until = time.monotonic() + _process.EXIT_S
        while time.monotonic() < until and not self._stored():  # noqa: ASYNC110 - there is no one event
            await asyncio.sleep(claiming.SETTLE_LOOK_S)
        await self.close()

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
        tasks = list(self._tasks)
        connections = [each for node in self._nodes.all() for each in node.connections]
        self._stop()
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        for connection in connections:
            await connection.wait_closed()

    def _stop(self) -> None:
        """Abort the connections, without waiting."""
        self._nodes.stop()
        self._hub.stop()
        if self._watch is not None:
            self._watch.stop()
        if self._credentials is not None:
            self._credentials.stop()

    def _opened(self, connection: Connection) -> None:
        if self._credentials is not None:
            self._credentials.opened_by(connection)
        if self._watch is not None and not self._watch.begun:
            self._watch.begun = True
            _ = self._spawn(self._watch.run())

    def _switched(self, address: tuple[str, int]) -> None:
        """Give up the connections that lead elsewhere than to the new primary."""
        for node in self._nodes.all():
            for connection in list(node.connections):
                if connection.address != address:
                    connection.abort()

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

    async def _load_library(self) -> None:
        """Load the library, which a reader has found missing; concurrent callers share one attempt."""
        await self._nodes.load()

    def _take_idle(self, slot: int | None = None) -> Connection | None:
        self._check()
        return self._nodes.of(slot).take_idle()

    async def _acquire(self, slot: int | None = None) -> Connection:
        self._check()
        return await self._nodes.of(slot).acquire()

    def _release(self, connection: Connection, most: int = _transport.MAX_IDLE) -> None:
        """Give back a connection; one that owes a reply, or finds *most* idle ones, is dropped."""
        assert connection.give_back is not None
        connection.give_back(connection, most)

    async def _run(self, call: Call[T], *, until: float = inf) -> T:
        """Make a call that is of no use after *until*, in monotonic time; retry as configuration and call allow."""
        retries = Retries(self.config.retry, writes=call.writes)
        missing = False
        while True:
            if call.when_closed:
                self._check_loop()
            else:
                self._check()
            used = self._nodes.first.shared.connection
            try:
                if missing:
                    await self._nodes.load()
                if call.own_connection:
                    own = Own(self._nodes)
                    try:
                        return await run_steps(call.steps(), self._nodes.caller(retries, own=own))
                    finally:
                        own.release()
                longest = inf if until == inf else _transport.longest_try_s(until)
                request = self._nodes.caller(retries, longest, replicas=not call.writes)
                # What a claim gives back is sent behind what it sent before, on the same connection.
                return await run_steps(call.steps(), request, self._waits.wait, self._nodes.alone)
            except FFError as error:
                if self._nodes.topology is None:
                    _transport.name_refuser(error, self._nodes.first.reached)
                pause = None if self._closed else retries.pause(error)
                if pause is None:
                    retries.settle(error)
                    raise
                missing = isinstance(error, FunctionMissing)
                if isinstance(error, NotPrimary):
                    # A new connection finds the new primary.
                    self._nodes.first.shared.retire(used)
            await asyncio.sleep(pause)


async def _until_loop_ends(found: weakref.ref[Pool]) -> AsyncGenerator[None, None]:
    """Close a backend at the end of its loop."""
    try:
        yield
    finally:
        pool = found()
        if pool is not None and not pool._closed:
            await pool._end_with_loop()


def _close_now(ends: AsyncGenerator[None, None]) -> None:
    """Close the generator of a backend that is closed or gone, which waits for nothing."""
    with contextlib.suppress(StopIteration):
        ends.aclose().__await__().send(None)
