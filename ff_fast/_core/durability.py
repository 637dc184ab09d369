"""Levels of durability, without I/O: what the servers are asked before a level is claimed.

``WAIT`` and ``WAITAOF`` speak of the writes before them on their own connection, and only of those. So a question is one
step on a connection of its own: what shows that the frames stand on this very server, a write, and the wait. The write
comes after the frames in the history of that server, whichever connection has brought them, and the wait covers it.
Nothing is concluded from an answer of another connection or of an earlier question.
"""

from __future__ import annotations

import copy
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from ff_fast import keys
from ff_fast._core import ops
from ff_fast._core.steps import Command, Pause, Step
from ff_fast._hot.resp import pack_command, pack_fcall
from ff_fast.errors import (
    FFError,
    InvalidInput,
    InvalidType,
    NotReplicated,
    ProtocolError,
    SequenceGap,
    UnsupportedServer,
    for_code,
    from_server_error,
)
from ff_fast.types import Durability, seconds
from ff_fast.types.stream import MAX_REPLICAS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from datetime import timedelta

    from ff_fast._core.steps import Steps

DEFAULT_TIMEOUT_S = 1.0

ASKS = 128
"""Most writers whose frames one step asks for."""

_LONGEST_S = 1.0
"""Longest wait on the server; those that have time left ask again."""

_MARK_MS = b"60000"

AGAIN_S = 0.02
"""Pause before a question that failed is asked again."""

_NO_FILE = "The server cannot say what is on its disk; set appendonly to yes on it, and use Valkey 7.2, Redis 7.2 or newer."


class Level(NamedTuple):
    """A level that is asked for, and the longest wait for it in seconds."""

    durability: Durability
    timeout_s: float

    @classmethod
    def checked(cls, durability: object, timeout: float | timedelta) -> Level:
        """Check the arguments of a caller; None stands for `Durability.stored`."""
        level = Durability.stored() if durability is None else durability
        timeout_s = seconds("durability_timeout", timeout, zero=False)
        if timeout_s < 0.001:
            raise InvalidInput("durability_timeout must be at least a millisecond.")
        if not isinstance(level, Durability):
            raise InvalidType(f"durability must be a Durability, not {type(level).__name__}.")
        return cls(level, timeout_s)

    @property
    def asks(self) -> bool:
        """Whether the server has to be asked: every acknowledged frame is stored."""
        return self.durability != Durability.stored()


STORED = Level(Durability.stored(), DEFAULT_TIMEOUT_S)


class Evidence(NamedTuple):
    """What shows that something stands on the server that answers it.

    Attributes:
        command: A command that changes nothing, or nothing more.
        check: Takes its reply; raises an ``FFError`` where the reply does not show it.
        place: Id of the newest frame that it is about; the smallest id for anything else.
    """

    command: Command
    check: Callable[[object], object]
    place: tuple[int, int] = (0, 0)

    @property
    def slot_tag(self) -> str:
        """The slot tag of its key."""
        key = self.command.key
        return key[key.index(b"{") : key.index(b"}") + 1].decode()


def of_call(op: ops.Op[Any]) -> Evidence:
    """Return the repeat of a call, which is refused unless the call has been applied."""
    return Evidence(op.command(), op.answer)


def of_frames(stream_keys: Sequence[bytes], writer: bytes, place: tuple[int, int]) -> Evidence:
    """Return a batch without frames, whose answer names the newest frame up to a sequence.

    Args:
        stream_keys: The stream keys of the attempt.
        writer: Id of the writer.
        place: Ms and sequence of a frame that was acknowledged.
    """

    def check(reply: object) -> None:
        if isinstance(reply, Exception):
            raise from_server_error(str(reply), "ff_append")
        if isinstance(reply, list) and len(reply) > 1 and isinstance(reply[1], bytes):
            raise for_code(reply[1].decode("ascii", "replace"), reply[2:])
        if not isinstance(reply, bytes):
            raise ProtocolError
        ms, sequence = ops.entry_id(reply.split(b" ")[1].decode("ascii", "replace"))
        # The time of a frame that was trimmed since then is not known.
        if sequence != place[1] or ms not in (0, place[0]):
            raise SequenceGap(place[1], place[1] + 1)

    # Three arguments behind the size, and two keys.
    argv = (b"32", writer, ops.number(place[1]), b"")
    command = Command(stream_keys[0], pack_fcall(b"ff_append", tuple(stream_keys[:2]), argv))
    return Evidence(command, check, place)


