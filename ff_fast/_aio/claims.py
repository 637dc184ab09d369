"""Claims of the asyncio shell: for each kind of work one task waits on the server, for all that wait.

Claims that do not wait ask together as well, where several do at the same time.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from ff_fast import _transport
from ff_fast._aio.connection import run_steps
from ff_fast._aio.nodes import Own
from ff_fast._core.steps import Retries
from ff_fast.errors import FFError

if TYPE_CHECKING:
    from ff_fast._aio.nodes import Nodes
    from ff_fast._core.line import Line
    from ff_fast._core.steps import AwaitHint


class Waits:
    """The lines of a backend in which claims wait. Each has a task as long as it is not empty."""

    def __init__(self, owner: Nodes) -> None:
        self._nodes = owner
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
            _ = self._nodes.spawn(self._serve(step))
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
        line, owner = step.line, self._nodes
        own = Own(owner, blocks_only=True) if step.blocks else None
        try:
            while line.waiting:
                request = owner.caller(Retries(owner.config.retry), own=own)
                await run_steps(step.serve(None), request)
        except FFError as error:
            line.fail(error)
        except BaseException:
            # The backend closes.
            line.fail(_transport.closed_error())
            raise
        finally:
            self._served.discard(line)
            if own is not None:
                own.release()
