"""What an operation asks of its shell, step by step.

An operation is a generator: it yields a :class:`Step` or a :class:`Pause`, is resumed with the replies, and returns its
value. A shell moves the bytes and waits; it decides nothing.
"""

from __future__ import annotations

import random
from collections.abc import Generator, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar

from ff_fast import keys
from ff_fast._hot.resp import pack_command
from ff_fast.errors import (
    DeadlineExceeded,
    FFError,
    FunctionMissing,
    Outcome,
    ProtocolError,
    from_server_error,
)

if TYPE_CHECKING:
    from ff_fast.types import BackendRetry

T = TypeVar("T")


class Command(NamedTuple):
    """One packed command, and a key that says which node it goes to.

    Attributes:
        key: One of the command's keys; empty where any node may answer.
        request: The command as it goes on the wire.
    """

    key: bytes
    request: bytes

    @property
    def slot(self) -> int | None:
        """The cluster slot of the command; None where any node may answer."""
        return keys.key_slot(self.key) if self.key else None


def command(name: bytes, key: bytes, *arguments: bytes) -> Command:
    """Return a command whose first argument is its key."""
    return Command(key, pack_command(name, key, *arguments))


class Step(NamedTuple):
    """Send *commands*, each to the node of its slot, and resume with the list of their replies, in order.

    Attributes:
        commands: One or more commands.
        block_s: How long the server may block before it answers, in seconds.
    """

    commands: Sequence[Command]
    block_s: float = 0.0

    @property
    def request(self) -> bytes:
        """All commands as one request, for a server that has every slot."""
        return b"".join([each.request for each in self.commands])


class Pause(NamedTuple):
    """Wait for *seconds*, then resume with an empty list."""

    seconds: float


Steps = Generator[Step | Pause, list[object], T]


class Source(Protocol[T]):
    """A stream of items that is read answer by answer until it has ended."""

    @property
    def ended(self) -> bool:
        """Whether the last item was read."""

    @property
    def start(self) -> str | None:
        """Cursor of the beginning; None as long as only the server knows it."""

    def read(self) -> Steps[list[T]]:
        """Ask once; the items that the answer brought, none where there was nothing in time."""

    def restart(self, cursor: str | None = None) -> None:
        """Go on behind *cursor*, where items were read that nobody took; None goes on behind what was read last."""


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
        retry_timeouts: Also retry after ``DeadlineExceeded``. Off by default: the caller has used up its time.
    """

    __slots__ = ("_loaded", "_pauses", "_repeatable", "_retry", "_retry_timeouts")

    def __init__(
        self, retry: BackendRetry, *, repeatable: bool = True, retry_timeouts: bool = False
    ) -> None:
        self._retry = retry
        self._repeatable = repeatable
        self._retry_timeouts = retry_timeouts
        self._pauses: Iterator[float] | None = None
        self._loaded = False

    def pause(self, error: FFError) -> float | None:
        """Return the seconds to wait before the next attempt; None where *error* is the last word.

        A missing library is loaded by the shell, so the attempt after it follows at once and is not counted.
        """
        if isinstance(error, FunctionMissing) and not self._loaded:
            self._loaded = True
            return 0.0
        if not error.retryable or (
            isinstance(error, DeadlineExceeded) and not self._retry_timeouts
        ):
            return None
        if error.outcome is Outcome.UNKNOWN and not self._repeatable:
            return None
        if self._pauses is None:
            self._pauses = backoff(self._retry)
        return next(self._pauses, None)

    def reset(self) -> None:
        """Something went well: what fails next is a first failure."""
        self._pauses = None
        self._loaded = False


def ask(one: Command, block_s: float = 0.0) -> Steps[list[bytes]]:
    """Send a plain command and return the list that it answered, as :func:`checked` reads it."""
    (reply,) = yield Step((one,), block_s)
    return checked(reply)


def server_ms(key: bytes) -> Steps[int]:
    """Ask the server that holds *key* for its time, in ms since the epoch."""
    seconds, micros = yield from ask(Command(key, pack_command(b"TIME")))
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
