"""Claims of the asyncio shell: for each kind of work one task waits on the server, for all that wait.

Claims that do not wait ask together as well, where several do at the same time.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from ff_fast import _transport
from ff_fast._aio.connection import run_steps
from ff_fast._core import claiming
from ff_fast.errors import FFError

if TYPE_CHECKING:
    from ff_fast._aio.pool import Pool
    from ff_fast._core.line import Line
    from ff_fast._core.ready import Offer
    from ff_fast._core.steps import AwaitHint


class Waits:
    """The lines of a backend in which claims wait. Each has a task as long as it is not empty."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._loop = asyncio.get_running_loop()
        self._served: set[Line] = set()

    async def wait(self, step: AwaitHint) -> None:
        """Wait in line."""
        claim, offer, line = step
        waiter = self._loop.create_future()

        def wake() -> None:
            if not waiter.done():
                waiter.set_result(None)

        claim.wake = wake
        line.join(claim)
        if line not in self._served:
            self._served.add(line)
            _ = self._pool._spawn(self._serve(offer, line))
        timer = None
        if line is offer.line:
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

    async def _serve(self, offer: Offer, line: Line) -> None:
        pool = self._pool
        connection = None
        try:
            if line is offer.rush:
                while line.waiting:
                    steps = claiming.serve_at_once(pool._deployment, offer)
                    await run_steps(steps, pool._shared.request)
                return
            connection = await pool._acquire()
            request = pool._requests_on(connection)
            while line.waiting:
                await run_steps(claiming.serve(pool._deployment, offer), request)
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
