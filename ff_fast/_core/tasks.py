"""Tasks of agents without I/O: names, calls, and the reader of a task's events."""

from __future__ import annotations

from hashlib import sha1
from typing import TYPE_CHECKING, NamedTuple

from ff_fast import keys
from ff_fast._core import ops
from ff_fast._core.follow import Watch
from ff_fast._core.operations import Call

if TYPE_CHECKING:
    from ff_fast._core.steps import Step

_EVENTS_AT_ONCE = 256


def name_of(execution_id: str) -> ops.TaskName:
    """Return the name of the task that belongs to a canonical execution id: both have one slot."""
    return ops.TaskName(keys.slot_tag_of(execution_id), execution_id[-36:])


def digest_of(*names: str) -> str:
    """Return what stands for an owner in keys."""
    return sha1(
        "\0".join(names).encode("utf-8", "surrogatepass"), usedforsecurity=False
    ).hexdigest()


def call(op: ops.Op[ops.T]) -> Call[ops.T]:
    """Return the operation that makes one call; a repeat of it changes nothing."""
    return Call(lambda: ops.call(op), writes=not op.read_only)


class TaskEvent(NamedTuple):
    """An event of a task.

    Attributes:
        version: Version of the document that it has led to.
        data: Its text.
        cursor: Its place in the log.
    """

    version: int
    data: bytes
    cursor: str


class TaskEvents:
    """A live reader of a task's events: an item source of a reader.

    Args:
        name: The task.

    Attributes:
        part: What listens to the task.
        ended: Whether the task was removed after it was there.
    """

    __slots__ = ("_after", "_name", "_seen", "ended", "part")

    start = "0-0"
    tally = None

    def __init__(self, name: ops.TaskName) -> None:
        self._name = name
        self._after = self.start
        self._seen = False
        self.ended = False
        self.part = Watch(keys.task_channel(*name), self._op)

    @property
    def _op(self) -> ops.Op[ops.TaskRead]:
        return ops.read_task(self._name, after=self._after, count=_EVENTS_AT_ONCE)

    def restart(self, cursor: str | None = None) -> None:
        """Continue after *cursor*, or after the last read; items after it were not delivered."""
        if cursor is not None:
            self._after = cursor
        self.part.op = self._op
        self.part.look()

    @property
    def wake_at(self) -> float:
        """When to ask for a step although nothing was pushed, in monotonic time."""
        return self.part.wake_at

    def step(self) -> Step | None:
        """Return the next request; None if there is nothing to be asked."""
        return self.part.step()

    def receive(self, reply: object) -> list[TaskEvent]:
        """Take the reply to the last step; return its events.

        Raises:
            FFError: The server refused the request.
        """
        read = self.part.receive(reply)
        if read.events:
            self._after = read.events[-1][0]
            self.part.op = self._op
        if read.more:
            self.part.look()
        self.ended = self._seen and not read.exists
        self._seen = read.exists
        return [TaskEvent(version, data, place) for place, version, data in read.events]

    def take(self) -> list[TaskEvent]:
        """Return nothing: what is pushed says only that there is something to be read."""
        self.part.take()
        return []
