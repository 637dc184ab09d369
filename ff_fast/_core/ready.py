"""The ready queue of a lane: hints that say which partitions have work.

A ready queue is a sorted set, scored by the best execution of each partition. The work
itself is in the partitions' eligible sets, so a hint that is lost delays work until the next sweep over the
partitions, and a stale one costs one empty claim. Lane and partitions lie in different slots, so a hint is a command of
its own after the call that made work claimable.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from ff_fast import keys
from ff_fast._core.steps import Flow, Step, checked
from ff_fast._hot.resp import pack_command

if TYPE_CHECKING:
    from ff_fast._core import ops

T = TypeVar("T")


def hint(lane: str, partition: int, score: bytes) -> bytes:
    """Return the command that tells a lane of work: the best score of a partition wins."""
    return pack_command(b"ZADD", keys.ready(lane), b"LT", score, b"%d" % partition)


def hinted(op: ops.Op[tuple[T, ops.Hints]], partition: int) -> Flow[T]:
    """One call on a partition, after which its executions may wait for workers: their lanes are told."""
    (reply,) = yield Step(op.request())
    value, hints = op.answer(reply)
    yield from publish_hints(hints, partition)
    return value


def publish_hints(hints: ops.Hints, partition: int) -> Flow[None]:
    if hints:
        commands = [hint(lane, partition, score) for lane, score in hints]
        for reply in (yield Step(b"".join(commands), replies=len(commands))):
            checked(reply)


def create(op: ops.Op[tuple[None, ops.Hints]], execution_id: str) -> Flow[str]:
    """Create an execution, then tell its lane; a repeat tells it again."""
    yield from hinted(op, keys.partition_index(execution_id))
    return execution_id


def sweep(lane: str, partitions: int) -> Flow[bool]:
    """Look at the head of every partition and put the hints that are missing; True where there is work."""
    request = b"".join(
        pack_command(
            b"ZRANGE", keys.eligible(keys.slot_tag(index), lane), b"0", b"0", b"WITHSCORES"
        )
        for index in range(partitions)
    )
    heads = yield Step(request, replies=partitions)
    hints = []
    for index, head in enumerate(heads):
        best = checked(head)
        if best:
            hints.append(hint(lane, index, best[1]))
    if hints:
        yield Step(b"".join(hints), replies=len(hints))
    return bool(hints)
