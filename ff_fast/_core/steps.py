"""Steps: an operation is a generator, and a shell drives it.

The generator yields a :class:`Step`, a :class:`Pause` or an :class:`AwaitHint`, is resumed with the replies, and returns its value. A shell
moves the bytes and waits; it decides nothing.
"""

from __future__ import annotations

import contextlib
import logging
import random
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from ff_fast import keys
from ff_fast._hot.resp import pack_command
from ff_fast._log import say_seldom
from ff_fast.errors import (
    DeadlineExceeded,
    FFError,
    FunctionMissing,
    NotReplicated,
    Outcome,
    ProtocolError,
    from_server_error,
    make_unknown,
)

if TYPE_CHECKING:
    from ff_fast._core.line import Line, Waiter
    from ff_fast.types import BackendRetry

T = TypeVar("T")


class Command(NamedTuple):
    """One packed command, and a key that selects its node.

    Attributes:
        key: One of the command's keys; empty if any node may answer.
        request: The command as it goes on the wire.
        guarded: Makes the request for a cluster, where it is another one: it names one more key (see `keys.absent`), which
            costs time on both sides, and nothing moves away from a standalone server.
    """

    key: bytes
    request: bytes
    guarded: Callable[[], bytes] | None = None

    @property
    def slot(self) -> int | None:
        """The cluster slot of the command; None if any node may answer."""
        return keys.key_slot(self.key) if self.key else None


def command(name: bytes, key: bytes, *arguments: bytes) -> Command:
    """Return a command whose first argument is its key."""
    return Command(key, pack_command(name, key, *arguments))


class Step(NamedTuple):
    """Send *commands*, each to the node of its slot, and resume with the list of their replies, in order.

    Attributes:
        commands: One or more commands.
        block_s: How long the server may block before it answers, in seconds.
        large: The replies may be large: the request timeout is for the silence before a part of them, since all of them
            may take longer on a slow link.
        alone: The last command waits for what was written before it on its own connection, and lets everything behind it
            wait. The step goes out whole, on one connection that nobody else uses meanwhile, and no command of it
            follows a redirect: all keys are of one node, and a refusal is the command's reply.
        partial: What reaches one node of a cluster counts, whatever becomes of the others: a command whose node does not
            answer has the :class:`~ff_fast.errors.FFError` as its reply.
    """

    commands: Sequence[Command]
    block_s: float = 0.0
    large: bool = False
    alone: bool = False
    partial: bool = False

    @property
    def request(self) -> bytes:
        """All commands as one request, for a server that has every slot."""
        return b"".join([each.request for each in self.commands])

    @property
    def in_cluster(self) -> Step:
        """The step as it goes to nodes of a cluster."""
        commands = self.commands
        if all(each.guarded is None for each in commands):
            return self
        return self._replace(
            commands=[
                each if each.guarded is None else Command(each.key, each.guarded())
                for each in commands
            ]
        )


class Pause(NamedTuple):
    """Wait for *seconds*, then resume with an empty list."""

    seconds: float


class AwaitHint(NamedTuple):
    """Wait in *line* until *claim* is told something, or its time is up; then resume with an empty list.

    Attributes:
        claim: The claim that waits.
        line: Its line.
        serve: Makes the steps that serve the line once, which the shell runs as long as there are claims in it. It takes
            the claim whose caller runs them, None for another task. An error is raised for each claim in the line.
        blocks: They let the server block, and so need a connection of their own. If not, no time is ever up.
    """

    claim: Waiter
    line: Line
    serve: Callable[[Waiter | None], Steps[None]]
    blocks: bool


Steps = Generator[Step | Pause | AwaitHint, list[object], T]


DEFAULT_REQUEST_TIMEOUT_S = 5.0

# Together these retry a lost connection for about ten seconds before the caller gets an error.
_DEFAULT_RETRIES = 16
_DEFAULT_BASE = 2
_DEFAULT_FACTOR_MS = 10
_DEFAULT_JITTER_PERCENT = 50
_LONGEST_S = 1.0


