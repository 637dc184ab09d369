"""The ready queue of a lane: hints which partitions have work.

A ready queue is a sorted set of partitions, scored by the best execution of each. The executions themselves are in the
partitions' eligible sets. A lost hint therefore delays work until the next sweep over the partitions, and a stale hint
costs one empty claim. Lane and partition are in different slots, so a hint is a separate command after the call that
made work claimable. The call is done by then, so a hint that is refused or lost never becomes the error of the call.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, TypeVar

from ff_fast import keys
from ff_fast._core.steps import Command, Step, Steps, checked, command
from ff_fast.errors import FFError

if TYPE_CHECKING:
    from ff_fast._core import ops

T = TypeVar("T")


def ready_hint(lane: str, partition: int, score: bytes) -> Command:
    """Return the command that adds a partition to the ready queue of *lane*; its best score wins."""
    return command(b"ZADD", keys.ready(lane), b"LT", score, b"%d" % partition)


def with_hints(op: ops.Op[tuple[T, ops.Hints]], partition: int) -> Steps[T]:
    """Make a call that may make executions of *partition* claimable, then publish a hint per lane."""
    (reply,) = yield Step((op.command(),))
    value, hints = op.answer(reply)
    yield from publish_hints(hints, partition)
    return value


def publish_hints(hints: ops.Hints, partition: int) -> Steps[None]:
    """Publish to each lane the score of its best execution in *partition*; a sweep finds what cannot be published."""
    if hints:
        yield from _publish([ready_hint(lane, partition, score) for lane, score in hints])


def _publish(hints: list[Command]) -> Steps[bool]:
    """Send hints; return whether all of them were taken."""
    with contextlib.suppress(FFError):
        for reply in (yield Step(hints)):
            checked(reply)
        return True
    return False


def sweep(lane: str, partitions: int) -> Steps[bool]:
    """Publish a hint for every partition that has work in *lane*; return whether there is a new hint."""
    heads = yield Step(
        [
            command(b"ZRANGE", keys.eligible(keys.slot_tag(index), lane), b"0", b"0", b"WITHSCORES")
            for index in range(partitions)
        ]
    )
    hints = [
        ready_hint(lane, index, best[1]) for index, best in enumerate(map(checked, heads)) if best
    ]
    return bool(hints) and (yield from _publish(hints))
