"""Questions for a level of durability, one step for all writers that wait."""

from __future__ import annotations

import asyncio
import contextlib
import copy
from collections import deque
from functools import partial
from typing import TYPE_CHECKING

from ff_fast import _transport
from ff_fast._aio.connection import BROKEN, LOST
from ff_fast._core.durability import ASKS, Question
from ff_fast.errors import FFError, OutcomeUnknown, ProtocolError

if TYPE_CHECKING:
    from ff_fast._aio.connection import Connection
    from ff_fast._aio.nodes import Node, Nodes
    from ff_fast._core.durability import Ask
    from ff_fast.types import Durability

# The server answers when the time is up, and says then how many replicas there are.
_MARGIN_S = 0.1


class Witness:
    """Asks one server whether what is stored has reached one level.

    One step is under way, and whoever comes meanwhile is in the next: the level that an earlier write has not reached, a
    later one has not either.
    """

    def __init__(self, nodes: Nodes, node: Node, level: Durability) -> None:
        self._nodes = nodes
        self._node = node
        self._level = level
        self._asks: deque[Ask] = deque()
        self._busy = False
        self._connecting: asyncio.Task[None] | None = None

    async def answer(self, ask: Ask) -> None:
        """Put a question, and wait until it has ended, or its time is up."""
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[None] = loop.create_future()
        ask.begin()
        ask.wake = partial(_notify, waiter)
        self._asks.append(ask)
        timer = loop.call_later(max(ask.left(), 0.0) + _MARGIN_S, _notify, waiter)
        try:
            if not self._busy:
                self._go_on()
            await waiter
        finally:
            timer.cancel()
            with contextlib.suppress(ValueError):
                self._asks.remove(ask)

    def _go_on(self) -> None:
        """Put the questions that wait, if there are any."""
        self._busy = False
        if not self._asks:
            return
        connection = self._node.take_idle()
        self._busy = True
        if connection is None:
            self._connecting = self._nodes.spawn(self._connect())
        else:
            self._put(connection)

    async def _connect(self) -> None:
        try:
            connection = await self._node.connect()
        except BaseException as error:
            failure = error if isinstance(error, FFError) else _transport.closed_error()
            self._nodes.failed(self._node, failure)
            asked, self._asks = self._asks, deque()
            self._busy = False
            for each in asked:
                each.end(copy.copy(failure))
            if failure is not error:
                raise
        else:
            self._put(connection)

    def _put(self, connection: Connection) -> None:
        asked = [self._asks.popleft() for _ in range(min(len(self._asks), ASKS))]
        if not asked:
            # Whoever has asked is gone.
            self._busy = False
            self._node.release(connection)
            return
        _Put(self, connection, Question(self._level, asked)).send(self._nodes.timeout_s)

    def _answered(
        self, connection: Connection, replies: list[object], failure: FFError | None
    ) -> None:
        if failure is not None:
            self._nodes.failed(self._node, failure)
        self._nodes.look_at(self._node, connection, replies)
        self._node.release(connection)
        self._go_on()


class _Put:
    """A question on its way; as a function it receives the replies."""

    def __init__(self, witness: Witness, connection: Connection, question: Question) -> None:
        self._witness = witness
        self._connection = connection
        self._question = question
        self._missing = 0
        self._refusals: list[object] = []
        self._wanted = True
        self._failure: FFError | None = None

    def send(self, timeout_s: float) -> None:
        step = self._witness._nodes.as_sent(self._question.step)
        self._missing = len(step.commands)
        # A server that has fallen silent.
        late = _transport.wait_s(timeout_s, step)
        self._timer = asyncio.get_running_loop().call_later(late, self._connection.abort)
        try:
            self._connection.send(step.request, [self] * self._missing)
        except FFError as error:
            self._finish(error)

    def __call__(self, reply: object) -> None:
        """Receive one reply."""
        self._missing -= 1
        if reply is LOST or reply is BROKEN:
            if self._wanted:
                self._failure = ProtocolError() if reply is BROKEN else OutcomeUnknown()
        elif self._failure is None:
            if isinstance(reply, Exception):
                self._refusals.append(reply)
            self._wanted = self._question.take(reply)
            if not self._wanted and self._missing:
                # Nobody waits for the server's wait, which would keep the next question waiting.
                self._connection.abort()
                return
        if self._missing == 0:
            self._finish(self._failure)

    def _finish(self, failure: FFError | None) -> None:
        self._timer.cancel()
        if failure is not None:
            self._question.fail(failure)
        self._witness._answered(self._connection, self._refusals, failure)


def _notify(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