def backoff(retry: BackendRetry) -> Iterator[float]:
    """Yield the pauses between attempts, in seconds: ``factor * base^n`` ms, at most 1 s, less a random share."""

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
    """Decides whether a failed call is retried, and after which pause; knows whether a try may have been applied.

    Every call may be sent again when its outcome is unknown: a repeat gives the same outcome.

    Args:
        retry: Number and length of the pauses; 0 retries never.
        writes: The call changes something, so a try may have been applied.
        retry_timeouts: Also retry after ``DeadlineExceeded``. Off by default: the caller has used up its time, unless
            the connection had died in silence, which a second try on a new connection finds out.
    """

    __slots__ = (
        "_doubtful",
        "_loaded",
        "_pauses",
        "_retry",
        "_retry_timeouts",
        "_sent_again",
        "_tries",
        "_writes",
    )

    def __init__(
        self,
        retry: BackendRetry,
        *,
        writes: bool = True,
        retry_timeouts: bool = False,
    ) -> None:
        self._retry = retry
        self._writes = writes
        self._retry_timeouts = retry_timeouts
        self._pauses: Iterator[float] | None = None
        self._loaded = False
        self._sent_again = False
        self._doubtful = False
        self._tries = 0

    def pause(self, error: FFError) -> float | None:
        """Return the seconds to wait before the next attempt; None if *error* is final.

        The shell loads a missing library, so the next attempt follows at once and is not counted.
        """
        if error.outcome is Outcome.UNKNOWN:
            self._doubtful = self._writes
        if isinstance(error, FunctionMissing) and not self._loaded:
            self._loaded = True
            return 0.0
        if not error.retryable or isinstance(error, NotReplicated):
            # The second has used up its time.
            return None
        if isinstance(error, DeadlineExceeded) and not self._retry_timeouts:
            if self._sent_again or not error.silent:
                return None
            self._sent_again = True
        if self._pauses is None:
            self._pauses = backoff(self._retry)
        pause = next(self._pauses, None)
        if pause is not None:
            self._tries += 1
        elif self._tries:
            say_seldom(
                logging.WARNING,
                "retries",
                error.code,
                "Gave up after %d retries: %s",
                self._tries,
                error,
            )
        return pause

    @property
    def writes(self) -> bool:
        """Whether a try may have been applied."""
        return self._writes

    def settle(self, error: FFError) -> None:
        """Give the final *error* the outcome of the whole call, which is the worst of all its tries.

        Whatever refuses the last try, even the function itself, says nothing about an earlier one: its effects may have
        been overtaken by somebody else's.
        """
        if self._doubtful:
            make_unknown(error, "An earlier try of the call may have been applied.")

    def give_up(self) -> None:
        """Retry no more until the next success: another one has used up the retries."""
        self._pauses = iter(())
        self._tries = 0

    def reset(self) -> None:
        """Start again with all retries, after a success."""
        self._pauses = None
        self._loaded = False
        self._tries = 0


@contextlib.contextmanager
def applied_in_part() -> Iterator[None]:
    """A part of the call was applied before this block, so the outcome of an error inside is unknown."""
    try:
        yield
    except FFError as error:
        make_unknown(error, "A part of the call was applied.")
        raise


def send_one(one: Command, block_s: float = 0.0) -> Steps[list[bytes]]:
    """Send one plain command and return its answer as :func:`checked` reads it."""
    (reply,) = yield Step((one,), block_s)
    return checked(reply)


def time_ms(reply: object) -> int:
    """Return the time in the reply to ``TIME``, in ms since the epoch."""
    seconds, micros = checked(reply)
    return int(seconds) * 1000 + int(micros) // 1000


def is_foreign(reply: object) -> bool:
    """Return whether a command found a key of another type, which is none of ours."""
    return isinstance(reply, Exception) and str(reply).startswith("WRONGTYPE")


def checked(reply: object) -> list[bytes]:
    """Return the list in the reply to a plain command; empty for a number or nil.

    Raises:
        FFError: The server refused the command, its node did not answer, or the reply has another type.
    """
    if isinstance(reply, FFError):
        raise reply
    if isinstance(reply, Exception):
        raise from_server_error(str(reply))
    if reply is None or isinstance(reply, int):
        return []
    if not isinstance(reply, list):
        raise ProtocolError
    return reply
