"""Claims of the asyncio shell: for each kind of work one task waits on the server, for all that wait.

Claims that do not wait ask together as well, where several do at the same time.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Protocol

from ff_fast import _transport
from ff_fast._aio.connection import run_steps
from ff_fast.errors import FFError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

    from ff_fast._aio.connection import Connection
    from ff_fast._core.line import Line
    from ff_fast._core.steps import AwaitHint, Step


class Connections(Protocol):
    """The pool, as far as claims need it."""

    async def _acquire(self) -> Connection: ...

    def _release(self, connection: Connection) -> None: ...

    def _requests_on(self, connection: Connection) -> Callable[[Step], Awaitable[list[object]]]: ...

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]: ...


class Waits:
    """The lines of a backend in which claims wait. Each has a task as long as it is not empty."""

    def __init__(
        self, pool: Connections, request: Callable[[Step], Awaitable[list[object]]]
    ) -> None:
        self._pool = pool
        self._request = request
        self._loop = asyncio.get_running_loop()
        self._served: set[Line] = set()

    async def wait(self, step: AwaitHint) -> None:
        """Wait in line."""
        claim, line = step.claim, step.line
        waiter = self._loop.create_future()

        def wake() -> None:
            if not waiter.done():
                waiter.set_result(None)

        claim.wake = wake
        line.join(claim)
        if line not in self._served:
            self._served.add(line)
            _ = self._pool._spawn(self._serve(step))
        timer = None
        if step.blocks:
            timer = self._loop.call_later(max(claim.left(), 0.0), wake)
        try:
            if not claim.told:
                await waiter
        finally:
            if timer is not None:
                timer.cancel()
            line.leave(claim)
        if claim.failure is not None:
            raise claim.failure

    async def _serve(self, step: AwaitHint) -> None:
        line, pool, request = step.line, self._pool, self._request
        connection = None
        try:
            if step.blocks:
                connection = await pool._acquire()
                request = pool._requests_on(connection)
            while line.waiting:
                await run_steps(step.serve(None), request)
        except FFError as error:
            line.fail(error)
        except BaseException:
            # The backend closes.
            line.fail(_transport.closed_error())
            raise
        finally:
            self._served.discard(line)
            if connection is not None:
                pool._release(connection)
