"""Claims of the blocking shell: of the threads that wait for the same kind of work, one waits on the server for all."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING

from ff_fast._core.claiming import LOOK_EVERY_S
from ff_fast._sync.connection import run_steps
from ff_fast.errors import FFError

if TYPE_CHECKING:
    from ff_fast._core.steps import AwaitHint
    from ff_fast._sync.nodes import Requests


def wait_in_line(requests: Requests, step: AwaitHint) -> None:
    """Wait in line, and on the server for the whole line where nobody else does.

    While another thread waits for the line, the claim holds no connection.

    Args:
        requests: Sends the steps that serve the line.
        step: The claim that waits, and its line.
    """
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
                _serve(requests, step)
            else:
                requests.release()
                # Bounded: an interrupt may keep the leader from passing on its place.
                bell.acquire(timeout=min(left, LOOK_EVERY_S))
    finally:
        line.leave(claim)
        line.resign(claim)
    if claim.failure is not None:
        raise claim.failure


def _serve(requests: Requests, step: AwaitHint) -> None:
    claim, line = step.claim, step.line
    try:
        run_steps(step.serve(claim), requests.request)
    except FFError as error:
        line.leave(claim)
        line.fail(error)
        raise
