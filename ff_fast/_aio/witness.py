"""Questions for a level of durability, one step for all writers that wait."""

from __future__ import annotations

import asyncio
import contextlib
import copy
from collections import deque
from functools import partial
from typing import TYPE_CHECKING

from ff_fast import _transport
from ff_fast._aio.connection import run_steps
from ff_fast._core import durability
from ff_fast.errors import FFError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from ff_fast._aio.pool import Pool
    from ff_fast._core.durability import Ask
    from ff_fast._core.steps import Step
    from ff_fast.types import Durability

# The server answers when the time is up, and says then how many replicas there are.
_MARGIN_S = 0.1


class Witness:
    """Asks one server whether what is stored has reached one level.

    One step is under way, and whoever comes meanwhile is in the next: the level that an earlier write has not reached, a
    later one has not either.
    """

    def __init__(
        self,
        pool: Pool,
        level: Durability,
        request: Callable[[Step], Awaitable[list[object]]],
    ) -> None:
        self._pool = pool
        self._level = level
        self._request = request
        self._asks: deque[Ask] = deque()
        self._serving: asyncio.Task[None] | None = None

    async def answer(self, ask: Ask) -> None:
        """Put a question, and wait until it has ended, or its time is up."""
        self._pool._check()
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[None] = loop.create_future()
        ask.begin()
        ask.wake = partial(_notify, waiter)
        self._asks.append(ask)
        if self._serving is None:
            self._serving = self._pool._spawn(self._serve())
        timer = loop.call_later(max(ask.left(), 0.0) + _MARGIN_S, _notify, waiter)
        try:
            await waiter
        finally:
            timer.cancel()
            with contextlib.suppress(ValueError):
                self._asks.remove(ask)

    async def _serve(self) -> None:
        asked: list[Ask] = []
        try:
            while self._asks:
                asked = [self._asks.popleft() for _ in range(min(len(self._asks), durability.ASKS))]
                try:
                    await run_steps(durability.ask(self._level, asked), self._request)
                except FFError as error:
                    self._end(asked, error)
                else:
                    self._end(asked, None)
        except BaseException:
            self._end([*asked, *self._asks], _transport.closed_error())
            raise
        finally:
            self._serving = None

    def _end(self, asked: list[Ask], error: FFError | None) -> None:
        for each in asked:
            each.end(None if error is None else copy.copy(error))


def _notify(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
