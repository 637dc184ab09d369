"""Claims of the blocking shell: of the threads that wait for the same kind of work, one waits on the server for all."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING, Protocol, Self

from ff_fast._core.claiming import LOOK_EVERY_S
from ff_fast._sync.connection import run_steps
from ff_fast.errors import FFError

if TYPE_CHECKING:
    from ff_fast._core.steps import AwaitHint, Step
    from ff_fast._sync.connection import Connection


class Connections(Protocol):
    """The pool, as far as a claim needs it."""

    def _acquire(self) -> Connection: ...

    def _release(self, connection: Connection) -> None: ...


class Claiming:
    """Carries out the steps of one claim. It holds a connection, but for the time in which another thread waits for it."""

    def __init__(self, pool: Connections) -> None:
        self._pool = pool
        self._connection: Connection | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._release()

    def _release(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            self._pool._release(connection)

    def connection(self) -> Connection:
        """Return the connection of the claim; take one if it holds none."""
        if self._connection is None:
            self._connection = self._pool._acquire()
        return self._connection

    def request(self, step: Step) -> list[object]:
        """Send the commands of *step*, and return their replies."""
        return self.connection().request(step)

    def wait(self, step: AwaitHint) -> None:
        """Wait in line, and on the server for the whole line where nobody else does."""
        claim, line = step.claim, step.line
        bell = threading.Lock()
        bell.acquire()

        def wake() -> None:
            with contextlib.suppress(RuntimeError):
                # It rings already.
                bell.release()

        claim.wake = wake
        try:
            line.join(claim)
            while not claim.told and (left := claim.left()) > 0:
                if line.lead(claim):
                    self._serve(step)
                else:
                    self._release()
                    # Bounded: an interrupt may keep the leader from passing on its place.
                    bell.acquire(timeout=min(left, LOOK_EVERY_S))
        finally:
            line.leave(claim)
            line.resign(claim)
        if claim.failure is not None:
            raise claim.failure

    def _serve(self, step: AwaitHint) -> None:
        claim, line = step.claim, step.line
        try:
            run_steps(step.serve(claim), self.connection().request)
        except FFError as error:
            line.leave(claim)
            line.fail(error)
            raise
