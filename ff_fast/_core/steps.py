"""What a multi-step operation asks of its shell.

An operation of several steps is a generator: it yields a :class:`Step` or a :class:`Pause`, is resumed with the
replies, and returns its value. A shell moves the bytes and waits; it decides nothing.
"""

from __future__ import annotations

import random
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar

from ff_fast._hot.resp import pack_command
from ff_fast.errors import DeadlineExceeded, FFError, Outcome, ProtocolError, from_server_error

if TYPE_CHECKING:
    from ff_fast.types import BackendRetry

T = TypeVar("T")


class Step(NamedTuple):
    """Send *request*, and resume with the list of its *replies* replies.

    Attributes:
        request: One or more packed commands.
        replies: How many replies they have.
        block_s: How long the server may block before it answers, in seconds.
    """

    request: bytes
    replies: int = 1
    block_s: float = 0.0


class Pause(NamedTuple):
    """Wait for *seconds*, then resume with an empty list."""

    seconds: float


Flow = Generator[Step | Pause, list[object], T]


class Source(Protocol):
    """What is read step by step until it has ended, and goes on from where it stood after a lost connection."""

    @property
    def ended(self) -> bool: ...

    def restart(self) -> None: ...


DEFAULT_REQUEST_TIMEOUT_S = 5.0

# A lost connection is tried again for about ten seconds before a caller hears of it.
_DEFAULT_RETRIES = 16
_DEFAULT_BASE = 2
_DEFAULT_FACTOR_MS = 10
_DEFAULT_JITTER_PERCENT = 50
_LONGEST_S = 1.0


def backoff(retry: BackendRetry) -> Iterator[float]:
    """Yield the pauses between attempts, in seconds: ``factor * base^n`` ms, at most a second, less some jitter."""

    def given(value: int | None, default: int) -> int:
        return default if value is None else value

    base = given(retry.exponent_base, _DEFAULT_BASE)
    factor = given(retry.factor, _DEFAULT_FACTOR_MS)
    jitter = given(retry.jitter_percent, _DEFAULT_JITTER_PERCENT) / 100
    pause = factor / 1000
    for _ in range(given(retry.number_of_retries, _DEFAULT_RETRIES)):
        yield min(pause, _LONGEST_S) * (1 - jitter * random.random())  # noqa: S311 - no secret
        pause = min(pause * base, _LONGEST_S)


class Retries:
    """Whether what failed is tried again, and after which pause.

    Args:
        retry: Pauses and how many of them; with none, nothing is tried twice.
        repeatable: Sending the call again gives the same outcome, so that one whose fate is unknown may be.
        patient: A deadline that passed is a failure like any other. Without it, it is the last one: the caller has
            waited as long as it wanted to.
    """

    __slots__ = ("_patient", "_pauses", "_repeatable", "_retry")

    def __init__(
        self, retry: BackendRetry, *, repeatable: bool = True, patient: bool = False
    ) -> None:
        self._retry = retry
        self._repeatable = repeatable
        self._patient = patient
        self._pauses: Iterator[float] | None = None

    def pause(self, error: FFError) -> float | None:
        """Return the seconds to wait before the next attempt; None where *error* is the last word."""
        if not error.retryable or (isinstance(error, DeadlineExceeded) and not self._patient):
            return None
        if error.outcome is Outcome.UNKNOWN and not self._repeatable:
            return None
        if self._pauses is None:
            self._pauses = backoff(self._retry)
        return next(self._pauses, None)

    def reset(self) -> None:
        """Something went well: what fails next is a first failure."""
        self._pauses = None


def checked_step(step: Step) -> Flow[list[bytes]]:
    (reply,) = yield step
    return checked(reply)


def server_ms() -> Flow[int]:
    """Ask for the server's time, in ms since the epoch."""
    (reply,) = yield Step(pack_command(b"TIME"))
    seconds, micros = checked(reply)
    return int(seconds) * 1000 + int(micros) // 1000


def checked(reply: object) -> list[bytes]:
    """Return the list that a plain command answered, empty for a number or nothing.

    Raises:
        FFError: The server refused the command, or the reply is something else.
    """
    if isinstance(reply, Exception):
        raise from_server_error(str(reply))
    if reply is None or isinstance(reply, int):
        return []
    if not isinstance(reply, list):
        raise ProtocolError
    return reply