class Ask:
    """The question whether the frames of a writer, or what a call has written, have reached a level.

    Attributes:
        evidence: What shows that they stand on the server.
        level: The level.
        until: The end of the wait, in monotonic time.
        replays: How often the writer had to store frames again when the question was made.
        reached: The level, once it was confirmed.
        seen: What was confirmed at last, where that is less.
        failure: Why this question was not answered; of one that is retryable, it is asked again.
        wake: Called when the question has ended.
    """

    __slots__ = (
        "evidence", "failure", "level", "open", "reached", "replays", "seen", "until", "wake",
    )  # fmt: skip

    def __init__(self, evidence: Evidence, level: Level, until: float, replays: int = 0) -> None:
        self.evidence = evidence
        self.level = level
        self.until = until
        self.replays = replays
        self.reached: Durability | None = None
        self.seen = Durability.stored()
        self.failure: FFError | None = None
        self.open = False
        self.wake: Callable[[], None] = _nobody

    @property
    def place(self) -> tuple[int, int]:
        """Id of the newest frame that the question is about."""
        return self.evidence.place

    def left(self) -> float:
        """Return the seconds that are left."""
        return self.until - time.monotonic()

    def begin(self) -> None:
        """Note that the question is put, for the first time or again."""
        self.failure, self.open = None, True

    def end(self, failure: FFError | None = None) -> None:
        """Note that the question has ended, with the *failure* that it has met."""
        if self.open:
            self.failure, self.open = failure, False
            self.wake()

    def again(self) -> bool:
        """Return whether to ask again, given how the question has ended.

        Raises:
            NotReplicated: The time is up.
            FFError: The question has failed for good.
        """
        if self.reached is not None:
            return False
        failure = self.failure
        if failure is not None and not failure.retryable:
            raise failure
        if self.left() > 0:
            return True
        raise NotReplicated(replicas=self.seen.replicas, synced=self.seen.on_disk) from None


def _nobody() -> None:
    """Nobody waits."""


def _question(durability: Durability, slot_tag: str, wait_s: float) -> tuple[Command, Command]:
    """Return a write in the slot of a partition, and the wait for it and all before."""
    key = keys.written(slot_tag)
    mark = pack_command(b"SET", key, b"1", b"PX", _MARK_MS)
    ms = ops.number(max(int(wait_s * 1000), 1))
    replicas = ops.number(durability.replicas)
    wait = (
        pack_command(b"WAITAOF", b"1", replicas, ms)
        if durability.on_disk
        else pack_command(b"WAIT", replicas, ms)
    )
    return Command(key, mark), Command(key, wait)


def _answer(durability: Durability, reply: object) -> Durability:
    """Return what the answer to a wait says."""
    if isinstance(reply, Exception):
        raise _refusal(str(reply))
    if durability.on_disk:
        if isinstance(reply, list) and len(reply) == 2:
            here, replicas = reply
            if isinstance(here, int) and isinstance(replicas, int):
                return Durability(min(replicas, MAX_REPLICAS), on_disk=here > 0)
    elif isinstance(reply, int):
        return Durability(min(reply, MAX_REPLICAS))
    raise ProtocolError


def _refusal(text: str) -> FFError:
    error = from_server_error(text)
    if isinstance(error, UnsupportedServer) or "unknown command" in text:
        return UnsupportedServer(_NO_FILE)
    return error


class Question:
    """What is put to the server that has the slots of several who ask for one level.

    Attributes:
        step: The step, which goes out alone.
    """

    __slots__ = ("_asks", "_level", "_taken", "step")

    def __init__(self, level: Durability, asks: Sequence[Ask]) -> None:
        self._level = level
        self._asks = asks
        self._taken = 0
        wait_s = min(max(0.001, *(each.left() for each in asks)), _LONGEST_S)
        evidence = [each.evidence.command for each in asks]
        question = _question(level, asks[0].evidence.slot_tag, wait_s)
        self.step = Step((*evidence, *question), block_s=wait_s, alone=True)

    def take(self, reply: object) -> bool:
        """Take the next reply; return whether anybody waits for more of them."""
        taken, self._taken = self._taken, self._taken + 1
        try:
            if taken < len(self._asks):
                try:
                    self._asks[taken].evidence.check(reply)
                except FFError as error:
                    self._asks[taken].end(error)
            elif taken == len(self._asks):
                if isinstance(reply, Exception):
                    raise from_server_error(str(reply))
            else:
                self._seen(_answer(self._level, reply))
        except FFError as error:
            self.fail(error)
        return any(each.open for each in self._asks)

    def fail(self, error: FFError) -> None:
        """Take an error that has met all who wait."""
        for each in self._asks:
            if each.open:
                each.end(copy.copy(error))

    def _seen(self, seen: Durability) -> None:
        for each in self._asks:
            if each.open:
                each.seen = seen
                if seen.covers(each.level.durability):
                    each.reached = seen
                each.end()


def reach(evidence: Evidence, level: Level, until: float) -> Steps[Durability]:
    """Ask until a level is reached.

    Raises:
        NotReplicated: It is not, until that monotonic time.
    """
    asked = Ask(evidence, level, until)
    while True:
        asked.begin()
        question = Question(level.durability, (asked,))
        for reply in (yield question.step):
            question.take(reply)
        if not asked.again():
            assert asked.reached is not None
            return asked.reached
        yield Pause(AGAIN_S)


def can_reach(durability: Durability, slot_tag: str) -> Steps[None]:
    """Check that the server can confirm the level at all.

    Raises:
        UnsupportedServer: It has no append-only file.
    """
    if durability.on_disk:
        _, wait = _question(Durability.synced(), slot_tag, 0.001)
        (reply,) = yield Step((wait,), block_s=0.001, alone=True)
        _answer(durability, reply)
