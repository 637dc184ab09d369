"""The ready queue of a lane: hints that say which partitions have work.

A ready queue is a sorted set of partitions, scored by the best execution of each. The work itself stands in the
partitions' eligible sets. So a lost hint delays work until the next sweep over the partitions, and a stale hint costs
one empty claim. Lane and partition lie in different slots, so a hint is a command of its own behind the call that made
work claimable.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from ff_fast import keys
from ff_fast._core.steps import Command, Step, Steps, checked, command

if TYPE_CHECKING:
    from ff_fast._core import ops

T = TypeVar("T")


def ready_hint(lane: str, partition: int, score: bytes) -> Command:
    """Return the command that tells a lane of work; the best score of a partition wins."""
    return command(b"ZADD", keys.ready(lane), b"LT", score, b"%d" % partition)


def with_hints(op: ops.Op[tuple[T, ops.Hints]], partition: int) -> Steps[T]:
    """Run a call that may make executions of *partition* claimable, then publish a hint per lane."""
    (reply,) = yield Step((op.command(),))
    value, hints = op.answer(reply)
    yield from publish_hints(hints, partition)
    return value


def publish_hints(hints: ops.Hints, partition: int) -> Steps[None]:
    """Tell each lane of the best execution that it has in *partition*."""
    if hints:
        for reply in (yield Step([ready_hint(lane, partition, score) for lane, score in hints])):
            checked(reply)


def sweep(lane: str, partitions: int) -> Steps[bool]:
    """Put the hints that are missing, from the head of every partition; return whether there is work."""
    heads = yield Step(
        [
            command(b"ZRANGE", keys.eligible(keys.slot_tag(index), lane), b"0", b"0", b"WITHSCORES")
            for index in range(partitions)
        ]
    )
    hints = [
        ready_hint(lane, index, best[1]) for index, best in enumerate(map(checked, heads)) if best
    ]
    if hints:
        yield Step(hints)
    return bool(hints)
