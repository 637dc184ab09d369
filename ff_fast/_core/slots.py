"""The slots of a worker: what each claims and when it rests, and how long handlers may run after a stop.

:func:`serve` decides and yields actions; a shell performs them.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from ff_fast._core import operations
from ff_fast._core.worker import Backend, Run
from ff_fast._log import named, say, say_seldom
from ff_fast.errors import (
    Corruption,
    FFError,
    InternalFunctionError,
    PermissionDenied,
    ProtocolError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from ff_fast.types import Handle


_FIRST_PAUSE_S = 0.25
_LONGEST_PAUSE_S = 5.0


class Serving(Backend, Protocol):
    """A backend, as far as the slots of a worker need it."""

    @property
    def _attending(self) -> Attending: ...


NOT_SUPERVISING = "This worker does not supervise: %s Let another process supervise, or pass supervise=False to run_worker."


class Attend(NamedTuple):
    """Run the handler for a claimed execution, and resume with the value of :func:`ff_fast._core.worker.attend`."""

    handle: Handle


def say_started(options: operations.WorkerOptions) -> None:
    say(
        logging.INFO,
        "Worker %s has started: lane %s, %d handlers at once.",
        options.worker_id,
        options.lane,
        options.concurrency,
        worker_id=options.worker_id,
    )


def say_stopped(options: operations.WorkerOptions, error: BaseException | None) -> None:
    """Say that a worker ends; by *error*, where it is no interrupt or exit."""
    if isinstance(error, Exception):
        text = "Worker %s of lane %s has ended with an error: %s"
        arguments = options.worker_id, options.lane, named(error)
        say(logging.ERROR, text, *arguments, worker_id=options.worker_id)
    else:
        text = "Worker %s of lane %s has stopped."
        say(logging.INFO, text, options.worker_id, options.lane, worker_id=options.worker_id)


class Attending:
    """The handlers that run on a backend, over all its workers, and whether the server answers them.

    Attributes:
        reached: Whether the server has answered when it was asked last for work, or who supervises; None before.
    """

    def __init__(self) -> None:
        self.reached: bool | None = None
        self._lock = threading.Lock()
        self._count = 0
        self._ended_at = float("-inf")
        self._asked_at = float("-inf")

    def __enter__(self) -> None:
        with self._lock:
            self._count += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._count -= 1
            self._ended_at = time.monotonic()

    def tell(self, reached: bool) -> None:
        """Note whether the server has answered."""
        self.reached = reached

    def idle_since(self, moment: float) -> bool:
        """Return whether no handler has run since *moment*, in monotonic time."""
        return not self._count and self._ended_at < moment

    def asks(self) -> bool:
        """Return whether it is time for one of the slots to ask what remains, and count it as asked."""
        with self._lock:
            now = time.monotonic()
            due = now >= self._asked_at + operations.CLAIM_WAIT_S
            if due:
                self._asked_at = now
            return due


class Drain:
    """How long handlers may run after a stop.

    Args:
        seconds: The time that they have; None has no limit.
        stop: The event that stops the worker; its attribute ``hurried``, if it has one, ends the time.
    """

    def __init__(self, seconds: float | None, stop: object = None) -> None:
        self._seconds = seconds
        self._stop = stop
        self._until: float | None = None
        self._hurried = False

    @property
    def limited(self) -> bool:
        """Whether there is a limit."""
        return self._seconds is not None

    def hurry(self) -> None:
        """Let the time be over."""
        self._hurried = True

    def over(self, *, stopping: bool) -> bool:
        """Return whether handlers are to be interrupted; the time begins with the first call that is *stopping*."""
        if self._seconds is None or not stopping:
            return False
        if self._until is None:
            self._until = time.monotonic() + self._seconds
        hurried = self._hurried or getattr(self._stop, "hurried", False)
        return hurried or time.monotonic() >= self._until


class Patience:
    """The pauses of one worker slot."""

    def __init__(self) -> None:
        self._next_s = _FIRST_PAUSE_S

    def refused(self, error: FFError) -> float:
        """Return the seconds until the next claim after one that failed.

        Data that cannot be read is met again only after the next sweep, so this pause need not grow.

        Raises:
            FFError: *error*, if the worker cannot claim at all. Stored data that cannot be read concerns one execution.
        """
        if error.retryable:
            return operations.CLAIM_WAIT_S
        if not isinstance(error, InternalFunctionError | ProtocolError | Corruption):
            raise error
        say_seldom(
            logging.ERROR, "claim", error.code, "A claim has failed and is tried again: %s", error
        )
        return _FIRST_PAUSE_S

    def attended(self, *, over: bool) -> float:
        """Return the seconds until the next claim after an execution; *over* is the value of :func:`ff_fast._core.worker.attend`.

        The pauses double up to 5 s while no execution is over, so that a worker that can end nothing calls few handlers.
        """
        if over:
            self._next_s = _FIRST_PAUSE_S
            return 0.0
        pause_s = self._next_s
        self._next_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        return pause_s


def serve(
    backend: Serving,
    options: operations.WorkerOptions,
    stopping: Callable[[], bool],
    halt: Callable[[], None],
) -> Generator[Run | Attend | operations.Rest, Any, None]:
    """Claim one execution after the other and attend to it, until the worker stops; one of its slots.

    Args:
        backend: The backend.
        options: Those of the worker.
        stopping: Whether the worker is to stop.
        halt: Stops it; called where there is nothing to do, if it ends then.

    Raises:
        FFError: The worker cannot claim at all.
    """
    patience, attending = Patience(), backend._attending
    # When the server was asked, and told that nothing is to come. What came back until then is there for one more claim.
    told_at: float | None = None
    while not stopping():
        began = time.monotonic()
        try:
            if told_at is None:
                handle = yield Run(options.claim())
            else:
                began, told_at = told_at, None
                handle = yield Run(options.claim(max_wait_s=None))
                if handle is None and attending.idle_since(began):
                    halt()
                    return
            if handle is None and options.until_idle and attending.idle_since(began):
                if not options.supervise:
                    halt()
                elif attending.asks():
                    asked_at = time.monotonic()
                    if not (yield from _remains(options)):
                        told_at = asked_at
        except FFError as error:
            if backend.closed:
                return
            attending.reached = False
            yield operations.Rest(patience.refused(error))
            continue
        attending.reached = True
        if handle is not None:
            # Attended to even if a stop was requested meanwhile: it is claimed.
            over = yield Attend(handle)
            yield operations.Rest(patience.attended(over=over))


def _remains(options: operations.WorkerOptions) -> Generator[Run, Any, bool]:
    """Return whether there are executions that may be claimed some time: delayed, or with a worker that may lose them."""
    try:
        remains: bool = yield Run(options.remaining)
    except PermissionDenied as error:
        say_seldom(
            logging.WARNING,
            "until_idle",
            error.code,
            "Worker %s does not wait for retries, delays and other workers: %s",
            options.worker_id,
            error,
        )
        return False
    return remains
